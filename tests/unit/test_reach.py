"""How far zeros are made at a time: far where it is quick, and never long."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from support.closing import close
from support.sparse import allocated

from quorumfs.replica import punching
from quorumfs.replica import reach as module
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.reach import FLOOR, GROWTH_MAX, LEAST, LONG_NS, Reach
from quorumfs.replica.storage import Kind, Operation, Value

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SIZE = 4 * TIB


def test_holes_are_soon_punched_at_any_length() -> None:
    reach = Reach()
    punched = 0
    while reach.length < 16 * TIB:
        reach.took(reach.length, 0, duration_ns=10_000)
        punched += 1
    assert punched <= 5
    assert reach.data == LEAST  # nothing was learnt of data


def test_a_store_that_is_slow_from_the_beginning_is_asked_for_no_more() -> None:
    """2 MB/s, where zeros have to be written: half a second each, and no timeout is near."""
    reach = Reach()
    for _ in range(10):
        reach.took(LEAST, LEAST, duration_ns=500_000_000)
        assert reach == Reach()


def test_what_took_too_long_is_done_in_shorter_pieces() -> None:
    reach = Reach(length=16 * TIB, data=GIB)
    reach.took(TIB, GIB, duration_ns=10 * LONG_NS)
    assert reach == Reach(TIB // 10, GIB // 10)
    for _ in range(20):
        reach.took(reach.length, reach.data, duration_ns=10 * LONG_NS)
    assert reach == Reach(FLOOR, FLOOR)


def test_what_was_not_long_grows_to_the_floor() -> None:
    """Where data takes nearly as long as it may, most of that may be the cost of any operation."""
    reach = Reach()
    for _ in range(4):
        reach.took(reach.length, reach.data, duration_ns=LONG_NS)
    assert reach == Reach(FLOOR, FLOOR)


def test_a_short_request_tells_nothing() -> None:
    reach = Reach(TIB, GIB)
    reach.took(4096, 4096, duration_ns=100 * LONG_NS)
    assert reach == Reach(TIB, GIB)


def test_no_piece_is_many_times_as_long_as_one_that_was_quick() -> None:
    reach = Reach()
    reach.took(LEAST, LEAST, duration_ns=1)
    assert reach == Reach(GROWTH_MAX * LEAST, GROWTH_MAX * LEAST)
    reach.took(LEAST, LEAST, duration_ns=1)  # it could have been more: nothing is learnt of that
    assert reach == Reach(GROWTH_MAX * LEAST, GROWTH_MAX * LEAST)


# On a file


async def perform(file: FileStorage, kind: Kind, offset: int, length: int) -> Value:
    """Do one operation; returns its value, or raises its error."""
    answers: list[tuple[Value, OSError | None]] = []
    answered = trio.Event()

    def done(_: Operation, value: Value, error: OSError | None) -> None:
        answers.append((value, error))
        answered.set()

    file.submit(Operation(kind, offset, length), done)
    await answered.wait()
    ((value, error),) = answers
    if error is not None:
        raise error
    return value


async def zeroed(file: FileStorage, offset: int, end: int) -> list[tuple[int, int]]:
    """Make zeros as a disk does; the pieces, ``(start, end)``."""
    pieces = []
    while offset < end:
        stop = await perform(file, Kind.REACH, offset, end - offset)
        assert isinstance(stop, int)
        assert offset < stop <= end
        await perform(file, Kind.DISCARD, offset, stop - offset)
        pieces.append((offset, stop))
        offset = stop
    return pieces


@pytest.fixture
def sparse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image of 4 TiB with 1 MiB of data at each TiB; no machine is too busy here."""
    monkeypatch.setattr(module, "LONG_NS", 10**12)
    monkeypatch.setattr(punching, "LONG_NS", 10**12)
    path = tmp_path / "a.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for at in range(0, SIZE, TIB):
            file.seek(at)
            file.write(b"x" * MIB)
    return path


def opened(path: Path) -> FileStorage:
    return FileStorage(os.open(path, os.O_RDWR), SIZE, "a")


async def test_a_sparse_image_of_many_tib_takes_some_punches(sparse: Path) -> None:
    file = opened(sparse)
    pieces = await zeroed(file, 4096, SIZE)
    assert len(pieces) <= 10
    again = await zeroed(file, 0, SIZE)
    assert len(again) == 1
    assert allocated(sparse) <= 32 << 10
    await close(file)


async def test_a_piece_has_bounded_data_and_ends_at_a_whole_mib(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However far the holes between reach: blocks cut in two would keep their space."""
    monkeypatch.setattr(module, "GROWTH_MAX", 1)
    monkeypatch.setattr(module, "FLOOR", LEAST)
    file = opened(sparse)
    file._puncher._reach.length = SIZE
    pieces = await zeroed(file, 4096, SIZE)
    assert len(pieces) == 5  # one for each piece of data, of which the first is cut
    assert all(stop % MIB == 0 for _, stop in pieces)
    await close(file)


Fallocate = Callable[[int, int, int, int], int]


async def test_terabytes_of_zeros_are_never_written_at_once(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where the file system never could punch, nor where it cannot any more; what is a hole
    to SEEK_HOLE need not be zeros to who has dirty pages there."""
    asked: list[int] = []

    def refuse(_fd: int, _mode: int, _offset: int, length: int) -> int:
        asked.append(length)
        ctypes.set_errno(95)
        return -1

    class Libc:
        fallocate: Fallocate = staticmethod(refuse)

    monkeypatch.setattr(punching, "_libc", Libc)
    file = opened(sparse)
    pieces = await zeroed(file, 0, 300 * MIB)
    assert asked == [LEAST]
    assert max(stop - start for start, stop in pieces) <= 64 * MIB
    assert allocated(sparse) >= 300 * MIB
    file._puncher._modes_missing.clear()
    with pytest.raises(OSError, match="no holes any more"):
        await perform(file, Kind.DISCARD, 0, TIB)
    assert allocated(sparse) < 400 * MIB
    await close(file)


async def test_where_data_ends_is_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each piece of it: tmpfs looks at all of the rest each time."""
    monkeypatch.setattr(module, "GROWTH_MAX", 1)
    monkeypatch.setattr(module, "FLOOR", LEAST)
    path = tmp_path / "a.img"
    path.write_bytes(b"x" * 16 * MIB)
    seek, looked = os.lseek, []

    def counted(fd: int, offset: int, whence: int) -> int:
        looked.extend([offset] if whence == os.SEEK_HOLE else [])
        return seek(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", counted)
    file = FileStorage(os.open(path, os.O_RDWR), 16 * MIB, "a")
    pieces = await zeroed(file, 0, 16 * MIB)
    assert len(pieces) == 16
    assert looked == [0]
    await close(file)
