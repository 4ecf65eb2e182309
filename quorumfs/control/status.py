"""The status of a mount: what ``status --json`` shows; `quorumfs.control.advice` puts it in words.

The daemon fills in a `Status`, the command line prints it; on the way it is one JSON object. Keys
may be added to schema 1; none is ever renamed or given another meaning. What was added later has
a default here, so that commands and daemons of different ages understand each other.

Pure: no I/O, no clock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any

from quorumfs.control import schema
from quorumfs.decisions.model import RepairKind, Standing
from quorumfs.errors import ExitCode

SCHEMA = 1

# What is no free text has no room for any, for whoever answers writes on root's terminal.
Word = Annotated[str, schema.Text(64, "[a-z][a-z-]*")]
"""A name of ours."""
Errno = Annotated[str, schema.Text(64, "[A-Z0-9]+")]
Id = Annotated[str, schema.Text(32, "[0-9a-f]{32}")]
Generation = Annotated[str, schema.Text(16, "[0-9a-f]{16}")]
ProcessId = Annotated[int, schema.Whole(1, 2**31 - 1)]
Threshold = Annotated[int, schema.Whole(1, 2**31 - 1)]


class StatusFormatError(ValueError):
    """This is not a status that can be understood here."""


class OtherSchemaError(StatusFormatError):
    """This is the status of another version of quorumfs."""


class DiskState(Enum):
    """What a disk is to those who use it; also the exit code of ``quorumfs status``."""

    HEALTHY = "healthy"
    """Every replica holds every acknowledged write, and no two may differ."""
    DEGRADED = "degraded"
    """It works, and a replica is not in full use or not at its path any more, or something has yet
    to be compared."""
    NO_QUORUM = "no-quorum"
    """Fewer replicas than the vote threshold can serve: reads, writes or flushes fail or wait."""
    NEEDS_OPERATOR = "needs-operator"
    """It works, and will not become healthy until a person decides something."""

    @property
    def exit_code(self) -> ExitCode:
        return _EXIT_CODES[self]


_EXIT_CODES = {
    DiskState.HEALTHY: ExitCode.OK,
    DiskState.DEGRADED: ExitCode.FAILED,
    DiskState.NO_QUORUM: ExitCode.UNUSABLE,
    DiskState.NEEDS_OPERATOR: ExitCode.NEEDS_OPERATOR,
}

_SEVERITY = (
    ExitCode.OK,
    ExitCode.FAILED,
    ExitCode.USAGE,  # nothing can be said of that mount
    ExitCode.NEEDS_OPERATOR,
    ExitCode.UNUSABLE,
)


def worst(exit_codes: Iterable[ExitCode]) -> ExitCode:
    """The exit code that tells most of several: of a disk that cannot be used before all others."""
    return max(exit_codes, key=_SEVERITY.index, default=ExitCode.OK)


@dataclass(frozen=True, slots=True)
class ErrorCounts:
    """What went wrong on one replica since the mount."""

    read: int = 0
    write: int = 0
    flush: int = 0
    mismatch: int = 0
    """Reads in which it held other data than the winner of the vote."""
    timeout: int = 0

    @property
    def total(self) -> int:
        return self.read + self.write + self.flush + self.mismatch + self.timeout


class Trouble(Enum):
    """What is wrong with a replica although it is current; the worst first."""

    TRUNCATED = "truncated"
    """Its image lost its end, since the mount."""
    GONE = "gone"
    """Its file system is there no more."""
    FULL = "full"
    """It had no space for the last write."""
    FAILING = "failing"
    """The last write to it, flush of it or write to its sidecar failed."""
    UNDURABLE = "undurable"
    """It may have lost what it could not flush, and nobody but the guest can give it that again."""
    LOST = "lost"
    """It may have lost what it could not flush, and is given that again."""
    HANGING = "hanging"
    """Its file system does not answer, and every request waits for it."""
    SLOW = "slow"
    """It has not answered something for long."""
    ASTRAY = "astray"
    """Its path does not lead to it any more."""


DISABLING = frozenset(
    trouble.value
    for trouble in (
        Trouble.TRUNCATED,
        Trouble.GONE,
        Trouble.FULL,
        Trouble.FAILING,
        Trouble.UNDURABLE,
        Trouble.HANGING,
    )
)
"""Troubles with which a replica does not count towards the threshold: what needs it fails, or
waits."""


@dataclass(frozen=True, slots=True)
class LastError:
    """A failed operation after which none of its sort has succeeded."""

    operation: Word
    """``read``, ``write``, ``flush`` or ``sidecar``."""
    errno: Errno
    """Its name, such as ``ENOSPC``."""
    text: str
    """The same for a reader."""
    seconds_ago: int

    @property
    def what(self) -> str:
        """What failed."""
        return _OPERATIONS.get(self.operation, f"the last {self.operation} of it") + " failed"


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a replica has not answered for the longest time."""

    operation: Word
    """Such as ``write`` or ``flush``."""
    seconds: int
    """How long."""


