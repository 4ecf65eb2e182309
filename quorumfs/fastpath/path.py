"""Opens the gate while trio sleeps, closes it when trio wakes, and takes over what is stuck.

See ``gate.h`` for the theory.
"""

import ctypes
import errno
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

import trio

from quorumfs.disk.disk import Disk
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.takeover import Taken
from quorumfs.fastpath.native import (
    HANDLES,
    REPLICAS,
    TRY_AGAIN,
    Gate,
    Phase,
    Request,
    RequestKind,
    Server,
    brief,
    library,
)
from quorumfs.fastpath.publish import Publisher
from quorumfs.replica.replica import Replica

log = logging.getLogger(__name__)


def fold(gate: Gate, mirror: Mirror) -> None:
    """Bring what C left behind into Python's own state, and reset it."""
    if gate.journalled:
        mirror.ledger.wrote(set(gate.journal[: gate.journalled]))
        gate.journalled = 0
    if not gate.requests:
        return
    mirror.requests += gate.requests
    gate.requests = 0
    for replica in mirror.replicas[:REPLICAS]:  # C serves no others
        served = gate.counters[replica.index]
        if served.reads or served.writes:
            counters = replica.counters
            counters.reads += served.reads
            counters.bytes_read += served.bytes_read
            counters.writes += served.writes
            counters.bytes_written += served.bytes_written
            served.reads = served.bytes_read = served.writes = served.bytes_written = 0


def take_read(gate: Gate, mirror: Mirror, place: int) -> Callable[[OSError | None], None]:
    """Note that a read of the replica at *place* is stuck; call the result when it returns."""
    replica: Replica = mirror.replicas[gate.reader[place].slot]
    return replica.hold()


def take_write(
    gate: Gate, mirror: Mirror, request: Request, place: int, outcome: int | None
) -> Taken:
    """Take over a write that was at work on the replica at *place*, with this *outcome* there.

    None: it has not returned; tell `Taken.returned` when it does.
    """
    writers = [mirror.replicas[gate.writer[index].slot] for index in range(gate.writers)]
    gate.wrote[request.handle] = 1
    data = ctypes.string_at(request.data, request.length)
    taken = Taken(mirror, request.offset, data, writers[:place], writers[place])
    if outcome is not None:
        taken.returned(as_error(outcome))
    return taken


def as_error(outcome: int) -> OSError | None:
    """The outcome of a system call as an error; EAGAIN for one to be tried again."""
    if outcome == TRY_AGAIN:
        return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return OSError(outcome, os.strerror(outcome)) if outcome else None


