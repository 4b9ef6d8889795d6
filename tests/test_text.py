"""Laws of text.py and of what is told the text: cross-attention, the portrait rule, guidance, the programs."""
import math
import shutil
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
import train as T
import unet
import uvit
from programs import TINY, program, run_here, stirred
from plumbing import UserError, t5
from plumbing.sampling import conditions_of
from plumbing.settings import override

SIZE, LENGTH, CHANNELS = (16, 16), 24, 16
TEXT = ["--text-encoder", "bytes", "--text-channels", 16, "--text-length", 48, "--text-layers", 1]


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


def told(config, captions, **more):
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
    cond = told(config, ["a red A", "on blue, B"])
    other = dict(cond, text=torch.where(cond["text_mask"], cond["text"], 77))
    assert torch.equal(run(model, config, cond), run(model, config, other))
    short = dict(cond, text=cond["text"][:, :12], text_mask=cond["text_mask"][:, :12])          # less padding
    assert_close(run(model, config, short), run(model, config, cond), atol=1e-3, rtol=1e-3)
    swapped = run(model, config, told(config, ["a rde A", "on blue, B"]))
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
    """Kills: dropped by an empty text that is read all the same; a softmax over nothing; a null that is not learnt."""
    model, config = network
    cond = told(config, ["a red A", "on blue, B"])
    none = dict(cond, text_mask=torch.zeros_like(cond["text_mask"]))
    other = dict(none, text=torch.full_like(none["text"], 66))
    assert torch.equal(run(model, config, none), run(model, config, other))
    assert torch.equal(run(model, config, none), run(model, config, told(config, ["", ""])))
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
    one, other = (run(model, config, told(config, ["a red A", second])) for second in ("on blue, B", "9"))
    assert torch.equal(one[0], other[0]) and (one[1] - other[1]).abs().max() > 1e-4


def test_every_part_learns_from_the_loss(network):
    model, config = network
    cond = told(config, ["a red A", ""])
    z = [torch.randn(2, 3, *size) for size in config.sizes]
    logsnr = [torch.zeros(2) for _ in z]
    v = model(z, logsnr, cond) if config.outer_channels else [model(z[0], logsnr[0], cond)]
    sum(level.square().sum() for level in v).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # A bias of all keys alike changes no softmax; the embeddings of bytes that are not in the text are not reached.
    assert not [name for name in unused if not name.endswith("norm_k.bias") and name not in (
        "no_level", "level.0.weight", "level.0.bias", "level.2.weight", "level.2.bias")]


def test_cross_attention_is_what_its_name_says():
    """Against the definition, a loop over heads and queries; the residual starts as the identity."""
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
    """3.6: cross-attention in every transformer block, self-attention in place of convolution at 32 x 32; in nested
    models the innermost network alone."""
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
    assert wide.portrait and wide.image_d == pytest.approx(math.sqrt(384 * 640))


def test_what_reads_the_text_learns_at_its_own_rate(run_folder):
    """Kills: the share forgotten at the first step, by the warm-up; layers that are in no group, or in both."""
    config = settings()
    model = C.build_model(config)
    groups = C.rates(model, config)
    assert [group.get("share") for group in groups] == [None, 0.1]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in model.embed.text.parameters()}
    assert len(C.rates(C.build_model(C.PRESETS["glyphs16"]), config)) == 1                      # no text: as ever
    state = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    rates = [group["lr"] for group in state["optimizer"]["param_groups"]]
    assert rates == pytest.approx([4e-5, 4e-6])                           # step 4 of a warm-up of 100 to 1e-3


def test_the_tokens_of_bytes_are_words():
    """Its own words alone make a token, up to the bytes beside it; spaces make none."""
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
        asked = dict(conditions_of(config, [-1, -1], cpu, ["a red A", "on blue, B"]), **low)
        away = conditions_of(config, [-1, -1], cpu, [negative] * 2) if negative else None
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
    assert_close(away[1], one[1], atol=1e-3, rtol=1e-3)                   # away from itself: eq. 7 leaves v_cond


