"""What samples are measured with: a network's features, and real images described by them.

Paper: simple diffusion, section 5: FID against the training set and against held-out data.
Read before: measures.py, data.py. Read after: evaluate.py.

Where the features come from decides what a Frechet distance means. Inception's are the field's, so only those give
"FID". Without a download we train a small network on the drawn scenes themselves (a minute, once): it learns to tell
the letter, both colours, the ground's texture and the style, so its features see all that a scene is made of. Distances
in it compare runs on the same scenes with each other and with the real scenes' own distance; never with a paper's FID.

Shapes: images uint8 (N, H, W, 3); features (N, D) float32; probabilities (N, classes).
"""
import hashlib
import inspect
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
import measures
from plumbing.images import BrokenImage
from data import FontFile, Glyphs, Stream, open_run, open_source
from plumbing import UserError, fonts
from plumbing import images as decoding
from measures import Moments, colour_histogram
from plumbing.runs import cores, progress
from plumbing.files import reason_of
from plumbing.pictures import to_uint8


# ------------------------------------------------------------------------------------------ features

class GlyphNet(nn.Module):
    """Reads a scene: images (B, 3, H, W) in [-1, 1] -> features (B, 128) and, for each head, logits (B, values)."""

    def __init__(self, heads):
        super().__init__()

        def block(a, b, stride=1):
            return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.trunk = nn.Sequential(
            *block(3, 32, 2), *block(32, 64, 2), *block(64, 96), nn.MaxPool2d(2), *block(96, 128), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, 128), nn.BatchNorm1d(128), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(128, values) for name, values in heads.items()})

    def forward(self, images):
        images = F.interpolate(images, (64, 64), mode="bilinear", antialias=True, align_corners=False)
        features = self.trunk(images)
        return features, {name: head(features) for name, head in self.heads.items()}


def scene_answers(source, i):
    """What a scene shows, as numbers: one for each head of GlyphNet."""
    scene, colours = source.scene(i), list(data.COLOURS)
    return dict(character=source.label(i), texture=data.GROUNDS.index(scene["texture"]),
                letter=colours.index(scene["letter"]), ground=colours.index(scene["ground"]),
                style=sorted({style for _, style in source.fonts}).index(scene["style"]))


def scene_heads(source):
    return dict(character=len(source.classes), texture=len(data.GROUNDS), letter=len(data.COLOURS),
                ground=len(data.COLOURS), style=len({style for _, style in source.fonts}))


def scene_colours(images):
    """The named colours of letter and ground, judged by pixels: uint8 (N, H, W, 3) -> two (N,) long, in COLOURS' order.

    Ground: what most pixels of the rim are nearest to, a colour or its shade. Letter: of the pixels in the middle that
    are nearer to a colour than to the ground, its shade and its shadow, what most of them are nearest to; only colours
    that scenes have on such a ground. Right for every one of 500 real scenes (tested).
    """
    if len(images) > 100:                                                 # the distances of all would fill the memory
        return [torch.cat(part) for part in zip(*map(scene_colours, images.split(100)))]
    palette = torch.tensor(list(data.COLOURS.values()))                   # (10, 3)
    light = torch.tensor([data.luminance(rgb) for rgb in data.COLOURS.values()])
    shade = torch.where(light[:, None] > 0.35, 0.8 * palette, palette + 0.2 * (1 - palette))    # as Glyphs.draw has it
    between = torch.stack([palette, (palette + shade) / 2, shade])        # (3, 10, 3) what a ground can look like
    height, width = images.shape[1:3]
    v, u = (((torch.arange(n) + 0.5 - n / 2) / min(height, width)).abs() for n in (height, width))
    away = torch.maximum(v[:, None].expand(height, width), u[None].expand(height, width))
    pixels = images.float() / 255
    rim, middle = pixels[:, away > 0.44], pixels[:, away < 0.36]          # (N, pixels, 3)
    votes = lambda winners, voting: (F.one_hot(winners, 10) * voting[..., None]).sum(1).argmax(1)

    ground = torch.cdist(rim, between.flatten(0, 1)).argmin(2) % 10
    ground = votes(ground, torch.ones_like(ground))
    unlike = ((light[:, None] - light).abs() > 0.3)[ground]               # (N, 10) the letters' colours on it
    distance, letter = torch.cdist(middle, palette).masked_fill(~unlike[:, None], torch.inf).min(2)
    grounds = torch.cat([between, 0.6 * between])[:, ground].transpose(0, 1)                    # (N, 6, 3)
    return votes(letter, distance < torch.cdist(middle, grounds).amin(2)), ground


