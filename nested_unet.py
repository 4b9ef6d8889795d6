r"""Matryoshka diffusion: nested networks denoise all resolutions of an image together, in one process.

Paper: Matryoshka Diffusion Models (Gu, Zhai, Zhang, Susskind, Jaitly 2023, arXiv 2310.15111), section 3. We did not
have its full text. The equations and steps here follow the released code and other people's notes on the paper.
Needs: schedule.py, unet.py. Next: video.py, or cascade.py.

An image has R levels, from level R, the full image, to level 1, the smallest (eq. 2). Our lists are HIGHEST FIRST:

    x^r = D^r(x)                                 D^r averages pixels: `pyramid`
    z_t^r = alpha_t^r x^r + sigma_t^r eps^r      one t for all levels, noise INDEPENDENT from level to level

So z^1 is not a smaller z^R. It is a second noisy view of the same image. One network sees all z_t^r and predicts all
v^r at once. In sampling all levels step together. (A cascade finishes one level before it starts the next.)

A nested U-Net is a U-Net with another network as its middle. That inner network is a denoiser of its own:

    z^R --> input --> down blocks ------------------ skips ------------------> up blocks --> output --> v^R
                           \                                                    /
                       in_adapter (0)                                  out_adapter (0)
                             \                                                /
            z^(R-1) --> input (+) --> down ... middle ... up: its last map --+--> output --> v^(R-1)

The adapters are 3x3 convolutions that start at zero. That is why a model can grow level by level (3.3). Note: at first
no level sees another one, and a trained inner network still does exactly what it was trained to do.

Most parameters are in the innermost network, at the lowest resolution. The 1024 px level adds almost none.
simple diffusion is the case of one level.

Legend of shapes: R levels; z, v, eps, x lists of (B_r, 3, H_r, W_r), logsnr a list of (B_r,), cond as in unet.py.

# Paper: from the released code we take the widths, the attention and feed-forward layers of each level, one attention
# layer in the middle (the code passes True, which counts as 1), and the head: norm, swish, a convolution from
# zero. With such a head a new level predicts v = 0 at first. Our small presets keep the plain one (uvit.py says why).
# Paper: the rest is unet.py's. The released blocks concatenate skips, ours add them. Their group norm has 32 groups
# at width 32, ours 8. They have a SiLU before the layer of scale and shift, and do not normalise q and k. Their
# cross-attention shares the query of the self-attention. A class is a text of one token; we add it to the embedding.
# They embed the time step, we log-SNR. The 1024 model divides the input of the 256 px level by its standard deviation;
# we divide nothing. Each level has a condition of its own, the "scale" of the image; ours has none.

`python nested_unet.py` draws z_t at every level and the architecture. It prints the parameters and FLOPs by level.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.pages import draw_nest, draw_panels, gflops, millions
from schedule import alpha_sigma, diffuse, logsnr_shifted
from unet import UNet, initialise, starting_at


# ------------------------------------------------------------------------------------------ the process (3.1)

def pyramid(x, sizes):
    """Average an image down, level by level: (B, C, H, W) -> list of the levels. Eq. 2.

    sizes: [(H, W), ...], highest first. Raises ValueError if x does not have the first size, or if a size does not
    divide the one before it by the same factor in height and width.
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
    """Return a schedule for each level, highest first. Note: logsnr_r(t) = base(t) - power log k_r.

    base    the schedule of the lowest level
    k_r     side of level r / side of the lowest level
    power   2 is the shift of simple diffusion (eq. 5 there). # Paper: the released 1024 model uses 2, the 256 model 1.
            Note: with 2, after averaging to the lowest size, all levels have the same SNR at each t.
    # Paper: the released code has 1000 discrete steps of a squared cosine, log-SNR 10 to -20. Our base is continuous.
    """
    side = [math.sqrt(h * w) for h, w in sizes]
    return [lambda t, down=power * math.log(s / side[-1]): base(t) - down for s in side]


