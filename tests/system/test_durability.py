"""Durability of single writes: what was acknowledged as durable is, and what was not costs nothing.

Every way to ask for a durable write is tried on every path that it can take through the kernel: the
buffered path (where the kernel itself sends an fsync), and the direct one (where the shim passes
the flag on, because the kernel does not).
"""

import contextlib
import errno
import fcntl
import itertools
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
from conftest import MakeImages
from support.command import wait_until
from support.engines import ENGINES, aligned
from support.faultfs import FaultFS, JournalEntry
from support.mounting import Mounted, make_set, quorumfs
from support.qemu import RawExport
from support.sets import opened
from support.sparse import PUNCH, fallocate

MIB = 1 << 20
BLOCK = 4096
NAMES = ["a.img", "b.img", "c.img"]

KINDS = {
    "O_SYNC": (os.O_SYNC, 0),
    "O_DSYNC": (os.O_DSYNC, 0),
    "RWF_SYNC": (0, os.RWF_SYNC),
    "RWF_DSYNC": (0, os.RWF_DSYNC),
}
"""How a program asks for a durable write: flags of open(2), and flags of one write."""

PATHS = {
    f"{engine} {'direct' if direct else 'buffered'}": (engine, direct)
    for engine, direct in itertools.product(ENGINES, (0, os.O_DIRECT))
}
EVERYTHING = list(itertools.product(KINDS, PATHS))


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultFS]:
    """Three replicas of 1 MiB, whose requests can be counted and fail."""
    with FaultFS(tmp_path) as faulty:
        for name in NAMES:
            faulty.backing(name).write_bytes(bytes(MIB))
        yield faulty


@contextlib.contextmanager
def mounted(faulty: FaultFS, directory: Path, options: str = "") -> Iterator[Mounted]:
    """Faults end before the unmount; what could not be flushed is durable before it, too.

    A set does that by itself, in its own time: until then a flush may fail.
    """
    replicas = [faulty.path(name) for name in NAMES]
    make_set(replicas)
    with Mounted(replicas, directory, options) as disk:
        yield disk
        faulty.clear()
        wait_until(lambda: outcome(disk, "O_SYNC", "psync direct") == "durable", "a flush")


def write(disk: Mounted, kind: str | None, path: str, data: bytes = b"w" * BLOCK) -> None:
    """One write at 0, durable in the way *kind*, or plain."""
    engine, direct = PATHS[path]
    open_flags, flags = KINDS[kind] if kind else (0, 0)
    fd = os.open(disk.file, os.O_RDWR | open_flags | direct)
    try:
        ENGINES[engine](fd, aligned(data), 0, flags)
    finally:
        os.close(fd)


