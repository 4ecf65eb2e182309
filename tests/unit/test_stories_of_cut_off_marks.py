"""Stories of a daemon that died when one sidecar alone had the mark of a change that had not begun.

All replicas hold the same then: the mark makes its replica no better than the others.
"""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from support.simulation.setup import Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    CHUNK,
    EIO,
    EXTENT,
    EXTENTS,
    PAIR,
    TRIO,
    WRONG,
    Script,
    Story,
    told,
)

from quorumfs.decisions.sidecar import MAP_OFFSET
from quorumfs.replica.storage import Kind, Operation

PLACE = EXTENTS[3] + 2 * CHUNK
"""In the extent whose mark is cut off; nothing is written there."""


def hangs_at_the_map(operation: Operation) -> Fault | None:
    at_map = operation.kind is Kind.WRITE and operation.offset >= MAP_OFFSET
    return Fault(hang=True) if at_map else None


@asynccontextmanager
async def cut_off_at_a_mark(story: Story) -> AsyncGenerator[int, None]:
    """Yields the only replica with the mark, the last one, after all was durable on all replicas
    and before anything else happens; then the daemon is killed when the mark is there."""
    *others, marked = range(story.setup.replicas)
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted():
        pass
    yield marked
    async with story.mounted() as guest:
        await guest.write_surely(0)
        for index in others:
            story.world.replicas[index].sidecar_faults.script = hangs_at_the_map
        guest.begin(guest.write, EXTENTS[3])
        await trio.sleep(1.0)
        story.cut_off(*others)
    for index in others:
        story.world.replicas[index].sidecar_faults.script = None


async def one_that_rots_is_outvoted(story: Story) -> None:
    async with cut_off_at_a_mark(story) as marked:
        story.world.replicas[marked].image.rot(PLACE, WRONG)
    async with story.mounted() as guest:
        await guest.read_surely(PLACE)
        await guest.converged()
    await story.ends_well()


async def one_with_a_bad_sector_is_given_it_by_the_others(story: Story) -> None:
    async with cut_off_at_a_mark(story) as marked:
        pass

    def bad(operation: Operation) -> Fault | None:
        start, end = operation.offset, operation.offset + operation.length
        return EIO if operation.kind is Kind.READ and start <= PLACE < end else None

    faults = story.world.replicas[marked].image_faults
    faults.script = bad
    async with story.mounted() as guest:
        await guest.read_surely(PLACE)
        await trio.sleep(30.0)
        assert not guest.mounted.sidecars.ledger.unreadable
        faults.script = None
        await guest.converged()
    await story.ends_well()


async def one_that_dies_is_ejected(story: Story) -> None:
    async with cut_off_at_a_mark(story) as marked:
        pass
    async with story.mounted() as guest:
        story.world.detach(marked)
        await guest.write_surely(EXTENTS[3])
        assert marked not in guest.mounted.members
    story.world.attach(marked)
    await story.ends_well()


FIRST_OF_THREE = replace(TRIO, fifo=True, threshold=1)
STORIES = [
    (one_that_rots_is_outvoted, TRIO),
    (one_that_rots_is_outvoted, FIRST_OF_THREE),
    (one_that_rots_is_outvoted, replace(TRIO, replicas=5, threshold=3)),
    (one_with_a_bad_sector_is_given_it_by_the_others, TRIO),
    (one_with_a_bad_sector_is_given_it_by_the_others, PAIR),
    (one_that_dies_is_ejected, TRIO),
    (one_that_dies_is_ejected, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(2)] == [None] * 2
