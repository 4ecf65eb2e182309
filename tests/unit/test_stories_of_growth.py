"""Stories of a disk that grows: under writes, without one of its replicas, and cut off anywhere."""

import errno
from contextlib import suppress
from dataclasses import dataclass, replace

import pytest
import trio
from support.simulation.oracle import BrokenError
from support.simulation.setup import SCALES, Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    BLOCK,
    CHUNK,
    DISK,
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

from quorumfs.decisions.model import Standing
from quorumfs.decisions.sidecar import SLOT_OFFSETS
from quorumfs.errors import UserError
from quorumfs.replica.storage import Kind, Operation

LARGER = DISK + 2 * EXTENT + CHUNK + BLOCK
BEHIND = range(DISK, LARGER - BLOCK, EXTENT)
"""Places that there were not before."""
FULL = Fault(error=errno.ENOSPC)


def require(fact: object, what: str) -> None:
    if not fact:
        raise BrokenError(what)


def sizes(story: Story) -> set[int]:
    return {one.image.size for one in story.world.replicas}


async def used_to_the_end(guest: Guest) -> None:
    """What is behind the old end is written and read, and nothing behind the new one."""
    await guest.read_surely(BEHIND[0], BLOCK)  # zeros, or what was written
    for at in (*BEHIND, LARGER - BLOCK):
        await guest.write_surely(at)
        await guest.read_surely(at)
    await guest.surely(guest.flush())


async def grown_under_writes(story: Story) -> None:
    written = 0

    async def write(guest: Guest) -> None:
        nonlocal written
        while True:
            for at in (EXTENTS[0], DISK - BLOCK):
                await guest.write_surely(at)
                await trio.sleep(0.001)
                written += 1

    async with story.holding(*EXTENTS).mounted() as guest:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, guest)
            await trio.sleep(0.01)
            await guest.grow(LARGER)
            ledger = guest.mounted.sidecars.ledger
            extents = len(ledger.map.extents(0, LARGER))
            require(len(ledger.marks.intents.touched) == extents, "extents are unknown")
            await used_to_the_end(guest)
            nursery.cancel_scope.cancel()
        require(written > 10, "it stood still")
        answer = await guest.grow(LARGER)
        require("already" in answer["message"], "a disk grew to the size that it has")
    require(sizes(story) == {LARGER}, "not all images are as long as the disk")
    await story.ends_well()


