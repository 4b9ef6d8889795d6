"""Find, cut and put back functions in a source file. Standard library only.

Functions are found by the syntax tree, so the lecture's files carry no marks. A name is "function" or "Class.method".
"""
import ast
import functools
import io
import os
import re
import textwrap
import tokenize

from plumbing import UserError

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def read(path):
    """Return the text of a file. Raises UserError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a plain file")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def lines_of(source):
    """Split a source into lines as Python does. str.splitlines also cuts at form feeds and at U+2028 from PDFs."""
    lines = re.split(r"\r\n|\r|\n", source)
    return lines[:-1] if lines[-1] == "" else lines


@functools.lru_cache(maxsize=256)                                         # check parses the same files very often
def parse(source):
    return ast.parse(source)


def find(tree, name):
    """Return all nodes that define `name`. Python uses the last one."""
    nodes = [tree]
    for part in name.split("."):
        nodes = [node for outer in nodes for node in ast.iter_child_nodes(outer)
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == part]
    return nodes


def span(node):
    """Return the first and last line of a definition with its decorators, counted from 1."""
    return min([node.lineno] + [d.lineno for d in node.decorator_list]), node.end_lineno


def body(node, lines):
    """Return the first and last line of a function's code: what follows the docstring, with the comments above it."""
    if ast.get_docstring(node) is not None:
        return node.body[0].end_lineno + 1, node.end_lineno
    start = node.body[0].lineno
    while not lines[start - 2].strip() or lines[start - 2].lstrip().startswith("#"):
        start -= 1
    return start, node.end_lineno


def text_of(source, name):
    """Return the text of the last definition of `name`, or None."""
    nodes = find(parse(source), name)
    if not nodes:
        return None
    first, last = span(nodes[-1])
    return "\n".join(lines_of(source)[first - 1:last])


def strip(source, exercises):
    """Replace the bodies of these exercises' functions by a stub. Signatures and docstrings stay."""
    lines, cuts = lines_of(source), []
    for exercise in exercises:
        nodes = find(parse(source), exercise.name)
        if not nodes:
            raise UserError(f"{exercise.file} has no {exercise.name} (exercise {exercise.number})")
        cuts.append((*body(nodes[-1], lines), " " * nodes[-1].body[0].col_offset
                     + f'raise NotImplementedError("exercise {exercise.number}: {exercise.title}")'))
    for start, last, stub in sorted(cuts, reverse=True):                  # from the end: line numbers above stay valid
        lines[start - 1:last] = [stub]
    return "\n".join(lines) + "\n"


NOTE = re.compile(r"\s*(# )?\bNote:(?= |$)")


def without_notes(source):
    """Remove each note: what follows "Note:" in a docstring or a comment, to the end of its paragraph.

    The lecture marks with it what answers a question or is the formula that an exercise asks for. A paragraph ends at a
    blank line, at a line "#", at "# Paper:", and where the docstring or the comment ends.
    """
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0] for t in tokens if t.type == tokenize.COMMENT and t.line.lstrip().startswith("#")}
    kept, inside, of_comment = [], False, False
    for number, line in enumerate(lines_of(source), 1):
        bare, note = line.strip(), NOTE.search(line)
        if inside and (bare in ("", "#", '"""') or bare.startswith("# Paper:")
                       or of_comment and number not in comments):
            inside = False
            if not bare and not kept[-1].strip():                         # one blank line is enough
                continue
        if not inside and not note:
            if bare == '"""' and not kept[-1].strip():
                kept.pop()
            kept.append(line)
            continue
        if not inside:
            of_comment = number in comments
        before = "" if inside else line[:note.start()]
        inside = not bare.endswith('"""')
        if not inside and not before.strip():                             # the docstring ends with the note
            before = line[:len(line) - len(line.lstrip())]
            if not kept[-1].strip():
                kept.pop()
        if not inside or before.strip():
            kept.append(before + ("" if inside else '"""'))
    return "\n".join(kept) + "\n"


def put_back(source, canonical, exercises):
    """Replace the functions of these exercises by those of `canonical`, in the indent of `source` (it may use tabs).

    A function that is missing is appended to the file, or to its class.
    """
    for exercise in exercises:
        right = textwrap.dedent(text_of(canonical, exercise.name))
        nodes = find(parse(source), exercise.name)
        if len(nodes) == 1 and textwrap.dedent(text_of(source, exercise.name)) == right:
            continue
        for node in reversed(nodes):
            lines, (first, last) = lines_of(source), span(node)
            lines[first - 1:last] = lines_of(textwrap.indent(right, lines[first - 1][:node.col_offset]))
            source = "\n".join(lines) + "\n"
        if not find(parse(source), exercise.name):
            lines, owner = lines_of(source), exercise.name.rpartition(".")[0]
            if classes := find(parse(source), owner):
                last = classes[-1].body[-1]
                indent = re.match(r"[ \t]*", lines[last.lineno - 1])[0]
                lines[last.end_lineno:last.end_lineno] = ["", *lines_of(textwrap.indent(right, indent))]
            elif not owner:
                lines += ["", "", *lines_of(right)]
            source = "\n".join(lines) + "\n"
    return source


def edit(canonical, exercise, old, new):
    """Replace `old` by `new` in the body of the exercise's function. Raises UserError unless `old` occurs once."""
    lines = lines_of(canonical)
    first, last = body(find(parse(canonical), exercise.name)[-1], lines)
    code = "\n".join(lines[first - 1:last])
    if code.count(old) != 1:
        raise UserError(f"course/mutants.py: exercise {exercise.number}: {old!r} occurs {code.count(old)} times in "
                        f"{exercise.target}, not once")
    return "\n".join(lines[:first - 1] + lines_of(code.replace(old, new)) + lines[last:]) + "\n"
