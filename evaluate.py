"""Measure the samples of a run as the field does: FID, inception score, precision and recall, bits per dimension.

Paper: simple diffusion, section 5 (FID against the training set and against held-out data, IS, table 9's sweep of the
guidance scale); section 2 and Kingma et al. 2021 for the variational bound; Cascaded Diffusion 3.3 for the search of s.
Needs: measures.py (the definitions). What is in no paper is in plumbing/: drawing.py (the samples), features.py (the
network and the real images that samples are compared with) and measuring.py (flags, files, pictures).

    python evaluate.py runs/glyphs64                           every measure -> a table and RUN/evaluation.json
    python evaluate.py runs/glyphs64 runs/glyphs64_unet        side by side, and runs/comparison.png
    python evaluate.py runs/glyphs64 --n 500 --sweep guidance=1,1.05,1.1,1.2,1.4,1.8,2,3
    python evaluate.py runs/glyphs16 runs/glyphs64_sr --handoff renoised --sweep s=0,0.1,0.2,0.3,0.5,0.7,0.9
    python evaluate.py runs/photos --features inception.pt     FID proper, by a network that you have
    python evaluate.py runs/photos --metrics none --export samples.npz

--metrics takes some of these:

    fd      Frechet distance of features, samples against training images and against held-out ones: FID, with Inception
    is      inception score
    read    drawn scenes: share of samples in which the network reads the character that was asked for
    words   captions of scenes: share of samples in which both colours are the ones that were asked for
    pr      precision and recall
    style   distances of the colours, and of what the network sees: textures, letter colours, ...
    memory  how near the samples are to training images, 1 = as near as unseen images are
    bits    bits per dimension of held-out images, at most
    motion  videos: share in which the network reads one letter in all frames, how far and how evenly frames turn

All measures but bits are of 8-bit samples, drawn with the EMA weights; each frame of a video counts as an image.
Samples and features are cached: a second evaluation uses them again.
"""
import plumbing  # first: from here on Ctrl-C shows no traceback
import math
import os
import sys
import time

import torch

from config import make_schedule
from measures import (Moments, bootstrap, frechet_distance, histogram_distance, inception_score, precision_recall,
                      variational_bound)
from plumbing import UserError
from plumbing.drawing import draw_samples, stops_early
from plumbing.features import Yardstick, colour_answers, moments_of, nearest_of, scene_colours
from plumbing.measuring import (TrainedRun, checked_configs, draw_loss_by_logsnr, draw_nearest, export, finite,
                                first_examples, fitting, introduce, open_results, parse, print_table, report,
                                save_scores, save_sweep, trained_run, variants_of)
from plumbing.motion import motion_scores
from plumbing.pictures import to_uint8
from plumbing.runs import choose_device, kept_checkpoints, main_program, progress, read_checkpoint, tell
from plumbing.sources import open_run
from plumbing.t5 import Encoder


# ------------------------------------------------------------------------------------------ the scores of one set

def score(samples, yardstick, metrics):
    """Return the scores of a set of samples, or of real images in their place: a flat dict.

    samples    a dict: what Yardstick.describe returns, and `labels`. For captions of scenes also `images` and
               `answers`, the colours that the captions ask for, [(letter, ground), ...]
    A key that ends in _pm is half a 95 % interval. For the inception score it is one standard deviation over ten parts
    of the set, as the field reports it.
    """
    scores, reference, n = {}, yardstick.held_out or yardstick.train, len(samples["labels"])
    has_features, network = "features" in samples, yardstick.network
    can_read = bool(network) and network.can_read                         # characters, well enough to grade samples
    if "fd" in metrics and has_features:
        scores |= frechet_distances(samples, yardstick)
    if "is" in metrics and "character" in samples:
        scores["is"], scores["is_pm"] = inception_score(samples["character"])
    for name, right in right_answers(samples, can_read, metrics).items():
        scores[name] = right.mean().item()
        scores[name + "_pm"] = bootstrap(lambda i: right[i].mean().item(), n, 1000)
    if "motion" in metrics and "turns" in samples:
        scores |= motion_scores(samples, can_read)
    if "pr" in metrics and has_features:
        k, i, features = min(5000, len(reference["features"]), n), torch.arange(n), by_sample(samples)
        features = features[i, i % features.shape[1]]                     # of a video one frame: they are too alike
        if k > 3:                                                         # manifolds of equal numbers
            scores["precision"], scores["recall"] = precision_recall(reference["features"][:k], features[:k])
    if "style" in metrics:
        scores |= style_distances(samples, reference)
    if "memory" in metrics and has_features:
        scores |= memorisation(samples, yardstick)
    return finite(scores)


