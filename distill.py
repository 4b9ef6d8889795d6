"""Distillation: two calls of guidance become one, and many steps become few.

Paper: simple diffusion, section 1: "After using existing distillation techniques ... the model can generate an image in
0.4 seconds"; appendix A ("Distillation"), figure 9. The techniques: progressive distillation (Salimans & Ho 2022, arXiv
2202.00512) and, before it, guided distillation (Meng et al. 2022, arXiv 2210.03142). Their full texts were not at hand:
the equations are those of the released code and of notes.
Needs: schedule.py, sample.py (guide, ddim_step), train.py. Next: measures.py.

    guided        the student takes the guidance scale w as input and predicts eq. 7 in one call. Its teacher
                  needs two
    progressive   a student of N steps learns to land in one DDIM step where its teacher of 2N steps lands in two. Then
                  it becomes the teacher, and N is halved: 128, 64, ... Each round starts from its teacher's weights

    python distill.py                                          draw one target, and explain it
    python distill.py runs/glyphs64 --to 4                     128, 64, 32, 16, 8, 4 steps: one run folder each
    python distill.py runs/glyphs64 --to 4 --guided            first guidance, then the steps
    python sample.py runs/glyphs64-guided-distilled/4          a student knows its steps and its sampler

After an interruption the same command continues. Plain models, nested models (every level of every example has its
target, whatever --mixed-ratio says) and the stages of a cascade can be distilled. The batch, --accumulate and
--recompute are those of the run.

Shapes: z, x, v are lists of levels, (B, 3, H_r, W_r) each, highest first (a plain model has one); t, w (B,).

# Paper: Meng et al. write (1 + w') x_c - w' x_0 with w' ~ U(0, 4). Our scale is w = 1 + w' (1 is off).
# Paper: no EMA, no warm-up, no dropout, the learning rate falls linearly to zero in each round; t in {1/N, ..., 1}.
"""
import plumbing  # first: from here on Ctrl-C shows no traceback
import copy
import math
import os
import sys
import time

import torch

from config import PRESETS, build_model, make_levels, make_optimizer, make_schedules, numbers
from data import Glyphs, batches
from plumbing import UserError, shard
from plumbing.files import hold, writable_folder
from plumbing.pages import draw_panels
from plumbing.rounds import parse, prepare, read_round
from plumbing.runs import autocast, cores, load_optimizer, load_weights, main_program
from plumbing.sampling import derive_seed
from plumbing.start import set_aside
from plumbing.training import Interrupt, Run
from sample import ddim_step, guide, null_condition
from schedule import alpha_sigma_for, diffuse, v_from_x, x_from_v
from train import conditions, draw, low_res_conditions, micro_batches, noise_shapes, select


# ------------------------------------------------------------------------------------------ targets and loss

def step_target(z_t, z_s, logsnr_t, logsnr_s):
    """Return the x with which one DDIM step goes from z_t to z_s (Salimans & Ho). All like z_t; logsnr (B,).

    Note: (z_s - r z_t) / (alpha_s - r alpha_t) with r = sigma_s / sigma_t. Salimans & Ho end at sigma_s = 0, where it
    is z_s / alpha_s. Ours end at logsnr_max, with sigma_s just above 0. The same formula serves both.
    """
    alpha_t, sigma_t = alpha_sigma_for(z_t, logsnr_t)
    alpha_s, sigma_s = alpha_sigma_for(z_t, logsnr_s)
    r = sigma_s / sigma_t
    return (z_s - r * z_t) / (alpha_s - r * alpha_t)


