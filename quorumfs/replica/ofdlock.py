"""Open file description locks: held by a descriptor, dropped by the kernel at its close.

Locks end with their process, however it ends. Unlike classic locks, they are not lost when another
part of the process opens and closes the same file.
"""

import errno
import fcntl
import os
import struct

_FLOCK = "hhqqi4x"  # struct flock: type, whence, start, length, pid


def try_lock(fd: int, start: int, length: int, *, exclusive: bool) -> bool:
    """Lock bytes of the open file *fd*, to the end if *length* is 0; False if others hold them.

    Raises `OSError` where the file system has no such locks.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(start, length, exclusive))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def could_lock(fd: int, start: int, length: int, *, exclusive: bool) -> bool:
    """Whether `try_lock` would succeed now, without trying."""
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(start, length, exclusive))
    return bool(struct.unpack(_FLOCK, answer)[0] == fcntl.F_UNLCK)


def _flock(start: int, length: int, exclusive: bool) -> bytes:
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    return struct.pack(_FLOCK, kind, os.SEEK_SET, start, length, 0)
