"""The images to learn from: drawn letters (the default, nothing to download), a font file, or a folder of images.

Not from a paper: the papers use ImageNet and captioned images. Needs: nothing of the lecture. Next: train.py.

There are three sources with one small interface:

    len(source)          number of examples
    source.classes       tuple of class names ("A", ..., or the subfolders); empty if there are no classes
    source.image(i)      example i as a float32 tensor (3, H, W) in [-1, 1]; raises BrokenImage if it cannot be read.
                         With portrait=True an upright image is (3, W, H) instead: see `turned`
    source.label(i)      its class number, -1 if there are no classes
    source.captions(i)   its captions, a tuple of English phrases, mostly one; () if unknown
    source.caption(i)    the first of them, or ""

`Stream` turns a source into training data. Position k of the stream is a function of (seed, k) only. So a run that
resumes at step n starts at position n * batch and sees what an unbroken run would see.

A scene of `Glyphs` is a function of (seed, index) only, and it shows the same picture at every size from 16 to 1024
pixels. So models of different resolutions learn the same data. The scenes have a global structure that we can score
(is it the right letter?), fine texture and colour, and they cost nothing.
"""
import functools
import itertools
import math
import os
import unicodedata

import numpy as np
import torch
from PIL import Image

from plumbing import UserError
from plumbing.captions import Captions
from plumbing.fonts import check_characters, drawings, drawn_characters, glyph_tile, matplotlib_fonts, open_font
from plumbing.images import BrokenImage, list_images, load_image
from plumbing.workers import load


# ------------------------------------------------------------------------------------------ glyph scenes

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"                       # no two classes differ only by case

# Fonts of matplotlib that draw all 36 characters. (cmsy10, for example, draws other signs for the digits. In cmtt10 the
# letter O and the digit 0 look almost the same.)  (file, style for the caption)
FONTS = [("DejaVuSans-Bold.ttf", "sans"), ("DejaVuSans.ttf", "sans"), ("DejaVuSerif-Bold.ttf", "serif"),
         ("STIXGeneralBol.ttf", "serif"), ("cmb10.ttf", "serif"), ("DejaVuSansMono-Bold.ttf", "mono")]

COLOURS = {"red": (0.86, 0.12, 0.12), "orange": (0.98, 0.55, 0.08), "yellow": (0.98, 0.90, 0.20),
           "green": (0.10, 0.60, 0.20), "cyan": (0.25, 0.85, 0.88), "blue": (0.12, 0.22, 0.80),
           "purple": (0.48, 0.15, 0.62), "pink": (0.98, 0.60, 0.76), "white": (0.95, 0.95, 0.95),
           "black": (0.07, 0.07, 0.07)}
GROUNDS = ("shaded", "striped", "ringed", "checked", "grainy")


def luminance(rgb):
    """Return the brightness of a colour, 0 to 1."""
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


# Pairs (letter, ground) of colours that differ clearly in brightness, so that every letter can be read.
COLOUR_PAIRS = [(a, b) for a in COLOURS for b in COLOURS if abs(luminance(COLOURS[a]) - luminance(COLOURS[b])) > 0.3]


def withheld(label, colour):
    """Return True for one fifth of the pairs of character and colour: those that --withhold keeps out of training.

    Each character lacks two of the ten colours, and each colour lacks seven or eight of the 36 characters. So training
    shows every character and every colour, but never these pairs.
    """
    return (label + list(COLOURS).index(colour)) % 5 == 0