def outcome(disk: Mounted, kind: str | None, path: str) -> str:
    try:
        write(disk, kind, path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "durable"


def fsyncs(faulty: FaultFS) -> list[int]:
    return [faulty.counters(name).fsyncs for name in NAMES]


def cost(faulty: FaultFS, disk: Mounted, kind: str | None, path: str) -> list[int]:
    """How many fsyncs each replica saw for one write."""
    before = fsyncs(faulty)
    write(disk, kind, path)
    return [after - earlier for after, earlier in zip(fsyncs(faulty), before, strict=True)]


# What a durable write costs, and what it says


def test_a_durable_write_is_one_flush(faulty: FaultFS, tmp_path: Path) -> None:
    """Each replica is flushed exactly once by the time it returns, whatever way it took."""
    with mounted(faulty, tmp_path) as disk:
        costs = {(kind, path): cost(faulty, disk, kind, path) for kind, path in EVERYTHING}
        assert costs == {way: [1, 1, 1] for way in EVERYTHING}


def test_a_plain_write_is_no_flush(faulty: FaultFS, tmp_path: Path) -> None:
    """Durability nobody asked for costs nothing, not even beside a handle with O_SYNC."""
    with mounted(faulty, tmp_path) as disk:
        durable = os.open(disk.file, os.O_RDWR | os.O_SYNC | os.O_DIRECT)
        try:
            costs = {path: cost(faulty, disk, None, path) for path in PATHS}
        finally:
            os.close(durable)
        assert costs == {path: [0, 0, 0] for path in PATHS}


def test_durable_though_o_direct_was_dropped_after_the_open(
    faulty: FaultFS, tmp_path: Path
) -> None:
    """The kernel goes by the answer to the open, and sends no fsync to such a handle."""
    with mounted(faulty, tmp_path) as disk:
        fd = os.open(disk.file, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
            before = fsyncs(faulty)
            os.pwrite(fd, b"w" * BLOCK, 0)
            assert all(after > one for after, one in zip(fsyncs(faulty), before, strict=True))
        finally:
            os.close(fd)


def test_a_discard_by_a_synchronous_opener_is_durable(faulty: FaultFS, tmp_path: Path) -> None:
    """As on ext4 and XFS."""
    with mounted(faulty, tmp_path) as disk:
        fd = os.open(disk.file, os.O_RDWR | os.O_SYNC)
        try:
            before = fsyncs(faulty)
            fallocate(fd, PUNCH, 0, BLOCK)
            assert all(after > one for after, one in zip(fsyncs(faulty), before, strict=True))
        finally:
            os.close(fd)


def test_with_the_option_sync_every_write_is_flushed(faulty: FaultFS, tmp_path: Path) -> None:
    """Plain writes too, once; a write that is durable already may cost a second flush."""
    with mounted(faulty, tmp_path, "sync") as disk:
        plain = {path: cost(faulty, disk, None, path) for path in PATHS}
        assert plain == {path: [1, 1, 1] for path in PATHS}
        durable = [min(cost(faulty, disk, kind, path)) for kind, path in EVERYTHING]
        assert min(durable) >= 1


def test_a_durable_write_fails_when_no_replica_can_flush(faulty: FaultFS, tmp_path: Path) -> None:
    """It gives EIO on every way; a plain write, which promises nothing, succeeds."""
    with mounted(faulty, tmp_path, "vote-threshold=2") as disk:
        for name in NAMES:
            faulty.inject(name, "fsync", errno=errno.EIO)
        durable = {(kind, path): outcome(disk, kind, path) for kind, path in EVERYTHING}
        assert durable == dict.fromkeys(EVERYTHING, "EIO")
        plain = {path: outcome(disk, None, path) for path in PATHS}
        assert plain == dict.fromkeys(PATHS, "durable")


@pytest.mark.parametrize(("failing", "expected"), [(1, "durable"), (2, "EIO")])
def test_a_durable_write_needs_the_threshold(
    failing: int, expected: str, faulty: FaultFS, tmp_path: Path
) -> None:
    """With a threshold of 2 of 3, one replica that cannot flush is no failure, and two are."""
    with mounted(faulty, tmp_path, "vote-threshold=2") as disk:
        for name in NAMES[:failing]:
            faulty.inject(name, "fsync", errno=errno.EIO)
        outcomes = {(kind, path): outcome(disk, kind, path) for kind, path in EVERYTHING}
        assert outcomes == dict.fromkeys(EVERYTHING, expected)


def test_with_the_option_sync_a_plain_write_tells_of_a_failed_flush(
    faulty: FaultFS, tmp_path: Path
) -> None:
    """On no path has it succeeded before it is durable."""
    with mounted(faulty, tmp_path, "vote-threshold=2,sync") as disk:
        for name in NAMES[:2]:
            faulty.inject(name, "fsync", errno=errno.EIO)
        assert {path: outcome(disk, None, path) for path in PATHS} == dict.fromkeys(PATHS, "EIO")


def test_flushes_that_qemu_fails(make_images: MakeImages, tmp_path: Path) -> None:
    """The same with replicas in a qemu-storage-daemon whose every flush fails."""
    rule = {"event": "none", "iotype": "flush", "errno": errno.EIO}
    with contextlib.ExitStack() as stack:
        replicas = [
            stack.enter_context(RawExport(image, tmp_path / f"export{n}", inject=[rule])).path
            for n, image in enumerate(make_images(2))
        ]
        with Mounted(replicas, tmp_path) as disk:
            disk.expected_errors = ["the last flush failed"]
            durable = {(kind, path): outcome(disk, kind, path) for kind, path in EVERYTHING}
            plain = {path: outcome(disk, None, path) for path in PATHS}
            unmounting = quorumfs("umount", disk.mountpoint, check=False)
        assert durable == dict.fromkeys(EVERYTHING, "EIO")
        assert plain == dict.fromkeys(PATHS, "durable")
        assert unmounting.returncode != 0
        assert "Input/output error" in unmounting.stderr


def test_concurrent_durable_writes_share_flushes(tmp_path: Path) -> None:
    """Of 16 at a time none returns before a flush that began after it, and none costs two."""
    with FaultFS(tmp_path, parallel=True) as faulty:
        for name in NAMES:
            faulty.backing(name).write_bytes(bytes(MIB))
        faulty.record()
        with (
            mounted(faulty, tmp_path) as disk,
            opened(disk.file, os.O_RDWR | os.O_DSYNC | os.O_DIRECT) as fd,
            ThreadPoolExecutor(16) as pool,
        ):
            list(pool.map(lambda n: os.pwrite(fd, b"x", n), range(160)))
            journals = faulty.journals()
    for journal in (journals[name] for name in NAMES):
        assert sum(entry.op == "write" for entry in journal) == 160
        assert 10 <= sum(entry.op == "fsync" for entry in journal) <= 160
        assert all(journal[n].op != "write" for n in range(last_durable(journal), len(journal)))


# What survives a power cut

SLOT = 16
SLOTS_PER_THREAD = 32


class Guest:
    """A thread's writes to its own slots, with numbers that only grow; and what it was promised."""

    def __init__(self, file: Path, thread: int) -> None:
        self.file = file
        self.slots = range(thread * SLOTS_PER_THREAD, (thread + 1) * SLOTS_PER_THREAD)
        self.random = random.Random(thread)
        self.number = 0
        self.written: dict[int, int] = {}
        """The last number that the disk has taken for each slot."""
        self.durable: dict[int, int] = {}
        """The last number that must survive; replaced as a whole, for who looks from outside."""

    def run(self, end: threading.Event) -> None:
        with (
            opened(self.file, os.O_RDWR) as buffered,
            opened(self.file, os.O_RDWR | os.O_DIRECT) as direct,
            opened(self.file, os.O_RDWR | os.O_DIRECT | os.O_DSYNC) as durable,
        ):
            ways = [
                (durable, 0),
                (direct, os.RWF_DSYNC),
                (buffered, os.RWF_DSYNC),
                *[(direct, 0), (buffered, 0)] * 3,
            ]
            while not end.is_set():
                with contextlib.suppress(OSError):  # no promise then
                    self.write(*self.random.choice(ways), synchronous_fd=durable)
                    if self.random.random() < 0.3:
                        os.fsync(buffered)
                        self.durable = dict(self.written)

    def write(self, fd: int, flags: int, synchronous_fd: int) -> None:
        self.number += 1
        slot = self.random.choice(self.slots)
        os.pwritev(fd, [self.number.to_bytes(SLOT)], slot * SLOT, flags)
        self.written[slot] = self.number
        if flags or fd == synchronous_fd:
            self.durable = {**self.durable, slot: self.number}


def last_durable(journal: list[JournalEntry]) -> int:
    """Up to which entry of *journal* everything is durable."""
    return max((entry.at for entry in journal if entry.op == "fsync"), default=0)


def after_power_cut(journal: list[JournalEntry], rng: random.Random) -> bytearray:
    """What a replica may hold then: all that was synced, and some of the rest.

    What an fsync that failed should have written is lost for good, as the kernel drops it: no
    later fsync brings it back.
    """
    image = bytearray(MIB)
    lost: set[int] = set()
    durable = 0
    for index, entry in enumerate(journal):
        if entry.op == "fsync":
            durable = max(durable, entry.at)
        elif entry.op == "failed fsync":
            lost.update(range(durable, index))
    for index, entry in enumerate(journal):
        survives = index < durable and index not in lost
        if entry.op == "write" and (survives or rng.random() < 0.1):
            data = bytes.fromhex(entry.data)
            image[entry.at : entry.at + len(data)] = data
    return image


FAULTS: dict[int, list[tuple[str, Literal["write", "fsync"], float]]] = {
    1: [(name, "fsync", 0.15) for name in NAMES],
    2: [("a.img", "fsync", 0.3), ("c.img", "write", 0.2)],
    3: [("a.img", "fsync", 0.2)],
}
"""For each threshold what fails how often: enough for some requests to fail."""


@pytest.mark.parametrize("threshold", FAULTS)
def test_what_was_durable_survives_a_power_cut(threshold: int, tmp_path: Path) -> None:
    """At whatever moment the power fails: every acknowledged durable write is on the threshold.

    Replicas keep failing flushes and writes meanwhile.
    """
    end = threading.Event()
    rng = random.Random(threshold)
    promised = 0
    with FaultFS(tmp_path, parallel=True) as faulty, contextlib.ExitStack() as stack:
        for name in NAMES:
            faulty.backing(name).write_bytes(bytes(MIB))
        faulty.record()
        disk = stack.enter_context(mounted(faulty, tmp_path, f"vote-threshold={threshold}"))
        for name, op, probability in FAULTS[threshold]:
            faulty.inject(name, op, probability=probability, errno=errno.EIO)
        pool = stack.enter_context(ThreadPoolExecutor(4))
        guests = [Guest(disk.file, thread) for thread in range(4)]
        running = [pool.submit(guest.run, end) for guest in guests]
        stack.callback(end.set)
        for cut in range(1, 9):
            faulty.wait_for(lambda counters, cut=cut: counters.writes >= 50 * cut, "b.img")  # type: ignore[misc]
            durable = {slot: n for guest in guests for slot, n in guest.durable.items()}
            journals = faulty.journals()  # later than the promises: what came since is no harm
            images = [after_power_cut(journals[name], rng) for name in NAMES]
            for slot, number in durable.items():
                at = slot * SLOT
                found = [int.from_bytes(image[at : at + SLOT]) for image in images]
                holders = sum(each >= number for each in found)
                assert holders >= threshold, f"cut {cut}: slot {slot}: {number}, found {found}"
            promised += len(durable)
        end.set()
        for each in running:
            each.result()
    assert promised >= 8
