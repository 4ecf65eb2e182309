"""A file past the page cache: any request does what it does to plain bytes, and no neighbour loses.

The files are real, and so is O_DIRECT; what the store refuses beyond that is played.
"""

import errno
import fcntl
import itertools
import os
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from threading import Barrier, Event, Lock
from typing import Any
from weakref import ref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quorumfs.decisions.replicaio import Medium
from quorumfs.errors import UserError
from quorumfs.replica import directfile, directopening
from quorumfs.replica.directfile import Direct, DirectFile
from quorumfs.replica.directopening import open_direct
from quorumfs.replica.filesystems import Locality, locality
from quorumfs.replica.images import open_again
from quorumfs.replica.punching import Puncher
from quorumfs.replica.regularfile import RegularFile
from quorumfs.replica.storage import Kind, TruncatedError

PAGE = 4096
SECTOR = 512
SIZES = (10 * PAGE, 10 * PAGE + SECTOR, 10 * PAGE + 100, 100)
"""Whole pages, a tail of whole sectors, one of bytes, and nothing but a tail."""


@contextmanager
def opened(
    path: Path, content: bytes | None = None, alignment: int | None = None
) -> Iterator[DirectFile]:
    """The file at *path*, given *content* first; *alignment* to use instead of the store's own."""
    if content is not None:
        path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    direct = open_direct(fd, str(path), "direct", locality(fd))
    assert direct is not None
    if alignment is not None:
        direct = Direct(direct.fd, max(alignment, direct.alignment))
    file = DirectFile(fd, os.fstat(fd).st_size, direct)
    try:
        yield file
    finally:
        file.close()


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


class Strict:
    """The system calls of a store that takes whole blocks alone, and may do less than asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, block: int, most: int = 1 << 30) -> None:
        """*most*: bytes done by one call."""
        self.block, self.most = block, most
        self.refused = 0
        self._calls = {"preadv": os.preadv, "pwritev": os.pwritev}
        for name in self._calls:
            monkeypatch.setattr(os, name, lambda *given, name=name: self._do(name, *given))

    def _do(self, name: str, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            return self._calls[name](fd, buffers, offset)
        (buffer,) = buffers
        if offset % self.block or len(buffer) % self.block:
            self.refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return self._calls[name](fd, [buffer[: self.most]], offset)


def writes(size: int) -> st.SearchStrategy[list[tuple[int, bytes]]]:
    """Writes that lie in a file of *size* bytes: any bytes, sectors, pages."""
    unit = st.sampled_from([1, SECTOR, PAGE])
    number = st.integers(0, 11 * PAGE)
    place = st.builds(lambda at, unit: at - at % unit, number, unit).map(lambda at: min(at, size))
    both = st.tuples(place, place).map(sorted)
    return st.lists(
        st.tuples(both, st.integers(1, 255)).map(
            lambda one: (one[0][0], bytes([one[1]]) * (one[0][1] - one[0][0]))
        ),
        max_size=8,
    )


@pytest.mark.parametrize("alignment", [SECTOR, PAGE, 4 * PAGE])
@pytest.mark.parametrize("size", SIZES)
def test_any_write_and_read_is_that_of_plain_bytes(
    size: int, alignment: int, tmp_path: Path
) -> None:
    @settings(max_examples=40)
    @given(writes(size), st.integers(0, size), st.integers(0, size))
    def test(changes: list[tuple[int, bytes]], one: int, other: int) -> None:
        expected = bytearray(noise(size))
        with opened(tmp_path / "a", bytes(expected), alignment) as file:
            for offset, data in changes:
                file.write(offset, data)
                expected[offset : offset + len(data)] = data
            start, end = sorted((one, other))
            assert file.read(start, end - start) == expected[start:end]
            assert file.read(0, size) == expected
        assert (tmp_path / "a").read_bytes() == expected

    test()


@pytest.mark.parametrize("most", [SECTOR, 5 * SECTOR, PAGE + SECTOR])
def test_a_call_that_does_less_is_gone_on_with(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = noise(SIZES[2])
    with opened(tmp_path / "a", content, SECTOR) as file:
        Strict(monkeypatch, SECTOR, most)
        assert file.read(100, 6 * PAGE) == content[100 : 100 + 6 * PAGE]
        file.write(700, b"n" * 3 * PAGE)
    assert (tmp_path / "a").read_bytes() == content[:700] + b"n" * 3 * PAGE + content[
        700 + 3 * PAGE :
    ]


def test_a_write_longer_than_a_buffer_leaves_what_is_beside_it(tmp_path: Path) -> None:
    content = noise(4 << 20)
    with opened(tmp_path / "a", content, PAGE) as file:
        file.write(100, b"n" * (3 << 20))
        assert file.read(50, 3 << 20) == content[50:100] + b"n" * ((3 << 20) - 50)
    after = (tmp_path / "a").read_bytes()
    assert after == content[:100] + b"n" * (3 << 20) + content[100 + (3 << 20) :]


def test_what_was_found_too_fine_is_noticed_by_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hole takes any alignment, and so says nothing of the device."""
    content = noise(SIZES[2])
    with opened(tmp_path / "a", content, SECTOR) as file:
        store = Strict(monkeypatch, PAGE)
        file.write(SECTOR, b"n" * SECTOR)
        assert file.read(SECTOR - 1, 3) == content[SECTOR - 1 : SECTOR] + b"nn"
        assert store.refused == 1
        assert file.alignment == PAGE


