"""Stories of comparisons of adopted images in which not all could take part.

An image that cannot be read may hold anything: it is neither outvoted nor left out for good.
"""

import errno
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    BLOCK,
    CHUNK,
    EXTENT,
    EXTENTS,
    RAW,
    RAW_TRIO,
    WRONG,
    Script,
    Story,
    told,
)

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.replica.storage import CHANGES, Kind, Operation


def _bad_sector(story: Story, index: int, at: int) -> None:
    """A block cannot be read until it is written to."""
    bad = True

    def script(operation: Operation) -> Fault | None:
        nonlocal bad
        if not operation.offset <= at < operation.offset + operation.length:
            return None
        if operation.kind in CHANGES:
            bad = False
        return Fault(error=errno.EIO) if bad and operation.kind is Kind.READ else None

    story.world.replicas[index].image_faults.script = script


def _fail_a_read(story: Story, index: int, at: int) -> None:
    failed = False

    def script(operation: Operation) -> Fault | None:
        nonlocal failed
        here = operation.offset <= at < operation.offset + operation.length
        if here and operation.kind is Kind.READ and not failed:
            failed = True
            return Fault(error=errno.EIO)
        return None

    story.world.replicas[index].image_faults.script = script


async def a_tie_decided_by_a_bad_sector(story: Story) -> None:
    """One block of the first cannot be read while the two are compared: all of the piece around
    it is overwritten, and what differed there is gone, unreported (P4)."""
    story.world.replicas[0].image.rot(EXTENTS[5], WRONG)
    _bad_sector(story, 0, EXTENTS[5] + BLOCK)
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.sidecars.ledger.map.count(UNVERIFIED) < 3)
        await trio.sleep(10.0)
        if story.world.replicas[0].image.cache.read(EXTENTS[5], EXTENTS[5] + BLOCK) != WRONG:
            raise BrokenError("a tie was decided by a block beside it that could not be read")


async def a_tie_decided_by_a_read_of_a_bad_sector(story: Story) -> None:
    """The same when a guest reads it, after it was found to differ, and reported."""
    async with story.differing(0, EXTENTS[5]).mounted() as guest:
        _bad_sector(story, 0, EXTENTS[5] + BLOCK)
        with suppress(OSError):
            await guest.mounted.disk.read(EXTENTS[5], 2 * BLOCK)
        if story.world.replicas[0].image.cache.read(EXTENTS[5], EXTENTS[5] + BLOCK) != WRONG:
            raise BrokenError("a tie was decided by a block beside it that could not be read")


async def a_tie_of_four_and_one_read_error(story: Story) -> None:
    """Two hold this and two that; one of them cannot be read once, and the other one of its side
    is outvoted, and overwritten (P4)."""
    for index in (0, 1):
        story.world.replicas[index].image.rot(EXTENTS[5], WRONG)
    _fail_a_read(story, 0, EXTENTS[5])
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.sidecars.ledger.map.count(UNVERIFIED) < 3)
        await trio.sleep(10.0)
        if story.world.replicas[1].image.cache.read(EXTENTS[5], EXTENTS[5] + BLOCK) != WRONG:
            raise BrokenError("a tie was decided by one who could not be read once")


async def compared_without_one_that_could_not_be_read(story: Story) -> None:
    """Two differ in one chunk of a piece; so the third, unreadable there, is never compared in the
    next one either, and yet that counts as compared."""
    story.world.replicas[1].image.rot(EXTENTS[5], WRONG)
    story.world.replicas[0].image.rot(EXTENTS[5] + CHUNK, WRONG)
    _bad_sector(story, 0, EXTENTS[5] + BLOCK)
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.sidecars.ledger.map.count(UNVERIFIED) < 3)
        await trio.sleep(100.0)
        at = EXTENTS[5] + CHUNK
        if not guest.mounted.sidecars.ledger.unverified(at, BLOCK):
            held = {one.image.cache.read(at, at + BLOCK) for one in story.world.replicas}
            if len(held) > 1:
                raise BrokenError("what differs counts as compared")


async def undecided_for_one_read_error(story: Story) -> None:
    """Two of three agree; one of them could not be read once: nobody looks again."""
    story.world.replicas[1].image.rot(EXTENTS[5], WRONG)
    _fail_a_read(story, 0, EXTENTS[5])
    async with story.mounted() as guest:
        await guest.converged()
    await story.ends_well()


