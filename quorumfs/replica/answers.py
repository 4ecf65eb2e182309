"""Calls on file systems that may hang: all at once, and waited for no longer than a limit.

A system call on a file system that does not answer cannot be ended. So each call has a thread,
which is left behind when the limit is over.
"""

import errno
import logging
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from threading import Thread
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

PATIENCE_S = 16.0
"""How long (seconds) a replica is waited for, where no ``replica-timeout`` is given: twice its
default, as for any request that cannot do without."""

HANGS_S = 3.0
"""After this long (seconds) the log names each replica that is waited for."""


class UnansweredError(OSError):
    """The file system did not answer in time."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(errno.ETIMEDOUT, f"its file system did not answer for {patience_s:g} s")


class Answer(Generic[T]):
    """The result of a call in a thread, now or later."""

    def __init__(self, call: Callable[[], T], discard: Callable[[T], None]) -> None:
        """Start *call*; *discard* gives back a result that comes after `give_up`."""
        self._call = call
        self._discard = discard
        self._outcome = Future[T]()
        # No interpreter waits for such a thread at its end.
        self._thread = Thread(target=self._run, name="answer", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether the call has not returned, or its result is still being given back."""
        return self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        """Whether the call has returned, after at most *timeout_s*."""
        self._thread.join(max(0.0, timeout_s))
        return not self.pending

    def give_up(self, reason: OSError) -> None:
        """Give the call up, unless it has returned by now; `result` then raises *reason*."""
        with suppress(InvalidStateError):
            self._outcome.set_exception(reason)

    def result(self) -> T:
        """The result of a call that has returned; raises its error, or the reason of `give_up`."""
        return self._outcome.result()

    def _run(self) -> None:
        try:
            value = self._call()
        except BaseException as error:
            with suppress(InvalidStateError):
                self._outcome.set_exception(error)
            return
        try:
            self._outcome.set_result(value)
        except InvalidStateError:  # it comes too late
            self._discard(value)


def ask(
    path: str,
    call: Callable[[], T],
    patience_s: float = PATIENCE_S,
    discard: Callable[[T], None] = lambda _: None,
) -> T:
    """The result of one *call*, as of `ask_all`; raises its error, or `UnansweredError`."""
    (answer,) = ask_all({path: call}, patience_s, discard)
    return answer.result()


def ask_all(
    calls: Mapping[str, Callable[[], T]],
    patience_s: float = PATIENCE_S,
    discard: Callable[[T], None] = lambda _: None,
) -> list[Answer[T]]:
    """Make all *calls*, by the path of the replica, at once; returns when each is done or given up.

    *discard* is called, in the thread of a call that was given up, with a late result.
    """
    # A thread that hangs must never be the thread that gets a signal.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        answers = {path: Answer(call, discard) for path, call in calls.items()}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    began = monotonic()
    if patience_s > HANGS_S:
        for path, answer in answers.items():
            if not answer.wait(began + HANGS_S - monotonic()):
                log.warning(
                    "waiting for %s: its file system does not answer (interrupt to give up)", path
                )
    for answer in answers.values():
        if not answer.wait(began + patience_s - monotonic()):
            answer.give_up(UnansweredError(patience_s))
    return list(answers.values())
