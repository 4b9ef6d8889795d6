"""Laws of distill.py: the targets, the weights, the times, the guided student, the rounds as run folders."""
import dataclasses
import json
import math

import pytest
import torch
from torch.testing import assert_close

import config as C
import distill as D
from plumbing import runs, training, UserError
from plumbing.settings import override
import sample as P
import schedule as S
import train as T
from programs import ROOT, TINY, run_here, stirred

SCHEDULES = [lambda t: S.logsnr_shifted(t, 64, 32), lambda t: S.logsnr_cosine(t)]


def anything(seed):
    """A teacher that is no denoiser at all, of two levels: the laws hold for whatever it says."""
    g = torch.Generator().manual_seed(seed)
    mix = [torch.randn(3, 3, generator=g, dtype=torch.float64) for _ in range(2)]
    return lambda z, logsnr: [torch.tanh(torch.einsum("cd,bdhw->bchw", m, a)) + 0.1 * l[:, None, None, None]
                              for m, a, l in zip(mix, z, logsnr)]


def noises(B, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, 3, s, s, generator=g, dtype=torch.float64) for s in (8, 4)]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_student_that_hits_the_target_lands_where_two_teacher_steps_land(steps):
    """For every i, i = 0 and t = 1 included, on every level. Kills: the midpoint at the wrong time, sigma for alpha, a
    case of its own for the last step that is wrong."""
    t = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    teacher, z = anything(1), noises(steps)
    target = D.two_step_target(teacher, SCHEDULES, z, t, steps)
    walk = z                                                              # by the sampler's own steps
    for here, there in ((t, t - 0.5 / steps), (t - 0.5 / steps, t - 1 / steps)):
        a, b = ([schedule(time.clamp(min=0)) for schedule in SCHEDULES] for time in (here, there))
        x_hat = [S.x_from_v(*level) for level in zip(walk, teacher(walk, a), a)]
        walk = [P.ddim_step(*level) for level in zip(walk, x_hat, a, b)]
    for r, schedule in enumerate(SCHEDULES):
        start, end = schedule(t), schedule((t - 1 / steps).clamp(min=0))
        landed = P.ddim_step(z[r], S.x_from_v(z[r], target[r], start), start, end)
        assert_close(landed, walk[r], atol=1e-9, rtol=1e-9)


def test_the_target_of_the_last_step_is_the_teachers_x_at_the_midpoint():
    """FACTS 4.1: exact where sigma_0 = 0; here sigma_0 is e^-8, so nearly."""
    t, z, teacher = torch.tensor([0.25], dtype=torch.float64), noises(1), anything(2)
    x = S.x_from_v(z[0], D.two_step_target(teacher, SCHEDULES, z, t, 4)[0], SCHEDULES[0](t))
    half = [schedule(t / 2) for schedule in SCHEDULES]
    start = [schedule(t) for schedule in SCHEDULES]
    x_hat = [S.x_from_v(*level) for level in zip(z, teacher(z, start), start)]
    z_half = [P.ddim_step(*level) for level in zip(z, x_hat, start, half)]
    assert_close(x, S.x_from_v(z_half[0], teacher(z_half, half)[0], half[0]), atol=2e-2, rtol=0)


def test_with_the_best_denoiser_of_a_gaussian_the_target_is_closed_form():
    """x ~ N(0, c^2): x_hat = k z with k = alpha c^2 / (alpha^2 c^2 + sigma^2), so DDIM multiplies z by
    alpha_s k + sigma_s (1 - alpha k) / sigma, and the target is linear in z too."""
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


def test_times_are_1_to_n_over_n_each_as_often():
    """The trap: 0 to N - 1, where t = 1 is never trained."""
    for steps in (1, 2, 8):
        t = D.time_of(torch.linspace(0, 1, 8001)[:-1], steps)
        values, counts = t.unique(return_counts=True)
        assert torch.equal(values, (torch.arange(steps) + 1) / steps) and counts.float().std(unbiased=False) <= 1
        assert D.time_of(torch.tensor([1.0]), steps).item() == 1