def train_glyph_net(images, answers, heads, steps=900, batch=48, seed=0):
    """GlyphNet trained on images uint8 (N, H, W, 3) with answers {head: (N,)}, in evaluation mode.

    Augmented, or it would learn the clean scenes alone and read nothing into samples: shifts, contrast, noise.
    """
    torch.manual_seed(seed)
    net, rng = GlyphNet(heads).to(memory_format=torch.channels_last), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        i = torch.from_numpy(rng.integers(len(images), size=batch))
        x = images[i].permute(0, 3, 1, 2).float() / 127.5 - 1             # channels last: a third faster
        by = max(1, min(x.shape[-2:]) // 24)
        down, right = rng.integers(0, 2 * by + 1, 2)
        height, width = x.shape[-2:]
        x = F.pad(x, (by, by, by, by), mode="replicate")[..., down:down + height, right:right + width]
        x = x * (0.8 + 0.4 * torch.rand(batch, 1, 1, 1)) + 0.12 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        _, logits = net(x)
        loss = sum(F.cross_entropy(logits[name], answers[name][i]) for name in heads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        progress("features: training", step + 1, steps)
    return net.eval()


class GlyphFeatures:
    """Features by a GlyphNet; probabilities are those of the character."""
    name = "FD"

    def __init__(self, net, accuracy=None, device="cpu"):
        self.net, self.accuracy, self.device = net.to(device), accuracy, device

    @torch.no_grad()
    def __call__(self, images):
        """images uint8 (B, H, W, 3) -> dict: features (B, D), and probabilities of each head (B, values)."""
        self.net.eval()                                                   # trap: batch norm left in training mode
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        features, logits = self.net(x)
        return dict(features=features.cpu(), **{name: value.softmax(1).cpu() for name, value in logits.items()})


class TorchScriptFeatures:
    """Features by the user's TorchScript Inception, images resized to 299 x 299 as Parmar et al. 2022 ("clean") do:
    Pillow's bicubic, antialiased, in floating point, no rounding between.

    The file is called with float (B, 3, 299, 299) in 0..255 and return_features=True, as the well-known
    inception-2015-12-05.pt is; a second call without it gives its class probabilities, for IS.
    """
    name = "FID"

    def __init__(self, path, device="cpu"):
        try:
            self.net, self.device = torch.jit.load(path, map_location=device), device
        except Exception as error:                                        # a missing or foreign file fails in many ways
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"--features {path}: not a TorchScript file that can be loaded ({reason})") from None
        self.path = path

    @staticmethod
    def resized(images, side=299):
        """uint8 (B, H, W, 3) -> float32 (B, 3, side, side) in 0..255."""
        planes = images.permute(0, 3, 1, 2).flatten(0, 1).numpy().astype(np.float32)            # Pillow: a plane a time
        planes = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
        return torch.from_numpy(np.stack(planes)).clamp(0, 255).reshape(len(images), 3, side, side)

    @torch.no_grad()
    def __call__(self, images):
        self.net.eval()
        x = self.resized(images).to(self.device)
        try:
            features = self.net(x, return_features=True).float().flatten(1).cpu()
            try:
                # The original inception score left out the bias of the last layer; the well-known file can, too.
                probabilities = self.net(x, no_output_bias=True).float().cpu()
            except RuntimeError:
                probabilities = self.net(x).float().cpu()
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"--features {self.path}: want forward(images, return_features=False) ({reason})") from None
        sums = probabilities.sum(1) if probabilities.ndim == 2 else torch.zeros(1)
        if torch.isfinite(probabilities).all() and not (probabilities.min() >= 0 and (sums - 1).abs().max() < 1e-2):
            raise UserError(f"--features {self.path}: its forward(images) gives no probabilities of classes")
        return dict(features=features, character=probabilities)


# ------------------------------------------------------------------------------------------ things kept on disk

def fingerprint(*things):
    """A short name for exactly these settings, sources and bytes."""
    digest = hashlib.sha256()
    for thing in things:
        digest.update(thing if isinstance(thing, bytes) else repr(thing).encode())
    return digest.hexdigest()[:12]


def kept(path, compute):
    """compute()'s dict of tensors and numbers, from the file if it is there; a damaged file is made anew."""
    if os.path.exists(path):
        try:
            return torch.load(path, weights_only=True)
        except Exception as error:                                        # half a file fails in many ways
            print(f"{path}: damaged, made anew ({type(error).__name__})", file=sys.stderr)
    value = compute()
    write(value, path)
    return value


