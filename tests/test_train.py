"""Laws of train.py, config.py and runs.py: losses, resuming, processes, and the user's mistakes."""
import copy
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

import config as C
from data import open_run
from plumbing import training, UserError
from plumbing.settings import override
import sample as P
import schedule as S
import train as T
from programs import ROOT, TINY, program, run_here

def train(*args, **kw):
    done = program("train.py", *TINY, *args, **kw)
    assert done.returncode == 0, done.stderr
    return done


def checkpoint(folder):
    return torch.load(os.path.join(folder, "checkpoint.pt"), weights_only=True)


# ---- losses

def test_multiscale_of_white_noise_is_antialiased():
    """Trap 7. Kills: bilinear interpolation without antialiasing: 256 -> 32 must leave variance 1/64, not 1/4."""
    noise = torch.randn(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    terms = {s: F.avg_pool2d(noise, 256 // s).square().mean().item() for s in (32, 64, 128, 256)}
    assert terms[32] == pytest.approx(1 / 64, rel=0.05)
    assert T.multiscale_mse(noise, 32).item() == pytest.approx(sum(v / s for s, v in terms.items()), rel=1e-5)
    want = sum((s / 256) ** 2 / s for s in (32, 64, 128, 256))
    assert T.multiscale_mse(noise, 32).item() == pytest.approx(want, rel=0.02)


def test_multiscale_always_holds_the_full_side():
    error = torch.randn(1, 3, 64, 64)
    assert_close(T.multiscale_mse(error, 64), error.square().mean() / 64)
    assert_close(T.multiscale_mse(error, 33), error.square().mean() / 64)
    with pytest.raises(ValueError, match="base"):
        T.multiscale_mse(error, 128)


def test_losses_are_the_two_faces_of_one_error():
    """Kills: eps-loss that is v-MSE, and the reverse; the network told t instead of logsnr."""
    seen = []

    def model(z, logsnr, cond):
        seen.append((logsnr, cond))
        return torch.zeros_like(z)
    x, eps, t = torch.rand(4, 3, 8, 8) * 2 - 1, torch.randn(4, 3, 8, 8), torch.tensor([0.05, 0.3, 0.6, 0.9])
    logsnr, v = S.logsnr_cosine(t), S.v_from_x_eps(x, eps, S.logsnr_cosine(t))
    assert_close(T.simple_loss(model, x, {"a": 1}, t, eps, S.logsnr_cosine, "v_mse"), v.square().mean())
    weighted = (torch.sigmoid(logsnr) * v.square().mean((1, 2, 3))).mean()
    assert_close(T.simple_loss(model, x, {"a": 1}, t, eps, S.logsnr_cosine, "eps_mse"), weighted)
    assert_close(seen[0][0], logsnr)
    assert seen[0][1] == {"a": 1}
    assert_close(T.simple_loss(model, x, {}, t, eps, S.logsnr_cosine, "v_mse", 4), T.multiscale_mse(v, 4))


def test_noise_is_a_function_of_seed_step_and_place():
    """Kills: noise drawn per process, so that two processes repeat it or a resumed run changes it."""
    cpu = torch.device("cpu")
    shapes = [(3, 4, 4), (3, 2, 2)]
    whole = T.draw(1, 7, range(6), shapes, cpu)
    parts = [T.draw(1, 7, places, shapes, cpu) for places in (range(0, 3), range(3, 6))]
    flat = lambda drawn: (drawn[0], *drawn[1], drawn[2])
    for a, b, c in zip(flat(whole), *map(flat, parts)):
        assert torch.equal(a, torch.cat([b, c]))
    assert [eps.shape for eps in whole[1]] == [(6, 3, 4, 4), (6, 3, 2, 2)]
    assert torch.equal(whole[1][0], T.draw(1, 7, range(6), shapes[:1], cpu)[1][0])  # the highest, as if it were alone
    assert len(set(whole[0].tolist())) == 6
    for other in ((2, 7), (1, 8)):
        assert not torch.equal(whole[1][0], T.draw(*other, range(6), shapes, cpu)[1][0])
    t, eps, u = T.draw(0, 0, range(2000), [(1,)], cpu)
    for uniform in (t, u):
        assert abs(uniform.mean() - 0.5) < 0.03 and abs(uniform.var() - 1 / 12) < 0.01
    assert abs(torch.corrcoef(torch.stack([t, u]))[0, 1]) < 0.08


def test_ema_follows_the_step_and_forgets_its_start():
    """Trap 15. Kills: an average updated before the step, or one that keeps the start for 1 / (1 - decay) steps."""
    model = torch.nn.Linear(2, 2)
    ema = copy.deepcopy(model)
    torch.nn.init.ones_(model.weight)
    before = ema.weight.clone()
    T.update_ema(ema, model, 0.9999, 0)
    assert_close(ema.weight, before + (1 - 1 / 10) * (1 - before))
    before = ema.weight.clone()
    T.update_ema(ema, model, 0.5, 10 ** 6)
    assert_close(ema.weight, 0.5 * before + 0.5)
    T.update_ema(ema, model, 0.0, 5)
    assert_close(ema.weight, model.weight)


# ---- the run

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "unbroken"
    train("--steps", 6, "--save-every", 3, "--out", folder, "--dropout", 0.1, "--dropout-from-resolution", 16)
    return folder


def test_a_run_is_a_folder(unbroken):
    names = set(os.listdir(unbroken))
    assert {"config.json", "log.csv", "loss.png", "samples_0000006.png", "checkpoint.pt"} <= names
    assert not any(n.endswith(".new") for n in names)
    with open(unbroken / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6] and list(rows[0]) == training.LOG_COLUMNS
    assert int(rows[-1]["images"]) == 24
    settings = json.load(open(unbroken / "config.json"))
    assert settings["batch"] == 4 and settings["class_names"][:2] == ["A", "B"] and settings["num_classes"] == 36
    assert settings["precision"] == "float32"
    state = checkpoint(unbroken)
    assert state["step"] == 6 and not any("_orig_mod" in k or "module." in k for k in state["model"])
    assert any(not torch.equal(state["model"][k], state["ema"][k]) for k in state["model"])


def test_resuming_is_the_unbroken_run_to_the_bit(unbroken, tmp_path):
    """Trap 14. Kills: optimiser, averaged weights, dropout's random state, or the place in the data not restored."""
    train("--steps", 3, "--out", tmp_path / "r", "--dropout", 0.1, "--dropout-from-resolution", 16)
    done = program("train.py", "--resume", tmp_path / "r", "--steps", 6, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    a, b = checkpoint(unbroken), checkpoint(tmp_path / "r")
    for part in ("model", "ema"):
        for key in a[part]:
            assert torch.equal(a[part][key], b[part][key]), (part, key)
    for i, moments in a["optimizer"]["state"].items():
        for key in moments:
            assert torch.equal(moments[key], b["optimizer"]["state"][i][key])
    assert (a["step"], a["images"]) == (b["step"], b["images"])
    losses = [[r["loss"] for r in csv.DictReader(open(f / "log.csv"))] for f in (unbroken, tmp_path / "r")]
    assert losses[0] == losses[1]


@pytest.mark.long
@pytest.mark.parametrize("settings", [{}, dict(patching="none", outer_channels="8,8", outer_blocks="1,1")])
def test_two_processes_are_one_on_the_joined_batch(tmp_path, settings):
    """Trap 13. Kills: gradients that never meet, a batch per process instead of in all, noise repeated by the ranks."""
    common = ("--steps", 3, "--dropout", 0, "--adam-eps", 1e-4, "--warmup", 0,  # eps: gradients that are pure rounding
              *(part for key, value in settings.items() for part in ("--" + key, value)))
    train(*common, "--out", tmp_path / "one")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    train(*common, "--out", tmp_path / "two", launcher=torchrun)
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    start = checkpoint_at_start(**settings)
    moved = max((one["model"][k] - start[k]).abs().max().item() for k in start)
    apart = max((one["model"][k] - two["model"][k]).abs().max().item() for k in start)
    assert apart < 1e-3 * moved
    losses = [[float(r["loss"]) for r in csv.DictReader(open(tmp_path / f / "log.csv"))] for f in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def checkpoint_at_start(**settings):
    torch.manual_seed(0)
    config = override(C.PRESETS["glyphs64"], size=(16,), base_channels=8, emb_channels=16, channel_mult=(1, 2),
                        num_res_blocks=(1,), num_transformer_blocks=1, num_heads=2, **settings)
    return C.build_model(config).state_dict()


def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *TINY, "--steps", "100000", "--out",
                                str(tmp_path / "r"), "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=ROOT, start_new_session=True)
    deadline = time.time() + 120
    while time.time() < deadline and not (tmp_path / "r" / "log.csv").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    if sys.platform == "linux":                                           # as Slurm and systemd do: every process
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            workers = list(map(int, file.read().split()))
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)                                # as torchrun and timeout do: the group
    time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)                                # Slurm's and torchrun's own: twice
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and err == ""
    assert f"continue with: python train.py --resume {tmp_path / 'r'}" in out
    assert checkpoint(tmp_path / "r")["step"] > 0


def test_non_finite_loss_stops_and_names_the_step(tmp_path):
    done = program("train.py", *TINY, "--steps", 400, "--lr", 1e30, "--warmup", 0, "--out", tmp_path / "r")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"step \d+: the gradient is not finite; stopped, no checkpoint was written yet", done.stderr)
    assert not (tmp_path / "r" / "checkpoint.pt").exists()


def test_the_average_is_taken_after_the_step(tmp_path):
    """Trap 15. Kills: an update before the optimiser's step, which lags by one."""
    train("--steps", 1, "--out", tmp_path / "r", "--warmup", 0)
    state, start = checkpoint(tmp_path / "r"), checkpoint_at_start()
    for key, value in state["ema"].items():
        assert_close(value, 0.1 * start[key] + 0.9 * state["model"][key], atol=1e-6, rtol=0)


@pytest.mark.long
def test_a_folder_of_images_trains_and_samples_and_counts_what_it_skips(tmp_path):
    data = tmp_path / "data"
    for i in range(6):
        path = data / f"class_{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 24), (40 * i, 0, 90)).save(path)
    (data / "class_0" / "broken.png").write_text("x")
    done = train("--steps", 4, "--data", data, "--out", tmp_path / "r")
    assert done.stderr.count("skipped") == 1 and "broken.png" in done.stderr and "1 files skipped" in done.stdout
    done = program("sample.py", tmp_path / "r", "--labels", "class_1", "--n", 2, "--out", tmp_path / "s.png", "--gif",
                   tmp_path / "s.gif", "--guidance", 2, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "s.png").size[1] == 48 and Image.open(tmp_path / "s.gif").n_frames == 2
    flat = data / "class_1"
    train("--steps", 1, "--data", flat, "--out", tmp_path / "flat")
    done = program("sample.py", tmp_path / "flat", "--n", 3, "--out", tmp_path / "f.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    done = program("sample.py", tmp_path / "flat", "--labels", "A", "--device", "cpu")
    assert done.returncode == 2 and "no classes" in done.stderr


def test_load_run_gives_the_averaged_weights(unbroken):
    """Trap 5, 15. Kills: sampling the raw weights."""
    model, config = P.load_run(str(unbroken))
    state = checkpoint(unbroken)
    assert not model.training and config.size == (16, 16)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state["ema"][key])


def test_what_the_loop_tells_the_loss_and_the_optimiser(tmp_path, monkeypatch):
    """Kills: conditions never dropped, or always; no warm-up; betas exchanged; no clipping; a sheet of raw weights."""
    labels, sheets, loss, sheet = [], [], T.simple_loss, training.class_sheet
    monkeypatch.setattr(T, "simple_loss", lambda model, x, cond, *rest: labels.append(cond["label"]) or loss(
        model, x, cond, *rest))
    monkeypatch.setattr(training, "class_sheet", lambda model, *rest, **more: sheets.append(
        {k: v.clone() for k, v in model.state_dict().items()}) or sheet(model, *rest, **more))
    for drop, low, high in ((0, 0, 0), (0.5, 0.25, 0.75), (1, 1, 1)):
        labels.clear()
        out = tmp_path / str(drop)
        assert run_here(T, [*TINY, "--steps", "8", "--batch", "16", "--warmup", "4", "--lr", "0.01", "--cond-drop",
                            drop, "--beta1", "0.5", "--beta2", "0.6", "--adam-eps", "1e-3", "--clip", "1e-6", "--out",
                            out]) == (None, "")
        assert low <= (torch.cat(labels) < 0).float().mean() <= high
        rows = list(csv.DictReader(open(out / "log.csv")))
        assert [float(row["lr"]) for row in rows] == pytest.approx([0.0025, 0.005, 0.0075] + [0.01] * 5)
        state = checkpoint(out)
        group = state["optimizer"]["param_groups"][0]
        assert tuple(group["betas"]) == (0.5, 0.6) and group["eps"] == 1e-3
        # Gradients of norm 1e-6 under eps 1e-3 hardly move anything; unclipped ones would move the weights by about lr.
        start = checkpoint_at_start()
        assert max((state["model"][k] - start[k]).abs().max() for k in start) < 1e-3
        for key, value in sheets[-1].items():
            assert torch.equal(value, state["ema"][key])
        assert any(not torch.equal(state["ema"][k], state["model"][k]) for k in start)


def held_out_column(run):
    return [row["held_out"] for row in csv.DictReader(open(run / "log.csv"))]


def test_the_held_out_loss_is_that_of_the_ema_weights_and_has_no_noise(tmp_path):
    """Kills: raw weights, noise drawn anew at each call, hidden labels, an effect on the training."""
    args = [*TINY, "--cond-drop", 1, "--mixed-ratio", "1:1", "--outer-channels", "8,8", "--outer-blocks", "1,1",
            "--patching", "none", "--size", 32, "--steps", 4]
    assert run_here(T, [*args, "--held-out-every", 2, "--out", tmp_path / "r"]) == (None, "")
    assert run_here(T, [*args, "--held-out-every", 0, "--out", tmp_path / "without"]) == (None, "")
    column = held_out_column(tmp_path / "r")
    assert [bool(value) for value in column] == [False, True, False, True]
    assert held_out_column(tmp_path / "without") == [""] * 4
    a, b = checkpoint(tmp_path / "r"), checkpoint(tmp_path / "without")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    model, config = P.load_run(str(tmp_path / "r"))
    seen = []
    spy = lambda z, logsnr, cond: seen.append(cond["label"]) or model(z, logsnr, cond)
    loss = T.make_held_out_loss(config, spy, open_run(config, held_out=True), None, torch.device("cpu"))
    assert loss() == loss() == pytest.approx(float(column[-1]), rel=1e-4)
    assert min(map(int, seen[0])) >= 0 and len(seen[0]) == 32


def test_the_held_out_loss_of_a_folder(tmp_path):
    """A folder has unseen images only if the user names some. Kills: training images called unseen."""
    for name, number in (("seen", 4), ("unseen", 3)):
        for i in range(number):
            path = tmp_path / name / f"c{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(path)
    args = [*TINY, "--steps", 2, "--held-out-every", 1, "--data", tmp_path / "seen"]
    assert run_here(T, [*args, "--out", tmp_path / "without"]) == (None, "")
    assert held_out_column(tmp_path / "without") == ["", ""]
    assert run_here(T, [*args, "--held-out", tmp_path / "unseen", "--out", tmp_path / "with"]) == (None, "")
    assert all(float(value) > 0 for value in held_out_column(tmp_path / "with"))
    (tmp_path / "other" / "c7").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "c7" / "a.png")
    for more, wanted in ((["--held-out", tmp_path / "seen" / "c0"], "shares images"),
                         (["--held-out", tmp_path / "other"], "its classes are not those"),
                         (["--held-out", tmp_path / "none"], "none: no such folder of images"),
                         (["--data", "glyphs", "--held-out", tmp_path / "unseen"], "unseen scenes are drawn")):
        status, line = run_here(T, [*args, *more, "--out", tmp_path / "x"])
        assert status == 2 and wanted in line and line.count("\n") == 1, line


def test_a_log_from_before_the_held_out_loss_is_continued(tmp_path):
    assert run_here(T, [*TINY, "--steps", 2, "--held-out-every", 2, "--out", tmp_path / "r"]) == (None, "")
    rows = list(csv.reader(open(tmp_path / "r" / "log.csv")))
    with open(tmp_path / "r" / "log.csv", "w", newline="") as file:
        csv.writer(file).writerows(row[:-1] for row in rows)
    assert run_here(T, ["--resume", tmp_path / "r", "--steps", 4, "--device", "cpu"]) == (None, "")
    assert [bool(value) for value in held_out_column(tmp_path / "r")] == [False, False, False, True]


def test_dry_run_resolves_what_was_left_open(tmp_path, capsys):
    for i in range(4):
        path = tmp_path / "data" / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20)).save(path)
    done = program("train.py", "--dry-run", "--data", tmp_path / "data", "--device", "cpu")
    assert done.returncode == 0
    settings = dict(line.split(None, 1) for line in done.stdout.splitlines() if len(line.split(None, 1)) == 2)
    assert settings["num_classes"] == "2" and settings["compile"] == "off" and int(settings["workers"]) >= 1
    assert settings["precision"] in ("float32", "bf16") and settings["device"].startswith("1 x cpu")
    assert not os.path.exists(os.path.join(ROOT, "runs", "data"))
    for args, wanted in ((["--data", "/nosuch"], "no such file"), (["--device", "cuda:9"], "CUDA devices")):
        status, line = run_here(T, ["--dry-run", *args])
        assert status == 2 and wanted in line


