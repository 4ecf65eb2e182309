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

    def pay(self, now: float, length: int) -> float:
        """Until when to rest for *length* bytes that are worked on from *now* on."""
        if self.limit is None:
            return now
        self._free_at = max(self._free_at, now) + length / self.limit
        return self._free_at

    def rest_for_guest(self, began: float, now: float) -> float:
        """Until when to rest after work beside a guest from *began* until *now*."""
        return now + (now - began) * YIELD_TO_GUEST