class Glyphs:
    """Letters and digits on coloured grounds, drawn on demand.

    size         (height, width) in px, 16 to 1024 each
    count, seed  number of scenes; all scenes depend on the seed
    held_out     the scenes after the training scenes (indices count, count + 1, ...). No run trains on them
    pairs        pairs of character and colour that occur: "all", "seen" (all but the `withheld` ones) or "withheld"
    portrait     for each character, every second scene is upright, (width, height)
    characters   the classes, some of CHARACTERS; empty: all
    """

    def __init__(self, size=(64, 64), count=100_000, seed=0, held_out=False, pairs="all", portrait=False,
                 characters=""):
        folder = matplotlib_fonts()
        self.fonts = [(os.path.join(folder, name), style) for name, style in FONTS]
        self.classes = tuple(characters or CHARACTERS)
        check_characters(self.classes, {character: character for character in CHARACTERS}, "glyphs")
        self.size, self.count, self.seed = tuple(size), count, seed
        self.offset, self.pairs, self.portrait = count if held_out else 0, pairs, portrait

    def __len__(self):
        return self.count

    def label(self, i):
        return (i + self.offset) % len(self.classes)                      # balanced: each pass shows every class

    def scene(self, i):
        """Draw all random choices of scene i: a dict of plain numbers and names, by (seed, i) only."""
        rng = np.random.default_rng((self.seed, i + self.offset))
        letter, ground = COLOUR_PAIRS[rng.integers(len(COLOUR_PAIRS))]
        if self.pairs != "all":                                           # another generator: all else stays the same
            again = np.random.default_rng((self.seed, i + self.offset, 4))
            while withheld(self.label(i), letter) != (self.pairs == "withheld"):
                letter, ground = COLOUR_PAIRS[again.integers(len(COLOUR_PAIRS))]
        font, style = self.fonts[rng.integers(len(self.fonts))]
        tilted = rng.random() < 0.5
        jitter = rng.uniform(-0.04, 0.04, (2, 3))
        return dict(
            character=self.classes[self.label(i)], font=font, style=style, tilted=tilted, letter=letter, ground=ground,
            letter_rgb=np.clip(COLOURS[letter] + jitter[0], 0, 1),
            ground_rgb=np.clip(COLOURS[ground] + jitter[1], 0, 1),
            angle=math.radians(rng.uniform(8, 14) * rng.choice([-1, 1]) if tilted else rng.uniform(-2, 2)),
            scale=rng.uniform(0.73, 0.81), x=rng.uniform(-0.03, 0.03), y=rng.uniform(-0.03, 0.03),
            shadow=rng.random() < 0.5, texture=GROUNDS[rng.integers(len(GROUNDS))],
            direction=rng.uniform(0, math.pi), phase=rng.uniform(0, 2 * math.pi), frequency=rng.uniform(2.0, 4.0),
            grain=rng.standard_normal((24, 24)).astype(np.float32))

    def captions(self, i):
        return (self.caption(i),)

    def caption(self, i):
        """Describe scene i: "an upright blue serif Q on striped yellow".

        A quarter of the captions leave out the posture, a quarter the style, a quarter the texture. So a model learns
        to draw without these words, too: "a blue Q on yellow".
        """
        s = self.scene(i)
        optional = dict(posture="tilted" if s["tilted"] else "upright", style=s["style"], texture=s["texture"])
        for name, draw in zip(optional, np.random.default_rng((self.seed, i + self.offset, 3)).random(3)):
            if draw >= 0.75:
                optional[name] = ""
        phrase = "{posture} {letter} {style} {character} on {texture} {ground}".format(**(s | optional)).split()
        return " ".join(["an" if phrase[0][0] in "aeiou" else "a", *phrase])

    def image(self, i, **changes):
        return _to_tensor(self.draw(i, **changes))

    def draw(self, i, **changes):
        """Draw scene i at twice its size or more and average it down to uint8 (H, W, 3), so that nothing aliases.

        changes: of its random choices, like angle=0.
        """
        s = self.scene(i) | changes
        # Every second pass over the classes is upright.
        height, width = self.size[::-1] if self.portrait and i // len(self.classes) % 2 else self.size
        k = max(2, math.ceil(96 / min(height, width)))                    # k x k drawn pixels for each pixel
        h, w = height * k, width * k
        side = min(h, w)
        # Coordinates in units of the shorter side, 0 in the middle: the scene is the same at every size and shape.
        v = ((np.arange(h, dtype=np.float32) + 0.5 - h / 2) / side)[:, None]
        u = ((np.arange(w, dtype=np.float32) + 0.5 - w / 2) / side)[None, :]
        pattern = np.clip(_pattern(s, u, v), 0, 1)                        # (h, w): 0 the ground's colour, 1 its shade
        *ink, coverage = _letter(s, h, w)                                 # ink: red, green, blue of a colour font
        ground = 1 - coverage                                             # what the letter does not cover
        if s["shadow"]:
            ground = ground * (1 - 0.4 * _letter(s, h, w, offset=0.035)[-1])
        # A pixel is a weighted sum of colours. To average the few weight maps first is cheaper.
        weights = np.stack([ground, ground * pattern] + (ink or [coverage]))
        weights = sum(weights[:, y::k, x::k] for y in range(k) for x in range(k)) / (k * k)     # (..., H, W)
        rgb = s["ground_rgb"]
        shade = 0.8 * rgb if luminance(rgb) > 0.35 else rgb + 0.2 * (1 - rgb)
        colours = np.stack([rgb, shade - rgb] + (list(np.eye(3)) if ink else [s["letter_rgb"]])).astype(np.float32)
        picture = np.tensordot(weights, colours, (0, 0))                  # (H, W, 3)
        return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def _pattern(s, u, v):
    """Return the texture of scene s's ground, about 0 to 1, at coordinates u (1, w) and v (h, 1)."""
    cos, sin = math.cos(s["direction"]), math.sin(s["direction"])
    along, across = cos * u + sin * v, cos * v - sin * u
    wave = 2 * math.pi * s["frequency"]
    if s["texture"] == "striped":
        pattern = np.sin(wave * along + s["phase"])
    elif s["texture"] == "ringed":
        pattern = np.sin(wave * np.hypot(u - 0.4 * cos, v - 0.4 * sin) + s["phase"])
    elif s["texture"] == "checked":
        pattern = np.sin(wave * along + s["phase"]) * np.sin(wave * across + s["phase"]) * 2
    elif s["texture"] == "grainy":
        grain = Image.fromarray(s["grain"]).resize((max(u.shape), max(v.shape)), Image.Resampling.BILINEAR)
        return 0.5 + 0.2 * np.asarray(grain)
    else:                                                                 # shaded: a gradient
        return 0.5 + 0.8 * along
    return 0.5 + 0.5 * np.clip(2 * pattern, -1, 1)                        # soft edges: nothing to alias


