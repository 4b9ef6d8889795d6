"""Draw images from a trained model: one sampling step, clipping, guidance, the loop; then nested models and cascades.

Paper: simple diffusion, appendix A ("Sampling", "Classifier-free guidance") and section 2 (eq. 3); Matryoshka
Diffusion, section 3 (all levels step together); Cascaded Diffusion, section 3 (from stage to stage).
Needs: schedule.py, train.py; nested_unet.py for levels, cascade.py for stages. Next: distill.py, measures.py.

The program reads the folder of a run and writes a PNG, or a PNG and a GIF:

    python sample.py                                     letters, by the weights that come with the project
    python sample.py runs/glyphs64 --labels A,B,7 --n 8 --guidance 4 --gif letters.gif
    python sample.py runs/glyphs64_nested --levels --gif levels.gif         every level of a nested model
    python sample.py runs/glyphs16 runs/glyphs64_sr --handoff renoised --s 0.3 --labels A,B,7        a cascade

A step goes from time t to time s < t. Shapes: z, x_hat, v (B, C, H, W); logsnr_t, logsnr_s scalars or (B,).

# Paper: eq. 3 prints N(z_t | ...) for the distribution of z_s, and calls the posterior's variance sigma, not sigma^2.
"""
import plumbing  # first: from here on Ctrl-C shows no traceback
import functools
import sys

import torch

from cascade import hand_over
from config import make_low_schedule, make_schedule
from plumbing.pictures import side_by_side
from plumbing.runs import autocast, choose_device, choose_precision, load_run, main_program, progress
from plumbing.sampling import (BATCH, apply_settings, check_cascade, choose_captions, choose_sheet, compile_model,
                               count_predictions, derive_seed, image_seeds, introduce, make_conditions, open_film,
                               parse, parse_handoffs, write_pictures)
from schedule import alpha_sigma_for, diffuse, eps_from_x, x_from_v


# ------------------------------------------------------------------------------------------ one step (appendix A)

def ddim_step(z_t, x_hat, logsnr_t, logsnr_s):
    """Take the deterministic step, DDIM (Song, Meng & Ermon 2020). Note: z_s = alpha_s x_hat + sigma_s eps_hat."""
    return diffuse(x_hat, eps_from_x(z_t, x_hat, logsnr_t), logsnr_s)


def ddpm_step(z_t, x_hat, logsnr_t, logsnr_s, noise_param=0.2, noise=None):
    """Take the ancestral step z_t -> z_s: draw z_s from q(z_s | z_t, x = x_hat), eq. 3, with an interpolated variance.

    This is `ddpm_sampler_step` of appendix A, but it takes x_hat, not v. noise: N(0, I), drawn here if None.

    There are two choices of variance. noise_param = nu interpolates their logs, from the lower (nu = 0) to the upper
    (nu = 1). The paper takes 0.2, and 1.0 for its FID on COCO. Note: with c = 1 - exp(lambda_t - lambda_s), the lower
    one is c sigma_s^2, that of q(z_s | z_t, x): exact if all data are one image. The upper one is c sigma_t^2 =
    sigma^2_{t|s}, that of q(z_t | z_s): exact if x ~ N(0, I). The truth lies between.

    # Paper: prints the log variances as (1 - exp(..)) + log_sigmoid(..). The first term must be log(1 - exp(..)). It
    # names them min_lvar, then min_logvar, and does not define alpha_st: it is alpha_s / alpha_t.
    """
    alpha_t, sigma_t = alpha_sigma_for(z_t, logsnr_t)
    alpha_s, sigma_s = alpha_sigma_for(z_t, logsnr_s)
    r = (sigma_s * alpha_t / (alpha_s * sigma_t)) ** 2                    # exp(lambda_t - lambda_s), < 1
    # c = 1 - r. alpha and sigma have the shape (B, 1, 1, 1); lambda_t - lambda_s, of shape (B,), would not broadcast.
    c = -torch.expm1(2 * (torch.log(sigma_s) + torch.log(alpha_t) - torch.log(alpha_s) - torch.log(sigma_t)))
    mean = r * (alpha_s / alpha_t) * z_t + c * alpha_s * x_hat
    log_variance = (noise_param * (torch.log(c) + 2 * torch.log(sigma_t))
                    + (1 - noise_param) * (torch.log(c) + 2 * torch.log(sigma_s)))
    noise = torch.randn_like(z_t) if noise is None else noise
    return mean + torch.exp(0.5 * log_variance) * noise


# ------------------------------------------------------------------------------------------ clipping and guidance

def clip_static(x):
    """Clip to [-1, 1], the range of images."""
    return x.clamp(-1, 1)


