"""The replicas of one disk, asked together, for a guest's requests and for repairs.

Every change or comparison of data takes the range lock here and goes to the replicas here.
"""

from collections.abc import Iterable, Sequence

from quorumfs.decisions.patterns import ReadPattern
from quorumfs.decisions.voting import Outvoted
from quorumfs.disk.earlyvote import LateAnswers
from quorumfs.disk.events import EventLog
from quorumfs.disk.flushing import GroupFlush
from quorumfs.disk.rangelock import RangeLock
from quorumfs.disk.readorder import ReadOrder
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.metadata.protocol import Metadata
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation, TruncatedError
from quorumfs.replica.ticks import Rhythm


class Mirror:
    """*size* bytes kept on every replica that *metadata* knows.

    Offsets and lengths are bytes.
    """

    def __init__(
        self,
        size: int,
        metadata: Metadata,
        *,
        pattern: ReadPattern,
        search_s: float,
        events: EventLog,
    ) -> None:
        """*search_s*: how long (seconds) one read may look for readable parts of its range; the
        replica timeout."""
        self.size = size
        """Bytes that requests may touch. The disk may grow."""
        self.announced_size = size
        """Bytes that the kernel is told of; more than `size` for a moment when the disk grows."""
        self.metadata = metadata
        self.ledger = metadata.ledger
        """The knowledge about the replicas, asked without waiting."""
        self.pattern = pattern
        """How a guest's reads are answered."""
        self.read_order = ReadOrder()
        self.late_answers = LateAnswers(self.report)
        self.search_s = search_s
        self.events = events
        self.locks = RangeLock()
        self.rhythm = Rhythm()
        """How often those who watch the disk look again."""
        self.requests = 0
        """Requests of the guest so far; repairs see by them whether the guest is at work."""
        self.zeroings = 0
        """Zeros and discards of the guest so far, each of which may have made holes of data."""
        self._flush = GroupFlush[bool]()
        self._announced = {replica: replica.state for replica in self.replicas}

    @property
    def replicas(self) -> Sequence[Replica]:
        """In the order of the read pattern. Whoever holds a range lock finds each at its index."""
        return self.ledger.replicas

    @property
    def threshold(self) -> int:
        """How many replicas must take a change, or sync, for a change or a flush to succeed."""
        return self.ledger.threshold

    async def ask(
        self,
        replicas: Iterable[Replica],
        kind: Kind,
        needed: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
    ) -> list[Outcome]:
        """Put one operation to all *replicas* at once and wait for every outcome.

        A replica that has not answered is given up after the replica timeout if *needed* others
        have succeeded, else after twice that.
        """
        fan_out = FanOut(needed)
        outcomes = []
        for replica in replicas:
            operation = Operation(kind, offset, length, data)
            outcomes.append(Outcome(replica, operation))
            fan_out.submit(replica, operation)
        await self.complete(fan_out, outcomes)
        return outcomes

    async def complete(self, fan_out: FanOut, outcomes: Iterable[Outcome]) -> None:
        """Wait for all *outcomes* of *fan_out*."""
        await fan_out.complete()
        await self.note_truncated(outcomes)

    async def note_truncated(self, outcomes: Iterable[Outcome]) -> None:
        """Have the metadata know of images that turned out to be truncated."""
        for replica, operation in outcomes:
            if isinstance(operation.error, TruncatedError):
                await self.metadata.truncated(replica)

    async def sync(self) -> bool:
        """Make all writes durable on at least the threshold of replicas; else raise `OSError`.

        A sync counts only for data that its replica holds and no earlier sync lost (R4). Chunks
        are not made equal first: returns whether none had to be when the syncs began. If any had
        to be, another flush may have failed while this one waited for it, and success promises
        nothing to a guest. A repair syncs before it copies, so that replicas report losses not
        known yet.
        """
        return await self._flush.run(self._sync_replicas)

    async def _sync_replicas(self) -> bool:
        proves_durable = not self.ledger.unflushable()
        self.ledger.begin_flush(self.locks.changing())
        fan_out = FanOut(self.threshold)
        outcomes = [
            Outcome(replica, Operation(Kind.SYNC)) for replica in self.ledger.flush_receivers
        ]
        for replica, operation in outcomes:
            fan_out.submit(replica, operation)
        if await fan_out.complete_or_failed():
            # Should the daemon die before the slowest replica answers, no later mount would know.
            await self.metadata.record_losses()
            await fan_out.complete()
        self.report(outcome for outcome in outcomes if outcome.error is not None)
        await self.metadata.finish_flush(outcomes)
        self.announce_states()
        return proves_durable

    @property
    def flushing(self) -> bool:
        """Whether the replicas are being synced."""
        return self._flush.running

    # Events for the log

    def announce_states(self) -> None:
        """Tell the log of every replica whose state changed since the last time."""
        for replica in self.replicas:
            announced = self._announced.setdefault(replica, replica.state)
            if replica.state is not announced:
                self._announced[replica] = replica.state
                self.events.state_changed(replica.path, announced, replica.state)

    def report(self, failed: Iterable[Outcome]) -> None:
        """Tell the log of operations that failed."""
        for replica, operation in failed:
            self.events.bad(
                operation.kind, replica.path, operation.offset, operation.length, operation.error
            )

    def report_outvoted(self, losses: Iterable[Outvoted], offset: int) -> None:
        """Count and tell the losers of a vote on a range at *offset*."""
        for loss in losses:
            replica = self.replicas[loss.voter]
            replica.counters.mismatches += 1
            self.events.bad(Kind.READ, replica.path, offset + loss.start, loss.end - loss.start)
