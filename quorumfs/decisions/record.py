"""The record that the members of a set share, and the sidecar of each replica.

`quorumfs.decisions.sidecar` says how both become bytes, and how a record is committed.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

from quorumfs.decisions.dirtymap import DirtyMap
from quorumfs.decisions.scrub import NO_SCRUB, ScrubRecord

SUFFIX = ".quorumfs"
ANCESTORS_MAX = 32
MOUNTS_MAX = 19


class RoleState(IntEnum):
    """The state of a replica in a record."""

    CURRENT = 1
    STALE = 2
    RESYNCING = 3
    """The target of a resync: a mixture of old and new, whose own map does not count."""
    OFFLINE = 4
    """Taken out by the administrator, and left alone until taken in again."""
    REMOVED = 5
    """Removed from the set by the administrator: the slot is free once no other sidecar names its
    replica as part of the set."""


class Phase(IntEnum):
    """How far the commit of a record got."""

    PREPARED = 1
    COMMITTED = 2


@dataclass(frozen=True, slots=True)
class PastMount:
    """A mount that had the set in use."""

    identity: int
    """A random 64-bit number; for times before such numbers, the generation."""
    first: int
    """The sequence number of the mount's first record; 0: not known."""
    changed: bool
    """The mount may have changed the content of the disk, not just made replicas equal."""


@dataclass(frozen=True, slots=True)
class Role:
    """One replica in a record; the place of the role in the list is the replica's slot."""

    replica_id: bytes
    state: RoleState
    generation: int
    """The generation of the last record for the replica; members track what it lacks since."""
    path: str
    """Where the replica was last seen; a hint for people."""
    sequence: int = 0
    """The sequence of that record; a replica with an earlier one was rolled back since."""
    mount: int = 0
    """The latest mount in that record; 0 if there is none. Of a removed replica: when it was
    removed, in seconds since 1970."""

    @property
    def last_mount(self) -> int:
        """The head of the lineage of that record."""
        return self.mount or self.generation


