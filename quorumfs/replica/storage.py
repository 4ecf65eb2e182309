"""The narrow interface to one replica's file.

Everything above speaks to a file by submitting an `Operation` and being called back, so that a
test can put a simulated disk underneath, and so that asking N replicas at once costs no task each.
"""

import errno
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

from quorumfs.decisions.record import Identity


class Kind(Enum):
    """What an operation does; read, write and flush are QEMU's words for it in events."""

    READ = "read"
    REREAD = "read back"
    """Read what others may have written meanwhile: past this host's cache, where the file system
    is not this host's own."""
    WRITE = "write"
    COPY = "copy"
    """Write what another image holds at the same place; see `Storage.copying`."""
    DISCARD = "discard"
    """Make zeros, and give the space back."""
    ZERO = "zero"
    """Make zeros, and keep the space where the file system can."""
    REACH = "look for data"
    """Find how far from the offset, at most the length, zeros are best made at one go."""
    ALLOCATE = "allocate"
    """Reserve space for what is a hole, where the file system can; no byte changes."""
    SYNC = "flush"
    STAT = "stat"
    SEAL = "seal"
    """Make everything durable, the file's times too, and then stat."""
    EVICT = "evict"
    """Have reads from now on show what is on the medium, where all is synced; a file system whose
    cache is the medium ignores it."""
    SEEK_DATA = "seek data"
    """Find the next byte at or after the offset that is not in a hole."""
    SEEK_HOLE = "seek hole"
    """Find the next byte at or after the offset that is in a hole, or the end."""
    CLOSE = "close"
    """Give the file back, and with it the locks, whatever error this gives: the last operation,
    asked for when all others have returned. EAGAIN: it was not begun."""


CHANGES = frozenset({Kind.WRITE, Kind.COPY, Kind.DISCARD, Kind.ZERO})
"""What changes bytes, which a flush then makes durable."""


class Operation:
    """One I/O on one replica's file, and afterwards its outcome.

    The outcome is filled in by the one who waits for it, in the trio thread, and only if the
    operation was not given up before it returned.
    """

    __slots__ = ("counts", "data", "error", "kind", "length", "offset", "value")

    def __init__(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self.kind = kind
        self.offset = offset
        """Bytes from the start of the disk."""
        self.length = length
        """Bytes."""
        self.data = data
        """What to write: exactly `length` bytes."""
        self.value: Value = b""
        """What a successful operation gave."""
        self.error: OSError | None = None
        """Why it failed; None after success."""
        self.counts = True
        """Whether its success makes a request more of a success."""


class FileStatus(NamedTuple):
    """What a stat of a file tells."""

    blocks: int
    """Of 512 bytes, allocated."""
    identity: Identity


class Usage(NamedTuple):
    """What a file takes of its file system."""

    device: int
    blocks: int
    """Of 512 bytes, allocated."""
    free: int
    """Bytes left there for whoever wants them."""


class Attempt(Enum):
    """What came of an attempt to write here and now."""

    DONE = "done"
    """All was written."""
    NOTHING = "nothing done"
    """It would have taken time: not a byte was written."""
    PARTLY = "partly done"
    """It failed, and some of it may have been written."""


DONE, NOTHING, PARTLY = Attempt
"""On the path of every write by these names: to look a member up in its enum takes 20 times as
long (Python 3.11)."""


Bytes = bytes | bytearray
"""What was read."""

Buffer = bytes | memoryview
"""What is to be written."""

Value = Bytes | int | FileStatus
"""Of a read: exactly the bytes asked for. Of a stat and a seal: a `FileStatus`. Of a seek: the
offset, or the size of the disk if there is none. Of a reach: where it ends. Of a copy: the bytes
copied, from the offset on: fewer where the other image could not be read. Else 0."""

Done = Callable[[Operation, Value, OSError | None], None]
"""Called once in the trio thread when an operation has returned."""


class TruncatedError(OSError):
    """The file is shorter than the disk: what was there is lost, and is not zeros."""

    def __init__(self, size: int) -> None:
        super().__init__(errno.EIO, f"the image was truncated to {size} bytes")
        self.size = size


class Storage(Protocol):
    """One replica's file."""

    def submit(self, operation: Operation, done: Done) -> None:
        """Start *operation*; *done* is called in the trio thread, perhaps before this returns."""

    @property
    def may_inline(self) -> bool:
        """Whether the two following may be called."""

    def read_now(self, offset: int, length: int) -> Bytes | None:
        """Read here and now; None if that would take time, or failed: then it must be submitted."""

    def write_now(self, offset: int, data: Buffer) -> Attempt:
        """Write here and now; what is not done must be submitted, and is told the error."""

    def copying(self, source: "Storage", offset: int, length: int) -> Operation | None:
        """An operation for `submit` that has this file take a range of *source*.

        None if an answer of either depends on others than this host: one that does not answer must
        not be taken for the other. *source* closes when that has been done, or given up.
        """
