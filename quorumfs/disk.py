"""The replicated disk: the one place that orders a request.

A request takes its range lock, goes to the replicas, and gets its verdict; what a replica missed
is on record before the guest hears of success. Nothing reaches a replica on another way.
"""

import errno
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, cast

import trio

from quorumfs.assembly import State
from quorumfs.control.events import EventLog
from quorumfs.metadata import Choice, Metadata, Outcome, holders_of, succeeded
from quorumfs.patterns import Fifo, Quorum, ReadPattern, Reconcile
from quorumfs.rangelock import RangeLock
from quorumfs.reach import LEAST
from quorumfs.replica import Gathering, Replica
from quorumfs.storage import Buffer, Bytes, FileStatus, Kind, Operation, TruncatedError
from quorumfs.voting import BLOCK, VOTERS_MIN, Outvoted, middle_block, voted_error

TICK_S = 0.5
"""How often deadlines and held-back events are looked at: how late a timeout may be noticed."""


ZEROS_MAX, ZEROS_PARTS = 16 << 30, 8
"""Bytes zeroed at a time: so many, or an eighth of the disk. To note that of each of its chunks
takes some milliseconds, in which nothing else is done."""

ALLOCATION_MAX = 1 << 30
"""Bytes of space reserved at a time, for the same reason."""

HOLE_ROUNDS_MAX = 64
"""How often to look for a hole that all replicas share before giving up."""

UNNEEDED_CLOSE_S = 0.5
"""How long to wait at the end for a file to be closed that does not count (seconds)."""

NOW_MAX = 1 << 20
"""Bytes of a request that may be served without waiting: more would hold up others too long."""

GIVEN_MAX = 1 << 20
"""Bytes that those who lost them are given at a time, before they are changed."""

_ZEROS = bytes(1 << 20)  # the largest request


class Reading(NamedTuple):
    """Bytes read under a lock, and whether reading them showed something to repair."""

    data: bytes
    repairable: bool


Repair = Callable[["Disk", int, int], Awaitable[bytes]]
"""Reads ``(offset, length)`` again, under the exclusive lock, and repairs what it can."""


