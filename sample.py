"""From noise to images: the steps, clipping, guidance and the loop of appendix A; then nested models and cascades.
As a program: from the folder of a run to a PNG and a GIF.

Paper: simple diffusion, appendix A ("Sampling", "Classifier-free guidance") and section 2 (eq. 3); Matryoshka
Diffusion, section 3 (all levels step together); Cascaded Diffusion, section 3 (from stage to stage).
Read before: schedule.py, train.py; nested_unet.py for levels, cascade.py for stages. After: distill.py, measures.py.

    python sample.py runs/glyphs64                       a sheet, four images of each class
    python sample.py runs/glyphs64 --labels A,B,7 --n 8 --guidance 4 --gif letters.gif
    python sample.py runs/glyphs64_text --text "a blue serif Q on striped yellow" --text "a white 7 on red"
    python sample.py runs/glyphs64_nested --levels --gif levels.gif         every level of a nested model
    python sample.py runs/glyphs16 runs/glyphs64_sr --handoff renoised --s 0.3 --labels A,B,7        a cascade

Shapes: z, x_hat, v (B, C, H, W). logsnr_t and logsnr_s are scalars or (B,); s < t is one step closer to the image.

# Paper: eq. 3 prints N(z_t | ...) for the law of z_s, and calls the posterior's variance sigma without the square.
"""
import functools
import sys

import numpy as np
import torch

from cascade import hand_over
from config import make_low_schedule, make_schedule
from data import turned_back
from plumbing import UserError
from plumbing.pictures import Film, save_gif, side_by_side
from plumbing.runs import autocast, choose_device, choose_precision, load_run, main_program, progress
from plumbing.sampling import (BATCH, captions_of, check_cascade, compiled, conditions_of, handoffs, introduce, parse,
                               predictions_of, sheet_of, sheet_wanted, stages_of)
from schedule import alpha_sigma_for, diffuse, eps_from_x, x_from_v


# ------------------------------------------------------------------------------------------ one step (appendix A)

def ddpm_step(z_t, x_hat, logsnr_t, logsnr_s, noise_param=0.2, noise=None):
    """Take the ancestral step z_t -> z_s: draw from q(z_s | z_t, x = x_hat), eq. 3, with an interpolated variance.

    It is the listing `ddpm_sampler_step` of appendix A, given x_hat. noise: N(0, 1), drawn if None.

    With c = 1 - exp(lambda_t - lambda_s) the transition has variance sigma^2_{t|s} = c sigma_t^2, the posterior
    c sigma_s^2. They are an upper and a lower bound on the variance of the true reverse step: the upper one is exact
    for data from N(0, 1), the lower one for data that are a single point. noise_param = nu interpolates their logs,
    from the lower (0) to the upper (1). The paper takes 0.2, and 1.0 for its FID on COCO.

    # Paper: prints the log variances as (1 - exp(..)) + log_sigmoid(..); the first term must be log(1 - exp(..)). It
    # names them min_lvar, then min_logvar, and does not define alpha_st: it is alpha_s / alpha_t.
    """
    logsnr_t, logsnr_s = torch.as_tensor(logsnr_t), torch.as_tensor(logsnr_s)
    alpha_t, sigma_t = alpha_sigma_for(z_t, logsnr_t)
    alpha_s, sigma_s = alpha_sigma_for(z_t, logsnr_s)
    r = (sigma_s * alpha_t / (alpha_s * sigma_t)) ** 2                    # exp(lambda_t - lambda_s), < 1
    c = -torch.expm1(2 * (torch.log(sigma_s) + torch.log(alpha_t) - torch.log(alpha_s) - torch.log(sigma_t)))
    mean = r * (alpha_s / alpha_t) * z_t + c * alpha_s * x_hat
    log_variance = (noise_param * (torch.log(c) + 2 * torch.log(sigma_t))
                    + (1 - noise_param) * (torch.log(c) + 2 * torch.log(sigma_s)))
    noise = torch.randn_like(z_t) if noise is None else noise
    return mean + torch.exp(0.5 * log_variance) * noise


