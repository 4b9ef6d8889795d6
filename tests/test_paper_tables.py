"""benchmarks/paper_tables.py: rows are runs that train.py accepts, and differ in what the table is about alone."""
import dataclasses
import os
import sys
import types

import pytest
import torch
from programs import ROOT, run_here

sys.path.insert(0, os.path.join(ROOT, "benchmarks"))
import paper_tables
import train
from config import PRESETS, build_model
from data import open_run
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
        configs[row], _ = train.configure(*train.parse())
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
                                  "mdm --budget gpu-30min", "best --minutes 3", "table2 --budget tpu"])
def test_a_mistake_is_one_line(args, tmp_path):
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
    yardstick = types.SimpleNamespace(source=open_run(config), unseen=open_run(config, held_out=True))
    seen = torch.stack([yardstick.source.image(i) for i in range(24)])

    def by_heart(z, logsnr, cond):
        alpha = alpha_sigma(logsnr)[0].view(-1, 1, 1, 1, 1)
        distance = (z[:, None] - alpha * seen).square().flatten(2).sum(2)                        # (B, 24)
        return v_from_x(z, seen[distance.argmin(1)], logsnr)
    found = paper_tables.losses(by_heart, config, yardstick, torch.device("cpu"))
    assert found["unseen"]["v_mse"] > 3 * found["seen"]["v_mse"] > 0