def test_a_resumed_run_notices_other_data_and_forgives_a_torn_log(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(data / f"{i}.png")
    assert run_here(T, [*TINY, "--steps", "2", "--data", data, "--out", tmp_path / "r"]) == (None, "")
    with open(tmp_path / "r" / "log.csv", "a") as file:
        file.write("2,8,zero,0,0,0,0\n3,")
    assert run_here(T, ["--resume", tmp_path / "r", "--steps", "3", "--device", "cpu"]) == (None, "")
    assert [row["step"] for row in csv.DictReader(open(tmp_path / "r" / "log.csv"))] == ["1", "2", "3"]
    Image.new("RGB", (20, 20)).save(data / "a.png")
    status, line = run_here(T, ["--resume", tmp_path / "r", "--steps", "4", "--device", "cpu"])
    assert status == 2 and "had 5 examples and now has 6" in line


def test_ctrl_c_outside_the_loop_is_one_line():
    for error, status, wanted in ((KeyboardInterrupt(), 130, "interrupted"), (UserError("so\nso"), 2, "so so")):
        def main():
            raise error
        assert run_here(types.SimpleNamespace(main=main, __name__="p"), []) == (status, f"p.py: {wanted}\n")


# ---- the user's mistakes: one line, status 2

def test_mistakes_of_train(unbroken, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "checkpoint.pt").write_bytes((unbroken / "checkpoint.pt").read_bytes()[:2000])
    other = tmp_path / "other"
    other.mkdir()
    torch.save({"weights": 1}, other / "checkpoint.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("x")
    for name, content in (("zero", b""), ("garbage", b"PK garbage" * 99)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes(content)
    cases = [(["--preset", "nope"], "nope: want one of glyphs64"), (["--nosuch", "1"], "nosuch"),
             (["--resume", ""], "--resume is empty"), (["--out", "/proc"], "--out /proc"),
             (["--schedule", "interpolated", "--noise-d", "64", "--noise-d-high", "32"], "at least noise_d"),
             (["--lr", "fast"], "lr"), (["--size", "30", "--data", "glyphs"], "multiples of"),
             (["--data", tmp_path / "none"], "no such file or folder"), (["--data", tmp_path / "empty"], "no image"),
             (["--data", __file__], "font file"),
             (["--device", "cuda:7"], "CUDA devices"), (["--device", "tpu"], "want auto, cpu"),
             (["--resume", tmp_path / "none"], "no such run"), (["--resume", tmp_path / "empty"], "not a run"),
             (["--resume", broken], "damaged"), (["--resume", other], "another program"),
             (["--resume", unbroken, "--lr", "1"], "would make it another"),
             (["--resume", unbroken, "--preset", "glyphs64"], "--resume"),
             (["--out", unbroken], "holds a run already"), (["--preset", "imagenet128_unet"], "--data"),
             (["--batch", "0"], "batch 0: want 1 or more"), (["--workers", "3000000"], "0 to 256"),
             (["--cond-drop", "2"], "between 0 and 1"),
             (["--channel-mult", "1,2"], "ResBlocks"), (["--num-heads", "5"], "heads"),
             (["--patching", "haar"], "patching"), (["--schedule", "linear"], "schedule"),
             (["--multiscale", "128"], "multiscale"),
             (["--resume", tmp_path / "zero"], "damaged"), (["--resume", tmp_path / "garbage"], "damaged"),
             (["--logsnr-min", "-60"], "logsnr"), (["--channel-mult", "a"], "want whole numbers"),
             (["--size", "16", "--data", tmp_path / "bad", "--workers", "0"], "no image left")]
    for args, wanted in cases:
        done = run_here(T, ["--out", tmp_path / "new"] * ("--resume" not in args and "--out" not in args) + args)
        assert done[0] == 2 and wanted in done[1] and done[1].count("\n") == 1, (args, done)
        assert done[1].startswith("train.py: "), (args, done)


def test_mistakes_of_sample(unbroken, tmp_path):
    for args, wanted in [([tmp_path], "not a run"), ([unbroken, "--labels", "a,A"], "--labels a: this run knows A, B"),
                         ([unbroken, "--n", "0"], "--n 0"), ([unbroken, "--steps", "0"], "--steps 0"),
                         ([unbroken, "--out", tmp_path / "no" / "x.png"], "does not exist"), ([], "RUN"),
                         ([unbroken, "--out", "x.tiff"], ".png"), ([unbroken, "--guidance", "nan"], "guidance")]:
        done = run_here(P, args)
        assert done[0] == 2 and wanted in done[1] and done[1].count("\n") == 1, (args, done)


def test_checkpoint_of_another_model_is_one_line(unbroken, tmp_path):
    state = checkpoint(unbroken)
    state["config"]["base_channels"] = 16
    torch.save(state, tmp_path / "checkpoint.pt")
    for module, args in ((P, [tmp_path]), (T, ["--resume", tmp_path, "--steps", "9"])):
        status, err = run_here(module, args)
        assert status == 2 and "another model" in err and err.count("\n") == 1


def test_hostile_checkpoint_runs_no_code(tmp_path):
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"model": Exploit()}, tmp_path / "checkpoint.pt")
    assert run_here(P, [tmp_path])[0] == 2 and not (tmp_path / "owned").exists()
