"""benchmarks/paper_tables.py: rows are runs that train.py accepts, and differ in what the table is about alone."""
import dataclasses
import json
import os
import subprocess
import sys
import time
import types

import pytest
import torch
from programs import ROOT, run_here

sys.path.insert(0, os.path.join(ROOT, "benchmarks"))
import common
import distillation
import equal_time
import grow_video
import paper_tables
import patterns
from plumbing import UserError, runs, start
from plumbing.measuring import TrainedRun
from plumbing.sources import open_run
import speed
import text_guidance
from config import PRESETS, build_model
from data import Glyphs
from schedule import alpha_sigma, v_from_x


@pytest.mark.parametrize("budget", paper_tables.BUDGETS)
@pytest.mark.parametrize("table", paper_tables.TABLES)
def test_rows_are_runs_of_train_that_differ_in_what_the_table_is_about(table, budget, monkeypatch):
    """Kills: a size that does not divide, a flag that train.py lacks, two equal rows, a second difference."""
    _, about, rows = paper_tables.TABLES[table](budget)
    configs = {}
    for row, (settings, _) in rows.items():
        assert settings["preset"] in PRESETS
        monkeypatch.setattr(sys, "argv", ["train.py", *paper_tables.flags(settings), "--out", "x"])
        _, configs[row], _ = start.read_command_line()
        given = {key: value for key, value in settings.items() if key not in ("preset", "size")}
        assert {key: getattr(configs[row], key) for key in given} == given
        with torch.device("meta"):
            build_model(configs[row])
    first, *others = map(dataclasses.asdict, configs.values())
    differ = {key for other in others for key in other if other[key] != first[key]}
    assert differ and differ <= set(about)
    assert len(set(configs.values())) == len(rows)


@pytest.mark.parametrize("budget", paper_tables.BUDGETS)
def test_folders_tell_all_runs_apart_and_tables_share_what_is_alike(budget):
    """Kills: a field left out of the name (one row would be judged by another's run)."""
    names = {}
    for table in paper_tables.TABLES.values():
        for settings, _ in table(budget)[2].values():
            full = {**vars(PRESETS[settings["preset"]]), **settings}
            name = paper_tables.name_of(budget, settings)
            assert names.setdefault(name, full) == full
    plain, patched = paper_tables.table6(budget)[2]["128 px, plain loss"][0], paper_tables.sized(budget, 128)
    assert paper_tables.name_of(budget, plain) == paper_tables.name_of(budget, patched)


@pytest.mark.parametrize("args", ["table7", "table2 --seeds 0", "table2 --minutes 0", "table2 --only zzz",
                                  "mdm --minutes 12", "mdm --budget gpu-30min", "best --minutes 3",
                                  "table2 --budget tpu", "mdm --n 1", "table2 --minutes nan"])
def test_a_mistake_is_one_line_before_anything_is_begun(args, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "started", lambda *args: pytest.fail(f"began {args}"))
    status, said = run_here(paper_tables, args.split() + ["--folder", str(tmp_path)])
    assert status == 2 and said.count("\n") == 1


def test_seeds_make_the_bar():
    """One seed: the samples' interval. More: half the range of the seeds."""
    results = [dict(row="a", equal="time", guided=dict(fd=value, fd_pm=0.5)) for value in (1.0, 4.0)]
    assert paper_tables.over_seeds(results[:1], "a", "time", "guided", "fd") == (1.0, 0.5)
    assert paper_tables.over_seeds(results, "a", "time", "guided", "fd") == (2.5, 1.5)


def test_who_has_the_scenes_by_heart_is_found_out():
    """Table 3's losses: of a model that answers with the nearest image it has seen. Kills: both from one source."""
    config = dataclasses.replace(PRESETS["glyphs16"], scenes=24)
    yardstick = types.SimpleNamespace(held_out_source=open_run(config, held_out=True))
    seen = torch.stack([open_run(config).image(i) for i in range(24)])

    def by_heart(z, logsnr, cond):
        alpha = alpha_sigma(logsnr)[0].view(-1, 1, 1, 1, 1)
        distance = (z[:, None] - alpha * seen).square().flatten(2).sum(2)                        # (B, 24)
        return v_from_x(z, seen[distance.argmin(1)], logsnr)
    found = paper_tables.losses(TrainedRun("", by_heart, config, torch.device("cpu"), 0, 0), yardstick)
    assert found["unseen"]["v_mse"] > 3 * found["seen"]["v_mse"] > 0


def test_a_part_of_a_table_does_not_take_the_tables_place(monkeypatch):
    """Kills: published rows lost by a call with --only, another budget, other minutes or samples."""
    def name(*more):
        monkeypatch.setattr(sys, "argv", ["paper_tables.py", "table6", *more])
        return paper_tables.file_name(paper_tables.parse())
    assert name() == name("--seeds", "3") == "paper_table6"
    assert name("--only", "64 px; 128 px") == "paper_table6-64_px_128_px"
    assert name("--budget", "gpu-30min", "--minutes", "0.5", "--n", "36") == "paper_table6-gpu-30min-0_5min-n36"


