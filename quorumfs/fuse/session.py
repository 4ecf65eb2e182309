"""The FUSE session of this process (pyfuse3 knows one): mount, serve, stop, let go."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator

import pyfuse3
import trio

from quorumfs.errors import UserError
from quorumfs.fuse import shim
from quorumfs.fuse.operations import FILE_INODE, DiskOperations

REQUESTS_MAX = 1024
"""Requests handled at a time. The kernel limits asynchronous ones by itself, but every thread
that does synchronous I/O brings one more; those of a hung replica must leave room for others."""


def mount(
    operations: DiskOperations, mountpoint: str, options: set[str], max_background: int
) -> None:
    """Mount *operations* with *options* of libfuse; requests wait until `serve`.

    Raises `UserError` with libfuse's reason.
    """
    shim.configure(max_background)
    with _captured_stderr() as said:
        try:
            pyfuse3.init(operations, mountpoint, options)
        except RuntimeError as error:
            # libfuse gives its reason to stderr only.
            raise UserError(f"cannot mount at {mountpoint}: {said() or error}") from None


async def serve(operations: DiskOperations) -> None:
    """Serve requests until unmounted or `stop`; all that were begun are finished."""
    async with trio.open_nursery() as requests:
        shim.serve(shim.Handlers(operations.fallocate, operations.lseek), requests)
        await pyfuse3.main(min_tasks=1, max_tasks=REQUESTS_MAX)


async def write_back() -> None:
    """Have the kernel send what was written through mappings, which is in its cache alone."""
    with contextlib.suppress(OSError):  # the kernel does not know the file: no pages
        await trio.to_thread.run_sync(pyfuse3.invalidate_inode, FILE_INODE)


def stop() -> None:
    """Let `serve` end, though still mounted."""
    pyfuse3.terminate()


def close(*, unmount: bool) -> None:
    """End the session; without *unmount* the mount point is dead from now on."""
    pyfuse3.close(unmount=unmount)


@contextlib.contextmanager
def _captured_stderr() -> Iterator[Callable[[], str]]:
    """Catch what C code writes to stderr; yields a function that gives it as one line."""
    with tempfile.TemporaryFile() as caught:
        saved = os.dup(2)
        os.dup2(caught.fileno(), 2)

        def said() -> str:
            caught.seek(0)
            return " ".join(caught.read().decode(errors="replace").split())

        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
