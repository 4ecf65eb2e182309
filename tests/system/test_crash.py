"""Sets whose daemon is killed: nothing acknowledged is lost, and what was seen stays.

A kill leaves the page cache as it is, so all that was acknowledged must be there; of what was
being written, each sector is old or new; and once read it stays what it is, on whatever replica.
"""

import errno
import os
import random
from contextlib import suppress
from pathlib import Path

import pytest
from support.command import wait_until
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.oracle import BLOCK, Oracle, Writers, content
from support.sets import (
    CHUNK,
    EXTENT,
    MIB,
    SetMount,
    create,
    examine,
    named,
    opened,
    same,
    seen,
    with_sidecars,
    write,
)

from quorumfs.decisions.dirtymap import EXTENT as MAP_EXTENT

FIFO = "read-pattern=fifo,vote-threshold=1"


def finish_in_part(oracle: Oracle, images: list[Path], rng: random.Random) -> int:
    """Let writes that were under way reach some of the replicas, as a kill may; how many."""
    blocks = oracle.under_way()
    for block in blocks:
        data = content(block, oracle.issued[block])
        for image in images:
            if rng.random() < 0.5:
                with opened(image, os.O_RDWR) as fd:
                    os.pwrite(fd, data, block * BLOCK)
    return len(blocks)


def one_more_on(image: Path, oracle: Oracle, block: int) -> None:
    """One more write of *block* was under way at the kill, and reached this replica alone."""
    with opened(image, os.O_RDWR) as fd:
        os.pwrite(fd, oracle.issue(block), block * BLOCK)


