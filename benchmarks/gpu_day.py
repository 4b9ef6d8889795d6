"""What to measure when a GPU is at hand for half an hour: all of it by one command, in pieces of nine minutes.

    python benchmarks/gpu_day.py --minutes 9 --out DIR     the next entries; the same command again goes on
    python benchmarks/gpu_day.py --list                    names, limits, expected seconds, what is done
    python benchmarks/gpu_day.py --only NAME,NAME          these, done or not
    python benchmarks/gpu_day.py --dry                     everything at tiny sizes on a CPU, to try this script
                                                           -> results/gpu_day/gpu_day.json, and pictures beside it

Entries run in order of worth. One begins if its whole limit fits into the rest of the minutes. After each its row is
written: the card, torch's version, the commit, commands, seconds, the results, the end of the output. A failed entry,
or one that ran out of its limit, has a row that says so, and is not tried again but by --only.

Rows are known from DIR and from benchmarks/results/gpu_day/. So DIR may be empty each time, if what was brought back
from it lies there by then. Nothing is fetched.
"""
import argparse
import csv
import glob
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

from common import ROOT, check  # first: it puts the project on the path

import torch

from gpu_checks import TINY
from plumbing import UserError
from plumbing.files import read_json, writable_folder, write_json
from plumbing.runs import main_program, made_by
from plumbing.settings import Parser

RESULTS = os.path.join(ROOT, "benchmarks", "results", "gpu_day")
GRACE = 15                                                                # s from SIGTERM, at which train.py saves, to
                                                                          # SIGKILL


@dataclass
class Entry:
    expected: int                        # s on an H200: a guess, nothing was measured yet
    limit: int                           # s
    commands: list                       # what stands after `python`; {run}: FOLDER/gpu-NAME
    dry: list = ()                       # the same for --dry; default: each with --tiny
    picture: str = ""                    # the newest of these files is brought back


SHEET = "{run}/samples_*.png"
TABLE = "benchmarks/paper_tables.py {} --budget gpu-30min --folder {{folder}}/gpu-tables"
# No test needs a C++ compiler: they compile with the backend "eager", or not at all.
PYTEST = "-m pytest -q" + " -n 12" * bool(importlib.util.find_spec("xdist"))                    # on 12 cores, if it can
# Minutes on a CPU, whatever the sizes: the machine's ceilings, the judge of the tables. --dry asks these for help only.
# Both scripts have run on a CPU (RESULTS.md).
HELP = {name: [f"benchmarks/{name}.py -h"] for name in ("speed", "paper_tables")}
TRAIN_DRY, EVALUATE_DRY = "train.py {tiny} --steps 4 --out {run}", "evaluate.py {run} --n-bits 2 --metrics bits"
ENTRIES = {                                                               # in order of worth
    "default": Entry(150, 330, ["train.py --out {run}", "evaluate.py {run} --n 360 --metrics fd,is,read,pr"],
                     [TRAIN_DRY, EVALUATE_DRY], SHEET),
    "pytest": Entry(120, 240, [PYTEST + " -m 'not slow and not long'"], ["-m pytest -q tests/test_dwt.py"]),
    "resume": Entry(60, 150, ["benchmarks/gpu_checks.py resume {run}"]),
    "precision": Entry(50, 120, ["benchmarks/gpu_checks.py precision {run}"]),
    "uvit": Entry(120, 300, ["benchmarks/speed.py uvit --turns 3"],
                  ["benchmarks/speed.py uvit --tiny --batch 1 --turns 1"]),
    "latency": Entry(60, 150, ["benchmarks/distillation.py latency"],
                     ["benchmarks/distillation.py latency --preset minute --turns 1"]),
    "paper": Entry(90, 240, ["benchmarks/speed.py paper --turns 5"],
                   ["benchmarks/speed.py paper --tiny --batch 1 --turns 1"]),
    "compile": Entry(120, 250, ["benchmarks/speed.py --compile --models glyphs64"], HELP["speed"]),
    "compile_wide": Entry(150, 300, ["benchmarks/speed.py --compile --models unet64 --batch 64"], HELP["speed"]),
    "graphs": Entry(90, 200, ["benchmarks/gpu_checks.py graphs {run}"]),
    "latency_compiled": Entry(240, 420, ["benchmarks/distillation.py latency --compile"],
                              ["benchmarks/distillation.py latency --compile --preset minute --turns 1"]),
    "uvit_compiled": Entry(240, 420, ["benchmarks/speed.py uvit --compile --turns 3 --batch 32"],
                           ["benchmarks/speed.py uvit --compile --tiny --batch 1 --turns 1"]),
    "table2": Entry(450, 530, [TABLE.format("table2") + " --minutes 1"], HELP["paper_tables"],
                    "figures/paper_table2-gpu*.png"),
    "table5": Entry(480, 530, [TABLE.format("table5") + " --minutes 0.5 --only '128 px'"], HELP["paper_tables"],
                    "figures/paper_table5-gpu*.png"),
    "table6": Entry(430, 530, [TABLE.format("table6") + " --minutes 2 --only '256 px'"], HELP["paper_tables"],
                    "figures/paper_table6-gpu*.png"),
    # 15 workers draw 64 scenes of 128 px in 23 ms (plumbing/start.py): about what a step takes.
    "glyphs128": Entry(300, 480, ["train.py --size 128 --patching dwt_2 --base-channels 64 --emb-channels 512 "
                                  "--num-transformer-blocks 8 --batch 64 --lr 6e-4 --steps 6000 --out {run}",
                                  "evaluate.py {run} --n 360 --metrics fd,read"], [TRAIN_DRY, EVALUATE_DRY], SHEET),
    "text": Entry(260, 480, ["train.py --preset glyphs64_text --batch 32 --out {run}",
                             "evaluate.py {run} --n 216 --metrics fd,read,words"],
                  ["train.py --preset glyphs64_text {tiny} --steps 4 --out {run}", EVALUATE_DRY], SHEET),
    "pytest_slow": Entry(300, 530, [PYTEST + " -m 'slow or long'"], ["-m pytest -q --collect-only tests/test_dwt.py"]),
}


