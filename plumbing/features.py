"""The network that grades samples, and the real images that they are compared with.

Not from a paper; simple diffusion, section 5, measures FID against the training set and against held-out data.
Needs: measures.py, data.py. Next: evaluate.py.

The features decide what a Frechet distance means. Only Inception's features give "FID". We want no download, so we
train a small classifier on the drawn scenes (a minute, once). It learns to tell the letter, its style, both colours and
the texture of the ground, so its features see all that a scene consists of. Its distances compare runs on the same
scenes with each other and with real scenes. Never compare them with the FID of a paper.

Shapes: images uint8 (N, H, W, 3); features (N, D) float32; probabilities (N, classes).
"""
import functools
import os
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import data
from plumbing.images import BrokenImage
from data import FontFile, Glyphs, Stream
from plumbing import UserError
from measures import Moments, colour_histogram
from plumbing.runs import cores, load_file, progress
from plumbing.files import blame_machine, check_regular, fingerprint, reason_of, whole_file
from plumbing.motion import TURN, in_motion, one_frame, split_frames
from plumbing.pictures import to_uint8
from plumbing.sources import check_unseen, open_run, open_source, same_data
from plumbing.workers import load

FORMAT = 1                # of cached networks and descriptions; raise it when the code that makes them changes
MIN_ACCURACY = 0.98       # on held-out characters; a weak classifier cannot grade samples


# ------------------------------------------------------------------------------------------ networks

class GlyphNet(nn.Module):
    """The classifier of scenes: images (B, 3, H, W) in [-1, 1] -> features (B, 128), {head: logits (B, values)}."""

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


def scene_heads(source):
    """Return how many values each head of GlyphNet tells apart."""
    return dict(character=len(source.classes), texture=len(data.GROUNDS), letter=len(data.COLOURS),
                ground=len(data.COLOURS), style=len({style for _, style in source.fonts}))


def scene_answers(source, i):
    """Return the right answer of scene i for each head, as a number."""
    scene, colours = source.scene(i), list(data.COLOURS)
    return dict(character=source.label(i), texture=data.GROUNDS.index(scene["texture"]),
                letter=colours.index(scene["letter"]), ground=colours.index(scene["ground"]),
                style=sorted({style for _, style in source.fonts}).index(scene["style"]))


def scene_colours(images):
    """Name the colours of letter and ground from the pixels: uint8 (N, H, W, 3) -> two (N,) long, in COLOURS' order.

    Ground: each pixel of the rim votes for the colour that it, or its shade, is nearest to. Letter: the pixels of the
    middle vote, if they are nearer to a colour than to the ground, its shade and its shadow; only for colours that
    scenes have on such a ground. Right for each of 500 real scenes (tested).
    """
    if len(images) > 100:                                                 # the distances of all would fill the memory
        return [torch.cat(part) for part in zip(*map(scene_colours, images.split(100)))]
    palette = torch.tensor(list(data.COLOURS.values()))                   # (10, 3)
    light = torch.tensor([data.luminance(rgb) for rgb in data.COLOURS.values()])
    shade = torch.where(light[:, None] > 0.35, 0.8 * palette, palette + 0.2 * (1 - palette))    # as Glyphs.draw has it
    between = torch.stack([palette, (palette + shade) / 2, shade])        # (3, 10, 3) what a ground can look like
    height, width = images.shape[1:3]
    v, u = (((torch.arange(n) + 0.5 - n / 2) / min(height, width)).abs() for n in (height, width))
    from_middle = torch.maximum(v[:, None].expand(height, width), u[None].expand(height, width))
    pixels = images.float() / 255
    rim, middle = pixels[:, from_middle > 0.44], pixels[:, from_middle < 0.36]                  # (N, pixels, 3)

    def most_votes(votes, valid):                                         # (N, pixels), (N, pixels) -> (N,)
        return (F.one_hot(votes, 10) * valid[..., None]).sum(1).argmax(1)

    ground = torch.cdist(rim, between.flatten(0, 1)).argmin(2) % 10
    ground = most_votes(ground, torch.ones_like(ground))
    possible = ((light[:, None] - light).abs() > 0.3)[ground]             # (N, 10) colours of letters on this ground
    distance, letter = torch.cdist(middle, palette).masked_fill(~possible[:, None], torch.inf).min(2)
    grounds = torch.cat([between, 0.6 * between])[:, ground].transpose(0, 1)                    # (N, 6, 3)
    return most_votes(letter, distance < torch.cdist(middle, grounds).amin(2)), ground


