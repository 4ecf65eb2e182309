"""Calls on file systems that may hang: all at once, and waited for no longer than a limit.

Nothing ends a system call on a file system that does not answer. So each call has a thread, which
is left alone with it when nobody wants to wait any more.
"""

import errno
import logging
import signal
from collections.abc import Callable, Mapping
from threading import Event, Lock, Thread
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")

log = logging.getLogger(__name__)

PATIENCE_S = 16.0
"""How long (seconds) a replica is waited for, where no ``replica-timeout`` is given: twice its
default, as for any request that cannot do without."""

HANGS_S = 3.0
"""After this long (seconds) it is said which replica is waited for."""


class UnansweredError(OSError):
    """The file system did not answer in time."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(errno.ETIMEDOUT, f"its file system did not answer for {patience_s:g} s")


class Answer(Generic[T]):
    """What a call in a thread gives, or will give."""

    def __init__(self, call: Callable[[], T], discard: Callable[[T], None]) -> None:
        """Start *call*; *discard* gives back what it returns when nobody waits any more."""
        self._call = call
        self._discard = discard
        self._lock = Lock()
        self._ended = Event()
        self._unwanted: OSError | None = None
        self._value: list[T] = []
        self._error: BaseException | None = None
        # No interpreter waits for such a thread at its end.
        Thread(target=self._run, name="answer", daemon=True).start()

    @property
    def pending(self) -> bool:
        """Whether the call has not returned, or what it gave is still being given back."""
        return not self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Whether the call has returned, after at most *timeout_s*."""
        return self._ended.wait(max(0.0, timeout_s))

    def give_up(self, reason: OSError) -> None:
        """Want nothing any more, if it has not returned by now; `result` raises *reason*."""
        with self._lock:
            if not self._value and self._error is None:
                self._unwanted = reason

    def result(self) -> T:
        """What the call returned; raises what it raised, or why it was given up."""
        with self._lock:
            if error := self._unwanted or self._error:
                raise error
            return self._value[0]

    def _run(self) -> None:
        try:
            value = self._call()
        except BaseException as error:
            with self._lock:
                self._error = error
        else:
            with self._lock:
                if not (late := self._unwanted is not None):
                    self._value.append(value)
            if late:
                self._discard(value)
        finally:
            self._ended.set()


def ask_all(
    calls: Mapping[str, Callable[[], T]],
    patience_s: float = PATIENCE_S,
    discard: Callable[[T], None] = lambda _: None,
) -> list[Answer[T]]:
    """Make all *calls*, by the path of the replica, at once; each is answered or given up then.

    *discard* is called, in its thread, with what a call returned that was given up.
    """
    # A thread that hangs must never be the one that gets a signal.
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
