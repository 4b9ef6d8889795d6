"""The lecturer's own test: full marks for the project's files, stubs that fail, and every typical mistake named."""
import ast
import concurrent.futures
import contextlib
import functools
import glob
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time

from plumbing import UserError

from course.exams import EXAMS, Inputs
from course.exercises import CHAPTERS, EXERCISES, chosen, numbered
from course.handout import files_of_a_copy, make
from course.judge import MUTANTS, grade, judge_one, mistakes_of, to_grade
from course.source import HERE, edit, put_back, read, strip, text_of
from course.witness import Modules, prepare

LIMIT = 20                                                                # seconds for an exercise
SMALL = "glyphs64", "glyphs64_unet", "glyphs16", "glyphs64_nested", "glyphs64_sr", "glyphs64_text"       # presets
LONGEST = 90                                                              # seconds for grading everything


def canonical(exercise):
    return read(os.path.join(HERE, exercise.file))


def complete():
    """Yield (holds, message): do the table, the exams, the mistakes and the answers name the same exercises?"""
    numbers = [exercise.number for exercise in EXERCISES]
    yield (set(numbers) == set(EXAMS) == set(MUTANTS) and len(set(numbers)) == len(numbers),
           "the table, the exams and course/mutants.py do not name the same exercises")
    answers = read(os.path.join(HERE, "course", "answers.md"))
    for number in numbers:
        yield f"\n## {number} " in answers, f"{number}: no answer in course/answers.md"
        yield len(mistakes_of(number)) >= 3, f"{number}: {len(mistakes_of(number))} typical mistakes, want three"


def full_marks(seed):
    """Yield (holds, message): does the project itself get all points, soon enough?"""
    start = time.time()
    rows = grade(HERE, seed=seed, limit=LIMIT, pictures=False)
    seconds = time.time() - start
    yield seconds < LONGEST, f"grading everything took {seconds:.0f} seconds, want under {LONGEST}"
    for row in rows:
        yield row["status"] == "passed", f"{row['exercise']}: ours is {row['status']}: {row['message']}"


def functions_run(exercise, seed):
    """Return the numbers of the other exercises whose functions an exam runs, in `see` or in `spec`."""
    modules, exam, run = Modules(), EXAMS[exercise.number], set()
    codes = {functools.reduce(getattr, other.target.split("."), modules).__code__: other.number for other in EXERCISES}

    def note(frame, event, argument):
        if event == "call" and frame.f_code in codes:
            run.add(codes[frame.f_code])
    sys.setprofile(note)
    try:
        exam.see(modules, Inputs(seed))
        exam.spec(modules, Inputs(seed))
    finally:
        sys.setprofile(None)
    return run - {exercise.number}


def needs(seed):
    """Yield (holds, message): does the table name what each exercise needs?"""
    for exercise in EXERCISES:
        run = functions_run(exercise, seed)
        yield set(exercise.needs) == run, f"{exercise.number} needs {exercise.needs}, its exam runs {sorted(run)}"


def stubs(seed):
    """Yield (holds, message): can the copy of all chapters be imported, and does each stub give its own number?"""
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "all")
        make(copy)
        names = [path[:-3].replace("/", ".") for path in files_of_a_copy()
                 if path.endswith(".py") and ("/" not in path or path.startswith("plumbing/"))]
        code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)"
        done = subprocess.run([sys.executable, "-c", code, *names], cwd=copy, capture_output=True, text=True)
        yield done.returncode == 0, f"the copy cannot be imported: {done.stderr.strip().splitlines()[-1:]}"
        for exercise in EXERCISES:
            status, message, _ = judge_one(exercise, copy, seed, LIMIT)
            yield status == "not done", f"{exercise.number}: its stub is {status}: {message}"


