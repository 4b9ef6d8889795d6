"""Laws of cost.py: what it prints before a run is what the run then takes."""
import gc
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import config as C
import train as T
from plumbing import cost, runs, shard
from plumbing.settings import override
from programs import program_here


def test_flops_and_memory_against_a_hand_count():
    """One 3x3 convolution in, one out, one transformer block. Kills: a multiply-add counted once."""
    config = override(C.PRESETS["glyphs64"], size=(16,), patching="none", base_channels=8, channel_mult=(1,),
                      num_res_blocks=(), num_transformer_blocks=1, num_heads=2, emb_channels=16)
    found = cost.cost_of(config)
    pixels, c, e = 256, 8, 16
    want = 2 * (pixels * 9 * 3 * c * 2 + pixels * 12 * c * c + 2 * pixels ** 2 * c + 256 * e + e * e + e * 8 * c)
    assert found.flops == want
    assert 4 * pixels * 5 * c < found.activations < 4 * pixels * 40 * c + 4 * pixels * pixels * 4
    block = sum(p.numel() for p in C.build_model(config).transformer[0].parameters())
    assert (found.largest, found.outside) == (block, found.parameters - block)


def allocated(function):
    """Return how many bytes function() left in use, by PyTorch's own count, and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = function()
    return sum(event.self_cpu_memory_usage for event in record.key_averages()), result


@pytest.mark.parametrize("preset, precision, again", [
    ("glyphs64", "float32", False), ("glyphs64", "bf16", False), ("glyphs64", "bf16", True),
    ("glyphs64_nested", "bf16", False), ("glyphs64_sr", "float32", False)])
def test_the_prediction_is_what_is_allocated(preset, precision, again):
    """Row by row, within 10 %. Kills: activations in the wrong precision; views counted twice; copies of weights
    left out, or counted for each image."""
    config = override(C.PRESETS[preset], precision=precision, recompute=again, batch=8, loss="v_mse")
    images, g = 8, torch.Generator().manual_seed(0)
    shapes = [(3, *size) for size in config.sizes]
    x, t = torch.rand(images, *shapes[0], generator=g), torch.rand(images, generator=g)
    eps, cond = [torch.randn(images, *shape, generator=g) for shape in shapes], {"label": torch.arange(images)}
    if config.low_size:
        cond.update(low_res=torch.zeros(images, 3, *config.low_size), aug_logsnr=torch.zeros(images))
    device = torch.device("cpu")

    def forward():
        with runs.autocast(precision, device):
            return T.training_loss(config, model, x, cond, t, eps)
    want = cost.memory(config, cost.cost_of(config))
    weights, model = allocated(lambda: C.build_model(config))
    if again:
        shard.checkpoint_activations(model)
    activations, loss = allocated(forward)
    after, _ = allocated(loss.backward)
    states, _ = allocated(C.make_optimizer(model, config).step)
    close = lambda found, wanted: found == pytest.approx(wanted, rel=0.1)
    assert close(weights, want["weights"]) and close(states, want["optimizer state"]) and weights == want["EMA weights"]
    assert close(activations, want["activations"] + want.get("weights in bf16", 0))
    assert close(activations + after, want["gradients"])                  # the activations are gone, gradients there


def test_what_sharding_and_micro_batches_save():
    """Kills: a share that only some rows have; --accumulate that saves weights, or nothing."""
    config = override(C.PRESETS["glyphs64"], batch=64, precision="float32")
    found = cost.cost_of(config)
    whole, parts = cost.memory(config, found, 8), cost.memory(C.replace(config, accumulate=4), found, 8)
    assert parts["activations"] * 4 == whole["activations"] == found.activations * 8
    shards = cost.memory(C.replace(config, shard=True), found, 8)
    for name in ("weights", "gradients", "optimizer state", "EMA weights"):
        assert shards[name] * 8 == whole[name]
    assert shards["gathered"] == 12 * found.largest + 8 * found.outside and "gathered" not in whole
    assert cost.memory(C.replace(config, shard=True), found, 1) == cost.memory(config, found, 1)


def test_the_table_of_the_big_models(monkeypatch, capsys):
    """`python -m plumbing.cost`. Kills: a preset that is gone; the activations with --recompute in the other column."""
    monkeypatch.setattr(cost, "cost_of", lambda config: cost.Cost(
        2 * 10 ** 6, 10 ** 9, activations=2 ** (25 if config.recompute else 26), copies=0, largest=0, outside=0))
    cost.main()
    head, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 13 and {" ".join(row.split()[1:]) for row in rows} == {"2.0 1.0 0.04 GiB 2.00 GiB 1.00 GiB"}


def test_dry_run_prints_both():
    """Kills: columns exchanged; another batch than a process has."""
    done = program_here("train.py", "--dry-run", "--world-size", 8, "--precision", "bf16")
    assert done.returncode == 0, done.stderr
    config = override(C.PRESETS["glyphs64"], precision="bf16")
    found = cost.cost_of(config)
    assert f"{found.parameters:,}" in done.stdout and f"{found.flops / 1e9:,.2f} GFLOP" in done.stdout
    assert "each of 8 processes, 1 images at once" in done.stdout
    row = lambda name: re.search(rf"  {re.escape(name)} +(\S+ GiB) +(\S+ GiB)", done.stdout).groups()
    for name in ("weights", "optimizer state", "activations"):
        assert row(name) == tuple(cost.gib(cost.memory(C.replace(config, shard=split), found, 8)[name])
                                  for split in (False, True))
