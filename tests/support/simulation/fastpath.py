"""The fast path on simulated storages: what C does while Python sleeps.

C's own code decides (`gate.c`), the real `Publisher` tells it what it may serve, and the real code
takes over what is stuck. What is not here is the threads of `loop.c`: one request after the other
is carried out at once.
"""

import ctypes
import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import trio
from trio.testing import wait_all_tasks_blocked

from quorumfs.disk.disk import Disk, Repairer
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.takeover import Taken
from quorumfs.fastpath.native import REPLICAS, TRY_AGAIN, Gate, Request, RequestKind, library
from quorumfs.fastpath.path import as_error, fold, take_read, take_write
from quorumfs.fastpath.publish import Publisher
from quorumfs.replica.storage import Kind, Operation, TruncatedError, Value
from support.simulation.storage import SimulatedStorage
from support.simulation.world import Life

REQUEST_MAX = 1 << 20
"""As in gate.h: what is longer goes the long way."""

NO_TIME = (ctypes.c_uint64 * REPLICAS)()
"""By the clock of a simulation what is answered at once takes no time."""

log = logging.getLogger("quorumfs.fastpath")


class Loop(trio.abc.Instrument):
    """What `loop.c` does with one gate, from the guest's side and from Python's."""

    def __init__(self, mirror: Mirror, life: Life, *, keep_zeros: bool) -> None:
        assert library is not None, "build it first: pip install -e ."
        self._admits, self._note = library.gate_admits, library.gate_note
        self._mirror = mirror
        self._life = life
        self._gate = Gate()
        self._publisher = Publisher(self._gate, mirror, keep_zeros=keep_zeros, writes=True)
        self._open = False

    # From Python's side

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Python wakes, unless *task* is a guest."""
        if self._open and task not in self._life.outside:
            self.close()

    def open(self) -> bool:
        """Let C serve, while Python sleeps; whether it may serve anything."""
        self._open = self._open or self._publisher.publish()
        return self._open

    def close(self) -> None:
        """Let C serve no more, and take note of what it did."""
        if self._open:
            self._open = False
            try:
                fold(self._gate, self._mirror)
            except Exception:
                log.exception("internal error in the fast path")

    # From C's side

    def write(self, offset: int, data: bytes) -> Taken | bool:
        """Write as C does; False: it goes the long way. What is stuck, or failed, is taken over."""
        gate = self._gate
        text = ctypes.create_string_buffer(data, len(data))
        request = Request(RequestKind.WRITE, len(data), 0, 0, offset, ctypes.addressof(text))
        if not self._serves(request):
            return False
        for place in range(gate.writers):
            late: list[Callable[[OSError | None], None]] = []
            operation = Operation(Kind.WRITE, offset, len(data), data)
            storage = self._life.storage(gate.writer[place].fd)
            answer = storage.call(operation, partial(_returned, late))
            outcome = None if answer is None else _outcome(answer[1])
            if outcome == TRY_AGAIN and not place:
                return False
            if outcome != 0:
                self.close()
                taken = take_write(gate, self._mirror, request, place, outcome)
                late.append(taken.returned)
                self._tell(request, f"taken over at {storage.file.name}")
                return taken
        self._served(request)
        return True

    def read(self, offset: int, length: int) -> bytes | None:
        """Read as C does; None: it goes the long way."""
        gate = self._gate
        request = Request(RequestKind.READ, length, 0, 0, offset, None)
        if not self._serves(request):
            return None
        found: list[Value] = []
        for place in range(gate.readers):
            late: list[Callable[[OSError | None], None]] = []
            storage: SimulatedStorage = self._life.storage(gate.reader[place].fd)
            answer = storage.call(Operation(Kind.READ, offset, length), partial(_returned, late))
            if answer is None:
                self.close()
                give_back = take_read(gate, self._mirror, place)
                late.append(give_back)
                self._tell(request, f"stuck at {storage.file.name}")
                return None
            value, error = answer
            found.append(value)
            if error is not None or value != found[0]:
                return None
        self._served(request)
        assert isinstance(found[0], bytes)
        return found[0]

    def _serves(self, request: Request) -> bool:
        small = request.length <= REQUEST_MAX
        return small and self.open() and bool(self._admits(self._gate, request))

    def _served(self, request: Request) -> None:
        self._note(self._gate, request, NO_TIME)
        self._tell(request, "served")

    def _tell(self, request: Request, what: str) -> None:
        kind = RequestKind(request.kind).name.lower()
        self._life.world.note(f"fast {kind} {request.offset}+{request.length} {what}")


def _returned(
    late: list[Callable[[OSError | None], None]], _: Operation, __: Value, error: OSError | None
) -> None:
    """A system call has returned that was taken over; tell who took it over."""
    (tell,) = late
    tell(as_error(_outcome(error)))


def _outcome(error: OSError | None) -> int:
    """What C leaves behind of an *error*."""
    if error is None:
        return 0
    again = isinstance(error, TruncatedError) or error.errno == errno.EAGAIN
    return TRY_AGAIN if again else error.errno or errno.EIO


class FastDisk(Disk):
    """A disk with a fast path before it: as the guest of a real mount has it."""

    def __init__(
        self, mirror: Mirror, repairer: Repairer, life: Life, often: float, zero_kind: Kind | None
    ) -> None:
        """*often*: how many of the requests come while Python sleeps."""
        super().__init__(mirror, repairer, zero_kind=zero_kind)
        self._loop = Loop(mirror, life, keep_zeros=zero_kind is not None)
        self._life = life
        self._often = often
        self._dice = life.world.dice_for(f"fast path of life {life.number}")
        self._leader = trio.Lock()

    async def run(self) -> None:
        trio.lowlevel.add_instrument(self._loop)
        try:
            await super().run()
        finally:
            trio.lowlevel.remove_instrument(self._loop)

    async def read(self, offset: int, length: int) -> bytes:
        if self._dice.random() < self._often:
            async with self._leader:
                await wait_all_tasks_blocked()
                data = self._loop.read(offset, length)
                self._perhaps_wake()
            if data is not None:
                return data
        with self._awake():
            return await super().read(offset, length)

    async def write(self, offset: int, data: bytes) -> int:
        if self._dice.random() < self._often:
            async with self._leader:
                await wait_all_tasks_blocked()
                served = self._loop.write(offset, data)
                self._perhaps_wake()
            if served is True:
                return len(data)
            if isinstance(served, Taken):
                with self._awake():
                    await self.finish(served)
                return len(data)
        with self._awake():
            return await super().write(offset, data)

    async def make_zeros(self, offset: int, length: int, *, discard: bool) -> None:
        with self._awake():
            await super().make_zeros(offset, length, discard=discard)

    async def allocate(self, offset: int, length: int) -> None:
        with self._awake():
            await super().allocate(offset, length)

    async def flush(self) -> None:
        with self._awake():
            await super().flush()

    async def next_data(self, offset: int) -> int:
        with self._awake():
            return await super().next_data(offset)

    def _perhaps_wake(self) -> None:
        """Python wakes at any moment; at once if the guest is one who knows the daemon inside."""
        if trio.lowlevel.current_task() not in self._life.outside or self._dice.random() < 0.5:
            self._loop.close()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """The task of the guest becomes one of the daemon's."""
        task, outside = trio.lowlevel.current_task(), self._life.outside
        self._loop.close()
        was_outside = task in outside
        outside.discard(task)
        try:
            yield
        finally:
            if was_outside:
                outside.add(task)
