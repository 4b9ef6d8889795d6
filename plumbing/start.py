"""How a training run starts: the command line, the run to resume, to grow or to start from, the data, the folder.

Each function takes one step of train.py's main() before its loop, and raises UserError with one line for a mistake.
"""
import argparse
import dataclasses
import itertools
import os
import sys

import torch

from config import PRESETS, Config, build_model, make_levels, make_schedules, numbers, parts
from data import Glyphs, ImageFolder, batches
from dwt import wavelet_levels
from nested_unet import grow, mixed_rows
from plumbing import Damaged, UserError, cost, shard
from plumbing.captions import faults as caption_faults
from plumbing.files import hold, keep_aside, writable_folder
from plumbing.runs import (CHECKPOINT, PREVIOUS, SHARDED, broadcast, check_memory, check_model, check_whole,
                           choose_precision, cores, has_checkpoint, image_bytes, is_pretrained, load_optimizer,
                           load_weights, plain_checkpoints, processes, read_checkpoint, run_of, sharded_steps)
from plumbing.settings import Parser, add_fields, check_range, override
from plumbing.sources import add_accept_flag, check_unseen, located, open_run, open_source, same_data
from plumbing.t5 import Encoder, check_moved
from precondition import band_rms

# Settings that may change when a run is resumed.
ON_RESUME = ("steps", "log_every", "held_out", "held_out_every", "sample_every", "save_every", "keep_every", "workers",
             "sampler", "sample_steps", "guidance", "noise_param", "clip_x", "compile", "text_encoder", "channels_last",
             "accumulate", "recompute", "shard", "if_unsaved", "data")    # data: the same in another place
# Settings without a flag in train.py: the data or distill.py set them.
SET_ELSEWHERE = ("num_classes", "class_names", "examples", "distilled_from", "distilled_steps", "distill_weight",
                 "guidance_max", "band_rms", "data_id")
# Settings that --init-from takes from the weights. The first part makes the network and its schedule what they are.
OF_NETWORK = ("model", "size", "patching", "base_channels", "emb_channels", "channel_mult", "num_res_blocks",
              "num_transformer_blocks", "attn_resolutions", "attn_layers", "num_heads", "text_encoder", "text_channels",
              "text_length", "text_layers", "text_pooled", "transformer_resolutions", "portrait", "outer_channels",
              "outer_blocks", "outer_patching", "frames", "low_size", "low_upsample", "level_power", "schedule",
              "noise_d", "noise_d_high", "logsnr_min", "logsnr_max", "precondition")
OF_MODEL = (*OF_NETWORK, "loss", "multiscale", "cond_drop", "dropout", "dropout_from_resolution",
            "transformer_dropout", "level_weights", "mixed_ratio", "aug_noise", "aug_blur", "blur_low", "blur_high",
            "sampler", "sample_steps", "guidance", "noise_param", "clip_x")


# ------------------------------------------------------------------------------------------ the command line

def parse():
    """Read the flags. Return (args, {field of Config: value} for those that were given)."""
    parser = Parser(prog="train.py", usage="train.py [--preset PRESET | --resume RUN] [--out OUT] [any flag below]",
                    description="Train a diffusion model. Without arguments: letters at 64 x 64, ten minutes. With "
                    "--dry-run: show every setting of the preset.")
    of = lambda laptop: ", ".join(name for name, preset in PRESETS.items() if bool(preset.data) == laptop)
    parser.add_argument("--preset", help=f"named settings (default glyphs64). A laptop's: {of(True)}. The papers', "
                        f"which need --data: {of(False)}")
    parser.add_argument("--out", help="folder of the run (default runs/PRESET; with --init-from runs/NAME-tuned)")
    parser.add_argument("--resume", type=run_of, metavar="RUN", help="folder of the run to continue")
    parser.add_argument("--auto-resume", action="store_true", help="with --out: continue the run there, or start it if "
                        "there is none; for jobs that are restarted")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dry-run", action="store_true", help="print settings, size and cost; do not train")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: the cost for each of N processes")
    add_accept_flag(parser)
    add_fields(parser, [f.name for f in dataclasses.fields(Config) if f.name not in SET_ELSEWHERE])
    parser.add_argument("word", metavar="WORD", nargs="?", help=argparse.SUPPRESS)          # a word without its flag
    args = parser.parse_args()
    if args.word:
        flag = ("--preset" if args.word in PRESETS else "--resume" if has_checkpoint(args.word) else
                "--data" if os.path.exists(args.word) else "--FLAG")
        raise UserError(f"{args.word}: want {flag} {args.word}")
    for option in {"grow_from", "init_from"} & vars(args).keys():
        setattr(args, option, run_of(getattr(args, option)))
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    if args.resume and (args.preset or args.out or args.auto_resume):
        raise UserError("--resume continues a run as it is: leave out --preset, --out and --auto-resume")
    if args.auto_resume and not args.out:
        raise UserError("--auto-resume: name the run's folder with --out")
    if args.world_size is not None:
        check_range("world_size", args.world_size)
        if not args.dry_run:
            raise UserError(f"--world-size {args.world_size}: want --dry-run, too (torchrun sets it otherwise)")
    return args, given


