"""The ledger of one set: what is known of who holds what. Pure: no I/O, no clock, no waiting.

Whatever changes what is known is here, and in the modules that this one joins:

* `quorumfs.metadata.ledger.commit`: what the record says of each replica;
* `quorumfs.metadata.ledger.chunks`: what each replica has of each chunk, and whether they agree;
* `quorumfs.metadata.ledger.recorded`: the map of marks and bits as it is *known*, against what of
  it is *recorded* in the sidecars;
* `quorumfs.metadata.ledger.marks`: which extents are marked, because they may be written to.

Much of that is in memory alone: an ``INTENT`` mark stands for it in the sidecars.
`quorumfs.metadata.sidecars` asks the ledger, writes and waits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED, out_of_sync
from quorumfs.decisions.model import Found, Plan, Standing
from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.record import Record
from quorumfs.decisions.voting import voted_error
from quorumfs.metadata.ledger.chunks import Chunks, bit
from quorumfs.metadata.ledger.commit import Records
from quorumfs.metadata.ledger.known import Outcome, ReadSegment
from quorumfs.metadata.ledger.marks import Marks
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.metadata.ledger.target import Target
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation


@dataclass(frozen=True, slots=True)
class Membership:
    """Which replicas take part, at one moment: made anew whenever that changes."""

    members: tuple[Replica, ...]
    """The current ones."""
    receivers: tuple[Replica, ...]
    """Those that get what is written: the members, and the target of a resync."""
    out_bits: int
    """``out_of_sync`` of all other slots."""
    member_bits: int
    """``out_of_sync`` of the members."""
    looked_at: int
    """What of a chunk's state says whether a write must go the long way: `INTENT` alone is good."""
    recorded: bool
    """A replica can be taken for current, by the sidecars, only if it is a member."""
    ready: bool
    """A change of what is marked may begin at once: it is on record that this mount may change the
    disk, enough are current, and no target is joining."""

    @classmethod
    def of(
        cls, replicas: Sequence[Replica], records: Records, *, in_use: bool, joining: bool
    ) -> "Membership":
        """By the roles of *replicas*, and what is on record of them."""
        members = tuple(one for one in replicas if one.standing is Standing.CURRENT)
        receivers = tuple(
            one for one in replicas if one.standing in (Standing.CURRENT, Standing.RESYNCING)
        )
        recorded = records.names_only(members)
        may_change = in_use and recorded and records.entered
        member_bits = sum(map(bit, members))
        return cls(
            members,
            receivers,
            _bits_but(receivers, records.record),
            member_bits,
            INTENT | UNVERIFIED | member_bits,
            recorded=recorded,
            ready=may_change and not joining and len(members) >= records.threshold,
        )


