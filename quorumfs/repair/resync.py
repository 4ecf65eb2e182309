"""Resync: giving a replica that was left behind what it lacks.

What it lacks is copied from those that hold it, in passes, under locks that keep writers out and
let readers in. What a guest writes meanwhile it lacks from then on, and the guest need not wait for
it; until a pass leaves more than half of what the one before it left. From then on it is given
what is written where it lacks nothing, so it has everything in the end, however fast the guest is.
When it lacks nothing it becomes current. This can stop at any point, with the process or with a
replica, and goes on from there the next time.
"""

import errno
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import aclosing, suppress
from itertools import groupby
from typing import cast

import trio

from quorumfs.assembly import Found, State
from quorumfs.dirtymap import CHUNK_MIN, UNVERIFIED, lacks
from quorumfs.patterns import Fifo
from quorumfs.ranges import RangeSet, segments
from quorumfs.repair.asking import cannot_be_read, next_data, seek
from quorumfs.repair.work import PIECE, Work, pieces, without
from quorumfs.replica import Gathering, Replica
from quorumfs.storage import Kind, Operation, TruncatedError
from quorumfs.voting import blocks, middle_block, vote_data

COPIES_MAX = 2
"""Copies from one image to another at a time, so that one reads while the other one writes. More
would wait for each other: a kernel lets one at a time write to a file."""


class _UnreadableError(OSError):
    """No replica can be read where another one lacks something."""


