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

What is known, and what follows from it, is in the ledger (`quorumfs.metadata.ledger`). Here is what
waits: the one lock, the writes to the sidecars, and the claims in them.
"""

import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

import trio

from quorumfs.assembly import Found, Plan, State
from quorumfs.claim import CHECK_S, Claim, Tenure, decode_claim, encode_claim
from quorumfs.dirtymap import INTENT, lacks
from quorumfs.metadata import Outcome, ReplicaReport, SetReport
from quorumfs.metadata.commit import GiveUp, LeaveBehind, Records, Write
from quorumfs.metadata.ledger import Ledger
from quorumfs.metadata.report import report_on, report_on_set
from quorumfs.metadata.target import Target
from quorumfs.metadata.writer import SidecarWriter, identities_of
from quorumfs.replica import Gathering, Replica
from quorumfs.sidecar import (
    CLAIM_OFFSET,
    MAP_OFFSET,
    PAGE,
    UNREADABLE_MAX,
    UNREADABLE_OFFSET,
    RoleState,
    encode_pages,
    encode_unreadable,
    page_runs,
    pages,
    random_identity,
)
from quorumfs.storage import Kind, Operation
from quorumfs.voting import voted_error


class Sidecars:
    """`quorumfs.metadata.Metadata` in the sidecars of the replicas: what waits, and writes."""

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
        self._read_only = read_only
        self.tenure = tenure or Tenure(None)
        self._watched = tenure is not None
        self.fenced: Claim | None = None
        """Who has the set instead of this mount, which from then on reads and writes nothing."""
        self.when_fenced: Callable[[Claim], None] = lambda _: None
        self.changed = trio.Event()
        """Set, and replaced, when there may be something to repair; see `notify`."""
        self._lock = trio.Lock()
        """Whoever writes to the sidecars holds it."""
        self._unreadable_number = 0
        """How often the list of what cannot be read was written."""
        self._writer = SidecarWriter(threshold)
        self.ledger = Ledger(
            replicas,
            plan,
            found,
            Records(plan, threshold=threshold, identity=identity),
            threshold=threshold,
            read_only=read_only,
            notify=self.notify,
        )
        """What is known."""
        for replica, one in zip(replicas, found, strict=True):
            replica.settled = partial(self.ledger.sync_ended, replica)
            replica.let_go = self.notify
            if one.image and one.sidecar:
                self._know(replica, one)

    # What status shows

    def report(self, replica: Replica) -> ReplicaReport:
        return report_on(self.ledger, replica)

    def report_set(self) -> SetReport:
        return report_on_set(self.ledger)

    # What the disk tells

    async def record_options(self) -> None:
        ledger = self.ledger
        async with self._lock:
            # With the operator's word it is in force, and recorded with the first change: what is
            # only read decides nothing.
            consented = ledger.records.quorum <= ledger.threshold < ledger.record.threshold
            told = ledger.threshold != ledger.record.threshold and not self._read_only
            if consented or not told or len(ledger.members) < ledger.records.quorum:
                return  # by too few nothing is acknowledged yet
            await self._write_map_locked()
            await self._commit(clean=ledger.record.clean)

    async def prepare(
        self, offset: int, length: int, *, ahead: bool = False, repair: bool = False
    ) -> None:
        ledger = self.ledger
        while not ledger.prepared(offset, length, repair=repair):
            await self.open(to_change=not repair)
            if not ledger.membership.recorded:
                raise OSError(errno.EIO, "too few replicas are current")
            ledger.want(offset, length, ahead=ahead)
            await self._write_map()

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        ledger = self.ledger
        self.require_ours()
        chunks = ledger.map.chunks(offset, length)
        ledger.note_written(chunks)
        failed = [replica for replica, operation in outcomes if operation.error is not None]
        if not failed and ledger.membership.recorded and len(ledger.members) >= ledger.threshold:
            ledger.doubts.mend(offset, offset + length)
            return
        current = [o for o in outcomes if o.replica.role is State.CURRENT]
        if sum(o.error is None for o in current) < ledger.threshold:
            # Nobody is blamed; but who took it and who did not now differ.
            ledger.unsettle(chunks)
            ledger.doubts.tear(offset, offset + length)
            await self._leave_behind([r for r in failed if ledger.is_target(r)], chunks, _WRITE)
            raise voted_error(o.error for o in current or outcomes if o.error is not None)
        try:
            await self._leave_behind(failed, chunks, _WRITE)
        except OSError:
            ledger.unsettle(chunks)
            ledger.doubts.tear(offset, offset + length)
            raise
        ledger.doubts.mend(offset, offset + length)

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        ledger = self.ledger
        self.require_ours()
        try:
            unfit = ledger.unfit(outcomes)
            await self._leave_behind(unfit, range(0), "it could not make writes durable")
        except OSError:
            await self._lose([o.replica for o in outcomes if o.error is not None])
            ledger.end_flush()
            raise
        ledger.end_flush()

    async def record_losses(self) -> None:
        self.ledger.note_losses()
        if not self._read_only:
            with suppress(OSError):  # whoever can, remembers
                await self._write_map()

    async def _lose(self, replicas: Sequence[Replica], chunks: Sequence[range] = ()) -> None:
        """As `Ledger.lose`, and on record, if that can be."""
        if not replicas:
            return  # there were too few from the beginning
        self.ledger.lose(replicas, chunks)
        with suppress(OSError):  # whoever can, remembers
            await self._write_map()

    async def truncated(self, replica: Replica) -> None:
        ledger = self.ledger
        if replica.slot is None or replica in ledger.doubts.truncated:
            return
        everything = range(len(ledger.map))
        if replica.role is State.CURRENT:  # it is left behind for that, as soon as it can be
            ledger.doubts.truncated.add(replica)
            ledger.doubts.losses += 1
            ledger.recorded.add(lacks(replica.slot), everything)
            if self._read_only:
                return
            try:
                await self._leave_behind([replica], range(0), "its image was truncated")
            except OSError:  # the others would be too few
                with suppress(OSError):
                    await self._write_map()
            return
        ledger.targets[replica].lacks(everything)
        if not self._read_only and ledger.may_record:
            with suppress(OSError):  # it may get its length back, and look whole to the next mount
                await self.open()
                await self._write_map()

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        self.ledger.target_missed(offset, length)  # it may hold what this replica held
        await self.given(replica, offset, length, well=well)

    async def given(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        """As `repaired`, where the target was given the same."""
        if not well:
            chunks = self.ledger.map.chunks(offset, length)
            with suppress(OSError):  # without it the rest would be too few: it stays
                await self._leave_behind([replica], chunks, "a range of it cannot be repaired")

    async def close(self) -> None:
        ledger = self.ledger
        if self._read_only:
            return
        async with self._lock:
            await self._look_at_claims(ledger.membership.receivers)
            self.require_ours()
            if not ledger.membership.recorded or (ledger.record.clean and not ledger.in_use):
                await self._write_map_locked()
                return
            if ledger.target is not None:
                self._drop_target("unmounted meanwhile")
            # By its number, a replica put back from before this is known for one that has no mark
            # for what it lacks.
            for target in ledger.targets.values():
                target.doubt_log()
            await self._commit(clean=True)
            ledger.in_use = False
            ledger.arrange()
            ledger.clear_all_marks()
            await self._write_map_locked()

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
            for replica in self.ledger.replicas:
                nursery.start_soon(self._watch, replica)

    async def _watch(self, replica: Replica) -> None:
        while self.fenced is None:
            await trio.sleep(CHECK_S)
            if replica in self.ledger.membership.receivers and replica.attached:
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
        ledger = self.ledger
        if self.fenced is not None:
            return
        self.fenced, self.ledger.fenced = claim, True
        for replica in ledger.membership.receivers:
            # What this host has cached and not written yet, on a network file system, it would
            # write some time later, over what is newer. Now the other one still waits for it.
            replica.submit(Operation(Kind.SYNC), Gathering(0))
        for replica in ledger.replicas:
            replica.fence()
        ledger.arrange()
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
        signed = [r for r in self.ledger.replicas if r.attached and r.role not in away]
        await self._look_at_claims(signed)
        if self.fenced is None:
            await self._writer.put(signed, (CLAIM_OFFSET, encode_claim(mine.release())))

    # What repairs ask and tell

    def notify(self) -> None:
        """Tell the repairs that there may be something to do."""
        self.changed.set()
        self.changed = trio.Event()

    async def open(self, *, to_change: bool = False) -> None:
        """Have the record say that the set is in use, and, given a quorum, who is left behind.

        *to_change*: and that this mount may change the disk. To make replicas equal is no change.
        """
        ledger = self.ledger
        if ledger.in_use and ledger.membership.recorded and not (to_change and ledger.unentered):
            return
        async with self._lock:
            unrecorded = (
                not ledger.membership.recorded and len(ledger.members) >= ledger.records.quorum
            )
            if not ledger.in_use or unrecorded or (to_change and ledger.unentered):
                ledger.records.changing = ledger.records.changing or to_change
                # The map first: who is now said to be stale lacks what it says.
                await self._write_map_locked()
                await self._commit(clean=False)
                ledger.in_use = True
                ledger.arrange()

    async def start_resync(self, replica: Replica, found: Found, *, full: bool) -> Target:
        """Make *replica*, which is stale and answers, the target: it can be given what it lacks.

        Its image and its sidecar are there, as *found*; *full*: it is not known what it lacks.
        Raises `OSError`, and then it is as it was.
        """
        ledger = self.ledger
        own, target = found.sidecar, ledger.targets[replica]
        assert own is not None
        assert ledger.target is None
        await self.open()
        self._know(replica, found)
        target.doubt_log()
        if full:
            target.lacks(range(len(ledger.map)))
        elif own.own_state is not RoleState.RESYNCING and not target.ejected:
            for run in own.map.runs(INTENT, longest=len(ledger.map)):
                target.lacks(run)
        async with self._lock:
            await self._write_map_locked()
            # From its first new byte on it is a mixture that nobody must take for a disk.
            await self._commit(clean=False, resyncing=replica)
        replica.role = State.RESYNCING
        replica.reason = None
        target.begin()
        ledger.target = target
        ledger.arrange()
        return target

    async def revive(self, replica: Replica, found: Found) -> None:
        """Go on with a current replica whose file system went away and is back, as *found*.

        Where nothing shows that it is the same image, and others hold all it held, it is given
        everything anew before it is believed again (R15). Raises `OSError` if it is not as it was:
        then it can only come back as one left behind.
        """
        ledger = self.ledger
        own, known = found.sidecar, self._writer.in_use[replica]
        if found.in_use is None or own is None or replica.slot is None:
            raise OSError(errno.ENODEV, found.problem or "it is not there")
        ours = ledger.records.keys
        same = all(one.key in ours for one in (own.record, own.prepared) if one)
        same = same and found.in_use.size == known.size
        proven = bool(found.in_use.inode) and found.in_use.inode == known.inode
        if not proven and found.instance is None:
            same = False
        if not same or own.record.slot_of(own.replica_id) != replica.slot:
            raise OSError(errno.ESTALE, "it is not as it was")
        self._know(replica, found)
        ledger.recorded.found(own.map)
        spared = len(ledger.members) > 1 and not ledger.doubts.held_only_by([replica])
        everything = [range(len(ledger.map))] if spared and not proven else []
        await self._lose([replica], everything)

    async def sync_target(self, target: Target, changing: Iterable[tuple[int, int]]) -> int:
        """Make durable what *target* was given; returns how many chunks it was.

        *changing*: ranges (start, end; bytes) that are being changed. Raises `OSError`, and then
        it is the target no more.
        """
        ledger = self.ledger
        epoch = ledger.epochs.begin_sync([target.replica], ledger.chunks_of(changing))
        operation = Operation(Kind.SYNC)
        gathering = Gathering(0)
        gathering.submit(target.replica, operation)
        await gathering.complete()
        if operation.error is not None or ledger.target is not target:
            self.drop_target(target.replica, "it could not be synced")
            raise operation.error or OSError(errno.EIO, "it failed meanwhile")
        ledger.epochs.cover([target.replica], epoch)
        return target.synced(epoch)

    async def save_progress(self) -> None:
        """Have the sidecars say how far a repair got."""
        ledger = self.ledger
        if ledger.target is None:
            await self._write_map()
            return
        async with self._lock:
            # By its number, a target put back from before this is known for one that lacks more.
            await self._commit(clean=False, resyncing=ledger.resyncing)
            if ledger.target is not None:
                ledger.target.recorded()
            await self._write_map_locked()

    def drop_target(self, replica: Replica, reason: str) -> None:
        """Make *replica* stale again, if it is the target: it keeps what it has."""
        ledger = self.ledger
        if ledger.is_target(replica) and not ledger.joining:
            self._drop_target(reason)

    async def join(self) -> None:
        """Make the target current: it lacks nothing any more.

        Raises `OSError` if it could not be; then it is stale again.
        """
        ledger = self.ledger
        target = ledger.target
        assert target is not None
        replica = target.replica
        target.joining = True  # every flush goes to it from here on, and its failures wait for us
        ledger.arrange()
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
                last = pages(ledger.map) - 1
                offset, listed = self._unreadable_piece()
                content = bytes(offset - UNREADABLE_OFFSET) + listed
                content = content.ljust(MAP_OFFSET - UNREADABLE_OFFSET, b"\0")
                content += encode_pages(ledger.map, ledger.record.set_id, 0, last)
                failed = await self._writer.put([replica], (UNREADABLE_OFFSET, content))
                if failed:
                    raise failed[replica]
                if target.lacking_chunks:
                    raise OSError(errno.EIO, "a write to it or a flush failed meanwhile")
                replica.role = State.CURRENT
                ledger.arrange()
                await self._commit(clean=False)
                if replica.role is not State.CURRENT:
                    raise OSError(errno.EIO, "its sidecar could not be written")
                ledger.target = None
                del ledger.targets[replica]
                ledger.recorded.remove(target.bit, range(len(ledger.map)))
                for start, end in ledger.doubts.lost_by(replica):
                    ledger.recorded.add(target.bit, range(start, end))
        finally:
            target.joining = False
            if ledger.target is target:
                self._drop_target("it failed before it was current")
            ledger.arrange()
            self.notify()

    async def clear_marks(self, claimed: Callable[[], Iterable[tuple[int, int]]]) -> None:
        """Clear the marks of extents that were not written to since the last call (R5).

        The record gets a new number, whatever there is to clear.

        Called after a flush that began after the previous call returned. *claimed* gives the
        ranges (start, end; bytes) that are, or may come to be, changed.
        """
        ledger = self.ledger
        idle = list(ledger.intents.idle())
        ledger.intents.look_anew()
        async with self._lock:
            if not ledger.in_use or not ledger.membership.recorded:
                return
            # By its number a replica put back from before this is known for one that lacks what was
            # written meanwhile, and has no mark for what is cleared now.
            await self._commit(clean=False, resyncing=ledger.resyncing)
            if not ledger.all_current():
                return
            ledger.clear_marks(idle, claimed())
            await self._write_map_locked()

    # Who is what

    def _know(self, replica: Replica, found: Found) -> None:
        """Take over what was *found* of a replica's files, both of them."""
        ledger = self.ledger
        own = found.sidecar
        assert own is not None
        spare = own.spare_slot
        if own.prepared is not None and own.prepared.key == ledger.record.key:
            # Committed elsewhere, it is what shows that this one was there: the older one may go.
            spare = 1 - spare
        self._unreadable_number = max(self._unreadable_number, own.unreadable_number)
        self._writer.know(replica, found, spare)
        sequences = [own.record.sequence, own.prepared.sequence if own.prepared else 0]
        ledger.records.saw(sequences)

    def _drop_target(self, reason: str) -> None:
        replica = self.ledger.give_up_target(reason)
        replica.detach(there=not replica.dead)

    async def _leave_behind(self, failed: Sequence[Replica], chunks: range, reason: str) -> None:
        """Leave *failed* behind, durably, before anything is acknowledged without them (R3)."""
        ledger = self.ledger
        if not failed and (ledger.membership.recorded or not ledger.in_use):
            return
        for replica in failed:
            if ledger.target is not None and ledger.target.replica is replica:
                ledger.target.lacks(chunks)
                if ledger.joining:
                    async with self._lock:
                        pass  # until it is known what has become of it
                self.drop_target(replica, reason)
        async with self._lock:
            gone = [one for one in dict.fromkeys(failed) if one.role is State.CURRENT]
            if not gone and (ledger.membership.recorded or not ledger.in_use):
                return
            if not ledger.enough_without(gone):
                raise OSError(errno.EIO, "too few replicas would be left")
            more_than_marked = not ledger.in_use or ledger.doubts.truncated.intersection(gone)
            self._drop(gone, reason)
            if more_than_marked:
                await self._write_map_locked()
            await self._commit(clean=False)

    def _drop(self, gone: Sequence[Replica], reason: str) -> None:
        """Make current replicas stale, in memory."""
        self.ledger.eject(gone, reason)
        for replica in gone:
            # They are opened anew to bring it back, and meanwhile keep its store busy.
            replica.detach(there=not replica.dead)

    # What nobody can be read at

    async def note_unreadable(self, offset: int, length: int) -> None:
        """Note, durably, that nobody who holds this block of the disk can be read at it (bytes).

        Raises `OSError` if that cannot be remembered.
        """
        ledger = self.ledger
        ledger.doubts.unreadable.add(offset, offset + length)
        try:
            await self._write_unreadable()
        except OSError:
            ledger.doubts.unreadable.remove(offset, offset + length)
            raise

    async def written_over(self, offset: int, length: int) -> None:
        unreadable, end = self.ledger.doubts.unreadable, offset + length
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
        ledger = self.ledger
        async with self._lock:
            if len(ledger.doubts.unreadable) > UNREADABLE_MAX:
                raise OSError(errno.EIO, "more places cannot be read than are remembered")
            # One that is torn leaves the one before.
            self._unreadable_number += 1
            await self._outlive(await self._writer.put(ledger.members, self._unreadable_piece()))

    def _unreadable_piece(self) -> tuple[int, bytes]:
        ledger = self.ledger
        number = self._unreadable_number
        return encode_unreadable(ledger.doubts.unreadable, ledger.record.set_id, number)

    # What is in the sidecars

    async def _write_map(self) -> None:
        """Make all changes of the map until now durable; concurrent callers share the work."""
        async with self._lock:
            if self.ledger.recorded.behind:
                await self._write_map_locked()

    async def _write_map_locked(self) -> None:
        ledger = self.ledger
        version = ledger.recorded.begin_write()
        pieces = [
            (
                MAP_OFFSET + first * PAGE,
                encode_pages(ledger.map, ledger.record.set_id, first, last),
            )
            for first, last in page_runs(version)
        ]
        for piece in pieces:
            await self._outlive(await self._writer.put(ledger.members, piece))
        ledger.recorded.written(version)

    async def _outlive(self, failed: dict[Replica, OSError]) -> None:
        """Leave behind those whose sidecars cannot be written, if the others are enough."""
        ledger = self.ledger
        if not failed:
            return
        gone = [replica for replica in failed if replica in ledger.members]
        if not ledger.enough_without(gone):
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
        ledger = self.ledger
        identities = await identities_of(ledger.members) if clean else {}
        await self._look_at_claims(ledger.membership.receivers)
        self.require_ours()
        steps = ledger.records.commit(
            ledger.members,
            clean=clean,
            resyncing=resyncing,
            joining=ledger.resyncing if ledger.joining else None,
            enough_without=ledger.enough_without,
        )
        answer: object = None
        try:
            while True:
                match steps.send(answer):
                    case Write(record, phase, holders):
                        answer = await self._writer.write_slots(holders, record, phase, identities)
                    case LeaveBehind(gone, reason):
                        self._drop(gone, reason)
                        answer = ledger.members
                    case GiveUp(target, reason):
                        self.drop_target(target, reason)
                        answer = None
        except StopIteration:
            pass
        finally:
            ledger.arrange()


_WRITE = "a write to it failed"
