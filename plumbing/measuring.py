"""The plumbing of evaluate.py: its command line and checks, the files and pictures that it writes."""
import dataclasses
import math
import os
import platform
import re
import sys

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from cascade import HANDOFFS
from config import Config
from data import Stream
from plumbing import UserError
from plumbing.features import MIN_ACCURACY, GlyphFeatures, nearest_of
from plumbing.files import (check_regular, check_result, one_at_a_time, read_json, whole_file, writable_folder,
                            write_json)
from plumbing.images import BrokenImage
from plumbing.pictures import grid, label, pyplot, save_figure, save_picture
from plumbing.runs import (check_memory, choose_precision, ema_model, kept_checkpoints, made_by, results_folder,
                           run_of, tell)
from plumbing.sampling import (add_settings, check_chain, check_levels, check_student, given_settings, with_settings,
                               words_of)
from plumbing.settings import Parser, add_fields, check_range, override
from plumbing.sources import add_accept_flag, located
from plumbing.t5 import Encoder

METRICS = ("fd", "is", "read", "words", "pr", "style", "bits", "memory", "motion")
INNER = ("withheld_pairs", "real_scenes")                                 # scores that are tables of their own
SWEPT = {"steps": "sample_steps", "guidance": "guidance", "noise_param": "noise_param", "sampler": "sampler",
         "clip_x": "clip_x"}                                              # name after --sweep: field of Config
TABLE = (("fd_train", "{name} against train"), ("fd_held_out", "{name} against held-out"),
         ("is", "inception score (± 1 s.d. of 10 parts)"), ("read_rate", "read rate"),
         *((f"read_frame_{i}", f"read rate, frame {i}") for i in range(64)),
         ("same_letter", "videos whose letter stays"), ("change", "difference of neighbouring frames, squared"),
         ("turn", "turn from frame to frame, degrees"), ("uneven_turn", "change of this turn, degrees"),
         ("letter_colour", "colour of the letter right"), ("ground_colour", "colour of the ground right"),
         ("all_right", "letter and both colours right"), ("precision", "precision"), ("recall", "recall"),
         ("colour_distance", "colours: distance of histograms"), ("colour_spread", "colours: spread, share of data's"),
         ("texture_distance", "textures: distance"), ("letter_distance", "letter colours: distance"),
         ("ground_distance", "ground colours: distance"), ("style_distance", "letter styles: distance"),
         ("bits_per_dim", "bits per dimension, at most"), ("nearest_ratio", "nearest training image, 1 = as unseen"))


# ------------------------------------------------------------------------------------------ runs

@dataclasses.dataclass
class TrainedRun:
    """A run that is measured. In a cascade it is the upper stage, and the fields at the end say what is below it."""
    folder: str
    model: nn.Module                     # with the EMA weights
    config: Config                       # with the settings of sampling that the command line gives
    device: torch.device
    step: int                            # of the checkpoint
    images_seen: int                     # in training, up to this step
    below: object = None                 # the TrainedRun of the lower stage; for sweeps of s also real images
    handoff: str | None = None           # what the lower stage hands over: truncated, renoised, clean
    s: float = 0.0                       # the noise of it


def trained_run(folder, state, config, device, **cascade):
    """Build the model of a checkpoint (`state`, as read_checkpoint returns it) as a TrainedRun."""
    return TrainedRun(folder, ema_model(state, folder, device), config, device, state["step"], state["images"],
                      **cascade)


def open_results(run):
    """Return the folder for the results of a run: its own, or a new one for pretrained weights, which is named.
    Raises UserError if the scores cannot be written there: now, not after the work."""
    folder = results_folder(run)
    if folder != run:
        writable_folder(folder, run)
        tell(f"the results of {run} go to {folder}", sys.stdout)
    with one_at_a_time(path := os.path.join(folder, "evaluation.json")):
        check_regular(path)
    return folder


def first_examples(source, n, seed):
    """Return the first n examples, in the order of this seed, that can be read: [(image, label, caption), ...]."""
    examples = []
    for i in map(int, Stream(source, seed).order(0)):
        if len(examples) == n:
            break
        try:
            examples.append((source.image(i), source.label(i), source.caption(i)))
        except BrokenImage:
            continue
    return examples


# ------------------------------------------------------------------------------------------ the command line

