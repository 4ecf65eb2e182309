"""The kinds of file systems, as far as they tell how long an answer may take."""

import ctypes
import logging
import os
import struct
from enum import Enum
from pathlib import Path

import xxhash

log = logging.getLogger(__name__)

_FUSE = 0x65735546

_LOCAL = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x58465342,  # XFS
        0x9123683E,  # Btrfs
        0xF2F52010,  # F2FS
        0xCA451A4E,  # bcachefs
        0x2FC12FC1,  # ZFS
        0x794C7630,  # overlayfs
        0x4D44,  # FAT
        0x2011BAB0,  # exFAT
    }
)
"""File systems with their data on this host's own storage (``statfs(2)``, ``linux/magic.h``)."""

_IN_MEMORY = frozenset({0x01021994, 0x858458F6})  # tmpfs, ramfs

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STX_MNT_ID = 0x90
"""The place of the mount id in ``struct statx`` of ``statx(2)``; bytes."""

_libc = ctypes.CDLL(None, use_errno=True)


class Locality(Enum):
    """Where the data of a file is."""

    MEMORY = "memory"
    """In memory alone: there is no device to wait for."""
    HERE = "here"
    """On this host's own storage."""
    ELSEWHERE = "elsewhere"
    """On a network, on FUSE, or unknown: answers depend on others, and may not come."""


def locality(file: int | str) -> Locality:
    """Where a file, open or by its path, has its data.

    Asks the file system, which may take long.
    """
    kind = _type(file)
    if kind in _IN_MEMORY:
        return Locality.MEMORY
    return Locality.HERE if kind in _LOCAL else Locality.ELSEWHERE


def is_fuse(file: int | str) -> bool:
    """Whether a file, open or by its path, is on a file system of FUSE."""
    return _type(file) == _FUSE


def mount_instance(file: int | str) -> int:
    """The mount that a file, open or by its path, is in, as a 64-bit number; 0: unknown.

    A file system that is mounted anew gets another number. Unknown before Linux 6.8.
    """
    buffer = ctypes.create_string_buffer(256)
    fd, path = (file, b"") if isinstance(file, int) else (_AT_FDCWD, os.fsencode(file))
    if _libc.statx(fd, path, _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, buffer):
        return 0
    (mask,) = struct.unpack_from("<I", buffer)
    if not mask & _STATX_MNT_ID_UNIQUE:
        return 0
    (mount,) = struct.unpack_from("<Q", buffer, _STX_MNT_ID)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return xxhash.xxh3_64_intdigest(boot + struct.pack("<Q", mount)) or 1


def _type(file: int | str) -> int | None:
    """``f_type``, the first member of ``struct statfs``, of the size of a machine word."""
    buffer = ctypes.create_string_buffer(256)
    if isinstance(file, int):
        failed = _libc.fstatfs(file, buffer)
    else:
        failed = _libc.statfs(os.fsencode(file), buffer)
    if failed:
        return None
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def close(fd: int, path: str) -> None:
    """Close *fd*, the file at *path*; an error is logged, and the kernel closes all the same.

    An error is about data that a network file system still had to write, not about data synced
    before; for a file that was not synced, call `os.close`. May hang.
    """
    try:
        os.close(fd)
    except OSError as error:
        log.warning("closing %s: %s", path, error.strerror)
