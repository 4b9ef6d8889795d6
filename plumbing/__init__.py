"""What is in no paper: command lines, run folders, checkpoints, sharding, pictures, decoding. Skip it on a first read.

    settings.py   the command line -> Config; every check and its one-line message
    runs.py       device, processes, run folder, checkpoints, log
    shard.py      weights and optimizer state split over processes
    files.py      files that are written whole or not at all
    images.py     decode any image file safely
    sampling.py   the command line of sample.py, what its sheets show
    pictures.py   sheets of samples, captions, GIFs, matplotlib
    t5.py         a frozen T5 and its cache
    features.py   the networks that grade samples
    cost.py       parameters, FLOPs and memory before a run
"""


class UserError(ValueError):
    """The user's mistake, in one line. The programs print it and exit with status 2."""