class Resync:
    """Copies to a replica of one disk, one at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._disk = work.disk
        self._sidecars = work.sidecars
        self._map = work.map
        self._copies = trio.CapacityLimiter(COPIES_MAX)
        self._known_data: tuple[tuple[Replica | None, int], int, int] = (None, 0), 0, 0
        """Where a source was found to have no hole, and the requests of the guest until then: to
        seek again for every piece takes a file system without an extent tree as long as to read the
        file."""

    async def resync(self, replica: Replica, found: Found, *, full: bool) -> None:
        """Make *replica* current, which is open, and looked like *found*.

        *full*: it is not known what it lacks. Raises `OSError`; then it keeps what it has.
        """
        assert found.image is not None
        assert found.sidecar is not None
        assert replica.slot is not None
        sidecars = self._sidecars
        await sidecars.start_resync(replica, found, full=full)
        unproven = sidecars.unproven.get(replica.slot, RangeSet())
        self._disk.announce_states()
        bit = lacks(replica.slot)
        self._work.begin("resync", replica.path, sidecars.map.lacking_bytes(replica.slot))
        assert self._work.progress is not None
        self._disk.events.resync_started(replica.path, self._work.progress.total_bytes)
        copied_before = replica.counters.copied_bytes
        error: str | None = "it was broken off"
        try:
            if full or unproven or self._map.count(UNVERIFIED):
                # A flush that failed may have dropped pages that a read still shows (R4): they
                # would compare equal.
                await sidecars.sync_target(self._disk.locks.changing())
                await self._tell(replica, Operation(Kind.EVICT))
            before = 2 * len(self._map)
            while lacking := self._map.count(bit):
                sidecars.mirror(wanted=lacking > before // 2)
                before = lacking
                with suppress(OSError):
                    # Who lost what it was given last says so before it is copied from: the target
                    # would else lack that again, each time if one never syncs.
                    await self._disk.sync()
                await self._copy_all(replica, bit, compare=full)
                try:
                    # Who it was copied from may have lost that before: then it lacks it still.
                    await self._disk.sync()
                except OSError:
                    if self._map.count(bit):
                        raise  # not again and again: first another one may have to come back
            sidecars.mirror(wanted=True)  # nothing was written since there was nothing lacking
            self._require_target(replica)
            await sidecars.sync_target(self._disk.locks.changing())  # the join has the less to sync
            await sidecars.join()
            error = None
        except Exception as caught:
            error = (isinstance(caught, OSError) and caught.strerror) or str(caught)
            sidecars.drop_target(replica, error)
            raise
        finally:
            copied = replica.counters.copied_bytes - copied_before
            self._disk.events.resync_finished(replica.path, copied, error)

    async def _copy_all(self, replica: Replica, bit: int, *, compare: bool) -> None:
        """Copy what the replica lacks.

        What was copied is synced while more is, and held after a sync that began later (R8).
        """
        sidecars = self._sidecars
        assert replica.slot is not None
        unproven = sidecars.unproven.get(replica.slot, RangeSet())
        unreadable = RangeSet()
        copied: list[range] = []
        """Since the last sync began."""
        unsaved = False

        def pass_over(chunks: range) -> None:
            sidecars.copying(replica, (), chunks)
            copied.append(chunks)

        async def copy_chunks(chunks: range) -> None:
            try:
                for part, sources in sidecars.doubts.sources(chunks):
                    sidecars.copying(replica, sources, part)
                    for run, undecided in self._cut(part):
                        bounds = self._work.bounds(run)
                        torn = sidecars.doubts.torn.overlaps(*bounds)
                        if torn or (undecided and len(sources) > 1):
                            await self._copy_agreed(replica, sources, *bounds)
                            continue
                        for start, stop, proven in segments(run.start, run.stop, [unproven]):
                            differing = compare or not proven
                            bounds = self._work.bounds(range(start, stop))
                            await self._copy(replica, sources[0], *bounds, compare=differing)
            except _UnreadableError:
                if len(chunks) == 1:
                    if not await self._copy_readable(replica, chunks):
                        unreadable.add(chunks.start, chunks.stop)
                    return
                for chunk in chunks:
                    await copy_chunks(range(chunk, chunk + 1))

        async def copy_unit(chunks: range) -> None:
            # The guest reads from others: only who writes has to wait.
            async with self._work.locked(chunks, exclusive=False) as worked:
                await copy_chunks(chunks)
                worked()
            copied.append(chunks)

        async def sync() -> None:
            nonlocal unsaved
            if not copied:
                return
            synced = list(without(copied, unreadable))
            copied.clear()
            self._require_target(replica)
            began = trio.current_time()
            await sidecars.sync_target(self._disk.locks.changing())
            size = sum(map(len, synced)) * self._map.chunk_size
            self._work.unsynced.took(size, began, trio.current_time())
            sidecars.caught_up(synced)
            unsaved = True

        async def save() -> None:
            nonlocal unsaved
            if unsaved:
                unsaved = False
                await self._work.save()

        async def sync_and_save() -> None:
            await sync()
            if self._work.save_due:
                await save()

        async def make_hole(chunks: range) -> None:
            sidecars.copying(replica, sidecars.members, chunks)
            await self._make_hole(replica, *self._work.bounds(chunks))

        lacking = self._map.runs(bit, longest=len(self._map))
        async with aclosing(self._work.batches(lacking, pass_over, make_hole)) as batches:
            try:
                async for batch in batches:
                    most = self._work.unsynced.amount
                    await self._work.in_parallel(
                        batch, copy_unit, large=True, most=most, beside=sync_and_save
                    )
            finally:
                if self._work.stopping:
                    await sync()
                    await save()
        await sync()
        await save()
        if unreadable:
            count = sum(end - start for start, end in unreadable)
            raise OSError(errno.EIO, f"{count} chunks can be read on no current replica")

    async def _copy(
        self,
        target: Replica,
        source: Replica,
        offset: int,
        end: int,
        *,
        compare: bool,
        by_vote: bool = True,
    ) -> None:
        """Give *target* what the disk holds from *offset* to *end*; holes stay those of *source*.

        *by_vote*: as the read pattern has it, unless too few are left to hold a vote. The lock is
        held.
        """
        while offset < end:
            asked, data_from, data_to = self._known_data
            unchanged = asked == (source, self._disk.requests)
            if not unchanged or not data_from <= offset < data_to:
                asked = source, self._disk.requests
                data_from = await self._next_data(source, offset, end)
                if data_from > offset:
                    await self._make_hole(target, offset, min(end, data_from))
                    offset = min(end, data_from)
                    continue
                data_to = await self._next_hole(source, offset, end)
                self._known_data = asked, data_from, data_to
            stop = min(end, data_to)
            if not compare:
                offset += await self._take_over(target, offset, stop - offset)
            stop = min(stop, offset + PIECE)
            if stop == offset:
                continue
            # Too few are left to hold a vote: what they hold is still all there is.
            few = len(self._sidecars.members) < self._disk.threshold or not by_vote
            data = await self._read(offset, stop - offset, Fifo() if few else None)
            held = await self._held(target, offset, stop - offset) if compare else None
            await self._write(target, offset, data, held)
            offset = stop

    async def _copy_readable(self, target: Replica, chunk: range) -> bool:
        """Copy all of a chunk but what no current replica can be read at.

        Whether that was all of it: else some of them may come to be read, and the target waits for
        that, unless nothing can be done without it. The lock is held.
        """
        doubts, complete = self._sidecars.doubts, True
        needed = len(self._sidecars.members) < self._disk.threshold
        ((_, sources),) = doubts.sources(chunk)
        parts = segments(*self._work.bounds(chunk), [doubts.unreadable])
        left = deque((start, stop) for start, stop, readable in parts if readable)
        while left:
            start, stop = left.popleft()
            middle = middle_block(start, stop - start)
            try:
                await self._copy(target, sources[0], start, stop, compare=False)
            except _UnreadableError:
                if middle:
                    left.extendleft([(middle, stop), (start, middle)])
                    continue
                with suppress(_UnreadableError):  # of those who hold it one may be good
                    one = sources[0]
                    await self._copy(target, one, start, stop, compare=False, by_vote=False)
                    continue
                noted = needed and await cannot_be_read(
                    self._disk, self._sidecars, sources, start, stop - start
                )
                complete = complete and noted
        return complete

    def _cut(self, chunks: range) -> Iterator[tuple[range, bool]]:
        """Cut *chunks* into what adopted images may differ in, without a majority, and the rest."""
        for undecided, run in groupby(chunks, lambda c: self._map.any(UNVERIFIED, range(c, c + 1))):
            first, *others = run
            yield range(first, first + 1 + len(others)), undecided

    async def _copy_agreed(
        self, target: Replica, sources: Sequence[Replica], offset: int, end: int
    ) -> None:
        """Give *target* what *sources* agree on, or a strict majority of them; the lock is held.

        Elsewhere it keeps its own: perhaps that makes a majority, which another one's would only
        feign (P4). One that cannot be read has no say in a block, but in the rest of the piece.
        """
        left = deque(pieces(offset, end))
        while left:
            start, length = left.popleft()
            asked = await self._disk.ask(sources, Kind.READ, len(sources), start, length)
            outcomes = [outcome for outcome in asked if outcome.error is None]
            failed = [o for o in asked if o.error and o.replica.state is not State.MISSING]
            if failed and outcomes and (middle := middle_block(start, length)):
                left.extendleft([(middle, start + length - middle), (start, middle - start)])
                continue
            if not outcomes:
                raise _UnreadableError(errno.EIO, "nobody can be read")
            needed = min(self._disk.threshold, len(outcomes))
            held = await self._held(target, start, length)
            right = bytearray()
            for low, high in blocks(start, length):
                answers = [(o.replica.index, o.data[low:high]) for o in outcomes]
                own = held and held[low:high]
                right += await self._right_block(target, start + low, answers, own, needed)
            await self._write(target, start, bytes(right), held)

    async def _right_block(
        self,
        target: Replica,
        offset: int,
        answers: Sequence[tuple[int, bytes]],
        own: bytes | None,
        needed: int,
    ) -> bytes:
        """What *target*, which holds *own*, is to hold of a block; *answers* are the sources'."""
        contents = [data for _, data in answers]
        length = len(contents[0])
        if self._sidecars.doubts.torn.overlaps(offset, offset + length):
            # What failed may lie over what succeeded before: its own may be older than both.
            return contents[0]
        vote = vote_data(answers, offset, needed)
        if vote.data is not None and all(loss.strict for loss in vote.outvoted):
            return vote.data
        if own is None:
            own = await self._held(target, offset, length)
        if own is None:
            raise _UnreadableError(errno.EIO, "what it alone may hold cannot be read")
        return _agreed(own, contents)

    async def _next_data(self, source: Replica, offset: int, end: int) -> int:
        if self._disk.sole_source(offset, end - offset) is source:
            return await seek(self._disk, source, Kind.SEEK_DATA, offset)
        # What one of several shows as a hole may be data that it lost, or never got.
        return await next_data(self._disk, self._sidecars, offset)

    async def _next_hole(self, source: Replica, offset: int, end: int) -> int:
        if self._disk.sole_source(offset, end - offset) is source:
            return max(await seek(self._disk, source, Kind.SEEK_HOLE, offset), offset + 1)
        return max(await self._disk.next_hole(offset), offset + CHUNK_MIN)

    async def _take_over(self, target: Replica, offset: int, length: int) -> int:
        """Have *target* itself copy from whom a read would be answered by; returns the bytes.

        Where it could not, nobody is blamed yet.
        """
        source = self._disk.sole_source(offset, length)
        operation = target.copying(source, offset, length) if source else None
        if source is None or operation is None:
            return 0
        async with self._copies:
            await self._tell(target, operation)
        copied = cast("int", operation.value)
        source.counters.reads += 1
        source.counters.bytes_read += copied
        target.counters.copied_bytes += copied
        return copied

    async def _make_hole(self, target: Replica, offset: int, end: int) -> None:
        if await seek(self._disk, target, Kind.SEEK_DATA, offset) < end:
            await self._tell(target, Operation(Kind.DISCARD, offset, end - offset))

    async def _read(self, offset: int, length: int, pattern: Fifo | None) -> bytes:
        try:
            return (await self._disk.read_locked(offset, length, pattern)).data
        except OSError as error:
            raise _UnreadableError(*error.args) from None

    async def _held(self, target: Replica, offset: int, length: int) -> bytes | None:
        (outcome,) = await self._disk.ask([target], Kind.READ, 0, offset, length)
        return None if outcome.error is not None else outcome.data

    async def _write(self, target: Replica, offset: int, data: bytes, held: bytes | None) -> None:
        """Give *target* what it has not, by what it is known to have held."""
        for start, part in _differing(data, held):
            await self._tell(target, Operation(Kind.WRITE, offset + start, len(part), part))
            target.counters.copied_bytes += len(part)

    async def _tell(self, target: Replica, operation: Operation) -> None:
        self._require_target(target)
        gathering = Gathering(0)
        gathering.submit(target, operation)
        await gathering.complete()
        if isinstance(operation.error, TruncatedError):
            await self._sidecars.truncated(target)
        if operation.error is not None:
            raise operation.error

    def _require_target(self, replica: Replica) -> None:
        if self._sidecars.target is not replica:
            raise OSError(errno.EIO, replica.reason or "it failed meanwhile")


_ALL_BITS = bytes([0]) + bytes([255]) * 255
"""Makes a mask of bytes that differ from their exclusive or."""


def _agreed(own: bytes, contents: Sequence[bytes]) -> bytes:
    """The bytes that *contents* agree on, and elsewhere those of *own*; all are equally long.

    Whatever a guest wrote since they were adopted, in part of a block perhaps, is the same on all.
    """
    first, *others = (int.from_bytes(content) for content in contents)
    unlike = 0
    for other in others:
        unlike |= first ^ other
    mask = int.from_bytes(unlike.to_bytes(len(own)).translate(_ALL_BITS))
    return (first ^ ((first ^ int.from_bytes(own)) & mask)).to_bytes(len(own))


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
