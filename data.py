"""Images in: drawn letters (the default, nothing to download), any font file, any folder of images.

Three sources behind one small interface. A source has

    len(source)          how many examples there are
    source.classes       tuple of class names ("A", ..., or the subfolders; empty: no classes)
    source.image(i)      example i as a float32 tensor (3, H, W) in [-1, 1]; raises BrokenImage if it cannot be read;
                         with portrait=True (3, W, H) if it stands upright: see `turned`
    source.label(i)      its class number, -1 if there are no classes
    source.caption(i)    its caption, one English phrase ("" if unknown)

and `Stream` turns a source into training data: position k of the stream is a function of (seed, k) alone, so a run that
resumes at step n asks for position n * batch onwards and sees what it would have seen.

A scene of `Glyphs` is a function of (seed, index) alone and the same picture at every size from 16 to 1024 pixels, so
that models of different resolutions learn from, and are judged on, the same data. Not from a paper: the papers use
ImageNet. What was wanted is global structure that can be scored (is it the letter that was asked for?), fine texture,
and colour, at no cost.
"""
import functools
import json
import math
import os
import signal
import stat
import threading
import unicodedata

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from plumbing import UserError
from plumbing.images import SUFFIXES, BrokenImage, load_image


# ------------------------------------------------------------------------------------------ glyph scenes

CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"                       # no class differs from another by case alone

# Fonts inside matplotlib that draw every one of the 36 characters (cmsy10, say, draws other signs for the digits;
# in cmtt10 O and 0 can hardly be told apart).  (file, style for the caption)
FONTS = [("DejaVuSans-Bold.ttf", "sans"), ("DejaVuSans.ttf", "sans"), ("DejaVuSerif-Bold.ttf", "serif"),
         ("STIXGeneralBol.ttf", "serif"), ("cmb10.ttf", "serif"), ("DejaVuSansMono-Bold.ttf", "mono")]

COLOURS = {"red": (0.86, 0.12, 0.12), "orange": (0.98, 0.55, 0.08), "yellow": (0.98, 0.90, 0.20),
           "green": (0.10, 0.60, 0.20), "cyan": (0.25, 0.85, 0.88), "blue": (0.12, 0.22, 0.80),
           "purple": (0.48, 0.15, 0.62), "pink": (0.98, 0.60, 0.76), "white": (0.95, 0.95, 0.95),
           "black": (0.07, 0.07, 0.07)}
GROUNDS = ("shaded", "striped", "ringed", "checked", "grainy")


def _luminance(rgb):
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


# Letter and ground: pairs of named colours that differ clearly in brightness, so that every letter can be read.
COLOUR_PAIRS = [(a, b) for a in COLOURS for b in COLOURS if abs(_luminance(COLOURS[a]) - _luminance(COLOURS[b])) > 0.3]


def withheld(label, colour):
    """Is this character in this colour one of the fifth of such pairs that training may be asked to leave out?

    Each character lacks two of the ten colours, each colour seven or eight of the 36 characters: all parts of a pair
    that was never seen have been seen.
    """
    return (label + list(COLOURS).index(colour)) % 5 == 0


def _glyph_tile(path, character, side):
    """_draw_tile, remembered while tiles are small: 512 of them at 1024 px would fill a gigabyte or more."""
    return (_small_tile if side <= 512 else _draw_tile)(path, character, side)


