"""Python's side of the fast path, on simulated files: the test does what C would have done."""

import ctypes
import errno
import logging
import os
from pathlib import Path as FilePath
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
from support.simulated import Bench, fails, make_bench
from trio.testing import MockClock, wait_all_tasks_blocked

from quorumfs.decisions.model import Standing
from quorumfs.decisions.patterns import Fifo
from quorumfs.disk.watchdog import TICK_S
from quorumfs.fastpath import path as module
from quorumfs.fastpath.native import (
    HANDLES,
    SERVERS,
    TRY_AGAIN,
    Phase,
    Request,
    RequestKind,
    Server,
    library,
)
from quorumfs.fastpath.path import FastPath
from quorumfs.fuse.operations import FILE_INODE, DiskOperations
from quorumfs.options.parsing import parse_options
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.fastfile import REST_S, FastFile
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.filesystems import Locality
from quorumfs.replica.lastregions import LastRegions
from quorumfs.replica.replica import STUCK_S, Replica
from quorumfs.replica.space import Space
from quorumfs.replica.storage import Kind, Operation

BLOCK = 4096
NEW = b"new!" * (BLOCK // 4)
TIMEOUT_S = 8.0
UNIQUE = 77
WRITTEN = (UNIQUE, 0, BLOCK.to_bytes(8, "little"))
"""The reply to a write that succeeded."""


class Loop:
    """`loop.c` in the hands of a test."""

    def __init__(self) -> None:
        assert library is not None
        self.servers = (Server * SERVERS)()
        self.loop_receive = library.loop_receive
        self.opened = 0
        self.pending = 0
        """How many messages wait."""
        self.requeued: list[int] = []
        self.released: list[int] = []
        self.replies: list[tuple[int, int, bytes]] = []
        self.anything = False
        """What the next close returns."""

    def loop_servers(self) -> SimpleNamespace:
        return SimpleNamespace(contents=self.servers)

    def loop_pending(self) -> int:
        return self.pending

    def loop_open(self) -> None:
        self.opened += 1

    def loop_close(self) -> bool:
        anything, self.anything = self.anything, False
        return anything

    def loop_release(self, server: Any) -> None:
        server._obj.phase = 0
        self.released.append(self._number(server))

    def loop_requeue(self, server: Any) -> None:
        self.requeued.append(self._number(server))

    def loop_reply(self, unique: int, error: int, data: bytes, length: int) -> int:
        self.replies.append((unique, error, data[:length]))
        return 0

    def _number(self, server: Any) -> int:
        offset = ctypes.addressof(server._obj) - ctypes.addressof(self.servers)
        return offset // ctypes.sizeof(Server)


class Path:
    """A fast path before a disk on simulated files, whose threads are the test's."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = Loop()
        monkeypatch.setattr(module, "library", self.loop)
        monkeypatch.setattr(module, "brief", self.loop)
        for number, file in enumerate(bench.files):
            file.fast_file = FastFile(number, memory=True, reads=True)
        self.disk = bench.disk
        self.files = bench.files
        self.fast = FastPath(bench.disk, keep_zeros=False, writes=True)
        self.gate = self.fast._gate
        self._texts: list[object] = []

    def sleeps(self) -> bool:
        """Python goes to sleep; whether C may serve."""
        before = self.loop.opened
        self.fast.before_io_wait(1.0)
        opened = self.loop.opened > before
        return opened and bool(self.gate.readers or self.gate.writers)

    def wakes(self, *, anything: bool = False) -> None:
        """Python wakes; *anything*: C has something for it."""
        self.loop.anything = anything
        self.fast.after_io_wait(1.0)

    def writes(self, phase: Phase, place: int, outcome: int = 0, *, number: int = 0) -> None:
        """A server has written to the replicas before *place*, and there it is in *phase*."""
        assert self.sleeps()
        for file in self.files[:place]:
            file.content[:BLOCK] = NEW
        text = ctypes.create_string_buffer(NEW, BLOCK)
        self._texts.append(text)
        data = ctypes.addressof(text)
        request = Request(RequestKind.WRITE, BLOCK, UNIQUE, 0, 0, data)
        self._set(number, phase, place, outcome, request)

    def reads(self, place: int, *, number: int = 0) -> None:
        """A server is stuck in a read of the replica at *place*."""
        assert self.sleeps()
        request = Request(RequestKind.READ, BLOCK, UNIQUE, 0, 0, None)
        self._set(number, Phase.TAKEN, place, 0, request)

    def returns(self, outcome: int = 0, *, number: int = 0) -> None:
        """The system call of a server that was taken over has returned."""
        server = self.loop.servers[number]
        server.outcome, server.phase = outcome, Phase.RETURNED
        self.wakes(anything=True)

    def _set(self, number: int, phase: Phase, place: int, outcome: int, request: Request) -> None:
        server = self.loop.servers[number]
        server.request = request
        server.outcome, server.phase = outcome, phase | place << 8
        self.wakes(anything=True)

    def states(self) -> list[Standing]:
        return [replica.state for replica in self.disk.replicas]


@pytest.fixture
async def path(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> Path:
    return begun(nursery, monkeypatch)


def begun(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, threshold: int = 1) -> Path:
    """A fast path before three replicas, at work."""
    bench = make_bench(nursery, 3, pattern=Fifo(), threshold=threshold, timeout_s=TIMEOUT_S)
    path = Path(bench, monkeypatch)
    nursery.start_soon(path.fast.run, nursery)
    return path


CURRENT, STALE, MISSING = Standing.CURRENT, Standing.STALE, Standing.MISSING


@pytest.mark.parametrize("place", range(3))
async def test_a_write_that_is_stuck_goes_on_beside_it(
    path: Path, place: int, autojump_clock: MockClock
) -> None:
    path.writes(Phase.TAKEN, place)
    await trio.sleep(1.0)
    assert not path.loop.replies
    asked = [file.count(Kind.WRITE) for file in path.files]
    assert asked == [int(number > place) for number in range(3)], "who has it gets it once"
    path.files[place].content[:BLOCK] = NEW
    path.returns()
    await wait_all_tasks_blocked()
    assert path.loop.replies == [WRITTEN]
    assert path.loop.released == [0]
    assert path.states() == [CURRENT] * 3
    assert all(file.content[:BLOCK] == NEW for file in path.files)
    assert [replica.counters.writes for replica in path.disk.replicas] == [1, 1, 1]
    assert path.disk.ledger.unsynced(0, BLOCK)


async def test_a_write_that_is_stuck_has_its_range_to_itself(
    path: Path, autojump_clock: MockClock
) -> None:
    """R6."""
    path.writes(Phase.TAKEN, 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(path.disk.write, 0, b"next" * (BLOCK // 4))
        await trio.sleep(1.0)
        assert path.files[0].count(Kind.WRITE) == 0
        path.returns()
    assert bytes(path.files[0].content[:4]) == b"next"
    assert not path.disk.mirror.locks.claims


async def test_a_write_that_was_stuck_and_fails_is_missed(
    path: Path, autojump_clock: MockClock
) -> None:
    path.writes(Phase.TAKEN, 1)
    path.returns(errno.EIO)
    await wait_all_tasks_blocked()
    await trio.sleep(0.1)
    assert path.loop.replies == [WRITTEN]
    assert path.states() == [CURRENT, STALE, CURRENT]


async def test_a_write_that_was_put_off_is_done_anew(path: Path, autojump_clock: MockClock) -> None:
    path.writes(Phase.TAKEN, 1)
    path.returns(TRY_AGAIN)
    await trio.sleep(0.1)
    assert path.files[1].count(Kind.WRITE) == 1
    assert path.loop.replies == [WRITTEN]
    assert path.states() == [CURRENT] * 3
    assert path.disk.replicas[1].in_flight == 0


@pytest.mark.parametrize(("threshold", "error"), [(2, 0), (3, errno.ETIMEDOUT)])
async def test_a_write_that_never_returns_costs_a_timeout(
    nursery: trio.Nursery,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
    threshold: int,
    error: int,
) -> None:
    """P5; and R7: until it returns its replica gets nothing."""
    path = begun(nursery, monkeypatch, threshold)
    path.writes(Phase.TAKEN, 1)
    patience_s = 2 * TIMEOUT_S if error else TIMEOUT_S
    await trio.sleep(patience_s - TICK_S)
    assert not path.loop.replies
    await trio.sleep(3 * TICK_S)
    assert [reply[:2] for reply in path.loop.replies] == [(UNIQUE, error)]
    assert path.states()[1] is MISSING
    assert not path.sleeps() or not path.gate.writers
    path.returns()
    assert path.states()[1] is (CURRENT if error else STALE), "it answers again"
    assert path.loop.released == [0]
    assert len(path.loop.replies) == 1


@pytest.mark.parametrize("place", range(3))
async def test_a_write_that_failed_is_missed_by_one(
    path: Path, place: int, autojump_clock: MockClock
) -> None:
    path.writes(Phase.FAILED, place, errno.ENOSPC)
    assert path.loop.released == [0], "its server serves on"
    await trio.sleep(0.1)
    assert path.loop.replies == [WRITTEN]
    assert path.states() == [STALE if number == place else CURRENT for number in range(3)]
    assert path.disk.replicas[place].counters.write_errors == 1


async def test_a_write_that_fails_on_all_fails(path: Path, autojump_clock: MockClock) -> None:
    for file in path.files[1:]:
        file.choose = fails(errno.ENOSPC, Kind.WRITE)
    path.writes(Phase.FAILED, 0, errno.ENOSPC)
    await trio.sleep(0.1)
    assert path.loop.replies == [(UNIQUE, errno.ENOSPC, b"")]
    assert not path.disk.mirror.locks.claims


async def test_an_internal_error_in_a_write_fails_it_and_nothing_else(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(path.disk.mirror, "complete", broken)
    path.writes(Phase.FAILED, 0, errno.EIO)
    await trio.sleep(0.1)
    assert path.loop.replies == [(UNIQUE, errno.EIO, b"")]
    assert "internal error" in caplog.text
    assert not path.disk.mirror.locks.claims


async def test_a_read_that_is_stuck_goes_the_long_way(
    path: Path, autojump_clock: MockClock
) -> None:
    path.reads(0)
    replica = path.disk.replicas[0]
    assert path.loop.requeued == [0]
    assert path.loop.released == []
    assert replica.in_flight == 1, "the file must not be closed meanwhile"
    await trio.sleep(2 * REST_S[0])
    assert not path.sleeps(), "it is still stuck"
    path.wakes(anything=True)  # for another server
    assert path.loop.requeued == [0]
    path.returns()
    assert path.loop.released == [0]
    assert replica.in_flight == 0
    assert not path.loop.replies
    assert replica.counters.reads == 0


async def test_a_file_in_which_a_request_was_stuck_rests(
    path: Path, autojump_clock: MockClock
) -> None:
    path.reads(0)
    await trio.sleep(1.01 * STUCK_S)
    path.returns()
    assert path.disk.replicas[0].fast_file is None
    assert not path.sleeps()
    await trio.sleep(1.01 * REST_S[0])
    assert path.sleeps()


async def test_a_file_whose_request_waited_for_a_processor_does_not_rest(path: Path) -> None:
    path.reads(0)
    assert not path.sleeps()
    path.returns()
    assert path.sleeps()


async def test_a_read_that_hangs_ejects_nobody_until_it_is_given_up(
    path: Path, autojump_clock: MockClock
) -> None:
    """The long way finds out, too; then the file is not used until the read returns."""
    path.reads(0)
    await trio.sleep(TIMEOUT_S + 2 * TICK_S)
    assert path.states() == [MISSING, CURRENT, CURRENT]
    path.returns()
    assert path.states() == [CURRENT] * 3


async def test_two_servers_may_be_stuck(path: Path, autojump_clock: MockClock) -> None:
    """At two replicas; the second one needs others that may be used."""
    path.reads(0, number=0)
    path.loop.servers[1].request = Request(RequestKind.READ, BLOCK, UNIQUE, 0, 0, None)
    path.loop.servers[1].phase = Phase.TAKEN
    path.gate.reader[0].slot = 1  # as if another one was read meanwhile
    path.wakes(anything=True)
    assert [replica.in_flight for replica in path.disk.replicas] == [1, 1, 0]
    path.returns(number=1)
    assert [replica.in_flight for replica in path.disk.replicas] == [1, 0, 0]
    path.returns(number=0)
    assert [replica.in_flight for replica in path.disk.replicas] == [0, 0, 0]


@pytest.mark.parametrize("name", ["publish", "fold"])
async def test_after_an_internal_error_nothing_is_served(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError("on purpose")

    with monkeypatch.context() as context:
        if name == "publish":
            context.setattr(path.fast._publisher, "publish", broken)
            assert not path.sleeps()
        else:
            context.setattr(module, "fold", broken)
            assert path.sleeps()
            path.wakes()
    assert "all requests go the long way from now on" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    path.wakes()
    assert not path.sleeps()


@pytest.mark.parametrize("breaks", [1, 1000])
async def test_what_c_had_begun_is_answered_once_after_an_internal_error(
    path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock, breaks: int
) -> None:
    """Its server is released: else C would wait for ever, and Python be rung for ever."""
    calls, take_write = [], module.take_write

    def breaking(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) <= breaks:
            raise RuntimeError("on purpose")
        return take_write(*arguments)

    monkeypatch.setattr(module, "take_write", breaking)
    path.writes(Phase.FAILED, 1, errno.EIO)
    for _ in range(3):
        path.wakes(anything=True)
    await wait_all_tasks_blocked()
    assert path.loop.released == [0]
    assert path.loop.replies == [WRITTEN if breaks == 1 else (UNIQUE, errno.EIO, b"")]
    assert not path.sleeps()


async def test_what_has_not_returned_is_released_when_it_does(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "take_write", lambda *_: 1 / 0)
    path.writes(Phase.TAKEN, 1)
    assert path.loop.replies == [(UNIQUE, errno.EIO, b"")]
    assert path.loop.released == []
    path.returns()
    assert (path.loop.released, len(path.loop.replies)) == ([0], 1)


async def test_a_reader_that_has_the_number_of_a_writer_has_written_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of change moves when a writer closes: the kernel drops the file's pages then."""
    monkeypatch.setattr(pyfuse3, "invalidate_inode", lambda *_, **__: None)
    space = Space(lambda: path.disk.replicas, path.disk.mirror.rhythm)
    operations = DiskOperations(path.disk, parse_options([], 3), 1, space, path.fast)
    writer = (await operations.open(FILE_INODE, os.O_RDWR, cast("Any", None))).fh
    await operations.write(writer, 0, NEW)
    path.gate.wrote[writer] = 1  # and C has done so, too
    await operations.release(writer)
    changed = operations._mtime_ns
    reader = (await operations.open(FILE_INODE, os.O_RDONLY, cast("Any", None))).fh
    assert reader == writer
    await operations.release(reader)
    assert operations._mtime_ns == changed


async def test_the_gate_opens_where_nothing_is_served_lest_requests_wait_for_it(
    path: Path,
) -> None:
    for file in path.files:
        file.fast_file = None
    assert not path.sleeps()
    assert path.loop.opened == 1


async def test_the_gate_stays_closed_while_tasks_are_to_run(path: Path) -> None:
    path.fast.before_io_wait(0.0)
    assert not path.loop.opened
    assert path.sleeps()


async def test_the_gate_stays_closed_while_a_message_waits(path: Path) -> None:
    path.loop.pending = 1  # trio wakes at once
    assert not path.sleeps()
    path.loop.pending = 0
    assert path.sleeps()


async def test_what_c_counted_is_counted_once(path: Path) -> None:
    assert path.sleeps()
    gate = path.gate
    gate.requests = 5
    gate.counters[0].reads, gate.counters[0].bytes_read = 3, 3 * BLOCK
    for counters in gate.counters[:3]:
        counters.writes, counters.bytes_written = 2, 2 * BLOCK
    gate.journal[0], gate.journal[1], gate.journalled = 4, 7, 2
    for _ in range(2):
        path.wakes()
    first, second, third = (replica.counters for replica in path.disk.replicas)
    assert (first.reads, first.bytes_read, first.writes) == (3, 3 * BLOCK, 2)
    assert (second.reads, second.writes, third.bytes_written) == (0, 2, 2 * BLOCK)
    assert path.disk.mirror.requests == 5
    unsynced = [path.disk.ledger.unsynced(block * BLOCK, BLOCK) for block in range(9)]
    assert unsynced == [block in (4, 7) for block in range(9)]
    assert gate.journalled == 0


async def test_a_handle_that_is_closed_is_forgotten(path: Path) -> None:
    path.gate.wrote[5] = 1
    assert not path.fast.forget(4)
    assert path.fast.forget(5)
    assert not path.fast.forget(5), "its number is another one's by now"
    assert not path.fast.forget(HANDLES)
    assert not path.fast.forget(HANDLES + 5)


async def test_what_is_adopted_is_in_the_fingerprint_of_a_device(tmp_path: FilePath) -> None:
    """As what the replica's own threads write: an older copy must not pass for the image."""
    image = tmp_path / "a.img"
    image.write_bytes(bytes(BLOCK))
    written = LastRegions()
    storage = FileStorage(os.open(image, os.O_RDWR), BLOCK, str(image), locality=Locality.HERE)
    storage._written = written  # as of a device
    replica = Replica(0, str(image), storage, TIMEOUT_S)
    operation = Operation(Kind.WRITE, 0, BLOCK, NEW)
    fan_out = FanOut(1)
    fan_out.adopt(replica, operation)
    replica.returned(operation, None)
    await fan_out.complete()
    assert list(written) == [0]
    await replica.close()