async def all_others_are_removed(story: Story) -> None:
    """The last one has nothing left to be compared with, where it differed from the other."""
    story.world.replicas[1].image.rot(EXTENTS[5], WRONG)
    async with story.mounted() as guest:
        unverified = guest.mounted.sidecars.ledger.map
        await guest.until(lambda: unverified.count(UNVERIFIED) < 3)
        story.fail(1, CHANGES)
        await guest.write_surely(0)
        story.mend(1)
        await guest.administrator().remove(1)
        await guest.until(lambda: not unverified.count(UNVERIFIED))
    await story.ends_well()


async def the_other_is_only_away(story: Story) -> None:
    """It comes back, with what only the operator may decide on (P4)."""
    story.world.replicas[1].image.rot(EXTENTS[5], WRONG)
    async with story.mounted() as guest:
        known = guest.mounted.sidecars.ledger.map
        await guest.until(lambda: known.count(UNVERIFIED) < 3)
        story.fail(1, CHANGES)
        await guest.write_surely(0)
        await trio.sleep(10.0)
        story.mend(1)
        await guest.until(lambda: len(guest.mounted.sidecars.ledger.members) == 2)
        if story.world.replicas[1].image.cache.read(EXTENTS[5], EXTENTS[5] + BLOCK) != WRONG:
            raise BrokenError("the one that stayed was believed against the one that was away")


async def a_write_beside_a_bad_sector(story: Story) -> None:
    """It fails because another block of the extent cannot be read on one of two."""
    _bad_sector(story, 0, EXTENTS[5] + CHUNK)
    async with story.mounted() as guest:
        await trio.sleep(30.0)
        await guest.write_surely(EXTENTS[5])


async def written_anew_and_still_undecided(story: Story) -> None:
    """All of the chunk that differed was written anew; the operator is asked all the same."""
    story.world.replicas[1].image.rot(EXTENTS[5], WRONG)
    async with story.mounted() as guest:
        await guest.until(lambda: bool(guest.mounted.repairs.differing))
        await guest.write(EXTENTS[5], EXTENT)
        await guest.converged()
        assert not guest.mounted.repairs.differing


async def written_where_it_cannot_be_read(story: Story) -> None:
    """Then the disk has remapped it, and all is the same."""
    _bad_sector(story, 0, EXTENTS[5] + CHUNK)
    async with story.mounted() as guest:
        await trio.sleep(100.0)
        assert not guest.mounted.converged
        assert not guest.mounted.repairs.differing
        await guest.write_surely(EXTENTS[5] + CHUNK)
        await guest.converged()
    await story.ends_well()


async def a_bad_sector_for_long(story: Story) -> None:
    """It is tried again now and then, and all around it is compared, but not again."""
    at, tries, others = EXTENTS[5] + CHUNK, 0, 0

    def script(operation: Operation) -> Fault | None:
        nonlocal tries, others
        if operation.kind is not Kind.READ:
            return None
        if not operation.offset <= at < operation.offset + operation.length:
            others += not at // CHUNK * CHUNK <= operation.offset < at // CHUNK * CHUNK + CHUNK
            return None
        tries += operation.length == BLOCK
        return Fault(error=errno.EIO)

    story.world.replicas[0].image_faults.script = script
    async with story.mounted() as guest:
        unverified = guest.mounted.sidecars.ledger.map
        await guest.until(lambda: unverified.count(UNVERIFIED) == 1)
        tries = others = 0
        await trio.sleep(3600.0)
        if not 30 < tries < 100 or others:
            raise BrokenError(f"it was tried {tries} times, and elsewhere {others} times")
        story.mend(0)
        await guest.converged()
    await story.ends_well()


async def one_that_was_away_for_long(story: Story) -> None:
    """As soon as it is back it is compared."""
    async with story.mounted() as guest:
        story.world.detach(1)
        await trio.sleep(1000.0)
        assert guest.mounted.members == [0, 1]
        story.world.attach(1)
        with trio.fail_after(20.0):
            await guest.converged()


async def written_beside_what_differs(story: Story) -> None:
    """It is compared again, but not for every write."""
    async with story.differing(1, EXTENTS[5]).mounted() as guest:
        reads = 0

        def script(operation: Operation) -> None:
            nonlocal reads
            reads += (
                operation.kind is Kind.READ and operation.offset // CHUNK == EXTENTS[5] // CHUNK
            )

        story.world.replicas[0].image_faults.script = script
        for _ in range(300):
            await guest.write(EXTENTS[5] + BLOCK)
            await trio.sleep(1.0)
        if not 0 < reads < 30:
            raise BrokenError(f"compared {reads} times")
        await guest.write(EXTENTS[5])
        await guest.converged()


