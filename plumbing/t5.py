"""A frozen T5: captions -> embeddings, and a cache of them on disk.

    python -m plumbing.t5 --data photos/ --text-encoder google/t5-v1_1-xxl      embeddings of all captions, once
"""
import functools
import hashlib
import json
import logging
import os
import re

import numpy as np
import torch

from data import open_source
from plumbing import UserError
from plumbing.runs import choose_device, main_program
from plumbing.settings import Parser
from text import to_bytes


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


def main():
    parser = Parser(prog="plumbing.t5", description="Keep the embeddings of all captions of a folder.")
    parser.add_argument("--data", help="folder of images with captions")
    parser.add_argument("--text-encoder", help="name or folder of a T5", default="google/t5-v1_1-xxl")
    parser.add_argument("--text-length", type=int, default=128, help="tokens at most (default 128)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    args = parser.parse_args()
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
    main_program(main)
