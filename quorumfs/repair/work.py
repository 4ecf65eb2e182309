"""What every repair has in common: its way through the disk, its pace, and its progress.

A repair looks at *runs* of chunks. Runs are cut into *batches*, without common holes, and a batch
into *units*. A unit is locked at a time, several units on an idle disk. The size and number of
units follow the speed of the replicas. Work goes on in *rounds*; progress is made durable beside
them.
"""

import errno
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from quorumfs.decisions.model import RepairKind
from quorumfs.disk import holes, zeroing
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.dataplaces import next_data, seek
from quorumfs.repair.pacing import Pacer, Portion, Speed
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

PIECE = 1 << 20
"""Bytes read and written at a time."""

LARGE_UNIT = 4 << 20
"""Bytes locked at a time, at most, while no guest is at work; so many
that locking and asking cost little beside them."""

PARALLEL = 4
"""Units at a time, at most."""

LOCK_S = 0.1
"""How much longer (seconds) than the smallest unit the units at work may hold their locks, for
which a guest may wait."""

QUICK_S = 0.005
"""How long (seconds) a unit larger than a piece may hold its lock beside a guest."""

LIMIT_S = 0.1
"""Of how many seconds' work by the limit a unit larger than a piece may be."""

BATCH = 64 << 20
"""Bytes repaired between two syncs, at most."""

SYNC_S = 0.5
"""How much longer (seconds) than a sync of little data the sync of a portion may take."""

ROUND_S = 0.5
"""Seconds after which a round begins no more units."""

SAVE_S = 1.0
"""How often a repair's progress is made durable, at most (seconds)."""

SAVE_SHARE = 4
"""At most one second in this many is spent on making progress durable."""

HOLE_MAX = 1 << 19
"""Chunks that are passed over at a time; noting this many takes some milliseconds."""


@dataclass(slots=True)
class Progress:
    """The progress of a repair."""

    kind: RepairKind
    replica: str | None
    total_bytes: int
    began: float
    """trio's clock, seconds."""
    done_bytes: int = 0
    """Never more than the total: what is written meanwhile is copied, too."""
    speed: Speed = field(init=False)

    def __post_init__(self) -> None:
        self.speed = Speed(self.began)

    def advance(self, now: float, length: int) -> None:
        """Note that *length* bytes are done *now* (trio's clock, seconds)."""
        self.done_bytes = min(self.done_bytes + length, self.total_bytes)
        self.speed.worked(now, length)


