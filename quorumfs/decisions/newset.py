"""A new set: its first record, and the adoption of raw images at their first use. Pure."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from quorumfs.decisions.dirtymap import CHUNKS_MAX, REPLICAS_MAX, UNVERIFIED, chunk_size_for
from quorumfs.decisions.model import Found, Member, Plan, Standing
from quorumfs.decisions.record import Record, Role, RoleState
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.errors import ExitCode


def refuse_too_many(count: int) -> None:
    """Refuse *count* replicas if a record has no place for so many."""
    if count > REPLICAS_MAX:
        raise AssemblyRefusedError(
            "too many replicas",
            f"{count} replicas: a set with sidecars has at most {REPLICAS_MAX}; "
            "use metadata=none for more",
        )


def new_record(
    paths: Sequence[str],
    size: int,
    threshold: int,
    *,
    chunk_size: int | None = None,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Record:
    """The first record of a new set: all of *paths* current."""
    generation = int.from_bytes(random_bytes(8), "little") or 1
    roles = tuple(Role(random_bytes(16), RoleState.CURRENT, generation, path) for path in paths)
    return Record(
        random_bytes(16),
        size,
        chunk_size or chunk_size_for(size),
        threshold,
        generation,
        roles,
    )


def adopt(
    found: Sequence[Found],
    threshold: int | None,
    chunk_size: int | None,
    random_bytes: Callable[[int], bytes],
) -> Plan:
    """First use of raw images: usable at once, and compared in the background."""
    sizes: dict[int, Found] = {}
    for one in found:
        if one.image is None:
            raise AssemblyRefusedError(
                "adopt", f"cannot open the replica {one.path}: {one.problem}"
            )
        if one.device:
            raise AssemblyRefusedError(
                "adopt",
                f"{one.path} is a block device, and no replica has a sidecar: there is no "
                f"{one.sidecar_place}. Mount what it lies on, or name its directory with sidecars="
                "DIR; for a new set, run: quorumfs create",
            )
        sizes.setdefault(one.image.size, one)
    if len(sizes) > 1:
        (size, one), (other_size, other) = list(sizes.items())[:2]
        raise AssemblyRefusedError(
            "adopt",
            f"replicas differ in size: {one.path} has {size} bytes, {other.path} has {other_size}",
        )
    (size,) = sizes
    paths = [one.path for one in found]
    if chunk_size is not None and size > chunk_size * CHUNKS_MAX:
        least = chunk_size_for(size)
        raise AssemblyRefusedError(
            "chunk size",
            f"option chunk-size: got {chunk_size}, allowed: at least {least} for {size} bytes",
            ExitCode.USAGE,
        )
    record = new_record(
        paths,
        size,
        threshold or len(found) // 2 + 1,
        chunk_size=chunk_size,
        random_bytes=random_bytes,
    )
    return adoption_plan(found, record, record.threshold)


def begun_adoption(found: Sequence[Found]) -> Record | None:
    """The record of an adoption cut off before every image had a sidecar; None if there is none.

    Nothing was written through the set yet, and *found* are all its images: adoption can go on.
    """
    sidecars = [one.sidecar for one in found if one.sidecar]
    if not sidecars or any(one.image is None or one.problem for one in found):
        return None
    first = sidecars[0].record
    paths = [role.path for role in first.roles]
    begun = (
        len(sidecars) < len(found)
        and sorted(paths) == sorted(one.path for one in found)
        and all(one.image is not None and one.image.size == first.size for one in found)
        and all(role.state is RoleState.CURRENT for role in first.roles)
    )
    for sidecar in sidecars:
        record = sidecar.record
        untouched = record.sequence == 1 and record.clean and sidecar.prepared is None
        unseen = sidecar.map.is_all(UNVERIFIED)
        begun = begun and untouched and unseen and record.set_id == first.set_id
    return first if begun else None


def adoption_plan(found: Sequence[Found], record: Record, threshold: int) -> Plan:
    """All images are current, and compared in the background."""
    disk_map = record.new_map()
    if len(found) > 1:
        disk_map.add(UNVERIFIED, range(len(disk_map)))
    slots = {role.path: slot for slot, role in enumerate(record.roles)}
    members = tuple(Member(one.path, slots[one.path], Standing.CURRENT) for one in found)
    record = replace(record, threshold=threshold)  # nothing was acknowledged yet
    rule = "adopt: not all replicas have a sidecar, and nothing was written yet"
    if not any(one.sidecar for one in found):
        rule = "adopt: no replica has a sidecar"
    return Plan(rule, record, threshold, disk_map, members, adopted=True)
