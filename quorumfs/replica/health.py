"""What one replica has done since it was mounted, and what of it went wrong."""

import errno
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from quorumfs.replica.storage import CHANGES, Kind, Operation, TruncatedError

_GONE = frozenset({errno.ENOTCONN, errno.ESTALE, errno.ENODEV})
"""What a file answers whose file system is there no more, even if another took its place."""


class Sort(Enum):
    """Operations of which one that succeeds shows that a failed one is a matter of the past."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    SIDECAR = "sidecar"
    """Whatever its record needs; until that is durable again."""


_SORTS = {Kind.READ: Sort.READ, Kind.SYNC: Sort.FLUSH} | dict.fromkeys(CHANGES, Sort.WRITE)


class Failure(NamedTuple):
    """The last operation of one sort that failed on a replica."""

    sort: Sort
    errno: int
    text: str
    """The same for a reader."""
    at: float
    """When, by trio's clock (seconds)."""
    successes: int
    """How many of this sort had succeeded until then."""


@dataclass(slots=True)
class Counters:
    """What was done on one replica's image since it was mounted; bytes, or operations."""

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
    """Reads in which it held other data than the winner."""
    timeouts: int = 0

    def successes(self, sort: Sort) -> int:
        """How many operations of a sort succeeded; those on the sidecar are not counted."""
        if sort is Sort.READ:
            return self.reads - self.read_errors
        if sort is Sort.WRITE:
            return self.writes - self.write_errors
        return self.flushes - self.flush_errors if sort is Sort.FLUSH else 0

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
    """How the files of one replica do, by what its operations came to."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.dead = False
        """Its file system was gone, the last time that it was asked."""
        self.truncated_to: int | None = None
        """How long (bytes) its image was when it was last found to be too short."""
        self._failures: dict[Sort, Failure] = {}

    @property
    def failures(self) -> list[Failure]:
        """The last one of each sort."""
        return list(self._failures.values())

    def overcome(self, failure: Failure) -> bool:
        """Whether something of the same sort was done since."""
        return failure.successes != self.counters.successes(failure.sort)

    def opened(self) -> None:
        """Note that other files are in use: those that failed may be gone."""
        self.dead = False
        self.truncated_to = None
        self._failures.clear()

    def answered(self, error: OSError | None) -> None:
        """Note that its file system has answered, with *error* or without."""
        self.dead = error is not None and error.errno in _GONE

    def failed(self, operation: Operation, error: OSError, now: float, *, to_sidecar: bool) -> None:
        """Note that *operation*, which was counted, failed *now* (trio's clock, seconds)."""
        if isinstance(error, TruncatedError):
            self.truncated_to = error.size
        if operation.kind is Kind.REREAD:
            return
        sort = Sort.SIDECAR if to_sidecar else _SORTS.get(operation.kind)
        if sort is not None:
            # Not the error itself, which holds on to the stack it was raised in, and to its data.
            text, successes = error.strerror or str(error), self.counters.successes(sort)
            self._failures[sort] = Failure(sort, error.errno or errno.EIO, text, now, successes)

    def sidecar_synced(self) -> None:
        """Note that the record of the replica is durable again."""
        self._failures.pop(Sort.SIDECAR, None)