def answers_kept_back():
    """Yield (holds, message): are the notes out of the copy, with the words of the answers, and is no code lost?"""
    answers = read(os.path.join(HERE, "course", "answers.md"))
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "all")
        make(copy)
        texts = {file: read(os.path.join(copy, file)) for file in glob.glob("*.py", root_dir=copy)}
        exams = {file: read(os.path.join(copy, file)) for file in glob.glob("course/chapter*.py", root_dir=copy)}
    plain = {file: re.sub(r"[\s#]+", " ", text) for file, text in {**texts, **exams}.items()}
    for exercise in EXERCISES:
        words = re.search(rf"\n## {exercise.number} .*\n<!-- not in the copy: (.*) -->\n", answers)
        yield words is not None, f"{exercise.number}: course/answers.md names no words that are not in the copy"
        for word in words[1].split("; ") if words else ():
            for file in (file for file, text in plain.items() if word in text):
                yield False, f"{exercise.number}: {file} of the copy has the answer's words {word!r}"
    for file, text in texts.items():
        ours = strip(read(os.path.join(HERE, file)), [e for e in EXERCISES if e.file == file])
        yield "Note:" not in text, f"{file} of the copy has a note"
        yield without_docstrings(ours) == without_docstrings(text), f"{file}: code is lost with the notes"


def without_docstrings(source):
    """Return the syntax tree of a source as text, each docstring empty."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return ast.dump(tree)


def restored():
    """Yield (holds, message): does cutting out a chapter and putting it back give the same file?"""
    for chapter in CHAPTERS:
        exercises = chosen([chapter])
        for file in sorted({exercise.file for exercise in exercises}):
            part = [exercise for exercise in exercises if exercise.file == file]
            source = read(os.path.join(HERE, file))
            yield (put_back(strip(source, part), source, part) == source,
                   f"chapter {chapter}: {file} differs after its exercises are cut out and put back")


FAULTY = {"def f(:": "schedule.py, line 1: ", "raise SystemExit(0)": "schedule.py cannot be imported: SystemExit",
          "while True: pass": "schedule.py cannot be imported: not finished"}


def in_a_copy(seed):
    """Yield (holds, message): in a solved copy, does a mistake, or a file that cannot be imported, cost no others?"""
    with tempfile.TemporaryDirectory() as folder:
        copy = os.path.join(folder, "solved")
        make(copy)
        for file in {exercise.file for exercise in EXERCISES}:
            shutil.copy(os.path.join(HERE, file), copy)
        wrong = numbered("1.2")
        sources = {"1.2 is wrong": edit(canonical(wrong), wrong, *mistakes_of("1.2")[1][:2])}
        sources.update({fault: fault + "\n" + canonical(wrong) for fault in FAULTY})
        for name, source in sources.items():
            with open(os.path.join(copy, wrong.file), "w", encoding="utf-8") as file:
                file.write(source)
            if name in FAULTY:                                            # the chapters of schedule.py and of dwt.py
                with open(os.path.join(copy, "EXERCISES.md"), "w", encoding="utf-8") as file:
                    file.writelines(f"### {e.number}\n" for e in EXERCISES if e.chapter in (1, 3))
            limit = str(10 if name in FAULTY else LIMIT)                  # one of them waits for it
            done = subprocess.run([sys.executable, "-m", "course", "grade", ".", "--no-pictures", "--limit", limit,
                                   "--seed", str(seed), "--json", "points.json"], cwd=copy, capture_output=True,
                                  text=True)
            yield done.returncode == 0 and not done.stderr, f"in a copy, {name}: {done.stderr.strip()[-200:]}"
            if done.returncode == 0:
                rows = json.loads(read(os.path.join(copy, "points.json")))["exercises"]
                yield from (verdict_in_a_copy(name, row) for row in rows)


def verdict_in_a_copy(name, row):
    """Return (holds, message): is this row of the table right if `name` is the only fault of the copy?"""
    exercise = numbered(row["exercise"])
    if name in FAULTY:
        status = "wrong" if exercise.file == "schedule.py" else "blocked" if exercise.number == "3.5" else "passed"
        starts = "" if status == "passed" else FAULTY[name]
    else:
        status = "wrong" if exercise.number == "1.2" else "blocked" if "1.2" in exercise.needs else "passed"
        starts = "by 1.2" if status == "blocked" else ""
    fine = row["status"] in (status, "passed" if status == "blocked" and name not in FAULTY else status)
    return (fine and (row["status"] == "passed" or row["message"].startswith(starts)),
            f"in a copy, {name}: {exercise.number} is {row['status']}: {row['message']}")


def write_second(folder):
    """Write the lecture's files with the second solutions of their exercises into a folder."""
    second = read(os.path.join(HERE, "course", "second.py"))
    for file in {exercise.file for exercise in EXERCISES}:
        with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
            out.write(put_back(read(os.path.join(HERE, file)), second, [e for e in EXERCISES if e.file == file]))


