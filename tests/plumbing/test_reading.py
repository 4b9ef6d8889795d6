"""The pages beside the papers: every link leads somewhere, nothing of the sources is lost or said twice."""
import ast
import html.parser
import os
import re

import pytest

from programs import ROOT, run_here, text_of

if not os.path.isdir(os.path.join(ROOT, "reading")):
    pytest.skip("a student's copy has no pages", allow_module_level=True)
import reading.__main__ as R
from reading.prose import equation

VOID = ("meta", "img", "br", "link")


class Page(html.parser.HTMLParser):
    """What a page holds: ids, addresses, its text, and the text of each line of code. Fails if tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.addresses, self.tags, self.text, self.lines, self.open, self.line = [], [], set(), "", {}, [], 0
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        self.addresses += [attributes[name] for name in ("href", "src") if name in attributes]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag not in VOID:
            self.open.append((tag, attributes.get("class", "")))
        if attributes.get("class") == "n":
            self.line = int(attributes["id"][1:])
            self.lines[self.line] = ""

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag
        self.text += " " if tag in ("p", "td", "th", "li", "pre", "h1", "h2", "h3", "a", "div") else ""

    def handle_data(self, data):
        self.text += data
        classes = [name for _, name in self.open]
        if "l" in classes and "n" not in classes:
            self.lines[self.line] += data


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("pages"))
    R.build(folder, {"schedule": "8 x 8   0.998 < 64.815"})
    found = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            found[os.path.join(folder, name)] = Page(file.read())
    return {os.path.basename(path): page for path, page in found.items()}, folder


def lecture(pages):
    return {name: pages[0][name + ".html"] for name in R.Book(ROOT).order}


def test_every_link_leads_somewhere(pages):
    """Kills: a name that moved, a heading that was renamed, a picture that is gone, an id that is there twice."""
    pages, folder = pages
    count = 0
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), [i for i in page.ids if page.ids.count(i) > 1]
        for address in page.addresses:
            if not address.startswith("https://"):
                path, _, at = address.partition("#")
                assert path in (*pages, "") or os.path.exists(os.path.join(folder, path)), f"{name}: {address}"
                assert not at or at in pages[path or name].ids, f"{name}: {address}"
                count += 1
    assert count > 4000


def test_pages_need_nothing_from_elsewhere(pages):
    """Kills: a script, a font or a picture that a browser without a network does not have."""
    for name, page in pages[0].items():
        assert not page.tags & {"script", "link", "iframe"}, name
        with open(os.path.join(pages[1], name), encoding="utf-8") as file:
            assert not re.search(r"@import|url\(|src=\"http", file.read()), name


def test_each_definition_appears_once(pages):
    """Kills: a class without its methods; a definition that two rows show."""
    for name, page in lecture(pages).items():
        for node in ast.parse(text_of(name + ".py")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                inside = node.body if isinstance(node, ast.ClassDef) else []
                names = [f"{node.name}.{n.name}" for n in inside if isinstance(n, ast.FunctionDef)]
                assert all(page.ids.count(each) == 1 for each in (node.name, *names)), (name, node.name)


def test_no_line_of_the_sources_is_lost(pages):
    """Code is there to the letter, docstrings and comments by their words. Kills: a line that falls between rows."""
    for name, page in lecture(pages).items():
        lines = text_of(name + ".py").splitlines()
        words = set(re.findall(r"[a-z]{5,}", page.text.lower()))
        edges = {n for n, line in enumerate(lines, 1) if not line}
        for number, line in enumerate(lines, 1):
            assert number in edges or page.ids.count(f"L{number}") == 1, f"{name}.py:{number}"
            if number in page.lines:
                assert page.lines[number].rstrip() == line, f"{name}.py:{number}"
            else:
                said = set(re.findall(r"(?<![_a-z])[a-z]{5,}(?![_a-z])", line.lower())) - {"alpha", "sigma", "lambda"}
                assert said <= words, f"{name}.py:{number} {said - words}"


def test_each_equation_and_figure_of_the_map_has_its_target(pages):
    """Kills: a row of PAPERS.md whose function moved to another file; an equation that the map gains."""
    found = {(name, i) for name, page in lecture(pages).items() for i in page.ids if re.fullmatch(r"(eq|figure)-\d", i)}
    assert found == {("schedule", f"eq-{n}") for n in (1, 4, 5, 6)} | {("sample", f"eq-{n}") for n in (2, 3, 7)} | {
        ("nested_unet", "eq-2"), ("nested_unet", "eq-3"), ("schedule", "figure-3"), ("schedule", "figure-5"),
        ("dwt", "figure-6")}
    for home, target in found:
        assert f"{home}.html#{target}" in pages[0]["papers.html"].addresses, target
        assert target.startswith("figure") or f"{home}.html#{target}" in pages[0]["index.html"].addresses, target


def test_each_answer_has_its_place_in_the_code_a_figure_or_a_number(pages):
    """Kills: an answer without evidence; a name in one that is not in the code any more."""
    answers = re.split(r"^##+ ", text_of("reading/QUESTIONS.md"), flags=re.MULTILINE)[1:]
    answers = [answer for answer in answers if "\n\n" in answer.strip()]
    assert len(answers) >= 20
    lecture = "|".join(R.Book(ROOT).order)
    for answer in answers:
        names = re.findall(r"`((?:%s)\.(?!py\b)[\w.]+)`" % lecture, answer)
        for name in names:
            assert name.replace(".", ".html#", 1) in pages[0]["questions.html"].addresses, name
        assert names and re.search(r"`python |\.\./figures/|\.\./benchmarks/|A test ", answer), answer


def test_markdown_is_set_whole(pages):
    """Kills: a block of code, a table or a heading that reads as text; a row that is lost."""
    for page, path in R.PAGES.items():
        text, found = text_of(path), pages[0][page + ".html"]
        assert not re.search(r"\|---|```|\n#|\]\(", found.text), path
        assert all(block.strip() in found.text for block in re.findall(r"^```\n(.*?)^```", text, re.M | re.S)), path
        said = set(re.findall(r"[a-z]{5,}", re.sub(r"!\[.*?\]\(.*?\)|\]\(.*?\)", "", text.lower())))
        assert said <= set(re.findall(r"[a-z]{5,}", found.text.lower())), path


def test_a_page_shows_what_its_file_draws_and_prints(pages):
    schedule = pages[0]["schedule.html"]
    assert "8 x 8   0.998 < 64.815" in schedule.text
    for path in ("figures/schedule_logsnr.png", "figures/schedule_noise.png"):
        assert any(address.endswith(path) for address in schedule.addresses)


@pytest.mark.parametrize("text, wanted", [
    ("z_t = alpha_t x + sigma_t eps", "zt = αt x + σt ε"), ("x_hat, 16 x 16, s^2", "x̂, 16 × 16, s2"),
    ("sqrt(H W) of U-Net", "√H W of U-Net"), ("v_mse in B.2.1, a class A", "v_mse in B.2.1, a class A"),
    ("log(1 - e^pi) -> d[n-1]", "log(1 − eπ) → d[n−1]"), ("E_t[-lambda'(t)]", "Et[−λ'(t)]")])
def test_equations_are_set(text, wanted):
    assert Page(R.inline(text, lambda name: None)).text == wanted


def test_fractions_stand_upright():
    """Kills: a fraction that takes a term too many, or loses one."""
    set_ = equation("x_hat = alpha s^2 z / (alpha^2 s^2 + sigma^2) - d / 2", lambda name: None)
    over = re.findall(r'<span class="frac"><span>(.*?)</span><span>(.*?)</span></span>', set_)
    assert [[Page(part).text for part in pair] for pair in over] == [["α s2 z", "α2 s2 + σ2"], ["d", "2"]]


def test_a_mistake_is_one_line():
    assert run_here(R, ["--pages"]) == (2, ": unrecognized arguments: --pages\n")


def test_a_page_that_ends_by_itself_does_not_end_the_others(monkeypatch):
    """Kills: `python -m reading` ends with status 0 and writes nothing, as distill.py's main_program() calls exit."""
    monkeypatch.setattr(R.runpy, "run_path", lambda path, run_name: print("here") or R.sys.exit(None))
    assert R.run_page("distill") == "here\n"
    monkeypatch.setattr(R.runpy, "run_path", lambda path, run_name: R.sys.exit(2))
    with pytest.raises(SystemExit):
        R.run_page("distill")
