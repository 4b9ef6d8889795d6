"""Laws of cascade.py (trap 11), alone and through train.py, sample.py and evaluate.py."""
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import cascade as K
import config as C
import data as D
import evaluate as E
from plumbing import UserError, features as X
from plumbing.settings import override
import sample as P
import schedule as S
import train as T
from programs import TINY, run_here
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
    """Kills: a stride, or bilinear without antialiasing, which keeps noise that an average removes."""
    x = normal(2, 3, 16, 32)
    assert_close(K.downsample(x, (4, 8)), x.reshape(2, 3, 4, 4, 8, 4).mean((3, 5)))
    for size in ((5, 8), (4, 16)):
        with pytest.raises(ValueError, match="does not come down"):
            K.downsample(x, size)


def test_no_noise_and_no_blur_leave_the_plain_upsampled_image_to_the_bit():
    """s at its clean end. Kills: alpha_0 a little below 1; a kernel that does not end at the identity."""
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
    """3.1. Kills: a kernel that is not normalised, one sigma for the batch, channels mixed, blur on all or none."""
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


def test_noise_has_the_level_that_is_told_and_each_example_its_own():
    """Told = measured. Kills: one s for the batch, the level of another schedule, t told for log-SNR."""
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
    """CDM: smooth on the fine grid. Kills: noise after up-sampling, which is white there."""
    z, _ = K.augment(torch.zeros(64, 3, 8, 8), torch.full((64,), 0.9), normal(64, 3, 8, 8), LOW_SCHEDULE,
                     torch.zeros(3, 64))
    seen, model = [], small_sr()
    model.network.input.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.zeros(64, 3, 16, 16), torch.zeros(64), {"low_res": z})
    power = torch.fft.fft2(seen[0][:, 3:]).abs().square().mean((0, 1))
    assert power[4:13, 4:13].mean() < 0.02 * power[:3, :3].mean()         # high frequencies over low ones


# ---- the model

@pytest.mark.parametrize("make", [small_unet, small_uvit])
def test_every_condition_of_the_super_resolution_model_matters(make):
    """Kills: the level never shown to the network; the low-res image or the class forgotten; "none" taken for s = 0."""
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


def test_loss_sees_the_augmented_image_and_its_level():
    seen = []

    def model(z, logsnr, cond):
        seen.append((z, logsnr, cond))
        return torch.zeros_like(z)
    x, eps, t = normal(2, 3, 16, 16), normal(2, 3, 16, 16, seed=1), torch.tensor([0.2, 0.7])
    low, level = normal(2, 3, 8, 8), torch.tensor([1.0, torch.inf])
    loss = K.super_resolution_loss(model, x, low, level, {"label": t}, t, eps, S.logsnr_cosine, T.prediction_loss)
    (z, logsnr, cond), = seen
    assert_close(z, S.diffuse(x, eps, S.logsnr_cosine(t)))
    assert set(cond) == {"label", "low_res", "aug_logsnr"} and cond["low_res"] is low and cond["aug_logsnr"] is level
    assert_close(loss, T.simple_loss(lambda *a: torch.zeros_like(x), x, {}, t, eps, S.logsnr_cosine))


# ---- from stage to stage

