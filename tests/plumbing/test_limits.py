"""Limits: what is larger, stranger or less finite than anybody needs is refused in one line, before it costs much."""
import copy
import functools
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import time
import zipfile
import zlib

import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image

import config as C
import distill as D
import evaluate as E
import sample as P
import train as T
from data import FontFile
from plumbing import Damaged, UserError, captions, drawing, files, images, runs, shard, start, t5, training
from plumbing.features import cached
from plumbing.fonts import _cached_tile, find_font, open_font
from plumbing.images import BrokenImage
from programs import TINY, log_column, run_here

BRIEF = ["--device", "cpu"]


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits") / "run"
    assert run_here(T, [*TINY, "--steps", 2, "--save-every", 1, "--out", folder]) == (None, "")
    return folder


@pytest.fixture
def changed(two_steps, tmp_path):
    """A function that changes the state of a run's checkpoint: changed(change) -> the folder of the other run."""
    def make(change):
        state = torch.load(two_steps / "checkpoint.pt", weights_only=True)
        other = change(state)
        state = state if other is None else other
        (tmp_path / "other").mkdir(exist_ok=True)
        torch.save(state, tmp_path / "other" / "checkpoint.pt")
        return tmp_path / "other"
    return make


def check_refused(module, args, *wanted):
    """Check that a program ends with one line and status 2, within a minute."""
    since = time.time()
    status, line = run_here(module, args)
    assert status == 2 and line.count("\n") == 1 and all(word in line for word in wanted), (args, status, line)
    assert time.time() - since < 60 and len(line) < 700, line


# ---- weights

@pytest.mark.parametrize("more", [(), ("--if-unsaved", "go-on"), ("--shard",)])
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_weights_that_are_not_finite_are_not_saved(two_steps, tmp_path, monkeypatch, part, more):
    """The last step makes one value infinite: no later gradient tells. Kills: status 0 and a checkpoint that draws
    black pictures; a good checkpoint that is written over."""
    shutil.copytree(two_steps, tmp_path / "run")
    real, steps = T.update_ema, []

    def update(ema, model, decay, step):
        real(ema, model, decay, step)
        steps.append(step)
        if step == 3 and part != "optimizer":
            next(iter((ema if part == "ema" else model).parameters())).data.view(-1)[0] = math.inf
    monkeypatch.setattr(T, "update_ema", update)
    if part == "optimizer":
        step_of = torch.optim.Adam.step

        def step(self, *args):
            step_of(self, *args)
            if len(steps) == 1:
                next(iter(self.state.values()))["exp_avg_sq"].view(-1)[0] = math.inf
        monkeypatch.setattr(torch.optim.Adam, "step", step)
    check_refused(T, ["--resume", tmp_path / "run", "--steps", 4, *more, *BRIEF], "step 4: ", f"{part}.",
                  "is not finite", "the checkpoint of step 3 is in")
    monkeypatch.undo()
    kept = shard.newest(str(tmp_path / "run")) if "--shard" in more else runs.read_checkpoint(str(tmp_path / "run"))
    assert kept["step"] == 3


@pytest.mark.parametrize("spoilt", [False, True])
def test_rank_0_saves_alone_only_what_is_finite(two_steps, tmp_path, spoilt):
    """One process of several, as an error ends the run. Kills: infinite weights over a good checkpoint; a wait for
    others that are gone."""
    model, ema, optimizer, state = loaded(two_steps)
    run = training.Run(str(tmp_path), state["config"], range(state["examples"]), model, ema, optimizer, 1, world=2,
                       interrupt=object())
    run.step += 1
    if spoilt:
        next(ema.parameters()).data.view(-1)[0] = math.inf
        with pytest.raises(UserError, match="step 2: ema.* is not finite, .* the checkpoint of step 1"):
            run.save_alone()
        run.rescue(error := UserError("x"))                               # it does not try again
        assert not any("could not be saved" in note for note in error.__notes__)
    else:
        run.save_alone()
        assert runs.read_checkpoint(str(tmp_path))["step"] == run.saved == 2
    assert (tmp_path / "checkpoint.pt").exists() != spoilt


