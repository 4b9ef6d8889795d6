"""Programs, devices, processes and checkpoints. Nothing here is from a paper.

training.py has the rest of a run while it trains; shard.py has the checkpoints of a sharded run.
"""
import contextlib
import dataclasses
import datetime
import errno
import glob
import math
import os
import pickletools
import re
import reprlib
import shlex
import subprocess
import sys
import time
import traceback
import warnings
import zipfile

import torch
import torch.distributed as dist

from config import Config, build_model, make_optimizer
from plumbing import Damaged, UserError
from plumbing.files import blame_machine, check_regular, keep, prepare_output, reason_of, silence, whole_file
from plumbing.settings import override

CHECKPOINT, PREVIOUS, SHARDED = "checkpoint.pt", "previous.pt", "sharded"
WEIGHTS = "weights.pt"                                                    # of a folder pretrained/NAME (weights.py)
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")    # versions 2 and 1


# ------------------------------------------------------------------------------------------ programs

rescues = []                                                              # functions of the error that ends a program


def main_program(main):
    """Run a program's main(). A user's mistake is one line on stderr and exit status 2, never a traceback.

    First the run that takes steps saves the last one: see Run.rescue. What it notes at the error ends the line.
    """
    program = os.path.basename(sys.argv[0])
    if program == "__main__.py":                                          # python -m package
        program = os.path.basename(os.path.dirname(sys.argv[0]))
    prepare_output()

    def leave(message, status):
        try:
            sys.stdout.flush()
        except OSError:                                                   # Python would try it once more as it ends
            silence(sys.stdout)
        tell("; ".join([f"{program}: {message}", *getattr(sys.exception(), "__notes__", ())]), sys.stderr)
        sys.exit(status)

    try:
        try:
            status = main()
        except Exception as error:
            if short_of_memory(error):
                traceback.clear_frames(error.__traceback__)               # let go of the images and activations
            for rescue in rescues:
                rescue(error)
            raise
        finally:
            rescues.clear()
        if dist.is_initialized():                                         # DDP is gone by now; the group goes last, on
            dist.barrier()                                                # all ranks together, or one of them hangs
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        leave(" ".join(str(error).split()), 2)
    except (RuntimeError, MemoryError) as error:
        if short_of_memory(error):
            leave(out_of_memory(error), 2)
        if re.search(r"No working C\+\+ compiler|Failed to find C compiler", str(error)):
            leave("torch.compile finds no C++ compiler here: go without (train.py: --compile off)", 2)
        # Another process of the run died. torchrun names it and says why; one line is enough here.
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        leave(f"process {dist.get_rank()}: stopped, as another process of this run is gone "
              f"({' '.join(str(error).split())[:160]})", 1)
    except KeyboardInterrupt:
        leave("interrupted", 130)
    except BrokenPipeError:                                               # `... | head` closed the pipe: no mistake
        silence(sys.stdout)
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
                               errno.EISDIR, errno.ENOTDIR, errno.ENOENT, errno.ESTALE, errno.EIO):
            raise
        leave(f"{error.filename or 'writing'}: {error.strerror}", 2)


def tell(text, stream, end="\n"):
    """Print a line. Return False if nobody reads it: the pipe's reader is gone, or the terminal.

    What cannot be written for another reason, as on a full disk, is said on stderr, and the program goes on.
    """
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        silence(stream)
        if error.errno in (errno.EPIPE, errno.EIO):
            return False
        tell(f"stdout: {error.strerror}; nothing more is printed there", sys.stderr)
    return True


def short_of_memory(error):
    """Return True if memory is what an error lacks. A CPU and CUDA's own calls say it in a RuntimeError."""
    said = isinstance(error, RuntimeError) and re.search("(out of|not enough|(can't|Cannot) allocate) memory",
                                                         str(error))
    return bool(said) or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def out_of_memory(error):
    """One line that says how to use less memory."""
    wanted = re.search(r"[\d.]+ [KMGT]iB|\d+ bytes", str(error))
    more = f", {wanted[0]} more were needed" if wanted else ""
    return (f"out of memory{more}: take fewer images at once (train.py: --accumulate, --recompute, --batch; its "
            "--dry-run says what a run needs)")


