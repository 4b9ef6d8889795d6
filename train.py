"""Train a diffusion model: the losses and the loop.

Paper: simple diffusion, section 3.2 (multiscale loss), appendix A (loss), appendix B (optimisation).
Matryoshka Diffusion, 3.3 (growing level by level, mixed resolutions). Cascaded Diffusion, 3 (augmented low-res images).
Needs: schedule.py, a network (uvit.py or unet.py), config.py. Next: sample.py.

One step of the loop in main(), at the end of this file:

    draw t and eps for a batch of images x; drop the condition of one example in ten
    loss = mean square of eps_hat - eps, where the network predicts v from z_t     (appendix A)
    clip the gradient, take a step of Adam, update the EMA weights

The random numbers of an example depend only on the seed, the step and the example's index in the global batch. So a
resumed run gives the same weights, to the bit on a CPU, and the noise does not depend on the number of processes.
Two things do depend on it: dropout, and which images --mixed-ratio leaves without a high level.

    python train.py                                      letters at 64 x 64, about ten minutes on two cores
    python train.py --data photos/ --size 64             your own folder of images
    python train.py --preset imagenet128_unet --data imagenet/train --dry-run
    python train.py --resume runs/glyphs64               continue exactly where the run stopped
    python train.py --preset glyphs64_nested --grow-from runs/glyphs16      add a 64 px level to a trained 16 px model
    python train.py --preset glyphs64_text               captions instead of classes
    python train.py --preset glyphs64_sr                 super-resolution 16 -> 64, the second stage of a cascade
    torchrun --nproc_per_node 8 train.py --preset ...    data parallel; the global batch is split over the processes
    torchrun --nproc_per_node 8 train.py --preset ... --shard     weights and optimizer state are sharded too

Shapes: B images of one process; x, z, v, eps (B, 3, H, W); t, logsnr (B,).
"""
import copy
import dataclasses
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from cascade import augment, downsample, super_resolution_loss
from config import build_model, make_low_schedule, make_optimizer, make_schedule, numbers
from data import batches
from nested_unet import mixed_rows, nested_loss, pyramid
from plumbing import UserError, shard, start
from plumbing.runs import autocast, main_program, start_processes
from plumbing.training import Run, draw_sheet
from schedule import diffuse, eps_from_v, v_from_x_eps


# ------------------------------------------------------------------------------------------ the losses

def simple_loss(model, x, cond, t, eps, schedule, loss="eps_mse", multiscale=0):
    """Appendix A: noise the images to time t, predict v, measure the error. -> scalar.

    nested_loss (nested_unet.py) does this for several levels, super_resolution_loss (cascade.py) for a cascade's stage.

    # Paper: the printed `loss` computes logsnr_t and uses logsnr, predicts v_pred and uses v_t.
    """
    logsnr = schedule(t)                                                  # (B,)
    z = diffuse(x, eps, logsnr)
    return prediction_loss(model(z, logsnr, cond), z, x, eps, logsnr, loss, multiscale)


def prediction_loss(v, z, x, eps, logsnr, loss="eps_mse", multiscale=0):
    """Mean square error of the network's prediction v: of the eps that v implies (appendix A, w(t) = 1), or of v itself
    (B.2). multiscale > 0: through multiscale_mse, with this base. -> scalar.

    For each example eps_mse = SNR / (1 + SNR) * v_mse. So eps_mse has a small weight near t = 1, where the global
    structure of the image is decided.

    # Paper: 3.2 defines the multiscale loss on eps. With v_mse we apply it to the error of v.
    """
    error = v - v_from_x_eps(x, eps, logsnr) if loss == "v_mse" else eps_from_v(z, v, logsnr) - eps
    return multiscale_mse(error, multiscale) if multiscale else error.square().mean()


def multiscale_mse(error, base):
    """Section 3.2: the sum over s of (1/s) mean(D_s[error]^2). error (B, C, H, W) -> scalar.

    D_s averages the image down to s x s. D_s is linear, so D_s[eps] - D_s[eps_hat] = D_s[eps - eps_hat]. Most values of
    a large image are fine detail, so detail dominates the plain loss. The averaged terms give weight to the coarse
    structure. s = d, d/2, d/4, ... from the side d of the image, while s >= base and both sides of the image divide.
    For an image that is not square d = sqrt(H W). Raises ValueError unless 0 < base <= d.

    # Paper: L^{s x s} divides by s^2, the number of pixels; we take the mean over pixels and channels. D is
    # "downsampling", no more; we average, as section 3.1 does. Section 5.1 says "Figure 6" and means table 6.
    """
    d, loss, k = (error.shape[-2] * error.shape[-1]) ** 0.5, 0.0, 1
    if not 0 < base <= d:
        raise ValueError(f"multiscale base {base}: want more than 0 and at most the image's side {d:g}")
    while d / k >= base and error.shape[-2] % k == 0 and error.shape[-1] % k == 0:
        loss = loss + F.avg_pool2d(error, k).square().mean() * k / d
        k *= 2
    return loss


