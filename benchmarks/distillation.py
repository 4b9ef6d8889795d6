"""From 256 steps to 1: measure distance, read rate and seconds an image of teacher and students; latency of a student.

Paper: simple diffusion, section 5 and figure 9 (an image in 0.42 s at 16 steps, eight in 2.00 s, on a TPUv4).

    python benchmarks/distillation.py train runs/glyphs64          both ladders down to one step; call again to go on
    python benchmarks/distillation.py judge runs/glyphs64 [--n 360]
                                     -> results/distillation.json, figures/distillation.png, distillation_samples.png
    python benchmarks/distillation.py latency [--preset imagenet512_uvit] [--compile]
                                     -> results/distillation_latency_PRESET_DEVICE.json

judge compares the teacher (DDPM and DDIM) with the progressive student without guidance, and with the guided student at
w = 2, which needs half the calls. All rows draw the same labels from the same seeds. Times are measured after all
samples are drawn, the rows take turns, and the least of --turns counts. The --n samples stay in the run folders.

latency times a guided student with random weights, which have the speed of trained ones.
"""
import argparse
import os
import time

from common import ROOT, check, save, started  # first: it puts the project on the path

import torch

import evaluate
from config import PRESETS, build_model
from plumbing.settings import Parser, override
from plumbing import UserError
from plumbing.features import Yardstick
from plumbing.measuring import trained_run
from plumbing.runs import choose_device, choose_precision, main_program, read_checkpoint
from plumbing.sampling import compile_model, make_conditions
from sample import sample_run
from plumbing.pictures import grid, pyplot, save_figure

STEPS = (256, 64, 16, 8, 4, 2, 1)
# (what, w, sampler, ladder): the students of a ladder lie in RUN + ladder; the teacher has no ladder
SETS = [("teacher, DDPM", 1, "ddpm", None), ("teacher, DDIM", 1, "ddim", None), ("student", 1, "ddim", "-distilled"),
        ("teacher, DDPM", 2, "ddpm", None), ("teacher, DDIM", 2, "ddim", None),
        ("guided student", 2, "ddim", "-guided-distilled")]


def train(args):
    for options in ([], ["--guided"]):
        started("distill.py", os.path.abspath(args.run), "--to", "1", *options)


def rows_of(run):
    """Return [(what, w, steps, folder, sampler), ...]. Only the guided ladder has a student of 256 steps."""
    rows = []
    for what, w, sampler, ladder in SETS:
        for steps in STEPS:
            name = str(steps) if steps < STEPS[0] else "guided" if w > 1 else None
            if ladder is None or name:
                rows.append((what, w, steps, run if ladder is None else os.path.join(run + ladder, name), sampler))
    return rows


def opened(folder, device, **setting):
    """Open a run, to be sampled with these settings."""
    state = read_checkpoint(folder)
    return trained_run(folder, state, override(state["config"], **setting), device)


def seconds_an_image(model, config, device, batch):
    start = time.perf_counter()
    cond = make_conditions(config, [0] * batch, device)
    sample_run(model, config, cond, range(batch), device, choose_precision(config.precision, device))
    return (time.perf_counter() - start) / batch


def judge(args):
    device, _ = choose_device()
    run = os.path.normpath(args.run)
    teacher = read_checkpoint(run)
    yardstick = Yardstick(os.path.dirname(os.path.abspath(run)), teacher["config"], args.n, device=device)
    rows, sheets, trained = [], {}, []
    for what, w, steps, folder, sampler in rows_of(run):
        trained.append(opened(folder, device, sample_steps=steps, sampler=sampler, guidance=w))
        scores, samples = evaluate.measure(trained[-1], yardstick, ("fd", "read"))
        rows.append(dict(what=what, w=w, steps=steps, calls=steps * trained[-1].config.evaluations, **scores))
        sheets[what, w, steps] = samples["images"]
        print(f"{what:15s} w {w}  {steps:4d} steps  {rows[-1]['calls']:4d} calls  FD {scores['fd_held_out']:6.2f} ± "
              f"{scores['fd_held_out_pm']:.2f}  read {scores['read_rate']:.1%}", flush=True)
    for turn in range(args.turns):
        for row, student in zip(rows, trained):
            for key, batch in (("seconds_an_image", 16), ("seconds_of_one", 1)):
                row[key] = min(row.get(key, 1e9), seconds_an_image(student.model, student.config, device, batch))
    slow = next(row for row in rows if (row["what"], row["w"], row["steps"]) == ("teacher, DDIM", 2, STEPS[0]))
    for row in rows:
        row["times_as_fast"] = slow["seconds_an_image"] / row["seconds_an_image"]
        print(f"{row['what']:15s} w {row['w']}  {row['steps']:4d} steps  {row['seconds_an_image']:8.4f} s an image, "
              f"{row['times_as_fast']:7.1f} times as fast as the guided teacher  (alone {row['seconds_of_one']:.4f} s)")
    save("distillation.json", device, n=args.n, seed_of_training=teacher["config"].seed, seed_of_samples=0,
         batch_of_times=16, rows=rows)
    draw(rows)
    draw_samples(sheets, samples["labels"])


