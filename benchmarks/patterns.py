"""Why are textures missing? How much of a ground's pattern does a model find in noise, and how much could be found?

    python benchmarks/patterns.py pretrained/glyphs64       three minutes on a core -> results/patterns.json

Diffuse held-out scenes with stripes or rings and predict x_hat. x is the scene, x_flat the same scene without its
pattern. The share found is the slope <x_hat - x_flat, x - x_flat> / |x - x_flat|^2: 1 if all is found, 0 if nothing.

possible   the share that E[x | z] finds if only direction, phase and frequency of the pattern are unknown, on 16 of
           the scenes, by Bayes over 12,000 random patterns. A well-trained model, which does not know letter and
           colours either, finds less. (A poor one may have a larger slope, as it passes noise on.)
"""
import argparse
import itertools
import math

from common import check, save  # first: it puts the project on the path

import numpy as np
import torch

from data import _pattern
from plumbing import UserError
from plumbing.runs import load_run, main_program
from plumbing.settings import Parser
from plumbing.sources import open_run
from schedule import alpha_sigma, diffuse, x_from_v

LEVELS = (-4, -3, -2, -1, 0, 2)
KINDS = ("striped", "ringed")


def found(model, scenes, level):
    """Return the share of the patterns that the model finds. scenes: [(x, x_flat, label, gain), ...]"""
    x, flat, label, _ = (torch.stack(column) for column in zip(*scenes))
    logsnr = torch.full((len(x),), float(level))
    z = diffuse(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), logsnr)
    pattern = x - flat
    return (((x_from_v(z, model(z, logsnr, {"label": label}), logsnr) - flat) * pattern).sum() / pattern.square().sum())


def possible(patterns, scenes, level):
    """Return the share that is found if all but the pattern is known. patterns (K, H W): samples of its prior."""
    alpha, sigma = alpha_sigma(torch.tensor(float(level)))
    product = power = 0.0
    for i, (x, flat, _, gain) in enumerate(scenes):
        y = alpha * (x - flat) + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        # log p(y | pattern) = -|y - alpha gain pattern|^2 / (2 sigma^2), without what all patterns share
        likely = patterns @ (y * gain).sum(0).flatten() * alpha - patterns.square() @ (
            gain.square().sum(0).flatten()) * alpha ** 2 / 2
        mean = (likely / sigma ** 2).softmax(0) @ patterns
        product += (mean.view(x.shape[1:]) * gain * (x - flat)).sum()
        power += (x - flat).square().sum()
    return product / power


def draw_scenes(source, kind, n):
    """Return n scenes of this kind. Frequency 0 makes a pattern flat: phase 0 the middle, +-pi/2 its two ends."""
    at = lambda i, phase: source.image(i, frequency=0, phase=phase)
    chosen = itertools.islice((i for i in range(len(source)) if source.scene(i)["texture"] == kind), n)
    return [(source.image(i), at(i, 0), torch.tensor(source.label(i)), at(i, math.pi / 2) - at(i, -math.pi / 2))
            for i in chosen]


def draw_patterns(kind, size, count=12_000):
    """Draw patterns of this kind as data.Glyphs does: (count, H W), 0 in the middle."""
    rng, (height, width) = np.random.default_rng(0), size
    v, u = ((np.arange(n, dtype=np.float32) + 0.5 - n / 2) / min(size) for n in (height, width))
    draws = zip(rng.uniform(0, math.pi, count), rng.uniform(0, 2 * math.pi, count), rng.uniform(2, 4, count))
    return torch.from_numpy(np.stack([
        _pattern(dict(texture=kind, direction=direction, phase=phase, frequency=frequency), u[None], v[:, None]).ravel()
        for direction, phase, frequency in draws]).astype(np.float32)) - 0.5


@torch.no_grad()
def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of plain scenes with classes, or pretrained/NAME")
    parser.add_argument("--n", type=int, default=48, help="scenes of each kind (default 48)")
    args = parser.parse_args()
    check(args, n=1)
    model, config = load_run(args.run, torch.device("cpu"))
    if config.data != "glyphs" or len(config.sizes) > 1 or config.low_size or config.text_encoder:
        raise UserError(f"{args.run}: want a plain model of glyphs with classes")
    source = open_run(config, held_out=True)
    rows = []
    for kind in KINDS:
        scenes, patterns = draw_scenes(source, kind, args.n), draw_patterns(kind, config.size)
        for level in LEVELS:
            rows.append(dict(kind=kind, logsnr=level, found=found(model, scenes, level).item(),
                             possible=possible(patterns, scenes[:16], level).item()))
            print("{kind:8s} log-SNR {logsnr:3d}  found {found:4.2f}  possible {possible:4.2f}".format(**rows[-1]),
                  flush=True)
    save("patterns.json", torch.device("cpu"), run=args.run, n=args.n, rows=rows)


if __name__ == "__main__":
    main_program(main)