class Gaussian(torch.nn.Module):
    """E[x | z] for x ~ N(0.5, 0.3^2), as v."""

    def forward(self, z, logsnr, cond):
        alpha, sigma = S.alpha_sigma_for(z, logsnr)
        gain = alpha * 0.09 / (alpha ** 2 * 0.09 + sigma ** 2)
        return S.v_from_x(z, 0.5 + gain * (z - alpha * 0.5), logsnr)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_truncated_has_the_law_of_renoised_when_the_lower_stage_is_perfect(sampler):
    """z_s ~ N(alpha_s m, alpha_s^2 v + sigma_s^2) either way. Kills: stopping one step early or late, a z_s that is
    denoised before it is handed over, the fresh noise forgotten."""
    config = override(C.Config(), size=(4,), schedule="cosine", sample_steps=64, sampler=sampler, clip_x="none",
                        num_classes=0)
    for s in (0.25, 0.6):
        level = S.logsnr_cosine(torch.tensor(s))
        alpha, sigma = S.alpha_sigma(level)
        seeds = list(range(1500))
        draw = lambda **kw: P.sample_run(Gaussian(), config, [-1] * 1500, seeds, torch.device("cpu"), "float32", **kw)
        stopped, whole = draw(batch=500, stop=s), draw(batch=500)
        noise = P.handoff_noise(whole.shape, seeds, 1)
        for handoff, image in (("truncated", stopped), ("renoised", whole)):
            z, told = K.hand_over(image, handoff, s, S.logsnr_cosine, noise)
            assert_close(told, level.expand(1500))
            assert float(z.mean()) == pytest.approx(float(alpha) * 0.5, abs=0.01)
            assert float(z.var()) == pytest.approx(float(alpha ** 2 * 0.09 + sigma ** 2), rel=0.04)
    with pytest.raises(ValueError, match="want one of truncated"):
        K.hand_over(whole, "raw", 0.1, S.logsnr_cosine, noise)


def test_guidance_drops_the_label_and_keeps_the_low_res_image():
    """Kills: guidance away from "no low-res image at all", which no model has learnt."""
    seen = []

    def model(z, logsnr, cond):
        seen.append(cond)
        return torch.zeros_like(z)
    cond = {"label": torch.tensor([1]), "low_res": torch.ones(1, 3, 2, 2), "aug_logsnr": torch.tensor([0.5])}
    P.sample(model, S.logsnr_cosine, cond, (3, 4, 4), [0], 1, guidance=2.0)
    assert seen[0] is cond and set(seen[1]) == {"low_res", "aug_logsnr"}


def test_handoff_noise_is_a_function_of_the_image_s_seed():
    whole = P.handoff_noise((3, 3, 4, 4), [5, 6, 7], 1)
    assert torch.equal(whole[1:], P.handoff_noise((2, 3, 4, 4), [6, 7], 1))
    assert not torch.equal(whole, P.handoff_noise((3, 3, 4, 4), [5, 6, 7], 2))
    assert abs(P.handoff_noise((400, 3, 4, 4), range(400), 1).var() - 1) < 0.05
    first = torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (5, 6, 7)])
    assert (whole - first).abs().amax((1, 2, 3)).min() > 0.5              # not the noise that the image began as


# ---- the programs

