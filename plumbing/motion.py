"""Videos of drawn scenes: how a scene moves, and what is measured of frames. A frame is a function of (seed, i, frame).

Shapes: T frames; strips uint8 (B, H, T W, 3), the frames of a video side by side.
"""
import math

import numpy as np
import torch

from data import COLOUR_PAIRS, COLOURS, FontFile, Glyphs, luminance


# ------------------------------------------------------------------------------------------ scenes that move

class Moving:
    """Drawn scenes that move, T frames each: image(i) is (3 T, H, W), frame after frame. Frame 0 is the scene itself.

    From frame to frame the letter turns by 1 to 3 degrees, drifts by up to 0.8 % of the shorter side, and goes a
    fifteenth of the way to another colour, where it stays. Its ground does not move.
    """

    def __init__(self, scenes, frames):
        vars(self).update(vars(scenes), frames=frames)

    def motion(self, i, frame):
        """Return what of scene i is different at this frame."""
        s, rng = self.scene(i), np.random.default_rng((self.seed, i + self.offset, 5))          # alike at every frame
        turn = math.radians(rng.uniform(1, 3) * rng.choice([-1, 1]))
        drift = rng.uniform(-0.008, 0.008, 2)
        colours = same_side(s["letter"], s["ground"])
        target = np.array(colours[rng.integers(len(colours))])
        return dict(angle=s["angle"] + frame * turn, x=s["x"] + frame * drift[0], y=s["y"] + frame * drift[1],
                    letter_rgb=s["letter_rgb"] + min(1, frame / 15) * (target - s["letter_rgb"]))

    def frame(self, i, frame):
        """Return a frame of scene i, (3, H, W)."""
        return super().image(i, **self.motion(i, frame))

    def image(self, i):
        return torch.cat([self.frame(i, frame) for frame in range(self.frames)])


class MovingGlyphs(Moving, Glyphs):
    """Moving scenes of data.Glyphs."""


class MovingFont(Moving, FontFile):
    """Moving scenes of data.FontFile."""


def moving(scenes, frames):
    """Return a source of drawn scenes as a source of videos, with the same labels and captions."""
    return (MovingFont if isinstance(scenes, FontFile) else MovingGlyphs)(scenes, frames)


def same_side(letter, ground):
    """Return the colours on the letter's side of the ground's brightness. All mixtures of two of them can be read."""
    side = lambda name: luminance(COLOURS[name]) > luminance(COLOURS[ground])
    return [COLOURS[name] for name, other in COLOUR_PAIRS if other == ground and side(name) == side(letter)]
