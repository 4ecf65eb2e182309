"""Stories of pages that the kernel could not write back: they are lost before any sync says so, and
until one does nobody may build on them."""

import errno
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault
from support.simulation.story import (
    BLOCK,
    CHUNK,
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    TRIO,
    Guest,
    Script,
    Story,
    ejected,
    told,
)

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.model import Standing
from quorumfs.decisions.sidecar import SLOT_OFFSETS
from quorumfs.replica.storage import CHANGES, Kind, Operation


async def joins_while_its_failed_sync_waits(story: Story) -> None:
    """Of two syncs of the target the flush's is told; it is current, and read, before all heard."""
    await ejected(story, 0)
    async with story.mounted() as guest:
        sidecars, replica = guest.mounted.sidecars, guest.replica(0)
        syncs: list[Operation] = []

        def wrong(operation: Operation) -> Fault | None:
            if operation.kind is Kind.SYNC and sidecars.ledger.joining:
                syncs.append(operation)
                if len(syncs) == 1:
                    return Fault(3.0)
                return Fault(error=errno.EIO) if len(syncs) == 2 else None
            return None

        story.world.replicas[0].image_faults.script = wrong
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(2.0))  # the resync's last
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(25.0))
        await guest.until(lambda: guest.mounted.disk.mirror.flushing, every_s=0.001)
        await guest.write(EXTENTS[2])
        await guest.until(lambda: sidecars.ledger.joining, every_s=0.001)
        await trio.sleep(0.1)
        guest.begin(guest.flush)
        await guest.until(lambda: len(syncs) == 2, every_s=0.01)
        story.evict(0)
        await guest.until(lambda: replica.standing is Standing.CURRENT, every_s=0.01)
        await guest.read_surely(EXTENTS[2])


async def killed_while_a_failed_sync_waits(story: Story) -> None:
    """One has failed at once, the other takes its time, and nothing is on record until then."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(25.0))
        guest.begin(guest.flush)
        await trio.sleep(20.0)
        story.evict(0)
        await guest.read_surely(0)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.read_surely(0)
    await story.ends_well()


async def read_amid_a_flush_that_fails(story: Story) -> None:
    """One of two has it, and it could be settled; the guest gets EIO."""
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (0, 1):
            story.world.replicas[index].image_faults.plan(Kind.READ, Fault(4.0))
        failed: list[BaseException] = []

        async def read() -> None:
            try:
                await guest.read_surely(0)
            except BrokenError as error:
                failed.append(error)

        guest.life.nursery.start_soon(read)
        await trio.sleep(1.0)
        story.fail_once(0, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(20.0)
        if failed:
            raise failed[0]
    await story.ends_well()


async def read_while_a_failed_sync_waits(story: Story) -> None:
    """The same while the other one's sync is slow."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(20.0))
        guest.begin(guest.flush)
        await trio.sleep(1.0)
        await guest.read_surely(0)
    await story.ends_well()


async def resynced_from_a_lost_page_in_two_tries(story: Story) -> None:
    """It is copied from one whose page is lost already, and fails once before the next sync tells
    of that: nobody remembers then whom it was copied from."""
    await ejected(story, 0)
    async with story.mounted() as guest:
        await _copied_what_is_lost(story, guest)
        story.fail_once(0, Kind.WRITE)
        await guest.write(EXTENTS[2])
        await guest.until(lambda: guest.mounted.sidecars.ledger.target is None, every_s=0.01)
        guest.mounted.repairs.limit = None
        await guest.until(lambda: 0 in guest.mounted.members, every_s=0.1)
        await guest.read_surely(5 * CHUNK)
        await guest.converged()
    story.oracle.check_images(story.world.contents())


async def resynced_from_a_lost_page_in_two_mounts(story: Story) -> None:
    """The same, where the flush of an unmount tells."""
    await ejected(story, 0)
    async with story.mounted() as guest:
        await _copied_what_is_lost(story, guest)
    async with story.mounted() as guest:
        await guest.converged()
        await guest.read_surely(5 * CHUNK)
    story.oracle.check_images(story.world.contents())


