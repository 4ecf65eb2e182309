"""One replica's file on a real file system, and whether its path leads to it.

See also ``test_simulation_parts.py``.
"""

import ctypes
import errno
import mmap
import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from threading import Event
from time import monotonic
from typing import Any

import pytest
import trio
from support.closing import close
from trio.testing import wait_all_tasks_blocked

from quorumfs.mount.path_watch import PathWatch
from quorumfs.replica import filestorage as module
from quorumfs.replica import rangecopy
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.filesystems import Locality, locality
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation, TruncatedError, Value
from quorumfs.replica.ticks import Rhythm

KIB = 1 << 10
SIZE = 1200 * KIB
"""More than is copied between two looks at the target."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return image(tmp_path / "source", os.urandom(SIZE))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return image(tmp_path / "target", b"old" * (SIZE // 3))


def image(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def open_files() -> list[Path]:
    links = Path("/proc/self/fd").iterdir()
    return [link for link in links if link.is_symlink()]  # the listing's own one is gone


@asynccontextmanager
async def opened(path: Path, *, local: bool = True) -> AsyncGenerator[FileStorage, None]:
    where = Locality.HERE if local else Locality.ELSEWHERE
    fd = os.open(path, os.O_RDWR)
    storage = FileStorage(fd, SIZE, path.name, locality=where)
    yield storage
    await close(storage)


async def outcome(storage: FileStorage, operation: Operation) -> Value:
    """What it gives; raises what it fails with."""
    answered = trio.Event()
    answers: list[tuple[Value, OSError | None]] = []

    def done(_: Operation, value: Value, error: OSError | None) -> None:
        answers.append((value, error))
        answered.set()

    storage.submit(operation, done)
    await answered.wait()
    ((value, error),) = answers
    if error is not None:
        raise error
    return value


def copied(source: Path, target: Path, start: int, end: int) -> Value:
    """What a copy of a range gives; raises what it fails with."""

    async def main() -> Value:
        async with opened(source) as one, opened(target) as other:
            operation = other.copying(one, start, end - start)
            assert operation is not None
            return await outcome(other, operation)

    return trio.run(main)


def test_a_range_is_copied_and_nothing_else(source: Path, target: Path) -> None:
    before = target.read_bytes()
    start, end = 5 * KIB + 7, 900 * KIB + 13
    assert copied(source, target, start, end) == end - start
    after = target.read_bytes()
    assert after[start:end] == source.read_bytes()[start:end]
    assert (after[:start], after[end:]) == (before[:start], before[end:])


def test_a_truncated_source_gives_what_it_has_and_no_zeros(source: Path, target: Path) -> None:
    """R10."""
    before, left = target.read_bytes(), 700 * KIB + 100
    os.truncate(source, left)
    assert copied(source, target, 0, SIZE) == left
    assert target.read_bytes() == source.read_bytes() + before[left:]


def test_a_truncated_target_is_an_error_and_stays_as_short(source: Path, target: Path) -> None:
    """R10: a write behind its end would leave a hole of zeros where data was."""
    os.truncate(target, 300 * KIB)
    with pytest.raises(TruncatedError):
        copied(source, target, 600 * KIB, SIZE)
    assert target.stat().st_size == 300 * KIB


async def test_nothing_is_copied_from_a_source_that_is_closed(
    source: Path, target: Path, tmp_path: Path
) -> None:
    """Its number goes to the next file that is opened."""
    before = content_of(target)
    other = image(tmp_path / "other", bytes(SIZE))
    async with opened(target) as storage:
        async with opened(source) as one:
            operation = storage.copying(one, 0, SIZE)
        async with opened(other):
            assert operation is not None
            assert await outcome(storage, operation) == 0
    assert content_of(target) == before


async def test_a_source_is_closed_when_nobody_copies_from_it_any_more(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it has its locks, and cannot be opened again: who waits for it has to know."""
    begun, may_go_on, copy = Event(), Event(), rangecopy.copy_range

    def copy_slowly(*arguments: Any) -> tuple[int, int]:
        begun.set()
        assert may_go_on.wait(60)
        return copy(*arguments)

    def is_open() -> bool:
        return str(source) in {str(link.readlink()) for link in open_files()}

    async with opened(target) as storage, trio.open_nursery() as nursery:
        one = FileStorage(os.open(source, os.O_RDWR), SIZE, "source", locality=Locality.HERE)
        monkeypatch.setattr(rangecopy, "copy_range", copy_slowly)
        operation = storage.copying(one, 0, SIZE)
        assert operation is not None
        nursery.start_soon(outcome, storage, operation)
        await trio.to_thread.run_sync(begun.wait)
        nursery.start_soon(close, one)
        await wait_all_tasks_blocked()
        assert is_open()
        may_go_on.set()
    assert not is_open()
    assert content_of(target) == content_of(source)


