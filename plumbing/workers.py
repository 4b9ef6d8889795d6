"""The worker processes of a data loader: how they start, which signals they heed, when they end."""
import functools
import multiprocessing
import os
import re
import signal
import threading
import time
from multiprocessing import resource_tracker

import torch

from plumbing import UserError

LIMIT = 600                                                               # seconds that a batch may take
HELP = "take --workers 0, or give the machine more shared memory (df -h /dev/shm; docker run --shm-size 8g)"


class Batches:
    """The batches of a DataLoader. Waiting for one has an end: when a worker is gone, or after ten minutes. Without
    workers this process reads by itself, and only a signal ends a read that blocks.

    heed    called each second while one is awaited; it may raise
    """

    def __init__(self, batches):
        self.batches, self.heed = batches, lambda: None

    def __iter__(self):
        return self

    def __next__(self):
        """Return the next batch. Raises UserError if a worker is gone, and what a worker raises."""
        since = time.monotonic()
        while time.monotonic() - since < LIMIT:
            try:
                return next(self.batches)
            except (RuntimeError, ConnectionError, EOFError) as error:    # the last two: it died as it sent a batch
                if not isinstance(error, RuntimeError) or re.search("exited unexpectedly|shared memory|</torch_",
                                                                    str(error)):
                    raise UserError(f"a process that reads the data is gone, or its memory was short: {HELP}") from None
                if "DataLoader timed out" not in str(error):
                    raise
            self.heed()
        raise UserError(f"the data did not come within {LIMIT} s: see whether they can be read, or {HELP}")

    def end(self):
        """Kill the workers: they have nothing to lose, and one that is stuck would keep this process alive."""
        for worker in getattr(self.batches, "_workers", ()):
            worker.kill()


def load(dataset, collate_fn, num_workers, **options):
    """Return Batches of a DataLoader whose worker processes end only when their parent says so.

    Ctrl-C, `timeout` and torchrun signal a whole process group, and so does a terminal that closes. Slurm and systemd
    signal every process of a job. If the workers ended then, the parent could not save its last checkpoint. So they
    start with these signals blocked, and a fork server, which starts them from Python 3.14 on, does so, too. See
    _wait_for_parent for how they end.
    """
    if num_workers:
        options |= dict(timeout=1, worker_init_fn=_heed_parent_only)      # a second, for heed()
        collate_fn = functools.partial(_share, collate_fn)
    loader = torch.utils.data.DataLoader(dataset, collate_fn=collate_fn, num_workers=num_workers, **options)
    if not hasattr(signal, "sigtimedwait"):                               # macOS, Windows
        return Batches(iter(loader))
    if num_workers and multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()                                 # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    on_death = signal.getsignal(signal.SIGCHLD)
    try:
        return Batches(iter(loader))                                      # starts the workers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if signal.getsignal(signal.SIGCHLD) != on_death:                  # PyTorch's raises at any place, as within a
            signal.signal(signal.SIGCHLD, on_death)                       # step; to look while waiting is enough


def _share(collate, examples):
    """Collate in a worker, in shared memory. If it is full, the parent hears of it: PyTorch would share later, in a
    thread that prints its error and drops the batch."""
    batch = collate(examples)
    for value in torch.utils._pytree.tree_leaves(batch):                  # of a dict, or of a list of pairs
        if torch.is_tensor(value):
            value.share_memory_()
    return batch


def _heed_parent_only(worker_id):
    if hasattr(signal, "SIGBUS"):                                         # shared memory is full: die without a word,
        signal.signal(signal.SIGBUS, signal.SIG_DFL)                      # the parent has one
    if hasattr(signal, "sigtimedwait"):
        threading.Thread(target=_wait_for_parent, daemon=True).start()
    elif hasattr(os, "setpgrp"):
        os.setpgrp()                                                      # signals of the group pass it by


def _wait_for_parent():
    """End the worker when its parent sends SIGTERM, or is gone. SIGTERM from anybody else is ignored.

    A worker's parent is the process that asked for it. os.getppid() may be the fork server, which lives as long as a
    worker does.
    """
    parent, sent = multiprocessing.parent_process(), None
    while parent.is_alive() and (sent is None or sent.si_pid != parent.pid):
        sent = signal.sigtimedwait([signal.SIGTERM], 1)                   # None after a second without one
    os._exit(0)
