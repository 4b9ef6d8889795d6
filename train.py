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

Everything random is a function of (seed, step, place in the batch): a resumed run is the same run, to the bit on a CPU,
and two processes see the noise that one process would. Only dropout, and which images --mixed-ratio leaves without a
high level, depend on the process.

Shapes: x, z, v, eps (B, 3, H, W); t, logsnr (B,).
"""
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

from cascade import augment, downsample, super_resolution_loss
from config import (PRESETS, Config, Parser, add_fields, build_model, make_low_schedule, make_schedule, make_schedules,
                    numbers, override)
from data import BrokenImage, Glyphs, UserError, batches, open_run
from nested_unet import check_inner, grow, mixed_rows, nested_loss, pyramid
from runs import (Interrupt, Log, any_rank, autocast, choose_precision, cores, load_weights, main_program, new_folder,
                  read_checkpoint, save_checkpoint, start_processes)
from sample import class_sheet
from schedule import diffuse, eps_from_v, v_from_x_eps
from text import Encoder, TextCondition, check_moved


# ------------------------------------------------------------------------------------------ the losses

def multiscale_mse(error, base):
    """Section 3.2: sum over s in {base, ..., d} of (1/s) mean(D_s[error]^2). error (B, C, H, W) -> scalar.

    D_s averages s x s out of the image; it is linear, so it may act on the difference. White noise dominates the plain
    loss of a large image, though all but the coarse part of it is hopeless detail; averages weigh the coarse part up.
    s runs from the image's own side d down by halves while s >= base. For a side that is not square, s = sqrt(H W) / k.
    # Paper: L^{s x s} divides by s^2, the number of pixels; we take the mean over pixels and channels.
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


def rates(model, config):
    """Parameters for the optimiser; those that read the text (text.py) as a group of their own, with a lower rate.

    Before the network knows what to do with a word, the word is noise to it: at the full rate the layers that all words
    share learn within a few hundred steps to be silent, and the letters are not found (benchmarks/README.md). A table
    of classes has no such layers.
    """
    reading = {id(p) for module in model.modules() if isinstance(module, TextCondition) for p in module.parameters()}
    groups = [[p for p in model.parameters() if (id(p) in reading) == slow] for slow in (False, True)]
    return [dict(params=groups[0])] + ([dict(params=groups[1], share=config.text_lr)] if groups[1] else [])


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


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, after the optimiser's step.

    # Paper: decay only. Short runs want less memory at first: decay starts at 1/10 and grows to its value.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def describe(config):
    """Parameters, FLOPs and activation bytes of one image, counted on the meta device (no memory, no data)."""
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device("meta"):
        model = build_model(config)
        z, logsnr = [torch.zeros(1, 3, *size) for size in config.sizes], [torch.zeros(1) for _ in config.sizes]
    saved, held = {}, []                                                  # storage -> bytes: views count once

    def keep(tensor):                                                     # what backward will need
        held.append(tensor)                                               # held, so that no address is used again
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        cond = {"low_res": torch.zeros(1, 3, *config.low_size, device="meta")} if config.low_size else {}
        if config.text_encoder:
            shape = (1, config.text_length) + (() if config.text_encoder == "bytes" else (config.text_channels,))
            cond["text"] = torch.zeros(shape, device="meta", dtype=torch.float if len(shape) == 3 else torch.long)
            cond["text_mask"] = torch.ones(shape[:2], device="meta", dtype=torch.bool)
        model(z, logsnr, cond) if config.outer_channels else model(z[0], logsnr[0], cond)
    for parameter in model.parameters():                                  # weights apart
        saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops(), sum(saved.values())


# ------------------------------------------------------------------------------------------ the program

# What may change without making it another run.
ON_RESUME = ("steps", "log_every", "sample_every", "save_every", "keep_every", "workers", "sampler", "sample_steps",
             "guidance", "noise_param", "clip_x", "compile", "text_encoder")


SET_ELSEWHERE = ("num_classes", "class_names", "examples", "distilled_from", "distilled_steps", "distill_weight",
                 "guidance_max")                                          # no flags of this program


