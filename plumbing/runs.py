"""The plumbing of a run: device, processes, folder, checkpoints, log, progress. Nothing here is from a paper.

A run is a folder: config.json (resolved), log.csv (a row a logged step), loss.png, samples_*.png, checkpoint.pt and the
one before it, previous.pt. (A sharded run has a folder `sharded` for these two: shard.py.)
Kept apart so that train.py stays a page that can be read beside the paper.
"""
import csv
import dataclasses
import datetime
import errno
import glob
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist

from config import Config, build_model
from plumbing.settings import override
from plumbing import UserError
from plumbing.files import flush_folder, keep, reason_of

CHECKPOINT, PREVIOUS, SHARDED = "checkpoint.pt", "previous.pt", "sharded"
LOG_COLUMNS = ["step", "images", "loss", "grad_norm", "lr", "images_per_s", "seconds"]


# ------------------------------------------------------------------------------------------ errors and signals

def main_program(main):
    """Run a program's main(): the user's mistakes are one line on stderr and status 2, never a traceback."""
    program = os.path.basename(sys.argv[0])
    try:
        status = main()
        if dist.is_initialized():                                         # main's DDP is gone by now: the group goes
            dist.barrier()                                                # last, everywhere together, or one hangs
            dist.destroy_process_group()
        sys.exit(status)
    except UserError as error:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        out_of_memory(program, error)
    except RuntimeError as error:
        if re.search("out of memory|can't allocate memory", str(error)):  # by CUDA's own calls; on a CPU
            out_of_memory(program, error)
        if re.search(r"No working C\+\+ compiler|Failed to find C compiler", str(error)):
            print(f"{program}: torch.compile finds no C++ compiler here: go without (train.py: --compile off)",
                  file=sys.stderr)
            sys.exit(2)
        # Another process of the run is gone: torchrun names it, and why; what is worth saying here is one line.
        if not dist.is_initialized() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        print(f"{program}: process {dist.get_rank()}: stopped, as another process of this run is gone "
              f"({' '.join(str(error).split())[:160]})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                               # `... | head` closed the pipe: not a mistake
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"{program}: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


def out_of_memory(program, error):
    wanted = re.search(r"[\d.]+ [KMGT]iB|\d+ bytes", str(error))
    print(f"{program}: out of memory{f', {wanted[0]} more were wanted' if wanted else ''}: fewer at once (train.py: "
          "--accumulate, --recompute, --batch; its --dry-run says what a run takes)", file=sys.stderr)
    sys.exit(2)


class Interrupt:
    """Ctrl-C and SIGTERM set `signal` instead of killing: the loop saves and leaves. A second Ctrl-C does kill; a
    second SIGTERM does not: under torchrun, where Slurm signals every process, one comes from each."""

    def __init__(self):
        self.signal = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def commit():
    """The commit of these files, -dirty if they were changed since; "" where git is not there."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        git = subprocess.run(["git", "-C", folder, "describe", "--always", "--dirty"], capture_output=True, text=True)
    except OSError:
        return ""
    return git.stdout.strip()


def made_by():
    """What a file of figures begins with: the command, as one types it in this folder, commit, version of torch."""
    program = os.path.relpath(sys.argv[0], os.path.dirname(os.path.abspath(__file__)))
    return dict(command=shlex.join(["python", program, *sys.argv[1:]]), commit=commit(), torch=torch.__version__)


# ------------------------------------------------------------------------------------------ device and processes

def choose_device(name="auto"):
    """(device, why). auto: cuda, then mps, then cpu. Raises UserError for one that is not there."""
    if name == "auto":
        for kind, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
            if there:
                return torch.device(kind), f"{kind} is available"
        return torch.device("cpu"), "no cuda, no mps"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: want auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: want auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: mps is not available here")
    return device, "as asked"


def choose_precision(precision, device):
    """"float32" or "bf16". auto: bf16 on CUDA devices that have it; on a CPU whichever multiplies faster, tried."""
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
    """Matrix products and convolutions in bf16; weights, gradients and the loss in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def cores():
    """The CPU cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start_processes(device_name):
    """(rank, world, device, why). Under torchrun joins the process group: gloo, and nccl for CUDA's tensors."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device, why = choose_device(device_name)
    if world == 1:
        return 0, 1, device, why
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise UserError(f"process {local} of this machine has no GPU of its own: {torch.cuda.device_count()} here")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif device.type == "mps":
        raise UserError("torchrun needs cuda or cpu; mps runs one process")
    # The first process draws the samples while the others wait: longer than the usual ten minutes at the papers' size.
    hours = datetime.timedelta(hours=3)
    store, rank, world = next(dist.rendezvous("env://", timeout=hours))
    # After a restart torchrun's store still holds the addresses of processes that are gone: each life has its own keys.
    store = dist.PrefixStore("life " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=world, timeout=hours)
    return rank, world, device, why


def any_rank(flag, world):
    """True on every process if it is True on one of them. By gloo, between the hosts: no device waits for it."""
    if world == 1:
        return bool(flag)
    flag = torch.tensor(float(flag))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def broadcast(value, world):
    """What the first process has, on every process."""
    values = [value]
    if world > 1:
        dist.broadcast_object_list(values)
    return values[0]


# ------------------------------------------------------------------------------------------ checkpoints

def save_checkpoint(folder, model, ema, optimizer, step, images, config, examples=None, name=CHECKPOINT):
    """checkpoint.pt, whole or not at all: written under another name, flushed to the disk, renamed. There is one at
    every moment, and the one before it stays as previous.pt. Raises UserError if it cannot be written (a full disk).

    examples: how many the data has. With another number a resumed run would see another order.
    """
    path = os.path.join(folder, name)
    state = dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
                 images=images, config=dataclasses.asdict(config), examples=examples)
    try:
        with open(path + ".new", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if name == CHECKPOINT and os.path.exists(path):
            keep(path, os.path.join(folder, PREVIOUS))
        os.replace(path + ".new", path)
        flush_folder(folder)
        if name == CHECKPOINT and config.keep_every and step % config.keep_every == 0:
            keep(path, os.path.join(folder, f"checkpoint_{step:07d}.pt"))
    except (OSError, RuntimeError) as error:                              # PyTorch's writer raises either
        if os.path.exists(path + ".new"):
            os.remove(path + ".new")
        raise UserError(f"{path}: step {step} could not be saved: {reason_of(error)}") from None


def sharded_steps(folder):
    """The steps of the sharded checkpoints of a run, in order: shard.py has the rest."""
    path = os.path.join(folder, SHARDED)
    names = os.listdir(path) if os.path.isdir(path) else []
    return sorted(int(name) for name in names if name.isdecimal())


def kept_checkpoints(folder):
    """The names of the checkpoints that --keep-every left in a run's folder, oldest first."""
    return sorted(map(os.path.basename, glob.glob(os.path.join(glob.escape(folder), "checkpoint_*.pt"))))


def has_checkpoint(folder):
    return os.path.exists(os.path.join(folder, CHECKPOINT)) or bool(sharded_steps(folder))


def read_checkpoint(folder, name=CHECKPOINT, old=False):
    """The dict of save_checkpoint with `config` as a Config. weights_only: a file from a stranger runs no code; and the
    checksums in it are looked at, or a flipped bit would be a weight like any other. old: even if a sharded is newer.
    """
    path = os.path.join(folder, name)
    if not os.path.exists(folder):
        raise UserError(f"{folder}: no such run")
    if not os.path.isfile(path):
        sharded = f"; but a sharded one: python shard.py {folder}" * bool(sharded_steps(folder))
        raise UserError(f"{folder}: not a run (it has no {name}{sharded})")
    before = os.path.join(folder, PREVIOUS)
    before = f"; {before} is the one before: renamed to {name} it takes its place" * (
        name == CHECKPOINT and os.path.exists(before))
    try:
        with zipfile.ZipFile(path) as file:
            if wrong := file.testzip():
                raise UserError(f"{path}: damaged ({wrong}){before}")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)       # read where it is used
        state["config"] = config_of(state["config"])
        missing = {"model", "ema", "optimizer", "step", "images"} - state.keys()
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: a checkpoint of another program ({error})") from None
    except Exception as error:                                            # a damaged file fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: damaged, or not a checkpoint ({reason}){before}") from None
    if missing:
        raise UserError(f"{path}: a checkpoint of another program (it lacks {', '.join(sorted(missing))})")
    if name == CHECKPOINT and not old and sharded_steps(folder) and sharded_steps(folder)[-1] > state["step"]:
        raise UserError(f"{path} is of step {state['step']}, the sharded checkpoint beside it of "
                        f"{sharded_steps(folder)[-1]}: python shard.py {folder} brings it up to date")
    return state


