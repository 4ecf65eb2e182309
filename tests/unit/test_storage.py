"""One image copied from another on real files; see also ``test_simulation_parts.py``."""

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from quorumfs.filesystems import Locality
from quorumfs.storage import FileStorage, Operation, TruncatedError, Value

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


def open_files() -> list[Path]:
    links = Path("/proc/self/fd").iterdir()
    return [link for link in links if link.is_symlink()]  # the listing's own one is gone


@asynccontextmanager
async def opened(path: Path, *, local: bool = True) -> AsyncGenerator[FileStorage, None]:
    where = Locality.HERE if local else Locality.ELSEWHERE
    storage = FileStorage(os.open(path, os.O_RDWR), SIZE, path.name, locality=where)
    yield storage
    await storage.close()


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


def test_a_source_that_is_closed_meanwhile_is_no_other_file(
    source: Path, target: Path, tmp_path: Path
) -> None:
    """Its number goes to the next file that is opened."""
    other = image(tmp_path / "other", bytes(SIZE))

    async def main() -> None:
        async with opened(target) as storage:
            async with opened(source) as one:
                operation = storage.copying(one, 0, SIZE)
            async with opened(other):
                assert operation is not None
                assert await outcome(storage, operation) == SIZE

    trio.run(main)
    assert str(source) not in {str(link.readlink()) for link in open_files()}
    assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize(("one_local", "other_local"), [(True, False), (False, True)])
async def test_who_depends_on_other_hosts_is_asked_by_itself(
    source: Path, target: Path, one_local: bool, other_local: bool
) -> None:
    async with opened(source, local=one_local) as one, opened(target, local=other_local) as other:
        assert other.copying(one, 0, SIZE) is None
