"""What QEMU's own tests of its quorum driver ask for (iotests 081 and 148), asked of a mount.

081 is about votes, repairs and blkverify, with qemu-io as the client; 148 about events.
"""

import errno
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeImages
from support.faultydisk import FaultyDisk, answer
from support.mounting import Mounted, as_qemu, quorumfs

SIZE = 10 << 20
SECTOR = 512
EVENT = dict[str, Any]


def qemu_io(file: Path, *commands: str) -> str:
    """What qemu-io says to *commands* on a raw *file*, read and written past the page cache."""
    arguments = [word for command in commands for word in ("-c", command)]
    return subprocess.run(
        ["qemu-io", "-f", "raw", "-t", "none", *arguments, str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    ).stdout


def fill(file: Path, pattern: int) -> None:
    said = qemu_io(file, f"write -P {pattern} 0 {SIZE}")
    assert f"wrote {SIZE}/{SIZE} bytes" in said, said


def holds(file: Path, pattern: int) -> bool:
    """Whether the whole file can be read and has only this byte."""
    said = qemu_io(file, f"read -P {pattern} 0 {SIZE}")
    return f"read {SIZE}/{SIZE} bytes" in said and "verification failed" not in said


class Sequence081:
    """One directory of replicas that is mounted anew for each step, as 081 opens it anew."""

    def __init__(self, images: list[Path], directory: Path) -> None:
        self.images = images
        self._directory = directory
        self._steps = count()

    @contextmanager
    def mounted(self, options: str, replicas: int = 3) -> Iterator[Mounted]:
        directory = self._directory / f"step{next(self._steps)}"
        directory.mkdir()
        with Mounted(self.images[:replicas], directory, as_qemu(options)) as mounted:
            yield mounted


def test_081(make_images: MakeImages, tmp_path: Path) -> None:
    """Two of three correct the third and name it; rewrite-corrupted mends it; one is not enough."""
    steps = Sequence081(make_images(3, SIZE), tmp_path)
    a, b, c = steps.images

    with steps.mounted("vote-threshold=2") as disk:
        fill(disk.file, 0x32)
    assert [holds(image, 0x32) for image in steps.images] == [True, True, True]

    fill(b, 0x42)
    with steps.mounted("vote-threshold=2") as disk:
        assert holds(disk.file, 0x32)
        bad = disk.wait_for_events("QUORUM_REPORT_BAD")
        assert {(event["node-name"], event["type"]) for event in bad} == {(str(b), "read")}
        assert bad[0]["sector-num"] == 0
        assert "error" not in bad[0]  # it answered, with other data
        assert disk.events("QUORUM_FAILURE") == []
    assert holds(b, 0x42)

    with steps.mounted("vote-threshold=2,rewrite-corrupted=on") as disk:
        assert holds(disk.file, 0x32)
        repaired = disk.wait_for_events("MISMATCH_REPAIRED")
        assert {event["replica"] for event in repaired} == {str(b)}
    assert [holds(image, 0x32) for image in steps.images] == [True, True, True]

    fill(a, 0x41)
    fill(b, 0x42)
    before = [image.read_bytes() for image in steps.images]
    with steps.mounted("vote-threshold=2,rewrite-corrupted=on") as disk:
        assert "read failed: Input/output error" in qemu_io(disk.file, f"read -P 0x32 0 {SIZE}")
        (failure,) = disk.wait_for_events("QUORUM_FAILURE")[:1]
        assert (failure["reference"], failure["sector-num"]) == (str(disk.mountpoint), 0)
    assert [image.read_bytes() for image in steps.images] == before
    assert holds(c, 0x32)


def test_081_blkverify(make_images: MakeImages, tmp_path: Path) -> None:
    """blkverify fails at any difference and names its place; it needs two replicas and both votes.

    The process lives on: QEMU's exits.
    """
    steps = Sequence081(make_images(3, SIZE), tmp_path)
    a, b, _ = steps.images
    fill(a, 0x32)
    fill(b, 0x32)
    with b.open("r+b") as image:
        image.seek(70_001)
        image.write(b"?")
    with steps.mounted("vote-threshold=2,blkverify=on", replicas=2) as disk:
        disk.expected_errors.append("blkverify: the replicas differ at offset 70001")
        assert "read failed: Input/output error" in qemu_io(disk.file, f"read 0 {SIZE}")
        logged = disk.wait_for_events("LOG", lambda _: any("70001" in str(r) for r in disk.log()))
        assert [record["level"] for record in logged if "blkverify" in record["message"]]
        said = qemu_io(disk.file, "read -P 0x32 0 68k", "write -P 0x32 68k 4k")
        assert "failed" not in said
        assert holds(disk.file, 0x32)

    for refused, replicas in (("vote-threshold=2", 3), ("vote-threshold=1", 2)):
        mountpoint = tmp_path / "refused"
        mountpoint.mkdir(exist_ok=True)
        options = f"blkverify=on,{refused}"
        done = quorumfs("mount", "-o", options, *steps.images[:replicas], mountpoint, check=False)
        assert done.returncode == 4
        assert "2 replicas and vote-threshold=2" in done.stderr


def told(events: list[EVENT], replica: Path | None = None) -> int:
    """How many happenings the events of a replica stand for: those told and those left out."""
    return sum(
        1 + event.get("dropped", 0)
        for event in events
        if replica is None or event["node-name"] == str(replica)
    )


def seconds_between(events: list[EVENT]) -> list[float]:
    times = [datetime.fromisoformat(event["time"]) for event in events]
    return [(later - earlier).total_seconds() for earlier, later in pairwise(times)]


@pytest.mark.parametrize("pattern", ["quorum", "fifo"])
def test_148(tmp_path: Path, pattern: str) -> None:
    """A replica that fails reads is told at once, then once a second, with the number left out.

    Fifo asks only the first replica as long as it answers, so nobody hears of the others.
    """
    options = f"read-pattern={pattern},vote-threshold=2"
    with FaultyDisk(tmp_path, [bytes(1 << 20)] * 3, as_qemu(options)) as disk:
        replicas = [disk.fs.path(name) for name in disk.names]
        for index, name in enumerate(disk.names):
            at = (10 + index) * SECTOR
            disk.fs.inject(name, "read", start=at, end=at + SECTOR, errno=errno.EIO)

        def fail(sector: int) -> None:
            assert disk.file.read(sector * SECTOR, SECTOR) == bytes(SECTOR)

        def bad(enough: int) -> list[EVENT]:
            """The first replica's events, once they stand for *enough* failures."""
            events = disk.mounted.wait_for_events(
                "QUORUM_REPORT_BAD", lambda events: told(events, replicas[0]) >= enough
            )
            return [event for event in events if event["node-name"] == str(replicas[0])]

        fail(10)
        (first,) = bad(1)
        expected = {"type": "read", "sector-num": 10, "sectors-count": 1}
        assert {key: first[key] for key in expected} == expected
        assert first["error"] == "Input/output error"
        assert "dropped" not in first

        for _ in range(3):
            fail(10)
        events = bad(4)
        assert min(seconds_between(events)) >= 0.99  # the times are cut to milliseconds

        fail(11)
        fail(12)
        fail(10)
        bad(5)  # the events are told in their order, so those of the others are there by now
        others = [
            (event["node-name"], event["sector-num"])
            for event in disk.mounted.events("QUORUM_REPORT_BAD")
            if event["node-name"] != str(replicas[0])
        ]
        assert others == ([(str(replicas[1]), 11), (str(replicas[2]), 12)] * (pattern == "quorum"))
        assert disk.mounted.events("QUORUM_FAILURE") == []


@pytest.mark.parametrize("unmounted_at_once", [False, True])
def test_148_no_trouble_is_silent(tmp_path: Path, unmounted_at_once: bool) -> None:
    """When it ends, the events told and the counts of those left out add up to what happened."""
    with FaultyDisk(tmp_path, [bytes(1 << 20)] * 3, as_qemu("vote-threshold=2")) as disk:
        replicas = [disk.fs.path(name) for name in disk.names]
        disk.fs.inject("a.img", "read", errno=errno.EIO, count=20)
        disk.fs.inject("b.img", "read", errno=errno.EIO, count=10)
        for number in range(25):
            gave = answer(disk.file.read, number * SECTOR, SECTOR)
            assert gave == ("EIO" if number < 10 else bytes(SECTOR))

        def complete(_: object) -> bool:
            bad = disk.mounted.events("QUORUM_REPORT_BAD")
            return [told(bad, replica) for replica in replicas] == [20, 10, 0]

        if not unmounted_at_once:
            disk.mounted.wait_for_events("QUORUM_REPORT_BAD", complete)
            disk.mounted.wait_for_events("QUORUM_FAILURE", lambda events: told(events) == 10)
    assert complete(None), disk.mounted.log()
    failures = disk.mounted.events("QUORUM_FAILURE")
    assert told(failures) == 10
    assert [failures[0]["sector-num"], failures[-1]["sector-num"]] == [0, 9]
