"""Stories of blocks that rot, or were never written, on the first replica: a majority is believed
(P9)."""

import errno
from contextlib import suppress
from dataclasses import replace

import pytest
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault
from support.simulation.story import (
    BLOCK,
    CHUNK,
    EXTENT,
    QUAD,
    TRIO,
    WRONG,
    Guest,
    Script,
    Story,
    told,
)

from quorumfs.replica.storage import Kind, Operation

ROT = WRONG


async def _filled(guest: Guest) -> None:
    await guest.write(0, EXTENT)
    await guest.flush()


async def _settled_by_majority(story: Story, *, lost: bool = True) -> None:
    """What the majority holds is on all, and whoever was outvoted is counted."""
    async with story.mounted() as guest:
        await guest.read_surely(0, EXTENT)
        await guest.converged()
        counted = guest.mounted.disk.replicas[0].counters.mismatches
        if bool(counted) is not lost:
            raise BrokenError(f"{counted} mismatches were counted")
    story.oracle.check_images(story.world.contents())
    await story.ends_well()


async def the_first_rots_before_a_crash(story: Story) -> None:
    """A block rots, and another one of its extent is being written to when the daemon is killed."""
    async with story.mounted() as guest:
        await _filled(guest)
        story.world.replicas[0].image.rot(0, ROT)
        await guest.write(2 * BLOCK)
        story.world.kill()
    await _settled_by_majority(story)


async def the_first_lied_about_a_flush(story: Story) -> None:
    """Its store said that a flush was done, and lost everything when power was cut."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        story.fail(0, {Kind.SYNC}, Fault(effect=Effect.NONE))
        await guest.flush()
        story.world.replicas[0].image.fail_sync(story.world.replicas[0].image.begin_sync())
        story.world.power_cut()
    story.mend(0)
    await _settled_by_majority(story)


async def each_rots_at_a_place_of_its_own(story: Story) -> None:
    """Every block still has a majority."""
    async with story.mounted() as guest:
        await _filled(guest)
        for index in range(story.setup.replicas):
            story.world.replicas[index].image.rot(index * BLOCK, ROT)
        await guest.write(8 * BLOCK)
        story.world.kill()
    await _settled_by_majority(story)


async def the_first_rots_and_the_last_has_a_bad_sector(story: Story) -> None:
    """The bad sector is in another block: where all can be read the majority counts (R11)."""
    async with story.mounted() as guest:
        await _filled(guest)
        story.world.replicas[0].image.rot(0, ROT)
        await guest.write(8 * BLOCK)
        story.world.kill()
    bad = range(4 * BLOCK, 5 * BLOCK)

    def unreadable(operation: Operation) -> Fault | None:
        end = operation.offset + operation.length
        touched = operation.offset < bad.stop and end > bad.start
        return Fault(error=errno.EIO) if operation.kind is Kind.READ and touched else None

    story.world.replicas[story.setup.replicas - 1].image_faults.script = unreadable
    async with story.mounted() as guest:
        await guest.read_surely(0)
    story.mend(story.setup.replicas - 1)
    await story.ends_well()


async def a_crash_without_rot(story: Story) -> None:
    """P8: a crash with nothing under way is no mismatch."""
    async with story.mounted() as guest:
        await _filled(guest)
        await guest.write(2 * BLOCK)
        story.world.kill()
    await _settled_by_majority(story, lost=False)


async def settled_beside_what_one_holds_wrongly(story: Story) -> None:
    """What a majority holds is replaced by what nobody but the first replica does."""
    async with story.mounted() as guest:
        await guest.write(0, 2 * CHUNK)
        await guest.flush()
        story.world.replicas[0].image.rot(CHUNK, WRONG)
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE)
        with suppress(OSError):
            await guest.write(0)
        await guest.read_surely(0, 2 * CHUNK)


SETUPS = [
    TRIO,
    replace(TRIO, fifo=True),
    replace(TRIO, threshold=1, fifo=True),
    replace(TRIO, rewrite_corrupted=True),
    QUAD,
]
STORIES = [
    the_first_rots_before_a_crash,
    the_first_lied_about_a_flush,
    each_rots_at_a_place_of_its_own,
    the_first_rots_and_the_last_has_a_bad_sector,
    a_crash_without_rot,
]


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("script", STORIES, ids=lambda script: script.__name__)
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert told(script, setup, 0) is None


def test_what_one_holds_wrongly_is_not_settled_to() -> None:
    assert [told(settled_beside_what_one_holds_wrongly, TRIO, seed) for seed in range(4)] == [
        None
    ] * 4
