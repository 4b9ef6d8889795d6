"""The U-Net of simple diffusion, scaled at one resolution, and the blocks that all networks here are built from.

Paper: simple diffusion, sections 3.3 and 3.4, appendix B.1 (settings) and B.2.1 (the printed ResBlock).
Read before: dwt.py (the first and the last layer). Read after: uvit.py (the same blocks around a transformer).

It differs from the U-Net of Ho et al. 2020, which you may know, in five ways:
  - It is wide and deep at 16 x 16 and thin above ("scaling the architecture", table 4): see `num_res_blocks`.
  - Skips are ADDED, not concatenated: both sides are normalised, and the sum is divided by sqrt(2).
  - Dropout acts only on maps of side <= dropout_from_resolution (3.4, table 3).
  - The attention normalises q and k.
  - A wavelet or a strided convolution may first make the image smaller (`patching`).

Legend of shapes: B batch, C channels, H W height and width of a feature map, E emb_channels, N = H W tokens,
n heads, d = C / n channels a head. Maps are (B, C, H, W), tokens (B, N, C), emb (B, E).
z is (B, in_channels, H, W), logsnr (B,) or a scalar. cond is a dict, see `Embedding`.
text is None, or (tokens (B, T, c), mask (B, T)): what text.py makes of the captions.

# Paper: "NormalizeWithBias" is not defined. For maps we take group norm (32 groups), for q and k layer norm per head.
# Paper: the attention is printed for the U-ViT only. That the U-Net also normalises q and k is our reading.
# Paper: the U-Net itself is not printed. We follow the U-ViT's code: the width changes in the down- and upsampling, so
# every ResBlock keeps its width. From Ho et al. 2020 we take the middle (block, attention, block), and attention after
# every ResBlock of a level that has attention.

`python unet.py` draws feature maps by level, recomputes table 1 and prints the parameters of each level.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from dwt import EmbedInput, ProjectOutput, patch_factor


def starting_at(scale, layer):
    """Mark a layer to start at `scale` times the usual weights. `initialise` below reads the mark.

    0    for the last layer of a residual branch (kernel_init=zeros in B.2.1). Every block then starts as the identity,
         so signals neither explode nor fade in a network of any depth.
    0.3  for the layers that give scale and shift: 1 + scale then starts near 1. # Paper: silent; ours.
    """
    layer.start = scale
    return layer


def initialise(network):
    """Initialise all linear and convolutional layers. Each network calls it once, at the end of its constructor.

    Weights are normal with variance 1 / fan_in, biases zero. This is the default of the paper's framework (JAX, "lecun
    normal") and three times PyTorch's variance. With PyTorch's variance, each layer on the way would weaken log-SNR and
    class by sqrt(3) before they reach the blocks.
    """
    for layer in network.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = layer.weight[0].numel()
            if isinstance(layer, nn.ConvTranspose2d):                     # weight (in, out, k, k), stride k: no overlap
                fan_in = layer.in_channels
            nn.init.normal_(layer.weight, std=getattr(layer, "start", 1.0) * fan_in ** -0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def at_resolution(height, width, resolution):
    """Tell whether a map of (height, width) counts as "the" map of that resolution. Square maps: side == resolution.

    # Paper: silent on other shapes. We take the side of the square of equal area, to the nearest factor of two.
    """
    return abs(math.log2(math.sqrt(height * width) / resolution)) < 0.5


def at_or_below(height, width, resolution):
    """Tell whether a map of (height, width) is that resolution's map or a smaller one, as for dropout. 0: never."""
    return resolution > 0 and math.log2(math.sqrt(height * width) / resolution) < 0.5


# ------------------------------------------------------------------------------------------ log-SNR and conditions

