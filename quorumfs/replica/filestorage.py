"""A replica's file, or block device: `quorumfs.replica.storage.Storage`."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from mmap import PAGESIZE
from time import sleep

from quorumfs.decisions.replicaio import Way
from quorumfs.replica.blockdevice import BlockDevice
from quorumfs.replica.devices import device_of
from quorumfs.replica.directfile import Direct, DirectFile
from quorumfs.replica.fastfile import FastFile
from quorumfs.replica.filesystems import Locality
from quorumfs.replica.lastregions import LastRegions
from quorumfs.replica.pagecache import answers_from_cache
from quorumfs.replica.punching import Puncher
from quorumfs.replica.regularfile import RegularFile
from quorumfs.replica.storage import (
    CHANGES,
    Done,
    Kind,
    Operation,
    Storage,
    TruncatedError,
    Usage,
    Value,
)
from quorumfs.replica.workers import Workers

_ONCE = frozenset({Kind.SYNC, Kind.SEAL, Kind.CLOSE})
"""Operations never tried again: the kernel reports the error of a lost page once, and closes a
file even with an error, so that the number may be another file's by then."""

_COPIES = frozenset({Kind.READ, Kind.REREAD, Kind.WRITE})
"""Operations that only copy bytes where the file is in memory."""

CHEAP_MAX = 64 << 10
"""Bytes that are copied in the trio thread rather than handed to another thread."""

PAUSES_S = tuple(0.001 * 2**n for n in range(10))
"""How long (seconds) to wait before an operation that got EAGAIN is tried again; 1 s in all."""


class _Copying(Operation):
    """A `Kind.COPY` from one file to another."""

    __slots__ = ("source",)

    def __init__(self, source: "FileStorage", offset: int, length: int) -> None:
        super().__init__(Kind.COPY, offset, length)
        self.source = source


