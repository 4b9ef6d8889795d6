"""Videos through train.py and sample.py: growing from an image model, resuming, playing, mistakes in one line."""
import numpy as np
import pytest
import torch
from PIL import Image

import sample as P
import train as T
from programs import TINY, run_here

LEVEL = ["--outer-channels", "8", "--outer-blocks", "1", "--outer-patching", "dwt_1", "--frames", "4:1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of images, and one of videos that has grown from it."""
    folder = tmp_path_factory.mktemp("video")
    assert run_here(T, [*TINY, "--steps", "2", "--out", folder / "image"]) == (None, "")
    assert run_here(T, [*TINY, *LEVEL, "--steps", "4", "--grow-from", folder / "image", "--out",
                        folder / "video"]) == (None, "")
    return folder


def test_a_grown_video_resumes_to_the_bit(runs, tmp_path):
    """Kills: frames that depend on the process; a weight over time that no checkpoint holds."""
    start = [*TINY, *LEVEL, "--steps", "2", "--grow-from", runs / "image"]
    assert run_here(T, [*start, "--out", tmp_path / "a"]) == (None, "")
    assert run_here(T, ["--resume", tmp_path / "a", "--steps", "4", "--device", "cpu"]) == (None, "")
    a, b = (torch.load(f / "checkpoint.pt", weights_only=True) for f in (tmp_path / "a", runs / "video"))
    for part in ("model", "ema"):
        assert any("position" in key for key in a[part]) and all(torch.equal(a[part][k], b[part][k]) for k in a[part])


def test_a_sheet_is_a_strip_and_a_gif_plays(runs, tmp_path):
    """Kills: channels shown as one image; a level of one frame stretched to the width of all; a GIF of the sampling."""
    def draw(*args):
        assert run_here(P, [runs / "video", "--labels", "A,B", "--n", "2", "--device", "cpu", *args, "--out",
                            tmp_path / "s.png"]) == (None, "")
        return np.asarray(Image.open(tmp_path / "s.png"))[:, -2 * frames * 48:]

    frames = 4
    sheet = draw("--gif", tmp_path / "s.gif")                             # tiles below 32 px are enlarged, 16 to 48
    gif = Image.open(tmp_path / "s.gif")
    assert gif.n_frames == 4 and gif.height == len(sheet) == 2 * 48 and gif.width < sheet.shape[1]
    frames = 5
    levels = draw("--levels", "--gif", tmp_path / "l.gif")
    assert Image.open(tmp_path / "l.gif").n_frames == 4
    assert np.array_equal(levels[:, 48:5 * 48], sheet[:, :4 * 48])        # behind the level of one frame the four


@pytest.mark.parametrize("args, wanted", [
    (["--frames", "4:3"], "--frames 4:3: want each a divisor of the one before"),
    (["--frames", "4"], "--frames 4: want a number for each of the 2 levels"),
    (["--frames", "4:0"], "--frames 4:0: want whole numbers, 1 or more"),
    (["--mixed-ratio", "1:1"], "--frames 4:1: want none with --mixed-ratio"),
    (["--data", "{images}"], "--frames: only drawn scenes move, not --data"),
    (["--frames", "4:2", "--grow-from", "{run}"], "that run is of 16x16, the inner levels are 2 x 16x16")])
def test_mistakes_are_one_line(runs, tmp_path, args, wanted):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.png")
    args = [arg.format(images=tmp_path / "images", run=runs / "image") for arg in args]
    status, line = run_here(T, [*TINY, *LEVEL, *args, "--steps", "1", "--out", tmp_path / "new"])
    assert status == 2 and wanted in line and line.count("\n") == 1, line
    assert not (tmp_path / "new").exists()
