"""The worker processes of a data loader: which signals they heed."""
import os
import signal
import threading


def heed_parent_only(worker_id):
    """Let a worker end only when its parent ends it. Pass this as a DataLoader's worker_init_fn.

    Ctrl-C, `timeout` and torchrun signal a whole process group. Slurm and systemd signal every process of a job. If the
    workers ended then, the parent could not save its last checkpoint. So a worker leaves the process group and ignores
    a SIGTERM from anybody but its parent. It still ends when its parent ends.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    if hasattr(signal, "sigwaitinfo"):                                    # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])        # the thread below takes it instead
        threading.Thread(target=_exit_when_parent_asks, daemon=True).start()


def _exit_when_parent_asks():
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
