"""What the disk asks of whoever keeps its metadata, whether in sidecars or in memory."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from quorumfs.decisions.claim import Claim
from quorumfs.metadata.ledger.known import Known, Outcome
from quorumfs.replica.replica import Replica


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