def ddim_step(z_t, x_hat, logsnr_t, logsnr_s):
    """Take the deterministic step of Song et al.: keep the predicted x and eps, change their proportions."""
    return diffuse(x_hat, eps_from_x(z_t, x_hat, logsnr_t), logsnr_s)


def renoise_step(z_t, x_hat, logsnr_t, logsnr_k, logsnr_s, noise=None):
    """Take the stochastic step of distilled models (Meng et al. 2023): a deterministic step of twice the length, from
    z_t to z_k with k < s, then back up to s with fresh noise: z_s = (alpha_s / alpha_k) z_k + sigma_{s|k} eps.

    sigma^2_{s|k} = (1 - exp(lambda_s - lambda_k)) sigma_s^2, so the variance at s is sigma_s^2 again.
    """
    logsnr_k, logsnr_s = torch.as_tensor(logsnr_k), torch.as_tensor(logsnr_s)
    z_k = ddim_step(z_t, x_hat, logsnr_t, logsnr_k)
    alpha_k, sigma_k = alpha_sigma_for(z_t, logsnr_k)
    alpha_s, sigma_s = alpha_sigma_for(z_t, logsnr_s)
    variance = sigma_s ** 2 - (alpha_s * sigma_k / alpha_k) ** 2
    noise = torch.randn_like(z_t) if noise is None else noise
    return alpha_s / alpha_k * z_k + variance.clamp(min=0).sqrt() * noise


def sampler_step(z_t, x_hat, logsnr, t, sampler="ddpm", noise_param=0.2, generators=()):
    """Step from time t to t - 1, both indices of logsnr (N + 1,), by "ddpm", "ddim" or "stochastic"."""
    if sampler == "ddim":
        return ddim_step(z_t, x_hat, logsnr[t], logsnr[t - 1])
    noise = draw_noise(z_t.shape[1:], generators, z_t.device)
    if sampler == "ddpm":
        return ddpm_step(z_t, x_hat, logsnr[t], logsnr[t - 1], noise_param, noise)
    if sampler == "stochastic":
        return renoise_step(z_t, x_hat, logsnr[t], logsnr[max(t - 2, 0)], logsnr[t - 1], noise)
    raise ValueError(f"sampler {sampler!r}: want ddpm, ddim or stochastic")


def generators_of(seeds):
    """Return a random generator for each image, on the CPU: a seed gives the same image in any batch, on any device."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw_noise(shape, generators, device="cpu"):
    """Draw N(0, I) of shape (B, *shape), each image by its own generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


# ------------------------------------------------------------------------------------------ clipping and guidance

def clip_static(x):
    """Clip to [-1, 1], the range of images."""
    return x.clamp(-1, 1)


def clip_dynamic(x, percentile=0.995):
    """Clip each image to [-s, s] and divide it by s, the percentile of its |x|, at least 1 (Imagen).

    With strong guidance most pixels leave [-1, 1]. Clipping all of them burns the colours, dividing does not.
    """
    s = torch.quantile(x.abs().flatten(1), percentile, dim=1).clamp(min=1)
    s = s.reshape(-1, *[1] * (x.ndim - 1))
    return x.clamp(-s, s) / s


CLIPS = {"static": clip_static, "dynamic": clip_dynamic, "none": lambda x: x}


def guide(v_cond, v_null, w):
    """Apply eq. 7 to v (or eps, or x): (1 + eta) v_cond - eta v_null with w = 1 + eta. w = 1 gives v_cond, exactly."""
    return v_cond + (w - 1) * (v_cond - v_null)


NEVER_DROPPED = ("low_res", "aug_logsnr", "portrait")


def null_condition(cond, negative=None):
    """Return the conditions of the second evaluation of guidance: `negative`, or none, in place of the label or text.

    The low-res image of a super-resolution model and the portrait flag stay, since training never drops them.
    """
    return {key: cond[key] for key in NEVER_DROPPED if key in cond} | (negative or {})


def predict_x(model, z_t, logsnr_t, cond, guidance=1.0, negative=None, clip="static"):
    """Predict x from z_t, guided and clipped. Return x_hat (B, C, H, W)."""
    v = model(z_t, logsnr_t, cond)
    if guidance != 1:                                                     # w = 1 costs one evaluation, not two
        v = guide(v, model(z_t, logsnr_t, null_condition(cond, negative)), guidance)
    return CLIPS[clip](x_from_v(z_t, v, logsnr_t))


