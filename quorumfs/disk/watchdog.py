"""What a disk has to watch while no request comes."""

import trio

from quorumfs.disk.mirror import Mirror

TICK_S = 0.5
"""Seconds between looks at deadlines and held-back events: a timeout is noticed so much later."""


class Watchdog:
    """Watches deadlines, held-back events, and the claim on the set."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._inherited = list(mirror.ledger.unreadable)
        """Ranges that earlier mounts found unreadable (start, end; bytes), until they are told."""

    async def run(self) -> None:
        """Watch until cancelled.

        First the ranges that earlier mounts found unreadable are told: the daemon that found them
        may have died before telling.
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
                    replica.pardon(late, now)  # this process was starved, not the replica
                replica.abandon_overdue(now)
            self._mirror.announce_states()
            self._mirror.events.tick(now)
