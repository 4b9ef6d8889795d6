"""From noise to pictures: DDPM and DDIM steps, clipping, guidance, the loop; as a program, from a run to a PNG or GIF.

Paper: simple diffusion, appendix A ("Sampling", "Classifier-free guidance"), section 2 (eq. 3); Matryoshka Diffusion 3:
all levels step together; Cascaded Diffusion 3: what one stage hands to the next.
Read before: schedule.py, train.py; nested_unet.py for several levels, cascade.py for several stages.

    python sample.py runs/glyphs64                       a grid, some images of each class
    python sample.py runs/glyphs64 --labels A,B,7 --n 8 --guidance 4 --gif letters.gif
    python sample.py runs/glyphs64_text --text "a blue serif Q on striped yellow" --text "a white 7 on red"
    python sample.py runs/glyphs64_nested --levels --gif levels.gif         every level of a nested model
    python sample.py runs/glyphs16 runs/glyphs64_sr --handoff renoised --s 0.3 --labels A,B,7        a cascade

Shapes: z, x_hat (B, C, H, W); logsnr_t, logsnr_s scalars or (B,), s < t one step closer to the image.

# Paper: eq. 3 prints N(z_t | ...) for the law of z_s, and calls the posterior's variance sigma without the square.
"""
import functools
import math
import os
import sys

import numpy as np
import torch

from cascade import HANDOFFS, hand_over
from plumbing.settings import Parser, add_fields, override
from config import make_low_schedule, make_schedule
from plumbing import UserError
from data import turned_back
from plumbing.pictures import captioned, grid, side_by_side
from plumbing.runs import autocast, choose_device, choose_precision, ema_model, load_run, main_program, progress
from schedule import alpha_sigma_for, diffuse, eps_from_x, x_from_v
from plumbing.t5 import Encoder, check_moved


# ------------------------------------------------------------------------------------------ one step (appendix A)

