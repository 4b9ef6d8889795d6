"""Grade a class: a row for every hand-in, whatever it does.

Each hand-in is graded in a process of its own (grade_hand_in), which starts another process that has never seen the
lecturer's files (usher.py). That one runs the student's code, an exercise at a time, in a room (room.py) that holds
neither the specifications nor other hand-ins. From the hand-in come only the texts of the asked exercises' files.
"""
import csv
import json
import multiprocessing
import os
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import zipfile

from plumbing import UserError
from plumbing.files import write_json

from course import judge, usher
from course.room import lay_out
from course.witness import prepare, specification, understood

LONGEST_FILE = 2 ** 20                                                    # bytes of a student's file; ours have 30,000
PATIENCE = 30                                                             # seconds for starting and ending processes
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "LANG")                           # of the lecturer's environment


# ------------------------------------------------------------------------------------------ what was handed in

def collect(hand_in, files, to):
    """Copy these files of a hand-in, a folder or a zip, into the folder `to` -> {file: why it cannot be graded}.

    Links are refused: they could lead to the lecturer's files or to another hand-in.
    """
    if os.path.islink(hand_in):
        raise UserError("is a link, not a folder")
    if not os.path.isdir(hand_in) and not zipfile.is_zipfile(hand_in):
        raise UserError("neither a folder nor a zip")
    reader = from_folder(hand_in) if os.path.isdir(hand_in) else from_zip(hand_in, files)
    problems = {}
    for file in files:
        try:
            content = reader(file)
            if len(content) > LONGEST_FILE:
                raise UserError(f"{file}: longer than {LONGEST_FILE} bytes")
            with open(os.path.join(to, file), "wb") as out:
                out.write(content)
        except FileNotFoundError:
            problems[file] = f"{file}: not handed in"
        except UserError as error:
            problems[file] = str(error)
        except (OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError, ValueError) as error:
            problems[file] = f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}"
    return problems


def from_folder(folder):
    """Return a function that reads a file of the folder."""
    def reader(file):
        path = os.path.join(folder, file)
        kind = os.lstat(path).st_mode
        if not stat.S_ISREG(kind):
            raise UserError(f"{file}: {'a link' if stat.S_ISLNK(kind) else 'not a plain file'}")
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as opened:
            return opened.read(LONGEST_FILE + 1)
    return reader


