"""Laws of unet.py and uvit.py, and the presets of config.py."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import config as C
from plumbing import cost
from plumbing.settings import override
import schedule as S
import unet
import uvit
from programs import page, stirred
from train import training_loss


def small_unet(**kw):
    torch.manual_seed(0)
    options = dict(size=(16, 16), base_channels=8, emb_channels=16, channel_mult=(1, 2, 2), num_res_blocks=(1, 2, 1),
                   attn_resolutions=(8,), num_heads=2, dropout=0.1, dropout_from_resolution=8, num_classes=5)
    return unet.UNet(**{**options, **kw})


def small_uvit(**kw):
    torch.manual_seed(0)
    options = dict(size=(16, 16), base_channels=8, emb_channels=16, channel_mult=(1, 2, 4), num_res_blocks=(2, 1),
                   num_transformer_blocks=2, num_heads=2, num_classes=5)
    return uvit.UViT(**{**options, **kw})


def stir(model, seed=1):
    """Random weights everywhere: the zero-initialised branches would hide what is behind them."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model


MODELS = [small_unet, small_uvit]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("patching, size", [("none", (16, 24)), ("dwt_1", (32, 16)), ("dwt_2", (48, 64)),
                                            ("conv_2", (16, 32)), ("conv_4", (32, 32))])
def test_shapes_also_when_not_square(make, patching, size):
    model = make(size=size, patching=patching)
    z = torch.randn(2, 3, *size)
    v = model(z, torch.tensor([-3.0, 4.0]), {"label": torch.tensor([1, -1])})
    assert v.shape == z.shape and v.dtype == torch.float32 and torch.isfinite(v).all()
    v.square().mean().backward()


@pytest.mark.parametrize("make", MODELS)
def test_size_that_does_not_divide_names_the_multiple(make):
    with pytest.raises(ValueError, match="multiples of 8"):
        make(size=(20, 16), patching="dwt_1")
    with pytest.raises(ValueError, match="16x16, got an input of 16x24"):
        make()(torch.zeros(1, 3, 16, 24), torch.zeros(1), {})


def test_unet_has_k_down_and_k_plus_1_up_blocks_and_uvit_k_and_k():
    """Trap 10. Kills: one count for all levels; k on both sides of the U-Net."""
    model = small_unet(num_res_blocks=(1, 3, 2))
    assert [len(l) for l in model.down] == [1, 3, 2] and [len(l) for l in model.up] == [3, 4, 2]
    assert len(model.middle) == 2 and len(small_unet(middle=False).middle) == 0
    model = small_uvit()
    assert [len(l) for l in model.down] == [2, 1] and [len(l) for l in model.up] == [1, 2]
    assert len(model.transformer) == 2


def test_the_middle_is_block_attention_block():
    """Kills: attention after both blocks of the middle, or after none."""
    (_, first), (_, last) = small_unet(attn_resolutions=(4,)).middle      # sides 16, 8, 4
    assert isinstance(first, unet.MapAttention) and len(last) == 0
    (_, first), (_, last) = small_unet(attn_layers=(0, 0, 2)).middle      # Matryoshka: one pair, as released
    assert [type(layer) for layer in first] == [unet.MapAttention, unet.FeedForward] and len(last) == 0


def test_a_seed_gives_the_weights_it_always_gave():
    """The default run can be repeated. Kills: layers drawn in another order."""
    weights = small_uvit().output.conv.weight.flatten()[:2]
    assert_close(weights, torch.tensor([0.122985, 0.035029]), atol=1e-5, rtol=0)


def test_attention_and_dropout_by_resolution():
    """Trap 9. Kills: dropout above its threshold or missing below it; attention at a level index."""
    model = small_unet(size=(64, 64), patching="dwt_1", channel_mult=(1, 1, 1, 1), num_res_blocks=(1, 1, 1, 1),
                       attn_resolutions=(8,), dropout_from_resolution=16)                       # sides 32, 16, 8, 4
    for levels, sides in ((model.down, [32, 16, 8, 4]), (model.up, [4, 8, 16, 32])):
        for level, side in zip(levels, sides):
            for block, attention in level:
                assert block.dropout.p == (0.1 if side <= 16 else 0.0)
                assert isinstance(attention, unet.MapAttention) == (side == 8)
    assert all(b.dropout.p == 0 for l in small_unet(dropout_from_resolution=0).down for b, _ in l)
    assert unet.at_resolution(12, 20, 16) and not unet.at_resolution(24, 40, 16)                # 15.5 and 31
    for block, _ in small_unet(dropout_from_resolution=4).middle:                               # at side 4
        assert block.dropout.p == 0.1
    for block, _ in small_unet(dropout_from_resolution=2).middle:
        assert block.dropout.p == 0
    model = small_uvit(dropout=0.1, dropout_from_resolution=8, transformer_dropout=0.2)         # sides 16, 8, then 4
    assert model.transformer[0].mlp.dropout.p == 0.2
    assert [block.dropout.p for level in (*model.down, *model.up) for block, _ in level] == [0, 0, 0.1, 0.1, 0, 0]


