"""Folders of images: which files are listed, how any file is decoded, what the stream and its workers do with them."""
import itertools
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data as D
from plumbing import UserError, images, workers
from programs import program


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
    """Return the colour in the middle of a file's 16 x 16 image, 0 to 255."""
    i = [os.path.basename(f) for f in source.files].index(name)
    return ((source.image(i)[:, 8, 8] + 1) * 127.5).round().tolist()


# ---- listing

def test_links_do_not_take_the_place_of_the_folder_itself(tmp_path):
    """Kills: a folder read through a link that sorts before it, so that the link's name becomes the class."""
    (tmp_path / "z").mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "z" / "1.png")
    os.symlink(tmp_path / "z", tmp_path / "a")
    source = D.ImageFolder(tmp_path)
    assert source.classes == ("z",) and len(source) == 1
    assert source.skipped == [(str(tmp_path / "a"), "a link to a folder already read")]


def test_empty_folder_is_the_users_mistake(tmp_path):
    """Kills: a traceback, or a run of no images."""
    with pytest.raises(UserError, match="no image"):
        D.ImageFolder(tmp_path, (8, 8))


def test_no_class_vanishes_without_a_word(tmp_path):
    """Windows saves a JPEG as .jfif, a telephone as .HEIC. Kills: a list of suffixes shorter than Pillow's; files and
    classes that are left out and not named."""
    for name, kind in (("cat/1.jfif", "JPEG"), ("cat/2.JPE", "JPEG"), ("cow/1.pnm", "PPM"), ("cow/2.apng", "PNG")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format=kind)
    for name in ("dog/1.HEIC", "dog/2.heic", "cat/3.psd", "bird/notes", ".hidden/1.heic", "cat/1.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("?")
    source = D.ImageFolder(tmp_path, (8, 8))
    assert source.classes == ("cat", "cow") and len(source) == 4
    named = {os.path.relpath(path, tmp_path): why for path, why in source.skipped}
    assert set(named) == {"**/*.heic", "**/*.psd", "dog", "bird"} and named["**/*.heic"].startswith("2 of a format")
    with pytest.raises(UserError, match=r"no image in this folder \(1 skipped, as .*\*.heic: 2 of a format"):
        D.ImageFolder(tmp_path / "dog")


# ---- decoding

def test_folder_decodes_with_care(folder):
    """Kills: 16-bit grey clipped to white, hidden colour under transparency, EXIF ignored, a pipe that blocks."""
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


GREY = np.tile(np.linspace(0, 250, 64).astype(np.uint8), (64, 1))         # its mean is 125


@pytest.mark.parametrize("values, mean", [
    (GREY.astype(np.int32), 125), (GREY.astype(np.uint16), 125), (GREY.astype(np.float32), 125),
    (GREY.astype(np.uint16) * 4, 125), (GREY.astype(np.uint16) * 16, 125), (GREY.astype(np.uint16) * 64, 125),
    (GREY.astype(np.uint16) * 257, 125), ((GREY > 125).astype(np.uint16), 127.5),
    (GREY / np.float32(255), 125), (GREY / np.float32(250) * np.float32(1.004), 127.5),
    (GREY / np.float32(255) * np.float32(4), 220), (GREY / np.float32(127.5) - 1, 125)])
def test_grey_is_as_bright_as_it_was_meant(tmp_path, values, mean):
    """8 to 16 bits, masks, the scales 0 to 1 and -1 to 1, overshoot, highlights: a file does not say which it holds.

    Kills: white fixed for all integers; a maximum of 1.004 taken for a dark picture of 0 to 255."""
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert images.load_image(str(tmp_path / "a.tif"), (64, 64)).mean() == pytest.approx(mean, abs=3)


def test_grey_with_holes_is_skipped_by_name(tmp_path):
    """Kills: one NaN that makes all of an image black."""
    for bad in (np.nan, np.inf):
        values = GREY / np.float32(255)
        values[0, 0] = bad
        Image.fromarray(values).save(tmp_path / "a.tif")
        with pytest.raises(images.BrokenImage, match="a.tif: .*1 of 4,096 pixels are NaN or infinite"):
            images.load_image(str(tmp_path / "a.tif"), (64, 64))


def test_what_comes_out_black_is_skipped_by_name(tmp_path):
    """12 bits in colours of 16, of which Pillow keeps the upper 8. Kills: black pictures learnt without a word."""
    rows = (b"\0" + struct.pack(">H", 4095) * 3 * 8) * 8
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    with open(tmp_path / "a.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in chunks:
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))
    Image.fromarray(np.full((8, 8), 0.01, np.float32)).save(tmp_path / "b.tif")
    for name in ("a.png", "b.tif"):
        with pytest.raises(images.BrokenImage, match=f"{name}: comes out black"):
            images.load_image(str(tmp_path / name), (8, 8))


