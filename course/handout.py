"""Make a student's copy: the project with the bodies of the exercises' functions cut out. Pack what is handed in."""
import glob
import hashlib
import os
import re
import shutil
import zipfile

from plumbing import UserError
from plumbing.files import read_json, whole_file, write_json

from course import notebook
from course.exercises import CHAPTERS, chosen, in_order
from course.source import HERE, read, strip, without_notes

COPIED = ("*.py", "LICENSE", "pytest.ini", "requirements.txt", "course/*.py", "course/reading_a_run.md",
          "course/reading_a_run.png", "plumbing/*.py", "tests/**/*.py", "pretrained/**")
# Kept back: the answers; the typical mistakes, each of which quotes our code; the second solutions; how the plots of
# reading_a_run.md, which students do get, were made; and the tests of what the copy lacks (these files, README.md,
# PAPERS.md, benchmarks/).
KEPT_BACK = ("course/answers.md", "course/mutants.py", "course/second.py", "course/reading_a_run.py",
             *(f"tests/plumbing/test_{name}.py" for name in ("course", "course_class", "course_gradescope",
                                                             "course_notebook", "course_page", "gpu_day", "readme",
                                                             "reading", "papers", "results", "peers",
                                                             "paper_tables")))
HANDED_OUT = os.path.join("course", "handed_out.json")                    # {file of a copy: its fingerprint}


def table(exercises):
    """Return the table of exercises in the order of work."""
    rows = ["| exercise | needs | level | minutes | points |", "|---|---|---|---|---|"]
    return "\n".join(rows + [f"| {e.number} {e.title} | {' '.join(e.needs)} | {e.level} | {e.minutes} | {e.points} |"
                             for e in in_order(exercises)])


def statement(e, equations=()):
    """Return the lines of one exercise. equations: the (page, number) pairs that have a place in reading/."""
    page = e.file[:-3]

    def link(number):
        return f"[{number[0]}](reading/{page}.html#eq-{number[0]})" if (page, number[0]) in equations else number[0]
    paper = re.sub(r"(?<=eq\. )\d( and \d)?\b", lambda numbers: re.sub(r"\d", link, numbers[0]), e.paper)
    lines = "1 line" if e.lines == 1 else f"{e.lines} lines"
    return [f"### {e.number} {e.title}", "",
            f"[`{e.file}`](reading/{page}.html), [`{e.name}`](reading/{page}.html#{e.name}); {paper}.", "",
            f"{e.points} points; needs: {' '.join(e.needs) or 'nothing'}; level {e.level} of 3; about {e.minutes} "
            f"minutes; our solution has {lines}.", "", e.task, "", "```", e.equation, "```", "", f"$${e.latex}$$", "",
            f"*Hint.* {e.hint}", "", f"*In writing.* {e.question}"]


def statements(exercises, equations):
    """Return the text of EXERCISES.md: course/page.md, then the chapters, each with its part of course/beyond.md."""
    text = [read(os.path.join(HERE, "course", "page.md")).replace("{table}", table(exercises)).rstrip()]
    beyond = read(os.path.join(HERE, "course", "beyond.md"))
    beyond = dict(re.findall(r"^## (\d) (.*?)\s*(?=^## |\Z)", beyond, re.MULTILINE | re.DOTALL))
    for number, title in CHAPTERS.items():
        rows = [exercise for exercise in exercises if exercise.chapter == number]
        text += ["", f"## {number} {title}"] if rows else []
        for e in rows:
            text += ["", *statement(e, equations)]
        if rows:
            text += ["", "### Beyond the paper, for no points: " + beyond[str(number)].replace("\n", "\n\n", 1)]
    return "\n".join(text) + "\n"


def answer_sheet(exercises):
    """Return the text of ANSWERS.md, in which students write."""
    parts = [f"## {e.number} {e.title}\n\n*{e.question}*\n" for e in exercises]
    return "# Answers to the written questions\n\nName:\n\nHelp that I had:\n\n" + "\n\n".join(parts)


def files_of_a_copy():
    """Return the paths, relative to the project, of what students get."""
    paths = {path for pattern in COPIED for path in glob.glob(pattern, root_dir=HERE, recursive=True)}
    return sorted(path for path in paths - {*KEPT_BACK} if os.path.isfile(os.path.join(HERE, path)))


def make(folder, chapters=None):
    """Write a student's copy into a new folder: of some chapters, or of all."""
    if not os.path.exists(os.path.join(HERE, "course", "mutants.py")):
        raise UserError("this is a student's copy: make another one from the project itself")
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f"{folder}: exists already; name a new folder")
    from reading import __main__ as pages                                 # it imports PyTorch, which takes seconds
    exercises = chosen(chapters)
    for path in files_of_a_copy():
        os.makedirs(os.path.join(folder, os.path.dirname(path)), exist_ok=True)
        shutil.copyfile(os.path.join(HERE, path), os.path.join(folder, path))
    for file in glob.glob("*.py", root_dir=HERE):
        source = without_notes(strip(read(os.path.join(HERE, file)), [e for e in exercises if e.file == file]))
        with open(os.path.join(folder, file), "w", encoding="utf-8") as out:
            out.write(source)
    equations = pages.build_lecture(folder).equations
    for name, text in (("EXERCISES.md", statements(exercises, equations)), ("ANSWERS.md", answer_sheet(exercises))):
        with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
            out.write(text)
    notebook.write(folder, exercises, lambda e: statement(e, equations))
    handed_out = (*files_of_a_copy(), "EXERCISES.md", "ANSWERS.md")
    write_json(os.path.join(folder, HANDED_OUT), {path: digest(os.path.join(folder, path)) for path in handed_out})
    print(f"{folder}: {len(exercises)} exercises, {sum(e.points for e in exercises)} points; begin with "
          f"{os.path.join(folder, 'EXERCISES.md')}")


def digest(path):
    """Return a fingerprint of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def pack(to):
    """Write the hand-in of the copy in this folder: a zip of the files that the student changed."""
    if not os.path.exists(HANDED_OUT):
        raise UserError(f"{HANDED_OUT}: not found; run this in a folder that `make` made")
    before = read_json(HANDED_OUT)
    changed = [path for path in before if os.path.isfile(path) and digest(path) != before[path]]
    if not changed:
        raise UserError("nothing has changed yet")
    with whole_file(to) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in changed:
            archive.write(path)
    print(f"{to}: {', '.join(changed)}")
    if "ANSWERS.md" not in changed:
        print("not packed, since nothing is written in it yet: ANSWERS.md")
    if new := sorted(path for path in glob.glob("*.py") if path not in before):
        print(f"not packed, since the grader sees no new files: {', '.join(new)}")
