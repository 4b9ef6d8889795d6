"""Noise schedules and the three faces of a prediction: x, eps, v.

Paper: simple diffusion (Hoogeboom, Heek, Salimans 2023, arXiv 2301.11093), sections 2 and 3.1, appendix A.
Read before: nothing. Read after: dwt.py (section 3.3), then unet.py.

The process destroys an image x in continuous time, t = 0 clean, t = 1 noise (eq. 1):

    z_t = alpha_t x + sigma_t eps,        alpha_t^2 + sigma_t^2 = 1     ("variance preserving")

Only the ratio of the two matters, so one number describes the whole state, the log signal-to-noise ratio

    logsnr = lambda_t = log(alpha_t^2 / sigma_t^2)      =>   alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda).

Conventions of the whole project, stated once, here:
    images   float32, (B, C, H, W), in [-1, 1]
    t        (B,) or a scalar, in [0, 1]
    logsnr   (B,) or a scalar, natural logarithm; broadcast over images by the functions below
    x, eps, v, z   (B, C, H, W), all of one shape

# Paper: section 2 once calls alpha_t / sigma_t the signal-to-noise ratio and once its square. It is the square.
# Paper: section 3.1 writes N(mean, sigma) with a standard deviation where eq. 1 has a variance. We mean the variance.

`python schedule.py` draws figures 3 and 5 into figures/ and prints the SNR before and after pooling, measured.
"""
import math

import torch


# ------------------------------------------------------------------------------------------ the schedules (3.1, A)

def logsnr_cosine(t, logsnr_min=-15.0, logsnr_max=15.0):
    """The cosine schedule alpha_t = cos(pi t / 2) in log-SNR, cut off at both ends. Appendix A.

    t: tensor in [0, 1], any shape. Returns logsnr of the same shape: logsnr_max at t = 0, logsnr_min at t = 1.
    In float32 the value at t = 1 is off by about 1e-5, since tan is steep there (2e-2 at logsnr_min = -25): no harm.
    """
    t = torch.as_tensor(t)
    t_min = math.atan(math.exp(-0.5 * logsnr_max))
    t_max = math.atan(math.exp(-0.5 * logsnr_min))
    return -2.0 * torch.log(torch.tan(t_min + t * (t_max - t_min)))


def logsnr_shifted(t, image_d, noise_d, logsnr_min=-15.0, logsnr_max=15.0):
    """The cosine schedule of resolution noise_d, moved to resolution image_d. Eq. 5.

    Averaging s x s pixels divides the noise variance by s^2 and leaves the image alone, so an image of side image_d,
    looked at through windows of image_d / noise_d, has (image_d / noise_d)^2 times the SNR of its pixels (eq. 4). To
    give the small view the SNR that it was designed for, the pixels get (noise_d / image_d)^2 times less. In logs:
    everything, BOTH END POINTS INCLUDED, moves by 2 log(noise_d / image_d): -1.386 for 128 pixels at noise_d = 64.

    image_d: side of the image, px. noise_d: side at which the plain cosine holds, px (papers: 64, 32).
    # Paper: silent on images that are not square. We take image_d = sqrt(H W), the side of the square of equal area.
    """
    return logsnr_cosine(t, logsnr_min, logsnr_max) + 2.0 * math.log(noise_d / image_d)


def logsnr_interpolated(t, image_d, noise_d_low, noise_d_high, logsnr_min=-15.0, logsnr_max=15.0):
    """From shift noise_d_high at the clean end to shift noise_d_low at the noisy end. Appendix A.

    Shifting spends little time on fine detail; this keeps the noisy end of the low shift and gives the clean end the
    high one (low <= high). The paper's example is 512 px, 32 -> 256; it advises this schedule where guidance is used.

    # Paper: eq. 6 weights noise_d_high by t, appendix A's code weights noise_d_low by t: they are opposite. We follow
    # appendix A. There sampling, which begins at t = 1, "starts at shift 32"; the curve covers the wider range of
    # log-SNR; and it always falls. With the weights of eq. 6 it stops falling once high / low > e^pi, about 23.
    # Paper: the code prints this function under the name of the shifted one.
    """
    t = torch.as_tensor(t)
    low = logsnr_shifted(t, image_d, noise_d_low, logsnr_min, logsnr_max)
    high = logsnr_shifted(t, image_d, noise_d_high, logsnr_min, logsnr_max)
    return t * low + (1.0 - t) * high


# ------------------------------------------------------------------------------------------ the process (2, eq. 1)

def alpha_sigma(logsnr):
    """alpha, sigma of the variance preserving process, each shaped like logsnr, each in (0, 1)."""
    logsnr = torch.as_tensor(logsnr)
    # sigma is sigmoid(-lambda), never 1 - alpha^2: near t = 0 the difference would round to zero.
    return torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr))


def alpha_sigma_for(image, logsnr):
    """alpha_sigma with trailing axes of length 1, so that logsnr (B,) acts on image (B, C, H, W) example by example."""
    logsnr = torch.as_tensor(logsnr, dtype=image.dtype, device=image.device)
    if logsnr.ndim not in (0, 1) or (logsnr.ndim == 1 and logsnr.shape[0] not in (1, image.shape[0])):
        raise ValueError(f"logsnr must be a scalar or ({image.shape[0]},), not {tuple(logsnr.shape)}")
    return alpha_sigma(logsnr.reshape(logsnr.shape + (1,) * (image.ndim - 1) if logsnr.ndim else ()))


