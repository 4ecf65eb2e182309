"""Resync: make the replicas equal again, without being asked.

Three kinds of work, in this order, all under the disk's exclusive locks and beside the guest:

* *settle* what may differ after a crash, or after a change that failed: all current replicas get
  what the pinned source holds;
* *resync* replicas that were left behind: what they lack is copied from those that hold it, while
  they already get every new write; when they lack nothing they become current;
* *verify* images that were adopted as they were: compared, repaired by a strict majority alone.

Each can stop at any point, with the process or with a replica, and be done again.
"""

import errno
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import cast

import trio

from quorumfs.assembly import Found, Member, State, judge_returned
from quorumfs.dirtymap import CHUNK_MIN, UNVERIFIED, lacks
from quorumfs.disk import Disk
from quorumfs.errors import UserError
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.patterns import Fifo
from quorumfs.ranges import RangeSet
from quorumfs.repair.pacing import Pacer
from quorumfs.replica import Replica
from quorumfs.storage import Kind, Storage
from quorumfs.voting import blocks, vote_data, voted_error

log = logging.getLogger(__name__)

PIECE = 1 << 20
"""Bytes read and written at a time."""

PARALLEL = 4
"""Pieces at a time, while no guest is at work."""

BATCH = 64 << 20
"""Bytes copied between two syncs of the target."""

SAVE_S = 2.0
"""How often a repair's progress is made durable, seconds."""

RETRY_S = (1.0, 60.0)
"""The first and the longest wait before a replica that is left behind is tried again."""

CLEAR_S = 30.0
"""An extent not written to for this long (up to twice as long) needs no mark any more."""


@dataclass(slots=True)
class Returned:
    """A replica's files, opened again."""

    found: Found
    image: Storage
    sidecar: Storage


Reopen = Callable[[Replica], Awaitable[Returned]]
"""Opens, checks and locks the files of a replica again; raises `OSError` or `UserError`."""


@dataclass(slots=True)
class Progress:
    """What a repair is at."""

    kind: str
    """``settle``, ``resync`` or ``verify``."""
    replica: str | None
    total_bytes: int
    began: float
    """trio's clock, seconds."""
    done_bytes: int = 0


class _UnreadableError(OSError):
    """No replica can be read where another one lacks something."""


@dataclass(slots=True)
class _Retry:
    """When to try a replica again."""

    at: float = 0.0
    wait_s: float = RETRY_S[0]