def ddpm_step(z_t, x_hat, logsnr_t, logsnr_s, noise_param=0.2, noise=None):
    """Ancestral step z_t -> z_s: a draw from q(z_s | z_t, x = x_hat), eq. 3, with the variance chosen in between.

    With c = 1 - exp(lambda_t - lambda_s), sigma^2_{t|s} = c sigma_t^2 and the posterior's variance is c sigma_s^2. They
    are the upper and the lower bound on the variance of the true reverse step (exact if the data are N(0, 1), or a
    single point); noise_param = nu goes from the lower (0) to the upper (1) in logs. noise: N(0, 1), drawn if None.

    0.2 is the paper's, 1.0 for its FID on COCO.
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
    """Deterministic step (Song et al.): keep the predicted x and eps, change their proportions."""
    return diffuse(x_hat, eps_from_x(z_t, x_hat, logsnr_t), logsnr_s)


def renoise_step(z_t, x_hat, logsnr_t, logsnr_k, logsnr_s, noise=None):
    """The stochastic step of distilled models (Meng et al. 2023): z_t -> z_s by a deterministic step of twice the
    length, to k < s, and back up to s by fresh noise: z_s = (alpha_s / alpha_k) z_k + sigma_{s|k} eps.

    sigma^2_{s|k} = (1 - exp(lambda_s - lambda_k)) sigma_s^2, so that the variance at s comes out at sigma_s^2 again.
    """
    logsnr_k, logsnr_s = torch.as_tensor(logsnr_k), torch.as_tensor(logsnr_s)
    z_k = ddim_step(z_t, x_hat, logsnr_t, logsnr_k)
    alpha_k, sigma_k = alpha_sigma_for(z_t, logsnr_k)
    alpha_s, sigma_s = alpha_sigma_for(z_t, logsnr_s)
    variance = sigma_s ** 2 - (alpha_s * sigma_k / alpha_k) ** 2
    noise = torch.randn_like(z_t) if noise is None else noise
    return alpha_s / alpha_k * z_k + variance.clamp(min=0).sqrt() * noise


def clip_static(x):
    """Images live in [-1, 1]; a prediction outside is pulled back."""
    return x.clamp(-1, 1)


def clip_dynamic(x, percentile=0.995):
    """Imagen's dynamic thresholding, per image: s = the percentile of |x|, at least 1; clip to [-s, s], divide by s.

    With strong guidance most pixels leave the range; clipping them all gives burnt colours, dividing does not.
    """
    s = torch.quantile(x.abs().flatten(1), percentile, dim=1).clamp(min=1)
    s = s.reshape(-1, *[1] * (x.ndim - 1))
    return x.clamp(-s, s) / s


CLIPS = {"static": clip_static, "dynamic": clip_dynamic, "none": lambda x: x}


def guide(v_cond, v_null, w):
    """Eq. 7, for v (as well as eps or x): (1 + eta) v_cond - eta v_null, w = 1 + eta. w = 1 gives v_cond, exactly."""
    return v_cond + (w - 1) * (v_cond - v_null)


# ------------------------------------------------------------------------------------------ the loop (appendix A)

NEVER_DROPPED = ("low_res", "aug_logsnr", "portrait")                     # by guidance: all other conditions are


def sample(model, schedule, cond, shape, seeds, steps=256, sampler="ddpm", guidance=1.0, noise_param=0.2,
           clip="static", lowest_idx=1, device="cpu", on_step=None, stop=0.0, negative=None):
    """Images (B, C, H, W) in [-1, 1] from `model`, by `steps` network evaluations (twice that with guidance).

    schedule    t -> logsnr
    cond        conditions of the B images; guidance drops them all but the low-res image of a super-resolution model
                and the portrait flag
    negative    conditions for guidance to lead away from, in the place of dropped ones: eq. 7 with cond' for no cond
    sampler     "ddpm" (the paper's), "ddim", or "stochastic" (distilled models); noise_param: of ddpm alone
    guidance    w of eq. 7, 1 = off
    clip        of x_hat, one of CLIPS: "static", "dynamic", "none"
    shape       (C, H, W)
                A nested model has a list of schedules and of shapes, highest level first. Its levels begin as noises of
                their own and take each step together, each with its own alpha and sigma, all clipped, all guided; the
                result is the list of the levels, as are z and x_hat for on_step.
    seeds       B integers, one an image: image i depends on seeds[i] alone, whatever else is in the batch
    lowest_idx  0 or 1, as in the paper: the time index at which the last prediction is returned, without noise. With 1,
                N steps cost N evaluations. With 0 the loop goes on to t = 0 and looks once more, at a clean z: N + 1.
    on_step     called as on_step(k, z, x_hat) after evaluation k = 1, 2, ...
    stop        a time s: stop there and return z_s as it is, noisy ("truncated", cascade.py); 0 = go to the end. The
                steps from 1 to s are then as long as they would have been: (1 - s) of them, rounded.
    Raises ValueError for another sampler or clip.
    # Paper: silent on the number of steps, 256 is ours. Its `sample` ends with an alpha_t, sigma_t that it never sets:
    # we take those of lowest_idx.
    """
    if sampler not in ("ddpm", "ddim", "stochastic") or clip not in CLIPS:
        raise ValueError(f"sampler {sampler!r}, clip {clip!r}: want ddpm, ddim, stochastic; {', '.join(CLIPS)}")
    nested = isinstance(shape, list)
    kept = {key: cond[key] for key in NEVER_DROPPED if key in cond} | (negative or {})
    schedules, shapes = (schedule, shape) if nested else ([schedule], [shape])
    # One generator an image, on the CPU: the same seed is the same picture in any batch, on any device.
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def noise():
        draws = [[torch.randn(level, generator=g) for level in shapes] for g in generators]
        return [torch.stack(level).to(device) for level in zip(*draws)]

    def evaluate(z, logsnr, cond):
        return model(z, logsnr, cond) if nested else [model(z[0], logsnr[0], cond)]

    def predict(z, logsnr):
        v = evaluate(z, logsnr, cond)
        if guidance != 1:                                                 # w = 1 costs one evaluation, not two
            dropped = evaluate(z, logsnr, kept)                           # a condition that is absent is dropped
            v = [guide(v_cond, v_null, guidance) for v_cond, v_null in zip(v, dropped)]
        return [CLIPS[clip](x_from_v(*level)) for level in zip(z, v, logsnr)]

    def tell(k, z, x_hat):
        if on_step:
            on_step(k, *((z, x_hat) if nested else (z[0], x_hat[0])))

    z = noise()                                                           # z_1 ~ N(0, I)
    if stop:
        steps, lowest_idx = max(1, round(steps * (1 - stop))), 0
    t = stop + (1 - stop) * torch.arange(steps + 1) / steps               # stop, ..., 1; by 1/N from 0 if none is given
    times = [list(level) for level in zip(*(schedule(t).to(device) for schedule in schedules))]   # logsnr at each
    for k, i in enumerate(range(steps, lowest_idx, -1), 1):
        x_hat = predict(z, times[i])
        if sampler == "ddpm":
            z = [ddpm_step(*level[:4], noise_param, level[4])
                 for level in zip(z, x_hat, times[i], times[i - 1], noise())]
        elif sampler == "stochastic":
            z = [renoise_step(*level) for level in zip(z, x_hat, times[i], times[max(i - 2, 0)], times[i - 1], noise())]
        else:
            z = [ddim_step(*level) for level in zip(z, x_hat, times[i], times[i - 1])]
        tell(k, z, x_hat)
    if stop:
        return z if nested else z[0]
    x_hat = predict(z, times[lowest_idx])                                 # the mean, not a draw
    tell(steps - lowest_idx + 1, x_hat, x_hat)
    return x_hat if nested else x_hat[0]


# ------------------------------------------------------------------------------------------ runs and pictures

def compiled(model, device):
    """The network as one graph (torch.compile); with CUDA its kernels are recorded once and replayed at each call (CUDA
    graphs): launching small kernels one by one from Python takes longer than they do. A replay writes its result where
    the last one did, and guidance looks twice: hence the copies."""
    graph = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else "default")

    def call(z, logsnr, cond):
        v = graph(z, logsnr, cond)
        return [level.clone() for level in v] if isinstance(v, list) else v.clone()
    return call


def sample_run(model, config, labels, seeds, device, precision, on_step=None, batch=64, lowest_idx=1, levels=False,
               low_res=None, stop=0.0, captions=None, negative="", portrait=False, encoder=None):
    """Images of these labels (-1: no class) by the sampler, steps and guidance of config, in batches, on the CPU.

    low_res: (images, aug_logsnr) for a super-resolution model, as hand_over gives them. stop: as in sample().
    captions: for a model with text one an image, "" = none; negative: what guidance leads away from. portrait: with the
    flag; the images come as the model draws them, turned (data.py has `turned_back`). encoder: text.py's; None: opened.

    Of a nested model the highest level, or with levels=True all of them side by side (`side_by_side`). on_step is
    called as on_step(first, k, z), z (B, 3, H, W) likewise.
    """
    show = (lambda z: side_by_side(z) if levels else z[0]) if config.outer_channels else (lambda z: z)
    shapes = [(3, *size) for size in config.sizes]
    guidance = config.guidance if config.calls == 2 else 1.0             # nothing to drop, nothing to guide
    if config.text_encoder:
        captions, encoder = captions or [""] * len(labels), encoder or Encoder(config, device)
    images = []
    for first in range(0, len(labels), batch):
        part = slice(first, first + batch)
        cond, away = {"label": torch.tensor(labels[part], device=device)}, None
        if config.text_encoder:
            cond = encoder(captions[part])
            away = encoder([negative] * len(captions[part])) if negative else None
        if config.guidance_max:
            cond["guidance"] = torch.full((len(labels[part]),), config.guidance, device=device)
        if config.portrait:
            cond["portrait"] = torch.full((len(labels[part]),), int(portrait), device=device)
        if low_res is not None:
            cond.update(low_res=low_res[0][part].to(device), aug_logsnr=low_res[1][part].to(device))
        with torch.no_grad(), autocast(precision, device):
            images.append(show(sample(
                model, make_schedule(config), cond, shapes if config.outer_channels else shapes[0], seeds[part],
                config.sample_steps, config.sampler, guidance, config.noise_param, config.clip_x, lowest_idx, device,
                on_step and (lambda k, z, x_hat: on_step(first, k, show(z))), stop, away)).cpu())
    return torch.cat(images)


def sample_chain(models, configs, labels, seeds, device, precisions, handoff="renoised", s=(0.0,), on_step=None,
                 last=None, **told):
    """A cascade: -> [images of each stage], lowest first. s: a time for each handoff, precisions: one for each stage.
    See cascade.py.

    on_step(stage, first, k, z). last: options of the last stage's sample_run; told: of every stage's.
    """
    made = []
    for stage, (model, config) in enumerate(zip(models, configs)):
        low_res, options = None, (last or {}) if stage == len(models) - 1 else {}
        if stage:
            # Noise of its own for each image, from a seed of its own: the image does not depend on its batch.
            low_res = hand_over(made[-1], handoff, s[stage - 1], make_low_schedule(config),
                                handoff_noise(made[-1].shape, seeds, stage))
        stop = s[stage] if handoff == "truncated" and stage < len(models) - 1 else 0.0
        tell = on_step and functools.partial(on_step, stage)
        its_seeds = [seed_of(seed, stage) for seed in seeds] if stage else seeds
        made.append(sample_run(model, config, labels, its_seeds, device, precisions[stage], tell,
                               low_res=low_res, stop=stop, **options, **told))
    return made


def seed_of(seed, *use):
    """Another seed for another use. PyTorch's CPU generator looks at 32 bits only: adding a large number would change
    nothing, and two stages would start from one noise."""
    return int(np.random.SeedSequence((seed, *use)).generate_state(1)[0])


def handoff_noise(shape, seeds, stage):
    """N(0, I) of this shape (B, 3, h, w), image i a function of seeds[i]."""
    generators = [torch.Generator().manual_seed(seed_of(int(seed), stage, 1)) for seed in seeds]
    return torch.stack([torch.randn(shape[1:], generator=g) for g in generators])


def check_levels(configs, names, handoff, levels):
    """Has each stage learnt the noise level that it is to be given? Raises UserError. levels: s of each handoff."""
    for s, config, name in zip(levels, configs[1:], names[1:]):
        if s and handoff != "clean" and not config.aug_noise:
            raise UserError(f"{name} has learnt no noise on its low-res images (aug_noise 0): give it --s 0, or "
                            "--handoff clean")
        if (not s or handoff == "clean") and config.aug_noise == 1:
            raise UserError(f"{name} has learnt no low-res images without noise (aug_noise 1): give it --s above 0")


def check_student(config, name, lowest_idx=1, stop=0.0):
    """Is a distilled run (distill.py) to be sampled as it was taught, at the times of its steps? Raises UserError."""
    steps = config.distilled_steps
    if steps and (config.sample_steps != steps or config.sampler == "ddpm" or lowest_idx != 1):
        raise UserError(f"{name} was distilled to {steps} steps of ddim (or stochastic): leave out --steps, --sampler "
                        "ddpm and --lowest-idx 0")
    if steps and stop * steps % 1:
        raise UserError(f"{name} was distilled to {steps} steps: it can be truncated at a multiple of 1/{steps} only")


def check_chain(configs, names):
    """Do these stages fit each other? Raises UserError naming the first fault. Lowest stage first."""
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
            raise UserError(f"{name} knows noise by another schedule than that of {low_name} (schedule, noise_d, "
                            "logsnr_min, logsnr_max)")


def class_sheet(model, config, device, precision, a_class, seed=0, real_low_res=None, most=36, encoder=None):
    """One row a class (the first `most` of them) or a caption (config.examples), `a_class` images each; without either
    8 x 8 images.

    real_low_res(labels or captions) gives a super-resolution model real low-res images to draw from.
    """
    if config.text_encoder:
        captions = [caption for caption in config.examples for _ in range(a_class)]
        low_res = real_low_res and (real_low_res(captions), torch.full((len(captions),), torch.inf))
        seeds = [seed * 1_000_003 + i for i in range(len(captions))]
        images = sample_run(model, config, [-1] * len(captions), seeds, device, precision, low_res=low_res,
                            captions=captions, encoder=encoder)
        return captioned(images, a_class, config.examples)
    names = list(config.class_names[:most]) or None
    labels = [i for i in range(len(names)) for _ in range(a_class)] if names else [-1] * 64
    low_res = real_low_res and (real_low_res(labels), torch.full((len(labels),), torch.inf))
    images = sample_run(model, config, labels, [seed * 1_000_003 + i for i in range(len(labels))], device, precision,
                        low_res=low_res)
    return grid(images, a_class if names else 8, names, blocks=math.ceil(len(names) / 12) if names else 1)


# ------------------------------------------------------------------------------------------ the program

OVERRIDES = ("sampler", "guidance", "noise_param", "clip_x", "precision", "text_encoder")


def words_of(argv, stage):
    """(the command line as this stage of a cascade has it, {number of stages that a setting speaks of}): of
    "--steps 24,12" each stage takes its own part."""
    parts = {}
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name[2:].replace("-", "_") in (*OVERRIDES[:-2], "steps") and name.startswith("--"):
            at, value = (i, value) if equals else (i + 1, argv[i + 1] if i + 1 < len(argv) else "")
            if "," in value:
                parts[at] = [f"{name}={v}" if equals else v for v in value.split(",")]
    words = [parts[i][min(stage, len(parts[i]) - 1)] if i in parts else word for i, word in enumerate(argv)]
    return words, {len(values) for values in parts.values()}


def parse(argv, stage=0):
    """The arguments as stage `stage` of a cascade has them."""
    parser = Parser(prog="sample.py", description="Draw images from a trained run, or from the runs of a cascade.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of the run; of a cascade all, the lowest first")
    parser.add_argument("--n", type=int, help="images a class or caption (default 4), or in all for a run without (32)")
    parser.add_argument("--labels", help="classes by name or number, separated by commas (default: up to 36 of them)")
    parser.add_argument("--text", action="append", help="of a model with text: draw this; again for more captions")
    parser.add_argument("--prompts", metavar="FILE", help="of a model with text: draw each line of this file")
    parser.add_argument("--negative", metavar="TEXT", help="what guidance is to lead away from (default: nothing)")
    parser.add_argument("--portrait", action="store_true", help="upright pictures, of a run with --portrait")
    parser.add_argument("--steps", type=int, help="steps an image; guidance looks twice a step (default: the run's)")
    parser.add_argument("--lowest-idx", type=int, choices=(0, 1), default=1, help="see sample() (default 1)")
    parser.add_argument("--seed", dest="first_seed", type=int, default=0, help="another seed, other images (default 0)")
    parser.add_argument("--levels", action="store_true", help="show every level of a nested model, the lowest left "
                        "(the stages of a cascade are always shown)")
    parser.add_argument("--handoff", choices=HANDOFFS, help="of a cascade: what a stage gives the next")
    parser.add_argument("--s", type=float, action="append", help="of a cascade: its noise, 0 to 1; once, or for each "
                        "handoff")
    parser.add_argument("--out", default="samples.png", help="PNG to write (default samples.png)")
    parser.add_argument("--gif", help="GIF of the denoising to write as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--compile", action="store_true", help="torch.compile and CUDA graphs: a minute to start, then "
                        "faster on a GPU")
    add_fields(parser, OVERRIDES, "settings of the run to override; for a cascade one, or one a stage: --guidance 5,1")
    words, stages = words_of(argv, stage)
    args = parser.parse_args(words)
    if wrong := stages - {len(args.runs)}:
        raise UserError(f"{len(args.runs)} runs, but settings for {max(wrong)} stages: want one, or one for each")
    return args


def stages_of(argv, device):
    """([Model], [Config]) of the runs, each with its own part of the settings given. Raises UserError."""
    models, configs, runs = [], [], parse(argv).runs
    for stage, run in enumerate(runs):
        model, config = load_run(run, device)
        args = parse(argv, stage)
        given = {k: v for k, v in vars(args).items() if k in OVERRIDES}
        if args.steps is not None:
            if args.steps < 1:
                raise UserError(f"--steps {args.steps}: want 1 or more")
            given["sample_steps"] = args.steps
        check_moved(config.text_encoder, given.get("text_encoder", config.text_encoder), run)
        models.append(model)
        configs.append(override(config, **given))
    check_chain(configs, runs)
    return models, configs


def handoffs(args):
    """(handoff, [s, ...]) of a cascade, checked."""
    count = len(args.runs) - 1
    if not count:
        if args.handoff or args.s:
            raise UserError("--handoff and --s are for the stages of a cascade: give their runs, the lowest first")
        return None, []
    if not args.handoff:
        raise UserError(f"{len(args.runs)} runs are a cascade: say --handoff {', '.join(HANDOFFS)}")
    if args.handoff == "clean":
        if args.s:
            raise UserError("--handoff clean has no noise: leave out --s")
        return "clean", [0.0] * count
    if not args.s or len(args.s) not in (1, count):
        raise UserError(f"--handoff {args.handoff}: say with --s how much noise, once or {count} times")
    if any(not 0 <= s < 1 for s in args.s):
        raise UserError(f"--s {max(args.s, key=lambda s: abs(s - 0.5)):g}: want 0 or more, less than 1")
    return args.handoff, args.s * (count if len(args.s) == 1 else 1)


def captions_of(args, configs):
    """The captions that are asked for, or the run's examples; None for models without text. Raises UserError."""
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
    captions = list(args.text or [])
    if args.prompts is not None:
        try:
            with open(args.prompts, encoding="utf-8-sig") as file:
                captions += [line.strip() for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts {args.prompts}: {getattr(error, 'strerror', None) or error}") from None
        if not captions:
            raise UserError(f"--prompts {args.prompts}: no line with text")
    for caption in [*captions, args.negative or ""]:
        if not caption.isprintable():
            raise UserError(f"--text {caption!r}: holds characters that are not text")
    if args.negative and all(config.calls == 1 for config in readers):
        raise UserError("--negative: without guidance nothing leads away from it; want --guidance above 1")
    for config in readers:
        for caption in [*captions, args.negative or ""]:
            if config.text_encoder == "bytes" and len(caption.encode()) > config.text_length:
                raise UserError(f"--text: this model reads {config.text_length} bytes, and {caption[:60]!r} has "
                                f"{len(caption.encode())}")
    return captions or list(configs[-1].examples or readers[0].examples) or [""]


def label_numbers(text, config):
    """"A,7" -> class numbers. A name is looked for first, then a number."""
    numbers = []
    for part in text.split(","):
        if part in config.class_names:
            numbers.append(config.class_names.index(part))
        elif part.isdecimal() and int(part) < config.num_classes:
            numbers.append(int(part))
        else:
            known = ", ".join(config.class_names[:40]) + (", ..." if len(config.class_names) > 40 else "")
            raise UserError(f"--labels {part}: this run knows {known or 'no classes'}")
    return numbers


def main():
    args = parse(sys.argv[1:])
    device, why = choose_device(args.device)
    models, configs = stages_of(sys.argv[1:], device)
    (handoff, s), config = handoffs(args), configs[-1]
    check_levels(configs, args.runs, handoff, s)
    for stage, (c, run) in enumerate(zip(configs, args.runs)):
        truncated = handoff == "truncated" and stage < len(configs) - 1
        check_student(c, run, args.lowest_idx if c is config else 1, s[stage] if truncated else 0.0)
    if args.levels and not config.outer_channels:
        raise UserError(f"--levels: {args.runs[0]} is not of a nested model")
    precisions = [choose_precision(c.precision, device) for c in configs]
    if args.compile:
        models = [compiled(model, device) for model in models]
    if args.n is not None and args.n < 1:
        raise UserError(f"--n {args.n}: want 1 or more")
    for option, path in (("--out", args.out), ("--gif", args.gif)):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"{option} {path}: its folder does not exist")
        if path and not path.lower().endswith(".png" if option == "--out" else ".gif"):
            raise UserError(f"{option} {path}: want a name that ends in {'.png' if option == '--out' else '.gif'}")
    if not 0 <= args.first_seed < 2 ** 31:
        raise UserError(f"--seed {args.first_seed}: want 0 or more, less than 2^31")

    captions = captions_of(args, configs)
    if args.portrait and not config.portrait:
        raise UserError(f"--portrait: {args.runs[-1]} was trained without upright images")
    classes = label_numbers(args.labels, config) if args.labels else list(range(min(36, config.num_classes)))
    told = dict(portrait=args.portrait)
    if captions:
        columns, names = args.n or 4, captions
        labels = [-1] * (columns * len(captions))
        told.update(captions=[caption for caption in captions for _ in range(columns)], negative=args.negative or "")
    elif config.num_classes and classes:
        columns = args.n or 4
        labels = [c for c in classes for _ in range(columns)]
        names = [config.class_names[c] if config.class_names else str(c) for c in classes]
    else:
        columns, names, labels = 8, None, [-1] * (args.n or 32)
    seeds = [args.first_seed * 1_000_003 + i for i in range(len(labels))]
    # Steps of each stage: a truncated one stops at its s; the last one may look once more, at t = 0.
    steps = [max(1, round(c.sample_steps * (1 - stop))) if handoff == "truncated" else c.sample_steps
             for c, stop in zip(configs, s)] + [config.sample_steps + 1 - args.lowest_idx]
    for c, count, precision in zip(configs, steps, precisions):
        evaluations = count * c.calls
        print(f"{len(labels)} images of {c.size[0]}x{c.size[1]}, {c.sampler}, {c.sample_steps} steps, guidance "
              f"{f'{c.guidance:g}' if c.guidable else 'none, as there are no classes'}: {evaluations} evaluations "
              f"each, on {device} ({why}), {precision}")

    # Frames: at most 40 moments of the loop, each assembled from its batches; of a cascade one stage after the other.
    frames, film = [{} for _ in configs], max(2, 40 // len(configs))

    def on_step(stage, first, k, z):
        last = steps[stage]
        if args.gif and k in {round(1 + f * (last - 1) / (film - 1)) for f in range(film)}:
            frames[stage].setdefault(k, []).append(((z.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        progress("images" if len(configs) == 1 else f"stage {stage + 1}: images",
                 first + k * min(64, len(labels) - first) // last, len(labels))

    options = dict(lowest_idx=args.lowest_idx, levels=args.levels and bool(config.outer_channels))
    made = sample_chain(models, configs, labels, seeds, device, precisions, handoff, s, on_step, options, **told)
    upright = turned_back if args.portrait else lambda image: image

    def sheet(images, below):
        levels = [upright(level) for level in (images, *reversed(below))]
        images = side_by_side(levels) if below else levels[0]
        if captions:
            return captioned(images, columns, captions, blocks=max(1, min(3, 12 // columns)))
        return grid(images, columns, names, math.ceil(len(classes) / 12) if names else 1)

    film = []
    for stage, kept in enumerate(frames):                                 # stages to come: grey; done: as they are
        for k in sorted(kept):
            shown = [*made[:stage], torch.cat(kept[k]) / 127.5 - 1, *(torch.zeros_like(m) for m in made[stage + 1:])]
            film.append(sheet(shown[-1], shown[:-1]))
    try:
        sheet(made[-1], made[:-1]).save(args.out)
        if args.gif:
            film[0].save(args.gif, save_all=True, append_images=film[1:], loop=0,
                         duration=[80] * (len(film) - 1) + [2500])
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture: {error}") from None
    print("wrote " + args.out + (f" and {args.gif}" if args.gif else ""))


if __name__ == "__main__":
    main_program(main)
