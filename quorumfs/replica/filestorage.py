"""A replica's file on a real file system: `quorumfs.replica.storage.Storage`."""

import errno
import os
from contextlib import suppress
from resource import RUSAGE_THREAD, getrusage
from time import perf_counter_ns, sleep

from quorumfs.replica.fastfile import FastFile
from quorumfs.replica.filesystems import Locality
from quorumfs.replica.inline_gate import PROMPT_NS, TOO_LONG_NS, InlineGate
from quorumfs.replica.pagecache import answers_from_cache, is_cached
from quorumfs.replica.punching import Puncher
from quorumfs.replica.regularfile import RegularFile
from quorumfs.replica.storage import (
    CHANGES,
    DONE,
    NOTHING,
    PARTLY,
    Attempt,
    Buffer,
    Bytes,
    Done,
    Kind,
    Operation,
    Storage,
    Usage,
    Value,
)
from quorumfs.replica.workers import Workers

_ONCE = frozenset({Kind.SYNC, Kind.SEAL, Kind.CLOSE})
"""Operations never tried again: the kernel reports the error of a lost page once, and closes a
file even with an error, so that the number may be another file's by then."""

_TELLING = CHANGES | {Kind.SYNC}
"""Operations that may fail because of an earlier write."""

CHEAP_MAX = 64 << 10
"""Bytes that are copied in the trio thread rather than handed to another thread."""

CACHE_PROBES = 64
"""Cached reads in a row, after a read that was not, before reads are taken for cached unasked."""

PAUSES_S = tuple(0.001 * 2**n for n in range(10))
"""How long (seconds) to wait before an operation that got EAGAIN is tried again; 1 s in all."""


def _waits() -> int:
    """How often this thread has waited for anything but a processor."""
    return getrusage(RUSAGE_THREAD).ru_nvcsw


class _Copying(Operation):
    """A `Kind.COPY` from one file to another."""

    __slots__ = ("source",)

    def __init__(self, source: "FileStorage", offset: int, length: int) -> None:
        super().__init__(Kind.COPY, offset, length)
        self.source = source


