"""``metadata=sidecar``: a durable record beside every image of which replica holds which data.

A replica is a member, or it is ejected as a whole: an ejected replica is not read until a resync
(`quorumfs.repair`) has made it current again. Three things are kept in memory and in the sidecars
of all members:

* the *record* names the members. The record changes under one lock, in two phases
  (`quorumfs.metadata.ledger.commit`), before a request that depends on it is acknowledged (R3);
* ``INTENT`` marks: durable before the first write to an extent of the disk (R1), cleared when the
  extent has been idle for long and all replicas are current and synced (R5);
* the out-of-sync bits of each ejected replica. In the sidecars the bits may be old: after a crash a
  replica lacks every chunk with its bit or an ``INTENT`` mark. A member has a bit for each chunk
  that a failed sync lost, if ejecting the member would leave too few.

The ledger (`quorumfs.metadata.ledger.ledger`) holds all knowledge and decides;
`quorumfs.metadata.recorder` writes. This module serves the disk, and waits.
"""

import errno
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial

import trio

from quorumfs.decisions.claim import Claim, Tenure
from quorumfs.decisions.model import Found, Plan
from quorumfs.decisions.record import random_identity
from quorumfs.decisions.scrub import NO_SCRUB
from quorumfs.decisions.voting import voted_error
from quorumfs.metadata.claims import Claims
from quorumfs.metadata.enrolment import Enrolment
from quorumfs.metadata.joining import Joining
from quorumfs.metadata.ledger.commit import Records
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.metadata.protocol import ReplicaReport, SetReport
from quorumfs.metadata.recorder import Recorder
from quorumfs.metadata.report import report_on, report_on_set
from quorumfs.metadata.writer import SidecarWriter
from quorumfs.replica.health import is_away
from quorumfs.replica.replica import Replica
from quorumfs.replica.ticks import Rhythm


