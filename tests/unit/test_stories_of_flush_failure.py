"""Stories of flushes that fail: what a replica lost with one is shown by no read, copied by no
resync or repair, and promised by no later flush."""

import errno
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest
import trio
import trio.testing
from support import simulated
from support.simulation.oracle import BrokenError
from support.simulation.rule_stories import (
    a_flush_that_is_cut_off,
    away_and_lost,
    both_are_gone,
)
from support.simulation.setup import Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    BLOCK,
    DISK,
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    RAW,
    RAW_TRIO,
    TRIO,
    WRONG,
    Guest,
    Script,
    Story,
    ejected,
    told,
)

from quorumfs.control.status import DiskState
from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.patterns import Fifo
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sidecar import MAP_OFFSET
from quorumfs.mount import snapshot
from quorumfs.options.table import MountOptions
from quorumfs.repair.repairs import CLEAR_S
from quorumfs.replica.storage import CHANGES, Kind


async def read_while_it_is_lost(story: Story) -> None:
    """A slow read is answered by one whose flush failed, and who was ejected, meanwhile."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[0].image_faults.plan(Kind.READ, Fault(4.0))
        reading = story.oracle.begin_read(0, BLOCK)
        got: list[bytes] = []

        async def read() -> None:
            got.append(bytes(await guest.mounted.disk.read(0, BLOCK)))

        guest.life.nursery.start_soon(read)
        await trio.sleep(1.0)
        story.fail_once(0, Kind.SYNC)
        await guest.flush()
        assert 0 not in guest.mounted.members
        story.evict(0)
        await guest.until(lambda: bool(got))
        story.oracle.read(reading, got[0])
        await guest.converged()
    await story.ends_well()


async def repaired_with_what_is_lost(story: Story) -> None:
    """The only one that has it durably cannot be read once; the other loses it meanwhile."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[0].image_faults.plan(
            Kind.READ, Fault(error=errno.EIO), Fault(error=errno.EIO)
        )
        story.world.replicas[1].image_faults.plan(Kind.READ, Fault(), Fault(4.0))
        guest.begin(guest.mounted.disk.read, 0, BLOCK)
        await trio.sleep(1.0)
        story.fail_once(1, Kind.SYNC)
        await guest.flush()
        assert guest.mounted.members == [0]
        story.evict(1)
        await trio.sleep(10.0)
        await guest.read_surely(0)
    await story.ends_well()


async def settled_with_what_is_lost(story: Story) -> None:
    """The source's flush fails between its answer and the writes; all get what it lost."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[0].image_faults.plan(Kind.READ, Fault(4.0))
        story.fail_once(1, Kind.WRITE)
        with suppress(OSError):
            await guest.write(BLOCK)
        await trio.sleep(1.0)
        story.fail_once(0, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        story.evict(0)
        await trio.sleep(20.0)
        await guest.read_surely(0)
    await story.ends_well()


async def compared_by_its_page_cache(story: Story) -> None:
    """It failed a flush; then its image gets longer (39), so that all of it is compared (R4)."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[0].image.truncate(DISK + BLOCK)
        story.fail_once(0, Kind.SYNC)
        await guest.flush()
        assert guest.mounted.members == [1]
        await guest.until(lambda: 0 in guest.mounted.members, every_s=0.1)
        story.evict(0)
        await guest.read_surely(0)


async def a_resync_beside_one_that_never_syncs(story: Story) -> None:
    """With the one that is being resynced the others would be enough, and the sick one could go."""
    await ejected(story, 2)
    async with story.mounted() as guest:
        story.fail(0, {Kind.SYNC})
        for _ in range(3):
            with suppress(OSError):
                await guest.write(0)
            with suppress(OSError):
                await guest.flush()
        await guest.until(lambda: 2 in guest.mounted.members)
        await guest.until(lambda: 0 not in guest.mounted.members)
        try:
            await guest.flush()
        except OSError as error:
            raise BrokenError(f"two of three are sound: {error}") from error
        story.mend(0)
    await story.ends_well()


