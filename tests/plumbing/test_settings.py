"""Laws of the settings: a flag for each field, a rule for each value, one line for each mistake."""
import dataclasses
import math
import random
import time
from typing import get_args

import pytest
import torch

import config as C
from plumbing import start
from plumbing import UserError
from plumbing.runs import config_of
from plumbing.settings import RANGES, Parser, add_fields, help_of_fields, override
from programs import program_here

FIELDS = {field.name: field for field in dataclasses.fields(C.Config)}
NESTED = dict(patching="none", outer_channels="32,64", outer_blocks="1,1", outer_patching="dwt_1")


def refused(preset="glyphs64", **values):
    """The line with which override refuses these values."""
    with pytest.raises(UserError) as error:
        override(C.PRESETS[preset], **values)
    line = str(error.value)
    assert "\n" not in line
    return line


# ---- the flags

def test_every_field_has_a_flag_with_its_comment(monkeypatch):
    """Kills: a comment that stands on a line of its own, or a field without one: -h would lack it."""
    assert set(help_of_fields()) == set(FIELDS)
    assert all(heading and len(text) > 5 for heading, text in help_of_fields().values())
    monkeypatch.setenv("COLUMNS", "400")
    page = program_here("train.py", "-h").stdout
    for name, (heading, text) in help_of_fields().items():
        if name not in start.SET_ELSEWHERE:
            assert f"--{name.replace('_', '-')}" in page and text in page and f"\n{heading}:\n" in page, name
    assert page.index("\nprocess") < page.index("--noise-d ") < page.index("\nloss") and "--noise_d" not in page
    assert page.startswith("usage: train.py [--preset") and page.index("options:") < 300    # no page of brackets first
    assert "--no-flip" in page and "paper 32" in page and "{cosine,shifted,interpolated}" in page


def test_a_flag_can_be_written_with_either_dash_and_is_absent_unless_given():
    parser = Parser()
    add_fields(parser, list(FIELDS))
    args = parser.parse_args("--noise-d 32 --sample_steps 7 --size 24x32 --channel-mult 1,2,4 --flip --no-portrait "
                             "--loss v_mse --outer-channels 8,8/16".split())
    assert vars(args) == dict(noise_d=32.0, sample_steps=7, size=(24, 32), channel_mult=(1, 2, 4), flip=True,
                              portrait=False, loss="v_mse", outer_channels="8,8/16")


@pytest.mark.parametrize("words, wanted", [
    ("--lr fast", "--lr: invalid float value: 'fast'"), ("--batch 1.5", "--batch: invalid int value: '1.5'"),
    ("--size 1,", "1,: want whole numbers, like 64 or 1,2,4"), ("--channel-mult -1", "--channel-mult"),
    ("--model gan", "invalid choice: 'gan'"), ("--steps", "expected one argument"),
    ("--nosuch 1", "unrecognized arguments: --nosuch 1"), ("--flip=1", "ignored explicit argument"),
    ("--sample 1", "ambiguous option: --sample could match --sampler, --sample-steps")])
def test_a_word_that_is_no_setting_is_one_line(words, wanted):
    parser = Parser()
    add_fields(parser, list(FIELDS))
    with pytest.raises(UserError) as error:
        parser.parse_args(words.split())
    assert wanted in str(error.value) and "\n" not in str(error.value)


# ---- the rules for one field

def test_every_number_has_a_range():
    """Kills: a new field that nobody checks; a range without an end, through which inf goes."""
    for name, field in FIELDS.items():
        if field.type in (int, float) or get_args(field.type)[:1] == (int,):
            lowest, highest = RANGES[name]
            assert -math.inf < lowest < highest < math.inf, name
            for wrong in (math.nan, math.inf, -math.inf, highest + 1, lowest - 1, -10 ** 30, 10 ** 300):
                if field.type is float:
                    line = refused(**{name: float(wrong)})
                    assert line.startswith(f"--{name.replace('_', '-')} {float(wrong)}: want "), line
                elif abs(wrong) < math.inf:
                    value = int(wrong) if field.type is int else (int(wrong),) * 2
                    assert refused(**{name: value}).startswith(f"--{name.replace('_', '-')} "), name


