"""Replicas past the page cache: what a guest wrote is there, and not twice in the host's memory.

On ext4 on loop devices with small and with large sectors. A guest's sectors have 512 bytes in any
case: a large one is read, changed and written.
"""

import errno
import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import pytest
from conftest import MakeImages
from support.command import one_line, wait_until
from support.faultfs import FaultFS
from support.mounting import Mounted, as_qemu, quorumfs
from support.oracle import Oracle, Writers
from support.sets import (
    BLOCK,
    CHUNK,
    EXTENT,
    MIB,
    Ext4,
    SetMount,
    create,
    filled,
    named,
    opened,
    refused,
    same,
    tmpfs,
)

DIRECT = "replica-io=direct"
FIFO = "read-pattern=fifo,vote-threshold=1"
SECTOR = 512
SIZE = 24 * MIB


@pytest.fixture(params=[512, 4096])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ext4]:
    """A file system on a device with sectors of so many bytes; the device is in memory, so that it
    does not matter how busy the host's disk is."""
    with (
        tmpfs(tmp_path / "memory", 160 * MIB) as memory,
        Ext4(memory, 128 * MIB, sector=request.param) as ext4,
    ):
        yield ext4


def fio(disk: Mounted, directory: Path, *job: str) -> None:
    """Write and verify requests of mixed sizes, many at a time."""
    command = [
        *(
            "fio",
            "--name=job",
            f"--filename={disk.file}",
            f"--size={SIZE}",
            "--allow_file_create=0",
        ),
        *("--ioengine=libaio", "--iodepth=16", "--direct=1", "--verify=xxhash"),
        *("--verify_fatal=1", *job),
    ]
    done = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr + done.stdout


MIXED = ("--rw=randwrite", "--bsrange=512-1m", "--blockalign=512", "--bs_unaligned=0")


