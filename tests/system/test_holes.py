"""SEEK_DATA and SEEK_HOLE through the mount: holes are what all replicas have as one."""

import itertools
import json
import os
import random
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from conftest import MakeImages
from support.faultfs import FaultFS
from support.faultydisk import DirectFile, answer
from support.mounting import Mounted, as_qemu, quorumfs
from support.programs import run
from support.sparse import PUNCH, allocated, data_extents, fallocate

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
BLOCK = 4096

Extents = list[tuple[int, int]]


def merged(extents: Iterable[tuple[int, int]]) -> Extents:
    """Sorted, without overlaps and without two that touch."""
    result: Extents = []
    for start, end in sorted(extents):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def write_at(path: Path, *offsets: int, data: bytes = b"x" * BLOCK) -> None:
    with path.open("r+b") as file:
        for offset in offsets:
            os.pwrite(file.fileno(), data, offset)


def zero_map(*source: str | Path) -> Extents:
    """What ``qemu-img map`` says is zeros."""
    entries = json.loads(run("qemu-img", "map", "--output=json", *source))
    return merged(
        (entry["start"], entry["start"] + entry["length"]) for entry in entries if entry["zero"]
    )


def quorum_of(replicas: list[Path]) -> list[str]:
    """QEMU's own quorum driver over the raw files, as ``qemu-img`` arguments."""
    options = ["driver=quorum", "vote-threshold=2"]
    for index, path in enumerate(replicas):
        child = f"children.{index}"
        options += [f"{child}.driver=raw", f"{child}.file.driver=file"]
        options += [f"{child}.file.filename={path}"]
    return ["--image-opts", ",".join(options)]


def seek(path: Path, offset: int, whence: int) -> object:
    """lseek(2) on a descriptor of its own: the offset, or the name of the errno."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return answer(os.lseek, fd, offset, whence)
    finally:
        os.close(fd)


# Where holes are


@pytest.mark.parametrize("chance", [0.05, 0.3, 0.7])
def test_data_is_where_any_replica_has_data(
    chance: float, make_images: MakeImages, tmp_path: Path
) -> None:
    """A hole is what all three have as one, to the byte, however their extents lie."""
    replicas = make_images(3, 4 * MIB)
    rng = random.Random(chance)
    for path in replicas:
        write_at(path, *(n * BLOCK for n in range(1024) if rng.random() < chance))
    expected = merged(extent for path in replicas for extent in data_extents(path))
    assert len(expected) > 10
    with Mounted(replicas, tmp_path) as disk:
        assert merged(data_extents(disk.file)) == expected


def test_holes_change_with_the_disk(make_images: MakeImages, tmp_path: Path) -> None:
    """A write is data and a discard a hole for whoever asks next, on any descriptor."""
    replicas = make_images(2, 4 * MIB)
    with Mounted(replicas, tmp_path) as disk, DirectFile(disk.file) as file:
        asking = os.open(disk.file, os.O_RDONLY)
        assert answer(os.lseek, asking, 0, os.SEEK_DATA) == "ENXIO"
        assert os.lseek(asking, 5, os.SEEK_HOLE) == 5
        file.write(MIB, b"x" * BLOCK)
        assert os.lseek(asking, 0, os.SEEK_DATA) == MIB
        assert os.lseek(asking, MIB + 7, os.SEEK_DATA) == MIB + 7
        assert os.lseek(asking, MIB + 7, os.SEEK_HOLE) == MIB + BLOCK
        assert answer(os.lseek, asking, MIB + BLOCK, os.SEEK_DATA) == "ENXIO"
        fallocate(disk.file, PUNCH, 0, 4 * MIB)
        assert answer(os.lseek, asking, 0, os.SEEK_DATA) == "ENXIO"
        os.close(asking)


def test_the_ends(make_images: MakeImages, tmp_path: Path) -> None:
    """lseek(2): the end of the disk is a hole, for those who ask inside; nothing is behind it."""
    size = 4 * MIB + 512
    replicas = make_images(2, size)
    write_at(replicas[1], 4 * MIB, data=b"x" * 512)
    with Mounted(replicas, tmp_path) as disk:
        assert seek(disk.file, size - 1, os.SEEK_DATA) == size - 1
        assert seek(disk.file, size - 1, os.SEEK_HOLE) == size
        for offset in (size, size + 1, TIB):
            assert seek(disk.file, offset, os.SEEK_DATA) == "ENXIO"
            assert seek(disk.file, offset, os.SEEK_HOLE) == "ENXIO"


def test_a_replica_that_knows_no_holes_is_data(make_images: MakeImages, tmp_path: Path) -> None:
    """One replica's file system has no SEEK_HOLE: all of the disk counts as data."""
    with FaultFS(tmp_path) as faulty:
        (replica,) = make_images(1, 4 * MIB)
        faulty.backing("b.img").touch()
        os.truncate(faulty.backing("b.img"), 4 * MIB)
        with Mounted([replica, faulty.path("b.img")], tmp_path) as disk:
            assert data_extents(disk.file) == [(0, 4 * MIB)]
            assert disk.events("QUORUM_REPORT_BAD") == []


def test_a_truncated_replica_has_no_holes_there(make_images: MakeImages, tmp_path: Path) -> None:
    """P1: what was cut off is lost, not zeros. A copy of the disk fails instead of having a hole
    where a read of the disk fails."""
    (replica,) = make_images(1, 4 * MIB)
    replica.write_bytes(b"x" * 4 * MIB)
    with Mounted([replica], tmp_path) as disk:
        os.truncate(replica, 0)
        found = seek(disk.file, 2 * MIB, os.SEEK_DATA)
        copy = ["qemu-img", "convert", "-f", "raw", "-O", "raw", disk.file, tmp_path / "copy.img"]
        copied = subprocess.run(list(map(str, copy)), capture_output=True, check=False)
        with DirectFile(disk.file) as file:
            assert answer(file.read, 2 * MIB, BLOCK) == "EIO"
        disk.expected_errors.append("")  # the last flush fails, and so does umount
        quorumfs("umount", disk.mountpoint, check=False)
    assert copied.returncode != 0
    assert found == 2 * MIB


