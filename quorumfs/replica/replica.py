"""One replica: its operations in flight, and whether it answers."""

import errno
from collections.abc import Callable, Iterator
from functools import partial

import trio

from quorumfs.decisions.model import Standing
from quorumfs.decisions.replicaio import Way
from quorumfs.replica.closing import Closing
from quorumfs.replica.fastfile import FastFile, Rest
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.health import Counters, Health
from quorumfs.replica.inflight import NOBODY, InFlight, Waiter, Waiting
from quorumfs.replica.storage import (
    CHANGES,
    FileStatus,
    Kind,
    Operation,
    Storage,
    Value,
)

STUCK_S = 0.02
"""An operation of the fast path that was taken over is stuck if it takes longer (seconds). Others
waited for a processor."""


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
            self._in_flight.add(operation, NOBODY, to_sidecar=False)
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

    def submit(self, operation: Operation, waiter: Waiter, *, to_sidecar: bool = False) -> None:
        """Start *operation*; *waiter* gets its outcome, perhaps before this returns.

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
            waiter.answered(operation)
            return
        self._in_flight.add(operation, waiter, to_sidecar=to_sidecar)
        storage.submit(operation, self._returned)

    # What is done elsewhere

    @property
    def fast_file(self) -> FastFile | None:
        """The image, if a thread of the fast path may use it now."""
        image = self._image
        if image is None or self._in_flight.abandoned or self._in_flight.elsewhere:
            return None
        return image.fast_file if self._rest.over(trio.current_time()) else None

    def adopt(self, operation: Operation, waiter: Waiter) -> None:
        """Take *operation* for one's own, which another thread has begun; then `returned`."""
        if isinstance(self._image, FileStorage):
            self._image.adopted(operation)
        self._in_flight.add(operation, waiter, to_sidecar=False)
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
            self.submit(operation, waiting.waiter)
        if self._image is None:
            self._close_detached()

    def hold(self) -> Callable[[OSError | None], None]:
        """Keep the image open for a read elsewhere that hangs; the result ends that."""
        operation = Operation(Kind.REREAD)
        self.adopt(operation, NOBODY)
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

    def _has_outcome(self, operation: Operation, waiting: Waiting) -> None:
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
        waiting.waiter.answered(operation)

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
