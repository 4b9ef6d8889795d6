"""Training and sampling with text as a user does it: runs, conditions, and what the programs refuse."""
import re

import numpy as np
import pytest
import torch
from PIL import Image

import config as C
import data as D
import sample as P
import train as T
from plumbing.settings import override
from plumbing.sources import open_run
from programs import TINY, run_here

TEXT = ["--text-encoder", "bytes", "--text-channels", 16, "--text-length", 48, "--text-layers", 1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "run"
    args = [*TINY, *TEXT, "--steps", 4, "--save-every", 2, "--withhold", "--out", folder]
    assert run_here(T, args) == (None, "")
    return folder


def test_a_run_with_text_trains_resumes_to_the_bit_and_samples(run_folder, tmp_path):
    whole = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    assert any("text.encoder.byte" in key for key in whole["ema"])        # trained with the model, in the EMA
    assert whole["config"]["num_classes"] == 0 and len(whole["config"]["examples"]) == 12
    for args in ([*TINY, *TEXT, "--steps", 2, "--withhold", "--out", tmp_path / "half"],
                 ["--resume", tmp_path / "half", "--steps", 4, "--device", "cpu"]):
        assert run_here(T, args) == (None, "")
    state = torch.load(tmp_path / "half" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["ema"][key], whole["ema"][key]) for key in whole["ema"])

    (tmp_path / "prompts.txt").write_text("a red A on white\n\na blue Ω\n")
    out = tmp_path / "a.png"
    assert run_here(P, [run_folder, "--text", "a pink 7", "--prompts", tmp_path / "prompts.txt", "--negative", "grainy",
                        "--n", 2, "--device", "cpu", "--out", out, "--gif", tmp_path / "a.gif"]) == (None, "")
    picture = Image.open(out)
    assert picture.width > 3 * 2 * 48 and picture.height > 48 + 12        # three captions of two images, text below
    below = np.asarray(picture.convert("L"))[2 * 48 // 2:, :]
    assert (below < 100).any()                                            # the caption is printed there
    assert run_here(P, [run_folder, "--device", "cpu", "--out", out]) == (None, "")             # the run's examples


def test_layers_that_read_the_text_have_their_share_of_the_rate(run_folder):
    """Kills: a share that the warm-up forgets at the first step."""
    state = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates == pytest.approx([2.2e-5, 2.2e-6])                       # step 4 of a warm-up of 200 to 1.1e-3


def test_captions_come_with_the_image_that_they_describe(monkeypatch, tmp_path):
    """Kills: captions of other examples; conditions that are dropped for all or for none."""
    seen = []
    loss = T.simple_loss
    monkeypatch.setattr(T, "simple_loss", lambda model, x, cond, *rest: seen.append((x, cond)) or loss(model, x, cond,
                                                                                                       *rest))
    args = [*TINY, *TEXT, "--steps", 12, "--batch", 8, "--withhold", "--cond-drop", 0.3, "--out", tmp_path / "r"]
    assert run_here(T, args) == (None, "")
    source, dropped = open_run(override(C.PRESETS["glyphs64_text"], size=(16, 16))), 0
    by_image = {}
    for i in D.Stream(source, 0).order(0)[:96]:
        by_image[tuple(source.image(int(i)).flatten().tolist())] = source.caption(int(i))
    for x, cond in seen:
        for image, text, mask in zip(x, cond["text"], cond["text_mask"]):
            caption = by_image[tuple(image.flatten().tolist())]
            assert bytes(text[:len(caption)].tolist()).decode() == caption
            assert mask.sum() in (0, len(caption))
            dropped += int(mask.sum() == 0)
    assert 10 < dropped < 50                                              # 0.3 of 96


@pytest.mark.parametrize("args, message", [
    (["--labels", "A"], "was trained with text; say it with --text"),
    (["--prompts", "/no/such"], "--prompts /no/such: No such file"),
    (["--negative", "grainy", "--guidance", "1"], "--negative: without guidance"),
    (["--portrait"], "--portrait: .* was trained without upright images"),
    (["--text-encoder", "google/t5-v1_1-xxl"], "was trained with bytes"),
    (["--prompts", ""], "--prompts is empty"),
    (["--text", "a \udce4 A"], "holds characters that are not text"),
])
def test_what_sample_refuses(run_folder, tmp_path, args, message):
    status, error = run_here(P, [run_folder, *args, "--device", "cpu", "--out", tmp_path / "a.png"])
    assert status == 2 and error.count("\n") == 1 and re.search(message, error), error


def test_a_model_without_text_refuses_it(tmp_path):
    assert run_here(T, [*TINY, "--steps", 1, "--out", tmp_path / "r"]) == (None, "")
    for option in ("--text", "--negative", "--prompts"):
        status, error = run_here(P, [tmp_path / "r", option, "a red A", "--out", tmp_path / "a.png"])
        assert status == 2 and f"{option}: " in error and "trained without text; it knows --labels" in error


@pytest.mark.parametrize("args, message", [
    (["--size", "50,80"], "size 50x80: height and width must be multiples of 8"),
    (["--size", "48,48", "--portrait"], "--portrait True: want a --size that is wider than tall, not 48,48"),
    (["--size", "80,48", "--portrait"], "wider than tall"),
    (["--text-length", "0"], "--text-length 0: want 1 to 65,536"),
    (["--text-encoder", "/no/such/t5"], "--text-encoder /no/such/t5: "),
])
def test_what_train_refuses(tmp_path, args, message):
    status, error = run_here(T, ["--preset", "glyphs64_text", *args, "--steps", 1, "--out", tmp_path / "r"])
    assert status == 2 and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "r").exists()


