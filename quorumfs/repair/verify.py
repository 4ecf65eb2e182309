"""Verifying: comparing images that were adopted as they were.

What differs is repaired by a strict majority of all alone, and else reported: nobody can tell which
one is right (P4). Who cannot be read may hold anything: that is compared again in a while.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.model import Standing
from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.voting import blocks, majority, middle_block
from quorumfs.metadata.ledger.known import Outcome
from quorumfs.repair.replica_io import repair_write
from quorumfs.repair.work import Work, pieces
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

AGAIN_S = (1.0, 60.0)
"""How long to wait before the same is compared again (seconds): at first, and at most."""


@dataclass(slots=True)
class Findings:
    """What a comparison leaves as it is (bytes)."""

    differing: RangeSet = field(default_factory=RangeSet)
    unread: RangeSet = field(default_factory=RangeSet)
    """What not all could be read of, or written to, and the others do not decide."""


class Verification:
    """Compares the current replicas of one disk."""

    def __init__(self, work: Work) -> None:
        self._differing = RangeSet()
        self._unread = RangeSet()
        """Chunks that could not be compared as a whole: to be tried again."""
        self._written = RangeSet()
        """Chunks that a guest wrote to although they differ, or could not be compared."""
        self._pause_s = AGAIN_S[0]
        """How long to wait after the next time."""
        self._again_at = 0.0
        """Until then neither of them is compared again; trio's clock, seconds."""
        self._compared: frozenset[Replica] = frozenset()
        """Those that were current when it was last tried."""
        self._answering: frozenset[Replica] = frozenset()
        """Those of them that were there when it was last tried."""
        self._losses = work.ledger.content.losses
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger
        self._map = work.map

    @property
    def differing(self) -> RangeSet:
        """Chunks that differ without a majority."""
        if self._losses != self._ledger.content.losses:  # then some of them may be decided
            self._losses = self._ledger.content.losses
            for start, end in list(self._differing):
                for chunk in range(start, end):
                    if not self._map.any(UNVERIFIED, range(chunk, chunk + 1)):
                        self._differing.remove(chunk, chunk + 1)
        return self._differing

    async def verify(self) -> bool:
        """Compare all that nobody has compared, if it is time; whether there was anything."""
        members = frozenset(self._ledger.members)
        if not members <= self._compared:  # with one more there may be a majority
            self._differing, self._unread = RangeSet(), RangeSet()
        self._compared = members
        answering = frozenset(r for r in members if r.state is not Standing.MISSING)
        if not answering <= self._answering:  # one is there again
            self._again_at = 0.0
        self._answering = answering
        unverified = self._map.runs(UNVERIFIED, longest=len(self._map))
        runs = list(_without(unverified, self._left_out()))
        if not runs:
            return False
        total = sum(map(len, runs)) * self._map.chunk_size
        self._work.begin("verify", None, total)
        async with aclosing(self._work.batches(runs, self._equal)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._verify_unit)
                if self._work.save_due:
                    await self._work.save()
        await self._work.save()
        self._again_at = trio.current_time() + self._pause_s
        self._pause_s = min(2 * self._pause_s, AGAIN_S[1])
        return True

    def _left_out(self) -> RangeSet:
        """Chunks that were compared, and are not to be compared again yet."""
        late = trio.current_time() - self._again_at
        if late < 0:
            return self._differing.union(self._unread)
        if late > AGAIN_S[1]:
            self._pause_s = AGAIN_S[0]  # what was before is long ago
        left_out = self._differing.union(RangeSet())
        for start, end in self._unread.union(self._written):
            left_out.remove(start, end)
        return left_out

    async def verify_range(self, offset: int, length: int) -> None:
        """Compare the extents of a range, as far as they can be, before they are changed."""
        extents = self._map.extents(offset, length)
        left_out = self._differing.union(self._unread)
        unverified = self._map.runs_in(UNVERIFIED, self._map.extent_chunks(extents))
        runs = list(_without(unverified, left_out))
        async with aclosing(self._work.batches(runs, self._equal, urgent=True)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._verify_unit, urgent=True)
        # Nothing can run between this and the change's claim of its range: who compares it from
        # here on waits for the change.
        for run in self._map.runs_in(UNVERIFIED, self._map.chunks(offset, length)):
            self._written.add(run.start, run.stop)

    async def _verify_unit(self, chunks: range) -> None:
        self._written.remove(chunks.start, chunks.stop)  # what is written from here on comes after
        async with self._work.locked(chunks) as worked:
            # What was compared meanwhile, for a guest's write, may differ for another reason now:
            # a write that failed. Then it is to be settled, and nothing to ask a majority about.
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
        """Compare *chunks* of all that are current; False if others are to be believed since."""
        believed = self._believed(chunks)
        found = Findings()
        deadline = trio.current_time() + self._mirror.search_s
        for part, voters in believed:
            for piece in pieces(*self._work.bounds(part)):
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
        """Who may hold what is right, part by part."""
        sources = self._ledger.chunks.sources.of(chunks)
        return [(part, frozenset(believed)) for part, believed in sources]

    def _equal(self, chunks: range) -> None:
        """All current replicas hold the same in *chunks*, which are locked."""
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
        """Compare a piece, and repair what a majority of *voters* decides.

        Where one cannot be read it is divided until *deadline*, so that a bad sector spoils its own
        block alone.
        """
        mirror, members = self._mirror, list(self._ledger.members)
        asked = await mirror.ask(members, Kind.READ, mirror.threshold, offset, length)
        failed = [outcome for outcome in asked if outcome.error is not None]
        answers = [o for o in asked if o.error is None and o.replica in voters]
        answering = any(outcome.replica.state is not Standing.MISSING for outcome in failed)
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
        """Go by *ballots*, what those of *voters* hold that could be read."""
        end = offset + length
        versions = list(ballots.values())
        # Where too few have not lost it to hold a vote, they are still right.
        needed = min(self._mirror.threshold, max(1, len(voters)))
        winner = majority(versions, len(voters), needed)
        wrong = [replica for replica, ballot in ballots.items() if ballot != winner]
        wrong += [outcome.replica for outcome in failed]
        if not wrong:
            return
        differ = len(set(versions)) > 1
        # Where a write failed since, a majority may be one that was given another one's content.
        if winner is not None and not self._ledger.agreement.torn.overlaps(offset, end):
            if await repair_write(
                self._mirror, self._sidecars, wrong, offset, winner, list(ballots)
            ):
                found.unread.add(offset, end)
                return
            for replica in wrong:
                if replica.standing is Standing.CURRENT:
                    self._mirror.events.repaired(replica.path, offset, length)
            return
        if differ:
            found.differing.add(offset, end)
        if failed or not differ:
            found.unread.add(offset, end)
        self._report(offset, length, failed, differ=differ)

    def _report(self, offset: int, length: int, failed: Sequence[Outcome], *, differ: bool) -> None:
        """Tell what is found the first time."""
        chunks, events = self._map.chunks(offset, length), self._mirror.events
        if differ and not self._differing.overlaps(chunks.start, chunks.stop):
            events.differs(offset, length)
        if not self._unread.overlaps(chunks.start, chunks.stop):
            for replica, operation in failed:
                if replica.state is not Standing.MISSING:
                    events.bad(Kind.READ, replica.path, offset, length, operation.error)


def _without(runs: Iterable[range], left_out: RangeSet) -> Iterator[range]:
    """The parts of *runs* that are not in *left_out*."""
    for run in runs:
        for start, stop in left_out.outside(run.start, run.stop):
            yield range(start, stop)
