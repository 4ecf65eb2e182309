"""What quorumfs promises beyond QEMU's driver, with replicas that do their worst to break it.

Mostly without metadata, so that a replica that failed once is still asked and read.
"""

import errno
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeImages
from support.faultfs import FaultFS, Operation
from support.faultydisk import DirectFile, FaultyDisk, answer
from support.mounting import Mounted, as_qemu
from support.sets import tmpfs

BLOCK = 4096
SIZE = 64 * BLOCK
OLD, NEW, NEWER = (letter * BLOCK for letter in (b"o", b"n", b"N"))
GOOD = b"".join(b"%015d\n" % number for number in range(SIZE // 16))

FIFO = "read-pattern=fifo,vote-threshold=1"
QUORUM = "read-pattern=quorum,vote-threshold=2"
REWRITE = ",rewrite-corrupted"

Start = Callable[..., FaultyDisk]


both_ways = pytest.mark.parametrize("metadata", ["none", "sidecar"])


@pytest.fixture
def metadata() -> str:
    return "none"


@pytest.fixture
def start(tmp_path: Path, metadata: str) -> Iterator[Start]:
    """Mounts a disk: ``start(options, 3)`` on equal replicas, or on a list of contents."""
    with ExitStack() as stack:

        def start(options: str, replicas: int | list[bytes]) -> FaultyDisk:
            contents = [GOOD] * replicas if isinstance(replicas, int) else replicas
            if metadata == "none":
                return stack.enter_context(FaultyDisk(tmp_path, contents, as_qemu(options)))
            return stack.enter_context(FaultyDisk(tmp_path, contents, options, as_set=True))

        yield start


@contextmanager
def in_background(disk: FaultyDisk) -> Iterator[ThreadPoolExecutor]:
    """Threads for requests that hang; at the end faults are cleared, so that they return."""
    with ThreadPoolExecutor() as pool:
        try:
            yield pool
        finally:
            disk.fs.clear()


def changed(content: bytes, *blocks: int) -> bytes:
    """*content* with other data in some blocks."""
    result = bytearray(content)
    for block in blocks:
        result[block * BLOCK : (block + 1) * BLOCK] = bytes([block]) * BLOCK
    return bytes(result)


def fail_block(disk: FaultyDisk, name: str, op: Operation, block: int, **how: Any) -> None:
    how = how or {"errno": errno.EIO}
    disk.fs.inject(name, op, start=block * BLOCK, end=(block + 1) * BLOCK, **how)


# Bad blocks


@pytest.mark.parametrize(
    ("options", "corrupt", "unreadable", "metadata"),
    [
        (QUORUM, {"a.img": 1, "b.img": 5, "c.img": 9}, {}, "none"),
        (QUORUM, {"a.img": 1, "b.img": 5, "c.img": 9}, {}, "sidecar"),
        (QUORUM, {}, {"a.img": 1, "b.img": 5, "c.img": 9}, "none"),
        (QUORUM, {"a.img": 1, "c.img": 9}, {"b.img": 5}, "none"),
        (FIFO, {}, {"a.img": 1, "b.img": 5, "c.img": 9}, "none"),
    ],
    ids=["corrupt", "corrupt-sidecar", "unreadable", "mixed", "fifo"],
)
def test_disjoint_bad_blocks_stay_readable(
    start: Start,
    options: str,
    corrupt: dict[str, int],
    unreadable: dict[str, int],
) -> None:
    """Replicas that are bad at different places make one good disk, in one request."""
    names = ("a.img", "b.img", "c.img")
    contents = [changed(GOOD, *[corrupt[name]] if name in corrupt else []) for name in names]
    disk = start(options, contents)
    for name, block in unreadable.items():
        fail_block(disk, name, "read", block)
    for offset, length in ((0, SIZE), (100, SIZE - 200), (BLOCK - 1, 9 * BLOCK)):
        assert disk.file.read(offset, length) == GOOD[offset : offset + length]


@both_ways
def test_short_transfers_of_a_replica_are_no_error_and_no_loss(start: Start) -> None:
    """A replica may move less than asked at a time; nobody votes on, or keeps, the rest as is."""
    disk = start("read-pattern=quorum,vote-threshold=3", 3)
    disk.fs.inject("a.img", "any", short=1000)
    disk.fs.inject("b.img", "any", short=BLOCK)
    assert disk.file.read(1, SIZE) == GOOD[1:]
    assert disk.file.write(5, NEW * 4) == 4 * BLOCK
    expected = GOOD[:5] + NEW * 4 + GOOD[5 + 4 * BLOCK :]
    assert disk.replicas() == [expected] * 3


# Requests at the same time


@both_ways
@pytest.mark.parametrize("replicas", [2, 3])
def test_a_read_during_a_slow_write_is_before_or_after_it(start: Start, replicas: int) -> None:
    """Never an error though the replicas differ meanwhile, never half of each, never too old."""
    disk = start(QUORUM, [OLD * 4] * replicas)
    disk.fs.inject("b.img", "write", delay=0.01)
    acknowledged = -1
    done = threading.Event()

    def read_on() -> None:
        while not done.is_set():
            before = acknowledged
            (seen,) = set(disk.file.read(0, 4 * BLOCK))
            assert before < 0 or before <= seen <= acknowledged + 1

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read_on) for _ in range(2)]
        try:
            for number in range(60):
                disk.file.write(0, bytes([number]) * 4 * BLOCK)
                acknowledged = number
        finally:
            done.set()
        for reader in readers:
            reader.result()