HANGS = "it does not answer"
"""Why a replica is missing whose requests were given up."""

_OPERATIONS = {
    "write": "the last write to it",
    "sidecar": "the last write to its sidecar",
}


@dataclass(frozen=True, slots=True)
class LatencyStatus:
    """How long requests of one sort took lately (microseconds)."""

    p50_us: int
    p99_us: int
    max_us: int
    """The longest of the last minute or two."""


@dataclass(frozen=True, slots=True)
class Latencies:
    """Of requests of at most 256 KiB; those that the fast path served are not among them. None:
    there were no requests."""

    read: LatencyStatus | None = None
    write: LatencyStatus | None = None
    flush: LatencyStatus | None = None


@dataclass(frozen=True, slots=True)
class DurationsStatus:
    """How long all requests of one sort took since the mount, as a histogram."""

    counts: tuple[int, ...]
    """Of at most 10 us, 30 us, 100 us and so on to 30 s; the last one of those above."""
    total_us: int


@dataclass(frozen=True, slots=True)
class AllDurations:
    """By sort of request; None: of a version that does not count them."""

    read: DurationsStatus | None = None
    write: DurationsStatus | None = None
    flush: DurationsStatus | None = None


@dataclass(frozen=True, slots=True)
class Slowness:
    """A sort of requests for which a replica takes much longer than the fastest other one."""

    operation: Word
    """``read``, ``write`` or ``flush``."""
    p50_us: int
    times: int
    """So many times as long."""


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """One replica; the counters begin at the mount."""

    path: str
    replica_id: Id | None = field(metadata=schema.key("id"))
    """None without metadata."""
    state: Word
    """A value of `quorumfs.decisions.standing.Standing`, or of a later version of it."""
    reason: str | None = None
    """Why it is not current, or what is wrong with it although it is."""
    reads: int = 0
    writes: int = 0
    flushes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    errors: ErrorCounts = field(default_factory=ErrorCounts)
    out_of_sync_bytes: int = 0
    """An upper bound for what it lacks."""
    in_flight: int = 0
    """Requests that it has not answered, those given up included."""
    copied_bytes: int = 0
    """Written to it by resync and repair."""
    trouble: Word | None = None
    """A value of `Trouble`; None if it is in order, or not current and not hanging."""
    last_error: LastError | None = None
    """None: none that would matter any more."""
    store: str | None = None
    """The mount point of the file system that its unanswered requests keep busy; None: none does,
    or nobody unmounts it."""
    waiting: Waiting | None = None
    """None: it has answered everything that was handed to a thread, or that was given up."""
    write_mostly: bool = False
    """It is read only where no other replica can answer."""
    latency: Latencies = field(default_factory=Latencies)
    durations: AllDurations = field(default_factory=AllDurations)
    slow: tuple[Slowness, ...] = ()
    """For what it takes much longer than the fastest other replica."""
    io: Word | None = None
    """How its image is read and written: a value of `quorumfs.decisions.replicaio.Way`; None: it is
    not open."""

    @property
    def standing(self) -> Standing | None:
        """Its `state`; None: a word that this version does not know."""
        return _STANDINGS.get(self.state)

    @property
    def current(self) -> bool:
        """Whether it is a member, and answers."""
        return self.standing is not None and self.standing.is_member

    @property
    def coming(self) -> bool:
        """Whether it becomes current by itself."""
        return self.standing is not None and self.standing.is_coming

    @property
    def needs_operator(self) -> bool:
        """Whether a person must decide what becomes of it."""
        return self.standing is not None and self.standing.needs_operator

    @property
    def usable(self) -> bool:
        """Whether requests that need it succeed, as far as known."""
        return self.current and self.trouble not in DISABLING


