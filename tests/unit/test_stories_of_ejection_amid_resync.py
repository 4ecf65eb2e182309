"""Stories of a replica that is ejected once more while it is resynced: it also lacks what was being
written at that moment."""

import errno
from dataclasses import replace

import pytest
import trio
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault
from support.simulation.story import (
    BLOCK,
    EXTENT,
    EXTENTS,
    PAIR,
    TRIO,
    Guest,
    Script,
    Story,
    told,
)

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.model import Standing
from quorumfs.repair.repairs import CLEAR_S
from quorumfs.replica.storage import CHANGES, Kind, Operation

LAST, NEXT_TO_LAST = EXTENTS[-1], EXTENTS[-2]


async def _missed_the_beginning(story: Story) -> None:
    """The first replica lacks what is at the beginning, and has all the rest."""
    async with story.mounted() as guest:
        await guest.write(LAST, EXTENT)
        await guest.write(NEXT_TO_LAST, EXTENT)
        await guest.flush()
        await trio.sleep(4 * CLEAR_S)  # what it took last it would have to prove (R15)
        story.fail(0, CHANGES)
        for at in EXTENTS[:5]:
            await guest.write(at, EXTENT)
    story.mend(0)


async def _comes_back_with_all(story: Story, guest: Guest, written: list[None]) -> None:
    story.mend(0)
    guest.mounted.repairs.limit = None
    await guest.until(lambda: bool(written), every_s=0.1)
    await guest.until(lambda: 0 in guest.mounted.members, every_s=0.1)
    await guest.read_surely(LAST)
    await guest.converged()


async def ejected_while_another_is_slow(story: Story) -> None:
    """A write fails on it while another replica is slow; and one more, by which it is ejected,
    before that is through."""
    await _missed_the_beginning(story)
    async with story.mounted() as guest:
        sidecars, replica = guest.mounted.sidecars, guest.replica(0)
        guest.mounted.repairs.limit = 32 << 10
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        assert sidecars.ledger.target is not None
        sidecars.ledger.target.mirroring = True
        assert not sidecars.ledger.map.any(out_of_sync(0), sidecars.ledger.map.chunks(LAST, BLOCK))
        written: list[None] = []

        async def write() -> None:
            await guest.write(LAST)
            written.append(None)

        def beyond(operation: Operation) -> Fault | None:
            wrong = operation.kind is Kind.WRITE and operation.offset >= NEXT_TO_LAST
            return Fault(error=errno.EIO) if wrong else None

        story.world.replicas[1].image_faults.plan(Kind.WRITE, Fault(5.0))
        story.world.replicas[0].image_faults.script = beyond
        guest.life.nursery.start_soon(write)
        await trio.sleep(4.0)  # a sync of the target comes at least every two seconds
        assert replica.standing is Standing.RESYNCING
        await guest.write(NEXT_TO_LAST)
        await guest.until(lambda: replica.standing is Standing.STALE, every_s=0.001)
        await _comes_back_with_all(story, guest, written)
    story.oracle.check_images(story.world.contents())


async def written_beside_its_sync(story: Story) -> None:
    """One sync of it begins amid a write, and need not cover that; the next one fails."""
    await _missed_the_beginning(story)
    async with story.mounted() as guest:
        sidecars, replica = guest.mounted.sidecars, guest.replica(0)
        guest.mounted.repairs.limit = 32 << 10
        faults = story.world.replicas[0].image_faults
        syncs: list[float] = []
        begun: list[float] = []

        def slow_then_unsynced(operation: Operation) -> Fault | None:
            now = trio.current_time()
            if operation.kind is Kind.SYNC:
                syncs.append(now)
                if begun and now > begun[0] + 4.0:
                    faults.script = None
                    return Fault(error=errno.EIO)
            if operation.kind is Kind.WRITE and operation.offset == LAST and not begun:
                begun.append(now)
                return Fault(4.0)
            return None

        faults.script = slow_then_unsynced
        await guest.until(lambda: bool(syncs), every_s=0.01)
        assert sidecars.ledger.target is not None
        sidecars.ledger.target.mirroring = True
        assert not sidecars.ledger.map.any(out_of_sync(0), sidecars.ledger.map.chunks(LAST, BLOCK))
        story.world.replicas[1].image_faults.plan(Kind.WRITE, Fault(12.0))
        written: list[None] = []

        async def write() -> None:
            await guest.write(LAST)
            written.append(None)

        guest.life.nursery.start_soon(write)
        await guest.until(lambda: replica.standing is Standing.STALE, every_s=0.01)
        story.evict(0)
        await _comes_back_with_all(story, guest, written)
    story.oracle.check_images(story.world.contents())


async def _one_fell_behind_and_one_is_away(story: Story) -> None:
    """After a crash; the first one alone is current."""
    async with story.mounted() as guest:
        story.fail(2, CHANGES)
        for at in EXTENTS[:4]:
            await guest.write(at, EXTENT)
        story.world.kill()
    story.mend(2)
    story.world.detach(1)


async def resynced_from_one_that_lost_all(story: Story) -> None:
    """After a crash one is away, and of the other two only one is current: a sync of it fails. The
    third one can be given what it has for ever, if it is not first written anew there."""
    await _one_fell_behind_and_one_is_away(story)
    story.fail_once(0, Kind.SYNC, Fault(error=errno.EIO, effect=Effect.ALL))
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.members == [0, 2])
        story.world.attach(1)
        await guest.converged()
    await story.ends_well()


async def resynced_from_one_that_cannot_sync(story: Story) -> None:
    """As long as that lasts the third one is not given the same again and again."""
    await _one_fell_behind_and_one_is_away(story)
    reads = 0

    def cannot_sync(operation: Operation) -> Fault | None:
        nonlocal reads
        reads += operation.kind is Kind.READ
        wrong = operation.kind is Kind.SYNC
        return Fault(error=errno.EIO, effect=Effect.ALL) if wrong else None

    story.world.replicas[0].image_faults.script = cannot_sync
    async with story.mounted() as guest:
        await trio.sleep(60.0)
        if reads > 1000:
            raise BrokenError(f"read {reads} times in a minute, for nothing")
        story.mend(0)
        await guest.until(lambda: guest.mounted.members == [0, 2])
        story.world.attach(1)
        await guest.converged()
    await story.ends_well()


STORIES = [
    (resynced_from_one_that_cannot_sync, TRIO),
    (resynced_from_one_that_lost_all, TRIO),
    (resynced_from_one_that_lost_all, replace(TRIO, fifo=True)),
    *[
        (ejected_while_another_is_slow, setup)
        for setup in (PAIR, TRIO, replace(TRIO, threshold=1, fifo=True))
    ],
    (written_beside_its_sync, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