def diffuse(x, eps, logsnr):
    """z_t = alpha_t x + sigma_t eps. Eq. 1. eps ~ N(0, 1) is the caller's, so that it can be seeded."""
    alpha, sigma = alpha_sigma_for(x, logsnr)
    return alpha * x + sigma * eps


# --------------------------------------------------------------------------- x, eps and v: one prediction, three faces
# With z known, any one of x, eps, v gives the other two (section 2, "Parametrization"). The clean way to see it: z and
# v are x and eps turned by the angle phi with tan phi = sigma / alpha,
#
#       z =  alpha x + sigma eps            x   = alpha z - sigma v
#       v = -sigma x + alpha eps            eps = sigma z + alpha v
#
# so from v nothing is ever divided: that is why v is what the networks predict. From eps, x needs a division by alpha,
# which is 6e-4 at logsnr = -15 and multiplies every error of the network by 1800; from x, eps needs one by sigma.

def v_from_x_eps(x, eps, logsnr):
    """v = alpha eps - sigma x. The definition (Salimans & Ho 2022)."""
    alpha, sigma = alpha_sigma_for(x, logsnr)
    return alpha * eps - sigma * x


def x_from_v(z, v, logsnr):
    """x = alpha z - sigma v. Stable everywhere."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return alpha * z - sigma * v


def eps_from_v(z, v, logsnr):
    """eps = sigma z + alpha v. Stable everywhere. The MSE of eps is alpha^2 = SNR / (1 + SNR) times the MSE of v."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return sigma * z + alpha * v


def v_from_eps(z, eps, logsnr):
    """v = (eps - sigma z) / alpha. Errors grow like 1 / alpha towards t = 1."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (eps - sigma * z) / alpha


def v_from_x(z, x, logsnr):
    """v = (alpha z - x) / sigma. Errors grow like 1 / sigma towards t = 0."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (alpha * z - x) / sigma


def x_from_eps(z, eps, logsnr):
    """x = (z - sigma eps) / alpha. Errors grow like 1 / alpha towards t = 1: "unstable sampling near t = 1"."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (z - sigma * eps) / alpha


def eps_from_x(z, x, logsnr):
    """eps = (z - alpha x) / sigma. Errors grow like 1 / sigma towards t = 0."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (z - alpha * x) / sigma


# ------------------------------------------------------------------------------------------ the pictures of 3.1

def snr_before_and_after_pooling(x, logsnr, s, generator=None):
    """Measure eq. 4: alpha^2 over the variance of what is not alpha x, in z's pixels and in its s x s averages.

    x: (B, C, H, W), H and W divisible by s. Returns (snr, snr_pooled), two floats; their ratio is s^2.
    """
    logsnr = torch.as_tensor(float(logsnr))
    z, pool = diffuse(x, torch.randn(x.shape, generator=generator), logsnr), torch.nn.functional.avg_pool2d
    alpha, _ = alpha_sigma(logsnr)
    return float(alpha**2 / (z - alpha * x).var()), float(alpha**2 / (pool(z, s) - alpha * pool(x, s)).var())


def main():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from data import Glyphs                                               # only the picture needs an image
    import os
    os.makedirs("figures", exist_ok=True)

    # Figure 5: the curves.
    t = torch.linspace(0, 1, 501)
    figure, axis = plt.subplots(figsize=(6.4, 4))
    axis.plot(t, logsnr_cosine(t), label="cosine")
    for noise_d in (256, 128, 64, 32):
        axis.plot(t, logsnr_shifted(t, 512, noise_d), label=f"shifted to {noise_d}")
    axis.plot(t, logsnr_interpolated(t, 512, 32, 256), "k--", label="interpolated 32 → 256")
    axis.set(xlabel="t", ylabel="log SNR", title="Schedules for 512 px (simple diffusion, figure 5)")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig("figures/schedule_logsnr.png", dpi=120)

    # Figure 3: one 512 px scene, noised, seen at 64 px. Above the cosine schedule, below the one shifted to 64.
    x = Glyphs(size=(512, 512)).image(10)[None]                           # (1, 3, 512, 512)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    times = torch.linspace(0.1, 0.9, 9)
    figure, axes = plt.subplots(2, len(times), figsize=(1.25 * len(times), 2.9))
    for row, (name, logsnrs) in enumerate([("cosine", logsnr_cosine(times)),
                                           ("shifted to 64", logsnr_shifted(times, 512, 64))]):
        for column, (time, logsnr) in enumerate(zip(times, logsnrs)):
            z = torch.nn.functional.avg_pool2d(diffuse(x, eps, logsnr), 8)[0]
            picture = ((z + 1) / 2).clamp(0, 1).permute(1, 2, 0)
            axis = axes[row, column]
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if row == 0:
                axis.set_title(f"t = {float(time):.1f}", fontsize=9)
            if column == 0:
                axis.set_ylabel(name, fontsize=9)
    figure.suptitle("A noised 512 px scene, average-pooled to 64 px (figure 3)", fontsize=10)
    figure.tight_layout()
    figure.savefig("figures/schedule_noise.png", dpi=120)

    print("window   SNR of pixels   SNR of averages   ratio   s^2     (eq. 4, measured on 512 px noise, t = 0.5)")
    for s in (2, 4, 8):
        before, after = snr_before_and_after_pooling(x, logsnr_cosine(0.5), s, torch.Generator().manual_seed(s))
        print(f"{s} x {s}    {before:13.3f}   {after:15.3f}   {after / before:5.2f}   {s * s}")
    print("wrote figures/schedule_logsnr.png (figure 5) and figures/schedule_noise.png (figure 3)")


if __name__ == "__main__":
    main()
