"""``metadata=sidecar``: a durable record of who holds what, beside every image.

A replica is current, or it is left behind as a whole: then nothing is read from it until it has
been caught up (`quorumfs.repair`). Three things are kept in memory and in the sidecars of
all current replicas:

* the *record* says who is current. It changes under one lock, in two phases
  (`quorumfs.metadata.commit`), and before anything that depends on it is acknowledged (R3);
* ``INTENT`` marks: durable before the first write to an extent of the disk (R1), cleared when it
  has not been written to for long and all replicas are current and synced (R5);
* the ``lacks`` bits of each replica left behind. In the sidecars they may be old: after a crash a
  replica lacks whatever has its bit or an ``INTENT`` mark. A current replica has them where it lost
  what it could not flush, and too few would be left without it.

The map of marks and bits is *known* here before it is *recorded* in the sidecars
(`quorumfs.metadata.recorded`). Which extents are to be marked decides `quorumfs.metadata.intents`.

Two things are in memory alone, because an ``INTENT`` mark stands for them in the sidecars: where
the current replicas may differ (`quorumfs.metadata.doubts`), and what each was given since its last
good sync (`quorumfs.metadata.epochs`: a replica that fails may have lost it).
"""

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import trio

from quorumfs.assembly import Found, Plan, State
from quorumfs.claim import CHECK_S, Claim, Tenure, decode_claim, encode_claim
from quorumfs.dirtymap import INTENT, UNVERIFIED, lacks
from quorumfs.metadata import Choice, Outcome
from quorumfs.metadata.commit import GiveUp, LeaveBehind, Records, Write
from quorumfs.metadata.doubts import Doubts
from quorumfs.metadata.epochs import Epochs
from quorumfs.metadata.intents import Intents
from quorumfs.metadata.recorded import Recorded
from quorumfs.metadata.target import Target
from quorumfs.metadata.writer import SidecarWriter, identities_of
from quorumfs.ranges import RangeSet
from quorumfs.replica import Gathering, Replica
from quorumfs.sidecar import (
    CLAIM_OFFSET,
    MAP_OFFSET,
    PAGE,
    UNREADABLE_MAX,
    UNREADABLE_OFFSET,
    Record,
    RoleState,
    encode_pages,
    encode_unreadable,
    page_runs,
    pages,
    random_identity,
)
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