@pytest.mark.parametrize("name, right, wrong", [
    ("scenes", (1, 10 ** 8), (0, 10 ** 12)), ("batch", (1, 10 ** 6), (0, -1, 10 ** 9)), ("log_every", (1,), (0,)),
    ("warmup", (0,), (-1,)), ("held_out_every", (0, 1), (-1,)), ("seed", (0, 2 ** 31 - 1), (-1, 2 ** 31)),
    ("dropout", (0.0, 0.999), (1.0, -0.1)), ("ema", (0.0,), (1.0,)), ("cond_drop", (0.0, 1.0), (1.01, -0.01)),
    ("lr", (1e-12, 10), (0.0, math.inf, 1e300)), ("noise_d", (0.5,), (0.0, 1e300)), ("level_power", (0, 4.0), (4.1,)),
    ("guidance", (-1.0, 0.0, 1000), (math.inf, 1e308)), ("guidance_max", (0.0, 3.0), (1.0, -1.0, math.inf)),
    ("workers", (-1, 0, 256), (-2, 257)), ("multiscale", (0, 64), (-1, 65)), ("weight_decay", (0.0,), (math.inf,)),
    ("emb_channels", (2 ** 16,), (10 ** 12,)), ("num_transformer_blocks", (0, 450), (10 ** 8,)),
    ("size", ((64,), (32, 64), (4, 4)), ((0,), (1, 2, 3), (64, 0), (65537,))),
    ("channel_mult", ((1, 2),), ((0, 1), (1, -1), (1,) * 17, ())), ("num_res_blocks", ((0, 1),), ((1, -1),))])
def test_the_edges_of_the_ranges(name, right, wrong):
    """Kills: < for <=, and a bound on the wrong side."""
    for value in right:
        override(C.PRESETS["glyphs64"], **{name: value})
    for value in wrong:
        line = refused(**{name: value})
        shown = ",".join(map(str, value * 2 if name == "size" and len(value) == 1 else value)) if isinstance(
            value, tuple) else value
        assert line.startswith(f"--{name.replace('_', '-')} {shown}: want "), line


@pytest.mark.parametrize("values", [
    dict(num_transformer_blocks=500, num_res_blocks=(500, 500)), dict(num_res_blocks=(9, 9), attn_layers=(99, 99)),
    dict(NESTED, outer_blocks="1,100000"), dict(NESTED, outer_channels="32,99999999"),
    dict(NESTED, outer_channels="/" * 20), dict(base_channels=2 ** 16, channel_mult=(1, 1000))])
def test_a_network_that_nobody_can_build_is_one_line(values):
    """Kills: numbers that are right one by one, and make a network of a million blocks together."""
    since = time.time()
    assert "want " in refused(**values) and time.time() - since < 1


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_a_value_of_another_type_is_one_line(field):
    """A checkpoint may hold anything in place of a setting. Kills: "nosuch" as a sampler; True as a number of steps; a
    traceback of a comparison, much later."""
    deep = []
    for _ in range(60):                                                   # 2^60 brackets, were they written
        deep = [deep, deep]
    for wrong in (None, {}, b"x", ("x", 1), [1], deep, (deep,), torch.zeros(2), True if field.type is not bool else 1,
                  "nosuch" if field.type is not str else 7):
        assert refused(**{field.name: wrong}).startswith(f"--{field.name.replace('_', '-')} "), wrong


# ---- the rules between fields

