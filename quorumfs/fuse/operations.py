"""One directory with one file in it: requests in, disk calls out, errnos back.

An adapter only: what a request means to the replicas is the disk's business. What is not here
answers ENOSYS, which the kernel remembers and turns into what a file system without the feature
says (extended attributes: EOPNOTSUPP; file locks: kept by the kernel itself, which is what QEMU
needs; close: no request at all, since close is no flush).
"""

import contextlib
import errno
import functools
import inspect
import itertools
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NoReturn, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
)

from quorumfs.disk.disk import Disk
from quorumfs.fastpath.native import HANDLES
from quorumfs.fastpath.path import FastPath
from quorumfs.fuse import shim
from quorumfs.options.table import MountOptions
from quorumfs.replica.space import Space

log = logging.getLogger(__name__)

FILE_NAME = b"disk.img"
FILE_INODE = InodeT(pyfuse3.ROOT_INODE + 1)
BLOCK_SIZE = 4096

_HANDLE = ~(shim.DURABLE_WRITE | shim.DIRECT_WRITE)
"""What of a write's file handle is the number that `open` gave."""

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16  # linux/falloc.h

CACHE_S = 300.0
"""How long the kernel may keep names and attributes: nobody but the kernel's own requests
changes them, and it forgets attributes by itself after each of its writes. When the disk grows, the
kernel is told."""

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Class = TypeVar("_Class", bound=type)


def _refusal(error: Exception, name: str) -> FUSEError:
    """What to answer when the handler called *name* ended in *error*.

    pyfuse3 ends the whole mount at any exception but `FUSEError`. Here an `OSError` is the
    disk's answer, and anything else is our own error: it costs this request EIO and leaves its
    traceback in the log.
    """
    if isinstance(error, FUSEError):
        return error
    if isinstance(error, OSError):
        return FUSEError(error.errno or errno.EIO)
    log.error("internal error in %s: the request fails", name, exc_info=error)
    return FUSEError(errno.EIO)


