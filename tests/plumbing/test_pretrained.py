"""The weights in pretrained/: small enough, and they draw letters that can be read."""
import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import CHARACTERS, Glyphs
from plumbing.fonts import glyph_tile
from plumbing.runs import load_run
from plumbing.sampling import DEFAULT, image_seeds, make_conditions
from plumbing.weights import LARGEST
from programs import ROOT, program_here
from sample import sample_run

NAMES = sorted(os.listdir(os.path.join(ROOT, "pretrained")))


def read_letters(x):
    """Read the characters of images (B, 3, 64, 64) by comparison with drawn ones: numbers (B,). Nothing is learnt.

    Colours are brought to one axis, the one of largest variance. Each font's characters are tried upright and tilted.
    """
    tiles = [glyph_tile(font, character, 64).rotate(angle)
             for font, _ in Glyphs().fonts for character in CHARACTERS for angle in (-11, 0, 11)]
    shapes = torch.stack([torch.from_numpy(np.asarray(tile.convert("L"), np.float32)) for tile in tiles])[:, None]
    unit = lambda a: F.normalize(a - a.mean(-1, keepdim=True), dim=-1)
    shapes = unit(F.avg_pool2d(shapes, 4).flatten(1))                     # (K, 256)
    x = F.avg_pool2d(x, 4).flatten(2)                                     # (B, 3, 256)
    axis = torch.linalg.svd(x - x.mean(2, keepdim=True), full_matrices=False).Vh[:, 0]
    return (unit(axis) @ shapes.T).abs().argmax(1) // 3 % len(CHARACTERS)


def test_the_reader_reads_real_scenes():
    scenes = Glyphs()
    x = torch.stack([scenes.image(i) for i in range(144)])
    right = read_letters(x) == torch.arange(144) % 36
    assert right.float().mean() > 0.93
    assert (read_letters(x.flip(3)) == torch.arange(144) % 36).float().mean() < 0.6             # mirrored letters


def test_the_weights_are_small():
    sizes = [os.path.getsize(os.path.join(ROOT, "pretrained", name, "weights.pt")) for name in NAMES]
    assert max(sizes) <= LARGEST and sum(sizes) <= 30_000_000


def test_the_first_picture_shows_letters(tmp_path):
    """`python sample.py`, in fewer steps. Kills: weights of another network; noise; classes in another order."""
    done = program_here("sample.py", "--steps", 8, "--seed", 3, "--out", tmp_path / "first.png")
    assert done.returncode == 0, done.stderr
    assert "first.png" in done.stdout and "next: python" in done.stdout
    sheet = torch.from_numpy(np.array(Image.open(tmp_path / "first.png").convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    images = sheet.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).flatten(0, 1)     # (36, 3, 64, 64)
    assert len(images) == 36 and (read_letters(images) == torch.arange(36)).float().mean() > 0.8


@pytest.mark.parametrize("name", [name for name in NAMES if name != DEFAULT])                    # the first picture's
def test_every_other_model_draws_its_letters(name):
    """Eight steps at most, which is quick. Kills: weights that are damaged, or of another version of the network; a
    folder of the machine that trained."""
    device = torch.device("cpu")
    model, config = load_run(os.path.join(ROOT, "pretrained", name))
    assert not os.path.isabs(config.grow_from or config.init_from)
    config = dataclasses.replace(config, sample_steps=min(8, config.sample_steps))
    captions = [f"a white {character} on blue" for character in CHARACTERS] if config.text_encoder else None
    cond = make_conditions(config, list(range(36)), device, captions)
    images = sample_run(model, config, cond, image_seeds(0, 36), device, "float32")
    assert (read_letters(images) == torch.arange(36)).float().mean() > 0.75
