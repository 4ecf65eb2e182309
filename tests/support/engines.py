"""One write at a time through each way that a program can ask the kernel for it.

Python's `os` has neither libaio nor io_uring; ctypes on the two libraries that QEMU and fio bring
along is enough for one request. Each function writes all of a buffer, with the flags of pwritev2(2)
for this one write, and raises `OSError` if the write or the flush that belongs to it failed.
"""

import ctypes
import ctypes.util
import mmap
import os
import struct
from collections.abc import Callable

Write = Callable[[int, mmap.mmap, int, int], None]
"""``(fd, buffer, offset, rwf_flags)``; the buffer is page-aligned, as O_DIRECT wants it."""

IOCB_CMD_PWRITEV, IORING_OP_WRITEV = 8, 2  # linux/aio_abi.h, linux/io_uring.h


def psync(fd: int, buffer: mmap.mmap, offset: int, flags: int) -> None:
    _check(os.pwritev(fd, [buffer], offset, flags), buffer)


def libaio(fd: int, buffer: mmap.mmap, offset: int, flags: int) -> None:
    library = ctypes.CDLL(ctypes.util.find_library("aio"))
    context = ctypes.c_void_p()
    vector = _vector(buffer)
    # data, key, aio_rw_flags, opcode, priority, fd, vector, its length, offset, and three unused
    iocb = ctypes.create_string_buffer(
        struct.pack(
            "=QIIHhIQQqQII",
            0, 0, flags, IOCB_CMD_PWRITEV, 0, fd, ctypes.addressof(vector), 1, offset, 0, 0, 0,
        )
    )  # fmt: skip
    pointers = (ctypes.c_void_p * 1)(ctypes.addressof(iocb))
    event = (ctypes.c_int64 * 4)()  # data, iocb, result, unused
    _check(library.io_setup(1, ctypes.byref(context)))
    try:
        _check(library.io_submit(context, ctypes.c_long(1), pointers))
        one = ctypes.c_long(1)
        _check(library.io_getevents(context, one, one, event, None))
        _check(event[2], buffer)
    finally:
        library.io_destroy(context)


def io_uring(fd: int, buffer: mmap.mmap, offset: int, flags: int) -> None:
    library = ctypes.CDLL(ctypes.util.find_library("uring"))
    library.io_uring_get_sqe.restype = ctypes.c_void_p
    ring = ctypes.create_string_buffer(1024)  # more than a struct io_uring
    vector = _vector(buffer)
    completion = ctypes.c_void_p()
    _check(library.io_uring_queue_init(1, ring, 0))
    try:
        # opcode, flags, priority, fd, offset, vector, its length, rw_flags, user data, rest
        entry = struct.pack(
            "=BBHiQQII32x",
            IORING_OP_WRITEV, 0, 0, fd, offset, ctypes.addressof(vector), 1, flags,
        )  # fmt: skip
        ctypes.memmove(library.io_uring_get_sqe(ring), entry, len(entry))
        _check(library.io_uring_submit_and_wait(ring, 1))
        _check(getattr(library, "__io_uring_get_cqe")(ring, ctypes.byref(completion), 0, 1, None))
        assert completion.value is not None
        _check(ctypes.c_int32.from_address(completion.value + 8).value, buffer)
    finally:
        library.io_uring_queue_exit(ring)


ENGINES: dict[str, Write] = {"psync": psync, "libaio": libaio, "io_uring": io_uring}


def aligned(data: bytes) -> mmap.mmap:
    """A page-aligned buffer with *data*."""
    buffer = mmap.mmap(-1, len(data))
    buffer[:] = data
    return buffer


def _vector(buffer: mmap.mmap) -> ctypes.Array[ctypes.c_uint64]:
    """A struct iovec; it must live as long as the request."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    return (ctypes.c_uint64 * 2)(address, len(buffer))


def _check(result: int, buffer: mmap.mmap | None = None) -> None:
    """Raise for an errno as the libraries return it, or for a write that is not whole."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    if buffer is not None:
        assert result == len(buffer), f"{result} bytes written, not {len(buffer)}"