async def healthy_after_one_failed_flush(story: Story) -> None:
    """P8: what it lost was given it again, and it syncs: all is well, though the guest is idle."""
    options = MountOptions("quorum", story.setup.threshold)
    async with story.mounted() as guest:
        mounted = guest.mounted

        def state() -> DiskState:
            return snapshot.take("/mnt", options, mounted.disk, mounted.repairs, ()).state

        await guest.write(0)
        story.fail_once(1, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        if state() is not DiskState.NO_QUORUM:
            raise BrokenError(f"of two that are needed one failed a flush: {state()}")
        await guest.until(lambda: state() is DiskState.HEALTHY)
    await story.ends_well()


async def _all_lose_what_was_written(story: Story, guest: Guest, at: int = 0) -> None:
    await guest.write_surely(at)
    for index in range(story.setup.replicas):
        story.world.lose_pages(index)
    story.oracle.lost(story.world.contents())


async def _one_flush_fails(guest: Guest) -> None:
    try:
        await guest.flush()
    except OSError:
        pass
    else:
        raise BrokenError("a flush succeeded over a write that all had lost")
    try:
        await guest.flush()
    except OSError as error:
        raise BrokenError(f"a loss was told twice: {error}") from error


async def lost_by_all_and_heard_by_a_repair(story: Story) -> None:
    """Whoever had them sync, the guest's next flush fails, and only that (R13)."""
    async with story.mounted() as guest:
        for at in (0, EXTENT):
            await _all_lose_what_was_written(story, guest, at)
            with suppress(OSError):
                await guest.mounted.disk.mirror.sync()
            await trio.sleep(5.0)
            await _one_flush_fails(guest)
            await guest.read_surely(at)
    await story.ends_well()


async def lost_by_all_and_heard_by_settling(story: Story) -> None:
    """A write fails on one of them, and to make them equal they are had to sync (R13)."""
    async with story.mounted() as guest:
        await _all_lose_what_was_written(story, guest)
        story.fail_once(1, Kind.WRITE)
        with suppress(OSError):
            await guest.write(EXTENT)
        await trio.sleep(5.0)
        await _one_flush_fails(guest)
    await story.ends_well()


async def lost_by_all_and_heard_when_marks_are_cleared(story: Story) -> None:
    """Nobody flushes for long, but to clear marks they are had to sync (R13)."""
    async with story.mounted() as guest:
        await _all_lose_what_was_written(story, guest)
        await trio.sleep(3 * CLEAR_S)
        await _one_flush_fails(guest)
    await story.ends_well()


async def lost_by_all_and_never_flushed(story: Story) -> None:
    """The unmount is the last that can tell (R13)."""
    async with story.mounted() as guest:
        await _all_lose_what_was_written(story, guest)
        with suppress(OSError):
            await guest.mounted.disk.mirror.sync()
    if story.state.closed_well:
        raise BrokenError("an unmount succeeded over a write that all had lost")
    await story.ends_well()


async def lost_by_the_only_one_amid_a_resync(story: Story) -> None:
    """The other one gets every write, and holds none for sure before it has all (R13)."""
    await ejected(story)
    story.slow_down(1, 0.2)
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.sidecars.ledger.target is not None, every_s=0.05)
        for at in (EXTENTS[0], EXTENTS[-1]):
            await _all_lose_what_was_written(story, guest, at)
            await trio.sleep(0.2)
            await _one_flush_fails(guest)
        story.world.calm()
    await story.ends_well()


async def lost_by_one_and_held_by_another(story: Story) -> None:
    """No flush fails that another replica can save, whoever hears of the loss."""
    async with story.mounted() as guest:
        await guest.write_surely(0)
        story.world.lose_pages(0)
        await guest.mounted.disk.mirror.sync()
        try:
            await guest.flush()
        except OSError as error:
            raise BrokenError(f"a flush failed for what one of two holds: {error}") from error
        await guest.read_surely(0)
    await story.ends_well()


async def a_flush_behind_one_that_failed(story: Story) -> None:
    """Its sync began before what the first one lost was written again, and counts for it."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.SYNC, Fault(1.0, errno.EIO))
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(1.0), Fault(10.0))
        guest.begin(guest.flush)
        await trio.sleep(0.5)
        with suppress(OSError):  # it may well fail; yet it succeeds
            await guest.flush()
        story.world.power_cut()
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def gone_no_longer_than_until_a_good_sync(story: Story) -> None:
    """Something answered before the files were opened anew. A later outage has to be counted."""
    async with story.mounted() as guest:
        await guest.write(0)
        gone = guest.mounted.sidecars.ledger.content.gone
        gone.add(guest.replica(0))
        await guest.flush()
        assert not gone
    await story.ends_well()


async def behind_a_flush_that_is_cut_off(story: Story) -> None:
    """Whoever waits for its outcome has a flush of its own, which succeeds."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[0].image_faults.plan(Kind.SYNC, Fault(4.0), Fault(4.0))
        mirror = guest.mounted.disk.mirror
        with trio.move_on_after(6.0):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mirror.sync)
                await trio.sleep(1.0)
                nursery.start_soon(mirror.sync)
                await trio.sleep(1.0)
                guest.begin(guest.surely, guest.flush())
                await trio.sleep_forever()
        await guest.converged()
    await story.ends_well()


