"""Stories of writes that go on failing while too few replicas are left to eject those that fail."""

import errno
import logging
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.simulation.media import SimulatedFile
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault
from support.simulation.story import (
    BLOCK,
    CHUNK,
    EQUALS,
    TRIO,
    Guest,
    Script,
    Story,
    told,
)
from support.simulation.world import SimulatedReplica

from quorumfs.decisions.model import Standing
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.storage import CHANGES, Kind, Operation

LASTS_S = 60.0
MENDED_S = 60.0
"""How soon after the end of a fault all is well again."""


def _watch(story: Story, guest: Guest, index: int) -> Counter[Kind]:
    """Counts what is asked of the image of a replica from now on."""
    asked: Counter[Kind] = Counter()
    watched = story.world.replicas[index]

    def watch(replica: SimulatedReplica, file: SimulatedFile, operation: Operation) -> None:
        if replica is watched and file is watched.image:
            asked[operation.kind] += 1

    guest.life.watch = watch
    return asked


async def _only_repairs_for_a_minute(story: Story, guest: Guest, good: int = 0) -> None:
    """For a minute nothing happens but what the repairs do."""
    asked = _watch(story, guest, good)
    for _ in range(int(LASTS_S)):
        await trio.sleep(1.0)
        if asked[Kind.WRITE] > 4 or asked[Kind.SYNC] > 30 or asked.total() > 300:
            raise BrokenError(f"the one that is well was asked again and again: {asked}")


async def _recovers(guest: Guest) -> None:
    with trio.move_on_after(MENDED_S) as scope:
        await guest.converged()
    if scope.cancelled_caught:
        raise BrokenError(f"not so after {MENDED_S:g} s: {guest.mounted}")


async def _write_in_vain(guest: Guest, at: int = 0) -> None:
    try:
        await guest.write(at)
    except OSError:
        return
    raise BrokenError("a write succeeded on too few")


async def truncated_for_long(story: Story) -> None:
    async with story.holding(0).durable().mounted() as guest:
        story.world.replicas[1].image.truncate(BLOCK)
        await _write_in_vain(guest, CHUNK)
        await _only_repairs_for_a_minute(story, guest)
        story.world.kill()
    story.world.replicas[1].image.truncate(story.world.size)
    await story.ends_well()


