"""From the command line to a Config: a flag for each field, and a check of each value.

A mistake is answered in one line: the flag, its value, and what would be right. The same checks hold for the config of
a checkpoint, which may come from a stranger.
"""
import argparse
import dataclasses
import inspect
import itertools
import math
import re
import reprlib
from typing import Literal, get_args, get_origin

from config import Config, numbers, parts
from dwt import patch_factor, wavelet_levels
from nested_unet import mixed_rows
from plumbing import UserError


# ------------------------------------------------------------------------------------------ the flags

class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line (UserError, status 2) instead of a page of usage.

    An empty value, which an unset variable of a script leaves, is a mistake, too, unless the flag `may_be_empty`.
    """

    def error(self, message):
        raise UserError(message[:300])                                    # a value may be a file of digits

    def parse_args(self, *args):
        parsed = super().parse_args(*args)
        for action in self._actions:
            value, may_be_empty = getattr(parsed, action.dest, None), getattr(action, "may_be_empty", False)
            if "" in (value if isinstance(value, list) else [value]) and value != action.default and not may_be_empty:
                raise UserError(f"{(action.option_strings or [action.metavar])[0]} is empty")
        return parsed


def help_of_fields():
    """Return {field: (heading above it, comment behind it)} of config.py: one source for the reader and for -h."""
    helps, heading = {}, ""
    for line in inspect.getsource(Config).splitlines():
        if line.startswith("    # "):
            heading = line[6:]
        elif field := re.match(r"    (\w+): .*?  # (.*)", line):
            helps[field[1]] = heading, field[2]
    return helps


def whole_numbers(text):
    """Read "64", "1,2,4" or "384x640" as a tuple."""
    if not re.fullmatch(r"\d+([,x]\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text}: want whole numbers, like 64 or 1,2,4")
    return tuple(int(part) for part in re.split("[,x]", text))


def add_fields(parser, names, heading=None):
    """Add a flag for each of these fields of Config. The result has a field only if the user gives it.

    heading: of the flags in -h; None: those of config.py. Underscores do as well as hyphens; -h does not say so twice.
    """
    groups, helps = {}, help_of_fields()
    for field in dataclasses.fields(Config):
        if field.name not in names:
            continue
        title, text = helps[field.name]
        if (title := heading or title) not in groups:
            groups[title] = parser.add_argument_group(title)
        options = dict(dest=field.name, default=argparse.SUPPRESS)
        if get_origin(field.type) is Literal:
            options.update(choices=get_args(field.type))
        elif field.type is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(field.type) is tuple:
            options.update(type=whole_numbers, metavar="N,N")
        else:
            options.update(type=field.type, metavar=field.type.__name__.upper())
        flags = {flag_of(field.name): text.replace("%", "%%")}
        flags.setdefault("--" + field.name, argparse.SUPPRESS)
        for flag, shown in flags.items():
            action = groups[title].add_argument(flag, help=shown, **options)
            action.may_be_empty = field.default == "" and field.name not in ("grow_from", "init_from")


# ------------------------------------------------------------------------------------------ the ranges

# {setting: (lowest, highest)} of every number, both right and both finite. A word that is no field of Config is a flag
# of one program. Far above what anybody needs, but low enough to be built and computed.
RANGES = {name: (lowest, highest) for lowest, highest, names in [
    (1, 10 ** 9, "steps log_every save_every"),
    (0, 10 ** 9, "warmup sample_every keep_every held_out_every"),
    (1, 10 ** 8, "scenes"),
    (1, 10 ** 7, "n"),                                                    # images of sample.py
    (2, 10 ** 7, "samples n_real n_bits"),                                # images of evaluate.py
    (1, 10 ** 6, "batch accumulate world_size"),
    (0, 10 ** 6, "num_classes"),
    (1, 10 ** 5, "sample_steps"),
    (0, 10 ** 5, "distilled_steps"),
    (1, 2 ** 16, "size low_size base_channels emb_channels num_heads text_channels text_length attn_resolutions "
                 "transformer_resolutions"),
    (0, 2 ** 16, "multiscale dropout_from_resolution"),
    (1, 1000, "channel_mult"),
    (0, 500, "num_res_blocks num_transformer_blocks text_layers attn_layers"),
    (-1, 256, "workers"),
    (0, 2 ** 31 - 1, "seed"),
    (0, 1, "cond_drop noise_param aug_noise aug_blur lr_decay weight_decay"),
    (0, 0.999, "dropout transformer_dropout"),
    (0, 0.9999, "s"), (0, 0.9999999, "beta1 beta2 ema"),
    (0, 4, "level_power"),
    (1e-20, 1, "adam_eps"),
    (1e-12, 10, "lr"),
    (1e-9, 1000, "text_lr position_std"),
    (1e-9, 1e9, "clip"),
    (0.01, 100, "blur_low blur_high"),
    (0.1, 2 ** 16, "noise_d noise_d_high"),
    (-25, 25, "logsnr_min logsnr_max"),
    (-1000, 1000, "guidance"),
    (0, 1000, "guidance_max"),
] for name in names.split()}
MOST_BLOCKS, WIDEST, MOST_LEVELS = 500, 2 ** 20, 16                       # of a network


def check_range(name, value, flag=None):
    """Raise UserError unless a number, or each of several, lies in its range. flag: the user's word for it, if it is
    not the setting's. Comparisons with nan are false, so nan is in no range."""
    lowest, highest = RANGES[name]
    several = isinstance(value, tuple)
    if not all(lowest <= v <= highest for v in (value if several else (value,))):
        show = lambda v: f"{v:,}" if isinstance(v, int) else f"{v:g}"
        raise UserError(f"{flag or flag_of(name)} {as_typed(value)}: want {'numbers from ' if several else ''}"
                        f"{show(lowest)} to {show(highest)}")


