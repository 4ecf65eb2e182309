"""The narrow interface to one replica's file, and its implementation on a real file.

Everything above speaks to a file by submitting an `Operation` and being called back, so that a
test can put a simulated disk underneath, and so that asking N replicas at once costs no task each.
"""

import ctypes
import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from queue import SimpleQueue
from resource import RUSAGE_THREAD, getrusage
from threading import Thread
from time import perf_counter_ns, sleep
from typing import NamedTuple, Protocol

import trio

from quorumfs.filesystems import Locality
from quorumfs.promptness import PROMPT_NS, TOO_LONG_NS, Promptness
from quorumfs.reach import LEAST, LONG_NS, Reach
from quorumfs.sidecar import Identity, identity_of

log = logging.getLogger(__name__)

_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16  # linux/falloc.h

WORKERS_MAX = 16
"""Threads per replica. Each replica has its own, so that a hung one starves nobody; as many as
a guest commonly keeps requests in flight on a disk."""


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

_ONCE = frozenset({Kind.SYNC, Kind.SEAL, Kind.CLOSE})
"""What is never tried again: the kernel tells whatever error a lost page had, once; and it closes
even with an error, so that the number may be another file's by then."""

_TELLING = CHANGES | {Kind.SYNC}
"""What may fail because of an earlier write."""

_HOLDING = frozenset(
    {Kind.SEEK_DATA, Kind.SEEK_HOLE, Kind.REACH, Kind.DISCARD, Kind.ZERO, Kind.ALLOCATE}
)
"""What holds a lock of the file, that others want, while its file system looks where data is."""


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
    def prompt(self) -> bool:
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


_FALLOCATE_MODES = {
    Kind.DISCARD: (_PUNCH_HOLE,),
    Kind.ZERO: (_ZERO_RANGE, _PUNCH_HOLE),
    Kind.ALLOCATE: (0,),
}
"""What to try, in this order, before zeros are written."""

_ZEROS = bytes(1 << 20)

_WRITTEN_MAX = 64 << 20
"""Bytes of zeros that are written at a time where no hole can be made: more could take longer than
a replica has time for. Only a file system that could once punch is asked for more."""

_COPY_BUFFER = 256 << 10
"""Bytes copied at a time: small enough to stay in the processor's cache between the two calls."""

CHEAP_MAX = 64 << 10
"""Bytes that are rather copied in the trio thread than handed to another one."""

DOUBTS = 64
"""After a read of what was not cached, so many have to be of what is before it is expected."""

PAUSES_S = tuple(0.001 * 2**n for n in range(10))
"""How long (seconds) to wait before an operation that got EAGAIN is tried again; 1 s in all."""

_libc = ctypes.CDLL(None, use_errno=True)  # the os module has no fallocate with modes
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _waits() -> int:
    """How often this thread has waited for something else than a processor."""
    return getrusage(RUSAGE_THREAD).ru_nvcsw


def _cache_answers(fd: int) -> bool:
    """Whether the file system answers a read from its page cache, or else says so at once."""
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return True


class _CacheRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("length", ctypes.c_uint64))


class _CacheStat(ctypes.Structure):
    _fields_ = (("cached", ctypes.c_uint64), ("others", ctypes.c_uint64 * 4))


_CACHESTAT = 451  # the same on all architectures but Alpha
_PAGE = os.sysconf("SC_PAGESIZE")
_asked, _found = _CacheRange(), _CacheStat()  # the trio thread's: to make them takes longer
_asked_and_found = (ctypes.byref(_asked), ctypes.byref(_found), 0)


