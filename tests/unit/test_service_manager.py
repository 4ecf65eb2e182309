"""What a service manager is told beside what a mount shows: see ``system/test_service.py``."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from quorumfs.control.reporter import Reporter
from quorumfs.control.service import ServiceManager, StatusLine, status_line
from quorumfs.control.status import DiskState, ReplicaStatus, Status, Trouble

A = ReplicaStatus("/nas1/a.img", None, "current")
B = ReplicaStatus("/nas2/b.img", None, "current")
STATUS = Status("/mnt", 1234, None, None, 1 << 20, DiskState.HEALTHY, "fifo", 1, (A, B))
HANGS = replace(B, trouble=Trouble.HANGING.value, reason="its file system has not answered")
HEALTHY = "STATUS=healthy: 2 of 2 replicas are current and usable"


class Told:
    """A reporter that has nothing but a status."""

    def __init__(self, status: Status = STATUS) -> None:
        self.status = status
        self.taken = 0

    @property
    def stands_still(self) -> bool:
        return self.status.standstill_s is not None

    def latest(self) -> Status:
        self.taken += 1
        return self.status


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(f"{tmp_path}/notify")
        channel.setblocking(False)
        yield channel


@pytest.fixture
def manager(listener: socket.socket) -> Iterator[ServiceManager]:
    manager = ServiceManager(listener.getsockname(), 1.0)
    yield manager
    manager.close()


def heard(listener: socket.socket) -> list[str]:
    """All messages so far."""
    messages = []
    while True:
        try:
            messages.append(listener.recv(1 << 16).decode())
        except BlockingIOError:
            return messages


def test_no_child_process_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    manager = ServiceManager.from_environment()
    assert manager.listens
    assert manager.watchdog_s == 3.0
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()
    manager.close()


@pytest.mark.parametrize(("pid", "interval"), [("1", "3000000"), (None, "0"), (None, "often")])
def test_a_watchdog_for_another_process_or_of_no_interval_is_none(
    monkeypatch: pytest.MonkeyPatch, pid: str | None, interval: str
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", interval)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert ServiceManager.from_environment().watchdog_s is None


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234"])
def test_without_a_manager_nothing_is_sent(address: str | None) -> None:
    manager = ServiceManager(address, None)
    assert not manager.listens
    assert manager.tell("READY=1")


def test_a_message_that_is_not_taken_is_no_error_and_does_not_wait(tmp_path: Path) -> None:
    manager = ServiceManager(f"{tmp_path}/gone", None)
    assert not manager.tell("READY=1")
    manager.close()


def test_a_healthy_disk_that_nothing_is_told_of_is_not_looked_at(
    manager: ServiceManager, listener: socket.socket
) -> None:
    told, last = Told(), 5
    line = StatusLine(manager, cast("Reporter", told), lambda: last)
    for _ in range(3):
        line.watch()
    assert heard(listener) == [HEALTHY]
    assert told.taken == 1
    last = 6
    line.watch()
    assert told.taken == 2


def test_a_store_that_holds_up_the_loop_is_no_reason_to_kill_the_daemon(
    manager: ServiceManager, listener: socket.socket
) -> None:
    told = Told(replace(STATUS, state=DiskState.DEGRADED, standstill_s=5, replicas=(A, HANGS)))
    StatusLine(manager, cast("Reporter", told), lambda: 0).watch()
    beat, line = heard(listener)
    assert beat == "WATCHDOG=1"
    assert line.startswith("STATUS=degraded: 1 of 2 replicas")
    assert "/nas2/b.img" in line


def test_a_loop_that_hangs_by_itself_is_left_to_the_watchdog(
    manager: ServiceManager, listener: socket.socket
) -> None:
    told = Told(replace(STATUS, state=DiskState.DEGRADED, standstill_s=5))
    StatusLine(manager, cast("Reporter", told), lambda: 0).watch()
    (line,) = heard(listener)
    assert "no request has been served for 5 s" in line


def test_the_line_is_one_of_printable_characters() -> None:
    lost = replace(B, path="/nas\n2/\udcff.img", state="missing")
    line = status_line(replace(STATUS, state=DiskState.DEGRADED, replicas=(A, lost)))
    assert line.isprintable()
    assert "\\n" in line
