"""A frozen T5: captions -> embeddings, and a cache of them on disk.

    python -m plumbing.t5 --data photos/ --text-encoder google/t5-v1_1-xxl      cache the embeddings of all captions

The cache lies in the folder of images itself. Training finds it there, and then needs neither the T5 nor the package
transformers.
"""
import functools
import hashlib
import json
import logging
import os
import re

import numpy as np
import torch

from plumbing import UserError
from plumbing.captions import faults
from plumbing.files import blame_machine, whole_file, write_json
from plumbing.runs import choose_device, main_program
from plumbing.settings import Parser, check_range
from plumbing.sources import open_source
from text import to_bytes


class Encoder:
    """Turn captions [B] into dict(text, text_mask) on the device: the conditions of a model with text.

    config: text_encoder, text_channels, text_length. cached: where the data's folder has a cache of embeddings, read
    them instead of running the T5. A caption that is not in the cache is then an error. Raises UserError.
    """

    def __init__(self, config, device, cached=False):
        self.device, self.length = device, config.text_length
        if config.text_encoder == "bytes":
            self.encode = functools.partial(to_bytes, length=config.text_length)
            self.cuts = lambda caption: len(caption.encode()) > self.length                     # is it too long?
            return
        folder = cache_folder(config.data, config.text_encoder)
        if cached and os.path.isdir(folder):
            self.encode = Cache(folder, config.text_length)
        else:
            self.encode = FrozenT5(config.text_encoder, config.text_length, device)
        if self.encode.channels != config.text_channels:
            raise UserError(f"--text-channels {config.text_channels}: {config.text_encoder} has {self.encode.channels}")
        self.cuts = self.encode.cuts

    def __call__(self, captions):
        text, mask = self.encode(captions)
        return dict(text=text.to(self.device), text_mask=mask.to(self.device))

    def check(self, source):
        """Check before any work that the cache has every caption of the data. Raises UserError."""
        if isinstance(self.encode, Cache):
            for i in range(len(source)):
                for caption in filter(None, source.captions(i)):
                    self.encode.find(caption)


def check_moved(old, new, run):
    """Check that a run with the encoder `old` may use `new`: only a T5 can have moved. Raises UserError."""
    if old != new and not (old and new and "bytes" not in (old, new)):
        raise UserError(f"--text-encoder {new or '(empty)'}: {run} was trained with {old or 'classes'}")


# ------------------------------------------------------------------------------------------ the T5

@functools.lru_cache(maxsize=1)
class FrozenT5:
    """captions -> last hidden states (B, length, c) in bf16, zero where padded, and the mask. Loaded once a process."""

    def __init__(self, name, length, device):
        self.tokenizer, self.model = load_t5(name)
        self.model.eval().requires_grad_(False).to(device)
        self.length, self.device, self.channels = length, device, self.model.config.d_model

    @torch.no_grad()
    def __call__(self, captions):
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt")
        # An empty caption still has an end-of-sentence token. For us it has no token at all.
        mask = tokens.attention_mask.bool() & torch.tensor([bool(caption) for caption in captions])[:, None]
        mask = mask.to(self.device)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            text = self.model(tokens.input_ids.to(self.device),
                              attention_mask=tokens.attention_mask.to(self.device)).last_hidden_state
        return text * mask[:, :, None], mask

    def cuts(self, caption):
        """Return whether a caption is longer than `length` tokens."""
        return len(self.tokenizer(caption).input_ids) > self.length


def load_t5(name):
    """Load tokenizer and encoder by name or from a local folder. Raises UserError."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel            # optional: only here
        from transformers.utils import logging as messages
    except ImportError:
        raise UserError(f"--text-encoder {name}: needs the package transformers: pip install transformers") from None
    messages.disable_progress_bar()
    for library in ("transformers", "huggingface_hub"):                   # our one line says what went wrong
        logging.getLogger(library).setLevel(logging.CRITICAL)
    local = dict(local_files_only=True) if os.path.isdir(name) else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **local)
        model, found = T5EncoderModel.from_pretrained(name, dtype=torch.bfloat16, output_loading_info=True, **local)
    except Exception as error:                                            # the package fails in many ways
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--text-encoder {name}: neither a folder with a T5 nor a name under which one can be "
                        f"downloaded: give a local folder ({type(error).__name__}: {reason})") from None
    if found["missing_keys"]:                                             # the package would fill them with noise
        raise UserError(f"--text-encoder {name}: it lacks weights ({', '.join(sorted(found['missing_keys'])[:3])})")
    return tokenizer, model


# ------------------------------------------------------------------------------------------ the cache

def cache_folder(data, name):
    """Return where the embeddings of a folder's captions are: inside it, hidden from the search for images."""
    return os.path.join(data, ".text", re.sub(r"[^\w.-]+", "_", name.strip("/")))


def key_of(caption):
    """Return eight bytes of the caption's hash. Among 10^7 captions two share a key with a chance of 10^-5."""
    return np.frombuffer(hashlib.sha256(caption.encode()).digest()[:8], np.uint64)[0]


