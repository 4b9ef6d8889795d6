"""The Gradescope autograder, tried in a folder laid out as theirs."""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import pytest
from programs import program, program_here, ROOT

from course import source as S
from course.exercises import EXERCISES


AS_NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups".split()


@pytest.fixture
def autograder(tmp_path):
    """Lay out /autograder elsewhere, with the zip of chapters 1 and 2 unpacked. -> its folder."""
    if os.geteuid() == 0 and subprocess.run([*AS_NOBODY, sys.executable, "-c", "import torch"],
                                            capture_output=True).returncode:
        pytest.skip("run_autograder becomes nobody if root runs it, and nobody cannot run root's Python here")
    with tempfile.TemporaryDirectory() as folder:                         # tmp_path is closed to other users
        os.chmod(folder, 0o755)
        yield laid_out(pathlib.Path(folder), tmp_path)


def laid_out(root, tmp_path):
    for name in ("source", "submission", "results", "venv/bin"):
        (root / name).mkdir(parents=True)
    done = program("course", "gradescope-zip", "--chapters", "1,2", "--seed", 471100, "--out", tmp_path / "zip")
    assert done.returncode == 0, done.stderr
    subprocess.run([sys.executable, "-c", "import shutil, sys; shutil.unpack_archive(*sys.argv[1:], 'zip')",
                    tmp_path / "zip", root / "source"], check=True)
    (root / "venv" / "bin" / "python").symlink_to(sys.executable)         # in the place of setup.sh
    if sys.prefix != sys.base_prefix:
        (root / "venv" / "lib").symlink_to(os.path.join(sys.prefix, "lib"))
        (root / "venv" / "pyvenv.cfg").write_text(pathlib.Path(sys.prefix, "pyvenv.cfg").read_text())
    return root


def run(root):
    """Run run_autograder -> results.json, {number: test} and the text of the file."""
    done = subprocess.run(["bash", root / "source" / "run_autograder"], cwd=root, capture_output=True, text=True,
                          timeout=400, env={"PATH": os.environ["PATH"], "AUTOGRADER_ROOT": str(root)})
    assert done.returncode == 0, done.stderr
    text = (root / "results" / "results.json").read_text()
    return json.loads(text), {test["number"]: test for test in json.loads(text)["tests"]}, text


LOOKS = """import os
    paths = [os.path.join({source!r}, path) for path in ("seed", "schedule.py", "course/mutants.py")]
    found = [path for path in paths if os.access(path, os.R_OK)]
    frame = __import__("sys")._getframe()
    while "seed" not in frame.f_locals:
        frame = frame.f_back
    raise ValueError(f"found {{found}} {{frame.f_locals['seed']}} {{frame.f_locals['seed'] + 7919}}")"""


@pytest.mark.long
def test_the_zips_scripts_grade_a_submission(autograder):
    """Kills: a file that the zip lacks, a missing field, the seed in what students see, code that reads our files."""
    source = S.read(os.path.join(ROOT, "schedule.py"))
    for number, body in (("1.2", LOOKS.format(source=str(autograder / "source"))), ("1.3", "return t * 0")):
        exercise = next(e for e in EXERCISES if e.number == number)
        stub = f'raise NotImplementedError("exercise {number}: {exercise.title}")'
        source = S.strip(source, [exercise]).replace(stub, body)
    (autograder / "submission" / "schedule.py").write_text(source)
    results, tests, text = run(autograder)
    chosen = [e for e in EXERCISES if e.chapter in (1, 2)]
    assert [*tests] == [e.number for e in chosen] and results["output"] == ""
    for e in chosen:
        test, right = tests[e.number], e.file == "schedule.py" and e.number not in ("1.2", "1.3")
        assert test.keys() == {"number", "name", "score", "max_score", "output", "status"}
        assert (test["name"], test["max_score"], test["score"]) == (e.title, e.points, e.points * right), test
        assert test["status"] == ("passed" if right else "failed") and test["output"], test
    assert "train.py: not handed in" in tests["2.5"]["output"]
    assert "(seed)" in tests["1.2"]["output"] and "471100" not in text and str(471100 + 7919) not in text
    if os.geteuid() == 0:
        assert "found []" in tests["1.2"]["output"]                       # it cannot read source/


@pytest.mark.long
def test_an_empty_submission_gets_its_reasons(autograder):
    results, tests, _ = run(autograder)
    assert not any(test["score"] for test in tests.values()) and len(tests) == 10
    assert tests["1.1"]["output"] == "schedule.py: not handed in"


def test_the_zip_has_no_answers_and_a_seed_of_its_own(tmp_path):
    """Kills: answers.md in the container where students' code runs; the same seed in every term."""
    seeds = set()
    for name in ("a.zip", "b.zip"):
        assert program_here("course", "gradescope-zip", "--chapters", 3, "--out", tmp_path / name).returncode == 0
        with zipfile.ZipFile(tmp_path / name) as archive:
            names = archive.namelist()
            seeds.add(archive.read("seed"))
            assert {"setup.sh", "run_autograder", "requirements.txt", "course/chapter3.py", "dwt.py"} <= {*names}
            assert not [each for each in names if each.endswith(".md")]
            for script in ("setup.sh", "run_autograder"):
                assert archive.getinfo(script).external_attr >> 16 == 0o755
                text = archive.read(script)
                assert subprocess.run(["bash", "-n"], input=text).returncode == 0 and b"https:" not in text
            assert b"--chapters 3 " in archive.read("run_autograder")
    assert len(seeds) == 2
    again = program_here("course", "gradescope-zip", "--chapters", 3, "--out", tmp_path / "a.zip")
    assert again.returncode == 2 and again.stderr.count("\n") == 1
