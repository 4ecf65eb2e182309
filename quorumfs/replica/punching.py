"""Zeros, holes, and reserved space in ranges of a file, as far as the file system can."""

import ctypes
import errno
import os
from time import perf_counter_ns

from quorumfs.replica.reach import LEAST, LONG_NS, Reach
from quorumfs.replica.regularfile import RegularFile
from quorumfs.replica.storage import Kind

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16  # linux/falloc.h

_FALLOCATE_MODES = {
    Kind.DISCARD: (_PUNCH_HOLE,),
    Kind.ZERO: (_ZERO_RANGE, _PUNCH_HOLE),
    Kind.ALLOCATE: (0,),
}
"""Modes of fallocate to try, in this order, before zeros are written."""

_ON_DEVICE = {Kind.DISCARD: (_PUNCH_HOLE, _ZERO_RANGE)}
"""The same where a block device differs: what cannot give space back still has the kernel, or the
device itself, write the zeros. A discard (``BLKDISCARD``) promises none."""

_ZEROS = bytes(1 << 20)

_WRITTEN_MAX = 64 << 20
"""Bytes of zeros written at a time where no hole can be made: more could exceed the replica
timeout. Only a file system that could punch before is asked for more."""

_libc = ctypes.CDLL(None, use_errno=True)  # the os module has no fallocate with modes
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Puncher:
    """Makes zeros of ranges of one file, and learns how far to go at a time.

    The methods may wait, and raise `OSError`.
    """

    def __init__(self, file: RegularFile) -> None:
        self._file = file
        self._modes = _FALLOCATE_MODES | (_ON_DEVICE if file.sector > 1 else {})
        self._modes_missing: set[int] = set()
        """Modes of fallocate that the file system was found to lack."""
        self._reach = Reach()
        self._measured = (0, 0, 0)
        """Start, end, and bytes of data of the last reach."""
        self._known_data = (0, 0)
        """Start and end (bytes) of the last piece of data found. A file system takes longer to find
        the end of a long piece, so the end is not sought for each reach. If part of the piece has
        become a hole, the reach is only shorter than possible."""

    def make_zeros(self, kind: Kind, offset: int, length: int) -> None:
        """Make zeros of a range, in the way of `Kind.DISCARD` or `Kind.ZERO`."""
        self._file.refuse_if_truncated()
        began = perf_counter_ns()
        # A device makes zeros of whole sectors only.
        sector, end = self._file.sector, offset + length
        low, high = -(-offset // sector) * sector, end // sector * sector
        if low >= high:
            self._write(offset, end)
        else:
            self._write(offset, low)
            if not self._fallocate(kind, low, high - low):
                if length > _WRITTEN_MAX:
                    raise OSError(errno.EOPNOTSUPP, "its file system makes no holes any more")
                self._write(low, high)
            self._write(high, end)
        start, end, data = self._measured
        exactly = (start, end) == (offset, offset + length)
        self._reach.took(length, data if exactly else 0, perf_counter_ns() - began)

    def _write(self, offset: int, end: int) -> None:
        """Write zeros from *offset* to *end*."""
        for start in range(offset, end, len(_ZEROS)):
            self._file.write(start, _ZEROS[: end - start])

    def allocate(self, offset: int, length: int) -> None:
        """Reserve space for the holes of a range, where the file system can."""
        self._file.refuse_if_truncated()
        self._fallocate(Kind.ALLOCATE, offset, length)

    def find_reach(self, offset: int, length: int) -> int:
        """Where to stop making zeros at one go; `_WRITTEN_MAX` bounds zeros that are written."""
        end, room = offset + min(length, self._reach.length), self._reach.data
        if _PUNCH_HOLE in self._modes_missing:
            end = min(end, offset + min(room, _WRITTEN_MAX))
        at, data = offset, 0
        until = perf_counter_ns() + LONG_NS
        while at < end and data < room and (at == offset or perf_counter_ns() < until):
            start, stop = self._known_data
            if not start <= at < stop:
                start = self._file.seek_data(at)
                stop = self._file.seek_hole(start) if start < end else end
                if start < end:
                    self._known_data = start, stop
            start = max(start, at)
            at = min(stop, start + room - data, end)
            if start < end:  # a piece of data costs something, however short it is
                data += max(at - start, LEAST)
        if at < offset + length:  # part of a block would keep its space
            at = max(at - at % LEAST, offset - offset % LEAST + LEAST)
        at = min(at, offset + length)
        self._measured = (offset, at, data)
        return at

    def _fallocate(self, kind: Kind, offset: int, length: int) -> bool:
        """Whether the file system has a mode for *kind*; raises `OSError` if the mode failed."""
        for mode in self._modes[kind]:
            if mode in self._modes_missing:
                continue
            number = errno.EINTR
            while number == errno.EINTR:
                with self._file.alone(offset, length):
                    if _libc.fallocate(self._file.fd, mode | _KEEP_SIZE, offset, length) == 0:
                        return True
                    number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(number, os.strerror(number))
            self._modes_missing.add(mode)
        return False
