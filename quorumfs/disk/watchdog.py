"""What a disk has to watch while no request comes."""

import trio

from quorumfs.decisions.slowness import slow_ones
from quorumfs.disk.mirror import Mirror
from quorumfs.replica.health import Sort
from quorumfs.replica.ticks import next_tick

TICK_S = 0.5
"""Seconds between looks at deadlines and held-back events: a timeout is noticed so much later."""

QUIET_S = 2.0
"""Seconds without a request of the guest after which the disk is idle. It counts as in use, too,
while an operation on a replica takes longer than `TICK_S`, or a replica is to become current."""

COMPARED_EVERY_S = 10.0
"""Seconds between comparisons of how long replicas take."""

COMPARED_FROM = 50
"""Requests of one sort that a replica must have answered lately to be compared."""


class Watchdog:
    """Watches deadlines, held-back events, the claim on the set, and whether anybody uses it."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._inherited = list(mirror.ledger.unreadable)
        """Ranges that earlier mounts found unreadable (start, end; bytes), until they are told."""
        self._compared_at = 0.0
        self._used_at = 0.0
        self._requests = mirror.requests
        """Requests of the guest by then."""

    async def run(self) -> None:
        """Watch until cancelled.

        First the ranges that earlier mounts found unreadable are told: the daemon that found them
        may have died before telling.
        """
        inherited, self._inherited = self._inherited, []
        for start, end in inherited:
            self._mirror.events.unreadable(start, end - start)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._mirror.metadata.watch, self._mirror.rhythm)
            await self._tick()

    async def _tick(self) -> None:
        due = next_tick(TICK_S)
        while True:
            await trio.sleep_until(due)
            now = trio.current_time()
            late = now - due
            self._note_use(now)
            due = next_tick(self._pause_s)  # before the rest, which counts as well if it takes long
            for replica in self._mirror.replicas:
                if late > TICK_S:
                    replica.pardon(late, now)  # this process was starved, not the replica
                replica.abandon_overdue(now)
            self._mirror.announce_states()
            if now - self._compared_at >= COMPARED_EVERY_S:
                self._compared_at = now
                for sort in (Sort.READ, Sort.WRITE, Sort.FLUSH):
                    self._compare(sort)
            self._mirror.events.tick(now)

    @property
    def _pause_s(self) -> float:
        """Shorter than a replica timeout, even while the disk is idle: an operation that begins in
        it is seen before its time is over, and before a process that was starved for nearly as
        long blames the replica."""
        timeouts = (replica.timeout_s - 2 * TICK_S for replica in self._mirror.replicas)
        return min(self._mirror.rhythm.period_s(TICK_S), max(TICK_S, min(timeouts, default=TICK_S)))

    def _note_use(self, now: float) -> None:
        """See whether the disk is in use at *now*."""
        used = self._mirror.requests != self._requests or any(
            replica.state.is_coming
            or replica.state.is_retried
            or ((waiting := replica.waiting) is not None and now - waiting[1] > TICK_S)
            for replica in self._mirror.replicas
        )
        if used:
            self._requests, self._used_at = self._mirror.requests, now
        self._mirror.rhythm.idle = now - self._used_at >= QUIET_S

    def _compare(self, sort: Sort) -> None:
        """Note which members take much longer than others for operations of this *sort*."""
        medians = {}
        for replica in self._mirror.ledger.readers:
            latency = replica.health.latency[sort]
            unread = sort is Sort.READ and replica.path in self._mirror.read_order.write_mostly
            if latency.count >= COMPARED_FROM and not unread:
                medians[replica] = latency.percentile(0.5)
        before = self._mirror.read_order.slow.get(sort, {})
        slow = self._mirror.read_order.slow[sort] = slow_ones(medians, before)
        for replica in slow.keys() - before.keys():
            self._mirror.events.slow(replica.path, sort.value, slow[replica])