def test_downsampling_averages():
    """3.1: "with average pooling". Kills: a stride, which keeps a checkerboard and aliases."""
    down = unet.Downsample(1, 1)
    checks = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)[None, None]
    assert_close(down(checks) - down(torch.zeros(1, 1, 8, 8)), torch.zeros(1, 1, 4, 4))


def test_dropout_acts_in_training_and_not_in_evaluation():
    model = stir(small_unet(dropout=0.5))
    z, l = torch.randn(1, 3, 16, 16), torch.zeros(1)
    assert not torch.equal(model(z, l, {}), model(z, l, {}))
    model.eval()
    assert torch.equal(model(z, l, {}), model(z, l, {}))


def test_resblock_is_the_printed_one():
    """B.2.1 written out. Kills: concatenated skip, FiLM missing or before the norm, no sqrt(2), a missing swish."""
    block = stir(unet.ResBlock(8, 6, skip=True))
    x, skip, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    h = (block.norm1(x) + block.norm_skip(skip)) / math.sqrt(2)
    h = F.conv2d(F.silu(h), block.conv1.weight, block.conv1.bias, padding=1)
    scale, shift = F.linear(emb, block.film.weight, block.film.bias)[:, :, None, None].split(8, 1)
    h = F.conv2d(F.silu(block.norm2(h) * (1 + scale) + shift), block.conv2.weight, block.conv2.bias, padding=1)
    assert_close(block(x, emb, skip), x + h)


def test_mlp_block_is_the_printed_one():
    """Kills: FiLM on C instead of 4C features, before the swish, or on the residual."""
    block = stir(uvit.MLPBlock(8, 6))
    x, emb = torch.randn(2, 5, 8), torch.randn(2, 6)
    h = F.silu(F.linear(F.layer_norm(x, (8,), block.norm.weight), block.expand.weight, block.expand.bias))
    scale, shift = F.linear(emb, block.film.weight, block.film.bias)[:, None].split(32, 2)
    assert_close(block(x, emb), x + F.linear(h * (1 + scale) + shift, block.out.weight, block.out.bias))


def test_attention_equals_a_slow_loop():
    """Kills: softmax over the queries, a missing or doubled d^-1/2, norm over all heads at once or none."""
    torch.manual_seed(3)
    layer = stir(unet.Attention(8, 2))
    x = torch.randn(2, 5, 8)
    qkv = F.linear(F.layer_norm(x, (8,), layer.norm.weight), layer.qkv.weight, layer.qkv.bias)
    q, k, v = qkv.split(8, 2)
    out = torch.zeros(2, 5, 8)
    for b in range(2):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            for i in range(5):
                qi = F.layer_norm(q[b, i, part], (4,), layer.norm_q.weight, layer.norm_q.bias) * 4 ** -0.5
                scores = torch.stack([qi @ F.layer_norm(k[b, j, part], (4,), layer.norm_k.weight, layer.norm_k.bias)
                                      for j in range(5)])
                out[b, i, part] = scores.softmax(0) @ v[b, :, part]
    assert_close(layer(x), x + F.linear(out, layer.out.weight, layer.out.bias))
    with pytest.raises(ValueError, match="heads"):
        unet.Attention(10, 4)


def test_attention_is_float32_on_a_cpu(monkeypatch):
    """Under autocast, too: PyTorch's bf16 attention is slower there. Kills: the casts of attend."""
    seen, real = [], F.scaled_dot_product_attention

    def watched(*args):
        h = real(*args)                                                   # autocast casts inside of it
        seen.append(h.dtype)
        return h
    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.autocast("cpu", torch.bfloat16):
        output = unet.Attention(8, 2)(torch.randn(1, 4, 8))
        unet.CrossAttention(8, 6, 2)(torch.randn(1, 4, 8), (torch.randn(1, 3, 6), torch.ones(1, 3).bool()))
    assert seen == [torch.float32] * 2 and output.isfinite().all()
    unet.Attention(8, 2).double()(torch.randn(1, 4, 8).double())
    assert seen[2] == torch.float64


