"""What a training step of a preset costs in float32, bf16, channels_last and with torch.compile, as ratios in one run.

    python benchmarks/step_time.py [--preset glyphs64] [--compile] [--json FILE]

Each variant takes turns (A B C A B C ...) so that what disturbs the machine disturbs all; the least counts.
"""
import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from cascade import downsample, super_resolution_loss
from config import PRESETS, build_model, make_schedule
from nested_unet import nested_loss, pyramid
from runs import autocast, choose_device
from train import prediction_loss, simple_loss


def make_step(config, device, precision, channels_last=False, compiled=False):
    """A function that takes one training step (forward, backward, Adam) on random data and returns its seconds."""
    torch.manual_seed(0)
    with device:
        model = build_model(config)
        x, t = torch.rand(config.batch, 3, *config.size) * 2 - 1, torch.rand(config.batch)
        cond = {"label": torch.randint(config.num_classes, (config.batch,))}
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    levels, low_res = pyramid(x, config.sizes), downsample(x, config.low_size) if config.low_size else None
    eps = [torch.randn_like(level) for level in levels]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    handle, schedule = torch.compile(model) if compiled else model, make_schedule(config)
    measure = functools.partial(prediction_loss, loss=config.loss)

    def step():
        start = time.perf_counter()
        with autocast(precision, device):
            if config.outer_channels:
                loss = nested_loss(handle, levels, cond, t, eps, schedule, measure)
            elif config.low_size:
                loss = super_resolution_loss(handle, x, low_res, torch.zeros_like(t), cond, t, eps[0], schedule,
                                             measure)
            else:
                loss = simple_loss(handle, x, cond, t, eps[0], schedule, config.loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
    return step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="glyphs64", choices=PRESETS)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="torch.compile as well (a minute or more to start)")
    parser.add_argument("--json")
    args = parser.parse_args()
    device, _ = choose_device()
    config = PRESETS[args.preset]
    variants = {"float32": ("float32", False, False), "float32, channels_last": ("float32", True, False),
                "bf16": ("bf16", False, False), "bf16, channels_last": ("bf16", True, False)}
    if args.compile:
        variants["bf16, compile"] = ("bf16", False, True)
    steps, first, best = {}, {}, {}
    for name, options in variants.items():
        steps[name] = make_step(config, device, *options)
        first[name] = steps[name]()
    for _ in range(args.turns):
        for name, step in steps.items():
            best[name] = min(best.get(name, 1e9), step())
    print(f"{args.preset}, batch {config.batch}, on {device}")
    print(f"{'variant':26s} {'ms a step':>10s} {'speed':>7s} {'first step, s':>14s}")
    for name in variants:
        print(f"{name:26s} {best[name] * 1e3:10.0f} {best['float32'] / best[name]:6.2f}x {first[name]:14.1f}")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(command=" ".join(["python", *sys.argv]), commit=commit, torch=torch.__version__,
                           machine=f"{platform.machine()}, {os.cpu_count()} cores, {device}", preset=args.preset,
                           batch=config.batch, seconds_a_step=best, seconds_of_first_step=first), file, indent=1)


if __name__ == "__main__":
    main()
