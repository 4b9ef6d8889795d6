"""Decode any image file safely: all modes, rotations, transparency; no bombs, no programs."""
import warnings

import numpy as np
from PIL import Image, ImageOps


class BrokenImage(Exception):
    """A file that cannot be used as an image; the message says why."""


MAX_PIXELS = 100_000_000                                                  # more than that is a mistake or a bomb


FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "AVIF", "ICO")


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".tga", ".jp2",
            ".avif", ".ico")  # pictures alone: no PDF, no EPS (which runs programs)


def load_image(path, size, portrait=False):
    """Decode with care, scale the short side to fit and crop the middle: uint8 (H, W, 3). Raises BrokenImage.

    portrait: an image that is narrower than tall becomes (W, H, 3) instead.

    EXIF rotation applied; transparency over white; 16-bit and float grey scaled, not clipped; palettes, CMYK and the
    rest by Pillow; of several frames the first. The resampling is antialiased (Pillow widens its filter to the scale).
    """
    Image.init()  # registers what this Pillow can read; quick later
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # Pillow's hints on odd metadata, and on bombs
            with Image.open(path, formats=[f for f in FORMATS if f in Image.OPEN]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BrokenImage(f"{path}: {image.width}x{image.height} is too large")
                image.draft("RGB", (2 * max(size), 2 * max(size)))      # JPEG: decode near the size that is wanted
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
    """Any Pillow mode -> RGB."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float32)
        # White is 65535 for integers, 1 or 255 for floats, unless the values go beyond.
        white = 65535.0 if image.mode != "F" else (1.0 if values.max() <= 1 else 255.0)
        white = max(white, float(values.max()))
        return Image.fromarray((np.clip(values / white, 0, 1) * 255 + 0.5).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
