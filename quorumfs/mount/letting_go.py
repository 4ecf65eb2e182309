"""Ends of a process that a file system may hang: what it has open is closed before.

The kernel keeps the files of a process, and their locks, until all its threads have returned from
their system calls. One that waits for a store that hangs would keep the other stores locked.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from time import monotonic
from typing import NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

CLOSING_S = 1.0
"""How long (seconds) the closing of files is waited for, some of which may hang."""


def end(exit_code: int) -> NoReturn:
    """End the process, which serves no guest, all its files closed before.

    Their numbers stay taken, by ``/dev/null``: a thread that is about to write to a file of ours
    must not find another one, just opened, under its number.
    """
    let_go_of_streams()
    threads = []
    with suppress(OSError):  # without /proc, or /dev
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd != null:
                threads.append(Thread(target=_replace, args=(null, fd), daemon=True))
                threads[-1].start()
    deadline = monotonic() + CLOSING_S
    for thread in threads:
        thread.join(max(0.0, deadline - monotonic()))
    os._exit(exit_code)


def let_go_of_streams() -> None:
    """Have nobody who reads the standard streams wait for the end of the process."""
    with suppress(OSError):  # without /dev
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        os.close(null)


def _replace(null: int, fd: int) -> None:
    with suppress(OSError):
        os.dup2(null, fd, inheritable=False)


@contextmanager
def ended_by_signals(undo: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Within, any of `STOP_SIGNALS` ends the process, also while its main thread hangs; before,
    in another thread, it is *undo* that is done.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(reader, True)

    def watch() -> None:
        if signum := int.from_bytes(os.read(reader, 1), "little"):
            undo()
            end(128 + signum)

    watcher = Thread(target=watch, name="signals", daemon=True)
    before = {signum: signal.signal(signum, lambda *_: None) for signum in STOP_SIGNALS}
    told = signal.set_wakeup_fd(writer)  # written to by the thread that the signal comes to
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    watcher.start()  # it can take them itself
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(told)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)
