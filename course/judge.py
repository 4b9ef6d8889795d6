"""The judge: look at shapes, laws and equality, give points, draw pictures. It never imports the student's file."""
import ast
import functools
import os

import torch

from plumbing import UserError
from plumbing.files import writable_folder, write_json
from plumbing.pictures import pyplot, save_figure

from course.conduct import text_of_bytes
from course.exams import EXAMS
from course.exercises import CHAPTERS, EXERCISES, chosen
from course.source import HERE, edit, find, parse, put_back, read
from course.witness import LECTURE, imported, prepare, specification, testimony

try:
    from course.mutants import MUTANTS
except ImportError:                                                       # a student's copy has none
    MUTANTS = {}


def to_grade(folder, exercise):
    """Return the student's file with all other exercises put back. Raises UserError: no file, or not Python."""
    path = os.path.join(folder, exercise.file)
    source, canonical = read(path), read(os.path.join(HERE, exercise.file))
    try:
        parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(not_python(exercise.file, error)) from None
    if not find(parse(source), exercise.name):
        raise UserError(f"{exercise.file} has no plain def of {exercise.name}")
    return put_back(source, canonical, [other for other in EXERCISES if other.file == exercise.file
                                        and other is not exercise])


def not_python(file, error):
    """Return in one line why a file cannot be read as Python."""
    if isinstance(error, UserError):
        return str(error)
    line = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
    return f"{file}{line}: {getattr(error, 'msg', None) or 'not Python'}"


# ------------------------------------------------------------------------------------------ the judgement

def differs(one, other, tolerance, band=None):
    """Return how two tensors differ, in words, or None if they are equal within the tolerance. band(place) names the
    part of the tensor."""
    if one.shape != other.shape:
        return f"shape {tuple(one.shape)}, want {tuple(other.shape)}"
    if one.dtype != other.dtype:
        return f"{one.dtype}, want {other.dtype}".replace("torch.", "")
    close = torch.isclose(one.double(), other.double(), rtol=tolerance, atol=tolerance, equal_nan=True)
    if bool(close.all()):
        return None
    at = tuple(torch.nonzero(~close)[0].tolist()) if one.ndim else ()
    place = (f" at {list(at)}" if at else "") + (f" of {band(at)}" if at and band else "")
    return f"{float(one[at]):.6g}{place}, want {float(other[at]):.6g}"


def compare(seen, wanted, tolerance, shapes_only=False, band=None):
    """Return the first difference of two testimonies, in words, or None. band: of an exam, see exams.py."""
    for key, tensors in wanted.items():
        if len(seen.get(key, ())) != len(tensors):
            return f"{key}: {len(seen.get(key, ()))} tensors, want {len(tensors)}"
        for i, (one, other) in enumerate(zip(seen[key], tensors)):
            if shapes_only and one.shape == other.shape and one.dtype == other.dtype:
                continue
            if difference := differs(one, other, tolerance, band and functools.partial(band, key, i)):
                return f"{key}: {difference}"
    return None


def singles(seen):
    """Unpack the lists that hold one tensor, as laws and pictures want them."""
    return {key: value if len(value) > 1 else value[0] for key, value in seen.items()}


def fault_of(exam, seen, wanted):
    """Return what is wrong with these numbers: shapes first, then how the function behaves, then laws, then equality,
    then what gets no gradient. None if all is right."""
    if fault := compare({key: seen.get(key, []) for key in wanted}, wanted, exam.tolerance, shapes_only=True):
        return fault
    if fault := text_of_bytes(seen.get("acts", ())):
        return fault
    try:
        fault = next((message for holds, message in exam.laws(singles(seen)) if not holds), None)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        fault = f"its numbers cannot be judged ({type(error).__name__})"
    return fault or compare(seen, wanted, exam.tolerance, band=exam.band) or text_of_bytes(seen.get("untaught", ()))


def judge_one(exercise, folder, seed, limit, mistakes=(), ask=testimony):
    """Judge one exercise -> (status, message, seen). The status is passed, not done or wrong.

    mistakes: [(old, new, name), ...]. If the numbers, or the error, are those of a mistake, the message is its name.
    ask: runs the exam on the student's file.
    """
    if exercise.number not in EXAMS:
        raise UserError(f"exercise {exercise.number} has no exam in course/chapter{exercise.chapter}.py")
    kind, seen = ask(exercise, to_grade(folder, exercise), seed, limit)
    if kind == "not done" and f"exercise {exercise.number}:" in seen:
        return kind, "", None
    if kind == "not done":
        return "wrong", f"needs another exercise first: {seen}", None
    canonical = read(os.path.join(HERE, exercise.file))
    mistaken = ((name, *testimony(exercise, edit(canonical, exercise, old, new), seed, limit))
                for old, new, name in mistakes)
    if kind == "wrong":
        for name, how, message in mistaken:
            if how == "wrong" and message.split(" (in: ")[0] == seen.split(" (in: ")[0]:
                return "wrong", f"{name} [{seen}]", None
        return "wrong", seen, None
    right, wanted = specification(exercise, seed, limit)
    if right != "seen":                                                   # only in a student's own copy
        return "wrong", f"cannot be judged: {wanted}", None
    fault = fault_of(EXAMS[exercise.number], seen, wanted)
    if not fault:
        return "passed", "", seen
    for name, how, other in mistaken:
        if how == "seen" and other.keys() == seen.keys() and not compare(seen, other, 1e-6):
            return "wrong", name, seen
    return "wrong", fault, seen


