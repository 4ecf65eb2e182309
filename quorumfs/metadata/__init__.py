"""Metadata: who holds what, and how that is remembered.

The disk orders requests; at fixed places it asks and tells one of these, by the mount option
``metadata=``:

`quorumfs.metadata.volatile`
    ``none``: QEMU's way. Byte ranges in memory, forgotten at unmount.
`quorumfs.metadata.sidecars`
    ``sidecar``: a durable record beside every image, whole replicas left behind and caught up. It
    waits and writes; what it knows, and what follows from that, is its ``ledger``, without I/O.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from quorumfs.claim import Claim
from quorumfs.ranges import RangeSet
from quorumfs.replica import Replica
from quorumfs.storage import Operation


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


class Choice(NamedTuple):
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


class ReplicaReport(NamedTuple):
    """What status shows of what one replica holds."""

    replica_id: bytes | None = None
    """None: no record names it."""
    lacking_bytes: int = 0
    """What it is not read for."""
    reason: str | None = None
    """Why it is not current."""
    truncated: bool = False
    """It is current, and its image lost its end."""
    undurable: bool = False
    """It could not flush something that it is still read for."""
    lost: bool = False
    """It is known to lack something, or to have lost what it could not flush."""


class AbsentReplica(NamedTuple):
    """A replica of the set that this mount was not given."""

    path: str
    """Where it was the last time."""
    replica_id: bytes
    lacking_bytes: int


class SetReport(NamedTuple):
    """What status shows of all replicas together."""

    metadata: str
    """The value of the mount option."""
    set_id: bytes | None = None
    generation: int | None = None
    absent: tuple[AbsentReplica, ...] = ()
    unequal: bool = False
    """Current replicas may differ, and are to be made equal."""
    unverified: bool = False
    """Something was never compared since the images were adopted."""


class Known(Protocol):
    """What is known of one disk: asked, and told, without waiting."""

    @property
    def receivers(self) -> Sequence[Replica]:
        """Whom every change goes to."""

    @property
    def readers(self) -> Sequence[Replica]:
        """Whom a read may go to, somewhere."""

    @property
    def flushed(self) -> Sequence[Replica]:
        """Whom every flush goes to."""

    @property
    def alike(self) -> Sequence[Replica]:
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

    def choices(self, offset: int, length: int) -> Iterable[Choice]:
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

    def answered(self, replica: Replica, offset: int, length: int) -> None:
        """Note that a read of a range that may differ was answered by *replica*."""

    def giving(
        self, replicas: Sequence[Replica], offset: int, length: int
    ) -> AbstractContextManager[None]:
        """Note that *replicas* alone are given what others hold of a range, while it lasts.

        The others lose nothing of it should a sync of theirs fail. The caller holds the lock of
        these bytes.
        """


class Metadata(Protocol):
    """Who holds what of one disk, and how that is remembered."""

    @property
    def ledger(self) -> Known:
        """What is known."""

    async def record_options(self) -> None:
        """Put on record what this mount was told and the next one must know, before anybody uses
        the disk. Raises `OSError` if that cannot be.
        """

    async def prepare(
        self, offset: int, length: int, *, ahead: bool = False, repair: bool = False
    ) -> None:
        """Make sure that a change of these bytes is not forgotten should we die in it (R1).

        *ahead*: nor one of the bytes behind them, if that is likely to follow.
        *repair*: replicas are to be made equal, the disk is not changed.
        Raises `OSError` if fewer than the threshold can remember it.
        """

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        """Make what a change did known to all that a later read or mount may ask (R2, R3).

        The caller holds the lock of these bytes. Raises `OSError` if it was not enough.
        """

    async def record_losses(self) -> None:
        """Make what syncs that failed lost known, while others are still awaited."""

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        """Make known what a flush did (R4). Raises `OSError` if it was not enough."""

    async def written_over(self, offset: int, length: int) -> None:
        """Note, durably, that a range which could not be read was written, and is durable.

        The rest of a block that was written in part stays unreadable: who holds what of it is not
        known any more. Raises `OSError` if it cannot be noted.
        """

    async def truncated(self, replica: Replica) -> None:
        """Note that the image of *replica* lost its end; the caller may have locked any range."""

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        """Note that a range of *replica* was rewritten with what the others hold, or could not be.

        The caller holds the lock of these bytes.
        """

    async def close(self) -> None:
        """Note that the disk is closed in order: everything is durable, nothing is under way."""

    # What status shows

    def report(self, replica: Replica) -> ReplicaReport:
        """What is to be said of one replica; asked by any thread."""

    def report_set(self) -> SetReport:
        """What is to be said of all together; asked by any thread."""

    # Whose the set is

    @property
    def fenced(self) -> Claim | None:
        """Which mount has the set instead of this one; None: it is ours."""

    def require_ours(self) -> None:
        """Raise `OSError` (EIO) if the set is another mount's."""

    async def watch(self) -> None:
        """Find out when it is not any more, until cancelled."""

    async def release(self) -> None:
        """Let others have it; nothing is written afterwards."""


def holders_of(ledger: Known, offset: int, length: int) -> list[Replica]:
    """Those that hold all of a range, as far as is known now.

    An answer that somebody gave is worth no more than this says after it came: a flush may have
    shown meanwhile that the one who gave it had lost what it held.
    """
    first, *others = ledger.choices(offset, length)
    return [r for r in first.holders if all(r in choice.holders for choice in others)]


def succeeded(outcomes: Iterable[Outcome]) -> int:
    """How many outcomes count towards the threshold."""
    return sum(o.operation.error is None and o.operation.counts for o in outcomes)
