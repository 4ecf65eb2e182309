"""A vote that is answered as soon as it is decided: later answers are compared behind it.

A vote is decided when so many replicas hold the same that the others, whatever they answer, can
neither outvote them nor tie. What is read is then what it would be if all were waited for. The
others have some milliseconds more, so that replicas that are as fast are compared before the guest
is answered; but a replica that needed longer the last time is not waited for at all, so that a
store that is far costs a guest nothing.

An answer that comes later is compared with the decision, without a lock: a write may have come in
between. So a difference is a suspicion alone (a failure is certain, and told at once). The range is
read once more, of all replicas and under a lock, and only what differs there is told, and repaired.

A store that is far would get ever more reads, and writes would wait behind them. So a replica that
still owes a late answer is left out of votes that others can decide: it is compared in samples. (A
scrub compares all there is.)
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import trio

from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.voting import unassailable
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

GRACE_S = 0.01
"""How long (seconds) a decided vote waits for the rest."""

SUSPECTED_MAX = 1024
"""Suspected ranges that are remembered."""


class LateAnswers:
    """The answers that come when a vote is over."""

    def __init__(self, report: Callable[[Iterable[Outcome]], None]) -> None:
        """*report* tells the log of operations that failed."""
        self._report = report
        self._suspected = RangeSet()
        """Bytes at which a late answer differed, or failed."""
        self._failed: list[Outcome] = []
        """Late answers that failed, and that nobody has looked at."""
        self._came = trio.Event()
        self._under_way: Counter[Replica] = Counter()
        """Late reads, by replica."""
        self._lagging: set[Replica] = set()
        """Replicas whose last late answer was not just late."""

    def asked(self, replicas: Sequence[Replica], voters: int, threshold: int) -> list[Replica]:
        """Those of *replicas* to ask first, out of *voters* in all: without those that still owe a
        late answer, if the others can decide the vote."""
        if not self._under_way:
            return list(replicas)
        in_time = [one for one in replicas if one not in self._under_way]
        return in_time if unassailable(len(in_time), voters, threshold) else list(replicas)

    def lagging(self, replicas: Iterable[Replica]) -> bool:
        """Whether one of *replicas* is not to be waited for."""
        return not self._lagging.isdisjoint(replicas)

    def begin(self, replica: Replica) -> None:
        """Note that a vote is over before *replica* has answered."""
        self._under_way[replica] += 1
        self._lagging.add(replica)

    def came(self, late: Outcome, decision: bytes, seconds: float) -> None:
        """Compare a late answer with the *decision* of the vote, which was over *seconds* ago."""
        replica, operation = late
        self._under_way[replica] -= 1
        if not self._under_way[replica]:
            del self._under_way[replica]
        if seconds < GRACE_S:
            self._lagging.discard(replica)
        if operation.error is not None:
            self._report([late])
            self._failed.append(late)
        elif operation.value == decision:
            return
        if len(self._suspected) < SUSPECTED_MAX:  # so many are told as it is
            self._suspected.add(operation.offset, operation.offset + operation.length)
        self._came.set()

    def failed(self) -> list[Outcome]:
        """The late answers that failed, once."""
        failed, self._failed = self._failed, []
        return failed

    def suspected(self, longest: int) -> tuple[int, int] | None:
        """A suspected range, once: its offset and length, *longest* at most (bytes)."""
        for start, end in self._suspected:
            stop = min(end, start + longest)
            self._suspected.remove(start, stop)
            return start, stop - start
        return None

    async def wait(self) -> None:
        """Wait until any has failed, or is suspicious."""
        if not self._failed and not self._suspected:
            self._came = trio.Event()
            await self._came.wait()


class EarlyVote(FanOut):
    """One read of several replicas, until their vote is decided."""

    __slots__ = (
        "_all",
        "_asked",
        "_decision",
        "_late",
        "_over_at",
        "_patient",
        "_threshold",
        "_voters",
    )

    def __init__(self, needed: int, threshold: int, voters: int, late: LateAnswers) -> None:
        """*needed*: as for `FanOut`. *voters*: how many replicas there are to ask, now or later."""
        super().__init__(needed)
        self._threshold = threshold
        self._voters = voters
        self._late = late
        self._all: list[Outcome] = []
        self._asked: dict[Operation, Replica] = {}
        """What has no outcome yet."""
        self._patient = False
        """All are waited for, though it is decided."""
        self._decision: bytes | None = None
        """What is read, once the vote is over without some of them."""
        self._over_at = 0.0

    @property
    def outcomes(self) -> list[Outcome]:
        """Those that there are, in the order in which the replicas were asked."""
        return [outcome for outcome in self._all if outcome.operation not in self._asked]

    def ask(self, replica: Replica, offset: int, length: int) -> None:
        """Have *replica* read a range (bytes)."""
        operation = Operation(Kind.READ, offset, length)
        self._asked[operation] = replica
        self._all.append(Outcome(replica, operation))
        self.submit(replica, operation)

    def answered(self, operation: Operation) -> None:
        replica = self._asked.pop(operation)
        if self._decision is not None:
            seconds = trio.current_time() - self._over_at
            self._late.came(Outcome(replica, operation), self._decision, seconds)
        super().answered(operation)
        if self._task is not None and not self._patient and self._winner() is not None:
            task, self._task = self._task, None
            trio.lowlevel.reschedule(task)

    async def decided(self) -> bool:
        """Wait until the vote is over; whether it is decided, else all have answered."""
        if self._pending and self._winner() is None:
            await self.complete()
        winner = self._winner()
        if winner is None:
            return False
        if self._pending and not self._late.lagging(self._asked.values()):
            self._patient = True
            await self.complete_within(GRACE_S)
        for replica in self._asked.values():
            self._late.begin(replica)
        self._decision, self._over_at = winner, trio.current_time()
        return True

    def _winner(self) -> bytes | None:
        """What wins, whatever the others answer."""
        outcomes = self.outcomes
        good = [outcome.data for outcome in outcomes if outcome.error is None]
        voters = self._voters - (len(outcomes) - len(good))
        for data in good[: len(good) // 2 + 1]:
            if unassailable(good.count(data), voters, self._threshold):
                return data
        return None
