"""The record that the members of a set share, and what each remembers of itself beside it.

How both become bytes, and how a record is committed, says `quorumfs.decisions.sidecar`.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from quorumfs.decisions.dirtymap import DirtyMap

SUFFIX = ".quorumfs"
ANCESTORS_MAX = 32
MOUNTS_MAX = 19


class RoleState(IntEnum):
    """What a replica last was to the set."""

    CURRENT = 1
    STALE = 2
    RESYNCING = 3
    """Being brought up to date: a mixture of old and new, and its own map counts no more."""


class Phase(IntEnum):
    """How far a record got."""

    PREPARED = 1
    COMMITTED = 2


@dataclass(frozen=True, slots=True)
class PastMount:
    """A mount that had the set in use."""

    identity: int
    """A random 64-bit number; of all that is older than such numbers, the generation."""
    first: int
    """The sequence number of its first record; 0: not known."""
    changed: bool
    """It may have changed the content of the disk. One that did not made replicas equal at most."""


@dataclass(frozen=True, slots=True)
class Role:
    """What the set knows of one of its replicas; its place in the list is the replica's slot."""

    replica_id: bytes
    state: RoleState
    generation: int
    """Of the record that it was last to get: what it lacks since, the others track."""
    path: str
    """Where it was last seen; a hint for people."""
    sequence: int = 0
    """Of the same record: with one before it, the replica was rolled back since."""
    mount: int = 0
    """The latest one in that record; 0 if it names none."""

    @property
    def last_mount(self) -> int:
        """The head of the lineage of that record."""
        return self.mount or self.generation


@dataclass(frozen=True, slots=True)
class Record:
    """What all members agree on."""

    set_id: bytes
    size: int
    chunk_size: int
    threshold: int
    generation: int
    roles: tuple[Role, ...]
    ancestors: tuple[int, ...] = ()
    """Earlier generations, latest first."""
    sequence: int = 1
    """Counts the commits: within one generation a higher one is later."""
    clean: bool = True
    """Closed in order: nothing was under way."""
    mounts: tuple[PastMount, ...] = ()
    """Those that had the set in use, latest first."""

    @property
    def lineage(self) -> tuple[PastMount, ...]:
        """The mounts; while there are none, the generations stand for those before."""
        return self.mounts or tuple(PastMount(each, 0, changed=True) for each in self.history)

    @property
    def key(self) -> tuple[object, ...]:
        """By which records of one set are told apart."""
        return self.generation, self.sequence, self.mounts[:1]

    @property
    def history(self) -> tuple[int, ...]:
        """All generations known, the present one first."""
        return (self.generation, *self.ancestors)

    @property
    def disk(self) -> tuple[bytes, int, int]:
        """What all records of one set have in common: set id, size and chunk size."""
        return self.set_id, self.size, self.chunk_size

    @property
    def chunks(self) -> int:
        """The number of chunks that the disk has."""
        return -(-self.size // self.chunk_size)

    def slot_of(self, replica_id: bytes) -> int | None:
        """The slot of a replica; None if it is not in the set."""
        for slot, role in enumerate(self.roles):
            if role.replica_id == replica_id:
                return slot
        return None

    def with_role(self, slot: int, **changes: object) -> "Record":
        """The same record with some fields of one role changed."""
        roles = list(self.roles)
        roles[slot] = replace(roles[slot], **changes)  # type: ignore[arg-type]
        return replace(self, roles=tuple(roles))

    def with_state(self, slots: Iterable[int], state: RoleState) -> "Record":
        """The same record with the replicas in *slots*, which hold it, in another state.

        Eject: this of the record they held, then `minted`. Resync and join: this of the record
        that is about to be committed on them too.
        """
        record = self
        for slot in slots:
            record = record.with_role(
                slot,
                state=state,
                generation=self.generation,
                sequence=self.sequence,
                mount=self.mounts[0].identity if self.mounts else 0,
            )
        return record

    def entered(
        self, identity: int, *, changed: bool, passed: Iterable[PastMount] = ()
    ) -> "Record":
        """The same record with the mount *identity* as the latest.

        *changed*: it may change the disk from now on. *passed*: mounts that were prepared after
        the latest one and led nowhere, or that were given up; one of them that was on record went
        on afterwards, so it is moved. When they began says nothing of when those ended that were on
        record: that is now.
        """
        latest = self.mounts[0] if self.mounts else None
        if latest and latest.identity == identity:
            latest = replace(latest, changed=latest.changed or changed)
            return replace(self, mounts=(latest, *self.mounts[1:]))
        latest = PastMount(identity, self.sequence, changed)
        ended = (replace(mount, first=self.sequence) for mount in passed)
        later = {mount.identity: mount for mount in (latest, *ended)}
        earlier = (one for one in self.lineage if one.identity not in later)
        return replace(self, mounts=(*later.values(), *earlier)[:MOUNTS_MAX])

    def minted(self, also_known: Iterable[int] = ()) -> "Record":
        """The same record at the start of a new generation.

        *also_known*: generations that were prepared after this one and led nowhere.
        """
        passed = tuple(g for g in also_known if g not in self.history)
        ancestors = (*passed, *self.history)[:ANCESTORS_MAX]
        return replace(self, generation=random_identity(), ancestors=ancestors)


def random_identity() -> int:
    """A new 64-bit number for a generation or a mount, never 0."""
    return int.from_bytes(os.urandom(8), "little") or 1


@dataclass(frozen=True, slots=True)
class Identity:
    """What an image file looked like from outside."""

    inode: int = 0
    size: int = 0
    """Bytes."""
    mtime_ns: int = 0
    ctime_ns: int = 0


UNKNOWN_IDENTITY = Identity()


def identity_of(status: os.stat_result) -> Identity:
    """The identity of the image with *status*."""
    return Identity(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One replica's memory, as read from its file."""

    replica_id: bytes
    record: Record
    """The last one committed."""
    map: DirtyMap
    identity: Identity = UNKNOWN_IDENTITY
    """Of the image when the record was written; `UNKNOWN_IDENTITY` while it is in use."""
    prepared: Record | None = None
    """A later record that was prepared and not committed."""
    spare_slot: int = 0
    """Where the next record is to be prepared: not where the only good one is."""
    damage: tuple[str, ...] = ()
    """What could not be read, for a reader."""
    unreadable: tuple[tuple[int, int], ...] = ()
    """Bytes ``[start, end)`` that no replica which held them could be read at."""
    unreadable_number: int = 0
    """How often that was written."""

    @property
    def slot(self) -> int:
        """This replica's own slot."""
        slot = self.record.slot_of(self.replica_id)
        assert slot is not None  # checked when it was read
        return slot

    @property
    def own_state(self) -> RoleState:
        """What this replica takes itself for."""
        return self.record.roles[self.slot].state


def path_for(image_path: str) -> str:
    """Where the sidecar of the image at *image_path* is: beside the file itself, not beside a
    symbolic link to it, so that by whatever path the image is given its memory is found.

    Asks the file system where there are links. It need not exist, nor the image.
    """
    return os.path.realpath(image_path) + SUFFIX
