"""The laws of nested_unet.py."""
import functools
import math
import os
import runpy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import config as C
import nested_unet as N
import sample as P
import schedule as S
import train as T
import unet
from plumbing import pictures, start
from programs import ROOT
from test_models import small_unet, small_uvit, stir

SIZES = [(32, 32), (16, 16)]


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
    """Kills: k between neighbours instead of k over the lowest level, another logarithm, the wrong sign."""
    t = torch.linspace(0, 1, 51)
    schedules = N.level_schedules(S.logsnr_cosine, [(256, 256), (128, 128), (32, 32)], power)
    for schedule, k in zip(schedules, (8, 4, 1)):
        assert_close(S.logsnr_cosine(t) - schedule(t), torch.full_like(t, power * math.log(k)), atol=1e-4, rtol=0)


def test_power_two_is_simple_diffusions_shift():
    """Kills: k as a ratio of areas, and not of sides."""
    base = lambda t: S.logsnr_shifted(t, 64, 32)
    t = torch.linspace(0, 1, 11)
    for schedule, d in zip(N.level_schedules(base, [(1024, 1024), (256, 256), (64, 64)]), (1024, 256, 64)):
        assert_close(schedule(t), S.logsnr_shifted(t, d, 32), atol=1e-4, rtol=0)
    top = N.level_schedules(lambda t: S.logsnr_shifted(t, 16, 32), [(32, 64), (8, 16)])  # not square: k = 4
    assert float(top[1](torch.tensor(0.5)) - top[0](torch.tensor(0.5))) == pytest.approx(2 * math.log(4))


def test_snr_of_the_pooled_image_agrees_across_levels_measured_on_noise():
    """All levels, averaged to the lowest one, have the same SNR at power 2 and only there. Kills: half the shift."""
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
    """Kills: noise of the low level that is the average of the high level's noise (with or without its factor k)."""
    _, (high, low), _ = T.draw(0, 0, range(64), [(3, 64, 64), (3, 16, 16)], torch.device("cpu"))
    pooled = F.avg_pool2d(high, 4)
    assert pooled.std() == pytest.approx(1 / 4, rel=0.02) and low.std() == pytest.approx(1, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([pooled.flatten(), low.flatten()]))[0, 1]) < 0.02


# ---- the network

@pytest.mark.parametrize("make", [small_unet, small_uvit])
def test_one_level_is_the_plain_model_to_the_bit(make):
    """simple diffusion is the case R = 1: same network output, loss, gradients and samples."""
    inner = stir(make()).eval()
    nested = N.NestedUNet(inner)
    x, t, eps = torch.rand(2, 3, 16, 16) * 2 - 1, torch.tensor([0.2, 0.8]), torch.randn(2, 3, 16, 16)
    cond = {"label": torch.tensor([1, -1])}
    assert torch.equal(nested([eps], [t], cond)[0], inner(eps, t, cond))
    for kind in ("eps_mse", "v_mse"):
        measure = functools.partial(T.prediction_loss, loss=kind)
        losses = [T.simple_loss(inner, x, cond, t, eps, S.logsnr_cosine, measure),
                  N.nested_loss(nested, [x], cond, t, [eps], N.level_schedules(S.logsnr_cosine, [(16, 16)]), measure)]
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
    """At two and three levels, to the bit. Kills: adapters that do not start at zero, the outer level's log-SNR or
    condition in the inner network, an f that rescales the inner input."""
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
    """Return a table (R, R): whether output i depends on input j."""
    z = [a.requires_grad_() for a in noises(sizes, 1)]
    outputs = model(z, [torch.zeros(1)] * len(sizes), {})
    return [[bool(g is not None and g.abs().sum() > 0) for g in torch.autograd.grad(
        v.square().sum(), z, retain_graph=True, allow_unused=True)] for v in outputs]


def test_every_level_sees_every_other_after_one_step_and_none_before():
    """Kills: a missing adapter, a link in one direction only, adapters that stay at zero because both start there."""
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


def test_the_innermost_network_embeds_the_condition_once_for_all_levels(monkeypatch):
    """Kills: a table of classes at every level; a level that gets the class only through its adapters."""
    model, calls = three_levels(), []
    whole = N.innermost(model).embed.of_cond
    monkeypatch.setattr(N.innermost(model).embed, "of_cond", lambda *args: calls.append(args) or whole(*args))
    model(noises(model.sizes), [torch.zeros(2)] * 3, {"label": torch.tensor([1, 2])})
    assert len(calls) == 1
    assert all(nested.outer.embed.label is None for nested in (model, model.inner))
    stir(model).eval()
    for nested in (model, model.inner):                                   # adapters at zero: no level hears another
        for adapter in (nested.in_adapter, nested.out_adapter):
            torch.nn.init.zeros_(adapter.weight), torch.nn.init.zeros_(adapter.bias)
    z, logsnr = noises(model.sizes), [torch.zeros(2)] * 3
    one, other = (model(z, logsnr, {"label": torch.tensor([c, c])}) for c in (1, 2))
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(one, other))