@pytest.mark.parametrize("values, wanted", [
    (dict(schedule="interpolated", noise_d=64.0, noise_d_high=32.0), "--noise-d-high 32.0: want at least noise_d (64)"),
    (dict(logsnr_min=5.0, logsnr_max=5.0), "--logsnr-min 5.0: want below logsnr_max (5)"),
    (dict(logsnr_max=26.0), "--logsnr-max 26.0: want -25 to 25"),
    (dict(portrait=True), "--portrait True: want a --size that is wider than tall, not 64,64"),
    (dict(blur_low=0.7), "--blur-high 0.6: want at least blur_low (0.7)"),
    (dict(guidance_max=4.0, guidance=5.0), "--guidance 5.0: want 1 to 4, what this distilled model has learnt"),
    (dict(guidance_max=4.0, guidance=0.5), "--guidance 0.5: want 1 to 4"),
    (dict(low_size=(24,)), "--low-size 24,24: want a size that divides 64x64, alike in height and width"),
    (dict(low_size=(64,)), "--low-size 64,64: want a size"), (dict(low_size=(16, 32)), "--low-size 16,32: want a size"),
    (dict(low_size=(0,)), "--low-size 0,0: want numbers from 1 to 65,536"),
    (dict(low_size=(8, 8, 8)), "--low-size 8,8,8: want a size"),
    (dict(NESTED, low_size=(16,)), "--low-size 16,16: want no low-res image for a nested model"),
    (dict(NESTED, multiscale=32), "--multiscale 32: want at most the side of the lowest level, 16"),
    (dict(NESTED, outer_channels=",".join(["8"] * 17), outer_blocks=",".join(["1"] * 17)), "does not divide by"),
    (dict(low_size=(24, 32)), "--low-size 24,32: want a size"), (dict(low_size=(32, 24)), "--low-size 32,24: want a"),
    (dict(precondition="none"), "--loss band_mse: want v_mse or eps_mse"),
    (dict(NESTED, outer_channels="/".join(["8"] * 16), outer_blocks="/".join(["1"] * 16)), "want fewer than 16 levels"),
    (dict(NESTED, outer_channels="a"), "--outer-channels a: want whole numbers, 1 or more"),
    (dict(NESTED, outer_channels="32,0"), "--outer-channels 32,0: want whole numbers, 1 or more"),
    (dict(NESTED, outer_channels="32,64/"), "--outer-channels 32,64/: want a width or more for each level"),
    (dict(NESTED, outer_blocks="1"), "--outer-blocks 1: want a number of blocks for each width of --outer-channels 32"),
    (dict(outer_blocks="1"), "--outer-blocks 1: want a number of blocks for each width of --outer-channels (none)"),
    (dict(NESTED, level_weights="1:1:1"), "--level-weights 1:1:1: want a number for each of the 2 levels, like 1:1"),
    (dict(NESTED, level_weights="1:-1"), "--level-weights 1:-1: want whole numbers, 1 or more"),
    (dict(mixed_ratio="2:1"), "--mixed-ratio 2:1: want a number for each of the 1 levels, like 1"),
    (dict(NESTED, mixed_ratio="1:1000"), "mixed ratio 1:1000 of 8 images leaves none for the highest level"),
    (dict(NESTED, size=(62,)), "size 62x62: level 62x62 does not divide by 4"),
    (dict(NESTED, outer_channels="32", outer_blocks="1", outer_patching="none"), "level 64x64 is not below 64x64"),
    (dict(NESTED, outer_patching="haar"), "patching 'haar'")])
def test_settings_that_do_not_fit_together_are_one_line(values, wanted):
    assert wanted in refused(**values)


def test_what_override_sets_by_itself():
    """One number is a square; a model with text has no classes, whatever its preset says. Kills, too: a rule of the
    interpolated schedule for the others."""
    assert override(C.PRESETS["glyphs64"], schedule="shifted", noise_d=64.0, noise_d_high=32.0).noise_d == 64
    assert override(C.Config(), size=(32,), low_size=(8,)).size == (32, 32)
    assert override(C.Config(), size=(32,), low_size=(8,)).low_size == (8, 8)
    assert override(C.PRESETS["glyphs64"], text_encoder="bytes").num_classes == 0
    assert override(C.PRESETS["glyphs64_text"], num_classes=36).num_classes == 0
    assert override(C.PRESETS["glyphs64_text"], text_encoder="", num_classes=36).num_classes == 36


def test_presets_and_their_saved_form_pass_their_own_rules():
    """Kills: a rule that no preset of the papers meets; a checkpoint, of lists, that is another Config once loaded."""
    for name, preset in C.PRESETS.items():
        assert override(preset) == preset
        saved = {key: list(value) if isinstance(value, tuple) else value for key, value in vars(preset).items()}
        assert config_of(saved) == preset, name


def test_a_checkpoint_from_before_a_field_loads_with_its_default():
    """Kills: a default of a new field that asks an old run for something it has not: a folder of held-out images."""
    saved = vars(C.PRESETS["glyphs64"]).copy()
    del saved["held_out"], saved["held_out_every"]
    config = config_of(saved)
    assert config.held_out == "" and config.held_out_every == 1000
    assert dataclasses.replace(config, held_out_every=200) == C.PRESETS["glyphs64"]


# ---- the network