def test_a_script_is_called_with_the_minutes_asked_for(tmp_path, monkeypatch):
    """Kills: best --minutes 30 judged after 60, or published in the place of the 60; a flag that the script lacks."""
    calls, seen = [], {}
    monkeypatch.setattr(paper_tables, "started", lambda *args: calls.append(args))
    for minutes, at, name in (([], "10,30,60", "paper_best"), (["--minutes", "30"], "10,30", "paper_best-30min")):
        calls.clear()
        monkeypatch.setattr(sys, "argv", ["paper_tables.py", "best", *minutes, "--folder", str(tmp_path)])
        paper_tables.main()
        said = [dict(zip(call[3::2], call[4::2])) for call in calls]
        assert [call[1] for call in calls] == ["train", "judge"] and said[1]["--at"] == at
        assert {os.path.abspath(os.path.join(ROOT, call[2])) for call in calls} == {str(tmp_path / "equal")}
        assert not os.path.isabs(calls[1][2]) and said[1]["--name"] == name
        assert {each["--minutes"] for each in said} == {at.split(",")[-1]}
        for call in calls:
            seen.clear()
            monkeypatch.setattr(equal_time, call[1], lambda args: seen.update(vars(args)))
            monkeypatch.setattr(sys, "argv", list(call))
            equal_time.main()
            assert seen["only"] == ["glyphs64", "glyphs64_unet", "nested", "cascade"]
    monkeypatch.setattr(sys, "argv", ["equal_time.py", "judge", str(tmp_path), "--only", "nested,glyphs64"])
    equal_time.main()
    assert seen["name"] == "equal_time-nested-glyphs64"                   # and equal_time.json keeps its five


@pytest.mark.parametrize("script, args, wanted", [
    (equal_time, "cost {} --turns 0", "--turns 0: want 1"), (equal_time, "judge {} --n -3", "--n -3: want 2"),
    (distillation, "judge {} --turns 0", "--turns 0: want 1"), (distillation, "latency --turns 0", "--turns 0: want 1"),
    (distillation, "dance", "'dance'"), (text_guidance, "judge {} --n 0", "--n 0: want 2"),
    (text_guidance, "judge {} --n many", "'many'"), (speed, "--turns 0", "--turns 0: want 1"),
    (speed, "growth --batch 0", "--batch 0: want 1"), (grow_video, "train {} --seeds 0", "--seeds 0: want 1"),
    (patterns, "pretrained/glyphs64 --n 0", "--n 0: want 1"), (patterns, "{}", "not a run"),
    (patterns, "pretrained/glyphs64_text", "want a plain model of glyphs with classes")])
def test_a_mistake_is_one_line_in_every_script(script, args, wanted, tmp_path):
    status, said = run_here(script, args.format(tmp_path).split())
    assert status == 2 and said.count("\n") == 1 and wanted in said


def test_the_share_of_a_pattern():
    """Kills: a pattern that is found and counts as missing; scenes that differ by more than their pattern; a bound that
    knows too little, or that finds a pattern without seeing it."""
    source = Glyphs((64, 64))
    for kind in patterns.KINDS:
        scenes = patterns.draw_scenes(source, kind, 4)
        x, flat = (torch.stack(column) for column in list(zip(*scenes))[:2])
        assert 0.05 < (x - flat).square().mean().sqrt() < 0.2 and (x == flat).float().mean() > 0.05     # letters
        for truth, share in ((x, 1), (flat, 0), ((x + flat) / 2, 0.5)):
            told = patterns.found(lambda z, logsnr, cond: v_from_x(z, truth, logsnr), scenes, -1)
            assert told.item() == pytest.approx(share, abs=1e-3)
        few = patterns.draw_patterns(kind, source.size, 400)
        shares = [patterns.possible(few, scenes, level).item() for level in (-9, -2, 4)]
        assert abs(shares[0]) < 0.05 < 0.3 < shares[1] < shares[2] < 1


def test_one_seed_of_videos_alone_keeps_the_others(tmp_path, monkeypatch):
    """Kills: a seed measured twice, a seed lost, rows that were measured in another way."""
    monkeypatch.setattr(grow_video, "RESULTS", str(tmp_path))
    ask = lambda only, n=72: grow_video.others(types.SimpleNamespace(only=only, n=n))
    assert ask(2) == ([], {})                                             # nothing was measured yet
    rows = [dict(kind=kind, seed=seed) for seed in (0, 1) for kind in ("scratch", "grown")]
    (tmp_path / "grow_video.json").write_text(json.dumps(
        dict(n=72, steps=grow_video.STEPS, rows=rows, real_scenes={"0": "first", "1": "second"})))
    assert ask(2) == (rows, {0: "first", 1: "second"})
    assert ask(1) == (rows[:2], {0: "first"})
    assert ask(None) == ([], {})
    with pytest.raises(UserError, match="judge all seeds anew"):
        ask(2, n=360)