def test_a_student_that_is_not_finite_is_not_saved(two_steps, tmp_path, monkeypatch):
    """Kills: a round of distillation that ends with status 0 and infinite weights."""
    step_of = torch.optim.Adam.step

    def step(self, *args):
        step_of(self, *args)
        self.param_groups[0]["params"][0].data.view(-1)[0] = math.inf
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    words = ["--from", 2, "--to", 1, "--steps", 1, "--out", tmp_path / "d", *BRIEF]
    check_refused(D, [two_steps, *words], "step 1: model.", "is not finite")
    assert not (tmp_path / "d" / "1" / "checkpoint.pt").exists()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_finite_are_not_loaded(changed, value):
    """Kills: a look at the first part of a checkpoint only."""
    def spoil(part):
        def change(state):
            if part == "optimizer":
                state[part]["state"][1]["exp_avg_sq"].view(-1)[0] = value
            else:
                list(state[part].values())[-1].view(-1)[-1] = value
        return change
    for part in ("model", "ema", "optimizer"):
        folder = changed(spoil(part))
        with pytest.raises(UserError, match=f"checkpoint.pt: {part}.* holds values that are not finite"):
            runs.read_checkpoint(str(folder))


def loaded(run):
    """Return (model, ema, optimizer, state) of a run's checkpoint."""
    state = runs.read_checkpoint(str(run))
    model = C.build_model(state["config"])
    ema, optimizer = copy.deepcopy(model), C.make_optimizer(model, state["config"])
    for module, key in ((model, "model"), (ema, "ema"), (optimizer, "optimizer")):
        runs.load_weights(module, state[key], "x")
    return model, ema, optimizer, state


@pytest.mark.parametrize("part, value, wanted", [
    ("model", math.nan, "not finite"), ("ema", math.nan, "not finite"), ("exp_avg", math.nan, "not finite"),
    ("exp_avg_sq", -1, "values below 0"), ("step", -1, "is -1.0 in a checkpoint of step 2"), ("step", 1e30, "is 1.0")])
def test_shards_of_values_that_cannot_be_are_not_loaded(two_steps, tmp_path, part, value, wanted):
    """Kills: a check that only checkpoint.pt passes."""
    model, ema, optimizer, state = loaded(two_steps)
    spoilt = (next((model if part == "model" else ema).parameters()).data if part in ("model", "ema") else
              next(iter(optimizer.state.values()))[part])
    spoilt.view(-1)[0] = value
    shard.save(str(tmp_path), model, ema, optimizer, 2, 8, state["config"], state["examples"])
    with pytest.raises(UserError, match=f"{part}.* {wanted}"):
        shard.load(shard.newest(str(tmp_path)), model, ema, optimizer)


def test_shards_from_before_the_first_step_hold_no_optimizer_state(two_steps, tmp_path):
    """PyTorch fills an empty optimizer by a step of its own. Kills: Adam that resumes a step ahead."""
    model, ema, _, state = loaded(two_steps)
    optimizer = C.make_optimizer(model, state["config"])
    shard.save(str(tmp_path), model, ema, optimizer, 0, 0, state["config"], state["examples"])
    assert not optimizer.state
    shard.load(shard.newest(str(tmp_path)), model, ema, optimizer)
    assert not optimizer.state


# ---- the fields of a checkpoint

def setting(name, value):
    return lambda state: state["config"].update({name: value})


def group(name, value):
    return lambda state: state["optimizer"]["param_groups"][0].update({name: value})


def adam(key, change):
    """Change the optimizer state of one weight."""
    return lambda state: (own := state["optimizer"]["state"][1]).update({key: change(own.get(key))})


