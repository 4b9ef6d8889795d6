"""The house: which file imports which, imports inside functions counted, and how long a function may be."""
import ast
import os

from programs import ROOT

# The order of imports: a file imports only what stands before it. data.py comes first, as pages draw its scenes.
LECTURE = ("data", "schedule", "dwt", "unet", "uvit", "text", "nested_unet", "video", "cascade", "precondition",
           "config", "measures", "train", "sample", "distill", "evaluate")


def modules():
    """{"schedule": path, "plumbing.runs": path, ...} of the lecture and the plumbing."""
    found = {name[:-3]: os.path.join(ROOT, name) for name in os.listdir(ROOT) if name.endswith(".py")}
    folder = os.path.join(ROOT, "plumbing")
    names = [name[:-3] for name in os.listdir(folder) if name.endswith(".py") and name != "__init__.py"]
    return found | {f"plumbing.{name}": os.path.join(folder, name + ".py") for name in names}


def tree_of(path):
    with open(path, encoding="utf-8") as file:
        return ast.parse(file.read())


def imports(path, known):
    """The modules of the project that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & known


def arrows():
    files = modules()
    return {name: imports(path, set(files)) for name, path in files.items()}


def test_the_lecture_is_the_plan():
    assert {name for name in modules() if "." not in name} == set(LECTURE)


def test_arrows_run_downward_only():
    for name, used in arrows().items():
        if name in LECTURE:
            above = set(LECTURE[LECTURE.index(name) + 1:])
            names = ", ".join(sorted(used & above))
            assert not used & above, f"{name}.py imports {names}, which the reader meets later"


def test_there_is_no_circle():
    """Kills: a circle that a lazy import hides."""
    graph, done = arrows(), set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path[path.index(name):], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


def test_concept_files_know_nothing_of_settings():
    """A page calls its constructors with the paper's numbers written out."""
    graph = arrows()
    for name in LECTURE[1:LECTURE.index("config")]:
        allowed = {*LECTURE[:LECTURE.index(name)], "plumbing.pages", "plumbing.pictures"}
        assert graph[name] <= allowed, (name, graph[name])


def test_functions_of_the_lecture_fit_a_screen():
    """Under 80 lines, and no more than six over 50."""
    lengths = {}
    for name in LECTURE:
        for node in ast.walk(tree_of(modules()[name])):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths[f"{name}.{node.name}"] = node.end_lineno - node.lineno + 1
    assert max(lengths.values()) < 80, max(lengths, key=lengths.get)
    long = sorted(name for name, lines in lengths.items() if lines > 50)
    assert len(long) <= 6, long
