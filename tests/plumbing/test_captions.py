"""The captions of a folder: how files are read, matched to images, drawn by lot, and what is said about the rest."""
import json
import os
import unicodedata

import pytest
from PIL import Image

import config as C
import data as D
import sample as P
import train as T
from plumbing import UserError, captions, sampling, start
from plumbing.settings import override
from programs import TINY, run_here

NAMES = ["cats/a.png", "cats/b.png", "café.png"]
TRAIN = [*TINY, "--text-encoder", "bytes", "--text-channels", 16, "--text-length", 12, "--text-layers", 1, "--steps", 1]


def folder(path, names=NAMES, entries=(), texts=None, encoding="utf-8"):
    """Write images, and captions as (file, caption) or as {text file: content}. -> the open folder"""
    for name in names:
        (path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8)).save(path / name)
    if entries:
        lines = [json.dumps({"file": name, "caption": caption}, ensure_ascii=False) for name, caption in entries]
        (path / "captions.jsonl").write_text("\n".join(lines), encoding=encoding)
    for name, content in (texts or {}).items():
        (path / name).write_bytes(content)
    return D.ImageFolder(path, (8, 8))


def said(source):
    return "; ".join(captions.faults(source))


# ---- reading

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_every_unicode_encoding_is_read(tmp_path, encoding):
    """Kills: a byte order mark that is taken for a wrong line or for a letter; UTF-16 learnt as garbage."""
    beside = {"b.txt": "b café\n".encode(encoding)}
    source = folder(tmp_path, ["a.png", "b.png"], [("a.png", "a café")], beside, encoding)
    assert [source.caption(i) for i in range(2)] == ["a café", "b café"] and said(source) == ""


def test_what_is_no_text_is_counted_and_left_out(tmp_path):
    """Kills: another encoding, or control characters, learnt as signs that nobody wrote; a traceback for a text file
    that cannot be opened, or a pipe that blocks."""
    source = folder(tmp_path, ["a.png", "b.png", "c.png", "d.png"], [("a.png", "a \0 b")], {"b.txt": b"caf\xe9"})
    os.mkfifo(tmp_path / "c.txt")
    (tmp_path / "d.txt").write_text("good")
    assert [source.captions(i) for i in range(4)] == [(), (), (), ("good",)]
    assert "3 captions cannot be read as UTF-8 or UTF-16, the first " in said(source)
    assert "3 of 4 images have no caption" in said(source)


def test_an_empty_caption_is_none(tmp_path):
    """Kills: an empty one that takes its turn by lot, and hides from the check for captions those behind it; half of a
    character, learnt as a question mark."""
    source = folder(tmp_path, ["a.png", "b.png"], [("a.png", ["", " ", "a cat"]), ("b.png", "a \\ud83d")])
    (tmp_path / "captions.jsonl").write_text((tmp_path / "captions.jsonl").read_text().replace("\\\\", "\\"))
    source = D.ImageFolder(tmp_path, (8, 8))
    assert [source.captions(i) for i in range(2)] == [("a cat",), ()] and "1 captions cannot be read" in said(source)


def test_a_line_break_is_a_space(tmp_path):
    """Kills: two words that become one in training; what training accepts and sampling refuses."""
    source = folder(tmp_path, ["a.png", "b.png"], [("a.png", " red\ncat\u00a0 on\u2028cafe\u0301 ")],
                    {"b.txt": b"red\r\n\tcat\r\n"})
    assert [source.caption(i) for i in range(2)] == ["red cat on café", "red cat"]
    assert captions.tidy("red\ncat") == "red cat"
    assert not captions.NOT_TEXT.search("a family 👨‍👩‍👧, خانه\u200cها")  # joiners are text


@pytest.mark.parametrize("caption", [7, True, {"en": "a"}, ["a", None], [["a"]]])
def test_what_is_no_caption_is_refused(tmp_path, caption):
    """Kills: numbers, truth values and dicts learnt as Python prints them."""
    with pytest.raises(UserError, match="captions.jsonl, line 2: want"):
        folder(tmp_path, NAMES, [("cats/a.png", "a"), ("cats/b.png", caption)])


def test_prompts_may_come_through_a_pipe(tmp_path):
    """As from `--prompts <(...)`. Kills: a file that is opened twice, once to see its encoding."""
    reader, writer = os.pipe()
    os.write(writer, "a café\n\nb\n".encode("utf-16"))
    os.close(writer)
    assert sampling.read_prompts(f"/dev/fd/{reader}") == ["a café", "b"]
    os.close(reader)


# ---- matching

@pytest.mark.parametrize("write", [
    lambda name: name, lambda name: "./" + name, lambda name: name.replace("/", "\\"), lambda name: "x/../" + name,
    lambda name: unicodedata.normalize("NFD", name)])
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_found_however_it_is_written(tmp_path, write, form):
    """As Windows writes it, as a Mac does, as find does. Kills: names compared letter by letter; captions of others."""
    source = folder(tmp_path, [unicodedata.normalize(form, name) for name in NAMES],
                    [(write(name), name) for name in NAMES])
    found = [unicodedata.normalize("NFC", str(tmp_path / source.caption(i))) for i in range(3)]
    assert found == [unicodedata.normalize("NFC", file) for file in source.files] and said(source) == ""


