"""Guests: they use the disk at random, and the oracle judges what they see."""

import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from quorumfs.disk.disk import Disk
from support.simulation.media import SECTOR
from support.simulation.oracle import BrokenError, Oracle
from support.simulation.storage import DaemonKilledError
from support.simulation.world import Life

KIB = 1 << 10

REQUEST_MAX_S = 900.0
"""No request takes longer, whatever its replicas do: a few timeouts, one after the other."""

REQUESTS_MAX = 400
"""Of all guests in one life."""


def _nothing() -> None:
    pass


@dataclass(slots=True)
class Crowd:
    """What all guests of a life go by."""

    think_s: float = 1.0
    """How long a guest waits between two requests, on average."""
    stopping: bool = False
    paused: bool = False
    reads_only: bool = False
    requests: int = 0
    patience_s: Callable[[], float | None] = lambda: None
    """A request that begins and ends while this gives a time (seconds) takes no longer."""
    nothing_fails: Callable[[], bool] = lambda: False
    """Whether there is no reason for a request to fail."""
    full: bool = False
    """Whether a write may fail for lack of space, even so."""
    acknowledged: Callable[[], None] = _nothing
    """Called when a guest has just heard that its write succeeded: the daemon may die of it."""


class ToldError(OSError):
    """A read failed where it was told that no replica can be read, or a flush for what was lost
    before it began."""


