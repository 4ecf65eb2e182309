"""Group commit: one flush for all callers that wait.

A flush covers everything written before the flush began, by any caller. Callers that ask during a
flush need only a flush that begins later, and a single one serves all callers waiting by then.
"""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class GroupFlush(Generic[T]):
    """Runs flushes one after the other, each for all callers that asked before the flush began.

    *T*: the result of a flush, which all its callers get; not None.
    """

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._begun = 0
        """How many flushes have begun."""
        self._outcome: T | OSError | None = None
        """The result of the latest flush, or why it failed; None: it was not finished."""

    @property
    def running(self) -> bool:
        """Whether a flush is under way."""
        return self._lock.locked()

    async def run(self, flush: Callable[[], Awaitable[T]]) -> T:
        """Wait for a flush that begins from now on: *flush*, or another caller's.

        Returns the result of that flush, or raises `OSError` as it did. A flush that is cancelled
        with its caller is no outcome: the next caller that waits begins another one.
        """
        asked = self._begun
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()  # the other way costs a turn of the scheduler
        try:
            if self._begun == asked or self._outcome is None:
                self._begun += 1
                self._outcome = None
                try:
                    self._outcome = await flush()
                except OSError as error:
                    self._outcome = error
            # Else a whole flush has begun and ended since, and covers this caller's writes.
            if isinstance(self._outcome, OSError):
                raise OSError(self._outcome.errno, self._outcome.strerror)
            return self._outcome
        finally:
            self._lock.release()
