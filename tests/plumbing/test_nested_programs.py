"""Nested models through train.py and sample.py: growing, resuming, mistakes in one line."""
import os

import pytest
import torch
from PIL import Image

import sample as P
import train as T
from plumbing import start
from programs import TINY, run_here

SMALL = [*TINY, "--patching", "none", "--base-channels", "16"]
NESTED = ["--size", "32", "--outer-channels", "8,16", "--outer-blocks", "1,1"]


@pytest.fixture(scope="module")
def run16(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nested") / "run16"
    assert run_here(T, [*SMALL, "--steps", "2", "--out", folder]) == (None, "")
    return folder


def test_a_grown_run_begins_as_the_inner_one_and_resumes_to_the_bit(run16, tmp_path, monkeypatch):
    """Kills: growing from EMA weights for both, growing again on resume, a resumed run with other noise."""
    args = [*SMALL, *NESTED, "--grow-from", run16]
    starts, grown = [], start.grow

    def spy(model, trained):
        grown(model, trained)
        starts.append({k: v.clone() for k, v in model.inner.state_dict().items()})
    monkeypatch.setattr(start, "grow", spy)
    for name, steps in (("whole", 4), ("parts", 2)):
        assert run_here(T, [*args, "--steps", steps, "--mixed-ratio", "1:1", "--level-weights", "2:1", "--out",
                            tmp_path / name]) == (None, "")
    state = torch.load(run16 / "checkpoint.pt", weights_only=True)
    for weights, inner in ((state["model"], starts[0]), (state["ema"], starts[1])):
        assert weights.keys() == inner.keys() and all(torch.equal(weights[k], inner[k]) for k in inner)
    assert run_here(T, ["--resume", tmp_path / "parts", "--steps", "4", "--device", "cpu"]) == (None, "")
    assert len(starts) == 4                                               # two runs, model and EMA; resuming: none
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    again = [*SMALL, "--size", "64", "--outer-channels", "8,8/8,16", "--outer-blocks", "1,1/1,1",
             "--steps", "1", "--grow-from", tmp_path / "whole", "--out", tmp_path / "three"]
    assert run_here(T, again) == (None, "")                               # a nested run grows once more
    out, gif = tmp_path / "s.png", tmp_path / "s.gif"
    assert run_here(P, [tmp_path / "three", "--levels", "--labels", "A,B", "--n", "2", "--out", out, "--gif", gif,
                        "--device", "cpu"]) == (None, "")
    picture = Image.open(out)
    assert picture.height == 2 * 64 and picture.width >= 2 * 3 * 64 and Image.open(gif).size == picture.size
    assert run_here(P, [tmp_path / "three", "--labels", "A", "--n", "1", "--out", out, "--device", "cpu"]) == (None, "")
    assert Image.open(out).height == 64


def test_mistakes_of_nested_runs(run16, tmp_path):
    """Every mistake is answered with one line and exit status 2, and no folder is made."""
    nested = [*SMALL, *NESTED, "--out", tmp_path / "new"]
    broken = tmp_path / "broken"
    broken.mkdir()
    state = torch.load(run16 / "checkpoint.pt", weights_only=True)
    others = {"part": dict(state, ema={k: v for k, v in state["ema"].items() if k != "network.position"}),
              "null": dict(state, ema=None),
              "number": dict(state, model={**state["model"], "network.position": 1})}
    for name, value in others.items():
        (tmp_path / name).mkdir()
        torch.save(value, tmp_path / name / "checkpoint.pt")
    del state["model"]["network.position"]
    torch.save(state, broken / "checkpoint.pt")
    cases = [([*nested, "--grow-from", tmp_path / "none"], "no such run"),
             ([*nested, "--grow-from", broken], "not the inner network of this model (missing: network.position)"),
             ([*nested, "--base-channels", "8", "--grow-from", run16], "another shape"),
             ([*nested, "--base-channels", "8", "--grow-from", run16, "--dry-run"], "another shape"),
             ([*nested, "--grow-from", tmp_path / "part"], "not the inner network"),
             *[([*nested, "--grow-from", tmp_path / name], f"{name}/checkpoint.pt: ") for name in ("null", "number")],
             ([*nested, "--grow-from", ""], "--grow-from is empty"), ([*nested, "--outer-channels", "8,16/",
                                                                       "--outer-blocks", "1,1/"], "a width or more"),
             ([*nested, "--size", "64", "--grow-from", run16], "is of 16x16, the inner levels are 32x32"),
             ([*nested, "--noise-d", "64", "--grow-from", run16], "its schedule is another"),
             ([*nested, "--precondition", "none", "--loss", "v_mse", "--grow-from", run16], "has --precondition bands"),
             ([*TINY, "--out", tmp_path / "new", "--grow-from", run16], "--outer-channels is empty"),
             ([*nested, "--outer-blocks", "1"], "--outer-blocks 1: want a number of blocks for each width"),
             ([*nested, "--outer-channels", "8,x"], "--outer-channels 8,x: want whole numbers"),
             ([*nested, "--level-weights", "1"], "2 levels"), ([*nested, "--mixed-ratio", "1:0"], "--mixed-ratio 1:0"),
             ([*nested, "--mixed-ratio", "1:1:1"], "2 levels"), ([*nested, "--mixed-ratio", "1:9"], "highest level"),
             ([*nested, "--size", "33"], "does not divide"), ([*nested, "--level-power", "-1"], "want 0 to 4"),
             ([*nested, "--patching", "dwt_1"], "32x32 is not below 32x32"),
             ([*nested, "--multiscale", "32"], "lowest level, 16")]
    for args, wanted in cases:
        status, line = run_here(T, args)
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
    status, line = run_here(P, [run16, "--levels"])
    assert status == 2 and "not of a nested model" in line
    assert not os.path.exists(tmp_path / "new")
