"""Run the witnesses of one hand-in, in a process that has never seen the lecturer's files.

It runs alone in a folder (see room.py), perhaps as another user or in a container, and imports only PyTorch itself.
It writes `ready` to its standard output. Then classes.py writes lines of JSON to its standard input, and it answers:

    {"room": PATH, "number": "1.2", "seed": 0, "limit": 20}
    STATUS LENGTH                                         how the witness ended, the length of its answer
    ANSWER                                                as witness.py writes it; empty if there is none

The witness is a child in a session of its own. When it ends, or when its time is over, it is killed with all processes
that it started. On Linux also with those that left its session: orphans return to this process and not to init.
"""
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time

LARGEST = 2 ** 28                                                         # bytes of an answer, or of a file
IMPORTS = 10                                                              # seconds of the imports before the exam
PR_SET_CHILD_SUBREAPER = 36                                               # from Linux's prctl.h


def adopt_orphans():
    """Become the parent of all orphans among our descendants. Only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def children():
    """Return the ids of our children. Elsewhere than on Linux: none."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        with contextlib.suppress(OSError):                                # it has ended
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = int(re.match(rb"\d+ \(.*\) \S (\d+)", file.read(), re.DOTALL)[1])
            found += [int(name)] if parent == os.getpid() else []
    return found


def end_children(patience=10):
    """Kill our children until none is left. A dead child's children become ours, so all descendants end."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for pid in children():
            with contextlib.suppress(OSError):                            # it has ended
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.01)


def limit_all(seconds):
    """Limit this process's time, files and, unless it is root's, new processes."""
    import resource
    for what, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, LARGEST), (resource.RLIMIT_NPROC, 0),
                       (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError):                             # a lower limit holds already
            resource.setrlimit(what, (most, most))


def testify(room, number, seed, limit, place):
    """Be the witness. Does not return."""
    try:
        shutil.copytree(os.path.join(room, "handed_in"), place, dirs_exist_ok=True)
        os.chdir(place)
        limit_all(limit + IMPORTS)
        os.setsid()
        sys.path.insert(0, room)
        from course import witness
        witness.testify(place, number, seed, os.path.join(place, "answer"))
    finally:
        os._exit(1)


def attend(room, number, seed, limit):
    """Run one witness -> (how it ended, its answer)."""
    place = tempfile.mkdtemp()
    child = os.fork()
    if not child:
        testify(room, number, seed, limit, place)
    end, status = time.monotonic() + limit + IMPORTS, None
    while status is None and time.monotonic() < end:
        time.sleep(0.01)
        ended, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if ended else None
    with contextlib.suppress(OSError):                                    # its group has ended
        os.killpg(child, signal.SIGKILL)
    end_children()
    answer = b""
    with contextlib.suppress(OSError):                                    # there is none, or no plain file
        with open(os.open(os.path.join(place, "answer"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            answer = file.read(LARGEST)
    shutil.rmtree(place, ignore_errors=True)
    return "late" if status is None else status, answer


def main():
    import torch                                                          # once: it takes seconds
    torch.set_num_threads(1)
    adopt_orphans()
    sys.dont_write_bytecode = True
    print("ready", flush=True)
    for line in sys.stdin.buffer:
        status, answer = attend(**json.loads(line))
        sys.stdout.buffer.write(f"{status} {len(answer)}\n".encode() + answer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
