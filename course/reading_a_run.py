"""Train two small models that differ in one thing, and draw the plots of reading_a_run.md. For lecturers.

    python -m course.reading_a_run runs/reading          train, measure, draw: about twelve minutes on one core
    python -m course.reading_a_run runs/reading --draw   draw the figure again from course/reading_a_run.json

Both runs have the same network, settings and seed, at 16 px without classes. "last week" trains on a flat folder of
2,400 drawn scenes, "today" on 12 of them. Distances are to 3,000 scenes that neither run has seen, in the features of
plumbing/features.py. The folder keeps finished work: call again to go on.
"""
import argparse
import csv
import dataclasses
import json
import os
import platform
import subprocess
import sys

import torch
from PIL import Image

from config import PRESETS, make_schedule
from data import Glyphs
from plumbing.drawing import draw_samples
from plumbing.features import Yardstick, describe, moments_of
from plumbing.files import whole_file
from plumbing.measuring import trained_run
from plumbing.pictures import pyplot
from measures import Moments, bootstrap, frechet_distance, variational_bound
from plumbing.runs import kept_checkpoints, made_by, read_checkpoint
from plumbing.sources import open_source

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RUNS = {"last_week": 2400, "today": 12}                                   # images in the folder
STEPS, KEEP, SAMPLES, REAL, ASKED = 1500, 250, 360, 3000, 96
SETTINGS = ("--preset glyphs16 --base-channels 32 --channel-mult 1,3 --num-transformer-blocks 2 --emb-channels 128 "
            "--batch 16 --lr 1e-3 --lr-decay 0 --warmup 100 --loss v_mse --precondition none "
            f"--ema 0.99 --steps {STEPS} --keep-every {KEEP} --save-every {KEEP} --sample-every 0 --log-every 10 "
            "--sample-steps 12 --guidance 1 --precision float32 --workers 0 --device cpu")
RESULT = os.path.join(HERE, "course", "reading_a_run.json")
PICTURE = os.path.join(HERE, "course", "reading_a_run.png")


def prepare(folder, name):
    """Draw the images and train, if not done -> (folder of images, folder of the run). A flat folder has no classes."""
    scenes, data, out = Glyphs(size=(16, 16)), os.path.join(folder, f"images_{name}"), os.path.join(folder, name)
    os.makedirs(data, exist_ok=True)
    for i in range(RUNS[name]):
        path = os.path.join(data, f"{i:04d}.png")
        if not os.path.exists(path):
            Image.fromarray(scenes.draw(i)).save(path)
    if not os.path.exists(os.path.join(out, f"checkpoint_{STEPS:07d}.pt")):
        command = [sys.executable, os.path.join(HERE, "train.py"), *SETTINGS.split(), "--data", data, "--out", out]
        subprocess.run(command, check=True)
    return data, out


def by_logsnr(model, config, source):
    """Measure (log-SNR, error of v) in 16 equal parts of the schedule, on ASKED images with fixed noise."""
    x = torch.stack([source.image(i % len(source)) for i in range(ASKED)])
    with torch.no_grad():
        bound = variational_bound(model, x, {}, make_schedule(config), generator=torch.Generator().manual_seed(0))
    return bound["logsnr"].mean(0).tolist(), bound["v_mse"].mean(0).tolist()