def nested_loss(model, x, cond, t, eps, schedules, measure, weights=None, rows=None):
    """Sum the losses of the levels, each times its weight w_r. Eq. 3. -> scalar.

    x          levels of the images (`pyramid`), B images each
    t          (B,), one time for all levels
    eps        one noise a level, independent of the others
    measure    measure(v_hat, z, x, eps, logsnr) -> the loss of one level, a mean over its values. # Paper: eq. 3
               measures x_hat. The released code turns v_hat into eps_hat and measures eps.
               train.py measures what --loss says.
    weights    w_r, highest level first; None: all 1. # Paper: w_r / w_R = N_R / N_r, times a SUM over the N_r values
               of a level. This equals our means, all with weight 1.
    rows       the number of examples at each level, from `mixed_rows`; None: all. The loss of a level is the mean over
               its own rows. It is unbiased, since the choice of the rows does not depend on the images.
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
    """Return how many images of a batch each level sees. Section 3.3, mixed resolutions.

    ratio (2, 1), batch 12 -> [8, 12]: two thirds of the images have the high level, all have the low one. High levels
    have the most pixels and cost the most, so a batch is cheaper if some images skip them.
    Raises ValueError if no image is left for the highest level.
    """
    rows = [round(batch * sum(ratio[:r + 1]) / sum(ratio)) for r in range(len(ratio))]
    if rows[0] < 1:
        raise ValueError(f"mixed ratio {':'.join(map(str, ratio))} of {batch} images leaves none for the highest level")
    return rows


# ------------------------------------------------------------------------------------------ the network (3.2)

class NestedUNet(nn.Module):
    """Nest a network in an outer level: ([z^R, ..., z^1], [logsnr^R, ...], cond) -> [v^R, ..., v^1].

    inner   all levels below: a UNet, a UViT or another NestedUNet
    outer   the highest level: a UNet with middle=False and num_classes=None. Its coarsest map must have the size of the
            inner network's first map. None: only the levels of the inner network
    Raises ValueError if the two maps differ in size.
    """

    def __init__(self, inner, outer=None):
        super().__init__()
        self.inner, self.outer = inner, outer
        top = inner if outer is None else outer
        self.first_map, self.widths = top.first_map, top.widths
        self.sizes = inner.sizes if isinstance(inner, NestedUNet) else [inner.size]             # highest first
        if outer is None:
            return
        self.sizes = [outer.size, *self.sizes]
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
        # The innermost network embeds the conditions once. Every level adds the result to its own embedding of log-SNR.
        condition, text = innermost(self).embed.of_cond(cond, z[-1].shape[0])
        return denoise(self, z, logsnr, condition, text)[0]


def denoise(network, z, logsnr, condition, text=None, f=None):
    """Run one level and all levels below it. -> ([v, ...] highest first, the last feature map of this level).

    condition   (B, E), added at every level
    text        for the cross-attention. Only the innermost network has it
    f           the map that comes down from the level above. This level adds it to its input
    In a mixed batch a level above has only the first B_r rows. The other images have no higher level. So their f is
    zero, and the level above does not use their output.
    """
    if not isinstance(network, NestedUNet):                               # the innermost network
        h = network.features(z[0], network.embed.of_logsnr(logsnr[0], len(z[0])) + condition, text, f)
        return [network.output(h)], h                                     # h is the map before the output
    if network.outer is None:
        return denoise(network.inner, z, logsnr, condition, text, f)
    outer, rows = network.outer, len(z[0])
    emb = outer.embed.of_logsnr(logsnr[0], rows) + condition[:rows]       # each level embeds its own log-SNR
    h, skips = outer.descend(z[0], emb, f=f)
    f = network.in_adapter(h)
    f = F.pad(f, (0, 0, 0, 0, 0, 0, 0, len(z[1]) - rows))                 # rows without a high level: zeros
    v, g = denoise(network.inner, z[1:], logsnr[1:], condition, text, f)
    h = outer.ascend(h + network.out_adapter(g[:rows]), skips, emb)       # no middle of its own
    return [outer.output(h)] + v, h


def innermost(network):
    """Return the network of the lowest level."""
    while isinstance(network, NestedUNet):
        network = network.inner
    return network


# ------------------------------------------------------------------------------------------ growing (3.3)

def grow(model, trained):
    """Load the weights `trained` of a smaller model into the inner network of a new NestedUNet, in place.

    Raises RuntimeError if a weight is missing, in excess or of another shape. Note: the adapters of the new model are
    zero, so its inner levels predict what the smaller model predicts, to the bit.
    """
    model.inner.load_state_dict(trained)


# ------------------------------------------------------------------------------------------ the page of the lecture

def view(x, eps, logsnr, side):
    """Noise x to this log-SNR, average it to `side` px and scale it to one contrast, so that only the SNR differs."""
    k = x.shape[-1] // side                                               # averaging k x k divides sigma by k
    alpha, sigma = alpha_sigma(logsnr)
    return F.avg_pool2d(diffuse(x, eps, logsnr), k)[0] / torch.sqrt(alpha ** 2 + (sigma / k) ** 2)


def draw_levels(path):
    """Draw z_t of a scene at 1024, 256 and 64 px, averaged to 64 px: at one t all show as much. Last row: no shift."""
    from data import Glyphs                                               # only the picture needs an image
    sizes = [(1024, 1024), (256, 256), (64, 64)]
    x = pyramid(Glyphs(sizes[0]).image(10)[None], sizes)
    generator = torch.Generator().manual_seed(0)
    eps = [torch.randn(level.shape, generator=generator) for level in x]
    base = lambda t: logsnr_shifted(t, 64, 64)
    levels = [*zip(x, eps, level_schedules(base, sizes)), (x[0], eps[0], base)]
    times = torch.linspace(0.1, 0.9, 9)
    rows = [[view(x_r, eps_r, schedule(t), 64) for t in times] for x_r, eps_r, schedule in levels]
    draw_panels(path, rows, [f"t = {t:.1f}" for t in times], ["1024 px", "256 px", "64 px", "1024 px,\nno shift"],
                "z_t at three levels, averaged to 64 px, at one contrast; the log-SNR of a level is 2 log k below "
                "the lowest's", size=(1.25, 1.35), interpolation="nearest")


def outer_level(size, emb_channels, widths, blocks, shift, **options):
    """Build an outer level: a U-Net without attention, middle and classes."""
    return UNet(size, 1, emb_channels, widths, blocks, attn_resolutions=(), dropout=0.0, num_classes=None,
                logsnr_min=-15 + shift, logsnr_max=15 + shift, middle=False, **options)


def mdm1024():
    """Build the paper's 1024 px model: a 64 px U-Net in a 256 px level in a 1024 px level."""
    model = UNet((64, 64), 256, 1024, (1, 2, 3), (2, 2, 2), attn_layers=(0, 1, 5), num_heads=8, dropout=0.0,
                 num_classes=1000, zero_head=True)
    for size, widths in ((256, (64, 128, 256)), (1024, (32, 32, 64))):
        shift = -2 * math.log(size / 64)
        model = NestedUNet(model, outer_level((size, size), 1024, widths, (2, 2, 1), shift, zero_head=True))
    return model


