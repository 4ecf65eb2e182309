"""The status of a running mount, taken from memory alone: it never waits for a replica."""

import os
from collections.abc import Mapping
from types import MappingProxyType

import trio

from quorumfs.assembly import State
from quorumfs.control.status import (
    ErrorCounts,
    ReplicaStatus,
    ResyncKind,
    ResyncStatus,
    Status,
    overall_state,
    progress,
)
from quorumfs.dirtymap import UNVERIFIED
from quorumfs.disk import Disk
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.metadata.volatile import Volatile
from quorumfs.options import MountOptions
from quorumfs.repair.repairs import Repairs
from quorumfs.replica import Replica


def take(
    mountpoint: str,
    options: MountOptions,
    disk: Disk,
    repairs: Repairs | None,
    notes: tuple[str, ...],
    astray: Mapping[Replica, str] = MappingProxyType({}),
) -> Status:
    """The status of *disk*, mounted at *mountpoint*; *notes* are what holds whatever its state.

    *astray*: replicas in use that are not at their paths any more, and why.
    """
    sidecars = disk.metadata if isinstance(disk.metadata, Sidecars) else None
    replicas = [_replica(disk, replica, astray.get(replica)) for replica in disk.replicas]
    unsettled = undecided = 0
    if sidecars is not None:
        given = {replica.slot for replica in disk.replicas}
        replicas += [
            ReplicaStatus(
                role.path,
                role.replica_id.hex(),
                State.MISSING.value,
                "it was not given to mount",
                out_of_sync_bytes=sidecars.map.lacking_bytes(slot),
            )
            for slot, role in enumerate(sidecars.record.roles)
            if slot not in given
        ]
        unsettled = len(sidecars.doubts.unsettled) + sidecars.map.count(UNVERIFIED)
    if repairs is not None:
        chunks = sum(end - start for start, end in repairs.differing)
        undecided = chunks * repairs.chunk_size
    return Status(
        mountpoint=mountpoint,
        pid=os.getpid(),
        set_id=sidecars.record.set_id.hex() if sidecars else None,
        generation=f"{sidecars.record.generation:016x}" if sidecars else None,
        size=disk.size,
        state=overall_state(
            [replica.state for replica in replicas],
            vote_threshold=disk.threshold,
            unsettled=bool(unsettled or astray),
            undecided_bytes=undecided,
        ),
        read_pattern=options.read_pattern,
        vote_threshold=disk.threshold,
        replicas=tuple(replicas),
        resync=_resync(repairs),
        metadata="sidecar" if sidecars else "none",
        read_only=options.read_only,
        undecided_bytes=undecided,
        notes=notes,
    )


def _replica(disk: Disk, replica: Replica, astray: str | None) -> ReplicaStatus:
    counters = replica.counters
    replica_id = None
    lacking = 0
    reason = replica.reason
    if isinstance(disk.metadata, Sidecars) and replica.slot is not None:
        replica_id = disk.metadata.record.roles[replica.slot].replica_id.hex()
        lacking = disk.metadata.map.lacking_bytes(replica.slot)
    elif isinstance(disk.metadata, Volatile):
        lacking = sum(end - start for start, end in disk.metadata.missed(replica))
        reason = "it missed writes" if lacking else None
    if replica.hung:
        reason = "it does not answer"
    if replica.state is State.CURRENT:
        reason = astray or reason
    return ReplicaStatus(
        replica.path,
        replica_id,
        replica.state.value,
        reason,
        counters.reads,
        counters.writes,
        counters.flushes,
        counters.bytes_read,
        counters.bytes_written,
        ErrorCounts(
            counters.read_errors,
            counters.write_errors,
            counters.flush_errors,
            counters.mismatches,
            counters.timeouts,
        ),
        lacking,
        replica.in_flight,
        counters.copied_bytes,
    )


def _resync(repairs: Repairs | None) -> ResyncStatus | None:
    at = repairs.progress if repairs is not None else None
    if at is None:
        return None
    elapsed = trio.current_time() - at.began
    return progress(
        ResyncKind(at.kind),
        at.replica,
        done_bytes=at.done_bytes,
        total_bytes=at.total_bytes,
        rate_bytes_per_s=at.done_bytes / elapsed if elapsed > 0 else 0.0,
    )