def _draw_tile(path, character, side):
    """The character, centred, its longer side 0.8 * side, on a square of side x side.

    An "L" picture of coverage, or "RGBa" (premultiplied) for colour fonts. Drawn large and averaged down: FreeType fits
    small letters to the pixel grid, and a scene would then differ a little from one size to the next.
    """
    large = side * max(1, math.ceil(512 / side))
    font, colour = _open_font(path)
    left, top, right, bottom = font.getbbox(character)
    if colour:                                                            # bitmaps of one fixed size: resize them
        tile = Image.new("RGBA", (right - left, bottom - top))
        ImageDraw.Draw(tile).text((-left, -top), character, font=font, embedded_color=True)
        tile = tile.crop(tile.getbbox())
        # Drawn on transparent black the colours come out multiplied by coverage already, whatever the mode is called.
        tile = Image.frombytes("RGBa", tile.size, tile.tobytes())
        zoom = 0.8 * side / max(tile.size)
        tile = tile.resize([max(1, round(zoom * s)) for s in tile.size], Image.Resampling.BICUBIC)
        # A transform, since paste would turn the premultiplied colours back into straight ones.
        left, top = (side - tile.width) // 2, (side - tile.height) // 2
        return tile.transform((side, side), Image.Transform.AFFINE, (1, 0, -left, 0, 1, -top))
    font = font.font_variant(size=max(1, round(font.size * 0.8 * large / max(right - left, bottom - top))))
    left, top, right, bottom = font.getbbox(character)
    square = Image.new("L", (large, large), 0)
    corner = ((large - right - left) / 2, (large - bottom - top) / 2)
    ImageDraw.Draw(square).text(corner, character, font=font, fill=255)
    return square.reduce(large // side)


_small_tile = functools.lru_cache(maxsize=512)(_draw_tile)


@functools.lru_cache(maxsize=64)
def _open_font(path):
    """(font, is_colour). Fonts of outlines open at any size, fonts of coloured bitmaps only at the sizes they hold."""
    for size in (256, 109, 128, 136, 160, 96, 72, 64, 48, 32):
        try:
            font = ImageFont.truetype(path, size)
        except OSError as error:
            if "size" not in str(error):                                  # "invalid pixel size" is the one to get over
                raise UserError(f"{path}: not a font that can be read ({error})") from None
            continue
        return font, size != 256
    raise UserError(f"{path}: a bitmap font of none of the usual sizes")


class Glyphs:
    """Letters and digits on coloured grounds, drawn on the fly.

    size: (height, width) in px, 16 to 1024 each. count: number of scenes. seed: which world they are from.
    held_out: the same world beyond the training scenes (indices count, count + 1, ...), never trained on.
    pairs: which of the characters in which colours there are: "all"; without the `withheld` ones, "seen"; or only they,
    "withheld". portrait: every second one, of each character, stands upright.
    """

    def __init__(self, size=(64, 64), count=100_000, seed=0, held_out=False, pairs="all", portrait=False):
        folder = os.path.join(_matplotlib_data(), "fonts", "ttf")
        self.fonts = [(os.path.join(folder, name), style) for name, style in FONTS]
        self.classes = tuple(CHARACTERS)
        self.size, self.count, self.seed = tuple(size), count, seed
        self.offset, self.pairs, self.portrait = count if held_out else 0, pairs, portrait

    def __len__(self):
        return self.count

    def label(self, i):
        return (i + self.offset) % len(self.classes)                      # balanced: every 36 scenes hold every class

    def scene(self, i):
        """All that is random about scene i, as a dict of plain numbers and names. A function of (seed, i) alone."""
        rng = np.random.default_rng((self.seed, i + self.offset))
        letter, ground = COLOUR_PAIRS[rng.integers(len(COLOUR_PAIRS))]
        if self.pairs != "all":
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

    def caption(self, i):
        """"an upright blue serif Q on striped yellow"; each of posture, style and texture is left out in a quarter of
        the scenes, so that a model learns to do without, too: "a blue Q on yellow"."""
        s = self.scene(i)
        said = np.random.default_rng((self.seed, i + self.offset, 3)).random(3) < 0.75
        posture, style, texture = ([word] if keep else [] for word, keep in zip(
            ("tilted" if s["tilted"] else "upright", s["style"], s["texture"]), said))
        words = [*posture, s["letter"], *style, s["character"], "on", *texture, s["ground"]]
        return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])

    def image(self, i):
        return _to_tensor(self.draw(i))

    def draw(self, i):
        """Scene i as uint8 (H, W, 3). Drawn at twice the size or more and averaged down, so that nothing aliases."""
        s = self.scene(i)
        # Of every 72 scenes the second 36, which hold every character once.
        height, width = self.size[::-1] if self.portrait and i // len(self.classes) % 2 else self.size
        supersample = max(2, math.ceil(96 / min(height, width)))
        h, w = height * supersample, width * supersample
        side = min(h, w)
        # Coordinates in units of the shorter side, 0 in the middle: a scene means the same at every size and shape.
        v = ((np.arange(h, dtype=np.float32) + 0.5 - h / 2) / side)[:, None]
        u = ((np.arange(w, dtype=np.float32) + 0.5 - w / 2) / side)[None, :]
        pattern = np.clip(self._pattern(s, u, v), 0, 1)                   # (h, w): 0 the ground's colour, 1 its shade
        *ink, coverage = self._layer(s, h, w, 0.0)                        # ink: red, green, blue of a colour font
        ground = 1 - coverage                                             # what the letter leaves, darker in its shadow
        if s["shadow"]:
            ground = ground * (1 - 0.4 * self._layer(s, h, w, 0.035)[-1])
        # The picture is a sum of colours; their weights are averaged down first, one channel each.
        rgb = s["ground_rgb"]
        shade = 0.8 * rgb if _luminance(rgb) > 0.35 else rgb + 0.2 * (1 - rgb)
        weights = np.stack([ground, ground * pattern] + (ink or [coverage]))
        k = supersample                                                   # (..., H k, W k) -> (..., H, W), averaged
        weights = sum(weights[:, i::k, j::k] for i in range(k) for j in range(k)) / (k * k)
        colours = np.stack([rgb, shade - rgb] + (list(np.eye(3)) if ink else [s["letter_rgb"]])).astype(np.float32)
        picture = np.tensordot(weights, colours, (0, 0))                  # (H, W, 3)
        return (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)

    @staticmethod
    def _pattern(s, u, v):
        """The ground's texture, 0 to 1, at coordinates u (1, w) and v (h, 1)."""
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
        else:                                                             # shaded: a gradient
            return 0.5 + 0.8 * along
        return 0.5 + 0.5 * np.clip(2 * pattern, -1, 1)                    # soft edges: nothing to alias

    @staticmethod
    def _layer(s, h, w, offset):
        """The letter turned, sized and placed (and moved by `offset`, for its shadow): a list of (h, w) in [0, 1],
        coverage alone, or premultiplied red, green, blue and coverage for a colour font."""
        side = min(h, w)
        tile = _glyph_tile(s["font"], s["character"], side)
        zoom = 0.8 / s["scale"]                                           # tile pixels a canvas pixel
        cos, sin = zoom * math.cos(s["angle"]), zoom * math.sin(s["angle"])
        centre_x, centre_y = w / 2 + (s["x"] + offset) * side, h / 2 + (s["y"] + offset) * side
        inverse = (cos, sin, side / 2 - cos * centre_x - sin * centre_y,  # canvas -> tile, as Pillow wants it
                   -sin, cos, side / 2 + sin * centre_x - cos * centre_y)
        moved = [band.transform((w, h), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
                 for band in tile.split()]
        return [np.asarray(band, dtype=np.float32) / 255 for band in moved]


class FontFile(Glyphs):
    """Any font file: one class for each character that it really draws, in the same scenes as Glyphs.

    Left out: what the font maps but draws as nothing or as its "missing" box, characters drawn like an earlier one
    (A in Latin, Greek, Cyrillic), and small letters whose capital is there.
    """

    def __init__(self, path, size=(64, 64), count=100_000, seed=0, held_out=False, pairs="all", portrait=False):
        super().__init__(size, count, seed, held_out, pairs, portrait)
        self.fonts, self.classes = [(str(path), "")], tuple(drawn_characters(str(path)))
        if not self.classes:
            raise UserError(f"{path}: this font draws no character")

    def caption(self, i):
        s = self.scene(i)
        name = unicodedata.name(s["character"], f"U+{ord(s['character']):04X}").lower()
        colour = "" if _open_font(s["font"])[1] else f"{s['letter']} "
        return f"{colour}{name} on {s['texture']} {s['ground']}"


def drawn_characters(path):
    """The characters that a font file draws, each unlike the others, in order of code point."""
    from fontTools.ttLib import TTFont                                    # a part of matplotlib's own installation
    font, colour = _open_font(path)
    try:
        mapped = TTFont(path, lazy=True, fontNumber=0).getBestCmap() or {}
    except Exception as error:                                            # damaged tables fail in many ways
        raise UserError(f"{path}: not a font whose characters can be listed ({error})") from None
    font = font if colour else font.font_variant(size=48)

    def drawing(character):
        left, top, right, bottom = font.getbbox(character)
        picture = Image.new("RGBA" if colour else "L", (max(0, right - left), max(0, bottom - top)))
        ImageDraw.Draw(picture).text((-left, -top), character, font=font, embedded_color=colour,
                                     fill=(0, 0, 0, 255) if colour else 255)
        return picture.size, picture.tobytes()

    seen, characters, folded = {drawing("\U0010FFFE"), drawing("\U0010FFFF")}, [], set()     # the "missing" box
    kinds = {character: unicodedata.category(character) for character in map(chr, mapped)}
    for character in sorted(kinds, key=lambda c: (kinds[c] == "Ll", c)):  # a capital before its small letter
        if kinds[character][0] in "ZM" or kinds[character] in ("Cc", "Cf", "Cs", "Cn"):  # spaces, marks, controls
            continue
        size, bitmap = drawing(character)
        if any(bitmap) and (size, bitmap) not in seen and character.casefold() not in folded:
            seen.add((size, bitmap))
            folded.add(character.casefold())
            characters.append(character)
    return sorted(characters)


def _matplotlib_data():
    import matplotlib                                                     # only for the folder of its fonts
    return matplotlib.get_data_path()


def _to_tensor(array):
    """uint8 (H, W, 3) -> float32 (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(array)).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


# ------------------------------------------------------------------------------------------ a folder of images

class ImageFolder:
    """A folder of images, flat or with one subfolder a class, resized and cropped to `size`.

    Captions, if any: captions.jsonl in the folder, a line {"file": "a/b.png", "caption": "..."} each, or a text file of
    the same name beside the image (b.png, b.txt). Files that cannot be used are counted in `skipped` as (path, why).
    """

    def __init__(self, path, size=(64, 64), portrait=False):
        self.path, self.size, self.portrait = str(path), tuple(size), portrait
        self.files, self.skipped = _list_images(self.path)
        if not self.files:
            hint = f" ({len(self.skipped)} skipped)" if self.skipped else ""
            raise UserError(f"{path}: no image in this folder{hint}")
        folders = [os.path.relpath(f, self.path).split(os.sep) for f in self.files]
        self.classes = tuple(sorted({parts[0] for parts in folders if len(parts) > 1}))
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = [number[parts[0]] if len(parts) > 1 else -1 for parts in folders]
        self.captions = _read_captions(os.path.join(self.path, "captions.jsonl"))

    def __len__(self):
        return len(self.files)

    def label(self, i):
        return self.labels[i]

    def caption(self, i):
        name = os.path.relpath(self.files[i], self.path).replace(os.sep, "/")
        if name in self.captions:
            return self.captions[name]
        beside = os.path.splitext(self.files[i])[0] + ".txt"
        if os.path.isfile(beside):
            with open(beside, encoding="utf-8-sig", errors="replace") as file:
                return file.read().strip()
        return ""

    def image(self, i):
        return _to_tensor(load_image(self.files[i], self.size, self.portrait))


def _list_images(root):
    """(files, skipped): every regular file with an image's suffix under root, sorted; links followed, loops cut."""
    files, skipped, entered = [], [], set()
    unreadable = lambda error: skipped.append((error.filename, error.strerror))
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unreadable):
        if os.path.realpath(folder) in entered:                           # a loop, or a second way to the same files
            skipped.append((folder, "a link to a folder already read"))
            folders.clear()
            continue
        entered.add(os.path.realpath(folder))
        links_last = lambda name: (os.path.islink(os.path.join(folder, name)), name)
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=links_last)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if not name.lower().endswith(SUFFIXES) or name.startswith("."):
                continue
            try:
                # A named pipe or a device would block the reader for ever: only regular files are opened at all.
                if stat.S_ISREG(os.stat(path).st_mode):
                    files.append(path)
                else:
                    skipped.append((path, "not a regular file"))
            except OSError as error:
                skipped.append((path, error.strerror or str(error)))
    return files, skipped


