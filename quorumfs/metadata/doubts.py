"""Where the current replicas of a set are not all to be believed. Pure: no I/O, no clock.

*Unsettled* chunks may differ, through a crash or a change that failed: reads have one pinned
source, and repairs make them equal. A replica *lost* what it took and could not flush: others are
the source there. What adopted images differ in is nobody's to make equal; where a change failed
there it is *torn*, and read only where all hold the same: nothing that was read turns back.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from quorumfs.dirtymap import UNVERIFIED, lacks
from quorumfs.metadata import Choice
from quorumfs.metadata.recorded import Recorded
from quorumfs.ranges import RangeSet, segments
from quorumfs.replica import Replica
from quorumfs.voting import BLOCK


class Doubts:
    """What is known about differences between the current replicas of one set."""

    def __init__(self, recorded: Recorded, threshold: int, *, settling: bool) -> None:
        """*threshold*: what a vote needs. *settling*: what may differ is made equal before it is
        shown.
        """
        self._recorded = recorded
        self._threshold = threshold
        self._settling = settling
        self._map = recorded.map
        self._everything = RangeSet()
        self._everything.add(0, len(self._map))
        self.members: Sequence[Replica] = ()
        """The current replicas."""
        self.unsettled = RangeSet()
        """Chunks in which they may differ."""
        self.inherited = RangeSet()
        """Those that were so when the set was mounted: what was acknowledged there, and what a
        flush lost, nobody knows any more."""
        self._pin: Replica | None = None
        """Who answered for an unsettled chunk when the first current replica could not."""
        self._shown: dict[Replica, RangeSet] = {}
        """Whose chunks were shown without being made equal first."""
        self.torn = RangeSet()
        """Bytes in which adopted images may differ, and a change failed or was cut off: nobody may
        make them equal, and nobody can tell what of it is the change."""
        self.unreadable = RangeSet()
        """Bytes, whole blocks, that none who held them can be read at: a read gets EIO until
        somebody writes there. Whoever was given the rest may hold anything there."""
        self.lost: dict[Replica, RangeSet] = {}
        """Chunks that a current replica took and could not flush: its ``lacks`` bits, too."""
        self.risked: dict[Replica, RangeSet] = {}
        """Chunks that it was the last to hold when it could not flush some of what it had taken: it
        is believed, for what it shows there is all that is left."""
        self.losing: dict[Replica, RangeSet] = {}
        """The same, of those whose sync has failed, while the flush waits for others."""
        self.truncated: set[Replica] = set()
        """Current replicas whose image lost its end: it may get it back, with zeros."""
        self.losses = 0
        """How often a replica lost something: for who must know whether one did meanwhile."""

    def __bool__(self) -> bool:
        """Whether there is any."""
        unequal = self.unsettled or self.torn or self.unreadable
        return bool(unequal or self.lost or self.losing or self.truncated)

    # Whom to believe

    def sources(self, chunks: range) -> Iterator[tuple[range, list[Replica]]]:
        """Cut *chunks* where it changes whose data is right if the current replicas differ (P7).

        With each part those that lost nothing there; or the last that held it, if that may have
        lost some; while syncs fail, those that had lost nothing before; or all if nobody did not.
        The best comes first, and it is the same after every mount: the first in the record that
        answers.
        """
        order = sorted(self.members, key=lambda r: (r.hung, r is not self._pin, r.slot or 0))
        lost_by = {replica: self.lost_by(replica) for replica in order}
        before = {replica: self._lost_before(replica) for replica in order}
        known = (lost_by, before, self.risked, self._shown)
        cuts = [places for each in known for places in each.values()]
        for start, stop, _ in segments(chunks.start, chunks.stop, cuts):
            lost, lost_before, risked, shown = (_whose(each, start, stop) for each in known)
            held = [replica for replica in order if replica not in lost]
            sound = [replica for replica in held if replica not in risked]
            last = [replica for replica in order if replica not in lost_before]
            yield range(start, stop), shown or sound or held or last or order

    def lost_by(self, replica: Replica) -> RangeSet:
        """Chunks for which a current replica must not be believed."""
        lost = self._lost_before(replica)
        return lost.union(self.losing[replica]) if replica in self.losing else lost

    def _lost_before(self, replica: Replica) -> RangeSet:
        """The same, before the syncs that are under way."""
        if replica in self.truncated:
            return self._everything
        return self.lost.get(replica, _NOTHING)

    def losers(
        self, losses: Mapping[Replica, RangeSet], chunks: range
    ) -> Iterator[tuple[range, list[Replica], list[Replica]]]:
        """Cut *chunks* where it changes what becomes of those who lost them by *losses* (chunks).

        With each part those who lack it from then on, because others hold more of it, and those who
        are the last that held it. Who lost it before is neither.
        """
        before = {replica: self._lost_before(replica) for replica in self.members}
        known = (before, losses, self.risked)
        cuts = [places for each in known for places in each.values()]
        for start, stop, _ in segments(chunks.start, chunks.stop, cuts):
            lost, losing, risked = (_whose(each, start, stop) for each in known)
            gone = [r for r in self.members if r in losing and r not in lost]
            left = [r for r in self.members if r not in losing and r not in lost]
            lacking = gone
            if all(replica in risked for replica in left):  # no better than one that risked some
                lacking = [replica for replica in gone if left and replica in risked]
            yield range(start, stop), lacking, [one for one in gone if one not in lacking]

    def choices(self, offset: int, length: int) -> Iterator[Choice]:
        """Parts of a range (bytes) that differ in who holds them, or in whether they are equal."""
        size = self._map.chunk_size
        chunks, end = self._map.chunks(offset, length), offset + length
        for start, stop, settled in segments(chunks.start, chunks.stop, [self.unsettled]):
            for part, sources in self.sources(range(start, stop)):
                first, last = max(offset, part.start * size), min(end, part.stop * size)
                holders = [r for r in self.members if r in sources] if settled else sources
                # Where too few have not lost it to hold a vote, they are still right.
                few = len(sources) < min(self._threshold, len(self.members))
                for low, high, sound in segments(first, last, [self.torn, self.unreadable]):
                    pinned = not settled or few
                    held_by = holders if _READABLE in sound else []
                    torn = _WHOLE not in sound
                    yield Choice(low, high - low, held_by, pinned=pinned, torn=torn)

    def answered(self, replica: Replica, chunks: range) -> None:
        """Note that a read of *chunks*, which are unsettled, was answered by *replica*."""
        if not self._settling:
            self._shown.setdefault(replica, RangeSet()).add(chunks.start, chunks.stop)
            return
        for _, sources in self.sources(chunks):
            if replica is not sources[0]:
                self._pin = replica

    # What is unequal

    def unsettle(self, chunks: range) -> None:
        """The current replicas may differ in *chunks*."""
        self.unsettled.add(chunks.start, chunks.stop)
        for run in self._map.runs_in(UNVERIFIED, chunks):
            # Nobody may say what is right there but a majority, or the operator.
            self.unsettled.remove(run.start, run.stop)

    def settled(self, chunks: range) -> None:
        """All current replicas hold the same in *chunks*."""
        self.unsettled.remove(chunks.start, chunks.stop)
        self.inherited.remove(chunks.start, chunks.stop)
        for replica in {*self.lost, *self.risked}:
            self.took(replica, chunks)
        if not self.unsettled:
            self._pin = None

    def took(self, replica: Replica, chunks: range) -> None:
        """*replica* holds what others hold of *chunks*."""
        lost = self.lost.get(replica, _NOTHING)
        if lost.overlaps(chunks.start, chunks.stop) and replica.slot is not None:
            self._recorded.remove(lacks(replica.slot), chunks)
        for kept in (self.lost, self.risked):
            if replica in kept:
                kept[replica].remove(chunks.start, chunks.stop)
                if not kept[replica]:
                    del kept[replica]

    def tear(self, start: int, end: int) -> None:
        """A change of ``[start, end)`` (bytes) failed, or was cut off, on some of all."""
        for run in self._map.runs_in(UNVERIFIED, self._map.chunks(start, end - start)):
            first, last = self._map.bounds_of(run)
            low, high = start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK
            self.torn.add(max(low, first), min(high, last))

    def mend(self, start: int, end: int) -> None:
        """A change of ``[start, end)`` (bytes) ended: whole blocks of it are the same on all."""
        low = -(-start // BLOCK) * BLOCK
        high = end if end == self._map.size else end // BLOCK * BLOCK
        if self.torn and low < high:
            self.torn.remove(low, high)

    def to_remember(self) -> Iterator[range]:
        """All chunks in which something may differ in a way that is to be remembered."""
        for start, end in self.unsettled:
            yield range(start, end)
        for start, end in self.torn:
            yield self._map.chunks(start, end - start)

    # What was lost

    @property
    def lossy(self) -> set[Replica]:
        """Current replicas that lost something, as the last flush found them."""
        return {*self.lost, *self.truncated}

    def held_only_by(self, replicas: Collection[Replica]) -> bool:
        """Whether some chunk is held by none but these: all others lost it."""
        if not self:
            return False
        parts = self.sources(range(len(self._map)))
        held_by_few = (sources for _, sources in parts if len(sources) < len(self.members))
        return any(set(sources).issubset(replicas) for sources in held_by_few)

    def lose(self, replica: Replica, chunks: range) -> None:
        """*replica*, which is current, lost what it had taken of *chunks*."""
        self.lost.setdefault(replica, RangeSet()).add(chunks.start, chunks.stop)
        if replica in self.risked:
            self.risked[replica].remove(chunks.start, chunks.stop)

    def forget(self, replica: Replica) -> None:
        """It is not current any more: then its ``lacks`` bits alone say what it lost."""
        self.lost.pop(replica, None)
        self.risked.pop(replica, None)
        self.losing.pop(replica, None)
        self.truncated.discard(replica)

    def lost_in(self, chunks: range) -> bool:
        """Whether anybody lost any of *chunks*, as the last flush found them."""
        lost = (*self.lost.values(), *self.risked.values())
        return any(places.overlaps(chunks.start, chunks.stop) for places in lost)

    def undurable(self, replica: Replica) -> RangeSet:
        """Chunks of which a current replica is not known to hold durably what it shows there,
        whatever it has synced since they were written.
        """
        risked = self.risked.get(replica, _NOTHING)
        return self.inherited.union(risked) if risked else self.inherited

    def risk(self, replica: Replica, chunks: range) -> None:
        """*replica*, the last that holds *chunks*, may have lost some of what it had taken."""
        self.risked.setdefault(replica, RangeSet()).add(chunks.start, chunks.stop)

    def to_settle_first(self) -> list[range]:
        """The chunks of which a flush could not tell what it made durable."""
        first = self.inherited
        for lost in (*self.lost.values(), *self.risked.values()):
            first = first.union(lost)
        return [range(start, end) for start, end in first]

    def decided_by_loss(self, chunks: range) -> Iterator[range]:
        """What of *chunks* was never compared, and all current replicas but one lost.

        It is on record who lost something there (P4): the one is right.
        """
        for part, sources in self.sources(chunks):
            if len(sources) == 1 < len(self.members) and self._map.any(UNVERIFIED, part):
                yield part


def _whose(places: Mapping[Replica, RangeSet], start: int, stop: int) -> list[Replica]:
    """The replicas of whose *places* some are in ``[start, stop)``."""
    return [replica for replica, theirs in places.items() if theirs.overlaps(start, stop)]


_NOTHING = RangeSet()
_WHOLE, _READABLE = range(2)
"""Among what a range is cut by: it is not torn, and it can be read."""
