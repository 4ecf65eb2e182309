"""One replica: its operations in flight, and whether it answers."""

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import trio

from quorumfs.decisions.model import Standing
from quorumfs.decisions.replicaio import Way
from quorumfs.replica.fastfile import FastFile, Rest
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.health import Counters, Health
from quorumfs.replica.storage import (
    CHANGES,
    FileStatus,
    Kind,
    Operation,
    Storage,
    Value,
)

log = logging.getLogger(__name__)

SYNC_PATIENCE = 4
"""A sync may take this many times the replica timeout, because a sync waits for everything written
before to reach the medium."""


STUCK_S = 0.02
"""An operation of the fast path that was taken over is stuck if it takes longer (seconds). Others
waited for a processor."""


class _Waiting(NamedTuple):
    fan_out: "FanOut"
    since: float
    """trio's clock, seconds."""
    to_sidecar: bool


_LEAVING_BEHIND = frozenset({Kind.WRITE, Kind.DISCARD, Kind.ZERO, Kind.SYNC})
"""Kinds of operations for which a replica can be left behind."""


class InFlight:
    """The operations on one replica that have not returned."""

    def __init__(self, timeout_s: float) -> None:
        self.waiting: dict[Operation, _Waiting] = {}
        self.abandoned: set[Operation] = set()
        """Operations that were given up, and may still happen."""
        self.elsewhere: set[Operation] = set()
        """Operations of threads that are not the replica's, given up or not."""
        self.timeout_s = timeout_s
        """How long an operation may take (seconds)."""
        self.behind_max_s: float | None = None
        """How much longer (seconds) a change may take than on others that suffice; None: until the
        timeout."""

    def __len__(self) -> int:
        return len(self.waiting) + len(self.abandoned)

    def add(self, operation: Operation, fan_out: "FanOut", *, to_sidecar: bool) -> None:
        """Note that *operation* begins now."""
        self.waiting[operation] = _Waiting(fan_out, trio.current_time(), to_sidecar)

    def returned(self, operation: Operation) -> _Waiting | None:
        """Note that *operation* has returned; the fan-out that waits, None if given up before."""
        self.elsewhere.discard(operation)
        waiting = self.waiting.pop(operation, None)
        if waiting is None:
            self.abandoned.discard(operation)
        return waiting

    def abandon(self, operation: Operation) -> _Waiting:
        """Give *operation* up; the fan-out that waits."""
        waiting = self.waiting.pop(operation)
        self.abandoned.add(operation)
        return waiting

    def waited(self, operation: Operation, now: float) -> float:
        """How long (seconds) *operation* has been waited for at *now*, or was until given up."""
        waiting = self.waiting.get(operation)
        return self.timeout_s if waiting is None else now - waiting.since

    def overdue(self, now: float) -> Iterator[tuple[Operation, str]]:
        """The operations that have waited too long at *now* (trio's clock, seconds), with reasons.

        Give each up before taking the next: after the first, the rest have less time.
        """
        for operation, (fan_out, since, _) in list(self.waiting.items()):
            patience_s = self.timeout_s
            if operation.kind is Kind.SYNC:
                patience_s *= SYNC_PATIENCE
            if not fan_out.enough:
                patience_s *= 2
            if now - since >= patience_s or (self.abandoned and fan_out.enough):
                yield operation, f"no answer to a {operation.kind.value} in {patience_s:g} s"

    def pardon(self, seconds: float, now: float) -> None:
        """Do not count *seconds* before *now* in which this process could not hear an answer."""
        for operation, waiting in self.waiting.items():
            # One that began after that has been waited for since then, and not since later.
            since = min(waiting.since + seconds, now)
            self.waiting[operation] = waiting._replace(since=since)