def test_a_store_that_refuses_whole_pages_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path / "a", noise(SIZES[0]), SECTOR) as file:
        Strict(monkeypatch, 1 << 20)
        for request in (lambda: file.read(0, PAGE), lambda: file.write(PAGE, b"n" * PAGE)):
            with pytest.raises(OSError, match="Invalid argument"):
                request()


def test_a_call_that_does_nothing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path / "a", noise(SIZES[0]), SECTOR) as file:
        Strict(monkeypatch, SECTOR, most=0)
        for request in (lambda: file.read(0, PAGE), lambda: file.write(PAGE, b"n" * PAGE)):
            with pytest.raises(OSError, match="made no progress"):
                request()


def test_neighbours_in_one_block_lose_nothing(tmp_path: Path) -> None:
    """Eight guests, each with a sector of its own of the same block, all at once."""
    rounds, count = 60, PAGE // SECTOR
    barrier = Barrier(count)
    with opened(tmp_path / "a", bytes(2 * PAGE), PAGE) as file, ThreadPoolExecutor(count) as pool:

        def guest(sector: int) -> None:
            for number in range(rounds):
                barrier.wait(60)
                mine = bytes([1 + (number * count + sector) % 251]) * SECTOR
                file.write(PAGE + sector * SECTOR, mine)
                assert file.read(PAGE + sector * SECTOR, SECTOR) == mine

        for done in [pool.submit(guest, sector) for sector in range(count)]:
            done.result()
    last = (rounds - 1) * count
    expected = b"".join(bytes([1 + (last + sector) % 251]) * SECTOR for sector in range(count))
    assert (tmp_path / "a").read_bytes() == bytes(PAGE) + expected