def write(value, path):
    """Whole or not at all. Raises UserError if it cannot be written."""
    try:
        with open(path + ".new", "wb") as file:
            torch.save(value, file)
        os.replace(path + ".new", path)
    except (OSError, RuntimeError) as error:                              # PyTorch's writer raises either
        raise UserError(f"{path}: cannot be written: {reason_of(error)}") from None


class Examples(torch.utils.data.Dataset):
    """(index, uint8 image (H, W, 3)) of a source; None for a file that cannot be read."""

    def __init__(self, source, indices):
        self.source, self.indices = source, indices

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, k):
        try:
            return int(self.indices[k]), to_uint8(self.source.image(int(self.indices[k]))[None])[0]
        except BrokenImage:
            return None


def _readable(portion):                                                   # by name: a lambda cannot travel to a worker
    return [pair for pair in portion if pair is not None]


def real_images(source, indices, what):
    """Portions (indices (B,), uint8 images (B, H, W, 3)), in order, decoded by worker processes."""
    loader = torch.utils.data.DataLoader(Examples(source, indices), 100, num_workers=min(8, cores()),
                                         collate_fn=_readable)
    for number, portion in enumerate(loader, 1):
        progress(what, min(100 * number, len(indices)), len(indices))
        if portion:
            yield torch.tensor([i for i, _ in portion]), torch.stack([image for _, image in portion])


# ------------------------------------------------------------------------------------------ the sets that are compared

def described(portions, features):
    """What is measured of images that come as portions (indices, images): features with their Moments, colours."""
    outputs, moments, colours, patches, seen = [], Moments(), 0, [], []
    for indices, images in portions:
        seen.append(indices)
        output = features(images) if features else {}
        if features:
            moments.add(output["features"])
        outputs.append(output)
        colours = colours + colour_histogram(images)
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        patches.append(F.interpolate(x, (5, 5), mode="area")[:, :, [0, 0, 4, 4, 2], [0, 4, 0, 4, 2]])
    if sum(map(len, seen)) < 2:
        raise UserError(f"{sum(map(len, seen))} image(s) that can be read, of those to compare with: want 2 or more")
    whole = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    for name, values in whole.items():
        if not torch.isfinite(values).all():
            raise UserError(f"the network of features gives {name} that are not finite; nothing can be measured")
    spread = torch.cat(patches).std(0).mean()                             # of the colours of the corners and the middle
    return dict(whole, indices=torch.cat(seen), colours=colours, spread=spread, n=moments.n,
                mean=torch.as_tensor(moments.mean), scatter=torch.as_tensor(moments.scatter))


def moments_of(set_):
    moments = Moments()
    moments.n, moments.mean, moments.scatter = set_["n"], set_["mean"], set_["scatter"]
    return moments


