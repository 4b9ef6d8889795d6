"""Video: frames as one more axis of Matryoshka's levels, and attention over time.

Paper: Matryoshka Diffusion Models, its video model. We had neither its text nor a configuration of it. Others' notes
name the levels: one frame of 64 px, then 16 such frames, then 16 frames of 256 px. The rest is from the released code.
Needs: nested_unet.py. Next: cascade.py.

A video has T frames. A level of the nest may have fewer pixels than the level above it, or fewer frames, or both:

    space   average k x k pixels of each frame, as in nested_unet.py
    time    KEEP one frame in k. The average of frames that move is blurred: no image model has seen such images

    16 x 256 x 256   --space-->   16 x 64 x 64   --time-->   1 x 64 x 64        the lowest level is an image model

All levels share t and have noise of their own, as before. The shift follows from what is averaged (eq. 4 and 5 of
simple diffusion): averaging n values divides the variance of their noise by n. A kept frame has the noise that it had.
So a level of time does not shift the schedule. Averaging T frames would, by log T. `python video.py` measures both.
level_schedules (nested_unet.py) needs no change: it reads the size of a FRAME.

The network is the nested network, run on each frame as on an image. Behind each of its blocks the T frames attend to
each other, position by position, and a learned matrix mixes them. Both start at zero: at first the network is T image
networks, to the bit.

Frames travel as channels: z^r is (B, 3 T_r, H_r, W_r), frame after frame. So losses, samplers, noise, EMA, checkpoints
and the wavelet see an image with more channels, and one frame is an image. Only this file, precondition.py, and what
makes, draws or measures videos look at single frames.

Legend of shapes: B videos, T frames of a level, T' of the level below; maps (B T, C, H, W), the frames of a video one
after the other; tokens (B T, N, C); logsnr (B,) or a scalar, E emb_channels.

# Beyond the papers: frames are nearly alike, so precondition.py treats frequencies over time as bands, like those of
# the wavelet. Without it the network wastes itself on copying each frame's noise, and the video flickers.
# Paper: the released code lays the frames out as tiles of one image, 4 x 4 for 16. Tiles are easy to look at.
# We use channels: then no average, wavelet or mirror image mixes pixels of two frames.
# Paper: it keeps every k-th frame, from the first, as we do. But where it shifts the schedule at all, it does so by the
# ratio of the tiled images' sides: p log 4 for 16 frames, and with p = 2 this is log T, as if it averaged.
# Paper: its level of time goes down in steps: strided convolutions over time halve the frames. Ours goes down at once.
# Paper: its attention over time works at half the height and width. It has rotary positions or none, and a feed-forward
# layer.

`python video.py` draws the levels and measures the SNR of what is kept and of what is averaged.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from nested_unet import NestedUNet, innermost, nests_in, pyramid
from plumbing.pictures import pyplot, save_figure, show_image
from schedule import diffuse, logsnr_shifted
from unet import Attention, UNet, initialise


# ------------------------------------------------------------------------------------------ the process

def to_frames(x, frames):
    """Unfold videos into frames: (B, T C, H, W) -> (B T, C, H, W)."""
    return x.reshape(-1, x.shape[1] // frames, *x.shape[2:])


def to_videos(x, frames):
    """Fold frames into videos: (B T, C, H, W) -> (B, T C, H, W)."""
    return x.reshape(-1, frames * x.shape[1], *x.shape[2:])


def keep_frames(x, frames, kept):
    """Keep every (T / T')-th frame, from the first: (B T, C, H, W) -> (B T', C, H, W)."""
    return x.unflatten(0, (-1, frames))[:, ::frames // kept].flatten(0, 1)


def video_pyramid(x, sizes, counts):
    """Go down level by level: (B, 3 T, H, W) -> list of the levels (B, 3 T_r, H_r, W_r). First time, then space.

    sizes   [(H, W), ...] of a frame, highest first
    counts  [T, ...], highest first, each a divisor of the one before. All 1: this is nested_unet.pyramid
    """
    levels = [x]
    for r in range(1, len(sizes)):
        kept = to_videos(keep_frames(to_frames(levels[-1], counts[r - 1]), counts[r - 1], counts[r]), counts[r])
        levels.append(pyramid(kept, sizes[r - 1:r + 1])[1])
    return levels


def snr_gain(shape, down):
    """Measure on noise of this shape by what factor `down` raises the SNR, if it leaves the image as it is."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return float(noise.var() / down(noise).var())