@pytest.mark.parametrize("preset, values, wanted", [
    ("glyphs64", dict(size=(30,)), "size 30x30: height and width must be multiples of 8"),
    ("glyphs64", dict(patching="haar"), "patching 'haar'"), ("glyphs64", dict(num_heads=5), "heads"),
    ("glyphs64", dict(channel_mult=(1, 2)), "widths"), ("glyphs64_unet", dict(channel_mult=(1, 2)), "widths"),
    ("glyphs64_unet", dict(attn_layers=(1,)), "attention layers"), ("glyphs64_text", dict(num_heads=5), "heads"),
    ("glyphs64_nested", dict(outer_channels="32,64,64", outer_blocks="1,1,1", size=(24,)), "size")])
def test_a_network_that_does_not_fit_is_one_line(preset, values, wanted):
    with pytest.raises(UserError, match=wanted) as error, torch.device("meta"):
        C.build_model(override(C.PRESETS[preset], **values))
    assert "\n" not in str(error.value)


def test_no_setting_shows_a_traceback():
    """A few hundred random command lines, seeded: each is a Config, or one line."""
    parser, rng, well = Parser(), random.Random(0), 0
    add_fields(parser, list(FIELDS))
    values = ["0", "1", "-1", "2", "64", "16", "32,64", "1,1", "1,2,4", "0.5", "1e-3", "1e400", "nan", "", "-", "a b",
              "none", "dwt_1", "bytes", "2:1", "1:0", "/", "on", "9" * 30, "9" * 400, "0x10", "1_000", "64x32", "%s"]
    for _ in range(400):
        words = [word for _ in range(rng.choice((1, 1, 2, 3)))
                 for word in ("--" + rng.choice(list(FIELDS)), rng.choice(values))]
        try:
            override(C.PRESETS[rng.choice(list(C.PRESETS))], **vars(parser.parse_args(words)))
            well += 1
        except UserError as error:                                        # anything else raises
            assert str(error) and "\n" not in str(error), words
    assert 20 < well < 380


# ---- what "auto" becomes on a machine

@pytest.mark.parametrize("device, steps, first, said, wanted", [
    ("cuda", start.COMPILE_FROM, 0, "auto", "on"), ("cuda", start.COMPILE_FROM - 1, 0, "auto", "off"),
    ("cuda", start.COMPILE_FROM, 1, "auto", "off"), ("cpu", 10 ** 6, 0, "auto", "off"), ("cuda", 10, 0, "on", "on"),
    ("cuda", 10 ** 6, 0, "off", "off"), ("cpu", 10, 0, "on", "on")])
def test_compile_auto_is_on_where_many_steps_are_to_come(device, steps, first, said, wanted):
    """Kills: a minute of compiling for a run of a minute; the steps of a resumed run counted from its beginning; a
    help text of another number."""
    config = override(C.PRESETS["glyphs64"], steps=steps, compile=said)
    assert start.resolve_machine(config, torch.device(device), 1, first).compile == wanted
    assert f"{start.COMPILE_FROM:,} steps" in help_of_fields()["compile"][1]
    assert max(preset.steps for preset in C.PRESETS.values() if preset.data) < start.COMPILE_FROM


@pytest.mark.parametrize("device, cores, world, wanted", [
    ("cuda", 16, 1, 15), ("cuda", 128, 8, 15), ("cuda", 128, 1, 16), ("cuda", 2, 1, 1), ("cuda", 1, 1, 1),
    ("cpu", 16, 1, 8), ("cpu", 2, 1, 1), ("cpu", 8, 2, 2)])
def test_workers_are_chosen_so_that_a_card_need_not_wait(device, cores, world, wanted, monkeypatch):
    """Kills: half of the cores idle beside a card; more workers than cores; none."""
    monkeypatch.setattr(start, "cores", lambda: cores)
    assert start.resolve_machine(C.PRESETS["glyphs64"], torch.device(device), world, 0).workers == wanted
    config = override(C.PRESETS["glyphs64"], workers=0)
    assert start.resolve_machine(config, torch.device(device), world, 0).workers == 0


@pytest.mark.parametrize("here, world, wanted", [("8", 32, 7), ("8", 8, 7), ("4", 32, 15), (None, 8, 7), ("", 8, 7),
                                                 ("0", 8, 7), ("x", 8, 7), ("8", 1, 16)])
def test_workers_share_the_cores_of_their_own_machine(monkeypatch, here, world, wanted):
    """Four machines of eight processes and 64 cores. Kills: one worker a process there, 32 GPUs that wait for data;
    a variable of another job that is believed."""
    monkeypatch.setattr(start, "cores", lambda: 64)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    assert start.resolve_machine(C.PRESETS["glyphs64"], torch.device("cuda"), world, 0).workers == wanted
