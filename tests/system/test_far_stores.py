"""Stores that are far, or crawl: what a guest pays for them, and what is told."""

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from conftest import MakeImages
from support.command import refused, wait_until
from support.faultfs import FaultFS
from support.faultydisk import DirectFile
from support.mounting import make_set, quorumfs
from support.sets import SetMount

BLOCK = 4096
CONTENT = b"".join(b"%015d\n" % number for number in range(64 * BLOCK // 16))
FAR_S = 0.3


class FarDisk(NamedTuple):
    """A mounted set of replicas a.img, b.img, … on a file system that can be slow."""

    fs: FaultFS
    mounted: SetMount
    file: DirectFile


@contextmanager
def far_disk(directory: Path, replicas: int, options: str) -> Iterator[FarDisk]:
    with FaultFS(directory) as fs:
        names = [f"{letter}.img" for letter in "abc"[:replicas]]
        for name in names:
            fs.backing(name).write_bytes(CONTENT)
        paths = [fs.path(name) for name in names]
        make_set(paths)
        with SetMount(paths, directory, options) as mounted, DirectFile(mounted.file) as file:
            try:
                yield FarDisk(fs, mounted, file)
            finally:
                fs.clear()


def read_all(disk: FarDisk) -> float:
    """Read the disk block by block; how long (seconds) the slowest read took."""
    longest = 0.0
    for offset in range(0, len(CONTENT), BLOCK):
        began = time.monotonic()
        assert disk.file.read(offset, BLOCK) == CONTENT[offset : offset + BLOCK]
        longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.parametrize("pattern", ["quorum,vote-threshold=2", "fifo,vote-threshold=1"])
def test_a_far_replica_that_is_write_mostly_is_not_read(tmp_path: Path, pattern: str) -> None:
    options = f"read-pattern={pattern},write-mostly=a.img"
    with far_disk(tmp_path, 3, options) as disk:
        disk.fs.inject("a.img", "read", delay=FAR_S)
        assert read_all(disk) < FAR_S
        far, *near = disk.mounted.status()["replicas"]
        assert (far["reads"], far["write_mostly"], near[0]["write_mostly"]) == (0, True, False)
        disk.fs.inject("b.img", "read", errno=errno.EIO)
        if "fifo" in pattern:
            disk.fs.inject("c.img", "read", errno=errno.EIO)
        assert disk.file.read(0, BLOCK) == CONTENT[:BLOCK]
        assert disk.mounted.status()["replicas"][0]["reads"] > 0


def test_a_read_of_a_store_that_suddenly_crawls_is_answered_by_the_next(tmp_path: Path) -> None:
    options = "read-pattern=fifo,vote-threshold=1"
    with far_disk(tmp_path, 2, options) as disk:
        for _ in range(4):
            read_all(disk)
        disk.fs.inject("a.img", "read", delay=5.0)
        assert read_all(disk) < 2.0
        crawling = disk.mounted.status()["replicas"][0]
        assert crawling["state"] == "current"
        assert crawling["latency"]["read"]["p50_us"] < 1_000_000


def test_a_slow_store_is_told(tmp_path: Path) -> None:
    """The disk is healthy, and who asks learns what every request waits for."""
    with far_disk(tmp_path, 3, "vote-threshold=3") as disk:
        disk.fs.inject("c.img", "read", delay=0.05)
        read_all(disk)
        disk.mounted.wait(lambda status: status["replicas"][2]["slow"], "the comparison")
        status = disk.mounted.status()
        (slow,) = status["replicas"][2]["slow"]
        assert status["state"] == "healthy"
        assert (slow["operation"], slow["p50_us"] >= 50_000) == ("read", True)
        shown = quorumfs("status", disk.mounted.mountpoint).stdout
        assert "write-mostly=" in shown
        assert [event["replica"] for event in disk.mounted.log() if "p50_us" in event] == [
            str(disk.fs.path("c.img"))
        ]


def test_the_mark_is_set_and_taken_back_in_use(tmp_path: Path) -> None:
    with far_disk(tmp_path, 3, "vote-threshold=2") as disk:
        read_all(disk)
        before = disk.mounted.status()["replicas"][0]["reads"]
        assert before > 0
        quorumfs("set", disk.mounted.mountpoint, "write-mostly=a.img")
        read_all(disk)
        far = disk.mounted.status()["replicas"][0]
        assert (far["reads"], far["write_mostly"]) == (before, True)
        quorumfs("set", disk.mounted.mountpoint, "write-mostly=none")
        read_all(disk)
        assert disk.mounted.status()["replicas"][0]["reads"] > before


def test_the_fastest_is_read(tmp_path: Path) -> None:
    options = "read-pattern=latency,vote-threshold=1"
    with far_disk(tmp_path, 2, options) as disk:
        disk.fs.inject("a.img", "read", delay=0.03)
        for _ in range(4):
            read_all(disk)
        slow, fast = (one["reads"] for one in disk.mounted.status()["replicas"])
        assert slow < 20 < fast
        shown = disk.mounted.status()["replicas"][0]["latency"]
        assert 30_000 <= shown["read"]["p50_us"] <= shown["read"]["max_us"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("write-mostly=x.img", "x.img is no replica of this mount"),
        ("write-mostly=a.img:b.img", "all but one at most"),
        ("write-mostly=", "with a colon between them"),
        ("write-mostly=a.img,blkverify,vote-threshold=2", "what all replicas answer"),
    ],
)
def test_a_mark_that_makes_no_sense_is_refused(
    make_images: MakeImages, mountpoint: Path, options: str, told: str
) -> None:
    assert told in refused(["-o", options, *make_images(2)], mountpoint, exit_code=4)


def test_a_vote_does_not_wait_for_the_far_one(tmp_path: Path) -> None:
    """Which is compared all the same: what has rotted there is told, and repaired."""
    with far_disk(tmp_path, 3, "vote-threshold=2,rewrite-corrupted") as disk:
        backing = disk.fs.backing("a.img")
        with backing.open("r+b") as file:
            file.seek(BLOCK)
            file.write(b"rot!" * (BLOCK // 4))
        disk.fs.inject("a.img", "read", delay=FAR_S)
        assert read_all(disk) < FAR_S
        rotten = disk.mounted.replicas[0]

        def found() -> object:
            """It is compared in samples: read on, until the far one has had a turn."""
            assert disk.file.read(BLOCK, BLOCK) == CONTENT[BLOCK : 2 * BLOCK]
            return disk.mounted.status()["replicas"][0]["errors"]["mismatch"]

        wait_until(found, "the comparison")
        disk.mounted.wait(lambda status: status["replicas"][0]["copied_bytes"], "the repair")
        assert disk.mounted.replica(rotten)["state"] == "current"
        assert backing.read_bytes()[BLOCK : 2 * BLOCK] == CONTENT[BLOCK : 2 * BLOCK]


ACK = "vote-threshold=2,write-ack=threshold,behind-max=50ms"


def write_all(disk: FarDisk, content: bytes) -> float:
    """Write the disk block by block, and flush it; how long (seconds) that took."""
    began = time.monotonic()
    for offset in range(0, len(content), BLOCK):
        disk.file.write(offset, content[offset : offset + BLOCK])
    disk.file.flush()
    return time.monotonic() - began


@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_who_is_far_behind_is_ejected_and_caught_up(
    tmp_path: Path, operation: Literal["write", "fsync"]
) -> None:
    """The guest pays for it once, and what was acknowledged is on record as missed (P1)."""
    with far_disk(tmp_path, 3, ACK) as disk:
        write_all(disk, CONTENT)
        disk.fs.inject("c.img", operation, delay=2.0)
        written = CONTENT[BLOCK:] + CONTENT[:BLOCK]
        assert write_all(disk, written) < 2.0
        far = disk.mounted.replicas[2]
        assert disk.mounted.replica(far)["state"] != "current"
        assert disk.file.read(0, BLOCK) == written[:BLOCK]
        disk.fs.clear()
        disk.mounted.wait_healthy()
        assert disk.fs.backing("c.img").read_bytes() == written


def test_waiting_for_all_is_set_and_taken_back_in_use(tmp_path: Path) -> None:
    with far_disk(tmp_path, 3, ACK) as disk:
        quorumfs("set", disk.mounted.mountpoint, "write-ack=all")
        disk.fs.inject("c.img", "write", delay=FAR_S)
        disk.file.write(0, CONTENT[:BLOCK])
        assert disk.mounted.states() == ["current"] * 3
        quorumfs("set", disk.mounted.mountpoint, "write-ack=threshold,behind-max=10ms")
        disk.file.write(0, CONTENT[:BLOCK])
        assert disk.mounted.states()[2] != "current"
        disk.fs.clear()
        disk.mounted.wait_healthy()
