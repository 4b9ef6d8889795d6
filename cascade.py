"""Cascaded diffusion: a small image first, then a super-resolution model, and the augmentations that make it work.

Paper: Cascaded Diffusion Models (Ho, Saharia, Chan, Fleet, Norouzi, Salimans 2021, arXiv 2106.15282), sections 2 and 3.
Its full text was not at hand: what stands below rests on detailed notes of it; what is called unverified is so.
Read before: schedule.py, unet.py. Read after: train.py, sample.py.

Each stage is a diffusion model of its own, trained on its own. The super-resolution stage sees, beside its noisy z_t, a
low-resolution image of the same thing, up-sampled and concatenated over channels:

    training    low_res = down(x), the real image averaged down
    sampling    low_res = what the stage before has made

The two are not alike, and a model that trusts real low-res images copies every mistake of made ones: 16 -> 64 in two
stages had FID 6.02 where one stage had 2.35. "Conditioning augmentation" spoils low_res in training, so that the model
cannot trust it blindly (FID 2.13):

    Gaussian (3.2, 3.3)   z_s = alpha_s low_res + sigma_s eps, s ~ U(0, 1) each example for itself, noise added at the
                          LOW resolution by the low-res model's schedule, then up-sampled; the model is told the level
    blur (3.1)            a 3x3 Gaussian of sigma ~ U(0.4, 0.6) on half of the examples; never when sampling

One network thus learns all levels s, and the best s is looked for afterwards, without training. What one stage hands
to the next (`HANDOFFS`) is

    truncated   the lower stage's own z_s: its sampling stops at s (3.2)
    renoised    its finished image, with fresh noise to level s ("non-truncated", 3.3): drawn once, searched often
    clean       its finished image as it is, and the level "none"

Legend of shapes: B batch; x, z (B, 3, H, W); low_res (B, 3, h, w); logsnr, aug_logsnr (B,), +inf = no noise.

# Paper: s is drawn from discrete steps; whether from 0 is unverified. Ours is continuous, and a share of the examples
# (1 - aug_noise) has no noise and the level "none", so that s = 0 is a level that the model knows.

`python cascade.py` draws one low-res image under each augmentation, and prints the SNR that the next stage sees.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from schedule import diffuse
from unet import initialise, sinusoid

HANDOFFS = ("truncated", "renoised", "clean")


# ------------------------------------------------------------------------------------------ the conditioning (3)

def downsample(x, size):
    """The low-res image of training: averages of x. (B, 3, H, W) -> (B, 3, *size). Raises ValueError if size does not
    divide."""
    height, width = x.shape[-2:]
    if height % size[0] or width % size[1] or height // size[0] != width // size[1]:
        raise ValueError(f"{height}x{width} does not come down to {size[0]}x{size[1]} by averaging squares")
    return F.avg_pool2d(x, height // size[0])


def upsample(low_res, size, mode="bilinear"):
    """(B, 3, h, w) -> (B, 3, *size), bilinear or bicubic."""
    return F.interpolate(low_res, size, mode=mode, align_corners=False)


def blur_augment(low_res, sigma):
    """Section 3.1: a 3x3 Gaussian blur, sigma (B,) in low-res pixels, example by example; sigma 0 leaves it as it is.

    At the borders the nearest pixel is repeated.
    """
    away = torch.tensor([1.0, 0.0, 1.0], device=low_res.device)           # squared distance of the three taps
    taps = torch.exp(-away / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))   # (B, 3)
    taps = taps / taps.sum(1, keepdim=True)
    B, C, h, w = low_res.shape
    kernel = (taps[:, :, None] * taps[:, None, :]).repeat_interleave(C, 0)[:, None]             # (B C, 1, 3, 3)
    padded = F.pad(low_res, (1, 1, 1, 1), mode="replicate").reshape(1, B * C, h + 2, w + 2)
    return F.conv2d(padded, kernel.to(low_res.dtype), groups=B * C).reshape(B, C, h, w)


def gaussian_augment(low_res, logsnr, noise):
    """Section 3.2: alpha_s low_res + sigma_s noise, at low resolution. logsnr (B,); +inf gives low_res, to the bit."""
    return diffuse(low_res, noise, logsnr)


def augment(low_res, s, noise, low_schedule, draws, aug_noise=1.0, aug_blur=0.0, blur_range=(0.4, 0.6)):
    """Both augmentations, as in training. -> (low_res as the model sees it, aug_logsnr as it is told).

    s (B,) ~ U(0, 1); noise like low_res; draws (3, B) ~ U(0, 1): who gets noise, who gets blur, and how much of it.
    aug_noise, aug_blur: shares of the examples. Paper: blur for half, for the stages to 128 and above; Gaussian below.
    """
    some, blurred, amount = draws
    sigma = blur_range[0] + (blur_range[1] - blur_range[0]) * amount
    blurry = blur_augment(low_res, sigma)
    low_res = torch.where((blurred < aug_blur)[:, None, None, None], blurry, low_res)
    logsnr = torch.where(some < aug_noise, low_schedule(s), torch.inf)    # (B,) each example its own level
    return gaussian_augment(low_res, logsnr, noise), logsnr


# ------------------------------------------------------------------------------------------ the model (2)

class SuperResolutionUNet(nn.Module):
    """(z, logsnr, cond) -> v_hat, with two more conditions:

    cond["low_res"]     (B, 3, h, w) in [-1, 1] plus its noise. Needed, always: guidance drops the label alone.
    cond["aug_logsnr"]  (B,) level of that noise, as log-SNR; +inf or key absent = none, a learned embedding of its own

    network        a UNet or a UViT of 6 input channels: z and the up-sampled low-res image
    low_size       (h, w); low_ends (logsnr_min, logsnr_max) of the low-res model's schedule
    emb_channels   E of the network; width: sinusoids of the level; mode: bilinear or bicubic
    Raises ValueError for a low-res image of another size, KeyError without one.
    """

    def __init__(self, network, low_size, low_ends, emb_channels, mode="bilinear", width=256):
        super().__init__()
        self.network, self.low_size, self.low_ends, self.mode = network, tuple(low_size), low_ends, mode
        self.size, self.width = network.size, width
        self.level = nn.Sequential(nn.Linear(width, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        self.no_level = nn.Parameter(torch.zeros(emb_channels))
        initialise(self.level)

    def forward(self, z, logsnr, cond):
        low_res = cond["low_res"]
        if tuple(low_res.shape[-2:]) != self.low_size:
            raise ValueError(f"this model goes from {self.low_size[0]}x{self.low_size[1]}, got a low-res image of "
                             f"{low_res.shape[-2]}x{low_res.shape[-1]}")
        emb, text = self.network.embed(logsnr, cond, len(z))
        emb = emb + self.of_level(cond.get("aug_logsnr"), len(z), z.device)
        both = torch.cat([z, upsample(low_res, self.size, self.mode)], 1)                       # (B, 6, H, W)
        return self.network.output(self.network.features(both, emb, text))

    def of_level(self, aug_logsnr, batch, device):
        """(B,) or None -> (B, E). As with the network's own log-SNR: its place between the schedule's ends."""
        if aug_logsnr is None:
            aug_logsnr = torch.full((batch,), torch.inf, device=device)
        none = torch.isinf(aug_logsnr)
        low, high = self.low_ends
        place = (torch.where(none, high, aug_logsnr).float() - low) / (high - low)
        return torch.where(none[:, None], self.no_level, self.level(sinusoid(place, self.width)))


def super_resolution_loss(model, x, low_res, aug_logsnr, cond, t, eps, schedule, measure):
    """The simple loss of this stage, given its augmented low-res image. -> scalar.

    measure(v_hat, z, x, eps, logsnr) -> the loss, as in nested_unet.py: train.py's, on eps or v.
    """
    logsnr = schedule(t)
    z = diffuse(x, eps, logsnr)
    v = model(z, logsnr, dict(cond, low_res=low_res, aug_logsnr=aug_logsnr))
    return measure(v, z, x, eps, logsnr)


# ------------------------------------------------------------------------------------------ from stage to stage (3)

def hand_over(low_res, handoff, s, low_schedule, noise):
    """What the next stage gets: (low_res, aug_logsnr) for cond. s in [0, 1]; s = 0 is "none" in every way.

    low_res: for "truncated" the lower stage's z_s; else its finished image. noise: like low_res, for "renoised".
    """
    if handoff not in HANDOFFS:
        raise ValueError(f"handoff {handoff}: want one of {', '.join(HANDOFFS)}")
    none = handoff == "clean" or s == 0
    level = torch.full((len(low_res),), torch.inf if none else float(low_schedule(torch.tensor(float(s)))))
    level = level.to(low_res.device)
    return (gaussian_augment(low_res, level, noise) if handoff == "renoised" else low_res), level


# ------------------------------------------------------------------------------------------ the page of the lecture

def measured_snr(low_res, s, low_schedule, size, generator):
    """Log-SNR of the low-res image that a model is given at s: (as told, as measured, as measured once up-sampled).

    Measured: alpha^2 over the variance of what is not alpha low_res, as the schedule defines it (an image of power 1).
    """
    level = low_schedule(torch.as_tensor(s)).expand(len(low_res))
    z = gaussian_augment(low_res, level, torch.randn(low_res.shape, generator=generator))
    alpha = torch.sigmoid(level[0]).sqrt()
    noise = [z - alpha * low_res, upsample(z, size) - alpha * upsample(low_res, size)]
    return float(level[0]), *(float(torch.log(alpha ** 2 / part.var())) for part in noise)


def main():
    import os
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from config import PRESETS, make_low_schedule
    from data import Glyphs
    os.makedirs("figures", exist_ok=True)
    config = PRESETS["glyphs64_sr"]
    schedule, size = make_low_schedule(config), config.size
    low_res = downsample(torch.stack([Glyphs(size).image(i) for i in range(40)]), config.low_size)

    print("glyphs64_sr, 16x16 -> 64x64: log-SNR of the low-res image at s")
    print("   s      told   measured   after up-sampling (bilinear averages, so there is less noise: told is before)")
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    for s in levels:
        told, measured, upsampled = measured_snr(low_res, s, schedule, size, torch.Generator().manual_seed(0))
        print(f"{s:4.1f} {told:9.2f} {measured:10.2f} {upsampled:12.2f}")

    one = low_res[10:11]
    noise = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
    panels = [("low-res", one)]
    panels += [(f"blur, σ {sigma}", blur_augment(one, torch.tensor([sigma]))) for sigma in (0.4, 0.6)]
    panels += [(f"s = {s}", gaussian_augment(one, schedule(torch.tensor([s])), noise)) for s in levels]
    figure, axes = plt.subplots(2, len(panels), figsize=(1.5 * len(panels), 3.4))
    for column, (title, image) in zip(axes.T, panels):
        for axis, picture in zip(column, (image, upsample(image, size))):
            axis.imshow(((picture[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        column[0].set_title(title, fontsize=9)
    axes[0, 0].set_ylabel("16 px", fontsize=9)
    axes[1, 0].set_ylabel("as the model\nsees it, 64 px", fontsize=9)
    figure.suptitle("One low-res image under each augmentation: noise and blur at 16 px, then up-sampled", fontsize=10)
    figure.tight_layout()
    figure.savefig("figures/cascade.png", dpi=120)
    print("wrote figures/cascade.png")


if __name__ == "__main__":
    main()
