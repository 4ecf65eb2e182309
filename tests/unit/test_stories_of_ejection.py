"""Stories of replicas that are ejected, or about to be, while a flush or a write is under way."""

import errno
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
from support.simulation.setup import Setup
from support.simulation.storage import Fault, Weather
from support.simulation.story import (
    EQUALS,
    EXTENTS,
    PAIR,
    TRIO,
    Script,
    Story,
    ejected,
    told,
)

from quorumfs.decisions.model import Standing
from quorumfs.replica.storage import Kind


async def a_flush_before_one_is_ejected(story: Story) -> None:
    """A write failed on it and waits to say so; the flush forgets what was written."""
    async with story.holding(0).durable().mounted() as guest:
        story.world.replicas[1].sidecar_faults.weather = Weather(delay_s=(2.0, 2.0))
        guest.begin(guest.write, EXTENTS[2])  # its mark is slow
        await trio.sleep(0.5)
        story.fail_once(0, Kind.WRITE)
        guest.begin(guest.write, 0)
        await trio.sleep(0.5)
        await guest.flush()
        await trio.sleep(30.0)
        await guest.converged()
        await guest.read(0)
    await story.ends_well()


async def a_flush_before_one_that_joins_is_ejected(story: Story) -> None:
    """The same, of one that is just becoming current."""
    await ejected(story, 0)
    async with story.mounted() as guest:
        sidecars, replica = guest.mounted.sidecars, guest.replica(0)
        await guest.write(0)
        story.world.replicas[1].sidecar_faults.weather = Weather(delay_s=(1.0, 1.0))
        await guest.until(
            lambda: sidecars.ledger.joining and replica.standing is Standing.CURRENT, every_s=0.01
        )
        story.fail_once(0, Kind.WRITE)
        guest.begin(guest.write, 0)
        await trio.sleep(0.1)
        await guest.flush()
        assert sidecars.ledger.joining
        await guest.until(lambda: replica.standing is not Standing.CURRENT, every_s=0.01)
        story.world.calm()
        await guest.converged()
        await guest.read(0)
    await story.ends_well()


async def a_write_under_way_beside_a_flush(story: Story) -> None:
    """Then its replica is ejected for another one, and then it fails there."""
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.write(EXTENTS[2])
        await guest.flush()
        story.fail_once(0, Kind.WRITE, Fault(6.0, errno.EIO))
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        await guest.flush()
        story.fail_once(0, Kind.WRITE)
        await guest.write(EXTENTS[2])
        await trio.sleep(10.0)
        await guest.converged()
        await guest.read(0)
    await story.ends_well()


async def a_write_under_way_beside_two_flushes(story: Story) -> None:
    """The first forgets it, the second loses what one replica had taken of it since."""
    async with story.holding(0).durable().mounted() as guest:
        story.world.replicas[0].image_faults.plan(Kind.WRITE, Fault(0.5))
        story.world.replicas[1].image_faults.plan(Kind.WRITE, Fault(6.0))
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(1.0))
        guest.begin(guest.write, 0)
        await trio.sleep(0.1)
        await guest.flush()
        story.fail_once(0, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(10.0)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(30.0)
        story.evict(0)
        await guest.read_surely(0)
    await story.ends_well()


async def ejected_beside_a_flush(story: Story) -> None:
    """A flush failed on one; while that waits, another is ejected: so it is forgotten."""
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.write(EXTENTS[2])
        other = story.setup.replicas - 1
        # The lock of the sidecars is held by the mark of another extent.
        for one in story.world.replicas:
            one.sidecar_faults.weather = Weather(delay_s=(2.0, 2.0))
        guest.begin(guest.write, EXTENTS[4])
        await trio.sleep(0.1)
        story.fail_once(other, Kind.WRITE)
        guest.begin(guest.write, EXTENTS[2])
        await trio.sleep(0.1)
        story.fail_once(0, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        # It cannot be ejected, and what it lost is not on record.
        lost = guest.mounted.sidecars.ledger.content.lossy
        story.world.note(f"lost: {lost} members {guest.mounted.members}")
        for one in story.world.replicas:
            one.sidecar_faults.weather = Weather()
        with suppress(OSError):
            await guest.flush()
            story.world.note("acknowledged flush")
        story.world.power_cut()
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def read_from_one_ejected_meanwhile(story: Story) -> None:
    """The next to be asked, when the first one fails, lost it meanwhile and was ejected."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail(0, {Kind.READ}, Fault(6.0, errno.EIO))
        guest.begin(guest.read, 0)
        await trio.sleep(1.0)
        story.fail_once(1, Kind.SYNC)
        await guest.flush()
        assert guest.mounted.members == [0] or 1 not in guest.mounted.members
        story.evict(1)
        await trio.sleep(90.0)
        story.mend(0)


STORIES = [
    (a_flush_before_one_is_ejected, PAIR),
    (a_flush_before_one_that_joins_is_ejected, PAIR),
    (a_write_under_way_beside_a_flush, PAIR),
    (a_write_under_way_beside_two_flushes, EQUALS),
    (a_write_under_way_beside_two_flushes, replace(EQUALS, fifo=True)),
    (ejected_beside_a_flush, PAIR),
    (ejected_beside_a_flush, TRIO),
    (ejected_beside_a_flush, replace(TRIO, fifo=True)),
    (read_from_one_ejected_meanwhile, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
