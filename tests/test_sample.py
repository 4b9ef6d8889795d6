"""Laws of sample.py. The Gaussian oracle: for x ~ N(0, s^2) the best denoiser is known in closed form."""
import math

import pytest
import torch
from torch.testing import assert_close

import sample as P
import schedule as S


class Oracle(torch.nn.Module):
    """E[x | z] for x ~ N(0, s^2 I), as v. Remembers the log-SNR of each call."""

    def __init__(self, s):
        super().__init__()
        self.s, self.logsnrs = s, []

    def forward(self, z, logsnr, cond):
        self.logsnrs.append(float(logsnr))
        alpha, sigma = S.alpha_sigma(logsnr)
        x = alpha * self.s ** 2 / (alpha ** 2 * self.s ** 2 + sigma ** 2) * z
        return S.v_from_x(z, x, logsnr)


def run(s, steps, sampler, nu=0.2, lowest_idx=1):
    oracle = Oracle(s)
    x = P.sample(oracle, S.logsnr_cosine, {}, (1, 64, 64), range(8), steps=steps, sampler=sampler, noise_param=nu,
                 clip="none", lowest_idx=lowest_idx)
    return oracle, x.double().var().item()


def expected_variance(s, steps, sampler, nu):
    """The same chain in scalars, from eq. 2 and 3 as printed in section 2 (not from the code under test)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    lam = S.logsnr_cosine(t).tolist()
    a = [math.sqrt(1 / (1 + math.exp(-l))) for l in lam]
    g = [math.sqrt(1 / (1 + math.exp(l))) for l in lam]
    shrink = [a[i] * s * s / (a[i] ** 2 * s * s + g[i] ** 2) for i in range(steps + 1)]         # E[x|z] = shrink z
    variance = 1.0
    for i in range(steps, 1, -1):
        a_ts = a[i] / a[i - 1]
        var_ts = g[i] ** 2 - a_ts ** 2 * g[i - 1] ** 2
        if sampler == "ddpm":
            gain = a_ts * g[i - 1] ** 2 / g[i] ** 2 + a[i - 1] * var_ts / g[i] ** 2 * shrink[i]
            added = (var_ts ** nu) * (var_ts * g[i - 1] ** 2 / g[i] ** 2) ** (1 - nu)
        else:
            gain = a[i - 1] * shrink[i] + g[i - 1] * (1 - a[i] * shrink[i]) / g[i]
            added = 0.0
        variance = gain ** 2 * variance + added
    return shrink[1] ** 2 * variance


@pytest.mark.parametrize("sampler, nu", [("ddpm", 0.0), ("ddpm", 0.2), ("ddpm", 1.0), ("ddim", 0.2)])
@pytest.mark.parametrize("steps", [4, 16, 64])
def test_gaussian_oracle_variance_is_the_chains(sampler, nu, steps):
    """Trap 5. Kills: noise added twice or at the last step, a step too many, t - 1 instead of the next respaced t."""
    for s in (0.3, 1.0):
        _, variance = run(s, steps, sampler, nu)
        assert variance == pytest.approx(expected_variance(s, steps, sampler, nu), rel=0.03)


@pytest.mark.parametrize("sampler, nu", [("ddpm", 0.2), ("ddpm", 1.0), ("ddim", 0.2)])
@pytest.mark.parametrize("s", [0.3, 1.0])
def test_gaussian_oracle_recovers_the_data(sampler, nu, s):
    """With many steps the samples have the data's variance."""
    assert run(s, 400, sampler, nu)[1] == pytest.approx(s * s, rel=0.04)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_n_steps_cost_n_calls_at_the_right_times(sampler):
    """Trap 5. Kills: one call too many or too few; a wrong log-SNR in the last call."""
    oracle, _ = run(1.0, 5, sampler)
    assert oracle.logsnrs == pytest.approx(S.logsnr_cosine(torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2])).tolist())
    oracle, _ = run(1.0, 5, sampler, lowest_idx=0)
    assert oracle.logsnrs == pytest.approx(S.logsnr_cosine(torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])).tolist())


def test_ddpm_variance_bounds_and_the_geometric_middle():
    """Trap 4, errata A7.2. Kills: variance fixed at the lower bound, interpolated linearly, or the printed formula."""
    lt, ls = torch.tensor(-1.0), torch.tensor(0.5)
    z, x_hat = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    spread = lambda nu: float((P.ddpm_step(z, x_hat, lt, ls, nu, torch.ones(1, 1, 2, 2)) ** 2).mean())
    (a_t, g_t), (a_s, g_s) = S.alpha_sigma(lt), S.alpha_sigma(ls)
    upper = float(g_t ** 2 - (a_t / a_s) ** 2 * g_s ** 2)                 # sigma^2_{t|s}, eq. 2
    lower = upper * float(g_s ** 2 / g_t ** 2)                            # sigma^2_{t->s}, eq. 3
    assert spread(1.0) == pytest.approx(upper, rel=1e-5)
    assert spread(0.0) == pytest.approx(lower, rel=1e-5)
    assert spread(0.5) == pytest.approx(math.sqrt(upper * lower), rel=1e-5)
    assert spread(0.2) == pytest.approx(upper ** 0.2 * lower ** 0.8, rel=1e-5)


