"""A file of the lecture, cut into rows: words, and the code that they speak of."""
import ast
import builtins
import html
import io
import keyword
import os
import re
import token
import tokenize
from dataclasses import dataclass, field

DEFINITION = (ast.FunctionDef, ast.ClassDef)


@dataclass
class Row:
    """A docstring, a comment or a banner, and the lines of code after it."""
    kind: str                                                             # header, definition, comment or banner
    name: str = ""                                                        # of a definition: diffuse, UNet.forward
    words: list[int] = field(default_factory=list)                        # numbers of the lines
    code: list[int] = field(default_factory=list)


class Source:
    """A file: its lines, its definitions, its tokens."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.text = file.read()
        self.name = os.path.basename(path)[:-3]
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.nodes = dict(self.find(self.tree, ""))                       # {name of a definition: its node}
        self.docs = {}                                                    # {first line: (name, docstring's lines)}
        for name, node in {"": self.tree, **self.nodes}.items():
            if ast.get_docstring(node):
                doc, first = node.body[0], min([d.lineno for d in getattr(node, "decorator_list", [])],
                                               default=getattr(node, "lineno", 1))
                self.docs[first] = name, range(min(first, doc.lineno) if not name else doc.lineno, doc.end_lineno + 1)
        self.constants = {target.id: node.lineno for node in self.tree.body if isinstance(node, ast.Assign)
                          for target in node.targets if isinstance(target, ast.Name)}
        self.local = {name: local_names(node) for name, node in self.nodes.items()}
        self.tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline))
        self.imported = {alias.asname or alias.name: (node.module, alias.name) for node in ast.walk(self.tree)
                         if isinstance(node, ast.ImportFrom) for alias in node.names}

    def find(self, node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, DEFINITION):
                yield prefix + child.name, child
                if isinstance(child, ast.ClassDef):
                    yield from self.find(child, f"{prefix}{child.name}.")

    def rows(self):
        """Cut the file. Every line is in one row, in its words or in its code."""
        spoken = {line for _, lines in self.docs.values() for line in lines}
        own = {t.start[0] for t in self.tokens if t.type == token.COMMENT and t.start[1] < 60
               and not self.lines[t.start[0] - 1][:t.start[1]].strip()}   # further right: a trailing one that goes on
        rows, kept = [], set()
        for number, line in enumerate(self.lines, 1):
            if number in self.docs:
                name, _ = self.docs[number]
                rows.append(Row("definition" if name else "header", name))
            elif number in own:
                kind = "banner" if re.match(r"# -{10,}", line) else "comment"
                if line.startswith(" ") and (self.is_tall(rows[-1]) or number - 1 in kept):
                    kept.add(number)
                    own.discard(number)                                   # it stays in the code, which has no room yet
                elif kind == "banner" or rows[-1].kind != "comment" or rows[-1].code:
                    rows.append(Row(kind))
            (rows[-1].words if number in spoken or number in own else rows[-1].code).append(number)
        return rows

    def is_tall(self, row):
        """Return whether the words of a row take more room than its code, roughly: a comment then has to wait."""
        return bool(row.code) and sum(len(self.lines[number - 1]) for number in row.words) / 45 > len(row.code)

    def words(self, row):
        """Return the text of a row: a docstring, or a comment without its marks."""
        if row.kind in ("header", "definition"):
            return ast.get_docstring(self.nodes.get(row.name, self.tree))
        return "\n".join(re.sub(r"^\s*# ?(-{4,} ?)?", "", self.lines[number - 1]) for number in row.words)

    def figures(self):
        """Return {path of a figure: the name of the function that draws it}."""
        found = {}
        for name, node in self.nodes.items():
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                    for value in call.args:
                        if isinstance(value, ast.Constant) and re.match(r"figures/\w+\.png$", str(value.value)):
                            found[value.value] = call.func.id if call.func.id in self.nodes else name
        return found

    def calls(self, name):
        """Return the names that a definition uses."""
        return {node.id for node in ast.walk(self.nodes[name]) if isinstance(node, ast.Name)}

    # ---------------------------------------------------------------------------------- highlighting

    def coloured(self, link, placed):
        """Return {number: HTML of the line}. placed: the definitions whose anchor is not in the code."""
        marks = {number: [] for number in range(1, len(self.lines) + 1)}
        starts = {node.lineno: name for name, node in self.nodes.items()}
        depth, before = 0, None
        for i, (kind, text, start, end, _) in enumerate(self.tokens):
            depth += (text in ("(", "[", "{")) - (text in (")", "]", "}"))
            wrap = None
            if kind == token.COMMENT:
                wrap = '<span class="c">', "</span>"
            elif kind == token.STRING or token.tok_name[kind].startswith("FSTRING"):
                wrap = '<span class="s">', "</span>"
            elif kind == token.NAME and keyword.iskeyword(text):
                wrap = '<span class="k">', "</span>"
            elif kind == token.NAME and before in ("def", "class") and start[0] in starts:
                name = starts[start[0]]
                place = "" if name in placed else f'id="{name}" '
                wrap = f'<a class="d" {place}href="#{name}">', "</a>"
            elif kind == token.NAME and self.constants.get(text) == start[0] and not start[1]:
                wrap = f'<a class="d" id="{text}" href="#{text}">', "</a>"
            elif kind == token.NAME and not (depth and self.tokens[i + 1].string == "="):
                href = self.target(i, link)
                wrap = (f'<a href="{href}">', "</a>") if href else None
            if wrap:
                for number in range(start[0], end[0] + 1):
                    marks[number].append((start[1] if number == start[0] else 0,
                                          end[1] if number == end[0] else len(self.lines[number - 1]), wrap))
            before = text
        return {number: self.wrapped(number, parts) for number, parts in marks.items()}

    def wrapped(self, number, parts):
        line, out, end = self.lines[number - 1], [], 0
        for start, stop, (opening, close) in parts:
            gap, last = line[end:start], 'class="c"' in opening and line[:start].strip()
            out += [html.escape(gap.rstrip() if last else gap)]
            out += [f'<span class="gap">{" " * (len(gap) - len(gap.rstrip()))}</span>'] if last else []
            out += [opening, html.escape(line[start:stop]), close]
            end = stop
        return "".join(out) + html.escape(line[end:])

    def target(self, i, link):
        """Return the address of the definition that a NAME token means, None for a local variable or another name."""
        text, (number, _) = self.tokens[i].string, self.tokens[i].start
        dotted = self.tokens[i - 1].string == "."
        around = [name for name, node in self.nodes.items() if node.lineno <= number <= node.end_lineno]
        if dotted:
            owner = next((name for name in around if isinstance(self.nodes[name], ast.ClassDef)), "")
            is_method = self.tokens[i - 2].string == "self" and f"{owner}.{text}" in self.nodes
            return f"#{owner}.{text}" if is_method else None
        local = set().union(*(self.local[name] for name in around))
        return None if text in local or hasattr(builtins, text) else link(text)


def local_names(node):
    """Return the arguments and variables of a function, those of functions inside it too."""
    return {inner.arg if isinstance(inner, ast.arg) else inner.id for inner in ast.walk(node)
            if isinstance(inner, ast.arg) or isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)}
