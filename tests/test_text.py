"""Laws of text.py and of what reads the text: cross-attention, guidance, the portrait rule, withheld pairs."""
import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import config as C
import data as D
import sample as P
import text as X
import unet
import uvit
from plumbing import t5
from plumbing.sampling import make_conditions
from plumbing.settings import override
from plumbing.sources import open_run, open_source
from programs import page, stirred

SIZE, LENGTH, CHANNELS = (16, 16), 24, 16


def settings(**values):
    """A tiny Config with text; any of the three networks."""
    base = dict(size=SIZE, base_channels=8, emb_channels=16, channel_mult=(1, 2), num_res_blocks=(1,), num_heads=2,
                num_transformer_blocks=1, text_encoder="bytes", text_channels=CHANNELS, text_length=LENGTH,
                text_layers=1, sample_steps=3, guidance=1.0, precision="float32", clip_x="none")
    if values.get("model") == "unet":
        base.update(num_res_blocks=(1, 1), attn_resolutions=(8,))
    return override(C.PRESETS["glyphs64_text"], **{**base, **values})


KINDS = {"uvit": dict(), "unet": dict(model="unet"),
         "mdm": dict(model="unet", attn_layers=(0, 2)),
         "nested": dict(size=(32, 32), patching="none", outer_channels="8,8", outer_blocks="1,1"),
         "sr": dict(low_size=(8, 8)),
         "attention above": dict(channel_mult=(1, 1, 2), num_res_blocks=(1, 1), transformer_resolutions=(4,)),
         "not pooled": dict(text_pooled=False)}


def conditions(config, captions, **more):
    cond = t5.Encoder(config, "cpu")(captions)
    if config.low_size:
        cond["low_res"] = torch.randn(len(captions), 3, *config.low_size, generator=torch.Generator().manual_seed(5))
    return {**cond, **more}


def run(model, config, cond):
    """v of the highest level for fixed noises."""
    B, g = len(cond["text"]) if "text" in cond else 2, torch.Generator().manual_seed(3)
    z = [torch.randn(B, 3, *size, generator=g) for size in config.sizes]
    logsnr = [torch.zeros(B) for _ in z]
    with torch.no_grad():
        return model(z, logsnr, cond)[0] if config.outer_channels else model(z[0], logsnr[0], cond)


@pytest.fixture(params=KINDS)
def network(request):
    config = settings(**KINDS[request.param])
    return stirred(config), config


# ---- masks, order, null, leaks

def test_padding_never_changes_the_output_and_the_order_of_the_tokens_does(network):
    """Kills: a forgotten mask in the encoder, in the cross-attention or in the mean."""
    model, config = network
    cond = conditions(config, ["a red A", "on blue, B"])
    other = dict(cond, text=torch.where(cond["text_mask"], cond["text"], 77))
    assert torch.equal(run(model, config, cond), run(model, config, other))
    short = dict(cond, text=cond["text"][:, :12], text_mask=cond["text_mask"][:, :12])          # less padding
    assert_close(run(model, config, short), run(model, config, cond), atol=1e-3, rtol=1e-3)
    swapped = run(model, config, conditions(config, ["a rde A", "on blue, B"]))
    difference = (swapped - run(model, config, cond)).abs().amax((1, 2, 3))
    assert difference[0] > 1e-4 and difference[1] == 0


def test_embeddings_from_outside_may_be_padded_to_any_length():
    config = settings(text_encoder="a T5", text_channels=CHANNELS)
    model, tokens = stirred(config), torch.randn(2, 12, CHANNELS)
    seen = torch.arange(12) < torch.tensor([[5], [7]])
    long = run(model, config, dict(text=tokens, text_mask=seen))
    assert_close(long, run(model, config, dict(text=tokens[:, :7], text_mask=seen[:, :7])), atol=1e-4, rtol=1e-4)
    tokens[:, 7:] = 1e4
    assert torch.equal(long, run(model, config, dict(text=tokens, text_mask=seen)))
    assert (long - run(model, config, dict(text=tokens, text_mask=seen.roll(1, 1)))).abs().max() > 1e-3


