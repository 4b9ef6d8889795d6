"""What a run costs before it is run: parameters, FLOPs, and the memory of each process, sharded or not.

Paper: simple diffusion, table 1 and section 3.3. At high resolution the feature maps take the memory and the kernels
almost none. At 16 x 16 it is the other way round, so the paper scales the network there.
Needs: unet.py (table 1), shard.py.

    python -m plumbing.cost                                                the papers' presets (a minute)
    python train.py --preset imagenet512_uvit --dry-run --world-size 64    one run, with all its settings

Nothing is allocated. The network runs on PyTorch's fake tensors, which have shapes, types and storages but no numbers.

A training step with P parameters in float32 holds weights, gradients, two optimizer states and EMA weights: 4 P bytes
each, of which a sharded process has 1/N. It also holds the activations that the forward pass keeps for the backward
pass, so many bytes an image, and with bf16 a bf16 copy of each weight (if sharded: of one block at a time).
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
    copies: int                          # bytes of weights in another precision that it keeps, for any batch
    largest: int                         # parameters of the largest block
    outside: int                         # parameters that are in no block


def conditions_of(config, batch):
    """Return conditions of zeros, in the right shapes, for `batch` images."""
    cond = {}
    if config.low_size:
        cond["low_res"] = torch.zeros(batch, 3, *config.low_size)
    if config.text_encoder:
        cond["text"] = torch.zeros(batch, config.text_length, dtype=torch.long)
        if config.text_encoder != "bytes":
            cond["text"] = torch.zeros(batch, config.text_length, config.text_channels)
        cond["text_mask"] = torch.ones(batch, config.text_length, dtype=torch.bool)
    return cond


def forward(config, model, batch):
    """Run the model on `batch` images of zeros."""
    z, logsnr = [torch.zeros(batch, *shape) for shape in config.shapes], [torch.zeros(batch) for _ in config.shapes]
    cond = conditions_of(config, batch)
    return model(z, logsnr, cond) if config.outer_channels else model(z[0], logsnr[0], cond)


def saved_bytes(config, model, batch):
    """Return the bytes that a forward pass saves for the backward pass, besides the weights. Views of one storage count
    once."""
    bytes_of, tensors = {}, []

    def save(tensor):
        tensors.append(tensor)                                            # keep it alive: its address stays its own
        bytes_of[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), \
            torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        forward(config, model, batch)
    for parameter in model.parameters():
        bytes_of.pop(parameter.untyped_storage()._cdata, None)
    return sum(bytes_of.values())


def outermost_blocks(model):
    """Return the blocks that lie in no other block."""
    blocks = blocks_of(model)
    inside = {module for block in blocks for module in block.modules() if module is not block}
    return [block for block in blocks if block not in inside]


def cost_of(config):
    """Return the Cost of a model of this configuration. Precision "auto" counts as float32."""
    with torch.device("meta"):
        model = build_model(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(config, model, 1)
    with FakeTensorMode(allow_non_fake_inputs=True):                      # it knows autocast; "meta" does not
        model.to_empty(device="cpu")
        sizes = [sum(p.numel() for p in block.parameters()) for block in outermost_blocks(model)]
        if config.recompute:
            checkpoint_activations(model)
        one, two = saved_bytes(config, model, 1), saved_bytes(config, model, 2)
    parameters = sum(p.numel() for p in model.parameters())
    an_image = two - one
    return Cost(parameters, counter.get_total_flops(), activations=an_image, copies=one - an_image,
                largest=max(sizes, default=0), outside=parameters - sum(sizes))


def memory(config, cost, world=1):
    """Return {what: bytes} that each of `world` processes holds at most, by shard, accumulate and batch of config.

    "At most": gradients appear while activations go, so a step peaks below the sum. It leaves out what single
    operations and the allocator need, batches that wait in a queue, and with --recompute the block at work.
    """
    share = 4 * cost.parameters / (world if config.shard else 1)
    result = {"weights": share, "gradients": share, "optimizer state": 2 * share, "EMA weights": share,
              "activations": cost.activations * config.batch / world / config.accumulate}
    if config.shard and world > 1:
        # The block at work and the next one on its way; its gradients before they are summed; what is in no block.
        width = 2 if config.precision == "bf16" else 4
        result["gathered"] = 2 * width * cost.largest + 4 * cost.largest + 2 * 4 * cost.outside
    elif config.precision == "bf16":
        result["weights in bf16"] = cost.copies
    return result


def gib(value):
    return f"{value / 2 ** 30:,.2f} GiB"


def report(config, world=1):
    """Print the cost of a run, for train.py --dry-run."""
    cost = cost_of(config)
    print(f"\nparameters               {cost.parameters:,}")
    print(f"forward pass, one image  {cost.flops / 1e9:,.2f} GFLOP (multiply and add counted as two)")
    print(f"training step            {3 * cost.flops * config.batch / 1e12:,.3f} TFLOP (backward counted as two "
          "forwards)")
    print(f"activations              {gib(cost.activations)} an image, {config.precision}"
          + (", with --recompute" if config.recompute else ""))
    columns = {"whole": memory(replace(config, shard=False), cost, world)}
    if world > 1:
        columns["sharded"] = memory(replace(config, shard=True), cost, world)
    title = f"memory of each of {world} processes, {config.batch // world // config.accumulate} images at once"
    print(f"\n{title}" + "".join(f"{name:>16s}" for name in columns))
    for row in dict.fromkeys(row for column in columns.values() for row in column):
        cells = [gib(column[row]) if row in column else "" for column in columns.values()]
        print(f"  {row}".ljust(len(title)) + "".join(f"{cell:>16s}" for cell in cells))
    print("  in all, at most".ljust(len(title)) + "".join(f"{gib(sum(column.values())):>16s}"
                                                         for column in columns.values()))


def main():
    print(f"{'':26s} {'parameters, M':>13s} {'GFLOP an image':>16s} {'training state':>16s} "
          f"{'activations of 32 images, bf16':>31s} {'with --recompute':>19s}")
    for name in ("imagenet128_unet", "imagenet256_unet", "imagenet512_unet", "imagenet512_unet_dwt1",
                 "imagenet512_unet_dwt2", "imagenet128_uvit", "imagenet256_uvit", "imagenet512_uvit", "t2i512_uvit",
                 "mdm64", "mdm256", "mdm1024", "cdm256_sr"):
        plain, again = (cost_of(replace(PRESETS[name], precision="bf16", recompute=on)) for on in (False, True))
        print(f"{name:26s} {plain.parameters / 1e6:13,.1f} {plain.flops / 1e9:16,.1f} "
              f"{gib(20 * plain.parameters):>16s} {gib(32 * plain.activations):>31s} "
              f"{gib(32 * again.activations):>19s}", flush=True)


if __name__ == "__main__":
    main()
