"""One replica: what is in flight on it, and whether it answers."""

import errno
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, NamedTuple

import trio

from quorumfs.assembly import State
from quorumfs.filestorage import FileStorage
from quorumfs.sidecar import SUFFIX
from quorumfs.storage import (
    CHANGES,
    Attempt,
    Buffer,
    Bytes,
    Kind,
    Operation,
    Storage,
    TruncatedError,
    Value,
)

log = logging.getLogger(__name__)

SYNC_PATIENCE = 4
"""A flush may take this many times the replica timeout: it waits for everything written before
to reach the medium, where a read or a write waits only for itself."""


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


class Replica:
    """Requests to one replica's storage, each of which ends within a deadline.

    An operation that takes too long is answered with ETIMEDOUT and *abandoned*: it may still
    happen, minutes later. Until all abandoned ones have returned the replica is `MISSING` and is
    asked nothing more, so a late write can never overwrite a newer one, and one sick replica
    costs one timeout, once.
    """

    def __init__(
        self,
        index: int,
        path: str,
        storage: Storage | None,
        timeout_s: float,
        *,
        sidecar: Storage | None = None,
        slot: int | None = None,
    ) -> None:
        """*index* is the replica's place on the command line, *timeout_s* its patience.

        *storage* is its image, None if it is not there; *slot* its place in the set's record.
        """
        self.index = index
        self.path = path
        self.slot = slot
        self.role = State.CURRENT
        """What the set takes it for, whether it answers or not."""
        self.reason: str | None = None
        """Why it is not current."""
        self.counters = Counters()
        self.dead = False
        """Its file system was gone, the last time that it was asked."""
        self.truncated_to: int | None = None
        """How long (bytes) its image was when it was last found to be too short."""
        self._failures: dict[Sort, Failure] = {}
        self.settled: Callable[[Operation], None] = lambda _: None
        """Called with each operation on the image that has its outcome, given up or not."""
        self.fenced = False
        """Nothing is asked of its files any more, for another mount has them."""
        self._put_away: dict[Storage, str] = {}
        """Files of one that is fenced, to be closed."""
        self.let_go: Callable[[], None] = lambda: None
        """Called when the last of its files that were detached is closed."""
        self._image = storage
        self._away = storage is None
        self._sidecar = sidecar
        self._to_close: dict[Storage, str] = {}
        """Files detached whose closing has not begun, and their paths."""
        self._closing: dict[Operation, tuple[Storage, str]] = {}
        self._timeout_s = timeout_s
        self._in_flight: dict[Operation, _Waiting] = {}
        self._abandoned: set[Operation] = set()

    @property
    def state(self) -> State:
        """What it is at this moment."""
        if self.role is State.FOREIGN:
            return self.role
        return State.MISSING if self._abandoned or self._away else self.role

    @property
    def hung(self) -> bool:
        """Whether something asked of it long ago may still happen."""
        return bool(self._abandoned)

    @property
    def in_flight(self) -> int:
        """Operations that have not returned, given up or not, and files that are to be closed."""
        return self.unanswered + len(self._to_close)

    @property
    def unanswered(self) -> int:
        """Operations that have not returned, given up or not."""
        return len(self._in_flight) + len(self._abandoned)

    @property
    def waiting(self) -> tuple[Kind, float] | None:
        """What it has not answered for the longest time, and since when (trio's clock, seconds).

        Without what was given up, and what only has to be heard of yet.
        """
        returned = [operation for file in self.files for operation in file.returned]
        waiting = (
            (one.since, operation.kind)
            for operation, one in self._in_flight.items()
            if operation not in returned
        )
        since, kind = min(waiting, key=lambda one: one[0], default=(0.0, None))
        return None if kind is None else (kind, since)

    @property
    def failures(self) -> list[Failure]:
        """The last one of each sort."""
        return list(self._failures.values())

    def overcome(self, failure: Failure) -> bool:
        """Whether it has done something of the same sort since."""
        return failure.successes != self.counters.successes(failure.sort)

    @property
    def changing(self) -> Iterator[Operation]:
        """Changes of the image that have no outcome yet."""
        return (
            operation
            for operation, waiting in self._in_flight.items()
            if operation.kind in CHANGES and not waiting.to_sidecar
        )

    @property
    def attached(self) -> bool:
        """Whether it has an image open."""
        return self._image is not None

    @property
    def files(self) -> list[FileStorage]:
        """What it has open on real file systems."""
        storages = (self._image, self._sidecar)
        return [storage for storage in storages if isinstance(storage, FileStorage)]

    @property
    def image(self) -> Storage | None:
        """Its image, if it is open."""
        return self._image

    def attach(self, storage: Storage, sidecar: Storage) -> None:
        """Use these files from now on; there must be none in use, or not closed yet."""
        assert self._image is None
        assert not self.in_flight
        if self.fenced:  # it was while they were being opened
            self._put_away |= self._with_paths(storage, sidecar)
            return
        self.dead = self._away = False
        self.truncated_to = None
        self._failures.clear()  # were those of files that may be gone
        self._image = storage
        self._sidecar = sidecar

    def fence(self) -> None:
        """Ask nothing of its files any more. They are open, and locked, until it is closed."""
        self.fenced = True
        self._put_away |= self._with_paths(self._image, self._sidecar)
        self._image = self._sidecar = None

    def _with_paths(self, image: Storage | None, sidecar: Storage | None) -> dict[Storage, str]:
        """Those of its files that there are, and what to call them."""
        both = ((image, self.path), (sidecar, f"{self.path}{SUFFIX}"))
        return {storage: path for storage, path in both if storage is not None}

    def detach(self, *, there: bool = False) -> None:
        """Use its files no more, if it has any: they are closed as soon as nothing is in flight.

        That may take long, or hang, and until then counts as in flight; each file is closed
        whatever becomes of the other.

        *there*: they could be opened, so it is not missing.
        """
        self._away = not there
        self._to_close |= self._with_paths(self._image, self._sidecar)
        self._image = self._sidecar = None
        self._close_detached()

    def _close_detached(self) -> None:
        """Begin to close what was detached, if all that was asked of it has returned."""
        if self._in_flight or self._abandoned:
            return
        to_close, self._to_close = self._to_close, {}
        for storage, path in to_close.items():
            operation = Operation(Kind.CLOSE)
            self._closing[operation] = storage, path
            self._in_flight[operation] = _Waiting(Gathering(0), trio.current_time(), False)
            storage.submit(operation, self._returned)

    def _go_on_closing(self, returned: Operation, error: OSError | None) -> None:
        """Something has *returned* that was asked of files that are detached."""
        if returned.kind is not Kind.CLOSE:
            self._close_detached()
            return
        storage, path = self._closing.pop(returned)
        if error is not None and error.errno == errno.EAGAIN:
            self._to_close[storage] = path  # begun when deadlines are looked at
        elif error is not None:
            # A flush has told what is durable; and closed it is, with it or without.
            log.warning("closing %s: %s", path, error.strerror)
        if not self.in_flight:
            self.let_go()

    @property
    def prompt(self) -> bool:
        """Whether the two following may be called."""
        return not self._abandoned and self._image is not None and self._image.prompt

    def read_now(self, offset: int, length: int) -> Bytes | None:
        """Read here and now; None if that was not possible: then it must be submitted."""
        assert self._image is not None
        data = self._image.read_now(offset, length)
        if data is not None:
            counters = self.counters
            counters.reads += 1
            counters.bytes_read += length
        return data

    def write_now(self, offset: int, data: Buffer) -> Attempt:
        """Write here and now; what is not done must be submitted."""
        assert self._image is not None
        attempt = self._image.write_now(offset, data)
        if attempt is Attempt.DONE:
            counters = self.counters
            counters.writes += 1
            counters.bytes_written += len(data)
        return attempt

    def copying(self, source: "Replica", offset: int, length: int) -> Operation | None:
        """What has its image take a range of that of *source*, if that can be asked of it."""
        if self._image is None or source.image is None or source.hung:
            return None
        return self._image.copying(source.image, offset, length)

    def submit(
        self, operation: Operation, gathering: "Gathering", *, to_sidecar: bool = False
    ) -> None:
        """Start *operation*; *gathering* gets its outcome, perhaps before this returns.

        Only one flush of the image may be in flight: of two, either may be told of a page that
        was lost.
        """
        storage = self._sidecar if to_sidecar else self._image
        if self._abandoned or storage is None:
            if self._abandoned:
                operation.error = OSError(errno.ETIMEDOUT, "it still does not answer")
            elif self.fenced:
                operation.error = OSError(errno.EIO, "another mount has it")
            else:
                operation.error = OSError(errno.ENODEV, "it is not there")
            gathering.answered(operation)
            return
        self._in_flight[operation] = _Waiting(gathering, trio.current_time(), to_sidecar)
        storage.submit(operation, self._returned)

    def _returned(self, operation: Operation, value: Value, error: OSError | None) -> None:
        waiting = self._in_flight.pop(operation, None)
        if waiting is None:
            self._abandoned.discard(operation)
        elif operation.kind is not Kind.CLOSE:
            operation.value = value
            operation.error = error
            if operation.kind is not Kind.REREAD:  # of which nothing depends on an answer
                self.dead = error is not None and error.errno in _GONE
            if not waiting.to_sidecar:
                self.counters.count(operation)
                self.settled(operation)
            elif error is None and operation.kind is Kind.SYNC:
                self._failures.pop(Sort.SIDECAR, None)
            if error is not None:
                self._failed(operation, error, to_sidecar=waiting.to_sidecar)
            waiting.gathering.answered(operation)
        if self._image is None:
            self._go_on_closing(operation, error)

    def _failed(self, operation: Operation, error: OSError, *, to_sidecar: bool) -> None:
        """Remember that *operation*, which was counted, failed."""
        if isinstance(error, TruncatedError):
            self.truncated_to = error.size
        if operation.kind is Kind.REREAD:
            return
        sort = Sort.SIDECAR if to_sidecar else _SORTS.get(operation.kind)
        if sort is not None:
            # Not the error itself, which holds on to the stack it was raised in, and to its data.
            text, successes = error.strerror or str(error), self.counters.successes(sort)
            number = error.errno or errno.EIO
            self._failures[sort] = Failure(sort, number, text, trio.current_time(), successes)

    def abandon_overdue(self, now: float) -> None:
        """Answer with ETIMEDOUT what has waited too long at *now* (trio's clock, seconds).

        A request that can do without this replica waits for it once the timeout, one that
        cannot (the others failed, or there are none) twice as long. And once one request has
        found the replica hung, the others that can do without it do not wait on.
        """
        for operation, (gathering, since, _) in list(self._in_flight.items()):
            patience_s = self._timeout_s
            if operation.kind is Kind.SYNC:
                patience_s *= SYNC_PATIENCE
            if not gathering.enough:
                patience_s *= 2
            if now - since >= patience_s or (self._abandoned and gathering.enough):
                reason = f"no answer to a {operation.kind.value} in {patience_s:g} s"
                self._abandon(operation, reason)
        if self._to_close:
            self._close_detached()

    def give_up(self) -> None:
        """Answer all that is in flight with ETIMEDOUT, for who can wait no longer."""
        for operation in list(self._in_flight):
            self._abandon(operation, f"a {operation.kind.value} was given up unanswered")

    def _abandon(self, operation: Operation, reason: str) -> None:
        gathering, _, to_sidecar = self._in_flight.pop(operation)
        self._abandoned.add(operation)
        operation.error = OSError(errno.ETIMEDOUT, reason)
        if not to_sidecar:
            self.counters.count(operation)
            self.settled(operation)
        self._failed(operation, operation.error, to_sidecar=to_sidecar)
        gathering.answered(operation)

    def pardon(self, seconds: float) -> None:
        """Do not count *seconds* during which nobody here could have heard an answer."""
        for operation, waiting in self._in_flight.items():
            self._in_flight[operation] = waiting._replace(since=waiting.since + seconds)

    async def close(self, patience_s: float | None = None) -> None:
        """Give the files back; the caller has seen everything answered or abandoned.

        *patience_s*: how long (seconds) that may take, for closing may have to write what is cached
        of them; after that it goes on unseen. None: the timeout.
        """
        closed = trio.Event()
        self.let_go = closed.set
        self._to_close |= self._put_away
        self._put_away.clear()
        self.detach()
        if self.in_flight and not self.hung:
            with trio.move_on_after(self._timeout_s if patience_s is None else patience_s):
                await closed.wait()