def cached_bytes(image: Path) -> int:
    """What the page cache of the host has of an image."""
    command = ["fincore", "--bytes", "--json", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (told,) = json.loads(done.stdout)["fincore"]
    return int(told["res"])


def uncached(images: list[Path]) -> None:
    for image in images:
        with opened(image, os.O_RDONLY) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def ways(disk: SetMount) -> list[str]:
    return [part["io"] for part in disk.status()["replicas"]]


@pytest.mark.parametrize("options", ["", FIFO])
def test_what_was_written_in_any_size_is_verified(
    options: str, store: Ext4, tmp_path: Path
) -> None:
    images = create(named(store.mountpoint, 2), SIZE)
    with SetMount(images, tmp_path, f"{DIRECT},{options}") as disk:
        assert ways(disk) == ["direct", "direct"]
        fio(disk, tmp_path, *MIXED)
        fio(disk, tmp_path, "--rw=randrw", "--bs=512", "--io_size=1m")
    assert same(images)


@pytest.mark.parametrize("way", ["buffered", "direct"])
def test_the_page_cache_holds_no_second_copy_of_the_disk(
    way: str, store: Ext4, tmp_path: Path
) -> None:
    images = create(named(store.mountpoint, 2), SIZE)
    uncached(images)
    with SetMount(images, tmp_path, f"replica-io={way}") as disk:
        with opened(disk.file) as fd:
            for offset in range(0, SIZE, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
            os.fsync(fd)
            for offset in range(0, SIZE, MIB):
                os.pread(fd, MIB, offset)
        held = [cached_bytes(image) for image in images]
    assert held == ([0, 0] if way == "direct" else [SIZE, SIZE])


def test_neighbours_of_one_block_lose_nothing(store: Ext4, tmp_path: Path) -> None:
    """Guests with a sector each, all of one block, at the same time and over and over."""
    images = create(named(store.mountpoint, 2), SIZE)
    guests, rounds = BLOCK // SECTOR, 40
    barrier = Barrier(guests)
    with (
        SetMount(images, tmp_path, DIRECT) as disk,
        opened(disk.file) as fd,
        ThreadPoolExecutor(guests) as pool,
    ):

        def guest(number: int) -> None:
            mine = 3 * BLOCK + number * SECTOR
            for turn in range(rounds):
                barrier.wait(60)
                os.pwrite(fd, bytes([1 + turn + number]) * SECTOR, mine)
                barrier.wait(60)
                assert os.pread(fd, SECTOR, mine) == bytes([1 + turn + number]) * SECTOR

        for done in [pool.submit(guest, number) for number in range(guests)]:
            done.result()
        expected = b"".join(bytes([rounds + number]) * SECTOR for number in range(guests))
        assert os.pread(fd, BLOCK, 3 * BLOCK) == expected
    assert same(images)
    with opened(images[0], os.O_RDONLY) as fd:
        assert os.pread(fd, BLOCK, 3 * BLOCK) == expected


@pytest.mark.parametrize("beyond", [SECTOR, 100])
def test_an_image_whose_end_is_no_whole_block_stays_as_long(
    beyond: int, store: Ext4, tmp_path: Path
) -> None:
    size = 2 * MIB + beyond
    images = named(store.mountpoint, 2)
    for image in images:
        image.write_bytes(b"o" * size)
    with SetMount(images, tmp_path, DIRECT) as disk:
        disk.wait_healthy()
        with opened(disk.file, os.O_RDWR) as fd:
            os.pwrite(fd, b"n" * 150, size - 150)
            os.fsync(fd)
        with opened(disk.file) as fd:
            assert os.pread(fd, BLOCK, size - 300) == b"o" * 150 + b"n" * 150
    for image in images:
        assert image.read_bytes() == b"o" * (size - 150) + b"n" * 150


def test_zeros_and_holes_beside_writes(store: Ext4, tmp_path: Path) -> None:
    """The kernel makes those of part of a block in its page cache; a write of the rest is not."""
    images = create(named(store.mountpoint, 2), SIZE)
    with SetMount(images, tmp_path, DIRECT) as disk, opened(disk.file, os.O_RDWR) as fd:
        expected = bytearray(b"o" * 8 * MIB)
        os.pwrite(fd, expected, 0)
        for number, mode in itertools.product(range(40), ("--punch-hole", "--zero-range")):
            start = number * 3 * CHUNK // 4 + SECTOR * (number % 9)
            length = SECTOR * (1 + number * 7 % 40)
            command = ["fallocate", mode, "--offset", str(start), "--length", str(length)]
            subprocess.run([*command, disk.file], check=True)
            expected[start : start + length] = bytes(length)
            for place in (start - SECTOR, start + length):
                if place >= 0:
                    os.pwrite(fd, bytes([1 + number]) * SECTOR, place)
                    expected[place : place + SECTOR] = bytes([1 + number]) * SECTOR
        os.fsync(fd)
        for offset in range(0, len(expected), MIB):
            assert os.pread(fd, MIB, offset) == expected[offset : offset + MIB]
    assert same(images)
    assert images[0].read_bytes()[: len(expected)] == expected


@pytest.mark.parametrize("options", ["", FIFO])
def test_a_resync_beside_writes_and_a_scrub_after_it(
    options: str, store: Ext4, tmp_path: Path
) -> None:
    """Copies, writes and the scrub's look past the cache agree on what is there.

    With fifo, one image is copied to another by the worker of the second alone.
    """
    images = create(named(store.mountpoint, 3), SIZE)
    with SetMount(images, tmp_path, f"{DIRECT},resync-rate=32M,{options}") as disk:
        quorumfs("offline", disk.mountpoint, images[2])
        fio(disk, tmp_path, *MIXED)
        images[2].read_bytes()  # fills the page cache with what is out of date
        quorumfs("online", disk.mountpoint, images[2])
        disk.wait(lambda status: status["resync"], "a resync")
        fio(disk, tmp_path, *MIXED, "--io_size=12m")
        disk.wait_healthy()
        assert ways(disk) == ["direct"] * 3
        assert [cached_bytes(image) for image in images[:2]] == [0, 0]
        scrub = json.loads(quorumfs("scrub", "--wait", "--json", disk.mountpoint).stdout)
        assert "mismatch" not in json.dumps(disk.events("MISMATCH_FOUND")), scrub
    assert same(images)


def test_a_replica_without_space_is_ejected_and_caught_up(tmp_path: Path) -> None:
    with Ext4(tmp_path, 64 * MIB, sector=4096) as store:
        images = create(
            [tmp_path / "a.img", store.mountpoint / "b.img"], SIZE, "--vote-threshold=1"
        )
        with SetMount(images, tmp_path, f"{DIRECT},{FIFO}") as disk, opened(disk.file) as fd:
            with filled(store.mountpoint):
                for offset in range(SECTOR, 8 * MIB, MIB):
                    os.pwrite(fd, b"n" * MIB, offset)
                assert disk.replica(images[1])["state"] != "current"
            disk.wait_healthy()
            assert ways(disk) == ["direct", "direct"]
        assert same(images)


def test_a_truncated_image_is_an_error_and_never_grows_back(store: Ext4, tmp_path: Path) -> None:
    """R10."""
    images = create(named(store.mountpoint, 2), SIZE, "--vote-threshold=1")
    with SetMount(images, tmp_path, f"{DIRECT},{FIFO}") as disk, opened(disk.file) as fd:
        os.pwrite(fd, b"o" * SIZE, 0)
        os.truncate(images[1], MIB + 100)
        os.pwrite(fd, b"n" * SECTOR, MIB + 2 * SECTOR)
        os.pwrite(fd, b"n" * SECTOR, 5 * MIB + SECTOR)
        assert disk.replica(images[1])["state"] != "current"
        assert images[1].stat().st_size == MIB + 100
        assert os.pread(fd, SECTOR, 5 * MIB + SECTOR) == b"n" * SECTOR


def test_a_killed_daemon_lost_nothing(store: Ext4, tmp_path: Path) -> None:
    """P1, P3: what was acknowledged is there, and the replicas are made equal."""
    images = create(named(store.mountpoint, 2), 2 * EXTENT)
    oracle = Oracle(range(0, 2 * EXTENT // BLOCK, 331))
    for number in range(4):
        with SetMount(images, tmp_path, f"{DIRECT},{FIFO}") as disk:
            with opened(disk.file) as fd:
                oracle.look(fd)
            enough = oracle.acknowledgements + 60
            writers = Writers(oracle, disk.file, seed=number)
            wait_until(lambda n=enough: oracle.acknowledgements >= n, "enough writes")  # type: ignore[misc]
            disk.kill()
            writers.join()
    with SetMount(images, tmp_path, f"{DIRECT},{FIFO}") as disk:
        disk.wait_healthy()
        with opened(disk.file) as fd:
            oracle.look(fd)
        assert same(images)


@pytest.mark.parametrize("option", ["direct", "auto"])
def test_a_store_of_fuse_is_direct_and_hangs_as_any_other(option: str, tmp_path: Path) -> None:
    """R7: what comes late is waited for before the replica is given anything again."""
    with FaultFS(tmp_path) as faulty:
        images = create([tmp_path / "a.img", faulty.path("b.img")], SIZE, "--vote-threshold=1")
        options = f"replica-io={option},{FIFO},replica-timeout=1s"
        with SetMount(images, tmp_path, options) as disk, opened(disk.file) as fd:
            assert disk.replica(images[1])["io"] == "direct"
            os.pwrite(fd, b"o" * 100 * SECTOR, SECTOR)
            faulty.hang("b.img", "write")
            os.pwrite(fd, b"n" * SECTOR, 2 * SECTOR)
            assert disk.replica(images[1])["state"] == "missing"
            os.pwrite(fd, b"m" * SECTOR, 2 * SECTOR)
            faulty.release("b.img")
            disk.wait_healthy()
            faulty.inject("b.img", "write", short=700, count=1)
            os.pwrite(fd, b"s" * BLOCK, 8 * BLOCK)
            faulty.inject("b.img", "write", errno=errno.EIO, count=1)
            os.pwrite(fd, b"e" * BLOCK, 9 * BLOCK)
            disk.wait_healthy()
        assert same([images[0], faulty.backing("b.img")])


@contextmanager
def ramfs(mountpoint: Path) -> Iterator[Path]:
    """A file system that refuses O_DIRECT."""
    mountpoint.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ramfs", mountpoint], check=True)
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "-l", mountpoint], check=True)


def test_a_store_that_refuses_is_refused_or_buffered(tmp_path: Path) -> None:
    with ramfs(tmp_path / "ramfs") as store:
        images = create([tmp_path / "a.img", store / "b.img"], SIZE)
        said = refused(images, tmp_path, options=DIRECT)
        assert f"the file system of {images[1]} refuses O_DIRECT" in said
        with SetMount(images, tmp_path, "replica-io=auto") as disk:
            assert disk.replica(images[1])["io"] == "buffered"
            fio(disk, tmp_path, *MIXED, "--io_size=2m")
        assert same(images)


def test_memory_is_buffered_unless_asked_otherwise(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "plain", 64 * MIB) as memory:
        images = create(named(memory, 2), SIZE)
        for option in ("auto", "buffered"):
            with SetMount(images, tmp_path, f"replica-io={option}") as disk:
                assert ways(disk) == ["buffered", "buffered"]


def test_a_read_only_mount_reads_past_the_cache(store: Ext4, tmp_path: Path) -> None:
    images = create(named(store.mountpoint, 2), SIZE)
    with SetMount(images, tmp_path, DIRECT) as disk, opened(disk.file) as fd:
        os.pwrite(fd, b"n" * BLOCK, SECTOR)
    uncached(images)
    with SetMount(images, tmp_path, f"ro,{DIRECT}") as disk:
        with opened(disk.file, os.O_RDONLY | os.O_DIRECT) as fd:
            assert os.pread(fd, BLOCK, 0) == bytes(SECTOR) + b"n" * (BLOCK - SECTOR)
        assert ways(disk) == ["direct", "direct"]
        assert [cached_bytes(image) for image in images] == [0, 0]


def test_without_sidecars_too(store: Ext4, make_images: MakeImages, tmp_path: Path) -> None:
    images = make_images(2, SIZE, store.mountpoint)
    with SetMount(images, tmp_path, as_qemu(DIRECT)) as disk:
        fio(disk, tmp_path, *MIXED)
        assert ways(disk) == ["direct", "direct"]
    assert same(images)


def test_the_way_does_not_change_in_use(tmp_path: Path) -> None:
    with SetMount(create(named(tmp_path, 2), SIZE), tmp_path) as disk:
        done = quorumfs("set", disk.mountpoint, DIRECT, check=False)
        assert "replica-io cannot change while the disk is in use" in one_line(done, 4)
        assert "unmount, and mount again with it" in done.stderr
        quorumfs("set", disk.mountpoint, "replica-io=buffered")
