"""Runs that the tests of several files look at. Each is trained once. No test changes them."""
import gc
import importlib
import signal

import pytest

import train as T
from programs import TINY, run_here


# A program inherits what nohup or a script's & has ignored, but no handler: so these go on ignoring, for us alone.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_collection_finish():
    """Take what is imported out of Python's garbage collection. run_here() collects after each run: 0.2 s with it."""
    for late in ("torch._dynamo", "matplotlib.pyplot"):                   # models and pictures import them
        importlib.import_module(late)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def six_steps(tmp_path_factory):
    """Return the folder of a run of six steps without a break, with dropout."""
    folder = tmp_path_factory.mktemp("six_steps") / "run"
    assert run_here(T, [*TINY, "--steps", 6, "--save-every", 3, "--out", folder, "--dropout", 0.1,
                        "--dropout-from-resolution", 16]) == (None, "")
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Return the folder of a run of three steps, for distill.py."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    assert run_here(T, [*TINY, "--steps", 3, "--out", folder]) == (None, "")
    return folder


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Return a student's copy of all chapters. Tests leave it as it is."""
    from course.handout import make
    folder = tmp_path_factory.mktemp("course") / "work"
    make(folder)
    return folder