class Ledger:
    """What the sidecars of one set have, or are to have, and what follows from that."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        plan: Plan,
        found: Sequence[Found],
        records: Records,
        *,
        read_only: bool,
        notify: Callable[[], None],
    ) -> None:
        """*replicas* are the plan's members in the same order, with what was *found* of them; they
        get their slots and roles. *notify* is called when there may be something to repair.
        """
        self.map = plan.map
        self.records = records
        self.recorded = Recorded(plan.map)
        self.chunks = Chunks(
            self.recorded, threshold=records.threshold, repairing=not read_only, notify=notify
        )
        self.epochs = self.chunks.epochs
        self.agreement = self.chunks.agreement
        self.content = self.chunks.content
        self.targets = self.chunks.targets
        self.marks = Marks(self.recorded, self.agreement)
        self.in_use = False
        """The record in the sidecars says that the set is in use by this mount."""
        self.membership = Membership((), (), 0, 0, 0, recorded=False, ready=False)
        self.replicas = tuple(replicas)
        self._fenced = False
        """The set is another mount's: nobody is current here."""
        self.notify = notify
        """Called when there may be something to repair."""
        for replica, member, one in zip(replicas, plan.members, found, strict=True):
            replica.slot, replica.standing, replica.reason = (
                member.slot,
                member.state,
                member.reason,
            )
            if replica.slot is not None and replica.standing is not Standing.CURRENT:
                self.targets.of(replica)
            if one.image and one.image.size < self.record.size and replica.slot is not None:
                self.recorded.add(bit(replica), range(len(self.map)))
            if one.image and one.sidecar and replica.standing is Standing.CURRENT:
                for start, end in one.sidecar.unreadable:
                    self.agreement.unreadable.add(start, end)
                self.recorded.found(one.sidecar.map)
        self.arrange()
        self.chunks.recall(crashed=not self.record.clean)

    @property
    def record(self) -> Record:
        """The latest that is valid on all replicas that are current in it."""
        return self.records.record

    @property
    def threshold(self) -> int:
        """How many replicas must have taken what is acknowledged."""
        return self.records.threshold

    # What the disk asks and tells

    @property
    def receivers(self) -> Sequence[Replica]:
        target = self.target
        return self.membership.receivers if target and target.mirroring else self.members

    @property
    def readers(self) -> Sequence[Replica]:
        return self.members

    @property
    def flush_receivers(self) -> Sequence[Replica]:
        return self.membership.receivers if self.joining else self.members

    @property
    def uniform_members(self) -> Sequence[Replica]:
        return () if self.agreement or self.content else self.membership.members

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
        unreadable = self.agreement.unreadable
        if unreadable and unreadable.overlaps(offset, offset + length):
            return ()
        touched, per_extent = self.marks.intents.touched, self.marks.extent_chunks
        touched[first // per_extent] = touched[last // per_extent] = 1  # there is none between
        self.epochs.latest.add(chunks)
        return self._receivers_of(chunks)

    def prepared(self, offset: int, length: int, *, repair: bool = False) -> bool:
        ready = self.in_use and self.membership.recorded and (repair or not self.unentered)
        chunks = self.map.chunks(offset, length)
        return ready and self.recorded.holds(chunks, self.membership.member_bits)

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        chunks = self.map.chunks(offset, length)
        self.note_written(chunks)
        return self._receivers_of(chunks)

    @contextmanager
    def giving(self, replicas: Sequence[Replica], offset: int, length: int) -> Iterator[None]:
        chunks = self.map.chunks(offset, length)
        self.marks.touch(chunks)
        with self.epochs.giving(replicas, chunks):
            yield
        self.marks.touch(chunks)

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        self.chunks.begin_flush(self.flush_receivers, self.chunks_of(changing))

    def tell_loss(self) -> bool:
        return self.chunks.tell_loss()

    def read_segments(self, offset: int, length: int) -> Iterable[ReadSegment]:
        if self.uniform_members:
            return [ReadSegment(offset, length, list(self.members))]
        return self.chunks.sources.read_segments(offset, length)

    def may_differ(self, offset: int, length: int) -> bool:
        chunks, divergent = self.map.chunks(offset, length), self.agreement.divergent
        return bool(divergent) and divergent.overlaps(chunks.start, chunks.stop)

    def missed(self, replica: Replica) -> RangeSet:
        away = any(member.state is Standing.MISSING for member in self.members)
        doubtful = RangeSet()
        if self.membership.recorded and not away:
            return doubtful
        # One that is away may alone hold something there: nobody else's hole counts, until it is
        # on record as ejected.
        for start, end in self.agreement.divergent:
            doubtful.add(*self.map.bounds_of(range(start, end)))
        return doubtful

    def pin_source(self, replica: Replica, offset: int, length: int) -> None:
        self.chunks.sources.pin_source(replica, self.map.chunks(offset, length))

    def unsynced(self, offset: int, length: int) -> bool:
        return self.chunks.unsynced(self.map.chunks(offset, length))

    def unverified(self, offset: int, length: int) -> bool:
        return self.map.any(UNVERIFIED, self.map.chunks(offset, length))

    def lossy(self, offset: int, length: int) -> bool:
        return self.content.lacks_any(self.map.chunks(offset, length))

    def unflushable(self) -> bool:
        return self.chunks.unflushable()

    @property
    def unreadable(self) -> RangeSet:
        return self.agreement.unreadable

    # What the sidecars and the repairs ask and tell

    @property
    def members(self) -> Sequence[Replica]:
        """The current replicas."""
        return self.membership.members

    @property
    def target(self) -> Target | None:
        """The replica that is being resynced."""
        return self.targets.resyncing

    @property
    def resyncing(self) -> Replica | None:
        """The replica of the target."""
        return None if self.target is None else self.target.replica

    def is_target(self, replica: Replica) -> bool:
        """Whether *replica* is being resynced."""
        return self.resyncing is replica

    @property
    def joining(self) -> bool:
        """Whether a target is becoming current: from here on flushes wait for it, too."""
        return self.target is not None and self.target.joining

    @property
    def unentered(self) -> bool:
        """Whether it is not on record that this mount may change the disk, and must be.

        Nothing is acknowledged by too few: then the record would say too much.
        """
        return not self.records.entered and len(self.members) >= self.threshold

    @property
    def may_record(self) -> bool:
        """Whether enough are current to have it on record who is not, before anything changes."""
        return self.membership.recorded or len(self.members) >= self.records.quorum

    def chunks_of(self, ranges: Iterable[tuple[int, int]]) -> Iterator[range]:
        """The chunks of each of *ranges* (start, end; bytes)."""
        return (self.map.chunks(start, end - start) for start, end in ranges)

    def note_written(self, chunks: range) -> None:
        """Note that a change of *chunks* begins or ends."""
        self.marks.touch(chunks)
        self.epochs.latest.add(chunks)

    def target_for_repair(self, offset: int, length: int) -> list[Replica]:
        """The target, if it is to be given what a repair gives to others.

        A repair beside a member that never syncs comes again and again: the target would lack for
        ever what it was not given.
        """
        receivers = self._receivers_of(self.map.chunks(offset, length), mirrored=True)
        return [replica for replica in receivers if self.is_target(replica)]

    def _receivers_of(self, chunks: range, *, mirrored: bool = False) -> Sequence[Replica]:
        """Whom a change of *chunks* that begins now goes to; the others lack it.

        *mirrored*: the target, too, where it lacks nothing.
        """
        if self.membership.out_bits:
            self.recorded.add(self.membership.out_bits, chunks)
        target = self.targets.resyncing
        if target is None or target.gets(chunks, mirrored=mirrored):
            return self.membership.receivers
        return self.members

    def equalized(self, chunks: range) -> None:
        """Note that all members were given the same in *chunks*."""
        self.chunks.equalized(chunks)
        self.marks.touch(chunks)

    # What a flush did

    def sync_ended(self, replica: Replica, operation: Operation) -> None:
        """Stop to believe a replica whose sync failed, before the slowest one has answered."""
        if operation.kind is not Kind.SYNC or operation.error is None:
            return
        if self.joining and self.is_target(replica):
            # Of two syncs the other one, of the join itself, may have been told nothing.
            self.targets.of(replica).lacks_unsynced()
        if replica.standing is Standing.CURRENT:
            self.chunks.suspend(replica)

    def unfit(self, outcomes: Sequence[Outcome]) -> list[Replica]:
        """Who could not make writes durable, by a flush; raises `OSError` if too few could."""
        failed = [o.replica for o in outcomes if o.error is not None]
        if not self.in_use and not self.agreement.inherited and not failed:
            return []  # nothing was ever written
        lossy = self.chunks.lossy_in_flush()
        good = [
            replica
            for replica, _ in outcomes
            if replica.standing is Standing.CURRENT and replica not in lossy.union(failed)
        ]
        if len(good) < self.threshold:
            raise voted_error(o.error for o in outcomes if o.error is not None)
        return [*failed, *(replica for replica in self.members if replica in lossy)]

    # Who is what

    @property
    def least(self) -> int:
        """How many current replicas must be left."""
        return max(self.threshold, self.records.quorum)

    def enough_without(self, gone: Sequence[Replica]) -> bool:
        """Whether enough are left if *gone* are ejected, and hold all that those hold."""
        left = len(self.members) - len(gone)
        return left >= self.least and not self.chunks.sources.held_only_by(gone)

    def all_current(self) -> bool:
        """Whether every replica of the record is current, and the set is in use."""
        return self.in_use and self.membership.recorded and not self.chunks.outside

    @property
    def may_clear_marks(self) -> bool:
        """Whether there may be marks to clear, or extents to look at anew."""
        return self.marks.in_use or (self.all_current() and self.marks.idle)

    def arrange(self) -> None:
        """Follow the replicas' roles."""
        self.membership = Membership.of(
            () if self._fenced else self.replicas,
            self.records,
            in_use=self.in_use,
            joining=self.joining,
        )
        self.content.members = self.members
        self.chunks.outside = _bits_but(self.members, self.record)
        self.epochs.follow(self.membership.receivers)

    def eject(self, gone: Iterable[Replica], reason: str) -> None:
        """Make current replicas stale, in memory."""
        for replica in gone:
            replica.standing = Standing.STALE
            replica.reason = reason
            target = self.targets.of(replica)
            target.eject()
            target.lacks_unsynced()
            for run in self.epochs.unsynced(replica):
                self.targets.lost_by(replica, run)
            for start, end in self.agreement.divergent:
                target.lacks(range(start, end))
            self.content.forget(replica)
        self.arrange()
        self.notify()

    def give_up_target(self, reason: str) -> Replica:
        """Make the target stale again, in memory: it keeps what it has. Returns it."""
        target = self.target
        assert target is not None
        self.targets.resyncing = None
        target.lacks_unsynced()
        replica = target.replica
        self.content.forget(replica)
        replica.standing = Standing.STALE
        replica.reason = reason
        self.arrange()
        self.notify()
        return replica

    def joined(self) -> None:
        """Note that the target, which is current on record, is it in memory, too.

        What it did not get while it joined, it lacks as a member.
        """
        assert self.target is not None
        lacking = list(self.map.runs(self.target.bit, longest=len(self.map)))
        replica = self.target.replica
        self.targets.joined()
        self.content.recall(replica)
        for run in lacking:
            self.chunks.diverge(run)

    def fence(self) -> None:
        """Note that the set is another mount's: nobody is current here."""
        self._fenced = True
        self.arrange()
        self.notify()


def _bits_but(replicas: Sequence[Replica], record: Record) -> int:
    """``out_of_sync`` of the slots of all but *replicas*."""
    slots = {replica.slot for replica in replicas}
    return sum(out_of_sync(slot) for slot in range(len(record.roles)) if slot not in slots)
