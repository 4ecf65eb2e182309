"""The status of a running mount, taken from memory alone: it never waits for a replica."""

import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType

import trio

from quorumfs.control import mounts
from quorumfs.control.advice import no_answer
from quorumfs.control.human import human_time, time_stamp
from quorumfs.control.pulse import Standstill
from quorumfs.control.status import (
    HANGS,
    AllDurations,
    DurationsStatus,
    ErrorCounts,
    Fenced,
    LastError,
    LastScrub,
    Latencies,
    LatencyStatus,
    Place,
    ReplicaStatus,
    ResyncStatus,
    ScrubPlace,
    ScrubStatus,
    Slowness,
    Status,
    Trouble,
    Waiting,
    added_up,
    overall_state,
    progress,
)
from quorumfs.decisions.latency import Latency
from quorumfs.decisions.model import Standing
from quorumfs.disk.disk import Disk
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.protocol import ReplicaReport
from quorumfs.options.table import MountOptions
from quorumfs.options.texts import option_texts
from quorumfs.repair.inspection import Find
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.scrub import Scrub
from quorumfs.replica.health import Failure, Sort
from quorumfs.replica.replica import Replica

SLOW_S = 5.0
"""What a replica does not answer for longer than this is worth saying."""

PLACES_MAX = 256
"""Undecided places that are listed."""

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
    *,
    now: float | None = None,
    standstill: Standstill | None = None,
) -> Status:
    """The status of *disk*, mounted at *mountpoint*; *notes* are what holds whatever its state.

    *astray*: replicas in use that are not at their paths any more, and why. *now*: the time by
    trio's clock, if that cannot be asked here. *standstill*: how the loop does that serves *disk*.
    """
    if now is None:
        now = trio.current_time()
    whole = disk.metadata.report_set()
    hanging = {} if standstill is None else _hanging(disk.replicas, standstill)
    replicas = [
        _replica(
            replica,
            disk.metadata.report(replica),
            _unresolved(replica, now, unequal=whole.unequal),
            astray.get(replica),
            hanging.get(replica),
            options,
            now,
            disk.mirror,
        )
        for replica in disk.replicas
    ]
    replicas += [
        ReplicaStatus(
            absent.path,
            absent.replica_id.hex(),
            (Standing.OFFLINE if absent.offline else Standing.MISSING).value,
            "it was not given to mount",
            out_of_sync_bytes=absent.lacking_bytes,
        )
        for absent in whole.absent
    ]
    undecided = [] if repairs is None else [Place(s, e - s) for s, e in repairs.undecided]
    undecided_bytes = sum(place.length for place in undecided)
    scrub = None if repairs is None else repairs.scrub
    unreadable = tuple(Place(start, end - start) for start, end in disk.metadata.ledger.unreadable)
    by = disk.metadata.fenced
    return Status(
        mountpoint=mountpoint,
        pid=os.getpid(),
        set_id=None if whole.set_id is None else whole.set_id.hex(),
        generation=None if whole.generation is None else f"{whole.generation:016x}",
        size=disk.size,
        state=overall_state(
            replicas,
            vote_threshold=disk.threshold,
            unsettled=whole.unequal
            or whole.unverified
            or (scrub is not None and scrub.unrepaired > 0),
            undecided_bytes=undecided_bytes,
            unreadable=bool(unreadable),
            fenced=by is not None,
            stands_still=standstill is not None,
        ),
        read_pattern=options.read_pattern,
        vote_threshold=disk.threshold,
        replicas=tuple(replicas),
        resync=_resync(repairs, now),
        metadata=whole.metadata,
        read_only=options.read_only,
        undecided_bytes=undecided_bytes,
        undecided=tuple(undecided[:PLACES_MAX]),
        scrub=None if scrub is None else _scrub(scrub),
        last_scrub=None if scrub is None else _last_scrub(scrub),
        next_scrub=None if scrub is None else _next_scrub(scrub),
        unreadable=unreadable,
        notes=notes,
        fenced=None if by is None else Fenced(by.host, by.pid, by.since),
        resync_paused=repairs is not None and repairs.resync_paused,
        options=option_texts(options),
        standstill_s=None if standstill is None else standstill.seconds,
    )


def _hanging(replicas: Sequence[Replica], standstill: Standstill) -> dict[Replica, str]:
    """Those for whose file system the loop waits, and why that is said of each.

    Who has a file on the same file system was not asked, and could not answer either.
    """
    files = [(replica, file) for replica in replicas for file in replica.files]
    found = {}
    for replica, file in files:
        if file.descriptor == standstill.fd:
            found[replica] = (
                f"its file system has not answered for {human_time(standstill.seconds)}, and every "
                "request waits for it"
            )
            for other, beside in files:
                if beside.device is not None and beside.device == file.device:
                    reason = f"it is on the file system of {replica.path}, which does not answer"
                    found.setdefault(other, reason)
    return found