def by_sample(samples):
    """Return the features of each sample's pictures, (n, pictures, D): mostly one, of a video all its frames."""
    return samples["features"].unflatten(0, (len(samples["labels"]), -1))


def frechet_distances(samples, yardstick):
    """Return the distances to the training images and to held-out ones."""
    scores, n = {}, len(samples["labels"])
    features = by_sample(samples)
    times = 100 if features.shape[-1] <= 256 else 20                      # slow with Inception's 2048 features
    for name, real in (("train", yardstick.train), ("held_out", yardstick.held_out)):
        if real is not None:
            real = moments_of(real)
            scores[f"fd_{name}"] = frechet_distance(real, moments_of(samples))
            scores[f"fd_{name}_pm"] = bootstrap(
                lambda i: frechet_distance(real, Moments(features[i].flatten(0, 1))), n, times)
    return scores


def right_answers(samples, can_read, metrics):
    """Return for each sample 1 if it shows what was asked for, else 0: {name: (n,) float64}."""
    labels, right = torch.tensor(samples["labels"]), {}
    if "read" in metrics and can_read and labels.min() >= 0:
        letters = samples["character"].argmax(1).reshape(len(labels), -1)
        right["read_rate"] = (letters == labels[:, None]).double().mean(1)
    if "words" in metrics and "answers" in samples:
        wanted = torch.tensor(samples["answers"]).T                       # (2, n)
        for name, colour, answer in zip(("letter", "ground"), scene_colours(samples["images"]), wanted):
            right[name + "_colour"] = (colour == answer).double()
        if "read_rate" in right:
            right["all_right"] = right["read_rate"] * right["letter_colour"] * right["ground_colour"]
    return right


def style_distances(samples, reference):
    """Return how far the colours are from those of real images, and what the network sees: textures, styles, ..."""
    scores = dict(colour_distance=histogram_distance(samples["colours"], reference["colours"]),
                  colour_spread=(samples["spread"] / reference["spread"]).item())
    for head in ("texture", "letter", "ground", "style"):
        if head in samples:
            counts = [torch.bincount(s[head].argmax(1), minlength=s[head].shape[1]).double()
                      for s in (samples, reference)]
            scores[f"{head}_distance"] = histogram_distance(*counts)
    return scores


def memorisation(samples, yardstick):
    """Return the mean distance to the nearest training image, as a share of that of images that cannot be copies."""
    unseen, train = yardstick.real_scenes or yardstick.held_out, yardstick.train["features"]
    if unseen is None:
        return {}
    nearest, usual = (nearest_of(s["features"], train)[0].mean() for s in (samples, unseen))
    return {"nearest_ratio": (nearest / usual).item()} if usual > 0 else {}           # 0: the unseen ones are copies


# ------------------------------------------------------------------------------------------ bits per dimension

