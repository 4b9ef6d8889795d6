"""The 5/3 wavelet, and strided convolution as its alternative: two ways to avoid feature maps of high resolution.

Paper: simple diffusion, section 3.3 ("Avoiding high resolution feature maps") and figure 6.
Needs: nothing. Next: unet.py, which takes its first and its last layer from this file.

Feature maps of full resolution take much memory. Without them, all but one of the networks in table 5 are better. So
the first layer splits the image into four maps of half the side (one low-pass, three high-pass), or into sixteen of a
quarter of the side. The last layer puts such maps together again. The 5/3 (LeGall) wavelet of JPEG 2000 is linear and
invertible. In one dimension it works by "lifting", in two steps. The signal x is mirrored about its end samples:
x[-1] = x[1], x[N] = x[N-2].

Note: the steps are
    predict   d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2      high-pass: each odd sample minus its prediction
    update    s[n] = x[2n]   + (d[n-1] + d[n]) / 4        low-pass:  5 taps (-1, 2, 6, 2, -1) / 8
The inverse does the two steps in reverse order with opposite signs. It would be an inverse with any numbers in place
of 1/2 and 1/4.

# Paper: the gain is not stated. We take JPEG 2000's, which is 1: a constant signal gives the same constant in the low
# band. So the low band is a local average. It stays in [-1, 1], except for a small overshoot at sharp edges (ringing).
# Note: the transform is not orthogonal. Diffusion is not affected: it adds noise to pixels, the wavelet is a layer.

Shapes: B batch, C image channels, H, W pixels, L levels. Each side is divided by factor = 2^L.
`python dwt.py` draws figure 6. It prints the reconstruction error and the share of energy in each band.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.pages import draw_panels


def _split(x):
    """Split the last axis into a low and a high band, one level: (..., N) -> two of (..., N/2). N is even."""
    even, odd = x[..., 0::2], x[..., 1::2]
    next_even = torch.cat([even[..., 1:], even[..., -1:]], -1)            # x[2n+2]; mirrored: x[N] = x[N-2]
    high = odd - 0.5 * (even + next_even)                                 # predict
    previous_high = torch.cat([high[..., :1], high[..., :-1]], -1)  # d[n-1]; d[-1] = d[0] as x[-1] = x[1], x[-2] = x[2]
    low = even + 0.25 * (previous_high + high)                            # update
    return low, high


def _merge(low, high):
    """Invert _split. Note: undo the update, then the prediction."""
    previous_high = torch.cat([high[..., :1], high[..., :-1]], -1)
    even = low - 0.25 * (previous_high + high)                            # undo the update
    next_even = torch.cat([even[..., 1:], even[..., -1:]], -1)
    odd = high + 0.5 * (even + next_even)                                 # undo the prediction
    return torch.stack([even, odd], -1).flatten(-2)                       # interleave


def _analyse(x):
    """Split both axes, one level: (B, C, H, W) -> LL, LH, HL, HH, each (B, C, H/2, W/2).

    The first letter names the filter along the width, the second the filter along the height (L low, H high).
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
    """Return the wavelet coefficients of x, packed into channels of one resolution. Section 3.3.

    (B, C, H, W) -> (B, C 4^levels, H / 2^levels, W / 2^levels). Raise ValueError unless 2^levels divides H and W.
    Channel order: first LL of the coarsest level, then the details (LH, HL, HH) of each level, from the coarsest to the
    finest. A band of the coarsest level has C channels. A finer band has more pixels: space-to-depth turns each 2 x 2
    (or 4 x 4) of them into channels of one pixel of the coarsest size (in the paper, 256^2 becomes 128^2 x 4).
    """
    factor = 2 ** levels
    if x.shape[-2] % factor or x.shape[-1] % factor:
        raise ValueError(f"dwt: {x.shape[-2]}x{x.shape[-1]} is not divisible by {factor} ({levels} levels)")
    details = []
    for level in range(levels):
        x, lh, hl, hh = _analyse(x)
        details.insert(0, F.pixel_unshuffle(torch.cat([lh, hl, hh], 1), 2 ** (levels - 1 - level)))
    return torch.cat([x] + details, 1)


def idwt(y, levels):
    """Invert dwt: (B, C 4^levels, h, w) -> (B, C, h 2^levels, w 2^levels). ValueError if the channels do not fit."""
    if y.shape[1] % 4 ** levels:
        raise ValueError(f"idwt: {y.shape[1]} channels are not divisible by {4 ** levels} ({levels} levels)")
    channels = y.shape[1] // 4 ** levels
    sizes = [channels] + [3 * channels * 4 ** i for i in range(levels)]   # LL, then details, coarse to fine
    x, *details = torch.split(y, sizes, 1)
    for i, detail in enumerate(details):
        x = _synthesise(x, *F.pixel_shuffle(detail, 2 ** i).chunk(3, 1))
    return x


# ------------------------------------------------------------------------------------------ the two ends of a network
# `patching` chooses the first and the last layer of a network: none, dwt_L (a wavelet of L levels) or conv_d (a d x d
# convolution of stride d). The U-Net and the U-ViT both use the two modules below.

def patch_factor(patching):
    """Return the factor that divides each side: none 1, dwt_L 2^L, conv_d d. Raise ValueError for other names."""
    kind, _, number = patching.partition("_")
    if patching == "none":
        return 1
    if kind == "dwt" and number in ("1", "2", "3"):
        return 2 ** int(number)
    if kind == "conv" and number in ("2", "4", "8"):
        return int(number)
    raise ValueError(f"patching {patching!r}: use none, dwt_1, dwt_2, dwt_3, conv_2, conv_4 or conv_8")


