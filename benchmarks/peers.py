"""Compare our model with what people use today: the same scenes, minutes, cores and classifier.

    pip install -r benchmarks/requirements.txt
    python benchmarks/peers.py train runs/peers [--minutes 5] [--seeds 3] [--beside 2]
    python benchmarks/peers.py judge runs/peers [--n 360]     -> results/peers*.json, figures/peers*.png

The contestants. The default preset meets denoising-diffusion-pytorch (its U-Net with classes, and the U-ViT of
simple_diffusion.py, which has none) and diffusers (UNet2DModel, v-prediction). Each peer runs with its own settings and
with ours: batch, learning rate, Adam, EMA, the error of v, dropped classes, guidance, the schedule (except ddp's U-Net,
which has no shift), and a network with about as many parameters, as narrow as it allows at the large maps, where
parameters cost most. Our U-ViT without classes meets theirs. ours-none is our default with --precondition none --loss
v_mse: it predicts v as the peers do. All use bf16 where it is faster, as train.py does. *-ddpm are no runs of their
own: they sample our runs with other flags of sample.py, because ancestral steps are part of the advantage of ddp's
U-ViT over our DDIM.

Training. All learn from the same 20,000 scenes, drawn beforehand and held in memory. They take turns of `--round`
seconds of wall-clock time until each has had its minutes; the time to start and to save does not count. So a
disturbance affects all of them, and with more --minutes the same runs go on. --beside 2 trains two at a time, each with
half of the cores, in pairs that change from round to round.

Judging, as in evaluate.py, by samples of the EMA weights with CALLS network calls each; guidance halves the steps. The
large networks of the peers' own settings give only FEW samples (six to nine a minute on a core). A distance of FEW
images is larger than one of --n, so one column has the distance of FEW for all. Seconds at matched quality: the fewest
steps of LADDER that come within 5 % of a contestant's best, beside the fewest with which ours is no worse; FEW samples.
"""
import argparse
import concurrent.futures
import copy
import functools
import importlib
import importlib.machinery
import importlib.metadata
import inspect
import math
import os
import queue
import random
import resource
import subprocess
import sys
import time
import unittest.mock

os.environ.setdefault("TQDM_DISABLE", "1")                                  # otherwise a bar for every batch

from common import ROOT, check, save  # first: it puts the project on the path

import numpy as np
import torch
import torch.nn.functional as F

import evaluate
from config import PRESETS, build_model, make_optimizer, make_schedule
from plumbing.settings import Parser, override
from data import Stream
from plumbing import UserError
from plumbing.files import whole_file, writable_folder
from plumbing.features import Yardstick, describe
from plumbing.runs import autocast, choose_precision, main_program
from plumbing.pictures import grid, pyplot, to_uint8
from plumbing.sampling import make_conditions
from plumbing.sources import open_run
from plumbing.start import measure_bands
from sample import sample_run
from train import conditions, draw, training_loss, update_ema

CPU = torch.device("cpu")
PRECISION = choose_precision("auto", CPU)
CALLS, FEW, LADDER = 48, 72, (1, 2, 4, 8, 12, 16, 24)
CLASSES = 36
SCENES = override(PRESETS["glyphs64"], scenes=20_000)


# ------------------------------------------------------------------------------------------ ours

def with_bands(config):
    """Measure the bands of the wavelet, as a run does when it starts."""
    return override(config, band_rms=measure_bands(config, open_run(config), None))


