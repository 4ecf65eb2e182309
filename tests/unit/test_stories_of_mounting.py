"""Stories of what a mount is asked for, and of what the next one makes of it."""

import errno

import pytest
from support.simulation.runner import Setup
from support.simulation.storage import Fault
from support.simulation.story import EXTENTS, TRIO, Script, Story, told

from quorumfs.assembly import AssemblyRefusedError
from quorumfs.storage import CHANGES


async def _asked_for_by_too_few(story: Story, threshold: int | None) -> None:
    """One current replica alone commits, and is killed before a stale one has caught up.

    The third one is away and current on record: the two that are here were enough to begin with.
    """
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.flush()
        story.fail(1, CHANGES, Fault(error=errno.EIO))
        await guest.write(EXTENTS[2])
        await guest.flush()
        story.world.kill()
    story.mend(1)
    story.world.detach(2)
    async with story.mounted([0, 1], threshold=threshold) as guest:
        story.slow_down(1, 5.0)
        found = guest.mounted.plan.record.sequence
        await guest.until(lambda: guest.mounted.sidecars.record.sequence > found, every_s=0.1)
        assert guest.mounted.members == [0]
        story.world.kill()
    story.world.calm()
    story.world.detach(2)


async def a_threshold_lowered_by_too_few(story: Story) -> None:
    """Nothing was acknowledged under the lower one; with the one on record two are enough."""
    await _asked_for_by_too_few(story, threshold=1)
    async with story.mounted([0, 1]):
        pass
    await story.ends_well()


async def a_threshold_lowered_by_too_few_and_raised_again(story: Story) -> None:
    """Nor are two too few for who asks for what it always was."""
    await _asked_for_by_too_few(story, threshold=1)
    async with story.mounted([0, 1], threshold=2):
        pass
    await story.ends_well()


async def a_threshold_kept_by_too_few(story: Story) -> None:
    """The same without asking for another one."""
    await _asked_for_by_too_few(story, threshold=None)
    async with story.mounted([0, 1]):
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
    (a_threshold_lowered_by_too_few_and_raised_again, TRIO),
    (a_threshold_kept_by_too_few, TRIO),
    (a_threshold_lowered_by_enough, TRIO),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
