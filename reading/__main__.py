"""The pages beside the papers: each file of the lecture with its words left and its code right.

    python -m reading

It writes reading/*.html (open reading/index.html in a browser) and takes half a minute: it runs each file's own page
(`python schedule.py` and so on) for the numbers that it prints. All words come from the sources, README.md, PAPERS.md,
reading/QUESTIONS.md and benchmarks/*.md. The pages are not in the repository: they would change with every comment.
"""
import argparse
import contextlib
import html
import io
import os
import re
import runpy
import sys
import tempfile

from plumbing.runs import main_program
from plumbing.settings import Parser
from plumbing.watch import COLOURS

from reading.prose import docstring, inline, markdown, slug
from reading.source import Source

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
PAGES = {"papers": "PAPERS.md", "questions": "reading/QUESTIONS.md", "results": "benchmarks/RESULTS.md",
         "notebook": "benchmarks/NOTEBOOK.md"}
PATH = re.compile(r"https:|#|[\w.-]+/|[\w-]+\.(py|md|png|html)\b")
ON_THE_INDEX = ("Three ways to a large image", "Which file is which section", "Do the papers' claims hold here?")


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def section(text, title):
    """Return a section of a page of Markdown, with its heading."""
    return f"## {title}\n" + text.split(f"## {title}\n")[1].split("\n## ")[0]


