"""Names of files, and files that are either whole or not there."""

import contextlib
import fcntl
import os
import re
import secrets
import stat
import time
from typing import Dict, Tuple

from goconv_tf.errors import UsageError

STREAM_EXTENSION, PICTURE_EXTENSION = ".gcv", ".png"
# Those of Pillow's formats that photographs come in.
PICTURE_EXTENSIONS: Tuple[str, ...] = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".avifs", ".bmp", ".dib", ".tif", ".tiff", ".gif")
PICTURE_EXTENSIONS += (".ppm", ".pgm", ".pnm", ".pbm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".qoi")


@contextlib.contextmanager
def alone_in(folder):
    """Inside, this process has the folder's lock; UsageError if another has it. Filesystems without locks let all in."""
    handle = os.open(os.path.join(folder, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)  # a file, as locks of folders do not reach other machines
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{folder}: another process is at work there") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def taking_turns(folder):
    """Processes of this machine are inside for a folder one after another; it leaves no file there. Filesystems without locks let all in."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def check_parent(path):
    """UsageError unless path can be written in the folder that it is in."""
    parent = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(parent):
        raise UsageError(f"{parent}: no such folder")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{parent}: cannot be written")


def check_new_folder(path):
    """UsageError if path is a file, or a folder that is not empty."""
    if os.path.exists(path) and (not os.path.isdir(path) or os.listdir(path)):
        raise UsageError(f"{path}: exists; name a new folder")


def atomic_write(path: str, data: bytes) -> None:
    """Writes data under a temporary name in the same folder, then renames it to path.

    A symbolic link keeps pointing where it does. OSError if path is a device, a pipe or a folder.
    """
    with staged(path, data) as temporary:
        os.replace(temporary, os.path.realpath(path))


def temporary_name(path) -> str:
    """A hidden name beside path, which nothing has."""
    name = os.fsencode(os.path.basename(path))[:200].decode(errors="ignore")  # with what is added, no longer than names may be
    return os.path.join(os.path.dirname(os.path.abspath(path)), f".{name}.{secrets.token_hex(8)}")


def remove_leftovers(folder, names):
    """Removes what processes that were killed while they wrote files of these names have left in a folder under a `temporary_name`."""
    for entry in os.listdir(folder):
        path, (name, _, ending) = os.path.join(folder, entry), entry.rpartition(".")
        with contextlib.suppress(OSError):  # an hour, as another machine may be at it
            if name[1:] in names and re.fullmatch("[0-9a-f]{16}", ending) and entry[0] == "." and time.time() - os.path.getmtime(path) > 3600:
                os.unlink(path)


@contextlib.contextmanager
def staged(path: str, data: bytes):
    """The name of a file beside path that holds data, to be renamed to it; removed if it was not."""
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{path}: is not a regular file")
    temporary = temporary_name(path)
    try:
        try:
            with open(temporary, "xb") as f:
                if os.path.exists(path):  # whoever may not read what is there is not to read what replaces it
                    os.fchmod(f.fileno(), stat.S_IMODE(os.stat(path).st_mode))
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise OSError(f"{path}: cannot be written: {error.strerror or error}") from error
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def plan(inputs, output_dir, extensions, new_extension):
    """[(input, output)] for files and folders of them.

    Two paths are taken as IN OUT, unless OUT has the name of an input.

    Raises:
      UsageError: if it is not clear what is meant, or two outputs would be the same.
    """
    if not output_dir and len(inputs) == 2 and not os.path.isdir(inputs[0]):
        if inputs[1].lower().endswith(extensions):
            raise UsageError(f"{inputs[1]}: is named like an input, not an output; several inputs need --output_dir")
        return [(inputs[0], inputs[1])]
    if not output_dir and (len(inputs) > 1 or os.path.isdir(inputs[0])):
        raise UsageError("several files or a folder need --output_dir")
    files = find_inputs(inputs, extensions)
    if not output_dir:
        return [(files[0], files[0] + new_extension)]
    pairs = [(path, os.path.join(output_dir, os.path.splitext(os.path.basename(path))[0] + new_extension)) for path in files]
    sources: Dict[str, str] = {}
    for path, out in pairs:
        if out in sources:
            raise UsageError(f"{sources[out]} and {path} would both be written to {out}")
        sources[out] = path
    return pairs


def find_inputs(inputs, extensions):
    """The files among inputs, and those of its folders that have one of the extensions and are not hidden; UsageError if a folder has none."""
    files = []
    for path in inputs:
        if os.path.isdir(path):
            found = sorted(os.path.join(path, name) for name in os.listdir(path) if name.lower().endswith(extensions) and not name.startswith("."))
            if not found:
                raise UsageError(f"{path}: no files with {', '.join(extensions)} in this folder")
            files += found
        else:
            files.append(path)
    return files