async def _lose_amid_settling(story: Story, guest: Guest) -> None:
    """Who is being given what it could not take loses it before it has told that it has it."""
    await guest.write(0)
    story.fail_once(1, Kind.WRITE)
    story.world.replicas[1].image_faults.plan(Kind.WRITE, Fault(6.0))  # settling
    with suppress(OSError):
        await guest.write(BLOCK)
    await trio.sleep(2.0)
    story.fail_once(1, Kind.SYNC)
    with suppress(OSError):
        await guest.flush()
    assert guest.mounted.sidecars.ledger.content.lossy
    await guest.until(lambda: not guest.mounted.sidecars.ledger.content.lossy)


async def a_flush_fails_amid_settling(story: Story) -> None:
    """What settling wrote is lost with it, and the loss is forgotten when settling ends."""
    async with story.mounted() as guest:
        await _lose_amid_settling(story, guest)
        await trio.sleep(20.0)  # and that is on record
        await guest.flush()
        story.world.power_cut()
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def a_flush_fails_amid_settling_and_memory_is_short(story: Story) -> None:
    """The same without a crash."""
    async with story.mounted() as guest:
        await _lose_amid_settling(story, guest)
        await guest.flush()
        story.evict(1)
        await guest.read_surely(0)
    await story.ends_well()


