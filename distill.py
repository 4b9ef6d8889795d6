"""Distillation: two calls of guidance become one, and many steps few.

Paper: simple diffusion, section 1: "After using existing distillation techniques ... the model can generate an image in
0.4 seconds"; appendix A ("Distillation"), figure 9. The techniques: progressive distillation (Salimans & Ho 2022, arXiv
2202.00512) and, before it, guided distillation (Meng et al. 2023, arXiv 2210.03142). Their full texts were not at hand:
equations are those of the released code and of notes; what is called unverified is so.
Read before: schedule.py, sample.py (guide, ddim_step), train.py. Read after: nothing, this is the end.

    guided        a student that is told w predicts in one call what its teacher predicts in two: eq. 7's mixture
    progressive   a student of N steps learns to land in one DDIM step where its teacher of 2N lands in two. Then it is
                  the teacher, and N is halved: 128, 64, ... Each round starts from its teacher's weights

    python distill.py                                          explains itself: draws one target
    python distill.py runs/glyphs64 --to 4                     128, 64, 32, 16, 8, 4 steps: a run folder each
    python distill.py runs/glyphs64 --to 4 --guided            guidance first, then the steps
    python sample.py runs/glyphs64-guided-distilled/4          knows its steps and its sampler

Interrupted, the same command goes on where it stopped. Works for plain and nested models (every level has its target,
of every example, whatever --mixed-ratio) and for a stage of a cascade. Batch, --accumulate, --recompute are the run's.

Shapes: z, x, v lists of the levels, (B, 3, H_r, W_r) each, highest first (a plain model has one); t, w (B,).

# Paper: Meng et al. write (1 + w') x_c - w' x_0 with w' ~ U(0, 4); our scale is w = 1 + w' (schedule: 1 is off).
# Paper: no averaging, no warm-up, no dropout, the rate linearly to zero within a round; t in {1/N, ..., 1}.
"""
import copy
import dataclasses
import math
import os
import sys
import tempfile
import time

import torch

from plumbing import shard
from plumbing.settings import Parser, override
from config import build_model, make_low_schedule, make_optimizer, make_schedules, numbers
from plumbing import UserError
from data import batches, open_run
from nested_unet import pyramid
from plumbing.runs import (CHECKPOINT, Interrupt, Log, autocast, choose_device, choose_precision, cores, ema_model,
                           load_weights, main_program, read_checkpoint, save_checkpoint)
from sample import NEVER_DROPPED, ddim_step, guide, seed_of
from schedule import alpha_sigma_for, diffuse, v_from_x, x_from_v
from plumbing.t5 import Encoder
from train import augmented, conditions, draw, draw_augmentation

WEIGHTS = ("constant", "snr", "truncated_snr", "snr+1")


# ------------------------------------------------------------------------------------------ targets and loss

def step_target(z_t, z_s, logsnr_t, logsnr_s):
    """The x with which one DDIM step goes from z_t to z_s (Salimans & Ho): (z_s - r z_t) / (alpha_s - r alpha_t) with
    r = sigma_s / sigma_t. All like z_t; logsnr (B,).

    Salimans & Ho end at sigma_s = 0, where it is z_s / alpha_s; ours end at logsnr_max, sigma_s just above 0. The same
    formula serves both.
    """
    alpha_t, sigma_t = alpha_sigma_for(z_t, logsnr_t)
    alpha_s, sigma_s = alpha_sigma_for(z_t, logsnr_s)
    r = sigma_s / sigma_t
    return (z_s - r * z_t) / (alpha_s - r * alpha_t)


def two_step_target(predict, schedules, z, t, steps):
    """Progressive distillation: [v, ...] that a student of `steps` steps is to predict at t (B,) in {1..steps}/steps.

    predict(z, logsnr) -> [v, ...] is the teacher, without clipping; it goes from t to t - 1/(2 steps) to t - 1/steps.
    """
    times = [t, t - 0.5 / steps, (t - 1 / steps).clamp(min=0)]            # rounding must not lead below 0
    levels = [[schedule(time) for schedule in schedules] for time in times]                     # logsnr (B,)
    z_s = z
    for here, there in zip(levels, levels[1:]):
        x_hat = [x_from_v(*level) for level in zip(z_s, predict(z_s, here), here)]
        z_s = [ddim_step(*level) for level in zip(z_s, x_hat, here, there)]
    x = [step_target(*level) for level in zip(z, z_s, levels[0], levels[2])]
    return [v_from_x(*level) for level in zip(z, x, levels[0])]


