"""A place that no replica can be read at costs an error there, and nothing else."""

import errno
import os
from pathlib import Path

import pytest
from support.command import wait_until
from support.faultfs import FaultFS
from support.mounting import quorumfs
from support.sets import CHUNK, EXTENT, SetMount, create, opened, write

BAD = 3 * CHUNK
BLOCK = 4096


def test_a_sector_bad_everywhere_costs_an_error_there_until_it_is_written(tmp_path: Path) -> None:
    """Scenario 105: after a crash, with default options; also when it is mounted again."""
    stores = [tmp_path / "one", tmp_path / "two"]
    for store in stores:
        store.mkdir()
    with FaultFS(stores[0]) as one, FaultFS(stores[1]) as two:
        images = create([one.path("a.img"), two.path("b.img")], 2 * EXTENT)
        options = "read-pattern=fifo,vote-threshold=1"
        with SetMount(images, tmp_path, options) as disk:
            with opened(disk.file, os.O_RDWR) as fd:
                os.pwrite(fd, b"x" * EXTENT, 0)
                os.fsync(fd)
            disk.kill()
        for faulty, name in (one, "a.img"), (two, "b.img"):
            faulty.inject(name, "read", start=BAD, end=BAD + BLOCK, errno=errno.EIO)
        for _ in range(2):
            with SetMount(images, tmp_path, options) as disk, opened(disk.file, os.O_RDWR) as fd:
                os.pwrite(fd, b"y" * BLOCK, EXTENT)
                os.fsync(fd)
                with pytest.raises(OSError, match="Input/output"):
                    os.pread(fd, BLOCK, BAD)
                assert os.pread(fd, BLOCK, BAD - BLOCK) == b"x" * BLOCK
                assert os.pread(fd, BLOCK, BAD + BLOCK) == b"x" * BLOCK
                disk.wait(lambda status: status["state"] == "degraded", "all but that to be equal")
                assert disk.status()["unreadable"] == [{"offset": BAD, "length": BLOCK}]
                told = quorumfs("status", disk.mountpoint, check=False)
                assert told.returncode == 1
                assert f"{BLOCK} bytes at {BAD} can be read on no replica" in told.stdout
        one.clear("a.img")
        two.clear("b.img")
        with SetMount(images, tmp_path, options) as disk:
            write(disk, b"z", BAD // CHUNK)
            with opened(disk.file) as fd:
                assert os.pread(fd, BLOCK, BAD) == b"z" * BLOCK
            wait_until(lambda: disk.status()["state"] == "healthy", "a healthy disk")
            assert disk.status()["unreadable"] == []