async def lost_where_adopted_images_differ(story: Story) -> None:
    """One failed flush, and no flush succeeds any more."""
    async with story.differing(1, EXTENTS[5]).mounted() as guest:
        await guest.write(EXTENTS[5])
        story.fail_once(0, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(60.0)
        try:
            await guest.flush()
        except OSError as error:
            raise BrokenError(f"it fails for ever: {error}") from error


async def lost_amid_a_verification(story: Story) -> None:
    """What a majority repaired is lost before it counts as compared: nobody settles it."""
    story.world.replicas[0].image.rot(EXTENTS[5], WRONG)
    story.world.replicas[0].image_faults.plan(Kind.WRITE, Fault(5.0))
    async with story.mounted() as guest:
        await guest.until(
            lambda: (
                story.world.replicas[0].image_faults._planned.get(Kind.WRITE) is None
                or not story.world.replicas[0].image_faults._planned[Kind.WRITE]
            ),
            every_s=0.01,
        )
        for index in (0, 1):
            story.fail_once(index, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(60.0)
        assert not guest.mounted.sidecars.ledger.map.count(UNVERIFIED)
        try:
            await guest.flush()
        except OSError as error:
            raise BrokenError(f"it fails for ever: {error}") from error


async def lost_and_a_map_torn(story: Story) -> None:
    """An unreadable page says that all have lost everything; so nobody did."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        story.fail(0, CHANGES)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(5.0)
        assert guest.mounted.sidecars.ledger.content.lossy
        story.world.kill()
    story.mend(0)
    story.evict(0)
    sidecar = story.world.replicas[1].sidecar
    assert sidecar is not None
    sidecar.rot(MAP_OFFSET + 512, b"torn" * 128)
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def mounted_without_the_only_one_that_lost_nothing(story: Story) -> None:
    """Those who are here know that they lost it, and nobody who is here has it."""
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (0, 1):
            story.fail_once(index, Kind.SYNC)
            story.fail(index, CHANGES)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(1.0)
        story.world.kill()
    for index in (0, 1):
        story.mend(index)
        story.evict(index)
    with suppress(AssemblyRefusedError):
        async with story.mounted([0, 1]) as guest:
            with suppress(OSError):
                await guest.read(0)


async def lost_where_adopted_images_differ_and_killed(story: Story) -> None:
    """Another block of that chunk differs; the loss of an acknowledged write is forgotten."""
    async with story.differing(1, EXTENTS[5] + BLOCK).mounted() as guest:
        await guest.write(EXTENTS[5])
        story.fail_once(0, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(10.0)
        story.evict(0)
        await guest.read(EXTENTS[5])
        story.world.kill()
    async with story.mounted() as guest:
        await guest.read(EXTENTS[5])


async def settled_from_one_whose_loss_waits(story: Story) -> None:
    """Its flush has failed already, but the other one's is slow; meanwhile it is the source."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        for index in range(1, story.setup.replicas):
            story.world.replicas[index].image_faults.plan(Kind.SYNC, Fault(14.0))
        guest.begin(guest.flush)
        await trio.sleep(0.5)
        story.evict(0)
        for index in range(story.setup.replicas):
            story.fail_once(index, Kind.WRITE, Fault(error=errno.ENOSPC))
        with suppress(OSError):
            await guest.write(BLOCK)
        with suppress(OSError):
            await guest.read(0)
        await trio.sleep(30.0)
        with suppress(OSError):
            await guest.read(0)


async def gone_and_back_after_it_alone_had_synced(story: Story) -> None:
    """What it made durable in a flush that failed on the other is not lost with its cache."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail(0, CHANGES)
        story.fail_once(0, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        story.evict(0)
        story.world.detach(1)
        with suppress(OSError):
            await guest.write(EXTENTS[2])
        story.world.attach(1)
        await trio.sleep(10.0)
        story.mend(0)
        await guest.converged()
        await guest.read_surely(0)
    await story.ends_well()


async def compared_with_what_only_memory_shows(story: Story) -> None:
    """A resync in full skips what a cached read shows as equal, and no medium holds (R4)."""
    old = story.world.backup(0)
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        await guest.flush()
        assert 0 not in guest.mounted.members
        story.world.kill()
    story.world.restore(0, old, image=False)
    async with story.mounted() as guest:
        await guest.converged()
        await guest.flush()
        story.evict(0)
        await guest.read_surely(0)


STORIES = [
    *(
        (away_and_lost(away, known=known), setup)
        for away, known, setup in product(
            (0, 1), (False, True), (EQUALS, replace(EQUALS, fifo=True))
        )
    ),
    (compared_with_what_only_memory_shows, PAIR),
    (gone_and_back_after_it_alone_had_synced, EQUALS),
    (gone_and_back_after_it_alone_had_synced, replace(EQUALS, fifo=True)),
    (a_flush_behind_one_that_failed, EQUALS),
    *(
        (both_are_gone(first), setup)
        for first, setup in product((0, 1), (PAIR, EQUALS, replace(EQUALS, fifo=True)))
    ),
    (a_flush_that_is_cut_off, PAIR),
    (a_flush_that_is_cut_off, EQUALS),
    (a_flush_that_is_cut_off, TRIO),
    (behind_a_flush_that_is_cut_off, PAIR),
    (gone_no_longer_than_until_a_good_sync, EQUALS),
    (a_flush_fails_amid_settling, EQUALS),
    (a_flush_fails_amid_settling, replace(EQUALS, fifo=True)),
    (a_flush_fails_amid_settling_and_memory_is_short, EQUALS),
    (a_flush_fails_amid_settling_and_memory_is_short, replace(EQUALS, fifo=True)),
    (lost_where_adopted_images_differ, replace(RAW, threshold=2)),
    (lost_amid_a_verification, RAW_TRIO),
    (lost_and_a_map_torn, replace(EQUALS, fifo=True)),
    (mounted_without_the_only_one_that_lost_nothing, TRIO),
    (lost_where_adopted_images_differ_and_killed, replace(RAW, threshold=2)),
    (settled_from_one_whose_loss_waits, EQUALS),
    (settled_from_one_whose_loss_waits, TRIO),
    (lost_by_all_and_heard_by_a_repair, PAIR),
    (lost_by_all_and_heard_by_a_repair, EQUALS),
    (lost_by_all_and_heard_by_a_repair, TRIO),
    (lost_by_all_and_heard_by_settling, EQUALS),
    (lost_by_all_and_heard_when_marks_are_cleared, PAIR),
    (lost_by_all_and_never_flushed, PAIR),
    (lost_by_the_only_one_amid_a_resync, PAIR),
    (lost_by_one_and_held_by_another, PAIR),
    (healthy_after_one_failed_flush, EQUALS),
    (read_while_it_is_lost, replace(PAIR, fifo=True)),
    (read_while_it_is_lost, replace(TRIO, threshold=1, fifo=True)),
    (repaired_with_what_is_lost, PAIR),
    (settled_with_what_is_lost, EQUALS),
    (settled_with_what_is_lost, replace(EQUALS, fifo=True)),
    (compared_by_its_page_cache, PAIR),
    (a_resync_beside_one_that_never_syncs, TRIO),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4


def test_without_sidecars_read_while_it_is_lost() -> None:
    """``metadata=none``: the flush succeeded on the other, and this one's answer counts still."""

    async def story() -> None:
        async with trio.open_nursery() as nursery:
            bench = simulated.make_bench(nursery, 2, pattern=Fifo(), threshold=1)
            first, _ = bench.files
            await bench.disk.write(0, bytes([1]) * BLOCK)
            first.choose = simulated.takes(4.0, Kind.READ)
            got: list[bytes] = []

            async def read() -> None:
                got.append(bytes(await bench.disk.read(0, BLOCK)))

            nursery.start_soon(read)
            await trio.sleep(1.0)
            first.choose = simulated.fails(errno.EIO, Kind.SYNC)
            await bench.disk.flush()
            first.content[:BLOCK] = bytes(BLOCK)  # memory is short
            first.choose = simulated.takes(0.0)
            await trio.sleep(10.0)
            nursery.cancel_scope.cancel()
            assert got == [bytes([1]) * BLOCK]

    trio.run(story, clock=trio.testing.MockClock(autojump_threshold=0))
