"""Loads ``copy.c``: a copy from file to file that leaves the interpreter to others."""

import ctypes
import os
from pathlib import Path


def _load() -> ctypes.CDLL | None:
    """The library; None where it was not built, or QUORUMFS_NO_SHIM is set."""
    if os.environ.get("QUORUMFS_NO_SHIM"):
        return None
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name("_copy.abi3.so")))
    except OSError:
        return None
    library.copy_range.restype = ctypes.c_uint64
    library.copy_range.argtypes = (
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.POINTER(ctypes.c_int),
    )
    return library


_library = _load()

available = _library is not None

TRUNCATED = -1
"""Why a copy ended: the file written to is shorter than it must be."""


def copy_range(source: int, target: int, offset: int, length: int, size: int) -> tuple[int, int]:
    """Copy *length* bytes at *offset* from the file descriptor *source* to *target*.

    Returns the bytes copied, and why these are fewer, if so: 0 if *source* cannot be read there,
    `TRUNCATED` if *target* has fewer than *size* bytes, else the errno of writing. In a thread.
    """
    assert _library is not None
    ended = ctypes.c_int()
    copied: int = _library.copy_range(source, target, offset, length, size, ctypes.byref(ended))
    return copied, ended.value
