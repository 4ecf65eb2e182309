"""Stories of sets that were copied, and of replicas mounted alone: what several tests tell."""

from quorumfs.decisions.model import Standing
from quorumfs.decisions.refusal import AssemblyRefusedError
from support.simulation.oracle import BrokenError
from support.simulation.story import EXTENT, EXTENTS, CopiedSet, Story


async def golden_copy(story: Story) -> CopiedSet:
    """A set closed in order, which holds something; a copy of it."""
    async with story.holding(0).durable().mounted():
        pass
    return story.copied()


async def use(story: Story, at: int, times: int = 1) -> None:
    """Mount all, write, and unmount; so many times."""
    for _ in range(times):
        async with story.mounted() as guest:
            await guest.write(at)
            await guest.flush()


async def use_alone(story: Story, index: int, *, write: bool, kill: bool) -> None:
    """Mount one replica without the others, as an operator who knows what that may cost."""
    order = [index]
    plan = story.operator.assemble(order, degraded=True, threshold=1)
    story.state.last = None
    async with story.world.boot() as life:
        mounted = await story.mounting.mount(life, order, plan)
        await mounted.disk.read(0, EXTENT)
        if write:
            await mounted.disk.write(EXTENTS[3], bytes(EXTENT))
        if kill:
            story.world.kill()
        await story.mounting.unmount(mounted)


async def copies_used_alike(story: Story) -> None:
    """Each as often as the other; one number of commits, one generation, all closed in order."""
    for times in (1, 3):
        golden = await golden_copy(story)
        await use(story, EXTENTS[1], times)
        used = story.turn_to(golden)
        await use(story, EXTENTS[2], times)
        mixed = story.turn_to(used)
        for index in range(1, story.setup.replicas):
            story.world.put(index, mixed.replicas[index])
            story.require_split()
        story.turn_to(used)


async def mounted_alone_and_only_read(story: Story) -> None:
    """After a crash one is mounted alone, and dies; another one is, and written to."""
    for kill in (True, False):
        async with story.holding(0).durable().mounted():
            story.world.kill()
        await use_alone(story, 1, write=False, kill=kill)
        await use_alone(story, 0, write=True, kill=kill)
        try:
            plan = story.operator.assemble([0, 1])
        except AssemblyRefusedError as error:
            raise BrokenError(f"no side of a split was written to: {error.rule}") from error
        assert [member.state for member in plan.members] == [Standing.CURRENT, Standing.STALE]
        assert not plan.members[1].compare, "it is on record what it lacks"
        story.oracle.forget_reads()
        story.state.accept_loss([0, 1], plan)
        await story.ends_well()