# ------------------------------------------------------------------------------------------ the loop (appendix A)

def sample(model, schedule, cond, shape, seeds, steps=256, sampler="ddpm", guidance=1.0, noise_param=0.2,
           clip="static", lowest_idx=1, device="cpu", on_step=None, negative=None):
    """Draw images (B, C, H, W) in [-1, 1]: the listing `sample` of appendix A.

    schedule     t -> logsnr
    cond         conditions of the B images, a dict as the model takes it
    shape        (C, H, W)
    seeds        B integers. Image i depends on seeds[i] alone, not on the rest of the batch
    steps        N. They cost N evaluations of the network, 2 N with guidance
    sampler      "ddpm" (the paper's), "ddim", or "stochastic" (for distilled models)
    guidance     w of eq. 7; 1 = off
    noise_param  nu of ddpm_step
    clip         how to clip x_hat, one of CLIPS
    lowest_idx   0 or 1: the last prediction is made at time lowest_idx / N and returned without noise. With 0 the loop
                 goes on to t = 0, where the network sees a clean z; this costs one evaluation more
    on_step      called as on_step(k, z, x_hat) after prediction k = 1, 2, ...
    negative     conditions that guidance leads away from (default: none, eq. 7)

    # Paper: does not say the number of steps; 256 is ours. Its last lines use an alpha_t and a sigma_t that are never
    # set; they must be those of lowest_idx.
    """
    generators = generators_of(seeds)
    logsnr = schedule(torch.arange(steps + 1) / steps).to(device)         # (N + 1,): logsnr[t] belongs to time t / N
    z_t = draw_noise(shape, generators, device)                           # (B, C, H, W): z_1 ~ N(0, I)
    for t in reversed(range(lowest_idx + 1, steps + 1)):
        x_hat = predict_x(model, z_t, logsnr[t], cond, guidance, negative, clip)
        z_t = sampler_step(z_t, x_hat, logsnr, t, sampler, noise_param, generators)
        if on_step:
            on_step(steps + 1 - t, z_t, x_hat)
    # The final prediction: return the mean, do not draw from p(x | z_lowest).
    x_hat = predict_x(model, z_t, logsnr[lowest_idx], cond, guidance, negative, clip)
    if on_step:
        on_step(steps + 1 - lowest_idx, x_hat, x_hat)
    return x_hat


# ------------------------------------------------------------------------------------------ levels (Matryoshka 3)

def predict_levels(model, z, logsnr_t, cond, guidance=1.0, negative=None, clip="static"):
    """Predict x of every level, as predict_x does: all are guided, all are clipped. Lists, highest level first."""
    v = model(z, logsnr_t, cond)
    if guidance != 1:
        v_null = model(z, logsnr_t, null_condition(cond, negative))
        v = [guide(*pair, guidance) for pair in zip(v, v_null)]
    return [CLIPS[clip](x_from_v(*level)) for level in zip(z, v, logsnr_t)]


def sample_levels(model, schedules, cond, shapes, seeds, steps=256, sampler="ddpm", guidance=1.0, noise_param=0.2,
                  clip="static", lowest_idx=1, device="cpu", on_step=None, negative=None):
    """Draw images of a nested model: return all levels, [(B, C, H, W), ...], highest first. Arguments as in sample().

    schedules and shapes have one entry for each level. Each level starts from noise of its own. All levels then take
    each step together, each with its own alpha and sigma. on_step gets the lists z and x_hat.
    """
    generators = generators_of(seeds)
    logsnr = [schedule(torch.arange(steps + 1) / steps).to(device) for schedule in schedules]   # a level: (N + 1,)
    z = [draw_noise(shape, generators, device) for shape in shapes]
    for t in reversed(range(lowest_idx + 1, steps + 1)):
        x_hat = predict_levels(model, z, [level[t] for level in logsnr], cond, guidance, negative, clip)
        z = [sampler_step(*level, t, sampler, noise_param, generators) for level in zip(z, x_hat, logsnr)]
        if on_step:
            on_step(steps + 1 - t, z, x_hat)
    x_hat = predict_levels(model, z, [level[lowest_idx] for level in logsnr], cond, guidance, negative, clip)
    if on_step:
        on_step(steps + 1 - lowest_idx, x_hat, x_hat)
    return x_hat


