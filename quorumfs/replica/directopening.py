"""Opening an image for O_DIRECT, where its store takes that, and whether to. May hang."""

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import suppress
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from pathlib import Path
from time import perf_counter_ns

from quorumfs.decisions.dirtymap import CHUNK_MIN
from quorumfs.decisions.replicaio import Medium, Store, Way, way_of
from quorumfs.decisions.sectors import SECTOR
from quorumfs.errors import UserError
from quorumfs.replica.directfile import Direct
from quorumfs.replica.filesystems import Locality

ALIGNMENT_MAX = CHUNK_MIN
"""Bytes, a multiple of any alignment that will do: a write to part of a block writes all of it, and
must stay in the chunk that is marked."""

_MEASURED = 5
"""How many places of an image are read to measure its store."""

_SYSFS = Path("/sys/dev/block")

_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_DIO_ALIGN = 0x98
"""The place of two 32-bit numbers in ``struct statx`` of ``statx(2)``: the alignment of memory, and
of offsets and lengths."""

_NETWORK_DEVICES = ("nbd", "rbd", "drbd")
"""Block devices whose names begin so have their data on another host."""

_libc = ctypes.CDLL(None, use_errno=True)


def open_direct(fd: int, path: str, asked: str, where: Locality) -> Direct | None:
    """What it takes to go past the page cache with the image *fd*; None: go through it.

    *asked* is the value of the option ``replica-io``. Raises `UserError` for ``direct`` where the
    file system refuses it, and `OSError`. The caller closes the descriptor.
    """
    if asked == Way.BUFFERED.value:
        return None
    direct = _opened(fd, where)
    try:
        measured = None
        if direct is not None and asked == "auto" and where is Locality.HERE:
            measured = _measured_us(direct)
        store = Store(_medium(fd, where), direct is not None, measured)
        way = way_of(asked, store)
        if way is None:
            raise UserError(
                f"option replica-io: got direct, but the file system of {path} refuses O_DIRECT: "
                "allowed are buffered, and auto, which takes direct where it can be had"
            )
        if way is Way.DIRECT:
            kept, direct = direct, None
            return kept
        return None
    finally:
        if direct is not None:
            os.close(direct.fd)


def _opened(fd: int, where: Locality) -> Direct | None:
    """A second descriptor of *fd*, with O_DIRECT; None if it cannot be had.

    Without O_DIRECT at first: a FUSE server that hands its flags on would have to align memory that
    is not ours. What is locked stays locked: the locks belong to *fd*.
    """
    access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    own = os.open(f"/proc/self/fd/{fd}", access | os.O_CLOEXEC)
    try:
        alignment = _alignment(own, where) if _set_direct(own) else None
    except BaseException:
        os.close(own)
        raise
    if alignment is None:
        os.close(own)
        return None
    return Direct(own, alignment)


def _set_direct(fd: int) -> bool:
    """Whether the file system lets *fd* have O_DIRECT, which it has then."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True


def _alignment(fd: int, where: Locality) -> int | None:
    """The alignment (bytes) that *fd* needs, told by the kernel or found by reading; None: there is
    none that would do."""
    told = _told_alignment(fd)
    if told is None:
        return _found_alignment(fd, where)
    memory, offset = told
    fits = memory <= PAGESIZE and offset > 0 and not ALIGNMENT_MAX % offset
    return offset if fits else None


def _told_alignment(fd: int) -> tuple[int, int] | None:
    """Of memory and of offsets, 0 if direct is impossible; None: before Linux 6.1, or the file
    system does not tell."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer):
        return None
    (mask,) = struct.unpack_from("<I", buffer)
    if not mask & _STATX_DIOALIGN:
        return None
    memory, offset = struct.unpack_from("<II", buffer, _DIO_ALIGN)
    return memory, offset


def _found_alignment(fd: int, where: Locality) -> int | None:
    """The least alignment with which a read is not refused.

    A store elsewhere may take any bytes. One of this host could only do so through the page cache.
    What is too fine after all is noticed when a request is refused: `DirectFile`.
    """
    size = os.fstat(fd).st_size
    alignment = 1 if where is Locality.ELSEWHERE else SECTOR
    buffer = memoryview(mmap(-1, ALIGNMENT_MAX, flags=MAP_PRIVATE | MAP_ANONYMOUS))
    while alignment <= ALIGNMENT_MAX:
        try:
            os.preadv(fd, [buffer[:alignment]], alignment if alignment < size else 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                alignment = max(2 * alignment, SECTOR)
                continue
            if error.errno == errno.EOPNOTSUPP:
                return None  # whatever else is wrong, the first request tells
        return alignment
    return None


def _measured_us(direct: Direct) -> float | None:
    """How long (microseconds) a small read of data takes, of several the median; None: no data."""
    buffer = memoryview(mmap(-1, ALIGNMENT_MAX, flags=MAP_PRIVATE | MAP_ANONYMOUS))
    length = max(direct.alignment, PAGESIZE)
    times = []
    with suppress(OSError):  # ENXIO: no data from there on
        size = os.fstat(direct.fd).st_size
        for place in range(_MEASURED):
            at = os.lseek(direct.fd, place * size // _MEASURED, os.SEEK_DATA)
            began = perf_counter_ns()
            os.preadv(direct.fd, [buffer[:length]], at - at % length)
            times.append((perf_counter_ns() - began) / 1000)
    return sorted(times)[len(times) // 2] if times else None


def _medium(fd: int, where: Locality) -> Medium:
    """What holds the image *fd*, which lies at *where*."""
    if where is not Locality.HERE:
        return Medium.MEMORY if where is Locality.MEMORY else Medium.ELSEWHERE
    number = os.fstat(fd).st_dev
    device = (_SYSFS / f"{os.major(number)}:{os.minor(number)}").resolve()
    if device.name.startswith(_NETWORK_DEVICES):
        return Medium.ELSEWHERE
    for disk in (device, device.parent):  # of a partition, the disk
        with suppress(OSError):
            text = (disk / "queue/rotational").read_text(encoding="ascii")
            return Medium.STEADY if text.strip() == "0" else Medium.ROTATING
    return Medium.UNKNOWN
