"""Laws of distill.py: the targets, the weights, the times, the students.

Each test names the wrong variant that it kills. The rounds as run folders and the command line are tested in
plumbing/test_distill_programs.py.
"""
import copy
import math

import pytest
import torch
from torch.testing import assert_close

import config as C
import distill as D
import sample as P
import schedule as S
from plumbing import runs, training
from plumbing.rounds import WEIGHTS
from plumbing.settings import override
from plumbing.sources import open_run
from programs import ROOT, log_column, run_here, stirred

SCHEDULES = [lambda t: S.logsnr_shifted(t, 64, 32), lambda t: S.logsnr_cosine(t)]               # of the two levels


def any_teacher(seed):
    """Return a teacher of two levels that is no denoiser at all. The laws hold whatever a teacher predicts."""
    g = torch.Generator().manual_seed(seed)
    mix = [torch.randn(3, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    return lambda z, logsnr: [torch.tanh(torch.einsum("cd,bdhw->bchw", m, a)) + 0.1 * l[:, None, None, None]
                              for m, a, l in zip(mix, z, logsnr)]


def noises(B, seed=0):
    """Draw noise of two levels, 8 x 8 and 4 x 4, in float64."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, 3, s, s, generator=g, dtype=torch.float64) for s in (8, 4)]


# ---- targets

@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_that_hits_the_target_lands_where_two_teacher_steps_land(steps):
    """One DDIM step of the student = two of the teacher, for every t in {1/N, ..., 1} and on every level.

    Kills: a midpoint at the wrong time; sigma for alpha; a wrong special case for the last step."""
    t = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    teacher, z = any_teacher(1), noises(steps)
    target = D.two_step_target(teacher, SCHEDULES, z, t, steps)
    walk = z                                                              # the teacher, by the sampler's own steps
    for here, there in ((t, t - 0.5 / steps), (t - 0.5 / steps, t - 1 / steps)):
        a, b = ([schedule(time.clamp(min=0)) for schedule in SCHEDULES] for time in (here, there))
        x_hat = [S.x_from_v(*level) for level in zip(walk, teacher(walk, a), a)]
        walk = [P.ddim_step(*level) for level in zip(walk, x_hat, a, b)]
    for r, schedule in enumerate(SCHEDULES):
        start, end = schedule(t), schedule((t - 1 / steps).clamp(min=0))
        landed = P.ddim_step(z[r], S.x_from_v(z[r], target[r], start), start, end)
        assert_close(landed, walk[r], atol=1e-9, rtol=1e-9)


def test_the_target_of_the_last_step_is_the_teachers_x_at_the_midpoint():
    """Salimans & Ho end at sigma = 0, where this is exact. Ours is about 1e-3 there, so it holds nearly.

    Kills: the teacher's x at the start of the step."""
    t, z, teacher = torch.tensor([0.25], dtype=torch.float64), noises(1), any_teacher(2)
    x = S.x_from_v(z[0], D.two_step_target(teacher, SCHEDULES, z, t, 4)[0], SCHEDULES[0](t))
    half = [schedule(t / 2) for schedule in SCHEDULES]
    start = [schedule(t) for schedule in SCHEDULES]
    x_hat = [S.x_from_v(*level) for level in zip(z, teacher(z, start), start)]
    z_half = [P.ddim_step(*level) for level in zip(z, x_hat, start, half)]
    assert_close(x, S.x_from_v(z_half[0], teacher(z_half, half)[0], half[0]), atol=2e-2, rtol=0)


def test_with_the_best_denoiser_of_a_gaussian_the_target_is_closed_form():
    """x ~ N(0, c^2): the best x_hat is k z with k = alpha c^2 / (alpha^2 c^2 + sigma^2). So DDIM multiplies z by
    alpha_s k + sigma_s (1 - alpha k) / sigma, and the target is linear in z too.

    Kills: an error that step_target and ddim_step share."""
    c, schedule = 0.5, SCHEDULES[0]
    k = lambda l: (lambda a, s: a * c ** 2 / (a ** 2 * c ** 2 + s ** 2))(*S.alpha_sigma(l))
    oracle = lambda z, logsnr: [S.v_from_x(z[0], k(logsnr[0])[:, None, None, None] * z[0], logsnr[0])]
    for steps in (1, 4):
        t = (torch.arange(steps, dtype=torch.float64) + 1) / steps
        z = [torch.ones(steps, 1, 1, 1, dtype=torch.float64)]
        x = S.x_from_v(z[0], D.two_step_target(oracle, [schedule], z, t, steps)[0], schedule(t))

        def factor(here, there):
            (a, s), (a2, s2) = S.alpha_sigma(schedule(here)), S.alpha_sigma(schedule(there))
            return a2 * k(schedule(here)) + s2 * (1 - a * k(schedule(here))) / s
        half, end = t - 0.5 / steps, (t - 1 / steps).clamp(min=0)
        landed = factor(t, half) * factor(half, end)
        (a, s), (a2, s2) = S.alpha_sigma(schedule(t)), S.alpha_sigma(schedule(end))
        assert_close(x.flatten(), (landed - s2 / s) / (a2 - s2 / s * a))


def test_guided_target_is_eq_7_in_our_convention():
    """Meng et al.: (1 + w') x_c - w' x_0 with w' = w - 1, each example its own w.

    Kills: w for w'; one w for the batch; a mixture that is only nearly the conditional model at w = 1."""
    z, l, w = noises(3)[0], torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.5, 5.0]).double()
    v_c, v_0 = noises(3, 1)[0], noises(3, 2)[0]
    target, = D.guided_target(lambda z, l, dropped: [v_0 if dropped else v_c], [z], [l], w)
    x_c, x_0, w_prime = S.x_from_v(z, v_c, l), S.x_from_v(z, v_0, l), (w - 1)[:, None, None, None]
    assert_close(S.x_from_v(z, target, l), (1 + w_prime) * x_c - w_prime * x_0)
    assert torch.equal(target[0], v_c[0])                                 # w = 1: the conditional model, to the bit