def test_a_dropped_caption_equals_the_null_embedding_whatever_the_text(network):
    """Kills: an empty text that is read nevertheless; a softmax over nothing; a null embedding that does not learn."""
    model, config = network
    cond = conditions(config, ["a red A", "on blue, B"])
    none = dict(cond, text_mask=torch.zeros_like(cond["text_mask"]))
    other = dict(none, text=torch.full_like(none["text"], 66))
    assert torch.equal(run(model, config, none), run(model, config, other))
    assert torch.equal(run(model, config, none), run(model, config, conditions(config, ["", ""])))
    absent = {key: value for key, value in cond.items() if "text" not in key}
    assert_close(run(model, config, none), run(model, config, absent), atol=1e-4, rtol=1e-4)
    assert (run(model, config, none) - run(model, config, cond)).abs().amin(0).max() > 1e-3
    half = dict(cond, text_mask=cond["text_mask"] & torch.tensor([[True], [False]]))            # each for itself
    assert torch.equal(run(model, config, half)[0], run(model, config, cond)[0])
    assert torch.equal(run(model, config, half)[1], run(model, config, none)[1])
    null = next(p for name, p in model.named_parameters() if name.endswith("text.null"))
    with torch.no_grad():
        null.add_(1)
    assert (run(model, config, half) - run(model, config, cond))[1].abs().max() > 1e-3
    assert torch.equal(run(model, config, half)[0], run(model, config, cond)[0])


def test_two_captions_in_a_batch_do_not_leak_into_each_other(network):
    model, config = network
    one, other = (run(model, config, conditions(config, ["a red A", second])) for second in ("on blue, B", "9"))
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() > 1e-4


def test_every_part_learns_from_the_loss(network):
    model, config = network
    cond = conditions(config, ["a red A", ""])
    z = [torch.randn(2, 3, *size) for size in config.sizes]
    logsnr = [torch.zeros(2) for _ in z]
    v = model(z, logsnr, cond) if config.outer_channels else [model(z[0], logsnr[0], cond)]
    sum(level.square().sum() for level in v).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias that all keys share changes no softmax. Bytes that are not in the text have embeddings without gradient.
    assert not [name for name in unused if not name.endswith("norm_k.bias") and name not in (
        "no_level", "level.0.weight", "level.0.bias", "level.2.weight", "level.2.bias")]


def test_cross_attention_is_what_its_name_says():
    """It equals the definition, a loop over heads and queries. Its residual starts as the identity."""
    layer, x = unet.CrossAttention(8, 6, 2), torch.randn(2, 5, 8)
    tokens, mask = torch.randn(2, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    unet.initialise(layer)
    assert torch.equal(layer(x, (tokens, mask)), x)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape) * 0.5)
    out, k, v = torch.zeros(2, 5, 8), *layer.kv(tokens).chunk(2, 2)
    for b in range(2):
        for head in (slice(0, 4), slice(4, 8)):
            for n in range(5):
                q = layer.norm_q(layer.q(layer.norm(x[b, n]))[head])
                weight = torch.softmax((layer.norm_k(k[b, mask[b], head]) @ q) / math.sqrt(4), 0)
                out[b, n, head] = weight @ v[b, mask[b], head]
    assert_close(layer(x, (tokens, mask)), x + layer.out(out))