class Sidecars:
    """`quorumfs.metadata.protocol.Metadata` in the sidecars of the replicas."""

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
        """*replicas* are the plan's members in the same order, each with its files *found*.

        *identity*: the 64-bit number of this mount, not 0; None: the number of the claim, else a
        random number. *tenure* judges the claims in the sidecars; None: no claim is ever read.
        """
        if identity is None:
            mine = tenure and tenure.mine
            identity = mine.mount if mine else random_identity()
        self.changed = trio.Event()
        """Set, and replaced, when a repair may be due; see `notify`."""
        self.ledger = Ledger(
            replicas,
            plan,
            found,
            Records(plan, threshold=threshold, identity=identity),
            read_only=read_only,
            notify=self.notify,
        )
        """Everything known about the set."""
        writer = SidecarWriter(self.ledger.records)
        self.claims = Claims(self.ledger, writer, tenure)
        self.recorder = Recorder(self.ledger, self.claims, writer)
        self.joining = Joining(self.recorder)
        self.enrolment = Enrolment(self.recorder, self._serve)
        self.scrub = max(
            (
                one.sidecar.scrub
                for replica, one in zip(replicas, found, strict=True)
                if one.sidecar and replica.standing.is_member
            ),
            key=lambda scrub: scrub.version,
            default=NO_SCRUB,
        )
        """What the members remembered of scrubs when the set was mounted."""
        self._read_only = read_only
        for replica, one in zip(replicas, found, strict=True):
            self._serve(replica)
            if one.image and one.sidecar:
                self.recorder.know(replica, one)

    def _serve(self, replica: Replica) -> None:
        """Have *replica*, new in the set, tell what becomes of its operations."""
        replica.settled = partial(self.ledger.sync_ended, replica)
        replica.let_go = self.notify

    def notify(self) -> None:
        """Wake the repairs: work may be due."""
        self.changed.set()
        self.changed = trio.Event()

    @property
    def writing(self) -> bool:
        """Whether a record or a part of the map is being made durable."""
        return self.recorder.lock.locked()

    # Status

    def report(self, replica: Replica) -> ReplicaReport:
        return report_on(self.ledger, replica)

    def report_set(self) -> SetReport:
        return report_on_set(self.ledger)

    # Events of the disk

    async def record_options(self) -> None:
        ledger, recorder = self.ledger, self.recorder
        async with recorder.lock:
            # With the operator's consent the lower threshold is in force now, and recorded with the
            # first change: a mount that only reads must decide nothing.
            consented = ledger.records.quorum <= ledger.threshold < ledger.record.threshold
            told = ledger.threshold != ledger.record.threshold and not self._read_only
            if consented or not told or len(ledger.members) < ledger.records.quorum:
                return  # too few members acknowledge nothing
            await recorder.write_map_locked()
            await recorder.commit_locked(clean=ledger.record.clean)

    async def change_threshold(self, threshold: int) -> None:
        ledger, recorder, records = self.ledger, self.recorder, self.ledger.records
        async with recorder.lock:
            self.require_ours()
            records.next_threshold = threshold
            try:
                # As many as the old threshold must know of a lower one: else the others could go on
                # by the old one. One that hangs would make requests wait, and fail to do its part.
                answering = sum(member.state.answers for member in ledger.members)
                if answering < ledger.least:
                    raise OSError(errno.EBUSY, _TOO_FEW)
                if self._read_only:
                    records.threshold = threshold
                else:
                    await recorder.write_map_locked()
                    await recorder.commit_locked(clean=ledger.record.clean)
            finally:
                records.next_threshold = None
                ledger.arrange()
            if records.threshold != threshold:
                raise OSError(errno.EIO, "it could not be put on record")

    async def prepare(
        self, offset: int, length: int, *, ahead: bool = False, repair: bool = False
    ) -> None:
        ledger = self.ledger
        while not ledger.prepared(offset, length, repair=repair):
            await self.recorder.open(to_change=not repair)
            if not ledger.membership.recorded:
                raise OSError(errno.EIO, _TOO_FEW)
            ledger.marks.want(offset, length, ahead=ahead)
            await self.recorder.write_map()

    async def finish(self, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        ledger, agreement = self.ledger, self.ledger.agreement
        self.require_ours()
        chunks, end = ledger.map.chunks(offset, length), offset + length
        ledger.note_written(chunks)
        failed = [replica for replica, operation in outcomes if operation.error is not None]
        if not failed and ledger.membership.recorded and len(ledger.members) >= ledger.threshold:
            agreement.mend(offset, end)
            return
        current = [o for o in outcomes if o.replica.standing.is_member]
        if sum(o.error is None for o in current) < ledger.threshold:
            # No replica is blamed, but replicas with and without the write now differ.
            ledger.chunks.diverge(chunks)
            agreement.tear(offset, end)
            targets = [replica for replica in failed if ledger.is_target(replica)]
            await self.recorder.eject(targets, chunks, _WRITE)
            raise voted_error(o.error for o in current or outcomes if o.error is not None)
        try:
            await self.recorder.eject(failed, chunks, _WRITE)
        except OSError:
            ledger.chunks.diverge(chunks)
            agreement.tear(offset, end)
            raise
        agreement.mend(offset, end)

    @property
    def losses(self) -> int:
        return self.ledger.content.losses

    async def record_losses(self) -> None:
        self.ledger.chunks.note_pending()
        if not self._read_only:
            with suppress(OSError):  # as many sidecars as can
                await self.recorder.write_map()

    async def finish_flush(self, outcomes: Sequence[Outcome]) -> None:
        ledger, recorder = self.ledger, self.recorder
        self.require_ours()
        ledger.content.gone.difference_update(o.replica for o in outcomes if o.error is None)
        try:
            # A read-only mount has nothing to make durable, and may record nothing.
            unfit = [] if self._read_only else ledger.unfit(outcomes)
            await recorder.eject(unfit, range(0), "it could not make writes durable")
        except OSError:
            # First who said that writes are lost: a replica that is away may hold them yet.
            away = [o.replica for o in outcomes if o.error is not None and is_away(o.error)]
            await recorder.lose([one for one in ledger.chunks.failed(outcomes) if one not in away])
            # Without an await before they are counted: one may be opened anew at any time.
            ledger.content.gone.update(one for one in ledger.members if one in away and one.dead)
            await recorder.lose(away)
            ledger.chunks.end_flush()
            raise
        ledger.chunks.end_flush()

    async def truncated(self, replica: Replica) -> None:
        ledger, recorder = self.ledger, self.recorder
        if replica.slot is None or replica in ledger.content.truncated:
            return
        if replica.standing.is_member:  # ejected as soon as enough members remain
            ledger.content.truncate(replica)
            if self._read_only:
                return
            try:
                await recorder.eject([replica], range(0), "its image was truncated")
            except OSError:  # too few members would remain
                with suppress(OSError):
                    await recorder.write_map()
            return
        ledger.targets.of(replica).lacks(range(len(ledger.map)))
        if not self._read_only and ledger.may_record:
            with suppress(OSError):  # with its length back it would look whole to the next mount
                await recorder.open()
                await recorder.write_map()

    async def repaired(self, replica: Replica, offset: int, length: int, *, well: bool) -> None:
        # The target may have been copied from this replica.
        self.ledger.targets.lacks(self.ledger.map.chunks(offset, length))
        await self.repair_written(replica, offset, length, well=well)

    async def repair_written(
        self, replica: Replica, offset: int, length: int, *, well: bool
    ) -> None:
        """As `repaired`, when the target got the same data."""
        if not well:
            chunks = self.ledger.map.chunks(offset, length)
            with suppress(OSError):  # too few members would remain: no ejection
                await self.recorder.eject([replica], chunks, "a range of it cannot be repaired")

    async def note_unreadable(self, offset: int, length: int) -> None:
        """Record a block of the disk (bytes) as unreadable on every replica that holds it.

        Raises `OSError` if the list cannot be written. Some sidecar may have taken it then, so the
        block counts as unreadable all the same, until a write there has the list written again.
        """
        self.recorder.require_room_for(offset, length)
        self.ledger.agreement.unreadable.add(offset, offset + length)
        await self.recorder.write_unreadable()

    async def written_over(self, offset: int, length: int) -> None:
        unreadable, end = self.ledger.agreement.unreadable, offset + length
        written = list(unreadable.inside(offset, end))
        unreadable.remove(offset, end)
        try:
            await self.recorder.write_unreadable()
        except OSError:
            for start, stop in written:
                unreadable.add(start, stop)
            raise

    async def clear_marks(self, claimed: Callable[[], Iterable[tuple[int, int]]]) -> None:
        """Clear the marks of extents without a write since the previous call (R5).

        The record gets a new number even if no mark can be cleared. Call after a flush that began
        after the previous call returned. *claimed* gives the ranges (start, end; bytes) under
        change or about to change.
        """
        ledger, recorder = self.ledger, self.recorder
        idle = list(ledger.marks.intents.idle())
        ledger.marks.intents.look_anew()
        async with recorder.lock:
            if not ledger.in_use or not ledger.membership.recorded:
                return
            # The new number exposes a replica rolled back to before this: it lacks later writes,
            # and their marks are cleared now.
            await recorder.commit_locked(clean=False, resyncing=ledger.resyncing)
            if not ledger.all_current():
                return
            ledger.marks.clear(idle, claimed())
            await recorder.write_map_locked()

    async def close(self) -> None:
        ledger, recorder = self.ledger, self.recorder
        if self._read_only:
            return
        async with recorder.lock:
            await self.claims.look(ledger.membership.receivers)
            self.require_ours()
            if not ledger.membership.recorded or (ledger.record.clean and not ledger.in_use):
                await recorder.write_map_locked()
                return
            if ledger.target is not None:
                recorder.break_off("unmounted meanwhile")
            # The new number exposes a replica rolled back to before this: marks of the chunks it
            # lacks are gone.
            for target in ledger.targets:
                target.doubt_log()
            await recorder.commit_locked(clean=True)
            ledger.in_use = False
            ledger.arrange()
            ledger.marks.clear_all()
            await recorder.write_map_locked()

    # Which mount has the set

    @property
    def fenced(self) -> Claim | None:
        return self.claims.fenced

    def require_ours(self) -> None:
        self.claims.require_ours()

    async def watch(self, rhythm: Rhythm) -> None:
        await self.claims.watch(rhythm)

    async def release(self) -> None:
        await self.claims.release()


_WRITE = "a write to it failed"
_TOO_FEW = "too few replicas are current"