@both_ways
@pytest.mark.parametrize(
    ("op", "request_"),
    [
        ("fsync", lambda file: file.flush()),
        ("write", lambda file: file.write(0, NEW)),
        ("read", lambda file: file.read(0, BLOCK)),
    ],
    ids=["flush", "write", "read"],
)
def test_replicas_are_asked_at_the_same_time(
    start: Start, op: Operation, request_: Callable[[DirectFile], object]
) -> None:
    """Three slow replicas cost the time of one: all have the request before any has answered."""
    disk = start("read-pattern=quorum,vote-threshold=3", 3)
    with in_background(disk) as pool:
        for name in disk.names:
            disk.fs.hang(name, op)
        request = pool.submit(request_, disk.file)
        for name in disk.names:
            disk.fs.wait_for(lambda counters: counters.in_flight == 1, name)
        assert not request.done()
        disk.fs.clear()
        request.result(60)


@both_ways
def test_a_flush_takes_as_long_as_the_slowest(start: Start) -> None:
    """Two seconds on each of three replicas are two seconds, where QEMU takes six."""
    disk = start("read-pattern=quorum,vote-threshold=3", 3)
    disk.file.write(0, NEW)
    before = [disk.fs.counters(name).fsyncs for name in disk.names]
    for name in disk.names:
        disk.fs.inject(name, "fsync", delay=2)
    began = time.monotonic()
    disk.file.flush()
    assert 2 <= time.monotonic() - began < 6
    after = [disk.fs.counters(name).fsyncs for name in disk.names]
    assert [last - first for first, last in zip(before, after, strict=True)] == [1, 1, 1]


