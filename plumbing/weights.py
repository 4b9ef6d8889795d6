"""Keep the EMA weights of a run as pretrained/NAME/weights.pt, small enough for the repository.

    python -m plumbing.weights runs/glyphs64 glyphs64           -> pretrained/glyphs64/weights.pt

Every program that takes RUN takes pretrained/NAME, too. The file holds config, ema, step, images, and the commit that
exported them (not the one that trained). Weights are in 16 bit (float16): rounding by 1 part in 2,000 moves the pixels
of a sample by two steps of 256 at most. Optimizer and training weights stay behind, so --resume refuses; --init-from
starts a new run.
"""
import dataclasses
import io
import os

import torch

from plumbing import UserError
from plumbing.files import whole_file, writable_folder
from plumbing.runs import WEIGHTS, commit, main_program, read_checkpoint, run_of
from plumbing.settings import Parser

LARGEST = 9_000_000                                                       # bytes of a file


def in_16_bits(state):
    """Return the state_dict with its float32 tensors as float16. Those of fewer than 64 values stay as they are.

    Raises UserError if a value is not finite, or too large for float16.
    """
    small = {key: w.half() if w.dtype == torch.float32 and w.numel() >= 64 else w for key, w in state.items()}
    for key, weights in small.items():
        if not torch.isfinite(weights).all():
            raise UserError(f"{key}: holds values that are not finite in 16 bit (float16 ends at 65,504)")
    return small


def packed(state):
    """Return the state_dict with the tensors of each type one behind the other: each storage takes 200 bytes more."""
    state = dict(state)
    for dtype in {w.dtype for w in state.values()}:
        keys = [key for key in state if state[key].dtype == dtype]
        in_a_row = torch.cat([state[key].flatten() for key in keys])
        for key, values in zip(keys, in_a_row.split([state[key].numel() for key in keys])):
            state[key] = values.view(state[key].shape)
    return state


def export(run, folder):
    """Write the EMA weights of a run as `folder`/weights.pt. Return the size in bytes. Raises UserError.

    Forgotten are the precision of the training machine, as each reader's chooses its own, and the folders there.
    """
    state = read_checkpoint(run)
    config = dataclasses.replace(state["config"], precision="auto", grow_from="", init_from="")
    content, path = io.BytesIO(), os.path.join(folder, WEIGHTS)
    torch.save(dict(config=dataclasses.asdict(config), ema=packed(in_16_bits(state["ema"])), step=state["step"],
                    images=state["images"], commit=commit()), content)
    size = len(content.getvalue())
    if size > LARGEST:
        raise UserError(f"{run}: its weights have {size:,} bytes in 16 bit; at most {LARGEST:,} go into a file")
    writable_folder(folder, "NAME")
    try:
        with whole_file(path) as file:
            file.write(content.getvalue())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    return size


def main():
    parser = Parser(prog="plumbing.weights", description="Keep the EMA weights of a run, in 16 bit.")
    parser.add_argument("run", type=run_of, metavar="RUN", help="folder of the run")
    parser.add_argument("name", metavar="NAME", help="the weights go to pretrained/NAME")
    args = parser.parse_args()
    if os.path.basename(args.name) != args.name or args.name in (".", ".."):
        raise UserError(f"NAME {args.name!r}: want a plain name; the weights go to pretrained/NAME")
    folder = os.path.join("pretrained", args.name)
    size = export(args.run, folder)
    print(f"{os.path.join(folder, WEIGHTS)}: {size:,} bytes; draw with: python sample.py {folder}")


if __name__ == "__main__":
    main_program(main)
