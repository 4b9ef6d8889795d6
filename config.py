"""Every setting with its unit and its source, the named presets, and what is built from them.

Paper: simple diffusion, appendix B (settings); Matryoshka's released configurations; Cascaded Diffusion, appendix B.
Needs: unet.py, uvit.py, text.py, nested_unet.py, video.py, cascade.py, precondition.py. Next: data.py.

`Config` is one flat block. A field is a flag of train.py (--lr 1e-4), and the comment behind it is the help of that
flag; nine fields are set from the data or by distill.py. A preset is a Config: `PRESETS` has one for each row of the
papers' tables, and small ones for a laptop.
"""
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from cascade import SuperResolutionUNet
from dwt import patch_factor
from nested_unet import NestedUNet, level_schedules
from plumbing import UserError
from precondition import Preconditioned
from schedule import logsnr_cosine, logsnr_interpolated, logsnr_shifted
from text import ByteEncoder, TextCondition
from unet import UNet
from uvit import UViT
from video import Video, attend_over_time, video_pyramid


@dataclass(frozen=True)
class Config:
    # data
    data: str = "glyphs"                 # glyphs (scenes drawn on the fly), a font file, or a folder of images
    characters: str = ""                 # the classes of a font file or of glyphs; empty = every character it draws
    size: tuple[int, ...] = (64, 64)     # px: height,width of the images; one number: square
    scenes: int = 100_000                # number of different training scenes, of glyphs or a font file
    held_out: str = ""                   # folder of images never trained on, for the held-out loss; scenes need none
    flip: bool = False                   # mirror half of the images left to right (wrong for letters)
    withhold: bool = False               # drawn scenes: never train on a fifth of the pairs of character and colour
    num_classes: int = 36                # set from the data: number of classes, ImageNet 1000; 0 for models with text
    # process (simple diffusion 3.1, A)
    schedule: Literal["cosine", "shifted", "interpolated"] = "shifted"  # log-SNR as a function of time t
    noise_d: float = 64                  # px: image side at which the plain cosine holds; interpolated: the low one
    noise_d_high: float = 256            # px: noise_d of the interpolated schedule at its clean end, t = 0
    logsnr_min: float = -15.0            # log-SNR of the cosine at t = 1, before the shift
    logsnr_max: float = 15.0             # log-SNR of the cosine at t = 0, before the shift
    # loss (2, 3.2, A)
    loss: Literal["eps_mse", "v_mse", "band_mse"] = "eps_mse"  # error of eps (paper: U-Net), of v (U-ViT), by band
    multiscale: int = 0                  # px: base of the multiscale loss, its smallest side, paper 32; 0 = off
    precondition: Literal["none", "bands"] = "none"  # bands: the network predicts what is left of v (precondition.py)
    cond_drop: float = 0.1               # share of examples trained without their class or caption
    # network (B.1, B.2)
    model: Literal["unet", "uvit"] = "uvit"  # network of unet.py or of uvit.py
    patching: str = "none"               # first reduction of the image: none, or dwt_1, dwt_2, conv_2, conv_4, ...
    base_channels: int = 128             # width that channel_mult multiplies
    emb_channels: int = 1024             # width of the embedding of log-SNR and conditions
    channel_mult: tuple[int, ...] = (1, 2, 4, 8, 8)    # width of each level, finest first; U-ViT: last = transformer
    num_res_blocks: tuple[int, ...] = (3, 4, 4, 12, 4)  # ResBlocks of each level on the way down, finest first
    num_transformer_blocks: int = 36     # U-ViT: transformer blocks at the bottom
    attn_resolutions: tuple[int, ...] = (8, 16)  # U-Net: sides of the maps with attention
    attn_layers: tuple[int, ...] = ()    # instead, Matryoshka's U-Net: attention layers by level; its heads start at 0
    num_heads: int = 4                   # heads of every attention layer
    dropout: float = 0.1                 # dropout in ResBlocks
    dropout_from_resolution: int = 16    # largest side of the maps whose ResBlocks have dropout; 0 = none
    transformer_dropout: float = 0.2     # U-ViT: dropout in MLP blocks
    position_std: float = 0.01           # U-ViT: std of the position embedding at initialisation
    # text and shape (3.6)
    text_encoder: str = ""               # empty: classes; bytes: small, trained here; else the name or folder of a T5
    text_channels: int = 128             # width of the text embeddings; t5-v1_1-xxl 4096, flan-t5-xl 2048
    text_length: int = 128               # largest number of tokens (or bytes) of a caption; the rest is cut off
    text_layers: int = 2                 # transformer layers of the byte encoder
    text_pooled: bool = True             # add the pooled text to the embedding of log-SNR, besides cross-attention
    transformer_resolutions: tuple[int, ...] = ()  # U-ViT: sides of maps with self-attention for ResBlocks; text: 32
    guidance_max: float = 0.0            # largest guidance scale that a distilled model takes as a condition; 0 = none
    portrait: bool = False               # turn upright images on their side, and tell the model so by a portrait flag
    # nested levels (Matryoshka 3): the network above is the innermost. Levels are separated by "/", the highest first
    outer_channels: str = ""             # widths of the maps, level by level: 32,32,64/64,128,256; empty = not nested
    outer_blocks: str = ""               # ResBlocks at each of these widths: 2,2,1/2,2,1
    outer_patching: str = "none"         # first reduction of the image in every outer level, like --patching
    frames: str = ""                     # frames of a video, level by level (video.py), like 16:16:1; empty = images
    level_power: float = 2.0             # p: log-SNR of a level is p log k below the lowest's; simple diffusion: 2
    level_weights: str = ""              # weights of the levels' losses, highest first: 16:4:1; empty = equal
    mixed_ratio: str = ""                # 2:1: two thirds of a batch have the high level, all have the low; empty: all
    grow_from: str = ""                  # run whose weights initialise the inner network
    init_from: str = ""                  # run, or pretrained/NAME, whose EMA weights initialise the whole network
    # a super-resolution stage of a cascade (CDM 3)
    low_size: tuple[int, ...] = ()       # px: height,width of the low-res image to start from; empty = no such stage
    low_upsample: Literal["bilinear", "bicubic"] = "bilinear"  # interpolation of the low-res image to full size
    aug_noise: float = 0.9               # share of examples whose low-res image gets noise, of a level s ~ U(0, 1)
    aug_blur: float = 0.0                # share of examples whose low-res image is blurred; paper: 0.5 from 128 px up
    blur_low: float = 0.4                # low-res px: smallest sigma of the blur
    blur_high: float = 0.6               # low-res px: largest sigma of the blur
    # optimisation (B.1, B.2)
    batch: int = 512                     # images a step, over all processes
    steps: int = 2_000_000               # optimizer steps
    lr: float = 5e-5                     # Adam: learning rate
    text_lr: float = 1.0                 # Adam: learning rate of text.py's layers, as a share of lr; papers: one rate
    warmup: int = 10_000                 # steps of linear warm-up of the learning rate
    lr_decay: float = 0.0                # share of the steps, the last ones, in which the learning rate falls to 0
    beta1: float = 0.9                   # Adam: decay of the running mean of the gradient
    beta2: float = 0.99                  # Adam: decay of the running mean of its square; 0.999 for ImageNet 128
    adam_eps: float = 1e-12              # Adam: added to the denominator
    weight_decay: float = 0.0            # Adam: weight decay
    clip: float = 1.0                    # largest norm of the gradient
    ema: float = 0.9999                  # decay of the EMA weights; samples come from these weights
    # sampling, in training and as the defaults of sample.py (A)
    sampler: Literal["ddpm", "ddim", "stochastic"] = "ddpm"  # ancestral (paper), deterministic, or for distilled models
    sample_steps: int = 256              # network evaluations of an image; guidance doubles them
    guidance: float = 1.0                # guidance scale w = 1 + eta of eq. 7; 1 = off
    noise_param: float = 0.2             # nu: log variance of the DDPM step, from its lower (0) to its upper bound (1)
    clip_x: Literal["static", "dynamic", "none"] = "static"  # how the predicted image is clipped at every step
    # running
    seed: int = 0                        # seed of everything random
    workers: int = -1                    # processes that load images; -1 = choose
    precision: Literal["auto", "float32", "bf16"] = "auto"  # bf16: autocast; auto: the faster one here
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: with CUDA, for 20,000 steps or more
    channels_last: Literal["auto", "on", "off"] = "auto"  # memory format of the maps; auto: on with CUDA
    accumulate: int = 1                  # micro-batches into which each process splits its batch, to save memory
    recompute: bool = False              # activation checkpointing: backward recomputes the activations inside blocks
    shard: bool = False                  # shard weights, gradients, optimizer state and EMA weights over the processes
    if_unsaved: Literal["stop", "go-on"] = "stop"  # what to do when a checkpoint cannot be written (full disk)
    log_every: int = 20                  # steps between rows of the log
    held_out_every: int = 1000           # steps between measurements of the held-out loss; 0 = never
    sample_every: int = 50_000           # steps between sheets, quick ones before the first; 0 = only at the end
    save_every: int = 10_000             # steps between checkpoints
    keep_every: int = 0                  # steps between checkpoints that stay, for curves; 0 = only the last two stay
    distilled_from: str = ""             # set by distill.py: the teacher's run and its step
    distilled_steps: int = 0             # set by distill.py: number of sampling steps that it learned; 0 = any
    distill_weight: Literal["", "constant", "snr", "truncated_snr", "snr+1"] = ""  # set by distill.py: of the loss
    band_rms: str = ""                   # set from the data, for precondition: 0.64,0.08,0.09,0.04/0.6, level by level
    data_id: str = ""                    # set from the data: a fingerprint, so that a resumed run finds the same
    class_names: tuple[str, ...] = ()    # set from the data: names of the classes
    examples: tuple[str, ...] = ()       # set from the data: captions that the sheets of samples show

    @property
    def guidable(self):
        """True if the model has a condition that guidance can drop."""
        return bool(self.num_classes or self.text_encoder)

    @property
    def evaluations(self):
        """Network evaluations a sampling step: two with guidance, one if the guidance scale is a condition."""
        return 2 if self.guidable and self.guidance != 1 and not self.guidance_max else 1

    @property
    def is_nested(self):
        """True if the model has several levels (nested_unet.py)."""
        return bool(self.outer_channels)

    @property
    def rms(self):
        """band_rms as numbers, [[s, ...] of a level, ...], highest first; [] without preconditioning."""
        return [[float(s) for s in level.split(",")] for level in parts(self.band_rms)]

    @property
    def counts(self):
        """[T, ...] of the levels, highest first: the frames of a video; an image has one."""
        return numbers(self.frames, ":") or [1] * (1 + len(parts(self.outer_channels)))

    @property
    def shapes(self):
        """[(C, H, W), ...] of x, z and v at the levels, highest first. The frames of a video are channels."""
        return [(3 * count, *size) for count, size in zip(self.counts, self.sizes)]

    @property
    def sizes(self):
        """[(H, W), ...] of the levels, highest first; a plain model has one. Raises ValueError if they do not fit.

        The widths of the outer levels decide: a level's coarsest map is as large as the first map of the level below.
        """
        outer = [numbers(level, ",") for level in parts(self.outer_channels)]
        patchings = [self.outer_patching] * len(outer) + [self.patching]
        sizes = [tuple(self.size)]
        for widths, patching, patching_below in zip(outer, patchings, patchings[1:]):
            height, width = sizes[-1]
            down = patch_factor(patching) * 2 ** (len(widths) - 1)        # from a level's image to its coarsest map
            up = patch_factor(patching_below)                             # from that map to the image of the next level
            if height * up % down or width * up % down:
                raise ValueError(f"size {self.size[0]}x{self.size[1]}: level {height}x{width} does not divide by "
                                 f"{down // up or 1}")
            sizes.append((height * up // down, width * up // down))
            if up > down or (up == down and not self.frames):             # a video's level may have fewer frames only
                raise ValueError(f"level {sizes[-1][0]}x{sizes[-1][1]} is not below {height}x{width}: give the outer "
                                 "level more widths, or the inner one less patching")
        return sizes


def parts(text):
    """Split the levels: "a/b" -> ["a", "b"], "" -> []."""
    return text.split("/") if text else []


def numbers(text, separator):
    """Read whole numbers: "2:1" -> [2, 1], "" -> []. Raise ValueError if one is not positive."""
    values = [int(part) for part in text.split(separator)] if text else []
    if any(value < 1 for value in values):
        raise ValueError(f"{text}: want positive whole numbers")
    return values


# ------------------------------------------------------------------------------------------ what a Config builds

def make_schedules(config):
    """Return the functions t -> logsnr of the levels, highest first. A plain model has one."""
    height, width = config.sizes[-1]
    image_d = math.sqrt(height * width)                                   # of the lowest level
    ends = dict(logsnr_min=config.logsnr_min, logsnr_max=config.logsnr_max)
    base = {
        "cosine": partial(logsnr_cosine, **ends),
        "shifted": partial(logsnr_shifted, image_d=image_d, noise_d=config.noise_d, **ends),
        "interpolated": partial(logsnr_interpolated, image_d=image_d, noise_d_low=config.noise_d,
                                noise_d_high=config.noise_d_high, **ends),
    }[config.schedule]
    return level_schedules(base, config.sizes, config.level_power) if config.is_nested else [base]


def make_schedule(config):
    """Return what the loss and sample() take: one schedule for a plain model, a list for a nested one."""
    return make_schedules(config) if config.is_nested else make_schedules(config)[0]


def make_levels(config, x):
    """Return the levels of images or videos x (B, C, H, W), highest first. A plain model has one, x itself."""
    return video_pyramid(x, config.sizes, config.counts)


def make_low_schedule(config):
    """Return the schedule of the noise on a super-resolution model's low-res image: that of the stage below."""
    return make_schedule(replace(config, size=config.low_size, low_size=()))


def end_points(schedule):
    """Return log-SNR at t = 1 and at t = 0: the range that a network embeds. "Care needs to be taken" (appendix A)."""
    with torch.device("cpu"):                                             # the default device may be "meta"
        return schedule(torch.tensor([1.0, 0.0])).tolist()


def build_model(config):
    """Return the network on torch's default device. Raise UserError for sizes that do not fit together."""
    try:
        network = plain_network(config)
        if config.low_size:
            low_ends = end_points(make_low_schedule(config))
            network = SuperResolutionUNet(network, config.low_size, low_ends, config.emb_channels, config.low_upsample)
        for level in reversed(range(len(config.sizes) - 1)):              # from the inside out
            network = NestedUNet(network, outer_network(config, level))
        if config.frames:
            network = Video(attend_over_time(network, config.counts, config.num_heads), config.counts)
        return Preconditioned(network, config.rms, config.counts) if config.rms else network
    except ValueError as error:
        raise UserError(str(error)) from None


def plain_network(config):
    """Return the U-Net or U-ViT of a plain model; of a nested one, the innermost network."""
    logsnr_min, logsnr_max = end_points(make_schedules(config)[-1])             # the shift moves both ends
    common = dict(
        size=config.sizes[-1], base_channels=config.base_channels, emb_channels=config.emb_channels,
        channel_mult=config.channel_mult, num_res_blocks=config.num_res_blocks, patching=config.patching,
        num_heads=config.num_heads, dropout=config.dropout, dropout_from_resolution=config.dropout_from_resolution,
        logsnr_min=logsnr_min, logsnr_max=logsnr_max, num_classes=config.num_classes, portrait=config.portrait,
        guidance_max=config.guidance_max, text=text_condition(config),
        text_channels=config.text_channels if config.text_encoder else 0,
        in_channels=6 if config.low_size else 3)                          # z, and the up-sampled low-res image
    if config.model == "unet":
        return UNet(attn_resolutions=config.attn_resolutions, attn_layers=config.attn_layers,
                    zero_head=bool(config.attn_layers), **common)         # all of a Matryoshka U-Net
    return UViT(num_transformer_blocks=config.num_transformer_blocks, transformer_dropout=config.transformer_dropout,
                transformer_resolutions=config.transformer_resolutions, position_std=config.position_std, **common)


def text_condition(config):
    """Return the module that reads the captions, None for a model without text. A T5 stays outside of the model."""
    if not config.text_encoder:
        return None
    encoder = (ByteEncoder(config.text_channels, config.text_length, config.text_layers, config.num_heads)
               if config.text_encoder == "bytes" else None)
    return TextCondition(config.text_channels, config.emb_channels, encoder, config.text_pooled)


def outer_network(config, level):
    """Return the U-Net of an outer level, 0 = the highest. It has no attention, no classes and no middle."""
    logsnr_min, logsnr_max = end_points(make_schedules(config)[level])
    return UNet(
        size=config.sizes[level], base_channels=1, emb_channels=config.emb_channels,
        channel_mult=numbers(parts(config.outer_channels)[level], ","),
        num_res_blocks=numbers(parts(config.outer_blocks)[level], ","), patching=config.outer_patching,
        num_heads=config.num_heads, dropout=config.dropout, dropout_from_resolution=config.dropout_from_resolution,
        logsnr_min=logsnr_min, logsnr_max=logsnr_max, num_classes=None, attn_resolutions=(), middle=False,
        zero_head=bool(config.attn_layers))


def parameter_groups(model, config):
    """Return the parameters for Adam. Those that read the text (text.py) are a group with a rate of their own, text_lr.

    The papers' models have one rate. The laptop's models learn the text's layers at a tenth of it. At first words are
    only noise to the network. All words share these layers, so at the full rate they learn within a few hundred steps
    to output nothing (benchmarks/NOTEBOOK.md). A table of classes has no such layers.
    """
    of_text = {id(p) for module in model.modules() if isinstance(module, TextCondition) for p in module.parameters()}
    groups = [dict(params=[p for p in model.parameters() if id(p) not in of_text])]
    if of_text:
        groups.append(dict(params=[p for p in model.parameters() if id(p) in of_text], share=config.text_lr))
    return groups


def make_optimizer(model, config):
    """Return Adam with the settings of appendix B, as one kernel (fused)."""
    return torch.optim.Adam(parameter_groups(model, config), lr=config.lr, betas=(config.beta1, config.beta2),
                            eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)


# ------------------------------------------------------------------------------------------ presets
# What the rows of one table share comes first. Then each line of PRESETS is a row of its table.
# data="" has no default: the user names a folder with --data.

GLYPHS = Config(
    model="uvit", patching="dwt_1", base_channels=32, emb_channels=256, channel_mult=(1, 3, 6), num_res_blocks=(1, 1),
    num_transformer_blocks=4, dropout=0.0, transformer_dropout=0.0, position_std=1.0, loss="band_mse", noise_d=32,
    precondition="bands", batch=8, steps=6400, lr=1.1e-3, text_lr=0.1, lr_decay=0.5, warmup=200, ema=0.998,
    sampler="ddim", sample_steps=24, guidance=3.0, held_out_every=200, sample_every=1600, save_every=1600)
GLYPHS_16PX = dict(patching="none", base_channels=96, channel_mult=(1, 2), num_res_blocks=(1,))   # alone or innermost
GLYPHS_32PX = replace(GLYPHS, size=(32, 32), base_channels=96, channel_mult=(1, 2), num_res_blocks=(1,))

# Simple diffusion, B.1 and B.2.
# Paper: silent on mirroring. We mirror half of the images.
# Paper: B.1 and 5.1 advise shift 64. But the U-Nets of table 7 at 128 and 256 are the rows of table 2 with shift 32
# (--noise-d 32), and the one at 512 is the row of table 6 with the multiscale loss (--multiscale 32).
# Paper: B.2 names no schedule. Shift 64 is our choice.
UNET = Config(data="", num_classes=1000, model="unet", flip=True)
UVIT = replace(UNET, model="uvit", loss="v_mse", batch=2048, lr=1e-4, steps=500_000, channel_mult=(1, 2, 4, 16),
               num_res_blocks=(2, 2, 2), dropout=0.0)


def unet_row(side, patching, channel_mult, num_res_blocks, **others):
    """Return a row of the U-Net table in B.1."""
    return replace(UNET, size=(side, side), patching=patching, channel_mult=channel_mult, num_res_blocks=num_res_blocks,
                   **others)


# Text to image, 3.6 and B: "the text to image model was trained for 700K steps". The interpolated schedule of 3.1 has
# one example, 512 px from 32 to 256. Unverified: noise_d_high at other sizes (half the side here), and the settings
# of the sampler.
T2I = replace(UVIT, num_classes=0, text_encoder="google/t5-v1_1-xxl", text_channels=4096, text_length=128, flip=False,
              transformer_resolutions=(32,), schedule="interpolated", noise_d=32, steps=700_000, guidance=4.0,
              clip_x="dynamic")

# Matryoshka: its released configurations; nested_unet.py lists what differs in the network. We train on ImageNet with
# classes, with the optimizer settings of its authors' next paper (Kaleido, appendix B). Unverified: batch and steps of
# each phase in the paper, and how often it drops the condition (we: 10 %). Also unverified: the released code may not
# read the mixed ratio of mdm256 and the loss weights of mdm1024, which stand at the top level of its files.
# Paper: its log-SNR is a discrete squared cosine from +10 to -20 over 1000 steps. Ours is simple diffusion's, +-15.
# Paper: it goes down by strided 3x3 convolutions, and up by repeating pixels and convolving. We average and convolve,
# and convolve before we repeat, as everywhere here.
MDM = replace(UNET, base_channels=256, channel_mult=(1, 2, 3), num_res_blocks=(2, 2, 2), attn_layers=(0, 1, 5),
              num_heads=8, dropout=0.0, dropout_from_resolution=0, lr=1e-4, adam_eps=1e-8, clip=2.0, steps=400_000,
              sample_steps=250)

# Cascaded Diffusion: its appendix B, from notes on the paper. We simplify: our continuous process takes the place of
# discrete times and learned variances. Unverified: its schedules (cosine everywhere here), and what we take from simple
# diffusion: Adam's betas and eps, warm-up, gradient clipping, 10 % of the labels dropped.
CDM = replace(UNET, flip=False, schedule="cosine", base_channels=256, channel_mult=(1, 2, 3, 4), num_heads=4,
              attn_resolutions=(8, 16), dropout=0.1, dropout_from_resolution=64, batch=2048, lr=1e-4)
CDM_HIGH = replace(CDM, base_channels=128, attn_resolutions=(16,), num_heads=1, dropout=0.0, dropout_from_resolution=0,
                   batch=1024, steps=500_000, sample_steps=100, aug_noise=0.0, aug_blur=0.5)

PRESETS = {
    # letters of 16 px, the shortest run: two cores, a minute and a half with bf16
    "minute": replace(GLYPHS, size=(16, 16), patching="none", base_channels=64, channel_mult=(1, 2),
                      num_res_blocks=(1,), loss="v_mse", batch=16, steps=1350, lr=2e-3, warmup=50, ema=0.99,
                      guidance=4.0, sample_every=675),

    # letters: two cores, ten minutes
    "glyphs64": GLYPHS,
    "faces64": replace(                                                   # faces, animals, chess pieces
        GLYPHS, data="DejaVuSans.ttf",
        characters="😀😂😆😇😈😉😋😍😎😐😛😠😭😱😴😵😶"
                   "😷😸😻😾🙀🐭🐮🐵♚♛♜♝♞♟☻☠♥★☂"),
    "glyphs64_unet": replace(GLYPHS, model="unet", num_res_blocks=(1, 1, 2), attn_resolutions=(8,)),
    "glyphs16": replace(GLYPHS, **GLYPHS_16PX, size=(16, 16)),
    "glyphs64_nested": replace(GLYPHS, **GLYPHS_16PX, outer_channels="32,64", outer_blocks="1,1",
                               outer_patching="dwt_1"),
    # one frame of 32 px, then eight frames that move (video.py); glyphs32 is its lowest level alone
    "glyphs32": GLYPHS_32PX,
    "glyphs32_video": replace(GLYPHS_32PX, frames="8:1", outer_channels="64", outer_blocks="1", outer_patching="dwt_1",
                              batch=4, lr=8e-4, steps=4800, sample_every=2400, save_every=1200, sampler="ddpm"),
    "glyphs64_sr": replace(GLYPHS, low_size=(16, 16), guidance=1.0),
    "glyphs64_text": replace(
        GLYPHS, num_classes=0, text_encoder="bytes", text_length=48, withhold=True, schedule="interpolated",
        noise_d=32, noise_d_high=64, guidance=3.0, steps=10_400, sample_every=2600, save_every=2600),

    # ImageNet, B.1. The 512 px rows are those of table 5; the paper's own model is dwt2. Another --size alone moves the
    # twelve blocks away from the 16x16 maps. PAPERS.md has a command for the 1024 px of appendix C.
    #                                  side patching  channel_mult           num_res_blocks
    "imagenet128_unet":       unet_row(128, "none",   (1, 2, 4, 8, 8),       (3, 4, 4, 12, 4),
                                       beta2=0.999, steps=1_500_000),
    "imagenet256_unet":       unet_row(256, "none",   (1, 1, 2, 4, 8, 8),    (1, 2, 2, 4, 12, 4)),
    "imagenet512_unet":       unet_row(512, "none",   (1, 1, 1, 2, 4, 8, 8), (1, 1, 2, 2, 4, 12, 4)),
    "imagenet512_unet_dwt1":  unet_row(512, "dwt_1",  (1, 2, 2, 4, 8, 8),    (2, 2, 2, 4, 12, 4)),
    "imagenet512_unet_conv2": unet_row(512, "conv_2", (1, 2, 2, 4, 8, 8),    (2, 2, 2, 4, 12, 4)),
    "imagenet512_unet_dwt2":  unet_row(512, "dwt_2",  (2, 3, 4, 8, 8),       (3, 3, 4, 12, 4)),
    "imagenet512_unet_conv4": unet_row(512, "conv_4", (2, 3, 4, 8, 8),       (3, 3, 4, 12, 4)),

    # ImageNet, B.2
    "imagenet128_uvit": replace(UVIT, size=(128, 128), patching="none"),
    "imagenet256_uvit": replace(UVIT, size=(256, 256), patching="dwt_1"),
    "imagenet512_uvit": replace(UVIT, size=(512, 512), patching="dwt_2"),

    # text to image, 3.6
    "t2i256_uvit":     replace(T2I, size=(256, 256), patching="dwt_1", noise_d_high=128),
    "t2i512_uvit":     replace(T2I, size=(512, 512), patching="dwt_2", noise_d_high=256),
    "t2i384x640_uvit": replace(T2I, size=(384, 640), patching="dwt_2", noise_d_high=256, portrait=True),

    # Matryoshka
    "mdm64":   replace(MDM, size=(64, 64)),
    "mdm256":  replace(MDM, size=(256, 256), outer_channels="64,128,256", outer_blocks="2,2,1", level_power=1.0,
                       mixed_ratio="2:1"),
    "mdm1024": replace(MDM, size=(1024, 1024), outer_channels="32,32,64/64,128,256", outer_blocks="2,2,1/2,2,1",
                       level_weights="16:4:1"),

    # Cascaded Diffusion: 32 -> 64, and from there to 128 or to 256
    "cdm32":     replace(CDM, size=(32, 32), num_res_blocks=(6, 6, 6, 6), steps=700_000, flip=True),
    "cdm64_sr":  replace(CDM, size=(64, 64), num_res_blocks=(5, 5, 5, 5), steps=400_000, low_size=(32, 32)),
    "cdm128_sr": replace(CDM_HIGH, size=(128, 128), num_res_blocks=(3, 3, 3, 3, 3), channel_mult=(1, 2, 4, 8, 8),
                         low_size=(64, 64)),
    "cdm256_sr": replace(CDM_HIGH, size=(256, 256), num_res_blocks=(3, 3, 3, 3, 3, 3), flip=True,
                         channel_mult=(1, 2, 4, 4, 8, 8), low_size=(64, 64)),
}
