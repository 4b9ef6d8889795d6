"""Train a diffusion model: the losses and the loop.

Paper: simple diffusion, section 3.2 (multiscale loss), appendix A (loss), appendix B (optimisation).
Matryoshka Diffusion, 3.3 (growing level by level, mixed resolutions). Cascaded Diffusion, 3 (augmented low-res images).
Needs: schedule.py, a network (uvit.py or unet.py), precondition.py, config.py. Next: sample.py.

One step of the loop in main(), at the end of this file:

    draw t and eps for a batch of images x; drop the condition of one example in ten
    the network predicts v from z_t; the loss is the mean square error of v, or of the eps that v implies,
    or of v balanced between the wavelet bands and weighted by alpha sigma (`band_loss`; the presets of letters)
    clip the gradient, take a step of Adam, update the EMA weights

README.md has the same loop in ten lines. This one is longer, since it has micro-batches, several processes, a cascade.

Seed, step and place in the global batch give an example its t, its eps and its dropped condition. So a resumed run
gives the same weights, to the bit on a CPU, and any number of processes trains on the same noise. Only dropout masks,
and which images --mixed-ratio leaves without a high level, depend on the process and its micro-batches.

    python train.py                                      letters at 64 x 64, about ten minutes on two cores
    python train.py --data photos/ --size 64             your own folder of images
    python train.py --resume runs/glyphs64               continue exactly where the run stopped
    python train.py --preset glyphs64_nested --grow-from runs/glyphs16      add a 64 px level to a trained 16 px model
    torchrun --nproc_per_node 8 train.py --preset ...    data parallel; the global batch is split over the processes
    torchrun --nproc_per_node 8 train.py --preset ... --shard     weights and optimizer state are sharded too

Shapes: B images of one process; x, z, v, eps (B, 3, H, W); t, logsnr (B,).
"""
import plumbing  # first: from here on Ctrl-C shows no traceback
import copy
import dataclasses
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from cascade import augment, downsample
from config import build_model, make_levels, make_low_schedule, make_optimizer, make_schedule, numbers
from data import batches
from nested_unet import mixed_rows, nested_loss
from plumbing import shard, start
from plumbing.runs import autocast, main_program, start_processes
from plumbing.training import Run, draw_sheet
from precondition import balance
from schedule import alpha_sigma_for, diffuse, eps_from_v, v_from_x_eps


# ------------------------------------------------------------------------------------------ the losses

def prediction_loss(v, z, x, eps, logsnr, loss="eps_mse", multiscale=0):
    """Mean square error of the network's prediction v. -> scalar.

    loss        "eps_mse": of the eps that v implies (appendix A, w(t) = 1); "v_mse": of v itself (B.2)
    multiscale  base of multiscale_mse, which then takes the mean; 0 = the plain mean

    B.2 reports only minor differences between the two. Note: for each example eps_mse = SNR / (1 + SNR) * v_mse. So
    eps_mse has a small weight near t = 1, where the global structure of the image is decided.

    # Paper: 3.2 defines the multiscale loss on eps. With v_mse we apply it to the error of v.
    """
    error = v - v_from_x_eps(x, eps, logsnr) if loss == "v_mse" else eps_from_v(z, v, logsnr) - eps
    return multiscale_mse(error, multiscale) if multiscale else error.square().mean()


