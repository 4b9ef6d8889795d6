"""Laws of schedule.py. Each test names the wrong variant that it kills."""
import math

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import schedule as S

T = torch.linspace(0, 1, 101)
LOGSNR = torch.linspace(-15, 15, 31)


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(31, 3, 8, 6, generator=g) * 2 - 1
    return x, torch.randn(31, 3, 8, 6, generator=g)


# ---- schedules

def test_cosine_is_the_alpha_cosine_and_keeps_its_end_points():
    """Kills: alpha and alpha^2 confused (a factor of 2 in the log), ends not cut."""
    wide = S.logsnr_cosine(T[1:-1], -60, 60)
    alpha, sigma = S.alpha_sigma(wide)
    assert_close(alpha, torch.cos(math.pi / 2 * T[1:-1]), atol=1e-5, rtol=0)
    assert_close(sigma, torch.sin(math.pi / 2 * T[1:-1]), atol=1e-5, rtol=0)
    ends = S.logsnr_cosine(torch.tensor([0.0, 1.0]))
    assert_close(ends, torch.tensor([15.0, -15.0]), atol=1e-3, rtol=0)
    assert_close(S.logsnr_cosine(torch.tensor([0.0, 1.0]), -8, 12), torch.tensor([12.0, -8.0]), atol=1e-3, rtol=0)


def test_schedules_fall():
    """Kills: time reversed."""
    for curve in (S.logsnr_cosine(T), S.logsnr_shifted(T, 128, 64), S.logsnr_interpolated(T, 512, 32, 256)):
        assert (curve[1:] < curve[:-1]).all()


@pytest.mark.parametrize("image_d, noise_d, shift", [(128, 64, -1.3862944), (512, 64, -4.1588831), (64, 128, 1.3862944),
                                                     (64, 64, 0.0)])
def test_shift_moves_everything_ends_included(image_d, noise_d, shift):
    """Kills: the wrong sign, log instead of 2 log, ends left behind."""
    moved = S.logsnr_shifted(T, image_d, noise_d) - S.logsnr_cosine(T)
    assert_close(moved, torch.full_like(T, shift), atol=5e-6, rtol=0)


def test_shift_at_512_has_the_papers_end_points():
    ends = S.logsnr_shifted(torch.tensor([0.0, 1.0]), 512, 64)
    assert_close(ends, torch.tensor([10.84, -19.16]), atol=0.005, rtol=0)


@pytest.mark.parametrize("s", [2, 4, 8])
def test_snr_shift_identity_on_real_noise(s):
    """Eq. 4: averaging s x s multiplies the SNR by s^2; eq. 5: the shift undoes just that. Measured, not derived.

    Kills: SNR multiplied by s; a shift by log s."""
    x = torch.zeros(4, 3, 256, 256)
    t = torch.tensor(0.4)
    shifted = S.logsnr_shifted(t, 256, 256 / s)
    before, after = S.snr_before_and_after_pooling(x, shifted, s, torch.Generator().manual_seed(s))
    assert after / before == pytest.approx(s * s, rel=0.03)
    assert math.log(after) == pytest.approx(float(S.logsnr_cosine(t)), abs=0.03)    # the reference resolution's own SNR


def test_interpolated_follows_appendix_a_at_both_ends():
    """Errata A7.3. Kills: the weights of eq. 6 (low and high exchanged)."""
    curve = S.logsnr_interpolated(T, 512, 32, 256)
    low, high = S.logsnr_shifted(T, 512, 32), S.logsnr_shifted(T, 512, 256)
    assert_close(curve[0], high[0])
    assert_close(curve[-1], low[-1])
    assert_close(curve[50], (low[50] + high[50]) / 2)


def test_weights_of_eq_6_stop_falling_beyond_e_to_the_pi():
    """The claim that the comment makes: at high / low > e^pi the other reading is no schedule any more."""
    def eq_6(ratio):
        low, high = S.logsnr_shifted(T, 512, 32), S.logsnr_shifted(T, 512, 32 * ratio)
        return T * high + (1 - T) * low
    falls = lambda c: bool((c[1:] < c[:-1]).all())
    assert falls(eq_6(math.exp(math.pi) * 0.9)) and not falls(eq_6(math.exp(math.pi) * 1.2))


def test_float32_is_as_exact_as_the_docstring_says():
    """Kills: a bound that was measured at t = 1 alone, or not at all."""
    late = 1 - torch.arange(4096, dtype=torch.float64) * 2.0 ** -24       # the last numbers that float32 knows below 1
    for t, low, least, most in ((late, -15.0, 1e-4, 2.5e-4), (late, -25.0, 3e-2, 7e-2), (T.double(), -15.0, 0, 5e-5)):
        t = t.float()
        error = (S.logsnr_cosine(t, low).double() - S.logsnr_cosine(t.double(), low)).abs().max()
        assert least <= error <= most


