"""When those who watch something look again: together, so that an idle process seldom wakes."""

import trio

IDLE_S = 6.0
"""How often (seconds) they look while nobody uses the disk; a multiple of what it is else."""


def next_tick(every_s: float) -> float:
    """The next whole multiple of *every_s* seconds on trio's clock: later than now."""
    now = trio.current_time()
    tick = (now // every_s + 1) * every_s
    return tick if tick > now else tick + every_s  # where every_s is not exact in binary


class Rhythm:
    """How often those who watch a disk look again."""

    def __init__(self) -> None:
        self._idle = False
        self._in_use = trio.Event()

    @property
    def idle(self) -> bool:
        """Whether nobody uses the disk, and nothing is wrong with it."""
        return self._idle

    @idle.setter
    def idle(self, idle: bool) -> None:
        if idle and not self._idle:
            self._in_use = trio.Event()
        elif not idle:
            self._in_use.set()
        self._idle = idle

    def period_s(self, every_s: float, idle_s: float = IDLE_S) -> float:
        """How often to look now (seconds): every *every_s*, or *idle_s* while the disk is idle."""
        return idle_s if self.idle else every_s

    async def until_tick(self, every_s: float, idle_s: float = IDLE_S) -> None:
        """Sleep until the `next_tick` of that period, also if the disk comes into use meanwhile."""
        with trio.move_on_at(next_tick(self.period_s(every_s, idle_s))):
            if self.idle:
                await self._in_use.wait()
            await trio.sleep_until(next_tick(every_s))
