"""The status of a loop that stands still: taken beside it, and for what it waits."""

import importlib
import os
import threading
from dataclasses import replace
from typing import Any

import pytest
import trio

from quorumfs.control import client, mounts, pulse
from quorumfs.control.advice import awaited, describe
from quorumfs.control.pulse import Pulse, Standstill
from quorumfs.control.reporter import Reporter
from quorumfs.control.status import (
    DiskState,
    ReplicaStatus,
    Status,
    Trouble,
    Waiting,
    overall_state,
)

umount = importlib.import_module("quorumfs.cli.umount")  # the name in the package is the command

A = ReplicaStatus("/nas1/a.img", None, "current")
B = ReplicaStatus("/nas2/b.img", None, "current")
STATUS = Status("/mnt", 1234, None, None, 1 << 20, DiskState.HEALTHY, "fifo", 1, (A, B))


class Takes:
    """Notes how the status is asked for."""

    def __init__(self) -> None:
        self.standstills: list[Standstill | None] = []
        self.threads: list[int] = []

    def __call__(self, now: float, standstill: Standstill | None) -> Status:
        assert now > 0
        self.standstills.append(standstill)
        self.threads.append(threading.get_ident())
        seconds = None if standstill is None else standstill.seconds
        return replace(STATUS, standstill_s=seconds)


def in_thread(call: Any) -> Any:
    """What *call* returns in another thread, while this one waits in a system call for it."""
    results: list[Any] = []
    reader, writer = os.pipe()

    def run() -> None:
        results.append(call(reader))
        os.write(writer, b"x")

    threading.Thread(target=run).start()
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return results[0]


async def test_a_loop_that_goes_on_takes_its_status_itself() -> None:
    takes = Takes()
    reporter = Reporter(takes, Pulse())
    await trio.to_thread.run_sync(reporter.refresh)
    assert takes.standstills == [None]
    assert takes.threads == [threading.get_ident()]
    assert reporter.status({})["standstill_s"] is None


async def test_a_loop_that_waits_is_told_with_the_descriptor_that_it_waits_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And the next one who asks does not wait for it again."""
    monkeypatch.setattr(pulse, "STANDSTILL_S", 0.0)
    takes = Takes()
    reporter = Reporter(takes, Pulse())

    def ask(reader: int) -> int:
        reporter.refresh()
        monkeypatch.setattr(pulse, "ANSWER_S", 60.0)
        reporter.refresh()
        return reader

    reader = in_thread(ask)
    assert takes.standstills == [Standstill(0, reader)] * 2
    assert threading.get_ident() not in takes.threads
    await trio.testing.wait_all_tasks_blocked(0.01)
    await trio.to_thread.run_sync(reporter.refresh)
    assert takes.threads[-1] == threading.get_ident(), "it goes on, and is asked again"


async def test_the_log_is_told_once_when_the_loop_stands_still_and_when_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    beats = Pulse()
    stands: list[Standstill | None] = [None, Standstill(1, 7), Standstill(3, 7), Standstill(4, 7)]
    reporter = Reporter(
        lambda _, standstill: replace(
            STATUS, state=DiskState.DEGRADED, standstill_s=standstill and standstill.seconds
        ),
        beats,
    )
    for standstill in [*stands, None, None]:
        monkeypatch.setattr(beats, "standstill", lambda standstill=standstill: standstill)
        reporter.watch()
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("no request has been served for 3 s: the daemon is busy, or the host")
    assert second == "requests are served again after 4 s"


def test_a_daemon_that_stands_still_is_not_healthy() -> None:
    state = overall_state([A, B], vote_threshold=1, stands_still=True)
    assert state is DiskState.DEGRADED
    (line,) = describe(replace(STATUS, state=state, standstill_s=12))
    assert line.startswith("no request has been served for 12 s: ")


def test_who_waits_for_the_end_is_told_who_does_not_answer() -> None:
    hanging = replace(
        A, state="resyncing", trouble=Trouble.HANGING.value, reason="its file system hangs"
    )
    waiting = replace(B, waiting=Waiting("flush", 2))
    lines = awaited(replace(STATUS, replicas=(hanging, waiting)), 2)
    assert lines[A.path].startswith(f"{A.path}: its file system hangs; thaw it (fsfreeze -u)")
    assert lines[B.path].startswith(f"{B.path}: no answer to a flush for 2 s; look at its disk")
    assert awaited(replace(STATUS, replicas=(B, waiting)), 3) == {}


@pytest.mark.parametrize("answers", [True, False])
def test_umount_gives_up_a_daemon_that_stands_still(
    answers: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Having said once whom it waits for; but never one that goes on, however long that takes."""
    now = 1000.0
    hanging = replace(A, trouble=Trouble.HANGING.value, reason="its file system hangs")
    stands = replace(STATUS, replicas=(hanging, B), standstill_s=5)

    def status(*_: object, **__: object) -> Status:
        if answers:
            return stands
        raise client.NoAnswerError("stopped")

    monkeypatch.setattr(umount, "monotonic", lambda: now)
    monkeypatch.setattr(client, "status", lambda *_, **__: STATUS)
    watch = umount._Watch(mounts.Mount("/mnt", mounts.FS_TYPE, 0), "/mnt", None)
    now += 1000
    watch.look()
    monkeypatch.setattr(client, "status", status)
    for _ in range(3):
        now += umount.GIVE_UP_S / 3
        watch.look()
    now += 1
    words = "its file system hangs" if answers else "it does not answer"
    with pytest.raises(umount._GivenUpError, match=words):
        watch.look()
    assert capsys.readouterr().err.count("waiting for /nas1/a.img: its file ") == int(answers)
