"""How good are the samples? The field's own measures, offline: FID, IS, precision and recall, bits per dimension.

Paper: simple diffusion, section 5 (FID against the training set and against held-out data, IS, the guidance sweep of
table 9); section 2 and Kingma et al. 2021 for the variational bound.
Read before: sample.py, measures.py (the definitions), features.py (what they are measured with).

    python evaluate.py runs/glyphs64                           every measure -> a table and RUN/evaluation.json
    python evaluate.py runs/glyphs64 runs/glyphs64_unet        side by side, and runs/comparison.png
    python evaluate.py runs/glyphs64 --n 500 --sweep guidance=1,1.05,1.1,1.2,1.4,1.8,2,3
    python evaluate.py runs/glyphs16 runs/glyphs64_sr --handoff renoised --sweep s=0,0.1,0.2,0.3,0.5,0.7,0.9
    python evaluate.py runs/photos --features inception.pt     FID proper, by a network that you have
    python evaluate.py runs/photos --metrics none --export samples.npz

Every figure is of the set of samples as 8-bit images, with the averaged weights; samples and references are kept, so a
second question about the same run costs no second sampling.
"""
import argparse
import inspect
import json
import math
import os
import platform
import re
import sys
import time

import numpy as np
import torch
from PIL import Image

import cascade
import dwt
import nested_unet
import sample
import schedule
import text
import unet
import uvit
from cascade import HANDOFFS, hand_over
from plumbing.settings import Parser, add_fields, override
from config import make_low_schedule, make_schedule
from plumbing.images import BrokenImage
from data import Glyphs, Stream, open_run
from plumbing import UserError
from plumbing.features import (GlyphFeatures, Yardstick, described, fingerprint, kept, moments_of, scene_answers,
                               scene_colours, write)
from measures import (Moments, bootstrap, frechet_distance, histogram_distance, inception_score, precision_recall,
                      variational_bound)
from plumbing.runs import (choose_device, choose_precision, ema_model, kept_checkpoints, made_by, main_program,
                           progress, read_checkpoint)
from plumbing.sampling import OVERRIDES, check_chain, check_levels, check_student, conditions_of, words_of
from sample import handoff_noise, image_seeds, sample_run, seed_of
from plumbing.pictures import grid, to_uint8
from plumbing.t5 import Encoder, check_moved
from train import real_low_res


# ------------------------------------------------------------------------------------------ the samples of a run