async def grown_and_power_cut(story: Story) -> None:
    """It has the size that was told, and what was flushed behind the old end."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.grow(LARGER)
        await used_to_the_end(guest)
        await guest.write(BEHIND[0])
        story.world.power_cut()
    async with story.mounted() as guest:
        story.sized(guest.mounted.disk.size)
        for at in (0, *BEHIND, LARGER - BLOCK):
            await guest.read_surely(at)
    await story.ends_well()


async def grown_while_one_is_away(story: Story) -> None:
    """It is made longer when it comes back, and gets what was written there meanwhile."""
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        story.world.detach(1)
        await guest.write(0)
        await guest.grow(LARGER)
        await used_to_the_end(guest)
        require(story.world.replicas[1].image.size == DISK, "nobody can have made it longer")
        story.world.attach(1)
        await guest.converged()
    require(sizes(story) == {LARGER}, "not all images are as long as the disk")
    await story.ends_well()


async def grown_between_its_mounts(story: Story) -> None:
    """It is not there for a whole mount, and there is something behind the end of its image."""
    end = story.setup.scale.size
    larger = end + 2 * EXTENT
    async with story.holding(0).durable().mounted() as guest:
        story.world.detach(1)
        await guest.write(0)
        await guest.grow(larger)
        await guest.write(end + EXTENT)
    image = story.world.replicas[1].image
    image.truncate(end + CHUNK)
    image.rot(end, b"junk" * (CHUNK // 4))
    story.world.attach(1)
    async with story.mounted() as guest:
        await guest.converged()
        await guest.read_surely(end, larger - end)
        await guest.write_surely(larger - BLOCK)
    await story.ends_well()


async def grown_amid_a_resync(story: Story) -> None:
    """Which is broken off, and begun again."""
    async with story.holding(*EXTENTS, size=EXTENT).durable().mounted() as guest:
        story.world.detach(1)
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        story.world.attach(1)
        story.slow_down(1, 0.5)
        replica = guest.replica(1)
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.1)
        await trio.sleep(1.0)
        await guest.grow(LARGER)
        story.slow_down(1, 0.001)
        await used_to_the_end(guest)
        await guest.converged()
        require(not guest.life.seen_short, "it was taken for a truncated one")
    await story.ends_well()


async def grown_over_what_was_behind_the_end(story: Story) -> None:
    """Images that were longer hold anything there: a guest sees zeros, on all of them."""
    for one in story.world.replicas:
        one.image.truncate(LARGER + CHUNK)
        one.image.rot(DISK, story.world.dice_for(one.path).randbytes(LARGER - DISK))
    async with story.mounted() as guest:
        await guest.grow(LARGER)
        latest = guest.mounted.sidecars.ledger.record.mounts[0]
        require(latest.changed, "others may be mounted without it as if nothing had changed")
        for at in BEHIND:
            await guest.read_surely(at)
    require(sizes(story) == {LARGER}, "not all images are as long as the disk")
    await story.ends_well()


async def one_cannot_grow(story: Story) -> None:
    """By the rules of a write: it is ejected, and lacks what it has no place for."""
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        story.fail(1, {Kind.RESIZE}, FULL)
        answer = await guest.grow(LARGER)
        require(answer["ejected"] == ["/b.img"], f"nobody was told of it: {answer}")
        await used_to_the_end(guest)
        await trio.sleep(100.0)
        require(guest.replica(1).reason == "simulated", "it does not say why it stays out")
        story.mend(1)
        await guest.converged()
    await story.ends_well()


async def too_few_can_grow(story: Story) -> None:
    """Nothing has changed for the guest, nor on any replica."""
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        for kind in (Kind.RESIZE, Kind.SYNC):
            story.fail(1, {kind}, FULL)
            try:
                await guest.grow(LARGER)
            except UserError as error:
                require(f"keeps its {DISK} bytes" in str(error), f"it is not said: {error}")
            else:
                raise BrokenError("a disk grew of which one replica did not")
            story.mend(1)
            require(guest.mounted.disk.size == DISK, "the guest sees another size")
            require(sizes(story) == {DISK}, "an image stays longer")
            await guest.until(lambda: not guest.mounted.sidecars.ledger.agreement.divergent)
        await guest.write_surely(0)
        await guest.grow(LARGER)
        await used_to_the_end(guest)
    await story.ends_well()


async def one_hangs_when_it_is_to_grow(story: Story) -> None:
    """It costs a timeout, and does late what it was told; then it is resynced."""
    async with story.holding(0).durable().mounted() as guest:
        story.fail_once(1, Kind.RESIZE, Fault(hang=True))
        await guest.grow(LARGER)
        await used_to_the_end(guest)
        story.world.release(1)
        await guest.converged()
    await story.ends_well()


async def sidecars_cannot_grow(story: Story) -> None:
    """A larger map has no place, on one of two that are both needed; then on one that is not."""
    async with story.holding(0).durable().mounted() as guest:
        faults = story.world.replicas[1].sidecar_faults
        faults.script = lambda one: FULL if one.kind is Kind.WRITE else None
        try:
            await guest.grow(LARGER)
        except UserError:
            require(story.setup.threshold == 2, "the other one would have been enough")
            require(guest.mounted.disk.size == DISK, "the guest sees another size")
        else:
            require(story.setup.threshold == 1, "a replica is current without a record")
        faults.script = None
        await guest.converged()
        await guest.grow(LARGER)
        await used_to_the_end(guest)
    await story.ends_well()


async def cut_off_in_doubt(story: Story) -> None:
    """One of two that are both needed has the record, and the other one fails to take it."""
    async with story.holding(0).durable().mounted() as guest:
        slots = 0

        def fail_second(operation: Operation) -> Fault | None:
            nonlocal slots
            slots += operation.kind is Kind.WRITE and operation.offset in SLOT_OFFSETS
            return FULL if slots > 1 else None

        story.world.replicas[1].sidecar_faults.script = fail_second
        try:
            await guest.grow(LARGER)
        except UserError:
            story.world.kill()
        else:
            raise BrokenError("a disk grew that one of two needed has no record of")
    story.world.replicas[1].sidecar_faults.script = None
    async with story.mounted() as guest:
        require(guest.mounted.disk.size == LARGER, "a record was committed, and is not followed")
        story.sized(LARGER)
        await used_to_the_end(guest)
    await story.ends_well()


async def grown_and_gone_for_a_while(story: Story) -> None:
    """One that is needed: it is known by the size that it has now."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.grow(LARGER)
        story.world.detach(1)
        with suppress(OSError):
            await guest.write(0)
        story.world.attach(1)
        await guest.converged()
        await used_to_the_end(guest)
    await story.ends_well()


async def gone_when_it_has_been_made_longer(story: Story) -> None:
    """One that is needed: its image stays longer than the disk, and it comes back all the same."""
    gone, longer = Fault(error=errno.ENOTCONN), False

    def fail_from_there_on(operation: Operation) -> Fault | None:
        nonlocal longer
        fault = gone if longer else None
        longer |= operation.kind is Kind.RESIZE
        return fault

    async with story.holding(0).durable().mounted() as guest:
        faults = story.world.replicas[1].image_faults
        faults.script = fail_from_there_on
        with pytest.raises(UserError, match=f"keeps its {DISK} bytes"):
            await guest.grow(LARGER)
        require(sizes(story) == {DISK, LARGER}, f"images of {sizes(story)} bytes")
        faults.script = None
        await guest.converged()
        await guest.write_surely(0)
        await guest.grow(LARGER)
        await used_to_the_end(guest)
    await story.ends_well()