def wavelet_levels(patching):
    """Return L of dwt_L, 0 for none and conv_d."""
    return int(patching[4:]) if patching.startswith("dwt") else 0


class EmbedInput(nn.Module):
    """Map an image (B, in_channels, H, W) to the first feature map (B, channels, H/factor, W/factor).

    none: a 3x3 convolution of the pixels. dwt_L: the same of the wavelet coefficients. conv_d: a d x d convolution of
    stride d, "what is called patching in transformer literature".
    """

    def __init__(self, in_channels, channels, patching):
        super().__init__()
        factor = patch_factor(patching)
        self.levels = wavelet_levels(patching)
        if patching.startswith("conv"):
            self.conv = nn.Conv2d(in_channels, channels, factor, stride=factor)
        else:
            self.conv = nn.Conv2d(in_channels * factor ** 2, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(dwt(x, self.levels) if self.levels else x)


class ProjectOutput(nn.Module):
    """Map the last feature map (B, channels, H/factor, W/factor) to the prediction (B, out_channels, H, W)."""

    def __init__(self, channels, out_channels, patching):
        super().__init__()
        factor = patch_factor(patching)
        self.levels = wavelet_levels(patching)
        if patching.startswith("conv"):
            self.conv = nn.ConvTranspose2d(channels, out_channels, factor, stride=factor)
        else:
            self.conv = nn.Conv2d(channels, out_channels * factor ** 2, 3, padding=1)

    def forward(self, features):
        y = self.conv(features)
        # The inverse wavelet computes the final pixels, and it is cheap. So it runs in float32 even under autocast.
        return idwt(y.float(), self.levels) if self.levels else y.float()


# --------------------------------------------------------------------- the picture of 3.3, and the noise in each band

def adjoint(y, levels):
    """Return W^T y for the matrix W of dwt: (B, C 4^levels, h, w) -> (B, C, h 2^levels, w 2^levels).

    For all x and y, sum(dwt(x) y) = sum(x adjoint(y)). If e is 1 at one coefficient and 0 elsewhere, then W^T e is the
    row of W that computes this coefficient. An exercise of the course; no other file uses it. Note: W is not
    orthogonal, so W^T is not the inverse.
    """
    factor = 2 ** levels
    x = y.new_zeros(y.shape[0], y.shape[1] // factor ** 2, y.shape[2] * factor, y.shape[3] * factor, requires_grad=True)
    return torch.autograd.grad(dwt(x, levels), x, y)[0]                   # the gradient of sum(dwt(x) y)


def bands(x, levels):
    """Return the bands of x in the order of dwt: 1 + 3 levels maps, LL with C channels, a detail with C 4^i."""
    sizes = [x.shape[1]] + [x.shape[1] * 4 ** i for i in range(levels) for _ in range(3)]
    return dwt(x, levels).split(sizes, 1)


def band_noise_variances(levels):
    """Return the variance of white noise in each band, in the order of dwt: 1 + 3 levels floats.

    It is the sum of the squared weights of a coefficient. The transform works axis by axis, so it is the product of two
    such sums. White noise of variance 1 gets, per axis, variance 0.72 (low) or 1.5 (high): HH1 2.25, LH1 and HL1 1.078;
    LL2 0.189. (The digit is the level.)
    """
    def squares(coefficients):                                            # of one in the middle, far from the ends
        return coefficients.square().sum(0)[coefficients.shape[1] // 2].item()

    low, details = torch.eye(64, device="cpu"), []                        # row i: a signal that is 1 at sample i
    for _ in range(levels):
        low, high = _split(low)
        low_high = squares(low) * squares(high)
        details = [low_high, low_high, squares(high) ** 2, *details]      # coarsest first
    return [squares(low) ** 2, *details]


def draw_bands(x, level_1, level_2, path):
    """Draw the image beside its wavelet bands. The details are multiplied by 4 to make them visible. Figure 6."""
    def mosaic(ll, lh, hl, hh):
        return torch.cat([torch.cat([ll, 4 * hl], -1), torch.cat([4 * lh, 4 * hh], -1)], -2)

    corner = mosaic(*level_2)                                             # the second level, in place of the first's LL
    draw_panels(path, [[x[0], mosaic(corner, *level_1[1:])[0]]],
                ["image, 512 x 512", "two levels of the 5/3 DWT (details x 4)"], size=(4.5, 4.8))


def main():
    from data import Glyphs                                               # imported here: only main() needs an image
    x = Glyphs(size=(512, 512)).image(10)[None]                           # (1, 3, 512, 512)
    error = (idwt(dwt(x, 2), 2) - x).abs().max().item()
    print(f"largest reconstruction error, two levels, float32: {error:.1e}")

    level_1 = _analyse(x)
    level_2 = _analyse(level_1[0])
    maps = level_2 + level_1[1:]
    energy = sum(band.pow(2).sum() for band in maps)
    print("band        size   mean square   share of energy   variance of white noise")
    for name, band, variance in zip(["LL2", "LH2", "HL2", "HH2", "LH1", "HL1", "HH1"], maps, band_noise_variances(2)):
        print(f"{name}    {band.shape[-2]:4d}x{band.shape[-1]:<4d} {band.pow(2).mean():11.5f}   "
              f"{band.pow(2).sum() / energy:15.2%} {variance:25.3f}")

    draw_bands(x, level_1, level_2, "figures/dwt.png")
    print("wrote figures/dwt.png (figure 6)")


if __name__ == "__main__":
    main()
