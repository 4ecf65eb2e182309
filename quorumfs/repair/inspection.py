"""Inspecting: what a scrub does with one range of the disk.

All current replicas are read and compared. Only places that the ledger takes for equal are: what is
divergent, lossy, unverified or unreadable on all is left to the repairs that see to that. A
difference is looked at once more under the exclusive lock, after a sync that has replicas report
what they lost, before anybody is told (P8).

The blame is judged block by block: by a strict majority of all current replicas, at or above the
threshold, else nobody is blamed (P4). A replica that cannot be read at a block may hold anything
there, and counts as a voter; but it has nothing to lose there, and is given what the others hold,
where these are the threshold or it was asked to repair.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import groupby

import trio

from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.scrub import Counts
from quorumfs.decisions.voting import BLOCK, blocks, majority, middle_block
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.ledger.knowledge import holders_of
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.badplaces import is_bad_place
from quorumfs.repair.repairwrite import repair_write
from quorumfs.repair.work import pieces
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

FINDS_MAX = 64
"""Places that a scrub lists; it counts all."""

UNDECIDED_RANGES_MAX = 4096
"""Ranges of undecided bytes that are told apart; with more they count as one."""


@dataclass(frozen=True, slots=True)
class Find:
    """A place at which one replica is wrong, or nobody knows which one is."""

    offset: int
    length: int
    """Both bytes."""
    replica: str | None
    """The path of the one to blame; None: nobody is blamed."""
    blame: str
    """``majority``, ``undecided`` or ``unreadable``."""
    repaired: bool


def alone_right_at(replica: str, finds: Iterable[Find], others: Iterable[str]) -> Find | None:
    """The first of *finds* that is not repaired, and where all *others* are wrong and *replica* is
    right; None: there is none. Replicas are given by path.
    """
    left, all_others = [find for find in finds if not find.repaired], set(others)
    for find in left:
        end = find.offset + find.length
        at_place = (o for o in left if o.offset < end and find.offset < o.offset + o.length)
        blamed = {one.replica for one in at_place}
        if blamed.isdisjoint((None, replica)) and blamed >= all_others:
            return find
    return None


@dataclass(slots=True)
class Findings:
    """What a scrub has found."""

    counts: Counts = field(default_factory=Counts)
    finds: list[Find] = field(default_factory=list)
    """The first `FINDS_MAX`."""

    def count(self, **numbers: int) -> None:
        """Add to the counts by name; none becomes less than 0."""
        before = self.counts
        added = {name: max(0, getattr(before, name) + by) for name, by in numbers.items()}
        self.counts = replace(before, **added)

    def note(self, find: Find) -> None:
        """List one more place, while there is room."""
        if len(self.finds) < FINDS_MAX:
            self.finds.append(find)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Who is wrong in one block, or in adjacent blocks alike."""

    wrong: tuple[Replica, ...] = ()
    """Those that a majority outvotes."""
    unread: tuple[Replica, ...] = ()
    undecided: bool = False
    """The replicas differ, and there is no majority."""


def judge(
    ballots: Mapping[Replica, bytes], unread: Sequence[Replica], threshold: int
) -> tuple[Judgement, bytes | None]:
    """Who is wrong in one block, and what the block should hold; None: nobody knows.

    *ballots*: what those hold that could be read; *unread* could not. Pure.
    """
    versions = list(ballots.values())
    if len(set(versions)) < 2:
        return Judgement(unread=tuple(unread)), versions[0] if versions else None
    winner = majority(versions, len(ballots) + len(unread), threshold)
    if winner is None:
        return Judgement(unread=tuple(unread), undecided=True), None
    wrong = tuple(replica for replica, ballot in ballots.items() if ballot != winner)
    return Judgement(wrong, tuple(unread)), winner