class Work:
    """The work of one disk's repairs; one repair is done at a time."""

    def __init__(self, mirror: Mirror, sidecars: Sidecars, limit: int | None = None) -> None:
        """*limit*: bytes a second, at most."""
        self.mirror = mirror
        self.sidecars = sidecars
        self.ledger = sidecars.ledger
        self.map = sidecars.ledger.map
        self.progress: Progress | None = None
        self._pacer = Pacer(limit)
        self._locked = self._least_locked()
        """Bytes to be locked, in all units together."""
        self._quick = PIECE
        """Bytes of a unit that would hold its lock for `QUICK_S`."""
        self.unsynced = Portion(PIECE, BATCH, SYNC_S)
        """Bytes that a replica is given between two syncs."""
        self._stop = trio.Event()
        self._steered = trio.Event()
        """Ends a rest; replaced when the pace changes."""
        self._resync_paused = False
        self._save_at = 0.0
        """When progress is to be made durable again."""
        self._requests_seen = 0
        self._resume_at = 0.0
        """When work that is not urgent goes on."""

    @property
    def limit(self) -> int | None:
        """Bytes a second, at most; None: no limit."""
        return self._pacer.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._pacer = Pacer(limit)
        self._resume_at = 0.0  # after a low limit it may be far away
        self._end_rest()

    @property
    def resync_paused(self) -> bool:
        """Whether no replica is resynced; other repairs go on."""
        return self._resync_paused

    @resync_paused.setter
    def resync_paused(self, paused: bool) -> None:
        self._resync_paused = paused
        self._end_rest()

    @property
    def interruption(self) -> str | None:
        """Why the repair under way is to end, in words; None: it goes on."""
        if self.stopping:
            return "unmounting"
        resyncing = self.progress is not None and self.progress.kind is RepairKind.RESYNC
        return "the administrator paused the resync" if self._resync_paused and resyncing else None

    def _end_rest(self) -> None:
        self._steered.set()
        if not self.stopping:
            self._steered = trio.Event()

    @property
    def stopping(self) -> bool:
        """Whether to end as soon as possible."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Have all work that is not urgent end, with EINTR."""
        self._stop.set()
        self._steered.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, at most until repairs are to stop."""
        with trio.move_on_after(seconds):
            await self._stop.wait()

    def begin(self, kind: RepairKind, replica: str | None, total: int) -> None:
        """Show progress of a repair of *total* bytes, at most the disk; see `Progress`."""
        total = min(total, self.map.size)
        self.progress = Progress(kind, replica, total, trio.current_time())
        self._locked = self._least_locked()
        self.unsynced = Portion(PIECE, BATCH, SYNC_S)
        self._save_at = 0.0  # the first is saved at once, however soon the daemon dies

    @property
    def save_due(self) -> bool:
        """Whether progress was last made durable long ago."""
        return trio.current_time() >= self._save_at

    async def save(self) -> None:
        """Make the progress durable in the sidecars."""
        began = trio.current_time()
        await self.sidecars.joining.save_progress()
        ended = trio.current_time()
        self._save_at = ended + max(SAVE_S, (SAVE_SHARE - 1) * (ended - began))

    def _least_locked(self) -> Portion:
        chunk = self.map.chunk_size
        return Portion(chunk, max(chunk, PARALLEL * LARGE_UNIT), LOCK_S)

    def _parallel(self, *, urgent: bool = False) -> int:
        """Units to be worked on at a time; as many as allowed if a guest waits for all of them."""
        return PARALLEL if urgent else min(PARALLEL, self._locked.amount // self._locked.least)

    @asynccontextmanager
    async def locked(
        self, chunks: range, *, exclusive: bool = True
    ) -> AsyncIterator[Callable[[], None]]:
        """Hold the lock of a unit; yields a function to call if work was done under the lock.

        The time that the work took decides how large the next units may be. A unit that another
        task had finished before the lock was granted says nothing about that.
        """
        start, end = self.bounds(chunks)
        async with self.mirror.locks.held(start, end, exclusive=exclusive):
            began, parallel = trio.current_time(), self._parallel()

            def worked() -> None:
                now, size = trio.current_time(), self.map.chunk_size
                self._locked.took(parallel * (-(-(end - start) // size) * size), began, now)
                quick = int((end - start) * QUICK_S / max(now - began, QUICK_S / BATCH))
                self._quick = min(2 * self._quick + 1, quick)

            yield worked

    def bounds(self, chunks: range) -> tuple[int, int]:
        """The bytes where *chunks* begin and end."""
        return self.map.bounds_of(chunks)

    async def batches(
        self,
        runs: Iterable[range],
        pass_over: Callable[[range], None],
        make_hole: Callable[[range], Awaitable[None]] | None = None,
        *,
        urgent: bool = False,
    ) -> AsyncGenerator[deque[range], None]:
        """Batches of the chunks of *runs* in which some member has data, for `in_parallel`.

        Each batch is yielded until it is empty. *pass_over* gets the chunks that are a hole on all
        members, perhaps most of a large disk, while a lock keeps writers out. *make_hole*, if
        given, first makes such chunks a hole on the target of the resync, too.
        """
        size = self.map.chunk_size
        longest = max(1, BATCH // size)
        batch: deque[range] = deque()
        length = 0
        for run in runs:
            chunk = run.start
            while chunk < run.stop:
                if (why := self.interruption) and not urgent:
                    raise OSError(errno.EINTR, why)
                began = trio.current_time()
                resyncing = self.ledger.target if make_hole is not None else None
                target = None if resyncing is None else resyncing.replica
                stop, hole = await self._extent(chunk, run.stop, target)
                if hole:
                    held = self.mirror.locks.held(*self.bounds(range(chunk, stop)), exclusive=False)
                    async with held:  # a write under way may have changed the extent
                        stop, hole = await self._extent(chunk, stop, target)
                        if hole and make_hole is not None:
                            await make_hole(range(chunk, stop))
                        if hole:
                            pass_over(range(chunk, stop))
                    if make_hole is not None:
                        self._yield_to_guest(began)
                        await self._rest(float("inf"))
                if hole and self.progress is not None:
                    self.progress.advance(trio.current_time(), (stop - chunk) * size)
                for start in range(chunk, stop, longest) if not hole else ():
                    part = range(start, min(start + longest, stop))
                    batch.append(part)
                    length += len(part) * size
                    if length >= BATCH:
                        while batch:
                            yield batch
                        length = 0
                chunk = stop
        while batch:
            yield batch
        if not urgent:
            await self._rest(float("inf"))

    async def _extent(self, chunk: int, stop: int, target: Replica | None) -> tuple[int, bool]:
        """Where the data, or the hole on all members, that begins at *chunk* ends, at most *stop*.

        The second value says whether it is a hole. With a *target*, a hole ends where the target
        has data, or, if the target has data at *chunk*, where zeros cannot be made soon.
        """
        size = self.map.chunk_size
        offset = chunk * size
        data_at = await next_data(self.mirror, self.sidecars, offset)
        if data_at // size > chunk:
            stop = min(stop, data_at // size, chunk + HOLE_MAX)
            if target is not None:
                end = await seek(self.mirror, target, Kind.SEEK_DATA, offset)
                if end // size <= chunk:
                    end = await zeroing.reach(self.mirror, [target], offset, stop * size)
                stop = min(stop, max(chunk + 1, end // size))
            return stop, True
        end = await holes.next_hole(self.mirror, data_at)
        return min(stop, max(chunk + 1, -(-end // size))), False

    def units(self, chunks: range, longest: int | None = None) -> Iterator[range]:
        """Cut *chunks* into units of at most *longest* bytes (default: a piece), or one chunk."""
        step = max(1, (longest or PIECE) // self.map.chunk_size)
        for start in range(chunks.start, chunks.stop, step):
            yield range(start, min(start + step, chunks.stop))

    async def in_parallel(
        self,
        batch: deque[range],
        work: Callable[[range], Awaitable[None]],
        *,
        urgent: bool = False,
        large: bool = False,
        most: int = BATCH,
        beside: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Do one round: take units from *batch* and work on them, until *batch* is empty at most.

        Several units are done at a time on an idle disk, paced beside a guest. *urgent* work, for
        which a guest waits, goes at full speed and in whole pieces. *large* units save time. After
        *most* bytes no unit is begun. *beside* runs meanwhile. Raises the first error, after all
        that is under way has ended.
        """
        errors: list[Exception] = []
        until = trio.current_time() + ROUND_S
        left = most
        workers = 0

        async def watched(task: Awaitable[None]) -> None:
            try:
                await task
            except Exception as error:  # an internal error, too, must not break off a sync
                errors.append(error)

        def more() -> bool:
            return bool(batch) and left > 0 and not errors and trio.current_time() < until

        async def worker() -> None:
            nonlocal workers
            while more() and workers <= self._parallel(urgent=urgent):
                await one_unit()
                add_workers()
            workers -= 1

        def add_workers() -> None:
            nonlocal workers
            while more() and workers < self._parallel(urgent=urgent):
                workers += 1
                nursery.start_soon(worker)

        async def one_unit() -> None:
            nonlocal left
            if (why := self.interruption) and not urgent:
                errors.append(OSError(errno.EINTR, why))
                return
            if not urgent and await self._rest(until):
                return
            if not batch:
                return
            unit = self._next_unit(batch, LARGE_UNIT if large else PIECE, urgent=urgent)
            start, end = self.bounds(unit)
            left -= end - start
            began = trio.current_time()
            if not urgent:  # before the work, or all workers would begin at once
                self._rest_until(self._pacer.pay(began, end - start))
            await watched(work(unit))
            if errors or urgent:
                return
            if self.progress is not None:
                self.progress.advance(trio.current_time(), end - start)
            self._yield_to_guest(began)

        async with trio.open_nursery() as nursery:
            add_workers()
            if beside is not None:
                nursery.start_soon(watched, beside())
        if errors:
            raise errors[0]

    def _next_unit(self, batch: deque[range], longest: int, *, urgent: bool) -> range:
        if self.limit is not None:
            longest = min(longest, max(PIECE, int(self.limit * LIMIT_S)))
        if self.mirror.requests != self._requests_seen:
            longest = min(longest, max(PIECE, self._quick))
        if not urgent:
            longest = min(longest, self._locked.amount // self._parallel())
        run = batch.popleft()
        unit = next(self.units(run, longest))
        if unit.stop < run.stop:
            batch.appendleft(range(unit.stop, run.stop))
        return unit

    def _yield_to_guest(self, began: float) -> None:
        requests = self.mirror.requests
        if requests != self._requests_seen:
            self._rest_until(self._pacer.rest_for_guest(began, trio.current_time()))
        self._requests_seen = requests

    def _rest_until(self, time: float) -> None:
        self._resume_at = max(self._resume_at, time)

    async def _rest(self, until: float) -> bool:
        """Rest until work may go on, or until *until*; whether there was need to."""
        pause = min(self._resume_at, until) - trio.current_time()
        if pause > 0:
            with trio.move_on_after(pause):
                await self._steered.wait()
        return pause > 0


def pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths of at most `PIECE` bytes that make up ``[start, end)``."""
    for offset in range(start, end, PIECE):
        yield offset, min(PIECE, end - offset)
