"""The command line of sample.py: flags, checks, what a sheet shows, its files. evaluate.py shares flags and checks."""
import argparse
import dataclasses
import math
import os
import sys

import numpy as np
import torch

from cascade import HANDOFFS
from config import make_low_schedule, make_schedule
from data import turned_back
from plumbing import UserError
from plumbing.captions import NOT_TEXT, cut, open_text, tidy
from plumbing.files import check_result
from plumbing.pictures import Film, Playback, captioned, grid, label, save_gif, save_picture, side_by_side
from plumbing.runs import check_memory, image_bytes, run_of
from plumbing.settings import Parser, add_fields, as_typed, check_range, override
from plumbing.t5 import Encoder, check_moved

OVERRIDES = ("sampler", "guidance", "noise_param", "clip_x", "precision", "text_encoder")
ONE_A_STAGE = ("sampler", "guidance", "noise_param", "clip_x", "steps")   # of these a cascade takes one or one a stage
BATCH = 64                                                                # images that are drawn at once
PRETRAINED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pretrained")
DEFAULT, DEFAULT_TEXT = "glyphs64", "glyphs64_text"                       # of these without RUN; the second: captions
QUICK_STEPS = 10                                                          # sampling steps without RUN


# ------------------------------------------------------------------------------------------ flags

def parse(argv, stage=0):
    """Parse the command line of sample.py, as stage `stage` of a cascade sees it. Raises UserError."""
    parser = Parser(prog="sample.py", usage="sample.py [RUN ...] [any flag below]",
                    description="Draw images from a trained run, or from the runs of a cascade.")
    parser.add_argument("runs", nargs="*", type=run_of, metavar="RUN", help="folder of a run; for a cascade all, "
                        f"the lowest first (default: pretrained/{DEFAULT}, with captions {DEFAULT_TEXT})")
    parser.add_argument("--n", type=int, help="images of each class or caption (default 4); for a run that has "
                        "neither, images in all (default 32)")
    parser.add_argument("--labels", help="classes by name or number, separated by commas (default: the first 36)")
    text = parser.add_argument("--text", action="append", type=tidy, help="for a model with text: a caption; repeat "
                               "it for more captions")
    parser.add_argument("--prompts", metavar="FILE", help="for a model with text: a file, one caption a line")
    negative = parser.add_argument("--negative", metavar="TEXT", type=tidy, help="caption that guidance leads away "
                                   "from (default: none)")
    text.may_be_empty = negative.may_be_empty = True
    parser.add_argument("--portrait", action="store_true", help="upright images, from a run with --portrait")
    parser.add_argument("--lowest-idx", type=int, choices=(0, 1), default=1, help="see sample() (default 1)")
    parser.add_argument("--seed", dest="first_seed", type=int, default=0, help="another seed draws other images "
                        "(default 0)")
    parser.add_argument("--levels", action="store_true", help="show every level of a nested model, the lowest at the "
                        "left (the stages of a cascade are always shown)")
    parser.add_argument("--handoff", choices=HANDOFFS, help="for a cascade: what a stage gives to the next")
    parser.add_argument("--s", type=float, action="append", help="for a cascade: noise of the handoff, 0 to 1; give it "
                        "once, or once for each handoff")
    parser.add_argument("--out", default="samples.png", help="PNG to write (default samples.png)")
    parser.add_argument("--gif", help="GIF to write as well: of the sampling; of a video, which plays")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--compile", action="store_true", help="torch.compile and CUDA graphs: a minute to start, then "
                        "faster on a GPU")
    add_settings(parser)
    words, counts = words_of(argv, stage)
    args = parser.parse_args(words)
    args.is_first = not args.runs                                         # no RUN: the first picture of a new reader
    args.runs = args.runs or [default_run(args)]
    if args.is_first and not hasattr(args, "sample_steps"):
        args.sample_steps = QUICK_STEPS
    if wrong := counts - {len(args.runs)}:
        raise UserError(f"{len(args.runs)} runs, but settings for {max(wrong)} stages: want one, or one for each")
    check_range("seed", args.first_seed)
    if args.n is not None:
        check_range("n", args.n)
    for option, path, ending in (("--out", args.out, ".png"), ("--gif", args.gif, ".gif")):
        if path:
            check_result(path, option, ending)
    return args


