"""Without the libfuse shim: a mount that works, promises less, and says so."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import MakeImages
from support.engines import ENGINES, aligned
from support.faultfs import FaultFS
from support.mounting import Mounted
from support.sparse import KEEP_SIZE, PUNCH, ZERO_RANGE, fallocate

MIB = 1 << 20
BLOCK = 4096
NAMES = ["a.img", "b.img"]
ROOT = Path(__file__).parents[2]
WAYS = list(itertools.product(ENGINES, (0, os.O_DIRECT)))


@pytest.fixture(autouse=True)
def no_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUORUMFS_NO_SHIM", "1")


@pytest.fixture
def faulty(tmp_path: Path) -> Iterator[FaultFS]:
    with FaultFS(tmp_path) as faulty:
        for name in NAMES:
            faulty.backing(name).write_bytes(bytes(MIB))
        yield faulty


def outcomes(disk: Mounted, faulty: FaultFS, open_flags: int) -> dict[tuple[str, int], object]:
    """What a write gives in every way, or how many fsyncs each replica saw before it returned."""

    def outcome(engine: str, direct: int) -> object:
        before = [faulty.counters(name).fsyncs for name in NAMES]
        fd = os.open(disk.file, os.O_RDWR | open_flags | direct)
        try:
            ENGINES[engine](fd, aligned(b"w" * BLOCK), 0, 0)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        finally:
            os.close(fd)
        return [faulty.counters(name).fsyncs - n for name, n in zip(NAMES, before, strict=True)]

    return {way: outcome(*way) for way in WAYS}


@pytest.mark.parametrize(
    ("options", "open_flags"), [("", os.O_DSYNC), ("", os.O_SYNC), ("sync", 0)]
)
def test_durable_writes(options: str, open_flags: int, faulty: FaultFS, tmp_path: Path) -> None:
    """Opens with O_DSYNC or O_SYNC and the option sync hold what they promise on every path."""
    with Mounted([faulty.path(name) for name in NAMES], tmp_path, options) as disk:
        seen = outcomes(disk, faulty, open_flags)
        flushed = {way for way, counts in seen.items() if isinstance(counts, list) and all(counts)}
        assert flushed == set(WAYS), seen
        faulty.inject("a.img", "fsync", errno=errno.EIO)
        faulty.inject("b.img", "fsync", errno=errno.EIO)
        assert outcomes(disk, faulty, open_flags) == dict.fromkeys(WAYS, "EIO")
        faulty.clear()
        disk.file.write_bytes(bytes(MIB))


def test_a_plain_write_is_no_flush(faulty: FaultFS, tmp_path: Path) -> None:
    """Doing without is not made up for by flushing everything."""
    with Mounted([faulty.path(name) for name in NAMES], tmp_path) as disk:
        assert outcomes(disk, faulty, 0) == {way: [0, 0] for way in WAYS}


def test_what_is_missing(make_images: MakeImages, tmp_path: Path) -> None:
    """No fallocate (EOPNOTSUPP, each time), no holes, and one warning that names it all."""
    with Mounted(make_images(2), tmp_path) as disk:
        fd = os.open(disk.file, os.O_RDWR)
        try:
            for mode in (0, KEEP_SIZE, PUNCH, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE) * 2:
                with pytest.raises(OSError, match="Operation not supported"):
                    fallocate(fd, mode, 0, BLOCK)
            assert os.lseek(fd, 0, os.SEEK_HOLE) == MIB
            assert os.lseek(fd, BLOCK, os.SEEK_DATA) == BLOCK
        finally:
            os.close(fd)
        warnings = [each["message"] for each in disk.log() if each["level"] == "warning"]
    assert len(warnings) == 1
    for what in (
        "QUORUMFS_NO_SHIM",
        "fast path",
        "discard",
        "SEEK_HOLE",
        "parallel",
        "max-back",
        "RWF_DSYNC",
    ):
        assert what in warnings[0]


def test_with_the_shim_nothing_is_missing(
    make_images: MakeImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is built where the tests run, and then the log has nothing to complain of."""
    monkeypatch.delenv("QUORUMFS_NO_SHIM")
    with Mounted(make_images(2), tmp_path) as disk:
        pass
    assert [each["message"] for each in disk.log() if each["level"] != "info"] == []


# Building


@pytest.mark.parametrize(
    "environment", [{"QUORUMFS_NO_SHIM": "1"}, {"CC": "false"}, {}], ids=["asked", "no cc", "with"]
)
def test_building(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked not to build the shim, or without a compiler, there is a package without it."""
    monkeypatch.delenv("QUORUMFS_NO_SHIM")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("quorumfs", ".build"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w"]
    done = subprocess.run(
        [*command, tmp_path, source],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "quorumfs/fuse/shim.py" in names
    assert any("_shim" in name for name in names) == (not environment)
