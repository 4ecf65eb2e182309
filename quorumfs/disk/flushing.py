"""A flush that all share who ask for it meanwhile: group commit.

A flush waits for everything written before, whoever wrote it. So whoever asks for one while another
one is under way needs only one that begins later, and that one answers for all who wait by then.
"""

import errno
from collections.abc import Awaitable, Callable

import trio


class GroupFlush:
    """Runs flushes one after the other, each for everybody who asked before it began."""

    def __init__(self) -> None:
        self._lock = trio.Lock()
        self._begun = 0
        """How many flushes have begun."""
        self._error: OSError | None = None
        """Why the latest one failed."""

    @property
    def running(self) -> bool:
        """Whether a flush is under way."""
        return self._lock.locked()

    async def run(self, flush: Callable[[], Awaitable[None]]) -> None:
        """Wait for a *flush* that begins from now on, one's own or another caller's.

        Raises `OSError` as that one did.
        """
        asked = self._begun
        if self._lock.locked():
            await self._lock.acquire()
        else:
            self._lock.acquire_nowait()  # the other way costs a turn of the scheduler
        try:
            if self._begun == asked:
                self._begun += 1
                # What those who share this flush see should it end in any other way.
                self._error = OSError(errno.EIO, "the flush was not finished")
                try:
                    await flush()
                except OSError as error:
                    self._error = error
                else:
                    self._error = None
            # Else a whole flush has begun and ended since: it covers what was to be flushed.
            if self._error is not None:
                raise OSError(self._error.errno, self._error.strerror)
        finally:
            self._lock.release()