class Book:
    """All pages. They may lie in any folder, and lead to the figures and files of the project from there.

    project: where the lecture's files and figures are. pages: {page: its Markdown}; a student's copy has none.
    """

    def __init__(self, folder, project=ROOT, pages=PAGES):
        self.project, self.pages = project, pages
        self.order = re.findall(r"^\| `(\w+)\.py` \|", read("README.md"), re.MULTILINE)
        self.sources = {name: Source(os.path.join(project, name + ".py")) for name in self.order}
        self.root = os.path.relpath(project, folder).replace(os.sep, "/")
        self.homes = {}                                                   # {definition: [the files that have it]}
        for name, source in self.sources.items():
            for definition in (*source.nodes, *source.constants):
                self.homes.setdefault(definition, []).append(name)
        self.equations, self.pictures = {}, {}                            # {(page, "5"): definition}, {path: "5"}
        the_map = section(read("PAPERS.md"), "The map: every equation, table and figure")
        self.map = {row: self.place(row) for row in re.findall(r"^\| .*$", the_map, re.MULTILINE)}

    def place(self, row):
        """Give the equations and figures of a row of the map their places. Return the row, its numbers as links.

        The first name of the row is the place of its equations.
        """
        what, here = row.strip("| ").split(" | ")
        name = re.search(r"`(\w+)\.(\w+)`", here)
        figure, drawn = re.match(r"figure (\d+)", what), re.search(r"\(figures/(\w+)\.png\)", here)
        if name and drawn and figure:
            self.pictures[f"figures/{drawn[1]}.png"] = figure[1]
            what = what.replace(figure[1], f"[{figure[1]}]({name[1]}.html#figure-{figure[1]})", 1)
        numbers = re.search(r"\beq\. ([\d, ]*\d)", what)
        if name and numbers:
            for number in re.findall(r"\d+", numbers[1]):
                self.equations[name[1], number] = name[2]
            links = re.sub(r"\d+", rf"[\g<0>]({name[1]}.html#eq-\g<0>)", numbers[1])
            what = what.replace(numbers[1], links, 1)
        return f"| {what} | {here} |"

    # ---------------------------------------------------------------------------------- where a name leads

    def linker(self, page, folder=""):
        """Return link(name) for a page. folder: that of the Markdown from which its addresses start."""
        source = self.sources.get(page)

        def link(name):
            if match := re.fullmatch(r"[Ee]q\. (\d+)", name):
                homes = [home for home, number in self.equations if number == match[1]]
                home = page if page in homes else next((home for home in homes if home != "nested_unet"), None)
                return home and f"{home}.html#eq-{match[1]}"
            if PATH.match(name):
                return self.address(name, folder)
            module, _, definition = name.partition(".")
            if module in self.sources and definition in self.homes and module in self.homes[definition]:
                return f"{module}.html#{definition}"
            if source:
                module, original = source.imported.get(name, (page, name))
                if module in self.homes.get(original, ()):
                    return f"{module}.html#{original}"
            homes = self.homes.get(name, ())
            return f"{homes[0]}.html#{name}" if len(homes) == 1 else None
        return link

    def address(self, path, folder):
        """Return the address of a file of the project, perhaps with a line or a heading; None if there is no such file.

        The pages of this folder and addresses elsewhere stay as they are.
        """
        if re.match(r"https:|#|\w+\.html", path):
            return path
        path, mark, at = re.match(r"([^:#]*)([:#]?)(.*)", path).groups()
        at = f"#{'L' if mark == ':' else ''}{at}" if at else ""
        pages = {file: page for page, file in self.pages.items()} | {f"{name}.py": name for name in self.order}
        for start in (folder, ""):
            place = os.path.normpath(os.path.join(start, path)).replace(os.sep, "/")
            if place in pages:
                return f"{pages[place]}.html{at}"
            if os.path.exists(os.path.join(self.project, place)) and not place.endswith(".html"):
                return f"{self.root}/{place}"
        return None

    # ---------------------------------------------------------------------------------- pages

    def wrap(self, page, title, body):
        """Build a page: a line of the other pages above its body."""
        def item(name, text):
            return f'<span class="here">{text}</span>' if name == page else f'<a href="{name}.html">{text}</a>'
        nav = "".join([item(name, name) for name in (*(("index",) if self.pages else ()), *self.order, *self.pages)])
        return ('<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" '
                f'content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
                f"<style>{COLOURS}{read('reading/style.css')}</style>\n</head>\n<body>\n<nav>{nav}</nav>\n"
                f"{body}\n</body>\n</html>\n")

    def lecture(self, page, printed):
        """Build the page of a file. printed: what `python FILE` prints, or nothing."""
        source, link = self.sources[page], self.linker(page)
        rows = source.rows()
        code = source.coloured(link, {row.name for row in rows if row.name})
        banners = [(source.words(row), row) for row in rows if row.kind == "banner"]
        toc = "".join(f'<a href="#{slug(title)}">{html.escape(title)}</a><br>' for title, _ in banners)
        body = "".join(self.row(source, row, code, link, printed) for row in rows)
        return self.wrap(page, f"{page}.py", f"<h1>{page}.py</h1>\n<p class=\"toc\">{toc}</p>\n{body}")

    def row(self, source, row, code, link, printed):
        """Build a row: its words, then its code; in the header's, the pictures and the numbers before the code."""
        at = "".join(f'<a class="at" id="L{number}"></a>' for number in row.words)
        numbers = [number for number in row.code]
        while numbers and not source.lines[numbers[-1] - 1]:
            numbers.pop()
        while numbers and not source.lines[numbers[0] - 1]:
            numbers.pop(0)
        lines = "".join(f'<span class="l"><a class="n" id="L{n}" href="#L{n}">{n}</a>{code[n]}</span>'
                        for n in numbers)
        (words, notes), name, shown = docstring(source.words(row), link), "", ""
        if row.kind == "banner":
            title = source.words(row)
            heading = f'<h2 id="{slug(title)}">{at}{inline(title, link)}</h2>\n'
            return heading + (f'<section class="row"><div></div><div class="code">{lines}</div></section>\n'
                              if lines else "")
        if row.kind == "definition":
            places = [number for (page, number), place in self.equations.items()
                      if (page, place) == (source.name, row.name)]
            name = f' id="{row.name}"'
            words = (f'<h3><a href="#{row.name}"><code>{row.name}</code></a>'
                     + "".join(f'<a class="eq" id="eq-{n}" href="#eq-{n}">eq. {n}</a>' for n in places) + "</h3>"
                     + words)
            notes = f'<aside>{notes}{self.seen_in(source, row.name, places)}</aside>'
        else:
            words, notes = words + notes, ""                              # only a definition has a margin
        if row.kind == "header":
            shown = self.shows(source, link, printed)
        return (f'<section class="row {row.kind}"{name}><div class="words">{at}{words}</div>\n'
                f'<div>{shown}<div class="code">{lines}</div>{notes}</div></section>\n')

    def shows(self, source, link, printed):
        """Build the figures of a file, and what it prints."""
        out = ""
        for path, name in self.figures(source):
            caption = source.words(next(row for row in source.rows() if row.name == name)).split("\n\n")[0]
            number = self.pictures.get(path)
            out += (f'<figure{f" id=figure-{number}" if number else ""}><a href="{self.root}/{path}">'
                   f'{self.picture(source, path, name)}</a><figcaption><a href="#{name}"><code>{name}</code></a> '
                   f"{inline(' '.join(caption.split()), link)}</figcaption></figure>")
        return out + (f"<pre>{html.escape(printed.strip())}</pre>" if printed else "")

    def figures(self, source):
        """Return [(path, name of the function that draws it), ...] of the figures that are there."""
        return [figure for figure in source.figures().items() if os.path.exists(os.path.join(self.project, figure[0]))]

    def picture(self, source, path, name):
        is_image = {"show_image", "draw_panels", "draw_features"} & source.calls(name)
        kind = "" if is_image else ' class="plot"'
        return f'<img src="{self.root}/{path}" alt="{os.path.basename(path)}"{kind}>'

    def seen_in(self, source, definition, has_number):
        """Build small pictures: the figures that use this definition, if it has a number or is the first in them."""
        small = ""
        for path, name in self.figures(source):
            used = [each for each in source.nodes if each in source.calls(name)]
            if definition in used and (has_number or definition == used[0]):
                small += f'<a href="#{name}">{self.picture(source, path, name)}</a>'
        return f'<div class="seen">{small}</div>' if small else ""

    def of_markdown(self, page):
        """Build a page of one of the Markdown files."""
        path = PAGES[page]
        text = "\n".join(self.map.get(line, line) for line in read(path).splitlines())
        title, _, body = markdown(text, self.linker(page, os.path.dirname(path))).partition("</h1>")
        toc = "".join(f'<a href="#{slug(title)}">{html.escape(title)}</a><br>'
                      for title in re.findall(r"^##+ (.*)$", text, re.MULTILINE))
        return self.wrap(page, re.search("# (.*)", text)[1],
                         f'<main class="page">{title}</h1><p class="toc">{toc}</p>{body}</main>')

    def index(self):
        text = read("README.md")
        parts = [text.split("\n```")[0].rsplit("\n\n", 1)[0], *(section(text, title) for title in ON_THE_INDEX)]
        rows = [row for row in self.map.values() if re.match(r"\| [^|]*eq\. ", row)]
        parts.insert(3, "\n".join(["| in the paper | here |", "|---|---|", *rows]))
        return self.wrap("index", re.search("# (.*)", text)[1],
                         f'<main class="page">{markdown(chr(10).join(parts), self.linker("index"))}</main>')


