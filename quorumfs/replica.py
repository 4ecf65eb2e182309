"""One replica: what is in flight on it, whether it answers, and where it is behind."""

import errno
from enum import Enum
from typing import NamedTuple

import trio

from quorumfs.ranges import RangeSet
from quorumfs.storage import CHANGES, Kind, Operation, Storage, Value

SYNC_PATIENCE = 4
"""A flush may take this many times the replica timeout: it waits for everything written before
to reach the medium, where a read or a write waits only for itself."""

MISSED_MAX = 65_536
"""Separate missed ranges remembered per replica (a few MiB); beyond that they become one."""

UNSYNCED_MAX = 4_096
"""The same for what was written since the last flush: kept for every write, so it must be cheap."""


class State(Enum):
    """What a replica is to the set at this moment."""

    CURRENT = "current"
    """Holds every acknowledged write."""
    STALE = "stale"
    """Known to be behind; not used where it is."""
    MISSING = "missing"
    """Does not answer; not used at all until everything asked of it before has returned."""


class Replica:
    """Requests to one replica's storage, each of which ends within a deadline.

    An operation that takes too long is answered with ETIMEDOUT and *abandoned*: it may still
    happen, minutes later. Until all abandoned ones have returned the replica is `MISSING` and is
    asked nothing more, so a late write can never overwrite a newer one, and one sick replica
    costs one timeout, once.
    """

    def __init__(self, index: int, path: str, storage: Storage, timeout_s: float) -> None:
        """*index* is the replica's place on the command line, *timeout_s* its patience."""
        self.index = index
        self.path = path
        self.missed = RangeSet()
        """Bytes for which a write was acknowledged that this replica does not hold."""
        self.unsure = RangeSet()
        """Bytes that it took and then could not flush. The kernel reports a writeback error once
        and drops the pages, so that neither a later flush nor a read tells what is there."""
        self._unsynced = RangeSet()
        """Bytes written since the last flush began."""
        self._syncing = RangeSet()
        """What the flush in flight is to make durable."""
        self._storage = storage
        self._timeout_s = timeout_s
        self._in_flight: dict[Operation, _Waiting] = {}
        self._abandoned: set[Operation] = set()

    @property
    def state(self) -> State:
        if self._abandoned:
            return State.MISSING
        return State.STALE if self.missed else State.CURRENT

    def miss(self, start: int, end: int) -> None:
        """Remember that the replica lacks what was written to ``[start, end)``."""
        self.missed.add(start, end)
        self.missed.limit(MISSED_MAX)

    def hold(self, start: int, end: int) -> None:
        """Remember that the replica has what was written to ``[start, end)``."""
        if self.missed:
            self.missed.remove(start, end)
        if self.unsure:
            self.unsure.remove(start, end)

    def miss_what_is_unsure(self) -> None:
        """Others have made it durable: do not read it here any more."""
        self.missed = self.missed.union(self.unsure)
        self.missed.limit(MISSED_MAX)
        self.unsure = RangeSet()

    def not_durable(self) -> RangeSet:
        """The bytes that a flush of this replica that succeeds does not make durable."""
        return self.missed.union(self.unsure)

    def submit(self, operation: Operation, gathering: "Gathering") -> None:
        """Start *operation*; *gathering* gets its outcome, perhaps before this returns.

        Only one flush may be in flight: of two, either may be told of a page that was lost.
        """
        if self._abandoned:
            operation.error = OSError(errno.ETIMEDOUT, "it still does not answer")
            gathering.answered(operation)
            return
        self._in_flight[operation] = _Waiting(gathering, trio.current_time())
        if operation.kind is Kind.SYNC:
            self._syncing = self._unsynced
            self._unsynced = RangeSet()
        self._storage.submit(operation, self._returned)

    def _returned(self, operation: Operation, value: Value, error: OSError | None) -> None:
        waiting = self._in_flight.pop(operation, None)
        if waiting is None:
            self._abandoned.discard(operation)
            return
        operation.value = value
        operation.error = error
        self._settle(operation)
        waiting.gathering.answered(operation)

    def _settle(self, operation: Operation) -> None:
        """Keep the record of what is durable, now that *operation* has its outcome."""
        if operation.kind in CHANGES and operation.error is None:
            self._unsynced.add(operation.offset, operation.offset + operation.length)
            self._unsynced.limit(UNSYNCED_MAX)
        elif operation.kind is Kind.SYNC:
            if operation.error is not None:
                # The page that was lost may have been written after the flush began.
                lost = self._syncing.union(self._unsynced)
                self.unsure = self.unsure.union(lost)
                self.unsure.limit(MISSED_MAX)
            self._syncing = RangeSet()

    def abandon_overdue(self, now: float) -> None:
        """Answer with ETIMEDOUT what has waited too long at *now* (trio's clock, seconds).

        A request that can do without this replica waits for it once the timeout, one that
        cannot (the others failed, or there are none) twice as long. And once one request has
        found the replica hung, the others that can do without it do not wait on.
        """
        for operation, (gathering, since) in list(self._in_flight.items()):
            patience_s = self._timeout_s
            if operation.kind is Kind.SYNC:
                patience_s *= SYNC_PATIENCE
            if not gathering.enough:
                patience_s *= 2
            if now - since >= patience_s or (self._abandoned and gathering.enough):
                del self._in_flight[operation]
                self._abandoned.add(operation)
                operation.error = OSError(
                    errno.ETIMEDOUT, f"no answer to a {operation.kind.value} in {patience_s:g} s"
                )
                self._settle(operation)
                gathering.answered(operation)

    def pardon(self, seconds: float) -> None:
        """Do not count *seconds* during which nobody here could have heard an answer."""
        for operation, (gathering, since) in self._in_flight.items():
            self._in_flight[operation] = _Waiting(gathering, since + seconds)

    def close(self) -> None:
        """Give the file back; the caller has seen everything answered or abandoned."""
        self._storage.close()


class _Waiting(NamedTuple):
    gathering: "Gathering"
    since: float


class Gathering:
    """The outcomes of operations on several replicas for one request, awaited together.

    Made for the path of every request: no nursery, no event, one reschedule when the last
    outcome is in, and no scheduler turn at all when every replica answered at once.
    """

    __slots__ = ("_needed", "_pending", "_task")

    def __init__(self, needed: int) -> None:
        """*needed* successes make the request succeed without the rest."""
        self._needed = needed
        self._pending = 0
        self._task: trio.lowlevel.Task | None = None

    @property
    def enough(self) -> bool:
        """Whether those that have succeeded so far suffice."""
        return self._needed <= 0

    def submit(self, replica: Replica, operation: Operation) -> None:
        """Start *operation* on *replica*."""
        self._pending += 1
        replica.submit(operation, self)

    def answered(self, operation: Operation) -> None:
        """Take the outcome of *operation*."""
        self._pending -= 1
        if operation.error is None:
            self._needed -= 1
        if not self._pending and self._task is not None:
            trio.lowlevel.reschedule(self._task)

    async def complete(self) -> None:
        """Wait until every operation has an outcome.

        **Cancellation**: what was submitted happens anyway, unseen. Only the end of the whole
        mount cancels requests: a disk must not be used on after one was.
        """
        if self._pending:
            self._task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED
