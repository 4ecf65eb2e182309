"""Stories of resyncs: what fails, is lost or is written while a replica is caught up."""

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault, Weather
from support.simulation.story import (
    BLOCK,
    CHUNK,
    DISK,
    EXTENT,
    EXTENTS,
    PAIR,
    QUAD,
    TRIO,
    Script,
    Story,
    ejected,
    told,
)

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.model import Standing
from quorumfs.decisions.record import Phase
from quorumfs.decisions.sidecar import SLOT_OFFSETS
from quorumfs.mount import snapshot
from quorumfs.options.table import MountOptions
from quorumfs.repair.copying import Copying
from quorumfs.replica.storage import CHANGES, Kind, Operation


async def copied_from_one_that_had_lost_it(story: Story) -> None:
    """Before its failed flush was heard of; the target is not given it again."""
    await ejected(story, 2)
    async with story.mounted() as guest:
        guest.mounted.repairs.limit = 16 << 10
        disk_map, replica = guest.mounted.sidecars.ledger.map, guest.replica(2)
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.1)
        chunk = disk_map.chunks(5 * CHUNK, BLOCK)
        assert disk_map.any(out_of_sync(2), chunk)
        await guest.write(5 * CHUNK)
        story.fail_once(0, Kind.SYNC)
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(14.0))
        guest.begin(guest.flush)
        await trio.sleep(0.5)
        story.evict(0)
        await trio.sleep(12.0)
        assert 0 in guest.mounted.members
        await trio.sleep(8.0)
        assert 0 not in guest.mounted.members
        await guest.converged()
    story.oracle.check_images(story.world.contents())


async def joins_amid_settling(story: Story) -> None:
    """Settled are those that were current when it began."""
    await ejected(story, 2)
    async with story.mounted() as guest:
        sidecars, replica = guest.mounted.sidecars, guest.replica(2)
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        story.fail_once(1, Kind.WRITE)
        with suppress(OSError):
            await guest.write(0)
        assert sidecars.ledger.agreement.divergent
        for one in story.world.replicas:
            one.sidecar_faults.weather = Weather(delay_s=(1.0, 1.0))
        await guest.until(lambda: sidecars.ledger.joining, every_s=0.001)
        assert replica.standing is Standing.RESYNCING
        assert sidecars.ledger.agreement.divergent
        story.fail_once(0, Kind.READ, Fault(6.0, errno.EIO))
        guest.begin(guest.read, 0)
        await trio.sleep(20.0)
        story.world.calm()
        await guest.converged()
    story.oracle.check_images(story.world.contents())


async def joins_before_a_loss_is_heard(story: Story) -> None:
    """The target is copied from one that lost it, and is current when that is heard."""
    await ejected(story, 0)
    async with story.mounted() as guest:
        replica = guest.replica(0)
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        await guest.write(5 * CHUNK)
        assert guest.mounted.sidecars.ledger.map.any(
            out_of_sync(0), guest.mounted.sidecars.ledger.map.chunks(5 * CHUNK, BLOCK)
        )
        story.fail_once(1, Kind.SYNC)
        story.world.replicas[2].image_faults.plan(Kind.SYNC, Fault(14.0))
        guest.begin(guest.flush)
        await trio.sleep(0.001)
        story.evict(1)
        await guest.until(lambda: replica.standing is Standing.CURRENT, every_s=0.1)
        await trio.sleep(20)
        await guest.read(5 * CHUNK)
        await guest.converged()
        await guest.read_surely(5 * CHUNK)
    story.oracle.check_images(story.world.contents())


async def a_hole_of_a_minority(story: Story) -> None:
    """A resync makes a hole of what one source shows as one, against a majority."""
    await ejected(story, 3)
    async with story.mounted() as guest:
        # Where the target lacks it: it was written before
        for content in (story.world.replicas[0].image.cache, story.world.replicas[0].image.durable):
            content.punch(0, EXTENT)
        await guest.converged()
        story.world.note(f"{guest.mounted}")
        fourth = story.world.replicas[3].image
        good = story.world.replicas[1].image.cache.read(0, EXTENT)
        assert good == story.world.replicas[2].image.cache.read(0, EXTENT)
        if fourth.cache.read(0, EXTENT) != good:
            raise BrokenError("the target was given what only a minority held")


