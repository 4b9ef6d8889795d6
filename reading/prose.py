"""Words and equations: docstrings, comments and Markdown become HTML.

`link(name)` returns the address of a definition, a file or an equation ("eq. 5"), or None.
"""
import html
import inspect
import re

GREEK = dict(zip("alpha beta eps eta lambda mu nu phi pi sigma".split(), "αβεηλμνφπσ"))
WORDS = {*GREEK, "log", "exp", "sqrt", "sigmoid", "cos", "tan", "logsnr", "with"}     # the words of an equation
SIGNS = {"->": "→", "<-": "←", "=>": "⇒", "<=": "≤", ">=": "≥", " - ": " − ", " * ": " · ",
         "~": "∼", "+inf": "+∞"}
ANY_GREEK, EXPONENT = "|".join(GREEK), r"\^(?:\{[^}]*\}|-?\d+(?:/\d+)?|[A-Za-z]+)"
SCRIPT = r"_(?:\{[^}]*\}|cond|null|pred|min|max|st|\w)(?!\w)|" + EXPONENT
TOKENS = {                                                                # what stands out in a passage
    "code": r"`[^`]+`|(?<![\w-])--[a-z][\w-]*",
    "file": r"\b[\w/]+\.(?:py|md)\b|(?<!\d, )\b[Ee]q\. \d+",
    "plain": r"\b[Aa]ppendix [A-C]\b",
    "times": r"(?<=\d)x(?=\d)|(?<=\d) x (?=\d)|(?<=\b[sdkn]) x (?=[sdkn]\b)",
    "minus": rf"(?:(?<![\w)\]-])|(?<=\b[a-zN]))-(?=\d|{ANY_GREEK}|log|[a-z]\b)",
    "sign": "|".join(map(re.escape, SIGNS)),
    "symbol": rf"(?:(?<![\w'.])(?<!\w-)|(?<=\d)(?=[nNC]\b))(?:{ANY_GREEK}|logsnr(?=_[a-z]\b)|[A-Za-z])"
              rf"(?:_hat\b)?(?:{SCRIPT})*(?!\w|'\w|\.\w|-[A-Za-z])",
    "script": rf"(?<=[\w)|\]]){EXPONENT}",
    "name": r"[A-Za-z_]\w+(?:\.\w+)*"}
TOKEN = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in TOKENS.items()))


def anchor(href, text):
    return f'<a href="{href}">{text}</a>' if href else text


def inline(text, link):
    """Set a passage of a docstring or a comment: code, names, symbols, roots."""
    if "# Paper:" in text and not text.startswith("# Paper:"):            # a note in the middle of a passage
        before, _, note = text.partition("# Paper:")
        return f"{inline(before, link)}{inline('# Paper:' + note, link)}"
    if match := re.match(r"# (Paper|Beyond the papers): ", text):
        return f'<span class="note"><b>{match[1]}</b> {inline(text[match.end():], link)}</span>'
    before, root, rest = text.partition("sqrt(")
    if root and before.count("`") % 2 == 0:
        inside, rest = rest[:closing(rest)], rest[closing(rest) + 1:]
        return f'{inline(before, link)}√<span class="root">{inline(inside, link)}</span>{inline(rest, link)}'
    out, end = [], 0
    for match in TOKEN.finditer(text):
        out += [html.escape(text[end:match.start()]), set_token(match.lastgroup, match[0], link)]
        end = match.end()
    return "".join(out) + html.escape(text[end:])


def set_token(kind, token, link):
    if kind == "code":
        return code(token.strip("`"), link)
    if kind == "file":
        return anchor(link(token), token)
    if kind in ("plain", "times", "minus", "sign"):
        return {"times": token.replace("x", "×"), "minus": "−"}.get(kind) or SIGNS.get(token, token)
    if kind == "name":
        href = link(token) if re.search(r"_|[a-z][A-Z]|[A-Z]{2}[a-z]|\.", token) else None
        return anchor(href, f"<code>{token}</code>") if href or "_" in token else token
    base, hat, scripts = re.match(r"([A-Za-z]*)(_hat)?(.*)", token).groups()
    base = GREEK.get(base, base) + ("\u0302" if hat else "")              # a letter, and its hat over it
    out = base if token in ("a", "A", "I") or base in ("", "logsnr") else f"<i>{base}</i>"
    for mark, script in re.findall(r"([_^])(\{[^}]*\}|[^_^{]+)", scripts):
        tag = "sub" if mark == "_" else "sup"
        out += f"<{tag}>{inline(script.strip('{}'), link).replace('-', '−')}</{tag}>"
    return out


