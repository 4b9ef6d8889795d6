"""From the command line to a Config: a flag for each field, and a check of each value.

A mistake is answered in one line: the flag, its value, and what would be right.
"""
import argparse
import dataclasses
import inspect
import math
import re
from typing import Literal, get_args, get_origin

from config import Config, numbers, parts
from nested_unet import mixed_rows
from plumbing import UserError


# ------------------------------------------------------------------------------------------ the flags

class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line (UserError, status 2) instead of a page of usage."""

    def error(self, message):
        raise UserError(message)


def help_of_fields():
    """Return {field: the comment behind it in config.py}: one source for the reader and for -h."""
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(Config), re.MULTILINE))


def whole_numbers(text):
    """Read "64", "1,2,4" or "384x640" as a tuple."""
    if not re.fullmatch(r"\d+([,x]\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text}: want whole numbers, like 64 or 1,2,4")
    return tuple(int(part) for part in re.split("[,x]", text))


def add_fields(parser, names, group="settings of the preset, each to be overridden"):
    """Add a flag for each of these fields of Config. The result has a field only if the user gives it."""
    group, helps = parser.add_argument_group(group), help_of_fields()
    for field in dataclasses.fields(Config):
        if field.name not in names:
            continue
        options = dict(default=argparse.SUPPRESS, help=helps[field.name].replace("%", "%%"))
        if get_origin(field.type) is Literal:
            options.update(choices=get_args(field.type))
        elif field.type is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(field.type) is tuple:
            options.update(type=whole_numbers, metavar="N,N")
        else:
            options.update(type=field.type, metavar=field.type.__name__.upper())
        flags = dict.fromkeys(["--" + field.name.replace("_", "-"), "--" + field.name])
        group.add_argument(*flags, dest=field.name, **options)


# ------------------------------------------------------------------------------------------ the checks

def override(config, **values):
    """Return config with these fields changed and all fields checked. Raise UserError for a mistake."""
    for name in ("size", "low_size"):
        if len(values.get(name, ())) == 1:
            values[name] = values[name] * 2                               # one number is a square
    if values.get("text_encoder", config.text_encoder):
        values["num_classes"] = 0                                         # captions take the place of classes
    config = dataclasses.replace(config, **values)
    for right, fits, names in RANGES:
        for name in names.split():
            want(config, fits(getattr(config, name)), name, right)
    for check in (check_loss, check_guidance, check_levels, check_low_res, check_schedule, check_shape):
        check(config)
    return config


def want(config, ok, name, right):
    """Raise UserError about this field unless ok. right: what would be right, in words."""
    if not ok:
        value = getattr(config, name)
        value = ",".join(map(str, value)) if isinstance(value, tuple) else value                # as the user types it
        raise UserError(f"--{name.replace('_', '-')} {value}: want {right}")


# The rules for single fields: (what is right, the test, the fields). Comparisons with nan are false, so all refuse it.
RANGES = [
    ("1 or more", lambda v: v >= 1,
     "scenes batch steps log_every save_every sample_steps base_channels emb_channels num_heads text_channels "
     "text_length accumulate"),
    ("0 or more", lambda v: v >= 0,
     "multiscale warmup sample_every keep_every held_out_every dropout_from_resolution num_transformer_blocks "
     "weight_decay seed text_layers"),
    ("at least 0 and less than 1", lambda v: 0 <= v < 1, "dropout transformer_dropout beta1 beta2 ema"),
    ("between 0 and 1", lambda v: 0 <= v <= 1, "cond_drop noise_param aug_noise aug_blur lr_decay"),
    ("a positive number", lambda v: 0 < v < math.inf, "lr text_lr clip noise_d noise_d_high adam_eps position_std"),
    ("between 0 and 4", lambda v: 0 <= v <= 4, "level_power"),
    ("a number; 1 is off", math.isfinite, "guidance"),
    ("more than 1, or 0", lambda v: v == 0 or 1 < v < math.inf, "guidance_max"),
    ("0 to 256, or -1 to choose", lambda v: -1 <= v <= 256, "workers"),
    ("less than 2^31", lambda v: v < 2 ** 31, "seed scenes"),
    ("height,width in pixels, 1 to 65536", lambda v: len(v) == 2 and all(1 <= n <= 65536 for n in v), "size"),
    ("positive numbers", lambda v: all(n >= 1 for n in v), "channel_mult attn_resolutions transformer_resolutions"),
    ("no negative numbers", lambda v: all(n >= 0 for n in v), "num_res_blocks"),
]


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
        return numbers(text, separator)
    except ValueError:
        want(config, False, name, "whole numbers, 1 or more")


def check_low_res(config):
    """Check the settings of a super-resolution model."""
    want(config, 0 < config.blur_low <= config.blur_high < math.inf, "blur_high",
         f"at least blur_low ({config.blur_low:g})")
    if not config.low_size:
        return
    want(config, not config.outer_channels, "low_size", "no low-res image for a nested model: it has its levels inside")
    (height, width), low = config.size, config.low_size
    want(config, len(low) == 2 and min(low) > 0 and height % low[0] == 0 and width % low[1] == 0
         and height // low[0] == width // low[1] > 1, "low_size",
         f"a size that divides {height}x{width}, alike in height and width")


def check_schedule(config):
    """Check the end points of the schedule and its two shifts."""
    want(config, -25 <= config.logsnr_min < config.logsnr_max <= 25, "logsnr_min",
         f"below logsnr_max ({config.logsnr_max:g}), both within -25..25")
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
