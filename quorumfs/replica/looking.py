"""Looking after each replica of a set, again and again."""

from collections.abc import Awaitable, Callable, Sequence

import trio

from quorumfs.replica.replica import Replica


async def look_after(
    replicas: Callable[[], Sequence[Replica]],
    look: Callable[[Replica], Awaitable[None]],
    pause: Callable[[], Awaitable[None]],
) -> None:
    """Call *look* for each of *replicas*, and *pause*, in turns, until cancelled.

    Each is looked at in a task of its own, because one may hang. Replicas may come and go.
    """
    watched: set[Replica] = set()

    async def watch(replica: Replica) -> None:
        while replica in replicas():
            await look(replica)
            await pause()
        watched.remove(replica)

    async with trio.open_nursery() as nursery:
        while True:
            await pause()
            for replica in replicas():
                if replica not in watched:
                    watched.add(replica)
                    nursery.start_soon(watch, replica)
