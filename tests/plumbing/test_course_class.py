"""Laws of grading a class: a row for every hand-in, points for right functions only, and nothing of it lives on."""
import csv
import json
import os
import time
import zipfile

import pytest
from programs import ROOT, program, program_here

from course import source as S
from course.exercises import chosen, EXERCISES
from course.room import course_files

OURS = S.read(os.path.join(ROOT, "schedule.py"))
PARTS = [exercise for exercise in EXERCISES if exercise.file == "schedule.py"]
STUBS = S.strip(OURS, PARTS)
FULL = {"1.1": 3, "1.2": 2, "1.3": 3, "1.4": 2}


def with_body(number, body):
    """Return our schedule.py with another body of this exercise."""
    exercise = next(exercise for exercise in PARTS if exercise.number == number)
    stub = f'raise NotImplementedError("exercise {number}: {exercise.title}")'
    return S.strip(OURS, [exercise]).replace(stub, body)


# Each looks for an answer that is not the student's: the exam's specification, the lecturer's file, the judge.
CHEATS = """
import gc, importlib, inspect, os, sys
def _spec():
    import course, course.exams
    yield course.exams.EXAMS["1.1"].spec
def _chapter():
    import course.chapter1
    yield course.chapter1.Cosine.spec
def _judge():
    import course.judge
    yield course.judge.specified
def _lecturers():
    main = sys.modules["__main__"]
    places = [*sys.path, os.getcwd(), os.environ.get("PWD", ""), os.environ.get("OLDPWD", ""), main.__file__]
    for place in {os.path.dirname(p) for p in places if p} | {p for p in places if p}:
        for name in ("schedule.py", "course/answers.md", "course/mutants.py"):
            path = os.path.join(place, name)
            if os.path.isfile(path) and os.path.realpath(path) != os.path.realpath(__file__):
                yield path
def _memory():
    for one in gc.get_objects():
        if inspect.isfunction(one) and one.__name__ in ("spec", "slow") and one.__module__.startswith("course."):
            yield one
    frame = sys._getframe()
    while frame:
        if any("log(math.tan" in value for value in list(frame.f_locals.values()) if type(value) is str):
            yield frame
        frame = frame.f_back
def _found():
    for cheat in (_spec, _chapter, _judge, _lecturers, _memory):
        try:
            yield from (found for found in cheat() if found)
        except (ImportError, AttributeError):
            pass
"""
FORKS = """import os, time
    for leaves in (False, True):
        if not os.fork():
            if leaves:
                os.setsid()
                os.fork()
            open({path!r}, "a").write(f"{{os.getpid()}}\\n")
            time.sleep(600)
            os._exit(0)
    time.sleep(1)
    return logsnr * 0, logsnr * 0"""
FORGES = """import io, os, sys
    frame = sys._getframe()
    while "path" not in frame.f_locals:
        frame = frame.f_back
    out = io.BytesIO()
    torch.save({"random": [torch.ones(3, 4)] * 2, "clean": [torch.ones(2)] * 2, "curve": [torch.ones(101)] * 2}, out)
    open(frame.f_locals["path"], "wb").write(b"s" + out.getvalue())
    os._exit(0)"""
LOOPS_ONCE = """
import os
if not os.path.exists({path!r}):
    open({path!r}, "w").close()
    while True:
        pass
"""
KILLS = """import os, signal, time
    parent = os.getppid()                                                 # it runs this; its own parent is the judge
    judge = int(open(f"/proc/{{parent}}/stat").read().rsplit(")", 1)[1].split()[1])
    os.kill({who}, signal.SIGKILL)
    open({path!r}, "a").write(f"{{os.getpid()}}\\n")
    time.sleep(600)"""


