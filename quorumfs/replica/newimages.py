"""New images: made sparse, and never over anything that may hold data."""

import errno
import os
import stat
from contextlib import ExitStack, suppress

from quorumfs.decisions.record import Identity
from quorumfs.replica.filesystems import close
from quorumfs.replica.imagelock import ImageLockedError, lock_image
from quorumfs.replica.images import lasting_identity

PRIVATE = 0o600
"""The mode of new images: they hold what a guest keeps from everybody."""


def make_image(path: str, size: int, mode: int, undo: ExitStack) -> Identity:
    """Make a sparse image, or take one that was never written to; *undo* takes it back.

    Raises `FileExistsError` if something is there that may hold anything, and other `OSError`.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
        undo.callback(remove, path)
    except FileExistsError:
        fd = _open_blank(path, size)
        undo.callback(_cut, path, os.fstat(fd).st_size)
    try:
        if os.fstat(fd).st_size == 0:  # else it has its mode
            _set_mode(fd, mode)
            os.ftruncate(fd, size)
        os.fsync(fd)
        return lasting_identity(fd)
    finally:
        close(fd, path)


def require_blank(path: str, size: int) -> None:
    """Raise `FileExistsError` if there is anything at *path* but what `make_image` would take."""
    close(_open_blank(path, size), path)


def _open_blank(path: str, size: int) -> int:
    """Open a file that is empty, or a hole of *size* bytes, and not in use: nothing is lost if it
    is taken for a new image. Raises `FileExistsError` for any other.
    """
    taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size not in (0, size):
        raise taken
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        lock_image(fd, read_only=False)
        blank = status.st_size == 0 or _is_hole(fd)
    except (ImageLockedError, OSError):
        blank = False
    if not blank:
        close(fd, path)
        raise taken
    return fd


def _is_hole(fd: int) -> bool:
    """Whether there is no data in a file, as far as its file system can tell."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        return error.errno == errno.ENXIO
    return False


def _set_mode(fd: int, mode: int) -> None:
    """Give a new file its *mode*, whatever the umask. Raises `OSError` if that cannot be."""
    try:
        os.fchmod(fd, mode)
    except OSError:
        if mode != PRIVATE:  # else the file system has no modes, and nobody asked for one
            raise


def remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


def _cut(path: str, size: int) -> None:
    with suppress(OSError):
        os.truncate(path, size)
