"""Settling: making the current replicas equal where they may differ.

They may after a crash, or after a change that failed on some of them. All get what the pinned
source holds: in the background, and at once what a guest reads (P7) or a flush covers.
"""

import errno
from collections.abc import Sequence
from contextlib import aclosing, suppress

import trio

from quorumfs.metadata import holders_of
from quorumfs.ranges import segments
from quorumfs.repair.asking import give, next_data
from quorumfs.repair.work import Work, pieces
from quorumfs.replica import Replica
from quorumfs.storage import Kind


class Settling:
    """Makes the current replicas of one disk equal."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._disk = work.disk
        self._sidecars = work.sidecars
        self._map = work.map
        self._hearing = trio.Lock()

    async def settle(self) -> None:
        """Settle all that may differ, beside the guest."""
        await self._sidecars.open()  # holes are shown, too: first it is on record who is not here
        await self._hear_losses()
        total = sum(end - start for start, end in self._sidecars.doubts.unsettled)
        self._work.begin("settle", None, total * self._map.chunk_size)
        runs = [range(start, end) for start, end in self._sidecars.doubts.unsettled]
        async with aclosing(self._work.batches(runs, self._sidecars.settled)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._settle_unit)
        await self._work.save()

    async def settle_all(self) -> None:
        """Settle what a flush must know to be equal; raises EIO if it cannot be made so."""
        sidecars = self._sidecars
        await sidecars.open()
        await self._hear_losses()
        runs = sidecars.doubts.to_settle_first()
        async with aclosing(self._work.batches(runs, sidecars.settled, urgent=True)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._settle_unit, urgent=True)
        if sidecars.unflushable():
            raise OSError(errno.EIO, "what differs since a crash cannot be made equal")

    async def settle_and_read(self, offset: int, length: int) -> bytes:
        """Settle what may differ in a range, and only then show it.

        Raises EIO where replicas differ and cannot be made equal: what is seen must not turn back.
        """
        chunks = self._map.chunks(offset, length)
        async with self._disk.locks.held(*self._work.bounds(chunks), exclusive=True):
            for unit in self._work.units(chunks):
                if not await self._settle_locked(unit):
                    raise OSError(errno.EIO, "the replicas differ, and cannot be made equal")
            return (await self._disk.read_locked(offset, length)).data

    async def _settle_unit(self, chunks: range) -> None:
        async with self._disk.locks.held(*self._work.bounds(chunks), exclusive=True):
            await self._settle_locked(chunks)

    async def _settle_locked(self, chunks: range) -> bool:
        """Have all current replicas hold the same in *chunks*; whether they do now."""
        if not self._sidecars.doubts.unsettled.overlaps(chunks.start, chunks.stop):
            return True
        # Who is not here may hold something else, even where there is nothing to write now: it is
        # left behind before anything is shown.
        await self._sidecars.open()
        await self._hear_losses(chunks)
        return await self._settle_heard(chunks)

    async def _settle_heard(self, chunks: range) -> bool:
        """As `_settle_locked`, when those who lost what was written there have said so."""
        sidecars, doubts = self._sidecars, self._sidecars.doubts
        everywhere = True
        for start, stop, settled in segments(chunks.start, chunks.stop, [doubts.unsettled]):
            # What is settled may differ for another reason, which a vote or an operator decides.
            for part, sources in doubts.sources(range(start, stop)) if not settled else ():
                losses, members = doubts.losses, frozenset(sidecars.members)
                equal, rewritten = await self._settle_part(*self._work.bounds(part), sources)
                if doubts.losses != losses or not members.issuperset(sidecars.members):
                    # Meanwhile one lost what it was given, or joined without it: once more.
                    equal = await self._settle_heard(part)
                elif rewritten:
                    sidecars.settled(part)
                everywhere = everywhere and equal
        return everywhere

    async def _hear_losses(self, chunks: range = range(0)) -> None:
        """Have all sync once since something was last unsettled, and since *chunks* were written.

        One may have lost a page and show an older one, and nobody knows until it syncs: the others
        must not be given that.
        """
        async with self._hearing:
            written = bool(chunks) and self._sidecars.unsynced(*self._span(chunks))
            if written or not self._sidecars.doubts.heard:
                self._sidecars.doubts.heard = True  # what is unsettled meanwhile is another matter
                with suppress(OSError):
                    await self._disk.sync()

    def _span(self, chunks: range) -> tuple[int, int]:
        """Offset and length, bytes."""
        start, end = self._work.bounds(chunks)
        return start, end - start

    async def _settle_part(
        self, offset: int, end: int, sources: Sequence[Replica]
    ) -> tuple[bool, bool]:
        """As `_settle_piece`, but for what is a hole on all of them, and at any length."""
        disk = self._disk
        equal = rewritten = True
        while offset < end:
            data_at = min(end, await next_data(disk, self._sidecars, offset))
            if data_at == offset:
                hole_at = await disk.next_hole(offset)
                data_at = min(end, hole_at) if hole_at > offset else end
                for piece in pieces(offset, data_at):
                    before, after = await self._settle_piece(*piece, sources)
                    equal = equal and (before or after)
                    rewritten = rewritten and after
            offset = data_at
        return equal, rewritten

    async def _settle_piece(
        self, offset: int, length: int, sources: Sequence[Replica]
    ) -> tuple[bool, bool]:
        """Have all current replicas hold what the first of *sources* that can be read holds.

        All are written to, the source too and however equal they look: a flush that failed before
        a crash may have dropped pages that reads still show (R4). What is a hole on all replicas
        can hide no such loss, and is left out. Returns whether they were equal before, and whether
        all took it.
        """
        outcomes = await self._disk.ask(self._sidecars.members, Kind.READ, 1, offset, length)
        believed = holders_of(self._sidecars, offset, length)  # one may have lost it meanwhile
        read = {o.replica: o.data for o in outcomes if o.error is None}
        source = next((r for r in sources if r in read and r in believed), None)
        if source is None:
            return False, False
        self._sidecars.answered(source, offset, length)
        data = read[source]
        equal = len(read) == len(outcomes) and all(other == data for other in read.values())
        asked = [outcome.replica for outcome in outcomes]
        took = await give(self._disk, self._sidecars, asked, offset, data, [source])
        return equal, took
