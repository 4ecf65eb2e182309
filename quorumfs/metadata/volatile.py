"""``metadata=none``: byte ranges that replicas lack, kept in memory until unmount.

As with QEMU, every write goes to every replica for ever, and a replica is read wherever it lacks
nothing. A new write to a missed range makes the replica hold the range again.
"""

import errno
from collections.abc import Collection, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

from quorumfs.decisions.model import Standing
from quorumfs.decisions.ranges import RangeSet, least_coverage, segments
from quorumfs.decisions.voting import BLOCK, voted_error
from quorumfs.metadata.ledger.knowledge import Outcome, ReadSegment, Replicas, Writable, succeeded
from quorumfs.metadata.protocol import ReplicaReport, SetReport
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import CHANGES, Kind, Operation
from quorumfs.replica.ticks import Rhythm

MISSED_MAX = 65_536
"""Separate missed ranges kept per replica (a few MiB); beyond the limit, ranges are joined."""

UNSYNCED_MAX = 4_096
"""The same for ranges written since the last flush. Updated by every write, so kept cheap."""

PARTS_MAX = 8
"""A read cut by missed writes into more parts goes whole to replicas that missed no byte of the
read, if there are enough: one request instead of hundreds."""


class Holdings:
    """The bytes that a replica holds."""

    def __init__(self, replica: Replica) -> None:
        self.missed = RangeSet()
        """Bytes of acknowledged writes that the replica lacks."""
        self.unsure = RangeSet()
        """Bytes that the replica took and failed to flush. The kernel reports a writeback error
        once and drops the pages: neither a later flush nor a read tells what the medium holds."""
        self._replica = replica
        self._unsynced = RangeSet()
        """Bytes written since the last flush began."""
        self._syncing = RangeSet()
        """Bytes that the flush in flight is to make durable."""
        self._doubted: set[Operation] = set()
        """Changes in flight when a flush failed: the lost pages may include theirs."""
        replica.settled = self._settled

    def miss(self, start: int, end: int) -> None:
        """Note ``[start, end)`` as lacking the latest write."""
        self.missed.add(start, end)
        self.missed.limit(MISSED_MAX)
        self._replica.standing = Standing.STALE

    def hold(self, start: int, end: int) -> None:
        """Note ``[start, end)`` as holding the latest write."""
        if self.missed:
            self.missed.remove(start, end)
            if not self.missed:
                self._replica.standing = Standing.CURRENT

    def wrote(self, start: int, end: int) -> None:
        """Note ``[start, end)`` as written and unsynced.

        The new write replaces bytes lost before; a later loss counts anew.
        """
        if self.unsure:
            self.unsure.remove(start, end)
        self._unsynced.add(start, end)
        self._unsynced.limit(UNSYNCED_MAX)

    def doubts(self, start: int, end: int) -> bool:
        """Whether the replica may have lost writes to ``[start, end)``."""
        return bool(self.unsure) and self.unsure.overlaps(start, end)

    def miss_what_is_unsure(self) -> None:
        """Count all `unsure` bytes as missed: other replicas made the bytes durable."""
        for start, end in self.unsure:
            self.miss(start, end)
        self.unsure = RangeSet()

    def unsynced(self, start: int, end: int) -> bool:
        """Whether any byte of ``[start, end)`` was written and is not yet synced."""
        return self._unsynced.overlaps(start, end) or self._syncing.overlaps(start, end)

    def not_durable(self) -> RangeSet:
        """The bytes that even a successful flush of the replica does not make durable."""
        return self.missed.union(self.unsure)

    def begin_flush(self) -> None:
        """Begin a flush, which is to make all writes until now durable."""
        self._syncing = self._syncing.union(self._unsynced)  # the replica may never get a flush
        self._unsynced = RangeSet()

    def _settled(self, operation: Operation) -> None:
        """Note the outcome of *operation*."""
        if operation.kind in CHANGES:
            doubted = operation in self._doubted
            self._doubted.discard(operation)
            if operation.error is None:
                self._took(operation.offset, operation.offset + operation.length, sure=not doubted)
        elif operation.kind is Kind.SYNC:
            if operation.error is not None:
                # The lost page may have been written after the flush began, even by a change that
                # has no outcome yet.
                lost = self._syncing.union(self._unsynced)
                self.unsure = self.unsure.union(lost)
                self.unsure.limit(MISSED_MAX)
                self._doubted.update(self._replica.changing)
            self._syncing = RangeSet()

    def _took(self, start: int, end: int, *, sure: bool) -> None:
        # Noted before all replicas have answered: a later failed flush must find the range here.
        if sure:
            self.wrote(start, end)
            self.hold(start, end)
        else:
            self.unsure.add(start, end)
            self.unsure.limit(MISSED_MAX)


