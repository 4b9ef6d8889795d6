"""The papers' tables in small: train the rows of a table, judge them, and print the paper's row beside ours.

    python benchmarks/paper_tables.py table2                 shift of the schedule: 128 px, noise_d 128, 64, 32, 16
    python benchmarks/paper_tables.py table3                 where dropout begins, on few scenes: 72 (GPU: 2,000)
    python benchmarks/paper_tables.py table4                 blocks at the lowest resolution
    python benchmarks/paper_tables.py table5                 none, dwt_1, dwt_2, conv_2, conv_4 at 128 and 256 px
    python benchmarks/paper_tables.py table6                 multiscale loss at 64, 128, 256 px
    python benchmarks/paper_tables.py table9 | mdm | cdm | best        by the other scripts here (OTHERS)
                                             -> results/paper_TABLE.json, figures/paper_TABLE.png

Equal time, as in equal_time.py: we measure the pace of train.py first, then each row gets the steps that fit into
--minutes. Rows with equal networks share a pace, so they get equal steps. Where paces differ, each row also stores a
checkpoint at the steps of the slowest row, so that rows are compared at equal steps as well. Call again to go on:
finished and half-finished work is reused, and tables share runs with equal steps and equal checkpoints. Make one call
at a time for a folder. If rows, minutes, samples or budget are not the default ones, the name of the result's file says
so.

Rows are judged without guidance, like the papers' tables, and with GUIDANCE, at which these small models can be read.
--budget gpu-30min has the papers' kind of model at a quarter of its width. We have not run it, for lack of a GPU.
"""
import argparse
import dataclasses
import math
import os
import re
import shutil

from common import ROOT, check, save, seconds_a_step, started  # first: it puts the project on the path

import numpy as np
import torch

import evaluate
from config import PRESETS
from plumbing.settings import Parser, override
from plumbing import UserError
from plumbing.files import read_json, writable_folder, write_json
from dwt import patch_factor
from equal_time import FIRST, KEEP
from plumbing.features import Yardstick
from plumbing.measuring import trained_run
from plumbing.sources import open_run
from plumbing.runs import (choose_device, choose_precision, cores, has_checkpoint, kept_checkpoints, main_program,
                           read_checkpoint)
from plumbing.pictures import grid, pyplot

GUIDANCE = 5.0
COSTLESS = ("noise_d", "multiscale", "dropout_from_resolution", "scenes")  # fields that do not change the pace

# A budget: the settings of its models; low: the side of the lowest map; widths by the side of the map, lowest last, the
# same for every patching (nearly as in B.1); few: a number of scenes that a run can memorise; minutes of a run by the
# side of its images.
_papers = dict(precondition="none", loss="v_mse")                         # what the small presets do beyond the papers
_gpu = dict(data="glyphs", flip=False, base_channels=64, emb_channels=512, batch=128, lr=3e-4, warmup=500, ema=0.999,
            sampler="ddim", sample_steps=24)
BUDGETS = {
    "cpu-small": dict(
        uvit=dict(_papers, preset="glyphs64"), unet=dict(_papers, preset="glyphs64_unet"), low=8, blocks=1,
        widths=(1, 1, 1, 2, 3, 6),
        patching={64: "dwt_1", 128: "dwt_2", 256: "dwt_2"}, multiscale=16, low_blocks=(1, 2, 4, 6), unet_size=64,
        few=72, dropout=(32, 16, 8, 0), minutes={64: 8, 128: 12, 256: 20}),
    # Half an hour for table 2's four rows. Drawing a scene takes a core 5 ms at 128 px, 15 at 256: watch images/s
    "gpu-30min": dict(
        uvit=dict(_gpu, preset="imagenet128_uvit", num_transformer_blocks=8, position_std=1.0, transformer_dropout=0.0),
        unet=dict(_gpu, preset="imagenet128_unet"), low=16, blocks=2, widths=(1, 1, 2, 4, 8),
        patching={64: "none", 128: "none", 256: "dwt_1"}, multiscale=32, low_blocks=(2, 4, 8, 12), unet_size=128,
        few=2000, dropout=(128, 64, 32, 16, 0), minutes={64: 5, 128: 7.5, 256: 10})}