@pytest.mark.parametrize("change, wanted", [
    *[(lambda state, name=name, value=value: state.update({name: value}), f"its {name} is ")
      for name in ("step", "images", "examples") for value in (-1, True, "3", 2.0, 10 ** 30, [1], torch.ones(2))],
    (lambda state: state.update(step=None), "its step is None"),
    (lambda state: state.update(examples=None), "its examples is None"),
    (lambda state: state.pop("examples") and None, "lacks examples"),
    (lambda state: state.update(step=10 ** 9), "contradict each other: step 1,000,000,000 of 2"),
    (lambda state: state.update(step=3, images=12), "step 3 of 2, batches of 4, 12 images seen"),
    (lambda state: state.update(images=2 ** 59), "contradict"), (setting("batch", 8), "batches of 8, 8 images seen"),
    (lambda state: state.update(step=1, images=4), "optimizer.0.step is 2.0 in a checkpoint of step 1"),
    (adam("step", lambda x: x * 0 + 1e30), "optimizer.1.step is 1.0"), (adam("step", torch.neg), "1.step is -2.0"),
    (adam("exp_avg_sq", torch.neg), "optimizer.1.exp_avg_sq holds values below 0"),
    (adam("more", lambda _: torch.ones(1)), "more for a weight, not exp_avg, exp_avg_sq, step"),
    (lambda state: state["optimizer"]["state"].update({999: state["optimizer"]["state"][0]}), "has state for "),
    (lambda state: [state], "another program"), (lambda state: torch.ones(3), "another program"),
    (lambda state: state.update(config=[1]), "another program"),
    (lambda state: {"step": 1, "config": {}}, "lacks model, ema"),
    (lambda state: state.update(model=torch.ones(2)), "damaged"),
    (lambda state: state.update(ema={"a": 1}), "no plain tensor"), (lambda state: state.update(config=None), "damaged"),
    (lambda state: state["ema"].update(more=torch.ones(2).to_sparse()), "ema.more is no plain tensor"),
    (lambda state: state["ema"].update(more=torch.ones(2, device="meta")), "ema.more is no plain tensor"),
    (lambda state: state["ema"].update(more=torch._neg_view(torch.ones(2))), "ema.more is no plain tensor"),
    (lambda state: state.update(optimizer=[]), "another model"),
    (lambda state: state.update(optimizer={}), "groups"),
    (lambda state: state["optimizer"].update(state=7), "damaged"),
    (lambda state: state["optimizer"].update(state={0: {"step": "x"}}), "is no plain tensor"),
    (lambda state: state["optimizer"].update(param_groups=7), "another model"),
    (lambda state: state["optimizer"]["param_groups"].append({}), "2 groups of the optimizer for 1"),
    (group("weight_decay", math.inf), "the optimizer's weight_decay is inf"), (group("betas", (0.9, 7)), "betas"),
    (group("params", [0]), "params"), (group("eps", "x"), "eps"), (group("amsgrad", True), "amsgrad"),
    *[(setting(name, "nosuch"), f"--{name.replace('_', '-')} 'nosuch': want ") for name in (
        "sampler", "clip_x", "schedule", "model", "loss", "precision", "precondition", "low_upsample", "distill_weight",
        "compile", "channels_last", "if_unsaved", "steps", "clip", "size", "flip", "class_names")],
    (setting("patching", "nosuch"), "patching 'nosuch'"), (setting("nosuch", 1), "a setting 'nosuch'"),
    (setting("class_names", ["A"]), "1 names for 36 classes"), (setting("class_names", [1, 2]), "--class-names"),
    (setting("num_classes", 10 ** 12), "--num-classes"), (setting("steps", math.nan), "--steps nan"),
    (setting("clip", math.nan), "--clip nan"), (setting("noise_d", 1e300), "--noise-d 1e+300"),
    (setting("band_rms", "1,x"), "--band-rms"), (setting("band_rms", "0,1,1,1"), "--band-rms"),
    (setting("band_rms", "nan"), "--band-rms"), (setting("band_rms", "1/1"), "--band-rms"),
    (setting("num_transformer_blocks", 10 ** 8), "--num-transformer-blocks 100000000"),
    (setting("emb_channels", 10 ** 12), "--emb-channels"), (setting("channel_mult", []), "--channel-mult")])
def test_a_field_of_a_checkpoint_that_makes_no_sense_is_one_line(changed, change, wanted):
    """Kills: a traceback of whoever meets it first, minutes later; a setting of no meaning that is accepted."""
    folder = changed(change)
    check_refused(T, ["--resume", folder, "--steps", 4, *BRIEF], "checkpoint.pt: ", wanted)


def test_a_checkpoint_from_before_the_first_step_is_whole(changed):
    """It has no optimizer state. Kills: a run that a signal stopped at once and that cannot go on."""
    folder = changed(lambda state: state.update(step=0, images=0) or state["optimizer"]["state"].clear())
    runs.check_whole(runs.read_checkpoint(str(folder)))


@pytest.mark.parametrize("change", [
    setting("num_transformer_blocks", 450), setting("emb_channels", 65536), setting("base_channels", 60000)])
def test_a_network_that_is_not_in_the_file_is_never_built(changed, change):
    """Kills: gigabytes for a model whose weights the file does not hold; a minute without an answer."""
    folder = changed(change)
    for module, args in ((P, [folder, "--n", 1, "--out", folder / "x.png"]), (E, [folder, "--n", 2]), (D, [folder])):
        check_refused(module, [*args, *BRIEF], "a checkpoint of another model")


def test_a_model_that_does_not_fit_is_refused_before_it_is_built(monkeypatch, tmp_path):
    """Kills: no look at the memory; one that forgets the optimizer, so that the program ends in the first step."""
    config = C.PRESETS["glyphs64"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in C.build_model(config).parameters())
    monkeypatch.setattr(runs, "memory_of", lambda device: 20 * parameters - 1)
    check_refused(T, ["--out", tmp_path / "r"], f"a model of {parameters:,} parameters: ", "GiB of memory or more")
    assert not os.path.exists(tmp_path / "r")
    assert run_here(T, ["--dry-run"]) == (None, "")                       # it may be for another machine