def parse():
    parser = Parser(prog="train.py", description="Train a diffusion model. Without arguments: letters at 64 x 64.")
    parser.add_argument("--preset", help="named settings: " + ", ".join(PRESETS) + " (default glyphs64)")
    parser.add_argument("--out", help="folder of the run (default runs/PRESET)")
    parser.add_argument("--resume", metavar="RUN", help="folder of a run to go on with")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--dry-run", action="store_true", help="print settings, size and cost; train nothing")
    add_fields(parser, [f.name for f in dataclasses.fields(Config) if f.name not in SET_ELSEWHERE])
    args = parser.parse_args()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if hasattr(args, f.name)}
    for option in ("resume", "preset", "out", "grow_from"):               # an empty variable of a script starts nothing
        if getattr(args, option, None) == "":
            raise UserError(f"--{option.replace('_', '-')} is empty")
    if args.resume and (args.preset or args.out):
        raise UserError("--resume goes on with a run as it is: without --preset and --out")
    return args, given


def configure(args, given):
    """(config, checkpoint or None)."""
    if args.resume:
        state = read_checkpoint(args.resume)
        if state["config"].distilled_from:
            raise UserError(f"--resume {args.resume}: was distilled; distill.py goes on with it")
        new = override(state["config"], **given)
        check_moved(state["config"].text_encoder, new.text_encoder, args.resume)
        other = sorted(k for k in given if k not in ON_RESUME and getattr(new, k) != getattr(state["config"], k))
        if other:
            raise UserError(f"--resume goes on with the same run: --{other[0].replace('_', '-')} would make it another "
                            f"(allowed: {', '.join(ON_RESUME)})")
        return new, state
    name = args.preset or "glyphs64"
    if name not in PRESETS:
        raise UserError(f"--preset {name}: want one of {', '.join(PRESETS)}")
    return override(PRESETS[name], **given), None


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
    parameters, flops, activations = describe(config)
    gib = 2 ** 30
    print(f"\nparameters               {parameters:,}")
    print(f"forward pass, one image  {flops / 1e9:,.2f} GFLOP (multiply and add counted as two)")
    print(f"training step            {3 * flops * config.batch / 1e12:,.3f} TFLOP (backward counted as two forwards)")
    print(f"memory of the weights    {5 * 4 * parameters / gib:,.2f} GiB (float32: weight, gradient, 2 moments, EMA)")
    print(f"memory of activations    {activations / gib:,.3f} GiB an image in float32, "
          f"{activations * config.batch / world / gib:,.2f} GiB a process")


