"""QEMU's locks on an image file, so that QEMU and we keep off each other's images.

QEMU (``block/file-posix.c``) takes *shared* OFD locks on single bytes: byte 100+i says "I use
permission i", byte 200+i says "I do not let others use permission i". To start, a process takes
its own bytes and then tests, as if for an exclusive lock, that nobody holds the opposite ones.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress

_PERMISSION_BASE = 100
_UNSHARED_BASE = 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3  # the numbers of QEMU's BLK_PERM_* bits

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid


class ImageLockedError(Exception):
    """Somebody else uses the image in a way that excludes ours."""


def lock_image(fd: int, *, read_only: bool) -> bool:
    """Take QEMU's locks on the open image *fd*, for as long as it stays open.

    A writer uses reading, writing and resizing and lets nobody else write or resize; a reader
    uses reading alone. Returns False where the file system has no such locks.
    Raises `ImageLockedError` if somebody excludes us or we would have to exclude them.
    """
    used = [_CONSISTENT_READ] if read_only else [_CONSISTENT_READ, _WRITE, _RESIZE]
    unshared = [_WRITE, _RESIZE]
    ours = [_PERMISSION_BASE + bit for bit in used] + [_UNSHARED_BASE + bit for bit in unshared]
    opposite = [_UNSHARED_BASE + bit for bit in used] + [_PERMISSION_BASE + bit for bit in unshared]
    try:
        for byte in ours:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        for byte in opposite:
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
            if struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK:
                raise ImageLockedError
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):  # an exclusive lock, not QEMU's way
            raise ImageLockedError from None
        if error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS):
            return False
        raise
    return True


def _flock(kind: int, byte: int) -> bytes:
    return struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)


def holders(fd: int) -> list[tuple[int, str]]:
    """The processes, ourselves apart, that hold OFD locks on the file open at *fd*.

    Pairs of process id and name. OFD locks belong to no process, so the kernel cannot name the
    holder; but each descriptor's entry under ``/proc`` lists the locks taken through it. Other
    users' processes are not visible to an ordinary user.
    """
    status = os.fstat(fd)
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} "
    found = []
    for pid in _processes():
        with suppress(OSError):  # gone meanwhile, or not ours to see
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
