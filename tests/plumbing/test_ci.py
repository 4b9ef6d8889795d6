"""The gate, .ci/run, with a stand-in for Python: what it shows, and its status."""
import os
import shutil
import subprocess

import pytest

from programs import ROOT

# Makes an environment that holds itself, and fails or succeeds as it is told. The lists differ in their first line.
PYTHON = """#!/bin/sh
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && ln -s /bin/true "$3/bin/pip";;
"-m pytest -q --durations=8") exit $QUICK;;
"-m pytest -q -m long tests/plumbing/test_course"*) sleep 1; exit $COURSE;;
esac
"""


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="bash")
@pytest.mark.parametrize("quick, course", [(0, 0), (3, 0), (0, 4), (3, 4)])
def test_the_gate_shows_both_lists_whichever_fails(tmp_path, quick, course):
    """Kills: an end at the first failure that takes the other list's words, and its folder from under it."""
    for folder in (".ci", "bin", "reading", "work", "tests/plumbing"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("index", "schedule", "distill"):
        (tmp_path / "reading" / f"{name}.html").write_text("")
    shutil.copy(os.path.join(ROOT, ".ci", "run"), tmp_path / ".ci" / "run")
    (tmp_path / "bin" / "python3").write_text(PYTHON)
    (tmp_path / "bin" / "python3").chmod(0o755)
    done = subprocess.run(["/bin/bash", tmp_path / ".ci" / "run"], capture_output=True, text=True, timeout=60, env={
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "TMPDIR": str(tmp_path / "work"), "QUICK": str(quick),
        "COURSE": str(course)})
    shown = done.stdout.splitlines()
    assert done.returncode == (course or quick) and done.stderr == ""
    assert ("== all passed" in shown) == (not quick and not course)
    assert ("== long tests of runs: several processes, torch.compile's graphs" in shown) == (not quick)
    assert "== long tests of the course, of the list for a GPU, of kills, of shards" in shown
    assert ("== text by a frozen T5: the optional package, for its tests alone" in shown) == (not course)
    assert not os.listdir(tmp_path / "work")                              # it cleans up