class _Waiting(NamedTuple):
    gathering: "Gathering"
    since: float
    to_sidecar: bool


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


class Gathering:
    """The outcomes of operations on several replicas for one request, awaited together.

    Made for the path of every request: no nursery, no event, one reschedule when the last
    outcome is in, and no scheduler turn at all when every replica answered at once.
    """

    __slots__ = ("_failed", "_impatient", "_needed", "_pending", "_task")

    waited_for: ClassVar[int] = 0
    """How many there are, in the whole process, that somebody waits for."""

    def __init__(self, needed: int) -> None:
        """*needed* successes make the request succeed without the rest."""
        self._needed = needed
        self._pending = 0
        self._failed = self._impatient = False
        self._task: trio.lowlevel.Task | None = None

    @property
    def enough(self) -> bool:
        """Whether those that have succeeded so far suffice."""
        return self._needed <= 0

    def submit(self, replica: Replica, operation: Operation, *, to_sidecar: bool = False) -> None:
        """Start *operation* on *replica*."""
        self._pending += 1
        operation.counts = replica.role is not State.RESYNCING
        replica.submit(operation, self, to_sidecar=to_sidecar)

    def answered(self, operation: Operation) -> None:
        """Take the outcome of *operation*."""
        self._pending -= 1
        if operation.error is not None:
            self._failed = True
        elif operation.counts:
            self._needed -= 1
        if self._task is not None and (not self._pending or (self._impatient and self._failed)):
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def complete_or_failed(self) -> bool:
        """Wait until every operation has an outcome, or one has failed; whether some have none."""
        self._impatient = True
        if not self._failed:
            await self.complete()
        self._impatient = False
        return self._pending > 0

    async def complete(self) -> None:
        """Wait until every operation has an outcome.

        **Cancellation**: what was submitted happens anyway, unseen. Only the end of the whole
        mount cancels requests: a disk must not be used on after one was.
        """
        if self._pending:
            self._task = trio.lowlevel.current_task()
            Gathering.waited_for += 1
            try:
                await trio.lowlevel.wait_task_rescheduled(self._abort)
            finally:
                Gathering.waited_for -= 1

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
