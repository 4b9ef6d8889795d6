"""Laws of nested_unet.py (trap 12), alone and through train.py and sample.py."""
import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import config as C
import nested_unet as N
import sample as P
import schedule as S
import train as T
import unet
from programs import TINY, run_here
from test_models import small_unet, small_uvit, stir
from plumbing import pictures

SIZES = [(32, 32), (16, 16)]
SMALL = [*TINY, "--patching", "none", "--base-channels", "16"]
NESTED = ["--size", "32", "--outer-channels", "8,16", "--outer-blocks", "1,1"]


def small_outer(size=(32, 32), widths=(8, 16), emb=16):
    return unet.UNet(size, 1, emb, widths, (1,) * len(widths), attn_resolutions=(), num_classes=None, middle=False)


def nest(inner, size=(32, 32), seed=0, **kw):
    torch.manual_seed(seed)
    return N.NestedUNet(inner, small_outer(size, **kw))


def three_levels():
    return nest(nest(small_uvit(), (32, 32)), (64, 64))


def noises(sizes, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, *size, generator=generator) for size in sizes]


# ---- the process

def test_pyramid_averages_from_level_to_level():
    """Kills: a stride or bilinear interpolation instead of the average; a level left out."""
    x = torch.randn(2, 3, 32, 48)
    levels = N.pyramid(x, [(32, 48), (16, 24), (4, 6)])
    assert levels[0] is x
    for level, k in zip(levels, (1, 2, 8)):
        assert_close(level, x.reshape(2, 3, 32 // k, k, 48 // k, k).mean((3, 5)))
    with pytest.raises(ValueError, match="highest level is 64x64"):
        N.pyramid(x, [(64, 64)])
    with pytest.raises(ValueError, match="12x24 does not divide"):
        N.pyramid(x, [(32, 48), (12, 24)])


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_gap_between_levels_is_p_log_k_at_every_t(power):
    """FACTS B 1.14. Kills: k of neighbours instead of the lowest level, another logarithm, the wrong sign."""
    t = torch.linspace(0, 1, 51)
    schedules = N.level_schedules(S.logsnr_cosine, [(256, 256), (128, 128), (32, 32)], power)
    for schedule, k in zip(schedules, (8, 4, 1)):
        assert_close(S.logsnr_cosine(t) - schedule(t), torch.full_like(t, power * math.log(k)), atol=1e-4, rtol=0)


def test_power_two_is_simple_diffusions_shift():
    base = lambda t: S.logsnr_shifted(t, 64, 32)
    t = torch.linspace(0, 1, 11)
    for schedule, d in zip(N.level_schedules(base, [(1024, 1024), (256, 256), (64, 64)]), (1024, 256, 64)):
        assert_close(schedule(t), S.logsnr_shifted(t, d, 32), atol=1e-4, rtol=0)
    top = N.level_schedules(lambda t: S.logsnr_shifted(t, 16, 32), [(32, 64), (8, 16)])  # not square: k = 4
    assert float(top[1](torch.tensor(0.5)) - top[0](torch.tensor(0.5))) == pytest.approx(2 * math.log(4))


def test_snr_of_the_pooled_image_agrees_across_levels_measured_on_noise():
    """Power 2 and only 2: averaged to the lowest level, all levels have the same SNR. Kills: power 1 called 2."""
    sizes, logsnr = [(128, 128), (64, 64), (16, 16)], 0.7
    for power, agree in ((2.0, True), (1.0, False)):
        schedules = N.level_schedules(lambda t: t * 0 + logsnr, sizes, power)
        snr = []
        for eps, schedule in zip(noises(sizes, 40), schedules):
            alpha, sigma = S.alpha_sigma(schedule(torch.tensor(0.0)))
            noise = F.avg_pool2d(sigma * eps, eps.shape[-1] // 16)
            snr.append(float(alpha ** 2 / noise.var()))
        assert (max(snr) / min(snr) < 1.05) == agree


def test_noises_of_the_levels_are_independent_and_of_unit_variance():
    """Trap 12. Kills: low-level noise pooled from the high level's (with or without its factor k)."""
    _, (high, low), _ = T.draw(0, 0, range(64), [(3, 64, 64), (3, 16, 16)], torch.device("cpu"))
    pooled = F.avg_pool2d(high, 4)
    assert pooled.std() == pytest.approx(1 / 4, rel=0.02) and low.std() == pytest.approx(1, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([pooled.flatten(), low.flatten()]))[0, 1]) < 0.02


# ---- the network

@pytest.mark.parametrize("make", [small_unet, small_uvit])
def test_one_level_is_the_plain_model_to_the_bit(make):
    """Network, loss, gradient, samples. simple diffusion is the case R = 1."""
    inner = stir(make()).eval()
    nested = N.NestedUNet(inner)
    x, t, eps = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([0.2, 0.8]), torch.randn(2, 3, 16, 16)
    cond = {"label": torch.tensor([1, -1])}
    assert torch.equal(nested([eps], [t], cond)[0], inner(eps, t, cond))
    for kind in ("eps_mse", "v_mse"):
        losses = [T.simple_loss(inner, x, cond, t, eps, S.logsnr_cosine, kind),
                  N.nested_loss(nested, [x], cond, t, [eps], N.level_schedules(S.logsnr_cosine, [(16, 16)]),
                                functools.partial(T.prediction_loss, loss=kind))]
        grads = [torch.autograd.grad(loss, list(inner.parameters()), allow_unused=True) for loss in losses]
        assert torch.equal(*losses)
        assert all(a is None or torch.equal(a, b) for a, b in zip(*grads))
    for sampler in ("ddpm", "ddim"):
        options = dict(seeds=[3, 4], steps=3, sampler=sampler, guidance=2.0)
        with torch.no_grad():
            plain = P.sample(inner, S.logsnr_cosine, cond, (3, 16, 16), **options)
            assert torch.equal(P.sample_levels(nested, [S.logsnr_cosine], cond, [(3, 16, 16)], **options)[0], plain)


@pytest.mark.parametrize("make", [small_unet, small_uvit])
def test_with_zero_adapters_the_inner_output_is_the_stand_alone_models(make):
    """Trap 12, to the bit, at two and three levels. Kills: adapters not from zero, the inner network's own log-SNR or
    condition replaced by the outer's, an f that is scaled in."""
    for levels in (1, 2):
        model = inner = stir(make()).eval()
        sizes = [(16, 16)]
        for _ in range(levels):
            sizes = [tuple(2 * s for s in sizes[0])] + sizes
            model = nest(model, sizes[0])
        model.eval()
        z, logsnr = noises(sizes), [torch.tensor([-3.0 - r, 2.0]) for r in range(len(sizes))]
        cond = {"label": torch.tensor([2, -1])}
        assert torch.equal(model(z, logsnr, cond)[-1], inner(z[-1], logsnr[-1], cond))


def influence(model, sizes):
    """(R, R) table: does output i depend on input j?"""
    z = [a.requires_grad_() for a in noises(sizes, 1)]
    outputs = model(z, [torch.zeros(1)] * len(sizes), {})
    return [[bool(g is not None and g.abs().sum() > 0) for g in torch.autograd.grad(
        v.square().sum(), z, retain_graph=True, allow_unused=True)] for v in outputs]


def test_every_level_sees_every_other_after_one_step_and_none_before():
    """Kills: an adapter that is missing or one-way; an outer middle that bypasses it; both adapters dead at zero."""
    model, sizes = three_levels(), [(64, 64), (32, 32), (16, 16)]
    assert influence(model, sizes) == [[i == j for j in range(3)] for i in range(3)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    N.nested_loss(model, noises(sizes, 2, seed=1), {}, torch.tensor([0.3, 0.7]), noises(sizes, 2, seed=9),
                  N.level_schedules(S.logsnr_cosine, sizes), T.prediction_loss).backward()
    for nested in (model, model.inner):
        assert nested.out_adapter.weight.grad.abs().sum() > 0 and nested.in_adapter.weight.grad.abs().sum() > 0
    optimizer.step()
    assert influence(model, sizes) == [[True] * 3] * 3


def test_every_parameter_is_used_and_every_input_matters():
    """Kills: a level that ignores its log-SNR or the class; parameters that no gradient reaches (DDP would hang)."""
    model, sizes = stir(three_levels()).eval(), [(64, 64), (32, 32), (16, 16)]
    z, logsnr, cond = noises(sizes, 1), [torch.zeros(1)] * 3, {"label": torch.tensor([2])}
    v = model(z, logsnr, cond)
    sum(a.sum() for a in v).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in unused if not name.endswith("norm_k.bias")]
    others = [model(z, logsnr, {}), model(z, logsnr, {"label": torch.tensor([3])})]
    others += [model(z, [l + (i == r) for i, l in enumerate(logsnr)], cond) for r in range(3)]
    for other in others:
        for a, b in zip(v, other):
            assert (a - b).abs().max() > 1e-6


def test_the_condition_is_computed_once_and_inside(monkeypatch):
    model, calls = three_levels(), []
    whole = N.innermost(model).embed.of_cond
    monkeypatch.setattr(N.innermost(model).embed, "of_cond", lambda *args: calls.append(args) or whole(*args))
    model(noises(model.sizes), [torch.zeros(2)] * 3, {"label": torch.tensor([1, 2])})
    assert len(calls) == 1
    assert all(nested.outer.embed.label is None for nested in (model, model.inner))
    stir(model).eval()
    for nested in (model, model.inner):                                   # with the adapters shut: told, not overheard
        for adapter in (nested.in_adapter, nested.out_adapter):
            torch.nn.init.zeros_(adapter.weight), torch.nn.init.zeros_(adapter.bias)
    z, logsnr = noises(model.sizes), [torch.zeros(2)] * 3
    one, other = (model(z, logsnr, {"label": torch.tensor([c, c])}) for c in (1, 2))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(one, other))


def test_levels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"coarsest map of the 64x64 level is \(32, 32\)"):
        nest(small_uvit(), (64, 64))
    with pytest.raises(ValueError, match="has 2 levels, got 1 images"):
        nest(small_uvit())([torch.zeros(1, 3, 32, 32)], [torch.zeros(1)], {})
    model = nest(small_unet(size=(16, 24)), (32, 48))                     # not square
    assert [v.shape[-2:] for v in model(noises(model.sizes), [torch.zeros(2)] * 2, {})] == [(32, 48), (16, 24)]