def default_run(args):
    """Return the folder of the weights that come with the project. Raises UserError if it is not there."""
    captions = any(option is not None for option in (args.text, args.prompts, args.negative))
    folder = os.path.join(PRETRAINED, DEFAULT_TEXT if captions else DEFAULT)
    if not os.path.isdir(folder):
        raise UserError(f"no RUN is given, and there are no weights in {folder}; train a model first (python train.py)")
    return os.path.relpath(folder)


def add_settings(parser):
    """Add the flags that change a run's own settings of sampling. The result has only those that are given."""
    parser.add_argument("--steps", type=int, dest="sample_steps", default=argparse.SUPPRESS,
                        help="steps an image, with two network evaluations each under guidance (default: the run's)")
    add_fields(parser, OVERRIDES, "settings of the run to change; for a cascade one, or one a stage: --guidance 5,1")


def given_settings(args):
    """Return {field of Config: value} of the settings that the command line gives. Raises UserError."""
    given = {name: value for name, value in vars(args).items() if name in (*OVERRIDES, "sample_steps")}
    check_range("sample_steps", given.get("sample_steps", 1), "--steps")
    return given


def words_of(argv, stage):
    """Return (the command line for this stage of a cascade, {the numbers of values given with commas}).

    "--steps 24,12" becomes "--steps 24" for stage 0 and "--steps 12" for stage 1.
    """
    choices = {}                                                          # position of a word -> the word of each stage
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:].replace("-", "_") in ONE_A_STAGE:
            at, value = (i, value) if equals else (i + 1, argv[i + 1] if i + 1 < len(argv) else "")
            if "," in value:
                choices[at] = [f"{flag}={v}" if equals else v for v in value.split(",")]
    words = [choices[i][min(stage, len(choices[i]) - 1)] if i in choices else word for i, word in enumerate(argv)]
    return words, {len(values) for values in choices.values()}


def apply_settings(argv, configs):
    """Return the config of each stage, changed by its part of the command line. Raises UserError."""
    changed = []
    for stage, config in enumerate(configs):
        args = parse(argv, stage)
        changed.append(with_settings(config, given_settings(args), args.runs[stage]))
    return changed


def with_settings(config, given, run):
    """Return the config of `run` with the given settings in place. Raises UserError."""
    check_moved(config.text_encoder, given.get("text_encoder", config.text_encoder), run)
    return override(config, **given)


# ------------------------------------------------------------------------------------------ cascades

def parse_handoffs(args):
    """Return (handoff, handoff_times) of a cascade, (None, []) of a single run. Raises UserError.

    handoff_times: for each handoff the time s of its noise, [s, ...]; zeros for "clean".
    """
    count = len(args.runs) - 1
    if not count:
        if args.handoff or args.s:
            raise UserError("--handoff and --s are for the stages of a cascade: give their runs, the lowest first")
        return None, []
    if not args.handoff:
        raise UserError(f"{len(args.runs)} runs are a cascade: say --handoff {', '.join(HANDOFFS)} (evaluate.py "
                        "compares runs)")
    if args.handoff == "clean":
        if args.s:
            raise UserError("--handoff clean has no noise: leave out --s")
        return "clean", [0.0] * count
    if not args.s or len(args.s) not in (1, count):
        raise UserError(f"--handoff {args.handoff}: say with --s how much noise, once or {count} times")
    for s in args.s:
        check_range("s", s)
    return args.handoff, args.s * (count if len(args.s) == 1 else 1)


def check_cascade(configs, names, handoff, handoff_times, lowest_idx=1):
    """Check that these stages, or this single run, can be sampled with these options. Raises UserError."""
    check_chain(configs, names)
    check_levels(configs, names, handoff, handoff_times)
    for stage, (config, name) in enumerate(zip(configs, names)):
        is_last = stage == len(configs) - 1
        stop = handoff_times[stage] if handoff == "truncated" and not is_last else 0.0
        check_student(config, name, lowest_idx if is_last else 1, stop)


