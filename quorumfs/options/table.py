"""The table of options: one row holds the name of an option, its help and its parser, so that the
help cannot drift from what is accepted.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quorumfs.decisions.replicaio import ASKED
from quorumfs.options import values


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the user asked of a mount; every combination that exists is possible."""

    read_pattern: str
    vote_threshold: int
    vote_threshold_given: bool = False
    """Else it is a majority of the replicas given, or what a set was last used with."""
    metadata: str = "sidecar"
    sidecars: str | None = None
    """The directory for sidecars of block devices; None: there are none."""
    degraded: bool = False
    takeover: bool = False
    chunk_size: int | None = None
    """Bytes; None: by the size of the disk."""
    resync_rate: int | None = None
    """Bytes a second; None: no limit."""
    scrub_every_s: float | None = None
    """How long after a scrub the next one begins by itself; None: none does."""
    on_event: str | None = None
    """The path of a program that is run for each event; None: none."""
    rewrite_corrupted: bool = False
    blkverify: bool = False
    read_only: bool = False
    write_mostly: tuple[str, ...] = ()
    """Names of replicas that are read only where no other can answer: paths, or file names."""
    replica_timeout_s: float = 8.0
    write_ack: str = "all"
    """``all``, or ``threshold``: writes and flushes wait for those that lag `behind_max_s`."""
    behind_max_s: float = 0.1
    replica_io: str = "buffered"
    """One of `quorumfs.decisions.replicaio.ASKED`."""
    sync: bool = False
    detect_zeroes: str = "off"
    fast_path: bool = True
    max_background: int = 64
    uid: int = field(default_factory=os.geteuid)
    gid: int = field(default_factory=os.getegid)
    mode: int = 0o600
    fsname: str | None = None
    kernel_flags: frozenset[str] = frozenset()
    """Options that go to the kernel or libfuse as they are."""

    @property
    def patience_with_laggards_s(self) -> float | None:
        """How much longer (seconds) than on others that suffice a write may take on a replica;
        None: until the timeout."""
        return self.behind_max_s if self.write_ack == "threshold" else None


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table."""

    name: str
    value: str
    """What the help shows after the ``=``; empty for a flag."""
    parse: Callable[[str], Any]
    field: str
    """The `MountOptions` field it sets; ``kernel_flags`` collects names."""
    help: str


def _kernel(name: str, text: str) -> Option:
    return Option(name, "", values.flag, "kernel_flags", text)


OPTIONS: Mapping[str, Option] = {
    option.name: option
    for option in [
        Option(
            "read-pattern",
            "quorum|fifo|latency",
            values.choice("quorum", "fifo", "latency"),
            "read_pattern",
            "quorum: read all replicas and vote (default); fifo: read the first that answers, "
            "in the order given; latency: read the one that lately answered fastest",
        ),
        Option(
            "vote-threshold",
            "N",
            values.count,
            "vote_threshold",
            "replicas that must agree on a read, and succeed in a write or flush "
            "(default: a majority)",
        ),
        Option(
            "rewrite-corrupted",
            "on|off",
            values.switch,
            "rewrite_corrupted",
            "rewrite what a strict majority outvoted or a replica could not read",
        ),
        Option(
            "blkverify",
            "on|off",
            values.switch,
            "blkverify",
            "two replicas, threshold 2: any difference is an error, and is logged",
        ),
        Option(
            "write-mostly",
            "REPLICA[:REPLICA]",
            values.replicas,
            "write_mostly",
            "read these, by path or file name, only where no other replica can answer: for far "
            "ones",
        ),
        Option(
            "metadata",
            "sidecar|none",
            values.choice("sidecar", "none"),
            "metadata",
            "sidecar: remember in REPLICA.quorumfs which replicas are current; resync the others "
            "(default); none: what a replica missed is remembered until unmount",
        ),
        Option(
            "sidecars",
            "DIR",
            values.directory,
            "sidecars",
            "where the sidecars of replicas that are block devices lie, which have no room beside "
            "them: a directory that lasts, and that each host that mounts the set sees",
        ),
        Option(
            "degraded",
            "",
            values.flag,
            "degraded",
            "mount although a missing replica may hold later writes",
        ),
        Option(
            "takeover",
            "",
            values.flag,
            "takeover",
            "mount although another host has the set open: for a host that is down; if it is not, "
            "its mount stops within 8 s",
        ),
        Option(
            "chunk-size",
            "SIZE",
            values.chunk_size,
            "chunk_size",
            "unit in which a new set remembers what differs, from 64K to 4M (default: by the size "
            "of the disk)",
        ),
        Option(
            "resync-rate",
            "SIZE",
            values.rate,
            "resync_rate",
            "bytes a second that a resync copies at most, like 100M (default: none; it "
            "yields to the guest in any case)",
        ),
        Option(
            "scrub-every",
            "TIME",
            values.interval,
            "scrub_every_s",
            "begin a scrub when the last one ended so long ago, like 30d (default: off); with "
            "rewrite-corrupted it repairs",
        ),
        Option(
            "on-event",
            "PROGRAM",
            values.program,
            "on_event",
            "run PROGRAM EVENT MOUNTPOINT [REPLICA] for each event, which it can read as JSON, one "
            "after the other (default: none)",
        ),
        Option(
            "replica-timeout",
            "TIME",
            values.duration,
            "replica_timeout_s",
            "how long a request waits for one replica before it goes on without it; twice as long "
            "if too few others answer, four times as long for a flush (default: 8s)",
        ),
        Option(
            "write-ack",
            "all|threshold",
            values.choice("all", "threshold"),
            "write_ack",
            "all: a write or flush waits for every current replica (default); threshold: once "
            "vote-threshold of them have done it, it waits behind-max for the others; who takes "
            "longer is ejected, and caught up later",
        ),
        Option(
            "behind-max",
            "TIME",
            values.short_duration,
            "behind_max_s",
            "with write-ack=threshold: how much longer than the others a replica may take for a "
            "write, and four times as long for a flush (default: 100ms)",
        ),
        Option(
            "replica-io",
            "|".join(ASKED),
            values.choice(*ASKED),
            "replica_io",
            "buffered: through this host's page cache (default); direct: past it, with O_DIRECT; "
            "auto: direct where the store is fast, or elsewhere",
        ),
        Option("sync", "", values.flag, "sync", "every write is durable when it returns"),
        Option(
            "detect-zeroes",
            "off|on|unmap",
            values.choice("off", "on", "unmap"),
            "detect_zeroes",
            "make an aligned write of zeros a request for zeros, with unmap a hole (default: off)",
        ),
        Option(
            "fast-path",
            "on|off",
            values.switch,
            "fast_path",
            "have C serve the requests that need no decision, on this host's own file systems "
            "(default: on)",
        ),
        Option(
            "max-background",
            "N",
            values.background,
            "max_background",
            "asynchronous requests that the kernel sends at a time (default: 64)",
        ),
        Option("ro", "", values.flag, "read_only", "write nothing anywhere"),
        Option("rw", "", values.flag, "", "read and write (default)"),
        Option("uid", "USER", values.uid, "uid", "owner of disk.img (default: who mounts)"),
        Option("gid", "GROUP", values.gid, "gid", "group of disk.img (default: who mounts)"),
        Option("mode", "OCTAL", values.mode, "mode", "mode of disk.img (default: 0600)"),
        Option(
            "fsname",
            "NAME",
            values.name,
            "fsname",
            "source that findmnt shows (default: the replicas)",
        ),
        _kernel("allow_other", "let other users in, as far as uid, gid and mode do"),
        _kernel("allow_root", "let root in"),
        _kernel("default_permissions", "let the kernel check permissions (always on)"),
        *(
            _kernel(name, "as in mount(8)")
            for name in ("atime", "noatime", "dev", "nodev", "exec", "noexec", "suid", "nosuid")
        ),
    ]
}


def option_of_field(name: str) -> str:
    """The option, or the options, that set the field *name*."""
    return ", ".join(option.name for option in OPTIONS.values() if option.field == name)


def option_rows() -> list[tuple[str, str]]:
    """The table for help and manual: each option as it is given, and what it does."""
    return [
        (f"{option.name}{'=' + option.value if option.value else ''}", option.help)
        for option in OPTIONS.values()
    ]
