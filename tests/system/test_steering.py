"""A mount watched and steered by its administrator: events, wait, clear, resync, set."""

import errno
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from support.command import wait_until
from support.faultfs import FaultFS
from support.mounting import QUORUMFS, quorumfs
from support.sets import MIB, SetMount, create, named, opened

SIZE = 32 * MIB


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    return create(named(tmp_path, 2), SIZE, "--vote-threshold=1")


@contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A command that goes on; killed at the end if it still does."""
    command = [*QUORUMFS, *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def on_terminal(
    *arguments: str | Path,
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[str], str]]]:
    """A command whose errors go to a terminal, and what waits until that shows a text."""
    terminal, end = pty.openpty()
    command = [*QUORUMFS, *map(str, arguments)]
    shown = ""

    def shows(text: str) -> str:
        nonlocal shown
        while text not in " ".join(shown.split()):  # long lines are wrapped
            shown += os.read(terminal, 4096).decode()
        return shown

    with subprocess.Popen(command, stderr=end, start_new_session=True) as process:
        os.close(end)
        try:
            yield process, shows
        finally:
            process.kill()
            os.close(terminal)


def lines_of(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What it prints, line by line, as it comes."""
    assert process.stdout is not None
    return map(json.loads, process.stdout)


def refusal(*arguments: str | Path, exit_code: int = 1) -> str:
    """Why a command is refused, in one line."""
    done = quorumfs(*arguments, check=False)
    assert done.returncode == exit_code, done
    assert done.stderr.count("\n") == 1
    return done.stderr


def write(disk: SetMount, data: bytes = b"x", offset: int = 0, length: int = MIB) -> None:
    """Data that is durable."""
    with opened(disk.file) as fd:
        os.pwrite(fd, data * length, offset)
        os.fsync(fd)


# Events


def test_events_are_shown_as_they_happen_until_the_mount_ends(
    tmp_path: Path, images: list[Path]
) -> None:
    with (
        SetMount(images, tmp_path) as disk,
        running("events", "--json", disk.mountpoint) as watching,
    ):
        events = lines_of(watching)
        first = next(events)
        assert (first["event"], first["state"], first["schema"]) == ("STATUS", "healthy", 1)
        quorumfs("offline", disk.mountpoint, "b.img")
        event = next(events)
        wait_until(lambda: event in disk.log(), "the event in the log")
        assert (event["event"], event["new"]) == ("REPLICA_STATE_CHANGED", "offline")
        quorumfs("umount", disk.mountpoint)
        assert not [event for event in events if event["event"] != "REPLICA_STATE_CHANGED"]
        assert watching.wait() == 0


def test_events_of_a_daemon_that_dies_end_with_its_code(tmp_path: Path, images: list[Path]) -> None:
    with (
        SetMount(images, tmp_path) as disk,
        running("events", disk.mountpoint) as watching,
    ):
        assert watching.stdout is not None
        assert "healthy" in watching.stdout.readline()
        os.kill(disk.pid, signal.SIGKILL)
        assert watching.wait() == 2
        assert watching.stderr is not None
        assert "is gone, and the mount dead" in watching.stderr.read()
        subprocess.run(["umount", "-l", disk.mountpoint], check=True)


def test_events_end_at_ctrl_c(tmp_path: Path, images: list[Path]) -> None:
    with (
        SetMount(images, tmp_path) as disk,
        running("events", disk.mountpoint) as watching,
    ):
        assert watching.stdout is not None
        watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        assert watching.wait() == 0


def test_events_are_shown_while_the_daemon_is_stopped_and_goes_on(
    tmp_path: Path, images: list[Path]
) -> None:
    with (
        SetMount(images, tmp_path) as disk,
        running("events", "--json", disk.mountpoint) as watching,
    ):
        events = lines_of(watching)
        next(events)
        os.kill(disk.pid, signal.SIGSTOP)
        assert watching.stderr is not None
        assert "does not answer" in watching.stderr.readline()
        os.kill(disk.pid, signal.SIGCONT)
        os.kill(disk.pid, signal.SIGUSR1)
        assert next(events)["event"] == "STATUS"


def test_what_is_now_is_shown_alone(tmp_path: Path, images: list[Path]) -> None:
    with SetMount(images, tmp_path) as disk:
        shown = json.loads(quorumfs("events", "--now", "--json", disk.mountpoint).stdout)
        assert shown["event"] == "STATUS"
        assert quorumfs("events", "--now", disk.mountpoint).stdout.startswith(
            f"{disk.mountpoint}: healthy\n"
        )
    refusal("events", tmp_path / "mnt", exit_code=4)


# Wait