@pytest.mark.parametrize(("one_local", "other_local"), [(True, False), (False, True)])
async def test_who_depends_on_other_hosts_is_asked_by_itself(
    source: Path, target: Path, one_local: bool, other_local: bool
) -> None:
    async with opened(source, local=one_local) as one, opened(target, local=other_local) as other:
        assert other.copying(one, 0, SIZE) is None


class PutOff:
    """Makes a function of the ``os`` module fail with EAGAIN *times* times, and then work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
        self.calls = 0
        self._function: Callable[..., object] = getattr(os, name)
        self._times = times
        monkeypatch.setattr(os, name, self._call)

    def _call(self, *arguments: object) -> object:
        self.calls += 1
        if self.calls <= self._times:
            raise BlockingIOError(errno.EAGAIN, "put off")
        return self._function(*arguments)


NEW = b"n" * KIB


@pytest.mark.parametrize("times", [1, len(module.PAUSES_S)])
async def test_what_is_put_off_is_done(
    target: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Who answers with EAGAIN has not failed."""
    monkeypatch.setattr(module, "PAUSES_S", (0.0,) * times)
    async with opened(target) as storage:
        puts_off = PutOff(monkeypatch, "pwrite", times)
        await outcome(storage, Operation(Kind.WRITE, KIB, KIB, NEW))
        assert puts_off.calls == times + 1
        PutOff(monkeypatch, "pread", times)
        assert await outcome(storage, Operation(Kind.READ, KIB, KIB)) == NEW
        PutOff(monkeypatch, "fstat", times)
        await outcome(storage, Operation(Kind.STAT))