@pytest.mark.parametrize("logsnr", [-6.0, -1.0, 0.0, 3.0, 9.0])
def test_weights_are_those_of_x(logsnr):
    """Against the definition in x, in float64; truncated_snr is the larger of two."""
    l = torch.full((2,), logsnr, dtype=torch.float64)
    z, v, target = noises(2)[0], noises(2, 1)[0], noises(2, 2)[0]
    error = (S.x_from_v(z, v, l) - S.x_from_v(z, target, l)).square()
    snr = math.exp(logsnr)
    weights = {"constant": 1.0, "snr": snr, "truncated_snr": max(snr, 1.0), "snr+1": snr + 1}
    assert set(weights) == set(D.WEIGHTS)
    losses = {name: D.distillation_loss(v, target, l, name) for name in weights}
    for name, weight in weights.items():
        assert_close(losses[name], (weight * error).mean())
    assert losses["truncated_snr"] == max(losses["constant"], losses["snr"])
    assert_close(losses["snr+1"], (v - target).square().mean())           # the error of v


def test_guided_target_is_eq_7_in_our_convention():
    """Meng et al.: (1 + w') x_c - w' x_0, w' = w - 1, each example its own. Kills: w for w', one w for the batch."""
    z, l, w = noises(3)[0], torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 2.5, 5.0]).double()
    v_c, v_0 = noises(3, 1)[0], noises(3, 2)[0]
    target, = D.guided_target(lambda z, l, dropped: [v_0 if dropped else v_c], [z], [l], w)
    x_c, x_0, theirs = S.x_from_v(z, v_c, l), S.x_from_v(z, v_0, l), (w - 1)[:, None, None, None]
    assert_close(S.x_from_v(z, target, l), (1 + theirs) * x_c - theirs * x_0)
    assert torch.equal(target[0], v_c[0])                                 # w = 1: the conditional model, to the bit


def test_the_stochastic_step_keeps_the_variance():
    """sigma_{s|k}^2 + (alpha_s / alpha_k)^2 sigma_k^2 = sigma_s^2, and the mean goes where x does."""
    for t, k, s in ((1.0, 0.5, 0.75), (0.5, 0.0, 0.25), (0.25, 0.0, 0.125)):
        l_t, l_k, l_s = (SCHEDULES[0](torch.tensor([time], dtype=torch.float64)) for time in (t, k, s))
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        spread = P.renoise_step(0 * one, 0 * one, l_t, l_k, l_s, one)
        (a_k, s_k), (a_s, s_s) = S.alpha_sigma(l_k), S.alpha_sigma(l_s)
        assert_close(spread.flatten() ** 2, (1 - torch.exp(l_s - l_k)) * s_s ** 2, atol=1e-12, rtol=1e-6)
        assert_close(spread.flatten() ** 2 + (a_s / a_k * s_k) ** 2, s_s ** 2)
        z_t = S.diffuse(2 * one, 3 * one, l_t)                            # exact x: eps is kept, then shrunk to sigma_k
        z_s = P.renoise_step(z_t, 2 * one, l_t, l_k, l_s, 0 * one)
        assert_close(z_s.flatten(), a_s * 2 + a_s / a_k * s_k * 3)


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_the_stochastic_sampler_takes_n_calls_and_has_the_right_noise_at_each(steps):
    """Of data that are one point, 0.5, the denoiser is known: at each s the law of z is N(0.5 alpha_s, sigma_s^2)."""
    calls, seen = [], []

    def model(z, logsnr, cond):
        calls.append(1)
        return S.v_from_x(z, torch.full_like(z, 0.5), logsnr)
    x = P.sample(model, SCHEDULES[1], {}, (1, 8, 8), range(100), steps=steps, sampler="stochastic", clip="none",
                 on_step=lambda k, z, x_hat: seen.append(z))
    assert len(calls) == len(seen) == steps and (x - 0.5).abs().max() < 1e-3
    for k, z in enumerate(seen[:-1], 1):
        alpha, sigma = S.alpha_sigma(SCHEDULES[1](torch.tensor(1 - k / steps)))
        assert z.mean().item() == pytest.approx(0.5 * alpha.item(), abs=0.05)
        assert z.std().item() == pytest.approx(sigma.item(), rel=0.05)


