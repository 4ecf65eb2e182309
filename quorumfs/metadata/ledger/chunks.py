"""The chunks of a disk: events that change several states at once. Pure.

Each chunk has a state on each member (`quorumfs.metadata.ledger.content`), a state on each replica
that is not current (`quorumfs.metadata.ledger.target`), and a state of all members together
(`quorumfs.metadata.ledger.agreement`).
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED
from quorumfs.decisions.ranges import RangeSet
from quorumfs.metadata.ledger.agreement import Agreement, Event
from quorumfs.metadata.ledger.commit import Records
from quorumfs.metadata.ledger.content import Content, bit
from quorumfs.metadata.ledger.epochs import Epochs
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.metadata.ledger.sources import Sources
from quorumfs.metadata.ledger.target import Targets
from quorumfs.replica.replica import Replica


class _Flush(NamedTuple):
    """The latest flush."""

    epoch: int
    """The epoch that the flush covers."""
    lossy: set[Replica]
    """The members with LACKING chunks when the flush began."""


class Belief(NamedTuple):
    """The basis of a choice of sources."""

    losses: int
    """`Content.losses` at the time."""
    members: frozenset[Replica]
    """The members at the time."""


class Chunks:
    """The chunks of one disk."""

    def __init__(
        self,
        recorded: Recorded,
        records: Records,
        *,
        repairing: bool,
        notify: Callable[[], None],
    ) -> None:
        """*records* and *repairing*: as for `Sources`. *notify* is called when a repair may be
        due."""
        self.map = recorded.map
        self.recorded = recorded
        self.epochs = Epochs()
        """When each chunk was changed, and how far each receiver of writes has synced."""
        self.content = Content(recorded)
        self.agreement = Agreement(recorded)
        self.sources = Sources(self.map, self.content, self.agreement, records, repairing=repairing)
        self.targets = Targets(recorded, self.epochs)
        self.outside = 0
        """``out_of_sync`` bits of all slots without a member."""
        self._notify = notify
        self._diverged_in = self.epochs.now
        """The epoch of the last divergence."""
        self._flush = _Flush(0, set())
        self._untold_loss = False
        """All members lost an acknowledged write, and no flush of a guest has failed since (R13):
        the error may have gone to a sync for a repair."""

    # Agreement of the members

    def diverge(self, chunks: range) -> None:
        """Note a possible difference between members in *chunks*."""
        self.targets.lacks(chunks)
        self.agreement.tell(Event.FAILED, chunks)
        self._diverged_in = self.epochs.now
        self._notify()

    def equalized(self, chunks: range) -> None:
        """Note equal data of *chunks* on all members, after a repair."""
        self.agreement.tell(Event.EQUALIZED, chunks)
        self.content.took(self.content.members, chunks)
        if not self.agreement.divergent:
            self.sources.unpin()

    def equalized_in_part(self, refused: Collection[Replica], chunks: range) -> None:
        """Note a repair of *chunks* from a member to all members but *refused*."""
        self.content.took([one for one in self.content.members if one not in refused], chunks)

    def compared(self, chunks: range) -> None:
        """Note a comparison: *chunks* are equal on all members."""
        self.agreement.tell(Event.COMPARED, chunks)
        self.agreement.torn.remove(*self.map.bounds_of(chunks))
        self.targets.lacks(chunks)
        self.lacked_outside(chunks)  # these replicas were not compared
        for start, stop in self.content.lost(chunks):
            self.diverge(range(start, stop))  # a loss may have made them equal

    def unflushable(self) -> bool:
        """Whether chunks must be made equal before a flush can tell what is durable."""
        agreement, content = self.agreement, self.content
        return bool(agreement.inherited or agreement.cut_off or content.lossy or content.risking)

    def to_equalize_first(self) -> list[range]:
        """The chunks to make equal before a flush can tell what is durable."""
        first = self.agreement.inherited.union(self.content.lost(range(len(self.map))))
        return [range(start, end) for start, end in first]

    # Durability

    def unsynced(self, chunks: range) -> bool:
        """Whether any member has a change of *chunks* still to sync."""
        return any(self.epochs.waits(replica, chunks) for replica in self.content.members)

    def losable(self, replica: Replica) -> Iterator[range]:
        """The chunks that a failed sync of *replica* may have lost, even from before a crash."""
        yield from self.epochs.unsynced(replica)
        yield from (range(start, end) for start, end in self.undurable(replica))

    def undurable(self, replica: Replica) -> RangeSet:
        """The chunks INHERITED, or RISKED on *replica*: even a good sync proves nothing there."""
        inherited, risked = self.agreement.inherited, self.content.risked(replica)
        return inherited.union(risked) if risked else inherited

    def durable_on(self, replica: Replica, chunks: range) -> bool:
        """Whether *replica* is a member, and the data of *chunks* shown there is durable."""
        doubtful = self.undurable(replica), self.content.unbelieved(replica, chunks)
        covered = replica in self.content.members and not self.epochs.waits(replica, chunks)
        return covered and not any(place.overlaps(chunks.start, chunks.stop) for place in doubtful)

    @property
    def writeback_errors_surfaced(self) -> bool:
        """Whether all members have synced since the last divergence.

        Until then a member may show a page already lost, and must not be a source.
        """
        covered = map(self.epochs.covered, self.content.members)
        return all(epoch >= self._diverged_in for epoch in covered)

    def believe(self) -> Belief:
        """The basis of a choice of sources made now; see `still_believed`."""
        return Belief(self.content.losses, frozenset(self.content.members))

    def still_believed(self, belief: Belief) -> bool:
        """Whether a choice of sources made at *belief*, before an await, still holds: there was no
        loss and no new member since.
        """
        same = belief.losses == self.content.losses
        return same and belief.members.issuperset(self.content.members)

    # Failed syncs

    def begin_flush(self, flushed: Iterable[Replica], changing: Iterable[range]) -> None:
        """Note the start of a flush of *flushed* amid changes of *changing*."""
        epoch = self.epochs.begin_sync(flushed, changing)
        self._flush = _Flush(epoch, self.content.lacking)

    def lossy_in_flush(self) -> set[Replica]:
        """The members with LACKING chunks when the latest flush began, or now: their syncs may have
        begun before a repair rewrote the lost chunks.
        """
        return self._flush.lossy | self.content.lacking

    def end_flush(self) -> None:
        """Note the end of the latest flush, with its outcome recorded.

        Each member that failed to sync is recorded as having lost its chunks, or as ejected. Not
        called after any other exception: the next flush then covers the epoch. A joining target is
        not covered: the kernel may report its error to the sync of the join instead.
        """
        self.epochs.cover(self.content.members, self._flush.epoch)
        self.content.decided(self.content.pending)

    def tell_loss(self) -> bool:
        """As `quorumfs.metadata.ledger.knowledge.Knowledge.tell_loss`."""
        untold, self._untold_loss = self._untold_loss, False
        return untold

    def suspend(self, replica: Replica) -> None:
        """Note a failed sync of *replica*, a member, while others are still awaited."""
        runs = list(self.losable(replica))
        self.content.suspend(replica, runs)
        for run in runs:
            self.targets.lost_by(replica, run)

    def failed(self, outcomes: Iterable[Outcome]) -> list[Replica]:
        """The replicas that failed a flush with *outcomes*, and the members whose failed sync is
        pending since before: the flush that heard of the failure was cut off.
        """
        failed = [replica for replica, operation in outcomes if operation.error is not None]
        pending = self.content.pending.difference(failed)
        return [*failed, *(replica for replica in self.content.members if replica in pending)]

    def note_pending(self) -> None:
        """Set the out-of-sync bits due if no further sync of the flush fails."""
        for part, replicas in list(self.content.would_lack()):
            for replica in replicas:
                self.recorded.add(bit(replica), part)

    def lose(self, replicas: Sequence[Replica], chunks: Sequence[range] | None = None) -> None:
        """Note the loss of *chunks* on *replicas*, which are not ejected for the loss.

        Default: all `losable` chunks of each replica. The last member to hold a chunk stays
        believed, though the chunk may not be durable: the loss is limited to changes since the last
        good sync of the member, and the members with earlier losses lack more.
        """
        self.content.losses += 1
        losses: dict[Replica, RangeSet] = {}
        everything = RangeSet()
        for replica in replicas:
            lost = losses[replica] = RangeSet()
            for run in list(self.losable(replica)) if chunks is None else chunks:
                lost.add(run.start, run.stop)
                self.targets.lost_by(replica, run)
                # Not `diverge`: the errors of this sync have surfaced.
                self.agreement.tell(Event.FAILED, run)
                if replica not in self.content.members:
                    self.targets.of(replica).lacks(run)
            everything = everything.union(lost)
        for start, end in everything:
            for part, lacking, last in list(self.content.losers(losses, range(start, end))):
                self.content.lose(lacking, part)
                if last:
                    # What a flush has failed for already, and nobody has changed since, it told.
                    told = all(self._is_risked(one, part) for one in last)
                    self._untold_loss = self._untold_loss or not told
                    self.targets.lacks(part)  # the target alone may hold the lost data
                    self.content.risk(last, part)
        self.content.decided(replicas)
        for start, end in everything:
            self.believe_the_one_left(range(start, end))
        self._notify()

    def _is_risked(self, replica: Replica, chunks: range) -> bool:
        """Whether all of *chunks* is RISKED on *replica*, without a change since."""
        new = next(self.content.risked(replica).outside(chunks.start, chunks.stop), None)
        return new is None and not self.epochs.waits(replica, chunks)

    def believe_the_one_left(self, chunks: range) -> None:
        """Believe the only member left to hold UNVERIFIED chunks: count the chunks as compared.

        The losses are recorded (P4). If two members are left and differ, only the operator can say
        which member is right, and flushes fail until then.
        """
        if self.map.any(UNVERIFIED, chunks):
            for part in list(self.sources.decided_by_loss(chunks)):
                self.compared(part)

    def lacked_outside(self, chunks: range) -> None:
        """Set *chunks* out of sync on all replicas that are not current."""
        if self.outside:
            self.recorded.add(self.outside, chunks)

    # At the mount

    def recall(self, *, crashed: bool) -> None:
        """Recall divergent chunks and earlier losses of members from the map.

        *crashed*: the set was not closed. A closed set has a clean record, committed after a good
        flush: a replica that failed the flush was ejected, or has out-of-sync bits. No change has
        begun since, because the record would say first that the set is in use. So no sync can
        report an older loss, and the next flush does not depend on chunks left divergent.
        """
        for run in self.map.runs(INTENT, longest=len(self.map)):
            self.agreement.tear(*self.map.bounds_of(run))  # a write may have been cut off there
        self._recall_losses()
        self._recall_marks()
        if crashed:
            self.agreement.tell(Event.CRASHED, range(len(self.map)))
            for start, end in self.agreement.torn:
                chunks = self.map.chunks(start, end - start)
                self.agreement.cut_off.add(chunks.start, chunks.stop)

    def _recall_losses(self) -> None:
        lost = RangeSet()
        for replica in self.content.members:
            self.content.recall(replica)
            for run in self.map.runs(bit(replica), longest=len(self.map)):
                lost.add(run.start, run.stop)
                self.diverge(run)
        for start, end in lost:
            self.believe_the_one_left(range(start, end))

    def _recall_marks(self) -> None:
        for run in self.map.runs(INTENT, longest=len(self.map)):
            self.diverge(run)
            self.lacked_outside(run)  # a resync may have copied less
