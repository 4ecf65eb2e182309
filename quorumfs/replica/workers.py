"""The threads that perform operations on one file.

Completions come back in batches: trio is woken once for all that finished meanwhile.
"""

import errno
import logging
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from time import perf_counter_ns

import trio

from quorumfs.replica.storage import Done, Kind, Operation, Value

log = logging.getLogger(__name__)

WORKERS_MAX = 16
"""Threads per replica. Each replica has its own, so that a hung one starves nobody; as many as
a guest commonly keeps requests in flight on a disk."""

_HOLDING = frozenset(
    {Kind.SEEK_DATA, Kind.SEEK_HOLE, Kind.REACH, Kind.DISCARD, Kind.ZERO, Kind.ALLOCATE}
)
"""What holds a lock of the file, that others want, while its file system looks where data is."""


class Workers:
    """Threads that do what *perform* does. Must be made inside `trio.run`."""

    def __init__(self, name: str, perform: Callable[[Operation], Value]) -> None:
        """*name* is for the names of threads; *perform* raises `OSError` if an operation fails."""
        self.in_flight = 0
        self.holding = 0
        """Operations in flight that hold a lock of the file: a write here and now would wait."""
        self.progress_at = 0
        """When a thread last began or ended something, by `perf_counter_ns`."""
        self._name = name
        self._perform = perform
        self._token = trio.lowlevel.current_trio_token()
        self._queue: SimpleQueue[tuple[Operation, Done] | None] = SimpleQueue()
        self._finished: deque[tuple[Operation, Done, Value, OSError | None]] = deque()
        self._threads: list[Thread] = []

    @property
    def returned(self) -> list[Operation]:
        """What threads have done, and nobody has heard of yet."""
        return [operation for operation, *_ in self._finished]

    def hand_over(self, operation: Operation, done: Done) -> None:
        """Have a thread perform *operation*, and *done* called in the trio thread.

        After `Kind.CLOSE` the threads end.
        """
        if self.in_flight >= len(self._threads) < WORKERS_MAX:
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
        if not self.in_flight:
            self.progress_at = perf_counter_ns()
        self.in_flight += 1
        self.holding += operation.kind in _HOLDING
        self._queue.put((operation, done))
        if operation.kind is Kind.CLOSE:
            for _ in self._threads:
                self._queue.put(None)

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
            self.in_flight -= 1
            self.holding -= operation.kind in _HOLDING
            self.progress_at = perf_counter_ns()
            done(operation, value, error)
