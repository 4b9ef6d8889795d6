"""Pretrained weights: the file, the programs that take pretrained/NAME in place of a run, sample.py without a run."""
import copy
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import config as C
import distill as D
import evaluate as E
import sample as P
import train as T
from data import CHARACTERS
from plumbing import UserError, runs, sampling, weights
from plumbing.settings import override
from programs import ROOT, TINY, run_here, stirred

TEXT = dict(num_classes=0, text_encoder="bytes", text_channels=16, text_length=48, text_layers=1,
            examples=("a red A", "a blue 7"))


def make_run(folder, **settings):
    """Make a run of a tiny model with random weights everywhere, so that all conditions have effects."""
    config = override(C.PRESETS["glyphs64"], **{
        **dict(size=(16,), base_channels=16, emb_channels=16, channel_mult=(1, 2), num_res_blocks=(1,), num_heads=2,
               num_transformer_blocks=1, sample_steps=4, class_names=tuple(CHARACTERS), batch=4, log_every=1,
               precision="bf16", band_rms="0.64,0.08,0.09,0.05"), **settings})
    model = stirred(config)
    folder.mkdir()
    runs.save_checkpoint(str(folder), model, copy.deepcopy(model), torch.optim.Adam(model.parameters()), 10, 40, config,
                         7)
    return str(folder)


def content_of(folder):
    """Return {path: bytes} of all files below a folder."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with runs/a, runs/text and their weights, pretrained/a and pretrained/text."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "runs").mkdir()
    for name, settings in (("a", {}), ("text", TEXT)):
        weights.export(make_run(folder / "runs" / name, **settings), str(folder / "pretrained" / name))
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """The working directory: a copy of pretrained/ of `made`."""
    shutil.copytree(made / "pretrained", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the file

def test_the_file_holds_the_ema_weights_in_16_bit_and_comes_back_in_32(made):
    """Kills: weights that stay in 32 bit, that come back in 16, or are rounded twice as much (bfloat16); the training
    weights or the optimizer in the file; a precision of the training machine that is slow on the reader's."""
    run, state = (runs.read_checkpoint(str(made / kind / "a")) for kind in ("runs", "pretrained"))
    for key, w in run["ema"].items():
        assert state["ema"][key].dtype == torch.float32
        torch.testing.assert_close(state["ema"][key], w, rtol=2 ** -11, atol=2 ** -25)
    assert state["model"] is state["ema"] and state["ema"].keys() == run["ema"].keys()
    assert (state["step"], state["images"]) == (10, 40)
    assert state["config"] == override(run["config"], precision="auto")
    path = made / "pretrained" / "a" / "weights.pt"
    raw = torch.load(path, weights_only=True)
    assert raw.keys() == {"config", "ema", "step", "images", "commit"}
    assert path.stat().st_size < 2 * sum(w.numel() for w in raw["ema"].values()) + 200 * len(raw["ema"]) + 8192


def test_small_tensors_and_whole_numbers_keep_every_bit():
    """Kills: second moments of the data, which a few buffers hold, rounded to 16 bit."""
    state = dict(moments=torch.tensor([1 / 3, 0.04, 1e-9]), count=torch.arange(100), kernel=torch.full((8, 8), 1 / 3))
    small = weights.in_16_bits(state)
    assert torch.equal(small["moments"], state["moments"]) and torch.equal(small["count"], state["count"])
    assert small["kernel"].dtype == torch.float16


def test_rounding_moves_no_pixel_that_one_could_see(made):
    """Two steps of 256 at most, under guidance 5. Kills: bfloat16, whose rounding is eight times as large.

    Weights as large as those of `made` amplify every change; half as large they are like those of a trained model."""
    pictures = []
    for small in (lambda state: state, weights.in_16_bits):
        model, config = runs.load_run(str(made / "runs" / "a"))
        model.load_state_dict(small({key: w / 2 for key, w in model.state_dict().items()}))
        images = P.sample_run(model, config, {"label": torch.arange(36)}, range(36), torch.device("cpu"), "float32")
        pictures.append(((images + 1) * 127.5).round())
    assert pictures[0].std() > 30                                         # there is something to see
    assert (pictures[0] - pictures[1]).abs().max() <= 2