# ---- the log

def write_pipe(path):
    os.remove(path)
    os.mkfifo(path)


def write_folder(path):
    os.remove(path)
    path.mkdir()


def rewrite(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def in_line_2(new):
    return rewrite(lambda old: old.replace(old.split(b"\r\n")[1], new))


@pytest.mark.parametrize("damage, steps, aside", [
    (in_line_2(b"1,4,\xff,1,1,1,1,"), "2", True), (in_line_2(b"1," + b"9" * 300_000), "2", True),
    (in_line_2(b"\0" * 50), "2", True), (in_line_2(b"1,4,1,1,1,1,1,nan"), "2", True), (in_line_2(b'"'), "2", True),
    (in_line_2(b"1,4,1,1,1,1,-1e300,"), "2", True), (in_line_2(b"1,4,1,1,1,1,1e300,"), "2", True),
    (in_line_2(b"1,4,1,1,1,1,1,,,,"), "2", True), (rewrite(lambda old: b"\0" * 3000), "", True),
    (rewrite(lambda old: old + b"\0" * 3000), "12", True), (rewrite(lambda old: b"step,ima"), "", False),
    (rewrite(lambda old: b"\xff\xfe" + old), "12", True),
    (rewrite(lambda old: b"\xef\xbb\xbf" + old), "12", False),
    (rewrite(lambda old: old.split(b"\n", 1)[1]), "12", False),
    (rewrite(lambda old: old[:-9]), "1", False), (rewrite(lambda old: old + b"3,12,0."), "12", False),
    (rewrite(lambda old: b""), "", False),
    (rewrite(lambda old: os.urandom(5000).replace(b"\n", b"") + b"\n"), "", True),
    (rewrite(lambda old: old.replace(b",", b";")), "", True), (os.remove, "", False),
    (write_pipe, "", True), (write_folder, "", True)])
def test_a_damaged_log_costs_its_damaged_lines_and_no_run(two_steps, tmp_path, capsys, damage, steps, aside):
    """Kills: a run that cannot be resumed for a byte in its log, or waits for a pipe; rows that vanish without a word;
    good rows that go with the bad one."""
    path, config = tmp_path / "log.csv", runs.read_checkpoint(str(two_steps))["config"]
    shutil.copy(two_steps / "log.csv", path)
    damage(path)
    damaged = path.read_bytes() if path.is_file() else b""
    log = training.Log(str(tmp_path), config, active=True, first_step=2)
    log.draw()
    assert "".join(log_column(tmp_path, "step")) == steps == "".join(row["step"] for row in log.rows())
    kept = [name for name in os.listdir(tmp_path) if name.startswith("log.csv.")]
    assert kept == ["log.csv.damaged-1"] * aside
    assert ("it is kept as log.csv.damaged-1" in capsys.readouterr().out) == aside
    assert not aside or not damaged or (tmp_path / kept[0]).read_bytes() == damaged


def test_a_run_with_a_damaged_log_goes_on(two_steps, tmp_path):
    shutil.copytree(two_steps, tmp_path / "run")
    with open(tmp_path / "run" / "log.csv", "ab") as file:
        file.write(b"\xff\n")
    assert run_here(T, ["--resume", tmp_path / "run", "--steps", 3, *BRIEF]) == (None, "")
    assert log_column(tmp_path / "run", "step") == ["1", "2", "3"]


def test_what_was_set_aside_stays(two_steps, tmp_path):
    """Kills: a second damaged log written over the first."""
    shutil.copytree(two_steps, tmp_path / "run")
    config = runs.read_checkpoint(str(tmp_path / "run"))["config"]
    for text in ("a\nb\n", "c\n"):
        (tmp_path / "run" / "log.csv").write_text(text)
        training.Log(str(tmp_path / "run"), config, active=True, first_step=2)
    texts = {path.read_text() for path in (tmp_path / "run").glob("log.csv.damaged*")}
    assert texts == {"a\nb\n", "c\n"}


# ---- files from a stranger

def pack(path):
    """Compress a file of torch.save, as no program does."""
    with zipfile.ZipFile(path) as file:
        parts = {entry.filename: file.read(entry) for entry in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in parts.items():
            file.writestr(name, content)


def claim(path):
    """Let a file's list of parts say that one is a gigabyte long, as parts that lie over each other would."""
    content = path.read_bytes()
    at = content.rindex(b"PK\1\2") + 20                                   # the sizes of the last part
    path.write_bytes(content[:at] + (10 ** 9).to_bytes(4, "little") * 2 + content[at + 8:])


def test_a_bomb_is_refused_before_it_is_read(changed, monkeypatch):
    """A megabyte that unpacks to gigabytes. Kills: a look at the tensors when the memory is full."""
    claimed = changed(lambda state: None) / "claimed"
    claimed.mkdir()
    shutil.move(claimed.parent / "checkpoint.pt", claimed)
    claim(claimed / "checkpoint.pt")
    folder = changed(lambda state: state["ema"].update(more=torch.zeros(3 * 10 ** 7)))
    pack(folder / "checkpoint.pt")
    assert os.path.getsize(folder / "checkpoint.pt") < 10 ** 6
    monkeypatch.setattr(torch, "load", None)                              # nobody reads it
    for run in (folder, claimed):
        for module, args in ((P, [run]), (T, ["--resume", run]), (D, [run]), (E, [run])):
            check_refused(module, [*args, *BRIEF], "damaged, or not a checkpoint (its parts are larger than the file)")


def test_tensors_that_repeat_one_number_are_refused(changed):
    """Kills: a tensor of 10^12 values in a file of a megabyte: one number with a stride of 0."""
    folder = changed(lambda state: state["ema"].update(more=torch.zeros(1).expand(10 ** 12)))
    check_refused(P, [folder, *BRIEF], "its tensors are larger than the file")


PAIRS = functools.reduce(lambda pair, _: (pair, pair), range(40), ())    # 2^40 of them; never hash or print it


@pytest.mark.parametrize("place", ["a key", "a setting", "a list", "the only thing"])
def test_pairs_in_pairs_are_refused_before_they_are_read(changed, monkeypatch, place):
    """200 bytes that take for ever to hash or to print. Kills: a look at them when they are there."""
    def change(state):
        state["config"]["size"] = PAIRS if place == "a setting" else (16, 16)
        state["optimizer"] = functools.reduce(lambda pair, _: [pair, pair], range(40), []) if place == "a list" else {}
        return PAIRS if place == "the only thing" else state
    folder = changed(change)
    if place == "a key":                                                  # torch.save cannot write it: it would hash
        with zipfile.ZipFile(folder / "checkpoint.pt") as file:
            parts = {entry.filename: file.read(entry) for entry in file.infolist()}
        with zipfile.ZipFile(folder / "checkpoint.pt", "w") as file:
            for name, content in parts.items():
                key = b"\x80\x02})" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(40)) + b"K\x01s."
                file.writestr(name, key if name.endswith("data.pkl") else content)
    monkeypatch.setattr(torch, "load", None)                              # nobody reads it
    for module in (P, D, E):
        check_refused(module, [folder, *BRIEF], "damaged, or not a checkpoint (its objects repeat each other)")


@pytest.mark.parametrize("content", [
    [], {}, 7, dict(images=torch.zeros(1, 8, 8, 3), labels=torch.zeros(1).long(), seconds=1.0),
    dict(images=torch.zeros(1, 8, 9, 3).byte(), labels=torch.zeros(1).long(), seconds=1.0),
    dict(images=torch.zeros(2, 8, 8, 3).byte(), labels=torch.zeros(1).long(), seconds=1.0),
    dict(images=torch.zeros(1, 8, 8, 3).byte(), labels=["a"], seconds=1.0), "packed",
    dict(images=torch.zeros(1, 8, 8, 3).byte(), labels=torch.zeros(1).long(), seconds=math.nan)])
def test_a_cache_of_samples_that_holds_something_else_is_drawn_again(tmp_path, capsys, content):
    """Kills: a traceback, or a picture of a stranger that is measured as ours; a bomb in place of a cache."""
    def empty():
        return drawing.SampleCache(str(tmp_path), ("key",), [0, 1], (8, 8))
    good = empty()
    good.add(torch.ones(2, 8, 8, 3).byte(), 1.0)
    assert len(empty()) == 2 and capsys.readouterr().err == ""
    if content == "packed":
        pack(good.path)
    else:
        torch.save(content, good.path)
    assert len(empty()) == 0
    assert "damaged, computed again" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pieces(two_steps, tmp_path_factory):
    """A run with one sharded checkpoint."""
    folder, (model, ema, optimizer, state) = tmp_path_factory.mktemp("pieces"), loaded(two_steps)
    shard.save(str(folder), model, ema, optimizer, 2, 8, state["config"], state["examples"])
    return folder


def rewritten(folder, content):
    """Put another list of tensors in place of a checkpoint's, and the right checksum of it."""
    path = folder / "sharded" / "0000002"
    (path / ".metadata").write_bytes(content)
    about = json.loads((path / "run.json").read_text())
    about["files"][".metadata"] = shard.checksum(path / ".metadata")
    (path / "run.json").write_text(json.dumps(about))


BUILDS = {"class": b"\x80\x02ctorch.distributed.checkpoint.metadata\nStorageMeta\nN}X\x04\0\0\0evilK\x01s\x86b.",
          "field": b"\x80\x02ctorch.distributed.checkpoint.metadata\nStorageMeta\n)\x81}X\x04\0\0\0evilK\x01sb.",
          "slot": b"\x80\x02ctorch.distributed.checkpoint.metadata\nStorageMeta\n)\x81N}X\x04\0\0\0evilK\x01s\x86b.",
          "dict": b"\x80\x02ccollections\nOrderedDict\n)R}X\x04\0\0\0evilK\x01sb.",
          "code": b"cos\nsystem\n(S'false'\ntR.", "nothing": b"", "number": b"\x80\x02K\x01.",
          "deep": b"(" * 10 ** 6 + b"."}


@pytest.mark.parametrize("name", BUILDS)
def test_a_hostile_list_of_tensors_is_one_line(pieces, tmp_path, name):
    """Kills: attributes set on classes of this process; PyTorch's traceback above our line."""
    shutil.copytree(pieces, tmp_path / "run")
    rewritten(tmp_path / "run", BUILDS[name])
    check_refused(shard, [tmp_path / "run"], "damaged, or a checkpoint of another model (")
    assert not hasattr(dcp.metadata.TensorProperties, "evil") and not hasattr(dcp.metadata.StorageMeta, "evil")


def edit_chunks(change):
    def edit(metadata):
        tensor = metadata.state_dict_metadata["model.network.position"]
        metadata.state_dict_metadata["model.network.position"] = change(tensor) or tensor
    return edit


def split_chunk(tensor, first, second):
    """Two chunks of rows, (first row, rows) each, in place of one."""
    width = tensor.size[1]
    tensor.chunks[:] = [dcp.metadata.ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((n, width)))
                        for at, n in (first, second)]