class Closing:
    """The files that a replica uses no more, with their paths, until they are closed.

    A close may take long, or hang, and does not hold up the close of another file.
    """

    def __init__(self) -> None:
        self.waiting: dict[Storage, str] = {}
        """Files whose close has not begun."""
        self.under_way: dict[Operation, tuple[Storage, str]] = {}
        self._kept: dict[Storage, str] = {}
        """Files that stay open, and locked, until `keep_none`."""

    def keep(self, files: dict[Storage, str]) -> None:
        """Leave *files* open until `keep_none`."""
        self._kept |= files

    def keep_none(self) -> None:
        """Have the kept files closed, too."""
        self.waiting |= self._kept
        self._kept.clear()

    def begin(self) -> Iterator[tuple[Operation, Storage]]:
        """Begin the close of each waiting file; yields operations to submit, and their files."""
        waiting, self.waiting = self.waiting, {}
        for storage, path in waiting.items():
            operation = Operation(Kind.CLOSE)
            self.under_way[operation] = storage, path
            yield operation, storage

    def ended(self, operation: Operation, error: OSError | None) -> str:
        """Note the outcome of a close; after EAGAIN the file waits again. Returns its path."""
        storage, path = self.under_way.pop(operation)
        if error is not None and error.errno == errno.EAGAIN:
            self.waiting[storage] = path
        elif error is not None:
            # A sync has told what is durable, and the file is closed despite the error.
            log.warning("closing %s: %s", path, error.strerror)
        return path


