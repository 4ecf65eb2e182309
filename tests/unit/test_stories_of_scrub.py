"""Stories of scrubs: what rots is found, with its place and who is to blame, and nothing else."""

import errno
from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    BLOCK,
    CHUNK,
    DISK,
    EIO,
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    QUAD,
    RAW,
    TRIO,
    WRONG,
    Guest,
    Script,
    Story,
    told,
)

from quorumfs.decisions.scrub import Counts
from quorumfs.decisions.sidecar import scrub_offset
from quorumfs.repair.inspection import Find
from quorumfs.repair.resolving import Choice
from quorumfs.repair.scrub import SAVE_S
from quorumfs.replica.storage import CHANGES, Kind, Operation


async def scrubbed(guest: Guest, *, repair: bool = False) -> Counts:
    """What a scrub of all there is finds."""
    scrub = guest.mounted.repairs.scrub
    scrub.begin(repair=repair)
    await guest.until(lambda: scrub.current is None, every_s=0.1)
    return scrub.last.counts


def require(found: object, expected: object) -> None:
    if found != expected:
        raise BrokenError(f"found {found}, and not {expected}")


def held(story: Story, index: int, at: int) -> bytes:
    return story.world.replicas[index].image.cache.read(at, at + BLOCK)


def bad_sector(story: Story, index: int, at: int) -> None:
    """A block cannot be read until it is written to."""
    bad = True

    def script(operation: Operation) -> Fault | None:
        nonlocal bad
        if not operation.offset < at + BLOCK <= operation.offset + operation.length:
            return None
        if operation.kind in CHANGES:
            bad = False
        return Fault(error=errno.EIO) if bad and operation.kind is Kind.READ else None

    story.world.replicas[index].image_faults.script = script


async def nothing_is_wrong(story: Story) -> None:
    """P8: while a guest writes everywhere, small and large, a scrub finds nothing."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        for index in range(story.setup.replicas):
            story.slow_down(index, 0.001 * (index + 1))
        over = False

        async def write_on() -> None:
            number = 0
            while not over:
                at = number * 7 * BLOCK % DISK
                await guest.write(at, min(3 * BLOCK, DISK - at))
                number += 1
                if number % 50 == 0:
                    await guest.flush()

        guest.begin(write_on)
        for repair in (False, True):
            require(await scrubbed(guest, repair=repair), Counts())
        over = True
        await guest.flush()
        require([replica.counters.mismatches for replica in guest.mounted.disk.replicas], [0] * 3)
    await story.ends_well()


async def each_rots_at_a_place_of_its_own(story: Story) -> None:
    """Told by place and blame, and left as it is; then repaired when asked to."""
    places = [5 * BLOCK, EXTENTS[2] + CHUNK, EXTENTS[7] + EXTENT - BLOCK]
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        await guest.flush()
        for index, at in enumerate(places):
            story.world.replicas[index].image.rot(at, WRONG)
        require(await scrubbed(guest), Counts(mismatches=3, unrepaired=3))
        paths = [one.path for one in story.world.replicas]
        expected = [Find(at, BLOCK, paths[i], "majority", False) for i, at in enumerate(places)]
        scrub = guest.mounted.repairs.scrub
        require(sorted(scrub.last.finds, key=lambda find: find.offset), expected)
        require(all(held(story, i, at) == WRONG for i, at in enumerate(places)), True)
        require(await scrubbed(guest, repair=True), Counts(mismatches=3, repaired=3))
        require({find.repaired for find in scrub.last.finds}, {True})
        require(await scrubbed(guest), Counts())
        counted = [replica.counters.mismatches for replica in guest.mounted.disk.replicas]
        require(counted[:3], [2, 2, 2])
        await guest.read_surely(0, DISK)
    story.oracle.check_images(story.world.contents())
    await story.ends_well()


async def two_differ(story: Story) -> None:
    """Nobody is to blame, nothing is overwritten, and it stays listed until somebody writes."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.flush()
        story.world.replicas[1].image.rot(BLOCK, WRONG)
        scrub = guest.mounted.repairs.scrub
        expected = Counts(mismatches=1, undecided=1, unrepaired=1)
        require(await scrubbed(guest, repair=True), expected)
        require(scrub.last.finds, (Find(BLOCK, BLOCK, None, "undecided", False),))
        require(held(story, 1, BLOCK), WRONG)
        require(held(story, 0, BLOCK) != WRONG, True)
    async with story.mounted() as guest:
        scrub = guest.mounted.repairs.scrub
        require(list(scrub.inspection.undecided), [(BLOCK, 2 * BLOCK)])
        await guest.write(BLOCK)
        await guest.until(lambda: not scrub.inspection.undecided)
        require(scrub.last.counts, Counts(mismatches=1))
    await story.ends_well()