def train_glyph_net(images, answers, heads, steps, batch=48, seed=0):
    """Train a GlyphNet on images uint8 (N, H, W, 3) with answers {head: (N,)}. Return it in evaluation mode.

    The images are shifted, changed in contrast and made noisy. A network that saw clean scenes alone would fail on
    samples, which are never quite clean.
    """
    torch.manual_seed(seed)
    net, rng = GlyphNet(heads).to(memory_format=torch.channels_last), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.02)
    learning_rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        i = torch.from_numpy(rng.integers(len(images), size=batch))
        x = images[i].permute(0, 3, 1, 2).float() / 127.5 - 1             # channels last: a third faster
        height, width = x.shape[-2:]
        shift = max(1, min(height, width) // 24)
        down, right = rng.integers(0, 2 * shift + 1, 2)
        x = F.pad(x, (shift,) * 4, mode="replicate")[..., down:down + height, right:right + width]
        x = x * (0.8 + 0.4 * torch.rand(batch, 1, 1, 1)) + 0.12 * torch.rand(batch, 1, 1, 1) * torch.randn_like(x)
        _, logits = net(x)
        loss = sum(F.cross_entropy(logits[name], answers[name][i]) for name in heads)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learning_rate.step()
        progress("features: training", step + 1, steps)
    return net.eval()


class GlyphFeatures:
    """Features by a GlyphNet. accuracy: its share of right answers on held-out characters."""
    name = "FD"

    def __init__(self, net, accuracy=None, device="cpu"):
        self.net, self.accuracy, self.device = net.to(device), accuracy, device

    @property
    def can_read(self):
        """True if it reads characters well enough to grade samples."""
        return self.accuracy >= MIN_ACCURACY

    @torch.no_grad()
    def __call__(self, images):
        """Return features (B, D) and the probabilities of each head (B, values), as a dict, of uint8 (B, H, W, 3)."""
        self.net.eval()                                                   # trap: batch norm left in training mode
        x = images.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        features, logits = self.net(x)
        return dict(features=features.cpu(), **{name: value.softmax(1).cpu() for name, value in logits.items()})


class TorchScriptFeatures:
    """Features by the user's TorchScript Inception.

    Images are resized to 299 x 299 as in Parmar et al. 2022 ("clean"): Pillow's bicubic, antialiased, in floating
    point, without rounding in between. The file is called with float (B, 3, 299, 299) in 0..255 and
    return_features=True, like the well-known inception-2015-12-05.pt. A second call without it gives its class
    probabilities, for the inception score.
    """
    name = "FID"
    can_read = False                                                      # its classes are not our characters

    def __init__(self, path, device="cpu"):
        try:
            self.net, self.device = torch.jit.load(path, map_location=device), device
        except Exception as error:                                        # a missing or foreign file fails in many ways
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise UserError(f"--features {path}: not a TorchScript file that can be loaded ({reason})") from None
        self.path = path

    @staticmethod
    def resized(images, side=299):
        """Resize uint8 (B, H, W, 3) -> float32 (B, 3, side, side) in 0..255."""
        planes = images.permute(0, 3, 1, 2).flatten(0, 1).numpy().astype(np.float32)            # Pillow: one plane each
        planes = [np.asarray(Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC)) for plane in planes]
        return torch.from_numpy(np.stack(planes)).clamp(0, 255).reshape(len(images), 3, side, side)

    @torch.no_grad()
    def __call__(self, images):
        """Return features (B, D) and probabilities of classes (B, classes), as a dict. Raises UserError."""
        self.net.eval()
        x = self.resized(images).to(self.device)
        try:
            features = self.net(x, return_features=True).float().flatten(1).cpu()
            try:
                # The original inception score leaves out the bias of the last layer. The well-known file can do so.
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


# ------------------------------------------------------------------------------------------ caches

