"""A run while it trains: its log, its checkpoints, its sheets of samples, and the signals that stop it.

A run is a folder: config.json (resolved settings), log.csv (a row per logged step), loss.png, samples_*.png,
index.html that shows them (watch.py), checkpoint.pt and the one before it, previous.pt. A sharded run has a folder
`sharded` in their place (shard.py).
"""
import contextlib
import csv
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import shlex
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from cascade import downsample
from plumbing import UserError, shard
from plumbing.files import keep_aside, reason_of, whole_file
from plumbing.images import BrokenImage
from plumbing.pictures import pyplot, save_picture
from plumbing.runs import CHECKPOINT, SHARDED, any_rank, broadcast, not_finite, rescues, save_checkpoint, tell
from plumbing.sampling import image_seeds, make_conditions, make_sheet, what_is_drawn
from plumbing.sources import open_run
from plumbing.watch import PAGE, Page, clock, sheet_name
from sample import sample_run

LOG_COLUMNS = ["step", "images", "loss", "grad_norm", "lr", "images_per_s", "seconds", "held_out"]


A_LINE_EVERY = 30                                                         # seconds, where stdout is no terminal
PATIENCE = 5                                                              # seconds; torchrun kills after 30


class DrawingStopped(Exception):
    """A signal came while a sheet was drawn."""


class WaitingStopped(BaseException):                                      # no Exception: who decodes a file catches all
    """A signal came while the run waited for data."""


