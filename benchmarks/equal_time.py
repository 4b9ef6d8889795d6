"""Compare three papers at equal wall-clock time: plain, nested, cascaded; distance and read rate against minutes.

    python benchmarks/equal_time.py cost   runs/equal              seconds and memory of a step, all in one run
    python benchmarks/equal_time.py train  runs/equal [--minutes 20] [--only glyphs64,nested]
    python benchmarks/equal_time.py judge  runs/equal [--minutes 20] [--only ...] [--n 360]
                                                                   -> results/equal_time.json, figures/equal_time*.png

Five ways to 64 x 64: the plain U-ViT (simple diffusion); the plain U-Net (Matryoshka's "Simple DM"); nested, all levels
at once; nested, grown from 16 x 16; a cascade 16 -> 64. The last two spend their first FIRST minutes on one shared 16 x
16 run. The nested model and that run have the plain U-ViT's inner blocks.

Equal time means: we measure the pace of train.py for each way on a quiet machine, and give each as many steps as fit.
So a disturbance during training changes only how long we wait. All have the same data, batch and seed. Every KEEP
minutes a checkpoint stays; with more --minutes the same runs go on at their first pace. judge takes the checkpoints up
to --minutes, or only those of --at 10,20.
"""
import argparse
import os
import re

from common import ROOT, check, save, seconds_a_step, started  # first: it puts the project on the path

import evaluate
import speed
from config import PRESETS
from plumbing.settings import Parser
from plumbing import UserError
from plumbing.files import read_json, write_json
from plumbing.features import Yardstick
from plumbing.measuring import draw_comparison, trained_run
from plumbing.runs import (choose_device, choose_precision, has_checkpoint, kept_checkpoints, main_program,
                           read_checkpoint)
from plumbing.pictures import pyplot, save_figure

# folder: (title, preset, the run that comes first, the use of that run)
RUNS = {"glyphs64": ("plain U-ViT", "glyphs64", None, None),
        "glyphs64_unet": ("plain U-Net", "glyphs64_unet", None, None),
        "nested": ("nested, from scratch", "glyphs64_nested", None, None),
        "grown": ("nested, grown 16 → 64", "glyphs64_nested", "glyphs16", "grow"),
        "cascade": ("cascade 16 → 64", "glyphs64_sr", "glyphs16", "low")}
FIRST, KEEP = 5, 5                                                        # minutes


def make_step(preset):
    device, _ = choose_device()
    return speed.make_step(PRESETS[preset], device, choose_precision("auto", device))[0]


def cost(args):
    presets = ["glyphs16", "glyphs64", "glyphs64_nested", "glyphs64_unet", "glyphs64_sr"]
    steps, best = {preset: make_step(preset) for preset in presets}, {}
    for turn in range(args.turns + 1):                                    # in turns; the first turn warms up
        for preset, step in steps.items():
            seconds = step()
            best[preset] = min(best.get(preset, 1e9), seconds) if turn else 1e9
    precision = choose_precision("auto", choose_device()[0])
    memory = {preset: speed.memory_of(PRESETS[preset], precision) for preset in presets}
    print("a training step, batch 16      ms    of glyphs16     MiB    of glyphs16")
    for preset in presets:
        print(f"{preset:24s} {1e3 * best[preset]:8.0f} {best[preset] / best['glyphs16']:12.2f} "
              f"{memory[preset] / 2 ** 20:9.0f} {memory[preset] / memory['glyphs16']:12.2f}")
    save("equal_time_cost.json", choose_device()[0], seconds_a_step=best, bytes_of_a_step=memory)


def steps_of(args, preset, minutes):
    """Return how many steps fit, a multiple of 4, by the pace of train.py itself (with loading and EMA)."""
    path = os.path.join(args.folder, "pace.json")
    pace = read_json(path)
    if preset not in pace:
        out = os.path.join(args.folder, "pace-" + preset)
        started("train.py", "--preset", preset, "--steps", 120, "--sample-every", 0, "--sample-steps", 1, "--out", out,
                "--auto-resume")
        pace[preset] = seconds_a_step(out, PRESETS[preset].batch, skip=2)
        write_json(path, pace)
    return 4 * max(1, round(minutes * 60 / pace[preset] / 4))


def kept_every(args, name):
    """Return the steps of KEEP minutes: those of the run, if it exists."""
    folder, (_, preset, first, _) = os.path.join(args.folder, name), RUNS[name]
    if has_checkpoint(folder):
        return read_checkpoint(folder)["config"].keep_every
    if first:
        steps_of(args, first, FIRST)
    return steps_of(args, preset, KEEP)


def finished(folder, steps):
    """Return whether an earlier call trained this run to its end."""
    return has_checkpoint(folder) and read_checkpoint(folder)["step"] >= steps


def check_seeds(args):
    for name in args.only:
        folder = os.path.join(args.folder, name)
        if has_checkpoint(folder) and (there := read_checkpoint(folder)["config"].seed) != args.seed:
            raise UserError(f"--seed {args.seed}: {folder} was trained with {there}; choose another folder")


