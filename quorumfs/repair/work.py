"""What every repair has in common: its way through the disk, its pace, and its progress.

A repair looks at *runs* of chunks. They are cut into *batches* without what is a hole everywhere,
and a batch into *units*: what is locked at a time, several of them on an idle disk. How large and
how many they are follows the speed of the replicas. Work goes on in *rounds*, beside which progress
is made durable.
"""

import errno
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from quorumfs.disk import holes, zeroing
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.pacing import Pacer, Portion
from quorumfs.repair.replica_io import next_data, seek
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

PIECE = 1 << 20
"""Bytes read and written at a time."""

LARGE_UNIT = 4 << 20
"""Bytes locked at a time, at most, while no guest is at work: so many that to ask costs little
beside them."""

PARALLEL = 4
"""Units at a time, at most."""

LOCK_S = 0.1
"""Units are so small, and so few, that what they lock is locked for no longer (seconds) than the
smallest one takes, and this: a guest may wait for it."""

BATCH = 64 << 20
"""Bytes repaired between two syncs, at most."""

SYNC_S = 0.5
"""It is so much that a sync takes no longer (seconds) than one that has little to do, and this."""

ROUND_S = 0.5
"""How long a round takes at most (seconds)."""

SAVE_S = 1.0
"""How often a repair's progress is made durable (seconds)."""

SAVE_SHARE = 4
"""But it is not at work on that for more than one in so many seconds."""

HOLE_MAX = 1 << 19
"""Chunks that are passed over at a time: to note that of each takes some milliseconds."""


@dataclass(slots=True)
class Progress:
    """What a repair is at."""

    kind: str
    """``settle``, ``resync`` or ``verify``."""
    replica: str | None
    total_bytes: int
    began: float
    """trio's clock, seconds."""
    done_bytes: int = 0