def _read_captions(path):
    captions = {}
    if os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        entry = json.loads(line)
                        name = entry["file"] if "file" in entry else entry["file_name"]
                        caption = str(entry["caption"] if "caption" in entry else entry["text"])
                        captions[name] = caption.encode("utf-8", "replace").decode()            # half a surrogate pair
                    except (ValueError, KeyError, AttributeError, TypeError):
                        raise UserError(f'{path}, line {number}: want {{"file": ..., "caption": ...}}') from None
    return captions


# ------------------------------------------------------------------------------------------ from source to batches

def turned(image):
    """Section 3.6: "images are rotated during preprocessing if their width is smaller than their height": a quarter
    counter-clockwise. (..., H, W) -> (..., W, H); its flag, "portrait mode", is a condition of the model."""
    return torch.rot90(image, 1, (-2, -1))


def turned_back(image):
    """The inverse of `turned`: what a model draws with the flag, upright again."""
    return torch.rot90(image, -1, (-2, -1))


def open_source(data, size, count=100_000, seed=0, held_out=False, pairs="all", portrait=False):
    """What --data names: "glyphs", a font file, or a folder of images. Raises UserError."""
    if data == "glyphs":
        return Glyphs(size, count, seed, held_out, pairs, portrait)
    if os.path.isfile(data):
        if not data.lower().endswith((".ttf", ".otf", ".ttc", ".otc")):
            raise UserError(f"--data {data}: want glyphs, a font file (.ttf, .otf, .ttc) or a folder of images")
        return FontFile(data, size, count, seed, held_out, pairs, portrait)
    if os.path.isdir(data):
        return ImageFolder(data, size, portrait)
    raise UserError(f"--data {data}: no such file or folder")