def memory_of(device):
    """The bytes of memory of a device: those of the GPU, or of the machine, or what its container may have of them;
    infinite where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return math.inf
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError), open(path) as file:                      # "max" is no number
            limits.append(int(file.read()))
    return min(limits)


def check_memory(need, what, device=torch.device("cpu")):
    """Raise UserError if `what`, in words, needs more bytes than the device has: found before they are asked for."""
    if need > memory_of(device):
        raise UserError(f"{what}: {need / 2 ** 30:,.0f} GiB of memory or more, and this machine has "
                        f"{memory_of(device) / 2 ** 30:,.0f} GiB ({device.type})")


def check_model(config, bytes_a_weight, device=torch.device("cpu")):
    """Check that a network of this Config fits into the memory, before it is built. 20 bytes a weight: as it trains."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(config).parameters())
    check_memory(bytes_a_weight * parameters, f"a model of {parameters:,} parameters", device)


def image_bytes(config):
    """The bytes that one example takes at least: its image and its noise in float32, on all levels, and its tokens."""
    pixels = sum(height * width for height, width in config.sizes)
    token = 8 if config.text_encoder == "bytes" else 2 * config.text_channels                   # a T5's are bf16
    return 4 * 2 * 3 * pixels + (token * config.text_length if config.text_encoder else 0)


def commit():
    """The git commit of these files, with -dirty if they were changed since; "" without git."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    try:
        git = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip()


def made_by():
    """The head of a file of results: the command as typed in the project's folder, the commit, torch's version."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    program = os.path.relpath(sys.argv[0], root)
    return dict(command=shlex.join(["python", program, *sys.argv[1:]]), commit=commit(), torch=torch.__version__)


def progress(what, done, total):
    """Show a line that redraws itself in a terminal; nothing in a log file."""
    if sys.stdout.isatty():
        end = "\r" if done < total else "\r".ljust(79) + "\r"
        print(f"\r{what} {done}/{total} ".ljust(78), end=end, flush=True)


# ------------------------------------------------------------------------------------------ device and processes

def choose_device(name="auto"):
    """Return (device, why). auto: cuda, then mps, then cpu. Raises UserError for a device that is not there."""
    if name == "auto":
        for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if there:
                return torch.device(kind), f"{kind} is available"
        return torch.device("cpu"), "no cuda, no mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: want auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps") or device.type != "cuda" and device.index is not None:
        raise UserError(f"--device {name}: want auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: mps is not available here")
    return device, "as asked"


def choose_precision(precision, device):
    """Return "float32" or "bf16". auto: bf16 on CUDA devices that have it; on a CPU the one that multiplies faster."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "mps":
        return "float32"

    def seconds(dtype):
        a = torch.randn(512, 512).to(dtype)
        times = []
        for _ in range(8):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)
    return "bf16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"


def autocast(precision, device):
    """Run matrix products and convolutions in bf16; weights, gradients and the loss stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cores():
    """The number of CPU cores that this process may use; the machine may have more."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes():
    """Return the number of processes that torchrun has started, 1 without it. Raises UserError if its variables are
    not complete: a script or a job may have left WORLD_SIZE behind. An empty one counts as none."""
    world = os.environ.get("WORLD_SIZE") or "1"
    if world.isdecimal() and int(world) == 1:
        return 1
    numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "MASTER_PORT")]
    complete = all(map(str.isdecimal, [world, *numbers])) and os.environ.get("MASTER_ADDR")
    if not complete or int(numbers[0]) >= int(world):
        raise UserError(f"WORLD_SIZE={world} in the environment is not from torchrun: unset WORLD_SIZE, or start "
                        "several processes with torchrun --nproc_per_node N train.py")
    return int(world)


def start_processes(device_name):
    """Return (rank, world, device, why). Under torchrun join the process group: gloo, and nccl for CUDA tensors."""
    world = processes()
    device, why = choose_device(device_name)
    if world == 1:
        if device.index is not None:                                      # --device cuda:1 leaves the first one alone
            torch.cuda.set_device(device)
        return 0, 1, device, why
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU of its own: {torch.cuda.device_count()} here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type == "mps":
        raise UserError("torchrun needs cuda or cpu; mps runs one process")
    # Rank 0 draws the samples while the others wait: at the papers' size longer than the usual ten minutes.
    hours = datetime.timedelta(hours=3)
    store, rank, world = next(dist.rendezvous("env://", timeout=hours))
    # After a restart torchrun's store still holds the addresses of dead processes. Each restart gets its own keys.
    store = dist.PrefixStore("life " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world, timeout=hours)
    return rank, world, device, why


def any_rank(flag, world):
    """Return True on every rank if `flag` is True on one of them. The hosts talk by gloo: no device waits."""
    if world == 1:
        return bool(flag)
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def broadcast(value, world):
    """Return rank 0's value on every rank."""
    values = [value]
    if world > 1:
        dist.broadcast_object_list(values)
    return values[0]


