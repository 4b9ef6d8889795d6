"""What a training step of a preset costs in float32, bf16, channels_last and with torch.compile, as ratios in one run.

    python benchmarks/step_time.py [--preset glyphs64] [--compile] [--json FILE]

Each variant takes turns (A B C A B C ...) so that what disturbs the machine disturbs all; the least counts.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from config import PRESETS, build_model, make_schedule
from runs import autocast, choose_device
from train import simple_loss


def make_step(config, device, precision, channels_last, compiled):
    """A function that takes one training step (forward, backward, Adam) on random data and returns its seconds."""
    torch.manual_seed(0)
    with device:
        model = build_model(config)
        x, eps = torch.rand(2, config.batch, 3, *config.size) * 2 - 1
        t, label = torch.rand(config.batch), torch.randint(config.num_classes, (config.batch,))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x, eps = (a.contiguous(memory_format=torch.channels_last) for a in (x, eps))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)
    handle, schedule = torch.compile(model) if compiled else model, make_schedule(config)

    def step():
        start = time.perf_counter()
        with autocast(precision, device):
            loss = simple_loss(handle, x, {"label": label}, t, eps, schedule, config.loss)
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
