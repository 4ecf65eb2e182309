"""The interface between the disk and its metadata, kept in sidecars or in memory."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from quorumfs.decisions.claim import Claim
from quorumfs.metadata.ledger.knowledge import Knowledge, Outcome
from quorumfs.replica.replica import Replica
from quorumfs.replica.ticks import Rhythm


class ReplicaReport(NamedTuple):
    """The status of a replica's data."""

    replica_id: bytes | None = None
    """None: no record names the replica."""
    lacking_bytes: int = 0
    """Bytes for which the replica is not read."""
    reason: str | None = None
    """Why the replica is not current."""
    truncated: bool = False
    """The replica is current, and its image lost its end."""
    undurable: bool = False
    """The replica failed to flush bytes for which it is still read."""
    lost: bool = False
    """The replica is known to lack data, or to have lost unsynced writes."""


class AbsentReplica(NamedTuple):
    """A replica of the set missing on the command line of this mount."""

    path: str
    """The last known path."""
    replica_id: bytes
    lacking_bytes: int
    offline: bool = False
    """The administrator took the replica out."""


class SetReport(NamedTuple):
    """The status of the whole set."""

    metadata: str
    """The value of the mount option."""
    set_id: bytes | None = None
    generation: int | None = None
    absent: tuple[AbsentReplica, ...] = ()
    unequal: bool = False
    """Members may differ in some chunk, and repairs are to make them equal."""
    unverified: bool = False
    """Some chunk was never compared since the images were adopted."""


class Metadata(Protocol):
    """Which replica holds which data of a disk, and how the set remembers it."""

    @property
    def ledger(self) -> Knowledge:
        """Everything known about the replicas."""

    async def record_options(self) -> None:
        """Record the options that the next mount must know, before the disk is used.

        Raises `OSError` if the commit fails.
        """

    async def change_threshold(self, threshold: int) -> None:
        """Have another vote *threshold* in force from now on, and on record (R3).

        Raises `OSError`, and the threshold is the one before: with EBUSY nothing was written,
        because too few replicas are current.
        """

    async def prepare(
        self, offset: int, length: int, *, ahead: bool = False, repair: bool = False
    ) -> None:
        """Make the write-intent marks of a range durable before it is changed (R1).

        *ahead*: mark the following bytes too, if a change of them is likely.
        *repair*: a repair makes replicas equal, and the disk keeps its content.
        Raises `OSError` if fewer replicas than the threshold can store the marks.
        """

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        """Make the outcome of a change known to later reads and mounts (R2, R3).

        The caller holds the range lock. Raises `OSError` if too few replicas took the change.
        """

    @property
    def losses(self) -> int:
        """How many times until now current replicas lost what they had taken, as far as known.

        The same number before a change and after a sync: no sync can have lost that change.
        """

    async def record_losses(self) -> None:
        """Record the losses of failed syncs while other syncs are still awaited."""

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        """Record the outcome of a flush (R4). Raises `OSError` if too few replicas synced."""

    async def written_over(self, offset: int, length: int) -> None:
        """Remove a range, now written and durable, from the recorded unreadable bytes.

        The rest of a partly written block stays unreadable: which replica holds what of the rest is
        unknown. Raises `OSError` if the list cannot be written.
        """

    async def truncated(self, replica: Replica) -> None:
        """Note the truncation of the image of *replica*; the caller may hold any range lock."""

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        """Note a rewrite of a range of *replica* with other members' data; *well*: it succeeded.

        The caller holds the range lock.
        """

    async def close(self) -> None:
        """Close the disk in order: all data is durable, and no request is under way."""

    # Status

    def report(self, replica: Replica) -> ReplicaReport:
        """The status of *replica*; callable from any thread."""

    def report_set(self) -> SetReport:
        """The status of the set; callable from any thread."""

    # Which mount has the set

    @property
    def fenced(self) -> Claim | None:
        """The claim of the mount that took the set over; None: the set is ours."""

    def require_ours(self) -> None:
        """Raise `OSError` (EIO) if a different mount has the set."""

    async def watch(self, rhythm: Rhythm) -> None:
        """Watch for a takeover by a different mount, until cancelled."""

    async def release(self) -> None:
        """Release the set for other mounts; nothing is written afterwards."""
