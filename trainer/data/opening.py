"""What stands at a path, and opening it: only regular files are read, since a pipe or a device may never end.

Each fault of a path is an `InputError` that names it: no permission, a name too long, links that lead nowhere or in a circle.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO, Literal

from tritune.trainer.errors import InputError

_REMEDIES = {
    errno.EACCES: "Let the user who runs this read it and enter its folders (chmod), or give a copy",
    errno.EPERM: "Let the user who runs this read it and enter its folders (chmod), or give a copy",
    errno.ENAMETOOLONG: "Give the file a shorter name: most file systems take 255 bytes, and 4,096 for the whole path",
    errno.ELOOP: "Replace the link by the file itself: links here lead in a circle",
}
_KINDS = {
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def what_is(path: Path, place: str) -> Literal["file", "folder"] | None:
    """What stands at a path, links followed, without opening it; None where nothing does.

    Args:
        place: what a message names.

    Raises:
        InputError: it is neither a regular file nor a folder, is a file that may not be read, a link that leads nowhere, or
            the path cannot be followed or is not UTF-8.
    """
    try:
        place.encode()
    except UnicodeEncodeError:  # it could be opened, and neither printed nor written down
        raise InputError(
            ascii(place), "its name is not UTF-8", "Rename it, or give it by a link of another name"
        ) from None
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return None
        rule = f"it is a link to {os.readlink(path)}, which does not exist"
        raise InputError(place, rule, "Mend the link or remove it") from None
    except ValueError as error:  # a NUL in the name, which no file has
        raise InputError(ascii(place), f"no file has this name: {error}", "Remove the NUL from it") from None
    except OSError as error:
        raise cannot_open(place, error) from None
    if stat.S_ISDIR(mode):
        return "folder"
    _require_regular(mode, place)
    if not os.access(path, os.R_OK):
        raise cannot_open(place, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return "file"


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes, without ever waiting for somebody to write.

    Raises:
        InputError: it cannot be opened, or is no regular file.
    """
    what_is(path, str(path))
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # of a pipe put there since, too
    except OSError as error:
        raise cannot_open(str(path), error) from None
    file = os.fdopen(descriptor, "rb")
    try:
        _require_regular(os.fstat(descriptor).st_mode, str(path))
    except InputError:
        file.close()
        raise
    return file


def cannot_open(place: str, error: OSError) -> InputError:
    """What the system said of a path, and what helps against it."""
    remedy = _REMEDIES.get(error.errno or 0, "Give a file that can be read, or a copy on another disk")
    return InputError(place, f"it cannot be opened: {error.strerror or error}", remedy)


def _require_regular(mode: int, place: str) -> None:
    if not stat.S_ISREG(mode):
        rule = f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, and only regular files are read"
        raise InputError(place, rule, "Write what comes out of it into a file, and give that")
