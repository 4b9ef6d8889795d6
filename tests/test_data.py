"""Laws of data.py, and of the fonts, images and workers in plumbing/ behind it."""
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import newTable
from fontTools.ttLib.tables.sbixGlyph import Glyph
from fontTools.ttLib.tables.sbixStrike import Strike
from PIL import Image

import data as D
from plumbing import UserError, fonts, images
from programs import program


# ---- glyph scenes

def test_a_scene_is_a_function_of_seed_and_index_alone():
    a, b = D.Glyphs(), D.Glyphs()
    b.draw(5), b.draw(1)
    assert np.array_equal(a.draw(3), b.draw(3))
    assert not np.array_equal(a.draw(3), D.Glyphs(seed=1).draw(3))
    assert not np.array_equal(a.draw(3), D.Glyphs(held_out=True).draw(3))
    assert np.array_equal(D.Glyphs(count=10, held_out=True).draw(3), D.Glyphs().draw(13))


@pytest.mark.parametrize("side", [16, 32, 128, 256, 1024])
def test_a_scene_is_the_same_at_every_size(side):
    """Kills: random draws that depend on the size; fonts fitted to the pixel grid; textures in pixels."""
    for i in range(12):
        reference = D.Glyphs((64, 64)).draw(i).reshape(16, 4, 16, 4, 3).mean((1, 3))
        picture = D.Glyphs((side, side)).draw(i).astype(float)
        k = side // 16
        difference = np.abs(picture.reshape(16, k, 16, k, 3).mean((1, 3)) - reference)
        assert difference.mean() < 1.5 and difference.max() < 16                                # of 255


def test_every_class_can_be_read_in_every_font():
    """Trap 20. Kills: a font that draws a box or nothing for a character it claims to have."""
    glyphs = D.Glyphs()
    assert len(glyphs.classes) == 36 and len({c.lower() for c in glyphs.classes}) == 36
    for path, _ in glyphs.fonts:
        masks = {c: np.asarray(fonts.glyph_tile(path, c, 96)).tobytes() for c in D.CHARACTERS}
        missing = np.asarray(fonts.glyph_tile(path, "\U0010FFFE", 96)).tobytes()
        assert len(set(masks.values()) | {missing}) == 37


def test_captions_are_true():
    glyphs, said = D.Glyphs(size=(96, 96)), dict(posture=0, style=0, texture=0)
    for i in range(200):
        s, words = glyphs.scene(i), glyphs.caption(i).split()
        article, *letter, character = words[:words.index("on")]
        *texture, ground = words[words.index("on") + 1:]
        assert article == ("an" if letter[0][0] in "aeiou" else "a")
        assert character == glyphs.classes[glyphs.label(i)]
        # The named colours are the nearest ones of the palette to what was drawn.
        colour = next(word for word in letter if word in D.COLOURS)
        for name, rgb in ((colour, s["letter_rgb"]), (ground, s["ground_rgb"])):
            assert name == min(D.COLOURS, key=lambda c: np.abs(np.array(D.COLOURS[c]) - rgb).sum())
        posture, style = letter[:letter.index(colour)], letter[letter.index(colour) + 1:]
        said.update(posture=said["posture"] + len(posture), style=said["style"] + len(style),
                    texture=said["texture"] + len(texture))
        if posture:
            assert abs(s["angle"]) > 0.13 if posture == ["tilted"] else abs(s["angle"]) < 0.04
        assert posture in ([], ["tilted"], ["upright"]) and style in ([], [s["style"]])
        assert texture in ([], [s["texture"]])
    assert all(0.6 < count / 200 < 0.9 for count in said.values())        # each is left out in a quarter


def test_letters_stand_out_from_their_ground():
    for i in range(200):
        s = D.Glyphs().scene(i)
        assert abs(D.luminance(s["letter_rgb"]) - D.luminance(s["ground_rgb"])) > 0.2


