"""Noise schedules, and the three faces of a prediction: x, eps, v.

Paper: simple diffusion (Hoogeboom, Heek, Salimans 2023, arXiv 2301.11093), sections 2 and 3.1, appendix A.
Read before: nothing. Read after: dwt.py (section 3.3), then unet.py.

Diffusion destroys an image x gradually. Time t runs from 0 (clean) to 1 (noise). At time t the image is (eq. 1)

    z_t = alpha_t x + sigma_t eps,        alpha_t^2 + sigma_t^2 = 1     ("variance preserving")

Only the ratio of alpha to sigma matters. So one number describes the noise level, the log signal-to-noise ratio:

    logsnr = lambda_t = log(alpha_t^2 / sigma_t^2)      =>   alpha^2 = sigmoid(lambda), sigma^2 = sigmoid(-lambda).

Conventions of the whole project:
    images   float32, (B, C, H, W), in [-1, 1]
    t        (B,) or a scalar, in [0, 1]
    logsnr   (B,) or a scalar, natural logarithm; the functions below broadcast it over the images
    x, eps, v, z   (B, C, H, W), all of one shape

# Paper: section 2 once calls alpha_t / sigma_t the signal-to-noise ratio and once its square. It is the square.
# Paper: section 3.1 writes N(mean, sigma) with a standard deviation where eq. 1 has a variance. We mean the variance.

`python schedule.py` draws figures 3 and 5 into figures/. It also measures the SNR before and after pooling (eq. 4).
"""
import math

import torch
import torch.nn.functional as F

from plumbing.pictures import pyplot, save_figure, show_image


# ------------------------------------------------------------------------------------------ the schedules (3.1, A)

def logsnr_cosine(t, logsnr_min=-15.0, logsnr_max=15.0):
    """Return the log-SNR of the cosine schedule alpha_t = cos(pi t / 2), cut off at both ends. Appendix A.

    t: tensor in [0, 1], any shape. The result has that shape. It is logsnr_max at t = 0 and logsnr_min at t = 1.
    In float32 the value at t = 1 is off by about 1e-5, since tan is steep there (2e-2 at logsnr_min = -25). This does
    no harm.
    """
    t = torch.as_tensor(t)
    t_min = math.atan(math.exp(-0.5 * logsnr_max))
    t_max = math.atan(math.exp(-0.5 * logsnr_min))
    return -2.0 * torch.log(torch.tan(t_min + t * (t_max - t_min)))


def logsnr_shifted(t, image_d, noise_d, logsnr_min=-15.0, logsnr_max=15.0):
    """Return the cosine schedule of resolution noise_d, shifted to resolution image_d. Eq. 5.

    Averaging s x s pixels divides the variance of the noise by s^2 and hardly changes the image. So the averaged image
    has s^2 times the SNR of its pixels (eq. 4). An image of side image_d, averaged down to side noise_d, has
    s = image_d / noise_d. It should get the SNR that the cosine schedule is designed for. So we give its pixels
    (noise_d / image_d)^2 times that SNR. In logs the whole curve moves by 2 log(noise_d / image_d), BOTH END POINTS
    INCLUDED: by -1.386 for 128 pixels at noise_d = 64.

    image_d: side of the image, px. noise_d: side at which the plain cosine holds, px (papers: 64, 32).
    # Paper: silent on images that are not square. We take image_d = sqrt(H W), the side of the square of equal area.
    """
    return logsnr_cosine(t, logsnr_min, logsnr_max) + 2.0 * math.log(noise_d / image_d)


def logsnr_interpolated(t, image_d, noise_d_low, noise_d_high, logsnr_min=-15.0, logsnr_max=15.0):
    """Go from shift noise_d_high at the clean end to shift noise_d_low at the noisy end. Appendix A.

    A shifted schedule spends little time on fine detail. This one keeps the low shift at the noisy end and uses the
    high shift at the clean end (low <= high). The paper's example is 512 px, 32 -> 256. The paper advises this
    schedule where guidance is used.

    # Paper: eq. 6 weights noise_d_high by t, appendix A's code weights noise_d_low by t. They are opposite. We follow
    # appendix A, for three reasons. Sampling begins at t = 1, and the appendix says that it "starts at shift 32". The
    # curve covers the wider range of log-SNR. And it always falls: with the weights of eq. 6 it stops falling once
    # high / low > e^pi, about 23.
    # Paper: the code prints this function under the name of the shifted one.
    """
    t = torch.as_tensor(t)
    low = logsnr_shifted(t, image_d, noise_d_low, logsnr_min, logsnr_max)
    high = logsnr_shifted(t, image_d, noise_d_high, logsnr_min, logsnr_max)
    return t * low + (1.0 - t) * high


