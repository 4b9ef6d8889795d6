"""The data of a run that moved, changed, or hold the run itself: train.py, evaluate.py and distill.py find the same."""
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data as D
import distill
import evaluate as E
import sample as P
import train as T
from plumbing import sources
from programs import ROOT, TINY, checkpoint, run_here

DISTIL = ["--from", 4, "--to", 2, "--steps", 2, "--device", "cpu"]
EXPORT = ["--metrics", "none", "--n", 4, "--device", "cpu", "--export"]


def write_images(folder, n=4, seed=0):
    """n small images of as many bytes each, whatever the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 256, (n, 20, 20, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i}.bmp")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of two steps on tmp_path/photos, which it knows by a relative path."""
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        write_images(tmp_path / "photos" / name, seed=len(name) + ord(name[0]))
    assert run_here(T, [*TINY, "--steps", 2, "--data", "photos", "--out", "run"]) == (None, "")
    return tmp_path / "run"


def one_line(done, *wanted):
    status, line = done
    assert status == 2 and line.count("\n") == 1 and all(word in line for word in wanted), line


def test_data_that_moved_are_the_same_data(run, tmp_path):
    """Kills: --resume that calls them another run; evaluate.py or distill.py that only look in the old place."""
    assert run_here(T, ["--resume", run, "--steps", 3]) == (None, "")
    weights = checkpoint(run)["model"]
    (run / "previous.pt").replace(run / "checkpoint.pt")                  # back to step 2
    there = shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    for program, args in ((E, [run, *EXPORT, "a.npz"]), (distill, [run, *DISTIL]),
                          (T, ["--resume", run, "--steps", 3])):
        one_line(run_here(program, args), "its data are not in photos", "say with --data")
        one_line(run_here(program, [*args, "--data", ""]), "--data is empty")
        one_line(run_here(program, [*args, "--data", tmp_path / "none"]), "no such file or folder")
        one_line(run_here(program, [*args, "--data", there / "cat"]), "classes are no longer those of the run")
        assert run_here(program, [*args, "--data", there]) == (None, "")
    assert np.load("a.npz")["arr_0"].shape == (4, 16, 16, 3)
    assert all(torch.equal(value, weights[key]) for key, value in checkpoint(run)["model"].items())     # to the bit
    assert run_here(T, ["--resume", run, "--steps", 4]) == (None, "")     # it knows the new place
    shutil.move(there, tmp_path / "photos")
    one_line(run_here(T, ["--resume", run, "--steps", 5]), f"its data are not in {there}", "say with --data")


def test_a_run_is_trained_by_one_process(run):
    """Kills: two --resume of one run, each of which overwrites the log and the checkpoints of the other."""
    holder = "import sys; from plumbing.files import hold; lock = hold('run'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env={**os.environ, "PYTHONPATH": ROOT}) as other:
        other.stdout.readline()
        whole = (run / "checkpoint.pt").read_bytes()
        (run / "checkpoint.pt").write_bytes(b"half")                      # the lock comes before any reading
        for words in (["--resume", run], [*TINY, "--data", "photos", "--auto-resume", "--out", run]):
            one_line(run_here(T, [*words, "--steps", 3]), "run: another process is training this run",
                     f"process {other.pid} on {platform.node()}")
        (run / "checkpoint.pt").write_bytes(whole)
        (run.parent / "d" / "2").mkdir(parents=True)
        (run / ".lock").rename(run.parent / "d" / "2" / ".lock")          # as if it distilled
        one_line(run_here(distill, [run, *DISTIL, "--out", "d"]), f"process {other.pid} on {platform.node()}")
        other.stdin.close()
    assert run_here(T, ["--resume", run, "--steps", 3]) == (None, "")


def test_the_same_command_in_other_words(run, tmp_path):
    """Kills: --auto-resume or a distillation that compares how a folder is written."""
    words = [*TINY, "--preset", "glyphs64", "--out", "run", "--auto-resume", "--steps", 3, "--data"]
    assert run_here(T, [*words, tmp_path / "photos"]) == (None, "")
    one_line(run_here(T, words[:-1]), "another run than this command's", "not 'glyphs'")
    assert run_here(distill, ["run", *DISTIL]) == (None, "")
    assert run_here(distill, [run, *DISTIL, "--data", tmp_path / "photos"]) == (None, "")
    other = checkpoint(run)
    next(iter(other["ema"].values())).add_(1)
    torch.save(other, run / "checkpoint.pt")
    one_line(run_here(distill, [run, *DISTIL]), "another distillation")


def test_a_run_that_is_here_has_a_name(run, tmp_path, monkeypatch):
    """Kills: `distill.py .` that writes ".-distilled" into the run."""
    monkeypatch.chdir(run)
    assert run_here(distill, [".", *DISTIL, "--data", "../photos"]) == (None, "")
    assert (tmp_path / "run-distilled" / "2" / "checkpoint.pt").exists()
    assert not [name for name in os.listdir(run) if "distilled" in name]


def test_data_that_changed_are_noticed_and_can_be_accepted(run, tmp_path):
    """Kills: other images of the same number and names; a removed file that blocks the run for good."""
    assert run_here(distill, [run, *DISTIL]) == (None, "")
    write_images(tmp_path / "photos" / "cat", seed=5)
    tasks = ((T, ["--resume", run, "--steps", 3]), (E, [run, *EXPORT, "a.npz"]), (distill, [run, *DISTIL]))
    for program, args in tasks:
        one_line(run_here(program, args), "no longer those that the run began with", "--accept-changed-data")
    for program, args in tasks:
        assert run_here(program, [*args, "--accept-changed-data", *["--out", "o"] * (program is distill)]) == (None, "")
    assert run_here(T, ["--resume", run, "--steps", 4]) == (None, "")     # these are now the run's
    (tmp_path / "photos" / "cat" / "0.bmp").unlink()
    one_line(run_here(T, ["--resume", run, "--steps", 5]), "had 8 examples and now has 7", "--accept-changed-data")
    assert run_here(T, ["--resume", run, "--steps", 5, "--accept-changed-data"]) == (None, "")
    assert checkpoint(run)["examples"] == 7 and checkpoint(run)["step"] == 5
    shutil.rmtree(tmp_path / "photos" / "cat")                            # there is no number for another class
    one_line(run_here(T, ["--resume", run, "--steps", 6, "--accept-changed-data"]), "classes are no longer those")


