"""The U-ViT: a small convolutional U-Net around a large transformer.

Paper: simple diffusion, sections 3.5, 3.6 and 5.2 (text), appendix B.2 and B.2.1 (pseudo-code), figure 7.
Read before: unet.py (embedding, ResBlock, attention). Read after: text.py, or train.py.

Take the U-Net. At the resolution that has attention (16 x 16), replace each convolutional block by an MLP block. MLP
and attention together are a transformer block. Transformer blocks have residual connections only; the ResBlocks above
them keep their skips. The result is easy to scale (36 blocks of width 2048, 2 billion parameters) and keeps
accelerators busy. For text to image (3.6, 5.2), each transformer block also has cross-attention to the caption, and at
32 x 32 self-attention replaces the convolutions, too.

Legend of shapes: B batch, C width, N = H W tokens at the bottom, E emb_channels.

# Paper: its U-ViT code has the same number of ResBlocks on both ways (k, not k + 1). Only block outputs are skips.
# Paper: a transformer block is MLP first, then attention, both residual: as printed.
# Paper: "Dense(emb, mlp_h.shape[2:])": scale and shift act on the 4C hidden features, after the swish.
# Paper: before ProjectOutput it prints no norm, and for it no zero-initialisation. We do as printed, in the U-Net, too.
# With the usual norm, swish and zero-initialised convolution, the small models here learnt markedly more slowly
# (benchmarks/NOTEBOOK.md).

`python uvit.py` prints figure 7 as a table of blocks, and the parameters and FLOPs of the three ImageNet models.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from dwt import EmbedInput, ProjectOutput, patch_factor
from unet import (Attention, CrossAttention, Downsample, Embedding, Level, ResBlock, Upsample, at_or_below,
                  at_resolution, check_input, check_size, initialise, starting_at)


class MLPBlock(nn.Module):
    """The printed mlp_block of B.2.1, with its residual: tokens (B, N, C), emb (B, E)[, skip like x] -> (B, N, C)."""

    def __init__(self, channels, emb_channels, dropout=0.0, skip=False, expansion=4):
        super().__init__()
        self.norm = nn.LayerNorm(channels, bias=False)
        self.norm_skip = nn.LayerNorm(channels, bias=False) if skip else None
        self.expand = nn.Linear(channels, expansion * channels)
        self.film = starting_at(0.3, nn.Linear(emb_channels, 2 * expansion * channels))
        self.dropout = nn.Dropout(dropout)
        self.out = starting_at(0, nn.Linear(expansion * channels, channels))

    def forward(self, x, emb, skip=None):
        h = self.norm(x)
        if self.norm_skip is not None:
            h = (h + self.norm_skip(skip)) / math.sqrt(2)                 # as the ResBlock does
        h = F.silu(self.expand(h))                                        # (B, N, 4C)
        scale, shift = self.film(emb)[:, None].chunk(2, 2)                # (B, 1, 4C) each
        h = self.dropout(h * (1 + scale) + shift)
        return x + self.out(h)


class TransformerBlock(nn.Module):
    """x += mlp_block(x, emb); x += self_attention(x); with text, x += cross_attention(x, text).

    Each of the three adds its own residual. # Paper: 5.2 adds cross-attention "in addition to the self-attention and
    # mlp block"; we put it last.
    """

    def __init__(self, channels, emb_channels, num_heads, dropout, text_channels=0):
        super().__init__()
        self.mlp = MLPBlock(channels, emb_channels, dropout)
        self.attention = Attention(channels, num_heads)
        self.cross = CrossAttention(channels, text_channels, num_heads) if text_channels else None

    def forward(self, x, emb, text=None):
        x = self.attention(self.mlp(x, emb))
        return x if self.cross is None else self.cross(x, text)


class AttentionBlock(nn.Module):
    """Section 5.2: what replaces a ResBlock at 32 x 32. Maps x, emb[, skip] -> x, like a ResBlock.

    # Paper: "replaced convolutional layers with self-attention"; no more. We add the MLP, as at the bottom, keep the
    # skips, and leave cross-attention to the transformer.
    """

    def __init__(self, channels, emb_channels, num_heads, dropout, skip):
        super().__init__()
        self.mlp = MLPBlock(channels, emb_channels, dropout, skip)
        self.attention = Attention(channels, num_heads)

    def forward(self, x, emb, skip=None):
        B, C, H, W = x.shape
        tokens = lambda a: a.flatten(2).transpose(1, 2)                   # (B, H W, C)
        x = self.mlp(tokens(x), emb, None if skip is None else tokens(skip))
        return self.attention(x).transpose(1, 2).reshape(B, C, H, W)


class UViT(nn.Module):
    """Appendix B.2: (z, logsnr, cond) -> v_hat, shaped like z.

    size                     (height, width) of the image, px
    channel_mult             width of each level over base_channels; the last is the transformer's
    num_res_blocks           k ResBlocks down and k up for each level above the transformer
    num_transformer_blocks   blocks at the bottom
    transformer_dropout      in the MLP blocks (the ResBlocks' is `dropout`, by resolution, as in the U-Net)
    patching                 none | dwt_1 | dwt_2 | conv_2 | conv_4
    attn_resolutions         sides of maps that have AttentionBlocks, not ResBlocks. 5.2: 32, for text
    text, text_channels, portrait, guidance_max   as in unet.py
    position_std             initial size of the position embedding. The paper's normal(0.01) hardly tells tokens apart
                             at first. Its 500k steps soon mend that, the few thousand steps of a laptop do not
    Raises ValueError where sizes, widths, counts, patching and heads do not fit together.
    """

    def __init__(self, size, base_channels, emb_channels, channel_mult, num_res_blocks, num_transformer_blocks,
                 num_heads=4, transformer_dropout=0.2, dropout=0.0, dropout_from_resolution=0, patching="none",
                 num_classes=0, logsnr_min=-15.0, logsnr_max=15.0, in_channels=3, out_channels=3, position_std=0.01,
                 attn_resolutions=(), text=None, text_channels=0, portrait=False, guidance_max=0.0):
        super().__init__()
        if len(channel_mult) != len(num_res_blocks) + 1:
            raise ValueError(f"{len(num_res_blocks)} levels of ResBlocks need {len(num_res_blocks) + 1} widths "
                             f"(the last is the transformer's), not {len(channel_mult)}")
        patch = patch_factor(patching)
        self.size = check_size(size, patch, len(num_res_blocks))
        height, width = (s // patch for s in size)
        self.widths = widths = [base_channels * m for m in channel_mult]
        self.first_map = height, width                                    # size of the finest map
        self.embed = Embedding(emb_channels, logsnr_min, logsnr_max, num_classes, text=text, portrait=portrait,
                               guidance_max=guidance_max)
        self.input = EmbedInput(in_channels, widths[0], patching)
        self.down, self.downsample, up, upsample = nn.ModuleList(), nn.ModuleList(), [], []
        for level, blocks in enumerate(num_res_blocks):
            h, w = height >> level, width >> level
            drop = dropout if at_or_below(h, w, dropout_from_resolution) else 0.0
            block = partial(ResBlock, widths[level], emb_channels, drop)
            if any(at_resolution(h, w, r) for r in attn_resolutions):
                block = partial(AttentionBlock, widths[level], emb_channels, num_heads, transformer_dropout)
            self.down.append(Level(blocks, partial(block, skip=False)))
            self.downsample.append(Downsample(widths[level], widths[level + 1]))
            up.append(Level(blocks, partial(block, skip=True)))
            upsample.append(Upsample(widths[level + 1], widths[level]))
        self.up, self.upsample = nn.ModuleList(reversed(up)), nn.ModuleList(reversed(upsample))
        tokens = (height >> len(num_res_blocks)) * (width >> len(num_res_blocks))
        self.position = nn.Parameter(position_std * torch.randn(tokens, widths[-1]))      # learned
        self.transformer = nn.ModuleList(
            TransformerBlock(widths[-1], emb_channels, num_heads, transformer_dropout, text_channels)
            for _ in range(num_transformer_blocks))
        self.output = ProjectOutput(widths[0], out_channels, patching)
        initialise(self)

    def forward(self, z, logsnr, cond):
        return self.output(self.features(z, *self.embed(logsnr, cond, z.shape[0])))             # (B, 3, H, W)

    def features(self, z, emb, text=None, f=None):
        """Run all but the last layer: -> (B, C0, H, W). f: a map that an outer level adds to the first one."""
        check_input(z, self.size)
        h = self.input(z)                                                 # (B, C0, H, W)
        h = h if f is None else h + f
        skips = []
        for blocks, downsample in zip(self.down, self.downsample):
            for block, attention in blocks:
                h = block(h, emb)                                         # (B, Ci, H/2^i, W/2^i)
                skips.append(h)
            h = downsample(h)
        B, C, H, W = h.shape
        x = h.flatten(2).transpose(1, 2) + self.position                  # (B, N, C): token n is pixel (n // W, n % W)
        for block in self.transformer:
            x = block(x, emb, text)
        h = x.transpose(1, 2).reshape(B, C, H, W)
        for blocks, upsample in zip(self.up, self.upsample):
            h = upsample(h)
            for block, attention in blocks:
                h = block(h, emb, skips.pop())
        return h


# ------------------------------------------------------------------------------------------ the page of the lecture

def imagenet(side, patching):
    """Build the U-ViT of B.2 for ImageNet at `side` px, shapes only. The schedule's end points are shifted to 64 px."""
    shift = 2 * math.log(64 / side)
    with torch.device("meta"):
        return UViT((side, side), 128, 1024, (1, 2, 4, 16), (2, 2, 2), 36, num_heads=4, transformer_dropout=0.2,
                    patching=patching, num_classes=1000, logsnr_min=-15 + shift, logsnr_max=15 + shift)


def millions(*modules):
    return sum(p.numel() for module in modules for p in module.parameters()) / 1e6


def print_figure_7():
    """Print the blocks of the model for 512 px in the order of figure 7."""
    model, n = imagenet(512, "dwt_2"), 3
    row = lambda part, i, blocks, kind, size: print(
        f"{part:14s} {128 >> i:5d} {model.widths[i]:8d} {blocks:8d}   {kind:30s} {size:14.1f}")
    print("Figure 7 as a table: imagenet512_uvit, from input to output")
    print("part            side    width   blocks   kind                            parameters, M")
    print("input          dwt_2: 512x512x3 -> 128x128x48, then a 3x3 convolution")
    for i in range(n):
        row(f"down {i}", i, len(model.down[i]), "ResBlock, downsample", millions(model.down[i], model.downsample[i]))
    row("transformer", n, len(model.transformer), "MLP + attention, no skips", millions(model.transformer))
    for i in reversed(range(n)):
        up, upsample = model.up[n - 1 - i], model.upsample[n - 1 - i]     # coarsest first
        row(f"up {i}", i, len(up), "upsample, ResBlock with skip", millions(up, upsample))


def print_costs():
    from torch.utils.flop_counter import FlopCounterMode
    print("\npreset              parameters, M    forward pass of one image, GFLOP (multiply and add counted as two)")
    for side, patching in ((128, "none"), (256, "dwt_1"), (512, "dwt_2")):
        model = imagenet(side, patching)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, side, side), torch.zeros(1), {})
        print(f"{f'imagenet{side}_uvit':20s} {millions(model):12.1f}    {counter.get_total_flops() / 1e9:12.1f}")


def main():
    print_figure_7()
    print_costs()


if __name__ == "__main__":
    main()
