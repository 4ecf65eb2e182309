"""Stories of images that are truncated, and get their length back with zeros for their data."""

from contextlib import suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
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
    ejected,
    told,
)

from quorumfs.decisions.model import Standing
from quorumfs.repair import repairs as repairs_module
from quorumfs.replica.storage import Kind


async def truncated_where_all_must_agree(story: Story) -> None:
    """It cannot be ejected, and gets its length back: with zeros, not with its data."""
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        story.world.replicas[0].image.truncate(EXTENT)
        await guest.read(EXTENTS[-1])
        assert guest.mounted.sidecars.ledger.content.truncated
        story.world.replicas[0].image.truncate(DISK)
        for at in EXTENTS:
            with suppress(OSError):
                await guest.read(at)


async def truncated_and_seen(story: Story) -> None:
    """The read that noticed is answered, and nothing is on record."""
    async with story.holding(0).durable().mounted() as guest:
        story.world.replicas[0].image.truncate(0)
        await guest.read(0)
        story.world.kill()
    story.world.replicas[0].image.truncate(DISK)
    async with story.mounted() as guest:
        await guest.read(0)


async def truncated_and_failing_a_flush(story: Story) -> None:
    """It is counted twice among those that are to be ejected."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[0].image.truncate(0)
        await guest.read(0)
        story.fail(0, {Kind.SYNC})
        try:
            await guest.flush()
        except OSError as error:
            raise BrokenError(f"the others are enough: {error}") from error


async def truncated_while_away(story: Story) -> None:
    """The daemon sees it too short, and later long enough: with zeros, not with its data."""
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        story.world.detach(0)
        await guest.write(0)
        story.world.replicas[0].image.truncate(EXTENT)
        story.world.attach(0)
        await guest.until(lambda: story.world.replicas[0].path in guest.life.seen_short)
        await trio.sleep(1.0)
        story.world.replicas[0].image.truncate(DISK)
        await guest.converged()
    await story.ends_well()


async def truncated_amid_its_resync(story: Story) -> None:
    await ejected(story, 0)
    story.slow_down(0, 0.5)
    async with story.mounted() as guest:
        replica = guest.replica(0)
        await guest.until(lambda: replica.standing is Standing.RESYNCING)
        await trio.sleep(3.0)
        story.world.replicas[0].image.truncate(BLOCK)
        await guest.until(lambda: replica.standing is not Standing.RESYNCING)
        story.world.replicas[0].image.truncate(DISK)
        await guest.converged()
    await story.ends_well()


async def truncated_between_mounts(story: Story) -> None:
    """After a crash, when no times are on record; the mount sees it too short."""
    async with story.holding(*EXTENTS).mounted() as guest:
        await trio.sleep(4 * repairs_module.CLEAR_S)  # no mark is left of that
        story.world.detach(0)
        await guest.write(0)
        story.world.kill()
    story.world.attach(0)
    story.world.replicas[0].image.truncate(EXTENT)
    async with story.mounted() as guest:
        story.world.replicas[0].image.truncate(DISK)
        await guest.converged()
    await story.ends_well()


async def truncated_while_stale(story: Story) -> None:
    """The daemon has said so for long, is killed, and the operator gives it its length back."""
    async with story.holding(*EXTENTS).mounted():
        pass
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.flush()
        story.world.detach(1)
        await guest.write(0)
        await guest.flush()
        story.world.replicas[1].image.truncate(EXTENT)
        story.world.attach(1)
        replica = guest.replica(1)
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
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted() as guest:
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
    (truncated_where_all_must_agree, replace(EQUALS, fifo=True)),
    (truncated_and_failing_a_flush, PAIR),
    (truncated_and_failing_a_flush, TRIO),
    (truncated_and_seen, PAIR),
    (truncated_while_away, PAIR),
    (truncated_amid_its_resync, PAIR),
    (truncated_between_mounts, PAIR),
    (truncated_and_flushed_after_the_next_mount, EQUALS),
    (truncated_while_stale, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