def parse(argv):
    """Parse the command line of evaluate.py. Raises UserError.

    args.given, args.given_low: the settings of the run, and of the lower stage of a cascade, that it changes.
    """
    parser = make_parser()
    (words, counts), (low_words, _) = (words_of(argv, stage) for stage in (1, 0))
    args, low = parser.parse_args(words), parser.parse_args(low_words)
    if counts - ({2} if args.handoff else set()):
        raise UserError("settings for two stages, as --steps 24,12, are for the two runs of a cascade (--handoff)")
    args.given, args.given_low = given_settings(args), given_settings(low)
    check_range("samples", args.n, "--n")
    for name, value in (("n_real", args.n_real), ("n_bits", args.n_bits), ("seed", args.first_seed)):
        check_range(name, value)
    if args.s is not None:
        check_range("s", args.s)
    args.metrics = {"all": METRICS, "none": ()}.get(args.metrics, tuple(args.metrics.split(",")))
    for metric in args.metrics:
        if metric not in METRICS:
            raise UserError(f"--metrics {metric}: want all, none, or some of {','.join(METRICS)}")
    if args.features and not os.path.isfile(args.features):
        raise UserError(f"--features {args.features}: no such file")
    check_handoff(args)
    check_several(args)
    check_export(args)
    args.s = args.s or 0.0
    return args


