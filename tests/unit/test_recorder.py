"""What is written to the sidecars, and what counts as recorded since."""

from typing import Any, cast

import trio
from support.one_chunk import CHUNK, World

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.metadata.claims import Claims
from quorumfs.metadata.recorder import Recorder
from quorumfs.metadata.writer import SidecarWriter
from quorumfs.replica.replica import Replica


class Sound:
    """A writer that can write."""

    async def put(self, *_: object) -> dict[Replica, OSError]:
        await trio.lowlevel.checkpoint()
        return {}


async def test_a_fact_is_recorded_only_if_one_that_joins_has_it_too() -> None:
    """A loss is known and waits to be recorded while another replica is given the map; then it is
    made good. Its sidecar says that something is lacking, as none of the others does.
    """
    world = World(3, 2, 1)
    world.prepare()
    ledger = world.ledger
    members = ledger.membership.member_bits
    assert ledger.recorded.holds(CHUNK, members)
    recorder = Recorder(ledger, cast("Claims", None), cast("SidecarWriter", Sound()))
    ledger.recorded.add(out_of_sync(0), CHUNK)
    async with recorder.lock:
        await recorder.write_all_to(cast("Any", world.copies[2]))
    ledger.recorded.remove(out_of_sync(0), CHUNK)
    assert not ledger.recorded.holds(CHUNK, members)
    await recorder.write_map()
    assert ledger.recorded.holds(CHUNK, members)