# ------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(folder, model, ema, optimizer, step, images, config, examples, name=CHECKPOINT):
    """Write checkpoint.pt, whole or not at all; the one before it stays as previous.pt.

    examples: the number of training examples; with another number a resumed run would see another order. Raises
    UserError if the file cannot be written, as on a full disk.
    """
    path = kept = os.path.join(folder, name)
    if name == CHECKPOINT and config.keep_every and step % config.keep_every == 0:
        kept = os.path.join(folder, f"checkpoint_{step:07d}.pt")          # first: a kill between the two loses neither
    state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                 images=images, config=dataclasses.asdict(config), examples=examples)
    try:
        with whole_file(kept) as file:
            torch.save(state, file)
            if name == CHECKPOINT and os.path.exists(path):
                keep(path, os.path.join(folder, PREVIOUS))
        if kept != path:
            keep(kept, path)
    except (OSError, RuntimeError) as error:                              # PyTorch's writer raises either
        raise UserError(f"{path}: step {step} could not be saved: {reason_of(error)}") from None


def sharded_steps(folder):
    """The steps of a run's sharded checkpoints, in order."""
    path = os.path.join(folder, SHARDED)
    check_reachable(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise UserError(f"{path}: not a folder")
    names = os.listdir(path) if os.path.isdir(path) else []
    return sorted(int(name) for name in names if re.fullmatch("[0-9]+", name) and name == f"{int(name):07d}")


def kept_checkpoints(folder):
    """The names of the checkpoints that --keep-every left in a run's folder, oldest first."""
    return sorted(map(os.path.basename, glob.glob(os.path.join(glob.escape(folder), "checkpoint_*.pt"))))


def plain_checkpoints(folder):
    """The names of a run's checkpoints that are not sharded, newest first."""
    names = [CHECKPOINT, PREVIOUS, *reversed(kept_checkpoints(folder))]
    for name in names:
        check_reachable(os.path.join(folder, name))
        check_regular(os.path.join(folder, name))                         # the run could not be saved under this name
    return [name for name in names if os.path.isfile(os.path.join(folder, name))]


def has_checkpoint(folder):
    """Return True if the folder holds a checkpoint, plain or sharded."""
    return bool(plain_checkpoints(folder) or sharded_steps(folder))


def run_of(path):
    """Return the folder of a run that a user names: by itself, or by the file in it that the programs read."""
    if os.path.basename(path) in (CHECKPOINT, WEIGHTS) and os.path.isfile(path):
        return os.path.dirname(path) or "."
    return path


def is_pretrained(folder):
    """Return True if the folder holds pretrained weights in place of a run."""
    return os.path.isfile(os.path.join(folder, WEIGHTS)) and not has_checkpoint(folder)


def results_folder(run):
    """Return the folder for what a program finds out about a run: its own. Pretrained weights stay as they came, so
    theirs is runs/NAME-pretrained."""
    if not is_pretrained(run):
        return run
    return os.path.join("runs", os.path.basename(os.path.abspath(run)) + "-pretrained")


def check_reachable(path):
    """Raise UserError if the machine does not let us look whether this file is there: it is not missing then."""
    try:
        os.stat(path)
    except OSError as error:
        blame_machine(path, error)


def read_checkpoint(folder, name=CHECKPOINT, old=False):
    """Return the dict that save_checkpoint wrote, with `config` as a Config and `path`, the file.

    Of pretrained weights there are only the EMA weights: `model` is the same, and there is no `optimizer`.

    old: read it although a sharded checkpoint is newer. Raises UserError.
    """
    wanted = ["model", "ema", "optimizer", "step", "images", "config", "examples"]
    if name == CHECKPOINT and is_pretrained(folder):
        name, wanted = WEIGHTS, ["ema", "step", "images", "config"]
    path = os.path.join(folder, name)
    check_reachable(path)
    if not os.path.exists(folder):
        raise UserError(f"{folder}: no such run")
    if not os.path.isfile(path):
        sharded = f"; but a sharded one: python -m plumbing.shard {folder}" if sharded_steps(folder) else ""
        if name == CHECKPOINT and (others := plain_checkpoints(folder)):
            raise UserError(f"{folder}: it has no {name}, but {others[0]}: renamed to {name} it takes its place")
        if name == CHECKPOINT and not sharded and os.path.exists(os.path.join(folder, "log.csv")):
            raise UserError(f"{folder}: this run has no checkpoint yet; if it was killed, its first command begins it "
                            f"anew with --out {folder} --auto-resume")
        raise UserError(f"{folder}: not a run (it has no {name}{sharded})")
    before = os.path.join(folder, PREVIOUS)
    hint = ""
    if name == CHECKPOINT and os.path.exists(before):
        hint = f"; {before} is the one before: renamed to {name} it takes its place"
    try:
        state = load_file(path)
        check_state(state, wanted, path)
        if fault := fault_of_values(state, state["step"]):
            raise UserError(f"{path}: {fault}{hint}")
        if name == WEIGHTS:                                               # 16 bit in the file, 32 here
            state["ema"] = {key: w.float() if w.dtype == torch.float16 else w for key, w in state["ema"].items()}
            state["model"] = state["ema"]
    except UserError as error:                                            # of a restarted run the one before may do
        raise Damaged(str(error)) from None
    except Exception as error:                                            # a damaged file fails in many ways
        blame_machine(path, error)
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise Damaged(f"{path}: damaged, or not a checkpoint ({reason}){hint}") from None
    newest = (sharded_steps(folder) or [0])[-1]
    if name == CHECKPOINT and not old and newest > state["step"]:
        raise UserError(f"{path} is of step {state['step']}, the sharded checkpoint beside it of {newest}: python -m "
                        f"plumbing.shard {folder} brings it up to date")
    return dict(state, path=path)


def load_file(path):
    """Return what torch.save wrote. A file from a stranger runs no code, and takes no more memory than it is long.

    The checksums in it are checked, or a flipped bit would be a weight like any other. A damaged file fails in many
    ways: this raises any exception.
    """
    with zipfile.ZipFile(path) as file:
        packed = [entry.filename for entry in file.infolist() if entry.compress_type != zipfile.ZIP_STORED]
        if packed or sum(entry.file_size for entry in file.infolist()) > os.path.getsize(path):
            raise ValueError("its parts are larger than the file")
        if wrong := file.testzip():
            raise ValueError(wrong)
        for entry in file.infolist():
            if entry.filename.endswith("data.pkl"):
                check_references(file.read(entry))
    mapped = path.encode(errors="replace") == os.fsencode(path)           # PyTorch maps no name that is not UTF-8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                   # of odd tensors; we refuse them
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)      # mapped: read where it is used


