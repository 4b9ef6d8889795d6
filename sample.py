"""From noise to pictures: DDPM and DDIM steps, clipping, guidance, the loop; as a program, from a run to a PNG or GIF.

Paper: simple diffusion, appendix A ("Sampling", "Classifier-free guidance"), section 2 (eq. 3); Matryoshka Diffusion 3:
all levels step together.
Read before: schedule.py, train.py; nested_unet.py for several levels.

    python sample.py runs/glyphs64                       a grid, some images of each class
    python sample.py runs/glyphs64 --labels A,B,7 --n 8 --guidance 4 --gif letters.gif
    python sample.py runs/glyphs64_nested --levels --gif levels.gif         every level of a nested model

Shapes: z, x_hat (B, C, H, W); logsnr_t, logsnr_s scalars or (B,), s < t one step closer to the image.

# Paper: eq. 3 prints N(z_t | ...) for the law of z_s, and calls the posterior's variance sigma without the square.
"""
import math
import os

import torch
from PIL import Image, ImageDraw, ImageFont

from config import Parser, add_fields, build_model, make_schedule, override
from data import UserError
from runs import autocast, choose_device, choose_precision, load_weights, main_program, progress, read_checkpoint
from schedule import alpha_sigma_for, diffuse, eps_from_x, x_from_v


# ------------------------------------------------------------------------------------------ one step (appendix A)

def ddpm_step(z_t, x_hat, logsnr_t, logsnr_s, noise_param=0.2, noise=None):
    """Ancestral step z_t -> z_s: a draw from q(z_s | z_t, x = x_hat), eq. 3, with the variance chosen in between.

    With c = 1 - exp(lambda_t - lambda_s), sigma^2_{t|s} = c sigma_t^2 and the posterior's variance is c sigma_s^2. They
    are the upper and the lower bound on the variance of the true reverse step (exact if the data are N(0, 1), or a
    single point); noise_param = nu goes from the lower (0) to the upper (1) in logs. noise: N(0, 1), drawn if None.

    # Paper: prints the log variances as (1 - exp(..)) + log_sigmoid(..); the first term must be log(1 - exp(..)).
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

def sample(model, schedule, cond, shape, seeds, steps=256, sampler="ddpm", guidance=1.0, noise_param=0.2,
           clip="static", lowest_idx=1, device="cpu", on_step=None):
    """Images (B, C, H, W) in [-1, 1] from `model`, by `steps` network evaluations (twice that with guidance).

    schedule    t -> logsnr
    cond        conditions of the B images; guidance drops them all
    shape       (C, H, W)
                A nested model has a list of schedules and of shapes, highest level first. Its levels begin as noises of
                their own and take each step together, each with its own alpha and sigma, all clipped, all guided; the
                result is the list of the levels, as are z and x_hat for on_step.
    seeds       B integers, one an image: image i depends on seeds[i] alone, whatever else is in the batch
    lowest_idx  0 or 1, as in the paper: the time index at which the last prediction is returned, without noise. With 1,
                N steps cost N evaluations. With 0 the loop goes on to t = 0 and looks once more, at a clean z: N + 1.
    on_step     called as on_step(k, z, x_hat) after evaluation k = 1, 2, ...
    """
    nested = isinstance(shape, list)
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
            dropped = evaluate(z, logsnr, {})                             # no condition = all of them dropped
            v = [guide(v_cond, v_null, guidance) for v_cond, v_null in zip(v, dropped)]
        return [CLIPS[clip](x_from_v(*level)) for level in zip(z, v, logsnr)]

    def tell(k, z, x_hat):
        if on_step:
            on_step(k, *((z, x_hat) if nested else (z[0], x_hat[0])))

    z = noise()                                                           # z_1 ~ N(0, I)
    t = torch.arange(steps + 1) / steps                                   # 0, 1/N, ..., 1
    times = [list(level) for level in zip(*(schedule(t).to(device) for schedule in schedules))]   # logsnr at each
    for k, i in enumerate(range(steps, lowest_idx, -1), 1):
        x_hat = predict(z, times[i])
        if sampler == "ddpm":
            z = [ddpm_step(*level[:4], noise_param, level[4])
                 for level in zip(z, x_hat, times[i], times[i - 1], noise())]
        else:
            z = [ddim_step(*level) for level in zip(z, x_hat, times[i], times[i - 1])]
        tell(k, z, x_hat)
    x_hat = predict(z, times[lowest_idx])                                 # the mean, not a draw
    tell(steps - lowest_idx + 1, x_hat, x_hat)
    return x_hat if nested else x_hat[0]


# ------------------------------------------------------------------------------------------ runs and pictures

def load_run(path, device="cpu"):
    """(model, config) of a run folder: the averaged weights, in evaluation mode. Raises UserError."""
    state = read_checkpoint(path)
    return averaged_model(state, path, device), state["config"]


def averaged_model(state, path, device="cpu"):
    """The model of read_checkpoint's `state`, with the averaged weights, in evaluation mode. Raises UserError."""
    with torch.device(device):
        model = build_model(state["config"])
    load_weights(model, state["ema"], path)
    return model.eval().requires_grad_(False)


