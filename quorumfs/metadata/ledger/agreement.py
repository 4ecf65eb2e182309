"""Whether the current replicas hold the same of each chunk. Pure: no I/O, no clock.

========== =============================================================== ====================
state      meaning                                                         kept in
========== =============================================================== ====================
AGREED     the current replicas hold the same                              nothing
DIVERGENT  they may differ, through a change that failed on some, or a     memory, under INTENT
           loss: reads have one source, and a repair makes them equal
INHERITED  the same, but since a crash: what was acknowledged there, and   memory, under INTENT
           what a flush lost, nobody knows any more
UNVERIFIED adopted images were never compared there: only a majority, or   the ``UNVERIFIED`` bit
           the operator, can say which one is right
========== =============================================================== ====================

Within UNVERIFIED chunks, bytes are *torn* where a change failed or was cut off: what of them is the
change and what is older nobody can tell, so they are read only where all replicas hold the same.
Anywhere, bytes are *unreadable* if no replica that holds them can be read at.
"""

from collections.abc import Iterator
from enum import Enum

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.decisions.voting import BLOCK
from quorumfs.metadata.ledger.recorded import Recorded


class Agreed(Enum):
    """What is known of one chunk of all current replicas."""

    AGREED = "agreed"
    DIVERGENT = "divergent"
    INHERITED = "inherited"
    UNVERIFIED = "unverified"


class Event(Enum):
    """What happens to a chunk of the disk."""

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
    """What is known about differences between the current replicas of one set."""

    def __init__(self, recorded: Recorded) -> None:
        self.divergent = RangeSet()
        """The chunks that are DIVERGENT or INHERITED."""
        self.inherited = RangeSet()
        """The chunks that are INHERITED."""
        self.torn = RangeSet()
        """Bytes of UNVERIFIED chunks, in whole blocks."""
        self.unreadable = RangeSet()
        """Bytes, in whole blocks: a read of them gets EIO until somebody writes there. A replica
        that was given the rest may hold anything there."""
        self._recorded = recorded
        self._map = recorded.map

    def __bool__(self) -> bool:
        """Whether anything may differ that was not so in adopted images, or is unreadable."""
        return bool(self.divergent or self.torn or self.unreadable)

    def state(self, chunk: int) -> Agreed:
        """What is known of *chunk*."""
        ((_, state),) = self._states(range(chunk, chunk + 1))
        return state

    def _states(self, chunks: range) -> Iterator[tuple[range, Agreed]]:
        """Cut *chunks* where their state changes."""
        unverified = RangeSet()
        for run in self._map.runs_in(UNVERIFIED, chunks):
            unverified.add(run.start, run.stop)
        kept = (unverified, self.inherited, self.divergent)
        states = (Agreed.UNVERIFIED, Agreed.INHERITED, Agreed.DIVERGENT)
        for start, stop, outside in segments(chunks.start, chunks.stop, kept):
            inside = (state for index, state in enumerate(states) if index not in outside)
            yield range(start, stop), next(inside, Agreed.AGREED)

    def tell(self, event: Event, chunks: range) -> None:
        """Note what happened to *chunks*."""
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
        """Note that a change of ``[start, end)`` (bytes) failed, or was cut off, on some of all."""
        for run in self._map.runs_in(UNVERIFIED, self._map.chunks(start, end - start)):
            first, last = self._map.bounds_of(run)
            low, high = start // BLOCK * BLOCK, -(-end // BLOCK) * BLOCK
            self.torn.add(max(low, first), min(high, last))

    def mend(self, start: int, end: int) -> None:
        """Note that a change of ``[start, end)`` (bytes) ended: its whole blocks are the same on
        all replicas.
        """
        low = -(-start // BLOCK) * BLOCK
        high = end if end == self._map.size else end // BLOCK * BLOCK
        if self.torn and low < high:
            self.torn.remove(low, high)

    def to_remember(self) -> Iterator[range]:
        """The chunks that must keep an ``INTENT`` mark, for the next mount to know of them."""
        for start, end in self.divergent:
            yield range(start, end)
        for start, end in self.torn:
            yield self._map.chunks(start, end - start)