# ------------------------------------------------------------------------------------------ the process (2, eq. 1)

def alpha_sigma(logsnr):
    """Return alpha and sigma of the variance preserving process, each shaped like logsnr, each in (0, 1)."""
    logsnr = torch.as_tensor(logsnr)
    # sigma is sigmoid(-lambda), never 1 - alpha^2: near t = 0 the difference would round to zero.
    return torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr))


def alpha_sigma_for(image, logsnr):
    """Return alpha and sigma as (B, 1, 1, 1): each example of image (B, C, H, W) gets its own noise level."""
    logsnr = torch.as_tensor(logsnr, dtype=image.dtype, device=image.device)
    if logsnr.ndim and tuple(logsnr.shape) not in [(1,), (len(image),)]:
        raise ValueError(f"logsnr must be a scalar or ({len(image)},), not {tuple(logsnr.shape)}")
    axes = (1,) * (image.ndim - 1) if logsnr.ndim else ()
    return alpha_sigma(logsnr.reshape(logsnr.shape + axes))               # (B, 1, 1, 1), or a scalar


def diffuse(x, eps, logsnr):
    """Return z_t = alpha_t x + sigma_t eps. Eq. 1. The caller draws eps ~ N(0, 1) and controls its seed."""
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
    """Measure eq. 4: the SNR of the pixels of z, and the SNR of its s x s averages.

    The noise is all that differs from alpha x. x: (B, C, H, W), H and W divisible by s.
    Returns (snr, snr_pooled), two floats. Their ratio is s^2.
    """
    logsnr = torch.as_tensor(float(logsnr))
    alpha, _ = alpha_sigma(logsnr)
    z = diffuse(x, torch.randn(x.shape, generator=generator), logsnr)
    noise = z - alpha * x
    pooled_noise = F.avg_pool2d(z, s) - alpha * F.avg_pool2d(x, s)
    return float(alpha**2 / noise.var()), float(alpha**2 / pooled_noise.var())


def draw_schedules(path):
    """Draw the schedules for 512 px. Figure 5."""
    t = torch.linspace(0, 1, 501)
    figure, axis = pyplot().subplots(figsize=(6.4, 4))
    axis.plot(t, logsnr_cosine(t), label="cosine")
    for noise_d in (256, 128, 64, 32):
        axis.plot(t, logsnr_shifted(t, 512, noise_d), label=f"shifted to {noise_d}")
    axis.plot(t, logsnr_interpolated(t, 512, 32, 256), "k--", label="interpolated 32 → 256")
    axis.set(xlabel="t", ylabel="log SNR", title="Schedules for 512 px (simple diffusion, figure 5)")
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def draw_noised_scene(x, path):
    """Noise a 512 px scene x (1, 3, 512, 512) and show it at 64 px. Above: cosine. Below: shifted to 64. Figure 3."""
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, 9)
    figure, axes = pyplot().subplots(2, len(t), figsize=(1.25 * len(t), 2.9))
    for row, logsnrs in zip(axes, (logsnr_cosine(t), logsnr_shifted(t, 512, 64))):
        for axis, logsnr in zip(row, logsnrs):
            z = F.avg_pool2d(diffuse(x, eps, logsnr), 8)                  # (1, 3, 64, 64)
            show_image(axis, z[0], interpolation="nearest")
    for axis, time in zip(axes[0], t):
        axis.set_title(f"t = {float(time):.1f}", fontsize=9)
    for axis, name in zip(axes[:, 0], ("cosine", "shifted to 64")):
        axis.set_ylabel(name, fontsize=9)
    figure.suptitle("A noised 512 px scene, average-pooled to 64 px (figure 3)", fontsize=10)
    save_figure(figure, path)


def main():
    from data import Glyphs                                               # only the picture needs an image
    x = Glyphs(size=(512, 512)).image(10)[None]                           # (1, 3, 512, 512)
    draw_schedules("figures/schedule_logsnr.png")
    draw_noised_scene(x, "figures/schedule_noise.png")

    print("window   SNR of pixels   SNR of averages   ratio   s^2     (eq. 4, measured on 512 px noise, t = 0.5)")
    for s in (2, 4, 8):
        before, after = snr_before_and_after_pooling(x, logsnr_cosine(0.5), s, torch.Generator().manual_seed(s))
        print(f"{s} x {s}    {before:13.3f}   {after:15.3f}   {after / before:5.2f}   {s * s}")
    print("wrote figures/schedule_logsnr.png (figure 5) and figures/schedule_noise.png (figure 3)")


if __name__ == "__main__":
    main()