def multiscale_mse(error, base):
    """Section 3.2: the sum over s of (1/s) mean(D_s[error]^2). error (B, C, H, W) -> scalar.

    D_s averages the image down to s x s. D_s is linear, so D_s[eps] - D_s[eps_hat] = D_s[eps - eps_hat]. Most values of
    a large image are fine detail, so detail dominates the plain loss. The averaged terms give weight to the coarse
    structure. s = d, d/2, d/4, ... from the side d of the image to the base, "always including" both.
    Raises ValueError unless 0 < base <= d.

    # Paper: L^{s x s} divides by s^2, the number of pixels; we take the mean over pixels and channels. D is
    # "downsampling", no more; we average, as section 3.1 does.
    # Paper: silent on images that are not square. We take d = sqrt(H W). The last map is the one that counts as base x
    # base (unet.at_resolution): for 384x640 and base 32 it is 24x40. Where k does not divide a side, windows overlap.
    """
    H, W = error.shape[-2:]
    d, loss, k = math.sqrt(H * W), 0.0, 1
    if not 0 < base <= d:
        raise ValueError(f"multiscale base {base}: want more than 0 and at most the image's side {d:g}")
    while 2 * H * W > (base * k) ** 2:                                    # s = d / k > base / sqrt(2)
        averaged = F.adaptive_avg_pool2d(error, (math.ceil(H / k), math.ceil(W / k)))
        loss = loss + averaged.square().mean() * k / d
        k *= 2
    return loss


def band_loss(v, z, x, eps, logsnr, bands, multiscale=0):
    """Mean square error of v, balanced between the wavelet bands (precondition.py), times 2 alpha sigma. -> scalar.

    bands: {(C, H, W) of a level: s of its bands}. The rest is as in prediction_loss.

    # Beyond the papers: at t = 0 v is eps, at t = 1 it is -x, and z shows nothing of it. So at both ends the error of v
    # stays large whatever the network learns, and its gradient is mostly noise. The weight takes the ends back. For
    # each example alpha sigma v_mse is the geometric mean of x_mse = sigma^2 v_mse and eps_mse = alpha^2 v_mse. On the
    # unshifted cosine schedule it is the sigmoid weighting of simpler diffusion (Hoogeboom et al. 2024) with bias 0
    # (unverified against its text).
    """
    alpha, sigma = alpha_sigma_for(x, logsnr)
    error = (2 * alpha * sigma).sqrt() * balance(v - v_from_x_eps(x, eps, logsnr), logsnr, bands[tuple(v.shape[1:])])
    return multiscale_mse(error, multiscale) if multiscale else error.square().mean()


def simple_loss(model, x, cond, t, eps, schedule, measure=prediction_loss):
    """Appendix A, the paper's `loss`: noise the images to time t, predict v, measure the error. -> scalar.

    measure(v_hat, z, x, eps, logsnr) -> the loss. nested_loss (nested_unet.py) does this for several levels.

    # Paper: it computes logsnr_t and uses logsnr, predicts v_pred and uses v_t.
    """
    logsnr = schedule(t)                                                  # (B,)
    z = diffuse(x, eps, logsnr)
    return measure(model(z, logsnr, cond), z, x, eps, logsnr)


def training_loss(config, model, x, cond, t, noises):
    """The loss of this configuration: simple_loss, or that of a nested model. -> scalar.

    noises: a list of eps, in the order of noise_shapes(config). For a super-resolution model cond has the low-res
    images and the level of their noise (cascade.py): to the loss they are conditions like any other.
    """
    schedule = make_schedule(config)                                      # of a nested model: a list, one per level
    measure = functools.partial(prediction_loss, loss=config.loss, multiscale=config.multiscale)
    if config.loss == "band_mse":
        measure = functools.partial(band_loss, bands=dict(zip(config.shapes, config.rms)), multiscale=config.multiscale)
    if config.is_nested:
        rows = mixed_rows(numbers(config.mixed_ratio, ":"), len(x)) if config.mixed_ratio else None
        weights = numbers(config.level_weights, ":") or None
        return nested_loss(model, make_levels(config, x), cond, t, noises, schedule, measure, weights, rows)
    return simple_loss(model, x, cond, t, noises[0], schedule, measure)


# ------------------------------------------------------------------------------------------ what a step needs

HELD_OUT = 2 ** 62                                                        # a `step` for `draw` that no training reaches