def make_parser():
    parser = Parser(prog="evaluate.py", usage="evaluate.py RUN [RUN ...] [any flag below]",
                    description="Measure the samples of one run or compare several.")
    parser.add_argument("runs", nargs="+", type=run_of, metavar="RUN", help="folder of a run, or of several")
    parser.add_argument("--n", type=int, default=2000, help="samples (default 2000; the papers use 50,000)")
    parser.add_argument("--n-real", type=int, default=10_000, help="training images, and as many held-out ones "
                        "(default 10000)")
    parser.add_argument("--n-bits", type=int, default=128, help="images for bits per dimension (default 128)")
    parser.add_argument("--metrics", default="all", help=f"all, none, or some of {','.join(METRICS)}")
    parser.add_argument("--features", metavar="FILE", help="a TorchScript Inception, for FID")
    parser.add_argument("--held-out", metavar="FOLDER", help="images that the run never saw (not for drawn scenes)")
    parser.add_argument("--data", help="where the training data are now, if they moved")
    add_accept_flag(parser)
    parser.add_argument("--export", metavar="FILE", help="write the samples as the ADM suite reads them (.npz, arr_0)")
    parser.add_argument("--export-png", metavar="DIR", help="write the samples as PNG files")
    parser.add_argument("--sweep", metavar="F=V,V", help=f"one row for each value; F is one of {', '.join(SWEPT)}; "
                        "for a cascade s, or one of these for its upper stage")
    parser.add_argument("--handoff", choices=HANDOFFS, help="the runs are the two stages of a cascade, the lower first")
    parser.add_argument("--s", type=float, help="for a cascade: noise of the handoff, from 0, less than 1")
    parser.add_argument("--curve", action="store_true", help="draw a curve of the checkpoints that --keep-every "
                        "kept as well")
    parser.add_argument("--seed", dest="first_seed", type=int, default=0, help="another seed draws other samples "
                        "(default 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add_settings(parser)
    return parser


def check_handoff(args):
    """Check the flags of a cascade. Raises UserError."""
    if args.handoff and len(args.runs) != 2:
        raise UserError(f"--handoff {args.handoff}: want the two runs of a cascade, the lower first")
    noisy, sweeps_s = args.handoff in ("truncated", "renoised"), (args.sweep or "").startswith("s=")
    if sweeps_s and not noisy:
        raise UserError("--sweep s: want --handoff truncated or renoised")
    if noisy and (args.s is None) != sweeps_s:
        raise UserError(f"--handoff {args.handoff}: say with --s, or else with --sweep s=, how much noise")
    if args.s is not None and not noisy:
        raise UserError(f"--s {args.s:g}: want --handoff truncated or renoised, too")
    if args.handoff and args.curve:
        raise UserError("--curve: not for a cascade")


def check_several(args):
    """Check the flags that measure several checkpoints or several settings. Raises UserError."""
    if (args.export or args.export_png or args.sweep) and len(args.runs) > 1 and not args.handoff:
        raise UserError("--export and --sweep are for one run")
    if args.curve and args.sweep:
        raise UserError("--curve and --sweep: checkpoints or settings, not both")
    if (args.export or args.export_png) and args.sweep:
        raise UserError("--export and --sweep: one set of samples or several, not both")
    for run in args.runs if args.curve else ():
        if not kept_checkpoints(run):
            raise UserError(f"{run}: no checkpoints were kept to draw a curve of; train with --keep-every STEPS")
    if (args.sweep or args.curve) and not {"fd", "is", "read"} & set(args.metrics):
        raise UserError("--sweep and --curve need one of the metrics fd, is, read")


def check_export(args):
    """Check that the export can be written and will not mix with an older one. Raises UserError."""
    if args.export:
        check_result(args.export, "--export", ".npz")
    if args.export_png:
        writable_folder(args.export_png, "--export-png")
        for name in sorted(os.listdir(args.export_png)):
            if re.fullmatch(r"\d{6,}\.png", name) and int(name[:-4]) >= args.n:
                raise UserError(f"--export-png {args.export_png}: holds {name} of an earlier, larger export; choose "
                                "another folder")


def sweep_values(text, config):
    """Parse --sweep: "guidance=1,2" -> ("guidance", [("1", Config), ...]); "s=0,0.5" -> ("s", [("0", 0.0), ...]).

    config: that of the run, of a cascade its upper stage. Raises UserError.
    """
    field, equals, values = text.partition("=")
    if field == "s" and config.low_size:
        try:
            levels = [float(value) for value in values.split(",")]
        except ValueError:
            raise UserError(f"--sweep {text}: want numbers") from None
        check_range("s", tuple(levels), "--sweep s")
        return field, list(zip(values.split(","), levels))
    if field not in SWEPT or not equals or not values:
        raise UserError(f"--sweep {text}: want FIELD=VALUE,VALUE with FIELD one of {', '.join(SWEPT)}")
    # The flags of Config know the types and the choices: let them read each value.
    parser, name = Parser(prog="evaluate.py"), SWEPT[field]
    add_fields(parser, (name,))
    return field, [(value, override(config, **vars(parser.parse_args([f"--{name}", value]))))
                   for value in values.split(",")]


def checked_configs(args, states, device):
    """Return the config of each run, with the settings of the command line. states: as read_checkpoint gives them.

    Raises UserError for all that cannot be measured, before any work is done.
    """
    configs = [with_settings(located(state["config"], args, run), args.given_low if args.handoff and i == 0 else
                             args.given, run) for i, (run, state) in enumerate(zip(args.runs, states))]
    stops = [0.0] * len(configs)
    if args.handoff:
        check_chain(configs, args.runs)
        if not (args.sweep or "").startswith("s="):                       # evaluate.py checks each s of a sweep
            check_levels(configs, args.runs, args.handoff, [args.s])
        stops[0] = args.s if args.handoff == "truncated" else 0.0
    for run, config, stop in zip(args.runs, configs, stops):
        check_student(config, run, stop=stop)
        pixels = config.size[0] * config.size[1]                          # samples in 8 bits, twice; others in float32
        check_memory(max(6 * args.n, 12 * args.n_bits if "bits" in args.metrics else 0) * pixels,
                     f"--n {args.n} and --n-bits {args.n_bits}, images of {config.size[0]}x{config.size[1]}")
        if args.handoff and config.text_encoder:
            raise UserError(f"{run}: a cascade with text can be sampled, but not measured")
        if config.low_size and not args.handoff:
            raise UserError(f"{run}: a super-resolution model is measured behind the stage below it: give both runs, "
                            f"and --handoff {', '.join(HANDOFFS)}")
        if config.text_encoder:
            Encoder(config, device, cached=True)                          # raises UserError if it cannot be opened
    if args.sweep:
        sweep_values(args.sweep, configs[-1])
    return configs


def variants_of(run, text, yardstick):
    """Return (field, [(title, {field: value}, the run with this value), ...]) of a sweep. Raises UserError.

    CDM's search for s: each value twice, on low-res images that the lower stage makes and on real ones.
    """
    field, values = sweep_values(text, run.config)
    if field != "s":
        for _, config in values:
            check_student(config, run.folder)
        return field, [(f"{field} {word}", {field: word}, dataclasses.replace(run, config=config))
                       for word, config in values]
    below, unseen = run.below, yardstick.held_out_source
    check_levels([below.config, run.config], [below.folder, run.folder], run.handoff, [max(s for _, s in values)])
    for _, s in values:
        check_student(below.config, below.folder, stop=s if run.handoff == "truncated" else 0.0)
    real = unseen if unseen is not None and tuple(unseen.classes) == run.config.class_names else yardstick.source
    return field, [(f"s {word}, {name} low-res", dict(s=s, low_res=name), dataclasses.replace(run, s=s, below=source))
                   for word, s in values for name, source in (("made", below), ("real", real))]


# ------------------------------------------------------------------------------------------ what is printed

def introduce(run, args, yardstick, why):
    """Print what is measured, and the warnings."""
    config, guidance = run.config, run.config.guidance if run.config.guidable else 1
    tell(f"{run.folder}: step {run.step:,}, {run.images_seen:,} images seen, on {run.device} ({why})\n"
         f"{args.n:,} samples, seed {args.first_seed}, {config.sampler}, {config.sample_steps} steps, guidance "
         f"{guidance:g}", sys.stdout)
    if "bits" in args.metrics and not has_bits(config):
        print("bits per dimension: left out; " + (
            "a distilled model knows only the times of its steps" if config.distilled_from else
            "a nested model or a cascade has no bound on its images alone"))
    if "memory" in args.metrics and config.counts[0] > 1:
        print("memorisation: left out; it is measured for images")
    if "words" in args.metrics and config.counts[0] > 1 and config.text_encoder:
        print("words: left out; the letter of a video changes its colour")
    if yardstick.network is None:
        if set(args.metrics) - {"bits"}:
            print(f"no features for {config.data}: without --features FILE no FID, IS, precision, recall, memorisation")
        return
    if "memory" in args.metrics and not (yardstick.real_scenes or yardstick.held_out):
        print("memorisation: a picture of the nearest training images, but no ratio without --held-out FOLDER")
    if isinstance(yardstick.network, GlyphFeatures):
        weak = f"; fewer than {MIN_ACCURACY:.0%}, so the read rate is left out"
        print(f"features: the network reads {yardstick.network.accuracy:.1%} of held-out characters"
              + ("" if yardstick.network.can_read else weak))
    width = len(yardstick.train["mean"])
    if args.n < 2 * width:
        print(f"warning: {args.n} samples for {width} features: the distance is biased upwards; want --n {2 * width} "
              "or more")


def has_bits(config):
    """Return True if there is a bound on the likelihood of the images alone, at all times t."""
    return not (config.outer_channels or config.low_size or config.distilled_from)


def fitting(metrics, config):
    """Return those of the metrics that the samples of this Config can have."""
    is_video = config.counts[0] > 1
    left_out = dict(bits=not has_bits(config), memory=is_video, words=is_video)
    return tuple(metric for metric in metrics if not left_out.get(metric))


def print_table(columns, distance_name, lines=False):
    """Print [(title, scores)], a line for each measure. lines=True: a line for each title, for sweeps."""
    def cell(scores, key):
        digits = 3 if key not in ("fd_train", "fd_held_out", "is") else 2
        spread = f" ± {scores[key + '_pm']:.{digits}f}" if key + "_pm" in scores else ""
        return f"{scores[key]:.{digits}f}" + spread.ljust(8) if key in scores else "–" + " " * 8

    used = [(key, label.format(name=distance_name)) for key, label in TABLE
            if any(key in scores for _, scores in columns)]
    if lines:
        heads = [label.split(" (")[0] for _, label in used]
        rows = [(title, [cell(scores, key) for key, _ in used]) for title, scores in columns]
    else:
        heads = [title + " " * 8 for title, _ in columns]
        rows = [(label, [cell(scores, key) for _, scores in columns]) for key, label in used]
    first = max(len(title) for title, _ in rows + [("", [])]) + 2
    widths = [max(len(text) for text in column) + 3 for column in zip(heads, *(cells for _, cells in rows))]
    for title, cells in [("", heads)] + rows:
        print((title.ljust(first) + "".join(text.rjust(width) for text, width in zip(cells, widths))).rstrip())


def report(columns, sheets, curves, args, distance_name):
    """Print the scores of all runs, [(title, scores)], draw comparison.png, and print what was written."""
    titles, scores = zip(*columns)
    others = [(key.replace("_", " "), scores[0][key]) for key in INNER if key in scores[0]]
    print_table(columns + (others if len(columns) == 1 else []), distance_name)
    if len(sheets) > 1 or curves:
        path = os.path.join(os.path.dirname(os.path.abspath(args.runs[0])), "comparison.png")
        draw_comparison(sheets, curves, path)
        print(f"wrote {os.path.relpath(path)}")
    for folder, values in zip(args.runs[-len(columns):], scores):         # without the lower stage of a cascade
        seconds = (f"{name} {values['seconds_of_' + name]:g} s" for name in ("sampling", "measuring", "bits")
                   if "seconds_of_" + name in values)
        print((f"wrote {os.path.join(folder, 'evaluation.json')}; " if args.metrics else "") + ", ".join(seconds))


# ------------------------------------------------------------------------------------------ files

def provenance(run, args, yardstick):
    """Return where the scores were made, and all that they depend on: (machine, samples, network), three dicts."""
    config = run.config
    made = dict(**made_by(), machine=f"{platform.machine()}, {os.cpu_count()} cores", device=str(run.device))
    samples = dict(step=run.step, images_seen=run.images_seen, n=args.n, seed=args.first_seed,
                   device_type=run.device.type, held_out=args.held_out and os.path.realpath(args.held_out),
                   dtype=choose_precision(config.precision, run.device), sampler=config.sampler,
                   steps=config.sample_steps, guidance=config.guidance if config.guidable else 1.0,
                   noise_param=config.noise_param, clip_x=config.clip_x)
    if run.handoff:
        samples.update(handoff=run.handoff, s=run.s, low_run=run.below.folder, low_step=run.below.step,
                       low_settings={key: str(value) for key, value in args.given_low.items()})
    network = {}
    if yardstick.network:
        sizes = {f"n_{name}": real["n"] for name, real in (("train", yardstick.train), ("held_out", yardstick.held_out))
                 if real}
        network = dict(features=yardstick.distance_name, features_id=yardstick.network_id, **sizes,
                       reads=getattr(yardstick.network, "accuracy", None))
    return made, samples, network


def finite(scores):
    """Return the scores that are finite, and name the others: one measure must not end the rest. JSON has no inf.

    Samples of equal colours are an example, or data that hold one picture again and again: their spread is 0.
    """
    lost = {name: value for name, value in scores.items() if not math.isfinite(value)}
    for name, value in lost.items():
        if not name.endswith("_pm") or name[:-3] not in lost:             # the interval goes with its score
            print(f"{name}: left out; it is {value} for these samples and images", file=sys.stderr)
    return {name: value for name, value in scores.items() if not {name, name.removesuffix("_pm")} & lost.keys()}


def save_scores(scores, run, args, yardstick):
    """Write evaluation.json.

    Scores that it holds already are kept if they are of the same samples, the same network and the same real images.
    """
    made, samples, network = provenance(run, args, yardstick)
    path = os.path.join(run.folder, "evaluation.json")
    with one_at_a_time(path):
        before = read_json(path)
        same = all(before.get(key) == value for key, value in samples.items())
        if "features_id" in before and network:
            same = same and all(before.get(key) == value for key, value in network.items())
        before = before if same else {}
        before = {key: value for key, value in before.items() if type(value) is dict or key not in INNER}
        tables = {key: {**before.get(key, {}), **scores[key]} for key in INNER if key in scores}
        write_json(path, before | samples | made | network | scores | tables)


def save_sweep(field, rows, run, args, yardstick):
    """Write sweep_FIELD.json and, if there is something to draw, its picture. Print their names."""
    made, samples, network = provenance(run, args, yardstick)
    path = os.path.join(run.folder, f"sweep_{field}" + (f"_{run.handoff}" if field == "s" else ""))
    sweep = dict(swept=field, rows=rows)
    if field == "s":
        sweep = dict(swept=field, below=os.path.basename(os.path.abspath(run.below.folder)), rows=rows)
    write_json(path + ".json", made | samples | network | sweep)
    picture = path + ".png"
    drawn = draw_sweep_of_s(run.handoff, rows, picture) if field == "s" else draw_sweep(field, rows, picture)
    print(f"wrote {path}.json" + (f" and {picture}" if drawn else ""))


def export(args, images, labels):
    """Write the samples in the layout of the ADM suite (uint8 NHWC as arr_0, labels as arr_1) and as PNG files."""
    try:
        if args.export:
            with whole_file(args.export) as file:
                np.savez(file, images.numpy(), np.array(labels))
        if args.export_png:
            os.makedirs(args.export_png, exist_ok=True)
            for i, image in enumerate(images.numpy()):
                Image.fromarray(image).save(os.path.join(args.export_png, f"{i:06d}.png"))
    except OSError as error:
        raise UserError(f"cannot export: {error}") from None


# ------------------------------------------------------------------------------------------ pictures

def draw_loss_by_logsnr(bound, path, bins=24):
    """Draw the errors of eps and of v against log-SNR: where in the schedule the model is weak."""
    logsnr = bound["logsnr"].flatten()
    edges = torch.linspace(logsnr.min(), logsnr.max(), bins + 1)
    bin_of = torch.bucketize(logsnr, edges[1:-1])
    figure, axis = pyplot().subplots(figsize=(6.4, 3.6))
    for key, name in (("eps_mse", "ε"), ("v_mse", "v")):
        values = [bound[key].flatten()[bin_of == b] for b in range(bins)]
        filled = [b for b in range(bins) if len(values[b])]
        centres = ((edges[1:] + edges[:-1]) / 2)[filled]
        axis.plot(centres, [values[b].mean() for b in filled], "o-", markersize=3, label=f"error of {name}")
    axis.set(xlabel="log-SNR λ  (clean →)", ylabel="error", yscale="log",
             title="Loss by log-SNR: half the area under ε's curve is the bound's diffusion term, in nats")
    axis.title.set_fontsize(9)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save_figure(figure, path, dpi=110)


def draw_nearest(samples, yardstick, path, pairs=24):
    """Draw the samples that are nearest to a training image, each with that image at its right."""
    distance, nearest = nearest_of(samples["features"], yardstick.train["features"])
    closest = distance.argsort()[:pairs]
    tiles = []
    for i in closest.tolist():
        tiles.append(samples["images"][i].permute(2, 0, 1).float() / 127.5 - 1)
        tiles.append(yardstick.source.image(int(yardstick.train["indices"][nearest[i]])))
    save_picture(grid(torch.stack(tiles), 8), path)


def draw_comparison(rows, curves, path, columns=12):
    """Draw samples [(title, images)], a row for each run. Below them draw curves [(title, points)]: the distance
    against images seen, if there are any."""
    rows, curves = ([(label(title, i), shown) for i, (title, shown) in enumerate(part, 1)] for part in (rows, curves))
    figure, axes = pyplot().subplots(
        len(rows) + bool(curves), figsize=(9, 1.0 * len(rows) + (3 if curves else 0)),
        height_ratios=[1] * len(rows) + [3] * bool(curves), squeeze=False)
    for axis, (title, images) in zip(axes[:, 0], rows):
        axis.imshow(np.asarray(grid(images[:columns].permute(0, 3, 1, 2).float() / 127.5 - 1, columns)))
        axis.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    for title, points in curves:
        axes[-1, 0].plot(*zip(*points), marker="o", label=title)
    if curves:
        axes[-1, 0].set(xlabel="images seen", ylabel="Fréchet distance, train", yscale="log")
        axes[-1, 0].grid(alpha=0.3, which="both")
        axes[-1, 0].legend()
    save_figure(figure, path, dpi=130)


def draw_sweep(field, rows, path):
    """Draw table 9: distance against inception score, or against the setting if there is no score.

    Return False if there are no distances to draw.
    """
    rows = [row for row in rows if "fd_train" in row]
    if not rows:
        return False
    figure, axis = pyplot().subplots(figsize=(5.6, 4))
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
    save_figure(figure, path, dpi=110)
    return True


def draw_sweep_of_s(handoff, rows, path):
    """Draw two scores against s, on made and on real low-res images. Return False if there are none to draw."""
    reference = "fd_held_out" if "fd_held_out" in rows[0] else "fd_train"
    labels = {reference: "Fréchet distance", "read_rate": "read rate", "is": "inception score"}
    keys = [key for key in labels if key in rows[0]][:2]
    if not keys:
        return False
    figure, axes = pyplot().subplots(1, len(keys), figsize=(4.5 * len(keys), 3.4), squeeze=False)
    for axis, key in zip(axes[0], keys):
        for name in ("made", "real"):
            chosen = [row for row in rows if row["low_res"] == name and key in row]
            axis.errorbar([row["s"] for row in chosen], [row[key] for row in chosen],
                          [row.get(key + "_pm", 0) for row in chosen], marker="o", capsize=2,
                          label=f"{name} low-res images")
        axis.set(xlabel=f"s ({handoff})", ylabel=labels[key])
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    save_figure(figure, path, dpi=110)
    return True
