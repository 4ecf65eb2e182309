"""What is known of the chunks of one disk, and what follows when that changes. Pure.

Each chunk has a state on each replica: `quorumfs.metadata.ledger.content` on the current ones,
`quorumfs.metadata.ledger.target` on the others; and one of all current replicas together:
`quorumfs.metadata.ledger.agreement`. Here is what changes several of them at once.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED, out_of_sync
from quorumfs.decisions.ranges import RangeSet
from quorumfs.metadata.ledger.agreement import Agreement, Event
from quorumfs.metadata.ledger.content import Content
from quorumfs.metadata.ledger.epochs import Epochs
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.metadata.ledger.sources import Sources
from quorumfs.metadata.ledger.target import Targets
from quorumfs.replica.replica import Replica


class _Flush(NamedTuple):
    """The latest flush."""

    epoch: int
    """What it covers."""
    lossy: set[Replica]
    """The members that lacked something when it began."""


class Belief(NamedTuple):
    """What a choice of sources was made from."""

    losses: int
    """How often a member had lost something."""
    members: frozenset[Replica]
    """The replicas that were current."""


class Chunks:
    """The chunks of one disk."""

    def __init__(
        self,
        recorded: Recorded,
        *,
        threshold: int,
        repairing: bool,
        notify: Callable[[], None],
    ) -> None:
        """*repairing* as for `Sources`. *notify*: called when there may be something to repair."""
        self.map = recorded.map
        self.recorded = recorded
        self.epochs = Epochs()
        """When each chunk was changed, and what each replica that gets what is written has synced
        of it."""
        self.content = Content(recorded)
        self.agreement = Agreement(recorded)
        self.sources = Sources(
            self.map, self.content, self.agreement, threshold, repairing=repairing
        )
        self.targets = Targets(recorded, self.epochs)
        self.outside = 0
        """``out_of_sync`` of all slots that are not current."""
        self._notify = notify
        self._diverged_in = self.epochs.now
        """The epoch in which a chunk was last found to be divergent."""
        self._flush = _Flush(0, set())
        self._untold_loss = False
        """The members lost a write that was acknowledged, each of them, and no flush of a guest has
        failed since (R13): whoever else had them sync heard of it instead."""

    # Whether the members agree

    def diverge(self, chunks: range) -> None:
        """Note that the members may differ in *chunks*."""
        self.targets.lacks(chunks)
        self.agreement.tell(Event.FAILED, chunks)
        self._diverged_in = self.epochs.now
        self._notify()

    def equalized(self, chunks: range) -> None:
        """Note that all members were given the same in *chunks*."""
        self.agreement.tell(Event.EQUALIZED, chunks)
        self.content.took(self.content.members, chunks)
        if not self.agreement.divergent:
            self.sources.unpin()

    def equalized_in_part(self, refused: Collection[Replica], chunks: range) -> None:
        """Note that the members took what one of them held of *chunks*, but for *refused*."""
        self.content.took([one for one in self.content.members if one not in refused], chunks)

    def compared(self, chunks: range) -> None:
        """Note that *chunks* were compared, and are equal on all members."""
        self.agreement.tell(Event.COMPARED, chunks)
        self.agreement.torn.remove(*self.map.bounds_of(chunks))
        self.targets.lacks(chunks)
        self.lacked_outside(chunks)  # the other replicas were not compared
        if self.content.lost_any(chunks):
            self.diverge(chunks)  # perhaps what a flush lost made them equal

    def unflushable(self) -> bool:
        """Whether a flush cannot tell what is durable before some chunks are made equal."""
        return bool(self.agreement.inherited or self.content.lossy or self.content.risking)

    def to_equalize_first(self) -> list[range]:
        """The chunks of which a flush could not tell what it made durable."""
        first = self.agreement.inherited.union(self.content.lost_chunks())
        return [range(start, end) for start, end in first]

    # Who holds what durably

    def unsynced(self, chunks: range) -> bool:
        """Whether any of *chunks* was changed since a member last synced."""
        return any(self.epochs.waits(replica, chunks) for replica in self.content.members)

    def losable(self, replica: Replica) -> Iterator[range]:
        """What a sync of *replica* that fails may be about, also from before a crash."""
        yield from self.epochs.unsynced(replica)
        yield from (range(start, end) for start, end in self.undurable(replica))

    def undurable(self, replica: Replica) -> RangeSet:
        """Chunks of which *replica*, a member, is not known to hold durably what it shows there,
        whatever it has synced since they were written.
        """
        inherited, risked = self.agreement.inherited, self.content.risked(replica)
        return inherited.union(risked) if risked else inherited

    def durable_on(self, replica: Replica, chunks: range) -> bool:
        """Whether *replica* is a member, and holds durably what it shows of *chunks*."""
        doubtful = self.undurable(replica), self.content.unbelieved(replica, chunks)
        covered = replica in self.content.members and not self.epochs.waits(replica, chunks)
        return covered and not any(place.overlaps(chunks.start, chunks.stop) for place in doubtful)

    @property
    def writeback_errors_surfaced(self) -> bool:
        """Whether all members have synced since a chunk was last found to be divergent.

        Before that, a member may show a page that it has lost, and must not be a source.
        """
        covered = map(self.epochs.covered, self.content.members)
        return all(epoch >= self._diverged_in for epoch in covered)

    def believe(self) -> Belief:
        """What a choice of sources that is made now is made from; see `still_believed`."""
        return Belief(self.content.losses, frozenset(self.content.members))

    def still_believed(self, belief: Belief) -> bool:
        """Whether no member lost anything, and none joined, since *belief*: a choice of sources
        that was made then, before an await, still holds.
        """
        same = belief.losses == self.content.losses
        return same and belief.members.issuperset(self.content.members)

    # What a sync that fails means

    def begin_flush(self, flushed: Iterable[Replica], changing: Iterable[range]) -> None:
        """Note that a flush of *flushed* begins now, amid changes of *changing*."""
        epoch = self.epochs.begin_sync(flushed, changing)
        self._flush = _Flush(epoch, self.content.lacking)

    def lossy_in_flush(self) -> set[Replica]:
        """The members that lacked something at any time since the latest flush began: their sync
        may have begun before what they had lost was written again.
        """
        return self._flush.lossy | self.content.lacking

    def end_flush(self) -> None:
        """Note that it is known, and on record, what the latest flush did.

        Whoever could not sync is on record as having lost it, or as ejected; the others have it.
        Not so after any other exception: then the next flush is to cover it. And of two syncs that
        a target has under way when it joins, the other one may yet be told of it.
        """
        self.epochs.cover(self.content.members, self._flush.epoch)
        self.content.decided(self.content.pending)

    def tell_loss(self) -> bool:
        """As `quorumfs.metadata.ledger.known.Known.tell_loss`."""
        untold, self._untold_loss = self._untold_loss, False
        return untold

    def suspend(self, replica: Replica) -> None:
        """Note that a sync of *replica*, a member, failed, and others are still awaited."""
        runs = list(self.losable(replica))
        self.content.suspend(replica, runs)
        for run in runs:
            self.targets.lost_by(replica, run)

    def note_pending(self) -> None:
        """Have it known what would be lacking if no other sync of the flush failed."""
        for part, replicas in list(self.content.would_lack()):
            for replica in replicas:
                self.recorded.add(bit(replica), part)

    def lose(self, replicas: Sequence[Replica], chunks: Sequence[range] = ()) -> None:
        """Note that *replicas* lost *chunks*, and too few are left without them.

        By default what they took since a flush. Where one of them is the last to hold something it
        stays believed, though nobody knows what of it is durable: what it lost is what it was given
        since its last good sync, and the others, which lost something before, lack more.
        """
        self.content.losses += 1
        losses: dict[Replica, RangeSet] = {}
        everything = RangeSet()
        for replica in replicas:
            lost = losses[replica] = RangeSet()
            for run in chunks or list(self.losable(replica)):
                lost.add(run.start, run.stop)
                self.targets.lost_by(replica, run)
                # Not `diverge`: what this sync had to tell is heard by now.
                self.agreement.tell(Event.FAILED, run)
                if replica not in self.content.members:
                    self.targets.of(replica).lacks(run)
            everything = everything.union(lost)
        for start, end in everything:
            for part, lacking, last in list(self.content.losers(losses, range(start, end))):
                self.content.lose(lacking, part)
                if last:
                    self._untold_loss = True
                    self.targets.lacks(part)  # it alone may hold what all others lost
                    self.content.risk(last, part)
        self.content.decided(replicas)
        for start, end in everything:
            self.believe_the_one_left(range(start, end))
        self._notify()

    def believe_the_one_left(self, chunks: range) -> None:
        """Take what was never compared, where all members but one lost it, from that one.

        It is on record who lost something there (P4). Where two are left and differ, nobody can
        say which one is right: a flush fails until the operator did.
        """
        if self.map.any(UNVERIFIED, chunks):
            for part in list(self.sources.decided_by_loss(chunks)):
                self.compared(part)

    def lacked_outside(self, chunks: range) -> None:
        """Have all replicas that are not current lack *chunks*."""
        if self.outside:
            self.recorded.add(self.outside, chunks)

    # At the mount

    def recall(self, *, crashed: bool) -> None:
        """Take from the map what the members may differ in, and what they lost before.

        *crashed*: the set had not been closed. If it had, its record became clean after a flush
        that was enough: whoever failed that flush had been ejected, or has out-of-sync bits. No
        change was begun since, for the record says first that the set is in use. So no sync can
        tell of anything older, and the next flush does not depend on what could not be made equal.
        """
        for run in self.map.runs(INTENT, longest=len(self.map)):
            self.agreement.tear(*self.map.bounds_of(run))  # a write may have been cut off there
        self._recall_losses()
        self._recall_marks()
        if crashed:
            self.agreement.tell(Event.CRASHED, range(len(self.map)))

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
            self.lacked_outside(run)  # one that was being resynced may have been given less


def bit(replica: Replica) -> int:
    """What says that *replica*, which has a slot, lacks something."""
    assert replica.slot is not None
    return out_of_sync(replica.slot)
