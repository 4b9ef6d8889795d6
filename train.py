"""Train a diffusion model: the losses and the loop.

Paper: simple diffusion, section 3.2 (multiscale loss), appendix A (loss), appendix B (optimisation).
Matryoshka Diffusion, 3.3 (growing level by level, mixed resolutions). Cascaded Diffusion, 3 (augmented low-res images).
Read before: schedule.py, uvit.py or unet.py, text.py, config.py. Read after: sample.py.

    python train.py                                      letters at 64 x 64, about ten minutes on two cores
    python train.py --data photos/ --size 64             your own folder of images
    python train.py --preset imagenet128_unet --data imagenet/train --dry-run
    python train.py --resume runs/glyphs64               go on, exactly where it stopped
    python train.py --preset glyphs64_nested --grow-from runs/glyphs16      a 64 level around a trained 16 level
    python train.py --preset glyphs64_text               captions instead of classes
    python train.py --preset glyphs64_sr                 super-resolution 16 -> 64, the second stage of a cascade
    torchrun --nproc_per_node 8 train.py --preset ...    data parallel; the batch stays the preset's
    torchrun --nproc_per_node 8 train.py --preset ... --shard     with weights, moments and averages split (shard.py)

Everything random is a function of (seed, step, place in the batch): a resumed run is the same run, to the bit on a CPU,
and two processes see the noise that one process would. Only dropout, and which images --mixed-ratio leaves without a
high level, depend on the process.

Shapes: x, z, v, eps (B, 3, H, W); t, logsnr (B,).
"""
import contextlib
import copy
import dataclasses
import functools
import itertools
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from plumbing import cost
from plumbing import shard
from cascade import augment, downsample, super_resolution_loss
from config import (PRESETS, Config, build_model, make_low_schedule, make_optimizer, make_schedule, make_schedules,
                    numbers)
from plumbing.settings import Parser, add_fields, override
from plumbing.images import BrokenImage
from data import Glyphs, batches, open_run
from plumbing import UserError
from nested_unet import check_inner, grow, mixed_rows, nested_loss, pyramid
from plumbing.runs import (CHECKPOINT, SHARDED, Interrupt, Log, any_rank, autocast, broadcast, choose_precision,
                           cores, has_checkpoint, load_weights, main_program, new_folder, read_checkpoint,
                           save_checkpoint, sharded_steps, start_processes)
from sample import class_sheet
from schedule import diffuse, eps_from_v, v_from_x_eps
from plumbing.t5 import Encoder, check_moved


# ------------------------------------------------------------------------------------------ the losses

def multiscale_mse(error, base):
    """Section 3.2: sum over s in {base, ..., d} of (1/s) mean(D_s[error]^2). error (B, C, H, W) -> scalar.

    D_s averages the image down to s x s; it is linear, so it may act on the difference. Most values of a large image
    are fine detail, so detail dominates its plain loss; the averages keep the coarse part, and give it weight.
    s runs from the image's own side d down by halves while s >= base. An image that is not square: s = sqrt(H W) / k.
    # Paper: L^{s x s} divides by s^2, the number of pixels; we take the mean over pixels and channels. D is
    # "downsampling", no more; we average, as 3.1 does. Section 5.1 refers to "Figure 6" where it means table 6.
    """
    d, loss, k = (error.shape[-2] * error.shape[-1]) ** 0.5, 0.0, 1
    if not 0 < base <= d:
        raise ValueError(f"multiscale base {base}: want more than 0 and at most the image's side {d:g}")
    while d / k >= base and error.shape[-2] % k == 0 and error.shape[-1] % k == 0:
        loss = loss + F.avg_pool2d(error, k).square().mean() * k / d
        k *= 2
    return loss


def prediction_loss(v, z, x, eps, logsnr, loss="eps_mse", multiscale=0):
    """Appendix A: the network predicts v; its error is measured on eps (w(t) = 1) or on v itself. -> scalar.

    eps_mse = SNR / (1 + SNR) * v_mse, example by example: eps hardly weighs the noisy end, where the image is decided.
    """
    error = v - v_from_x_eps(x, eps, logsnr) if loss == "v_mse" else eps_from_v(z, v, logsnr) - eps
    return multiscale_mse(error, multiscale) if multiscale else error.square().mean()


