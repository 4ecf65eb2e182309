"""One replica: what is in flight on it, and whether it answers."""

import errno
import logging
from collections.abc import Callable, Iterator
from typing import ClassVar, NamedTuple

import trio

from quorumfs.decisions.model import Standing
from quorumfs.decisions.record import SUFFIX
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.health import Health
from quorumfs.replica.storage import (
    CHANGES,
    DONE,
    Attempt,
    Buffer,
    Bytes,
    Kind,
    Operation,
    Storage,
    Value,
)

log = logging.getLogger(__name__)

SYNC_PATIENCE = 4
"""A flush may take this many times the replica timeout: it waits for everything written before
to reach the medium, where a read or a write waits only for itself."""


class _Waiting(NamedTuple):
    fan_out: "FanOut"
    since: float
    """trio's clock, seconds."""
    to_sidecar: bool


class InFlight:
    """The operations asked of one replica that have not returned."""

    def __init__(self, timeout_s: float) -> None:
        self.waiting: dict[Operation, _Waiting] = {}
        self.abandoned: set[Operation] = set()
        """Those that were given up, and may still happen."""
        self.timeout_s = timeout_s
        """How long each may take (seconds)."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.abandoned)

    def add(self, operation: Operation, fan_out: "FanOut", *, to_sidecar: bool) -> None:
        """Note that *operation* is being asked for now."""
        self.waiting[operation] = _Waiting(fan_out, trio.current_time(), to_sidecar)

    def returned(self, operation: Operation) -> _Waiting | None:
        """Note that *operation* has returned; who waits for it, None if it was given up."""
        waiting = self.waiting.pop(operation, None)
        if waiting is None:
            self.abandoned.discard(operation)
        return waiting

    def abandon(self, operation: Operation) -> _Waiting:
        """Give *operation* up; who waits for it."""
        waiting = self.waiting.pop(operation)
        self.abandoned.add(operation)
        return waiting

    def overdue(self, now: float) -> Iterator[tuple[Operation, str]]:
        """What has waited too long at *now* (trio's clock, seconds), and why that is too long.

        It depends on what was given up already, so each is to be given up before the next one.
        """
        for operation, (fan_out, since, _) in list(self.waiting.items()):
            patience_s = self.timeout_s
            if operation.kind is Kind.SYNC:
                patience_s *= SYNC_PATIENCE
            if not fan_out.enough:
                patience_s *= 2
            if now - since >= patience_s or (self.abandoned and fan_out.enough):
                yield operation, f"no answer to a {operation.kind.value} in {patience_s:g} s"

    def pardon(self, seconds: float) -> None:
        """Do not count *seconds* during which nobody here could have heard an answer."""
        for operation, waiting in self.waiting.items():
            self.waiting[operation] = waiting._replace(since=waiting.since + seconds)


class Closing:
    """The files that a replica uses no more, with their paths, until they are closed.

    To close one may take long, or hang. Each is closed whatever becomes of the others.
    """

    def __init__(self) -> None:
        self.waiting: dict[Storage, str] = {}
        """Those whose closing has not begun."""
        self.under_way: dict[Operation, tuple[Storage, str]] = {}
        self._kept: dict[Storage, str] = {}
        """Those that stay open, and locked, until nothing is to be kept any more."""

    def keep(self, files: dict[Storage, str]) -> None:
        """Leave *files* open until `keep_none`."""
        self._kept |= files

    def keep_none(self) -> None:
        """Have those that were kept closed, too."""
        self.waiting |= self._kept
        self._kept.clear()

    def begin(self) -> Iterator[tuple[Operation, Storage]]:
        """What is to be asked of which file, for all that wait."""
        waiting, self.waiting = self.waiting, {}
        for storage, path in waiting.items():
            operation = Operation(Kind.CLOSE)
            self.under_way[operation] = storage, path
            yield operation, storage

    def ended(self, operation: Operation, error: OSError | None) -> None:
        """Note what a closing came to."""
        storage, path = self.under_way.pop(operation)
        if error is not None and error.errno == errno.EAGAIN:
            self.waiting[storage] = path
        elif error is not None:
            # A flush has told what is durable; and closed it is, with it or without.
            log.warning("closing %s: %s", path, error.strerror)


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
        self.standing = Standing.CURRENT
        """What the set takes it for, whether it answers or not."""
        self.reason: str | None = None
        """Why it is not current."""
        self.health = Health()
        self.counters = self.health.counters
        self.settled: Callable[[Operation], None] = lambda _: None
        """Called with each operation on the image that has its outcome, given up or not."""
        self.fenced = False
        """Nothing is asked of its files any more, for another mount has them."""
        self.let_go: Callable[[], None] = lambda: None
        """Called when the last of its files that were detached is closed."""
        self._image = storage
        self._away = storage is None
        self._sidecar = sidecar
        self._closing = Closing()
        self._in_flight = InFlight(timeout_s)

    @property
    def state(self) -> Standing:
        """What it is at this moment."""
        if self.standing is Standing.FOREIGN:
            return self.standing
        return Standing.MISSING if self._in_flight.abandoned or self._away else self.standing

    @property
    def hung(self) -> bool:
        """Whether something asked of it long ago may still happen."""
        return bool(self._in_flight.abandoned)

    @property
    def in_flight(self) -> int:
        """Operations that have not returned, given up or not, and files that are to be closed."""
        return self.unanswered + len(self._closing.waiting)

    @property
    def unanswered(self) -> int:
        """Operations that have not returned, given up or not."""
        return len(self._in_flight)

    @property
    def waiting(self) -> tuple[Kind, float] | None:
        """What it has not answered for the longest time, and since when (trio's clock, seconds).

        Without what was given up, and what only has to be heard of yet.
        """
        returned = [operation for file in self.files for operation in file.returned]
        waiting = (
            (one.since, operation.kind)
            for operation, one in self._in_flight.waiting.items()
            if operation not in returned
        )
        since, kind = min(waiting, key=lambda one: one[0], default=(0.0, None))
        return None if kind is None else (kind, since)

    @property
    def dead(self) -> bool:
        """Whether its file system was gone, the last time that it was asked."""
        return self.health.dead

    @property
    def changing(self) -> Iterator[Operation]:
        """Changes of the image that have no outcome yet."""
        return (
            operation
            for operation, waiting in self._in_flight.waiting.items()
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
            self._closing.keep(self._with_paths(storage, sidecar))
            return
        self._away = False
        self.health.opened()
        self._image = storage
        self._sidecar = sidecar

    def fence(self) -> None:
        """Ask nothing of its files any more. They are open, and locked, until it is closed."""
        self.fenced = True
        self._closing.keep(self._with_paths(self._image, self._sidecar))
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
        self._closing.waiting |= self._with_paths(self._image, self._sidecar)
        self._image = self._sidecar = None
        self._close_detached()

    def _close_detached(self) -> None:
        """Begin to close what was detached, if all that was asked of it has returned."""
        if self._in_flight:
            return
        for operation, storage in self._closing.begin():
            self._in_flight.add(operation, FanOut(0), to_sidecar=False)
            storage.submit(operation, self._returned)

    def _go_on_closing(self, returned: Operation, error: OSError | None) -> None:
        """Something has *returned* that was asked of files that are detached."""
        if returned.kind is not Kind.CLOSE:
            self._close_detached()
            return
        self._closing.ended(returned, error)  # EAGAIN: begun when deadlines are looked at
        if not self.in_flight:
            self.let_go()

    @property
    def may_inline(self) -> bool:
        """Whether the two following may be called."""
        image = self._image
        return image is not None and not self._in_flight.abandoned and image.may_inline

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
        if attempt is DONE:
            counters = self.counters
            counters.writes += 1
            counters.bytes_written += len(data)
        return attempt

    def copying(self, source: "Replica", offset: int, length: int) -> Operation | None:
        """What has its image take a range of that of *source*, if that can be asked of it."""
        if self._image is None or source.image is None or source.hung:
            return None
        return self._image.copying(source.image, offset, length)

    def submit(self, operation: Operation, fan_out: "FanOut", *, to_sidecar: bool = False) -> None:
        """Start *operation*; *fan_out* gets its outcome, perhaps before this returns.

        Only one flush of the image may be in flight: of two, either may be told of a page that
        was lost.
        """
        storage = self._sidecar if to_sidecar else self._image
        if self.hung or storage is None:
            if self.hung:
                operation.error = OSError(errno.ETIMEDOUT, "it still does not answer")
            elif self.fenced:
                operation.error = OSError(errno.EIO, "another mount has it")
            else:
                operation.error = OSError(errno.ENODEV, "it is not there")
            fan_out.answered(operation)
            return
        self._in_flight.add(operation, fan_out, to_sidecar=to_sidecar)
        storage.submit(operation, self._returned)

    def _returned(self, operation: Operation, value: Value, error: OSError | None) -> None:
        waiting = self._in_flight.returned(operation)
        if waiting is not None and operation.kind is not Kind.CLOSE:
            operation.value = value
            operation.error = error
            if operation.kind is not Kind.REREAD:  # of which nothing depends on an answer
                self.health.answered(error)
            if waiting.to_sidecar and error is None and operation.kind is Kind.SYNC:
                self.health.sidecar_synced()
            self._has_outcome(operation, waiting)
        if self._image is None:
            self._go_on_closing(operation, error)

    def _has_outcome(self, operation: Operation, waiting: _Waiting) -> None:
        """Tell of *operation*, which succeeded, failed, or was given up, and who waits for it."""
        if not waiting.to_sidecar:
            self.counters.count(operation)
            self.settled(operation)
        if operation.error is not None:
            now = trio.current_time()
            self.health.failed(operation, operation.error, now, to_sidecar=waiting.to_sidecar)
        waiting.fan_out.answered(operation)

    def abandon_overdue(self, now: float) -> None:
        """Answer with ETIMEDOUT what has waited too long at *now* (trio's clock, seconds).

        A request that can do without this replica waits for it once the timeout, one that
        cannot (the others failed, or there are none) twice as long. And once one request has
        found the replica hung, the others that can do without it do not wait on.
        """
        for operation, reason in self._in_flight.overdue(now):
            self._abandon(operation, reason)
        if self._closing.waiting:
            self._close_detached()

    def give_up(self) -> None:
        """Answer all that is in flight with ETIMEDOUT, for who can wait no longer."""
        for operation in list(self._in_flight.waiting):
            self._abandon(operation, f"a {operation.kind.value} was given up unanswered")

    def _abandon(self, operation: Operation, reason: str) -> None:
        waiting = self._in_flight.abandon(operation)
        operation.error = OSError(errno.ETIMEDOUT, reason)
        self._has_outcome(operation, waiting)

    def pardon(self, seconds: float) -> None:
        """Do not count *seconds* during which nobody here could have heard an answer."""
        self._in_flight.pardon(seconds)

    async def close(self, patience_s: float | None = None) -> None:
        """Give the files back; the caller has seen everything answered or abandoned.

        *patience_s*: how long (seconds) that may take, for closing may have to write what is cached
        of them; after that it goes on unseen. None: the timeout.
        """
        closed = trio.Event()
        self.let_go = closed.set
        self._closing.keep_none()
        self.detach()
        if self.in_flight and not self.hung:
            with trio.move_on_after(
                self._in_flight.timeout_s if patience_s is None else patience_s
            ):
                await closed.wait()


class FanOut:
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
        operation.counts = replica.standing is not Standing.RESYNCING
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
            FanOut.waited_for += 1
            try:
                await trio.lowlevel.wait_task_rescheduled(self._abort)
            finally:
                FanOut.waited_for -= 1

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
