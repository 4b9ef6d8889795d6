"""Captions in: what turns a phrase into embeddings, and what a network is told of them.

Paper: simple diffusion, section 3.6: "the T5 XXL text encoder as conditioning", frozen, after Imagen; 5.2:
cross-attention in the transformer. Read before: unet.py (CrossAttention is there). Read after: uvit.py, train.py.

Two encoders:

    bytes      words made of the caption's UTF-8 bytes and a transformer over them, a part of the model and trained with
               it. Nothing to download; enough for short phrases ("a blue serif Q on striped yellow")
    a T5       --text-encoder google/t5-v1_1-xxl (the paper's), google/flan-t5-xl (Matryoshka's), or a local folder: the
               last hidden states of a frozen encoder in bf16, up to 128 tokens. It needs the package transformers. Its
               weights are in no checkpoint, no optimiser and no average; its embeddings can be kept on disk

`Encoder` makes of captions what the model takes as conditions, outside of the model:

    text (B, T) bytes, or (B, T, c) embeddings;  text_mask (B, T), True where there is text

`TextCondition`, inside the model, makes of that what cross-attention looks at, and a pooled vector for the scales and
shifts. An empty caption says nothing: it is a dropped one, and has the model's null embedding, which it learns from the
10 % of captions that training hides (a mask without a True).

Legend of shapes: B batch, T text_length, c text_channels, E emb_channels.

# Paper: the text goes into cross-attention; of a pooled vector it says nothing. Imagen and Matryoshka add one
# (--text-pooled), as we do.

    python text.py                                  how captions become tokens, and what text costs each preset
    python text.py cache --data photos/ --text-encoder google/t5-v1_1-xxl       embeddings of all captions, once
"""

import torch
import torch.nn as nn

from unet import Attention, starting_at


# ------------------------------------------------------------------------------------------ inside the model

class ByteEncoder(nn.Module):
    """The small encoder: text (B, T) long in 0..255, mask (B, T) -> words (B, T, c), their mask (B, T). Trained along.

    Each byte is told of `reach` others on both sides; the mean over a word's bytes is a token, and a transformer looks
    at the words. Not at bytes: where one letter decides, it would be one of forty tokens; so it is one of seven.
    """

    def __init__(self, channels, length, layers, num_heads, reach=3):
        super().__init__()
        self.reach = reach
        self.byte = nn.Embedding(256, channels)
        self.near = nn.Linear((2 * reach + 1) * channels, channels)
        self.position = nn.Parameter(0.1 * torch.randn(length, channels))  # of a word among the words
        self.layers = nn.ModuleList(nn.ModuleList([
            Attention(channels, num_heads),
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(),
                          starting_at(0, nn.Linear(4 * channels, channels)))]) for _ in range(layers))

    def forward(self, text, mask):
        x = self.byte(text) * mask[:, :, None]                            # what is padded is zero to its neighbours
        near = nn.functional.pad(x, (0, 0, self.reach, self.reach))
        x = x + self.near(torch.cat([near[:, i:i + x.shape[1]] for i in range(2 * self.reach + 1)], 2))
        letter = mask & (text != ord(" "))
        word = ((text == ord(" ")) & mask).cumsum(1)                      # (B, T) which word a byte belongs to
        belongs = (word[:, None] == torch.arange(text.shape[1], device=text.device)[:, None]) & letter[:, None]
        count = belongs.sum(2)                                            # (B, T) bytes of each word
        x = (belongs / count.clamp(min=1)[:, :, None]).to(x.dtype) @ x + self.position[:text.shape[1]]
        mask = count > 0
        some = mask | ~mask.any(1, keepdim=True)                          # no text: any, or the softmax has no summand
        for attention, mlp in self.layers:
            x = attention(x, some)
            x = x + mlp(x)
        return x, mask


class TextCondition(nn.Module):
    """What the conditions say in words: (cond, B) -> tokens (B, T, c), mask (B, T), pooled (B, E).

    cond["text"], cond["text_mask"] as from `Encoder`; absent: dropped for all. Where the mask has no True the first
    token is the null embedding and the only one to be seen, whatever the text.

    encoder: a ByteEncoder, or None for embeddings that come from outside. pooled: is the sum of the tokens added to the
    embedding of log-SNR?
    """

    def __init__(self, channels, emb_channels, encoder=None, pooled=True):
        super().__init__()
        self.encoder, self.norm = encoder, nn.LayerNorm(channels)
        self.null = nn.Parameter(torch.zeros(channels))
        self.pool = starting_at(3, nn.Linear(channels, emb_channels)) if pooled else None

    def forward(self, cond, batch):
        if "text" in cond:
            tokens, mask = cond["text"], cond["text_mask"]
            if self.encoder is not None:
                tokens, mask = self.encoder(tokens, mask)
            tokens = self.norm(tokens.to(self.null.dtype))
            null = ~mask.any(1, keepdim=True) & (torch.arange(mask.shape[1], device=mask.device) == 0)      # (B, T)
            tokens, mask = torch.where(null[:, :, None], self.null.to(tokens.dtype), tokens), mask | null
        else:
            tokens = self.null.expand(batch, 1, -1)
            mask = torch.ones(batch, 1, dtype=torch.bool, device=tokens.device)
        if self.pool is None:
            return tokens, mask, 0.0
        # Divided by the root of their number: a mean of many would be small, and one word of it hardly heard.
        return tokens, mask, self.pool((tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).sqrt())


# ------------------------------------------------------------------------------------------ outside of it

def to_bytes(captions, length):
    """[str] -> text (B, length) long, mask (B, length); longer captions are cut."""
    text, mask = torch.zeros(len(captions), length, dtype=torch.long), torch.zeros(len(captions), length).bool()
    for i, caption in enumerate(captions):
        part = caption.encode()[:length]
        text[i, :len(part)], mask[i, :len(part)] = torch.tensor(list(part), dtype=torch.long), True
    return text, mask


# ------------------------------------------------------------------------------------------ the page of the lecture

def main():
    from config import PRESETS, build_model
    from data import Glyphs
    caption = Glyphs().caption(10)
    text, mask = to_bytes([caption, "Ω", ""], 48)
    print(f"{caption!r}\n  as bytes: {text[0, :12].tolist()} ..., "
          f"{int(mask[0].sum())} of {mask.shape[1]} places are text")
    print(f"'Ω' is {int(mask[1].sum())} bytes; '' has no place with text, and so the null embedding\n")
    print("preset                parameters, M   cross-attention, M   its own encoder, M   text comes as")
    count = lambda parts: sum(p.numel() for part in parts for p in part.parameters()) / 1e6
    for name in ("glyphs64_text", "t2i256_uvit", "t2i512_uvit", "t2i384x640_uvit"):
        config = PRESETS[name]
        with torch.device("meta"):
            model = build_model(config)
        cross = count(module for module in model.modules() if type(module).__name__ == "CrossAttention")
        own = count(module for module in model.modules() if isinstance(module, ByteEncoder))
        print(f"{name:20s} {count([model]):14.1f} {cross:20.1f} {own:20.1f}   {config.text_length} "
              + ("bytes" if config.text_encoder == "bytes" else
                 f"tokens x {config.text_channels} of {config.text_encoder}"))


if __name__ == "__main__":
    import text                                                           # the module that config.py knows, not a copy
    text.main()
