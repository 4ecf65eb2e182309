"""QEMU's locks on an image file: QEMU and quorumfs keep off each other's images.

QEMU (``block/file-posix.c``) takes *shared* OFD locks on single bytes: byte 100+i says "I use
permission i", byte 200+i says "I do not let others use permission i". To start, a process takes
its own bytes and then tests, as if for an exclusive lock, that no other holds the opposite bytes.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from quorumfs.replica.ofdlock import could_lock, try_lock

_PERMISSION_BASE = 100
_UNSHARED_BASE = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # the numbers of QEMU's BLK_PERM_* bits


class ImageLockedError(Exception):
    """Another process uses the image in a way that excludes this mount."""


def lock_image(fd: int, *, read_only: bool) -> bool:
    """Take QEMU's locks on the open image *fd*, for as long as *fd* stays open.

    A writer uses reading, writing and resizing; a reader uses reading alone. Both exclude other
    writers. Returns False where the file system has no such locks.
    Raises `ImageLockedError` if another process excludes this use, or would have to be excluded.
    """
    used = [_CONSISTENT_READ] if read_only else [_CONSISTENT_READ, _WRITE, _RESIZE]
    unshared = [_WRITE, _RESIZE]
    ours = [_PERMISSION_BASE + bit for bit in used] + [_UNSHARED_BASE + bit for bit in unshared]
    opposite = [_UNSHARED_BASE + bit for bit in used] + [_PERMISSION_BASE + bit for bit in unshared]
    try:
        granted = all(try_lock(fd, byte, 1, exclusive=False) for byte in ours)
        if not granted or not all(could_lock(fd, byte, 1, exclusive=True) for byte in opposite):
            raise ImageLockedError
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def is_locked(file: tuple[int, int], *, read_only: bool) -> bool:
    """Whether a lock on the *file*, with this device and inode number, excludes our use of it, for
    which it need not be opened: that may be impossible by any path."""
    device, inode = file
    place = f"{os.major(device):02x}:{os.minor(device):02x}:{inode}"
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return False  # this /proc does not tell
    for words in map(str.split, locks.splitlines()):
        writes = "WRITE" in words or str(_PERMISSION_BASE + _WRITE) in words[-2:-1]
        if place in words and "FLOCK" not in words and (writes or not read_only):
            return True
    return False


def holders(fd: int) -> list[tuple[int, str]]:
    """The other processes that hold OFD locks on the file open at *fd*.

    Pairs of process id and name. OFD locks belong to no process, so the kernel cannot name the
    holder; but each descriptor's entry under ``/proc`` lists the locks taken through it. Other
    users' processes are not visible to an ordinary user.
    """
    status = os.fstat(fd)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    found = []
    for pid in _processes():
        with suppress(OSError):  # gone meanwhile, or another user's
            for entry in os.listdir(f"/proc/{pid}/fdinfo"):
                with open(f"/proc/{pid}/fdinfo/{entry}", encoding="ascii") as info:
                    text = info.read()
                if "OFDLCK" in text and inode in text:
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                        found.append((pid, comm.read().strip()))
                    break
    return found


def _processes() -> Iterator[int]:
    own = os.getpid()
    return (int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != own)