def clip_dynamic(x, percentile=0.995):
    """Threshold dynamically (Imagen). For each image, s = max(1, quantile of |x|). Clip x to [-s, s], divide by s.

    percentile: a number in [0, 1]; 0.995 is the 99.5th percentile. Note: strong guidance drives most pixels out of
    [-1, 1]. Static clipping sends them all to -1 or 1, so the colours saturate. Division keeps their differences.
    """
    s = torch.quantile(x.abs().flatten(1), percentile, dim=1).clamp(min=1)
    s = s.reshape(-1, *[1] * (x.ndim - 1))
    return x.clamp(-s, s) / s


CLIPS = {"static": clip_static, "dynamic": clip_dynamic, "none": lambda x: x}


def guide(v_cond, v_null, w):
    """Apply eq. 7 to v (or eps, or x); w = 1 gives v_cond, exactly. Note: (1 + eta) v_cond - eta v_null, w = 1 + eta"""
    return v_cond + (w - 1) * (v_cond - v_null)


NEVER_DROPPED = ("low_res", "aug_logsnr", "portrait")


def null_condition(cond, negative=None):
    """Return the conditions for v_null, the unconditional prediction: no label, no text; or `negative` in their place.

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
    steps        N, the number of steps: N network evaluations, or 2 N with guidance
    sampler      "ddpm" (the paper's), "ddim", or "stochastic" (for distilled models)
    guidance     w of eq. 7; 1 = off
    noise_param  nu of ddpm_step
    clip         how to clip x_hat: a key of CLIPS
    lowest_idx   index i of the last prediction, at time i / N. 1: return the x_hat of t = 1 / N. 0: predict once more,
                 at t = 0, where z is almost clean (sigma = 5.5e-4 at logsnr 15)
    on_step      called as on_step(k, z, x_hat) after prediction k = 1, 2, ...; the last time z is x_hat
    negative     conditions used for v_null. Guidance leads away from them. Default: none, as in eq. 7

    # Paper: does not say the number of steps; 256 is ours. Its last lines use an alpha_t and a sigma_t that are never
    # set; they must be those of lowest_idx.
    """
    generators = make_generators(seeds)
    logsnr = schedule(torch.arange(steps + 1) / steps).to(device)         # (N + 1,): index i is time i / N
    z_t = draw_noise(shape, generators, device)                           # (B, C, H, W): z_1 ~ N(0, I)
    for i in reversed(range(lowest_idx + 1, steps + 1)):
        x_hat = predict_x(model, z_t, logsnr[i], cond, guidance, negative, clip)
        z_t = sampler_step(z_t, x_hat, logsnr, i, sampler, noise_param, generators)
        if on_step:
            on_step(steps + 1 - i, z_t, x_hat)
    # The last prediction: return the mean, do not draw from p(x | z_lowest).
    x_hat = predict_x(model, z_t, logsnr[lowest_idx], cond, guidance, negative, clip)
    if on_step:
        on_step(steps + 1 - lowest_idx, x_hat, x_hat)
    return x_hat


def sampler_step(z_t, x_hat, logsnr, i, sampler, noise_param, generators):
    """Step from time t = i / N to s = (i - 1) / N. logsnr (N + 1,) holds the log-SNR of all times, as in sample()."""
    if sampler == "ddim":
        return ddim_step(z_t, x_hat, logsnr[i], logsnr[i - 1])
    noise = draw_noise(z_t.shape[1:], generators, z_t.device)
    if sampler == "ddpm":
        return ddpm_step(z_t, x_hat, logsnr[i], logsnr[i - 1], noise_param, noise)
    if sampler == "stochastic":
        return renoise_step(z_t, x_hat, logsnr[i], logsnr[max(i - 2, 0)], logsnr[i - 1], noise)  # distilled models
    raise ValueError(f"sampler {sampler!r}: want ddpm, ddim or stochastic")


def make_generators(seeds):
    """Return a random generator for each image. They run on the CPU: a seed gives the same noise on any device."""
    return [torch.Generator().manual_seed(int(seed)) for seed in seeds]