def _answered(handler: Callable[_P, Awaitable[_R]]) -> Callable[_P, Awaitable[_R]]:
    """*handler*, ending in a reply whatever happens."""

    @functools.wraps(handler)
    async def answered(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return await handler(*args, **kwargs)
        except Exception as error:
            raise _refusal(error, handler.__name__) from None

    return answered


def _all_answered(cls: _Class) -> _Class:
    """*cls* with every handler answered but the two of nearly all requests: those do it inside."""
    for name, member in list(vars(cls).items()):
        handler = inspect.iscoroutinefunction(member) and hasattr(pyfuse3.Operations, name)
        if handler and name not in ("read", "write"):
            setattr(cls, name, _answered(member))
    return cls


@dataclass(slots=True)
class _Handle:
    """What an opener asked for, and whether it has written."""

    direct: bool
    durable: bool
    """Opened with O_DSYNC, or with O_SYNC, which contains it."""
    wrote: bool = False


@_all_answered
class DiskOperations(pyfuse3.Operations):
    """The file system of one disk."""

    def __init__(
        self,
        disk: Disk,
        options: MountOptions,
        mtime_ns: int,
        space: Space,
        fast: FastPath | None = None,
    ) -> None:
        """*mtime_ns* is the time of the last change before this mount (ns since the epoch)."""
        super().__init__()
        self._space = space
        self._fast = fast
        self._disk = disk
        self._options = options
        self._mtime_ns = mtime_ns
        self._numbers = itertools.count(HANDLES)
        self._handles: dict[FileHandleT, _Handle] = {}

    # Names and attributes

    async def lookup(
        self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        if parent_inode == pyfuse3.ROOT_INODE:
            if name == FILE_NAME:
                return await self._attributes(FILE_INODE)
            if name in (b".", b".."):
                return await self._attributes(pyfuse3.ROOT_INODE)
        raise FUSEError(errno.ENOENT)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        return await self._attributes(inode)

    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise FUSEError(errno.EPERM)
        if fields.update_size and attr.st_size != self._disk.mirror.announced_size:
            raise FUSEError(errno.EPERM)
        if fields.update_mtime:
            self._mtime_ns = attr.st_mtime_ns
        return await self._attributes(inode)

    async def _attributes(self, inode: InodeT) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        entry.generation = 0
        entry.entry_timeout = CACHE_S
        entry.attr_timeout = CACHE_S
        entry.st_uid = self._options.uid
        entry.st_gid = self._options.gid
        entry.st_rdev = 0
        entry.st_blksize = BLOCK_SIZE
        entry.st_atime_ns = entry.st_mtime_ns = entry.st_ctime_ns = self._mtime_ns
        if inode == FILE_INODE:
            entry.st_mode = ModeT(stat.S_IFREG | self._options.mode)
            entry.st_nlink = 1
            entry.st_size = self._disk.mirror.announced_size
            entry.st_blocks = await self._allocated_blocks()
        else:
            entry.st_mode = ModeT(stat.S_IFDIR | 0o755)
            entry.st_nlink = 2
            entry.st_size = 0
            entry.st_blocks = 0
        return entry

    async def _allocated_blocks(self) -> int:
        """As the disk has it; the last known number when no replica answers.

        A disk in trouble must still be found and opened, and this number is for readers only.
        """
        with contextlib.suppress(OSError):
            self._space.allocated = await self._disk.allocated_blocks()
        return self._space.allocated

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        return FileHandleT(0)

    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        if start_id == 0:
            pyfuse3.readdir_reply(token, FILE_NAME, await self._attributes(FILE_INODE), 1)

    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        answer = StatvfsData()
        answer.f_bsize = answer.f_frsize = BLOCK_SIZE
        answer.f_blocks = -(-self._disk.mirror.announced_size // BLOCK_SIZE)
        # What is known: who asks how full file systems are asks all of them, and is not to wait for
        # a replica that hangs.
        used = -(-self._space.allocated * 512 // BLOCK_SIZE)
        answer.f_bfree = answer.f_bavail = max(answer.f_blocks - used, 0)
        if (left := self._space.left) is not None:
            answer.f_bavail = min(answer.f_bavail, left // BLOCK_SIZE)
        answer.f_files = answer.f_ffree = answer.f_favail = 0  # as where inodes are no resource
        answer.f_namemax = 255
        return answer

    # The file

    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        # O_TRUNC arrives here, not as a setattr, and is ignored as by a block device. But the
        # kernel takes the size for 0 until it asks again: whoever has the file open would read
        # the end of it, and a mapping would be gone.
        if flags & os.O_TRUNC and self._handles:
            raise FUSEError(errno.EBUSY)
        direct, durable = bool(flags & os.O_DIRECT), bool(flags & os.O_DSYNC)
        fh = self._free_number(plain=not durable)
        self._handles[fh] = _Handle(direct, durable)
        # Pages cached before this open are dropped: they must not hide a repair. With direct_io
        # (an opener that asked for O_DIRECT loses nothing but shared mappings) the shim adds
        # parallel writes; without it, the fsync that the kernel does send would be lost.
        return FileInfo(fh=fh, keep_cache=False, direct_io=direct and shim.parallel_direct_writes())

    def _free_number(self, *, plain: bool) -> FileHandleT:
        """A number for a new handle; one that the fast path serves for a *plain* handle."""
        served = (FileHandleT(number) for number in range(HANDLES) if plain)
        free = next((number for number in served if number not in self._handles), None)
        return FileHandleT(next(self._numbers)) if free is None else free

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        try:
            return await self._disk.read(off, size)
        except Exception as error:
            raise _refusal(error, "read") from None

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        try:
            handle = self._handles[FileHandleT(fh & _HANDLE)]
            handle.wrote = True
            direct = handle.direct or fh & shim.DIRECT_WRITE
            if direct and off + len(buf) > self._disk.size:
                # The kernel makes EIO of a direct write that is short.
                raise OSError(errno.ENOSPC, "the disk ends before")
            written = await self._disk.write(off, buf)
            # The kernel itself sends an fsync after a buffered write that must be durable. After a
            # direct one it often does not, and never to a handle answered with direct_io.
            durable = handle.durable or fh & shim.DURABLE_WRITE
            if (durable and direct) or self._options.sync:
                await self._disk.flush()
        except Exception as error:
            raise _refusal(error, "write") from None
        return written

    async def fallocate(self, fh: int, mode: int, offset: int, length: int) -> None:
        """Zeros, holes and reserved space inside the disk (the modes are those of fallocate(2)).

        Raises `OSError`: EOPNOTSUPP for other modes, ENOSPC for what would make the disk grow.
        """
        what = mode & ~FALLOC_FL_KEEP_SIZE
        if what not in (0, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE):
            raise OSError(errno.EOPNOTSUPP, "not a change that a disk can make")
        inside = offset + length <= self._disk.size
        if not inside and not mode & FALLOC_FL_KEEP_SIZE:
            raise OSError(errno.ENOSPC, "the disk ends before")
        if offset >= self._disk.size:
            return
        handle = self._handles[FileHandleT(fh)]
        handle.wrote = True
        if what == 0:
            await self._disk.allocate(offset, length)
        else:
            await self._disk.make_zeros(offset, length, discard=what == FALLOC_FL_PUNCH_HOLE)
        if handle.durable or self._options.sync:
            await self._disk.flush()

    async def lseek(self, offset: int, whence: int) -> int:
        """The next data or hole at or after *offset*; raises ENXIO where there is none."""
        data = whence == os.SEEK_DATA
        if offset < self._disk.size:
            found = await (self._disk.next_data(offset) if data else self._disk.next_hole(offset))
            if not data or found < self._disk.size:
                return found
        raise OSError(errno.ENXIO, "no such data or hole")

    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._disk.flush()

    async def release(self, fh: FileHandleT) -> None:
        # The time of change moves when a writer closes, not at each write: the kernel drops the
        # file's cached pages whenever it sees another time.
        wrote = self._handles.pop(fh).wrote
        if self._fast is not None:
            wrote |= self._fast.forget(fh)  # also for the next file with this number
        if wrote:
            self._mtime_ns = time.time_ns()
            with contextlib.suppress(OSError):  # the kernel has forgotten the file
                pyfuse3.invalidate_inode(FILE_INODE, attr_only=True)

    # What a file system of one file does not do

    async def _refuse(self, *_: object) -> NoReturn:
        raise FUSEError(errno.EPERM)

    create = mknod = mkdir = symlink = link = unlink = rmdir = rename = _refuse  # type: ignore[assignment]
