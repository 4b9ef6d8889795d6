"""What is in no paper: command lines, run folders, checkpoints, sharding, pictures, decoding. Skip it on a first read.

    settings.py   flags, and a check of every setting with its one-line message
    start.py      how a training run starts: new, resumed, grown, or from other weights
    training.py   a run while it trains: log, checkpoints, sheets of samples, signals
    watch.py      index.html of a run while it trains
    sampling.py   the command line of sample.py, and what evaluate.py shares with it
    measuring.py  the command line of evaluate.py, its tables and pictures
    rounds.py     the command line of distill.py, and its rounds
    drawing.py    the samples that evaluate.py measures, and their cache
    runs.py       programs, device, processes, checkpoints
    weights.py    a run's EMA weights in 16 bit, as pretrained/NAME
    shard.py      weights and optimizer state split over processes
    files.py      files that are written whole or not at all
    images.py     list a folder of images, decode any file safely
    captions.py   read captions, match them to their images
    sources.py    the data of a run: opened, moved, changed, or as they were
    fonts.py      open any font file, draw its characters
    motion.py     scenes that move, and how the motion of videos is measured
    workers.py    the data loader's processes: their start, signals and end
    pictures.py   sheets of samples, captions, matplotlib
    pages.py      what the pages of the lecture share: counts and figures
    t5.py         a frozen T5 and its cache
    features.py   the networks that grade samples, and the real images beside them
    cost.py       parameters, FLOPs and memory before a run
"""
import sys


class UserError(ValueError):
    """The user's mistake, in one line. The programs print it and exit with status 2."""


class Damaged(UserError):
    """A checkpoint is not whole. The one before it may be."""


def _end_quietly(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    if issubclass(kind, UserError):                                       # python schedule.py cannot write figures
        print(error, file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, trace)


if not hasattr(sys, "ps1"):                                               # at Python's own prompt Ctrl-C ends nothing
    sys.excepthook = _end_quietly                                         # until main_program() is there for it