def resolve(config, state, args, device, world):
    """(config with classes and precision decided, the source of its data or None)."""
    if not config.data and not args.dry_run:
        raise UserError(f"--preset {args.preset or 'glyphs64'}: say which folder of images to train on with --data")
    with torch.device("meta"):
        build_model(config)                                               # sizes that do not fit: known before any work
    if config.batch % world:
        raise UserError(f"--batch {config.batch}: does not divide over {world} processes")
    if config.mixed_ratio:
        try:
            mixed_rows(numbers(config.mixed_ratio, ":"), config.batch // world)
        except ValueError as error:
            raise UserError(f"--mixed-ratio: {error}, over {world} processes") from None
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
    precision = [choose_precision(config.precision, device)]
    if world > 1:
        dist.broadcast_object_list(precision)                             # the first process decides for all
    return dataclasses.replace(config, precision=precision[0]), source


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
    if args.dry_run:
        here = dataclasses.replace(config, workers=workers, compile="on" if compiled else "off")
        return dry_run(here, device, why, world) if rank == 0 else None
    folder = args.resume or (new_folder(args.out, args.preset or "glyphs64") if rank == 0 else "")
    interrupt = Interrupt()

    # ---- model, averaged model, optimiser
    torch.manual_seed(config.seed)                                        # the same weights on every process
    with device:
        model = build_model(config)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(rates(model, config), lr=config.lr, betas=(config.beta1, config.beta2),
                                 eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)
    step = images = 0
    if inner:                                                             # the lower levels begin where that run ended
        grow(model, inner["model"])
        grow(ema, inner["ema"])                                           # soon forgotten: the average starts anew
    if state:
        load_weights(model, state["model"], args.resume)
        load_weights(ema, state["ema"], args.resume)
        load_weights(optimizer, state["optimizer"], args.resume)
        step, images = state["step"], state["images"]
    last_saved = f"the checkpoint of step {step} is in {folder}" if state else "no checkpoint was written yet"
    state = inner = None                                                  # copied by now: not held twice
    # `handle` trains, `model` is saved, averaged and sampled: its keys know nothing of compile or DDP.
    handle = torch.compile(model) if compiled else model
    if world > 1:
        handle = torch.nn.parallel.DistributedDataParallel(handle)

    schedule, shapes = make_schedule(config), [(3, *size) for size in config.sizes]
    if config.low_size:
        shapes, low_schedule = shapes + [(3, *config.low_size)], make_low_schedule(config)
    measure = functools.partial(prediction_loss, loss=config.loss, multiscale=config.multiscale)
    share, weights = config.batch // world, numbers(config.level_weights, ":")
    rows = mixed_rows(numbers(config.mixed_ratio, ":"), share) if config.mixed_ratio else None   # of each process's
    places = range(rank * share, (rank + 1) * share)                      # of the global batch, this process's
    log = Log(folder, config, active=rank == 0, first_step=step)
    log.say(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.size[0]}x{config.size[1]}, "
            f"{len(source):,} examples, {len(source.classes)} classes; {world} x {device.type} ({why}), "
            f"{config.precision}" + (f"; from step {step}" if step else ""))
    for path, reason in getattr(source, "skipped", []):
        log.say(f"skipped {path}: {reason}")
    broken = set(getattr(source, "skipped", []))

    def save():
        if rank == 0:
            save_checkpoint(folder, model, ema, optimizer, step, images, config, len(source))
            log.draw()
        if world > 1:
            dist.barrier()                                                # nobody leaves while the first one writes

    def draw_samples():
        if rank == 0:
            many = 4 if step == config.steps else 2
            lying = open_run(config, portrait=False)                      # the sheets show none that stand upright
            low_res = functools.partial(real_low_res, lying, config) if config.low_size else None
            sheet = class_sheet(ema, config, device, config.precision, many, config.seed, low_res, encoder=encoder)
            sheet.save(os.path.join(folder, f"samples_{step:07d}.png"))

    # ---- the loop
    stream = batches(source, config.batch, config.seed, step, rank, world, workers, config.flip)
    model.train()
    since, since_step = time.time(), step
    while step < config.steps:
        batch = next(stream)
        for message in batch["broken"]:
            if message not in broken:
                broken.add(message)
                print(f"\nskipped {message}", file=sys.stderr)
        if batch["image"] is None:
            raise UserError(f"--data {config.data}: no image left that can be read ({len(broken)} skipped)")
        x = batch["image"].to(device, non_blocking=True)                  # (B, 3, H, W)
        t, eps, u = draw(config.seed, step, places, shapes, device)
        cond = conditions(config, batch, u < config.cond_drop, encoder)
        torch.manual_seed(config.seed * 1_000_003 + step * world + rank)  # for dropout: no state to be saved

        lr = config.lr * min(1, (step + 1) / max(1, config.warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1)
        if config.low_size:                                               # in float32: it is data, not network
            uniform = draw_augmentation(config.seed, step, places, device)
            low_res, level = augmented(config, x, eps[1], low_schedule, uniform)
        with autocast(config.precision, device):
            if config.outer_channels:
                loss = nested_loss(handle, pyramid(x, config.sizes), cond, t, eps, schedule, measure, weights, rows)
            elif config.low_size:
                loss = super_resolution_loss(handle, x, low_res, level, cond, t, eps[0], schedule, measure)
            else:
                loss = simple_loss(handle, x, cond, t, eps[0], schedule, config.loss, config.multiscale)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if not torch.isfinite(grad_norm + loss.detach()):
            print(f"\nstep {step}: loss {loss.item():g}, gradient norm {grad_norm.item():g}: not finite; stopped, "
                  f"{last_saved}", file=sys.stderr)
            return 1
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, config.ema, step)                          # after the step, or it lags by one
        step, images = step + 1, images + config.batch

        if step % config.log_every == 0 or step == config.steps:
            value = loss.detach()
            if world > 1:
                dist.all_reduce(value, dist.ReduceOp.AVG if device.type == "cuda" else dist.ReduceOp.SUM)
                value = value if device.type == "cuda" else value / world
            pace = (step - since_step) * config.batch / (time.time() - since)
            log.step(step, images, value.item(), grad_norm.item(), lr, pace)
            since, since_step = time.time(), step
        stop = any_rank(interrupt.signal is not None, world, device)
        if (step % config.save_every == 0 or (config.keep_every and step % config.keep_every == 0)
                or step == config.steps or stop):
            save()
            last_saved = f"the checkpoint of step {step} is in {folder}"
        if stop:
            log.say(f"stopped at step {step}; go on with: python train.py --resume {folder}")
            return 128 + (interrupt.signal or 0)
        if config.sample_every and step % config.sample_every == 0 and step < config.steps:
            draw_samples()
            since, since_step = time.time(), step
    draw_samples()
    counted = f"; {len(broken)} files skipped" if broken else ""
    log.say(f"done: {folder}/samples_{step:07d}.png, loss.png, checkpoint.pt{counted}")
    log.say(f"draw more with: python sample.py {folder}")


if __name__ == "__main__":
    main_program(main)