def check_chain(configs, names):
    """Check that each stage fits the one below it. Raises UserError with the first fault. Lowest stage first."""
    if configs[0].low_size:
        raise UserError(f"{names[0]}: a super-resolution model cannot come first; give the run of the low-res images "
                        "before it")
    t = torch.linspace(0, 1, 11)
    for low, high, low_name, name in zip(configs, configs[1:], names, names[1:]):
        if not high.low_size:
            raise UserError(f"{name}: not a super-resolution model, so it takes nothing from {low_name}")
        if high.low_size != low.size:
            raise UserError(f"{name} goes from {high.low_size[0]}x{high.low_size[1]}, {low_name} makes "
                            f"{low.size[0]}x{low.size[1]}")
        if high.portrait != low.portrait:
            raise UserError(f"{name} and {low_name}: one knows upright images (portrait), the other does not")
        if high.class_names != low.class_names:
            raise UserError(f"{name} and {low_name} do not have the same classes")
        if low.outer_channels:
            raise UserError(f"{low_name}: a nested model has its levels inside; it is no stage of a cascade")
        if not torch.allclose(make_schedule(low)(t), make_low_schedule(high)(t)):
            raise UserError(f"{name} was trained on noise of another schedule than that of {low_name} (schedule, "
                            "noise_d, logsnr_min, logsnr_max)")


def check_levels(configs, names, handoff, handoff_times):
    """Check that each stage was trained on the noise level of its handoff. Raises UserError."""
    for s, config, name in zip(handoff_times, configs[1:], names[1:]):
        noisy = s > 0 and handoff != "clean"
        if noisy and not config.aug_noise:
            raise UserError(f"{name} was trained with no noise on its low-res images (aug_noise 0): give it --s 0, or "
                            "--handoff clean")
        if not noisy and config.aug_noise == 1:
            raise UserError(f"{name} was trained with no low-res images without noise (aug_noise 1): give it --s above "
                            "0")


def check_student(config, name, lowest_idx=1, stop=0.0):
    """Check that a distilled run (distill.py) is sampled only at the times of its steps. Raises UserError."""
    steps = config.distilled_steps
    if steps and (config.sample_steps != steps or config.sampler == "ddpm" or lowest_idx != 1):
        raise UserError(f"{name} was distilled to {steps} steps of ddim (or stochastic): leave out --steps, --sampler "
                        "ddpm and --lowest-idx 0")
    if steps and stop * steps % 1:
        raise UserError(f"{name} was distilled to {steps} steps: it can be truncated at a multiple of 1/{steps} only")


# ------------------------------------------------------------------------------------------ classes and captions

def parse_labels(text, config):
    """Read "A,7" as class numbers. A part is looked up as a name first, then as a number. Raises UserError."""
    numbers = []
    for part in text.split(","):
        if part in config.class_names:
            numbers.append(config.class_names.index(part))
        elif part.isdecimal() and len(part) < 9 and int(part) < config.num_classes:
            numbers.append(int(part))
        else:
            known = ", ".join(config.class_names[:40]) + (", ..." if len(config.class_names) > 40 else "")
            what = as_typed(part) or "with an empty name"
            raise UserError(f"--labels {what}: this run knows {known or 'no classes'}")
    return numbers


def choose_captions(args, configs):
    """Return the captions to draw: those of the command line, else the run's examples. Return None for runs without
    text. Raises UserError.
    """
    readers = [config for config in configs if config.text_encoder]
    if not readers:
        for option in ("text", "prompts", "negative"):
            if getattr(args, option) is not None:
                raise UserError(f"--{option}: {args.runs[-1]} was trained without text"
                                + ("; it knows --labels" if configs[-1].num_classes else ""))
        return None
    if not configs[0].text_encoder:
        raise UserError(f"{args.runs[0]} was trained without text, a stage above it with: its images would be of "
                        "anything")
    if args.labels:
        raise UserError(f"--labels {args.labels}: {args.runs[-1]} was trained with text; say it with --text")
    captions = (args.text or []) + (read_prompts(args.prompts) if args.prompts is not None else [])
    if args.negative and all(config.evaluations == 1 for config in readers):
        raise UserError("--negative: without guidance nothing leads away from it; want --guidance above 1")
    for caption in [*captions, args.negative or ""]:
        if NOT_TEXT.search(caption):
            raise UserError(f"--text {caption!r}: holds characters that are not text")
    return captions or list(configs[-1].examples or readers[0].examples) or [""]


