"""The 5/3 wavelet, and strided convolution in its place: two ways to avoid high-resolution feature maps.

Paper: simple diffusion, section 3.3 ("Avoiding high resolution feature maps") and figure 6.
Read before: schedule.py. Read after: unet.py, whose first and last layers stand here.

A U-Net spends much memory at full resolution and learns little there. So we split the image at once into four half-size
maps (one low-pass, three high-pass), or sixteen quarter-size ones. The last layer puts them together again. The 5/3
(LeGall) wavelet of JPEG 2000 does this linearly and invertibly. In one dimension it works by "lifting". Let x be the
samples:

    predict   d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2      high-pass: what the two even neighbours do not predict
    update    s[n] = x[2n]   + (d[n-1] + d[n]) / 4        low-pass:  5 taps (-1, 2, 6, 2, -1) / 8

The inverse runs the same two lines backwards with the signs changed. So reconstruction is perfect, whatever the
coefficients. At the borders the signal is mirrored about its end samples (whole-sample symmetric, as in JPEG 2000).

# Paper: the gain is not stated. We take JPEG 2000's: the low-pass has gain 1 on a constant. So the low band is a local
# average and stays in [-1, 1] up to ringing. White noise of variance 1 then has, per axis, variance 46/64 = 0.72 in the
# low band and 3/2 in the high band. A second level of LL has less still. The transform is not orthogonal, but this
# changes no noise level: diffusion runs on pixels, and the wavelet is only the first and last layer of the network.

Shapes: B batch, C image channels, H, W pixels, L levels, F = 2^L the reduction of each side.
`python dwt.py` draws figure 6. It prints the reconstruction error and the share of energy in each band.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.pictures import pyplot, save_figure, show_image


def _split(x):
    """Split the last axis into two bands, one level: (..., N) -> low (..., N/2), high (..., N/2). N even."""
    even, odd = x[..., 0::2], x[..., 1::2]
    after = torch.cat([even[..., 1:], even[..., -1:]], -1)                # x[2n+2]; mirrored: x[N] = x[N-2]
    high = odd - 0.5 * (even + after)                                     # predict
    before = torch.cat([high[..., :1], high[..., :-1]], -1)               # d[n-1]; mirrored: d[-1] = d[0]
    low = even + 0.25 * (before + high)                                   # update
    return low, high


def _merge(low, high):
    """Invert _split: the same lines from the last to the first, signs changed."""
    before = torch.cat([high[..., :1], high[..., :-1]], -1)
    even = low - 0.25 * (before + high)                                   # undo the update
    after = torch.cat([even[..., 1:], even[..., -1:]], -1)
    odd = high + 0.5 * (even + after)                                     # undo the prediction
    return torch.stack([even, odd], -1).flatten(-2)                       # interleave


def _analyse(x):
    """Split both axes, one level: (B, C, H, W) -> LL, LH, HL, HH, each (B, C, H/2, W/2).

    The first letter is the filter along the width, the second along the height (L low, H high).
    """
    low, high = _split(x)                                                 # along W
    ll, lh = _split(low.transpose(-1, -2))                                # along H
    hl, hh = _split(high.transpose(-1, -2))
    return [band.transpose(-1, -2) for band in (ll, lh, hl, hh)]


def _synthesise(ll, lh, hl, hh):
    """Invert _analyse."""
    low = _merge(ll.transpose(-1, -2), lh.transpose(-1, -2)).transpose(-1, -2)
    high = _merge(hl.transpose(-1, -2), hh.transpose(-1, -2)).transpose(-1, -2)
    return _merge(low, high)


def dwt(x, levels):
    """Compute the wavelet coefficients and pack them into channels of one resolution. Section 3.3.

    (B, C, H, W) -> (B, C 4^levels, H / 2^levels, W / 2^levels).

    Channel order: first the C low-pass channels, then the detail bands (LH, HL, HH, C channels each) from the coarsest
    level to the finest. A finer band has more pixels than the coarsest. Space-to-depth brings it to the same size
    ("256^2 reshaped to 128^2 x 4"); it only moves numbers. Raises ValueError if H or W is not divisible.
    """
    factor = 2 ** levels
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise ValueError(f"dwt: {x.shape[-2]}x{x.shape[-1]} does not divide by {factor} ({levels} levels)")
    details = []
    for level in range(levels):
        x, lh, hl, hh = _analyse(x)
        details.insert(0, F.pixel_unshuffle(torch.cat([lh, hl, hh], 1), 2 ** (levels - 1 - level)))
    return torch.cat([x] + details, 1)


def idwt(y, levels):
    """Invert dwt: (B, C 4^levels, h, w) -> (B, C, h 2^levels, w 2^levels). ValueError for other channels."""
    if y.shape[1] % 4 ** levels:
        raise ValueError(f"idwt: {y.shape[1]} channels do not divide by {4 ** levels} ({levels} levels)")
    channels = y.shape[1] // 4 ** levels
    sizes = [channels] + [3 * channels * 4 ** i for i in range(levels)]   # LL, then details, coarse to fine
    x, *details = torch.split(y, sizes, 1)
    for i, detail in enumerate(details):
        x = _synthesise(x, *F.pixel_shuffle(detail, 2 ** i).chunk(3, 1))
    return x


def adjoint(y, levels):
    """Return W^T y for the matrix W of dwt: sum(dwt(x) y) = sum(x adjoint(y)). (B, C 4^levels, h, w) -> as idwt.

    This is not the inverse, since W is not orthogonal. For the unit vector e of a coefficient, |W^T e|^2 is the
    variance of this coefficient when x is white noise.
    """
    factor = 2 ** levels
    x = y.new_zeros(y.shape[0], y.shape[1] // factor ** 2, y.shape[2] * factor, y.shape[3] * factor, requires_grad=True)
    return torch.autograd.grad(dwt(x, levels), x, y)[0]                   # the gradient of sum(dwt(x) y)


# ------------------------------------------------------------------------------------------ the two ends of a network
# `patching` names the way from the image to the first feature map, and from the last feature map back: none, dwt_1,
# dwt_2, ... or conv_2, conv_4, ... The U-Net and the U-ViT both use the two modules below.

def patch_factor(patching):
    """Return the factor by which a patching reduces each side: none 1, dwt_L 2^L, conv_d d. ValueError for others."""
    kind, _, number = patching.partition("_")
    if patching == "none":
        return 1
    if kind == "dwt" and number in ("1", "2", "3"):
        return 2 ** int(number)
    if kind == "conv" and number in ("2", "4", "8"):
        return int(number)
    raise ValueError(f"patching {patching!r}: use none, dwt_1, dwt_2, dwt_3, conv_2, conv_4 or conv_8")


class EmbedInput(nn.Module):
    """Image (B, in_channels, H, W) -> first feature map (B, channels, H/F, W/F).

    none, dwt_L: a 3x3 convolution over pixels or coefficients. conv_d: one d x d convolution of stride d, "what is
    called patching in transformer literature".
    """

    def __init__(self, in_channels, channels, patching):
        super().__init__()
        factor = patch_factor(patching)
        self.levels = int(patching[4:]) if patching.startswith("dwt") else 0
        if patching.startswith("conv"):
            self.conv = nn.Conv2d(in_channels, channels, factor, stride=factor)
        else:
            self.conv = nn.Conv2d(in_channels * factor ** 2, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(dwt(x, self.levels) if self.levels else x)


class ProjectOutput(nn.Module):
    """Last feature map (B, channels, h, w) -> prediction (B, out_channels, h F, w F)."""

    def __init__(self, channels, out_channels, patching):
        super().__init__()
        factor = patch_factor(patching)
        self.levels = int(patching[4:]) if patching.startswith("dwt") else 0
        if patching.startswith("conv"):
            self.conv = nn.ConvTranspose2d(channels, out_channels, factor, stride=factor)
        else:
            self.conv = nn.Conv2d(channels, out_channels * factor ** 2, 3, padding=1)

    def forward(self, h):
        y = self.conv(h)
        # The inverse wavelet runs in float32 even under autocast. It is cheap, and it makes the final pixels.
        return idwt(y.float(), self.levels) if self.levels else y.float()


# ------------------------------------------------------------------------------------------ the picture of 3.3

def noise_variances():
    """Return the variance of white noise in LL2, LH2, HL2, HH2, LH1, HL1, HH1, from the rows of W: |W^T e|^2."""
    unit = torch.zeros(16, 16, 8, 8)                                      # one coefficient each, in 32 x 32 pixels
    unit[range(16), range(16), 4, 4] = 1
    return adjoint(unit, 2).square().sum((1, 2, 3))[[0, 1, 2, 3, 4, 8, 12]]


def draw_bands(x, level_1, level_2, path):
    """Draw the image beside its wavelet bands. The details are amplified, or nobody would see them. Figure 6."""
    def mosaic(ll, lh, hl, hh):
        return torch.cat([torch.cat([ll, 4 * hl], -1), torch.cat([4 * lh, 4 * hh], -1)], -2)

    bands = mosaic(mosaic(*level_2), *level_1[1:])                        # the second level in the corner of the first
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 4.8))
    for axis, image in zip(axes, (x, bands)):
        show_image(axis, image[0])
    axes[0].set_title("image, 512 x 512")
    axes[1].set_title("two levels of the 5/3 DWT (details x 4)")
    save_figure(figure, path)


def main():
    from data import Glyphs                                               # only the picture needs an image
    x = Glyphs(size=(512, 512)).image(10)[None]                           # (1, 3, 512, 512)
    error = (idwt(dwt(x, 2), 2) - x).abs().max().item()
    print(f"largest reconstruction error, two levels, float32: {error:.1e}")

    level_1 = _analyse(x)
    level_2 = _analyse(level_1[0])
    bands = level_2 + level_1[1:]
    energy = sum(band.pow(2).sum() for band in bands)
    print("band        size   mean square   share of energy   variance of white noise")
    for name, band, variance in zip(["LL2", "LH2", "HL2", "HH2", "LH1", "HL1", "HH1"], bands, noise_variances()):
        print(f"{name}    {band.shape[-2]:4d}x{band.shape[-1]:<4d} {band.pow(2).mean():11.5f}   "
              f"{band.pow(2).sum() / energy:15.2%} {variance:25.3f}")

    draw_bands(x, level_1, level_2, "figures/dwt.png")
    print("wrote figures/dwt.png (figure 6)")


if __name__ == "__main__":
    main()
