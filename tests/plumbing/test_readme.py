"""README.md and the pages that it leads to: length, example, links, commands, verdicts."""
import glob
import os
import re
import shlex

import pytest
import torch

from config import PRESETS
from programs import ROOT, help_of, text_of

PAGES = ["README.md", "PAPERS.md", "tests/README.md", "plumbing/README.md", "course/README.md",
         "reading/QUESTIONS.md",
         *sorted(os.path.relpath(path, ROOT) for path in glob.glob(os.path.join(ROOT, "benchmarks", "*.md")))]


def test_the_readme_is_short_and_begins_with_the_commands():
    """Kills: a README that grows until nobody reads it."""
    text = text_of("README.md")
    assert 10_000 <= len(text.encode()) <= 13_300
    start = "\n".join(text.splitlines()[:27])
    assert "](figures/first.png)" in start and all(
        words in start for words in ("python sample.py", "python train.py", "python -m pytest"))


def test_the_example_runs():
    """The block as it stands. Kills: a name that moved; an example that draws noise or grey."""
    (example,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S)
    names = {}
    torch.manual_seed(0)
    exec(example, names)
    images = names["images"]
    assert images.shape == (2, 3, 16, 16) and images.abs().max() <= 1
    assert names["loss"] < 0.35 and 0.2 < images.std() < 0.9           # eps from v = 0: a loss near 0.5
    assert len([line for line in example.splitlines() if line and not line.startswith(("import", "from"))]) <= 12


# ------------------------------------------------------------------------------------------ links

def anchors(text):
    """Return the anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_paths_lead_somewhere(name):
    """Kills: a picture, a page, a heading or a file that was moved or renamed."""
    text, folder = text_of(name), os.path.dirname(os.path.join(ROOT, name))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            path = os.path.normpath(os.path.join(folder, path)) if path else os.path.join(ROOT, name)
            assert os.path.exists(path), f"{name}: {link}"
            assert not anchor or anchor in anchors(text_of(os.path.relpath(path, ROOT))), f"{name}: {link}"
    for path in re.findall(r"(?:figures|benchmarks|tests|course|plumbing)/[\w/-]+\.(?:py|png|json|md)", text):
        assert any(os.path.exists(os.path.join(base, path)) for base in (ROOT, folder)), f"{name}: {path}"


def test_pages_that_the_source_names_exist():
    """Kills: a comment that sends the reader to a page that is gone."""
    for path in glob.glob(os.path.join(ROOT, "**", "*.py"), recursive=True):
        source = text_of(os.path.relpath(path, ROOT))
        for name in re.findall(r"\b(?:benchmarks|tests|course|plumbing)/\w+\.md", source):
            assert os.path.exists(os.path.join(ROOT, name)), f"{os.path.relpath(path, ROOT)}: {name}"


# ------------------------------------------------------------------------------------------ commands

def commands(text):
    """Yield (program, words after it) of each `python ...` and `torchrun ...` in code blocks and between backquotes.

    program: train.py, or the dotted name after -m.
    """
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    for line in "\n".join([*blocks, *(" ".join(code.split()) for code in inline)]).replace("\\\n", " ").splitlines():
        if not re.search(r"\b(python3?|torchrun) ", line):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
        lexer.whitespace_split = True
        words = list(lexer)                                               # comments are left out
        starts = [i for i, word in enumerate(words) if word in ("python", "python3", "torchrun")]
        ends = [i for i, word in enumerate(words) if set(word) <= set(";&")] + [len(words)]
        for start in starts:
            command = words[start:min(end for end in ends if end > start)]
            if command[1:2] == ["-m"]:
                yield command[2], command[3:]
            else:
                program = next((i for i, word in enumerate(command) if word.endswith(".py")), None)
                if program:
                    yield command[program], command[program + 1:]


@pytest.mark.parametrize("name", PAGES)
def test_commands_name_programs_flags_and_presets_that_exist(name):
    """Kills: a command that a reader copies and that ends with an error."""
    helps = {}
    for program, words in commands(text_of(name)):
        if program in ("venv", "pytest"):
            continue
        module = program.replace(".", "/")
        paths = [program] if program.endswith(".py") else [module + ".py", module + "/__main__.py"]
        assert any(os.path.exists(os.path.join(ROOT, path)) for path in paths), f"{name}: {program}"
        flags = [word.split("=")[0] for word in words if word.startswith("--")]
        if flags:
            key = (program, *[word for word in words[:1] if not word.startswith("-")])
            helps[key] = helps.get(key) or help_of(program, words)
            for flag in flags:
                assert re.search(re.escape(flag) + r"(?![\w-])", helps[key]), f"{name}: {program} {flag}"
        for preset in (after for flag, after in zip(words, words[1:]) if flag == "--preset"):
            assert preset in PRESETS or preset in ("NAME", "..."), f"{name}: --preset {preset}"


# ------------------------------------------------------------------------------------------ verdicts

def verdicts(name, pattern):
    """{anchor in RESULTS.md: verdict} of the table of claims of a page."""
    return {re.search(pattern, row)[1]: row for row in text_of(name).splitlines()
            if row.startswith("| ") and re.search(pattern, row)}


def test_the_readme_gives_the_verdicts_of_the_results():
    """Kills: a README that says "holds" where the measurement does not. Verdicts have five or six words."""
    results = {anchor: row.split(" | ")[1].strip(" |") for anchor, row in
               verdicts("benchmarks/RESULTS.md", r"^\| \[[^\]]+\]\(#([^)]+)\)").items()}
    readme = {anchor: row.split(" | ")[1].strip(" |") for anchor, row in
              verdicts("README.md", r"\(benchmarks/RESULTS\.md#([^)]+)\)").items()}
    assert len(readme) >= 10
    for anchor, verdict in readme.items():
        assert verdict == results[anchor] and len(verdict.split()) <= 6, anchor