def the_class(folder, pids):
    """Lay out 26 hand-ins -> {name: (points of 1.1 to 1.4, words of the reasons)}."""
    wanted = {}

    def hand_in(name, text, points, reasons=""):
        (folder / name).mkdir()
        if text is not None:
            (folder / name / "schedule.py").write_bytes(text if isinstance(text, bytes) else text.encode())
        wanted[name] = [FULL[number] * (number in points) for number in FULL], reasons
        return folder / name
    every = "1.1 1.2 1.3 1.4"
    hand_in("ann", OURS, every)
    hand_in("=bob", STUBS, "", "not done")
    hand_in("missing", None, "", "not handed in")
    hand_in("latin", ("# Größe\n" + OURS).encode("latin-1", "replace"), "", "not UTF-8")
    hand_in("syntax", OURS + "\ndef f(:\n", "", "schedule.py, line")
    hand_in("loop", with_body("1.2", "while True:\n        pass"), "1.1 1.3 1.4", "1.2: not finished after 3")
    hand_in("loop_at_import", OURS + LOOPS_ONCE.format(path=str(pids) + "-loop"), "1.2 1.3 1.4", "1.1: not finished")
    hand_in("exit", OURS + "\nimport sys\nsys.exit(0)\n", "", "SystemExit")
    hand_in("exit_now", with_body("1.2", "import os\n    os._exit(0)"), "1.1 1.3 1.4", "1.2: the program ended before")
    hand_in("forks", with_body("1.2", FORKS.format(path=str(pids))), "1.1 1.3 1.4", "1.2: ")
    hand_in("prints", OURS + "\nfor _ in range(1000000):\n    print('1.1  3/3  passed')\n", every)
    hand_in("links_a_file", None, "", "schedule.py: a link").joinpath("schedule.py").symlink_to(f"{ROOT}/schedule.py")
    (folder / "links_a_folder").symlink_to(ROOT)
    wanted["links_a_folder"] = [0] * 4, "is a link"
    (hand_in("edits_the_page", STUBS, "", "1.1: not done") / "EXERCISES.md").write_text("### 1.9 Nothing to do\n")
    (hand_in("pictures_is_a_file", OURS, every) / "pictures").write_text("no folder")
    hand_in("kills_its_parent", with_body("1.2", KILLS.format(who="parent", path=str(pids))), "1.1 1.3 1.4",
            "1.2: stopped or killed")
    hand_in("kills_its_judge", with_body("1.2", KILLS.format(who="judge", path=str(pids))), "", "stopped or killed")
    cheat = "raise ValueError(f'found {[*_found()]}')"
    cheats = S.strip(OURS, PARTS[:2]).replace(f'raise NotImplementedError("exercise 1.1: {PARTS[0].title}")', cheat)
    hand_in("cheats", cheats + CHEATS, "1.3 1.4", "1.1: ValueError: found []")
    os.mkfifo(hand_in("pipe", None, "", "not a plain file") / "schedule.py")
    (hand_in("folder", None, "", "not a plain file") / "schedule.py").mkdir()
    hand_in("long", OURS + "#" * 2 ** 21, "", "longer than")
    hand_in("memory", with_body("1.2", "return [torch.ones(2 ** 34) for _ in range(9)]"), "1.1 1.3 1.4", "1.2: Runtime")
    hand_in("forges", with_body("1.2", FORGES), "1.1 1.3 1.4", "1.2: ")
    (folder / "notes.txt").write_text("I was ill.")
    wanted["notes.txt"] = [0] * 4, "neither a folder nor a zip"
    with zipfile.ZipFile(folder / "newer.zip", "w") as archive:           # by a program of the year 2040
        entry = zipfile.ZipInfo("schedule.py")
        entry.extract_version = 99
        archive.writestr(entry, OURS)
    wanted["newer.zip"] = [0] * 4, "a zip that cannot be read"
    with zipfile.ZipFile(folder / "zoe.zip", "w") as archive:
        archive.writestr("my_work/schedule.py", OURS)
        archive.writestr("__MACOSX/schedule.py", "")
    wanted["zoe.zip"] = [*FULL.values()], ""
    return wanted