def read_command_line():
    """Return (args, config, checkpoint). checkpoint is None for a new run."""
    args, given = parse()
    if args.auto_resume and has_checkpoint(args.out):
        args.resume = args.out
    if not args.resume:
        return args, override(base_of(args, given), **given), None
    if has_checkpoint(args.resume) and not args.dry_run and is_first():
        args.lock = hold(args.resume)                                     # before it is read: its owner may go on
    checkpoint = (newest_whole if args.auto_resume else newest_checkpoint)(args.resume)
    saved = checkpoint["config"]
    if given.get("precision") == "auto":                                  # the run has settled it
        del given["precision"]
    if saved.distilled_from:
        raise UserError(f"--resume {args.resume}: a distilled run; distill.py continues it")
    if args.preset:                                                       # --auto-resume: the same command once more
        check_same_run(args, override(preset_of(args), **given), saved)
    config = located(override(saved, **given), args, f"--resume {args.resume}")
    check_moved(saved.text_encoder, config.text_encoder, args.resume)
    if config.steps < checkpoint["step"]:
        raise UserError(f"--steps {config.steps}: {args.resume} is at step {checkpoint['step']} already; --steps "
                        "counts from the beginning of the run")
    changed = sorted(k for k in given if k not in ON_RESUME and getattr(config, k) != getattr(saved, k))
    if changed:
        raise UserError(f"--resume continues the same run: --{changed[0].replace('_', '-')} would make it another "
                        f"(allowed: {', '.join(ON_RESUME)})")
    return args, config, checkpoint


def is_first():
    """Return True in rank 0, which the processes of a run do not yet know from each other."""
    return processes() == 1 or os.environ["RANK"] == "0"


def preset_of(args):
    """Return the Config of --preset."""
    name = args.preset or "glyphs64"
    if name not in PRESETS:
        raise UserError(f"--preset {name}: want one of {', '.join(PRESETS)}")
    return PRESETS[name]


def base_of(args, given):
    """Return the settings of a new run before the flags: the preset's. With --init-from and no --preset, those of the
    model are the weights' own, and data and optimisation are the default preset's."""
    config = preset_of(args)
    if args.preset or "init_from" not in given:
        return config
    saved = read_checkpoint(given["init_from"])["config"]
    return dataclasses.replace(config, **{name: getattr(saved, name) for name in OF_MODEL})


def newest_checkpoint(run):
    """Read the newest checkpoint of a run, checkpoint.pt or the sharded one."""
    if is_pretrained(run):
        raise UserError(f"--resume {run}: these are weights only; start a new run from them with --init-from {run}")
    steps, plain = sharded_steps(run), os.path.exists(os.path.join(run, CHECKPOINT))
    checkpoint = read_checkpoint(run, old=True) if plain or not steps else None
    if steps and (checkpoint is None or steps[-1] > checkpoint["step"]):
        checkpoint = shard.newest(run)
    return checkpoint


