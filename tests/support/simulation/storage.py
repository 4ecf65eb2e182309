"""`quorumfs.replica.storage.Storage` on a simulated file, for one life of the daemon.

An operation takes effect, and is answered, when it is due. One task does everything that is due,
in an order that follows from the seed alone.
"""

import errno
import heapq
import os
import random
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import count

import trio

from quorumfs.replica.fastfile import FastFile
from quorumfs.replica.storage import (
    CHANGES,
    Done,
    FileStatus,
    Kind,
    Operation,
    Storage,
    TruncatedError,
    Value,
)
from support.simulation.media import SECTOR, SimulatedFile, sector_pieces
from support.simulation.oracle import ViolationError, Wrong

Note = Callable[[str], None]
"""Appends a line to the trace."""


class DaemonKilledError(BaseException):
    """The daemon is dead, and whoever runs on in its name is to stop.

    Not an `Exception`, because the daemon survives those.
    """


class Agenda:
    """What is to happen when: in the order of times, and at one time in the order of asking."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._changed = trio.Event()

    def at(self, due: float, action: Callable[[], None]) -> None:
        """Call *action* at *due* (trio's clock, seconds)."""
        heapq.heappush(self._heap, (due, next(self._numbers), action))
        if self._heap[0][0] == due:
            self._changed.set()

    async def run(self) -> None:
        """Do what is due until cancelled."""
        while True:
            while self._heap and self._heap[0][0] <= trio.current_time():
                heapq.heappop(self._heap)[2]()
            self._changed = trio.Event()
            with trio.move_on_at(self._heap[0][0] if self._heap else float("inf")):
                await self._changed.wait()


class Effect(Enum):
    """How much of a change, or of a sync, happens."""

    ALL = "all"
    PART = "part"
    """Some sectors; of a failed sync, some pages."""
    NONE = "none"
    """Of a failed sync: the pages are dropped."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of one operation."""

    delay_s: float = 0.0
    error: int = 0
    hang: bool = False
    """It waits until it is released, and then really happens."""
    effect: Effect | None = None
    """None: all of it without an error, nothing with one. A success without effect is a lost
    write, or a flush that lies."""
    at_once: bool = False
    """It fails before submit() returns, and nothing happens."""

    @property
    def what_happens(self) -> Effect:
        return self.effect or (Effect.NONE if self.error else Effect.ALL)


STUCK_S = 0.01
"""A thread of the fast path that is longer at a system call (seconds) is stuck in it."""

SYNCS = frozenset({Kind.SYNC, Kind.SEAL})
"""What makes changes durable."""

_READS = frozenset({Kind.READ, Kind.REREAD})
_TRANSFERS = CHANGES | _READS | {Kind.ALLOCATE}


@dataclass(frozen=True, slots=True)
class Weather:
    """How often what goes wrong; probabilities per operation."""

    delay_s: tuple[float, float] = (0.0, 0.01)
    slow: float = 0.0
    slow_s: tuple[float, float] = (0.05, 2.0)
    """Slow, yet within a timeout."""
    late: float = 0.0
    late_s: tuple[float, float] = (8.5, 60.0)
    """Later than a timeout; then it really happens."""
    hang: float = 0.0
    """Until released."""
    fail: float = 0.0
    errors: tuple[int, ...] = (errno.EIO, errno.ENOSPC)
    """What reads and syncs do not fail with is EIO there."""
    sync_fail: float = 0.0
    """The kernel fails to write pages, drops them, and says so once."""
    refuse: float = 0.0
    """EAGAIN before submit() returns."""

    def fault(self, dice: random.Random, operation: Operation) -> Fault:
        """What becomes of *operation*."""
        # Always the same number of draws, so that one rate changed does not change all the rest.
        draws = [dice.random() for _ in range(5)]
        pick, where = dice.random(), dice.random()
        delay_s = _between(self.delay_s, where)
        if draws[0] < self.refuse:
            return Fault(error=errno.EAGAIN, at_once=True)
        if draws[1] < self.slow:
            delay_s = _between(self.slow_s, where)
        if draws[1] >= 1 - self.late:
            delay_s = _between(self.late_s, where)
        hang = draws[2] < self.hang
        if operation.kind in SYNCS:
            if draws[3] < self.sync_fail:
                effect = Effect.PART if pick < 0.5 else Effect.NONE
                return Fault(delay_s, errno.EIO, hang, effect)
        elif operation.kind is Kind.CLOSE:
            if draws[3] < self.fail:
                return Fault(delay_s, errno.EIO, hang)
        elif operation.kind in _TRANSFERS and draws[3] < self.fail:
            error = self.errors[int(pick * len(self.errors))]
            if operation.kind in _READS:
                error = errno.EIO
            return Fault(delay_s, error, hang, list(Effect)[int(draws[4] * len(Effect))])
        return Fault(delay_s, hang=hang)


def _between(bounds: tuple[float, float], where: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * where


CALM = Weather()
STORM = Weather(slow=0.05, late=0.002, hang=0.001, fail=0.01, sync_fail=0.02, refuse=0.001)

Script = Callable[[Operation], Fault | None]


@dataclass
class Faults:
    """What becomes of the operations on one file: planned ones first, else the weather."""

    weather: Weather = CALM
    script: Script | None = None
    """Asked for every operation that nothing was planned for; None: the weather decides."""
    _planned: dict[Kind, deque[Fault]] = field(default_factory=dict)

    def plan(self, kind: Kind, *faults: Fault) -> None:
        """What becomes of the next operations of *kind*, one after the other."""
        self._planned.setdefault(kind, deque()).extend(faults)

    @property
    def planned(self) -> bool:
        """Whether a planned fault is still to come."""
        return any(self._planned.values())

    def forget_plans(self) -> None:
        """Leave everything to the weather again."""
        self._planned.clear()
        self.script = None

    def fault(self, dice: random.Random, operation: Operation) -> Fault:
        """What becomes of *operation*."""
        drawn = self.weather.fault(dice, operation)  # always, for the sake of what follows
        if planned := self._planned.get(operation.kind):
            return planned.popleft()
        scripted = self.script(operation) if self.script else None
        return drawn if scripted is None else scripted


class _Copying(Operation):
    """A `Kind.COPY` from another file."""

    __slots__ = ("source",)

    def __init__(self, source: "SimulatedStorage", offset: int, length: int) -> None:
        super().__init__(Kind.COPY, offset, length)
        self.source = source


@dataclass(eq=False, slots=True)
class _InFlight:
    operation: Operation
    done: Done
    fault: Fault
    sync_began: int
    early: Value | None
    """What a read, or a copy, found when it was asked; None: it looks when it is due."""
    delayed: bool = True
    """It has an entry in the agenda; else it waits to be released."""


class SimulatedStorage:
    """A handle on *file* in one life of the daemon; see `quorumfs.replica.storage.Storage`."""

    def __init__(
        self,
        file: SimulatedFile,
        agenda: Agenda,
        *,
        dice: random.Random,
        faults: Faults | None = None,
        size: int | None = None,
        local: bool = True,
        fast_file: FastFile | None = None,
        step: Callable[[], None] = lambda: None,
        asked: Callable[[Operation], None] = lambda _: None,
        truncated: Callable[[], None] = lambda: None,
        note: Note = lambda _: None,
    ) -> None:
        """*size*: of the disk, where it is not the file's own. *local*: it can be copied from.

        *step* is called whenever an operation is asked for, and before one happens: it may kill.
        *asked* is told of every operation, and *truncated* that one found the file too short.
        """
        self.file = file
        self.faults = faults or Faults()
        self.log: list[Operation] = []
        """What was asked, in order."""
        self.stalled = False
        """Whether everything hangs that is asked or becomes due."""
        self.broken = 0
        """The errno that everything fails with from now on; 0: it works."""
        self.local = local
        self.fast_file = fast_file
        """What a thread of the fast path makes of it."""
        self._agenda = agenda
        self._dice = dice
        self._size = file.size if size is None else size
        self._step = step
        self._asked = asked
        self._tell_truncated = truncated
        self._note = note
        self.closed = False
        """Whether its locks are given back."""
        self._in_flight: dict[_InFlight, None] = {}
        self._closing = False

    @property
    def in_flight(self) -> int:
        """How many operations have not returned."""
        return len(self._in_flight)

    def flying(self, kinds: Collection[Kind]) -> bool:
        """Whether any operation of *kinds* has not returned."""
        return any(one.operation.kind in kinds for one in self._in_flight)

    def count(self, kind: Kind) -> int:
        """How many operations of *kind* were asked for."""
        return sum(operation.kind is kind for operation in self.log)

    # What the daemon calls

    def copying(self, source: Storage, offset: int, length: int) -> Operation | None:
        if not (isinstance(source, SimulatedStorage) and source.local and self.local):
            return None
        return _Copying(source, offset, length)

    def resized(self, size: int) -> None:
        self._size = size

    def submit(self, operation: Operation, done: Done) -> None:
        assert not self._closing, "submitted after close"
        if operation.kind is Kind.CLOSE and self._in_flight:
            raise ViolationError(Wrong.CLOSED, self.file.name)
        self._asked(operation)
        self._step()
        self.log.append(operation)
        fault = self.faults.fault(self._dice, operation)
        if self.broken:
            fault = Fault(fault.delay_s, self.broken, effect=Effect.NONE)
        if fault.at_once:
            self._tell(operation, fault.error)
            done(operation, 0, OSError(fault.error, "simulated"))
            return
        self._closing = operation.kind is Kind.CLOSE
        is_sync = operation.kind in SYNCS
        one = _InFlight(operation, done, fault, self.file.begin_sync() if is_sync else 0, None)
        if operation.kind is Kind.READ and self._dice.random() < 0.5 and not self._truncated(one):
            one.early = self._read(operation)
        if isinstance(operation, _Copying) and self._dice.random() < 0.5:
            one.early = operation.source.copied(self._dice, operation)
        self._in_flight[one] = None
        if fault.hang or self.stalled:
            one.delayed = False
            self._note(f"{self._name(operation)} hangs")
        else:
            self._agenda.at(trio.current_time() + fault.delay_s, lambda: self._finish(one))

    def copied(self, dice: random.Random, operation: Operation) -> bytes:
        """What a copy from it gets: less than asked for where it cannot be read."""
        start, end = operation.offset, min(operation.offset + operation.length, self.file.size)
        fault = self.faults.fault(dice, Operation(Kind.READ, start, operation.length))
        readable = dice.randrange(operation.length // SECTOR + 1) * SECTOR
        if fault.error or fault.hang:
            end = min(end, start + readable)
        if self.broken or self.stalled or end <= start:
            return b""
        return self.file.cache.read(start, end)

    # What a thread of the fast path calls

    def call(self, operation: Operation, late: Done) -> tuple[Value, OSError | None] | None:
        """Do it at once, and return the outcome; None if it takes time: *late* is told of it.

        As system calls on a file: one that is too short is not written to.
        """
        assert not self._closing, "asked after close"
        self._asked(operation)
        self._step()
        self.log.append(operation)
        fault = self.faults.fault(self._dice, operation)
        put_off = self._dice.random() < 0.1
        one = _InFlight(operation, late, fault, 0, None)
        if self.broken:
            return self._failed(operation, self.broken)
        if fault.at_once or self._truncated(one):
            return self._failed(operation, errno.EAGAIN)
        if fault.hang or self.stalled or fault.delay_s > STUCK_S:
            if put_off and not fault.error:
                one.fault = replace(fault, error=errno.EAGAIN)
            self._in_flight[one] = None
            one.delayed = not (fault.hang or self.stalled)
            self._note(f"{self._name(operation)} is stuck")
            if one.delayed:
                self._agenda.at(trio.current_time() + fault.delay_s, lambda: self._finish(one))
            return None
        try:
            value = self._do(one, fault.what_happens)
        except OSError as error:
            return self._failed(operation, error.errno or errno.EIO)
        if fault.error:
            return self._failed(operation, fault.error)
        self._tell(operation, 0)
        return value, None

    def _failed(self, operation: Operation, error: int) -> tuple[Value, OSError | None]:
        self._tell(operation, error)
        return 0, OSError(error, "simulated")

    # What the test calls

    def release(self) -> None:
        """Let everything go on that hangs, in the order in which it was asked."""
        self.stalled = False
        for one in self._in_flight:
            if not one.delayed:
                one.delayed = True
                self._agenda.at(trio.current_time(), lambda one=one: self._finish(one))  # type: ignore[misc]

    def drop_writes(self) -> None:
        """No write in flight happens, nor is answered."""
        for one in list(self._in_flight):
            if one.operation.kind is Kind.WRITE:
                del self._in_flight[one]

    def break_off(self, error: int) -> None:
        """What is in flight perhaps happens, and it and all that follows fails with *error*."""
        self.broken = error
        self.stalled = False
        flying = list(self._in_flight)
        self.end_life("broken off")
        for one in flying:
            self._agenda.at(trio.current_time(), lambda one=one: self._answer(one, error))  # type: ignore[misc]

    def end_life(self, why: str) -> None:
        """What is in flight happens, or not, or in part, in any order; nobody hears of it."""
        flying = list(self._in_flight)
        self._in_flight.clear()
        self._dice.shuffle(flying)
        for one in flying:
            effect = self._dice.choice(list(Effect))
            if one.operation.kind in CHANGES | SYNCS:
                self._note(f"{self._name(one.operation)} {why}: {effect.value} of it happened")
            if one.operation.kind in SYNCS and effect is not Effect.ALL:
                continue  # the power cut decides, or the next sync
            try:
                self._do(one, effect)
            except OSError:
                continue

    def _finish(self, one: _InFlight) -> None:
        """It is due."""
        if one not in self._in_flight:
            return
        if self.stalled:
            one.delayed = False
            return
        self._step()
        del self._in_flight[one]
        value: Value = 0
        error: OSError | None = None
        try:
            value = self._do(one, one.fault.what_happens)
            if one.fault.error:
                error = OSError(one.fault.error, "simulated")
        except OSError as caught:
            error = caught
        self._tell(one.operation, (error.errno or errno.EIO) if error else 0)
        one.done(one.operation, 0 if error else value, error)

    def _answer(self, one: _InFlight, error: int) -> None:
        self._step()
        self._tell(one.operation, error)
        self.closed = self.closed or one.operation.kind is Kind.CLOSE
        one.done(one.operation, 0, OSError(error, "simulated"))

    def _do(self, one: _InFlight, effect: Effect) -> Value:
        operation, file = one.operation, self.file
        start, end = operation.offset, operation.offset + operation.length
        match operation.kind:
            case Kind.SYNC | Kind.SEAL:
                if self.broken:
                    pass  # what this handle wrote is beyond its reach
                elif one.fault.error and effect is not Effect.ALL:
                    file.fail_sync(one.sync_began, self._dice if effect is Effect.PART else None)
                elif effect is Effect.ALL and operation.kind is Kind.SEAL:
                    file.end_seal(one.sync_began)
                elif effect is Effect.ALL:
                    file.end_sync(one.sync_began)
                if file.lost_pages and not self.broken:
                    file.lost_pages = False
                    raise OSError(errno.EIO, "simulated: pages were lost")
                return self._status() if operation.kind is Kind.SEAL else 0
            case Kind.STAT:
                return self._status()
            case Kind.CLOSE:
                self.closed = True  # even with an error
                return 0
        if self._truncated(one):
            self._tell_truncated()
            raise TruncatedError(file.size)
        match operation.kind:
            case Kind.RESIZE if effect is not Effect.NONE:
                file.resize(start, end)
            case kind if kind in _READS:
                return self._read(operation) if one.early is None else one.early
            case Kind.ALLOCATE:
                file.allocate(start, end)
            case Kind.WRITE | Kind.DISCARD | Kind.ZERO if effect is not Effect.NONE:
                part = effect is Effect.PART
                pieces = sector_pieces(self._dice, start, end) if part else None
                file.change(operation.kind, start, end, operation.data, pieces)
            case Kind.COPY:
                assert isinstance(operation, _Copying)
                data = one.early
                if data is None:
                    data = operation.source.copied(self._dice, operation)
                assert isinstance(data, bytes)
                end = start + len(data)
                if effect is not Effect.NONE:
                    part = effect is Effect.PART
                    pieces = sector_pieces(self._dice, start, end) if part else None
                    file.change(Kind.WRITE, start, end, data, pieces)
                return len(data)
            case Kind.EVICT:
                file.evict(start, end if operation.length else None)
            case Kind.SEEK_DATA | Kind.SEEK_HOLE:
                found = file.cache.seek(start, data=operation.kind is Kind.SEEK_DATA)
                return min(found, self._size)
            case Kind.REACH:
                sectors = range(start // SECTOR + 1, -(-end // SECTOR) + 1)
                return min(end, self._dice.choice(sectors) * SECTOR)
        return 0

    def _status(self) -> FileStatus:
        return FileStatus(self.file.cache.allocated // 512, self.file.identity)

    def _read(self, operation: Operation) -> bytes:
        return self.file.cache.read(operation.offset, operation.offset + operation.length)

    def _truncated(self, one: _InFlight) -> bool:
        if one.operation.kind in _READS:
            return one.operation.offset + one.operation.length > self.file.size
        if one.operation.kind is Kind.RESIZE:
            return self.file.size < one.operation.offset
        return self.file.size < self._size

    def _name(self, operation: Operation) -> str:
        return f"{self.file.name} {operation.kind.value} {operation.offset}+{operation.length}"

    def _tell(self, operation: Operation, error: int) -> None:
        outcome = errno.errorcode.get(error, os.strerror(error)) if error else "ok"
        self._note(f"{self._name(operation)} {outcome}")
