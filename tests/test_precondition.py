"""Laws of precondition.py."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import precondition as P
from config import PRESETS, build_model, make_schedules
from data import Glyphs
from dwt import bands
from nested_unet import NestedUNet, glyphs64_nested, grow, pyramid
from plumbing import UserError
from plumbing.motion import in_motion
from plumbing.settings import check_bands
from programs import page
from sample import sample
from schedule import alpha_sigma, diffuse, eps_from_v, logsnr_cosine, v_from_x_eps, x_from_v
from train import band_loss, training_loss
from video import to_frames, to_videos

LOGSNR = torch.tensor([-15.0, -4.0, 0.0, 3.0, 15.0])
RMS = {0: [0.6], 1: [0.6, 0.08, 0.09, 0.04], 2: [0.6, 0.15, 0.16, 0.1, 0.08, 0.09, 0.04]}


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("levels", RMS)
def test_a_network_that_says_nothing_gives_wieners_estimate(levels):
    """Kills: c of another sign or without sigma; s and n exchanged; a band that gets another band's numbers."""
    s, n = RMS[levels], P.noise_rms(levels)
    z = randn(5, 3, 16, 24)
    x_hat = x_from_v(z, P.v_from_f(torch.zeros_like(z), z, LOGSNR.double(), s, n), LOGSNR.double())
    alpha, sigma = (a[:, None, None, None] for a in alpha_sigma(LOGSNR.double()))
    for x_band, z_band, s_band, n_band in zip(bands(x_hat, levels), bands(z, levels), s, n):
        want = alpha * s_band ** 2 * z_band / (alpha ** 2 * s_band ** 2 + sigma ** 2 * n_band ** 2)
        assert_close(x_band, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("levels", RMS)
def test_for_images_like_white_noise_it_is_v_prediction(levels):
    """s = n: c = 0 and d = n at every log-SNR, so v is F in the unit of the band."""
    n = P.noise_rms(levels)
    z, f = randn(5, 3, 16, 16), randn(5, 3, 16, 16, seed=1)
    v = P.v_from_f(f, z, LOGSNR, n, n)
    for v_band, f_band, n_band in zip(bands(v, levels), bands(f, levels), n):
        assert_close(v_band, n_band * f_band, atol=1e-6, rtol=1e-6)
    if levels == 0:
        assert_close(v, f, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("logsnr", [-6.0, -2.0, 0.0, 2.0, 6.0])
def test_what_is_left_of_v_has_the_unit_d_and_no_share_of_z(logsnr):
    """Measured on scenes and noise. Kills: a wrong d; a c that leaves a share of z."""
    x = torch.stack([Glyphs((32, 32)).image(i) for i in range(72)]).double()
    eps, logsnr = randn(*x.shape), torch.tensor(logsnr, dtype=torch.float64)
    z, v = diffuse(x, eps, logsnr), v_from_x_eps(x, eps, logsnr)
    for z_band, v_band, s, n in zip(bands(z, 1), bands(v, 1), P.band_rms(x, 1), P.noise_rms(1)):
        c, d = P.coefficients(*alpha_sigma(logsnr), s, n)
        rest = v_band - c * z_band
        assert rest.square().mean().sqrt().item() == pytest.approx(d.item(), rel=0.03)
        share = (rest * z_band).mean() / (d * z_band.square().mean().sqrt())
        assert abs(share) < 0.03


def test_band_rms_is_that_of_the_images():
    """White noise has the numbers of noise_rms; a constant has one in LL only."""
    noise = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for levels in RMS:
        assert P.band_rms(noise, levels) == pytest.approx(P.noise_rms(levels), rel=0.04)
    assert P.band_rms(torch.full((1, 3, 8, 8), 0.5), 1) == pytest.approx([0.5, 0, 0, 0], abs=1e-6)


def cosines(T):
    """The cosine transform as a matrix: row k is frequency k."""
    k, i = np.arange(T)[:, None], np.arange(T)
    return torch.tensor(np.cos(np.pi * (i + 0.5) * k / T) * np.sqrt(np.where(k, 2, 1) / T))


@pytest.mark.parametrize("T", [1, 3, 8])
def test_over_time_is_the_orthonormal_cosine_transform(T):
    """Kills: another order of frames or colours; the first row without its root; a transform that is not undone."""
    x, image = randn(2, 3 * T, 4, 6), randn(2, 3, 4, 6)
    wanted = torch.einsum("ki,bichw->bkchw", cosines(T), x.unflatten(1, (T, 3))).flatten(1, 2)
    assert_close(P.over_time(x), wanted)
    assert_close(P.over_time(P.over_time(x), back=True), x)
    still = P.over_time(image.repeat(1, T, 1, 1)).unflatten(1, (T, 3))    # frames that are alike: the first frequency
    assert_close(still[:, 0], math.sqrt(T) * image)
    assert still[:, 1:].abs().amax() < 1e-12 if T > 1 else torch.equal(P.over_time(x), x)


@pytest.mark.parametrize("levels", [0, 1])
def test_of_a_video_a_network_that_says_nothing_gives_wieners_estimate_over_the_frames(levels):
    """With the covariance C of the frames as a matrix: x_hat = alpha C (alpha^2 C + sigma^2 n^2)^-1 z. Kills: s of
    another frequency or band; frames that are preconditioned one by one; an inverse that is not the inverse."""
    T, n = 4, P.noise_rms(levels)
    s = randn(len(n), T, seed=3).abs() + 0.05
    z, logsnr = randn(5, 3 * T, 8, 8), LOGSNR.double()
    x_hat = x_from_v(z, P.v_from_f(torch.zeros_like(z), z, logsnr, s.flatten().tolist(), n), logsnr)
    for x_band, z_band, s_band, n_band in zip(bands(x_hat, levels), bands(z, levels), s, n):
        C, each = cosines(T).T @ torch.diag(s_band ** 2) @ cosines(T), lambda a: a.unflatten(1, (T, 3)).flatten(2)
        for b, (alpha, sigma) in enumerate(zip(*alpha_sigma(logsnr))):
            gain = alpha * C @ torch.linalg.inv(alpha ** 2 * C + sigma ** 2 * n_band ** 2 * torch.eye(T))
            assert_close(each(x_band)[b], gain @ each(z_band)[b], atol=1e-7, rtol=1e-7)


def test_a_network_that_says_nothing_draws_frames_with_the_right_covariance():
    """For Gaussian data there is no better guess than the linear one. Kills: a step that mixes frames; frequencies over
    time that trade their numbers on the way back."""
    s, C = [1.2, 0.5, 0.3, 0.1], cosines(4)                               # of the four frequencies, slow first
    model = P.Preconditioned(Fixed(torch.zeros(8, 12, 16, 16)), [s], [4])
    for sampler in ("ddim", "ddpm"):
        x = sample(model, logsnr_cosine, {}, (12, 16, 16), range(8), steps=128, sampler=sampler, noise_param=0.5,
                   clip="none").unflatten(1, (4, 3)).flatten(2).double()
        want = C.T @ torch.diag(torch.tensor(s, dtype=torch.float64) ** 2) @ C
        assert_close(torch.einsum("bsn,btn->st", x, x) / x[:, 0].numel(), want, atol=0.03, rtol=0)


def test_of_moving_scenes_each_frequency_has_its_unit():
    """Measured. Kills: frequencies that are no bands of their own; white noise that is louder in one of them."""
    scenes = in_motion(Glyphs((32, 32)), 8)
    x = torch.stack([scenes.image(i) for i in range(48)]).double()
    s, eps = P.band_rms(x, 1), randn(*x.shape)
    assert len(s) == 32 and all(s[i] > 4 * s[i + 7] for i in (0, 8, 16)) and s[:8] == sorted(s[:8])[::-1]
    for logsnr in torch.tensor([-4.0, 0, 4], dtype=torch.float64):
        z, v = diffuse(x, eps, logsnr), v_from_x_eps(x, eps, logsnr)
        for i, (z_band, v_band) in enumerate(zip(P.split(z, 1), P.split(v, 1))):
            c, d = P.coefficients(*alpha_sigma(logsnr), s[i], P.noise_rms(1)[i // 8])
            rest = v_band - c * z_band
            assert rest.square().mean().sqrt().item() == pytest.approx(d.item(), rel=0.05)
            assert abs((rest * z_band).mean() / (d * z_band.square().mean().sqrt())) < 0.05


def test_a_level_of_frames_wants_numbers_for_its_frequencies():
    config = replace(PRESETS["glyphs32_video"], band_rms=",".join(["0.5"] * 32) + "/0.5,0.5,0.5,0.5")
    check_bands(config)
    assert [level.noise for level in (build_model(config), build_model(config).inner)] == [
        [P.noise_rms(1)] * 2, [P.noise_rms(1)]]
    with pytest.raises(UserError, match="band-rms"):
        check_bands(replace(config, band_rms="0.5,0.5,0.5,0.5/0.5,0.5,0.5,0.5"))


class Fixed(nn.Module):
    """A network that predicts one F, whatever its input."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, z, logsnr, cond):
        return self.f


def test_the_model_predicts_v():
    """The three errors relate as they do for v: x by sigma^2, eps by alpha^2. Kills: a wrapper that gives F or x."""
    x, eps, f = (randn(5, 3, 16, 16, seed=i) for i in range(3))
    logsnr = LOGSNR.double()
    z, v = diffuse(x, eps, logsnr), v_from_x_eps(x, eps, logsnr)
    alpha, sigma = alpha_sigma(logsnr)
    perfect = torch.cat([(v_b - c * z_b) / d for v_b, z_b, (c, d) in zip(
        bands(v, 1), bands(z, 1),
        [P.coefficients(alpha[:, None, None, None], sigma[:, None, None, None], s, n)
         for s, n in zip(RMS[1], P.noise_rms(1))])], 1)
    assert_close(P.Preconditioned(Fixed(P.idwt(perfect, 1)), [RMS[1]], [1])(z, logsnr, {}), v, atol=1e-8, rtol=1e-8)
    v_hat = P.Preconditioned(Fixed(f), [RMS[1]], [1])(z, logsnr, {})
    error = lambda a, b: (a - b).square().flatten(1).mean(1)
    assert_close(error(x_from_v(z, v_hat, logsnr), x), sigma ** 2 * error(v_hat, v), atol=1e-12, rtol=1e-6)
    assert_close(error(eps_from_v(z, v_hat, logsnr), eps), alpha ** 2 * error(v_hat, v), atol=1e-12, rtol=1e-6)


@pytest.mark.parametrize("levels", RMS)
def test_the_balanced_error_lies_between_v_and_f(levels):
    """To balance the error of v twice gives the error of F. Kills: an error multiplied by d; a unit of another band."""
    s, n = RMS[levels], P.noise_rms(levels)
    z, f, f_hat = (randn(5, 3, 16, 24, seed=i) for i in range(3))
    logsnr = torch.tensor([-8.0, -4, 0, 3, 8], dtype=torch.float64)
    v, v_hat = (P.v_from_f(y, z, logsnr, s, n) for y in (f, f_hat))
    twice = P.balance(P.balance(v_hat - v, logsnr, s), logsnr, s)
    assert_close(twice, f_hat - f, atol=1e-8, rtol=1e-8)


def test_the_error_of_a_video_is_balanced_as_that_of_its_frames():
    """Kills: d of each frequency over time, with which the loss asks less of the mean of the frames."""
    scenes = in_motion(Glyphs((32, 32)), 4)
    x, error, logsnr = torch.stack([scenes.image(i) for i in range(5)]), randn(5, 12, 32, 32).float(), LOGSNR
    of_frames = P.balance(to_frames(error, 4), logsnr.repeat_interleave(4), P.band_rms(to_frames(x, 4), 1))
    assert_close(P.balance(error, logsnr, P.band_rms(x, 1)), to_videos(of_frames, 4))


@pytest.mark.parametrize("logsnr", [-12.0, -3.0, 0.0, 5.0, 12.0])
def test_the_balanced_loss_is_the_geometric_mean_of_the_errors_of_x_and_eps(logsnr):
    """For an image like white noise, where all bands weigh the same. Kills: the weight squared, or of one end only."""
    x, eps, v = (randn(1, 3, 8, 8, seed=i) for i in range(3))
    logsnr = torch.tensor([logsnr], dtype=x.dtype)
    z = diffuse(x, eps, logsnr)
    errors = x_from_v(z, v, logsnr) - x, eps_from_v(z, v, logsnr) - eps
    want = 2 * torch.stack([error.square().mean() for error in errors]).prod().sqrt()
    assert_close(band_loss(v, z, x, eps, logsnr, {(3, 8, 8): (1.0,)}), want)


def test_the_balanced_loss_measures_each_level_by_its_own_bands():
    """Kills: the unit of v; the bands of another level; one level alone."""
    config = replace(PRESETS["glyphs64_nested"], band_rms="0.6,0.08,0.09,0.04/0.5")
    noises = [randn(2, 3, *size, seed=i).float() for i, size in enumerate(config.sizes)]
    x, t = randn(2, 3, 64, 64, seed=5).float(), torch.tensor([0.3, 0.6])
    errors = [randn(2, 3, *size, seed=7).float() for size in config.sizes]

    def model(z, logsnr, cond):
        right = [v_from_x_eps(*level) for level in zip(pyramid(x, config.sizes), noises, logsnr)]
        return [v + error for v, error in zip(right, errors)]

    want = 0.0
    for error, schedule, s in zip(errors, make_schedules(config), config.rms):
        each = P.balance(error, schedule(t), s).square().mean((1, 2, 3))
        want += (each / torch.cosh(schedule(t) / 2)).mean().item()        # 2 alpha sigma = 1 / cosh(logsnr / 2)
    assert training_loss(config, model, x, {}, t, noises).item() == pytest.approx(want, rel=1e-3)


def test_each_level_of_a_nested_network_has_its_own_bands():
    z, f = ([randn(2, 3, 64, 64, seed=i), randn(2, 3, 16, 16, seed=i)] for i in (0, 1))
    logsnr = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]
    v = P.Preconditioned(Fixed(f), [RMS[1], RMS[0]], [1, 1])(z, logsnr, {})
    for level in (0, 1):
        alone = P.Preconditioned(Fixed(f[level]), [(RMS[1], RMS[0])[level]], [1])(z[level], logsnr[level], {})
        assert_close(v[level], alone, atol=0, rtol=0)


def test_a_grown_model_says_at_its_inner_level_what_the_trained_one_says():
    torch.manual_seed(0)
    whole = P.Preconditioned(glyphs64_nested(), [RMS[1], RMS[0]], [1, 1]).eval()
    torch.manual_seed(1)
    trained = P.Preconditioned(glyphs64_nested().inner, [RMS[0]], [1]).eval()
    assert isinstance(whole.network, NestedUNet)
    grow(whole, trained.state_dict())
    z, logsnr = [torch.randn(2, 3, 64, 64), torch.randn(2, 3, 16, 16)], [torch.zeros(2), torch.ones(2)]
    with torch.no_grad():
        inner = whole(z, logsnr, {})[1]
        for v in (inner, whole.inner(z[1], logsnr[1], {})):
            assert_close(v, trained(z[1], logsnr[1], {}), atol=0, rtol=0)


def test_a_model_is_built_where_no_gradient_is_kept():
    """In a notebook. Kills: n by autograd."""
    with torch.inference_mode():
        assert P.Preconditioned(Fixed(torch.zeros(1, 3, 8, 8)), [RMS[1]], [1]).noise[0] == P.noise_rms(1)


@pytest.mark.parametrize("logsnr", [-torch.inf, torch.inf])
def test_the_ends_are_finite(logsnr):
    c, d = P.coefficients(*alpha_sigma(torch.tensor(logsnr)), 0.1, 1.5)
    assert c.item() == 0 and d.item() == pytest.approx(1.5 if logsnr > 0 else 0.1)


def test_the_page_shows_what_the_file_says(capsys, tmp_path, monkeypatch):
    """The detail bands: little of the image, much of the noise."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "figures").mkdir()
    rows = [line.split()[-4:] for line in page("precondition.py", capsys).splitlines()[1:3]]
    image, noise = ([float(number) for number in row] for row in rows)
    assert noise == pytest.approx([0.719, 1.038, 1.038, 1.5], abs=2e-3)
    assert max(image[1:]) < 0.2 * image[0] and (tmp_path / "figures" / "precondition.png").exists()
