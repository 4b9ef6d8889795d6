"""Sharding: each rank keeps 1/N of the weights, gradients, optimizer state and EMA weights.

Paper: simple diffusion, section 3.3: at a low resolution it is the kernels that are large, and "sharding the weights
allows us to scale to much larger models without requiring more complicated parallelization approaches like model
parallelism". PyTorch does this by fully_shard: a rank gathers a block's weights when the block runs, and drops them
after it.

    torchrun --nproc_per_node 8 train.py --preset imagenet512_uvit --shard --data imagenet/train --out runs/big
    torchrun --nproc_per_node 4 train.py --resume runs/big      another number of processes: each reads what it needs
    python -m plumbing.shard runs/big                           the shards -> runs/big/checkpoint.pt, for sample.py

A checkpoint is a folder RUN/sharded/STEP of torch.distributed.checkpoint: tensors by name, one file per rank. run.json
in it holds the rest (step, images, config) and a checksum of each file. The folder is written under another name and
renamed when all ranks are done. The last two are kept.

# Paper: says no more than the words above, nothing of optimizer state and EMA weights. Here all of them are split.
"""
import contextlib
import dataclasses
import functools
import glob
import io
import json
import logging
import os
import pickle
import reprlib
import shutil
import warnings
import zlib

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from plumbing.settings import Parser
from config import build_model, make_optimizer
from plumbing import Damaged, UserError
from plumbing.runs import (CHECKPOINT, SHARDED, any_rank, broadcast, check_counts, check_model, config_of,
                           fault_of_values, main_program, read_checkpoint, run_of, save_checkpoint, sharded_steps,
                           tensors_of)
from plumbing.files import blame_machine, check_regular, flush_folder, reason_of, whole_file
from unet import FeedForward, MapAttention, ResBlock
from uvit import AttentionBlock, TransformerBlock

# The units that are gathered, compiled, and computed again as one.
BLOCKS = (TransformerBlock, AttentionBlock, ResBlock, MapAttention, FeedForward)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, BLOCKS)]


# ------------------------------------------------------------------------------------------ splitting

def split(model, ema, optimizer, config, device):
    """Hand the model, EMA weights and optimizer of rank 0 out in shards: 1/N to each rank.

    On the other ranks the three have shapes only. Blocks are split one by one, then what is left. With bf16 on CUDA the
    weights of blocks travel in bf16, which halves the traffic; gradients are summed in float32, and embedding, first
    and last layer stay in float32. (A CPU's layer norm needs its weights in float32.) config.compile "on": each block
    is compiled, and the gathering of its weights stays outside.
    """
    first = dist.get_rank() == 0
    resumed = broadcast(bool(optimizer.state), dist.get_world_size())
    from_rank_0 = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    # fully_shard warns of the wavelet layer, which returns a view; nobody changes that view in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    new_model, new_ema = (split_one(whole, config, device, from_rank_0) for whole in (model, ema))
    state = get_optimizer_state_dict(model, optimizer) if resumed and first else {}
    optimizer = make_optimizer(new_model, config)
    if resumed:
        set_optimizer_state_dict(new_model, optimizer, state, options=from_rank_0)
    return new_model, new_ema.eval().requires_grad_(False), optimizer


def split_one(whole, config, device, from_rank_0):
    """Return rank 0's model `whole` in shards."""
    options = dict(mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    block_options = dict(options)
    if config.precision == "bf16" and device.type == "cuda":
        block_options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32,
                                                          cast_forward_inputs=False)
    with torch.device("meta"):
        sharded = build_model(config)
    for block in blocks_of(sharded):
        if config.compile == "on":
            block.compile()
        fully_shard(block, **block_options)
    fully_shard(sharded, **options)
    sharded.to_empty(device=device)
    set_model_state_dict(sharded, whole.state_dict() if dist.get_rank() == 0 else {}, options=from_rank_0)
    return sharded


