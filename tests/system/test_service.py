"""A mount as a service: what the manager that started it is told, and when."""

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import MakeImages
from support.mounting import QUORUMFS, make_set, quorumfs

PATIENCE_S = 60.0


class Manager:
    """A service manager, as far as its socket goes; *address* as in ``NOTIFY_SOCKET``."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.heard: list[dict[str, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1))
        self._socket.settimeout(PATIENCE_S)

    def hear(self, enough: Callable[[dict[str, str]], object]) -> dict[str, str]:
        """The first message from now on that is *enough*."""
        while True:
            lines = self._socket.recv(1 << 16).decode().split("\n")
            self.heard.append(dict(line.split("=", 1) for line in lines))
            if enough(self.heard[-1]):
                return self.heard[-1]

    def said(self, **variables: str) -> dict[str, str]:
        """The first message from now on with these."""
        return self.hear(lambda message: variables.items() <= message.items())

    def silent(self) -> bool:
        """Whether there is no message."""
        self._socket.setblocking(False)
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        return False

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["a path", "an abstract name"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    name = f"{tmp_path}/notify" if request.param == "a path" else f"@quorumfs-test-{os.getpid()}"
    manager = Manager(name)
    yield manager
    manager.close()


@contextmanager
def in_foreground(
    manager: Manager, *arguments: str | Path, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The command *arguments* as a service, killed at the end."""
    told = os.environ | {"NOTIFY_SOCKET": manager.address} | environment
    with subprocess.Popen([*QUORUMFS, *map(str, arguments)], env=told) as service:
        try:
            yield service
        finally:
            service.kill()


def test_a_manager_hears_how_the_service_is(
    make_images: MakeImages, mountpoint: Path, manager: Manager
) -> None:
    images = make_images(2)
    make_set(images)
    options = "read-pattern=fifo,vote-threshold=1"
    watched = {"WATCHDOG_USEC": "400000"}
    flags = "--foreground", "-o", options
    with in_foreground(manager, "mount", *flags, *images, mountpoint, **watched) as service:
        ready = manager.said(READY="1")
        assert (mountpoint / "disk.img").stat().st_size == 1 << 20
        assert ready["STATUS"] == "healthy: 2 of 2 replicas are current and usable"
        manager.said(WATCHDOG="1")
        manager.said(WATCHDOG="1")

        quorumfs("offline", mountpoint, images[1])
        lost = manager.hear(lambda said: said.get("STATUS", "").startswith("degraded: 1 of 2"))
        assert str(images[1]) in lost["STATUS"]
        quorumfs("online", mountpoint, images[1])
        manager.said(STATUS="healthy: 2 of 2 replicas are current and usable")

        quorumfs("set", mountpoint, "read-pattern=quorum")
        reloading = manager.said(RELOADING="1")
        assert int(reloading["MONOTONIC_USEC"]) > 0
        manager.said(READY="1")

        quorumfs("umount", mountpoint)
        manager.said(STOPPING="1")
        assert service.wait(PATIENCE_S) == 0
    assert [said for said in manager.heard if "READY" in said] == [ready, {"READY": "1"}]


def test_nothing_is_told_of_what_is_refused(
    make_images: MakeImages, mountpoint: Path, manager: Manager
) -> None:
    images = make_images(2)
    with in_foreground(manager, "mount", "-f", *images, mountpoint / "none") as service:
        assert service.wait(PATIENCE_S) == 1
    assert manager.silent()


def test_a_mount_in_the_background_is_no_service(
    make_images: MakeImages, mountpoint: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service is who started it, and may have other things to do before it is ready."""
    images = make_images(2)
    make_set(images)
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    quorumfs("mount", *images, mountpoint)
    quorumfs("umount", mountpoint)
    assert manager.silent()