def tensor_bytes(tensors):
    """Yield the bytes of each tensor, for fingerprint()."""
    for tensor in tensors:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def cached(path, compute, check):
    """Return the dict of tensors and numbers in a file. Compute and save it if it is missing or damaged.

    check: called on what the file holds. It raises an exception if that is not what compute() would give.
    """
    check_regular(path)
    if os.path.exists(path):
        try:
            value = load_file(path)
            check(value)
            return value
        except Exception as error:                                        # half a file fails in many ways
            blame_machine(path, error)
            print(f"{path}: damaged, computed again ({type(error).__name__})", file=sys.stderr)
    value = compute()
    save_cached(path, value)
    return value


def require(ok, what):
    """Raise ValueError unless ok."""
    if not ok:
        raise ValueError(f"{what}")


def check_network(net, state):
    """Raise an exception unless this is what Yardstick.trained gives, for a network like `net`."""
    net.load_state_dict(state["net"])
    require(type(state["accuracy"]) is float and 0 <= state["accuracy"] <= 1, "accuracy")
    require(all(torch.isfinite(value).all() for value in state["net"].values()), "net")


def save_cached(path, value):
    """Write the file of a cache. Raises UserError if it cannot be written."""
    try:
        with whole_file(path) as file:
            torch.save(value, file)
    except (OSError, RuntimeError) as error:                              # PyTorch's writer raises either
        raise UserError(f"{path}: cannot be written: {reason_of(error)}") from None


# ------------------------------------------------------------------------------------------ sets of images

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


def _readable(examples):                                                  # a lambda could not be sent to a worker
    return [example for example in examples if example is not None]


def real_images(source, indices, what):
    """Yield batches (indices (B,), images uint8 (B, H, W, 3)) in order. Worker processes decode them."""
    loaded = load(Examples(source, indices), batch_size=100, num_workers=min(8, cores()), collate_fn=_readable)
    for number, examples in enumerate(loaded, 1):
        progress(what, min(100 * number, len(indices)), len(indices))
        if examples:
            yield torch.tensor([i for i, _ in examples]), torch.stack([image for _, image in examples])


def describe(batches, network, frames=1):
    """Describe a set of images, as a dict: all that a comparison of two sets needs.

    batches    (indices (B,), images uint8 (B, H, W, 3))
    network    a GlyphNet or an Inception: features, with their mean and scatter, and probabilities. None: colours alone
    frames     more than one: each image is the strip of a video, whose frames count as images
    """
    outputs, moments, colours, patches, indices = [], Moments(), 0, [], []
    for numbers, images in batches:
        indices.append(numbers)
        images, output = split_frames(images, frames)
        if network:
            output |= network(images)
            moments.add(output["features"])
        outputs.append(output)
        colours = colours + colour_histogram(images)
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        patches.append(F.interpolate(x, (5, 5), mode="area")[:, :, [0, 0, 4, 4, 2], [0, 4, 0, 4, 2]])
    if (count := sum(map(len, indices))) < 2:
        raise UserError(f"{count} image(s) that can be read, of those to compare with: want 2 or more")
    outputs = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
    for name, values in outputs.items():
        if not torch.isfinite(values).all():
            raise UserError(f"the network of features gives {name} that are not finite; nothing can be measured")
    spread = torch.cat(patches).std(0).mean()                             # of the colours of the corners and the middle
    return dict(outputs, indices=torch.cat(indices), colours=colours, spread=spread, n=moments.n,
                mean=torch.as_tensor(moments.mean), scatter=torch.as_tensor(moments.scatter))


def moments_of(description):
    """Return the Moments of the features in what `describe` returned."""
    moments = Moments()
    moments.n, moments.mean, moments.scatter = (description[key] for key in ("n", "mean", "scatter"))
    return moments


def nearest_of(a, b):
    """Return for each feature of a (N, D) its Euclidean distance to the nearest of b (M, D), and the place of that.

    Exact: the faster way, by a matrix product, puts copies 0.03 apart. A thousand at a time, so N M numbers need not
    fit the memory.
    """
    distance, place = zip(*(torch.cdist(part, b, compute_mode="donot_use_mm_for_euclid_dist").min(1)
                            for part in a.split(1000)))
    return torch.cat(distance), torch.cat(place)