def test_map_attention_keeps_places():
    """Trap 8. Kills: a reshape without permute: position (i, j) must be the query of position (i, j)."""
    layer = stir(unet.MapAttention(8, 2))
    x = torch.randn(1, 8, 3, 5)
    tokens = x[0].reshape(8, 15).T[None]
    assert_close(layer(x)[0].reshape(8, 15).T[None], unet.Attention.forward(layer, tokens))


def test_one_pixel_reaches_one_token_of_the_patch_embedding_only():
    """Trap 8 again, end to end for the U-ViT's tokens: no ResBlocks, conv patching, identity below."""
    model = stir(small_uvit(size=(16, 8), patching="conv_4", channel_mult=(4,), num_res_blocks=(),
                            num_transformer_blocks=0))
    z = torch.zeros(1, 3, 16, 8)
    other = z.clone()
    other[0, 1, 9, 6] += 1.0                                              # patch row 2, column 1
    changed = (model(other, torch.zeros(1), {}) - model(z, torch.zeros(1), {}))[0].abs().amax(0)
    assert changed[8:12, 4:8].min() > 0
    changed[8:12, 4:8] = 0
    assert changed.max() == 0


def test_token_n_is_pixel_n_of_the_map():
    """Trap 8 inside the U-ViT. Kills: (B, C, H, W) reshaped to tokens and back without a transpose: the two scrambles
    cancel from input to output, so the tokens themselves are looked at."""
    model = stir(small_uvit(size=(16, 24), patching="conv_4", channel_mult=(4,), num_res_blocks=())).eval()
    tokens, maps = [], []
    model.transformer[0].register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
    model.output.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
    z = torch.zeros(1, 3, 16, 24)
    other = z.clone()
    other[0, 1, 9, 14] += 1.0                                             # patch row 2, column 3 of 4 x 6
    for image in (z, other):
        model(image, torch.zeros(1), {})
    changed = (tokens[1] - tokens[0])[0].abs().amax(1)
    assert changed.nonzero().flatten().tolist() == [2 * 6 + 3]
    last = []
    model.transformer[-1].register_forward_hook(lambda module, args, out: last.append(out))
    model(z, torch.zeros(1), {})
    assert_close(maps[0][0, :, 2, 3], last[0][0, 2 * 6 + 3])


def test_residual_branches_start_as_the_identity():
    """Zero-initialisation (B.2.1, kernel_init=zeros). Kills: forgetting one of them."""
    torch.manual_seed(0)
    for module, args in ((unet.ResBlock(8, 6), (torch.randn(1, 8, 4, 4), torch.randn(1, 6))),
                         (uvit.TransformerBlock(8, 6, 2, 0.0), (torch.randn(1, 5, 8), torch.randn(1, 6)))):
        unet.initialise(module)
        assert torch.equal(module(*args), args[0])


