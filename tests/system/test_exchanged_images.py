"""An older image comes to the path of a replica on FUSE, whose mount goes on showing it.

No inode number tells it there, and the sidecar is the later one: only the content can tell (R15).
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command import wait_until
from support.faultfs import FaultFS
from support.sets import CHUNK, EXTENT, SetMount, create, read, same, write

SIZE = 3 * EXTENT
FAR = 2 * EXTENT // CHUNK
"""A chunk that no write of the last mount comes near."""
OPTIONS = "read-pattern=fifo,vote-threshold=1,replica-timeout=0.5"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FaultFS]:
    """Where the first replica lies."""
    with FaultFS(tmp_path) as store:
        yield store


@pytest.fixture
def pair(store: FaultFS, tmp_path: Path) -> list[Path]:
    """A set of two, the first one on FUSE, that was written to and closed."""
    paths = create([store.path("a.img"), tmp_path / "b.img"], SIZE, "--vote-threshold=1")
    with SetMount(paths, tmp_path, OPTIONS) as disk:
        write(disk, b"o", FAR)
    return paths


def is_ejected(disk: SetMount, path: Path) -> bool:
    return bool(disk.replica(path)["state"] != "current")


def test_an_old_image_is_not_believed_after_a_crash(
    store: FaultFS, pair: list[Path], tmp_path: Path
) -> None:
    old = store.backing("a.img").read_bytes()
    with SetMount(pair, tmp_path, OPTIONS) as disk:
        write(disk, b"n", FAR)
    with SetMount(pair, tmp_path, OPTIONS) as disk:  # which has forgotten where it wrote
        write(disk, b"m", 9)
        os.kill(disk.pid, signal.SIGKILL)
        subprocess.run(["umount", "-l", disk.mountpoint], check=True)
    store.backing("a.img").write_bytes(old)
    with SetMount(pair, tmp_path, OPTIONS) as disk:
        assert read(disk, FAR) == b"n"
        disk.wait_healthy()
        assert read(disk, FAR) == b"n"
    assert same([store.backing("a.img"), pair[1]])


@pytest.mark.parametrize("exchanged", [True, False])
def test_an_old_image_is_not_believed_when_its_server_is_back(
    store: FaultFS, pair: list[Path], tmp_path: Path, *, exchanged: bool
) -> None:
    """And one that proves itself gets what it lacks, and no more."""
    old = store.backing("a.img").read_bytes()
    with SetMount(pair, tmp_path, OPTIONS) as disk:
        write(disk, b"n", FAR)
    with SetMount(pair, tmp_path, OPTIONS) as disk:
        write(disk, b"m", 9)
        store.hang("a.img")
        write(disk, b"l", 5)
        wait_until(lambda: is_ejected(disk, pair[0]), "the ejection")
        if exchanged:
            store.backing("a.img").write_bytes(old)
        store.release()
        disk.wait_healthy()
        for chunk, letter in ((FAR, b"n"), (5, b"l"), (9, b"m")):
            assert read(disk, chunk) == letter
        (resync,) = disk.events("RESYNC_STARTED")
        assert (resync["bytes"] == SIZE) is exchanged
    assert same([store.backing("a.img"), pair[1]])
