"""The knowledge of which replica holds which data: the facts told, and the questions asked."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from quorumfs.decisions.ranges import RangeSet
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Operation

Replicas = Sequence[Replica]


class Outcome(NamedTuple):
    """The outcome of an operation on a replica."""

    replica: Replica
    operation: Operation

    @property
    def error(self) -> OSError | None:
        return self.operation.error

    @property
    def data(self) -> bytes:
        """The data of a successful read."""
        assert isinstance(self.operation.value, bytes)
        return self.operation.value


class ReadSegment(NamedTuple):
    """A part of a read request, and the replicas to read the part from."""

    offset: int
    length: int
    holders: list[Replica]
    """The replicas that hold the whole segment, in order of preference."""
    pinned: bool = False
    """Holders may differ, or be too few for a vote: the first readable holder is right."""
    lacking: tuple[Replica, ...] = ()
    """The replicas that may be given the data of the segment, which they lack."""
    torn: bool = False
    """Only data equal on all holders is right: holders may have differed, and a change failed."""


class Writable(NamedTuple):
    """The changes that may begin without a decision, and succeed on all receivers at once."""

    receivers: Sequence[Replica]
    chunk_size: int
    """Bytes."""
    planes: Sequence[bytearray]
    """The planes of the map, the same objects until the disk grows; none: every chunk may be
    changed."""
    mask: int
    wanted: int
    """A chunk may be changed iff ``state & mask == wanted``."""
    kept_out: Sequence[tuple[int, int]]
    """Ranges (start, end; bytes) that may not be changed."""


class Knowledge(Protocol):
    """The knowledge of a disk: asked and told without waiting."""

    @property
    def replicas(self) -> Sequence[Replica]:
        """All replicas of the mount, in the order of the read pattern; each at its `index`."""

    @property
    def threshold(self) -> int:
        """The number of replicas that must take a change before its acknowledgement."""

    @property
    def receivers(self) -> Sequence[Replica]:
        """The replicas that changes go to."""

    @property
    def readers(self) -> Sequence[Replica]:
        """The replicas that some read may go to."""

    @property
    def flush_receivers(self) -> Sequence[Replica]:
        """The replicas that every flush goes to."""

    @property
    def uniform_members(self) -> Sequence[Replica]:
        """All readers while no byte is known to differ, to be lacking or unreadable; else empty.

        Asked for every read: a read may go to any of these replicas without a closer look.
        """

    def writable(self) -> Writable | None:
        """What may be changed without a decision, until anything else is told to the ledger.

        None: nothing. `wrote` notes the changes made.
        """

    def wrote(self, chunks: Collection[int]) -> None:
        """Note changes of *chunks* (of `Writable.chunk_size`), done on all receivers."""

    def prepared(self, offset: int, length: int, *, repair: bool = False) -> bool:
        """Whether a change of these bytes may begin at once; *repair* as for `Metadata.prepare`."""

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        """Note the start of a change; returns the receivers."""

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        """Note the start of a flush amid changes of ranges (start, end; bytes)."""

    def tell_loss(self) -> bool:
        """Whether a flush of a guest must fail now for writes lost on all replicas (R13).

        The call counts as the failed flush: the same loss is not told again.
        """

    def read_segments(self, offset: int, length: int) -> Iterable[ReadSegment]:
        """Cut a range where the set of replicas that hold the data changes."""

    def missed(self, replica: Replica) -> RangeSet:
        """The bytes where a hole of *replica*, a reader, counts as data."""

    def may_differ(self, offset: int, length: int) -> bool:
        """Whether holders of these bytes may differ."""

    def lossy(self, offset: int, length: int) -> bool:
        """Whether a member lost any of these bytes, and is still to be given them."""

    def unflushable(self) -> bool:
        """Whether chunks must be made equal before a flush can tell what is durable."""

    def unsynced(self, offset: int, length: int) -> bool:
        """Whether any of these bytes was written since the last flush.

        A replica may have lost such bytes, and only a sync tells.
        """

    def unverified(self, offset: int, length: int) -> bool:
        """Whether any of these bytes was never compared since the images were adopted."""

    @property
    def unreadable(self) -> RangeSet:
        """Bytes unreadable on every replica that holds them, until written anew."""

    def note_shown(self, by: Replicas, others: Replicas, offset: int, length: int) -> None:
        """Note that what was just shown of a range that may differ is held *by* these, and not by
        *others*."""

    def giving(
        self, replicas: Sequence[Replica], offset: int, length: int
    ) -> AbstractContextManager[None]:
        """Note a repair that gives a range to *replicas* alone, while the context lasts.

        A failed sync of any other replica loses nothing of the range. The caller holds the range
        lock.
        """


def holders_of(ledger: Knowledge, offset: int, length: int) -> list[Replica]:
    """The replicas that hold all of a range, as far as is known now.

    Check the answer of a replica against this list after the read: a flush may have shown meanwhile
    that the replica had lost the data.
    """
    first, *others = ledger.read_segments(offset, length)
    return [r for r in first.holders if all(r in segment.holders for segment in others)]


def succeeded(outcomes: Iterable[Outcome]) -> int:
    """The number of outcomes that count towards the threshold."""
    return sum(o.operation.error is None and o.operation.counts for o in outcomes)