def newest_whole(run):
    """Read the newest checkpoint of a run that is whole: of a job that is restarted, nobody is there to choose.

    Its "damaged" is {path: the line about it} of those that are not. Raises UserError if none is whole, or if the
    machine cannot read one that may be whole.
    """
    whole, damaged = [], {}
    usual, kept = [], []                                                  # a kept one may be newer than previous.pt
    for name in plain_checkpoints(run):
        (usual if name in (CHECKPOINT, PREVIOUS) else kept).append((os.path.join(run, name), whole_plain, (run, name)))
    sharded = [(os.path.join(run, SHARDED, f"{step:07d}"), whole_shards, (run, step))
               for step in reversed(sharded_steps(run))]
    for candidates in (usual, kept, sharded):
        for path, read, args in candidates:
            try:
                whole.append(read(*args))
                break
            except Damaged as error:
                damaged[path] = str(error)
    if not whole:
        raise UserError(f"{run}: no checkpoint is whole, nothing was changed: {'; '.join(damaged.values())}")
    return dict(max(whole, key=lambda state: state["step"]), damaged=damaged)


def whole_plain(run, name):
    """Read the checkpoint of this name after a look at all that a run needs to go on. Raises UserError."""
    state = read_checkpoint(run, name, old=True)
    check_whole(state)
    return state


def whole_shards(run, step):
    """Describe the sharded checkpoint of this step after a look at all of its bytes and values. Raises UserError."""
    state = shard.describe(run, step)
    shard.check(state)
    shard.check_values(state)
    return state


def set_aside(checkpoint):
    """Rename the damaged checkpoints that newest_whole passed over: what is saved next must not replace them. Say in
    one line from which one the run goes on, if it is not the usual one."""
    said = []
    for path in checkpoint.get("damaged", ()):
        said.append(f"{path} is damaged and kept as {keep_aside(path)}; ")
    name = os.path.basename(checkpoint["path"])
    if said or name.endswith(".pt") and name != CHECKPOINT:
        print(f"{''.join(said)}going on from {checkpoint['path']}, step {checkpoint['step']}", file=sys.stderr)


def check_same_run(args, asked, saved):
    """Refuse --auto-resume if the command asks for other settings than the run in --out has."""
    settled = {*ON_RESUME, *SET_ELSEWHERE, "precision", "withhold"}       # the last two are settled as a run starts
    if not hasattr(args, "data"):                                         # then the preset's, which must be the run's
        settled.remove("data")
    for field in dataclasses.fields(Config):
        asked_for, theirs = getattr(asked, field.name), getattr(saved, field.name)
        if field.name in ("grow_from", "init_from"):                      # one folder may be written in several ways
            asked_for, theirs = os.path.realpath(asked_for), os.path.realpath(theirs)
        if field.name not in settled and asked_for != theirs:
            raise UserError(f"--auto-resume: {args.out} is another run than this command's: its "
                            f"--{field.name.replace('_', '-')} is {getattr(saved, field.name)!r}, not "
                            f"{getattr(asked, field.name)!r} (to continue it as it is: --resume {args.out})")


# ------------------------------------------------------------------------------------------ settling what is open

def resolve(config, checkpoint, args, device, world):
    """Settle what the data and the machine decide. Return (config, source, initial).

    source is the training data, None in a dry run without any. initial is the checkpoint that --grow-from or
    --init-from names, or None.
    """
    if not config.data and not args.dry_run:
        raise UserError(f"--preset {args.preset or 'glyphs64'}: name the folder of training images with --data")
    if args.dry_run:
        check_model(config, 0, device)                                    # sizes that do not fit: found before any work
    else:
        check_room(config, device, world)
    check_batch(config, args.world_size or world)
    check_sharding(config)
    source = open_run(config) if config.data else None
    check_held_out(config, source, checkpoint)
    if args.out and checkpoint is None:
        check_out(args.out, source)
    if source:
        config = fit_to_data(config, source, checkpoint, args)
    precision = choose_precision(config.precision, device)
    config = dataclasses.replace(config, precision=broadcast(precision, world))                 # the same on every rank
    initial = None
    if checkpoint is None and (config.grow_from or config.init_from):
        initial = read_initial(config) if config.init_from else read_inner(config)
    if checkpoint is None and config.precondition == "bands" and not args.dry_run:
        config = dataclasses.replace(config, band_rms=broadcast(measure_bands(config, source, initial), world))
    return config, source, initial


