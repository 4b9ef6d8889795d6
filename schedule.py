"""The diffusion process, its noise schedules, and three ways to state a prediction: x, eps and v.

Paper: simple diffusion (Hoogeboom, Heek, Salimans 2023, arXiv 2301.11093), sections 2 and 3.1, appendix A.
Needs: nothing. Next: dwt.py (3.3), then unet.py.

Diffusion destroys an image x gradually. Time t runs from 0 (clean) to 1 (noise). At time t the image is (eq. 1)

    z_t = alpha_t x + sigma_t eps,        alpha_t^2 + sigma_t^2 = 1     ("variance preserving")

Only the ratio of alpha to sigma matters. So one number describes the noise level, the log signal-to-noise ratio:

    logsnr = lambda_t = log(alpha_t^2 / sigma_t^2)

Note: so alpha^2 = sigmoid(lambda) and sigma^2 = sigmoid(-lambda).

Conventions of the whole project:
    images         float32, (B, C, H, W), in [-1, 1]
    x, eps, v, z   (B, C, H, W), all four of the same shape
    t              (B,) or a scalar, in [0, 1]. A scalar is a 0-d tensor; only in this file it may also be a float
    logsnr         (B,), one noise level for each image, or a scalar (0-d tensor or float), one for all. Natural log

# Paper: section 2 defines the SNR twice, as alpha_t / sigma_t and as its square. We use the square.
# Paper: the second argument of N(mean, .) is a variance in eq. 1, a standard deviation in 3.1. Here it is the variance.

`python schedule.py` draws figures 3 and 5 into figures/. It also measures the SNR before and after pooling (eq. 4).
"""
import math

import torch
import torch.nn.functional as F

from plumbing.pages import draw_panels
from plumbing.pictures import pyplot, save_figure


# ------------------------------------------------------------------------------------------ the process (2, eq. 1)

def alpha_sigma(logsnr):
    """Return alpha and sigma of the variance preserving process, each shaped like logsnr. +inf gives 1 and 0.

    Note: in float32 the larger of the two is exactly 1 beyond logsnr = 17 and -17. The smaller one keeps all its
    digits: it is 3.7e-6 at 25 and -25, the widest --logsnr-min and --logsnr-max.
    """
    logsnr = torch.as_tensor(logsnr)
    # Do not write sigma = sqrt(1 - alpha^2): where alpha is exactly 1, sigma would be 0.
    return torch.sqrt(torch.sigmoid(logsnr)), torch.sqrt(torch.sigmoid(-logsnr))


def alpha_sigma_for(image, logsnr):
    """Return alpha and sigma as factors for image (B, C, H, W): (B, 1, 1, 1) for logsnr (B,), scalars for a scalar."""
    logsnr = torch.as_tensor(logsnr, dtype=image.dtype, device=image.device)
    if logsnr.ndim and tuple(logsnr.shape) not in [(1,), (len(image),)]:
        raise ValueError(f"logsnr must be a scalar or ({len(image)},), not {tuple(logsnr.shape)}")
    ones = (1,) * (image.ndim - 1) if logsnr.ndim else ()
    return alpha_sigma(logsnr.reshape(logsnr.shape + ones))               # (B, 1, 1, 1), or a scalar


def diffuse(x, eps, logsnr):
    """Return z_t = alpha_t x + sigma_t eps. Eq. 1. The caller draws eps ~ N(0, 1) and controls its seed."""
    alpha, sigma = alpha_sigma_for(x, logsnr)
    return alpha * x + sigma * eps


# ------------------------------------------------------------------------------------------ the schedules (3.1, A)

def logsnr_cosine(t, logsnr_min=-15.0, logsnr_max=15.0):
    """Return the log-SNR of the cosine schedule alpha_t = cos(pi t / 2), cut off at both ends. Appendix A.

    t: float or tensor in [0, 1], any shape. The result has that shape. It is logsnr_max at t = 0, logsnr_min at t = 1.
    The tangent is steep just before t = 1. There float32 is off by up to 2e-4 (6e-2 for logsnr_min = -25). This does no
    harm: all that use the log-SNR get the same number.
    """
    t = torch.as_tensor(t)
    t_min = math.atan(math.exp(-0.5 * logsnr_max))                        # t_min and t_max are angles, not times
    t_max = math.atan(math.exp(-0.5 * logsnr_min))
    return -2.0 * torch.log(torch.tan(t_min + t * (t_max - t_min)))


def logsnr_shifted(t, image_d, noise_d, logsnr_min=-15.0, logsnr_max=15.0):
    """Return the cosine schedule of resolution noise_d, shifted to resolution image_d. Eq. 5.

    Averaged to side noise_d, the image must follow the cosine schedule. Note: averaging s x s pixels divides the
    variance of the noise by s^2 and hardly changes the image. So the averaged image has s^2 times the SNR of the full
    image (eq. 4). With s = image_d / noise_d, the full image gets the cosine's SNR divided by s^2. In logs the whole
    curve moves by 2 log(noise_d / image_d), BOTH END POINTS INCLUDED: by -1.386 for 128 pixels at noise_d = 64.

    image_d: side of the image, px. noise_d: the reference resolution, px (papers: 64, 32). Larger noise_d: less noise.
    # Paper: it does not say what image_d is if H and W differ. We take sqrt(H W), the side of a square of equal area.
    """
    return logsnr_cosine(t, logsnr_min, logsnr_max) + 2.0 * math.log(noise_d / image_d)


