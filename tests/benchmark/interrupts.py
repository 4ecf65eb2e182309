"""Ctrl-C and its like: taken once, and never while something is set up or taken down."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Interrupts:
    """The signals belong to the process: so there is one of these."""

    def __init__(self) -> None:
        self.deferring = 0
        self.is_pending = False

    def on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.is_pending = True
        self.take()

    def take(self) -> None:
        if self.is_pending and not self.deferring:
            self.is_pending = False
            for signum in SIGNALS:
                signal.signal(signum, signal.SIG_IGN)
            raise KeyboardInterrupt


_interrupts = _Interrupts()


def install() -> None:
    """From now on `SIGNALS` raise `KeyboardInterrupt`, the first of them only."""
    for signum in SIGNALS:
        signal.signal(signum, _interrupts.on_signal)


@contextmanager
def deferred() -> Iterator[None]:
    """Let an interruption wait for the end of the context.

    A daemon whose start was interrupted may mount after everything was cleaned up.
    """
    _interrupts.deferring += 1
    try:
        yield
    finally:
        _interrupts.deferring -= 1
        _interrupts.take()