def qemu_io(disk: FaultyDisk, commands: Sequence[str]) -> None:
    """Have qemu-io issue writes at once, with native AIO, and wait for all of them.

    The kernel sends the writes of threads to one FUSE file one after the other.
    """
    done = subprocess.run(
        ["qemu-io", "-f", "raw", "-n", "-i", "native", str(disk.mounted.file)],
        input="\n".join([*commands, "aio_flush\n"]),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "failed" not in done.stdout + done.stderr


@both_ways
def test_overlapping_writes_take_turns(start: Start) -> None:
    """R6: no replica has the second while another may still have to apply the first.

    A write elsewhere does not wait.
    """
    disk = start(QUORUM, [OLD * 16] * 3)
    with in_background(disk) as pool:
        disk.fs.hang("a.img", "write", count=1)
        writes = ["aio_write -P 1 0 8k", "aio_write -P 2 4k 8k", "aio_write -P 3 32k 4k"]
        client = pool.submit(qemu_io, disk, writes)
        for name in ("b.img", "c.img"):
            disk.fs.wait_for(lambda counters: counters.writes == 2, name)
            assert disk.fs.backing(name).read_bytes()[2 * BLOCK : 3 * BLOCK] == OLD
        disk.fs.clear()
        client.result(60)
    expected = b"\1" * BLOCK + b"\2" * 2 * BLOCK + OLD * 5 + b"\3" * BLOCK + OLD * 7
    assert disk.replicas() == [expected] * 3


@both_ways
def test_overlapping_writes_leave_replicas_equal(start: Start) -> None:
    """Whatever the delays, every replica ends up with the same bytes, and they are what is read."""
    disk = start(QUORUM, 3)
    dice = random.Random(1)
    for index, name in enumerate(disk.names):
        for delay in (0.002, 0.0005):
            disk.fs.inject(name, "write", delay=delay, probability=0.3, seed=index)
    writes = []
    for number in range(300):
        offset, length = dice.randrange(8) * 512, dice.randrange(1, 17) * 512
        writes.append(f"aio_write -q -P {number % 255 + 1} {offset} {length}")
    qemu_io(disk, writes)
    first, second, third = disk.replicas()
    assert first == second == third
    assert first != GOOD
    assert disk.file.read(0, SIZE) == first


# Repairs


@pytest.mark.parametrize(
    ("options", "replicas", "how", "metadata"),
    [
        (FIFO + REWRITE, 2, {"errno": errno.EIO}, "none"),
        (QUORUM + REWRITE, 3, {"corrupt": True}, "none"),
        (QUORUM + REWRITE, 3, {"corrupt": True}, "sidecar"),
        (QUORUM + REWRITE, 3, {"errno": errno.EIO}, "none"),
    ],
    ids=["fifo-unreadable", "quorum-corrupt", "quorum-corrupt-sidecar", "quorum-unreadable"],
)
def test_a_repair_never_undoes_a_write(
    start: Start, options: str, replicas: int, how: dict[str, Any]
) -> None:
    """Reads that repair race with writes to the same blocks: the last acknowledged write wins."""
    disk = start(options, replicas)
    disk.fs.inject("a.img", "read", probability=0.5, seed=1, **how)
    disk.fs.inject("b.img", "write", delay=0.0005, probability=0.5, seed=2)
    done = threading.Event()

    def read_on() -> None:
        while not done.is_set():
            disk.file.read(0, 2 * BLOCK)

    with ThreadPoolExecutor() as pool:
        readers = [pool.submit(read_on) for _ in range(3)]
        try:
            for number in range(200):
                data = bytes([number % 255 + 1]) * 2 * BLOCK
                disk.file.write(0, data)
                assert all(held.startswith(data) for held in disk.replicas()), number
                assert disk.file.read(0, 2 * BLOCK) == data, number
        finally:
            done.set()
        for reader in readers:
            reader.result()
    assert len(set(disk.replicas())) == 1


@both_ways
@pytest.mark.parametrize(
    ("options", "contents", "unreadable"),
    [
        (f"vote-threshold=1{REWRITE}", [GOOD, changed(GOOD, 3)], None),
        (f"vote-threshold=2{REWRITE}", [GOOD, GOOD, changed(GOOD, 3), changed(GOOD, 3)], None),
        (f"vote-threshold=1{REWRITE}", [GOOD, GOOD, changed(GOOD, 3)], "a.img"),
        (f"vote-threshold=2{REWRITE}", [GOOD, changed(GOOD, 3)], None),
    ],
    ids=["1:1", "2:2", "1:1-and-unreadable", "1:1-below-threshold"],
)
def test_a_tie_rewrites_nothing(
    start: Start, options: str, contents: list[bytes], unreadable: str | None
) -> None:
    """P4: without a strict winner nobody knows who is right, so no replica is touched."""
    disk = start(options, contents)
    if unreadable:
        fail_block(disk, unreadable, "read", 3)
    for offset, length in ((3 * BLOCK, BLOCK), (3 * BLOCK + 5, 10), (0, SIZE)):
        answer(disk.file.read, offset, length)
    assert disk.replicas() == contents
    assert [disk.fs.counters(name).writes for name in disk.names] == [0] * len(contents)


@pytest.mark.parametrize(
    ("options", "replicas", "unreadable", "repaired"),
    [
        (FIFO, 2, {"a.img": [7]}, True),
        (QUORUM, 3, {"a.img": [7]}, True),
        (QUORUM, 3, {"c.img": [7, 9]}, True),
        (QUORUM, 3, {"a.img": [1], "b.img": [5], "c.img": [9]}, True),
        (FIFO, 2, {"a.img": [1], "b.img": [5]}, True),
        ("read-pattern=fifo,vote-threshold=2", 2, {"a.img": [7]}, False),
        (QUORUM, 3, {"a.img": [7], "b.img": [7]}, False),
    ],
)
def test_an_unreadable_range_is_rewritten(
    start: Start, options: str, replicas: int, unreadable: dict[str, list[int]], repaired: bool
) -> None:
    """One read with rewrite-corrupted mends every bad sector for which enough others agree.

    A write makes a disk replace a bad sector. Below the threshold nothing is written.
    """
    disk = start(options + REWRITE, replicas)
    for name, blocks in unreadable.items():
        for block in blocks:
            fail_block(disk, name, "read", block)
    answer(disk.file.read, 0, 16 * BLOCK)
    written = {name: disk.fs.counters(name).bytes_written > 0 for name in disk.names}
    assert written == {name: repaired and name in unreadable for name in disk.names}
    assert disk.replicas() == [GOOD] * replicas


@both_ways
def test_a_repair_costs_no_reader_its_data(start: Start) -> None:
    """What could be read is answered, even if reading it again for the repair fails."""
    disk = start(QUORUM + REWRITE, [changed(GOOD, 0), GOOD, GOOD])
    disk.fs.inject("b.img", "read", delay=0.001, count=1)  # lets the first read pass
    disk.fs.inject("b.img", "read", errno=errno.EIO)
    assert disk.file.read(0, BLOCK) == GOOD[:BLOCK]


# Replicas that missed writes


@pytest.mark.parametrize("pattern", ["fifo", "quorum"])
@pytest.mark.parametrize("rewrite", [False, True])
def test_a_replica_that_missed_a_write_is_not_read(
    start: Start, pattern: str, rewrite: bool
) -> None:
    """P1: QEMU's fifo answers with the old data for ever.

    With rewrite-corrupted the replica gets the data at the next read, else at the next write.
    """
    options = f"read-pattern={pattern},vote-threshold=1"
    disk = start(options + REWRITE * rewrite, [OLD * 4] * 2)
    disk.fs.inject("a.img", "write", errno=errno.EIO, count=1)
    disk.file.write(BLOCK + 10, b"n" * BLOCK)
    expected = OLD + b"o" * 10 + NEW + b"o" * (2 * BLOCK - 10)
    for offset, length in ((0, 4 * BLOCK), (BLOCK + 10, 1), (2 * BLOCK + 9, 1), (0, 4 * BLOCK)):
        assert disk.file.read(offset, length) == expected[offset : offset + length]
    assert disk.replicas() == [expected if rewrite else OLD * 4, expected]
    if not rewrite:
        disk.file.write(BLOCK, NEWER * 2)
        expected = OLD + NEWER * 2 + OLD
        assert disk.replicas() == [expected] * 2
    disk.fs.inject("b.img", "read", errno=errno.EIO)
    assert disk.file.read(0, 4 * BLOCK) == expected


def test_the_last_holder_of_a_write_stays_the_last(start: Start) -> None:
    """A replica that missed a write is no stand-in for the one that holds it: rather an error."""
    disk = start(FIFO, [OLD] * 2)
    disk.fs.inject("a.img", "write", errno=errno.EIO, count=1)
    disk.file.write(0, NEW)
    disk.fs.inject("b.img", "any", errno=errno.EIO)
    assert answer(disk.file.read, 0, BLOCK) == "EIO"
    assert answer(disk.file.flush) == "EIO"
    disk.fs.clear()
    assert disk.file.read(0, BLOCK) == NEW
    disk.file.write(0, NEWER)
    disk.file.flush()
    assert disk.replicas() == [NEWER] * 2


@pytest.mark.parametrize("options", [FIFO, FIFO + REWRITE, QUORUM, QUORUM + REWRITE])
def test_random_faults_never_show_old_data(start: Start, options: str) -> None:
    """P1 for overlapping writes of any offset and length, while all three replicas fail at random.

    What is answered is what was last acknowledged, or an error. After the faults nothing is lost,
    and repairs have made the replicas equal.
    """
    disk = start(options, 3)
    for index, name in enumerate(disk.names):
        disk.fs.inject(name, "write", errno=errno.EIO, probability=0.15, seed=index)
        disk.fs.inject(name, "read", errno=errno.EIO, probability=0.04, seed=index)
    dice = random.Random(2)
    content = bytearray(GOOD)
    answered = 0
    for number in range(300):
        offset, length = dice.randrange(SIZE), dice.randrange(1, 5 * BLOCK)
        end = min(offset + length, SIZE)
        if number % 3 == 0:
            content[offset:end] = bytes([number % 256]) * (end - offset)
            while answer(disk.file.write, offset, bytes(content[offset:end])) == "EIO":
                pass  # a guest that wants it written writes it again
        else:
            seen = answer(disk.file.read, offset, end - offset)
            assert seen in ("EIO", content[offset:end]), number
            answered += seen != "EIO"
    assert answered > 100

    disk.fs.clear()
    assert disk.file.read(0, SIZE) == content
    disk.file.flush()
    assert (disk.replicas() == [content] * 3) == (REWRITE in options)


def test_a_failed_flush_is_not_forgotten(start: Start) -> None:
    """P2, R4: the kernel reports a writeback error once and drops the pages.

    So the next flush of such a file succeeds though the data are nowhere. (QEMU remembers, and
    fails all later flushes of it.)
    """
    disk = start(QUORUM, [OLD] * 3)
    for name in disk.names[:2]:
        disk.fs.inject(name, "write", drop=True, count=1)
        disk.fs.inject(name, "fsync", errno=errno.EIO, count=1)
    disk.file.write(0, NEW)
    assert answer(disk.file.flush) == "EIO"
    assert answer(disk.file.flush) == "EIO", "on one replica only: below the threshold"
    disk.file.write(0, NEW)
    disk.file.flush()
    assert disk.replicas() == [NEW] * 3


def test_what_a_failed_flush_may_have_lost_is_not_read(start: Start) -> None:
    """P1, R4: the page that could not be written is dropped, and a read finds what was there."""
    disk = start(FIFO, [OLD] * 2)
    disk.fs.inject("a.img", "write", drop=True, count=1)
    disk.fs.inject("a.img", "fsync", errno=errno.EIO, count=1)
    disk.file.write(0, NEW)
    disk.file.flush()
    assert disk.file.read(0, BLOCK) == NEW


# Truncated and hung replicas


@pytest.mark.parametrize("pattern", ["fifo", "quorum"])
@pytest.mark.parametrize("length", [SIZE // 2, 0])
def test_a_truncated_replica_is_never_zeros(
    make_images: MakeImages, tmp_path: Path, pattern: str, length: int
) -> None:
    """R10: not when read, not when a write would make it long again, not when a person has."""
    images = make_images(2, SIZE)
    for image in images:
        image.write_bytes(GOOD)
    options = as_qemu(f"read-pattern={pattern},vote-threshold=1")
    with Mounted(images, tmp_path, options) as mounted, DirectFile(mounted.file) as file:
        os.truncate(images[0], length)
        assert file.read(0, SIZE) == GOOD
        file.write(SIZE - BLOCK, NEW)
        assert images[0].stat().st_size == length
        expected = GOOD[:-BLOCK] + NEW
        assert file.read(0, SIZE) == expected
        file.flush()
        os.truncate(images[0], SIZE)
        assert file.read(0, SIZE) == expected
        assert file.read(SIZE // 2, BLOCK) == expected[SIZE // 2 :][:BLOCK]


HANG_TIMEOUT_S = 3.0


@pytest.mark.parametrize("hung", ["read", "write", "fsync", "everything"])
def test_a_hung_replica_costs_one_timeout_once(tmp_path: Path, hung: str) -> None:
    """P5: the first request waits for it, no later one does; a late write changes nothing.

    In memory: what else a request waits for must be short beside the timeout.
    """
    timeout_s = HANG_TIMEOUT_S / 4 if hung == "fsync" else HANG_TIMEOUT_S  # flushes may take 4
    options = as_qemu(f"{FIFO},replica-timeout={timeout_s}s")
    with ExitStack() as last:
        memory = last.enter_context(tmpfs(tmp_path / "memory", 16 * SIZE))
        (memory / "sick").mkdir()
        (memory / "well").mkdir()
        sick = last.enter_context(FaultFS(memory / "sick"))
        well = last.enter_context(FaultFS(memory / "well"))
        replicas = [sick.path("a.img"), well.path("b.img")]
        for fs, path in zip((sick, well), replicas, strict=True):
            fs.backing(path.name).write_bytes(OLD * 4)
        mounted = last.enter_context(Mounted(replicas, memory, options))
        file = last.enter_context(DirectFile(mounted.file))
        if hung == "everything":
            sick.stop()
            last.callback(sick.cont)
        else:
            sick.hang("a.img", hung)  # type: ignore[arg-type]
            last.callback(sick.clear)

        def use(data: bytes) -> float:
            """Do one of everything; returns the seconds it took."""
            began = time.monotonic()
            file.write(0, data)
            file.flush()
            assert file.read(0, BLOCK) == data
            assert file.read(BLOCK, BLOCK) == OLD
            return time.monotonic() - began

        assert HANG_TIMEOUT_S <= use(NEW) < 2 * HANG_TIMEOUT_S
        assert sum(use(NEWER) for _ in range(5)) < HANG_TIMEOUT_S
        missing = mounted.wait_for_events("REPLICA_STATE_CHANGED")
        assert [(each["replica"], each["new"]) for each in missing] == [
            (str(replicas[0]), "missing")
        ]

        if hung == "everything":
            sick.cont()
        else:
            sick.clear()
        mounted.wait_for_events("REPLICA_STATE_CHANGED", lambda events: len(events) == 2)
        assert sick.backing("a.img").read_bytes()[:BLOCK] == NEW  # the late write, or the first
        assert file.read(0, BLOCK) == NEWER
        assert use(OLD) < HANG_TIMEOUT_S
        assert sick.backing("a.img").read_bytes() == well.backing("b.img").read_bytes()


# Verdicts


@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_success_from_the_threshold_on(start: Start, threshold: int) -> None:
    """With enough successes a failure is none; without, the common errno reaches the client."""
    disk = start(f"vote-threshold={threshold}", 3)
    for failing in range(4):
        for name in disk.names[:failing]:
            disk.fs.inject(name, "write", errno=errno.ENOSPC)
            disk.fs.inject(name, "fsync", errno=errno.EDQUOT)
            disk.fs.inject(name, "read", errno=errno.EREMOTEIO)
        enough = 3 - failing >= threshold
        assert answer(disk.file.flush) == (None if enough else "EDQUOT")
        at = 4 * failing * BLOCK  # a place of its own: what a replica missed is remembered
        good = GOOD[at : at + 4 * BLOCK]
        assert answer(disk.file.read, at, 4 * BLOCK) == (good if enough else "EREMOTEIO")
        assert answer(disk.file.write, at, NEW) == (BLOCK if enough else "ENOSPC")
        disk.fs.clear()
        disk.file.write(at, NEW)
        disk.file.flush()


@both_ways
def test_blkverify_names_the_first_difference(start: Start) -> None:
    """Any difference is EIO, its place is in the log, and the process lives (QEMU's exits)."""
    place = 9 * BLOCK + 77
    other = GOOD[:place] + b"\xff" + GOOD[place + 1 : -1] + b"\xff"
    disk = start("vote-threshold=2,blkverify", [GOOD, other])
    assert answer(disk.file.read, 0, SIZE) == "EIO"
    assert answer(disk.file.read, place - 7, 8) == "EIO"
    assert disk.file.read(0, 9 * BLOCK) == GOOD[: 9 * BLOCK]
    assert disk.file.read(place + 1, 100) == GOOD[place + 1 :][:100]

    told = disk.mounted.wait_for_events("BLKVERIFY_DIFFERENCE", lambda events: len(events) == 2)
    assert [event["offset"] for event in told] == [place, place]
    assert disk.replicas() == [GOOD, other]