def test_two_files_that_differ_in_form_alone_keep_their_captions(tmp_path):
    """Kills: a comparison in one form only, where the file system knows both."""
    names = [unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD")]
    want = {str(tmp_path / names[0]): "one", str(tmp_path / names[1]): "two"}
    source = folder(tmp_path, names, texts={names[0][:-4] + ".txt": b"one", names[1][:-4] + ".txt": b"two"})
    assert {file: source.caption(i) for i, file in enumerate(source.files)} == want
    source = folder(tmp_path, names, [(names[0], "one"), (names[1], "two")])
    assert {file: source.caption(i) for i, file in enumerate(source.files)} == want


@pytest.mark.parametrize("image, text", [("NFC", "NFD"), ("NFD", "NFC")])
def test_a_text_file_in_the_other_form_is_beside_its_image(tmp_path, image, text):
    source = folder(tmp_path, [unicodedata.normalize(image, "café.png")],
                    texts={unicodedata.normalize(text, "café.txt"): b"a cup"})
    assert source.caption(0) == "a cup"


def test_captions_that_name_no_image_are_counted(tmp_path):
    """Kills: captions of other files lost without a word; a run on the one that is left."""
    source = folder(tmp_path, NAMES, [("cats/a.png", "a"), ("B.png", ["b", "bb"]), ("c.png", "c"), ("d.png", None)])
    assert said(source) == ("3 captions of captions.jsonl name no image, the first 'B.png'; "
                            "2 of 3 images have no caption")


# ---- several captions of one image

def test_one_of_several_is_drawn_by_lot(tmp_path):
    """Lists and repeated lines give several captions; null gives none. The lot is a function of (seed, position).

    Kills: "None" and printed lists as captions; the last or the first line alone; another lot after a resume."""
    source = folder(tmp_path, NAMES, [("cats/a.png", ["1", "2"]), ("cats/a.png", "3"), ("cats/b.png", None),
                                      ("café.png", "c")])
    assert sorted(source.captions(i) for i in range(3)) == [(), ("1", "2", "3"), ("c",)]
    drawn = [D.Stream(source, seed=0)[k]["caption"] for k in range(90)]
    assert {caption: drawn.count(caption) for caption in ("", "c")} == {"": 30, "c": 30}
    assert all(4 <= drawn.count(caption) <= 16 for caption in "123")
    assert drawn == [D.Stream(source, seed=0)[k]["caption"] for k in range(90)]
    assert drawn != [D.Stream(source, seed=1)[k]["caption"] for k in range(90)]


# ---- the programs

def test_what_is_wrong_with_the_captions_is_said_before_training(tmp_path, capsys, monkeypatch):
    """Kills: captions cut in silence; all captions looked at, of which there may be millions."""
    source = folder(tmp_path, NAMES, [("cats/a.png", ["a cat on a long mat", "a cat"]), ("cats/b.png", "ä" * 7)])
    config = override(C.PRESETS["glyphs64_text"], text_length=12, data=str(tmp_path))
    start.open_encoder(config, source, "cpu")
    assert capsys.readouterr().out == (f"{tmp_path}: 1 of 3 images have no caption\n{tmp_path}: 2 of 3 captions are "
                                       "longer than --text-length 12 and are cut\n")
    monkeypatch.setattr(captions, "MOST", 2)
    start.open_encoder(config, source, "cpu")
    assert all(line.startswith(f"{tmp_path}: of the first 2: ") for line in capsys.readouterr().out.splitlines())
    start.open_encoder(override(config, data="glyphs"), D.Glyphs(), "cpu")
    assert capsys.readouterr().out == ("glyphs: of the first 1,000: 1,000 of 1,000 captions are longer than "
                                       "--text-length 12 and are cut\n")


def test_sampling_takes_what_training_took(tmp_path):
    """Kills: a caption that trained and is refused in sampling, or cut in silence; a run without any caption."""
    folder(tmp_path / "photos", ["a.png", "b.png"], [("a.png", "a cat\non a long mat"), ("b.png", "a dog")])
    assert run_here(T, [*TRAIN, "--data", tmp_path / "photos", "--out", tmp_path / "run"]) == (None, "")
    draw = [tmp_path / "run", "--n", 1, "--device", "cpu", "--out", tmp_path / "a.png"]
    status, error = run_here(P, [*draw, "--text", "a cat\non a long mat", "--text", "a dog"])
    assert status is None and error == "1 of 2 captions are longer than --text-length 12 and are cut\n"
    assert run_here(P, [*draw, "--text", "a\ndog", "--text", "👨‍👩"]) == (None, "")        # a sign of three
    (tmp_path / "prompts.txt").write_text("a café\r\na dog\r\n", encoding="utf-16", newline="")
    assert run_here(P, [*draw, "--prompts", tmp_path / "prompts.txt"]) == (None, "")
    folder(tmp_path / "others", ["a.png", "b.png"], [("x.png", "a"), ("y.png", "b")])
    status, error = run_here(T, [*TRAIN, "--data", tmp_path / "others", "--out", tmp_path / "none"])
    assert status == 2 and "has no captions" in error and "2 captions of captions.jsonl name no image" in error