def _letter(s, h, w, offset=0.0):
    """Turn, scale and place the letter of scene s: a list of (h, w) in [0, 1]. offset: moves it, for its shadow.

    The list is [coverage]. For a colour font it is [red, green, blue, coverage], premultiplied.
    """
    side = min(h, w)
    tile = glyph_tile(s["font"], s["character"], side)
    zoom = 0.8 / s["scale"]                                               # tile pixels a canvas pixel
    cos, sin = zoom * math.cos(s["angle"]), zoom * math.sin(s["angle"])
    centre_x, centre_y = w / 2 + (s["x"] + offset) * side, h / 2 + (s["y"] + offset) * side
    inverse = (cos, sin, side / 2 - cos * centre_x - sin * centre_y,      # Pillow wants the map from canvas to tile
               -sin, cos, side / 2 + sin * centre_x - cos * centre_y)
    bands = [band.transform((w, h), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
             for band in tile.split()]
    return [np.asarray(band, dtype=np.float32) / 255 for band in bands]


class FontFile(Glyphs):
    """Any font file, in the same scenes as Glyphs: one class for each of `characters`, or for each that it draws."""

    def __init__(self, path, size=(64, 64), characters="", **options):
        super().__init__(size, **options)
        self.fonts, self.classes = [(str(path), "")], tuple(characters or drawn_characters(str(path)))
        if not self.classes:
            raise UserError(f"{path}: this font draws no character")
        check_characters(characters, drawings(str(path), characters), os.path.basename(path))

    def caption(self, i):
        s = self.scene(i)
        name = unicodedata.name(s["character"], f"U+{ord(s['character']):04X}").lower()
        _, is_colour = open_font(s["font"])
        colour = "" if is_colour else f"{s['letter']} "                   # a colour font brings its own colours
        return f"{colour}{name} on {s['texture']} {s['ground']}"


def _to_tensor(array):
    """Convert uint8 (H, W, 3) to float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


# ------------------------------------------------------------------------------------------ a folder of images

class ImageFolder:
    """A folder of images, flat or with one subfolder for each class, resized and cropped to `size`.

    Captions are optional. Either the folder has a captions.jsonl with lines {"file": "a/b.png", "caption": "..."}, one
    or more for an image, or a text file of the same name is beside an image (b.png, b.txt). `skipped` lists the
    unusable files as (path, why).
    """

    def __init__(self, path, size=(64, 64), portrait=False):
        self.path, self.size, self.portrait = str(path), tuple(size), portrait
        self.files, self.skipped = list_images(self.path)
        if not self.files:
            hint = " ({} skipped, as {}: {})".format(len(self.skipped), *self.skipped[0]) if self.skipped else ""
            raise UserError(f"{path}: no image in this folder{hint}")
        folders = [os.path.relpath(f, self.path).split(os.sep) for f in self.files]
        self.classes = tuple(sorted({parts[0] for parts in folders if len(parts) > 1}))
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [number[parts[0]] if len(parts) > 1 else -1 for parts in folders]
        self.folder_captions = Captions(self.path, self.files)

    def __len__(self):
        return len(self.files)

    def label(self, i):
        return self.labels[i]

    def captions(self, i):
        return self.folder_captions[i]

    def caption(self, i):
        return (*self.captions(i), "")[0]

    def image(self, i):
        return _to_tensor(load_image(self.files[i], self.size, self.portrait))


# ------------------------------------------------------------------------------------------ from source to batches

def turned(image):
    """Rotate a quarter counter-clockwise: (..., H, W) -> (..., W, H). Section 3.6 of simple diffusion.

    "Images are rotated during preprocessing if their width is smaller than their height". A flag, "portrait mode",
    tells the model.
    """
    return torch.rot90(image, 1, (-2, -1))


def turned_back(image):
    """Invert `turned`: what a model draws with the flag stands upright again."""
    return torch.rot90(image, -1, (-2, -1))


@functools.lru_cache(maxsize=4)                                           # a worker asks for it at every example
def _shuffled(n, seed, epoch):
    return np.random.default_rng((seed, 1, epoch)).permutation(n)


class Stream(torch.utils.data.Dataset):
    """A source as an endless sequence of training examples. Position k is a function of (seed, k) only.

    Epoch k // n shows each of the n examples once, in its own order. If an image cannot be read, the next one in this
    order takes its place. `broken` names it, so that the reader of the batch can warn once. Of several captions one is
    drawn by lot.
    """

    def __init__(self, source, seed, flip=False):
        self.source, self.seed, self.flip = source, seed, flip

    def order(self, epoch):
        """Return the indices of the examples in the order of this epoch."""
        return _shuffled(len(self.source), self.seed, epoch)

    def __getitem__(self, k):
        n, broken = len(self.source), []
        epoch, place = divmod(k, n)
        for attempt in range(n):
            i = int(self.order(epoch)[(place + attempt) % n])
            try:
                image = self.source.image(i)
            except BrokenImage as error:
                broken.append(str(error))
                continue
            if self.flip and np.random.default_rng((self.seed, 2, k)).random() < 0.5:
                image = image.flip(-1)
            upright = image.shape[1:] != self.source.size                 # flipped first, then turned
            captions = self.source.captions(i) or ("",)
            caption = captions[np.random.default_rng((self.seed, 3, k)).integers(len(captions))]
            return dict(image=turned(image) if upright else image, portrait=int(upright), label=self.source.label(i),
                        caption=caption, broken=broken)
        return dict(image=None, portrait=0, label=-1, caption="", broken=broken)                # every file is broken


def collate(examples):
    """Make a batch of examples: image (B, 3, H, W), portrait, label (B,), caption [B], broken [...].

    image is None if every file of the source is broken.
    """
    images = [e["image"] for e in examples]
    return dict(image=None if any(i is None for i in images) else torch.stack(images),
                label=torch.tensor([e["label"] for e in examples]),
                portrait=torch.tensor([e["portrait"] for e in examples]), caption=[e["caption"] for e in examples],
                broken=[b for e in examples for b in e["broken"]])


def batches(source, batch, seed, first_step=0, rank=0, world=1, workers=1, flip=False, pin=False):
    """Return an endless iterator over this rank's share of the global batches, starting at step `first_step`.

    The global batch of step n holds positions n * batch ... (n + 1) * batch - 1 of the stream. Rank `rank` of `world`
    takes a contiguous share. workers: number of processes that decode ahead; 0 decodes in this process.
    pin: the batches go to a GPU.
    """
    share = batch // world
    firsts = itertools.count(first_step * batch + rank * share, batch)    # the first position of each step
    return load(Stream(source, seed, flip), batch_sampler=(list(range(first, first + share)) for first in firsts),
                collate_fn=collate, num_workers=workers, prefetch_factor=4 if workers else None,
                pin_memory=pin)