class FastPath(trio.abc.Instrument):
    """The fast path of one mount, from `start` until the end of the process."""

    def __init__(self, disk: Disk, *, keep_zeros: bool, writes: bool) -> None:
        """*keep_zeros* and *writes* as for `Publisher`."""
        assert library is not None
        assert brief is not None
        self._library = library
        self._brief = brief
        self._disk = disk
        self._mirror = disk.mirror
        self._gate = Gate()
        self._publisher = Publisher(self._gate, disk.mirror, keep_zeros=keep_zeros, writes=writes)
        self._servers = library.loop_servers().contents
        self._taken: dict[int, Callable[[OSError | None], None]] = {}
        """What to call with the outcome of a system call that has not returned, by server."""
        self._work: list[Callable[[], Awaitable[None]]] = []
        """What is still to be done of requests that were taken over."""
        self._work_waits = trio.Event()
        self._may_serve = True
        self._ended = False
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable while Python has something to do."""
        self.receive: int = ctypes.cast(library.loop_receive, ctypes.c_void_p).value or 0
        """The address of ``loop_receive``."""

    def start(self, fuse_fd: int, inode: int) -> None:
        """Take the requests from *fuse_fd*; those of the file *inode* may be served by C.

        Raises `OSError`.
        """
        error = self._library.loop_start(ctypes.byref(self._gate), fuse_fd, self.bell, inode)
        if error:
            raise OSError(error, os.strerror(error))
        trio.lowlevel.add_instrument(self)

    def return_memory(self) -> None:
        """Give the memory of earlier requests back to the system."""
        self._library.loop_trim()

    def pending(self) -> bool:
        """Whether there is a request to receive, or the end of the session to hear of."""
        return bool(self._brief.loop_pending())

    async def run(self, nursery: trio.Nursery) -> None:
        """Have the rest of requests that were taken over done in *nursery*, until `stop`."""
        while not self._ended or self._work:
            await self._work_waits.wait()
            self._work_waits = trio.Event()
            work, self._work = self._work, []
            for rest in work:
                nursery.start_soon(rest)

    def stop(self) -> None:
        """Have C serve nothing from now on: the disk is about to be closed, or cannot go on."""
        self._may_serve = False
        self._ended = True
        self._work_waits.set()

    def forget(self, handle: int) -> bool:
        """Note that *handle* was closed; whether C wrote through it."""
        if handle >= HANDLES:
            return False
        wrote = bool(self._gate.wrote[handle])
        self._gate.wrote[handle] = 0
        return wrote

    # When trio sleeps and wakes

    def before_io_wait(self, timeout: float) -> None:
        # Where tasks are to run, or there is a message, trio goes on at once.
        if timeout <= 0 or self._brief.loop_pending():
            return
        self._publisher.publish_nothing()
        if self._may_serve:
            try:
                self._publisher.publish()
            except Exception:
                self._give_up()
        # Even if C serves nothing: else a request would wait for the gate.
        self._brief.loop_open()

    def after_io_wait(self, timeout: float) -> None:
        try:
            anything = self._library.loop_close()
            if self._may_serve:
                fold(self._gate, self._mirror)
            if anything:
                self._look_at_servers()
        except Exception:
            self._give_up()

    def _give_up(self) -> None:
        """Go on without the fast path after an error of our own.

        Requests that C has begun are taken over all the same; where that fails, too, they fail.
        """
        log.exception("internal error in the fast path: all requests go the long way from now on")
        self._library.loop_close()
        self._may_serve = False
        with suppress(Exception):  # what broke may be this
            fold(self._gate, self._mirror)
        try:
            self._look_at_servers()
        except Exception:
            log.exception("internal error in the fast path: what it had begun fails")
            self._fail_servers()
        self._publisher.publish_nothing()

    def _fail_servers(self) -> None:
        """Answer what C has begun, and nobody has taken over, with EIO."""
        for number, server in enumerate(self._servers):
            phase = server.phase & 0xFF
            if phase not in (Phase.TAKEN, Phase.RETURNED, Phase.FAILED):
                continue
            if number not in self._taken:
                self._library.loop_reply(server.request.unique, errno.EIO, b"", 0)
                self._taken[number] = lambda _: None
            if phase != Phase.TAKEN:
                self._taken.pop(number)(as_error(server.outcome))
                self._library.loop_release(ctypes.byref(server))

    # What is stuck

    def _look_at_servers(self) -> None:
        for number, server in enumerate(self._servers):
            word = server.phase
            phase, place = word & 0xFF, word >> 8
            if phase == Phase.FAILED:
                self._take_over(number, server, place, server.outcome)
                self._library.loop_release(ctypes.byref(server))
                continue
            # The call may have returned since the server was taken, and before anybody looked.
            if phase in (Phase.TAKEN, Phase.RETURNED) and number not in self._taken:
                self._take_over(number, server, place, None)
            if phase == Phase.RETURNED:
                self._taken.pop(number)(as_error(server.outcome))
                self._library.loop_release(ctypes.byref(server))

    def _take_over(self, number: int, server: Server, place: int, outcome: int | None) -> None:
        """Take over the request of a *server*, at work on the replica at *place*.

        *outcome*: of the system call there; None: it has not returned.
        """
        request = server.request
        if request.kind == RequestKind.READ:
            self._taken[number] = take_read(self._gate, self._mirror, place)
            self._library.loop_requeue(ctypes.byref(server))
            return
        taken = take_write(self._gate, self._mirror, request, place, outcome)
        if outcome is None:
            self._taken[number] = taken.returned
        self._work.append(partial(self._finish_write, request.unique, taken))
        self._work_waits.set()

    async def _finish_write(self, unique: int, taken: Taken) -> None:
        error = 0
        try:
            await self._disk.finish(taken)
        except OSError as failure:
            error = failure.errno or errno.EIO
        except Exception:
            log.exception("internal error in a write: it fails")
            error = errno.EIO
        reply = len(taken.data).to_bytes(8, "little")  # struct fuse_write_out
        self._library.loop_reply(unique, error, reply, 0 if error else len(reply))