def simple_loss(model, x, cond, t, eps, schedule, loss="eps_mse", multiscale=0):
    """Appendix A: noise the images to time t, let the network predict, measure. -> scalar. nested_unet.py has the same
    for several levels.

    # Paper: the printed `loss` computes logsnr_t and uses logsnr, predicts v_pred and uses v_t.
    """
    logsnr = schedule(t)                                                  # (B,)
    z = diffuse(x, eps, logsnr)
    return prediction_loss(model(z, logsnr, cond), z, x, eps, logsnr, loss, multiscale)


def make_loss(config, batch):
    """loss_of(model, x, cond, t, [eps, ...]) -> scalar: the loss that this configuration trains with, `batch` at once.

    A super-resolution model finds its low-res images in cond, low_res and aug_logsnr.
    """
    schedule, weights = make_schedule(config), numbers(config.level_weights, ":")
    measure = functools.partial(prediction_loss, loss=config.loss, multiscale=config.multiscale)
    rows = mixed_rows(numbers(config.mixed_ratio, ":"), batch) if config.mixed_ratio else None

    def loss_of(model, x, cond, t, eps):
        if config.outer_channels:
            return nested_loss(model, pyramid(x, config.sizes), cond, t, eps, schedule, measure, weights, rows)
        if config.low_size:
            cond = dict(cond)
            low_res, level = cond.pop("low_res"), cond.pop("aug_logsnr")
            return super_resolution_loss(model, x, low_res, level, cond, t, eps[0], schedule, measure)
        return simple_loss(model, x, cond, t, eps[0], schedule, config.loss, config.multiscale)
    return loss_of


# ------------------------------------------------------------------------------------------ pieces of the loop

def draw(seed, step, places, shapes, device):
    """t (B,), [eps (B, *shape), ...] and u (B,) for the examples at these places of the global batch of this step.

    A generator is seeded anew for each example, so no state has to be saved, and how the batch is split over processes
    does not matter. u ~ U(0, 1) decides whether the example's condition is hidden.
    """
    generator = torch.Generator(device if device.type == "cuda" else "cpu")
    where = generator.device
    t, eps, u = [], [], []
    for place in places:
        state = np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(state >> np.uint64(1)))
        t.append(torch.rand((), generator=generator, device=where))
        u.append(torch.rand((), generator=generator, device=where))
        eps.append([torch.randn(shape, generator=generator, device=where) for shape in shapes])
    eps = [torch.stack(level).to(device) for level in zip(*eps)]          # one for each level, each for itself
    return torch.stack(t).to(device), eps, torch.stack(u).to(device)


def draw_augmentation(seed, step, places, device):
    """(4, B) numbers from U(0, 1) for the low-res images of these examples, by the same rule as `draw`."""
    uniform = [np.random.default_rng((seed, step, place, 1)).random(4, np.float32) for place in places]
    return torch.from_numpy(np.stack(uniform, 1)).to(device)


def conditions(config, batch, hidden, encoder=None):
    """What the model is told of a batch: captions or labels, dropped where `hidden` (B,), and the portrait flag."""
    if encoder:
        cond = encoder(batch["caption"])
        cond["text_mask"] = cond["text_mask"] & ~hidden[:, None]
    else:
        cond = {"label": torch.where(hidden, -1, batch["label"].to(hidden.device))}
    if config.portrait:
        cond["portrait"] = batch["portrait"].to(hidden.device)
    return cond


def augmented(config, x, noise, low_schedule, uniform):
    """The low-res images of x as a super-resolution model is trained on them, and their level: cascade.py's `augment`.

    noise: of their size; uniform: from draw_augmentation.
    """
    s, *draws = uniform
    return augment(downsample(x, config.low_size), s, noise, low_schedule, draws, config.aug_noise, config.aug_blur,
                   (config.blur_low, config.blur_high))


