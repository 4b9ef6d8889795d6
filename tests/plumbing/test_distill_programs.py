"""distill.py as a program: the rounds as run folders, interrupting and continuing, one line for each mistake."""
import dataclasses
import json

import pytest
import torch

import config as C
import distill as D
import sample as P
import train as T
from plumbing import UserError, runs
from plumbing.settings import override
from programs import TINY, log_column, run_here

SHORT = ["--from", 8, "--to", 2, "--steps", 4, "--guided-steps", 3, "--device", "cpu"]


# ---- the rounds

def test_the_ladder_leaves_run_folders_that_know_themselves_and_resume(teacher, tmp_path, monkeypatch):
    """An interrupted distillation continues to the bit. Each student knows its steps, its sampler and its guidance.

    Kills: an update made twice or left out; a round of other settings that is continued; a student that can be
    resumed by train.py or sampled in another number of steps."""
    out = tmp_path / "out"
    args = [teacher, *SHORT, "--guided", "--w-max", 4, "--out", out]
    interrupts, loss, calls = [], D.distillation_loss, []
    make = D.Interrupt
    monkeypatch.setattr(D, "Interrupt", lambda: interrupts.append(make()) or interrupts[-1])

    def interrupted(*level):                                              # a signal in the second update of round 4
        calls.append(1)
        if len(calls) == 5:
            interrupts[-1].signal = 15
        return loss(*level)
    monkeypatch.setattr(D, "distillation_loss", interrupted)
    assert run_here(D, args)[0] == 143
    assert runs.read_checkpoint(str(out / "4"))["step"] == 2 and not (out / "2").exists()
    assert run_here(D, args) == (None, "") and len(calls) == 3 + 4 + 4    # no update was made twice
    monkeypatch.setattr(D, "distillation_loss", loss)
    whole = tmp_path / "whole"
    assert run_here(D, [*args[:-1], whole]) == (None, "")
    for name in ("guided", "4", "2"):
        a, b = (runs.read_checkpoint(str(folder / name)) for folder in (out, whole))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])         # to the bit
    config = runs.read_checkpoint(str(out / "2"))["config"]
    assert (config.sampler, config.sample_steps, config.guidance_max) == ("ddim", 2, 4.0)
    assert config.distilled_from == f"{out / '4'}, step 4" and config.guidance == 3.0 and config.evaluations == 1
    assert json.loads((out / "guided" / "config.json").read_text())["distilled_from"].startswith(
        f"{teacher}, step 3, weights ")
    calls, forward = [], P.sample
    monkeypatch.setattr(P, "sample", lambda *args, **kw: calls.append((args, kw)) or forward(*args, **kw))
    assert run_here(P, [out / "2", "--labels", "A", "--n", 1, "--out", tmp_path / "a.png"]) == (None, "")
    (positional, kw), = calls                                             # no flag was needed
    assert (kw["steps"], kw["sampler"], kw["guidance"]) == (2, "ddim", 1.0)
    assert positional[2]["guidance"].tolist() == [3.0]
    monkeypatch.setattr(D, "distillation_loss", None)                     # all rounds are complete: no update is made
    assert run_here(D, args) == (None, "")
    for other in (["--weight", "snr"], ["--w-max", 3], ["--steps", 5]):   # other settings: refused before any work
        status, error = run_here(D, [*args, *other])
        assert status == 2 and error.count("\n") == 1 and "holds a round of another distillation" in error
    status, error = run_here(T, ["--resume", out / "2"])
    assert status == 2 and "a distilled run" in error
    for wrong in (["--steps", 3], ["--sampler", "ddpm"], ["--lowest-idx", 0]):
        status, error = run_here(P, [out / "2", *wrong])
        assert status == 2 and error.count("\n") == 1 and "was distilled to 2 steps" in error
    assert run_here(P, [out / "2", "--sampler", "stochastic", "--labels", "A", "--out", tmp_path / "a.png"])[1] == ""
    status, error = run_here(D, [out / "2", "--guided", "--to", 1])
    assert status == 2 and "was distilled already" in error
    status, error = run_here(D, [out / "2", "--from", 8, "--to", 1])
    assert status == 2 and "was itself distilled to 2 steps" in error


def test_without_guided_the_students_have_no_guidance(teacher, tmp_path):
    """Guidance would mix two students by eq. 7, and that is no student of the mixture. Kills: the teacher's guidance
    passed on; a distilled run that cannot be distilled further."""
    assert run_here(D, [teacher, *SHORT, "--out", tmp_path / "o"]) == (None, "")
    config = runs.read_checkpoint(str(tmp_path / "o" / "2"))["config"]
    assert config.guidance == 1 and config.evaluations == 1 and not config.guidance_max
    assert run_here(D, [tmp_path / "o" / "2", "--to", 1, "--steps", 2]) == (None, "")           # its steps are known


