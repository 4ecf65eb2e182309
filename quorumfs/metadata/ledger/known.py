"""What is known of who holds what: the facts that are told, and the questions that are asked."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from quorumfs.decisions.ranges import RangeSet
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Operation


class Outcome(NamedTuple):
    """What one replica made of one operation."""

    replica: Replica
    operation: Operation

    @property
    def error(self) -> OSError | None:
        return self.operation.error

    @property
    def data(self) -> bytes:
        """What a successful read gave."""
        assert isinstance(self.operation.value, bytes)
        return self.operation.value


class ReadSegment(NamedTuple):
    """Whom to read a part of a request from."""

    offset: int
    length: int
    holders: list[Replica]
    """Those that hold all of it, in order."""
    pinned: bool = False
    """They may differ: the first that can be read is right, and no vote is held."""
    lacking: tuple[Replica, ...] = ()
    """Those that may be given what they lack here."""
    torn: bool = False
    """They may have differed before a change failed on some: only what they all hold is right."""


class Known(Protocol):
    """What is known of one disk: asked, and told, without waiting."""

    @property
    def receivers(self) -> Sequence[Replica]:
        """Whom every change goes to."""

    @property
    def readers(self) -> Sequence[Replica]:
        """Whom a read may go to, somewhere."""

    @property
    def flush_receivers(self) -> Sequence[Replica]:
        """Whom every flush goes to."""

    @property
    def uniform_members(self) -> Sequence[Replica]:
        """Those that hold the same everywhere, if nothing is known to differ anywhere; else none.

        Asked for every read: whom it may go to without a closer look.
        """

    def begin_now(self, offset: int, length: int) -> Sequence[Replica]:
        """Begin a change that will have succeeded on all receivers before anything else happens.

        Returns the receivers; none if the change must go the long way.
        """

    def prepared(self, offset: int, length: int, *, repair: bool = False) -> bool:
        """Whether a change of these bytes may begin at once; *repair* as for `prepare`."""

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        """Note that a change begins now; returns the receivers."""

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        """Note that a flush begins now, amid changes of these ranges (start, end; bytes)."""

    def tell_loss(self) -> bool:
        """Whether acknowledged writes were lost that no replica can make good, and no flush of a
        guest has failed for it yet; from here on one has (R13).
        """

    def read_segments(self, offset: int, length: int) -> Iterable[ReadSegment]:
        """Cut a range where the replicas that hold it change."""

    def missed(self, replica: Replica) -> RangeSet:
        """What one of the readers is not read for (bytes)."""

    def may_differ(self, offset: int, length: int) -> bool:
        """Whether those that hold these bytes may hold different ones."""

    def lossy(self, offset: int, length: int) -> bool:
        """Whether somebody lost any of these bytes, and is still to be given what others hold."""

    def unflushable(self) -> bool:
        """Whether a flush cannot tell what is durable before all that may differ is settled."""

    def unsynced(self, offset: int, length: int) -> bool:
        """Whether any of it was written since the last flush: somebody may have lost it since, and
        nobody knows before a sync tells.
        """

    def unverified(self, offset: int, length: int) -> bool:
        """Whether nobody has compared these bytes since the images were adopted."""

    @property
    def unreadable(self) -> RangeSet:
        """Bytes that no replica which holds them can be read at, until they are written."""

    def pin_source(self, replica: Replica, offset: int, length: int) -> None:
        """Note that a read of a range that may differ was answered by *replica*."""

    def giving(
        self, replicas: Sequence[Replica], offset: int, length: int
    ) -> AbstractContextManager[None]:
        """Note that *replicas* alone are given what others hold of a range, while it lasts.

        The others lose nothing of it should a sync of theirs fail. The caller holds the lock of
        these bytes.
        """


def holders_of(ledger: Known, offset: int, length: int) -> list[Replica]:
    """Those that hold all of a range, as far as is known now.

    An answer that somebody gave is worth no more than this says after it came: a flush may have
    shown meanwhile that the one who gave it had lost what it held.
    """
    first, *others = ledger.read_segments(offset, length)
    return [r for r in first.holders if all(r in segment.holders for segment in others)]


def succeeded(outcomes: Iterable[Outcome]) -> int:
    """How many outcomes count towards the threshold."""
    return sum(o.operation.error is None and o.operation.counts for o in outcomes)
