"""``metadata=none``: what replicas lack is kept in memory, as byte ranges, until unmount.

As with QEMU every replica is written to for ever and read from wherever it holds everything; a
new write gives it back what it missed there.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from quorumfs.decisions.model import Standing
from quorumfs.decisions.ranges import RangeSet, least_coverage, segments
from quorumfs.decisions.voting import voted_error
from quorumfs.metadata.ledger.known import Outcome, ReadSegment, succeeded
from quorumfs.metadata.protocol import ReplicaReport, SetReport
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import CHANGES, Kind, Operation

MISSED_MAX = 65_536
"""Separate missed ranges remembered per replica (a few MiB); beyond that they become one."""

UNSYNCED_MAX = 4_096
"""The same for what was written since the last flush: kept for every write, so it must be cheap."""

PARTS_MAX = 8
"""A read of more parts than this, cut where replicas missed writes, goes to replicas that missed
nothing in it, if they are enough: one request instead of hundreds."""


class Holdings:
    """What one replica holds."""

    def __init__(self, replica: Replica) -> None:
        self.missed = RangeSet()
        """Bytes for which a write was acknowledged that this replica does not hold."""
        self.unsure = RangeSet()
        """Bytes that it took and then could not flush. The kernel reports a writeback error once
        and drops the pages, so that neither a later flush nor a read tells what is there."""
        self._replica = replica
        self._unsynced = RangeSet()
        """Bytes written since the last flush began."""
        self._syncing = RangeSet()
        """What the flush in flight is to make durable."""
        self._doubted: set[Operation] = set()
        """Changes that were in flight when a flush failed: their pages may be among the lost."""
        replica.settled = self._settled

    def miss(self, start: int, end: int) -> None:
        """Remember that the replica lacks what was written to ``[start, end)``."""
        self.missed.add(start, end)
        self.missed.limit(MISSED_MAX)
        self._replica.standing = Standing.STALE

    def hold(self, start: int, end: int) -> None:
        """Remember that the replica has what was written to ``[start, end)``."""
        if self.missed:
            self.missed.remove(start, end)
            if not self.missed:
                self._replica.standing = Standing.CURRENT

    def wrote(self, start: int, end: int) -> None:
        """Remember that ``[start, end)`` was written and not synced since.

        What was lost there before is to be synced again; what is lost from now on, anew.
        """
        if self.unsure:
            self.unsure.remove(start, end)
        self._unsynced.add(start, end)
        self._unsynced.limit(UNSYNCED_MAX)

    def doubts(self, start: int, end: int) -> bool:
        """Whether what it took of ``[start, end)`` may have been lost since."""
        return bool(self.unsure) and self.unsure.overlaps(start, end)

    def miss_what_is_unsure(self) -> None:
        """Others have made it durable: do not read it here any more."""
        for start, end in self.unsure:
            self.miss(start, end)
        self.unsure = RangeSet()

    def unsynced(self, start: int, end: int) -> bool:
        """Whether any of ``[start, end)`` was written and not yet synced."""
        return self._unsynced.overlaps(start, end) or self._syncing.overlaps(start, end)

    def not_durable(self) -> RangeSet:
        """The bytes that a flush of this replica that succeeds does not make durable."""
        return self.missed.union(self.unsure)

    def begin_flush(self) -> None:
        """What was written until now is what the flush is to make durable."""
        self._syncing = self._syncing.union(self._unsynced)  # it may not get one at all
        self._unsynced = RangeSet()

    def _settled(self, operation: Operation) -> None:
        """Keep the record of what is durable, now that *operation* has its outcome."""
        if operation.kind in CHANGES:
            doubted = operation in self._doubted
            self._doubted.discard(operation)
            if operation.error is None:
                self._took(operation.offset, operation.offset + operation.length, sure=not doubted)
        elif operation.kind is Kind.SYNC:
            if operation.error is not None:
                # The page that was lost may have been written after the flush began, and by a
                # change that has not told us yet that it is done.
                lost = self._syncing.union(self._unsynced)
                self.unsure = self.unsure.union(lost)
                self.unsure.limit(MISSED_MAX)
                self._doubted.update(self._replica.changing)
            self._syncing = RangeSet()

    def _took(self, start: int, end: int, *, sure: bool) -> None:
        # Not only when all have answered: what it loses after this, it holds no more.
        if sure:
            self.wrote(start, end)
            self.hold(start, end)
        else:
            self.unsure.add(start, end)
            self.unsure.limit(MISSED_MAX)


class Volatile:
    """`quorumfs.metadata.protocol.Metadata` in memory."""

    def __init__(self, replicas: Sequence[Replica], size: int, threshold: int) -> None:
        self.receivers = self.flush_receivers = self.readers = tuple(replicas)
        self.holdings = {replica: Holdings(replica) for replica in replicas}
        self._size = size
        self._threshold = threshold
        self._lacking_before: dict[Replica, RangeSet] = {}

    @property
    def ledger(self) -> "Volatile":
        return self

    @property
    def uniform_members(self) -> Sequence[Replica]:
        if any(holdings.missed or holdings.unsure for holdings in self.holdings.values()):
            return ()
        return self.readers

    def begin_now(self, offset: int, length: int) -> Sequence[Replica]:
        if not self.uniform_members:
            return ()
        for holdings in self.holdings.values():
            holdings.wrote(offset, offset + length)
        return self.receivers

    def prepared(self, offset: int, length: int, *, repair: bool = False) -> bool:
        return True

    async def prepare(
        self, offset: int, length: int, *, ahead: bool = False, repair: bool = False
    ) -> None:
        """Nothing outlives the process, so there is nothing to prepare."""

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        return self.receivers

    def giving(
        self, replicas: Sequence[Replica], offset: int, length: int
    ) -> AbstractContextManager[None]:
        return nullcontext()  # each replica tells when it has taken something

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if succeeded(outcomes) < self._threshold:
            raise voted_error(outcome.error for outcome in failed)
        # On record before the guest hears of success: whom a read must not ask for this range.
        for outcome in failed:
            self.holdings[outcome.replica].miss(offset, offset + length)
        self._miss_where_doubted(outcomes, offset, offset + length)

    def _miss_where_doubted(self, outcomes: Sequence[Outcome], start: int, end: int) -> None:
        """Do not read it where a failed flush may have lost it meanwhile, if others will do."""
        took = [self.holdings[o.replica] for o in outcomes if o.error is None]
        doubted = [holdings for holdings in took if holdings.doubts(start, end)]
        if doubted and len(took) - len(doubted) >= self._threshold:
            for holdings in doubted:
                holdings.miss(start, end)

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        # A change is noted for each replica when it tells that it has taken it, and until then a
        # flush that fails there knows it by the replica: *changing* tells nothing new.
        # A write or repair may come to a replica after its own flush and before the slowest
        # one's: such bytes do not count for it, though it holds them by then.
        for replica, holdings in self.holdings.items():
            self._lacking_before[replica] = holdings.not_durable()
            holdings.begin_flush()

    async def record_losses(self) -> None:
        """Nothing outlives the process."""

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        """A replica's success counts only for the bytes that it holds and did not lose before."""
        lacking = [
            self.holdings[replica].not_durable().union(self._lacking_before[replica])
            for replica, operation in outcomes
            if operation.error is None
        ]
        complete = sum(not ranges for ranges in lacking)
        if complete < self._threshold and least_coverage(self._size, lacking) < self._threshold:
            raise voted_error(outcome.error for outcome in outcomes if outcome.error is not None)
        for holdings in self.holdings.values():
            if holdings.unsure:
                holdings.miss_what_is_unsure()

    def tell_loss(self) -> bool:
        return False  # what was lost stays on record, and every flush sees it

    def read_segments(self, offset: int, length: int) -> Iterable[ReadSegment]:
        missed = [self.holdings[replica].missed for replica in self.receivers]
        if not any(missed):
            return [ReadSegment(offset, length, list(self.receivers))]
        parts = [
            ReadSegment(
                start,
                end - start,
                [self.receivers[index] for index in holders],
                lacking=tuple(r for i, r in enumerate(self.receivers) if i not in holders),
            )
            for start, end, holders in segments(offset, offset + length, missed)
        ]
        if len(parts) > PARTS_MAX:
            complete = [r for r in self.receivers if all(r in part.holders for part in parts)]
            if len(complete) >= self._threshold:
                lacking = tuple(r for r in self.receivers if r not in complete)
                return [ReadSegment(offset, length, complete, lacking=lacking)]
        return parts

    def missed(self, replica: Replica) -> RangeSet:
        return self.holdings[replica].missed

    def lossy(self, offset: int, length: int) -> bool:
        return False

    def may_differ(self, offset: int, length: int) -> bool:
        return False

    def unflushable(self) -> bool:
        return False

    def unsynced(self, offset: int, length: int) -> bool:
        return any(h.unsynced(offset, offset + length) for h in self.holdings.values())

    def unverified(self, offset: int, length: int) -> bool:
        return False

    def pin_source(self, replica: Replica, offset: int, length: int) -> None:
        """Nothing is ever pinned here."""

    async def truncated(self, replica: Replica) -> None:
        self.holdings[replica].miss(0, self._size)  # nothing can be told from a hole any more

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        if not well:
            self.holdings[replica].miss(offset, offset + length)

    @property
    def unreadable(self) -> RangeSet:
        """None is remembered."""
        return RangeSet()

    async def written_over(self, offset: int, length: int) -> None:
        """None is remembered."""

    async def record_options(self) -> None:
        """Nothing is on record."""

    async def close(self) -> None:
        """All is forgotten."""

    def report(self, replica: Replica) -> ReplicaReport:
        holdings = self.holdings[replica]
        lacking = sum(end - start for start, end in holdings.missed)
        return ReplicaReport(
            None,
            lacking,
            "it missed writes" if lacking else None,
            undurable=bool(holdings.unsure),
            lost=bool(lacking),
        )

    def report_set(self) -> SetReport:
        return SetReport("none")

    # Without sidecars nothing tells whose the set is.

    @property
    def fenced(self) -> None:
        return None

    def require_ours(self) -> None:
        pass

    async def watch(self) -> None:
        pass

    async def release(self) -> None:
        pass