@pytest.mark.parametrize("settings", [
    ["--size", 32, "--outer-channels", "8,8", "--outer-blocks", "1,1", "--patching", "dwt_1", "--outer-patching",
     "dwt_1"],
    ["--size", 32, "--low-size", 16],
    ["--text-encoder", "bytes", "--text-channels", 16, "--text-length", 48]])
def test_nested_models_stages_and_captions_are_distilled_too(settings, tmp_path):
    """Kills: a distillation for plain models with labels only."""
    assert run_here(T, [*TINY, *settings, "--steps", 1, "--out", tmp_path / "r"]) == (None, "")
    assert run_here(D, [tmp_path / "r", *SHORT, "--guided"]) == (None, "")
    assert runs.read_checkpoint(str(tmp_path / "r-guided-distilled" / "2"))["config"].sample_steps == 2


@pytest.mark.long
def test_a_batch_in_parts_is_the_batch(teacher, tmp_path, monkeypatch):
    """1, 2 and 4 micro-batches, and activation checkpointing, give the same loss and gradient norm.

    Kills: gradients that are not averaged over micro-batches, or those of the last one alone; --recompute ignored."""
    state = runs.read_checkpoint(str(teacher))
    (tmp_path / "again").mkdir()
    again = dict(state, config=dataclasses.asdict(override(state["config"], recompute=True)))
    torch.save(again, tmp_path / "again" / "checkpoint.pt")
    found, models, checkpoint_activations = [], [], D.shard.checkpoint_activations

    def spy(model):
        models.append(model)
        return checkpoint_activations(model)
    monkeypatch.setattr(D.shard, "checkpoint_activations", spy)
    for run, parts in ((teacher, 1), (teacher, 2), (teacher, 4), (tmp_path / "again", 1)):
        out = tmp_path / f"{run.name}-{parts}"
        assert run_here(D, [run, *SHORT, "--guided", "--guided-steps", 1, "--accumulate", parts, "--out", out]) == (
            None, "")
        (loss,), (grad_norm,) = (log_column(out / "guided", name) for name in ("loss", "grad_norm"))
        found.append([float(loss), float(grad_norm)])
        assert len(models) == (run.name == "again")                       # the first student alone: others are copies
    assert len(found) == 4 and found[1:] == [pytest.approx(found[0], rel=1e-3)] * 3


# ---- the user's mistakes: one line, status 2

@pytest.mark.parametrize("args, message", [
    (["--accumulate", "3"], "--accumulate 3: want a number of parts that divides the batch, 4"),
    (["--to", "3"], "--to 3: want a power of two"),
    (["--from", "24"], "--from 24: want a power of two"),
    (["--from", "8", "--to", "8"], "--to 8: want fewer than the teacher's 8"),
    (["--from", "4", "--to", "8"], "--to 8: want fewer"),
    (["--to", "0"], "--to 0: want 1 to 100,000"), (["--from", "0"], "--from 0: want 1 to 100,000"),
    (["--from", str(2 ** 60)], "want 1 to 100,000"), (["--w-max", "1"], "--w-max 1: want more than 1"),
    (["--w-max", "nan"], "--w-max nan: want 0 to 1,000"), (["--guided", "--w-max", "1e300"], "--w-max 1e+300: want 0"),
    (["--steps", "0"], "--steps 0: want 1 to 1,000,000,000"), (["--guided-steps", "9" * 30], "--guided-steps 999"),
    (["--lr", "nan"], "--lr nan: want 1e-12 to 10"), (["--lr", "1e300"], "--lr 1e+300: want 1e-12 to 10"),
    (["--out", "/proc/nope"], "--out /proc/nope: "),
    (["--out", __file__], f"--out {__file__}: "),
])
def test_what_it_refuses(teacher, args, message):
    """Kills: a traceback; a message that does not name the flag, its value and what it wants."""
    status, error = run_here(D, [teacher, *args])
    assert status == 2 and error.count("\n") == 1 and message in error, error


def test_runs_that_cannot_be_distilled_are_one_line(teacher, tmp_path):
    """Kills: a traceback for a missing run, or for weights that do not fit their settings."""
    status, error = run_here(D, [tmp_path / "none"])
    assert status == 2 and error.count("\n") == 1 and "no such run" in error
    state = runs.read_checkpoint(str(teacher))
    (tmp_path / "other").mkdir()
    other = dict(state, config=dataclasses.asdict(override(state["config"], base_channels=16)))
    torch.save({key: dict(value) if key in ("model", "ema") else value for key, value in other.items()},
               tmp_path / "other" / "checkpoint.pt")
    status, error = run_here(D, [tmp_path / "other"])
    assert status == 2 and error.count("\n") == 1 and "a checkpoint of another model" in error


def test_with_guidance_refuses_another_network():
    """Kills: a student that silently keeps random weights where its teacher's do not fit."""
    config = override(C.PRESETS["glyphs16"], guidance=1.5, guidance_max=2.0)
    wider = C.build_model(C.PRESETS["glyphs64"])
    with pytest.raises(UserError, match="not a teacher for this student"):
        D.with_guidance(wider, config)