def glyphs64_nested():
    """Build our small model: a 16 px U-ViT in a 64 px level."""
    from uvit import UViT
    shift = 2 * math.log(32 / 16)                                         # noise_d = 32 at 16 px
    model = UViT((16, 16), 96, 256, (1, 2), (1,), 4, transformer_dropout=0.0, position_std=1.0, num_classes=36,
                 logsnr_min=-15 + shift, logsnr_max=15 + shift)
    shift -= 2 * math.log(64 / 16)
    return NestedUNet(model, outer_level((64, 64), 256, (32, 64), (1, 1), shift, patching="dwt_1"))


def nests_in(model):
    """Return the model and all networks nested in it, the largest first."""
    return [model, *nests_in(model.inner)] if isinstance(model, NestedUNet) else [model]


def print_costs(name, model):
    """Print the parameters and the FLOPs of each level of a model on device meta.

    The cost of a level is that of its network minus that of the network inside. So adapters belong to the outer one.
    """
    totals = []
    for r, network in enumerate(nests_in(model)):
        z = [torch.zeros(1, 3, *size) for size in model.sizes[r:]]
        condition = innermost(network).embed.of_cond({}, 1)
        totals.append((millions(network), gflops(denoise, network, z, [torch.zeros(1)] * len(z), *condition)))
    (parameters, flops), below = totals[0], totals[1:] + [(0, 0)]
    print(f"{name}\nlevel        parameters, M          forward pass of one image, GFLOP")
    for (height, width), (p, f), (q, g) in zip(model.sizes, totals, below):
        print(f"{height:4d}x{width:<4d} {p - q:11.2f} {(p - q) / parameters:8.1%} {f - g:14.1f} {(f - g) / flops:8.1%}")
    print()


def draw_architecture(model, path):
    """Draw the maps of a nest of U-Nets as boxes, one colour a level: down, inwards, and up again."""
    levels = [network.outer if isinstance(network, NestedUNet) else network for network in nests_in(model)]
    draw_nest(path, levels, "mdm1024")


def main():
    with torch.device("meta"):                                            # shapes only: no memory, no numbers
        paper = mdm1024()
        print_costs("mdm1024", paper)
        print_costs("glyphs64_nested", glyphs64_nested())
    draw_levels("figures/nested_levels.png")
    draw_architecture(paper, "figures/nested_unet.png")
    print("wrote figures/nested_levels.png (z_t of all levels) and figures/nested_unet.png (the network)")


if __name__ == "__main__":
    main()
