"""The laws of cascade.py."""
import math
import os
import runpy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import cascade as K
import config as C
import data as D
import sample as P
import schedule as S
import train as T
from plumbing.sampling import check_chain
from plumbing.settings import override
from programs import ROOT
from test_models import small_unet, small_uvit, stir

LOW, HIGH = (8, 8), (16, 16)
LOW_SCHEDULE = lambda t: S.logsnr_shifted(t, 8, 32)


def small_sr(make=small_unet, **kw):
    torch.manual_seed(0)
    return K.SuperResolutionUNet(make(in_channels=6, **kw), LOW, (-12.0, 18.0), 16)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the augmentations

def test_low_res_training_image_is_the_average():
    """Kills: a stride, or bilinear without antialiasing. Both keep noise that an average removes."""
    x = normal(2, 3, 16, 32)
    assert_close(K.downsample(x, (4, 8)), x.reshape(2, 3, 4, 4, 8, 4).mean((3, 5)))
    for size in ((5, 8), (4, 16)):
        with pytest.raises(ValueError, match="does not come down"):
            K.downsample(x, size)


def test_no_noise_and_no_blur_leave_the_plain_upsampled_image_to_the_bit():
    """Kills: an alpha a little below 1 for "no noise"; a blur that changes the image at sigma 0."""
    x, noise, model = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1), small_sr()
    draws = torch.rand(3, 2)
    low_res, level = K.augment(x, torch.rand(2), noise, LOW_SCHEDULE, draws, aug_noise=0.0, aug_blur=0.0)
    assert torch.equal(low_res, x) and torch.isposinf(level).all()
    for handoff, s in (("clean", 0.0), ("renoised", 0.0), ("truncated", 0.0)):
        handed, level = K.hand_over(x, handoff, s, LOW_SCHEDULE, noise)
        assert torch.equal(handed, x) and torch.isposinf(level).all()
    seen = []
    model.network.input.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(normal(2, 3, 16, 16), torch.zeros(2), {"low_res": low_res, "aug_logsnr": level})
    assert torch.equal(seen[0][:, 3:], F.interpolate(x, HIGH, mode="bilinear", align_corners=False))
    assert_close(K.blur_augment(x, torch.zeros(2)), x)


def test_blur_is_the_three_by_three_gaussian_on_half_of_the_examples():
    """3.1. Kills: a kernel that is not normalised, one sigma for the batch, mixed channels, blur on all or none."""
    x, sigma = normal(3, 2, 6, 5), torch.tensor([0.4, 0.6, 5.0])
    got = K.blur_augment(x, sigma)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    for b in range(3):
        weights = [[math.exp(-(i * i + j * j) / (2 * float(sigma[b]) ** 2)) for j in (-1, 0, 1)] for i in (-1, 0, 1)]
        total = sum(map(sum, weights))
        want = sum(weights[i][j] / total * padded[b, :, i:i + 6, j:j + 5] for i in range(3) for j in range(3))
        assert_close(got[b], want)
    draws = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0))
    x = normal(1, 3, 4, 4).expand(4000, 3, 4, 4)
    out, _ = K.augment(x, draws[0], x, LOW_SCHEDULE, draws, aug_noise=0.0, aug_blur=0.5)
    same = (out == x).flatten(1).all(1)
    assert 0.45 < same.float().mean() < 0.55
    most, least = (K.blur_augment(x[:1], torch.tensor([s])) for s in (0.6, 0.4))
    away = (out - x).flatten(1).norm(dim=1)[~same]
    assert away.max() < (most - x[:1]).norm() + 1e-4 and away.min() > (least - x[:1]).norm() - 1e-4