def open_run(config, **options):
    """The source that a run of this Config learns from. options: of open_source, instead of the Config's."""
    options = dict(pairs="seen" if config.withhold else "all", portrait=config.portrait) | options
    return open_source(config.data, config.size, config.scenes, config.seed, **options)


class Stream(torch.utils.data.Dataset):
    """A source as an endless sequence of training examples. Position k is a function of (seed, k) alone.

    Epoch k // n goes through the n examples in an order of its own. An image that cannot be read is replaced by the
    next one in that order, and named in `broken` so that the reader of the batch can warn once.
    """

    def __init__(self, source, seed, flip=False):
        self.source, self.seed, self.flip = source, seed, flip
        self.order = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch):
        return np.random.default_rng((self.seed, 1, epoch)).permutation(len(self.source))

    def __getstate__(self):                                               # a cache cannot travel to a worker process
        return {k: v for k, v in self.__dict__.items() if k != "order"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.order = functools.lru_cache(maxsize=2)(self._shuffled)

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
            upright = image.shape[1:] != self.source.size                 # mirrored as it stands, then turned
            return dict(image=turned(image) if upright else image, portrait=int(upright), label=self.source.label(i),
                        caption=self.source.caption(i), broken=broken)
        return dict(image=None, portrait=0, label=-1, caption="", broken=broken)  # none left: for the reader to say


def collate(examples):
    """A list of examples -> image (B, 3, H, W), portrait, label (B,), caption [B], broken [...]; image None if none was
    left."""
    images = [e["image"] for e in examples]
    return dict(image=None if any(i is None for i in images) else torch.stack(images),
                label=torch.tensor([e["label"] for e in examples]),
                portrait=torch.tensor([e["portrait"] for e in examples]), caption=[e["caption"] for e in examples],
                broken=[b for e in examples for b in e["broken"]])


def _heed_the_parent_alone(worker):
    """Ctrl-C, `timeout` and torchrun signal a whole process group, Slurm and systemd every process of a job: without
    its workers the parent could not save any more. So they leave its group, and SIGTERM ends them only if it is the
    parent's own. They end when it does."""
    def wait():
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):                                    # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])        # then it is left for the thread to take
        threading.Thread(target=wait, daemon=True).start()


def batches(source, batch, seed, first_step=0, rank=0, world=1, workers=1, flip=False):
    """An endless iterator over this process's share of the global batches, from `first_step` on.

    The global batch of step n holds positions n * batch ... (n + 1) * batch - 1; process `rank` of `world` takes its
    contiguous share. workers: processes that decode ahead; 0 does it in this one.
    """
    share = batch // world

    class Positions(torch.utils.data.Sampler):
        def __iter__(self):
            step = first_step
            while True:
                first = step * batch + rank * share
                yield list(range(first, first + share))
                step += 1

    return iter(torch.utils.data.DataLoader(
        Stream(source, seed, flip), batch_sampler=Positions(), collate_fn=collate, num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=torch.cuda.is_available(),
        worker_init_fn=_heed_the_parent_alone))