class Guest:
    """Somebody who uses the disk, and waits a while after an error."""

    def __init__(
        self, oracle: Oracle, life: Life, disk: Disk, number: int, crowd: Crowd | None = None
    ) -> None:
        self.life = life
        self._disk = disk
        self.oracle = oracle
        self._number = number
        self._crowd = crowd or Crowd()
        self._note = life.world.note
        self._dice = life.world.dice_for(f"guest {number}")
        sectors = disk.size // SECTOR
        places = life.world.dice_for(f"places of life {life.number}")
        self._favourites = [places.randrange(sectors) for _ in range(3)]
        """The same for all guests of a life, so that they get in each other's way."""

    async def run(self) -> None:
        """Until told to stop, the end of the life, or a broken promise."""
        task, outside = trio.lowlevel.current_task(), self.life.outside
        outside.add(task)
        try:
            await self._run()
        finally:
            outside.discard(task)

    async def _run(self) -> None:
        crowd, dice = self._crowd, self._dice
        while True:
            await trio.sleep(dice.expovariate(1 / crowd.think_s) if dice.random() < 0.9 else 0)
            if crowd.stopping:
                return
            if crowd.paused or crowd.requests >= REQUESTS_MAX:
                await trio.sleep(1.0)
                continue
            crowd.requests += 1
            with trio.move_on_after(REQUEST_MAX_S) as scope:
                if not await self._request():
                    await trio.sleep(dice.uniform(0.2, 5.0))
            if scope.cancelled_caught:
                raise BrokenError(f"a request of guest {self._number} did not end")

    async def _request(self) -> bool:
        """One request; whether it succeeded."""
        name, action = self._chosen()
        crowd = self._crowd
        sure, patience_s = crowd.nothing_fails(), crowd.patience_s()
        began = trio.current_time()
        self._note(f"guest {self._number} {name}")
        try:
            await action()
        except OSError as error:
            if self.life.dead:
                return False
            self._note(f"guest {self._number} {name}: {error.strerror}")
            excused = crowd.full and error.errno == errno.ENOSPC
            excused |= isinstance(error, ToldError)
            if sure and crowd.nothing_fails() and not excused:
                raise BrokenError(f"{name} failed without a fault: {error}") from error
            return False
        self._note(f"guest {self._number} {name}: ok")
        took_s = trio.current_time() - began
        if patience_s is not None and crowd.patience_s() is not None and took_s > patience_s:
            raise BrokenError(f"{name} waited {took_s:.1f} s, and one replica hung long before")
        return True

    def _chosen(self) -> tuple[str, Callable[[], Awaitable[None]]]:
        dice = self._dice
        sectors = self._disk.size // SECTOR
        length = dice.choice((1, 1, 2, 8, 8, 8, 16, 32, dice.randrange(1, 129)))
        length = min(length, sectors)
        hot = dice.random() < 0.5
        start = dice.choice(self._favourites) if hot else dice.randrange(sectors)
        if dice.random() < 0.5:
            start = start // 8 * 8
        start = min(start, sectors - length)
        at, size = start * SECTOR, length * SECTOR
        where = f"{at}+{size}"
        draw = dice.random()
        if self._crowd.reads_only:
            return f"read {where}", partial(self.read, at, size)
        if draw < 0.40:
            return f"write {where}", partial(self.write, at, size)
        if draw < 0.48:
            return f"durable write {where}", partial(self.write, at, size, durable=True)
        if draw < 0.54:
            discard = dice.random() < 0.5
            return f"zeros {where} {discard=}", partial(self._zeros, at, size, discard=discard)
        if draw < 0.84:
            return f"read {where}", partial(self.read, at, size)
        if draw < 0.96:
            return "flush", self.flush
        if draw < 0.98:
            return f"allocate {where}", partial(self._disk.allocate, at, size)
        return f"seek data {at}", partial(self._seek, at)

    def _check_alive(self) -> None:
        """The answer of a daemon that died meanwhile reaches nobody."""
        if self.life.dead:
            raise DaemonKilledError

    async def write(self, at: int, size: int, *, durable: bool = False) -> None:
        """Write something new; raises `OSError`."""
        writing = self.oracle.begin_write(at, size, self._number)
        self._note(f"guest {self._number} writes version {writing.version.sequence}")
        try:
            await self._disk.write(at, writing.data)
            if durable:
                await self.flush()
        except OSError:
            self._check_alive()
            self.oracle.write_failed(writing)
            raise
        self._check_alive()
        self.oracle.wrote(writing, durably=durable)
        self._crowd.acknowledged()
        self._check_alive()

    async def _zeros(self, at: int, size: int, *, discard: bool) -> None:
        writing = self.oracle.begin_zeros(at, size, self._number)
        self._note(f"guest {self._number} writes version {writing.version.sequence}")
        try:
            await self._disk.make_zeros(at, size, discard=discard)
        except OSError:
            self._check_alive()
            self.oracle.write_failed(writing)
            raise
        self._check_alive()
        self.oracle.wrote(writing)

    async def read(self, at: int, size: int) -> None:
        """Read, and have it judged; raises `OSError`."""
        reading = self.oracle.begin_read(at, size)
        try:
            data = bytes(await self._disk.read(at, size))
        except OSError as error:
            self._check_alive()
            self.oracle.read_failed(reading)
            if not self.oracle.is_readable(at, size):
                raise ToldError(error.errno, error.strerror) from error
            raise
        self._check_alive()
        self.oracle.read(reading, data)

    async def flush(self) -> None:
        """Make durable; raises `OSError`."""
        flushing, owed = self.oracle.begin_flush(), self.oracle.owes_an_error
        try:
            await self._disk.flush()
        except OSError as error:
            self._check_alive()
            self.oracle.flush_failed()
            if owed:
                raise ToldError(error.errno, error.strerror) from error
            raise
        self._check_alive()
        self.oracle.flushed(flushing)

    async def _seek(self, at: int) -> None:
        """What is skipped as a hole must read as zeros."""
        length = min(64 * KIB, self._disk.size - at)
        reading = self.oracle.begin_read(at, length)
        try:
            found = await self._disk.next_data(at)
        finally:
            if not self.life.dead:
                self.oracle.read_failed(reading)
        self._check_alive()
        skipped = min(found - at, length) // SECTOR * SECTOR
        if skipped > 0:
            reading.length = skipped
            del reading.possible[skipped // SECTOR :]
            self.oracle._readings[reading] = None
            self.oracle.read(reading, bytes(skipped))