def test_a_copy_that_is_put_off_is_done(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_off = [(KIB, errno.EAGAIN)] * 3
    copy = rangecopy.copy_range
    monkeypatch.setattr(
        rangecopy, "copy_range", lambda *arguments: put_off.pop() if put_off else copy(*arguments)
    )
    assert copied(source, target, 0, SIZE) == SIZE
    assert target.read_bytes() == source.read_bytes()


async def test_what_is_put_off_for_ever_fails(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P5: as soon as a replica that hangs would be given up, or sooner."""
    assert sum(module.PAUSES_S) < 2.0
    monkeypatch.setattr(module, "PAUSES_S", (0.0,) * 5)
    puts_off = PutOff(monkeypatch, "pwrite", 100)
    async with opened(target) as storage:
        with pytest.raises(BlockingIOError):
            await outcome(storage, Operation(Kind.WRITE, 0, KIB, NEW))
    assert puts_off.calls == 6


@pytest.mark.parametrize(("kind", "name"), [(Kind.SYNC, "fdatasync"), (Kind.SEAL, "fsync")])
async def test_a_failed_flush_is_not_tried_again(
    target: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, name: str
) -> None:
    """R4: the kernel passes on what a lost page's write failed with, once, be it EAGAIN."""
    puts_off = PutOff(monkeypatch, name, 1)
    async with opened(target) as storage:
        with pytest.raises(BlockingIOError):
            await outcome(storage, Operation(kind))
    assert puts_off.calls == 1


def pages_in_cache(path: Path) -> int:
    """How many pages of the file are in the page cache, by ``mincore(2)``.

    A read with RWF_NOWAIT would make the kernel read ahead, and find that if it was quick.
    """
    with path.open("r+b") as file, mmap.mmap(file.fileno(), SIZE) as mapping:
        resident = (ctypes.c_ubyte * -(-SIZE // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapping)
        length = ctypes.c_size_t(SIZE)
        assert ctypes.CDLL(None).mincore(ctypes.byref(start), length, resident) == 0
        del start  # else the mapping could not be closed
    return sum(page & 1 for page in resident)


async def test_what_is_evicted_is_read_from_the_medium(target: Path) -> None:
    """Needs a file system with a page cache before its medium (ext4, XFS, Btrfs) below the
    temporary directory to see that; on tmpfs the data must be there all the same.
    """
    content = os.urandom(SIZE)
    async with opened(target) as storage:
        await outcome(storage, Operation(Kind.WRITE, 0, SIZE, content))
        await outcome(storage, Operation(Kind.SYNC))
        await outcome(storage, Operation(Kind.EVICT))
        with target.open("rb") as file:
            in_memory = locality(file.fileno()) is Locality.MEMORY
        assert in_memory or not pages_in_cache(target)
        assert await outcome(storage, Operation(Kind.READ, 0, SIZE)) == content


# Whether its path still leads to it


@pytest.mark.parametrize("local", [True, False])
def test_a_path_that_leads_elsewhere_is_told(tmp_path: Path, local: bool) -> None:
    """Where the numbers of files are not to be relied on, only that nothing is there."""
    path = image(tmp_path / "a.img", bytes(SIZE))

    async def main() -> None:
        async with opened(path, local=local) as storage:
            link = tmp_path / "link"
            link.symlink_to(path)
            assert storage.astray(str(path)) is None
            assert storage.astray(str(link)) is None
            away = path.rename(tmp_path / "away")
            for gone in path, link, path / "below":
                assert "nothing is at its path" in (storage.astray(str(gone)) or "")
            link.unlink()
            link.symlink_to(away)
            assert storage.astray(str(link)) is None
            path.touch()
            reason = storage.astray(str(path))
            assert ("another one is at its path" in (reason or "")) == local

    trio.run(main)


@pytest.mark.parametrize("local", [True, False])
def test_a_file_is_lost_only_if_it_fails_what_the_same_file_opened_anew_answers(
    tmp_path: Path, local: bool
) -> None:
    """And never on a file system of this host: both have one page cache, which would be dropped."""
    path = image(tmp_path / "a.img", bytes(SIZE))

    async def main() -> None:
        async with opened(path, local=local) as storage:
            assert not storage.is_lost(str(path))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(storage.file, "read", failing)
                assert storage.is_lost(str(path)) == (not local)
                assert not storage.is_lost(str(tmp_path / "gone.img"))
                path.write_bytes(b"")
                assert not storage.is_lost(str(path)), "the one opened anew does not answer either"

    def failing(offset: int, length: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    trio.run(main)


@pytest.mark.parametrize("local", [True, False])
def test_a_search_holds_up_no_seek_of_the_fast_path(tmp_path: Path, local: bool) -> None:
    """Which seeks to the end of the same open file before each write."""
    path = image(tmp_path / "a.img", bytes(SIZE))

    def opened_now() -> int:
        return [os.readlink(link) for link in open_files()].count(str(path))

    async def main() -> None:
        async with opened(path, local=local) as storage:
            for _ in range(2):
                assert await outcome(storage, Operation(Kind.SEEK_DATA, 4 * KIB)) == 4 * KIB
            moved = os.lseek(storage.descriptor, 0, os.SEEK_CUR) != 0
            assert moved == (not local), "a search leaves its place behind"
            assert opened_now() == 1 + local

    trio.run(main)
    assert opened_now() == 0


def test_what_has_returned_is_told_while_more_returns(target: Path) -> None:
    """Threads go on while the thread of trio looks at what they have done."""
    operations = [Operation(Kind.WRITE, 0, 1, b"x") for _ in range(1000)]
    told: list[Operation] = []
    interval_s = sys.getswitchinterval()

    async def main() -> None:
        async with opened(target, local=False) as storage:
            for operation in operations:
                storage.submit(operation, lambda done, *_: told.append(done))
            until = monotonic() + 60.0
            while len(seen := set(storage.returned)) < len(operations):
                assert monotonic() < until
            assert seen == set(operations)
            assert not told  # that is for the loop to do, which had no turn
            with trio.fail_after(60):
                while len(told) < len(operations):
                    await trio.lowlevel.checkpoint()
            assert not storage.returned

    sys.setswitchinterval(1e-6)
    try:
        trio.run(main)
    finally:
        sys.setswitchinterval(interval_s)


def test_a_look_at_a_path_that_hangs_can_be_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits in a thread of its own: neither the status nor unmounting waits with it."""
    path = image(tmp_path / "a.img", bytes(SIZE))
    answering = Event()
    monkeypatch.setattr(FileStorage, "astray", lambda *_: answering.wait(60) and None)

    async def main() -> None:
        async with opened(path) as storage:
            replica = Replica(0, str(path), storage, 1)
            path_watch = PathWatch(lambda: [replica], Rhythm())
            try:
                with trio.move_on_after(0.1) as patience:
                    await path_watch.look()
                assert patience.cancelled_caught
            finally:
                answering.set()
            assert not path_watch.astray

    trio.run(main)
