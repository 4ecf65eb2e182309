"""The words of a set: what a replica is to it, what was found of one, and how the set is used."""

from dataclasses import dataclass
from enum import Enum

from quorumfs.decisions.dirtymap import DirtyMap
from quorumfs.decisions.record import Identity, PastMount, Record, Sidecar


class Standing(Enum):
    """What a replica is to the set at this moment."""

    CURRENT = "current"
    """Holds every acknowledged write."""
    STALE = "stale"
    """Known to be behind; not used where it is."""
    RESYNCING = "resyncing"
    """Stale, being brought up to date; it gets every new write."""
    SUSPECT = "suspect"
    """Its image changed behind its sidecar: stale until compared in full."""
    MISSING = "missing"
    """Does not answer, or is not there."""
    FOREIGN = "foreign"
    """Not of this set, or it cannot prove that it is; never touched."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found at one path."""

    path: str
    image: Identity | None
    """None: there is no image that can be used."""
    sidecar: Sidecar | None = None
    problem: str | None = None
    """Why there is no image, or why its sidecar cannot be read."""
    instance: int | None = None
    """None: the sidecar vouches for the image, being on the same file system, which has lasting
    inode numbers. Else of the mount that the image was found in (`mount_instance`), which does
    while it lasts; 0: nobody knows that."""

    @property
    def in_use(self) -> Identity | None:
        """By which the image is known again while its set is in use, and after a crash."""
        if self.image is None:
            return None
        inode = self.image.inode if self.instance is None else self.instance
        return Identity(inode, self.image.size)


@dataclass(frozen=True, slots=True)
class Member:
    """What becomes of one path."""

    path: str
    slot: int | None
    """Its place in the record's roles; None if it has none."""
    state: Standing
    reason: str | None = None
    """Why it is not current."""
    compare: bool = False
    """Most of what it is said to lack is expected to be equal."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a set is to be used."""

    rule: str
    """The name of the rule that decided."""
    record: Record
    """The latest one."""
    threshold: int
    """The one asked for, or else the record's; a commit by enough puts it on record."""
    map: DirtyMap
    """All that may differ, and what each replica lacks."""
    members: tuple[Member, ...]
    """One for each path, in the order of the command line."""
    ejected: tuple[int, ...] = ()
    """Slots that are current in the record and not in this plan; the first commit says so."""
    prepared: tuple[int, ...] = ()
    """Generations that were prepared, or valid before what was prepared, and led nowhere."""
    prepared_mounts: tuple[PastMount, ...] = ()
    """Mounts of which nobody who is here has more than a prepared record."""
    sequence_seen: int = 0
    """The highest sequence number seen: the next commit's must be higher."""
    notes: tuple[str, ...] = ()
    """What the operator should know, for the log."""
    adopted: bool = False
    """There was no set before: the sidecars are still to be created."""
    quorum: int = 1
    """How many current members must hold the first commit: its threshold, or the old one."""
