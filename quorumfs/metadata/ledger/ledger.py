"""The ledger of a set: which replica holds which data. Pure: no I/O, no clock, no waiting.

Every change of this knowledge is made here, or in a module that the ledger joins:

* `quorumfs.metadata.ledger.commit`: what the record says of each replica;
* `quorumfs.metadata.ledger.chunks`: the state of each chunk on each replica, and the agreement;
* `quorumfs.metadata.ledger.recorded`: the map of marks and bits as *known*, against the part of the
  map *recorded* in the sidecars;
* `quorumfs.metadata.ledger.marks`: the extents marked because writes may come.

Many states are kept in memory alone: in the sidecars an ``INTENT`` mark stands for them.
`quorumfs.metadata.sidecars` asks the ledger, writes and waits.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED, out_of_sync
from quorumfs.decisions.model import Found, Plan, Standing
from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.record import Record
from quorumfs.decisions.returned import OFFLINE
from quorumfs.decisions.voting import voted_error
from quorumfs.metadata.ledger.chunks import Chunks
from quorumfs.metadata.ledger.commit import Records
from quorumfs.metadata.ledger.content import bit
from quorumfs.metadata.ledger.knowledge import Outcome, ReadSegment, Replicas, Writable
from quorumfs.metadata.ledger.marks import Marks
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.metadata.ledger.target import Target
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation


@dataclass(frozen=True, slots=True)
class Membership:
    """The replicas that take part: a frozen snapshot, replaced at each change."""

    members: tuple[Replica, ...]
    """The current replicas."""
    receivers: tuple[Replica, ...]
    """The replicas that writes may go to: the members, and the target of a resync."""
    out_bits: int
    """``out_of_sync`` bits of all slots without a receiver."""
    member_bits: int
    """``out_of_sync`` bits of the members."""
    recorded: bool
    """Only members can be taken for current by a reader of any sidecar."""
    ready: bool
    """A change of marked chunks may begin at once: by the record this mount may change the disk,
    enough replicas are current, and no target is joining."""

    @classmethod
    def of(
        cls, replicas: Sequence[Replica], records: Records, *, in_use: bool, joining: bool
    ) -> "Membership":
        """The membership by the standings of *replicas* and by *records*."""
        members = tuple(one for one in replicas if one.standing.is_member)
        receivers = tuple(one for one in replicas if one.standing.is_written)
        # `Ledger.receivers` leaves out one replica at most, and marks what that one misses.
        assert len(receivers) <= len(members) + 1
        recorded = records.names_only(members)
        may_change = in_use and recorded and records.entered
        member_bits = sum(map(bit, members))
        return cls(
            members,
            receivers,
            _bits_but(receivers, records.record),
            member_bits,
            recorded=recorded,
            ready=may_change and not joining and len(members) >= records.threshold,
        )


class Ledger:
    """The knowledge of a set that the sidecars hold or are to hold, and all conclusions."""

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
        """*replicas*, the plan's members in the same order, each with its files *found*, get their
        slots and standings. *notify* is called when a repair may be due.
        """
        self.map = plan.map
        self.records = records
        self.recorded = Recorded(plan.map)
        self.chunks = Chunks(self.recorded, records, repairing=not read_only, notify=notify)
        self.epochs = self.chunks.epochs
        self.agreement = self.chunks.agreement
        self.content = self.chunks.content
        self.targets = self.chunks.targets
        self.marks = Marks(self.recorded, self.agreement)
        self.in_use = False
        """The record in the sidecars names the set as in use by this mount."""
        self.membership = Membership((), (), 0, 0, recorded=False, ready=False)
        self.replicas: Sequence[Replica] = tuple(replicas)
        self._fenced = False
        """A different mount has the set: there are no members here."""
        self.notify = notify
        for replica, member, one in zip(replicas, plan.members, found, strict=True):
            replica.slot, replica.standing, replica.reason = (
                member.slot,
                member.state,
                member.reason,
            )
            if replica.slot is not None and not replica.standing.is_member:
                self.targets.of(replica)
            if one.is_short(self.record.size) and replica.slot is not None:
                self.recorded.add(bit(replica), range(len(self.map)))
            if one.image and one.sidecar and replica.standing.is_member:
                for start, end in one.sidecar.unreadable:
                    self.agreement.unreadable.add(start, end)
                self.recorded.found(one.sidecar.map)
        self.arrange()
        self.chunks.sources.believe_last(plan.unmarked)
        self.chunks.recall(crashed=not self.record.clean)

    @property
    def record(self) -> Record:
        """The latest valid record, held by all replicas current in the record."""
        return self.records.record

    @property
    def threshold(self) -> int:
        """The number of replicas that must take a write before its acknowledgement."""
        return self.records.threshold

    # Questions and events of the disk

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

    def writable(self) -> Writable | None:
        membership, target = self.membership, self.target
        if not membership.ready or self.agreement.torn or self.content:
            return None
        mask = INTENT | UNVERIFIED | membership.member_bits | membership.out_bits
        wanted = INTENT | membership.out_bits  # what else a change would set, it finds set
        kept_out = [*self.agreement.unreadable, *self.recorded.lagging(membership.member_bits)]
        if target is not None:
            mask |= target.bit
            if not target.mirroring:  # a change makes chunks LACKING: only where they are
                wanted |= target.bit
                kept_out += [self.map.bounds_of(target.given)] if target.given else []
        return Writable(
            self.receivers, self.map.chunk_size, self.map.planes, mask, wanted, kept_out
        )

    def wrote(self, chunks: Collection[int]) -> None:
        self.marks.touch_all(chunks)
        self.epochs.latest.update(chunks)

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
        away = any(not member.state.answers for member in self.members)
        doubtful = RangeSet()
        if self.membership.recorded and not away:
            return doubtful
        # A missing member may alone hold data there: until its ejection is recorded, no hole of
        # another member counts.
        for start, end in self.agreement.divergent:
            doubtful.add(*self.map.bounds_of(range(start, end)))
        return doubtful

    def note_shown(self, by: Replicas, others: Replicas, offset: int, length: int) -> None:
        self.chunks.sources.note_shown(by, others, self.map.chunks(offset, length))

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

    # Questions and events of sidecars and repairs

    @property
    def members(self) -> Sequence[Replica]:
        """The current replicas."""
        return self.membership.members

    @property
    def target(self) -> Target | None:
        """The target of the resync; None without a resync."""
        return self.targets.resyncing

    @property
    def resyncing(self) -> Replica | None:
        """The replica of the target; None without a resync."""
        return None if self.target is None else self.target.replica

    def is_target(self, replica: Replica) -> bool:
        """Whether *replica* is the target."""
        return self.resyncing is replica

    @property
    def joining(self) -> bool:
        """Whether the target is joining: flushes wait for a joining target, too."""
        return self.target is not None and self.target.joining

    @property
    def unentered(self) -> bool:
        """Whether the record must still be made to say: this mount may change the disk.

        Not with too few members: they acknowledge no change, and the record would say too much.
        """
        return not self.records.entered and len(self.members) >= self.threshold

    @property
    def may_record(self) -> bool:
        """Whether enough replicas are current to record all ejections before a change."""
        return self.membership.recorded or len(self.members) >= self.records.quorum

    def chunks_of(self, ranges: Iterable[tuple[int, int]]) -> Iterator[range]:
        """The chunks of each of *ranges* (start, end; bytes)."""
        return (self.map.chunks(start, end - start) for start, end in ranges)

    def note_written(self, chunks: range) -> None:
        """Note the start or the end of a change of *chunks*."""
        self.marks.touch(chunks)
        self.epochs.latest.add(chunks)

    def target_for_repair(self, offset: int, length: int) -> list[Replica]:
        """The target, if a repair of the range must include the target.

        While a member never syncs, repairs are repeated: a target left out would lack the range for
        ever.
        """
        receivers = self._receivers_of(self.map.chunks(offset, length), mirrored=True)
        return [replica for replica in receivers if self.is_target(replica)]

    def _receivers_of(self, chunks: range, *, mirrored: bool = False) -> Sequence[Replica]:
        """The receivers of a change of *chunks* that begins now; all other replicas lack *chunks*.

        *mirrored*: include the target unless the target lacks all of *chunks*.
        """
        if self.membership.out_bits:
            self.recorded.add(self.membership.out_bits, chunks)
        target = self.targets.resyncing
        if target is None or target.gets(chunks, mirrored=mirrored):
            return self.membership.receivers
        return self.members

    def equalized(self, chunks: range) -> None:
        """Note equal data of *chunks* on all members, after a repair."""
        self.chunks.equalized(chunks)
        self.marks.touch(chunks)

    # Flushes

    def sync_ended(self, replica: Replica, operation: Operation) -> None:
        """Stop believing *replica* after a failed sync, before the slowest replica has answered."""
        if operation.kind is not Kind.SYNC or operation.error is None:
            return
        if self.joining and self.is_target(replica):
            # The kernel may report an error to this sync only, and not to the sync of the join.
            self.targets.of(replica).lacks_unsynced()
        if replica.standing.is_member:
            self.chunks.suspend(replica)

    def unfit(self, outcomes: Sequence[Outcome]) -> list[Replica]:
        """The failed or lossy replicas to eject after a flush; `OSError` if too few are left."""
        failed = self.chunks.failed(outcomes)
        if not self.in_use and not self.agreement.inherited and not failed:
            return []  # no write ever came
        lossy = self.chunks.lossy_in_flush()
        good = [
            replica
            for replica, _ in outcomes
            if replica.standing.is_member and replica not in lossy.union(failed)
        ]
        if len(good) < self.threshold:
            raise voted_error(o.error for o in outcomes if o.error is not None)
        return [*failed, *(replica for replica in self.members if replica in lossy)]

    # Standings

    @property
    def least(self) -> int:
        """The least number of members that an ejection must leave."""
        records = self.records
        return max(records.threshold, records.next_threshold or 0, records.quorum)

    def enough_without(self, gone: Sequence[Replica]) -> bool:
        """Whether without *gone* enough members are left, and hold all data that *gone* hold."""
        left = len(self.members) - len(gone)
        return left >= self.least and not self.chunks.sources.held_only_by(gone)

    def all_current(self) -> bool:
        """Whether every replica of the record is current, and the set is in use."""
        return self.in_use and self.membership.recorded and not self.chunks.outside

    @property
    def may_clear_marks(self) -> bool:
        """Whether there may be marks to clear, or extents to count as unused."""
        intents = self.marks.intents
        return any(intents.in_use()) or (self.all_current() and any(intents.idle()))

    def arrange(self) -> None:
        """Rebuild the membership from the replicas' standings."""
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
        """Make the members *gone* stale, in memory."""
        for replica in gone:
            self._put_out(replica, reason)
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
        """Make the target stale again, in memory, keeping its chunks; returns the replica."""
        target = self.target
        assert target is not None
        self.targets.resyncing = None
        target.lacks_unsynced()
        replica = target.replica
        self.content.forget(replica)
        self._put_out(replica, reason)
        self.arrange()
        self.notify()
        return replica

    def _put_out(self, replica: Replica, reason: str) -> None:
        replica.standing, replica.reason = Standing.STALE, reason
        if replica.slot is not None and self.records.is_offline(replica.slot):
            replica.standing, replica.reason = Standing.OFFLINE, OFFLINE

    def joined(self) -> None:
        """Make the target, recorded as current, a member in memory, too.

        Chunks that the target missed while joining are LACKING on the new member.
        """
        assert self.target is not None
        lacking = list(self.map.runs(self.target.bit, longest=len(self.map)))
        replica = self.target.replica
        self.targets.joined()
        self.content.recall(replica)
        for run in lacking:
            self.chunks.diverge(run)

    def fence(self) -> None:
        """Note a takeover of the set by a different mount: there are no members here any more."""
        self._fenced = True
        self.arrange()
        self.notify()


def _bits_but(replicas: Sequence[Replica], record: Record) -> int:
    """``out_of_sync`` bits of all slots but those of *replicas*."""
    slots = {replica.slot for replica in replicas}
    return sum(out_of_sync(slot) for slot in record.slots if slot not in slots)