# ---- the loss

def test_loss_is_the_weighted_sum_of_the_levels_and_eps_is_gamma_times_v():
    """Eq. 3, FACTS B 1.14. Kills: sums instead of means, weights in the wrong order, one alpha for all levels."""
    sizes, t = [(8, 8), (4, 4)], torch.tensor([0.2, 0.6, 0.9])
    x, eps, v = noises(sizes, 3, 1), noises(sizes, 3, 2), noises(sizes, 3, 3)
    schedules = N.level_schedules(S.logsnr_cosine, sizes)
    errors = [(a - S.v_from_x_eps(b, e, s(t))).square().mean((1, 2, 3)) for a, b, e, s in zip(v, x, eps, schedules)]
    gamma = [torch.sigmoid(s(t)) for s in schedules]
    for kind, levels in (("v_mse", errors), ("eps_mse", [g * e for g, e in zip(gamma, errors)])):
        loss = N.nested_loss(lambda z, logsnr, cond: v, x, {}, t, eps, schedules,
                             functools.partial(T.prediction_loss, loss=kind), [16, 4])
        assert_close(loss, 16 * levels[0].mean() + 4 * levels[1].mean())


def test_mixed_batch_is_unbiased_and_leaves_the_other_rows_alone():
    """Kills: high-level loss divided by the whole batch; an f that leaks into rows without a high level."""
    assert N.mixed_rows((2, 1), 12) == [8, 12] and N.mixed_rows((1, 1, 2), 8) == [2, 4, 8]
    with pytest.raises(ValueError, match="none for the highest"):
        N.mixed_rows((1, 9), 4)
    sizes, model = SIZES, stir(nest(small_uvit())).eval()
    x, eps, t = noises(sizes, 4, 1), noises(sizes, 4, 2), torch.tensor([0.1, 0.4, 0.6, 0.9])
    schedules, cond = N.level_schedules(S.logsnr_cosine, sizes), {"label": torch.arange(4)}

    def high(order, rows):                                                # the high level's loss alone
        pick = lambda tensors: [a[order] for a in tensors]
        return N.nested_loss(model, pick(x), {"label": torch.tensor(order)}, t[order], pick(eps), schedules,
                             T.prediction_loss, [1.0, 0.0], rows).item()
    mixed = [high([i, j, *[k for k in range(4) if k not in (i, j)]], [2, 4]) for i in range(4) for j in range(i)]
    assert sum(mixed) / 6 == pytest.approx(high([0, 1, 2, 3], None), rel=1e-3)
    logsnr = [s(t) for s in schedules]
    v = model([x[0][:2], x[1]], [logsnr[0][:2], logsnr[1]], cond)
    full, alone = model(x, logsnr, cond), model.inner(x[1], logsnr[1], cond)
    assert v[0].shape[0] == 2
    for got, want in ((v[0], full[0][:2]), (v[1][:2], full[1][:2]), (v[1][2:], alone[2:])):
        assert (got - want).abs().max() < 0.01 * want.abs().max()         # random weights amplify rounding
    assert (v[1][:2] - alone[:2]).abs().max() > 1e-3