def guided_target(predict, z, logsnr, w):
    """Guided distillation, stage 1: [v, ...] mixed by eq. 7 with each example's own w (B,).

    predict(z, logsnr, dropped) -> [v, ...]; v is linear in x at one z, so mixing v is mixing x.
    """
    pairs = zip(predict(z, logsnr, False), predict(z, logsnr, True))
    return [guide(v_cond, v_null, w[:, None, None, None]) for v_cond, v_null in pairs]


def distillation_loss(v, target, logsnr, weight="truncated_snr"):
    """Weighted squared error of x, mean over values. -> scalar. weight, of the log-SNR (Salimans & Ho, section 4):

        constant 1    snr e^l: the error of eps    truncated_snr max(e^l, 1)    snr+1: the error of v

    x_hat - x = -sigma (v_hat - v), so a weight on x is that weight times sigma^2 on v: sigma^2, alpha^2, the larger of
    the two, 1. Written so, nothing is divided by a small number.
    """
    alpha, sigma = alpha_sigma_for(v, logsnr)
    on_v = {"constant": sigma ** 2, "snr": alpha ** 2, "truncated_snr": torch.maximum(alpha ** 2, sigma ** 2),
            "snr+1": torch.ones_like(sigma)}[weight]
    return (on_v * (v - target).square()).mean()


def time_of(u, steps):
    """u (B,) ~ U(0, 1) -> t in {1/N, ..., 1}, each as often. Trap: {0, ..., N - 1}/N never trains the first step."""
    return ((u * steps).floor().clamp(max=steps - 1) + 1) / steps


# ------------------------------------------------------------------------------------------ one round

def call(config, model, z, logsnr, cond):
    """The model on lists, whether it is nested or not."""
    v = model(z, logsnr, cond) if config.outer_channels else [model(z[0], logsnr[0], cond)]
    return [level.float() for level in v]


def begun(folder, config):
    """The checkpoint of this round, None if it was not begun. Raises UserError if another one is there."""
    if not os.path.exists(os.path.join(folder, CHECKPOINT)):
        return None
    state = read_checkpoint(folder)
    same = dict(precision=config.precision, accumulate=config.accumulate, recompute=config.recompute)
    if dataclasses.replace(state["config"], **same) != config:
        raise UserError(f"{folder}: holds a round of another distillation; go on with its settings, or choose "
                        "another --out")
    return state


