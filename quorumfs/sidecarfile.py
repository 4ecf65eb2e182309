"""The sidecar as a file: found beside an image, locked, read, created."""

import errno
import os
import stat
from contextlib import suppress

from quorumfs.filesystems import close
from quorumfs.ofdlock import try_lock
from quorumfs.sidecar import HOLDER_OFFSET, PAGE, SUFFIX, Sidecar, decode, encode, path_for

READ_MAX = 1 << 30
"""Bytes: no sidecar is nearly as large."""


class SidecarLockedError(Exception):
    """Another quorumfs has this replica in use; the message names it."""


def open_sidecar(image_path: str, *, read_only: bool) -> int | None:
    """Open and lock the sidecar of the image at *image_path*; None if there is none.

    The descriptor returned holds the lock: exclusive, or shared if *read_only*. Raises
    `SidecarLockedError`, and `OSError` if it cannot be opened.
    """
    access = os.O_RDONLY if read_only else os.O_RDWR
    path = path_for(image_path)
    try:
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if os.path.islink(path):  # then there is one, and its store is away
            raise OSError(errno.ENOENT, "a symbolic link to nothing") from None
        return None
    try:
        lock(fd, read_only=read_only)
    except BaseException:
        close(fd, path)
        raise
    return fd


def misplaced(given: str) -> str | None:
    """Why the image at the path *given* must not be taken for one without a sidecar.

    Earlier versions looked for it beside the path given, so it may lie beside a symbolic link.
    To be asked where there is none beside the image. Raises `OSError`.
    """
    place, stray = path_for(given), given + SUFFIX
    try:
        if place == stray or not stat.S_ISREG(os.stat(stray).st_mode):
            return None
    except FileNotFoundError:
        return None
    return (
        f"{stray} lies beside a symbolic link, and belongs beside the image: if it is of this "
        f"image, move it to {place}, else remove it"
    )


def lock(fd: int, *, read_only: bool) -> None:
    """Take the lock on the whole sidecar open at *fd*, where the file system has such locks."""
    try:
        granted = try_lock(fd, 0, 0, exclusive=not read_only)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS):
            return
        raise
    if not granted:
        raise SidecarLockedError(holder(fd) or "another quorumfs")


def read_sidecar(fd: int) -> Sidecar:
    """Read and understand the sidecar open at *fd*.

    Raises `quorumfs.sidecar.FormatError`, and `OSError` if it cannot be read.
    """
    size = os.fstat(fd).st_size
    if size > READ_MAX:
        raise OSError(errno.EFBIG, "larger than any sidecar")
    content = bytearray()
    while len(content) < size:
        piece = os.pread(fd, size - len(content), len(content))
        if not piece:
            break
        content += piece
    return decode(bytes(content))


def create_sidecar(image_path: str, sidecar: Sidecar) -> None:
    """Write a whole sidecar so that after a crash there is all of it, or what was there before.

    A name of its own first, then renamed; both the file and its directory are synced.
    """
    path = os.path.realpath(path_for(image_path))  # it may be a link itself, and remain one
    temporary = f"{path}.tmp"
    mode = os.stat(image_path).st_mode & 0o666
    with suppress(FileNotFoundError):  # somebody was killed here
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            content = memoryview(encode(sidecar))
            while content:
                content = content[os.write(fd, content) :]
            os.fsync(fd)
        finally:
            close(fd, path)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(directory)
    finally:
        close(directory, os.path.dirname(path))


def holder(fd: int) -> str:
    """Who said last that the set is in use: host and process id, for a reader."""
    text = os.pread(fd, PAGE, HOLDER_OFFSET).split(b"\0", 1)[0]
    return text.decode(errors="replace").strip()


def sign(fd: int, text: str) -> None:
    """Leave word of who has the set in use, for a mount that is refused meanwhile."""
    os.pwrite(fd, text.encode()[: PAGE - 1].ljust(PAGE, b"\0"), HOLDER_OFFSET)
