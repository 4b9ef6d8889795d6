"""Matryoshka diffusion: all resolutions of an image in one process, denoised together by nested networks.

Paper: Matryoshka Diffusion Models (Gu, Zhai, Zhang, Susskind, Jaitly 2023, arXiv 2310.15111), section 3. Its full text
was not at hand: equations and steps below are those of the released code and of other people's notes on the paper; what
rests on notes alone is called unverified.
Read before: schedule.py, unet.py. Read after: train.py, sample.py.

The image is looked at through R levels, R the full image, 1 the smallest (eq. 2); here lists, HIGHEST FIRST:

    x^r = D^r(x)                                 D^r averages pixels: `pyramid`
    z_t^r = alpha_t^r x^r + sigma_t^r eps^r      one t for all levels, noise INDEPENDENT from level to level

so z^1 is no shrunken z^R but a second noisy look at the same image. One network sees all z_t^r and predicts v^r for
every level at once; all levels step together in sampling. (A cascade finishes one level before the next begins.)

A nested U-Net is a U-Net whose middle is another network, which is a denoiser in its own right:

    z^R --> input --> down blocks ------------------ skips ------------------> up blocks --> output --> v^R
                           \\                                                   /
                       in_adapter (0)                                  out_adapter (0)
                             \\                                               /
              z^R-1 --> input (+) --> down ... middle ... up: its last map --+--> output --> v^R-1

The adapters are 3x3 convolutions that start at zero: at first no level knows of the others, and a trained inner network
goes on behaving exactly as it was trained. That is what lets a model be grown level by level (3.3).

Most of the network is innermost, at the lowest resolution: level 1024 adds almost no parameters (this file, run, prints
how many). simple diffusion is the case of one level.

Legend of shapes: R levels; z, v, eps, x lists of (B_r, 3, H_r, W_r); logsnr list of (B_r,); cond as in unet.py.

# Paper: Matryoshka's blocks concatenate skips, let text in by a query that is shared with self-attention, and divide
# the 256 level's input by its standard deviation in the 1024 model. Ours are unet.py's: skips added, no division.
# Paper: each level has its own micro-condition ("scale"); ours have none.

`python nested_unet.py` draws z_t at every level and the architecture, and prints the cost of each level.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from schedule import diffuse
from unet import initialise, starting_at


# ------------------------------------------------------------------------------------------ the process (3.1)

def pyramid(x, sizes):
    """The levels of an image: (B, C, H, W) -> a list, averaged from level to level.

    sizes: [(H, W), ...], highest first. Raises ValueError if x is not of the first size, or a size does not divide the
    one before it.
    """
    if tuple(x.shape[-2:]) != tuple(sizes[0]):
        raise ValueError(f"the highest level is {sizes[0][0]}x{sizes[0][1]}, the image {x.shape[-2]}x{x.shape[-1]}")
    levels = [x]
    for (height, width), (h, w) in zip(sizes, sizes[1:]):
        if height % h or width % w or height // h != width // w:
            raise ValueError(f"level {h}x{w} does not divide level {height}x{width}")
        levels.append(F.avg_pool2d(levels[-1], height // h))
    return levels


def level_schedules(base, sizes, power=2.0):
    """One schedule a level, highest first: logsnr_r(t) = base(t) - power log k_r, k_r = side of r / side of the lowest.

    base: the schedule of the lowest level. power 2 is simple diffusion's shift (eq. 5 there): averaged to the lowest
    level, all levels then have the same SNR at the same t. # Paper: the released 1024 model has 2, the 256 model 1.
    # Paper: the released code has 1000 discrete steps of a squared cosine, log-SNR 10 to -20; our base is continuous.
    """
    side = [math.sqrt(h * w) for h, w in sizes]
    return [lambda t, down=power * math.log(s / side[-1]): base(t) - down for s in side]


def nested_loss(model, x, cond, t, eps, schedules, measure, weights=None, rows=None):
    """Eq. 3: sum over the levels of w_r times the level's loss, a mean over its values. -> scalar.

    x          list of the levels of the images (`pyramid`), B of each
    t, eps     (B,) one time for all levels; list of noises, each drawn for itself
    measure    measure(v_hat, z, x, eps, logsnr) -> the loss of one level. # Paper: eq. 3 measures x_hat; the released
               code turns v_hat into eps_hat and measures eps, as train.py's does.
    weights    one a level, highest first. # Paper: w_r / w_R = N_R / N_r times a SUM over values: equal means, 1:1.
    rows       how many examples each level has, `mixed_rows`; all if None. A level's loss is the mean over its own
               rows: unbiased, since which examples they are has nothing to do with their content.
    """
    logsnr = [schedule(t) for schedule in schedules]                      # (B,) each
    z = [diffuse(*level) for level in zip(x, eps, logsnr)]
    levels = list(zip(z, x, eps, logsnr))
    if rows is not None:
        levels = [[part[:n] for part in level] for level, n in zip(levels, rows)]
    v = model([level[0] for level in levels], [level[3] for level in levels], cond)
    losses = [measure(v_r, *level) for v_r, level in zip(v, levels)]
    return sum(w * loss for w, loss in zip(weights or [1.0] * len(losses), losses))


def mixed_rows(ratio, batch):
    """Section 3.3, mixed resolutions: (2, 1), 12 -> [8, 12]: two thirds of the images have the high level, all the low.

    ratio: highest first. A level costs what its pixels cost, so a batch goes further when not every image is run at the
    top. Raises ValueError if a level is left without an image.
    """
    rows = [round(batch * sum(ratio[:r + 1]) / sum(ratio)) for r in range(len(ratio))]
    if rows[0] < 1:
        raise ValueError(f"mixed ratio {':'.join(map(str, ratio))} of {batch} images leaves none for the highest level")
    return rows


# ------------------------------------------------------------------------------------------ the network (3.2)

class NestedUNet(nn.Module):
    """([z^R, ..., z^1], [logsnr^R, ...], cond) -> [v^R, ..., v^1].

    inner   a UNet, a UViT or a NestedUNet: everything below
    outer   the highest level, a UNet with middle=False and num_classes=None whose coarsest map is as large as the inner
            network's first; None: there is no level but the inner one
    """

    def __init__(self, inner, outer=None):
        super().__init__()
        self.inner, self.outer = inner, outer
        if outer is None:
            self.sizes, self.first_map, self.widths = sizes_of(inner), inner.first_map, inner.widths
            return
        self.sizes, self.first_map, self.widths = [outer.size] + sizes_of(inner), outer.first_map, outer.widths
        if outer.last_map != inner.first_map:
            raise ValueError(f"the coarsest map of the {outer.size[0]}x{outer.size[1]} level is {outer.last_map}, the "
                             f"inner network's first is {inner.first_map}")
        self.in_adapter = starting_at(0, nn.Conv2d(outer.widths[-1], inner.widths[0], 3, padding=1))
        self.out_adapter = starting_at(0, nn.Conv2d(inner.widths[0], outer.widths[-1], 3, padding=1))
        initialise(self.in_adapter)
        initialise(self.out_adapter)

    def forward(self, z, logsnr, cond):
        if len(z) != len(self.sizes) or len(logsnr) != len(self.sizes):
            raise ValueError(f"this model has {len(self.sizes)} levels, got {len(z)} images and {len(logsnr)} log-SNRs")
        # Computed once, told to every level.
        condition, text = innermost(self).embed.of_cond(cond, z[-1].shape[0])
        return denoise(self, z, logsnr, condition, text)[0]


def denoise(network, z, logsnr, condition, text=None, f=None):
    """One level and all below it. -> ([v, ...] highest first, the last feature map of this level).

    condition (B, E), for every level; text, for the cross-attention of the innermost network alone; f: the map that
    comes down from the level above, for the input of this one. In a mixed batch the levels above have the first B_r
    rows only: the rows without them get no f, and give nothing back.
    """
    if not isinstance(network, NestedUNet):                               # the innermost network
        h = network.features(z[0], network.embed.of_logsnr(logsnr[0], len(z[0])) + condition, text, f)
        return [network.output(h)], h                                     # h: before the output layer
    if network.outer is None:
        return denoise(network.inner, z, logsnr, condition, text, f)
    outer, rows = network.outer, len(z[0])
    emb = outer.embed.of_logsnr(logsnr[0], rows) + condition[:rows]       # its own embedding of its own log-SNR
    h, skips = outer.descend(z[0], emb, f=f)
    f = network.in_adapter(h)
    f = F.pad(f, (0, 0, 0, 0, 0, 0, 0, len(z[1]) - rows))                 # rows without a high level: zeros
    v, g = denoise(network.inner, z[1:], logsnr[1:], condition, text, f)
    h = outer.ascend(h + network.out_adapter(g[:rows]), skips, emb)       # no middle of its own
    return [outer.output(h)] + v, h


def innermost(network):
    while isinstance(network, NestedUNet):
        network = network.inner
    return network


def sizes_of(network):
    """The sizes of the levels of any of our networks, highest first."""
    return network.sizes if isinstance(network, NestedUNet) else [network.size]


# ------------------------------------------------------------------------------------------ growing (3.3)

def check_inner(model, trained):
    """Is `trained` the state_dict of a network like the inner one of `model`? Nothing is skipped in silence: raises
    ValueError naming what is missing, in excess, or of another shape."""
    wanted = model.inner.state_dict()
    missing, excess = sorted(wanted.keys() - trained.keys()), sorted(trained.keys() - wanted.keys())
    shapes = [f"{key} {tuple(trained[key].shape)} for {tuple(wanted[key].shape)}" for key in wanted
              if key in trained and trained[key].shape != wanted[key].shape]
    faults = [f"{what}: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
              for what, keys in (("missing", missing), ("in excess", excess), ("of another shape", shapes)) if keys]
    if faults:
        raise ValueError("; ".join(faults))


def grow(model, trained):
    """Put the weights of a trained inner network into `model`, a NestedUNet around an equal one. In place.

    The outer level is left as it is, the adapters at zero: `model` then gives the inner network's output to the bit.
    """
    check_inner(model, trained)
    model.inner.load_state_dict(trained)


# ------------------------------------------------------------------------------------------ the page of the lecture

def draw_levels(plt, path):
    """z_t of one scene at 1024, 256 and 64 px, averaged to 64 px: at one t all show as much. Last row: no shift."""
    from data import Glyphs
    from schedule import alpha_sigma, logsnr_shifted
    sizes = [(1024, 1024), (256, 256), (64, 64)]
    x = pyramid(Glyphs(sizes[0]).image(10)[None], sizes)
    generator = torch.Generator().manual_seed(0)
    eps = [torch.randn(level.shape, generator=generator) for level in x]
    base = lambda t: logsnr_shifted(t, 64, 64)
    rows = [(f"{size[0]} px", *level) for size, *level in zip(sizes, x, eps, level_schedules(base, sizes))]
    rows.append(("1024 px,\nno shift", x[0], eps[0], base))
    times = torch.linspace(0.1, 0.9, 9)
    figure, axes = plt.subplots(len(rows), len(times), figsize=(1.25 * len(times), 5.4))
    for row, (name, x_r, eps_r, schedule) in zip(axes, rows):
        for axis, t in zip(row, times):
            (alpha, sigma), k = alpha_sigma(schedule(t)), x_r.shape[-1] // 64
            z = F.avg_pool2d(diffuse(x_r, eps_r, schedule(t)), k)[0]
            z = z / torch.sqrt(alpha ** 2 + (sigma / k) ** 2)             # at one contrast: the SNR is what is compared
            axis.imshow(((z + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, fontsize=9)
    for axis, t in zip(axes[0], times):
        axis.set_title(f"t = {float(t):.1f}", fontsize=9)
    figure.suptitle("z_t at three levels, averaged to 64 px, at one contrast; the log-SNR of a level is 2 log k below "
                    "the lowest's", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def levels_of(network):
    """[(the network of one level, its adapters)], highest first; the innermost is the network itself."""
    levels = []
    while isinstance(network, NestedUNet):
        levels.append((network.outer, (network.in_adapter, network.out_adapter)))
        network = network.inner
    return levels + [(network, ())]


def draw_architecture(plt, model, title, path):
    """The nest as boxes, a colour a level: an outer level's maps come down, the level below is its middle, and up."""
    levels = [network for network, _ in levels_of(model)]
    boxes = [(n, i, "down") for n in levels for i in range(len(n.widths))]
    boxes += [(n, i, "up") for n in reversed(levels) for i in reversed(range(len(n.widths)))]
    figure, axis = plt.subplots(figsize=(11, 4))
    for x, (network, i, way) in enumerate(boxes):
        level, side = levels.index(network), network.first_map[0] >> i
        blocks = len(network.down[i] if way == "down" else network.up[len(network.widths) - 1 - i])
        height = 0.25 * math.log2(side)
        axis.add_patch(plt.Rectangle((x, -height / 2), 0.8, height, color=f"C{level}", alpha=0.6))
        axis.text(x + 0.4, 0, f"{side}²\n{network.widths[i]}\n×{blocks}", ha="center", va="center", fontsize=8)
        if i == 0:                                                        # where z comes in and v goes out
            (start, end), name = ((-2.0, -height / 2), "z") if way == "down" else ((-height / 2, -2.0), "v")
            axis.annotate("", (x + 0.4, end), (x + 0.4, start), arrowprops=dict(arrowstyle="->", color=f"C{level}"))
            axis.text(x + 0.4, -2.2, f"{name}, {network.size[0]} px", ha="center", fontsize=8, color=f"C{level}")
        if x and boxes[x - 1][0] is not network:
            axis.plot([x - 0.1] * 2, [-1.5, 1.5], ":", color="grey")
            axis.text(x - 0.1, 1.6, "adapter\nfrom 0", ha="center", fontsize=8, color="grey")
    axis.set(xlim=(-0.4, len(boxes)), ylim=(-2.4, 2.2))
    axis.axis("off")
    axis.set_title(f"{title}: side of the maps, width, number of blocks; a level's skips stay inside it", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def cost_of_levels(config):
    """[(size, parameters, GFLOP of a forward pass of one image)], highest first; adapters count as the outer level's.

    The cost of a level is that of the nest from there inwards, less that of the nest below.
    """
    from torch.utils.flop_counter import FlopCounterMode
    from config import build_model
    with torch.device("meta"):
        nest, totals = build_model(config), []
        for r in range(len(config.sizes)):
            sizes = config.sizes[r:]
            z, logsnr = [torch.zeros(1, 3, *size) for size in sizes], [torch.zeros(1)] * len(sizes)
            with FlopCounterMode(display=False) as counter:
                denoise(nest, z, logsnr, *innermost(nest).embed.of_cond({}, 1))
            totals.append((sum(p.numel() for p in nest.parameters()), counter.get_total_flops() / 1e9))
            nest = nest.inner if isinstance(nest, NestedUNet) else nest
    below = totals[1:] + [(0, 0.0)]
    return [(size, p - q, f - g) for size, (p, f), (q, g) in zip(config.sizes, totals, below)]


def main():
    import os
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from config import PRESETS, build_model
    os.makedirs("figures", exist_ok=True)
    for name in ("mdm1024", "glyphs64_nested"):
        rows = cost_of_levels(PRESETS[name])
        parameters, flops = sum(r[1] for r in rows), sum(r[2] for r in rows)
        print(f"{name}\nlevel        parameters, M          forward pass of one image, GFLOP")
        for (height, width), p, f in rows:
            print(f"{height:4d}x{width:<4d} {p / 1e6:11.2f} {p / parameters:8.1%} {f:14.1f} {f / flops:8.1%}")
        print()
    with torch.device("meta"):
        model = build_model(PRESETS["mdm1024"])
    draw_levels(plt, "figures/nested_levels.png")
    draw_architecture(plt, model, "mdm1024", "figures/nested_unet.png")
    print("wrote figures/nested_levels.png (z_t of all levels) and figures/nested_unet.png (the network)")


if __name__ == "__main__":
    import nested_unet                                                    # the module that config.py knows, not a copy
    nested_unet.main()
