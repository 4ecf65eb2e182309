"""A file as the fast path sees it, and what the trio thread does where there is no device."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.closing import close

from quorumfs.replica import filestorage as module
from quorumfs.replica.fastfile import FORGIVEN_AFTER, REST_S, FastFile, Rest
from quorumfs.replica.filestorage import CHEAP_MAX, FileStorage
from quorumfs.replica.filesystems import Locality
from quorumfs.replica.storage import Kind, Operation, Value

SIZE = 1 << 20
FIRST, LONGEST = REST_S


def length_of(rest: Rest, now: float) -> float:
    """How long a rest lasts that began *now*, to a hundredth of the first one."""
    assert not rest.over(now)
    step, low, high = FIRST / 100, 0, round(LONGEST / FIRST * 100) + 1
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if rest.over(now + middle * step) else (middle, high)
    return high * step


def test_a_file_may_be_used_until_a_request_was_stuck_in_it() -> None:
    rest = Rest()
    assert rest.over(0.0)
    rest.begin(5.0)
    assert not rest.over(5.0 + 0.9 * FIRST)
    assert rest.over(5.0 + 1.1 * FIRST)


def test_a_file_that_is_stuck_again_and_again_rests_longer_and_longer() -> None:
    rest, now, lengths = Rest(), 100.0, []
    for _ in range(12):
        rest.begin(now)
        lengths.append(length_of(rest, now))
        now += lengths[-1]
    assert lengths[:4] == pytest.approx([FIRST, 2 * FIRST, 4 * FIRST, 8 * FIRST], rel=0.03)
    assert lengths[-1] == max(lengths) == pytest.approx(LONGEST, rel=0.01)


@given(st.integers(1, 12), st.floats(0.01, 2.0))
def test_what_is_long_ago_is_forgiven(stuck: int, ago: float) -> None:
    """Long is measured by the last rest."""
    rest, now, length = Rest(), 100.0, 0.0
    for _ in range(stuck):
        rest.begin(now)
        length = length_of(rest, now)
        now += length
    now += ago * FORGIVEN_AFTER * length
    rest.begin(now)
    expected = min(2 * length, LONGEST) if ago < 0.95 else FIRST
    if not 0.95 <= ago <= 1.05:
        assert length_of(rest, now) == pytest.approx(expected, rel=0.05)


@given(st.lists(st.floats(0.0, 1000.0)))
def test_every_rest_is_over_within_a_bound(pauses: list[float]) -> None:
    rest, now = Rest(), 0.0
    for pause in pauses:
        now += pause
        rest.begin(now)
        assert not rest.over(now)
        assert rest.over(now + LONGEST * 1.001)


# A real file


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def with_storage(path: Path, where: Locality, test: Callable[[FileStorage], None]) -> None:
    async def run() -> None:
        fd = os.open(path, os.O_RDWR)
        file = FileStorage(fd, SIZE, "a", locality=where)
        test(file)
        await trio.testing.wait_all_tasks_blocked(0.05)
        await close(file)

    trio.run(run)


@pytest.mark.parametrize("where", Locality)
def test_the_fast_path_uses_no_file_whose_answers_depend_on_others(
    where: Locality, image: Path
) -> None:
    def test(file: FileStorage) -> None:
        in_memory = where is Locality.MEMORY
        if where is Locality.ELSEWHERE:
            assert file.fast_file is None
        else:
            assert file.fast_file == FastFile(file.descriptor, memory=in_memory, reads=True)

    with_storage(image, where, test)


def test_a_file_system_that_cannot_say_what_is_cached_is_written_to_only(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory nothing has to be said."""
    monkeypatch.setattr(module, "answers_from_cache", lambda _: False)

    def test(file: FileStorage) -> None:
        assert file.fast_file is not None
        assert file.fast_file.reads is file.fast_file.memory

    for where in (Locality.HERE, Locality.MEMORY):
        with_storage(image, where, test)


def at_once(file: FileStorage, kind: Kind, length: int = 4) -> list[tuple[Value, OSError | None]]:
    """How an operation ended, if it did so before the call returned."""
    told: list[tuple[Value, OSError | None]] = []
    data = b"e" * length if kind is Kind.WRITE else b""
    operation = Operation(kind, 4096, length, data)
    file.submit(operation, lambda _, value, error: told.append((value, error)))
    return list(told)


@pytest.mark.parametrize("where", Locality)
def test_what_is_cheap_needs_no_thread_where_there_is_no_device(
    where: Locality, image: Path
) -> None:
    """A device may have been frozen since the last time."""
    content = image.read_bytes()[4096 : 4096 + CHEAP_MAX]

    def test(file: FileStorage) -> None:
        in_memory = where is Locality.MEMORY
        assert at_once(file, Kind.READ, CHEAP_MAX) == ([(content, None)] if in_memory else [])
        assert at_once(file, Kind.WRITE, CHEAP_MAX) == ([(0, None)] if in_memory else [])
        assert at_once(file, Kind.SYNC) == ([(0, None)] if in_memory else [])
        assert bool(at_once(file, Kind.STAT)) is (where is not Locality.ELSEWHERE)
        for kind in (Kind.READ, Kind.WRITE):
            assert not at_once(file, kind, CHEAP_MAX + 1)

    with_storage(image, where, test)


def test_a_write_that_fails_at_once_is_not_tried_again_by_a_thread(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R4: the second might succeed, and the page that the error was of is lost."""
    tried: list[None] = []

    def fails(*_: object) -> int:
        tried.append(None)
        raise OSError(errno.EIO, "of an earlier page")

    def test(file: FileStorage) -> None:
        with monkeypatch.context() as context:
            context.setattr(os, "pwrite", fails)
            ((_, error),) = at_once(file, Kind.WRITE)
        assert error is not None
        assert error.errno == errno.EIO
        assert len(tried) == 1
        assert at_once(file, Kind.WRITE) == [(0, None)], "it was told once"

    with_storage(image, Locality.MEMORY, test)


def test_a_truncated_image_in_memory_is_not_made_long_again(image: Path) -> None:
    """R10."""

    def test(file: FileStorage) -> None:
        ((_, error),) = at_once(file, Kind.WRITE)
        assert error is not None

    os.truncate(image, 2048)
    with_storage(image, Locality.MEMORY, test)
    assert image.stat().st_size == 2048