def test_the_exporter_is_one_command_and_refuses_in_one_line(made, tmp_path, monkeypatch):
    """Kills: a file above the limit; an old file that a refused export takes away; a name that leads elsewhere."""
    monkeypatch.chdir(tmp_path)
    run = made / "runs" / "a"
    assert run_here(weights, [run, "x"]) == (None, "")
    before = content_of(tmp_path)
    assert [path.relative_to(tmp_path).parts for path in before] == [("pretrained", "x", "weights.pt")]
    monkeypatch.setattr(weights, "LARGEST", 1000)
    cases = [([run, "x"], "at most 1,000"), ([run, "../x"], "want a plain name"), ([run, ""], "NAME is empty"),
             ([tmp_path / "none", "x"], "no such run"), ([run], "NAME")]
    for args, wanted in cases:
        status, line = run_here(weights, args)
        assert status == 2 and wanted in line and line.count("\n") == 1, line
    assert content_of(tmp_path) == before
    for value in (float("nan"), 1e5):
        with pytest.raises(UserError, match="kernel: holds values that are not finite in 16 bit"):
            weights.in_16_bits(dict(kernel=torch.full((8, 8), value)))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_damaged_and_foreign_files_are_one_line_and_run_no_code(here):
    path = here / "pretrained" / "a" / "weights.pt"
    good, rng = path.read_bytes(), random.Random(0)
    state = torch.load(path, weights_only=True)
    foreign = [{}, dict(state, config=3), dict(state, config={"width": 3}), dict(state, ema=3),
               dict(state, ema={"w": 3}), {key: state[key] for key in ("config", "ema", "step")}, [1], Hostile(),
               dict(state, ema={"w": torch.ones(2)})]
    for content in foreign:
        torch.save(content, path)
        status, line = run_here(P, ["pretrained/a", "--labels", "A"])
        assert status == 2 and "pretrained/a" in line and line.count("\n") == 1, line
    assert not (here / "hostile").exists()
    refused = 0
    for trial in range(60):
        damaged = bytearray(good)
        damaged[rng.randrange(len(good))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[:rng.randrange(len(good))] if trial % 4 == 0 else damaged)
        try:
            read = runs.read_checkpoint("pretrained/a")
        except UserError as error:
            refused += "\n" not in str(error)
            continue
        assert all(torch.equal(read["ema"][key], w.float()) for key, w in state["ema"].items())
    assert refused > 50


# ---- the programs

def test_every_program_takes_them_and_leaves_them_as_they_are(here, monkeypatch):
    """Kills: a cache, a score or a student of a program inside pretrained/."""
    before = content_of(here)
    assert run_here(P, ["pretrained/a", "--labels", "A,7", "--n", 1, "--gif", "a.gif"]) == (None, "")
    small = ["--n", 8, "--n-real", 8, "--n-bits", 2, "--device", "cpu"]
    assert run_here(E, ["pretrained/a", *small, "--metrics", "bits"]) == (None, "")
    assert run_here(E, ["pretrained/a", *small, "--metrics", "none", "--export", "a.npz"]) == (None, "")
    results = here / "runs" / "a-pretrained"
    assert {path.name.split("-")[0] for path in results.glob("[!.]*")} == {"evaluation.json", "loss_by_logsnr.png",
                                                                           "samples"}
    assert run_here(D, ["pretrained/a", "--from", 4, "--to", 2, "--steps", 1]) == (None, "")
    assert runs.has_checkpoint("runs/a-pretrained-distilled/2")
    nested = ["--base-channels", 16, "--size", 32, "--outer-channels", "8,8,16", "--outer-blocks", "1,1,1"]
    assert run_here(T, [*TINY, *nested, "--steps", 1, "--grow-from", "pretrained/a", "--out", "grown"]) == (None, "")
    assert {path: path.read_bytes() for path in before} == before
    assert set(content_of(here / "pretrained")) == set(before)


