"""Scrubbing: reading all that any current replica holds, to find what rots before it is needed.

A scrub goes from the start of the disk to its end, over the places where some current replica has
data, a unit at a time under the shared lock, paced like a resync. It is the last of all repairs:
every other one goes first. What it does with each place is `quorumfs.repair.inspection`.

How far it is, and what the last one found, is remembered in the sidecars: a mount goes on where the
one before ended. The clock of the host decides when the next one is due, and nothing else.
"""

import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

import trio

from quorumfs.decisions.ranges import RangeSet
from quorumfs.decisions.scrub import UNDECIDED_MAX, Counts, ScrubRecord
from quorumfs.decisions.voting import BLOCK
from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.inspection import Find, Findings, Inspection
from quorumfs.repair.work import Work, pieces

SAVE_S = 30.0
"""How often (seconds) the position is made durable."""

STEP_S = 5.0
"""Seconds after which other repairs are looked for."""

MEMBERS_MIN = 2
"""Current replicas that it takes to compare anything."""

AGAIN_S = 60.0
"""How often (seconds) undecided places are looked at again, if a guest may have written there or
other replicas are current."""

AGAIN_MAX = 256
"""Undecided places that are looked at again at a time."""


@dataclass(slots=True)
class Pass:
    """A scrub under way."""

    repair: bool
    """It was asked to repair what is certain."""
    paused: bool = False
    findings: Findings = field(default_factory=Findings)
    scrubbed: RangeSet = field(default_factory=RangeSet)
    """The chunks that it has behind it."""
    work_s: float = 0.0
    """Seconds at work, in all mounts."""
    work_here_s: float = 0.0
    """Seconds at work in this mount."""
    done_before_bytes: int = 0
    """Bytes that earlier mounts had done."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The last scrub that ended."""

    number: int
    at: int
    """Seconds since 1970, by the host's clock; 0: there was none."""
    took: int
    """Seconds at work."""
    stopped: bool
    """Before its end."""
    counts: Counts
    finds: tuple[Find, ...] = ()
    """The first places; none if it ended before this mount."""