class Interrupt:
    """Remember Ctrl-C, SIGTERM and SIGHUP in `signal` instead of dying, so that the loop can save first.

    A second Ctrl-C kills. A second SIGTERM does not: under torchrun and Slurm each process may get several. SIGHUP says
    that the terminal closed; `nohup` has it ignored, and so do we.
    """

    def __init__(self):
        self.signal, self.time, self.waiting = None, 0.0, False
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)                          # Windows has no SIGHUP
            if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                signal.signal(number, self._remember)

    def _remember(self, number, frame):
        self.signal, self.time = number, time.monotonic()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.waiting:
            raise WaitingStopped

    @contextlib.contextmanager
    def heard_at_once(self):
        """Within it a signal raises WaitingStopped: nothing else ends a read that blocks. One that came before, as in
        the drawing of a sheet, lets the next step pass."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False


# ------------------------------------------------------------------------------------------ the run

class Run:
    """Everything around a training loop that is not the training:

        for step, batch in run.steps(stream):       # ends at config.steps and at a signal
            ...                                     # loss, backward
            if not run.finite(grad_norm):
                return run.fail()
            ...                                     # optimizer.step()
            run.after_step(loss, grad_norm, lr)     # log, held-out loss, checkpoint, sheet: when they are due
        return run.finish()                         # the exit status

    source                  the training data; a resumed run must find as many examples
    model, ema, optimizer   what a checkpoint holds
    step                    where the loop begins
    held_out_loss           function () -> float, or None
    sheet                   function (images per class, classes, sampling steps, on_step) -> Pillow picture, or None;
                            without it there is no index.html
    """

    def __init__(self, folder, config, source, model, ema, optimizer, step=0, rank=0, world=1, held_out_loss=None,
                 sheet=None, interrupt=None):
        self.folder, self.config, self.source = folder, config, source
        self.model, self.ema, self.optimizer = model, ema, optimizer
        self.step, self.rank, self.world = step, rank, world
        self.held_out_loss, self.sheet = held_out_loss, sheet
        self.interrupt, self.stopped = interrupt or Interrupt(), False
        self.log = Log(folder, config, active=rank == 0, first_step=step)
        self.page = Page(self.log, active=rank == 0 and sheet is not None, first_step=step)
        # With several processes there are none: their clocks do not agree.
        self.early = EarlySheets(config, self.log.seconds_before) if world == 1 and sheet else None
        self.broken = {f"{path}: {reason}" for path, reason in getattr(source, "skipped", [])}  # files named so far
        self.saved = step or None                                         # the step of the last checkpoint
        self.tried, self.updating = self.saved, False                     # the last that we tried to save; half a step?
        self.sharded = config.shard and world > 1                         # then every rank takes part in a forward pass

    def print_header(self, device, why):
        """Say what is about to be trained."""
        config, source = self.config, self.source
        self.page.write()
        self.log.say(f"watch it: {os.path.join(self.folder, PAGE)}")
        self.log.say(f"{self.folder}: {sum(p.numel() for p in self.model.parameters()):,} parameters, "
                     f"{what_is_drawn(config)}, {len(source):,} examples, {len(source.classes)} classes; "
                     f"{self.world} x {device.type} ({why}), {config.precision}"
                     + (", sharded" if self.sharded else "") + (f"; from step {self.step}" if self.step else ""))
        for message in sorted(self.broken):
            self.log.say(f"skipped {message}")

    def steps(self, stream):
        """Yield (step, batch) until the run is complete or stopped."""
        self.log.start_clock(self.step)
        if self.rank == 0:
            rescues[:] = [self.rescue]
        self.make_up_for_sheet()
        stream.heed = self.leave_the_others
        while self.step < self.config.steps and not self.stopped:
            if batch := self.next_batch(stream):
                yield self.step, batch

    def make_up_for_sheet(self):
        """Draw the sheet of the step that the run goes on from, if a kill or a signal came before it."""
        path = os.path.join(self.folder, sheet_name(self.step))
        missing = 0 < self.step < self.config.steps and self.due(self.config.sample_every) and not os.path.exists(path)
        if broadcast(missing, self.world):                                # the ranks may not see it alike
            self.save_sheet()

    def next_batch(self, stream):
        """Return the next batch; None if a signal stops the run meanwhile. Whatever happens, the step is saved."""
        try:
            with self.interrupt.heard_at_once() if self.world == 1 else contextlib.nullcontext():
                batch = next(stream)
            for message in set(batch["broken"]) - self.broken:
                self.warn(f"skipped {message}")
            self.broken.update(batch["broken"])
            if batch["image"] is None:
                raise UserError(f"no image left that can be read ({len(self.broken)} skipped)")
            return batch
        except WaitingStopped:
            stream.end()
            self.stopped = True
            self.save_alone()
            if self.world > 1:
                sys.exit(self.finish())
        except Exception as error:
            stream.end()
            if self.step:
                self.save_alone()
            if not isinstance(error, (UserError, OSError, RuntimeError, ValueError)):
                raise                                                     # ours, or memory
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]              # of a worker's many
            raise UserError(f"--data {self.config.data}: {reason}; {self.last_saved}") from None

    def leave_the_others(self):
        """Raise WaitingStopped some seconds after a signal. Other processes may be in a step that needs this one; it is
        better that all end together after it."""
        if self.interrupt.signal and time.monotonic() - self.interrupt.time > PATIENCE:
            raise WaitingStopped

    def save_alone(self):
        """Save a step that is not saved yet, if this process can do so without the others: they may be elsewhere. For
        shards they must come here, too."""
        if self.saved == self.step or self.rank and not self.sharded:
            return
        if not self.sharded or self.others_come():
            self.save(world=self.world if self.sharded else 1)

    def others_come(self):
        """Return True if all processes call this within some seconds. They meet in the store: a collective may hang."""
        store, name = dist.distributed_c10d._get_default_store(), f"step {self.step}, rank "
        store.set(f"{name}{self.rank}", "")
        try:
            store.wait([f"{name}{rank}" for rank in range(self.world)], datetime.timedelta(seconds=PATIENCE))
        except dist.DistError:                                            # one is in a step, or gone
            return False
        return True

    def rescue(self, error):
        """Save the last whole step, as an error ends the run. Note at the error which checkpoint is there.

        Half a step is never saved: weights, EMA weights and optimizer state belong to one step.
        """
        if self.step and self.tried != self.step and not (self.updating or self.sharded):
            try:
                self.save_alone()
            except Exception as another:
                error.add_note(f"step {self.step} could not be saved: {reason_of(another)}")
        if self.last_saved not in str(error):
            error.add_note(self.last_saved)

    @property
    def last_saved(self):
        return f"the checkpoint of step {self.saved} is in {self.folder}" if self.saved is not None else (
            "no checkpoint was written yet")

    def warn(self, text):
        """Print a line on stderr."""
        tell(f"\n{text}", sys.stderr)

    def finite(self, grad_norm):
        """Return whether the norm of the gradient is finite. Call it before the optimizer changes the weights: until
        after_step() they are half a step's, and an error saves nothing."""
        self.updating = bool(torch.isfinite(grad_norm))
        return self.updating

    def fail(self):
        """Stop at a gradient that is not finite. Save the weights before this step as failed.pt. Return the status."""
        if self.rank == 0:
            kept = os.path.join(self.folder, SHARDED, "failed") if self.config.shard else os.path.join(self.folder,
                                                                                                       "failed.pt")
            self.warn(f"step {self.step}: the gradient is not finite; stopped, {self.last_saved}; the weights before "
                      f"this step go to {kept}")
        self.save(failed=True)
        self.page.write("stopped: the gradient is not finite")
        return 1

    def after_step(self, loss, grad_norm, lr):
        """Count the step. Log, measure, save, draw what is due."""
        self.step = self.page.step = self.step + 1
        self.updating = False
        config, last = self.config, self.step == self.config.steps
        measured = self.held_out_loss is not None and self.due(config.held_out_every)
        if self.due(config.log_every) or measured or last:
            self.log_step(loss, grad_norm, lr, measured)
        if self.log.unread and not self.interrupt.signal:                 # as the shell names a program that ends there
            self.interrupt.signal = getattr(signal, "SIGPIPE", 13)
        self.stopped = any_rank(self.interrupt.signal is not None, self.world)
        # A sheet takes up to minutes. If the run is killed meanwhile, the step is safe.
        if any(map(self.due, (config.save_every, config.keep_every, config.sample_every))) or last or self.stopped:
            self.save()
        if last or self.stopped:
            return
        if self.due(config.sample_every):
            self.save_sheet()
        elif self.early and (shape := self.early.due(self.step, self.log.seconds(), self.log.pace(self.step))):
            start = time.monotonic()
            self.save_sheet(*shape, steps=EarlySheets.STEPS)
            self.early.drawn(math.prod(shape), time.monotonic() - start)
        self.page.refresh()

    def due(self, every):
        return every > 0 and self.step % every == 0

    def log_step(self, loss, grad_norm, lr, measured):
        if self.world > 1:
            dist.all_reduce(loss)
            loss = loss / self.world
        if isinstance(grad_norm, DTensor):                                # --shard: torch may leave each rank its part
            grad_norm = grad_norm.full_tensor()
        pace = self.log.images_per_second(self.step)
        held_out = self.on_ranks(self.held_out_loss) if measured else None
        self.log.row(self.step, loss.item(), grad_norm.item(), lr, pace, held_out)
        self.log.start_clock(self.step)

    def save(self, failed=False, world=None):
        """Write a checkpoint, on every rank together, or with world=1 on this one alone. Raises UserError if it holds
        values that are not finite, or if it cannot be written and the run shall stop for that."""
        world = world or self.world
        self.tried = self.step
        bad = None if failed else not_finite(dict(model=self.model.state_dict(), ema=self.ema.state_dict(),
                                                  optimizer=self.optimizer.state_dict()))
        if any_rank(bad is not None, world):
            raise UserError(f"step {self.step}: {bad or 'what another process holds'} is not finite, so it is not "
                            f"saved; {self.last_saved}; a lower --lr may help")
        saved = True
        try:
            if self.config.shard:
                shard.save(*self.what(), name="failed" if failed else None)
            elif self.rank == 0:
                save_checkpoint(*self.what(), name="failed.pt" if failed else CHECKPOINT)
        except UserError as error:
            if self.config.if_unsaved == "stop" or self.stopped or self.step == self.config.steps:
                raise
            self.warn(f"{error}; going on")
            saved = False
        self.log.draw()
        if broadcast(saved, world) and not failed:                        # nobody leaves while rank 0 writes
            self.saved = self.step

    def what(self):
        """Return what a checkpoint holds."""
        images = self.step * self.config.batch
        return self.folder, self.model, self.ema, self.optimizer, self.step, images, self.config, len(self.source)

    def on_ranks(self, forward, *args):
        """Call a function that runs the EMA weights: on rank 0, or on every rank if each holds a shard only."""
        if self.rank and not self.sharded:
            return None
        try:
            return forward(*args)
        finally:
            if self.sharded:
                self.ema.reshard()                                        # only a backward pass does so by itself

    def stop_drawing(self, *progress):
        """Raise DrawingStopped if the run shall stop. The next step then saves and ends the run."""
        if any_rank(self.interrupt.signal is not None, self.world if self.sharded else 1):
            raise DrawingStopped

    def save_sheet(self, a_class=2, classes=36, steps=None):
        """Draw a sheet of samples with the EMA weights. steps: sampling steps, None for the run's own."""
        if self.sheet is None:
            return
        name = sheet_name(self.step)
        try:
            picture = self.on_ranks(self.sheet, a_class, classes, steps, self.stop_drawing)
            if self.rank == 0:
                save_picture(picture, os.path.join(self.folder, name))
                self.page.add_sheet(self.step, is_quick=steps is not None)
        except DrawingStopped:
            self.log.say("no sheet of samples: it was stopped")
        except UserError as error:                                        # no low-res image: the run goes on
            self.log.say(f"no sheet of samples: {error}")
        except OSError as error:                                          # a full disk: the run goes on
            self.log.say(f"{name}: {error.strerror}")
        self.log.start_clock(self.step)

    def finish(self):
        """Draw the last sheet, say where everything is. Return the exit status."""
        if self.stopped:
            self.log.say(f"stopped at step {self.step}; continue with: python train.py --resume {self.folder}")
            self.page.write("stopped", [shlex.join(["python", "train.py", "--resume", self.folder])])
            return 128 + (self.interrupt.signal or 0)
        self.save_sheet(4)
        files = [name for name in (sheet_name(self.step), "loss.png", SHARDED if self.config.shard else CHECKPOINT)
                 if os.path.exists(os.path.join(self.folder, name))]
        skipped = f"; {len(self.broken)} files skipped" if self.broken else ""
        self.log.say(f"done: {self.folder}/{', '.join(files)}{skipped}")
        join = f"python -m plumbing.shard {self.folder}, then " if self.config.shard else ""
        self.log.say(f"draw more with: {join}python sample.py {self.folder}")
        self.page.write("done", self.next_commands())
        return 128 + self.interrupt.signal if self.interrupt.signal else None                   # the last sheet stopped

    def next_commands(self):
        """Return what the user may type when the run is complete."""
        stages = [self.folder]
        if self.config.low_size:
            stages = ["RUN-OF-LOW-RES-IMAGES", self.folder, "--handoff", "clean"]
        join = [["-m", "plumbing.shard", self.folder]] if self.config.shard else []
        return [shlex.join(["python", *words]) for words in (*join, ["sample.py", *stages], ["evaluate.py", *stages])]


