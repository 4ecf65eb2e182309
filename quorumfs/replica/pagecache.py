"""What the page cache holds of a file, asked without waiting."""

import ctypes
import errno
import os

_libc = ctypes.CDLL(None, use_errno=True)


def answers_from_cache(fd: int) -> bool:
    """Whether the file system answers a read from its page cache, or else says so at once."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return True


class _CacheRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = (("cached", ctypes.c_uint64), ("others", ctypes.c_uint64 * 4))


_CACHESTAT = 451  # the same on all architectures but Alpha
_PAGE = os.sysconf("SC_PAGESIZE")
_asked, _found = _CacheRange(), _CacheStat()  # the trio thread's: to make them takes longer
_asked_and_found = (ctypes.byref(_asked), ctypes.byref(_found), 0)


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether all of a range is in the page cache, or the kernel (before 6.5) cannot tell."""
    _asked.offset, _asked.length = offset, length
    if _libc.syscall(_CACHESTAT, fd, *_asked_and_found):
        return True
    return bool(_found.cached > (offset + length - 1) // _PAGE - offset // _PAGE)
