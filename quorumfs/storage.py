"""The narrow interface to one replica's file, and its implementation on a real file.

Everything above speaks to a file by submitting an `Operation` and being called back, so that a
test can put a simulated disk underneath, and so that asking N replicas at once costs no task each.
"""

import ctypes
import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Protocol

import trio

from quorumfs.sidecar import Identity, identity_of

log = logging.getLogger(__name__)

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16  # linux/falloc.h

WORKERS_MAX = 16
"""Threads per replica. Each replica has its own, so that a hung one starves nobody; as many as
a guest commonly keeps requests in flight on a disk."""


class Kind(Enum):
    """What an operation does; read, write and flush are QEMU's words for it in events."""

    READ = "read"
    WRITE = "write"
    DISCARD = "discard"
    """Make zeros, and give the space back."""
    ZERO = "zero"
    """Make zeros, and keep the space where the file system can."""
    ALLOCATE = "allocate"
    """Reserve space for what is a hole, where the file system can; no byte changes."""
    SYNC = "flush"
    STAT = "stat"
    SEAL = "seal"
    """Make everything durable, the file's times too, and then stat."""
    SEEK_DATA = "seek data"
    """Find the next byte at or after the offset that is not in a hole."""
    SEEK_HOLE = "seek hole"
    """Find the next byte at or after the offset that is in a hole, or the end."""


CHANGES = frozenset({Kind.WRITE, Kind.DISCARD, Kind.ZERO})
"""What changes bytes, which a flush then makes durable."""