def likelihood(run, yardstick, n, seed, source=None):
    """Return variational_bound of n images: a dict of tensors, a row for each image. Raises UserError.

    source: where the images come from. If it is not given: held-out images, or training images if there are none.
    """
    config, device = run.config, run.device
    if source is None:
        source = yardstick.source if yardstick.held_out_source is None else yardstick.held_out_source
    examples = first_examples(source, n, seed)
    if len(examples) < 2:
        raise UserError(f"{config.data}: {len(examples)} image(s) that can be read; bits per dimension want 2 or more")
    images, labels, captions = zip(*examples)
    if tuple(source.classes) != config.class_names:                       # a held-out folder may have other classes
        labels = [-1] * len(images)
    encoder = Encoder(config, device, cached=source is yardstick.source) if config.text_encoder else None
    generator, bounds = torch.Generator().manual_seed(seed), []
    for first in range(0, len(images), 16):
        part = slice(first, first + 16)
        x = torch.stack(images[part]).to(device)
        cond = encoder(captions[part]) if encoder else {"label": torch.tensor(labels[part], device=device)}
        with torch.no_grad():
            bound = variational_bound(run.model, x, cond, make_schedule(config), generator=generator)
        bounds.append({name: value.cpu() for name, value in bound.items()})
        progress("bits per dimension", first + len(x), len(images))
    return {name: torch.cat([bound[name] for bound in bounds]) for name in bounds[0]}


def measure_bits(run, yardstick, n, seed):
    """Return the bound on -log p in bits per dimension and its three parts. Draw the loss by log-SNR."""
    start = time.monotonic()
    bound = likelihood(run, yardstick, n, seed)
    total = bound["total"].double()
    if not torch.isfinite(total).all():
        raise UserError(f"{run.folder}: the bound on the likelihood is not finite; nothing can be measured")
    scores = dict(bits_per_dim=total.mean().item(), bits_per_dim_pm=1.96 * total.std().item() / math.sqrt(len(total)))
    scores |= {f"bits_{part}": bound[part].mean().item() for part in ("prior", "diffusion", "reconstruction")}
    scores |= dict(bits_n=len(total), bits_of="train" if yardstick.held_out_source is None else "held-out",
                   seconds_of_bits=round(time.monotonic() - start, 1))
    draw_loss_by_logsnr(bound, os.path.join(run.folder, "loss_by_logsnr.png"))
    return scores


# ------------------------------------------------------------------------------------------ the measures of a run

def measure(run, yardstick, metrics, seed=0, source=None):
    """Draw the samples of a run and score them: (scores, samples). samples: as in score(), with the images.

    source: examples to take labels and captions from, if not from the training images.
    """
    prompts = yardstick.prompts(source)
    drawn = draw_samples(run, prompts["labels"], seed, prompts.get("captions"))
    start, images = time.monotonic(), drawn["images"]
    batches = zip(torch.arange(len(images)).split(100), images.split(100))
    samples = dict(yardstick.describe(batches), **prompts, images=images)
    scores = score(samples, yardstick, metrics)
    if isinstance(run.below, TrainedRun) and not stops_early(run):        # else it is in the time of the upper stage
        low = draw_samples(run.below, prompts["labels"], seed)            # cached: only the time is wanted
        scores["seconds_of_low_stage"] = round(low["seconds"], 1)
    scores.update(seconds_of_sampling=round(drawn["seconds"], 1),
                  seconds_of_measuring=round(time.monotonic() - start, 1))
    return scores, samples


def score_real_scenes(yardstick, metrics):
    """Score held-out scenes as if they were samples: what a perfect model would get."""
    source, indices = yardstick.held_out_source, yardstick.real_scenes["indices"].tolist()
    scenes = dict(yardstick.real_scenes, labels=[source.label(i) for i in indices])
    if "words" in metrics and yardstick.config.text_encoder:
        scenes["images"] = torch.cat([to_uint8(source.image(i)[None]) for i in indices])
        scenes["answers"] = colour_answers(source, indices)
    return score(scenes, yardstick, metrics)


