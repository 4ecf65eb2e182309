"""QEMU's quorum driver and quorumfs side by side: the same faults, the same answers.

Every combination of what up to three replicas can do (answer, answer something else, fail with
one of several errnos) is put to the real driver and to a real mount, with every threshold and
both read patterns, by the same client code past the page cache.

Where we differ on purpose, and why:

1. *Ties.* Of equally many votes, for data as for errnos, QEMU takes the version that it met last,
   we take the one of the replica listed first. "The first replica is the good one" is what a user
   can steer by; the last one is an accident of a list that is filled at its head.
2. *Blocks.* QEMU votes about a request as a whole, we vote per 4 KiB block when answers differ,
   and read block by block when a replica fails. So replicas that are bad at different places
   still make a readable disk, and the answer does not depend on how large the request was.
3. *The end of the disk.* A write at or behind it, or a direct one across it, is EIO in QEMU's
   export, which may have written the part before the end. Here it is ENOSPC, which is what a block
   device of that size says, and a direct one across it writes nothing.
"""

import errno
import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import pytest
from support.faultfs import FaultFS
from support.faultydisk import Answer, DirectFile, answer
from support.mounting import Mounted, as_qemu
from support.qemu import QuorumExport

BLOCK = 4096
SIZE = 8 << 20
CONTENT = random.Random(1).randbytes(SIZE)

# Every case has blocks of its own: quorumfs remembers what a replica missed, QEMU does not.
READS_AT, BLOCKWISE_AT, WRITES_AT, FLUSHES_AT, SHAPES_AT = (
    0,
    1 << 20,
    2 << 20,
    3 << 20,
    4 << 20,
)

FINE = "."
OTHER_DATA = {letter: letter.encode() * BLOCK for letter in "xy"}
ERRNOS = ("EIO", "ENOSPC", "EDQUOT")

Version = TypeVar("Version", bound=Hashable)
Compare = Callable[[object, Answer, Answer, Answer, Answer], None]


@dataclass(frozen=True)
class Pair:
    """QEMU and quorumfs, each with a set of equal replicas behind the same faulty directory."""

    fs: FaultFS
    theirs: DirectFile
    ours: DirectFile
    replicas: int
    threshold: int
    pattern: Literal["quorum", "fifo"]

    def names(self, replica: int) -> tuple[str, str]:
        """The files of one replica: QEMU's, and ours."""
        return f"qemu{replica}.img", f"ours{replica}.img"

    def fail(self, replica: int, op: Literal["read", "write", "fsync"], name: str, at: int) -> None:
        """Let a block of a replica fail on both sides."""
        number = getattr(errno, name)
        for file in self.names(replica):
            self.fs.inject(file, op, start=at, end=at + BLOCK, errno=number)

    def corrupt(self, replica: int, data: bytes, at: int) -> None:
        """Put other data into a replica on both sides, behind the readers' backs."""
        for file in self.names(replica):
            with self.fs.backing(file).open("r+b") as backing:
                backing.seek(at)
                backing.write(data)

    def held(self, at: int, length: int) -> tuple[list[bytes], list[bytes]]:
        """What QEMU's replicas and ours really hold."""
        held: tuple[list[bytes], list[bytes]] = ([], [])
        for replica in range(self.replicas):
            for side, file in zip(held, self.names(replica), strict=True):
                with self.fs.backing(file).open("rb") as backing:
                    backing.seek(at)
                    side.append(backing.read(length))
        return held


CONFIGURATIONS = [
    (replicas, threshold, pattern)
    for replicas in (1, 2, 3)
    for threshold in range(1, replicas + 1)
    for pattern in ("quorum", "fifo")
]


