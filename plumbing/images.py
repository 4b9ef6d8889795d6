"""Folders of images: list the files safely, decode any of them."""
import collections
import glob
import os
import stat
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

MAX_PIXELS = 100_000_000                                                  # a larger image is a mistake or an attack
MAX_BYTES = 220_000_000                                                   # to decode one: a process stays below 500 MB
LARGE = 2 ** 24                                                           # pixels; such an image is averaged down first
A_PIXEL = {"WEBP": 17, "AVIF": 10, "JPEG2000": 20}                        # bytes that Pillow takes, as measured
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}                                    # by the orientation that EXIF gives
# Pictures only. No PDF and no EPS: to decode them runs programs. No ICO: its list of sizes may hide a larger picture.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF")
# Suffixes of pictures that Pillow does not know. Those of its other formats are read from Pillow itself.
FOREIGN = (".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".exr", ".hdr", ".xcf", ".dng", ".raw", ".cr2", ".cr3",
           ".nef", ".arw", ".raf", ".orf", ".rw2", ".dcm", ".avif")       # the last: builds of Pillow without it
WHITES = (1, 255, 1023, 4095, 16383, 65535)                               # white in 1, 8, 10, 12, 14 and 16 bits
# Editors keep much text in a PNG, so 16 MB a chunk, not 1; all of it 32 MB, not 64, or a bomb would fill the memory.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 24, 2 ** 25


class BrokenImage(Exception):
    """A file that cannot be used as an image. The message says why."""