class Ours:
    """`python train.py --scenes 20000`: its loss, its random draws, its optimizer. The learning rate does not fall,
    since the rounds have no last step."""
    title, classes, large = "ours: python train.py", True, False
    sampling = {}

    def __init__(self, seed):
        self.config = self.settings(seed)
        self.batch, self.seed = self.config.batch, seed
        torch.manual_seed(seed)                                           # the data loader drew a number, too
        self.model = build_model(self.config)
        self.averaged = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = make_optimizer(self.model, self.config)

    def settings(self, seed):
        return with_bands(override(SCENES, num_classes=CLASSES, seed=seed))

    def learn(self, x, labels, step):
        config, shape = self.config, (3, *self.config.size)
        t, eps, u = draw(self.seed, step, range(config.batch), [shape], CPU)
        labels = labels if self.classes else torch.full_like(labels, -1)
        cond = conditions(config, dict(label=labels), u < config.cond_drop)
        self.optimizer.param_groups[0]["lr"] = config.lr * min(1, (step + 1) / config.warmup)
        with autocast(PRECISION, CPU):
            loss = training_loss(self.config, self.model, x, cond, t, eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        update_ema(self.averaged, self.model, config.ema, step)

    def images(self, labels, steps, seeds):
        config = override(self.config, sample_steps=steps, **self.sampling)
        return sample_run(self.averaged, config, make_conditions(config, labels, CPU), seeds, CPU, PRECISION)


class OursPlain(Ours):
    title = "ours, --precondition none --loss v_mse"

    def settings(self, seed):
        return override(SCENES, num_classes=CLASSES, seed=seed, precondition="none", loss="v_mse")


class OursWithoutClasses(Ours):
    title, classes = "ours, without classes", False

    def settings(self, seed):
        return with_bands(override(SCENES, num_classes=0, seed=seed))


class OursByDdpm(Ours):
    """The run of `ours`, sampled as in the paper: ancestral steps, here with their largest variance."""
    title, run = "ours, --sampler ddpm --noise-param 1", "ours"
    sampling = dict(sampler="ddpm", noise_param=1.0)


class OursWithoutClassesByDdpm(OursWithoutClasses):
    title, run = "ours, without classes, --sampler ddpm --noise-param 1", "ours-without-classes"
    sampling = OursByDdpm.sampling


# ------------------------------------------------------------------------------------------ the peers

class Peer:
    """What a user of a library writes around it: one step of the training loop."""

    def optimise(self, network, lr, warmup, decay, every=1, **adam):
        self.optimizer, self.warmup = torch.optim.Adam(network.parameters(), lr=lr, **adam), warmup
        self.lr, self.decay, self.every, self.model = lr, decay, every, network
        self.averaged = copy.deepcopy(network).eval().requires_grad_(False)

    def learn(self, x, labels, step):
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(1, (step + 1) / self.warmup)
        with autocast(PRECISION, CPU):
            loss = self.loss(x, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if step % self.every == 0:
            update_ema(self.averaged, self.model, self.decay, step // self.every)

    ours = dict(lr=SCENES.lr, betas=(SCENES.beta1, SCENES.beta2), eps=SCENES.adam_eps, fused=True,
                warmup=SCENES.warmup, decay=SCENES.ema)
    batch, large = 16, True


class DdpUnet(Peer):
    """denoising-diffusion-pytorch, classifier_free_guidance.py: the example at its end, its Trainer's defaults.

    Its DDIM is stochastic by default and then needs its 250 steps; here it is deterministic.
    """
    title, classes = "denoising-diffusion-pytorch, U-Net, own settings", True
    net, settings, scale = dict(dim=64, dim_mults=(1, 2, 4, 8)), dict(objective="pred_noise"), dict(cond_scale=6.0)
    training = dict(lr=1e-4, betas=(0.9, 0.99), warmup=1, decay=0.995, every=10)

    def __init__(self, seed):
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
        self.diffusion = GaussianDiffusion(Unet(num_classes=CLASSES, **self.net), image_size=64, timesteps=1000,
                                           sampling_timesteps=250, ddim_sampling_eta=0.0, **self.settings)
        self.optimise(self.diffusion.model, **self.training)

    def loss(self, x, labels):
        return self.diffusion((x + 1) / 2, classes=labels)

    def images(self, labels, steps, seeds):
        self.diffusion.model, self.diffusion.sampling_timesteps = self.averaged, steps
        return 2 * self.diffusion.sample(classes=torch.tensor(labels), **self.scale) - 1


class DdpUnetAtOurs(DdpUnet):
    """Plain cosine (it has no shift), plain guidance, and all errors of v weighted equally (it has no switch)."""
    title = "denoising-diffusion-pytorch, U-Net, at ours"
    net, settings = dict(dim=16, dim_mults=(1, 2, 6, 12), cond_drop_prob=0.1), dict(objective="pred_v")
    scale, training, batch, large = dict(cond_scale=SCENES.guidance, rescaled_phi=0.0), Peer.ours, SCENES.batch, False

    def __init__(self, seed):
        super().__init__(seed)
        self.diffusion.loss_weight.fill_(1)
        self.averaged.forward_with_cond_scale = functools.partial(self.averaged.forward_with_cond_scale,
                                                                  remove_parallel_component=False)


class DdpUvit(Peer):
    """denoising-diffusion-pytorch, simple_diffusion.py: its defaults; no classes, ancestral sampling only."""
    title, classes = "denoising-diffusion-pytorch, U-ViT, own settings", False
    net, settings, training = dict(dim=64), {}, DdpUnet.training

    def __init__(self, seed):
        from denoising_diffusion_pytorch.simple_diffusion import GaussianDiffusion, UViT
        self.diffusion = GaussianDiffusion(UViT(**self.net), image_size=64, **self.settings)
        self.optimise(self.diffusion.model, **self.training)

    def loss(self, x, labels):
        return self.diffusion((x + 1) / 2)

    def images(self, labels, steps, seeds):
        self.diffusion.model, self.diffusion.num_sample_steps = self.averaged, steps
        return 2 * self.diffusion.sample(batch_size=len(labels)) - 1


class DdpUvitAtOurs(DdpUvit):
    # Its init_img_transform cannot take our wavelet: its check builds torch.Size(1, 1, 32, 32), a TypeError. So we take
    # patches of 2, its own way to 32 x 32. It weights the error of v by SNR / (SNR + 1); we undo that.
    title = "denoising-diffusion-pytorch, U-ViT, at ours"
    net = dict(dim=32, dim_mults=(3, 6), patch_size=2, vit_depth=4, vit_dropout=0.0)
    settings, training, batch, large = dict(noise_d=32, min_snr_loss_weight=False), Peer.ours, SCENES.batch, False

    def loss(self, x, labels):
        t = torch.rand(len(x))
        return (self.diffusion.p_losses(x, t, loss_reduction="none") / self.diffusion.log_snr(t).sigmoid()).mean()


class DiffusersUnet(Peer):
    """diffusers: network and learning rate of its training example, without the decay, which needs the number of steps.

    v-prediction as its documentation advises: zero terminal SNR, trailing steps. Dropped classes and guidance as in its
    DiT.
    """
    title, classes = "diffusers, UNet2DModel, own settings", True
    net = dict(layers_per_block=2, block_out_channels=(128, 128, 256, 256, 512, 512),
               down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
               up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4)
    training = dict(lr=1e-4, betas=(0.95, 0.999), warmup=500, decay=0.9999)
    guidance, stepping = 4.0, {}

    def betas(self):
        return {}

    def __init__(self, seed):
        from diffusers import DDIMScheduler, UNet2DModel
        self.scheduler = DDIMScheduler(1000, prediction_type="v_prediction", rescale_betas_zero_snr=True,
                                       timestep_spacing="trailing", **self.betas())
        self.optimise(UNet2DModel(sample_size=64, num_class_embeds=CLASSES + 1, **self.net), **self.training)

    def loss(self, x, labels):
        labels = torch.where(torch.rand(len(x)) < 0.1, CLASSES, labels)   # the last class means none
        t, noise = torch.randint(0, 1000, (len(x),)), torch.randn_like(x)
        v = self.model(self.scheduler.add_noise(x, noise, t), t, class_labels=labels).sample
        return F.mse_loss(v, self.scheduler.get_velocity(x, noise, t))

    def images(self, labels, steps, seeds):
        z, both = torch.randn(len(labels), 3, 64, 64), torch.tensor(labels + [CLASSES] * len(labels))
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            v, null = self.averaged(torch.cat([z, z]), t, class_labels=both).sample.float().chunk(2)
            z = self.scheduler.step(null + self.guidance * (v - null), t, z, **self.stepping).prev_sample
        return z


class DiffusersUnetAtOurs(DiffusersUnet):
    title = "diffusers, UNet2DModel, at ours"
    net = dict(layers_per_block=1, block_out_channels=(16, 32, 96, 192), norm_num_groups=4,
               time_embedding_dim=256, resnet_time_scale_shift="scale_shift",
               down_block_types=("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
               up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * 3)
    training, batch, guidance, large = Peer.ours, SCENES.batch, SCENES.guidance, False
    stepping = dict(use_clipped_model_output=True)

    def betas(self):
        """Return our schedule as the betas of 1000 steps."""
        kept = torch.sigmoid(make_schedule(SCENES)(torch.linspace(0, 1, 1001, dtype=torch.float64)))
        return dict(trained_betas=(1 - kept[1:] / kept[:-1]).numpy())


CONTESTANTS = {"ours": Ours, "ours-none": OursPlain, "ddp-unet-at-ours": DdpUnetAtOurs,
               "diffusers-at-ours": DiffusersUnetAtOurs, "ours-without-classes": OursWithoutClasses,
               "ddp-uvit-at-ours": DdpUvitAtOurs, "ddp-unet": DdpUnet, "ddp-uvit": DdpUvit, "diffusers": DiffusersUnet,
               "ours-ddpm": OursByDdpm, "ours-without-classes-ddpm": OursWithoutClassesByDdpm}


def run_of(name):
    """Return the run from which a contestant draws: its own, unless it names another."""
    return getattr(CONTESTANTS[name], "run", name)


def find_peers():
    """Import the peers. Replace a torchvision that does not fit torch: only parts unused here need it."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.utils"):
            sys.modules[name] = unittest.mock.MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))
    try:
        for name in ("denoising_diffusion_pytorch", "diffusers"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{error.name or error} is not installed: pip install -r benchmarks/requirements.txt") from None


def lines_of(contestant):
    """Count the lines that a user of the library writes for a training step and for samples. 0: a command does it.

    Settings, data, the loop, saving and resuming do not count.
    """
    if issubclass(contestant, Ours):
        return 0
    methods = {getattr(kind, name) for kind in contestant.__mro__ for name in vars(kind)
               if name in ("__init__", "optimise", "learn", "loss", "images", "betas") and kind is not object
               and (name == "__init__" or vars(kind)[name] is getattr(contestant, name))}
    return sum(bool(line.strip()) for method in methods for line in inspect.getsource(method).splitlines())


# ------------------------------------------------------------------------------------------ training, in turns

def scenes_of(folder):
    """Draw the scenes once -> (images uint8 (N, 3, 64, 64), labels (N,))."""
    path = os.path.join(folder, "scenes.pt")
    if not os.path.exists(path):
        source = open_run(SCENES)
        images = torch.stack([to_uint8(source.image(i)[None])[0] for i in range(len(source))]).permute(0, 3, 1, 2)
        with whole_file(path) as file:
            torch.save((images.contiguous(), torch.tensor([source.label(i) for i in range(len(source))])), file)
    return torch.load(path)


def checkpoint_of(folder, name, seed, mmap=True):
    path = os.path.join(folder, f"{run_of(name)}-seed{seed}.pt")
    return path, torch.load(path, mmap=mmap) if os.path.exists(path) else dict(step=0, images=0, seconds=0.0, peak=0.0)


def take_turn(args):
    """Train one contestant until it has had args.until seconds, in a process of its own with the cores that it has."""
    find_peers()
    path, state = checkpoint_of(args.folder, args.contestant, args.seed, mmap=False)
    images, labels = scenes_of(args.folder)
    torch.manual_seed(args.seed)
    contestant = CONTESTANTS[args.contestant](args.seed)
    if state["step"]:
        contestant.model.load_state_dict(state["model"])
        contestant.averaged.load_state_dict(state["averaged"])
        contestant.optimizer.load_state_dict(state["optimizer"])
    step, batch = state["step"], contestant.batch
    order = Stream(images, args.seed).order
    torch.manual_seed(args.seed * 1_000_003 + step)
    contestant.model.train()
    start, seconds = time.perf_counter(), state["seconds"]
    while seconds < args.until:
        epoch, place = divmod(step * batch, len(images))
        chosen = np.concatenate([order(epoch), order(epoch + 1)])[place:place + batch]
        contestant.learn(images[chosen].float() / 127.5 - 1, labels[chosen], step)
        step, seconds = step + 1, state["seconds"] + time.perf_counter() - start
    # ru_maxrss in KiB: the process with scenes and libraries. Later turns also hold the checkpoint that they load.
    peak = state["peak"] or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    with whole_file(path) as file:                                        # flushed: the next turn does not pay for it
        torch.save(dict(step=step, images=step * batch, seconds=seconds, peak=peak,
                        cores=sorted({*state.get("cores", ()), len(os.sched_getaffinity(0))}),
                        model=contestant.model.state_dict(), averaged=contestant.averaged.state_dict(),
                        optimizer=contestant.optimizer.state_dict()), file)
    print(f"{args.contestant}, seed {args.seed}: {seconds:.0f} s, step {step:,}, {step * batch / seconds:.1f} images/s",
          flush=True)


def train(args):
    find_peers()
    scenes_of(args.folder)
    cores = sorted(os.sched_getaffinity(0))
    slots = queue.Queue()
    for slot in range(args.beside):
        slots.put(cores[slot::args.beside])

    def turn(name, seed, until):
        slot = slots.get()
        try:
            command = [sys.executable, os.path.abspath(__file__), "turn", args.folder, "--contestant", name, "--seed",
                       str(seed), "--until", str(until)]
            done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(len(slot))},
                                  preexec_fn=lambda: os.sched_setaffinity(0, slot))
            if done.returncode:
                raise UserError(f"{name}, seed {seed}: its turn ended with status {done.returncode}")
        finally:
            slots.put(slot)
    rounds = math.ceil(60 * args.minutes / args.round)
    for number in range(1, rounds + 1):
        until = min(number * args.round, 60 * args.minutes)
        turns = [(name, seed, until) for name in dict.fromkeys(map(run_of, args.names))
                 for seed in range(args.seeds)]
        turns = [each for each in turns if checkpoint_of(args.folder, *each[:2])[1]["seconds"] < until]
        random.Random(number).shuffle(turns)
        with concurrent.futures.ThreadPoolExecutor(args.beside) as pool:
            list(pool.map(turn, *zip(*turns))) if turns else None


# ------------------------------------------------------------------------------------------ judging

@torch.no_grad()
def drawn(contestant, labels, steps, batch=60):
    """Draw samples -> (images uint8 (N, H, W, 3), seconds an image). All that call torch.randn get the same noise."""
    images, start = [], time.perf_counter()
    for first in range(0, len(labels), batch):
        torch.manual_seed(first)
        part = labels[first:first + batch]
        with autocast("float32" if isinstance(contestant, Ours) else PRECISION, CPU):
            images.append(contestant.images(part, steps, range(first, first + len(part))).float())
    return to_uint8(torch.cat(images).clamp(-1, 1)), (time.perf_counter() - start) / len(labels)


def judge(args):
    find_peers()
    states = {(name, seed): state for name in args.names for seed in range(args.seeds)
              if (state := checkpoint_of(args.folder, name, seed)[1])["step"]}
    seconds = [state["seconds"] for state in states.values()]
    if missing := set(args.names) - {name for name, _ in states}:
        raise UserError(f"{', '.join(missing)}: not trained; first python benchmarks/peers.py train {args.folder}")
    if max(seconds) > min(seconds) + args.round / 2:
        raise UserError(f"trained from {min(seconds):.0f} to {max(seconds):.0f} s: first train to the same --minutes")
    yardstick = Yardstick(args.folder, override(SCENES, class_names=tuple(open_run(SCENES).classes)), args.n)
    labels = yardstick.prompts()["labels"]

    def judged(name, seed, steps=None, n=args.n):
        state = states[name, seed]
        contestant = CONTESTANTS[name](seed)
        contestant.averaged.load_state_dict(state["averaged"])
        told = (labels if contestant.classes else [-1] * args.n)[:FEW if contestant.large else n]
        steps = steps or CALLS // (1 + contestant.classes)
        kept = os.path.join(args.folder, f"{name}-seed{seed}-{state['step']}-{steps}steps-{len(told)}.samples")
        if not os.path.exists(kept):
            images, seconds = drawn(contestant, told, steps)
            with whole_file(kept) as file:
                torch.save((images, seconds), file)
        images, seconds = torch.load(kept)
        few, whole = (dict(describe(zip(torch.arange(some).split(100), images[:some].split(100)), yardstick.network),
                           labels=told[:some]) for some in (min(FEW, len(told)), len(told)))
        found = evaluate.score(few, yardstick, ("fd",))
        found = {"fd_few": found["fd_held_out"], "fd_few_pm": found["fd_held_out_pm"]}
        found |= evaluate.score(whole, yardstick, ("fd", "is", "read") if len(told) > FEW else ("read",))
        found = dict(name=name, seed=seed, steps=steps, n=len(told), minutes=state["seconds"] / 60,
                     trained_steps=state["step"], images=state["images"], peak_gib=state["peak"], cores=state["cores"],
                     images_a_second=state["images"] / state["seconds"],
                     seconds_an_image=seconds, parameters=sum(p.numel() for p in contestant.model.parameters()),
                     **found)
        print(f"{name}, seed {seed}, {steps} steps, {len(told)} samples: FD of {FEW} {found['fd_few']:.1f}, "
              f"{seconds:.2f} s an image", flush=True)
        return found, images
    results, sheets = [], {}
    for name, seed in states:
        found, images = judged(name, seed)
        results.append(found)
        sheets.setdefault(name, images)
    ladders = {}
    for name in args.names:
        each = 1 if CONTESTANTS[name].classes else 2                      # a step is one call, with guidance two
        ladders[name] = [judged(name, 0, each * steps, FEW)[0] for steps in
                         ((CALLS // 2,) if CONTESTANTS[name].large else LADDER)]
    show(args, results, ladders)
    cores = " or ".join(map(str, sorted({count for result in results for count in result["cores"]})))
    save(args.name + ".json", torch.device("cpu"), f"{cores} for each", precision=PRECISION, seed_of_samples=0,
         scenes=SCENES.scenes,
         versions={name: importlib.metadata.version(name) for name in ("denoising-diffusion-pytorch", "diffusers")},
         lines={name: lines_of(CONTESTANTS[name]) for name in args.names},
         titles={name: CONTESTANTS[name].title for name in args.names}, results=results, fewer_steps=ladders)
    draw_samples(args, results, sheets)


def of(results, name, key):
    """Return (mean, bar): half the range of the seeds; with one seed half the 95 % interval of its samples."""
    values = [result[key] for result in results if result["name"] == name and key in result]
    if not values:
        return math.nan, math.nan
    alone = next(result for result in results if result["name"] == name).get(key + "_pm", 0.0)
    return sum(values) / len(values), (max(values) - min(values)) / 2 if len(values) > 1 else alone


def enough(ladder):
    """Return the first rung of the ladder within 5 % of the best."""
    return as_good(ladder, 1.05 * min(rung["fd_few"] for rung in ladder))


def as_good(ladder, distance):
    """Return the first rung of the ladder that is no worse than this distance, or None."""
    return next((rung for rung in ladder if rung["fd_few"] <= distance), None)


COLUMNS = (("FD held-out", "fd_held_out", 1, 1), (f"FD of {FEW}", "fd_few", 1, 1), ("read, %", "read_rate", 100, 1),
           ("IS", "is", 1, 1),
           ("images/s", "images_a_second", 1, 1), ("peak, GiB", "peak_gib", 1, 2))


def show(args, results, ladders):
    print(f"\n{results[0]['minutes']:.1f} minutes; ± half the range of the seeds (one seed: 95 % of the samples); "
          f"{args.n} samples\n{'':54s}" + "".join(f"{head:>15s}" for head, *_ in COLUMNS) + f"{'s an image':>12s}"
          f"{'ours as good':>14s}{'lines':>7s}{'parameters':>13s}{'steps':>7s}{'seeds':>7s}")
    for name in args.names:
        cells = []
        for _, key, scale, digits in COLUMNS:
            value, bar = (scale * each for each in of(results, name, key))
            cells.append("–" if math.isnan(value) else f"{value:.{digits}f} ± {bar:.{digits}f}")
        rung = enough(ladders[name])
        ours = as_good(ladders.get("ours", []), rung["fd_few"])
        print(f"{CONTESTANTS[name].title:54s}" + "".join(f"{cell:>15s}" for cell in cells)
              + f"{rung['seconds_an_image']:12.2f}" + (f"{ours['seconds_an_image']:14.2f}" if ours else f"{'–':>14s}")
              + f"{lines_of(CONTESTANTS[name]):7d}{of(results, name, 'parameters')[0]:13,.0f}"
              + f"{of(results, name, 'trained_steps')[0]:7,.0f}{sum(result['name'] == name for result in results):7d}")
    peers = [name for name in args.names if not issubclass(CONTESTANTS[name], Ours)]
    if peers and "ours" in args.names:
        best = min(peers, key=lambda name: of(results, name, "fd_few")[0])
        print(f"ours over the best peer ({best}), FD of {FEW}: "
              f"{of(results, 'ours', 'fd_few')[0] / of(results, best, 'fd_few')[0]:.2f} (goal: 0.5)")


def draw_samples(args, results, sheets, many=12):
    plt = pyplot()
    figure, axes = plt.subplots(len(sheets), 1, figsize=(12, 1.02 * len(sheets)), layout="constrained", squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], sheets.items()):
        at = torch.arange(many) * 37 % len(images)                        # with classes: A, B, C, ...
        axis.imshow(np.asarray(grid(images[at].permute(0, 3, 1, 2) / 127.5 - 1, many)))
        distance, read = of(results, name, "fd_few")[0], of(results, name, "read_rate")[0]
        axis.set_ylabel(CONTESTANTS[name].title.replace(", ", "\n") + f"\nFD of {FEW}: {distance:.0f}" + (
            "" if math.isnan(read) else f", {100 * read:.0f} % read"), rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(os.path.join(ROOT, "figures", args.name + ".png"), dpi=100)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ the program

def parse():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "judge", "turn"), help="turn: started by train")
    parser.add_argument("folder", help="where the runs are")
    parser.add_argument("--minutes", type=float, default=5, help="of training, each")
    parser.add_argument("--round", type=float, default=100, help="seconds of a turn")
    parser.add_argument("--seeds", type=int, default=3, help="of training: 0, 1, ...")
    parser.add_argument("--beside", type=int, default=2, help="how many train at a time, each on its own cores")
    parser.add_argument("--only", default=",".join(CONTESTANTS), help="contestants")
    parser.add_argument("--n", type=int, default=360, help="samples")
    parser.add_argument("--name", help="of the files that judge writes; default: peers and what --only says")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.names, args.folder = args.only.split(","), os.path.abspath(args.folder)
    for name in args.names:
        if name not in CONTESTANTS:
            raise UserError(f"--only {name}: want some of {','.join(CONTESTANTS)}")
    args.name = args.name or "-".join(["peers", *args.names * (set(args.names) != set(CONTESTANTS))])
    check(args, minutes=0.01, round=1, seeds=1, beside=1, n=FEW)
    if args.what == "train" and args.beside > (cores := len(os.sched_getaffinity(0))):
        raise UserError(f"--beside {args.beside}: there are {cores} cores")
    writable_folder(args.folder, "folder")
    return args


def main():
    args = parse()
    {"train": train, "judge": judge, "turn": take_turn}[args.what](args)


if __name__ == "__main__":
    main_program(main)