def code(text, link):
    """Set code. A name leads to its definition, a command to its file."""
    name = re.match(r"(?:python )?([\w./:]+)(?:\(\))?$", text)
    href = link(name[1]) if name else None
    return anchor(href, f"<code>{html.escape(text)}</code>")


# ------------------------------------------------------------------------------------------ equations

def closing(text):
    """Return the index of the bracket that closes the one before this text."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            return i
    return len(text)


def is_equation(text):
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"[_^](?:\{[^}]*\}|[\w/-]+)", "", text))
    return "`" not in text and bool(re.search(r"[=^/]", text)) and set(words) <= WORDS


def split_outside(text, pattern):
    """Split text where the pattern is found outside of brackets; what is found stays, between the parts."""
    parts, end = [], 0
    for match in re.finditer(pattern, text):
        if text[:match.start()].count("(") == text[:match.start()].count(")"):
            parts += [text[end:match.start()], match[0]]
            end = match.end()
    return [*parts, text[end:]]


def equation(text, link):
    """Set an equation, its fractions upright."""
    out, text = [], re.sub(r" +(?=[=+-] )|(?<= [=+-]) +", " ", text)
    for term in split_outside(text, r" (?:=|\+|-|=>|with) |, +| {2,}"):
        over, *under = split_outside(term, " / ")
        if not under:
            out.append(inline(term, link) if term.strip() else '<span class="quad"></span>')
            continue
        bracket = re.match(r"(?:sqrt)?\(", under[1])
        end = bracket.end() + closing(under[1][bracket.end():]) + 1 if bracket else len(under[1])
        minus, over = ("−", over[1:]) if over.startswith("-") else ("", over)
        parts = [inline(re.sub(r"^\(([^()]*)\)$", r"\1", part), link) for part in (over, under[1][:end])]
        out.append(f'{minus}<span class="frac"><span>{parts[0]}</span><span>{parts[1]}</span></span>'
                   f"{inline(under[1][end:], link)}")
    return "".join(out)


# ------------------------------------------------------------------------------------------ docstrings

def docstring(text, link):
    """Set a docstring or a comment: paragraphs, lists, aligned columns, equations. Return this, and its notes."""
    groups, kind = [], ""
    for line in inspect.cleandoc(text).splitlines():
        before, kind = kind, kind_of(line, kind)
        starts = kind != before or re.match(r"\s*- |# [A-Z][\w ]*: |Needs: ", line)
        if kind and (starts or kind == "text" and not groups[-1][1]):
            groups.append((kind, []))
        if kind:
            groups[-1][1].append(line)
    setters = {"text": set_text, "item": set_text, "columns": set_columns}
    notes = "".join(set_text(lines, link) for kind, lines in groups if kind == "note")
    words = "".join(setters[kind](lines, link) for kind, lines in groups if kind != "note")
    return re.sub(r"(?:<li>.*?</li>)+", lambda items: f"<ul>{items[0]}</ul>", words), notes


def kind_of(line, before):
    if not line.strip() or line.startswith("# ") or line.lstrip().startswith("- "):
        return "" if not line.strip() else "note" if line.startswith("# ") else "item"
    if before == "item" and line.startswith("    "):
        return "item"
    return "columns" if line.startswith(" ") or re.match(r"\S.{0,26}? {2,}\S", line) else "text"


def set_text(lines, link):
    words = " ".join([lines[0].strip(), *(line.strip().removeprefix("# ") for line in lines[1:])])
    if words.startswith("- "):
        return f"<li>{inline(words[2:], link)}</li>"
    return f'<p{" class=meta" if words.startswith(("Paper: ", "Needs: ")) else ""}>{inline(words, link)}</p>'


def set_columns(lines, link):
    """Set lines that are indented or have columns: as a table, as equations, or a drawing as it is."""
    if any("-->" in line for line in lines):
        return f"<pre class='drawing'>{html.escape(inspect.cleandoc(chr(10).join(lines)))}</pre>"
    rows = []
    for cells in columns(lines):
        if cells[0] or not rows:
            rows.append(cells)
        else:                                                             # a line that goes on
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells)]
    is_names = not lines[0].startswith(" ")
    if len(rows) == 1 and not is_names:
        quad = '<span class="quad"></span>'
        return f'<p class="set">{quad.join(set_cell(cell, False, link) for cell in rows[0])}</p>'
    body = "".join("<tr>" + "".join(f"<td>{set_cell(cell, is_names and not i, link)}</td>"
                                    for i, cell in enumerate(row)) + "</tr>" for row in rows)
    kind = "names" if is_names else "set commands" if rows[0][0].startswith("python ") else "set"
    return f'<table class="{kind}">{body}</table>'


def columns(lines):
    """Cut lines into cells, at the columns of two blanks or more that all lines share."""
    width = max(map(len, lines))
    blank = "".join(" " if not "".join(line[i:i + 1] for line in lines).strip() else "x" for i in range(width))
    cuts = [match.end() for match in re.finditer(r"(?<=x) {2,}", blank)]
    if not cuts and len(lines) > 1 and any(re.search(r"\S {3,}\S", line) for line in lines):
        return [[*re.split(" {3,}", line.strip(), maxsplit=1), ""][:2] for line in lines]
    return [[line[start:end].strip() for start, end in zip([0, *cuts], [*cuts, None])] for line in lines]


def set_cell(cell, is_name, link):
    if is_name or cell.startswith(("python ", "torchrun ")):
        return code(cell, link)
    return f'<span class="eq">{equation(cell, link)}</span>' if is_equation(cell) else inline(cell, link)


# ------------------------------------------------------------------------------------------ Markdown

def slug(title):
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def span(text, link):
    """Set a line of Markdown. link also takes the addresses of its links and pictures."""
    def one(match):
        bang, label, address, ticks, bold, slanted = match.groups()
        if ticks:
            return code(ticks, link)
        if bold:
            return f"<b>{span(bold, link)}</b>"
        if slanted:
            return f"<em>{span(slanted, link)}</em>"
        if bang:
            return f'<img src="{link(address)}" alt="{html.escape(label)}">'
        return anchor(link(address), span(label, link))
    text, parts, end = re.sub(r" (?=[±%])|(?<=±) ", "\u00a0", text), [], 0
    for match in re.finditer(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\])*)\]\(([^)\s]+)\)|`([^`]+)`|\*\*(.+?)\*\*"
                             r"|\*([^*\s][^*]*)\*", text):
        parts += [html.escape(text[end:match.start()]), one(match)]
        end = match.end()
    return "".join(parts) + html.escape(text[end:])


def markdown(text, link):
    """Set a page of Markdown, as far as the project uses it: headings, tables, lists, blocks of code, paragraphs."""
    groups, kind = [], ""
    for line in text.splitlines():
        before = kind
        is_open = kind == "`" and (len(groups[-1][1]) == 1 or groups[-1][1][-1] != "```")
        if is_open or line.startswith("```"):
            kind = "`"                                                    # until the line that closes the block
        else:
            mark = re.match(r"\||#(?=#* )|-(?= )", line)
            kind = mark[0] if mark else "text" if line else ""
            kind = "-" if line.startswith("  ") and before == "-" else kind
        if kind and (kind != before or kind == "#" or line.startswith("- ")):
            groups.append((kind, []))
        if kind:
            groups[-1][1].append(line)
    return "".join(set_group(kind, lines, link) for kind, lines in groups).replace("</ul><ul>", "")


def set_group(kind, lines, link):
    words = " ".join(line.strip() for line in lines)
    if kind == "`":
        return f"<pre>{html.escape(chr(10).join(lines[1:-1]))}</pre>"
    if kind == "-":
        return f"<ul><li>{span(words[2:], link)}</li></ul>"
    if kind == "#":
        marks, _, title = words.partition(" ")
        return f'<h{len(marks)} id="{slug(title)}">{span(title, link)}</h{len(marks)}>'
    if kind == "|":
        rows = [[span(cell.strip(), link) for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])] for line in lines]
        head, *body = ["".join(f"<td>{cell}</td>" for cell in row) for i, row in enumerate(rows) if i != 1]
        return (f'<div class="wide"><table class="data"><thead><tr>{head.replace("td>", "th>")}</tr></thead>'
                f'<tbody>{"".join(f"<tr>{row}</tr>" for row in body)}</tbody></table></div>')
    return f"<p>{span(words, link)}</p>"
