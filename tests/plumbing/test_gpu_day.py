"""benchmarks/gpu_day.py: what stands in its list can be run; what ends, fails or hangs leaves a row; no row is lost."""
import glob
import json
import os
import shutil
import sys
import types

import pytest
import torch
from programs import ROOT, help_of, program, run_here

sys.path.insert(0, os.path.join(ROOT, "benchmarks"))
import gpu_day
import speed
from config import PRESETS, build_model
from plumbing import start
from plumbing.settings import override


def test_commands_are_of_programs_that_exist_and_fit_into_a_piece(monkeypatch):
    """Kills: a flag that a program lacks, a network that does not fit together, an entry that can never begin: found
    only when the card is lent."""
    helps = {}
    for name, entry in gpu_day.ENTRIES.items():
        assert 0 < entry.expected <= entry.limit <= 9 * 60 - 10, name
        for path, *words in gpu_day.commands_of(name, "runs", False) + gpu_day.commands_of(name, "runs", True):
            if path == "-m":
                continue
            assert os.path.exists(os.path.join(ROOT, path))
            key = (path, *[word for word in words[:1] if not word.startswith("-")])
            helps[key] = helps.get(key) or help_of(path, words)
            assert all(word in helps[key] for word in words if word.startswith("--")), (name, words)
            if path == "train.py":
                monkeypatch.setattr(sys, "argv", [path, *words])
                _, config, _ = start.read_command_line()
                with torch.device("meta"):
                    build_model(config)


# ---- the runner: entries that take seconds, and a card by name only

CHILD = """-c "import os, signal, subprocess, sys, time
ignore = 'import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)'
child = subprocess.Popen([sys.executable, '-c', ignore], stdout=subprocess.PIPE); child.stdout.readline()
open('{run}-pid', 'w').write(str(child.pid)); time.sleep(60)" """
WELL = """-c "import os; open(os.environ['BENCHMARK_RESULTS'] + '/a.json', 'w').write('[NaN, 1]'); print('well')" """


