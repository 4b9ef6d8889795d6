"""The README's promises that can be looked up."""
import ast
import json
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


# ------------------------------------------------------------------------------------------ its figures

def results(name):
    with open(os.path.join(ROOT, "benchmarks", "results", name + ".json")) as file:
        return json.load(file)


def in_row(values, digits=1, scale=1):
    """As the README has them side by side: '152.4, 132.7', in a sentence as in the cells of a table."""
    return ", ".join(f"{scale * value + 1e-9:,.{digits}f}" for value in values)   # halves go up


def of_tables():
    """Of tables 2 to 6: distance without guidance and letters read with it, and what else the README has of them."""
    for file in ("paper_table2", "paper_table3", "paper_table4", "paper_table5-128_px", "paper_table5-256_px-n120",
                 "paper_table6-64_px_128_px", "paper_table6-256_px"):
        sizes = {}
        for row in results(file)["rows"]:
            size = re.match(r"(?:(\d+) px)?", row["row"])[1]               # None: all rows are of one
            sizes.setdefault(size, {}).setdefault(row["equal"], []).append(row)
        for size, by_equal in sizes.items():
            rows, name = by_equal["time"], f"{file}, {size} px"
            yield f"{name}: distance", in_row([row["unguided"]["fd_held_out"] for row in rows])
            if file != "paper_table4":                                    # whose networks are too young to read
                yield f"{name}: read", in_row([row["guided"]["read_rate"] for row in rows], 0, 100)
            if file[-1] in "34" or "table5" in file:
                yield f"{name}: guided distance", in_row([row["guided"]["fd_held_out"] for row in rows], 0)
            if "table4" in file or "table5" in file:
                yield f"{name}: equal steps", in_row([row["unguided"]["fd_held_out"] for row in by_equal["steps"]])
                key = "steps_a_second_trained" if size == "256" else "steps_a_second"
                base = rows[1 if "table4" in file else 0][key]            # the paper's 100 %: 4+5 blocks, no patching
                yield f"{name}: speed", in_row([row[key] / base for row in rows], 0, 100)


def of_other_tables():
    """Of the other tables: rows and sentences, as the README has them."""
    best, equal = results("paper_best")["runs"], results("equal_time")["runs"]
    four = ("glyphs64", "glyphs64_unet", "nested", "cascade")
    for minutes in (10, 30, 60):
        rows = [next(row for row in best[name] if row["minutes"] == minutes) for name in four]
        yield f"best, {minutes} minutes: distance", in_row([row["fd_held_out"] for row in rows])
        yield f"best, {minutes} minutes: read", in_row([row["read_rate"] for row in rows], int(minutes > 10), 100)
    for name, rows in equal.items():
        last = rows[-1]
        yield f"equal_time, {name}", in_row([last["fd_held_out"], last["is"], 100 * last["read_rate"]])
    for name in ("grown", "nested", "glyphs64_unet"):
        yield f"mdm, {name}", in_row([row["fd_held_out"] for row in equal[name] if row["minutes"] in (10, 15, 20)])
    for kind in ("made", "real"):
        rows = [row for row in results("sweep_s_renoised")["rows"] if row["low_res"] == kind]
        yield f"s, low-res images {kind}: distance", in_row([row["fd_held_out"] for row in rows])
        yield f"s, low-res images {kind}: read", in_row([row["read_rate"] for row in rows], 0, 100)
    guided = [row for row in results("sweep_guidance")["rows"] if row["guidance"] != "1.05"]
    yield "guidance: distance", in_row([row["fd_train"] for row in guided])
    yield "guidance: inception score", in_row([row["is"] for row in guided])
    yield "guidance: read", in_row([row["read_rate"] for row in guided], 0, 100)
    for schedule in ("interpolated", "shifted"):
        rows = [row for row in results("text_guidance")["rows"]
                if (row["schedule"], row["clip_x"]) == (schedule, "static")]
        yield f"text, {schedule}: distance", in_row([row["seen"]["fd_held_out"] for row in rows])
        yield f"text, {schedule}: all right", in_row([row["seen"]["all_right"] for row in rows], 0, 100)
    for row in results("distillation")["rows"]:
        yield f"distillation, {row['what']}, w = {row['w']}, {row['steps']} steps", ", ".join([
            in_row([row["fd_held_out"]]), in_row([row["read_rate"]], 0, 100),
            in_row([row["seconds_an_image"]], 0 if row["seconds_an_image"] >= 0.01 else 1, 1000) + " ms"])
    sides = {}
    for row in results("speed_growth_cpu")["rows"]:
        sides.setdefault(row["patching"], []).append(row["seconds_a_call"])
    for patching, seconds in sides.items():
        yield f"growth, {patching}", in_row(seconds, 0, 1000)
    for file, names in (("peers", ("ours", "diffusers-at-ours", "ddp-unet-at-ours", "ours-without-classes",
                                   "ddp-uvit-at-ours")),
                        ("peers-sampler", ("ours-without-classes", "ours-without-classes-ddpm", "ddp-uvit-at-ours"))):
        for name in names:
            of_it = [result for result in results(file)["results"] if result["name"] == name]
            yield f"{file}, {name}", in_row([sum(result[key] for result in of_it) / len(of_it)
                                             for key in ("fd_held_out", "fd_few")])
    evaluated = results("glyphs64")
    for key in ("fd_train", "fd_held_out", "is"):
        yield f"glyphs64, {key}", in_row([evaluated[key], evaluated["real_scenes"][key]], 2)


def test_the_figures_are_those_that_were_measured():
    """Each row of the README's tables of results, rounded, from benchmarks/results/.

    Kills: a digit mistyped, rows in another order, a measurement made anew and the README left as it was.
    """
    text = re.sub(r" ± [\d.]+", "", readme()).replace("*", "").replace(" %", "").replace(" | ", ", ")
    missing = {what: row for what, row in [*of_tables(), *of_other_tables()] if row not in text}
    assert not missing
