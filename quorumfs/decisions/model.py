"""The words of a set: what was found, how the set is used, and the standing of each replica
(`quorumfs.decisions.standing`).
"""

from dataclasses import dataclass
from enum import Enum

from quorumfs.decisions.dirtymap import DirtyMap
from quorumfs.decisions.record import Identity, PastMount, Record, Sidecar, path_for
from quorumfs.decisions.standing import Standing

__all__ = ["Found", "Member", "Plan", "RepairKind", "Standing"]


@dataclass(frozen=True, slots=True)
class Found:
    """What was found at one path."""

    path: str
    image: Identity | None
    """None: there is no usable image."""
    sidecar: Sidecar | None = None
    problem: str | None = None
    """Why there is no image, or why the sidecar cannot be read."""
    instance: int | None = None
    """None: the sidecar vouches for the image, because both are on one file system with lasting
    inode numbers. Else the `mount_instance` that the image was found in, of a device the number of
    its attachment, which vouches for the image while that mount, or that attachment, lasts; 0:
    unknown."""
    place: str = ""
    """Where its sidecar is, or should be; empty: beside the image."""
    device: bool = False
    """It is a block device: it may be longer than on record, and has a fingerprint for times."""
    recorded_ns: int = 0
    """When its sidecar was last written (mtime); 0: unknown."""
    copied: bool = False
    """Its sidecar is another file than the one that the last mount had open: a copy, perhaps an
    older one, as where a directory of sidecars was put back from a backup."""
    left_ns: int = 0
    """The ctime of the image when this mount, which still lasts, closed it; 0: unknown."""
    proven: bool = False
    """The image was found to hold what this mount wrote last, so it is no older copy."""

    @property
    def exchangeable(self) -> bool:
        """Whether another image may come to its path while the mount `instance` lasts, as where a
        server of FUSE comes back: the mount says little, then, and proves nothing."""
        numbered = self.image is not None and bool(self.image.inode)
        return self.instance is not None and not self.device and not numbered

    @property
    def sidecar_place(self) -> str:
        """The path of its sidecar."""
        return self.place or path_for(self.path)

    @property
    def in_use(self) -> Identity | None:
        """The identity that tells the image while the set is in use, and after a crash."""
        if self.image is None:
            return None
        inode = self.image.inode if self.instance is None else self.instance
        return Identity(inode, self.image.size)

    def is_short(self, disk_size: int) -> bool:
        """Whether the image lost its end: a disk of *disk_size* bytes may have grown without it."""
        size = self.sidecar.record.size if self.sidecar else disk_size
        return self.image is not None and self.image.size < size


@dataclass(frozen=True, slots=True)
class Member:
    """The part of one path in the set."""

    path: str
    slot: int | None
    """The replica's place in the record's roles; None if it has none."""
    state: Standing
    reason: str | None = None
    """Why the replica is not current."""
    compare: bool = False
    """Most chunks that the replica is said to lack are expected to be equal."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a set is to be used."""

    rule: str
    """The name of the rule that decided."""
    record: Record
    """The latest record."""
    threshold: int
    """The threshold asked for, or else the record's; a commit by enough members records it."""
    map: DirtyMap
    """The chunks that may differ, and the chunks that each replica lacks."""
    members: tuple[Member, ...]
    """One member for each path, in the order of the command line."""
    unmarked: tuple[tuple[int, range], ...] = ()
    """By slot: chunks for which a current replica is the last to be believed, for it alone lacks a
    mark of them."""
    ejected: tuple[int, ...] = ()
    """Slots that are current in the record and not in this plan; the first commit says so."""
    prepared: tuple[int, ...] = ()
    """Generations of commits that were cut off. The next record lists them as ancestors, so that a
    replica holding one is stale, not foreign."""
    prepared_mounts: tuple[PastMount, ...] = ()
    """Mounts known only from prepared records of the replicas present."""
    sequence_seen: int = 0
    """The highest sequence number seen: the next commit's must be higher."""
    notes: tuple[str, ...] = ()
    """Notes for the operator, for the log."""
    adopted: bool = False
    """There was no set before, and sidecars are still to be created."""
    quorum: int = 1
    """How many current members must hold the first commit: its threshold, or the old one."""


class RepairKind(Enum):
    """Why replicas are being compared or copied; values are what ``status`` shows."""

    RESYNC = "resync"
    """A replica gets what it lacks."""
    VERIFY = "verify"
    """Replicas that nobody ever compared are compared."""
    SETTLE = "settle"
    """What was being written when the set was last used is made equal."""