_STANDINGS = {standing.value: standing for standing in Standing}


@dataclass(frozen=True, slots=True)
class ResyncStatus:
    """Work on the replicas that is under way; `progress` makes one that adds up."""

    replica: str | None
    """The path of the one that is written to; None if that may be any."""
    done_bytes: int
    total_bytes: int
    rate_bytes_per_s: int
    eta_s: int | None
    """None: nobody knows."""
    kind: RepairKind = RepairKind.RESYNC


@dataclass(frozen=True, slots=True)
class Fenced:
    """Which mount took the set over."""

    host: str
    pid: int
    since: str
    """By the clock of its host."""

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True, slots=True)
class Place:
    """A range of the disk."""

    offset: int
    """Bytes."""
    length: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class ScrubPlace:
    """A place at which a scrub found something."""

    offset: int
    """Bytes."""
    length: int
    """Bytes."""
    replica: str | None
    """The path of the one that is wrong there; None: nobody knows which one is."""
    blame: Word
    """``majority``, ``undecided`` or ``unreadable``."""
    repaired: bool


@dataclass(frozen=True, slots=True)
class ScrubStatus:
    """A scrub that is under way; `added_up` makes its progress add up."""

    number: int
    """Counts the scrubs of the set."""
    done_bytes: int
    """Of the disk; holes are passed over at once."""
    total_bytes: int
    rate_bytes_per_s: int
    eta_s: int | None
    """None: nobody knows."""
    mismatches: int
    """Blocks of 4096 bytes that the replicas hold differently; so far, as all these."""
    repaired: int
    """Blocks that were made good."""
    unreadable: int
    """Blocks that some replica could not be read at."""
    undecided: int
    """Blocks that differ, and nothing tells which replica is right."""
    unrepaired: int
    """Blocks that were left as they were found."""
    paused: bool = False
    repair: bool = False
    """It repairs what is certain."""
    waits: str | None = None
    """Why it does not go on although it is not paused."""
    limit_bytes_per_s: int | None = None
    places: tuple[ScrubPlace, ...] = ()
    """The first ones that it found since the mount."""


@dataclass(frozen=True, slots=True)
class LastScrub:
    """The last scrub that ended."""

    number: int
    """Counts the scrubs of the set."""
    ended: str
    """By the clock of its host, in UTC."""
    seconds: int
    """How long it was at work."""
    stopped: bool
    """Before it had seen everything."""
    mismatches: int
    """Blocks of 4096 bytes, as for `ScrubStatus`."""
    repaired: int
    unreadable: int
    undecided: int
    unrepaired: int
    places: tuple[ScrubPlace, ...] = ()
    """The first ones that it found; none if it ended before the mount."""