@dataclass(frozen=True, slots=True)
class Record:
    """The facts that all members agree on."""

    set_id: bytes
    size: int
    chunk_size: int
    threshold: int
    generation: int
    roles: tuple[Role, ...]
    ancestors: tuple[int, ...] = ()
    """Earlier generations, latest first."""
    sequence: int = 1
    """Counts the commits: within one generation a higher number is later."""
    clean: bool = True
    """The set was closed in order, with nothing under way."""
    mounts: tuple[PastMount, ...] = ()
    """The mounts that had the set in use, latest first."""

    @property
    def lineage(self) -> tuple[PastMount, ...]:
        """The mounts; while there are none, the generations stand for earlier mounts."""
        return self.mounts or tuple(PastMount(each, 0, changed=True) for each in self.history)

    @property
    def key(self) -> tuple[object, ...]:
        """Tells records of one set apart."""
        return self.generation, self.sequence, self.mounts[:1]

    @property
    def history(self) -> tuple[int, ...]:
        """All known generations, the present one first."""
        return (self.generation, *self.ancestors)

    @property
    def disk(self) -> tuple[bytes, int]:
        """The set id and chunk size, common to all records of one set; the size may grow."""
        return self.set_id, self.chunk_size

    @property
    def chunks(self) -> int:
        """The number of chunks of the disk."""
        return -(-self.size // self.chunk_size)

    def new_map(self) -> DirtyMap:
        """A clean map of the disk, with room for all roles."""
        return DirtyMap(self.size, self.chunk_size, slots=len(self.roles))

    @property
    def slots(self) -> list[int]:
        """The slots of the replicas in the set."""
        roles = enumerate(self.roles)
        return [slot for slot, role in roles if role.state is not RoleState.REMOVED]

    @property
    def latest_mount(self) -> int:
        """The identity of the latest mount; 0: none is known."""
        return self.mounts[0].identity if self.mounts else 0

    def slot_of(self, replica_id: bytes) -> int | None:
        """The slot of a replica; None if the replica is not, or no more, in the set."""
        slot = self.place_of(replica_id)
        return None if slot is None or slot not in self.slots else slot

    def place_of(self, replica_id: bytes) -> int | None:
        """As `slot_of`, also of a removed replica."""
        for slot, role in enumerate(self.roles):
            if role.replica_id == replica_id:
                return slot
        return None

    def with_role(self, slot: int, **changes: object) -> "Record":
        """The same record with some fields of one role changed."""
        roles = list(self.roles)
        roles[slot] = replace(roles[slot], **changes)  # type: ignore[arg-type]
        return replace(self, roles=tuple(roles))

    def with_new_role(self, slot: int, role: Role) -> "Record":
        """The same record with *role* in *slot*, which is free, or the next one."""
        roles = list(self.roles)
        roles[slot : slot + 1] = [role]
        return replace(self, roles=tuple(roles))

    def with_state(self, slots: Iterable[int], state: RoleState) -> "Record":
        """The same record with the replicas in *slots*, which hold it, in another state.

        To eject: call this on the record that the replicas hold, then `minted`. For a resync or a
        join: call this on the record that is about to be committed on the replicas, too.
        """
        record = self
        for slot in slots:
            record = record.with_role(
                slot,
                state=state,
                generation=self.generation,
                sequence=self.sequence,
                mount=self.latest_mount,
            )
        return record

    def entered(
        self,
        identity: int,
        first: int | None = None,
        *,
        changed: bool,
        passed: Iterable[PastMount] = (),
    ) -> "Record":
        """The same record with the mount *identity* as the latest.

        *first*: the number of the first record that the mount tried to make valid; None: this one.
        Records that failed before the mount was entered do not make the mount before last longer.
        *changed*: the mount may change the disk from now on. *passed*: mounts that were prepared
        after the latest one and led nowhere, or that were given up. A passed mount that was on
        record went on afterwards, and is moved. Mounts on record count as ended now, whenever the
        passed mounts began.
        """
        first = self.sequence if first is None else first
        latest = self.mounts[0] if self.mounts else None
        if latest and latest.identity == identity:
            latest = replace(latest, changed=latest.changed or changed)
            return replace(self, mounts=(latest, *self.mounts[1:]))
        latest = PastMount(identity, first, changed)
        ended = (replace(mount, first=first) for mount in passed)
        later = {mount.identity: mount for mount in (latest, *ended)}
        earlier = (one for one in self.lineage if one.identity not in later)
        return replace(self, mounts=(*later.values(), *earlier)[:MOUNTS_MAX])

    def minted(self, also_known: Iterable[int] = ()) -> "Record":
        """The same record at the start of a new generation.

        *also_known*: generations that were prepared after this record and led nowhere.
        """
        passed = tuple(g for g in also_known if g not in self.history)
        ancestors = (*passed, *self.history)[:ANCESTORS_MAX]
        return replace(self, generation=random_identity(), ancestors=ancestors)


def random_identity() -> int:
    """A new 64-bit number for a generation or a mount, never 0."""
    return int.from_bytes(os.urandom(8), "little") or 1


@dataclass(frozen=True, slots=True)
class Identity:
    """The stat of an image file, as far as it tells changes."""

    inode: int = 0
    size: int = 0
    """Bytes."""
    mtime_ns: int = 0
    ctime_ns: int = 0
    regions: tuple[int, ...] = ()
    """Of a device: the numbers of the regions that were written to last, the latest one first, at
    most `REGIONS`. The fingerprint, which it has in place of an mtime, covers them."""


REGIONS = 16
UNKNOWN_IDENTITY = Identity()


def identity_of(status: os.stat_result) -> Identity:
    """The identity of the image with *status*."""
    return Identity(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """The content of one replica's sidecar."""

    replica_id: bytes
    record: Record
    """The last record committed."""
    map: DirtyMap
    identity: Identity = UNKNOWN_IDENTITY
    """The image's identity when the record was written, without times while it was in use."""
    prepared: Record | None = None
    """A later record that was prepared and not committed."""
    spare_slot: int = 0
    """The file slot for the next prepared record, never that of the only good record."""
    damage: tuple[str, ...] = ()
    """The parts that could not be read, in words."""
    unreadable: tuple[tuple[int, int], ...] = ()
    """Bytes ``[start, end)`` that could be read on none of their holders."""
    unreadable_number: int = 0
    """The version number of `unreadable`."""
    scrub: ScrubRecord = NO_SCRUB
    """What is remembered of scrubs."""

    @property
    def slot(self) -> int:
        """This replica's own slot."""
        slot = self.record.place_of(self.replica_id)
        assert slot is not None  # checked when it was read
        return slot

    @property
    def own_state(self) -> RoleState:
        """The state of this replica in its own record."""
        return self.record.roles[self.slot].state

    @property
    def is_mixture(self) -> bool:
        """Whether the image was being given the data of others: what it holds is no disk."""
        return self.own_state is RoleState.RESYNCING


def path_for(image_path: str) -> str:
    """The path of the sidecar of an image: beside the file itself, not beside a symbolic link.

    So every path of an image leads to one sidecar. Asks the file system where there are links.
    Neither sidecar nor image need exist.
    """
    return os.path.realpath(image_path) + SUFFIX
