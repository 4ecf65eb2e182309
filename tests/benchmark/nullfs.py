"""A pyfuse3 file system of one file that keeps nothing: reads are zeros, writes are forgotten.

What quorumfs cannot be faster than while it is a pyfuse3 file system. It has what quorumfs's shim
gives (parallel direct writes, more requests in the background), and nothing to do.

``nullfs.py MOUNTPOINT SIZE`` says a line when mounted, and ends when unmounted.
"""

import errno
import os
import stat
import sys

from quorumfs.fuse import shim  # must be loaded before pyfuse3

# isort: split
import pyfuse3
import trio

FILE_INODE = pyfuse3.InodeT(pyfuse3.ROOT_INODE + 1)
CACHE_S = 300.0


class NullOperations(pyfuse3.Operations):
    """One directory, one file."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._zeros = bytes(1 << 20)

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if name != b"disk.img":
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE_INODE)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    def _attributes(self, inode: pyfuse3.InodeT) -> pyfuse3.EntryAttributes:
        is_file = inode == FILE_INODE
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = pyfuse3.ModeT((stat.S_IFREG | 0o600) if is_file else (stat.S_IFDIR | 0o700))
        entry.st_size = self._size if is_file else 0
        entry.st_nlink = 1
        entry.entry_timeout = entry.attr_timeout = CACHE_S
        return entry

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        direct = bool(flags & os.O_DIRECT) and shim.parallel_direct_writes()
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1), direct_io=direct)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return self._zeros if size == len(self._zeros) else self._zeros[:size]

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        return len(buf)

    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        pass


def main() -> None:
    """Mount and serve."""
    shim.configure(max_background=64, fast=None)
    pyfuse3.init(NullOperations(int(sys.argv[2])), sys.argv[1], {"fsname=nullfs"})
    print("mounted", flush=True)
    try:
        trio.run(pyfuse3.main, 1, 1024)
    finally:
        pyfuse3.close(unmount=True)


if __name__ == "__main__":
    main()
