"""Fonts: find matplotlib's, open any font file, draw single characters, list the characters that a font draws."""
import functools
import importlib.util
import math
import os
import unicodedata

from PIL import Image, ImageDraw, ImageFont

from plumbing import UserError
from plumbing.images import BrokenImage

LARGEST = 4096                                                            # px: no character of a sound font is larger


def matplotlib_fonts():
    """Return the folder of matplotlib's fonts.

    We do not import matplotlib for it. The import fails where MPLBACKEND names a backend that is not installed, as a
    notebook's programs may inherit it.
    """
    package = importlib.util.find_spec("matplotlib").origin
    return os.path.join(os.path.dirname(package), "mpl-data", "fonts", "ttf")


@functools.lru_cache(maxsize=64)
def open_font(path):
    """Return (font, is_colour). An outline font opens at any size, a font of coloured bitmaps only at its own sizes."""
    for size in (256, 109, 128, 136, 160, 96, 72, 64, 48, 32):
        try:
            return ImageFont.truetype(path, size), size != 256
        except OSError as error:
            if "size" not in str(error):                                  # "invalid pixel size": try the next one
                raise UserError(f"{path}: not a font that can be read ({error})") from None
    raise UserError(f"{path}: a bitmap font of none of the usual sizes")


def glyph_tile(path, character, side):
    """Draw a character in the centre of a square of side x side pixels; its longer side is 0.8 * side.

    Returns an "L" picture of coverage, or "RGBa" (premultiplied) for a colour font. Small tiles are cached. We do not
    cache large ones: 512 of them at 1024 px would fill a gigabyte or more.
    """
    return (_cached_tile if side <= 512 else _draw_tile)(path, character, side)


def _draw_tile(path, character, side):
    font, is_colour = open_font(path)
    try:
        return (_colour_tile if is_colour else _outline_tile)(font, character, side)
    except Exception as error:                                            # damaged fonts fail in many ways
        raise BrokenImage(f"{path}: damaged: U+{ord(character):04X} cannot be drawn ({error})") from None


_cached_tile = functools.lru_cache(maxsize=512)(_draw_tile)


def _outline_tile(font, character, side):
    """Draw large and average down. FreeType fits small letters to the pixel grid, which would change the shape."""
    large = side * max(1, math.ceil(512 / side))
    left, top, right, bottom = font.getbbox(character)
    font = font.font_variant(size=max(1, round(font.size * 0.8 * large / max(right - left, bottom - top))))
    left, top, right, bottom = font.getbbox(character)
    square = Image.new("L", (large, large), 0)
    corner = ((large - right - left) / 2, (large - bottom - top) / 2)
    ImageDraw.Draw(square).text(corner, character, font=font, fill=255)
    return square.reduce(large // side)


def _colour_tile(font, character, side):
    """Resize the font's bitmap."""
    left, top, right, bottom = font.getbbox(character)
    tile = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(tile).text((-left, -top), character, font=font, embedded_color=True)
    tile = tile.crop(tile.getbbox())
    # Pillow draws on transparent black. So the colours are multiplied by coverage already: the true mode is RGBa.
    tile = Image.frombytes("RGBa", tile.size, tile.tobytes())
    zoom = 0.8 * side / max(tile.size)
    tile = tile.resize([max(1, round(zoom * s)) for s in tile.size], Image.Resampling.BICUBIC)
    # Centre it by a transform, since paste would turn the premultiplied colours back into straight ones.
    left, top = (side - tile.width) // 2, (side - tile.height) // 2
    return tile.transform((side, side), Image.Transform.AFFINE, (1, 0, -left, 0, 1, -top))


def drawn_characters(path):
    """List the characters that a font file draws, in order of code point.

    Left out: characters that the font maps but draws as nothing or as its "missing" box, characters drawn like an
    earlier one (A in Latin, Greek, Cyrillic), and small letters whose capital is there.
    """
    shapes, seen, folded, characters = drawings(path, _mapped_characters(path)), set(), set(), []
    for character in sorted(shapes, key=lambda c: (unicodedata.category(c) == "Ll", c)):        # a capital comes first
        if shapes[character] not in seen and character.casefold() not in folded:
            seen.add(shapes[character])
            folded.add(character.casefold())
            characters.append(character)
    return sorted(characters)


def drawings(path, characters):
    """Return {character: its drawing} for those that the font really draws. Equal drawings look the same.

    Left out: spaces, marks, controls, and what the font draws as nothing or as its "missing" box.
    """
    font, is_colour = open_font(path)
    if not is_colour:
        font = font.font_variant(size=48)
    try:
        missing, shapes = {_drawing(font, c, is_colour) for c in "\U0010FFFE\U0010FFFF"}, {}
    except Exception as error:
        raise UserError(f"{path}: damaged: its sign for missing characters cannot be drawn ({error})") from None
    for character in characters:
        kind = unicodedata.category(character)
        if kind[0] not in "ZM" and kind not in ("Cc", "Cf", "Cs", "Cn"):
            try:
                size, bitmap = _drawing(font, character, is_colour)
            except Exception as error:                                    # damaged fonts fail in many ways
                raise UserError(f"{path}: damaged: U+{ord(character):04X} cannot be drawn ({error}); --characters may "
                                "leave it out") from None
            if any(bitmap) and (size, bitmap) not in missing:
                shapes[character] = size, bitmap
    return shapes


def check_characters(characters, shapes, data):
    """Refuse characters that are not in `shapes`, {character: its drawing}, and those that look like an earlier one."""
    def named(some):
        return ", ".join(f"{c} U+{ord(c):04X}" if c.isprintable() else f"U+{ord(c):04X}" for c in dict.fromkeys(some))

    missing = [c for c in characters if c not in shapes]
    if missing:
        raise UserError(f"--characters: {data} does not draw {named(missing)}")
    first = {}
    again = [c for i, c in enumerate(characters) if first.setdefault(shapes[c], i) != i]
    if again:
        raise UserError(f"--characters: want each once; there is one before that looks the same as {named(again)}")


def find_font(name):
    """Return the path of a font file: the file of this name, or else the font of this name inside matplotlib."""
    inside = os.path.join(matplotlib_fonts(), name)
    if os.path.exists(name) or not os.path.isfile(inside):
        return name
    return inside


def _mapped_characters(path):
    """Return the characters in the font's own table. Not all of them are really drawn."""
    from fontTools.ttLib import TTFont                                    # comes with matplotlib
    try:
        return [chr(code) for code in TTFont(path, lazy=True, fontNumber=0).getBestCmap() or {}]
    except Exception as error:                                            # damaged tables fail in many ways
        raise UserError(f"{path}: not a font whose characters can be listed ({error})") from None


def _drawing(font, character, is_colour):
    """Draw a character and return (size, bytes), so that two drawings can be compared."""
    left, top, right, bottom = font.getbbox(character)
    if max(right - left, bottom - top) > LARGEST:
        raise ValueError(f"{right - left} x {bottom - top} px")
    picture = Image.new("RGBA" if is_colour else "L", (max(0, right - left), max(0, bottom - top)))
    ImageDraw.Draw(picture).text((-left, -top), character, font=font, embedded_color=is_colour,
                                 fill=(0, 0, 0, 255) if is_colour else 255)
    return picture.size, picture.tobytes()
