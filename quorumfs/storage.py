"""The narrow interface to one replica's file, and its implementation on a real file.

Everything above speaks to a file by submitting an `Operation` and being called back, so that a
test can put a simulated disk underneath, and so that asking N replicas at once costs no task each.
"""

import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from enum import Enum
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

import trio

log = logging.getLogger(__name__)

WORKERS_MAX = 16
"""Threads per replica. Each replica has its own, so that a hung one starves nobody; as many as
a guest commonly keeps requests in flight on a disk."""


class Kind(Enum):
    """What an operation does; the values are QEMU's words for it in events."""

    READ = "read"
    WRITE = "write"
    SYNC = "flush"
    STAT = "stat"


class Operation:
    """One I/O on one replica's file, and afterwards its outcome.

    The outcome is filled in by the one who waits for it, in the trio thread, and only if the
    operation was not given up before it returned.
    """

    __slots__ = ("data", "error", "kind", "length", "offset", "value")

    def __init__(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self.kind = kind
        self.offset = offset
        """Bytes from the start of the disk (reads and writes)."""
        self.length = length
        """Bytes (reads and writes)."""
        self.data = data
        """What to write: exactly `length` bytes."""
        self.value: Value = b""
        """What a successful operation gave."""
        self.error: OSError | None = None
        """Why it failed; None after success."""


Value = bytes | int
"""Of a read: exactly the bytes asked for. Of a stat: the 512-byte blocks allocated. Else 0."""

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
                self._write(operation.offset, operation.data)
            case Kind.SYNC:
                os.fdatasync(self._fd)
            case Kind.STAT:
                return os.fstat(self._fd).st_blocks
        return 0

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                raise TruncatedError(os.lseek(self._fd, 0, os.SEEK_END))
            data += more
        return data

    def _write(self, offset: int, data: bytes) -> None:
        # A write behind the end of a truncated file would make it long again, with a hole of
        # zeros where data was. Only pread and pwrite use this descriptor, so its position is free.
        size = os.lseek(self._fd, 0, os.SEEK_END)
        if size < self._size:
            raise TruncatedError(size)
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):
            more = os.pwrite(self._fd, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.EIO, "a write made no progress")
            written += more
