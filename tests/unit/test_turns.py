"""Taking requests that are there before asking trio."""

import os
import select
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from quorumfs.fuse import session as module
from quorumfs.fuse.session import TURN, Turns


class Session:
    """A pipe in place of the kernel's requests, and pyfuse3's way to wait for them."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.ended = False
        self.asked = 0
        self.waiting = 0
        self.waiting_max = 0
        self._lock = trio.Lock()

    async def wait(self) -> bool:
        self.asked += 1
        self.waiting += 1
        self.waiting_max = max(self.waiting, self.waiting_max)
        try:
            async with self._lock:
                if self.ended:
                    return False
                await trio.lowlevel.wait_readable(self.reader)
                return True
        except trio.ClosedResourceError:
            return False
        finally:
            self.waiting -= 1

    def pending(self) -> bool:
        return bool(select.select([self.reader], [], [], 0)[0])

    def send(self, requests: int = 1) -> None:
        os.write(self.writer, bytes(requests))

    def receive(self) -> None:
        """Raises `BlockingIOError` where the real one would block the loop."""
        os.read(self.reader, 1)


@pytest.fixture
def session() -> Iterator[Session]:
    session = Session()
    yield session
    os.close(session.reader)
    os.close(session.writer)


NEVER_NS = 10**15


@pytest.mark.parametrize(("turn_ns", "asked"), [(NEVER_NS, 0), (0, TURN - 1)])
def test_a_series_of_requests_asks_trio_only_when_a_turn_lasts_too_long(
    session: Session, monkeypatch: pytest.MonkeyPatch, turn_ns: int, asked: int
) -> None:
    monkeypatch.setattr(module, "TURN_NS", turn_ns)

    async def run() -> None:
        turns = Turns(session.pending, session.wait)
        session.send(TURN - 1)
        for _ in range(TURN - 1):
            assert await turns.wait()
            session.receive()
        assert session.asked == asked

    trio.run(run)


def test_others_have_a_turn_during_an_endless_series(session: Session) -> None:
    async def run() -> None:
        turns = Turns(session.pending, session.wait)
        others = 0

        async def other() -> None:
            nonlocal others
            while True:
                others += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(10 * TURN):
                session.send()
                assert await turns.wait()
                session.receive()
            nursery.cancel_scope.cancel()
        assert others >= 9

    trio.run(run)


def test_every_task_that_waits_hears_of_requests_until_all_are_taken(session: Session) -> None:
    """One may be told of a request that another one took: then there is none, and it looks on."""

    async def run() -> None:
        turns = Turns(session.pending, session.wait)
        served = [0, 0, 0]

        async def worker(number: int) -> None:
            while await turns.wait():
                with suppress(BlockingIOError):
                    session.receive()
                    served[number] += 1
                if number == 2:
                    await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(worker, number)
            for requests in (1, 2, 1, TURN + 1, 3) * 20:
                session.send(requests)
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert sum(served) == 20 * (TURN + 8)
            nursery.cancel_scope.cancel()

    trio.run(run)


def test_an_idle_task_is_seen_by_pyfuse3_and_ends_with_the_session(session: Session) -> None:
    async def run() -> None:
        turns = Turns(session.pending, session.wait)
        ended = []

        async def worker() -> None:
            ended.append(await turns.wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(worker)
            nursery.start_soon(worker)
            await trio.testing.wait_all_tasks_blocked()
            assert session.waiting == 2
            session.ended = True
            trio.lowlevel.notify_closing(session.reader)
        assert ended == [False, False]

    trio.run(run)


def test_another_pyfuse3_waits_in_its_own_way(session: Session) -> None:
    """The name is not one that it promises to have."""
    ours: dict[str, Any] = {"_wait_fuse_readable": session.wait}
    module._take_turns(session.pending, ours)
    assert ours["_wait_fuse_readable"] != session.wait
    for other in ({}, {"_wait_fuse_readable": None}, {"_wait_readable": session.wait}):
        names: dict[str, Any] = dict(other)
        module._take_turns(session.pending, names)
        assert names == other