def sample_run(model, config, labels, seeds, device, precision, on_step=None, batch=64, lowest_idx=1, levels=False):
    """Images of these labels (-1: no class) by the sampler, steps and guidance of config, in batches, on the CPU.

    Of a nested model the highest level, or with levels=True all of them side by side (`side_by_side`). on_step is
    called as on_step(first, k, z), z (B, 3, H, W) likewise.
    """
    show = (lambda z: side_by_side(z) if levels else z[0]) if config.outer_channels else (lambda z: z)
    shapes = [(3, *size) for size in config.sizes]
    guidance = config.guidance if config.num_classes else 1.0            # nothing to drop, nothing to guide
    images = []
    for first in range(0, len(labels), batch):
        part = slice(first, first + batch)
        with torch.no_grad(), autocast(precision, device):
            images.append(show(sample(
                model, make_schedule(config), {"label": torch.tensor(labels[part], device=device)},
                shapes if config.outer_channels else shapes[0], seeds[part], config.sample_steps, config.sampler,
                guidance, config.noise_param, config.clip_x, lowest_idx, device,
                on_step and (lambda k, z, x_hat: on_step(first, k, show(z))))).cpu())
    return torch.cat(images)


def side_by_side(levels):
    """[(B, 3, H_r, W_r), ...] highest first -> (B, 3, H, R W): the lowest level left, each enlarged to the highest."""
    size = levels[0].shape[-2:]
    return torch.cat([torch.nn.functional.interpolate(level, size, mode="nearest") for level in reversed(levels)], -1)


