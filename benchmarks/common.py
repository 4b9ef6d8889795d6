"""What the benchmark scripts share: start the project's programs, measure the pace of a run, save results.

Results go to benchmarks/results/, or to the folder that the environment variable BENCHMARK_RESULTS names.
"""
import csv
import json
import math
import os
import platform
import signal
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.environ.get("BENCHMARK_RESULTS") or os.path.join(ROOT, "benchmarks", "results")
sys.path.insert(0, ROOT)

import torch

from plumbing import UserError
from plumbing.files import whole_file
from plumbing.runs import made_by


def save(name, device, cores="", **what):
    """Write results to RESULTS/NAME, with the command, the commit, the machine and perhaps its cores."""
    machine = ", ".join(filter(None, [platform.machine(), f"{os.cpu_count()} cores", cores, str(device)]))
    if device.type == "cuda":
        machine += f" ({torch.cuda.get_device_name(device)})"
    text = json.dumps(dict(**made_by(), machine=machine, **what), indent=1)
    # Open the file last: a changed file makes the commit that made_by() reports "-dirty".
    with whole_file(os.path.join(RESULTS, name), "w") as file:
        file.write(text)


def check(args, **least):
    """Raise UserError for a flag below its least value, or nan, or inf."""
    for name, value in least.items():
        if getattr(args, name) is not None and not value <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: want {value} or more")


def seconds_a_step(folder, batch, skip=0):
    """Return the mean seconds a step of a run of train.py, from its log.csv without the first `skip` rows."""
    with open(os.path.join(folder, "log.csv")) as file:
        rows = list(csv.DictReader(file))
    ends = [0, *(int(row["step"]) for row in rows)]
    seconds = sum(batch * (end - start) / float(row["images_per_s"])
                  for start, end, row in list(zip(ends, ends[1:], rows))[skip:])
    return seconds / (ends[-1] - ends[skip])


def started(*args):
    """Run a program of the project to its end. On Ctrl-C or SIGTERM, pass the signal on and wait: train.py saves first.

    Raises KeyboardInterrupt after a signal, and UserError if the program ends with a status other than 0.
    """
    def interrupted(number, frame):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupted)
    child = subprocess.Popen([sys.executable, os.path.join(ROOT, args[0]), *map(str, args[1:])], cwd=ROOT)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)                     # the caller may send it again
        child.terminate()                                                 # no effect if Ctrl-C reached it
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if status:
        raise UserError(f"{' '.join(map(str, args[:3]))} ...: ended with status {status}")