@pytest.mark.parametrize("edit, wanted", [
    (edit_chunks(lambda tensor: tensor.chunks.clear()), "its chunks hold 0 of 16 rows of model.network.position"),
    (edit_chunks(lambda tensor: split_chunk(tensor, (0, 8), (4, 12))), "do not fit together"),
    (edit_chunks(lambda tensor: split_chunk(tensor, (0, 8), (9, 7))), "do not fit together"),
    (edit_chunks(lambda tensor: split_chunk(tensor, (0, 4), (4, 4))), "hold 8 of 16 rows"),
    (edit_chunks(lambda tensor: setattr(tensor, "size", torch.Size((1, 1)))), "model.network.position is"),
    (edit_chunks(lambda tensor: setattr(tensor.properties, "dtype", torch.int8)), "is torch.int8"),
    (edit_chunks(lambda tensor: dcp.metadata.BytesStorageMetadata()), "damaged"),
    (lambda metadata: metadata.state_dict_metadata.clear(), "it lacks model."),
    (lambda metadata: [metadata.state_dict_metadata.pop(name) for name in list(metadata.state_dict_metadata)
                       if name.startswith("optimizer.")], "it lacks optimizer."),
    (lambda metadata: metadata.storage_data.clear(), "damaged"),
    (lambda metadata: setattr(next(iter(metadata.storage_data.values())), "transform_descriptors", ["zstd"]), "packs"),
    (lambda metadata: setattr(next(iter(metadata.storage_data.values())), "relative_path", ".."), "names .."),
    (lambda metadata: setattr(next(iter(metadata.storage_data.values())), "offset", "x"), "damaged")])