@pytest.mark.parametrize("alignment", [SECTOR, PAGE])
def test_what_does_not_overlap_may_be_written_at_once(alignment: int, tmp_path: Path) -> None:
    """The range locks of the disk see to it that it does not; blocks are none of their business."""
    size = SIZES[2]
    cuts = st.lists(st.integers(0, size) | st.integers(0, size // SECTOR).map(SECTOR.__mul__))

    @settings(max_examples=60)
    @given(cuts)
    def test(places: list[int]) -> None:
        expected = bytearray(noise(size))
        ranges = list(itertools.pairwise(sorted({0, *places, size})))
        with opened(tmp_path / "a", bytes(expected), alignment) as file:
            begin = Barrier(8)

            def writer(number: int) -> None:
                begin.wait(60)
                for place in range(number, len(ranges), 8):
                    start, end = ranges[place]
                    file.write(start, bytes([1 + place % 255]) * (end - start))

            list(pool.map(writer, range(8)))
            for place, (start, end) in enumerate(ranges):
                expected[start:end] = bytes([1 + place % 255]) * (end - start)
            assert file.read(0, size) == expected
        assert (tmp_path / "a").read_bytes() == expected

    with ThreadPoolExecutor(8) as pool:
        test()


class Watched:
    """A lock that tells when somebody has to wait for it."""

    def __init__(self, somebody_waits: Event) -> None:
        self._lock = Lock()
        self._somebody_waits = somebody_waits

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._somebody_waits.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def while_a_write_is_between_reading_and_writing(
    file: DirectFile,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[], None],
    other: Callable[[], None],
) -> None:
    """Begin *other* when *write* has read the rest of its block; go on when that waits, or ends."""
    read, go_on, waits = Event(), Event(), Event()
    put = DirectFile._put

    def late(*given: Any) -> None:
        read.set()
        assert go_on.wait(60)
        put(*given)

    monkeypatch.setattr(file, "_locks", [Watched(waits) for _ in file._locks])
    with ThreadPoolExecutor(2) as pool:
        with monkeypatch.context() as context:
            context.setattr(DirectFile, "_put", late)
            first = pool.submit(write)
            assert read.wait(60)
        second = pool.submit(other)
        second.add_done_callback(lambda _: waits.set())
        assert waits.wait(60)
        go_on.set()
        first.result(60)
        second.result(60)


@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.ZERO, Kind.WRITE])
def test_who_changes_the_rest_of_a_block_waits(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what the first has read puts back what the other replaced."""
    with opened(tmp_path / "a", b"o" * 2 * PAGE, PAGE) as file:

        def other() -> None:
            if kind is Kind.WRITE:
                file.write(SECTOR, bytes(SECTOR))
            else:
                Puncher(file).make_zeros(kind, SECTOR, SECTOR)

        while_a_write_is_between_reading_and_writing(
            file, monkeypatch, lambda: file.write(0, b"n" * SECTOR), other
        )
        expected = b"n" * SECTOR + bytes(SECTOR) + b"o" * (2 * PAGE - 2 * SECTOR)
        assert file.read(0, 2 * PAGE) == expected
    assert (tmp_path / "a").read_bytes() == expected


@pytest.mark.parametrize("alignment", [SECTOR, PAGE])
@pytest.mark.parametrize("kind", [Kind.DISCARD, Kind.ZERO])
def test_zeros_of_any_range_are_read_at_once_and_stay(
    kind: Kind, alignment: int, tmp_path: Path
) -> None:
    """The kernel makes those of a part of a block in its page cache."""
    size = 10 * PAGE
    expected = bytearray(noise(size))
    with opened(tmp_path / "a", bytes(expected), alignment) as file:
        puncher = Puncher(file)
        for number, (start, end) in enumerate([(100, 300), (SECTOR, 3 * PAGE + 1), (PAGE, 5000)]):
            puncher.make_zeros(kind, start, end - start)
            expected[start:end] = bytes(end - start)
            assert file.read(0, size) == expected
            file.write(end, bytes([number + 1]) * SECTOR)  # in the page with the last zeros
            expected[end : end + SECTOR] = bytes([number + 1]) * SECTOR
            os.fdatasync(file.fd)
            assert file.read(0, size) == expected
    assert (tmp_path / "a").read_bytes() == expected


@pytest.mark.parametrize("size", SIZES)
def test_a_write_at_the_end_makes_the_image_no_longer(size: int, tmp_path: Path) -> None:
    with opened(tmp_path / "a", noise(size), PAGE) as file:
        file.write(size - 50, b"n" * 50)
        assert file.read(size - 50, 50) == b"n" * 50
        assert os.fstat(file.fd).st_size == size
        assert (tmp_path / "a").read_bytes() == noise(size)[:-50] + b"n" * 50


def test_an_image_that_grows_goes_on_past_the_cache_in_its_old_tail(tmp_path: Path) -> None:
    size, larger = SIZES[2], 12 * PAGE
    with opened(tmp_path / "a", noise(size), PAGE) as file:
        file.write(size - 50, b"n" * 50)
        file.resize(size, larger - size)
        file.size = larger
        assert file.read(0, larger) == noise(size)[:-50] + b"n" * 50 + bytes(larger - size)
        file.write(size - 10, b"m" * 20)
    after = noise(size)[:-50] + b"n" * 40 + b"m" * 20
    assert (tmp_path / "a").read_bytes() == after + bytes(larger - size - 10)


@pytest.mark.parametrize("left", [0, 100, SECTOR, 5 * PAGE, 5 * PAGE + 100])
def test_what_was_truncated_is_an_error_and_stays_as_short(left: int, tmp_path: Path) -> None:
    """R10."""
    path = tmp_path / "a"
    with opened(path, noise(SIZES[0]), PAGE) as file:
        os.truncate(path, left)
        with pytest.raises(TruncatedError) as told:
            file.read(left - 1 if left else 0, 2)
        assert told.value.size == left
        # A write that keeps part of a block must not make up the rest of it.
        with pytest.raises(TruncatedError):
            file.write(left + 1, b"n")
        if left:
            assert file.read(0, left) == noise(SIZES[0])[:left]
        assert path.stat().st_size == left


def test_a_copy_goes_the_way_of_each_file(tmp_path: Path) -> None:
    """And what one way has left is what the other finds."""
    size = SIZES[2]
    with (
        opened(tmp_path / "a", noise(size), PAGE) as one,
        opened(tmp_path / "b", bytes(size), PAGE) as other,
        open(tmp_path / "c", "w+b") as plain,
    ):
        plain.truncate(size)
        buffered = RegularFile(plain.fileno(), size)
        assert other.copy_from(one, 100, size - 100) == size - 100
        assert buffered.copy_from(other, 0, size) == size
        assert other.read(0, size) == buffered.read(0, size) == bytes(100) + noise(size)[100:]
        assert one.copy_from(buffered, 0, size) == size
        assert one.read(0, size) == bytes(100) + noise(size)[100:]


def test_what_another_process_read_is_no_answer(tmp_path: Path) -> None:
    """It fills the page cache, which a direct read does not look at, and a direct write drops."""
    with opened(tmp_path / "a", noise(2 * PAGE), PAGE) as file:
        assert (tmp_path / "a").read_bytes() == noise(2 * PAGE)
        file.write(0, b"n" * PAGE)
        assert (tmp_path / "a").read_bytes()[:PAGE] == b"n" * PAGE
        with open(tmp_path / "a", "r+b", buffering=0) as other:
            other.write(b"o" * SECTOR)
        assert file.read(0, PAGE) == b"o" * SECTOR + b"n" * (PAGE - SECTOR)


def test_memory_is_used_again_and_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ref[mmap]] = []

    def noted(*given: Any, **named: Any) -> mmap:
        memory = mmap(*given, **named)
        made.append(ref(memory))
        return memory

    monkeypatch.setattr(directfile, "mmap", noted)
    with opened(tmp_path / "a", noise(SIZES[0]), PAGE) as file:
        for _ in range(50):
            file.write(0, b"n" * PAGE)
            file.read(0, PAGE)
        assert len(made) == 1
        file.return_memory()
        assert made[0]() is None
        assert file.read(0, PAGE) == b"n" * PAGE


def test_an_image_is_closed_with_all_that_was_opened_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    before = descriptors()
    with opened(path, noise(SIZES[0])) as file:
        file.write(0, b"n")
    assert descriptors() == before
    for _ in range(2):  # the second could not be locked if the first was
        image = open_again(str(path), replica_io="direct")
        assert image.direct is not None
        image.close()
    assert descriptors() == before


# Opening


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "a"
    path.write_bytes(noise(1 << 20))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


def refuses_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directopening, "_set_direct", lambda _: False)


def refuses_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directopening, "_told_alignment", lambda _: (0, 0))


def wants_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directopening, "_told_alignment", lambda _: (512, 1 << 20))


def wants_what_is_no_part_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directopening, "_told_alignment", lambda _: (512, 3 * 512))


def refuses_each_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directopening, "_told_alignment", lambda _: None)
    Strict(monkeypatch, 1 << 20)


@pytest.mark.parametrize(
    "store",
    [
        refuses_the_flag,
        refuses_the_file,
        wants_too_much,
        wants_what_is_no_part_of_a_chunk,
        refuses_each_read,
    ],
)
def test_a_store_without_direct_is_refused_or_buffered(
    store: Callable[[pytest.MonkeyPatch], None], image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    store(monkeypatch)
    with pytest.raises(UserError, match=r"/a\.img refuses O_DIRECT.*buffered, and auto"):
        open_direct(image, "/a.img", "direct", Locality.HERE)
    assert open_direct(image, "/a.img", "auto", Locality.ELSEWHERE) is None
    assert descriptors() == before


def test_a_store_that_need_not_be_direct_is_not_left_open(image: int) -> None:
    before = descriptors()
    assert open_direct(image, "/a.img", "auto", Locality.MEMORY) is None
    assert descriptors() == before


def test_the_descriptor_for_all_else_stays_buffered(image: int) -> None:
    assert open_direct(image, "/a.img", "buffered", Locality.HERE) is None
    direct = open_direct(image, "/a.img", "direct", Locality.HERE)
    assert direct is not None
    assert fcntl.fcntl(direct.fd, fcntl.F_GETFL) & os.O_DIRECT
    assert not fcntl.fcntl(image, fcntl.F_GETFL) & os.O_DIRECT
    os.close(direct.fd)


@pytest.mark.parametrize(
    ("where", "block", "alignment"),
    [
        (Locality.ELSEWHERE, 1, 1),
        (Locality.ELSEWHERE, 512, 512),
        (Locality.ELSEWHERE, 4096, 4096),
        (Locality.HERE, 1, 512),
        (Locality.HERE, 4096, 4096),
        (Locality.HERE, 65536, 65536),
    ],
)
def test_an_alignment_that_nobody_tells_is_found(
    where: Locality, block: int, alignment: int, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directopening, "_told_alignment", lambda _: None)
    read = os.preadv

    def preadv(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset % block or len(buffers[0]) % block:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return read(image, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    direct = open_direct(image, "/a.img", "direct", where)
    assert direct is not None
    assert direct.alignment == alignment
    os.close(direct.fd)


@pytest.mark.parametrize(
    ("device", "rotational", "medium"),
    [
        ("nvme0n1", "0", Medium.STEADY),
        ("nvme0n1/nvme0n1p2", "0", Medium.STEADY),
        ("sda/sda1", "1", Medium.ROTATING),
        ("nbd3/nbd3p1", "0", Medium.ELSEWHERE),
        ("rbd0", "1", Medium.ELSEWHERE),
        ("dm-0", None, Medium.UNKNOWN),
    ],
)
def test_what_holds_an_image_is_what_the_kernel_says_of_the_device(
    device: str,
    rotational: str | None,
    medium: Medium,
    image: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = tmp_path / "devices" / device.split("/", maxsplit=1)[0]
    (disk / "queue").mkdir(parents=True)
    (tmp_path / "devices" / device).mkdir(exist_ok=True)
    if rotational is not None:
        (disk / "queue/rotational").write_text(f"{rotational}\n")
    number = os.fstat(image).st_dev
    link = tmp_path / f"{os.major(number)}:{os.minor(number)}"
    link.symlink_to(tmp_path / "devices" / device)
    monkeypatch.setattr(directopening, "_SYSFS", tmp_path)
    assert directopening._medium(image, Locality.HERE) is medium
    assert directopening._medium(image, Locality.MEMORY) is Medium.MEMORY
    assert directopening._medium(image, Locality.ELSEWHERE) is Medium.ELSEWHERE
    link.unlink()
    assert directopening._medium(image, Locality.HERE) is Medium.UNKNOWN


def test_a_store_is_measured_where_an_image_has_data(image: int) -> None:
    direct = open_direct(image, "/a.img", "direct", Locality.HERE)
    assert direct is not None
    measured = directopening._measured_us(direct)
    assert measured is not None
    assert measured > 0
    os.ftruncate(image, 0)
    os.ftruncate(image, 1 << 20)
    assert directopening._measured_us(direct) is None
    os.close(direct.fd)


@pytest.mark.parametrize(("took_us", "way"), [(100.0, True), (9000.0, False)])
def test_auto_goes_by_what_was_measured(
    took_us: float, way: bool, image: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directopening, "_measured_us", lambda _: took_us)
    before = descriptors()
    direct = open_direct(image, "/a.img", "auto", Locality.HERE)
    assert (direct is not None) is way
    if direct is not None:
        os.close(direct.fd)
    assert descriptors() == before