def check_batch(config, world):
    """Check that the batch divides over the processes and their micro-batches. Raises UserError."""
    if config.batch % (world * config.accumulate):
        parts = f" and {config.accumulate} parts (--accumulate)" if config.accumulate > 1 else ""
        raise UserError(f"--batch {config.batch}: does not divide over {world} processes{parts}")
    if config.mixed_ratio:
        try:
            mixed_rows(numbers(config.mixed_ratio, ":"), config.batch // world // config.accumulate)
        except ValueError as error:
            raise UserError(f"--mixed-ratio: {error}, over {world} processes") from None


def check_room(config, device, world, n=64):
    """Check that the memory holds the training state and the images of a step, before either is there.

    n: images that are drawn at once to measure their bands. Activations come on top: see --dry-run.
    """
    check_model(config, 20 / (world if config.shard else 1), device)
    images = max(n, config.batch // world)
    check_memory(images * image_bytes(config), f"--batch {config.batch}, {images:,} images of "
                 f"{config.size[0]}x{config.size[1]} at once")


def check_out(out, source):
    """Refuse to make a run of a folder of training images: as a run it would no longer count as data."""
    if not isinstance(source, ImageFolder):
        return
    run, root, *folders = map(os.path.realpath, [out, source.path, *{os.path.dirname(file) for file in source.files}])
    if os.path.commonpath([root, run]) == root and any(os.path.commonpath([run, folder]) == run for folder in folders):
        raise UserError(f"--out {out}: there are training images in it; choose another folder, which may be in it")


def check_sharding(config):
    """Refuse what a sharded run cannot do."""
    if config.shard and config.keep_every:
        raise UserError("--keep-every: a sharded run keeps its last two checkpoints, no more")
    if config.shard and config.if_unsaved == "go-on":
        raise UserError("--if-unsaved go-on: not with --shard; a sharded run stops when it cannot be saved")
    if config.shard and config.channels_last == "on":
        raise UserError("--channels-last on: not with --shard, whose shards are in the usual order")


def fit_to_data(config, source, checkpoint, args):
    """Take classes and example captions from the data; for a resumed run check that they are still the same."""
    if config.withhold and not isinstance(source, Glyphs):
        if getattr(args, "withhold", False):
            raise UserError(f"--withhold: only drawn scenes have pairs to leave out, not {config.data}")
        config = dataclasses.replace(config, withhold=False)              # the preset's
    if checkpoint is None:
        config = dataclasses.replace(config, num_classes=0 if config.text_encoder else len(source.classes),
                                     class_names=tuple(source.classes))
    if config.text_encoder:
        captions = filter(None, map(source.caption, range(len(source))))
        examples = tuple(dict.fromkeys(itertools.islice(captions, 100)))[:12]
        if not examples:
            raise UserError("; ".join([f"--text-encoder {config.text_encoder}: {config.data} has no captions "
                                       "(captions.jsonl, or a .txt beside each image)", *caption_faults(source)]))
        config = dataclasses.replace(config, examples=examples)
    then = checkpoint.get("examples") if checkpoint and not args.accept_changed_data else None
    return same_data(config, source, count=then)


def measure_bands(config, source, initial, n=64):
    """Return config.band_rms: the root mean square of n training images in each band of each level.

    Weights from another run keep the numbers that they were trained with. At least 1/255, half a step between two grey
    levels: F must not become huge where none of the n images has detail, and another one has.
    """
    if config.init_from:
        return initial["config"].band_rms
    batch = next(batches(source, n, config.seed, workers=0))
    x = batch["image"]
    if x is None:
        raise UserError(f"--data {config.data}: no image left that can be read, of {len(source):,}; the first one "
                        f"tried is {batch['broken'][0]}")
    patchings = [config.outer_patching] * (len(config.sizes) - 1) + [config.patching]
    rms = [",".join(f"{max(s, 1 / 255):.4g}" for s in band_rms(level, wavelet_levels(patching)))
           for level, patching in zip(make_levels(config, x), patchings)]
    return "/".join(rms[:1] + parts(initial["config"].band_rms) if initial else rms)


# Steps to come from which compile "auto" is on with CUDA. Reasoned, not measured: there was no GPU yet. Compiling takes
# a minute for a small network, and may save a third of a step. A small preset may take 10 ms a step: then 20,000 steps
# save a minute. The steps of a large network are longer and pay sooner. The small presets have 10,400 steps at most,
# the papers' 400,000 or more. The entry "compile" of benchmarks/gpu_day.py measures it.
COMPILE_FROM = 20_000


def resolve_machine(config, device, world, first_step):
    """Decide each "auto" for this machine. Not saved with the run: it may continue on another one.

    world: all processes. torchrun says how many of them share this machine's cores; without it all do.
    Workers: on a CPU half of the cores train. With CUDA all cores but one may draw or decode images. Of 16 cores, 15
    draw 6,250 scenes of 64 px a second (2.4 ms each): 780 steps of 8 images, more than a card takes of a small preset.
    At 128 px (5.5 ms each) it is 2,700 scenes, 21 steps of 128 images.
    """
    cuda = device.type == "cuda"
    sharded = config.shard and world > 1                                  # a single process holds every shard
    on = lambda setting, worth: "on" if setting == "on" or (setting == "auto" and worth) else "off"
    here = os.environ.get("LOCAL_WORLD_SIZE", "")                         # of torchrun, or left by another job
    here = int(here) if here.isdecimal() and 0 < int(here) <= world else world
    free = min(16, cores() // here - 1) if cuda else min(8, cores() // (2 * here))
    return dataclasses.replace(config, workers=config.workers if config.workers >= 0 else max(1, free), shard=sharded,
                               compile=on(config.compile, cuda and config.steps - first_step >= COMPILE_FROM),
                               channels_last="off" if sharded else on(config.channels_last, cuda))


def dry_run(config, device, why, world):
    """Print the settings and what a step costs."""
    print(f"{'device':24s} {world} x {device.type} ({why})")
    for field in dataclasses.fields(config):
        if field.name not in ("class_names", "examples"):
            print(f"{field.name:24s} {getattr(config, field.name)}")
    cost.report(config, world)


# ------------------------------------------------------------------------------------------ encoder, folder, weights

def open_encoder(config, source, device):
    """Return the text encoder, or None for a model without text. Say what is wrong with the captions. Every caption
    must have its embedding."""
    if not config.text_encoder:
        return None
    encoder = Encoder(config, device, cached=True)
    encoder.check(source)
    if shard.rank() == 0:
        for fault in caption_faults(source, encoder):
            print(f"{config.data}: {fault}", flush=True)
    return encoder


def open_held_out(config, source, device, n=32):
    """Return (batch, encoder): n images that training never sees, and the encoder of their captions.

    They are unseen scenes, or come from the folder --held-out. (None, None) if there are none.
    """
    if not config.held_out_every or not (config.held_out or isinstance(source, Glyphs)):
        return None, None
    held_out = open_unseen_folder(config) if config.held_out else open_run(config, held_out=True)
    config = dataclasses.replace(config, data=config.held_out or config.data)                   # its cache of captions
    encoder = open_encoder(config, held_out, device)
    batch = next(batches(held_out, n, config.seed, workers=0))
    for message in (*(f"{path}: {reason}" for path, reason in getattr(held_out, "skipped", [])), *batch["broken"]):
        if shard.rank() == 0:
            print(f"skipped {message}", file=sys.stderr)
    if batch["image"] is None:
        raise UserError(f"--held-out {config.held_out}: no image in it can be read")
    return batch, encoder


def open_unseen_folder(config):
    """Open the folder --held-out. Raises UserError if it does not fit the training data."""
    check_unseen(config.data, config.held_out)
    held_out = open_source(config.held_out, config.size, portrait=config.portrait)
    if not config.text_encoder and tuple(held_out.classes) != config.class_names:
        raise UserError(f"--held-out {config.held_out}: its classes are not those of {config.data}")
    return held_out


def check_held_out(config, source, checkpoint):
    """Refuse a --held-out that cannot be used."""
    if config.held_out and isinstance(source, Glyphs):
        raise UserError(f"--held-out {config.held_out}: not with {config.data}, whose unseen scenes are drawn")
    if config.held_out and not os.path.isdir(config.held_out):
        raise UserError(f"--held-out {config.held_out}: no such folder of images")
    if config.held_out and not config.held_out_every and checkpoint is None:
        raise UserError(f"--held-out {config.held_out}: never used, as --held-out-every is 0")


def run_folder(args, checkpoint, rank, world):
    """Make the folder of a new run, or return that of the resumed one; the same on every rank."""
    step = checkpoint["step"] if checkpoint else 0
    if broadcast(step, world) != step:
        raise UserError(f"{args.resume or args.out}: rank {rank} finds step {step} there, rank 0 another: do they see "
                        "the same folder?")
    folder = args.resume
    if checkpoint and rank == 0:
        set_aside(checkpoint)
    if not folder and rank == 0:
        default = "glyphs64"
        if getattr(args, "init_from", None):
            default = os.path.basename(os.path.abspath(args.init_from)) + "-tuned"
        folder = new_folder(args.out, args.preset or default, args.auto_resume)
        args.lock = hold(folder)
        check_free(folder)                                                # once more: another one may have begun it
    return broadcast(folder, world)


def new_folder(out, preset, again=False):
    """Return the folder of a new run: --out if it holds none yet, or the first free runs/PRESET, runs/PRESET-2, ...

    again: accept a folder whose run was killed before its first checkpoint.
    """
    if out is None:
        out, number = os.path.join("runs", preset), 2
        while not make_first(out):
            out, number = os.path.join("runs", f"{preset}-{number}"), number + 1
    elif is_pretrained(out):
        raise UserError(f"--out {out}: holds pretrained weights; choose another folder")
    check_free(out)
    if os.path.exists(os.path.join(out, "log.csv")) and not again:      # it may just have begun: do not take it over
        raise UserError(f"--out {out}: holds a run without a checkpoint yet; if it was killed, begin it anew with "
                        "--auto-resume, or choose another folder")
    return writable_folder(out, "--out")


def check_free(out):
    """Refuse a folder that holds a run."""
    if has_checkpoint(out):
        raise UserError(f"--out {out}: holds a run already; continue it with --resume {out} or choose another folder")


def make_first(folder):
    """Make the folder. Return False if it exists: another program may have made it a moment ago."""
    try:
        os.makedirs(folder)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    return True


def read_inner(config):
    """MDM 3.3: read the run that the inner network grows from, and check that it fits this configuration."""
    path = config.grow_from
    state = read_checkpoint(path)
    run = state["config"]
    if not config.outer_channels:
        raise UserError(f"--grow-from {path}: only a nested model grows, and --outer-channels is empty")
    if run.class_names != config.class_names:
        raise UserError(f"--grow-from {path}: its classes ({len(run.class_names)}) are not those of {config.data} "
                        f"({len(config.class_names)})")
    if (run.text_encoder, run.text_length) != (config.text_encoder, config.text_length):
        tokens = lambda c: f"{c.text_length if c.text_encoder else 0} tokens of {c.text_encoder or 'no text'}"
        raise UserError(f"--grow-from {path}: it reads {tokens(run)}, this run {tokens(config)}")
    if run.shapes != config.shapes[1:]:
        sizes = [" + ".join(f"{f'{c // 3} x ' if c > 3 else ''}{h}x{w}" for c, h, w in levels)
                 for levels in (run.shapes, config.shapes[1:])]
        raise UserError(f"--grow-from {path}: that run is of {sizes[0]}, the inner levels are {sizes[1]}")
    t = torch.linspace(0, 1, 11)
    for theirs, ours in zip(make_schedules(run), make_schedules(config)[1:]):
        if not torch.allclose(theirs(t), ours(t)):
            raise UserError(f"--grow-from {path}: its schedule is another (check schedule, noise_d, logsnr_min, "
                            "logsnr_max, level_power)")
    if run.precondition != config.precondition:
        raise UserError(f"--grow-from {path}: that run has --precondition {run.precondition}, this one "
                        f"{config.precondition}")
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config, band_rms=run.band_rms and "1/" + run.band_rms))
    for weights in (state["model"], state["ema"]):
        try:
            check_inner(model, weights)
        except (ValueError, AttributeError, TypeError) as error:          # the last two: values that are no tensors
            raise UserError(f"--grow-from {path}: not the inner network of this model ({error})") from None
    return state


def read_initial(config):
    """Read the weights of --init-from and check that they are of this network. The classes may be others."""
    path = config.init_from
    state = read_checkpoint(path)
    if config.grow_from:
        raise UserError(f"--init-from {path}: not with --grow-from, which has weights for the inner network")
    if state["config"].distilled_from:
        raise UserError(f"--init-from {path}: a distilled model, which knows only the times of its steps; start from "
                        "the model that it was distilled from")
    for name in OF_NETWORK:
        theirs, ours = getattr(state["config"], name), getattr(config, name)
        if theirs != ours:
            raise UserError(f"--init-from {path}: another network: its --{name.replace('_', '-')} is {theirs!r}, not "
                            f"{ours!r}")
    return state


def initialise(model, initial, config):
    """Load the EMA weights of --init-from into a new model, in place. Raises UserError if they do not fit.

    Classes are known by their names: an old one keeps its row of the table, a new one keeps its random row.
    """
    weights, names = dict(initial["ema"]), initial["config"].class_names
    for key, table in model.state_dict().items():
        if key.endswith("embed.label.weight") and key in weights:         # (classes + 1, E); the last row: no class
            if weights[key].shape != (len(names) + 1, table.shape[1]) or weights[key].dtype != table.dtype:
                continue                                                  # load_weights says it
            trained = dict(zip(names, weights[key])) | {None: weights[key][-1]}
            weights[key] = torch.stack([trained.get(name, row) for name, row in zip((*config.class_names, None),
                                                                                    table.cpu())])
    load_weights(model, weights, initial["path"])


def check_inner(model, trained):
    """Raise ValueError unless `trained` is the state_dict of a network like model.inner. The error names the keys."""
    wanted = model.inner.state_dict()
    keys = {"missing": sorted(wanted.keys() - trained.keys()),
            "in excess": sorted(trained.keys() - wanted.keys()),
            "of another shape or type": [
                f"{key} {tuple(theirs.shape)} {theirs.dtype} for {tuple(ours.shape)}" for key, ours in wanted.items()
                if (theirs := trained.get(key, ours)).shape != ours.shape or theirs.dtype != ours.dtype]}
    faults = [f"{fault}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
              for fault, names in keys.items() if names]
    if faults:
        raise ValueError("; ".join(faults))


def restore(model, ema, optimizer, checkpoint, initial, machine, device):
    """Load the checkpoint of the resumed run, or the weights of --grow-from or --init-from. With machine.shard, split
    them.

    Return (model, ema, optimizer, step). Before the split only rank 0 holds the whole model.
    """
    if not next(model.parameters()).is_meta:
        if initial and machine.init_from:
            initialise(model, initial, machine)
            ema.load_state_dict(model.state_dict())
        elif initial:
            grow(model, initial["model"])
            grow(ema, initial["ema"])
        if checkpoint and "model" in checkpoint:
            load_weights(model, checkpoint["model"], checkpoint["path"])
            load_weights(ema, checkpoint["ema"], checkpoint["path"])
            load_optimizer(optimizer, checkpoint, checkpoint["path"])
    if machine.shard:
        model, ema, optimizer = shard.split(model, ema, optimizer, machine, device)
    if checkpoint and "model" not in checkpoint:                          # a sharded one
        shard.load(checkpoint, model, ema, optimizer)
    return model, ema, optimizer, checkpoint["step"] if checkpoint else 0
