"""When I/O may be done in the trio thread itself: while a file answers at once. Pure: no clock.

Handing an operation to a thread and back costs ten times as much as copying 4 KiB from or to the
page cache. But a wait in the trio thread holds up every request, and the control socket. So a file
is trusted only while no I/O on the file waits.
"""

from dataclasses import dataclass

PROMPT_NS = 1_000_000
"""An I/O on the page cache takes microseconds. A longer one (nanoseconds) waited for a device, for
memory, or for writeback; or the thread waited for a processor."""

TOO_LONG_NS = 20_000_000
"""An I/O that takes longer (nanoseconds) counts as a wait, whatever the reason."""

WATCHED_NS = 1_000_000_000
"""How long (nanoseconds) each I/O is watched closely after a slow one, and after a rest."""

REST_NS = (100_000_000, 10_000_000_000)
"""The first and the longest rest (nanoseconds), in which a file is not trusted."""

FORGIVEN_AFTER = 10
"""A file that stayed prompt for this many times its last rest begins with the first rest anew."""


@dataclass(slots=True)
class InlineGate:
    """How prompt one file has been; times are of one monotonic clock, in nanoseconds."""

    trusted: bool = True
    """Whether I/O on the file may be done in the trio thread."""
    watched: bool = False
    """Whether to find out, for each I/O, if it waited for more than a processor."""
    _watched_until: int = 0
    _rests_until: int = 0
    _rest: int = 0

    def took(self, duration: int, now: int, *, waited: bool) -> None:
        """Take note of an I/O that took longer than `PROMPT_NS` and ended *now*.

        *waited*: the I/O is known to have waited for more than a processor.
        """
        if waited or duration > TOO_LONG_NS:
            if self.trusted:
                first, longest = REST_NS
                calm = now - self._rests_until > FORGIVEN_AFTER * self._rest
                self._rest = first if calm or not self._rest else min(2 * self._rest, longest)
                self.trusted = False
            self._rests_until = now + self._rest  # anew with each I/O that waited
        self.watched = True
        self._watched_until = max(now, self._rests_until) + WATCHED_NS

    def look_again(self, now: int) -> None:
        """Trust the file after its rest; end the watch after it was prompt for long enough."""
        self.trusted = now >= self._rests_until
        self.watched = now < self._watched_until