def test_images_are_floats_in_range():
    x = D.Glyphs((32, 48)).image(0)
    assert x.shape == (3, 32, 48) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1


def test_drawing_imports_neither_matplotlib_nor_the_lecture():
    """Kills: an import of matplotlib, which fails where MPLBACKEND names a backend that is not installed, as a
    notebook's programs inherit it; an import of a lecture file, which would close a circle."""
    code = ("import sys, data; data.Glyphs().image(0)\n"
            "lecture = 'schedule dwt unet uvit text nested_unet cascade config train sample distill measures'\n"
            "print([name for name in ['matplotlib', 'evaluate', *lecture.split()] if name in sys.modules])")
    done = program("data.py", launcher=("-c", code), env=dict(MPLBACKEND="module://matplotlib_inline.backend_inline"))
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_fonts_are_matplotlibs():
    import matplotlib
    assert fonts.matplotlib_fonts() == os.path.join(matplotlib.get_data_path(), "fonts", "ttf")


# ---- fonts

def font(name):
    return os.path.join(fonts.matplotlib_fonts(), name)


def test_font_file_has_a_class_a_character_it_draws():
    source = D.open_source(font("STIXGeneral.ttf"), (32, 32))
    assert {"A", "Ω", "7", "∞"} <= set(source.classes)
    assert "a" not in source.classes and " " not in source.classes                              # trap 20
    assert len(set(source.classes)) == len(source.classes) > 200
    i = source.classes.index("∞")
    assert "infinity on" in source.caption(i) and source.label(i) == i
    assert source.image(i).shape == (3, 32, 32)


def test_characters_that_the_font_draws_as_boxes_are_no_classes(monkeypatch):
    """Trap 20: the LastResort font maps every character there is and draws one box for each block of them."""
    from fontTools.ttLib import TTFont
    monkeypatch.setattr(TTFont, "getBestCmap", lambda self: {code: "box" for code in range(0x41, 0x600)})
    assert len(D.drawn_characters(font("LastResortHE-Regular.ttf"))) < 20
    assert "\u0378" not in D.drawn_characters(font("DejaVuSans.ttf"))    # unassigned: mapped here, drawn by nobody


def colour_font(path, colours, side=64):
    """A font of coloured bitmaps (sbix): a square of its own colour for each character."""
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
        scene = source.scene(i)                                           # the letter's colour is not named: its own
        assert source.caption(i) == f"latin capital letter {'abc'[i % 3]} on {scene['texture']} {scene['ground']}"
    tile = np.asarray(fonts.glyph_tile(path, "C", 64))[32, 32]
    assert np.abs(tile.astype(int) - 102).max() <= 1                      # white at 40 %, premultiplied


def test_broken_font_is_one_line(tmp_path):
    path = tmp_path / "x.ttf"
    path.write_bytes(b"no font")
    with pytest.raises(UserError, match="x.ttf"):
        D.open_source(str(path), (32, 32))


# ---- folders