def is_cached(fd: int, offset: int, length: int) -> bool:
    """Whether all of a range is in the page cache, or the kernel (before 6.5) cannot tell."""
    _asked.offset, _asked.length = offset, length
    if _libc.syscall(_CACHESTAT, fd, *_asked_and_found):
        return True
    return bool(_found.cached > (offset + length - 1) // _PAGE - offset // _PAGE)


class _Copying(Operation):
    """A `Kind.COPY` from a file to another one."""

    __slots__ = ("source",)

    def __init__(self, source: "FileStorage", offset: int, length: int) -> None:
        super().__init__(Kind.COPY, offset, length)
        self.source = source


class FileStorage:
    """A regular file, read and written by the replica's own threads.

    Completions come back in batches: trio is woken once for all that finished meanwhile. What is
    asked to be done *now* is done in the calling thread, if the file is on a file system of this
    host and has been prompt. Must be made inside `trio.run`.
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

        *locality*: where its file system has its data.
        *inline*: whether anything may be done in the calling thread at all.
        """
        self.fd = fd
        self.local = locality is not Locality.ELSEWHERE
        """Whether its answers depend on this host alone."""
        self._size = size
        self._name = name
        self._file = os.fstat(fd) if self.local else None
        """By which it is told from others; elsewhere numbers of files may change."""
        self.promptness = Promptness()
        self._inline = inline and self.local
        self._in_memory = inline and locality is Locality.MEMORY
        self._cache_answers = self._inline and _cache_answers(fd)
        self._token = trio.lowlevel.current_trio_token()
        self._queue: SimpleQueue[tuple[Operation, Done] | None] = SimpleQueue()
        self._finished: deque[tuple[Operation, Done, Value, OSError | None]] = deque()
        self._threads: list[Thread] = []
        self._in_flight = 0
        self._lent = 0
        """How many copy from it."""
        self._closed = False
        self._closing: tuple[Operation, Done] | None = None
        """What waits until nobody copies from it."""
        self._holding = 0
        """Operations in flight that hold a lock of the file: a write here and now would wait."""
        self._lost: OSError | None = None
        """Of a write that failed here and now: the kernel may not tell it again."""
        self._doubtful = DOUBTS
        """Reads for which to ask beforehand if they are cached."""
        self._progress_at = 0
        """When a thread last began or ended something, by `perf_counter_ns`."""
        self._modes_missing: set[int] = set()
        """Modes of fallocate that this file system has been found not to have."""
        self._reach = Reach()
        self._measured = (0, 0, 0)
        """Of the last reach: where it begins and ends, and how much in it is data (bytes)."""
        self._known_data = (0, 0)
        """Where it last found data in one piece (bytes). To find the end again for each reach takes
        a file system as long as all that is left of it is long; what is a hole by now costs only
        that the reach is shorter than it could be."""

    def astray(self, path: str) -> str | None:
        """Why *path* does not lead to this file; None if it does, or that cannot be told.

        Asks the file system of the path, which may take long.
        """
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return "its file was removed or replaced: nothing is at its path any more"
            return None
        if self._file is not None and not os.path.samestat(status, self._file):
            return "its file was removed or replaced: another one is at its path"
        return None

    def usage(self) -> Usage | None:
        """How much it takes of its file system, and what is left; None if that cannot be told.

        Asks the file system, which may take long.
        """
        try:
            file, whole = os.fstat(self.fd), os.fstatvfs(self.fd)
        except OSError:
            return None
        return Usage(file.st_dev, file.st_blocks, whole.f_bavail * whole.f_frsize)

    @property
    def descriptor(self) -> int:
        """What the file is open as."""
        return self.fd

    @property
    def device(self) -> int | None:
        """The device of its file system (``st_dev``), if that is one of this host."""
        return None if self._file is None else self._file.st_dev

    @property
    def returned(self) -> list[Operation]:
        """What threads have done, and nobody has heard of yet."""
        return [operation for operation, *_ in self._finished]

    @property
    def prompt(self) -> bool:
        promptness = self.promptness
        if promptness.watched or not promptness.trusted:  # threads change them one by one
            promptness.look_again(perf_counter_ns())
        if self._in_flight and perf_counter_ns() - self._progress_at > TOO_LONG_NS:
            return False  # a thread waits long for it: so might we
        return self._inline and promptness.trusted

    def read_now(self, offset: int, length: int) -> Bytes | None:
        data: Bytes
        if not self._cache_answers and not self._in_memory:
            return None
        if self._doubtful and self._cache_answers:
            # A read of what is not cached begins to read ahead, even with RWF_NOWAIT: that may
            # have to wait for the file system's own data, which tells where the file's is.
            self._doubtful -= 1
            if not is_cached(self.fd, offset, length):
                self._doubtful = DOUBTS
                return None
        began = perf_counter_ns()
        try:
            if self._in_memory:
                data = os.pread(self.fd, length, offset)
                whole = len(data) == length
            else:
                data = bytearray(length)
                whole = os.preadv(self.fd, (data,), offset, os.RWF_NOWAIT) == length
        except OSError:
            whole = False
        if perf_counter_ns() - began > TOO_LONG_NS:
            self._was_slow(began, None)
        if whole:
            return data
        self._doubtful = DOUBTS
        return None

    def write_now(self, offset: int, data: Buffer) -> Attempt:
        if self._holding or self._lost is not None:
            return Attempt.NOTHING
        waits = _waits() if self.promptness.watched else None
        began = perf_counter_ns()
        written = 0
        try:
            # Not fstat, which takes three times as long; what that is better for is never local.
            if os.lseek(self.fd, 0, os.SEEK_END) < self._size:
                return Attempt.NOTHING
            written = os.pwrite(self.fd, data, offset)
        except BlockingIOError:
            pass  # a thread can wait until it goes
        except OSError as error:
            self._lost = error
        if perf_counter_ns() - began > PROMPT_NS:
            self._was_slow(began, waits)
        if written == len(data):
            return Attempt.DONE
        return Attempt.PARTLY if written or self._lost is not None else Attempt.NOTHING

    def _was_slow(self, began: int, waits: int | None) -> None:
        now = perf_counter_ns()
        waited = waits is not None and _waits() > waits
        self.promptness.took(now - began, now, waited=waited)

    def submit(self, operation: Operation, done: Done) -> None:
        if (
            self._in_memory  # no device can hang that nobody has waited for
            and operation.kind is Kind.WRITE
            and operation.length <= CHEAP_MAX
            and self.prompt
            and self.write_now(operation.offset, operation.data) is Attempt.DONE
        ):
            done(operation, 0, None)
            return
        if self._lost is not None and operation.kind in _TELLING:
            # The same write as a rule. It is not tried again: where writes are synchronous the
            # error may be that of an earlier one, told once, and what that wrote is lost.
            error, self._lost = self._lost, None
            done(operation, 0, error)
            return
        if operation.kind is Kind.SYNC and self._in_memory:
            done(operation, 0, None)  # there is no medium that it could be made durable on
            return
        if (value := self._cheaply(operation)) is not None:
            done(operation, value, None)
            return
        if isinstance(operation, _Copying) and not operation.source.lend():
            done(operation, 0, None)  # who reads it the usual way finds out more
            return
        if operation.kind is Kind.CLOSE:
            self._closed = True
            if self._lent:
                self._closing = operation, done
                return
        self._hand_over(operation, done)

    def _hand_over(self, operation: Operation, done: Done) -> None:
        """Have a thread perform it."""
        if self._in_flight >= len(self._threads) < WORKERS_MAX:
            # Daemon threads: one that hangs in a system call must not keep the process alive.
            thread = Thread(target=self._work, name=f"io {self._name}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system has no more threads for us
                if not self._threads:
                    if isinstance(operation, _Copying):
                        operation.source.give_back()
                    done(operation, 0, OSError(errno.EAGAIN, "no thread could be started"))
                    return
            else:
                self._threads.append(thread)
        if not self._in_flight:
            self._progress_at = perf_counter_ns()
        self._in_flight += 1
        self._holding += operation.kind in _HOLDING
        self._queue.put((operation, done))
        if operation.kind is Kind.CLOSE:
            for _ in self._threads:
                self._queue.put(None)

    def _cheaply(self, operation: Operation) -> Value | None:
        """The answer, if it is there sooner than a thread would be told."""
        if operation.kind is Kind.READ and operation.length <= CHEAP_MAX and self.prompt:
            # It is another replica that has to be waited for.
            data = self.read_now(operation.offset, operation.length)
            return None if data is None else bytes(data)
        if operation.kind is Kind.STAT and self.prompt:
            # The kernel asks anew after every write, before a read that is not direct.
            with suppress(OSError):
                return self._status()
        return None

    def copying(self, source: Storage, offset: int, length: int) -> Operation | None:
        if not (isinstance(source, FileStorage) and source.local and self.local):
            return None
        return _Copying(source, offset, length)

    def lend(self) -> bool:
        """Stay open for who copies from it, until `give_back`; False if it is being closed."""
        self._lent += not self._closed
        return not self._closed

    def give_back(self) -> None:
        self._lent -= 1
        if self._closing is not None and not self._lent:
            closing, self._closing = self._closing, None
            self._hand_over(*closing)

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            operation, done = entry
            value: Value = 0
            error: OSError | None = None
            try:
                began = perf_counter_ns()
                value = self._insist(operation)
                took = (now := perf_counter_ns()) - began
                if took > TOO_LONG_NS and operation.kind is Kind.WRITE:
                    self.promptness.took(took, now, waited=True)
            except OSError as caught:
                error = caught
            except Exception:
                log.exception("unexpected error in a worker of %s", self._name)
                error = OSError(errno.EIO, "internal error, see the log")
            self._finished.append((operation, done, value, error))
            del entry, operation, done, value, error  # an idle thread must not hold buffers
            try:
                self._token.run_sync_soon(self._deliver, idempotent=True)
            except trio.RunFinishedError:
                return  # the daemon is gone and nobody waits any more

    def _deliver(self) -> None:
        while self._finished:
            operation, done, value, error = self._finished.popleft()
            self._in_flight -= 1
            self._holding -= operation.kind in _HOLDING
            self._progress_at = perf_counter_ns()
            if isinstance(operation, _Copying):
                operation.source.give_back()
            done(operation, value, error)

    def _insist(self, operation: Operation) -> Value:
        """Perform it, again and again for a while if its file system puts it off with EAGAIN."""
        for pause_s in () if operation.kind in _ONCE else PAUSES_S:
            try:
                return self._perform(operation)
            except BlockingIOError:
                sleep(pause_s)
        return self._perform(operation)

    def _perform(self, operation: Operation) -> Value:
        match operation.kind:
            case Kind.READ:
                return self._read(operation.offset, operation.length)
            case Kind.REREAD:
                if not self.local:
                    where = operation.offset, operation.length
                    os.posix_fadvise(self.fd, *where, os.POSIX_FADV_DONTNEED)
                return self._read(operation.offset, operation.length)
            case Kind.WRITE:
                self._refuse_if_truncated()
                self._write(operation.offset, operation.data)
            case Kind.COPY:
                assert isinstance(operation, _Copying)
                return self._copy(operation.source.fd, operation.offset, operation.length)
            case Kind.DISCARD | Kind.ZERO:
                self._refuse_if_truncated()
                self._make_zeros(operation.kind, operation.offset, operation.length)
            case Kind.REACH:
                return self._find_reach(operation.offset, operation.length)
            case Kind.ALLOCATE:
                self._refuse_if_truncated()
                self._fallocate(operation.kind, operation.offset, operation.length)
            case Kind.SEEK_DATA | Kind.SEEK_HOLE:
                return self._seek(operation.kind, operation.offset)
            case Kind.SYNC:
                os.fdatasync(self.fd)
            case Kind.EVICT:
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            case Kind.STAT:
                return self._status()
            case Kind.SEAL:
                os.fsync(self.fd)
                return self._status()
            case Kind.CLOSE:
                os.close(self.fd)
        return 0

    def _status(self) -> FileStatus:
        status = os.fstat(self.fd)
        return FileStatus(status.st_blocks, identity_of(status))

    def _read(self, offset: int, length: int) -> bytes:
        data = os.pread(self.fd, length, offset)
        while len(data) < length:
            more = os.pread(self.fd, length - len(data), offset + len(data))
            if not more:
                raise TruncatedError(os.fstat(self.fd).st_size)
            data += more
        return data

    def _refuse_if_truncated(self) -> None:
        # A write behind the end of a truncated file would make it long again, with a hole of
        # zeros where data was; and what is behind the end is no hole. (fstat, because seeking to
        # the end waits for writes in flight on a FUSE file system.)
        size = os.fstat(self.fd).st_size
        if size < self._size:
            raise TruncatedError(size)

    def _write(self, offset: int, data: bytes | memoryview) -> None:
        written = os.pwrite(self.fd, data, offset)
        while written < len(data):
            more = os.pwrite(self.fd, memoryview(data)[written:], offset + written)
            if not more:
                raise OSError(errno.EIO, "a write made no progress")
            written += more

    def _copy(self, source: int, offset: int, length: int) -> int:
        """Returns the bytes copied; raises what writing raises.

        Not with copy_file_range: some file systems would have both images share the blocks, and
        one bad block would be the end of both. Between file systems, where replicas should be, it
        does not work anyway, and it is no faster.
        """
        buffer = memoryview(bytearray(min(length, _COPY_BUFFER)))
        copied = 0
        while copied < length:
            try:
                read = os.preadv(source, [buffer[: length - copied]], offset + copied)
            except OSError:
                break  # who reads it the usual way finds out more
            if not read:
                break
            self._refuse_if_truncated()
            self._write(offset + copied, buffer[:read])
            copied += read
        return copied

    def _make_zeros(self, kind: Kind, offset: int, length: int) -> None:
        began = perf_counter_ns()
        if not self._fallocate(kind, offset, length):
            if length > _WRITTEN_MAX:
                raise OSError(errno.EOPNOTSUPP, "its file system makes no holes any more")
            for start in range(offset, offset + length, len(_ZEROS)):
                self._write(start, _ZEROS[: offset + length - start])
        start, end, data = self._measured
        exactly = (start, end) == (offset, offset + length)
        self._reach.took(length, data if exactly else 0, perf_counter_ns() - began)

    def _find_reach(self, offset: int, length: int) -> int:
        """How far zeros are to be made at one go: at most `_WRITTEN_MAX` where they are written."""
        end, room = offset + min(length, self._reach.length), self._reach.data
        if _PUNCH_HOLE in self._modes_missing:
            end = min(end, offset + min(room, _WRITTEN_MAX))
        at, data = offset, 0
        until = perf_counter_ns() + LONG_NS
        while at < end and data < room and (at == offset or perf_counter_ns() < until):
            start, stop = self._known_data
            if not start <= at < stop:
                start = self._seek(Kind.SEEK_DATA, at)
                stop = self._seek(Kind.SEEK_HOLE, start) if start < end else end
                if start < end:
                    self._known_data = start, stop
            start = max(start, at)
            at = min(stop, start + room - data, end)
            if start < end:  # a piece of data costs something, however short it is
                data += max(at - start, LEAST)
        if at < offset + length:  # a part of a block would keep its space
            at = max(at - at % LEAST, offset - offset % LEAST + LEAST)
        at = min(at, offset + length)
        self._measured = (offset, at, data)
        return at

    def _fallocate(self, kind: Kind, offset: int, length: int) -> bool:
        """Whether the file system could do it; raises `OSError` if it failed."""
        for mode in _FALLOCATE_MODES[kind]:
            if mode in self._modes_missing:
                continue
            number = errno.EINTR
            while number == errno.EINTR:
                if _libc.fallocate(self.fd, mode | _KEEP_SIZE, offset, length) == 0:
                    return True
                number = ctypes.get_errno()
            if number not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise OSError(number, os.strerror(number))
            self._modes_missing.add(mode)
        return False

    def _seek(self, kind: Kind, offset: int) -> int:
        self._refuse_if_truncated()
        data = kind is Kind.SEEK_DATA
        try:
            found = os.lseek(self.fd, offset, os.SEEK_DATA if data else os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return self._size
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                return offset if data else self._size  # it knows no holes: all is data
            raise
        return min(found, self._size)