def from_zip(path, files):
    """Return a function that reads a file of the zip: at its top, or in the folder that was packed."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:    # ValueError: a name that is not UTF-8
        raise UserError(f"a zip that cannot be read: {error}") from None
    places = {}
    for name in sorted(archive.namelist(), key=lambda name: -name.count("/")):
        if os.path.basename(name) in files and "__MACOSX" not in name:
            places[os.path.basename(name)] = name                         # the one nearest to the top stays

    def reader(file):
        if file not in places:
            raise FileNotFoundError
        with archive.open(places[file]) as opened:
            return opened.read(LONGEST_FILE + 1)
    return reader


# ------------------------------------------------------------------------------------------ one hand-in

class Usher:
    """The process that runs a hand-in's witnesses. It is started again if a witness killed it."""

    def __init__(self, place, command):
        """place: a folder for the rooms. command: starts Python, perhaps as another user; {room} means the place."""
        self.place, self.process = place, None
        self.command = shlex.split(command.format(room=place)) if command else [sys.executable]
        os.chmod(place, 0o755 if command else 0o700)                      # another user must read it
        shutil.copyfile(usher.__file__, os.path.join(place, "usher.py"))

    def start(self):
        """Start it and wait until it is ready. Raises UserError, with what it wrote."""
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment.update(OMP_NUM_THREADS="1", HAND_IN=self.place)       # HAND_IN: end_all() finds processes by it
        with tempfile.TemporaryFile() as errors:
            try:
                self.process = subprocess.Popen([*self.command, "-I", os.path.join(self.place, "usher.py")],
                                                cwd=self.place, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                                stderr=errors, start_new_session=True, env=environment)
                if self.receive(100, time.monotonic() + 4 * PATIENCE, line=True) == b"ready\n":
                    return
            except (OSError, EOFError, TimeoutError) as error:
                errors.write(str(error).encode())
            self.stop()
            errors.seek(0)
            said = errors.read().decode(errors="replace").split("\n")
        raise UserError(f"{shlex.join(self.command)}: starts no Python with PyTorch: {' '.join(said[-2:]).strip()}")

    def receive(self, size, end, line=False):
        """Read `size` bytes, or up to the end of a line. Raises TimeoutError, EOFError."""
        got, pipe = b"", self.process.stdout.fileno()
        while len(got) < size and not (line and got.endswith(b"\n")):
            if not select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(pipe, 1 if line else size - len(got))
            if not part:
                raise EOFError
            got += part
        return got

    def testimony(self, exercise, source, seed, limit):
        """Run the exam on this source, as witness.testimony does."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        room = os.path.join(self.place, "room")
        lay_out(room, exercise, source)
        try:
            asked = dict(room=room, number=exercise.number, seed=seed, limit=limit)
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")
            self.process.stdin.flush()
            end = time.monotonic() + limit + usher.IMPORTS + PATIENCE
            status, length = self.receive(100, end, line=True).split()
            answer = self.receive(min(int(length), usher.LARGEST), end)
        except (OSError, EOFError, TimeoutError, ValueError):
            self.stop()
            return "wrong", "stopped or killed the process that graded it"
        finally:
            shutil.rmtree(room)
        if status == b"late":
            return "wrong", f"not finished after {limit} seconds: an endless loop?"
        if not answer:
            return "wrong", f"the program ended before the exam did (status {status.decode(errors='replace')})"
        return understood(answer)

    def stop(self):
        """End the usher and all that is left of its children: they became ours."""
        if self.process:
            self.process.kill()
            self.process.wait()
            usher.end_children()


def rows_of(hand_in, exercises, seed, limit, place, command=None):
    """Grade one hand-in -> a row an exercise. place: an empty folder. command: see Usher."""
    handed_in = os.path.join(place, "files")
    os.makedirs(handed_in, mode=0o700)                                    # not for the student's code
    problems = collect(hand_in, sorted({exercise.file for exercise in exercises}), handed_in)
    usher.adopt_orphans()
    witnesses = Usher(place, command)
    try:
        return [zero(exercise, problems[exercise.file]) if exercise.file in problems else judge.row_of(
            exercise, *judge.verdict_of(exercise, handed_in, seed, limit, witnesses.testimony)[:2])
            for exercise in exercises]
    finally:
        witnesses.stop()


def zero(exercise, why):
    return judge.row_of(exercise, "wrong", why)


# ------------------------------------------------------------------------------------------ all hand-ins

def grade_hand_in(pipe, hand_in, exercises, *how):
    """Send the rows of a hand-in, or why it cannot be graded. Runs in a process of its own."""
    os.setsid()
    try:
        pipe.send((rows_of(hand_in, exercises, *how), ""))
    except (UserError, OSError, zipfile.BadZipFile) as error:
        pipe.send(([zero(exercise, str(error)) for exercise in exercises], str(error)))


def supervise(hand_in, exercises, seed, limit, command):
    """Grade one hand-in -> (its rows, why it could not be graded). All its processes end."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=grade_hand_in, args=(theirs, hand_in, exercises, seed, limit, place, command))
        process.start()
        theirs.close()
        try:
            if ours.poll(PATIENCE + len(exercises) * (limit + 2 * PATIENCE)):
                return ours.recv()
            why = "grading it took too long"
        except EOFError:
            why = "stopped or killed the process that graded it"
        finally:
            process.kill()
            process.join()
            end_all(place)
    return [zero(exercise, why) for exercise in exercises], why


def end_all(place):
    """End what is left of a hand-in if its judge is gone: on Linux, the processes that were started in its place."""
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if b"HAND_IN=" + os.fsencode(place) + b"\0" in file.read():
                    os.kill(int(name), signal.SIGKILL)
        except OSError:                                                   # it has ended, or is not ours
            continue


def grade_class(folder, exercises, seed, limit, to, command=None):
    """Grade each hand-in in a folder. Write points.csv and a JSON for each into the folder `to`."""
    if not hasattr(os, "fork"):
        raise UserError("grade-class needs Linux or macOS")
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    if not names:
        raise UserError(f"{folder}: holds no hand-in")
    if os.path.exists(to) and (not os.path.isdir(to) or os.listdir(to)):
        raise UserError(f"{to}: exists already; name a new folder with --out")
    os.makedirs(to, exist_ok=True)
    prepare()
    with tempfile.TemporaryDirectory() as place:                          # fail now, and not once for each hand-in
        first = Usher(place, command)
        first.start()
        first.stop()
    for exercise in exercises:
        specification(exercise, seed, limit)                              # once: the processes inherit it
    of = sum(exercise.points for exercise in exercises)
    with open(os.path.join(to, "points.csv"), "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["hand-in", "points", *(exercise.number for exercise in exercises), "reasons"])
        table.writerow(["(maximum)", of, *(exercise.points for exercise in exercises), ""])
        for name in names:
            rows, why = supervise(os.path.join(folder, name), exercises, seed, limit, command)
            points = sum(row["points"] for row in rows)
            reasons = why or "; ".join(f"{row['exercise']}: {row['message'] or row['status']}" for row in rows
                                       if row["status"] != "passed")
            shown = "'" + name if name[0] in "=+-@" else name             # a spreadsheet would take it for a formula
            table.writerow([shown, points, *(row["points"] for row in rows), reasons])
            file.flush()
            write_json(os.path.join(to, name + ".json"), dict(hand_in=name, points=points, of=of, seed=seed, reason=why,
                                                              exercises=rows))
            print(f"{points:3d}/{of}  {name}" + (f": {why}" if why else ""), flush=True)
    print(f"{len(names)} hand-ins; {os.path.join(to, 'points.csv')}")