# ------------------------------------------------------------------------------------------ the yardstick

class Yardstick:
    """What the samples of a run are measured with: a network, and real images that it describes.

    source, held_out_source    the training images; images that the run never saw (None if there are none)
    train, held_out            their descriptions, as `describe` returns them
    real_scenes                drawn scenes only: the description of n more held-out scenes. Scored like samples, they
                               show what a perfect model would get at the same n.
    network, network_id        what computes the features (None for images without --features), and its fingerprint

    The network and the descriptions are cached in `folder`, beside the runs, so runs on the same data share them. In
    another folder the network is trained again by the same recipe, and its weights differ a little: do not compare
    distances by two networks.
    """

    def __init__(self, folder, config, n=2000, n_real=10_000, features_file=None, held_out=None, device="cpu",
                 only_sources=False):
        """n: number of samples to come. n_real: real images of each kind. features_file: a TorchScript Inception.
        held_out: a folder of images that the run never saw. only_sources: no network and no descriptions are needed."""
        self.folder, self.config, self.n, self.n_real = folder, config, n, n_real
        self.source = open_run(config, portrait=False)                    # upright images: cut to the others' shape
        self.is_drawn, self.frames = isinstance(self.source, Glyphs), config.counts[0]
        self.held_out_source = self._open_held_out(held_out)
        self.network, self.network_id, self.distance_name = None, "", "FD"
        self.train, self.held_out, self.real_scenes = None, None, None
        if only_sources:
            return
        for source, place in ((self.source, config.data), (self.held_out_source, held_out)):
            if source is not None and len(source) < 2:
                raise UserError(f"{place}: want two images or more to compare with")
        files = [file for source in (self.source, self.held_out_source) for file in getattr(source, "files", [])]
        files += [self.source.fonts[0][0]] if isinstance(self.source, FontFile) else []
        files = [(file, os.path.getsize(file), os.path.getmtime(file)) for file in files]
        frames = [f"{self.frames} frames in turn, {TURN}"] if self.frames > 1 else []
        data_id = fingerprint(FORMAT, config.data, config.size, files, *config.characters, *frames)
        self._open_network(features_file, data_id, device)
        name = fingerprint(data_id, config.scenes, config.seed, config.withhold, self.network_id, n_real,
                           n if self.is_drawn else 0)
        descriptions = cached(os.path.join(folder, f"real-{name}.pt"), self._describe_real,
                              self._check_descriptions)
        self.train, self.held_out = descriptions["train"], descriptions.get("held_out")
        self.real_scenes = descriptions.get("real_scenes")

    def _open_held_out(self, folder):
        """Check the sources and return that of held-out images, or None. Raises UserError."""
        config, held_out = self.config, None
        same_data(config, self.source)
        if self.is_drawn and folder:
            raise UserError(f"--held-out {folder}: not with {config.data}, of which unseen images are drawn")
        if folder:
            check_unseen(config.data, folder)
        if self.is_drawn:
            held_out = open_run(config, portrait=False, held_out=True)
        elif folder:
            held_out = open_source(folder, config.size)
        return held_out

    def _open_network(self, features_file, data_id, device):
        """Open the user's network, or for drawn scenes ours, which is trained if it is not in the cache."""
        if features_file:
            self.network = TorchScriptFeatures(features_file, device)
            with open(features_file, "rb") as file:
                self.network_id = fingerprint(file.read())
        elif self.is_drawn:
            # One network for all runs on scenes of this kind and size, whatever their seed and number.
            path = os.path.join(self.folder, f"features-{data_id}.pt")
            net = GlyphNet(scene_heads(self.source))
            state = cached(path, lambda: self.trained(self.config), functools.partial(check_network, net))
            net.load_state_dict(state["net"])
            self.network = GlyphFeatures(net, state["accuracy"], device)
            self.network_id = fingerprint(*tensor_bytes(state["net"].values()))
        if self.network:
            self.distance_name = self.network.name

    def trained(self, config, scenes=16_000, check=3600):
        """Train our network. Return its weights, and its share of right answers on held-out characters."""
        source, unseen = (one_frame(in_motion(open_source(config.data, config.size, held_out=held_out,
                                                          characters=config.characters), self.frames))
                          for held_out in (False, True))
        indices = np.arange(scenes)
        images = torch.cat([images for _, images in real_images(source, indices, "features: drawing scenes")])
        answers = [scene_answers(source, int(i)) for i in indices]
        heads = scene_heads(source)
        answers = {name: torch.tensor([answer[name] for answer in answers]) for name in heads}
        steps = 1800 if self.frames > 1 else 900                          # letters that turn are harder to read
        network, right = GlyphFeatures(train_glyph_net(images, answers, heads, steps)), 0
        for indices, images in real_images(unseen, range(check), "features: checking"):
            labels = torch.tensor([unseen.label(i) for i in indices.tolist()])
            right += (network(images)["character"].argmax(1) == labels).sum().item()
        return dict(net=network.net.state_dict(), accuracy=right / check)

    def _describe_real(self):
        """Describe the real images: {"train": description, ...}. Of videos: a frame of each, and real_scenes whole."""
        # The training images that the run saw first.
        indices = Stream(self.source, self.config.seed).order(0)[:self.n_real]
        sets = {"train": describe(real_images(one_frame(self.source), indices, "training images"), self.network)}
        unseen = self.held_out_source
        if unseen is not None:
            # Files come class by class, so we take a random part of them. Drawn scenes are in no order.
            order = range(len(unseen)) if self.is_drawn else Stream(unseen, self.config.seed).order(0)
            sets["held_out"] = describe(real_images(one_frame(unseen), order[:self.n_real], "held-out images"),
                                        self.network)
        if self.is_drawn:
            indices = range(self.n_real, self.n_real + self.n)
            sets["real_scenes"] = self.describe(real_images(unseen, indices, "more held-out images"))
        return sets

    def describe(self, batches):
        """Describe samples, or real scenes in their place: (indices (B,), uint8 (B, H, W, 3)), of videos the strips."""
        return describe(batches, self.network, self.frames)

    def _check_descriptions(self, sets):
        """Raise an exception unless these are descriptions of the sets that _describe_real describes."""
        wanted = {"train", *["held_out"] * (self.held_out_source is not None), *["real_scenes"] * self.is_drawn}
        require(sets.keys() == wanted, sets.keys())
        for description in sets.values():
            n = len(description["indices"])
            for name, value in description.items():
                require(name == "n" or torch.isfinite(value).all(), name)
                require(name not in ("features", "character") or len(value) in (n, n * self.frames), name)
            shapes = [tuple(description[name].shape) for name in ("mean", "scatter", "spread")]
            require(type(description["n"]) is int and shapes[1] == shapes[0] * 2 and shapes[2] == (), shapes)
            require(bool(self.network) == ("features" in description), "features")
            require(description["indices"].dtype == torch.long and description["colours"].ndim == 1, "indices")
        require(0 <= sets["train"]["indices"].min() and sets["train"]["indices"].max() < len(self.source), "indices")

    def prompts(self, source=None):
        """Return what n samples are to show, taken from examples of `source` (default: the training images).

        A dict: labels (-1 = none); for a model with text also captions; for scenes with captions also answers, the
        numbers of the colours [(letter, ground), ...]. Scenes have each class equally often, a folder as it comes.
        """
        source = source or self.source
        if self.is_drawn:
            indices = range(self.n)
        else:
            indices = np.random.default_rng(self.config.seed).integers(len(source), size=self.n).tolist()
        indices = [i % len(source) for i in indices]
        if not self.config.text_encoder:
            return dict(labels=[source.label(i) if self.config.num_classes else -1 for i in indices])
        prompts = dict(labels=[source.label(i) for i in indices], captions=[source.caption(i) for i in indices])
        if self.is_drawn:
            prompts["answers"] = colour_answers(source, indices)
        return prompts


def colour_answers(source, indices):
    """Return the colours of these scenes as numbers, [(letter, ground), ...]."""
    answers = [scene_answers(source, i) for i in indices]
    return [(answer["letter"], answer["ground"]) for answer in answers]