def waits(device):
    """Is the host done with a step only when the device is? Looking at a number then costs nothing."""
    return device.type == "cpu"


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, after the optimiser's step.

    # Paper: decay only. Short runs want less memory at first: decay starts at 1/10 and grows to its value.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ------------------------------------------------------------------------------------------ the program

# What may change without making it another run.
ON_RESUME = ("steps", "log_every", "sample_every", "save_every", "keep_every", "workers", "sampler", "sample_steps",
             "guidance", "noise_param", "clip_x", "compile", "text_encoder", "channels_last", "accumulate", "recompute",
             "shard", "if_unsaved")


SET_ELSEWHERE = ("num_classes", "class_names", "examples", "distilled_from", "distilled_steps", "distill_weight",
                 "guidance_max")                                          # no flags of this program


def parse():
    parser = Parser(prog="train.py", description="Train a diffusion model. Without arguments: letters at 64 x 64.")
    parser.add_argument("--preset", help="named settings: " + ", ".join(PRESETS) + " (default glyphs64)")
    parser.add_argument("--out", help="folder of the run (default runs/PRESET)")
    parser.add_argument("--resume", metavar="RUN", help="folder of a run to go on with")
    parser.add_argument("--auto-resume", action="store_true", help="with --out: go on with the run there, or begin "
                        "it if there is none: for jobs that are started again")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dry-run", action="store_true", help="print settings, size and cost; train nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="of --dry-run: the cost of each of N processes")
    add_fields(parser, [f.name for f in dataclasses.fields(Config) if f.name not in SET_ELSEWHERE])
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    for option in ("resume", "preset", "out", "grow_from"):               # an empty variable of a script starts nothing
        if getattr(args, option, None) == "":
            raise UserError(f"--{option.replace('_', '-')} is empty")
    if args.resume and (args.preset or args.out or args.auto_resume):
        raise UserError("--resume goes on with a run as it is: without --preset, --out and --auto-resume")
    if args.auto_resume and not args.out:
        raise UserError("--auto-resume: say with --out which run that is")
    if args.world_size is not None and (args.world_size < 1 or not args.dry_run):
        raise UserError(f"--world-size {args.world_size}: want 1 or more, and --dry-run (torchrun decides otherwise)")
    return args, given


def configure(args, given):
    """(config, checkpoint or None)."""
    if args.auto_resume and has_checkpoint(args.out):
        args.resume = args.out
    if args.resume:
        pieces, plain = sharded_steps(args.resume), os.path.exists(os.path.join(args.resume, CHECKPOINT))
        state = read_checkpoint(args.resume, old=True) if plain or not pieces else None
        if pieces and (state is None or pieces[-1] > state["step"]):      # the newer one
            state = shard.newest(args.resume)
        if given.get("precision") == "auto":                              # was decided
            del given["precision"]
        if state["config"].distilled_from:
            raise UserError(f"--resume {args.resume}: was distilled; distill.py goes on with it")
        if args.preset:                                                   # --auto-resume: the same command, again
            asked = override(PRESETS[known(args.preset)], **given)
            ours = (*ON_RESUME, *SET_ELSEWHERE, "precision", "withhold")  # these are decided as the run begins
            other = [f.name for f in dataclasses.fields(Config) if f.name not in ours
                     and getattr(asked, f.name) != getattr(state["config"], f.name)]
            if other:
                raise UserError(f"--auto-resume: {args.out} is another run than this command's: its "
                                f"--{other[0].replace('_', '-')} is {getattr(state['config'], other[0])!r}, not "
                                f"{getattr(asked, other[0])!r} (to go on with it as it is: --resume {args.out})")
        new = override(state["config"], **given)
        check_moved(state["config"].text_encoder, new.text_encoder, args.resume)
        other = sorted(k for k in given if k not in ON_RESUME and getattr(new, k) != getattr(state["config"], k))
        if other:
            raise UserError(f"--resume goes on with the same run: --{other[0].replace('_', '-')} would make it another "
                            f"(allowed: {', '.join(ON_RESUME)})")
        return new, state
    return override(PRESETS[known(args.preset or "glyphs64")], **given), None