def build(folder, printed):
    """Write all pages into a folder. printed: {name: what `python NAME.py` prints}."""
    book = Book(folder)
    pages = {"index": book.index(), **{page: book.of_markdown(page) for page in PAGES},
             **{page: book.lecture(page, printed.get(page, "")) for page in book.order}}
    write(folder, pages)
    return len(pages)


def write(folder, pages):
    for page, text in pages.items():
        with open(os.path.join(folder, page + ".html"), "w", encoding="utf-8") as file:
            file.write(text)


def build_lecture(project):
    """Write the pages of another copy's lecture into its reading/, without the other pages. Return the Book."""
    folder = os.path.join(project, "reading")
    os.makedirs(folder, exist_ok=True)
    book = Book(folder, project, {})
    write(folder, {page: book.lecture(page, "") for page in book.order})
    return book


def run_page(name):
    """Run a file of the lecture in another folder, where it may draw. Return what it prints."""
    printed, argv = io.StringIO(), sys.argv
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        try:
            sys.argv = [name + ".py"]
            runpy.run_path(os.path.join(ROOT, name + ".py"), run_name="__main__")
        except SystemExit as end:                                         # a program of main_program() always raises it
            if end.code:
                raise
        finally:
            sys.argv = argv
    return printed.getvalue()


def main():
    Parser(prog="reading", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    order = Book(HERE).order
    drawn = [*order[:order.index("precondition") + 1], "distill"]         # README.md: these are also programs
    count = build(HERE, {name: run_page(name) for name in drawn})
    print(f"wrote {count} pages: open {os.path.relpath(os.path.join(HERE, 'index.html'))}")


if __name__ == "__main__":
    main_program(main)
