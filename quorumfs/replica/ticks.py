"""When those who watch something look again: together, so that an idle process seldom wakes."""

import trio


def next_tick(every_s: float) -> float:
    """The next whole multiple of *every_s* seconds on trio's clock: later than now."""
    now = trio.current_time()
    tick = (now // every_s + 1) * every_s
    return tick if tick > now else tick + every_s  # where every_s is not exact in binary


async def until_tick(every_s: float) -> None:
    """Sleep until `next_tick`."""
    await trio.sleep_until(next_tick(every_s))
