"""Resolution: the operator says which replica's data to keep. A pure decision.

After a split brain, or where adopted images differ, no rule tells which replica is right. One
replica is *kept*. The generations of all others become ancestors of its record, as if the kept
replica had ejected the others, so that the next mount resyncs them. They lack the writes of either
side since the parting, if both sides recorded them; otherwise everything is compared. The decision
itself changes the disk, and stands in the lineage like a mount, ahead of the latest mount of each
replica given up.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from quorumfs.decisions.dirtymap import (
    ALL_OUT_OF_SYNC,
    INTENT,
    REPLICAS_MAX,
    UNVERIFIED,
    out_of_sync,
)
from quorumfs.decisions.lineage import adds, parting
from quorumfs.decisions.model import Found
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.quoting import quoted
from quorumfs.decisions.record import Identity, PastMount, Record, Role, RoleState, Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sameimage import image_changed, image_unproven


@dataclass(frozen=True, slots=True)
class Overwritten:
    """A replica that is to become a copy of the kept replica."""

    path: str
    differs_at_most: int
    """Bytes."""
    why: str


@dataclass(frozen=True, slots=True)
class Resolution:
    """The sidecars to write, so that the next mount knows which replicas to overwrite."""

    kept: tuple[str, ...]
    """The replica to keep, and the replicas that hold the same."""
    overwritten: tuple[Overwritten, ...]
    sidecars: dict[str, Sidecar]
    """New sidecars by the path of the image, to be written in this order."""


def resolve(
    found: Sequence[Found],
    keep: str,
    *,
    threshold: int | None = None,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Resolution:
    """Decide how all replicas *found* become copies of the replica at *keep*.

    Raises `AssemblyRefusedError` if that is impossible.
    """
    kept = next(one for one in found if one.path == keep)
    if kept.image is None:
        raise AssemblyRefusedError("resolve", f"cannot open the replica {keep}: {kept.problem}")
    if kept.sidecar is None:
        return _from_raw(found, kept, threshold, random_bytes)
    whole = [one for one in found if one.sidecar and one.sidecar.own_state is RoleState.CURRENT]
    if whole and kept not in whole:
        raise AssemblyRefusedError(
            "resolve",
            f"{keep} was being resynced: it is a mixture of two times, and no disk. Keep "
            f"{whole[0].path}, or give only those that are to be copies of {keep}",
        )
    raw = [one.path for one in found if one.image and not one.sidecar and not one.problem]
    if raw and kept.sidecar.is_mixture:
        raise AssemblyRefusedError(
            "resolve",
            f"{keep} was being made a copy: it is a mixture of two images, and no disk. Keep "
            f"{raw[0]}, or give only those that are to be copies of {keep}",
        )
    return _Resolving(found, kept.path, kept.sidecar, random_bytes).resolution()


def _from_raw(
    found: Sequence[Found],
    kept: Found,
    threshold: int | None,
    random_bytes: Callable[[int], bytes],
) -> Resolution:
    """A new set with the data of *kept*, an image of no set."""
    assert kept.image is not None
    _refuse_missing(found)
    size = kept.image.size
    for one in found:
        if one.image and one.image.size < size:
            raise AssemblyRefusedError(
                "resolve", f"{one.path} has {one.image.size} bytes, {kept.path} has {size}"
            )
    slot = found.index(kept)
    record = record_of_copies(
        [one.path for one in found], slot, size, threshold, random_bytes=random_bytes
    )
    sidecars = {
        one.path: first_sidecar(record, place, one.image)
        for place, one in enumerate(found)
        if one.image
    }
    overwritten = tuple(
        Overwritten(one.path, size, "nothing is known of what it holds")
        for one in found
        if one is not kept
    )
    return Resolution((kept.path,), overwritten, _last(sidecars, kept.path))


def record_of_copies(
    paths: Sequence[str],
    source: int,
    size: int,
    threshold: int | None,
    *,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Record:
    """The first record of a set in which all of *paths* are to be copies of the one at the place
    *source*. *threshold*: None for a majority."""
    enough = threshold or len(paths) // 2 + 1
    record = new_record(paths, size, enough, random_bytes=random_bytes)
    others = [slot for slot in range(len(paths)) if slot != source]
    return record.with_state(others, RoleState.RESYNCING)


def first_sidecar(record: Record, slot: int, image: Identity) -> Sidecar:
    """The sidecar of one *image* of a set with a `record_of_copies`."""
    disk_map = record.new_map()
    for other, role in enumerate(record.roles):
        if role.state is RoleState.RESYNCING:
            disk_map.add(out_of_sync(other), range(len(disk_map)))
    return Sidecar(record.roles[slot].replica_id, record, disk_map, image)


class _Resolving:
    """The other replicas of a set, and images of no set, become copies of one member."""

    def __init__(
        self,
        found: Sequence[Found],
        keep: str,
        sidecar: Sidecar,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        _refuse_missing(found)
        self._found = found
        self._keep = keep
        self._sidecar = sidecar
        self._random_bytes = random_bytes
        self._parent = sidecar.record
        roles = enumerate(sidecar.record.roles)
        self._out = sum(out_of_sync(s) for s, role in roles if role.state is not RoleState.CURRENT)
        self._map = sidecar.map.read_as(self._out)
        self._roles = list(sidecar.record.roles)
        self._passed: list[int] = []
        self._given_up: set[int] = set()
        """The latest mounts of the replicas to overwrite, if those mounts added something."""
        self._elsewhere: list[Record] = []
        """The records of replicas to overwrite that went on after the parting."""
        self._kept = [keep]
        self._behind: dict[str, tuple[int, str]] = {}
        """By path: the slot of a replica to overwrite, and why it differs."""
        self._new: dict[str, int] = {}
        """Images that become members anew, and their slots."""

    def resolution(self) -> Resolution:
        own_slot = self._sidecar.slot
        everything = range(len(self._map))
        self._map.remove(out_of_sync(own_slot), everything)
        # Whatever its own state: with no other left, it may have been in a resync.
        self._roles[own_slot] = replace(self._roles[own_slot], state=RoleState.CURRENT)
        taken = {own_slot}
        new = [one for one in self._found if not one.sidecar or self._never_joined(one.sidecar)]
        for one in self._found:
            if one.path != self._keep and one.sidecar and one not in new:
                taken.add(self._member(one.path, one.sidecar, one))
        for one in new:
            if one.path != self._keep:
                taken.add(self._newcomer(one, taken))
        for slot, role in enumerate(self._roles):
            if slot in taken:
                continue
            if role.state is RoleState.CURRENT:
                self._eject(slot)
            if any(self._may_have_followed(role, record) for record in self._elsewhere):
                self._map.add(out_of_sync(slot), everything)
        for slot, _ in self._behind.values():
            self._map.add_where(INTENT | UNVERIFIED, out_of_sync(slot))
        self._map.remove(UNVERIFIED, everything)
        sequences = [one.sidecar.record.sequence for one in self._found if one.sidecar]
        prepared = [one.sidecar.prepared for one in self._found if one.sidecar]
        sequences += [record.sequence for record in prepared if record]
        record = replace(self._parent, roles=tuple(self._roles)).minted(self._passed)
        record = replace(record, sequence=max(sequences) + 1, clean=False)
        given_up = sorted(self._given_up)
        record = record.entered(
            int.from_bytes(self._random_bytes(8), "little") or 1,
            changed=True,
            passed=[PastMount(one, record.sequence, changed=True) for one in given_up],
        )
        current = [s for s, role in enumerate(self._roles) if role.state is RoleState.CURRENT]
        record = record.with_state(current, RoleState.CURRENT)
        sidecars = {}
        for slot in self._new.values():
            record = record.with_state([slot], RoleState.RESYNCING)
        for one in self._found:
            written = one.path in self._new or one.path in self._kept
            if written and one.image:
                slot = self._new.get(one.path, self._slot(one))
                replica_id = record.roles[slot].replica_id
                sidecars[one.path] = Sidecar(
                    replica_id,
                    record,
                    self._map,
                    _in_use(one),
                    unreadable=self._sidecar.unreadable,
                    unreadable_number=self._sidecar.unreadable_number,
                )
        overwritten = tuple(
            Overwritten(path, self._map.lacking_bytes(slot), why)
            for path, (slot, why) in self._behind.items()
        )
        return Resolution(tuple(self._kept), overwritten, _last(sidecars, self._keep))

    def _never_joined(self, sidecar: Sidecar) -> bool:
        """Whether a replica was being made a copy of the kept one, and that was cut off."""
        own = sidecar.record
        same = own.set_id == self._parent.set_id and own.disk == self._parent.disk
        return same and sidecar.is_mixture and self._parent.slot_of(sidecar.replica_id) is None

    def _slot(self, one: Found) -> int:
        slot = self._parent.slot_of(one.sidecar.replica_id) if one.sidecar else None
        return -1 if slot is None else slot

    def _member(self, path: str, sidecar: Sidecar, one: Found) -> int:
        """Enter a replica with a sidecar; returns its slot."""
        parent = self._parent
        if sidecar.record.set_id != parent.set_id:
            raise AssemblyRefusedError(
                "foreign",
                f"{path} is of set {sidecar.record.set_id.hex()}, {self._keep} is of set "
                f"{parent.set_id.hex()}: to give it up, remove its sidecar first",
            )
        if sidecar.record.disk != parent.disk:
            raise AssemblyRefusedError(
                "foreign",
                f"{path} is of a disk of another shape than {self._keep}, though of the same set: "
                "to give it up, remove its sidecar first",
            )
        slot = self._slot(one)
        if slot < 0 or slot == self._sidecar.slot:
            raise AssemblyRefusedError(
                "resolve",
                f"{path} has no place of its own in the set of {self._keep}: "
                "to make it a new replica, remove its sidecar first",
            )
        role = parent.roles[slot]
        history = sidecar.record.history
        same = sidecar.record.key == parent.key
        undecided = self._map.count(UNVERIFIED) or sidecar.map.count(UNVERIFIED)
        changed = one.image is not None and (image_changed(one) or image_unproven(one))
        if same and not undecided and not changed and role.state is RoleState.CURRENT:
            self._map.join(sidecar.map.read_as(self._out))
            self._kept.append(path)
            return slot
        # An older copy put in its place has a map as old as itself.
        older = history[0] == role.generation and sidecar.record.sequence < role.sequence
        tracked = role.generation in history and not older and self._tracked(slot, sidecar.record)
        known = (same or tracked) and not changed
        if known and sidecar.own_state is not RoleState.RESYNCING:
            # Where the disk grew without it, the map that is kept says what it lacks.
            written = sidecar.map.resized(parent.size)
            written.keep_as(INTENT | UNVERIFIED | ALL_OUT_OF_SYNC, out_of_sync(slot))
            self._map.join(written)
            why = "what either side wrote since they parted"
            if same:  # they never parted
                why = "what was not found equal yet"
        else:
            self._map.add(out_of_sync(slot), range(len(self._map)))
            why = "it is not on record where they parted: everything is compared"
        passed = [g for g in history if g not in parent.history]
        self._passed += passed
        latest = sidecar.record.lineage[0].identity
        known_mounts = {mount.identity for mount in parent.lineage}
        if latest not in known_mounts or adds(sidecar.record, parent, role.last_mount):
            self._given_up.add(latest)
        if passed or latest in self._given_up:
            self._elsewhere.append(sidecar.record)
        self._roles[slot] = replace(
            role,
            state=RoleState.STALE,
            generation=sidecar.record.generation,
            sequence=sidecar.record.sequence,
            mount=latest,
        )
        self._behind[path] = slot, why
        return slot

    def _may_have_followed(self, absent: Role, other: Record) -> bool:
        """Whether a replica that is not present may hold writes made under *other*."""
        slot, at = other.slot_of(absent.replica_id), parting(other, self._parent)
        if slot is None or at is None:
            return True
        role = other.roles[slot]
        since = {mount.identity for mount in other.lineage[: at.own + at.went_on]}
        later = role.last_mount == at.mount and role.sequence > self._parent.sequence
        return role.state is not RoleState.STALE or role.last_mount in since or later

    def _tracked(self, slot: int, own: Record) -> bool:
        """Whether both sides tracked their writes without the other since they parted.

        One side is the kept replica, the other the replica with *slot*, which holds *own*.
        """
        role, place = self._parent.roles[slot], own.slot_of(self._sidecar.replica_id)
        ahead, behind = parting(own, self._parent), parting(self._parent, own)
        if ahead is None or behind is None or place is None:  # one side may have added the kept one
            return False
        kept = own.roles[place]
        alone = ahead.other > 0 or behind.went_on
        without = ahead.own > 0 or ahead.went_on
        return (not alone or _left(role, behind.mount)) and (
            not without or _left(kept, ahead.mount)
        )

    def _newcomer(self, one: Found, taken: set[int]) -> int:
        """Enter an image without a sidecar; returns its new slot."""
        assert one.image is not None
        if one.image.size < (size := self._parent.size):
            command = f": truncate -s {size} {quoted(one.path)}"
            how = " (with lvextend or the like)" if one.device else command
            raise AssemblyRefusedError(
                "resolve",
                f"{one.path} has {one.image.size} bytes, the disk has {size}: make it as long first"
                f"{how}",
            )

        def strangeness(slot: int) -> tuple[bool, bool]:
            # Removed, and added again, a path may have two roles.
            role = self._roles[slot]
            return role.path != one.path, role.state is RoleState.REMOVED

        free = [slot for slot in range(len(self._roles)) if slot not in taken]
        free.sort(key=strangeness)
        slot = free[0] if free else len(self._roles)
        if slot >= REPLICAS_MAX:
            raise AssemblyRefusedError("resolve", f"a set has at most {REPLICAS_MAX} replicas")
        role = Role(self._random_bytes(16), RoleState.RESYNCING, 0, one.path)
        self._roles[slot : slot + 1] = [role]
        self._map.widen(len(self._roles))
        self._map.add(out_of_sync(slot), range(len(self._map)))
        self._new[one.path] = slot
        self._behind[one.path] = slot, "nothing is known of what it holds"
        return slot

    def _eject(self, slot: int) -> None:
        """Enter a replica that is not present as one to overwrite when it comes back."""
        parent = self._parent
        self._map.add_where(INTENT | UNVERIFIED, out_of_sync(slot))
        self._roles[slot] = replace(
            self._roles[slot],
            state=RoleState.STALE,
            generation=parent.generation,
            sequence=parent.sequence,
            mount=parent.lineage[0].identity,
        )


def _left(role: Role, mount: int) -> bool:
    """Whether a replica was ejected with a record whose latest mount was *mount*."""
    return role.state is not RoleState.CURRENT and role.last_mount == mount


def _refuse_missing(found: Sequence[Found]) -> None:
    for one in found:
        if one.image is None:
            raise AssemblyRefusedError("resolve", f"cannot open {one.path}: {one.problem}")


def _in_use(one: Found) -> Identity:
    assert one.image is not None
    return replace(one.image, mtime_ns=0, ctime_ns=0)


def _last(sidecars: dict[str, Sidecar], path: str) -> dict[str, Sidecar]:
    """*sidecars* with the one at *path* last, which makes the others valid."""
    return {**{p: s for p, s in sidecars.items() if p != path}, path: sidecars[path]}
