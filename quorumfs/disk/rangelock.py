"""Locks on byte ranges of the disk: overlapping writes take turns, reads share.

Without locks two replicas may apply overlapping writes in different order and differ for ever, a
vote may compare a replica before a write with another after the write, and a repair may write back
data that a guest has just replaced.

Every claim, granted or waiting, stands in one list in order of arrival. A new claim counts the
earlier conflicting claims and is granted when the count reaches zero. So the order is fair (a
stream of readers cannot starve a writer), granting needs no search for the next claim, and a claim
without conflict costs no scheduler turn.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class RangeClaim:
    """One holder of, or waiter for, ``[start, end)``."""

    __slots__ = ("blockers", "changes", "end", "exclusive", "start", "task")

    def __init__(self, start: int, end: int, exclusive: bool) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.blockers = 0
        self.changes: tuple[tuple[int, int], ...] = ()
        """Ranges of the claim that are being written to, or were since the grant."""
        self.task: trio.lowlevel.Task | None = None

    def conflicts(self, other: "RangeClaim") -> bool:
        return (
            self.start < other.end
            and other.start < self.end
            and (self.exclusive or other.exclusive)
        )


class RangeLock:
    """Fair shared and exclusive locks on half-open byte ranges."""

    __slots__ = ("claims",)

    def __init__(self) -> None:
        self.claims: list[RangeClaim] = []
        """All claims, granted or waiting, in order of arrival."""

    async def acquire(self, start: int, end: int, *, exclusive: bool) -> RangeClaim:
        """Wait until no earlier claim conflicts; the caller must release the claim returned.

        **Cancellation**: a waiting claim leaves the queue. A claim without conflict is granted
        at once, without a checkpoint.
        """
        assert start < end
        claim = RangeClaim(start, end, exclusive)
        claim.blockers = sum(1 for earlier in self.claims if earlier.conflicts(claim))
        self.claims.append(claim)
        if claim.blockers:
            claim.task = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                self.release(claim)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        return claim

    def adopt(self, start: int, end: int) -> RangeClaim:
        """Claim a range exclusively that is being changed already, while no claim conflicts.

        The caller must release the claim returned.
        """
        claim = RangeClaim(start, end, True)
        assert not any(earlier.conflicts(claim) for earlier in self.claims)
        self.claims.append(claim)
        return claim

    def release(self, claim: RangeClaim) -> None:
        """Give the range of *claim* back, or leave the queue."""
        position = self.claims.index(claim)
        del self.claims[position]
        for later in self.claims[position:]:
            if claim.conflicts(later):
                later.blockers -= 1
                if not later.blockers and later.task is not None:
                    trio.lowlevel.reschedule(later.task)

    def claimed(self) -> list[tuple[int, int]]:
        """All ranges, ``(start, end)``, that are claimed exclusively, granted or waiting."""
        return [(claim.start, claim.end) for claim in self.claims if claim.exclusive]

    def changing(self) -> list[tuple[int, int]]:
        """All ranges, ``(start, end)``, that are being written to, not merely claimed."""
        return [change for claim in self.claims for change in claim.changes]

    @asynccontextmanager
    async def held(self, start: int, end: int, *, exclusive: bool) -> AsyncIterator[None]:
        """The lock as a context, for callers that are not on the path of every request."""
        claim = await self.acquire(start, end, exclusive=exclusive)
        try:
            yield
        finally:
            self.release(claim)
