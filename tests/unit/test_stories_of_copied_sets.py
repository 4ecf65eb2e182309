"""Stories of sets that were copied, sidecars and all, and of their replicas given together."""

from dataclasses import replace

import pytest
from support.simulation.copies import (
    copies_used_alike,
    golden_copy,
    mounted_alone_and_only_read,
    use,
    use_alone,
)
from support.simulation.harness import run_seeded
from support.simulation.oracle import BrokenError
from support.simulation.setup import Origin, Setup
from support.simulation.story import (
    DISK,
    EXTENTS,
    PAIR,
    TRIO,
    Script,
    Story,
    told,
)

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.model import Standing
from quorumfs.decisions.resolution import resolve


async def a_copy_that_crashed(story: Story) -> None:
    golden = await golden_copy(story)
    await use(story, EXTENTS[1])
    used = story.turn_to(golden)
    async with story.mounted() as guest:
        await guest.write(EXTENTS[2])
        story.world.kill()
    mixed = story.turn_to(used)
    story.world.put(1, mixed.replicas[1])
    story.require_split()


async def a_copy_of_a_set_in_use(story: Story) -> None:
    """A snapshot of all stores at once; the set goes on, and so does its copy."""
    async with story.holding(0).durable().mounted() as guest:
        snapshot = story.copied()
        await guest.write(EXTENTS[1])
        await guest.flush()
    used = story.turn_to(snapshot)
    await use(story, EXTENTS[2])
    mixed = story.turn_to(used)
    story.world.put(1, mixed.replicas[1])
    story.require_split()


async def a_copy_used_without_one(story: Story) -> None:
    golden = await golden_copy(story)
    await use(story, EXTENTS[1])
    used = story.turn_to(golden)
    await use_alone(story, 1, write=True, kill=False)
    mixed = story.turn_to(used)
    story.world.put(1, mixed.replicas[1])
    story.require_split()


async def copies_that_were_only_read(story: Story) -> None:
    """They hold the same: nothing is asked, nothing is copied."""
    golden = await golden_copy(story)
    async with story.mounted() as guest:
        await guest.read_surely(0)
    used = story.turn_to(golden)
    async with story.mounted() as guest:
        await guest.read_surely(0)
    mixed = story.turn_to(used)
    story.world.put(1, mixed.replicas[1])
    async with story.mounted() as guest:
        await guest.read_surely(0)
        await guest.until(lambda: guest.mounted.even)
    await story.ends_well()


async def copies_that_settled(story: Story) -> None:
    """Copied after a crash; what was under way may have become something else in each. Nobody
    acknowledged it: no split, but all of it is compared."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.kill()
    crashed = story.copied()
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.even)
    used = story.turn_to(crashed)
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.even)
    mixed = story.turn_to(used)
    story.world.put(1, mixed.replicas[1])
    plan = story.operator.assemble([0, 1], degraded=True, threshold=None)
    states = sorted(member.state.value for member in plan.members)
    if states != ["current", "stale"] or not any(member.compare for member in plan.members):
        raise BrokenError(f"nobody compares what two copies made equal: {states}")


async def one_side_was_used(story: Story) -> None:
    """Of three, two of a copy that was used and one that was not: it is behind, and compared."""
    golden = await golden_copy(story)
    await use(story, EXTENTS[1])
    story.world.put(2, golden.replicas[2])
    async with story.mounted() as guest:
        (member,) = [m for m in guest.mounted.plan.members if m.state is Standing.STALE]
        assert member.compare
        await guest.converged()
    await story.ends_well()


async def a_copy_comes_back(story: Story) -> None:
    """While the set is in use, one of a copy takes the place of a replica that was away."""
    golden = await golden_copy(story)
    used = story.turn_to(golden)
    await use(story, EXTENTS[2])
    mixed = story.turn_to(used)
    async with story.mounted() as guest:
        await guest.write(EXTENTS[1])
        story.world.detach(1)
        await guest.write(EXTENTS[1])
        await guest.until(lambda: 1 not in guest.mounted.members)
        story.world.put(1, mixed.replicas[1])
        story.world.attach(1)
        replica = guest.replica(1)
        await guest.until(lambda: replica.standing is not Standing.STALE)
        if replica.standing is not Standing.FOREIGN:
            raise BrokenError(f"one of another history is {replica.standing.value}")
    held = story.world.replicas[1].image.cache.read(0, DISK)
    if held != mixed.replicas[1].image.content.read(0, DISK):
        raise BrokenError("one of another history was overwritten")


async def only_the_copy_is_kept(story: Story) -> None:
    (found,) = story.world.found([1])
    resolution = resolve([found], found.path)
    assert resolution.kept == (found.path,)
    plan = assemble([replace(found, sidecar=resolution.sidecars[found.path])])
    assert [member.state for member in plan.members] == [Standing.CURRENT]


STORIES = [
    (copies_used_alike, PAIR),
    (copies_used_alike, TRIO),
    (a_copy_that_crashed, PAIR),
    (a_copy_of_a_set_in_use, PAIR),
    (a_copy_used_without_one, PAIR),
    (copies_that_were_only_read, PAIR),
    (copies_that_settled, PAIR),
    (one_side_was_used, TRIO),
    (a_copy_comes_back, PAIR),
    (a_copy_comes_back, replace(TRIO, threshold=1)),
    (mounted_alone_and_only_read, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(2)] == [None] * 2


def test_who_is_kept_is_current_even_if_it_was_being_caught_up() -> None:
    """The source of a resync is lost for ever: a mixture is better than nothing, if so wanted."""
    story = Story(0, replace(PAIR, origin=Origin.COPIED), only_the_copy_is_kept)
    run_seeded(0, story.run)
