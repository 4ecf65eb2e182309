"""The ``INTENT`` marks of one set: where the current replicas may come to differ. Pure.

An extent is marked, durably, before the first write to it (R1). The mark is cleared when nothing
was written to the extent for long, and all replicas are current and synced (R5).
"""

from collections.abc import Iterable

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED
from quorumfs.decisions.ranges import RangeSet
from quorumfs.metadata.ledger.agreement import Agreement
from quorumfs.metadata.ledger.intents import Intents
from quorumfs.metadata.ledger.recorded import Recorded


class Marks:
    """Sets and clears the marks in the map that is known."""

    def __init__(self, recorded: Recorded, agreement: Agreement) -> None:
        self.intents = Intents(recorded.map)
        self.extent_chunks = recorded.map.extent // recorded.map.chunk_size
        """Chunks of an extent."""
        self._recorded = recorded
        self._map = recorded.map
        self._agreement = agreement

    def touch(self, chunks: range) -> None:
        """Note that *chunks*, at least one, are written to."""
        first, last = chunks.start // self.extent_chunks, chunks[-1] // self.extent_chunks
        self.intents.touch(range(first, last + 1))

    def want(self, offset: int, length: int, *, ahead: bool) -> None:
        """Mark what is about to be changed (bytes), and *ahead* of it what is likely to follow."""
        extents = self._map.extents(offset, length)
        if span := self.intents.want(extents, self._may_mark, ahead=ahead):
            self._recorded.add(INTENT, self._map.extent_chunks(span))

    def _may_mark(self, extents: range) -> bool:
        """Whether *extents* may be marked that are not about to be written to.

        Not what was never compared: a mark says there that a write may have torn it.
        """
        return not self._map.any(UNVERIFIED, self._map.extent_chunks(extents))

    @property
    def in_use(self) -> bool:
        """Whether anything was written to since `Intents.look_anew`."""
        return next(self.intents.in_use(), None) is not None

    @property
    def idle(self) -> bool:
        """Whether any mark may go: nothing was written there since `Intents.look_anew`."""
        return next(self.intents.idle(), None) is not None

    def clear(self, idle: Iterable[range], claimed: Iterable[tuple[int, int]]) -> None:
        """Clear the marks of *idle* extents, but for those that are in use or differ.

        *claimed* are ranges that may be changed (bytes).
        """
        kept = RangeSet()
        for extents in self.intents.in_use():
            kept.add(extents.start, extents.stop)
        unequal = (self._map.bounds_of(chunks) for chunks in self._agreement.to_remember())
        for start, end in (*claimed, *unequal):
            extents = self._map.extents(start, end - start)
            kept.add(extents.start, extents.stop)
        for span in idle:
            for start, stop in kept.outside(span.start, span.stop):
                self._recorded.remove(INTENT, self._map.extent_chunks(range(start, stop)))

    def clear_all(self) -> None:
        """Clear all marks but those of what differs: the disk is closed in order."""
        self._recorded.remove(INTENT, range(len(self._map)))
        for chunks in self._agreement.to_remember():
            self._recorded.add(INTENT, chunks)
