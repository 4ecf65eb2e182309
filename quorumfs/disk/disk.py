"""The replicated disk: the one place that orders a guest's requests.

A request takes its range lock, goes to the replicas, and gets its verdict. Writes that a replica
missed are on record before the guest hears of success.
"""

import errno
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from typing import Protocol, cast

import trio

from quorumfs.decisions.patterns import Comparing, ReadPattern
from quorumfs.decisions.voting import BLOCK, voted_error
from quorumfs.disk import holes
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.rangelock import RangeClaim
from quorumfs.disk.reading import read_locked
from quorumfs.disk.takeover import Taken
from quorumfs.disk.watchdog import Watchdog
from quorumfs.disk.zeroing import Zeroing
from quorumfs.metadata.ledger.knowledge import Outcome, succeeded
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import FileStatus, Kind

log = logging.getLogger(__name__)

ALLOCATION_MAX = 1 << 30
"""Bytes of space reserved at a time. Noting this many chunks takes some milliseconds, in which
nothing else runs."""

UNNEEDED_CLOSE_S = 0.5
"""How long a close waits (seconds) for the files of a replica that is not current."""

COMPARED_MAX = 1 << 20
"""Bytes compared at a time where an answer came late."""

GIVEN_MAX = 1 << 20
"""Bytes given back at a time to a replica that lost them, before a guest changes them."""

_ZEROS = bytes(1 << 20)  # the largest request


class Repairer(Protocol):
    """Makes replicas equal for a request that has to wait for that.

    Offsets and lengths are bytes, inside the disk. The caller holds no lock.
    """

    async def settle_and_read(self, offset: int, length: int) -> bytes:
        """Make the replicas equal in a range that may differ, and read it under the same lock.

        Raises `OSError` if the range cannot be read, or if the read might turn back (P7).
        """

    async def settle_all(self) -> None:
        """Make the replicas equal in all chunks whose durability a flush could not tell.

        Raises `OSError` if that fails.
        """

    async def verify(self, offset: int, length: int) -> None:
        """Compare the chunks of a range that were never compared."""

    async def rewrite(self, offset: int, length: int) -> bytes:
        """Read a range anew, and rewrite the replicas that the read shows to be wrong.

        Raises `OSError` if the range cannot be read, or may differ.
        """


