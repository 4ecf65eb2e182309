"""Stories of kills and power cuts amid writes, commits and repairs."""

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import pytest
import trio
import trio.testing
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault, Weather
from support.simulation.story import (
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    TRIO,
    Script,
    Story,
    told,
)

from quorumfs.decisions.dirtymap import INTENT
from quorumfs.decisions.record import Phase
from quorumfs.decisions.sameimage import LATER_NS
from quorumfs.decisions.sidecar import SLOT_OFFSETS
from quorumfs.repair.repairs import CLEAR_S
from quorumfs.replica.storage import Kind, Operation


async def a_hole_shown_by_too_few(story: Story) -> None:
    """Who is not here may hold something else, and is not on record as ejected."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(2)
        await guest.write(0)
        story.fail_once(1, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, EXTENT // 2)
        await trio.sleep(1.0)
        story.cut_off(1)
    story.world.attach(2)
    story.world.detach(0)
    story.world.replicas[2].image_faults.weather = Weather(delay_s=(3.0, 3.0))
    async with story.mounted() as guest:
        with suppress(OSError):
            await guest.read(EXTENT // 2)
        story.world.kill()
    story.world.calm()
    async with story.mounted([0, 1]) as guest:
        await guest.read(EXTENT // 2)
    await story.ends_well()


async def a_commit_over_one_that_was_not_synced(story: Story) -> None:
    """A kill leaves a record in memory alone, and power is cut amid the next commit."""

    def no_sync_after(phase: Phase) -> Callable[[Operation], Fault | None]:
        written = False

        def script(operation: Operation) -> Fault | None:
            nonlocal written
            if operation.kind is Kind.WRITE and operation.offset in SLOT_OFFSETS:
                written |= operation.data[12] == phase
            return Fault(hang=True) if written and operation.kind is Kind.SYNC else None

        return script

    async with story.mounted() as guest:
        await guest.write(0)
        for replica in story.world.replicas:
            replica.sidecar_faults.script = no_sync_after(Phase.COMMITTED)
        guest.begin(_after_a_second, story.world.kill)
    for replica in story.world.replicas:
        replica.sidecar_faults.script = no_sync_after(Phase.PREPARED)
    async with story.mounted() as guest:
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        story.world.power_cut()
    await story.ends_well()


async def _after_a_second(action: Callable[[], None]) -> None:
    await trio.sleep(1.0)
    action()


async def a_hole_shown_beside_one_that_is_away(story: Story) -> None:
    """It alone took a write that failed; who seeks is told that nothing is there."""
    async with story.mounted() as guest:
        await guest.write(EXTENT // 2)
        for index in range(1, story.setup.replicas):
            story.fail_once(index, Kind.WRITE, Fault(6.0, errno.EIO))
        write = guest.write

        async def fails() -> None:
            with suppress(OSError):
                await write(0)
            await guest._seek(0)
            story.world.kill()

        guest.life.nursery.start_soon(fails)
        await trio.sleep(1.0)
        story.world.detach(0)
        with suppress(OSError):
            await guest.read(EXTENT // 2)
        await trio.sleep(12.0)
        story.world.kill()
    story.world.attach(0)
    async with story.mounted([0, 1]) as guest:
        await guest.read(0)


async def killed_where_holes_were_marked_ahead(story: Story) -> None:
    """Settling writes nothing there, and yet the marks go: else they grew with each crash."""
    async with story.mounted() as guest:
        for at in EXTENTS[:4]:
            await guest.write(at)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.converged()
        disk_map = guest.mounted.sidecars.ledger.map
        assert disk_map.any(INTENT, disk_map.chunks(EXTENTS[5], EXTENT))
        await guest.until(lambda: not disk_map.count(INTENT))
    await story.ends_well()


async def too_few_are_left_after_a_crash(story: Story) -> None:
    """One is stale, one is away and comes back: nobody needs a new mount for that."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0)
        await guest.write(0)
        story.world.kill()
    story.world.attach(0)
    story.world.detach(1)
    async with story.mounted() as guest:
        await guest.until(
            lambda: len(guest.mounted.sidecars.ledger.members) == story.setup.threshold
        )
        await guest.write_surely(0)
        story.world.attach(1)
        await guest.converged()
    await story.ends_well()


async def a_read_behind_a_write_that_fails(story: Story) -> None:
    """It waited for the lock, and finds what only one replica took."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        with suppress(OSError):
            await guest.read(0)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def two_commits_are_cut_off(story: Story) -> None:
    """One replica had only prepared the first; the second must not take that from it."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[2].sidecar_faults.plan(Kind.WRITE, Fault(), Fault(hang=True))
        guest.begin(guest.mounted.sidecars.close)
        await trio.sleep(1.0)
        story.world.kill()
    async with story.mounted() as guest:

        def torn(operation: Operation) -> Fault | None:
            is_slot = operation.kind is Kind.WRITE and operation.offset in SLOT_OFFSETS
            return Fault(error=errno.EIO, effect=Effect.PART) if is_slot else None

        for one in story.world.replicas:
            one.sidecar_faults.script = torn
        with suppress(OSError):
            await guest.write(0)
        story.world.kill()
    await story.ends_well()


async def idle_while_marks_are_kept(story: Story) -> None:
    """A write to a marked extent writes no sidecar. Yet after a crash no image is much later than
    its sidecar, by which one that somebody else wrote to is known."""
    written: list[float] = []

    def note(operation: Operation) -> Fault | None:
        if operation.kind is Kind.WRITE:
            written.append(trio.current_time())
        return None

    async with story.mounted() as guest:
        await guest.write_surely(0)
        story.world.detach(1)
        await guest.write_surely(0)  # the mark stays: it is to be known what the other lacks
        story.world.replicas[0].sidecar_faults.script = note
        begun = trio.current_time()
        await trio.sleep(3600.0)
        times = [begun, *written, trio.current_time()]
        assert max(late - early for early, late in pairwise(times)) < LATER_NS / 10**9 - CLEAR_S
        assert len(written) < 40
    story.world.attach(1)
    await story.ends_well()


STORIES = [
    (idle_while_marks_are_kept, PAIR),
    (killed_where_holes_were_marked_ahead, PAIR),
    (a_hole_shown_beside_one_that_is_away, EQUALS),
    (a_hole_shown_by_too_few, replace(TRIO, fifo=True)),
    (too_few_are_left_after_a_crash, TRIO),
    (a_read_behind_a_write_that_fails, EQUALS),
    (two_commits_are_cut_off, replace(TRIO, threshold=1)),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4


def test_a_commit_is_written_over_none_that_was_not_synced() -> None:
    """What a power cut leaves is a matter of luck."""
    script = a_commit_over_one_that_was_not_synced
    assert [told(script, PAIR, seed) for seed in range(40)] == [None] * 40