def list_images(root):
    """List the images under root: (files, skipped), skipped as (path, why). Sorted by name in each folder.

    Passes over folders of runs, which may lie in the data: their sheets are no images to learn from. Follows links, but
    reads no folder twice, so that a loop of links ends. Real folders come before links. Pictures of formats that are
    not read are counted by suffix, hidden ones are counted, and a class without any image is named.
    """
    files, skipped, entered, hidden = [], [], set(), []
    formats, foreign, found = Image.registered_extensions(), collections.Counter(), collections.Counter()

    def note_unreadable(error):
        skipped.append((error.filename, error.strerror))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=note_unreadable):
        if os.path.realpath(folder) in entered:
            skipped.append((folder, "a link to a folder already read"))
            folders.clear()                                               # do not go deeper
            continue
        entered.add(os.path.realpath(folder))
        if folder != root and _is_run(names):
            skipped.append((folder, "the folder of a run"))
            folders.clear()
            continue
        folders[:] = sorted((name for name in folders if not name.startswith(".")),
                            key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        class_name = os.path.relpath(folder, root).split(os.sep)[0]
        for name in sorted(names):
            path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
            if name.startswith("."):                                      # a Mac puts ._a.png beside a.png
                hidden += [path] * (suffix in formats or suffix in FOREIGN)
                continue
            if _is_sheet(folder, name):
                skipped.append((path, "a sheet of samples, beside runs"))
                continue
            is_image = formats.get(suffix) in FORMATS
            problem = is_image and _unusable(path)
            found[class_name] += bool(is_image and not problem)
            if problem:
                skipped.append((path, problem))
            elif is_image:
                files.append(path)
            elif suffix in formats or suffix in FOREIGN:
                foreign[suffix] += 1
    skipped += [(os.path.join(root, "**", "*" + suffix), f"{count} of a format that is not read; save as PNG or JPEG")
                for suffix, count in foreign.items()]
    if hidden:
        more = f", and {len(hidden) - 1:,} more of them" if len(hidden) > 1 else ""
        skipped.append((hidden[0], f"a hidden file, as its name begins with a dot{more}"))
    skipped += [(os.path.join(root, name), "no image in it") for name in found if name != "." and not found[name]]
    return files, skipped


def _is_run(names):
    """Return whether a folder with these files is that of a run, or of what evaluate.py found out about one."""
    return {"config.json", "log.csv"} <= set(names) or "checkpoint.pt" in names or "evaluation.json" in names


def _is_sheet(folder, name):
    """Return whether this is a picture of sample.py or evaluate.py, under the name that they choose themselves."""
    return name in ("samples.png", "comparison.png") and any(
        glob.glob(os.path.join(glob.escape(folder), runs, "log.csv")) for runs in ("*", "runs/*"))


def _unusable(path):
    """Say why a path cannot be opened as a file, or return None. A named pipe or a device would block the reader."""
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else "not a regular file"
    except OSError as error:
        return error.strerror or str(error)


def load_image(path, size, portrait=False):
    """Decode an image, scale its short side to fit and crop the middle: uint8 (H, W, 3). Raises BrokenImage.

    portrait: an image that is narrower than tall becomes (W, H, 3) instead.

    Applies the EXIF rotation. Puts transparency over white. Guesses what white is in grey of 16 bits, 32 bits and
    floats. Of several frames it takes the first. The resampling is antialiased (Pillow widens its filter to the scale).
    """
    Image.init()                                                          # registers the formats that Pillow can read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # Pillow warns of odd metadata and of bombs
            with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                is_deep = ";16" in str(image.tile) or image.mode[0] in "IF"                     # 16 bits and more
                in_file, least = image.size, 2 * max(size)
                image.draft("RGB", (least, least))                        # JPEG: decode near the wanted size, quicker
                if image.width * image.height > MAX_PIXELS or _bytes_to_decode(image, in_file) > MAX_BYTES:
                    raise BrokenImage(f"{path}: {in_file[0]}x{in_file[1]} is too large for a {image.format} of mode "
                                      f"{image.mode}; a JPEG may be as large")
                image.load()
                turn = TURNS.get(_orientation(image))                     # of the whole image: a part has no EXIF
                image, brightest = _shrunk_to_rgb(image, least, max(size) / min(size))
                if is_deep and brightest < 16:                            # Pillow drops the lower 8 bits of colours
                    raise BrokenImage(f"{path}: comes out black: it uses little of its 16 bits or more; save with 8")
                image = image if turn is None else image.transpose(turn)
                if portrait and image.width < image.height:
                    size = size[::-1]
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
                return np.asarray(image)
    except BrokenImage:
        raise
    except Exception as error:                                            # decoders fail in many ways: name the file
        raise BrokenImage(f"{path}: {type(error).__name__}: {error}") from None


def _bytes_to_decode(image, in_file):
    """Return about how many bytes Pillow takes to decode an image. in_file: its size there, before `draft`."""
    pixel = {"1": 1, "L": 1, "P": 1, "I;16": 2}.get(image.mode, 4)
    if image.format in A_PIXEL:
        pixel = A_PIXEL[image.format]
    if image.format == "TIFF":                                            # one strip may hold all of it
        pixel += sum(image.tag_v2.get(258, (8,))) / 8
    coefficients = 0
    if image.info.get("progressive"):                                     # libjpeg keeps those of the whole image
        shares = [h * v for _, h, v, _ in image.layer]
        coefficients = 2 * in_file[0] * in_file[1] * sum(shares) / max(shares)
    return pixel * image.width * image.height + coefficients


def _orientation(image):
    """Return how an image is turned, as its EXIF says. A picture whose EXIF makes no sense stays as it is."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:                                                     # its reader fails in many ways
        return None


def _tiles(image, box, step):
    """Yield ((left, top) within the box, part of the image) of tiles of step x step pixels or less."""
    left, top, right, bottom = box
    for y in range(top, bottom, step):
        for x in range(left, right, step):
            yield (x - left, y - top), image.crop((x, y, min(x + step, right), min(y + step, bottom)))


def _shrunk_to_rgb(image, least, ratio):
    """Convert an image to RGB. Return it and its brightest value.

    Of a large one there is no second copy: it is converted tile by tile, k x k of its pixels become one, so that the
    short side stays `least` or more, and what lies further out than `ratio`, the wanted long side by the short one, is
    left out.
    """
    (width, height), k, margin_x, margin_y = image.size, 1, 0, 0
    if width * height > LARGE:
        k = max(1, min(image.size) // least)
        margin_x = max(0, int(width - ratio * height - 2) // 2)           # alike on both sides: the middle stays
        margin_y = max(0, int(height - ratio * width - 2) // 2)
    box = (margin_x, margin_y, width - margin_x, height - margin_y)
    small = Image.new("RGB", (-(-(box[2] - box[0]) // k), -(-(box[3] - box[1]) // k)))
    extremes, brightest = _extremes(image), 0
    for (x, y), tile in _tiles(image, box, k * max(1, 1024 // k)):
        tile = _to_rgb(tile, extremes)
        brightest = max(brightest, *map(max, tile.getextrema()))
        small.paste(tile.reduce(k) if k > 1 else tile, (x // k, y // k))
    return small, brightest


def _extremes(image):
    """Return the lowest and the highest value of grey of 16 bits, 32 bits or floats; None for other modes."""
    if not (image.mode.startswith("I;16") or image.mode in ("I", "F")):
        return None
    bad, low, top = 0, np.inf, -np.inf
    for _, tile in _tiles(image, (0, 0, *image.size), 1024):
        values = np.asarray(tile, dtype=np.float32)
        bad += np.count_nonzero(~np.isfinite(values))
        low, top = min(low, float(values.min())), max(top, float(values.max()))
    if bad:
        raise ValueError(f"{bad:,} of {image.width * image.height:,} pixels are NaN or infinite")
    return low, top


def _to_8_bits(image, low, top):
    """Convert grey of 16 bits, 32 bits or floats to 8 bits. The file does not say what is white, so its range must.

    White is the smallest of WHITES that no value exceeds by a tenth: resizing lets values overshoot. Floats below 16
    are of the scale 0 to 1, with highlights. Clearly negative values: the lowest one is black.
    """
    values = np.asarray(image, dtype=np.float32)
    white = 1 if image.mode == "F" and top < 16 else next((w for w in WHITES if top <= 1.1 * w), top)
    black = low if low < -0.1 * white else 0
    return Image.fromarray((np.clip((values - black) / (white - black), 0, 1) * 255 + 0.5).astype(np.uint8))


def _to_rgb(image, extremes):
    """Convert any Pillow mode to RGB. extremes: of the whole image, as _extremes returns them."""
    if extremes:
        return _to_8_bits(image, *extremes).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