def test_odd_metadata_do_not_cost_a_good_picture(tmp_path):
    """Kills: Pillow's limit of 1 MB for text in a PNG; an EXIF that cannot be read, or cannot be written back; an
    orientation lost with it."""
    picture = Image.new("RGB", (20, 40), (0, 0, 255))
    picture.paste((255, 255, 0), (0, 0, 20, 20))                          # yellow above blue ...
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("more", "x" * 3_000_000, zip=True)
    exif = picture.getexif()
    exif[0x0112] = 3                                                      # ... to be shown upside down
    good = exif.tobytes()
    odd = b"Exif\0\0II*\0" + struct.pack("<IHHHIIHHI4sI", 8, 2, 0x0112, 3, 1, 3, 0x011A, 2, 4, b"many", 0)
    for name, raw, top in (("text.png", None, 255), ("garbage.png", b"garbage", 255), ("cut.png", good[:20], 255),
                           ("cut.jpg", good[:14], 255), ("odd.png", odd, 0), ("odd.jpg", odd, 0)):
        options = dict(pnginfo=info) if name == "text.png" else dict(exif=raw)
        picture.save(tmp_path / name, **options)
        assert images.load_image(str(tmp_path / name), (40, 20))[4, 10, 0] == pytest.approx(top, abs=3), name


HUGE = """
import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
from plumbing import images
import data
for path in sys.argv[2:]:
    if os.fork():                                                         # each picture in a process of its own
        os.wait()
        continue
    try:
        picture = images.load_image(path, (32, 32))
        print(os.path.basename(path), *picture[16, 4].tolist(), *picture[16, 28].tolist())
    except images.BrokenImage as error:
        print(error)
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1], flush=True)
    os._exit(0)
"""


