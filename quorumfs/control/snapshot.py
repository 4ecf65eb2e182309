"""The status of a running mount, taken from memory alone: it never waits for a replica."""

import errno
import os
from collections.abc import Mapping
from types import MappingProxyType

import trio

from quorumfs.assembly import State
from quorumfs.control.status import (
    HANGS,
    ErrorCounts,
    Fenced,
    LastError,
    ReplicaStatus,
    ResyncKind,
    ResyncStatus,
    Status,
    Trouble,
    human_time,
    overall_state,
    progress,
)
from quorumfs.dirtymap import UNVERIFIED
from quorumfs.disk import Disk
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.metadata.volatile import Volatile
from quorumfs.options import MountOptions
from quorumfs.repair.repairs import Repairs
from quorumfs.replica import Failure, Replica, Sort

SLOW_S = 5.0
"""What a replica does not answer for longer than this is worth saying."""

TRIED_AGAIN_S = 5.0
"""A write that failed, and that repairs cannot do either, fails again well within this time."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


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
    replicas = [_replica(disk, replica, astray.get(replica), options) for replica in disk.replicas]
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
    by = disk.metadata.fenced
    return Status(
        mountpoint=mountpoint,
        pid=os.getpid(),
        set_id=sidecars.record.set_id.hex() if sidecars else None,
        generation=f"{sidecars.record.generation:016x}" if sidecars else None,
        size=disk.size,
        state=overall_state(
            replicas,
            vote_threshold=disk.threshold,
            unsettled=bool(unsettled),
            undecided_bytes=undecided,
            fenced=by is not None,
        ),
        read_pattern=options.read_pattern,
        vote_threshold=disk.threshold,
        replicas=tuple(replicas),
        resync=_resync(repairs),
        metadata="sidecar" if sidecars else "none",
        read_only=options.read_only,
        undecided_bytes=undecided,
        notes=notes,
        fenced=None if by is None else Fenced(by.host, by.pid, by.since),
    )


def _replica(
    disk: Disk, replica: Replica, astray: str | None, options: MountOptions
) -> ReplicaStatus:
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
    trouble = None
    slow = _slow(replica)
    failures = _standing(disk, replica)
    if replica.hung:
        reason = HANGS
    elif replica.state is State.CURRENT:
        if options.read_only:  # what was found out by reading, and nothing that it cannot do then
            failures = [failure for failure in failures if failure.sort is Sort.READ]
        trouble, reason = _trouble(disk, replica, failures, lacking=bool(lacking))
        if trouble is None:
            trouble, reason = _remark(slow, astray)
    else:
        reason = reason or slow
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
        trouble and trouble.value,
        _last_error(failures),
    )


def _trouble(
    disk: Disk, replica: Replica, failures: list[Failure], *, lacking: bool
) -> tuple[Trouble | None, str | None]:
    """What is wrong with a current replica and what it holds, the worst, and in words.

    *failures* are those that matter. *lacking*: it is on record that it lost something.
    """
    metadata = disk.metadata
    undurable = isinstance(metadata, Volatile) and bool(metadata.holdings[replica].unsure)
    if isinstance(metadata, Sidecars):
        doubts = metadata.doubts
        if replica in doubts.truncated:
            size = replica.truncated_to
            to = "" if size is None else f" to {size} bytes"
            return Trouble.TRUNCATED, f"its image was truncated{to}, and what was behind is lost"
        lacking = lacking or replica in doubts.lost or replica in doubts.losing
    if replica.dead:
        return Trouble.GONE, "its file system is gone"
    for failure in failures:
        if failure.sort is not Sort.READ:
            error = _told(failure)
            full = failure.errno in _NO_SPACE
            return Trouble.FULL if full else Trouble.FAILING, f"{error.what}: {error.text}"
    if undurable or lacking:
        reason = "it could not make writes durable, and may have lost them"
        return Trouble.UNDURABLE if undurable else Trouble.LOST, reason
    return None, None


def _remark(slow: str | None, astray: str | None) -> tuple[Trouble | None, str | None]:
    """What is to be said of a current replica that does all that is asked of it."""
    if slow is not None:
        return Trouble.SLOW, slow
    return (None, None) if astray is None else (Trouble.ASTRAY, astray)


def _slow(replica: Replica) -> str | None:
    """What it has not answered for long; what was given up is another matter."""
    if replica.waiting is None:
        return None
    kind, since = replica.waiting
    seconds = trio.current_time() - since
    if seconds < SLOW_S:
        return None
    return f"no answer to a {kind.value} for {human_time(int(seconds))}"


def _standing(disk: Disk, replica: Replica) -> list[Failure]:
    """The failures that nothing has made good yet, the latest first."""
    now = trio.current_time()
    unequal = isinstance(disk.metadata, Sidecars) and bool(disk.metadata.doubts.unsettled)

    def stands(failure: Failure) -> bool:
        # On a full disk a write to what has its space already succeeds in between.
        again = failure.sort is Sort.WRITE and unequal and now - failure.at < TRIED_AGAIN_S
        return again or not replica.overcome(failure)

    standing = filter(stands, replica.failures)
    return sorted(standing, key=lambda failure: failure.at, reverse=True)


def _last_error(failures: list[Failure]) -> LastError | None:
    return _told(failures[0]) if failures else None


def _told(failure: Failure) -> LastError:
    return LastError(
        failure.sort.value,
        errno.errorcode.get(failure.errno, str(failure.errno)),
        failure.text,
        int(trio.current_time() - failure.at),
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