def _replica(
    replica: Replica,
    report: ReplicaReport,
    failures: list[Failure],
    astray: str | None,
    hanging: str | None,
    options: MountOptions,
    now: float,
    mirror: Mirror,
) -> ReplicaStatus:
    """The status of one replica; *failures* are those that nothing has made good yet."""
    counters = replica.counters
    trouble, reason = None, report.reason
    waiting = _waiting(replica, now)
    slow = None if waiting is None or waiting.seconds < SLOW_S else no_answer(waiting)
    if hanging is not None:  # nothing else could be mended before
        trouble, reason = Trouble.HANGING, hanging
    elif replica.hung:
        reason = HANGS
    elif replica.state.is_member:
        if options.read_only:  # what was found out by reading, and nothing that it cannot do then
            failures = [failure for failure in failures if failure.sort is Sort.READ]
        trouble, reason = _trouble(replica, report, failures, now)
        if trouble is None:
            trouble, reason = _remark(slow, astray)
    else:
        reason = reason or slow
    return ReplicaStatus(
        replica.path,
        None if report.replica_id is None else report.replica_id.hex(),
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
        report.lacking_bytes,
        replica.unanswered,
        counters.copied_bytes,
        trouble and trouble.value,
        _told(failures[0], now) if failures else None,
        store=mounts.store_of(replica.path) if replica.hung else None,
        waiting=waiting,
        write_mostly=replica.path in mirror.read_order.write_mostly,
        latency=Latencies(
            **{sort.value: _latency(one) for sort, one in replica.health.latency.items()}
        ),
        durations=AllDurations(
            **{
                sort.value: DurationsStatus(one.counts, one.total_ns // 1000)
                for sort, one in replica.health.durations.items()
            }
        ),
        slow=tuple(
            Slowness(sort.value, round(slow[replica].median_s * 1e6), round(slow[replica].times))
            for sort, slow in list(mirror.read_order.slow.items())
            if replica in slow
        ),
        io=None if replica.way is None else replica.way.value,
    )


def _latency(noted: Latency) -> LatencyStatus | None:
    percentiles = noted.percentiles()
    if percentiles is None:
        return None
    return LatencyStatus(*(round(seconds * 1e6) for seconds in percentiles))


def _trouble(
    replica: Replica, report: ReplicaReport, failures: list[Failure], now: float
) -> tuple[Trouble | None, str | None]:
    """What is wrong with a current replica and what it holds, the worst, and in words.

    *failures* are those that matter.
    """
    if report.truncated:
        size = replica.health.truncated_to
        to = "" if size is None else f" to {size} bytes"
        return Trouble.TRUNCATED, f"its image was truncated{to}, and what was behind is lost"
    if replica.dead:
        return Trouble.GONE, "its file system is gone"
    for failure in failures:
        if failure.sort is not Sort.READ:
            error = _told(failure, now)
            full = failure.errno in _NO_SPACE
            return Trouble.FULL if full else Trouble.FAILING, f"{error.what}: {error.text}"
    if report.undurable or report.lost:
        reason = "it could not make writes durable, and may have lost them"
        return Trouble.UNDURABLE if report.undurable else Trouble.LOST, reason
    return None, None


def _remark(slow: str | None, astray: str | None) -> tuple[Trouble | None, str | None]:
    """What is to be said of a current replica that does all that is asked of it."""
    if slow is not None:
        return Trouble.SLOW, slow
    return (None, None) if astray is None else (Trouble.ASTRAY, astray)


def _waiting(replica: Replica, now: float) -> Waiting | None:
    """What it has not answered; what was given up is another matter."""
    if (waiting := replica.waiting) is None:
        return None
    kind, since = waiting
    return Waiting(kind.value, _seconds(since, now))


def _unresolved(replica: Replica, now: float, *, unequal: bool) -> list[Failure]:
    """The failures that nothing has made good yet, the latest first.

    *unequal*: current replicas are still to be given something.
    """

    def stands(failure: Failure) -> bool:
        # On a full disk a write to what has its space already succeeds in between.
        again = failure.sort is Sort.WRITE and unequal and now - failure.at < TRIED_AGAIN_S
        return again or not replica.health.overcome(failure)

    unresolved = filter(stands, replica.health.failures)
    return sorted(unresolved, key=lambda failure: failure.at, reverse=True)


def _told(failure: Failure, now: float) -> LastError:
    return LastError(
        failure.sort.value,
        errno.errorcode.get(failure.errno, str(failure.errno)),
        failure.text,
        _seconds(failure.at, now),
    )


def _seconds(since: float, now: float) -> int:
    """Whole seconds from *since* until *now*, after which the loop may have gone on."""
    return max(0, int(now - since))


def _scrub(scrub: Scrub) -> ScrubStatus | None:
    one = scrub.current
    if one is None:
        return None
    sums = added_up(scrub.done_bytes, scrub.total_bytes, scrub.rate_bytes_per_s)
    return ScrubStatus(
        scrub.number,
        *sums,
        **asdict(one.findings.counts),
        paused=one.paused,
        repair=one.repair,
        waits=scrub.hindrance,
        limit_bytes_per_s=scrub.limit,
        places=_places(one.findings.finds),
    )


def _last_scrub(scrub: Scrub) -> LastScrub | None:
    last = scrub.last
    if not last.at:
        return None
    return LastScrub(
        number=last.number,
        ended=time_stamp(last.at, "seconds"),
        seconds=last.took,
        stopped=last.stopped,
        **asdict(last.counts),
        places=_places(last.finds),
    )


def _next_scrub(scrub: Scrub) -> str | None:
    at = scrub.next_at
    return None if at is None or scrub.current is not None else time_stamp(at, "seconds")


def _places(finds: Sequence[Find]) -> tuple[ScrubPlace, ...]:
    return tuple(ScrubPlace(**asdict(find)) for find in finds)


def _resync(repairs: Repairs | None, now: float) -> ResyncStatus | None:
    at = repairs.progress if repairs is not None else None
    if at is None:
        return None
    return progress(
        at.kind,
        at.replica,
        done_bytes=at.done_bytes,
        total_bytes=at.total_bytes,
        rate_bytes_per_s=at.speed.rate(now),
    )
