"""The narrow interface to one replica's file.

All other code submits an `Operation` to a file and is called back, so that a test can put a
simulated disk underneath, and so that asking N replicas at once costs no task each.
"""

import errno
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

from quorumfs.decisions.record import Identity
from quorumfs.replica.fastfile import FastFile


class Kind(Enum):
    """The kind of an operation; read, write and flush are QEMU's words in events.

    Each is one word, because the status tells programs which one a replica has not answered.
    """

    READ = "read"
    REREAD = "read-back"
    """Read past this host's cache, where the file system is not this host's own: another host may
    have written."""
    WRITE = "write"
    COPY = "copy"
    """Copy the same range of another image; see `Storage.copying`."""
    DISCARD = "discard"
    """Make zeros, and give the space back."""
    ZERO = "zero"
    """Make zeros, and keep the space where the file system can."""
    REACH = "look-for-data"
    """Find how far from the offset, at most the length, zeros are best made at one go."""
    ALLOCATE = "allocate"
    """Reserve space for holes, where the file system can; no byte changes."""
    RESIZE = "grow"
    """Make the file end the length behind the offset, with zeros from the offset on."""
    SYNC = "flush"
    STAT = "stat"
    SEAL = "seal"
    """Make everything durable, the file's times too, and then stat."""
    EVICT = "evict"
    """Have reads of what is synced in a range show the medium from now on, or of all of the file
    if there is no length; a file system whose cache is the medium ignores this."""
    SEEK_DATA = "seek-data"
    """Find the next byte at or after the offset that is not in a hole."""
    SEEK_HOLE = "seek-hole"
    """Find the next byte at or after the offset that is in a hole, or the end."""
    CLOSE = "close"
    """Close the file, and so drop the locks, even if this gives an error: the last operation,
    submitted when all others have returned. EAGAIN: the close was not begun."""


CHANGES = frozenset({Kind.WRITE, Kind.COPY, Kind.DISCARD, Kind.ZERO})
"""Kinds that change bytes, which a flush then makes durable."""


class Operation:
    """One I/O on one replica's file, and afterwards its outcome.

    The replica fills in the outcome, in the trio thread. After the operation was given up, with
    ETIMEDOUT, a late outcome is ignored.
    """

    __slots__ = ("counts", "data", "error", "kind", "length", "offset", "value")

    def __init__(self, kind: Kind, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        self.kind = kind
        self.offset = offset
        """Bytes from the start of the disk."""
        self.length = length
        """Bytes."""
        self.data = data
        """The bytes to write, exactly `length`."""
        self.value: Value = b""
        """The result of a successful operation."""
        self.error: OSError | None = None
        """Why the operation failed; None after success."""
        self.counts = True
        """Whether a success counts towards the threshold."""


class FileStatus(NamedTuple):
    """The result of a stat."""

    blocks: int
    """Of 512 bytes, allocated."""
    identity: Identity


class Usage(NamedTuple):
    """The space that a file takes of its file system."""

    device: int
    blocks: int
    """Of 512 bytes, allocated."""
    free: int | None
    """Bytes that the file system has left; None: all that the file can need is its own already."""


Value = bytes | int | FileStatus
"""Of a read: exactly the bytes asked for. Of a stat and a seal: a `FileStatus`; of a close, too, if
the file is one of this host. Of a seek: the offset, or the size of the disk if there is none. Of a
reach: where it ends. Of a copy: the bytes copied, from the offset on, fewer where the other image
could not be read. Else 0."""

Done = Callable[[Operation, Value, OSError | None], None]
"""Called once in the trio thread when an operation has returned."""


class TruncatedError(OSError):
    """The file is shorter than the disk: the missing bytes are lost, and are not zeros."""

    def __init__(self, size: int) -> None:
        super().__init__(errno.EIO, f"the image was truncated to {size} bytes")
        self.size = size


class TooShortError(OSError):
    """A device is shorter than it is to be, and only its administrator can make it longer."""


class Storage(Protocol):
    """One replica's file."""

    def submit(self, operation: Operation, done: Done) -> None:
        """Start *operation*; *done* is called in the trio thread, perhaps before this returns."""

    def resized(self, size: int) -> None:
        """Note that the disk has *size* bytes from now on, and the file at least as many."""

    @property
    def fast_file(self) -> FastFile | None:
        """The file, if a thread of the fast path may use it."""

    def copying(self, source: "Storage", offset: int, length: int) -> Operation | None:
        """An operation for `submit` that copies a range of *source* to this file.

        None if answers of either file depend on other hosts: a *source* that does not answer must
        not pass for this file. *source* stays open until the copy has returned.
        """
