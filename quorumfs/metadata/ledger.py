"""The ledger of one set: what is known of who holds what. Pure: no I/O, no clock, no waiting.

Whatever changes what is known is here, and in the modules that this one joins:

* `quorumfs.metadata.commit`: what the record says of each replica;
* `quorumfs.metadata.recorded`: the map of marks and bits as it is *known*, against what of it is
  *recorded* in the sidecars; which extents are to be marked decides `quorumfs.metadata.intents`;
* `quorumfs.metadata.epochs`: when each chunk was changed, and what each replica has synced since;
* `quorumfs.metadata.doubts`: whom to believe where the current replicas may differ;
* `quorumfs.metadata.target`: what those lack that are not current.

Epochs and doubts are in memory alone: an ``INTENT`` mark stands for them in the sidecars.
`quorumfs.metadata.sidecars` asks the ledger, writes and waits.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from quorumfs.assembly import Found, Plan, State
from quorumfs.dirtymap import INTENT, UNVERIFIED, lacks
from quorumfs.metadata import Choice, Outcome
from quorumfs.metadata.commit import Records
from quorumfs.metadata.doubts import Doubts
from quorumfs.metadata.epochs import Epochs
from quorumfs.metadata.intents import Intents
from quorumfs.metadata.recorded import Recorded
from quorumfs.metadata.target import Target
from quorumfs.ranges import RangeSet
from quorumfs.replica import Replica
from quorumfs.sidecar import Record
from quorumfs.storage import Kind, Operation
from quorumfs.voting import voted_error


@dataclass(frozen=True, slots=True)
class Membership:
    """Which replicas take part, at one moment: made anew whenever that changes."""

    members: tuple[Replica, ...]
    """The current ones."""
    receivers: tuple[Replica, ...]
    """Those that get what is written: the members, and the target of a resync."""
    out_bits: int
    """``lacks`` of all other slots."""
    member_bits: int
    """``lacks`` of the members."""
    looked_at: int
    """What of a chunk's state says whether a write must go the long way: `INTENT` alone is good."""
    recorded: bool
    """A replica can be taken for current, by the sidecars, only if it is a member."""
    ready: bool
    """A change of what is marked may begin at once: it is on record that this mount may change the
    disk, enough are current, and no target is joining."""


class _Flush(NamedTuple):
    """The latest flush."""

    epoch: int
    """What it covers."""
    lossy: set[Replica]
    """Who had lost something when it began."""


