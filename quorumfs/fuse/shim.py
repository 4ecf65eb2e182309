"""Loads the libfuse shim (``shim.c``): what libfuse offers and pyfuse3 does not pass on.

pyfuse3 gives a file system no ``fallocate``, no ``lseek``, not the sync flag of a single write, no
parallel direct writes, and no say in the connection's settings. The shim defines two of the
functions that pyfuse3 calls in libfuse. It must be loaded before pyfuse3, with its symbols for
everybody: then the dynamic linker finds them first.

Nothing else knows how this is done. Where it cannot be had (it was not built, pyfuse3 uses another
libfuse, ``QUORUMFS_NO_SHIM`` is set) a mount works without, and `missing` says what that means.
"""

import ctypes
import errno
import importlib.util
import logging
import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import trio

from quorumfs.fastpath.path import FastPath

log = logging.getLogger(__name__)

DURABLE_WRITE = 1 << 63
"""Set in the file handle of a write that must be durable when it returns."""

DIRECT_WRITE = 1 << 62
"""Set in the file handle of a write with O_DIRECT, which may have been set after the open."""

COHERENT_KERNEL = (6, 9)
"""Before, a direct write to a file answered with direct_io leaves older pages in the cache."""


class Call(IntEnum):
    """``enum call`` of shim.c: the requests that pyfuse3 does not know."""

    FALLOCATE = 0
    LSEEK = 1


_Callback = ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint64,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_int,
)


def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if os.environ.get("QUORUMFS_NO_SHIM"):
        return "QUORUMFS_NO_SHIM is set"
    own = Path(__file__).with_name("_shim.abi3.so")
    theirs = importlib.util.find_spec("pyfuse3")
    if not own.exists():
        return "it was not built: that needs a C compiler, pkg-config and libfuse3-dev"
    if theirs is None or theirs.origin is None:
        return "pyfuse3 is not installed"
    if _libfuse(own) != _libfuse(Path(theirs.origin)):
        return "pyfuse3 was built for another libfuse"
    try:
        return ctypes.CDLL(str(own), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)


def _libfuse(library: Path) -> set[bytes]:
    """The versions of libfuse that a shared library asks for."""
    return set(re.findall(rb"libfuse3\.so\.\d+", library.read_bytes()))


_library = _load()


@dataclass(frozen=True, slots=True)
class Handlers:
    """Who serves what pyfuse3 does not know; they raise `OSError`, or give what is documented."""

    fallocate: Callable[[int, int, int, int], Awaitable[None]]
    """``(handle, mode, offset, length)``."""
    lseek: Callable[[int, int], Awaitable[int]]
    """``(offset, whence)``: the new offset; whence is SEEK_DATA or SEEK_HOLE."""


class _Requests:
    """Receives requests from the shim, has them served in tasks, and replies."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.handlers: Handlers | None = None
        self.nursery: trio.Nursery | None = None
        # C holds them: they must live as long as this.
        self.callback = _Callback(self._receive)
        self._reply_error = library.quorumfs_shim_reply_error
        self._reply_error.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._reply_offset = library.quorumfs_shim_reply_offset
        self._reply_offset.argtypes = (ctypes.c_void_p, ctypes.c_int64)

    def _receive(
        self, request: int, kind: int, handle: int, offset: int, length: int, mode_or_whence: int
    ) -> None:
        """Called by libfuse, in the session loop's task: an exception here would be lost."""
        if self.nursery is None or self.handlers is None:
            self._reply_error(request, errno.EIO)
        elif kind == Call.LSEEK:
            seek = self.handlers.lseek(offset, mode_or_whence)
            self.nursery.start_soon(self._serve, request, seek)
        else:
            change = self.handlers.fallocate(handle, mode_or_whence, offset, length)
            self.nursery.start_soon(self._serve, request, change)

    async def _serve(self, request: int, work: Awaitable[int | None]) -> None:
        try:
            result = await work
        except OSError as error:
            self._reply_error(request, error.errno or errno.EIO)
        except Exception:
            log.exception("internal error: the request fails")
            self._reply_error(request, errno.EIO)
        else:
            if result is None:
                self._reply_error(request, 0)
            else:
                self._reply_offset(request, result)


_requests = _Requests(_library) if isinstance(_library, ctypes.CDLL) else None


def configure(max_background: int, fast: FastPath | None) -> None:
    """Prepare for `pyfuse3.init`, which must follow. With *fast* requests come from there."""
    if isinstance(_library, ctypes.CDLL) and _requests is not None:
        if fast is not None:
            _library.quorumfs_shim_set_source(ctypes.c_void_p(fast.receive), fast.bell)
        _library.quorumfs_shim_configure(_requests.callback, ctypes.c_uint(max_background))


def serve(handlers: Handlers, nursery: trio.Nursery) -> None:
    """Serve the requests that come through the shim by *handlers*, in tasks of *nursery*."""
    if isinstance(_library, ctypes.CDLL) and _requests is not None:
        _requests.handlers, _requests.nursery = handlers, nursery


def in_use() -> bool:
    """Whether `pyfuse3.init` went through the shim."""
    return isinstance(_library, ctypes.CDLL) and bool(_library.quorumfs_shim_in_use())


def session_fd() -> int | None:
    """What the kernel's requests are read from, after `pyfuse3.init`; None if it is not known."""
    if not isinstance(_library, ctypes.CDLL) or _library.quorumfs_shim_session_fd() < 0:
        return None
    return int(_library.quorumfs_shim_session_fd())


def parallel_direct_writes() -> bool:
    """Whether an opener with O_DIRECT may be answered with direct_io, for parallel writes."""
    numbers = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (
        in_use() and numbers is not None and (int(numbers[1]), int(numbers[2])) >= COHERENT_KERNEL
    )


def missing() -> str | None:
    """What a mount lacks of what the shim gives, and why; None if nothing."""
    if parallel_direct_writes():
        return None
    if in_use():
        return "no parallel direct writes: they need Linux 6.9"
    reason = _library if isinstance(_library, str) else "pyfuse3 was built for another libfuse"
    return (
        f"no libfuse shim ({reason}): no fast path, no discard, no SEEK_HOLE, no parallel direct "
        "writes, no max-background, and single writes with RWF_DSYNC are not durable"
    )
