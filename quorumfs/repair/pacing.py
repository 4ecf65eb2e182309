"""How fast a repair may go: at once on an idle disk, yielding to a guest. Pure: no clock."""

from dataclasses import dataclass

YIELD_TO_GUEST = 1.0
"""With a guest at work, a repair rests as long as it worked."""


@dataclass(slots=True)
class Pacer:
    """Spreads a repair's work over time; times are monotonic, in seconds."""

    limit: int | None = None
    """Bytes a second at most; None: no limit."""
    _free_at: float = 0.0
    """When the work done so far is paid for."""

    def rest(self, began: float, now: float, length: int, *, guest_active: bool) -> float:
        """Seconds to rest after *length* bytes were worked on from *began* until *now*."""
        pause = (now - began) * YIELD_TO_GUEST if guest_active else 0.0
        if self.limit is not None:
            self._free_at = max(self._free_at, began) + length / self.limit
            pause = max(pause, self._free_at - now)
        return pause
