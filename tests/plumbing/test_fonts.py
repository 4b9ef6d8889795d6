"""Fonts: matplotlib's without matplotlib, the characters that a font draws, colour fonts, broken ones."""
import io
import os

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTFont, newTable
from fontTools.ttLib.tables.sbixGlyph import Glyph
from fontTools.ttLib.tables.sbixStrike import Strike
from PIL import Image

import data as D
from plumbing import UserError, fonts
from plumbing.sources import open_source
from programs import program


def font(name):
    return os.path.join(fonts.matplotlib_fonts(), name)


# ---- finding fonts

def test_drawing_imports_neither_matplotlib_nor_the_lecture():
    """Kills: an import of matplotlib, which fails where MPLBACKEND names a backend that is not installed, as a
    notebook's programs inherit it; an import of a lecture file, which would close a circle."""
    code = ("import sys, data; data.Glyphs().image(0)\n"
            "lecture = 'schedule dwt unet uvit text nested_unet cascade config train sample distill measures'\n"
            "print([name for name in ['matplotlib', 'evaluate', *lecture.split()] if name in sys.modules])")
    done = program("data.py", launcher=("-c", code), env=dict(MPLBACKEND="module://matplotlib_inline.backend_inline"))
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_pictures_go_to_files_whatever_a_notebook_has_set(tmp_path):
    """Its kernel hands MPLBACKEND to the programs it starts. Kills: `import matplotlib` before the variable is
    replaced, which fails."""
    code = ("import sys; from plumbing import pictures\n"
            "figure, axis = pictures.pyplot().subplots()\npictures.save_figure(figure, sys.argv[2])")
    done = program("data.py", tmp_path / "x.png", launcher=("-c", code), env=dict(MPLBACKEND="nosuch"))
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "x.png").exists()


def test_the_fonts_are_matplotlibs():
    """We find them without matplotlib. It says the same. Kills: another folder after an update of matplotlib."""
    import matplotlib
    assert fonts.matplotlib_fonts() == os.path.join(matplotlib.get_data_path(), "fonts", "ttf")


# ---- the characters that a font draws

def test_characters_that_the_font_draws_as_boxes_are_no_classes(monkeypatch):
    """The LastResort font maps every character there is and draws one box for each block of them.

    Kills: a class for every character that a font maps."""
    monkeypatch.setattr(TTFont, "getBestCmap", lambda self: {code: "box" for code in range(0x41, 0x600)})
    assert len(fonts.drawn_characters(font("LastResortHE-Regular.ttf"))) < 20
    assert "\u0378" not in fonts.drawn_characters(font("DejaVuSans.ttf"))  # not assigned: mapped here, never drawn


def test_letters_that_differ_in_case_alone_are_one_class():
    """Kills: upper() of one character only: sharp s and its capital, Greek letters with marks."""
    for name in ("DejaVuSans.ttf", "STIXGeneral.ttf"):
        characters = fonts.drawn_characters(font(name))
        assert len({c.casefold() for c in characters}) == len(characters) > 500
        assert "A" in characters and "a" not in characters and characters == sorted(characters)


# ---- odd fonts

def colour_font(path, colours, side=64):
    """Write a font of coloured bitmaps (sbix): a square of its own colour for each character."""
    names = [".notdef"] + [f"square{i}" for i in range(len(colours))]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, side), (side, side), (side, 0)):
        pen.lineTo(corner)
    pen.closePath()
    font = FontBuilder(side, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(c): name for c, name in zip(colours, names[1:])})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (side, 0)))
    font.setupHorizontalHeader(ascent=side, descent=0)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    table = font.font["sbix"] = newTable("sbix")
    strike = table.strikes[side] = Strike(ppem=side, resolution=72)
    strike.glyphs[".notdef"] = Glyph(glyphName=".notdef")
    for name, rgba in zip(names[1:], colours.values()):
        png = io.BytesIO()
        Image.new("RGBA", (side, side), rgba).save(png, "png")
        strike.glyphs[name] = Glyph(glyphName=name, graphicType="png ", imageData=png.getvalue(), originOffsetX=0,
                                    originOffsetY=0)
    font.save(path)


def test_colour_fonts_keep_their_colours(tmp_path):
    """Kills: a colour font drawn as black coverage; straight colours averaged under transparency (dark rims)."""
    path = str(tmp_path / "squares.ttf")
    colour_font(path, {"A": (255, 0, 0, 255), "B": (0, 0, 255, 255), "C": (255, 255, 255, 102)})
    source = D.FontFile(path, (64, 64))
    assert source.classes == ("A", "B", "C")
    for i in range(6):
        inside = source.draw(i)[28:36, 28:36].reshape(-1, 3).astype(float)
        if i % 3 < 2:
            assert np.abs(inside - [(255, 0, 0), (0, 0, 255)][i % 3]).max() <= 1
        scene = source.scene(i)                                           # the caption names no colour for the letter
        assert source.caption(i) == f"latin capital letter {'abc'[i % 3]} on {scene['texture']} {scene['ground']}"
    tile = np.asarray(fonts.glyph_tile(path, "C", 64))[32, 32]
    assert np.abs(tile.astype(int) - 102).max() <= 1                      # white at 40 %, premultiplied


def test_broken_font_is_one_line(tmp_path):
    """Kills: an error that does not name the file."""
    path = tmp_path / "x.ttf"
    path.write_bytes(b"no font")
    with pytest.raises(UserError, match="x.ttf"):
        open_source(str(path), (32, 32))