async def _copied_what_is_lost(story: Story, guest: Guest) -> None:
    replica, sidecars = guest.mounted.replica(0), guest.mounted.sidecars
    assert replica is not None
    guest.mounted.repairs.limit = 16 << 10
    await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
    chunks = sidecars.ledger.map.chunks(5 * CHUNK, BLOCK)
    assert sidecars.ledger.map.any(out_of_sync(0), chunks)
    await guest.write(5 * CHUNK)
    assert sidecars.ledger.map.any(out_of_sync(0), chunks)
    story.fail_writeback(1)
    await guest.until(lambda: not sidecars.ledger.map.any(out_of_sync(0), chunks), every_s=0.1)
    assert replica.standing is Standing.RESYNCING


async def lost_by_all_but_the_target(story: Story) -> None:
    """A hole is left on all that are current, and settled: not on the one being resynced."""
    async with story.mounted() as guest:
        story.fail(2, CHANGES)
        for at in EXTENTS[:6]:
            await guest.write(at, EXTENT)
        await guest.flush()
    story.mend(2)
    async with story.mounted() as guest:
        replica = guest.replica(2)
        guest.mounted.repairs.limit = 64 << 10
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        await guest.write(EXTENTS[7])
        for index in (0, 1):
            story.fail_once(index, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        for index in (0, 1):
            story.evict(index)
        await guest.until(lambda: 2 in guest.mounted.members)
        await guest.converged()
    held = {one.image.cache.read(EXTENTS[7], EXTENTS[7] + BLOCK) for one in story.world.replicas}
    if len(held) > 1:
        raise BrokenError("the replicas differ, and are taken for the same (P3)")


async def settled_with_a_page_lost_before_anybody_synced(story: Story) -> None:
    """The others hold an acknowledged write; a write beside it fails, and all get what the first
    one has: it lost that page, and nobody asked it to sync before (R4)."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_writeback(0)
        if story.setup.replicas > 2:
            await guest.read_surely(0)
        for index in range(1, story.setup.replicas):
            story.fail_once(index, Kind.WRITE)
        with suppress(OSError):
            await guest.write(BLOCK)
        await trio.sleep(20.0)
        await guest.read_surely(0)
    await story.ends_well()


async def joins_without_a_last_flush(story: Story) -> None:
    """One has lost what it cannot be given, so no flush begins; what else it lost nobody asks, and
    the target joins with what it was copied from there."""
    await ejected(story, 2)
    async with story.mounted() as guest:
        replica, sidecars = guest.mounted.replica(2), guest.mounted.sidecars
        assert replica is not None
        guest.mounted.repairs.limit = 16 << 10
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        await guest.write(0)
        story.fail_once(0, Kind.SYNC)
        faults = story.world.replicas[0].image_faults
        faults.script = lambda o: (
            Fault(error=errno.EIO) if o.kind in CHANGES and o.offset < EXTENT else None
        )
        with suppress(OSError):
            await guest.flush()
        assert sidecars.ledger.content.lossy
        at = EXTENTS[-1]
        await guest.write(at)
        assert sidecars.ledger.map.any(out_of_sync(2), sidecars.ledger.map.chunks(at, BLOCK))
        story.fail_writeback(0)
        guest.mounted.repairs.limit = None
        await guest.until(lambda: 2 in guest.mounted.members, every_s=0.1)
        story.mend(0)
        await trio.sleep(100.0)
        story.world.note(f"{guest.mounted}")
        await guest.converged()
        await guest.flush()
        await guest.read_surely(at)
    story.oracle.check_images(story.world.contents())


async def killed_with_a_page_lost_before_anybody_synced(story: Story) -> None:
    """The pinned source has lost an acknowledged write, and the next sync of it would tell; it is
    copied over the one that holds it (P1)."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        story.fail_writeback(0)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.converged()
        await guest.read_surely(0)
    await story.ends_well()


async def written_after_hearing_then_flushed(story: Story) -> None:
    """After a crash; settling has begun, all have synced. A guest writes where it is not settled
    yet, the source loses that page, and a flush settles before it hears of that: it succeeds."""
    last = EXTENTS[-1]
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted() as guest:
        await guest.write(last)
        story.world.kill()
    async with story.mounted() as guest:
        guest.mounted.repairs.limit = 16 << 10
        agreement = guest.mounted.sidecars.ledger.agreement
        sidecars, repairs = guest.mounted.sidecars, guest.mounted.repairs
        await guest.until(
            lambda: (
                sidecars.ledger.chunks.writeback_errors_surfaced and repairs.progress is not None
            )
        )
        await trio.sleep(1.0)
        await guest.write_surely(last)
        chunks = guest.mounted.sidecars.ledger.map.chunks(last, BLOCK)
        assert agreement.divergent.overlaps(chunks.start, chunks.stop)
        story.fail_writeback(0)
        with suppress(OSError):
            await guest.flush()
        await guest.read_surely(last)
        guest.mounted.repairs.limit = None
        await guest.converged()
        await guest.read_surely(last)
    await story.ends_well()


async def written_after_hearing_then_settled(story: Story) -> None:
    """The same; settling comes there in its own time, and the flush after it."""
    last = EXTENTS[-1]
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted() as guest:
        await guest.write(last)
        story.world.kill()
    async with story.mounted() as guest:
        guest.mounted.repairs.limit = 16 << 10
        agreement = guest.mounted.sidecars.ledger.agreement
        sidecars, repairs = guest.mounted.sidecars, guest.mounted.repairs
        await guest.until(
            lambda: (
                sidecars.ledger.chunks.writeback_errors_surfaced and repairs.progress is not None
            )
        )
        await trio.sleep(1.0)
        await guest.write_surely(last)
        chunks = guest.mounted.sidecars.ledger.map.chunks(last, BLOCK)
        assert agreement.divergent.overlaps(chunks.start, chunks.stop)
        story.fail_writeback(0)
        guest.mounted.repairs.limit = None
        await guest.until(lambda: not agreement.divergent, every_s=0.1)
        with suppress(OSError):
            await guest.flush()
        await guest.converged()
        await guest.read_surely(last)
    await story.ends_well()


async def repaired_with_a_page_lost_before_anybody_synced(story: Story) -> None:
    """The first cannot be read once, the other one lost the page and shows an older one; that is
    written over the only good copy, and the flush that tells of it succeeds."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        story.fail_writeback(1)
        story.world.replicas[0].image_faults.plan(
            Kind.READ, Fault(error=errno.EIO), Fault(error=errno.EIO)
        )
        with suppress(OSError):
            await guest.mounted.disk.read(0, BLOCK)  # may be the older one until a flush tells
        await guest.flush()
        assert guest.mounted.members == [0]
        await guest.read_surely(0)
    await story.ends_well()


async def read_of_two_parts_amid_a_flush_that_fails(story: Story) -> None:
    """Where the second part was lost while the first one was read, too few are left for a vote on
    it; it is not looked at anew, and the guest gets EIO though it could be settled."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(6.0))
        guest.begin(guest.flush)
        await trio.sleep(1.0)
        await guest.write_surely(CHUNK)
        story.world.replicas[1].image_faults.plan(Kind.READ, Fault(7.0))
        await guest.read_surely(0, 2 * CHUNK)
    await story.ends_well()


async def outvoted_by_two_that_lost_it(story: Story) -> None:
    """Two of three show an older page, and nobody was asked to sync: they overwrite the third."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        story.fail_writeback(0)
        story.fail_writeback(1)
        with suppress(OSError):
            await guest.mounted.disk.read(0, BLOCK)
        await trio.sleep(5.0)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(60.0)
        await guest.read_surely(0)
    await story.ends_well()


async def the_only_one_left_lost_a_page(story: Story) -> None:
    """One has failed its sync, the other is awaited; a write that fails on that one leaves it
    behind, and the only good copy with it: the guest saw it, and sees an older one then."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.SYNC)
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(20.0))
        guest.begin(guest.flush)
        await trio.sleep(1.0)
        story.evict(0)
        await guest.read_surely(0)
        story.fail_once(1, Kind.WRITE)
        with suppress(OSError):
            await guest.write(EXTENTS[2])
        with suppress(OSError):
            await guest.read(0)
        await trio.sleep(60.0)
        with suppress(OSError):
            await guest.read(0)
    await story.ends_well()


