"""What a disk has to look after while nobody asks for anything."""

import trio

from quorumfs.disk.mirror import Mirror

TICK_S = 0.5
"""How often deadlines and held-back events are looked at: how late a timeout may be noticed."""


class Watchdog:
    """Watches over deadlines, held-back events, and whose the set is."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._inherited = list(mirror.ledger.unreadable)
        """What earlier mounts found to be unreadable (start, end; bytes), until it is told."""

    async def run(self) -> None:
        """Watch until cancelled.

        First it is told what was found to be unreadable in earlier mounts: the one that found it
        may have died before it could tell.
        """
        inherited, self._inherited = self._inherited, []
        for start, end in inherited:
            self._mirror.events.unreadable(start, end - start)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mirror.metadata.watch)
            await self._tick()

    async def _tick(self) -> None:
        before = trio.current_time()
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            late = now - before - TICK_S
            before = now
            for replica in self._mirror.replicas:
                if late > TICK_S:
                    replica.pardon(late)  # this process was stopped, or starved: not the replica
                replica.abandon_overdue(now)
            self._mirror.announce_states()
            self._mirror.events.tick(now)