STORIES = [
    (gone_when_it_has_been_made_longer, EQUALS),
    (grown_under_writes, PAIR),
    (grown_under_writes, TRIO),
    (grown_under_writes, replace(TRIO, fast=1.0)),
    (grown_and_power_cut, PAIR),
    (grown_and_power_cut, TRIO),
    (grown_while_one_is_away, PAIR),
    (grown_while_one_is_away, TRIO),
    (grown_while_one_is_away, replace(PAIR, passing=True)),
    (grown_between_its_mounts, PAIR),
    (grown_between_its_mounts, replace(PAIR, scale=SCALES[1])),
    (grown_amid_a_resync, PAIR),
    (grown_over_what_was_behind_the_end, PAIR),
    (one_cannot_grow, PAIR),
    (one_cannot_grow, TRIO),
    (too_few_can_grow, EQUALS),
    (one_hangs_when_it_is_to_grow, PAIR),
    (one_hangs_when_it_is_to_grow, TRIO),
    (sidecars_cannot_grow, PAIR),
    (sidecars_cannot_grow, EQUALS),
    (cut_off_in_doubt, EQUALS),
    (grown_and_gone_for_a_while, EQUALS),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4


@dataclass
class CutOff:
    """A disk grows, and at one of the steps the daemon dies, or with it all that is not synced."""

    size: int
    step: int
    power: bool
    away: bool
    """A replica is not there."""
    steps: int = 0
    """How many steps it took; 0: it did not come to its end."""

    async def __call__(self, story: Story) -> None:
        before = story.setup.scale.size
        async with story.holding(0).durable().mounted() as guest:
            if self.away:
                story.world.detach(1)
                await guest.write(0)
            began = guest.life.steps
            if self.step:
                guest.life.crash_at(began + self.step, power=self.power)
            await guest.grow(self.size)
            self.steps = guest.life.steps - began
            await guest.write(self.size - BLOCK)
            await guest.flush()
        if self.away:
            story.world.attach(1)
        async with story.mounted() as guest:
            size = guest.mounted.disk.size
            require(size in (before, self.size), f"a disk of {size} bytes")
            story.sized(size)  # if it was told, it is so
            answer = await guest.grow(self.size)
            require(answer["size"] == self.size, f"not repeated: {answer}")
            await guest.read_surely(self.size - BLOCK)
            await guest.write_surely(self.size - BLOCK)
            await guest.surely(guest.flush())
            await guest.converged()
        require(sizes(story) == {self.size}, "not all images are as long as the disk")
        await story.ends_well()


@dataclass
class ReturnCutOff:
    """A replica comes back, and power is cut at one of the steps in which it is made longer."""

    step: int
    steps: int = 0

    async def __call__(self, story: Story) -> None:
        async with story.holding(0).durable().mounted() as guest:
            story.world.detach(1)
            await guest.write(0)
            await guest.grow(LARGER)
            await guest.write(BEHIND[1])
        story.world.attach(1)
        async with story.mounted() as guest:
            began = guest.life.steps
            if self.step:
                guest.life.crash_at(began + self.step, power=True)
            replica = guest.replica(1)
            await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
            self.steps = guest.life.steps - began
            await guest.converged()
        async with story.mounted() as guest:
            await guest.converged()
            require(not guest.life.seen_short, "it was taken for a truncated one")
        await story.ends_well()


def test_one_that_comes_back_may_lose_power_at_any_step() -> None:
    whole = ReturnCutOff(0)
    assert told(whole, PAIR, 1) is None
    assert 15 < whole.steps < 60
    for step in range(1, whole.steps + 1):
        for seed in range(2):
            assert told(ReturnCutOff(step), PAIR, seed) is None, (step, seed)


ODD, LARGE = (replace(PAIR, scale=scale) for scale in SCALES[1:])
"""A disk that ends with a short chunk, and one with a second page of the map."""

CASES = {
    "two, killed": (PAIR, False, False),
    "two, without one, killed": (PAIR, False, True),
    "two": (PAIR, True, False),
    "two, without one": (PAIR, True, True),
    "three, killed": (TRIO, False, False),
    "three, without one": (TRIO, True, True),
    "odd, without one": (ODD, True, True),
    "large, killed": (LARGE, False, False),
    "large, without one": (LARGE, True, True),
}


@pytest.mark.parametrize(("setup", "power", "away"), CASES.values(), ids=CASES)
def test_cut_off_at_any_step_it_can_be_mounted_and_done_again(
    setup: Setup, power: bool, away: bool
) -> None:
    size = setup.scale.size + 3 * EXTENT + 9 * BLOCK
    whole = CutOff(size, 0, power, away)
    assert told(whole, setup, 1) is None
    assert whole.steps > 15
    for step in range(1, whole.steps + 1):
        assert told(CutOff(size, step, power, away), setup, step) is None, step
