"""Whether all members hold the same data of each chunk. Pure: no I/O, no clock.

========== =============================================================== ====================
state      meaning                                                         kept in
========== =============================================================== ====================
AGREED     all members hold the same                                       nothing
DIVERGENT  members may differ, after a partly failed change or a loss:     memory, under INTENT
           reads have one source, and a repair makes the members equal
INHERITED  as DIVERGENT, but since before a crash: unknown is which        memory, under INTENT
           writes were acknowledged, and which writes a flush lost
UNVERIFIED adopted images were never compared: only a majority or the      the ``UNVERIFIED`` bit
           operator can say which image is right
========== =============================================================== ====================

Within UNVERIFIED chunks, bytes are *torn* where a change failed or was cut off: new and older data
cannot be told apart, so torn bytes are read only where all replicas hold the same. In any chunk,
bytes are *unreadable* if a read of them fails on every replica that holds them.
"""

from collections.abc import Iterator
from enum import Enum

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.decisions.voting import BLOCK
from quorumfs.metadata.ledger.recorded import Recorded


class Agreed(Enum):
    """The agreement of the members on a chunk."""

    AGREED = "agreed"
    DIVERGENT = "divergent"
    INHERITED = "inherited"
    UNVERIFIED = "unverified"


class Event(Enum):
    """An event in the life of a chunk of the disk."""

    FAILED = "a change failed on some replicas, or some lost it"
    EQUALIZED = "all replicas were given the same"
    COMPARED = "all replicas were found to hold the same"
    CRASHED = "the set was mounted, and had not been closed"


AGREEMENT = {
    (Agreed.AGREED, Event.FAILED): Agreed.DIVERGENT,
    (Agreed.AGREED, Event.EQUALIZED): Agreed.AGREED,
    (Agreed.AGREED, Event.COMPARED): Agreed.AGREED,
    (Agreed.AGREED, Event.CRASHED): Agreed.AGREED,
    (Agreed.DIVERGENT, Event.FAILED): Agreed.DIVERGENT,
    (Agreed.DIVERGENT, Event.EQUALIZED): Agreed.AGREED,
    (Agreed.DIVERGENT, Event.COMPARED): Agreed.DIVERGENT,
    (Agreed.DIVERGENT, Event.CRASHED): Agreed.INHERITED,
    (Agreed.INHERITED, Event.FAILED): Agreed.INHERITED,
    (Agreed.INHERITED, Event.EQUALIZED): Agreed.AGREED,
    (Agreed.INHERITED, Event.COMPARED): Agreed.INHERITED,
    (Agreed.INHERITED, Event.CRASHED): Agreed.INHERITED,
    (Agreed.UNVERIFIED, Event.FAILED): Agreed.UNVERIFIED,
    (Agreed.UNVERIFIED, Event.EQUALIZED): Agreed.UNVERIFIED,
    (Agreed.UNVERIFIED, Event.COMPARED): Agreed.AGREED,
    (Agreed.UNVERIFIED, Event.CRASHED): Agreed.UNVERIFIED,
}


class Agreement:
    """The known differences between the members of a set."""

    def __init__(self, recorded: Recorded) -> None:
        self.divergent = RangeSet()
        """The chunks that are DIVERGENT or INHERITED."""
        self.inherited = RangeSet()
        """The chunks that are INHERITED."""
        self.torn = RangeSet()
        """Bytes of UNVERIFIED chunks, in whole blocks."""
        self.cut_off = RangeSet()
        """Chunks that a crash may have torn, until all replicas were compared there and given anew
        what they hold alike: a sync that failed before may have dropped what reads still show."""
        self.unreadable = RangeSet()
        """Bytes of which a read gets EIO until a write replaces them. A replica copied around such
        bytes may hold anything there."""
        self._recorded = recorded
        self._map = recorded.map

    def __bool__(self) -> bool:
        """Whether any byte is divergent, torn or unreadable; UNVERIFIED alone does not count."""
        return bool(self.divergent or self.torn or self.unreadable)

    def state(self, chunk: int) -> Agreed:
        """The state of *chunk*."""
        ((_, state),) = self._states(range(chunk, chunk + 1))
        return state

    def _states(self, chunks: range) -> Iterator[tuple[range, Agreed]]:
        """Cut *chunks* where the state changes."""
        unverified = RangeSet()
        for run in self._map.runs_in(UNVERIFIED, chunks):
            unverified.add(run.start, run.stop)
        kept = (unverified, self.inherited, self.divergent)
        states = (Agreed.UNVERIFIED, Agreed.INHERITED, Agreed.DIVERGENT)
        for start, stop, inside in segments(chunks.start, chunks.stop, kept):
            yield range(start, stop), states[inside[0]] if inside else Agreed.AGREED

    def tell(self, event: Event, chunks: range) -> None:
        """Apply *event* to *chunks*."""
        for part, state in list(self._states(chunks)):
            after = AGREEMENT[state, event]
            if after is not state:
                self._put(part, after)

    def _put(self, chunks: range, state: Agreed) -> None:
        differs = state in (Agreed.DIVERGENT, Agreed.INHERITED)
        (self.divergent.add if differs else self.divergent.remove)(chunks.start, chunks.stop)
        inherited = state is Agreed.INHERITED
        (self.inherited.add if inherited else self.inherited.remove)(chunks.start, chunks.stop)
        if state is not Agreed.UNVERIFIED:
            self._recorded.remove(UNVERIFIED, chunks)

    def tear(self, start: int, end: int) -> None:
        """Note a failed or cut-off change of ``[start, end)`` (bytes): UNVERIFIED blocks tear."""
        for run in self._map.runs_in(UNVERIFIED, self._map.chunks(start, end - start)):
            first, last = self._map.bounds_of(run)
            low, high = start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK
            self.torn.add(max(low, first), min(high, last))

    def mend(self, start: int, end: int) -> None:
        """Note a completed change of ``[start, end)`` (bytes): whole blocks in the range are equal
        on all replicas.
        """
        low = -(-start // BLOCK) * BLOCK
        high = end if end == self._map.size else end // BLOCK * BLOCK
        if self.torn and low < high:
            self.torn.remove(low, high)

    def to_remember(self) -> Iterator[range]:
        """The chunks that must keep an ``INTENT`` mark for the next mount: divergent or torn."""
        for start, end in self.divergent:
            yield range(start, end)
        for start, end in self.torn:
            yield self._map.chunks(start, end - start)