def test_where_the_text_goes_in():
    """3.6: cross-attention in every transformer block, self-attention instead of convolution at 32 x 32. In nested
    models only the innermost network reads the text."""
    with torch.device("meta"):
        for name, side in (("t2i256_uvit", 128), ("t2i512_uvit", 128), ("t2i384x640_uvit", 96)):
            model = C.build_model(C.PRESETS[name])
            assert len(model.transformer) == 36 and all(block.cross is not None for block in model.transformer)
            kinds = [[type(block) for block, _ in level] for level in model.down]
            assert kinds == [[unet.ResBlock] * 2] * 2 + [[uvit.AttentionBlock] * 2]             # 128, 64, 32
            assert [[type(block) for block, _ in level] for level in model.up] == kinds[::-1]
            assert model.first_map[0] == side and model.embed.label.num_embeddings == 1
            assert not any("encoder" in key for key in model.state_dict())                      # a T5 is outside
        nested = C.build_model(settings(**KINDS["nested"]))
        crosses = [name for name, m in nested.named_modules() if isinstance(m, unet.CrossAttention)]
        assert crosses and all(name.startswith("inner.") for name in crosses)
        plain = C.build_model(C.PRESETS["glyphs64"])
        assert not any(isinstance(m, (unet.CrossAttention, X.TextCondition)) for m in plain.modules())
    t2i = C.PRESETS["t2i512_uvit"]
    assert (t2i.schedule, t2i.noise_d, t2i.noise_d_high, t2i.steps) == ("interpolated", 32, 256, 700_000)
    wide = C.PRESETS["t2i384x640_uvit"]
    noisy_end = -15 + 2 * math.log(32 / math.sqrt(384 * 640))             # the d of an image that is not square
    assert wide.portrait and float(C.make_schedule(wide)(torch.tensor(1.0))) == pytest.approx(noisy_end, abs=1e-4)


def test_layers_that_read_the_text_are_a_group_with_a_lower_rate():
    """On a laptop; the papers have one rate. Kills: layers that are in no group, or in both; a tenth beside a T5."""
    assert {name: preset.text_lr for name, preset in C.PRESETS.items() if preset.text_encoder} == {
        "glyphs64_text": 0.1, "t2i256_uvit": 1.0, "t2i512_uvit": 1.0, "t2i384x640_uvit": 1.0}
    assert {C.PRESETS[name].text_lr for name in ("mdm64", "imagenet128_unet", "cdm32")} == {1.0}
    config = settings()
    model = C.build_model(config)
    groups = C.parameter_groups(model, config)
    assert [group.get("share") for group in groups] == [None, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.embed.text.parameters()}
    assert len(C.parameter_groups(C.build_model(C.PRESETS["glyphs16"]), config)) == 1           # no text: one group


def test_the_tokens_of_bytes_are_words():
    """A token is the mean over the bytes of one word. Spaces make none. Kills: a neighbour word mixed in."""
    encoder = X.ByteEncoder(8, 16, 0, 2, reach=0)
    unet.initialise(encoder)
    tokens, mask = encoder(*X.to_bytes(["ab c", "  c ab", " "], 16))
    assert mask.sum(1).tolist() == [2, 2, 0]
    byte = lambda letters: encoder.byte(torch.tensor(list(letters.encode())))
    word = lambda letters: (byte(letters) + encoder.near(byte(letters))).mean(0)
    assert_close(tokens[0, 0] - encoder.position[0], word("ab"))
    assert_close(tokens[0, 1] - encoder.position[1], word("c"))
    assert_close(tokens[1, 2] - encoder.position[2], word("c"))           # the third place: two spaces before it


def test_bytes():
    text, mask = X.to_bytes(["aΩ", "", "abcdef"], 4)
    assert text.tolist() == [[97, 206, 169, 0], [0, 0, 0, 0], [97, 98, 99, 100]]
    assert mask.sum(1).tolist() == [3, 0, 4]


# ---- guidance