def test_a_list_of_tensors_that_lacks_some_is_one_line(pieces, tmp_path, edit, wanted):
    """Kills: a tensor that keeps its random start since no chunk of it is stored."""
    shutil.copytree(pieces, tmp_path / "run")
    path = tmp_path / "run" / "sharded" / "0000002" / ".metadata"
    metadata = shard.Metadata(io.BytesIO(path.read_bytes())).load()
    edit(metadata)
    rewritten(tmp_path / "run", pickle.dumps(metadata))
    check_refused(shard, [tmp_path / "run"], wanted)
    if "chunks" in wanted or "lacks" in wanted:                           # so --auto-resume goes on from another one
        with pytest.raises(Damaged):
            start.whole_shards(str(tmp_path / "run"), 2)


def test_pieces_that_nobody_touched_are_read(pieces, two_steps, tmp_path):
    shutil.copytree(pieces, tmp_path / "run")
    assert run_here(shard, [tmp_path / "run"]) == (None, "")
    a, b = (runs.read_checkpoint(str(folder)) for folder in (tmp_path / "run", two_steps))
    assert all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in b[part])


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 50_000, "[]", "7", "null", "{", '{"step": 2, "images": -1}',
                                  '{"config": {}, "step": 1e999, "images": 8, "examples": 1, "files": {}}'])
