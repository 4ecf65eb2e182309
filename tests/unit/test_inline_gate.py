"""Which files are waited for in the trio thread."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from support.closing import close
from support.faultfs import FaultFS

from quorumfs.replica import filestorage, pagecache
from quorumfs.replica.filestorage import CACHE_PROBES, CHEAP_MAX, FileStorage
from quorumfs.replica.filesystems import Locality, locality
from quorumfs.replica.inline_gate import PROMPT_NS, REST_NS, TOO_LONG_NS, WATCHED_NS, InlineGate
from quorumfs.replica.storage import Attempt, Kind, Operation, Value

SIZE = 1 << 20
FIRST, LONGEST = REST_NS
SLOW = 2 * PROMPT_NS


def test_a_file_that_waited_is_not_trusted_until_it_has_rested() -> None:
    inline_gate = InlineGate()
    inline_gate.took(SLOW, now=1000, waited=True)
    assert not inline_gate.trusted
    inline_gate.look_again(1000 + FIRST - 1)
    assert not inline_gate.trusted
    inline_gate.look_again(1000 + FIRST)
    assert inline_gate.trusted


def test_a_thread_that_lacked_a_processor_is_no_fault_of_the_file() -> None:
    inline_gate = InlineGate()
    inline_gate.took(SLOW, now=1000, waited=False)
    assert inline_gate.trusted
    assert inline_gate.watched
    inline_gate.look_again(1000 + WATCHED_NS)
    assert not inline_gate.watched


def test_what_takes_far_too_long_is_not_done_again_whatever_the_reason() -> None:
    inline_gate = InlineGate()
    inline_gate.took(TOO_LONG_NS + 1, now=1000, waited=False)
    assert not inline_gate.trusted


def test_a_file_that_stays_slow_rests_longer_and_longer() -> None:
    inline_gate = InlineGate()
    now = 0
    rests = []
    for _ in range(12):
        inline_gate.took(SLOW, now, waited=True)
        began = now
        while not inline_gate.trusted:
            now += FIRST
            inline_gate.look_again(now)
        rests.append(now - began)
    assert rests[:3] == [FIRST, 2 * FIRST, 4 * FIRST]
    assert max(rests) == rests[-1] == LONGEST
    inline_gate.took(SLOW, now + 100 * LONGEST, waited=True)
    inline_gate.look_again(now + 100 * LONGEST + FIRST)
    assert inline_gate.trusted, "long ago is forgiven"


def test_it_rests_on_while_threads_find_it_slow() -> None:
    inline_gate = InlineGate()
    inline_gate.took(SLOW, now=0, waited=True)
    inline_gate.took(TOO_LONG_NS + 1, now=FIRST - 1, waited=True)
    inline_gate.look_again(FIRST)
    assert not inline_gate.trusted


@given(st.lists(st.tuples(st.integers(0, 10**12), st.booleans(), st.integers(0, 10**9))))
def test_whoever_becomes_prompt_is_trusted_again_within_a_bound(
    history: list[tuple[int, bool, int]],
) -> None:
    inline_gate, now = InlineGate(), 0
    for duration, waited, later in history:
        now += later
        inline_gate.took(duration, now, waited=waited)
    until = now + LONGEST + WATCHED_NS
    while inline_gate.watched:  # nobody looks any more when it is not watched
        assert now <= until + FIRST
        now += FIRST
        inline_gate.look_again(now)
    assert inline_gate.trusted


# A real file


def with_storage(path: Path, test: Callable[[FileStorage], None], *, inline: bool = True) -> None:
    async def run() -> None:
        fd = os.open(path, os.O_RDWR)
        file = FileStorage(fd, SIZE, "a", locality=locality(fd), inline=inline)
        test(file)
        await close(file)

    trio.run(run)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def test_what_is_in_the_page_cache_is_read_and_written_at_once(image: Path) -> None:
    def test(file: FileStorage) -> None:
        assert file.may_inline
        assert file.write_now(4096, b"new" * 100) is Attempt.DONE
        assert file.read_now(4096, 300) == b"new" * 100

    with_storage(image, test)
    assert image.read_bytes()[4096:4396] == b"new" * 100


def test_whoever_is_distrusted_is_looked_at_again(image: Path) -> None:
    """Also when a thread was amid saying so while the loop looked."""

    def test(file: FileStorage) -> None:
        file.inline_gate.trusted = file.inline_gate.watched = False
        assert file.may_inline

    with_storage(image, test)


def test_without_inline_io_nothing_is_done_at_once(image: Path) -> None:
    def test(file: FileStorage) -> None:
        assert not file.may_inline

    with_storage(image, test, inline=False)


def test_a_file_system_that_depends_on_others_is_never_waited_for(tmp_path: Path) -> None:
    def test(file: FileStorage) -> None:
        assert not file.may_inline

    with FaultFS(tmp_path) as faulty:
        faulty.backing("a.img").write_bytes(bytes(SIZE))
        with_storage(faulty.path("a.img"), test)


def test_what_is_not_in_the_page_cache_is_left_to_a_thread(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_cached(*_: object) -> int:
        raise BlockingIOError(errno.EAGAIN, "not cached")

    def test(file: FileStorage) -> None:
        assert file.read_now(0, 4096) is None

    monkeypatch.setattr(os, "preadv", not_cached)
    with_storage(image, test)


def test_reads_that_are_not_cached_are_not_tried_while_that_is_to_be_expected(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read with RWF_NOWAIT may wait for the file system's own data before it says so."""
    tried = []
    cached = True
    preadv = os.preadv

    def counted(*arguments: Any) -> int:
        tried.append(arguments)
        if not cached:
            raise BlockingIOError(errno.EAGAIN, "not cached")
        return preadv(*arguments)

    def test(file: FileStorage) -> None:
        nonlocal cached
        monkeypatch.setattr(os, "preadv", counted)
        monkeypatch.setattr(filestorage, "is_cached", lambda *_: cached)
        cached = False
        assert file.read_now(0, 4096) is None
        assert not tried, "nothing has shown yet that anything is cached"
        cached = True
        for _ in range(CACHE_PROBES):
            assert file.read_now(0, 4096) is not None
        cached = False
        tried.clear()
        for _ in range(CACHE_PROBES):
            assert file.read_now(0, 4096) is None
        assert len(tried) == 1

    with_storage(image, test)


