"""The threads that perform operations on one file.

Completions come back in batches: trio is woken once for all operations that ended meanwhile.
"""

import errno
import logging
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread

import trio

from quorumfs.replica.storage import Done, Kind, Operation, Value

log = logging.getLogger(__name__)

WORKERS_MAX = 16
"""Threads per replica: as many as a guest commonly keeps requests in flight. Each replica has its
own threads, so that a hung replica does not starve the rest."""


class Workers:
    """Threads that call *perform* for operations. Must be made inside `trio.run`."""

    def __init__(self, name: str, perform: Callable[[Operation], Value]) -> None:
        """*name* is for the names of threads; *perform* raises `OSError` if an operation fails."""
        self.in_flight = 0
        self._name = name
        self._perform = perform
        self._token = trio.lowlevel.current_trio_token()
        self._queue: SimpleQueue[tuple[Operation, Done] | None] = SimpleQueue()
        self._finished: deque[tuple[Operation, Done, Value, OSError | None]] = deque()
        self._threads: list[Thread] = []

    @property
    def returned(self) -> list[Operation]:
        """Operations that a thread has done, and that are not delivered yet."""
        # Of a copy, for threads add to it meanwhile.
        return [operation for operation, *_ in self._finished.copy()]

    def hand_over(self, operation: Operation, done: Done) -> None:
        """Have a thread perform *operation*, and *done* called in the trio thread.

        After `Kind.CLOSE` the threads end.
        """
        if self.in_flight >= len(self._threads) < WORKERS_MAX:
            # A daemon thread, which may hang in a system call without keeping the process alive.
            thread = Thread(target=self._work, name=f"io {self._name}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads for us
                if not self._threads:
                    done(operation, 0, OSError(errno.EAGAIN, "no thread could be started"))
                    return
            else:
                self._threads.append(thread)
        self.in_flight += 1
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
                return  # the daemon has ended

    def _deliver(self) -> None:
        while self._finished:
            operation, done, value, error = self._finished.popleft()
            self.in_flight -= 1
            done(operation, value, error)
