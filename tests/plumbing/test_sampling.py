"""The program sample.py: its command line, its sheets and its GIF."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import config as C
import sample as P
import schedule as S
import train as T
from plumbing import UserError, pictures, sampling
from plumbing.settings import override
from programs import TINY, run_here, stirred


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling") / "run"
    assert run_here(T, [*TINY, "--steps", "1", "--out", folder]) == (None, "")
    return folder


def drawn(run, out, *args):
    assert run_here(P, [run, "--device", "cpu", "--out", out, *args]) == (None, "")
    return np.asarray(Image.open(out))


# ---- the program

def test_the_same_seed_is_the_same_sheet_and_rows_are_independent(run, tmp_path):
    """Kills: an image that depends on how many others are drawn; a seed that is not used."""
    two, again, other = (drawn(run, tmp_path / "a.png", "--labels", "A,7", "--n", 2, *seed)
                         for seed in ([], [], ["--seed", 1]))
    assert np.array_equal(two, again) and not np.array_equal(two, other)
    assert np.array_equal(drawn(run, tmp_path / "a.png", "--labels", "A,33", "--n", 2), two)    # 33 is the number of 7
    one = drawn(run, tmp_path / "a.png", "--labels", "A", "--n", 2)
    assert np.array_equal(two[:48], one)


def test_lowest_idx_0_and_guidance_change_the_sheet(run, tmp_path):
    sheets = [drawn(run, tmp_path / "a.png", "--labels", "A", "--n", 1, *args)
              for args in ([], ["--lowest-idx", 0], ["--guidance", 100], ["--clip-x", "none"], ["--steps", 3])]
    assert len({sheet.tobytes() for sheet in sheets}) == len(sheets)


def test_the_gif_ends_as_the_sheet(run, tmp_path):
    """Kills: frames of the wrong moments, batches in another order, a last frame that is noise."""
    gif = tmp_path / "a.gif"
    sheet = drawn(run, tmp_path / "a.png", "--labels", "A,B", "--n", 3, "--steps", 5, "--gif", gif)
    film = Image.open(gif)
    assert film.n_frames == 5 and film.info["duration"] == 80
    film.seek(4)
    assert film.info["duration"] == 2500
    assert np.abs(np.asarray(film.convert("RGB")).astype(int) - sheet).mean() < 12              # a palette of 256


@pytest.mark.parametrize("args, wanted", [
    (["--n", "0"], "--n 0: want 1 to 10,000,000"), (["--n", str(10 ** 11)], "want 1 to 10,000,000"),
    (["--n", str(10 ** 7)], "--n 10000000: 360,000,000 images of 16x16: "),
    (["--steps", "9" * 20], "want 1 to 100,000"),
    (["--guidance", "1e308"], "--guidance 1e+308: want -1,000 to 1,000"), (["--guidance", "nan"], "--guidance nan"),
    (["--seed", "-1"], "--seed -1"), (["--seed", str(2 ** 31)], "--seed"),
    (["--gif", "a.png"], "--gif a.png: want a name that ends in .gif"), (["--gif", "/no/such/a.gif"], "--gif /no/such"),
    (["--labels", "A,Ω"], "--labels Ω: this run knows A, B"), (["--labels", "36"], "--labels 36"),
    (["--steps", "2,3"], "1 runs, but settings for 2 stages"), (["--levels"], "is not of a nested model"),
    (["--handoff", "clean"], "are for the stages of a cascade"), (["--device", "tpu"], "--device tpu"),
    (["--lowest-idx", "2"], "--lowest-idx"), (["--sampler", "euler"], "--sampler")])
def test_mistakes_are_one_line(run, tmp_path, args, wanted):
    status, line = run_here(P, [run, "--out", tmp_path / "a.png", *args])
    assert status == 2 and wanted in line and line.count("\n") == 1, line
    assert not (tmp_path / "a.png").exists()


def test_a_sheet_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "a.png").mkdir()
    status, line = run_here(P, [run, "--labels", "A", "--device", "cpu", "--out", tmp_path / "a.png"])
    assert status == 2 and "a folder has this name" in line and line.count("\n") == 1


# ---- its pieces

def test_each_stage_gets_its_part_of_a_setting():
    """Kills: the first value for all stages; commas of other flags that are split."""
    argv = "a b --steps 24,12 --guidance=5,1 --noise-param 1 --labels A,B".split()
    low, counts = sampling.words_of(argv, 0)
    high, _ = sampling.words_of(argv, 1)
    assert low == "a b --steps 24 --guidance=5 --noise-param 1 --labels A,B".split()
    assert high == "a b --steps 12 --guidance=1 --noise-param 1 --labels A,B".split() and counts == {2}


def test_a_long_set_is_drawn_in_batches_that_nobody_sees():
    """70 images are more than a batch. Kills: conditions or seeds of the first batch for all."""
    config = override(C.PRESETS["glyphs16"], size=(16,), base_channels=8, emb_channels=16, channel_mult=(1, 2),
                      num_res_blocks=(1,), num_transformer_blocks=1, num_heads=2, sample_steps=2, guidance=3.0)
    model, cpu, seen = stirred(config), torch.device("cpu"), []
    cond, seeds = sampling.make_conditions(config, [i % 36 for i in range(70)], cpu), P.image_seeds(2, 70)
    images = P.sample_run(model, config, cond, seeds, cpu, "float32", on_step=lambda *step: seen.append(step))
    assert [(first, k, len(z)) for first, k, z in seen] == [(0, 1, 64), (0, 2, 64), (64, 1, 6), (64, 2, 6)]
    last = {key: values[64:] for key, values in cond.items()}
    torch.testing.assert_close(images[64:], P.sample_run(model, config, last, seeds[64:], cpu, "float32"))
    assert torch.equal(torch.cat([z for _, k, z in seen if k == 2]), images)


@pytest.mark.parametrize("nested", (False, True))
def test_results_of_a_replayed_recording_are_copied(nested, monkeypatch):
    """--compile on a GPU: a CUDA graph writes where it wrote before. Kills: guidance that mixes a call with itself."""
    def network(z, logsnr, cond):
        levels = [0.3 * level + (0.5 if "label" in cond else -0.1) for level in (z if nested else [z])]
        return levels if nested else levels[0]

    place = [torch.empty(2, 1, 4, 4), torch.empty(2, 1, 2, 2)]

    def recorded(model, mode):
        def replay(*inputs):
            made = model(*inputs)
            for level, one in zip(place, made if nested else [made]):
                level.copy_(one)
            return place if nested else place[0]
        return replay
    monkeypatch.setattr(torch, "compile", recorded)
    draw, schedules, shapes = P.sample, S.logsnr_cosine, (1, 4, 4)
    if nested:
        draw, schedules, shapes = P.sample_levels, [S.logsnr_cosine] * 2, [(1, 4, 4), (1, 2, 2)]
    images = [draw(model, schedules, {"label": torch.zeros(2, dtype=torch.long)}, shapes, [0, 1], 5, guidance=3.0,
                   clip="none") for model in (network, sampling.compile_model(network, torch.device("cpu")))]
    for one, other in zip(*(images if nested else [[image] for image in images])):
        assert torch.equal(one, other)


def test_a_film_shows_finished_stages_and_grey_ones():
    """Kills: frames of the first batch alone, of the stage below while the next is drawn."""
    film = pictures.Film([2, 1])
    low, high = torch.rand(3, 3, 4, 4) * 2 - 1, torch.rand(3, 3, 8, 8) * 2 - 1
    for rows in (slice(0, 2), slice(2, 3)):
        for k in (1, 2):
            film.keep(0, k, low[rows] * k / 2)
    film.keep(1, 1, high)
    frames = list(film.frames([low, high]))
    assert len(frames) == 3 and all(len(stages) == 2 for stages in frames)
    for (first, second), want in zip(frames, ((low / 2, 0 * high), (low, 0 * high), (low, high))):
        torch.testing.assert_close(first, want[0], atol=0.005, rtol=0)
        torch.testing.assert_close(second, want[1], atol=0.005, rtol=0)
    many = pictures.Film([256])
    assert len(many.moments[0]) == 40 and {1, 256} <= set(many.moments[0])


def test_rows_of_a_sheet():
    config = dataclasses.replace(C.PRESETS["glyphs16"], class_names=("A", "B"), num_classes=2)
    sheet = sampling.make_sheet(config, 3, [1, 0])
    assert sheet.labels == [1, 1, 1, 0, 0, 0] and sheet.names == ["B", "A"] and sheet.captions is None
    sheet = sampling.make_sheet(config, 2, [1, 0], ["a red A", "a blue B"])
    assert sheet.captions == ["a red A", "a red A", "a blue B", "a blue B"] and sheet.labels == [-1] * 4
    sheet = sampling.make_sheet(config, 4, n=10)
    assert sheet.labels == [-1] * 10 and sheet.columns == 8
    assert sheet.picture(torch.zeros(10, 3, 32, 32)).size == (256, 64)


def test_names_beside_a_sheet_are_drawn():
    """Kills: every face written as the same empty box; another font beside letters."""
    for names in ("😀😻♞", "αβγ"):
        sheets = [pictures.grid(torch.zeros(1, 3, 64, 64), 1, [name]).tobytes() for name in names]
        assert len(set(sheets)) == 3
    words = [pictures.captioned(torch.zeros(1, 3, 64, 64), 1, [f"a {name}"]).tobytes() for name in "😀😻♞"]
    assert len(set(words)) == 3
    assert pictures.label_font(["A", "B"], 20).getname() == pictures.ImageFont.load_default(20).getname()


def test_what_no_font_draws_is_a_number(monkeypatch):
    """Kills: boxes for Chinese; a number for what can be drawn; the number of the row for that of the class."""
    names = ("cat", "\u732b", "cafe\u0301", "\u0642\u0637\u0629", "\U0001f408\ufe0f \udce9")
    config = dataclasses.replace(C.PRESETS["glyphs16"], num_classes=5, class_names=names)
    monkeypatch.setattr(pictures.features, "check", lambda name: True)
    assert sampling.make_sheet(config, 1, [4, 1, 0, 2, 3]).names == ["4", "1", "cat", "caf\u00e9", "\u0642\u0637\u0629"]
    monkeypatch.setattr(pictures.features, "check", lambda name: False)   # Arabic would go from left to right
    assert sampling.make_sheet(config, 1, [3, 0]).names == ["3", "cat"]
    sheet = sampling.make_sheet(config, 2, captions=["a cat", "\u4e00\u53ea"])
    assert sheet.names == ["a cat", "caption 2"] and sheet.captions[2:] == ["\u4e00\u53ea"] * 2
    assert sheet.picture(torch.zeros(4, 3, 32, 32)).size[0] > 32


def test_a_student_is_sampled_at_its_own_steps():
    config = override(C.PRESETS["glyphs16"], distilled_steps=4, sample_steps=4, sampler="ddim")
    sampling.check_student(config, "run", stop=0.25)
    for wrong, options in ((dict(sample_steps=8), {}), (dict(sampler="ddpm"), {}), ({}, dict(lowest_idx=0)),
                           ({}, dict(stop=0.3))):
        with pytest.raises(UserError, match="was distilled to 4 steps"):
            sampling.check_student(dataclasses.replace(config, **wrong), "run", **options)


def test_grid_and_colours():
    """Kills: rows and columns exchanged, [-1, 1] taken for [0, 1]."""
    for side, shown in ((32, 32), (8, 48)):                               # small images are enlarged
        sheet = pictures.grid(torch.stack([torch.full((3, side, side), v) for v in (-1.0, 0.0, 1.0, 5.0)]), 2)
        assert sheet.size == (2 * shown, 2 * shown)
        places = [(x, y) for y in (shown // 2, 3 * shown // 2) for x in (shown // 2, 3 * shown // 2)]
        assert [sheet.getpixel(p)[0] for p in places] == [0, 128, 255, 255]
    assert pictures.grid(torch.zeros(4, 3, 32, 32), 2, ["a", "b"]).size[0] > 64
