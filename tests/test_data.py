"""Laws of data.py: the scenes, classes and captions, and the stream. Each test names the wrong variant that it kills.

Decoding files safely and opening odd fonts are tested in plumbing/test_images.py and plumbing/test_fonts.py.
"""
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data as D
from plumbing import UserError, fonts
from plumbing.sources import open_source


# ---- glyph scenes

def test_a_scene_is_a_function_of_seed_and_index_alone():
    """Held-out scenes are those after the training scenes.

    Kills: a random state that drawing moves on; an ignored seed; held-out scenes that a run trains on."""
    a, b = D.Glyphs(), D.Glyphs()
    b.draw(5), b.draw(1)
    assert np.array_equal(a.draw(3), b.draw(3))
    assert not np.array_equal(a.draw(3), D.Glyphs(seed=1).draw(3))
    assert not np.array_equal(a.draw(3), D.Glyphs(held_out=True).draw(3))
    assert np.array_equal(D.Glyphs(count=10, held_out=True).draw(3), D.Glyphs().draw(13))


@pytest.mark.parametrize("side", [16, 32, 128, 256, 1024])
def test_a_scene_is_the_same_at_every_size(side):
    """Averaged down to 16 x 16, all sizes agree. Kills: random draws that depend on the size; fonts fitted to the pixel
    grid; textures in pixels."""
    for i in range(12):
        reference = D.Glyphs((64, 64)).draw(i).reshape(16, 4, 16, 4, 3).mean((1, 3))
        picture = D.Glyphs((side, side)).draw(i).astype(float)
        k = side // 16
        difference = np.abs(picture.reshape(16, k, 16, k, 3).mean((1, 3)) - reference)
        assert difference.mean() < 1.5 and difference.max() < 16                                # of 255


def test_letters_stand_out_from_their_ground():
    """The brightness of letter and ground differs by more than 0.2. Kills: blue on purple, which nobody can read."""
    for i in range(200):
        s = D.Glyphs().scene(i)
        assert abs(D.luminance(s["letter_rgb"]) - D.luminance(s["ground_rgb"])) > 0.2


def test_images_are_floats_in_range():
    """(3, H, W), float32, in [-1, 1]. Kills: height and width exchanged; values in 0..255 or 0..1."""
    x = D.Glyphs((32, 48)).image(0)
    assert x.shape == (3, 32, 48) and x.dtype == torch.float32 and -1 <= x.min() and x.max() <= 1


# ---- classes and captions

def test_every_class_can_be_read_in_every_font():
    """36 characters have 36 different drawings. Kills: a font that draws a box or nothing for a character it maps."""
    glyphs = D.Glyphs()
    assert len(glyphs.classes) == 36 and len({c.lower() for c in glyphs.classes}) == 36
    for path, _ in glyphs.fonts:
        masks = {c: np.asarray(fonts.glyph_tile(path, c, 96)).tobytes() for c in D.CHARACTERS}
        missing = np.asarray(fonts.glyph_tile(path, "\U0010FFFE", 96)).tobytes()
        assert len(set(masks.values()) | {missing}) == 37


def test_captions_are_true():
    """A caption names what was drawn, and leaves out posture, style and texture in a quarter of the scenes each.

    Kills: a caption from other random draws than its scene; a word that is always there; "a orange A"."""
    glyphs, count = D.Glyphs(size=(96, 96)), dict(posture=0, style=0, texture=0)
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
        for name, optional in (("posture", posture), ("style", style), ("texture", texture)):
            count[name] += len(optional)
        if posture:
            assert abs(s["angle"]) > 0.13 if posture == ["tilted"] else abs(s["angle"]) < 0.04
        assert posture in ([], ["tilted"], ["upright"]) and style in ([], [s["style"]])
        assert texture in ([], [s["texture"]])
    assert all(0.6 < n / 200 < 0.9 for n in count.values())


def test_font_file_has_a_class_a_character_it_draws():
    """Kills: a class for a space; two classes that look alike or differ in case alone; a caption of another class."""
    path = os.path.join(fonts.matplotlib_fonts(), "STIXGeneral.ttf")
    source = open_source(path, (32, 32))
    assert {"A", "Ω", "7", "∞"} <= set(source.classes)
    assert "a" not in source.classes and " " not in source.classes
    assert len(set(source.classes)) == len(source.classes) > 200
    i = source.classes.index("∞")
    assert "infinity on" in source.caption(i) and source.label(i) == i
    assert source.image(i).shape == (3, 32, 32)


