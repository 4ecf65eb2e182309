"""Copying: giving the target of a resync what the disk holds.

A chunk is read from its sources by the read pattern. The copy goes block by block where adopted
images may differ, or where a source cannot be read. Holes stay holes.
"""

import errno
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from typing import cast

import trio

from quorumfs.decisions.dirtymap import CHUNK_MIN, UNVERIFIED
from quorumfs.decisions.patterns import Fifo
from quorumfs.decisions.ranges import segments
from quorumfs.decisions.voting import blocks, middle_block, vote_data
from quorumfs.disk import holes
from quorumfs.disk.reading import read_locked, sole_source
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.metadata.ledger.target import Target
from quorumfs.repair.badplaces import cannot_be_read
from quorumfs.repair.dataplaces import next_data, seek
from quorumfs.repair.work import PIECE, Work, pieces
from quorumfs.replica.fanout import carry_out
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

COPIES_MAX = 2
"""Copies between images at a time: one can read while another writes. More would not help, because
a kernel lets only one writer at a time into a file."""


class _UnreadableError(OSError):
    """No replica can be read where the target has to be given data."""


class Copying:
    """Gives one *target* the chunks that the target lacks."""

    def __init__(self, work: Work, target: Target, *, compare: bool) -> None:
        """*compare*: read the target first, and write only where the target differs."""
        self._target = target
        self._to = target.replica
        self._compare = compare
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger
        self._map = work.map
        self._copies = trio.CapacityLimiter(COPIES_MAX)
        self._known_data: tuple[tuple[Replica | None, int], int, int] = (None, 0), 0, 0
        """A source and the guest's zeroings when it was asked, then where its data begins and ends.
        Without an extent tree, a file system seeks for as long as it would read the file, and may
        let nobody write to the file meanwhile."""

    async def copy(self, chunks: range) -> int:
        """Give the target *chunks*; returns how many chunks cannot be read on any replica.

        The caller has locked *chunks*.
        """
        try:
            for part, sources in self._ledger.chunks.sources.of(chunks):
                self._target.copying(sources, part)
                for run, undecided in self._cut(part):
                    bounds = self._work.bounds(run)
                    torn = self._ledger.agreement.torn.overlaps(*bounds)
                    if torn or (undecided and len(sources) > 1):
                        await self._copy_agreed(sources, *bounds)
                        continue
                    for start, stop, unproven in segments(
                        run.start, run.stop, [self._target.unproven]
                    ):
                        compare = self._compare or bool(unproven)
                        bounds = self._work.bounds(range(start, stop))
                        await self._copy(sources[0], *bounds, compare=compare)
        except _UnreadableError:
            if len(chunks) > 1:
                return sum([await self.copy(range(chunk, chunk + 1)) for chunk in chunks])
            if not await self._copy_readable(chunks):
                self._target.lacks(chunks)
                return 1
        self._target.copied(chunks)
        return 0

    async def make_hole(self, chunks: range) -> None:
        """Make *chunks* a hole on the target; the caller has locked *chunks*."""
        self._target.copying(self._ledger.members, chunks)
        await self._make_hole(*self._work.bounds(chunks))

    def pass_over(self, chunks: range) -> None:
        """Note that *chunks* are a hole on every member and on the target."""
        self._target.copying((), chunks)
        self._target.copied(chunks)

    async def forget_cached(self) -> None:
        """Drop the target's page cache, so that later reads show its store."""
        await self._tell(Operation(Kind.EVICT))

    def require_target(self) -> None:
        """Raise `OSError` unless the target is still being resynced."""
        if self._ledger.target is not self._target:
            raise OSError(errno.EIO, self._to.reason or "it failed meanwhile")

    async def _copy(
        self,
        source: Replica,
        offset: int,
        end: int,
        *,
        compare: bool,
        by_vote: bool = True,
    ) -> None:
        """Give the target what the disk holds from *offset* to *end*, holes included.

        *by_vote*: read by the read pattern, unless fewer members than the threshold are left.
        Without *by_vote* the first replica that can be read decides. The caller holds the lock.
        """
        while offset < end:
            asked, data_from, data_to = self._known_data
            unchanged = asked == (source, self._mirror.zeroings)
            if not unchanged or not data_from <= offset < data_to:
                asked = source, self._mirror.zeroings
                data_from = await self._next_data(source, offset, end)
                if data_from > offset:
                    await self._make_hole(offset, min(end, data_from))
                    offset = min(end, data_from)
                    continue
                data_to = await self._next_hole(source, offset, end)
                self._known_data = asked, data_from, data_to
            stop = min(end, data_to)
            if not compare:
                offset += await self._take_over(offset, stop - offset)
            stop = min(stop, offset + PIECE)
            if stop == offset:
                continue
            # Too few members are left to hold a vote, but no better data exists.
            few = len(self._ledger.members) < self._mirror.threshold or not by_vote
            data = await self._read(offset, stop - offset, Fifo() if few else None)
            held = await self._held(offset, stop - offset) if compare else None
            await self._write(offset, data, held)
            offset = stop

    async def _copy_readable(self, chunk: range) -> bool:
        """Copy every block of a chunk that can be read on some member; whether the chunk is done.

        A block that no member can be read at leaves the chunk undone, because a member may recover.
        If fewer members than the threshold are left, such a block is noted as unreadable instead,
        so that the target can join. The caller holds the lock.
        """
        complete = True
        needed = len(self._ledger.members) < self._mirror.threshold
        ((_, sources),) = self._ledger.chunks.sources.of(chunk)
        unreadable = self._ledger.agreement.unreadable
        left = deque(unreadable.outside(*self._work.bounds(chunk)))
        while left:
            start, stop = left.popleft()
            middle = middle_block(start, stop - start)
            try:
                await self._copy(sources[0], start, stop, compare=False)
            except _UnreadableError:
                if middle:
                    left.extendleft([(middle, stop), (start, middle)])
                    continue
                with suppress(_UnreadableError):  # a single source may still be readable
                    one = sources[0]
                    await self._copy(one, start, stop, compare=False, by_vote=False)
                    continue
                noted = needed and await cannot_be_read(
                    self._mirror, self._sidecars, sources, start, stop - start
                )
                complete = complete and noted
        return complete

    def _cut(self, chunks: range) -> Iterator[tuple[range, bool]]:
        """Cut *chunks* where UNVERIFIED begins or ends; the flag says whether a run has the bit."""
        for undecided, run in groupby(chunks, lambda c: self._map.any(UNVERIFIED, range(c, c + 1))):
            first, *others = run
            yield range(first, first + 1 + len(others)), undecided

    async def _copy_agreed(self, sources: Sequence[Replica], offset: int, end: int) -> None:
        """Give the target what all *sources*, or a strict majority of the sources, hold.

        Elsewhere the target keeps its own data, which may yet make a majority; a copy of a source
        would only feign one (P4). A source that cannot be read at one block still has a say in the
        rest of the piece. The caller holds the lock.
        """
        left = deque(pieces(offset, end))
        while left:
            start, length = left.popleft()
            asked = await self._mirror.ask(sources, Kind.READ, len(sources), start, length)
            outcomes = [outcome for outcome in asked if outcome.error is None]
            failed = [o for o in asked if o.error and o.replica.state.answers]
            if failed and outcomes and (middle := middle_block(start, length)):
                left.extendleft([(middle, start + length - middle), (start, middle - start)])
                continue
            if not outcomes:
                raise _UnreadableError(errno.EIO, "nobody can be read")
            needed = min(self._mirror.threshold, len(outcomes))
            held = await self._held(start, length)
            right = bytearray()
            for low, high in blocks(start, length):
                answers = [(o.replica.index, o.data[low:high]) for o in outcomes]
                own = held and held[low:high]
                right += await self._right_block(start + low, answers, own, needed)
            await self._write(start, bytes(right), held)

    async def _right_block(
        self,
        offset: int,
        answers: Sequence[tuple[int, bytes]],
        own: bytes | None,
        needed: int,
    ) -> bytes:
        """The data of one block for the target, which holds *own*; *answers* are the sources'."""
        contents = [data for _, data in answers]
        length = len(contents[0])
        if self._ledger.agreement.torn.overlaps(offset, offset + length):
            # A failed write may lie over an acknowledged one; the target may be older than both.
            return contents[0]
        vote = vote_data(answers, offset, needed)
        if vote.data is not None and all(loss.strict for loss in vote.outvoted):
            return vote.data
        if own is None:
            own = await self._held(offset, length)
        if own is None:
            raise _UnreadableError(errno.EIO, "what it alone may hold cannot be read")
        return _agreed(own, contents)

    async def _next_data(self, source: Replica, offset: int, end: int) -> int:
        if sole_source(self._mirror, offset, end - offset) is source:
            return await seek(self._mirror, source, Kind.SEEK_DATA, offset)
        # Where one of several replicas shows a hole, it may have lost or missed data.
        return await next_data(self._mirror, self._sidecars, offset)

    async def _next_hole(self, source: Replica, offset: int, end: int) -> int:
        if sole_source(self._mirror, offset, end - offset) is source:
            return max(await seek(self._mirror, source, Kind.SEEK_HOLE, offset), offset + 1)
        return max(await holes.next_hole(self._mirror, offset), offset + CHUNK_MIN)

    async def _take_over(self, offset: int, length: int) -> int:
        """Have the target's store copy from the sole source of a read; returns the bytes copied.

        Zero bytes mean that another way of copying is needed, and count as no failure.
        """
        source = sole_source(self._mirror, offset, length)
        operation = self._to.copying(source, offset, length) if source else None
        if source is None or operation is None:
            return 0
        async with self._copies:
            await self._tell(operation)
        copied = cast("int", operation.value)
        source.counters.reads += 1
        source.counters.bytes_read += copied
        self._to.counters.copied_bytes += copied
        return copied

    async def _make_hole(self, offset: int, end: int) -> None:
        if await seek(self._mirror, self._to, Kind.SEEK_DATA, offset) < end:
            await self._tell(Operation(Kind.DISCARD, offset, end - offset))

    async def _read(self, offset: int, length: int, pattern: Fifo | None) -> bytes:
        try:
            return (await read_locked(self._mirror, offset, length, pattern)).data
        except OSError as error:
            raise _UnreadableError(*error.args) from None

    async def _held(self, offset: int, length: int) -> bytes | None:
        (outcome,) = await self._mirror.ask([self._to], Kind.READ, 0, offset, length)
        return None if outcome.error is not None else outcome.data

    async def _write(self, offset: int, data: bytes, held: bytes | None) -> None:
        """Write to the target the parts of *data* that differ from *held*."""
        for start, part in _differing(data, held):
            await self._tell(Operation(Kind.WRITE, offset + start, len(part), part))
            self._to.counters.copied_bytes += len(part)

    async def _tell(self, operation: Operation) -> None:
        self.require_target()
        await carry_out([(self._to, operation)])
        await self._mirror.note_truncated([Outcome(self._to, operation)])
        if operation.error is not None:
            raise operation.error


_ALL_BITS = bytes([0]) + bytes([255]) * 255
"""Translates an exclusive or of bytes into a mask: 255 where the bytes differ."""


def _agreed(own: bytes, contents: Sequence[bytes]) -> bytes:
    """The bytes that *contents* agree on, and elsewhere those of *own*; all are equally long.

    A guest's write since the adoption, perhaps to part of a block, is the same in all *contents*.
    """
    first, *others = (int.from_bytes(content) for content in contents)
    unlike = 0
    for other in others:
        unlike |= first ^ other
    mask = int.from_bytes(unlike.to_bytes(len(own)).translate(_ALL_BITS))
    return (first ^ ((first ^ int.from_bytes(own)) & mask)).to_bytes(len(own))


def _differing(data: bytes, held: bytes | None) -> Iterator[tuple[int, bytes]]:
    """The parts of *data* that differ from *held*, with offsets; all of *data* if that is None."""
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
