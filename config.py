"""Every setting, with its unit and its source, and the named presets.

Paper: simple diffusion, appendix B (settings); Matryoshka's released configurations.
Read after: unet.py, uvit.py, nested_unet.py, cascade.py. Read before: train.py.

`Config` is one flat block. Each field below becomes a flag of train.py (--lr 1e-4) and its comment the flag's help. A
preset is a Config; `PRESETS` names one for each row of the paper's settings, and small ones for a laptop.
"""
import dataclasses
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

import schedule as schedules
from cascade import SuperResolutionUNet
from plumbing import UserError
from dwt import patch_factor
from nested_unet import NestedUNet, level_schedules
from text import ByteEncoder, TextCondition
from unet import UNet
from uvit import UViT


@dataclass(frozen=True)
class Config:
    # data
    data: str = "glyphs"                 # glyphs (drawn on the fly), a font file, or a folder of images
    size: tuple[int, ...] = (64, 64)     # height,width of the images, px (one number: square)
    scenes: int = 100_000                # how many scenes glyphs and fonts have
    flip: bool = False                   # mirror half of the images left-right (not for letters)
    withhold: bool = False               # drawn scenes: a fifth of the pairs of character and colour never come
    num_classes: int = 36                # set from the data; ImageNet has 1000; 0 for models with text
    # process (simple diffusion 3.1, A)
    schedule: Literal["cosine", "shifted", "interpolated"] = "shifted"  # log-SNR schedule
    noise_d: float = 64                  # px: side at which the plain cosine holds (interpolated: the low one)
    noise_d_high: float = 256            # px: the high one of the interpolated schedule
    logsnr_min: float = -15.0            # of the cosine, before the shift
    logsnr_max: float = 15.0             # of the cosine, before the shift
    # loss (2, 3.2, A)
    loss: Literal["eps_mse", "v_mse"] = "eps_mse"  # the U-Nets' and the U-ViTs' loss; the network always predicts v
    multiscale: int = 0                  # px: base of the multiscale loss, paper 32; 0 = off
    cond_drop: float = 0.1               # share of examples whose condition is hidden
    # network (B.1, B.2)
    model: Literal["unet", "uvit"] = "uvit"  # unet.py or uvit.py
    patching: str = "none"               # none, dwt_1, dwt_2, conv_2, conv_4: first reduction of the image
    base_channels: int = 128             # width that channel_mult multiplies
    emb_channels: int = 1024             # width of the embedding of log-SNR and class
    channel_mult: tuple[int, ...] = (1, 2, 4, 8, 8)    # width of each level, finest first; U-ViT: last = transformer
    num_res_blocks: tuple[int, ...] = (3, 4, 4, 12, 4)  # ResBlocks of each level
    num_transformer_blocks: int = 36     # U-ViT only
    attn_resolutions: tuple[int, ...] = (8, 16)  # sides of maps with attention; U-Net only
    attn_layers: tuple[int, ...] = ()    # instead: layers after each block of each level, as Matryoshka's U-Net has
    num_heads: int = 4                   # of every attention
    dropout: float = 0.1                 # in ResBlocks
    dropout_from_resolution: int = 16    # largest side of the maps whose ResBlocks have dropout; 0 = none
    transformer_dropout: float = 0.2     # in the U-ViT's MLP blocks
    position_std: float = 0.01           # initial size of the U-ViT's position embedding
    # text and shape (3.6)
    text_encoder: str = ""               # empty = classes; bytes = small, trained along; or name or folder of a T5
    text_channels: int = 128             # width of its embeddings; t5-v1_1-xxl 4096, flan-t5-xl 2048
    text_length: int = 128               # tokens of a caption (or bytes) at most
    text_layers: int = 2                 # of the encoder of bytes
    text_pooled: bool = True             # add their sum to the embedding of log-SNR, beside cross-attention
    transformer_resolutions: tuple[int, ...] = ()  # U-ViT: sides of maps with self-attention for ResBlocks; text: 32
    guidance_max: float = 0.0            # w that a distilled model may be told, from 1 to this; 0 = it is told none
    portrait: bool = False               # images that stand upright are turned, and the model is told
    # nested levels (Matryoshka 3); the network above is then the innermost. Levels by "/", the highest first
    outer_channels: str = ""             # widths of each outer level's maps: 32,32,64/64,128,256; empty = not nested
    outer_blocks: str = ""               # ResBlocks, likewise: 2,2,1/2,2,1
    outer_patching: str = "none"         # first reduction of every outer level
    level_power: float = 2.0             # p: log-SNR of a level is p log k below the lowest's; 2 = simple diffusion's
    level_weights: str = ""              # of the levels' losses, highest first: 16:4:1; empty = equal
    mixed_ratio: str = ""                # 2:1 = two thirds of the batch have the high level, all the low; empty = all
    grow_from: str = ""                  # run whose weights the inner network starts with
    # a super-resolution stage of a cascade (CDM 3)
    low_size: tuple[int, ...] = ()       # height,width of the low-res image that the model is given; empty = none
    low_upsample: Literal["bilinear", "bicubic"] = "bilinear"  # how it is brought to the size of the images
    aug_noise: float = 0.9               # share of examples whose low-res image gets noise, s ~ U(0, 1)
    aug_blur: float = 0.0                # share whose low-res image is blurred; paper: 0.5 for the stages from 128 up
    blur_low: float = 0.4                # low-res px: least sigma of the blur
    blur_high: float = 0.6               # low-res px: largest
    # optimisation (B.1, B.2)
    batch: int = 512                     # images a step, over all processes
    steps: int = 2_000_000               # optimiser steps
    lr: float = 5e-5                     # Adam's learning rate
    text_lr: float = 0.1                 # that of text.py's layers, as a share of it
    warmup: int = 10_000                 # steps of linear warm-up
    beta1: float = 0.9                   # Adam
    beta2: float = 0.99                  # Adam; 0.999 for ImageNet 128
    adam_eps: float = 1e-12              # Adam
    weight_decay: float = 0.0            # Adam
    clip: float = 1.0                    # largest norm of the gradient
    ema: float = 0.9999                  # decay of the averaged weights, those that sample
    # sampling, here and as sample.py's defaults (A)
    sampler: Literal["ddpm", "ddim", "stochastic"] = "ddpm"  # ancestral (paper), deterministic, or that of distill.py
    sample_steps: int = 256              # network evaluations an image (twice that with guidance)
    guidance: float = 1.0                # scale w = 1 + eta of eq. 7; 1 = off
    noise_param: float = 0.2             # nu: 0 lower, 1 upper bound of the DDPM step's variance, in logs
    clip_x: Literal["static", "dynamic", "none"] = "static"  # clip the predicted image at every step
    # running
    seed: int = 0                        # of everything random
    workers: int = -1                    # processes that load images; -1 = choose
    precision: Literal["auto", "float32", "bf16"] = "auto"  # bf16: autocast; auto: the faster, tried at the start
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: on with CUDA
    channels_last: Literal["auto", "on", "off"] = "auto"  # order of maps in memory; auto: on with CUDA
    accumulate: int = 1                  # parts of each process's batch that go through the network one by one
    recompute: bool = False              # keep no activations inside blocks; backward computes them again
    shard: bool = False                  # weights, gradients, moments, averages split over the processes (shard.py)
    if_unsaved: Literal["stop", "go-on"] = "stop"  # when a checkpoint cannot be written, as on a full disk
    log_every: int = 20                  # steps
    sample_every: int = 50_000           # steps; 0 = only at the end
    save_every: int = 10_000             # steps
    keep_every: int = 0                  # steps between checkpoints that are kept, for curves; 0 = the last alone
    distilled_from: str = ""             # run that taught this one, and its step; set by distill.py, as are
    distilled_steps: int = 0             # the steps that it was taught to sample in, 0 = any
    distill_weight: str = ""             # and the weight of the error
    class_names: tuple[str, ...] = ()    # set from the data
    examples: tuple[str, ...] = ()       # of captions, set from the data: what the sheets of samples show

    @property
    def guidable(self):
        """Has the model conditions that can be dropped?"""
        return bool(self.num_classes or self.text_encoder)

    @property
    def calls(self):
        """Network evaluations a step: two with guidance, unless the model was distilled to be told its scale."""
        return 2 if self.guidable and self.guidance != 1 and not self.guidance_max else 1

    @property
    def image_d(self):
        """The side that enters the shift: sqrt(H W)."""
        return math.sqrt(self.size[0] * self.size[1])

    @property
    def sizes(self):
        """[(H, W), ...] of the levels, highest first; a plain model has one.

        They follow from the outer widths: a level's coarsest map is as large as the first map of the level below.
        """
        sizes, outer = [tuple(self.size)], [numbers(level, ",") for level in parts(self.outer_channels)]
        for i, widths in enumerate(outer):
            down = patch_factor(self.outer_patching) * 2 ** (len(widths) - 1)
            up = patch_factor(self.patching if i + 1 == len(outer) else self.outer_patching)
            if any(s * up % down for s in sizes[-1]):
                raise ValueError(f"size {self.size[0]}x{self.size[1]}: level {sizes[-1][0]}x{sizes[-1][1]} does not "
                                 f"divide by {down // up or 1}")
            sizes.append(tuple(s * up // down for s in sizes[-1]))
            if up >= down:
                (h, w), (height, width) = sizes[-1], sizes[-2]
                raise ValueError(f"level {h}x{w} is not below {height}x{width}: give the outer level more widths, or "
                                 "the inner one less patching")
        return sizes


def parts(text):
    """"a/b" -> ["a", "b"], "" -> []."""
    return text.split("/") if text else []


def numbers(text, separator):
    """"2:1" -> [2, 1]. Raises ValueError for anything but positive whole numbers."""
    values = [int(part) for part in text.split(separator)] if text else []
    if any(value < 1 for value in values):
        raise ValueError(f"{text}: want positive whole numbers")
    return values


def make_schedules(config):
    """The functions t -> logsnr of the levels, highest first: one for a plain model."""
    ends, sizes = (config.logsnr_min, config.logsnr_max), config.sizes
    image_d = math.sqrt(sizes[-1][0] * sizes[-1][1])                      # of the lowest level
    base = {"cosine": lambda t: schedules.logsnr_cosine(t, *ends),
            "shifted": lambda t: schedules.logsnr_shifted(t, image_d, config.noise_d, *ends),
            "interpolated": lambda t: schedules.logsnr_interpolated(t, image_d, config.noise_d, config.noise_d_high,
                                                                    *ends)}[config.schedule]
    return level_schedules(base, sizes, config.level_power) if len(sizes) > 1 else [base]


def make_schedule(config):
    """What the loss and sample() take: the one schedule of a plain model, the list of a nested one."""
    return make_schedules(config) if config.outer_channels else make_schedules(config)[0]


def make_low_schedule(config):
    """The schedule of the stage below a super-resolution model: what the noise on its low-res image follows."""
    return make_schedule(replace(config, size=config.low_size, low_size=()))


def build_model(config):
    """The network of this configuration, on the current default device. Raises UserError for sizes that do not fit."""
    try:
        # Each schedule's own ends, moved by the shift: "care needs to be taken" (appendix A).
        with torch.device("cpu"):
            ends = [schedule(torch.tensor([1.0, 0.0])).tolist() for schedule in make_schedules(config)]
        common = dict(emb_channels=config.emb_channels, num_heads=config.num_heads, dropout=config.dropout,
                      dropout_from_resolution=config.dropout_from_resolution)
        if config.text_encoder:
            encoder = None
            if config.text_encoder == "bytes":
                encoder = ByteEncoder(config.text_channels, config.text_length, config.text_layers, config.num_heads)
            text = TextCondition(config.text_channels, config.emb_channels, encoder, config.text_pooled)
        inner = dict(common, size=config.sizes[-1], base_channels=config.base_channels, patching=config.patching,
                     channel_mult=config.channel_mult, num_res_blocks=config.num_res_blocks,
                     num_classes=config.num_classes, logsnr_min=ends[-1][0], logsnr_max=ends[-1][1],
                     in_channels=6 if config.low_size else 3, portrait=config.portrait,
                     guidance_max=config.guidance_max,
                     **(dict(text=text, text_channels=config.text_channels) if config.text_encoder else {}))
        if config.model == "unet":
            model = UNet(attn_resolutions=config.attn_resolutions, attn_layers=config.attn_layers, **inner)
        else:
            model = UViT(num_transformer_blocks=config.num_transformer_blocks,
                         transformer_dropout=config.transformer_dropout, position_std=config.position_std,
                         attn_resolutions=config.transformer_resolutions, **inner)
        if config.low_size:
            with torch.device("cpu"):
                low_ends = make_low_schedule(config)(torch.tensor([1.0, 0.0])).tolist()
            return SuperResolutionUNet(model, config.low_size, low_ends, config.emb_channels, config.low_upsample)
        outer = list(zip(config.sizes, ends, parts(config.outer_channels), parts(config.outer_blocks)))
        for size, (low, high), widths, blocks in reversed(outer):         # from the inside out
            model = NestedUNet(model, UNet(
                size, 1, channel_mult=numbers(widths, ","), num_res_blocks=numbers(blocks, ","), attn_resolutions=(),
                patching=config.outer_patching, num_classes=None, logsnr_min=low, logsnr_max=high, middle=False,
                **common))
        return model
    except ValueError as error:
        raise UserError(str(error)) from None


def rates(model, config):
    """Parameters for the optimiser; those that read the text (text.py) as a group of their own, with a lower rate.

    Before the network knows what to do with a word, the word is noise to it: at the full rate the layers that all words
    share learn within a few hundred steps to be silent, and the letters are not found (benchmarks/README.md). A table
    of classes has no such layers.
    """
    reading = {id(p) for module in model.modules() if isinstance(module, TextCondition) for p in module.parameters()}
    groups = [[p for p in model.parameters() if (id(p) in reading) == slow] for slow in (False, True)]
    return [dict(params=groups[0])] + ([dict(params=groups[1], share=config.text_lr)] if groups[1] else [])


def make_optimizer(model, config):
    """Adam, as appendix B has it, all of it in one kernel (fused)."""
    return torch.optim.Adam(rates(model, config), lr=config.lr, betas=(config.beta1, config.beta2),
                            eps=config.adam_eps, weight_decay=config.weight_decay, fused=True)


# ------------------------------------------------------------------------------------------ presets

# The paper does not say whether images were mirrored; we do. data is empty: the user says which folder with --data.
# Paper: B.1 and 5.1 advise shift 64, but table 7's U-Nets at 128 and 256 are table 2's rows of shift 32 (--noise-d 32),
# and the one at 512 is table 6's with the multiscale loss (--multiscale 32). B.2 names no schedule: shift 64 is ours.
_unet = Config(data="", num_classes=1000, model="unet", flip=True)                          # B.1
_unet512 = dataclasses.replace(_unet, size=(512, 512))
_uvit = Config(data="", num_classes=1000, model="uvit", flip=True, loss="v_mse", batch=2048, lr=1e-4, steps=500_000,
               channel_mult=(1, 2, 4, 16), num_res_blocks=(2, 2, 2), dropout=0.0)           # B.2
_glyphs = Config(
    model="uvit", patching="dwt_1", base_channels=32, emb_channels=256, channel_mult=(1, 3, 6), num_res_blocks=(1, 1),
    num_transformer_blocks=4, dropout=0.0, transformer_dropout=0.0, position_std=1.0, loss="v_mse", noise_d=32,
    batch=16, steps=2600, lr=1e-3, warmup=100, ema=0.998, sampler="ddim", sample_steps=24, guidance=5.0,
    sample_every=650, save_every=650)
_glyphs_inner = dict(patching="none", base_channels=96, channel_mult=(1, 2), num_res_blocks=(1,))
# 3.6 and B: "the text to image model was trained for 700K steps". 3.1's example of the interpolated schedule is 512 px,
# 32 -> 256. Unverified: its high noise_d at other sizes (ours is half the side), and what was sampled with.
_t2i = dataclasses.replace(_uvit, num_classes=0, text_encoder="google/t5-v1_1-xxl", text_channels=4096, text_length=128,
                           flip=False, transformer_resolutions=(32,), schedule="interpolated", noise_d=32,
                           steps=700_000, guidance=4.0, clip_x="dynamic")
_mdm = Config(data="", num_classes=1000, model="unet", flip=True, base_channels=256, channel_mult=(1, 2, 3),
              num_res_blocks=(2, 2, 2), attn_layers=(0, 1, 5), num_heads=8, dropout=0.0, dropout_from_resolution=0,
              lr=1e-4, adam_eps=1e-8, clip=2.0, steps=400_000, sample_steps=250)
_cdm = Config(data="", num_classes=1000, model="unet", schedule="cosine", base_channels=256, channel_mult=(1, 2, 3, 4),
              attn_resolutions=(8, 16), num_heads=4, dropout=0.1, dropout_from_resolution=64, batch=2048, lr=1e-4)
_cdm_high = dataclasses.replace(_cdm, base_channels=128, attn_resolutions=(16,), num_heads=1, dropout=0.0,
                                dropout_from_resolution=0, batch=1024, steps=500_000, sample_steps=100, aug_noise=0.0,
                                aug_blur=0.5)

PRESETS = {
    # two cores, ten minutes
    "glyphs64": _glyphs,
    "glyphs64_unet": dataclasses.replace(_glyphs, model="unet", num_res_blocks=(1, 1, 2), attn_resolutions=(8,)),
    "glyphs16": dataclasses.replace(_glyphs, **_glyphs_inner, size=(16, 16)),
    "glyphs64_nested": dataclasses.replace(_glyphs, **_glyphs_inner, outer_channels="32,64", outer_blocks="1,1",
                                           outer_patching="dwt_1"),
    "glyphs64_sr": dataclasses.replace(_glyphs, low_size=(16, 16), guidance=1.0),
    "glyphs64_text": dataclasses.replace(
        _glyphs, num_classes=0, text_encoder="bytes", text_length=48, withhold=True, schedule="interpolated",
        noise_d=32, noise_d_high=64, guidance=3.0, steps=5200, sample_every=1300, save_every=1300),
    # ImageNet, simple diffusion B.1. At 512 the suffix is the row of table 5; the paper's own model is _dwt2.
    "imagenet128_unet": dataclasses.replace(_unet, size=(128, 128), beta2=0.999, steps=1_500_000),
    "imagenet256_unet": dataclasses.replace(_unet, size=(256, 256), channel_mult=(1, 1, 2, 4, 8, 8),
                                            num_res_blocks=(1, 2, 2, 4, 12, 4)),
    "imagenet512_unet": dataclasses.replace(_unet512, channel_mult=(1, 1, 1, 2, 4, 8, 8),
                                            num_res_blocks=(1, 1, 2, 2, 4, 12, 4)),
}
for _patching in ("dwt_1", "conv_2", "dwt_2", "conv_4"):
    _half = _patching in ("dwt_1", "conv_2")
    PRESETS["imagenet512_unet_" + _patching.replace("_", "")] = dataclasses.replace(
        _unet512, patching=_patching, channel_mult=(1, 2, 2, 4, 8, 8) if _half else (2, 3, 4, 8, 8),
        num_res_blocks=(2, 2, 2, 4, 12, 4) if _half else (3, 3, 4, 12, 4))
PRESETS |= {
    # ImageNet, simple diffusion B.2
    "imagenet128_uvit": dataclasses.replace(_uvit, size=(128, 128)),
    "imagenet256_uvit": dataclasses.replace(_uvit, size=(256, 256), patching="dwt_1"),
    "imagenet512_uvit": dataclasses.replace(_uvit, size=(512, 512), patching="dwt_2"),
    # Text to image, 3.6
    "t2i256_uvit": dataclasses.replace(_t2i, size=(256, 256), patching="dwt_1", noise_d_high=128),
    "t2i512_uvit": dataclasses.replace(_t2i, size=(512, 512), patching="dwt_2", noise_d_high=256),
    "t2i384x640_uvit": dataclasses.replace(_t2i, size=(384, 640), patching="dwt_2", noise_d_high=256, portrait=True),
    # Matryoshka, the widths of its released configurations; class-conditional ImageNet, optimised as its authors' next
    # paper (Kaleido, appendix B) says. Unverified: batch and steps of each phase in the paper, its condition dropout
    # (ours is 10 %), how many layers of attention the middle has (ours: as the lowest level).
    # Paper: log-SNR of a discrete squared cosine, from +10 to -20 over 1000 steps; ours is simple diffusion's, +-15.
    # Paper: strided 3x3 convolutions down; ours average and convolve, as everywhere here.
    "mdm64": dataclasses.replace(_mdm, size=(64, 64)),
    "mdm256": dataclasses.replace(_mdm, size=(256, 256), outer_channels="64,128,256", outer_blocks="2,2,1",
                                  level_power=1.0),
    "mdm1024": dataclasses.replace(_mdm, size=(1024, 1024), outer_channels="32,32,64/64,128,256",
                                   outer_blocks="2,2,1/2,2,1", level_weights="16:4:1"),
    # Cascaded diffusion, the settings of its appendix B as notes give them. Simplified here: discrete times and learnt
    # variances became our continuous process. Unverified: its schedules (cosine everywhere here) and what is simple
    # diffusion's here: Adam's betas and eps, warm-up, gradient clipping, 10 % of the labels hidden.
    "cdm32": dataclasses.replace(_cdm, size=(32, 32), num_res_blocks=(6, 6, 6, 6), flip=True, steps=700_000),
    "cdm64_sr": dataclasses.replace(_cdm, size=(64, 64), low_size=(32, 32), num_res_blocks=(5, 5, 5, 5), steps=400_000),
    "cdm128_sr": dataclasses.replace(_cdm_high, size=(128, 128), low_size=(64, 64), channel_mult=(1, 2, 4, 8, 8),
                                     num_res_blocks=(3, 3, 3, 3, 3)),
    "cdm256_sr": dataclasses.replace(_cdm_high, size=(256, 256), low_size=(64, 64), channel_mult=(1, 2, 4, 4, 8, 8),
                                     num_res_blocks=(3, 3, 3, 3, 3, 3), flip=True),
}


# ------------------------------------------------------------------------------------------ the command line