def draw(seed, step, places, shapes, device):
    """Draw t (B,), noises [(B, *shape), ...] and u (B,), for the examples with these places in the global batch.

    Each example has its own generator, seeded by (seed, step, place). So no random state is saved, and the numbers do
    not depend on how the batch is split over processes. u ~ U(0, 1) decides whether the condition is dropped.
    """
    generator = torch.Generator(device if device.type == "cuda" else "cpu")
    options = dict(generator=generator, device=generator.device)
    t, noises, u = [], [], []
    for place in places:
        example_seed = np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(example_seed >> np.uint64(1)))
        t.append(torch.rand((), **options))
        u.append(torch.rand((), **options))
        noises.append([torch.randn(shape, **options) for shape in shapes])
    noises = [torch.stack(level).to(device) for level in zip(*noises)]    # independent noise for each level
    return torch.stack(t).to(device), noises, torch.stack(u).to(device)


def draw_augmentation(seed, step, places, device):
    """Draw (4, B) numbers from U(0, 1) for the low-res images of these examples, by the same rule as `draw`."""
    uniform = [np.random.default_rng((seed, step, place, 1)).random(4, np.float32) for place in places]
    return torch.from_numpy(np.stack(uniform, 1)).to(device)


def noise_shapes(config):
    """Return the shapes of the noises: one a level, highest first; of a cascade's stage also its low-res image."""
    return config.shapes + ([(3, *config.low_size)] if config.low_size else [])


def conditions(config, batch, dropped, encoder=None):
    """Return the conditions: captions or labels, dropped where `dropped` (B,) is True, and the portrait flag."""
    if encoder:
        cond = encoder(batch["caption"])
        cond["text_mask"] = cond["text_mask"] & ~dropped[:, None]
    else:
        cond = {"label": torch.where(dropped, -1, batch["label"].to(dropped.device))}
    if config.portrait:
        cond["portrait"] = batch["portrait"].to(dropped.device)
    return cond


def low_res_conditions(config, x, noise, seed, step, places):
    """Cascaded Diffusion 3: return the augmented low-res images of x and their noise level.

    noise: N(0, 1) of their size, (B, 3, h, w). The four numbers of an example are the time s of its noise, whether it
    gets noise, whether it gets blur, and how much blur.
    """
    s, *draws = draw_augmentation(seed, step, places, x.device)           # (B,) each
    low_res, aug_logsnr = augment(downsample(x, config.low_size), s, noise, make_low_schedule(config), draws,
                                  config.aug_noise, config.aug_blur, (config.blur_low, config.blur_high))
    return {"low_res": low_res, "aug_logsnr": aug_logsnr}


def micro_batches(batch, accumulate):
    """Split the batch of a process into `accumulate` micro-batches. Return their slices."""
    size = batch // accumulate
    return [slice(first, first + size) for first in range(0, batch, size)]


def select(tensors, part):
    """Return this slice of each tensor of a dict or a list."""
    if isinstance(tensors, dict):
        return {key: value[part] for key, value in tensors.items()}
    return [value[part] for value in tensors]


# ------------------------------------------------------------------------------------------ EMA, held-out loss

@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model. Call it after the optimizer's step; before it, the EMA lags by one.

    # Paper: the decay is fixed. We ramp it up from 0.1, so that a short run forgets its random initialisation.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def make_held_out_loss(config, ema, batch, encoder, device):
    """Return a function () -> the loss of the EMA weights on this batch, which training never sees; None without one.

    All calls use the same images, times and noise, so a difference comes from the weights alone. The times are the
    middles of n equal intervals of [0, 1], n the number of images.
    """
    if batch is None:
        return None
    x = batch["image"].to(device)
    n, places = len(x), range(len(x))
    t = (torch.arange(n, device=device) + 0.5) / n
    _, noises, u = draw(config.seed, HELD_OUT, places, noise_shapes(config), device)
    cond = conditions(config, batch, torch.zeros_like(u).bool(), encoder)
    if config.low_size:
        cond |= low_res_conditions(config, x, noises[1], config.seed, HELD_OUT, places)
    config = dataclasses.replace(config, mixed_ratio="")                  # all images at all levels

    @torch.no_grad()
    def held_out_loss():
        with autocast(config.precision, device):
            return training_loss(config, ema, x, cond, t, noises).item()
    return held_out_loss


