"""Stories of places that no replica can be read at: each costs an error there, and only there."""

import errno
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.simulation.media import SECTOR
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault
from support.simulation.story import (
    BLOCK,
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

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED
from quorumfs.decisions.sidecar import MAP_OFFSET, UNREADABLE_OFFSET
from quorumfs.repair.badplaces import cannot_be_read
from quorumfs.replica.storage import CHANGES, Kind, Operation

BAD = 3 * BLOCK


def spoil(story: Story, indices: Sequence[int], start: int = BAD, size: int = BLOCK) -> None:
    """The sectors at *start* cannot be read on these replicas until they are written."""
    for index in indices:
        bad = set(range(start // SECTOR, (start + size) // SECTOR))

        def script(operation: Operation, bad: set[int] = bad) -> Fault | None:
            first, end = operation.offset, operation.offset + operation.length
            touched = bad & set(range(first // SECTOR, -(-end // SECTOR)))
            if operation.kind in CHANGES:
                bad.difference_update(touched)
            return Fault(error=errno.EIO) if touched and operation.kind is Kind.READ else None

        story.world.replicas[index].image_faults.script = script


def fail_the_list(story: Story, fault: Fault) -> None:
    """No sidecar can be given a list of unreadable places."""
    for one in story.world.replicas:
        one.sidecar_faults.script = lambda operation: (
            fault if UNREADABLE_OFFSET <= operation.offset < MAP_OFFSET else None
        )


async def _unreadable(guest: Guest, at: int = BAD, size: int = BLOCK) -> None:
    with suppress(OSError):
        await guest.read(at, size)
        raise BrokenError("what nobody can be read at was shown")


async def _flushed(guest: Guest) -> None:
    try:
        await guest.flush()
    except OSError as error:
        raise BrokenError(f"a flush failed for what cannot be read: {error}") from error


async def _all_but_the_bad_block(guest: Guest) -> None:
    await guest.read_surely(0, BAD)
    await guest.read_surely(BAD + BLOCK, EXTENT - BAD - BLOCK)
    await _unreadable(guest)


async def _crashed_after_writes(story: Story) -> None:
    async with story.holding(0, size=EXTENT).durable().mounted() as guest:
        await guest.write(8 * BLOCK)
        story.world.kill()


async def bad_everywhere_after_a_crash(story: Story) -> None:
    await _crashed_after_writes(story)
    spoil(story, range(story.setup.replicas))
    for _ in range(2):  # and it is no other in the next mount
        async with story.mounted() as guest:
            await _flushed(guest)
            await _all_but_the_bad_block(guest)
            await guest.write_surely(EXTENTS[1])
            await _flushed(guest)
            await guest.until(lambda: not guest.mounted.sidecars.ledger.agreement.divergent)
        if not story.state.closed_well:
            raise BrokenError("an unmount failed for what cannot be read")
    async with story.mounted() as guest:
        await guest.write_surely(BAD)
        await guest.read_surely(0, EXTENT)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.read_surely(0, EXTENT)
    await story.ends_well()


async def compared_around_a_bad_block(story: Story) -> None:
    """Where no replica can be read there is nothing to compare: the comparison ends."""
    await _crashed_after_writes(story)
    spoil(story, range(story.setup.replicas), BAD + SECTOR, SECTOR)
    async with story.mounted() as guest:
        await _unreadable(guest)
        ledger = guest.mounted.sidecars.ledger
        await guest.until(lambda: not ledger.map.any(INTENT, ledger.map.chunks(BAD, BLOCK)))
        await guest.write_surely(EXTENTS[4])
        story.world.kill()
    async with story.mounted() as guest:
        ledger = guest.mounted.sidecars.ledger
        assert ledger.map.count(UNVERIFIED)
        await guest.until(lambda: not ledger.map.count(UNVERIFIED))
        await _unreadable(guest)
    await story.ends_well()


async def a_bad_block_is_written_in_part(story: Story) -> None:
    """A medium with sectors of 512 bytes: what was written is there; the rest of the block is an
    error until it is written, too: who holds what of it is not known any more."""
    await _crashed_after_writes(story)
    spoil(story, range(story.setup.replicas), BAD + SECTOR, SECTOR)
    async with story.mounted() as guest:
        await _flushed(guest)
        await _unreadable(guest)
        await guest.write_surely(BAD + SECTOR, SECTOR)
        await guest.read_surely(BAD + SECTOR, SECTOR)
        await _unreadable(guest, BAD, SECTOR)
        await _unreadable(guest, BAD + 2 * SECTOR, SECTOR)
        await _flushed(guest)
    async with story.mounted() as guest:
        await guest.read_surely(BAD + SECTOR, SECTOR)
        await _unreadable(guest)
        await guest.write_surely(BAD)
        await guest.read_surely(0, EXTENT)
    await story.ends_well()


async def bad_while_another_was_away(story: Story) -> None:
    """It comes back, and must not be taken for one that holds what nobody could give it."""
    async with story.holding(0, size=EXTENT).durable().mounted() as guest:
        story.world.detach(1)
        await guest.write(0, EXTENT)
        await guest.until(lambda: 1 not in guest.mounted.members)
        story.world.kill()
    spoil(story, [0])
    async with story.mounted() as guest:
        await _flushed(guest)
        story.world.attach(1)
        await guest.until(lambda: 1 in guest.mounted.members)
        await _flushed(guest)
        await _all_but_the_bad_block(guest)
        story.world.detach(0)
        await guest.write_surely(EXTENTS[1])
        await guest.until(lambda: 0 not in guest.mounted.members)
        await _all_but_the_bad_block(guest)
    async with story.mounted() as guest:
        await _all_but_the_bad_block(guest)
        await guest.write_surely(BAD)
        await guest.read_surely(0, EXTENT)
    story.world.attach(0)
    await story.ends_well()


async def bad_on_one_that_a_rebuild_reads(story: Story) -> None:
    """Another one holds it, whether or not they are enough for a vote: all of it is copied."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        story.world.detach(1)
        await guest.write(0, EXTENT)
        await guest.until(lambda: 1 not in guest.mounted.members)
        spoil(story, [0])
        story.world.attach(1)
        await guest.until(lambda: 1 in guest.mounted.members)
        await guest.read_surely(0, EXTENT)
        await guest.write_surely(BAD, SECTOR)
        await guest.until(lambda: guest.mounted.even)
        await guest.write_surely(BAD)
    await story.ends_well()


async def rebuilt_beside_half_a_bad_block(story: Story) -> None:
    """Of a block that was written in part since, the part is copied."""
    await _crashed_after_writes(story)
    spoil(story, [0, 1])
    async with story.mounted() as guest:
        await _flushed(guest)
        await guest.write_surely(BAD, SECTOR)
        await guest.flush()
        story.world.detach(1)
        await guest.write(0, SECTOR)
        await guest.write(BAD, SECTOR)
        await guest.until(lambda: 1 not in guest.mounted.members)
        story.world.attach(1)
        await guest.until(lambda: 1 in guest.mounted.members)
        story.world.detach(0)
        await guest.write(EXTENTS[1])
        await guest.until(lambda: 0 not in guest.mounted.members)
        await guest.read_surely(BAD, SECTOR)
        await guest.write_surely(BAD)
    story.world.attach(0)
    await story.ends_well()


async def all_fail_for_a_while(story: Story) -> None:
    """No place is to blame where a replica fails everywhere: it may pass, and nothing is lost."""
    await _crashed_after_writes(story)
    for index in range(story.setup.replicas):
        story.fail(index, {Kind.READ})
    async with story.mounted() as guest:
        with suppress(OSError):
            await guest.flush()
        with suppress(OSError):
            await guest.read(0, EXTENT)
        await trio.sleep(5.0)
        for index in range(story.setup.replicas):
            story.mend(index)
        await guest.until(lambda: not guest.mounted.sidecars.ledger.agreement.divergent)
        await guest.read_surely(0, EXTENT)
        await _flushed(guest)
    await story.ends_well()


async def power_cut_after_a_bad_block_was_written(story: Story) -> None:
    """The first one holds an older version of the place, and can be read: it is never shown."""
    async with story.holding(0, size=EXTENT).durable().mounted() as guest:
        story.world.detach(0)
        await guest.write(0, EXTENT)
        await guest.flush()
        await guest.until(lambda: 0 not in guest.mounted.members)
        story.world.kill()
    spoil(story, [1])
    async with story.mounted() as guest:
        await _flushed(guest)
        story.world.attach(0)
        await guest.until(lambda: 0 in guest.mounted.members)
        await _all_but_the_bad_block(guest)
        await guest.write_surely(BAD)
        story.world.power_cut()
    async with story.mounted() as guest:
        await guest.read_surely(0, EXTENT)
    await story.ends_well()


async def a_bad_block_is_written_while_others_are_settled(story: Story) -> None:
    """What waits elsewhere to be made equal is no reason to fail the write."""
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted() as guest:
        await guest.write(8 * BLOCK)
        await guest.write(EXTENTS[4])
        story.world.kill()
    spoil(story, range(story.setup.replicas))
    async with story.mounted() as guest:
        guest.mounted.repairs.limit = 256
        await _unreadable(guest)
        ledger = guest.mounted.sidecars.ledger
        assert ledger.unreadable
        assert ledger.unflushable()
        await guest.write_surely(BAD)
        await guest.read_surely(0, EXTENT)
        guest.mounted.repairs.limit = None
    await story.ends_well()


async def a_bad_block_is_written_beside_a_flush_that_fails(story: Story) -> None:
    """That one may have lost the write: the older version of the first is not to be shown."""
    async with story.holding(0, size=EXTENT).durable().mounted() as guest:
        story.world.detach(0)
        await guest.write(0, EXTENT)
        await guest.flush()
        await guest.until(lambda: 0 not in guest.mounted.members)
        story.world.kill()
    spoil(story, [1])
    async with story.mounted() as guest:
        await _flushed(guest)
        story.world.attach(0)
        await guest.until(lambda: 0 in guest.mounted.members)
        await _all_but_the_bad_block(guest)
        await _flushed(guest)
        for index in range(story.setup.replicas):
            story.fail_once(index, Kind.SYNC, Fault(delay_s=1.0, error=errno.EIO))
        heard: list[bool] = []

        async def write() -> None:
            try:
                await guest.write(BAD)
            except OSError:
                heard.append(False)
            else:
                heard.append(True)

        guest.begin(guest.flush)
        await trio.sleep(0.5)
        guest.begin(write)
        await trio.sleep(0.3)
        for index in range(story.setup.replicas):
            story.drop_unsynced(index)
        await guest.until(lambda: bool(heard), every_s=0.1)
        story.world.power_cut()
    async with story.mounted() as guest:
        with suppress(OSError):
            await guest.read(BAD)
        await guest.write_surely(BAD)
        await guest.read_surely(0, EXTENT)
    await story.ends_well()


async def a_read_error_that_passes(story: Story) -> None:
    """A store was away for a moment: what it can be read at again is not given up."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        disk, sidecars = guest.mounted.disk, guest.mounted.sidecars
        story.fail_once(0, Kind.READ)
        spoil(story, [1])
        if await cannot_be_read(disk.mirror, sidecars, disk.replicas, BAD, BLOCK):
            raise BrokenError("a place was given up that can be read")
        story.mend(1)
        await guest.read_surely(0, EXTENT)
    await story.ends_well()


async def found_bad_before_a_kill(story: Story) -> None:
    """It is on record, and was told to nobody: the next mount tells."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.mounted.sidecars.note_unreadable(BAD, BLOCK)
        story.world.kill()
    assert story.oracle.is_readable(BAD, BLOCK)  # for all it was told
    async with story.mounted() as guest:
        await _all_but_the_bad_block(guest)
        if story.oracle.is_readable(BAD, BLOCK):
            raise BrokenError("nobody told what cannot be read")
        await guest.write_surely(BAD)
    await story.ends_well()


async def a_bad_block_is_written_when_no_sidecar_can_be(story: Story) -> None:
    """That the place was written cannot be remembered: the rest of the write is no bad place."""
    await _crashed_after_writes(story)
    spoil(story, range(story.setup.replicas))
    async with story.mounted() as guest:
        await _flushed(guest)
        fail_the_list(story, Fault(error=errno.ENOSPC))
        with suppress(OSError):
            await guest.write(0, EXTENT)
            raise BrokenError("a write succeeded that the next mount would not show")
        for one in story.world.replicas:
            one.sidecar_faults.script = None
        await guest.read_surely(0, BAD)
        await guest.read_surely(BAD + BLOCK, EXTENT - BAD - BLOCK)
        await guest.write_surely(BAD)
        await guest.read_surely(0, EXTENT)
    await story.ends_well()


async def a_list_that_was_not_written_is_written_again(story: Story) -> None:
    """Else a mount by that sidecar alone takes for readable what no replica was ever given."""
    await _crashed_after_writes(story)
    spoil(story, range(story.setup.replicas))
    async with story.mounted() as guest:
        await _flushed(guest)
        fail_the_list(story, Fault(error=errno.EIO, effect=Effect.ALL))
        with suppress(OSError):
            await guest.write(BAD)
            raise BrokenError("a write succeeded that the next mount would not show")
        for one in story.world.replicas:
            one.sidecar_faults.script = None
        async with guest.mounted.sidecars.recorder.lock:
            await guest.mounted.sidecars.recorder.commit_locked(clean=False)
        story.world.kill()
    async with story.mounted() as guest:
        await _unreadable(guest)
    await story.ends_well()


async def a_bad_block_is_written_before_a_loss_is_made_good(story: Story) -> None:
    """It waits for that, as a flush does: a sync before would fail, and the write with it."""
    await _crashed_after_writes(story)
    spoil(story, range(story.setup.replicas))
    async with story.mounted() as guest:
        await _flushed(guest)
        await guest.write(EXTENTS[1])
        story.fail_once(0, Kind.SYNC, Fault(error=errno.EIO))
        with suppress(OSError):
            await guest.mounted.disk.mirror.sync()
        story.world.kill()
    async with story.mounted() as guest:
        await guest.write_surely(BAD)
    await story.ends_well()


async def bad_on_one_that_is_ejected_meanwhile(story: Story) -> None:
    """Whoever held a place was ejected meanwhile: that is no reason to give the place up."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        disk, sidecars = guest.mounted.disk, guest.mounted.sidecars
        if await cannot_be_read(disk.mirror, sidecars, [], BAD, BLOCK):
            raise BrokenError("nobody was asked, and a place was given up")
        spoil(story, [0])
        if await cannot_be_read(disk.mirror, sidecars, [disk.replicas[0]], BAD, BLOCK):
            raise BrokenError("another replica holds what was given up")
        story.mend(0)
        await guest.read_surely(BAD)
    await story.ends_well()


def _bad_block(story: Story, index: int, block: int) -> None:
    """One block cannot be read until it is written to."""
    faults = story.world.replicas[index].image_faults

    def bad_sector(operation: Operation) -> Fault | None:
        start, end = operation.offset, operation.offset + operation.length
        if start < (block + 1) * BLOCK and end > block * BLOCK:
            if operation.kind is Kind.READ:
                return Fault(error=errno.EIO)
            if operation.kind in CHANGES:
                faults.script = None
        return None

    faults.script = bad_sector


async def _killed_and_a_bad_sector_on_each(story: Story) -> None:
    async with story.holding(0, size=EXTENT).durable().mounted():
        story.world.kill()
    _bad_block(story, 0, 1)
    _bad_block(story, 1, 3)


async def bad_sectors_after_a_crash(story: Story) -> None:
    """Each block can be read on one of two, but no piece as a whole (R11)."""
    await _killed_and_a_bad_sector_on_each(story)
    async with story.mounted() as guest:
        for at in range(0, EXTENT, BLOCK):
            await guest.read_surely(at)
        await guest.converged()
    await story.ends_well()


async def a_flush_beside_bad_sectors_after_a_crash(story: Story) -> None:
    """The same where nobody reads: a flush succeeds, and the replicas become equal (P3)."""
    await _killed_and_a_bad_sector_on_each(story)
    async with story.mounted() as guest:
        await guest.write_surely(4 * EXTENT)
        await guest.flush()
        await guest.converged()
    await story.ends_well()


async def listed_on_one_sidecar_alone(story: Story) -> None:
    """The others could not take the list. It is put right before a write there is acknowledged:
    else the next mount would believe it."""
    await _crashed_after_writes(story)
    spoil(story, range(story.setup.replicas))
    story.world.replicas[1].sidecar_faults.script = lambda operation: (
        Fault(error=errno.EIO) if UNREADABLE_OFFSET <= operation.offset < MAP_OFFSET else None
    )
    async with story.mounted() as guest:
        await guest.write_surely(8 * BLOCK)
        with suppress(OSError):
            await guest.read(BAD)
        with suppress(OSError):
            await guest.write(BAD)
        story.world.replicas[1].sidecar_faults.script = None
        await guest.surely(guest.flush())
        await guest.write_surely(BAD)
        await guest.surely(guest.flush())
        story.world.kill()
    async with story.mounted() as guest:
        await guest.read_surely(BAD)
    await story.ends_well()


STORIES = [
    (listed_on_one_sidecar_alone, EQUALS),
    (listed_on_one_sidecar_alone, replace(EQUALS, fifo=True)),
    (a_bad_block_is_written_when_no_sidecar_can_be, PAIR),
    (a_list_that_was_not_written_is_written_again, PAIR),
    (a_bad_block_is_written_before_a_loss_is_made_good, replace(PAIR, threshold=2)),
    (bad_on_one_that_is_ejected_meanwhile, PAIR),
    *[
        (bad_on_one_that_a_rebuild_reads, setup)
        for setup in (TRIO, replace(TRIO, fifo=True, threshold=1))
    ],
    (rebuilt_beside_half_a_bad_block, PAIR),
    (power_cut_after_a_bad_block_was_written, PAIR),
    (a_read_error_that_passes, PAIR),
    (found_bad_before_a_kill, PAIR),
    (bad_everywhere_after_a_crash, PAIR),
    (bad_everywhere_after_a_crash, EQUALS),
    (bad_everywhere_after_a_crash, TRIO),
    (bad_everywhere_after_a_crash, replace(TRIO, fifo=True, threshold=1)),
    (compared_around_a_bad_block, replace(PAIR, passing=True)),
    (a_bad_block_is_written_in_part, PAIR),
    (a_bad_block_is_written_in_part, EQUALS),
    (bad_while_another_was_away, PAIR),
    (a_bad_block_is_written_while_others_are_settled, PAIR),
    (a_bad_block_is_written_while_others_are_settled, TRIO),
    (a_bad_block_is_written_beside_a_flush_that_fails, PAIR),
    (all_fail_for_a_while, PAIR),
    (all_fail_for_a_while, TRIO),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(2)] == [None] * 2


@pytest.mark.parametrize(
    ("script", "setup"),
    [
        (bad_sectors_after_a_crash, PAIR),
        (bad_sectors_after_a_crash, replace(PAIR, fifo=False)),
        (a_flush_beside_bad_sectors_after_a_crash, PAIR),
    ],
)
def test_a_crash_and_bad_sectors_on_each(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
