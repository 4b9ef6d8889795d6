"""Small measurements for reading/QUESTIONS.md: what to predict, how much the loss scatters, when shapes appear.

    python benchmarks/questions.py                  three minutes on a core -> results/questions.json

targets   three networks learn to predict x, eps or v, for equal steps, each with the plain error of its target. What is
          compared is the error of v that follows, by log-SNR, on scenes that training never shows.
scatter   the loss of v of the weights in pretrained/, batch by batch.
shapes    how near x_hat is to the final image, step by step of the sampler, for coarse structure and for detail.
"""
import argparse
import os

from common import ROOT, check, save  # first: it puts the project on the path

import torch
import torch.nn.functional as F

from config import make_schedule
from data import Glyphs
from dwt import dwt
from plumbing.runs import load_run, main_program
from plumbing.settings import Parser
from sample import sample
from schedule import diffuse, logsnr_shifted, v_from_eps, v_from_x, v_from_x_eps
from uvit import UViT

TARGETS = {"x": v_from_x, "eps": v_from_eps, "v": lambda z, v, logsnr: v}  # (z, prediction, logsnr) -> v
LEVELS = (-6.0, -3.0, 0.0, 3.0, 6.0)


def networks():
    """Build the three networks. A patch of 2 x 2 px has 12 numbers, one of 4 x 4 px has 48."""
    options = dict(num_classes=36, position_std=1.0, transformer_dropout=0.0,
                   logsnr_min=-15 + 1.386, logsnr_max=15 + 1.386)
    return {"U-ViT with skips": UViT((16, 16), 32, 128, (1, 2), (1,), 2, patching="dwt_1", **options),
            "transformer without skips, tokens of 64 for 12": UViT((16, 16), 64, 128, (1,), (), 4, patching="conv_2",
                                                                   **options),
            "transformer without skips, tokens of 32 for 48": UViT((16, 16), 32, 128, (1,), (), 4, patching="conv_4",
                                                                   **options)}


def scenes(first, count):
    source = Glyphs((16, 16), count=first + count)
    indices = range(first, first + count)
    return torch.stack([source.image(i) for i in indices]), torch.tensor([source.label(i) for i in indices])


def schedule(t):
    return logsnr_shifted(t, 16, 32)


def learn(model, target, x, label, steps, batch=16):
    """Train the model on the plain error of its target. All targets see the same images, times and noise."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, 2 * (1 - step / steps))           # falls to 0 over the last half
        i = torch.randint(len(x), (batch,), generator=generator)
        logsnr, eps = schedule(torch.rand(batch, generator=generator)), torch.randn(x[i].shape, generator=generator)
        truth = {"x": x[i], "eps": eps, "v": v_from_x_eps(x[i], eps, logsnr)}[target]
        loss = (model(diffuse(x[i], eps, logsnr), logsnr, {"label": label[i]}) - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@torch.no_grad()
def errors_of_v(model, target, x, label):
    """Return the mean squared error of v at each of LEVELS."""
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    errors = []
    for level in LEVELS:
        logsnr = torch.full((len(x),), level)
        z = diffuse(x, eps, logsnr)
        v = TARGETS[target](z, model(z, logsnr, {"label": label}), logsnr)
        errors.append((v - v_from_x_eps(x, eps, logsnr)).square().mean().item())
    return errors


def targets(steps):
    x, label = scenes(0, 4096)
    held_out = scenes(4096, 256)
    rows = []
    print("error of v at log-SNR " + "".join(f"{level:9g}" for level in LEVELS))
    for name in networks():
        for target in TARGETS:
            torch.manual_seed(0)
            model = networks()[name]
            learn(model, target, x, label, steps)
            errors = errors_of_v(model.eval(), target, *held_out)
            rows.append(dict(network=name, target=target, v_mse=errors))
            print(f"{target:4s} {name:50s} " + " ".join(f"{error:.4f}" for error in errors), flush=True)
    return rows


@torch.no_grad()
def scatter(batches=100, batch=8):
    """Return mean and standard deviation over batches of the loss of v, at random times and at one time."""
    model, config = load_run(os.path.join(ROOT, "pretrained", "glyphs64"), torch.device("cpu"))
    source, generator, losses = Glyphs(config.size), torch.Generator().manual_seed(0), {"random t": [], "t = 0.5": []}
    for first in range(0, batches * batch, batch):
        x = torch.stack([source.image(i) for i in range(first, first + batch)])
        label = torch.tensor([source.label(i) for i in range(first, first + batch)])
        eps, u = torch.randn(x.shape, generator=generator), torch.rand(batch, generator=generator)
        for name, t in (("random t", u), ("t = 0.5", torch.full((batch,), 0.5))):
            logsnr = make_schedule(config)(t)
            v = model(diffuse(x, eps, logsnr), logsnr, {"label": label})
            losses[name].append((v - v_from_x_eps(x, eps, logsnr)).square().mean())
    found = {name: dict(mean=torch.stack(values).mean().item(), sd=torch.stack(values).std().item())
             for name, values in losses.items()}
    for name, value in found.items():
        print(f"loss of v in batches of {batch}, {name}: {value['mean']:.3f}, standard deviation {value['sd']:.3f}")
    return found


@torch.no_grad()
def shapes():
    """Return for each step of the sampler the share of the final image that x_hat still lacks: coarse, and detail."""
    model, config = load_run(os.path.join(ROOT, "pretrained", "glyphs64"), torch.device("cpu"))
    steps, found = config.sample_steps, []
    final = sample(model, make_schedule(config), {"label": torch.arange(36)}, (3, *config.size), range(36), steps,
                   config.sampler, config.guidance, on_step=lambda k, z, x_hat: found.append(x_hat))
    coarse, detail = lambda x: F.avg_pool2d(x, 8), lambda x: dwt(x, 1)[:, 3:]
    lacks = lambda part, x: ((part(x) - part(final)).square().mean() / part(final).square().mean()).item()
    rows = [dict(t=(steps - k) / steps, logsnr=make_schedule(config)(torch.tensor((steps - k) / steps)).item(),
                 coarse=lacks(coarse, x), detail=lacks(detail, x)) for k, x in enumerate(found)]
    for row in rows:
        print("t {t:.2f}  log-SNR {logsnr:6.2f}  lacks of coarse {coarse:6.1%}, of detail {detail:6.1%}".format(**row))
    return rows


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="training steps of a network (default 500)")
    args = parser.parse_args()
    check(args, steps=1)
    results = dict(steps=args.steps, targets=targets(args.steps), scatter=scatter(), shapes=shapes())
    save("questions.json", torch.device("cpu"), **results)


if __name__ == "__main__":
    main_program(main)
