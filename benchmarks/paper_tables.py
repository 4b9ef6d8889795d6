"""The papers' tables in small: one command trains the rows of a table, judges them, and prints the paper's beside ours.

    python benchmarks/paper_tables.py table2                 shift of the schedule: 128 px, noise_d 128, 64, 32, 16
    python benchmarks/paper_tables.py table3                 where dropout begins, on few scenes: 72 (GPU: 2,000)
    python benchmarks/paper_tables.py table4                 blocks at the lowest resolution
    python benchmarks/paper_tables.py table5                 none, dwt_1, dwt_2, conv_2, conv_4 at 128 and 256 px
    python benchmarks/paper_tables.py table6                 multiscale loss at 64, 128, 256 px
    python benchmarks/paper_tables.py table9 | mdm | cdm | best        by the scripts that are here for these (OTHERS)
                                             -> results/paper_TABLE.json, figures/paper_TABLE.png

Equal time, as in equal_time.py: the pace of train.py is measured first, then each row gets the steps that fit into
--minutes; rows whose networks are alike share a pace, so they get equal steps. Where paces differ a checkpoint is kept
at the steps of the slowest, so that rows are compared at equal steps, too. Call again to go on: what is trained, drawn,
or half done is not begun anew, and tables share runs of equal steps with equal checkpoints. One call at a time for a
folder. Results of other than the usual rows, minutes, samples or budget have that in their file's name.

Judged without guidance, as the papers' tables are, and with GUIDANCE, at which these small models can be read.
--budget gpu-30min has the papers' kind of model at a quarter of its width. It was never run: no GPU was at hand.
"""
import argparse
import dataclasses
import json
import math
import os
import re
import shutil

from common import ROOT, check, save, seconds_a_step, started  # before ours: it puts the project on the path

import numpy as np
import torch

import evaluate
from config import PRESETS
from plumbing.settings import Parser, override
from plumbing import UserError
from data import open_run
from dwt import patch_factor
from equal_time import FIRST, KEEP
from plumbing.features import Yardstick
from plumbing.measuring import trained_run
from plumbing.runs import (choose_device, choose_precision, cores, has_checkpoint, kept_checkpoints, main_program,
                           read_checkpoint)
from plumbing.pictures import grid

GUIDANCE = 5.0
COSTLESS = ("noise_d", "multiscale", "dropout_from_resolution", "scenes")  # fields that leave the pace as it is

# A budget: the settings of all its models; the side at which they end; widths by the side of the map, the same whatever
# the patching (as nearly in B.1), lowest last; few: so many scenes a run can get by heart; minutes of a run by the side
# of its images.
_gpu = dict(data="glyphs", flip=False, base_channels=64, emb_channels=512, batch=128, lr=3e-4, warmup=500, ema=0.999,
            sampler="ddim", sample_steps=24)
BUDGETS = {
    "cpu-small": dict(
        uvit=dict(preset="glyphs64"), unet=dict(preset="glyphs64_unet"), low=8, blocks=1, widths=(1, 1, 1, 2, 3, 6),
        patching={64: "dwt_1", 128: "dwt_2", 256: "dwt_2"}, multiscale=16, low_blocks=(1, 2, 4, 6), unet_size=64,
        few=72, dropout=(32, 16, 8, 0), minutes={64: 8, 128: 12, 256: 20}),
    # Half an hour for table 2's four rows. Drawing a scene takes a core 5 ms at 128 px, 15 at 256: look at images/s
    "gpu-30min": dict(
        uvit=dict(_gpu, preset="imagenet128_uvit", num_transformer_blocks=8, position_std=1.0, transformer_dropout=0.0),
        unet=dict(_gpu, preset="imagenet128_unet"), low=16, blocks=2, widths=(1, 1, 2, 4, 8),
        patching={64: "none", 128: "none", 256: "dwt_1"}, multiscale=32, low_blocks=(2, 4, 8, 12), unet_size=128,
        few=2000, dropout=(128, 64, 32, 16, 0), minutes={64: 5, 128: 7.5, 256: 10})}