# ------------------------------------------------------------------------------------------ the network

class TimePosition(nn.LayerNorm):
    """Normalise tokens (B N, T, C), then add a learned position of each frame, as large as they are."""

    def __init__(self, channels, frames):
        super().__init__(channels, bias=False)
        self.position = nn.Parameter(torch.randn(frames, channels))

    def forward(self, x):
        return super().forward(x) + self.position


class OverTime(nn.Module):
    """Run a layer of the image network on each frame. Then let the T frames attend to each other at each position.

    # Beyond the papers: beside attention, a (T, T) matrix for each channel mixes the frames: it can average noise.

    Takes what the layer takes, and returns what it returns: a map (B T, C, H, W) or tokens (B T, N, C).
    """

    def __init__(self, layer, channels, num_heads, frames):
        super().__init__()
        self.layer, self.frames = layer, frames
        self.attention = Attention(channels, num_heads)                   # residual, its last layer starts at zero
        self.attention.norm = TimePosition(channels, frames)
        initialise(self.attention)
        self.mix = nn.Parameter(torch.zeros(frames, frames, channels))    # from each frame to each, by channel

    def forward(self, x, *args):
        h = self.layer(x, *args)
        is_map = h.ndim == 4
        tokens = h.flatten(2).transpose(1, 2) if is_map else h            # (B T, N, C)
        tokens = tokens.unflatten(0, (-1, self.frames)).transpose(1, 2)   # (B, N, T, C)
        shape, tokens = tokens.shape, tokens.flatten(0, 1)                # (B N, T, C): a sequence for each position
        # The change is added to h, so that h keeps its memory layout, and the layers behind it their bits.
        change = self.attention(tokens) - tokens + torch.einsum("ntc,tsc->nsc", tokens, self.mix)      # zero at first
        change = change.reshape(shape).transpose(1, 2).flatten(0, 1)                                   # (B T, N, C)
        return h + (change.transpose(1, 2).reshape(h.shape) if is_map else change)


def attend_over_time(network, counts, num_heads):
    """Put OverTime behind each block of the levels that have several frames, in place. Return the network.

    Behind a block means behind its attention over space, if it has one.
    """
    for nest, frames in zip(nests_in(network), counts):
        net = nest.outer if isinstance(nest, NestedUNet) else nest
        for layers, i, channels in block_places(net) if frames > 1 else []:
            layers[i] = OverTime(layers[i], channels, num_heads, frames)
    return network


def block_places(net):
    """Return the places of a network's blocks, [(list of layers, index in it, channels), ...]."""
    levels = [*zip(net.widths, net.down), *zip(reversed(net.widths[:len(net.up)]), net.up)]
    if isinstance(net, UNet):                                             # pairs (block, attention over space)
        levels.append((net.widths[-1], net.middle))
        return [(pair, 1, channels) for channels, pairs in levels for pair in pairs]
    firsts = [(pair, 0, channels) for channels, pairs in levels for pair in pairs]              # U-ViT: no attention
    return firsts + [(net.transformer, i, net.widths[-1]) for i in range(len(net.transformer))]


