"""Cascades through train.py, sample.py and evaluate.py: what each stage gets, resuming, mistakes in one line."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import cascade as K
import config as C
import data as D
import evaluate as E
import sample as P
import schedule as S
import train as T
from plumbing import UserError, drawing, features as X, training
from plumbing.settings import override
from programs import TINY, run_here


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Tiny runs of 16, 32 and 64 pixels."""
    folder = tmp_path_factory.mktemp("cascade")
    for name, size, low in (("a", 16, None), ("b", 32, 16), ("c", 64, 32)):
        low = ["--low-size", low, "--aug-blur", "0.5"] if low else []
        assert run_here(T, [*TINY, "--size", size, *low, "--steps", "2", "--out", folder / name]) == (None, "")
    return folder


def test_training_and_sampling_show_the_model_images_of_one_range(chain, tmp_path, monkeypatch):
    """Kills: low-res images that are normalised twice, or passed on as 0..255 or 0..1."""
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
    """Kills: a handoff or an s that changes nothing; settings of one stage for all."""
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


def test_the_loop_augments_by_the_low_schedule_and_the_settings(tmp_path, monkeypatch):
    """Kills: the schedule of the high resolution, ignored settings, images in half precision."""
    seen, augment = [], T.augment

    def spy(low_res, s, noise, low_schedule, draws, *rest):
        out = augment(low_res, s, noise, low_schedule, draws, *rest)
        seen.append((low_res, s, noise, low_schedule, rest, out))
        return out
    monkeypatch.setattr(T, "augment", spy)
    assert run_here(T, [*TINY, "--size", "32", "--low-size", "16", "--steps", "1", "--batch", "8", "--aug-noise", "0.7",
                        "--aug-blur", "0.4", "--blur-low", "0.3", "--blur-high", "0.5", "--precision", "bf16",
                        "--held-out-every", "0", "--out", tmp_path / "r"]) == (None, "")
    (low_res, s, noise, schedule, rest, out), = seen
    t = torch.linspace(0, 1, 9)
    assert_close(schedule(t), S.logsnr_shifted(t, 16, 32))
    assert rest == (0.7, 0.4, (0.3, 0.5)) and len(set(s.tolist())) == 8
    assert low_res.shape == noise.shape == (8, 3, 16, 16) and abs(noise.std() - 1) < 0.05
    assert out[0].dtype == torch.float32


def test_a_resumed_super_resolution_run_is_the_unbroken_one(tmp_path):
    """Kills: augmentation from a random state that no checkpoint holds."""
    settings = [*TINY, "--size", "32", "--low-size", "16", "--aug-blur", "0.5", "--save-every", "2"]
    for name, steps in (("whole", 4), ("parts", 2)):
        assert run_here(T, [*settings, "--steps", steps, "--out", tmp_path / name]) == (None, "")
    assert run_here(T, ["--resume", tmp_path / "parts", "--steps", "4", "--device", "cpu"]) == (None, "")
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])


def test_each_stage_of_a_chain_gets_its_own_level(chain, tmp_path, monkeypatch):
    """Kills: the schedule of the high resolution, one s for all stages, a stage that stops at the s of another."""
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


def test_each_stage_is_drawn_in_its_own_precision(monkeypatch):
    """Kills: the precision of the first stage for all."""
    seen = []
    monkeypatch.setattr(P, "sample_run", lambda model, config, cond, seeds, device, precision, *_, **__: seen.append(
        precision) or torch.zeros(len(seeds), 3, *config.size))
    stages = [C.PRESETS["glyphs16"], C.PRESETS["glyphs64_sr"]]
    P.sample_chain([None, None], stages, [{}, {}], [0], torch.device("cpu"), ["float32", "bf16"], "clean")
    assert seen == ["float32", "bf16"]


def test_real_low_res_images_are_each_class_s_own(tmp_path):
    """Kills: one counter for all classes, which repeats a class's first images; a grey image for an empty class."""
    for i in range(12):
        path = tmp_path / f"c{i // 4}" / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, 0, 0)).save(path)
    (tmp_path / "c1" / "00.png").write_text("broken")
    config = override(C.PRESETS["glyphs64_sr"], size=(16,), low_size=(8,), class_names=("c0", "c1", "c2", "c3"))
    source, labels = D.ImageFolder(tmp_path, (16, 16)), [0, 1, 2] * 4 + [0]
    values = (training.real_low_res(source, config, labels)[:, 0, 0, 0] + 1) * 127.5 / 20
    assert [round(v) for v in values.tolist()] == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11, 0]
    assert len({round(float(v)) for v in training.real_low_res(source, config, [-1] * 12)[:, 0, 0, 0] * 100}) == 12
    with pytest.raises(UserError, match="no image of class c3"):
        training.real_low_res(source, config, [3])