async def the_only_one_left_lost_a_page_and_a_sidecar_fails(story: Story) -> None:
    """The same by the very record of that loss, which cannot be written on the other one."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.SYNC)
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(20.0))
        story.world.replicas[1].sidecar_faults.plan(Kind.WRITE, Fault(error=errno.EIO))
        guest.begin(guest.flush)
        await trio.sleep(1.0)
        story.evict(0)
        with suppress(OSError):
            await guest.read(0)
        await trio.sleep(60.0)
        with suppress(OSError):
            await guest.read(0)
    await story.ends_well()


async def the_only_one_that_lost_nothing_is_ejected(story: Story) -> None:
    """Two of three failed the flush, which failed; a write fails on the third before settling."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        for index in (0, 1):
            story.fail_once(index, Kind.SYNC)
        story.world.replicas[2].image_faults.plan(Kind.READ, Fault(5.0))
        with suppress(OSError):
            await guest.flush()
        for index in (0, 1):
            story.evict(index)
        story.fail_once(2, Kind.WRITE)
        with suppress(OSError):
            await guest.write(EXTENTS[2])
        await trio.sleep(60.0)
        with suppress(OSError):
            await guest.read(0)
    await story.ends_well()


async def killed_with_a_page_lost_and_too_few_without_it(story: Story) -> None:
    """As `killed_with_a_page_lost_before_anybody_synced`; but it cannot be ejected, and what
    it lost was written in the life before, which is not taken for lost: it is the source."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        story.fail_writeback(0)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.converged()
        await guest.read_surely(0)
    await story.ends_well()


async def each_loses_another_page(story: Story) -> None:
    """Two fail a flush, and the third the sync that is to tell what was lost: it alone has the
    first page, though it lost another one, and then fails a write."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        for index in (0, 1):
            story.fail_once(index, Kind.SYNC)
        last = story.world.replicas[2].image_faults
        last.plan(Kind.SYNC, Fault(3.0), Fault(1.0, error=errno.EIO))
        last.plan(Kind.READ, Fault(7.0), Fault(7.0))
        guest.begin(guest.flush)
        await trio.sleep(1.0)
        await guest.write(EXTENTS[1])
        await trio.sleep(5.0)
        for index in (0, 1):
            story.evict(index)
        story.fail_once(2, Kind.WRITE)
        with suppress(OSError):
            await guest.write(EXTENTS[2])
        await trio.sleep(60.0)
        with suppress(OSError):
            await guest.read(0)
    await story.ends_well()