# ---- students and rounds

@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert run_here(T, [*TINY, "--steps", 3, "--out", folder]) == (None, "")
    return folder


@pytest.mark.parametrize("kind", [{}, dict(size=(32, 32), patching="none", outer_channels="8,8", outer_blocks="1,1"),
                                  dict(low_size=(8, 8))])
def test_a_guided_student_begins_as_its_teacher_and_then_learns_w(kind):
    """Kills: a new layer that is not zero, or that nothing reads; a w that only one level hears."""
    base = dict(size=(16, 16), base_channels=8, emb_channels=16, channel_mult=(1, 2), num_res_blocks=(1,), num_heads=2,
                num_transformer_blocks=1)
    config = override(C.PRESETS["glyphs64"], **{**base, **kind})
    model = stirred(config)
    student = D.with_guidance(model, override(config, guidance_max=5.0)).eval()
    z = [torch.randn(2, 3, *size) for size in config.sizes]
    logsnr, cond = [torch.zeros(2) for _ in z], {"label": torch.tensor([3, 4]), "low_res": torch.randn(2, 3, 8, 8)}
    told = dict(cond, guidance=torch.tensor([1.0, 4.0]))
    before = D.on_levels(student, z, logsnr, told)
    assert all(map(torch.equal, before, D.on_levels(model, z, logsnr, cond)))
    guide = [p for name, p in student.named_parameters() if ".guide." in f".{name}"]
    sum(level.square().sum() for level in before).backward()
    assert len(guide) == 1 and guide[0].grad.abs().sum() > 0
    with torch.no_grad():
        guide[0].normal_()
    after = D.on_levels(student, z, logsnr, told)
    assert all((a - b).abs().amax((1, 2, 3)).min() > 1e-5 for a, b in zip(after, before))
    other = D.on_levels(student, z, logsnr, dict(told, guidance=torch.tensor([1.0, 2.0])))
    for a, b in zip(after, other):
        assert torch.equal(a[0], b[0]) and (a[1] - b[1]).abs().max() > 1e-5


def test_with_guidance_refuses_another_network():
    config = override(C.PRESETS["glyphs16"], guidance=1.5, guidance_max=2.0)
    wider = C.build_model(C.PRESETS["glyphs64"])
    with pytest.raises(UserError, match="not a teacher for this student"):
        D.with_guidance(wider, config)


SHORT = ["--from", 8, "--to", 2, "--steps", 4, "--guided-steps", 3, "--device", "cpu"]