class Ledger:
    """What the sidecars of one set have, or are to have, and what follows from that."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        plan: Plan,
        found: Sequence[Found],
        records: Records,
        *,
        threshold: int,
        read_only: bool,
        notify: Callable[[], None],
    ) -> None:
        """*replicas* are the plan's members in the same order, with what was *found* of them; they
        get their slots and roles. *notify* is called when there may be something to repair.
        """
        self.replicas = tuple(replicas)
        self.map = plan.map
        self.threshold = threshold
        self.records = records
        self.recorded = Recorded(plan.map)
        self.doubts = Doubts(self.recorded, threshold, settling=not read_only)
        self.epochs = Epochs()
        """Who has synced what was changed, of those who get what is written."""
        self.intents = Intents(plan.map)
        self.targets: dict[Replica, Target] = {}
        """What each replica holds that is not current on record."""
        self.target: Target | None = None
        """The one that is being resynced."""
        self.in_use = False
        """The record in the sidecars says that the set is in use by this mount."""
        self.fenced = False
        """The set is another mount's: nobody is current here."""
        self.membership = Membership((), (), 0, 0, 0, recorded=False, ready=False)
        self._read_only = read_only
        self._notify = notify
        self._extent_chunks = self.map.extent // self.map.chunk_size
        self._diverged_in = self.epochs.now
        """The epoch in which a chunk was last unsettled."""
        self._flush = _Flush(0, set())
        self._untold_loss = False
        """All current replicas lost a write that was acknowledged, and no flush of a guest has
        failed since (R13): whoever else had them sync heard of it instead."""
        for replica, member, one in zip(replicas, plan.members, found, strict=True):
            replica.slot, replica.role, replica.reason = member.slot, member.state, member.reason
            if replica.slot is not None and replica.role is not State.CURRENT:
                self.target_of(replica)
            if one.image and one.image.size < self.record.size and replica.slot is not None:
                self.recorded.add(_bit(replica), range(len(self.map)))
            if one.image and one.sidecar and replica.role is State.CURRENT:
                for start, end in one.sidecar.unreadable:
                    self.doubts.unreadable.add(start, end)
                self.recorded.found(one.sidecar.map)
        self.arrange()
        self._tear_marked()
        self._recall_lost()
        self._unsettle_marked()

    @property
    def record(self) -> Record:
        """The latest that is valid on all replicas that are current in it."""
        return self.records.record

    # What the disk asks and tells

    @property
    def receivers(self) -> Sequence[Replica]:
        mirroring = self.target is not None and self.target.mirroring
        return self.membership.receivers if mirroring else self.members

    @property
    def readers(self) -> Sequence[Replica]:
        return self.members

    @property
    def flushed(self) -> Sequence[Replica]:
        return self.membership.receivers if self.joining else self.members

    @property
    def alike(self) -> Sequence[Replica]:
        return () if self.doubts else self.membership.members

    def begin_now(self, offset: int, length: int) -> Sequence[Replica]:
        # As `prepared` and `begin` together: on the path of every write, so it is spelled out.
        size = self.map.chunk_size
        first, last = offset // size, (offset + length - 1) // size
        if not self.membership.ready:
            return ()
        looked_at = self.membership.looked_at
        for state in self.map.states[first : last + 1]:
            if state & looked_at != INTENT:
                return ()
        chunks = range(first, last + 1)
        if self.recorded.behind and not self.recorded.holds(chunks, self.membership.member_bits):
            return ()
        unreadable = self.doubts.unreadable
        if unreadable and unreadable.overlaps(offset, offset + length):
            return ()
        touched, per_extent = self.intents.touched, self._extent_chunks
        touched[first // per_extent] = touched[last // per_extent] = 1  # there is none between
        self.epochs.latest.add(chunks)
        return self._receivers_of(chunks)

    def prepared(self, offset: int, length: int, *, repair: bool = False) -> bool:
        ready = self.in_use and self.membership.recorded and (repair or not self.unentered)
        chunks = self.map.chunks(offset, length)
        return ready and self.recorded.holds(chunks, self.membership.member_bits)

    @property
    def unentered(self) -> bool:
        """Whether it is not on record that this mount may change the disk, and must be.

        Nothing is acknowledged by too few: then the record would say too much.
        """
        return not self.records.entered and len(self.members) >= self.threshold

    def want(self, offset: int, length: int, *, ahead: bool) -> None:
        """Have it known that these bytes are to be changed; see `prepare` of the sidecars."""
        extents = self.map.extents(offset, length)
        if span := self.intents.want(extents, self._may_mark, ahead=ahead):
            self.recorded.add(INTENT, self.map.extent_chunks(span))

    def _may_mark(self, extents: range) -> bool:
        """Whether *extents* may be marked that are not about to be written to.

        Not what was never compared: a mark says there that a write may have torn it.
        """
        return not self.map.any(UNVERIFIED, self.map.extent_chunks(extents))

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        chunks = self.map.chunks(offset, length)
        self.note_written(chunks)
        return self._receivers_of(chunks)

    def target_for_repair(self, offset: int, length: int) -> list[Replica]:
        """The target, if it is to be given what a repair gives to others.

        A repair beside a member that never syncs comes again and again: the target would lack for
        ever what it was not given.
        """
        receivers = self._receivers_of(self.map.chunks(offset, length), mirrored=True)
        return [replica for replica in receivers if self.is_target(replica)]

    @contextmanager
    def giving(self, replicas: Sequence[Replica], offset: int, length: int) -> Iterator[None]:
        chunks = self.map.chunks(offset, length)
        self.intents.touch(self._extents_of(chunks))
        with self.epochs.giving(replicas, chunks):
            yield
        self.intents.touch(self._extents_of(chunks))

    def _receivers_of(self, chunks: range, *, mirrored: bool = False) -> Sequence[Replica]:
        """Whom a change of *chunks* that begins now goes to; the others lack it.

        *mirrored*: the target, too, where it lacks nothing.
        """
        if self.membership.out_bits:
            self.recorded.add(self.membership.out_bits, chunks)
        if self.target is None or self.target.gets(chunks, mirrored=mirrored):
            return self.membership.receivers
        return self.members

    def note_written(self, chunks: range) -> None:
        """Note that a change of *chunks* begins or ends."""
        self.intents.touch(self._extents_of(chunks))
        self.epochs.latest.add(chunks)

    def _extents_of(self, chunks: range) -> range:
        return range(chunks.start // self._extent_chunks, chunks[-1] // self._extent_chunks + 1)

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        epoch = self.epochs.begin_sync(self.flushed, self.chunks_of(changing))
        self._flush = _Flush(epoch, self.doubts.lossy)

    def chunks_of(self, ranges: Iterable[tuple[int, int]]) -> Iterator[range]:
        return (self.map.chunks(start, end - start) for start, end in ranges)

    def unfit(self, outcomes: Sequence[Outcome]) -> list[Replica]:
        """Who could not make writes durable, by a flush; raises `OSError` if too few could."""
        if self._read_only:
            return []  # there is nothing to make durable, and nothing may be recorded
        failed = [o.replica for o in outcomes if o.error is not None]
        # Its sync may have begun before what it had lost was written again.
        lossy = self._flush.lossy | self.doubts.lossy
        if not self.in_use and not self.doubts.inherited and not failed:
            return []  # nothing was ever written
        unfit = lossy.union(failed)
        good = [r for r, _ in outcomes if r.role is State.CURRENT and r not in unfit]
        if len(good) < self.threshold:
            raise voted_error(o.error for o in outcomes if o.error is not None)
        return [*failed, *(replica for replica in self.members if replica in lossy)]

    def end_flush(self) -> None:
        # Whoever could not sync it is on record as having lost it, or as left behind; the others
        # have it. Not so after any other exception: then the next flush is to cover it. And of two
        # syncs that a target has under way when it joins, the other one may yet be told of it.
        self.epochs.cover(self.members, self._flush.epoch)
        self.doubts.losing.clear()

    def tell_loss(self) -> bool:
        untold, self._untold_loss = self._untold_loss, False
        return untold

    def choices(self, offset: int, length: int) -> Iterable[Choice]:
        if self.alike:
            return [Choice(offset, length, list(self.members))]
        return self.doubts.choices(offset, length)

    def may_differ(self, offset: int, length: int) -> bool:
        if not self.doubts.unsettled:
            return False
        chunks = self.map.chunks(offset, length)
        return self.doubts.unsettled.overlaps(chunks.start, chunks.stop)

    def missed(self, replica: Replica) -> RangeSet:
        away = any(member.state is State.MISSING for member in self.members)
        if self.membership.recorded and not away:
            return _NOTHING
        # One that is away may alone hold something there: nobody else's hole counts, until it is
        # on record as left behind.
        doubtful = RangeSet()
        for start, end in self.doubts.unsettled:
            doubtful.add(*self.map.bounds_of(range(start, end)))
        return doubtful

    def answered(self, replica: Replica, offset: int, length: int) -> None:
        self.doubts.answered(replica, self.map.chunks(offset, length))

    def unsynced(self, offset: int, length: int) -> bool:
        chunks = self.map.chunks(offset, length)
        return any(self.epochs.waits(replica, chunks) for replica in self.members)

    def unverified(self, offset: int, length: int) -> bool:
        return self.map.any(UNVERIFIED, self.map.chunks(offset, length))

    def lossy(self, offset: int, length: int) -> bool:
        chunks = self.map.chunks(offset, length)
        return any(lost.overlaps(chunks.start, chunks.stop) for lost in self.doubts.lost.values())

    def unflushable(self) -> bool:
        return bool(self.doubts.inherited or self.doubts.lost or self.doubts.risked)

    @property
    def unreadable(self) -> RangeSet:
        return self.doubts.unreadable

    # What repairs ask and tell

    @property
    def members(self) -> Sequence[Replica]:
        """The current replicas."""
        return self.membership.members

    @property
    def may_record(self) -> bool:
        """Whether enough are current to have it on record who is not, before anything changes."""
        return self.membership.recorded or len(self.members) >= self.records.quorum

    def is_target(self, replica: Replica) -> bool:
        """Whether *replica* is being resynced."""
        return self.target is not None and self.target.replica is replica

    @property
    def joining(self) -> bool:
        """Whether a target is becoming current: from here on flushes wait for it, too."""
        return self.target is not None and self.target.joining

    @property
    def resyncing(self) -> Replica | None:
        return None if self.target is None else self.target.replica

    def settled(self, chunks: range) -> None:
        """Note that all current replicas hold the same in *chunks*."""
        self.doubts.settled(chunks)
        self.intents.touch(self._extents_of(chunks))

    def settled_in_part(self, refused: Collection[Replica], chunks: range) -> None:
        """Note that current replicas took what one of them held of *chunks*, but for *refused*."""
        for replica in self.members:
            if replica not in refused:
                self.doubts.took(replica, chunks)

    def durable_on(self, replica: Replica, offset: int, length: int) -> bool:
        """Whether *replica* is current, and what it shows of a range is known to be durable."""
        chunks = self.map.chunks(offset, length)
        suspect = self.doubts.undurable(replica), self.doubts.lost_by(replica)
        covered = replica in self.members and not self.epochs.waits(replica, chunks)
        return covered and not any(places.overlaps(chunks.start, chunks.stop) for places in suspect)

    @property
    def losses_heard(self) -> bool:
        """Whether all current replicas have synced since something was last unsettled.

        Before that one may show a page that it has lost, and must not be who the others are made
        equal to.
        """
        return all(self.epochs.covered(r) >= self._diverged_in for r in self.members)

    def verified(self, chunks: range) -> None:
        """Note that *chunks* were compared, and are equal on all current replicas."""
        self.recorded.remove(UNVERIFIED, chunks)
        self.doubts.torn.remove(*self.map.bounds_of(chunks))
        self.target_lacks(chunks)
        for slot in self._out_slots():  # nor was who is not here compared
            self.recorded.add(lacks(slot), chunks)
        if self.doubts.lost_in(chunks):
            self.unsettle(chunks)  # perhaps what a flush lost made them equal

    def target_missed(self, offset: int, length: int) -> None:
        """Note that the target was not given what others were."""
        self.target_lacks(self.map.chunks(offset, length))

    # What was lost

    def sync_ended(self, replica: Replica, operation: Operation) -> None:
        """Stop to believe a replica whose sync failed, before the slowest one has answered."""
        if operation.kind is not Kind.SYNC or operation.error is None:
            return
        if self.joining and self.is_target(replica):
            # Of two syncs the other one, of the join itself, may have been told nothing.
            self.targets[replica].lacks_unsynced()
        if replica.role is not State.CURRENT:
            return
        losing = self.doubts.losing.setdefault(replica, RangeSet())
        self.doubts.losses += 1
        for run in self._unsynced_runs(replica):
            losing.add(run.start, run.stop)
            self._lost_from(replica, run)

    def _unsynced_runs(self, replica: Replica) -> Iterator[range]:
        """What a sync of *replica* that fails may be about, also from before a crash."""
        yield from self.epochs.unsynced(replica)
        yield from (range(start, end) for start, end in self.doubts.undurable(replica))

    def note_losses(self) -> None:
        """Note what syncs that failed lost, while others are awaited."""
        for losing in list(self.doubts.losing.values()):
            for start, end in losing:
                for part, lacking, _ in self.doubts.losers(self.doubts.losing, range(start, end)):
                    for replica in lacking:
                        self.recorded.add(_bit(replica), part)

    def lose(self, replicas: Sequence[Replica], chunks: Sequence[range] = ()) -> None:
        """Note that *replicas* lost *chunks*, and too few are left without them.

        By default what they took since a flush. Where one of them is the last to hold something it
        stays believed, though nobody knows what of it is durable: what it lost is what it was given
        since its last good sync, and the others, which lost something before, lack more.
        """
        self.doubts.losses += 1
        losses: dict[Replica, RangeSet] = {}
        for replica in replicas:
            self.doubts.losing.pop(replica, None)
            lost = losses[replica] = RangeSet()
            for run in chunks or list(self._unsynced_runs(replica)):
                lost.add(run.start, run.stop)
                self._lost_from(replica, run)
                self.doubts.unsettle(run)
                if replica.role is not State.CURRENT:
                    self.targets[replica].lacks(run)
        everything = RangeSet()
        for lost in losses.values():
            everything = everything.union(lost)
        for start, end in everything:
            for part, lacking, last in self.doubts.losers(losses, range(start, end)):
                for replica in lacking:
                    self.recorded.add(_bit(replica), part)
                    self.doubts.lose(replica, part)
                if last:
                    self._lost_by_the_last(last, part)
            if self.map.any(UNVERIFIED, range(start, end)):
                self._believe_the_one_left(range(start, end))
        self._notify()

    def _lost_by_the_last(self, replicas: Sequence[Replica], chunks: range) -> None:
        """Note that *replicas*, the only ones left that held *chunks*, may have lost something."""
        self._untold_loss = True
        self.target_lacks(chunks)  # it alone may hold what all others lost
        for replica in replicas:
            self.doubts.risk(replica, chunks)
            self.recorded.remove(_bit(replica), chunks)

    def _believe_the_one_left(self, chunks: range) -> None:
        """Take what was never compared, where all current replicas but one lost it, from that one.

        It is on record who lost something there (P4). Where two are left and differ, nobody can
        say which one is right: a flush fails until the operator did.
        """
        for part in self.doubts.decided_by_loss(chunks):
            self.verified(part)

    def _lost_from(self, source: Replica, chunks: range) -> None:
        """Have others be given again what was copied to them from *source*, which lost it."""
        for target in self.targets.values():
            target.lost_by(source, chunks)

    def unsettle(self, chunks: range) -> None:
        """The current replicas may differ in *chunks*."""
        self.target_lacks(chunks)
        self.doubts.unsettle(chunks)
        self._diverged_in = self.epochs.now
        self._notify()

    def target_lacks(self, chunks: range) -> None:
        """Have the target, if there is one, be given *chunks* again."""
        if self.target is not None:
            self.target.lacks(chunks)

    # Who is what

    @property
    def least(self) -> int:
        """How many current replicas must be left."""
        return max(self.threshold, self.records.quorum)

    def enough_without(self, gone: Sequence[Replica]) -> bool:
        """Whether enough are left if *gone* are left behind, and hold all that those hold."""
        left = len(self.members) - len(gone)
        return left >= self.least and not self.doubts.held_only_by(gone)

    def all_current(self) -> bool:
        return self.in_use and self.membership.recorded and next(self._out_slots(), None) is None

    def _out_slots(self) -> Iterator[int]:
        current = {replica.slot for replica in self.members}
        return (slot for slot in range(len(self.record.roles)) if slot not in current)

    def target_of(self, replica: Replica) -> Target:
        """What *replica* holds, which is not current, or is no more."""
        target = Target(replica, self.recorded, self.epochs)
        return self.targets.setdefault(replica, target)

    def arrange(self) -> None:
        """Follow the replicas' roles."""
        ours = () if self.fenced else self.replicas
        members = tuple(r for r in ours if r.role is State.CURRENT)
        receivers = tuple(r for r in ours if r.role in (State.CURRENT, State.RESYNCING))
        inside = {replica.slot for replica in receivers}
        outside = (slot for slot in range(len(self.record.roles)) if slot not in inside)
        recorded = self.records.names_only(members)
        may_change = self.in_use and recorded and self.records.entered
        member_bits = sum(map(_bit, members))
        self.membership = Membership(
            members,
            receivers,
            sum(map(lacks, outside)),
            member_bits,
            INTENT | UNVERIFIED | member_bits,
            recorded=recorded,
            ready=may_change and not self.joining and len(members) >= self.threshold,
        )
        self.doubts.members = members
        self.epochs.follow(receivers)

    def eject(self, gone: Iterable[Replica], reason: str) -> None:
        """Make current replicas stale, in memory."""
        for replica in gone:
            replica.role = State.STALE
            replica.reason = reason
            target = self.target_of(replica)
            target.eject()
            target.lacks_unsynced()
            for run in self.epochs.unsynced(replica):
                self._lost_from(replica, run)
            for start, end in self.doubts.unsettled:
                target.lacks(range(start, end))
            self.doubts.forget(replica)
        self.arrange()
        self._notify()

    def give_up_target(self, reason: str) -> Replica:
        """Make the target stale again, in memory: it keeps what it has. Returns it."""
        target = self.target
        assert target is not None
        self.target = None
        target.lacks_unsynced()
        replica = target.replica
        self.doubts.forget(replica)
        replica.role = State.STALE
        replica.reason = reason
        self.arrange()
        self._notify()
        return replica

    # Marks

    def _kept_marks(self, claimed: Iterable[tuple[int, int]]) -> RangeSet:
        """Extents that are in use, or unequal; *claimed* are ranges that may be changed (bytes)."""
        kept = RangeSet()
        for extents in self.intents.in_use():
            kept.add(extents.start, extents.stop)
        unequal = (self.map.bounds_of(chunks) for chunks in self.doubts.to_remember())
        for start, end in (*claimed, *unequal):
            extents = self.map.extents(start, end - start)
            kept.add(extents.start, extents.stop)
        return kept

    def to_clear(self) -> bool:
        """Whether `clear_marks` has something to do."""
        if self.intents.touched.find(1) >= 0:
            return True
        return self.all_current() and next(self.intents.idle(), None) is not None

    def clear_marks(self, idle: Iterable[range], claimed: Iterable[tuple[int, int]]) -> None:
        """Clear the marks of *idle* extents, but for what is *claimed* (bytes) or unequal."""
        kept = self._kept_marks(claimed)
        for span in idle:
            for start, stop in kept.outside(span.start, span.stop):
                self.recorded.remove(INTENT, self.map.extent_chunks(range(start, stop)))

    def clear_all_marks(self) -> None:
        """Clear all marks but those of what is unequal: the disk is closed in order."""
        self.recorded.remove(INTENT, range(len(self.map)))
        for chunks in self.doubts.to_remember():
            self.recorded.add(INTENT, chunks)

    # At the mount

    def _recall_lost(self) -> None:
        """Take from the map what current replicas lost before."""
        for replica in self.members:
            assert replica.slot is not None
            for run in self.map.runs(lacks(replica.slot), longest=len(self.map)):
                self.doubts.lose(replica, run)
                self.unsettle(run)
        for start, end in (run for lost in list(self.doubts.lost.values()) for run in lost):
            self._believe_the_one_left(range(start, end))

    def _tear_marked(self) -> None:
        """After a crash a write may have been cut off wherever there is a mark."""
        for run in self.map.runs(INTENT, longest=len(self.map)):
            self.doubts.tear(*self.map.bounds_of(run))

    def _unsettle_marked(self) -> None:
        """After a crash the current replicas may differ wherever there is a mark; if they were
        closed in order, where a write failed.
        """
        for run in self.map.runs(INTENT, longest=len(self.map)):
            self.unsettle(run)
            for slot in self._out_slots():  # one that was being resynced may have been given less
                self.recorded.add(lacks(slot), run)
        if self.record.clean:
            # It became so after a flush that was enough; whoever failed it had been left behind, or
            # has ``lacks`` bits. No change was begun since, for the record says first that the set
            # is in use. So nothing that was acknowledged waits for a flush, and no sync can tell of
            # anything older: the next flush does not depend on what could not be made equal.
            return
        self.doubts.inherited = self.doubts.unsettled.union(RangeSet())


def _bit(replica: Replica) -> int:
    """What says that *replica*, which has a slot, lacks something."""
    assert replica.slot is not None
    return lacks(replica.slot)


_NOTHING = RangeSet()
