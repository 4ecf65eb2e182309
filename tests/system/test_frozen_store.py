"""A local file system that stops answering: what the guest and an operator see of it."""

import os
import signal
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
from quorumfs.errors import ExitCode

FIFO = "read-pattern=fifo,vote-threshold=1"
ONE = "--vote-threshold=1"
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
    what = line.strip()
    if what == "write":
        os.pwrite(fd, data, 0)
    elif what == "read":
        os.preadv(fd, [data], 0)
    else:
        os.fsync(fd)
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
        """Begin to write, read or flush."""
        assert self._process.stdin
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._hear("begins")

    def ends(self) -> None:
        """Wait until that is done."""
        self._hear("ends")

    def does(self, what: str, times: int) -> None:
        """Do that so many times."""
        for _ in range(times):
            self.do(what)
            self.ends()

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


def test_a_frozen_store_costs_the_guest_one_timeout_and_status_none(
    device: Ext4, tmp_path: Path
) -> None:
    """P5, with default options: status names within 100 ms who hangs and since when. The write that
    was stuck lands before the resync (R7): when the file system is thawed all replicas are equal.
    """
    images = create([device.mountpoint / "a.img", tmp_path / "b.img"], 4 * MIB, ONE)
    with SetMount(images, tmp_path, FIFO) as disk, guest_of(disk) as guest:
        disk.expected_errors = [""]
        disk.wait_healthy()
        with device.frozen():
            guest.do("write")
            status = disk.wait(lambda status: status["state"] == "degraded", "the trouble")
            assert median(seconds(disk.status) for _ in range(20)) < ANSWER_S
            assert [replica["state"] for replica in status["replicas"]] == ["current"] * 2
            assert status["replicas"][0]["trouble"] == "slow"
            done = quorumfs("status", disk.mountpoint, check=False)
            assert done.returncode == 1
            assert f"action: {images[0]}: " in done.stdout
            guest.ends()  # after the replica timeout, by the other replica
            assert disk.replica(images[0])["state"] == "missing"
            assert seconds(lambda: guest.does("write", 50)) < 1, "a second timeout"
            assert disk.status()["standstill_s"] is None
        disk.wait_healthy()
        assert disk.replica(images[0])["errors"]["timeout"] == 1
    assert same(images)


def test_a_read_stuck_in_a_frozen_store_goes_on_elsewhere(device: Ext4, tmp_path: Path) -> None:
    """A write holds the file's lock there, and a vote asks all replicas."""
    images = create([device.mountpoint / "a.img", *(tmp_path / f"{x}.img" for x in "bc")], 4 * MIB)
    with SetMount(images, tmp_path, "replica-timeout=2") as disk, guest_of(disk) as guest:
        disk.expected_errors = [""]
        disk.wait_healthy()
        with device.frozen():
            guest.do("write")
            guest.ends()
            assert seconds(lambda: guest.does("read", 50)) < 1
        disk.wait_healthy()
    assert same(images)


def test_silent_and_deaf_clients_keep_no_status_from_others_while_a_store_is_frozen(
    device: Ext4, tmp_path: Path
) -> None:
    images = create([device.mountpoint / "a.img", tmp_path / "b.img"], 4 * MIB, ONE)
    with SetMount(images, tmp_path, FIFO) as disk, guest_of(disk) as guest, ExitStack() as talks:
        disk.expected_errors = [""]
        disk.wait_healthy()
        with device.frozen():
            guest.do("write")
            disk.wait(lambda status: status["state"] == "degraded", "the trouble")
            path = runtime.path_for(str(disk.mountpoint), "sock")
            for number in range(30):
                talk = talks.enter_context(socket.socket(socket.AF_UNIX))
                talk.connect(os.fspath(path))
                if number % 2:
                    talk.sendall(b'{"command": "status"}\n' * 100)
            assert median(seconds(disk.status) for _ in range(20)) < ANSWER_S
        guest.ends()
        disk.wait_healthy()


def test_umount_says_whose_last_flush_or_write_it_waits_for(device: Ext4, tmp_path: Path) -> None:
    """The mount is not in the kernel's table any more by then."""
    images = create([tmp_path / "a.img", device.mountpoint / "b.img"], 4 * MIB, ONE)
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


def test_a_store_that_is_frozen_before_the_mount_is_left_out(device: Ext4, tmp_path: Path) -> None:
    """Opening and reading it works: the first write is what hangs, until it is thawed (P5)."""
    images = [device.mountpoint / "a.img", tmp_path / "b.img", tmp_path / "c.img"]
    create(images, 4 * MIB, "--vote-threshold=2")
    with device.frozen():
        disk = SetMount(images, tmp_path, "replica-timeout=1s")
        with disk:
            disk.expected_errors = [""]
            assert disk.replica(images[0])["state"] == "missing"
            with disk.file.open("r+b") as file:
                file.write(b"written without it")
    with SetMount(images, tmp_path) as disk:
        disk.wait_healthy()
    assert same(images)


def test_a_mount_that_is_given_up_keeps_no_other_store_from_the_next(
    device: Ext4, tmp_path: Path
) -> None:
    """What waits for the frozen one cannot end; all else of the mount is given back."""
    images = [device.mountpoint / "a.img", tmp_path / "b.img", tmp_path / "c.img"]
    create(images, 4 * MIB, "--vote-threshold=2")
    (mountpoint := tmp_path / "given up").mkdir()
    with device.frozen():
        waiting = quorumfs_in_background("mount", *images, mountpoint)
        assert waiting.stderr
        assert f"waiting for {images[0]}" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        waiting.communicate()
        assert waiting.returncode == ExitCode.INTERRUPTED
        with SetMount(images[1:], tmp_path):
            pass
    with SetMount(images, tmp_path) as disk:
        disk.wait_healthy()
    assert same(images)


def test_what_a_command_makes_after_it_was_given_up_disturbs_nobody(
    device: Ext4, tmp_path: Path
) -> None:
    """A thread cannot be taken back: until it has ended nobody else uses these files."""
    images = create([tmp_path / "a.img"], 4 * MIB, ONE)
    new = device.mountpoint / "new.img"
    with SetMount(images, tmp_path, f"{FIFO},replica-timeout=1s") as disk:
        with device.frozen():
            for word in ("does not answer", "an earlier command waits"):
                done = quorumfs("add", disk.mountpoint, new, check=False)
                assert done.returncode == 1
                assert word in done.stderr
        wait_until((device.mountpoint / "new.img.quorumfs").exists, "what is made late")
        wait_until(
            lambda: not quorumfs("add", disk.mountpoint, new, check=False).returncode, "its end"
        )
        disk.wait_healthy()
    with SetMount([*images, new], tmp_path) as disk:
        disk.wait_healthy()
    assert same([*images, new])


def test_one_that_was_removed_while_it_hung_is_added_again(device: Ext4, tmp_path: Path) -> None:
    """Its sidecar has the claim of this very mount still."""
    images = create([tmp_path / "a.img", device.mountpoint / "b.img"], 4 * MIB, ONE)
    with SetMount(images, tmp_path, f"{FIFO},replica-timeout=1s") as disk:
        disk.expected_errors = [""]
        disk.wait_healthy()
        with device.frozen():
            disk.file.write_bytes(b"b does not get this")
            done = quorumfs("remove", disk.mountpoint, images[1])
            assert "its files are closed when it does" in done.stdout
        quorumfs("add", "--overwrite", "--wait", disk.mountpoint, images[1])
        disk.wait_healthy()
    assert same(images)
