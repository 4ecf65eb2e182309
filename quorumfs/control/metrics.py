"""The status of mounts as metrics, by the conventions of Prometheus: base units, labels, counters.

Metrics may be added; none is ever renamed. Pure, but for the library that writes the format.
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from itertools import accumulate
from typing import NamedTuple

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from quorumfs.control.status import (
    DiskState,
    DurationsStatus,
    LatencyStatus,
    ReplicaStatus,
    Status,
    Trouble,
)
from quorumfs.decisions.latency import BOUNDS_NS
from quorumfs.decisions.model import Standing

_DISK = ("mountpoint",)
_REPLICA = ("mountpoint", "replica")

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "reads": ("quorumfs_replica_reads", "Reads that a replica was asked for"),
    "writes": ("quorumfs_replica_writes", "Writes that a replica was asked for"),
    "flushes": ("quorumfs_replica_flushes", "Flushes that a replica was asked for"),
    "bytes_read": ("quorumfs_replica_read_bytes", "Bytes read from a replica"),
    "bytes_written": ("quorumfs_replica_written_bytes", "Bytes written to a replica"),
    "copied_bytes": ("quorumfs_replica_copied_bytes", "Bytes given by resync and repair"),
}
"""By member of `ReplicaStatus`: name and help."""


class Disk(NamedTuple):
    """A mount, and its status; None if its daemon does not answer."""

    mountpoint: str
    status: Status | None


def metrics(disks: Iterable[Disk]) -> list[Metric]:
    """All metrics of *disks*; of one that does not answer only that."""
    disks = list(disks)
    up = GaugeMetricFamily("quorumfs_up", "Whether the daemon of a mount answers", labels=_DISK)
    for disk in disks:
        up.add_metric([_label(disk.mountpoint)], disk.status is not None)
    statuses = [(_label(disk.mountpoint), disk.status) for disk in disks if disk.status is not None]
    return [up, *_of_disks(statuses), *_of_replicas(statuses)]


def _of_disks(statuses: list[tuple[str, Status]]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        "quorumfs_state", "1 for the state that a disk is in", labels=(*_DISK, "state")
    )
    for mountpoint, status in statuses:
        for one in DiskState:
            state.add_metric([mountpoint, one.value], status.state is one)
    yield state

    def gauge(name: str, text: str, values: Iterable[tuple[str, float | None]]) -> Metric:
        family = GaugeMetricFamily(name, text, labels=_DISK)
        for mountpoint, value in values:
            if value is not None:
                family.add_metric([mountpoint], value)
        return family

    each = statuses
    yield gauge("quorumfs_size_bytes", "Size of a disk", ((m, s.size) for m, s in each))
    yield gauge(
        "quorumfs_vote_threshold",
        "Replicas that must agree on a read and succeed in a write",
        ((m, s.vote_threshold) for m, s in each),
    )
    yield gauge(
        "quorumfs_undecided_bytes",
        "Bytes where replicas differ and a person must decide",
        ((m, s.undecided_bytes) for m, s in each),
    )
    for kind in ("resync", "scrub"):
        for part in ("done", "total"):
            yield gauge(
                f"quorumfs_{kind}_{part}_bytes",
                f"Bytes of the {kind} under way: {part}",
                ((m, getattr(getattr(s, kind), f"{part}_bytes", None)) for m, s in each),
            )
    last = [(m, s.last_scrub) for m, s in each if s.last_scrub is not None]
    yield gauge(
        "quorumfs_last_scrub_end_timestamp_seconds",
        "When the last scrub ended",
        ((m, _timestamp(scrub.ended)) for m, scrub in last),
    )
    yield gauge(
        "quorumfs_last_scrub_mismatches",
        "Blocks that the last scrub found to differ",
        ((m, scrub.mismatches) for m, scrub in last),
    )
    yield gauge(
        "quorumfs_last_scrub_unrepaired",
        "Blocks that the last scrub left as it found them",
        ((m, scrub.unrepaired) for m, scrub in last),
    )


def _timestamp(text: str) -> float | None:
    """Seconds since 1970; None if a daemon says what is no time."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def _of_replicas(statuses: list[tuple[str, Status]]) -> Iterator[Metric]:
    each = [([m, _label(one.path)], one) for m, status in statuses for one in status.replicas]
    state = GaugeMetricFamily(
        "quorumfs_replica_state",
        "1 for the state that a replica is in",
        labels=(*_REPLICA, "state"),
    )
    trouble = GaugeMetricFamily(
        "quorumfs_replica_trouble",
        "1 for what is wrong with a replica although it is current",
        labels=(*_REPLICA, "trouble"),
    )
    lacking = GaugeMetricFamily(
        "quorumfs_replica_out_of_sync_bytes", "What a replica lacks, at most", labels=_REPLICA
    )
    waiting = GaugeMetricFamily(
        "quorumfs_replica_in_flight", "Requests that a replica has not answered", labels=_REPLICA
    )
    errors = CounterMetricFamily(
        "quorumfs_replica_errors", "What went wrong on a replica", labels=(*_REPLICA, "kind")
    )
    for labels, replica in each:
        for one in Standing:
            state.add_metric([*labels, one.value], replica.standing is one)
        for fault in Trouble:
            trouble.add_metric([*labels, fault.value], replica.trouble == fault.value)
        lacking.add_metric(labels, replica.out_of_sync_bytes)
        waiting.add_metric(labels, replica.in_flight)
        for kind in ("read", "write", "flush", "mismatch", "timeout"):
            errors.add_metric([*labels, kind], getattr(replica.errors, kind))
    yield from (state, trouble, lacking, waiting, errors, _latency(each), _durations(each))
    for member, (name, text) in _COUNTERS.items():
        family = CounterMetricFamily(name, text, labels=_REPLICA)
        for labels, replica in each:
            family.add_metric(labels, getattr(replica, member))
        yield family


def _label(path: str) -> str:
    """A path in UTF-8, whatever its bytes are, that a terminal can show."""
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in path)
    return "".join(shown).encode(errors="backslashreplace").decode()


def _latency(each: list[tuple[list[str], ReplicaStatus]]) -> Metric:
    family = GaugeMetricFamily(
        "quorumfs_replica_latency_seconds",
        "How long a replica took lately, for requests of at most 256 KiB outside the fast path",
        labels=(*_REPLICA, "operation", "quantile"),
    )
    for labels, replica in each:
        for operation in ("read", "write", "flush"):
            latency: LatencyStatus | None = getattr(replica.latency, operation)
            if latency is None:
                continue
            quantiles = {"0.5": latency.p50_us, "0.99": latency.p99_us, "1": latency.max_us}
            for quantile, microseconds in quantiles.items():
                family.add_metric([*labels, operation, quantile], microseconds / 1e6)
    return family


_BOUNDS = (*(str(nanoseconds / 1e9) for nanoseconds in BOUNDS_NS), "+Inf")


def _durations(each: list[tuple[list[str], ReplicaStatus]]) -> Metric:
    family = HistogramMetricFamily(
        "quorumfs_replica_request_duration_seconds",
        "How long a replica took for a request, of all since the mount",
        labels=(*_REPLICA, "operation"),
    )
    for labels, replica in each:
        for operation in ("read", "write", "flush"):
            durations: DurationsStatus | None = getattr(replica.durations, operation)
            if durations is None or len(durations.counts) != len(_BOUNDS):
                continue
            buckets = list(zip(_BOUNDS, accumulate(durations.counts), strict=True))
            family.add_metric([*labels, operation], buckets, durations.total_us / 1e6)
    return family