def config_of(fields):
    """The Config of a checkpoint's dict."""
    return override(Config(), **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def load_weights(module, state, path):
    """load_state_dict of a model or an optimizer, but what does not fit is one line."""
    try:
        module.load_state_dict(state)
        if isinstance(module, torch.optim.Optimizer):                     # moments in the weights' order in memory, as
            for weight, moments in module.state.items():                  # the fused kernel takes them to be
                for key, value in moments.items():
                    if value.shape == weight.shape and value.stride() != weight.stride():
                        moments[key] = torch.empty_like(weight).copy_(value)
    except (RuntimeError, TypeError, AttributeError, ValueError, KeyError) as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: a checkpoint of another model ({detail})") from None


def load_run(path, device="cpu"):
    """Return (model, config) of a run folder: the EMA weights, in evaluation mode. Raises UserError."""
    state = read_checkpoint(path)
    return ema_model(state, path, device), state["config"]


def ema_model(state, path, device="cpu"):
    """Build the model of a checkpoint (read_checkpoint's `state`) with the EMA weights. Raises UserError."""
    with torch.device(device):
        model = build_model(state["config"])
    load_weights(model, state["ema"], path)
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ folder, log, progress

def new_folder(out, preset, again=False):
    """The folder of a new run: as asked if it holds none yet, or the first free runs/PRESET, runs/PRESET-2, ...

    again: one that holds a run which was killed before its first checkpoint will do.
    """
    if out is None:
        out, number = os.path.join("runs", preset), 2
        while not first_in(out):
            out, number = os.path.join("runs", f"{preset}-{number}"), number + 1
    elif has_checkpoint(out) or (os.path.exists(os.path.join(out, "log.csv")) and not again):
        raise UserError(f"--out {out}: holds a run already; continue it with --resume {out} or choose another folder")
    try:
        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):                             # may we write here? Better known now
            pass
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from None
    return out