def drawn_samples(run, model, config, labels, seed, device, lower=None, captions=None):
    """dict(images uint8 (n, H, W, 3), seconds): what the run's folder holds already, the rest drawn and kept.

    captions: one a sample, for a model with text; the labels are then what is kept with the samples, no more.
    lower: for a super-resolution model (what its low-res images are, as things to fingerprint; give), give(part) ->
    (low_res, aug_logsnr) of that slice of the samples.
    """
    n, precision = len(labels), choose_precision(config.precision, device)
    settings = (config.sampler, config.sample_steps, config.guidance, config.noise_param, config.clip_x, precision)
    weights = (p.detach().cpu().flatten().view(torch.uint8).numpy().tobytes() for p in model.parameters())
    code = (inspect.getsource(module) for module in (sample, schedule, dwt, unet, uvit, nested_unet, cascade, text))
    # Of other captions, or of more of them, other samples.
    name = fingerprint(*weights, *code, settings, device.type, config.size, seed, captions,
                       *(lower[0] if lower else ()))
    path = os.path.join(run, f"samples-{name}.pt")                        # any of these changed: another file
    have = kept(path, lambda: {"images": torch.zeros(0, *config.size, 3, dtype=torch.uint8), "seconds": 0.0,
                               "labels": torch.zeros(0, dtype=torch.long)})
    k = len(have["labels"])
    if have["labels"][:n].tolist() != labels[:k]:                         # other labels than now: of no use
        have, k = dict(have, images=have["images"][:0], labels=have["labels"][:0], seconds=0.0), 0
    encoder = Encoder(config, device, cached=True) if config.text_encoder and k < n else None
    while k < n:
        part, start = slice(k, min(n, k + 256)), time.time()
        seeds = image_seeds(seed, part.stop - k, k)
        last = config.sample_steps

        def on_step(first, step, z, k=k):
            progress(f"{os.path.basename(run.rstrip('/'))}: drawing samples", k + first + len(z) * step // last, n)

        cond = conditions_of(config, labels[part], device, captions and captions[part], encoder=encoder)
        if lower:
            (cond["low_res"], cond["aug_logsnr"]), seeds = lower[1](part), [seed_of(i, 1) for i in seeds]
        images = sample_run(model, config, cond, seeds, device, precision, on_step)
        wrong = ~torch.isfinite(images).flatten(1).all(1)
        if wrong.any():
            raise UserError(f"{run}: sample {k + int(wrong.nonzero()[0])} holds values that are not finite; "
                            "nothing can be measured")
        have = dict(images=torch.cat([have["images"], to_uint8(images)]), seconds=have["seconds"] + time.time() - start,
                    labels=torch.tensor(labels[:part.stop]))
        write(have, path)
        k = part.stop
    return dict(images=have["images"][:n], seconds=have["seconds"] * n / max(1, len(have["labels"])), name=name)


def lower_stage(below, high, labels, seed, device, handoff, s):
    """`lower` of drawn_samples for the stage above. below: (run, model, config) of the stage that makes the low-res
    images, or a source of real images to average down in their place."""
    schedule = make_low_schedule(high)

    def handed(low_res, part):
        seeds = image_seeds(seed, part.stop - part.start, part.start)
        return hand_over(low_res, handoff, s, schedule, handoff_noise(low_res.shape, seeds, 1))

    if not isinstance(below, tuple):
        handoff = "renoised" if handoff == "truncated" else handoff       # nothing is sampled, so nothing is stopped
        # Of drawn scenes others than those that the samples are compared with.
        real = real_low_res(below, high, labels, first=len(below) // 2 if isinstance(below, Glyphs) else 0)
        return ("real", fingerprint(real.numpy().tobytes()), handoff, s), lambda part: handed(real[part], part)
    run, model, config = below
    if handoff == "truncated" and s:
        precision = choose_precision(config.precision, device)

        def stopped(part):
            cond = conditions_of(config, labels[part], device)
            seeds = image_seeds(seed, part.stop - part.start, part.start)
            return handed(sample_run(model, config, cond, seeds, device, precision, stop=s), part)
        weights = fingerprint(*(p.detach().cpu().numpy().tobytes() for p in model.parameters()))
        settings = (config.sampler, config.sample_steps, config.guidance, config.noise_param, config.clip_x, precision)
        return (weights, *settings, device.type, handoff, s), stopped
    drawn = drawn_samples(run, model, config, labels, seed, device)       # once, whatever s: the reason for "renoised"
    images = drawn["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    return (drawn["name"], handoff, s), lambda part: handed(images[part], part)


# ------------------------------------------------------------------------------------------ the measures of one set

def distances(a, b):
    """Euclidean, exactly: (N, D), (M, D) -> (N, M). The quick way, by a matrix product, finds copies 0.03 apart."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


METRICS = ("fd", "is", "read", "words", "pr", "style", "bits", "memory")
READS = 0.98                                                              # a worse reader judges nobody


def figures(set_, labels, yardstick, metrics, images=None, answers=None):
    """The figures of a described set of samples (or of real images in their place).

    images, answers: for captions of scenes, the images themselves and [(letter, ground), ...] the colours asked for.
    `_pm`: half a 95 % interval; for the inception score, as the field does, one standard deviation over ten parts.
    """
    result, n = {}, len(labels)
    colours = yardstick.held_out or yardstick.train
    features = set_.get("features")
    if "fd" in metrics and features is not None:
        times = 100 if features.shape[1] <= 256 else 20
        for which, real in (("train", yardstick.train), ("held_out", yardstick.held_out)):
            if real is not None:
                real = moments_of(real)
                result[f"fd_{which}"] = frechet_distance(real, moments_of(set_))
                result[f"fd_{which}_pm"] = bootstrap(
                    lambda i: frechet_distance(real, Moments(features[i])), n, times)
    if "is" in metrics and "character" in set_:
        result["is"], result["is_pm"] = inception_score(set_["character"])
    if "read" in metrics and isinstance(yardstick.features, GlyphFeatures) and min(labels) >= 0:
        if yardstick.features.accuracy >= READS:
            right = (set_["character"].argmax(1) == torch.tensor(labels)).double()
            result["read_rate"] = right.mean().item()
            result["read_rate_pm"] = bootstrap(lambda i: right[i].mean().item(), n, 1000)
    if "words" in metrics and answers:
        asked = torch.tensor(answers).T
        rights = [(seen == wanted).double() for seen, wanted in zip(scene_colours(images), asked)]
        rights = dict(letter_colour=rights[0], ground_colour=rights[1])
        if "read_rate" in result:
            rights["all_right"] = right * rights["letter_colour"] * rights["ground_colour"]
        for name, values in rights.items():
            result[name] = values.mean().item()
            result[name + "_pm"] = bootstrap(lambda i: values[i].mean().item(), n, 1000)
    if "pr" in metrics and features is not None:
        real = colours["features"]
        k = min(5000, len(real), n)                                       # manifolds of equal numbers
        if k > 3:
            result["precision"], result["recall"] = precision_recall(real[:k], features[:k])
    if "style" in metrics:
        result["colour_distance"] = histogram_distance(set_["colours"], colours["colours"])
        result["colour_spread"] = (set_["spread"] / colours["spread"]).item()
        if isinstance(yardstick.features, GlyphFeatures):
            for head in ("texture", "letter", "ground", "style"):
                counts = [torch.bincount(s[head].argmax(1), minlength=s[head].shape[1]).double()
                          for s in (set_, colours)]
                result[f"{head}_distance"] = histogram_distance(*counts)
    new = yardstick.real or yardstick.held_out                            # images that nobody can have copied
    if "memory" in metrics and features is not None and new is not None:
        nearest = distances(features, yardstick.train["features"]).amin(1).mean()
        usual = distances(new["features"], yardstick.train["features"]).amin(1).mean()
        if usual > 0:                                                     # 0: the held-out ones are copies themselves
            result["nearest_ratio"] = (nearest / usual).item()
    return result


def has_bits(config):
    """Is there a bound on the likelihood of the images alone, at all times t?"""
    return not (config.outer_channels or config.low_size or config.distilled_from)


def likelihood(model, config, yardstick, n, seed, device, source=None):
    """variational_bound over n images, each of its figures gathered. source: of which; if not said, unseen ones (seen
    ones if there are no others)."""
    if source is None:
        source = yardstick.unseen if yardstick.unseen is not None else yardstick.source
    images, labels, captions = [], [], []
    for i in Stream(source, seed).order(0):
        if len(images) < n:
            try:
                images.append(source.image(int(i)))
                labels.append(source.label(int(i)))
                captions.append(source.caption(int(i)))
            except BrokenImage:
                continue
    if len(images) < 2:
        raise UserError(f"{config.data}: {len(images)} image(s) that can be read; bits per dimension want 2 or more")
    if tuple(source.classes) != config.class_names:                       # a held-out folder need not have the classes
        labels = [-1] * len(images)
    encoder = Encoder(config, device, cached=source is yardstick.source) if config.text_encoder else None
    generator, parts = torch.Generator().manual_seed(seed), []
    for first in range(0, len(images), 16):
        x = torch.stack(images[first:first + 16]).to(device)
        cond = {"label": torch.tensor(labels[first:first + 16], device=device)}
        cond = encoder(captions[first:first + 16]) if encoder else cond
        with torch.no_grad():
            part = variational_bound(model, x, cond, make_schedule(config), generator=generator)
        parts.append({name: value.cpu() for name, value in part.items()})
        progress("bits per dimension", first + len(x), len(images))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ------------------------------------------------------------------------------------------ pictures

def _plots():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw_loss_by_logsnr(bound, path, bins=24):
    """Where in the schedule the model is weak: the error of eps and of v against log-SNR."""
    plt = _plots()
    logsnr = bound["logsnr"].flatten()
    edges = torch.linspace(logsnr.min(), logsnr.max(), bins + 1)
    which = torch.bucketize(logsnr, edges[1:-1])
    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for key, name in (("eps_mse", "ε"), ("v_mse", "v")):
        values = [bound[key].flatten()[which == b] for b in range(bins)]
        inhabited = [b for b in range(bins) if len(values[b])]
        middle = ((edges[1:] + edges[:-1]) / 2)[inhabited]
        axis.plot(middle, [values[b].mean() for b in inhabited], "o-", markersize=3, label=f"error of {name}")
    axis.set(xlabel="log-SNR λ  (clean →)", ylabel="error", yscale="log",
             title="Loss by log-SNR: half the area under ε's curve is the bound's diffusion term, in nats")
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_nearest(images, features, yardstick, path, pairs=24):
    """The samples nearest to a training image, each with that image at its right."""
    distance, nearest = distances(features, yardstick.train["features"]).min(1)
    closest = distance.argsort()[:pairs]
    tiles = []
    for i in closest.tolist():
        tiles.append(images[i].permute(2, 0, 1).float() / 127.5 - 1)
        tiles.append(yardstick.source.image(int(yardstick.train["indices"][nearest[i]])))
    grid(torch.stack(tiles), 8).save(path)


def draw_comparison(rows, curves, path, a_run=12):
    """A row of samples for each run; below, where checkpoints were kept, the distance against images seen."""
    plt = _plots()
    figure, axes = plt.subplots(len(rows) + bool(curves), figsize=(9, 1.0 * len(rows) + (3 if curves else 0)),
                                height_ratios=[1] * len(rows) + [3] * bool(curves), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows):
        axis.imshow(np.asarray(grid(images[:a_run].permute(0, 3, 1, 2).float() / 127.5 - 1, a_run)))
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    for name, points in curves:
        axes[-1, 0].plot(*zip(*points), marker="o", label=name)
    if curves:
        axes[-1, 0].set(xlabel="images seen", ylabel="Fréchet distance, train", yscale="log")
        axes[-1, 0].grid(alpha=0.3, which="both")
        axes[-1, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_sweep(field, rows, path):
    """Table 9 as a picture: distance against inception score (or against the setting where there is no score)."""
    plt = _plots()
    figure, axis = plt.subplots(figsize=(5.6, 4))
    if all("is" in row for row in rows):
        x, label = [row["is"] for row in rows], "inception score"
    else:
        x, label = range(len(rows)), field
    y = [row["fd_train"] for row in rows]
    axis.plot(x, y, marker="o")
    for a, b, row in zip(x, y, rows):
        axis.annotate(f"{row[field]}", (a, b), textcoords="offset points", xytext=(5, 5), fontsize=8)
    axis.set(xlabel=label, ylabel="Fréchet distance, train", title=f"sweep of {field}")
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ the program

TABLE = (("fd_train", "{name} against train"), ("fd_held_out", "{name} against held-out"),
         ("is", "inception score (± 1 s.d. of 10 parts)"), ("read_rate", "read rate"),
         ("letter_colour", "colour of the letter right"), ("ground_colour", "colour of the ground right"),
         ("all_right", "letter and both colours right"), ("precision", "precision"), ("recall", "recall"),
         ("colour_distance", "colours: distance of histograms"), ("colour_spread", "colours: spread, share of data's"),
         ("texture_distance", "textures: distance"), ("letter_distance", "letter colours: distance"),
         ("ground_distance", "ground colours: distance"), ("style_distance", "letter styles: distance"),
         ("bits_per_dim", "bits per dimension, at most"), ("nearest_ratio", "nearest training image, 1 = as unseen"))
SETTINGS = {"steps": "sample_steps", "guidance": "guidance", "noise_param": "noise_param", "sampler": "sampler",
            "clip_x": "clip_x"}


def parse():
    parser = Parser(prog="evaluate.py", description="Measure the samples of one run or compare several.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs")
    parser.add_argument("--n", type=int, default=2000, help="samples (default 2000; the papers use 50,000)")
    parser.add_argument("--n-real", type=int, default=10_000, help="training and held-out images (default 10000)")
    parser.add_argument("--n-bits", type=int, default=128, help="images for bits per dimension (default 128)")
    parser.add_argument("--metrics", default="all", help=f"all, none, or some of {','.join(METRICS)}")
    parser.add_argument("--features", metavar="FILE", help="TorchScript Inception: then it is FID")
    parser.add_argument("--held-out", metavar="FOLDER", help="images never trained on (drawn scenes need none)")
    parser.add_argument("--export", metavar="FILE", help="write the samples as the ADM suite reads them (.npz, arr_0)")
    parser.add_argument("--export-png", metavar="DIR", help="write the samples as PNG files")
    parser.add_argument("--sweep", metavar="F=V,V", help=f"one row a value, F one of {', '.join(SETTINGS)}; "
                        "of a cascade s, or one of these for its upper stage")
    parser.add_argument("--handoff", choices=HANDOFFS, help="the runs are the two stages of a cascade, the lower first")
    parser.add_argument("--s", type=float, help="of a cascade: noise of the handoff, from 0, less than 1")
    parser.add_argument("--curve", action="store_true", help="also of the checkpoints that --keep-every kept")
    parser.add_argument("--steps", type=int, dest="sample_steps", default=argparse.SUPPRESS,
                        help="network evaluations an image (default: the run's)")
    parser.add_argument("--seed", dest="first_seed", type=int, default=0, help="of the samples (default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add_fields(parser, OVERRIDES, "settings of the run to override; of a cascade one, or one a stage: --guidance 5,1")
    (words, stages), (low_words, _) = (words_of(sys.argv[1:], stage) for stage in (1, 0))
    args, low = parser.parse_args(words), parser.parse_args(low_words)
    if stages - ({2} if args.handoff else set()):
        raise UserError("settings for two stages, as --steps 24,12, are for the two runs of a cascade (--handoff)")
    for name, least in (("n", 2), ("n_real", 2), ("n_bits", 2), ("first_seed", 0)):
        if not least <= getattr(args, name) < 2 ** 31:
            option = "seed" if name == "first_seed" else name.replace("_", "-")
            raise UserError(f"--{option} {getattr(args, name)}: want {least} or more, less than 2^31")
    args.metrics = {"all": METRICS, "none": ()}.get(args.metrics) or tuple(filter(None, args.metrics.split(",")))
    if args.metrics == ("none",):
        args.metrics = ()
    for metric in args.metrics:
        if metric not in METRICS:
            raise UserError(f"--metrics {metric}: want some of {','.join(METRICS)}")
    if args.handoff and len(args.runs) != 2:
        raise UserError(f"--handoff {args.handoff}: want the two runs of a cascade, the lower first")
    noisy, swept = args.handoff in ("truncated", "renoised"), (args.sweep or "").startswith("s=")
    if swept and not noisy:
        raise UserError("--sweep s: want --handoff truncated or renoised")
    if noisy and (args.s is None) != swept:
        raise UserError(f"--handoff {args.handoff}: say with --s, or else with --sweep s=, how much noise")
    if args.s is not None and not (noisy and 0 <= args.s < 1):
        raise UserError(f"--s {args.s:g}: want 0 or more, less than 1, and --handoff truncated or renoised")
    args.s = args.s or 0.0
    if args.handoff and args.curve:
        raise UserError("--curve: not of a cascade")
    if (args.export or args.export_png or args.sweep) and len(args.runs) > 1 and not args.handoff:
        raise UserError("--export and --sweep are for one run")
    if args.curve and args.sweep:
        raise UserError("--curve and --sweep: checkpoints or settings, not both")
    if (args.export or args.export_png) and args.sweep:
        raise UserError("--export and --sweep: one set of samples or several, not both")
    for run in args.runs if args.curve else ():
        if not kept_checkpoints(run):
            raise UserError(f"{run}: no checkpoints were kept to draw a curve of; train with --keep-every STEPS")
    if args.export and not args.export.endswith(".npz"):
        raise UserError(f"--export {args.export}: want a name that ends in .npz")
    if args.features and not os.path.isfile(args.features):
        raise UserError(f"--features {args.features}: no such file")
    if (args.sweep or args.curve) and not {"fd", "is", "read"} & set(args.metrics):
        raise UserError("--sweep and --curve need one of the metrics fd, is, read")
    if args.export_png and os.path.isdir(args.export_png):
        for name in sorted(os.listdir(args.export_png)):
            if re.fullmatch(r"\d{6,}\.png", name) and int(name[:-4]) >= args.n:
                raise UserError(f"--export-png {args.export_png}: holds {name} of an earlier, larger export; choose "
                                "another folder")
    args.given, args.given_low = ({k: v for k, v in vars(each).items() if k in (*OVERRIDES, "sample_steps")}
                                  for each in (args, low))
    return args


def sweep_values(text, config):
    """"guidance=1,2" -> ("guidance", [(text, Config), ...])."""
    field, equals, values = text.partition("=")
    if field == "s" and config.low_size:
        try:
            levels = [float(value) for value in values.split(",")]
        except ValueError:
            levels = [-1.0]
        if not all(0 <= s < 1 for s in levels):
            raise UserError(f"--sweep {text}: want numbers from 0, less than 1")
        return field, list(zip(values.split(","), levels))
    if field not in SETTINGS or not equals or not values:
        raise UserError(f"--sweep {text}: want FIELD=VALUE,VALUE with FIELD one of {', '.join(SETTINGS)}")
    # The flags of Config know the types and the choices: let them read each value.
    parser, name = Parser(prog="evaluate.py"), SETTINGS[field]
    add_fields(parser, (name,))
    return field, [(value, override(config, **vars(parser.parse_args([f"--{name}", value]))))
                   for value in values.split(",")]


def provenance(args, config, state, yardstick, device):
    """Everything that a figure depends on, and where it was made."""
    made = dict(**made_by(), machine=f"{platform.machine()}, {os.cpu_count()} cores", device=str(device))
    sets = {f"n_{name}": set_["n"] for name in ("train", "held_out") if (set_ := getattr(yardstick, name))}
    samples = dict(step=state["step"], images_seen=state["images"], n=args.n, seed=args.first_seed,
                   device_type=device.type, held_out=args.held_out and os.path.realpath(args.held_out),
                   dtype=choose_precision(config.precision, device), sampler=config.sampler,
                   steps=config.sample_steps, guidance=config.guidance if config.guidable else 1.0,
                   noise_param=config.noise_param, clip_x=config.clip_x,
                   **(dict(handoff=args.handoff, s=args.s, low_run=args.runs[0],
                           low_step=read_checkpoint(args.runs[0])["step"],
                           low_settings={key: str(value) for key, value in args.given_low.items()})
                      if args.handoff else {}))
    judge = dict(features=yardstick.name, features_id=yardstick.judge, **sets,
                 reads=getattr(yardstick.features, "accuracy", None)) if yardstick.judge else {}
    return made, samples, judge


def write_json(path, *parts):
    """Whole or not at all; only what JSON can hold (no nan)."""
    values = {key: value for part in parts for key, value in part.items()}
    with open(path + ".new", "w") as file:
        json.dump(values, file, indent=1, allow_nan=False)
    os.replace(path + ".new", path)


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def print_table(columns, name, lines=False):
    """columns: [(title, figures)]; one line a measure, or with lines=True one line a title (for sweeps)."""
    def cell(values, key):
        digits = 3 if key not in ("fd_train", "fd_held_out", "is") else 2
        spread = f" ± {values[key + '_pm']:.{digits}f}" if key + "_pm" in values else ""
        return f"{values[key]:.{digits}f}" + spread.ljust(8) if key in values else "–" + " " * 8

    used = [(key, label.format(name=name)) for key, label in TABLE if any(key in values for _, values in columns)]
    if lines:
        heads = [label.split(" (")[0] for _, label in used]
        rows = [(title, [cell(values, key) for key, _ in used]) for title, values in columns]
    else:
        heads = [title + " " * 8 for title, _ in columns]
        rows = [(label, [cell(values, key) for _, values in columns]) for key, label in used]
    first = max(len(title) for title, _ in rows + [("", [])]) + 2
    widths = [max(len(text) for text in column) + 3 for column in zip(heads, *(cells for _, cells in rows))]
    for title, cells in [("", heads)] + rows:
        print((title.ljust(first) + "".join(text.rjust(width) for text, width in zip(cells, widths))).rstrip())


def export(args, images, labels):
    """The layout of the ADM suite (uint8 NHWC as arr_0, labels as arr_1), and PNG files for everybody else."""
    try:
        if args.export:
            np.savez(args.export, images.numpy(), np.array(labels))
        if args.export_png:
            os.makedirs(args.export_png, exist_ok=True)
            for i, image in enumerate(images.numpy()):
                Image.fromarray(image).save(os.path.join(args.export_png, f"{i:06d}.png"))
    except OSError as error:
        raise UserError(f"cannot export: {error}") from None


def measure(run, model, config, args, yardstick, device, metrics, below=None, s=None, source=None):
    """(figures, described set, images, labels) of a run's samples. below: as in lower_stage, for a cascade. source: of
    what the samples are to show, if not the run's own."""
    subjects = yardstick.subjects(args.n, config, source)
    labels = subjects["labels"]
    lower = below and lower_stage(below, config, labels, args.first_seed, device, args.handoff,
                                  args.s if s is None else s)
    drawn = drawn_samples(run, model, config, labels, args.first_seed, device, lower, subjects.get("captions"))
    start = time.time()
    set_ = described(zip(torch.arange(args.n).split(100), drawn["images"].split(100)), yardstick.features)
    result = figures(set_, labels, yardstick, metrics, drawn["images"], subjects.get("answers"))
    if below and isinstance(below, tuple) and not (args.handoff == "truncated" and (args.s if s is None else s)):
        # Kept, and so not in the time of the upper stage as that of a truncated one is.
        result["seconds_of_low_stage"] = round(drawn_samples(*below, labels, args.first_seed, device)["seconds"], 1)
    result.update(seconds_of_sampling=round(drawn["seconds"], 1), seconds_of_measuring=round(time.time() - start, 1))
    return result, set_, drawn["images"], labels


def evaluate(run, model, config, state, args, yardstick, device, below=None):
    """(figures, images) of one run, with all its files: evaluation.json, the pictures, the export."""
    result, set_, images = {}, {}, None
    if set(args.metrics) - {"bits"} or args.export or args.export_png:
        result, set_, images, labels = measure(run, model, config, args, yardstick, device, args.metrics, below)
        export(args, images, labels)
    if "bits" in args.metrics and has_bits(config):
        start = time.time()
        bound = likelihood(model, config, yardstick, args.n_bits, args.first_seed, device)
        total = bound["total"].double()
        if not torch.isfinite(total).all():
            raise UserError(f"{run}: the bound on the likelihood is not finite; nothing can be measured")
        result["bits_per_dim"] = total.mean().item()
        result["bits_per_dim_pm"] = 1.96 * total.std().item() / math.sqrt(len(total))
        result.update({f"bits_{part}": bound[part].mean().item() for part in ("prior", "diffusion", "reconstruction")})
        result["bits_n"], result["bits_of"] = len(total), "train" if yardstick.unseen is None else "held-out"
        result["seconds_of_bits"] = round(time.time() - start, 1)
        draw_loss_by_logsnr(bound, os.path.join(run, "loss_by_logsnr.png"))
    if "memory" in args.metrics and "features" in set_:
        draw_nearest(images, set_["features"], yardstick, os.path.join(run, "nearest.png"))
    if config.withhold and config.text_encoder and {"read", "words"} & set(args.metrics):
        # Does it compose? Captions of pairs of character and colour that training never showed.
        result["withheld_pairs"], *_ = measure(run, model, config, args, yardstick, device, ("read", "words"),
                                               source=open_run(config, portrait=False, pairs="withheld"))
    if yardstick.real is not None and args.metrics:                       # what a perfect model would get
        indices, unseen = yardstick.real["indices"].tolist(), yardstick.unseen
        answers = scenes = None
        if config.text_encoder and "words" in args.metrics:
            answers = [(answer["letter"], answer["ground"]) for answer in (scene_answers(unseen, i) for i in indices)]
            scenes = torch.stack([to_uint8(unseen.image(i)[None])[0] for i in indices])
        result["real_scenes"] = figures(yardstick.real, [unseen.label(i) for i in indices], yardstick, args.metrics,
                                        scenes, answers)
    if args.metrics:
        made, samples, judge = provenance(args, config, state, yardstick, device)
        path = os.path.join(run, "evaluation.json")
        # What was found before of the same samples, by the same judge and references: kept; else begun anew.
        before = read_json(path)
        same = all(before.get(key) == value for key, value in samples.items())
        same = same and not ("features_id" in before and judge and any(before.get(key) != judge[key] for key in judge))
        before = before if same else {}
        tables = {key: {**before.get(key, {}), **result[key]} for key in ("withheld_pairs", "real_scenes")
                  if key in result}
        write_json(path, before, samples, made, judge, result, tables)
    return result, images


def sweep(run, model, config, state, args, yardstick, device, below=None):
    """One row for each value of one setting: sweep_FIELD.json, and the curve of table 9."""
    field, settings = sweep_values(args.sweep, config)
    for _, setting in settings:
        check_student(setting, run)
    rows, metrics = [], tuple(m for m in ("fd", "is", "read", "words") if m in args.metrics)
    for value, setting in settings:
        result, *_ = measure(run, model, setting, args, yardstick, device, metrics, below)
        rows.append((f"{field} {value}", {field: value, **result}))
        print(f"{field} {value}: sampled in {result['seconds_of_sampling']:g} s", flush=True)
    print_table(rows, yardstick.name, lines=True)
    path = os.path.join(run, f"sweep_{field}")
    write_json(path + ".json", *provenance(args, config, state, yardstick, device),
               dict(swept=field, rows=[row for _, row in rows]))
    drawn = "fd_train" in rows[0][1]
    if drawn:
        draw_sweep(field, [row for _, row in rows], path + ".png")
    print(f"wrote {path}.json" + (f" and {path}.png" if drawn else ""))


def sweep_of_s(run, model, config, state, args, yardstick, device, below):
    """CDM's search: a row for each s, on low-res images that the stage below made and on real ones."""
    _, values = sweep_values(args.sweep, config)
    rows, metrics = [], tuple(m for m in ("fd", "is", "read") if m in args.metrics)
    unseen = yardstick.unseen
    real = unseen if unseen is not None and tuple(unseen.classes) == config.class_names else yardstick.source
    check_levels([below[2], config], [below[0], run], args.handoff, [max(s for _, s in values)])
    for _, s in values:
        check_student(below[2], below[0], stop=s if args.handoff == "truncated" else 0.0)
    for said, s in values:
        for name, source in (("made", below), ("real", real)):
            result, *_ = measure(run, model, config, args, yardstick, device, metrics, source, s)
            rows.append((f"s {said}, {name} low-res", dict(s=s, low_res=name, **result)))
            print(f"s {said}, {name} low-res: sampled in {result['seconds_of_sampling']:g} s", flush=True)
    print_table(rows, yardstick.name, lines=True)
    path = os.path.join(run, f"sweep_s_{args.handoff}")
    write_json(path + ".json", *provenance(args, config, state, yardstick, device),
               dict(swept="s", below=os.path.basename(os.path.abspath(below[0])), rows=[row for _, row in rows]))
    reference = "fd_held_out" if "fd_held_out" in rows[0][1] else "fd_train"
    plt, names = _plots(), ((reference, "Fréchet distance"), ("read_rate", "read rate"), ("is", "inception score"))
    curves = [(key, label) for key, label in names if key in rows[0][1]][:2]
    if not curves:                                                        # letters that no judge can read
        return print(f"wrote {path}.json")
    figure, axes = plt.subplots(1, len(curves), figsize=(4.5 * len(curves), 3.4), squeeze=False)
    for axis, (key, label) in zip(axes[0], curves):
        for name in ("made", "real"):
            chosen = [row for _, row in rows if row["low_res"] == name]
            axis.errorbar([row["s"] for row in chosen], [row[key] for row in chosen],
                          [row[key + "_pm"] for row in chosen], marker="o", capsize=2, label=f"{name} low-res images")
        axis.set(xlabel=f"s ({args.handoff})", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path + ".png", dpi=110)
    plt.close(figure)
    print(f"wrote {path}.json and {path}.png")


def curve(run, args, yardstick, config, device):
    """[(images seen, Frechet distance)] of the checkpoints that were kept."""
    points = []
    for name in kept_checkpoints(run):
        state = read_checkpoint(run, name)
        values, *_ = measure(run, ema_model(state, run, device), config, args, yardstick, device, ("fd",))
        points.append((state["images"], values["fd_train"]))
        print(f"{run}: {state['images']:,} images seen: {yardstick.name} {values['fd_train']:.2f}", flush=True)
    return points


def introduce(run, config, state, args, yardstick, device, why):
    """The line that says what is measured, and the warnings."""
    guidance = config.guidance if config.guidable else 1
    print(f"{run}: step {state['step']:,}, {state['images']:,} images seen, on {device} ({why})\n"
          f"{args.n:,} samples, seed {args.first_seed}, {config.sampler}, {config.sample_steps} steps, guidance "
          f"{guidance:g}", flush=True)
    if "bits" in args.metrics and not has_bits(config):
        print("bits per dimension: left out; " + (
            "a distilled model knows the times of its steps alone" if config.distilled_from else
            "the bound of a nested model or a cascade is not on its images alone"))
    if yardstick.features is None:
        if set(args.metrics) - {"bits"}:
            print(f"no features for {config.data}: without --features FILE no FID, IS, precision, recall, memorisation")
        return
    if "memory" in args.metrics and not (yardstick.real or yardstick.held_out):
        print("memorisation: a picture of the nearest training images, but no ratio without --held-out FOLDER")
    if isinstance(yardstick.features, GlyphFeatures):
        read = yardstick.features.accuracy
        print(f"features: of held-out characters {read:.1%} are read"
              + ("" if read >= READS else f"; fewer than {READS:.0%}, so the read rate is left out"))
    if args.n < 2 * len(yardstick.train["mean"]):
        print(f"warning: {args.n} samples for {len(yardstick.train['mean'])} features: the distance is biased upwards; "
              f"want --n {2 * len(yardstick.train['mean'])} or more")


def main():
    args = parse()
    device, why = choose_device(args.device)
    columns, rows, curves, judges = [], [], [], []
    below, runs = None, args.runs
    if args.handoff:
        states = [read_checkpoint(run) for run in runs]
        check_chain([state["config"] for state in states], runs)
        if not (args.sweep or "").startswith("s="):
            check_levels([state["config"] for state in states], runs, args.handoff, [args.s])
        low = override(states[0]["config"], **args.given_low)             # as in sample.py, one flag is for both stages
        check_student(low, runs[0], stop=args.s if args.handoff == "truncated" else 0.0)
        below, runs = (runs[0], ema_model(states[0], runs[0], device), low), runs[1:]
    for run in args.runs:                                                 # known before any work
        if args.handoff and read_checkpoint(run)["config"].text_encoder:
            raise UserError(f"{run}: a cascade with text can be sampled, but not measured")
    for run in runs:
        if not below and read_checkpoint(run)["config"].low_size:
            raise UserError(f"{run}: a super-resolution model is measured behind the stage below it: give both runs, "
                            f"and --handoff {', '.join(HANDOFFS)}")
    for run in runs:
        state = read_checkpoint(run)
        model, config = ema_model(state, run, device), override(state["config"], **args.given)
        check_moved(state["config"].text_encoder, config.text_encoder, run)
        check_student(config, run)
        if config.text_encoder:
            Encoder(config, device, cached=True)                     # can it be had? Known before any work
        if args.sweep:
            sweep_values(args.sweep, config)                              # a mistake in it: known before any work
        yardstick = Yardstick(os.path.dirname(os.path.abspath(runs[0])), config, args.n, args.n_real, args.features,
                              args.held_out, device, wanted=set(args.metrics) - {"bits"})
        judges.append(yardstick.judge)
        introduce(run, config, state, args, yardstick, device, why)
        if (args.sweep or args.curve) and yardstick.features is None:
            raise UserError("--sweep and --curve need features: those of drawn scenes, or --features FILE")
        if args.sweep:
            if args.sweep.startswith("s="):
                return sweep_of_s(run, model, config, state, args, yardstick, device, below)
            return sweep(run, model, config, state, args, yardstick, device, below)
        title = os.path.basename(os.path.abspath(run))
        result, images = evaluate(run, model, config, state, args, yardstick, device, below)
        columns.append((title, result))
        if images is not None:
            rows.append((title, images))
        if args.curve:
            curves.append((title, curve(run, args, yardstick, config, device)))
    if len({judge for judge in judges if judge}) > 1:
        print("warning: these runs were not judged by the same features; their distances cannot be compared")
    for key in ("withheld_pairs", "real_scenes") if len(columns) == 1 else ():
        if key in columns[0][1]:
            columns.append((key.replace("_", " "), columns[0][1][key]))
    print_table(columns, yardstick.name)
    if len(rows) > 1 or curves:
        path = os.path.join(os.path.dirname(os.path.abspath(args.runs[0])), "comparison.png")
        draw_comparison(rows, curves, path)
        print(f"wrote {os.path.relpath(path)}")
    for run, (_, result) in zip(runs, columns):
        print((f"wrote {os.path.join(run, 'evaluation.json')}; " if args.metrics else "")
              + ", ".join(f"{name} {result['seconds_of_' + name]:g} s" for name in ("sampling", "measuring", "bits")
                          if "seconds_of_" + name in result))


if __name__ == "__main__":
    main_program(main)