class FileStorage:
    """A regular file or block device, read and written by the replica's own threads.

    Must be made inside `trio.run`.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        name: str,
        *,
        locality: Locality = Locality.ELSEWHERE,
        direct: Direct | None = None,
        written: Iterable[int] = (),
    ) -> None:
        """Take over the open *fd* of an image of *size* bytes; *name* is for thread names.

        *locality*: where the file system has its data. *direct* has bytes read and written past the
        page cache, and is taken over, too. *written*: the regions of a device that were written to
        last.
        """
        self.local = locality is not Locality.ELSEWHERE
        """Whether answers depend on this host alone."""
        self.way = Way.BUFFERED if direct is None else Way.DIRECT
        """How bytes are read and written."""
        status = os.fstat(fd)
        self._is_device = stat.S_ISBLK(status.st_mode)
        self._written = LastRegions(written) if self._is_device else None
        self._file = _file(fd, size, direct, self._written)
        self._puncher = Puncher(self._file)
        self._workers = Workers(name, self._insist)
        self._identity = status if self.local or self._is_device else None
        """Tells the file from others; None elsewhere, where inode numbers may change."""
        self._in_memory = locality is Locality.MEMORY
        self.fast_file: FastFile | None = None
        """The file, if a thread of the fast path may use it: its answers depend on no network, and
        it is buffered, as all that C reads and writes."""
        if self.local and self.way is Way.BUFFERED:
            reads = self._in_memory or answers_from_cache(fd)
            self.fast_file = FastFile(
                fd,
                memory=self._in_memory,
                reads=reads,
                regions=self._written.address if self._written else 0,
            )
            self._file.searched_apart = True
        self._lent = 0
        """How many copies from the file are under way."""
        self._closed = False
        self._closing: tuple[Operation, Done] | None = None
        """The close that waits until no copy from the file is under way."""

    def astray(self, path: str) -> str | None:
        """Why *path* does not lead to this file; None if it does, or that is unknown.

        Asks the file system of *path*, which may take long.
        """
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return "its file was removed or replaced: nothing is at its path any more"
            return None
        if self._is_device:
            assert self._identity is not None
            if status.st_rdev != self._identity.st_rdev:
                return "its device goes by another path now: another one, or a file, is at its path"
        elif self._identity is not None and not os.path.samestat(status, self._identity):
            return "its file was removed or replaced: another one is at its path"
        return None

    def is_lost(self, path: str) -> bool:
        """Whether this file fails a read that the file at *path*, opened anew, answers.

        Never on a file system of this host: both would have one page cache. Asks the file system,
        which may take long. A page that the file alone shows, since it could not be written back,
        is not shown any more.
        """
        if self.local or self._is_device:
            return False
        length = min(PAGESIZE, self._file.size)
        with suppress(OSError):
            anew = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if len(os.pread(anew, length, 0)) < length:
                    return False
            finally:
                os.close(anew)
            # Else a page that was read before may hide the failure.
            os.posix_fadvise(self._file.fd, 0, length, os.POSIX_FADV_DONTNEED)
            try:
                self._file.read(0, length)
            except OSError as error:
                return not isinstance(error, TruncatedError)
        return False

    def usage(self) -> Usage | None:
        """How much the file takes of its file system, and how much is left; None if unknown.

        Asks the file system, which may take long.
        """
        if self._is_device:
            assert self._identity is not None
            return Usage(self._identity.st_rdev, self._file.status().blocks, None)
        try:
            file, whole = os.fstat(self._file.fd), os.fstatvfs(self._file.fd)
        except OSError:
            return None
        return Usage(file.st_dev, file.st_blocks, whole.f_bavail * whole.f_frsize)

    def return_memory(self) -> None:
        """Give the memory of earlier requests back to the system."""
        self._file.return_memory()

    def resized(self, size: int) -> None:
        self._file.size = size

    @property
    def file(self) -> RegularFile:
        """What a copy reads from, in a thread."""
        return self._file

    @property
    def descriptor(self) -> int:
        """The open file descriptor."""
        return self._file.fd

    @property
    def device(self) -> int | None:
        """The device of the file system (``st_dev``), if that is one of this host; or itself."""
        if self._identity is None:
            return None
        return self._identity.st_rdev if self._is_device else self._identity.st_dev

    @property
    def returned(self) -> list[Operation]:
        """Operations that a thread has done, and that are not delivered yet."""
        return self._workers.returned

    def adopted(self, operation: Operation) -> None:
        """Note that somebody else carries out *operation* on this file."""
        if self._written is not None and operation.kind in CHANGES:
            self._written.note(operation.offset, operation.length)

    def submit(self, operation: Operation, done: Done) -> None:
        if operation.kind is Kind.SYNC and self._in_memory:
            done(operation, 0, None)  # there is no medium
            return
        self.adopted(operation)
        if self._is_cheap(operation):
            self._perform_now(operation, done)
            return
        if isinstance(operation, _Copying):
            self._copy(operation, operation.source, done)
            return
        if operation.kind is Kind.CLOSE:
            self._closed = True
            if self._lent:
                self._closing = operation, done
                return
        self._workers.hand_over(operation, done)

    def _copy(self, operation: Operation, source: "FileStorage", done: Done) -> None:
        """Have a thread copy from *source*, which stays open until the copy has returned."""
        if not source.lend():
            done(operation, 0, None)  # an ordinary read of *source* finds out more
            return

        def given_back(operation: Operation, value: Value, error: OSError | None) -> None:
            source.give_back()
            done(operation, value, error)

        self._workers.hand_over(operation, given_back)

    def _is_cheap(self, operation: Operation) -> bool:
        """Whether to perform *operation* takes less time than to tell a thread, and never waits."""
        if operation.kind is Kind.STAT:
            # After every write, the kernel asks for it before a read that is not direct.
            return self.local
        small = operation.length <= CHEAP_MAX and self.way is Way.BUFFERED
        return self._in_memory and small and operation.kind in _COPIES

    def _perform_now(self, operation: Operation, done: Done) -> None:
        try:
            value = self._perform(operation)
        except BlockingIOError:
            self._workers.hand_over(operation, done)  # a thread can wait
        except OSError as error:
            done(operation, 0, error)
        else:
            done(operation, value, None)

    def copying(self, source: Storage, offset: int, length: int) -> Operation | None:
        if not (isinstance(source, FileStorage) and source.local and self.local):
            return None
        return _Copying(source, offset, length)

    def lend(self) -> bool:
        """Stay open for a copy from the file, until `give_back`; False if the file is closing."""
        self._lent += not self._closed
        return not self._closed

    def give_back(self) -> None:
        """Note that a copy from the file has ended."""
        self._lent -= 1
        if self._closing is not None and not self._lent:
            closing, self._closing = self._closing, None
            self._workers.hand_over(*closing)

    # In threads

    def _insist(self, operation: Operation) -> Value:
        """Perform *operation*, again for a while if the file system puts it off with EAGAIN."""
        for pause_s in () if operation.kind in _ONCE else PAUSES_S:
            try:
                return self._perform(operation)
            except BlockingIOError:
                sleep(pause_s)
        return self._perform(operation)

    def _perform(self, operation: Operation) -> Value:
        file, offset, length = self._file, operation.offset, operation.length
        match operation.kind:
            case Kind.READ:
                return file.read(offset, length)
            case Kind.REREAD:
                if not self.local:
                    os.posix_fadvise(file.fd, offset, length, os.POSIX_FADV_DONTNEED)
                return file.read(offset, length)
            case Kind.WRITE:
                file.refuse_if_truncated()
                file.write(offset, operation.data)
            case Kind.COPY:
                assert isinstance(operation, _Copying)
                return file.copy_from(operation.source.file, offset, length)
            case Kind.DISCARD | Kind.ZERO:
                self._puncher.make_zeros(operation.kind, offset, length)
            case Kind.REACH:
                return self._puncher.find_reach(offset, length)
            case Kind.ALLOCATE:
                self._puncher.allocate(offset, length)
            case Kind.SEEK_DATA:
                return file.seek_data(offset)
            case Kind.SEEK_HOLE:
                return file.seek_hole(offset)
            case Kind.RESIZE:
                file.resize(offset, length)
            case Kind.SYNC:
                os.fdatasync(file.fd)
            case Kind.EVICT:
                os.posix_fadvise(file.fd, offset, length, os.POSIX_FADV_DONTNEED)
            case Kind.STAT:
                return file.status()
            case Kind.SEAL:
                os.fsync(file.fd)
                return file.sealed()
            case Kind.CLOSE:
                try:
                    return file.status() if self.local else 0
                finally:
                    file.close()
        return 0


def _file(fd: int, size: int, direct: Direct | None, written: LastRegions | None) -> RegularFile:
    if written is not None:
        return BlockDevice(fd, size, device_of(fd), written)
    return RegularFile(fd, size) if direct is None else DirectFile(fd, size, direct)