def check_references(content):
    """Raise ValueError if a pickle repeats what is neither a string nor a name 20 times; our own files hardly do it.

    Forty pairs, each of them twice in the next, are 200 bytes, and to hash or print them takes 2^40 steps.
    """
    plain, repeats, before = set(), 0, ""
    for opcode, place, _ in pickletools.genops(content):
        if "PUT" in opcode.name:
            (plain.add if before in ("BINUNICODE", "GLOBAL") else plain.discard)(place)
        repeats += "GET" in opcode.name and place not in plain
        before = opcode.name
    if repeats > 20:
        raise ValueError("its objects repeat each other")


def check_state(state, wanted, path):
    """Check what a checkpoint holds, in type and range. Make its `config` a Config. Raises UserError.

    wanted: the parts that it must have. Its tensors may share memory, but not pretend to be more than the file is.
    """
    if lacks := [part for part in wanted if not isinstance(state, dict) or part not in state]:
        raise UserError(f"{path}: a checkpoint of another program (it lacks {', '.join(lacks)})")
    state["config"] = config_of(state["config"], path)
    check_counts(state, path)
    size = 0
    for name, value in tensors_of(state):
        if (not torch.is_tensor(value) or value.layout != torch.strided or value.device.type != "cpu"
                or value.is_neg()):                                       # a view that Adam's kernel does not take
            raise UserError(f"{path}: a checkpoint of another model ({name} is no plain tensor: {reprlib.repr(value)})")
        size += value.numel() * value.element_size()
    if size > 4 * os.path.getsize(path):                                  # a student is its own EMA: once in the file
        raise UserError(f"{path}: damaged, or not a checkpoint (its tensors are larger than the file)")


