"""Captions: read them in any Unicode encoding, match them to their images, say with counts what is wrong with them."""
import io
import json
import os
import posixpath
import re
import unicodedata

from plumbing import UserError

# Control characters, halves of characters, and what stands for bytes that are no text.
NOT_TEXT = re.compile("[\0-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
MOST = 100_000                                                            # images whose captions are looked at


def open_text(path):
    """Open a text file as UTF-8, UTF-16 or UTF-32, whichever its first bytes say: Windows writes each of them."""
    file = open(path, "rb")                                               # once: it may be a pipe of the shell
    return io.TextIOWrapper(file, json.detect_encoding(file.peek(4)[:4]), errors="replace")


def tidy(caption):
    """Write a caption in one way: a line break or other space is one space, a letter and its accent one character."""
    return unicodedata.normalize("NFC", " ".join(caption.split()))


def read_captions(path):
    """Yield (line number, file, its captions) for each line of a captions.jsonl. Raises UserError for a wrong line."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip("\ufeff \r\n\t"):                           # a byte order mark: two files joined
                continue
            try:
                entry = json.loads(line.lstrip("\ufeff"))
                name = entry["file"] if "file" in entry else entry["file_name"]
                captions = entry["caption"] if "caption" in entry else entry["text"]
                captions = captions if isinstance(captions, list) else [] if captions is None else [captions]
                yield number, name + "", [caption + "" for caption in captions]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise UserError(f'{path}, line {number}: want {{"file": ..., "caption": ...}}, the caption a text, a '
                                "list of texts, or null") from None


def plain_name(name):
    """Write a file's name in one way: / between folders, no ./ before it, a letter and its accent one character."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


class Captions:
    """The captions of the images `files` in a folder: captions[i] is a tuple, mostly of one, without a caption ().

    They are lines of captions.jsonl in the folder, or else the text file of the same name beside the image.

    nameless   (file, how many captions) of the lines of captions.jsonl that name no image
    broken     files and lines that hold no text, as far as they were read
    """

    def __init__(self, folder, files):
        self.files, self.listed, self.nameless, self.broken = files, {}, [], set()
        path = os.path.join(folder, "captions.jsonl")
        if not os.path.isfile(path):
            return
        names = [os.path.relpath(file, folder) for file in files]
        number_of = {plain_name(name): i for i, name in enumerate(names)}
        number_of |= {name: i for i, name in enumerate(names)}            # two that differ in this only stay two
        for line, name, captions in read_captions(path):
            i = number_of.get(name, number_of.get(plain_name(name)))
            if i is None:
                self.nameless += [(name, len(captions))] if captions else []
            else:
                self.listed.setdefault(i, []).extend(self.texts(captions, f"{path}, line {line}"))

    def texts(self, captions, where):
        """Return the captions that are text, tidied, without empty ones. Note `where` in `broken` if one is no text."""
        captions = [tidy(caption) for caption in captions]
        if any(map(NOT_TEXT.search, captions)):
            self.broken.add(where)
        return [caption for caption in captions if caption and not NOT_TEXT.search(caption)]

    def __getitem__(self, i):
        if self.listed.get(i):
            return tuple(self.listed[i])
        folder, name = os.path.split(os.path.splitext(self.files[i])[0] + ".txt")
        for written in dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))]):
            beside = os.path.join(folder, written)
            if not os.path.lexists(beside):
                continue
            try:
                if os.path.isfile(beside):                                # a named pipe would block
                    with open_text(beside) as file:
                        return tuple(self.texts([file.read()], beside))
            except OSError:                                               # no permission to read it
                pass
            self.broken.add(beside)
        return ()


def cut(captions, encoder):
    """Say how many captions an encoder cuts: a list of one line, empty if it cuts none."""
    count = sum(map(encoder.cuts, captions))
    line = f"{count:,} of {len(captions):,} captions are longer than --text-length {encoder.length} and are cut"
    return [line] if count else []


def faults(source, encoder=None):
    """Say with counts what is wrong with the captions of a source: a list of lines.

    encoder: also count the captions that it cuts. It looks at the first 100,000 examples of a folder, a minute of work,
    and at 1,000 of drawn ones, which are all of one kind.
    """
    folder = getattr(source, "folder_captions", None)
    n = min(len(source), MOST if folder else 1000)
    some = [source.captions(i) for i in range(n)]
    without = sum(not any(captions) for captions in some)
    seen = [f"{without:,} of {n:,} images have no caption"] if without else []
    seen += cut([caption for captions in some for caption in captions], encoder) if encoder else []
    lines = [line if n == len(source) else f"of the first {n:,}: {line}" for line in seen]
    if folder and folder.broken:
        lines.insert(0, f"{len(folder.broken):,} captions cannot be read as UTF-8 or UTF-16, the first "
                        f"{min(folder.broken)!r}")
    if folder and folder.nameless:
        count, first = sum(count for _, count in folder.nameless), folder.nameless[0][0]
        lines.insert(0, f"{count:,} captions of captions.jsonl name no image, the first {first!r}")
    return lines