def flag_of(name):
    return "--" + name.replace("_", "-")


def as_typed(value):
    """Write a value as the user types it. Cut what no line has room for."""
    return str(",".join(map(str, value)) if isinstance(value, tuple) else value)[:80]


# ------------------------------------------------------------------------------------------ the checks

def override(config, **values):
    """Return config with these fields changed and all fields checked. Raise UserError for a mistake."""
    for name in ("size", "low_size"):
        if name in values and isinstance(values[name], tuple) and len(values[name]) == 1:
            values[name] = values[name] * 2                               # one number is a square
    if values.get("text_encoder", config.text_encoder) != "":
        values["num_classes"] = 0                                         # captions take the place of classes
    config = dataclasses.replace(config, **values)
    for field in dataclasses.fields(config):
        check_type(config, field)
        if field.name in RANGES:
            check_range(field.name, getattr(config, field.name))
    want(config, len(config.size) == 2, "size", "height,width in pixels")
    want(config, config.guidance_max == 0 or config.guidance_max > 1, "guidance_max", "more than 1, or 0")
    for check in (check_loss, check_guidance, check_levels, check_bands, check_blocks, check_low_res, check_schedule,
                  check_shape):
        check(config)
    return config


def check_type(config, field):
    """Check the type of a field: a checkpoint may hold anything in its place."""
    value, kind = getattr(config, field.name), field.type
    if get_origin(kind) is Literal:
        ok, right = type(value) is str and value in get_args(kind), "one of " + ", ".join(get_args(kind))
    elif get_origin(kind) is tuple:
        kind = get_args(kind)[0]
        ok, right = type(value) is tuple and all(type(v) is kind for v in value), f"values of the type {kind.__name__}"
    else:
        ok, right = type(value) in ((int, float) if kind is float else (kind,)), f"a value of the type {kind.__name__}"
    if not ok:
        raise UserError(f"{flag_of(field.name)} {reprlib.repr(value)}: want {right}")


def want(config, ok, name, right):
    """Raise UserError about this field unless ok. right: what would be right, in words."""
    if not ok:
        raise UserError(f"{flag_of(name)} {as_typed(getattr(config, name))}: want {right}")


def check_loss(config):
    """Check that the loss has the bands that it balances."""
    want(config, config.loss != "band_mse" or config.precondition == "bands", "loss",
         "v_mse or eps_mse with --precondition none")


def check_guidance(config):
    """Check the guidance scale of a distilled model, which has learnt a range of scales."""
    want(config, not config.guidance_max or 1 <= config.guidance <= config.guidance_max, "guidance",
         f"1 to {config.guidance_max:g}, what this distilled model has learnt")


