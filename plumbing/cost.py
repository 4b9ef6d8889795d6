"""What a run costs before it is run: parameters, FLOPs, and the memory of each process, sharded or not.

Paper: simple diffusion, table 1 and section 3.3: at high resolution the feature maps cost memory and the kernels almost
none; at 16 x 16 it is the other way round, which is why the paper scales the network there.
Read before: unet.py (table 1), shard.py. Read after: nothing.

    python cost.py                                                         the papers' presets (a minute)
    python train.py --preset imagenet512_uvit --dry-run --world-size 64    one run, with all its settings

Nothing is allocated: the network runs on PyTorch's fake tensors, which have shapes, types and storages but no numbers.
A training step holds, for P parameters in float32: weights, gradients, two moments, averages, 4 P bytes each, of which
a sharded process has 1/N; and what the forward pass keeps for the backward one: activations, so many bytes an image,
and with bf16 a bf16 copy of each weight (sharded: of one block at a time).
"""
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, build_model, replace
from plumbing.shard import blocks_of, checkpoint_activations


@dataclass
class Cost:
    parameters: int                      # numbers
    flops: int                           # of a forward pass of one image; a multiply-add is two
    activations: int                     # bytes an image that the forward pass keeps
    copies: int                          # bytes of weights in another precision that it keeps, however many images
    largest: int                         # parameters of the largest block
    outside: int                         # parameters that are in no block


def conditions_of(config, batch):
    """Conditions of the right shapes, of zeros, for this many images."""
    cond = {}
    if config.low_size:
        cond["low_res"] = torch.zeros(batch, 3, *config.low_size)
    if config.text_encoder:
        shape = (batch, config.text_length) + (() if config.text_encoder == "bytes" else (config.text_channels,))
        cond["text"] = torch.zeros(shape, dtype=torch.float if len(shape) == 3 else torch.long)
        cond["text_mask"] = torch.ones(shape[:2], dtype=torch.bool)
    return cond


def forward(config, model, batch):
    z, logsnr = [torch.zeros(batch, 3, *size) for size in config.sizes], [torch.zeros(batch) for _ in config.sizes]
    cond = conditions_of(config, batch)
    return model(z, logsnr, cond) if config.outer_channels else model(z[0], logsnr[0], cond)


def kept(config, model, batch):
    """Bytes that a forward pass keeps for backward, without the weights themselves. Views of one storage count once."""
    saved, held = {}, []

    def keep(tensor):
        held.append(tensor)                                               # held, so that no address is used again
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        forward(config, model, batch)
    for parameter in model.parameters():
        saved.pop(parameter.untyped_storage()._cdata, None)
    return sum(saved.values())


def cost_of(config):
    """-> Cost of a model of this configuration; of "auto", the precision counts as float32."""
    with torch.device("meta"):
        model = build_model(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(config, model, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):                      # it knows autocast, which "meta" does not
        model.to_empty(device="cpu")
        blocks = [block for block in blocks_of(model)
                  if not any(block is not other and block in set(other.modules()) for other in blocks_of(model))]
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks] or [0]
        if config.recompute:
            checkpoint_activations(model)
        one, two = kept(config, model, 1), kept(config, model, 2)         # a line through two points
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, counter.get_total_flops(), two - one, 2 * one - two, max(sizes), parameters - sum(sizes))


def memory(config, cost, world=1):
    """{what: bytes} that each of `world` processes holds at most, by config.shard, config.accumulate and the batch.

    At most: gradients appear while activations go, so a step's peak lies below the sum. Not counted: what single
    operations and the allocator want besides, batches that wait, and with --recompute the one block at work.
    """
    share = 4 * cost.parameters / (world if config.shard else 1)
    result = {"weights": share, "gradients": share, "moments (2)": 2 * share, "averages": share,
              "activations": cost.activations * config.batch / world / config.accumulate}
    if not (config.shard and world > 1):
        return result | {"weights in bf16": cost.copies} if config.precision == "bf16" else result
    width = 2 if config.precision == "bf16" else 4
    # The block at work and the next one, on its way; their gradients before they are summed; and what is in no block.
    return result | {"gathered": 2 * width * cost.largest + 4 * cost.largest + 2 * 4 * cost.outside}


def gib(value):
    return f"{value / 2 ** 30:,.2f} GiB"


def report(config, world=1):
    """Print the cost of a run, as train.py --dry-run does."""
    cost = cost_of(config)
    print(f"\nparameters               {cost.parameters:,}")
    print(f"forward pass, one image  {cost.flops / 1e9:,.2f} GFLOP (multiply and add counted as two)")
    print(f"training step            {3 * cost.flops * config.batch / 1e12:,.3f} TFLOP (backward counted as two "
          "forwards)")
    print(f"activations              {gib(cost.activations)} an image, {config.precision}"
          + ", blocks recomputed" * config.recompute)
    columns = [("whole", memory(replace(config, shard=False), cost, world))]
    if world > 1:
        columns.append(("sharded", memory(replace(config, shard=True), cost, world)))
    names = list(dict.fromkeys(name for _, column in columns for name in column))
    images = config.batch // world // config.accumulate
    print(f"\nmemory of each of {world} processes, {images} images at once"
          + "".join(f"{title:>16s}" for title, _ in columns))
    width = len(f"memory of each of {world} processes, {images} images at once")
    for name in names:
        print(f"  {name}".ljust(width) + "".join(f"{gib(column[name]) if name in column else '':>16s}"
                                                 for _, column in columns))
    print("  in all, at most".ljust(width) + "".join(f"{gib(sum(column.values())):>16s}" for _, column in columns))


def main():
    print(f"{'':26s} {'parameters, M':>13s} {'GFLOP an image':>16s} {'weights in all':>16s} "
          f"{'activations of 32 images, bf16':>31s} {'recomputed':>19s}")
    for name in ("imagenet128_unet", "imagenet256_unet", "imagenet512_unet", "imagenet512_unet_dwt1",
                 "imagenet512_unet_dwt2", "imagenet128_uvit", "imagenet256_uvit", "imagenet512_uvit", "t2i512_uvit",
                 "mdm64", "mdm256", "mdm1024", "cdm256_sr"):
        a, b = (cost_of(replace(PRESETS[name], precision="bf16", recompute=again)) for again in (False, True))
        print(f"{name:26s} {a.parameters / 1e6:13,.1f} {a.flops / 1e9:16,.1f} {gib(20 * a.parameters):>16s} "
              f"{gib(32 * a.activations):>31s} {gib(32 * b.activations):>19s}", flush=True)


if __name__ == "__main__":
    main()