# Tools


def test_cp_keeps_the_disk_sparse(make_images: MakeImages, tmp_path: Path) -> None:
    """``cp --sparse=auto`` of a sparse disk: equal, and as small as a replica. And du of the disk
    is that of a replica."""
    size = 128 * MIB
    replicas = make_images(2, size)
    for path in replicas:
        write_at(path, MIB, size // 2, size - MIB, data=b"w" * MIB)
    copy = tmp_path / "copy.img"
    with Mounted(replicas, tmp_path) as disk:
        assert disk.file.stat().st_blocks * 512 == allocated(replicas[0]) == 3 * MIB
        run("cp", "--sparse=auto", disk.file, copy)
    run("cmp", copy, replicas[0])
    assert allocated(copy) == 3 * MIB


def test_a_large_sparse_disk_is_mapped_and_converted_in_seconds(
    make_images: MakeImages, tmp_path: Path
) -> None:
    """``qemu-img map`` and ``qemu-img convert`` of 1 TiB with 100 MiB of data."""
    replicas = make_images(2, TIB)
    for path in replicas:
        write_at(path, *(n * 10 * GIB for n in range(100)), data=b"y" * MIB)
    copy = tmp_path / "copy.img"
    with Mounted(replicas, tmp_path) as disk:
        started = time.monotonic()
        zeros = zero_map("-f", "raw", disk.file)
        mapped = time.monotonic()
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", disk.file, copy)
        converted = time.monotonic()
    print(f"map {mapped - started:.2f} s, convert {converted - mapped:.2f} s")
    assert converted - started < 60  # to read all of it would take many minutes
    assert sum(end - start for start, end in zeros) == TIB - 100 * MIB
    assert merged(data_extents(copy)) == merged(data_extents(replicas[0]))
    assert allocated(copy) < 101 * MIB


def test_block_status_is_that_of_qemus_quorum(make_images: MakeImages, tmp_path: Path) -> None:
    """As QEMU's iotest 312: three replicas with every combination of data, written zeros and
    hole, in runs of different lengths. Zeros only where all three have zeros, and the same
    answer as from QEMU's quorum over the same files."""
    replicas = make_images(3, 8 * MIB)
    states: list[Extents] = []
    for index, path in enumerate(replicas):
        commands = []
        data: Extents = []
        place = 0
        for number, combination in enumerate(itertools.product("dzh", repeat=3)):
            length = (number % 3 + 1) * 64 * KIB
            start = place + index * 4 * KIB  # so that boundaries do not fall together
            if combination[index] == "d":
                commands.append(f"write -P {number + 1} {start} {length}")
                data.append((start, start + length))
            elif combination[index] == "z":
                commands.append(f"write -z {start} {length}")
            else:
                commands.append(f"discard {start} {length}")
            place += length
        run("qemu-io", "-f", "raw", "-d", "unmap", *(f"-c{c}" for c in commands), path)
        run("sync", path)
        states.append(data)
        assert zero_map("-f", "raw", path) == holes(merged(data), 8 * MIB)
    expected = holes(merged(itertools.chain(*states)), 8 * MIB)
    assert len(expected) > 3
    theirs = zero_map(*quorum_of(replicas))
    with Mounted(replicas, tmp_path, as_qemu()) as disk:
        ours = zero_map("-f", "raw", disk.file)
    assert ours == expected
    assert ours == theirs


def holes(data: Extents, size: int) -> Extents:
    """What is between sorted *data*."""
    edges = [0, *itertools.chain(*data), size]
    return [(start, end) for start, end in zip(edges[::2], edges[1::2], strict=True) if start < end]


# Many extents


@pytest.mark.parametrize("opposite", [False, True])
def test_every_seek_is_bounded_with_many_extents(
    opposite: bool, make_images: MakeImages, tmp_path: Path
) -> None:
    """100,000 holes of 4 KiB, the second replica's where the first has data or in the same
    places: no lseek takes long, wherever it starts, and none says hole where there is data."""
    count = 100_000
    size = count * 2 * BLOCK
    replicas = make_images(2, size)
    block = b"z" * BLOCK
    for index, path in enumerate(replicas):
        with path.open("r+b") as file:
            for n in range(count):
                os.pwrite(file.fileno(), block, (2 * n + (index if opposite else 0)) * BLOCK)
    slowest = 0.0
    with Mounted(replicas, tmp_path) as disk:
        fd = os.open(disk.file, os.O_RDONLY)
        rng = random.Random(2)
        for place in [0, size - 3, *(rng.randrange(size) for _ in range(40))]:
            started = time.monotonic()
            hole = os.lseek(fd, place, os.SEEK_HOLE)
            data = answer(os.lseek, fd, place, os.SEEK_DATA)
            slowest = max(slowest, time.monotonic() - started)
            in_data = opposite or place // BLOCK % 2 == 0
            following = (place // BLOCK + 1) * BLOCK
            assert data == (place if in_data else following if following < size else "ENXIO")
            if opposite:
                assert place < hole <= size
                assert hole == size or os.lseek(fd, hole, os.SEEK_DATA) == hole
            else:
                assert hole == (following if in_data else place)
        os.close(fd)
    print(f"the slowest pair of seeks: {slowest * 1000:.0f} ms")
    assert slowest < 5  # to look at all of them one by one would take minutes