# ---- times and weights

def test_times_are_1_to_n_over_n_each_as_often():
    """t is uniform on {1/N, ..., 1}. Kills: {0, ..., N - 1}/N, where the first step, from t = 1, is never trained."""
    for steps in (1, 2, 8):
        t = D.time_of(torch.linspace(0, 1, 8001)[:-1], steps)
        values, counts = t.unique(return_counts=True)
        assert torch.equal(values, (torch.arange(steps) + 1) / steps) and counts.float().std(unbiased=False) <= 1
        assert D.time_of(torch.tensor([1.0]), steps).item() == 1


@pytest.mark.parametrize("logsnr", [-6.0, -1.0, 0.0, 3.0, 9.0])
def test_weights_are_those_of_x(logsnr):
    """The loss is the weighted squared error of x, by definition. truncated_snr is the larger of two; snr+1 is v-MSE.

    Kills: a weight meant for x put on v; min for max in truncated_snr."""
    l = torch.full((2,), logsnr, dtype=torch.float64)
    z, v, target = noises(2)[0], noises(2, 1)[0], noises(2, 2)[0]
    error = (S.x_from_v(z, v, l) - S.x_from_v(z, target, l)).square()
    snr = math.exp(logsnr)
    weights = {"constant": 1.0, "snr": snr, "truncated_snr": max(snr, 1.0), "snr+1": snr + 1}
    assert set(weights) == set(WEIGHTS)
    losses = {name: D.distillation_loss(v, target, l, name) for name in weights}
    for name, weight in weights.items():
        assert_close(losses[name], (weight * error).mean())
    assert losses["truncated_snr"] == max(losses["constant"], losses["snr"])
    assert_close(losses["snr+1"], (v - target).square().mean())           # the error of v


# ---- the sampler of few steps

def test_the_stochastic_step_keeps_the_variance():
    """sigma_{s|k}^2 + (alpha_s / alpha_k)^2 sigma_k^2 = sigma_s^2, and the mean follows x.

    Kills: noise of variance sigma_s^2 added to what is left of the old noise; a step back that rescales x wrongly."""
    for t, k, s in ((1.0, 0.5, 0.75), (0.5, 0.0, 0.25), (0.25, 0.0, 0.125)):
        l_t, l_k, l_s = (SCHEDULES[0](torch.tensor([time], dtype=torch.float64)) for time in (t, k, s))
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        spread = P.renoise_step(0 * one, 0 * one, l_t, l_k, l_s, one)
        (a_k, s_k), (a_s, s_s) = S.alpha_sigma(l_k), S.alpha_sigma(l_s)
        assert_close(spread.flatten() ** 2, (1 - torch.exp(l_s - l_k)) * s_s ** 2, atol=1e-12, rtol=1e-6)
        assert_close(spread.flatten() ** 2 + (a_s / a_k * s_k) ** 2, s_s ** 2)
        z_t = S.diffuse(2 * one, 3 * one, l_t)                            # x_hat is exact: eps stays, scaled to sigma_k
        z_s = P.renoise_step(z_t, 2 * one, l_t, l_k, l_s, 0 * one)
        assert_close(z_s.flatten(), a_s * 2 + a_s / a_k * s_k * 3)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_stochastic_sampler_takes_n_calls_and_has_the_right_noise_at_each(steps):
    """If every image is the constant 0.5, the best denoiser is known, and z_s ~ N(0.5 alpha_s, sigma_s^2) at each s.

    Kills: a call too many; a step back to the wrong time; noise added after the last call."""
    calls, walk = [], []

    def model(z, logsnr, cond):
        calls.append(1)
        return S.v_from_x(z, torch.full_like(z, 0.5), logsnr)
    x = P.sample(model, SCHEDULES[1], {}, (1, 8, 8), range(100), steps=steps, sampler="stochastic", clip="none",
                 on_step=lambda k, z, x_hat: walk.append(z))
    assert len(calls) == len(walk) == steps and (x - 0.5).abs().max() < 1e-3
    for k, z in enumerate(walk[:-1], 1):
        alpha, sigma = S.alpha_sigma(SCHEDULES[1](torch.tensor(1 - k / steps)))
        assert z.mean().item() == pytest.approx(0.5 * alpha.item(), abs=0.05)
        assert z.std().item() == pytest.approx(sigma.item(), rel=0.05)