class Cache:
    """Embeddings by caption, in a folder.

    about.json  channels and length of the encoder
    k.npy       part k: the tokens of its captions in a row (n, c), bf16 as 16-bit integers, read through a memory map
    k.index     a row for each caption of part k: key, first token, last token + 1. It is written after k.npy, and a
                part without it does not count
    """

    def __init__(self, folder, length):
        self.folder, self.length = folder, length
        try:
            with open(os.path.join(folder, "about.json")) as file:
                about = json.load(file)
            self.channels, cached_length = about["channels"], about["length"]
            names = sorted(name[:-6] for name in os.listdir(folder) if name.endswith(".index"))
            self.paths = [os.path.join(folder, name + ".npy") for name in names]
            indices = [np.load(path[:-4] + ".index") for path in self.paths] or [np.zeros((0, 3), np.uint64)]
        except Exception as error:                                        # damaged files fail in many ways
            blame_machine(folder, error)
            raise UserError(f"{folder}: damaged ({error}); remove it and run python -m plumbing.t5 again") from None
        part = np.repeat(np.arange(len(indices), dtype=np.uint64), [len(index) for index in indices])
        self.index = np.column_stack([np.concatenate(indices), part])     # key, first token, last + 1, part
        self.index = self.index[self.index[:, 0].argsort()]
        if cached_length != length:
            raise UserError(f"--text-length {length}: {folder} was made with {cached_length}")

    def cuts(self, caption):
        return False                                                      # unknown here; write_cache said it

    def place(self, caption):
        """Return (first token, last + 1, part) of a caption, or None."""
        key = key_of(caption)
        row = np.searchsorted(self.index[:, 0], key)
        return self.index[row, 1:] if row < len(self.index) and self.index[row, 0] == key else None

    def find(self, caption):
        """Return the embedding (n, c) uint16 of a caption. Raises UserError if it is not in the cache."""
        place = self.place(caption)
        if place is None:
            raise UserError(f"no embedding of {caption[:60]!r} in {self.folder}: run python -m plumbing.t5 again")
        first, last, part = map(int, place)
        try:
            found = np.array(np.load(self.paths[part], mmap_mode="r")[first:last])
            if found.shape != (last - first, self.channels) or found.dtype != np.uint16 or len(found) > self.length:
                raise ValueError(f"{found.dtype} {found.shape}")
        except Exception as error:                                        # damaged files fail in many ways
            blame_machine(self.paths[part], error)
            raise UserError(f"{self.paths[part]}: damaged ({error}); remove {self.folder} and run python -m "
                            "plumbing.t5 again") from None
        return found

    def __call__(self, captions):
        text, mask = torch.zeros(len(captions), self.length, self.channels, dtype=torch.bfloat16), []
        for i, caption in enumerate(captions):
            found = self.find(caption) if caption else np.zeros((0, self.channels), np.uint16)
            text[i, :len(found)] = torch.from_numpy(found).view(torch.bfloat16)
            mask.append(torch.arange(self.length) < len(found))
        return text, torch.stack(mask)


def write_cache(data, name, length, device, part=4096):
    """Write the embeddings of all captions of a folder of images into `cache_folder`, `part` captions a file. After an
    interruption it goes on where it stopped. Return that folder and how many embeddings are new."""
    source, folder = open_source(data, (64, 64)), cache_folder(data, name)
    captions = sorted({caption for i in range(len(source)) for caption in source.captions(i)} - {""})
    if not captions:
        raise UserError("; ".join([f"--data {data}: no image has a caption (captions.jsonl, or a .txt beside each)",
                                   *faults(source)]))
    try:
        os.makedirs(folder, exist_ok=True)                                # fail here rather than after loading the T5
        encoder = FrozenT5(name, length, device)
        for fault in faults(source, encoder):
            print(f"{data}: {fault}", flush=True)
        if not os.path.exists(os.path.join(folder, "about.json")):
            write_json(os.path.join(folder, "about.json"),
                       dict(encoder=name, channels=encoder.channels, length=length))
        cache = Cache(folder, length)                                     # another length fails here
        if cache.channels != encoder.channels:
            raise UserError(f"{folder}: made with another encoder of this name; remove it and start again")
        new = [caption for caption in captions if cache.place(caption) is None]
        for first in range(0, len(new), part):
            number = len(cache.paths) + first // part
            write_part(os.path.join(folder, f"{number:06d}"), new[first:first + part], encoder)
            print(f"{min(first + part, len(new)):,} of {len(new):,} captions", flush=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}; what was written before is kept") from None
    return folder, len(new)


def write_part(path, captions, encoder, batch=64):
    """Write one part of the cache: the embeddings, then their index."""
    index, rows, end = [], [], 0
    for i in range(0, len(captions), batch):
        text, mask = encoder(captions[i:i + batch])
        for caption, tokens, count in zip(captions[i:i + batch], text.cpu(), mask.sum(1).tolist()):
            index.append((key_of(caption), end, end + count))
            rows.append(tokens[:count].contiguous().view(torch.uint16).numpy())
            end += count
    with whole_file(path + ".npy") as file:
        np.save(file, np.concatenate(rows))
    with whole_file(path + ".index") as file:
        np.save(file, np.array(index, np.uint64))


def main():
    parser = Parser(prog="plumbing.t5", description="Cache the embeddings of all captions of a folder.")
    parser.add_argument("--data", required=True, help="folder of images with captions")
    parser.add_argument("--text-encoder", help="name or folder of a T5", default="google/t5-v1_1-xxl")
    parser.add_argument("--text-length", type=int, default=128, help="tokens at most (default 128)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    args = parser.parse_args()
    if not os.path.isdir(args.data):
        raise UserError(f"--data {args.data}: want a folder of images with captions")
    if args.text_encoder == "bytes":
        raise UserError("--text-encoder bytes: is trained with the model, so there is nothing to cache; want a T5")
    check_range("text_length", args.text_length)
    folder, count = write_cache(args.data, args.text_encoder, args.text_length, choose_device(args.device)[0])
    print(f"wrote {count:,} new embeddings to {folder}; train.py --data {args.data} --text-encoder {args.text_encoder} "
          "reads them there")


if __name__ == "__main__":
    main_program(main)
