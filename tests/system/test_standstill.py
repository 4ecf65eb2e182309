"""A local file system that stops answering while the loop writes to it: what an operator sees."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import pytest
from support.command import quorumfs_in_background, seconds, wait_until
from support.mounting import quorumfs
from support.sets import MIB, Ext4, SetMount, create, same

from quorumfs.control import runtime

FIFO = "read-pattern=fifo,vote-threshold=1"
ANSWER_S = 0.1
"""How soon a status has to be answered, also while everything else waits."""

GUEST = """
import os, sys
from mmap import mmap
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
data = mmap(-1, 4096)
os.pwrite(fd, data, 0)
for line in sys.stdin:
    print("begins", flush=True)
    os.pwrite(fd, data, 0) if line == "write\\n" else os.fsync(fd)
    print("ends", flush=True)
"""


class Guest:
    """A process of its own: none could be started by one that has the disk open while it hangs."""

    def __init__(self, file: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", GUEST, file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.do("write")  # has marks, and whatever else needs threads, behind it
        self.ends()

    def do(self, what: str) -> None:
        """Begin to write or flush."""
        assert self._process.stdin
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._hear("begins")

    def ends(self) -> None:
        """Wait until that is done."""
        self._hear("ends")

    def _hear(self, word: str) -> None:
        assert self._process.stdout
        assert self._process.stdout.readline() == f"{word}\n"

    def go(self) -> None:
        """Close the disk."""
        self._process.communicate()


@contextmanager
def guest_of(disk: SetMount) -> Iterator[Guest]:
    guest = Guest(disk.file)
    try:
        yield guest
    finally:
        guest.go()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Ext4]:
    with Ext4(tmp_path) as device:
        yield device


def test_status_names_who_hangs_while_the_loop_waits_for_it(device: Ext4, tmp_path: Path) -> None:
    """Default options: within 100 ms, since when, and what to do; the log tells it too. When the
    file system is thawed all is as before."""
    on_it = [device.mountpoint / "a.img", device.mountpoint / "b.img"]
    images = create([*on_it, tmp_path / "c.img"])
    with SetMount(images, tmp_path) as disk, guest_of(disk) as guest:
        disk.wait_healthy()
        with device.frozen():
            guest.do("write")
            status = disk.wait(lambda status: status["standstill_s"], "a standstill")
            assert median(seconds(disk.status) for _ in range(20)) < ANSWER_S
            assert status["state"] == "no-quorum", "of three, two are on the frozen file system"
            assert [replica["state"] for replica in status["replicas"]] == ["current"] * 3
            troubles = [replica["trouble"] for replica in status["replicas"]]
            assert troubles == ["hanging", "hanging", None]
            reasons = [replica["reason"] for replica in status["replicas"]]
            assert reasons[0].startswith("its file system has not answered for 1 s, and every req")
            assert reasons[1] == f"it is on the file system of {images[0]}, which does not answer"
            done = quorumfs("status", disk.mountpoint, check=False)
            assert done.returncode == 2
            assert f"action: {images[0]}: its file system has not answered for " in done.stdout
            assert "thaw it (fsfreeze -u)" in done.stdout
            watching = quorumfs_in_background("status", "--watch", disk.mountpoint)
            assert watching.stdout
            assert watching.stdout.readline() == f"{disk.mountpoint}: no-quorum\n"
            watching.kill()
            watching.communicate()
            wait_until(lambda: warned(disk, "its file system has not answered"), "a warning")
        guest.ends()
        disk.wait_healthy()
        wait_until(lambda: warned(disk, "requests are served again after "), "the good news")
        assert disk.status()["standstill_s"] is None
    assert same(images)


def warned(disk: SetMount, text: str) -> bool:
    """Whether the log has a warning with *text*."""
    return any(text in record.get("message", "") for record in disk.log())


def test_silent_and_deaf_clients_keep_no_status_from_others_while_the_loop_waits(
    device: Ext4, tmp_path: Path
) -> None:
    images = create(
        [device.mountpoint / "a.img", tmp_path / "b.img"], 4 * MIB, "--vote-threshold=1"
    )
    with SetMount(images, tmp_path, FIFO) as disk, guest_of(disk) as guest, ExitStack() as talks:
        disk.wait_healthy()
        with device.frozen():
            guest.do("write")
            disk.wait(lambda status: status["standstill_s"], "a standstill")
            path = runtime.path_for(str(disk.mountpoint), "sock")
            for number in range(30):
                talk = talks.enter_context(socket.socket(socket.AF_UNIX))
                talk.connect(os.fspath(path))
                if number % 2:
                    talk.sendall(b'{"command": "status"}\n' * 100)
            assert median(seconds(disk.status) for _ in range(20)) < ANSWER_S
            assert disk.status()["state"] == "degraded"
        guest.ends()


def test_umount_says_whom_the_loop_waits_for(device: Ext4, tmp_path: Path) -> None:
    """And who has the disk open, as always, when it is thawed."""
    images = create(
        [device.mountpoint / "a.img", tmp_path / "b.img"], 4 * MIB, "--vote-threshold=1"
    )
    with SetMount(images, tmp_path, FIFO) as disk:
        disk.wait_healthy()
        with guest_of(disk) as guest:
            with device.frozen():
                guest.do("write")
                disk.wait(lambda status: status["standstill_s"], "the loop to stand still")
                umount = quorumfs("umount", disk.mountpoint, check=False)
                assert umount.returncode == 1
                assert "it is busy; in use by" in umount.stderr
                assert f"{images[0]}: its file system has not answered" in umount.stderr
                assert "thaw it (fsfreeze -u)" in umount.stderr
            guest.ends()
        quorumfs("umount", disk.mountpoint)
    assert same(images)


def test_umount_says_whose_last_flush_or_write_it_waits_for(device: Ext4, tmp_path: Path) -> None:
    """The mount is not in the kernel's table any more by then."""
    images = create(
        [tmp_path / "a.img", device.mountpoint / "b.img"], 4 * MIB, "--vote-threshold=1"
    )
    with SetMount(images, tmp_path, FIFO) as disk:
        disk.wait_healthy()
        with guest_of(disk):
            pass
        with device.frozen():
            umount = quorumfs_in_background("umount", disk.mountpoint)
            assert umount.stderr
            told = umount.stderr.readline()
            assert told.startswith(f"waiting for {images[1]}: no answer to a ")
            assert not os.path.ismount(disk.mountpoint)
        assert umount.communicate()[1] == ""
        assert umount.returncode == 0
    assert same(images)