async def lost_amid_a_sync_beside_one_that_fails_a_write(story: Story) -> None:
    """A write failed on both; of the sync that is to tell what was lost one fails, and while the
    other one's is slow a write fails there: it alone has what was written meanwhile."""
    async with story.mounted() as guest:
        story.world.replicas[0].image_faults.plan(Kind.SYNC, Fault(2.0, error=errno.EIO))
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(20.0))
        for index in (0, 1):
            story.fail_once(index, Kind.WRITE)
        with suppress(OSError):
            await guest.write(0)
        await trio.sleep(1.0)
        assert not guest.mounted.sidecars.ledger.chunks.writeback_errors_surfaced
        await guest.write_surely(EXTENTS[3])
        await trio.sleep(0.5)
        story.drop_unsynced(0)  # the sync under way will tell
        await trio.sleep(2.5)
        assert guest.mounted.sidecars.ledger.content.pending
        story.fail_once(1, Kind.WRITE)
        with suppress(OSError):
            await guest.write(EXTENTS[2])
        await trio.sleep(60.0)
        await guest.read_surely(EXTENTS[3])
    await story.ends_well()


async def joins_before_anybody_synced(story: Story) -> None:
    """The kernel could not write a page back and dropped it; the next sync will tell."""
    await ejected(story, 0)
    async with story.mounted() as guest:
        replica = guest.replica(0)
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        await guest.write(5 * CHUNK)
        story.fail_writeback(1)
        await guest.until(lambda: replica.standing is Standing.CURRENT, every_s=0.1)
        await guest.flush()
        await guest.read_surely(5 * CHUNK)
        await guest.converged()
        await guest.read_surely(5 * CHUNK)
    story.oracle.check_images(story.world.contents())