async def one_has_a_bad_sector(story: Story) -> None:
    """It is rewritten from the others, also where they are fewer than the threshold."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.flush()
        bad_sector(story, 0, 3 * BLOCK)
        require(await scrubbed(guest, repair=True), Counts(unreadable=1, repaired=1))
        path = story.world.replicas[0].path
        expected = (Find(3 * BLOCK, BLOCK, path, "unreadable", True),)
        require(guest.mounted.repairs.scrub.last.finds, expected)
        require(await scrubbed(guest), Counts())
        await guest.read_surely(0, EXTENT)
    await story.ends_well()


async def a_bad_sector_beside_rot(story: Story) -> None:
    """One of three cannot be read, the others differ: nobody knows, and nothing is written."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.flush()
        bad_sector(story, 0, 3 * BLOCK)
        story.world.replicas[1].image.rot(3 * BLOCK, WRONG)
        expected = Counts(mismatches=1, unreadable=1, undecided=1, unrepaired=1)
        require(await scrubbed(guest, repair=True), expected)
        require(held(story, 1, 3 * BLOCK), WRONG)
        story.mend(0)
        require(await scrubbed(guest, repair=True), Counts(mismatches=1, repaired=1))
        require(list(guest.mounted.repairs.scrub.inspection.undecided), [])
    await story.ends_well()


async def read_on_one_only_for_a_moment(story: Story) -> None:
    """A store fails for a while, and the other one has rotted there: its data is not lost."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.flush()
        right = held(story, 0, 3 * BLOCK)
        story.world.replicas[1].image.rot(3 * BLOCK, WRONG)
        story.fail(0, {Kind.READ})
        counts = await scrubbed(guest, repair=True)
        require(counts.repaired, 0)
        require(held(story, 0, 3 * BLOCK), right)
        story.mend(0)
        story.world.replicas[1].image.rot(3 * BLOCK, right)
    await story.ends_well()


async def decided(guest: Guest, kept: int, start: int = 0, end: int = DISK) -> Choice:
    """An administrator's choice, once it was carried out."""
    choice = Choice(guest.replica(kept), start, end)
    guest.mounted.repairs.resolving.choose(choice)
    await guest.until(choice.done.is_set, every_s=0.1)
    return choice