def train(args):
    args.folder = os.path.abspath(args.folder)
    os.makedirs(args.folder, exist_ok=True)
    every = {name: kept_every(args, name) for name in args.only}           # measure all paces first, on a quiet machine
    for name in args.only:
        _, preset, first, use = RUNS[name]
        common = ["--sample-every", 0, "--seed", args.seed, "--auto-resume"]
        below = first and os.path.join(args.folder, first)
        if first and not has_checkpoint(os.path.join(args.folder, name)):
            started("train.py", "--preset", first, "--steps", steps_of(args, first, FIRST), "--out", below, *common)
        steps = every[name] * round((args.minutes - (FIRST if first else 0)) / KEEP)
        common += ["--grow-from", below] if use == "grow" else []
        if not finished(os.path.join(args.folder, name), steps):
            started("train.py", "--preset", preset, "--steps", steps, "--keep-every", every[name], "--save-every",
                    every[name], "--out", os.path.join(args.folder, name), *common)


def judge(args):
    device, _ = choose_device()
    result, sheets = {}, []
    if missing := [name for name in args.only if not has_checkpoint(os.path.join(args.folder, name))]:
        raise UserError(f"{args.folder}: {', '.join(missing)} not trained; first python benchmarks/equal_time.py train "
                        f"{args.folder} --minutes {args.minutes} --only {','.join(missing)}")
    for name in args.only:
        title, preset, first, use = RUNS[name]
        folder = os.path.join(args.folder, name)
        last, cascade = read_checkpoint(folder), {}
        config = last["config"]
        yardstick = Yardstick(args.folder, config, args.n, device=device)
        if use == "low":
            low = read_checkpoint(os.path.join(args.folder, first))
            low = trained_run(os.path.join(args.folder, first), low, low["config"], device)
            cascade = dict(below=low, handoff="renoised", s=args.s)
        result[name] = []
        there = {(FIRST if first else 0) + KEEP * k: kept for kept in kept_checkpoints(folder)
                 for k, rest in [divmod(int(re.search(r"\d+", kept)[0]), config.keep_every)] if not rest}
        wanted = args.at or range(KEEP + (FIRST if first else 0), args.minutes + 1, KEEP)
        if missing := set(wanted) - set(there):
            raise UserError(f"{folder}: no checkpoint of {min(missing):g} minutes; train to --minutes {max(wanted):g}")
        for minutes in wanted:
            state = read_checkpoint(folder, there[minutes])
            run = trained_run(folder, state, config, device, **cascade)
            scores, samples = evaluate.measure(run, yardstick, ("fd", "is", "read", "pr"))
            seconds = scores["seconds_of_sampling"] + scores.pop("seconds_of_low_stage", 0)
            row = dict(minutes=minutes, images=state["images"],
                       seconds_an_image=round(seconds / args.n, 4), **scores)
            result[name].append(row)
            print(f"{title:24s} {row['minutes']:5.1f} min  {row['images']:7,} images  FD {row['fd_held_out']:6.2f} ± "
                  f"{row['fd_held_out_pm']:.2f}  read {row['read_rate']:.1%} ± {row['read_rate_pm']:.1%}  "
                  f"{row['seconds_an_image']:.2f} s an image", flush=True)
        sheets.append((title, samples["images"]))
    save(args.name + ".json", device, n=args.n, seed_of_training=config.seed, seed_of_samples=0, s_of_cascade=args.s,
         minutes=max(args.at or [args.minutes]), runs=result)
    draw_comparison(sheets, [], os.path.join(ROOT, "figures", args.name + "_samples.png"))
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.4))
    for axis, key, label in ((axes[0], "fd_held_out", "Fréchet distance to held-out scenes"),
                             (axes[1], "read_rate", "read rate")):
        for name, rows in result.items():
            axis.errorbar([r["minutes"] for r in rows], [r[key] for r in rows], [r[key + "_pm"] for r in rows],
                          marker="o", markersize=3, capsize=2, label=RUNS[name][0])
        axis.set(xlabel="minutes of training on two cores", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8)
    save_figure(figure, os.path.join(ROOT, "figures", args.name + ".png"))


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "train", "judge"))
    parser.add_argument("folder", help="where the runs are")
    parser.add_argument("--minutes", type=int, default=20, help=f"of training, a multiple of {KEEP}")
    parser.add_argument("--only", default=",".join(RUNS), help="only these runs; all: %(default)s")
    parser.add_argument("--at", default="", help="judge only the checkpoints of these minutes: 10,20")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--n", type=int, default=360)
    parser.add_argument("--s", type=float, default=0.3, help="of the cascade's handoff")
    parser.add_argument("--seed", type=int, default=0, help="of training")
    parser.add_argument("--name", help="of the files that judge writes; default: equal_time and what --only says")
    args = parser.parse_args()
    check(args, n=2, turns=1)
    if args.minutes % KEEP or args.minutes < FIRST + KEEP:
        raise UserError(f"--minutes {args.minutes}: want a multiple of {KEEP}, {FIRST + KEEP} or more")
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(RUNS):
        raise UserError(f"--only {min(unknown)}: want some of {','.join(RUNS)}")
    args.name = args.name or "-".join(["equal_time", *args.only * (set(args.only) != set(RUNS))])
    try:
        args.at = [float(part) for part in args.at.split(",")] if args.at else []
    except ValueError:
        raise UserError(f"--at {args.at}: want minutes, as 10,20") from None
    if args.what != "cost":
        check_seeds(args)
    {"cost": cost, "train": train, "judge": judge}[args.what](args)


if __name__ == "__main__":
    main_program(main)