async def a_record_lost_by_the_kernel_is_written_again(story: Story) -> None:
    """A sync of a sidecar fails, and the page that is gone is still to be read. The next record
    must not be prepared beside it: cut off there, the sidecar would say that all had prepared."""
    first, second = story.world.replicas[:2]
    well, torn = Fault(), Fault(error=errno.EIO, effect=Effect.PART)
    async with story.mounted() as guest:
        second.sidecar_faults.plan(Kind.SYNC, well, well, torn)  # as found, prepared, committed
        await guest.write_surely(EXTENTS[0])
        prepared: list[Operation] = []

        def hang_once_prepared(operation: Operation) -> Fault | None:
            return Fault(hang=True) if prepared and operation.kind is Kind.SYNC else None

        def note(operation: Operation) -> Fault | None:
            if operation.kind is Kind.WRITE and operation.offset == SLOT_OFFSETS[1]:
                prepared.append(operation)
            return None

        first.sidecar_faults.script, second.sidecar_faults.script = hang_once_prepared, note
        await guest.until(lambda: bool(prepared), every_s=0.01)
        await trio.sleep(1.0)
        story.world.power_cut()
    first.sidecar_faults.script = second.sidecar_faults.script = None
    async with story.mounted([0]) as guest:
        await guest.write_surely(EXTENTS[1])
    await story.ends_well()


ONE_OF_THREE = replace(TRIO, threshold=1, fifo=True)
STORIES = [
    (joins_before_anybody_synced, replace(TRIO, threshold=1, fifo=True)),
    (each_loses_another_page, TRIO),
    (lost_amid_a_sync_beside_one_that_fails_a_write, PAIR),
    (joins_while_its_failed_sync_waits, PAIR),
    (killed_while_a_failed_sync_waits, PAIR),
    (read_amid_a_flush_that_fails, EQUALS),
    (read_while_a_failed_sync_waits, EQUALS),
    (resynced_from_a_lost_page_in_two_tries, ONE_OF_THREE),
    (resynced_from_a_lost_page_in_two_mounts, ONE_OF_THREE),
    (lost_by_all_but_the_target, TRIO),
    (settled_with_a_page_lost_before_anybody_synced, EQUALS),
    (settled_with_a_page_lost_before_anybody_synced, TRIO),
    (joins_without_a_last_flush, replace(TRIO, fifo=True)),
    (killed_with_a_page_lost_before_anybody_synced, PAIR),
    (written_after_hearing_then_flushed, PAIR),
    (written_after_hearing_then_flushed, EQUALS),
    (written_after_hearing_then_flushed, TRIO),
    (written_after_hearing_then_settled, PAIR),
    (written_after_hearing_then_settled, TRIO),
    (repaired_with_a_page_lost_before_anybody_synced, PAIR),
    (read_of_two_parts_amid_a_flush_that_fails, EQUALS),
    (read_of_two_parts_amid_a_flush_that_fails, replace(EQUALS, replicas=3, threshold=3)),
    (outvoted_by_two_that_lost_it, replace(TRIO, rewrite_corrupted=True)),
    (the_only_one_left_lost_a_page, PAIR),
    (the_only_one_left_lost_a_page_and_a_sidecar_fails, PAIR),
    (the_only_one_that_lost_nothing_is_ejected, TRIO),
    (outvoted_by_two_that_lost_it, TRIO),
    (killed_with_a_page_lost_and_too_few_without_it, EQUALS),
    (killed_with_a_page_lost_and_too_few_without_it, TRIO),
    (a_record_lost_by_the_kernel_is_written_again, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