async def a_hole_of_one_that_lost_it(story: Story) -> None:
    """No vote is held about holes: the target is given one, and joins before that is heard."""
    async with story.mounted() as guest:
        story.fail(0, CHANGES)
        for at in EXTENTS[:6]:
            await guest.write(at, EXTENT)
        await guest._zeros(EXTENTS[6], EXTENT, discard=True)
        await guest.flush()
    story.mend(0)
    async with story.mounted() as guest:
        replica = guest.replica(0)
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        await guest.write(EXTENTS[6])
        story.fail_once(1, Kind.SYNC)
        story.world.replicas[2].image_faults.plan(Kind.SYNC, Fault(14.0))
        guest.begin(guest.flush)
        await trio.sleep(0.001)
        story.evict(1)
        await guest.until(lambda: replica.standing is Standing.CURRENT, every_s=0.1)
        await trio.sleep(20)
        await guest.read(EXTENTS[6])
        await guest.converged()
        await guest.read_surely(EXTENTS[6])


async def a_flush_amid_a_join(story: Story) -> None:
    """Of two syncs of the target the flush's is told of what an earlier flush did not cover."""
    await ejected(story, 0)
    async with story.mounted() as guest:
        sidecars = guest.mounted.sidecars
        await guest.write(EXTENTS[2])
        syncs: list[Operation] = []

        def wrong(operation: Operation) -> Fault | None:
            if operation.kind is Kind.SYNC and sidecars.ledger.joining:
                syncs.append(operation)
                return Fault(3.0) if len(syncs) == 1 else Fault(error=errno.EIO)
            return None

        story.world.replicas[0].image_faults.script = wrong
        # The last progress is being saved: all is copied and synced.
        story.world.replicas[1].sidecar_faults.weather = Weather(delay_s=(1.0, 1.0))
        await guest.until(
            lambda: (
                sidecars.writing
                and bool(sidecars.ledger.target and sidecars.ledger.target.complete)
            ),
            every_s=0.0005,
        )
        await guest.write(EXTENTS[2])
        await guest.flush()
        assert not sidecars.ledger.joining
        await guest.until(lambda: sidecars.ledger.joining, every_s=0.001)
        await trio.sleep(0.1)
        with suppress(OSError):
            await guest.flush()
        story.world.replicas[1].sidecar_faults.weather = Weather()
        story.world.note(f"syncs {len(syncs)}")
        story.mend(0)
        story.evict(0)
        await guest.converged()
        story.world.note(f"converged {guest.mounted}")
        await guest.read(EXTENTS[2])
    story.oracle.check_images(story.world.contents())


async def an_internal_error_amid_a_resync(story: Story) -> None:
    """It is logged, and does not keep the replica from being brought back the next time."""
    await ejected(story)
    async with story.mounted() as guest:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(Copying, "_take_over", _broken)
            await trio.sleep(1.0)
        assert len(story.errors.found) == 1
        story.errors.found.clear()
        await guest.converged()
    await story.ends_well()


async def _broken(*_: object) -> int:
    raise RuntimeError("on purpose")


async def a_target_that_cannot_be_written(story: Story) -> None:
    """It is there, and the status says what is wrong with it."""
    await ejected(story)
    story.fail(1, CHANGES)
    options = MountOptions("fifo", 1)
    seen = set()
    async with story.mounted() as guest:
        mounted = guest.mounted
        for _ in range(3000):
            await trio.sleep(0.01)
            one = snapshot.take("/mnt", options, mounted.disk, mounted.repairs, ()).replicas[1]
            seen.add((one.state, one.reason))
        story.mend(1)
        await guest.converged()
    await story.ends_well()
    assert {state for state, _ in seen} == {"stale", "resyncing"}
    assert ("stale", "simulated") in seen


async def the_last_one_is_gone_and_back_after_a_resync_failed(story: Story) -> None:
    """Its record is later than the last one that all held."""
    await ejected(story)
    async with story.mounted() as guest:
        broken = Weather(sync_fail=1.0)
        story.world.replicas[1].sidecar_faults.plan(Kind.SYNC, Fault())
        story.world.replicas[1].sidecar_faults.weather = broken
        await guest.until(
            lambda: not guest.mounted.sidecars.ledger.membership.recorded, every_s=0.01
        )
        story.world.detach(0)
        with suppress(OSError):
            await guest.read(0)
        await trio.sleep(5.0)
        story.world.calm()
        await guest.converged()
    await story.ends_well()


async def both_fail_when_one_joins(story: Story) -> None:
    """The source is not ejected for one that has not joined yet: nobody might be left."""
    await ejected(story)
    async with story.mounted() as guest:
        sidecars, failed = guest.mounted.sidecars, set()

        def fails_once(index: int, phase: Phase) -> Callable[[Operation], Fault | None]:
            def script(operation: Operation) -> Fault | None:
                is_slot = operation.kind is Kind.WRITE and operation.offset in SLOT_OFFSETS
                wrong = is_slot and sidecars.ledger.joining and operation.data[12] == phase
                if not wrong or index in failed:
                    return None
                failed.add(index)
                return Fault(error=errno.ENOSPC)

            return script

        for index, phase in enumerate((Phase.PREPARED, Phase.COMMITTED)):
            story.world.replicas[index].sidecar_faults.script = fails_once(index, phase)
        await guest.converged()
        await guest.write_surely(0)
    await story.ends_well()