class Resync:
    """The repairs of one disk with sidecars."""

    def __init__(
        self,
        disk: Disk,
        sidecars: Sidecars,
        reopen: Reopen,
        *,
        present: dict[Replica, Found],
        limit: int | None = None,
    ) -> None:
        """*present*: the replicas not current whose files are open, as they were found.

        *limit*: bytes a second, at most.
        """
        self.progress: Progress | None = None
        self.differing = RangeSet()
        """Chunks of adopted images that differ without a majority."""
        self._disk = disk
        self._sidecars = sidecars
        self._map = sidecars.map
        self._reopen = reopen
        self._present = present
        self._pacer = Pacer(limit)
        self._stop = trio.Event()
        self._stopped = trio.Event()
        self._retries: dict[Replica, _Retry] = {}
        self._saved_at = 0.0
        self._requests_seen = 0
        self._known_data: tuple[Replica | None, int, int] = None, 0, 0
        """Where a source was last found to have no hole: to seek again for every piece takes a file
        system without an extent tree as long as to read the file."""
        disk.settle = self.settle_and_read
        disk.settle_all = self.settle_all
        disk.verify = self.verify_range

    @property
    def chunk_size(self) -> int:
        """Bytes of a chunk."""
        return self._map.chunk_size

    async def run(self) -> None:
        """Repair whatever needs it, until stopped."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._clear_marks)
            while not self._stop.is_set():
                changed = self._sidecars.changed
                try:
                    worked = await self._work()
                except OSError as error:
                    if not self._stop.is_set():
                        log.warning("a repair stopped, and is tried again: %s", error.strerror)
                    worked = False
                except Exception:
                    log.exception("a repair stopped by an internal error, and is tried again")
                    worked = False
                self.progress = None
                self._disk.announce_states()
                if not worked:
                    with trio.move_on_after(RETRY_S[0]):
                        await changed.wait()
        self._stopped.set()

    async def stop(self) -> None:
        """End in good order, with nothing under way any more."""
        self._stop.set()
        self._sidecars.notify()
        await self._stopped.wait()

    async def _sleep(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._stop.wait()

    async def _work(self) -> bool:
        """Do one thing that needs doing; whether there was one."""
        sidecars = self._sidecars
        error: OSError | None = None
        for replica in self._disk.replicas:
            if await self._revive(replica):
                return True
        if sidecars.unsettled and sidecars.may_record:
            try:
                await self._settle()
            except OSError as caught:
                error = caught
            if not sidecars.unsettled:
                return True
        # Even so: when others are there again, those that cannot be made equal can be left behind.
        for replica in self._disk.replicas:
            if await self._come_back(replica):
                return True
        if sidecars.unsettled:
            if error is not None:
                raise error
            return False
        if len(sidecars.members) > 1 and self._map.count(UNVERIFIED):
            return await self._verify()
        return False

    # Settling

    async def _settle(self) -> None:
        total = sum(end - start for start, end in self._sidecars.unsettled)
        self._begin("settle", None, total * self._map.chunk_size)
        runs = [range(start, end) for start, end in self._sidecars.unsettled]
        async with aclosing(self._batches(runs, self._sidecars.settled)) as batches:
            async for batch in batches:
                await self._in_parallel(self._units(batch), self._settle_unit)
        await self._save()

    async def settle_all(self) -> None:
        """Settle what a flush must know to be equal; raises EIO if it cannot be made so."""
        sidecars = self._sidecars
        runs = sidecars.to_settle_first()
        async with aclosing(self._batches(runs, sidecars.settled, urgent=True)) as batches:
            async for batch in batches:
                await self._in_parallel(self._units(batch), self._settle_unit, urgent=True)
        if sidecars.unflushable():
            raise OSError(errno.EIO, "what differs since a crash cannot be made equal")

    async def settle_and_read(self, offset: int, length: int) -> bytes:
        """Settle what may differ in a range, and only then show it.

        Raises EIO where replicas differ and cannot be made equal: what is seen must not turn back.
        """
        chunks = self._map.chunks(offset, length)
        async with self._disk.locks.held(*self._bounds(chunks), exclusive=True):
            for unit in self._units([chunks]):
                if not await self._settle_locked(unit):
                    raise OSError(errno.EIO, "the replicas differ, and cannot be made equal")
            return (await self._disk.read_locked(offset, length)).data

    async def _settle_unit(self, chunks: range) -> None:
        async with self._disk.locks.held(*self._bounds(chunks), exclusive=True):
            await self._settle_locked(chunks)

    async def _settle_locked(self, chunks: range) -> bool:
        """Have all current replicas hold the same in *chunks*; whether they do now."""
        if not self._sidecars.unsettled.overlaps(chunks.start, chunks.stop):
            return True
        disk, (offset, end) = self._disk, self._bounds(chunks)
        equal = rewritten = True
        while offset < end:
            data_at = min(end, await self._next_data(offset))
            if data_at == offset:
                hole_at = await disk.next_hole(offset)
                data_at = min(end, hole_at) if hole_at > offset else end
                for piece in _pieces(offset, data_at):
                    before, after = await self._settle_piece(*piece)
                    equal = equal and (before or after)
                    rewritten = rewritten and after
            offset = data_at
        if rewritten:
            self._sidecars.settled(chunks)
        return equal

    async def _settle_piece(self, offset: int, length: int) -> tuple[bool, bool]:
        """Have all current replicas hold what the source holds.

        All are written to, the source too and however equal they look: a flush that failed before
        a crash may have dropped pages that reads still show (R4). What is a hole on all replicas
        can hide no such loss, and is left out. Returns whether they were equal before, and whether
        all took it.
        """
        source = self._sidecars.source
        outcomes = await self._disk.ask(self._sidecars.members, Kind.READ, 1, offset, length)
        readable = [outcome for outcome in outcomes if outcome.error is None]
        if not readable:
            return False, False
        right = next((o for o in readable if o.replica is source), readable[0])
        self._sidecars.answered(right.replica)
        equal = len(readable) == len(outcomes) and all(o.data == right.data for o in readable)
        took = await self._give([o.replica for o in outcomes], offset, right.data)
        return equal, took

    async def _give(self, replicas: Sequence[Replica], offset: int, data: bytes) -> bool:
        """Write *data* to current *replicas*; False if one that stays current cannot take it.

        The caller holds the lock.
        """
        if not self._sidecars.prepared(offset, len(data)):
            await self._sidecars.prepare(offset, len(data))
        self._sidecars.begin(offset, len(data))
        # Who was left behind just now may not even know that its image is in use.
        current = [replica for replica in replicas if replica.role is State.CURRENT]
        outcomes = await self._disk.ask(current, Kind.WRITE, 0, offset, len(data), data)
        failed = sum(outcome.error is not None for outcome in outcomes)
        # As with a guest's write (R2): where too few are left nobody is to blame, all may be full.
        enough = len(self._sidecars.members) - failed >= self._disk.threshold
        for replica, operation in outcomes:
            well = operation.error is None
            if well:
                replica.counters.copied_bytes += len(data)
            if well or enough:
                await self._sidecars.repaired(replica, offset, len(data), well=well)
        return all(
            outcome.error is None or outcome.replica.role is not State.CURRENT
            for outcome in outcomes
        )

    # Verifying

    async def _verify(self) -> bool:
        unverified = self._map.runs(UNVERIFIED, longest=len(self._map))
        runs = list(_without(unverified, self.differing))
        if not runs:
            return False
        total = sum(map(len, runs)) * self._map.chunk_size
        self._begin("verify", None, total)
        unreadable = False

        async def verify_if_readable(chunks: range) -> None:
            nonlocal unreadable
            try:
                await self._verify_unit(chunks)
            except OSError:
                unreadable = True  # to be tried again

        async with aclosing(self._batches(runs, self._sidecars.verified)) as batches:
            async for batch in batches:
                await self._in_parallel(self._units(batch), verify_if_readable)
                await self._save(often=False)
        await self._save()
        return not unreadable

    async def verify_range(self, offset: int, length: int) -> None:
        """Compare the extents of a range, before they are changed."""
        extents = self._map.extents(offset, length)
        chunks = self._map.extent_chunks(extents)
        unverified = self._map.runs(UNVERIFIED, chunks.start, longest=len(chunks))
        for run in _without(unverified, self.differing):
            if run.start >= chunks.stop:
                break
            for unit in self._units([range(run.start, min(run.stop, chunks.stop))]):
                await self._verify_unit(unit)

    async def _verify_unit(self, chunks: range) -> None:
        start, end = self._bounds(chunks)
        async with self._disk.locks.held(start, end, exclusive=True):
            differing = RangeSet()
            for piece in _pieces(start, end):
                await self._verify_piece(*piece, differing)
            for chunk in chunks:
                if differing.overlaps(*self._map.bounds(chunk)):
                    self.differing.add(chunk, chunk + 1)
                else:
                    self._sidecars.verified(range(chunk, chunk + 1))

    async def _verify_piece(self, offset: int, length: int, differing: RangeSet) -> None:
        """Compare a piece, and repair what a majority decides; *differing* gets the rest.

        Raises `OSError` if fewer than the threshold can be read, or repaired.
        """
        disk, members = self._disk, list(self._sidecars.members)
        asked = await disk.ask(members, Kind.READ, disk.threshold, offset, length)
        outcomes = [outcome for outcome in asked if outcome.error is None]
        if len(outcomes) < disk.threshold or not outcomes:
            raise voted_error(outcome.error for outcome in asked if outcome.error)
        first = outcomes[0].data
        if all(outcome.data == first for outcome in outcomes[1:]):
            unreadable = [outcome.replica for outcome in asked if outcome.error is not None]
            if unreadable and not await self._give(unreadable, offset, first):
                raise OSError(errno.EIO, "what cannot be read cannot be written either")
            return
        for start, end in blocks(offset, length):
            answers = [(o.replica.index, o.data[start:end]) for o in outcomes]
            vote = vote_data(answers, offset + start, disk.threshold)
            losers = {loss.voter for loss in vote.outvoted}
            wrong = [outcome.replica for outcome in outcomes if outcome.replica.index in losers]
            if not wrong:
                continue
            decided = vote.data is not None and all(loss.strict for loss in vote.outvoted)
            if not decided:
                disk.events.differs(offset + start, end - start)
            if not decided or not await self._give(wrong, offset + start, vote.data or b""):
                differing.add(offset + start, offset + end)
                continue
            for replica in wrong:
                disk.events.repaired(replica.path, offset + start, end - start)

    # Bringing a replica back

    async def _come_back(self, replica: Replica) -> bool:
        """Bring *replica* up to date, if it was left behind and is there; whether it was."""
        out = replica.role in (State.STALE, State.SUSPECT, State.MISSING)
        if not out or replica.slot is None or replica.in_flight:
            return False
        retry = self._retries.setdefault(replica, _Retry())
        now = trio.current_time()
        if now < retry.at or not self._sidecars.members:
            return False
        if now - retry.at > RETRY_S[1]:
            retry.wait_s = RETRY_S[0]  # what was before is long ago
        try:
            member, found = await self._look_at(replica)
            replica.role, replica.reason = member.state, member.reason or replica.reason
            if member.state in (State.FOREIGN, State.MISSING):
                raise UserError(member.reason or "it cannot be used")
            await self._resync(replica, found, full=member.compare)
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if replica.role is not State.FOREIGN:
                replica.reason = reason or replica.reason
            if not replica.in_flight:
                replica.detach()
            retry.at = trio.current_time() + retry.wait_s
            retry.wait_s = min(2 * retry.wait_s, RETRY_S[1])
            return False
        # One that fails again soon waits longer than the last time: each time costs a generation.
        retry.at = trio.current_time() + retry.wait_s
        retry.wait_s = min(2 * retry.wait_s, RETRY_S[1])
        return True

    async def _revive(self, replica: Replica) -> bool:
        """Open a current replica anew whose file system was gone, if too few others are left to
        leave it behind; whether it is there again.
        """
        gone = replica.role is State.CURRENT and (replica.dead or not replica.attached)
        retry = self._retries.setdefault(replica, _Retry())
        if not gone or replica.in_flight or trio.current_time() < retry.at:
            return False
        retry.at = trio.current_time() + RETRY_S[0]
        replica.detach()
        try:
            returned = await self._reopen(replica)
            replica.attach(returned.image, returned.sidecar)
            if replica.role is not State.CURRENT:
                raise UserError("it was left behind meanwhile")
            await self._sidecars.revive(replica, returned.found)
        except (OSError, UserError) as error:
            replica.reason = str(error)
            if replica.attached and not replica.in_flight:
                replica.detach()
            return False
        replica.reason = None
        return True

    async def _look_at(self, replica: Replica) -> tuple[Member, Found]:
        assert replica.slot is not None
        found = self._present.pop(replica, None)
        if found is None or not replica.attached:
            replica.detach()
            returned = await self._reopen(replica)
            replica.attach(returned.image, returned.sidecar)
            found = returned.found
        if found.image is not None and found.image.size < self._map.size:
            self._sidecars.truncated(replica)
        return judge_returned(self._sidecars.record, replica.slot, found), found

    async def _resync(self, replica: Replica, found: Found, *, full: bool) -> None:
        assert found.image is not None
        assert found.sidecar is not None
        assert replica.slot is not None
        sidecars = self._sidecars
        await sidecars.start_resync(replica, found.image, found.sidecar, full=full)
        self._disk.announce_states()
        bit = lacks(replica.slot)
        self._begin("resync", replica.path, sidecars.map.lacking_bytes(replica.slot))
        assert self.progress is not None
        self._disk.events.resync_started(replica.path, self.progress.total_bytes)
        copied_before = replica.counters.copied_bytes
        error: str | None = None
        try:
            while self._map.count(bit):
                await self._copy_all(replica, bit, compare=full)
            await sidecars.join()
        except OSError as caught:
            error = caught.strerror or str(caught)
            sidecars.drop_target(replica, error)
            raise
        finally:
            copied = replica.counters.copied_bytes - copied_before
            self._disk.events.resync_finished(replica.path, copied, error)

    async def _copy_all(self, replica: Replica, bit: int, *, compare: bool) -> None:
        """Copy what the replica lacks, in batches: sync them, and only then call them held (R8)."""

        unreadable = RangeSet()

        async def copy_chunks(chunks: range) -> None:
            try:
                for piece in _pieces(*self._bounds(chunks)):
                    await self._copy(replica, *piece, compare=compare)
            except _UnreadableError:
                if len(chunks) == 1:
                    unreadable.add(chunks.start, chunks.stop)
                    return
                for chunk in chunks:
                    await copy_chunks(range(chunk, chunk + 1))

        async def copy_unit(chunks: range) -> None:
            async with self._disk.locks.held(*self._bounds(chunks), exclusive=True):
                await copy_chunks(chunks)

        lacking = self._map.runs(bit, longest=len(self._map))
        holes: list[range] = []
        async with aclosing(self._batches(lacking, holes.append, replica)) as batches:
            async for batch in batches:
                self._known_data = None, 0, 0
                await self._in_parallel(self._units(batch), copy_unit)
                if self._sidecars.target is not replica:
                    raise OSError(errno.EIO, replica.reason or "it failed meanwhile")
                await self._sidecars.sync_target()
                self._sidecars.caught_up([*_without(batch, unreadable), *holes])
                holes.clear()
                await self._save(often=False)
        await self._save()
        if unreadable:
            count = sum(end - start for start, end in unreadable)
            raise OSError(errno.EIO, f"{count} chunks can be read on no current replica")

    async def _copy(self, target: Replica, offset: int, length: int, *, compare: bool) -> None:
        """Give *target* what the disk holds in a range; holes stay holes. The lock is held."""
        end = offset + length
        while offset < end:
            source = self._sidecars.source
            known, data_from, data_to = self._known_data
            if known is not source or not data_from <= offset < data_to:
                data_from = await self._seek(source, Kind.SEEK_DATA, offset)
                if data_from > offset:
                    await self._make_hole(target, offset, min(end, data_from))
                    offset = min(end, data_from)
                    continue
                data_to = max(await self._seek(source, Kind.SEEK_HOLE, offset), offset + 1)
                self._known_data = source, data_from, data_to
            stop = min(end, data_to)
            # Too few are left to hold a vote: what they hold is still all there is.
            few = len(self._sidecars.members) < self._disk.threshold
            pattern = Fifo() if few else None
            try:
                reading = await self._disk.read_locked(offset, stop - offset, pattern)
            except OSError as error:
                raise _UnreadableError(*error.args) from None
            held = await self._held(target, offset, stop - offset) if compare else None
            for start, data in _differing(reading.data, held):
                await self._tell(target, Kind.WRITE, offset + start, len(data), data)
                target.counters.copied_bytes += len(data)
            offset = stop

    async def _make_hole(self, target: Replica, offset: int, end: int) -> None:
        if await self._seek(target, Kind.SEEK_DATA, offset) < end:
            await self._tell(target, Kind.DISCARD, offset, end - offset)

    async def _seek(self, replica: Replica | None, kind: Kind, offset: int) -> int:
        """Where a replica's next data or hole is; all is data if it cannot tell."""
        if replica is not None:
            (outcome,) = await self._disk.ask([replica], kind, 0, offset)
            if outcome.error is None:
                return cast("int", outcome.operation.value)
        return offset if kind is Kind.SEEK_DATA else self._map.size

    async def _held(self, target: Replica, offset: int, length: int) -> bytes | None:
        (outcome,) = await self._disk.ask([target], Kind.READ, 0, offset, length)
        return None if outcome.error is not None else outcome.data

    async def _tell(
        self, target: Replica, kind: Kind, offset: int, length: int, data: bytes = b""
    ) -> None:
        if self._sidecars.target is not target:
            raise OSError(errno.EIO, target.reason or "it failed meanwhile")
        (outcome,) = await self._disk.ask([target], kind, 0, offset, length, data)
        if outcome.error is not None:
            raise outcome.error

    # Marks

    async def _clear_marks(self) -> None:
        """Forget, in idle times, where writes once were under way (R5)."""
        while True:
            await self._sleep(CLEAR_S)
            if self._stop.is_set():
                return
            if not self._sidecars.idle_extents():
                self._sidecars.forget_touched()
                continue
            with suppress(OSError):  # the next time, then
                await self._disk.flush()
                await self._sidecars.clear_marks(self._disk.locks.exclusively_held)

    # The common part

    def _begin(self, kind: str, replica: str | None, total: int) -> None:
        total = min(total, self._map.size)
        self.progress = Progress(kind, replica, total, trio.current_time())
        self._saved_at = trio.current_time()

    async def _save(self, *, often: bool = True) -> None:
        """Have the sidecars know how far we are; not *often*: if that was long ago."""
        if often or trio.current_time() - self._saved_at >= SAVE_S:
            await self._sidecars.save_progress()
            self._saved_at = trio.current_time()

    def _bounds(self, chunks: range) -> tuple[int, int]:
        return self._map.bounds(chunks.start)[0], self._map.bounds(chunks[-1])[1]

    async def _batches(
        self,
        runs: Iterable[range],
        pass_over: Callable[[range], None],
        target: Replica | None = None,
        *,
        urgent: bool = False,
    ) -> AsyncGenerator[list[range], None]:
        """Batches of those chunks of *runs* in which some replica has data.

        *pass_over* is told, under their lock, of those that are a hole on all: most of a large
        disk may be. Asked are the current replicas, and *target*.
        """
        size = self._map.chunk_size
        batch: list[range] = []
        length = 0
        for run in runs:
            chunk = run.start
            while chunk < run.stop:
                if self._stop.is_set() and not urgent:
                    raise OSError(errno.EINTR, "unmounting")
                stop, hole = await self._extent(chunk, run.stop, target)
                if hole:
                    held = self._disk.locks.held(*self._bounds(range(chunk, stop)), exclusive=True)
                    async with held:  # a write under way may have made it another
                        stop, hole = await self._extent(chunk, stop, target)
                        if hole:
                            pass_over(range(chunk, stop))
                if not hole:
                    batch.append(range(chunk, stop))
                    length += (stop - chunk) * size
                elif self.progress is not None:
                    self.progress.done_bytes += (stop - chunk) * size
                chunk = stop
                if length >= BATCH:
                    yield batch
                    batch, length = [], 0
        yield batch

    async def _extent(self, chunk: int, stop: int, target: Replica | None) -> tuple[int, bool]:
        """How far chunks are alike from *chunk* on, at most to *stop*: data, or a hole on all."""
        size = self._map.chunk_size
        offset = chunk * size
        data_at = end = await self._next_data(offset)
        if target is not None:
            target_at = await self._seek(target, Kind.SEEK_DATA, offset)
            if target_at == offset < data_at:
                end = min(end, await self._seek(target, Kind.SEEK_HOLE, offset))
            data_at = min(data_at, target_at)
        if data_at // size > chunk:
            return min(stop, data_at // size), True
        if end <= offset:
            end = await self._disk.next_hole(data_at)
        return min(stop, max(chunk + 1, -(-end // size)), chunk + BATCH // size + 1), False

    async def _next_data(self, offset: int) -> int:
        """Where some current replica next has data: anywhere, if one of them does not answer."""
        found = await self._disk.next_data(offset)
        silent = any(replica.state is State.MISSING for replica in self._sidecars.members)
        return offset if silent else found

    def _units(self, runs: Iterable[range]) -> Iterator[range]:
        """Chunks to be locked at a time: as few as possible, and at least a piece."""
        longest = max(1, PIECE // self._map.chunk_size)
        for run in runs:
            for start in range(run.start, run.stop, longest):
                yield range(start, min(start + longest, run.stop))

    async def _in_parallel(
        self,
        units: Iterator[range],
        work: Callable[[range], Awaitable[None]],
        *,
        urgent: bool = False,
    ) -> None:
        """Work on *units*, several at a time on an idle disk, paced beside a guest.

        *urgent*: at full speed, because somebody waits. Raises the first `OSError`, after those
        under way have ended.
        """
        errors: list[OSError] = []

        async def worker() -> None:
            for unit in units:
                if self._stop.is_set() and not urgent:
                    errors.append(OSError(errno.EINTR, "unmounting"))
                    return
                start, end = self._bounds(unit)
                began = trio.current_time()
                try:
                    await work(unit)
                except OSError as error:
                    errors.append(error)
                if errors:
                    return
                if urgent:
                    continue
                if self.progress is not None:
                    self.progress.done_bytes += end - start
                await self._rest(began, end - start)

        async with trio.open_nursery() as nursery:
            for _ in range(PARALLEL):
                nursery.start_soon(worker)
        if errors:
            raise errors[0]

    async def _rest(self, began: float, length: int) -> None:
        requests = self._disk.requests
        active = requests != self._requests_seen
        self._requests_seen = requests
        pause = self._pacer.rest(began, trio.current_time(), length, guest_active=active)
        if pause > 0:
            await self._sleep(pause)


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths of at most `PIECE` bytes that make up ``[start, end)``."""
    for offset in range(start, end, PIECE):
        yield offset, min(PIECE, end - offset)


def _differing(data: bytes, held: bytes | None) -> Iterator[tuple[int, bytes]]:
    """The parts of *data* that *held* has not, with their offsets; all of it if that is unknown."""
    if held is None:
        yield 0, data
    if held is None or held == data:
        return
    start = 0
    while start < len(data):
        end = start
        while end < len(data) and data[end : end + CHUNK_MIN] != held[end : end + CHUNK_MIN]:
            end += CHUNK_MIN
        if end > start:
            yield start, data[start:end]
        start = end + CHUNK_MIN


def _without(runs: Iterable[range], left_out: RangeSet) -> Iterator[range]:
    for run in runs:
        start = run.start
        while start < run.stop:
            start = left_out.next_outside(start)
            stop = min(run.stop, left_out.next_inside(start, default=run.stop))
            if start < stop:
                yield range(start, stop)
            start = max(stop, start + 1)