class FileStorage:
    """A regular file, read and written by the replica's own threads.

    `read_now` and `write_now` run in the calling thread, where `may_inline` allows them. Must be
    made inside `trio.run`.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        name: str,
        *,
        locality: Locality = Locality.ELSEWHERE,
        inline: bool = False,
    ) -> None:
        """Take over the open *fd* of an image of *size* bytes; *name* is for thread names.

        *locality*: where the file system has its data.
        *inline*: whether anything may be done in the calling thread at all.
        """
        self.local = locality is not Locality.ELSEWHERE
        """Whether answers depend on this host alone."""
        self.inline_gate = InlineGate()
        self._file = RegularFile(fd, size)
        self._puncher = Puncher(self._file)
        self._workers = Workers(name, self._perform_in_thread)
        self._identity = os.fstat(fd) if self.local else None
        """Tells the file from others; None elsewhere, where inode numbers may change."""
        self._inline = inline and self.local
        self._in_memory = inline and locality is Locality.MEMORY
        self._cache_answers = self._inline and answers_from_cache(fd)
        self._fast_file = (
            FastFile(fd, self._in_memory, self._in_memory or self._cache_answers)
            if self._inline
            else None
        )
        self._cache_probes = CACHE_PROBES
        """Reads left that first ask whether they are cached."""
        self._lost: OSError | None = None
        """The error of a `write_now` that failed; the kernel may not report it again."""
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
        if self._identity is not None and not os.path.samestat(status, self._identity):
            return "its file was removed or replaced: another one is at its path"
        return None

    def usage(self) -> Usage | None:
        """How much the file takes of its file system, and how much is left; None if unknown.

        Asks the file system, which may take long.
        """
        try:
            file, whole = os.fstat(self._file.fd), os.fstatvfs(self._file.fd)
        except OSError:
            return None
        return Usage(file.st_dev, file.st_blocks, whole.f_bavail * whole.f_frsize)

    @property
    def descriptor(self) -> int:
        """The open file descriptor."""
        return self._file.fd

    @property
    def device(self) -> int | None:
        """The device of the file system (``st_dev``), if that is one of this host."""
        return None if self._identity is None else self._identity.st_dev

    @property
    def returned(self) -> list[Operation]:
        """Operations that a thread has done, and that are not delivered yet."""
        return self._workers.returned

    @property
    def fast_file(self) -> FastFile | None:
        return self._fast_file

    # Here and now

    @property
    def may_inline(self) -> bool:
        inline_gate = self.inline_gate
        if inline_gate.watched or not inline_gate.trusted:  # threads change them one by one
            inline_gate.look_again(perf_counter_ns())
        workers = self._workers
        if workers.in_flight and perf_counter_ns() - workers.progress_at > TOO_LONG_NS:
            return False  # a thread has waited long, so this thread might, too
        return self._inline and inline_gate.trusted

    def read_now(self, offset: int, length: int) -> Bytes | None:
        data: Bytes
        file = self._file
        if not self._cache_answers and not self._in_memory:
            return None
        if self._cache_probes and self._cache_answers:
            # A read that is not cached starts to read ahead, even with RWF_NOWAIT, and may wait
            # for the file system's metadata.
            self._cache_probes -= 1
            if not is_cached(file.fd, offset, length):
                self._cache_probes = CACHE_PROBES
                return None
        began = perf_counter_ns()
        try:
            if self._in_memory:
                data = os.pread(file.fd, length, offset)
                whole = len(data) == length
            else:
                data = bytearray(length)
                whole = os.preadv(file.fd, (data,), offset, os.RWF_NOWAIT) == length
        except OSError:
            whole = False
        if perf_counter_ns() - began > TOO_LONG_NS:
            self._was_slow(began, None)
        if whole:
            return data
        self._cache_probes = CACHE_PROBES
        return None

    def write_now(self, offset: int, data: Buffer) -> Attempt:
        if self._workers.holding or self._lost is not None:
            return NOTHING
        file = self._file
        waits = _waits() if self.inline_gate.watched else None
        began = perf_counter_ns()
        written = 0
        try:
            # Not fstat: it takes three times as long, and is better only where files are remote.
            if os.lseek(file.fd, 0, os.SEEK_END) < file.size:
                return NOTHING
            written = os.pwrite(file.fd, data, offset)
        except BlockingIOError:
            pass  # a thread can wait
        except OSError as error:
            self._lost = error
        if perf_counter_ns() - began > PROMPT_NS:
            self._was_slow(began, waits)
        if written == len(data):
            return DONE
        return PARTLY if written or self._lost is not None else NOTHING

    def _was_slow(self, began: int, waits: int | None) -> None:
        now = perf_counter_ns()
        waited = waits is not None and _waits() > waits
        self.inline_gate.took(now - began, now, waited=waited)

    # Whenever it is done

    def submit(self, operation: Operation, done: Done) -> None:
        if (
            self._in_memory  # there is no device that could hang
            and operation.kind is Kind.WRITE
            and operation.length <= CHEAP_MAX
            and self.may_inline
            and self.write_now(operation.offset, operation.data) is DONE
        ):
            done(operation, 0, None)
            return
        if self._lost is not None and operation.kind in _TELLING:
            # As a rule this is the same write. It is not tried again: where writes are synchronous
            # the error may be that of an earlier write, reported once, whose data is lost.
            error, self._lost = self._lost, None
            done(operation, 0, error)
            return
        if operation.kind is Kind.SYNC and self._in_memory:
            done(operation, 0, None)  # there is no medium
            return
        if (value := self._cheaply(operation)) is not None:
            done(operation, value, None)
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

    def _cheaply(self, operation: Operation) -> Value | None:
        """The answer, if it takes less time than telling a thread."""
        if operation.kind is Kind.READ and operation.length <= CHEAP_MAX and self.may_inline:
            # The request waits for another replica.
            data = self.read_now(operation.offset, operation.length)
            return None if data is None else bytes(data)
        if operation.kind is Kind.STAT and self.may_inline:
            # After every write, the kernel asks for it before a read that is not direct.
            with suppress(OSError):
                return self._file.status()
        return None

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

    def _perform_in_thread(self, operation: Operation) -> Value:
        began = perf_counter_ns()
        value = self._insist(operation)
        took = (now := perf_counter_ns()) - began
        if took > TOO_LONG_NS and operation.kind is Kind.WRITE:
            self.inline_gate.took(took, now, waited=True)
        return value

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
                return file.copy_from(operation.source.descriptor, offset, length)
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
            case Kind.SYNC:
                os.fdatasync(file.fd)
            case Kind.EVICT:
                os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            case Kind.STAT:
                return file.status()
            case Kind.SEAL:
                os.fsync(file.fd)
                return file.status()
            case Kind.CLOSE:
                os.close(file.fd)
        return 0
