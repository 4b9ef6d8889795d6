"""Laws of the course and its judge: points must be earned, and a mistake costs the points of its own exercise only."""
import ast
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from programs import ROOT, program, program_here

from course import source as S
from course.exercises import CHAPTERS, EXERCISES, chosen
from course.handout import KEPT_BACK, make
from course.judge import fault_of, to_grade
from course.witness import EXAMS, Inputs, Modules, plain
from plumbing import UserError


def grade(folder, *words):
    """Grade a folder -> {number: row} and the process."""
    done = program("course", "grade", folder, "--json", folder / "points.json", "--no-pictures", *words)
    assert done.returncode == 0, done.stderr
    return {row["exercise"]: row for row in json.loads((folder / "points.json").read_text())["exercises"]}, done


def inside(copy, *words):
    """Run Python in a student's copy."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=copy, capture_output=True, text=True, timeout=240,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def write(folder, file, bodies):
    """Write a student's file: ours, with these functions' code replaced. bodies: {number: lines}."""
    source = S.read(os.path.join(ROOT, file))
    for exercise in EXERCISES:
        if exercise.number in bodies:
            stub = f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")'
            source = S.strip(source, [exercise]).replace(stub, bodies[exercise.number])
    (folder / file).write_text(source)


@pytest.mark.long
def test_the_lecturers_own_test():
    """Ours gets full marks, a stub gives its own number, each typical mistake loses its points and gets its name."""
    done = program("course", "check", timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " 0 faults" in done.stdout


def test_the_table_is_sound():
    assert len(EXERCISES) >= 24 and {e.chapter for e in EXERCISES} == set(CHAPTERS) == set(range(1, 9))
    assert len({e.number for e in EXERCISES}) == len({e.target for e in EXERCISES}) == len(EXERCISES)
    for e in EXERCISES:
        source = S.read(os.path.join(ROOT, e.file))
        assert S.text_of(source, e.name), f"{e.number}: {e.file} has no {e.name}"
        first, last = S.body(S.find(ast.parse(source), e.name)[-1], source.splitlines())
        code = [line for line in source.splitlines()[first - 1:last] if line.split("#")[0].strip()]
        assert abs(len(code) - e.lines) <= max(2, e.lines // 4), f"{e.number}: {len(code)} lines, not {e.lines}"
        assert "NotImplementedError" not in source                        # the files themselves carry no marks


def test_a_copy_has_signatures_and_docstrings_and_no_answers(tmp_path):
    done = program("course", "make", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    for path in KEPT_BACK:
        assert os.path.exists(os.path.join(ROOT, path)) and not (work / path).exists()
    statements = (work / "EXERCISES.md").read_text()
    for e in EXERCISES:
        ours, theirs = (S.find(ast.parse(text), e.name)[-1] for text in
                        (S.without_notes(S.read(os.path.join(ROOT, e.file))), (work / e.file).read_text()))
        assert ast.unparse(ours.args) == ast.unparse(theirs.args)
        assert ast.get_docstring(ours) == ast.get_docstring(theirs)
        code = theirs.body[-1]
        assert isinstance(code, ast.Raise) and len(theirs.body) == 1 + (ast.get_docstring(ours) is not None)
        assert f"exercise {e.number}: {e.title}" in ast.unparse(code) and f"### {e.number} {e.title}" in statements
    again = program_here("course", "make", work)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "exists already" in again.stderr
    itself = inside(work, "-m", "course", "grade", ".", "--chapter", 1)
    assert itself.returncode == 0 and "0 of 10 points" in itself.stdout and not itself.stderr
    check, copy = inside(work, "-m", "course", "check"), inside(work, "-m", "course", "make", tmp_path / "other")
    assert check.returncode == copy.returncode == 2 and check.stderr.count("\n") == copy.stderr.count("\n") == 1


def test_a_chapters_copy_leaves_the_rest_working(tmp_path):
    make(tmp_path / "work", [3])
    assert chosen(None, tmp_path / "work") == chosen([3])
    for e in EXERCISES:
        same = S.text_of((tmp_path / "work" / e.file).read_text(), e.name) == S.text_of(
            S.without_notes(S.read(os.path.join(ROOT, e.file))), e.name)
        assert same == (e.chapter != 3)


def test_a_note_ends_with_its_paragraph():
    """What follows "Note:" is kept back to the end of its paragraph. Kills: a note that takes the next paragraph, a
    "# Paper:", the end of the docstring or code with it, and one that stays."""
    source = '''"""Head. Note: a
secret.

# Paper: stays. Note: a secret,
# and more of it.
# Paper: stays too.

Note: a secret.
"""
# A comment.
# Note: a secret,
# and more.
x = 1  # stays


def f():
    """Return x. Note: a secret."""
    return x


def g():
    """Return x.

    Note: a secret
    that ends here."""
    return x
'''
    wanted = '''"""Head.

