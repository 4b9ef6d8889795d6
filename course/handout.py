"""Make a student's copy: the project with the bodies of the exercises' functions cut out. Standard library only."""
import glob
import os
import shutil

from plumbing import UserError

from course.exercises import CHAPTERS, chosen
from course.source import HERE, read, strip, without_notes

COPIED = ("*.py", "LICENSE", "pytest.ini", "requirements.txt", "course/*.py", "course/reading_a_run.md",
          "course/reading_a_run.png", "plumbing/*.py", "tests/**/*.py", "pretrained/**")
# Kept back: the answers; the typical mistakes, each of which quotes our code; the second solutions; how the plots of
# reading_a_run.md, which students do get, were made; and the tests of what the copy lacks (these files, README.md,
# PAPERS.md, benchmarks/).
KEPT_BACK = ("course/answers.md", "course/mutants.py", "course/second.py", "course/reading_a_run.py",
             *(f"tests/plumbing/test_{name}.py" for name in ("course", "readme", "papers", "results", "peers",
                                                             "paper_tables")))


def statements(exercises):
    """Return the text of EXERCISES.md."""
    text = ["# Exercises", "", "Grade your work with `python -m course grade .` in this folder. Each correct function "
            "earns its points and a picture in `pictures/`. Some exercises call others: in this copy, do those first."]
    for number, title in CHAPTERS.items():
        rows = [exercise for exercise in exercises if exercise.chapter == number]
        if rows:
            text += ["", f"## {number} {title}"]
        for e in rows:
            lines = "1 line" if e.lines == 1 else f"{e.lines} lines"
            text += ["", f"### {e.number} {e.title}", "",
                     f"`{e.file}`, `{e.name}`; {e.paper}; {e.points} points, our solution has {lines}, about "
                     f"{e.minutes} minutes.", "", e.task, "", f"*Hint.* {e.hint}", "", f"*In writing.* {e.question}"]
    return "\n".join(text) + "\n"


def files_of_a_copy():
    """Return the paths, relative to the project, of what students get."""
    paths = {path for pattern in COPIED for path in glob.glob(pattern, root_dir=HERE, recursive=True)}
    return sorted(path for path in paths - {*KEPT_BACK} if os.path.isfile(os.path.join(HERE, path)))


def make(folder, chapter=None):
    """Write a student's copy into a new folder: of one chapter, or of all."""
    if not os.path.exists(os.path.join(HERE, "course", "mutants.py")):
        raise UserError("this is a student's copy: make another one from the project itself")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{folder}: exists already; name a new folder")
    exercises = chosen(chapter)
    for path in files_of_a_copy():
        os.makedirs(os.path.join(folder, os.path.dirname(path)), exist_ok=True)
        shutil.copyfile(os.path.join(HERE, path), os.path.join(folder, path))
    for file in glob.glob("*.py", root_dir=HERE):
        source = without_notes(strip(read(os.path.join(HERE, file)), [e for e in exercises if e.file == file]))
        with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
            out.write(source)
    with open(os.path.join(folder, "EXERCISES.md"), "w", encoding="utf-8") as out:
        out.write(statements(exercises))
    print(f"{folder}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points; begin with "
          f"{os.path.join(folder, 'EXERCISES.md')}")