class Work:
    """The work of one disk's repairs, of which one is done at a time."""

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
        self.unsynced = Portion(PIECE, BATCH, SYNC_S)
        """Bytes that a replica is given between two syncs."""
        self._stop = trio.Event()
        self._save_at = 0.0
        """When progress is to be made durable again."""
        self._requests_seen = 0
        self._resume_at = 0.0
        """Until then all rest, for what was done so far."""

    @property
    def limit(self) -> int | None:
        """Bytes a second, at most; None: no limit."""
        return self._pacer.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._pacer = Pacer(limit)

    @property
    def stopping(self) -> bool:
        """Whether to end as soon as possible."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Have all work but the urgent end, with EINTR."""
        self._stop.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, at most until there is no more to be done."""
        with trio.move_on_after(seconds):
            await self._stop.wait()

    def begin(self, kind: str, replica: str | None, total: int) -> None:
        """Show progress of a repair of *total* bytes; `Progress` has what the words are."""
        total = min(total, self.map.size)
        self.progress = Progress(kind, replica, total, trio.current_time())
        self._locked = self._least_locked()
        self.unsynced = Portion(PIECE, BATCH, SYNC_S)
        self._save_at = 0.0  # the first is saved at once: however soon we die, something is done

    @property
    def save_due(self) -> bool:
        """Whether progress was last made durable long ago."""
        return trio.current_time() >= self._save_at

    async def save(self) -> None:
        """Have the sidecars know how far we are."""
        began = trio.current_time()
        await self.sidecars.joining.save_progress()
        ended = trio.current_time()
        self._save_at = ended + max(SAVE_S, (SAVE_SHARE - 1) * (ended - began))

    def _least_locked(self) -> Portion:
        chunk = self.map.chunk_size
        return Portion(chunk, max(chunk, PARALLEL * LARGE_UNIT), LOCK_S)

    def _parallel(self, *, urgent: bool = False) -> int:
        """Units to be worked on at a time: all at once if somebody waits for all of them."""
        return PARALLEL if urgent else min(PARALLEL, self._locked.amount // self._locked.least)

    @asynccontextmanager
    async def locked(
        self, chunks: range, *, exclusive: bool = True
    ) -> AsyncIterator[Callable[[], None]]:
        """The lock of a unit, and what to call when something was done under it.

        How long that took says how large the next units may be. A unit that somebody else was done
        with meanwhile tells nothing.
        """
        start, end = self.bounds(chunks)
        async with self.mirror.locks.held(start, end, exclusive=exclusive):
            began, parallel = trio.current_time(), self._parallel()

            def worked() -> None:
                whole = -(-(end - start) // self.map.chunk_size) * self.map.chunk_size
                self._locked.took(parallel * whole, began, trio.current_time())

            yield worked

    def bounds(self, chunks: range) -> tuple[int, int]:
        """Where *chunks* begin and end, bytes."""
        return self.map.bounds_of(chunks)

    async def batches(
        self,
        runs: Iterable[range],
        pass_over: Callable[[range], None],
        make_hole: Callable[[range], Awaitable[None]] | None = None,
        *,
        urgent: bool = False,
    ) -> AsyncGenerator[deque[range], None]:
        """Batches of those chunks of *runs* in which some replica has data, for `in_parallel`.

        Each is yielded until it is empty.
        *pass_over* is told, while nobody can write there, of those that are a hole on all: most of
        a large disk may be. Asked are the current replicas; *make_hole* makes them a hole on the
        one that is being resynced, too.
        """
        size = self.map.chunk_size
        longest = max(1, BATCH // size)
        batch: deque[range] = deque()
        length = 0
        for run in runs:
            chunk = run.start
            while chunk < run.stop:
                if self.stopping and not urgent:
                    raise OSError(errno.EINTR, "unmounting")
                began = trio.current_time()
                resyncing = self.ledger.target if make_hole is not None else None
                target = None if resyncing is None else resyncing.replica
                stop, hole = await self._extent(chunk, run.stop, target)
                if hole:
                    held = self.mirror.locks.held(*self.bounds(range(chunk, stop)), exclusive=False)
                    async with held:  # a write under way may have made it another
                        stop, hole = await self._extent(chunk, stop, target)
                        if hole and make_hole is not None:
                            await make_hole(range(chunk, stop))
                        if hole:
                            pass_over(range(chunk, stop))
                    if make_hole is not None:
                        self._yield_to_guest(began)
                        await self._rest(float("inf"))
                if hole and self.progress is not None:
                    self.progress.done_bytes += (stop - chunk) * size
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
        """How far chunks are alike from *chunk* on, at most to *stop*: data, or a hole on all; with
        a *target*, only as far as it is one there, too, or can soon be.
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
        """Chunks to be locked at a time: as few as possible, and at least *longest* bytes.

        The default is a piece.
        """
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
        """One round: take units from *batch* and work on them, until it is empty at most.

        Several at a time on an idle disk, paced beside a guest; with *urgent* at full speed and in
        whole pieces, because a guest waits for the end of it. *large* units save time. After *most*
        bytes no more is begun. *beside* is done meanwhile. Raises the first error, after what is
        under way has ended.
        """
        errors: list[Exception] = []
        until = trio.current_time() + ROUND_S
        left = most
        workers = 0

        async def watched(task: Awaitable[None]) -> None:
            try:
                await task
            except Exception as error:  # one of our own, too, must not break off a sync
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
            if self.stopping and not urgent:
                errors.append(OSError(errno.EINTR, "unmounting"))
                return
            if not urgent and await self._rest(until):
                return
            if not batch:
                return
            unit = self._next_unit(batch, LARGE_UNIT if large else PIECE, urgent=urgent)
            start, end = self.bounds(unit)
            left -= end - start
            began = trio.current_time()
            if not urgent:  # before the work, or all would begin at once
                self._rest_until(self._pacer.pay(began, end - start))
            await watched(work(unit))
            if errors or urgent:
                return
            if self.progress is not None:
                self.progress.done_bytes += end - start
            self._yield_to_guest(began)

        async with trio.open_nursery() as nursery:
            add_workers()
            if beside is not None:
                nursery.start_soon(watched, beside())
        if errors:
            raise errors[0]

    def _next_unit(self, batch: deque[range], longest: int, *, urgent: bool) -> range:
        if self.limit is not None or self.mirror.requests != self._requests_seen:
            longest = min(longest, PIECE)
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
        """Rest as long as was earned, or until then; whether there was need to."""
        pause = min(self._resume_at, until) - trio.current_time()
        if pause > 0:
            await self.sleep(pause)
        return pause > 0


def pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths of at most `PIECE` bytes that make up ``[start, end)``."""
    for offset in range(start, end, PIECE):
        yield offset, min(PIECE, end - offset)
