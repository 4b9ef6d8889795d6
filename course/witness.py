"""Run an exam on a student's file, in a process of its own. It returns numbers, or how it failed, and decides nothing.

The file lies alone in a temporary folder at the front of the path, so `import schedule` finds the student's; all other
modules come from the project. What the student's code prints, breaks or patches stays in this process.
"""
import contextlib
import functools
import importlib
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback

import torch

from course.conduct import Conduct
from course.exams import EXAMS, Inputs
from course.exercises import CHAPTERS, numbered
from course.source import HERE

for chapter in CHAPTERS:
    importlib.import_module(f"course.chapter{chapter}")                   # each enters its exams into EXAMS

LECTURE = {name[:-3] for name in os.listdir(HERE) if name.endswith(".py")}
MEMORY = 6 * 2 ** 30                                                      # bytes of address space beyond today's use
LARGEST = 2 ** 28                                                         # bytes of an answer
IMPORTED = ".imported"                                                    # end of the name of a file that says so


class Modules:
    """modules.schedule is the module schedule, imported at its first use."""

    def __getattr__(self, name):
        return importlib.import_module(name)


# ------------------------------------------------------------------------------------------ in the witness's process

def forget():
    """Drop the project's modules, so that the next import finds the student's file. plumbing imports the lecture, so it
    goes as well."""
    for name in [name for name in sys.modules if name.split(".")[0] in LECTURE | {"plumbing"}]:
        del sys.modules[name]


def limit_memory():
    """Limit the address space, where the system allows it. Elsewhere only time is limited."""
    try:
        import resource
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):
        return


def testify(folder, number, seed, path):
    """Write what the exam sees of the student's function, and how it behaves, to path. Leaves the process."""
    exam, exercise = EXAMS[number], numbered(number)
    for other in EXAMS.values():
        other.spec = other.laws = None                                    # the student's code must not find them

    def see(module):
        conduct = Conduct(exam)
        conduct.watch(module, exercise.name)
        return {**exam.see(Modules(), Inputs(seed)), **conduct.report()}
    answer(folder, exercise.file, see, seed, path)


def specify(folder, number, seed, path):
    """Write what the exam would see of a correct function to path. Leaves the process."""
    answer(folder, numbered(number).file, lambda module: EXAMS[number].spec(Modules(), Inputs(seed)), seed, path)


def try_import(folder, file, seed, path):
    """Import a file, and write to path that this was possible. Leaves the process."""
    answer(folder, file, lambda module: {}, seed, path)


def answer(folder, file, ask, seed, path):
    """Import a file, of `folder` if it is there, and write the numbers that ask(module) returns to path."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):                                              # it may print and ask for input
        os.dup2(null, stream)
    limit_memory()
    sys.dont_write_bytecode, sys.path[0:0] = True, [folder]
    forget()
    torch.manual_seed(seed)
    try:
        module = importlib.import_module(file[:-3])
        open(path + IMPORTED, "w").close()
        numbers = io.BytesIO()
        torch.save({key: plain(value) for key, value in ask(module).items()}, numbers)
        said = b"s" + numbers.getvalue()
    except BaseException as error:                                        # also SystemExit and KeyboardInterrupt
        said = failure(error, folder).encode("utf-8", "replace")
    with open(path + ".part", "wb") as out:
        out.write(said)
    os.replace(path + ".part", path)                                      # whole, or not there
    os._exit(0)


def failure(error, folder):
    """Return "n" (a stub) or "e" (an error), then the error and the student's line in one line of text."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
    line = f" (in: {frames[-1].line[:80]})" if frames and frames[-1].line else ""
    kind = "n" if isinstance(error, NotImplementedError) and "exercise " in str(error) else "e"
    text = f"{type(error).__name__}: {error}" if kind == "e" else str(error)
    return kind + " ".join(text.split())[:200] + line


def plain(value):
    """Flatten tensors, numbers and nested lists of them into a list of tensors. Raises TypeError for anything else."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in plain(part)]
    if isinstance(value, torch.Tensor):
        return [value.detach().cpu().clone()]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(float(value))]
    raise TypeError(f"returns {type(value).__name__}, not a tensor")


# ------------------------------------------------------------------------------------------ in the judge's process

def prepare():
    """Import what the lecture's files import, and none of them: it takes seconds, and the witnesses fork from here."""
    torch.set_num_threads(1)                                              # a forked process must not wait for threads
    for name in ("numpy", "PIL.Image", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict",
                 "torch.nn.parallel", "torch.utils.flop_counter"):
        importlib.import_module(name)


@functools.lru_cache(maxsize=None)                                        # check asks for each mistake several times
def testimony(exercise, source, seed, limit):
    """Run the exam on this source -> ("seen", {key: [tensor]}), ("not done", text) or ("wrong", text)."""
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, exercise.file), "w", encoding="utf-8") as file:
            file.write(source)
        return apart(testify, folder, exercise.number, seed, limit, exercise.file)


@functools.lru_cache(maxsize=None)
def specification(exercise, seed, limit):
    """Return what a correct function would show in this exam, as testimony does. In a student's own copy it takes the
    layers from the student's files, so it also runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return apart(specify, folder, exercise.number, seed, limit, exercise.file)


@functools.lru_cache(maxsize=None)
def imported(file, limit):
    """Import a file of the project, or of a student's own copy -> as testimony."""
    with tempfile.TemporaryDirectory() as folder:
        return apart(try_import, folder, file, 0, limit, file)


def alone(work, *args):
    """Run work in a session of its own: what it starts ends with it."""
    os.setsid()
    work(*args)


def apart(work, folder, what, seed, limit, file):
    """Run work(folder, what, seed, path) in a process of its own, and end all that it started -> as testimony."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    path = os.path.join(folder, "answer")
    process = multiprocessing.get_context(method).Process(target=alone, args=(work, folder, what, seed, path),
                                                          daemon=True)
    process.start()
    process.join(limit + (0 if method == "fork" else 20))                 # a new process first imports PyTorch
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError, PermissionError):        # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()
    where = "" if os.path.exists(path + IMPORTED) else f"{file} cannot be imported: "
    if late:
        return "wrong", f"{where}not finished after {limit} seconds: an endless loop?"
    if not os.path.isfile(path) or os.path.getsize(path) > LARGEST:
        return "wrong", f"{where}the program ended before the exam did (status {process.exitcode})"
    with open(path, "rb") as answered:
        return understood(answered.read(), where)


def understood(said, where=""):
    """Return what testimony() returns, of the bytes that a witness wrote. where: what comes before a message."""
    kind, said = said[:1], said[1:]
    if kind == b"s":
        return opened(said)
    return {b"n": "not done"}.get(kind, "wrong"), where + said.decode("utf-8", "replace")


def opened(answer):
    """Read a witness's numbers without trusting them."""
    try:
        seen = torch.load(io.BytesIO(answer), weights_only=True)
        fine = all(type(part) is torch.Tensor and part.layout is torch.strided and part.device.type == "cpu"
                   for value in seen.values() for part in value)
    except Exception as error:                                            # a damaged file fails in many ways
        return "wrong", f"what it returns cannot be read: {type(error).__name__}"
    return ("seen", seen) if fine else ("wrong", "what it returns is not a plain tensor")
