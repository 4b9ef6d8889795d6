"""shard.py: pieces on any number of processes are the same run as one process; their checkpoints are safe to read."""
import csv
import io
import json
import os
import pickle
import shutil
import warnings

import pytest
import torch

import config as C
from plumbing import runs
from plumbing.settings import override
import sample as P
from plumbing import shard
import train as T
from programs import TINY, program, run_here

SMALL = (*TINY, "--dropout", 0, "--adam-eps", 1e-4, "--warmup", 0, "--save-every", 2)   # eps: rounding stays rounding


def torchrun(number):
    return ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number))


def go(*args, number=1):
    if number == 1:
        assert run_here(T, args) == (None, "")
    else:
        done = program("train.py", *args, launcher=torchrun(number))
        assert done.returncode == 0, done.stderr


def whole(folder):
    return torch.load(os.path.join(folder, "checkpoint.pt"), weights_only=True)


def same_run(a, b):
    """Weights, averages and moments, up to the rounding of sums in another order."""
    assert (a["step"], a["images"], a["examples"]) == (b["step"], b["images"], b["examples"])
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        for key in a[part]:
            torch.testing.assert_close(a[part][key], b[part][key], atol=1e-6, rtol=1e-5)
    assert a["optimizer"]["param_groups"][0].keys() == b["optimizer"]["param_groups"][0].keys()
    for i, moments in a["optimizer"]["state"].items():
        for key in moments:
            torch.testing.assert_close(moments[key], b["optimizer"]["state"][i][key], atol=1e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shard") / "one"
    go(*SMALL, "--steps", 5, "--out", folder)
    return folder


def norms(run):
    """Return the norms of the gradients in a run's log."""
    return [float(row["grad_norm"]) for row in csv.DictReader(open(run / "log.csv"))]


@pytest.mark.long
def test_any_number_of_processes_goes_on_where_another_stopped(unbroken, tmp_path):
    """2 -> 4 -> 1. Kills: moments or averages that are not saved, gradients summed where a mean is meant, a
    checkpoint that knows how many wrote it, parts of a batch that count as whole ones."""
    run = tmp_path / "run"
    go(*SMALL, "--steps", 2, "--shard", "--accumulate", 2, "--recompute", "--sample-every", 1, "--out", run, number=2)
    assert sorted(os.listdir(run / "sharded" / "0000002")) == [".metadata", "__0_0.distcp", "__1_0.distcp", "run.json"]
    go("--resume", run, "--steps", 3, "--device", "cpu", "--accumulate", 1, number=4)
    go("--resume", run, "--steps", 5, "--device", "cpu")
    assert sorted(os.listdir(run / "sharded")) == ["0000004", "0000005"]                        # the last two
    status, line = run_here(P, [run])
    assert status == 2 and f"python -m plumbing.shard {run}" in line
    assert run_here(shard, [run]) == (None, "")
    same_run(whole(unbroken), whole(run))
    assert norms(run) == pytest.approx(norms(unbroken), rel=1e-4)         # of all gradients, not of one rank's part
    assert run_here(P, [run, "--n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "s.png"]) == (None, "")


@pytest.mark.long
def test_a_whole_run_goes_on_in_pieces(unbroken, tmp_path):
    """1 -> 2, from a plain checkpoint: weights, averages and moments reach the pieces."""
    run = tmp_path / "run"
    go(*SMALL, "--steps", 3, "--out", run)
    go("--resume", run, "--steps", 5, "--device", "cpu", "--shard", number=2)
    status, line = run_here(P, [run])                                     # the plain one is old by now
    assert status == 2 and "is of step 3, the sharded checkpoint beside it of 5" in line
    assert run_here(shard, [run]) == (None, "")
    same_run(whole(unbroken), whole(run))


PIECES = """
import copy, json, os, sys
import torch, torch.distributed as dist
sys.path.insert(0, os.getcwd())
import config as C
from plumbing import shard
from plumbing.settings import override
from plumbing.runs import autocast
from train import training_loss
dist.init_process_group("gloo")
nested = dict(outer_channels=sys.argv[3], outer_blocks="1,1", patching="none") if sys.argv[3] else {}
config = override(C.PRESETS[sys.argv[1]], precision=sys.argv[2], base_channels=16, emb_channels=32, loss="v_mse",
                  **nested)
torch.manual_seed(0)
with torch.device("meta" if dist.get_rank() else "cpu"):
    model = C.build_model(config)
whole = {key: value.clone() for key, value in model.state_dict().items()}
optimizer = C.make_optimizer(model, config)
model, ema, optimizer = shard.split(model, copy.deepcopy(model), optimizer, config, torch.device("cpu"))
with autocast(config.precision, torch.device("cpu")):
    loss = training_loss(config, model, torch.zeros(2, 3, *config.size), {}, torch.tensor([0.3, 0.6]),
                                [torch.ones(2, 3, *size) for size in config.sizes])
loss.backward()
optimizer.step()
held = lambda tensors: sum(t.to_local().numel() for t in tensors)
moved = [p for p in model.parameters() if p.grad is not None]             # nothing was said of classes: all but these
counts = [[held(model.parameters()), held(ema.parameters())], [held(moved), held(p.grad for p in moved)]
          + [held(optimizer.state[p][key] for p in moved) for key in ("exp_avg", "exp_avg_sq")]]
groups = {type(m).__name__ for m in model.modules() if type(m).__name__.startswith("FSDP")}
average = {key: value.full_tensor() for key, value in ema.state_dict().items()}
if dist.get_rank() == 0:
    assert average.keys() == whole.keys() and all(torch.equal(average[key], whole[key]) for key in whole)
    json.dump(dict(counts=counts, all=[sum(p.numel() for p in part) for part in (model.parameters(), moved)],
                   groups=sorted(groups)),
              open(sys.argv[4], "w"))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.parametrize("preset, precision, outer, groups", [
    ("glyphs64", "bf16", "", {"FSDPResBlock", "FSDPTransformerBlock", "FSDPUViT"}),
    ("glyphs64_unet", "float32", "16,16", {"FSDPResBlock", "FSDPMapAttention", "FSDPNestedUNet"})])
def test_a_process_holds_its_share_of_everything(preset, precision, outer, groups, tmp_path):
    """Kills: an average, a moment or a gradient that every process keeps whole; other weights than those given."""
    (tmp_path / "pieces.py").write_text(PIECES)
    done = program(tmp_path / "pieces.py", preset, precision, outer, tmp_path / "out.json", launcher=torchrun(2))
    assert done.returncode == 0, done.stderr
    out = json.load(open(tmp_path / "out.json"))
    assert set(out["groups"]) == groups
    for counts, numbers in zip(out["counts"], out["all"]):
        for held in counts:
            assert 0.5 <= held / numbers < 0.53                           # rows that do not divide make it more


def test_parts_and_recomputing_change_nothing(unbroken, tmp_path):
    """Gradient accumulation and activation checkpointing, in one process. Kills: a loss not divided by the parts, noise
    or conditions of the wrong part."""
    assert run_here(T, [*SMALL, "--steps", 5, "--accumulate", 4, "--recompute", "--channels-last", "on", "--out",
                        tmp_path / "r"]) == (None, "")
    same_run(whole(unbroken), whole(tmp_path / "r"))
    a, b = ([(float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(open(folder / "log.csv"))]
            for folder in (unbroken, tmp_path / "r"))
    for row, other in zip(a, b, strict=True):                             # clipping and Adam forgive any factor
        assert row == pytest.approx(other, rel=1e-4)


def test_recomputing_keeps_less(monkeypatch):
    """Kills: wrapping nothing. Bytes that a forward pass keeps for backward, and the same gradients."""
    config = override(C.PRESETS["glyphs64"], base_channels=8, emb_channels=16, num_heads=2)
    kept, grads = [], []
    for again in (False, True):
        torch.manual_seed(0)
        model = C.build_model(config)
        if again:
            shard.checkpoint_activations(model)
        saved = {}

        def keep(x):
            saved[x.untyped_storage()._cdata] = (x, x.untyped_storage().nbytes())
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            v = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(2), {})
        v.square().mean().backward()
        kept.append(sum(size for _, size in saved.values()))
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] < 0.6 * kept[0]
    for a, b in zip(*grads):
        assert (a is None and b is None) or torch.equal(a, b)


# ---- checkpoints

@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces") / "run"
    assert run_here(T, [*SMALL, "--steps", 4, "--shard", "--out", folder]) == (None, "")
    return folder


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "run.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_piece_is_one_line(pieces, tmp_path, name, damage):
    shutil.copytree(pieces, tmp_path / "run")
    path = tmp_path / "run" / "sharded" / "0000004" / name
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:len(content) // 2])
    status, line = run_here(T, ["--resume", tmp_path / "run", "--steps", 6, "--device", "cpu"])
    if (name, damage) == ("run.json", "flip") and status is None:
        return                                                            # a digit of a setting that does not matter
    assert status == 2 and "damaged" in line and line.count("\n") == 1
    shutil.rmtree(path.parent)                                            # what the line says: the one before it
    assert run_here(T, ["--resume", tmp_path / "run", "--steps", 5, "--device", "cpu"]) == (None, "")


@pytest.mark.parametrize("name, damage", [("__0_0.distcp", "flip"), ("__0_0.distcp", "gone"), ("run.json", "cut")])
def test_auto_resume_goes_on_from_the_pieces_before(pieces, tmp_path, name, damage):
    """Kills: a job that a damaged piece stops for good; the same step saved over it."""
    shutil.copytree(pieces, tmp_path / "run")
    folder = tmp_path / "run" / "sharded" / "0000004"
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).unlink()
    if damage != "gone":
        (folder / name).write_bytes(content if damage == "flip" else content[:99])
    words = [*SMALL, "--shard", "--auto-resume", "--out", tmp_path / "run", "--steps", 4]
    status, line = run_here(T, words)
    assert status is None and "0000002, step 2" in line and line.count("\n") == 1
    folders = tmp_path / "run" / "sharded"
    assert sorted(os.listdir(folders)) == ["0000002", "0000004", "0000004.damaged-1"]
    shutil.copytree(pieces, tmp_path / "good")
    for run in ("good", "run"):
        assert run_here(shard, [tmp_path / run]) == (None, "")
    a, b = whole(tmp_path / "good"), whole(tmp_path / "run")
    assert all(torch.equal(a[part][key], b[part][key]) for part in ("model", "ema") for key in a[part])


@pytest.mark.parametrize("part", ["model", "ema", "exp_avg_sq"])
def test_auto_resume_goes_on_from_the_pieces_before_values_that_cannot_be(pieces, tmp_path, part):
    """Kills: a job that stops for good at infinite values whose checksums are right, as checkpoint.pt does not."""
    run, state = tmp_path / "run", shard.newest(pieces)
    shutil.copytree(pieces, run)
    model, ema = C.build_model(state["config"]), C.build_model(state["config"])
    optimizer = C.make_optimizer(model, state["config"])
    shard.load(state, model, ema, optimizer)
    spoilt = {"model": list(model.parameters())[-1].data, "ema": list(ema.parameters())[-1].data,
              "exp_avg_sq": list(optimizer.state.values())[-1]["exp_avg_sq"]}[part]
    spoilt.view(-1)[-1] = float("inf")
    shard.save(run, model, ema, optimizer, 4, state["images"], state["config"], state["examples"])
    words = [*SMALL, "--shard", "--auto-resume", "--out", run, "--steps", 4]
    status, line = run_here(T, words)
    assert status is None and "0000002, step 2" in line and line.count("\n") == 1, line
    assert sorted(os.listdir(run / "sharded")) == ["0000002", "0000004", "0000004.damaged-1"]


def test_a_hostile_list_of_pieces_runs_no_code(pieces, tmp_path):
    """The list is a pickle that torch.distributed.checkpoint would load without a question."""
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    shutil.copytree(pieces, tmp_path / "run")
    folder = tmp_path / "run" / "sharded" / "0000004"
    (folder / ".metadata").write_bytes(pickle.dumps(Exploit()))
    run = json.load(open(folder / "run.json"))
    run["files"][".metadata"] = shard.checksum(folder / ".metadata")      # a stranger can count, too
    json.dump(run, open(folder / "run.json", "w"))
    for module, args in ((T, ["--resume", tmp_path / "run", "--steps", 6]), (shard, [tmp_path / "run"])):
        status, line = run_here(module, args)
        assert status == 2 and "posix.mkdir" in line and not (tmp_path / "owned").exists()


def test_a_hostile_piece_runs_no_code(pieces, tmp_path):
    """What is no tensor in a checkpoint, torch.distributed.checkpoint unpickles."""
    class Exploit:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)
    shutil.copytree(pieces, tmp_path / "run")
    folder = tmp_path / "run" / "sharded" / "0000004"
    state = json.load(open(folder / "run.json"))
    model = C.build_model(runs.config_of(state["config"]))
    into = shard.tensors(model, model, C.make_optimizer(model, runs.config_of(state["config"])), 4)
    into["model"][next(iter(into["model"]))] = Exploit()                  # bytes under the name of a weight
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shard.dcp.save(into, checkpoint_id=folder)
    assert not (tmp_path / "owned").exists()
    state["files"] = {name: shard.checksum(folder / name) for name in os.listdir(folder)}
    json.dump(state, open(folder / "run.json", "w"))
    real = shard.Metadata.MADE_OF                                         # both gates, the list's and the one behind
    for allowed in (real, real | {("torch.distributed.checkpoint.metadata", "BytesStorageMetadata")}):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shard.Metadata, "MADE_OF", allowed)
            status, line = run_here(T, ["--resume", tmp_path / "run", "--steps", 6, "--device", "cpu"])
        assert status == 2 and line.count("\n") == 1 and not (tmp_path / "owned").exists()
        assert ("is no tensor" in line) == (allowed != real), line


@pytest.mark.parametrize("part", ["model", "ema", "exp_avg", "step"])
@pytest.mark.parametrize("change", [torch.Tensor.double, lambda x: torch.zeros(*x.shape, 2)], ids=["double", "shape"])
def test_a_piece_of_another_shape_or_type_is_one_line(pieces, tmp_path, part, change):
    """Kills: types that are converted without a word."""
    shutil.copytree(pieces, tmp_path / "run")
    folder = tmp_path / "run" / "sharded" / "0000004"
    state = json.load(open(folder / "run.json"))
    config = runs.config_of(state["config"])
    model, ema = C.build_model(config), C.build_model(config)
    into = shard.tensors(model, ema, C.make_optimizer(model, config), 4)
    entries = into[part] if part in into else next(iter(into["optimizer"].values()))
    key = next(iter(entries)) if part in into else part
    entries[key] = change(entries[key])
    shutil.rmtree(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shard.dcp.save(into, checkpoint_id=folder)
    state["files"] = {name: shard.checksum(folder / name) for name in os.listdir(folder)}
    json.dump(state, open(folder / "run.json", "w"))
    status, line = run_here(T, ["--resume", tmp_path / "run", "--steps", 6, "--device", "cpu"])
    assert status == 2 and line.count("\n") == 1 and f"{key} is torch." in line, line


@pytest.mark.parametrize("first, then", [("on", "off"), ("off", "on")])
def test_the_order_in_memory_may_change_on_the_way(unbroken, tmp_path, first, then):
    """Kills: moments in one order beside weights in another, which the fused kernel does not notice."""
    assert run_here(T, [*SMALL, "--steps", 3, "--channels-last", first, "--out", tmp_path / "r"]) == (None, "")
    words = ["--resume", tmp_path / "r", "--steps", 5, "--device", "cpu"]
    assert run_here(T, [*words, "--channels-last", then]) == (None, "")
    same_run(whole(unbroken), whole(tmp_path / "r"))


def test_the_newer_checkpoint_counts(pieces, tmp_path):
    """Kills: going back to pieces that a plain checkpoint has left behind."""
    run = tmp_path / "run"
    shutil.copytree(pieces, run)
    assert run_here(T, ["--resume", run, "--steps", 6, "--no-shard", "--device", "cpu"]) == (None, "")
    assert whole(run)["step"] == 6
    status, line = run_here(shard, [run])
    assert status == 2 and "is newer" in line and whole(run)["step"] == 6
    assert run_here(T, ["--resume", run, "--steps", 7, "--device", "cpu"]) == (None, "")
    assert whole(run)["step"] == 7
    assert run_here(P, [run, "--n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / "s.png"]) == (None, "")


def test_a_list_may_name_what_lists_are_made_of(pieces):
    """Kills: a list of permissions that permits nothing."""
    reader = shard.Reader(pieces / "sharded" / "0000004")
    assert any(key.startswith("ema.") for key in reader.read_metadata().state_dict_metadata)


def test_a_list_of_python_3_11_2_is_read():
    """It writes a member of an Enum as getattr(kind, name). Kills: a list that only the Python that wrote it can read;
    getattr of anything else."""
    kinds = shard.dcp.metadata

    class Get:
        def __init__(self, *what):
            self.what = what

        def __reduce__(self):
            return getattr, self.what
    read = lambda what: shard.Metadata(io.BytesIO(pickle.dumps(what))).load()
    format_ = kinds._MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST
    assert read([Get(kinds._MEM_FORMAT_ENCODING, format_.name)]) == [format_]
    for kind, name in ((kinds.Metadata, "__init__"), (torch.Size, "mro"), (format_, "value")):
        with pytest.raises(pickle.UnpicklingError, match="names an attribute of"):
            read(Get(kind, name))
    with pytest.raises(KeyError):
        read(Get(kinds._MEM_FORMAT_ENCODING, "__class__"))


def test_mistakes(unbroken, pieces, tmp_path):
    for module, args, wanted in [
            (shard, [unbroken], "has no sharded checkpoint"), (shard, [tmp_path / "none"], "has no sharded"),
            (T, ["--shard", "--keep-every", 2, "--out", tmp_path / "x"], "last two"),
            (T, ["--shard", "--channels-last", "on", "--out", tmp_path / "x"], "--channels-last on"),
            (T, ["--shard", "--if-unsaved", "go-on", "--out", tmp_path / "x"], "--if-unsaved go-on"),
            (T, ["--accumulate", 3, "--out", tmp_path / "x"], "--batch 8: does not divide"),
            (T, ["--auto-resume"], "--out"), (T, ["--resume", unbroken, "--auto-resume"], "--resume"),
            (T, ["--world-size", 2, "--out", tmp_path / "x"], "--dry-run"), (P, [pieces], "plumbing.shard")]:
        status, line = run_here(module, args)
        assert status == 2 and wanted in line and line.count("\n") == 1, (args, line)
    state = json.load(open(pieces / "sharded" / "0000004" / "run.json"))
    assert state["step"] == 4 and runs.sharded_steps(pieces) == [2, 4]