def check_counts(state, path):
    """Check the numbers of steps, images and examples of a checkpoint, also against its settings. Raises UserError."""
    for name in ("step", "images", "examples"):
        value = state.get(name, 0)                                        # pretrained weights have no examples
        if not (type(value) is int and 0 <= value < 2 ** 60):
            raise UserError(f"{path}: its {name} is {reprlib.repr(value)}; want a whole number, 0 or more")
    step, images, config = state["step"], state["images"], state["config"]
    if step > config.steps or images != step * config.batch:
        raise UserError(f"{path}: its numbers contradict each other: step {step:,} of {config.steps:,}, batches of "
                        f"{config.batch:,}, {images:,} images seen")


def tensors_of(state):
    """Yield (name, value) of what should be the tensors of a run: weights, EMA weights and optimizer state."""
    for part in ("model", "ema", "optimizer"):
        entries = state.get(part, {})
        if part == "optimizer" and entries:
            entries = {f"{number}.{key}": value for number, values in dict(entries["state"]).items()
                       for key, value in dict(values).items()}
        for key, value in dict(entries).items():
            yield f"{part}.{key}", value


def not_finite(state):
    """Return the name of the first tensor of a run's state that holds a value that is not finite, or None.

    Of a sharded tensor each rank looks at its own shard.
    """
    for name, value in tensors_of(state):
        if not torch.isfinite(value.to_local() if hasattr(value, "to_local") else value).all():
            return name
    return None


def fault_of_values(state, step):
    """Say which tensor of a run's state holds values that no training of `step` steps leaves, or return None."""
    if name := not_finite(state):                                         # such a model draws black pictures
        return f"{name} holds values that are not finite"
    for name, value in tensors_of({"optimizer": state.get("optimizer", {})}):
        value = value.to_local() if hasattr(value, "to_local") else value
        if name.endswith(".exp_avg_sq") and (value < 0).any():
            return f"{name} holds values below 0"
        if name.endswith(".step") and not value.ndim and value != min(step, 2 ** 24):           # float32 counts to 2^24
            return f"{name} is {value.item()} in a checkpoint of step {step:,}"
    return None


def config_of(fields, path="a checkpoint"):
    """Return the Config of a checkpoint's dict. Settings that are newer than the checkpoint keep their defaults.

    Raises UserError for what no command line could have set.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    if strange := [key for key in fields if key not in known]:
        raise UserError(f"{path}: a checkpoint of another program (it has a setting {reprlib.repr(strange[0])})")
    try:
        config = override(Config(), **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except UserError as error:
        raise UserError(f"{path}: a setting of it is wrong: {error}") from None
    if config.class_names and not config.text_encoder and len(config.class_names) != config.num_classes:
        raise UserError(f"{path}: it has {len(config.class_names)} names for {config.num_classes} classes")
    return config


def load_weights(module, state, path):
    """Load the state of a model or an optimizer. Raises Damaged if it does not fit."""
    try:
        if isinstance(module, torch.optim.Optimizer):
            state = dict(state, param_groups=own_groups(module, state["param_groups"]))
        check_tensors(module, state)
        module.load_state_dict(state)
        if isinstance(module, torch.optim.Optimizer):
            match_weights(module)
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise Damaged(f"{path}: a checkpoint of another model ({detail})") from None


def load_optimizer(optimizer, checkpoint, path):
    """Load the optimizer state of a checkpoint. Only before the first step there is none. Raises Damaged."""
    state = checkpoint["optimizer"]
    if checkpoint["step"] and isinstance(state, dict) and state.get("state") == {}:
        raise Damaged(f"{path}: a checkpoint of step {checkpoint['step']} with no optimizer state")
    load_weights(optimizer, state, path)


def check_whole(checkpoint):
    """Check that a checkpoint has all that a run of its settings goes on with. Raises Damaged."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                   # that nothing is copied into shapes
        model = build_model(checkpoint["config"])
        for part in ("model", "ema"):
            load_weights(model, checkpoint[part], checkpoint["path"])
        load_optimizer(make_optimizer(model, checkpoint["config"]), checkpoint, checkpoint["path"])


