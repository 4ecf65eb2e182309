"""A regular file, and the system calls on it, which may wait and so belong in threads."""

import errno
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import Lock

from quorumfs.decisions.record import identity_of
from quorumfs.replica import rangecopy
from quorumfs.replica.storage import FileStatus, TruncatedError

_COPY_BUFFER = 256 << 10
"""Bytes copied at a time: small enough to stay in the processor's cache between the two calls."""


class RegularFile:
    """An open image, or sidecar, of *size* bytes. The methods raise `OSError`."""

    plain = True
    """Whether the file's length, reads and writes are those of its descriptor, and no more."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        """Bytes that the file must have; a shorter file was truncated."""
        self.sector = 1
        """Bytes at least, and their multiples, that fallocate takes."""
        self.searched_apart = False
        """Whether searches for data and holes are made through a descriptor of their own. One takes
        long, and holds up every other seek through the same open file: the fast path seeks to the
        end before each write."""
        self._searching = Lock()
        self._search_fd: int | None = None

    def length(self) -> int:
        """Bytes that the file has."""
        # Not by seeking to the end, which waits for writes in flight on a FUSE file system.
        return os.fstat(self.fd).st_size

    def status(self) -> FileStatus:
        """The result of a stat."""
        status = os.fstat(self.fd)
        return FileStatus(status.st_blocks, identity_of(status))

    def sealed(self) -> FileStatus:
        """The result of a stat that tells the content from any later one; all of it is durable."""
        return self.status()

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly *length* bytes."""
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                raise TruncatedError(self.length())
            data += more
        return data

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read to *buffer*; returns the bytes read, which may be fewer, and 0 at the end."""
        return os.preadv(self.fd, [buffer], offset)

    def alone(self, offset: int, length: int) -> AbstractContextManager[None]:
        """While the kernel makes zeros in a range: keep out whoever could undo part of them."""
        return nullcontext()

    def refuse_if_truncated(self) -> None:
        """Raise `TruncatedError` if the file has become shorter.

        A write behind the end of a truncated file would make the file long again, with a hole of
        zeros where data was. Nor may bytes behind the end be taken for a hole.
        """
        if (size := self.length()) < self.size:
            raise TruncatedError(size)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of *data*."""
        written = os.pwrite(self.fd, data, offset)
        while written < len(data):
            more = os.pwrite(self.fd, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.EIO, "a write made no progress")
            written += more

    def resize(self, offset: int, length: int) -> None:
        """Make the file end *length* bytes behind *offset*, with zeros from *offset* on.

        A file that ends before *offset* was truncated. Nothing before *offset* changes.
        """
        if (size := self.length()) < offset:
            raise TruncatedError(size)
        if size > offset and self._has_data(offset):
            os.ftruncate(self.fd, offset)
            size = offset
        if size != offset + length:
            os.ftruncate(self.fd, offset + length)

    def _has_data(self, offset: int) -> bool:
        """Whether there may be data at or after *offset*."""
        try:
            os.lseek(self.fd, offset, os.SEEK_DATA)
        except OSError as error:
            return error.errno != errno.ENXIO
        return True

    def copy_from(self, source: "RegularFile", offset: int, length: int) -> int:
        """Write a range of *source* to the file; returns the bytes copied.

        Fewer bytes are copied where *source* cannot be read; only errors of writing are raised.

        Not with copy_file_range: some file systems would have both images share the blocks, and
        one bad block would be the end of both. Between file systems, where replicas should be, it
        does not work anyway, and it is no faster.
        """
        if rangecopy.available and self.plain and source.plain:
            return self._copy_in_c(source, offset, length)
        buffer = memoryview(bytearray(min(length, _COPY_BUFFER)))
        copied = 0
        while copied < length:
            try:
                read = source.read_into(buffer[: length - copied], offset + copied)
            except OSError:
                break  # an ordinary read of *source* finds out more
            if not read:
                break
            self.refuse_if_truncated()
            self.write(offset + copied, buffer[:read])
            copied += read
        return copied

    def _copy_in_c(self, source: "RegularFile", offset: int, length: int) -> int:
        copied, ended = rangecopy.copy_range(source.fd, self.fd, offset, length, self.size)
        if ended == rangecopy.TRUNCATED:
            self.refuse_if_truncated()
        elif ended:
            raise OSError(ended, os.strerror(ended))
        return copied

    def seek_data(self, offset: int) -> int:
        """The next byte at or after *offset* that is not in a hole; the size if there is none."""
        return self._seek(offset, os.SEEK_DATA, if_unknown=offset)

    def seek_hole(self, offset: int) -> int:
        """The next byte at or after *offset* that is in a hole, or the end."""
        return self._seek(offset, os.SEEK_HOLE, if_unknown=self.size)

    def _seek(self, offset: int, whence: int, *, if_unknown: int) -> int:
        self.refuse_if_truncated()
        try:
            found = os.lseek(self._searched(), offset, whence)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self.size
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                return if_unknown  # the file system knows no holes: all is data
            raise
        return min(found, self.size)

    def _searched(self) -> int:
        """The descriptor to search through."""
        with self._searching:
            if self._search_fd is None and self.searched_apart:
                with suppress(OSError):  # without /proc, or with too few descriptors
                    own = f"/proc/self/fd/{self.fd}"
                    self._search_fd = os.open(own, os.O_RDONLY | os.O_CLOEXEC)
        return self.fd if self._search_fd is None else self._search_fd

    def return_memory(self) -> None:
        """Give memory kept for further requests back to the system; never waits."""

    def close(self) -> None:
        """Close the file, even if this raises."""
        try:
            if self._search_fd is not None:
                os.close(self._search_fd)
        finally:
            os.close(self.fd)