def sinusoid(x, channels):
    """Return the Transformer's position features of x (B,) in [0, 1], scaled to 0..1000 as usual. -> (B, channels)."""
    frequency = torch.exp(torch.linspace(0, -math.log(10000.0), channels // 2, device=x.device))
    angle = 1000.0 * x[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


class Embedding(nn.Module):
    """Embed logsnr and the conditions: -> emb (B, E), from which every block takes its scale and shift.

    logsnr enters as 'linear' input: its place between the END POINTS OF THE SCHEDULE IN USE, in [0, 1]. The end points
    move with the shift (appendix A warns of it): between -15 and 15 a shifted schedule would leave the range.
    # Paper: B.2 says 'linear' and no more, B.1 nothing, and get_logsnr_emb is not printed. This place, its sinusoids
    # and two layers are our reading, for both networks.

    cond holds, each key optional:
    label     (B,) long, the class; negative = dropped. Without the key it is dropped for the whole batch. A dropped
              label has an embedding of its own (row num_classes). It learns from the 10 % of examples whose label
              training hides.
    text      (B, T) or (B, T, c), with text_mask (B, T): captions, for models with `text`. See text.py.
    portrait  (B,) long, 1 = this image was upright and has been turned (data.py). Without the key: no image was. It
              says how to look at z, not what is in it, so it is never dropped. # Paper: silent on dropping it.
    guidance  (B,) guidance scale w in [1, guidance_max], for students of distill.py. Its Fourier features join those
              of log-SNR through weights that start at zero: a student starts as its teacher.

    num_classes  None: no table of classes. The outer levels of nested_unet.py get the innermost level's `of_cond`.
    text         None, or a module (cond, B) -> tokens, mask, pooled
    """

    def __init__(self, channels, logsnr_min, logsnr_max, num_classes, width=256, text=None, portrait=False,
                 guidance_max=0.0):
        super().__init__()
        self.logsnr_min, self.logsnr_max = float(logsnr_min), float(logsnr_max)
        self.num_classes, self.width = num_classes, width
        self.time = nn.Sequential(nn.Linear(width, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.label = None if num_classes is None else nn.Embedding(num_classes + 1, channels)
        self.text = text
        # As large as a class embedding: from zero, the network still ignored the flag after 2000 steps.
        self.portrait = nn.Parameter(torch.randn(channels)) if portrait else None
        self.guidance_max = guidance_max
        self.guide = starting_at(0, nn.Linear(width, channels, bias=False)) if guidance_max else None

    def forward(self, logsnr, cond, batch):
        """Return emb (B, E) and text."""
        condition, text = self.of_cond(cond, batch)
        return self.of_logsnr(logsnr, batch) + condition, text

    def of_logsnr(self, logsnr, batch):
        logsnr = logsnr.float().expand(batch)                             # (B,)
        place = (logsnr - self.logsnr_min) / (self.logsnr_max - self.logsnr_min)
        return self.time(sinusoid(place, self.width))                     # (B, E)

    def of_cond(self, cond, batch):
        """Return the conditions' part of emb (B, E), and text for the cross-attention."""
        label, text = cond.get("label"), None
        if label is None:
            label = torch.full((batch,), -1, device=self.label.weight.device)
        condition = self.label(torch.where(label < 0, self.num_classes, label))  # the last row is the null class
        if self.portrait is not None and "portrait" in cond:
            condition = condition + cond["portrait"][:, None] * self.portrait
        if self.guide is not None and "guidance" in cond:
            place = (cond["guidance"].float() - 1) / (self.guidance_max - 1)
            condition = condition + self.guide(sinusoid(place, self.width))
        if self.text is not None:
            tokens, mask, pooled = self.text(cond, batch)
            condition, text = condition + pooled, (tokens, mask)
        return condition, text


# ------------------------------------------------------------------------------------------ blocks

def norm(channels):
    """NormalizeWithBias for maps: group norm with 32 groups as usual, fewer in narrow maps. A group of one channel
    would lose the mean of that channel, and with it the colour of the image."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)


class ResBlock(nn.Module):
    """The printed resnet_block of B.2.1: x, emb[, skip] -> x + h, all maps (B, C, H, W).

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
            h = (h + self.norm_skip(skip)) / math.sqrt(2)                 # two unit variances add up to one again
        h = self.conv1(F.silu(h))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)       # (B, C, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        h = self.conv2(self.dropout(F.silu(h)))
        return x + h


class Attention(nn.Module):
    """The printed self_attention of B.2.1, with its residual: tokens (B, N, C) -> (B, N, C).

    q and k are normalised (with bias) per head, so their product cannot grow without bound. The scale d^-1/2 stays, as
    printed; scaled_dot_product_attention applies it. Raises ValueError if num_heads does not divide channels.
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
        """mask (B, N) bool: True for the tokens that count (text.py). None: all count."""
        B, N, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.unbind(2)                                           # (B, N, n, d) each
        q, k = self.norm_q(q), self.norm_k(k)                             # over d: per head
        q, k, v = (a.transpose(1, 2).to(v.dtype) for a in (q, k, v))      # (B, n, N, d)
        mask = None if mask is None else mask[:, None, None]              # (B, 1, 1, N): for every head and query
        h = F.scaled_dot_product_attention(q, k, v, mask)                 # softmax over the keys
        return x + self.out(h.transpose(1, 2).reshape(B, N, C))


class CrossAttention(nn.Module):
    """Section 5.2: the image's tokens attend to the caption's. x (B, N, C), text -> (B, N, C).

    q comes from the image, k and v from the text (B, T, c), masked (B, T). q and k are normalised as above.
    # Paper: not printed. text.py has already normalised the text, so it has no norm here.
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
        q, k, v = (a.transpose(1, 2).to(v.dtype) for a in (q, k, v))      # (B, n, N or T, d)
        h = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        return x + self.out(h.transpose(1, 2).reshape(B, N, C))


class MapAttention(Attention):
    """Attend over the positions of a map, then, in models with text, to the text: (B, C, H, W) -> the same."""

    def __init__(self, channels, num_heads, text_channels=0):
        super().__init__(channels, num_heads)
        self.cross = CrossAttention(channels, text_channels, num_heads) if text_channels else None

    def forward(self, x, text=None):
        B, C, H, W = x.shape
        tokens = super().forward(x.flatten(2).transpose(1, 2))            # (B, H W, C)
        tokens = tokens if self.cross is None else self.cross(tokens, text)
        return tokens.transpose(1, 2).reshape(B, C, H, W)


class FeedForward(nn.Module):
    """What follows each attention in MDM's U-Net, not in simple diffusion's: norm, 1x1 to 4C, gelu, 1x1 to C from zero,
    with its residual. Maps (B, C, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.expand = nn.Conv2d(channels, 4 * channels, 1)
        self.out = starting_at(0, nn.Conv2d(4 * channels, channels, 1))

    def forward(self, x, text=None):
        return x + self.out(F.gelu(self.expand(self.norm(x))))


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


# ------------------------------------------------------------------------------------------ the network

class MapSequence(nn.Sequential):
    """Apply layers (x, text) -> x one after the other. Empty: return x."""

    def forward(self, x, text=None):
        for layer in self:
            x = layer(x, text)
        return x


def attention_after(channels, num_heads, text_channels, attends, depth=None):
    """Make what follows one ResBlock: attention if its level attends, else nothing (an empty MapSequence).

    depth: MDM's U-Net has this many times attention and feed-forward instead; 0 = nothing.
    """
    if depth is None:
        return MapAttention(channels, num_heads, text_channels) if attends else MapSequence()
    pairs = [(MapAttention(channels, num_heads, text_channels), FeedForward(channels)) for _ in range(depth)]
    return MapSequence(*(layer for pair in pairs for layer in pair))


class Level(nn.ModuleList):
    """The blocks of one level, down or up: `count` pairs of a new block() and a new attention()."""

    def __init__(self, count, block, attention=MapSequence):
        super().__init__(nn.ModuleList([block(), attention()]) for _ in range(count))


class UNet(nn.Module):
    """Sections 3.3-3.4, B.1: (z, logsnr, cond) -> v_hat, shaped like z.

    size                     (height, width) of the image, px
    channel_mult             width of each level over base_channels, finest first
    num_res_blocks           k for each level: k blocks on the way down, k + 1 on the way up
    attn_resolutions         sides of the feature maps that have attention
    dropout_from_resolution  largest side of the feature maps that have dropout
    patching                 none | dwt_1 | dwt_2 | conv_2 | conv_4: the resolutions above count after it
    logsnr_min, logsnr_max   end points of the (shifted!) schedule
    attn_layers              MDM, instead of attn_resolutions: how often attention and feed-forward follow each block,
                             one count a level. () = simple diffusion's attention
    middle                   have the block, attention, block at the bottom. Outer levels of nested_unet.py have none
    text, text_channels      module of text.py that reads the captions, and the width of its tokens. None: no text
    portrait                 have a portrait flag among the conditions
    guidance_max             largest guidance scale of a distilled model (distill.py). 0: the scale is no condition
    Raises ValueError where sizes, widths, counts, patching and heads do not fit together.
    """

    def __init__(self, size, base_channels, emb_channels, channel_mult, num_res_blocks, attn_resolutions=(8, 16),
                 num_heads=4, dropout=0.1, dropout_from_resolution=16, patching="none", num_classes=0,
                 logsnr_min=-15.0, logsnr_max=15.0, in_channels=3, out_channels=3, attn_layers=(), middle=True,
                 text=None, text_channels=0, portrait=False, guidance_max=0.0):
        super().__init__()
        if len(channel_mult) != len(num_res_blocks):
            raise ValueError(f"{len(channel_mult)} widths but {len(num_res_blocks)} block counts: one of each a level")
        if attn_layers and len(attn_layers) != len(channel_mult):
            raise ValueError(f"{len(channel_mult)} widths but {len(attn_layers)} counts of attention layers")
        self.size = check_size(size, patch_factor(patching), len(channel_mult) - 1)
        height, width = (s // patch_factor(patching) for s in size)
        self.widths = widths = [base_channels * m for m in channel_mult]
        last = len(widths) - 1
        self.first_map, self.last_map = (height, width), (height >> last, width >> last)        # finest, coarsest map
        self.embed = Embedding(emb_channels, logsnr_min, logsnr_max, num_classes, text=text, portrait=portrait,
                               guidance_max=guidance_max)
        self.input = EmbedInput(in_channels, widths[0], patching)
        self.down, self.downsample, up, upsample = nn.ModuleList(), nn.ModuleList(), [], []
        for level, (channels, blocks) in enumerate(zip(widths, num_res_blocks)):
            h, w = height >> level, width >> level
            drop = dropout if at_or_below(h, w, dropout_from_resolution) else 0.0
            attends = any(at_resolution(h, w, r) for r in attn_resolutions)
            depth = attn_layers[level] if attn_layers else None
            block = partial(ResBlock, channels, emb_channels, drop)
            attention = partial(attention_after, channels, num_heads, text_channels, attends, depth)
            self.down.append(Level(blocks, block, attention))
            up.append(Level(blocks + 1, partial(block, skip=True), attention))
            if level < last:
                self.downsample.append(Downsample(channels, widths[level + 1]))
                upsample.append(Upsample(widths[level + 1], channels))
        self.middle = nn.ModuleList()
        if middle:                                                        # block, attention, block, at the coarsest map
            self.middle.extend([*Level(1, block, attention), *Level(1, block)])
        self.up, self.upsample = nn.ModuleList(reversed(up)), nn.ModuleList(reversed(upsample))   # coarsest first
        self.output = ProjectOutput(widths[0], out_channels, patching)
        initialise(self)

    def forward(self, z, logsnr, cond):
        return self.output(self.features(z, *self.embed(logsnr, cond, z.shape[0])))             # (B, 3, H, W)

    def features(self, z, emb, text=None, f=None):
        """Run all but the last layer. f: a map that an outer level adds to the first one (nested_unet.py)."""
        h, skips = self.descend(z, emb, text, f)
        for block, attention in self.middle:
            h = attention(block(h, emb), text)
        return self.ascend(h, skips, emb, text)                           # (B, C0, H, W)

    def descend(self, z, emb, text=None, f=None):
        """Run the way down. Return the coarsest map and the skips."""
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
                skips.append(h)                                           # so there are k + 1 skips a level
        return h, skips

    def ascend(self, h, skips, emb, text=None):
        for level, blocks in enumerate(self.up):
            for block, attention in blocks:
                h = attention(block(h, emb, skips.pop()), text)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        return h


def check_size(size, patch, halvings):
    """Return (height, width) as a tuple. Raises ValueError naming the multiple that both sides must have."""
    multiple = patch * 2 ** halvings
    if len(size) != 2 or any(s <= 0 or s % multiple for s in size):
        raise ValueError(f"size {'x'.join(map(str, size))}: height and width must be multiples of {multiple} "
                         f"(patching {patch}, {halvings} halvings)")
    return tuple(size)


def check_input(z, size):
    if tuple(z.shape[-2:]) != size:
        raise ValueError(f"this model is for {size[0]}x{size[1]}, got an input of {z.shape[-2]}x{z.shape[-1]}")


# ------------------------------------------------------------------------------------------ the page of the lecture

def table_1():
    """Print table 1 recomputed: a convolutional layer at 256^2 x 128 and at 16^2 x 1024, batch 1024.

    # Paper: its units come out only as binary ones, with five copies of the kernel (weight, gradient, Adam's two
    # states, EMA) in 32 bits, features in 16 bits, a multiply-add counted once, and compute in units of 2^40.
    """
    side, channels = torch.tensor([256, 16]), torch.tensor([128, 1024])
    kernel = 3 * 3 * channels ** 2 * 4 * 5                                # bytes
    features = 1024 * side ** 2 * channels * 2
    compute = 1024 * side ** 2 * 9 * channels ** 2
    print("Table 1 (batch 1024)           256x256x128   16x16x1024     paper")
    for name, (a, b), paper in (("Conv kernel memory, MB", kernel / 2 ** 20, "2.8 / 180"),
                                ("Feature map memory, GB", features / 2 ** 30, "16 / 0.5"),
                                ("Total memory, GB", (kernel + features) / 2 ** 30, "16 / 0.7"),
                                ("Compute, T multiply-adds", compute / 2 ** 40, "9 / 2.3")):
        print(f"{name:28s} {a:13.3g} {b:12.3g}     {paper}")


def print_levels():
    """Build B.1's U-Net for ImageNet 128 and print where its parameters are."""
    shift = 2 * math.log(64 / 128)                                        # of the schedule's end points: eq. 5
    with torch.device("meta"):                                            # shapes only: no memory, no numbers
        model = UNet((128, 128), 128, 1024, (1, 2, 4, 8, 8), (3, 4, 4, 12, 4), attn_resolutions=(8, 16), num_heads=4,
                     dropout=0.1, dropout_from_resolution=16, num_classes=1000, logsnr_min=-15 + shift,
                     logsnr_max=15 + shift)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    print("\nimagenet128_unet: where the parameters are (\"scaling the architecture\")")
    print("level   side   width   blocks down + up   attention   dropout   parameters, M")
    for i, (down, up) in enumerate(zip(model.down, reversed(model.up))):
        block, attention = down[0]
        print(f"{i:5d}   {128 >> i:4d}   {model.widths[i]:5d}   {f'{len(down)} + {len(up)}':>16s}   "
              f"{'yes' if isinstance(attention, MapAttention) else 'no':>9s}   {block.dropout.p:7.1f}   "
              f"{count(down) + count(up):13.1f}")
    print(f"middle {count(model.middle):.1f} M, in all {count(model):.1f} M")


def draw_features(path):
    """Draw the size of the features of a random (untrained) network: how coarsely each level sees a letter."""
    from data import Glyphs
    from plumbing.pictures import pyplot, save_figure, show_image
    torch.manual_seed(0)
    net = UNet((64, 64), 32, 64, (1, 2, 4), (1, 1, 1), attn_resolutions=(16,)).eval()
    image, maps = Glyphs((64, 64)).image(10), []
    for level in (*net.down, *net.up):
        level[-1][1].register_forward_hook(lambda module, args, output: maps.append(output[0]))
    with torch.no_grad():
        net(image[None], torch.zeros(1), {})
    figure, axes = pyplot().subplots(1, 1 + len(maps), figsize=(2 * (1 + len(maps)), 2.3))
    show_image(axes[0], image, "image")
    for axis, features, way in zip(axes[1:], maps, ["down"] * 3 + ["up"] * 3):
        axis.imshow(features.square().mean(0).sqrt().numpy(), cmap="magma")
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{way} {features.shape[1]}x{features.shape[2]}x{features.shape[0]}", fontsize=9)
    save_figure(figure, path, dpi=110)


def main():
    table_1()
    print_levels()
    draw_features("figures/unet_features.png")
    print("wrote figures/unet_features.png (size of the features, level by level, at initialisation)")


if __name__ == "__main__":
    main()
