"""Counters and failures of one replica since the mount."""

import errno
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from quorumfs.decisions.latency import Durations, Latency
from quorumfs.replica.lastwrites import LastWrites
from quorumfs.replica.storage import CHANGES, Kind, Operation, TruncatedError

_GONE = frozenset({errno.ENOTCONN, errno.ESHUTDOWN, errno.ESTALE, errno.ENODEV})
"""Errors of a file whose file system is gone, even if another took its place. nbdfuse, whose server
has gone, answers with the first two."""


_LOST_FILE = frozenset({errno.EIO, errno.EINVAL, errno.EBADF, errno.ENXIO})
"""Errors with which some file systems answer for ever to files that were open in an outage: sshfs
with EIO, nbdfuse with EINVAL. A bad medium answers so as well."""


def is_away(error: OSError) -> bool:
    """Whether *error* says that a replica could not be asked, or did not answer, and no more."""
    return error.errno in _GONE or error.errno == errno.ETIMEDOUT


class Sort(Enum):
    """Sorts of operations: a success ends an earlier failure of the same sort."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    SIDECAR = "sidecar"
    """All operations on the sidecar: a sync of the record ends a failure."""


_SORTS = {Kind.READ: Sort.READ, Kind.SYNC: Sort.FLUSH} | dict.fromkeys(CHANGES, Sort.WRITE)


TIMED_MAX = 256 << 10
"""Bytes of the largest request whose latency is noted: larger ones take long for their size."""


class Failure(NamedTuple):
    """The last operation of one sort that failed on a replica."""

    sort: Sort
    errno: int
    text: str
    """The error in words."""
    at: float
    """The time of the failure, by trio's clock (seconds)."""
    successes: int
    """How many operations of this sort had succeeded before the failure."""


@dataclass(slots=True)
class Counters:
    """Counts of one replica's image since the mount; bytes, or operations."""

    reads: int = 0
    writes: int = 0
    flushes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    copied_bytes: int = 0
    """Written by resync and repair."""
    read_errors: int = 0
    write_errors: int = 0
    flush_errors: int = 0
    mismatches: int = 0
    """Reads in which the replica held other data than the winner."""
    timeouts: int = 0

    def successes(self, sort: Sort) -> int:
        """How many operations of *sort* succeeded; the sidecar's are not counted."""
        if sort is Sort.READ:
            return self.reads - self.read_errors
        if sort is Sort.WRITE:
            return self.writes - self.write_errors
        return self.flushes - self.flush_errors if sort is Sort.FLUSH else 0

    def forget_errors(self) -> int:
        """Count errors from 0 again; returns how many were counted."""
        counted = self.read_errors + self.write_errors + self.flush_errors
        counted += self.mismatches + self.timeouts
        self.read_errors = self.write_errors = self.flush_errors = 0
        self.mismatches = self.timeouts = 0
        return counted

    def count(self, operation: Operation) -> None:
        """Count *operation*, which has its outcome."""
        failed = operation.error is not None
        if operation.kind is Kind.READ:
            self.reads += 1
            self.read_errors += failed
            if not failed:
                self.bytes_read += operation.length
        elif operation.kind in CHANGES:
            self.writes += 1
            self.write_errors += failed
            if isinstance(operation.value, int) and operation.kind is Kind.COPY:
                self.bytes_written += operation.value
            elif not failed:
                self.bytes_written += operation.length
        elif operation.kind is Kind.SYNC:
            self.flushes += 1
            self.flush_errors += failed
        if operation.error is not None and operation.error.errno == errno.ETIMEDOUT:
            self.timeouts += 1


class Health:
    """The health of one replica's files, by the outcomes of operations."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.dead = False
        """The file system was gone at its last answer."""
        self.perhaps_lost = False
        """The last answer was that of files that the file system may never serve again."""
        self.truncated_to: int | None = None
        """The length (bytes) of the image when last found to be too short."""
        self.latency = {sort: Latency() for sort in (Sort.READ, Sort.WRITE, Sort.FLUSH)}
        """Of the image, by sort; what the fast path serves is not among it."""
        self.durations = {sort: Durations() for sort in self.latency}
        """As many as are counted in `counters`, by sort."""
        self.addresses = tuple(self.durations[sort].address for sort in (Sort.WRITE, Sort.READ))
        """Where the fast path counts writes, and reads: it asks whenever Python is about to sleep,
        and to look up a sort takes as long as all else that it asks."""
        self.last_writes = LastWrites()
        """To the image, where the fast path has no part in it: on a network, or on FUSE."""
        self.left_ns = 0
        """The ctime of the image when it was closed last (nanoseconds); 0: unknown, as it is of a
        store elsewhere, which may write later what it was given."""
        self._failures: dict[Sort, Failure] = {}

    @property
    def failures(self) -> list[Failure]:
        """The last failure of each sort."""
        return list(self._failures.values())

    def forget_errors(self) -> int:
        """Count errors from 0 again, and forget the failures; returns how many were counted.

        A failure of the sidecar is kept until a sync of the record succeeds, for nothing else tells
        that the record may be old.
        """
        counted = self.counters.forget_errors()
        self._failures = {
            sort: failure for sort, failure in self._failures.items() if sort is Sort.SIDECAR
        }
        return counted

    def overcome(self, failure: Failure) -> bool:
        """Whether an operation of the same sort has succeeded since *failure*."""
        return failure.successes != self.counters.successes(failure.sort)

    def opened(self) -> None:
        """Forget failures, because other files are in use now."""
        self.dead = self.perhaps_lost = False
        self.truncated_to = None
        self._failures.clear()

    def answered(self, error: OSError | None) -> None:
        """Note that the file system has answered, with *error* or without."""
        self.dead = error is not None and error.errno in _GONE
        self.perhaps_lost = error is not None and error.errno in _LOST_FILE

    def took(self, operation: Operation, seconds: float, now: float) -> None:
        """Note that *operation* had its outcome, or was given up, after *seconds*.

        *now*: by trio's clock (seconds).
        """
        sort = _SORTS.get(operation.kind)
        if sort is not None:
            self.durations[sort].note(seconds)
            if operation.length <= TIMED_MAX:
                self.latency[sort].note(seconds, now)

    def failed(self, operation: Operation, error: OSError, now: float, *, to_sidecar: bool) -> None:
        """Note that *operation*, which was counted, failed *now* (trio's clock, seconds)."""
        if isinstance(error, TruncatedError):
            self.truncated_to = error.size
        if operation.kind is Kind.REREAD:
            return
        sort = Sort.SIDECAR if to_sidecar else _SORTS.get(operation.kind)
        if sort is not None:
            # Not the error itself, which keeps the stack of its raise, and the data there, alive.
            text, successes = error.strerror or str(error), self.counters.successes(sort)
            self._failures[sort] = Failure(sort, error.errno or errno.EIO, text, now, successes)

    def sidecar_synced(self) -> None:
        """Note that the record of the replica is durable again."""
        self._failures.pop(Sort.SIDECAR, None)
