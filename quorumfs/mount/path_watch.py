"""Whether the replicas' paths still lead to the files in use.

A file that was removed or renamed takes every write as before, and no request ever fails. But the
next mount will not find it; so it has to be said while it is there.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial

import trio

from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.looking import look_after
from quorumfs.replica.replica import Replica
from quorumfs.replica.ticks import Rhythm

log = logging.getLogger(__name__)

LOOK_S, IDLE_LOOK_S = 5.0, 60.0
"""How often (seconds) each path is looked at: of a disk in use, and of an idle one."""


class PathWatch:
    """Looks after the paths of *replicas*, which may come and go."""

    def __init__(self, replicas: Callable[[], Sequence[Replica]], rhythm: Rhythm) -> None:
        self._replicas = replicas
        self._pause = partial(rhythm.until_tick, LOOK_S, IDLE_LOOK_S)
        self.astray: dict[Replica, str] = {}
        """Those whose path leads elsewhere, as far as known, and where."""

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        await look_after(self._replicas, self._look_at, self._pause)

    async def look(self) -> None:
        """Look at all paths once. A file system that hangs makes this wait: set a deadline."""
        async with trio.open_nursery() as nursery:
            for replica in self._replicas():
                nursery.start_soon(self._look_at, replica)

    async def _look_at(self, replica: Replica) -> None:
        image = replica.image
        reason = None
        if isinstance(image, FileStorage) and not replica.hung:
            # One thread at a time for each replica, and none of those that others wait for.
            reason = await trio.to_thread.run_sync(
                image.astray, replica.path, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
            )
        if reason is None or replica.image is not image:
            self.astray.pop(replica, None)
            return
        if replica not in self.astray:
            log.warning("%s: %s", replica.path, reason)
        self.astray[replica] = reason