async def an_administrator_decides(story: Story) -> None:
    """One place, then the other one, while a guest writes; nothing else is overwritten."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.flush()
        right = [held(story, 0, at) for at in (BLOCK, CHUNK)]
        for index, at in (0, BLOCK), (1, CHUNK):
            story.world.replicas[index].image.rot(at, WRONG)
        scrub = guest.mounted.repairs.scrub
        await scrubbed(guest)
        require(guest.mounted.repairs.undecided.overlaps(BLOCK, 2 * BLOCK), True)
        story.world.replicas[1].image.rot(8 * BLOCK, WRONG)  # nobody was asked about that
        choice = await decided(guest, 1, 0, CHUNK)
        require((choice.error, choice.written), (None, BLOCK))
        require([held(story, index, BLOCK) for index in (0, 1)], [right[0]] * 2)
        require(held(story, 1, CHUNK), WRONG)
        require(held(story, 1, 8 * BLOCK), WRONG)
        require(scrub.last.counts.unrepaired, 1)
        guest.begin(guest.write, CHUNK + BLOCK)
        choice = await decided(guest, 0)
        require((choice.error, choice.written), (None, BLOCK))
        require([held(story, index, CHUNK) for index in (0, 1)], [right[1]] * 2)
        require(list(scrub.inspection.undecided), [])
        require(scrub.unrepaired, 0)
        await guest.write(8 * BLOCK)
    async with story.mounted() as guest:
        require(list(guest.mounted.repairs.scrub.inspection.undecided), [])
        require(await scrubbed(guest), Counts())
    await story.ends_well()


async def the_one_to_keep_cannot_be_read(story: Story) -> None:
    """It says so, and nothing is overwritten."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.flush()
        right = held(story, 1, BLOCK)
        story.world.replicas[0].image.rot(BLOCK, WRONG)
        await scrubbed(guest)
        story.fail(1, {Kind.READ})
        choice = await decided(guest, 1)
        require(choice.error is not None and "cannot be read" in str(choice.error), True)
        require(held(story, 0, BLOCK), WRONG)
        require(guest.mounted.repairs.undecided.overlaps(BLOCK, 2 * BLOCK), True)
        story.mend(1)
        require((await decided(guest, 1)).error, None)
        require(held(story, 0, BLOCK), right)
    await story.ends_well()


async def adopted_images_are_decided_on(story: Story) -> None:
    """What differed since nobody knows when is decided, and then the images are verified."""
    story.world.replicas[1].image.rot(EXTENTS[5] + BLOCK, WRONG)
    right = held(story, 0, EXTENTS[5] + BLOCK)
    async with story.mounted() as guest:
        await guest.found_to_differ()
        choice = await decided(guest, 0)
        require((choice.error, choice.written), (None, BLOCK))
        await guest.converged()
        require(list(guest.mounted.repairs.undecided), [])
        require(held(story, 1, EXTENTS[5] + BLOCK), right)
    await story.ends_well()


async def goes_on_after(story: Story, *, kill: bool) -> None:
    """The next mount goes on where this one was, and what was found is not forgotten."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        await guest.flush()
        story.world.replicas[0].image.rot(0, WRONG)
        scrub = guest.mounted.repairs.scrub
        scrub.limit = EXTENT // 40
        scrub.begin(repair=False)
        await guest.until(lambda: scrub.done_bytes > DISK // 2)
        scrub.pause(paused=True)
        await trio.sleep(5.0)
        before = scrub.done_bytes
        await trio.sleep(5.0)
        require(scrub.done_bytes, before)
        scrub.pause(paused=False)
        await trio.sleep(60.0)
        require(scrub.current is not None, True)
        if kill:
            story.world.kill()
    async with story.mounted() as guest:
        scrub = guest.mounted.repairs.scrub
        require(scrub.current is not None, True)
        require(scrub.done_bytes >= before, True)
        require(scrub.done_bytes < DISK, True)
        await guest.until(lambda: scrub.current is None)
        require(scrub.last.counts, Counts(mismatches=1, unrepaired=1))
        require(scrub.number, 1)
    async with story.mounted() as guest:
        scrub = guest.mounted.repairs.scrub
        require((scrub.current, scrub.last.counts.mismatches, scrub.number), (None, 1, 1))
        await scrubbed(guest, repair=True)
    await story.ends_well()


async def goes_on_after_a_crash(story: Story) -> None:
    await goes_on_after(story, kill=True)


async def goes_on_after_an_unmount(story: Story) -> None:
    await goes_on_after(story, kill=False)


async def a_pause_is_remembered_although_it_could_not_be_at_first(story: Story) -> None:
    """No sidecar could be written when it was ordered, and then all can again."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        await guest.flush()
        scrub = guest.mounted.repairs.scrub
        scrub.limit = EXTENT // 40
        scrub.begin(repair=False)
        await guest.until(lambda: scrub.done_bytes > 0)
        place = scrub_offset(guest.mounted.sidecars.ledger.map)
        for one in story.world.replicas:
            one.sidecar_faults.script = lambda operation: (
                EIO if operation.kind is Kind.WRITE and operation.offset == place else None
            )
        scrub.pause(paused=True)
        await trio.sleep(5.0)
        for one in story.world.replicas:
            one.sidecar_faults.script = None
        await trio.sleep(2 * SAVE_S)
        story.world.kill()
    async with story.mounted() as guest:
        scrub = guest.mounted.repairs.scrub
        require(scrub.current is not None and scrub.current.paused, True)
        scrub.pause(paused=False)
        await guest.until(lambda: scrub.current is None)


