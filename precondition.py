"""Precondition the network, band by band: it predicts only what a linear guess leaves open.

# Beyond the papers: their networks predict v itself. Karras et al. 2022 (EDM, section 5) let the network predict what a
# linear guess leaves open, in a unit of its own. Here is this idea for v, in each band of the wavelet. (EDM also scales
# the input. We leave it as it is.)
Needs: schedule.py, dwt.py. Next: config.py.

An image has little energy in its detail bands, white noise has a lot (`python dwt.py` measures both). So in these bands
v (schedule.py) is nearly a multiple of z, and a network that predicts v spends its few channels on copying
noise from its input to its output. What it copies badly is seen as grain.

Take one band. Let s^2 be the mean square of the image there, n^2 that of white noise. The best guess of x that is a
multiple of z is Wiener's. v follows from it, as a multiple of z: v_hat = c z. What is left, v - c z, has the mean
square d^2, and its product with z has the mean 0.

Note: with v = (alpha z - x) / sigma (schedule.py) these are
    x_hat = alpha s^2 z / (alpha^2 s^2 + sigma^2 n^2)
    c = alpha sigma (n^2 - s^2) / (alpha^2 s^2 + sigma^2 n^2)
    d = s n / sqrt(alpha^2 s^2 + sigma^2 n^2)

So the network F predicts the rest, in its own unit:  v_hat = c z + d F.  The sampler sees v, as before.

Which error does the loss measure? With the error of v, the low bands decide, and faint detail is lost. EDM takes the
error of F, which is the error of v over d. Then detail decides, even what the noise hides. --loss band_mse is in
between: the error of v over sqrt(d), in each band of the wavelet (benchmarks/NOTEBOOK.md compares the three). Over
log-SNR it has a weight (`band_loss` in train.py).

Note: if s = n in each band (an image like white noise), then c = 0 and d = n: the network predicts v, with a constant
unit in each band. This shows what v-prediction assumes.

The frames of a video (video.py) are nearly alike, so their differences have little energy, too. A cosine transform over
the T frames makes their mean the first frequency, and what changes slowly or fast the others. Each is a band. White
noise has the same n in all of them.

Shapes: z, v, F (B, 3 T, H, W), of an image T = 1. n: a number for each band of the wavelet, in the order of dwt.py.
Without wavelet there is one. s: T numbers for each of these bands, slow frequencies first.
`python precondition.py` draws c and d, and one detail band of z, v and v - c z.
"""
import math

import torch
import torch.nn as nn

from dwt import band_noise_variances, bands, idwt
from plumbing.pictures import pyplot, save_figure, show_image
from schedule import alpha_sigma, alpha_sigma_for, diffuse, v_from_x_eps


def over_time(x, back=False):
    """Cosine transform over the frames of videos (B, 3 T, H, W), orthonormal. back: its inverse. An image stays."""
    T = x.shape[1] // 3
    rows = [[math.sqrt((1 + (k > 0)) / T) * math.cos(math.pi * (i + 0.5) * k / T) for i in range(T)] for k in range(T)]
    mix = lambda row: sum(weight * frame for weight, frame in zip(row, x.split(3, 1)))
    return x if T == 1 else torch.cat([mix(row) for row in (zip(*rows) if back else rows)], 1)


