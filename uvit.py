"""The U-ViT: a small convolutional U-Net around a large transformer.

Paper: simple diffusion, sections 3.5, 3.6 and 5.2 (text), appendix B.2 and B.2.1 (pseudo-code), figure 7.
Needs: unet.py (embedding, ResBlock, attention). Next: text.py, or for images alone precondition.py.

The coarsest level of the U-ViT (16 x 16 in the paper) has only transformer blocks, without U-Net skips. The finer
levels have ResBlocks with skips, as before. The result is easy to scale (36 blocks of width 2048, 2 billion parameters)
and keeps accelerators busy. For text to image (3.6, 5.2), transformer blocks also have cross-attention to the caption,
and at 32 x 32 self-attention replaces the convolutions, too.

Legend of shapes: B batch, C channels, N = H W tokens of the coarsest map, E emb_channels.

# Paper: its U-ViT code has k ResBlocks on the way up, too, not k + 1. Only the outputs of blocks are skips.
# Paper: a transformer block is MLP first, then attention, both residual: as printed.
# Paper: "DenseGeneral(emb, mlp_h.shape[2:])": scale and shift act on the 4C hidden features, after the swish.
# Paper: the U-ViT has no norm before ProjectOutput, whose inside is not printed: the paper does not say whether it
# starts at zero. In both networks ours has no norm and no zeros. With the usual norm, swish and zeros, our small models
# learnt markedly slower (benchmarks/NOTEBOOK.md). Only Matryoshka's own U-Net has them (`zero_head` in unet.py).

`python uvit.py` prints figure 7 as a table of blocks, and the parameters and FLOPs of the three ImageNet models.
"""
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from dwt import EmbedInput, ProjectOutput, patch_factor
from plumbing.pages import gflops, millions
from unet import (Attention, CrossAttention, Downsample, Embedding, MapSequence, ResBlock, Upsample, at_or_below,
                  at_resolution, check_input, check_size, initialise, starting_at)


class MLPBlock(nn.Module):
    """The paper's mlp_block (B.2.1), with its residual: tokens x (B, N, C), emb (B, E) -> (B, N, C). skip, shaped like
    x, is only for the AttentionBlock below (text at 32 x 32)."""

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
            h = (h + self.norm_skip(skip)) / math.sqrt(2)                 # as in the ResBlock
        h = F.silu(self.expand(h))                                        # (B, N, 4C)
        scale, shift = self.film(emb)[:, None].chunk(2, 2)                # (B, 1, 4C) each
        h = self.dropout(h * (1 + scale) + shift)
        return x + self.out(h)


