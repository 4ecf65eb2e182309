"""One request to several replicas: their outcomes, awaited together."""

from collections.abc import Iterable

import trio

from quorumfs.replica.inflight import SYNC_PATIENCE
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

_LEAVING_BEHIND = frozenset({Kind.WRITE, Kind.DISCARD, Kind.ZERO, Kind.SYNC})
"""Kinds of operations for which a replica can be left behind."""


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
        operation.counts = not replica.standing.is_written_only
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
        operation.counts = not replica.standing.is_written_only
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
