"""The judge: runs what exercises.py grades and checks. `python exercises.py grade DIR` is the way in.

    witness   a process of its own, forked or started anew, that imports the student's file and calls the exam's `see`;
              it returns numbers, or how it failed, and decides nothing
    judge     this process, which never imports the student's file: shapes, laws, equality, points, pictures
"""
import argparse
import ast
import functools
import importlib
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback

COURSE = os.path.dirname(os.path.abspath(__file__))
HERE = os.path.dirname(COURSE)
sys.path[:0] = [HERE, COURSE]

import torch

from exams import EXAMS, Inputs
from exercises import CHAPTERS, EXERCISES, Fault, body, chosen, find, lines_of, make, put_back, read, strip, to_grade

for chapter in CHAPTERS:
    importlib.import_module(f"chapter{chapter}")                          # they enter their exams into EXAMS

PROJECT = {name[:-3] for name in os.listdir(HERE) if name.endswith(".py")}
MEMORY = 6 * 2 ** 30                                                      # bytes of address space beyond what is in use
LARGEST = 2 ** 28                                                         # bytes of an answer


class Modules:
    """modules.schedule is the module schedule, imported when first named."""

    def __getattr__(self, name):
        return importlib.import_module(name)


# ------------------------------------------------------------------------------------------ the witness

def forget():
    for name in [name for name in sys.modules if name.split(".")[0] in PROJECT]:
        del sys.modules[name]


def testify(folder, number, seed, answer_path):
    """In the witness: what exam `number` sees of the files in `folder`, and of the project's for all others."""
    for exam in EXAMS.values():
        exam.spec = exam.laws = None                                      # not its business
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):                                              # printing and asking do not disturb us
        os.dup2(null, stream)
    try:
        import resource
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    except (ImportError, OSError, ValueError):                            # not on this system: time is limited still
        pass
    sys.dont_write_bytecode, sys.path[0:0] = True, [folder]
    forget()
    torch.manual_seed(seed)
    try:
        seen = EXAMS[number].see(Modules(), Inputs(seed))
        out = io.BytesIO()
        torch.save({key: plain(value) for key, value in seen.items()}, out)
        answer = b"s" + out.getvalue()
    except BaseException as error:                                        # SystemExit, too
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(folder)]
        line = f" (in: {where[-1].line[:80]})" if where and where[-1].line else ""
        kind = "n" if isinstance(error, NotImplementedError) and "exercise " in str(error) else "e"
        text = f"{type(error).__name__}: {error}" if kind == "e" else str(error)
        answer = (kind + (" ".join(text.split())[:200] + line)).encode("utf-8", "replace")
    with open(answer_path + ".part", "wb") as file:
        file.write(answer)
    os.replace(answer_path + ".part", answer_path)                        # whole, or not there
    os._exit(0)


def plain(value):
    """Tensors, numbers and nests of them -> a list of tensors. Raises TypeError for what is none."""
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in plain(part)]
    if isinstance(value, torch.Tensor):
        return [value.detach().cpu().clone()]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(float(value))]
    raise TypeError(f"gives {type(value).__name__}, where a tensor is wanted")


def hear(folder, number, seed, limit):
    """-> ("seen", {key: [tensor]}), ("not done", text) or ("wrong", text)."""
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin" else "spawn"
    context = multiprocessing.get_context(method)
    path = os.path.join(folder, "answer")
    process = context.Process(target=testify, args=(folder, number, seed, path), daemon=True)
    process.start()
    process.join(limit + (0 if method == "fork" else 20))                 # a new process has PyTorch to import
    late = process.is_alive()
    process.kill()
    process.join()
    if late:
        return "wrong", f"not finished after {limit} seconds: an endless loop?"
    if not os.path.isfile(path) or os.path.getsize(path) > LARGEST:
        return "wrong", f"the program ended before the exam did (status {process.exitcode})"
    with open(path, "rb") as file:
        kind, rest = file.read(1), file.read()
    if kind == b"s":
        try:
            seen = torch.load(io.BytesIO(rest), weights_only=True)
            fine = all(type(part) is torch.Tensor and part.layout is torch.strided and part.device.type == "cpu"
                       for value in seen.values() for part in value)
        except Exception as error:
            return "wrong", f"what it returns cannot be read: {type(error).__name__}"
        if not fine:
            return "wrong", "what it returns is no plain tensor"
        return "seen", seen
    return {b"n": "not done"}.get(kind, "wrong"), rest.decode("utf-8", "replace")


# ------------------------------------------------------------------------------------------ the judgement

def differs(one, other, tolerance):
    """Text, or None if they are equal within tolerance."""
    if one.shape != other.shape:
        return f"shape {tuple(one.shape)}, want {tuple(other.shape)}"
    if one.dtype != other.dtype:
        return f"{one.dtype}, want {other.dtype}".replace("torch.", "")
    close = torch.isclose(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if bool(close.all()):
        return None
    at = tuple(torch.nonzero(~close)[0].tolist()) if one.ndim else ()
    place = f" at {list(at)}" if at else ""
    return f"{float(one[at]):.6g}{place}, want {float(other[at]):.6g}"


def compare(seen, wanted, tolerance, shapes_only=False):
    """The first difference of two testimonies, in words, or None."""
    for key, tensors in wanted.items():
        if len(seen.get(key, ())) != len(tensors):
            return f"{key}: {len(seen.get(key, ()))} tensors, want {len(tensors)}"
        for one, other in zip(seen[key], tensors):
            if shapes_only and one.shape == other.shape and one.dtype == other.dtype:
                continue
            if said := differs(one, other, tolerance):
                return f"{key}: {said}"
    return None


@functools.lru_cache(maxsize=None)
def specified(number, seed):
    return {key: plain(value) for key, value in EXAMS[number].spec(Modules(), Inputs(seed)).items()}


def judge_one(exercise, folder, seed, limit, mistakes=()):
    """-> (status, message, seen). status: passed, not done, wrong."""
    if exercise.number not in EXAMS:
        raise Fault(f"exercise {exercise.number} has no exam in course/chapter{exercise.chapter}.py")
    exam = EXAMS[exercise.number]
    kind, seen = testimony(exercise, to_grade(folder, exercise), seed, limit)
    if kind == "not done" and f"exercise {exercise.number}:" in seen:
        return kind, "", None
    if kind == "not done":
        return "wrong", f"needs another exercise first: {seen}", None
    canonical = read(os.path.join(HERE, exercise.file))
    if kind == "wrong":                                                   # does a well-known mistake fail like this?
        for old, new, says in mistakes:
            kind, failed = testimony(exercise, edit(canonical, exercise, old, new), seed, limit)
            if kind == "wrong" and failed.split(" (in: ")[0] == seen.split(" (in: ")[0]:
                return "wrong", f"{says} [{seen}]", None
        return "wrong", seen, None
    wanted = specified(exercise.number, seed)
    fault = compare({key: seen.get(key, []) for key in wanted}, wanted, exam.tolerance, shapes_only=True)
    if not fault:
        try:
            fault = next((says for holds, says in exam.laws({key: value if len(value) > 1 else value[0]
                                                             for key, value in seen.items()}) if not holds), None)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            fault = f"its numbers cannot be judged ({type(error).__name__})"
    fault = fault or compare(seen, wanted, exam.tolerance)
    if not fault:
        return "passed", "", seen
    for old, new, says in mistakes:                                       # is it a well-known one?
        kind, other = testimony(exercise, edit(canonical, exercise, old, new), seed, limit)
        if kind == "seen" and other.keys() == seen.keys() and not compare(seen, other, 1e-6):
            return "wrong", says, seen
    return "wrong", fault, seen


@functools.lru_cache(maxsize=None)                                        # check asks for each mistake several times
def testimony(exercise, source, seed, limit):
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, exercise.file), "w", encoding="utf-8") as file:
            file.write(source)
        return hear(folder, exercise.number, seed, limit)


def edit(canonical, exercise, old, new):
    """The canonical file with `old` become `new` in the exercise's function. Raises Fault unless it is there once."""
    lines = lines_of(canonical)
    first, last = body(find(ast.parse(canonical), exercise.name)[-1], lines)
    code = "\n".join(lines[first - 1:last])
    if code.count(old) != 1:
        raise Fault(f"course/mutants.py: exercise {exercise.number}: {old!r} is {code.count(old)} times in "
                    f"{exercise.target}")
    return "\n".join(lines[:first - 1] + lines_of(code.replace(old, new)) + lines[last:]) + "\n"


def mistakes_of(number):
    try:
        from mutants import MUTANTS                                       # students' copies have none
    except ImportError:
        return ()
    return MUTANTS.get(number, ())


def grade(args):
    rows, folder = [], os.path.abspath(args.folder)
    pictures = os.path.join(folder, "pictures")
    for exercise in chosen(args.chapter, folder):
        try:
            status, says, seen = judge_one(exercise, folder, args.seed, args.limit, mistakes_of(exercise.number))
        except Fault as error:
            status, says, seen = "wrong", str(error), None
        except Exception as error:                                        # whatever it was: the others are graded
            status, says, seen = "wrong", f"cannot be judged: {type(error).__name__}", None
        points = exercise.points if status == "passed" else 0
        rows.append(dict(exercise=exercise.number, title=exercise.title, chapter=exercise.chapter, status=status,
                         points=points, of=exercise.points, message=says))
        print(f"{exercise.number}  {points}/{exercise.points}  {status:8s}  {exercise.title}" + (f": {says}" if says
                                                                                                 else ""), flush=True)
        if status == "passed" and not args.no_pictures:
            draw(EXAMS[exercise.number], exercise, seen, pictures)
    for chapter, title in CHAPTERS.items():
        part = [row for row in rows if row["chapter"] == chapter]
        if part:
            points, of = (sum(row[key] for row in part) for key in ("points", "of"))
            print(f"chapter {chapter}, {title}: {points} of {of} points")
    points, of = sum(row["points"] for row in rows), sum(row["of"] for row in rows)
    print(f"{points} of {of} points" + ("" if args.no_pictures or not points else f"; pictures in {pictures}"))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(dict(points=points, of=of, seed=args.seed, exercises=rows), file, indent=1)
    return rows


