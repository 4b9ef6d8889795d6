"""Text to image: compare how much guidance the shifted and the interpolated schedule tolerate; test composition.

Paper: simple diffusion, 3.1 and figure 8: "shifted schedules can only tolerate little guidance, and interpolated
schedules get better results with higher guidance weights".

    python benchmarks/text_guidance.py train runs/text          glyphs64_text twice; only the schedule differs
    python benchmarks/text_guidance.py judge runs/text [--n 360] [--guidance 1,1.5,2,3,5,8]
                                                -> results/text_guidance.json, figures/text_guidance.png

judge uses captions that training showed, and captions of the withheld pairs of character and colour.
"""
import argparse
import dataclasses
import os

from common import ROOT, check, save, started  # first: it puts the project on the path

import evaluate
from config import PRESETS
from plumbing.settings import Parser
from plumbing.features import Yardstick
from plumbing.measuring import trained_run
from plumbing.runs import choose_device, has_checkpoint, main_program, read_checkpoint
from plumbing.pictures import pyplot, save_figure
from plumbing.sources import open_run

SCHEDULES = ("interpolated", "shifted")


def train(args):
    for schedule in SCHEDULES:
        out = os.path.abspath(os.path.join(args.folder, schedule))
        if not has_checkpoint(out) or read_checkpoint(out)["step"] < PRESETS["glyphs64_text"].steps:
            started("train.py", "--preset", "glyphs64_text", "--schedule", schedule, "--out", out, "--auto-resume")


def judge(args):
    device, _ = choose_device()
    rows = []
    for schedule in SCHEDULES:
        folder = os.path.join(args.folder, schedule)
        state = read_checkpoint(folder)
        run, config = trained_run(folder, state, state["config"], device), state["config"]
        yardstick = Yardstick(args.folder, config, args.n, device=device)
        withheld = open_run(config, pairs="withheld")
        for clip in ("static", "dynamic"):
            for guidance in args.guidance:
                if clip == "dynamic" and guidance < 3:                    # too little is clipped there
                    continue
                setting = dataclasses.replace(run, config=dataclasses.replace(config, guidance=guidance, clip_x=clip))
                seen, _ = evaluate.measure(setting, yardstick, ("fd", "is", "read", "words"))
                row = dict(schedule=schedule, clip_x=clip, guidance=guidance, seen=seen)
                if clip == "static":
                    row["withheld"], _ = evaluate.measure(setting, yardstick, ("read", "words"), source=withheld)
                rows.append(row)
                print(f"{schedule:13s} {clip:8s} guidance {guidance:<4g} FD {seen['fd_held_out']:6.2f} ± "
                      f"{seen['fd_held_out_pm']:.2f}  read {seen['read_rate']:.1%}  all right {seen['all_right']:.1%}"
                      + (f", of withheld pairs {row['withheld']['all_right']:.1%}" if "withheld" in row else ""),
                      flush=True)
    save(args.name + ".json", device, n=args.n, steps_of_training=state["step"], seed_of_training=config.seed,
         seed_of_samples=0, rows=rows)
    draw(rows, args.name)


def draw(rows, name):
    figure, axes = pyplot().subplots(1, 3, figsize=(12, 3.5))
    panels = (("seen", "fd_held_out", "Fréchet distance to held-out scenes"),
              ("seen", "all_right", "letter and both colours right\ncaptions seen in training"),
              ("withheld", "all_right", "letter and both colours right\npairs of letter and colour never seen"))
    for axis, (which, key, label) in zip(axes, panels):
        for color, schedule in zip(("C0", "C1"), SCHEDULES):
            for clip, line in (("static", "o-"), ("dynamic", "s:")):
                chosen = [row for row in rows if row["schedule"] == schedule and row["clip_x"] == clip and which in row]
                if chosen:
                    axis.errorbar([row["guidance"] for row in chosen], [row[which][key] for row in chosen],
                                  [row[which][key + "_pm"] for row in chosen], fmt=line, markersize=3, capsize=2,
                                  color=color, label=f"{schedule}, {clip} clipping")
        axis.set(xlabel="guidance w", ylabel=label, xscale="log")
        axis.set_xticks([row["guidance"] for row in rows if row["schedule"] == "shifted" and row["clip_x"] == "static"])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(figure, os.path.join(ROOT, "figures", name + ".png"), dpi=110)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "judge"))
    parser.add_argument("folder", help="where the runs are")
    parser.add_argument("--n", type=int, default=360)
    parser.add_argument("--guidance", default="1,1.5,2,3,5,8", type=lambda text: [float(w) for w in text.split(",")])
    parser.add_argument("--name", default="text_guidance", help="of the files that judge writes")
    args = parser.parse_args()
    check(args, n=2)
    {"train": train, "judge": judge}[args.what](args)


if __name__ == "__main__":
    main_program(main)