@pytest.fixture
def day(tmp_path, monkeypatch):
    """Return a function that runs gpu_day.py with these flags -> (rows, what it wrote to stderr)."""
    monkeypatch.setattr(gpu_day, "RESULTS", str(tmp_path / "published"))
    monkeypatch.setattr(gpu_day, "GRACE", 0.2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a card")
    monkeypatch.setattr(gpu_day, "ENTRIES", {
        "hangs": gpu_day.Entry(1, 4, [CHILD, WELL]), "fails": gpu_day.Entry(1, 30, ["-c 'raise SystemExit(3)'", WELL]),
        "long": gpu_day.Entry(1, 500, [WELL]), "well": gpu_day.Entry(1, 30, [WELL, WELL])})

    def run(*flags):
        status, said = run_here(gpu_day, ["--folder", tmp_path / "runs", "--out", tmp_path / "out", *flags])
        path = tmp_path / "out" / "gpu_day.json"
        return json.loads(path.read_text()) if path.exists() else {}, said
    return run


def alive(pid):
    """Return whether the process runs. One that nobody has waited for yet is dead."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_fails_or_hangs_leaves_a_row_and_the_next_begins(day, tmp_path):
    """Kills: a day that ends with its first failure; a process of a killed entry that goes on and holds the card; a
    command that runs after the one before it failed; a row without the card, or lost for a NaN."""
    rows, said = day("--minutes", 2)
    assert said == "" and list(rows) == ["hangs", "fails", "well"]        # "long" does not fit into two minutes
    assert [row["state"] for row in rows.values()] == ["out of time", "failed with status 3", "done"]
    assert [len(row["commands"]) for row in rows.values()] == [1, 1, 2]
    assert 4 <= rows["hangs"]["seconds"] < 20 and not alive((tmp_path / "runs" / "gpu-hangs-pid").read_text())
    assert rows["well"]["results"] == {"a.json": ["NaN", 1]} and "well" in rows["well"]["output"]
    for row in rows.values():
        assert row["card"] == "a card" and row["torch"] == torch.__version__ and {"commit", "command"} <= set(row)


def test_a_second_call_goes_on_where_the_first_ended(day, tmp_path):
    """Kills: entries that are done run again, or those of another piece forgotten, where the folder of the first call
    is gone and its results were brought back; --only that does nothing."""
    day("--only", "well", "--commit", "abc")
    os.makedirs(tmp_path / "published")
    shutil.move(tmp_path / "out" / "gpu_day.json", tmp_path / "published" / "gpu_day.json")
    rows, _ = day("--minutes", 2)
    assert rows["well"]["commit"] == "abc" and list(rows) == ["well", "hangs", "fails"]
    rows, _ = day("--only", "well", "--commit", "def")
    assert rows["well"]["commit"] == "def" and len(rows) == 3
    assert "--only nothing: want some of hangs" in day("--only", "nothing")[1]


def test_without_a_card_it_is_one_line(tmp_path, monkeypatch):
    """Kills: rows of a CPU taken for a card's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_day, "measured", lambda *_: pytest.fail("began"))
    status, said = run_here(gpu_day, ["--out", tmp_path, "--folder", tmp_path])
    assert status == 2 and said.count("\n") == 1 and "--dry" in said


# ---- the share of the card's FLOP/s

@pytest.mark.parametrize("card, peak", [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", None)])
def test_the_batch_doubles_until_it_does_not_fit_and_mfu_is_of_three_forward_passes(card, peak, monkeypatch):
    """Kills: a search that stops with an error, or never; MFU of a forward pass alone, or of another card's peak."""
    saved, asked = {}, []

    def seconds(config, device, args):
        asked.append((config.batch, config.recompute))
        return config.batch / 100 if config.batch <= (64 if config.recompute else 16) else None
    for name, value in dict(step_seconds=seconds, choose_device=lambda: (torch.device("cuda"), ""),
                            cost_of=lambda config: types.SimpleNamespace(flops=10 ** 12),
                            save=lambda name, device, **what: saved.update(what, name=name)).items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: card)
    monkeypatch.setattr(sys, "argv", ["speed.py", "uvit"])
    speed.main()
    assert asked == [(8, False), (16, False), (32, False), (8, True), (16, True), (32, True), (64, True), (128, True)]
    assert saved["name"] == "speed_uvit_cuda.json" and [row["images_a_second"] for row in saved["rows"]] == [
        pytest.approx(100), pytest.approx(100), None, *[pytest.approx(100)] * 4, None]
    assert saved["rows"][0]["mfu"] == (pytest.approx(100 * 3e12 / peak) if peak else None)


def test_a_step_that_does_not_fit_is_none_and_recompute_is_done(monkeypatch):
    """Kills: a list of batches that ends the script where memory ends; --recompute measured without it."""
    args, device, calls = types.SimpleNamespace(compile=False, turns=2), torch.device("cpu"), []
    monkeypatch.setattr(speed, "checkpoint_activations", calls.append)
    config = override(PRESETS["glyphs16"], base_channels=8, emb_channels=16, num_transformer_blocks=1, batch=1,
                      precondition="none", loss="v_mse", recompute=True)
    assert speed.step_seconds(config, device, args) > 0 and len(calls) == 1

    def too_large(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr(speed, "training_loss", too_large)
    assert speed.step_seconds(config, device, args) is None


# ---- the whole day in small

@pytest.mark.long
def test_the_scripts_of_the_list_run_on_a_cpu_at_tiny_sizes(tmp_path):
    """The first entry, and those that run a script of benchmarks/; in small, the others print help or train once more.
    Kills: an entry whose code fails, found only when the card is lent; results of tiny networks in the place of the
    published ones."""
    names = ["default", *(name for name in gpu_day.ENTRIES if any(
        path.startswith("benchmarks/") and "-h" not in words for path, *words in gpu_day.commands_of(name, "", True)))]
    state = lambda: {path: os.path.getmtime(path) for folder in ("benchmarks/results", "figures")
                     for path in glob.glob(os.path.join(ROOT, folder, "*"))}
    before = state()
    done = program("benchmarks/gpu_day.py", "--dry", "--only", ",".join(names), "--folder", tmp_path, timeout=3000)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu-day-dry" / "gpu_day.json").read_text())
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(names, "done"), done.stdout
    assert state() == before
    files = {file for row in rows.values() for file in row["results"]}
    assert {"evaluation.json", "gpu_resume_cpu.json", "gpu_precision_cpu.json", "gpu_graphs_cpu.json",
            "speed_uvit_cpu.json", "speed_uvit_compile_cpu.json", "speed_paper_cpu.json",
            "distillation_latency_minute_cpu.json"} <= files
    resumed = rows["resume"]["results"]["gpu_resume_cpu.json"]
    assert resumed["equal_to_the_bit"] and 0 < resumed["resumed_from"] < resumed["steps"]
    assert {"gpu-default", "gpu-resume-whole"} <= {log for row in rows.values() for log in row["logs"]}
    assert "default.png" in os.listdir(tmp_path / "gpu-day-dry")