def sized(budget, size, model="uvit", patching=None):
    """Return the settings of this budget's model for images of this size."""
    kind = BUDGETS[budget]
    patching = patching or kind["patching"][size]
    levels = int(math.log2(size // patch_factor(patching) // kind["low"])) + 1
    return dict(kind[model], size=size, patching=patching, channel_mult=kind["widths"][-levels:],
                num_res_blocks=(kind["blocks"],) * (levels - (model == "uvit")))


# ------------------------------------------------------------------------------------------ the tables

# Each: (claim, fields in which its rows differ, {row: (settings, the paper's row)}). The paper's numbers are FIDs of
# ImageNet, train / held-out. Only their order can be compared with ours.

def table2(budget):
    paper = {128: "2.96 / 3.38", 64: "2.41 / 3.03", 32: "2.26 / 2.88"}
    return ("shifting the schedule helps: at 128 px the plain cosine (128) is worst, 32 best", ["noise_d"],
            {f"noise_d {d}": (dict(sized(budget, 128), noise_d=d), paper.get(d, "")) for d in (128, 64, 32, 16)})


def table3(budget):
    base = dict(sized(budget, BUDGETS[budget]["unet_size"], "unet"), scenes=BUDGETS[budget]["few"], dropout=0.1)
    paper = {128: "3.19 / 3.85", 64: "2.27 / 2.85", 32: "2.31 / 2.87", 16: "2.41 / 3.03", 0: "3.74 / 3.91"}
    return ("dropout at the low resolutions alone beats dropout everywhere, and none", ["dropout_from_resolution"],
            {f"dropout from {side}" if side else "no dropout": (dict(base, dropout_from_resolution=side),
             f"{side}: {paper[side]}" if side in paper else "") for side in BUDGETS[budget]["dropout"]})


def table4(budget):
    base, paper = sized(budget, BUDGETS[budget]["unet_size"], "unet"), (
        "2+3: 3.42 / 3.59, 114 %", "4+5: 2.98 / 3.29, 100 %", "8+9: 2.46 / 3.00, 76 %", "12+13: 2.41 / 3.03, 62 %")
    return ("more blocks at the low resolution are better, at little cost", ["num_res_blocks"],
            {f"{k}+{k + 1} blocks": (dict(base, num_res_blocks=base["num_res_blocks"][:-1] + (k,)), row)
             for k, row in zip(BUDGETS[budget]["low_blocks"], paper)})


def table5(budget):
    paper = dict(none="5.60 / 5.23, 100 %", dwt_1="5.42 / 4.97, 139 %", dwt_2="4.85 / 4.58, 146 %",
                 conv_2="5.99 / 5.33, 137 %", conv_4="5.04 / 4.80, 146 %")
    return ("patching is faster; two levels beat one and none, wavelets beat convolutions",
            ["size", "patching", "channel_mult", "num_res_blocks"],
            {f"{size} px, {patching}": (sized(budget, size, patching=patching), "512: " + row)
             for size in (128, 256) for patching, row in paper.items()})


def table6(budget):
    paper = {(256, 0): "3.76", (256, BUDGETS[budget]["multiscale"]): "4.00"}
    return ("the multiscale loss hurts a little at 256 px, helps at 512 (4.85 to 4.30) and more at 1024 (8.10 to 6.06)",
            ["size", "patching", "channel_mult", "num_res_blocks", "multiscale"],
            {f"{size} px, {'multiscale' if base else 'plain loss'}": (
                dict(sized(budget, size), multiscale=base), paper.get((size, base), ""))
             for size in (64, 128, 256) for base in (0, BUDGETS[budget]["multiscale"])})


TABLES = dict(table2=table2, table3=table3, table4=table4, table5=table5, table6=table6)

_equal = ["benchmarks/equal_time.py", "train", "{folder}/equal", "--minutes", "{minutes}"]
_judged = ["benchmarks/equal_time.py", "judge", "{folder}/equal", "--minutes", "{minutes}", "--n", "{n}", "--s", "0",
           "--name", "{name}"]
_four = ["--only", "glyphs64,glyphs64_unet,nested,cascade"]
MINUTES = dict(mdm=20, cdm=20, best=60, table9=20)                        # table9 fixes its own
# table: the commands that make it. (evaluate.py takes a run's last checkpoint; `others` checks its minutes.)
OTHERS = {
    "table9": [["benchmarks/text_guidance.py", "train", "{folder}/text"],
               ["benchmarks/text_guidance.py", "judge", "{folder}/text", "--n", "{n}", "--name", "{name}"]],
    "mdm": [_equal, _judged],
    "cdm": [[*_equal, "--only", "cascade"],
            ["evaluate.py", "{folder}/equal/glyphs16", "{folder}/equal/cascade", "--handoff", "renoised", "--n", "{n}",
             "--sweep", "s=0,0.1,0.2,0.3,0.4,0.5,0.7,0.9"]],
    "best": [[*_equal, *_four], [*_judged, *_four, "--at", "{at}"]]}


# ------------------------------------------------------------------------------------------ training

def flags(settings):
    """Yield settings as flags of train.py."""
    for name, value in settings.items():
        yield f"--{'no-' * (value is False)}{name.replace('_', '-')}"
        if not isinstance(value, bool):
            yield ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def name_of(budget, settings, *more):
    """Name a run by what differs from its preset and `sized`, as cpu-small-uvit-128px-noise_d64: tables share runs."""
    model = "unet" if settings["preset"] == BUDGETS[budget]["unet"]["preset"] else "uvit"
    usual = {**vars(PRESETS[settings["preset"]]), **sized(budget, settings["size"], model, settings["patching"])}
    patching = settings["patching"] * (settings["patching"] != BUDGETS[budget]["patching"][settings["size"]])
    other = [key + re.sub(r"\W+", "_", str(value)).strip("_") for key, value in settings.items()
             if value != usual.get(key, value)]
    return "-".join(filter(None, [budget, model, f"{settings['size']}px", patching, *other, *more]))


def remembered(args, key, compute):
    """Compute a fact about this machine once and store it in the folder: paces must not change between two calls."""
    path = os.path.join(args.folder, "machine.json")
    if key not in read_json(path):
        value = compute()
        write_json(path, {**read_json(path), key: value})
    return read_json(path)[key]


def pace_of(args, settings):
    """Return the pace of train.py, with loading and EMA, measured once for all rows with equal networks."""
    settings = {key: value for key, value in settings.items() if key not in COSTLESS}
    name = name_of(args.budget, settings, "pace")

    def measured():
        out = os.path.join(args.folder, "paces", name)
        shutil.rmtree(out, ignore_errors=True)
        started("train.py", *flags(settings), "--steps", 100, "--sample-every", 0, "--sample-steps", 1, "--precision",
                args.precision, "--compile", "off", "--device", args.device, "--out", out)
        batch = settings.get("batch", PRESETS[settings["preset"]].batch)
        return seconds_a_step(out, batch, skip=2)                         # skip the warm-up, the first 40 steps
    return remembered(args, name, measured)


def train(args, rows):
    """Train all rows -> ({row: [(seed, folder), ...]}, {row: seconds a step})."""
    paces = {row: pace_of(args, settings) for row, settings in rows.items()}
    minutes = {row: args.minutes or BUDGETS[args.budget]["minutes"][rows[row]["size"]] for row in rows}
    steps = {row: max(1, round(60 * minutes[row] / pace)) for row, pace in paces.items()}
    trained = {row: [] for row in rows}
    for seed in range(args.seeds):
        for row, settings in rows.items():
            equal = min(steps[other] for other in rows if rows[other]["size"] == settings["size"])
            early = f"each{equal}" * (equal < steps[row])
            name = name_of(args.budget, settings, f"{steps[row]}steps", early, f"seed{seed}")
            folder = os.path.join(args.folder, name)
            if not has_checkpoint(folder) or read_checkpoint(folder)["step"] < steps[row]:
                print(f"{row}, seed {seed}: {steps[row]:,} steps at {paces[row]:.3f} s", flush=True)
                started("train.py", *flags(settings), "--steps", steps[row], "--seed", seed, "--keep-every", equal,
                        "--save-every", 200, "--sample-every", 0, "--precision", args.precision, "--compile", "off",
                        "--device", args.device, "--out", folder, "--auto-resume")
            trained[row].append((seed, folder))
    return trained, paces


# ------------------------------------------------------------------------------------------ judging

def losses(run, yardstick):
    """Measure the squared error of v, uniform in log-SNR, on training images and on unseen ones, with the same noise.

    The gap shows how far the model has memorised its training images.
    """
    found = {}
    for key, source in (("seen", open_run(run.config)), ("unseen", yardstick.held_out_source)):
        bound = evaluate.likelihood(run, yardstick, min(192, run.config.scenes), 0, source)
        error = bound["v_mse"].mean(1)                                    # (n,)
        found[key] = dict(v_mse=error.mean().item(), v_mse_pm=1.96 * error.std().item() / math.sqrt(len(error)))
    return found


def judge(args, rows, trained, paces):
    """Judge all runs -> ([measures of a row, a seed, a checkpoint], {row: guided samples})."""
    device, _ = choose_device(args.device)
    results, sheets = [], {}
    for row in rows:
        for seed, folder in trained[row]:
            last = read_checkpoint(folder)
            config = last["config"]
            # Few scenes give no covariance, so the distance is to the usual number of scenes.
            usual = override(config, scenes=PRESETS[rows[row]["preset"]].scenes)
            yardstick = Yardstick(args.folder, usual, args.n, device=device)
            early = [kept for kept in kept_checkpoints(folder)[:1] if config.keep_every < config.steps]
            for at, state in [("steps", read_checkpoint(folder, kept)) for kept in early] + [("time", last)]:
                run, found = trained_run(folder, state, config, device), {}
                for key, guidance in (("unguided", 1.0), ("guided", GUIDANCE)):
                    setting = dataclasses.replace(run, config=override(config, guidance=guidance))
                    found[key], samples = evaluate.measure(setting, yardstick, ("fd", "is", "read"))
                if config.scenes < usual.scenes:
                    found.update(losses(run, yardstick))
                if seed == 0 and at == "time":
                    sheets[row] = samples["images"]
                # Without an early checkpoint the last one serves for equal steps as well.
                for equal in [at] if early else ["steps", "time"]:
                    results.append(dict(row=row, seed=seed, equal=equal, steps=state["step"], images=state["images"],
                                        minutes=state["step"] * paces[row] / 60, steps_a_second=1 / paces[row],
                                        steps_a_second_trained=1 / seconds_a_step(folder, config.batch),
                                        parameters=sum(p.numel() for p in run.model.parameters()), **found))
                print(f"{row}, seed {seed}, step {state['step']:,}: FD {found['unguided']['fd_held_out']:.2f}, guided "
                      f"{found['guided']['fd_held_out']:.2f}", flush=True)
    return results, sheets


def over_seeds(results, row, equal, key, figure):
    """Return (mean, bar). With one seed the bar is half the samples' 95 % interval, with more half the seeds' range."""
    chosen = [result[key] for result in results if (result["row"], result["equal"]) == (row, equal)]
    values = [each.get(figure, math.nan) for each in chosen]
    bar = (max(values) - min(values)) / 2 if len(values) > 1 else chosen[0].get(figure + "_pm", math.nan)
    return sum(values) / len(values), bar


COLUMNS = (("FD train", "unguided", "fd_train", 1), ("FD held-out", "unguided", "fd_held_out", 1),
           ("read, %", "unguided", "read_rate", 100), ("guided: FD held-out", "guided", "fd_held_out", 1),
           ("guided: read, %", "guided", "read_rate", 100))
OF_LOSS = (("loss seen, x 1000", "seen", "v_mse", 1000), ("loss unseen, x 1000", "unseen", "v_mse", 1000))


def kinds(results):
    """Return the comparisons: equal time, and equal steps where that differs."""
    rows = {result["row"] for result in results}
    return ["time", "steps"] if len({(result["row"], result["steps"]) for result in results}) > len(rows) else ["time"]


def show(table, claim, paper, results, args):
    """Print the paper's row beside ours."""
    print(f"\n{table}: {claim}\npaper: FID of ImageNet; ours: distance by glyph features, {args.n} samples, ± "
          + ("half the range of the seeds" if args.seeds > 1 else "95 % of the samples, one seed of training"))
    columns = COLUMNS[1:] + OF_LOSS if "seen" in results[0] else COLUMNS
    for equal in kinds(results):
        print(f"\nequal {equal:22s}{'the paper':>24s}{'steps/s':>9s}{'steps':>8s}"
              + "".join(f"{head:>22s}" for head, *_ in columns))
        for row in paper:
            result = next(each for each in results if (each["row"], each["equal"]) == (row, equal))
            cells = [over_seeds(results, row, equal, *column[1:3]) for column in columns]
            print(f"{row:28s}{paper[row]:>24s}{result['steps_a_second']:9.2f}{result['steps']:8,}" + "".join(
                f"{scale * value:15.2f} ± {scale * bar:4.2f}" for (value, bar), (*_, scale) in zip(cells, columns)))


def draw(path, rows, results, sheets, many=9):
    """Draw a line for each row: guided samples of the same letters and seeds, the distance, the read rate."""
    plt = pyplot()
    figure = plt.figure(figsize=(14, 0.9 * len(rows) + 1), layout="constrained")
    cells = figure.add_gridspec(len(rows), 3, width_ratios=(8.5, 2.8, 2.8))
    for i, row in enumerate(rows):
        axis = figure.add_subplot(cells[i, 0], xticks=[], yticks=[])
        at = torch.arange(many) * 37 % len(sheets[row])                   # the labels cycle: this takes A, B, C, ...
        axis.imshow(np.asarray(grid(sheets[row][at].permute(0, 3, 1, 2) / 127.5 - 1, many)))
        axis.set_ylabel(row.replace(", ", "\n"), rotation=0, ha="right", va="center")
        if i == 0:
            equal = ", equal time" if len(kinds(results)) > 1 else ""
            axis.set_title(f"samples with guidance {GUIDANCE:g}{equal}", fontsize=9)
    for column, (what, label, scale) in enumerate((("fd_held_out", "Fréchet distance to held-out scenes", 1),
                                                   ("read_rate", "read rate, %", 100)), 1):
        axis = figure.add_subplot(cells[:, column], ylim=(len(rows) - 0.5, -0.5), yticks=[], xlabel=label)
        for key, name, color, below in (("unguided", "no guidance", "C0", -0.1),
                                        ("guided", f"guidance {GUIDANCE:g}", "C1", 0.1)):
            for equal in kinds(results):
                points = [over_seeds(results, row, equal, key, what) for row in rows]
                axis.errorbar([scale * value for value, _ in points], np.arange(len(rows)) + below, capsize=3,
                              xerr=[scale * bar for _, bar in points], fmt="o", color=color, markersize=5,
                              mfc=color if equal == "time" else "white",
                              zorder=3 if equal == "time" else 2,         # equal time hides an equal point of steps
                              label=name + (f", equal {equal}" if len(kinds(results)) > 1 else ""))
        axis.grid(alpha=0.3, axis="x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def file_name(args):
    """Name the result paper_TABLE and what is not the default, so that one result does not replace another."""
    name = f"paper_{args.table}"
    for said, usual, form in ((args.budget, "cpu-small", "-{}"), (args.only, "", "-{}"),
                              (args.minutes, None, "-{:g}min"), (args.n, 360, "-n{}")):
        name += re.sub(r"[^\w-]+", "_", form.format(said)) if said != usual else ""
    return name


# ------------------------------------------------------------------------------------------ the program

def others(args):
    """Run the other scripts that make a table, as a user would, with names of its own for the results."""
    name, minutes = file_name(args), args.minutes or MINUTES[args.table]
    at = ",".join(f"{each:g}" for each in sorted({10, 30, minutes}) if each <= minutes)
    folder = os.path.relpath(args.folder, ROOT)                           # the results store the command with it
    said = dict(folder=folder, minutes=f"{minutes:g}", n=args.n, name=name, at=at)
    if args.table == "cdm":
        cascade = os.path.join(args.folder, "equal", "cascade")
        if has_checkpoint(cascade):
            state = read_checkpoint(cascade)
            there = FIRST + KEEP * math.ceil(state["step"] / state["config"].keep_every)
            if there > minutes:
                raise UserError(f"{cascade} has been trained for {there:g} minutes, not {minutes:g}: --minutes "
                                f"{there:g}, or another --folder")
    for command in OTHERS[args.table]:
        started(*(part.format(**said) for part in command))
    if args.table == "cdm":
        for kind, folder in ((".json", "benchmarks/results"), (".png", "figures")):
            shutil.copy(os.path.join(args.folder, "equal", "cascade", "sweep_s_renoised" + kind),
                        os.path.join(ROOT, folder, name + kind))


def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help=", ".join([*TABLES, *OTHERS]))
    parser.add_argument("--budget", default="cpu-small", choices=BUDGETS)
    parser.add_argument("--minutes", type=float, help="of each run; default: BUDGETS and MINUTES")
    parser.add_argument("--seeds", type=int, default=1, help="of training: 0, 1, ...")
    parser.add_argument("--only", default="", help="only rows whose names contain one of these: '64 px; 128 px'")
    parser.add_argument("--n", type=int, default=360, help="samples")
    parser.add_argument("--folder", default="runs/tables")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.table not in {**TABLES, **OTHERS}:
        raise UserError(f"{args.table}: want one of {', '.join([*TABLES, *OTHERS])}")
    check(args, seeds=1, n=2, minutes=0.01)
    if args.table in OTHERS and (
            args.budget != "cpu-small" or args.seeds > 1 or args.only or args.device != "auto"):
        raise UserError(f"{args.table}: takes no --budget, --seeds, --only, --device; its scripts fix them")
    if args.minutes and args.table == "table9":
        raise UserError(f"--minutes {args.minutes:g}: table9 has fixed minutes")
    if args.minutes and args.table in OTHERS and (args.minutes % KEEP or args.minutes < FIRST + KEEP):
        raise UserError(f"--minutes {args.minutes:g}: want a multiple of {KEEP}, {FIRST + KEEP} or more")
    args.folder = os.path.abspath(args.folder)
    return args


def main():
    args = parse()
    device, _ = choose_device(args.device)
    writable_folder(args.folder, "--folder")
    if args.table in OTHERS:
        return others(args)
    claim, _, table = TABLES[args.table](args.budget)
    only = [part.strip() for part in args.only.split(";") if part.strip()] or [""]              # "" takes all
    rows = {row: settings for row, (settings, _) in table.items() if any(part in row for part in only)}
    if not rows:
        raise UserError(f"--only {args.only}: want part of one of these names: {'; '.join(table)}")
    if (kind := remembered(args, "device", lambda: device.type)) != device.type:
        raise UserError(f"--folder {args.folder}: its paces were measured on {kind}, not on {device.type}")
    args.precision = remembered(args, "precision", lambda: choose_precision("auto", device))
    args.cores = remembered(args, "cores", cores)
    trained, paces = train(args, rows)
    results, sheets = judge(args, rows, trained, paces)
    paper = {row: table[row][1] for row in rows}
    show(args.table, claim, paper, results, args)
    name = file_name(args)
    save(name + ".json", device, f"{args.cores} a run", precision=args.precision, budget=args.budget,
         minutes=args.minutes or BUDGETS[args.budget]["minutes"], seeds=args.seeds, seed_of_samples=0, n=args.n,
         claim=claim, paper=paper, settings=rows, rows=results)
    draw(os.path.join(ROOT, "figures", name + ".png"), rows, results, sheets)


if __name__ == "__main__":
    main_program(main)
