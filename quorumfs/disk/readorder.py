"""Which replicas a read asks first, and when it asks the next one without waiting any longer.

A replica that is marked ``write-mostly`` is read only where the others give no answer. A pattern
that asks one replica at a time reads the first in time: a read that takes longer than this replica
takes for 99 of 100 reads asks the next one, too, and the first good answer wins (a *hedge*; Dean
and Barroso, "The Tail at Scale", 2013). A replica that was beaten by far is passed over for a
while, each time longer, so that a store that crawls costs a guest one wait and not one each read.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import trio

from quorumfs.decisions.latency import Latency
from quorumfs.decisions.patterns import Fastest, Fifo, Quorum, ReadPattern
from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.slowness import Slow
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.health import Sort
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation

HEDGE_MIN_S = 0.001
"""A hedge never comes sooner (seconds): timers are not much finer."""

HEDGE_UNKNOWN_S = 0.1
"""When to hedge (seconds) while little is known of a replica."""

KNOWN = 100
"""Reads after which the 99th percentile says something."""

BUDGET = 0.02
"""Hedges for each read, at most, that came to nothing: the first replica answered first."""

BUDGET_MAX = 10.0

FAR_BEATEN = 10
"""A replica is passed over whose read took this many times as long as a read waits for it alone."""

PASSED_OVER_S = (1.0, 60.0)
"""How long (seconds) it is passed over the first time, and at most."""

FORGOTTEN_S = 300.0
"""A replica that was not read for so long (seconds) is read again, to see how fast it is now."""


class Order(NamedTuple):
    """The holders of a range, as a read asks them."""

    first: list[Replica]
    reserve: list[Replica]
    """Asked if the first give no answer, or differ."""


class _Manner:
    """How one replica answers reads, and for how long it is passed over because it was beaten."""

    def __init__(self) -> None:
        self.patience_s = HEDGE_UNKNOWN_S
        """How long a read waits for the replica alone (seconds)."""
        self.beaten_reads = 0
        """Reads under way that another replica has answered."""
        self._latency = Latency()
        """Of the reads that no other replica answered before."""
        self._median_s = 0.0
        self._noted = 0
        self._noted_at = 0.0
        self._until = 0.0
        self._next_s = PASSED_OVER_S[0]

    def answered(self, seconds: float, now: float) -> None:
        """Note a read that took *seconds*, and that no other replica answered before."""
        if now - self._noted_at >= FORGOTTEN_S:
            self._latency, self._noted = Latency(), 0
        self._latency.note(seconds, now)
        self._noted += 1
        self._noted_at = now
        if self._noted % KNOWN == 0:
            self.patience_s = max(HEDGE_MIN_S, self._latency.percentile(0.99))
        if self._noted % KNOWN == 0 or self._noted in (1, 10):
            self._median_s = self._latency.percentile(0.5)
        self._next_s = PASSED_OVER_S[0]

    def beaten(self, seconds: float, now: float) -> None:
        """Note a read that took *seconds*, while another replica answered before."""
        self.beaten_reads -= 1
        if seconds >= FAR_BEATEN * self.patience_s and now >= self._until:
            self._until = now + self._next_s
            self._next_s = min(2 * self._next_s, PASSED_OVER_S[1])

    def passed_over(self, now: float) -> bool:
        """Whether other replicas are to be asked first."""
        return self.beaten_reads > 0 or now < self._until

    def slowness(self, now: float) -> int:
        """The same within a factor of two; 0 if unknown."""
        forgotten = now - self._noted_at >= FORGOTTEN_S
        return 0 if forgotten else int(self._median_s * 1e6).bit_length()


class _Race(FanOut):
    """One read of a replica, and perhaps of a second one: the first good answer wins."""

    __slots__ = ("_running", "winner")

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.winner: Operation | None = None
        self._running: dict[Operation, tuple[_Manner, float]] = {}

    def enter(self, replica: Replica, manner: _Manner, offset: int, length: int) -> Outcome:
        """Have *replica* read the range, too; returns what will be the outcome."""
        operation = Operation(Kind.READ, offset, length)
        self._running[operation] = manner, trio.current_time()
        self.submit(replica, operation)
        return Outcome(replica, operation)

    def answered(self, operation: Operation) -> None:
        manner, began = self._running.pop(operation)
        now = trio.current_time()
        if self.winner is not None:
            manner.beaten(now - began, now)
        elif operation.error is None:
            self.winner = operation
            manner.answered(now - began, now)
            for other, _ in self._running.values():
                other.beaten_reads += 1
        super().answered(operation)


class ReadOrder:
    """The order of the reads of one mount."""

    def __init__(self) -> None:
        self.write_mostly: frozenset[str] = frozenset()
        """The paths of replicas that are read only where no other one can answer."""
        self.undecided = RangeSet()
        """Bytes where the replicas are known to differ until a person decides."""
        self.hedges = True
        """Whether a read may ask a second replica. Without sidecars nothing tells where replicas
        differ, and a read must not turn back (P7)."""
        self.slow: dict[Sort, dict[Replica, Slow]] = {}
        """By sort of operation, the members that take much longer than others; what a read does
        about it goes by each replica's own reads."""
        self._manners: defaultdict[Replica, _Manner] = defaultdict(_Manner)
        self._budget = BUDGET_MAX

    def of(self, holders: Sequence[Replica], pattern: ReadPattern) -> Order:
        """How to ask *holders* by *pattern*."""
        first = [replica for replica in holders if replica.path not in self.write_mostly]
        reserve = [replica for replica in holders if replica.path in self.write_mostly]
        if self._manners and len(first) > 1 and isinstance(pattern, Fifo):
            now, manners = trio.current_time(), self._manners
            if isinstance(pattern, Fastest):
                first.sort(key=lambda replica: manners[replica].slowness(now))
            first.sort(key=lambda replica: manners[replica].passed_over(now))
        if len(first) < (pattern.threshold if isinstance(pattern, Quorum) else 1):
            return Order(list(holders), [])
        return Order(first, reserve)

    async def race(
        self, replica: Replica, spare: Replica, needed: tuple[int, int], offset: int, length: int
    ) -> list[Outcome]:
        """Read a range of *replica*, and of *spare* if that takes unusually long.

        *needed* as for `FanOut`, without *spare* and with it. Returns the
        outcomes that are in: one is good, or all failed.
        """
        race, manner = _Race(needed[0]), self._manners[replica]
        outcomes = [race.enter(replica, manner, offset, length)]
        self._budget = min(BUDGET_MAX, self._budget + BUDGET)
        in_time = await race.complete_within(manner.patience_s)
        if not in_time and self._budget >= 1:
            race.need(needed[1])
            outcomes.append(race.enter(spare, self._manners[spare], offset, length))
            await race.succeeded_or_complete()
            self._budget -= race.winner is not outcomes[1].operation
        else:
            await race.complete()
        return [one for one in outcomes if one.operation is race.winner or one.error is not None]
