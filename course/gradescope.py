"""Grade on Gradescope: the file that it reads, and the zip that it wants.

Gradescope unpacks the zip to /autograder/source, runs setup.sh once, and run_autograder for each submission, which
lies in /autograder/submission. It reads /autograder/results/results.json.
"""
import glob
import os
import re
import secrets
import tempfile
import zipfile

from plumbing import UserError
from plumbing.files import whole_file, writable_folder, write_json

from course import classes
from course.source import HERE
from course.witness import prepare

SOURCES = ("*.py", "LICENSE", "requirements.txt", "course/*.py", "plumbing/*.py")

SETUP = """#!/usr/bin/env bash
# Gradescope runs this once, as root. The base image needs Python 3.11 or newer (Ubuntu 24.04). On Linux pip may choose
# a GPU build of PyTorch, several GB. A CPU build is enough: set PIP_INDEX_URL to an index that has it.
set -euo pipefail
root="${AUTOGRADER_ROOT:-/autograder}"
apt-get update && apt-get install -y python3-venv
python3 -m venv "$root/venv"
"$root/venv/bin/pip" install -r "$root/source/requirements.txt"
"""

RUN = """#!/usr/bin/env bash
# Gradescope runs this for each submission, as root. The student's code runs as nobody, who cannot read source/.
set -euo pipefail
root="${AUTOGRADER_ROOT:-/autograder}"
export OMP_NUM_THREADS=1 MPLBACKEND=Agg
chmod 700 "$root/source"
witness=()
if [ "$(id -u)" = 0 ]; then
    witness=(--witness "setpriv --reuid 65534 --regid 65534 --clear-groups $root/venv/bin/python")
fi
cd "$root/source"
"$root/venv/bin/python" -m course grade "$root/submission" --chapters CHAPTERS --seed "$(cat seed)" \\
    --gradescope "$root/results/results.json" "${witness[@]}"
"""


def grade(folder, exercises, seed, limit, to, command=None):
    """Grade a submission in rooms, as grade-class does, and write what Gradescope reads."""
    writable_folder(os.path.dirname(to) or ".", "--gradescope")
    prepare()
    why = ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        try:
            rows = classes.rows_of(folder, exercises, seed, limit, place, command)
        except UserError as error:
            why = str(error)
            rows = [classes.zero(exercise, why) for exercise in exercises]
    write_json(to, dict(output=why, tests=[
        dict(number=row["exercise"], name=row["title"], score=row["points"], max_score=row["of"],
             status="passed" if row["status"] == "passed" else "failed",
             output=without(seed, row["message"] or row["status"])) for row in rows]))
    print(f"{sum(row['points'] for row in rows)} of {sum(row['of'] for row in rows)} points; {to}")


def without(seed, text):
    """Return the text without the seed. 0, the default, is no secret."""
    return re.sub(rf"(?<!\d)({seed}|{seed + 7919})(?!\d)", "(seed)", text) if seed else text


def make_zip(chapters, seed, to):
    """Write the autograder's zip: the project, the grader, the seed and two scripts. Return the seed."""
    if os.path.exists(to):
        raise UserError(f"{to}: exists already; name a new file with --out")
    seed = secrets.randbelow(2 ** 31) if seed is None else seed
    with whole_file(to) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        paths = {path for pattern in SOURCES for path in glob.glob(pattern, root_dir=HERE)}
        for path in sorted(paths - {"course/second.py", "course/reading_a_run.py"}):
            archive.write(os.path.join(HERE, path), path)
        for name, text in (("setup.sh", SETUP), ("seed", f"{seed}\n"),
                           ("run_autograder", RUN.replace("CHAPTERS", ",".join(map(str, chapters))))):
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o755 << 16
            archive.writestr(info, text)
    print(f"{to}: chapters {', '.join(map(str, chapters))}, seed {seed}")