def test_the_kernel_is_asked_what_is_cached(image: Path) -> None:
    with image.open("rb") as file:
        os.pread(file.fileno(), SIZE, 0)
        assert pagecache.is_cached(file.fileno(), 100, 8192)
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        release = tuple(int(part) for part in os.uname().release.split(".")[:2])
        assert pagecache.is_cached(file.fileno(), 100, 8192) is (release < (6, 5))


def outcome_of(file: FileStorage, kind: Kind) -> OSError | None:
    """How an operation ends that ends at once."""
    told: list[OSError | None] = []
    file.submit(Operation(kind, 4096, 4, b"new!"), lambda _, __, error: told.append(error))
    (outcome,) = told
    return outcome


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.DISCARD, Kind.SYNC])
def test_an_error_of_a_write_is_told_and_not_tried_away(
    image: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    """R3, R4: the kernel tells only once of a page that was lost, if need be to a later write."""

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "of an earlier page")

    def test(file: FileStorage) -> None:
        with monkeypatch.context() as context:
            context.setattr(os, "pwrite", fails)
            assert file.write_now(4096, b"new!") is Attempt.PARTLY
        assert file.write_now(4096, b"new!") is Attempt.NOTHING, "before it is told"
        error = outcome_of(file, kind)
        assert error is not None
        assert error.errno == errno.EIO
        assert file.write_now(4096, b"new!") is Attempt.DONE

    with_storage(image, test)


def write_at_once(file: FileStorage, length: int = 4) -> list[OSError | None]:
    """How a write that was submitted ended, if it did."""
    told: list[OSError | None] = []
    operation = Operation(Kind.WRITE, 4096, length, b"e" * length)
    file.submit(operation, lambda _, __, error: told.append(error))
    return told


