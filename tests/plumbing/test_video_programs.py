"""Videos through train.py and sample.py: growing from an image model, resuming, playing, mistakes in one line."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as E
import sample as P
import train as T
from data import Glyphs
from plumbing import features as X
from plumbing.motion import in_motion, one_frame, turns
from plumbing.pictures import to_uint8
from programs import TINY, run_here
from test_evaluate import TEXT, evaluated, make_run, quick                      # quick: its network is hardly trained

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
    assert (tmp_path / "l.gif").read_bytes() == (tmp_path / "s.gif").read_bytes()              # the highest level alone
    assert np.array_equal(levels[:, 48:5 * 48], sheet[:, :4 * 48])        # behind the level of one frame the four


def test_motion_and_letters_of_videos_are_known_numbers(monkeypatch):
    """Kills: frames of two videos compared; the first frame alone read; an interval that takes frames for videos."""
    still = torch.rand(2, 3, 8, 8).repeat(1, 4, 1, 1) * 2 - 1             # (2, 12, 8, 8)
    steps = torch.tensor([0.0, 0.2, 0.4, 0.6]).repeat_interleave(3)[:, None, None] - 0.5
    moving = steps.expand(2, 12, 8, 8)
    strips = to_uint8(torch.cat([still, moving]))                         # (4, 8, 4 * 8, 3)
    shown, letters = [], torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [1, 0, 1, 1]])
    described = X.describe([(torch.arange(4), strips)], lambda images: shown.append(images) or dict(
        features=torch.arange(16.0)[:, None].repeat(1, 2), character=torch.eye(2)[letters.flatten()]), 4)
    assert described["indices"].tolist() == [0, 1, 2, 3] and described["n"] == 16
    assert torch.equal(shown[0][9], strips[2, :, 8:16])                   # frame 1 of video 2
    assert described["change"].tolist() == pytest.approx([0, 0, 0.04, 0.04], abs=2e-3)
    samples = dict(described, labels=[0, 0, 1, 1])
    yardstick = E.Yardstick.__new__(E.Yardstick)
    yardstick.network, yardstick.held_out = X.GlyphFeatures(torch.nn.Identity(), 0.99), None
    yardstick.train = described
    drawn = []
    monkeypatch.setattr(E, "bootstrap", lambda statistic, n, times: drawn.append(n) or statistic(torch.tensor([2, 0])))
    monkeypatch.setattr(E, "frechet_distance", lambda real, moments: moments.mean[0].item())
    monkeypatch.setattr(E, "precision_recall", lambda real, own: (own[:, 0].tolist(), 0.0))
    scores = E.score(samples, yardstick, ("fd", "read", "motion"))
    monkeypatch.setattr(E, "finite", dict)
    assert E.score(samples, yardstick, ("pr",))["precision"] == [0, 5, 10, 15]                  # a frame of each
    assert scores["read_rate"] == 14 / 16 and scores["same_letter"] == 0.5 and scores["read_rate_pm"] == 1
    assert [scores[f"read_frame_{i}"] for i in range(4)] == [1, 0.75, 1, 0.75]
    assert scores["change"] == pytest.approx(0.02, abs=2e-3) and scores["turn"] == scores["uneven_turn"] == 0
    assert drawn == [4, 4] and scores["fd_train_pm"] == (9.5 + 1.5) / 2   # of whole videos


def test_a_turn_is_measured_in_degrees():
    """Beside the angle that real scenes turn by. Kills: radians; the wrong way round; rows taken for columns; frames of
    another video; a turn that a shift gives; uneven turns that look even."""
    scenes = in_motion(Glyphs((48, 32), held_out=True), 4)
    videos = torch.stack([scenes.image(i) for i in range(40)])
    turn = X.split_frames(to_uint8(videos), 4)[1]["turns"]                # (40, 3)
    true = torch.tensor([math.degrees(scenes.motion(i, 1)["angle"] - scenes.motion(i, 0)["angle"]) for i in range(40)])
    assert (turn.mean(1) - true).abs().mean() < 1.2 and (turn.sign() == true.sign()[:, None]).all()
    assert turn.diff(dim=1).square().mean().sqrt() < 0.1
    shifted = turns(torch.stack([Glyphs((32, 32)).image(3, angle=0, x=0.01 * i, y=-0.01 * i) for i in range(4)])[None])
    assert shifted.abs().max() < 0.5
    uneven = turns(torch.stack([Glyphs((32, 32)).image(3, angle=math.radians(a)) for a in (0, 2, 0, 2)])[None])
    assert uneven.tolist()[0] == pytest.approx([2, -2, 2], abs=0.3)


def test_a_video_run_is_measured_beside_real_scenes(tmp_path):
    """Kills: strips taken for images; labels of videos for those of frames; real scenes that stand still."""
    run = make_run(tmp_path / "a", frames="4:1", outer_channels="8", outer_blocks="1", outer_patching="dwt_1",
                   precondition="none", loss="v_mse")
    scores = evaluated(run, "--export", tmp_path / "x.npz")
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (24, 16, 4 * 16, 3)
    for key in ("fd_train", "fd_held_out_pm", "read_rate", "read_frame_0", "read_frame_3", "same_letter", "change",
                "turn", "uneven_turn", "colour_distance", "precision"):
        assert key in scores and key in scores["real_scenes"], key
    real = scores["real_scenes"]
    assert "nearest_ratio" not in scores and 0.001 < real["change"] < 0.1
    assert 3 < real["turn"] < 6 and 4 * real["uneven_turn"] < real["turn"]                      # 3 to 6 degrees, even


def test_a_video_run_with_captions_is_read_but_its_colours_are_not_judged(tmp_path):
    run = make_run(tmp_path / "a", frames="4:1", outer_channels="8", outer_blocks="1", outer_patching="dwt_1",
                   precondition="none", loss="v_mse", **TEXT)
    scores = evaluated(run, "--metrics", "read,words")
    for some in (scores, scores["withheld_pairs"], scores["real_scenes"]):
        assert "read_rate" in some and "letter_colour" not in some


def test_one_frame_of_each_scene_stands_for_its_video():
    """Kills: a class that the network sees at some frames only, like every fourth."""
    scenes = in_motion(Glyphs((16, 16)), 4)
    for i in (0, 36, 40, 111):
        assert torch.equal(one_frame(scenes).image(i), scenes.image(i)[3 * (i // 36):][:3])
    assert one_frame(still := Glyphs((16, 16))) is still is in_motion(still, 1)


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
