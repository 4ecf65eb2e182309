"""Stores that were put back to some seconds ago, and images in the place of others.

Each of these once had old data shown, or copied over the later one.
"""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.command import one_line
from support.mounting import quorumfs
from support.sets import CHUNK, EXTENT, MIB, SetMount, create, read, same, sidecar, write

from quorumfs.errors import ExitCode

FIFO = "read-pattern=fifo,vote-threshold=1"
SIZE = 64 * MIB
FAR = 2 * EXTENT // CHUNK
"""A chunk in an extent of its own."""


def snapshot(image: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (image, sidecar(image))}


def put_back(store: dict[Path, bytes]) -> None:
    """In place: the inodes stay."""
    for path, content in store.items():
        path.write_bytes(content)


def kill(disk: SetMount) -> None:
    os.kill(disk.pid, signal.SIGKILL)
    subprocess.run(["umount", "-l", disk.mountpoint], check=True)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    return create([tmp_path / "a.img", tmp_path / "b.img"], SIZE, "--vote-threshold=1")


@pytest.mark.parametrize("unmounted", [False, True])
def test_one_that_went_offline_comes_back_by_its_last_record(
    pair: list[Path], tmp_path: Path, *, unmounted: bool
) -> None:
    with SetMount(pair, tmp_path, FIFO) as disk:
        write(disk, b"o")
        store = snapshot(pair[0])
        write(disk, b"n", FAR)
        quorumfs("offline", disk.mountpoint, pair[0])
        if not unmounted:
            put_back(store)
            quorumfs("online", disk.mountpoint, pair[0])
            disk.wait_healthy()
            assert read(disk, FAR) == b"n"
    if unmounted:
        put_back(store)
        with SetMount(pair, tmp_path, FIFO) as disk:
            quorumfs("online", disk.mountpoint, pair[0])
            disk.wait_healthy()
            assert read(disk, FAR) == b"n"
    assert same(pair)


def test_after_a_crash_one_without_a_mark_is_the_older_one(
    pair: list[Path], tmp_path: Path
) -> None:
    """It is the first, which all would be made equal to."""
    with SetMount(pair, tmp_path, FIFO) as disk:
        write(disk, b"o")
        store = snapshot(pair[0])
        write(disk, b"n", FAR)
        kill(disk)
    put_back(store)
    with SetMount(pair, tmp_path, FIFO) as disk:
        assert read(disk, FAR) == b"n"
        disk.wait_healthy()
    assert same(pair)


@pytest.mark.parametrize("cut", [False, True])
def test_what_somebody_else_did_to_an_image_after_a_crash_is_found(
    pair: list[Path], tmp_path: Path, *, cut: bool
) -> None:
    """A guest booted on it, or its end cut off and made long again: where nothing was marked."""
    with SetMount(pair, tmp_path, FIFO) as disk:
        write(disk, b"o", FAR)
    with SetMount(pair, tmp_path, FIFO) as disk:
        write(disk, b"n")
        kill(disk)
    if cut:
        os.truncate(pair[0], MIB)
        os.truncate(pair[0], SIZE)
    else:
        with pair[0].open("r+b") as image:
            image.seek(FAR * CHUNK)
            image.write(b"x" * 4096)
    later = time.time() + 1000  # nobody waits for that here
    os.utime(pair[0], (later, later))
    with SetMount(pair, tmp_path, FIFO) as disk:
        assert read(disk, FAR) == b"o"
        disk.wait_healthy()
    assert same(pair)


def test_a_majority_is_kept_after_a_crash_whatever_the_threshold(tmp_path: Path) -> None:
    """P9: one of three rots, and all three must agree on a read."""
    options = "vote-threshold=3,rewrite-corrupted"
    three = create([tmp_path / f"{one}.img" for one in "abc"], 8 * MIB, "--vote-threshold=3")
    with SetMount(three, tmp_path, options) as disk:
        write(disk, b"g")
    with SetMount(three, tmp_path, options) as disk:
        with three[0].open("r+b") as image:
            image.write(b"rot")
        write(disk, b"x", 1)
        kill(disk)
    with SetMount(three, tmp_path, options) as disk:
        disk.wait_healthy()
        assert read(disk) == b"g"
    assert same(three)


def left_behind(pair: list[Path], tmp_path: Path) -> None:
    """The second one misses a write."""
    away = [path.rename(f"{path}.away") for path in (pair[1], sidecar(pair[1]))]
    with SetMount(pair, tmp_path, f"{FIFO},degraded") as disk:
        write(disk, b"n")
    for path in away:
        path.rename(str(path).removesuffix(".away"))


def test_images_that_change_their_names_are_refused(pair: list[Path], tmp_path: Path) -> None:
    left_behind(pair, tmp_path)
    whole = pair[0].read_bytes()
    pair[0].rename(tmp_path / "c.img")
    pair[1].rename(pair[0])
    (tmp_path / "c.img").rename(pair[1])
    (tmp_path / "m").mkdir()
    done = quorumfs("mount", *pair, tmp_path / "m", check=False)
    assert "the images were renamed" in one_line(done, ExitCode.NEEDS_OPERATOR)
    assert pair[1].read_bytes() == whole


def test_a_backup_in_the_place_of_the_only_current_image_overwrites_nothing(
    pair: list[Path], tmp_path: Path
) -> None:
    left_behind(pair, tmp_path)
    pair[0].write_bytes(bytes(SIZE))
    (tmp_path / "m").mkdir()
    done = quorumfs("mount", *pair, tmp_path / "m", check=False)
    line = one_line(done, ExitCode.NEEDS_OPERATOR)
    assert f"{pair[1]} would be overwritten with it" in line
    quorumfs("resolve", "--keep", *pair[:1], *pair)
