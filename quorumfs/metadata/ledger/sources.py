"""Whom to believe where the current replicas may differ. Pure: no I/O, no clock.

Decided from what each of them holds (`quorumfs.metadata.ledger.content`) and whether they agree
(`quorumfs.metadata.ledger.agreement`). Where they do not agree the choice is kept once it was
shown, for nothing that was read may turn back (P7): while repairs run, by *pinning* the replica
that answered; in a mount that cannot repair, chunk by chunk.
"""

from collections.abc import Collection, Iterator

from quorumfs.decisions.dirtymap import UNVERIFIED, DirtyMap
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.metadata.ledger.agreement import Agreement
from quorumfs.metadata.ledger.content import Content, whose
from quorumfs.metadata.ledger.known import ReadSegment
from quorumfs.replica.replica import Replica


class Sources:
    """Whom to believe, of the current replicas of one set."""

    def __init__(
        self,
        known: DirtyMap,
        content: Content,
        agreement: Agreement,
        threshold: int,
        *,
        repairing: bool,
    ) -> None:
        """*threshold*: what a vote needs. *repairing*: what may differ is made equal before it is
        shown.
        """
        self._map = known
        self._content = content
        self._agreement = agreement
        self._threshold = threshold
        self._repairing = repairing
        self._pin: Replica | None = None
        """The replica that answered for divergent chunks when the first member could not."""
        self._shown: dict[Replica, RangeSet] = {}
        """By replica, the chunks that it answered for, and that were not made equal first."""

    def of(self, chunks: range) -> Iterator[tuple[range, list[Replica]]]:
        """Cut *chunks* where it changes whose data is right if the current replicas differ (P7).

        Yields with each part the members to believe, the best one first: those that hold it without
        any loss; else the last that held it, though that may have lost some; else, while syncs
        fail, those that had lost nothing before; else all. Their order is the same after every
        mount: the first in the record that answers.
        """
        content = self._content
        order = sorted(content.members, key=lambda r: (r.hung, r is not self._pin, r.slot or 0))
        unbelieved = {replica: content.unbelieved(replica, chunks) for replica in order}
        lacked = {replica: content.lacked(replica, chunks) for replica in order}
        risked = {replica: content.risked(replica) for replica in order}
        known = (unbelieved, lacked, risked, self._shown)
        cuts = [places for each in known for places in each.values()]
        for start, stop, _ in segments(chunks.start, chunks.stop, cuts):
            doubted, lacking, risking, shown = (whose(each, start, stop) for each in known)
            held = [replica for replica in order if replica not in doubted]
            sound = [replica for replica in held if replica not in risking]
            last = [replica for replica in order if replica not in lacking]
            yield range(start, stop), shown or sound or held or last or order

    def read_segments(self, offset: int, length: int) -> Iterator[ReadSegment]:
        """Parts of a range (bytes) that differ in who holds them, or in whether they are equal."""
        agreement, members = self._agreement, self._content.members
        size = self._map.chunk_size
        chunks, end = self._map.chunks(offset, length), offset + length
        for start, stop, agreed in segments(chunks.start, chunks.stop, [agreement.divergent]):
            for part, sources in self.of(range(start, stop)):
                first, last = max(offset, part.start * size), min(end, part.stop * size)
                holders = [r for r in members if r in sources] if agreed else sources
                # Where too few have not lost it to hold a vote, they are still right.
                few = len(sources) < min(self._threshold, len(members))
                cuts = [agreement.torn, agreement.unreadable]
                for low, high, sound in segments(first, last, cuts):
                    pinned = not agreed or few
                    held_by = holders if _READABLE in sound else []
                    torn = _WHOLE not in sound
                    yield ReadSegment(low, high - low, held_by, pinned=pinned, torn=torn)

    def pin_source(self, replica: Replica, chunks: range) -> None:
        """Note that a read of *chunks*, which are divergent, was answered by *replica*."""
        if not self._repairing:
            self._shown.setdefault(replica, RangeSet()).add(chunks.start, chunks.stop)
            return
        for _, sources in self.of(chunks):
            if replica is not sources[0]:
                self._pin = replica

    def unpin(self) -> None:
        """Note that nothing is divergent any more."""
        self._pin = None

    def held_only_by(self, replicas: Collection[Replica]) -> bool:
        """Whether some chunk is held by none but *replicas*: all others lost it."""
        if not (self._content or self._agreement):
            return False
        members = self._content.members
        parts = self.of(range(len(self._map)))
        held_by_few = (sources for _, sources in parts if len(sources) < len(members))
        return any(set(sources).issubset(replicas) for sources in held_by_few)

    def decided_by_loss(self, chunks: range) -> Iterator[range]:
        """What of *chunks* was never compared, and all members but one lost.

        It is on record which of them lost something there (P4): the one that is left is right.
        """
        for part, sources in self.of(chunks):
            if len(sources) == 1 < len(self._content.members) and self._map.any(UNVERIFIED, part):
                yield part


_WHOLE, _READABLE = range(2)
"""Among what a range is cut by: it is not torn, and it can be read."""