def test_a_folder_without_captions_and_pairs_of_a_folder_are_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    status, error = run_here(T, [*TINY, *TEXT, "--data", tmp_path, "--out", tmp_path / "r"])
    assert status == 2 and "has no captions" in error
    status, error = run_here(T, [*TINY, "--withhold", "--data", tmp_path, "--out", tmp_path / "r"])
    assert status == 2 and "only drawn scenes" in error
    (tmp_path / "a.txt").write_text("\ufeffa cat", encoding="utf-8")
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png", "caption": "cut \\ud83d"}\n')
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")                   # half an emoji is no text, and stops no run
    assert run_here(T, ["--preset", "glyphs64_text", *TINY, "--data", tmp_path, "--steps", 1, "--out",
                        tmp_path / "r"]) == (None, "")
    examples = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["config"]["examples"]
    assert list(examples) == ["a cat"]


def test_upright_images_train_and_come_out_upright(tmp_path):
    args = [*TINY, *TEXT, "--size", "16,24", "--portrait", "--steps", 2, "--out", tmp_path / "r"]
    assert run_here(T, args) == (None, "")
    out = tmp_path / "a.png"
    for option, width, height in (([], 72, 48), (["--portrait"], 48, 72)):  # 16 x 24 px, three times enlarged
        assert run_here(P, [tmp_path / "r", "--text", "A", "--n", 1, *option, "--out", out]) == (None, "")
        assert Image.open(out).width == width and height < Image.open(out).height < height + 30


def test_a_super_resolution_run_on_portraits_writes_its_sheet(tmp_path):
    for text in (TEXT, []):
        out = tmp_path / f"r{len(text)}"
        assert run_here(T, [*TINY, *text, "--size", "16,24", "--low-size", "8,12", "--portrait", "--steps", 1, "--out",
                            out]) == (None, "")
        Image.open(out / "samples_0000001.png").load()


def test_growing_and_cascades_work_with_text(tmp_path):
    inner = [*TINY, *TEXT, "--steps", 1, "--out", tmp_path / "a"]
    assert run_here(T, inner) == (None, "")
    nest = [*TINY, *TEXT, "--size", 32, "--outer-channels", "8,8", "--outer-blocks", "1,1", "--patching", "dwt_1",
            "--outer-patching", "dwt_1", "--steps", 1]
    assert run_here(T, [*nest, "--grow-from", tmp_path / "a", "--out", tmp_path / "b"]) == (None, "")
    status, error = run_here(T, [*nest, "--text-length", 40, "--grow-from", tmp_path / "a", "--out", tmp_path / "c"])
    assert status == 2 and "48 tokens of bytes, this run 40" in error
    draw = ["--text", "a red A", "--n", 1, "--out", tmp_path / "b.png"]
    assert run_here(P, [tmp_path / "b", "--levels", *draw]) == (None, "")
    above = [*TINY, *TEXT, "--size", 32, "--low-size", 16, "--noise-d", 32, "--steps", 1, "--out", tmp_path / "d"]
    assert run_here(T, above) == (None, "")
    assert run_here(P, [tmp_path / "a", tmp_path / "d", "--handoff", "clean", *draw]) == (None, "")
    assert run_here(T, [*TINY, "--steps", 1, "--out", tmp_path / "e"]) == (None, "")
    status, error = run_here(P, [tmp_path / "e", tmp_path / "d", "--handoff", "clean", *draw])
    assert status == 2 and "was trained without text, a stage above it with" in error