class Yardstick:
    """What the samples of a run are measured with: features, and real images described by them.

    train: what the run learnt from. held_out: what it never saw (None if nobody has any). real: for drawn scenes more
    unseen ones, to be measured as if they were samples: what a perfect model would get at the same n.
    Kept in files in `folder`, beside the runs, so that runs on the same data share them and are measured alike. In
    another folder the network is trained anew, by the same recipe: distances by two networks are not to be compared.
    """

    def __init__(self, folder, config, n=2000, n_real=10_000, network=None, held_out=None, device="cpu", wanted=True):
        """folder: where files are kept. n: samples to come. n_real: real images of each kind. network: a TorchScript
        file. held_out: a folder of unseen images. wanted: False if no features will be asked for."""
        self.source = open_run(config, portrait=False)                    # upright images: cut to the others' shape
        if tuple(self.source.classes) != config.class_names:
            raise UserError(f"{config.data}: its classes are no longer those of the run")
        self.drawn = isinstance(self.source, Glyphs)
        self.unseen = None
        if self.drawn and held_out:
            raise UserError(f"--held-out {held_out}: not with {config.data}, of which unseen images are drawn")
        if held_out:
            seen, new = (os.path.realpath(path) for path in (config.data, held_out))
            if os.path.commonpath([seen, new]) in (seen, new):
                raise UserError(f"--held-out {held_out}: there are images in it that the run was trained on")
        if self.drawn:
            self.unseen = open_run(config, portrait=False, held_out=True)
        elif held_out:
            self.unseen = open_source(held_out, config.size)
        if len(self.source) < 2 or (self.unseen is not None and len(self.unseen) < 2):
            raise UserError(f"{config.data}: want two images or more to compare with")
        # The training images: those that came first in the run's own order.
        self.train_indices = Stream(self.source, config.seed).order(0)[:n_real]
        self.features, self.name, self.judge = None, "FD", ""             # judge: which network, as a fingerprint
        self.train, self.held_out, self.real = None, None, None
        if not wanted:
            return
        files = [file for source in (self.source, self.unseen) for file in getattr(source, "files", [])]
        files += [config.data] if isinstance(self.source, FontFile) else []
        kind = (*map(inspect.getsource, (data, fonts, decoding)), config.data, config.size,
                [(file, os.path.getsize(file), os.path.getmtime(file)) for file in files])
        if network:
            self.features = TorchScriptFeatures(network, device)
            with open(network, "rb") as file:
                self.judge = fingerprint(file.read())
        elif self.drawn:
            # One judge for all runs on such scenes of this size, whatever their seed and number.
            self.judge = fingerprint(*kind, inspect.getsource(GlyphNet), inspect.getsource(train_glyph_net))
            state = kept(os.path.join(folder, f"features-{self.judge}.pt"), lambda: self.trained(config))
            net = GlyphNet(scene_heads(self.source))
            net.load_state_dict(state["net"])
            self.features = GlyphFeatures(net, state["accuracy"], device)
            # The code alone would not tell the networks of two folders apart: their weights differ a little.
            self.judge = fingerprint(self.judge, *(values.numpy().tobytes() for values in state["net"].values()))
        self.name = self.features.name if self.features else "FD"
        world = (*kind, config.scenes, config.seed, config.withhold, self.judge)
        real = n if self.drawn else 0

        def measured():
            sets = {"train": described(real_images(self.source, self.train_indices, "training images"), self.features)}
            if self.unseen is not None:
                # Files come class by class, so a part of them is drawn by lot; drawn scenes are in no order.
                lot = range(len(self.unseen)) if self.drawn else Stream(self.unseen, config.seed).order(0)
                indices = lot[:n_real]
                sets["held_out"] = described(real_images(self.unseen, indices, "held-out images"), self.features)
            if real:
                indices = range(n_real, n_real + real)
                sets["real"] = described(real_images(self.unseen, indices, "more held-out images"), self.features)
            return sets
        code = (inspect.getsource(sys.modules[__name__]), inspect.getsource(measures))
        name = f"real-{fingerprint(*world, *code, n_real, real)}.pt"
        sets = kept(os.path.join(folder, name), measured)
        self.train, self.held_out, self.real = sets["train"], sets.get("held_out"), sets.get("real")

    def trained(self, config, scenes=16_000, check=3600):
        """GlyphNet's weights and the share of held-out characters that it reads."""
        source, unseen = (open_source(config.data, config.size, held_out=held_out) for held_out in (False, True))
        indices = np.arange(scenes)
        images = torch.cat([images for _, images in real_images(source, indices, "features: drawing scenes")])
        answers = [scene_answers(source, int(i)) for i in indices]
        heads = scene_heads(source)
        answers = {name: torch.tensor([answer[name] for answer in answers]) for name in heads}
        features, right = GlyphFeatures(train_glyph_net(images, answers, heads)), 0
        for indices, images in real_images(unseen, range(check), "features: checking"):
            truth = torch.tensor([unseen.label(i) for i in indices.tolist()])
            right += (features(images)["character"].argmax(1) == truth).sum().item()
        return dict(net=features.net.state_dict(), accuracy=right / check)

    def subjects(self, n, config, source=None):
        """What n samples are to show, as the examples of `source` (that of the run): dict of labels (-1: none), for a
        model with text captions and for scenes with captions answers, [(letter, ground), ...] numbers of colours.

        In equal numbers of each class for scenes, as they come in a folder.
        """
        source = source or self.source
        order = range(n) if self.drawn else np.random.default_rng(config.seed).integers(len(source), size=n).tolist()
        order = [i % len(source) for i in order]
        if not config.text_encoder:
            return dict(labels=[source.label(i) if config.num_classes else -1 for i in order])
        subjects = dict(labels=[source.label(i) for i in order], captions=[source.caption(i) for i in order])
        if self.drawn:
            answers = [scene_answers(source, i) for i in order]
            subjects["answers"] = [(answer["letter"], answer["ground"]) for answer in answers]
        return subjects