def checkpoint_activations(model):
    """Activation checkpointing (--recompute): blocks keep only their inputs, and the backward pass computes the rest
    again. Saves memory; costs a third more time."""
    for block in blocks_of(model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    torch._dynamo.config.optimize_ddp = False                             # it cannot cut the graph within such blocks


# ------------------------------------------------------------------------------------------ checkpoints

def tensors(model, ema, optimizer, step):
    """Return every tensor of a run by name, not copies: to read into them is to read into the run.

    Before the first step the optimizer has no state. PyTorch would make one, by a step of its own that counts.
    """
    state = get_optimizer_state_dict(model, optimizer)["state"] if step else {}
    return {"model": get_model_state_dict(model), "ema": ema.state_dict(), "optimizer": state}


def shapes(config, step):
    """Return what `tensors` returns for a run of these settings, but shapes without numbers."""
    with torch.device("meta"):
        model = build_model(config)
    state = {name: dict(exp_avg=w, exp_avg_sq=w, step=torch.zeros(())) for name, w in model.named_parameters()}
    return {"model": model.state_dict(), "ema": model.state_dict(), "optimizer": state if step else {}}


def save(folder, model, ema, optimizer, step, images, config, examples, name=None):
    """Write RUN/sharded/STEP, whole or not at all, on all ranks together; the last two are kept. Raises UserError."""
    path = os.path.join(folder, SHARDED, name or f"{step:07d}")
    new, first = path + ".new", rank() == 0
    try:
        if first:
            for left in glob.glob(os.path.join(glob.escape(folder), SHARDED, "*.new")):         # by a killed run
                shutil.rmtree(left, ignore_errors=True)
            os.makedirs(new)
            flush_folder(folder)
        wait_for_all()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # "no process group": one process needs none
            dcp.save(tensors(model, ema, optimizer, step), checkpoint_id=new)                   # flushes each file
        if first:
            files = {file: checksum(os.path.join(new, file)) for file in sorted(os.listdir(new))}
            with whole_file(os.path.join(new, "run.json"), "w") as file:
                json.dump(dict(step=step, images=images, config=dataclasses.asdict(config), examples=examples,
                               files=files), file, indent=1)
            shutil.rmtree(path, ignore_errors=True)                       # the same step again holds the same state
            os.rename(new, path)
            flush_folder(os.path.join(folder, SHARDED))
            for old in sharded_steps(folder)[:-2]:
                shutil.rmtree(os.path.join(folder, SHARDED, f"{old:07d}"))
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if first:
            shutil.rmtree(new, ignore_errors=True)
        raise UserError(f"{path}: step {step} could not be saved: {reason_of(first_failure(error))}") from None
    wait_for_all()


def first_failure(error):
    """Return the first rank's own error of a failed save or load, without its stack."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        return next(iter(error.failures.values()))[0]
    return error


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def checksum(path):
    """CRC-32 of a file."""
    check_regular(path)
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def newest(folder):
    """Return dict(path, files, step, images, config, examples) of a run's last sharded checkpoint. Raises UserError."""
    if not sharded_steps(folder):
        raise UserError(f"{folder}: has no sharded checkpoint")
    return describe(folder, sharded_steps(folder)[-1])


def describe(folder, step):
    """Return what `newest` returns, of the sharded checkpoint of this step. Raises UserError."""
    path = os.path.join(folder, SHARDED, f"{step:07d}")
    try:
        check_regular(about := os.path.join(path, "run.json"))
        with open(about) as file:
            state = json.load(file)
        state = dict(path=path, config=config_of(state["config"], path), step=state["step"], images=state["images"],
                     examples=state["examples"], files=dict(state["files"]))
        check_counts(state, path)
        return state
    except UserError as error:
        raise Damaged(str(error)) from None
    except (KeyError, TypeError, ValueError, AttributeError, OSError, MemoryError, RecursionError) as error:
        blame_machine(path, error)
        raise Damaged(f"{path}: damaged, or not a checkpoint ({type(error).__name__}: {error})") from None


def check(state):
    """Compare the files with their checksums, and the list of tensors with the run's settings. Raises UserError. If the
    ranks have met, each does its part."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    faults = {}                                                           # file: the error of reading it, or None
    for name in sorted(state["files"])[rank()::world]:
        try:
            if checksum(os.path.join(state["path"], os.path.basename(name))) != state["files"][name]:
                faults[name] = None
        except (OSError, MemoryError) as error:
            faults[name] = error
    every = [faults]
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, faults)
    faults = {name: fault for one in every for name, fault in one.items()}
    for name, error in faults.items():
        blame_machine(os.path.join(state["path"], name), error)
    if faults:
        raise Damaged(f"{state['path']}: damaged ({', '.join(faults)}); remove this folder, and the run continues "
                      "from the checkpoint before it")
    with reading(state["path"]):
        check_chunks(Reader(state["path"]).read_metadata(), shapes(state["config"], state["step"]))


def check_values(state):
    """Look at the values of a checkpoint that `check` has passed. Raises Damaged. One tensor at a time, as all may need
    the memory of all ranks."""
    with reading(state["path"]):
        reader = Reader(state["path"])
        metadata = reader.read_metadata()
        reader.read_metadata = lambda: metadata                           # unpickled once, and not for each tensor
        for part, entries in shapes(state["config"], state["step"]).items():
            for name, entry in entries.items():
                into = {part: {name: tree_map(lambda x: torch.empty_like(x, device="cpu"), entry)}}
                dcp.load(into, storage_reader=reader, planner=Planner(), no_dist=True)
                if fault := fault_of_values({**into, "optimizer": {"state": into.get("optimizer", {})}}, state["step"]):
                    raise ValueError(fault)


@contextlib.contextmanager
def reading(path):
    """Say in one line, Damaged, what goes wrong with a checkpoint: it fails in many ways, and PyTorch logs each."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Exception, dcp.api.CheckpointException) as error:
        error = first_failure(error)
        blame_machine(path, error)
        raise Damaged(f"{path}: damaged, or a checkpoint of another model ({reason_of(error)})") from None
    finally:
        logging.disable(logging.NOTSET)


class Metadata(pickle._Unpickler):
    """Read the list of tensors of torch.distributed.checkpoint. It is a pickle, and a pickle may be a program: this one
    may name what such lists are made of, and set the fields of what it made, and nothing else.

    It is the unpickler in Python, whose instructions can be replaced: that in C would set attributes of the classes.
    """
    MADE_OF = {("torch.distributed.checkpoint.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex", "StorageMeta",
        "_MEM_FORMAT_ENCODING")} | {
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size"), ("torch", "device"),
        ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"), ("pathlib", "PosixPath"),
        ("pathlib", "WindowsPath")} | {("torch", name) for name in dir(torch)
                                       if isinstance(getattr(torch, name), torch.dtype)}

    def find_class(self, module, name):
        if (module, name) == ("builtins", "getattr"):                     # so Python 3.11.2 writes a member of an Enum
            return self.memory_format
        if (module, name) not in self.MADE_OF:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        return super().find_class(module, name)

    @staticmethod
    def memory_format(kind, member):
        """Return a member of the one Enum in such lists, where the list asks for getattr."""
        if kind is not dcp.metadata._MEM_FORMAT_ENCODING:
            raise pickle.UnpicklingError(f"names an attribute of {reprlib.repr(kind)}")
        return kind[member]

    def load_build(self):
        """Set the fields of an object: of an instance of a dataclass, and no others than it has."""
        made, state = self.stack[-2:]
        fields = {field.name for field in dataclasses.fields(made)} if dataclasses.is_dataclass(made) else set()
        if isinstance(made, type) or not fields:
            raise pickle.UnpicklingError(f"sets attributes of {reprlib.repr(made)}")
        if not isinstance(made, dcp.metadata.TensorProperties) and not (type(state) is dict and state.keys() <= fields):
            raise pickle.UnpicklingError(f"sets what is no field of a {type(made).__name__}")
        super().load_build()

    dispatch = pickle._Unpickler.dispatch | {pickle.BUILD[0]: load_build}


class Reader(FileSystemReader):
    """Reads that list safely, and opens no file outside of the checkpoint's folder."""

    def read_metadata(self, *args, **kwargs):
        path = os.path.join(self.path, ".metadata")
        with open(path, "rb") as file:
            metadata = Metadata(io.BytesIO(file.read())).load()
        for entry in metadata.storage_data.values():
            name = entry.relative_path
            if os.path.basename(name) != name or name in ("", ".", ".."):
                raise pickle.UnpicklingError(f"names {name}")
            if entry.transform_descriptors:                               # ours are never packed
                raise pickle.UnpicklingError(f"packs its tensors ({reprlib.repr(entry.transform_descriptors)})")
        metadata.storage_meta = metadata.storage_meta or dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Loads tensors only. Anything else in such a checkpoint would be unpickled."""

    def load_bytes(self, read_item, value):
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


def check_chunks(metadata, state):
    """Check that the chunks of each tensor cover it; or a part keeps its random start. Raises ValueError.

    Chunks are rows of the tensor: fully_shard splits the first dimension. state: as `shapes` returns it.
    """
    for name, tensor in tensors_of(dict(state, optimizer={"state": state["optimizer"]})):
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, dcp.metadata.TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor" if stored else f"it lacks {name}")
        size = tuple(tensor.shape)
        if tuple(stored.size) != size or stored.properties.dtype != tensor.dtype:
            raise ValueError(f"{name} is {stored.properties.dtype} {tuple(stored.size)} for {tensor.dtype} {size}")
        rows, end = size[0] if size else 1, 0
        for chunk in sorted(stored.chunks, key=lambda chunk: tuple(chunk.offsets)):
            first, count = ((*chunk.offsets, 0)[0], chunk.sizes[0]) if size else (0, 1)
            if count and (first != end or any(chunk.offsets[1:]) or tuple(chunk.sizes[1:]) != size[1:]):
                raise ValueError(f"the chunks of {name} do not fit together")
            end += count
        if end != rows:
            raise ValueError(f"its chunks hold {end} of {rows} rows of {name}")


def load(state, model, ema, optimizer):
    """Read the checkpoint `state` (from newest) into the three; any number of processes may have written it."""
    check(state)
    into = tensors(model, ema, optimizer, state["step"])
    with reading(state["path"]):
        dcp.load(into, storage_reader=Reader(state["path"]), planner=Planner())
    fault = fault_of_values({**into, "optimizer": {"state": into["optimizer"]}}, state["step"])
    if any_rank(fault is not None, dist.get_world_size() if dist.is_initialized() else 1):
        raise UserError(f"{state['path']}: {fault or 'what another process reads holds values that cannot be'}")


# ------------------------------------------------------------------------------------------ the program

def main():
    """Turn RUN/sharded into RUN/checkpoint.pt, in one process: it needs memory for four copies of the weights."""
    parser = Parser(prog="plumbing.shard", description="Make one checkpoint.pt of a sharded run's last checkpoint.")
    parser.add_argument("run", type=run_of, metavar="RUN")
    run = parser.parse_args().run
    state = newest(run)
    if os.path.exists(os.path.join(run, CHECKPOINT)) and read_checkpoint(run, CHECKPOINT, True)["step"] > state["step"]:
        raise UserError(f"{run}: its {CHECKPOINT} is newer than the shards of step {state['step']}")
    check_model(state["config"], 20)
    model, ema = build_model(state["config"]), build_model(state["config"])
    optimizer = make_optimizer(model, state["config"])
    load(state, model, ema, optimizer)
    save_checkpoint(run, model, ema, optimizer, state["step"], state["images"], state["config"], state["examples"])
    print(f"{os.path.join(run, CHECKPOINT)}: step {state['step']}")


if __name__ == "__main__":
    main_program(main)