def test_levels_that_do_not_fit_are_named():
    """Kills: an error deep in a convolution; sizes that work only for squares."""
    with pytest.raises(ValueError, match=r"coarsest map of the 64x64 level is \(32, 32\)"):
        nest(small_uvit(), (64, 64))
    with pytest.raises(ValueError, match="has 2 levels, got 1 images"):
        nest(small_uvit())([torch.zeros(1, 3, 32, 32)], [torch.zeros(1)], {})
    model = nest(small_unet(size=(16, 24)), (32, 48))                     # not square
    assert [v.shape[-2:] for v in model(noises(model.sizes), [torch.zeros(2)] * 2, {})] == [(32, 48), (16, 24)]


# ---- the loss

def test_loss_is_the_weighted_sum_of_the_levels_and_eps_is_gamma_times_v():
    """Eq. 3. Kills: sums instead of means, weights in the wrong order, one alpha for all levels."""
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
    """Kills: a high-level loss divided by the whole batch; an f that reaches rows without a high level."""
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
    """The best denoiser of x ~ N(0, C), four pixels in a square, and of their average. It sees both levels."""
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
    """Kills: alpha and sigma of one level for both, one schedule for all, shared noise, a level that finishes first."""
    root = torch.tensor([[0.5, 0, 0, 0], [0.3, 0.4, 0, 0], [0.1, 0.2, 0.5, 0], [-0.2, 0.1, 0.1, 0.3]])
    oracle = GaussianOracle(root @ root.T)
    schedules = N.level_schedules(S.logsnr_cosine, [(2, 2), (1, 1)])
    high, low = P.sample_levels(oracle, schedules, {}, [(1, 2, 2), (1, 1, 1)], range(6000), 128, sampler, clip="none")
    want = oracle.down @ oracle.covariance @ oracle.down.T
    got = torch.cov(torch.cat([high.flatten(1), low.flatten(1)], 1).double().T)
    assert (got - want).abs().max() < 0.03


def test_all_levels_are_guided_clipped_and_start_from_noises_of_their_own():
    """Kills: guidance, clipping or the initial noise of one level only; a call of the network for each level."""
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


# ---- growing

def test_growing_keeps_the_inner_network_and_refuses_what_does_not_fit():
    """Kills: loading only the keys that match, without a word; overwritten adapters or outer levels."""
    inner, model = stir(small_uvit(), 5).eval(), nest(small_uvit()).eval()
    N.grow(model, inner.state_dict())
    z, logsnr = noises(SIZES), [torch.zeros(2)] * 2
    assert torch.equal(model(z, logsnr, {})[1], inner(z[1], logsnr[1], {}))
    state = inner.state_dict()
    del state["position"]
    state["extra"] = torch.zeros(1)
    state["output.conv.bias"] = torch.zeros(7)
    with pytest.raises(RuntimeError, match="position"):
        N.grow(model, state)
    with pytest.raises(ValueError, match=r"missing: position; in excess: extra; .*conv.bias \(7,\) .* for \(3,\)"):
        start.check_inner(model, state)


# ---- the page of the lecture

def test_the_page_builds_the_presets():
    """Kills: other widths or counts, the end points of another schedule, dropout in an outer level."""
    with torch.device("meta"):
        pairs = [(N.mdm1024(), C.build_model(C.PRESETS["mdm1024"])),
                 (N.glyphs64_nested(), C.build_model(C.PRESETS["glyphs64_nested"]))]
    ends = lambda model: [end for module in model.modules() if isinstance(module, unet.Embedding)
                          for end in (module.logsnr_min, module.logsnr_max)]
    for page, preset in pairs:
        assert str(page) == str(preset)                                   # every layer, its size and its dropout
        shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (page, preset)]
        assert shapes[0] == shapes[1] and page.sizes == preset.sizes
        assert ends(page) == pytest.approx(ends(preset), abs=1e-4)


def test_the_page_prints_that_the_1024_level_adds_almost_no_parameters(tmp_path, monkeypatch, capsys):
    """MDM 3.2. Kills: widths of the inner network used outside; a nest that counts as its outer level alone."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(os.path.join(ROOT, "nested_unet.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: [float(number.strip("%")) for number in line[1:]] for line in lines if len(line) == 5}
    assert list(rows) == ["1024x1024", "256x256", "64x64", "16x16"]      # the last size of mdm1024 is the first of ours
    assert lines[1:5] == [["level", "parameters,", "M", "forward", "pass", "of", "one", "image,", "GFLOP"],
                          ["1024x1024", "2.90", "0.8%", "298.4", "40.9%"],
                          ["256x256", "12.17", "3.5%", "145.4", "19.9%"],
                          ["64x64", "334.59", "95.7%", "285.7", "39.2%"]]
    assert rows["64x64"] == [0.71, 14.3, 0.3, 40.9] and rows["16x16"] == [4.28, 85.7, 0.5, 59.1]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"nested_levels.png", "nested_unet.png"}
