"""Stories of a replica put back, with its sidecar, to a snapshot of its file system taken while it
was mounted: the record's number tells, however the guest used the disk since."""

import pytest
import trio
from support.simulation.runner import Setup
from support.simulation.story import EQUALS, EXTENTS, PAIR, TRIO, Guest, Script, Story, told

MINUTE = 60.0


async def _one_hot_place(story: Story, guest: Guest) -> None:
    """For an hour: no mark is ever cleared."""
    for _ in range(180):
        await trio.sleep(MINUTE / 3)
        await guest.write(0)
    await guest.flush()


async def rolled_back_after_a_kill(story: Story) -> None:
    """It is not the one that the other is made equal to."""
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.flush()
        await trio.sleep(1.5 * MINUTE)
        await guest.write(0)
        await guest.flush()
        snapshot = story.world.backup(0)
        await _one_hot_place(story, guest)
        story.world.kill()
    story.world.roll_back(0, snapshot)
    async with story.mounted() as guest:
        await guest.converged()
        await guest.read_surely(0)
    await story.ends_well()


async def rolled_back_while_away(story: Story) -> None:
    """It was left behind by this mount, which knows what was written since, but not before."""
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.flush()
        await trio.sleep(1.5 * MINUTE)
        await guest.write(0)
        await guest.flush()
        snapshot = story.world.backup(0)
        await _one_hot_place(story, guest)
        story.world.detach(0)
        await guest.write(EXTENTS[3])
        await guest.until(lambda: 0 not in guest.mounted.members)
        await guest.flush()
        one = story.world.replicas[0]
        assert one.sidecar is not None
        assert snapshot.sidecar is not None
        one.image.restore(snapshot.image, in_place=True)
        one.sidecar.restore(snapshot.sidecar, in_place=True)
        story.world.attach(0)
        await guest.until(lambda: 0 in guest.mounted.members)
        await guest.read_surely(0)
        await guest.converged()
    story.oracle.check_images(story.world.contents())


async def rolled_back_while_another_was_away(story: Story) -> None:
    """As long as one of three is away no mark is cleared, whatever is written."""
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.flush()
        story.world.detach(2)
        await guest.write(0)
        await guest.until(lambda: 2 not in guest.mounted.members)
        for at in EXTENTS:
            await guest.write(at)
        await guest.flush()
        await trio.sleep(3 * MINUTE)
        snapshot = story.world.backup(0)
        for at in [*EXTENTS, *EXTENTS]:
            await trio.sleep(7 * MINUTE)
            await guest.write(at)
        await guest.flush()
        await trio.sleep(7 * MINUTE)
        story.world.kill()
    story.world.attach(2)
    story.world.roll_back(0, snapshot)
    async with story.mounted() as guest:
        await guest.converged()
        for at in EXTENTS:
            await guest.read_surely(at)
    await story.ends_well()


STORIES = [
    (rolled_back_after_a_kill, EQUALS),
    (rolled_back_after_a_kill, TRIO),
    (rolled_back_while_away, PAIR),
    (rolled_back_while_another_was_away, TRIO),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(2)] == [None] * 2
