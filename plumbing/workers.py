"""The worker processes of a data loader: how they start, which signals they heed, when they end."""
import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker

import torch


def load(dataset, **options):
    """Return an iterator over the batches of a DataLoader whose worker processes end only when their parent says so.

    Ctrl-C, `timeout` and torchrun signal a whole process group. Slurm and systemd signal every process of a job. If the
    workers ended then, the parent could not save its last checkpoint. So they start with both signals blocked, and a
    fork server, which starts them from Python 3.14 on, does so, too. See _wait_for_parent for how they end.
    """
    loader = torch.utils.data.DataLoader(dataset, worker_init_fn=_heed_parent_only, **options)
    if not hasattr(signal, "sigtimedwait"):                               # macOS, Windows
        return iter(loader)
    if loader.num_workers and multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()                                 # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    try:
        return iter(loader)                                               # starts the workers
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _heed_parent_only(worker_id):
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