@pytest.fixture
def folder(tmp_path):
    """A folder with every kind of file that breaks a careless loader."""
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    red.save(tmp_path / "a_red.png")
    half = Image.new("RGB", (20, 40), (0, 0, 255))
    half.paste((255, 255, 0), (0, 0, 20, 20))                             # yellow above blue ...
    exif = half.getexif()
    exif[0x0112] = 3                                                      # ... to be shown upside down
    half.save(tmp_path / "b_turned.jpg", exif=exif, quality=95)
    grey = np.tile(np.linspace(0, 65535, 32).astype(np.uint16), (32, 1))
    Image.fromarray(grey).save(tmp_path / "c_grey16.png")
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.save(tmp_path / "d_clear.png")
    Image.new("P", (16, 16), 0).save(tmp_path / "e_palette.png", transparency=0)
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(tmp_path / "f_cmyk.jpg")
    black = Image.new("L", (16, 16), 0)
    Image.new("L", (16, 16), 255).save(tmp_path / "g_frames.gif", save_all=True, append_images=[black])
    Image.new("1", (16, 16), 1).save(tmp_path / "h_bits.png")
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(tmp_path / "i_float.tif")
    whole = (tmp_path / "b_turned.jpg").read_bytes()
    (tmp_path / "y_cut.jpg").write_bytes(whole[:len(whole) // 3])
    (tmp_path / "z_text.png").write_text("not an image")
    (tmp_path / "x.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink("nowhere", tmp_path / "dangling.png")
    (tmp_path / "notes.md").write_text("ignored")
    return tmp_path


def centre(source, name):
    i = [os.path.basename(f) for f in source.files].index(name)
    return ((source.image(i)[:, 8, 8] + 1) * 127.5).round().tolist()


def test_folder_decodes_with_care(folder):
    """Trap 19. Kills: 16-bit grey clipped to white, hidden colour under transparency, EXIF ignored."""
    source = D.ImageFolder(folder, (16, 16))
    names = [os.path.basename(f) for f in source.files]
    assert names == sorted(names) and names[:2] == ["a_red.png", "b_turned.jpg"] and "x.png" not in names
    assert [os.path.basename(p) for p, _ in source.skipped] == ["dangling.png", "pipe.png", "loop"]
    assert centre(source, "a_red.png") == [255, 0, 0]
    turned = (source.image(1) + 1) / 2
    assert turned[2, 2, 8] > 0.9 and turned[0, 13, 8] > 0.9                                     # blue above yellow
    grey = (source.image(names.index("c_grey16.png")) + 1) / 2
    assert abs(float(grey.mean()) - 0.5) < 0.02 and float(grey[0, 8, 0]) < 0.06
    for name, rgb in (("d_clear.png", 255), ("e_palette.png", 255), ("f_cmyk.jpg", 255), ("g_frames.gif", 255),
                      ("h_bits.png", 255), ("i_float.tif", 128)):
        assert centre(source, name) == pytest.approx([rgb] * 3, abs=2), name
    for name in ("y_cut.jpg", "z_text.png"):
        with pytest.raises(images.BrokenImage, match=name):
            centre(source, name)


def test_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("L", (300, 300)).save(tmp_path / "big.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 80_000)
    with pytest.raises(images.BrokenImage, match="300x300 is too large"):
        images.load_image(str(tmp_path / "big.png"), (16, 16))


def test_resizing_is_antialiased_and_keeps_proportions(tmp_path):
    """Kills: a stride or plain bilinear sampling (stripes of a pixel must average to grey), squeezing, not cropping."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "s.png")
    assert np.abs(images.load_image(str(tmp_path / "s.png"), (16, 16)).astype(int) - 127).max() <= 3
    wide = np.zeros((20, 100, 3), np.uint8)
    wide[:, 40:60] = 255
    Image.fromarray(wide).save(tmp_path / "w.png")
    assert images.load_image(str(tmp_path / "w.png"), (20, 20)).min() == 255


def test_classes_captions_and_broken_captions(tmp_path):
    for name in ("cat/1.png", "dog/2.png", "dog/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "dog/2.png", "caption": "a dog"}) + "\n")
    (tmp_path / "dog/3.txt").write_text("another dog\n")
    source = D.ImageFolder(tmp_path, (8, 8))
    assert source.classes == ("cat", "dog") and [source.label(i) for i in range(3)] == [0, 1, 1]
    assert [source.caption(i) for i in range(3)] == ["", "a dog", "another dog"]
    (tmp_path / "captions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        D.ImageFolder(tmp_path, (8, 8))


def test_empty_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="no image"):
        D.ImageFolder(tmp_path, (8, 8))


# ---- the stream

def test_stream_replaces_and_names_broken_files(folder):
    stream = D.Stream(D.ImageFolder(folder, (16, 16)), seed=0)
    examples = [stream[k] for k in range(22)]                             # two epochs of eleven files
    assert all(e["image"].shape == (3, 16, 16) for e in examples)
    named = {message.split(":")[0].split("/")[-1] for e in examples for message in e["broken"]}
    assert named == {"y_cut.jpg", "z_text.png"}


def test_one_good_file_is_enough(tmp_path):
    """Kills: a search that crosses into the next epoch's order and meets the broken file twice."""
    (tmp_path / "a.png").write_text("broken")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    stream = D.Stream(D.ImageFolder(tmp_path, (8, 8)), 0)
    assert all(stream[k]["image"] is not None for k in range(50))


def test_stream_says_when_nothing_is_left(tmp_path):
    (tmp_path / "a.png").write_text("broken")
    (tmp_path / "b.png").write_text("broken")
    batch = D.collate([D.Stream(D.ImageFolder(tmp_path, (8, 8)), 0)[0]])
    assert batch["image"] is None and len(batch["broken"]) == 2


def test_order_is_a_function_of_seed_and_step():
    """Trap 14. Kills: a reshuffled loader fast-forwarded; ranks that see the same images."""
    def labels(first, steps, **kw):
        loader = D.batches(D.Glyphs((16, 16), count=50), 8, seed=3, first_step=first, workers=0, **kw)
        return [next(loader)["image"] for _ in range(steps)]
    unbroken = labels(0, 9)
    for a, b in zip(unbroken[5:], labels(5, 4)):
        assert torch.equal(a, b)
    halves = [labels(0, 1, rank=r, world=2)[0] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), unbroken[0])
    epoch = torch.cat(unbroken)[:50].flatten(1)
    assert len(torch.unique(epoch, dim=0)) == 50                          # an epoch shows every example once
    assert not torch.equal(torch.cat(unbroken)[50:58], unbroken[0])      # and the next one in another order


def test_workers_change_nothing():
    def first(workers):
        loader = D.batches(D.Glyphs((16, 16)), 4, seed=0, workers=workers)
        return [next(loader)["image"] for _ in range(3)]
    for a, b in zip(first(0), first(2)):
        assert torch.equal(a, b)


def test_what_the_workers_are_sent_can_be_sent():
    """Where processes are not forked (macOS, Windows) all this travels by pickle. Kills: a cache or lambda in it."""
    stream = D.Stream(D.Glyphs((16, 16)), seed=3, flip=True)
    copy, collate, init = pickle.loads(pickle.dumps((stream, D.collate, D.heed_parent_only)))
    assert torch.equal(copy[7]["image"], stream[7]["image"])


def test_flip_mirrors_half():
    source = D.Glyphs((16, 16), count=64)
    plain, flipped = D.Stream(source, 0), D.Stream(source, 0, flip=True)
    mirrored = [torch.equal(plain[k]["image"].flip(-1), flipped[k]["image"]) for k in range(64)]
    same = [torch.equal(plain[k]["image"], flipped[k]["image"]) for k in range(64)]
    assert all(a or b for a, b in zip(mirrored, same)) and 16 < sum(mirrored) < 48


def test_letters_that_differ_in_case_alone_are_one_class():
    """Trap 20. Kills: upper() of one character only: sharp s and its capital, Greek letters with marks."""
    for name in ("DejaVuSans.ttf", "STIXGeneral.ttf"):
        characters = D.drawn_characters(font(name))
        assert len({c.casefold() for c in characters}) == len(characters) > 500
        assert "A" in characters and "a" not in characters and characters == sorted(characters)


def test_links_do_not_take_the_place_of_the_folder_itself(tmp_path):
    (tmp_path / "z").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "z" / "1.png")
    os.symlink(tmp_path / "z", tmp_path / "a")
    source = D.ImageFolder(tmp_path)
    assert source.classes == ("z",) and len(source) == 1
    assert source.skipped == [(str(tmp_path / "a"), "a link to a folder already read")]


def test_an_empty_caption_is_a_caption(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": ""}\n')
    assert D.ImageFolder(tmp_path).caption(0) == ""