def split(x, levels):
    """Return the bands of x (B, 3 T, H, W): the T frequencies of the first band of the wavelet, then of the next."""
    return [part for band in bands(over_time(x), levels) for part in band.chunk(x.shape[1] // 3, 1)]


def join(parts, levels):
    """Invert split."""
    return over_time(idwt(torch.cat(parts, 1), levels), back=True)


def band_rms(x, levels):
    """Return s of each band, the root mean square of images or videos x (B, 3 T, H, W): T (1 + 3 levels) floats."""
    return [band.square().mean().sqrt().item() for band in split(x, levels)]


def noise_rms(levels):
    """Return n of each wavelet band, the root mean square of white noise there: 1 + 3 levels floats."""
    return [math.sqrt(variance) for variance in band_noise_variances(levels)]


def coefficients(alpha, sigma, s, n):
    """Return c and d of a band, shaped like alpha and sigma. s, n > 0."""
    variance = alpha ** 2 * s ** 2 + sigma ** 2 * n ** 2                  # the mean square of z
    return alpha * sigma * (n ** 2 - s ** 2) / variance, s * n / variance.sqrt()


class Preconditioned(nn.Module):
    """Wrap a network: (z, logsnr, cond) -> v_hat. It takes and returns lists if the network does (nested_unet.py).

    network   (z, logsnr, cond) -> F, shaped like z
    rms       s of the bands, from band_rms, for each level of a nested network, highest first: [[s, ...], ...]
    counts    T of each level
    """

    def __init__(self, network, rms, counts):
        super().__init__()
        self.network, self.rms, self.counts = network, rms, counts
        self.noise = [noise_rms(len(level) // (3 * T)) for level, T in zip(rms, counts)]

    def forward(self, z, logsnr, cond):
        f = self.network(z, logsnr, cond)
        if isinstance(z, list):
            return [v_from_f(*level) for level in zip(f, z, logsnr, self.rms, self.noise)]
        return v_from_f(f, z, logsnr, self.rms[0], self.noise[0])

    @property
    def inner(self):
        """The levels below the highest, with the same weights: what grow (nested_unet.py) loads."""
        return Preconditioned(self.network.inner, self.rms[1:], self.counts[1:])


def v_from_f(f, z, logsnr, s, n):
    """Return v = c z + d F, in each band. s, n: as above."""
    (alpha, sigma), v = alpha_sigma_for(z, logsnr), []
    T, levels = len(s) // len(n), len(n) // 3
    for i, (z_band, f_band) in enumerate(zip(split(z, levels), split(f, levels))):
        c, d = coefficients(alpha, sigma, s[i], n[i // T])
        v.append(c * z_band + d * f_band)
    return join(v, levels)


def balance(v_error, logsnr, s):
    """Return v_error / sqrt(d), in each band of the wavelet: between the error of v and that of F, v_error / d.

    Of a video, d is that of its frames as images. The d of each frequency would favour what changes over the mean of
    the frames, which shows the letter.
    """
    (alpha, sigma), balanced = alpha_sigma_for(v_error, logsnr), []
    T = v_error.shape[1] // 3
    levels = len(s) // (3 * T)
    n = noise_rms(levels)
    for i, band in enumerate(bands(v_error, levels)):
        s_frames = math.hypot(*s[T * i:T * i + T]) / math.sqrt(T)         # of the frames, as images
        balanced.append(band / coefficients(alpha, sigma, s_frames, n[i])[1].sqrt())
    return idwt(torch.cat(balanced, 1), levels)


# ------------------------------------------------------------------------------------------ the page of the lecture

def draw_precondition(x, s, n, path):
    """Draw c and d of each band against log-SNR, and the band HH of z, v and v - c z for one image of x."""
    logsnr = torch.linspace(-10, 10, 201)
    figure, axes = pyplot().subplots(1, 5, figsize=(13, 2.9), width_ratios=(1.5, 1.5, 1, 1, 1))
    for name, s_band, n_band in zip(("LL", "LH", "HL", "HH"), s, n):
        for axis, coefficient in zip(axes, coefficients(*alpha_sigma(logsnr), s_band, n_band)):
            axis.plot(logsnr, coefficient, label=name)
    for axis, title in zip(axes, ("c: the share of z", "d: the unit of F")):
        axis.set(xlabel="log SNR", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()

    level = torch.tensor(2.0)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    z, v = diffuse(x, eps, level), v_from_x_eps(x, eps, level)
    z, v = (bands(y, 1)[3][:1] for y in (z, v))                           # the band HH
    c, _ = coefficients(*alpha_sigma(level), s[3], n[3])
    for axis, title, band in zip(axes[2:], ("z", "v", "v - c z"), (z, v, v - c * z)):
        show_image(axis, band[0], f"HH of {title}, rms {band.square().mean().sqrt():.2f}", interpolation="nearest")
    figure.suptitle("Scenes at 64 px, one wavelet level; on the right at log SNR 2", fontsize=10)
    save_figure(figure, path)


def main():
    from data import Glyphs                                               # imported here: only main() needs images
    scenes = Glyphs(size=(64, 64))
    x = torch.stack([scenes.image(i) for i in range(10, 138)])
    s, n = band_rms(x, 1), noise_rms(1)
    print("rms at 64 px     LL     LH     HL     HH")
    for name, values in (("image", s), ("white noise", n)):
        print(f"{name:13s} " + " ".join(f"{value:6.3f}" for value in values))
    draw_precondition(x, s, n, "figures/precondition.png")
    print("wrote figures/precondition.png")


if __name__ == "__main__":
    main()
