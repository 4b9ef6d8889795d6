"""The README's promises that can be looked up."""
import ast
import os
import re

import pytest
from programs import ROOT


def readme():
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as file:
        return file.read()


def the_map():
    text = readme().split("## The map: every equation, table and figure")[1].split("\n## ")[0]
    return [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]


def names_of(file):
    """Functions, classes and top-level assignments of a file of the project."""
    with open(os.path.join(ROOT, file), encoding="utf-8") as source:
        for node in ast.parse(source.read()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield node.name
            elif isinstance(node, ast.Assign):
                yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_what_the_map_names_is_there():
    rows = the_map()
    assert len(rows) > 40
    for what, here in rows:
        named = re.findall(r"`([\w./]+)`", here)
        assert named or here.strip().startswith(("not covered, because", "no CLIP, because")), f"{what}: nothing named"
        for name in named:
            if name.endswith(".py"):
                assert os.path.exists(os.path.join(ROOT, name)), f"{what}: {name}"
            elif "." in name:
                file, function = name.split(".")
                assert function in names_of(file + ".py"), f"{what}: {name}"


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
        with open(os.path.join(ROOT, file + ".py"), encoding="utf-8") as source:
            for node in ast.parse(source.read()).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith(("_", "draw")):
                    if node.name not in ("main", "parse", "explain", "check_input", "innermost"):
                        name = f"{file}.{node.name}"
                        assert name in mapped or ast.get_docstring(node), f"{name}: neither in the map nor explained"


def test_files_and_programs_that_the_readme_names_exist():
    text = readme()
    for path in set(re.findall(r"(?:figures|benchmarks|tests|course)/[\w/]+\.(?:py|png|json|md)", text)):
        assert os.path.exists(os.path.join(ROOT, path)), path
    for program in set(re.findall(r"python (\w+(?:/\w+)?\.py)", text)):
        assert os.path.exists(os.path.join(ROOT, program)), program