def two_step_target(predict, schedules, z, t, steps):
    """Progressive distillation: return the [v, ...] for a student of `steps` steps at t (B,) in {1..steps}/steps.

    predict(z, logsnr) -> [v, ...] is the teacher, without clipping. It goes from t to t - 1/(2 steps) to t - 1/steps.
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
    """Guided distillation, stage 1: return the [v, ...] mixed by eq. 7, each example with its own w (B,).

    predict(z, logsnr, dropped) -> [v, ...] is the teacher. Note: at one z, v is linear in x, so mixing v mixes x.
    """
    pairs = zip(predict(z, logsnr, False), predict(z, logsnr, True))
    return [guide(v_cond, v_null, w[:, None, None, None]) for v_cond, v_null in pairs]


def distillation_loss(v, target, logsnr, weight="truncated_snr"):
    """Weighted squared error of x, the mean over values. -> scalar. The weight by log-SNR l (Salimans & Ho, section 4):

        constant 1    snr e^l: the error of eps    truncated_snr max(e^l, 1)    snr+1: the error of v

    x_hat - x = -sigma (v_hat - v), so a weight on x is sigma^2 times that weight on v: sigma^2, alpha^2, the larger of
    the two, 1. In this form nothing is divided by a small number.
    """
    alpha, sigma = alpha_sigma_for(v, logsnr)
    on_v = {"constant": sigma ** 2, "snr": alpha ** 2, "truncated_snr": torch.maximum(alpha ** 2, sigma ** 2),
            "snr+1": torch.ones_like(sigma)}[weight]
    return (on_v * (v - target).square()).mean()


def time_of(u, steps):
    """Turn u (B,) ~ U(0, 1) into t in {1/N, ..., 1}, each equally often.

    Trap: with {0, ..., N - 1}/N the first sampling step, from t = 1, is never trained.
    """
    return ((u * steps).floor().clamp(max=steps - 1) + 1) / steps


# ------------------------------------------------------------------------------------------ one round

def on_levels(model, z, logsnr, cond):
    """Call a nested or a plain model on lists of levels. -> [v, ...] in float32."""
    v = model(z, logsnr, cond) if len(z) > 1 else [model(z[0], logsnr[0], cond)]
    return [level.float() for level in v]


def round_loss(config, teacher, student, schedules, z, t, cond, steps):
    """The loss of one micro-batch. -> scalar. steps: N of a progressive round, 0 for the guided round.

    cond holds the guidance scale of each example if the student is given one.
    """
    logsnr = [schedule(t) for schedule in schedules]
    given = cond if steps else {key: value for key, value in cond.items() if key != "guidance"}

    def predict(z, logsnr, dropped=False):
        return on_levels(teacher, z, logsnr, null_condition(given) if dropped else given)
    with torch.no_grad():
        target = (two_step_target(predict, schedules, z, t, steps) if steps
                  else guided_target(predict, z, logsnr, cond["guidance"]))
    v = on_levels(student, z, logsnr, cond)
    losses = [distillation_loss(*level, config.distill_weight) for level in zip(v, target, logsnr)]
    weights = numbers(config.level_weights, ":") or [1.0] * len(losses)
    return sum(w * loss for w, loss in zip(weights, losses))


def teach(folder, config, source, teacher, student, steps, device, interrupt, encoder=None):
    """Train `student` in place for config.steps updates, into the run `folder`. Continue if it has a checkpoint.

    source: the training images, opened once: a class that comes or goes between two rounds would shift the labels.
    Return (exit status, last loss). The status is None if the round is complete; the loss is nan if it was before.
    """
    writable_folder(folder, "--out")
    lock = hold(folder)                                                   # as long as this function runs
    checkpoint, optimizer, step = read_round(folder, config), make_optimizer(student, config), 0
    if checkpoint:
        set_aside(checkpoint)
        step = checkpoint["step"]
        load_weights(student, checkpoint["model"], folder)
        load_optimizer(optimizer, checkpoint, folder)
        if step >= config.steps:
            return None, math.nan
    seed = derive_seed(config.seed, 2, steps)                             # each round sees its own examples and noise
    schedules, places = make_schedules(config), range(config.batch)
    parts = micro_batches(config.batch, config.accumulate)
    run = Run(folder, config, source, student, student, optimizer, step, interrupt=interrupt)
    stream = batches(source, config.batch, seed, step, workers=max(1, cores() // 2), flip=config.flip,
                     pin=device.type == "cuda")
    teacher.eval()
    student.eval()                                                        # no dropout
    for step, batch in run.steps(stream):
        x = batch["image"].to(device)
        u_t, noises, u = draw(seed, step, places, noise_shapes(config), device)
        t = time_of(u_t, steps) if steps else u_t
        dropped = torch.zeros_like(u).bool() if config.guidance_max else u < config.cond_drop
        cond = conditions(config, batch, dropped, encoder)
        if config.guidance_max:
            cond["guidance"] = 1 + (config.guidance_max - 1) * u
        if config.low_size:
            cond |= low_res_conditions(config, x, noises[-1], seed, step, places)
        levels = zip(make_levels(config, x), noises, schedules)
        z = [diffuse(x_r, eps_r, schedule(t)) for x_r, eps_r, schedule in levels]

        lr = config.lr * (1 - step / config.steps)                        # linearly to zero within the round
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1)
        step_loss = 0.0
        for part in parts:                                                # micro-batches: their gradients add up
            with autocast(config.precision, device):
                loss = round_loss(config, teacher, student, schedules, select(z, part), t[part], select(cond, part),
                                  steps) / len(parts)
            loss.backward()
            step_loss = step_loss + loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        if not run.finite(grad_norm + step_loss):
            return run.fail(), math.nan
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.after_step(step_loss, grad_norm, lr)
    if run.stopped:
        run.log.say(f"stopped at step {run.step} of {folder}; the same command continues")
        return 128 + interrupt.signal, math.nan
    return None, step_loss.item()


def with_guidance(teacher, config):
    """Return a student like `teacher` that is given w. The new layer is zero: at first its output does not depend
    on w."""
    student = build_model(config)
    try:
        missing, excess = student.load_state_dict(teacher.state_dict(), strict=False)
    except RuntimeError as error:                                         # weights of other shapes
        missing, excess = [], [" ".join(str(error).split())[:160]]
    if excess or not all(".guide." in f".{key}" for key in missing):
        raise UserError(f"not a teacher for this student: {', '.join([*missing, *excess][:3])}")
    return student


# ------------------------------------------------------------------------------------------ the program

def main():
    if len(sys.argv) == 1:
        return explain()
    args = parse(sys.argv[1:])
    device, teacher, source, encoder, rounds, headline = prepare(args)
    interrupt, rows = Interrupt(), []
    print(headline, flush=True)
    for folder, config, steps in rounds:
        start = time.monotonic()
        with device:
            student = copy.deepcopy(teacher) if steps else with_guidance(teacher, config)
        if config.recompute and not rows:                                 # later students are copies of this one
            shard.checkpoint_activations(student)
        student.requires_grad_(True)
        status, loss = teach(folder, config, source, teacher, student, steps, device, interrupt, encoder)
        if status is not None:
            return status
        rows.append((folder, loss, time.monotonic() - start))
        print(f"{folder}: done", flush=True)
        teacher = student.eval().requires_grad_(False)
    print(f"{'round':10s} {'loss':>10s} {'seconds':>8s}   draw with")
    for folder, loss, seconds in rows:
        loss = "earlier" if math.isnan(loss) else f"{loss:.5f}"
        print(f"{os.path.basename(folder):10s} {loss:>10s} {seconds:8.0f}   python sample.py {folder}")


# ------------------------------------------------------------------------------------------ the page of the lecture

def closed_form(images):
    """Return the best denoiser for data that are exactly these images (K, 3, H, W): v of their posterior mean."""
    def predict(z, logsnr):
        alpha, sigma = alpha_sigma_for(z[0][:, None], logsnr[0])
        distance = (z[0][:, None] - alpha * images).square().flatten(2).sum(2)                  # (B, K)
        x = (torch.softmax(-distance / (2 * sigma.flatten() ** 2)[:, None], 1) @ images.flatten(1)).view_as(z[0])
        return [v_from_x(z[0], x, logsnr[0])]
    return predict


def explain():
    """Draw figures/distill.png: two steps of a teacher, the student's target, and its one step."""
    schedules, steps, t = make_schedules(PRESETS["glyphs64"]), 2, torch.tensor([1.0])
    images = torch.stack([Glyphs().image(i) for i in range(24)])
    predict, generator = closed_form(images), torch.Generator().manual_seed(0)
    logsnr = [schedules[0](time) for time in (t, t - 0.5 / steps, t - 1 / steps)]
    z = [diffuse(images[10:11], torch.randn(1, 3, 64, 64, generator=generator), logsnr[0])]
    x_hat = []
    for here, there in zip(logsnr, logsnr[1:]):
        x_hat.append(x_from_v(z[-1], predict([z[-1]], [here])[0], here))
        z.append(ddim_step(z[-1], x_hat[-1], here, there))
    target = x_from_v(z[0], two_step_target(predict, schedules, z[:1], t, steps)[0], logsnr[0])
    landed = ddim_step(z[0], target, logsnr[0], logsnr[2])
    print(f"student of {steps} steps, t = {t.item():g} -> {t.item() - 1 / steps:g}: largest distance between where two "
          f"teacher steps land and where the student's one step lands: {(landed - z[2]).abs().max():.1e}")
    panels = [("z at t = 1", z[0]), ("teacher's x there", x_hat[0]), ("its step: z at 3/4", z[1]),
              ("teacher's x there", x_hat[1]), ("its step: z at 1/2", z[2]), ("x for the student", target),
              ("its one step: z at 1/2", landed)]
    titles, images = zip(*panels)
    draw_panels("figures/distill.png", [[image[0] for image in images]], titles, size=(1.8, 2.2), dpi=110)
    print("wrote figures/distill.png (the teacher here is the closed-form denoiser of 24 scenes)")


if __name__ == "__main__":
    main_program(main)