def own_groups(optimizer, saved):
    """Return the optimizer's groups in the form that its state_dict has. Raises ValueError if those of a checkpoint,
    `saved`, are others: the settings say what they are. Only the learning rate changes as it trains."""
    own = optimizer.state_dict()["param_groups"]
    if len(saved) != len(own):
        raise ValueError(f"{len(saved)} groups of the optimizer for {len(own)}")
    for ours, theirs in zip(own, saved):
        for key in (ours.keys() & theirs.keys()) - {"lr", "fused", "foreach"}:
            if theirs[key] != ours[key]:
                raise ValueError(f"the optimizer's {key} is {reprlib.repr(theirs[key])}, not {reprlib.repr(ours[key])}")
    return own


def check_tensors(module, state):
    """Raise ValueError unless the tensors of `state` have the shape and the type of the model's or optimizer's own.

    PyTorch converts another type without a word. To an optimizer it loads any shape, and the fused kernel runs past the
    memory of one that is too small.
    """
    if not isinstance(module, torch.optim.Optimizer):
        return check_alike(module.state_dict(), state)
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = dict(zip(numbers, [weight for group in module.param_groups for weight in group["params"]]))
    if state["state"] and state["state"].keys() != weights.keys():        # none: saved before the first step
        raise ValueError(f"the optimizer has state for {len(state['state'])} of {len(weights)} weights")
    for number, values in state["state"].items():
        own = {"exp_avg": weights[number], "exp_avg_sq": weights[number], "step": torch.zeros(())}
        check_alike(own, values)
        if values.keys() != own.keys():
            raise ValueError(f"the optimizer has {', '.join(map(str, values)) or 'nothing'} for a weight, not "
                             f"{', '.join(own)}")


def check_alike(own, given):
    """Compare the tensors of two dicts in shape and type. Raises ValueError. What only one of them has is not our
    matter: load_state_dict names it."""
    describe = lambda x: f"{x.dtype} {tuple(x.shape)}" if torch.is_tensor(x) and x.layout == torch.strided else type(x)
    for key in own.keys() & given.keys():
        if describe(given[key]) != describe(own[key]):
            raise ValueError(f"{key} is {describe(given[key])}, not {describe(own[key])}")


def match_weights(optimizer):
    """Bring the optimizer state into its weights' memory order, which the fused kernel takes for granted."""
    for weight, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            if state[key].stride() != weight.stride():
                state[key] = torch.empty_like(weight).copy_(state[key])


def load_run(path, device="cpu"):
    """Return (model, config) of a run folder: the EMA weights, in evaluation mode. Raises UserError."""
    state = read_checkpoint(path)
    return ema_model(state, path, device), state["config"]


def ema_model(state, path, device="cpu"):
    """Return the model of a checkpoint with the EMA weights, in evaluation mode. Raises UserError.

    Its config may be a stranger's: the weights must fit a model of shapes alone before there is one with numbers.
    """
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                   # that nothing is copied into shapes
        load_weights(build_model(state["config"]), state["ema"], path)
    with torch.device(device):
        model = build_model(state["config"])
    load_weights(model, state["ema"], path)
    return model.eval().requires_grad_(False)
