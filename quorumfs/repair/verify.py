"""Verifying: comparing images that were adopted as they were.

A difference is repaired only by a strict majority, and else reported, because no replica is known
to be right (P4). An unreadable replica may hold anything: its chunks are compared again later.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.model import RepairKind
from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.voting import blocks, majority, middle_block
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.repair.pacing import Backoff
from quorumfs.repair.repairwrite import repair_write
from quorumfs.repair.work import Work, pieces
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

AGAIN_S = (1.0, 60.0)
"""The first and the longest wait (seconds) before the same chunks are compared again."""


@dataclass(slots=True)
class Findings:
    """Bytes that a comparison could not make equal."""

    differing: RangeSet = field(default_factory=RangeSet)
    unread: RangeSet = field(default_factory=RangeSet)
    """Bytes where a replica could not be read, without a majority, or could not be written to."""


class Verification:
    """Compares the current replicas of one disk."""

    def __init__(self, work: Work) -> None:
        self._differing = RangeSet()
        self._unread = RangeSet()
        """Chunks that could not be compared as a whole, and are to be tried again."""
        self._written = RangeSet()
        """Chunks that a guest wrote to although they differ, or could not be compared."""
        self._attempts = Backoff(*AGAIN_S)
        """When left-out chunks are compared again."""
        self._compared: frozenset[Replica] = frozenset()
        """The members at the last attempt."""
        self._answering: frozenset[Replica] = frozenset()
        """The members that answered at the last attempt."""
        self._losses = work.ledger.content.losses
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger
        self._map = work.map

    @property
    def differing(self) -> RangeSet:
        """Chunks that differ without a majority."""
        if self._losses != self._ledger.content.losses:  # a loss may have decided some chunks
            self._losses = self._ledger.content.losses
            for start, end in list(self._differing):
                for chunk in range(start, end):
                    if not self._map.any(UNVERIFIED, range(chunk, chunk + 1)):
                        self._differing.remove(chunk, chunk + 1)
        return self._differing

    async def verify(self) -> bool:
        """Compare the UNVERIFIED chunks that are due; whether there were any.

        None is due while only one replica is current, unless all others were removed from the set.
        """
        began, members = trio.current_time(), frozenset(self._ledger.members)
        if len(members) < 2:
            return await self._accept_the_last(members)
        if not members <= self._compared:  # with one member more there may be a majority
            self._differing, self._unread = RangeSet(), RangeSet()
        self._compared = members
        answering = frozenset(r for r in members if r.state.answers)
        if not answering <= self._answering:  # a member is back
            self._attempts.start_anew()
        self._answering = answering
        unverified = self._map.runs(UNVERIFIED, longest=len(self._map))
        runs = list(_without(unverified, self._left_out()))
        if not runs:
            return False
        total = sum(map(len, runs)) * self._map.chunk_size
        self._work.begin(RepairKind.VERIFY, None, total)
        async with aclosing(self._work.batches(runs, self._equal)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._verify_unit)
                if self._work.save_due:
                    await self._work.save()
        await self._work.save()
        self._attempts.tried(began, trio.current_time())
        return True

    async def _accept_the_last(self, members: frozenset[Replica]) -> bool:
        """Believe the only replica of the set: no other is left to compare it with."""
        if [member.slot for member in members] != self._ledger.record.slots:
            return False
        for run in self._map.runs(UNVERIFIED, longest=len(self._map)):
            async with self._work.locked(run):
                self._equal(run)
        await self._work.save()
        return True

    def _left_out(self) -> RangeSet:
        """Chunks that were compared in vain, and are not due to be compared again."""
        if trio.current_time() < self._attempts.due_at:
            return self._differing.union(self._unread)
        left_out = self._differing.union(RangeSet())
        for start, end in self._unread.union(self._written):
            left_out.remove(start, end)
        return left_out

    async def renew(self) -> None:
        """Compare what a crash may have torn, and have it written anew where all hold the same.

        Whatever comes of it: a flush answers for no more than that.
        """
        cut_off = self._ledger.agreement.cut_off
        answered_for = list(cut_off)
        parts = (self._map.runs_in(UNVERIFIED, range(*bounds)) for bounds in answered_for)
        runs = [run for part in parts for run in part]  # the rest was compared meanwhile
        async with aclosing(self._work.batches(runs, self._equal, urgent=True)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._verify_unit, urgent=True)
        for bounds in answered_for:
            cut_off.remove(*bounds)

    def compare_again(self, chunks: range) -> None:
        """Compare *chunks*, as far as they are UNVERIFIED, as soon as possible: they changed."""
        for kept in (self._differing, self._unread, self._written):
            kept.remove(chunks.start, chunks.stop)

    async def verify_range(self, offset: int, length: int) -> None:
        """Compare the extents of a range before a change, except chunks compared in vain."""
        extents = self._map.extents(offset, length)
        left_out = self._differing.union(self._unread)
        unverified = self._map.runs_in(UNVERIFIED, self._map.extent_chunks(extents))
        runs = list(_without(unverified, left_out))
        async with aclosing(self._work.batches(runs, self._equal, urgent=True)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._verify_unit, urgent=True)
        # Nothing can run between this and the change's claim of its range, so a later comparison
        # waits for the change.
        for run in self._map.runs_in(UNVERIFIED, self._map.chunks(offset, length)):
            self._written.add(run.start, run.stop)

    async def _verify_unit(self, chunks: range) -> None:
        self._written.remove(chunks.start, chunks.stop)  # later writes are noted anew
        async with self._work.locked(chunks) as worked:
            # A chunk compared meanwhile, for a guest's write, is UNVERIFIED no more. If that write
            # failed, the chunk is to be settled, and no majority is asked.
            runs = list(self._map.runs_in(UNVERIFIED, chunks))
            for run in runs:
                try:
                    while not await self._verify_locked(run):
                        pass
                except OSError:
                    self._unread.add(run.start, run.stop)
            if runs:
                worked()

    async def _verify_locked(self, chunks: range) -> bool:
        """Compare *chunks* on all members; False if the sources to believe changed meanwhile."""
        believed = self._believed(chunks)
        found = Findings()
        deadline = trio.current_time() + self._mirror.search_s
        unreadable = self._ledger.agreement.unreadable  # on all replicas: nothing to compare
        for part, voters in believed:
            for readable in unreadable.outside(*self._work.bounds(part)):
                for piece in pieces(*readable):
                    await self._verify_piece(*piece, voters, found, deadline)
        if believed != self._believed(chunks):
            return False
        for chunk in chunks:
            one, bounds = range(chunk, chunk + 1), self._map.bounds(chunk)
            differs, unread = found.differing.overlaps(*bounds), found.unread.overlaps(*bounds)
            if not differs and not unread:
                self._equal(one)
            for kept, here in (self._differing, differs), (self._unread, unread):
                (kept.add if here else kept.remove)(chunk, chunk + 1)
        return True

    def _believed(self, chunks: range) -> list[tuple[range, frozenset[Replica]]]:
        """The members to believe, by part of *chunks*."""
        sources = self._ledger.chunks.sources.of(chunks)
        return [(part, frozenset(believed)) for part, believed in sources]

    def _equal(self, chunks: range) -> None:
        """Note that all members hold the same in *chunks*, which the caller has locked."""
        self._ledger.chunks.compared(chunks)
        for kept in (self._differing, self._unread, self._written):
            kept.remove(chunks.start, chunks.stop)

    async def _verify_piece(
        self,
        offset: int,
        length: int,
        voters: Collection[Replica],
        found: Findings,
        deadline: float,
    ) -> None:
        """Compare a piece, and repair the blocks that a majority of *voters* decides.

        A piece that a replica cannot read is divided until *deadline*, so that a bad sector spoils
        only its own block.
        """
        mirror, members = self._mirror, list(self._ledger.members)
        asked = await mirror.ask(members, Kind.READ, mirror.threshold, offset, length)
        failed = [outcome for outcome in asked if outcome.error is not None]
        answers = [o for o in asked if o.error is None and o.replica in voters]
        answering = any(outcome.replica.state.answers for outcome in failed)
        middle = middle_block(offset, length)
        if answering and middle and trio.current_time() < deadline:
            for start, end in (offset, middle), (middle, offset + length):
                await self._verify_piece(start, end - start, voters, found, deadline)
            return
        equal = all(answer.data == answers[0].data for answer in answers)
        for start, end in [(0, length)] if equal else blocks(offset, length):
            ballots = {answer.replica: answer.data[start:end] for answer in answers}
            await self._verify_block(offset + start, ballots, failed, voters, found, end - start)

    async def _verify_block(
        self,
        offset: int,
        ballots: dict[Replica, bytes],
        failed: Sequence[Outcome],
        voters: Collection[Replica],
        found: Findings,
        length: int,
    ) -> None:
        """Repair a block by *ballots*, the data of the readable *voters*, or report the block."""
        end = offset + length
        versions = list(ballots.values())
        # Where losses leave too few voters for the threshold, the voters are still right.
        needed = min(self._mirror.threshold, max(1, len(voters)))
        winner = majority(versions, len(voters), needed)
        wrong = [replica for replica, ballot in ballots.items() if ballot != winner]
        wrong += [outcome.replica for outcome in failed]
        if not wrong:
            # A sync that failed before a crash may have dropped what all of them show (R4).
            torn = self._ledger.agreement.torn.overlaps(offset, end)
            if torn and versions:
                given = list(ballots)
                if await repair_write(
                    self._mirror, self._sidecars, given, offset, versions[0], given
                ):
                    found.unread.add(offset, end)
            return
        differ = len(set(versions)) > 1
        # Where a write failed, some replicas may have got another's content: no real majority.
        if winner is not None and not self._ledger.agreement.torn.overlaps(offset, end):
            if await repair_write(
                self._mirror, self._sidecars, wrong, offset, winner, list(ballots)
            ):
                found.unread.add(offset, end)
                return
            for replica in wrong:
                if replica.standing.is_member:
                    self._mirror.events.repaired(replica.path, offset, length)
            return
        if differ:
            found.differing.add(offset, end)
        if failed or not differ:
            found.unread.add(offset, end)
        self._report(offset, length, failed, differ=differ)

    def _report(self, offset: int, length: int, failed: Sequence[Outcome], *, differ: bool) -> None:
        """Report a difference or a failure once for each chunk."""
        chunks, events = self._map.chunks(offset, length), self._mirror.events
        if differ and not self._differing.overlaps(chunks.start, chunks.stop):
            events.differs(offset, length)
        if not self._unread.overlaps(chunks.start, chunks.stop):
            for replica, operation in failed:
                if replica.state.answers:
                    events.bad(Kind.READ, replica.path, offset, length, operation.error)


def _without(runs: Iterable[range], left_out: RangeSet) -> Iterator[range]:
    """The parts of *runs* outside *left_out*."""
    for run in runs:
        for start, stop in left_out.outside(run.start, run.stop):
            yield range(start, stop)