def test_noise_has_the_level_that_the_model_is_given_and_each_example_has_its_own():
    """Measured = given. Kills: one s for the batch, the level of another schedule, t given for log-SNR."""
    n = 6
    x, s = normal(1, 3, 8, 8).expand(n, 3, 8, 8), torch.linspace(0.05, 0.95, n)
    many, level = [], None
    for seed in range(40):
        z, level = K.augment(x, s, normal(n, 3, 8, 8, seed=seed), LOW_SCHEDULE, torch.zeros(3, n))
        many.append(z)
    assert_close(level, LOW_SCHEDULE(s))
    assert len(set(level.tolist())) == n
    many, alpha = torch.stack(many), torch.sigmoid(level).sqrt()
    for i in range(n):
        measured = math.log(float(alpha[i]) ** 2 / float((many[:, i] - alpha[i] * x[i]).var()))
        assert measured == pytest.approx(float(level[i]), abs=0.08)
    _, level = K.augment(x, s, x, LOW_SCHEDULE, torch.rand(3, n), aug_noise=0.0)
    assert torch.isposinf(level).all()
    draws = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0))
    _, level = K.augment(normal(4000, 1, 1, 1), draws[0], normal(4000, 1, 1, 1), LOW_SCHEDULE, draws, aug_noise=0.9)
    assert 0.88 < torch.isfinite(level).float().mean() < 0.92


def test_noise_is_added_before_upsampling():
    """The noise is smooth on the fine grid. Kills: noise after up-sampling, which is white there."""
    z, _ = K.augment(torch.zeros(64, 3, 8, 8), torch.full((64,), 0.9), normal(64, 3, 8, 8), LOW_SCHEDULE,
                     torch.zeros(3, 64))
    seen, model = [], small_sr()
    model.network.input.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.zeros(64, 3, 16, 16), torch.zeros(64), {"low_res": z})
    power = torch.fft.fft2(seen[0][:, 3:]).abs().square().mean((0, 1))
    assert power[4:13, 4:13].mean() < 0.02 * power[:3, :3].mean()         # high frequencies over low ones


def test_numbers_for_the_augmentation_are_a_function_of_seed_step_and_place():
    """Kills: one s for the batch; other numbers if the batch is split in another way."""
    cpu = torch.device("cpu")
    whole = T.draw_augmentation(3, 5, range(500), cpu)
    assert whole.shape == (4, 500) and all(len(set(row.tolist())) > 490 for row in whole)
    assert torch.equal(whole[:, 200:], T.draw_augmentation(3, 5, range(200, 500), cpu))
    for other in ((4, 5), (3, 6)):
        assert (whole != T.draw_augmentation(*other, range(500), cpu)).float().mean() > 0.99
    assert (whole.mean(1) - 0.5).abs().max() < 0.05 and (torch.corrcoef(whole) - torch.eye(4)).abs().max() < 0.2


# ---- the model

@pytest.mark.parametrize("make", [small_unet, small_uvit])
def test_every_condition_of_the_super_resolution_model_matters(make):
    """Kills: a network that ignores the level, the low-res image or the class; the level at s = 0 for "none"."""
    model = stir(small_sr(make)).eval()
    z, logsnr = normal(2, 3, 16, 16), torch.zeros(2)
    low_res, level = normal(2, 3, 8, 8, seed=1), torch.tensor([2.0, 2.0])
    cond = {"label": torch.tensor([1, 1]), "low_res": low_res, "aug_logsnr": level}
    v = model(z, logsnr, cond)
    for other in (dict(cond, aug_logsnr=torch.tensor([2.0, -3.0])), dict(cond, label=torch.tensor([1, 2])),
                  dict(cond, aug_logsnr=torch.tensor([2.0, torch.inf])),
                  dict(cond, low_res=torch.stack([low_res[0], 0.5 * low_res[1]]))):
        changed = (model(z, logsnr, other) - v).abs().amax((1, 2, 3))
        assert changed[0] < 1e-4 < 1e-3 < changed[1]                      # example by example
    none = {k: cond[k] for k in ("label", "low_res")}
    assert torch.equal(model(z, logsnr, none), model(z, logsnr, dict(none, aug_logsnr=torch.full((2,), torch.inf))))
    clean = model(z, logsnr, dict(none, aug_logsnr=torch.full((2,), 18.0)))
    assert (model(z, logsnr, none) - clean).abs().max() > 1e-3
    model(z, logsnr, dict(cond, aug_logsnr=torch.tensor([2.0, torch.inf]))).sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in unused if not name.endswith("norm_k.bias")]
    with pytest.raises(ValueError, match="goes from 8x8, got a low-res image of 4x4"):
        model(z, logsnr, dict(cond, low_res=torch.zeros(2, 3, 4, 4)))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_both_ways_of_upsampling(mode):
    """Kills: a mode that is ignored, or that does not arrive from the settings."""
    model, seen, low_res = small_sr(), [], normal(1, 3, 8, 8)
    model.mode = mode
    model.network.input.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.zeros(1, 3, 16, 16), torch.zeros(1), {"low_res": low_res})
    assert_close(seen[0][:, 3:], F.interpolate(low_res, HIGH, mode=mode, align_corners=False))
    config = override(C.PRESETS["glyphs64_sr"], low_upsample=mode)
    with torch.device("meta"):
        assert C.build_model(config).mode == mode