def check_levels(config):
    """Check the settings of a nested model, which have a number, or a list of numbers, for each level."""
    widths = [read_numbers(config, "outer_channels", level, ",") for level in parts(config.outer_channels)]
    blocks = [read_numbers(config, "outer_blocks", level, ",") for level in parts(config.outer_blocks)]
    weights = read_numbers(config, "level_weights", config.level_weights, ":")
    ratio = read_numbers(config, "mixed_ratio", config.mixed_ratio, ":")
    frames = read_numbers(config, "frames", config.frames, ":")
    want(config, len(widths) < MOST_LEVELS, "outer_channels", f"fewer than {MOST_LEVELS} levels")
    want(config, all(widths), "outer_channels", "a width or more for each level")
    want(config, [len(w) for w in widths] == [len(b) for b in blocks], "outer_blocks",
         f"a number of blocks for each width of --outer-channels {config.outer_channels or '(none)'}")
    levels = len(widths) + 1
    for name, values in (("level_weights", weights), ("mixed_ratio", ratio), ("frames", frames)):
        want(config, len(values) in (0, levels), name,
             f"a number for each of the {levels} levels, like {':'.join('1' * levels)}")
    want(config, not any(above % below for above, below in zip(frames, frames[1:])), "frames",
         "each a divisor of the one before")
    want(config, not frames or not (ratio or config.low_size), "frames",
         "none with --mixed-ratio or --low-size, which are for images")
    try:
        config.sizes                                                      # raises if the levels do not fit
        if ratio:
            mixed_rows(ratio, config.batch)
    except ValueError as error:
        raise UserError(str(error)) from None


def read_numbers(config, name, text, separator):
    """Return the numbers of a level, or of the levels. Raise UserError about this field."""
    try:
        values = numbers(text, separator)
    except ValueError:
        want(config, False, name, "whole numbers, 1 or more")
    want(config, all(value <= WIDEST for value in values), name, f"whole numbers, at most {WIDEST:,}")
    return values


def check_bands(config):
    """Check the patchings, and the root mean squares of the bands: as many as each level has."""
    patchings = [config.outer_patching] * (len(config.sizes) - 1) + [config.patching]
    try:
        for patching in patchings:
            patch_factor(patching)
    except ValueError as error:
        raise UserError(str(error)) from None
    if not config.band_rms:
        return
    counts = [T * (1 + 3 * wavelet_levels(patching)) for T, patching in zip(config.counts, patchings)]
    try:
        ok = [len(level) for level in config.rms] == counts and all(1e-6 < s < 1e6 for s in sum(config.rms, []))
    except ValueError:
        ok = False
    want(config, ok, "band_rms", "a positive number for each band of each level")


def check_blocks(config):
    """Bound what is built: a network of 10^8 blocks is no network that anybody trains, and takes hours to build."""
    counts = [numbers(level, ",") for level in parts(config.outer_blocks)]
    want(config, 1 <= len(config.channel_mult) <= MOST_LEVELS, "channel_mult", f"1 to {MOST_LEVELS} widths")
    blocks = config.num_transformer_blocks + config.text_layers + 2 * sum(map(sum, counts)) + sum(
        (2 * k + 1) * (1 + 2 * layers) for k, layers in itertools.zip_longest(
            config.num_res_blocks, config.attn_layers[:len(config.num_res_blocks)], fillvalue=0))
    if blocks > MOST_BLOCKS:
        raise UserError(f"--num-transformer-blocks, --num-res-blocks, --attn-layers, --text-layers and --outer-blocks: "
                        f"{blocks:,} blocks; want at most {MOST_BLOCKS:,} in all")
    widest = config.base_channels * max(config.channel_mult)
    if widest > WIDEST:
        raise UserError(f"--base-channels {config.base_channels} by --channel-mult {as_typed(config.channel_mult)}: "
                        f"{widest:,} channels; want at most {WIDEST:,}")


def check_low_res(config):
    """Check the settings of a super-resolution model."""
    want(config, config.blur_low <= config.blur_high, "blur_high",
         f"at least blur_low ({config.blur_low:g})")
    if not config.low_size:
        return
    want(config, not config.outer_channels, "low_size", "no low-res image for a nested model: it has its levels inside")
    (height, width), low = config.size, config.low_size
    want(config, len(low) == 2 and height % low[0] == 0 and width % low[1] == 0
         and height // low[0] == width // low[1] > 1, "low_size",
         f"a size that divides {height}x{width}, alike in height and width")


def check_schedule(config):
    """Check the end points of the schedule and its two shifts."""
    want(config, config.logsnr_min < config.logsnr_max, "logsnr_min", f"below logsnr_max ({config.logsnr_max:g})")
    want(config, config.schedule != "interpolated" or config.noise_d <= config.noise_d_high, "noise_d_high",
         f"at least noise_d ({config.noise_d:g}): the clean end has the high one")


def check_shape(config):
    """Check what depends on the size of the images."""
    height, width = config.sizes[-1]
    side = math.sqrt(height * width)
    want(config, config.multiscale <= side, "multiscale", f"at most the side of the lowest level, {side:g}")
    height, width = config.size
    want(config, not config.portrait or height < width, "portrait",
         f"a --size that is wider than tall, not {height},{width}: images that stand upright are turned")
