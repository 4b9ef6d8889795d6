"""Laws of what a student reads: the statements, their links, what each exercise needs, and the tests of a copy."""
import ast
import html.parser
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from programs import program_here, ROOT

from course import source as S
from course.exercises import CHAPTERS, EXERCISES
from course.handout import answer_sheet, table


class Page(html.parser.HTMLParser):
    """The ids and the addresses of a page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.addresses = set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.addresses += [attributes[name] for name in ("href", "src") if name in attributes]


def test_every_link_of_a_copy_leads_somewhere_in_it(work):
    """Kills: a page that the copy lacks, an equation whose place moved, a link to the lecturer's folder."""
    pages = {path: Page(path) for path in (work / "reading").glob("*.html")}
    links = [(work / "EXERCISES.md", address)
             for address in re.findall(r"\]\(([^)\s]+)\)", (work / "EXERCISES.md").read_text())]
    assert len(links) >= 2 * len(EXERCISES) and any(address.endswith("#eq-5") for _, address in links)
    links += [(page, address) for page in pages for address in pages[page].addresses]
    for page, address in links:
        if not address.startswith("https:"):
            path, _, at = address.partition("#")
            to = (page.parent / path).resolve() if path else page
            assert to.exists() and work in to.parents, f"{page.name}: {address}"
            assert not at or at in pages[to].ids, f"{page.name}: {address}"


def test_each_statement_has_its_equation_and_the_page_its_parts(work):
    """Kills: an exercise without an equation, LaTeX whose brackets do not match, a table that forgot a row."""
    text = (work / "EXERCISES.md").read_text()
    for e in EXERCISES:
        statement = text.split(f"### {e.number} ")[1].split("\n### ")[0]
        assert f"```\n{e.equation}\n```" in statement and f"$${e.latex}$$" in statement, e.number
        opened = [re.sub(r"\\[{}]", "", e.latex).count(bracket) for bracket in "{}"]
        assert opened[0] == opened[1] and e.latex.count(r"\begin") == e.latex.count(r"\end"), e.number
        assert [len(re.findall(rf"\\{side}(?![a-z])", e.latex)) for side in ("bigl|\\Bigl", "bigr|\\Bigr")] in (
            [n, n] for n in range(5)), e.number
        assert 1 <= e.level <= 3 and e.minutes and f"## {e.number} {e.title}\n" in answer_sheet(EXERCISES)
        assert f"| {e.number} {e.title} | {' '.join(e.needs)} | {e.level} |" in table(EXERCISES)
    for title in ("Set up", "The papers", "What you should know", "The order", "Hand in", "Help"):
        assert f"## {title}\n" in text
    assert table(EXERCISES) in text and "{table}" not in text
    beyond = re.findall(r"^### Beyond the paper, for no points: .+\n\n(?:.+\n)*?.*\*Measure\*", text, re.MULTILINE)
    assert len(beyond) == len(CHAPTERS)


def inside(copy, *words):
    return subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True, timeout=1200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_pack_takes_the_changed_files(work):
    """Kills: a hand-in without the answers, with the whole project, or with the lecturer's stubs only."""
    assert inside(work, "-m", "course", "pack").returncode == 2             # nothing has changed
    before = (work / "dwt.py").read_text(), (work / "ANSWERS.md").read_text()
    (work / "dwt.py").write_text(S.read(os.path.join(ROOT, "dwt.py")))
    assert "not packed, since nothing is written in it yet: ANSWERS.md" in inside(work, "-m", "course", "pack").stdout
    (work / "ANSWERS.md").write_text(before[1] + "Because.")
    (work / "helper.py").write_text("x = 1\n")
    done = inside(work, "-m", "course", "pack")
    assert done.returncode == 0 and "helper.py" in done.stdout.splitlines()[1], done.stderr
    assert "nothing is written" not in done.stdout
    with zipfile.ZipFile(work / "hand_in.zip") as archive:
        assert sorted(archive.namelist()) == ["ANSWERS.md", "dwt.py"]
    for name, text in zip(("dwt.py", "ANSWERS.md"), before):
        (work / name).write_text(text)
    (work / "helper.py").unlink()
    elsewhere = program_here("course", "pack")
    assert elsewhere.returncode == 2 and elsewhere.stderr.count("\n") == 1


def test_the_tests_of_a_copy_name_no_file_that_it_lacks(work):
    """Tests that cannot pass in a copy are not in it. Kills: a test that reads PAPERS.md or a result in benchmarks/."""
    files = [*(work / "tests").glob("**/*.py")]
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            text = str(getattr(node, "value", ""))
            if isinstance(node, ast.Constant) and len(text) < 200 and not text.startswith("figures/"):  # programs draw
                missing = os.path.isfile(os.path.join(ROOT, text)) and not (work / text).exists()
                assert not missing, f"{file.name}: {text}"


@pytest.mark.long
def test_the_tests_of_a_copy_are_collected_and_those_of_the_mathematics_pass_when_it_is_solved(work, tmp_path):
    """Kills: a test of the lecture that needs more than a copy has."""
    assert inside(work, "-m", "pytest", "-q", "--collect-only").returncode == 0
    shutil.copytree(work, tmp_path / "copy")
    for file in {e.file for e in EXERCISES}:
        (tmp_path / "copy" / file).write_text(S.read(os.path.join(ROOT, file)))
    done = inside(tmp_path / "copy", "-m", "pytest", "-q", "-m", "not slow and not long",
                  *(f"tests/test_{name}.py" for name in ("schedule", "dwt", "precondition", "sample", "cascade")))
    assert done.returncode == 0, done.stdout[-3000:]
