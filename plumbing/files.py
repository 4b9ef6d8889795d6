"""Files that are there whole or not at all."""
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile

from plumbing import UserError

try:
    import fcntl
except ImportError:                                                       # Windows
    fcntl = None


@contextlib.contextmanager
def whole_file(path, mode="wb", **options):
    """Open `path` for writing. It appears only when it is complete: written under another name, flushed, renamed.

    Whatever goes wrong, the file that was there before stays, and the unfinished one is removed.
    """
    new = path + ".new"
    try:
        with open(new, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        flush_folder(os.path.dirname(path) or ".")
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise


def flush_folder(folder):
    """Flush the names of the files in `folder` to the disk (POSIX)."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def keep(path, other):
    """Give a finished file a second name; copy it where the file system has no hard links."""
    new = other + ".new"
    if os.path.exists(new):
        os.remove(new)
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)
        with open(new, "rb") as file:
            os.fsync(file.fileno())
    os.replace(new, other)


def writable_folder(path, flag):
    """Make the folder if needed and check that files can be written there. Raises UserError naming the flag."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    return path


def hold(folder):
    """Hold the folder of a run as long as the returned file is open. Raises UserError if another process holds it.

    The lock is of the kind that forked workers do not inherit: they outlive a killed run by a second.
    """
    file = open(os.path.join(folder, ".lock"), "w")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{folder}: another process is training this run") from None
    except OSError:                                                       # a file system without locks
        pass
    return file


def escape_odd_names():
    """Print with escapes what the encoding of the output lacks: a file's name must not end a program.

    Such are Cyrillic or ± where the output is ASCII, and everywhere a name that is not UTF-8.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):                          # a test or a notebook may have put another
            stream.reconfigure(errors="backslashreplace")


def reason_of(error):
    """One line about a failed write. PyTorch's writer hides the cause behind its own error."""
    while isinstance(error, RuntimeError) and error.__context__:
        error = error.__context__
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:160] or type(error).__name__


def blame_machine(path, error):
    """Raise UserError with the true cause if this machine cannot read a file. Return if the file itself is to blame.

    A good file must not be called damaged where permission or memory is missing, or the disk fails: the user would
    replace it. Seeking to a place that a damaged file names is EINVAL.
    """
    fault = None
    if isinstance(error, MemoryError) or "allocate memory" in str(error):                       # PyTorch: RuntimeError
        fault = "not enough memory"
    elif isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENOENT, errno.ENOTDIR):
        fault = error.strerror
    if fault:
        raise UserError(f"{path}: cannot be read: {fault}") from None


def write_json(path, values):
    """Write a dict as JSON, whole or not at all. NaN is refused: JSON has none."""
    with whole_file(path, "w") as file:
        json.dump(values, file, indent=1, allow_nan=False)


def read_json(path):
    """The dict in a JSON file; empty if there is none or it is damaged."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):             # a pipe would block
            raise UserError(f"{path}: not a regular file")
        with open(path) as file:
            values = json.load(file)
            return values if isinstance(values, dict) else {}
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:                # the last: brackets in brackets in brackets
        blame_machine(path, error)
        return {}


def fingerprint(*things):
    """Return a short name for exactly these settings and bytes."""
    digest = hashlib.sha256()
    for thing in things:
        digest.update(thing if isinstance(thing, bytes) else repr(thing).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:12]
