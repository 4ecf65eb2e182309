"""Stories of a replica put back, with its sidecar, to a snapshot of its file system taken while it
was mounted: the record's number tells, however the guest used the disk since."""

from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.simulation.media import Backup
from support.simulation.oracle import BrokenError
from support.simulation.rule_stories import (
    an_old_image_behind_a_mount_that_stays,
    goes_and_comes_back,
)
from support.simulation.setup import Setup
from support.simulation.storage import Weather
from support.simulation.story import (
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    TRIO,
    Guest,
    Script,
    Story,
    told,
)
from support.simulation.world import ReplicaBackup

from quorumfs.decisions.resolution import resolve

MINUTE = 60.0


async def _one_hot_place(story: Story, guest: Guest) -> None:
    """For an hour: no mark is ever cleared."""
    for _ in range(180):
        await trio.sleep(MINUTE / 3)
        await guest.write(0)
    await guest.flush()


async def rolled_back_after_a_kill(story: Story) -> None:
    """It is not the one that the other is made equal to."""
    async with story.holding(0).durable().mounted() as guest:
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
    """It was ejected by this mount, which knows what was written since, but not before."""
    async with story.holding(0).durable().mounted() as guest:
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
    async with story.holding(0).durable().mounted() as guest:
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


async def _some_seconds_before_it_goes(story: Story, guest: Guest) -> None:
    """What was written since a snapshot was flushed, and no record tells the one from the other."""
    await guest.write(0)
    await guest.flush()
    await trio.sleep(2.0)
    snapshot = story.world.backup(0)
    for at in EXTENTS[:2]:
        await guest.write(at)
    await guest.flush()
    await trio.sleep(3.0)
    story.world.detach(0)
    await guest.write(EXTENTS[3])
    await guest.until(lambda: 0 not in guest.mounted.members)
    story.world.roll_back(0, snapshot)


async def _back_and_never_believed(story: Story, guest: Guest) -> None:
    await guest.until(lambda: 0 in guest.mounted.members)
    for at in EXTENTS:
        await guest.read_surely(at)
    await guest.converged()


async def rolled_back_by_seconds(story: Story) -> None:
    """What was in the activity log when it was ejected is compared (R15)."""
    async with story.mounted() as guest:
        await _some_seconds_before_it_goes(story, guest)
        story.world.attach(0)
        await _back_and_never_believed(story, guest)
    story.oracle.check_images(story.world.contents())


async def rolled_back_by_seconds_and_unmounted(story: Story) -> None:
    """The same, and the set was closed in order before it came back (R15)."""
    async with story.mounted() as guest:
        await _some_seconds_before_it_goes(story, guest)
    story.world.attach(0)
    async with story.mounted() as guest:
        await _back_and_never_believed(story, guest)
    story.oracle.check_images(story.world.contents())


async def rolled_back_by_seconds_after_a_kill(story: Story) -> None:
    """Nothing on record tells the one from the other, but that it has no mark of the last write."""
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.flush()
        await trio.sleep(2.0)
        snapshot = story.world.backup(0)
        await guest.write(EXTENTS[1])
        await guest.flush()
        story.world.kill()
    story.world.roll_back(0, snapshot)
    async with story.mounted() as guest:
        await guest.read_surely(EXTENTS[1])
        await guest.converged()
    await story.ends_well()


async def a_snapshot_that_is_up_to_date(story: Story) -> None:
    """P3: one that is as it was is given nothing but what it missed."""
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted() as guest:
        story.world.detach(0)
        await guest.write(EXTENTS[3])
        await guest.until(lambda: 0 not in guest.mounted.members)
        story.world.attach(0)
        await _back_and_never_believed(story, guest)
        copied = guest.mounted.disk.replicas[0].counters.copied_bytes
        if copied > EXTENT // 2:
            raise BrokenError(f"{copied} bytes were copied for a block that was missed")


async def _another_image_is_behind_its_sidecar(story: Story, old: Backup) -> None:
    """Its store is mounted anew, and all that it is known by is its sidecar."""
    story.world.restore(0, ReplicaBackup(old, None), sidecar=False)
    story.world.attach(0)


async def an_old_image_under_its_sidecar(story: Story) -> None:
    """No mark is left of what it lacks: it is compared in full (R15)."""
    async with story.holding(0).durable().mounted() as guest:
        old = story.world.backup(0).image
        await guest.write(EXTENTS[1])
        await guest.flush()
        await trio.sleep(5 * MINUTE)
        story.world.detach(0)
        await guest.write(EXTENTS[3])
        await guest.until(lambda: 0 not in guest.mounted.members)
        await _another_image_is_behind_its_sidecar(story, old)
        await _back_and_never_believed(story, guest)
    story.oracle.check_images(story.world.contents())


