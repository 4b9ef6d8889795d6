"""Video: train from scratch, or grow from an image model, in the same minutes: which draws better videos?

Paper: Matryoshka Diffusion trains its video model on top of a trained image model.

    python benchmarks/grow_video.py train runs/video    scratch_SEED, image_SEED, grown_SEED: three seeds of each
    python benchmarks/grow_video.py judge runs/video [--n 72] -> results/grow_video.json

--only 2 trains and judges seed 2 alone; the results keep the rows of the other seeds, each with its commit.
The pace was measured before: the image model's 2,400 steps take as long as 800 of the video model (one core).
"""
import argparse
import json
import os
import statistics

from common import RESULTS, check, save, seconds_a_step, started     # first: it puts the project on the path

import evaluate
from plumbing import UserError
from plumbing.features import Yardstick
from plumbing.measuring import trained_run
from plumbing.runs import choose_device, commit, has_checkpoint, main_program, read_checkpoint
from plumbing.settings import Parser

STEPS = dict(scratch=4800, image=2400, grown=4000)
SHOWN = ("fd_held_out", "read_rate", "same_letter", "change", "turn", "uneven_turn")


def seeds(args):
    return range(args.seeds) if args.only is None else [args.only]


def others(args):
    """Return what was measured of other seeds in the same way -> (rows, {seed: scores of real scenes})."""
    path = os.path.join(RESULTS, "grow_video.json")
    if args.only is None or not os.path.exists(path):
        return [], {}
    with open(path) as file:
        before = json.load(file)
    if (before["n"], before["steps"]) != (args.n, STEPS):
        raise UserError(f"{path} has --n {before['n']} and steps {before['steps']}: judge all seeds anew")
    return ([row for row in before["rows"] if row["seed"] != args.only],
            {int(seed): real for seed, real in before["real_scenes"].items() if int(seed) != args.only})


def train(args):
    for seed in seeds(args):
        for kind, steps in STEPS.items():
            out = os.path.abspath(os.path.join(args.folder, f"{kind}_{seed}"))
            if has_checkpoint(out) and read_checkpoint(out)["step"] == steps:
                continue
            grow = ["--grow-from", os.path.abspath(os.path.join(args.folder, f"image_{seed}"))] * (kind == "grown")
            started("train.py", "--preset", "glyphs32" if kind == "image" else "glyphs32_video", "--steps", steps,
                    "--seed", seed, "--sample-every", 0, "--out", out, "--auto-resume", *grow)


def judge(args):
    device, _ = choose_device()
    rows, real = others(args)
    for seed in seeds(args):
        seconds = {kind: steps * seconds_a_step(os.path.join(args.folder, f"{kind}_{seed}"),
                                                8 if kind == "image" else 4) for kind, steps in STEPS.items()}
        for kind in ("scratch", "grown"):
            folder = os.path.join(args.folder, f"{kind}_{seed}")
            state = read_checkpoint(folder)
            yardstick = Yardstick(args.folder, state["config"], args.n, device=device)
            scores, _ = evaluate.measure(trained_run(folder, state, state["config"], device), yardstick,
                                         ("fd", "read", "motion"))
            real[seed] = evaluate.score_real_scenes(yardstick, ("fd", "read", "motion"))
            minutes = (seconds[kind] + (seconds["image"] if kind == "grown" else 0)) / 60
            rows.append(dict(kind=kind, seed=seed, commit=commit(), precision=state["config"].precision,
                             minutes=round(minutes, 1), **scores))
            print(kind, seed, f"{minutes:.1f} min", *(f"{key} {scores[key]:.4g}" for key in SHOWN), flush=True)
    for name, chosen in [(kind, [row for row in rows if row["kind"] == kind]) for kind in ("scratch", "grown")] + [
            ("real scenes", list(real.values()))]:
        print(f"{name}: " + "  ".join(
            f"{key} {statistics.mean(row[key] for row in chosen):.4g} ({min(row[key] for row in chosen):.4g} to "
            f"{max(row[key] for row in chosen):.4g})" for key in SHOWN))
    save("grow_video.json", device, n=args.n, steps=STEPS, rows=rows, real_scenes=real)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "judge"))
    parser.add_argument("folder", help="where the runs are")
    parser.add_argument("--n", type=int, default=72, help="videos of each run (default 72)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ... (default 3)")
    parser.add_argument("--only", type=int, help="this seed alone")
    args = parser.parse_args()
    check(args, n=2, seeds=1, only=0)
    {"train": train, "judge": judge}[args.what](args)


if __name__ == "__main__":
    main_program(main)
