"""benchmarks/peers.py: ours there is train.py itself, a turn goes on where the last ended, a mistake is one line."""
import argparse
import math
import os
import sys

import pytest
import torch
from programs import ROOT, TINY, run_here

sys.path.insert(0, os.path.join(ROOT, "benchmarks"))
import peers
import train as T
from plumbing.settings import override
from plumbing.runs import read_checkpoint


def test_ours_is_train_py(tmp_path, monkeypatch):
    """Two turns of a step each leave the weights and averages of `train.py --steps 2`.

    Kills: another loss, rate, order of the scenes, noise or average than train.py's; a turn that begins anew.
    """
    tiny = dict(size=(16, 16), base_channels=8, emb_channels=16, channel_mult=(1, 2), num_res_blocks=(1,),
                num_transformer_blocks=1, num_heads=2, batch=4, patching="none", scenes=40, warmup=2)
    monkeypatch.setattr(peers, "SCENES", override(peers.SCENES, **tiny))
    monkeypatch.setattr(peers, "find_peers", lambda: None)
    for _ in range(2):
        seconds = peers.checkpoint_of(tmp_path, "ours", 0)[1]["seconds"]
        peers.take_turn(argparse.Namespace(folder=tmp_path, contestant="ours", seed=0, until=seconds + 1e-9))
    ours = torch.load(tmp_path / "ours-seed0.pt")
    assert ours["step"] == 2 and ours["images"] == 8

    flags = [*TINY, "--patching", "none", "--scenes", 40, "--warmup", 2, "--steps", 2, "--precision", peers.PRECISION]
    assert run_here(T, [*flags, "--out", tmp_path / "run"]) == (None, "")
    theirs = read_checkpoint(tmp_path / "run")
    for mine, name in (("model", "model"), ("averaged", "ema")):
        for key, value in theirs[name].items():
            torch.testing.assert_close(ours[mine][key], value, rtol=0, atol=1e-5)


def test_without_the_peers_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch", None)
    status, said = run_here(peers, ["train", tmp_path, "--beside", "1"])
    assert status == 2 and said.count("\n") == 1 and "pip install -r benchmarks/requirements.txt" in said


@pytest.mark.parametrize("args", ["train {} --only nobody", "train {} --minutes 0", "train {} --beside 999",
                                  "judge {} --n 1", "judge {}", "dance {}"])
def test_a_mistake_is_one_line(args, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_peers", lambda: None)
    status, said = run_here(peers, args.format(tmp_path).split())
    assert status == 2 and said.count("\n") == 1


def test_unequal_minutes_are_not_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "find_peers", lambda: None)
    for name, seconds in (("ours", 300.0), ("diffusers", 200.0)):
        torch.save(dict(step=1, images=16, seconds=seconds, peak=1.0), tmp_path / f"{name}-seed0.pt")
    status, said = run_here(peers, ["judge", tmp_path, "--only", "ours,diffusers"])
    assert status == 2 and "200 to 300 s" in said


def test_another_sampler_is_no_other_run(tmp_path, monkeypatch):
    """ours-ddpm is not trained, draws from the weights of `ours`, and by the steps that its title says."""
    started, drawn = [], []
    monkeypatch.setattr(peers, "find_peers", lambda: None)
    monkeypatch.setattr(peers, "scenes_of", lambda folder: None)
    monkeypatch.setattr(peers.subprocess, "run", lambda command, **_: started.append(command) or argparse.Namespace(
        returncode=0))
    status, said = run_here(peers, ["train", tmp_path, "--only", "ours,ours-ddpm", "--seeds", "1", "--beside", "1",
                                    "--minutes", "1"])
    assert status is None and len(started) == 1 and "ours" in started[0], said
    torch.save(dict(step=7), tmp_path / "ours-seed0.pt")
    assert peers.checkpoint_of(tmp_path, "ours-ddpm", 0)[1]["step"] == 7

    monkeypatch.setattr(peers, "sample_run", lambda model, config, *_: drawn.append(config))
    for name in ("ours", "ours-ddpm", "ours-without-classes-ddpm"):
        peers.CONTESTANTS[name](0).images([0], 3, [0])
    assert all(config.sample_steps == 3 for config in drawn)
    assert [(config.sampler, config.noise_param) for config in drawn] == [("ddim", 0.2), ("ddpm", 1), ("ddpm", 1)]
    assert drawn[2].num_classes == 0


def test_bars_and_quality():
    results = [dict(name="a", fd=value, fd_pm=0.5) for value in (1.0, 4.0)] + [dict(name="b", fd=7.0, fd_pm=0.5)]
    assert peers.of(results, "a", "fd") == (2.5, 1.5) and peers.of(results, "b", "fd") == (7.0, 0.5)
    assert math.isnan(peers.of(results, "b", "read_rate")[0])
    ladder = [dict(steps=steps, fd_few=fd) for steps, fd in ((1, 90.0), (2, 50.0), (4, 10.4), (8, 10.0))]
    assert peers.as_good(ladder, 50.0)["steps"] == 2 and peers.as_good(ladder, 5.0) is None
    assert peers.enough(ladder)["steps"] == 4