@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Tiny runs of 16, 32 and 64 pixels."""
    folder = tmp_path_factory.mktemp("cascade")
    for name, size, low in (("a", 16, None), ("b", 32, 16), ("c", 64, 32)):
        low = ["--low-size", low, "--aug-blur", "0.5"] if low else []
        assert run_here(T, [*TINY, "--size", size, *low, "--steps", "2", "--out", folder / name]) == (None, "")
    return folder


def test_training_and_sampling_show_the_model_images_of_one_range(chain, tmp_path, monkeypatch):
    """Trap 11. Kills: low-res images normalised twice, or handed over as 0..255 or 0..1."""
    ranges = []
    forward = K.SuperResolutionUNet.forward
    monkeypatch.setattr(K.SuperResolutionUNet, "forward", lambda self, z, logsnr, cond: ranges.append(
        (cond["low_res"].min().item(), cond["low_res"].max().item())) or forward(self, z, logsnr, cond))
    assert run_here(T, [*TINY, "--size", "32", "--low-size", "16", "--aug-noise", "0", "--steps", "1", "--out",
                        tmp_path / "r"]) == (None, "")
    assert run_here(P, [chain / "a", chain / "b", "--handoff", "clean", "--labels", "A,B", "--out", tmp_path / "s.png",
                        "--device", "cpu"]) == (None, "")
    assert len(ranges) > 3
    for low, high in ranges:
        assert -1.001 <= low < -0.5 and 0.3 < high <= 1.001


def test_a_chain_draws_all_its_stages(chain, tmp_path):
    out, gif = tmp_path / "s.png", tmp_path / "s.gif"
    runs = [chain / name for name in "abc"]
    common = ["--labels", "A,7", "--n", "3", "--out", out, "--device", "cpu"]
    pictures = []
    for args in (["--handoff", "renoised", "--s", "0.3"], ["--handoff", "renoised", "--s", "0.6", "--s", "0.3"],
                 ["--handoff", "truncated", "--s", "0.3"], ["--handoff", "clean"]):
        assert run_here(P, [*runs, *common, *args]) == (None, "")
        pictures.append(np.asarray(Image.open(out)))
        assert pictures[-1].shape[0] == 2 * 64 and pictures[-1].shape[1] >= 3 * 3 * 64      # low and high side by side
    assert len({picture.tobytes() for picture in pictures}) == 4
    assert run_here(P, [*runs, *common, "--handoff", "truncated", "--s", "0.3", "--gif", gif, "--steps",
                        "2,3,1", "--guidance", "3,1,1", "--sampler=ddpm"]) == (None, "")
    picture, film = Image.open(out), Image.open(gif)
    assert picture.width >= 3 * 3 * 64 and film.size == picture.size and film.n_frames == 4     # 1 + 2 + 1


def test_numbers_for_the_augmentation_are_a_function_of_seed_step_and_place():
    """Trap 11: s per example. Kills: one s for the batch; other numbers in another split of the batch."""
    cpu = torch.device("cpu")
    whole = T.draw_augmentation(3, 5, range(500), cpu)
    assert whole.shape == (4, 500) and all(len(set(row.tolist())) > 490 for row in whole)
    assert torch.equal(whole[:, 200:], T.draw_augmentation(3, 5, range(200, 500), cpu))
    for other in ((4, 5), (3, 6)):
        assert (whole != T.draw_augmentation(*other, range(500), cpu)).float().mean() > 0.99
    assert (whole.mean(1) - 0.5).abs().max() < 0.05 and (torch.corrcoef(whole) - torch.eye(4)).abs().max() < 0.2


def test_the_loop_augments_by_the_low_schedule_and_the_settings(tmp_path, monkeypatch):
    """Kills: the schedule of the high resolution, settings that do not arrive, images in half precision."""
    seen, augment = [], T.augment

    def spy(low_res, s, noise, low_schedule, draws, *rest):
        out = augment(low_res, s, noise, low_schedule, draws, *rest)
        seen.append((low_res, s, noise, low_schedule, rest, out))
        return out
    monkeypatch.setattr(T, "augment", spy)
    assert run_here(T, [*TINY, "--size", "32", "--low-size", "16", "--steps", "1", "--batch", "8", "--aug-noise", "0.7",
                        "--aug-blur", "0.4", "--blur-low", "0.3", "--blur-high", "0.5", "--precision", "bf16", "--out",
                        tmp_path / "r"]) == (None, "")
    (low_res, s, noise, schedule, rest, out), = seen
    t = torch.linspace(0, 1, 9)
    assert_close(schedule(t), S.logsnr_shifted(t, 16, 32))
    assert rest == (0.7, 0.4, (0.3, 0.5)) and len(set(s.tolist())) == 8
    assert low_res.shape == noise.shape == (8, 3, 16, 16) and abs(noise.std() - 1) < 0.05
    assert out[0].dtype == torch.float32


def test_a_resumed_super_resolution_run_is_the_unbroken_one(tmp_path):
    """Trap 14. Kills: augmentation drawn from a state that no checkpoint holds."""
    settings = [*TINY, "--size", "32", "--low-size", "16", "--aug-blur", "0.5", "--save-every", "2"]
    for name, steps in (("whole", 4), ("parts", 2)):
        assert run_here(T, [*settings, "--steps", steps, "--out", tmp_path / name]) == (None, "")
    assert run_here(T, ["--resume", tmp_path / "parts", "--steps", "4", "--device", "cpu"]) == (None, "")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


def test_each_stage_of_a_chain_is_told_its_own_level(chain, tmp_path, monkeypatch):
    """Kills: the high schedule for the hand-over, one s for all, a stage that stops where another should."""
    handed, stops, hand_over, run = [], [], P.hand_over, P.sample_run

    def spy(low_res, handoff, s, low_schedule, noise):
        handed.append((s, low_schedule, hand_over(low_res, handoff, s, low_schedule, noise)))
        return handed[-1][2]
    monkeypatch.setattr(P, "hand_over", spy)
    monkeypatch.setattr(P, "sample_run", lambda *args, **kw: stops.append(kw["stop"]) or run(*args, **kw))
    assert run_here(P, [*(chain / name for name in "abc"), "--labels", "A", "--n", "2", "--handoff", "truncated", "--s",
                        "0.6", "--s", "0.3", "--out", tmp_path / "s.png", "--device", "cpu"]) == (None, "")
    assert stops == [0.6, 0.3, 0.0] and [s for s, _, _ in handed] == [0.6, 0.3]
    for (s, schedule, (_, level)), size in zip(handed, (16, 32)):
        want = S.logsnr_shifted(torch.tensor(s), size, 32)
        assert_close(level, want.expand(2))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_both_ways_of_upsampling(mode):
    model, seen, low_res = small_sr(), [], normal(1, 3, 8, 8)
    model.mode = mode
    model.network.input.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.zeros(1, 3, 16, 16), torch.zeros(1), {"low_res": low_res})
    assert_close(seen[0][:, 3:], F.interpolate(low_res, HIGH, mode=mode, align_corners=False))
    config = override(C.PRESETS["glyphs64_sr"], low_upsample=mode)
    with torch.device("meta"):
        assert C.build_model(config).mode == mode


def test_real_low_res_images_are_each_class_s_own(tmp_path):
    """Kills: a cursor for all classes, which gives the first images of a class again and again; grey without a word."""
    for i in range(12):
        path = tmp_path / f"c{i // 4}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(path)
    (tmp_path / "c1" / "00.png").write_text("broken")
    config = override(C.PRESETS["glyphs64_sr"], size=(16,), low_size=(8,), class_names=("c0", "c1", "c2", "c3"))
    source, labels = D.ImageFolder(tmp_path, (16, 16)), [0, 1, 2] * 4 + [0]
    values = (T.real_low_res(source, config, labels)[:, 0, 0, 0] + 1) * 127.5 / 20
    assert [round(v) for v in values.tolist()] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, 0]
    assert len({round(float(v)) for v in T.real_low_res(source, config, [-1] * 12)[:, 0, 0, 0] * 100}) == 12
    with pytest.raises(UserError, match="no image of class c3"):
        T.real_low_res(source, config, [3])


def test_the_page_of_the_lecture_measures_what_is_told():
    low_res = normal(64, 3, 8, 8).clamp(-1, 1)
    for s in (0.2, 0.8):
        told, measured, upsampled = K.measured_snr(low_res, s, LOW_SCHEDULE, HIGH, torch.Generator().manual_seed(0))
        assert told == pytest.approx(float(LOW_SCHEDULE(torch.tensor(s)))) and measured == pytest.approx(told, abs=0.05)
        assert upsampled > measured + 0.3


def test_mistakes_of_a_chain(chain, tmp_path):
    a, b, c = (chain / name for name in "abc")
    state = torch.load(a / "checkpoint.pt", weights_only=True)
    for name, change in (("other", dict(noise_d=64)), ("classes", dict(class_names=["x"] * 36))):
        (tmp_path / name).mkdir()
        torch.save(dict(state, config=dict(state["config"], **change)), tmp_path / name / "checkpoint.pt")
    renoised = ["--handoff", "renoised", "--s", "0.2"]
    for name, share in (("never", 0), ("always", 1)):
        (tmp_path / name).mkdir()
        upper = torch.load(b / "checkpoint.pt", weights_only=True)
        torch.save(dict(upper, config=dict(upper["config"], aug_noise=share)), tmp_path / name / "checkpoint.pt")
    cases = [([a, tmp_path / "never", *renoised], "no noise on its low-res"), ([a, b], "say --handoff"),
             ([a, tmp_path / "always", "--handoff", "clean"], "no low-res images without noise"),
 ([a, b, "--handoff", "renoised"], "--s"), ([b], "cannot come first"),
             ([a, b, "--handoff", "none"], "truncated"), ([a, a, *renoised], "not a super-resolution model"),
             ([a, c, *renoised], "goes from 32x32"), ([tmp_path / "other", b, *renoised], "another schedule"),
             ([tmp_path / "classes", b, *renoised], "same classes"), ([a, "--s", "0.2"], "stages of a cascade"),
             ([a, b, "--handoff", "renoised", "--s", "1"], "less than 1"),
             ([a, b, "--handoff", "clean", "--s", "0.1"], "no noise"),
             ([a, b, *renoised, "--steps", "1,2,3"], "settings for 3 stages"),
             ([a, b, c, *renoised, "--s", "0.1", "--s", "0.4"], "once or 2 times")]
    for args, wanted in cases:
        status, line = run_here(P, [*args, "--device", "cpu"])
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
    for args, wanted in [(["--low-size", "12"], "--low-size"), (["--low-size", "16,8"], "--low-size"),
                         (["--low-size", "8", "--patching", "none", "--outer-channels", "8,8", "--outer-blocks", "1,1"],
                          "nested"),
                         (["--aug-blur", "2"], "between 0 and 1"), (["--blur-high", "0.1"], "at least blur_low")]:
        status, line = run_here(T, [*TINY, *args, "--out", tmp_path / "new"])
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
    for args, wanted in [([b], "behind the stage below"), ([a, "--handoff", "clean"], "two runs of a cascade"),
                         ([a, b, "--handoff", "clean", "--s", "0.1"], "--s 0.1"), ([a, b], "behind the stage below"),
                         ([a, b, "--handoff", "renoised"], "say with --s"),
                         ([a, b, "--handoff", "clean", "--sweep", "s=0,0.1"], "want --handoff truncated or renoised"),
                         ([a, tmp_path / "never", "--handoff", "renoised", "--s", "0.1"], "no noise on its low-res"),
                         ([a, b, "--handoff", "renoised", "--sweep", "s=0,1"], "less than 1"),
                         ([a, b, *renoised, "--curve"], "not of a cascade"),
                         ([a, c, *renoised], "goes from 32x32")]:
        status, line = run_here(E, [*args, "--device", "cpu", "--n", "8"])
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)


def test_no_low_res_image_for_the_sheet_is_no_end_of_the_run(tmp_path):
    """A class of whose pictures none can be read. Kills: a run that dies at its first sheet, and when resumed again."""
    for name, whole in (("a/1", True), ("a/2", True), ("b/1", False)):
        path = tmp_path / "photos" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (200, 100, 0)).save(path)
        if not whole:
            path.write_bytes(path.read_bytes()[:60])
    assert run_here(T, [*TINY, "--low-size", 8, "--data", tmp_path / "photos", "--steps", 2, "--out", tmp_path / "r"]
                    ) == (None, "")
    assert (tmp_path / "r" / "checkpoint.pt").exists() and not list((tmp_path / "r").glob("samples_*.png"))


def test_the_search_for_s_draws_the_low_res_images_once(chain, monkeypatch):
    """3.3, the reason for renoising. Kills: s that changes nothing; real low-res images that are the made ones."""
    trained, train = X.Yardstick.trained, X.train_glyph_net
    monkeypatch.setattr(X.Yardstick, "trained", lambda self, config: dict(trained(self, config, 64, 36), accuracy=0.99))
    monkeypatch.setattr(X, "train_glyph_net", lambda images, answers, heads: train(images, answers, heads, 3, 32))
    drawn, run = [], E.sample_run
    monkeypatch.setattr(E, "sample_run", lambda model, config, labels, *rest, **kw: drawn.append(
        (config.size[0], kw.get("stop", 0), kw.get("low_res"))) or run(model, config, labels, *rest, **kw))
    common = [chain / "a", chain / "b", "--n", "24", "--n-real", "40", "--device", "cpu"]
    assert run_here(E, [*common, "--handoff", "renoised", "--sweep", "s=0,0.5"]) == (None, "")
    assert [size for size, *_ in drawn] == [16, 32, 32, 32, 32]  # the low stage once; made and real, two levels
    levels = [low_res[1][0].item() for _, _, low_res in drawn[1:]]
    assert levels[0] == levels[1] == math.inf and levels[2] == levels[3] < 10
    assert_close(drawn[3][2][1], S.logsnr_shifted(torch.tensor(0.5), 16, 32).expand(24))
    assert all(0.3 < low_res[0].abs().max() <= 1 for _, _, low_res in drawn[1:3])                # images in [-1, 1]
    rows = json.loads((chain / "b" / "sweep_s_renoised.json").read_text())["rows"]
    assert [(row["s"], row["low_res"]) for row in rows] == [(0, "made"), (0, "real"), (0.5, "made"), (0.5, "real")]
    assert len({row["fd_train"] for row in rows}) == 4
    Image.open(chain / "b" / "sweep_s_renoised.png").load()
    drawn.clear()
    assert run_here(E, [*common, "--handoff", "truncated", "--s", "0.4", "--metrics", "fd"]) == (None, "")
    assert [(size, stop) for size, stop, _ in drawn] == [(16, 0.4), (32, 0)]
    assert json.loads((chain / "b" / "evaluation.json").read_text())["handoff"] == "truncated"
    monkeypatch.setattr(X, "MIN_ACCURACY", 1.0)                           # no letter can be read: no picture of it
    (chain / "b" / "sweep_s_renoised.png").unlink()
    assert run_here(E, [*common, "--handoff", "renoised", "--sweep", "s=0.5", "--metrics", "read"]) == (None, "")
    assert not (chain / "b" / "sweep_s_renoised.png").exists()


def test_each_stage_is_drawn_in_its_own_precision(monkeypatch):
    seen = []
    monkeypatch.setattr(P, "sample_run", lambda model, config, labels, seeds, device, precision, *_, **__: seen.append(
        precision) or torch.zeros(len(labels), 3, *config.size))
    stages = [C.PRESETS["glyphs16"], C.PRESETS["glyphs64_sr"]]
    P.sample_chain([None, None], stages, [0], [0], torch.device("cpu"), ["float32", "bf16"], "clean")
    assert seen == ["float32", "bf16"]


def test_settings_are_for_both_stages(chain, monkeypatch):
    """As in sample.py. Kills: --steps that reaches the upper stage alone."""
    asked, run = [], E.sample_run
    monkeypatch.setattr(E, "sample_run", lambda model, config, *rest, **kw: asked.append(
        (config.size[0], config.sample_steps, config.sampler)) or run(model, config, *rest, **kw))
    assert run_here(E, [chain / "a", chain / "b", "--n", "8", "--device", "cpu", "--handoff", "clean", "--steps", "3",
                        "--sampler", "ddpm", "--metrics", "none", "--export", chain / "x.npz"]) == (None, "")
    assert asked == [(16, 3, "ddpm"), (32, 3, "ddpm")]
    asked.clear()
    assert run_here(E, [chain / "a", chain / "b", "--n", "8", "--device", "cpu", "--handoff", "clean", "--steps=1,2",
                        "--metrics", "none", "--export", chain / "x.npz"]) == (None, "")
    assert [steps for _, steps, _ in asked] == [1, 2]
    status, line = run_here(E, [chain / "a", chain / "b", "--handoff", "clean", "--steps", "1,2,3"])
    assert status == 2 and "the two runs of a cascade" in line and line.count("\n") == 1


def test_presets_of_cdm():
    """FACTS B 2.5, as notes give it."""
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
    P.check_chain([p["cdm32"], p["cdm64_sr"], p["cdm256_sr"]], ["32", "64", "256"])
    P.check_chain([p["glyphs16"], p["glyphs64_sr"]], ["16", "64"])
    assert D.Glyphs((16, 16)).classes == D.Glyphs((64, 64)).classes