def training_loss(config, model, x, cond, t, eps):
    """The loss of this configuration: simple_loss, or that of a nested or a super-resolution model. -> scalar.

    eps: the noises in the order of noise_shapes(config). A super-resolution model finds its low-res images in
    cond["low_res"] and their noise level in cond["aug_logsnr"].
    """
    schedule = make_schedule(config)
    measure = functools.partial(prediction_loss, loss=config.loss, multiscale=config.multiscale)
    if config.is_nested:
        rows = mixed_rows(numbers(config.mixed_ratio, ":"), len(x)) if config.mixed_ratio else None
        weights = numbers(config.level_weights, ":")
        return nested_loss(model, pyramid(x, config.sizes), cond, t, eps, schedule, measure, weights, rows)
    if config.is_super_resolution:
        cond = dict(cond)
        low_res, aug_logsnr = cond.pop("low_res"), cond.pop("aug_logsnr")
        return super_resolution_loss(model, x, low_res, aug_logsnr, cond, t, eps[0], schedule, measure)
    return simple_loss(model, x, cond, t, eps[0], schedule, config.loss, config.multiscale)


# ------------------------------------------------------------------------------------------ what a step needs

HELD_OUT = 2 ** 62                                                        # `step` of the held-out loss's random numbers


def draw(seed, step, places, shapes, device):
    """Draw t (B,), eps [(B, *shape), ...] and u (B,), for the examples with these places in the global batch.

    Each example has its own generator, seeded by (seed, step, place). So no random state is saved, and the numbers do
    not depend on how the batch is split over processes. u ~ U(0, 1) decides whether the condition is dropped.
    """
    generator = torch.Generator(device if device.type == "cuda" else "cpu")
    on = generator.device
    t, eps, u = [], [], []
    for place in places:
        state = np.random.SeedSequence((seed, step, place)).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(state >> np.uint64(1)))                 # 63 bits: PyTorch takes no larger seed
        t.append(torch.rand((), generator=generator, device=on))
        u.append(torch.rand((), generator=generator, device=on))
        eps.append([torch.randn(shape, generator=generator, device=on) for shape in shapes])
    eps = [torch.stack(level).to(device) for level in zip(*eps)]          # independent noise for each level
    return torch.stack(t).to(device), eps, torch.stack(u).to(device)


def draw_augmentation(seed, step, places, device):
    """Draw (4, B) numbers from U(0, 1) for the low-res images of these examples, by the same rule as `draw`."""
    uniform = [np.random.default_rng((seed, step, place, 1)).random(4, np.float32) for place in places]
    return torch.from_numpy(np.stack(uniform, 1)).to(device)


def noise_shapes(config):
    """Return the shapes of eps: one per level, highest first; for a super-resolution model also its low-res image."""
    return [(3, *size) for size in (*config.sizes, *([config.low_size] if config.is_super_resolution else []))]


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


def low_res_conditions(config, x, noise, uniform):
    """Cascaded Diffusion 3: return the augmented low-res images of x and their noise level.

    noise: N(0, 1) of their size, (B, 3, h, w). uniform (4, B): the time s of the noise; who gets noise; who gets blur;
    how much blur.
    """
    s, *draws = uniform
    low_res, aug_logsnr = augment(downsample(x, config.low_size), s, noise, make_low_schedule(config), draws,
                                  config.aug_noise, config.aug_blur, (config.blur_low, config.blur_high))
    return {"low_res": low_res, "aug_logsnr": aug_logsnr}


def micro_batches(batch, accumulate):
    """Split the batch of a process into `accumulate` micro-batches. Return their slices."""
    size = batch // accumulate
    return [slice(first, first + size) for first in range(0, batch, size)]


def select(tensors, rows):
    """Return these rows of each tensor of a dict or a list."""
    if isinstance(tensors, dict):
        return {key: value[rows] for key, value in tensors.items()}
    return [value[rows] for value in tensors]


# ------------------------------------------------------------------------------------------ EMA, held-out loss

