"""The U-Net of simple diffusion, and the building blocks of all networks in this project.

Paper: simple diffusion, sections 3.3 and 3.4, appendix B.1 (settings) and B.2.1 (the printed ResBlock).
Needs: dwt.py (the first and the last layer). Next: uvit.py (the same blocks around a transformer).

The main differences from the U-Net of Ho et al. 2020, which you may know:
  - More blocks are at 16 x 16 than at any other size ("scaling the architecture", table 4): see `num_res_blocks`.
  - Skips are added, not concatenated. Both sides are normalised, and their sum is divided by sqrt(2).
  - Dropout acts only on maps of side <= dropout_from_resolution (3.4, table 3).
  - The attention has several heads and normalises q and k. Average pooling halves the maps.
  - The network reads log-SNR, not t. Blocks take a scale and a shift from its embedding, not only a shift.
  - A wavelet or a strided convolution may first make the image smaller (`patching`).

Legend of shapes: B batch, C channels, H W height and width of a feature map, E emb_channels, N = H W tokens,
n heads, d = C / n channels per head. Feature maps are (B, C, H, W), tokens (B, N, C), emb (B, E).
z is (B, in_channels, H, W), logsnr (B,) or a scalar. cond is a dict, see `Embedding`.
`text` in a forward pass is the pair (tokens (B, T, c), mask (B, T)) that text.py makes of the captions, or None.

# Paper: "NormalizeWithBias" is not defined. For maps we take group norm (with 32 groups if 128 divides the number of
# channels, else fewer: `norm`), for q and k layer norm per head.
# Paper: the attention is printed for the U-ViT only. That the U-Net also normalises q and k is our reading.
# Paper: the U-Net's code is not printed. As in the U-ViT's, only down- and upsampling change the width. From Ho et al.
# 2020 we take the middle (block, attention, block) and, in levels with attention, attention after every ResBlock.

`python unet.py` recomputes table 1, prints the parameters of each level and draws feature maps.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from dwt import EmbedInput, ProjectOutput, patch_factor
from plumbing.pages import draw_features, millions


def starting_at(scale, layer):
    """Mark the layer: `initialise` will multiply its initial weights by `scale`.

    0    for the last layer of a residual branch (kernel_init=zeros in B.2.1). Every block then starts as the identity,
         so signals neither grow nor shrink on their way through many blocks.
    0.3  for the layers that give scale and shift: 1 + scale then starts near 1. # Paper: silent; ours.
    """
    layer.start = scale
    return layer


# ------------------------------------------------------------------------------------------ log-SNR and conditions

def sinusoid(x, channels):
    """Embed x (B,), in [0, 1], as a Transformer embeds position 1000 x, in sines and cosines. -> (B, channels)."""
    frequency = torch.exp(torch.linspace(0, -math.log(10000.0), channels // 2, device=x.device))
    angle = 1000.0 * x[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class Embedding(nn.Module):
    """Embed logsnr and the conditions: -> emb (B, E), from which every block takes its scale and shift.

    The input is the place of logsnr between logsnr_min and logsnr_max. These are the end points of the SHIFTED
    schedule, since a shift moves them (appendix A warns of it). Note: (logsnr - logsnr_min) /
    (logsnr_max - logsnr_min), in [0, 1]. With -15 and 15, the input would leave [0, 1].
    # Paper: B.2 says only 'linear', B.1 nothing, and get_logsnr_emb is not printed. This scaling, the sinusoidal
    # embedding and two layers are our reading, for both networks.

    cond["label"]  (B,) long, the class. A negative number, or no such key, means no class: the null embedding, the last
                   row of the table. Training teaches it by dropping the class of 10 % of the examples. A number from
                   num_classes on raises IndexError.
    num_classes    0: a table with only the null embedding. None: no table, and only `of_logsnr` may be called

    For later files, each with its optional keys of cond:
    text           module (cond, B) -> tokens, mask, pooled: text.py. Keys text (B, T[, c]) and text_mask (B, T)
    portrait       True: have a flag. Key portrait (B,) long: 1 if the image was upright and data.py has turned it.
                   Never dropped: it tells the format of z, not the content. # Paper: silent on dropping it.
    guidance_max   largest guidance scale of a student of distill.py; 0: none. Key guidance (B,) in [1, guidance_max].
                   The weights of its embedding start at zero, so a student starts as its teacher.
    """

    def __init__(self, channels, logsnr_min, logsnr_max, num_classes, sinusoid_channels=256, text=None, portrait=False,
                 guidance_max=0.0):
        super().__init__()
        self.logsnr_min, self.logsnr_max = float(logsnr_min), float(logsnr_max)
        self.num_classes, self.sinusoid_channels, self.guidance_max = num_classes, sinusoid_channels, guidance_max
        self.time = nn.Sequential(nn.Linear(sinusoid_channels, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, channels)
        self.text = text
        # The flag starts as large as a class embedding. From zero, the network still ignored it after 2000 steps.
        self.portrait = nn.Parameter(torch.randn(channels)) if portrait else None
        self.guide = starting_at(0, nn.Linear(sinusoid_channels, channels, bias=False)) if guidance_max else None

    def forward(self, logsnr, cond, batch_size):
        """Return emb (B, E), and the pair (tokens, mask) for the cross-attention or None."""
        condition, text = self.of_cond(cond, batch_size)
        return self.of_logsnr(logsnr, batch_size) + condition, text

    def of_logsnr(self, logsnr, batch_size):
        logsnr = torch.as_tensor(logsnr, dtype=torch.float32, device=self.time[0].weight.device).expand(batch_size)
        fraction = (logsnr - self.logsnr_min) / (self.logsnr_max - self.logsnr_min)
        return self.time(sinusoid(fraction, self.sinusoid_channels))      # (B, E)

    def of_cond(self, cond, batch_size):
        """Return the part of emb (B, E) that comes from cond, and the pair (tokens, mask) or None."""
        label, text = cond.get("label"), None
        if label is None:
            label = torch.full((batch_size,), -1, device=self.label.weight.device)
        # Negative labels get the last row, the null embedding. Labels that are too large get + 1, so they raise
        # IndexError.
        label = torch.where(label < 0, self.num_classes, label + (label >= self.num_classes))
        condition = self.label(label)                                     # (B, E)
        if self.portrait is not None and "portrait" in cond:
            condition = condition + cond["portrait"][:, None] * self.portrait
        if self.guide is not None and "guidance" in cond:
            fraction = (cond["guidance"].float() - 1) / (self.guidance_max - 1)
            condition = condition + self.guide(sinusoid(fraction, self.sinusoid_channels))
        if self.text is not None:
            tokens, mask, pooled = self.text(cond, batch_size)
            condition, text = condition + pooled, (tokens, mask)
        return condition, text


# ------------------------------------------------------------------------------------------ blocks

def norm(channels):
    """Return NormalizeWithBias for maps: GroupNorm with at least 4 channels in each group. A group of one channel would
    lose its mean, and so the colour."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4), channels), channels)


