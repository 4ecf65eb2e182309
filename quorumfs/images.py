"""Opening the replicas' image files, and every refusal that can be had before mounting."""

import fcntl
import logging
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from quorumfs.errors import UserError
from quorumfs.imagelock import ImageLockedError, holders, lock_image

log = logging.getLogger(__name__)

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True, slots=True)
class Image:
    """One replica's file, open, checked and locked."""

    path: str
    """As the user gave it, made absolute."""
    fd: int
    size: int
    """Bytes."""
    mtime_ns: int
    identity: tuple[int, int]
    """Device and inode number: the same for every path to the same file."""


def open_images(paths: Sequence[str], mountpoint: str, *, read_only: bool) -> list[Image]:
    """Open, check and lock the files at *paths*, to be the replicas of a disk at *mountpoint*.

    *mountpoint* is absolute and free of symbolic links. The caller owns the descriptors. Raises
    `UserError`, naming the path and the reason, if the files cannot be a disk's replicas.
    """
    with ExitStack() as stack:
        images: list[Image] = []
        for path in paths:
            image = _open(os.path.abspath(path), mountpoint, read_only)
            stack.callback(os.close, image.fd)
            for other in images:
                _refuse_pair(image, other)
            images.append(image)
        for image in images:
            _lock(image, read_only)
        stack.pop_all()
        return images


def _open(path: str, mountpoint: str, read_only: bool) -> Image:
    if os.path.realpath(path).startswith(mountpoint.rstrip("/") + "/"):
        raise UserError(f"{path} is inside the mount point {mountpoint}")
    try:
        _require_regular(path, os.stat(path))
        # Not blocking: between the look and the opening it may have become a FIFO.
        access = os.O_RDONLY if read_only else os.O_RDWR
        fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UserError(f"cannot open the replica {path}: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        _require_regular(path, status)
        if status.st_size == 0:
            raise UserError(f"{path} is empty: a replica must have the size of the disk")
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except BaseException:
        os.close(fd)
        raise
    return Image(
        path, fd, status.st_size, status.st_mtime_ns, identity=(status.st_dev, status.st_ino)
    )


def _require_regular(path: str, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise UserError(
            f"{path} is {_KINDS.get(kind, 'a special file')}: a replica must be a regular file"
        )


def _refuse_pair(image: Image, other: Image) -> None:
    if image.identity == other.identity:
        raise UserError(f"{other.path} and {image.path} are the same file")
    if image.size != other.size:
        raise UserError(
            f"replicas differ in size: {other.path} has {other.size} bytes, "
            f"{image.path} has {image.size}"
        )


def _lock(image: Image, read_only: bool) -> None:
    try:
        if not lock_image(image.fd, read_only=read_only):
            log.warning(
                "the file system of %s has no OFD locks: nothing keeps others from writing to it",
                image.path,
            )
    except ImageLockedError:
        who = ", ".join(f"pid {pid} ({name})" for pid, name in holders(image.fd))
        raise UserError(
            f"{image.path} is in use by {who or 'a process of another user or host'}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot lock {image.path}: {error.strerror}") from None