def known(preset):
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: want one of {', '.join(PRESETS)}")
    return preset


def read_inner(config):
    """3.3: the checkpoint of the run that the inner network grows from, checked against this configuration."""
    path = config.grow_from
    state = read_checkpoint(path)
    run = state["config"]
    if not config.outer_channels:
        raise UserError(f"--grow-from {path}: only a nested model grows, and --outer-channels is empty")
    if run.class_names != config.class_names:
        raise UserError(f"--grow-from {path}: its classes ({len(run.class_names)}) are not those of {config.data} "
                        f"({len(config.class_names)})")
    if (run.text_encoder, run.text_length) != (config.text_encoder, config.text_length):
        raise UserError(f"--grow-from {path}: it reads {run.text_length if run.text_encoder else 0} tokens of "
                        f"{run.text_encoder or 'no text'}, this run {config.text_length if config.text_encoder else 0} "
                        f"of {config.text_encoder or 'none'}")
    if run.sizes != config.sizes[1:]:
        sizes = [" + ".join(f"{h}x{w}" for h, w in levels) for levels in (run.sizes, config.sizes[1:])]
        raise UserError(f"--grow-from {path}: that run is of {sizes[0]}, the inner levels are {sizes[1]}")
    t = torch.linspace(0, 1, 11)
    for theirs, ours in zip(make_schedules(run), make_schedules(config)[1:]):
        if not torch.allclose(theirs(t), ours(t)):
            raise UserError(f"--grow-from {path}: its schedule is another (check schedule, noise_d, logsnr_min, "
                            f"logsnr_max, level_power)")
    with torch.device("meta"):
        model = build_model(config)
    for weights in (state["model"], state["ema"]):
        try:
            check_inner(model, weights)
        except (ValueError, AttributeError, TypeError) as error:          # the last two: it holds no tensors
            raise UserError(f"--grow-from {path}: not the inner network of this model ({error})") from None
    return state


def real_low_res(source, config, labels, first=0):
    """(B, 3, h, w) averages of images of these classes, each class's own in their order, from example `first` on: what
    a super-resolution model draws from before it has a stage below. Raises UserError for a class without images.

    labels: or captions, for a model with text; of each the first image that has it.
    """
    if config.text_encoder:
        images = {}
        for i in range(len(source)):
            if (caption := source.caption(i)) in labels and caption not in images:
                try:
                    images[caption] = downsample(source.image(i)[None], config.low_size)
                except BrokenImage:
                    continue
            if len(images) == len(set(labels)):
                return torch.cat([images[caption] for caption in labels])
        missing = next(caption for caption in labels if caption not in images)
        raise UserError(f"{config.data}: no image with the caption {missing!r} that can be read")
    images, place = [], dict.fromkeys(labels, first)
    for label in labels:
        for _ in range(len(source)):
            i, place[label] = place[label] % len(source), place[label] + 1
            if label in (-1, source.label(i)):
                try:
                    images.append(downsample(source.image(i)[None], config.low_size))
                    break
                except BrokenImage:
                    continue
        else:
            raise UserError(f"{config.data}: no image of class {(*config.class_names, 'any')[label]} that can be read")
    return torch.cat(images)


def dry_run(config, device, why, world):
    print(f"{'device':24s} {world} x {device.type} ({why})")
    for field in dataclasses.fields(config):
        if field.name not in ("class_names", "examples"):
            print(f"{field.name:24s} {getattr(config, field.name)}")
    cost.report(config, world)


