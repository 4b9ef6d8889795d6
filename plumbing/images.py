"""Folders of images: list the files safely, decode any of them, read their captions."""
import glob
import json
import os
import stat
import warnings

import numpy as np
from PIL import Image, ImageOps

from plumbing import UserError

MAX_PIXELS = 100_000_000                                                  # a larger image is a mistake or an attack
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")
# Pictures only. No PDF and no EPS: to decode them runs programs.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".tga", ".jp2",
            ".avif", ".ico")


class BrokenImage(Exception):
    """A file that cannot be used as an image. The message says why."""


def list_images(root):
    """List the images under root: (files, skipped), skipped as (path, why). Sorted by name in each folder.

    Passes over folders of runs, which may lie in the data: their sheets are no images to learn from.

    Follows links, but reads no folder twice, so that a loop of links ends. Real folders come before links.
    """
    files, skipped, entered = [], [], set()

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
        for name in sorted(names):
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            path = os.path.join(folder, name)
            problem = "a sheet of samples, beside runs" if _is_sheet(folder, name) else _unusable(path)
            if problem:
                skipped.append((path, problem))
            else:
                files.append(path)
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


def read_captions(path):
    """Read a captions.jsonl: {file: caption}; empty if there is none. Raises UserError naming a wrong line."""
    captions = {}
    if not os.path.isfile(path):
        return captions
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                name = entry["file"] if "file" in entry else entry["file_name"]
                caption = str(entry["caption"] if "caption" in entry else entry["text"])
                captions[name] = caption.encode("utf-8", "replace").decode()                    # half a surrogate pair
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f'{path}, line {number}: want {{"file": ..., "caption": ...}}') from None
    return captions


def load_image(path, size, portrait=False):
    """Decode an image, scale its short side to fit and crop the middle: uint8 (H, W, 3). Raises BrokenImage.

    portrait: an image that is narrower than tall becomes (W, H, 3) instead.

    Applies the EXIF rotation. Puts transparency over white. Scales 16-bit and float grey and does not clip it. Of
    several frames it takes the first. The resampling is antialiased (Pillow widens its filter to the scale).
    """
    Image.init()                                                          # registers the formats that Pillow can read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # Pillow warns of odd metadata and of bombs
            with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenImage(f"{path}: {image.width}x{image.height} is too large")
                image.draft("RGB", (2 * max(size), 2 * max(size)))        # JPEG: decode near the wanted size, quicker
                image = ImageOps.exif_transpose(image)
                image = _to_rgb(image)
                if portrait and image.width < image.height:
                    size = size[::-1]
                image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
                return np.asarray(image)
    except BrokenImage:
        raise
    except Exception as error:                                            # decoders fail in many ways: name the file
        raise BrokenImage(f"{path}: {type(error).__name__}: {error}") from None


def _to_rgb(image):
    """Convert any Pillow mode to RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        # White is 65535 for integers, 1 or 255 for floats, unless the values are larger.
        white = 65535.0 if image.mode != "F" else (1.0 if values.max() <= 1 else 255.0)
        white = max(white, float(values.max()))
        return Image.fromarray((np.clip(values / white, 0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