async def settled_beside_what_only_an_operator_may_decide(story: Story) -> None:
    """A read that covers both settles both."""
    image = story.world.replicas[1].image
    image.rot(CHUNK, WRONG)
    async with story.mounted() as guest:
        await guest.until(lambda: bool(guest.mounted.repairs.differing))
        await guest.until(lambda: guest.mounted.sidecars.ledger.map.count(UNVERIFIED) < 2)
        await guest.write(0)
        story.fail_once(1, Kind.WRITE)
        with suppress(OSError):
            await guest.write(0)
        with suppress(OSError):
            await guest.mounted.disk.read(0, 2 * CHUNK)
        if image.cache.read(CHUNK, CHUNK + BLOCK) != WRONG:
            raise BrokenError("a tie was decided")


async def a_write_fails_ahead_of_a_verification(story: Story) -> None:
    """What it left different was compared before it; that is nothing to ask an operator about."""
    for index in range(2):
        story.slow_down(index, 0.5)
    async with story.mounted() as guest:
        await guest.write_surely(EXTENTS[-1])
        story.fail_once(0, Kind.WRITE)
        with suppress(OSError):
            await guest.write(EXTENTS[-1])
        assert guest.mounted.sidecars.ledger.agreement.divergent
        assert guest.mounted.sidecars.ledger.map.count(UNVERIFIED)
        await guest.converged()
        if guest.mounted.repairs.differing:
            raise BrokenError(f"they are said to differ: {guest.mounted.repairs.differing}")
    await story.ends_well()


async def compared_for_ever_with_one_that_is_slow(story: Story) -> None:
    """The first answers a read later than a timeout, each time; the other takes its time. Who is
    hung goes to and fro, which is taken for another source: the range stays locked."""
    faults = story.world.replicas[0].image_faults, story.world.replicas[1].image_faults
    for one, seconds in zip(faults, (10.0, 4.0), strict=True):
        one.script = lambda o, s=seconds: Fault(s) if o.kind is Kind.READ else None
    async with story.mounted() as guest:
        with trio.move_on_after(600.0) as scope:
            with suppress(OSError):
                await guest.mounted.disk.write(0, bytes(BLOCK))
        story.world.kill()
    if scope.cancelled_caught:
        raise BrokenError("a write has waited for ten minutes")


async def equal_in_the_page_cache_alone(story: Story) -> None:
    """A sync that failed before a crash dropped what reads still show. Before a flush succeeds, and
    before the images count as equal there, all are given it anew (R4)."""
    at = EXTENTS[5]
    story.fail(0, [Kind.READ])
    async with story.mounted() as guest:
        await guest.write_surely(at)  # where nothing could be compared
        for one in story.world.replicas:
            one.sidecar_faults.plan(Kind.WRITE, Fault(hang=True))
        story.fail_once(0, Kind.SYNC)
        guest.begin(guest.flush)
        await trio.sleep(1.0)
        story.cut_off(0, 1)
    story.mend(0)
    async with story.mounted() as guest:
        await guest.surely(guest.flush())
        held = [one.image.durable.read(at, at + BLOCK) for one in story.world.replicas]
        if len(set(held)) > 1:
            raise BrokenError("flushed, and not on all media")
        await guest.converged()
        story.evict(0)
        await guest.read_surely(at)
    await story.ends_well()


STORIES = [
    (equal_in_the_page_cache_alone, replace(RAW, threshold=2)),
    (equal_in_the_page_cache_alone, replace(RAW, threshold=2, fifo=False)),
    (settled_beside_what_only_an_operator_may_decide, replace(RAW, threshold=2)),
    (a_write_fails_ahead_of_a_verification, replace(RAW, threshold=2)),
    (compared_for_ever_with_one_that_is_slow, RAW),
    (a_tie_decided_by_a_bad_sector, RAW),
    (a_tie_decided_by_a_read_of_a_bad_sector, RAW),
    (a_tie_of_four_and_one_read_error, replace(RAW_TRIO, replicas=4)),
    (compared_without_one_that_could_not_be_read, RAW_TRIO),
    (undecided_for_one_read_error, RAW_TRIO),
    (all_others_are_removed, RAW),
    (the_other_is_only_away, RAW),
    (a_write_beside_a_bad_sector, replace(RAW, threshold=2)),
    (written_anew_and_still_undecided, RAW),
    (written_where_it_cannot_be_read, RAW),
    (a_bad_sector_for_long, RAW),
    (one_that_was_away_for_long, RAW),
    (written_beside_what_differs, RAW),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