def test_the_ladder_leaves_run_folders_that_know_themselves_and_resume(teacher, tmp_path, monkeypatch):
    out = tmp_path / "out"
    args = [teacher, *SHORT, "--guided", "--w-max", 4, "--out", out]
    interrupts, loss, calls = [], D.distillation_loss, []
    make = D.Interrupt
    monkeypatch.setattr(D, "Interrupt", lambda: interrupts.append(make()) or interrupts[-1])

    def interrupted(*level):                                              # a signal in the second update of round 4
        calls.append(1)
        if len(calls) == 5:
            interrupts[-1].signal = 15
        return loss(*level)
    monkeypatch.setattr(D, "distillation_loss", interrupted)
    assert run_here(D, args)[0] == 143
    assert runs.read_checkpoint(str(out / "4"))["step"] == 2 and not (out / "2").exists()
    assert run_here(D, args) == (None, "") and len(calls) == 3 + 4 + 4    # no update was made twice
    monkeypatch.setattr(D, "distillation_loss", loss)
    whole = tmp_path / "whole"
    assert run_here(D, [*args[:-1], whole]) == (None, "")
    for name in ("guided", "4", "2"):
        a, b = (runs.read_checkpoint(str(folder / name)) for folder in (out, whole))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])         # to the bit
    config = runs.read_checkpoint(str(out / "2"))["config"]
    assert (config.sampler, config.sample_steps, config.guidance_max) == ("ddim", 2, 4.0)
    assert config.distilled_from == f"{out / '4'}, step 4" and config.guidance == 4.0 and config.calls == 1
    assert json.loads((out / "guided" / "config.json").read_text())["distilled_from"] == f"{teacher}, step 3"
    calls, forward = [], P.sample
    monkeypatch.setattr(P, "sample", lambda *args, **kw: calls.append((args, kw)) or forward(*args, **kw))
    assert run_here(P, [out / "2", "--labels", "A", "--n", 1, "--out", tmp_path / "a.png"]) == (None, "")
    (args_of, kw), = calls                                                # no flag was needed
    assert (kw["steps"], kw["sampler"], kw["guidance"]) == (2, "ddim", 1.0) and args_of[2]["guidance"].tolist() == [4.0]
    monkeypatch.setattr(D, "distillation_loss", None)                     # all done: nothing is taught anew
    assert run_here(D, args) == (None, "")
    for other in (["--weight", "snr"], ["--w-max", 3], ["--steps", 5]):   # another distillation: known before any work
        status, error = run_here(D, [*args, *other])
        assert status == 2 and error.count("\n") == 1 and "holds a round of another distillation" in error
    status, error = run_here(T, ["--resume", out / "2"])
    assert status == 2 and "a distilled run" in error
    for wrong in (["--steps", 3], ["--sampler", "ddpm"], ["--lowest-idx", 0]):
        status, error = run_here(P, [out / "2", *wrong])
        assert status == 2 and error.count("\n") == 1 and "was distilled to 2 steps" in error
    assert run_here(P, [out / "2", "--sampler", "stochastic", "--labels", "A", "--out", tmp_path / "a.png"])[1] == ""
    status, error = run_here(D, [out / "2", "--guided", "--to", 1])
    assert status == 2 and "was distilled already" in error
    status, error = run_here(D, [out / "2", "--from", 8, "--to", 1])
    assert status == 2 and "was itself distilled to 2 steps" in error


def test_without_guided_the_students_have_no_guidance(teacher, tmp_path):
    """Two students mixed by eq. 7 are no student of the mixture."""
    assert run_here(D, [teacher, *SHORT, "--out", tmp_path / "o"]) == (None, "")
    config = runs.read_checkpoint(str(tmp_path / "o" / "2"))["config"]
    assert config.guidance == 1 and config.calls == 1 and not config.guidance_max
    assert run_here(D, [tmp_path / "o" / "2", "--to", 1, "--steps", 2]) == (None, "")           # goes on by itself


def test_each_round_has_noises_of_its_own(teacher, tmp_path, monkeypatch):
    seen, loss = [], D.distillation_loss
    monkeypatch.setattr(D, "diffuse", lambda x, eps, logsnr: seen.append((x, eps)) or D.S_diffuse(x, eps, logsnr))
    monkeypatch.setattr(D, "S_diffuse", S.diffuse, raising=False)
    assert run_here(D, [teacher, *SHORT, "--out", tmp_path / "o"]) == (None, "")
    assert len(seen) == 8 and loss
    for (x, eps), (other, noise) in ((seen[0], seen[4]), (seen[3], seen[7])):
        assert not torch.equal(x, other) and not torch.equal(eps, noise)


def test_a_round_learns(teacher, tmp_path):
    """A student that was shaken comes back to its targets. Kills: a target that moves with the student."""
    config = override(runs.read_checkpoint(str(teacher))["config"], steps=60, sample_steps=2, lr=3e-3, log_every=5,
                        save_every=60, sampler="ddim", distill_weight="truncated_snr")
    model, _ = P.load_run(str(teacher))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    student, g = D.copy.deepcopy(model).requires_grad_(True), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    D.teach(str(tmp_path / "r"), config, model, student, 2, torch.device("cpu"), training.Interrupt())
    losses = [float(row["loss"]) for row in training.Log(str(tmp_path / "r"), config, True, 60).rows()]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3]), losses
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())    # the teacher stands