def test_a_json_file_that_makes_no_sense_is_one_line(pieces, tmp_path, text):
    """Kills: a RecursionError; a list where a dict is wanted."""
    shutil.copytree(pieces, tmp_path / "run")
    (tmp_path / "run" / "sharded" / "0000002" / "run.json").write_text(text)
    check_refused(shard, [tmp_path / "run"], "0000002")
    (tmp_path / "evaluation.json").write_text(text)
    assert isinstance(files.read_json(str(tmp_path / "evaluation.json")), dict)
    kept = tmp_path / ("evaluation.json" if text.startswith('{"') and text.endswith("}") else
                       "evaluation.json.damaged-1")                       # a dict, or nothing that we replace unseen
    assert kept.read_text() == text
    (tmp_path / "captions.jsonl").write_text(text + "\n")
    with pytest.raises(UserError, match="line 1: want "):
        list(captions.read_captions(str(tmp_path / "captions.jsonl")))


def test_a_damaged_font_is_one_line(tmp_path):
    """40 fonts with a few wrong bytes, seeded. Kills: FreeType's error as a traceback; a class that is left out."""
    rng, refusals = random.Random(3), 0
    with open(find_font("cmb10.ttf"), "rb") as file:
        whole = file.read()
    for _ in range(40):
        damaged = bytearray(whole)
        for _ in range(rng.choice((3, 30, 300))):
            damaged[rng.randrange(300, len(damaged))] = rng.randrange(256)
        (tmp_path / "font.ttf").write_bytes(damaged)
        open_font.cache_clear()
        _cached_tile.cache_clear()
        try:
            source = FontFile(tmp_path / "font.ttf", (16, 16))
            for i in range(20):
                source.image(i)
        except (UserError, BrokenImage) as error:                         # anything else raises
            refusals += 1
            assert "font.ttf: " in str(error) and "\n" not in str(error)
    assert refusals > 5


# ---- names that others have