@dataclass(frozen=True, slots=True)
class Status:
    """One mount at one moment."""

    mountpoint: str
    pid: ProcessId
    set_id: Id | None = field(metadata=schema.key("set"))
    """None without metadata."""
    generation: Generation | None
    """None without metadata."""
    size: int
    """Bytes."""
    state: DiskState
    read_pattern: Word
    vote_threshold: Threshold
    replicas: tuple[ReplicaStatus, ...]
    """In the order of the command line."""
    resync: ResyncStatus | None = None
    scrub: ScrubStatus | None = None
    """None: none is under way."""
    metadata: Word = "sidecar"
    """What the set remembers when it is not mounted: ``sidecar`` or ``none``."""
    read_only: bool = False
    undecided_bytes: int = 0
    """Where replicas differ, and no rule tells which one is right."""
    undecided: tuple[Place, ...] = ()
    """The first of these places."""
    last_scrub: LastScrub | None = None
    """None: none has ended yet."""
    next_scrub: str | None = None
    """When the next one begins by itself, by the clock of its host, in UTC; None: it does not."""
    unreadable: tuple[Place, ...] = ()
    """Where no replica can be read: a read gets an error there until somebody writes there."""
    notes: tuple[str, ...] = ()
    """What the operator should know of this mount whatever its state."""
    fenced: Fenced | None = None
    """Who has the set instead; this mount reads and writes nothing any more."""
    resync_paused: bool = False
    """No replica is resynced until the administrator lets resyncs go on."""
    actions: tuple[str, ...] = ()
    """Orders of an administrator that are under way: the verb, and what it does or waits for."""
    options: tuple[str, ...] = ()
    """The options in force, each as ``mount -o`` takes it; a flag that is not set is left out."""
    standstill_s: int | None = None
    """How long (seconds) the daemon has served nothing, for it stands still; None: it goes on."""

    def to_json(self) -> dict[str, Any]:
        """The object of ``status --json``."""
        return {"schema": SCHEMA, **schema.dump(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Status":
        """Understand what `to_json` gave, of this version or another with the same schema.

        Raises `StatusFormatError`, whatever *content* is.
        """
        version = content.get("schema")
        if version != SCHEMA or type(version) is not int:
            if type(version) is int and 0 < version < 1000:
                raise OtherSchemaError(f"its status has schema {version}, known here: {SCHEMA}")
            raise StatusFormatError("it does not say which schema it has")
        try:
            return schema.load(cls, content)
        except schema.FormatError as error:
            raise StatusFormatError(str(error)) from None


def progress(
    kind: RepairKind,
    replica: str | None,
    *,
    done_bytes: int,
    total_bytes: int,
    rate_bytes_per_s: float,
) -> ResyncStatus:
    """A `ResyncStatus` with sums as `added_up`.

    The total may grow and shrink under way, for guests write meanwhile.
    """
    return ResyncStatus(replica, *added_up(done_bytes, total_bytes, rate_bytes_per_s), kind)


def added_up(
    done_bytes: int, total_bytes: int, rate_bytes_per_s: float
) -> tuple[int, int, int, int | None]:
    """What is done, of how much, how fast, and how long (seconds) the rest takes at this rate.

    Never more than all is done.
    """
    total_bytes = max(total_bytes, 0)
    done_bytes = min(max(done_bytes, 0), total_bytes)
    rate = max(int(rate_bytes_per_s), 0)
    left = total_bytes - done_bytes
    return done_bytes, total_bytes, rate, -(-left // rate) if rate else None if left else 0


def overall_state(
    replicas: Sequence[ReplicaStatus],
    *,
    vote_threshold: int,
    unsettled: bool = False,
    undecided_bytes: int = 0,
    unreadable: bool = False,
    fenced: bool = False,
    stands_still: bool = False,
) -> DiskState:
    """What a disk is whose replicas are like this.

    *unsettled*: something is being compared or copied, or waits for it; healthy promises that the
    replicas are equal. *unreadable*: some place can be read on no replica. *fenced*: another mount
    has the set. *stands_still*: the daemon does not go on. A disk that cannot be used comes before
    one that needs a decision.
    """
    if fenced or sum(replica.usable for replica in replicas) < vote_threshold:
        return DiskState.NO_QUORUM
    if undecided_bytes or any(replica.needs_operator for replica in replicas):
        return DiskState.NEEDS_OPERATOR
    if unsettled or unreadable or stands_still or not all(map(_in_order, replicas)):
        return DiskState.DEGRADED
    return DiskState.HEALTHY


def _in_order(replica: ReplicaStatus) -> bool:
    return replica.current and replica.trouble is None and not replica.out_of_sync_bytes