# ------------------------------------------------------------------------------------------ stages (Cascaded 3)

def sample_truncated(model, schedule, cond, shape, seeds, s, steps=256, sampler="ddpm", guidance=1.0, noise_param=0.2,
                     clip="static", device="cpu", on_step=None, negative=None):
    """Stop at time s in (0, 1) and return z_s, still noisy: the handoff "truncated" (3.2). Arguments as in sample().

    The steps have the length that they have in sample(), so there are (1 - s) N of them, rounded, at least one. The
    last "stochastic" step finds no time k below s: it is a deterministic one.
    """
    steps, generators = max(1, round(steps * (1 - s))), generators_of(seeds)
    logsnr = schedule(s + (1 - s) * torch.arange(steps + 1) / steps).to(device)                 # from s to 1
    z_t = draw_noise(shape, generators, device)
    for t in reversed(range(1, steps + 1)):
        x_hat = predict_x(model, z_t, logsnr[t], cond, guidance, negative, clip)
        z_t = sampler_step(z_t, x_hat, logsnr, t, sampler, noise_param, generators)
        if on_step:
            on_step(steps + 1 - t, z_t, x_hat)
    return z_t


def sample_chain(models, configs, conds, seeds, device, precisions, handoff="renoised", s=(0.0,), on_step=None,
                 negatives=None, **last):
    """Draw n images by a cascade (cascade.py). Return those of each stage, [(n, 3, H, W), ...], lowest stage first.

    models, configs, conds, precisions, negatives have one entry for each stage; s has one for each handoff.
    on_step is called as on_step(stage, first, k, z). last: options of sample_run for the last stage alone.
    """
    images = []
    for stage, (model, config, cond, precision) in enumerate(zip(models, configs, conds, precisions)):
        is_last = stage == len(models) - 1
        if stage:
            noise = handoff_noise(images[-1].shape, seeds, stage)
            low_res, aug_logsnr = hand_over(images[-1], handoff, s[stage - 1], make_low_schedule(config), noise)
            cond = dict(cond, low_res=low_res, aug_logsnr=aug_logsnr)
        options = dict(last if is_last else {}, stop=s[stage] if handoff == "truncated" and not is_last else 0.0)
        stage_seeds = [seed_of(seed, stage) for seed in seeds] if stage else seeds
        images.append(sample_run(model, config, cond, stage_seeds, device, precision,
                                 on_step and functools.partial(on_step, stage), negatives and negatives[stage],
                                 **options))
    return images


def seed_of(seed, *use):
    """Derive a seed for another use of the same seed: a later stage, the noise of a handoff.

    PyTorch's CPU generator reads only the low 32 bits of a seed: if a stage added a large number to it instead, two
    stages could start from the same noise.
    """
    return int(np.random.SeedSequence((seed, *use)).generate_state(1)[0])


def handoff_noise(shape, seeds, stage):
    """Draw the handoff's noise, N(0, I) of shape (B, 3, h, w). Image i is a function of seeds[i]."""
    return draw_noise(shape[1:], generators_of(seed_of(int(seed), stage, 1) for seed in seeds))


# ------------------------------------------------------------------------------------------ runs

def image_seeds(seed, n, first=0):
    """Return the seeds of n images, from image `first` on, of the set `seed`. Sets of a million share no seed."""
    return [seed * 1_000_003 + i for i in range(first, first + n)]