# ------------------------------------------------------------------------------------------ sheets of samples

def early_time(seconds):
    """Return the first of 15, 30, 60, 120 ... seconds that is still to come."""
    return 15 * 2 ** max(0, math.floor(math.log2(max(seconds, 1) / 15)) + 1)


class EarlySheets:
    """Say when the first sheets are due: after 15 and 30 seconds, 1, 2, 4, 8 ... minutes, until --sample-every's first.

    They have few sampling steps and one image or more of each class or caption. All of them together cost less than
    5 % of the time. So a sheet that would cost too much has fewer images, or waits until the time has doubled again.
    """
    SHARE, STEPS, MOST, LEAST = 0.05, 8, 36, 4

    def __init__(self, config, seconds_before):
        self.config, self.seconds_before = config, seconds_before         # seconds before the run was resumed
        self.next, self.spent, self.an_image = early_time(seconds_before), 0.0, None            # in seconds

    def due(self, step, seconds, seconds_a_step):
        """Return (images of a class, classes) of the sheet to draw now, or None.

        A forward pass takes about a third of a training step. We reckon with a half; the first sheet measures it.
        """
        config = self.config
        if step >= config.sample_every or seconds < self.next:
            return None
        self.next = early_time(seconds)
        guess = self.STEPS * config.evaluations * seconds_a_step / (2 * config.batch)
        budget = self.SHARE * (seconds - self.seconds_before) - self.spent
        n = min(self.MOST, int(budget / (self.an_image or guess or math.inf)))
        if n < self.LEAST:
            return None
        classes = min(n, len(config.examples) or len(config.class_names) or n)
        return min(4, n // classes), classes

    def drawn(self, images, seconds):
        """Note what a sheet cost."""
        self.spent, self.an_image = self.spent + seconds, seconds / images


def draw_sheet(ema, config, device, encoder, a_class, classes=36, steps=None, on_step=None):
    """Draw samples of each class or caption with the EMA weights; a super-resolution model enlarges real images.

    steps: number of steps of DDIM, which needs few of them; None: the run's own sampler and steps. on_step: as in
    sample_run().
    """
    if steps:
        config = dataclasses.replace(config, sample_steps=min(steps, config.sample_steps), sampler="ddim")
    low_res = None
    if config.low_size:
        source = open_run(config, portrait=False)                         # the sheet shows no upright images
        low_res = functools.partial(real_low_res, source, config)
    return class_sheet(ema, config, device, config.precision, a_class, config.seed, low_res, encoder, classes,
                       on_step)


def class_sheet(model, config, device, precision, columns, seed=0, real_low_res=None, encoder=None, rows=36,
                on_step=None):
    """Draw a sheet: `columns` images of each of the first `rows` classes or captions (config.examples).

    real_low_res(labels or captions) returns real low-res images. A super-resolution model starts from them.
    """
    classes = range(min(rows, len(config.class_names)))
    sheet = make_sheet(config, columns, classes, config.examples[:rows], n=min(64, rows * columns))
    cond = make_conditions(config, sheet.labels, device, sheet.captions, encoder=encoder)
    if real_low_res:
        cond["low_res"] = real_low_res(sheet.captions or sheet.labels)
        cond["aug_logsnr"] = torch.full((len(sheet.labels),), torch.inf)
    return sheet.picture(sample_run(model, config, cond, image_seeds(seed, len(sheet.labels)), device, precision,
                                    on_step))


def real_low_res(source, config, labels, first=0):
    """Average images of these classes down: (B, 3, h, w), what a super-resolution model gets before it has a stage
    below. Each class starts at example `first` and goes on from image to image.

    labels: class numbers, -1 for any; for a model with text captions, each with the first image that has it. Raises
    UserError for a class or caption without a readable image.
    """
    if config.text_encoder:
        return captioned_low_res(source, config, labels)
    images, place = [], dict.fromkeys(labels, first)
    for label in labels:
        for _ in range(len(source)):
            i, place[label] = place[label] % len(source), place[label] + 1
            if label in (-1, source.label(i)):
                try:
                    images.append(downsample(source.image(i)[None], config.low_size))
                    break
                except BrokenImage:
                    continue
        else:
            raise UserError(f"{config.data}: no image of class {(*config.class_names, 'any')[label]} that can be read")
    return torch.cat(images)


def captioned_low_res(source, config, captions):
    """Like real_low_res, for captions."""
    images = {}
    for i in range(len(source)):
        if (caption := source.caption(i)) in captions and caption not in images:
            try:
                images[caption] = downsample(source.image(i)[None], config.low_size)
            except BrokenImage:
                continue
        if len(images) == len(set(captions)):
            return torch.cat([images[caption] for caption in captions])
    missing = next(caption for caption in captions if caption not in images)
    raise UserError(f"{config.data}: no image with the caption {missing!r} that can be read")


# ------------------------------------------------------------------------------------------ the log

def is_number_row(row):
    """Return whether this is a whole row of log.csv. A crash may leave half of one."""
    try:
        numbers = [row[column] for column in LOG_COLUMNS[:-1]] + [row.get("held_out") or 0]
        return (0 <= int(row["step"]) and 0 <= float(row["seconds"]) < 1e10              # three hundred years
                and all(0 <= float(number) < math.inf for number in numbers))
    except (KeyError, ValueError):
        return False


def read_log(path):
    """Return (the whole rows of a log.csv, as dicts of strings; how many of its lines are no rows).

    A mark of Windows before the first line, and a header that is missing, change nothing. A crash may leave half of the
    last line, which does not count, unless it is no beginning of a line at all.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        *lines, half = file.read().split("\n")
    header = lines[0].split(",") if lines else []
    columns, lines = (header, lines[1:]) if "step" in header else (LOG_COLUMNS, lines)
    rows = [dict(zip(columns, line.split(","))) if line.count(",") == len(columns) - 1 else {}
            for line in [*lines, half]]
    if not (re.fullmatch(r"[\d.,e+-]{0,200}", half) or ",".join(LOG_COLUMNS).startswith(half)):
        lines.append(half)
    lost = sum(bool(line) and not is_number_row(row) for line, row in zip(lines, rows))
    return [row for row in rows if is_number_row(row)], lost


class Log:
    """log.csv, loss.png and the progress line of rank 0. On the other ranks every call does nothing."""

    def __init__(self, folder, config, active, first_step=0):
        self.folder, self.config, self.active = folder, config, active
        self.path = os.path.join(folder, "log.csv")
        self.terminal, self.printed = sys.stdout.isatty(), -math.inf
        self.start, self.first_step = time.monotonic(), first_step
        self.seconds_before, self.unread = 0.0, False                     # unread: nobody reads stdout any more
        self.newest = {"loss": "", "held-out loss": "", "images/s": ""}   # as the user reads it
        self.start_clock(first_step)
        if not active:
            return
        with whole_file(os.path.join(folder, "config.json"), "w") as file:
            json.dump(dataclasses.asdict(config), file, indent=1)
        rows = self.rows_until(first_step)
        self.seconds_before = float(rows[-1]["seconds"]) if rows else 0.0
        with whole_file(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, LOG_COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def rows(self):
        """The whole rows of log.csv, as dicts of strings."""
        return read_log(self.path)[0] if os.path.isfile(self.path) else []                      # a pipe would block

    def rows_until(self, step):
        """Return the rows that a resumed run keeps: a killed one may have logged steps after its checkpoint.

        A log that is damaged is set aside, with a line about it: the run is worth more than its log.
        """
        rows, fault = [], "is no file"
        if not os.path.lexists(self.path) or (os.path.isfile(self.path) and not step):          # none yet, or a new run
            return []
        try:
            if os.path.isfile(self.path):
                rows, lost = read_log(self.path)
                fault = f"has {lost:,} lines that are no rows of a log" if lost else ""
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault:
            self.say(f"{self.path} {fault}; it is kept as {keep_aside(self.path)}, and the run goes on with "
                     f"{len(rows):,} of its rows")
        return [row for row in rows if int(row["step"]) <= step]

    def start_clock(self, step):
        self.since, self.since_step = time.monotonic(), step

    def images_per_second(self, step):
        seconds = time.monotonic() - self.since                           # 0: a clock may stand still
        return (step - self.since_step) * self.config.batch / seconds if seconds > 0 else 0.0

    def seconds(self):
        """The seconds since the run began, without those between a stop and its --resume."""
        return self.seconds_before + time.monotonic() - self.start

    def pace(self, step):
        """The seconds of a step, all that belongs to it included, since the run began or was resumed."""
        return (time.monotonic() - self.start) / max(1, step - self.first_step)

    def row(self, step, loss, grad_norm, lr, images_per_s, held_out=None):
        """Append a row to log.csv and show the progress line."""
        if not self.active:
            return
        try:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([step, step * self.config.batch, f"{loss:.6g}", f"{grad_norm:.6g}",
                                           f"{lr:.6g}", f"{images_per_s:.2f}", f"{self.seconds():.2f}",
                                           "" if held_out is None else f"{held_out:.6g}"])
        except OSError as error:                                          # a full disk: the run goes on
            self.say(f"{self.path}: {error.strerror}")
        self.newest |= {"loss": f"{loss:.4f}", "images/s": f"{images_per_s:.0f}"}
        if held_out is not None:
            self.newest["held-out loss"] = f"{held_out:.4f}"
        line = (f"step {step}/{self.config.steps}  loss {loss:.4f}  "
                + (f"held out {held_out:.4f}  " if held_out is not None else "")
                + f"{images_per_s:.0f} images/s  {clock(self.pace(step) * (self.config.steps - step))} left")
        if self.terminal:
            self.say(line.ljust(78), end="")
        elif time.monotonic() - self.printed > A_LINE_EVERY or step == self.config.steps:
            self.say(line)
            self.printed = time.monotonic()

    def say(self, text, end="\n"):
        if self.active and not tell(("\r".ljust(79) + "\r" if self.terminal else "") + text, sys.stdout, end):
            self.unread = True

    def draw(self):
        """Draw loss.png: the logged loss, its running mean, and the held-out loss."""
        rows = self.rows() if self.active else []
        if len(rows) < 2:
            return
        steps, loss = np.array([[float(row["step"]), float(row["loss"])] for row in rows]).T
        held_out = [(float(row["step"]), float(row["held_out"])) for row in rows if row.get("held_out")]
        width = max(1, len(loss) // 20)
        figure, axis = pyplot().subplots(figsize=(6.4, 3.6))
        axis.plot(steps, loss, alpha=0.3, color="C0")
        axis.plot(steps[width - 1:], np.convolve(loss, np.ones(width) / width, "valid"), color="C0", label="training")
        if held_out:
            axis.plot(*zip(*held_out), "o-", color="C1", markersize=3, label="held out, EMA weights")
        axis.set(xlabel="step", ylabel=f"loss ({self.config.loss})", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
        figure.tight_layout()
        try:
            with whole_file(os.path.join(self.folder, "loss.png")) as file:
                figure.savefig(file, dpi=110)
        except OSError as error:                                          # a full disk: the run goes on
            self.say(f"loss.png: {error.strerror}")
        pyplot().close(figure)