def teach(folder, config, teacher, student, steps, device, interrupt, encoder=None):
    """Train `student` in place, for config.steps updates, into the run `folder`; goes on if that has a checkpoint.

    steps: N of a progressive round; 0: the guided round. Returns the loss of the last log (nan if there was nothing
    left to do), or None if interrupted.
    """
    state = begun(folder, config)
    if state and state["step"] >= config.steps:
        load_weights(student, state["model"], folder)
        return math.nan
    seed = seed_of(config.seed, 2, steps)                                 # examples and noises of the round's own
    schedules, shapes = make_schedules(config), [(3, *size) for size in config.sizes]
    if config.low_size:
        shapes, low_schedule = shapes + [(3, *config.low_size)], make_low_schedule(config)
    optimizer = make_optimizer(student, config)
    weights = numbers(config.level_weights, ":") or [1.0] * len(config.sizes)
    step, images, value, broken = 0, 0, math.nan, set()
    if state:
        load_weights(student, state["model"], folder)
        load_weights(optimizer, state["optimizer"], folder)
        step, images = state["step"], state["images"]
    os.makedirs(folder, exist_ok=True)
    log = Log(folder, config, active=True, first_step=step)
    source, places, size = open_run(config), range(config.batch), config.batch // config.accumulate
    parts = [slice(i, i + size) for i in range(0, config.batch, size)]
    stream = batches(source, config.batch, seed, step, workers=max(1, cores() // 2), flip=config.flip)
    teacher.eval()
    student.eval()                                                        # no dropout
    since = time.time()
    while step < config.steps:
        batch = next(stream)
        for message in set(batch["broken"]) - broken:
            print(f"\nskipped {message}", file=sys.stderr)
        broken.update(batch["broken"])
        if batch["image"] is None:
            raise UserError(f"--data {config.data}: no image left that can be read")
        x = batch["image"].to(device)
        u_t, eps, u = draw(seed, step, places, shapes, device)
        hidden = torch.zeros_like(u).bool() if config.guidance_max else u < config.cond_drop
        cond = conditions(config, batch, hidden, encoder)
        if config.low_size:
            uniform = draw_augmentation(seed, step, places, device)
            cond["low_res"], cond["aug_logsnr"] = augmented(config, x, eps[-1], low_schedule, uniform)
        kept = {key: cond[key] for key in NEVER_DROPPED if key in cond}
        told = dict(cond, guidance=1 + (config.guidance_max - 1) * u) if config.guidance_max else cond

        t = time_of(u_t, steps) if steps else u_t
        logsnr = [schedule(t) for schedule in schedules]
        z = [diffuse(*level) for level in zip(pyramid(x, config.sizes), eps, logsnr)]
        loss = 0.0
        for part in parts:                                                # their gradients add up
            z_p, logsnr_p = ([level[part] for level in levels] for levels in (z, logsnr))
            told_p, cond_p, kept_p = ({key: values[part] for key, values in each.items()}
                                      for each in (told, cond, kept))
            with autocast(config.precision, device):
                with torch.no_grad():
                    if steps:
                        target = two_step_target(lambda z, l: call(config, teacher, z, l, told_p), schedules, z_p,
                                                 t[part], steps)
                    else:
                        target = guided_target(lambda z, l, dropped: call(
                            config, teacher, z, l, kept_p if dropped else cond_p), z_p, logsnr_p, told_p["guidance"])
                v = call(config, student, z_p, logsnr_p, told_p)
                losses = [distillation_loss(*level, config.distill_weight) for level in zip(v, target, logsnr_p)]
                value_p = sum(w * level for w, level in zip(weights, losses)) / len(parts)
            value_p.backward()
            loss = loss + value_p.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        for group in optimizer.param_groups:
            # Linearly to zero within the round.
            group["lr"] = config.lr * (1 - step / config.steps) * group.get("share", 1)
        if not torch.isfinite(grad_norm + loss):
            raise UserError(f"{folder}: step {step}: the loss is not finite; try a smaller --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, images = step + 1, images + config.batch
        if step % config.log_every == 0 or step == config.steps:
            value = loss.item()
            log.step(step, images, value, grad_norm.item(), optimizer.param_groups[0]["lr"],
                     config.batch * config.log_every / (time.time() - since))
            since = time.time()
        if step % config.save_every == 0 or step == config.steps or interrupt.signal:
            save_checkpoint(folder, student, student, optimizer, step, images, config, len(source))
            log.draw()
        if interrupt.signal:
            log.say(f"stopped at step {step} of {folder}; the same command goes on")
            return None
    return value


def with_guidance(teacher, config):
    """A student like `teacher`, told w: the same weights, and the new layer's zero; at first it says the same for
    every w."""
    student = build_model(config)
    try:
        missing, excess = student.load_state_dict(teacher.state_dict(), strict=False)
    except RuntimeError as error:                                         # weights of other shapes
        missing, excess = [], [" ".join(str(error).split())[:160]]
    if excess or not all(".guide." in f".{key}" for key in missing):
        raise UserError(f"not a teacher for this student: {', '.join([*missing, *excess][:3])}")
    return student


# ------------------------------------------------------------------------------------------ the ladder

def ladder(first, last):
    """[N, ...] of the students: first / 2, ..., last. Raises UserError unless both are powers of two, first larger."""
    for name, steps in (("from", first), ("to", last)):
        if steps < 1 or steps & (steps - 1):
            raise UserError(f"--{name} {steps}: want a power of two, as steps are halved")
    if last >= first:
        raise UserError(f"--to {last}: want fewer than the teacher's {first} (--from)")
    return [first >> k for k in range(1, int(math.log2(first // last)) + 1)]


def parse(argv):
    parser = Parser(prog="distill.py", description="Distil a run into one of few steps. Without arguments: explains.")
    parser.add_argument("run", metavar="RUN", help="folder of the teacher")
    parser.add_argument("--to", type=int, default=4, help="steps of the last student, a power of two (default 4)")
    parser.add_argument("--from", type=int, dest="first", help="steps of the teacher (default 256, or what it was "
                        "distilled to)")
    parser.add_argument("--guided", action="store_true", help="first distil guidance: one call instead of two")
    parser.add_argument("--w-max", type=float, default=5.0, help="largest guidance that the student learns (default 5)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each round (default 300; papers 50,000)")
    parser.add_argument("--guided-steps", type=int, default=1000, help="updates of the guided round (default 1000)")
    parser.add_argument("--lr", type=float, default=3e-4, help="rate at the start of each round (default 3e-4)")
    parser.add_argument("--accumulate", type=int, help="parts of a batch, one after the other (default: the run's)")
    parser.add_argument("--weight", choices=WEIGHTS, default="truncated_snr", help="of the error (truncated_snr)")
    parser.add_argument("--out", help="folder for the rounds (default RUN-distilled, RUN-guided-distilled)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    args = parser.parse_args(argv)
    for name in ("steps", "guided_steps"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: want 1 or more")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr:g}: want a positive number")
    if args.guided and not 1 < args.w_max < math.inf:
        raise UserError(f"--w-max {args.w_max:g}: want more than 1, which is no guidance")
    return args


def main():
    if len(sys.argv) == 1:
        return explain()
    args = parse(sys.argv[1:])
    run = os.path.normpath(args.run)
    device, why = choose_device(args.device)
    state = read_checkpoint(run)
    config, teacher = state["config"], ema_model(state, run, device)
    first = args.first or config.distilled_steps or 256
    rounds = ladder(first, args.to)
    if config.distilled_steps and first != config.distilled_steps:
        raise UserError(f"--from {first}: {run} was itself distilled to {config.distilled_steps} steps")
    if args.guided and not config.guidable:
        raise UserError(f"--guided: {run} has no condition to drop, so there is no guidance to distil")
    if args.guided and (config.guidance_max or config.distilled_steps):
        raise UserError(f"--guided: {run} was distilled already; guidance comes first, then the steps")
    if not args.guided and config.calls == 2:
        print(f"guidance {config.guidance:g} is left out, the students have none: --guided distils it, too")
        config = dataclasses.replace(config, guidance=1.0)
    out = os.path.normpath(args.out or run + ("-guided" if args.guided else "") + "-distilled")
    encoder = Encoder(config, device, cached=True) if config.text_encoder else None
    accumulate = config.accumulate if args.accumulate is None else args.accumulate
    if accumulate < 1 or config.batch % accumulate:
        raise UserError(f"--accumulate {accumulate}: want a number of parts that divides the batch, {config.batch}")
    common = dict(lr=args.lr, distill_weight=args.weight, sampler="ddim", log_every=min(20, args.steps), save_every=100,
                  keep_every=0, sample_every=0, weight_decay=0.0, accumulate=accumulate,
                  precision=choose_precision(config.precision, device), compile="off")
    todo, above = [], f"{run}, step {state['step']}"                      # [(folder, config, N), ...]
    for steps in [0] * args.guided + rounds:
        folder, own = os.path.join(out, str(steps or "guided")), dict(steps=args.steps, distilled_steps=steps)
        if not steps:
            own.update(steps=args.guided_steps, guidance_max=args.w_max, guidance=min(config.guidance, args.w_max))
        config = override(config, **common, **own, sample_steps=steps or first, distilled_from=above)
        begun(folder, config)                                             # another distillation: known before any work
        todo.append((folder, config, steps))
        above = f"{folder}, step {config.steps}"
    try:
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):                             # may we write here?
            pass
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    interrupt, rows = Interrupt(), []
    names = [str(steps or "guided") for *_, steps in todo]
    print(f"{run} -> {' -> '.join(names)}, on {device} ({why}); rounds in {out}", flush=True)
    for folder, config, steps in todo:
        start = time.time()
        with device:
            student = copy.deepcopy(teacher) if steps else with_guidance(teacher, config)
        if config.recompute and not rows:                                 # later ones are copies of this one
            shard.recompute(student)
        student.requires_grad_(True)
        loss = teach(folder, config, teacher, student, steps, device, interrupt, encoder)
        if loss is None:
            return 128 + interrupt.signal
        rows.append((folder, loss, time.time() - start))
        print(f"{folder}: done", flush=True)
        teacher = student.eval().requires_grad_(False)
    print(f"{'round':10s} {'loss':>10s} {'seconds':>8s}   draw with")
    for folder, loss, seconds in rows:
        loss = "earlier" if math.isnan(loss) else f"{loss:.5f}"
        print(f"{os.path.basename(folder):10s} {loss:>10s} {seconds:8.0f}   python sample.py {folder}")


# ------------------------------------------------------------------------------------------ the page of the lecture

def closed_form(images):
    """The best denoiser there is for data that are exactly these images (K, 3, H, W): v of their posterior mean."""
    def predict(z, logsnr):
        alpha, sigma = alpha_sigma_for(z[0][:, None], logsnr[0])
        away = (z[0][:, None] - alpha * images).square().flatten(2).sum(2)                      # (B, K)
        x = (torch.softmax(-away / (2 * sigma.flatten() ** 2)[:, None], 1) @ images.flatten(1)).view_as(z[0])
        return [v_from_x(z[0], x, logsnr[0])]
    return predict


def explain():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from config import PRESETS
    from data import Glyphs
    os.makedirs("figures", exist_ok=True)
    schedules, steps, t = make_schedules(PRESETS["glyphs64"]), 2, torch.tensor([1.0])
    images = torch.stack([Glyphs().image(i) for i in range(24)])
    predict = closed_form(images)
    logsnr = lambda time: [schedule(time) for schedule in schedules]
    z = [diffuse(images[10:11], torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)), logsnr(t)[0])]
    walk, seen = [z[0]], []
    for here, there in ((t, t - 0.5 / steps), (t - 0.5 / steps, t - 1 / steps)):
        seen.append(x_from_v(walk[-1], predict([walk[-1]], logsnr(here))[0], logsnr(here)[0]))
        walk.append(ddim_step(walk[-1], seen[-1], logsnr(here)[0], logsnr(there)[0]))
    target = x_from_v(z[0], two_step_target(predict, schedules, z, t, steps)[0], logsnr(t)[0])
    landed = ddim_step(z[0], target, logsnr(t)[0], logsnr(t - 1 / steps)[0])
    print(f"student of {steps} steps, t = {t.item():g} -> {t.item() - 1 / steps:g}: largest distance between where two "
          f"teacher steps land and where the student's one does: {(landed - walk[2]).abs().max():.1e}")
    panels = [("z at t = 1", z[0]), ("teacher's x there", seen[0]), ("its step: z at 3/4", walk[1]),
              ("teacher's x there", seen[1]), ("its step: z at 1/2", walk[2]), ("x for the student", target),
              ("its one step: z at 1/2", landed)]
    figure, axes = plt.subplots(1, len(panels), figsize=(1.8 * len(panels), 2.2))
    for axis, (title, image) in zip(axes, panels):
        axis.imshow(((image[0] + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig("figures/distill.png", dpi=110)
    print("wrote figures/distill.png (the teacher here is the closed-form denoiser of 24 scenes)")


if __name__ == "__main__":
    main_program(main)
