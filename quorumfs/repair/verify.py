"""Verifying: comparing images that were adopted as they were.

What differs is repaired by a strict majority alone, and else reported: nobody can tell which one is
right (P4).
"""

import errno
from contextlib import aclosing

from quorumfs.dirtymap import UNVERIFIED
from quorumfs.ranges import RangeSet
from quorumfs.repair.asking import give
from quorumfs.repair.work import Work, pieces, without
from quorumfs.replica import Replica
from quorumfs.storage import Kind
from quorumfs.voting import blocks, vote_data, voted_error


class Verification:
    """Compares the current replicas of one disk."""

    def __init__(self, work: Work) -> None:
        self._differing = RangeSet()
        self._compared: frozenset[Replica] = frozenset()
        """Those of whom it was found that they differ."""
        self._losses = work.sidecars.doubts.losses
        self._work = work
        self._disk = work.disk
        self._sidecars = work.sidecars
        self._map = work.map

    @property
    def differing(self) -> RangeSet:
        """Chunks that differ without a majority."""
        if self._losses != self._sidecars.doubts.losses:  # then some of them may be decided
            self._losses = self._sidecars.doubts.losses
            for start, end in list(self._differing):
                for chunk in range(start, end):
                    if not self._map.any(UNVERIFIED, range(chunk, chunk + 1)):
                        self._differing.remove(chunk, chunk + 1)
        return self._differing

    async def verify(self) -> bool:
        """Compare all that nobody has compared; whether all of it could be."""
        members = frozenset(self._sidecars.members)
        if not members <= self._compared:  # with one more there may be a majority
            self._compared, self._differing = members, RangeSet()
        unverified = self._map.runs(UNVERIFIED, longest=len(self._map))
        runs = list(without(unverified, self._differing))
        if not runs:
            return False
        total = sum(map(len, runs)) * self._map.chunk_size
        self._work.begin("verify", None, total)
        unreadable = False

        async def verify_if_readable(chunks: range) -> None:
            nonlocal unreadable
            try:
                await self._verify_unit(chunks)
            except OSError:
                unreadable = True  # to be tried again

        async with aclosing(self._work.batches(runs, self._sidecars.verified)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, verify_if_readable)
                if self._work.save_due:
                    await self._work.save()
        await self._work.save()
        return not unreadable

    async def verify_range(self, offset: int, length: int) -> None:
        """Compare the extents of a range, before they are changed."""
        extents = self._map.extents(offset, length)
        chunks = self._map.extent_chunks(extents)
        unverified = self._map.runs(UNVERIFIED, chunks.start, longest=len(chunks))
        for run in without(unverified, self._differing):
            if run.start >= chunks.stop:
                break
            for unit in self._work.units(range(run.start, min(run.stop, chunks.stop))):
                await self._verify_unit(unit)

    async def _verify_unit(self, chunks: range) -> None:
        async with self._disk.locks.held(*self._work.bounds(chunks), exclusive=True):
            # What was compared meanwhile, for a guest's write, may differ for another reason now:
            # a write that failed. Then it is to be settled, and nothing to ask a majority about.
            for run in self._map.runs(UNVERIFIED, chunks.start, longest=len(chunks)):
                if run.start < chunks.stop:
                    part = range(run.start, min(run.stop, chunks.stop))
                    while not await self._verify_locked(part):
                        pass

    async def _verify_locked(self, chunks: range) -> bool:
        """Compare *chunks* of all that are current; False if others are to be believed since."""
        believed = list(self._sidecars.doubts.sources(chunks))
        differing = RangeSet()
        for piece in pieces(*self._work.bounds(chunks)):
            await self._verify_piece(*piece, differing)
        if believed != list(self._sidecars.doubts.sources(chunks)):
            return False
        for chunk in chunks:
            if differing.overlaps(*self._map.bounds(chunk)):
                self._differing.add(chunk, chunk + 1)
            else:
                self._sidecars.verified(range(chunk, chunk + 1))
        return True

    async def _verify_piece(self, offset: int, length: int, differing: RangeSet) -> None:
        """Compare a piece, and repair what a majority decides; *differing* gets the rest.

        Raises `OSError` if fewer than the threshold can be read, or repaired.
        """
        disk, members = self._disk, list(self._sidecars.members)
        asked = await disk.ask(members, Kind.READ, disk.threshold, offset, length)
        sources = self._sidecars.doubts.sources(self._map.chunks(offset, length))
        believed = set(members).intersection(*(believed for _, believed in sources))
        outcomes = [o for o in asked if o.error is None and o.replica in believed]
        if len(outcomes) < disk.threshold or not outcomes:
            raise voted_error(outcome.error for outcome in asked if outcome.error)
        first, good = outcomes[0].data, [outcome.replica for outcome in outcomes]
        if all(outcome.data == first for outcome in outcomes[1:]):
            unreadable = [outcome.replica for outcome in asked if outcome.error is not None]
            if unreadable and not await give(disk, self._sidecars, unreadable, offset, first, good):
                raise OSError(errno.EIO, "what cannot be read cannot be written either")
            return
        torn = self._sidecars.doubts.torn
        for start, end in blocks(offset, length):
            answers = [(o.replica.index, o.data[start:end]) for o in outcomes]
            vote = vote_data(answers, offset + start, disk.threshold)
            losers = {loss.voter for loss in vote.outvoted}
            wrong = [outcome.replica for outcome in outcomes if outcome.replica.index in losers]
            if not wrong:
                continue
            # Where a write failed since, the guest may have seen what a minority holds.
            decided = (
                vote.data is not None
                and all(loss.strict for loss in vote.outvoted)
                and not torn.overlaps(offset + start, offset + end)
            )
            if not decided:
                disk.events.differs(offset + start, end - start)
            if not decided or not await give(
                disk, self._sidecars, wrong, offset + start, vote.data or b"", good
            ):
                differing.add(offset + start, offset + end)
                continue
            for replica in wrong:
                disk.events.repaired(replica.path, offset + start, end - start)