async def every_write_fails(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail(1, CHANGES)
        await _write_in_vain(guest)
        await _only_repairs_for_a_minute(story, guest)
        story.mend(1)
        await _recovers(guest)
    await story.ends_well()


async def every_write_and_flush_fails(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail(1, {*CHANGES, Kind.SYNC})
        await _write_in_vain(guest)
        with suppress(OSError):
            await guest.flush()
        await _only_repairs_for_a_minute(story, guest)
        story.mend(1)
        await _recovers(guest)
    await story.ends_well()


async def every_write_fails_after_another_was_detached(story: Story) -> None:
    async with story.mounted() as guest:
        story.world.detach(2)
        await guest.write(0)
        assert guest.mounted.members == [0, 1]
        story.fail(1, CHANGES)
        await _write_in_vain(guest)
        await _only_repairs_for_a_minute(story, guest)
        story.world.attach(2)
        await _recovers_without(guest)
        story.mend(1)
        await _recovers(guest)
    await story.ends_well()


async def _recovers_without(guest: Guest) -> None:
    """Somebody is back, and enough are left to eject who fails."""
    with trio.move_on_after(MENDED_S) as scope:
        await guest.until(lambda: 2 in guest.mounted.members and 1 not in guest.mounted.members)
    if scope.cancelled_caught:
        raise BrokenError(f"its come-back was delayed: {guest.mounted}")


class _Told(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


async def detached_for_long(story: Story) -> None:
    """It is told, but not for every attempt; and that it is back is noticed soon."""
    log, told_lines = logging.getLogger(Repairs.__module__), _Told()
    log.addHandler(told_lines)
    try:
        async with story.mounted() as guest:
            await guest.write(0)
            story.world.detach(1)
            await _write_in_vain(guest)
            await _only_repairs_for_a_minute(story, guest)
            story.world.attach(1)
            with trio.move_on_after(5.0) as scope:
                await guest.converged()
            if scope.cancelled_caught:
                raise BrokenError(f"its come-back was delayed: {guest.mounted}")
    finally:
        log.removeHandler(told_lines)
    if len(told_lines.lines) > len(set(told_lines.lines)):
        raise BrokenError(f"told more than once: {told_lines.lines}")
    await story.ends_well()


async def every_sidecar_write_fails(story: Story) -> None:
    """Nothing can be recorded, and that is told once."""
    log, told_lines = logging.getLogger(Repairs.__module__), _Told()
    log.addHandler(told_lines)
    try:
        async with story.mounted() as guest:
            await guest.write(0)
            story.fail(1, CHANGES)
            faults = story.world.replicas[1].sidecar_faults
            faults.script = lambda o: Fault(error=errno.EIO) if o.kind in CHANGES else None
            await _write_in_vain(guest)
            await _only_repairs_for_a_minute(story, guest)
            faults.script = None
            story.mend(1)
            await _recovers(guest)
    finally:
        log.removeHandler(told_lines)
    if len(told_lines.lines) > 2:
        raise BrokenError(f"told more than once: {told_lines.lines}")
    await story.ends_well()


async def no_space_on_all(story: Story) -> None:
    """Nobody is to blame, however often and in whatever order they are asked."""
    full = Fault(error=errno.ENOSPC, effect=Effect.NONE)
    async with story.mounted() as guest:
        await guest.write(0)
        for index in range(3):
            story.fail(index, {Kind.WRITE, Kind.ZERO}, full)
        await _write_in_vain(guest)
        await trio.sleep(LASTS_S)
        assert guest.mounted.members == [0, 1, 2]
        for index in range(3):
            story.mend(index)
        await _recovers(guest)
    await story.ends_well()


def _fill(story: Story, *indexes: int) -> None:
    for index in indexes:
        image = story.world.replicas[index].image
        image.space = image.cache.allocated


def _empty(story: Story, *indexes: int) -> None:
    for index in indexes:
        story.world.replicas[index].image.space = None


async def no_space_on_one(story: Story) -> None:
    """What a write failed beside stays readable."""
    others = range(1, len(story.world.replicas))
    async with story.holding(0).durable().mounted() as guest:
        _fill(story, *others)
        await _write_in_vain(guest, BLOCK)
        for _ in range(3):
            await guest.read_surely(0)
            await guest.read_surely(2 * BLOCK, 2 * BLOCK)
            await trio.sleep(10.0)
        _empty(story, *others)
        await _recovers(guest)
        await guest.read_surely(0, CHUNK)
    await story.ends_well()


async def bad_sector_on_one(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0, CHUNK)
        await guest.flush()

        def script(operation: Operation) -> Fault | None:
            end = operation.offset + operation.length
            touched = operation.offset < 2 * BLOCK and end > BLOCK
            wrong = touched and operation.kind in CHANGES
            return Fault(error=errno.EIO) if wrong else None

        story.world.replicas[1].image_faults.script = script
        await _write_in_vain(guest, BLOCK)
        await guest.read_surely(2 * BLOCK)
        story.mend(1)
        await _recovers(guest)
    await story.ends_well()


async def no_space_on_one_and_mounted_again(story: Story) -> None:
    """All but the write that failed was flushed: nothing of it keeps later writes from that."""
    others = range(1, len(story.world.replicas))
    async with story.holding(0).durable().mounted() as guest:
        _fill(story, *others)
        await _write_in_vain(guest, BLOCK)
    async with story.mounted() as guest:
        await guest.write_surely(0)
        await guest.flush()
        await guest.read_surely(0)
    async with story.mounted() as guest:
        await guest.read_surely(0)
        _empty(story, *others)
        await _recovers(guest)
    await story.ends_well()


async def all_are_full_for_long(story: Story) -> None:
    """The repair of what failed fails alike: that is nobody's fault either."""
    async with story.mounted() as guest:
        await guest.write_surely(0)
        for index in range(story.setup.replicas):
            story.fail(index, CHANGES, Fault(error=errno.ENOSPC))
        with suppress(OSError):
            await guest.write(0)
        await trio.sleep(30.0)
        for replica in guest.mounted.disk.replicas:
            assert replica.standing is Standing.CURRENT, (
                f"{replica.path} is blamed: {replica.reason}"
            )
    await story.ends_well()


THREE_ALIKE = replace(TRIO, threshold=3)


STORIES = [
    (all_are_full_for_long, TRIO),
    (truncated_for_long, EQUALS),
    (every_write_fails, EQUALS),
    (every_write_fails, THREE_ALIKE),
    (every_write_and_flush_fails, EQUALS),
    (every_write_fails_after_another_was_detached, TRIO),
    (detached_for_long, EQUALS),
    (every_sidecar_write_fails, EQUALS),
    (no_space_on_all, TRIO),
    (no_space_on_one, EQUALS),
    (no_space_on_one, TRIO),
    (bad_sector_on_one, EQUALS),
    (no_space_on_one_and_mounted_again, EQUALS),
    (no_space_on_one_and_mounted_again, TRIO),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
