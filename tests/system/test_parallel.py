"""Many requests at once: how many reach the replicas together, and that everybody sees the same."""

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import mounting
from support.command import wait_until
from support.engines import aligned
from support.faultfs import FaultFS
from support.mounting import Mounted, make_set
from support.sets import opened

MIB = 1 << 20
BLOCK = 4096
NAMES = ["a.img", "b.img", "c.img"]


@pytest.fixture
def parallel(tmp_path: Path) -> Iterator[FaultFS]:
    """Three replicas of 4 MiB to which writes can go together."""
    with FaultFS(tmp_path, parallel=True) as parallel:
        for name in NAMES:
            parallel.backing(name).write_bytes(bytes(4 * MIB))
        yield parallel


@pytest.fixture
def disk(parallel: FaultFS, tmp_path: Path) -> Iterator[Mounted]:
    replicas = [parallel.path(name) for name in NAMES]
    make_set(replicas)
    with Mounted(replicas, tmp_path) as disk:
        yield disk
        parallel.clear()


# Writes


def test_direct_writes_go_to_the_replicas_together(disk: Mounted, parallel: FaultFS) -> None:
    """Of 32 threads that write with O_DIRECT at least 16 have their write at each replica."""
    for name in NAMES:
        parallel.hang(name, "write")
    with opened(disk.file, os.O_RDWR | os.O_DIRECT) as fd, ThreadPoolExecutor(32) as pool:
        try:
            blocks = [aligned(bytes([n + 1]) * BLOCK) for n in range(32)]
            writes = [pool.submit(os.pwritev, fd, [blocks[n]], n * BLOCK) for n in range(32)]
            for name in NAMES:
                parallel.wait_for(lambda counters: counters.in_flight >= 16, name)
        finally:
            parallel.clear()
        assert [write.result() for write in writes] == [BLOCK] * 32
    expected = b"".join(bytes([n + 1]) * BLOCK for n in range(32))
    for name in NAMES:
        assert parallel.backing(name).read_bytes()[: len(expected)] == expected


def test_without_the_shim_direct_writes_go_one_by_one(
    parallel: FaultFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the shim is for (and that the test above sees the difference)."""
    monkeypatch.setenv("QUORUMFS_NO_SHIM", "1")
    parallel.inject("a.img", "write", delay=0.005)
    with (
        Mounted([parallel.path("a.img")], tmp_path) as disk,
        opened(disk.file, os.O_RDWR | os.O_DIRECT) as fd,
        ThreadPoolExecutor(32) as pool,
    ):
        list(pool.map(lambda n: os.pwritev(fd, [aligned(bytes(BLOCK))], n * BLOCK), range(32)))
    assert parallel.counters("a.img").writes == 32
    assert parallel.counters("a.img").in_flight_max == 1


def test_parallel_writes_of_the_same_blocks_leave_equal_replicas(
    disk: Mounted, parallel: FaultFS
) -> None:
    """Whichever of overlapping writes comes last, it is the same one on every replica.

    And none is torn: a block holds what one of them wrote.
    """
    for seed, name in enumerate(NAMES):  # replicas of different and changing speed
        parallel.inject(name, "write", probability=0.3, seed=seed, delay=0.003)

    def keep_writing(thread: int) -> None:
        buffer = aligned(bytes([thread + 1]) * 4 * BLOCK)
        with opened(disk.file, os.O_RDWR | os.O_DIRECT) as fd:
            for step in range(20):
                os.pwritev(fd, [buffer], (thread + step) % 8 * BLOCK)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(keep_writing, range(16)))
    first, *others = [parallel.backing(name).read_bytes() for name in NAMES]
    assert others == [first, first]
    blocks = [first[start : start + BLOCK] for start in range(0, 11 * BLOCK, BLOCK)]
    assert [len(set(block)) for block in blocks] == [1] * 11
    assert all(block[0] for block in blocks)


# max-background

COUNTING = """
import sys, quorumfs.cli, quorumfs.disk.disk
real = quorumfs.disk.disk.Disk.read
now = most = 0
async def counted(self, *arguments):
    global now, most
    now += 1
    if now > most:
        most = now
        with open({path!r}, "w") as file:
            file.write(str(most))
    try:
        return await real(self, *arguments)
    finally:
        now -= 1
if "mount" in sys.argv:
    quorumfs.disk.disk.Disk.read = counted
quorumfs.cli.main()
"""
"""The command, writing the largest number of reads it ever had in hand to a file.

At a replica it cannot be seen: a replica has fewer threads than that.
"""


@pytest.mark.parametrize(
    ("options", "expected"), [("", 64), ("max-background=100", 100), ("max-background=5", 5)]
)
@pytest.mark.parametrize("engine", ["libaio", "io_uring"])
def test_asynchronous_requests_in_flight(
    engine: str,
    options: str,
    expected: int,
    parallel: FaultFS,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernel sends as many as max-background says, 64 if it says nothing (libfuse: 12)."""
    count = tmp_path / "most"
    program = COUNTING.format(path=str(count))
    monkeypatch.setattr(mounting, "QUORUMFS", [sys.executable, "-c", program])

    def most() -> int:
        return int((count.exists() and count.read_text()) or 0)

    with Mounted([parallel.path("a.img")], tmp_path, options) as disk:
        parallel.hang("a.img", "read")
        job = ["--rw=randread", "--bs=4k", "--direct=1", "--iodepth=128", "--io_size=1m"]
        command = ["fio", "--name=job", f"--filename={disk.file}", f"--ioengine={engine}", *job]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path) as process:
            try:
                wait_until(lambda: most() >= expected, f"{expected} reads in flight")
            finally:
                parallel.clear()
        assert process.returncode == 0
    assert most() == expected