@pytest.mark.parametrize("settings", [
    ["--size", 32, "--outer-channels", "8,8", "--outer-blocks", "1,1", "--patching", "dwt_1", "--outer-patching",
     "dwt_1"],
    ["--size", 32, "--low-size", 16],
    ["--text-encoder", "bytes", "--text-channels", 16, "--text-length", 48]])
def test_nested_models_stages_and_captions_are_distilled_too(settings, tmp_path):
    assert run_here(T, [*TINY, *settings, "--steps", 1, "--out", tmp_path / "r"]) == (None, "")
    assert run_here(D, [tmp_path / "r", *SHORT, "--guided"]) == (None, "")
    assert runs.read_checkpoint(str(tmp_path / "r-guided-distilled" / "2"))["config"].sample_steps == 2


@pytest.mark.long
def test_a_batch_in_parts_is_the_batch(teacher, tmp_path, monkeypatch):
    """Kills: parts whose gradients are not averaged, or of which the last alone counts; recomputed blocks."""
    state = runs.read_checkpoint(str(teacher))
    (tmp_path / "again").mkdir()
    again = dict(state, config=dataclasses.asdict(override(state["config"], recompute=True)))
    torch.save(again, tmp_path / "again" / "checkpoint.pt")
    found, recomputed, recompute = [], [], D.shard.checkpoint_activations
    monkeypatch.setattr(D.shard, "checkpoint_activations", lambda model: recomputed.append(model) or recompute(model))
    for run, parts in ((teacher, 1), (teacher, 2), (teacher, 4), (tmp_path / "again", 1)):
        out = tmp_path / f"{run.name}-{parts}"
        assert run_here(D, [run, *SHORT, "--guided", "--guided-steps", 1, "--accumulate", parts, "--out", out]) == (
            None, "")
        found += [[float(row[key]) for key in ("loss", "grad_norm")]
                  for row in training.Log(str(out / "guided"), state["config"], True, 1).rows()]
        assert len(recomputed) == (run.name == "again")                   # the first student alone: others are copies
    assert len(found) == 4 and found[1:] == [pytest.approx(found[0], rel=1e-3)] * 3


@pytest.mark.parametrize("args, message", [
    (["--accumulate", "3"], "--accumulate 3: want a number of parts that divides the batch, 4"),
    (["--to", "3"], "--to 3: want a power of two"),
    (["--from", "24"], "--from 24: want a power of two"),
    (["--from", "8", "--to", "8"], "--to 8: want fewer than the teacher's 8"),
    (["--from", "4", "--to", "8"], "--to 8: want fewer"),
    (["--to", "0"], "--to 0: want a power of two"),
    (["--guided", "--w-max", "1"], "--w-max 1: want more than 1"),
    (["--steps", "0"], "--steps 0: want 1 or more"),
    (["--lr", "nan"], "--lr nan: want a positive number"),
    (["--out", "/proc/nope"], "--out /proc/nope: "),
    (["--out", __file__], f"--out {__file__}: "),
])
def test_what_it_refuses(teacher, args, message):
    status, error = run_here(D, [teacher, *args])
    assert status == 2 and error.count("\n") == 1 and message in error, error


def test_runs_that_cannot_be_distilled_are_one_line(teacher, tmp_path):
    status, error = run_here(D, [tmp_path / "none"])
    assert status == 2 and error.count("\n") == 1 and "no such run" in error
    state = runs.read_checkpoint(str(teacher))
    (tmp_path / "other").mkdir()
    other = dict(state, config=dataclasses.asdict(override(state["config"], base_channels=16)))
    torch.save({key: dict(value) if key in ("model", "ema") else value for key, value in other.items()},
               tmp_path / "other" / "checkpoint.pt")
    status, error = run_here(D, [tmp_path / "other"])
    assert status == 2 and error.count("\n") == 1 and "a checkpoint of another model" in error


def test_the_page_draws_its_target(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [ROOT + "/distill.py"])
    D.main()
    assert (tmp_path / "figures" / "distill.png").exists()
    assert float(capsys.readouterr().out.split("lands: ")[1].split()[0]) < 1e-5
