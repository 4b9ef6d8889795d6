"""PAPERS.md, tested both ways: each name in it is in the code, and each number of the paper is in it."""
import ast
import os
import re

import pytest
import torch

import config as C
from plumbing.settings import override
from programs import ROOT, text_of


def the_map():
    text = text_of("PAPERS.md").split("## The map: every equation, table and figure")[1].split("\n## ")[0]
    return [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


def names_of(file):
    """Return the functions, classes and top-level assignments of a file of the project."""
    names = set()
    with open(os.path.join(ROOT, file), encoding="utf-8") as source:
        for node in ast.parse(source.read()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
    return names


def check_names(where, text):
    """Look up each `file.py`, `file.name` and `plumbing.file.name` of a cell. Return how many there are."""
    named = re.findall(r"`([\w./]+)`", text)
    for name in named:
        if name.endswith(".py"):
            assert os.path.exists(os.path.join(ROOT, name)), f"{where}: {name}"
        elif "." in name:
            module, _, thing = name.rpartition(".")
            assert thing in names_of(module.replace(".", "/") + ".py"), f"{where}: {name}"
    return len(named)


def test_what_the_map_names_is_there():
    """Kills: a function that was renamed or moved and not here."""
    rows = the_map()
    assert len(rows) > 40
    for what, here in rows:
        found = check_names(what, here)
        assert found or here.strip().startswith(("not covered, because", "no CLIP, because")), f"{what}: nothing named"


def test_what_the_errata_name_is_there():
    """Kills: an erratum of a function that was renamed; a choice whose file has no `# Paper:` note."""
    errata, choices = (text_of("PAPERS.md").split(f"## {title}")[1].split("\n## ")[0]
                       for title in ("Errata", "What the papers leave open"))
    rows = [line for line in (errata + choices).splitlines() if line.startswith("| ")]
    assert len(rows) > 30
    for row in rows:
        check_names(row, row.rsplit(" | ", 1)[1])
    for file in set(re.findall(r"`(\w+\.py)` \||`(\w+\.py)`(?=, `\w+\.py` \|)", choices)):
        assert "# Paper:" in text_of("".join(file)), file


@pytest.mark.parametrize("kind, numbers", [("eq", range(1, 8)), ("table", range(1, 10)), ("figure", range(1, 11))])
def test_the_map_has_every_number_of_simple_diffusion(kind, numbers):
    found = set()
    for what, _ in the_map():
        if not what.strip().startswith(("MDM", "CDM")):
            for first in re.findall(kind + r"s?\.? ([\d, to]+)", what):
                parts = [int(n) for n in re.findall(r"\d+", first)]
                found |= set(range(parts[0], parts[-1] + 1)) if " to " in first else set(parts)
    assert found == set(numbers)


def test_each_function_of_a_concept_file_has_its_place_in_the_paper():
    """The other way round: what is public in these files is in the map, or says in its docstring where it is from."""
    mapped = {name for _, here in the_map() for name in re.findall(r"`([\w.]+)`", here)}
    for file in ("schedule", "dwt", "unet", "uvit", "nested_unet", "cascade", "distill"):
        concepts = text_of(file + ".py").split("- the page of the lecture\n")[0]
        for node in ast.parse(concepts).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(("_", "draw")):
                if node.name not in ("main", "parse", "explain", "check_input", "innermost"):
                    name = f"{file}.{node.name}"
                    assert name in mapped or ast.get_docstring(node), f"{name}: neither in the map nor explained"


def test_the_command_for_appendix_c_has_its_maps_and_twelve_blocks_at_16():
    """C: "4 by 4 patching gives 256 resolution feature maps". Kills: the twelve blocks of a 512 px preset, at 32."""
    words = re.search(r"`--preset (\w+) --size (\d+) --patching (\w+) --multiscale 32`", text_of("PAPERS.md")).groups()
    with torch.device("meta"):
        model = C.build_model(override(C.PRESETS[words[0]], size=(int(words[1]),) * 2, patching=words[2]))
    assert model.size == (1024, 1024) and model.first_map == (256, 256)
    assert {256 >> i: len(blocks) for i, blocks in enumerate(model.down)}[16] == 12