def evaluate(run, args, yardstick):
    """Measure all that is asked of one run. Write evaluation.json, pictures, exports. Return (scores, images)."""
    config, seed = run.config, args.first_seed
    metrics = fitting(args.metrics, config)
    scores, samples = {}, {}
    if set(metrics) - {"bits"} or args.export or args.export_png:
        scores, samples = measure(run, yardstick, metrics, seed)
        export(args, samples["images"], samples["labels"])
    if "bits" in metrics:
        try:
            scores |= measure_bits(run, yardstick, args.n_bits, seed)
        except UserError as error:
            if not scores:                                                # there is nothing else to tell
                raise
            print(f"bits per dimension: left out; {error}", file=sys.stderr)
    if "memory" in metrics and "features" in samples:
        draw_nearest(samples, yardstick, os.path.join(run.folder, "nearest.png"))
    if config.withhold and config.text_encoder and {"read", "words"} & set(metrics):
        # Does the model compose? Captions with pairs of character and colour that training never showed.
        withheld = open_run(config, portrait=False, pairs="withheld")
        scores["withheld_pairs"], _ = measure(run, yardstick, fitting(("read", "words"), config), seed, withheld)
    if yardstick.real_scenes is not None and metrics:
        scores["real_scenes"] = score_real_scenes(yardstick, metrics)
    if args.metrics:
        save_scores(scores, run, args, yardstick)
    return scores, samples.get("images")


# ------------------------------------------------------------------------------------------ sweeps and curves

def sweep(run, args, yardstick):
    """Measure the run once for each value of one setting. Write sweep_FIELD.json and a picture: table 9."""
    field, variants = variants_of(run, args.sweep, yardstick)
    titles, rows, metrics = [], [], fitting([m for m in ("fd", "is", "read", "words") if m in args.metrics], run.config)
    for title, values, variant in variants:
        scores, _ = measure(variant, yardstick, metrics, args.first_seed)
        titles.append(title)
        rows.append(values | scores)
        tell(f"{title}: sampled in {scores['seconds_of_sampling']:g} s", sys.stdout)
    print_table(list(zip(titles, rows)), yardstick.distance_name, lines=True)
    save_sweep(field, rows, run, args, yardstick)


def curve(run, yardstick, seed):
    """Return [(images seen, Frechet distance), ...] of the checkpoints that --keep-every kept."""
    points = []
    for name in kept_checkpoints(run.folder):
        state = read_checkpoint(run.folder, name)
        scores, _ = measure(trained_run(run.folder, state, run.config, run.device), yardstick, ("fd",), seed)
        if "fd_train" in scores:                                          # else it was not finite
            points.append((state["images"], scores["fd_train"]))
            tell(f"{run.folder}: {state['images']:,} images seen: {yardstick.distance_name} {scores['fd_train']:.2f}",
                 sys.stdout)
    return points


# ------------------------------------------------------------------------------------------ the program

def main():
    args = parse(sys.argv[1:])
    device, why = choose_device(args.device)
    states = [read_checkpoint(folder) for folder in args.runs]            # mapped, not read: weights stay on the disk
    configs = checked_configs(args, states, device)
    args.runs = [open_results(run) for run in args.runs]                  # another folder for pretrained weights
    checkpoints, cascade = list(zip(args.runs, states, configs)), {}
    if args.handoff:
        cascade = dict(below=trained_run(*checkpoints.pop(0), device), handoff=args.handoff, s=args.s)
    folder = os.path.dirname(os.path.abspath(checkpoints[0][0]))          # one network measures all runs
    columns, sheets, curves, networks = [], [], [], set()
    for checkpoint in checkpoints:
        run = trained_run(*checkpoint, device, **cascade)
        yardstick = Yardstick(folder, run.config, args.n, args.n_real, args.features, args.held_out, device,
                              only_sources=not set(args.metrics) - {"bits"})
        introduce(run, args, yardstick, why)
        if (args.sweep or args.curve) and yardstick.network is None:
            raise UserError("--sweep and --curve need features: those of drawn scenes, or --features FILE")
        if args.sweep:
            return sweep(run, args, yardstick)
        title = os.path.basename(os.path.abspath(run.folder))
        scores, images = evaluate(run, args, yardstick)
        columns.append((title, scores))
        networks.add(yardstick.network_id)
        if images is not None:
            sheets.append((title, images))
        if args.curve:
            curves.append((title, curve(run, yardstick, args.first_seed)))
    if len(networks - {""}) > 1:
        print("warning: these runs were not measured by the same network; their distances cannot be compared")
    report(columns, sheets, curves, args, yardstick.distance_name)


if __name__ == "__main__":
    main_program(main)
