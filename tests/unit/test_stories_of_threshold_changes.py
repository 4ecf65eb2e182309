"""Stories of mounts that change the vote threshold, and of the mounts that find it on record."""

from collections.abc import Awaitable, Callable

import pytest
from support.simulation.setup import Setup
from support.simulation.story import BLOCK, EQUALS, EXTENTS, PAIR, TRIO, Guest, Script, Story, told

from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.replica.storage import CHANGES


async def _one_current_of_three(story: Story) -> None:
    """One is current on record, and here; one is stale, and here; the third one is away, and
    current on record. The two that are here are enough to mount.
    """
    async with story.holding(0).durable().mounted() as guest:
        story.fail(1, CHANGES)
        await guest.write(EXTENTS[2])
        await guest.flush()
        story.world.kill()
    story.mend(1)
    story.world.detach(2)


async def a_threshold_lowered_by_too_few(story: Story) -> None:
    """The others would never hear of it: two of them would take themselves for enough."""
    await _one_current_of_three(story)
    with pytest.raises(AssemblyRefusedError, match="must have it on record"):
        async with story.mounted([0, 1], threshold=1):
            pass
    async with story.mounted([0, 1]) as guest:
        await guest.until(lambda: guest.mounted.even)
    async with story.mounted([0, 1], threshold=1):  # now they are two
        story.world.detach(1)
        await guest.write_surely(0)
    await story.ends_well()


async def a_threshold_kept_by_too_few(story: Story) -> None:
    """One current replica alone commits, and is killed before a stale one has caught up."""
    await _one_current_of_three(story)
    async with story.mounted([0, 1]) as guest:
        story.slow_down(1, 5.0)
        found = guest.mounted.plan.record.sequence
        await guest.until(
            lambda: guest.mounted.sidecars.ledger.record.sequence > found, every_s=0.1
        )
        assert guest.mounted.members == [0]
        story.world.kill()
    story.world.calm()
    story.world.detach(2)
    async with story.mounted([0, 1]):
        pass
    await story.ends_well()


async def a_threshold_lowered_before_anything_else(story: Story) -> None:
    """It is in force when the first request comes, whatever that is."""
    requests: list[Callable[[Guest], Awaitable[None]]] = [
        lambda guest: guest.write(0),
        lambda guest: guest.flush(),
        lambda guest: guest._zeros(0, BLOCK, discard=True),
    ]
    for request in requests:
        async with story.mounted(threshold=2):
            pass
        async with story.mounted(threshold=1) as guest:
            story.world.detach(1)
            await guest.surely(request(guest))
        story.world.attach(1)
        async with story.mounted() as guest:
            await guest.until(lambda: guest.mounted.even)


async def a_threshold_raised_before_anything_else(story: Story) -> None:
    """Whoever is killed before the first request has it on record."""
    async with story.mounted(threshold=2):
        story.world.kill()
    story.world.detach(1)
    with pytest.raises(AssemblyRefusedError, match="vote-threshold=2 needs as many"):
        async with story.mounted([0]):
            pass
    await story.ends_well()


async def a_threshold_lowered_by_enough(story: Story) -> None:
    """Then one alone that is here goes on, and the two others know that it may have."""
    async with story.mounted(threshold=1) as guest:
        await guest.write(0)
        story.world.detach(1)
        story.world.detach(2)
        await guest.write_surely(EXTENTS[2])
        story.world.kill()
    story.world.calm()
    story.world.detach(0)
    with pytest.raises(AssemblyRefusedError, match="may have later writes"):
        async with story.mounted([1, 2]):
            pass
    await story.ends_well()


STORIES = [
    (a_threshold_lowered_by_too_few, TRIO),
    (a_threshold_kept_by_too_few, TRIO),
    (a_threshold_lowered_by_enough, TRIO),
    (a_threshold_lowered_before_anything_else, EQUALS),
    (a_threshold_raised_before_anything_else, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
