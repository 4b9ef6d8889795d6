"""Measure training steps and sampling calls of each network, and their share of what the machine can do.

Paper: simple diffusion, section 5 and tables 4, 5 (steps a second), figure 9 (latency; benchmarks/distillation.py).

    python benchmarks/speed.py [--compile] [--batch 8] [--models glyphs64,unet64] -> results/speed[_compile]_DEVICE.json
    python benchmarks/speed.py growth        what resolution costs, by patching    -> results/speed_growth_DEVICE.json
    python benchmarks/speed.py attention  unet.attend in bf16 and float32 -> results/speed_attention_DEVICE.json
    python benchmarks/speed.py paper         on a GPU: the models of tables 4 and 5   -> results/speed_paper_DEVICE.json
    python benchmarks/speed.py uvit          on a GPU: the 2 B U-ViT       -> results/speed_uvit[_compile]_DEVICE.json

Variants take turns (A B C A B C ...), so a disturbance affects all of them. The least of --turns or more counts.

The same run measures the ceiling: the best rate of this machine's convolutions and of its matrix products, forward (for
sampling) and with gradients (for training). A network's share is the time that its FLOPs would take at these rates,
over the time that it takes.
"""
import argparse
import gc
import json
import os
import subprocess
import sys
import time

from common import ROOT, check, save  # first: it puts the project on the path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from config import PRESETS, build_model, make_optimizer
from plumbing.settings import Parser, override
from plumbing.cost import conditions_of, cost_of, forward
from plumbing import UserError
from plumbing.runs import autocast, choose_device, main_program
from plumbing.shard import checkpoint_activations
from plumbing.sources import open_run
from plumbing.start import measure_bands
from train import training_loss, update_ema

# The small presets, and the ImageNet networks of appendix B at 64 x 64, narrow enough for two cores. They have no
# dropout, because the cost of random numbers depends on the device.
MODELS = {name: PRESETS[name] for name in ("glyphs64", "glyphs64_unet", "glyphs64_nested", "glyphs64_sr",
                                           "glyphs64_text")}
MODELS |= {"unet64": override(PRESETS["imagenet128_unet"], size=(64, 64), base_channels=64, channel_mult=(1, 2, 4),
                              num_res_blocks=(2, 2, 4), emb_channels=512, dropout=0.0),
           "uvit64": override(PRESETS["imagenet128_uvit"], size=(64, 64), base_channels=64, channel_mult=(1, 2, 8),
                              num_res_blocks=(2, 2), num_transformer_blocks=8, emb_channels=512,
                              transformer_dropout=0.0)}
ATTENTION = ((16, 4, 64, 32), (8, 4, 64, 48), (8, 4, 256, 48), (8, 4, 1024, 16))   # minute, glyphs64, larger maps
GROWTH = ("none", "dwt_1", "dwt_2", "conv_2", "conv_4")
TABLE_5 = {"imagenet512_unet": 100, "imagenet512_unet_dwt1": 139, "imagenet512_unet_dwt2": 146,
           "imagenet512_unet_conv2": 137, "imagenet512_unet_conv4": 146}
TABLE_4 = {2: 114, 4: 100, 8: 76, 12: 62}                                 # ResBlocks down at 16 x 16: steps/s, %
# FLOP/s of a card in dense bf16, by its data sheet. Other forms of these cards have other rates.
PEAKS = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-40GB": 312e12,
         "NVIDIA A100-SXM4-80GB": 312e12}


# ------------------------------------------------------------------------------------------ one network

def batch_of(config, device):
    """Draw random data -> (x, cond, t, [eps, ...])."""
    g = torch.Generator().manual_seed(0)
    shapes = [(3, *size) for size in config.sizes]
    x, t = torch.rand(config.batch, *shapes[0], generator=g) * 2 - 1, torch.rand(config.batch, generator=g)
    cond = conditions_of(config, config.batch)
    if config.num_classes:
        cond["label"] = torch.randint(config.num_classes, (config.batch,), generator=g)
    if config.low_size:
        cond["aug_logsnr"] = torch.zeros(config.batch)
    eps = [torch.randn(config.batch, *shape, generator=g) for shape in shapes]
    cond = {key: value.to(device) for key, value in cond.items()}
    return x.to(device), cond, t.to(device), [level.to(device) for level in eps]


def timed(function, device):
    """Return a function that runs `function`, waits for the device and returns the seconds."""
    def run():
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start
    return run