class Inspection:
    """Compares ranges of one disk, and repairs them if asked to."""

    def __init__(self, mirror: Mirror, sidecars: Sidecars) -> None:
        self._mirror = mirror
        self._sidecars = sidecars
        self._ledger = sidecars.ledger
        self.undecided = mirror.read_order.undecided
        """Bytes in which the replicas were found to differ, and nothing tells who is right."""

    def comparable(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """The parts of a range (offset, length) that all members should hold alike."""
        for segment in list(self._ledger.read_segments(offset, length)):
            doubtful = segment.pinned or segment.torn or not segment.holders
            if not doubtful and not self._ledger.unverified(segment.offset, segment.length):
                yield segment.offset, segment.length

    async def compare(self, offset: int, length: int) -> RangeSet:
        """The bytes of a range that are to be looked at more closely; the caller holds a lock.

        The media are read, not this host's caches, except where a replica has still to sync: there
        the cache alone may hold what was written.
        """
        mirror, members = self._mirror, list(self._ledger.members)
        suspicious = RangeSet()
        for part in self.comparable(offset, length):
            if not self._ledger.unsynced(*part):
                await mirror.ask(members, Kind.EVICT, mirror.threshold, *part)
            asked = await mirror.ask(members, Kind.READ, mirror.threshold, *part)
            start, size = part
            if any(one.error is not None and one.replica.state.answers for one in asked):
                suspicious.add(start, start + size)
                continue
            contents = [one.data for one in asked if one.error is None]
            if all(content == contents[0] for content in contents[1:]):
                self.undecided.remove(start, start + size)
                continue
            for low, high in blocks(start, size):
                if len({content[low:high] for content in contents}) > 1:
                    suspicious.add(start + low, start + high)
                else:
                    self.undecided.remove(start + low, start + high)
        return suspicious

    async def look_closer(
        self, offset: int, length: int, findings: Findings, *, repair: bool
    ) -> None:
        """Judge a range, and repair what is certain if *repair*; the caller holds no lock."""
        for start, size in pieces(offset, offset + length):
            async with self._mirror.locks.held(start, start + size, exclusive=True):
                if self._ledger.unsynced(start, size):
                    with suppress(OSError):  # let every replica report losses
                        await self._mirror.sync()
                deadline = trio.current_time() + self._mirror.search_s
                for part in list(self.comparable(start, size)):
                    await self._judge_piece(*part, findings, deadline, repair=repair)
        self._mirror.announce_states()

    async def _judge_piece(
        self, offset: int, length: int, findings: Findings, deadline: float, *, repair: bool
    ) -> None:
        """As `look_closer`. A piece that cannot be read is divided until *deadline*."""
        mirror, members = self._mirror, list(self._ledger.members)
        asked = await mirror.ask(members, Kind.READ, mirror.threshold, offset, length)
        if list(self.comparable(offset, length)) != [(offset, length)]:
            return  # meanwhile some replica told of a loss: another repair sees to that
        holders = holders_of(self._ledger, offset, length)
        asked = [one for one in asked if one.replica in holders]
        failed = [one for one in asked if one.error is not None and one.replica.state.answers]
        answers = {one.replica: one.data for one in asked if one.error is None}
        middle = middle_block(offset, length)
        if failed and middle and trio.current_time() < deadline:
            for start, end in (offset, middle), (middle, offset + length):
                await self._judge_piece(start, end - start, findings, deadline, repair=repair)
            return
        mirror.report(failed)
        unread = [one.replica for one in failed]
        judged = []
        for low, high in blocks(offset, length):
            ballots = {replica: data[low:high] for replica, data in answers.items()}
            judged.append((low, high, *judge(ballots, unread, mirror.threshold)))
        for judgement, group in groupby(judged, lambda one: one[2]):
            run = list(group)
            place, size = offset + run[0][0], run[-1][1] - run[0][0]
            self.undecided.remove(place, place + size)
            contents = [data for *_, data in run if data is not None]
            right = b"".join(contents) if len(contents) == len(run) else None
            await self._act(judgement, place, size, right, list(answers), findings, repair=repair)

    async def _act(
        self,
        judgement: Judgement,
        offset: int,
        length: int,
        right: bytes | None,
        sources: Sequence[Replica],
        findings: Findings,
        *,
        repair: bool,
    ) -> None:
        """Tell of adjacent blocks with one judgement, and repair them if that is certain.

        *right*: what they should hold; None: nobody knows. *sources*: who could be read.
        """
        if not (judgement.wrong or judgement.unread or judgement.undecided):
            return
        count, events = -(-length // BLOCK), self._mirror.events
        differ = bool(judgement.wrong) or judgement.undecided
        findings.count(
            mismatches=count * differ,
            unreadable=count * bool(judgement.unread),
            undecided=count * judgement.undecided,
        )
        for replica in judgement.wrong:
            replica.counters.mismatches += count
            events.mismatch(offset, length, replica.path)
        if judgement.undecided:
            events.mismatch(offset, length, None)
            self.undecided.add(offset, offset + length)
            self.undecided.limit(UNDECIDED_RANGES_MAX)
            findings.note(Find(offset, length, None, "undecided", repaired=False))
        given: set[Replica] = set()
        if right is not None:
            voters = [replica for replica in sources if replica not in judgement.wrong]
            to_give = list(judgement.wrong) if repair else []
            for replica in judgement.unread:
                if await self._may_give(replica, offset, length, len(voters), repair=repair):
                    to_give.append(replica)
            given = await self._give(to_give, offset, right, voters)
        for replica in (*judgement.wrong, *judgement.unread):
            blame = "majority" if replica in judgement.wrong else "unreadable"
            findings.note(Find(offset, length, replica.path, blame, repaired=replica in given))
        done = not judgement.undecided and given.issuperset((*judgement.wrong, *judgement.unread))
        findings.count(repaired=count * done, unrepaired=count * (not done))

    async def _may_give(
        self, replica: Replica, offset: int, length: int, voters: int, *, repair: bool
    ) -> bool:
        """Whether an unreadable *replica* may be given what *voters* others agree on.

        Fewer than the threshold are believed only if asked to repair, and if the place has surely
        nothing to lose: the error of a whole replica may pass.
        """
        if voters >= self._mirror.threshold:
            return True
        return repair and await is_bad_place(self._mirror, replica, offset, length)

    async def _give(
        self, replicas: Sequence[Replica], offset: int, data: bytes, sources: Sequence[Replica]
    ) -> set[Replica]:
        """Rewrite *replicas* with *data*, which *sources* hold; returns those that hold it now."""
        if not replicas:
            return set()
        mirror, given = self._mirror, set()
        try:
            refused = await repair_write(mirror, self._sidecars, replicas, offset, data, sources)
        except OSError:
            return set()  # the intent cannot be recorded now
        for replica in replicas:
            if replica in refused or not replica.standing.is_member:
                continue
            (read,) = await mirror.ask([replica], Kind.READ, 0, offset, len(data))
            if read.error is None and read.data == data:
                mirror.events.repaired(replica.path, offset, len(data))
                given.add(replica)
        return given