def is_alive(pid):
    """Return whether a process runs: one that ended and whose parent has not looked yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.long
def test_a_class_gets_a_row_each_and_no_forged_one(tmp_path):
    """Kills: a hand-in that ends or stops the grading, that outlives it, or that gets points for another's answer."""
    (tmp_path / "in").mkdir()
    wanted = the_class(tmp_path / "in", tmp_path / "pids")
    done = program("course", "grade-class", tmp_path / "in", "--chapters", 1, "--seed", 4711, "--limit", 3, "--out",
                   tmp_path / "points", timeout=900)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    with open(tmp_path / "points" / "points.csv", newline="") as file:
        header, most, *rows = csv.reader(file)
    assert header == ["hand-in", "points", *FULL, "reasons"] and most[:6] == ["(maximum)", "10", "3", "2", "3", "2"]
    assert len(wanted) == len(rows) == 26 and [row[0].lstrip("'") for row in rows] == sorted(wanted)
    for name, points, *each, reasons in rows:
        result = json.loads((tmp_path / "points" / f"{name.lstrip(chr(39))}.json").read_text())
        each = [int(one) for one in each]
        assert (each, int(points)) == (wanted[name.lstrip("'")][0], sum(each)), (name, reasons)
        assert wanted[name.lstrip("'")][1] in reasons and (reasons or each == [*FULL.values()]), (name, reasons)
        assert result["points"] == sum(each) and [row["points"] for row in result["exercises"]] == each, name
    assert rows[0][0] == "'=bob"                                          # no formula for a spreadsheet
    time.sleep(0.5)
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) >= 4 and not any(map(is_alive, pids))


def test_a_room_holds_no_specification():
    """What a witness can import has neither the judge's parts of any exam nor the exams of other exercises.

    Kills: a specification that a student's file finds in course.chapter3, or in an argument of `conversion`.
    """
    for exercise in EXERCISES:
        files = course_files(exercise.number)
        assert not {"judge.py", "mutants.py", "check.py", "classes.py"} & files.keys()
        text = "\n".join(source for name, source in files.items() if name.startswith(("chapter", "exams")))
        assert "def see(" in text and not [part for part in ("def spec(", "def laws(", "def picture(", "def slow(")
                                           if part in text], exercise.number
        entered = [number for number in (e.number for e in EXERCISES) if f"('{number}'" in text]
        assert entered == [exercise.number]
    assert "slow_split" not in "".join(course_files("3.1").values())
    assert "slow_split" in course_files("3.2")["chapter3.py"]
    assert "s * z + a * v" not in course_files("2.3")["chapter2.py"]


@pytest.mark.long
def test_our_own_files_get_all_points_in_their_rooms(tmp_path):
    """Kills: a room that lacks what an exam needs."""
    (tmp_path / "in" / "ours").mkdir(parents=True)
    for file in {exercise.file for exercise in EXERCISES}:
        (tmp_path / "in" / "ours" / file).write_text(S.read(os.path.join(ROOT, file)))
    done = program("course", "grade-class", tmp_path / "in", "--chapters", "1,2,3,4,5,6,7,8", "--out", tmp_path / "to",
                   timeout=400)
    assert f"{sum(e.points for e in chosen())}/{sum(e.points for e in chosen())}  ours\n" in done.stdout, done.stderr


@pytest.mark.parametrize("words", (["nowhere", "--chapters", "1"], ["tests"], ["tests", "--chapters", "9"],
                                   ["tests", "--chapters", "1,x"], ["README.md", "--chapters", "1"],
                                   ["tests", "--chapters", "1", "--out", "tests"],
                                   ["tests", "--chapters", "1", "--out", "README.md"]))
def test_bad_words_of_grade_class_are_status_two(words):
    done = program_here("course", "grade-class", *words)
    assert done.returncode == 2 and done.stderr.strip()


def test_a_witness_command_that_starts_nothing_is_one_line(tmp_path):
    """Kills: a class of zeros because the container's image has no PyTorch."""
    done = program("course", "grade-class", "tests", "--chapters", 1, "--out", tmp_path, "--witness", "sh -c 'exit 3'")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "starts no Python" in done.stderr
