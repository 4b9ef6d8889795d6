"""Laws of exercises.py and of the judge: a grade must be earned, and cost no more than its exercise."""
import ast
import json
import os
import re

import pytest
from programs import ROOT, program

import exercises as X


def grade(folder, *words):
    """-> {number: row} and the process."""
    done = program("exercises.py", "grade", folder, "--json", folder / "points.json", "--no-pictures", *words)
    assert done.returncode == 0, done.stderr
    return {row["exercise"]: row for row in json.loads((folder / "points.json").read_text())["exercises"]}, done


def write(folder, file, bodies):
    """A student's file: ours, with these functions' code replaced. bodies: {number: lines}."""
    source = X.read(os.path.join(ROOT, file))
    for exercise in X.EXERCISES:
        if exercise.number in bodies:
            stub = f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")'
            source = X.strip(source, [exercise]).replace(stub, bodies[exercise.number])
    (folder / file).write_text(source)


@pytest.mark.long
def test_the_lecturers_own_test():
    """Full marks for ours; stubs that say their own number; each usual mistake loses its points and is named."""
    done = program("exercises.py", "check", timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " 0 faults" in done.stdout


def test_the_table_is_sound():
    assert len(X.EXERCISES) >= 24 and {e.chapter for e in X.EXERCISES} == set(X.CHAPTERS) == set(range(1, 9))
    assert len({e.number for e in X.EXERCISES}) == len({e.target for e in X.EXERCISES}) == len(X.EXERCISES)
    for e in X.EXERCISES:
        source = X.read(os.path.join(ROOT, e.file))
        assert X.text_of(source, e.name), f"{e.number}: {e.file} has no {e.name}"
        first, last = X.body(X.find(X.ast.parse(source), e.name)[-1], source.splitlines())
        code = [line for line in source.splitlines()[first - 1:last] if line.split("#")[0].strip()]
        assert abs(len(code) - e.lines) <= max(2, e.lines // 4), f"{e.number}: {len(code)} lines, not {e.lines}"
        assert "NotImplementedError" not in source                        # the files themselves carry no marks


def test_a_copy_has_signatures_and_docstrings_and_no_answers(tmp_path):
    done = program("exercises.py", "make", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    work = tmp_path / "work"
    for path in X.KEPT_BACK:
        assert os.path.exists(os.path.join(ROOT, path)) and not (work / path).exists()
    statements = (work / "EXERCISES.md").read_text()
    for e in X.EXERCISES:
        ours, theirs = (X.find(X.ast.parse(text), e.name)[-1] for text in
                        (X.read(os.path.join(ROOT, e.file)), (work / e.file).read_text()))
        assert X.ast.unparse(ours.args) == X.ast.unparse(theirs.args)
        assert X.ast.get_docstring(ours) == X.ast.get_docstring(theirs)
        code = theirs.body[-1]
        assert isinstance(code, X.ast.Raise) and len(theirs.body) == 1 + (X.ast.get_docstring(ours) is not None)
        assert f"exercise {e.number}: {e.title}" in X.ast.unparse(code) and f"### {e.number} {e.title}" in statements
    again = program("exercises.py", "make", work)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "is there already" in again.stderr
    rows, _ = grade(work, "--chapter", 1)
    assert [row["status"] for row in rows.values()] == ["not done"] * 4
    inside = program(work / "exercises.py", "grade", work, "--chapter", 1)               # the copy can grade itself
    assert inside.returncode == 0 and "0 of 10 points" in inside.stdout
    assert program(work / "exercises.py", "check").returncode == 2


def test_a_chapters_copy_leaves_the_rest_working(tmp_path):
    assert program("exercises.py", "make", tmp_path / "work", "--chapter", 3).returncode == 0
    assert X.chosen(None, tmp_path / "work") == X.chosen(3)
    for e in X.EXERCISES:
        same = X.text_of((tmp_path / "work" / e.file).read_text(), e.name) == X.text_of(
            X.read(os.path.join(ROOT, e.file)), e.name)
        assert same == (e.chapter != 3)


SINS = {"1.1": "while True:\n        pass", "1.2": "import os\n    print('passed')\n    os._exit(0)",
        "1.3": "import sys\n    sys.exit(0)", "1.4": "return None"}


@pytest.mark.long
def test_each_sin_costs_its_own_points_only(tmp_path):
    """Endless loops, sudden ends, prints, nonsense; and files that shadow what the grader imports."""
    write(tmp_path, "schedule.py", SINS)
    for name in ("torch", "math", "json", "exams", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadow')")
    rows, done = grade(tmp_path, "--chapter", 1, "--limit", 3)
    assert "Traceback" not in done.stderr and all(row["points"] == 0 for row in rows.values())
    for number, words in (("1.1", "endless"), ("1.2", "ended before"), ("1.3", "SystemExit"), ("1.4", "NoneType")):
        assert words in rows[number]["message"], rows[number]
    write(tmp_path, "schedule.py", {"1.2": SINS["1.2"]})
    rows, _ = grade(tmp_path, "--chapter", 1)
    assert [row["status"] for row in rows.values()] == ["passed", "wrong", "passed", "passed"]


@pytest.mark.long
def test_strange_results_and_strange_files_end_no_grading(tmp_path):
    """What cannot be judged, and characters at which Python does not break lines though str.splitlines does."""
    write(tmp_path, "schedule.py", {
        "1.1": "return torch.zeros(t.shape).to_sparse()", "1.3": "return torch.zeros(10, device='meta')",
        "1.2": "torch.save = lambda what, file: file.write(b'nothing')\n    return logsnr, logsnr",
        "1.4": "import os\n    for fd in range(3, 64):\n        try:\n            os.write(fd, b'\\0\\0\\xff\\xff')\n"
               "        except OSError:\n            pass\n    raise KeyboardInterrupt"})
    rows, done = grade(tmp_path, "--chapter", 1)
    assert "Traceback" not in done.stderr and all(row["status"] == "wrong" for row in rows.values())
    ours = X.read(os.path.join(ROOT, "schedule.py"))
    pasted = ours.replace("import math\n", "import math  # pasted\u2028from a PDF\nNOTE = 'a\x85b'  # \x0c\n", 1)
    (tmp_path / "schedule.py").write_bytes(("\ufeff" + pasted.replace("\n", "\r\n")).encode())
    rows, _ = grade(tmp_path, "--chapter", 1)
    assert [row["status"] for row in rows.values()] == ["passed"] * 4, rows
    (tmp_path / "schedule.py").unlink()
    os.mkfifo(tmp_path / "schedule.py")
    (tmp_path / "dwt.py").mkdir()
    rows, _ = grade(tmp_path, "--chapter", 1)
    assert "no plain file" in rows["1.1"]["message"]


@pytest.mark.long
def test_what_a_student_may_do(tmp_path):
    """A helper of one's own, another way of writing it, other exercises undone: full points for what is right."""
    right = "return _helper(logsnr), _helper(-torch.as_tensor(logsnr))"
    haste = "return logsnr_cosine(t, logsnr_min, logsnr_max) + math.log(noise_d / image_d)"
    write(tmp_path, "schedule.py", {"1.1": 'raise NotImplementedError("exercise 1.1: x")', "1.2": right, "1.3": haste})
    with open(tmp_path / "schedule.py", "a") as file:
        file.write("\n\ndef _helper(l):\n    return (1 / (1 + torch.exp(-torch.as_tensor(l)))).sqrt()\n")
    for seed in (0, 4711):
        rows, _ = grade(tmp_path, "--chapter", 1, "--seed", seed)
        assert [row["status"] for row in rows.values()] == ["not done", "passed", "wrong", "passed"]
        assert "log instead of 2 log" in rows["1.3"]["message"]           # the usual mistake by its name
    (tmp_path / "schedule.py").write_text("def f(:\n")
    rows, _ = grade(tmp_path, "--chapter", 1)
    assert all(row["message"].startswith("schedule.py, line 1: ") for row in rows.values())


def test_tabs_and_missing_methods_cost_nothing_elsewhere(tmp_path):
    """What is put back beside an exercise has the file's own indent, and goes back into its class."""
    for name in ("unet.py", "uvit.py"):
        source = X.read(os.path.join(ROOT, name))
        (tmp_path / name).write_text(re.sub(r"(?m)^( {4})+", lambda spaces: "\t" * (len(spaces[0]) // 4), source))
    for exercise in (e for e in X.EXERCISES if e.file in ("unet.py", "uvit.py")):
        ast.parse(X.to_grade(tmp_path, exercise))
    source = X.read(os.path.join(ROOT, "unet.py"))
    first, last = X.span(X.find(ast.parse(source), "ResBlock.forward")[-1])
    lines = X.lines_of(source)
    (tmp_path / "unet.py").write_text("\n".join(lines[:first - 1] + lines[last:]))
    for exercise in (e for e in X.EXERCISES if e.file == "unet.py" and e.name != "ResBlock.forward"):
        graded = X.to_grade(tmp_path, exercise)
        assert X.text_of(graded, "ResBlock.forward") == X.text_of(source, "ResBlock.forward")
    (tmp_path / "unet.py").write_text(source + "\n\nclass ResBlock(nn.Module): x = 1\n")       # the one that counts
    for exercise in (e for e in X.EXERCISES if e.file == "unet.py" and e.name != "ResBlock.forward"):
        ast.parse(X.to_grade(tmp_path, exercise))


@pytest.mark.long
def test_the_grader_itself_cannot_be_patched_from_a_students_file(tmp_path):
    """Judgement is in another process: whoever makes torch.isclose say yes has still to return the right numbers."""
    write(tmp_path, "schedule.py", {"1.2": "yes = lambda *a, **k: torch.tensor(True)\n"
                                           "    torch.isclose = torch.allclose = torch.Tensor.all = yes\n"
                                           "    return torch.zeros_like(logsnr), torch.ones_like(logsnr)"})
    rows, _ = grade(tmp_path, "--chapter", 1)
    assert [row["status"] for row in rows.values()] == ["passed", "wrong", "passed", "passed"]


@pytest.mark.parametrize("words", (["grade", "nowhere"], ["make"], ["grade", ".", "--chapter", "9"], ["dance"], [],
                                   ["grade", ".", "--seed", "-1"], ["grade", "tests"], ["make", "README.md"]))
def test_bad_words_are_one_line_and_status_two(words):
    done = program("exercises.py", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.strip()