@pytest.mark.parametrize(
    ("replicas", "options", "kills"), [(2, FIFO, 20), (3, "", 8)], ids=["fifo", "quorum"]
)
def test_kills_in_a_row(replicas: int, options: str, kills: int, tmp_path: Path) -> None:
    """P1, P2, P3, P7: all is there, nothing flips, and only what was marked is copied.

    Every other time the next kill comes while the replicas are still being made equal.
    """
    images = create(named(tmp_path, replicas), 8 * EXTENT)
    rng = random.Random(replicas)
    half = 2 * EXTENT // BLOCK
    oracle = Oracle([first + n * 331 % (half // 2) for first in (0, half // 2) for n in range(24)])
    differed = 0
    options = ",".join(filter(None, [options, "resync-rate=64M"]))
    for number in range(kills):
        with SetMount(images, tmp_path, options) as disk:
            with opened(disk.file) as fd:
                oracle.look(fd)
                if number % 2 == 0:
                    while (status := disk.status())["state"] != "healthy":
                        assert status["state"] == "degraded"
                        oracle.look(fd)
                    oracle.look(fd)
                    assert same(images)
                for block in oracle.blocks[0], oracle.blocks[-1]:
                    oracle.write(fd, block)  # both extents are marked from here on
            acknowledged = oracle.acknowledgements + rng.randrange(20, 200)
            writers = Writers(oracle, disk.file, seed=number)
            wait_until(lambda n=acknowledged: oracle.acknowledgements >= n, "enough writes")  # type: ignore[misc]
            disk.kill()
            writers.join()
        differed += finish_in_part(oracle, images, rng)
        marked = examine(*images)["assembly"]["intent"]["bytes"]
        assert marked <= 4 * EXTENT  # what was written to, and as much ahead of it
    assert differed
    with SetMount(images, tmp_path, options) as disk:
        with opened(disk.file) as fd:
            oracle.look(fd)
            status = disk.wait_healthy()
            oracle.look(fd)
        assert sum(part["copied_bytes"] for part in status["replicas"]) <= replicas * 4 * EXTENT
        assert same(images)
    assert all(part["clean"] for part in examine(*images)["replicas"])


def test_what_is_settled_does_not_grow_from_crash_to_crash(tmp_path: Path) -> None:
    """Whoever settles writes one extent after the other, too; but nothing comes behind them."""
    images = named(tmp_path, 2)
    with images[0].open("wb") as file:
        for _ in range(40):
            file.write(b"x" * MAP_EXTENT)
    quorumfs("create", "--source", images[0], "--vote-threshold=1", *images)
    marked = []
    for number in range(3):
        with SetMount(images, tmp_path, FIFO) as disk:
            disk.wait_healthy()
            if number == 0:
                for extent in [*reversed(range(8)), 8]:
                    write(disk, b"w", extent * MAP_EXTENT // CHUNK)
            disk.kill()
        marked.append(examine(*images)["assembly"]["intent"]["bytes"])
    assert 9 * MAP_EXTENT <= marked[0] <= 18 * MAP_EXTENT
    assert marked == [marked[0]] * 3


def test_what_was_read_while_it_was_being_settled_stays(tmp_path: Path) -> None:
    """P7: blocks that differ are read a thousand times meanwhile, and no block flips."""
    images = create(named(tmp_path, 2), EXTENT)
    oracle = Oracle(range(0, EXTENT // BLOCK, 97))
    with SetMount(images, tmp_path, FIFO) as disk:
        with opened(disk.file) as fd:
            for block in oracle.blocks:
                oracle.write(fd, block)
        disk.kill()
    for block in oracle.blocks:
        one_more_on(images[block % 2], oracle, block)
    with SetMount(images, tmp_path, FIFO + ",resync-rate=16M") as disk, opened(disk.file) as fd:
        reads = 0
        while disk.status()["state"] != "healthy" or reads < 1000:
            oracle.look(fd)
            reads += len(oracle.blocks)
        assert same(images)


@pytest.mark.parametrize("end", ["kill", "unmount"])
def test_what_was_read_of_a_failed_write_stays(end: str, tmp_path: Path) -> None:
    """P7, R2: a write that too few took is old or new; it is shown when it can only be one."""
    with FaultFS(tmp_path) as faulty:
        images = create([faulty.path(name) for name in ("a.img", "b.img")])
        oracle = Oracle([0, 16])
        with SetMount(images, tmp_path) as disk:
            with opened(disk.file) as fd:
                oracle.write(fd, 0)
                faulty.inject("a.img", "write", errno=errno.EIO)
                with pytest.raises(OSError, match="Input/output"):
                    oracle.write(fd, 0)
                # Until the repair in the background has made b equal to a it is not shown at all.
                with suppress(OSError):
                    oracle.look(fd)
                oracle.look(fd, oracle.blocks[1:])
            if end == "kill":
                disk.kill()
        faulty.clear()
        with SetMount(images, tmp_path) as disk, opened(disk.file) as fd:
            oracle.look(fd)
            disk.wait_healthy()
            oracle.look(fd)


def test_what_was_read_after_a_crash_stays_whatever_the_order(tmp_path: Path) -> None:
    """P7: also if the next crash comes before it is settled, and the mount names b first."""
    images = create(named(tmp_path, 2), 4 * EXTENT)
    oracle = Oracle([0, 4 * EXTENT // BLOCK - 1])
    last = oracle.blocks[-1]
    with SetMount(images, tmp_path, FIFO) as disk:
        with opened(disk.file) as fd:
            for offset in range(0, 4 * EXTENT, MIB):
                os.pwrite(fd, bytes(MIB), offset)
            oracle.write(fd, last)
        disk.kill()
    one_more_on(images[1], oracle, last)
    for paths in images, list(reversed(images)):
        with SetMount(paths, tmp_path, FIFO + ",resync-rate=1M") as disk:
            with opened(disk.file) as fd:
                oracle.look(fd)
            disk.kill()


def test_what_was_read_from_the_second_stays(tmp_path: Path) -> None:
    """P7: the first cannot be read after a crash, so the second is; another one changes nothing."""
    with FaultFS(tmp_path) as faulty:
        paths = [faulty.path(name) for name in ("a.img", "b.img")]
        images = create(paths, 4 * MIB, "--vote-threshold=1")
        oracle = Oracle([0])
        with SetMount(images, tmp_path, FIFO) as disk:
            with opened(disk.file) as fd:
                oracle.write(fd, 0)
            disk.kill()
        one_more_on(faulty.backing("b.img"), oracle, 0)
        faulty.inject("a.img", "any", errno=errno.EIO)
        with SetMount(images, tmp_path, FIFO) as disk:
            with opened(disk.file) as fd:
                oracle.look(fd)
            disk.kill()
        faulty.clear()
        with SetMount(images, tmp_path, FIFO) as disk, opened(disk.file) as fd:
            oracle.look(fd)
            disk.wait_healthy()
            oracle.look(fd)


@pytest.mark.parametrize("again", ["with both", "with the target alone"])
def test_a_kill_during_a_resync(again: str, tmp_path: Path) -> None:
    """3: it goes on where it was, and until the end nobody reads from the target."""
    size = 160 * MIB
    with FaultFS(tmp_path) as faulty:
        images = create([tmp_path / "a.img", faulty.path("b.img")], size, "--vote-threshold=1")
        with SetMount(images[:1], tmp_path, "degraded") as disk, opened(disk.file) as fd:
            for offset in range(0, size, MIB):
                os.pwrite(fd, os.urandom(MIB), offset)
        with SetMount(images, tmp_path, FIFO + ",resync-rate=40M") as disk:
            disk.wait(lambda _: lacking_on_record(images[0]) < size, "progress on record")
            assert disk.replica(images[1])["state"] == "resyncing"
            disk.kill()
        left = lacking_on_record(images[0])
        assert 0 < left < size
        if again == "with the target alone":
            mountpoint = tmp_path / "mnt"
            before = seen(with_sidecars(images))
            done = quorumfs("mount", "-o", FIFO, images[1], mountpoint, check=False)
            assert done.returncode != 0
            assert str(images[0]) in done.stderr
            assert seen(with_sidecars(images)) == before
        with SetMount(list(reversed(images)), tmp_path, FIFO) as disk:
            assert disk.replica(images[0])["state"] == "current"
            disk.wait_healthy()
            assert disk.replica(images[1])["copied_bytes"] <= left
        assert same([images[0], faulty.backing("b.img")])


def lacking_on_record(image: Path) -> int:
    """What the others lack by the sidecar of *image*, which may be in use."""
    (replica,) = examine(image)["replicas"]
    lacking: list[int] = [each["bytes"] for each in replica["map"]["lacking"]]
    return sum(lacking)


def test_what_was_read_stays_though_its_source_fails(tmp_path: Path) -> None:
    """P7: after a crash a block is read from the first, which then fails: the second has it too."""
    with FaultFS(tmp_path) as faulty:
        paths = [faulty.path("a.img"), tmp_path / "b.img"]
        images = create(paths, 4 * EXTENT, "--vote-threshold=1")
        last = 4 * EXTENT // BLOCK - 1
        oracle = Oracle([last])
        with SetMount(images, tmp_path, FIFO) as disk:
            with opened(disk.file) as fd:
                for offset in range(0, 4 * EXTENT, MIB):
                    os.pwrite(fd, bytes([offset // MIB]) * MIB, offset)
                oracle.write(fd, last)
            disk.kill()
        one_more_on(faulty.backing("a.img"), oracle, last)
        with SetMount(images, tmp_path, FIFO + ",resync-rate=1M") as disk:
            with opened(disk.file) as fd:
                oracle.look(fd)
                for name in "a.img", "a.img.quorumfs":
                    faulty.inject(name, "any", errno=errno.EIO)
                os.pwrite(fd, b"w" * BLOCK, 0)
                oracle.look(fd)
            faulty.clear()
            disk.kill()


def test_a_kill_while_one_is_ejected(tmp_path: Path) -> None:
    """Nobody takes it for current afterwards; it gets what it missed, and what may differ."""
    with FaultFS(tmp_path) as faulty:
        paths = [faulty.path("a.img"), tmp_path / "b.img"]
        images = create(paths, 4 * EXTENT, "--vote-threshold=1")
        with SetMount(images, tmp_path, FIFO) as disk:
            with opened(disk.file) as fd:
                os.pwrite(fd, b"o" * BLOCK, 0)
                faulty.inject("a.img", "write", errno=errno.EIO)
                os.pwrite(fd, b"n" * BLOCK, 0)
                assert os.pread(fd, BLOCK, 0) == b"n" * BLOCK
            assert disk.replica(images[0])["state"] != "current"
            disk.kill()
        faulty.clear()
        with SetMount(images, tmp_path, FIFO) as disk:
            with opened(disk.file) as fd:
                assert os.pread(fd, BLOCK, 0) == b"n" * BLOCK
            status = disk.wait_healthy()
            assert BLOCK <= status["replicas"][0]["copied_bytes"] <= EXTENT
        assert same([faulty.backing("a.img"), images[1]])
