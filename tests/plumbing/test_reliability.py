"""Hard to kill: kills, power losses, full disks, damaged files, dying processes, awkward images, odd command lines."""
import ast
import contextlib
import copy
import csv
import errno
import io
import itertools
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

import data as D
import distill
import evaluate
from plumbing import files, measuring, pictures, runs, start, training, UserError, workers
import sample as P
from plumbing import shard
import soak
import train as T
from programs import ROOT, TINY, program, run_here

DROP = ("--dropout", 0.1, "--dropout-from-resolution", 16)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the programs of these tests have: another number sums in another order, and bits would differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliable") / "run"
    assert run_here(T, [*TINY, *DROP, "--steps", 3, "--save-every", 1, "--out", folder]) == (None, "")
    return folder


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliable") / "run"
    assert run_here(T, [*TINY, *DROP, "--steps", 2, "--save-every", 1, "--out", folder]) == (None, "")
    return folder


# ---- kills

@pytest.mark.long
def test_killed_again_and_again_it_is_the_unbroken_run(tmp_path):
    assert len(soak.soak(str(tmp_path), kills=3, steps=40, seed=1)) == 3


# Dies in the second save, at the n-th call of a function: as when the power goes there.
BOMB = """
import os, signal, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
import torch, train
from plumbing import runs, shard, training
name, call = os.environ["BOMB"].split()
call = int(call)
def die(*args, **more):
    os.kill(os.getpid(), signal.SIGKILL)
def half(state, file):
    whole(state, file)
    file.truncate(file.tell() // 2)
    die()
whole, saves, calls = torch.save, [], []
def armed(real):
    def save(*args, **more):
        saves.append(1)
        return real(*args, **more)
    return save
def bomb(real):
    def function(*args, **more):
        if len(saves) == 2:
            calls.append(1)
            if len(calls) == call:
                (half if name == "save" else die)(*args, **more)
        return real(*args, **more)
    return function
training.save_checkpoint = armed(training.save_checkpoint)
shard.save = armed(shard.save)
places = dict(save=torch, fsync=os, link=os, replace=os, rename=os, rmtree=shard.shutil, dcp=shard.dcp)
owner, attribute = places[name], "save" if name == "dcp" else name
setattr(owner, attribute, bomb(getattr(owner, attribute)))
runs.main_program(train.main)
"""


@pytest.mark.long
@pytest.mark.parametrize("name, call, step", [("save", 1, 1), ("fsync", 1, 1), ("link", 1, 1), ("replace", 1, 1),
                                              ("replace", 2, 1), ("fsync", 2, 2)])
