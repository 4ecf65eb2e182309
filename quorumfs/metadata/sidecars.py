"""``metadata=sidecar``: a durable record of who holds what, beside every image.

A replica is current, or it is left behind as a whole: then nothing is read from it until it has
been caught up (`quorumfs.repair`). Three things are kept in memory and in the sidecars of
all current replicas:

* the *record* says who is current. It changes under one lock, in two phases
  (`quorumfs.sidecar`), and before anything that depends on it is acknowledged (R3);
* ``INTENT`` marks: durable before the first write to an extent of the disk (R1), cleared when it
  has not been written to for long and all replicas are current and synced (R5);
* the ``lacks`` bits of each replica left behind. In the sidecars they may be old: after a crash a
  replica lacks whatever has its bit or an ``INTENT`` mark. A current replica has them where it lost
  what it could not flush, and too few would be left without it.

Two things are in memory alone, because an ``INTENT`` mark stands for them in the sidecars: where
the current replicas may differ (`quorumfs.metadata.doubts`), and what was written since the last
flush (a replica that fails may have lost it).
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import trio

from quorumfs.assembly import Found, Plan, State
from quorumfs.dirtymap import INTENT, UNVERIFIED, lacks
from quorumfs.metadata import Choice, Outcome
from quorumfs.metadata.doubts import Doubts
from quorumfs.metadata.intents import Intents
from quorumfs.metadata.marks import Marks
from quorumfs.metadata.unflushed import Unflushed
from quorumfs.metadata.writer import SidecarWriter, identities_of
from quorumfs.ranges import RangeSet, segments
from quorumfs.replica import Gathering, Replica
from quorumfs.sidecar import (
    MAP_OFFSET,
    PAGE,
    Identity,
    Phase,
    Record,
    RoleState,
    Sidecar,
    encode_pages,
    page_runs,
    pages,
)
from quorumfs.storage import Kind, Operation
from quorumfs.voting import voted_error


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
    ) -> None:
        """*replicas* are the plan's members in the same order, with what was *found* of them."""
        self.replicas = tuple(replicas)
        self.record = plan.record
        self.map = plan.map
        self.threshold = threshold
        self._read_only = read_only
        self.changed = trio.Event()
        """Set, and replaced, when there may be something to repair; see `notify`."""
        self._marks = Marks(plan.map)
        self.doubts = Doubts(self._marks, threshold, settling=not read_only)
        self.target: Replica | None = None
        """The replica being resynced."""
        self._joining = False
        """It has everything, and is being made current."""
        self._quorum = plan.quorum
        """Fewer members than this start no generation of their own."""
        self._passed = list(plan.prepared)
        self._tried: set[tuple[int, int]] = set()
        """Records after the present one whose commits failed: some replicas may hold one."""
        self._sequence = max(plan.sequence_seen, plan.record.sequence)
        self._in_use = False
        """The record in the sidecars says so."""
        self._recorded = not plan.left_behind and not plan.prepared
        """Nobody is current in the sidecars who is not current here."""
        self._lock = trio.Lock()
        """Whoever writes to the sidecars holds it."""
        self._map_rounds = 0
        self._extent_chunks = self.map.extent // self.map.chunk_size
        self._compared = RangeSet()
        """Chunks that were found equal, or made so, since adoption; no sidecar says so yet. A write
        that was cut off there would be taken for what adopted images differ in."""
        self._intents = Intents(len(self.map.extents(0, self.map.size)))
        self._unflushed = Unflushed()
        self._flushing = Unflushed()
        self._target_unsynced = Unflushed()
        self._caught_up = RangeSet()
        """Chunks that the target now has, durably, and that are still marked as lacking."""
        self._lacking_anew = RangeSet()
        """Chunks that the target may have been given too early, since the last save."""
        self._copied_from: dict[int, dict[Replica, RangeSet]] = {}
        """By the slot of a replica being resynced, at one go or several: the chunks that it was
        given while another one was believed to hold them."""
        self._lossy_before: set[Replica] = set()
        """Those that had lost something when the last flush began."""
        self._left_here: set[Replica] = set()
        """Left behind since the mount: what they lack is known to the chunk."""
        self._writer = SidecarWriter(threshold)
        self._members: tuple[Replica, ...] = ()
        self._receivers: tuple[Replica, ...] = ()
        self._out_bits = 0
        for replica, member, one in zip(replicas, plan.members, found, strict=True):
            replica.slot = member.slot
            replica.settled = partial(self._sync_ended, replica)
            replica.role = member.state
            replica.reason = member.reason
            if one.image and one.image.size < self.record.size and replica.slot is not None:
                self._marks.add(lacks(replica.slot), range(len(self.map)))
            if one.image and one.sidecar:
                self._know(replica, one.image, one.sidecar)
                joined = replica.role is State.CURRENT and one.sidecar.map.states != self.map.states
                if joined:
                    self._marks.rewrite()
        self._arrange()
        self._tear_marked()
        self._recall_lost()
        self._unsettle_marked()

    # What the disk asks and tells

    @property
    def receivers(self) -> Sequence[Replica]:
        return self._receivers

    @property
    def readers(self) -> Sequence[Replica]:
        return self._members

    @property
    def flushed(self) -> Sequence[Replica]:
        return self._receivers if self._joining else self._members

    @property
    def alike(self) -> Sequence[Replica]:
        return () if self.doubts else self._members

    def begin_now(self, offset: int, length: int) -> Sequence[Replica]:
        # As `prepared` and `begin` together: on the path of every write, so it is spelled out.
        size = self.map.chunk_size
        first, last = offset // size, (offset + length - 1) // size
        extent, last_extent = first // self._extent_chunks, last // self._extent_chunks
        intents = self._intents
        if (
            not (self._in_use and self._recorded)
            or self._joining
            or len(self._members) < self.threshold
            or not (intents.marked[extent] and intents.marked[last_extent])
            or last_extent - extent > 1
        ):
            return ()
        chunks = range(first, last + 1)
        if self.map.any(UNVERIFIED, chunks):
            return ()
        if self._compared and self._compared.overlaps(first, last + 1):
            return ()
        if self._out_bits:
            self._marks.add(self._out_bits, chunks)
        intents.touched[extent] = intents.touched[last_extent] = 1
        self._unflushed.add(chunks)
        if self.target is not None:
            self._target_unsynced.add(chunks)
        return self._receivers

    def prepared(self, offset: int, length: int) -> bool:
        covered = self._intents.cover(self.map.extents(offset, length))
        return self._in_use and self._recorded and covered and not self._is_compared(offset, length)

    def _is_compared(self, offset: int, length: int) -> bool:
        if not self._compared:
            return False
        chunks = self.map.chunks(offset, length)
        return self._compared.overlaps(chunks.start, chunks.stop)

    async def prepare(self, offset: int, length: int, *, ahead: bool = False) -> None:
        extents = self.map.extents(offset, length)
        while not self.prepared(offset, length):
            await self.open()
            if not self._recorded:
                raise OSError(errno.EIO, "too few replicas are current")
            if span := self._intents.want(extents, self._may_mark, ahead=ahead):
                self._marks.add(INTENT, self.map.extent_chunks(span))
            await self._write_map()

    def _may_mark(self, extents: range) -> bool:
        """Whether *extents* may be marked that are not about to be written to.

        Not what was never compared: a mark says there that a write may have torn it.
        """
        return not self.map.any(UNVERIFIED, self.map.extent_chunks(extents))

    def begin(self, offset: int, length: int) -> Sequence[Replica]:
        chunks = self.map.chunks(offset, length)
        if self._out_bits:
            self._marks.add(self._out_bits, chunks)
        self._note_written(chunks)
        return self._receivers

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        chunks = self.map.chunks(offset, length)
        self._note_written(chunks)
        failed = [replica for replica, operation in outcomes if operation.error is not None]
        if not failed and self._recorded and len(self._members) >= self.threshold:
            self.doubts.mend(offset, offset + length)
            return
        current = [o for o in outcomes if o.replica.role is State.CURRENT]
        if sum(o.error is None for o in current) < self.threshold:
            # Nobody is blamed; but who took it and who did not now differ.
            self._unsettle(chunks)
            self.doubts.tear(offset, offset + length)
            if self.target in failed:
                await self._leave_behind([r for r in failed if r is self.target], chunks, _WRITE)
            raise voted_error(o.error for o in current or outcomes if o.error is not None)
        try:
            await self._leave_behind(failed, chunks, _WRITE)
        except OSError:
            self._unsettle(chunks)
            self.doubts.tear(offset, offset + length)
            raise
        self.doubts.mend(offset, offset + length)

    def begin_flush(self, changing: Iterable[tuple[int, int]]) -> None:
        self._lossy_before = self.doubts.lossy
        taken = self._unflushed.take()
        for start, end in changing:  # the syncs that begin now need not cover it
            self._unflushed.add(self.map.chunks(start, end - start))
        taken.put_back(self._flushing)
        if self._joining:  # it may be told of what its own sync, still under way, was to cover
            taken.put_back(self._target_unsynced)
        self._flushing = taken

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        if self._read_only:
            self._forget_flushing()
            return  # there is nothing to make durable, and nothing may be recorded
        failed = [o.replica for o in outcomes if o.error is not None]
        # Its sync may have begun before what it had lost was written again.
        lossy = self._lossy_before | self.doubts.lossy
        good = [
            o
            for o in outcomes
            if o.error is None and o.replica.role is State.CURRENT and o.replica not in lossy
        ]
        if not self._in_use and not self.doubts.inherited and not failed:
            return  # nothing was ever written
        lossy_members = [replica for replica in self._members if replica in lossy]
        try:
            if len(good) < self.threshold:
                raise voted_error(o.error for o in outcomes if o.error is not None)
            await self._leave_behind(
                [*failed, *lossy_members], range(0), "it could not make writes durable"
            )
        except OSError:
            await self._lose(failed)
            self._forget_flushing()
            raise
        self._forget_flushing()

    def _forget_flushing(self) -> None:
        # Whoever could not sync it is on record as having lost it, or as left behind; the others
        # have it. Not so after any other exception: then the next flush is to cover it.
        self._flushing = Unflushed()
        self.doubts.losing.clear()

    def choices(self, offset: int, length: int) -> Iterable[Choice]:
        if self.alike:
            return [Choice(offset, length, list(self._members))]
        return self.doubts.choices(offset, length)

    def may_differ(self, offset: int, length: int) -> bool:
        if not self.doubts.unsettled:
            return False
        chunks = self.map.chunks(offset, length)
        return self.doubts.unsettled.overlaps(chunks.start, chunks.stop)

    def missed(self, replica: Replica) -> RangeSet:
        away = any(member.state is State.MISSING for member in self._members)
        if self._recorded and not away:
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
            self._marks.add(lacks(replica.slot), everything)
            if self._read_only:
                return
            try:
                await self._leave_behind([replica], range(0), "its image was truncated")
            except OSError:  # the others would be too few
                with suppress(OSError):
                    await self._write_map()
            return
        if replica is self.target:
            self._target_lacks(everything)
        else:
            self._marks.add(lacks(replica.slot), everything)
        if not self._read_only and self.may_record:
            with suppress(OSError):  # it may get its length back, and look whole to the next mount
                await self.open()
                await self._write_map()

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        self.target_missed(offset, length)  # it may hold what this replica held
        await self.given(replica, offset, length, well=well)

    async def given(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        """As `repaired`, where the target was given the same."""
        chunks = self.map.chunks(offset, length)
        self._note_written(chunks)
        if not well:
            with suppress(OSError):  # without it the rest would be too few: it stays
                await self._leave_behind([replica], chunks, "a range of it cannot be repaired")

    async def close(self) -> None:
        if self._read_only:
            return
        async with self._lock:
            if not self._recorded or (self.record.clean and not self._in_use):
                await self._write_map_locked()
                return
            if self.target is not None:
                self._drop_target("unmounted meanwhile")
            # By its number, a replica put back from before this is known for one that has no mark
            # for what it lacks.
            await self._commit(clean=True)
            self._in_use = False
            self._marks.remove(INTENT, range(len(self.map)))
            for chunks in self.doubts.to_remember():
                self._marks.add(INTENT, chunks)
            await self._write_map_locked()

    # What repairs ask and tell

    @property
    def members(self) -> Sequence[Replica]:
        """The current replicas."""
        return self._members

    @property
    def may_record(self) -> bool:
        """Whether enough are current to have it on record who is not, before anything changes."""
        return self._recorded or len(self._members) >= self._quorum

    def notify(self) -> None:
        """Tell the repairs that there may be something to do."""
        self.changed.set()
        self.changed = trio.Event()

    async def open(self) -> None:
        """Have the record say that the set is in use, and, given a quorum, who is left behind."""
        if self._in_use and self._recorded:
            return
        async with self._lock:
            if not self._in_use or (not self._recorded and len(self._members) >= self._quorum):
                # The map first: who is now said to be stale lacks what it says.
                await self._write_map_locked()
                await self._commit(clean=False)
                self._in_use = True

    def settled(self, chunks: range) -> None:
        """Note that all current replicas hold the same in *chunks*."""
        self.doubts.settled(chunks)
        self._note_written(chunks)
        per_extent = self._extent_chunks
        extents = range(chunks.start // per_extent, chunks[-1] // per_extent + 1)
        wanted = self._intents.wanted
        known = self._intents.cover(extents) or wanted[-1:] == [extents]
        if not known and self._may_mark(extents):
            # Nothing was written there, a hole: the marks are those of an earlier mount, and only
            # who has made marks clears them.
            wanted.append(extents)
            self._marks.add(INTENT, self.map.extent_chunks(extents))

    def unsynced(self, offset: int, length: int) -> bool:
        chunks = self.map.chunks(offset, length)
        return self._unflushed.overlaps(chunks) or self._flushing.overlaps(chunks)

    def unverified(self, offset: int, length: int) -> bool:
        return self.map.any(UNVERIFIED, self.map.chunks(offset, length))

    def unflushable(self) -> bool:
        return bool(self.doubts.inherited or self.doubts.lost)

    def verified(self, chunks: range) -> None:
        """Note that *chunks* were compared, and are equal on all current replicas."""
        self._marks.remove(UNVERIFIED, chunks)
        self._compared.add(chunks.start, chunks.stop)
        self.doubts.torn.remove(*self.map.bounds_of(chunks))
        self._target_lacks(chunks)
        for slot in self._out_slots():  # nor was who is not here compared
            self._marks.add(lacks(slot), chunks)
        if self.doubts.lost_in(chunks):
            self._unsettle(chunks)  # perhaps what a flush lost made them equal

    async def start_resync(
        self, replica: Replica, image: Identity, own: Sidecar, *, full: bool
    ) -> None:
        """Make *replica*, which is stale and answers, the target: it gets all writes from now on.

        *image* and *own* are its image and its sidecar as found; *full*: it is not known what it
        lacks. Raises `OSError`, and then it is as it was.
        """
        assert self.target is None
        assert replica.slot is not None
        bit = lacks(replica.slot)
        await self.open()
        self._know(replica, image, own)
        if full:
            self._marks.add(bit, range(len(self.map)))
        elif own.own_state is not RoleState.RESYNCING and replica not in self._left_here:
            for run in own.map.runs(INTENT, longest=len(self.map)):
                self._marks.add(bit, run)
        async with self._lock:
            await self._write_map_locked()
            # From its first new byte on it is a mixture that nobody must take for a disk.
            await self._commit(clean=False, resyncing=replica)
        replica.role = State.RESYNCING
        replica.reason = None
        self.target = replica
        self._caught_up, self._lacking_anew = RangeSet(), RangeSet()
        self._arrange()

    async def revive(self, replica: Replica, found: Found) -> None:
        """Go on with a current replica whose file system went away and is back, as *found*.

        Raises `OSError` if it is not as it was: then it can only come back as one left behind.
        """
        image, own = found.image, found.sidecar
        known = self._writer.images[replica]
        if image is None or own is None or replica.slot is None:
            raise OSError(errno.ENODEV, found.problem or "it is not there")
        ours = {_key(self.record), *self._tried}
        same = all(_key(one) in ours for one in (own.record, own.prepared) if one)
        same = same and (image.inode, image.size) == (known.inode, known.size)
        if not same or own.record.slot_of(own.replica_id) != replica.slot:
            raise OSError(errno.ESTALE, "it is not as it was")
        self._know(replica, image, own)
        await self._lose([replica])

    async def sync_target(self, changing: Iterable[tuple[int, int]]) -> None:
        """Make durable what the target was given; raises `OSError`, and then it is no more one.

        *changing*: ranges (start, end; bytes) that are being changed.
        """
        target = self.target
        assert target is not None
        syncing = self._target_unsynced.take()
        for start, end in changing:  # this sync need not cover it
            self._target_unsynced.add(self.map.chunks(start, end - start))
        operation = Operation(Kind.SYNC)
        gathering = Gathering(0)
        gathering.submit(target, operation)
        await gathering.complete()
        if operation.error is not None or self.target is not target:
            if self.target is target:
                self._target_unsynced.put_back(syncing)
                self.drop_target(target, "it could not be synced")
            elif target.slot is not None:
                self._lacks_unflushed(target.slot, syncing)
            raise operation.error or OSError(errno.EIO, "it failed meanwhile")

    def copying(self, target: Replica, sources: Iterable[Replica], chunks: range) -> None:
        """Note that *target* is about to be given what *sources* hold of *chunks*."""
        assert target.slot is not None
        copied = self._copied_from.setdefault(target.slot, {})
        for source in sources:
            copied.setdefault(source, RangeSet()).add(chunks.start, chunks.stop)

    def target_missed(self, offset: int, length: int) -> None:
        """Note that the target was not given what others were."""
        self._target_lacks(self.map.chunks(offset, length))

    def caught_up(self, chunks: Iterable[range]) -> None:
        """Note that the target has all of *chunks*, durably."""
        for run in chunks:
            self._caught_up.add(run.start, run.stop)

    async def save_progress(self) -> None:
        """Have the sidecars say how far a repair got."""
        if self.target is None:
            await self._write_map()
            return
        async with self._lock:
            # By its number, a target put back from before this is known for one that lacks more.
            await self._commit(clean=False, resyncing=self.target)
            for start, end in self._lacking_anew:
                self._caught_up.remove(start, end)
            for bit in self._target_bit():
                for start, end in self._caught_up:
                    self._marks.remove(bit, range(start, end))
            self._caught_up, self._lacking_anew = RangeSet(), RangeSet()
            await self._write_map_locked()

    def drop_target(self, replica: Replica, reason: str) -> None:
        """Make *replica* stale again, if it is the target: it keeps what it has."""
        if self.target is replica and not self._joining:
            self._drop_target(reason)

    async def join(self) -> None:
        """Make the target current: it lacks nothing any more.

        Raises `OSError` if it could not be; then it is stale again.
        """
        target = self.target
        assert target is not None
        assert target.slot is not None
        self._joining = True  # every flush goes to it from here on, and its failures wait for us
        try:
            async with self._lock:
                # The flush lock of the disk is not held: its writes since the last sync are synced
                # here, and those that a flush covers from now on, by that.
                operation = Operation(Kind.SYNC)
                gathering = Gathering(0)
                gathering.submit(target, operation)
                await gathering.complete()
                if operation.error is not None:
                    raise operation.error
                last = pages(self.map) - 1
                content = encode_pages(self.map, self.record.set_id, 0, last)
                failed = await self._writer.put([target], (MAP_OFFSET, content))
                if failed:
                    raise failed[target]
                if self.map.count(lacks(target.slot)):
                    raise OSError(errno.EIO, "a write to it or a flush failed meanwhile")
                target.role = State.CURRENT
                self._arrange()
                await self._commit(clean=False)
                if target.role is not State.CURRENT:
                    raise OSError(errno.EIO, "its sidecar could not be written")
                self.target = None
                self._target_unsynced = Unflushed()
                self._copied_from.pop(target.slot, None)
                self._marks.remove(lacks(target.slot), range(len(self.map)))
                for start, end in self.doubts.lost_by(target):
                    self._marks.add(lacks(target.slot), range(start, end))
        finally:
            self._joining = False
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
            if not self._in_use or not self._recorded:
                return
            # By its number a replica put back from before this is known for one that lacks what was
            # written meanwhile, and has no mark for what is cleared now.
            await self._commit(clean=False, resyncing=self.target)
            if not self._all_current():
                return
            kept = self._kept_marks(claimed())
            for span in idle:
                for start, stop, cleared in segments(span.start, span.stop, [kept]):
                    if cleared:
                        extents = range(start, stop)
                        self._intents.clear(extents)
                        self._marks.remove(INTENT, self.map.extent_chunks(extents))
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
        for replica in self._members:
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
                self._marks.add(lacks(slot), run)
        if self.record.clean:
            # It became so after a flush that was enough; whoever failed it had been left behind, or
            # has ``lacks`` bits. No change was begun since, for the record says first that the set
            # is in use. So nothing that was acknowledged waits for a flush, and no sync can tell of
            # anything older: the next flush does not depend on what could not be made equal.
            return
        self.doubts.inherited = self.doubts.unsettled.union(RangeSet())

    def _know(self, replica: Replica, image: Identity, own: Sidecar) -> None:
        """Take over what was found of a replica's files."""
        spare = own.spare_slot
        if own.prepared is not None and _key(own.prepared) == _key(self.record):
            # Committed elsewhere, it is what shows that this one was there: the older one may go.
            spare = 1 - spare
        self._writer.know(replica, image, spare)
        sequences = [own.record.sequence, own.prepared.sequence if own.prepared else 0]
        self._sequence = max(self._sequence, *sequences)  # its slots must not seem later than ours

    def _arrange(self) -> None:
        """Follow the replicas' roles."""
        self._members = tuple(r for r in self.replicas if r.role is State.CURRENT)
        self.doubts.members = self._members
        receiving = (State.CURRENT, State.RESYNCING)
        self._receivers = tuple(r for r in self.replicas if r.role in receiving)
        inside = {replica.slot for replica in self._receivers}
        slots = range(len(self.record.roles))
        self._out_bits = sum(lacks(slot) for slot in slots if slot not in inside)

    def _target_lacks(self, chunks: range) -> None:
        """Have the target be given *chunks* again."""
        for bit in self._target_bit():
            self._marks.add(bit, chunks)
            self._lacking_anew.add(chunks.start, chunks.stop)

    def _target_got(self, replica: Replica, chunks: range) -> None:
        """Have the target be given *chunks* again, where it may hold what *replica* has lost; and
        who was it before, and is to be again.

        Only there: else it never caught up beside one that fails every flush.
        """
        for slot, sources in self._copied_from.items():
            copied = sources.get(replica, _NOTHING)
            for start, stop, elsewhere in segments(chunks.start, chunks.stop, [copied]):
                if not elsewhere:
                    self._marks.add(lacks(slot), range(start, stop))
                    self._lacking_anew.add(start, stop)
            copied.remove(chunks.start, chunks.stop)

    def _target_bit(self) -> Iterator[int]:
        """What the target lacks is marked with; nothing while there is none."""
        if self.target is not None and self.target.slot is not None:
            yield lacks(self.target.slot)

    def _out_slots(self) -> Iterator[int]:
        current = {replica.slot for replica in self._members}
        return (slot for slot in range(len(self.record.roles)) if slot not in current)

    @property
    def _least(self) -> int:
        """How many current replicas must be left."""
        return max(self.threshold, self._quorum)

    def _enough_without(self, gone: Sequence[Replica]) -> bool:
        """Whether enough are left if *gone* are left behind, and hold all that those hold."""
        left = len(self._members) - len(gone)
        return left >= self._least and not self.doubts.held_only_by(gone)

    def _all_current(self) -> bool:
        return self._in_use and self._recorded and next(self._out_slots(), None) is None

    def _drop_target(self, reason: str) -> None:
        target = self.target
        assert target is not None
        assert target.slot is not None
        self.target = None
        self._lacks_unflushed(target.slot, self._target_unsynced)
        self._target_unsynced = Unflushed()
        self.doubts.forget(target)
        target.role = State.STALE
        target.reason = reason
        self._arrange()
        self.notify()

    async def _leave_behind(self, failed: Sequence[Replica], chunks: range, reason: str) -> None:
        """Leave *failed* behind, durably, before anything is acknowledged without them (R3)."""
        if not failed and (self._recorded or not self._in_use):
            return
        for replica in failed:
            if replica is self.target and replica.slot is not None:
                self._marks.add(lacks(replica.slot), chunks)
                if self._joining:
                    async with self._lock:
                        pass  # until it is known what has become of it
                self.drop_target(replica, reason)
        async with self._lock:
            gone = [one for one in dict.fromkeys(failed) if one.role is State.CURRENT]
            if not gone and (self._recorded or not self._in_use):
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
            self._left_here.add(replica)
            self._recorded = False
            for unflushed in (self._unflushed, self._flushing):
                self._lacks_unflushed(replica.slot, unflushed)
                for run in unflushed.runs():
                    self._target_got(replica, run)
            for start, end in self.doubts.unsettled:
                self._marks.add(lacks(replica.slot), range(start, end))
            self.doubts.forget(replica)
        self._arrange()
        self.notify()

    def _lacks_unflushed(self, slot: int, unflushed: Unflushed) -> None:
        """A replica that failed may have lost all it has not synced."""
        for run in unflushed.runs():
            self._marks.add(lacks(slot), run)

    def _unsettle(self, chunks: range) -> None:
        """The current replicas may differ in *chunks*."""
        self._target_lacks(chunks)
        self.doubts.unsettle(chunks)
        self.doubts.heard = False
        self.notify()

    def _sync_ended(self, replica: Replica, operation: Operation) -> None:
        """Stop to believe a replica whose sync failed, before the slowest one has answered."""
        if operation.kind is not Kind.SYNC or operation.error is None:
            return
        if replica is self.target and self._joining and replica.slot is not None:
            # Of two syncs the other one, of the join itself, may have been told nothing.
            for unflushed in (self._unflushed, self._flushing, self._target_unsynced):
                self._lacks_unflushed(replica.slot, unflushed)
        if replica.role is not State.CURRENT:
            return
        losing = self.doubts.losing.setdefault(replica, RangeSet())
        self.doubts.losses += 1
        for run in self._unsynced_runs():
            losing.add(run.start, run.stop)
            self._target_got(replica, run)

    def _unsynced_runs(self) -> Iterator[range]:
        """What a sync that fails may be about: also what was written before a crash."""
        yield from self._unflushed.runs()
        yield from self._flushing.runs()
        yield from (range(start, end) for start, end in self.doubts.inherited)

    async def record_losses(self) -> None:
        for replica, losing in self.doubts.losing.items():
            assert replica.slot is not None
            for start, end in losing:
                self._marks.add(lacks(replica.slot), range(start, end))
        if not self._read_only:
            with suppress(OSError):  # whoever can, remembers
                await self._write_map()

    async def _lose(self, replicas: Sequence[Replica]) -> None:
        """Note that *replicas* lost what they took since a flush, and too few are left without."""
        if not replicas:
            return  # there were too few from the beginning
        self.doubts.losses += 1
        runs = list(self._unsynced_runs())
        for replica in replicas:
            assert replica.slot is not None
            self.doubts.losing.pop(replica, None)
            for run in runs:
                self._marks.add(lacks(replica.slot), run)
                self._target_got(replica, run)
                self.doubts.unsettle(run)
                if replica.role is State.CURRENT:  # else the bits alone say so
                    self.doubts.lose(replica, run)
        for run in runs:
            if self.map.any(UNVERIFIED, run):
                self._believe_the_one_left(run)
            if all(self.doubts.lost_by(r).overlaps(run.start, run.stop) for r in self._members):
                self._target_lacks(run)  # it alone may hold what all others lost
        self.notify()
        with suppress(OSError):  # whoever can, remembers
            await self._write_map()

    def _believe_the_one_left(self, chunks: range) -> None:
        """Take what was never compared, where all current replicas but one lost it, from that one.

        It is on record who lost something there (P4). Where two are left and differ, nobody can
        say which one is right: a flush fails until the operator did.
        """
        for part in self.doubts.decided_by_loss(chunks):
            self.verified(part)

    def _note_written(self, chunks: range) -> None:
        """Note that a change of *chunks* begins or ends."""
        per_extent = self._extent_chunks
        self._intents.touch(range(chunks.start // per_extent, chunks[-1] // per_extent + 1))
        self._unflushed.add(chunks)
        if self.target is not None:
            self._target_unsynced.add(chunks)

    # What is in the sidecars

    async def _write_map(self) -> None:
        """Make all changes of the map until now durable; concurrent callers share the work."""
        rounds = self._map_rounds
        async with self._lock:
            if self._map_rounds == rounds:
                await self._write_map_locked()
            # Else a whole round has begun and ended since. If it failed the caller sees that what
            # it wanted is not there, and comes again.

    async def _write_map_locked(self) -> None:
        self._map_rounds += 1
        changed = self._marks.take_changed()
        to_mark = self._intents.take_wanted()
        compared = list(self._compared)
        pieces = [
            (MAP_OFFSET + first * PAGE, encode_pages(self.map, self.record.set_id, first, last))
            for first, last in page_runs(changed)
        ]
        try:
            for piece in pieces:
                await self._outlive(await self._writer.put(self._members, piece))
        except OSError:
            self._marks.put_back(changed)
            self._intents.wanted += to_mark
            raise
        self._intents.mark(to_mark)
        for start, end in compared:
            self._compared.remove(start, end)

    async def _outlive(self, failed: dict[Replica, OSError]) -> None:
        """Leave behind those whose sidecars cannot be written, if the others are enough."""
        if not failed:
            return
        gone = [replica for replica in failed if replica in self._members]
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
        identities = await identities_of(self._members) if clean else {}
        while True:
            record = self._composed(clean=clean, resyncing=resyncing)
            self._tried.add(_key(record))
            joining = self.target if self._joining and self.target in self._members else None
            last = [replica for replica in (resyncing or joining,) if replica is not None]
            members = [replica for replica in self._members if replica not in last]
            # The one that is being brought back gets it last: without the others it must not have
            # what makes it seem one of them.
            steps = [
                (Phase.PREPARED, [*members, *last]),
                (Phase.COMMITTED, members),
                (Phase.COMMITTED, last),
            ]
            failed: dict[Replica, OSError] = {}
            for phase, holders in steps:
                failed = await self._writer.write_slots(holders, record, phase, identities)
                if failed:
                    if phase is Phase.COMMITTED:
                        for replica in failed:  # only what it prepared is sure to be whole
                            self._writer.keep_other_slot(replica)
                    break
            else:
                self._adopt(record)
                return
            if record.generation != self.record.generation:
                self._passed.append(record.generation)
            if resyncing in failed and resyncing is not None:
                error = failed.pop(resyncing)
                self.drop_target(resyncing, f"its sidecar: {error.strerror}")
                if not failed:
                    self._recorded = False  # until the others have all the same again
                    raise error
            gone = [replica for replica in failed if replica in self._members]
            left = [replica for replica in self._members if replica not in gone]
            # One that is still joining may fail as well: then nobody would be left.
            if not self._enough_without(gone) or left == [joining]:
                self._recorded = False
                raise voted_error(failed.values())
            self._drop(gone, f"its sidecar: {next(iter(failed.values())).strerror}")

    def _adopt(self, record: Record) -> None:
        """Go by *record*, which is valid on all that are current."""
        self.record = record
        self._tried.clear()
        current = {replica.slot for replica in self._members}
        # One that was left behind may have committed a generation that failed elsewhere.
        self._passed = [passed for passed in self._passed if passed not in record.history]
        self._recorded = not self._passed and all(
            slot in current
            for slot, role in enumerate(record.roles)
            if role.state is RoleState.CURRENT
        )
        if self._recorded:
            self._quorum = self.threshold

    def _composed(self, *, clean: bool, resyncing: Replica | None) -> Record:
        """The next record: a new generation if somebody is left behind (R3: once for all)."""
        current = {replica.slot for replica in self._members}
        record = self.record
        left = [
            slot
            for slot, role in enumerate(record.roles)
            if role.state is RoleState.CURRENT and slot not in current
        ]
        if (left or self._passed) and len(self._members) >= self._quorum:
            for slot in left:  # from the last record on that it got
                record = record.with_role(slot, state=RoleState.STALE)
            record = record.minted(self._passed)
        self._sequence += 1
        enough = len(self._members) >= self._quorum  # else they may not change the threshold
        threshold = self.threshold if enough else record.threshold
        record = replace(record, sequence=self._sequence, clean=clean, threshold=threshold)
        record = record.with_state([s for s in current if s is not None], RoleState.CURRENT)
        if resyncing is not None and resyncing.slot is not None:
            record = record.with_state([resyncing.slot], RoleState.RESYNCING)
        for replica in self._members:
            if replica.slot is not None:
                record = record.with_role(replica.slot, path=replica.path)
        return record


def _key(record: Record) -> tuple[int, int]:
    return record.generation, record.sequence


_NOTHING = RangeSet()
_WRITE = "a write to it failed"


def signature() -> str:
    """Who has a set in use, for a mount that is refused: host and process."""
    return f"pid {os.getpid()} on {os.uname().nodename}"