def make_step(config, device, precision, channels_last=False, compiled=False):
    """Return (step, call): one training step (forward, backward, Adam, EMA) and one sampling call on random data.

    Both return their seconds.
    """
    if config.precondition == "bands":
        config = override(config, band_rms=measure_bands(config, open_run(config), None))
    torch.manual_seed(0)
    with device:
        model, ema = build_model(config), build_model(config).eval().requires_grad_(False)
    x, cond, t, eps = batch_of(config, device)
    if channels_last:
        model, ema = (network.to(memory_format=torch.channels_last) for network in (model, ema))
        x = x.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, config)
    if config.recompute:
        checkpoint_activations(model)
    handle, sampler = (torch.compile(model), torch.compile(ema)) if compiled else (model, ema)

    def step():
        with autocast(precision, device):
            loss = training_loss(config, handle, x, cond, t, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, config.ema, 10 ** 6)

    @torch.no_grad()
    def call():
        with autocast(precision, device):
            z = [level.to(device) for level in eps[:len(config.sizes)]]
            logsnr = [torch.zeros_like(t) for _ in z]
            sampler(z, logsnr, cond) if config.outer_channels else sampler(z[0], logsnr[0], cond)
    return timed(step, device), timed(call, device)


def flops_by_kind(config):
    """Count FLOPs of a forward pass of one image -> (convolutions, matrix products with attention)."""
    with torch.device("meta"):
        model = build_model(config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            forward(config, model, 1)
    counts = counter.get_flop_counts()["Global"]
    convolutions = sum(count for op, count in counts.items() if "convolution" in str(op))
    return convolutions, sum(counts.values()) - convolutions


# ------------------------------------------------------------------------------------------ the machine

def ceilings(device, precision, turns):
    """Measure this machine's best rates, FLOP a second -> {"convolution": [forward, with gradients], "matmul": ...}."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    large, best = device.type == "cuda", {"convolution": [0.0, 0.0], "matmul": [0.0, 0.0]}
    trials = []
    for channels, side in ((64, 64), (128, 32), (256, 32), (256, 16), (512, 16)):
        batch = 64 if large else 8
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(batch, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=layout)
            w = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=layout)
            trials.append(("convolution", 2 * batch * side ** 2 * 9 * channels ** 2, x, w,
                           lambda x, w: F.conv2d(x, w, padding=1)))
    for n in ((2048, 4096, 8192) if large else (512, 1024, 2048)):
        x, w = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        trials.append(("matmul", 2 * n ** 3, x, w, F.linear))
    for kind, flops, x, w, function in trials:
        x, w = x.requires_grad_(), w.requires_grad_()
        gradient = torch.ones_like(function(x, w))

        def with_gradients():
            torch.autograd.grad(function(x, w), (x, w), gradient)

        @torch.no_grad()
        def forward_only():
            function(x, w)
        for i, (work, run) in enumerate(((flops, forward_only), (3 * flops, with_gradients))):
            run = timed(run, device)
            run()
            best[kind][i] = max(best[kind][i], work / min(run() for _ in range(turns)))
    return best


def peak_memory():
    """Return the peak of bytes in use since `forget_peak`: of the CUDA device, or of this process (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def memory_of(config, precision):
    """Measure the peak of bytes that a model and a few training steps add, in a process of its own."""
    code = ("import sys; sys.path[:0] = sys.argv[2:]; import speed as s, dataclasses, json\n"
            "config = s.override(s.PRESETS['glyphs64'], **{k: tuple(v) if isinstance(v, list) else v for k, v in "
            "json.loads(sys.argv[1]).items() if k != 'precision'})\n"
            "device, _ = s.choose_device(); s.forget_peak(); before = s.peak_memory()\n"
            f"step, _ = s.make_step(config, device, '{precision}')\n"
            "for _ in range(3): step()\nprint(s.peak_memory() - before)")
    done = subprocess.run([sys.executable, "-c", code, json.dumps(config.__dict__), os.path.join(ROOT, "benchmarks"),
                           ROOT], capture_output=True, text=True, check=True)
    return int(done.stdout)


# ------------------------------------------------------------------------------------------ the questions

def variants_of(device, compiled):
    variants = {"float32": ("float32", False, False), "float32, channels_last": ("float32", True, False),
                "bf16": ("bf16", False, False), "bf16, channels_last": ("bf16", True, False)}
    return variants | ({"bf16, compile": ("bf16", device.type == "cuda", True)} if compiled else {})


def models(args):
    device, _ = choose_device()
    rates = {precision: ceilings(device, precision, args.turns) for precision in ("float32", "bf16")}
    for precision, rate in rates.items():
        print(f"{precision}: " + ", ".join(f"{kind} {forward / 1e9:,.0f} GFLOP/s, with gradients {train / 1e9:,.0f}"
                                           for kind, (forward, train) in rate.items()), flush=True)
    rows = []
    for name, config in ((name, MODELS[name]) for name in args.models):
        config = override(config, batch=args.batch)
        kinds = flops_by_kind(config)
        steps, seconds, first = {}, {}, {}
        for variant, options in variants_of(device, args.compile).items():
            try:
                steps[variant] = make_step(config, device, *options)
                first[variant] = tuple(run() for run in steps[variant])
            except torch.cuda.OutOfMemoryError:
                steps.pop(variant, None)
                print(f"{name}, {variant}: does not fit with batch {config.batch}", flush=True)
            except Exception as error:                                    # compiled code may fail in many ways
                if not options[2]:
                    raise
                steps.pop(variant, None)
                print(f"{name}, {variant}: fails, {type(error).__name__}: {str(error)[:200]}", flush=True)
        quick = int(20 / sum(map(sum, first.values())))                   # fill 20 seconds if turns are short
        for _ in range(max(args.turns, quick)):
            for variant, runs_ in steps.items():
                now = [run() for run in runs_]
                seconds[variant] = [min(pair) for pair in zip(now, seconds.get(variant, now))]
        print(f"{name}, batch {config.batch}: {sum(kinds) / 1e9:.2f} GFLOP an image, {kinds[0] / sum(kinds):.0%} of it "
              f"in convolutions\n{'':26s} {'ms a step':>10s} {'images/s':>9s} {'share':>6s} {'ms a call':>10s} "
              f"{'share':>6s} {'first step, s':>14s}")
        for variant, (step, call) in seconds.items():
            rate = rates[variant.split(",")[0]]
            ideal = [config.batch * sum(count * (1, 3)[i] / rate[kind][i] for kind, count in zip(
                ("convolution", "matmul"), kinds)) for i in (0, 1)]
            rows.append(dict(model=name, variant=variant, batch=config.batch, flops=kinds, seconds_a_step=step,
                             seconds_a_call=call, seconds_of_first_step=first[variant][0],
                             share_training=ideal[1] / step, share_sampling=ideal[0] / call))
            print(f"{variant:26s} {1e3 * step:10.1f} {config.batch / step:9.1f} {ideal[1] / step:6.2f} "
                  f"{1e3 * call:10.1f} {ideal[0] / call:6.2f} {first[variant][0]:14.1f}", flush=True)
        if steps:
            steps.clear()
            rows[-1]["peak_bytes"] = {precision: memory_of(config, precision) for precision in ("float32", "bf16")}
            print(f"{'memory, MiB':26s} " + ", ".join(f"{precision} {value / 2 ** 20:,.0f}" for precision, value in
                                                      rows[-1]["peak_bytes"].items()), flush=True)
    save(f"speed{'_compile' if args.compile else ''}_{device.type}.json", device, ceilings=rates, rows=rows)


def growth(args):
    """Measure a sampling call as the image grows, for each kind of patching: the 64 x 64 U-Net with more levels."""
    device, _ = choose_device()
    rows, sides = [], (64, 128, 256, 512)
    print("ms a sampling call of one image, float32")
    print(f"{'':8s}" + "".join(f"{side:>10d}" for side in sides) + "     (GFLOP)")
    for patching in GROWTH:
        line = []
        for side in sides:
            halvings = {"none": 0, "dwt_1": 1, "conv_2": 1, "dwt_2": 2, "conv_4": 2}[patching]
            levels = (side // 16).bit_length() - 1 - halvings             # down to 16 x 16
            mult = [max(1, 4 >> level) for level in range(levels, -1, -1)]
            config = override(MODELS["unet64"], size=(side, side), batch=1, patching=patching, channel_mult=tuple(mult),
                              num_res_blocks=(1,) * levels + (4,))
            _, call = make_step(config, device, "float32")
            call()
            seconds, flops = min(call() for _ in range(args.turns)), cost_of(config).flops
            rows.append(dict(patching=patching, side=side, seconds_a_call=seconds, flops=flops))
            line.append((seconds, flops))
        print(f"{patching:8s}" + "".join(f"{1e3 * seconds:10.1f}" for seconds, _ in line) + "     "
              + " ".join(f"{flops / 1e9:.1f}" for _, flops in line), flush=True)
    save(f"speed_growth_{device.type}.json", device, rows=rows)


def attention(args):
    """Measure scaled_dot_product_attention, forward and back, in bf16 and in float32, at the sizes of the presets."""
    device, _ = choose_device()
    rows = []
    print("batch, heads, tokens, channels a head      ms: bf16   float32     ratio")
    for shape in ATTENTION:
        runs = []
        for dtype in (torch.bfloat16, torch.float32):
            q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
            runs.append(timed(lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v).sum().backward(), device))
        turns = [[run() for run in runs] for _ in range(10 * args.turns)]
        bf16, float32 = (min(seconds) for seconds in zip(*turns))
        rows.append(dict(shape=shape, bf16=bf16, float32=float32))
        print(f"{str(shape):40s} {1e3 * bf16:10.2f} {1e3 * float32:9.2f} {bf16 / float32:9.1f}", flush=True)
    save(f"speed_attention_{device.type}.json", device, rows=rows)


def step_seconds(config, device, args):
    """Return the least seconds of a training step as train.py takes it with CUDA, or None if it does not fit."""
    torch.compiler.reset()                                                # it holds the network before
    gc.collect()
    torch.cuda.empty_cache()
    try:
        step, _ = make_step(config, device, "bf16", channels_last=True, compiled=args.compile)
        step()
        return min(step() for _ in range(args.turns))
    except torch.OutOfMemoryError:
        return None


def paper(args):
    """Measure the steps a second of tables 4 and 5, as shares of their 100 %, beside the paper's."""
    device, _ = choose_device()
    base, rows = PRESETS["imagenet256_unet"], []
    table_4 = {f"table 4, {blocks} blocks": (override(base, num_res_blocks=(*base.num_res_blocks[:4], blocks, 4)),
                                             share) for blocks, share in TABLE_4.items()}
    table_5 = {name: (PRESETS[name], share) for name, share in TABLE_5.items()}
    for table in (table_5, table_4):
        seconds = {}
        for name, (config, _) in table.items():
            if args.tiny:
                config = override(config, size=(config.size[0] // 8,) * 2, base_channels=8, emb_channels=16)
            seconds[name] = step_seconds(override(config, batch=args.batch), device, args)
        hundred = seconds[next(name for name, (_, share) in table.items() if share == 100)]
        for name, (_, share) in table.items():
            ours = 100 * hundred / seconds[name] if hundred and seconds[name] else None
            rows.append(dict(model=name, batch=args.batch, seconds_a_step=seconds[name], percent=ours, paper=share))
            print(f"{name:24s} " + (f"{1 / seconds[name]:8.2f} steps/s" if seconds[name] else "does not fit")
                  + (f" {ours:5.0f} %" if ours else "") + f"; the paper {share} %", flush=True)
    save(f"speed_paper_{device.type}.json", device, compile=args.compile, tiny=args.tiny, rows=rows)


def uvit(args):
    """Measure images/s of a training step of the 2 B U-ViT, and its share of the card's FLOP/s (MFU).

    The batch doubles until it does not fit. With --compile there is one batch, as each size would compile anew.
    """
    device, _ = choose_device()
    config = PRESETS["imagenet512_uvit"]
    if args.tiny:
        config = override(config, size=(64, 64), base_channels=8, emb_channels=16, num_transformer_blocks=2)
    flops = 3 * cost_of(config).flops                                     # a backward pass counts as two forward ones
    # B.2: 1.5 steps/s of 2048 images on 128 TPUv4 of 275 TFLOP/s each.
    each = 1.5 * 2048 / 128
    print(f"the paper's: {each:.0f} images/s on each TPUv4, {each * flops / 275e12:.0%} of its FLOP/s")
    peak = PEAKS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    rows = []
    for recompute in (False,) if args.compile else (False, True):
        for doubled in range(1 if args.compile else 2 if args.tiny else 9):
            batch = args.batch << doubled
            seconds = step_seconds(override(config, batch=batch, recompute=recompute), device, args)
            pace = batch / seconds if seconds else None
            mfu = pace * flops / peak if pace and peak else None
            rows.append(dict(batch=batch, recompute=recompute, seconds_a_step=seconds, images_a_second=pace, mfu=mfu))
            said = f"{pace:.1f} images/s, MFU " + (f"{mfu:.0%}" if mfu else "unknown") if pace else "does not fit"
            print(f"batch {batch:4d}{', recompute' if recompute else ''}: {said}", flush=True)
            save(f"speed_uvit{'_compile' if args.compile else ''}_{device.type}.json", device, flops_a_step=flops,
                 peak=peak, tiny=args.tiny, rows=rows)                    # at once: the time may be up
            if not seconds:
                break


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("models", "growth", "attention", "paper", "uvit"),
                        default="models")
    parser.add_argument("--models", default=",".join(MODELS), type=lambda text: text.split(","))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile (a minute or more to start)")
    parser.add_argument("--tiny", action="store_true", help="paper, uvit: small networks, to try the script on a CPU")
    args = parser.parse_args()
    check(args, batch=1, turns=1)
    if unknown := set(args.models) - set(MODELS):
        raise UserError(f"--models {','.join(sorted(unknown))}: want some of {', '.join(MODELS)}")
    {"models": models, "growth": growth, "attention": attention, "paper": paper, "uvit": uvit}[args.what](args)


if __name__ == "__main__":
    main_program(main)
