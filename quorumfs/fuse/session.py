"""The FUSE session of this process (pyfuse3 knows one): mount, serve, stop, let go."""

import contextlib
import errno
import logging
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter_ns
from typing import Any

import pyfuse3
import trio

from quorumfs.errors import UserError
from quorumfs.fastpath.path import FastPath
from quorumfs.fuse import shim
from quorumfs.fuse.operations import FILE_INODE, DiskOperations

REQUESTS_MAX = 1024
"""Requests handled at a time. The kernel limits asynchronous ones by itself, but every thread
that does synchronous I/O brings one more; those of a hung replica must leave room for others."""

TURN = 64
"""Requests that one task takes before everybody else in the loop has a turn."""

TURN_NS = 5_000_000
"""How long (nanoseconds) a turn may last: requests of 1 MiB take longer than those of 4 KiB."""

IDLE_TASKS = 2
"""Tasks that wait for a request: one, and one that has had its turn."""

_GIVEN_UP = re.compile(
    rf"\w+\(\): fuse_reply_\S+ failed with {re.escape(os.strerror(errno.ENOENT))}"
)
"""How pyfuse3 tells that a reply was for a request that the kernel no longer knows."""


class Turns:
    """Gives the tasks of pyfuse3's session loop the next request, in place of pyfuse3's function.

    That one asks trio to wait for every single request, which takes longer than to serve it.
    """

    def __init__(self, pending: Callable[[], bool], wait: Callable[[], Awaitable[bool]]) -> None:
        """*pending*: whether there is a request; *wait*: pyfuse3's own function.

        That is called when there is none. Then pyfuse3 also counts the task as idle, and starts and
        ends tasks as it always does.
        """
        self._pending = pending
        self._wait = wait
        self._taken = 0
        self._turn_began = perf_counter_ns()

    async def wait(self) -> bool:
        """Wait for a request, or what looks like one; False when the session has ended."""
        self._taken += 1
        in_turn = self._taken % TURN and perf_counter_ns() - self._turn_began < TURN_NS
        if in_turn and self._pending():
            return True
        again = await self._wait()
        self._turn_began = perf_counter_ns()
        return again


def is_trouble(record: logging.LogRecord) -> bool:
    """Whether a *record* of pyfuse3's logger says that something is wrong; a filter of it.

    A reply fails with ENOENT if the kernel has given its request up, and nobody waits for it: who
    did was killed, or the last user of a detached mount has closed its file, which ends the
    connection while the close is being answered. What was asked for was done. libfuse itself says
    nothing of such replies.
    """
    return _GIVEN_UP.fullmatch(record.getMessage()) is None


def mount(
    operations: DiskOperations,
    mountpoint: str,
    options: set[str],
    max_background: int,
    fast: FastPath | None = None,
) -> None:
    """Mount *operations* with *options* of libfuse; requests wait until `serve`.

    Raises `UserError` with libfuse's reason.
    """
    logging.getLogger(pyfuse3.__name__).addFilter(is_trouble)
    shim.configure(max_background, fast)
    with _captured_stderr() as said:
        try:
            pyfuse3.init(operations, mountpoint, options)
        except RuntimeError as error:
            # libfuse gives its reason to stderr only.
            raise UserError(f"cannot mount at {mountpoint}: {said() or error}") from None


async def serve(operations: DiskOperations, fast: FastPath | None = None) -> None:
    """Serve requests until unmounted or `stop`; all that were begun are finished."""
    fd = shim.session_fd()
    if fd is not None and fast is not None:
        os.set_blocking(fd, False)
        _take_turns(fast.pending, vars(pyfuse3))
        fast.start(fd, FILE_INODE)
    elif fd is not None:
        # A request goes away unread when whoever waits for it is killed: a read that blocked would
        # stop the loop until the next one comes. The shim tells pyfuse3 to look again.
        os.set_blocking(fd, False)
    async with trio.open_nursery() as requests:
        handlers = shim.Handlers(operations.fallocate, operations.lseek)
        shim.serve(handlers, requests)
        if fast is not None:
            requests.start_soon(fast.run, requests)
        try:
            await pyfuse3.main(min_tasks=IDLE_TASKS, max_tasks=REQUESTS_MAX)
        finally:
            if fast is not None:
                fast.stop()


def _take_turns(pending: Callable[[], bool], names: dict[str, Any]) -> None:
    """Have pyfuse3 wait for requests by `Turns`; *names* are its module's.

    Its session loop looks the function up there at each call. A version that has none of this name
    waits in its own way: slower, and no less right.
    """
    wait = names.get("_wait_fuse_readable")
    if callable(wait):
        names["_wait_fuse_readable"] = Turns(pending, wait).wait


async def write_back() -> None:
    """Have the kernel send what was written through mappings, which is in its cache alone."""
    with contextlib.suppress(OSError):  # the kernel does not know the file: no pages
        await trio.to_thread.run_sync(pyfuse3.invalidate_inode, FILE_INODE)


async def announce_size(size: int) -> None:
    """Tell the kernel that the file has *size* bytes, whole sectors: more than before.

    It is not enough that the kernel forgets the old size: a loop device goes by the size that the
    kernel knows, and asks for none (before Linux 6.16), and the kernel believes no answer to a
    question that it asked before a write had ended. But it takes a byte for its cache, behind the
    end that it knows, and moves the end. The byte is not shown: the rest of its page is still to be
    read. No request may touch the byte yet, for the page could be a newer one.
    """

    def tell() -> None:
        with contextlib.suppress(OSError):  # the kernel does not know the file: it will ask
            pyfuse3.notify_store(FILE_INODE, size - 1, b"\0")
            pyfuse3.invalidate_inode(FILE_INODE, attr_only=True)

    # The kernel may wait for an answer of ours to get the page.
    await trio.to_thread.run_sync(tell, abandon_on_cancel=True)


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