# ---- process

def test_variance_is_preserved_and_ends_do_not_round_away():
    """Kills: sigma = sqrt(1 - alpha^2), which is 0 in float32 at logsnr = 20."""
    alpha, sigma = S.alpha_sigma(torch.linspace(-25, 25, 51))
    assert_close(alpha ** 2 + sigma ** 2, torch.ones(51))
    assert (alpha > 0).all() and (sigma > 0).all()
    assert_close(2 * (alpha.log() - sigma.log()), torch.linspace(-25, 25, 51), atol=1e-5, rtol=1e-5)
    for logsnr in (17.0, 25.0):
        alpha, sigma = S.alpha_sigma(torch.tensor([logsnr, -logsnr]))
        assert alpha[0] == 1 == sigma[1] and alpha[1] == sigma[0]
    assert float(alpha[1]) == pytest.approx(3.7e-6, rel=0.01)
    assert [float(a) for a in S.alpha_sigma(torch.tensor(math.inf))] == [1, 0]


def test_logsnr_broadcasts_by_example_and_refuses_other_shapes(images):
    """Kills: (B,) multiplied along the width."""
    x, eps = images
    z = S.diffuse(x, eps, LOGSNR)
    for i in (0, 15, 30):
        assert_close(z[i:i + 1], S.diffuse(x[i:i + 1], eps[i:i + 1], LOGSNR[i]))
    with pytest.raises(ValueError, match=r"\(31,\)"):
        S.diffuse(x, eps, torch.zeros(6))


# ---- conversions

def test_every_pair_of_conversions_round_trips(images):
    """Float32, logsnr -15 to 15. What is divided by alpha (or sigma) may be off by float's epsilon over alpha (sigma).

    Kills: alpha and sigma exchanged; a sign."""
    x, eps = images
    z = S.diffuse(x, eps, LOGSNR)
    v = S.v_from_x_eps(x, eps, LOGSNR)
    alpha, sigma = (a[:, None, None, None] for a in S.alpha_sigma(LOGSNR))
    stable = torch.full_like(alpha, 2e-6)
    for got, want, bound in [
            (S.x_from_v(z, v, LOGSNR), x, stable), (S.eps_from_v(z, v, LOGSNR), eps, stable),
            (S.v_from_eps(z, eps, LOGSNR), v, 2e-6 / alpha), (S.x_from_eps(z, eps, LOGSNR), x, 2e-6 / alpha),
            (S.v_from_x(z, x, LOGSNR), v, 2e-6 / sigma), (S.eps_from_x(z, x, LOGSNR), eps, 2e-6 / sigma)]:
        assert torch.isfinite(got).all()
        assert ((got - want).abs() <= bound).all()


def test_v_round_trips_through_x_and_eps_of_the_same_v(images):
    x, eps = images
    z = S.diffuse(x, eps, LOGSNR)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))              # any v, not the true one
    assert_close(S.v_from_x_eps(S.x_from_v(z, v, LOGSNR), S.eps_from_v(z, v, LOGSNR), LOGSNR), v, atol=2e-6, rtol=1e-5)


def test_eps_mse_is_snr_over_one_plus_snr_times_v_mse(images):
    """Trap 3. Kills: v-MSE under the name of eps-loss, min-SNR weighting."""
    x, eps = images
    z, v = S.diffuse(x, eps, LOGSNR), S.v_from_x_eps(x, eps, LOGSNR)
    v_hat = v + 0.3 * torch.randn(v.shape, generator=torch.Generator().manual_seed(2))
    eps_mse = (S.eps_from_v(z, v_hat, LOGSNR) - S.eps_from_v(z, v, LOGSNR)).square().mean((1, 2, 3))
    v_mse = (v_hat - v).square().mean((1, 2, 3))
    snr = LOGSNR.exp()
    assert_close(eps_mse, snr / (1 + snr) * v_mse, rtol=1e-3, atol=1e-9)


# ---- the page

def test_the_page_prints_the_ratio_s_squared(tmp_path, monkeypatch, capsys):
    """`python schedule.py`. Kills: a page that draws nothing, or that prints SNRs of another ratio than eq. 4's."""
    monkeypatch.chdir(tmp_path)
    S.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[1:4] == " x "]
    assert [row[0] for row in rows] == ["2", "4", "8"]
    for s, _, _, before, after, ratio, square in rows:
        assert int(square) == int(s) ** 2
        assert float(before) == pytest.approx(1, rel=0.03)                # cosine at t = 0.5: logsnr 0
        assert float(ratio) == pytest.approx(int(square), rel=0.03)
        assert float(after) / float(before) == pytest.approx(float(ratio), rel=0.01)
    for name in ("schedule_logsnr.png", "schedule_noise.png"):
        with Image.open(tmp_path / "figures" / name) as picture:
            assert min(picture.size) > 200