class Disk:
    """*size* bytes kept on every one of *replicas*.

    A read that shows a replica to be wrong is left to *repair*, if there is one.

    All methods raise `OSError` with the errno for the guest. Offsets and lengths are bytes.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        size: int,
        metadata: Metadata,
        *,
        threshold: int,
        pattern: ReadPattern,
        repair: Repair | None,
        search_s: float,
        zero_kind: Kind | None = None,
        events: EventLog,
    ) -> None:
        """*search_s*: how long (seconds) one read may look for readable parts of its range.

        *zero_kind*: what becomes of an aligned write of zeros; None: a write.
        """
        self.replicas = tuple(replicas)
        self.size = size
        self.metadata = metadata
        self.ledger = metadata.ledger
        """What is known, asked without waiting."""
        self._inherited_places = list(self.ledger.unreadable)
        """What earlier mounts found to be unreadable, until it is told."""
        self.threshold = threshold
        self.events = events
        self.locks = RangeLock()
        self.requests = 0
        """Reads and writes of the guest so far."""
        self.settle: Callable[[int, int], Awaitable[bytes]] | None = None
        """Makes the replicas equal in ``(offset, length)``, and reads it under the same lock."""
        self.settle_all: Callable[[], Awaitable[None]] | None = None
        """The same for all that a flush could not tell to be durable."""
        self.verify: Callable[[int, int], Awaitable[None]] | None = None
        """Compares ``(offset, length)``. All three are set by who repairs."""
        self._pattern = pattern
        self._repair = repair
        self.search_s = search_s
        self._zero_kind = zero_kind
        self._reached: tuple[int, int, tuple[int, Sequence[Replica]]] = 0, 0, (0, ())
        """Where zeros can be made at one go, and the requests and receivers until then."""
        self._flush_lock = trio.Lock()
        self._flushes = 0
        self._flush_error: OSError | None = None
        self._announced = {replica: replica.state for replica in self.replicas}

    async def run(self) -> None:
        """Watch over deadlines, held-back events, and whose the set is, until cancelled.

        First it is told what was found to be unreadable in earlier mounts: the one that found it
        may have died before it could tell.
        """
        inherited, self._inherited_places = self._inherited_places, []
        for start, end in inherited:
            self.events.unreadable(start, end - start)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.metadata.watch)
            await self._tick()

    async def _tick(self) -> None:
        before = trio.current_time()
        while True:
            await trio.sleep(TICK_S)
            now = trio.current_time()
            late = now - before - TICK_S
            before = now
            for replica in self.replicas:
                if late > TICK_S:
                    replica.pardon(late)  # this process was stopped, or starved: not the replica
                replica.abandon_overdue(now)
            self.announce_states()
            self.events.tick(now)

    # Requests of the guest

    async def read(self, offset: int, length: int) -> Bytes:
        """Read *length* bytes at *offset*: fewer at the end of the disk, none behind it."""
        data = self._read_now(offset, length)
        if data is not None:
            return data
        self.metadata.require_ours()
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        data = await self._read(offset, length)
        self.metadata.require_ours()
        return data

    async def _read(self, offset: int, length: int) -> bytes:
        """Read a range inside the disk, and repair what that shows to be wrong."""
        self.requests += 1
        reading = None
        if self.settle is None or not self.ledger.may_differ(offset, length):
            claim = await self.locks.acquire(offset, offset + length, exclusive=False)
            try:  # perhaps a write that we waited for has failed
                if self.settle is None or not self.ledger.may_differ(offset, length):
                    reading = await self.read_locked(offset, length)
            finally:
                self.locks.release(claim)
        if reading is None:
            assert self.settle is not None
            # What is seen must not turn back when its only holder is lost (P7).
            return await self.settle(offset, length)
        if reading.repairable and self._repair is not None:
            # Not with what was just read: a write may have come since the lock was given back.
            with suppress(OSError):  # what was read stays true: no write since is older than it
                return await self._repair(self, offset, length)
        return reading.data

    async def write(self, offset: int, data: bytes) -> int:
        """Write *data* at *offset*; returns the bytes written: fewer if the disk ends before.

        Raises ENOSPC at or behind the end.
        """
        if self.write_now(offset, data):
            return len(data)
        length = min(len(data), self.size - offset)
        if length <= 0:
            raise OSError(errno.ENOSPC, "the disk ends before")
        if length < len(data):
            data = data[:length]
        if self._zero_kind is not None and self._to_be_zeros(offset, data):
            await self._change(self._zero_kind, offset, length)
        else:
            await self._change(Kind.WRITE, offset, length, data)
        return length

    def _read_now(self, offset: int, length: int) -> Bytes | None:
        """Read without waiting for anything; None if that is not possible: then the long way.

        Nothing else runs meanwhile: it needs no lock, as long as nobody else has it.
        """
        holders = self.ledger.alike
        count = len(holders)
        asked = self._pattern.ask_now(count, 0)
        if (
            not holders
            or asked < self._pattern.needed(count - asked)
            or not 0 < length <= min(NOW_MAX, self.size - offset)
            or not self.locks.free(offset, offset + length, exclusive=False)
        ):
            return None
        first, *others = holders[:asked]
        for replica in holders[:asked]:
            if not replica.prompt:
                return None
        data = first.read_now(offset, length)
        if data is None:
            return None
        for replica in others:
            if replica.read_now(offset, length) != data:
                return None
        self.requests += 1
        return data

    def write_now(self, offset: int, data: Buffer) -> bool:
        """Write without waiting for anything; False if that is not possible: then `write` it."""
        length = len(data)
        if (
            not 0 < length <= min(NOW_MAX, self.size - offset)
            or not self.locks.free(offset, offset + length, exclusive=True)
            or self._to_be_zeros(offset, data)
        ):
            return False
        if not self._write_now(offset, data):
            return False  # nothing can come between this and the same write again
        self.requests += 1
        return True

    def _write_now(self, offset: int, data: Buffer) -> bool:
        """As `write_now`, for who knows that the range is not locked by anybody else."""
        receivers = self.ledger.begin_now(offset, len(data))
        if not receivers:
            return False
        for replica in receivers:
            if not replica.prompt:
                return False
        return all(replica.write_now(offset, data) for replica in receivers)

    def _to_be_zeros(self, offset: int, data: Buffer) -> bool:
        """Whether a write of zeros is to become a request for them."""
        length = len(data)
        asked = self._zero_kind is not None and not (offset | length) % BLOCK
        return asked and data == _ZEROS[:length]

    async def make_zeros(self, offset: int, length: int, *, discard: bool) -> None:
        """Make zeros of a range inside the disk; with *discard*, give the space back.

        What lies behind the end of the disk is left out.
        """
        kind = Kind.DISCARD if discard else Kind.ZERO
        end = min(offset + length, self.size)
        longest = max(ZEROS_MAX, self.size // ZEROS_PARTS)
        while offset < end:
            stop = min(end, offset + longest)
            if stop - offset > LEAST:
                if not self.ledger.prepared(offset, stop - offset):  # once for all pieces
                    await self.metadata.prepare(offset, stop - offset, ahead=True)
                stop = await self._reach_to(offset, stop, min(self.size, offset + longest))
            await self._change(kind, offset, stop - offset)
            offset = stop

    async def _reach_to(self, offset: int, stop: int, longest: int) -> int:
        """How far from *offset* zeros are made at one go, at most to *stop*.

        Who asks for zeros from one end to the other in many requests has it found out, as far as
        *longest*, for several of them at once.
        """
        start, end, asked = self._reached
        state = self.requests, self.ledger.receivers
        if asked != state or not start <= offset < stop <= end:
            end = await self.reach(state[1], offset, longest)
        # It holds until anything else is asked for than what now follows.
        self._reached = offset, end, (self.requests + 1, state[1])
        return min(stop, end)

    async def allocate(self, offset: int, length: int) -> None:
        """Reserve space for a range inside the disk; replicas that cannot are no failure."""
        end = min(offset + length, self.size)
        for start in range(offset, end, ALLOCATION_MAX):
            piece = min(ALLOCATION_MAX, end - start)
            if not self.ledger.prepared(start, piece):  # the image's times change
                await self.metadata.prepare(start, piece)
            receivers = self.ledger.receivers
            outcomes = await self.ask(receivers, Kind.ALLOCATE, self.threshold, start, piece)
            if succeeded(outcomes) < self.threshold:
                raise voted_error(outcome.error for outcome in outcomes if outcome.error)

    async def _change(self, kind: Kind, offset: int, length: int, data: bytes = b"") -> None:
        """Change bytes on all replicas: the way of every write."""
        self.requests += 1
        metadata = self.metadata
        metadata.require_ours()
        if self.verify is not None and self.ledger.unverified(offset, length):
            # Else, should we die in it, nobody could tell what differed before and what since.
            await self.verify(offset, length)
        if self.settle is not None and self.ledger.lossy(offset, length):
            # Else, should another one lose what is written now, nobody would hold both.
            await self._make_losses_good(offset, length)
        claim = await self.locks.acquire(offset, offset + length, exclusive=True)
        try:
            if not self.ledger.prepared(offset, length):
                await metadata.prepare(offset, length, ahead=True)
                if kind is Kind.WRITE and length <= NOW_MAX and self._write_now(offset, data):
                    return  # often nothing but the mark was in the way
            claim.changes = ((offset, offset + length),)
            receivers = self.ledger.begin(offset, length)
            outcomes = await self.ask(receivers, kind, self.threshold, offset, length, data)
            failed = [outcome for outcome in outcomes if outcome.error is not None]
            self._report(failed)
            try:
                await metadata.finish(outcomes, offset, length)
                if self.ledger.unreadable.overlaps(offset, offset + length):
                    claim.changes = ()
                    # Were it readable before it is durable, a power cut in between would show what
                    # was given up, whatever that is (P1).
                    await self.sync()
                    await metadata.written_over(offset, length)
            except OSError:
                self.events.failure(offset, length)
                raise
            if failed:
                self.announce_states()
        finally:
            self.locks.release(claim)

    async def _make_losses_good(self, offset: int, length: int) -> None:
        """Have those who lost any of these bytes be given them; raises `OSError` if one cannot be.

        As much at a time as is read at once: of a discard it may be most of the disk.
        """
        assert self.settle is not None
        for start in range(offset, offset + length, GIVEN_MAX):
            size = min(GIVEN_MAX, offset + length - start)
            if self.ledger.lossy(start, size):
                with suppress(OSError):
                    await self.settle(start, size)
        if self.ledger.lossy(offset, length):
            self.events.failure(offset, length)
            raise OSError(errno.EIO, "what a replica lost there cannot be made good")

    async def flush(self) -> None:
        """Make every acknowledged write durable on at least the threshold of replicas.

        A replica's success counts only for what it holds and no earlier flush lost (R4). A flush
        of a guest: what was lost on all replicas, whoever heard of it, fails exactly one (R13).
        """
        self.metadata.require_ours()
        try:
            await self.make_durable()
        except OSError:
            self.ledger.tell_loss()
            raise
        if self.ledger.tell_loss():
            raise OSError(errno.EIO, "writes since the last flush were lost on all replicas")

    async def make_durable(self) -> None:
        """As `flush`, for who is no guest: what was lost on all replicas is still to be told."""
        if self.settle_all is not None and self.ledger.unflushable():
            await self.settle_all()
        await self.sync()

    async def sync(self) -> None:
        """As `flush`, but what may differ is not made equal first: nothing is promised by it.

        Who copies from replicas has them tell first what they lost without anybody knowing.
        """
        asked = self._flushes
        if self._flush_lock.locked():
            await self._flush_lock.acquire()
        else:
            self._flush_lock.acquire_nowait()  # the other way costs a turn of the scheduler
        try:
            if self._flushes == asked:
                self._flushes += 1
                # What those who share this flush see should it end in any other way.
                self._flush_error = OSError(errno.EIO, "the flush was not finished")
                try:
                    await self._flush_replicas()
                except OSError as error:
                    self._flush_error = error
                else:
                    self._flush_error = None
            # Else a whole flush has begun and ended since: it covers what was to be flushed.
            if self._flush_error is not None:
                raise OSError(self._flush_error.errno, self._flush_error.strerror)
        finally:
            self._flush_lock.release()

    async def _flush_replicas(self) -> None:
        self.ledger.begin_flush(self.locks.changing())
        gathering = Gathering(self.threshold)
        outcomes = [Outcome(replica, Operation(Kind.SYNC)) for replica in self.ledger.flushed]
        for replica, operation in outcomes:
            gathering.submit(replica, operation)
        if await gathering.complete_or_failed():
            # Should we die while the slowest one is awaited, nobody else knows of it.
            await self.metadata.record_losses()
            await gathering.complete()
        self._report(outcome for outcome in outcomes if outcome.error is not None)
        await self.metadata.finish_flush(outcomes)
        self.announce_states()

    async def allocated_blocks(self) -> int:
        """512-byte blocks allocated on one replica's file system, as ``du`` would say of it."""
        in_use = sorted(self.ledger.readers, key=lambda replica: replica.state is not State.CURRENT)
        failed: list[Outcome] = []
        for replica in in_use:
            (outcome,) = await self.ask([replica], Kind.STAT, needed=0)
            if outcome.error is None:
                return cast("FileStatus", outcome.operation.value).blocks
            failed.append(outcome)
        raise voted_error(outcome.error for outcome in failed)

    async def next_data(self, offset: int) -> int:
        """The first byte at or after *offset* that some replica has data for; else the size.

        Only what all replicas have as a hole is one. A replica that fails, or knows no holes, has
        data everywhere; and one that missed writes has them as data.
        """
        places = [
            min(place, self.ledger.missed(replica).next_inside(offset, default=place))
            for replica, place in await self._seek(Kind.SEEK_DATA, offset, if_unknown=offset)
        ]
        return min(places, default=offset)

    async def next_hole(self, offset: int) -> int:
        """The first byte at or after *offset* that all replicas have as a hole; else the size.

        Where holes of different replicas alternate for long the search ends early, at a byte that
        is data: whoever goes on from there finds that out, and the time is bounded.
        """
        for _ in range(HOLE_ROUNDS_MAX):
            places = [
                self.ledger.missed(replica).next_outside(place)
                for replica, place in await self._seek(Kind.SEEK_HOLE, offset, self.size)
            ]
            offset = max(places, default=self.size)
            if offset >= self.size or await self.next_data(offset) > offset:
                break
        return offset

    async def _seek(self, kind: Kind, offset: int, if_unknown: int) -> list[tuple[Replica, int]]:
        """What each replica answers, those that do not answer at all left out."""
        self.metadata.require_ours()
        outcomes = await self.ask(self.ledger.readers, kind, self.threshold, offset)
        return [
            (
                outcome.replica,
                if_unknown if outcome.error else cast("int", outcome.operation.value),
            )
            for outcome in outcomes
            if outcome.replica.state is not State.MISSING
        ]

    async def close(self) -> None:
        """Make everything durable and let the replicas go. No request may be in flight.

        Raises `OSError` if the last flush failed; the replicas are let go all the same.
        """
        try:
            if self.metadata.fenced is None:
                await self.flush()
                await self.metadata.close()
        finally:
            await self.metadata.release()
            async with trio.open_nursery() as nursery:
                for replica in self.replicas:
                    counts = replica.role is State.CURRENT
                    nursery.start_soon(replica.close, None if counts else UNNEEDED_CLOSE_S)
            self.events.close()

    @property
    def flushing(self) -> bool:
        """Whether the replicas are being synced."""
        return self._flush_lock.locked()

    # For the guest's requests and for those who repair

    async def ask(
        self,
        replicas: Iterable[Replica],
        kind: Kind,
        needed: int,
        offset: int = 0,
        length: int = 0,
        data: bytes = b"",
    ) -> list[Outcome]:
        """Put one operation to all *replicas* at once and wait for every outcome.

        After the replica timeout those that have not answered are given up, if *needed* others
        have succeeded; else after twice that.
        """
        gathering = Gathering(needed)
        outcomes = []
        for replica in replicas:
            operation = Operation(kind, offset, length, data)
            outcomes.append(Outcome(replica, operation))
            gathering.submit(replica, operation)
        await gathering.complete()
        for replica, operation in outcomes:
            if isinstance(operation.error, TruncatedError):
                await self.metadata.truncated(replica)
        return outcomes

    async def reach(self, replicas: Iterable[Replica], offset: int, end: int) -> int:
        """How far from *offset*, at most to *end*, zeros can be made on all *replicas* within some
        milliseconds. One that does not say counts for as much as the largest write.
        """
        outcomes = await self.ask(replicas, Kind.REACH, self.threshold, offset, end - offset)
        least = min(end, offset + LEAST)
        reached = (least if o.error else cast("int", o.operation.value) for o in outcomes)
        return min(reached, default=least)

    async def read_locked(
        self, offset: int, length: int, pattern: ReadPattern | None = None
    ) -> Reading:
        """Read a range, by the read pattern or another one; the caller holds its lock."""
        deadline = trio.current_time() + self.search_s
        parts = [
            await self._read_part(choice, pattern or self._pattern, deadline)
            for choice in self.ledger.choices(offset, length)
        ]
        if len(parts) == 1:
            return parts[0]
        return Reading(b"".join(part.data for part in parts), any(p.repairable for p in parts))

    def sole_source(self, offset: int, length: int) -> Replica | None:
        """Whose answer alone would do for a read of this range; None: nobody's, or it is pinned."""
        choice, *others = self.ledger.choices(offset, length)
        if others or choice.pinned or choice.torn or not choice.holders:
            return None
        alone = isinstance(self._pattern, Fifo) or len(choice.holders) == 1
        return choice.holders[0] if alone else None

    def announce_states(self) -> None:
        """Tell the log of every replica whose state changed since the last time."""
        for replica, announced in self._announced.items():
            if replica.state is not announced:
                self._announced[replica] = replica.state
                self.events.state_changed(replica.path, announced, replica.state)

    async def _read_part(self, choice: Choice, pattern: ReadPattern, deadline: float) -> Reading:
        """Read a range from those who hold all of it; look for a way until *deadline*."""
        offset, length, holders, pinned, lacking, torn = choice
        if torn:
            pattern = Quorum(max(1, len(holders)))
        elif pinned:
            pattern = Reconcile(self.threshold)
        outcomes: list[Outcome] = []
        waiting = holders
        lost = False
        while True:
            # Who lost it while others were asked, or was left behind, does not hold it any more.
            still = holders_of(self.ledger, offset, length)
            lost = lost or not set(waiting).issubset(still)
            waiting = [replica for replica in waiting if replica in still]
            kept = [o for o in outcomes if o.error is not None or o.replica in still]
            lost = lost or len(kept) < len(outcomes)
            outcomes = kept
            succeeded = sum(outcome.error is None for outcome in outcomes)
            if not (count := pattern.ask_now(len(waiting), succeeded)):
                break
            wave, waiting = waiting[:count], waiting[count:]
            outcomes += await self.ask(
                wave, Kind.READ, pattern.needed(len(waiting)), offset, length
            )

        failed = [outcome for outcome in outcomes if outcome.error is not None]
        verdict = pattern.judge(
            offset,
            [(outcome.replica.index, outcome.data) for outcome in outcomes if not outcome.error],
            [_errno(outcome) for outcome in failed],
        )
        self._report(failed)
        self.report_outvoted(verdict.outvoted, offset)
        if verdict.difference is not None:
            self.events.difference(offset + verdict.difference)
        if verdict.data is not None:
            wrong = {outcome.replica for outcome in failed}
            wrong.update(self.replicas[loss.voter] for loss in verdict.outvoted if loss.strict)
            wrong.update(lacking)
            if pinned:
                # What may differ is settled in its own time; here it only counts who is right.
                answering = [outcome.replica for outcome in outcomes if not outcome.error]
                if len(answering) < VOTERS_MIN:  # else no single one answered for all of it
                    self.ledger.answered(answering[0], offset, length)
                return Reading(verdict.data, repairable=False)
            repairable = any(replica.state is not State.MISSING for replica in wrong)
            return Reading(verdict.data, repairable)

        if lost and not failed:  # others are to be asked now
            return await self.read_locked(offset, length, pattern)
        middle = middle_block(offset, length)
        if failed and middle and trio.current_time() < deadline:
            # One unreadable sector fails a whole request. Where replicas are bad at different
            # places, each half may still have enough good ones.
            rest = offset + length - middle
            left = await self._read_part(choice._replace(length=middle - offset), pattern, deadline)
            second = choice._replace(offset=middle, length=rest)
            right = await self._read_part(second, pattern, deadline)
            return Reading(left.data + right.data, left.repairable or right.repairable)
        self.events.failure(offset, length)
        raise OSError(verdict.errno, os.strerror(verdict.errno))

    def report_outvoted(self, losses: Iterable[Outvoted], offset: int) -> None:
        """Count and tell who held other data than the winner of a vote on a range at *offset*."""
        for loss in losses:
            replica = self.replicas[loss.voter]
            replica.counters.mismatches += 1
            self.events.bad(Kind.READ, replica.path, offset + loss.start, loss.end - loss.start)

    def _report(self, failed: Iterable[Outcome]) -> None:
        for replica, operation in failed:
            self.events.bad(
                operation.kind, replica.path, operation.offset, operation.length, operation.error
            )


def _errno(outcome: Outcome) -> int:
    return (outcome.error and outcome.error.errno) or errno.EIO