def mistakes_of(number):
    """Return the typical mistakes of an exercise; students' copies have none."""
    return MUTANTS.get(number, ())


# ------------------------------------------------------------------------------------------ grading

def verdict_of(exercise, folder, seed, limit, ask=testimony):
    """Judge one exercise as judge_one does, whatever goes wrong."""
    try:
        return judge_one(exercise, folder, seed, limit, mistakes_of(exercise.number), ask)
    except UserError as error:
        return "wrong", str(error), None
    except Exception as error:                                            # the other exercises are graded all the same
        return "wrong", f"cannot be judged: {type(error).__name__}", None


def verdicts(folder, seed, limit):
    """Return a function: exercise -> (status, message, numbers). It judges each exercise of this folder once."""
    inside = os.path.samefile(folder, HERE)                               # a student's own copy: nothing is put back

    @functools.lru_cache(maxsize=None)
    def verdict(exercise):
        if inside and (blocker := import_fault(exercise.file, limit)):
            return ("wrong" if blocker.startswith(exercise.file) else "blocked"), blocker, None
        status, message, seen = verdict_of(exercise, folder, seed, limit)
        if inside and status == "wrong":
            failed = [other for other in EXERCISES if other.number in exercise.needs and verdict(other)[0] != "passed"]
            roots = [other for other in failed if verdict(other)[0] != "blocked"] or failed
            if roots:
                return "blocked", f"by {', '.join(other.number for other in roots)}", None
        return status, message, seen
    return verdict


@functools.lru_cache(maxsize=None)
def import_fault(file, limit, asked=()):
    """Return why a file of a student's own copy cannot be imported, or None. A file that it imports counts first."""
    try:
        tree = parse(read(os.path.join(HERE, file)))
    except (UserError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return not_python(file, error)
    kind, message = imported(file, limit)
    if kind == "seen":
        return None
    names = [name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
             for name in ([node.module] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names])]
    others = [f"{name}.py" for name in names if name in LECTURE and f"{name}.py" not in asked]
    return next((fault for other in others if (fault := import_fault(other, limit, (*asked, file)))), message)


def row_of(exercise, status, message):
    """Return the row of an exercise in the table of points."""
    return dict(exercise=exercise.number, title=exercise.title, chapter=exercise.chapter, status=status,
                points=exercise.points if status == "passed" else 0, of=exercise.points, message=message)


def grade(folder, chapters=None, seed=0, limit=20, pictures=True, json_path=None, only=None):
    """Grade a student's copy: print a line an exercise and the points, draw pictures. Return the rows.

    only: the number of a single exercise.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    if not any(os.path.exists(os.path.join(folder, e.file)) for e in EXERCISES):
        raise UserError(f"{folder}: holds none of the exercises' files")
    if json_path:                                                         # a bad path must not wait for the grading
        writable_folder(os.path.dirname(json_path) or ".", "--json")
    exercises = [e for e in chosen(chapters, folder) if only in (None, e.number)]
    picture_folder = os.path.join(os.path.abspath(folder), "pictures")
    if pictures and os.path.exists(picture_folder) and not os.path.isdir(picture_folder):
        raise UserError(f"{picture_folder}: not a folder; rename it or add --no-pictures")
    prepare()
    rows, verdict, drawn = [], verdicts(folder, seed, limit), False
    for exercise in exercises:
        status, message, seen = verdict(exercise)
        rows.append(row_of(exercise, status, message))
        points = rows[-1]["points"]
        print(f"{exercise.number}  {points}/{exercise.points}  {status:8s}  {exercise.title}"
              + (f": {message}" if message else ""), flush=True)
        if seen and pictures:
            _, wanted = specification(exercise, seed, limit)
            draw(exercise, status, seen, wanted, os.path.join(picture_folder, f"{exercise.number}.png"))
            drawn = True
    points, of = report(rows)
    print(f"{points} of {of} points" + (f"; pictures in {picture_folder}" if drawn else ""))
    if blocked := sum(row["of"] for row in rows if row["status"] == "blocked"):
        print(f"{blocked} points are blocked: they cannot be judged before what blocks them is right")
    if json_path:
        write_json(json_path, dict(points=points, of=of, seed=seed, exercises=rows))
    return rows


def report(rows):
    """Print the points of each chapter -> (points, possible points) of all."""
    for chapter, title in CHAPTERS.items():
        part = [row for row in rows if row["chapter"] == chapter]
        if part:
            points, of = (sum(row[key] for row in part) for key in ("points", "of"))
            print(f"chapter {chapter}, {title}: {points} of {of} points")
    return (sum(row[key] for row in rows) for key in ("points", "of"))


def draw(exercise, status, seen, wanted, path):
    """Draw the picture of a correct exercise; of a wrong one what was made, beside what was wanted."""
    sides = [("", seen)] if status == "passed" else [("yours", seen), ("wanted", wanted)]
    figure, axes = pyplot().subplots(1, len(sides), figsize=(6 * len(sides), 3.6), squeeze=False)
    for axis, (name, numbers) in zip(axes[0], sides):
        try:
            EXAMS[exercise.number].picture(singles(numbers), axis)
        except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            axis.clear()
            axis.text(0.5, 0.5, "cannot be drawn", ha="center")
        axis.set_title(name, fontsize=10, loc="left")
    figure.suptitle(f"{exercise.number} {exercise.title}", fontsize=10)
    save_figure(figure, path, dpi=90)