def sample_run(model, config, cond, seeds, device, precision, on_step=None, negative=None, stop=0.0, lowest_idx=1,
               levels=False):
    """Draw an image for each seed with the settings of config, in batches. Return them on the CPU, (n, 3, H, W).

    cond, negative   as in sample(), with n rows: plumbing.sampling.conditions_of
    on_step          called as on_step(first, k, z) for the batch that begins with image `first`
    stop             a time s > 0: stop there (sample_truncated)
    levels           for a nested model: return all levels side by side, not the highest alone
    """
    draw, shape, show = sample, (3, *config.size), lambda z: z
    options = dict(steps=config.sample_steps, sampler=config.sampler, noise_param=config.noise_param,
                   clip=config.clip_x, device=device)
    options["guidance"] = config.guidance if config.calls == 2 else 1.0
    if config.guidance_max:                                               # this distilled model takes w as a condition
        cond = dict(cond, guidance=torch.full((len(seeds),), config.guidance))
    if config.outer_channels:
        draw, shape = sample_levels, [(3, *size) for size in config.sizes]
        show = side_by_side if levels else lambda z: z[0]
    if stop:
        draw = functools.partial(sample_truncated, s=stop)
    else:
        options["lowest_idx"] = lowest_idx
    images = []
    for first in range(0, len(seeds), BATCH):
        rows = slice(first, first + BATCH)
        batch_cond = {key: values[rows].to(device) for key, values in cond.items()}
        options["negative"] = negative and {key: values[rows] for key, values in negative.items()}
        options["on_step"] = on_step and (lambda k, z, x_hat: on_step(first, k, show(z)))
        with torch.no_grad(), autocast(precision, device):
            z = draw(model, make_schedule(config), batch_cond, shape, seeds[rows], **options)
        images.append(show(z).cpu())
    return torch.cat(images)


def class_sheet(model, config, device, precision, columns, seed=0, real_low_res=None, encoder=None):
    """Draw the sheet that train.py saves: `columns` images of each class (the first 36) or caption (config.examples).

    real_low_res(labels or captions) gives a super-resolution model real low-res images to start from.
    """
    sheet = sheet_of(config, columns, range(min(36, len(config.class_names))), config.examples, n=64)
    cond = conditions_of(config, sheet.labels, device, sheet.captions, encoder=encoder)
    if real_low_res:
        cond["low_res"] = real_low_res(sheet.captions or sheet.labels)
        cond["aug_logsnr"] = torch.full((len(sheet.labels),), torch.inf)
    return sheet.picture(sample_run(model, config, cond, image_seeds(seed, len(sheet.labels)), device, precision))


# ------------------------------------------------------------------------------------------ the program

def main():
    args = parse(sys.argv[1:])
    handoff, s = handoffs(args)
    device, why = choose_device(args.device)
    models, configs = zip(*(load_run(run, device) for run in args.runs))
    configs = stages_of(sys.argv[1:], configs)
    check_cascade(configs, args.runs, handoff, s, args.lowest_idx)
    sheet = sheet_wanted(args, configs[-1], captions_of(args, configs))
    precisions = [choose_precision(config.precision, device) for config in configs]
    n, predictions = len(sheet.labels), predictions_of(configs, handoff, s, args.lowest_idx)
    introduce(n, configs, predictions, precisions, device, why)

    conds = [conditions_of(config, sheet.labels, device, sheet.captions, args.portrait) for config in configs]
    negatives = [conditions_of(config, sheet.labels, device, [args.negative] * n, args.portrait)
                 if args.negative and config.text_encoder else None for config in configs]
    if args.compile:
        models = [compiled(model, device) for model in models]
    film = Film(predictions) if args.gif else None

    def on_step(stage, first, k, z):
        progress(f"stage {stage + 1}: images" if len(models) > 1 else "images",
                 first + k * len(z) // predictions[stage], n)
        if film:
            film.keep(stage, k, z)

    images = sample_chain(models, configs, conds, image_seeds(args.first_seed, n), device, precisions, handoff, s,
                          on_step, negatives, lowest_idx=args.lowest_idx, levels=args.levels)

    def picture(stages):
        stages = [turned_back(stage) for stage in stages] if args.portrait else stages
        return sheet.picture(side_by_side(stages[::-1]))

    frames = [picture(stages) for stages in film.frames(images)] if film else []
    try:
        picture(images).save(args.out)
        if film:
            save_gif(frames, args.gif)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture: {error}") from None
    print(f"wrote {args.out} and {args.gif}" if film else f"wrote {args.out}")


if __name__ == "__main__":
    main_program(main)