def logsnr_interpolated(t, image_d, noise_d_low, noise_d_high, logsnr_min=-15.0, logsnr_max=15.0):
    """Move from the schedule of noise_d_high at t = 0 to the schedule of noise_d_low at t = 1. Appendix A.

    A larger noise_d means less noise. At t = 0 this schedule uses the larger noise_d, so images stay clean for longer
    and more of the time goes to fine detail. The paper advises it where guidance is used. Its example for 512 px has,
    in our reading, noise_d = 256 at t = 0 and 32 at t = 1. Its name 32 → 256 is in the order of sampling, from t = 1.

    # Paper: eq. 6 weights noise_d_high by t, the code of appendix A noise_d_low. We follow the code, for three reasons.
    # Section 3.1 speaks of "starting at shift 32". From t = 0 to t = 1 the log-SNR falls further than with eq. 6. And
    # it falls everywhere. Note: with eq. 6 it does not, once high / low > e^pi, about 23.
    # Paper: the code gives this function the name of the shifted one.
    """
    t = torch.as_tensor(t)
    low = logsnr_shifted(t, image_d, noise_d_low, logsnr_min, logsnr_max)
    high = logsnr_shifted(t, image_d, noise_d_high, logsnr_min, logsnr_max)
    return t * low + (1.0 - t) * high


# ------------------------------------------------------------ x, eps and v: three ways to state one prediction (2)
# If z is known, each of x, eps and v gives the other two (section 2, "Parametrization"). The reason is a rotation: z
# and v are the coordinates of the point (x, eps) in axes turned by the angle phi, where tan phi = sigma / alpha.
# Note:
#       z =  alpha x + sigma eps            x   = alpha z - sigma v
#       v = -sigma x + alpha eps            eps = sigma z + alpha v
# So v gives x and eps without a division: no error grows, at any t. That is why the networks predict v. To get x from
# eps, we divide by alpha. At logsnr = -15, sigma / alpha = 1800 (alpha = 5.5e-4): an error of eps becomes an error of x
# 1800 times as large. To get eps from x, we divide by sigma.

def v_from_x_eps(x, eps, logsnr):
    """Return v, by its definition (Salimans & Ho 2022). Note: v = alpha eps - sigma x."""
    alpha, sigma = alpha_sigma_for(x, logsnr)
    return alpha * eps - sigma * x


def x_from_v(z, v, logsnr):
    """Return x = alpha z - sigma v. Stable at every t."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return alpha * z - sigma * v


def eps_from_v(z, v, logsnr):
    """Return eps. Note: sigma z + alpha v, stable at every t. Its MSE is alpha^2 = SNR / (1 + SNR) times that of v."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return sigma * z + alpha * v


def eps_from_x(z, x, logsnr):
    """Return eps = (z - alpha x) / sigma. Errors grow like 1 / sigma towards t = 0."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (z - alpha * x) / sigma


def v_from_x(z, x, logsnr):
    """Return v = (alpha z - x) / sigma. Errors grow like 1 / sigma towards t = 0."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (alpha * z - x) / sigma


def x_from_eps(z, eps, logsnr):
    """Return x. Note: (z - sigma eps) / alpha. Errors grow like 1 / alpha towards t = 1: unstable near t = 1."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (z - sigma * eps) / alpha


def v_from_eps(z, eps, logsnr):
    """Return v = (eps - sigma z) / alpha. Errors grow like 1 / alpha towards t = 1."""
    alpha, sigma = alpha_sigma_for(z, logsnr)
    return (eps - sigma * z) / alpha


# ------------------------------------------------------------------------------------------ the pictures of 3.1

def snr_before_and_after_pooling(x, logsnr, window, generator=None):
    """Measure eq. 4: return the SNR of z and the SNR of its averages over window x window pixels, as two floats.

    SNR: alpha^2 / (the measured variance of the noise z - alpha x). The second is about window^2 times the first.
    x: (B, C, H, W). window divides H and W.
    """
    alpha, _ = alpha_sigma(logsnr)
    z = diffuse(x, torch.randn(x.shape, generator=generator), logsnr)
    noise = z - alpha * x
    pooled_noise = F.avg_pool2d(z, window) - alpha * F.avg_pool2d(x, window)
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
    """Noise a 512 px scene x (1, 3, 512, 512) and show it at 64 px: cosine above, shifted to 64 below. Figure 3."""
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, 9)
    rows = [[F.avg_pool2d(diffuse(x, eps, logsnr), 8)[0] for logsnr in logsnrs]                 # (3, 64, 64) each
            for logsnrs in (logsnr_cosine(t), logsnr_shifted(t, 512, 64))]
    draw_panels(path, rows, [f"t = {time:.1f}" for time in t], ["cosine", "shifted to 64"],
                "A noised 512 px scene, average-pooled to 64 px (figure 3)", interpolation="nearest")


def main():
    from data import Glyphs                                               # imported here: only main() needs an image
    x = Glyphs(size=(512, 512)).image(10)[None]                           # (1, 3, 512, 512)
    draw_schedules("figures/schedule_logsnr.png")
    print("wrote figures/schedule_logsnr.png (figure 5)")
    draw_noised_scene(x, "figures/schedule_noise.png")

    print("window   SNR of pixels   SNR of averages   ratio   s^2     (eq. 4, measured on 512 px noise, t = 0.5)")
    for window in (2, 4, 8):
        generator = torch.Generator().manual_seed(window)
        before, after = snr_before_and_after_pooling(x, logsnr_cosine(0.5), window, generator)
        print(f"{window} x {window}    {before:13.3f}   {after:15.3f}   {after / before:5.2f}   {window * window}")
    print("wrote figures/schedule_noise.png (figure 3)")


if __name__ == "__main__":
    main()
