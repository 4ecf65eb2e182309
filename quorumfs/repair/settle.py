"""Settling: making the current replicas equal where they may differ.

Replicas may differ after a crash, or after a change that failed on some of them. All get, block by
block, the data that a strict majority of three or more holds (P9), or else that of the pinned
source. Settling runs in the background, and at once for a range that a guest reads (P7) or a flush
covers. While a member can neither take the data nor be ejected, retries get ever rarer.
"""

import errno
from collections.abc import Sequence
from contextlib import aclosing, suppress

import trio

from quorumfs.decisions.model import RepairKind
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.decisions.voting import middle_block, reconcile, undecided
from quorumfs.disk.holes import next_hole
from quorumfs.disk.reading import read_locked
from quorumfs.metadata.ledger.knowledge import holders_of
from quorumfs.repair.badplaces import cannot_be_read
from quorumfs.repair.dataplaces import next_data
from quorumfs.repair.pacing import Backoff
from quorumfs.repair.repairwrite import repair_write
from quorumfs.repair.work import Work, pieces
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

AGAIN_S = (1.0, 30.0)
"""The first and the longest wait (seconds) before settling is tried again after a failure."""


class Settling:
    """Makes the current replicas of one disk equal."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger
        self._map = work.map
        self._surfacing = trio.Lock()
        self._attempts = Backoff(*AGAIN_S)
        self._earliest_at = 0.0
        """When the next attempt is due if other members are there (seconds)."""
        self._tried_with = self._who()
        self._unwritable = RangeSet()
        """Bytes that some member could not take at the last attempt."""
        self._unwritable_on: dict[Replica, RangeSet] = {}
        """By member, the part of `_unwritable` that is known to have failed on that member."""

    def due(self) -> bool:
        """Whether there is something to settle, and it is time to try."""
        if not self._ledger.agreement.divergent or not self._ledger.may_record:
            return False
        members, answering = who = self._who()
        if len(answering) < min(len(members), self._mirror.threshold):
            return False  # all are needed, and one cannot take anything
        if who != self._tried_with:  # with others it may succeed
            self._tried_with = who
            self._attempts.due_at = min(self._attempts.due_at, self._earliest_at)
        return trio.current_time() >= self._attempts.due_at

    async def settle(self) -> None:
        """Settle every divergent chunk that can be settled, beside the guest."""
        began = trio.current_time()
        try:
            await self._settle_what_differs()
        finally:
            self._wait(began)

    def _wait(self, began: float) -> None:
        """Have the next attempt wait, after one from *began* on, if a chunk is still divergent."""
        if not self._ledger.agreement.divergent:
            self._attempts.start_anew()
            self._earliest_at = 0.0
            self._unwritable, self._unwritable_on = RangeSet(), {}
            return
        now = trio.current_time()
        self._attempts.tried(began, now)
        self._earliest_at = now + AGAIN_S[0]
        self._tried_with = self._who()

    def _who(self) -> tuple[frozenset[Replica], frozenset[Replica]]:
        """The current replicas, and the current replicas that answer."""
        members = frozenset(self._ledger.members)
        there = (r for r in members if r.attached and not r.dead and r.state.answers)
        return members, frozenset(there)

    async def _settle_what_differs(self) -> None:
        # Settling a hole makes it readable; first the record must say which replicas are current.
        await self._sidecars.recorder.open()
        await self._surface_writeback_errors()
        total = sum(end - start for start, end in self._ledger.agreement.divergent)
        self._work.begin(RepairKind.SETTLE, None, total * self._map.chunk_size)
        runs = [range(start, end) for start, end in self._ledger.agreement.divergent]
        async with aclosing(self._work.batches(runs, self._ledger.equalized)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._settle_unit)
        await self._work.save()

    async def settle_all(self) -> None:
        """Settle the chunks that a flush must know to be equal; raises EIO if that fails."""
        sidecars = self._sidecars
        await sidecars.recorder.open()
        await self._surface_writeback_errors()
        runs, equalized = self._ledger.chunks.to_equalize_first(), self._ledger.equalized
        async with aclosing(self._work.batches(runs, equalized, urgent=True)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._settle_unit, urgent=True)
        if self._ledger.unflushable():
            raise OSError(errno.EIO, "what differs since a crash cannot be made equal")

    async def settle_and_read(self, offset: int, length: int) -> bytes:
        """Settle the divergent chunks of a range, and only then read the range.

        Raises EIO where replicas differ and cannot be made equal, because a read must not turn back
        (P7).
        """
        chunks = self._map.chunks(offset, length)
        async with self._mirror.locks.held(*self._work.bounds(chunks), exclusive=True):
            if self._unwritable.overlaps(*self._work.bounds(chunks)):  # the last attempt failed
                with suppress(OSError):
                    return await self._read_uniform(offset, length)
            settled = [await self._settle_locked(unit) for unit in self._work.units(chunks)]
            if all(settled):
                return (await read_locked(self._mirror, offset, length)).data
            return await self._read_uniform(offset, length)

    async def _read_uniform(self, offset: int, length: int) -> bytes:
        """Read a range that cannot be made equal, if all members hold the same there; else EIO.

        One failed write makes a whole chunk divergent. Its other blocks can be shown, for they
        cannot turn back (P7), whichever source the chunk is settled from later:

        * all members hold the same, and the record says which replicas are members, so that no
          older data of another replica can come to be believed (P1);
        * each member has synced since the chunk was last written, or is known to have lost the
          chunk. A member that has not lost it holds durably what it shows. Settling takes such a
          member as source, not one whose dropped page still looks right (R4).

        After a crash none of this is known, because a sync that failed before the crash is not
        reported again. An inherited chunk is shown only when all members took it anew.
        """
        chunks, size = self._map.chunks(offset, length), self._map.chunk_size
        await self._surface_writeback_errors(chunks)
        parts = []
        unsettled = self._ledger.agreement.divergent
        for start, stop, divergent in segments(chunks.start, chunks.stop, [unsettled]):
            first, last = max(offset, start * size), min(offset + length, stop * size)
            if divergent:
                parts.append(await self._held_by_all(first, last - first))
            else:
                parts.append((await read_locked(self._mirror, first, last - first)).data)
        return b"".join(parts)

    async def _held_by_all(self, offset: int, length: int) -> bytes:
        mirror, sidecars = self._mirror, self._sidecars
        if not self._ledger.prepared(offset, length, repair=True):
            await sidecars.prepare(offset, length, repair=True)
        outcomes = await mirror.ask(
            self._ledger.members, Kind.READ, mirror.threshold, offset, length
        )
        held = {None if outcome.error is not None else outcome.data for outcome in outcomes}
        data = held.pop() if len(held) == 1 else None
        asked = {outcome.replica for outcome in outcomes}
        members = self._ledger.members
        all_asked = asked.issuperset(members) and len(members) >= mirror.threshold
        recorded = self._ledger.prepared(offset, length, repair=True)  # still
        if data is None or not all_asked or not recorded or not self._known(offset, length):
            raise OSError(errno.EIO, "the replicas differ, and cannot be made equal")
        return data

    def _known(self, offset: int, length: int) -> bool:
        """Whether the first source of each part of a range is known to have lost nothing there."""
        known, chunks = self._ledger.chunks, self._map.chunks(offset, length)
        return not any(
            places.overlaps(part.start, part.stop)
            for part, (source, *_) in known.sources.of(chunks)
            for places in (known.content.unbelieved(source, part), known.undurable(source))
        )

    async def _settle_unit(self, chunks: range) -> None:
        async with self._work.locked(chunks) as worked:
            if self._ledger.agreement.divergent.overlaps(chunks.start, chunks.stop):
                await self._settle_locked(chunks)
                worked()

    async def _settle_locked(self, chunks: range) -> bool:
        """Make all members equal in *chunks*; whether they were equal before or are now."""
        if not self._ledger.agreement.divergent.overlaps(chunks.start, chunks.stop):
            return True
        # A missing replica may hold other data, so it is ejected before anything is shown, even
        # where the members need no write.
        await self._sidecars.recorder.open()
        await self._sidecars.recorder.require_list()  # what is on it counts as settled
        await self._surface_writeback_errors(chunks)
        return await self._settle_surfaced(chunks)

    async def _settle_surfaced(self, chunks: range) -> bool:
        """As `_settle_locked`, once losses of writes to *chunks* have been reported."""
        ledger, known = self._ledger, self._ledger.chunks
        everywhere = True
        divergent = known.agreement.divergent
        # A chunk that is not divergent may be UNVERIFIED; a vote or the operator decides it.
        for start, stop in divergent.inside(chunks.start, chunks.stop):
            for part, sources in known.sources.of(range(start, stop)):
                belief = known.believe()
                equal, refused = await self._settle_part(*self._work.bounds(part), sources)
                if not known.still_believed(belief):
                    # A member lost what it was given, or a replica joined without it: once more.
                    equal = await self._settle_surfaced(part)
                elif refused:
                    known.equalized_in_part(refused, part)
                else:
                    ledger.equalized(part)
                    await self._remember(part)
                everywhere = everywhere and equal
        return everywhere

    async def _remember(self, chunks: range) -> None:
        """Clear the out-of-sync bits of *chunks* in the sidecars, before *chunks* are shown.

        Else, should the daemon die, the next mount would not believe a member that holds them, and
        would believe another member that lost them meanwhile.
        """
        place = self._span(chunks)
        if not self._ledger.prepared(*place, repair=True):
            try:
                await self._sidecars.prepare(*place, repair=True)
            except BaseException:  # a cancellation, too, leaves *chunks* divergent
                self._ledger.chunks.diverge(chunks)
                raise

    async def _surface_writeback_errors(self, chunks: range = range(0)) -> None:
        """Sync all members once after the last divergence, and after the last write to *chunks*.

        A member may show an older page in place of a lost one until it syncs; that must not spread.
        """
        async with self._surfacing:
            written = bool(chunks) and self._ledger.unsynced(*self._span(chunks))
            if written or not self._ledger.chunks.writeback_errors_surfaced:
                with suppress(OSError):
                    await self._mirror.sync()

    def _span(self, chunks: range) -> tuple[int, int]:
        """The offset and the length of *chunks*, bytes."""
        start, end = self._work.bounds(chunks)
        return start, end - start

    async def _settle_part(
        self, offset: int, end: int, sources: Sequence[Replica]
    ) -> tuple[bool, set[Replica]]:
        """As `_settle_piece`, at any length, without the common holes and unreadable blocks."""
        mirror = self._mirror
        equal = True
        refused: set[Replica] = set()
        deadline = trio.current_time() + mirror.search_s
        while offset < end:
            data_at = min(end, await next_data(mirror, self._sidecars, offset))
            if data_at == offset:
                hole_at = await next_hole(mirror, offset)
                data_at = min(end, hole_at) if hole_at > offset else end
                unreadable = self._ledger.agreement.unreadable
                for start, stop in unreadable.outside(offset, data_at):
                    for piece in pieces(start, stop):
                        before, without = await self._settle_piece(*piece, sources, deadline)
                        equal = equal and (before or not without)
                        refused |= without
            offset = data_at
        return equal, refused

    async def _settle_piece(
        self, offset: int, length: int, sources: Sequence[Replica], deadline: float
    ) -> tuple[bool, set[Replica]]:
        """Give all members the data of *sources* that `voting.reconcile` decides on.

        Every member not known to hold the data durably is written to, even the source, and even if
        all are equal: a sync that failed before a crash may have dropped pages that reads still
        show (R4). A hole on all replicas can hide no such loss, and is left out. Returns whether
        the members were equal before, and the members that did not take the data. A piece that
        failed reads leave undecided is divided until *deadline*: bad places may differ (R11).
        """
        nobody = set(self._ledger.members)
        outcomes = await self._mirror.ask(self._ledger.members, Kind.READ, 1, offset, length)
        believed = holders_of(self._ledger, offset, length)  # a holder may have lost it meanwhile
        read = {o.replica: o.data for o in outcomes if o.error is None}
        voters = [replica for replica in sources if replica in read and replica in believed]
        answers = [(replica.index, read[replica]) for replica in voters]
        failed = [outcome.replica for outcome in outcomes if outcome.error is not None]
        answering = sum(replica.state.answers for replica in failed)
        if not answers or undecided(answers, answering, offset):
            middle = middle_block(offset, length)
            if answering and not middle:  # no source can be read at this block
                holding = [replica for replica in sources if replica in self._ledger.members]
                noted = await cannot_be_read(self._mirror, self._sidecars, holding, offset, length)
                return False, set() if noted else nobody
            if not answering or not middle or trio.current_time() >= deadline:
                return False, nobody
            rest = offset + length - middle
            first = await self._settle_piece(offset, middle - offset, sources, deadline)
            second = await self._settle_piece(middle, rest, sources, deadline)
            return first[0] and second[0], first[1] | second[1]
        self._ledger.chunks.sources.pin_source(voters[0], self._map.chunks(offset, length))
        verdict = reconcile(answers, offset)
        assert verdict.data is not None
        chunks = self._map.chunks(offset, length)
        after_crash = self._ledger.agreement.inherited.overlaps(chunks.start, chunks.stop)
        outvoted = verdict.outvoted if after_crash else ()  # else the failed change was reported
        self._mirror.report_outvoted(outvoted, offset)
        equal = len(read) == len(outcomes) and len(set(read.values())) == 1
        # A member known to hold the data durably is not written to: it could only lose the data.
        asked = [
            replica
            for replica in (outcome.replica for outcome in outcomes)
            if read.get(replica) != verdict.data
            or not self._ledger.chunks.durable_on(replica, chunks)
        ]
        refused = await self._repair_write(asked, offset, verdict.data, voters) if asked else set()
        for loss in outvoted if not refused else ():
            path = self._mirror.replicas[loss.voter].path
            self._mirror.events.repaired(path, offset + loss.start, loss.end - loss.start)
        return equal, refused

    async def _repair_write(
        self, replicas: Sequence[Replica], offset: int, data: bytes, sources: Sequence[Replica]
    ) -> set[Replica]:
        """As `repair_write`, but where a member failed before, write to one after the other.

        The member that failed comes first, so that a new failure costs the others no write. If a
        member can be spared, all are written to at once: a member that is asked alone and fails
        would be ejected, though the cause may keep all from taking the data (R2).
        """
        bounds = offset, offset + len(data)
        spared = len(self._ledger.members) > self._mirror.threshold
        if spared or not self._unwritable.overlaps(*bounds):
            refused = await repair_write(
                self._mirror, self._sidecars, replicas, offset, data, sources
            )
            (self._unwritable.add if refused else self._unwritable.remove)(*bounds)
            return refused
        truncated, left = self._ledger.content.truncated, set(replicas)
        for replica in sorted(
            replicas, key=lambda r: (not self._is_unwritable_on(r, *bounds), r not in truncated)
        ):
            if await repair_write(self._mirror, self._sidecars, [replica], offset, data, sources):
                self._unwritable_on.setdefault(replica, RangeSet()).add(*bounds)
                return left
            left.remove(replica)
        for places in (self._unwritable, *self._unwritable_on.values()):
            places.remove(*bounds)
        return left

    def _is_unwritable_on(self, replica: Replica, start: int, end: int) -> bool:
        return replica in self._unwritable_on and self._unwritable_on[replica].overlaps(start, end)