class ResBlock(nn.Module):
    """The paper's resnet_block (B.2.1): (x, emb[, skip]) -> x + h, all maps (B, C, H, W).

    # Paper: B.2.1 prints no dropout in it, but B.1 has dropout. We put it where Ho et al. 2020 do.
    """

    def __init__(self, channels, emb_channels, dropout=0.0, skip=False):
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(channels)
        self.norm_skip = norm(channels) if skip else None
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = starting_at(0, nn.Conv2d(channels, channels, 3, padding=1))
        self.film = starting_at(0.3, nn.Linear(emb_channels, 2 * channels))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, emb, skip=None):
        h = self.norm1(x)
        if self.norm_skip is not None:
            h = (h + self.norm_skip(skip)) / math.sqrt(2)                 # two maps of variance 1: (1 + 1) / 2 = 1
        h = self.conv1(F.silu(h))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)       # (B, C, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return x + h


def attend(q, k, v, mask=None):
    """Return softmax(q k^T d^-1/2) v of every head: q (B, n, N, d), k and v (B, n, T, d) -> (B, n, N, d).

    Autocast makes norms float32, so q and k follow v. On a CPU all three are float32 instead: with 64 tokens,
    PyTorch's bf16 takes four to five times as long there (`python benchmarks/speed.py attention`).
    """
    dtype = torch.promote_types(v.dtype, torch.float32) if v.device.type == "cpu" else v.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q, k, v, mask)              # softmax over the keys


