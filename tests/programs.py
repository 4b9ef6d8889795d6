"""What the tests share: start a program (as a user would, or in this process, quicker), read a run, make a model."""
import contextlib
import csv
import gc
import io
import os
import runpy
import signal
import subprocess
import sys
import warnings

import torch

import config as C
from plumbing import runs

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ("--size 16 --base-channels 8 --emb-channels 16 --channel-mult 1,2 --num-res-blocks 1 "
        "--num-transformer-blocks 1 --num-heads 2 --batch 4 --log-every 1 --sample-every 0 "
        "--sample-steps 2 --workers 0 --precision float32 --device cpu --lr-decay 0").split()


def text_of(name):
    """Return the text of a file of the project: README.md, benchmarks/RESULTS.md, ..."""
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def program(name, *args, env=None, launcher=(), timeout=240):
    """Run a program of the project as a user would. name: a file, or the dotted name of a module. -> CompletedProcess.

    args: its words. launcher: words between python and the program. env: variables added to ours.
    """
    words = [os.path.join(ROOT, name)] if str(name).endswith(".py") else ["-m", name]
    return subprocess.run([sys.executable, *launcher, *words, *map(str, args)], capture_output=True, text=True,
                          timeout=timeout, cwd=ROOT,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})


def train_tiny(*args, **kw):
    """Train a tiny model as a user would, and check that it succeeds. -> CompletedProcess. kw: of `program`."""
    done = program("train.py", *TINY, *args, **kw)
    assert done.returncode == 0, done.stderr
    return done


def checkpoint(folder):
    """Read the checkpoint of a run."""
    return torch.load(os.path.join(folder, "checkpoint.pt"), weights_only=True)


def log_column(folder, name):
    """Return a column of a run's log.csv, a list of strings."""
    with open(os.path.join(folder, "log.csv")) as file:
        return [row[name] for row in csv.DictReader(file)]


def page(name, capsys):
    """Run a file of the lecture in this process as `python NAME` does: its classes are __main__'s. -> its output."""
    runpy.run_path(os.path.join(ROOT, name), run_name="__main__")
    return capsys.readouterr().out


def program_here(name, *words):
    """Run a file or a package as `program` does, in this process, which is quicker. -> CompletedProcess."""
    out, err, argv, path, status = io.StringIO(), io.StringIO(), sys.argv, list(sys.path), 0
    sys.argv = [name, *map(str, words)]
    try:
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(ROOT),
              warnings.catch_warnings()):
            warnings.simplefilter("ignore")                               # runpy: imported already
            if name.endswith(".py"):
                sys.path.insert(0, os.path.dirname(os.path.join(ROOT, name)))
                runpy.run_path(name, run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        status = leave.code or 0
    finally:
        sys.argv, sys.path[:] = argv, path
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def help_of(program, words):
    """Return what `program [first word] -h` prints; the word may be a subcommand."""
    return program_here(program, *[word for word in words[:1] if not word.startswith("-")], "-h").stdout


def run_here(module, args):
    """Run main() of a program in this process, which is quicker. -> (status, what it wrote to stderr)."""
    err, argv = io.StringIO(), sys.argv
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    sys.argv = [module.__name__.split(".")[-1] + ".py", *map(str, args)]
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            runs.main_program(module.main)
    except SystemExit as leave:
        lines = [l for l in err.getvalue().splitlines(True) if l.strip() and not l.startswith("skipped")]
        return leave.code, "".join(lines)
    finally:
        sys.argv = argv
        gc.collect()                                                      # a program that ends lets go of its run
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stirred(config, seed=1):
    """Return a model with random weights everywhere: zero-initialised branches would hide what is behind them."""
    torch.manual_seed(0)
    model, g = C.build_model(config).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model
