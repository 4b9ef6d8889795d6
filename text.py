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
import functools
import hashlib
import json
import logging
import os
import re

import numpy as np
import torch
import torch.nn as nn

from data import UserError, open_source
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


@functools.lru_cache(maxsize=1)
class FrozenT5:
    """captions -> last hidden states (B, length, c) in bf16, zero where padded, and the mask. Loaded once a process."""

    def __init__(self, name, length, device):
        try:
            from transformers import AutoTokenizer, T5EncoderModel        # optional: only here
            from transformers.utils import logging as chatter
        except ImportError:
            raise UserError(f"--text-encoder {name}: want the package transformers: pip install transformers") from None
        chatter.disable_progress_bar()
        for library in ("transformers", "huggingface_hub"):               # we say in one line what went wrong
            logging.getLogger(library).setLevel(logging.CRITICAL)
        local = dict(local_files_only=True) if os.path.isdir(name) else {}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, **local)
            self.model, found = T5EncoderModel.from_pretrained(name, dtype=torch.bfloat16, output_loading_info=True,
                                                               **local)
        except Exception as error:                                        # the package fails in many ways
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"--text-encoder {name}: neither a folder with a T5 nor one that can be had by that name: "
                            f"point at a local folder ({type(error).__name__}: {reason})") from None
        if found["missing_keys"]:                                         # the package would make them up
            raise UserError(f"--text-encoder {name}: it lacks weights ({', '.join(sorted(found['missing_keys'])[:3])})")
        self.model.eval().requires_grad_(False).to(device)
        self.length, self.device, self.channels = length, device, self.model.config.d_model

    @torch.no_grad()
    def __call__(self, captions):
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt")
        # An empty caption still has an end-of-sentence token. To us it says nothing.
        mask = tokens.attention_mask.bool() & torch.tensor([bool(caption) for caption in captions])[:, None]
        mask, text = mask.to(self.device), tokens.input_ids.to(self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            text = self.model(text, attention_mask=tokens.attention_mask.to(self.device)).last_hidden_state
        return text * mask[:, :, None], mask


class Encoder:
    """captions [B] -> dict(text, text_mask), on the device: conditions for a model with text. Raises UserError.

    config: text_encoder, text_channels, text_length. cached: read the embeddings that `text.py cache` keeps in the
    folder of the data, if it has them, in the place of the T5 itself; a caption that is not among them is an error.
    """

    def __init__(self, config, device, cached=False):
        self.config, self.device = config, device
        if config.text_encoder == "bytes":
            self.encode = functools.partial(to_bytes, length=config.text_length)
            return
        folder = cache_folder(config.data, config.text_encoder)
        if cached and os.path.isdir(folder):
            self.encode = Cache(folder, config.text_length)
        else:
            self.encode = FrozenT5(config.text_encoder, config.text_length, device)
        if self.encode.channels != config.text_channels:
            raise UserError(f"--text-channels {config.text_channels}: {config.text_encoder} has {self.encode.channels}")

    def __call__(self, captions):
        text, mask = self.encode(captions)
        return dict(text=text.to(self.device), text_mask=mask.to(self.device))

    def check(self, source):
        """Are all captions of the data among those that are kept? Known before any work. Raises UserError."""
        if isinstance(self.encode, Cache):
            for i in range(len(source)):
                if source.caption(i):
                    self.encode.find(source.caption(i))


def check_moved(old, new, run):
    """May a run with the encoder `old` be told that it is now to be had as `new`? Only a T5 can move."""
    if old != new and not (old and new and "bytes" not in (old, new)):
        raise UserError(f"--text-encoder {new or '(empty)'}: {run} was trained with {old or 'classes'}")


# ------------------------------------------------------------------------------------------ embeddings on disk

def cache_folder(data, name):
    """Where the embeddings of a folder's captions are: in it, hidden from the search for images."""
    return os.path.join(data, ".text", re.sub(r"[^\w.-]+", "_", name.strip("/")))


def key_of(caption):
    """Eight bytes of its hash: of 10^7 captions two share one with a chance of 10^-5."""
    return np.frombuffer(hashlib.sha256(caption.encode()).digest()[:8], np.uint64)[0]


class Cache:
    """Embeddings by caption. Part k: k.npy, the tokens of its captions in a row (n, c), bf16 as 16-bit integers,
    mapped when asked for; k.index, the captions' keys, first and last token. An index is written last, whole or not at
    all, and without one a part is not there."""

    def __init__(self, folder, length):
        self.folder, self.length = folder, length
        try:
            with open(os.path.join(folder, "about.json")) as file:
                about = json.load(file)
            self.channels, made = about["channels"], about["length"]
            names = sorted(name[:-6] for name in os.listdir(folder) if name.endswith(".index"))
            self.paths = [os.path.join(folder, name + ".npy") for name in names]
            indices = [np.load(path[:-4] + ".index") for path in self.paths] or [np.zeros((0, 3), np.uint64)]
        except Exception as error:                                        # damaged files fail in many ways
            raise UserError(f"{folder}: damaged ({error}); remove it, and run text.py cache again") from None
        part = np.repeat(np.arange(len(indices), dtype=np.uint64), [len(index) for index in indices])
        self.index = np.column_stack([np.concatenate(indices), part])     # key, first token, last + 1, part
        self.index = self.index[self.index[:, 0].argsort()]
        if made != length:
            raise UserError(f"--text-length {length}: {folder} was made with {made}")

    def __contains__(self, caption):
        return self.place(caption) is not None

    def place(self, caption):
        at, key = np.searchsorted(self.index[:, 0], key_of(caption)), key_of(caption)
        return self.index[at, 1:] if at < len(self.index) and self.index[at, 0] == key else None

    def find(self, caption):
        """(n, c) uint16. Raises UserError for a caption that was not there when the cache was made."""
        place = self.place(caption)
        if place is None:
            raise UserError(f"no embedding of {caption[:60]!r} in {self.folder}: run text.py cache again")
        first, last, part = map(int, place)
        return np.array(np.load(self.paths[part], mmap_mode="r")[first:last])

    def __call__(self, captions):
        text, mask = torch.zeros(len(captions), self.length, self.channels, dtype=torch.bfloat16), []
        for i, caption in enumerate(captions):
            found = self.find(caption) if caption else np.zeros((0, self.channels), np.uint16)
            text[i, :len(found)] = torch.from_numpy(found).view(torch.bfloat16)
            mask.append(torch.arange(self.length) < len(found))
        return text, torch.stack(mask)


def write_cache(data, name, length, device, part=4096, batch=64):
    """Embeddings of all captions of a folder of images, into `cache_folder`. Interrupted: goes on where it stopped.
    -> (that folder, how many are new)."""
    source, folder = open_source(data, (64, 64)), cache_folder(data, name)
    wanted = sorted({source.caption(i) for i in range(len(source))} - {""})
    if not wanted:
        raise UserError(f"--data {data}: no image has a caption (captions.jsonl, or a .txt beside each)")
    try:
        os.makedirs(folder, exist_ok=True)                                # may we write here? Better known now
        encoder = FrozenT5(name, length, device)
        if not os.path.exists(os.path.join(folder, "about.json")):
            with open(os.path.join(folder, "about.json.new"), "w") as file:
                json.dump(dict(encoder=name, channels=encoder.channels, length=length), file)
            os.replace(file.name, os.path.join(folder, "about.json"))
        cache = Cache(folder, length)                                     # another length: known before any work
        if cache.channels != encoder.channels:
            raise UserError(f"{folder}: made with another encoder of this name; remove it and begin again")
        wanted = [caption for caption in wanted if caption not in cache]
        write_parts(folder, wanted, encoder, len(cache.paths), part, batch)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; what was written before is kept") from None
    return folder, len(wanted)


def write_parts(folder, wanted, encoder, number, part, batch):
    """These captions as parts `number`, `number` + 1, ..."""
    for first in range(0, len(wanted), part):
        index, rows, at = [], [], 0
        for i in range(first, min(first + part, len(wanted)), batch):
            captions = wanted[i:min(i + batch, first + part)]
            text, mask = encoder(captions)
            for caption, tokens, seen in zip(captions, text.cpu(), mask.sum(1).tolist()):
                index.append((key_of(caption), at, at + seen))
                rows.append(tokens[:seen].contiguous().view(torch.uint16).numpy())
                at += seen
        path = os.path.join(folder, f"{number + first // part:06d}")
        np.save(path + ".npy", np.concatenate(rows))
        with open(path + ".index.new", "wb") as file:
            np.save(file, np.array(index, np.uint64))
        os.replace(path + ".index.new", path + ".index")
        print(f"{min(first + part, len(wanted)):,} of {len(wanted):,} captions", flush=True)


# ------------------------------------------------------------------------------------------ the program

def explain():
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


def main():
    from config import Parser
    from runs import choose_device
    parser = Parser(prog="text.py", description="Without arguments: explains itself.")
    parser.add_argument("what", nargs="?", choices=("cache",), help="cache: keep the embeddings of all captions")
    parser.add_argument("--data", help="folder of images with captions")
    parser.add_argument("--text-encoder", help="name or folder of a T5", default="google/t5-v1_1-xxl")
    parser.add_argument("--text-length", type=int, default=128, help="tokens at most (default 128)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    args = parser.parse_args()
    if args.what is None:
        return explain()
    if not args.data or not os.path.isdir(args.data):
        raise UserError(f"--data {args.data or ''}: want a folder of images with captions")
    if args.text_encoder == "bytes":
        raise UserError("--text-encoder bytes: is trained with the model, so there is nothing to keep; want a T5")
    if args.text_length < 1:
        raise UserError(f"--text-length {args.text_length}: want 1 or more")
    folder, count = write_cache(args.data, args.text_encoder, args.text_length, choose_device(args.device)[0])
    print(f"wrote {count:,} new embeddings to {folder}; train.py --data {args.data} --text-encoder {args.text_encoder} "
          "reads them there")


if __name__ == "__main__":
    import text                                                           # the module that config.py knows, not a copy
    from runs import main_program
    main_program(text.main)