@pytest.mark.parametrize("data, characters", [("DejaVuSans.ttf", "😻Ωa♞7"), ("glyphs", "7BA")])
def test_chosen_characters_are_the_classes(data, characters, tmp_path, monkeypatch):
    """In the order in which they are given. A font of matplotlib needs no path; a file of this name comes first.

    Kills: characters that are ignored; sorted; left out as small letters; the wrong picture; scenes of another run."""
    source = open_source(data, (32, 32), count=60, seed=1, characters=characters)
    assert source.classes == tuple(characters)
    assert [source.scene(i)["character"] for i in range(len(characters))] == list(characters)
    unseen = open_source(data, (32, 32), count=60, seed=1, characters=characters, held_out=True)
    assert unseen.classes == source.classes
    assert not {source.draw(i).tobytes() for i in range(60)} & {unseen.draw(i).tobytes() for i in range(60)}
    monkeypatch.chdir(tmp_path)
    shutil.copy(fonts.find_font("cmr10.ttf"), "DejaVuSans.ttf")
    with pytest.raises(UserError, match="does not draw 😻"):
        open_source("DejaVuSans.ttf", (32, 32), characters="😻")


@pytest.mark.parametrize("data, characters, wanted", [
    ("DejaVuSans.ttf", "A漢😀漢\u200d", "DejaVuSans.ttf does not draw 漢 U+6F22, U+200D$"),
    ("DejaVuSans.ttf", "A \udcff", "does not draw   U+0020, U+DCFF$"),
    ("DejaVuSans.ttf", "ABA", "looks the same as A U+0041$"),
    ("DejaVuSans.ttf", "AΑ", "looks the same as Α U+0391$"),              # Latin and Greek
    ("glyphs", "ABa", "glyphs does not draw a U+0061$"), ("glyphs", "77", "looks the same as 7 U+0037$"),
    (".", "AB", "--characters: want a font file, or glyphs, not --data .$"),
    ("DejaVuSan.ttf", "", r"no such file or folder, and no font of matplotlib .*DejaVuSans.ttf")])
def test_characters_that_cannot_be_classes_are_named(data, characters, wanted):
    """Kills: a class drawn as a box or as nothing; two classes that nobody can tell apart; a name left out or twice."""
    with pytest.raises(UserError, match=wanted.replace("U+", r"U\+")):
        open_source(data, (32, 32), characters=characters)


def test_classes_captions_and_broken_captions(tmp_path):
    """A folder's classes are its subfolders. Captions come from captions.jsonl or from text files beside the images.

    Kills: labels that do not follow the files; one kind of caption alone; a traceback for a line that is no caption."""
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


def test_an_empty_caption_is_a_caption(tmp_path):
    """Kills: an empty caption taken for a line without one, which is refused."""
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "caption": ""}\n')
    assert D.ImageFolder(tmp_path).caption(0) == ""


# ---- the stream

def test_order_is_a_function_of_seed_and_step():
    """A run that starts at step 5 sees what an unbroken run sees. Ranks share the batch out. An epoch shows each
    example once.

    Kills: a shuffle from a random state; ranks that see the same images; every epoch in the same order."""
    def images(first, steps, **kw):
        loader = D.batches(D.Glyphs((16, 16), count=50), 8, seed=3, first_step=first, workers=0, **kw)
        return [next(loader)["image"] for _ in range(steps)]
    unbroken = images(0, 9)
    for a, b in zip(unbroken[5:], images(5, 4)):
        assert torch.equal(a, b)
    halves = [images(0, 1, rank=r, world=2)[0] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), unbroken[0])
    epoch = torch.cat(unbroken)[:50].flatten(1)
    assert len(torch.unique(epoch, dim=0)) == 50
    assert not torch.equal(torch.cat(unbroken)[50:58], unbroken[0])      # the next epoch has another order


def test_workers_change_nothing():
    """Kills: batches in the order in which workers finish; random numbers that a worker draws for itself."""
    def first(workers):
        loader = D.batches(D.Glyphs((16, 16)), 4, seed=0, workers=workers)
        return [next(loader)["image"] for _ in range(3)]
    for a, b in zip(first(0), first(2)):
        assert torch.equal(a, b)


def test_flip_mirrors_half():
    """Kills: an upside-down flip; all images flipped, or none."""
    source = D.Glyphs((16, 16), count=64)
    plain, flipped = D.Stream(source, 0), D.Stream(source, 0, flip=True)
    mirrored = [torch.equal(plain[k]["image"].flip(-1), flipped[k]["image"]) for k in range(64)]
    same = [torch.equal(plain[k]["image"], flipped[k]["image"]) for k in range(64)]
    assert all(a or b for a, b in zip(mirrored, same)) and 16 < sum(mirrored) < 48


def test_one_good_file_is_enough(tmp_path):
    """The next image of the same epoch takes the place of a broken one.

    Kills: a search that crosses into the next epoch's order and meets the broken file twice."""
    (tmp_path / "a.png").write_text("broken")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    stream = D.Stream(D.ImageFolder(tmp_path, (8, 8)), 0)
    assert all(stream[k]["image"] is not None for k in range(50))


def test_stream_says_when_nothing_is_left(tmp_path):
    """Kills: an endless search for an image that can be read."""
    (tmp_path / "a.png").write_text("broken")
    (tmp_path / "b.png").write_text("broken")
    batch = D.collate([D.Stream(D.ImageFolder(tmp_path, (8, 8)), 0)[0]])
    assert batch["image"] is None and len(batch["broken"]) == 2
