"""Holes and space of files: fallocate(2) with modes, and what a file occupies."""

import ctypes
import os
from pathlib import Path

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE = 1, 2, 8, 16, 32, 64
PUNCH = PUNCH_HOLE | KEEP_SIZE  # the kernel knows no other

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(file: Path | int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) on a path or descriptor; raises `OSError`."""
    fd = os.open(file, os.O_RDWR) if isinstance(file, Path) else file
    try:
        if _libc.fallocate(fd, mode, offset, length):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        if isinstance(file, Path):
            os.close(fd)


def allocated(path: Path) -> int:
    """Bytes that the file occupies, after its delayed allocations."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        return os.fstat(fd).st_blocks * 512
    finally:
        os.close(fd)


def data_extents(path: Path) -> list[tuple[int, int]]:
    """``(start, end)`` of everything that is not a hole, by SEEK_DATA and SEEK_HOLE."""
    found: list[tuple[int, int]] = []
    fd = os.open(path, os.O_RDONLY)
    try:
        end = 0
        while True:
            try:
                start = os.lseek(fd, end, os.SEEK_DATA)
            except OSError:  # ENXIO: no more data
                return found
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, end))
    finally:
        os.close(fd)