class TransformerBlock(nn.Module):
    """x += mlp_block(x, emb); x += self_attention(x); with text, x += cross_attention(x, text).

    # Paper: 5.2 adds cross-attention "in addition to the self-attention and mlp block"; we put it last.
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
    """Section 5.2, for text only: it replaces a ResBlock at 32 x 32. (x, emb[, skip]) -> x, like a ResBlock.

    # Paper: it says only "replaced convolutional layers with self-attention". We add an MLP block, as in the
    # transformer, and keep the skips. Only the transformer has cross-attention.
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
    """Appendix B.2: (z (B, in_channels, H, W), logsnr, cond) -> v_hat (B, 3, H, W).

    channel_mult             channels of each level, as a multiple of base_channels. The last is the transformer's
    num_res_blocks           k ResBlocks down and k up, for each level above the transformer
    num_transformer_blocks   blocks of the transformer
    transformer_dropout      dropout in MLP blocks. (`dropout`, by resolution, is for ResBlocks, as in the U-Net)
    position_std             initial standard deviation of the position embedding. With the paper's 0.01, a token hardly
                             shows its position at first. 500k steps change that, a laptop's few thousand do not
    The other arguments, and ValueError, are as in the U-Net. Only for later files:
    transformer_resolutions  sides of the maps that have AttentionBlocks INSTEAD OF ResBlocks. 5.2: 32, for text
    """

    def __init__(self, size, base_channels, emb_channels, channel_mult, num_res_blocks, num_transformer_blocks,
                 num_heads=4, transformer_dropout=0.2, dropout=0.0, dropout_from_resolution=0, patching="none",
                 num_classes=0, logsnr_min=-15.0, logsnr_max=15.0, position_std=0.01, in_channels=3,
                 transformer_resolutions=(), text_channels=0, text=None, portrait=False, guidance_max=0.0):
        super().__init__()
        if len(channel_mult) != len(num_res_blocks) + 1:
            raise ValueError(f"{len(num_res_blocks)} levels of ResBlocks need {len(num_res_blocks) + 1} widths "
                             f"(the last is the transformer's), not {len(channel_mult)}")
        self.size = check_size(size, patch_factor(patching), len(num_res_blocks))
        self.first_map = height, width = tuple(s // patch_factor(patching) for s in size)       # size of the finest map
        self.widths = widths = [base_channels * m for m in channel_mult]

        def pair(level, skip):
            map_size = height >> level, width >> level
            level_dropout = dropout if at_or_below(*map_size, dropout_from_resolution) else 0.0
            block = partial(ResBlock, widths[level], emb_channels, level_dropout)
            if any(at_resolution(*map_size, r) for r in transformer_resolutions):
                block = partial(AttentionBlock, widths[level], emb_channels, num_heads, transformer_dropout)
            return nn.ModuleList([block(skip=skip), MapSequence()])       # the U-Net's pair, but no attention follows

        self.embed = Embedding(emb_channels, logsnr_min, logsnr_max, num_classes, text=text, portrait=portrait,
                               guidance_max=guidance_max)
        self.input = EmbedInput(in_channels, widths[0], patching)
        self.down, self.downsample, up, upsample = nn.ModuleList(), nn.ModuleList(), [], []
        for level, k in enumerate(num_res_blocks):
            self.down.append(nn.ModuleList(pair(level, skip=False) for _ in range(k)))
            self.downsample.append(Downsample(widths[level], widths[level + 1]))
            up.append(nn.ModuleList(pair(level, skip=True) for _ in range(k)))
            upsample.append(Upsample(widths[level + 1], widths[level]))
        self.up, self.upsample = nn.ModuleList(reversed(up)), nn.ModuleList(reversed(upsample))   # coarsest first
        tokens = (height >> len(num_res_blocks)) * (width >> len(num_res_blocks))
        self.position = nn.Parameter(position_std * torch.randn(tokens, widths[-1]))            # learned
        self.transformer = nn.ModuleList(
            TransformerBlock(widths[-1], emb_channels, num_heads, transformer_dropout, text_channels)
            for _ in range(num_transformer_blocks))
        self.output = ProjectOutput(widths[0], 3, patching)
        initialise(self)

    def forward(self, z, logsnr, cond):
        return self.output(self.features(z, *self.embed(logsnr, cond, z.shape[0])))  # (B, 3, H, W)

    def features(self, z, emb, text=None, f=None):
        """Run all layers but the last. f, from nested_unet.py or video.py: a map to add to the first layer's output."""
        check_input(z, self.size)
        h = self.input(z)                                                 # (B, C0, H, W)
        h = h if f is None else h + f
        skips = []
        for blocks, downsample in zip(self.down, self.downsample):
            for block, _ in blocks:                                       # the second of each pair is empty: see `pair`
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
            for block, _ in blocks:
                h = block(h, emb, skips.pop())
        return h


# ------------------------------------------------------------------------------------------ figure 7, costs

def imagenet_uvit(side, patching):
    """Build B.2's U-ViT for ImageNet at `side` px, as shapes without numbers. Its schedule has noise_d = 64."""
    shift = 2 * math.log(64 / side)
    with torch.device("meta"):
        return UViT((side, side), 128, 1024, (1, 2, 4, 16), (2, 2, 2), 36, num_heads=4, transformer_dropout=0.2,
                    patching=patching, num_classes=1000, logsnr_min=-15 + shift, logsnr_max=15 + shift)


def print_figure_7():
    """Print the blocks of the model for 512 px in the order of figure 7."""
    model, n = imagenet_uvit(512, "dwt_2"), 3
    row = lambda part, i, blocks, kind, parameters: print(
        f"{part:14s} {128 >> i:5d} {model.widths[i]:8d} {blocks:8d}   {kind:30s} {parameters:14.1f}")
    print("Figure 7 as a table: imagenet512_uvit, from input to output")
    print("part            side    width   blocks   kind                            parameters, M")
    print("input          dwt_2: 512x512x3 -> 128x128x48, then a 3x3 convolution")
    for i in range(n):
        row(f"down {i}", i, len(model.down[i]), "ResBlock, downsample", millions(model.down[i], model.downsample[i]))
    row("transformer", n, len(model.transformer), "MLP + attention, no skips", millions(model.transformer))
    for i in reversed(range(n)):
        up, upsample = model.up[n - 1 - i], model.upsample[n - 1 - i]     # coarsest first
        row(f"up {i}", i, len(up), "upsample, ResBlock with skip", millions(up, upsample))
    print("output         a 3x3 convolution, then the inverse of dwt_2: 128x128x48 -> 512x512x3")


def print_costs():
    """Print the parameters and the FLOPs of the three ImageNet models."""
    print("\npreset              parameters, M    forward pass of one image, GFLOP (multiply and add counted as two)")
    for side, patching in ((128, "none"), (256, "dwt_1"), (512, "dwt_2")):
        model = imagenet_uvit(side, patching)
        with torch.device("meta"):
            cost = gflops(model, torch.zeros(1, 3, side, side), torch.zeros(1), {})
        print(f"{f'imagenet{side}_uvit':20s} {millions(model):12.1f}    {cost:12.1f}")


def main():
    print_figure_7()
    print_costs()


if __name__ == "__main__":
    main()