def test_power_loss_while_saving(unbroken, tmp_path, name, call, step):
    """Between write, flush and rename. Kills: writing over the old file, renaming before the flush, a moment without
    any checkpoint."""
    run = tmp_path / "run"
    done = program("train.py", *TINY, *DROP, "--steps", 3, "--save-every", 1, "--out", run, launcher=("-c", BOMB),
                   env=dict(BOMB=f"{name} {call}"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert runs.read_checkpoint(str(run))["step"] == step
    assert run_here(T, ["--resume", run, "--steps", 3, "--device", "cpu"]) == (None, "")
    assert not soak.differences(unbroken, run) and not [name for name in os.listdir(run) if name.endswith(".new")]


@pytest.mark.long
@pytest.mark.parametrize("name, call, step", [("dcp", 1, 1), ("fsync", 2, 1), ("rename", 1, 1)])
def test_power_loss_while_saving_pieces(unbroken, tmp_path, name, call, step):
    run = tmp_path / "run"
    done = program("train.py", *TINY, *DROP, "--shard", "--steps", 3, "--save-every", 1, "--out", run,
                   launcher=("-c", BOMB), env=dict(BOMB=f"{name} {call}"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert shard.newest(str(run))["step"] == step
    assert run_here(T, ["--resume", run, "--steps", 3, "--device", "cpu"]) == (None, "")
    assert run_here(shard, [run]) == (None, "")
    assert not soak.differences(unbroken, run)


@pytest.mark.long
@pytest.mark.parametrize("call", [1, 2])
def test_power_loss_between_two_names_of_a_checkpoint(unbroken, tmp_path, call):
    """With --keep-every a checkpoint has two. Kills: checkpoint_0000002.pt that is never written."""
    run = tmp_path / "run"
    done = program("train.py", *TINY, *DROP, "--steps", 3, "--save-every", 1, "--keep-every", 1, "--out", run,
                   launcher=("-c", BOMB), env=dict(BOMB=f"link {call}"))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert run_here(T, ["--resume", run, "--steps", 3, "--device", "cpu"]) == (None, "")
    assert runs.kept_checkpoints(run) == [f"checkpoint_000000{step}.pt" for step in (1, 2, 3)]
    assert [runs.read_checkpoint(str(run), name)["step"] for name in runs.kept_checkpoints(run)] == [1, 2, 3]
    assert not soak.differences(unbroken, run) and not [name for name in os.listdir(run) if name.endswith(".new")]


def test_a_sheet_that_a_kill_lost_is_drawn_when_the_run_goes_on(unbroken, two_steps, tmp_path):
    """The checkpoint of step 2 was written, its sheet was not. Kills: a gap for good; other weights for the drawing."""
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    (run / "samples_0000002.png").unlink()
    words = ["--resume", run, "--steps", 3, "--device", "cpu"]
    assert run_here(T, [*words, "--sample-every", 2]) == (None, "")
    assert (run / "samples_0000002.png").exists() and not soak.differences(unbroken, run)


@pytest.mark.parametrize("step", [0.0, -1.0])
def test_a_clock_that_stands_still_or_goes_back_stops_nothing(tmp_path, monkeypatch, step):
    """time.time is set back; time.monotonic may stand still for a step. Kills: ZeroDivisionError, a pace below 0."""
    clock = itertools.count(1e9, step)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(time, "monotonic", lambda: 5.0)
    words = [*TINY, "--steps", 3, "--sample-every", 100, "--out", tmp_path / "r"]
    assert run_here(T, words) == (None, "")
    with open(tmp_path / "r" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 and all(float(row[key]) >= 0 for row in rows for key in ("images_per_s", "seconds"))


def test_the_last_two_checkpoints_are_kept(unbroken):
    assert runs.read_checkpoint(str(unbroken))["step"] == 3
    assert runs.read_checkpoint(str(unbroken), "previous.pt")["step"] == 2


# ---- two programs at once

@pytest.mark.long
def test_of_two_trainers_in_one_folder_one_ends_before_it_writes(unbroken, tmp_path):
    """A job is started again while the old one lives. Kills: a log with rows of both, a checkpoint of which each wrote
    a half. The second may look before the first has written its name: that the holder is named is a law of
    test_sources.py."""
    words = [sys.executable, os.path.join(ROOT, "train.py"), *TINY, *DROP, "--steps", "60", "--save-every", "1",
             "--auto-resume", "--out", tmp_path / "run"]
    both = [subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}) for _ in range(2)]
    done = sorted((process.communicate(timeout=240)[1], process.returncode, process.pid) for process in both)
    (quiet, status, pid), (line, refused, _) = done
    assert (quiet, status, refused) == ("", 0, 2), done
    answers = f"process {pid} on {platform.node()}", "it has just begun", "holds a run already"
    assert any(answer in line for answer in answers), done
    assert line.count("\n") == 1 and runs.read_checkpoint(str(tmp_path / "run"))["step"] == 60
    assert (tmp_path / "run" / "log.csv").read_text().count("\n") == 61


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Kills: one name for both unfinished files, which mixes them, or takes one away from its writer."""
    path = tmp_path / "x"
    with files.whole_file(str(path)) as slow:
        slow.write(b"slow")
        with files.whole_file(str(path)) as quick:
            quick.write(b"quick")
        assert path.read_bytes() == b"quick"
    assert path.read_bytes() == b"slow" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("mine", [False, True])
def test_what_a_killed_writer_left_is_removed(tmp_path, mine):
    """By the next one who writes the file; not what is still being written. Kills: gigabytes that stay for good."""
    code = ("import sys; from plumbing import files; f = files.whole_file(sys.argv[1]); file = f.__enter__(); "
            "file.write(b'half'); file.flush(); print(flush=True); sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          cwd=ROOT) as other:
        other.stdout.readline()
        if not mine:
            other.kill()
            other.wait()
        with files.whole_file(str(tmp_path / "x")) as file:
            file.write(b"whole")
        assert len(os.listdir(tmp_path)) == 1 + mine and (tmp_path / "x").read_bytes() == b"whole"
        other.kill()


def test_two_evaluations_at_once_lose_no_row(tmp_path, monkeypatch):
    """The second one begins to read while the first one writes. Kills: scores that one of them never saw."""
    made = dict(command="x"), dict(step=3), {}
    monkeypatch.setattr(measuring, "provenance", lambda *args: made)
    run, real, second = types.SimpleNamespace(folder=str(tmp_path)), measuring.write_json, []
    code = ("import sys, types; from plumbing import measuring; "
            "measuring.provenance = lambda *args: (dict(command='x'), dict(step=3), {}); "
            "print(flush=True); "
            "measuring.save_scores(dict(b=2), types.SimpleNamespace(folder=sys.argv[1]), None, None)")

    def slow(*args):
        second.append(subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE))
        second[0].stdout.readline()
        time.sleep(1)                                                     # it has come to its save_scores by now
        real(*args)
    monkeypatch.setattr(measuring, "write_json", slow)
    measuring.save_scores(dict(a=1), run, None, None)
    second[0].communicate(timeout=60)
    scores = files.read_json(str(tmp_path / "evaluation.json"))
    assert second[0].returncode == 0 and (scores["a"], scores["b"], scores["step"]) == (1, 2, 3)


# ---- disks

@pytest.mark.parametrize("shards", [(), ("--shard",)])
def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(two_steps, tmp_path, shards):
    """A limit on the size of files stands for the disk. Kills: a half file under the good name, a traceback."""
    run = tmp_path / "run"
    shutil.copytree(two_steps, run)
    before = (run / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        status, line = run_here(T, ["--resume", run, "--steps", 5, "--device", "cpu", *shards])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "step 3 could not be saved" in line and "File too large" in line and line.count("\n") == 1
    assert (run / "checkpoint.pt").read_bytes() == before and runs.read_checkpoint(str(run))["step"] == 2
    assert not [name for name in os.listdir(run) if name.endswith(".new")] and not runs.sharded_steps(str(run))


def test_a_full_disk_stops_nothing_if_told_so(two_steps, tmp_path, monkeypatch):
    """--if-unsaved go-on: the next save is tried, and the last must succeed."""
    run, real, calls = tmp_path / "run", runs.torch.save, []
    shutil.copytree(two_steps, run)

    def save(state, file):
        calls.append(1)
        if len(calls) in failing:
            raise OSError(28, "No space left on device")
        return real(state, file)
    monkeypatch.setattr(runs.torch, "save", save)
    for failing, status, step in (({1}, None, 4), ({1}, 2, 5)):
        calls.clear()
        done, err = run_here(T, ["--resume", run, "--steps", step, "--if-unsaved", "go-on", "--device", "cpu"])
        assert done == status and "No space left on device" in err, err
        assert ("going on" in err) == (status is None)
        assert runs.read_checkpoint(str(run))["step"] == 4 and len(calls) == (2 if status is None else 1)


def test_a_full_disk_under_the_log_is_said_and_no_more(tmp_path, monkeypatch):
    real = open

    def full(path, mode="r", *args, **more):
        if str(path).endswith("log.csv") and "a" in mode:
            raise OSError(28, "No space left on device")
        return real(path, mode, *args, **more)
    monkeypatch.setattr("builtins.open", full)
    assert run_here(T, [*TINY, "--steps", 2, "--out", tmp_path / "r"])[0] is None
    assert runs.read_checkpoint(str(tmp_path / "r"))["step"] == 2


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch):
    """As the shared folders of some virtual machines. Kills: a file that is there and counts as not written."""
    real = os.fsync

    def fsync(number):
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(number)
    monkeypatch.setattr(files.os, "fsync", fsync)
    assert run_here(T, [*TINY, "--steps", 1, "--out", tmp_path / "r"]) == (None, "")


@pytest.mark.parametrize("name", ["x.png", "x.gif", "figure.png", "x.npz"])
def test_a_picture_that_cannot_be_written_leaves_the_one_before(two_steps, tmp_path, monkeypatch, name):
    """Kills: an empty file in its place."""
    (tmp_path / name).write_bytes(b"before")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files.os, "fsync", full)
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    if name == "x.png":
        status, line = run_here(P, [two_steps, "--n", 1, "--labels", "A", "--out", tmp_path / name, "--device", "cpu"])
        assert status == 2 and "No space left on device" in line and line.count("\n") == 1
    else:
        with pytest.raises((OSError, UserError), match="No space left on device"):
            if name == "x.gif":
                pictures.save_gif(frames, str(tmp_path / name), 2500)
            elif name == "x.npz":
                args = types.SimpleNamespace(export=str(tmp_path / name), export_png=None)
                measuring.export(args, torch.zeros(1, 2, 2, 3), [0])
            else:
                pictures.save_figure(pictures.pyplot().figure(), str(tmp_path / name))
    assert (tmp_path / name).read_bytes() == b"before" and os.listdir(tmp_path) == [name]


# ---- damaged files

def test_a_flipped_bit_or_a_cut_is_found(unbroken, tmp_path):
    """Kills: reading without checksums, which takes a flipped bit for a weight. 120 flips and cuts, seeded."""
    content, rng = (unbroken / "checkpoint.pt").read_bytes(), random.Random(0)
    good = runs.read_checkpoint(str(unbroken))
    good = {key: {k: v.clone() for k, v in good[key].items()} for key in ("model", "ema")} | {"step": good["step"]}
    refused = 0
    for trial in range(120):
        damaged = bytearray(content)
        if trial % 4:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)):]
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        try:
            state = runs.read_checkpoint(str(tmp_path))
        except UserError:
            refused += 1
            continue
        # Bytes between the parts of the file: nothing that is read.
        assert state["step"] == good["step"]
        assert all(torch.equal(state[part][key], good[part][key]) for part in ("model", "ema") for key in good[part])
    assert refused > 100


def test_the_line_about_a_damaged_checkpoint_names_the_one_before(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:5000])
    status, line = run_here(T, ["--resume", tmp_path / "run", "--steps", 3, "--device", "cpu"])
    assert status == 2 and "damaged" in line and "previous.pt is the one before" in line and line.count("\n") == 1
    os.replace(tmp_path / "run" / "previous.pt", path)                    # as the line says
    assert run_here(T, ["--resume", tmp_path / "run", "--steps", 3, "--device", "cpu"]) == (None, "")
    assert not soak.differences(unbroken, tmp_path / "run")


def test_steps_that_the_run_has_behind_it_are_a_mistake(unbroken):
    """Who means "2 more" hears that --steps counts from the beginning. Kills: "done" and a config.json that says 2."""
    before = (unbroken / "config.json").read_bytes()
    status, line = run_here(T, ["--resume", unbroken, "--steps", 2, "--device", "cpu"])
    assert status == 2 and "is at step 3 already" in line and line.count("\n") == 1
    assert (unbroken / "config.json").read_bytes() == before


def restart(run, *args):
    """Start the command of `unbroken` once more, as a job that is restarted does."""
    return run_here(T, [*TINY, *DROP, "--save-every", 1, "--steps", 3, "--out", run, "--auto-resume", *args])


def spoilt(path, part, change):
    """Return a checkpoint of which a part is changed, as bytes."""
    state, file = torch.load(path, weights_only=True), io.BytesIO()
    change(state[part])
    torch.save(state, file)
    return file.getvalue()


@pytest.mark.parametrize("loss", ["missing", "cut", "empty", "of another program", "of another model", "not trained",
                                  "lacks a weight"])
def test_auto_resume_goes_on_from_the_checkpoint_before(unbroken, tmp_path, loss):
    """Kills: a run that begins at 0 over a good previous.pt; a job that a damaged file stops for good; a damaged file
    that is lost."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    path = run / "checkpoint.pt"
    content = {"missing": None, "cut": path.read_bytes()[:5000], "empty": b"", "of another program": b"PK 7",
               "of another model": spoilt(path, "model", lambda part: part.update({next(iter(part)): torch.ones(3)})),
               "lacks a weight": spoilt(path, "ema", lambda part: part.popitem()),
               "not trained": spoilt(path, "optimizer", lambda part: part["state"].clear())}[loss]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    status, line = restart(run)
    assert status is None and "going on from" in line and "previous.pt, step 2" in line and line.count("\n") == 1
    assert not soak.differences(unbroken, run) and (run / "log.csv").read_text().count("\n") == 4
    assert content is None or (run / "checkpoint.pt.damaged-1").read_bytes() == content


def test_auto_resume_goes_on_from_a_kept_checkpoint(unbroken, tmp_path):
    """Both usual ones are damaged. Kills: a search that ends at two."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    os.rename(run / "previous.pt", run / "checkpoint_0000002.pt")
    for name in ("checkpoint.pt", "previous.pt"):
        (run / name).write_bytes(b"PK")
    status, line = restart(run)
    assert status is None and "checkpoint_0000002.pt, step 2" in line and not soak.differences(unbroken, run)


def test_auto_resume_goes_on_from_a_kept_checkpoint_that_is_newer(unbroken, tmp_path):
    """Kills: previous.pt, which is older, because it is looked at first."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    os.rename(run / "checkpoint.pt", run / "checkpoint_0000003.pt")
    status, line = restart(run)
    assert status is None and "going on from" in line and "checkpoint_0000003.pt, step 3" in line


def test_sharded_checkpoints_are_the_folders_that_we_name(tmp_path):
    """Kills: a folder of another name that is renamed as damaged, or not found under ours."""
    for name in ("0000002", "12345678", "9", "\u0669", "00000002", "0000003.new"):
        (tmp_path / "sharded" / name).mkdir(parents=True)
    assert runs.sharded_steps(str(tmp_path)) == [2, 12345678]


def test_auto_resume_changes_nothing_where_no_checkpoint_is_whole(unbroken, tmp_path):
    """Kills: a fresh start over what could still be saved; a log that is cut."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    for name in ("checkpoint.pt", "previous.pt"):
        (run / name).write_bytes((run / name).read_bytes()[:3000])
    before = {name: (run / name).read_bytes() for name in os.listdir(run)}
    status, line = restart(run)
    assert status == 2 and "no checkpoint is whole" in line and line.count("\n") == 1
    assert before == {name: (run / name).read_bytes() for name in os.listdir(run)}


def test_auto_resume_does_not_pass_over_a_checkpoint_that_the_machine_cannot_read(unbroken, tmp_path, monkeypatch):
    """Kills: an old step, as memory was short or a disk failed for a moment."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)

    def fail(*args, **more):
        raise OSError(errno.EIO, "Input/output error")
    for owner, name in ((torch, "load"), (os, "stat")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(UserError, match="cannot be read: Input/output error$"):
                if runs.has_checkpoint(run):
                    start.newest_whole(str(run))
    assert sorted(os.listdir(run)) == sorted(os.listdir(unbroken))


def test_without_checkpoint_pt_a_run_is_not_begun_again(unbroken, tmp_path):
    """Kills: --out that takes the folder of a run for a new one, since only previous.pt is left."""
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    (run / "checkpoint.pt").unlink()
    status, line = run_here(T, [*TINY, "--steps", 1, "--out", run])
    assert status == 2 and "holds a run already" in line
    status, line = run_here(T, ["--resume", run, "--steps", 3])
    assert status == 2 and "previous.pt: renamed to checkpoint.pt it takes its place" in line


def test_a_distillation_goes_on_from_the_checkpoint_before(unbroken, tmp_path, monkeypatch):
    """Kills: a round that begins again, or stops for good, although previous.pt is whole."""
    monkeypatch.setattr(training.Run, "due", lambda self, every: every > 0 and self.step % 2 == 0)
    words = [unbroken, "--from", 4, "--to", 2, "--steps", 3, "--device", "cpu", "--out", tmp_path / "d"]
    assert run_here(distill, words) == (None, "")                         # saved at 2 and at the end
    good = runs.read_checkpoint(str(tmp_path / "d" / "2"))
    good = {key: value.clone() for key, value in good["model"].items()}
    (tmp_path / "d" / "2" / "checkpoint.pt").write_bytes(b"PK")
    status, line = run_here(distill, words)
    assert status is None and "previous.pt, step 2" in line and line.count("\n") == 1
    now = runs.read_checkpoint(str(tmp_path / "d" / "2"))
    assert now["step"] == 3 and all(torch.equal(good[key], now["model"][key]) for key in good)


@pytest.mark.parametrize("error, cause", [
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"), (MemoryError(), "not enough memory"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (RuntimeError("unable to mmap 17 bytes from file <x>: Cannot allocate memory (12)"), "not enough memory")])
@pytest.mark.parametrize("where", ["stat", "ZipFile", "load"])
def test_a_good_checkpoint_that_cannot_be_read_is_not_called_damaged(unbroken, monkeypatch, error, cause, where):
    """Kills: the advice to put the checkpoint before in its place, which destroys the good one."""
    if where == "stat" and not isinstance(error, OSError):
        pytest.skip("to look for a file takes no memory")
    real = os.stat

    def fail(path, *args, **options):
        if str(path).endswith("checkpoint.pt"):
            raise error
        return real(path, *args, **options)
    monkeypatch.setattr(*{"stat": (os, "stat"), "ZipFile": (runs.zipfile, "ZipFile"), "load": (torch, "load")}[where],
                        fail)
    with pytest.raises(UserError, match=f"checkpoint.pt: cannot be read: {cause}$"):
        runs.read_checkpoint(str(unbroken))


@pytest.mark.parametrize("value, wanted", ((float("nan"), "holds values that are not finite"),
                                           (1e30, "the images hold values that are not finite")))
def test_weights_that_are_not_finite_draw_no_black_picture(unbroken, tmp_path, value, wanted):
    """Kills: a picture without a word."""
    state = torch.load(unbroken / "checkpoint.pt", weights_only=True)
    for weights in state["ema"].values():
        weights.fill_(value)
    torch.save(state, tmp_path / "checkpoint.pt")
    status, line = run_here(P, [tmp_path, "--n", 1, "--labels", "A", "--out", tmp_path / "x.png", "--device", "cpu"])
    assert status == 2 and wanted in line and line.count("\n") == 1 and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("part", ["model", "ema", "exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("change", [torch.Tensor.double, lambda x: torch.zeros(*x.shape, 2)], ids=["double", "shape"])
def test_a_tensor_of_another_shape_or_type_is_one_line(two_steps, tmp_path, part, change):
    """Kills: weights that are converted without a word, a kernel that runs past a small tensor's memory."""
    state = torch.load(two_steps / "checkpoint.pt", weights_only=True)
    entries = state[part] if part in ("model", "ema") else state["optimizer"]["state"][0]
    key = part if part in entries else next(reversed(entries))
    entries[key] = change(entries[key])
    torch.save(state, tmp_path / "checkpoint.pt")
    status, line = run_here(T, ["--resume", tmp_path, "--steps", 3, "--device", "cpu"])
    assert status == 2 and "a checkpoint of another model" in line and line.count("\n") == 1 and key in line, line


def test_what_is_distilled_is_compared_with_the_model(two_steps, tmp_path):
    """Kills: a student's checkpoint that is loaded unseen."""
    words = [two_steps, "--from", 4, "--to", 2, "--steps", 2, "--device", "cpu", "--out", tmp_path / "d"]
    assert run_here(distill, words) == (None, "")
    good = torch.load(tmp_path / "d" / "2" / "checkpoint.pt", weights_only=True)
    for part in ("model", "optimizer"):
        state = copy.deepcopy(good)
        entries = state["model"] if part == "model" else state["optimizer"]["state"][0]
        key = next(iter(entries.keys() - {"step"}))
        entries[key] = entries[key].double()
        torch.save(state, tmp_path / "d" / "2" / "checkpoint.pt")
        status, line = run_here(distill, words)
        assert status == 2 and "a checkpoint of another model" in line and line.count("\n") == 1, line


def test_a_run_may_be_named_by_its_checkpoint(unbroken, tmp_path, monkeypatch):
    """Kills: results in a folder `checkpoint.pt`; another file of the run, read as if it were the newest."""
    file = unbroken / "checkpoint.pt"
    assert run_here(P, [file, "--n", 1, "--labels", "A", "--out", tmp_path / "x.png", "--device", "cpu"]) == (None, "")
    monkeypatch.chdir(unbroken)
    assert runs.run_of("checkpoint.pt") == "." and runs.run_of("previous.pt") == "previous.pt"
    status, line = run_here(P, [unbroken / "previous.pt"])
    assert status == 2 and line.count("\n") == 1


def test_good_shards_that_the_machine_cannot_read_are_not_called_damaged(tmp_path, monkeypatch):
    """Kills: the advice to remove them."""
    def unreadable(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    state = dict(path=str(tmp_path), files={"a": 1})
    with pytest.raises(UserError, match="damaged"):                       # there is no such file
        shard.check(state)
    monkeypatch.setattr(shard, "checksum", unreadable)
    with pytest.raises(UserError, match="a: cannot be read: Permission denied$"):
        shard.check(state)


def test_a_gradient_that_is_not_finite_leaves_the_state_before_it(tmp_path, monkeypatch):
    """Kills: an update by the bad gradient, EMA weights that moved, a step named wrongly."""
    real, calls, out = T.simple_loss, [], tmp_path / "r"

    def loss(*args):
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(T, "simple_loss", loss)
        status, err = run_here(T, [*TINY, "--steps", 8, "--log-every", 4, "--keep-every", 2, "--held-out-every", 0,
                                   "--out", out])
    assert status == 1 and "step 2: the gradient is not finite" in err and "failed.pt" in err
    assert err.count("\n") == 1 and len(calls) == 3
    assert not os.path.samefile(out / "checkpoint_0000002.pt", out / "failed.pt")               # kept before the step
    state = runs.read_checkpoint(str(out), "failed.pt")
    assert run_here(T, [*TINY, "--steps", 2, "--out", tmp_path / "good"]) == (None, "")
    good = runs.read_checkpoint(str(tmp_path / "good"))
    assert state["step"] == 2
    for part in ("model", "ema"):
        assert all(torch.equal(state[part][k], good[part][k]) for k in good[part])
    assert all(torch.equal(values[k], good["optimizer"]["state"][i][k])
               for i, values in state["optimizer"]["state"].items() for k in values)


# ---- an error within a step

ERRORS = {"CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
          "CPU": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 14400000000 bytes."),
          "file": FileNotFoundError(errno.ENOENT, "No such file or directory", "words.npy"),
          "ours": UserError("words.npy: cannot be read: Input/output error"), "bug": TypeError("a bug")}


def fails_in(monkeypatch, owner, name, error, call):
    """Let a function raise this error at its n-th call."""
    real, calls = getattr(owner, name), []

    def function(*args, **more):
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **more)
    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("kind, name", [*((kind, "simple_loss") for kind in ERRORS), ("file", "conditions")])
def test_an_error_within_a_step_costs_no_step_before(unbroken, tmp_path, monkeypatch, kind, name):
    """Memory is short, a cache vanishes, we made a mistake. Kills: the steps since the last save; a bug that hides."""
    words = [*TINY, *DROP, "--steps", 3, "--held-out-every", 0, "--out", tmp_path / "r"]
    kept = f"the checkpoint of step 2 is in {tmp_path / 'r'}"
    with monkeypatch.context() as patch:
        fails_in(patch, T, name, copy.copy(ERRORS[kind]), 3)
        if kind == "bug":
            with pytest.raises(TypeError) as left:
                run_here(T, words)
            assert left.value.__notes__ == [kept] and left.traceback[-1].name == "function"     # where it was
        else:
            status, line = run_here(T, words)
            assert status == 2 and line.endswith(f"; {kept}\n") and line.count("\n") == 1
            assert ("--accumulate, --recompute, --batch" if kind in ("CUDA", "CPU") else "words.npy: ") in line
    assert run_here(T, ["--resume", tmp_path / "r", "--device", "cpu", "--save-every", 1]) == (None, "")
    assert not soak.differences(unbroken, tmp_path / "r")


@pytest.mark.parametrize("owner, name", [(torch.optim.Adam, "step"), (T, "update_ema")])
def test_half_a_step_is_not_saved(tmp_path, monkeypatch, owner, name):
    """Kills: weights of a step beside EMA weights or optimizer state of another."""
    fails_in(monkeypatch, owner, name, copy.copy(ERRORS["CUDA"]), 3)
    status, line = run_here(T, [*TINY, "--steps", 3, "--save-every", 1, "--out", tmp_path / "r"])
    assert status == 2 and line.endswith(f"; the checkpoint of step 2 is in {tmp_path / 'r'}\n")
    shutil.rmtree(tmp_path / "r")
    fails_in(monkeypatch, owner, name, copy.copy(ERRORS["CUDA"]), 3)
    status, line = run_here(T, [*TINY, "--steps", 3, "--out", tmp_path / "r"])
    assert status == 2 and line.endswith("; no checkpoint was written yet\n") and line.count("\n") == 1
    assert not runs.has_checkpoint(tmp_path / "r")


# ---- waiting for data, and nobody who listens

WAIT = [*TINY, "--steps", 100, "--save-every", 50, "--held-out-every", 0]


def spoil(monkeypatch, fault, after=64 + 24):                             # 64 to measure the bands, then six batches
    """Let the drawing of scenes call fault() after some of them, which is in a worker if there is one."""
    real, drawn = D.Glyphs.image, []

    def image(self, i):
        drawn.append(i)
        if len(drawn) > after:
            fault()
        return real(self, i)
    monkeypatch.setattr(D.Glyphs, "image", image)


@pytest.fixture
def steps(monkeypatch):
    """A list that grows with each step of a run in this process."""
    real, taken = T.update_ema, []
    monkeypatch.setattr(T, "update_ema", lambda *args: (real(*args), taken.append(1)))
    return taken


def send_when_it_waits(number, steps):
    """Send this process a signal once it has taken no step for two seconds."""
    before = 0
    while not before == len(steps) > 0:
        before = len(steps)
        time.sleep(2)
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("processes, number, stuck", [
    (0, signal.SIGTERM, "reads"), (1, signal.SIGTERM, "reads"), (1, signal.SIGHUP, "reads"),
    (1, signal.SIGINT, "reads"), (1, signal.SIGTERM, "is stopped")])
def test_waiting_for_data_hears_signals(tmp_path, monkeypatch, steps, processes, number, stuck):
    """A read that blocks. Kills: a signal that waits for the batch; a step that is lost; an end that waits for a worker
    that does not end."""
    spoil(monkeypatch, lambda: time.sleep(1000) if stuck == "reads" else os.kill(os.getpid(), signal.SIGSTOP))
    sender = threading.Thread(target=send_when_it_waits, args=(number, steps))
    sender.start()
    since = time.time()
    assert run_here(T, [*WAIT, "--workers", processes, "--out", tmp_path / "r"])[0] == 128 + number
    sender.join()
    assert runs.read_checkpoint(str(tmp_path / "r"))["step"] == len(steps) > 0 and time.time() - since < 90
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("fault, wanted", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "--workers 0"),
    (lambda: time.sleep(1000), "did not come within 3 s"),
    (lambda: open("/nowhere/caption.txt"), "No such file or directory: '/nowhere/caption.txt'")])
def test_a_worker_that_fails_costs_no_step(tmp_path, monkeypatch, steps, fault, wanted):
    """It is killed, it hangs, a file is gone. Kills: a traceback; a parent that waits for ever; steps that are lost."""
    spoil(monkeypatch, fault)
    monkeypatch.setattr(workers, "LIMIT", 3)
    status, line = run_here(T, [*WAIT, "--workers", 1, "--out", tmp_path / "r"])
    assert status == 2 and wanted in line and line.count("\n") == 1, line
    assert f"the checkpoint of step {len(steps)} is in" in line and 0 < len(steps) <= 6
    assert runs.read_checkpoint(str(tmp_path / "r"))["step"] == len(steps)


@pytest.mark.parametrize("error", [ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_as_it_sends_a_batch_is_gone_like_any_other(error):
    """A kill at any moment. Kills: the words of a socket that say nothing to the user."""
    def broken():
        raise error
        yield
    with pytest.raises(UserError, match="is gone, .* --workers 0"):
        next(workers.Batches(broken()))


def test_data_that_disappear_cost_no_step(tmp_path, monkeypatch):
    """Kills: the step before them that is not saved."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 9, 9)).save(tmp_path / "photos" / f"{i}.png")
    real, steps = T.update_ema, []

    def update(*args):
        real(*args)
        steps.append(1)
        if len(steps) == 3:
            shutil.rmtree(tmp_path / "photos")
    monkeypatch.setattr(T, "update_ema", update)
    status, line = run_here(T, [*WAIT, "--data", tmp_path / "photos", "--out", tmp_path / "r"])
    assert status == 2 and "no image left that can be read" in line and line.count("\n") == 1
    assert runs.read_checkpoint(str(tmp_path / "r"))["step"] == 3


# The workers block after some scenes.
BLOCKED = """
import sys, time
sys.path.insert(0, sys.argv.pop(1))
import data, train
from plumbing import runs
real, drawn = data.Glyphs.image, []
def image(self, i):
    drawn.append(i)
    if len(drawn) > 64 + 10:
        time.sleep(1000)
    return real(self, i)
data.Glyphs.image = image
runs.main_program(train.main)
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_several_processes_that_wait_hear_sigterm(tmp_path, more):
    """All wait for data, and torchrun is told to stop. Kills: a kill after 30 seconds that takes the last steps."""
    (tmp_path / "blocked.py").write_text(BLOCKED)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2,
             tmp_path / "blocked.py", ROOT, *WAIT, *more, "--workers", 1, "--out", tmp_path / "r"]
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        log, deadline = tmp_path / "r" / "log.csv", time.time() + 120
        while time.time() < deadline and not (log.exists() and log.read_text().count("\n") == 6):
            time.sleep(0.5)
        process.terminate()
        process.wait(60)
        saved = start.newest_checkpoint(str(tmp_path / "r"))
        assert saved["step"] == 5 and ("files" in saved) == bool(more)    # of two scenes each: after ten they block
    finally:
        process.kill()


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux") or os.geteuid() != 0, reason="mounts")
def test_a_small_shared_memory_is_one_line(tmp_path):
    """As in a container. Kills: a worker's traceback, and a parent that waits for ever."""
    words = [sys.executable, os.path.join(ROOT, "train.py"), *TINY, "--size", 32, "--batch", 64, "--steps", 50, "--out",
             tmp_path / "r", "--workers", 2]
    done = subprocess.run(["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1M tmpfs /dev/shm && exec "$@"', "sh",
                           *map(str, words)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "--workers 0" in done.stderr and "--shm-size" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def stdout_is(monkeypatch):
    """A function: stdout_is(stream) -> what run_here prints goes there."""
    real = contextlib.redirect_stdout
    return lambda stream: monkeypatch.setattr(contextlib, "redirect_stdout", lambda _: real(stream))


def closed_pipe():
    """Return a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def test_when_nobody_reads_on_the_step_is_saved(tmp_path, stdout_is):
    """`train.py | head -3`. Kills: an end without a checkpoint; a run that nobody wants; a line about the pipe."""
    stdout_is(closed_pipe())
    assert run_here(T, [*WAIT, "--out", tmp_path / "r"]) == (128 + signal.SIGPIPE, "")
    assert runs.read_checkpoint(str(tmp_path / "r"))["step"] == 1
    stdout_is(closed_pipe())
    assert run_here(T, ["--dry-run"]) == (1, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux")
def test_a_full_disk_under_stdout_is_one_line(two_steps, tmp_path, stdout_is):
    """`train.py > log` trains on, as with a full disk under log.csv. Kills: an end as if nobody read; no word at all;
    Python's own words about the file that it cannot close."""
    stdout_is(open("/dev/full", "w"))
    assert run_here(T, [*TINY, "--steps", 2, "--out", tmp_path / "r"]) == (
        None, "stdout: No space left on device; nothing more is printed there\n")
    assert runs.read_checkpoint(str(tmp_path / "r"))["step"] == 2
    sample = [two_steps, "--n", 1, "--labels", "A", "--out", tmp_path / "x.png", "--device", "cpu"]
    for module, args, line in ((T, ["--dry-run"], "train.py: writing: No space left on device\n"),
                               (P, sample, "sample.py: writing: No space left on device\n")):
        stdout_is(open("/dev/full", "w"))
        assert run_here(module, args) == (2, line)


def test_without_stdout_it_trains(tmp_path, stdout_is):
    """`train.py >&-`: sys.stdout is None."""
    stdout_is(None)
    assert run_here(T, [*TINY, "--steps", 2, "--out", tmp_path / "r"]) == (None, "")
    assert runs.read_checkpoint(str(tmp_path / "r"))["step"] == 2


def test_the_course_may_be_read_in_part():
    """`python -m course list | head -1`. Kills: "Broken pipe"."""
    for stream, status in ((closed_pipe(), 1), (None, 0)):                # the second: without stdout
        command = f"exec {sys.executable} -m course list" + ("" if stream else " >&-")
        done = subprocess.run(["sh", "-c", command], stdout=stream, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (status, "")


def test_nohup_is_heeded(monkeypatch):
    """Kills: a run that ends with the terminal although SIGHUP is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        training.Interrupt()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("name", ["train.py", "sample.py", "evaluate.py", "distill.py", "plumbing.shard"])
def test_ctrl_c_during_the_imports_is_one_line(name):
    """Kills: a page of PyTorch's import as a traceback."""
    code = ("import runpy, sys\n"
            "class Finder:\n    def find_spec(self, name, *rest):\n"
            "        if name == 'torch':\n            raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Finder())\n"
            "name = sys.argv[1].rpartition('/')[2]\nsys.path.insert(0, '.')\n"
            "(runpy.run_path if name.endswith('.py') and '/' in sys.argv[1] else runpy.run_module)(sys.argv[1], "
            "run_name='__main__')\n")
    done = subprocess.run([sys.executable, "-c", code, os.path.join(ROOT, name) if name.endswith(".py") else name],
                          capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


# ---- processes that die

MORTAL = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import train
from plumbing import runs
real, steps = train.update_ema, []
def update(*args):
    steps.append(1)
    if len(steps) == 3 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    real(*args)
train.update_ema = update
runs.main_program(train.main)
"""


def mortal(tmp_path, *launcher):
    (tmp_path / "mortal.py").write_text(MORTAL)
    return program(tmp_path / "mortal.py", ROOT, *TINY, "--steps", 5, "--save-every", 1, "--out", tmp_path / "run",
                   "--auto-resume", launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                                              *launcher), timeout=200)


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_when_a_process_dies_the_others_end_and_say_why(tmp_path):
    since = time.time()
    done = mortal(tmp_path)
    assert done.returncode != 0 and time.time() - since < 60
    assert "another process of this run is gone" in done.stderr and "SIGKILL" in done.stderr
    assert "main_program(main)" not in done.stderr                        # no traceback of ours
    assert runs.read_checkpoint(str(tmp_path / "run"))["step"] == 3       # rank 0 had taken it before it noticed


@pytest.mark.parametrize("said", ("InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx",
                                  "Failed to find C compiler. Please specify via CC environment variable"))
def test_torch_compile_without_a_compiler_is_one_line(said, capsys):
    def main():
        raise RuntimeError(said)
    with pytest.raises(SystemExit) as left:
        runs.main_program(main)
    error = capsys.readouterr().err
    assert left.value.code == 2 and "--compile off" in error and error.count("\n") == 1


@pytest.mark.parametrize("error", (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
                 "to allocate 14400000000 bytes. Error code 12 (Cannot allocate memory)"),
    PermissionError(errno.EACCES, "Permission denied", "runs/hers/config.json"),
    OSError(errno.EROFS, "Read-only file system", "runs/hers/config.json")))
def test_memory_and_folders_that_are_not_ours_are_one_line(error, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as left:
        runs.main_program(main)
    line = capsys.readouterr().err
    assert left.value.code == 2 and line.count("\n") == 1
    assert ("--accumulate" in line and ("20.00 GiB" in line or "14400000000 bytes" in line)
            if isinstance(error, RuntimeError) else "runs/hers/config.json: " in line)


def test_runs_that_start_together_have_folders_of_their_own(tmp_path, monkeypatch):
    """Kills: both look whether runs/x is there, and both take it."""
    monkeypatch.chdir(tmp_path)
    made = os.makedirs

    def too_late(path, *args, **options):
        if str(path).endswith("x"):
            made(path, exist_ok=True)                                     # by the other, a moment before
        made(path, *args, **options)
    monkeypatch.setattr(os, "makedirs", too_late)
    assert start.new_folder(None, "x") == os.path.join("runs", "x-2")


@pytest.mark.long
def test_torchrun_starts_it_again_and_it_goes_on_by_itself(tmp_path):
    done = mortal(tmp_path, "--max-restarts", "2")
    assert done.returncode == 0, done.stderr
    assert "from step 3" in done.stdout
    whole = program("train.py", *TINY, "--steps", 5, "--out", tmp_path / "whole")
    assert whole.returncode == 0
    a, b = (runs.read_checkpoint(str(tmp_path / name)) for name in ("run", "whole"))
    assert a["step"] == b["step"] == 5
    for key in b["model"]:                                                # as two processes against one
        torch.testing.assert_close(a["model"][key], b["model"][key], atol=1e-4, rtol=1e-3)


def test_killed_before_its_first_checkpoint_it_says_what_works(tmp_path):
    """Kills: --out that advises --resume, which says that this is no run."""
    words = [*TINY, "--steps", 1, "--out", tmp_path / "run"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("step,images\n")
    for module, args in ((T, words), (T, ["--resume", tmp_path / "run"]), (P, [tmp_path / "run"])):
        status, line = run_here(module, args)
        assert status == 2 and line.count("\n") == 1 and "--auto-resume" in line and "killed" in line
    assert run_here(T, [*words, "--auto-resume"]) == (None, "")           # as the line says


def test_auto_resume_begins_and_goes_on(tmp_path):
    words = [*TINY, "--out", tmp_path / "run", "--auto-resume", "--save-every", 5]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").write_text("step,images\n1,")          # killed before its first checkpoint
    assert run_here(T, [*words, "--steps", 2]) == (None, "")
    assert run_here(T, [*words, "--steps", 3]) == (None, "")
    assert runs.read_checkpoint(str(tmp_path / "run"))["step"] == 3
    status, line = run_here(T, [*words, "--steps", 3, "--lr", 1])
    assert status == 2 and "would make it another" in line
    assert run_here(T, [*words, "--steps", 4, "--preset", "glyphs64"]) == (None, "")            # as it began
    status, line = run_here(T, [*words, "--steps", 5, "--preset", "glyphs64_unet"])
    assert status == 2 and "is another run than this command's: its --model is 'uvit', not 'unet' " in line
    assert runs.read_checkpoint(str(tmp_path / "run"))["step"] == 4


# ---- images

def awkward(folder):
    """Some 70 files that have broken somebody's loader -> {name: is there an image to be had?}"""
    rng, good = np.random.default_rng(0), {}
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    picture = Image.fromarray(rng.integers(0, 255, (24, 36, 3), np.uint8))

    def save(name, image, ok=True, **options):
        image.save(folder / name, **options)
        good[name] = ok

    def write(name, content, ok=False):
        with open(os.fsencode(folder) + b"/" + os.fsencode(name), "wb") as file:
            file.write(content)
        good[name] = ok
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        save(f"mode_{mode.replace(';', '_')}.png", picture.convert("L").convert(mode))
    for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "F", "I;16"):
        save(f"mode_{mode.replace(';', '_')}.tif", picture.convert("L").convert(mode) if mode in ("F", "I;16")
             else ImageCms.applyTransform(picture, to_lab) if mode == "LAB" else picture.convert(mode))
    for mode in ("L", "RGB", "CMYK", "YCbCr"):
        save(f"mode_{mode}.jpg", picture.convert(mode))
    for packing in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        save(f"{packing}.tif", picture, compression=packing)
    for turn in range(1, 9):
        exif = picture.getexif()
        exif[0x0112] = turn
        save(f"exif_{turn}.jpg", picture, exif=exif)
    save("progressive.jpg", picture, progressive=True)
    save("lossless.webp", picture, lossless=True)
    save("lossy.webp", picture.convert("RGBA"))
    save("plain.bmp", picture)
    save("frames.gif", picture.convert("P"), save_all=True, append_images=[picture.convert("P")] * 3)
    save("frames.webp", picture, save_all=True, append_images=[picture] * 3)
    save("frames.png", picture, save_all=True, append_images=[picture] * 3)
    save("pages.tif", picture, save_all=True, append_images=[picture] * 2)
    save("interlaced.png", picture, interlace=1)
    save("transparent.png", picture.convert("P"), transparency=0)
    save("transparent.gif", picture.convert("P"), transparency=0)
    save("one_pixel.png", Image.new("RGB", (1, 1)))
    save("thin.png", Image.new("RGB", (3000, 1)))
    save("tall.png", Image.new("L", (1, 3000)))
    save("upper.PNG", picture, format="PNG")
    save("wrong_suffix.jpg", picture, format="PNG")                       # the content decides
    for name in ("with space.png", "new\nline.png", "quote'\".png", "-n.png", "snow\u2603.png", "%s{}.png"):
        save(name, picture, format="PNG")
    png, jpg = (folder / "mode_RGB.png").read_bytes(), (folder / "mode_RGB.jpg").read_bytes()
    write(os.fsdecode(b"latin\xe9.png"), png, ok=True)                    # a name that is not UTF-8
    for suffix, whole in (("png", png), ("jpg", jpg), ("gif", (folder / "frames.gif").read_bytes()),
                          ("tif", (folder / "mode_RGB.tif").read_bytes()),
                          ("webp", (folder / "lossless.webp").read_bytes()),
                          ("bmp", (folder / "plain.bmp").read_bytes())):
        write(f"cut.{suffix}", whole[:len(whole) // 3])
        write(f"empty.{suffix}", b"")
    write("noise.png", rng.bytes(3000))
    write("header.png", png[:8] + rng.bytes(500))
    write("text.jpg", b"<html>not found</html>")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 255
    write("flipped.png", bytes(flipped))
    # A bomb: 40 kB that say they are 20000 x 20000.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save("bomb.png", Image.new("1", (20000, 20000)), ok=False)
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.symlink(folder, folder / "loop")
    os.symlink("itself.png", folder / "itself.png")
    os.symlink("nowhere", folder / "dangling.png")
    save("locked.png", picture)
    os.chmod(folder / "locked.png", 0)
    good["locked.png"] = os.access(folder / "locked.png", os.R_OK)        # root may read all
    return good


def test_awkward_files_are_read_right_or_skipped_by_name(tmp_path):
    good = awkward(tmp_path)
    assert len(good) >= 70
    # In a process of its own, for its memory and a limit on its time.
    code = ("import os, sys; sys.path.insert(0, os.path.dirname(sys.argv[1])); import data as D\n"
            "from plumbing import images\n"
            "source = D.ImageFolder(sys.argv[2], (32, 32))\n"
            "for path in source.files:\n"
            "    try:\n        image = source.image(source.files.index(path))\n"
            "        assert tuple(image.shape) == (3, 32, 32) and -1 <= image.min() and image.max() <= 1\n"
            "        print('good', ascii(os.path.relpath(path, sys.argv[2])))\n"
            "    except images.BrokenImage as error:\n"
            "        assert os.path.basename(path) in str(error)\n"
            "        print('broken', ascii(os.path.relpath(path, sys.argv[2])))\n"
            "for path, why in source.skipped:\n    print('skipped', ascii(os.path.relpath(path, sys.argv[2])))\n"
            "if os.path.exists('/proc/self/status'):\n"
            "    print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).strip())\n")
    done = program("data.py", tmp_path, launcher=("-c", code), timeout=100)
    assert done.returncode == 0, done.stderr
    said = {}
    for line in done.stdout.splitlines():
        if line.startswith("VmHWM"):
            assert int(line.split()[1]) < 500 * 1024                      # the most that it had in use, kB, PyTorch too
        else:
            what, name = line.split(" ", 1)
            said[ast.literal_eval(name)] = what
    skipped = {name for name, what in said.items() if what == "skipped"}
    assert skipped == {"pipe.png", "loop", "itself.png", "dangling.png"}
    for name, ok in good.items():
        assert said[name] == ("good" if ok else "broken"), name
    # And a run over them says each once, counts them, and gets to its end.
    status, err = run_here(T, [*TINY, "--data", tmp_path, "--batch", "64", "--steps", "2", "--out", tmp_path / "run"])
    assert status is None, err


# ---- command lines

VALUES = ["", "0", "1", "-1", "2", "3", "7", "16", "64", "1e9", "-1e300", "1e400", "nan", "inf", "0.5", "a", "A,B",
          "1,2", "2,1,", "16,16", "0,0", "8x8", "1/2", "1,1/1,1", "2:1", "0:0", "true", "None", "auto", "on", "bf16",
          "float32", "cpu", "cuda", "mps", "/", "/dev/null", ".", "..", "run", "nosuch", "\u00e9\U0001f600", "--",
          "-", "%s", "{}", "'", "a b", "\n", "glyphs", "glyphs64", "glyphs64_nested", "glyphs64_sr", "glyphs64_text",
          "unet", "dwt_1", "conv_4", "haar", "none", "cosine", "interpolated", "bytes", "9" * 30, "0x10", "1_000",
          "dynamic", "ddim", "ddpm", "s=0,1", "guidance=1,2", "steps=a", "x.png", "x.gif"]


def flags_of(module):
    out, argv = io.StringIO(), sys.argv
    sys.argv = [module.__name__, "-h"]
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        module.main()
    sys.argv = argv
    return sorted(set(re.findall(r"--[a-z][a-z0-9-]*", out.getvalue())) - {"--help"})


@pytest.mark.long
def test_no_command_line_shows_a_traceback(two_steps, tmp_path, monkeypatch):
    """A few hundred, seeded: each ends well, or with one line and status 2."""
    shutil.copytree(two_steps, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    usual = {T: ["--dry-run"], P: ["run", "--n", "1", "--steps", "1"], shard: ["run"],
             evaluate: ["run", "--n", "4", "--metrics", "none", "--steps", "1"],
             distill: ["run", "--from", "2", "--to", "1"]}
    brief = {distill: ["--steps", "1", "--guided-steps", "1"]}            # the last word: 9 * 30 steps take for ever
    flags, rng, well = {module: flags_of(module) + ["--nosuch"] for module in usual}, random.Random(0), 0
    for _ in range(300):
        module = rng.choice([T, T, T, P, P, evaluate, distill, shard])
        args = list(usual[module])
        for _ in range(rng.choice((1, 1, 2, 3))):
            flag, value = rng.choice(flags[module]), rng.choice(VALUES)
            args += rng.choice(([flag, value], [flag, value], [f"{flag}={value}"], [flag]))
        if rng.random() < 0.1:
            args.insert(0, rng.choice(VALUES))
        args += brief.get(module, [])
        status, err = run_here(module, args)                              # anything else raises
        assert status in (None, 0, 2), (module.__name__, args, err)
        assert status != 2 or err.count("\n") == 1, (module.__name__, args, err)
        well += status != 2
    assert 3 < well < 290                                                 # neither all refused nor all accepted