def test_guidance_with_dynamic_thresholding_keeps_the_range():
    """Burnt pixels: of a prediction far out of range static clipping leaves almost all at the ends, dynamic few."""
    burnt = {}
    for clip in ("static", "dynamic"):
        config = settings(guidance=8.0, clip_x=clip)
        asked = conditions_of(config, [-1], "cpu", ["a red A"])
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
    """A picture, and the same one on its side: what the model gets is one tensor, with and without the flag."""
    rng = np.random.default_rng(0)
    wide = Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8))
    wide.save(tmp_path / "wide.png")
    wide.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "tall.png")                      # clockwise
    (tmp_path / "tall.txt").write_text("tall")
    source = D.open_source(str(tmp_path), (24, 40), portrait=True)
    assert source.image(0).shape == (3, 40, 24)
    pair = {e["caption"]: e for e in map(D.Stream(source, 0).__getitem__, range(2))}
    assert (pair["tall"]["portrait"], pair[""]["portrait"]) == (1, 0)
    assert torch.equal(pair["tall"]["image"], pair[""]["image"])
    batch = D.collate([pair["tall"], pair[""]])
    assert batch["portrait"].tolist() == [1, 0] and batch["image"].shape == (2, 3, 24, 40)
    # Without the rule the tall one is cut to the shape, not turned. Mirrored images are mirrored as they stand.
    assert D.open_source(str(tmp_path), (24, 40)).image(0).shape == (3, 24, 40)
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
    cond = told(config, ["a red A", "a red A"], portrait=torch.tensor([0, 1]))
    v, plain = run(model, config, cond), run(model, config, {k: cond[k] for k in ("text", "text_mask")})
    assert torch.equal(v[0], plain[0]) and (v[1] - plain[1]).abs().max() > 1e-3
    calls, forward = [], model.forward
    model.forward = lambda *args: calls.append(args[2]) or forward(*args)
    asked = conditions_of(config, [-1], "cpu", ["a"], portrait=True)
    images = P.sample_run(model, override(config, guidance=3.0), asked, [0], torch.device("cpu"), "float32")
    assert images.shape == (1, 3, 16, 24) and all(cond["portrait"].tolist() == [1] for cond in calls)


def test_withheld_pairs_never_come_in_training_and_all_their_parts_do():
    config = C.PRESETS["glyphs64_text"]
    seen, withheld = D.open_run(config), D.open_run(config, pairs="withheld")
    pairs = [(seen.label(i), seen.scene(i)["letter"]) for i in range(4000)]
    assert not any(D.withheld(*pair) for pair in pairs)
    hidden = [(withheld.label(i), withheld.scene(i)["letter"]) for i in range(500)]
    assert all(D.withheld(*pair) for pair in hidden)
    assert {a for a, _ in hidden} == {a for a, _ in pairs} and {b for _, b in hidden} == {b for _, b in pairs}
    every = D.Glyphs()
    same = [i for i in range(200) if not D.withheld(every.label(i), every.scene(i)["letter"])]
    assert 120 < len(same) < 190 and all(seen.caption(i) == every.caption(i) for i in same)     # the rest are redrawn


# ---- the programs