def measured(name, data, out, yardstick):
    """Measure what the plots show of one run, and how close its samples are to its own training images."""
    with open(os.path.join(out, "log.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    column = lambda name: [float(row[name]) for row in rows]
    result = dict(images=RUNS[name], step=[int(row["step"]) for row in rows], loss=column("loss"),
                  grad_norm=column("grad_norm"), seconds=column("seconds")[-1], checkpoints=[])
    own, unseen = open_source(data, (16, 16)), Glyphs(size=(16, 16), held_out=True)
    features_of = lambda images: yardstick.network(images)["features"]
    as_bytes = lambda image: ((image + 1) * 127.5).round().byte().permute(1, 2, 0)
    ours = features_of(torch.stack([as_bytes(own.image(i)) for i in range(len(own))]))
    nearest = lambda features: torch.cdist(features, ours).amin(1).mean().item()
    for checkpoint in kept_checkpoints(out):
        state = read_checkpoint(out, checkpoint)
        run = trained_run(out, state, state["config"], torch.device("cpu"))
        images = draw_samples(run, [-1] * SAMPLES, seed=0)["images"]
        samples = describe(zip(torch.arange(SAMPLES).split(100), images.split(100)), yardstick.network)
        real, features = moments_of(yardstick.held_out), samples["features"]
        result["checkpoints"].append(dict(
            step=state["step"], fd=frechet_distance(real, moments_of(samples)),
            fd_pm=bootstrap(lambda i: frechet_distance(real, Moments(features[i])), SAMPLES, 20),
            colour_spread=(samples["spread"] / yardstick.held_out["spread"]).item(),
            brightness=(images.float().mean() / 127.5 - 1).item(),
            # 1: as far from the run's own images as unseen scenes are; 0: copies.
            nearest_ratio=nearest(features) / nearest(yardstick.held_out["features"][:SAMPLES])))
        print(name, {key: round(value, 3) for key, value in result["checkpoints"][-1].items()}, flush=True)
    result["logsnr"], result["error_own"] = by_logsnr(run.model, run.config, own)
    _, result["error_unseen"] = by_logsnr(run.model, run.config, unseen)
    return result


def smooth(values, width=10):
    """Average each value with the ones before it, `width` in all."""
    windows = (values[max(0, i - width + 1):i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def draw(result):
    plt = pyplot()
    figure = plt.figure(figsize=(10, 8.4))
    top, *four = [figure.add_axes(box) for box in ((0.09, 0.715, 0.86, 0.225), (0.09, 0.395, 0.38, 0.22),
                                                   (0.57, 0.395, 0.38, 0.22), (0.09, 0.075, 0.38, 0.22),
                                                   (0.57, 0.075, 0.38, 0.22))]
    for name, colour in (("last_week", "0.55"), ("today", "C3")):
        run, label = result["runs"][name], name.replace("_", " ")
        points = run["checkpoints"]
        steps = [point["step"] for point in points]
        top.errorbar(steps, [point["fd"] for point in points], [point["fd_pm"] for point in points], marker="o",
                     capsize=3, color=colour, label=label)
        four[0].plot(run["step"], smooth(run["loss"]), color=colour, label=label)
        four[1].plot(run["step"], smooth(run["grad_norm"]), color=colour, label=label)
        four[3].plot(steps, [point["colour_spread"] for point in points], "o-", color=colour, label=label)
        for key, style, whose in (("error_own", "o-", "its own images"), ("error_unseen", "s--", "unseen ones")):
            four[2].plot(run["logsnr"], run[key], style, markersize=4, color=colour, label=f"{label}, {whose}")
    four[3].axhline(1, color="k", linewidth=0.8)
    top.set(title="The symptom: Fréchet distance to unseen scenes (less is better)", xlabel="step", ylabel="FD",
            ylim=(0, None))
    four[0].set(title="(a) training loss, mean of ten logged steps", xlabel="step", ylabel="squared error of v",
                yscale="log")
    four[1].set(title="(b) norm of the gradient, likewise", xlabel="step", ylim=(0, None))
    four[2].set(title="(c) loss by log-SNR, last checkpoint", xlabel="log-SNR  (noise ←  → clean)",
                ylabel="squared error of v", yscale="log")
    four[3].set(title="(d) spread of the samples' colours", xlabel="step", ylabel="share of real scenes'",
                ylim=(0, 1.25))
    for axis in (top, four[0], four[1], four[3]):
        axis.set_xlim(0, STEPS * 1.03)
    for axis in (top, *four):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7.5)
        axis.title.set_fontsize(11)
    figure.savefig(PICTURE, dpi=100)
    plt.close(figure)
    print(f"wrote {os.path.relpath(PICTURE)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the runs and images")
    parser.add_argument("--draw", action="store_true", help="only draw, from the stored results")
    args = parser.parse_args()
    if args.draw:
        with open(RESULT) as file:
            return draw(json.load(file))
    torch.set_num_threads(1)
    places = {name: prepare(args.folder, name) for name in RUNS}
    scenes = dataclasses.replace(PRESETS["glyphs16"], class_names=Glyphs().classes, num_classes=len(Glyphs().classes))
    yardstick = Yardstick(args.folder, scenes, SAMPLES, REAL)
    real = moments_of(yardstick.held_out)
    result = dict(**made_by(), machine=f"{platform.machine()}, {os.cpu_count()} cores, one used",
                  settings=SETTINGS, samples=SAMPLES, held_out=REAL,
                  fd_real=frechet_distance(real, moments_of(yardstick.real_scenes)),
                  runs={name: measured(name, *place, yardstick) for name, place in places.items()})
    with whole_file(RESULT, "w") as file:
        json.dump(result, file, allow_nan=False)
    draw(result)


if __name__ == "__main__":
    main()
