"""Stories of replicas that are away, or not whole: first that goes on record."""

from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.simulation.guest import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Fault, Weather
from support.simulation.story import (
    BLOCK,
    DISK,
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    TRIO,
    Script,
    Story,
    told,
)

from quorumfs.assembly import AssemblyRefusedError
from quorumfs.storage import Kind


async def a_hole_passed_over_without_a_record(story: Story) -> None:
    """Who is not here alone took a write that was cut off; those who are here show a hole."""
    async with story.mounted() as guest:
        await guest.write(EXTENTS[4])  # whatever; it is clean when the set is mounted again
    async with story.mounted() as guest:
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, EXTENT // 2)
        await trio.sleep(1.0)
        story.cut_off(1, 2)
    story.world.detach(0)
    for index in (1, 2):  # nothing but a slow medium
        story.world.replicas[index].sidecar_faults.weather = Weather(delay_s=(4.0, 4.0))
    async with story.mounted() as guest:
        await trio.sleep(1.0)
        await guest.read(EXTENT // 2)
        story.world.kill()
    story.world.calm()
    async with story.mounted() as guest:
        await guest.read(EXTENT // 2)
    await story.ends_well()


async def a_hole_sought_without_a_record(story: Story) -> None:
    """The same as it is passed over, but shown to one who seeks."""
    async with story.mounted() as guest:
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, EXTENT // 2)
        await trio.sleep(1.0)
        story.cut_off(1, 2)
    story.world.detach(0)
    for index in (1, 2):
        story.world.replicas[index].sidecar_faults.weather = Weather(delay_s=(4.0, 4.0))
    async with story.mounted() as guest:
        await guest._seek(EXTENT // 2)
        story.world.kill()
    story.world.calm()
    async with story.mounted() as guest:
        await guest.read(EXTENT // 2)
    await story.ends_well()


async def away_in_turn(story: Story) -> None:
    """Two of three are enough, whoever is away; nothing is ever written, and nothing was lost."""
    async with story.mounted() as guest:
        for index in (0, 1, 2):
            story.fail_once(index, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        story.cut_off(0, 1, 2)
    for away in (0, 1, 2):
        story.world.detach(away)
        try:
            async with story.mounted() as guest:
                await trio.sleep(5.0)
        except AssemblyRefusedError as error:
            raise BrokenError(f"refused without need: {error}") from error
        story.world.attach(away)
    await story.ends_well()


async def truncated_while_stale(story: Story) -> None:
    """The daemon has said so for long, is killed, and the operator gives it its length back."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at)
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.flush()
        story.world.detach(1)
        await guest.write(0)
        await guest.flush()
        story.world.replicas[1].image.truncate(EXTENT)
        story.world.attach(1)
        replica = guest.mounted.replica(1)
        assert replica is not None
        await guest.until(lambda: "truncated" in (replica.reason or ""))
        await trio.sleep(100.0)  # that is what status shows
        await guest.write(0)
        await guest.flush()
        story.world.kill()
    story.world.replicas[1].image.truncate(DISK)
    async with story.mounted() as guest:
        await guest.converged()
    story.oracle.check_images(story.world.contents())


async def truncated_and_flushed_after_the_next_mount(story: Story) -> None:
    """Its image was truncated and got its length back, and too few would be left without it."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        await guest.flush()
        image = story.world.replicas[0].image
        size = image.size
        image.truncate(EXTENT)
        with suppress(OSError):
            await guest.mounted.disk.read(EXTENTS[-1], BLOCK)
        image.truncate(size)
        await trio.sleep(5.0)
        with suppress(OSError):
            await guest.flush()
        story.world.kill()
    async with story.mounted() as guest:
        await trio.sleep(300.0)
        await guest.read_surely(EXTENTS[-1])
        await guest.write_surely(0)
        await guest.flush()
        await guest.converged()


STORIES = [
    (truncated_and_flushed_after_the_next_mount, EQUALS),
    (a_hole_passed_over_without_a_record, TRIO),
    (a_hole_passed_over_without_a_record, replace(TRIO, fifo=True)),
    (a_hole_sought_without_a_record, TRIO),
    (away_in_turn, TRIO),
    (truncated_while_stale, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
