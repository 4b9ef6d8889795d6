"""Kill a run again and again; is it the unbroken run in the end, to the bit, and was there always a whole checkpoint?

    python tests/plumbing/soak.py --kills 50          a few minutes; test_reliability.py has a short form
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [os.path.dirname(TESTS), TESTS]

import torch

from plumbing import runs
from programs import ROOT, TINY, program


def differences(a, b):
    """Names of the tensors in which two runs' checkpoints differ."""
    a, b = (runs.read_checkpoint(str(folder)) for folder in (a, b))
    assert (a["step"], a["images"]) == (b["step"], b["images"])
    found = [f"{part}.{key}" for part in ("model", "ema") for key in a[part]
             if not torch.equal(a[part][key], b[part][key])]
    return found + [f"optimizer.{i}.{key}" for i, moments in a["optimizer"]["state"].items() for key in moments
                    if not torch.equal(moments[key], b["optimizer"]["state"][i][key])]


def soak(folder, kills, steps, seed=0, say=lambda text: None):
    """Runs one of `steps` steps, a checkpoint a step, killed `kills` times at random moments. -> steps at each kill."""
    command = ["--steps", steps, "--dropout", 0.1, "--dropout-from-resolution", 16]
    done = program("train.py", *TINY, *command, "--out", os.path.join(folder, "unbroken"), timeout=600)
    assert done.returncode == 0, done.stderr
    run, rng, reached = os.path.join(folder, "killed"), random.Random(seed), []
    words = [sys.executable, os.path.join(ROOT, "train.py"), *TINY, *map(str, command), "--save-every", "1",
             "--out", run, "--auto-resume"]
    while len(reached) < kills:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
        log, since = os.path.join(run, "log.csv"), time.time()
        begun = os.path.getmtime(log) if os.path.exists(log) else 0
        while process.poll() is None and time.time() - since < 120:       # until it takes steps ...
            if os.path.exists(log) and os.path.getmtime(log) > begun:
                break
            time.sleep(0.005)
        time.sleep(rng.random() ** 2 * 0.5)                               # ... and then at any moment
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            raise AssertionError(f"it was done after {len(reached)} kills: give it more steps")
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        step = runs.read_checkpoint(run)["step"] if runs.has_checkpoint(run) else 0             # whole, or it raises
        assert step >= (reached[-1] if reached else 0), "a checkpoint was lost"
        if os.path.exists(os.path.join(run, runs.PREVIOUS)):
            runs.read_checkpoint(run, runs.PREVIOUS)
        reached.append(step)
        say(f"kill {len(reached)}: at step {step}")
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert not differences(os.path.join(folder, "unbroken"), run)
    assert open(log).read().count("\n") == steps + 1                      # each step is logged once
    return reached


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reached = soak(folder, args.kills, 10 * args.kills, args.seed, lambda text: print(text, flush=True))
    print(f"killed {args.kills} times, at steps {reached[0]} to {reached[-1]} of {10 * args.kills}: equal to the "
          "unbroken run to the bit")


if __name__ == "__main__":
    main()