# ---- sampling

class GaussianOracle:
    """The best denoiser of x ~ N(0, C) on four pixels in a 2 x 2 square and of their average, seen together."""
    def __init__(self, covariance):
        self.covariance = covariance.double()
        self.down = torch.cat([torch.eye(4), torch.full((1, 4), 0.25)]).double()                # x -> (x, average)

    def __call__(self, z, logsnr, cond):
        assert float(logsnr[1] - logsnr[0]) == pytest.approx(2 * math.log(2), abs=1e-3)         # one t, p = 2
        (a2, s2), (a1, s1) = (S.alpha_sigma(l.double()) for l in logsnr)
        A = self.down * torch.cat([a2.expand(4), a1.reshape(1)])[:, None]                       # z = A x + noise
        noise = torch.diag(torch.cat([s2.expand(4), s1.reshape(1)]) ** 2)
        gain = self.covariance @ A.T @ torch.linalg.inv(A @ self.covariance @ A.T + noise)
        flat = torch.cat([level.flatten(1) for level in z], 1).double()
        x = flat @ gain.T @ self.down.T
        x_hat = [x[:, :4].reshape(-1, 1, 2, 2).float(), x[:, 4:].reshape(-1, 1, 1, 1).float()]
        return [S.v_from_x(*level) for level in zip(z, x_hat, logsnr)]


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_gaussian_oracle_at_two_levels_samples_the_right_joint_law(sampler):
    """Kills: one level's alpha and sigma for both, one schedule for all, noise shared, a level finished first."""
    root = torch.tensor([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [0.1, 0.2, 0.5, 0], [-0.2, 0.1, 0.1, 0.3]])
    oracle = GaussianOracle(root @ root.T)
    schedules = N.level_schedules(S.logsnr_cosine, [(2, 2), (1, 1)])
    high, low = P.sample_levels(oracle, schedules, {}, [(1, 2, 2), (1, 1, 1)], range(6000), 128, sampler, clip="none")
    want = oracle.down @ oracle.covariance @ oracle.down.T
    got = torch.cov(torch.cat([high.flatten(1), low.flatten(1)], 1).double().T)
    assert (got - want).abs().max() < 0.03