def halves(mode, width, height):
    """A picture that is red at the left and blue at the right; in grey: black and white."""
    left, right = {"RGB": ((255, 0, 0), (0, 0, 255)), "RGBA": ((255, 0, 0, 255), (0, 0, 255, 255)), "L": (0, 255),
                   "1": (0, 1), "LA": ((0, 255), (255, 255))}[mode]
    picture = Image.new(mode, (width, height), left)
    picture.paste(right, (width // 2, 0, width, height))
    return picture


LARGE = [("rgb.png", "RGB", (10000, 9999), False), ("grey.png", "L", (10000, 9999), True),
         ("7k_a.png", "RGBA", (7400, 7300), True),
         ("a.jpg", "RGB", (10000, 9999), True), ("progressive.jpg", "RGB", (8000, 8000), True),
         ("444.jpg", "RGB", (10000, 9999), False), ("a.webp", "RGB", (9000, 9000), False),
         ("b.webp", "RGB", (4000, 3000), True),
         ("b.tif", "RGB", (5600, 5500), True),
         ("thin.png", "L", (90_000_000, 1), True)]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux")
def test_no_image_takes_half_a_gigabyte(tmp_path):
    """Small files of many pixels: read in less than 500 MB, PyTorch included, or refused by name. Kills: a limit on
    pixels alone, whatever Pillow needs for one; a second copy of a large picture; one that is read wrongly."""
    options = {"progressive.jpg": dict(progressive=True), "444.jpg": dict(progressive=True, subsampling=0),
               "b.tif": dict(compression="tiff_lzw"), "a.webp": dict(method=0), "b.webp": dict(method=0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, mode, size, _ in LARGE:
            halves(mode, *size).save(tmp_path / name, **options.get(name, {}))
    done = program("data.py", *(tmp_path / name for name, *_ in LARGE), launcher=("-c", HUGE), timeout=200)
    assert done.returncode == 0, done.stderr
    said_and_peak = iter(done.stdout.strip().split("\n"))
    for (name, mode, size, good), said, peak in zip(LARGE, said_and_peak, said_and_peak, strict=True):
        assert int(peak) < 500 * 1024, (name, peak)
        if not good:
            assert f"{name}: {size[0]}x{size[1]} is too large" in said, said
        elif name != "thin.png":
            wanted = [255, 0, 0, 0, 0, 255] if mode.startswith("RGB") else [0, 0, 0, 255, 255, 255]
            assert [int(value) for value in said.split()[1:]] == pytest.approx(wanted, abs=6), said


def test_a_large_image_is_averaged_and_not_moved(tmp_path, monkeypatch):
    """The way of large images gives what the usual way gives, up to the rounding of the average. Kills: tiles that are
    put beside their places; a turn that is lost or made twice; a middle that moves; white guessed tile by tile."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((3000, 2200), Image.Resampling.BICUBIC)
    exif = smooth.getexif()
    exif[0x0112] = 6
    smooth.save(tmp_path / "a.png", exif=exif, compress_level=1)
    smooth.convert("RGBA").save(tmp_path / "b.png", compress_level=1)
    smooth.convert("L").resize((200, 3001)).save(tmp_path / "c.png")
    Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 100).save(tmp_path / "d.png", compress_level=1)
    for name, size in itertools.product("abcd", ((32, 32), (24, 40), (40, 24))):
        monkeypatch.setattr(images, "LARGE", 2 ** 24)
        usual = images.load_image(str(tmp_path / f"{name}.png"), size, portrait=True)
        monkeypatch.setattr(images, "LARGE", 2 ** 14)
        large = images.load_image(str(tmp_path / f"{name}.png"), size, portrait=True)
        assert large.shape == usual.shape
        assert np.abs(large[1:-1, 1:-1].astype(int) - usual[1:-1, 1:-1]).mean() < 7, (name, size)         # moved: 17


def test_hidden_pictures_are_named(tmp_path):
    """A Mac puts ._a.png beside a.png. Kills: a picture that is left out without a word; a line for each of them."""
    for name in ("a.png", "._a.png", "._b.JPG", ".c.png", ".DS_Store"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    source = D.ImageFolder(tmp_path, (8, 8))
    assert len(source) == 1
    assert source.skipped == [(str(tmp_path / "._a.png"),
                               "a hidden file, as its name begins with a dot, and 2 more of them")]


def test_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    """A small file can hold an image of many gigabytes. Kills: no limit; a size that is checked after decoding."""
    Image.new("L", (300, 300)).save(tmp_path / "big.png")
    os.truncate(tmp_path / "big.png", 60)                                 # its size is there, its pixels are not
    monkeypatch.setattr(images, "MAX_PIXELS", 80_000)
    with pytest.raises(images.BrokenImage, match="300x300 is too large"):
        images.load_image(str(tmp_path / "big.png"), (16, 16))


def test_resizing_is_antialiased_and_keeps_proportions(tmp_path):
    """Stripes of one pixel average to grey. A wide image is cropped.

    Kills: a stride or plain bilinear sampling; squeezing."""
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "s.png")
    assert np.abs(images.load_image(str(tmp_path / "s.png"), (16, 16)).astype(int) - 127).max() <= 3
    wide = np.zeros((20, 100, 3), np.uint8)
    wide[:, 40:60] = 255
    Image.fromarray(wide).save(tmp_path / "w.png")
    assert images.load_image(str(tmp_path / "w.png"), (20, 20)).min() == 255


# ---- the stream and its workers

def test_stream_replaces_and_names_broken_files(folder):
    """Kills: a broken file that ends the run, leaves a hole in the batch or goes unnamed."""
    stream = D.Stream(D.ImageFolder(folder, (16, 16)), seed=0)
    examples = [stream[k] for k in range(22)]                             # two epochs of eleven files
    assert all(e["image"].shape == (3, 16, 16) for e in examples)
    named = {message.split(":")[0].split("/")[-1] for e in examples for message in e["broken"]}
    assert named == {"y_cut.jpg", "z_text.png"}


def test_what_the_workers_are_sent_can_be_sent():
    """Where processes are not forked (macOS, Windows), all this travels by pickle. Kills: a cache or lambda in it."""
    stream = D.Stream(D.Glyphs((16, 16)), seed=3, flip=True)
    copy, collate, init = pickle.loads(pickle.dumps((stream, D.collate, workers._heed_parent_only)))
    assert torch.equal(copy[7]["image"], stream[7]["image"])
