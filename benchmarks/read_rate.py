"""Can the samples of a glyph run be read? And are they as colourful as the data?

    python benchmarks/read_rate.py runs/glyphs [--n 360] [--guidance 3] [--json FILE]

Trains a small classifier on real scenes of the run's own size (a few minutes on two cores; kept in the run's folder,
delete it after a change of data.py), checks it on held-out scenes, draws n samples, an equal
number of each class, with the run's own sampler, and prints the share that is read as the class that was asked for.
Colour is the spread, over images, of the mean colour of an image and of its corners and middle: samples over data.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torch.nn as nn
import torch.nn.functional as F

from config import override
from data import Glyphs, UserError, batches
from runs import choose_device, choose_precision, main_program
from sample import load_run, sample_run


def classifier(classes):
    """(B, 3, 32, 32) -> (B, classes). Larger images are averaged down first."""
    def conv(a, b):
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*conv(3, 32), nn.MaxPool2d(2), *conv(32, 64), *conv(64, 64), nn.MaxPool2d(2), *conv(64, 128),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, classes))


def small(images):
    return F.interpolate(images, (32, 32), mode="area")


def trained_classifier(config, path, steps=700, batch=128):
    """The classifier in evaluation mode and its accuracy on 3600 held-out scenes."""
    torch.manual_seed(0)
    net = classifier(config.num_classes)
    held_out = Glyphs(config.size, config.scenes, config.seed, held_out=True)
    if os.path.exists(path):
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        stream = batches(Glyphs(config.size, config.scenes, config.seed), batch, seed=12345, workers=1)
        optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for step in range(steps):
            b = next(stream)
            x = small(b["image"])
            x = x + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)         # samples are never quite clean
            loss = F.cross_entropy(net(x), b["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            if step % 100 == 0:
                print(f"classifier {step}/{steps}  loss {loss.item():.3f}", flush=True)
        torch.save(net.state_dict(), path)
    net.eval()
    right = 0
    with torch.no_grad():
        for first in range(0, 3600, 100):
            x = torch.stack([held_out.image(i) for i in range(first, first + 100)])
            y = torch.tensor([held_out.label(i) for i in range(first, first + 100)])
            right += (net(small(x)).argmax(1) == y).sum()
    return net, float(right) / 3600


def colour_spread(images):
    """Standard deviation over images (B, 3, H, W) of the colour of five patches (corners and middle), averaged."""
    patches = F.interpolate(images, (5, 5), mode="area")[:, :, [0, 0, 4, 4, 2], [0, 4, 0, 4, 2]]
    return patches.std(0).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=360, help="samples (default 360: ten a class)")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    device, _ = choose_device()
    model, config = load_run(args.run, device)
    if config.data != "glyphs":
        raise UserError(f"{args.run}: trained on {config.data}; the classifier knows glyphs alone")
    given = {"guidance": args.guidance, "sample_steps": args.steps}
    config = override(config, **{k: v for k, v in given.items() if v is not None})
    path = os.path.join(args.run, f"classifier_{config.size[0]}x{config.size[1]}_seed{config.seed}.pt")
    net, accuracy = trained_classifier(config, path)
    print(f"classifier: {accuracy:.1%} of 3600 held-out scenes")
    if accuracy < 0.98:
        raise UserError("the classifier reads less than 98% of real scenes: too poor to judge with")
    labels = [i % config.num_classes for i in range(args.n)]
    start = time.time()
    images = sample_run(model, config, labels, [args.seed * 1_000_003 + i for i in range(args.n)], device,
                        choose_precision(config.precision, device))
    seconds = time.time() - start
    with torch.no_grad():
        read = net(small(images)).argmax(1)
    rate = (read == torch.tensor(labels)).float().mean().item()
    held_out = Glyphs(config.size, config.scenes, config.seed, held_out=True)
    real = torch.stack([held_out.image(i) for i in range(args.n)])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = dict(run=args.run, commit=commit, machine=f"{platform.machine()}, {os.cpu_count()} cores",
                  command=" ".join(["python", *sys.argv]), torch=torch.__version__, n=args.n, seed=args.seed,
                  sampler=config.sampler, steps=config.sample_steps, guidance=config.guidance,
                  classifier_held_out=round(accuracy, 4), read_rate=round(rate, 4),
                  colour_spread=round(colour_spread(images), 4), colour_spread_of_data=round(colour_spread(real), 4),
                  seconds_an_image=round(seconds / args.n, 4))
    wrong = [f"{config.class_names[a]}→{config.class_names[b]}" for a, b in zip(labels, read.tolist()) if a != b]
    print(f"read rate {rate:.1%} of {args.n} "
          f"(guidance {config.guidance:g}, {config.sampler}, {config.sample_steps} steps), "
          f"colour spread {result['colour_spread']:.3f}, of the data {result['colour_spread_of_data']:.3f}, "
          f"{result['seconds_an_image']:.2f} s an image")
    print("read as another: " + (" ".join(wrong) or "none"))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main_program(main)