def draw(rows):
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 3.8))
    for what, w, _, ladder in SETS:
        chosen = [row for row in rows if (row["what"], row["w"]) == (what, w)]
        color = "C2" if ladder else "C0" if "DDIM" in what else "C1"
        style = ("o-" if w > 1 else "o:") if ladder else ("s-" if w > 1 else "s:")
        for axis, key, scale in zip(axes, ("read_rate", "fd_held_out"), (100, 1)):
            axis.errorbar([row["calls"] for row in chosen], [scale * row[key] for row in chosen],
                          [scale * row[key + "_pm"] for row in chosen], fmt=style, color=color, markersize=3.5,
                          capsize=2, linewidth=1.2, label=f"{what}, " + ("no guidance" if w == 1 else f"w = {w}"))
    for axis, label in zip(axes, ("read rate, %", "Fréchet distance to held-out scenes")):
        axis.set(xscale="log", xlabel="network calls an image", ylabel=label)
        axis.set_xticks([2 ** k for k in range(10)])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    save_figure(figure, os.path.join(ROOT, "figures", "distillation.png"), dpi=110)


def draw_samples(sheets, labels, many=16):
    """Draw a sheet of teacher and student at w = 2, one a row, with the same labels and seeds."""
    shown = [("teacher, DDIM", 256), ("teacher, DDIM", 4), ("teacher, DDIM", 1), ("guided student", 16),
             ("guided student", 4), ("guided student", 1)]
    at = torch.arange(many) * (max(labels) + 2) % len(labels)             # the labels cycle: this takes A, B, C, ...
    images = torch.cat([sheets[what, 2, steps][at] for what, steps in shown]).permute(0, 3, 1, 2) / 127.5 - 1
    names = [f"{what.split()[-1] if 'student' in what else what}: {steps}" for what, steps in shown]
    grid(images, many, names).save(os.path.join(ROOT, "figures", "distillation_samples.png"))


def latency(args):
    """Time one image and eight, at 1 to 16 steps, with the loop of sample.py; on CUDA with weights in bf16."""
    device, _ = choose_device()
    config = override(PRESETS[args.preset], guidance_max=5.0, guidance=2.0, sampler="ddim")
    if not config.num_classes or config.low_size:
        raise UserError(f"--preset {args.preset}: want one with classes that needs no low-resolution image")
    torch.manual_seed(0)
    with device:
        model = build_model(config).eval().requires_grad_(False)
    precision = choose_precision(config.precision, device)
    config = override(config, precision=precision)                        # resolve "auto" here, not in each timed call
    if device.type == "cuda":                                             # each call reads all weights: half the bytes
        model = model.to(torch.bfloat16)
    handle = compile_model(model, device) if args.compile else model
    bytes_read = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{args.preset}: {sum(p.numel() for p in model.parameters()):,} parameters, random; "
          f"{bytes_read / 2 ** 30:.2f} GiB of weights a call; {precision} on {device}")
    rows = []
    for batch in (1, 8):
        for steps in (1, 4, 8, 16):
            setting, times = override(config, sample_steps=steps), []
            for _ in range(args.turns + 1):
                times.append(seconds_an_image(handle, setting, device, batch) * batch)          # ends on the CPU
            rows.append(dict(images=batch, steps=steps, ms=1e3 * min(times[1:])))
            paper = {(1, 16): 420, (8, 16): 2000}.get((batch, steps))
            print(f"{batch} {'images' if batch > 1 else 'image'}, {steps:2d} steps: {rows[-1]['ms']:9.1f} ms" + (
                f"   (the paper's, on a TPUv4: {paper} ms)" if paper and args.preset == "imagenet512_uvit" else ""),
                  flush=True)
    save(f"distillation_latency_{args.preset}_{device.type}.json", device, preset=args.preset, compile=args.compile,
         precision=precision, bytes_of_weights=bytes_read, weights="random", rows=rows)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "judge", "latency"))
    parser.add_argument("run", nargs="?", default="runs/glyphs64", help="the teacher")
    parser.add_argument("--n", type=int, default=360)
    parser.add_argument("--turns", type=int, default=2, help="timings; the least of them counts")
    parser.add_argument("--preset", default="imagenet512_uvit", choices=PRESETS)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    check(args, n=2, turns=1)
    {"train": train, "judge": judge, "latency": latency}[args.what](args)


if __name__ == "__main__":
    main_program(main)