def test_guidance_1_equals_none_to_the_bit_and_negative_text_takes_the_place_of_none(network):
    model, config = network
    calls, forward = [], model.forward
    model.forward = lambda *args: calls.append(args[2]) or forward(*args)
    low, cpu = {}, torch.device("cpu")
    if config.low_size:
        low = dict(low_res=torch.randn(2, 3, 8, 8), aug_logsnr=torch.full((2,), torch.inf))

    def draw(guidance, negative=""):
        calls.clear()
        asked = dict(make_conditions(config, [-1, -1], cpu, ["a red A", "on blue, B"]), **low)
        away = make_conditions(config, [-1, -1], cpu, [negative] * 2) if negative else None
        return P.sample_run(model, override(config, guidance=guidance), asked, [4, 5], cpu, "float32", negative=away)

    one = draw(1.0)
    assert len(calls) == 3 and all("text" in cond for cond in calls)
    assert torch.equal(one, draw(1.0, "anything"))
    two = draw(2.0)
    assert len(calls) == 6 and sum("text" in cond for cond in calls) == 3
    assert not config.low_size or all("low_res" in cond for cond in calls)                      # never dropped
    cond, dropped = calls[0], calls[1]

    def mixed(z, logsnr, _):                                              # eq. 7 by hand, in a model without guidance
        with_text, without = forward(z, logsnr, cond), forward(z, logsnr, dropped)
        if config.outer_channels:
            return [a + (a - b) for a, b in zip(with_text, without)]
        return with_text + (with_text - without)
    model.forward = mixed
    assert torch.equal(draw(1.0), two)
    model.forward = lambda *args: calls.append(args[2]) or forward(*args)
    assert (two - one).abs().max() > 1e-3
    away = draw(2.0, "on blue, B")
    assert len(calls) == 6 and all("text" in cond for cond in calls)
    assert (away - two).abs().max() > 1e-3
    assert_close(away[1], one[1], atol=1e-3, rtol=1e-3)                   # negative = positive: eq. 7 leaves v_cond


def test_guidance_with_dynamic_thresholding_keeps_the_range():
    """Where a prediction is far out of range, static clipping burns most pixels to -1 or 1, dynamic few."""
    burnt = {}
    for clip in ("static", "dynamic"):
        config = settings(guidance=8.0, clip_x=clip)
        asked = make_conditions(config, [-1], "cpu", ["a red A"])
        images = P.sample_run(stirred(config), config, asked, [0], torch.device("cpu"), "float32")
        assert images.abs().max() <= 1
        burnt[clip] = (images.abs() > 0.999).float().mean()
    assert burnt["static"] > 0.5 and burnt["dynamic"] < 0.1


# ---- shape

def test_turning_twice_is_the_identity_and_turns_back():
    x = torch.randn(2, 3, 4, 6)
    assert torch.equal(D.turned_back(D.turned(x)), x) and D.turned(x).shape == (2, 3, 6, 4)
    assert torch.equal(D.turned(D.turned(D.turned_back(D.turned_back(x)))), x)
    assert torch.equal(D.turned(x)[0, 0, :, 0], x[0, 0, 0].flip(0))       # counter-clockwise: the top goes left


def test_flagged_and_unflagged_examples_are_consistent(tmp_path):
    """An image and the same image upright give the model the same tensor, without and with the flag."""
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8))
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "tall.png")                      # clockwise
    (tmp_path / "tall.txt").write_text("tall")
    source = open_source(str(tmp_path), (24, 40), portrait=True)
    assert source.image(0).shape == (3, 40, 24)
    pair = {e["caption"]: e for e in map(D.Stream(source, 0).__getitem__, range(2))}
    assert (pair["tall"]["portrait"], pair[""]["portrait"]) == (1, 0)
    assert torch.equal(pair["tall"]["image"], pair[""]["image"])
    batch = D.collate([pair["tall"], pair[""]])
    assert batch["portrait"].tolist() == [1, 0] and batch["image"].shape == (2, 3, 24, 40)
    # Without the rule, the tall image is cropped, not turned. Images are mirrored before they are turned.
    assert open_source(str(tmp_path), (24, 40)).image(0).shape == (3, 24, 40)
    mirrored = D.Stream(source, 1, flip=True)
    flips = {tuple(e["image"].flatten().tolist()) for e in (mirrored[k] for k in range(40)) if e["portrait"]}
    tall = source.image(0)
    assert flips == {tuple(D.turned(image).flatten().tolist()) for image in (tall, tall.flip(-1))}