# ---- students

@pytest.mark.parametrize("kind", [{}, dict(size=(32, 32), patching="none", outer_channels="8,8", outer_blocks="1,1"),
                                  dict(low_size=(8, 8))])
def test_a_guided_student_begins_as_its_teacher_and_then_learns_w(kind):
    """The new layer of a plain, a nested and a super-resolution student starts at zero and gets a gradient.

    Kills: a new layer that is not zero, or whose output is not used; a w that reaches one level only."""
    base = dict(size=(16, 16), base_channels=8, emb_channels=16, channel_mult=(1, 2), num_res_blocks=(1,), num_heads=2,
                num_transformer_blocks=1)
    config = override(C.PRESETS["glyphs64"], **{**base, **kind})
    model = stirred(config)
    student = D.with_guidance(model, override(config, guidance_max=5.0)).eval()
    z = [torch.randn(2, 3, *size) for size in config.sizes]
    logsnr, cond = [torch.zeros(2) for _ in z], {"label": torch.tensor([3, 4]), "low_res": torch.randn(2, 3, 8, 8)}
    with_w = lambda *w: dict(cond, guidance=torch.tensor(w))
    before = D.on_levels(student, z, logsnr, with_w(1.0, 4.0))
    assert all(map(torch.equal, before, D.on_levels(model, z, logsnr, cond)))
    guide = [p for name, p in student.named_parameters() if ".guide." in f".{name}"]
    sum(level.square().sum() for level in before).backward()
    assert len(guide) == 1 and guide[0].grad.abs().sum() > 0
    with torch.no_grad():
        guide[0].normal_()
    after = D.on_levels(student, z, logsnr, with_w(1.0, 4.0))
    assert all((a - b).abs().amax((1, 2, 3)).min() > 1e-5 for a, b in zip(after, before))
    other = D.on_levels(student, z, logsnr, with_w(1.0, 2.0))
    for a, b in zip(after, other):
        assert torch.equal(a[0], b[0]) and (a[1] - b[1]).abs().max() > 1e-5


def test_a_round_learns(teacher, tmp_path):
    """A student whose weights were disturbed comes back to its targets. Kills: a target that moves with the student."""
    config = override(runs.read_checkpoint(str(teacher))["config"], steps=60, sample_steps=2, lr=3e-3, log_every=5,
                      save_every=60, sampler="ddim", distill_weight="truncated_snr")
    model, _ = P.load_run(str(teacher))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    student, g = copy.deepcopy(model).requires_grad_(True), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    D.teach(str(tmp_path / "r"), config, open_run(config), model, student, 2, torch.device("cpu"), training.Interrupt())
    losses = list(map(float, log_column(tmp_path / "r", "loss")))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())    # the teacher's weights


def test_each_round_has_noises_of_its_own(teacher, tmp_path, monkeypatch):
    """Two rounds of four updates draw eight different batches. Kills: a round that repeats the examples or the noise of
    the one before."""
    drawn, diffuse = [], D.diffuse

    def spy(x, eps, logsnr):
        drawn.append((x, eps))
        return diffuse(x, eps, logsnr)
    monkeypatch.setattr(D, "diffuse", spy)
    assert run_here(D, [teacher, "--from", 8, "--to", 2, "--steps", 4, "--device", "cpu", "--out", tmp_path / "o"]) == (
        None, "")
    assert len(drawn) == 8
    for (x, eps), (other, noise) in ((drawn[0], drawn[4]), (drawn[3], drawn[7])):
        assert not torch.equal(x, other) and not torch.equal(eps, noise)


# ---- the page of the lecture

def test_the_page_draws_its_target(tmp_path, monkeypatch, capsys):
    """It prints how far the student's one step lands from two teacher steps: 0 but for rounding.

    Kills: a target that misses; a page that is not drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [ROOT + "/distill.py"])
    D.main()
    assert (tmp_path / "figures" / "distill.png").exists()
    assert float(capsys.readouterr().out.split("lands: ")[1].split()[0]) < 1e-5
