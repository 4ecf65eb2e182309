"""When those who watch something look again: together, so that an idle process seldom wakes."""

import trio


def next_tick(every_s: float) -> float:
    """The next whole multiple of *every_s* seconds on trio's clock, at most *every_s* from now."""
    return (trio.current_time() // every_s + 1) * every_s


async def until_tick(every_s: float) -> float:
    """Sleep until `next_tick`; returns how late (seconds) this task wakes."""
    due = next_tick(every_s)
    await trio.sleep_until(due)
    return trio.current_time() - due
