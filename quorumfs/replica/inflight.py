"""The operations on one replica that have not returned, and who waits for each."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import trio

from quorumfs.replica.storage import Kind, Operation

SYNC_PATIENCE = 4
"""A sync may take this many times the replica timeout, because a sync waits for everything written
before to reach the medium."""


class Waiter(Protocol):
    """What waits for the outcome of an operation."""

    @property
    def enough(self) -> bool:
        """Whether it can do without the outcome."""

    def answered(self, operation: Operation) -> None:
        """Take the outcome of *operation*."""


class _Nobody:
    """The waiter for operations whose outcome nothing depends on."""

    enough = True

    def answered(self, operation: Operation) -> None:
        """Take note of nothing."""


NOBODY = _Nobody()


class Waiting(NamedTuple):
    """That an operation has no outcome yet."""

    waiter: Waiter
    since: float
    """trio's clock, seconds."""
    to_sidecar: bool


class InFlight:
    """The operations on one replica that have not returned."""

    def __init__(self, timeout_s: float) -> None:
        self.waiting: dict[Operation, Waiting] = {}
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

    def add(self, operation: Operation, waiter: Waiter, *, to_sidecar: bool) -> None:
        """Note that *operation* begins now."""
        self.waiting[operation] = Waiting(waiter, trio.current_time(), to_sidecar)

    def returned(self, operation: Operation) -> Waiting | None:
        """Note that *operation* has returned. Returns who waits for it; None if given up before."""
        self.elsewhere.discard(operation)
        waiting = self.waiting.pop(operation, None)
        if waiting is None:
            self.abandoned.discard(operation)
        return waiting

    def abandon(self, operation: Operation) -> Waiting:
        """Give *operation* up. Returns who waits for it."""
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
        for operation, (waiter, since, _) in list(self.waiting.items()):
            patience_s = self.timeout_s
            if operation.kind is Kind.SYNC:
                patience_s *= SYNC_PATIENCE
            if not waiter.enough:
                patience_s *= 2
            if now - since >= patience_s or (self.abandoned and waiter.enough):
                yield operation, f"no answer to a {operation.kind.value} in {patience_s:g} s"

    def pardon(self, seconds: float, now: float) -> None:
        """Do not count *seconds* before *now* in which this process could not hear an answer."""
        for operation, waiting in self.waiting.items():
            # One that began after that has been waited for since then, and not since later.
            since = min(waiting.since + seconds, now)
            self.waiting[operation] = waiting._replace(since=since)
