"""train.py and sample.py as programs: the run folder, folders of images, the log, signals, one line for a mistake."""
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from PIL import Image

import data
import sample as P
import train as T
from config import PRESETS
from plumbing import UserError, training
from plumbing.measuring import draw_comparison
from precondition import band_rms
from programs import ROOT, TINY, checkpoint, log_column, program_here, run_here, train_tiny


def write_images(folder, number):
    """Write images of several sizes and colours into the classes c0 and c1 of a folder."""
    for i in range(number):
        path = folder / f"c{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + i, 24), (40 * i, 0, 90)).save(path)


# ---- what a run leaves, and how it goes on

def test_a_run_is_a_folder(six_steps):
    """Kills: a file that is missing or left half-written; keys of compile or DDP in the checkpoint; EMA weights that
    are the trained ones."""
    names = set(os.listdir(six_steps))
    assert {"config.json", "log.csv", "loss.png", "samples_0000006.png", "checkpoint.pt"} <= names
    assert not any(n.endswith(".new") for n in names)
    with open(six_steps / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == [1, 2, 3, 4, 5, 6] and list(rows[0]) == training.LOG_COLUMNS
    assert int(rows[-1]["images"]) == 24
    settings = json.load(open(six_steps / "config.json"))
    assert settings["batch"] == 4 and settings["class_names"][:2] == ["A", "B"] and settings["num_classes"] == 36
    assert settings["precision"] == "float32"
    state = checkpoint(six_steps)
    assert state["step"] == 6 and not any("_orig_mod" in k or "module." in k for k in state["model"])
    assert any(not torch.equal(state["model"][k], state["ema"][k]) for k in state["model"])


def test_the_bands_of_the_data_are_measured_once_and_kept(tmp_path):
    """They are a function of data and seed. Kills: losing them on resume; a level without its own; a model without
    them."""
    run, nested, none = (tmp_path / name for name in ("run", "nested", "none"))
    assert run_here(T, [*TINY, "--patching", "dwt_1", "--steps", 1, "--out", run]) == (None, "")
    text = checkpoint(run)["config"]["band_rms"]
    images = torch.stack([data.Glyphs((16, 16)).image(i) for i in range(400, 464)])             # other scenes
    assert [float(number) for number in text.split(",")] == pytest.approx(band_rms(images, 1), rel=0.25)
    assert run_here(T, ["--resume", run, "--steps", 2]) == (None, "")
    assert checkpoint(run)["config"]["band_rms"] == text
    assert run_here(T, [*TINY, "--patching", "none", "--size", 32, "--outer-channels", "8,16", "--outer-blocks", "1,1",
                        "--outer-patching", "none", "--steps", 1, "--out", nested]) == (None, "")
    assert [len(level.split(",")) for level in checkpoint(nested)["config"]["band_rms"].split("/")] == [1, 1]
    assert run_here(T, [*TINY, "--precondition", "none", "--loss", "v_mse", "--steps", 1, "--out", none]) == (None, "")
    assert checkpoint(none)["config"]["band_rms"] == "" and "position" in checkpoint(none)["model"]
    assert "network.position" in checkpoint(run)["model"]


@pytest.mark.parametrize("share, want", [(0.5, [0.5, 1, 1, 1, 2 / 3, 1 / 3]), (0, [0.5, 1, 1, 1, 1, 1])])
def test_the_learning_rate_warms_up_and_falls(tmp_path, share, want):
    """Two steps of warm-up; the last half falls. Kills: zero before the end; a fall from the start."""
    args = [*TINY, "--steps", 6, "--warmup", 2, "--lr-decay", share, "--out", tmp_path / "r"]
    assert run_here(T, args) == (None, "")
    lr = PRESETS["glyphs64"].lr
    assert [float(rate) / lr for rate in log_column(tmp_path / "r", "lr")] == pytest.approx(want, rel=1e-4)


@pytest.mark.long
def test_a_folder_of_images_trains_and_samples_and_counts_what_it_skips(tmp_path):
    """A folder with classes and a flat one go through train.py and sample.py. A broken file is named once,
    counted. The last line names no loss.png where one step is too few for a curve."""
    data = tmp_path / "data"
    write_images(data, 6)
    (data / "c0" / "broken.png").write_text("x")
    done = train_tiny("--steps", 4, "--data", data, "--out", tmp_path / "r")
    assert done.stderr.count("skipped") == 1 and "broken.png" in done.stderr and "1 files skipped" in done.stdout
    assert run_here(P, [tmp_path / "r", "--labels", "c1", "--n", 2, "--out", tmp_path / "s.png", "--gif",
                        tmp_path / "s.gif", "--guidance", 2, "--device", "cpu"]) == (None, "")
    assert Image.open(tmp_path / "s.png").size[1] == 48 and Image.open(tmp_path / "s.gif").n_frames == 2
    done = train_tiny("--steps", 1, "--data", data / "c1", "--out", tmp_path / "flat")
    assert "done: " in done.stdout and "loss.png" not in done.stdout
    assert run_here(P, [tmp_path / "flat", "--n", 3, "--out", tmp_path / "f.png", "--device", "cpu"]) == (None, "")
    status, line = run_here(P, [tmp_path / "flat", "--labels", "A", "--device", "cpu"])
    assert status == 2 and "no classes" in line


def test_odd_names_do_not_end_a_program(tmp_path):
    """A skipped file and a run whose names are not UTF-8, an output that is ASCII. Kills: UnicodeEncodeError; a
    checkpoint that is called damaged, as PyTorch cannot map it."""
    write_images(tmp_path / "data", 3)
    os.symlink("nowhere", os.fsencode(tmp_path / "data" / "c0") + b"/caf\xe9.png")
    run, env = tmp_path / os.fsdecode("прогон".encode() + b"\xe9"), {"PYTHONIOENCODING": "ascii:strict"}
    done = train_tiny("--steps", 1, "--data", tmp_path / "data", "--out", run, env=env)
    assert r"caf\udce9.png: No such file" in done.stdout and r"\u043f" in done.stdout
    assert run_here(P, [run, "--labels", "c0", "--device", "cpu", "--out", f"{run}.png"]) == (None, "")
    assert run_here(T, ["--resume", run, "--steps", 2, "--device", "cpu"]) == (None, "")
    draw_comparison([(run.name, torch.zeros(2, 8, 8, 3))], [("猫", [(1, 1.0), (2, 0.5)])], f"{run}.png")


def test_the_held_out_loss_of_a_folder(tmp_path):
    """A folder has a held-out loss only if the user names another folder for it. Kills: training images held out."""
    write_images(tmp_path / "seen", 4)
    write_images(tmp_path / "unseen", 3)
    args = [*TINY, "--steps", 2, "--held-out-every", 1, "--data", tmp_path / "seen"]
    assert run_here(T, [*args, "--out", tmp_path / "without"]) == (None, "")
    assert log_column(tmp_path / "without", "held_out") == ["", ""]
    assert run_here(T, [*args, "--held-out", tmp_path / "unseen", "--out", tmp_path / "with"]) == (None, "")
    assert all(float(value) > 0 for value in log_column(tmp_path / "with", "held_out"))
    (tmp_path / "unseen" / "c0" / "torn.png").write_bytes(b"no image")    # is skipped
    assert run_here(T, [*args, "--held-out", tmp_path / "unseen", "--out", tmp_path / "torn"]) == (None, "")
    (tmp_path / "other" / "c7").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "c7" / "a.png")
    for more, wanted in ((["--held-out", tmp_path / "seen" / "c0"], "shares images"),
                         (["--held-out", tmp_path / "other"], "its classes are not those"),
                         (["--held-out", tmp_path / "none"], "none: no such folder of images"),
                         (["--dry-run", "--held-out", tmp_path / "none"], "none: no such folder of images"),
                         (["--held-out", tmp_path / "unseen", "--held-out-every", 0], "--held-out-every is 0"),
                         (["--data", "glyphs", "--held-out", tmp_path / "unseen"], "unseen scenes are drawn")):
        status, line = run_here(T, [*args, *more, "--out", tmp_path / "x"])
        assert status == 2 and wanted in line and line.count("\n") == 1, line


def test_chosen_characters_in_a_run(tmp_path):
    """The run keeps them, goes on with them, and is sampled by their names. A checkpoint without them still loads.

    Kills: a resumed run with every character of the font, or with others; no held-out loss for unseen scenes."""
    args = [*TINY, "--data", "DejaVuSans.ttf", "--characters", "😻♞B", "--held-out-every", 2]
    assert run_here(T, [*args, "--steps", 2, "--out", tmp_path / "r"]) == (None, "")
    assert json.load(open(tmp_path / "r" / "config.json"))["class_names"] == ["😻", "♞", "B"]
    assert run_here(T, ["--resume", tmp_path / "r", "--steps", 4, "--device", "cpu"]) == (None, "")
    assert float(log_column(tmp_path / "r", "held_out")[-1]) > 0
    status, line = run_here(T, ["--resume", tmp_path / "r", "--steps", 6, "--characters", "AB"])
    assert status == 2 and "--characters would make it another" in line
    options = ["--n", 1, "--steps", 2, "--device", "cpu", "--out", tmp_path / "a.png"]
    assert run_here(P, [tmp_path / "r", "--labels", "♞,😻", *options]) == (None, "")
    status, line = run_here(P, [tmp_path / "r", "--labels", "A", *options])
    assert status == 2 and "this run knows 😻, ♞, B" in line
    assert run_here(T, [*TINY, "--steps", 2, "--out", tmp_path / "old"]) == (None, "")
    path = tmp_path / "old" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    del state["config"]["characters"]
    torch.save(state, path)
    assert run_here(T, ["--resume", tmp_path / "old", "--steps", 4, "--device", "cpu"]) == (None, "")