@pytest.mark.parametrize("where", Locality)
def test_small_writes_need_no_thread_where_there_is_no_device(where: Locality, image: Path) -> None:
    """A device may have been frozen since the last one."""

    async def run() -> None:
        for inline in True, False:
            fd = os.open(image, os.O_RDWR)
            file = FileStorage(fd, SIZE, "a", locality=where, inline=inline)
            at_once = [None] if inline and where is Locality.MEMORY else []
            assert write_at_once(file) == write_at_once(file, CHEAP_MAX) == at_once
            assert not write_at_once(file, CHEAP_MAX + 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await close(file)

    trio.run(run)


def test_a_write_that_fails_at_once_is_not_tried_again_by_a_thread(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: the second might succeed, and the page that the error was of is lost."""
    tried: list[None] = []

    def fails(*_: object) -> int:
        tried.append(None)
        raise OSError(errno.EIO, "of an earlier page")

    async def run() -> None:
        fd = os.open(image, os.O_RDWR)
        file = FileStorage(fd, SIZE, "a", locality=Locality.MEMORY, inline=True)
        with monkeypatch.context() as context:
            context.setattr(os, "pwrite", fails)
            (error,) = write_at_once(file)
        assert error is not None
        assert error.errno == errno.EIO
        assert len(tried) == 1
        assert write_at_once(file) == [None], "it was told once"
        await close(file)

    trio.run(run)


def test_what_is_cheap_needs_no_thread_because_another_replica_does(image: Path) -> None:
    def at_once(file: FileStorage, length: int, kind: Kind = Kind.READ) -> Value | None:
        told: list[Value] = []
        file.submit(Operation(kind, 0, length), lambda _, value, __: told.append(value))
        return told[0] if told else None

    content = image.read_bytes()

    async def run() -> None:
        for inline in True, False:
            fd = os.open(image, os.O_RDWR)
            file = FileStorage(fd, SIZE, "a", locality=Locality.HERE, inline=inline)
            assert at_once(file, CHEAP_MAX) == (content[:CHEAP_MAX] if inline else None)
            assert at_once(file, CHEAP_MAX + 1) is None
            assert (at_once(file, 0, Kind.STAT) is not None) is inline
            await trio.testing.wait_all_tasks_blocked(0.05)
            await close(file)

    trio.run(run)


def test_a_write_does_not_wait_for_a_search(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search holds locks of the file while it waits for the device."""
    searching, may_go_on = threading.Event(), threading.Event()
    lseek = os.lseek

    def slow(fd: int, offset: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            searching.set()
            may_go_on.wait()
        return lseek(fd, offset, whence)

    async def run() -> None:
        fd = os.open(image, os.O_RDWR)
        file = FileStorage(fd, SIZE, "a", locality=Locality.HERE, inline=True)
        monkeypatch.setattr(os, "lseek", slow)
        done = trio.Event()
        file.submit(Operation(Kind.SEEK_HOLE, 0, 0), lambda *_: done.set())
        searching.wait()
        assert file.write_now(0, b"new!") is Attempt.NOTHING
        may_go_on.set()
        await done.wait()
        assert file.write_now(0, b"new!") is Attempt.DONE
        await close(file)

    trio.run(run)


def test_a_truncated_image_is_neither_read_nor_made_long_again(image: Path) -> None:
    """R10."""

    def test(file: FileStorage) -> None:
        assert file.read_now(4096, 8192) is None
        assert file.write_now(16384, b"x" * 4096) is Attempt.NOTHING

    os.truncate(image, 8192)
    with_storage(image, test)
    assert image.stat().st_size == 8192


def test_while_a_thread_waits_long_nobody_else_does(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that hangs is met first by whoever syncs."""
    entered, release = threading.Event(), threading.Event()

    def hang(_: int) -> None:
        entered.set()
        release.wait()

    async def run() -> None:
        done = trio.Event()
        fd = os.open(image, os.O_RDWR)
        file = FileStorage(fd, SIZE, "a", locality=Locality.HERE, inline=True)
        file.submit(Operation(Kind.SYNC), lambda *_: done.set())
        await trio.to_thread.run_sync(entered.wait)
        await trio.sleep(2 * TOO_LONG_NS / 1e9)
        while_it_hangs = file.may_inline
        release.set()
        await done.wait()
        assert (while_it_hangs, file.may_inline) == (False, True)
        await close(file)

    monkeypatch.setattr(os, "fdatasync", hang)
    trio.run(run)
