"""Lay out a room: a folder with what a witness of one exam needs, and nothing that would help it.

    handed_in/sample.py       the student's file, all other exercises in it put back
    schedule.py, unet.py ...  the project's other files
    plumbing/                 of the project
    course/                   witness.py and what it imports; of the exams only what `see` of this one needs. The
                              specifications, the laws and all other exams are not in it
"""
import ast
import functools
import glob
import os
import re
import shutil

from course.source import HERE, read

JUDGES = ("spec", "laws", "picture", "slow")                              # what only the judge needs of an exam


def names_in(nodes):
    """Return the names and the attributes that these nodes use."""
    inner = [inner for node in nodes for inner in ast.walk(node)]
    return ({node.id for node in inner if isinstance(node, ast.Name)},
            {node.attr for node in inner if isinstance(node, ast.Attribute)})


def defined_in(node):
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()


def enters(node):
    """Return the number of the exam that a statement enters: a class under @exam("1.1"), or a call like
    conversion("2.2", ...)."""
    calls = [call for call in (*getattr(node, "decorator_list", ()), getattr(node, "value", None))
             if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args]
    number = getattr(calls[0].args[0], "value", None) if calls else None
    return number if re.fullmatch(r"\d+\.\d+", str(number)) else None


def without_judges_parts(trees):
    """Remove spec, laws and picture from each class, and from the arguments of each call that enters an exam."""
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = {node.name: [one.arg for one in node.args.args] for node in nodes if isinstance(node, ast.FunctionDef)}
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if not defined_in(part) & {*JUDGES}]
        if isinstance(node, ast.Expr) and enters(node):
            call = node.value
            call.args = [ast.Constant(None) if name in JUDGES else value
                         for name, value in zip(functions[call.func.id], call.args)]


def needed(trees, number, names, attributes):
    """Return (names, attributes) that the exam uses, directly or through what it uses, and those to begin with."""
    before = None
    while before != (names, attributes):
        before = set(names), set(attributes)
        for node in (node for tree in trees.values() for node in tree.body):
            if enters(node) == number or defined_in(node) & names:
                parts = [part for part in node.body if wanted(part, attributes)] + node.decorator_list if isinstance(
                    node, ast.ClassDef) else [node]
                for known, new in zip((names, attributes), names_in(parts)):
                    known |= new
    return names, attributes


def wanted(part, attributes):
    """Return whether a statement of a class is needed: a method that nothing calls is not."""
    return not isinstance(part, ast.FunctionDef) or part.name in attributes or part.name.startswith("__")


@functools.lru_cache(maxsize=None)
def course_files(number):
    """Return {file of course/: its source} for a witness of this exam."""
    trees, todo = {}, ["witness"]
    while todo:                                                           # follow the imports
        name = todo.pop()
        trees[name] = ast.parse(read(os.path.join(HERE, "course", name + ".py")))
        imported = {node.module[7:] for node in ast.walk(trees[name]) if isinstance(node, ast.ImportFrom)
                    and (node.module or "").startswith("course.")}
        chapters = [os.path.basename(path)[:-3] for path in glob.glob(os.path.join(HERE, "course", "chapter*.py"))]
        todo += [other for other in (*imported, *chapters) if other not in (*trees, *todo)]
    exams = {name: tree for name, tree in trees.items() if name == "exams" or name.startswith("chapter")}
    others = [tree for name, tree in trees.items() if name not in exams]
    without_judges_parts(exams)
    names, attributes = needed(exams, number, *names_in(others))
    for tree in exams.values():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                node.body = [part for part in node.body if wanted(part, attributes)] or [ast.Pass()]
            if isinstance(node, ast.ImportFrom):
                node.names = [alias for alias in node.names if alias.name in names]
        tree.body = [node for node in tree.body if enters(node) == number or defined_in(node) & names
                     or isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and node.names]
    return {"__init__.py": "", **{f"{name}.py": ast.unparse(tree) for name, tree in trees.items()}}


def lay_out(room, exercise, source):
    """Fill a new folder. source: the student's file as it is graded."""
    def write(path, text):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    for path in glob.glob("*.py", root_dir=HERE) + glob.glob("plumbing/*.py", root_dir=HERE):
        if path != exercise.file:
            os.makedirs(os.path.join(room, os.path.dirname(path)), exist_ok=True)
            shutil.copyfile(os.path.join(HERE, path), os.path.join(room, path))
    for name, text in course_files(exercise.number).items():
        write(os.path.join(room, "course", name), text)
    write(os.path.join(room, "handed_in", exercise.file), source)