class Scrub:
    """The scrubs of one disk; a client of `quorumfs.repair.repairs.Repairs`."""

    def __init__(
        self,
        mirror: Mirror,
        sidecars: Sidecars,
        *,
        limit: int | None = None,
        every_s: float | None = None,
        repair_unasked: bool = False,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """*limit*: bytes a second, at most. *every_s*: begin by itself so long (seconds) after the
        last one ended, to repair what is certain if *repair_unasked*. *wall*: the host's clock.
        """
        self.every_s = every_s
        self.current: Pass | None = None
        """The one under way."""
        self.inspection = Inspection(mirror, sidecars)
        self._mirror = mirror
        self._sidecars = sidecars
        self.repair_unasked = repair_unasked
        self._wall = wall
        self._work = Work(mirror, sidecars, limit)
        self._version = sidecars.scrub.version
        self._number = sidecars.scrub.number
        self._unsaved = False
        """There is something to remember that should not wait."""
        self._save_at = 0.0
        self._look_again_at = 0.0
        self._looked_with: object = None
        """What the answer of the last look depends on."""
        self.last = self._recall(sidecars.scrub)
        """The last one that ended."""

    def _recall(self, record: ScrubRecord) -> Ended:
        for start, end in record.undecided:
            self.inspection.undecided.add(start, end)
        if record.running:
            at = record.position // self._work.map.chunk_size
            if record.position >= self._work.map.size:
                at = len(self._work.map)
            self.current = Pass(record.repairing, record.paused, work_s=record.seconds)
            self.current.findings.counts = record.counts
            if at:
                self.current.scrubbed.add(0, at)
            self.current.done_before_bytes = self.done_bytes
        number = record.number - record.running
        return Ended(number, record.ended, record.took, record.stopped, record.found)

    # What an administrator asks for; all of it in the loop

    @property
    def number(self) -> int:
        """Counts the scrubs of the set: of the one under way, or the last."""
        return self._number

    @property
    def limit(self) -> int | None:
        """Bytes a second that are read of each replica at most; None: no limit."""
        return self._work.limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self._work.limit = limit

    @property
    def hindrance(self) -> str | None:
        """Why nothing can be compared now; None if it can."""
        answering = sum(replica.state.answers for replica in self._sidecars.ledger.members)
        return None if answering >= MEMBERS_MIN else "fewer than two replicas are current"

    def begin(self, *, repair: bool) -> None:
        """Begin a scrub, if none is under way."""
        if self.current is not None:
            return
        self._number += 1
        self.current = Pass(repair)
        self._mirror.events.scrub_started(self._work.map.size, repair=repair)
        self._remember()

    def pause(self, *, paused: bool) -> None:
        """Have the scrub under way wait, or go on."""
        if self.current is not None and self.current.paused is not paused:
            self.current.paused = paused
            self._remember()

    def end(self, *, stopped: bool) -> None:
        """End the scrub under way, before its end if *stopped*."""
        one, self.current = self.current, None
        if one is None:
            return
        counts, seconds = one.findings.counts, int(one.work_s)
        finds = tuple(one.findings.finds)
        ended = max(1, int(self._wall()))
        self.last = Ended(self._number, ended, seconds, stopped, counts, finds)
        self._mirror.events.scrub_finished(counts, seconds, stopped=stopped)
        self._remember()

    def _remember(self) -> None:
        self._unsaved, self._save_at = True, 0.0
        self._sidecars.notify()

    @property
    def finds(self) -> list[Find]:
        """The first places that the last scrub found, and the one under way, in this mount."""
        under_way = [] if self.current is None else self.current.findings.finds
        return [*self.last.finds, *under_way]

    # Progress

    @property
    def total_bytes(self) -> int:
        """The bytes of the disk; holes are passed over at once."""
        return self._work.map.size

    @property
    def done_bytes(self) -> int:
        """The bytes of the disk that the scrub under way has behind it."""
        if self.current is None:
            return 0
        chunks = sum(end - start for start, end in self.current.scrubbed)
        return min(chunks * self._work.map.chunk_size, self._work.map.size)

    @property
    def rate_bytes_per_s(self) -> float:
        """How fast the scrub under way was in this mount."""
        one = self.current
        if one is None or one.work_here_s <= 0:
            return 0.0
        return (self.done_bytes - one.done_before_bytes) / one.work_here_s

    @property
    def undecided_bytes(self) -> int:
        """Bytes in which replicas were found to differ, and nothing tells who is right."""
        return sum(end - start for start, end in self.inspection.undecided)

    @property
    def unrepaired(self) -> int:
        """Blocks known to be wrong on some replica, found by the last scrub or so far."""
        counts = self.last.counts if self.current is None else self.current.findings.counts
        return max(counts.unrepaired, self.last.counts.unrepaired)

    @property
    def next_at(self) -> float | None:
        """When the next one begins by itself (seconds since 1970); None: it does not."""
        return None if self.every_s is None else self.last.at + self.every_s

    # The work

    def stop_work(self) -> None:
        """Have all work end as soon as possible: the set is about to be unmounted."""
        self._work.stop()

    async def step(self) -> bool:
        """Scrub for a while if that is due; whether something was done."""
        if self._sidecars.fenced is not None:
            return False
        if self.current is None and self._is_due() and self.hindrance is None:
            self.begin(repair=self.repair_unasked)
        if self._unsaved and trio.current_time() >= self._save_at:
            await self.save()
        one = self.current
        if one is None or one.paused or self.hindrance is not None:
            await self._look_again()
            return False
        began = trio.current_time()
        try:
            await self._go_on(one, began + STEP_S)
        finally:
            spent = trio.current_time() - began
            one.work_s += spent
            one.work_here_s += spent
        whole = not list(one.scrubbed.outside(0, len(self._work.map)))
        if whole and one is self.current:
            self.end(stopped=False)
            await self.save()
        return True

    def _is_due(self) -> bool:
        if self.every_s is None:
            return False
        # A time in the future was noted by a clock that was wrong.
        return not 0 <= self._wall() - self.last.at < self.every_s

    async def _go_on(self, one: Pass, until: float) -> None:
        changed = self._sidecars.changed

        def passed_over(chunks: range) -> None:
            start, end = self._work.bounds(chunks)
            self.inspection.undecided.remove(start, end)
            one.scrubbed.add(chunks.start, chunks.stop)

        async def scrub_unit(chunks: range) -> None:
            suspicious = RangeSet()
            async with self._work.locked(chunks, exclusive=False) as worked:
                for piece in pieces(*self._work.bounds(chunks)):
                    for start, end in await self.inspection.compare(*piece):
                        suspicious.add(start, end)
                worked()
            for start, end in suspicious:
                await self.inspection.look_closer(
                    start, end - start, one.findings, repair=one.repair
                )
            one.scrubbed.add(chunks.start, chunks.stop)

        left = [range(*run) for run in one.scrubbed.outside(0, len(self._work.map))]
        async with aclosing(self._work.batches(left, passed_over)) as batches:
            async for batch in batches:
                await self._work.in_parallel(batch, scrub_unit, large=True)
                if trio.current_time() >= self._save_at:
                    await self.save()
                over = one is not self.current or one.paused or self.hindrance is not None
                if over or changed.is_set() or trio.current_time() >= until:
                    return

    async def _look_again(self) -> None:
        """See whether a guest has written over undecided places, and so made them equal."""
        undecided = self.inspection.undecided
        depends_on = self._mirror.requests, tuple(self._sidecars.ledger.members)
        due = trio.current_time() >= self._look_again_at and depends_on != self._looked_with
        if not undecided or not due or self.hindrance is not None:
            return
        self._look_again_at = trio.current_time() + AGAIN_S
        self._looked_with = depends_on
        for start, end in list(undecided)[:AGAIN_MAX]:
            for offset, length in pieces(start, end):
                async with self._mirror.locks.held(offset, offset + length, exclusive=False):
                    before = _length(undecided, offset, offset + length)
                    await self.inspection.compare(offset, length)
                    self.decided(before - _length(undecided, offset, offset + length))

    def decided(self, length: int) -> None:
        """Note that *length* bytes of undecided places are equal on all replicas now."""
        count = -(-length // BLOCK)
        if not count:
            return
        if self.current is not None:
            self.current.findings.count(undecided=-count, unrepaired=-count)
        found = Findings(self.last.counts)
        found.count(undecided=-count, unrepaired=-count)
        self.last = replace(self.last, counts=found.counts)
        self._remember()

    async def save(self) -> None:
        """Have the sidecars remember all this; those that fail are tried again after `SAVE_S`."""
        self._unsaved = False
        self._save_at = trio.current_time() + SAVE_S
        self._version += 1
        one, last = self.current, self.last
        record = ScrubRecord(
            version=self._version,
            number=self._number,
            ended=last.at,
            took=last.took,
            stopped=last.stopped,
            found=last.counts,
            undecided=tuple(self.inspection.undecided)[:UNDECIDED_MAX],
        )
        if one is not None:
            at = one.scrubbed.next_outside(0) * self._work.map.chunk_size
            record = replace(
                record,
                running=True,
                paused=one.paused,
                repairing=one.repair,
                position=min(at, self._work.map.size),
                counts=one.findings.counts,
                seconds=int(one.work_s),
            )
        try:
            failed = bool(await self._sidecars.recorder.write_scrub(record))
        except OSError:
            failed = True
        self._unsaved = self._unsaved or failed

    async def close(self) -> None:
        """Remember how far it is; nothing is done afterwards."""
        if self.current is not None or self._unsaved:
            await self.save()


def _length(places: RangeSet, start: int, end: int) -> int:
    """The bytes of *places* in a range."""
    return sum(high - low for low, high in places.inside(start, end))
