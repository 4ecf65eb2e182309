"""Requests served in the loop: what it is for, and what must not come of it."""

import os
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.command import wait_until
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.oracle import Oracle, Writers
from support.programs import loop_device, run
from support.sets import BLOCK, MIB, SetMount, create, opened, same

ONE = "--vote-threshold=1"
FIFO = "read-pattern=fifo,vote-threshold=1"
SIZE = 8 * MIB
DELAY_S = 0.05


def processor_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def waits_of_threads(pid: int) -> int:
    """How often all threads but the first have waited: at least once for each I/O they did."""
    statuses = [
        path.read_text()
        for path in Path(f"/proc/{pid}/task").glob("[0-9]*/status")
        if path.parent.name != str(pid)
    ]
    waits = [
        re.search(r"^voluntary_ctxt_switches:\s*(\d+)", text, re.MULTILINE) for text in statuses
    ]
    return sum(int(found[1]) for found in waits if found)


REQUESTS = 200


@pytest.mark.parametrize(("inline", "pattern"), [("on", "fifo"), ("on", "quorum"), ("off", "fifo")])
def test_threads_are_needed_only_without_inline_io(
    inline: str, pattern: str, tmp_path: Path
) -> None:
    images = create([tmp_path / f"{letter}.img" for letter in "abc"], SIZE)
    options = f"read-pattern={pattern},inline-io={inline}"
    with SetMount(images, tmp_path, options) as disk, opened(disk.file) as fd:
        os.pwrite(fd, bytes(BLOCK), 0)  # the first touch has its marks written by threads
        before, waits = disk.status(), waits_of_threads(disk.pid)
        data = os.urandom(BLOCK)
        for _ in range(REQUESTS):
            os.pwrite(fd, data, 0)
            assert os.pread(fd, BLOCK, 0) == data
        after, waits = disk.status(), waits_of_threads(disk.pid) - waits
        if inline == "on":
            assert waits < REQUESTS / 2, "now and then a busy machine makes a file look slow"
        else:
            assert waits >= 2 * REQUESTS
        reads = [
            now["reads"] - then["reads"]
            for now, then in zip(after["replicas"], before["replicas"], strict=True)
        ]
        assert reads == ([REQUESTS] * 3 if pattern == "quorum" else [REQUESTS, 0, 0])
    assert same(images)


def test_an_idle_disk_uses_no_processor(tmp_path: Path) -> None:
    images = create([tmp_path / "a.img", tmp_path / "b.img"], SIZE)
    with SetMount(images, tmp_path, FIFO) as disk:
        with opened(disk.file) as fd:
            for number in range(500):  # a series of requests, after which the loop looks for more
                os.pwrite(fd, bytes(BLOCK), number * BLOCK)
        used = processor_s(disk.pid)
        time.sleep(5)  # what is measured is this time
        assert processor_s(disk.pid) - used < 0.25


class SlowDisk:
    """An ext4 whose every write waits for its device, and a device that gets slow."""

    def __init__(self, faulty: FaultFS, directory: Path) -> None:
        self._faulty = faulty
        self.directory = directory

    def get_slow(self) -> None:
        """From now on every request to the device takes `DELAY_S`."""
        self._faulty.inject("device", "any", delay=DELAY_S)

    def recover(self) -> None:
        """It is as fast as before."""
        self._faulty.clear("device")


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[SlowDisk]:
    with ExitStack() as stack:
        faulty = stack.enter_context(FaultFS(tmp_path, parallel=True))
        with faulty.backing("device").open("wb") as file:
            file.truncate(64 * MIB)
        run("mkfs.ext4", "-q", "-m", "0", faulty.backing("device"))
        device = stack.enter_context(loop_device(faulty.path("device")))
        stack.enter_context(mounted_sync(device, tmp_path / "slow"))
        stack.callback(faulty.clear)
        yield SlowDisk(faulty, tmp_path / "slow")


@contextmanager
def mounted_sync(device: Path, directory: Path) -> Iterator[None]:
    directory.mkdir()
    run("mount", "-o", "sync", device, directory)
    try:
        yield
    finally:
        run("umount", directory)


def test_a_local_replica_that_gets_slow_leaves_the_loop(
    slow_disk: SlowDisk, tmp_path: Path
) -> None:
    """P5: it may hold up the loop for one I/O, and then it has threads again."""
    images = create([tmp_path / "a.img", slow_disk.directory / "b.img"], SIZE, ONE)
    with SetMount(images, tmp_path, FIFO) as disk:
        oracle = Oracle(range(0, SIZE // BLOCK, 41))
        writers = Writers(oracle, disk.file, threads=4)
        try:
            wait_until(lambda: oracle.acknowledgements > 200, "some writes")
            slow_disk.get_slow()
            slow = oracle.acknowledgements
            wait_until(lambda: oracle.acknowledgements > slow + 20, "writes on a slow disk")
            answers = []
            for _ in range(100):
                asked = time.monotonic()
                disk.status()
                answers.append(time.monotonic() - asked)
            assert statistics.median(answers) < DELAY_S / 2, "status waits for the slow disk"
        finally:
            slow_disk.recover()
            writers.stop()
        assert not writers.errors
        disk.wait_healthy()
        with opened(disk.file) as fd:
            oracle.look(fd)
    assert same(images)


def test_requests_that_nobody_waits_for_any_more_do_no_harm(tmp_path: Path) -> None:
    """Readers and writers are killed in the middle of their requests, again and again."""
    images = create([tmp_path / "a.img", tmp_path / "b.img"], SIZE)
    with SetMount(images, tmp_path, FIFO) as disk:
        for _ in range(20):
            victims = [
                subprocess.Popen(
                    ["dd", *ends, "bs=64k", "count=128", *flags],
                    stderr=subprocess.DEVNULL,
                )
                for ends, flags in (
                    (["if=/dev/zero", f"of={disk.file}"], ["conv=notrunc", "oflag=direct"]),
                    ([f"if={disk.file}", "of=/dev/null"], ["iflag=direct"]),
                    (["if=/dev/zero", f"of={disk.file}"], ["conv=notrunc"]),
                    ([f"if={disk.file}", "of=/dev/null"], []),
                )
            ]
            for victim in victims:
                victim.kill()
                victim.wait()
        with opened(disk.file) as fd:
            os.pwrite(fd, b"w" * BLOCK, 0)
            assert os.pread(fd, BLOCK, 0) == b"w" * BLOCK
        quorumfs("umount", disk.mountpoint)
    assert same(images)
