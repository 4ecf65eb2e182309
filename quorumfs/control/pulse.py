"""Whether the loop that serves the guest goes on, as seen from another thread.

That loop makes no system call on a replica's file that could wait for a device. Should it stand
still all the same, the kernel knows in which call: that costs the requests nothing.
"""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event, get_native_id
from time import monotonic, sleep
from typing import NamedTuple

import trio

ANSWER_S = 0.05
"""How long (seconds) to wait for the loop to answer a question."""

STANDSTILL_S = 1.0
"""After this long (seconds) the loop does not only lack a processor."""

SAME_CALL_S = 0.002
"""Between two looks (seconds) at the call that a thread waits in."""


class Standstill(NamedTuple):
    """The loop does not go on."""

    seconds: int
    """How long."""
    fd: int | None
    """The descriptor that it waits for in a system call, if there is one."""


class Pulse(trio.abc.Instrument):
    """Shows that the loop goes on: to be made in it. It costs an idle loop nothing, because it
    notes when the loop wakes and sleeps instead of waking it."""

    def __init__(self) -> None:
        self._thread = get_native_id()
        self._token = trio.lowlevel.current_trio_token()
        self._clock = trio.lowlevel.current_clock()
        self._awake_since: float | None = monotonic()
        """When the turn of the loop that is not over yet began; None: it waits for something to
        do."""
        self._asked: Event | None = None
        trio.lowlevel.add_instrument(self)

    def before_io_wait(self, timeout: float) -> None:
        self._awake_since = None

    def after_io_wait(self, timeout: float) -> None:
        self._awake_since = monotonic()

    # To be called in one other thread

    def now(self) -> float:
        """The time by trio's clock (seconds), which only the loop can ask trio for."""
        return self._clock.current_time()

    def answers(self, call: Callable[[], None]) -> bool:
        """Whether the loop has made *call* within `ANSWER_S`.

        False at once while an earlier call is still queued: the loop is stuck, and another call
        would only wait behind that one.
        """
        if self._asked is not None and not self._asked.is_set():
            return False
        self._asked = asked = Event()

        def make() -> None:
            call()
            asked.set()

        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(make)
        return asked.wait(ANSWER_S)

    def standstill(self) -> Standstill | None:
        """For how long the loop has not gone on, if it stands still."""
        awake_since = self._awake_since
        if awake_since is None or (seconds := monotonic() - awake_since) < STANDSTILL_S:
            return None
        return Standstill(int(seconds), _waits_for(self._thread))


def _waits_for(thread: int) -> int | None:
    """The descriptor that a thread of this process (by its number in the kernel) waits for.

    It is the first argument of nearly all calls that take one; where it is none (an address, a
    process) it is hardly the number of a file that matters. None if it waits in no call.
    """
    first = _call(thread)
    sleep(SAME_CALL_S)
    if first is None or first != _call(thread):
        return None  # one of many, and not one that does not return
    return int(first[1], 16)


def _call(thread: int) -> list[str] | None:
    """The number and the arguments of the call that a thread waits in, and where; see proc(5)."""
    place = Path(f"/proc/{os.getpid()}/task/{thread}/syscall")
    with suppress(OSError):  # a kernel built without
        call = place.read_text("ascii").split()
        if len(call) > 1 and call[0] != "-1":
            return call
    return None
