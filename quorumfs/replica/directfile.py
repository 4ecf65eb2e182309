"""A file read and written past the page cache, with O_DIRECT, whatever the request's alignment.

Coherence. The kernel keeps direct and buffered access to one range equal if they follow each other:
before a direct request it writes back and drops what the page cache has of the range, and after a
direct write it drops what came in meanwhile. At the same time they may lose data: a page that is
read for a buffered change of some bytes, while a direct write changes others of it, is written back
with their old content. So

- what is read and written goes one way, by its place: past the cache up to `tail`, through it from
  there on. That is where the file ends within a page, which a direct write would make longer. No
  page has both. A copy from one image to another, and zeros that are written, are such reads and
  writes, too.
- what the kernel alone can do, and does in the page cache where a page is concerned in part, holds
  the page's lock meanwhile (`alone`): making zeros and holes. So does every request that has part
  of a page, aligned or not. One that has all of a page overlaps all others that have any of it, and
  the disk's range locks keep these apart.
- what only asks or waits (seeking data, fdatasync, eviction, stat) changes nothing. A file system
  writes back, or counts as data, what is dirty when it is asked where data is.

Others on this host that read the image while it is in use (a backup, against advice) fill the page
cache: a direct write drops that, and a direct read does not look at it.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from mmap import MADV_DONTFORK, MAP_ANONYMOUS, MAP_PRIVATE, PAGESIZE, mmap
from threading import Lock
from typing import NamedTuple, TypeVar

from quorumfs.decisions.alignment import kept, pieces, ragged
from quorumfs.replica.regularfile import RegularFile
from quorumfs.replica.storage import TruncatedError

T = TypeVar("T")

BUFFER = 1 << 20
"""Bytes of a bounce buffer: the largest request of a guest that is aligned takes one system call.
A replica has as many buffers as threads at most, and none before they are needed."""

_LOCKS = 64
"""Locks for all pages of a file: a few pages that share one only wait for each other."""


class Direct(NamedTuple):
    """What it takes to read and write an image past the page cache."""

    fd: int
    """A descriptor of its own, with O_DIRECT."""
    alignment: int
    """Bytes: offsets and lengths must be multiples of it; a power of two."""


class Buffers:
    """Aligned memory for requests, used again and again. For threads."""

    def __init__(self) -> None:
        self._idle: deque[memoryview] = deque()

    @contextmanager
    def one(self) -> Iterator[memoryview]:
        """A buffer of `BUFFER` bytes, with any content."""
        try:
            buffer = self._idle.pop()  # the last one given back is in the processor's cache
        except IndexError:
            memory = mmap(-1, BUFFER, flags=MAP_PRIVATE | MAP_ANONYMOUS)
            # The device writes to this very memory, of which a fork would make two.
            memory.madvise(MADV_DONTFORK)
            buffer = memoryview(memory)
        try:
            yield buffer
        finally:
            self._idle.append(buffer)

    def return_idle(self) -> None:
        """Give buffers that are not in use back to the system."""
        self._idle.clear()


class DirectFile(RegularFile):
    """An open image that is read and written with O_DIRECT, except for its tail."""

    plain = False

    def __init__(self, fd: int, size: int, direct: Direct) -> None:
        """*fd* as for `RegularFile`, without O_DIRECT; *direct* is taken over, too."""
        super().__init__(fd, size)
        self.alignment = direct.alignment
        """Bytes; see `_aligned`."""
        self._direct_fd = direct.fd
        self._page = max(direct.alignment, PAGESIZE)
        """Bytes that are locked together, the largest alignment there may be."""
        self._locks = [Lock() for _ in range(_LOCKS)]
        self._buffers = Buffers()

    @property
    def tail(self) -> int:
        """Where the part begins that is too short for a page, and goes through the page cache."""
        return self.size if self.alignment == 1 else self.size - self.size % self._page

    @contextmanager
    def alone(self, offset: int, length: int) -> Iterator[None]:
        """Keep other changes from the pages that the range has some bytes of."""
        places = {page % _LOCKS for page in ragged(offset, offset + length, self._page)}
        with ExitStack() as stack:
            for place in sorted(places):  # all take them in one order: none waits for ever
                stack.enter_context(self._locks[place])
            yield

    def read(self, offset: int, length: int) -> bytes:
        return self._aligned(lambda alignment: self._read(offset, length, alignment))

    def read_into(self, buffer: memoryview, offset: int) -> int:
        data = self.read(offset, len(buffer))
        buffer[:] = data
        return len(data)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        with self.alone(offset, len(data)):
            self._aligned(lambda alignment: self._write(offset, memoryview(data), alignment))

    def return_memory(self) -> None:
        self._buffers.return_idle()

    def close(self) -> None:
        try:
            os.close(self._direct_fd)
        finally:
            super().close()

    def _aligned(self, request: Callable[[int], T]) -> T:
        """What *request* gives with the present alignment, or with whole pages if that is refused.

        What was found out about a hole, or about the device that a file system was on before, may
        be too fine. Locks are for pages, whatever the alignment is.
        """
        alignment = self.alignment
        try:
            return request(alignment)
        except OSError as error:
            if error.errno != errno.EINVAL or alignment == self._page:
                raise
        self.alignment = self._page
        return request(self._page)

    def _read(self, offset: int, length: int, alignment: int) -> bytes:
        end = offset + length
        direct_end = min(end, self.tail)
        parts = []
        for piece in pieces(offset, direct_end, alignment, BUFFER):
            with self._buffers.one() as buffer:
                self._fill(buffer, piece.start, piece.stop, piece.end, alignment)
                parts.append(bytes(buffer[piece.first - piece.start : piece.end - piece.start]))
        if end > direct_end:
            start = max(offset, direct_end)
            parts.append(super().read(start, end - start))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _fill(self, buffer: memoryview, start: int, stop: int, end: int, alignment: int) -> None:
        """Read the blocks from *start* to *stop*, of which what is before *end* must be there."""
        at = start
        while True:
            read = os.preadv(self._direct_fd, [buffer[at - start : stop - start]], at)
            if at + read >= end:
                return
            whole = read - read % alignment
            if not whole:
                size = os.fstat(self._direct_fd).st_size
                if size < end:
                    raise TruncatedError(size)
                raise OSError(errno.EIO, "a read made no progress")
            at += whole

    def _write(self, offset: int, data: memoryview, alignment: int) -> None:
        end = offset + len(data)
        direct_end = min(end, self.tail)
        for piece in pieces(offset, direct_end, alignment, BUFFER):
            start = piece.start
            with self._buffers.one() as buffer:
                for block in kept(piece, alignment):
                    whole = buffer[block - start : block - start + alignment]
                    self._fill(whole, block, block + alignment, block + alignment, alignment)
                new = data[piece.first - offset : piece.end - offset]
                buffer[piece.first - start : piece.end - start] = new
                self._put(buffer[: piece.stop - start], start, alignment)
        if end > direct_end:
            start = max(offset, direct_end)
            super().write(start, data[start - offset :])

    def _put(self, blocks: memoryview, start: int, alignment: int) -> None:
        written = 0
        while written < len(blocks):
            more = os.pwritev(self._direct_fd, [blocks[written:]], start + written)
            whole = more - more % alignment
            if not whole:
                raise OSError(errno.EIO, "a write made no progress")
            written += whole
