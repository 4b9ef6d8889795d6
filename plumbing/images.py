"""Folders of images: list the files safely, decode any of them."""
import collections
import glob
import os
import stat
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

MAX_PIXELS = 100_000_000                                                  # a larger image is a mistake or an attack
# Pictures only. No PDF and no EPS: to decode them runs programs.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")
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
    not read are counted by suffix, and a class without any image is named.
    """
    files, skipped, entered = [], [], set()
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
            if name.startswith("."):
                continue
            path, suffix = os.path.join(folder, name), os.path.splitext(name)[1].lower()
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
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenImage(f"{path}: {image.width}x{image.height} is too large")
                is_deep = ";16" in str(image.tile) or image.mode[0] in "IF"                     # 16 bits and more
                image.draft("RGB", (2 * max(size), 2 * max(size)))        # JPEG: decode near the wanted size, quicker
                image = _to_rgb(_turned_upright(image))
                if is_deep and max(map(max, image.getextrema())) < 16:    # Pillow drops the lower 8 bits of colours
                    raise BrokenImage(f"{path}: comes out black: it uses little of its 16 bits or more; save with 8")
                if portrait and image.width < image.height:
                    size = size[::-1]
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
                return np.asarray(image)
    except BrokenImage:
        raise
    except Exception as error:                                            # decoders fail in many ways: name the file
        raise BrokenImage(f"{path}: {type(error).__name__}: {error}") from None


def _turned_upright(image):
    """Turn an image as its EXIF says. A picture whose EXIF makes no sense stays as it is: it may be good."""
    image.load()
    try:
        image.getexif().get(ExifTags.Base.Orientation)                    # Pillow keeps what it reads here
    except Exception:                                                     # its reader fails in many ways
        return image
    for name in ("exif", "Raw profile type exif"):
        image.info.pop(name, None)                                        # or Pillow writes them anew, and may fail
    return ImageOps.exif_transpose(image)


def _to_8_bits(image):
    """Convert grey of 16 bits, 32 bits or floats to 8 bits. The file does not say what is white, so its range must.

    White is the smallest of WHITES that no value exceeds by a tenth: resizing lets values overshoot. Floats below 16
    are of the scale 0 to 1, with highlights. Clearly negative values: the lowest one is black.
    """
    values = np.asarray(image, dtype=np.float32)
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise ValueError(f"{bad:,} of {values.size:,} pixels are NaN or infinite")
    low, top = float(values.min()), float(values.max())
    white = 1 if image.mode == "F" and top < 16 else next((w for w in WHITES if top <= 1.1 * w), top)
    black = low if low < -0.1 * white else 0
    return Image.fromarray((np.clip((values - black) / (white - black), 0, 1) * 255 + 0.5).astype(np.uint8))


def _to_rgb(image):
    """Convert any Pillow mode to RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return _to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
