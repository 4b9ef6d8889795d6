"""Captions in: how they become embeddings, and how the network reads them.

Paper: simple diffusion, section 3.6: "the T5 XXL text encoder as conditioning", frozen, after Imagen; 5.2:
cross-attention in the transformer. Needs: unet.py (it holds CrossAttention), uvit.py. Next: nested_unet.py.

There are two encoders (--text-encoder):

    bytes      words made of the caption's UTF-8 bytes, and a transformer over them. It is part of the model and trained
               with it. Nothing to download; enough for short phrases ("a blue serif Q on striped yellow")
    a T5       google/t5-v1_1-xxl (the paper's), google/flan-t5-xl (Matryoshka's), or a local folder: the last hidden
               states of a frozen encoder in bf16, up to 128 tokens. It needs the package transformers. It is not part
               of the model, so it is not trained, averaged or saved. plumbing/t5.py runs it and can cache its
               embeddings on disk

Outside the model, plumbing/t5.py's `Encoder` turns captions into conditions:

    text (B, T) bytes, or (B, T, c) embeddings;  text_mask (B, T), True where there is text

Inside the model, `TextCondition` turns these into the tokens that cross-attention reads, and into a pooled vector for
scales and shifts. An empty caption (a mask without a True) counts as dropped. It gets the model's null embedding, which
learns from the 10 % of captions that training hides.

Legend of shapes: B batch, T text_length, c text_channels, E emb_channels.

# Paper: the text goes into cross-attention. It mentions no pooled vector. Imagen and Matryoshka add one
# (--text-pooled), and so do we.

`python text.py` prints how captions become tokens, and what text costs each model.
"""
import sys

import torch
import torch.nn as nn

from plumbing.pages import millions
from unet import Attention, CrossAttention, starting_at


# ------------------------------------------------------------------------------------------ outside the model

def to_bytes(captions, length):
    """Turn captions [str] into text (B, length) long and mask (B, length). Longer captions are cut."""
    text, mask = torch.zeros(len(captions), length, dtype=torch.long), torch.zeros(len(captions), length).bool()
    for i, caption in enumerate(captions):
        part = caption.encode()[:length]
        text[i, :len(part)], mask[i, :len(part)] = torch.tensor(list(part), dtype=torch.long), True
    return text, mask


# ------------------------------------------------------------------------------------------ inside the model

class ByteEncoder(nn.Module):
    """The small encoder: text (B, T) long in 0..255, mask (B, T) -> words (B, T, c), their mask (B, T).

    Each byte sees `reach` neighbours on both sides. The mean over a word's bytes is a token. The transformer runs over
    words: a single letter can decide the image, and it is one of forty bytes but one of seven words, easier to find.
    """

    def __init__(self, channels, length, layers, num_heads, reach=3):
        super().__init__()
        self.reach = reach
        self.byte = nn.Embedding(256, channels)
        self.near = nn.Linear((2 * reach + 1) * channels, channels)
        self.position = nn.Parameter(0.1 * torch.randn(length, channels))  # of a word in the caption
        self.layers = nn.ModuleList(nn.ModuleList([
            Attention(channels, num_heads),
            nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(),
                          starting_at(0, nn.Linear(4 * channels, channels)))]) for _ in range(layers))

    def forward(self, text, mask):
        x = self.byte(text) * mask[:, :, None]                            # (B, T, c), zero where padded
        T, padded = x.shape[1], nn.functional.pad(x, (0, 0, self.reach, self.reach))
        x = x + self.near(torch.cat([padded[:, i:i + T] for i in range(2 * self.reach + 1)], 2))
        # From bytes to words: word w is the mean of its bytes. A byte's word is the number of spaces before it.
        is_space = text == ord(" ")
        number = (is_space & mask).cumsum(1)                              # (B, T) of the word that a byte is in
        in_word = (number[:, None] == torch.arange(T, device=text.device)[:, None]) & (mask & ~is_space)[:, None]
        count = in_word.sum(2)                                            # (B, T) bytes of each word; in_word (B, T, T)
        x = (in_word / count.clamp(min=1)[:, :, None]).to(x.dtype) @ x + self.position[:T]      # (B, T, c)
        mask = count > 0
        attended = mask | ~mask.any(1, keepdim=True)                      # no word: attend to all, softmax needs one
        for attention, mlp in self.layers:
            x = attention(x, attended)
            x = x + mlp(x)
        return x, mask


class TextCondition(nn.Module):
    """Read the text among the conditions: (cond, B) -> tokens (B, T, c), mask (B, T), pooled (B, E).

    cond["text"] and cond["text_mask"] come from `Encoder`. Without these keys the whole batch is unconditional. An
    example with an empty mask sees one token, the null embedding.

    encoder  a ByteEncoder, or None if the embeddings come from outside
    pooled   also add the sum of the tokens, over the root of their number, to the embedding of log-SNR
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
        # Divide by the root of their number. A plain mean would make each word's share small.
        return tokens, mask, self.pool((tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).sqrt())


# ------------------------------------------------------------------------------------------ the page of the lecture

def print_tokens():
    from data import Glyphs
    caption = Glyphs().caption(10)
    text, mask = to_bytes([caption, "Ω", ""], 48)
    print(f"{caption!r}\n  as bytes: {text[0, :12].tolist()} ..., "
          f"{int(mask[0].sum())} of {mask.shape[1]} places are text")
    print(f"a capital omega is {int(mask[1].sum())} bytes; '' has no place with text, so it gets the null embedding\n")


def print_costs():
    """Print the parameters that text adds to a small model with its own encoder, and to the three models of 3.6."""
    from uvit import UViT

    def of_the_paper(size, patching):
        return UViT(size, 128, 1024, (1, 2, 4, 16), (2, 2, 2), 36, num_heads=4, patching=patching,
                    transformer_resolutions=(32,), text=TextCondition(4096, 1024), text_channels=4096,
                    portrait=size[0] != size[1])

    with torch.device("meta"):                                            # shapes only: no memory, no numbers
        models = {"t2i256_uvit": of_the_paper((256, 256), "dwt_1"), "t2i512_uvit": of_the_paper((512, 512), "dwt_2"),
                  "t2i384x640_uvit": of_the_paper((384, 640), "dwt_2")}
        small = UViT((64, 64), 32, 256, (1, 3, 6), (1, 1), 4, num_heads=4, patching="dwt_1",
                     text=TextCondition(128, 256, ByteEncoder(128, 48, layers=2, num_heads=4)), text_channels=128)
    size_of = lambda model, kind: millions(*(module for module in model.modules() if isinstance(module, kind)))
    print("preset                parameters, M   cross-attention, M   its own encoder, M   text comes as")
    for name, model in {"glyphs64_text": small, **models}.items():
        source = "48 bytes" if model is small else "128 tokens x 4096 of google/t5-v1_1-xxl"
        print(f"{name:20s} {size_of(model, UViT):14.1f} {size_of(model, CrossAttention):20.1f} "
              f"{size_of(model, ByteEncoder):20.1f}   {source}")


def main():
    if sys.argv[1:] in (["-h"], ["--help"]):
        return print(__doc__)
    if len(sys.argv) > 1:
        print("text.py: takes no arguments; to cache the embeddings of captions: python -m plumbing.t5",
              file=sys.stderr)
        sys.exit(2)
    print_tokens()
    print_costs()


if __name__ == "__main__":
    main()