def test_loss_sees_the_augmented_image_and_its_level():
    """Kills: a loss that drops a condition, or noises by another schedule."""
    seen = []

    def model(z, logsnr, cond):
        seen.append((z, logsnr, cond))
        return torch.zeros_like(z)
    x, eps, t = normal(2, 3, 16, 16), normal(2, 3, 16, 16, seed=1), torch.tensor([0.2, 0.7])
    low, level = normal(2, 3, 8, 8), torch.tensor([1.0, torch.inf])
    config = override(C.PRESETS["glyphs64_sr"], size=HIGH, low_size=LOW, loss="eps_mse", precondition="none")
    loss = T.training_loss(config, model, x, dict(label=t, low_res=low, aug_logsnr=level), t, [eps])
    (z, logsnr, cond), = seen
    assert_close(z, S.diffuse(x, eps, C.make_schedule(config)(t)))
    assert set(cond) == {"label", "low_res", "aug_logsnr"} and cond["low_res"] is low and cond["aug_logsnr"] is level
    assert_close(loss, T.simple_loss(lambda *a: torch.zeros_like(x), x, {}, t, eps, C.make_schedule(config)))


# ---- from stage to stage

class Gaussian(torch.nn.Module):
    """E[x | z] for x ~ N(0.5, 0.3^2), as v."""

    def forward(self, z, logsnr, cond):
        alpha, sigma = S.alpha_sigma_for(z, logsnr)
        gain = alpha * 0.09 / (alpha ** 2 * 0.09 + sigma ** 2)
        return S.v_from_x(z, 0.5 + gain * (z - alpha * 0.5), logsnr)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_truncated_has_the_law_of_renoised_when_the_lower_stage_is_perfect(sampler):
    """Both give z_s ~ N(alpha_s m, alpha_s^2 v + sigma_s^2). Kills: stopping one step early or late, a z_s that is
    denoised before the next stage gets it, no fresh noise."""
    config = override(C.Config(), size=(4,), schedule="cosine", sample_steps=64, sampler=sampler, clip_x="none",
                        num_classes=0)
    for s in (0.25, 0.6):
        level = S.logsnr_cosine(torch.tensor(s))
        alpha, sigma = S.alpha_sigma(level)
        seeds = list(range(1500))
        cpu = torch.device("cpu")
        stopped, whole = (P.sample_run(Gaussian(), config, {}, seeds, cpu, "float32", stop=stop) for stop in (s, 0.0))
        noise = P.handoff_noise(whole.shape, seeds, 1)
        for handoff, image in (("truncated", stopped), ("renoised", whole)):
            z, given = K.hand_over(image, handoff, s, S.logsnr_cosine, noise)
            assert_close(given, level.expand(1500))
            assert float(z.mean()) == pytest.approx(float(alpha) * 0.5, abs=0.01)
            assert float(z.var()) == pytest.approx(float(alpha ** 2 * 0.09 + sigma ** 2), rel=0.04)
    with pytest.raises(ValueError, match="want one of truncated"):
        K.hand_over(whole, "raw", 0.1, S.logsnr_cosine, noise)


def test_guidance_drops_the_label_and_keeps_the_low_res_image():
    """Kills: guidance that also drops the low-res image. No model learns to do without it."""
    seen = []

    def model(z, logsnr, cond):
        seen.append(cond)
        return torch.zeros_like(z)
    cond = {"label": torch.tensor([1]), "low_res": torch.ones(1, 3, 2, 2), "aug_logsnr": torch.tensor([0.5])}
    P.sample(model, S.logsnr_cosine, cond, (3, 4, 4), [0], 1, guidance=2.0)
    assert seen[0] is cond and set(seen[1]) == {"low_res", "aug_logsnr"}


