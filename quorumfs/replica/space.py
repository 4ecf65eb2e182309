"""The free space of the replicas' stores, for ``df``.

Threads ask now and then, so that a store that does not answer does not hold up ``df``.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import trio

from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.looking import look_after
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Usage
from quorumfs.replica.ticks import Rhythm

LOOK_S, IDLE_LOOK_S = 5.0, 60.0
"""How often (seconds) each store is asked: of a disk in use, and of an idle one."""


class Space:
    """Looks after the free space of the stores of *replicas*, which may come and go."""

    def __init__(self, replicas: Callable[[], Sequence[Replica]], rhythm: Rhythm) -> None:
        self._replicas = replicas
        self._pause = partial(rhythm.until_tick, LOOK_S, IDLE_LOOK_S)
        self._known: dict[Replica, Usage] = {}
        """The last answer of each store."""
        self.allocated = 0
        """512-byte blocks allocated for a current replica, by the last answer."""

    @property
    def left(self) -> int | None:
        """Bytes that every member has space for; None if no store has answered.

        Members that share a store share its free space equally.
        """
        known = [
            self._known[replica]
            for replica in self._replicas()
            if replica.state.is_member and replica in self._known
        ]
        sharing = Counter(usage.device for usage in known)
        free = [(usage.free, sharing[usage.device]) for usage in known]
        return min((left // sharers for left, sharers in free if left is not None), default=None)

    async def run(self) -> None:
        """Ask each store again and again, until cancelled."""
        async with trio.open_nursery() as nursery:
            for replica in self._replicas():
                nursery.start_soon(self._ask, replica)
            nursery.start_soon(look_after, self._replicas, self._ask, self._pause)

    async def _ask(self, replica: Replica) -> None:
        image = replica.image
        if not isinstance(image, FileStorage) or replica.hung:
            return
        # One thread at a time for each replica, apart from the threads that requests need.
        told = await trio.to_thread.run_sync(
            image.usage, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1)
        )
        if told is not None:
            self._known[replica] = told
            if replica is next((r for r in self._replicas() if r.state.is_member), None):
                self.allocated = told.blocks
