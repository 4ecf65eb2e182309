"""Group commit: one flush for all callers that wait.

A flush covers everything written before the flush began, by any caller. Callers that ask during a
flush need only a flush that begins later, and a single one serves all callers waiting by then.
"""

import errno
from collections.abc import Awaitable, Callable

import trio


class GroupFlush:
    """Runs flushes one after the other, each for all callers that asked before the flush began."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._begun = 0
        """How many flushes have begun."""
        self._error: OSError | None = None
        """Why the latest flush failed."""

    @property
    def running(self) -> bool:
        """Whether a flush is under way."""
        return self._lock.locked()

    async def run(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Wait for a flush that begins from now on: *flush*, or another caller's.

        Raises `OSError` as that flush did.
        """
        asked = self._begun
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()  # the other way costs a turn of the scheduler
        try:
            if self._begun == asked:
                self._begun += 1
                # For the callers that share this flush, should it end in any other way.
                self._error = OSError(errno.EIO, "the flush was not finished")
                try:
                    await flush()
                except OSError as error:
                    self._error = error
                else:
                    self._error = None
            # Else a whole flush has begun and ended since, and covers this caller's writes.
            if self._error is not None:
                raise OSError(self._error.errno, self._error.strerror)
        finally:
            self._lock.release()
