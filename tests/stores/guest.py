"""A guest that remembers what it wrote, and believes nothing that it reads."""

import mmap
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

BLOCK = 4096
CHUNK = 64 * 1024
"""The unit in which a set of this size remembers what a replica lacks."""


def content(block: int, version: int) -> bytes:
    """What block number *block* holds after it was written *version* times."""
    return struct.pack("<QQ", block, version) * (BLOCK // 16)


class Guest:
    """Writes, reads and flushes side by side, 4 KiB at a time, within the first *area* bytes.

    Everything holds version 0 at the beginning.
    """

    def __init__(self, disk: Path, size: int, area: int) -> None:
        self.longest = {"read": 0.0, "write": 0.0, "flush": 0.0}
        self.counts = {"read": 0, "write": 0, "flush": 0}
        self.faults: list[str] = []
        self._file = os.open(disk, os.O_RDWR | os.O_DIRECT)
        self._started = [0] * (size // BLOCK)
        self._acknowledged = [0] * (size // BLOCK)
        self._written_at: dict[int, float] = {}
        self._area = area // BLOCK
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._go_on, args=each)
            for each in ((self._write, 0.01), (self._read, 0.01), (self._flush, 0.2))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """End in order; a request that does not end is a fault."""
        self._stopped.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))
            if thread.is_alive():
                self.faults.append(f"a request has no answer after {timeout_s:g} s")

    def close(self) -> None:
        self._stopped.set()
        if not any(thread.is_alive() for thread in self._threads):
            os.close(self._file)

    def forget_stalls(self) -> None:
        """What took long until now is of no interest."""
        self.longest = dict.fromkeys(self.longest, 0.0)

    def chunks_written_since(self, moment: float) -> int:
        """How many chunks were written to since that time (`time.monotonic`)."""
        return sum(at >= moment for at in list(self._written_at.values()))

    def write_once(self, first: int, length: int) -> None:
        """Write to each block of these bytes, outside of the area, and flush."""
        buffer = mmap.mmap(-1, BLOCK)
        for block in range(first // BLOCK, (first + length) // BLOCK):
            self._write_block(block, buffer)
        os.fsync(self._file)

    def check_all(self) -> None:
        """Every block holds what was acknowledged last."""
        buffer = mmap.mmap(-1, 1 << 20)
        for first in range(0, len(self._started), len(buffer) // BLOCK):
            os.preadv(self._file, [buffer], first * BLOCK)
            for index in range(len(buffer) // BLOCK):
                block = first + index
                data = buffer[index * BLOCK : (index + 1) * BLOCK]
                self._check(block, data, self._acknowledged[block], self._started[block])

    def _go_on(self, request: Callable[[random.Random, mmap.mmap], None], pause_s: float) -> None:
        chance, buffer = random.Random(request.__name__), mmap.mmap(-1, BLOCK)
        kind = request.__name__.strip("_")
        while not self._stopped.wait(pause_s):
            began = time.monotonic()
            try:
                request(chance, buffer)
            except OSError as error:
                self.faults.append(f"a {kind} failed: {error.strerror}")
            self.longest[kind] = max(self.longest[kind], time.monotonic() - began)
            self.counts[kind] += 1

    def _write(self, chance: random.Random, buffer: mmap.mmap) -> None:
        self._write_block(chance.randrange(self._area), buffer)

    def _write_block(self, block: int, buffer: mmap.mmap) -> None:
        version = self._started[block] + 1
        self._started[block] = version
        buffer[:] = content(block, version)
        self._written_at[block * BLOCK // CHUNK] = time.monotonic()
        os.pwritev(self._file, [buffer], block * BLOCK)
        self._written_at[block * BLOCK // CHUNK] = time.monotonic()
        self._acknowledged[block] = version

    def _read(self, chance: random.Random, buffer: mmap.mmap) -> None:
        block = chance.randrange(self._area)
        oldest = self._acknowledged[block]
        os.preadv(self._file, [buffer], block * BLOCK)
        self._check(block, buffer[:], oldest, self._started[block])

    def _flush(self, _chance: random.Random, _buffer: mmap.mmap) -> None:
        os.fsync(self._file)

    def _check(self, block: int, data: bytes, oldest: int, newest: int) -> None:
        number, version = struct.unpack_from("<QQ", data)
        if (number, data) != (block, content(block, version)) or not oldest <= version <= newest:
            self.faults.append(
                f"block {block} holds version {version} of {number}, not {oldest} to {newest}"
            )


def fill(image: Path, size: int) -> None:
    """Make *image* what a guest expects of its disk."""
    with image.open("wb") as file:
        for first in range(0, size // BLOCK, 256):
            file.write(b"".join(content(block, 0) for block in range(first, first + 256)))
