"""What the scripts here share: starting the project's programs, the pace of a run, what they leave."""
import csv
import json
import math
import os
import platform
import signal
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

from plumbing import UserError
from plumbing.runs import made_by


def save(name, device, cores="", **what):
    """benchmarks/results/NAME: what was found, after the command, the commit and the machine (and the cores of it)."""
    machine = ", ".join(filter(None, [platform.machine(), f"{os.cpu_count()} cores", cores, str(device)]))
    if device.type == "cuda":
        machine += f" ({torch.cuda.get_device_name(device)})"
    text = json.dumps(dict(**made_by(), machine=machine, **what), indent=1)
    path = os.path.join(ROOT, "benchmarks", "results", name)              # touched last: it makes the commit -dirty
    with open(path + ".new", "w") as file:
        file.write(text)
    os.replace(path + ".new", path)


def check(args, **least):
    """Raises UserError for a flag below its least value (and for nan and inf)."""
    for name, value in least.items():
        if getattr(args, name) is not None and not value <= getattr(args, name) < math.inf:
            raise UserError(f"--{name} {getattr(args, name)}: want {value} or more")


def seconds_a_step(folder, batch, skip=0):
    """Seconds that a step of this run of train.py took, on the average, by its log.csv less the first `skip` rows."""
    with open(os.path.join(folder, "log.csv")) as file:
        rows = list(csv.DictReader(file))
    ends = [0, *(int(row["step"]) for row in rows)]
    seconds = sum(batch * (end - start) / float(row["images_per_s"])
                  for start, end, row in list(zip(ends, ends[1:], rows))[skip:])
    return seconds / (ends[-1] - ends[skip])


def started(*args):
    """Run a program of the project to its end. On Ctrl-C and SIGTERM it is told and waited for: train.py saves, leaves.

    Raises KeyboardInterrupt then, and UserError if it ends with another status than 0."""
    def interrupted(number, frame):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupted)
    child = subprocess.Popen([sys.executable, os.path.join(ROOT, args[0]), *map(str, args[1:])], cwd=ROOT)
    try:
        status = child.wait()
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)                     # the caller may tell it, too
        child.terminate()                                                 # after a Ctrl-C it changes nothing
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if status:
        raise UserError(f"{' '.join(map(str, args[:3]))} ...: ended with status {status}")