# ------------------------------------------------------------------------------------------ the program

def main():
    args, config, checkpoint = start.read_command_line()                  # checkpoint: that of --resume, else None
    rank, world, device, device_reason = start_processes(args.device)
    config, source, initial = start.resolve(config, checkpoint, args, device, world)
    # config is saved. machine, its copy with each "auto" decided for this machine, is not.
    machine = start.resolve_machine(config, device, args.world_size or world, checkpoint["step"] if checkpoint else 0)
    if args.dry_run:
        return start.dry_run(machine, device, device_reason, args.world_size or world) if rank == 0 else None
    encoder = start.open_encoder(config, source, device)
    held_out, held_out_encoder = start.open_held_out(config, source, device)
    folder = start.run_folder(args, checkpoint, rank, world)

    # ---- model, EMA weights, optimizer: new, resumed (--resume), or from other weights (--grow-from, --init-from)
    torch.manual_seed(config.seed)                                        # the same weights on every rank
    layout = torch.channels_last if machine.channels_last == "on" else torch.contiguous_format
    # With --shard only rank 0 has real weights; the other ranks have shapes, and get their shards in restore().
    with torch.device(("meta" if rank else "cpu") if machine.shard else device):
        model = build_model(config).to(memory_format=layout)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, config)
    model, ema, optimizer, step = start.restore(model, ema, optimizer, checkpoint, initial, machine, device)
    del checkpoint, initial                                               # loaded: let go of the mapped files
    if config.recompute:
        shard.checkpoint_activations(model)
    # `net` trains: it is `model` or a wrapper around it. Checkpoints hold `model` and `ema`; samples come from `ema`.
    net = torch.compile(model) if machine.compile == "on" and not machine.shard else model
    if world > 1 and not machine.shard:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)

    local_batch = config.batch // world                                   # images of this rank
    places = range(rank * local_batch, (rank + 1) * local_batch)          # their places in the global batch
    parts = micro_batches(local_batch, config.accumulate)
    run = Run(folder, config, source, model, ema, optimizer, step, rank, world,
              held_out_loss=make_held_out_loss(config, ema, held_out, held_out_encoder, device),
              sheet=functools.partial(draw_sheet, ema, config, device, encoder))
    run.print_header(device, device_reason)

    # ---- the loop
    stream = batches(source, config.batch, config.seed, first_step=step, rank=rank, world=world,
                     workers=machine.workers, flip=config.flip, pin=device.type == "cuda")
    model.train()
    for step, batch in run.steps(stream):
        x = batch["image"].to(device, non_blocking=True, memory_format=layout)                  # (B, 3, H, W)
        t, noises, u = draw(config.seed, step, places, noise_shapes(config), device)
        cond = conditions(config, batch, u < config.cond_drop, encoder)
        if config.low_size:
            cond |= low_res_conditions(config, x, noises[1], config.seed, step, places)
        torch.manual_seed(config.seed * 1_000_003 + step * world + rank)  # dropout: no random state to be saved

        lr = config.lr * min(1, (step + 1) / max(1, config.warmup),       # linear warm-up, linear fall at the end
                             (config.steps - step) / max(1, config.lr_decay * config.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1)                      # text layers learn more slowly (config.py)
        step_loss = 0.0
        for part in parts:                                                # micro-batches: their gradients add up
            if world > 1:
                net.require_backward_grad_sync = part is parts[-1]        # DDP exchanges gradients once, at the end
            with autocast(config.precision, device):
                loss = training_loss(config, net, x[part], select(cond, part), t[part], select(noises, part))
                loss = loss / len(parts)
            loss.backward()
            step_loss = step_loss + loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if not run.finite(grad_norm):
            return run.fail()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, config.ema, step)
        run.after_step(step_loss, grad_norm, lr)                          # log, checkpoint, samples: when they are due
    return run.finish()


if __name__ == "__main__":
    main_program(main)