def test_handoff_noise_is_a_function_of_the_image_s_seed():
    """Kills: noise that depends on the place in the batch; the same noise at two stages."""
    whole = P.handoff_noise((3, 3, 4, 4), [5, 6, 7], 1)
    assert torch.equal(whole[1:], P.handoff_noise((2, 3, 4, 4), [6, 7], 1))
    assert not torch.equal(whole, P.handoff_noise((3, 3, 4, 4), [5, 6, 7], 2))
    assert abs(P.handoff_noise((400, 3, 4, 4), range(400), 1).var() - 1) < 0.05
    first = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (5, 6, 7)])
    assert (whole - first).abs().amax((1, 2, 3)).min() > 0.5              # nor the noise that sampling starts from


# ---- the page of the lecture, and the presets

def test_the_page_measures_the_level_that_the_model_is_given():
    """Kills: a measurement after up-sampling, where the noise is weaker."""
    low_res = normal(64, 3, 8, 8).clamp(-1, 1)
    for s in (0.2, 0.8):
        given, measured, upsampled = K.measured_snr(low_res, s, LOW_SCHEDULE, HIGH, torch.Generator().manual_seed(0))
        assert given == pytest.approx(float(LOW_SCHEDULE(torch.tensor(s))))
        assert measured == pytest.approx(given, abs=0.05)
        assert upsampled > measured + 0.3


def test_the_page_prints_the_level_that_the_model_is_given(tmp_path, monkeypatch, capsys):
    """Kills: another schedule than that of glyphs64_sr's stage below; a level that is measured after up-sampling."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(os.path.join(ROOT, "cascade.py"), run_name="__main__")
    title, _, *rows, last = capsys.readouterr().out.splitlines()
    assert title.startswith("glyphs64_sr, 16x16 -> 64x64") and last == "wrote figures/cascade.png"
    schedule = C.make_low_schedule(C.PRESETS["glyphs64_sr"])
    for row, s in zip(rows, (0.1, 0.3, 0.5, 0.7, 0.9), strict=True):
        time, given, measured, upsampled = map(float, row.split())
        assert time == s and given == pytest.approx(float(schedule(torch.tensor(s))), abs=0.006)
        assert measured == pytest.approx(given, abs=0.02) and upsampled == pytest.approx(given + 0.77, abs=0.02)
    assert (tmp_path / "figures" / "cascade.png").exists()


def test_presets_of_cdm():
    """The settings of appendix B of the paper, as notes give them."""
    p = C.PRESETS
    for name, size, low, base, mult, blocks, attention, heads, batch, dropout in (
            ("cdm32", 32, (), 256, (1, 2, 3, 4), 6, (8, 16), 4, 2048, 0.1),
            ("cdm64_sr", 64, (32, 32), 256, (1, 2, 3, 4), 5, (8, 16), 4, 2048, 0.1),
            ("cdm128_sr", 128, (64, 64), 128, (1, 2, 4, 8, 8), 3, (16,), 1, 1024, 0.0),
            ("cdm256_sr", 256, (64, 64), 128, (1, 2, 4, 4, 8, 8), 3, (16,), 1, 1024, 0.0)):
        c = p[name]
        assert (c.size, c.low_size, c.base_channels, c.channel_mult) == ((size, size), low, base, mult)
        assert set(c.num_res_blocks) == {blocks} and len(c.num_res_blocks) == len(mult)
        assert (c.attn_resolutions, c.num_heads, c.batch, c.dropout, c.lr) == (attention, heads, batch, dropout, 1e-4)
        assert c.dropout == 0 or c.dropout_from_resolution >= size        # everywhere
    assert p["cdm256_sr"].aug_blur == 0.5 and (p["cdm256_sr"].blur_low, p["cdm256_sr"].blur_high) == (0.4, 0.6)
    assert p["cdm64_sr"].aug_noise > 0 == p["cdm64_sr"].aug_blur
    check_chain([p["cdm32"], p["cdm64_sr"], p["cdm256_sr"]], ["32", "64", "256"])
    check_chain([p["glyphs16"], p["glyphs64_sr"]], ["16", "64"])
    assert D.Glyphs((16, 16)).classes == D.Glyphs((64, 64)).classes