class Operation:
    """One I/O on one replica's file, and afterwards its outcome.

    The outcome is filled in by the one who waits for it, in the trio thread, and only if the
    operation was not given up before it returned.
    """

    __slots__ = ("counts", "data", "error", "kind", "length", "offset", "value")

    def __init__(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self.kind = kind
        self.offset = offset
        """Bytes from the start of the disk."""
        self.length = length
        """Bytes."""
        self.data = data
        """What to write: exactly `length` bytes."""
        self.value: Value = b""
        """What a successful operation gave."""
        self.error: OSError | None = None
        """Why it failed; None after success."""
        self.counts = True
        """Whether its success makes a request more of a success."""


class FileStatus(NamedTuple):
    """What a stat of a file tells."""

    blocks: int
    """Of 512 bytes, allocated."""
    identity: Identity


Value = bytes | int | FileStatus
"""Of a read: exactly the bytes asked for. Of a stat and a seal: a `FileStatus`. Of a seek: the
offset, or the size of the disk if there is none. Else 0."""

Done = Callable[[Operation, Value, OSError | None], None]
"""Called once in the trio thread when an operation has returned."""


class TruncatedError(OSError):
    """The file is shorter than the disk: what was there is lost, and is not zeros."""

    def __init__(self, size: int) -> None:
        super().__init__(errno.EIO, f"the image was truncated to {size} bytes")


class Storage(Protocol):
    """One replica's file."""

    def submit(self, operation: Operation, done: Done) -> None:
        """Start *operation*; *done* is called in the trio thread, perhaps before this returns."""

    def close(self) -> None:
        """Stop. Nothing may be submitted afterwards; what is in flight may never call back."""


_FALLOCATE_MODES = {
    Kind.DISCARD: (_PUNCH_HOLE,),
    Kind.ZERO: (_ZERO_RANGE, _PUNCH_HOLE),
    Kind.ALLOCATE: (0,),
}
"""What to try, in this order, before zeros are written."""

_ZEROS = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)  # the os module has no fallocate with modes
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class FileStorage:
    """A regular file, read and written by the replica's own threads.

    Completions come back in batches: trio is woken once for all that finished meanwhile.
    Must be made inside `trio.run`.
    """

    def __init__(self, fd: int, size: int, name: str) -> None:
        """Take over the open *fd* of an image of *size* bytes; *name* is for thread names."""
        self._fd = fd
        self._size = size
        self._name = name
        self._token = trio.lowlevel.current_trio_token()
        self._queue: SimpleQueue[tuple[Operation, Done] | None] = SimpleQueue()
        self._finished: deque[tuple[Operation, Done, Value, OSError | None]] = deque()
        self._threads: list[Thread] = []
        self._in_flight = 0
        self._modes_missing: set[int] = set()
        """Modes of fallocate that this file system has been found not to have."""

    def submit(self, operation: Operation, done: Done) -> None:
        if self._in_flight >= len(self._threads) < WORKERS_MAX:
            # Daemon threads: one that hangs in a system call must not keep the process alive.
            thread = Thread(target=self._work, name=f"io {self._name}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads for us
                if not self._threads:
                    done(operation, 0, OSError(errno.EAGAIN, "no thread could be started"))
                    return
            else:
                self._threads.append(thread)
        self._in_flight += 1
        self._queue.put((operation, done))

    def close(self) -> None:
        for _ in self._threads:
            self._queue.put(None)
        if not self._in_flight:
            for thread in self._threads:
                thread.join()
            os.close(self._fd)
        # Else a thread is stuck in a system call on this descriptor: it stays open, because a
        # descriptor of the same number, opened meanwhile, would receive the late write.

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            operation, done = entry
            value: Value = 0
            error: OSError | None = None
            try:
                value = self._perform(operation)
            except OSError as caught:
                error = caught
            except Exception:
                log.exception("unexpected error in a worker of %s", self._name)
                error = OSError(errno.EIO, "internal error, see the log")
            self._finished.append((operation, done, value, error))
            del entry, operation, done, value, error  # an idle thread must not hold buffers
            try:
                self._token.run_sync_soon(self._deliver, idempotent=True)
            except trio.RunFinishedError:
                return  # the daemon is gone and nobody waits any more

    def _deliver(self) -> None:
        while self._finished:
            operation, done, value, error = self._finished.popleft()
            self._in_flight -= 1
            done(operation, value, error)

    def _perform(self, operation: Operation) -> Value:
        match operation.kind:
            case Kind.READ:
                return self._read(operation.offset, operation.length)
            case Kind.WRITE:
                self._refuse_if_truncated()
                self._write(operation.offset, operation.data)
            case Kind.DISCARD | Kind.ZERO | Kind.ALLOCATE:
                self._refuse_if_truncated()
                self._fallocate(operation.kind, operation.offset, operation.length)
            case Kind.SEEK_DATA | Kind.SEEK_HOLE:
                return self._seek(operation.kind, operation.offset)
            case Kind.SYNC:
                os.fdatasync(self._fd)
            case Kind.STAT:
                return self._status()
            case Kind.SEAL:
                os.fsync(self._fd)
                return self._status()
        return 0

    def _status(self) -> FileStatus:
        status = os.fstat(self._fd)
        return FileStatus(status.st_blocks, identity_of(status))

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise TruncatedError(os.fstat(self._fd).st_size)
            data += more
        return data

    def _refuse_if_truncated(self) -> None:
        # A write behind the end of a truncated file would make it long again, with a hole of
        # zeros where data was; and what is behind the end is no hole. (fstat, because seeking to
        # the end waits for writes in flight on a FUSE file system.)
        size = os.fstat(self._fd).st_size
        if size < self._size:
            raise TruncatedError(size)

    def _write(self, offset: int, data: bytes) -> None:
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):
            more = os.pwrite(self._fd, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.EIO, "a write made no progress")
            written += more

    def _fallocate(self, kind: Kind, offset: int, length: int) -> None:
        for mode in _FALLOCATE_MODES[kind]:
            if mode in self._modes_missing:
                continue
            number = errno.EINTR
            while number == errno.EINTR:
                if _libc.fallocate(self._fd, mode | _KEEP_SIZE, offset, length) == 0:
                    return
                number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(number, os.strerror(number))
            self._modes_missing.add(mode)
        if kind is not Kind.ALLOCATE:
            for start in range(offset, offset + length, len(_ZEROS)):
                self._write(start, _ZEROS[: offset + length - start])

    def _seek(self, kind: Kind, offset: int) -> int:
        self._refuse_if_truncated()
        data = kind is Kind.SEEK_DATA
        try:
            found = os.lseek(self._fd, offset, os.SEEK_DATA if data else os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._size
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                return offset if data else self._size  # it knows no holes: all is data
            raise
        return min(found, self._size)
