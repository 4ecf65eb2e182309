"""Sets of more than six replicas: made, grown while a guest writes, broken and mended."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import one_line, waits_of_python
from support.mounting import quorumfs
from support.sets import (
    BLOCK,
    CHUNK,
    EXTENT,
    MIB,
    SetMount,
    create,
    examine,
    filled,
    named,
    opened,
    read,
    refused,
    same,
    sidecar,
    tmpfs,
    write,
)

from quorumfs.decisions.sidecar import CHUNKS_PER_PAGE

SIZE = 2 * MIB
MANY = 32
REQUESTS = 200
FIFO = "read-pattern=fifo,vote-threshold=1"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Where the replicas are: 32 take their time to sync."""
    with tmpfs(tmp_path / "memory", 512 * MIB) as memory:
        yield memory


def version(image: Path) -> int:
    """The format version of a sidecar."""
    return int.from_bytes(sidecar(image).read_bytes()[8:12], "little")


def taken(image: Path) -> int:
    """The bytes that a sidecar takes on its store."""
    return sidecar(image).stat().st_blocks * 512


def assert_nothing_is_left(images: list[Path]) -> None:
    """Each sidecar is whole, and says that no replica lacks anything."""
    told = examine(*images)
    assert told["assembly"]["exit_code"] == 0
    for one in told["replicas"]:
        assert one["damage"] == []
        assert one["map"]["intent"]["chunks"] == 0
        assert [lacking["bytes"] for lacking in one["map"]["lacking"]] == [0] * len(images)


def test_a_life_of_32(memory: Path, tmp_path: Path) -> None:
    """Made, written to, killed, ejected from, resynced, looked at, and one too many."""
    images = create(named(memory, MANY), SIZE)
    assert version(images[0]) == 4
    with SetMount(images, tmp_path) as disk:
        assert disk.status()["vote_threshold"] == 17
        for chunk in range(4):
            write(disk, b"abcd"[chunk : chunk + 1], chunk)
        disk.kill()
    with SetMount(images, tmp_path) as disk:
        assert [read(disk, chunk) for chunk in range(4)] == [b"a", b"b", b"c", b"d"]
        disk.wait_healthy()
        begun = time.monotonic()
        done = quorumfs("status", "--json", disk.mountpoint)
        assert time.monotonic() - begun < 5
        assert done.stdout.count('"state": "current"') == MANY
        os.truncate(images[-1], CHUNK)  # it fails the next write, and its length comes back later
        os.truncate(images[5], CHUNK)
        write(disk, b"n", 3)
        states = disk.states()
        assert "current" not in (states[5], states[-1])
        assert states.count("current") == MANY - 2
        disk.kill()
        for image in (images[5], images[-1]):
            os.truncate(image, SIZE)
    with SetMount(images, tmp_path) as disk:
        assert read(disk, 3) == b"n"
        disk.wait_healthy()
        assert "at most 32 replicas" in one_line(
            quorumfs("add", disk.mountpoint, memory / "more.img", check=False), 1
        )
        assert not (memory / "more.img").exists()
    assert same(images)
    assert_nothing_is_left(images)
    assert max(map(taken, images)) < MIB / 4
    line = refused([*images, memory / "more.img"], tmp_path, 1)
    assert "33 replicas: a set with sidecars has at most 32" in line


def test_one_of_32_may_be_away_and_comes_back(memory: Path, tmp_path: Path) -> None:
    """It lacks what was written meanwhile, by the last bit of the last plane of the map."""
    images = create(named(memory, MANY), SIZE)
    with SetMount(images, tmp_path) as disk:
        quorumfs("offline", disk.mountpoint, images[-1])
        write(disk, b"n", 7)
    (last,) = examine(images[0])["replicas"][0]["map"]["lacking"][-1:]
    assert (last["slot"], last["path"]) == (MANY - 1, str(images[-1]))
    assert last["bytes"] >= CHUNK
    with SetMount(images, tmp_path) as disk:
        quorumfs("online", disk.mountpoint, images[-1])
        disk.wait_healthy()
        assert 0 < disk.replica(images[-1])["copied_bytes"] < SIZE
    assert same(images)