def test_any_width_has_a_norm():
    """Kills: a number of groups that does not divide the channels; a group of so few that it loses the colour."""
    for channels in range(1, 300):
        groups = unet.norm(channels).num_groups
        assert channels % groups == 0 and (groups == 1 or channels // groups >= 4), channels
    assert [unet.norm(channels).num_groups for channels in (32, 96, 128, 2048)] == [8, 8, 32, 32]


def test_matryoshkas_head_is_norm_swish_and_a_layer_from_zero():
    """Kills: a zero head without its norm or its swish; one that does not start at zero; one in the other networks."""
    model = small_unet(zero_head=True)
    z, l = torch.randn(2, 3, 16, 16), torch.tensor([-2.0, 3.0])
    assert torch.equal(model(z, l, {}), torch.zeros(2, 3, 16, 16)) and small_unet()(z, l, {}).abs().max() > 0.1
    model, h = stir(model), 3 + 2 * torch.randn(2, 8, 16, 16)
    conv = model.output[2].conv
    want = F.conv2d(F.silu(F.group_norm(h, 2, model.output[0].weight, model.output[0].bias)), conv.weight, conv.bias,
                    padding=1)
    assert_close(model.output(h), want)


def test_embedding_uses_the_shifted_end_points_and_a_null_class():
    """Kills: a fixed -15..15 range under a shifted schedule; the null class mistaken for class 0."""
    schedule = C.make_schedule(override(C.PRESETS["imagenet128_unet"], size=(512, 512)))
    with torch.device("meta"):
        model = C.build_model(override(C.PRESETS["imagenet512_unet_dwt2"]))
    assert model.embed.logsnr_max == pytest.approx(10.841, abs=1e-3)
    assert model.embed.logsnr_min == pytest.approx(-19.159, abs=1e-3)
    assert model.embed.logsnr_max == pytest.approx(float(schedule(torch.tensor(0.0))))

    embed = unet.Embedding(8, -15, 15, 3)
    label = lambda *l: {"label": torch.tensor(l)}
    l = torch.tensor([1.0, 1.0])
    assert torch.equal(embed(l, label(-1, -1), 2)[0], embed(l, {}, 2)[0])  # dropped = absent
    out, text = embed(l, label(0, -1), 2)
    assert text is None
    assert not torch.equal(out[0], out[1])
    assert_close(out[1] - embed.time(unet.sinusoid((l - -15) / 30, 256))[1], embed.label.weight[3])
    shifted = unet.Embedding(8, -19.2, 10.8, 3)
    place = torch.tensor([0.5, 1.0])
    assert_close(shifted.of_logsnr(torch.tensor([-4.2, 10.8]), 2), shifted.time(unet.sinusoid(place, 256)))
    features = unet.sinusoid(torch.tensor([0.0, 1.0]), 4)  # 'linear' input: 0 at one end, 1000 at the other
    assert_close(features[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert_close(features[1], torch.tensor([math.sin(1000.0), math.sin(0.1), math.cos(1000.0), math.cos(0.1)]),
                 atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", MODELS)
def test_every_input_matters(make):
    """Kills: logsnr or class embedded and then forgotten; a skip or a position embedding never used."""
    model = stir(make()).eval()
    z, l, c = torch.randn(1, 3, 16, 16), torch.zeros(1), {"label": torch.tensor([2])}
    v = model(z, l, c)
    for other in (model(z + 1, l, c), model(z, l + 1, c), model(z, l, {"label": torch.tensor([3])}), model(z, l, {})):
        assert (other - v).abs().max() > 1e-4
    v.sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [name for name in unused if not name.endswith("norm_k.bias")]


@pytest.mark.parametrize("make", MODELS)
def test_scalar_and_batched_logsnr_agree(make):
    """Kills: a scalar that must be a tensor; a scalar for the first image only."""
    model = stir(make()).eval()
    z = torch.randn(3, 3, 16, 16)
    batched = model(z, torch.full((3,), 1.5), {})
    assert_close(model(z, torch.tensor(1.5), {}), batched)
    assert_close(model(z, 1.5, {}), batched)


@pytest.mark.parametrize("label", [5, 6])
def test_a_label_past_the_last_class_is_an_error(label):
    """Kills: num_classes taken for the null embedding, which has this row of the table."""
    model = small_unet(num_classes=5)
    with pytest.raises(IndexError):
        model(torch.zeros(2, 3, 16, 16), torch.zeros(2), {"label": torch.tensor([4, label])})


# Parameters of every preset, counted on the meta device: a change of architecture shows here.
COUNTS = {
    "minute": 2_359_811,
    "glyphs64": 4_407_500,
    "faces64": 4_407_500,
    "glyphs64_unet": 7_525_196,
    "glyphs16": 4_280_195,
    "glyphs64_nested": 4_993_071,
    "glyphs32": 4_295_756,
    "glyphs32_video": 4_937_400,
    "mdm64": 334_593_283,
    "mdm256": 346_764_806,
    "mdm1024": 349_667_529,
    "glyphs64_sr": 4_542_796,
    "cdm32": 640_832_515,
    "cdm64_sr": 592_848_643,
    "cdm128_sr": 456_298_371,
    "cdm256_sr": 501_420_931,
    "imagenet128_unet": 1_007_142_915,
    "imagenet256_unet": 1_001_171_459,
    "imagenet512_unet": 1_003_141_379,
    "imagenet512_unet_dwt1": 1_008_933_900,
    "imagenet512_unet_conv2": 1_008_909_315,
    "imagenet512_unet_dwt2": 1_026_506_032,
    "imagenet512_unet_conv4": 1_026_309_379,
    "imagenet128_uvit": 2_474_234_883,
    "imagenet256_uvit": 2_474_255_628,
    "imagenet512_uvit": 2_474_338_608,
    "glyphs64_text": 5_478_092,
    "t2i256_uvit": 3_390_166_284,
    "t2i512_uvit": 3_390_249_264,
    "t2i384x640_uvit": 3_390_217_520,
}


@pytest.mark.parametrize("name", list(C.PRESETS))
def test_presets_build_and_have_their_size(name):
    with torch.device("meta"):
        model = C.build_model(C.PRESETS[name])
        z = [torch.zeros(1, *shape) for shape in C.PRESETS[name].shapes]
        if len(z) > 1:
            v = model(z, [torch.zeros(1) for _ in z], {})
        else:
            low_size = C.PRESETS[name].low_size
            v = [model(z[0], torch.zeros(1), {"low_res": torch.zeros(1, 3, *low_size)} if low_size else {})]
        assert [a.shape for a in v] == [a.shape for a in z]
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_presets_are_the_papers():
    """A few cells of appendix B, read off the PDF."""
    p = C.PRESETS
    assert p["imagenet128_unet"].beta2 == 0.999 and p["imagenet256_unet"].beta2 == 0.99
    assert p["imagenet512_unet_dwt2"].channel_mult == (2, 3, 4, 8, 8) == p["imagenet512_unet_conv4"].channel_mult
    assert p["imagenet512_unet"].num_res_blocks == (1, 1, 2, 2, 4, 12, 4)
    assert sum(p["imagenet512_unet"].num_res_blocks) == 26
    assert {p[f"imagenet{d}_uvit"].patching for d in (128, 256, 512)} == {"none", "dwt_1", "dwt_2"}
    common = dict(warmup=10_000, beta1=0.9, adam_eps=1e-12, weight_decay=0, clip=1.0, ema=0.9999, noise_d=64,
                  schedule="shifted", base_channels=128, emb_channels=1024, num_heads=4, num_classes=1000,
                  cond_drop=0.1, logsnr_min=-15, logsnr_max=15, sampler="ddpm", noise_param=0.2, guidance=1)
    unets = dict(common, batch=512, lr=5e-5, dropout=0.1, dropout_from_resolution=16, attn_resolutions=(8, 16),
                 loss="eps_mse")
    uvits = dict(common, batch=2048, lr=1e-4, beta2=0.99, loss="v_mse", transformer_dropout=0.2, steps=500_000,
                 num_transformer_blocks=36, channel_mult=(1, 2, 4, 16), num_res_blocks=(2, 2, 2))
    for name in p:
        if name.startswith("imagenet"):
            for field, value in (unets if "_unet" in name else uvits).items():
                assert getattr(p[name], field) == value, (name, field)
    assert {name: p[name].steps for name in p if "_unet" in name and "imagenet" in name} == {
        name: 1_500_000 if "128" in name else 2_000_000 for name in p if "_unet" in name and "imagenet" in name}


def test_matryoshka_presets_are_the_released_ones():
    """FACTS B 1.3, 1.4, 1.7. Kills: widths of another level, a shift of the wrong power."""
    p = C.PRESETS
    for name, sizes, shifts in (("mdm64", [64], [0]), ("mdm256", [256, 64], [1.386, 0]),
                                ("mdm1024", [1024, 256, 64], [5.545, 2.773, 0])):
        assert p[name].sizes == [(s, s) for s in sizes]
        t = torch.tensor(0.4)
        base = float(S.logsnr_cosine(t))
        assert [base - float(s(t)) for s in C.make_schedules(p[name])] == pytest.approx(shifts, abs=1e-3)
        with torch.device("meta"):
            model = C.build_model(p[name])
        widths = []
        while hasattr(model, "outer"):
            widths.append(model.outer.widths)
            assert [len(level) for level in model.outer.down] == [2, 2, 1] and len(model.outer.middle) == 0
            assert not any(isinstance(m, unet.Attention) for m in model.outer.modules())
            assert len(model.outer.output) == 3                           # norm, swish, a layer from zero
            model = model.inner
        assert widths == [[32, 32, 64], [64, 128, 256]][3 - len(sizes):] and model.widths == [256, 512, 768]
        layers = [[sum(isinstance(m, unet.Attention) for m in attention.modules()) for _, attention in level]
                  for level in model.down]
        assert layers == [[0, 0], [1, 1], [5, 5]] and len(model.output) == 3
        middle = [sum(isinstance(m, unet.Attention) for m in attention.modules()) for _, attention in model.middle]
        assert middle == [1, 0]
    assert p["mdm1024"].level_weights == "16:4:1" and p["mdm256"].level_power == 1 and p["mdm256"].mixed_ratio == "2:1"


@pytest.mark.long
@pytest.mark.parametrize("preset, change", [
    ("glyphs64", {}), ("glyphs64_unet", {}), ("glyphs64_nested", {}), ("glyphs64_sr", {}), ("glyphs64_text", {}),
    ("glyphs64", dict(portrait=True, size=(32, 64), guidance_max=5.0)),
    ("glyphs64", dict(transformer_resolutions=(32,), patching="none", num_res_blocks=(1, 1)))])
def test_each_model_is_one_graph(preset, change):
    """For torch.compile, as train.py compiles it. Kills: a branch on a tensor's value, .item(), printing: each breaks
    the graph in two. And what was compiled says the same."""
    config = override(C.PRESETS[preset], base_channels=8, emb_channels=16, num_heads=2, text_channels=16,
                      loss="v_mse", **change)                             # without bands
    model, batch = stirred(config), 2
    g = torch.Generator().manual_seed(0)
    z = [torch.randn(batch, 3, *size, generator=g) for size in config.sizes]
    cond = cost.conditions_of(config, batch) | {"aug_logsnr": torch.zeros(batch), "portrait": torch.ones(batch).long(),
                                                "guidance": torch.full((batch,), 2.0)}
    if not config.text_encoder:
        cond["label"] = torch.tensor([1, -1])
    eps, t = [torch.randn_like(level) for level in z], torch.rand(batch, generator=g)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    losses = [training_loss(config, net, z[0], cond, t, eps) for net in (compiled, model)]
    assert_close(*losses)


# ---- the pages

def test_the_page_of_the_unet_shows_where_it_attends_and_table_1(tmp_path, monkeypatch, capsys):
    """Kills: a page that finds no attention, since __main__ has classes of its own; other numbers than B.1's."""
    monkeypatch.chdir(tmp_path)
    printed = page("unet.py", capsys)
    rows = {words[0].strip(","): words for words in map(str.split, printed.splitlines()) if words}
    # side, width, blocks down + up, attention, dropout, parameters in millions
    assert [rows[str(i)][1:-1] for i in range(5)] == [
        ["128", "128", "3", "+", "4", "no", "0.0"], ["64", "256", "4", "+", "5", "no", "0.0"],
        ["32", "512", "4", "+", "5", "no", "0.0"], ["16", "1024", "12", "+", "13", "yes", "0.1"],
        ["8", "1024", "4", "+", "5", "yes", "0.1"]]
    assert float(rows["in"][-1]) == round(COUNTS["imagenet128_unet"] / 1e6, 1)
    parts = [float(rows[name][-1]) for name in (*"01234", "middle:", "embedding")]
    assert sum(parts) == pytest.approx(float(rows["in"][-1]), abs=0.05 * 8)                     # eight rounded numbers
    assert (tmp_path / "figures" / "unet_features.png").exists()
    assert [rows[name][-5:-3] for name in ("Conv", "Feature", "Total", "Compute")] == [
        ["2.81", "180"], ["16", "0.5"], ["16", "0.676"], ["9", "2.25"]]   # the paper's: 2.8/180 16/0.5 16/0.7 9/2.3


def test_the_page_of_the_uvit_shows_figure_7_and_its_cost(capsys):
    """Kills: another width or another number of blocks than B.2's; a FLOP count without the transformer."""
    lines = page("uvit.py", capsys).splitlines()
    assert ["transformer", "16", "2048", "36"] in [line.split()[:4] for line in lines]
    assert [line.split()[:5] for line in lines if line.startswith(("down", "up"))] == [
        ["down", "0", "128", "128", "2"], ["down", "1", "64", "256", "2"], ["down", "2", "32", "512", "2"],
        ["up", "2", "32", "512", "2"], ["up", "1", "64", "256", "2"], ["up", "0", "128", "128", "2"]]
    assert [line.split()[0] for line in lines if "512x512x3" in line] == ["input", "output"]
    for name, flops in (("imagenet128_uvit", "1083.8"), ("imagenet256_uvit", "1084.5"), ("imagenet512_uvit", "1087.2")):
        row = next(line for line in lines if line.startswith(name)).split()
        assert row[1:] == [f"{COUNTS[name] / 1e6:.1f}", flops]            # as `python -m plumbing.cost` counts
