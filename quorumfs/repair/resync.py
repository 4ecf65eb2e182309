"""Resync: giving a replica that was left behind what it lacks.

It gets every new write from the beginning on; what it missed is copied from those that hold it,
under exclusive locks, in batches. When it lacks nothing it becomes current. This can stop at any
point, with the process or with a replica, and goes on from there the next time.
"""

import errno
from collections.abc import Iterator
from contextlib import aclosing

from quorumfs.assembly import Found
from quorumfs.dirtymap import CHUNK_MIN, lacks
from quorumfs.patterns import Fifo
from quorumfs.ranges import RangeSet
from quorumfs.repair.work import Work, pieces, without
from quorumfs.replica import Replica
from quorumfs.storage import Kind


class _UnreadableError(OSError):
    """No replica can be read where another one lacks something."""


class Resync:
    """Copies to a replica of one disk, one at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._disk = work.disk
        self._sidecars = work.sidecars
        self._map = work.map
        self._known_data: tuple[Replica | None, int, int] = None, 0, 0
        """Where a source was last found to have no hole: to seek again for every piece takes a file
        system without an extent tree as long as to read the file."""

    async def resync(self, replica: Replica, found: Found, *, full: bool) -> None:
        """Make *replica* current, which is open, and looked like *found*.

        *full*: it is not known what it lacks. Raises `OSError`; then it keeps what it has.
        """
        assert found.image is not None
        assert found.sidecar is not None
        assert replica.slot is not None
        sidecars = self._sidecars
        await sidecars.start_resync(replica, found.image, found.sidecar, full=full)
        self._disk.announce_states()
        bit = lacks(replica.slot)
        self._work.begin("resync", replica.path, sidecars.map.lacking_bytes(replica.slot))
        assert self._work.progress is not None
        self._disk.events.resync_started(replica.path, self._work.progress.total_bytes)
        copied_before = replica.counters.copied_bytes
        error: str | None = None
        try:
            while self._map.count(bit):
                await self._copy_all(replica, bit, compare=full)
            await sidecars.join()
        except OSError as caught:
            error = caught.strerror or str(caught)
            sidecars.drop_target(replica, error)
            raise
        finally:
            copied = replica.counters.copied_bytes - copied_before
            self._disk.events.resync_finished(replica.path, copied, error)

    async def _copy_all(self, replica: Replica, bit: int, *, compare: bool) -> None:
        """Copy what the replica lacks, in batches: sync them, and only then call them held (R8)."""

        unreadable = RangeSet()

        async def copy_chunks(chunks: range) -> None:
            try:
                for piece in pieces(*self._work.bounds(chunks)):
                    await self._copy(replica, *piece, compare=compare)
            except _UnreadableError:
                if len(chunks) == 1:
                    unreadable.add(chunks.start, chunks.stop)
                    return
                for chunk in chunks:
                    await copy_chunks(range(chunk, chunk + 1))

        async def copy_unit(chunks: range) -> None:
            async with self._disk.locks.held(*self._work.bounds(chunks), exclusive=True):
                await copy_chunks(chunks)

        lacking = self._map.runs(bit, longest=len(self._map))
        holes: list[range] = []
        async with aclosing(self._work.batches(lacking, holes.append, replica)) as batches:
            async for batch in batches:
                self._known_data = None, 0, 0
                await self._work.in_parallel(self._work.units(batch), copy_unit)
                if self._sidecars.target is not replica:
                    raise OSError(errno.EIO, replica.reason or "it failed meanwhile")
                await self._sidecars.sync_target()
                self._sidecars.caught_up([*without(batch, unreadable), *holes])
                holes.clear()
                await self._work.save(often=False)
        await self._work.save()
        if unreadable:
            count = sum(end - start for start, end in unreadable)
            raise OSError(errno.EIO, f"{count} chunks can be read on no current replica")

    async def _copy(self, target: Replica, offset: int, length: int, *, compare: bool) -> None:
        """Give *target* what the disk holds in a range; holes stay holes. The lock is held."""
        end = offset + length
        while offset < end:
            source = self._sidecars.source
            known, data_from, data_to = self._known_data
            if known is not source or not data_from <= offset < data_to:
                data_from = await self._work.seek(source, Kind.SEEK_DATA, offset)
                if data_from > offset:
                    await self._make_hole(target, offset, min(end, data_from))
                    offset = min(end, data_from)
                    continue
                data_to = max(await self._work.seek(source, Kind.SEEK_HOLE, offset), offset + 1)
                self._known_data = source, data_from, data_to
            stop = min(end, data_to)
            # Too few are left to hold a vote: what they hold is still all there is.
            few = len(self._sidecars.members) < self._disk.threshold
            pattern = Fifo() if few else None
            try:
                reading = await self._disk.read_locked(offset, stop - offset, pattern)
            except OSError as error:
                raise _UnreadableError(*error.args) from None
            held = await self._held(target, offset, stop - offset) if compare else None
            for start, data in _differing(reading.data, held):
                await self._tell(target, Kind.WRITE, offset + start, len(data), data)
                target.counters.copied_bytes += len(data)
            offset = stop

    async def _make_hole(self, target: Replica, offset: int, end: int) -> None:
        if await self._work.seek(target, Kind.SEEK_DATA, offset) < end:
            await self._tell(target, Kind.DISCARD, offset, end - offset)

    async def _held(self, target: Replica, offset: int, length: int) -> bytes | None:
        (outcome,) = await self._disk.ask([target], Kind.READ, 0, offset, length)
        return None if outcome.error is not None else outcome.data

    async def _tell(
        self, target: Replica, kind: Kind, offset: int, length: int, data: bytes = b""
    ) -> None:
        if self._sidecars.target is not target:
            raise OSError(errno.EIO, target.reason or "it failed meanwhile")
        (outcome,) = await self._disk.ask([target], kind, 0, offset, length, data)
        if outcome.error is not None:
            raise outcome.error


def _differing(data: bytes, held: bytes | None) -> Iterator[tuple[int, bytes]]:
    """The parts of *data* that *held* has not, with their offsets; all of it if that is unknown."""
    if held is None:
        yield 0, data
    if held is None or held == data:
        return
    start = 0
    while start < len(data):
        end = start
        while end < len(data) and data[end : end + CHUNK_MIN] != held[end : end + CHUNK_MIN]:
            end += CHUNK_MIN
        if end > start:
            yield start, data[start:end]
        start = end + CHUNK_MIN