def test_a_class_that_comes_or_goes_between_two_rounds_shifts_no_label(run, tmp_path, monkeypatch):
    """Each round of a distillation sees the classes of its teacher. Kills: a folder that is listed anew for each round:
    labels that shift, with status 0, or a label that the model has no row for."""
    rounds, real = [], distill.batches

    def batches(source, *args, **options):
        rounds.append((source.classes, source.labels))
        write_images(tmp_path / "photos" / "ape", seed=5)                 # sorts before the others
        return real(source, *args, **options)
    monkeypatch.setattr(distill, "batches", batches)
    two_rounds = ["--from", 4, "--to", 1, *DISTIL[4:]]
    assert run_here(distill, [run, *two_rounds, "--out", "o"]) == (None, "")
    assert len(rounds) == 2 and rounds[0] == rounds[1]
    one_line(run_here(distill, [run, *DISTIL, "--out", "p"]), "classes are no longer those of the run")
    one_line(run_here(distill, [run, *DISTIL, "--out", "p", "--accept-changed-data"]), "classes are no longer those")


def test_captions_need_no_classes(tmp_path, monkeypatch):
    """Kills: a new subfolder that blocks a run with captions for good."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "photos")
    for i in range(4):
        (tmp_path / "photos" / f"{i}.txt").write_text("a caption")
    text = ["--text-encoder", "bytes", "--text-channels", 16, "--text-length", 12, "--text-layers", 1]
    assert run_here(T, [*TINY, *text, "--steps", 1, "--data", "photos", "--out", "run"]) == (None, "")
    write_images(tmp_path / "photos" / "more")
    one_line(run_here(T, ["--resume", "run", "--steps", 2]), "had 4 examples and now has 8")
    assert run_here(T, ["--resume", "run", "--steps", 2, "--accept-changed-data"]) == (None, "")


def test_what_counts_as_the_same(tmp_path):
    """Kills: a fingerprint of the place; one without names, sizes, order or captions; a pipe that blocks."""
    write_images(tmp_path / "a", 200)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.mkfifo(tmp_path / "b" / "captions.jsonl")
    ids = [sources.data_id(D.ImageFolder(tmp_path / name), captions) for name in "ab" for captions in (False, True)]
    assert ids[0] == ids[2] and ids[1] == ids[3]
    os.remove(tmp_path / "b" / "captions.jsonl")
    seen = set(ids)
    for change in (lambda: (tmp_path / "b" / "7.bmp").rename(tmp_path / "b" / "x.bmp"),
                   lambda: Image.new("RGB", (9, 9)).save(tmp_path / "b" / "x.bmp"),
                   lambda: (tmp_path / "b" / "0.txt").write_text("a caption")):
        change()
        new = sources.data_id(D.ImageFolder(tmp_path / "b"), captions=True)
        assert new not in seen
        seen.add(new)
    font = shutil.copy(sources.find_font("cmb10.ttf"), tmp_path / "f.ttf")
    assert sources.data_id(D.FontFile(font)) == sources.data_id(D.FontFile(sources.find_font("cmb10.ttf"))) not in seen
    assert sources.data_id(D.Glyphs()) == "glyphs"


# ---- runs among the images

def test_a_run_among_its_images_is_passed_over(tmp_path, monkeypatch):
    """`cd photos; python train.py --data .` Kills: sheets as images, "runs" as a class, a run that blocks itself."""
    write_images(tmp_path)
    monkeypatch.chdir(tmp_path)
    args = [*TINY, "--steps", 1, "--data", "."]
    for out in ([], [], ["--out", "mine"]):
        assert run_here(T, [*args, *out]) == (None, "")
    assert run_here(P, ["mine", "--n", 1, "--device", "cpu"]) == (None, "")                     # samples.png
    shutil.copy("samples.png", "runs/comparison.png")
    assert run_here(T, ["--resume", "runs/glyphs64", "--steps", 2]) == (None, "")
    assert not checkpoint("runs/glyphs64")["config"]["class_names"] and checkpoint("runs/glyphs64")["examples"] == 4
    skipped = dict(D.ImageFolder(".").skipped)
    assert {os.path.normpath(path) for path in skipped} == {"samples.png", "mine", "runs/glyphs64", "runs/glyphs64-2",
                                                            "runs/comparison.png"}
    assert len(D.ImageFolder("mine").files) > 0                           # asked for by name


@pytest.mark.parametrize("out", [".", "cat", "cat/deep/.."])
def test_a_folder_of_images_does_not_become_a_run(tmp_path, monkeypatch, out):
    """Kills: a class that vanishes at --resume, since its folder is now a run."""
    write_images(tmp_path / "cat")
    (tmp_path / "cat" / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    one_line(run_here(T, [*TINY, "--steps", 1, "--data", ".", "--out", out]), "there are training images in it")
    assert not list(tmp_path.rglob("log.csv"))
    assert run_here(T, [*TINY, "--steps", 1, "--data", "cat", "--out", "."]) == (None, "")      # above them: a run
