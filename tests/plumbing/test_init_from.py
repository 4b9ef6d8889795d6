"""train.py --init-from: a new run that starts from the EMA weights of another run, or from pretrained/NAME."""
import inspect
import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image

import config as C
import train as T
from plumbing import runs, start, weights
from programs import TINY, checkpoint, run_here
from test_weights import TEXT, make_run

NEW = ["--workers", 0, "--batch", 4, "--precision", "float32", "--device", "cpu", "--log-every", 1, "--sample-every", 0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folders of a run of letters, of its pretrained weights, and of ten images of four classes: A, 7, wolf, Ω."""
    folder = tmp_path_factory.mktemp("init")
    run = make_run(folder / "run", sample_steps=2, lr=3e-3)
    state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    state["model"] = {key: w + 1 for key, w in state["model"].items()}    # unlike the EMA weights
    torch.save(state, folder / "run" / "checkpoint.pt")
    weights.export(run, str(folder / "pretrained" / "a"))
    for i in range(12):
        name = ("A", "7", "wolf", "Ω")[i % 4]
        os.makedirs(folder / "photos" / name, exist_ok=True)
        Image.new("RGB", (20, 16), (20 * i, 255 - 20 * i, 90)).save(folder / "photos" / name / f"{i}.png")
    return folder


@pytest.fixture
def starts(monkeypatch):
    """A list to which each run appends (model, ema, optimizer's state) as it starts."""
    seen, restore = [], start.restore

    def spy(*args):
        model, ema, optimizer, step = restore(*args)
        copies = ({key: w.clone() for key, w in module.state_dict().items()} for module in (model, ema))
        seen.append((*copies, dict(optimizer.state)))
        return model, ema, optimizer, step
    monkeypatch.setattr(start, "restore", spy)
    return seen


def begun(made, out, *args):
    assert run_here(T, [*NEW, "--steps", 1, "--out", out, *args]) == (None, "")
    return json.loads((out / "config.json").read_text())


# ---- what a new run starts from

@pytest.mark.parametrize("source", ["run", "pretrained/a"])
def test_model_and_ema_start_from_the_ema_weights(made, starts, tmp_path, source):
    """Kills: training weights in place of EMA weights, a model or an EMA that stays random, an old optimizer."""
    path = str(made / source)
    config = begun(made, tmp_path / "new", "--init-from", path)
    (model, ema, optimizer), wanted = starts[0], runs.read_checkpoint(path)["ema"]
    assert model.keys() == wanted.keys() and not optimizer
    for key in wanted:
        assert torch.equal(model[key], wanted[key]) and torch.equal(ema[key], wanted[key]), key
    assert config["init_from"] == path
    # Without --preset: the model's settings are the weights' own, data and optimisation are the default preset's.
    default = C.PRESETS["glyphs64"]
    assert (config["size"], config["base_channels"], config["sample_steps"]) == ([16, 16], 16, 2)
    assert (config["lr"], config["ema"], config["scenes"]) == (default.lr, default.ema, default.scenes)


def test_such_a_run_resumes_to_the_bit_without_the_weights(made, tmp_path):
    """Kills: weights that are read again on resume, or loaded over the checkpoint."""
    shutil.copytree(made / "pretrained", tmp_path / "pretrained")
    args = [*NEW, "--init-from", tmp_path / "pretrained" / "a", "--data", made / "photos"]
    for name, steps in (("whole", 4), ("parts", 2)):
        assert run_here(T, [*args, "--steps", steps, "--out", tmp_path / name]) == (None, "")
    shutil.rmtree(tmp_path / "pretrained")
    assert run_here(T, ["--resume", tmp_path / "parts", "--steps", 4, "--device", "cpu"]) == (None, "")
    a, b = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])