def denoise_frames(network, z, logsnr, condition, counts, text=None, f=None):
    """Run one level and all levels below it, as nested_unet.denoise does. -> ([v, ...], the last map of this level).

    z           [(B, 3 T_r, H_r, W_r), ...], highest level first; v has the same shapes
    condition   (B, E); logsnr: [(B,), ...]; text: a pair for B captions. All frames of a video share them
    f           (B T, C, H, W), the map that comes down from the level above
    Downwards, one map in k is kept. Upwards, each map is repeated for its k frames.
    """
    T, x = counts[0], to_frames(z[0], counts[0])
    each = lambda a: a.repeat_interleave(T, 0)                            # (B, ...) -> (B T, ...)
    net = network.outer if isinstance(network, NestedUNet) else network
    emb = net.embed.of_logsnr(each(logsnr[0]), len(x)) + each(condition)
    if net is network:                                                    # the innermost network
        h = net.features(x, emb, text and tuple(map(each, text)), f)
        return [to_videos(net.output(h), T)], h
    h, skips = net.descend(x, emb, f=f)                                   # (B T, C, H, W)
    f = keep_frames(network.in_adapter(h), T, counts[1])                  # (B T', C', H, W)
    v, g = denoise_frames(network.inner, z[1:], logsnr[1:], condition, counts[1:], text, f)
    h = net.ascend(h + network.out_adapter(g).repeat_interleave(T // counts[1], 0), skips, emb)
    return [to_videos(net.output(h), T)] + v, h


class Video(nn.Module):
    """Run an image network, plain or nested, on videos: (z, logsnr, cond) -> v_hat. Nested: z, logsnr, v_hat are lists.

    network   the image network, with attention over time (attend_over_time)
    counts    [T, ...] of the levels, highest first
    """

    def __init__(self, network, counts):
        super().__init__()
        self.network, self.counts = network, counts

    def forward(self, z, logsnr, cond):
        is_nested = isinstance(z, list)
        z, logsnr = (z, logsnr) if is_nested else ([z], [logsnr])
        condition, text = innermost(self.network).embed.of_cond(cond, len(z[0]))
        logsnr = [torch.as_tensor(level).expand(len(z[0])) for level in logsnr]
        v, _ = denoise_frames(self.network, z, logsnr, condition, self.counts, text)
        return v if is_nested else v[0]

    @property
    def inner(self):
        """The levels below the highest, with the same weights: what grow (nested_unet.py) loads. One frame: an image
        model. So the weights of a trained image model go in."""
        below = self.network.inner
        return Video(below, self.counts[1:]) if max(self.counts[1:]) > 1 else below


# ------------------------------------------------------------------------------------------ the page of the lecture

def draw_levels(x, path):
    """Draw 8 frames, z_t of them, and the level below: the kept frame and its z_t. Beside it the average of the 8."""
    levels = video_pyramid(x, [(64, 64)] * 2, [8, 1])
    generator = torch.Generator().manual_seed(0)
    logsnr = logsnr_shifted(0.5, 64, 32)                                  # one for both levels: no shift by time
    z = [diffuse(level, torch.randn(level.shape, generator=generator), logsnr) for level in levels]
    figure, axes = pyplot().subplots(3, 8, figsize=(10, 4.2))
    for row, video, name in zip(axes, (x, z[0]), ("8 frames", "z, t = 0.5")):
        for axis, frame in zip(row, to_frames(video, 8)):
            show_image(axis, frame, interpolation="nearest")
        row[0].set_ylabel(name, fontsize=9)
    below = {"1 frame, kept": levels[1], "its z, t = 0.5": z[1], "average of 8": to_frames(x, 8).mean(0, keepdim=True)}
    for axis in axes[2]:
        axis.axis("off")
    for axis, (name, image) in zip(axes[2], below.items()):
        axis.axis("on")
        show_image(axis, image[0], name, interpolation="nearest")
    save_figure(figure, path)


def main():
    from data import Glyphs                                               # only the page needs scenes
    scenes, frames = Glyphs((64, 64)), [dict(angle=0.08 * frame, x=0.008 * frame) for frame in range(8)]
    videos = torch.stack([torch.cat([scenes.image(i, **frame) for frame in frames]) for i in range(10, 26)])
    ways = {"keep one frame in 8": lambda x: keep_frames(to_frames(x, 8), 8, 1),
            "average 8 frames": lambda x: x.unflatten(1, (8, 3)).mean(1),
            "average 2 x 2 pixels": lambda x: F.avg_pool2d(x, 2)}
    print("level down              SNR of the noise, times     its log   variance of the frames that is left")
    for name, down in ways.items():
        gain, left = snr_gain(videos.shape, down), float(down(videos).var() / videos.var())
        print(f"{name:22s} {gain:24.2f} {math.log(gain):11.2f} {left:38.3f}")
    draw_levels(videos[:1], "figures/video.png")
    print("wrote figures/video.png (8 frames, their noise, the level below)")


if __name__ == "__main__":
    main()