def draw_noise(shape, generators, device="cpu"):
    """Draw N(0, I) of shape (B, *shape), each image by its own generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


# Simple diffusion ends here. Below: distilled models, levels (Matryoshka), stages (Cascaded), runs, the program.

# ------------------------------------------------------------------------------------------ distilled models

def renoise_step(z_t, x_hat, logsnr_t, logsnr_k, logsnr_s, noise=None):
    """Take the stochastic step of distilled models (Meng et al. 2022): z_t -> z_k -> z_s with k < s < t.

    First a deterministic step of twice the length leads to z_k. Then fresh noise leads back up to s:
    z_s = (alpha_s / alpha_k) z_k + sigma_{s|k} eps, where sigma^2_{s|k} = (1 - exp(lambda_s - lambda_k)) sigma_s^2.
    So the variance at s is sigma_s^2 again.

    # Paper: Meng et al. change the training for this sampler at the first and the last time steps (their algorithm 3,
    # unverified here). distill.py does not, so its students meet this sampler as they were trained for ddim.
    """
    z_k = ddim_step(z_t, x_hat, logsnr_t, logsnr_k)
    alpha_k, sigma_k = alpha_sigma_for(z_t, logsnr_k)
    alpha_s, sigma_s = alpha_sigma_for(z_t, logsnr_s)
    variance = sigma_s ** 2 - (alpha_s * sigma_k / alpha_k) ** 2
    noise = torch.randn_like(z_t) if noise is None else noise
    return alpha_s / alpha_k * z_k + variance.clamp(min=0).sqrt() * noise


# ------------------------------------------------------------------------------------------ levels (Matryoshka 3)

def predict_levels(model, z, logsnr_t, cond, guidance=1.0, negative=None, clip="static"):
    """Predict x of every level, guided and clipped as in predict_x. Take and return lists, highest level first."""
    v = model(z, logsnr_t, cond)
    if guidance != 1:
        v_null = model(z, logsnr_t, null_condition(cond, negative))
        v = [guide(v_r, null_r, guidance) for v_r, null_r in zip(v, v_null)]
    return [CLIPS[clip](x_from_v(z_r, v_r, logsnr_r)) for z_r, v_r, logsnr_r in zip(z, v, logsnr_t)]


def sample_levels(model, schedules, cond, shapes, seeds, steps=256, sampler="ddpm", guidance=1.0, noise_param=0.2,
                  clip="static", lowest_idx=1, device="cpu", on_step=None, negative=None):
    """Draw images of a nested model. Return all levels, [(B, C, H, W), ...], highest first. Arguments as in sample().

    schedules and shapes have one entry for each level. Each level r starts from its own noise. All levels take each
    step together, each with its own alpha and sigma. on_step gets the lists z and x_hat.
    """
    generators = make_generators(seeds)
    logsnr = [schedule(torch.arange(steps + 1) / steps).to(device) for schedule in schedules]   # a level: (N + 1,)
    z = [draw_noise(shape, generators, device) for shape in shapes]
    for i in reversed(range(lowest_idx + 1, steps + 1)):
        x_hat = predict_levels(model, z, [logsnr_r[i] for logsnr_r in logsnr], cond, guidance, negative, clip)
        z = [sampler_step(z_r, x_r, logsnr_r, i, sampler, noise_param, generators)
             for z_r, x_r, logsnr_r in zip(z, x_hat, logsnr)]
        if on_step:
            on_step(steps + 1 - i, z, x_hat)
    x_hat = predict_levels(model, z, [logsnr_r[lowest_idx] for logsnr_r in logsnr], cond, guidance, negative, clip)
    if on_step:
        on_step(steps + 1 - lowest_idx, x_hat, x_hat)
    return x_hat


# ------------------------------------------------------------------------------------------ stages (Cascaded 3)

def sample_truncated(model, schedule, cond, shape, seeds, stop, steps=256, sampler="ddpm", guidance=1.0,
                     noise_param=0.2, clip="static", device="cpu", on_step=None, negative=None):
    """Sample down to the time `stop` in (0, 1) and return z there, still noisy. Other arguments as in sample().

    This is the handoff "truncated" (3.2). The steps are as long as in sample(). So it takes (1 - stop) N of them,
    rounded, at least one. With the sampler "stochastic" the last step is a plain DDIM step.
    """
    steps, generators = max(1, round(steps * (1 - stop))), make_generators(seeds)
    logsnr = schedule(stop + (1 - stop) * torch.arange(steps + 1) / steps).to(device)           # from stop to 1
    z_t = draw_noise(shape, generators, device)
    for i in reversed(range(1, steps + 1)):
        x_hat = predict_x(model, z_t, logsnr[i], cond, guidance, negative, clip)
        z_t = sampler_step(z_t, x_hat, logsnr, i, sampler, noise_param, generators)
        if on_step:
            on_step(steps + 1 - i, z_t, x_hat)
    return z_t


def sample_chain(models, configs, conds, seeds, device, precisions, handoff="renoised", handoff_times=(0.0,),
                 on_step=None, negatives=None, **last_stage_options):
    """Draw n images by a cascade (cascade.py). Return those of each stage, [(n, 3, H, W), ...], lowest stage first.

    models, configs, conds, precisions, negatives: one for each stage. A single run is a cascade of one stage.
    handoff_times: for each handoff, the time s in [0, 1) of its noise.
    on_step: called as on_step(stage, first, k, z), see sample_run.
    last_stage_options: arguments of sample_run for the last stage alone.
    """
    images, last = [], len(models) - 1
    for stage, (model, config, cond, precision) in enumerate(zip(models, configs, conds, precisions)):
        stage_seeds = seeds
        if stage > 0:                                                     # give it the images of the stage below
            noise = handoff_noise(images[-1].shape, seeds, stage)
            low_schedule = make_low_schedule(config)
            low_res, aug_logsnr = hand_over(images[-1], handoff, handoff_times[stage - 1], low_schedule, noise)
            cond = dict(cond, low_res=low_res, aug_logsnr=aug_logsnr)
            stage_seeds = [derive_seed(seed, stage) for seed in seeds]
        stop = handoff_times[stage] if handoff == "truncated" and stage < last else 0.0
        images.append(sample_run(model, config, cond, stage_seeds, device, precision,
                                 on_step and functools.partial(on_step, stage), negatives and negatives[stage],
                                 stop=stop, **(last_stage_options if stage == last else {})))
    return images


def handoff_noise(shape, seeds, stage):
    """Draw the noise of the handoff to `stage`: N(0, I) of shape (B, 3, h, w). Image i depends on seeds[i] alone."""
    return draw_noise(shape[1:], make_generators(derive_seed(int(seed), stage, 1) for seed in seeds))


# ------------------------------------------------------------------------------------------ runs

def sample_run(model, config, cond, seeds, device, precision, on_step=None, negative=None, stop=0.0, lowest_idx=1,
               levels=False):
    """Draw an image for each seed with the settings of config, in batches. Return them on the CPU, (n, 3, H, W).

    cond, negative   as in sample(), with a row for each of the n images: make_conditions builds them
    on_step          called as on_step(first, k, z) after prediction k of a batch; first: number of its first image
    stop             0, or the time at which sampling stops (sample_truncated)
    levels           for a nested model: return all levels side by side, not only the highest
    """
    options = dict(steps=config.sample_steps, sampler=config.sampler, noise_param=config.noise_param,
                   clip=config.clip_x, device=device, guidance=config.guidance if config.evaluations == 2 else 1.0)
    if config.guidance_max:                                               # this distilled model takes w as a condition
        cond = dict(cond, guidance=torch.full((len(seeds),), config.guidance))
    options |= dict(stop=stop) if stop else dict(lowest_idx=lowest_idx)
    draw, shape, to_images = sample_truncated if stop else sample, config.shapes[0], lambda z: z
    if config.is_nested:                                                  # here z is a list, one entry for each level
        draw, shape, to_images = sample_levels, config.shapes, side_by_side if levels else lambda z: z[0]
    images = []
    for first in range(0, len(seeds), BATCH):
        rows = slice(first, first + BATCH)
        batch_cond = {key: values[rows].to(device) for key, values in cond.items()}
        options["negative"] = negative and {key: values[rows] for key, values in negative.items()}
        options["on_step"] = on_step and (lambda k, z, x_hat: on_step(first, k, to_images(z)))
        with torch.no_grad(), autocast(precision, device):
            z = draw(model, make_schedule(config), batch_cond, shape, seeds[rows], **options)
        images.append(to_images(z).cpu())
    return torch.cat(images)


# ------------------------------------------------------------------------------------------ the program

def main():
    # Read the arguments, load the models (of a cascade all stages), choose the images to draw.
    args = parse(sys.argv[1:])
    handoff, handoff_times = parse_handoffs(args)
    device, device_reason = choose_device(args.device)
    models, configs = zip(*(load_run(run, device) for run in args.runs))
    configs = apply_settings(sys.argv[1:], configs)
    check_cascade(configs, args.runs, handoff, handoff_times, args.lowest_idx)
    sheet = choose_sheet(args, configs[-1], choose_captions(args, configs))
    n, precisions = len(sheet.labels), [choose_precision(config.precision, device) for config in configs]
    predictions = count_predictions(configs, handoff, handoff_times, args.lowest_idx)
    introduce(n, configs, predictions, precisions, device, device_reason)

    # The conditions of each stage, then the images.
    conds = [make_conditions(config, sheet.labels, device, sheet.captions, args.portrait) for config in configs]
    negatives = [make_conditions(config, sheet.labels, device, [args.negative] * n, args.portrait)
                 if args.negative and config.text_encoder else None for config in configs]
    if args.compile:
        models = [compile_model(model, device) for model in models]
    film = open_film(args, configs[-1], predictions)

    def on_step(stage, first, k, z):
        images_done = first + k * len(z) // predictions[stage]
        progress(f"stage {stage + 1}: images" if len(models) > 1 else "images", images_done, n)
        if film:
            film.keep(stage, k, z)

    images = sample_chain(models, configs, conds, image_seeds(args.first_seed, n), device, precisions, handoff,
                          handoff_times, on_step, negatives, lowest_idx=args.lowest_idx, levels=args.levels)
    write_pictures(args, sheet, images, film)


if __name__ == "__main__":
    main_program(main)