def resolve(config, state, args, device, world):
    """(config with classes and precision decided, the source of its data or None)."""
    if not config.data and not args.dry_run:
        raise UserError(f"--preset {args.preset or 'glyphs64'}: say which folder of images to train on with --data")
    with torch.device("meta"):
        build_model(config)                                               # sizes that do not fit: known before any work
    each = args.world_size or world
    if config.batch % (each * config.accumulate):
        raise UserError(f"--batch {config.batch}: does not divide over {each} processes"
                        + f" and {config.accumulate} parts (--accumulate)" * (config.accumulate > 1))
    if config.mixed_ratio:
        try:
            mixed_rows(numbers(config.mixed_ratio, ":"), config.batch // each // config.accumulate)
        except ValueError as error:
            raise UserError(f"--mixed-ratio: {error}, over {each} processes") from None
    if config.shard and config.keep_every:
        raise UserError("--keep-every: a sharded run keeps its last two checkpoints, no more")
    if config.shard and config.if_unsaved == "go-on":
        raise UserError("--if-unsaved go-on: not with --shard; a sharded run stops when it cannot be saved")
    if config.shard and config.channels_last == "on":
        raise UserError("--channels-last on: not with --shard, whose pieces are in the usual order")
    source = open_run(config) if config.data else None
    if config.withhold and source and not isinstance(source, Glyphs):
        if getattr(args, "withhold", False):
            raise UserError(f"--withhold: only drawn scenes have pairs to leave out, not {config.data}")
        config = dataclasses.replace(config, withhold=False)              # the preset's
    if state is None and source:
        config = dataclasses.replace(config, num_classes=0 if config.text_encoder else len(source.classes),
                                     class_names=tuple(source.classes))
    if config.text_encoder and source:
        captions = filter(None, map(source.caption, range(len(source))))
        examples = tuple(dict.fromkeys(itertools.islice(captions, 100)))[:12]
        if not examples:
            raise UserError(f"--text-encoder {config.text_encoder}: {config.data} has no captions (captions.jsonl, or "
                            "a .txt beside each image)")
        config = dataclasses.replace(config, examples=examples)
    if state and tuple(source.classes) != config.class_names:
        raise UserError(f"--resume {args.resume}: the classes of {config.data} are no longer those of the run")
    if state and state.get("examples") not in (None, len(source)):        # None: a checkpoint of before
        raise UserError(f"--resume {args.resume}: {config.data} had {state['examples']:,} examples and now has "
                        f"{len(source):,}; their order would be another")
    precision = choose_precision(config.precision, device)
    return dataclasses.replace(config, precision=broadcast(precision, world)), source           # for all alike


def main():
    args, given = parse()
    config, state = configure(args, given)
    rank, world, device, why = start_processes(args.device)
    config, source = resolve(config, state, args, device, world)
    inner = read_inner(config) if config.grow_from and state is None else None
    encoder = None
    if config.text_encoder and not args.dry_run:
        encoder = Encoder(config, device, cached=True)
        encoder.check(source)
    # Decided here and not kept: the run may go on elsewhere.
    workers = config.workers if config.workers >= 0 else max(1, min(8, cores() // (2 * world)))
    compiled = config.compile == "on" or (config.compile == "auto" and device.type == "cuda")
    split = config.shard and world > 1                                    # a single process has all pieces
    channels_last = not split and (config.channels_last == "on"
                                   or (config.channels_last == "auto" and device.type == "cuda"))
    if args.dry_run:
        here = dataclasses.replace(config, workers=workers, compile="on" if compiled else "off",
                                   channels_last="on" if channels_last else "off")
        return dry_run(here, device, why, args.world_size or world) if rank == 0 else None
    if broadcast(begun := state["step"] if state else 0, world) != begun:
        raise UserError(f"{args.resume or args.out}: process {rank} finds step {begun} there, the first another: do "
                        "they see the same folder?")
    folder = args.resume or (new_folder(args.out, args.preset or "glyphs64", args.auto_resume) if rank == 0 else "")
    folder = broadcast(folder, world)
    interrupt = Interrupt()

    # ---- model, averaged model, optimiser
    torch.manual_seed(config.seed)                                        # the same weights on every process
    # To be split, it is whole on the first process alone, in the machine's memory.
    with torch.device(("meta" if rank else "cpu") if split else device):
        model = build_model(config)
    model = model.to(memory_format=torch.channels_last) if channels_last else model
    ema, optimizer = copy.deepcopy(model).eval().requires_grad_(False), None
    step = images = 0
    if rank == 0 or not split:
        optimizer = make_optimizer(model, config)
        if inner:                                                         # the lower levels begin where that run ended
            grow(model, inner["model"])
            grow(ema, inner["ema"])                                       # soon forgotten: the average starts anew
        if state and "model" in state:
            load_weights(model, state["model"], args.resume)
            load_weights(ema, state["ema"], args.resume)
            load_weights(optimizer, state["optimizer"], args.resume)
    if split:
        model, ema, optimizer = shard.split(model, ema, optimizer, state and "model" in state, config, device, compiled)
    if state and "model" not in state:
        shard.load(state, model, ema, optimizer)
    if state:
        step, images = state["step"], state["images"]
    last_saved = f"the checkpoint of step {step} is in {folder}" if state else "no checkpoint was written yet"
    state = inner = None                                                  # copied by now: not held twice
    if config.recompute:
        shard.recompute(model)
    # `handle` trains, `model` is saved, averaged and sampled: its keys know nothing of compile or DDP.
    handle = torch.compile(model) if compiled and not split else model
    if world > 1 and not split:
        handle = torch.nn.parallel.DistributedDataParallel(handle, gradient_as_bucket_view=True)
        torch._dynamo.config.optimize_ddp = not config.recompute          # it cannot cut the graph within such blocks

    shapes = [(3, *size) for size in config.sizes]
    if config.low_size:
        shapes, low_schedule = shapes + [(3, *config.low_size)], make_low_schedule(config)
    share = config.batch // world
    parts = [slice(i, i + share // config.accumulate) for i in range(0, share, share // config.accumulate)]
    loss_of = make_loss(config, share // config.accumulate)
    places = range(rank * share, (rank + 1) * share)                      # of the global batch, this process's
    log = Log(folder, config, active=rank == 0, first_step=step)
    log.say(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.size[0]}x{config.size[1]}, "
            f"{len(source):,} examples, {len(source.classes)} classes; {world} x {device.type} ({why}), "
            f"{config.precision}" + ", sharded" * split + (f"; from step {step}" if step else ""))
    for path, reason in getattr(source, "skipped", []):
        log.say(f"skipped {path}: {reason}")
    broken = set(getattr(source, "skipped", []))

    def save(failed=False):
        """Was it saved? Raises UserError if not and the run is to stop for it."""
        saved = True
        try:
            if config.shard:
                shard.save(folder, model, ema, optimizer, step, images, config, len(source), "failed" * failed)
            elif rank == 0:
                save_checkpoint(folder, model, ema, optimizer, step, images, config, len(source),
                                "failed.pt" if failed else CHECKPOINT)
        except UserError as error:
            if config.if_unsaved == "stop" or stop or step == config.steps:
                raise
            print(f"\n{error}; going on", file=sys.stderr)
            saved = False
        log.draw()
        return broadcast(saved, world)                                    # nobody leaves while the first one writes

    def draw_samples():
        if rank == 0 or split:                                            # split, it takes all to draw
            many = 4 if step == config.steps else 2
            lying = open_run(config, portrait=False)                      # the sheets show none that stand upright
            low_res = functools.partial(real_low_res, lying, config) if config.low_size else None
            try:
                sheet = class_sheet(ema, config, device, config.precision, many, config.seed, low_res, encoder=encoder)
            except UserError as error:                                    # no low-res image: the run is worth more
                return log.say(f"no sheet of samples: {error}")
            if split:
                ema.reshard()                                             # after a backward pass it would do so itself
            if rank == 0:
                try:
                    sheet.save(os.path.join(folder, f"samples_{step:07d}.png"))
                except OSError as error:                                  # a full disk: the run is worth more
                    log.say(f"samples_{step:07d}.png: {error.strerror}")

    # ---- the loop
    stream = batches(source, config.batch, config.seed, step, rank, world, workers, config.flip)
    model.train()
    since, since_step, stop = time.time(), step, False
    failed_at = torch.full((), -1, device=device)                         # the first step that was not finite
    while step < config.steps:
        batch = next(stream)
        for message in batch["broken"]:
            if message not in broken:
                broken.add(message)
                print(f"\nskipped {message}", file=sys.stderr)
        if batch["image"] is None:
            raise UserError(f"--data {config.data}: no image left that can be read ({len(broken)} skipped)")
        x = batch["image"].to(device, non_blocking=True)                  # (B, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        t, eps, u = draw(config.seed, step, places, shapes, device)
        cond = conditions(config, batch, u < config.cond_drop, encoder)
        if config.low_size:                                               # in float32: it is data, not network
            uniform = draw_augmentation(config.seed, step, places, device)
            cond["low_res"], cond["aug_logsnr"] = augmented(config, x, eps[1], low_schedule, uniform)
        torch.manual_seed(config.seed * 1_000_003 + step * world + rank)  # for dropout: no state to be saved

        lr = config.lr * min(1, (step + 1) / max(1, config.warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1)
        value = 0.0
        for part in parts:                                                # their gradients add up
            # DDP's processes meet once, at the end. (Split, they meet each time: whole gradients would not fit.)
            alone = handle.no_sync if part is not parts[-1] and hasattr(handle, "no_sync") else contextlib.nullcontext
            with alone(), autocast(config.precision, device):
                loss = loss_of(handle, x[part], {name: told[part] for name, told in cond.items()}, t[part],
                               [level[part] for level in eps]) / len(parts)
            loss.backward()
            value = value + loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        grad_norm = grad_norm.full_tensor() if split else grad_norm
        # From the first gradient on that is not finite the optimiser does nothing (as torch.amp's scaler has it), so
        # the weights stay as they were. The host looks when it must wait anyway: nothing here waits for the device.
        failed_at = torch.where((failed_at < 0) & ~torch.isfinite(grad_norm), step, failed_at)
        optimizer.found_inf = (failed_at >= 0).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, images = step + 1, images + config.batch

        stop = any_rank(interrupt.signal is not None, world)
        due = (step % config.save_every == 0 or (config.keep_every and step % config.keep_every == 0)
               or step == config.steps or stop)
        if (waits(device) or due or step % config.log_every == 0) and failed_at >= 0:
            step, images = failed_at.item(), failed_at.item() * config.batch
            if rank == 0:
                kept = os.path.join(SHARDED, "failed") if config.shard else "failed.pt"
                print(f"\nstep {step}: the gradient is not finite; stopped, {last_saved}; the weights before this step "
                      f"go to {os.path.join(folder, kept)}", file=sys.stderr)
            save(failed=True)
            return 1
        update_ema(ema, model, config.ema, step - 1)                      # after the step, or it lags by one
        if step % config.log_every == 0 or step == config.steps:
            if world > 1:
                dist.all_reduce(value)
                value = value / world
            pace = (step - since_step) * config.batch / (time.time() - since)
            log.step(step, images, value.item(), grad_norm.item(), lr, pace)
            since, since_step = time.time(), step
        if due and save():
            last_saved = f"the checkpoint of step {step} is in {folder}"
        if stop:
            log.say(f"stopped at step {step}; go on with: python train.py --resume {folder}")
            return 128 + (interrupt.signal or 0)
        if config.sample_every and step % config.sample_every == 0 and step < config.steps:
            draw_samples()
            since, since_step = time.time(), step
    draw_samples()
    counted = f"; {len(broken)} files skipped" if broken else ""
    sheet = f"samples_{step:07d}.png, " * os.path.exists(os.path.join(folder, f"samples_{step:07d}.png"))
    log.say(f"done: {folder}/{sheet}loss.png, {SHARDED if config.shard else CHECKPOINT}{counted}")
    log.say("draw more with: " + f"python shard.py {folder}, then " * config.shard + f"python sample.py {folder}")


if __name__ == "__main__":
    main_program(main)
