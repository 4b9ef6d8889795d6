"""The samples of a run: drawn, or taken from the cache. Of the upper stage of a cascade also the images below them."""
import dataclasses
import functools
import math
import os
import time

import torch

from cascade import hand_over
from config import make_low_schedule
from data import Glyphs
from plumbing import UserError
from plumbing.features import cached, require, save_cached, tensor_bytes
from plumbing.files import fingerprint
from plumbing.measuring import TrainedRun
from plumbing.pictures import to_uint8
from plumbing.runs import choose_precision, progress
from plumbing.sampling import derive_seed, image_seeds, make_conditions
from plumbing.t5 import Encoder
from plumbing.training import real_low_res
from sample import handoff_noise, sample_run

FORMAT = 1                # of cached samples; raise it when the code that draws them changes


# ------------------------------------------------------------------------------------------ drawing

def draw_samples(run, labels, seed, captions=None):
    """Return the samples of a run: dict(images uint8 (n, H, W, 3), seconds, name). Draw those that are not cached.

    labels, captions: one for each sample. Without text captions is None; with it the labels are not drawn.
    Sample i is a function of its own seed, so more samples continue a smaller set.
    """
    config, device, n = run.config, run.device, len(labels)
    precision = choose_precision(config.precision, device)
    low_key, low_res_of = low_res_images(run, labels, seed) if run.below is not None else ((), None)
    size = config.size[0], config.size[1] * config.counts[0]              # of a video its strip
    cache = SampleCache(run.folder, (*sampling_key(run, precision), seed, captions, low_key), labels, size)
    encoder = Encoder(config, device, cached=True) if config.text_encoder and len(cache) < n else None
    while len(cache) < n:
        first, start = len(cache), time.monotonic()
        part = slice(first, min(n, first + 256))
        seeds = image_seeds(seed, part.stop - first, first)
        if low_res_of:                                                    # the upper stage of a cascade
            seeds = [derive_seed(i, 1) for i in seeds]

        def on_step(batch, step, z):                                      # batch: its first image, within this part
            progress(f"{os.path.basename(run.folder.rstrip('/'))}: drawing samples",
                     first + batch + len(z) * step // config.sample_steps, n)

        cond = make_conditions(config, labels[part], device, captions and captions[part], encoder=encoder)
        if low_res_of:
            cond["low_res"], cond["aug_logsnr"] = low_res_of(part)
        images = sample_run(run.model, config, cond, seeds, device, precision, on_step)
        broken = ~torch.isfinite(images).flatten(1).all(1)
        if broken.any():
            raise UserError(f"{run.folder}: sample {first + int(broken.nonzero()[0])} holds values that are not "
                            "finite; nothing can be measured")
        cache.add(to_uint8(images), time.monotonic() - start)
    return cache.samples()


def low_res_images(run, labels, seed):
    """Return (key, give) for the upper stage of a cascade: give(part) -> (low_res, aug_logsnr) of a slice of samples.

    key: all that these images depend on. CDM has three ways: noisy images of a lower stage that stops at s
    ("truncated"), its finished images with new noise ("renoised"), its finished images ("clean").
    """
    below, handoff, s = run.below, run.handoff, run.s
    low_schedule = make_low_schedule(run.config)

    def add_noise(low_res, part):
        seeds = image_seeds(seed, part.stop - part.start, part.start)
        return hand_over(low_res, handoff, s, low_schedule, handoff_noise(low_res.shape, seeds, 1))

    if not isinstance(below, TrainedRun):                                 # real images
        handoff = "renoised" if handoff == "truncated" else handoff       # there is no sampling that could stop
        # Not the scenes that the samples are compared with: those from the middle on.
        first = len(below) // 2 if isinstance(below, Glyphs) else 0
        real = real_low_res(below, run.config, labels, first=first)
        return ("real", fingerprint(real.numpy().tobytes()), handoff, s), lambda part: add_noise(real[part], part)

    if stops_early(run):
        precision = choose_precision(below.config.precision, below.device)

        def truncated(part):
            seeds = image_seeds(seed, part.stop - part.start, part.start)
            cond = make_conditions(below.config, labels[part], below.device)
            images = sample_run(below.model, below.config, cond, seeds, below.device, precision, stop=s)
            return add_noise(images, part)
        return (*sampling_key(below, precision), handoff, s), truncated

    low = draw_samples(below, labels, seed)                               # drawn once and used for every s
    images = low["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    return (low["name"], handoff, s), lambda part: add_noise(images[part], part)


def stops_early(run):
    """Return True if the lower stage of this cascade stops at s > 0. Its images are then not cached."""
    return run.handoff == "truncated" and run.s > 0


# ------------------------------------------------------------------------------------------ the cache of samples

def sampling_key(run, precision):
    """Return all that the samples of a run depend on, except labels, captions, seed and the stage below."""
    config = dataclasses.replace(run.config, precision=precision, data="", data_id="")          # data may move
    return fingerprint(*tensor_bytes(run.model.parameters())), config, run.device.type


class SampleCache:
    """The samples of a run that are drawn already, in a file of its folder: images, labels and seconds.

    key: all that the images depend on but the labels; its fingerprint names the file. So other weights, settings, seeds
    or captions have another file. The labels are in the file: more samples continue a smaller set.
    """

    def __init__(self, folder, key, labels, size):
        self.name, self.labels = fingerprint(FORMAT, *key), labels
        self.path = os.path.join(folder, f"samples-{self.name}.pt")
        empty = dict(images=torch.zeros(0, *size, 3, dtype=torch.uint8), labels=torch.zeros(0, dtype=torch.long),
                     seconds=0.0)
        self.content = cached(self.path, lambda: empty, functools.partial(self.check, size))
        if any(old != new for old, new in zip(self.content["labels"].tolist(), labels)):
            self.content = empty

    @staticmethod
    def check(size, content):
        """Raise an exception unless these are images of this size, a label for each, and the seconds that they took."""
        images, labels, seconds = content["images"], content["labels"], content["seconds"]
        require(images.dtype == torch.uint8 and images.shape == (len(labels), *size, 3), "images")
        require(labels.dtype == torch.long and labels.ndim == 1, "labels")
        require(type(seconds) is float and 0 <= seconds < math.inf, "seconds")

    def __len__(self):
        return len(self.content["labels"])

    def add(self, images, seconds):
        """Append images uint8 (B, H, W, 3) and save."""
        images = torch.cat([self.content["images"], images])
        self.content = dict(images=images, labels=torch.tensor(self.labels[:len(images)]),
                            seconds=self.content["seconds"] + seconds)
        save_cached(self.path, self.content)

    def samples(self):
        """Return the images of all labels, the seconds that they took, and the name of this set."""
        n = len(self.labels)
        return dict(images=self.content["images"][:n], seconds=self.content["seconds"] * n / max(1, len(self)),
                    name=self.name)