def test_a_log_from_before_the_held_out_loss_is_continued(tmp_path):
    """An older log.csv has no column held_out. Kills: new rows with a column more than the header."""
    assert run_here(T, [*TINY, "--steps", 2, "--held-out-every", 2, "--out", tmp_path / "r"]) == (None, "")
    rows = list(csv.reader(open(tmp_path / "r" / "log.csv")))
    with open(tmp_path / "r" / "log.csv", "w", newline="") as file:
        csv.writer(file).writerows(row[:-1] for row in rows)
    assert run_here(T, ["--resume", tmp_path / "r", "--steps", 4, "--device", "cpu"]) == (None, "")
    assert [bool(value) for value in log_column(tmp_path / "r", "held_out")] == [False, False, False, True]


def test_a_resumed_run_notices_other_data_and_forgives_a_torn_log(tmp_path):
    """Rows that a crash left half-written are cut away. A folder with another number of images is refused."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(data / f"{i}.png")
    assert run_here(T, [*TINY, "--steps", "2", "--data", data, "--out", tmp_path / "r"]) == (None, "")
    with open(tmp_path / "r" / "log.csv", "a") as file:
        file.write("2,8,zero,0,0,0,0\n3,")
    assert run_here(T, ["--resume", tmp_path / "r", "--steps", "3", "--device", "cpu"]) == (None, "")
    assert log_column(tmp_path / "r", "step") == ["1", "2", "3"]
    Image.new("RGB", (20, 20)).save(data / "a.png")
    status, line = run_here(T, ["--resume", tmp_path / "r", "--steps", "4", "--device", "cpu"])
    assert status == 2 and "had 5 examples and now has 6" in line


def test_dry_run_resolves_what_was_left_open(tmp_path):
    """--dry-run prints every setting decided for this machine and its data, and makes no folder."""
    write_images(tmp_path / "data", 4)
    done = program_here("train.py", "--dry-run", "--data", tmp_path / "data", "--device", "cpu")
    assert done.returncode == 0
    settings = dict(line.split(None, 1) for line in done.stdout.splitlines() if len(line.split(None, 1)) == 2)
    assert settings["num_classes"] == "2" and settings["compile"] == "off" and int(settings["workers"]) >= 1
    assert settings["precision"] in ("float32", "bf16") and settings["device"].startswith("1 x cpu")
    assert not os.path.exists(os.path.join(ROOT, "runs", "data"))
    for args, wanted in ((["--data", "/nosuch"], "no such file"), (["--device", "cuda:9"], "CUDA devices")):
        status, line = run_here(T, ["--dry-run", *args])
        assert status == 2 and wanted in line


@pytest.mark.parametrize("left, status", ((dict(WORLD_SIZE=""), None), (dict(WORLD_SIZE="1"), None),
                                          (dict(WORLD_SIZE="2"), 2), (dict(WORLD_SIZE="0"), 2),
                                          (dict(WORLD_SIZE="two"), 2), (dict(WORLD_SIZE="2", RANK="0"), 2),
                                          (dict(WORLD_SIZE="2", RANK="", LOCAL_RANK="0", MASTER_PORT="1",
                                                MASTER_ADDR="localhost"), 2)))
def test_what_another_job_left_in_the_environment_is_one_line(monkeypatch, left, status):
    """Kills: a traceback, a process that waits for others that nobody started."""
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    done, line = run_here(T, ["--preset", "minute", "--dry-run", "--device", "cpu"])
    assert done == status and (status is None or "torchrun" in line and line.count("\n") == 1)


# ---- how a run stops

def test_sigterm_saves_and_says_how_to_go_on(tmp_path):
    """Kills: a worker that dies of the signal and takes the last checkpoint with it; a second SIGTERM that kills."""
    process = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *TINY, "--steps", "100000", "--out",
                                str(tmp_path / "r"), "--workers", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=ROOT, start_new_session=True)
    deadline = time.time() + 120
    while time.time() < deadline and not (tmp_path / "r" / "log.csv").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    if sys.platform == "linux":                                           # Slurm and systemd signal every process
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
            workers = list(map(int, file.read().split()))
        assert workers
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)                                # torchrun and timeout signal the group
    time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)                                # Slurm's signal and torchrun's: two
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and err == ""
    assert f"continue with: python train.py --resume {tmp_path / 'r'}" in out
    assert checkpoint(tmp_path / "r")["step"] > 0


STARTING = """
import multiprocessing, os, runpy, sys
if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv.pop(1))
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def in_session(leader):
    """Return the processes of a session that still run, by Linux's list of them."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            state, _, _, session = file.read().rsplit(")", 1)[1].split()[:4]
            found += [int(name)] * (int(session) == leader and state != "Z")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("method, sent", [pytest.param("forkserver", None, marks=pytest.mark.slow)] + [
    pytest.param(method, sent, marks=pytest.mark.long) for method in ("fork", "forkserver", "spawn")
    for sent in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)])
def test_workers_end_with_the_run_however_they_start(tmp_path, method, sent):
    """Python 3.14 starts workers by a fork server. Kills: a worker that takes os.getppid() for its parent and waits for
    ever; orphans after SIGKILL; a fork server, or a worker that is still starting, that dies of the run's signal."""
    (tmp_path / "starting.py").write_text(STARTING)
    run = tmp_path / "r"
    process = subprocess.Popen([sys.executable, tmp_path / "starting.py", method, os.path.join(ROOT, "train.py"), *TINY,
                                "--workers", "1", "--steps", "100000" if sent else "2", "--out", run],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.time() + 180
        while sent and time.time() < deadline and not (run / "log.csv").exists():               # the workers start now
            time.sleep(0.05)
        if sent == signal.SIGKILL:
            time.sleep(3)
            process.kill()
        elif sent:
            os.killpg(process.pid, sent)
        _, err = process.communicate(timeout=180)
        assert process.returncode == (-sent if sent == signal.SIGKILL else 128 + sent if sent else 0), err
        assert sent == signal.SIGKILL or err == "" and checkpoint(run)["step"] >= 0             # 0: no batch had come
        while in_session(process.pid) and time.time() < deadline:
            time.sleep(0.1)
        assert not in_session(process.pid)
    finally:
        for pid in in_session(process.pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("steps, saved", ((6, 3), (2, 2)))
def test_sigterm_stops_the_drawing_of_a_sheet_and_loses_nothing(tmp_path, monkeypatch, steps, saved):
    """It comes in the sheet of step 2: the run's last one, or not. Kills: a sheet drawn to its end, which takes minutes
    at the papers' size; steps that are lost if a kill follows."""
    real, predictions = training.sample_run, []

    def sample_run(*args):
        predictions.append(checkpoint(tmp_path / "r")["step"])            # saved before the drawing began
        os.kill(os.getpid(), signal.SIGTERM)
        *args, on_step = args
        return real(*args, lambda *more: (predictions.append(more[1]), on_step(*more)))
    monkeypatch.setattr(training, "sample_run", sample_run)
    status, _ = run_here(T, [*TINY, "--steps", steps, "--sample-every", 2, "--sample-steps", 50, "--out",
                             tmp_path / "r"])
    assert status == 128 + signal.SIGTERM and predictions == [2, 1]       # stopped after one prediction of 50
    assert checkpoint(tmp_path / "r")["step"] == saved and not (tmp_path / "r" / "samples_0000002.png").exists()


def test_ctrl_c_outside_the_loop_is_one_line():
    """Ctrl-C ends with status 130, a mistake with 2. Kills: a traceback; a message of two lines."""
    for error, status, wanted in ((KeyboardInterrupt(), 130, "interrupted"), (UserError("so\nso"), 2, "so so")):
        def main():
            raise error
        assert run_here(types.SimpleNamespace(main=main, __name__="p"), []) == (status, f"p.py: {wanted}\n")


def test_non_finite_loss_stops_and_names_the_step(tmp_path):
    """Kills: a run that goes on with NaN, or saves it."""
    assert run_here(T, [*TINY, "--steps", 1, "--out", tmp_path / "r"]) == (None, "")
    state = checkpoint(tmp_path / "r")
    for weights in state["model"].values():
        weights.fill_(1e30)
    torch.save(state, tmp_path / "r" / "checkpoint.pt")
    status, line = run_here(T, ["--resume", tmp_path / "r", "--steps", 400, "--device", "cpu"])
    assert status == 1 and "step 1: the gradient is not finite; stopped, the checkpoint of step 1 is in" in line
    assert checkpoint(tmp_path / "r")["step"] == 1


# ---- the user's mistakes: one line, status 2

def test_mistakes_of_train(six_steps, tmp_path):
    """Kills: a traceback; a message that does not name the flag or what it wants; a silent fresh start."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "checkpoint.pt").write_bytes((six_steps / "checkpoint.pt").read_bytes()[:2000])
    other = tmp_path / "other"
    other.mkdir()
    torch.save({"weights": 1}, other / "checkpoint.pt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("x")
    for name, content in (("zero", b""), ("garbage", b"PK garbage" * 99)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").write_bytes(content)
    cases = [(["--preset", "nope"], "nope: want one of minute, glyphs64"), (["--nosuch", "1"], "nosuch"),
             (["minute"], "minute: want --preset minute"), ([six_steps], "want --resume"),
             ([tmp_path / "bad"], "want --data"),
             (["nosuch"], "nosuch: want --FLAG nosuch"),
             (["--resume", ""], "--resume is empty"), (["--out", "/proc"], "--out /proc"),
             (["--schedule", "interpolated", "--noise-d", "64", "--noise-d-high", "32"], "at least noise_d"),
             (["--lr", "fast"], "lr"), (["--size", "30", "--data", "glyphs"], "multiples of"),
             (["--data", tmp_path / "none"], "no such file or folder"), (["--data", tmp_path / "empty"], "no image"),
             (["--data", __file__], "font file"),
             (["--device", "cuda:7"], "CUDA devices"), (["--device", "tpu"], "want auto, cpu"),
             (["--resume", tmp_path / "none"], "no such run"), (["--resume", tmp_path / "empty"], "not a run"),
             (["--resume", broken], "damaged"), (["--resume", other], "another program"),
             (["--resume", six_steps, "--lr", "1"], "would make it another"),
             (["--resume", six_steps, "--preset", "glyphs64"], "--resume"),
             (["--out", six_steps], "holds a run already"), (["--preset", "imagenet128_unet"], "--data"),
             (["--batch", "0"], "batch 0: want 1 to 1,000,000"), (["--workers", "3000000"], "-1 to 256"),
             (["--cond-drop", "2"], "want 0 to 1"), (["--weight-decay", "inf"], "--weight-decay inf: want 0 to 1"),
             (["--lr", "1e300"], "--lr 1e+300: want 1e-12 to 10"), (["--noise-d", "1e300"], "--noise-d 1e+300"),
             (["--scenes", "1000000000000"], "--scenes 1000000000000: want 1 to 100,000,000"),
             (["--batch", "1000000000"], "--batch 1000000000: want 1 to 1,000,000"),
             (["--emb-channels", "1000000000000"], "--emb-channels 1000000000000: want 1 to 65,536"),
             (["--num-transformer-blocks", "100000000"], "--num-transformer-blocks 100000000: want 0 to 500"),
             (["--base-channels", "65536", "--channel-mult", "1,3,6"], "GiB of memory or more, and this machine has"),
             (["--base-channels", "32768", "--channel-mult", "1,3,6", "--num-transformer-blocks", "450"],
              "GiB of memory"),
             (["--batch", "1000000", "--size", "1024"], "--batch 1000000, 1,000,000 images of 1024x1024 at once: "),
             (["--size", "65536"], "GiB of memory or more"),
             (["--dry-run", "--world-size", "0"], "--world-size 0: want 1 to 1,000,000"),
             (["--channel-mult", "1,2"], "ResBlocks"), (["--num-heads", "5"], "heads"),
             (["--patching", "haar"], "patching"), (["--schedule", "linear"], "schedule"),
             (["--multiscale", "128"], "multiscale"),
             (["--resume", tmp_path / "zero"], "damaged"), (["--resume", tmp_path / "garbage"], "damaged"),
             (["--logsnr-min", "-60"], "logsnr"), (["--channel-mult", "a"], "want whole numbers"),
             (["--size", "16", "--data", tmp_path / "bad", "--workers", "0"], "of 1; the first one tried is")]
    for args, wanted in cases:
        new = [] if "--resume" in args or "--out" in args else ["--out", tmp_path / "new"]
        done = run_here(T, new + args)
        assert done[0] == 2 and wanted in done[1] and done[1].count("\n") == 1, (args, done)
        assert done[1].startswith("train.py: "), (args, done)


def test_mistakes_of_sample(six_steps, tmp_path):
    """Kills: a traceback; a message that does not name the flag."""
    for args, wanted in [([tmp_path], "not a run"), ([six_steps, "--labels", "a,A"], "--labels a: this run knows A, B"),
                         ([six_steps, "--n", "0"], "--n 0"), ([six_steps, "--steps", "0"], "--steps 0"),
                         ([six_steps, "--out", tmp_path / "no" / "x.png"], "does not exist"),
                         ([six_steps, "--out", "x.tiff"], ".png"), ([six_steps, "--guidance", "nan"], "guidance")]:
        done = run_here(P, args)
        assert done[0] == 2 and wanted in done[1] and done[1].count("\n") == 1, (args, done)


def test_checkpoint_of_another_model_is_one_line(six_steps, tmp_path):
    """Weights that do not fit the settings beside them are refused, by sample.py and by --resume."""
    state = checkpoint(six_steps)
    state["config"]["base_channels"] = 16
    torch.save(state, tmp_path / "checkpoint.pt")
    for module, args in ((P, [tmp_path]), (T, ["--resume", tmp_path, "--steps", "9"])):
        status, err = run_here(module, args)
        assert status == 2 and "another model" in err and err.count("\n") == 1


@pytest.mark.parametrize("key, value", [("exp_avg", torch.ones(1)), ("exp_avg_sq", torch.ones(1)), ("exp_avg", 1.0),
                                        ("exp_avg", None), ("step", torch.ones(3))])
def test_an_optimizer_of_another_shape_is_one_line(six_steps, tmp_path, key, value):
    """Kills: a fused kernel that runs past the memory of a tensor of one number; one that is missing."""
    state = checkpoint(six_steps)
    first = next(iter(state["optimizer"]["state"].values()))
    first[key] = value
    if value is None:
        del first[key]
    torch.save(state, tmp_path / "checkpoint.pt")
    status, err = run_here(T, ["--resume", tmp_path, "--steps", "9"])
    assert status == 2 and "another model" in err and err.count("\n") == 1


@pytest.mark.parametrize("left", [0, 1])
def test_an_optimizer_without_state_is_one_line(six_steps, tmp_path, left):
    """Kills: Adam that begins anew without a word, for all weights or for those that the checkpoint lacks."""
    state = checkpoint(six_steps)
    state["optimizer"]["state"] = dict(list(state["optimizer"]["state"].items())[:left])
    torch.save(state, tmp_path / "checkpoint.pt")
    status, err = run_here(T, ["--resume", tmp_path, "--steps", "9"])
    assert status == 2 and ("no optimizer state", "state for 1 of ")[left] in err and err.count("\n") == 1


def test_hostile_checkpoint_runs_no_code(tmp_path):
    """Kills: torch.load without weights_only, which runs code from the file."""
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    torch.save({"model": Exploit()}, tmp_path / "checkpoint.pt")
    assert run_here(P, [tmp_path])[0] == 2 and not (tmp_path / "owned").exists()