def test_they_are_a_stage_of_a_cascade(here):
    make_run(here / "sr", size=(32,), low_size=(16,))
    weights.export("sr", "pretrained/sr")
    assert run_here(P, ["pretrained/a", "pretrained/sr", "--handoff", "renoised", "--s", 0.2, "--labels", "A",
                        "--n", 1]) == (None, "")
    assert Image.open("samples.png").size[1] == 32


def test_they_are_no_run_to_resume_and_no_folder_for_one(here):
    """Kills: a run inside pretrained/, whose checkpoint would then be read in place of the weights."""
    before = content_of(here)
    status, line = run_here(T, ["--resume", "pretrained/a"])
    assert status == 2 and line == ("train.py: --resume pretrained/a: these are weights only; start a new run from "
                                    "them with --init-from pretrained/a\n")
    for again in ([], ["--auto-resume"]):
        status, line = run_here(T, [*TINY, "--steps", 1, "--out", "pretrained/a", *again])
        assert status == 2 and "holds pretrained weights; choose" in line and line.count("\n") == 1
    assert content_of(here) == before


# ---- sample.py without a run

@pytest.fixture
def default(made, monkeypatch):
    """The weights of `made` as those that come with the project."""
    assert sampling.PRETRAINED == os.path.join(ROOT, "pretrained")
    monkeypatch.setattr(sampling, "PRETRAINED", str(made / "pretrained"))
    monkeypatch.setattr(sampling, "DEFAULT", "a")
    monkeypatch.setattr(sampling, "DEFAULT_TEXT", "text")


def test_without_a_run_one_of_each_class_is_drawn_wherever_one_is(made, default, tmp_path, monkeypatch, capsys):
    """Kills: weights that are looked for in the working directory; another order of the letters than the classes'."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["../sample.py"])
    P.main()
    out = capsys.readouterr().out
    assert str(tmp_path / "samples.png") in out and os.path.relpath(made / "pretrained" / "a") in out
    assert "next: python ../sample.py --labels" in out and "python ../train.py" in out
    sheet = np.asarray(Image.open(tmp_path / "samples.png"))
    assert sheet.shape == (4 * 48, 9 * 48, 3)                             # 36 letters, 9 a row, 16 px enlarged
    model, config = runs.load_run(str(made / "pretrained" / "a"))
    config, cond = override(config, sample_steps=sampling.QUICK_STEPS), {"label": torch.arange(36)}
    cpu = torch.device("cpu")
    images = P.sample_run(model, config, cond, P.image_seeds(0, 36), cpu, runs.choose_precision("auto", cpu))
    tenth = ((images[10] + 1) * 127.5).round().permute(1, 2, 0).numpy()   # second row, second column
    assert np.abs(sheet[48:96:3, 48:96:3].astype(int) - tenth).max() <= 1
    for args in (["--labels", "A,B", "--n", "2"], ["--steps", "2", "--out", "b.png"]):
        assert run_here(P, args) == (None, "")
    assert Image.open("samples.png").size[1] == 2 * 48 and os.path.exists("b.png")


def test_captions_without_a_run_take_the_model_with_text(default, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a blue B\n")
    seen, make = [], P.make_conditions
    monkeypatch.setattr(P, "make_conditions", lambda config, *rest: seen.append(rest[2]) or make(config, *rest))
    assert run_here(P, ["--text", "a red A", "--n", 1]) == (None, "")
    assert run_here(P, ["--prompts", "prompts.txt", "--n", 1]) == (None, "")
    assert seen == [["a red A"], ["a blue B"]]
    status, line = run_here(P, ["--text", "a red A", "--labels", "A"])
    assert status == 2 and "was trained with text" in line and line.count("\n") == 1


def test_without_a_run_and_without_weights_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "PRETRAINED", str(tmp_path / "pretrained"))
    for args in ([], ["--text", "a red A"]):
        status, line = run_here(P, args)
        assert status == 2 and "no RUN is given" in line and "python train.py" in line and line.count("\n") == 1