async def resync_fails_in_a_commit_that_ejects_another(story: Story) -> None:
    """What was prepared on the target is not forgotten: it is no other history."""
    await ejected(story, 2)
    story.slow_down(2, 1.0)
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.sidecars.ledger.target is not None)
        torn = Fault(error=errno.EIO, effect=Effect.ALL)
        story.world.replicas[0].sidecar_faults.plan(Kind.WRITE, torn)
        story.world.replicas[2].sidecar_faults.plan(Kind.SYNC, Fault(), Fault(), torn)
        with suppress(OSError):
            await guest.mounted.sidecars.joining.save_progress()
        story.world.detach(2)
        await guest.write(0)
    story.world.attach(2)
    await story.ends_well()


async def several_are_back_at_once(story: Story) -> None:
    """The one that lacks the least is the next copy, whatever the order given."""
    for away, written in ((0, EXTENTS), (1, EXTENTS[:1])):
        async with story.mounted() as guest:
            story.world.detach(away)
            for at in written:
                await guest.write_surely(at)
    story.world.attach(0)
    story.world.attach(1)
    order: list[int] = []
    async with story.mounted() as guest:
        while len(order) < 2:
            order += [i for i in guest.mounted.members if i != 2 and i not in order]
            await trio.sleep(0.01)
    if order != [1, 0]:
        raise BrokenError(f"they became current in the order {order}")
    await story.ends_well()


async def searched_for_holes_beside_a_guest(story: Story) -> None:
    """A file system may take long to find the next hole, and let no guest write meanwhile."""
    async with story.mounted() as guest:
        story.world.detach(1)
        for at in range(0, DISK, CHUNK):
            await guest.write_surely(at, CHUNK)
        searches = 0

        def count(operation: Operation) -> None:
            nonlocal searches
            searches += operation.kind is Kind.SEEK_HOLE

        story.world.replicas[0].image_faults.script = count
        story.slow_down(1, 0.05)
        story.world.attach(1)
        units = 0
        while guest.mounted.members != [0, 1]:
            await guest.read_surely(EXTENTS[units % len(EXTENTS)])
            units += 1
            await trio.sleep(0.01)
        if searches > 8:  # a few, whatever the guest does
            raise BrokenError(f"{searches} searches for holes where there is none")
    await story.ends_well()


async def discarded_beside_a_resync(story: Story) -> None:
    """What became a hole since the search is one on the target, too."""
    async with story.mounted() as guest:
        story.world.detach(1)
        for at in range(0, DISK, CHUNK):
            await guest.write_surely(at, CHUNK)
        story.slow_down(1, 0.2)
        story.world.attach(1)
        await guest.until(lambda: bool(guest.replica(1).counters.copied_bytes), every_s=0.05)
        await guest.surely(guest._zeros(DISK // 2, DISK // 2, discard=True))
        await guest.converged()
        source, target = (one.image.cache.allocated for one in story.world.replicas)
        if target > source:
            raise BrokenError(f"{target} bytes of space, {source} on the source")
    await story.ends_well()


STORIES = [
    (several_are_back_at_once, replace(TRIO, threshold=1)),
    (discarded_beside_a_resync, PAIR),
    (searched_for_holes_beside_a_guest, PAIR),
    (copied_from_one_that_had_lost_it, replace(TRIO, threshold=1, fifo=True)),
    (joins_amid_settling, TRIO),
    (joins_before_a_loss_is_heard, replace(TRIO, threshold=1, fifo=True)),
    (a_hole_of_a_minority, QUAD),
    (a_hole_of_one_that_lost_it, TRIO),
    (a_flush_amid_a_join, PAIR),
    (a_flush_amid_a_join, replace(TRIO, fifo=True)),
    (the_last_one_is_gone_and_back_after_a_resync_failed, PAIR),
    (both_fail_when_one_joins, PAIR),
    (
        resync_fails_in_a_commit_that_ejects_another,
        replace(TRIO, threshold=1),
    ),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4


def test_an_internal_error_costs_one_try() -> None:
    assert told(an_internal_error_amid_a_resync, PAIR, 0) is None


def test_a_replica_that_fails_again_is_there() -> None:
    assert told(a_target_that_cannot_be_written, PAIR, 0) is None
