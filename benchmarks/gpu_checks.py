"""Check on a GPU what the tests promise of a CPU: resuming, bf16 against float32, CUDA graphs of sample.py.

    python benchmarks/gpu_checks.py resume RUN         kill a run, resume it, compare with the unbroken one
    python benchmarks/gpu_checks.py precision RUN      the losses of 200 steps in bf16 and in float32
    python benchmarks/gpu_checks.py graphs RUN         pictures of sample.py with and without --compile
                                                       -> results/gpu_WHAT_DEVICE.json

RUN names new folders: RUN-whole, RUN-killed, ... gpu_day.py calls this script.
"""
import argparse
import os
import subprocess
import sys
import time

from common import ROOT, save, started  # first: it puts the project on the path

import numpy as np
import torch
from PIL import Image

from plumbing import UserError
from plumbing.runs import choose_device, main_program, read_checkpoint
from plumbing.settings import Parser

# Flags of train.py for the --tiny form of these checks and of gpu_day.py: seconds on a CPU.
TINY = ("--size 16 --patching none --base-channels 8 --emb-channels 16 --channel-mult 1,2 --num-res-blocks 1 "
        "--num-transformer-blocks 1 --precondition none --loss v_mse --held-out-every 0 --sample-steps 2 --scenes 50 "
        "--characters AB --batch 4 --workers 0 --precision float32")


def losses(folder):
    """Return the losses of a run's log, one for each step."""
    return np.genfromtxt(os.path.join(folder, "log.csv"), delimiter=",", names=True)["loss"]


def killed(words, folder, step, seconds=120):
    """Start train.py and kill it once it has logged this step. Raises UserError if it never does.

    It stays in our process group, so that gpu_day.py can end both. Its workers see that it is gone, and end.
    """
    child = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), *words, "--out", folder])
    try:
        end, log = time.monotonic() + seconds, os.path.join(folder, "log.csv")
        while not os.path.exists(log) or sum(1 for _ in open(log)) <= step:                     # a row a step, one head
            if child.poll() is not None or time.monotonic() > end:
                raise UserError(f"{folder}: did not get to step {step}, or ended before it could be killed there")
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()


def resume(args):
    steps, saved, kill = (40, 10, 15) if args.tiny else (400, 100, 150)
    words = [*(TINY.split() if args.tiny else []), "--steps", str(steps), "--save-every", str(saved), "--log-every",
             "1", "--sample-every", "0"]
    whole, broken = args.run + "-whole", args.run + "-killed"
    started("train.py", *words, "--out", whole)
    killed(words, broken, kill)
    found = read_checkpoint(broken)["step"]
    if found == steps:
        raise UserError(f"{broken}: was done before it was killed")
    started("train.py", "--resume", broken)
    one, two = losses(whole), losses(broken)
    if len(one) != len(two):
        raise UserError(f"{broken}: {len(two)} steps are logged, not {len(one)}")
    weights = [torch.cat([w.flatten() for w in read_checkpoint(run)["ema"].values()]) for run in (whole, broken)]
    return dict(steps=steps, resumed_from=found, equal_to_the_bit=torch.equal(*weights),
                largest_difference_of_losses=float(abs(one - two).max()),
                distance_of_weights=((weights[0] - weights[1]).norm() / weights[0].norm()).item())


def precision(args):
    steps, words, found = 8 if args.tiny else 200, TINY.split() if args.tiny else [], {}
    for kind in ("float32", "bf16"):
        out = f"{args.run}-{kind}"
        started("train.py", *words, "--steps", steps, "--log-every", 1, "--sample-every", 0, "--precision", kind,
                "--out", out)
        found[kind] = losses(out)
    difference = found["bf16"] - found["float32"]                         # of the same images and noise
    return dict(steps=steps, mean_of_last_half={kind: float(each[steps // 2:].mean()) for kind, each in found.items()},
                mean_difference=float(difference.mean()), largest_difference=float(abs(difference).max()),
                losses={kind: each.tolist() for kind, each in found.items()})


def graphs(args):
    found, pictures = {}, {}
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        out, start = f"{args.run}-{name}.png", time.perf_counter()
        started("sample.py", *(["--steps", 2, "--n", 1, "--labels", "A,B"] if args.tiny else ["--steps", 24]), *flags,
                "--guidance", 3, "--out", out)
        found[f"seconds_{name}"] = time.perf_counter() - start
        pictures[name] = np.asarray(Image.open(out)).astype(float)
    difference = abs(pictures["plain"] - pictures["compiled"])            # of 255: bf16 rounds in another order
    return dict(found, mean_difference_of_pixels=difference.mean(), largest_difference_of_pixels=difference.max())


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("resume", "precision", "graphs"))
    parser.add_argument("run", metavar="RUN", help="the beginning of the names of the folders")
    parser.add_argument("--tiny", action="store_true", help="a small network, a few steps: to try the script on a CPU")
    args = parser.parse_args()
    args.run = os.path.abspath(args.run)
    device, _ = choose_device()
    found = {"resume": resume, "precision": precision, "graphs": graphs}[args.what](args)
    for name, value in found.items():
        if name != "losses":
            print(f"{name:32s} {value}")
    save(f"gpu_{args.what}_{device.type}.json", device, tiny=args.tiny, **found)


if __name__ == "__main__":
    main_program(main)