class Attention(nn.Module):
    """The paper's self_attention (B.2.1), with its residual: tokens (B, N, C) -> (B, N, C).

    The paper also has the scale d^-1/2: `attend` applies it. Raises ValueError if num_heads does not divide channels.
    Layer norm (with bias) normalises q and k per head. Note: so the product of q and k stays bounded, however large the
    weights of qkv grow. Only the learned gains and biases of the two norms can change the bound.
    # Paper: "Normalize" (without bias) is not defined. We take layer norm with a scale and no bias.
    # Paper: the printed function takes text_emb and never uses it. Cross-attention (5.2) is not printed.
    """

    def __init__(self, channels, num_heads):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels do not divide into {num_heads} heads")
        self.num_heads, head = num_heads, channels // num_heads
        self.norm = nn.LayerNorm(channels, bias=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.norm_q, self.norm_k = nn.LayerNorm(head), nn.LayerNorm(head)
        self.out = starting_at(0, nn.Linear(channels, channels))

    def forward(self, x, mask=None):
        """Attend to the tokens where mask (B, N) is True (text.py). None: attend to all."""
        B, N, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.unbind(2)                                           # (B, N, n, d) each
        q, k = self.norm_q(q), self.norm_k(k)                             # over d: per head
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))                  # (B, n, N, d)
        mask = None if mask is None else mask[:, None, None]              # (B, 1, 1, N): for every head and query
        h = attend(q, k, v, mask)
        return x + self.out(h.transpose(1, 2).reshape(B, N, C))


class CrossAttention(nn.Module):
    """Section 5.2: the tokens of the image attend to those of the caption. x (B, N, C), text -> (B, N, C).

    text is the pair (tokens (B, T, c), mask (B, T)). q comes from the image, k and v from these tokens. q and k are
    normalised as above. # Paper: not printed. text.py has already normalised the tokens, so they have no norm here.
    """

    def __init__(self, channels, text_channels, num_heads):
        super().__init__()
        self.num_heads, head = num_heads, channels // num_heads
        self.norm = nn.LayerNorm(channels, bias=False)
        self.q, self.kv = nn.Linear(channels, channels), nn.Linear(text_channels, 2 * channels)
        self.norm_q, self.norm_k = nn.LayerNorm(head), nn.LayerNorm(head)
        self.out = starting_at(0, nn.Linear(channels, channels))

    def forward(self, x, text):
        tokens, mask = text
        B, N, C = x.shape
        split = lambda a: a.view(B, -1, self.num_heads, C // self.num_heads)
        k, v = map(split, self.kv(tokens).chunk(2, 2))                    # (B, T, n, d) each
        q, k = self.norm_q(split(self.q(self.norm(x)))), self.norm_k(k)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))                  # (B, n, N or T, d)
        h = attend(q, k, v, mask[:, None, None])
        return x + self.out(h.transpose(1, 2).reshape(B, N, C))


class MapAttention(Attention):
    """Self-attention over the pixels of a map (B, C, H, W), then cross-attention if the model has text."""

    def __init__(self, channels, num_heads, text_channels=0):
        super().__init__(channels, num_heads)
        self.cross = CrossAttention(channels, text_channels, num_heads) if text_channels else None

    def forward(self, x, text=None):
        B, C, H, W = x.shape
        tokens = super().forward(x.flatten(2).transpose(1, 2))            # (B, H W, C)
        tokens = tokens if self.cross is None else self.cross(tokens, text)
        return tokens.transpose(1, 2).reshape(B, C, H, W)


class Downsample(nn.Module):
    """Average 2 x 2, then convolve 3x3 to the next width: (B, C, H, W) -> (B, C', H/2, W/2).

    # Paper: 3.1 says "downsampling ... in our case with average pooling". The convolution changes the width.
    """

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.avg_pool2d(x, 2))


class Upsample(nn.Module):
    """Convolve 3x3 to the next width, then repeat each pixel 2 x 2: (B, C, H, W) -> (B, C', 2H, 2W).

    # Paper: not printed. The convolution comes first, at the small size, where it costs a quarter.
    """

    def __init__(self, channels, out_channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2, mode="nearest")