def test_a_set_of_two_becomes_one_of_eight(memory: Path, tmp_path: Path) -> None:
    """While it is written to, and killed when the seventh one may have everything or not."""
    paths = named(memory, 8)
    images = create(paths[:2], SIZE, "--vote-threshold=1")
    with SetMount(images, tmp_path, FIFO) as disk:
        for number, image in enumerate(paths[2:6], 2):
            write(disk, b"abcdefgh"[number : number + 1], number)
            quorumfs("add", "--wait", disk.mountpoint, image)
        assert {version(image) for image in paths[:6]} == {2}
        quorumfs("add", disk.mountpoint, paths[6])
        assert {version(image) for image in paths[:6]} == {4}
        write(disk, b"g", 6)
        disk.kill()
    with SetMount(paths[:7], tmp_path, FIFO) as disk:
        disk.wait_healthy()
        assert [read(disk, number) for number in range(2, 7)] == [b"c", b"d", b"e", b"f", b"g"]
        write(disk, b"h", 7)
        quorumfs("add", "--wait", disk.mountpoint, paths[7])
        disk.wait_healthy()
    assert same(paths)
    assert_nothing_is_left(paths)
    with SetMount([paths[7], *paths[:7]], tmp_path, FIFO) as disk:
        assert read(disk, 7) == b"h"
        assert disk.status()["state"] == "healthy"


def test_the_disk_of_eight_grows(memory: Path, tmp_path: Path) -> None:
    """To a second page in each plane of the map, while one is away that lacks it; killed, too."""
    images = create(named(memory, 8), SIZE)
    larger = (CHUNKS_PER_PAGE + 8) * CHUNK
    with SetMount(images, tmp_path) as disk:
        quorumfs("offline", disk.mountpoint, images[7])
        quorumfs("grow", disk.mountpoint, str(larger))
        write(disk, b"n", CHUNKS_PER_PAGE + 1)
        disk.kill()
    assert [one["damage"] for one in examine(*images[:7])["replicas"]] == [[]] * 7
    with SetMount(images, tmp_path) as disk:
        assert disk.file.stat().st_size == larger
        assert read(disk, CHUNKS_PER_PAGE + 1) == b"n"
        quorumfs("online", disk.mountpoint, images[7])
        disk.wait_healthy()
    assert same(images)
    assert_nothing_is_left(images)


def test_without_room_for_more_there_is_the_set_as_it_was(memory: Path, tmp_path: Path) -> None:
    """The sidecars cannot become larger; what they are large enough for is still recorded."""
    images = create(named(memory, 6), 8 * EXTENT, "--vote-threshold=1")
    with tmpfs(tmp_path / "other", 16 * MIB) as other:
        new = other / "new.img"
        with SetMount(images, tmp_path, FIFO) as disk:
            for extent in range(3):
                write(disk, b"a", extent * EXTENT // CHUNK)
        with SetMount(images, tmp_path, FIFO) as disk:
            with filled(memory):
                done = quorumfs("add", disk.mountpoint, new, check=False)
                assert "No space left" in one_line(done, 1)
                for extent in range(3):  # not marked before
                    write(disk, b"b", extent * EXTENT // CHUNK)
                assert disk.states() == ["current"] * 6
            assert {version(image) for image in images} == {2}
            quorumfs("add", "--wait", disk.mountpoint, new)
            assert {version(image) for image in images} == {4}
        assert same([*images, new])


def test_seven_images_become_a_set_as_they_are(memory: Path, tmp_path: Path) -> None:
    images = named(memory, 7)
    for image in images:
        image.write_bytes(b"x" * SIZE)
    with SetMount(images, tmp_path) as disk:
        assert read(disk) == b"x"
        disk.wait_healthy()
    assert version(images[0]) == 4
    assert examine(*images)["assembly"]["exit_code"] == 0


def test_c_serves_a_set_of_eight(memory: Path, tmp_path: Path) -> None:
    """All of them, and with one away: what it lacks is on record in another plane of the map."""
    images = create(named(memory, 8), SIZE)
    with SetMount(images, tmp_path) as disk, opened(disk.file) as fd:
        for receivers in (8, 7):
            os.pwrite(fd, b"a" * BLOCK, 0)  # the first touch has its marks written by threads
            before, waits = disk.status()["replicas"], waits_of_python(disk.pid)
            for _ in range(REQUESTS):
                os.pwrite(fd, b"b" * BLOCK, 0)
                assert os.pread(fd, BLOCK, 0) == b"b" * BLOCK
            assert waits_of_python(disk.pid) - waits < REQUESTS / 2
            after = disk.status()["replicas"]
            pairs = zip(before, after, strict=True)
            written = [now["writes"] - then["writes"] for then, now in pairs]
            assert written == [REQUESTS] * receivers + [0] * (8 - receivers)
            if receivers == 8:
                quorumfs("offline", disk.mountpoint, images[7])
        quorumfs("online", disk.mountpoint, images[7])
        disk.wait_healthy()
    assert same(images)