def test_all_levels_are_guided_clipped_and_start_from_noises_of_their_own():
    seen = []

    def model(z, logsnr, cond):
        seen.append((z, logsnr))
        return [torch.full_like(level, 1.0 if cond else 0.0) for level in z]
    schedules = N.level_schedules(S.logsnr_cosine, SIZES)
    shapes = [(3, *size) for size in SIZES]
    steps = []
    out = P.sample_levels(model, schedules, {"label": torch.tensor([1])}, shapes, [0], 2, "ddim", guidance=3.0,
                          on_step=lambda k, z, x_hat: steps.append((k, z, x_hat)))
    assert len(seen) == 4 and [k for k, _, _ in steps] == [1, 2]
    z, logsnr = seen[0]
    assert abs(torch.corrcoef(torch.stack([F.avg_pool2d(z[0], 2).flatten(), z[1].flatten()]))[0, 1]) < 0.1
    for level, (z_r, l, x_hat) in enumerate(zip(z, logsnr, steps[0][2])):
        assert float(l) == pytest.approx(float(schedules[level](torch.tensor(1.0))))
        assert_close(x_hat, S.x_from_v(z_r, torch.full_like(z_r, 3.0), l).clamp(-1, 1))
    assert [a.abs().max() <= 1 for a in out] == [True, True]
    tiles = pictures.side_by_side(out)
    assert tiles.shape == (1, 3, 32, 64)
    assert torch.equal(tiles[..., 32:], out[0]) and torch.equal(tiles[..., ::2, :32:2], out[1])