def sized(budget, size, model="uvit", patching=None):
    """The settings of this budget's model for images of this size."""
    kind = BUDGETS[budget]
    patching = patching or kind["patching"][size]
    levels = int(math.log2(size // patch_factor(patching) // kind["low"])) + 1
    return dict(kind[model], size=size, patching=patching, channel_mult=kind["widths"][-levels:],
                num_res_blocks=(kind["blocks"],) * (levels - (model == "uvit")))


# ------------------------------------------------------------------------------------------ the tables

# Each: (claim, fields that its rows differ in, {row: (settings, the paper's row)}). The paper's are FIDs of ImageNet,
# train / held-out; they can be compared with ours by their order alone.

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
MINUTES = dict(mdm=20, cdm=20, best=60, table9=20)                        # table9's cannot be chosen
# table: the commands that make it. (evaluate.py takes a run's last checkpoint: `others` looks of how many minutes.)
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
    """Settings as train.py's flags."""
    for name, value in settings.items():
        yield f"--{'no-' * (value is False)}{name.replace('_', '-')}"
        if not isinstance(value, bool):
            yield ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def name_of(budget, settings, *more):
    """cpu-small-128px-noise_d64-...: what is not as the preset and `sized` have it. So tables share runs."""
    model = "unet" if settings["preset"] == BUDGETS[budget]["unet"]["preset"] else "uvit"
    usual = {**vars(PRESETS[settings["preset"]]), **sized(budget, settings["size"], model, settings["patching"])}
    patching = settings["patching"] * (settings["patching"] != BUDGETS[budget]["patching"][settings["size"]])
    other = [key + re.sub(r"\W+", "_", str(value)).strip("_") for key, value in settings.items()
             if value != usual.get(key, value)]
    return "-".join(filter(None, [budget, model, f"{settings['size']}px", patching, *other, *more]))


def remembered(args, key, compute):
    """A fact about this machine, from the folder if it is there: its paces must not change between two calls."""
    path = os.path.join(args.folder, "machine.json")

    def read():
        return json.load(open(path)) if os.path.exists(path) else {}
    if key not in read():
        value = compute()
        with open(path + ".new", "w") as file:
            json.dump({**read(), key: value}, file, indent=1)
        os.replace(path + ".new", path)
    return read()[key]


def pace_of(args, settings):
    """The pace of train.py, loading and averaging included; measured once for all rows with networks that are alike."""
    settings = {key: value for key, value in settings.items() if key not in COSTLESS}
    name = name_of(args.budget, settings, "pace")

    def measured():
        out = os.path.join(args.folder, "paces", name)
        shutil.rmtree(out, ignore_errors=True)
        started("train.py", *flags(settings), "--steps", 100, "--sample-every", 0, "--sample-steps", 1, "--precision",
                args.precision, "--device", args.device, "--out", out)
        batch = settings.get("batch", PRESETS[settings["preset"]].batch)
        return seconds_a_step(out, batch, skip=2)                         # less the warm-up: the first 40 steps
    return remembered(args, name, measured)


def train(args, rows):
    """({row: [(seed, folder), ...]}, all trained; {row: seconds a step})."""
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
                        "--save-every", 200, "--sample-every", 0, "--precision", args.precision, "--device",
                        args.device, "--out", folder, "--auto-resume")
            trained[row].append((seed, folder))
    return trained, paces


# ------------------------------------------------------------------------------------------ judging

def losses(run, yardstick):
    """The squared error of v, uniform in log-SNR, of images that training saw and of others, with the same noise: apart
    as far as the model has them by heart."""
    found = {}
    for key, source in (("seen", open_run(run.config)), ("unseen", yardstick.held_out_source)):
        bound = evaluate.likelihood(run, yardstick, min(192, run.config.scenes), 0, source)
        error = bound["v_mse"].mean(1)                                    # (n,)
        found[key] = dict(v_mse=error.mean().item(), v_mse_pm=1.96 * error.std().item() / math.sqrt(len(error)))
    return found


def judge(args, rows, trained, paces):
    """([figures of a row, a seed, a checkpoint], {row: guided samples})."""
    device, _ = choose_device(args.device)
    results, sheets = [], {}
    for row in rows:
        for seed, folder in trained[row]:
            last = read_checkpoint(folder)
            config = last["config"]
            # Of few scenes no covariance can be taken: the distance is to those of the usual number.
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
                # Where no checkpoint was kept early, the row's last is both.
                for equal in [at] if early else ["steps", "time"]:
                    results.append(dict(row=row, seed=seed, equal=equal, steps=state["step"], images=state["images"],
                                        minutes=state["step"] * paces[row] / 60, steps_a_second=1 / paces[row],
                                        steps_a_second_trained=1 / seconds_a_step(folder, config.batch),
                                        parameters=sum(p.numel() for p in run.model.parameters()), **found))
                print(f"{row}, seed {seed}, step {state['step']:,}: FD {found['unguided']['fd_held_out']:.2f}, guided "
                      f"{found['guided']['fd_held_out']:.2f}", flush=True)
    return results, sheets


def over_seeds(results, row, equal, key, figure):
    """(mean, half of an interval): with one seed the samples' 95 %, with more half the range of the seeds."""
    chosen = [result[key] for result in results if (result["row"], result["equal"]) == (row, equal)]
    values = [each.get(figure, math.nan) for each in chosen]
    bar = (max(values) - min(values)) / 2 if len(values) > 1 else chosen[0].get(figure + "_pm", math.nan)
    return sum(values) / len(values), bar


COLUMNS = (("FD train", "unguided", "fd_train", 1), ("FD held-out", "unguided", "fd_held_out", 1),
           ("read, %", "unguided", "read_rate", 100), ("guided: FD held-out", "guided", "fd_held_out", 1),
           ("guided: read, %", "guided", "read_rate", 100))
OF_LOSS = (("loss seen, x 1000", "seen", "v_mse", 1000), ("loss unseen, x 1000", "unseen", "v_mse", 1000))


def kinds(results):
    """Equal time; and equal steps where that is something else."""
    rows = {result["row"] for result in results}
    return ["time", "steps"] if len({(result["row"], result["steps"]) for result in results}) > len(rows) else ["time"]


def show(table, claim, paper, results, args):
    """The paper's row beside ours."""
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
    """A line for each row: guided samples of the same letters and seeds, the distance, the read rate."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(14, 0.9 * len(rows) + 1), layout="constrained")
    cells = figure.add_gridspec(len(rows), 3, width_ratios=(8.5, 2.8, 2.8))
    for i, row in enumerate(rows):
        axis = figure.add_subplot(cells[i, 0], xticks=[], yticks=[])
        at = torch.arange(many) * 37 % len(sheets[row])                   # labels come in turn: A, B, C, ...
        axis.imshow(np.asarray(grid(sheets[row][at].permute(0, 3, 1, 2) / 127.5 - 1, many)))
        axis.set_ylabel(row.replace(", ", "\n"), rotation=0, ha="right", va="center")
        if i == 0:
            equal = ", equal time" * (len(kinds(results)) > 1)
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
                              zorder=3 if equal == "time" else 2,         # where both are one, it is seen as time
                              label=name + f", equal {equal}" * (len(kinds(results)) > 1))
        axis.grid(alpha=0.3, axis="x")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def file_name(args):
    """paper_TABLE, and what is not as usual: one table's results must not take another's place."""
    name = f"paper_{args.table}"
    for said, usual, form in ((args.budget, "cpu-small", "-{}"), (args.only, "", "-{}"),
                              (args.minutes, None, "-{:g}min"), (args.n, 360, "-n{}")):
        name += re.sub(r"[^\w-]+", "_", form.format(said)) if said != usual else ""
    return name


# ------------------------------------------------------------------------------------------ the program

def others(args):
    """The tables that other scripts make, started as a user would; with their own names for what they leave."""
    name, minutes = file_name(args), args.minutes or MINUTES[args.table]
    at = ",".join(f"{each:g}" for each in sorted({10, 30, minutes}) if each <= minutes)
    folder = os.path.relpath(args.folder, ROOT)                           # as one types it: the results name it
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
    parser.add_argument("--minutes", type=float, help="of each run; usual are those of BUDGETS and MINUTES")
    parser.add_argument("--seeds", type=int, default=1, help="of training: 0, 1, ...")
    parser.add_argument("--only", default="", help="rows whose names hold this or that: '64 px; 128 px'")
    parser.add_argument("--n", type=int, default=360, help="samples")
    parser.add_argument("--folder", default="runs/tables")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.table not in {**TABLES, **OTHERS}:
        raise UserError(f"{args.table}: want one of {', '.join([*TABLES, *OTHERS])}")
    check(args, seeds=1, n=2, minutes=0.01)
    if args.table in OTHERS and (
            args.budget != "cpu-small" or args.seeds > 1 or args.only or args.device != "auto"):
        raise UserError(f"{args.table}: takes no --budget, --seeds, --only, --device; its scripts choose")
    if args.minutes and args.table == "table9":
        raise UserError(f"--minutes {args.minutes:g}: those of table9 are fixed")
    if args.minutes and args.table in OTHERS and (args.minutes % KEEP or args.minutes < FIRST + KEEP):
        raise UserError(f"--minutes {args.minutes:g}: want a multiple of {KEEP}, {FIRST + KEEP} or more")
    args.folder = os.path.abspath(args.folder)
    return args


def main():
    args = parse()
    device, _ = choose_device(args.device)
    try:
        os.makedirs(args.folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder {args.folder}: {error.strerror}") from None
    if args.table in OTHERS:
        return others(args)
    claim, _, table = TABLES[args.table](args.budget)
    only = [part.strip() for part in args.only.split(";") if part.strip()] or [""]              # "": all
    rows = {row: settings for row, (settings, _) in table.items() if any(part in row for part in only)}
    if not rows:
        raise UserError(f"--only {args.only}: want a part of one of these names: {'; '.join(table)}")
    if (kind := remembered(args, "device", lambda: device.type)) != device.type:
        raise UserError(f"--folder {args.folder}: its paces are those of a {kind}, not of a {device.type}")
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
