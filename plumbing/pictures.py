"""Pictures: matplotlib without a screen, sheets of samples, captions, GIFs."""
import math
import os
import unicodedata

import torch
from PIL import Image, ImageDraw, ImageFont, features

from plumbing import UserError
from plumbing.files import whole_file
from plumbing.fonts import drawings, find_font

LABEL_FONT = "DejaVuSans.ttf"                                             # matplotlib's own: many scripts, no Chinese


def pyplot():
    """Return matplotlib.pyplot, set to write files only. It ignores MPLBACKEND, which a notebook may have set."""
    os.environ["MPLBACKEND"] = "Agg"                                      # matplotlib reads it at its import
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    return plt


def show_image(axis, image, title="", **options):
    """Draw an image (3, H, W) in [-1, 1] on a matplotlib axis, without ticks."""
    axis.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy(), **options)
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9)


def save_figure(figure, path, dpi=120):
    """Write a matplotlib figure as PNG and close it. Make its folder if there is none. Raises UserError."""
    figure.tight_layout()
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with whole_file(path) as file:
            figure.savefig(file, dpi=dpi, format=os.path.splitext(path)[1][1:])
    except OSError as error:
        raise UserError(f"cannot write the figure: {error}") from None
    pyplot().close(figure)


def strip(images):
    """Lay the frames of videos (B, 3 T, H, W) side by side: (B, 3, H, T W). Images stay as they are."""
    return torch.cat(images.split(3, 1), -1)


def side_by_side(levels):
    """Put R levels side by side, the lowest at the left, each enlarged to the highest; of a video all its frames.

    levels: [(B, 3 T_r, H_r, W_r), ...], highest first. Return (B, 3, H, R W).
    """
    enlarged = [torch.nn.functional.interpolate(level, levels[0].shape[-2:], mode="nearest") for level in levels]
    return torch.cat(list(map(strip, reversed(enlarged))), -1)


def to_uint8(images):
    """Convert images (B, 3, H, W) in [-1, 1] to uint8 (B, H, W, 3). A video becomes a strip."""
    images = strip(images)
    return ((images.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)


def label(text, number):
    """Return a text as a picture can show it: `number` stands for one with characters that no font of ours has."""
    text = unicodedata.normalize("NFC", text)                             # a Mac writes accents apart
    characters = set("".join(text.split()))
    drawn = characters <= drawings(find_font(LABEL_FONT), characters).keys()
    leftward = any(unicodedata.bidirectional(character) in ("R", "AL") for character in characters)
    return text if drawn and (features.check("raqm") or not leftward) else str(number)          # raqm turns Arabic


def label_font(texts, size):
    """Return a font for these texts: Pillow's own, which draws little but Latin, or one that draws faces and Greek."""
    if all(text.isascii() for text in texts):
        return ImageFont.load_default(size)
    return ImageFont.truetype(find_font(LABEL_FONT), size)


def grid(images, columns, names=None, blocks=1):
    """Arrange images (N, 3, H, W) in rows of `columns` as a Pillow picture. Images below 32 px are enlarged.

    names: a name for each row, written before it. blocks: the rows are split into this many blocks, side by side.
    """
    side = min(images.shape[-2:])
    zoom = max(1, 48 // side) if side < 32 else 1
    tiles = to_uint8(images).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:3]
    rows_a_block, margin = math.ceil(rows / blocks), 0
    if names:
        font = label_font(names, max(10, min(28, height // 3)))
        margin = 12 + max(int(font.getlength(name)) for name in names)
    stride = margin + columns * width + (8 if blocks > 1 else 0)
    sheet = Image.new("RGB", (blocks * stride, rows_a_block * height), "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        block, row = divmod(row, rows_a_block)
        sheet.paste(Image.fromarray(tile), (block * stride + margin + column * width, row * height))
    for row, name in enumerate(names or []):
        block, row = divmod(row, rows_a_block)
        place = (block * stride + margin / 2, (row + 0.5) * height)
        ImageDraw.Draw(sheet).text(place, name, "black", font, anchor="mm")
    return sheet


def captioned(images, columns, captions, blocks=3):
    """Arrange images in rows of `columns` with a caption under each row, `blocks` rows side by side."""
    rows = [grid(row, columns) for row in images.split(columns)]
    width, height = rows[0].size
    font = label_font(captions, max(11, min(24, height // 6)))
    texts = []
    for caption in captions:                                              # break it into lines that fit
        lines = [""]
        for word in caption.split():
            longer = f"{lines[-1]} {word}".strip()
            lines = [*lines[:-1], longer] if font.getlength(longer) <= width or not lines[-1] else [*lines, word]
        texts.append("\n".join(lines))
    below = int((max(text.count("\n") for text in texts) + 1) * font.size * 1.25) + 10
    blocks = min(blocks, len(rows))
    sheet = Image.new("RGB", (blocks * (width + 8) - 8, math.ceil(len(rows) / blocks) * (height + below)), "white")
    for i, (row, text) in enumerate(zip(rows, texts)):
        x, y = i % blocks * (width + 8), i // blocks * (height + below)
        sheet.paste(row, (x, y))
        ImageDraw.Draw(sheet).text((x + width / 2, y + height + 3), text, "black", font, anchor="ma", align="center",
                                   spacing=1)
    return sheet


class Film:
    """The frames of a GIF that shows sampling: at most 40. A cascade shows one stage after the other.

    predictions: how often each stage predicts x.
    """
    last = 2500                                                           # ms that the last frame lasts

    def __init__(self, predictions):
        count = max(2, 40 // len(predictions))                            # frames of a stage
        self.moments = [{round(1 + i * (last - 1) / (count - 1)): [] for i in range(count)} for last in predictions]

    def keep(self, stage, k, z):
        """Keep z (B, 3, H, W) after prediction k of a stage, as bytes, if a frame shows it. Batches come in order."""
        if k in self.moments[stage]:
            self.moments[stage][k].append(((z.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())

    def frames(self, images):
        """Yield the images of all stages for each frame. Finished stages show their result, later stages are grey.

        images: the result of each stage, [(N, 3, H, W), ...].
        """
        for stage, moments in enumerate(self.moments):
            for batches in moments.values():
                yield [*images[:stage], torch.cat(batches) / 127.5 - 1, *map(torch.zeros_like, images[stage + 1:])]


class Playback(Film):
    """The frames of a GIF that plays videos once they are drawn: `count` frames of `width` px, of the highest level."""
    last = 600

    def __init__(self, count, width):
        self.count, self.width = count, width

    def keep(self, stage, k, z):
        """Keep nothing: a video shows its own frames, not how they were drawn."""

    def frames(self, images):
        yield from ([frame] for frame in strip(images[-1]).split(self.width, -1)[-self.count:])


def save_gif(frames, path, last):
    """Write Pillow pictures as a GIF that repeats. Each frame lasts 80 ms, the last one `last` ms."""
    with whole_file(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[80] * (len(frames) - 1) + [last])


def save_picture(picture, path):
    """Write a Pillow picture as PNG."""
    with whole_file(path) as file:
        picture.save(file, "PNG")