def test_ddpm_mean_is_the_posteriors():
    """Eq. 3 as printed. Kills: alpha_s and alpha_t exchanged."""
    g = torch.Generator().manual_seed(0)
    z, x = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, 4, 4, generator=g)
    lt, ls = torch.tensor([-3.0, 1.0]), torch.tensor([-2.0, 4.0])
    (a_t, g_t), (a_s, g_s) = ((p[:, None, None, None] for p in S.alpha_sigma(l)) for l in (lt, ls))
    a_ts = a_t / a_s
    var_ts = g_t ** 2 - a_ts ** 2 * g_s ** 2
    mean = a_ts * g_s ** 2 / g_t ** 2 * z + a_s * var_ts / g_t ** 2 * x
    assert_close(P.ddpm_step(z, x, lt, ls, noise=torch.zeros_like(z)), mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("step", [P.ddpm_step, P.ddim_step, P.renoise_step])
def test_a_step_keeps_float64_also_for_log_snrs_that_are_python_floats(step):
    """Kills: a float that is rounded to float32 before the images' precision is known."""
    g = torch.Generator().manual_seed(0)
    z, x, noise = torch.randn(3, 2, 3, 4, 4, generator=g, dtype=torch.float64)
    logsnrs = (-3.1, 0.7, -0.9) if step is P.renoise_step else (-3.1, 0.7)
    options = {} if step is P.ddim_step else dict(noise=noise)
    exact = step(z, x, *(torch.tensor(l, dtype=torch.float64) for l in logsnrs), **options)
    got = step(z, x, *logsnrs, **options)
    assert got.dtype == torch.float64 and torch.equal(got, exact)


def test_ddim_keeps_x_and_eps():
    """Kills: a step that re-noises; the log-SNR of the wrong side."""
    g = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 3, 4, 4, generator=g), torch.randn(2, 3, 4, 4, generator=g)
    z = S.diffuse(x, eps, torch.tensor(-1.0))
    assert_close(P.ddim_step(z, x, torch.tensor(-1.0), torch.tensor(2.0)), S.diffuse(x, eps, torch.tensor(2.0)))


def test_clipping():
    x = torch.linspace(-3, 3, 601).reshape(1, 1, 1, 601)
    assert_close(P.clip_static(x), x.clamp(-1, 1))
    both = torch.cat([x, x / 6])                                          # the second stays inside [-1, 1]: untouched
    out = P.clip_dynamic(both)
    s = torch.quantile(x.abs(), 0.995)
    assert_close(out[0], (x[0] / s).clamp(-1, 1))
    assert torch.equal(out[1], both[1])


def test_guidance_one_is_off_to_the_bit_and_costs_one_call():
    """Trap 17. Kills: u + w (c - u), which rounds; a second call at w = 1."""
    torch.manual_seed(0)
    c, u = torch.randn(1000), torch.randn(1000)
    assert torch.equal(P.guide(c, u, 1.0), c)
    assert_close(P.guide(c, u, 4.0), (1 + 3.0) * c - 3.0 * u)             # eq. 7 with eta = w - 1

    class Conditional(Oracle):
        def forward(self, z, logsnr, cond):
            return super().forward(z, logsnr, cond) + (0.1 if "label" in cond else 0.0)

    def calls(w):
        model = Conditional(1.0)
        x = P.sample(model, S.logsnr_cosine, {"label": torch.zeros(1, dtype=torch.long)}, (1, 4, 4), [0], 6, guidance=w,
                     clip="none")
        return len(model.logsnrs), x
    assert calls(1.0)[0] == 6 and calls(2.0)[0] == 12
    assert not torch.equal(calls(1.0)[1], calls(2.0)[1])


def test_an_image_depends_on_its_own_seed_alone():
    """Kills: noise drawn for the batch, so that --n 4 and --n 8 show other images."""
    def images(seeds):
        return P.sample(Oracle(0.5), S.logsnr_cosine, {}, (1, 8, 8), seeds, 5, clip="none")
    assert_close(images([7, 8, 9])[1:2], images([8]))
    assert not torch.equal(images([7]), images([8]))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_truncated_sampling_is_the_whole_one_stopped(sampler):
    """To the bit. Kills: a step too many or too few before the stop, a last prediction, steps of another length."""
    whole, options = [], dict(steps=8, sampler=sampler, clip="none")
    common = (S.logsnr_cosine, {}, (1, 8, 8), [3, 4])
    P.sample(Oracle(0.5), *common, on_step=lambda k, z, x_hat: whole.append(z), **options)
    for stop, calls in ((0.75, 2), (0.5, 4), (0.25, 6)):
        oracle = Oracle(0.5)
        z_stop = P.sample_truncated(oracle, *common, stop, **options)
        assert torch.equal(z_stop, whole[calls - 1]) and len(oracle.logsnrs) == calls
    oracle = Oracle(0.5)
    P.sample_truncated(oracle, *common, 0.9, steps=3)
    assert len(oracle.logsnrs) == 1                                       # at least one step


def test_seeds_of_images():
    """Kills: sets of neighbouring seeds that share images; a second part of a set that begins again at image 0."""
    assert P.image_seeds(3, 4) == [3_000_009, 3_000_010, 3_000_011, 3_000_012]
    assert P.image_seeds(3, 2, 2) == P.image_seeds(3, 4)[2:]
    assert not set(P.image_seeds(0, 50_000)) & set(P.image_seeds(1, 50_000))
    assert P.image_seeds(4293, 1, 999_999)[0] < 2 ** 32                   # all that the generator reads
    moved = 2_021_759_595                                                 # times 1_000_003: 1, modulo 2^32
    large = P.image_seeds(moved, 100)
    assert not {seed % 2 ** 32 for seed in large} & set(P.image_seeds(0, 1000))
    assert large[50:] == P.image_seeds(moved, 50, 50) and len(set(large)) == 100


def test_an_unknown_sampler_is_refused():
    with pytest.raises(ValueError, match="want ddpm, ddim or stochastic"):
        P.sample(Oracle(1.0), S.logsnr_cosine, {}, (1, 4, 4), [0], 2, sampler="euler")