def read_prompts(path):
    """Read the captions of a file, one a line. Raises UserError."""
    try:
        with open_text(path) as file:
            captions = [tidy(line) for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"--prompts {path}: {error.strerror}") from None
    if not captions:
        raise UserError(f"--prompts {path}: no line with text")
    return captions


def make_conditions(config, labels, device, captions=None, portrait=False, encoder=None):
    """Return the conditions of n images as sample() takes them: a dict of tensors with n rows.

    labels     n class numbers, -1 = none
    captions   for a model with text: n captions, "" = none
    encoder    an Encoder. If not given it is opened, and it says how many captions it cuts
    """
    if config.text_encoder:
        captions = captions or [""] * len(labels)
        if not encoder:
            encoder = Encoder(config, device)
            for line in cut(list(dict.fromkeys(captions)), encoder):
                print(line, file=sys.stderr)
        batches = [encoder(captions[i:i + BATCH]) for i in range(0, len(captions), BATCH)]
        cond = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    else:
        cond = {"label": torch.tensor(labels, device=device)}
    if config.portrait:
        cond["portrait"] = torch.full((len(labels),), int(portrait), device=device)
    return cond


# ------------------------------------------------------------------------------------------ sheets

@dataclasses.dataclass
class Sheet:
    """What a sheet shows: in each row images of one class or of one caption. Or images without either."""
    columns: int
    labels: list                         # one an image; -1 = no class
    captions: list | None = None         # one an image
    names: list | None = None            # one a row

    def picture(self, images):
        """Arrange the images (N, 3, H, W) as a Pillow picture."""
        if self.captions:
            return captioned(images, self.columns, self.names, blocks=max(1, min(3, 12 // self.columns)))
        rows = len(self.names or [])
        blocks = math.ceil(rows ** 0.5 if self.columns == 1 else rows / 12)                     # one column: a square
        return grid(images, self.columns, self.names, max(1, blocks))


def make_sheet(config, columns, classes=(), captions=None, n=64):
    """Return a Sheet with `columns` images of each caption or class. Without either it has n images."""
    if captions:
        names = [label(caption, f"caption {i}") for i, caption in enumerate(captions, 1)]
        return Sheet(columns, [-1] * (columns * len(captions)), [c for c in captions for _ in range(columns)], names)
    if classes:
        names = [label(config.class_names[c], c) if config.class_names else str(c) for c in classes]
        return Sheet(columns, [c for c in classes for _ in range(columns)], names=names)
    return Sheet(8, [-1] * n)


def choose_sheet(args, config, captions):
    """Return the Sheet that the command line asks for. config is that of the last stage. Raises UserError."""
    if args.levels and not config.outer_channels:
        raise UserError(f"--levels: {args.runs[0]} is not of a nested model")
    if args.portrait and not config.portrait:
        raise UserError(f"--portrait: {args.runs[-1]} was trained without upright images")
    classes = parse_labels(args.labels, config) if args.labels else range(min(36, config.num_classes))
    images = (args.n or 4) * max(1, len(captions or classes))
    frames = 240 * config.size[0] * config.size[1] if args.gif else 0     # of an image: 40, as bytes and as pictures
    check_memory(images * (image_bytes(config) + frames), f"--n {args.n or 4}: {images:,} images of "
                 f"{config.size[0]}x{config.size[1]}")
    if args.is_first and classes and not (args.n or args.labels):         # quickly drawn: one of each
        return Sheet(9, list(classes))
    return make_sheet(config, args.n or 4, classes, captions, n=args.n or 32)


def open_film(args, config, predictions):
    """Return the Film that --gif asks for, None without it: of images how they are drawn; a video plays."""
    if not args.gif:
        return None
    return Playback(config.counts[0], config.size[1]) if config.counts[0] > 1 else Film(predictions)


def write_pictures(args, sheet, images, film=None):
    """Write the sheet as PNG and the Film, if any, as GIF. images: [(N, 3, H, W), ...] of the stages, lowest first."""
    def arrange(stages):
        stages = [turned_back(stage) for stage in stages] if args.portrait else stages
        return sheet.picture(side_by_side(stages[::-1]))

    if not all(torch.isfinite(stage).all() for stage in images):
        raise UserError(f"{', '.join(args.runs)}: the images hold values that are not finite; no picture is written")
    frames = [arrange(stages) for stages in film.frames(images)] if film else []
    try:
        save_picture(arrange(images), args.out)
        if film:
            save_gif(frames, args.gif, film.last)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture: {error}") from None
    if not args.is_first:
        print(f"wrote {args.out} and {args.gif}" if film else f"wrote {args.out}")
        return
    also = f" and {args.gif}" if film else ""
    program, folder = sys.argv[0], os.path.dirname(sys.argv[0])
    more = '--text "a white 7 on red" --n 8' if sheet.captions else "--labels A,B,7 --n 8 --gif letters.gif"
    print(f"wrote {os.path.abspath(args.out)}{also}, drawn by {args.runs[0]}\nnext: python {program} {more}\n"
          f"or train a model of your own: python {os.path.join(folder, 'train.py')}")


# ------------------------------------------------------------------------------------------ before sampling

def derive_seed(seed, *use):
    """Derive a seed for another use of the same seed, named by integers: a later stage, or the noise of a handoff.

    PyTorch's CPU generator reads only the low 32 bits of a seed. If a stage added a large number to the seed instead,
    two stages could start from the same noise.
    """
    return int(np.random.SeedSequence((seed, *use)).generate_state(1)[0])


def image_seeds(seed, n, first=0):
    """Return n image seeds of the set `seed`, beginning at image number `first`.

    Sets of up to a million images share no seed if their `seed` is below 4294. Above, an image seed would need more
    than the 32 bits that the generator reads, and a set could be another one moved by some images. So we hash it.
    """
    if seed < 4294:
        return [seed * 1_000_003 + i for i in range(first, first + n)]
    return [derive_seed(seed, 0, 0, i) for i in range(first, first + n)]


def compile_model(model, device):
    """Compile the network to one graph. On CUDA, record its kernels once and replay them (CUDA graphs): to launch many
    small kernels from Python takes longer than to run them.

    Every replay writes its result to the same memory, but guidance needs two results at once. So return copies.
    """
    graph = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else "default")

    def call(z, logsnr, cond):
        v = graph(z, logsnr, cond)
        return [level.clone() for level in v] if isinstance(v, list) else v.clone()
    return call


def count_predictions(configs, handoff, handoff_times, lowest_idx):
    """Count the predictions of x of each stage. A truncated stage has fewer; the last has one more if it goes on to
    t = 0.
    """
    counts = [max(1, round(config.sample_steps * (1 - stop))) if handoff == "truncated" else config.sample_steps
              for config, stop in zip(configs, handoff_times)]
    return [*counts, configs[-1].sample_steps + 1 - lowest_idx]


def what_is_drawn(config):
    """Return "images of 64x64", or "videos of 8 x 32x32"."""
    kind = f"videos of {config.counts[0]} x " if config.counts[0] > 1 else "images of "
    return f"{kind}{config.size[0]}x{config.size[1]}"


def introduce(n, configs, predictions, precisions, device, why):
    """Print what will be drawn, a line for each stage."""
    for config, count, precision in zip(configs, predictions, precisions):
        guidance = f"{config.guidance:g}" if config.guidable else "none, as there are no classes"
        print(f"{n} {what_is_drawn(config)}, {config.sampler}, {config.sample_steps} steps, "
              f"guidance {guidance}: {count * config.evaluations} evaluations each, on {device} ({why}), {precision}")