def first_in(folder):
    """Make this folder. False if it is there: another program, started in the same moment, may just have made it."""
    try:
        os.makedirs(folder)
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}") from None
    return True


def progress(what, done, total):
    """A line that redraws itself, in a terminal; nothing in a log."""
    if sys.stdout.isatty():
        end = "\r" if done < total else "\r".ljust(79) + "\r"
        print(f"\r{what} {done}/{total} ".ljust(78), end=end, flush=True)


def _numbers_alone(row):
    """Is it a whole row of log.csv? A crash may have left half of one, or worse."""
    try:
        return int(row["step"]) >= 0 and all(math.isfinite(float(row[column])) for column in LOG_COLUMNS)
    except (KeyError, TypeError, ValueError):
        return False


class Log:
    """log.csv, loss.png and the progress line. One process has it; on the others every call does nothing."""

    def __init__(self, folder, config, active, first_step=0):
        self.folder, self.config, self.active = folder, config, active
        self.path = os.path.join(folder, "log.csv")
        self.terminal, self.printed = sys.stdout.isatty(), 0.0
        self.start, self.first_step, self.since = time.time(), first_step, None
        self.seconds_before = 0.0
        if not active:
            return
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(dataclasses.asdict(config), file, indent=1)
        rows = []
        if first_step:  # drop what a killed run logged past its checkpoint
            rows = [r for r in self.rows() if int(r["step"]) <= first_step]
            self.seconds_before = float(rows[-1]["seconds"]) if rows else 0.0
        with open(self.path + ".new", "w", newline="") as file:           # never without a log, either
            writer = csv.DictWriter(file, LOG_COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.path + ".new", self.path)

    def rows(self):
        if not os.path.exists(self.path):
            return []
        with open(self.path, newline="") as file:
            return [row for row in csv.DictReader(file) if _numbers_alone(row)]

    def step(self, step, images, loss, grad_norm, lr, images_per_s):
        if not self.active:
            return
        seconds = self.seconds_before + time.time() - self.start
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([step, images, f"{loss:.6g}", f"{grad_norm:.6g}", f"{lr:.6g}",
                                           f"{images_per_s:.2f}", f"{seconds:.2f}"])
        except OSError as error:                                          # a full disk: the run is worth more
            self.say(f"{self.path}: {error.strerror}")
        pace = (time.time() - self.start) / max(1, step - self.first_step)
        left = int(pace * (self.config.steps - step))
        line = (f"step {step}/{self.config.steps}  loss {loss:.4f}  {images_per_s:.0f} images/s  "
                f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
        if self.terminal:
            print("\r" + line.ljust(78), end="", flush=True)
        elif time.time() - self.printed > 30 or step == self.config.steps:
            print(line, flush=True)
            self.printed = time.time()

    def say(self, text):
        if self.active:
            print(("\r".ljust(79) + "\r" if self.terminal else "") + text, flush=True)

    def draw(self):
        """loss.png: the logged loss and its running mean."""
        rows = self.rows() if self.active else []
        if len(rows) < 2:
            return
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        steps, loss = np.array([[float(r["step"]), float(r["loss"])] for r in rows]).T
        width = max(1, len(loss) // 20)
        figure, axis = plt.subplots(figsize=(6.4, 3.6))
        axis.plot(steps, loss, alpha=0.3, color="C0")
        axis.plot(steps[width - 1:], np.convolve(loss, np.ones(width) / width, "valid"), color="C0")
        axis.set(xlabel="step", ylabel=f"loss ({self.config.loss})", yscale="log")
        axis.grid(alpha=0.3, which="both")
        figure.tight_layout()
        try:
            figure.savefig(os.path.join(self.folder, "loss.png"), dpi=110)
        except OSError as error:
            self.say(f"loss.png: {error.strerror}")
        plt.close(figure)