async def a_server_that_comes_back_as_it_was(story: Story) -> None:
    """P3: what was written last proves the image, and it gets nothing but what it missed."""
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted() as guest:
        await trio.sleep(5 * MINUTE)
        await goes_and_comes_back(story, guest)
        await _back_and_never_believed(story, guest)
    (started,) = (line for line in story.world.trace if "RESYNC_STARTED" in line)
    if f"up to {story.world.size} bytes" in started:
        raise BrokenError("it was compared in full")


async def an_empty_image_after_a_kill(story: Story) -> None:
    """It is the first one, which all are made equal to: not before it was compared (R15)."""
    empty = story.world.backup(0).image
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        story.world.kill()
    story.world.detach(0)
    await _another_image_is_behind_its_sidecar(story, empty)
    async with story.mounted() as guest:
        await _back_and_never_believed(story, guest)
    story.oracle.check_images(story.world.contents())


async def an_empty_image_where_none_can_be_spared(story: Story) -> None:
    """It cannot be ejected, so it is given everything anew before it is believed (R15)."""
    empty = story.world.backup(0).image
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        await trio.sleep(5 * MINUTE)
        await guest.write(EXTENTS[0])
        story.world.detach(0)
        with suppress(OSError):
            await guest.read(0)
        await _another_image_is_behind_its_sidecar(story, empty)
        for one in story.world.replicas:  # what it lost is remembered slowly
            one.sidecar_faults.weather = Weather(delay_s=(0.2, 0.2))
        for number in range(400):  # and the guest reads meanwhile, where nothing was unsynced
            with suppress(OSError):
                await guest.read(EXTENTS[1 + number % (len(EXTENTS) - 1)])
            await trio.sleep(0.01)
        story.world.calm()
        await guest.converged()
        for at in EXTENTS:
            await guest.read_surely(at)
        await guest.flush()
    story.oracle.check_images(story.world.contents())


async def rolled_back_and_resolved(story: Story) -> None:
    """Its sidecar is as old as its image, and no mark is left of what was written since."""
    async with story.mounted() as guest:
        await guest.write(0)
    snapshot_before = story.world.backup(1)
    async with story.mounted() as guest:
        await guest.write(0)
    story.world.roll_back(1, snapshot_before)
    resolution = resolve(story.world.found(), story.world.replicas[0].path)
    for index, one in enumerate(story.world.replicas):
        if one.path in resolution.sidecars:
            story.world.create_sidecar(index, resolution.sidecars[one.path])
    async with story.mounted() as guest:
        await guest.converged()
    story.oracle.check_images(story.world.contents())
    await story.ends_well()


STORIES = [
    (rolled_back_by_seconds, PAIR),
    (rolled_back_by_seconds, TRIO),
    (rolled_back_by_seconds_and_unmounted, PAIR),
    (rolled_back_by_seconds_after_a_kill, PAIR),
    (rolled_back_by_seconds_after_a_kill, EQUALS),
    (rolled_back_by_seconds_after_a_kill, TRIO),
    (a_snapshot_that_is_up_to_date, PAIR),
    (a_snapshot_that_is_up_to_date, replace(PAIR, passing=True)),
    (an_old_image_under_its_sidecar, replace(PAIR, passing=True)),
    (an_old_image_behind_a_mount_that_stays, replace(TRIO, passing=True)),
    (a_server_that_comes_back_as_it_was, replace(PAIR, passing=True)),
    (an_empty_image_after_a_kill, replace(PAIR, passing=True)),
    (an_empty_image_after_a_kill, replace(TRIO, passing=True)),
    (an_empty_image_where_none_can_be_spared, replace(EQUALS, passing=True)),
    (an_empty_image_where_none_can_be_spared, replace(EQUALS, passing=True, fifo=True)),
    (rolled_back_after_a_kill, EQUALS),
    (rolled_back_after_a_kill, TRIO),
    (rolled_back_while_away, PAIR),
    (rolled_back_while_another_was_away, TRIO),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(2)] == [None] * 2


def test_a_replica_rolled_back_is_resolved() -> None:
    assert [told(rolled_back_and_resolved, PAIR, seed) for seed in range(4)] == [None] * 4
