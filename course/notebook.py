"""A notebook for each chapter: the statements, and a cell for each function. Standard library only.

A cell that begins with `%%exercise 1.1` writes its function into the student's file, judges it and shows the picture.
So the files, which `pack` hands in, and the notebook hold the same code.
"""
import ast
import json
import os
import subprocess
import sys
import textwrap

from plumbing import UserError
from plumbing.files import whole_file

from course.exercises import CHAPTERS, EXERCISES, in_order
from course.source import HERE, put_back, read, text_of

INSTALL = """# Run this first. It needs torch, numpy, pillow and matplotlib. Colab has them. Elsewhere, in this folder:
#     pip install -r requirements.txt
# In Colab upload your copy as my_work.zip (the folder symbol on the left). It is unpacked here.
import os, sys, zipfile
if os.path.exists("my_work.zip") and not os.path.exists("my_work"):
    zipfile.ZipFile("my_work.zip").extractall()
place = next(path for path in ("my_work", ".", "..") if os.path.exists(os.path.join(path, "EXERCISES.md")))
os.chdir(place)
sys.path.insert(0, os.getcwd())
from course.notebook import exercise, install
install()"""
PACK = """# When all is right, and your answers are in ANSWERS.md: write hand_in.zip
!python -m course pack"""


def cell(kind, text):
    """Return a cell of nbformat 4."""
    code = dict(execution_count=None, outputs=[]) if kind == "code" else {}
    return dict(cell_type=kind, metadata={}, source=text.splitlines(keepends=True), **code)


def notebook(chapter, exercises, statement, folder):
    """Return the notebook of a chapter, a dict. statement(e) gives its lines; the stubs are those of the copy."""
    cells = [cell("markdown", f"# {chapter} {CHAPTERS[chapter]}\n\nThe same exercises as in EXERCISES.md; begin there. "
                              "A cell that begins with `%%exercise` writes its function into your file and judges it."),
             cell("code", INSTALL)]
    for e in exercises:
        text = "\n".join(statement(e)).replace("](reading/", "](../reading/")
        stub = textwrap.dedent(text_of(read(os.path.join(folder, e.file)), e.name))
        cells += [cell("markdown", text[1:]), cell("code", f"%%exercise {e.number}\n{stub}\n")]
    kernel = dict(display_name="Python 3", language="python", name="python3")
    return dict(cells=[*cells, cell("code", PACK)], metadata=dict(kernelspec=kernel, language_info=dict(name="python")),
                nbformat=4, nbformat_minor=4)


def write(folder, exercises, statement):
    """Write the notebooks of these exercises' chapters into a copy."""
    os.makedirs(os.path.join(folder, "notebooks"), exist_ok=True)
    for chapter in sorted({e.chapter for e in exercises}):
        part = in_order(e for e in exercises if e.chapter == chapter)
        with open(os.path.join(folder, "notebooks", f"chapter{chapter}.ipynb"), "w", encoding="utf-8") as file:
            json.dump(notebook(chapter, part, statement, folder), file, indent=1, ensure_ascii=False)


# ------------------------------------------------------------------------------------------ in the notebook

def install():
    """Let cells begin with %%exercise."""
    from IPython import get_ipython
    get_ipython().register_magic_function(exercise, "cell")


def exercise(number, text):
    """Write the function of this cell into the file, judge it, and return its picture."""
    chosen = next((e for e in EXERCISES if e.number == number.strip()), None)
    if chosen is None or os.path.exists(os.path.join(HERE, "course", "mutants.py")):
        return print(f"{number}: no such exercise" if chosen is None else "this is the project, not a student's copy")
    owner, _, name = chosen.name.rpartition(".")
    try:
        names = [getattr(node, "name", "other code") for node in ast.parse(text).body]
    except SyntaxError as error:
        return print(f"{number}: line {error.lineno}: {error.msg}")
    if names != [name]:
        return print(f"{number}: the cell must define {name} and nothing else; helpers go inside it, or into "
                     f"{chosen.file}")
    path, picture = os.path.join(HERE, chosen.file), os.path.join(HERE, "pictures", f"{chosen.number}.png")
    try:
        source = put_back(read(path), f"class {owner}:\n{textwrap.indent(text, '    ')}" if owner else text, [chosen])
    except (UserError, SyntaxError) as error:
        return print(f"{number}: {chosen.file}: {error}")
    with whole_file(path, "w", encoding="utf-8") as file:                 # or the file that was there stays
        file.write(source)
    done = subprocess.run([sys.executable, "-m", "course", "grade", ".", "--only", chosen.number], cwd=HERE,
                          capture_output=True, text=True)
    print(done.stdout.split("\n")[0] or done.stderr)
    if " passed " in done.stdout and os.path.exists(picture):
        from IPython.display import Image
        return Image(picture)
