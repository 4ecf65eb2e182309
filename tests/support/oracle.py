"""What a disk may hold: every sector written says who it is, and the oracle knows who may be there.

A block is 4 KiB of eight sectors, each with the block's number and a sequence number that grows
with every write of that block. Of each block the oracle keeps which sequence number was last
issued, acknowledged and flushed; and of each sector which ones it may hold: after an
acknowledged write that one alone, while a write is under way also what was there before, and
after a look at it (`Oracle.look`) what was seen: a value once read never turns back.
"""

import contextlib
import os
import random
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

BLOCK = 4096
SECTOR = 512
SECTORS = BLOCK // SECTOR
_LABEL = struct.Struct("<QQ")


def content(block: int, sequence: int) -> bytes:
    """What a block holds after its write of this number; zeros before the first."""
    if sequence == 0:
        return bytes(BLOCK)
    return _LABEL.pack(block + 1, sequence) * (BLOCK // _LABEL.size)


def sequences(block: int, data: bytes) -> list[int]:
    """Of each sector the number of the write that it holds; fails for what no write has made."""
    found = []
    for sector in range(SECTORS):
        part = data[sector * SECTOR : (sector + 1) * SECTOR]
        label, sequence = _LABEL.unpack_from(part)
        expected = content(block, sequence)[:SECTOR]
        assert part == expected, f"block {block}, sector {sector}: {label - 1}, {part[:32]!r}…"
        found.append(sequence)
    return found


class Oracle:
    """What *blocks* of a disk may hold. One writer at a time for each block."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self.blocks = list(blocks)
        self.issued = dict.fromkeys(self.blocks, 0)
        self.acknowledged = dict.fromkeys(self.blocks, 0)
        self.flushed = dict.fromkeys(self.blocks, 0)
        self.acknowledgements = 0
        self._possible: dict[int, list[set[int]]] = {b: [{0}] * SECTORS for b in self.blocks}
        self._lock = threading.Lock()

    def issue(self, block: int) -> bytes:
        """The data for the next write of *block*, which from here on is under way."""
        with self._lock:
            self.issued[block] += 1
            sequence = self.issued[block]
            self._possible[block] = [each | {sequence} for each in self._possible[block]]
            return content(block, sequence)

    def write(self, fd: int, block: int) -> None:
        """The next write of *block*; an error leaves it open whether it happened."""
        data = self.issue(block)
        sequence = self.issued[block]
        assert os.pwrite(fd, data, block * BLOCK) == BLOCK
        with self._lock:
            self.acknowledged[block] = sequence
            self._possible[block] = [{sequence}] * SECTORS
            self.acknowledgements += 1

    def flush(self, fd: int) -> None:
        """Flush; what was acknowledged before it must then survive anything."""
        with self._lock:
            before = dict(self.acknowledged)
        os.fsync(fd)
        with self._lock:
            for block, sequence in before.items():
                self.flushed[block] = max(self.flushed[block], sequence)

    def under_way(self) -> list[int]:
        """Blocks with a write that was issued and neither acknowledged nor seen."""
        return [block for block, sectors in self._possible.items() if len(sectors[0]) > 1]

    def look(self, fd: int, blocks: Sequence[int] | None = None) -> None:
        """Read blocks (default: all), and hold the disk to what it shows from now on."""
        for block in self.blocks if blocks is None else blocks:
            data = os.pread(fd, BLOCK, block * BLOCK)
            assert len(data) == BLOCK
            seen = sequences(block, data)
            possible = self._possible[block]
            wrong = [n for n, each in enumerate(seen) if each not in possible[n]]
            assert not wrong, (
                f"block {block}: it holds {seen}, and may hold {possible}; issued "
                f"{self.issued[block]}, acknowledged {self.acknowledged[block]}, flushed "
                f"{self.flushed[block]}"
            )
            assert all(each >= self.flushed[block] for each in seen)
            self._possible[block] = [{each} for each in seen]


class Request(NamedTuple):
    """When a request was under way; monotonic time, seconds."""

    began: float
    ended: float


class Writers:
    """Threads that write the oracle's blocks at random, past the page cache, and flush at times.

    They end with the disk (at the first error), or with `stop`.
    """

    def __init__(self, oracle: Oracle, file: Path, threads: int = 2, seed: int = 0) -> None:
        self._oracle = oracle
        self._file = file
        self._end = threading.Event()
        self.errors: list[OSError] = []
        self.requests: list[Request] = []
        """All that were answered, well or not."""
        self._threads = [
            threading.Thread(target=self._run, args=(oracle.blocks[n::threads], seed + n))
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all of them and wait for it."""
        self._end.set()
        self.join()

    def join(self) -> None:
        """Wait until all have ended."""
        for thread in self._threads:
            thread.join(timeout=60)
            assert not thread.is_alive(), "a writer hangs"

    def _run(self, blocks: Sequence[int], seed: int) -> None:
        rng = random.Random(seed)
        try:
            fd = os.open(self._file, os.O_RDWR | os.O_DIRECT)
        except OSError as error:
            self.errors.append(error)
            return
        try:
            while not self._end.is_set():
                with self._timed():
                    self._oracle.write(fd, rng.choice(blocks))
                if rng.random() < 0.02:
                    with self._timed():
                        self._oracle.flush(fd)
        except OSError as error:
            self.errors.append(error)
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.requests.append(Request(began, time.monotonic()))
