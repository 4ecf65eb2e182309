"""Much work at once through a real mount: nothing lost, nothing mixed up, little memory."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import MakeImages
from support.command import seconds, wait_until
from support.mounting import Mounted, quorumfs
from support.programs import loop_device, run
from support.sets import create, named, tmpfs

MIB = 1 << 20

POOL = random.Random(0).randbytes(4 * MIB)
"""Where written data is cut from: any two cuts at different places differ."""


def assert_equal(replicas: list[Path]) -> None:
    """The replicas are the same, byte for byte."""
    for other in replicas[1:]:
        run("cmp", replicas[0], other)


class Region:
    """Some bytes of the disk that one thread works on, and what they should be.

    The regions of two threads meet within a sector, and a read goes on into what the neighbours
    are writing, so that requests meet in the same pages and on their way through the daemon. But
    no byte has two writers, so at any time there is one right answer to the thread's own part.
    """

    def __init__(self, path: Path, start: int, length: int, seed: int) -> None:
        self.model = bytearray(length)
        self._path = path
        self._start = start
        self._rng = random.Random(seed)

    def work(self, requests: int) -> None:
        buffered = os.open(self._path, os.O_RDWR)
        direct = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            for request in range(requests):
                self._request(self._rng.choice([buffered, direct]), request)
        finally:
            os.close(buffered)
            os.close(direct)

    def _request(self, fd: int, request: int) -> None:
        length = int(2 ** self._rng.uniform(0, 20))
        offset = self._rng.randint(0, len(self.model) - length)
        match self._rng.choices(["write", "read", "fsync"], [49, 49, 2])[0]:
            case "write":
                cut = self._rng.randrange(len(POOL) - length)
                data = POOL[cut : cut + length]
                assert os.pwrite(fd, data, self._start + offset) == length
                self.model[offset : offset + length] = data
            case "read":
                before = min(self._rng.choice([0, length]), self._start + offset)
                after = self._rng.choice([0, length])
                data = os.pread(fd, before + length + after, self._start + offset - before)
                right = data[before : before + length] == self.model[offset : offset + length]
                assert right, f"request {request}: wrong data at {self._start + offset}+{length}"
            case "fsync":
                os.fsync(fd)


def test_ten_thousand_requests_of_sixteen_threads(make_images: MakeImages, tmp_path: Path) -> None:
    """Each read, while all the others are at work, gives what its thread wrote last; and so does
    each replica in the end. Reading while a neighbour writes is never taken for a difference
    between replicas."""
    threads, length = 16, 5 * MIB // 2 + 777
    replicas = make_images(3, threads * length)
    with Mounted(replicas, tmp_path) as disk:
        regions = [Region(disk.file, n * length, length, seed=n) for n in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(region.work, 10_000 // threads) for region in regions]:
                done.result()
        assert disk.events("QUORUM_REPORT_BAD") == []
    expected = b"".join(region.model for region in regions)
    assert [path.read_bytes() == expected for path in replicas] == [True] * 3


def memory_kib(pid: int, field: str) -> int:
    """A figure from ``/proc/PID/status``, such as VmRSS."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(field + ":"))
    return int(value)


@pytest.mark.parametrize("options", ["", "replica-io=direct"])
def test_heavy_load_is_verified_and_leaves_the_daemon_small(
    options: str, make_images: MakeImages, tmp_path: Path
) -> None:
    """fio reads back what it wrote, at 32 requests in flight, of mixed sizes and of one size, with
    every kind of asynchronous I/O. After all that the daemon has less than 60 MiB resident."""
    replicas = make_images(3, 256 * MIB)
    mixed = "--bssplit=4k/50:12k/10:64k/25:256k/10:1m/5"
    verify = ["--verify=crc32c", "--verify_fatal=1"]
    with Mounted(replicas, tmp_path, options) as disk:
        fio = [
            "fio",
            "--name=job",
            f"--filename={disk.file}",
            "--iodepth=32",
            "--allow_file_create=0",
        ]
        for engine in ("libaio", "io_uring"):
            for direct in ("--direct=1", "--direct=0"):
                job = [mixed, *verify, f"--ioengine={engine}", direct, "--size=32m"]
                run(*fio, "--rw=randwrite", *job, directory=tmp_path)
        for job in (
            ["--bs=4k", "--size=16m", "--rw=randwrite", *verify],
            ["--bs=1m", "--size=128m", "--rw=randwrite", *verify],
            ["--bs=4k", "--io_size=32m", "--rw=randrw"],
            ["--bs=1m", "--io_size=256m", "--rw=randrw"],
        ):
            run(*fio, "--ioengine=libaio", "--direct=1", *job, directory=tmp_path)
        # Buffers go when it is idle.
        wait_until(lambda: memory_kib(disk.pid, "VmRSS") < 60 * 1024, "less than 60 MiB resident")
        assert disk.events("QUORUM_REPORT_BAD") == []
    assert_equal(replicas)


@contextlib.contextmanager
def mounted(device: Path, directory: Path) -> Iterator[Path]:
    """The file system on *device*, mounted at *directory*."""
    directory.mkdir(exist_ok=True)
    run("mount", device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


CHECKS = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n", "-f"]}


@pytest.mark.parametrize(("kind", "direct"), [("ext4", "off"), ("ext4", "on"), ("xfs", "on")])
def test_a_file_system_on_a_loop_device(
    kind: str, direct: str, make_images: MakeImages, tmp_path: Path
) -> None:
    """A source tree copied to a file system on the disk is all there after mounting everything
    anew; the file system is clean; and each replica holds it."""
    replicas = make_images(2, 320 * MIB)  # XFS wants 300 MiB
    source = Path(sysconfig.get_paths()["stdlib"])
    without = shutil.ignore_patterns("site-packages", "test", "config-*", "*.so")
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=without, symlinks=True)
    assert sum(len(files) for _, _, files in os.walk(tree)) > 1000

    option = f"--direct-io={direct}"
    with Mounted(replicas, tmp_path) as disk, loop_device(disk.file, option) as device:
        run(f"mkfs.{kind}", "-q", device)
        with mounted(device, tmp_path / "fs") as fs:
            run("cp", "-a", tree, fs)
    with Mounted(replicas, tmp_path) as disk, loop_device(disk.file, option) as device:
        with mounted(device, tmp_path / "fs") as fs:
            run("diff", "--recursive", "--no-dereference", tree, fs / "tree")
        assert disk.events("QUORUM_REPORT_BAD") == []
    run(*CHECKS[kind], replicas[0])
    assert_equal(replicas)


def test_mounting_is_quick(tmp_path: Path) -> None:
    """With everything it needs in the page cache, it takes not twice as long as to load the
    program: 0.6 s on a slow machine.

    The best of five: what a busy machine adds says nothing about the program.
    """
    load = [sys.executable, "-c", "import quorumfs.mount.life"]
    loading, mounting = [], []
    with tmpfs(tmp_path / "memory", 16 * MIB) as memory:
        replicas = create(named(memory, 3), MIB)
        mountpoint = tmp_path / "mnt"
        mountpoint.mkdir()
        for _ in range(5):
            loading.append(seconds(lambda: subprocess.run(load, check=True)))
            mounting.append(seconds(lambda: quorumfs("mount", *replicas, mountpoint)))
            try:
                assert (mountpoint / "disk.img").exists()
            finally:
                quorumfs("umount", mountpoint)
    print("load:", *(f"{each:.2f}" for each in loading), "s")
    print("mount:", *(f"{each:.2f}" for each in mounting), "s")
    assert min(mounting) < 2 * min(loading)
