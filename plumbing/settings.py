"""From the command line to a Config: every flag, every check, and its one-line message."""
import argparse
import dataclasses
import inspect
import math
import re
from typing import Literal, get_args, get_origin

from config import Config, numbers, parts
from nested_unet import mixed_rows
from plumbing import UserError


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line (and status 2), not a page of usage."""

    def error(self, message):
        raise UserError(message)


def _help_of_fields():
    """The comment behind each field of Config, as written above: one source for the reader and for -h."""
    pattern = re.compile(r"^    (\w+): .*?  # (.*)$", re.MULTILINE)
    return dict(pattern.findall(inspect.getsource(Config)))


def _whole_numbers(text):
    if not re.fullmatch(r"\d+([,x]\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text}: want whole numbers, like 64 or 1,2,4")
    return tuple(int(part) for part in re.split("[,x]", text))


def add_fields(parser, names, group="settings of the preset, each to be overridden"):
    """A flag for each named field of Config; absent from the result unless given."""
    group, helps = parser.add_argument_group(group), _help_of_fields()
    for field in dataclasses.fields(Config):
        if field.name not in names:
            continue
        options = dict(default=argparse.SUPPRESS, help=helps[field.name].replace("%", "%%"))
        if get_origin(field.type) is Literal:
            options.update(choices=get_args(field.type))
        elif field.type is bool:
            options.update(action=argparse.BooleanOptionalAction)
        elif get_origin(field.type) is tuple:
            options.update(type=_whole_numbers, metavar="N,N")
        else:
            options.update(type=field.type, metavar=field.type.__name__.upper())
        flags = dict.fromkeys(["--" + field.name.replace("_", "-"), "--" + field.name])
        group.add_argument(*flags, dest=field.name, **options)


def override(config, **values):
    """config with these fields changed, checked. Raises UserError: the field, the value, and what would be right."""
    for name in ("size", "low_size"):
        if len(values.get(name, ())) == 1:
            values[name] = values[name] * 2
    config = dataclasses.replace(config, **values)
    if config.text_encoder:
        config = dataclasses.replace(config, num_classes=0)               # captions, not classes

    def want(ok, name, right):
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: want {right}")

    for name in ("scenes", "batch", "steps", "log_every", "save_every", "sample_steps", "base_channels", "emb_channels",
                 "num_heads", "text_channels", "text_length", "accumulate"):
        want(getattr(config, name) >= 1, name, "1 or more")
    for name in ("multiscale", "warmup", "sample_every", "keep_every", "dropout_from_resolution",
                 "num_transformer_blocks", "weight_decay", "seed", "text_layers"):
        want(getattr(config, name) >= 0, name, "0 or more")
    for name in ("dropout", "transformer_dropout", "beta1", "beta2", "ema"):
        want(0 <= getattr(config, name) < 1, name, "at least 0 and less than 1")
    for name in ("cond_drop", "noise_param", "aug_noise", "aug_blur"):
        want(0 <= getattr(config, name) <= 1, name, "between 0 and 1")
    for name in ("lr", "text_lr", "clip", "noise_d", "noise_d_high", "adam_eps", "position_std"):
        want(0 < getattr(config, name) < math.inf, name, "a positive number")
    want(math.isfinite(config.guidance), "guidance", "a number; 1 is off")
    want(config.guidance_max == 0 or 1 < config.guidance_max < math.inf, "guidance_max", "more than 1, or 0")
    want(not config.guidance_max or 1 <= config.guidance <= config.guidance_max, "guidance",
         f"1 to {config.guidance_max:g}, what this distilled model has learnt")
    want(-1 <= config.workers <= 256, "workers", "0 to 256, or -1 to choose")
    want(len(config.size) == 2 and min(config.size) > 0, "size", "height,width in pixels")
    outer, lists = parts(config.outer_channels), {}
    for name in ("outer_channels", "outer_blocks", "level_weights", "mixed_ratio"):
        texts, separator = (parts(getattr(config, name)), ",") if "outer" in name else ([getattr(config, name)], ":")
        try:
            lists[name] = [numbers(text, separator) for text in texts]
        except ValueError:
            want(False, name, "whole numbers, 1 or more")
    want(all(lists["outer_channels"]), "outer_channels", "a width or more for each level")
    want([len(w) for w in lists["outer_channels"]] == [len(b) for b in lists["outer_blocks"]], "outer_blocks",
         f"a number of blocks for each width of --outer-channels {config.outer_channels or '(none)'}")
    for name in ("level_weights", "mixed_ratio"):
        want(len(lists[name][0]) in (0, len(outer) + 1), name,
             f"a number for each of the {len(outer) + 1} levels, like {':'.join('1' * (len(outer) + 1))}")
    want(0 <= config.level_power <= 4, "level_power", "between 0 and 4")
    try:
        sides = [math.sqrt(h * w) for h, w in config.sizes]
        if config.mixed_ratio:
            mixed_rows(lists["mixed_ratio"][0], config.batch)
    except ValueError as error:
        raise UserError(str(error)) from None
    want(0 < config.blur_low <= config.blur_high < math.inf, "blur_high", f"at least blur_low ({config.blur_low:g})")
    if config.low_size:
        want(not outer, "low_size", "no low-res image for a nested model: it has its levels inside")
        want(len(config.low_size) == 2 and min(config.low_size) > 0
             and all(s % l == 0 and s > l for s, l in zip(config.size, config.low_size))
             and config.size[0] * config.low_size[1] == config.size[1] * config.low_size[0], "low_size",
             f"a size that divides {config.size[0]}x{config.size[1]}, alike in height and width")
    want(config.multiscale <= sides[-1], "multiscale", f"at most the side of the lowest level, {sides[-1]:g}")
    want(-25 <= config.logsnr_min < config.logsnr_max <= 25, "logsnr_min",
         f"below logsnr_max ({config.logsnr_max:g}), both within -25..25")
    want(config.schedule != "interpolated" or config.noise_d <= config.noise_d_high, "noise_d_high",
         f"at least noise_d ({config.noise_d:g}): the clean end has the high one")
    want(not config.portrait or config.size[0] < config.size[1], "portrait", "a --size that is wider than tall, not "
         f"{config.size[0]},{config.size[1]}: images that stand upright are turned")
    want(config.seed < 2 ** 31, "seed", "less than 2^31")
    for name in ("channel_mult", "num_res_blocks", "attn_resolutions", "transformer_resolutions"):
        want(all(v >= (0 if name == "num_res_blocks" else 1) for v in getattr(config, name)), name, "positive numbers")
    return config
