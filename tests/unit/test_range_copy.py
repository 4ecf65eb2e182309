"""A copy from image to image: in C, and in Python where the library is missing."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from quorumfs.replica import rangecopy
from quorumfs.replica.regularfile import RegularFile
from quorumfs.replica.storage import TruncatedError

SIZE = (1 << 20) + 12345
"""Bytes: several buffers, and a part of one."""

CONTENT = os.urandom(SIZE)


@pytest.fixture(autouse=True, params=["C", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In which the copy is made."""
    assert rangecopy.available
    monkeypatch.setattr(rangecopy, "available", request.param == "C")


@contextmanager
def opened(path: Path, data: bytes, flags: int = os.O_RDWR) -> Iterator[RegularFile]:
    """A file with *data* that is to have `SIZE` bytes."""
    path.write_bytes(data)
    file = RegularFile(os.open(path, flags), SIZE)
    try:
        yield file
    finally:
        file.close()


@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (4096, 262144), (262145, 700001)])
def test_a_range_is_copied_and_nothing_else(tmp_path: Path, offset: int, length: int) -> None:
    end = offset + length
    with opened(tmp_path / "a", CONTENT) as one, opened(tmp_path / "b", bytes(SIZE)) as other:
        assert other.copy_from(one, offset, length) == length
    expected = bytes(offset) + CONTENT[offset:end] + bytes(SIZE - end)
    assert (tmp_path / "b").read_bytes() == expected


@pytest.mark.parametrize("left", [0, 300_000])
def test_what_cannot_be_read_is_left_as_it_is(tmp_path: Path, left: int) -> None:
    with (
        opened(tmp_path / "a", CONTENT[:left]) as short,
        opened(tmp_path / "b", bytes(SIZE)) as other,
    ):
        assert other.copy_from(short, 0, SIZE) == left
    assert (tmp_path / "b").read_bytes() == CONTENT[:left] + bytes(SIZE - left)


def test_an_error_of_reading_is_none_of_the_target(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "a", CONTENT, os.O_WRONLY) as one,
        opened(tmp_path / "b", bytes(SIZE)) as other,
    ):
        assert other.copy_from(one, 0, SIZE) == 0


def test_an_error_of_writing_is_raised(tmp_path: Path) -> None:
    with (
        opened(tmp_path / "a", CONTENT) as one,
        opened(tmp_path / "b", bytes(SIZE), os.O_RDONLY) as other,
        pytest.raises(OSError, match=os.strerror(errno.EBADF)),
    ):
        other.copy_from(one, 0, SIZE)


@pytest.mark.parametrize("left", [0, 4096, SIZE - 1])
def test_a_truncated_target_stays_as_short(tmp_path: Path, left: int) -> None:
    """R10."""
    with opened(tmp_path / "a", CONTENT) as one, opened(tmp_path / "b", bytes(left)) as other:
        with pytest.raises(TruncatedError) as told:
            other.copy_from(one, 0, SIZE)
        assert told.value.size == left
    assert (tmp_path / "b").read_bytes() == bytes(left)