class FeedForward(nn.Module):
    """Norm, 1x1 convolution to 4C, GELU, 1x1 convolution to C, residual: (B, C, H, W) -> the same. It follows each
    attention in the U-Net of Matryoshka (MDM). simple diffusion's U-Net has none."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.out = starting_at(0, nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x, text=None):
        return x + self.out(F.gelu(self.expand(self.norm(x))))


class MapSequence(nn.Sequential):
    """Apply layers (x, text) -> x one after the other. Without layers, return x: a level without attention has this."""

    def forward(self, x, text=None):
        for layer in self:
            x = layer(x, text)
        return x


# ------------------------------------------------------------------------------------------ initial weights, sizes

def initialise(network):
    """Initialise all linear and convolutional layers. Each network calls it once, at the end of its constructor.

    Weights are normal with variance 1 / fan_in, biases zero. Flax, whose layer names B.2.1 uses, has this variance by
    default ("lecun normal", a TRUNCATED normal; ours is not truncated). PyTorch's default is a third of it. That would
    weaken log-SNR by sqrt(3) in each of the two layers of its embedding, but not the class, a row of a table.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):                     # kernel size = stride, so each output pixel
                fan_in = layer.in_channels                                # depends on one input pixel
            nn.init.normal_(layer.weight, std=getattr(layer, "start", 1.0) * fan_in ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def at_resolution(height, width, resolution):
    """Return whether a map of (height, width) counts as a map of that resolution. Square maps: side == resolution.

    # Paper: silent on other shapes. For the square of equal area, side / resolution is between 1/sqrt(2) and sqrt(2).
    """
    return abs(math.log2(math.sqrt(height * width) / resolution)) < 0.5


def at_or_below(height, width, resolution):
    """Return whether a map of (height, width) has that resolution or a smaller one. Resolution 0: never."""
    return resolution > 0 and math.log2(math.sqrt(height * width) / resolution) < 0.5


def check_size(size, patch, downsamplings):
    """Return size as a tuple. Raises ValueError if a side is not a multiple of patch * 2^downsamplings."""
    multiple = patch * 2 ** downsamplings
    if len(size) != 2 or any(s <= 0 or s % multiple for s in size):
        raise ValueError(f"size {'x'.join(map(str, size))}: height and width must be multiples of {multiple} "
                         f"(patching divides them by {patch}, then they are halved {downsamplings} times)")
    return tuple(size)


def check_input(z, size):
    if tuple(z.shape[-2:]) != size:
        raise ValueError(f"this model is for {size[0]}x{size[1]}, got an input of {z.shape[-2]}x{z.shape[-1]}")


# ------------------------------------------------------------------------------------------ the network

class UNet(nn.Module):
    """Sections 3.3-3.4, B.1: (z (B, in_channels, H, W), logsnr, cond) -> v_hat (B, 3, H, W).

    size                     (height, width) of the image, px
    channel_mult             channels of each level, as a multiple of base_channels, finest first
    num_res_blocks           k for each level, finest first: k blocks on the way down, k + 1 on the way up
    attn_resolutions         sides of the feature maps, after patching, that have attention
    dropout_from_resolution  largest side of the feature maps, after patching, that have dropout
    patching                 none | dwt_1 | dwt_2 | dwt_3 | conv_2 | conv_4 | conv_8
    logsnr_min, logsnr_max   end points of the (shifted!) schedule
    Raises ValueError if sizes, widths, counts, patching and heads do not fit together.

    For later files:
    in_channels              6 for super-resolution (cascade.py)
    attn_layers              for Matryoshka, in place of attn_resolutions: one number per level, how many pairs of
                             attention and feed-forward follow each block. The middle has one pair
    middle                   False: no middle (block, attention, block), for the outer levels of nested_unet.py
    zero_head                True, for Matryoshka: norm, swish, a last layer that starts at zero; so at first v_hat = 0
    text_channels            width c of the tokens of the captions; 0: no cross-attention
    text, portrait, guidance_max: see `Embedding`
    """

    def __init__(self, size, base_channels, emb_channels, channel_mult, num_res_blocks, attn_resolutions=(8, 16),
                 num_heads=4, dropout=0.1, dropout_from_resolution=16, patching="none", num_classes=0,
                 logsnr_min=-15.0, logsnr_max=15.0, in_channels=3, attn_layers=(), middle=True,
                 text_channels=0, text=None, portrait=False, guidance_max=0.0, zero_head=False):
        super().__init__()
        if len(channel_mult) != len(num_res_blocks):
            raise ValueError(f"{len(channel_mult)} widths but {len(num_res_blocks)} block counts: want one per level")
        if attn_layers and len(attn_layers) != len(channel_mult):
            raise ValueError(f"{len(channel_mult)} widths but {len(attn_layers)} counts of attention layers")
        self.size = check_size(size, patch_factor(patching), len(channel_mult) - 1)
        self.widths = widths = [base_channels * m for m in channel_mult]
        height, width = (s // patch_factor(patching) for s in size)
        coarsest, sizes = len(widths) - 1, [(height >> i, width >> i) for i in range(len(widths))]
        self.first_map, self.last_map = sizes[0], sizes[-1]               # size of the finest and of the coarsest map

        def block(level, skip=False):
            level_dropout = dropout if at_or_below(*sizes[level], dropout_from_resolution) else 0.0
            return ResBlock(widths[level], emb_channels, level_dropout, skip)

        def attention(level, in_middle):
            channels, layers = widths[level], []
            if not attn_layers:                                           # simple diffusion
                has_attention = any(at_resolution(*sizes[level], r) for r in attn_resolutions)
                return MapAttention(channels, num_heads, text_channels) if has_attention else MapSequence()
            for _ in range(1 if in_middle else attn_layers[level]):       # Matryoshka
                layers += [MapAttention(channels, num_heads, text_channels), FeedForward(channels)]
            return MapSequence(*layers)

        def block_and_attention(level, skip=False, in_middle=False):
            return nn.ModuleList([block(level, skip), attention(level, in_middle)])

        self.embed = Embedding(emb_channels, logsnr_min, logsnr_max, num_classes, text=text, portrait=portrait,
                               guidance_max=guidance_max)
        self.input = EmbedInput(in_channels, widths[0], patching)
        self.down, self.downsample, up, upsample = nn.ModuleList(), nn.ModuleList(), [], []
        for level, k in enumerate(num_res_blocks):
            self.down.append(nn.ModuleList(block_and_attention(level) for _ in range(k)))
            up.append(nn.ModuleList(block_and_attention(level, skip=True) for _ in range(k + 1)))
            if level < coarsest:
                self.downsample.append(Downsample(widths[level], widths[level + 1]))
                upsample.append(Upsample(widths[level + 1], widths[level]))
        self.middle = nn.ModuleList()
        if middle:                                                        # block, attention, block
            self.middle.extend([block_and_attention(coarsest, in_middle=True),
                                nn.ModuleList([block(coarsest), MapSequence()])])
        self.up, self.upsample = nn.ModuleList(reversed(up)), nn.ModuleList(reversed(upsample))   # coarsest first
        self.output = ProjectOutput(widths[0], 3, patching)
        if zero_head:
            starting_at(0, self.output.conv)
            self.output = nn.Sequential(norm(widths[0]), nn.SiLU(), self.output)
        initialise(self)

    def forward(self, z, logsnr, cond):
        return self.output(self.features(z, *self.embed(logsnr, cond, z.shape[0])))  # (B, 3, H, W)

    def features(self, z, emb, text=None, f=None):
        """Run all layers but the last. f, from nested_unet.py or video.py: a map to add to the first layer's output."""
        h, skips = self.descend(z, emb, text, f)
        for block, attention in self.middle:
            h = attention(block(h, emb), text)
        return self.ascend(h, skips, emb, text)                           # (B, C0, H, W)

    def descend(self, z, emb, text=None, f=None):
        """Run the way down. Return the coarsest map and the skips. Note: k + 1 a level, its input and k outputs."""
        check_input(z, self.size)
        h = self.input(z)                                                 # (B, C0, H, W)
        h = h if f is None else h + f
        skips = [h]
        for level, blocks in enumerate(self.down):
            for block, attention in blocks:
                h = attention(block(h, emb), text)                        # (B, Ci, H/2^i, W/2^i)
                skips.append(h)
            if level < len(self.downsample):
                h = self.downsample[level](h)
                skips.append(h)                                           # the input of the next level
        return h, skips

    def ascend(self, h, skips, emb, text=None):
        """Run the way up, from the coarsest map to the finest. Each block takes the last skip that is left."""
        for level, blocks in enumerate(self.up):
            for block, attention in blocks:
                h = attention(block(h, emb, skips.pop()), text)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        return h


# ------------------------------------------------------------------------------------------ table 1, levels, a picture

def table_1():
    """Print table 1 recomputed: a convolutional layer at 256^2 x 128 and at 16^2 x 1024, batch 1024.

    # Paper: it prints MB, GB and TFLOPS. Its numbers come out only with 2^20, 2^30 and 2^40. They count five copies of
    # the kernel (weight, gradient, Adam's two states, EMA) in 32 bits, features in 16 bits, a multiply-add once.
    """
    side, channels = torch.tensor([256, 16]), torch.tensor([128, 1024])
    kernel = 3 * 3 * channels ** 2 * 4 * 5                                # bytes
    features = 1024 * side ** 2 * channels * 2
    compute = 1024 * side ** 2 * 9 * channels ** 2
    print("Table 1 (batch 1024)           256x256x128   16x16x1024     paper")
    for name, (a, b), paper in (("Conv kernel memory, MiB", kernel / 2 ** 20, "2.8 / 180"),
                                ("Feature map memory, GiB", features / 2 ** 30, "16 / 0.5"),
                                ("Total memory, GiB", (kernel + features) / 2 ** 30, "16 / 0.7"),
                                ("Compute, 2^40 multiply-adds", compute / 2 ** 40, "9 / 2.3")):
        print(f"{name:28s} {a:13.3g} {b:12.3g}     {paper}")


def print_levels(model):
    """Print where the parameters of B.1's U-Net for ImageNet 128 are."""
    print("\nimagenet128_unet: where the parameters are (\"scaling the architecture\")")
    print("level   side   width   blocks down + up   attention   dropout   parameters, M")
    for i, (down, up) in enumerate(zip(model.down, reversed(model.up))):
        block, attention = down[0]
        print(f"{i:5d}   {128 >> i:4d}   {model.widths[i]:5d}   {f'{len(down)} + {len(up)}':>16s}   "
              f"{'yes' if isinstance(attention, MapAttention) else 'no':>9s}   {block.dropout.p:7.1f}   "
              f"{millions(down, up):13.1f}")
    other = millions(model.embed, model.input, model.downsample, model.upsample, model.output)
    for what, count in (("middle: block, attention, block", millions(model.middle)),
                        ("embedding, down- and upsampling, input, output", other), ("in all", millions(model))):
        print(f"{what:62s} {count:13.1f}")


def draw_maps(path):
    """Draw the feature map of each level in an untrained network, as the RMS over its channels. At initialisation every
    block is the identity. So the picture shows only the first convolution and those between the levels."""
    from data import Glyphs                                               # imported here: only the picture needs one
    torch.manual_seed(0)
    network = UNet((64, 64), 32, 64, (1, 2, 4), (1, 1, 1), attn_resolutions=(16,)).eval()
    draw_features(path, network, Glyphs((64, 64)).image(10))


def main():
    table_1()
    shift = 2 * math.log(64 / 128)                                        # of the schedule's end points: eq. 5
    with torch.device("meta"):                                            # shapes only: no memory, no numbers
        print_levels(UNet((128, 128), 128, 1024, (1, 2, 4, 8, 8), (3, 4, 4, 12, 4), attn_resolutions=(8, 16),
                          num_heads=4, dropout=0.1, dropout_from_resolution=16, num_classes=1000,
                          logsnr_min=-15 + shift, logsnr_max=15 + shift))
    draw_maps("figures/unet_features.png")
    print("wrote figures/unet_features.png (RMS of the features of each level, at initialisation)")


if __name__ == "__main__":
    main()
