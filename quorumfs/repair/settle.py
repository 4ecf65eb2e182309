"""Settling: making the current replicas equal where they may differ.

They may after a crash, or after a change that failed on some of them. All get, block by block,
what a strict majority of three or more holds (P9), and what the pinned source holds where there is
none: in the background, and at once what a guest reads (P7) or a flush covers. Where one cannot
take it, and too few are left without, that is tried again ever more rarely.
"""

import errno
from collections.abc import Sequence
from contextlib import aclosing, suppress

import trio

from quorumfs.decisions.model import Standing
from quorumfs.decisions.ranges import RangeSet, segments
from quorumfs.decisions.voting import middle_block, reconcile, undecided
from quorumfs.disk.holes import next_hole
from quorumfs.disk.reading import read_locked
from quorumfs.metadata.ledger.known import holders_of
from quorumfs.repair.replica_io import cannot_be_read, next_data, repair_write
from quorumfs.repair.work import Work, pieces
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind

AGAIN_S = (1.0, 30.0)
"""The first and the longest wait before what could not be settled is tried again."""


class Settling:
    """Makes the current replicas of one disk equal."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._mirror = work.mirror
        self._sidecars = work.sidecars
        self._ledger = work.ledger
        self._map = work.map
        self._surfacing = trio.Lock()
        self._again_at = 0.0
        self._earliest_at = 0.0
        self._pause_s = AGAIN_S[0]
        self._tried_with = self._who()
        self._unwritable = RangeSet()
        """Bytes that somebody could not take, the last time."""
        self._unwritable_on: dict[Replica, RangeSet] = {}
        """The part of them of which it is known who that was."""

    def due(self) -> bool:
        """Whether there is something to settle, and it is time to try."""
        if not self._ledger.agreement.divergent or not self._ledger.may_record:
            return False
        members, answering = who = self._who()
        if len(answering) < min(len(members), self._mirror.threshold):
            return False  # all are needed, and one cannot take anything
        if who != self._tried_with:  # with others it may succeed
            self._tried_with = who
            self._again_at = min(self._again_at, self._earliest_at)
        return trio.current_time() >= self._again_at

    async def settle(self) -> None:
        """Settle all that may differ, beside the guest; what cannot be is left."""
        if trio.current_time() - self._again_at > AGAIN_S[1]:
            self._pause_s = AGAIN_S[0]  # what was before is long ago
        try:
            await self._settle_what_differs()
        finally:
            self._wait()

    def _wait(self) -> None:
        """Have the next attempt wait, if there has to be one."""
        if not self._ledger.agreement.divergent:
            self._pause_s, self._earliest_at, self._again_at = AGAIN_S[0], 0.0, 0.0
            self._unwritable, self._unwritable_on = RangeSet(), {}
            return
        now = trio.current_time()
        self._earliest_at, self._again_at = now + AGAIN_S[0], now + self._pause_s
        self._pause_s = min(2 * self._pause_s, AGAIN_S[1])
        self._tried_with = self._who()

    def _who(self) -> tuple[frozenset[Replica], frozenset[Replica]]:
        """The current replicas, and those of them that answer."""
        members = frozenset(self._ledger.members)
        there = (
            r for r in members if r.attached and not r.dead and r.state is not Standing.MISSING
        )
        return members, frozenset(there)

    async def _settle_what_differs(self) -> None:
        # Holes are shown, too: first it is on record which replicas are not current.
        await self._sidecars.recorder.open()
        await self._surface_writeback_errors()
        total = sum(end - start for start, end in self._ledger.agreement.divergent)
        self._work.begin("settle", None, total * self._map.chunk_size)
        runs = [range(start, end) for start, end in self._ledger.agreement.divergent]
        async with aclosing(self._work.batches(runs, self._ledger.equalized)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, self._settle_unit)
        await self._work.save()

    async def settle_all(self) -> None:
        """Settle what a flush must know to be equal; raises EIO if it cannot be made so."""
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
        """Settle what may differ in a range, and only then show it.

        Raises EIO where replicas differ and cannot be made equal: what is seen must not turn back.
        """
        chunks = self._map.chunks(offset, length)
        async with self._mirror.locks.held(*self._work.bounds(chunks), exclusive=True):
            if self._unwritable.overlaps(*self._work.bounds(chunks)):  # it was tried not long ago
                with suppress(OSError):
                    return await self._read_uniform(offset, length)
            settled = [await self._settle_locked(unit) for unit in self._work.units(chunks)]
            if all(settled):
                return (await read_locked(self._mirror, offset, length)).data
            return await self._read_uniform(offset, length)

    async def _read_uniform(self, offset: int, length: int) -> bytes:
        """Read a range that cannot be made equal, if all hold the same of it; else EIO.

        A chunk is to be settled for one block of it that a write failed in. The others can be
        shown, for they cannot turn back (P7), whomever the rest is taken from:

        * all current replicas hold the same, and who is not current is on record, so that none of
          its older data can come to be believed (P1);
        * each of them has synced since the chunk was last written, or is known to have lost it;
          one that has not lost it holds durably what it shows. Settling takes it from such a one,
          and not from one whose dropped page still looks right (R4).

        Nothing of that is known of what a crash made divergent: a sync that had failed before
        is told to nobody again. It is shown only when all took it anew.
        """
        chunks, size = self._map.chunks(offset, length), self._map.chunk_size
        await self._surface_writeback_errors(chunks)
        parts = []
        unsettled = self._ledger.agreement.divergent
        for start, stop, settled in segments(chunks.start, chunks.stop, [unsettled]):
            first, last = max(offset, start * size), min(offset + length, stop * size)
            if settled:
                parts.append((await read_locked(self._mirror, first, last - first)).data)
            else:
                parts.append(await self._held_by_all(first, last - first))
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
        """Whether it is known of somebody, everywhere in a range, that it lost nothing there."""
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
        """Have all current replicas hold the same in *chunks*; whether they do now."""
        if not self._ledger.agreement.divergent.overlaps(chunks.start, chunks.stop):
            return True
        # Who is not here may hold something else, even where there is nothing to write now: it is
        # ejected before anything is shown.
        await self._sidecars.recorder.open()
        await self._surface_writeback_errors(chunks)
        return await self._settle_surfaced(chunks)

    async def _settle_surfaced(self, chunks: range) -> bool:
        """As `_settle_locked`, when those who lost what was written there have said so."""
        ledger, known = self._ledger, self._ledger.chunks
        everywhere = True
        divergent = known.agreement.divergent
        for start, stop, settled in segments(chunks.start, chunks.stop, [divergent]):
            # What is settled may differ for another reason, which a vote or an operator decides.
            for part, sources in known.sources.of(range(start, stop)) if not settled else ():
                belief = known.believe()
                equal, refused = await self._settle_part(*self._work.bounds(part), sources)
                if not known.still_believed(belief):
                    # One lost what it was given, or joined without it: once more.
                    equal = await self._settle_surfaced(part)
                elif refused:
                    known.equalized_in_part(refused, part)
                else:
                    ledger.equalized(part)
                    await self._remember(part)
                everywhere = everywhere and equal
        return everywhere

    async def _remember(self, chunks: range) -> None:
        """Have the sidecars say that nobody lacks *chunks* any more, before they are shown.

        Else, should we die, one that holds them would not be believed, and another one that lost
        them meanwhile would.
        """
        place = self._span(chunks)
        if not self._ledger.prepared(*place, repair=True):
            try:
                await self._sidecars.prepare(*place, repair=True)
            except BaseException:  # a cancellation, too, leaves it to be settled
                self._ledger.chunks.diverge(chunks)
                raise

    async def _surface_writeback_errors(self, chunks: range = range(0)) -> None:
        """Have all sync once since something last became divergent, and since *chunks* were
        written.

        One may have lost a page and show an older one, and nobody knows until it syncs: the others
        must not be given that.
        """
        async with self._surfacing:
            written = bool(chunks) and self._ledger.unsynced(*self._span(chunks))
            if written or not self._ledger.chunks.writeback_errors_surfaced:
                with suppress(OSError):
                    await self._mirror.sync()

    def _span(self, chunks: range) -> tuple[int, int]:
        """Offset and length, bytes."""
        start, end = self._work.bounds(chunks)
        return start, end - start

    async def _settle_part(
        self, offset: int, end: int, sources: Sequence[Replica]
    ) -> tuple[bool, set[Replica]]:
        """As `_settle_piece`, but for what is a hole on all of them, and at any length."""
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
        """Have all current replicas hold what *sources* hold, as `voting.reconcile` decides.

        All are written to of whom it is not known that they hold it durably, the source too and
        however equal they look: a flush that failed before a crash may have dropped pages that
        reads still show (R4). What is a hole on all replicas can hide no such loss, and is left
        out. Returns whether they were equal before, and who did not take it. Where nobody can read
        all of it, it is divided until *deadline*: they may be bad at different places (R11).
        """
        nobody = set(self._ledger.members)
        outcomes = await self._mirror.ask(self._ledger.members, Kind.READ, 1, offset, length)
        believed = holders_of(self._ledger, offset, length)  # one may have lost it meanwhile
        read = {o.replica: o.data for o in outcomes if o.error is None}
        voters = [replica for replica in sources if replica in read and replica in believed]
        answers = [(replica.index, read[replica]) for replica in voters]
        failed = [outcome.replica for outcome in outcomes if outcome.error is not None]
        answering = sum(replica.state is not Standing.MISSING for replica in failed)
        if not answers or undecided(answers, answering, offset):
            middle = middle_block(offset, length)
            if answering and not middle:  # nobody holds anything there that could be taken back
                holding = [replica for replica in sources if replica in self._ledger.members]
                noted = await cannot_be_read(self._mirror, self._sidecars, holding, offset, length)
                return False, set() if noted else nobody
            if not answering or not middle or trio.current_time() >= deadline:
                return False, nobody
            rest = offset + length - middle
            first = await self._settle_piece(offset, middle - offset, sources, deadline)
            second = await self._settle_piece(middle, rest, sources, deadline)
            return first[0] and second[0], first[1] | second[1]
        self._ledger.pin_source(voters[0], offset, length)
        verdict = reconcile(answers, offset, self._mirror.threshold)
        assert verdict.data is not None
        chunks = self._map.chunks(offset, length)
        after_crash = self._ledger.agreement.inherited.overlaps(chunks.start, chunks.stop)
        outvoted = verdict.outvoted if after_crash else ()  # else a change failed, and was told
        self._mirror.report_outvoted(outvoted, offset)
        equal = len(read) == len(outcomes) and len(set(read.values())) == 1
        # One that is known to hold it durably is not written to: it could only lose it.
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
        """As `repair_write`; but where somebody could not take it before, one after the other.

        Whoever could not comes first, and the others are not written to again for nothing. Not
        where one can be spared: who is asked alone, and fails, would be ejected for what may
        keep all from taking it (R2).
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