def draw(exam, exercise, seen, folder):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    os.makedirs(folder, exist_ok=True)
    figure, axis = plt.subplots(figsize=(5, 3.4))
    exam.picture({key: value if len(value) > 1 else value[0] for key, value in seen.items()}, axis)
    axis.set_title(f"{exercise.number} {exercise.title}", fontsize=10)
    figure.tight_layout()
    figure.savefig(os.path.join(folder, f"{exercise.number}.png"), dpi=90)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ the lecturer's own test

def check(args):
    """Full marks for the project's own files; stubs that say their own number; every usual mistake found and named."""
    from mutants import MUTANTS
    begun, faults = time.time(), []

    def expect(holds, says):
        if not holds:
            faults.append(says)
            print("FAULT  " + says, flush=True)

    canonical = {exercise.file: read(os.path.join(HERE, exercise.file)) for exercise in EXERCISES}
    numbers = [exercise.number for exercise in EXERCISES]
    expect(set(numbers) == set(EXAMS) == set(MUTANTS) and len(set(numbers)) == len(numbers),
           "the table, the exams and course/mutants.py do not name the same exercises")
    answers = read(os.path.join(COURSE, "answers.md"))
    with tempfile.TemporaryDirectory() as folder:
        args.folder, args.chapter, args.limit, args.json, args.no_pictures = HERE, None, 20, None, True
        rows = grade(args)
        seconds = time.time() - begun
        expect(seconds < 90, f"grading everything took {seconds:.0f} seconds, want under 90")
        for row in rows:
            expect(row["status"] == "passed", f"{row['exercise']}: ours is {row['status']}: {row['message']}")

        args.folder = os.path.join(folder, "all")
        make(args)
        for name in sorted(PROJECT):
            kind, says = hear_import(args.folder, name)
            expect(kind == "seen", f"the stripped copy: import {name}: {says}")
        for exercise in EXERCISES:
            status, says, _ = judge_one(exercise, args.folder, args.seed, args.limit)
            expect(status == "not done", f"{exercise.number}: its stub is {status}: {says}")
            expect(f"\n## {exercise.number} " in answers, f"{exercise.number}: no answer in course/answers.md")
        for chapter in CHAPTERS:                                          # a chapter's copy: all else as it was
            for file, source in canonical.items():
                part = [e for e in chosen(chapter) if e.file == file]
                expect(put_back(strip(source, part), source, part) == source,
                       f"chapter {chapter}: {file} is not the same when its exercises are put back")
    killed = 0
    for exercise in EXERCISES:
        mutants = MUTANTS.get(exercise.number, ())
        expect(len(mutants) >= 3, f"{exercise.number}: {len(mutants)} usual mistakes, want three or more")
        for old, new, says in mutants:
            with tempfile.TemporaryDirectory() as folder:
                with open(os.path.join(folder, exercise.file), "w", encoding="utf-8") as file:
                    file.write(edit(canonical[exercise.file], exercise, old, new))
                for other in EXERCISES:                                   # elsewhere it is put back: it costs nothing
                    if other.file == exercise.file and other is not exercise:
                        expect(to_grade(folder, other) == canonical[other.file],
                               f"{exercise.number}, {says!r}: touches exercise {other.number}")
                status, message, _ = judge_one(exercise, folder, args.seed, args.limit, mutants)
            expect(status == "wrong", f"{exercise.number}, {says!r}: is {status}")
            expect(status != "wrong" or message.startswith(says), f"{exercise.number}, {says!r}: is called {message!r}")
            killed += status == "wrong"
    print(f"{len(EXERCISES)} exercises, {sum(e.points for e in EXERCISES)} points; grading {seconds:.0f} s; "
          f"{killed} usual mistakes lose their points; {time.time() - begun:.0f} s in all; {len(faults)} faults")
    return faults


def hear_import(folder, name):
    EXAMS["import"] = type("Import", (), dict(see=staticmethod(lambda m, r: dict(it=float(bool(getattr(m, name)))))))
    return hear(folder, "import", 0, 60)


def main():
    torch.set_num_threads(1)                                              # a forked process must not wait for threads
    parser = argparse.ArgumentParser()
    programs = parser.add_subparsers(dest="what", required=True)
    program = programs.add_parser("grade")
    program.add_argument("folder")
    program.add_argument("--chapter", type=int)
    program.add_argument("--limit", type=int, default=20)
    program.add_argument("--json")
    program.add_argument("--no-pictures", action="store_true")
    for program in (program, programs.add_parser("check")):
        program.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        for exercise in chosen(getattr(args, "chapter", None), getattr(args, "folder", None)):
            importlib.import_module(exercise.file[:-3])                   # what takes long, before forking
        sys.exit(bool(check(args)) if args.what == "check" else grade(args) and 0)
    except (Fault, OSError) as error:
        print(f"exercises.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