class Volatile:
    """`quorumfs.metadata.protocol.Metadata` in memory."""

    def __init__(self, replicas: Sequence[Replica], size: int, threshold: int) -> None:
        self.replicas = tuple(replicas)
        self.receivers = self.flush_receivers = self.readers = self.replicas
        self.holdings = {replica: Holdings(replica) for replica in replicas}
        self._size = size
        self.threshold = threshold
        self._lacking_before: dict[Replica, RangeSet] = {}

    @property
    def ledger(self) -> "Volatile":
        return self

    @property
    def uniform_members(self) -> Sequence[Replica]:
        if any(holdings.missed or holdings.unsure for holdings in self.holdings.values()):
            return ()
        return self.readers

    def writable(self) -> Writable | None:
        if not self.uniform_members:
            return None
        return Writable(self.receivers, BLOCK, (), 0, 0, ())

    def wrote(self, chunks: Collection[int]) -> None:
        for chunk in chunks:
            start, end = chunk * BLOCK, min((chunk + 1) * BLOCK, self._size)
            for holdings in self.holdings.values():
                holdings.wrote(start, end)

    def prepared(self, offset: int, length: int, *, repair: bool = False) -> bool:
        return True

    async def prepare(
        self, offset: int, length: int, *, ahead: bool = False, repair: bool = False
    ) -> None:
        """Nothing to prepare: no metadata outlives the process."""

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        return self.receivers

    def giving(
        self, replicas: Sequence[Replica], offset: int, length: int
    ) -> AbstractContextManager[None]:
        return nullcontext()  # `Holdings` notes each change as it ends

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        if succeeded(outcomes) < self.threshold:
            raise voted_error(outcome.error for outcome in failed)
        # Before the guest hears of success: reads of this range must avoid the failed replicas.
        for outcome in failed:
            self.holdings[outcome.replica].miss(offset, offset + length)
        self._miss_where_doubted(outcomes, offset, offset + length)

    def _miss_where_doubted(self, outcomes: Sequence[Outcome], start: int, end: int) -> None:
        """Count a range as missed on replicas that may have lost it, if enough others took it."""
        took = [self.holdings[o.replica] for o in outcomes if o.error is None]
        doubted = [holdings for holdings in took if holdings.doubts(start, end)]
        if doubted and len(took) - len(doubted) >= self.threshold:
            for holdings in doubted:
                holdings.miss(start, end)

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        # *changing* is not needed: `Holdings` notes a change of a replica when the change ends, and
        # finds the changes in flight by the replica when a flush fails.
        # A write or repair may reach a replica after its own flush and before the end of the
        # slowest flush: the replica then holds such bytes, but not durably.
        for replica, holdings in self.holdings.items():
            self._lacking_before[replica] = holdings.not_durable()
            holdings.begin_flush()

    async def record_losses(self) -> None:
        """Nothing to record: no metadata outlives the process."""

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        """Count a replica's success only for bytes that the replica held and never lost."""
        lacking = [
            self.holdings[replica].not_durable().union(self._lacking_before[replica])
            for replica, operation in outcomes
            if operation.error is None
        ]
        complete = sum(not ranges for ranges in lacking)
        if complete < self.threshold and least_coverage(self._size, lacking) < self.threshold:
            raise voted_error(outcome.error for outcome in outcomes if outcome.error is not None)
        for holdings in self.holdings.values():
            if holdings.unsure:
                holdings.miss_what_is_unsure()

    def tell_loss(self) -> bool:
        return False  # lost bytes stay `unsure` or missed, and every flush sees them

    def read_segments(self, offset: int, length: int) -> Iterable[ReadSegment]:
        missed = [self.holdings[replica].missed for replica in self.receivers]
        if not any(missed):
            return [ReadSegment(offset, length, list(self.receivers))]
        parts = [
            ReadSegment(
                start,
                end - start,
                [r for i, r in enumerate(self.receivers) if i not in lacking],
                lacking=tuple(self.receivers[index] for index in lacking),
            )
            for start, end, lacking in segments(offset, offset + length, missed)
        ]
        if len(parts) > PARTS_MAX:
            complete = [r for r in self.receivers if all(r in part.holders for part in parts)]
            if len(complete) >= self.threshold:
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

    def note_shown(self, by: Replicas, others: Replicas, offset: int, length: int) -> None:
        """Nothing tells where replicas may differ."""

    async def truncated(self, replica: Replica) -> None:
        self.holdings[replica].miss(0, self._size)  # holes and data look alike now

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        if not well:
            self.holdings[replica].miss(offset, offset + length)

    @property
    def unreadable(self) -> RangeSet:
        """Always empty."""
        return RangeSet()

    async def written_over(self, offset: int, length: int) -> None:
        """Nothing to do: `unreadable` is always empty."""

    async def record_options(self) -> None:
        """Nothing to record."""

    async def change_threshold(self, threshold: int) -> None:
        complete = sum(not holdings.not_durable() for holdings in self.holdings.values())
        if threshold > self.threshold and complete < threshold:
            # Else a vote could not be reached where others missed writes.
            raise OSError(errno.EBUSY, "too few replicas have all data")
        self.threshold = threshold

    async def close(self) -> None:
        """Nothing to close."""

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

    # Without sidecars there are no claims.

    @property
    def losses(self) -> int:
        return 0  # nothing is ever noted as unreadable, for which alone this is asked

    @property
    def fenced(self) -> None:
        return None

    def require_ours(self) -> None:
        pass

    async def watch(self, rhythm: Rhythm) -> None:
        pass

    async def release(self) -> None:
        pass