class Disk:
    """One disk, as a guest sees it: *mirror*, and what *repairer* does for a request at once.

    All methods raise `OSError` with the errno for the guest. Offsets and lengths are bytes.
    """

    def __init__(
        self, mirror: Mirror, repairer: Repairer | None = None, *, zero_kind: Kind | None = None
    ) -> None:
        """*repairer*: None if nothing is ever repaired; the read pattern alone then decides reads.

        *zero_kind*: the operation that an aligned write of zeros becomes; None: a write.
        """
        self.mirror = mirror
        self.metadata = mirror.metadata
        self.ledger = mirror.ledger
        self.events = mirror.events
        self._locks = mirror.locks
        self._repairer = repairer
        self._zero_kind = zero_kind
        self._zeroing = Zeroing(mirror)
        self._watchdog = Watchdog(mirror)

    @property
    def replicas(self) -> Sequence[Replica]:
        """In the order of the read pattern; some may come and go."""
        return self.mirror.replicas

    @property
    def threshold(self) -> int:
        """How many replicas must take a change, or sync, for a change or a flush to succeed."""
        return self.ledger.threshold

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self.mirror.size

    def held(self) -> AbstractAsyncContextManager[None]:
        """Hold all of the disk: no request is under way then, nor any vote."""
        return self._locks.held(0, self.size, exclusive=True)

    def repair_by(self, repairer: Repairer | None) -> None:
        """Have *repairer* repair from the next request on; None: nothing is repaired."""
        self._repairer = repairer

    async def run(self) -> None:
        """Watch deadlines, held-back events, late answers, and the claim on the set, until
        cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watchdog.run)
            await self._look_at_late_answers()

    async def _look_at_late_answers(self) -> None:
        """See to answers that came after the decision of their votes, until cancelled."""
        late = self.mirror.late_answers
        while True:
            await late.wait()
            try:
                await self.mirror.note_truncated(late.failed())
                if (place := late.suspected(COMPARED_MAX)) is not None:
                    await self._compare(*place)
            except OSError:
                pass  # told where it happened
            except Exception:
                log.exception("internal error: a late answer is not compared")

    async def _compare(self, offset: int, length: int) -> None:
        """Read once more, of all and under a lock, where an answer differed that came late.

        No guest waits for this: nothing is told if it fails. Raises `OSError`.
        """
        self.metadata.require_ours()
        await self._read(offset, length, Comparing(self.threshold))

    async def read(self, offset: int, length: int) -> bytes:
        """Read *length* bytes at *offset*: fewer at the end of the disk, none behind it."""
        self.metadata.require_ours()
        length = min(length, self.mirror.size - offset)
        if length <= 0:
            return b""
        self.mirror.requests += 1
        data = await self._read(offset, length)
        self.metadata.require_ours()
        return data

    async def _read(self, offset: int, length: int, pattern: ReadPattern | None = None) -> bytes:
        """Read a range inside the disk, and repair replicas that the read shows to be wrong.

        *pattern*: None: the read pattern.
        """
        reading, repairer = None, self._repairer
        if repairer is None or not self.ledger.may_differ(offset, length):
            claim = await self._locks.acquire(offset, offset + length, exclusive=False)
            try:  # a write that held the lock may have failed
                if repairer is None or not self.ledger.may_differ(offset, length):
                    reading = await read_locked(self.mirror, offset, length, pattern)
            finally:
                self._locks.release(claim)
        if reading is None:
            assert repairer is not None
            # A read must not turn back when the only holder of its data is lost (P7).
            return await repairer.settle_and_read(offset, length)
        if reading.repairable and repairer is not None:
            # The data just read is not used: a write may have come since the lock was released.
            with suppress(OSError):  # the data just read is still a valid answer
                return await repairer.rewrite(offset, length)
        return reading.data

    async def write(self, offset: int, data: bytes) -> int:
        """Write *data* at *offset*; returns the bytes written: fewer if the disk ends before.

        Raises ENOSPC at or behind the end.
        """
        length = min(len(data), self.mirror.size - offset)
        if length <= 0:
            raise OSError(errno.ENOSPC, "the disk ends before")
        if length < len(data):
            data = data[:length]
        if self._zero_kind is not None and self._to_be_zeros(offset, data):
            await self._change(self._zero_kind, offset, length)
        else:
            await self._change(Kind.WRITE, offset, length, data)
        return length

    def _to_be_zeros(self, offset: int, data: bytes) -> bool:
        """Whether a write of *data* is to become an operation of the zero kind."""
        length = len(data)
        asked = self._zero_kind is not None and not (offset | length) % BLOCK
        return asked and data == _ZEROS[:length]

    async def make_zeros(self, offset: int, length: int, *, discard: bool) -> None:
        """Make zeros of a range, as far as the disk goes; with *discard*, give the space back."""
        kind = Kind.DISCARD if discard else Kind.ZERO
        end = min(offset + length, self.mirror.size)
        while offset < end:
            stop = await self._zeroing.next_step(offset, end)
            await self._change(kind, offset, stop - offset)
            offset = stop

    async def allocate(self, offset: int, length: int) -> None:
        """Reserve space for a range, as far as the disk goes and file systems can."""
        end = min(offset + length, self.mirror.size)
        for start in range(offset, end, ALLOCATION_MAX):
            piece = min(ALLOCATION_MAX, end - start)
            if not self.ledger.prepared(start, piece):  # the image's times change
                await self.metadata.prepare(start, piece)
            receivers = self.ledger.receivers
            outcomes = await self.mirror.ask(receivers, Kind.ALLOCATE, self.threshold, start, piece)
            if succeeded(outcomes) < self.threshold:
                raise voted_error(outcome.error for outcome in outcomes if outcome.error)

    async def _change(self, kind: Kind, offset: int, length: int, data: bytes = b"") -> None:
        """Change bytes on all replicas: the way of every write."""
        self.mirror.requests += 1
        metadata = self.metadata
        metadata.require_ours()
        if self._repairer is not None and self.ledger.unverified(offset, length):
            # Else a crash in the change would mix older differences with new ones.
            await self._repairer.verify(offset, length)
        if self._repairer is not None and self.ledger.lossy(offset, length):
            # Else, should another replica lose the new data, no replica would hold both.
            await self._make_losses_good(self._repairer, offset, length)
        bad = self.ledger.unreadable
        if bad and self._repairer is not None and bad.overlaps(offset, offset + length):
            # What was not readable is made durable with the write; a sync proves nothing, and may
            # fail, while other chunks wait to be made equal.
            with suppress(OSError):
                await self._repairer.settle_all()
        claim = await self._locks.acquire(offset, offset + length, exclusive=True)
        try:
            if not self.ledger.prepared(offset, length):
                await metadata.prepare(offset, length, ahead=True)
            claim.changes = ((offset, offset + length),)
            losses = metadata.losses
            receivers = self.ledger.begin(offset, length)
            outcomes = await self.mirror.ask(receivers, kind, self.threshold, offset, length, data)
            await self._conclude(claim, outcomes, offset, length, losses)
        finally:
            self.mirror.zeroings += kind is not Kind.WRITE
            self._locks.release(claim)

    async def finish(self, taken: Taken) -> None:
        """Finish a write that was taken over from the fast path; raises `OSError` if it fails."""
        try:
            await self.mirror.complete(taken.fan_out, taken.outcomes)
            length, losses = len(taken.data), taken.losses
            await self._conclude(taken.claim, taken.outcomes, taken.offset, length, losses)
        finally:
            self._locks.release(taken.claim)

    async def _conclude(
        self,
        claim: RangeClaim,
        outcomes: Sequence[Outcome],
        offset: int,
        length: int,
        losses: int,
    ) -> None:
        """Draw the conclusions of a change that has all its outcomes, under its *claim*.

        *losses*: `Metadata.losses` when the change began.
        """
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        self.mirror.report(failed)
        try:
            await self.metadata.finish(outcomes, offset, length)
            if self.ledger.unreadable.overlaps(offset, offset + length):
                claim.changes = ()
                # If the bytes were readable before they are durable, a power cut in between
                # would show whatever lay there before (P1). Chunks that wait to be made equal,
                # as after a crash, say nothing of these bytes, unless a flush failed meanwhile.
                if not await self.mirror.sync() and self.metadata.losses != losses:
                    raise OSError(errno.EIO, "what was written may not be durable")
                await self.metadata.written_over(offset, length)
        except OSError:
            self.events.failure(offset, length)
            raise
        if failed:
            self.mirror.announce_states()

    async def _make_losses_good(self, repairer: Repairer, offset: int, length: int) -> None:
        """Give these bytes back to every member that lost any; raises `OSError` if that fails.

        The range is cut in pieces, because a discard may cover most of the disk.
        """
        for start in range(offset, offset + length, GIVEN_MAX):
            size = min(GIVEN_MAX, offset + length - start)
            if self.ledger.lossy(start, size):
                with suppress(OSError):
                    await repairer.settle_and_read(start, size)
        if self.ledger.lossy(offset, length):
            self.events.failure(offset, length)
            raise OSError(errno.EIO, "what a replica lost there cannot be made good")

    async def flush(self) -> None:
        """Make every acknowledged write durable on at least the threshold of replicas.

        A sync counts only for data that its replica holds and no earlier sync lost (R4). A loss on
        all replicas fails exactly one flush of the guest, whichever sync reported the loss (R13).
        """
        self.metadata.require_ours()
        try:
            durable = False
            while not durable:
                if self._repairer is not None and self.ledger.unflushable():
                    await self._repairer.settle_all()
                # An earlier flush may fail while this one waits for it, and leave more to settle.
                durable = await self.mirror.sync() or self._repairer is None
        except OSError:
            self.ledger.tell_loss()
            raise
        if self.ledger.tell_loss():
            raise OSError(errno.EIO, "writes since the last flush were lost on all replicas")

    async def allocated_blocks(self) -> int:
        """512-byte blocks allocated on one replica's file system, as ``du`` would say of it."""
        in_use = sorted(self.ledger.readers, key=lambda replica: not replica.state.is_member)
        failed: list[Outcome] = []
        for replica in in_use:
            (outcome,) = await self.mirror.ask([replica], Kind.STAT, needed=0)
            if outcome.error is None:
                return cast("FileStatus", outcome.operation.value).blocks
            failed.append(outcome)
        raise voted_error(outcome.error for outcome in failed)

    async def next_data(self, offset: int) -> int:
        """The first byte at or after *offset* that some replica has data for; else the size."""
        return await holes.next_data(self.mirror, offset)

    async def next_hole(self, offset: int) -> int:
        """The first byte at or after *offset* that is a hole on all replicas; else the size.

        A search that takes too long ends early, at a byte that is data.
        """
        return await holes.next_hole(self.mirror, offset)

    async def close(self) -> None:
        """Make everything durable and close the replicas. No request may be in flight.

        Raises `OSError` if the last flush failed; the replicas are closed all the same.
        """
        try:
            if self.metadata.fenced is None:
                await self.mirror.note_truncated(self.mirror.late_answers.failed())
                await self.flush()
                await self.metadata.close()
        finally:
            await self.metadata.release()
            async with trio.open_nursery() as nursery:
                for replica in self.replicas:
                    counts = replica.standing.is_member
                    nursery.start_soon(replica.close, None if counts else UNNEEDED_CLOSE_S)
            self.events.close()