@pytest.fixture
def in_time():
    """End a test that waits for a pipe."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))                  # it is no Exception
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(folder, name, make):
    """Make something else in place of a file."""
    if (folder / name).exists():
        (folder / name).unlink()
    make(folder / name)


@pytest.mark.parametrize("name, make", [
    *[(name, make) for name in ("checkpoint.pt", "previous.pt", "checkpoint_0000001.pt", ".lock")
      for make in (os.mkdir, os.mkfifo)], ("config.json", os.mkdir), ("sharded", os.mkfifo),
    (".lock", lambda path: path.symlink_to("/nosuch/lock"))])
@pytest.mark.parametrize("again", [False, True])
def test_a_folder_or_a_pipe_that_a_run_cannot_do_without_is_one_line(two_steps, tmp_path, in_time, name, make, again):
    """Kills: a run that trains on and cannot be saved; one that waits for a pipe; a line that names another file."""
    shutil.copytree(two_steps, tmp_path / "run")
    put(tmp_path / "run", name, make)
    words = [*TINY, "--auto-resume", "--out"] if again else ["--resume"]
    check_refused(T, [*words, tmp_path / "run", "--steps", 3, *BRIEF], f"run/{name}: ")
    assert not (tmp_path / "run" / "samples_0000003.png").exists()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_in_place_of_what_the_run_shows_ends_no_run(two_steps, tmp_path, in_time, make):
    """Kills: a page that ends a run, or waits for a pipe."""
    shutil.copytree(two_steps, tmp_path / "run")
    for name in ("log.csv", "loss.png", "index.html", "samples_0000001.png", "samples_0000002.png", "log.csv.1.new",
                 "checkpoint.pt.1.new"):
        put(tmp_path / "run", name, make)
    assert run_here(T, ["--resume", tmp_path / "run", "--steps", 3, *BRIEF]) == (None, "")
    assert runs.read_checkpoint(str(tmp_path / "run"))["step"] == 3


@pytest.mark.parametrize("name", ["run.json", ".metadata", "__0_0.distcp"])
def test_a_pipe_among_the_shards(pieces, tmp_path, in_time, name):
    """Kills: a program that waits for it."""
    shutil.copytree(pieces, tmp_path / "run")
    write_pipe(tmp_path / "run" / "sharded" / "0000002" / name)
    check_refused(shard, [tmp_path / "run"], f"{name}: not a regular file")


def test_a_pipe_in_place_of_results(tmp_path, in_time):
    for name in (".evaluation.json.lock", "evaluation.json", "real-1.pt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match="lock: not a regular file"), files.one_at_a_time(tmp_path / "evaluation.json"):
        pass
    with pytest.raises(UserError, match="json: not a regular file"):
        files.read_json(tmp_path / "evaluation.json")
    with pytest.raises(UserError, match="pt: not a regular file"):
        cached(tmp_path / "real-1.pt", dict, id)


def test_a_sheet_that_is_no_picture_is_left_out_of_the_page(two_steps, tmp_path):
    """A bomb, an empty file, and what a power loss leaves. Kills: Pillow's error as the end of a run."""
    shutil.copytree(two_steps, tmp_path / "run")
    png = (tmp_path / "run" / "samples_0000002.png").read_bytes()
    head = b"IHDR" + (20_000).to_bytes(4, "big") * 2 + png[24:29]         # width and height, and their checksum
    bomb = png[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png[33:]
    for step, content in enumerate((bomb, b"", b"\0" * 300)):
        (tmp_path / "run" / f"samples_000000{step}.png").write_bytes(content)
    assert run_here(T, ["--resume", tmp_path / "run", "--steps", 3, *BRIEF]) == (None, "")
    page = (tmp_path / "run" / "index.html").read_text()
    assert set(re.findall("samples_[0-9]+.png", page)) == {"samples_0000003.png"}


def test_an_icon_is_not_read(tmp_path):
    """It lists 16 x 16 and holds 10,000 x 10,000. Kills: a decoder that believes the list."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.ico")
    found, skipped = images.list_images(str(tmp_path))
    assert not found and "1 of a format that is not read" in skipped[0][1]
    (tmp_path / "a.ico").rename(tmp_path / "a.png")
    with pytest.raises(BrokenImage):
        images.load_image(str(tmp_path / "a.png"), (16, 16))


# ---- words of a command line

@pytest.mark.parametrize("module, args, wanted", [
    *[(P, ["RUN", flag, ""], f"{flag} is empty") for flag in ("--out", "--gif", "--labels", "--prompts")],
    (P, [""], "RUN is empty"), (E, ["RUN", ""], "RUN is empty"), (shard, [""], "RUN is empty"),
    *[(E, ["RUN", flag, ""], f"{flag} is empty") for flag in ("--export", "--export-png", "--held-out", "--metrics")],
    (D, ["RUN", "--out", ""], "--out is empty"), (t5, ["--data", ""], "--data is empty"),
    *[(T, [flag, ""], f"{flag} is empty") for flag in ("--resume", "--out", "--preset", "--init-from", "--patching")],
    (P, ["RUN", "--labels", "9" * 5000], "--labels 99999"), (P, ["RUN", "--n", "9" * 5000], "--n: invalid int"),
    (P, ["RUN", "--labels", "A,,B"], "--labels with an empty name"),
    *[(P, ["RUN", "--device", name], f"--device {name}") for name in ("cpu:5", "mps:1")]])
def test_odd_words_are_one_line(two_steps, module, args, wanted):
    """Kills: a script's unset variable that is taken for "leave it out"; Python's limit on the digits of a number."""
    check_refused(module, [two_steps if word == "RUN" else word for word in args], wanted)


def test_what_means_none_may_be_empty(two_steps, tmp_path):
    words = ["--preset", "glyphs64_nested", "--outer-channels", "", "--outer-blocks", "", "--held-out", "", "--dry-run"]
    assert run_here(T, words) == (None, "")
    check_refused(P, [two_steps, "--text", "", *BRIEF], "was trained without text")             # not: is empty


def test_a_container_limits_the_memory(tmp_path, monkeypatch):
    """Kills: a model that the kernel ends without a word, as the machine outside has more memory."""
    cpu, paths = torch.device("cpu"), [tmp_path / "max", tmp_path / "bytes", tmp_path / "none"]
    paths[0].write_text("max\n")
    monkeypatch.setattr(runs, "CGROUP_LIMITS", paths)
    whole = runs.memory_of(cpu)
    paths[1].write_text("1000000\n")
    assert runs.memory_of(cpu) == 10 ** 6 < whole