def test_scenes_stand_upright_by_turns_of_every_character():
    source = D.Glyphs((16, 24), portrait=True)
    flags = [source.image(i).shape[1] > source.image(i).shape[2] for i in range(72)]
    assert flags == [False] * 36 + [True] * 36
    assert D.Glyphs((24, 16)).scene(40).keys() == source.scene(40).keys()
    assert torch.equal(source.image(40), D.Glyphs((24, 16)).image(40))    # the same scene, drawn tall


def test_the_portrait_flag_is_a_condition_that_guidance_keeps():
    config = settings(size=(16, 24), portrait=True)
    model = stirred(config)
    cond = conditions(config, ["a red A", "a red A"], portrait=torch.tensor([0, 1]))
    v, plain = run(model, config, cond), run(model, config, {k: cond[k] for k in ("text", "text_mask")})
    assert torch.equal(v[0], plain[0]) and (v[1] - plain[1]).abs().max() > 1e-3
    calls, forward = [], model.forward
    model.forward = lambda *args: calls.append(args[2]) or forward(*args)
    asked = make_conditions(config, [-1], "cpu", ["a"], portrait=True)
    images = P.sample_run(model, override(config, guidance=3.0), asked, [0], torch.device("cpu"), "float32")
    assert images.shape == (1, 3, 16, 24) and all(cond["portrait"].tolist() == [1] for cond in calls)


def test_withheld_pairs_never_come_in_training_and_all_their_parts_do():
    config = C.PRESETS["glyphs64_text"]
    seen, withheld = open_run(config), open_run(config, pairs="withheld")
    pairs = [(seen.label(i), seen.scene(i)["letter"]) for i in range(4000)]
    assert not any(D.withheld(*pair) for pair in pairs)
    hidden = [(withheld.label(i), withheld.scene(i)["letter"]) for i in range(500)]
    assert all(D.withheld(*pair) for pair in hidden)
    assert {a for a, _ in hidden} == {a for a, _ in pairs} and {b for _, b in hidden} == {b for _, b in pairs}
    every = D.Glyphs()
    same = [i for i in range(200) if not D.withheld(every.label(i), every.scene(i)["letter"])]
    assert 120 < len(same) < 190 and all(seen.caption(i) == every.caption(i) for i in same)     # the rest are redrawn


# ---- the page

def test_the_page_prints_what_text_costs(monkeypatch, capsys):
    """Kills: a page with other numbers than the presets have."""
    monkeypatch.setattr(sys, "argv", ["text.py"])
    printed = page("text.py", capsys)
    for name in ("glyphs64_text", "t2i256_uvit", "t2i512_uvit", "t2i384x640_uvit"):
        with torch.device("meta"):
            model = C.build_model(C.PRESETS[name])
        millions = lambda kind: sum(p.numel() for module in model.modules() if isinstance(module, kind)
                                    for p in module.parameters()) / 1e6
        row = next(line for line in printed.splitlines() if line.startswith(name)).split()
        assert row[1:4] == [f"{millions(k):.1f}" for k in (uvit.UViT, unet.CrossAttention, X.ByteEncoder)], row
    assert "38 of 48 places are text" in printed and "128 tokens x 4096" in printed


def test_the_page_takes_no_arguments(monkeypatch, capsys):
    """`python text.py cache ...` was the cache's program. Kills: such a command that seems to work."""
    monkeypatch.setattr(sys, "argv", ["text.py", "cache", "--data", "photos"])
    with pytest.raises(SystemExit) as leave:
        page("text.py", capsys)
    said = capsys.readouterr()
    assert leave.value.code == 2 and said.err.count("\n") == 1 and "python -m plumbing.t5" in said.err and not said.out