@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / "run"
    done = program("train.py", *TINY, *TEXT, "--steps", 4, "--save-every", 2, "--withhold", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.long
def test_a_run_with_text_trains_resumes_to_the_bit_and_samples(run_folder, tmp_path):
    whole = torch.load(run_folder / "checkpoint.pt", weights_only=True)
    assert any("text.encoder.byte" in key for key in whole["ema"])        # trained along, averaged
    assert whole["config"]["num_classes"] == 0 and len(whole["config"]["examples"]) == 12
    half = program("train.py", *TINY, *TEXT, "--steps", 2, "--withhold", "--out", tmp_path / "half")
    resumed = program("train.py", "--resume", tmp_path / "half", "--steps", 4, "--device", "cpu")
    assert half.returncode == resumed.returncode == 0, half.stderr + resumed.stderr
    state = torch.load(tmp_path / "half" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(state["ema"][key], whole["ema"][key]) for key in whole["ema"])

    (tmp_path / "prompts.txt").write_text("a red A on white\n\na blue Ω\n")
    out = tmp_path / "a.png"
    assert run_here(P, [run_folder, "--text", "a pink 7", "--prompts", tmp_path / "prompts.txt", "--negative", "grainy",
                        "--n", 2, "--device", "cpu", "--out", out, "--gif", tmp_path / "a.gif"]) == (None, "")
    picture = Image.open(out)
    assert picture.width > 3 * 2 * 48 and picture.height > 48 + 12        # three captions of two images, text below
    below = np.asarray(picture.convert("L"))[2 * 48 // 2:, :]
    assert (below < 100).any()                                            # something is printed there
    assert run_here(P, [run_folder, "--device", "cpu", "--out", out]) == (None, "")             # the run's examples


def test_captions_decide_and_come_with_the_image_that_they_tell_of(monkeypatch, tmp_path):
    """Kills: captions of other examples, conditions that are dropped for all or none."""
    seen = []
    loss = T.simple_loss
    monkeypatch.setattr(T, "simple_loss", lambda model, x, cond, *rest: seen.append((x, cond)) or loss(model, x, cond,
                                                                                                       *rest))
    args = [*TINY, *TEXT, "--steps", 12, "--batch", 8, "--withhold", "--cond-drop", 0.3, "--out", tmp_path / "r"]
    assert run_here(T, args) == (None, "")
    source, dropped = D.open_run(override(C.PRESETS["glyphs64_text"], size=SIZE)), 0
    by_image = {}
    for i in D.Stream(source, 0).order(0)[:96]:
        by_image[tuple(source.image(int(i)).flatten().tolist())] = source.caption(int(i))
    for x, cond in seen:
        for image, text, mask in zip(x, cond["text"], cond["text_mask"]):
            caption = by_image[tuple(image.flatten().tolist())]
            assert bytes(text[:len(caption)].tolist()).decode() == caption
            assert mask.sum() in (0, len(caption))
            dropped += int(mask.sum() == 0)
    assert 10 < dropped < 50                                              # 0.3 of 96


@pytest.mark.parametrize("args, message", [
    (["--labels", "A"], "was trained with text; say it with --text"),
    (["--text", "x" * 49], "this model reads 48 bytes"),
    (["--prompts", "/no/such"], "--prompts /no/such: No such file"),
    (["--negative", "grainy", "--guidance", "1"], "--negative: without guidance"),
    (["--portrait"], "--portrait: .* was trained without upright images"),
    (["--text-encoder", "google/t5-v1_1-xxl"], "was trained with bytes"),
    (["--prompts", ""], "--prompts : No such file"),
    (["--text", "a \udce4 A"], "holds characters that are not text"),
])
def test_what_sample_refuses(run_folder, tmp_path, args, message):
    import re
    status, error = run_here(P, [run_folder, *args, "--device", "cpu", "--out", tmp_path / "a.png"])
    assert status == 2 and error.count("\n") == 1 and re.search(message, error), error


def test_a_model_without_text_refuses_it(tmp_path):
    assert run_here(T, [*TINY, "--steps", 1, "--out", tmp_path / "r"]) == (None, "")
    for option in ("--text", "--negative", "--prompts"):
        status, error = run_here(P, [tmp_path / "r", option, "a red A", "--out", tmp_path / "a.png"])
        assert status == 2 and f"{option}: " in error and "trained without text; it knows --labels" in error


@pytest.mark.parametrize("args, message", [
    (["--size", "50,80"], "size 50x80: height and width must be multiples of 8"),
    (["--size", "48,48", "--portrait"], "--portrait True: want a --size that is wider than tall, not 48,48"),
    (["--size", "80,48", "--portrait"], "wider than tall"),
    (["--text-length", "0"], "--text-length 0: want 1 or more"),
    (["--text-encoder", "/no/such/t5"], "--text-encoder /no/such/t5: "),
])
def test_what_train_refuses(tmp_path, args, message):
    status, error = run_here(T, ["--preset", "glyphs64_text", *args, "--steps", 1, "--out", tmp_path / "r"])
    assert status == 2 and error.count("\n") == 1 and message in error, error
    assert not (tmp_path / "r").exists()


def test_a_folder_without_captions_and_pairs_of_a_folder_are_refused(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    status, error = run_here(T, [*TINY, *TEXT, "--data", tmp_path, "--out", tmp_path / "r"])
    assert status == 2 and "has no captions" in error
    status, error = run_here(T, [*TINY, "--withhold", "--data", tmp_path, "--out", tmp_path / "r"])
    assert status == 2 and "only drawn scenes" in error
    (tmp_path / "a.txt").write_text("\ufeffa cat", encoding="utf-8")
    (tmp_path / "captions.jsonl").write_text('{"file": "b.png", "caption": "cut \\ud83d"}\n')
    Image.new("RGB", (16, 16)).save(tmp_path / "b.png")                   # half an emoji: no reason to stop
    assert run_here(T, ["--preset", "glyphs64_text", *TINY, "--data", tmp_path, "--steps", 1, "--out",
                        tmp_path / "r"]) == (None, "")
    examples = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)["config"]["examples"]
    assert list(examples) == ["a cat", "cut ?"]


def test_upright_pictures_are_trained_and_come_out_upright(tmp_path):
    args = [*TINY, *TEXT, "--size", "16,24", "--portrait", "--steps", 2, "--out", tmp_path / "r"]
    assert run_here(T, args) == (None, "")
    out = tmp_path / "a.png"
    for option, width, height in (([], 72, 48), (["--portrait"], 48, 72)):  # 16 x 24 px, three times enlarged
        assert run_here(P, [tmp_path / "r", "--text", "A", "--n", 1, *option, "--out", out]) == (None, "")
        assert Image.open(out).width == width and height < Image.open(out).height < height + 30


def test_the_sheets_of_a_super_resolution_run_show_what_lies(tmp_path):
    for text in (TEXT, []):
        out = tmp_path / f"r{len(text)}"
        assert run_here(T, [*TINY, *text, "--size", "16,24", "--low-size", "8,12", "--portrait", "--steps", 1, "--out",
                            out]) == (None, "")
        Image.open(out / "samples_0000001.png").load()


def test_growing_and_cascades_take_the_text_along(tmp_path):
    inner = [*TINY, *TEXT, "--steps", 1, "--out", tmp_path / "a"]
    assert run_here(T, inner) == (None, "")
    nest = [*TINY, *TEXT, "--size", 32, "--outer-channels", "8,8", "--outer-blocks", "1,1", "--patching", "dwt_1",
            "--outer-patching", "dwt_1", "--steps", 1]
    assert run_here(T, [*nest, "--grow-from", tmp_path / "a", "--out", tmp_path / "b"]) == (None, "")
    status, error = run_here(T, [*nest, "--text-length", 40, "--grow-from", tmp_path / "a", "--out", tmp_path / "c"])
    assert status == 2 and "48 tokens of bytes, this run 40" in error
    draw = ["--text", "a red A", "--n", 1, "--out", tmp_path / "b.png"]
    assert run_here(P, [tmp_path / "b", "--levels", *draw]) == (None, "")
    above = [*TINY, *TEXT, "--size", 32, "--low-size", 16, "--noise-d", 32, "--steps", 1, "--out", tmp_path / "d"]
    assert run_here(T, above) == (None, "")
    assert run_here(P, [tmp_path / "a", tmp_path / "d", "--handoff", "clean", *draw]) == (None, "")
    assert run_here(T, [*TINY, "--steps", 1, "--out", tmp_path / "e"]) == (None, "")
    status, error = run_here(P, [tmp_path / "e", tmp_path / "d", "--handoff", "clean", *draw])
    assert status == 2 and "was trained without text, a stage above it with" in error


# ---- the frozen T5

@pytest.fixture(scope="module")
def tiny_t5(tmp_path_factory):
    """A T5 of 5,000 weights with a vocabulary of its own, saved as a real one is."""
    transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")
    folder = str(tmp_path_factory.mktemp("models") / "t5")
    words = [("▁" + word, -1.0) for word in ("a", "red", "blue", "cat", "on")]
    letters = [("▁", -2.0)] + [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = transformers.T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + words + letters,
                                         extra_ids=0)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.T5EncoderModel(transformers.T5Config(
        d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


T5_ARGS = ["--text-channels", 16, "--text-length", 12]


def captioned_folder(folder):
    folder.mkdir()
    captions = ["a red cat", "a blue cat", "", "a cat on a red cat on a blue cat on a cat on a cat", "red"]
    for i, caption in enumerate(captions):
        Image.new("RGB", (16, 16), (40 * i, 90, 255 - 40 * i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return captions


def test_t5_reads_and_is_frozen_and_padding_does_not_matter(tiny_t5):
    encoder = t5.FrozenT5(tiny_t5, 12, torch.device("cpu"))
    text, mask = encoder(["a red cat", "", "red a cat"])
    assert text.dtype == torch.bfloat16 and text.shape == (3, 12, 16)
    assert mask.sum(1).tolist() == [4, 0, 4] and not text[~mask].any()    # three words and the end of the sentence
    assert not torch.equal(text[0], text[2]) and not text.requires_grad
    alone, _ = encoder(["a red cat"])
    assert torch.equal(alone[0], text[0])
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not encoder.model.training
    assert t5.FrozenT5(tiny_t5, 12, torch.device("cpu")) is encoder        # loaded once


def test_cached_and_live_embeddings_agree(tiny_t5, tmp_path, monkeypatch):
    captions = captioned_folder(tmp_path / "photos")
    data = str(tmp_path / "photos")
    command = ["cache", "--data", data, "--text-encoder", tiny_t5, "--text-length", 12, "--device", "cpu"]
    assert run_here(X, command) == (None, "")
    config = settings(text_encoder=tiny_t5, text_channels=16, text_length=12, data=data)
    live, cached = t5.Encoder(config, "cpu"), t5.Encoder(config, "cpu", cached=True)
    assert isinstance(cached.encode, t5.Cache)
    for key, value in live(captions).items():
        assert torch.equal(value, cached(captions)[key]), key
    monkeypatch.setattr(X, "FrozenT5", None)                              # it is not needed any more
    assert t5.Encoder(config, "cpu", cached=True)(["red"])["text_mask"].sum() == 2
    with pytest.raises(UserError, match="no embedding of 'green' in .*: run text.py cache again"):
        cached(["green"])
    with pytest.raises(UserError, match="--text-length 10: .* was made with 12"):
        t5.Encoder(override(config, text_length=10), "cpu", cached=True)
    monkeypatch.undo()
    (tmp_path / "photos" / "4.txt").write_text("blue")                    # a new caption: known before any work
    with pytest.raises(UserError, match="no embedding of 'blue'"):
        t5.Encoder(config, "cpu", cached=True).check(D.open_source(data, (16, 16)))
    assert t5.write_cache(data, tiny_t5, 12, torch.device("cpu"))[1] == 1  # it alone is added
    assert t5.Encoder(config, "cpu", cached=True)(["blue", "red"])["text_mask"].sum() == 4


class Hash:
    """In the place of a T5: the embedding of a caption is made of its bytes."""
    channels = 4

    def __call__(self, captions):
        text, mask = X.to_bytes(captions, 12)
        return (text[:, :, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])).bfloat16(), mask


def test_an_interrupted_cache_goes_on_and_a_damaged_one_is_one_line(tmp_path, monkeypatch):
    """Kills: half a part taken for a whole one; embeddings thrown away or made twice."""
    monkeypatch.setattr(X, "FrozenT5", lambda *args: Hash())
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "photos" / "a.png")
    captions = [f"caption {i}" for i in range(10)]
    monkeypatch.setattr(X, "open_source", lambda *args: type("Source", (), {
        "__len__": lambda self: len(captions), "caption": lambda self, i: captions[i]})())
    monkeypatch.setattr(Hash, "calls", 0, raising=False)

    class Killed(Exception):
        pass

    def killed_in_the_third_part(self, some):
        Hash.calls += 1
        if Hash.calls == 3:
            raise Killed
        return whole(self, some)
    whole = Hash.__call__
    monkeypatch.setattr(Hash, "__call__", killed_in_the_third_part)
    data, write = str(tmp_path / "photos"), lambda: t5.write_cache(str(tmp_path / "photos"), "t5", 12, "cpu", part=4)
    with pytest.raises(Killed):
        write()
    folder = t5.cache_folder(data, "t5")
    (tmp_path / "photos" / ".text" / "t5" / "000002.npy").write_bytes(b"half")                  # and what a kill leaves
    (tmp_path / "photos" / ".text" / "t5" / "000002.index.new").write_bytes(b"half")
    assert write() == (folder, 2)                                         # eight were there
    cache = t5.Cache(folder, 12)
    assert all(torch.equal(a, b) for a, b in zip(cache(captions + [""]), Hash.__call__(Hash(), captions + [""])))
    for damage in (b"", b"[]", b"{"):
        (tmp_path / "photos" / ".text" / "t5" / "about.json").write_bytes(damage)
        with pytest.raises(UserError, match="damaged"):
            t5.Cache(folder, 12)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(X, "FrozenT5", None)                              # known before the T5 is loaded
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / ".text").write_text("in the way")
    status, error = run_here(X, ["cache", "--data", tmp_path, "--text-encoder", "t5"])
    assert status == 2 and error.count("\n") == 1 and "Not a directory" in error


def test_a_t5_that_lacks_weights_is_refused(tiny_t5, tmp_path):
    from safetensors.torch import load_file, save_file
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    weights = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "block.1" not in key}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(UserError, match="it lacks weights"):
        t5.FrozenT5(str(folder), 12, torch.device("cpu"))


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_with_t5_keeps_its_weights_out_of_the_checkpoint(tiny_t5, tmp_path, cached):
    captioned_folder(tmp_path / "photos")
    if cached:
        t5.write_cache(str(tmp_path / "photos"), tiny_t5, 12, torch.device("cpu"))
    args = [*TINY, "--text-encoder", tiny_t5, *T5_ARGS, "--data", tmp_path / "photos", "--steps", 2]
    frozen = t5.FrozenT5(tiny_t5, 12, torch.device("cpu")).model           # the one that the program will use, too
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    assert run_here(T, [*args, "--out", tmp_path / "r"]) == (None, "")
    assert t5.FrozenT5(tiny_t5, 12, torch.device("cpu")).model is frozen
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert all(p.grad is None for p in frozen.parameters())
    state = torch.load(tmp_path / "r" / "checkpoint.pt", weights_only=True)
    with torch.device("meta"):
        count = len(list(C.build_model(override(C.Config(), **{
            k: tuple(v) if isinstance(v, list) else v for k, v in state["config"].items()})).parameters()))
    assert not any("encoder" in key for key in [*state["model"], *state["ema"]])
    assert len(state["optimizer"]["state"]) == count
    draw = ["--text", "a blue cat", "--n", 1, "--out", tmp_path / "a.png"]
    assert run_here(P, [tmp_path / "r", *draw]) == (None, "")
    moved = shutil.copytree(tiny_t5, tmp_path / "elsewhere")              # it may be told where the T5 is now
    assert run_here(P, [tmp_path / "r", "--text-encoder", moved, *draw]) == (None, "")
    assert run_here(T, ["--resume", tmp_path / "r", "--steps", 3, "--text-encoder", moved]) == (None, "")
    status, error = run_here(P, [tmp_path / "r", "--text-encoder", "", *draw])
    assert status == 2 and "--text-encoder (empty): " in error


def test_another_width_than_the_encoder_has_is_one_line(tiny_t5, tmp_path):
    captioned_folder(tmp_path / "photos")
    status, error = run_here(T, [*TINY, "--text-encoder", tiny_t5, "--text-channels", 32, "--data",
                                 tmp_path / "photos", "--out", tmp_path / "r"])
    assert status == 2 and error.count("\n") == 1 and "--text-channels 32: " in error and "has 16" in error


def test_without_the_package_one_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    t5.FrozenT5.cache_clear()
    status, error = run_here(T, ["--preset", "t2i256_uvit", "--data", "glyphs", "--steps", 1, "--out", tmp_path / "r"])
    assert status == 2 and error.count("\n") == 1
    assert "--text-encoder google/t5-v1_1-xxl: want the package transformers: pip install transformers" in error
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("args, message", [
    (["cache"], "--data : want a folder"),
    (["cache", "--data", "."], "no image"),
    (["cache", "--data", ".", "--text-encoder", "bytes"], "is trained with the model"),
    (["cache", "--data", ".", "--text-length", "0"], "--text-length 0"),
])
def test_what_the_cache_refuses(tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    status, error = run_here(X, args)
    assert status == 2 and error.count("\n") == 1 and message in error, error


def test_a_folder_without_captions_has_nothing_to_cache(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    status, error = run_here(X, ["cache", "--data", tmp_path, "--text-encoder", "any"])
    assert status == 2 and "no image has a caption" in error


def test_the_page_explains_itself():
    done = program("text.py")
    assert done.returncode == 0 and "glyphs64_text" in done.stdout and "tokens x 4096" in done.stdout