def test_no_low_res_image_for_the_sheet_is_no_end_of_the_run(tmp_path):
    """No image of one class can be read. Kills: a run that dies at its first sheet of samples."""
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
    """3.3: renoising makes this cheap. Kills: an s that changes nothing; samples in place of real low-res images."""
    trained, train = X.Yardstick.trained, X.train_glyph_net
    monkeypatch.setattr(X.Yardstick, "trained", lambda self, config: dict(trained(self, config, 64, 36), accuracy=0.99))
    monkeypatch.setattr(X, "train_glyph_net", lambda images, answers, heads: train(images, answers, heads, 3, 32))
    drawn, run = [], drawing.sample_run
    monkeypatch.setattr(drawing, "sample_run", lambda model, config, cond, *rest, **kw: drawn.append(
        (config.size[0], kw.get("stop", 0), cond)) or run(model, config, cond, *rest, **kw))
    common = [chain / "a", chain / "b", "--n", "24", "--n-real", "40", "--device", "cpu"]
    assert run_here(E, [*common, "--handoff", "renoised", "--sweep", "s=0,0.5"]) == (None, "")
    assert [size for size, *_ in drawn] == [16, 32, 32, 32, 32]    # low once; samples and real images, two levels
    levels = [cond["aug_logsnr"][0].item() for _, _, cond in drawn[1:]]
    assert levels[0] == levels[1] == math.inf and levels[2] == levels[3] < 10
    assert_close(drawn[3][2]["aug_logsnr"], S.logsnr_shifted(torch.tensor(0.5), 16, 32).expand(24))
    assert all(0.3 < cond["low_res"].abs().max() <= 1 for _, _, cond in drawn[1:3])                # images in [-1, 1]
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


def test_settings_are_for_both_stages(chain, monkeypatch):
    """Kills: a --steps that only the upper stage follows."""
    asked, run = [], drawing.sample_run
    monkeypatch.setattr(drawing, "sample_run", lambda model, config, *rest, **kw: asked.append(
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


def test_mistakes_of_a_chain(chain, tmp_path):
    """Every mistake is answered with one line and exit status 2."""
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
             ([a, b, "--handoff", "renoised", "--s", "1"], "want 0 to 0.9999"),
             ([a, b, "--handoff", "clean", "--s", "0.1"], "no noise"),
             ([a, b, *renoised, "--steps", "1,2,3"], "settings for 3 stages"),
             ([a, b, c, *renoised, "--s", "0.1", "--s", "0.4"], "once or 2 times")]
    for args, wanted in cases:
        status, line = run_here(P, [*args, "--device", "cpu"])
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
    for args, wanted in [(["--low-size", "12"], "--low-size"), (["--low-size", "16,8"], "--low-size"),
                         (["--low-size", "8", "--patching", "none", "--outer-channels", "8,8", "--outer-blocks", "1,1"],
                          "nested"),
                         (["--aug-blur", "2"], "want 0 to 1"), (["--blur-high", "0.1"], "at least blur_low")]:
        status, line = run_here(T, [*TINY, *args, "--out", tmp_path / "new"])
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
    for args, wanted in [([b], "behind the stage below"), ([a, "--handoff", "clean"], "two runs of a cascade"),
                         ([a, b, "--handoff", "clean", "--s", "0.1"], "--s 0.1"), ([a, b], "behind the stage below"),
                         ([a, b, "--handoff", "renoised"], "say with --s"),
                         ([a, b, "--handoff", "clean", "--sweep", "s=0,0.1"], "want --handoff truncated or renoised"),
                         ([a, tmp_path / "never", "--handoff", "renoised", "--s", "0.1"], "no noise on its low-res"),
                         ([a, b, "--handoff", "renoised", "--sweep", "s=0,1"], "to 0.9999"),
                         ([a, b, *renoised, "--curve"], "not for a cascade"),
                         ([a, c, *renoised], "goes from 32x32")]:
        status, line = run_here(E, [*args, "--device", "cpu", "--n", "8"])
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