@pytest.fixture(
    scope="module",
    params=CONFIGURATIONS,
    ids=lambda each: f"{each[2]}-{each[1]}-of-{each[0]}",
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """One pair for all tests of a configuration, which leave places alone that come later."""
    replicas, threshold, pattern = request.param
    directory = tmp_path_factory.mktemp("pair")
    options = as_qemu(f"read-pattern={pattern},vote-threshold={threshold}")
    with FaultFS(directory) as fs:
        files: tuple[list[str], list[str]] = ([], [])
        for replica in range(replicas):
            for side, name in zip(files, (f"qemu{replica}.img", f"ours{replica}.img"), strict=True):
                fs.backing(name).write_bytes(CONTENT)
                side.append(name)
        theirs, ours = ([fs.path(name) for name in side] for side in files)
        with (
            QuorumExport(
                theirs,
                directory / "qemu.img",
                threshold=threshold,
                read_pattern=pattern,
                events=False,
                direct=True,
            ) as export,
            Mounted(ours, directory, options) as mounted,
            DirectFile(export.path) as their_file,
            DirectFile(mounted.file) as our_file,
        ):
            yield Pair(fs, their_file, our_file, replicas, threshold, pattern)


@pytest.fixture
def compare() -> Iterator[Compare]:
    """Collects what is not as expected; fails at the end with the whole list."""
    wrong: list[str] = []

    def compare(
        case: object, theirs: Answer, ours: Answer, expect_theirs: Answer, expect_ours: Answer
    ) -> None:
        if (theirs, ours) != (expect_theirs, expect_ours):
            wrong.append(
                f"{case}: QEMU {_short(theirs)} (expected {_short(expect_theirs)}), "
                f"we {_short(ours)} (expected {_short(expect_ours)})"
            )

    yield compare
    assert not wrong, f"{len(wrong)} cases:\n" + "\n".join(wrong[:20])


def _short(value: Answer) -> str:
    return f"{value[:4]!r}…" if isinstance(value, bytes) else repr(value)


def tied(ballots: Sequence[Version]) -> list[Version]:
    """The versions with most votes, in the order of their first replicas."""
    counts = Counter(ballots)
    return [version for version, count in counts.items() if count == max(counts.values())]


def combinations(pair: Pair, letters: Sequence[str]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Every assignment of *letters* to the replicas, with a block number for each."""
    return enumerate(itertools.product(letters, repeat=pair.replicas))


def test_flushes(pair: Pair, compare: Compare) -> None:
    """A flush succeeds from the threshold on, else it fails with the most frequent errno."""
    block = bytes(BLOCK)
    for _, case in combinations(pair, [FINE, *ERRNOS]):
        for file in (pair.theirs, pair.ours):  # QEMU sends a flush on only after a write
            assert file.write(FLUSHES_AT, block) == BLOCK
        for replica, letter in enumerate(case):
            if letter != FINE:
                pair.fail(replica, "fsync", letter, 0)
        theirs, ours = answer(pair.theirs.flush), answer(pair.ours.flush)
        pair.fs.clear()
        failed = [letter for letter in case if letter != FINE]
        if len(case) - len(failed) >= pair.threshold:
            compare(case, theirs, ours, None, None)
        else:
            compare(case, theirs, ours, tied(failed)[-1], tied(failed)[0])
    for file in (pair.theirs, pair.ours):  # written again, it is durable again
        file.write(FLUSHES_AT, block)
        file.flush()


def test_reads(pair: Pair, compare: Compare) -> None:
    """A read gives the bytes, or the errno, that QEMU's vote or fifo gives."""
    for number, case in combinations(pair, [FINE, *OTHER_DATA, *ERRNOS[:2]]):
        at = READS_AT + number * BLOCK
        contents = {**OTHER_DATA, FINE: CONTENT[at : at + BLOCK]}
        for replica, letter in enumerate(case):
            if letter in OTHER_DATA:
                pair.corrupt(replica, OTHER_DATA[letter], at)
            elif letter != FINE:
                pair.fail(replica, "read", letter, at)
        theirs, ours = (answer(file.read, at, BLOCK) for file in (pair.theirs, pair.ours))
        pair.fs.clear()

        answers = [contents[letter] for letter in case if letter in contents]
        errnos = [letter for letter in case if letter not in contents]
        expected: tuple[Answer, Answer]
        if pair.pattern == "fifo":
            first = answers[0] if answers else errnos[-1]
            expected = first, first
        elif len(answers) < pair.threshold:
            expected = tied(errnos)[-1], tied(errnos)[0]
        elif max(Counter(answers).values()) < pair.threshold:
            expected = "EIO", "EIO"
        else:
            expected = tied(answers)[-1], tied(answers)[0]
        compare(case, theirs, ours, *expected)


@pytest.mark.parametrize("fault", ["other data", "EIO"])
def test_replicas_bad_at_different_blocks(pair: Pair, compare: Compare, fault: str) -> None:
    """Every replica is bad at a block of its own: we decide per block, QEMU once for all."""
    at = BLOCKWISE_AT + (fault == "EIO") * 64 * BLOCK
    length = 4 * BLOCK
    for replica in range(pair.replicas):
        if fault == "EIO":
            pair.fail(replica, "read", "EIO", at + replica * BLOCK)
        else:
            pair.corrupt(replica, OTHER_DATA["x"], at + replica * BLOCK)
    theirs, ours = (answer(file.read, at, length) for file in (pair.theirs, pair.ours))
    pair.fs.clear()

    good = CONTENT[at : at + length]
    versions = [  # each replica's own, as long as it answers
        good[: replica * BLOCK] + OTHER_DATA["x"] + good[(replica + 1) * BLOCK :]
        for replica in range(pair.replicas)
    ]
    others = pair.replicas - 1  # the good votes for each block that is bad somewhere
    expected: tuple[Answer, Answer]
    if fault == "EIO":
        enough = others >= (pair.threshold if pair.pattern == "quorum" else 1)
        expected = "EIO", good if enough else "EIO"
    elif pair.pattern == "fifo" or pair.replicas == 1:
        expected = versions[0], versions[0]
    elif max(others, 1) < pair.threshold:
        expected = "EIO", "EIO"
    else:
        theirs_expected = versions[-1] if pair.threshold == 1 else "EIO"
        expected = theirs_expected, good if others > 1 else versions[0]
    compare((fault, pair.replicas), theirs, ours, *expected)


SHAPES = [
    (offset, length)
    for length in (1, 511, 512, 513, 4095, 4096, 4097, 65_536, (1 << 20) - 1, 1 << 20)
    for offset in (SHAPES_AT, SHAPES_AT + 1, SHAPES_AT + 511, SHAPES_AT + 4095, SHAPES_AT + 4096)
]
AT_THE_END = [
    (offset, length)
    for length in (1, 511, 4096, 65_536)  # more than one request behind the end upsets QEMU
    for offset in (SIZE - 65_536, SIZE - 4097, SIZE - 512, SIZE - 1, SIZE, SIZE + 1, 2 * SIZE)
]


def test_reads_of_every_shape(pair: Pair, compare: Compare) -> None:
    """Any offset and length: the bytes that are there, short at the end, none behind it."""
    for offset, length in SHAPES + AT_THE_END:
        good = CONTENT[offset : offset + length]
        theirs, ours = (answer(file.read, offset, length) for file in (pair.theirs, pair.ours))
        compare((offset, length), theirs, ours, good, good)


def test_writes_of_every_shape(pair: Pair, compare: Compare) -> None:
    """Any offset and length lands on every replica, byte for byte and nowhere else."""
    their_content, our_content = bytearray(CONTENT), bytearray(CONTENT)
    for number, (offset, length) in enumerate(SHAPES + AT_THE_END):
        data = random.Random(number).randbytes(length)
        # The kernel cuts a request this large in two, and QEMU's export then mixes them up.
        middle = length // 2 if length > 512 << 10 else 0
        pair.theirs.write(offset, data[:middle])
        theirs = answer(pair.theirs.write, offset + middle, data[middle:])
        ours = answer(pair.ours.write, offset, data)
        inside = max(min(length, SIZE - offset), 0)
        their_content[offset : offset + inside] = data[:inside]
        if inside < length:
            compare((offset, length), theirs, ours, "EIO", "ENOSPC")
        else:
            our_content[offset : offset + inside] = data
            compare((offset, length), theirs, ours, length - middle, length)
    for side, content in zip(pair.held(0, SIZE), (their_content, our_content), strict=True):
        assert all(held[SHAPES_AT:] == content[SHAPES_AT:] for held in side)


def test_the_end_for_a_cached_client(pair: Pair) -> None:
    """A write that crosses the end is short, one behind it ENOSPC, and no byte is added."""
    fd = os.open(pair.ours.path, os.O_RDWR)
    try:
        assert os.pwrite(fd, b"end of the disk", SIZE - 3) == 3
        assert answer(os.pwrite, fd, b"?", SIZE) == "ENOSPC"
        os.fsync(fd)
        assert os.fstat(fd).st_size == SIZE
    finally:
        os.close(fd)
    assert pair.ours.read(SIZE - 4, 1 << 20)[1:] == b"end"
    assert {len(held) for held in pair.held(0, 2 * SIZE)[1]} == {SIZE}


def test_writes(pair: Pair, compare: Compare) -> None:
    """A write succeeds from the threshold on, else it fails with the most frequent errno.

    Either way it lands on every replica that can take it.
    """
    data = b"w" * BLOCK
    for number, case in combinations(pair, [FINE, *ERRNOS]):
        at = WRITES_AT + number * BLOCK
        for replica, letter in enumerate(case):
            if letter != FINE:
                pair.fail(replica, "write", letter, at)
        theirs, ours = (answer(file.write, at, data) for file in (pair.theirs, pair.ours))
        pair.fs.clear()
        failed = [letter for letter in case if letter != FINE]
        if len(case) - len(failed) >= pair.threshold:
            compare(case, theirs, ours, BLOCK, BLOCK)
        else:
            compare(case, theirs, ours, tied(failed)[-1], tied(failed)[0])
        old = CONTENT[at : at + BLOCK]
        for side in pair.held(at, BLOCK):
            assert side == [data if letter == FINE else old for letter in case], case