# Paper: stays.
# Paper: stays too.
"""
# A comment.
x = 1  # stays


def f():
    """Return x."""
    return x


def g():
    """Return x.
    """
    return x
'''
    assert S.without_notes(source) == wanted


@pytest.mark.long
def test_the_programs_run_in_a_copy(tmp_path):
    """Kills: a file or folder that the copy lacks."""
    work = tmp_path / "work"
    make(work, [3])
    page = inside(work, "schedule.py")
    assert page.returncode == 0 and (work / "figures" / "schedule_logsnr.png").exists(), page.stderr
    dry = inside(work, "train.py", "--preset", "glyphs64", "--patching", "conv_2", "--dry-run")
    assert dry.returncode == 0, dry.stderr


SINS = {"1.1": "while True:\n        pass", "1.2": "import os\n    print('passed')\n    os._exit(0)",
        "1.3": "import sys\n    sys.exit(0)", "1.4": "return None"}


@pytest.mark.long
def test_no_sin_ends_the_grading(tmp_path):
    """Endless loops, sudden exits, prints, nonsense, and files with the names of modules that the grader imports."""
    write(tmp_path, "schedule.py", SINS)
    for name in ("torch", "math", "json", "course", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadow')")
    rows, done = grade(tmp_path, "--chapter", 1, "--limit", 3)
    assert "Traceback" not in done.stderr and all(row["points"] == 0 for row in rows.values())
    for number, words in (("1.1", "endless"), ("1.2", "ended before"), ("1.3", "SystemExit"), ("1.4", "NoneType")):
        assert words in rows[number]["message"], rows[number]


@pytest.mark.long
def test_strange_results_and_strange_files_end_no_grading(tmp_path):
    """Answers that cannot be judged, and characters at which str.splitlines breaks lines and Python does not."""
    write(tmp_path, "schedule.py", {
        "1.1": "return torch.zeros(t.shape).to_sparse()", "1.3": "return torch.zeros(10, device='meta')",
        "1.2": "torch.save = lambda what, file: file.write(b'nothing')\n    return logsnr, logsnr",
        "1.4": "import os\n    for fd in range(3, 64):\n        try:\n            os.write(fd, b'\\0\\0\\xff\\xff')\n"
               "        except OSError:\n            pass\n    raise KeyboardInterrupt"})
    rows, done = grade(tmp_path, "--chapter", 1)
    assert "Traceback" not in done.stderr and all(row["status"] == "wrong" for row in rows.values())
    ours = S.read(os.path.join(ROOT, "schedule.py"))
    pasted = ours.replace("import math\n", "import math  # pasted\u2028from a PDF\nNOTE = 'a\x85b'  # \x0c\n", 1)
    (tmp_path / "schedule.py").write_bytes(("\ufeff" + pasted.replace("\n", "\r\n")).encode())
    rows, _ = grade(tmp_path, "--chapter", 1)
    assert [row["status"] for row in rows.values()] == ["passed"] * 4, rows
    (tmp_path / "schedule.py").unlink()
    os.mkfifo(tmp_path / "schedule.py")
    with pytest.raises(UserError, match="not a plain file"):
        to_grade(tmp_path, EXERCISES[0])


@pytest.mark.long
def test_what_a_student_may_do(tmp_path):
    """A helper, another formula, other exercises unsolved: what is right gets full points."""
    right = "return _helper(logsnr), _helper(-torch.as_tensor(logsnr))"
    haste = "return logsnr_cosine(t, logsnr_min, logsnr_max) + math.log(noise_d / image_d)"
    write(tmp_path, "schedule.py", {"1.1": 'raise NotImplementedError("exercise 1.1: x")', "1.2": right, "1.3": haste})
    with open(tmp_path / "schedule.py", "a") as file:
        file.write("\n\ndef _helper(l):\n    return (1 / (1 + torch.exp(-torch.as_tensor(l)))).sqrt()\n")
    rows, _ = grade(tmp_path, "--chapter", 1, "--seed", 4711)
    assert [row["status"] for row in rows.values()] == ["not done", "passed", "wrong", "passed"]
    assert "log instead of 2 log" in rows["1.3"]["message"]               # the typical mistake by its name
    (tmp_path / "schedule.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="^schedule.py, line 1: "):
        to_grade(tmp_path, EXERCISES[0])


@pytest.mark.parametrize("number, key, i, place, words", [
    ("3.1", "random", 0, (1, 2, 4), "at [1, 2, 4] of low"), ("3.1", "random", 1, (0, 1, 3), "at [0, 1, 3] of high"),
    ("3.1", "flat", 1, (2,), "high band of a constant is 7 at [2]"),
    ("3.1", "flat", 0, (3,), "low band of a constant 3 is 10 at [3]"),
    ("3.1", "line", 1, (4,), "high band of a straight line is 7 at [4]"),
    *[("3.3", key, 0, (0, channel, 0, 1), f"at [0, {channel}, 0, 1] of {band}") for key, channel, band in (
        ("one", 2, "LL1"), ("one", 3, "LH1"), ("one", 6, "HL1"), ("one", 11, "HH1"), ("three", 0, "LL3"),
        ("three", 3, "HH3"), ("three", 4, "LH2"), ("three", 15, "HH2"), ("three", 16, "LH1"), ("three", 63, "HH1"),
        ("two", 7, "HH2"), ("two", 8, "LH1"), ("two", 16, "HL1"), ("none", 1, "LL0"))]])
def test_a_message_about_a_wavelet_names_the_band_and_the_place(number, key, i, place, words):
    """Kills: a place in one of two bands, or of 64 channels, without a name; a law that shows another number."""
    exam = EXAMS[number]
    wanted = {name: plain(value) for name, value in exam.spec(Modules(), Inputs(0)).items()}
    seen = {name: [tensor.clone() for tensor in tensors] for name, tensors in wanted.items()}
    seen |= dict.fromkeys(("acts", "untaught"), [torch.tensor([], dtype=torch.uint8)])
    assert not fault_of(exam, seen, wanted)
    seen[key][i][place] += 7
    assert words in fault_of(exam, seen, wanted)


def test_tabs_and_missing_methods_cost_nothing_elsewhere(tmp_path):
    """A function that is put back gets the file's own indent, and a method returns to its class."""
    for name in ("unet.py", "uvit.py"):
        source = S.read(os.path.join(ROOT, name))
        (tmp_path / name).write_text(re.sub(r"(?m)^( {4})+", lambda spaces: "\t" * (len(spaces[0]) // 4), source))
    for exercise in (e for e in EXERCISES if e.file in ("unet.py", "uvit.py")):
        ast.parse(to_grade(tmp_path, exercise))
    source = S.read(os.path.join(ROOT, "unet.py"))
    first, last = S.span(S.find(ast.parse(source), "ResBlock.forward")[-1])
    lines = S.lines_of(source)
    (tmp_path / "unet.py").write_text("\n".join(lines[:first - 1] + lines[last:]))
    for exercise in (e for e in EXERCISES if e.file == "unet.py" and e.name != "ResBlock.forward"):
        graded = to_grade(tmp_path, exercise)
        assert S.text_of(graded, "ResBlock.forward") == S.text_of(source, "ResBlock.forward")
    (tmp_path / "unet.py").write_text(source + "\n\nclass ResBlock(nn.Module): x = 1\n")  # the last definition counts
    for exercise in (e for e in EXERCISES if e.file == "unet.py" and e.name != "ResBlock.forward"):
        ast.parse(to_grade(tmp_path, exercise))


@pytest.mark.long
def test_a_wrong_answer_is_drawn_beside_the_right_one(tmp_path):
    """Kills: pictures of right answers only, and numbers that cannot be drawn and end the grading."""
    write(tmp_path, "schedule.py", {"1.2": "return torch.sigmoid(torch.as_tensor(logsnr)), torch.as_tensor(logsnr)",
                                    "1.3": "return torch.zeros(3)", "1.4": "return None"})
    done = program("course", "grade", tmp_path, "--chapter", 1)
    assert done.returncode == 0 and "pictures in" in done.stdout, done.stderr
    width = {path.stem: Image.open(path).width for path in (tmp_path / "pictures").iterdir()}
    assert width.keys() == {"1.1", "1.2", "1.3"} and width["1.2"] > 1.8 * width["1.1"] and width["1.3"] == width["1.2"]


@pytest.mark.long
def test_a_syntax_error_in_ones_own_copy_ends_no_grading(tmp_path):
    """In a student's copy the other modules are the student's own: what fails to import is named, the rest graded."""
    make(tmp_path / "work", [3])
    (tmp_path / "work" / "dwt.py").write_text("def f(:\n")
    done = inside(tmp_path / "work", "-m", "course", "grade", ".", "--no-pictures")
    assert done.returncode == 0 and "0 of 17 points" in done.stdout and "dwt.py, line 1: " in done.stdout
    assert "blocked   What a linear guess leaves of v: dwt.py, line 1: " in done.stdout and not done.stderr


@pytest.mark.long
def test_the_grader_itself_cannot_be_patched_from_a_students_file(tmp_path):
    """Another process judges: patching torch.isclose does not help, only the right numbers do."""
    write(tmp_path, "schedule.py", {"1.2": "yes = lambda *a, **k: torch.tensor(True)\n"
                                           "    torch.isclose = torch.allclose = torch.Tensor.all = yes\n"
                                           "    return torch.zeros_like(logsnr), torch.ones_like(logsnr)"})
    rows, _ = grade(tmp_path, "--chapter", 1)
    assert [row["status"] for row in rows.values()] == ["passed", "wrong", "passed", "passed"]


@pytest.mark.parametrize("words", (["grade", "nowhere"], ["make"], ["grade", ".", "--chapter", "9"], ["dance"], [],
                                   ["grade", ".", "--seed", "-1"], ["grade", "tests"], ["make", "README.md"],
                                   ["grade", ".", "--json", "/dev/null/points.json"]))
def test_bad_words_are_one_line_and_status_two(words):
    done = program_here("course", *words)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


def test_a_file_in_the_place_of_the_pictures_is_one_line_before_the_grading(tmp_path):
    write(tmp_path, "schedule.py", {})
    (tmp_path / "pictures").write_text("mine")
    done = program_here("course", "grade", tmp_path, "--chapter", 1)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
