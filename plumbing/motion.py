"""Videos of drawn scenes: how a scene moves, and how the frames of a video are measured.

Shapes: videos (B, T, 3, H, W); strips uint8 (B, H, T W, 3), the T frames of a video side by side.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F

from data import COLOUR_PAIRS, COLOURS, FontFile, Glyphs, luminance


# ------------------------------------------------------------------------------------------ scenes that move

TURN = 3, 6                                                               # degrees from frame to frame


class Moving:
    """Drawn scenes that move: image(i) is (3 T, H, W), frame after frame, each a function of (seed, i, frame).

    Frame 0 is the scene itself. From frame to frame the letter turns by 3 to 6 degrees, drifts by up to 0.8 % of the
    shorter side along each axis, and goes a fifteenth of the way to a colour, perhaps its own, where it stays. Its
    ground does not move.

    one: image(i) is one of the frames, (3, H, W). Every class has every frame in turn.
    """

    def __init__(self, scenes, frames, one=False):
        vars(self).update(vars(scenes), frames=frames, one=one)

    def motion(self, i, frame):
        """Return what of scene i is different at this frame."""
        s, rng = self.scene(i), np.random.default_rng((self.seed, i + self.offset, 5))          # alike at every frame
        turn = math.radians(rng.uniform(*TURN) * rng.choice([-1, 1]))
        drift = rng.uniform(-0.008, 0.008, 2)
        colours = same_side(s["letter"], s["ground"])
        target = np.array(colours[rng.integers(len(colours))])
        return dict(angle=s["angle"] + frame * turn, x=s["x"] + frame * drift[0], y=s["y"] + frame * drift[1],
                    letter_rgb=s["letter_rgb"] + min(1, frame / 15) * (target - s["letter_rgb"]))

    def image(self, i):
        draw, shown = super().image, [i // len(self.classes) % self.frames] if self.one else range(self.frames)
        return torch.cat([draw(i, **self.motion(i, frame)) for frame in shown])


class MovingGlyphs(Moving, Glyphs):
    """Moving scenes of data.Glyphs."""


class MovingFont(Moving, FontFile):
    """Moving scenes of data.FontFile."""


def in_motion(scenes, frames):
    """Return drawn scenes as videos, with the same labels and captions. One frame: the source as it is."""
    if frames == 1:
        return scenes
    return (MovingFont if isinstance(scenes, FontFile) else MovingGlyphs)(scenes, frames)


def one_frame(source):
    """Return a source of videos as one of images, a frame of each video. Other sources stay as they are."""
    return type(source)(source, source.frames, one=True) if isinstance(source, Moving) else source


def same_side(letter, ground):
    """Return the colours on the letter's side of the ground's brightness. All mixtures of two of them can be read."""
    side = lambda name: luminance(COLOURS[name]) > luminance(COLOURS[ground])
    return [COLOURS[name] for name, other in COLOUR_PAIRS if other == ground and side(name) == side(letter)]


# ------------------------------------------------------------------------------------------ what is measured of frames

def split_frames(strips, frames):
    """Return the frames as images (B T, H, W, 3), and how videos move: dict(change=(B,), turns=(B, T - 1)) or {}.

    change    mean square of the differences of neighbouring frames, of values in -1 to 1
    """
    if frames == 1:
        return strips, {}
    videos = strips.unflatten(2, (frames, -1)).movedim(2, 1)              # (B, T, H, W, 3)
    x = videos.movedim(-1, 2).float() / 127.5
    return videos.flatten(0, 1), dict(change=x.diff(dim=1).square().flatten(1).mean(1), turns=turns(x))


def turns(videos):
    """Measure by how many degrees the picture turns from frame to frame: (B, T, 3, H, W) -> (B, T - 1) float64.

    Of all small shifts and turns we take that whose change of the picture, to first order, is nearest to the change
    that we see (Lucas and Kanade): a linear problem with three unknowns. Real scenes: a degree off on average, as
    their colours change, too, but nearly the same from frame to frame (tested).
    """
    height, width = videos.shape[-2:]
    k = max(1, min(height, width) // 32)                                  # a motion must be about a pixel at most
    x = F.avg_pool2d(videos.flatten(0, 1), k).unflatten(0, videos.shape[:2]).double()
    v, u = torch.meshgrid(*((torch.arange(n) + 0.5 - n / 2 for n in x.shape[-2:])), indexing="ij")
    down, right = torch.gradient((x[:, 1:] + x[:, :-1]) / 2, dim=(-2, -1))
    ways = torch.stack([right, down, down * u - right * v], -1)           # as the picture changes with x, y, angle
    ways, seen = (a[..., 3:-3, 3:-3, :].flatten(2, -2) for a in (ways, -x.diff(dim=1)[..., None]))
    gram = ways.mT @ ways + 1e-3 * torch.eye(3, dtype=torch.float64)      # a picture of one colour turns by 0
    return torch.linalg.solve(gram, ways.mT @ seen)[..., 2, 0].rad2deg()


def motion_scores(samples, readable):
    """Score videos: how far and how evenly they turn, and how much frames differ. readable: by the network; then also
    the read rate of each frame, and the share of videos that show one letter in all frames."""
    turn, labels = samples["turns"], torch.tensor(samples["labels"])
    scores = dict(change=samples["change"].mean().item(), turn=turn.abs().mean().item(),
                  uneven_turn=turn.diff(dim=1).square().mean().sqrt().item())
    if readable:
        letters = samples["character"].argmax(1).reshape(len(labels), -1)
        scores["same_letter"] = (letters == letters[:, :1]).all(1).double().mean().item()
        if labels.min() >= 0:
            rates = (letters == labels[:, None]).double().mean(0).tolist()
            scores |= {f"read_frame_{frame}": rate for frame, rate in enumerate(rates)}
    return scores