class Replica:
    """Requests to one replica's storage, each of which ends within a deadline.

    An operation that takes too long is answered with ETIMEDOUT and *abandoned*, but may still
    happen, minutes later. Until all abandoned operations have returned, the replica is `MISSING`
    and gets no operation. So a late write never overwrites a newer one (R7), and one sick replica
    costs one timeout, once (P5).
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
        """*index* is the replica's place on the command line, *timeout_s* its replica timeout.

        *storage* is the image, None if missing; *slot* the replica's place in the record.
        """
        self.index = index
        self.path = path
        self.slot = slot
        self.standing = Standing.CURRENT
        """What the set takes the replica for, whether or not it answers: what is done with it."""
        self.reason: str | None = None
        """Why the replica is not current."""
        self.health = Health()
        self.settled: Callable[[Operation], None] = lambda _: None
        """Called with each operation on the image once it has an outcome, or is given up."""
        self.fenced = False
        """Another mount has the files, so they get no operations any more."""
        self.let_go: Callable[[], None] = lambda: None
        """Called when the last detached file is closed."""
        self._image = storage
        self._away = storage is None
        self._sidecar = sidecar
        self._closing = Closing()
        self._in_flight = InFlight(timeout_s)
        self._rest = Rest()

    @property
    def state(self) -> Standing:
        """What is to be expected of the replica now, and what an operator is told: the standing, or
        `MISSING` while a replica that is ours does not answer, or is away."""
        if not self.standing.is_ours:
            return self.standing
        return Standing.MISSING if self._in_flight.abandoned or self._away else self.standing

    @property
    def timeout_s(self) -> float:
        """How long an operation may take (seconds)."""
        return self._in_flight.timeout_s

    @timeout_s.setter
    def timeout_s(self, timeout_s: float) -> None:
        self._in_flight.timeout_s = timeout_s

    @property
    def behind_max_s(self) -> float | None:
        """How much longer (seconds) than on others that suffice a write may take, and a flush
        `SYNC_PATIENCE` times as long; None: until the timeout."""
        return self._in_flight.behind_max_s

    @behind_max_s.setter
    def behind_max_s(self, behind_max_s: float | None) -> None:
        self._in_flight.behind_max_s = behind_max_s

    @property
    def hung(self) -> bool:
        """Whether an operation that was given up may still happen."""
        return bool(self._in_flight.abandoned)

    @property
    def in_flight(self) -> int:
        """How many operations have not returned, given up or not, and files are to be closed."""
        return self.unanswered + len(self._closing.waiting)

    @property
    def unanswered(self) -> int:
        """How many operations have not returned, given up or not."""
        return len(self._in_flight)

    @property
    def waiting(self) -> tuple[Kind, float] | None:
        """The longest unanswered operation: its kind, and since when (trio's clock, seconds).

        Operations that were given up, or that threads have already done, are left out.
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
    def counters(self) -> Counters:
        """Of the image, since the mount."""
        return self.health.counters

    @property
    def dead(self) -> bool:
        """Whether the file system was gone at its last answer."""
        return self.health.dead

    @property
    def changing(self) -> Iterator[Operation]:
        """The changes of the image that have no outcome yet."""
        return (
            operation
            for operation, waiting in self._in_flight.waiting.items()
            if operation.kind in CHANGES and not waiting.to_sidecar
        )

    @property
    def attached(self) -> bool:
        """Whether the image is open."""
        return self._image is not None

    @property
    def files(self) -> list[FileStorage]:
        """The open files on real file systems."""
        storages = (self._image, self._sidecar)
        return [storage for storage in storages if isinstance(storage, FileStorage)]

    @property
    def image(self) -> Storage | None:
        """The image, if open."""
        return self._image

    @property
    def way(self) -> Way | None:
        """How the image is read and written; None if it is no open file."""
        return self._image.way if isinstance(self._image, FileStorage) else None

    def attach(self, storage: Storage, sidecar: Storage) -> None:
        """Use these files from now on; no other file may be in use, or not closed yet."""
        assert self._image is None
        assert not self.in_flight
        if self.fenced:  # fenced while the files were being opened
            self._closing.keep(self._with_paths(storage, sidecar))
            return
        self._away = False
        self.health.opened()
        self._image = storage
        self._sidecar = sidecar

    def fence(self) -> None:
        """Use the files no more; they stay open, and locked, until `close`."""
        self.fenced = True
        self._closing.keep(self._with_paths(self._image, self._sidecar))
        self._image = self._sidecar = None

    def _with_paths(self, image: Storage | None, sidecar: Storage | None) -> dict[Storage, str]:
        """The files that are not None, with what the log calls them."""
        both = ((image, self.path), (sidecar, f"the sidecar of {self.path}"))
        return {storage: path for storage, path in both if storage is not None}

    def detach(self, *, there: bool = False) -> None:
        """Use the files no more, if there are any, and close them once nothing is in flight.

        A close may take long, or hang, and counts as in flight until it returns. Neither file waits
        for the close of the other. *there*: the replica is not missing, for it could be opened.
        """
        self._away = not there
        self._closing.waiting |= self._with_paths(self._image, self._sidecar)
        self._image = self._sidecar = None
        self._close_detached()

    def _close_detached(self) -> None:
        """Begin to close the detached files, if all their operations have returned."""
        if self._in_flight:
            return
        for operation, storage in self._closing.begin():
            self._in_flight.add(operation, FanOut(0), to_sidecar=False)
            storage.submit(operation, self._returned)

    def _go_on_closing(self, returned: Operation, value: Value, error: OSError | None) -> None:
        """Go on after an operation on detached files has *returned*."""
        if returned.kind is not Kind.CLOSE:
            self._close_detached()
            return
        path = self._closing.ended(returned, error)  # `abandon_overdue` tries again after EAGAIN
        if path == self.path and isinstance(value, FileStatus):
            self.health.left_ns = value.identity.ctime_ns
        if not self.in_flight:
            self.let_go()

    def resized(self, size: int) -> None:
        """Note that the disk has *size* bytes from now on."""
        if self._image is not None:
            self._image.resized(size)

    def copying(self, source: "Replica", offset: int, length: int) -> Operation | None:
        """An operation that copies a range from the image of *source*, if that is possible."""
        if self._image is None or source.image is None or source.hung:
            return None
        return self._image.copying(source.image, offset, length)

    def submit(self, operation: Operation, fan_out: "FanOut", *, to_sidecar: bool = False) -> None:
        """Start *operation*; *fan_out* gets its outcome, perhaps before this returns.

        Only one sync of the image may be in flight: of two, either may get the error of a lost
        page.
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

    # What is done elsewhere

    @property
    def fast_file(self) -> FastFile | None:
        """The image, if a thread of the fast path may use it now."""
        image = self._image
        if image is None or self._in_flight.abandoned or self._in_flight.elsewhere:
            return None
        return image.fast_file if self._rest.over(trio.current_time()) else None

    def adopt(self, operation: Operation, fan_out: "FanOut") -> None:
        """Take *operation* for one's own, which another thread has begun; then `returned`."""
        self._in_flight.add(operation, fan_out, to_sidecar=False)
        self._in_flight.elsewhere.add(operation)

    def returned(self, operation: Operation, error: OSError | None) -> None:
        """Take the outcome of an operation that was adopted.

        If it was stuck, the image is left to the replica's own threads for a while.
        """
        now = trio.current_time()
        if self._in_flight.waited(operation, now) > STUCK_S:
            self._rest.begin(now)
        self._returned(operation, 0, error)

    def resubmit(self, operation: Operation) -> None:
        """Begin an operation anew that was adopted, and did nothing."""
        waiting = self._in_flight.returned(operation)
        if waiting is not None:
            self.submit(operation, waiting.fan_out)
        if self._image is None:
            self._close_detached()

    def hold(self) -> Callable[[OSError | None], None]:
        """Keep the image open for a read elsewhere that hangs; the result ends that."""
        operation = Operation(Kind.REREAD)
        self.adopt(operation, FanOut(0))
        return partial(self.returned, operation)

    def _returned(self, operation: Operation, value: Value, error: OSError | None) -> None:
        waiting = self._in_flight.returned(operation)
        if waiting is not None and operation.kind is not Kind.CLOSE:
            operation.value = value
            operation.error = error
            if operation.kind is not Kind.REREAD:  # which nothing depends on
                self.health.answered(error)
            if waiting.to_sidecar and error is None and operation.kind is Kind.SYNC:
                self.health.sidecar_synced()
            self._has_outcome(operation, waiting)
        if self._image is None:
            self._go_on_closing(operation, value, error)

    def _has_outcome(self, operation: Operation, waiting: _Waiting) -> None:
        """Report *operation*, which succeeded, failed, or was given up, to *waiting*."""
        now = trio.current_time()
        if not waiting.to_sidecar:
            self.counters.count(operation)
            self.health.took(operation, now - waiting.since, now)
            if self._image is None or self._image.fast_file is None:
                self.health.last_writes.note(operation)
            self.settled(operation)
        if operation.error is not None:
            self.health.failed(operation, operation.error, now, to_sidecar=waiting.to_sidecar)
        waiting.fan_out.answered(operation)

    def abandon_overdue(self, now: float) -> None:
        """Answer with ETIMEDOUT operations that waited too long at *now* (trio's clock, seconds).

        A request that can do without this replica waits for the timeout, and twice as long if the
        other replicas failed, or there are none. Once one request has found the replica hung, no
        other request that can do without the replica waits on.
        """
        for operation, reason in self._in_flight.overdue(now):
            self._abandon(operation, reason)
        if self._closing.waiting:
            self._close_detached()

    def owes(self, operation: Operation) -> bool:
        """Whether *operation* has no outcome yet."""
        return operation in self._in_flight.waiting

    def leave_behind(self, operation: Operation, patience_s: float) -> None:
        """Answer *operation*, if it has no outcome, with ETIMEDOUT: others did it *patience_s*
        seconds ago."""
        if self.owes(operation):
            self._abandon(
                operation, f"a {operation.kind.value} took {patience_s:g} s longer than elsewhere"
            )

    def give_up(self) -> None:
        """Answer every operation in flight with ETIMEDOUT."""
        for operation in list(self._in_flight.waiting):
            self._abandon(operation, f"a {operation.kind.value} was given up unanswered")

    def _abandon(self, operation: Operation, reason: str) -> None:
        waiting = self._in_flight.abandon(operation)
        operation.error = OSError(errno.ETIMEDOUT, reason)
        self._has_outcome(operation, waiting)

    def pardon(self, seconds: float, now: float) -> None:
        """Do not count *seconds* before *now* in which this process could not hear an answer."""
        self._in_flight.pardon(seconds, now)

    async def close(self, patience_s: float | None = None) -> None:
        """Close the files; the caller has seen every operation answered or abandoned.

        *patience_s*: how long (seconds) to wait, because a close may have to write cached data;
        after that the close goes on unseen. None: the replica timeout.
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

    Made for the path of every request: no nursery, no event, one reschedule when the last outcome
    is in, and no scheduler turn when every replica answered at once.
    """

    __slots__ = (
        "_eager",
        "_failed",
        "_impatient",
        "_may_lag",
        "_needed",
        "_needed_of_all",
        "_pending",
        "_satisfied",
        "_succeeded",
        "_task",
    )

    def __init__(self, needed: int) -> None:
        """*needed*: how many successes make the request succeed without the rest."""
        self._needed = self._needed_of_all = needed
        self._pending = 0
        self._failed = self._impatient = False
        self._succeeded = self._eager = self._satisfied = False
        self._may_lag: list[tuple[Replica, Operation]] | None = None
        """Operations whose replicas may be left behind; None, as for most: there are none."""
        self._task: trio.lowlevel.Task | None = None

    @property
    def enough(self) -> bool:
        """Whether the successes so far suffice."""
        return self._needed <= 0

    def need(self, needed: int) -> None:
        """Have *needed* successes suffice from now on; none has come yet."""
        self._needed = needed

    def submit(self, replica: Replica, operation: Operation, *, to_sidecar: bool = False) -> None:
        """Start *operation* on *replica*."""
        self._pending += 1
        operation.counts = not replica.standing.is_target
        if replica.behind_max_s is not None and operation.kind in _LEAVING_BEHIND:
            self._note_behind(replica, operation)
        replica.submit(operation, self, to_sidecar=to_sidecar)

    def _note_behind(self, replica: Replica, operation: Operation) -> None:
        """Note that *replica* may be left behind, if others can do for it.

        A target is waited for: else one that is busy being resynced would never become current.
        """
        if self._needed_of_all > 0 and operation.counts:
            self._may_lag = self._may_lag or []
            self._may_lag.append((replica, operation))

    def answered(self, operation: Operation) -> None:
        """Take the outcome of *operation*."""
        self._pending -= 1
        if operation.error is not None:
            self._failed = True
        else:
            self._succeeded = True
            self._needed -= operation.counts
        if self._task is not None and (
            not self._pending
            or (self._impatient and self._failed)
            or (self._eager and self._succeeded)
            or (self._satisfied and self.enough)
        ):
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    def adopt(self, replica: Replica, operation: Operation) -> None:
        """Wait for *operation* too, which another thread has begun on *replica*."""
        self._pending += 1
        operation.counts = not replica.standing.is_target
        if replica.behind_max_s is not None:
            self._note_behind(replica, operation)
        replica.adopt(operation, self)

    async def complete_or_failed(self) -> bool:
        """Wait until all operations have outcomes, or one has failed; whether some have none."""
        self._impatient = True
        if not self._failed:
            await self.complete()
        self._impatient = False
        return self._pending > 0

    async def complete_within(self, seconds: float) -> bool:
        """Wait *seconds* at most; whether all operations have outcomes."""
        if self._pending:
            with trio.move_on_after(seconds):
                await self.complete()
        return not self._pending

    async def succeeded_or_complete(self) -> None:
        """Wait until one operation has succeeded, or all have outcomes.

        The others happen all the same; their outcomes are for their replicas alone.
        """
        self._eager = True
        if not self._succeeded:
            await self.complete()
        self._eager = False

    async def complete(self) -> None:
        """Wait until every operation has an outcome.

        Once the successes suffice, replicas that take longer than `Replica.behind_max_s` are left
        behind: their operations are given up.

        **Cancellation**: submitted operations happen anyway, unseen. Only the end of the whole
        mount cancels requests: a disk must not be used after a request was cancelled.
        """
        if self._pending and self._may_lag is not None:
            await self._leave_behind(self._may_lag)
        elif self._pending:
            await self._wait()

    async def _leave_behind(self, may_lag: list[tuple[Replica, Operation]]) -> None:
        self._satisfied = True
        if not self.enough:
            await self._wait()
        self._satisfied = False
        replica, operation = may_lag[0]
        patience_s = replica.behind_max_s
        if patience_s is not None and operation.kind is Kind.SYNC:
            patience_s *= SYNC_PATIENCE
        while patience_s is not None and self._waits:
            due = trio.current_time() + patience_s
            with trio.move_on_at(due):
                await self._wait()
            if trio.current_time() - due > patience_s:
                continue  # this process was starved, and could not hear of outcomes
            with trio.CancelScope(shield=True):  # outcomes may have come with the end of patience
                await trio.lowlevel.checkpoint()
            well = [
                one
                for one, done in may_lag
                if one.standing.is_member and not one.owes(done) and done.error is None
            ]
            # One that succeeded may have been ejected meanwhile: it stands in for nobody.
            if len(well) >= self._needed_of_all:
                for lagging, late in may_lag:
                    lagging.leave_behind(late, patience_s)
            break
        if self._waits:
            await self._wait()

    @property
    def _waits(self) -> bool:
        """Whether there is still an outcome to wait for."""
        return self._pending > 0 and not (self._impatient and self._failed)

    async def _wait(self) -> None:
        """Wait until all operations have outcomes, or what else is waited for has come."""
        self._task = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


async def carry_out(
    asked: Iterable[tuple[Replica, Operation]], needed: int = 0, *, to_sidecar: bool = False
) -> None:
    """Have each operation done on its replica, and wait for all: each has its outcome then.

    *needed* as for `FanOut`.
    """
    fan_out = FanOut(needed)
    for replica, operation in asked:
        fan_out.submit(replica, operation, to_sidecar=to_sidecar)
    await fan_out.complete()