def test_classes_of_the_same_name_keep_their_row(made, starts, tmp_path):
    """Kills: rows by number, which give 7's letter to another class; a lost null embedding; new rows of zeros, or
    other ones in the EMA weights."""
    config = begun(made, tmp_path / "new", "--init-from", made / "pretrained" / "a", "--data", made / "photos")
    assert config["class_names"] == ["7", "A", "wolf", "Ω"] and config["num_classes"] == 4
    state, key = runs.read_checkpoint(str(made / "pretrained" / "a")), "network.embed.label.weight"
    old, (model, ema, _) = state["ema"][key], starts[0]
    names = state["config"].class_names
    assert torch.equal(model[key][[0, 1, 4]], old[[names.index("7"), names.index("A"), -1]])
    assert torch.equal(model[key], ema[key]) and len(old) == 37 and len(model[key]) == 5
    distances = torch.cdist(model[key][2:4], old)
    assert distances.min() > 1 and model[key][2:4].std() > 0.5            # new ones, as at any start: N(0, 1)
    assert all(torch.equal(model[k], state["ema"][k]) for k in model if k != key)


def test_a_folder_without_classes_keeps_the_null_embedding(made, starts, tmp_path):
    shutil.copytree(made / "photos" / "A", tmp_path / "flat")
    begun(made, tmp_path / "new", "--init-from", made / "run", "--data", tmp_path / "flat")
    table = starts[0][0]["network.embed.label.weight"]
    assert torch.equal(table, runs.read_checkpoint(str(made / "run"))["ema"]["network.embed.label.weight"][-1:])


def test_a_model_with_text_starts_from_one(starts, tmp_path):
    path = make_run(tmp_path / "text", **TEXT)
    config = begun(None, tmp_path / "new", "--init-from", path)
    assert config["text_encoder"] == "bytes" and len(config["examples"]) == 12
    wanted = runs.read_checkpoint(path)["ema"]
    assert all(torch.equal(starts[0][0][key], wanted[key]) for key in wanted)


# ---- what it refuses

SAME = [*TINY, "--base-channels", 16]


@pytest.mark.parametrize("args, wanted", [
    (["--preset", "glyphs64"], "its --size is (16, 16), not (64, 64)"),
    (["--size", 32], "its --size is (16, 16), not (32, 32)"),
    ([*SAME, "--preset", "glyphs64", "--base-channels", 8], "its --base-channels is 16, not 8"),
    ([*SAME, "--preset", "glyphs64", "--noise-d", 64], "its --noise-d is 32, not 64"),
    ([*SAME, "--preset", "glyphs64_unet", "--num-res-blocks", "1,1"], "its --model is 'uvit', not 'unet'"),
    (["--grow-from", "x"], "not with --grow-from")])
def test_another_network_is_one_line_that_names_the_first_difference(made, tmp_path, args, wanted):
    status, line = run_here(T, ["--init-from", made / "pretrained" / "a", *args, "--steps", 1, "--out",
                                tmp_path / "new"])
    assert status == 2 and wanted in line and line.count("\n") == 1, line
    assert not (tmp_path / "new").exists()


def test_more_that_is_refused(made, tmp_path):
    """Kills: a student that forgets its steps; a resumed run that starts anew; weights that are missing, unsaid."""
    student = make_run(tmp_path / "student", distilled_from="x", distilled_steps=4, guidance_max=5.0)
    begun(made, tmp_path / "new", "--init-from", made / "run", *SAME, "--preset", "glyphs64")   # the same network
    for args, wanted in ((["--init-from", student], "a distilled model"), (["--init-from", ""], "--init-from is empty"),
                         (["--init-from", tmp_path / "none"], "none: no such run"),
                         (["--resume", tmp_path / "new", "--init-from", made / "pretrained" / "a"],
                          "--init-from would make it another")):
        status, line = run_here(T, [*args, "--device", "cpu"])
        assert status == 2 and wanted in line and line.count("\n") == 1, line


def test_all_settings_that_build_a_network_are_compared():
    """Kills: a new setting of the network that --init-from neither takes nor compares."""
    builders = (C.build_model, C.plain_network, C.text_condition, C.outer_network, C.make_schedules,
                C.make_low_schedule, C.Config.sizes.fget)
    read = {name for build in builders for name in re.findall(r"(?:config|self)\.(\w+)", inspect.getsource(build))}
    free = {"sizes", "counts", "rms", "is_nested", "num_classes", "guidance_max", "dropout", "dropout_from_resolution",
            "transformer_dropout",
            "position_std"}                                               # not of a trained network, or checked apart
    assert read - free | {"precondition"} == set(start.OF_NETWORK)