def second_solutions(seed):
    """Yield (holds, message): are there two right solutions of each exercise?"""
    with tempfile.TemporaryDirectory() as folder:
        write_second(folder)
        for exercise in EXERCISES:
            yield (text_of(to_grade(folder, exercise), exercise.name) != text_of(canonical(exercise), exercise.name),
                   f"{exercise.number}: no second solution in course/second.py")
        for row in grade(folder, seed=seed, limit=LIMIT, pictures=False):
            yield row["status"] == "passed", f"{row['exercise']}: the second solution is wrong: {row['message']}"


def training(preset):
    """Yield (holds, message): does a small preset train for ten steps with the second solutions?"""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(os.path.join(HERE, "plumbing"), os.path.join(folder, "plumbing"))
        for path in glob.glob("*.py", root_dir=HERE):
            shutil.copy(os.path.join(HERE, path), folder)
        write_second(folder)
        done = subprocess.run([sys.executable, "train.py", "--preset", preset, "--steps", "10", "--batch", "4",
                               "--sample-steps", "2", "--held-out-every", "0", "--out", "run"], cwd=folder,
                              capture_output=True, text=True)
        yield done.returncode == 0, f"with the second solutions {preset} does not train: {done.stderr.strip()[-300:]}"


def mistakes(number, seed):
    """Yield (holds, message): does each typical mistake lose its points, and no others, and get its own name?"""
    exercise = numbered(number)
    for old, new, name in mistakes_of(number):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, exercise.file), "w", encoding="utf-8") as file:
                file.write(edit(canonical(exercise), exercise, old, new))
            for other in EXERCISES:
                if other.file == exercise.file and other is not exercise:
                    yield (to_grade(folder, other) == canonical(exercise),
                           f"{number}, {name!r}: touches exercise {other.number}")
            status, message, _ = judge_one(exercise, folder, seed, LIMIT, mistakes_of(number))
        yield status == "wrong", f"{number}, {name!r}: is {status}"
        yield status != "wrong" or message.startswith(name), f"{number}, {name!r}: is called {message!r}"


def faults_of(part, *args):
    """Return the messages of what does not hold in one part of the check."""
    with contextlib.redirect_stdout(io.StringIO()):                       # what `grade` and `make` print
        return [message for holds, message in part(*args) if not holds]


def check(seed=0):
    """Print each fault and a summary. Return the number of faults."""
    if not MUTANTS:
        raise UserError("check needs course/mutants.py, which students' copies lack")
    start, faults, n = time.time(), 0, sum(map(len, MUTANTS.values()))
    prepare()
    parts = [(in_a_copy, seed), (full_marks, seed), (second_solutions, seed), (complete,), (stubs, seed), (restored,),
             (answers_kept_back,),
             (needs, seed), *((training, preset) for preset in SMALL),
             *((mistakes, exercise.number, seed) for exercise in EXERCISES)]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for found in [pool.submit(faults_of, *part) for part in parts]:
            for message in found.result():
                faults += 1
                print("FAULT  " + message, flush=True)
    print(f"{len(EXERCISES)} exercises, {sum(e.points for e in EXERCISES)} points; {n} typical mistakes; "
          f"{time.time() - start:.0f} s in all; {faults} faults")
    return faults
