"""Files that are there whole or not at all."""
import contextlib
import errno
import glob
import hashlib
import io
import itertools
import json
import os
import platform
import secrets
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

    Whatever goes wrong, the file that was there before stays, and the unfinished one is removed. Two programs that
    write the same file do it under two names.
    """
    if os.path.isdir(path):                                               # os.replace would blame the unfinished file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    new = unfinished(path)
    try:
        with open(new, mode.replace("w", "x"), **options) as file:
            lock(file, "flock")
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        flush_folder(os.path.dirname(path) or ".")
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise


def unfinished(path):
    """Return a new name for a file on its way to `path`. Remove what killed programs left: nobody has locked it."""
    for left in filter(os.path.isfile, glob.glob(glob.escape(path) + ".*.new")):
        with contextlib.suppress(OSError), open(left, "ab") as file:
            if lock(file, "flock"):
                os.remove(left)
    return f"{path}.{secrets.token_hex(4)}.new"


def check_regular(path):
    """Raise UserError if what has this name is no file: to open a pipe blocks, and a folder cannot be replaced."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file")


def keep_aside(path):
    """Rename what is damaged: what is written next must not replace it. Return its new name, without the folder."""
    kept = next(name for n in itertools.count(1) if not os.path.lexists(name := f"{path}.damaged-{n}"))
    os.rename(path, kept)
    return os.path.basename(kept)


def lock(file, kind="lockf", wait=False):
    """Lock a file that is open for writing, until it is closed or its process ends. Return False if it is locked
    already, None if this file system has no locks.

    "lockf" is not inherited by forked workers, which outlive a killed run by a second. "flock" also keeps out the other
    threads of this process.
    """
    try:
        if fcntl:
            getattr(fcntl, kind)(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return None


def flush_folder(folder):
    """Flush the names of the files in `folder` to the disk (POSIX)."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):          # a file system that cannot flush folders
                raise
        finally:
            os.close(number)


def keep(path, other):
    """Give a finished file a second name; copy it where the file system has no hard links."""
    new = unfinished(other)
    try:
        try:
            os.link(path, new)
        except OSError:
            shutil.copyfile(path, new)
            with open(new, "rb") as file:
                os.fsync(file.fileno())
        os.replace(new, other)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(new)
        raise


def writable_folder(path, flag):
    """Make the folder if needed and check that files can be written there. Raises UserError naming the flag."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror}") from None
    return path


def check_result(path, flag, ending):
    """Check that a result can be written to `path`: now, not after the work. Raises UserError naming the flag."""
    folder = os.path.dirname(path) or "."
    if not path.lower().endswith(ending):
        raise UserError(f"{flag} {path}: want a name that ends in {ending}")
    if not os.path.isdir(folder):
        raise UserError(f"{flag} {path}: its folder does not exist")
    if os.path.isdir(path):
        raise UserError(f"{flag} {path}: a folder has this name")
    writable_folder(folder, flag)


def open_lock(path):
    """Open the file that is locked. Raises UserError."""
    check_regular(path)
    try:
        return open(path, "a+")
    except OSError as error:                                              # a link that leads nowhere
        raise UserError(f"{path}: {error.strerror}") from None


def hold(folder):
    """Hold the folder of a run as long as the returned file is open. Raises UserError if another process holds it."""
    file = open_lock(os.path.join(folder, ".lock"))
    held = lock(file)
    if held is None:
        print(f"{folder}: there are no locks on this file system; train this run in one process only", file=sys.stderr)
    file.seek(0)
    if held is False:
        raise UserError(f"{folder}: another process is training this run ({file.read() or 'it has just begun'})")
    file.truncate()
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    return file


@contextlib.contextmanager
def one_at_a_time(path):
    """Let one process after the other read `path` and write it anew: none may lose what another one adds."""
    folder, name = os.path.split(path)
    with open_lock(os.path.join(folder, f".{name}.lock")) as file:
        lock(file, wait=True)
        yield


def prepare_output():
    """Print nothing where the output is closed (`train.py >&-`), and with escapes what its encoding lacks: neither must
    end a program. It lacks Cyrillic or ± where it is ASCII, and everywhere a name that is not UTF-8.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        if isinstance(stream, io.TextIOWrapper):                          # a test or a notebook may have put another
            stream.reconfigure(errors="backslashreplace")


def silence(stream):
    """Throw away what is still printed there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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
    """The dict in a JSON file; empty if there is none. A file that holds something else is kept aside, with a line."""
    check_regular(path)
    try:
        with open(path) as file:
            values = json.load(file)
        if isinstance(values, dict):
            return values
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:                # the last: brackets in brackets in brackets
        blame_machine(path, error)
    print(f"{path}: damaged; it is kept as {keep_aside(path)}", file=sys.stderr)
    return {}


def fingerprint(*things):
    """Return a short name for exactly these settings and bytes."""
    digest = hashlib.sha256()
    for thing in things:
        digest.update(thing if isinstance(thing, bytes) else repr(thing).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:12]
