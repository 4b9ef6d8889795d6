"""Cascaded diffusion: a small image first, then super-resolution, and the augmentations that make it work.

Paper: Cascaded Diffusion Models (Ho, Saharia, Chan, Fleet, Norouzi, Salimans 2021, arXiv 2106.15282), sections 2 and 3.
We did not have its full text. This file follows detailed notes on it. "Unverified" marks what the notes leave open.
Needs: schedule.py, unet.py. Next: precondition.py.

Each stage is a diffusion model of its own and trains on its own. The super-resolution stage gets its noisy z_t and a
low-resolution image of the same scene. That image is up-sampled and concatenated to z_t over the channels:

    training    low_res = down(x), the real image averaged down
    sampling    low_res = the sample of the stage before

Samples are not like real images. A model that trusts its low_res copies every mistake of a sample: 16 -> 64 px in two
stages had FID 6.02, a single stage had 2.35. "Conditioning augmentation" corrupts low_res in training, so that the
model learns not to trust it blindly (FID 2.13):

    Gaussian (3.2, 3.3)   z_s = alpha_s low_res + sigma_s eps, with s ~ U(0, 1) for each example. The noise is added at
                          the LOW resolution, by the schedule of the low-res model, before up-sampling. The level is a
                          condition of the model
    blur (3.1)            a 3x3 Gaussian of sigma ~ U(0.4, 0.6) on half of the examples, never in sampling

So one network learns all levels s. The best s is found after training, by trying some. A stage can pass one of three
things to the next (`HANDOFFS`):

    truncated   its own z_s: its sampling stops at s (3.2)
    clean       its finished image without noise, and the level "none"
    renoised    its finished image with fresh noise of level s ("non-truncated", 3.3). Note: the search for s then
                samples the first stage only once

Legend of shapes: B batch; x, z (B, 3, H, W); low_res (B, 3, h, w); logsnr, aug_logsnr (B,), +inf = no noise.

# Paper: s comes from discrete steps. Whether they include 0 is unverified. Ours is continuous. A share 1 - aug_noise of
# the examples has no noise and the level "none", so the model also knows s = 0.

`python cascade.py` draws one low-res image under each augmentation. It prints the SNR that the next stage sees.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from plumbing.pages import draw_panels
from schedule import diffuse, logsnr_shifted
from unet import initialise, sinusoid

HANDOFFS = ("truncated", "renoised", "clean")


# ------------------------------------------------------------------------------------------ the conditioning (3)

def downsample(x, size):
    """Average x down to the low-res image of training: (B, 3, H, W) -> (B, 3, *size).

    Raises ValueError if `size` does not divide that of x by the same factor in height and width.
    """
    height, width = x.shape[-2:]
    if height % size[0] or width % size[1] or height // size[0] != width // size[1]:
        raise ValueError(f"{height}x{width} does not come down to {size[0]}x{size[1]} by averaging squares")
    return F.avg_pool2d(x, height // size[0])


def upsample(low_res, size, mode="bilinear"):
    """Up-sample (B, 3, h, w) -> (B, 3, *size). mode: bilinear or bicubic."""
    return F.interpolate(low_res, size, mode=mode, align_corners=False)


def blur_augment(low_res, sigma):
    """Blur each image with a 3x3 Gaussian. Section 3.1. sigma (B,), in low-res pixels; 0 changes nothing.

    The border repeats its nearest pixel.
    """
    distance2 = torch.tensor([1.0, 0.0, 1.0], device=low_res.device)      # squared, of the three taps
    taps = torch.exp(-distance2 / (2 * sigma.clamp(min=1e-3)[:, None] ** 2))                    # (B, 3)
    taps = taps / taps.sum(1, keepdim=True)
    B, C, h, w = low_res.shape
    kernel = (taps[:, :, None] * taps[:, None, :]).repeat_interleave(C, 0)[:, None]             # (B C, 1, 3, 3)
    padded = F.pad(low_res, (1, 1, 1, 1), mode="replicate").reshape(1, B * C, h + 2, w + 2)
    return F.conv2d(padded, kernel.to(low_res.dtype), groups=B * C).reshape(B, C, h, w)


def gaussian_augment(low_res, logsnr, noise):
    """Return alpha_s low_res + sigma_s noise. Section 3.2. logsnr (B,); +inf gives low_res, to the bit."""
    return diffuse(low_res, noise, logsnr)


def augment(low_res, s, noise, low_schedule, draws, aug_noise=1.0, aug_blur=0.0, blur_range=(0.4, 0.6)):
    """Blur and noise the low-res images of training. -> (low_res, aug_logsnr), both conditions of the model.

    s                     (B,) ~ U(0, 1), the time of the noise of each example
    noise                 shaped like low_res
    draws                 (3, B) ~ U(0, 1). They decide who gets noise, who gets blur, and how much blur
    aug_noise, aug_blur   shares of the examples. The paper blurs half of them in the stages to 128 px and above. In
                          those below it adds noise
    """
    some, blurred, amount = draws
    sigma = blur_range[0] + (blur_range[1] - blur_range[0]) * amount
    blurry = blur_augment(low_res, sigma)
    low_res = torch.where((blurred < aug_blur)[:, None, None, None], blurry, low_res)
    logsnr = torch.where(some < aug_noise, low_schedule(s), torch.inf)    # (B,), each example its own level
    return gaussian_augment(low_res, logsnr, noise), logsnr


# ------------------------------------------------------------------------------------------ the model (2)

class SuperResolutionUNet(nn.Module):
    """Give a network a low-res image: (z, logsnr, cond) -> v_hat, with two more conditions:

    cond["low_res"]     (B, 3, h, w) in [-1, 1] before its noise. It is never dropped: guidance drops only the label.
    cond["aug_logsnr"]  (B,) log-SNR of that noise. +inf, or no such key: no noise. This has a learned embedding

    network        a UNet or a UViT of 6 input channels: z and the up-sampled low-res image
    low_size       (h, w)
    low_ends       (logsnr_min, logsnr_max), the end points of the low-res model's schedule
    emb_channels   E of the network
    mode           of up-sampling: bilinear or bicubic
    Raises ValueError for a low-res image of another size, KeyError without one.
    """

    def __init__(self, network, low_size, low_ends, emb_channels, mode="bilinear"):
        super().__init__()
        self.network, self.low_size, self.low_ends, self.mode = network, tuple(low_size), low_ends, mode
        self.size = network.size
        self.level = nn.Sequential(nn.Linear(256, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
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
        """Embed the level: (B,) or None -> (B, E). Like log-SNR itself, by its place between the end points."""
        if aug_logsnr is None:
            aug_logsnr = torch.full((batch,), torch.inf, device=device)
        none = torch.isinf(aug_logsnr)
        low, high = self.low_ends
        place = (torch.where(none, high, aug_logsnr).float() - low) / (high - low)
        return torch.where(none[:, None], self.no_level, self.level(sinusoid(place, 256)))


# ------------------------------------------------------------------------------------------ from stage to stage (3)

def hand_over(low_res, handoff, s, low_schedule, noise):
    """Return (low_res, aug_logsnr), the conditions of the next stage.

    low_res   the z_s of the stage below for "truncated", else its finished image
    s         in [0, 1]; 0 means no noise, whatever the handoff
    noise     shaped like low_res; only "renoised" uses it
    """
    if handoff not in HANDOFFS:
        raise ValueError(f"handoff {handoff}: want one of {', '.join(HANDOFFS)}")
    none = handoff == "clean" or s == 0
    level = torch.full((len(low_res),), torch.inf if none else float(low_schedule(torch.tensor(float(s)))))
    level = level.to(low_res.device)
    return (gaussian_augment(low_res, level, noise) if handoff == "renoised" else low_res), level


# ------------------------------------------------------------------------------------------ the page of the lecture

def measured_snr(low_res, s, low_schedule, size, generator):
    """Noise low_res to time s. -> log-SNR (given to the model, measured in z_s, measured in the up-sampled z_s).

    Measured: alpha^2 over the variance of what is not alpha low_res, as the schedule defines it (an image of power 1).
    """
    level = low_schedule(torch.as_tensor(s)).expand(len(low_res))
    z = gaussian_augment(low_res, level, torch.randn(low_res.shape, generator=generator))
    alpha = torch.sigmoid(level[0]).sqrt()
    noise = [z - alpha * low_res, upsample(z, size) - alpha * upsample(low_res, size)]
    return float(level[0]), *(float(torch.log(alpha ** 2 / part.var())) for part in noise)


def draw_augmentations(low_res, times, low_schedule, size, path):
    """Draw one low-res image (1, 3, h, w) under each augmentation, and below as the model sees it."""
    noise = torch.randn(low_res.shape, generator=torch.Generator().manual_seed(0))
    panels = [("low-res", low_res)]
    panels += [(f"blur, σ {sigma}", blur_augment(low_res, torch.tensor([sigma]))) for sigma in (0.4, 0.6)]
    panels += [(f"s = {s}", gaussian_augment(low_res, low_schedule(torch.tensor([s])), noise)) for s in times]
    titles, images = zip(*panels)
    rows = [[image[0] for image in images], [upsample(image, size)[0] for image in images]]
    draw_panels(path, rows, titles, ["16 px", "as the model\nsees it, 64 px"],
                "One low-res image under each augmentation: noise and blur at 16 px, then up-sampled",
                size=(1.5, 1.7), interpolation="nearest")


def main():
    from data import Glyphs                                               # only the page needs images
    size, low_size, times = (64, 64), (16, 16), (0.1, 0.3, 0.5, 0.7, 0.9)
    low_schedule = lambda t: logsnr_shifted(t, 16, 32)
    low_res = downsample(torch.stack([Glyphs(size).image(i) for i in range(40)]), low_size)
    print("glyphs64_sr, 16x16 -> 64x64: log-SNR of the low-res image at s")
    print("   s     given   measured   after up-sampling (less noise; the model is given the level before it)")
    for s in times:
        given, measured, upsampled = measured_snr(low_res, s, low_schedule, size, torch.Generator().manual_seed(0))
        print(f"{s:4.1f} {given:9.2f} {measured:10.2f} {upsampled:12.2f}")
    draw_augmentations(low_res[10:11], times, low_schedule, size, "figures/cascade.png")
    print("wrote figures/cascade.png")


if __name__ == "__main__":
    main()