def test_wait_ends_when_it_is_so(tmp_path: Path, images: list[Path]) -> None:
    with SetMount(images, tmp_path, "resync-rate=4M") as disk:
        quorumfs("wait", "--for", "clean", disk.mountpoint)
        quorumfs("offline", disk.mountpoint, "b.img")
        write(disk, length=4 * MIB)
        quorumfs("online", disk.mountpoint, "b.img")
        with running("wait", "--for", "current:b.img", "--json", disk.mountpoint) as waiting:
            assert waiting.wait() == 0
            assert next(lines_of(waiting))["replicas"][1]["state"] == "current"
        done = quorumfs("wait", "--for", "healthy", disk.mountpoint)
        assert done.stdout == f"{disk.mountpoint}: healthy\n"


def test_wait_says_what_is_instead_when_the_time_is_over(
    tmp_path: Path, images: list[Path]
) -> None:
    with SetMount(images, tmp_path) as disk:
        told = refusal("wait", "--for", "degraded", "--timeout", "0.2", disk.mountpoint)
        assert told.strip() == (f"quorumfs: degraded is not reached: {disk.mountpoint} is healthy")


def test_wait_gives_up_where_waiting_is_of_no_use(tmp_path: Path, images: list[Path]) -> None:
    with SetMount(images, tmp_path) as disk:
        quorumfs("offline", disk.mountpoint, "b.img")
        told = refusal("wait", "--for", "healthy", disk.mountpoint, exit_code=3)
        assert f"{images[1]} is offline" in told
        assert "quorumfs online" in told
        for wanted, code in ("well", 4), ("current:c.img", 4):
            refusal("wait", "--for", wanted, disk.mountpoint, exit_code=code)
        with on_terminal("wait", "--for", "no-quorum", disk.mountpoint) as (waiting, shows):
            shows(": degraded")
            quorumfs("umount", disk.mountpoint)
            assert waiting.wait() == 4
            shows("unmounted meanwhile")


def test_wait_ends_with_the_daemon(tmp_path: Path, images: list[Path]) -> None:
    with (
        SetMount(images, tmp_path) as disk,
        on_terminal("wait", "--for", "degraded", disk.mountpoint) as (waiting, shows),
    ):
        shows(": healthy")
        os.kill(disk.pid, signal.SIGKILL)
        assert waiting.wait() == 2
        subprocess.run(["umount", "-l", disk.mountpoint], check=True)


# Clear


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultFS]:
    """Where b.img is to be."""
    (tmp_path / "store").mkdir()
    with FaultFS(tmp_path / "store") as store:
        yield store


def test_clear_forgets_errors_and_tries_an_ejected_replica_at_once(
    tmp_path: Path, faulty: FaultFS
) -> None:
    """Also a second time: where there is nothing to forget nothing is forgotten."""
    images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, "--vote-threshold=1")
    with SetMount(images, tmp_path) as disk:
        faulty.inject("b.img", "write", errno=errno.EIO, count=1)
        write(disk)
        part = disk.replica(images[1])
        assert (part["errors"]["write"], part["state"] == "current") == (1, False)
        done = json.loads(quorumfs("clear", "--json", disk.mountpoint).stdout)
        assert done["cleared"] == {str(images[0]): 0, str(images[1]): 1}
        assert disk.replica(images[1])["errors"]["write"] == 0
        (event,) = disk.wait_for_events("ERRORS_CLEARED", lambda events: len(events) == 2)[1:]
        assert (event["replica"], event["errors"]) == (str(images[1]), 1)
        disk.wait_healthy()
        done = json.loads(quorumfs("clear", "--json", disk.mountpoint, "b.img").stdout)
        assert (done["cleared"], done["tried"]) == ({str(images[1]): 0}, [])
        assert "cleared 0 errors" in quorumfs("clear", disk.mountpoint).stdout
        told = refusal("clear", disk.mountpoint, "c.img", exit_code=4)
        assert f"its replicas are {images[0]}, {images[1]}" in told


def test_clear_hides_no_trouble_that_stands(tmp_path: Path) -> None:
    """Such as a truncated image, of a replica that the threshold needs."""
    images = create(named(tmp_path, 2), SIZE, "--vote-threshold=2")
    with SetMount(images, tmp_path) as disk:
        disk.expected_errors = ["the last flush failed"]
        os.truncate(images[0], MIB)
        with suppress(OSError):
            write(disk, offset=2 * MIB)
        for _ in range(2):
            assert disk.replica(images[0])["trouble"] == "truncated"
            assert disk.status()["state"] == "no-quorum"
            quorumfs("clear", disk.mountpoint)
        assert not disk.replica(images[0])["errors"]["write"]
        os.truncate(images[0], SIZE)
        quorumfs("umount", disk.mountpoint, check=False)


def test_clear_serves_a_mount_without_metadata(tmp_path: Path, images: list[Path]) -> None:
    with SetMount(images, tmp_path, "ro") as disk:
        done = json.loads(quorumfs("clear", "--json", disk.mountpoint).stdout)
        assert done["tried"] == []