class Sidecars:
    """`quorumfs.metadata.Metadata` in the sidecars of the replicas."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        plan: Plan,
        found: Sequence[Found],
        *,
        threshold: int,
        read_only: bool = False,
        identity: int | None = None,
        tenure: Tenure | None = None,
    ) -> None:
        """*replicas* are the plan's members in the same order, with what was *found* of them.

        *identity*: the 64-bit number of this mount, not 0; None: that of its claim, or a random
        one. *tenure*: what the claims in the sidecars are judged by; None: they are not looked at.
        """
        if identity is None:
            mine = tenure and tenure.mine
            identity = mine.mount if mine else random_identity()
        self.replicas = tuple(replicas)
        self._records = Records(plan, threshold=threshold, identity=identity)
        self.map = plan.map
        self.threshold = threshold
        self._read_only = read_only
        self.tenure = tenure or Tenure(None)
        self._watched = tenure is not None
        self.fenced: Claim | None = None
        """Who has the set instead of this mount, which from then on reads and writes nothing."""
        self.when_fenced: Callable[[Claim], None] = lambda _: None
        self.changed = trio.Event()
        """Set, and replaced, when there may be something to repair; see `notify`."""
        self._recorded = Recorded(plan.map)
        self.doubts = Doubts(self._recorded, threshold, settling=not read_only)
        self._in_use = False
        """The record in the sidecars says that the set is in use by this mount."""
        self._lock = trio.Lock()
        """Whoever writes to the sidecars holds it."""
        self._extent_chunks = self.map.extent // self.map.chunk_size
        self._intents = Intents(self.map)
        self._epochs = Epochs()
        """Who has synced what was changed, of those who get what is written."""
        self._diverged_in = self._epochs.now
        """The epoch in which a chunk was last unsettled."""
        self._targets: dict[Replica, Target] = {}
        """What each replica holds that is not current on record."""
        self.target: Target | None = None
        """The one that is being resynced."""
        self._flush = _Flush(0, set())
        self._unreadable_number = 0
        """How often the list of what cannot be read was written."""
        self._untold_loss = False
        """All current replicas lost a write that was acknowledged, and no flush of a guest has
        failed since (R13): whoever else had them sync heard of it instead."""
        self._writer = SidecarWriter(threshold)
        self._membership = Membership((), (), 0, 0, recorded=False, ready=False)
        for replica, member, one in zip(replicas, plan.members, found, strict=True):
            replica.slot = member.slot
            replica.settled = partial(self._sync_ended, replica)
            replica.let_go = self.notify
            replica.role = member.state
            replica.reason = member.reason
            if replica.slot is not None and replica.role is not State.CURRENT:
                self._target_of(replica)
            if one.image and one.image.size < self.record.size and replica.slot is not None:
                self._recorded.add(lacks(replica.slot), range(len(self.map)))
            if one.image and one.sidecar:
                self._know(replica, one)
                if replica.role is State.CURRENT:
                    for start, end in one.sidecar.unreadable:
                        self.doubts.unreadable.add(start, end)
                    self._recorded.found(one.sidecar.map)
        self._arrange()
        self._tear_marked()
        self._recall_lost()
        self._unsettle_marked()

    @property
    def record(self) -> Record:
        """The latest that is valid on all replicas that are current in it."""
        return self._records.record

    @property
    def membership_recorded(self) -> bool:
        """Whether a replica can be taken for current, by the sidecars, only if it is current."""
        return self._membership.recorded

    # What the disk asks and tells

    @property
    def receivers(self) -> Sequence[Replica]:
        mirroring = self.target is not None and self.target.mirroring
        return self._membership.receivers if mirroring else self.members

    @property
    def readers(self) -> Sequence[Replica]:
        return self.members

    @property
    def flushed(self) -> Sequence[Replica]:
        return self._membership.receivers if self.joining else self.members

    @property
    def alike(self) -> Sequence[Replica]:
        return () if self.doubts else self._membership.members

    async def record_options(self) -> None:
        async with self._lock:
            # With the operator's word it is in force, and recorded with the first change: what is
            # only read decides nothing.
            consented = self._records.quorum <= self.threshold < self.record.threshold
            told = self.threshold != self.record.threshold and not self._read_only
            enough = len(self.members) >= self._records.quorum  # else nothing is acknowledged yet
            if consented or not told or not enough:
                return
            await self._write_map_locked()
            await self._commit(clean=self.record.clean)

    def begin_now(self, offset: int, length: int) -> Sequence[Replica]:
        # As `prepared` and `begin` together: on the path of every write, so it is spelled out.
        size = self.map.chunk_size
        first, last = offset // size, (offset + length - 1) // size
        if not self._membership.ready:
            return ()
        looked_at = self._membership.looked_at
        for state in self.map.states[first : last + 1]:
            if state & looked_at != INTENT:
                return ()
        chunks = range(first, last + 1)
        if self._recorded.behind and not self._recorded.holds(chunks):
            return ()
        unreadable = self.doubts.unreadable
        if unreadable and unreadable.overlaps(offset, offset + length):
            return ()
        touched, per_extent = self._intents.touched, self._extent_chunks
        touched[first // per_extent] = touched[last // per_extent] = 1  # there is none between
        self._epochs.latest.add(chunks)
        return self._receivers_of(chunks)

    def prepared(self, offset: int, length: int, *, repair: bool = False) -> bool:
        ready = self._in_use and self.membership_recorded and (repair or not self._unentered)
        return ready and self._recorded.holds(self.map.chunks(offset, length))

    @property
    def _unentered(self) -> bool:
        """Whether it is not on record that this mount may change the disk, and must be.

        Nothing is acknowledged by too few: then the record would say too much.
        """
        return not self._records.entered and len(self.members) >= self.threshold

    async def prepare(
        self, offset: int, length: int, *, ahead: bool = False, repair: bool = False
    ) -> None:
        extents = self.map.extents(offset, length)
        while not self.prepared(offset, length, repair=repair):
            await self.open(to_change=not repair)
            if not self.membership_recorded:
                raise OSError(errno.EIO, "too few replicas are current")
            if span := self._intents.want(extents, self._may_mark, ahead=ahead):
                self._recorded.add(INTENT, self.map.extent_chunks(span))
            await self._write_map()

    def _may_mark(self, extents: range) -> bool:
        """Whether *extents* may be marked that are not about to be written to.

        Not what was never compared: a mark says there that a write may have torn it.
        """
        return not self.map.any(UNVERIFIED, self.map.extent_chunks(extents))

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        chunks = self.map.chunks(offset, length)
        self._note_written(chunks)
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
        self._intents.touch(self._extents_of(chunks))
        with self._epochs.giving(replicas, chunks):
            yield
        self._intents.touch(self._extents_of(chunks))

    def _receivers_of(self, chunks: range, *, mirrored: bool = False) -> Sequence[Replica]:
        """Whom a change of *chunks* that begins now goes to; the others lack it.

        *mirrored*: the target, too, where it lacks nothing.
        """
        if self._membership.out_bits:
            self._recorded.add(self._membership.out_bits, chunks)
        if self.target is None or self.target.gets(chunks, mirrored=mirrored):
            return self._membership.receivers
        return self.members

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        self.require_ours()
        chunks = self.map.chunks(offset, length)
        self._note_written(chunks)
        failed = [replica for replica, operation in outcomes if operation.error is not None]
        if not failed and self.membership_recorded and len(self.members) >= self.threshold:
            self.doubts.mend(offset, offset + length)
            return
        current = [o for o in outcomes if o.replica.role is State.CURRENT]
        if sum(o.error is None for o in current) < self.threshold:
            # Nobody is blamed; but who took it and who did not now differ.
            self._unsettle(chunks)
            self.doubts.tear(offset, offset + length)
            await self._leave_behind([r for r in failed if self.is_target(r)], chunks, _WRITE)
            raise voted_error(o.error for o in current or outcomes if o.error is not None)
        try:
            await self._leave_behind(failed, chunks, _WRITE)
        except OSError:
            self._unsettle(chunks)
            self.doubts.tear(offset, offset + length)
            raise
        self.doubts.mend(offset, offset + length)

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        epoch = self._epochs.begin_sync(self.flushed, self._chunks_of(changing))
        self._flush = _Flush(epoch, self.doubts.lossy)

    def _chunks_of(self, ranges: Iterable[tuple[int, int]]) -> Iterator[range]:
        return (self.map.chunks(start, end - start) for start, end in ranges)

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        self.require_ours()
        try:
            await self._record_flush(outcomes)
        except OSError:
            await self._lose([o.replica for o in outcomes if o.error is not None])
            self._end_flush()
            raise
        self._end_flush()

    async def _record_flush(self, outcomes: Sequence[Outcome]) -> None:
        """Leave behind who could not make writes durable. Raises `OSError` if too few could."""
        if self._read_only:
            return  # there is nothing to make durable, and nothing may be recorded
        failed = [o.replica for o in outcomes if o.error is not None]
        # Its sync may have begun before what it had lost was written again.
        lossy = self._flush.lossy | self.doubts.lossy
        if not self._in_use and not self.doubts.inherited and not failed:
            return  # nothing was ever written
        unfit = lossy.union(failed)
        good = [r for r, _ in outcomes if r.role is State.CURRENT and r not in unfit]
        if len(good) < self.threshold:
            raise voted_error(o.error for o in outcomes if o.error is not None)
        if unfit or not self.membership_recorded:
            lossy_members = [replica for replica in self.members if replica in lossy]
            reason = "it could not make writes durable"
            await self._leave_behind([*failed, *lossy_members], range(0), reason)

    def _end_flush(self) -> None:
        # Whoever could not sync it is on record as having lost it, or as left behind; the others
        # have it. Not so after any other exception: then the next flush is to cover it. And of two
        # syncs that a target has under way when it joins, the other one may yet be told of it.
        self._epochs.cover(self.members, self._flush.epoch)
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
        if self.membership_recorded and not away:
            return _NOTHING
        # One that is away may alone hold something there: nobody else's hole counts, until it is
        # on record as left behind.
        doubtful = RangeSet()
        for start, end in self.doubts.unsettled:
            doubtful.add(*self.map.bounds_of(range(start, end)))
        return doubtful

    def answered(self, replica: Replica, offset: int, length: int) -> None:
        self.doubts.answered(replica, self.map.chunks(offset, length))

    async def truncated(self, replica: Replica) -> None:
        if replica.slot is None or replica in self.doubts.truncated:
            return
        everything = range(len(self.map))
        if replica.role is State.CURRENT:  # it is left behind for that, as soon as it can be
            self.doubts.truncated.add(replica)
            self.doubts.losses += 1
            self._recorded.add(lacks(replica.slot), everything)
            if self._read_only:
                return
            try:
                await self._leave_behind([replica], range(0), "its image was truncated")
            except OSError:  # the others would be too few
                with suppress(OSError):
                    await self._write_map()
            return
        self._targets[replica].lacks(everything)
        if not self._read_only and self.may_record:
            with suppress(OSError):  # it may get its length back, and look whole to the next mount
                await self.open()
                await self._write_map()

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        self.target_missed(offset, length)  # it may hold what this replica held
        await self.given(replica, offset, length, well=well)

    async def given(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        """As `repaired`, where the target was given the same."""
        if not well:
            chunks = self.map.chunks(offset, length)
            with suppress(OSError):  # without it the rest would be too few: it stays
                await self._leave_behind([replica], chunks, "a range of it cannot be repaired")

    async def close(self) -> None:
        if self._read_only:
            return
        async with self._lock:
            await self._look_at_claims(self._membership.receivers)
            self.require_ours()
            if not self.membership_recorded or (self.record.clean and not self._in_use):
                await self._write_map_locked()
                return
            if self.target is not None:
                self._drop_target("unmounted meanwhile")
            # By its number, a replica put back from before this is known for one that has no mark
            # for what it lacks.
            for target in self._targets.values():
                target.doubt_log()
            await self._commit(clean=True)
            self._in_use = False
            self._arrange()
            self._recorded.remove(INTENT, range(len(self.map)))
            for chunks in self.doubts.to_remember():
                self._recorded.add(INTENT, chunks)
            await self._write_map_locked()

    def is_target(self, replica: Replica) -> bool:
        """Whether *replica* is being resynced."""
        return self.target is not None and self.target.replica is replica

    @property
    def joining(self) -> bool:
        """Whether a target is becoming current: from here on flushes wait for it, too."""
        return self.target is not None and self.target.joining

    @property
    def writing(self) -> bool:
        """Whether a record, or a part of the map, is being made durable."""
        return self._lock.locked()

    # Whose the set is

    async def watch(self) -> None:
        """Look again and again whether the set is still this mount's, until cancelled.

        Also while it is idle: on this host's own file systems that is a look into the page cache,
        which wakes no disk, and where others can write, a small request to a server.
        """
        if not self._watched:
            return
        async with trio.open_nursery() as nursery:  # one that hangs must not hide what others say
            for replica in self.replicas:
                nursery.start_soon(self._watch, replica)

    async def _watch(self, replica: Replica) -> None:
        while self.fenced is None:
            await trio.sleep(CHECK_S)
            if replica in self._membership.receivers and replica.attached:
                await self._look_at_claims([replica])

    async def _look_at_claims(self, replicas: Sequence[Replica]) -> None:
        """Read the claims in these sidecars back. One that cannot be read tells nothing."""
        if not self._watched or self.fenced is not None:
            return
        gathering = Gathering(0)
        asked = [Operation(Kind.REREAD, CLAIM_OFFSET, PAGE) for _ in replicas]
        for replica, operation in zip(replicas, asked, strict=True):
            gathering.submit(replica, operation, to_sidecar=True)
        await gathering.complete()
        for operation in asked:
            if operation.error is None and isinstance(operation.value, bytes | bytearray):
                claim = decode_claim(bytes(operation.value))
                if claim is not None and self.tenure.lost_to(claim):
                    self._fence(claim)

    def _fence(self, claim: Claim) -> None:
        """Have nothing to do with the files any more, for good: they are *claim*'s."""
        if self.fenced is not None:
            return
        self.fenced = claim
        for replica in self._membership.receivers:
            # What this host has cached and not written yet, on a network file system, it would
            # write some time later, over what is newer. Now the other one still waits for it.
            replica.submit(Operation(Kind.SYNC), Gathering(0))
        for replica in self.replicas:
            replica.fence()
        self._arrange()
        self.when_fenced(claim)
        self.notify()

    def require_ours(self) -> None:
        if self.fenced is not None:
            raise OSError(errno.EIO, f"fenced: the set was taken over by {self.fenced}")

    async def release(self) -> None:
        mine = self.tenure.mine
        if mine is None:
            return
        away = (State.FOREIGN, State.MISSING)
        signed = [r for r in self.replicas if r.attached and r.role not in away]
        await self._look_at_claims(signed)
        if self.fenced is None:
            await self._writer.put(signed, (CLAIM_OFFSET, encode_claim(mine.release())))

    # What repairs ask and tell

    @property
    def members(self) -> Sequence[Replica]:
        """The current replicas."""
        return self._membership.members

    @property
    def may_record(self) -> bool:
        """Whether enough are current to have it on record who is not, before anything changes."""
        return self.membership_recorded or len(self.members) >= self._records.quorum

    def notify(self) -> None:
        """Tell the repairs that there may be something to do."""
        self.changed.set()
        self.changed = trio.Event()

    async def open(self, *, to_change: bool = False) -> None:
        """Have the record say that the set is in use, and, given a quorum, who is left behind.

        *to_change*: and that this mount may change the disk. To make replicas equal is no change.
        """
        if self._in_use and self.membership_recorded and not (to_change and self._unentered):
            return
        async with self._lock:
            unrecorded = not self.membership_recorded and len(self.members) >= self._records.quorum
            if not self._in_use or unrecorded or (to_change and self._unentered):
                self._records.changing = self._records.changing or to_change
                # The map first: who is now said to be stale lacks what it says.
                await self._write_map_locked()
                await self._commit(clean=False)
                self._in_use = True
                self._arrange()

    def settled(self, chunks: range) -> None:
        """Note that all current replicas hold the same in *chunks*."""
        self.doubts.settled(chunks)
        self._intents.touch(self._extents_of(chunks))

    def unsynced(self, offset: int, length: int) -> bool:
        chunks = self.map.chunks(offset, length)
        return any(self._epochs.waits(replica, chunks) for replica in self.members)

    def durable_on(self, replica: Replica, offset: int, length: int) -> bool:
        """Whether *replica* is current, and what it shows of a range is known to be durable."""
        chunks = self.map.chunks(offset, length)
        suspect = self.doubts.undurable(replica), self.doubts.lost_by(replica)
        covered = replica in self.members and not self._epochs.waits(replica, chunks)
        return covered and not any(places.overlaps(chunks.start, chunks.stop) for places in suspect)

    @property
    def losses_heard(self) -> bool:
        """Whether all current replicas have synced since something was last unsettled.

        Before that one may show a page that it has lost, and must not be who the others are made
        equal to.
        """
        return all(self._epochs.covered(r) >= self._diverged_in for r in self.members)

    def unverified(self, offset: int, length: int) -> bool:
        return self.map.any(UNVERIFIED, self.map.chunks(offset, length))

    def lossy(self, offset: int, length: int) -> bool:
        return bool(self.doubts) and self.doubts.lost_in(self.map.chunks(offset, length))

    def unflushable(self) -> bool:
        return bool(self.doubts.inherited or self.doubts.lost or self.doubts.risked)

    def verified(self, chunks: range) -> None:
        """Note that *chunks* were compared, and are equal on all current replicas."""
        self._recorded.remove(UNVERIFIED, chunks)
        self.doubts.torn.remove(*self.map.bounds_of(chunks))
        self._target_lacks(chunks)
        for slot in self._out_slots():  # nor was who is not here compared
            self._recorded.add(lacks(slot), chunks)
        if self.doubts.lost_in(chunks):
            self._unsettle(chunks)  # perhaps what a flush lost made them equal

    async def start_resync(self, replica: Replica, found: Found, *, full: bool) -> Target:
        """Make *replica*, which is stale and answers, the target: it can be given what it lacks.

        Its image and its sidecar are there, as *found*; *full*: it is not known what it lacks.
        Raises `OSError`, and then it is as it was.
        """
        own, target = found.sidecar, self._targets[replica]
        assert own is not None
        assert self.target is None
        await self.open()
        self._know(replica, found)
        target.doubt_log()
        if full:
            target.lacks(range(len(self.map)))
        elif own.own_state is not RoleState.RESYNCING and not target.ejected:
            for run in own.map.runs(INTENT, longest=len(self.map)):
                target.lacks(run)
        async with self._lock:
            await self._write_map_locked()
            # From its first new byte on it is a mixture that nobody must take for a disk.
            await self._commit(clean=False, resyncing=replica)
        replica.role = State.RESYNCING
        replica.reason = None
        target.begin()
        self.target = target
        self._arrange()
        return target

    async def revive(self, replica: Replica, found: Found) -> None:
        """Go on with a current replica whose file system went away and is back, as *found*.

        Where nothing shows that it is the same image, and others hold all it held, it is given
        everything anew before it is believed again (R15). Raises `OSError` if it is not as it was:
        then it can only come back as one left behind.
        """
        own, known = found.sidecar, self._writer.in_use[replica]
        if found.in_use is None or own is None or replica.slot is None:
            raise OSError(errno.ENODEV, found.problem or "it is not there")
        ours = self._records.keys
        same = all(one.key in ours for one in (own.record, own.prepared) if one)
        same = same and found.in_use.size == known.size
        proven = bool(found.in_use.inode) and found.in_use.inode == known.inode
        if not proven and found.instance is None:
            same = False
        if not same or own.record.slot_of(own.replica_id) != replica.slot:
            raise OSError(errno.ESTALE, "it is not as it was")
        self._know(replica, found)
        self._recorded.found(own.map)
        spared = len(self.members) > 1 and not self.doubts.held_only_by([replica])
        everything = [range(len(self.map))] if spared and not proven else []
        await self._lose([replica], everything)

    async def sync_target(self, target: Target, changing: Iterable[tuple[int, int]]) -> int:
        """Make durable what *target* was given; returns how many chunks it was.

        *changing*: ranges (start, end; bytes) that are being changed. Raises `OSError`, and then
        it is the target no more.
        """
        epoch = self._epochs.begin_sync([target.replica], self._chunks_of(changing))
        operation = Operation(Kind.SYNC)
        gathering = Gathering(0)
        gathering.submit(target.replica, operation)
        await gathering.complete()
        if operation.error is not None or self.target is not target:
            self.drop_target(target.replica, "it could not be synced")
            raise operation.error or OSError(errno.EIO, "it failed meanwhile")
        self._epochs.cover([target.replica], epoch)
        return target.synced(epoch)

    def target_missed(self, offset: int, length: int) -> None:
        """Note that the target was not given what others were."""
        self._target_lacks(self.map.chunks(offset, length))

    async def save_progress(self) -> None:
        """Have the sidecars say how far a repair got."""
        if self.target is None:
            await self._write_map()
            return
        async with self._lock:
            # By its number, a target put back from before this is known for one that lacks more.
            await self._commit(clean=False, resyncing=self._resyncing)
            if self.target is not None:
                self.target.recorded()
            await self._write_map_locked()

    def drop_target(self, replica: Replica, reason: str) -> None:
        """Make *replica* stale again, if it is the target: it keeps what it has."""
        if self.is_target(replica) and not self.joining:
            self._drop_target(reason)

    async def join(self) -> None:
        """Make the target current: it lacks nothing any more.

        Raises `OSError` if it could not be; then it is stale again.
        """
        target = self.target
        assert target is not None
        replica = target.replica
        target.joining = True  # every flush goes to it from here on, and its failures wait for us
        self._arrange()
        try:
            async with self._lock:
                # The flush lock of the disk is not held: its writes since the last sync are synced
                # here, and those that a flush covers from now on, by that.
                operation = Operation(Kind.SYNC)
                gathering = Gathering(0)
                gathering.submit(replica, operation)
                await gathering.complete()
                if operation.error is not None:
                    raise operation.error
                last = pages(self.map) - 1
                offset, listed = self._unreadable_piece()
                content = bytes(offset - UNREADABLE_OFFSET) + listed
                content = content.ljust(MAP_OFFSET - UNREADABLE_OFFSET, b"\0")
                content += encode_pages(self.map, self.record.set_id, 0, last)
                failed = await self._writer.put([replica], (UNREADABLE_OFFSET, content))
                if failed:
                    raise failed[replica]
                if target.lacking_chunks:
                    raise OSError(errno.EIO, "a write to it or a flush failed meanwhile")
                replica.role = State.CURRENT
                self._arrange()
                await self._commit(clean=False)
                if replica.role is not State.CURRENT:
                    raise OSError(errno.EIO, "its sidecar could not be written")
                self.target = None
                del self._targets[replica]
                self._recorded.remove(target.bit, range(len(self.map)))
                for start, end in self.doubts.lost_by(replica):
                    self._recorded.add(target.bit, range(start, end))
        finally:
            target.joining = False
            if self.target is target:
                self._drop_target("it failed before it was current")
            self._arrange()
            self.notify()

    async def clear_marks(self, claimed: Callable[[], Iterable[tuple[int, int]]]) -> None:
        """Clear the marks of extents that were not written to since the last call (R5).

        The record gets a new number, whatever there is to clear.

        Called after a flush that began after the previous call returned. *claimed* gives the
        ranges (start, end; bytes) that are, or may come to be, changed.
        """
        idle = list(self._intents.idle())
        self._intents.look_anew()
        async with self._lock:
            if not self._in_use or not self.membership_recorded:
                return
            # By its number a replica put back from before this is known for one that lacks what was
            # written meanwhile, and has no mark for what is cleared now.
            await self._commit(clean=False, resyncing=self._resyncing)
            if not self._all_current():
                return
            kept = self._kept_marks(claimed())
            for span in idle:
                for start, stop in kept.outside(span.start, span.stop):
                    self._recorded.remove(INTENT, self.map.extent_chunks(range(start, stop)))
            await self._write_map_locked()

    def _kept_marks(self, claimed: Iterable[tuple[int, int]]) -> RangeSet:
        """Extents that are in use, or unequal; *claimed* are ranges that may be changed (bytes)."""
        kept = RangeSet()
        for extents in self._intents.in_use():
            kept.add(extents.start, extents.stop)
        unequal = (self.map.bounds_of(chunks) for chunks in self.doubts.to_remember())
        for start, end in (*claimed, *unequal):
            extents = self.map.extents(start, end - start)
            kept.add(extents.start, extents.stop)
        return kept

    def to_clear(self) -> bool:
        """Whether `clear_marks` has something to do."""
        if self._intents.touched.find(1) >= 0:
            return True
        return self._all_current() and next(self._intents.idle(), None) is not None

    # Who is what

    def _recall_lost(self) -> None:
        """Take from the map what current replicas lost before."""
        for replica in self.members:
            assert replica.slot is not None
            for run in self.map.runs(lacks(replica.slot), longest=len(self.map)):
                self.doubts.lose(replica, run)
                self._unsettle(run)
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
            self._unsettle(run)
            for slot in self._out_slots():  # one that was being resynced may have been given less
                self._recorded.add(lacks(slot), run)
        if self.record.clean:
            # It became so after a flush that was enough; whoever failed it had been left behind, or
            # has ``lacks`` bits. No change was begun since, for the record says first that the set
            # is in use. So nothing that was acknowledged waits for a flush, and no sync can tell of
            # anything older: the next flush does not depend on what could not be made equal.
            return
        self.doubts.inherited = self.doubts.unsettled.union(RangeSet())

    def _know(self, replica: Replica, found: Found) -> None:
        """Take over what was *found* of a replica's files, both of them."""
        own = found.sidecar
        assert own is not None
        spare = own.spare_slot
        if own.prepared is not None and own.prepared.key == self.record.key:
            # Committed elsewhere, it is what shows that this one was there: the older one may go.
            spare = 1 - spare
        self._unreadable_number = max(self._unreadable_number, own.unreadable_number)
        self._writer.know(replica, found, spare)
        sequences = [own.record.sequence, own.prepared.sequence if own.prepared else 0]
        self._records.saw(sequences)

    def _arrange(self) -> None:
        """Follow the replicas' roles."""
        ours = self.replicas if self.fenced is None else ()
        members = tuple(r for r in ours if r.role is State.CURRENT)
        receivers = tuple(r for r in ours if r.role in (State.CURRENT, State.RESYNCING))
        inside = {replica.slot for replica in receivers}
        outside = (slot for slot in range(len(self.record.roles)) if slot not in inside)
        recorded = self._records.names_only(members)
        may_change = self._in_use and recorded and self._records.entered
        self._membership = Membership(
            members,
            receivers,
            sum(map(lacks, outside)),
            sum(map(_bit, members), INTENT | UNVERIFIED),
            recorded=recorded,
            ready=may_change and not self.joining and len(members) >= self.threshold,
        )
        self.doubts.members = members
        self._epochs.follow(receivers)

    def _target_lacks(self, chunks: range) -> None:
        """Have the target, if there is one, be given *chunks* again."""
        if self.target is not None:
            self.target.lacks(chunks)

    @property
    def _resyncing(self) -> Replica | None:
        return None if self.target is None else self.target.replica

    def _target_of(self, replica: Replica) -> Target:
        """What *replica* holds, which is not current, or is no more."""
        target = Target(replica, self._recorded, self._epochs)
        return self._targets.setdefault(replica, target)

    def _out_slots(self) -> Iterator[int]:
        current = {replica.slot for replica in self.members}
        return (slot for slot in range(len(self.record.roles)) if slot not in current)

    @property
    def least(self) -> int:
        """How many current replicas must be left."""
        return max(self.threshold, self._records.quorum)

    def _enough_without(self, gone: Sequence[Replica]) -> bool:
        """Whether enough are left if *gone* are left behind, and hold all that those hold."""
        left = len(self.members) - len(gone)
        return left >= self.least and not self.doubts.held_only_by(gone)

    def _all_current(self) -> bool:
        return self._in_use and self.membership_recorded and next(self._out_slots(), None) is None

    def _drop_target(self, reason: str) -> None:
        target = self.target
        assert target is not None
        self.target = None
        target.lacks_unsynced()
        replica = target.replica
        self.doubts.forget(replica)
        replica.role = State.STALE
        replica.reason = reason
        replica.detach(there=not replica.dead)
        self._arrange()
        self.notify()

    async def _leave_behind(self, failed: Sequence[Replica], chunks: range, reason: str) -> None:
        """Leave *failed* behind, durably, before anything is acknowledged without them (R3)."""
        if not failed and (self.membership_recorded or not self._in_use):
            return
        for replica in failed:
            if self.target is not None and self.target.replica is replica:
                self.target.lacks(chunks)
                if self.joining:
                    async with self._lock:
                        pass  # until it is known what has become of it
                self.drop_target(replica, reason)
        async with self._lock:
            gone = [one for one in dict.fromkeys(failed) if one.role is State.CURRENT]
            if not gone and (self.membership_recorded or not self._in_use):
                return
            if not self._enough_without(gone):
                raise OSError(errno.EIO, "too few replicas would be left")
            more_than_marked = not self._in_use or self.doubts.truncated.intersection(gone)
            self._drop(gone, reason)
            if more_than_marked:
                await self._write_map_locked()
            await self._commit(clean=False)

    def _drop(self, gone: Iterable[Replica], reason: str) -> None:
        """Make current replicas stale, in memory."""
        for replica in gone:
            assert replica.slot is not None
            replica.role = State.STALE
            replica.reason = reason
            # They are opened anew to bring it back, and meanwhile keep its store busy.
            replica.detach(there=not replica.dead)
            target = self._target_of(replica)
            target.eject()
            target.lacks_unsynced()
            for run in self._epochs.unsynced(replica):
                self._lost_from(replica, run)
            for start, end in self.doubts.unsettled:
                target.lacks(range(start, end))
            self.doubts.forget(replica)
        self._arrange()
        self.notify()

    def _lost_from(self, source: Replica, chunks: range) -> None:
        """Have others be given again what was copied to them from *source*, which lost it."""
        for target in self._targets.values():
            target.lost_by(source, chunks)

    def _unsettle(self, chunks: range) -> None:
        """The current replicas may differ in *chunks*."""
        self._target_lacks(chunks)
        self.doubts.unsettle(chunks)
        self._diverged_in = self._epochs.now
        self.notify()

    def _sync_ended(self, replica: Replica, operation: Operation) -> None:
        """Stop to believe a replica whose sync failed, before the slowest one has answered."""
        if operation.kind is not Kind.SYNC or operation.error is None:
            return
        if self.joining and self.is_target(replica):
            # Of two syncs the other one, of the join itself, may have been told nothing.
            self._targets[replica].lacks_unsynced()
        if replica.role is not State.CURRENT:
            return
        losing = self.doubts.losing.setdefault(replica, RangeSet())
        self.doubts.losses += 1
        for run in self._unsynced_runs(replica):
            losing.add(run.start, run.stop)
            self._lost_from(replica, run)

    def _unsynced_runs(self, replica: Replica) -> Iterator[range]:
        """What a sync of *replica* that fails may be about, also from before a crash."""
        yield from self._epochs.unsynced(replica)
        yield from (range(start, end) for start, end in self.doubts.undurable(replica))

    async def record_losses(self) -> None:
        for losing in list(self.doubts.losing.values()):
            for start, end in losing:
                for part, gone, left in self.doubts.left_by(self.doubts.losing, range(start, end)):
                    for replica in gone if left else ():
                        self._recorded.add(_bit(replica), part)
        if not self._read_only:
            with suppress(OSError):  # whoever can, remembers
                await self._write_map()

    async def _lose(self, replicas: Sequence[Replica], chunks: Sequence[range] = ()) -> None:
        """Note that *replicas* lost *chunks*, and too few are left without them.

        By default what they took since a flush. Where one of them is the last to hold something it
        stays believed, and nobody knows what of it is durable: what it lost is what it was given
        since its last good sync, and the others, which lost something before, lack more.
        """
        if not replicas:
            return  # there were too few from the beginning
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
                    self._targets[replica].lacks(run)
        everything = RangeSet()
        for lost in losses.values():
            everything = everything.union(lost)
        for start, end in everything:
            for part, gone, left in self.doubts.left_by(losses, range(start, end)):
                if not gone:
                    continue
                if left:
                    for replica in gone:
                        self._recorded.add(_bit(replica), part)
                        self.doubts.lose(replica, part)
                else:
                    self._lost_by_the_last(gone, part)
            if self.map.any(UNVERIFIED, range(start, end)):
                self._believe_the_one_left(range(start, end))
        self.notify()
        with suppress(OSError):  # whoever can, remembers
            await self._write_map()

    def _lost_by_the_last(self, replicas: Sequence[Replica], chunks: range) -> None:
        """Note that *replicas*, the only ones left that held *chunks*, may have lost something."""
        self._untold_loss = True
        self._target_lacks(chunks)  # it alone may hold what all others lost
        for replica in replicas:
            self.doubts.risk(replica, chunks)
            self._recorded.remove(_bit(replica), chunks)

    def _believe_the_one_left(self, chunks: range) -> None:
        """Take what was never compared, where all current replicas but one lost it, from that one.

        It is on record who lost something there (P4). Where two are left and differ, nobody can
        say which one is right: a flush fails until the operator did.
        """
        for part in self.doubts.decided_by_loss(chunks):
            self.verified(part)

    def _note_written(self, chunks: range) -> None:
        """Note that a change of *chunks* begins or ends."""
        self._intents.touch(self._extents_of(chunks))
        self._epochs.latest.add(chunks)

    def _extents_of(self, chunks: range) -> range:
        return range(chunks.start // self._extent_chunks, chunks[-1] // self._extent_chunks + 1)

    # What nobody can be read at

    @property
    def unreadable(self) -> RangeSet:
        return self.doubts.unreadable

    async def note_unreadable(self, offset: int, length: int) -> None:
        """Note, durably, that nobody who holds this block of the disk can be read at it (bytes).

        Raises `OSError` if that cannot be remembered.
        """
        self.doubts.unreadable.add(offset, offset + length)
        try:
            await self._write_unreadable()
        except OSError:
            self.doubts.unreadable.remove(offset, offset + length)
            raise

    async def written_over(self, offset: int, length: int) -> None:
        unreadable, end = self.doubts.unreadable, offset + length
        written = [(max(offset, start), min(end, stop)) for start, stop in unreadable]
        unreadable.remove(offset, end)
        try:
            await self._write_unreadable()
        except OSError:
            for start, stop in written:
                if start < stop:
                    unreadable.add(start, stop)
            raise

    async def _write_unreadable(self) -> None:
        async with self._lock:
            if len(self.doubts.unreadable) > UNREADABLE_MAX:
                raise OSError(errno.EIO, "more places cannot be read than are remembered")
            # One that is torn leaves the one before.
            self._unreadable_number += 1
            await self._outlive(await self._writer.put(self.members, self._unreadable_piece()))

    def _unreadable_piece(self) -> tuple[int, bytes]:
        number = self._unreadable_number
        return encode_unreadable(self.doubts.unreadable, self.record.set_id, number)

    # What is in the sidecars

    async def _write_map(self) -> None:
        """Make all changes of the map until now durable; concurrent callers share the work."""
        async with self._lock:
            if self._recorded.behind:
                await self._write_map_locked()

    async def _write_map_locked(self) -> None:
        version = self._recorded.begin_write()
        pieces = [
            (MAP_OFFSET + first * PAGE, encode_pages(self.map, self.record.set_id, first, last))
            for first, last in page_runs(version)
        ]
        for piece in pieces:
            await self._outlive(await self._writer.put(self.members, piece))
        self._recorded.written(version)

    async def _outlive(self, failed: dict[Replica, OSError]) -> None:
        """Leave behind those whose sidecars cannot be written, if the others are enough."""
        if not failed:
            return
        gone = [replica for replica in failed if replica in self.members]
        if not self._enough_without(gone):
            raise voted_error(failed.values())
        if gone:
            self._drop(gone, f"its sidecar: {failed[gone[0]].strerror}")
            await self._commit(clean=False)

    async def _commit(self, *, clean: bool, resyncing: Replica | None = None) -> None:
        """Make a record of the roles as they are now valid on all that are current in it.

        *resyncing*: a replica that it says this of, and that gets it too. Those that fail are left
        behind, by another record. Raises `OSError` when fewer than the threshold would be left,
        or when the replica that is resyncing failed; the lock is held.
        """
        identities = await identities_of(self.members) if clean else {}
        await self._look_at_claims(self._membership.receivers)
        self.require_ours()
        steps = self._records.commit(
            self.members,
            clean=clean,
            resyncing=resyncing,
            joining=self._resyncing if self.joining else None,
            enough_without=self._enough_without,
        )
        answer: object = None
        try:
            while True:
                match steps.send(answer):
                    case Write(record, phase, holders):
                        answer = await self._writer.write_slots(holders, record, phase, identities)
                    case LeaveBehind(gone, reason):
                        self._drop(gone, reason)
                        answer = self.members
                    case GiveUp(target, reason):
                        self.drop_target(target, reason)
                        answer = None
        except StopIteration:
            pass
        finally:
            self._arrange()


def _bit(replica: Replica) -> int:
    """What says that *replica*, which has a slot, lacks something."""
    assert replica.slot is not None
    return lacks(replica.slot)


_NOTHING = RangeSet()
_WRITE = "a write to it failed"
