"""Laws of the notebooks: they are notebooks, and from top to bottom their cells write and judge the student's files."""
import ast
import json
import os
import subprocess
import sys
import textwrap

import pytest
from programs import ROOT

from course import source as S
from course.exercises import CHAPTERS, EXERCISES
from course.handout import make

# A cell as IPython would run it: %%exercise calls the function, ! starts a shell.
IPYTHON = """
import contextlib, io, json, subprocess, sys, types
class Display(types.ModuleType):
    Image = staticmethod(lambda path: print("picture", path))
magics = {}
def register(function, kind):
    magics[function.__name__] = function
shell = types.SimpleNamespace(register_magic_function=register)
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: shell
sys.modules["IPython.display"] = Display("IPython.display")
start = subprocess.run
def grade_here(words, **options):
    if words[1:3] != ["-m", "course"]:
        return start(words, **options)
    import course.__main__
    ipython = sys.modules.pop("IPython")                                  # matplotlib would ask it
    sys.argv, out = words[2:], io.StringIO()
    with contextlib.redirect_stdout(out):
        course.__main__.main()
    sys.modules["IPython"] = ipython
    return types.SimpleNamespace(stdout=out.getvalue(), stderr="")
if sys.argv[1:] == ["here"]:
    subprocess.run = grade_here
space = {}
for text in json.load(sys.stdin):
    first, _, rest = text.partition("\\n")
    if first.startswith("%%"):
        name, word = first[2:].split()
        magics[name](word, rest)
    else:
        lines = [f"subprocess.run({line[1:]!r}, shell=True, check=True)" if line.startswith("!") else line
                 for line in text.split("\\n")]
        exec("import subprocess\\n" + "\\n".join(lines), space)
"""


def code_of(work, chapter):
    book = json.loads((work / "notebooks" / f"chapter{chapter}.ipynb").read_text())
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def run(work, cells, *words):
    """Run code cells in the folder of the notebooks -> what they print. words: "here" grades in the cells' process,
    which imports PyTorch once."""
    bin = os.path.dirname(sys.executable)
    return subprocess.run([sys.executable, "-c", IPYTHON, *words], input=json.dumps(cells), cwd=work / "notebooks",
                          text=True, capture_output=True, timeout=400,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{bin}:{os.environ['PATH']}"})


def solve(cell):
    """Return an exercise's cell with our function in it."""
    e = next(e for e in EXERCISES if cell.startswith(f"%%exercise {e.number}\n"))
    return f"%%exercise {e.number}\n" + textwrap.dedent(S.text_of(S.read(os.path.join(ROOT, e.file)), e.name)) + "\n"


def test_each_notebook_is_one_and_has_its_exercises(work):
    """Kills: a field that nbformat wants, an exercise without its statement or its stub, a solution in a cell, or 2.5
    before 2.6, which it needs."""
    assert len(list((work / "notebooks").iterdir())) == len(CHAPTERS)
    for chapter in CHAPTERS:
        book = json.loads((work / "notebooks" / f"chapter{chapter}.ipynb").read_text())
        assert book["nbformat"] == 4 and {"metadata", "nbformat_minor", "cells"} <= book.keys()
        for cell in book["cells"]:
            wanted = {"cell_type", "metadata", "source"} | ({"execution_count", "outputs"} & cell.keys())
            assert cell.keys() == wanted and (cell["cell_type"] == "code") == ("outputs" in cell)
            assert all(isinstance(line, str) for line in cell["source"])
        first, *cells, last = code_of(work, chapter)
        assert first.startswith("# Run this first") and "pip install" in first and "course pack" in last
        numbers = [e.number for e in EXERCISES if e.chapter == chapter]
        order = [cell.split()[1] for cell in cells]
        assert sorted(order) == numbers
        for e in EXERCISES:                                               # what it needs is written before it is judged
            assert e.chapter != chapter or not {*e.needs} & {*order[order.index(e.number):]}, e.number
        for cell in cells:
            function, = ast.parse(cell.split("\n", 1)[1]).body
            assert isinstance(function.body[-1], ast.Raise) and len(function.body) <= 2
        text = "".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")
        assert all(f"## {e.number} {e.title}" in text and e.latex in text for e in EXERCISES if e.chapter == chapter)


@pytest.mark.long
@pytest.mark.parametrize("chapters", [[1, 2, 3, 4, 6, 7, 8], [5]])       # 4.4 needs 5.1, and 5.3 needs 4.2
def test_notebooks_run_from_top_to_bottom_on_our_functions(tmp_path, chapters):
    """One after the other: each of our functions, typed into its cell, passes, shows its picture and is in the file
    afterwards."""
    work = tmp_path / "work"
    make(work, chapters)
    books = [code_of(work, chapter) for chapter in chapters]
    done = run(work, [cell for first, *cells, last in books for cell in (first, *map(solve, cells), last)], "here")
    assert done.returncode == 0, done.stderr
    for e in (e for e in EXERCISES if e.chapter in chapters):
        assert f"{e.number}  {e.points}/{e.points}  passed" in done.stdout, done.stdout
        assert f"{e.number}.png" in done.stdout
        assert S.text_of((work / e.file).read_text(), e.name) == S.text_of(S.read(os.path.join(ROOT, e.file)), e.name)
    assert (work / "hand_in.zip").exists()


@pytest.mark.long
def test_wrong_cells_are_one_line_and_leave_the_file(work):
    """Kills: a cell with a syntax error, another function or a helper that ruins the file."""
    before = (work / "unet.py").read_text()
    first, cell = code_of(work, 4)[:2]
    done = run(work, [first, cell.replace("raise", "raise raise"), cell.replace("def of_logsnr", "def other"),
                      cell + "x = 1\n", cell.replace("4.1", "9.1")])
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 4, done.stderr
    assert (work / "unet.py").read_text() == before
    done = run(work, [first, cell])
    assert "4.1  0/3  not done" in done.stdout and (work / "unet.py").read_text() == before
    (work / "unet.py").write_text(before + "def helper(:\n")              # typed into the file, not into a cell
    done = run(work, [first, cell])
    (work / "unet.py").write_text(before)                                 # other tests share this copy
    assert done.stdout.startswith("4.1: unet.py: ") and not done.stderr