# Coherence

OBSERVER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
mapped = mmap.mmap(fd, 2 * 4096, prot=mmap.PROT_READ)
for line in sys.stdin:
    expected = int(line)
    seen = {mapped[0], mapped[8191], os.pread(fd, 1, 0)[0], os.pread(fd, 1, 8191)[0]}
    print("yes" if seen == {expected} else seen, flush=True)
"""


def test_a_direct_write_is_seen_through_caches_at_once(disk: Mounted) -> None:
    """A mapping and buffered reads in another process see it as soon as it has returned.

    That process has the pages cached all the time, and others fill the cache as fast as they can.
    """
    command = [sys.executable, "-c", OBSERVER, str(disk.file)]
    end = threading.Event()

    def keep_caching() -> None:
        with (
            opened(disk.file, os.O_RDONLY) as fd,
            mmap.mmap(fd, MIB, prot=mmap.PROT_READ) as mapped,
        ):
            while not end.is_set():
                os.pread(fd, 2 * BLOCK, 0)
                mapped[BLOCK]

    with (
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
        opened(disk.file, os.O_RDWR | os.O_DIRECT) as fd,
        ThreadPoolExecutor(2) as pool,
    ):
        assert other.stdin is not None
        assert other.stdout is not None
        caching = [pool.submit(keep_caching) for _ in range(2)]
        try:
            for step in range(300):
                os.pwritev(fd, [aligned(bytes([step % 256]) * 2 * BLOCK)], 0)
                print(step % 256, file=other.stdin, flush=True)
                assert other.stdout.readline() == "yes\n", f"step {step}"
        finally:
            end.set()
            other.stdin.close()
        for each in caching:
            each.result()


def test_a_long_direct_write_leaves_no_old_page_behind(disk: Mounted, parallel: FaultFS) -> None:
    """Pages that somebody reads while it is on its way show the new data when it has returned.

    A write of 2 MiB is two requests, and the first of them waits while the pages behind are read.
    """
    for name in NAMES:
        parallel.inject(name, "write", end=1, hang=True)
    with (
        opened(disk.file, os.O_RDONLY) as reader,
        opened(disk.file, os.O_RDWR | os.O_DIRECT) as writer,
        mmap.mmap(reader, 4 * MIB, prot=mmap.PROT_READ) as mapped,
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            write = pool.submit(os.pwritev, writer, [aligned(b"n" * 2 * MIB)], 0)
            for name in NAMES:
                parallel.wait_for(lambda counters: counters.writes > 0, name)
            assert os.pread(reader, 1, MIB + MIB // 2) == mapped[MIB + MIB // 4 :][:1] == b"\0"
        finally:
            parallel.clear()
        assert write.result() == 2 * MIB
        assert os.pread(reader, 2 * MIB, 0) == mapped[: 2 * MIB] == b"n" * 2 * MIB


def test_what_was_stored_in_a_mapping_is_read_directly_after_msync(disk: Mounted) -> None:
    """And again after direct writes beside it, by processes that each own other pages."""

    def keep_storing(owner: int) -> None:
        offset = owner * 2 * BLOCK
        with (
            opened(disk.file, os.O_RDWR) as buffered,
            opened(disk.file, os.O_RDWR | os.O_DIRECT) as direct,
            mmap.mmap(buffered, 4 * MIB) as mapped,
        ):
            got = mmap.mmap(-1, BLOCK)
            for step in range(40):
                stored, written = bytes([step]) * BLOCK, bytes([255 - step]) * BLOCK
                mapped[offset : offset + BLOCK] = stored
                mapped.flush(offset, BLOCK)
                os.preadv(direct, [got], offset)
                assert got[:] == stored, f"step {step}: stored, not read"
                os.pwritev(direct, [aligned(written)], offset)
                assert mapped[offset : offset + BLOCK] == written, f"step {step}: written"

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(keep_storing, range(8)))