@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, after the optimizer's step; before it, the EMA would lag by one step.

    # Paper: the decay is fixed. We ramp it up from 0.1, so that a short run forgets its random initialisation.
    """
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def make_held_out_loss(config, ema, source, encoder, device, n=32):
    """Return a function () -> the loss of the EMA weights on n images of `source`, which training never sees.

    All calls use the same images, times and noise, so a difference comes from the weights alone. The times are the
    middles of n equal intervals of [0, 1]. Return None without a source.
    """
    if source is None:
        return None
    batch, places = next(batches(source, n, config.seed, workers=0)), range(n)
    if batch["image"] is None:
        raise UserError(f"--held-out {config.held_out}: no image in it can be read")
    x = batch["image"].to(device)
    t = (torch.arange(n, device=device) + 0.5) / n
    _, eps, u = draw(config.seed, HELD_OUT, places, noise_shapes(config), device)
    cond = conditions(config, batch, torch.zeros_like(u).bool(), encoder)
    if config.is_super_resolution:
        cond |= low_res_conditions(config, x, eps[1], draw_augmentation(config.seed, HELD_OUT, places, device))
    config = dataclasses.replace(config, mixed_ratio="")                  # all images at all levels

    @torch.no_grad()
    def held_out_loss():
        with autocast(config.precision, device):
            return training_loss(config, ema, x, cond, t, eps).item()
    return held_out_loss


# ------------------------------------------------------------------------------------------ the program

def main():
    args, config, checkpoint = start.read_command_line()                  # checkpoint: that of --resume, else None
    rank, world, device, device_reason = start_processes(args.device)
    config, source, inner_checkpoint = start.resolve(config, checkpoint, args, device, world)
    local = start.resolve_machine(config, device, args.world_size or world)  # "auto" decided; not saved
    if args.dry_run:
        return start.dry_run(local, device, device_reason, args.world_size or world) if rank == 0 else None
    encoder, held_out = start.open_encoder(config, source, device), start.open_held_out(config, source)
    folder = start.run_folder(args, checkpoint, rank, world)

    # ---- model, EMA weights, optimizer: new, resumed (--resume) or grown (--grow-from)
    torch.manual_seed(config.seed)                                        # the same weights on every rank
    layout = torch.channels_last if local.channels_last == "on" else torch.contiguous_format
    with torch.device(("meta" if rank else "cpu") if local.shard else device):   # sharded: only rank 0 has them whole
        model = build_model(config).to(memory_format=layout)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = make_optimizer(model, config)
    model, ema, optimizer, step = start.restore(model, ema, optimizer, checkpoint, inner_checkpoint, local, device)
    if config.recompute:
        shard.checkpoint_activations(model)
    # `net` trains: `model`, or a wrapper around it. We save and sample `model`, which keeps plain parameter names.
    net = torch.compile(model) if local.compile == "on" and not local.shard else model
    if world > 1 and not local.shard:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True)

    local_batch = config.batch // world                                   # images of this rank
    places = range(rank * local_batch, (rank + 1) * local_batch)          # their places in the global batch
    micro = micro_batches(local_batch, config.accumulate)
    run = Run(folder, config, source, model, ema, optimizer, step, rank, world,
              held_out_loss=make_held_out_loss(config, ema, held_out, encoder, device),
              sheet=functools.partial(draw_sheet, ema, config, device, encoder))
    run.print_header(device, device_reason)

    # ---- the loop
    stream = batches(source, config.batch, config.seed, step, rank, world, local.workers, config.flip)
    model.train()
    for step, batch in run.steps(stream):
        x = batch["image"].to(device, non_blocking=True, memory_format=layout)                  # (B, 3, H, W)
        t, eps, u = draw(config.seed, step, places, noise_shapes(config), device)
        cond = conditions(config, batch, u < config.cond_drop, encoder)
        if config.is_super_resolution:
            cond |= low_res_conditions(config, x, eps[1], draw_augmentation(config.seed, step, places, device))
        torch.manual_seed(config.seed * 1_000_003 + step * world + rank)  # for dropout: no random state is saved

        lr = config.lr * min(1, (step + 1) / max(1, config.warmup))       # linear warm-up
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1)                      # text layers learn more slowly (config.py)
        step_loss = 0.0
        for rows in micro:                                                # micro-batches: their gradients add up
            if world > 1:
                net.require_backward_grad_sync = rows is micro[-1]        # DDP exchanges gradients once, at the end
            with autocast(config.precision, device):
                loss = training_loss(config, net, x[rows], select(cond, rows), t[rows], select(eps, rows)) / len(micro)
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
