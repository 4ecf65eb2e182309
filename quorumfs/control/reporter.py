"""What is told of a mount, over its control socket and to the log, though its loop stands still."""

import logging
from collections.abc import Callable
from typing import Any

from quorumfs.control.advice import describe
from quorumfs.control.human import human_time
from quorumfs.control.pulse import Pulse, Standstill
from quorumfs.control.status import Status

log = logging.getLogger(__name__)

TOLD_S = 3
"""A loop that stands still for this long (seconds) is told to the log."""

ATTEMPTS = 5
"""How often to take the status beside a loop that is busy, and not waiting, until it succeeds."""

Take = Callable[[float, Standstill | None], Status]
"""The status at a time (trio's clock, seconds), of a loop that does, or does not, stand still."""


class Reporter:
    """Takes the status: in the loop while that goes on, else in the one thread that asks for it.

    While the loop waits nothing changes what the status is taken from. Should it go on in the
    middle of that, what is told may be of two moments; mostly it has no turn, for Python lets
    one thread run at a time, and for longer than this takes.
    """

    def __init__(self, take: Take, pulse: Pulse) -> None:
        self._take = take
        self._pulse = pulse
        self._latest: Status | None = None
        self._stood_still = 0
        """For how long (seconds), as told to the log; 0: it goes on."""

    def refresh(self) -> None:
        """Have `status` tell what is now."""
        self._latest = None
        if not self._pulse.answers(self._take_in_loop):
            self._latest = self._take_here()

    def latest(self) -> Status:
        """What is now."""
        self.refresh()
        return self._latest or self._take_here()

    @property
    def stands_still(self) -> bool:
        """Whether the loop does."""
        return self._pulse.standstill() is not None

    def status(self, _: object) -> dict[str, Any]:
        """The answer to the command."""
        if self._latest is None:  # it could not be taken in the loop, and fails here as well
            return self._take_here().to_json()
        return self._latest.to_json()

    def watch(self) -> None:
        """Tell the log when the loop stands still, and why, and when it goes on."""
        standstill = self._pulse.standstill()
        if standstill is None:
            if self._stood_still:
                log.warning("requests are served again after %s", human_time(self._stood_still))
            self._stood_still = 0
        elif standstill.seconds >= TOLD_S:
            if not self._stood_still:
                for line in describe(self._take_here()):
                    log.warning("%s", line)
            self._stood_still = standstill.seconds

    def _take_in_loop(self) -> None:
        try:
            self._latest = self._take(self._pulse.now(), None)
        except Exception:  # the loop must go on; who asked is answered with an error
            log.exception("internal error: the status cannot be taken")

    def _take_here(self) -> Status:
        standstill = self._pulse.standstill()
        for _ in range(ATTEMPTS - 1):
            try:
                return self._take(self._pulse.now(), standstill)
            except (RuntimeError, LookupError):
                pass  # the loop changed something in the middle of it
        return self._take(self._pulse.now(), standstill)