def commands_of(name, folder, dry):
    """Return the commands of an entry, each as the words after `python`."""
    entry, places = ENTRIES[name], dict(run=os.path.join(folder, "gpu-" + name), folder=folder)
    commands = (entry.dry or [command + " --tiny" for command in entry.commands]) if dry else entry.commands
    return [[word.format(**places) for word in shlex.split(command.replace("{tiny}", TINY))] for command in commands]


# ------------------------------------------------------------------------------------------ one entry

def within(words, seconds, log, env):
    """Run a program for at most this time. Return its status, or None if the time was up.

    Nothing of its process group is left then: train.py saves at SIGTERM, and what does not end is killed.
    """
    with open(log, "a") as file:
        child = subprocess.Popen([sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=env,
                                 process_group=0)
    try:
        return child.wait(max(0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass                                                          # killed below
        return None
    finally:
        try:
            os.killpg(child.pid, signal.SIGKILL)                          # and what it started and left behind
        except ProcessLookupError:
            pass                                                          # nothing is left
        child.wait()


def measured(name, args):
    """Run an entry. Return its row."""
    work = os.path.join(args.folder, "gpu-" + name)
    for path in files_of(work):                                           # of an earlier try
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    results, log = work + "-results", work + ".log"
    os.makedirs(results)
    env = dict(os.environ, BENCHMARK_RESULTS=results, MPLBACKEND="Agg")
    if args.dry:                                                          # the flags of the real day, nothing compiled
        env |= dict(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TORCHDYNAMO_DISABLE="1")
    limit, start, state, commands = (900 if args.dry else ENTRIES[name].limit), time.monotonic(), "done", []
    for words in commands_of(name, args.folder, args.dry):
        began = time.monotonic()
        status = within(words, start + limit - began, log, env)
        commands.append(dict(command=shlex.join(["python", *words]), seconds=time.monotonic() - began, status=status))
        if status != 0:
            state = "out of time" if status is None else f"failed with status {status}"
            break
    return dict(state=state, seconds=time.monotonic() - start, limit=limit, card=args.card, **made_by(),
                commands=commands, **found(work)) | ({"commit": args.commit} if args.commit else {})


def files_of(work):
    """Return what an entry makes: runs/gpu-NAME, runs/gpu-NAME-results, runs/gpu-NAME.log, ..."""
    return glob.glob(glob.escape(work)) + glob.glob(glob.escape(work) + "[-.]*")


def found(work):
    """Return what an entry left: results, the last row of each log of train.py, the end of the output."""
    values, logs = {}, {}
    for path in [path for folder in files_of(work) for path in glob.glob(os.path.join(glob.escape(folder), "*"))]:
        if path.endswith("evaluation.json") or "-results" in path:
            with open(path) as file:
                values[os.path.basename(path)] = json.load(file, parse_constant=str)            # NaN is no JSON
        if path.endswith("log.csv"):
            with open(path) as file:
                logs[os.path.basename(os.path.dirname(path))] = ([*csv.DictReader(file)] or [None])[-1]
    with open(work + ".log", errors="replace") as file:
        return dict(results=values, logs=logs, output=file.read()[-6000:])


def bring_picture(name, args):
    """Copy the newest picture of an entry to OUT/NAME.png."""
    pattern = ENTRIES[name].picture.format(run=os.path.join(glob.escape(args.folder), "gpu-" + name))
    pictures = sorted(glob.glob(os.path.join(glob.escape(ROOT), pattern)), key=os.path.getmtime) if pattern else []
    if pictures:
        shutil.copy(pictures[-1], os.path.join(args.out, name + ".png"))


# ------------------------------------------------------------------------------------------ the program

def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of this piece (default 9)")
    parser.add_argument("--out", metavar="DIR", help="folder of gpu_day.json and pictures")
    parser.add_argument("--folder", default="runs", help="of the runs (default runs)")
    parser.add_argument("--only", default="", help="names of entries, done or not")
    parser.add_argument("--commit", default="", help="of these files, where git does not know it")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    check(args, minutes=0.1)
    args.folder = os.path.abspath(args.folder)
    args.out = os.path.abspath(args.out or (os.path.join(args.folder, "gpu-day-dry") if args.dry else RESULTS))
    args.only = [name for name in args.only.split(",") if name]
    args.card = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.dry else "cpu"
    if args.card == "cpu" and not (args.dry or args.list):
        raise UserError("there is no CUDA device here; --dry tries the script on a CPU")
    return args


def main():
    args = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)             # end the entry at work, too
    end = time.monotonic() + (math.inf if args.dry else 60 * args.minutes)                      # a slow CPU may go on
    if unknown := set(args.only) - set(ENTRIES):
        raise UserError(f"--only {','.join(sorted(unknown))}: want some of {', '.join(ENTRIES)}")
    path = os.path.join(args.out, "gpu_day.json")
    rows = ({} if args.dry else read_json(os.path.join(RESULTS, "gpu_day.json"))) | read_json(path)
    if args.list:
        for name, entry in ENTRIES.items():
            print(f"{name:18s} limit {entry.limit:4d} s, expected {entry.expected:4d} s  "
                  f"{rows[name]['state'] if name in rows else ''}")
        return
    for folder in (args.folder, args.out):
        writable_folder(folder, "--folder")
    left = args.only or [name for name in ENTRIES if name not in rows]
    for name in list(left):
        if time.monotonic() + ENTRIES[name].limit > end:
            continue                                                      # a later one may be shorter
        left.remove(name)
        row = rows[name] = measured(name, args)
        write_json(path, rows)
        bring_picture(name, args)
        print(f"{name:18s} {row['seconds']:6.0f} s  {row['state']}", flush=True)
        if row["state"] != "done":
            print(row["output"][-1500:], flush=True)
        for file, value in row["results"].items():
            print(f"  {file}: {json.dumps(value)[:600]}", flush=True)
    print(f"left: {', '.join(left)}" if left else "all entries have a row", flush=True)


if __name__ == "__main__":
    main_program(main)