# ---- growing, and the programs

def test_growing_keeps_the_inner_network_and_refuses_what_does_not_fit():
    """Trap 12. Kills: matching keys only, in silence; adapters or the outer level loaded over."""
    inner, model = stir(small_uvit(), 5).eval(), nest(small_uvit()).eval()
    N.grow(model, inner.state_dict())
    z, logsnr = noises(SIZES), [torch.zeros(2)] * 2
    assert torch.equal(model(z, logsnr, {})[1], inner(z[1], logsnr[1], {}))
    state = inner.state_dict()
    del state["position"]
    state["extra"] = torch.zeros(1)
    state["output.conv.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"missing: position; in excess: extra; .*output.conv.bias \(7,\) for \(3,\)"):
        N.grow(model, state)


@pytest.fixture(scope="module")
def run16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested") / "run16"
    assert run_here(T, [*SMALL, "--steps", "2", "--out", folder]) == (None, "")
    return folder


def test_a_grown_run_begins_as_the_inner_one_and_resumes_to_the_bit(run16, tmp_path, monkeypatch):
    args = [*SMALL, *NESTED, "--grow-from", run16]
    starts, grown = [], T.grow

    def spy(model, trained):
        grown(model, trained)
        starts.append({k: v.clone() for k, v in model.inner.state_dict().items()})
    monkeypatch.setattr(T, "grow", spy)
    for name, steps in (("whole", 4), ("parts", 2)):
        assert run_here(T, [*args, "--steps", steps, "--mixed-ratio", "1:1", "--level-weights", "2:1", "--out",
                            tmp_path / name]) == (None, "")
    state = torch.load(run16 / "checkpoint.pt", weights_only=True)
    for weights, inner in ((state["model"], starts[0]), (state["ema"], starts[1])):
        assert weights.keys() == inner.keys() and all(torch.equal(weights[k], inner[k]) for k in inner)
    assert run_here(T, ["--resume", tmp_path / "parts", "--steps", "4", "--device", "cpu"]) == (None, "")
    assert len(starts) == 4                                               # two runs, model and average; not grown again
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    again = [*SMALL, "--size", "64", "--outer-channels", "8,8/8,16", "--outer-blocks", "1,1/1,1",
             "--steps", "1", "--grow-from", tmp_path / "whole", "--out", tmp_path / "three"]
    assert run_here(T, again) == (None, "")                               # a nested run is grown once more
    out, gif = tmp_path / "s.png", tmp_path / "s.gif"
    assert run_here(P, [tmp_path / "three", "--levels", "--labels", "A,B", "--n", "2", "--out", out, "--gif", gif,
                        "--device", "cpu"]) == (None, "")
    picture = Image.open(out)
    assert picture.height == 2 * 64 and picture.width >= 2 * 3 * 64 and Image.open(gif).size == picture.size
    assert run_here(P, [tmp_path / "three", "--labels", "A", "--n", "1", "--out", out, "--device", "cpu"]) == (None, "")
    assert Image.open(out).height == 64


def test_mistakes_of_nested_runs(run16, tmp_path):
    nested = [*SMALL, *NESTED, "--out", tmp_path / "new"]
    broken = tmp_path / "broken"
    broken.mkdir()
    state = torch.load(run16 / "checkpoint.pt", weights_only=True)
    others = {"part": dict(state, ema={k: v for k, v in state["ema"].items() if k != "position"}),
              "null": dict(state, ema=None), "number": dict(state, model=dict(state["model"], position=1))}
    for name, value in others.items():
        (tmp_path / name).mkdir()
        torch.save(value, tmp_path / name / "checkpoint.pt")
    del state["model"]["position"]
    torch.save(state, broken / "checkpoint.pt")
    cases = [([*nested, "--grow-from", tmp_path / "none"], "no such run"),
             ([*nested, "--grow-from", broken], "not the inner network of this model (missing: position)"),
             ([*nested, "--base-channels", "8", "--grow-from", run16], "another shape"),
             ([*nested, "--base-channels", "8", "--grow-from", run16, "--dry-run"], "another shape"),
             *[([*nested, "--grow-from", tmp_path / name], "not the inner network") for name in others],
             ([*nested, "--grow-from", ""], "--grow-from is empty"), ([*nested, "--outer-channels", "8,16/",
                                                                       "--outer-blocks", "1,1/"], "a width or more"),
             ([*nested, "--size", "64", "--grow-from", run16], "is of 16x16, the inner levels are 32x32"),
             ([*nested, "--noise-d", "64", "--grow-from", run16], "its schedule is another"),
             ([*TINY, "--out", tmp_path / "new", "--grow-from", run16], "--outer-channels is empty"),
             ([*nested, "--outer-blocks", "1"], "--outer-blocks 1: want a number of blocks for each width"),
             ([*nested, "--outer-channels", "8,x"], "--outer-channels 8,x: want whole numbers"),
             ([*nested, "--level-weights", "1"], "2 levels"), ([*nested, "--mixed-ratio", "1:0"], "--mixed-ratio 1:0"),
             ([*nested, "--mixed-ratio", "1:1:1"], "2 levels"), ([*nested, "--mixed-ratio", "1:9"], "highest level"),
             ([*nested, "--size", "33"], "does not divide"), ([*nested, "--level-power", "-1"], "between 0 and 4"),
             ([*nested, "--patching", "dwt_1"], "32x32 is not below 32x32"),
             ([*nested, "--multiscale", "32"], "lowest level, 16")]
    for args, wanted in cases:
        status, line = run_here(T, args)
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
    status, line = run_here(P, [run16, "--levels"])
    assert status == 2 and "not of a nested model" in line
    assert not os.path.exists(tmp_path / "new")


def test_three_levels_cost_what_they_should():
    """MDM 3.2: the 1024 level adds almost no parameters. Kills: widths of the inner network used outside."""
    rows = N.cost_of_levels(C.PRESETS["mdm1024"])
    assert [size for size, _, _ in rows] == [(1024, 1024), (256, 256), (64, 64)]
    total = sum(p for _, p, _ in rows)
    assert rows[0][1] < 0.01 * total and rows[1][1] < 0.04 * total and rows[2][1] > 0.95 * total