def finished_run(folder, steps, **settings):
    """A run folder of which the checkpoint alone is looked at."""
    folder.mkdir(parents=True)
    config = dataclasses.replace(PRESETS["glyphs64_sr"], steps=steps, **settings)
    empty = types.SimpleNamespace(state_dict=dict)
    runs.save_checkpoint(str(folder), empty, empty, empty, steps, config.batch * steps, config, 7)


def test_the_seed_is_the_runs_own(tmp_path, monkeypatch):
    """Kills: --seed 1 where a run of seed 0 has ended, which was judged as if it were the other."""
    monkeypatch.setattr(equal_time, "started", lambda *args: pytest.fail(f"began {args}"))
    finished_run(tmp_path / "glyphs64", 8, seed=0, keep_every=2)
    for what in ("train", "judge"):
        status, said = run_here(equal_time, [what, tmp_path, "--only", "glyphs64_unet,glyphs64", "--seed", 1])
        assert status == 2 and "was trained with 0" in said and said.count("\n") == 1


def test_cdm_is_of_its_own_minutes(tmp_path, monkeypatch):
    """Kills: a cascade of 60 minutes published as that of 20."""
    began = []
    monkeypatch.setattr(paper_tables, "started", lambda *args: began.append(args))
    monkeypatch.setattr(paper_tables.shutil, "copy", lambda *args: None)
    finished_run(tmp_path / "equal" / "cascade", 15, keep_every=2)        # 5 minutes for the first stage, 8 times 5
    status, said = run_here(paper_tables, ["cdm", "--folder", tmp_path])
    assert status == 2 and "for 45 minutes, not 20" in said and not began
    assert run_here(paper_tables, ["cdm", "--folder", tmp_path, "--minutes", 45]) == (None, "")
    assert began[0][-2:] == ("--only", "cascade") and began[1][0] == "evaluate.py"


def test_the_pace_of_a_run_is_its_time_by_its_steps(tmp_path):
    """Kills: the mean of images a second, which forgives a run its slow hours; the warm-up counted in."""
    (tmp_path / "log.csv").write_text("step,images_per_s\n10,1\n20,4\n30,16\n34,8\n")
    assert paper_tables.seconds_a_step(tmp_path, 16, skip=1) == pytest.approx((10 * 4 + 10 * 1 + 4 * 2) / 24)


def test_paces_are_of_one_device(tmp_path):
    """Kills: steps for a GPU by the pace of a CPU."""
    (tmp_path / "machine.json").write_text('{"device": "cuda"}')
    status, said = run_here(paper_tables, ["table2", "--device", "cpu", "--folder", str(tmp_path)])
    assert status == 2 and said.count("\n") == 1 and "cuda" in said


def test_a_program_is_told_to_end_and_waited_for(tmp_path):
    """Kills: a run that is killed before it could save, or that goes on alone when its parent is told twice."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import common; common.ROOT = sys.argv[2]; "
            "common.started('child.py')")
    (tmp_path / "child.py").write_text(
        "import os, signal, sys, time\n"
        "def end(*_):\n    time.sleep(3); open('saved', 'w').close(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, end); open('begun', 'w').close(); time.sleep(60)\n")
    parent = subprocess.Popen([sys.executable, "-c", code, os.path.join(ROOT, "benchmarks"), str(tmp_path)],
                              stderr=subprocess.DEVNULL)                  # a pipe would wait for the child, too
    while not (tmp_path / "begun").exists():
        time.sleep(0.1)
        assert parent.poll() is None
    parent.terminate()
    time.sleep(0.5)
    parent.terminate()                                                    # a Ctrl-C, and then its own parent's word
    parent.wait(timeout=30)
    assert (tmp_path / "saved").exists() and parent.returncode != 0


def test_results_are_of_the_commit_that_made_them_and_are_replaced_whole(tmp_path, monkeypatch):
    """Kills: the file opened before git is asked, which calls every commit dirty; published figures lost to a fault."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    file = tmp_path / "benchmarks" / "results" / "some.json"
    file.write_text("old")
    monkeypatch.setattr(common, "RESULTS", str(tmp_path / "benchmarks" / "results"))
    monkeypatch.setattr(common, "made_by", lambda: {"commit": "" if file.read_text() == "old" else "dirty"})
    with pytest.raises(TypeError):
        common.save("some.json", torch.device("cpu"), value=torch.ones(2))
    assert file.read_text() == "old"
    common.save("some.json", torch.device("cpu"), "1 a run", value=2)
    found = json.loads(file.read_text())
    assert (found["commit"], found["value"]) == ("", 2) and found["machine"].endswith("cores, 1 a run, cpu")


def test_a_command_in_the_results_can_be_typed_again(monkeypatch):
    """Kills: --only 64 px; 128 px without its quotes, of which a shell makes two commands."""
    monkeypatch.setattr(sys, "argv", [paper_tables.__file__, "table6", "--only", "64 px; 128 px"])
    assert runs.made_by()["command"] == "python benchmarks/paper_tables.py table6 --only '64 px; 128 px'"
