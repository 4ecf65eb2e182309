"""How an image, or the part of a device that a disk uses, becomes longer. Pure: no clock.

A file is lengthened at once, however far. A device has to be given zeros, which may take as long as
to write them, and a replica that does not answer in time is ejected: so it goes on step by step.
"""

from dataclasses import dataclass

FIRST = 64 << 20
"""Bytes of the first step; no later one is shorter, for any store has time for this many."""

SHORT_S, LONG_S = 0.25, 1.0
"""A step that took less (seconds) is followed by a longer one, one that took more by a shorter."""


@dataclass(slots=True)
class Steps:
    """The steps from one size to a larger one; both bytes."""

    at: int
    end: int
    _next: int = FIRST

    @property
    def length(self) -> int:
        """Bytes of the next step; 0: all is done."""
        return min(self._next, self.end - self.at)

    def took(self, seconds: float) -> None:
        """Go on to the step after the one that took so long."""
        self.at += self.length
        if seconds < SHORT_S:
            self._next *= 2
        elif seconds > LONG_S:
            self._next = max(FIRST, self._next // 2)
