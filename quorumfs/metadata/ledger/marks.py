"""The ``INTENT`` marks of a set: extents where members may come to differ. Pure.

An extent is marked, durably, before its first write (R1). The mark is cleared when the extent has
been idle for long, and all replicas are current and synced (R5).
"""

from collections.abc import Iterable

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED
from quorumfs.decisions.ranges import RangeSet
from quorumfs.metadata.ledger.agreement import Agreement
from quorumfs.metadata.ledger.intents import Intents
from quorumfs.metadata.ledger.recorded import Recorded


class Marks:
    """Sets and clears the marks in the known map."""

    def __init__(self, recorded: Recorded, agreement: Agreement) -> None:
        self.intents = Intents(recorded.map)
        self.extent_chunks = recorded.map.extent // recorded.map.chunk_size
        """The number of chunks in an extent."""
        self._recorded = recorded
        self._map = recorded.map
        self._agreement = agreement

    def touch(self, chunks: range) -> None:
        """Note a write to *chunks*, which must not be empty."""
        first, last = chunks.start // self.extent_chunks, chunks[-1] // self.extent_chunks
        self.intents.touch(range(first, last + 1))

    def touch_all(self, chunks: Iterable[int]) -> None:
        """Note changes of *chunks*, in any order."""
        for extent in {chunk // self.extent_chunks for chunk in chunks}:
            self.intents.touch(range(extent, extent + 1))

    def want(self, offset: int, length: int, *, ahead: bool) -> None:
        """Mark a range (bytes) about to change; *ahead*: also extents likely to be written next."""
        extents = self._map.extents(offset, length)
        if span := self.intents.want(extents, self._may_mark, ahead=ahead):
            self._recorded.add(INTENT, self._map.extent_chunks(span))

    def _may_mark(self, extents: range) -> bool:
        """Whether *extents* may be marked without a write under way.

        Not if any chunk is UNVERIFIED: a mark there means that a write may have torn the chunk.
        """
        return not self._map.any(UNVERIFIED, self._map.extent_chunks(extents))

    def clear(self, idle: Iterable[range], claimed: Iterable[tuple[int, int]]) -> None:
        """Clear the marks of *idle* extents, except extents in use, divergent or torn.

        *claimed*: ranges (start, end; bytes) that may be changed.
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
        """Clear all marks but those of divergent or torn chunks, at an orderly close."""
        self._recorded.remove(INTENT, range(len(self._map)))
        for chunks in self._agreement.to_remember():
            self._recorded.add(INTENT, chunks)