async def one_is_ejected_meanwhile(story: Story) -> None:
    """The scrub survives it, the resync goes first, and nothing is taken for a mismatch."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        await guest.flush()
        scrub = guest.mounted.repairs.scrub
        scrub.limit = EXTENT // 2
        scrub.begin(repair=True)
        await guest.until(lambda: scrub.done_bytes > DISK // 4, every_s=0.1)
        story.world.detach(1)
        for at in EXTENTS[::2]:
            await guest.write(at, EXTENT)
        await guest.until(lambda: 1 not in guest.mounted.members)
        story.world.attach(1)
        await guest.until(lambda: 1 in guest.mounted.members)
        scrub.limit = None
        await guest.until(lambda: scrub.current is None)
        require(scrub.last.counts, Counts())
    await story.ends_well()


async def what_may_differ_is_not_told(story: Story) -> None:
    """A write that failed on some is to be settled: no mismatch, though nothing settles it yet."""
    async with story.mounted() as guest:
        await guest.write(0, EXTENT)
        await guest.flush()
        divergent = guest.mounted.sidecars.ledger.agreement.divergent
        story.world.replicas[0].image.rot(0, WRONG)
        guest.mounted.sidecars.ledger.chunks.diverge(range(1))
        suspicious = await guest.mounted.repairs.scrub.inspection.compare(0, CHUNK)
        require(bool(divergent), True)
        require(list(suspicious), [])
    await story.ends_well()


FOR_THREE: Sequence[Setup] = [TRIO, replace(TRIO, fifo=True), QUAD]
FOR_TWO: Sequence[Setup] = [PAIR, EQUALS]
STORIES: dict[Script, Sequence[Setup]] = {
    nothing_is_wrong: [TRIO, replace(TRIO, fifo=True), replace(TRIO, fast=0.7)],
    each_rots_at_a_place_of_its_own: FOR_THREE,
    two_differ: FOR_TWO,
    one_has_a_bad_sector: [*FOR_THREE, *FOR_TWO],
    a_bad_sector_beside_rot: [TRIO],
    read_on_one_only_for_a_moment: [EQUALS],
    an_administrator_decides: [PAIR, EQUALS],
    the_one_to_keep_cannot_be_read: [EQUALS],
    adopted_images_are_decided_on: [RAW, replace(RAW, threshold=2, fifo=False)],
    goes_on_after_a_crash: [TRIO],
    goes_on_after_an_unmount: [TRIO],
    one_is_ejected_meanwhile: [TRIO, replace(PAIR, threshold=1)],
    what_may_differ_is_not_told: [TRIO],
    a_pause_is_remembered_although_it_could_not_be_at_first: [PAIR],
}


@pytest.mark.parametrize(
    ("script", "setup"),
    [
        pytest.param(script, setup, id=f"{script.__name__}-{setup}")
        for script, setups in STORIES.items()
        for setup in setups
    ],
)
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert told(script, setup, 0) is None
