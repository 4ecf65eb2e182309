"""Which members to believe where members may differ. Pure: no I/O, no clock.

The choice follows from the content of each member (`quorumfs.metadata.ledger.content`) and from
their agreement (`quorumfs.metadata.ledger.agreement`). In divergent chunks the choice is kept once
data was shown, because no read may turn back (P7): a mount that repairs *pins* the replica that
answered; a mount that cannot repair remembers the replica for each chunk.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence

from quorumfs.decisions.dirtymap import UNVERIFIED, DirtyMap
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.decisions.voting import VOTERS_MIN
from quorumfs.metadata.ledger.agreement import Agreement
from quorumfs.metadata.ledger.commit import Records
from quorumfs.metadata.ledger.content import Content, whose
from quorumfs.metadata.ledger.knowledge import ReadSegment
from quorumfs.replica.replica import Replica


class Sources:
    """The members to believe, chunk by chunk."""

    def __init__(
        self,
        known: DirtyMap,
        content: Content,
        agreement: Agreement,
        records: Records,
        *,
        repairing: bool,
    ) -> None:
        """*records* name the threshold of a vote. *repairing*: reads of divergent chunks make them
        equal first."""
        self._map = known
        self._content = content
        self._agreement = agreement
        self._records = records
        self._repairing = repairing
        self._pin: Replica | None = None
        """The replica that answered for divergent chunks in place of the first member."""
        self._unmarked: dict[Replica, RangeSet] = {}
        """By replica, the chunks for which it is the last to be believed: `Plan.unmarked`."""
        self._shown: dict[Replica, RangeSet] = {}
        """By replica, the divergent chunks of which the replica holds all that was shown by a mount
        that cannot repair."""

    def of(self, chunks: range) -> Iterator[tuple[range, list[Replica]]]:
        """Cut *chunks* where the choice of the members to believe changes (P7).

        Yields with each part the members to believe if members differ, best first: the members
        already shown; else the members without any loss; else the RISKED members; else, while
        losses are pending, the members without an earlier loss; else all. Hung members come last,
        a pinned source first, a member that alone lacks a mark after the others. Otherwise the
        record gives the order, the same after every mount.
        """
        content = self._content

        def rank(replica: Replica, unmarked: Collection[Replica] = ()) -> tuple[object, ...]:
            return replica.hung, replica is not self._pin, replica in unmarked, replica.slot or 0

        order = sorted(content.members, key=rank)
        unbelieved = {replica: content.unbelieved(replica, chunks) for replica in order}
        lacked = {replica: content.lacked(replica, chunks) for replica in order}
        risked = {replica: content.risked(replica) for replica in order}
        known = (unbelieved, lacked, risked, self._shown, self._unmarked)
        cuts = [places for each in known for places in each.values()]
        for start, stop, _ in segments(chunks.start, chunks.stop, cuts):
            doubted, lacking, risking, shown, unmarked = (
                whose(each, start, stop) for each in known
            )
            held = [replica for replica in order if replica not in doubted]
            sound = [replica for replica in held if replica not in risking]
            last = [replica for replica in order if replica not in lacking]
            believed = shown or sound or held or last or order
            if unmarked:
                believed = sorted(believed, key=lambda replica: rank(replica, unmarked))
            yield range(start, stop), believed

    def read_segments(self, offset: int, length: int) -> Iterator[ReadSegment]:
        """Cut a range (bytes) where the holders, or their agreement, change."""
        agreement, members = self._agreement, self._content.members
        size = self._map.chunk_size
        chunks, end = self._map.chunks(offset, length), offset + length
        cuts = [agreement.torn, agreement.unreadable]
        for start, stop, divergent in segments(chunks.start, chunks.stop, [agreement.divergent]):
            for part, sources in self.of(range(start, stop)):
                first, last = max(offset, part.start * size), min(end, part.stop * size)
                holders = sources if divergent else [r for r in members if r in sources]
                # Sources are right even if losses leave too few sources for a vote.
                few = len(sources) < min(self._records.threshold, len(members))
                pinned = bool(divergent) or few
                for low, high, inside in segments(first, last, cuts):
                    held_by = [] if _UNREADABLE in inside else holders
                    torn = _TORN in inside
                    yield ReadSegment(low, high - low, held_by, pinned=pinned, torn=torn)

    def believe_last(self, unmarked: Iterable[tuple[int, range]]) -> None:
        """Take over `Plan.unmarked`, of the present members."""
        by_slot = {replica.slot: replica for replica in self._content.members}
        for slot, chunks in unmarked:
            if slot in by_slot:
                places = self._unmarked.setdefault(by_slot[slot], RangeSet())
                places.add(chunks.start, chunks.stop)

    def pin_source(self, replica: Replica, chunks: range) -> None:
        """Have *replica*, which answered for *chunks*, which are divergent, come first from now
        on."""
        for _, sources in self.of(chunks):
            if replica is not sources[0]:
                self._pin = replica

    def note_shown(
        self, holders: Sequence[Replica], others: Sequence[Replica], chunks: range
    ) -> None:
        """Note that *holders* hold what was just shown of *chunks*, which are divergent, and that
        *others* do not. A mount that repairs pins who answered, unless a majority decided."""
        if self._repairing:
            if len(holders) + len(others) < VOTERS_MIN:
                self.pin_source(holders[0], chunks)
            return
        for start, stop, shown in list(
            segments(chunks.start, chunks.stop, [*self._shown.values()])
        ):
            for replica in holders if not shown else ():
                self._shown.setdefault(replica, RangeSet()).add(start, stop)
        for replica in others:
            self._shown.setdefault(replica, RangeSet()).remove(chunks.start, chunks.stop)

    def unpin(self) -> None:
        """Release the pinned source: no chunk is divergent any more."""
        self._pin = None
        self._unmarked.clear()

    def held_only_by(self, replicas: Collection[Replica]) -> bool:
        """Whether only *replicas* hold some chunk, because all other members lost the chunk."""
        if not (self._content or self._agreement):
            return False
        members = self._content.members
        parts = self.of(range(len(self._map)))
        held_by_few = (sources for _, sources in parts if len(sources) < len(members))
        return any(set(sources).issubset(replicas) for sources in held_by_few)

    def decided_by_loss(self, chunks: range) -> Iterator[range]:
        """The UNVERIFIED parts of *chunks* with a single member left to believe.

        The losses of all other members are recorded (P4), so the data of this member is right.
        """
        for part, sources in self.of(chunks):
            if len(sources) == 1 < len(self._content.members) and self._map.any(UNVERIFIED, part):
                yield part


_TORN, _UNREADABLE = range(2)
"""Indexes of the sets of torn, and of unreadable, bytes."""