def to_uint8(images):
    """(B, 3, H, W) in [-1, 1] -> uint8 (B, H, W, 3)."""
    return ((images.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8).permute(0, 2, 3, 1)


def grid(images, columns, names=None, blocks=1):
    """A sheet of `columns` images a row as a Pillow picture; names: one a row, written before it; rows in `blocks`
    columns beside each other."""
    tiles = to_uint8(images).numpy()
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:3]
    rows_a_block, margin = math.ceil(rows / blocks), 0
    if names:
        font = ImageFont.load_default(max(10, min(28, height // 3)))
        margin = 12 + max(int(font.getlength(name)) for name in names)
    stride = margin + columns * width + (8 if blocks > 1 else 0)
    sheet = Image.new("RGB", (blocks * stride, rows_a_block * height), "white")
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        block, row = divmod(row, rows_a_block)
        sheet.paste(Image.fromarray(tile), (block * stride + margin + column * width, row * height))
    for row, name in enumerate(names or []):
        block, row = divmod(row, rows_a_block)
        place = (block * stride + margin / 2, (row + 0.5) * height)
        ImageDraw.Draw(sheet).text(place, name, "black", font, anchor="mm")
    return sheet


def class_sheet(model, config, device, precision, a_class, seed=0, most=36, **options):
    """One row a class (the first `most` of them), `a_class` images each; without classes, 8 x 8 images."""
    names = list(config.class_names[:most]) or None
    labels = [i for i in range(len(names)) for _ in range(a_class)] if names else [-1] * 64
    images = sample_run(model, config, labels, [seed * 1_000_003 + i for i in range(len(labels))], device, precision,
                        **options)
    return grid(images, a_class if names else 8, names, blocks=math.ceil(len(names) / 12) if names else 1)


# ------------------------------------------------------------------------------------------ the program

def parse():
    parser = Parser(prog="sample.py", description="Draw images from a trained run.")
    parser.add_argument("run", help="folder of the run (one; chains of stages are for cascades)")
    parser.add_argument("--n", type=int, help="images a class (default 4), or in all for a run without classes (32)")
    parser.add_argument("--labels", help="classes by name or number, separated by commas (default: up to 36 of them)")
    parser.add_argument("--steps", type=int, help="steps an image; guidance looks twice a step (default: the run's)")
    parser.add_argument("--lowest-idx", type=int, choices=(0, 1), default=1, help="see sample() (default 1)")
    parser.add_argument("--seed", dest="first_seed", type=int, default=0, help="another seed, other images (default 0)")
    parser.add_argument("--levels", action="store_true", help="show every level of a nested model, the lowest left")
    parser.add_argument("--out", default="samples.png", help="PNG to write (default samples.png)")
    parser.add_argument("--gif", help="GIF of the denoising to write as well")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    add_fields(parser, ("sampler", "guidance", "noise_param", "clip_x", "precision"), "settings of the run to override")
    return parser.parse_args()


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
    args = parse()
    device, why = choose_device(args.device)
    model, config = load_run(args.run, device)
    if args.levels and not config.outer_channels:
        raise UserError(f"--levels: {args.run} is not of a nested model")
    given = {k: v for k, v in vars(args).items() if k in ("sampler", "guidance", "noise_param", "clip_x", "precision")}
    if args.steps is not None:
        if args.steps < 1:
            raise UserError(f"--steps {args.steps}: want 1 or more")
        given["sample_steps"] = args.steps
    config = override(config, **given)
    precision = choose_precision(config.precision, device)
    if args.n is not None and args.n < 1:
        raise UserError(f"--n {args.n}: want 1 or more")
    for option, path in (("--out", args.out), ("--gif", args.gif)):
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"{option} {path}: its folder does not exist")
        if path and not path.lower().endswith(".png" if option == "--out" else ".gif"):
            raise UserError(f"{option} {path}: want a name that ends in {'.png' if option == '--out' else '.gif'}")
    if not 0 <= args.first_seed < 2 ** 31:
        raise UserError(f"--seed {args.first_seed}: want 0 or more, less than 2^31")

    classes = label_numbers(args.labels, config) if args.labels else list(range(min(36, config.num_classes)))
    if config.num_classes and classes:
        columns = args.n or 4
        labels = [c for c in classes for _ in range(columns)]
        names = [config.class_names[c] if config.class_names else str(c) for c in classes]
    else:
        columns, names, labels = 8, None, [-1] * (args.n or 32)
    seeds = [args.first_seed * 1_000_003 + i for i in range(len(labels))]
    last = config.sample_steps + 1 - args.lowest_idx
    calls = last * (1 if config.guidance == 1 or not config.num_classes else 2)
    print(f"{len(labels)} images of {config.size[0]}x{config.size[1]}, {config.sampler}, {config.sample_steps} steps, "
          f"guidance {config.guidance:g}: {calls} evaluations each, on {device} ({why}), {precision}")

    # Frames: at most 40 moments of the loop, each assembled from its batches.
    wanted = {round(1 + f * (config.sample_steps - 1) / 39) for f in range(40)} if args.gif else set()
    frames = {}

    def on_step(first, k, z):
        if k in wanted or (args.gif and k == last):
            frames.setdefault(k, []).append(((z.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
        progress("images", first + k * min(64, len(labels) - first) // last, len(labels))

    images = sample_run(model, config, labels, seeds, device, precision, on_step, lowest_idx=args.lowest_idx,
                        levels=args.levels)
    blocks = math.ceil(len(classes) / 12) if names else 1
    try:
        grid(images, columns, names, blocks).save(args.out)
        if args.gif:
            sheets = [grid(torch.cat(frames[k]) / 127.5 - 1, columns, names, blocks) for k in sorted(frames)]
            sheets[0].save(args.gif, save_all=True, append_images=sheets[1:], loop=0,
                           duration=[80] * (len(sheets) - 1) + [2500])
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write the picture: {error}") from None
    print("wrote " + args.out + (f" and {args.gif}" if args.gif else ""))


if __name__ == "__main__":
    main_program(main)
