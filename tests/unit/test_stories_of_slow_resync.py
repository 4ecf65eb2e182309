"""Stories of a resync whose target is slow: the guest hardly waits for it, an unmount neither, and
what it was given is not lost, however often the daemon dies."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.sidecars import decode
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    BLOCK,
    CHUNK,
    DISK,
    EXTENT,
    EXTENTS,
    PAIR,
    RAW,
    TRIO,
    Guest,
    Script,
    Story,
    ejected,
    told,
)

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.model import Standing
from quorumfs.repair import work as work_module
from quorumfs.replica.storage import CHANGES, Kind, Operation

RATE = DISK // 4
"""Bytes a second that a slow one takes: a chunk in 0.125 s, four of the largest units in 2 s."""

LATENCY_S = 0.2


READ_MAX_S, WRITE_MAX_S, UNMOUNT_MAX_S = 0.3, 0.6, 3.0
"""How long a guest may wait beside a resync: for a read of what a good replica has; for a write,
which waits for no more than what is locked, and for itself."""


def _throttled(kinds: frozenset[Kind], rate: int) -> Callable[[Operation], Fault | None]:
    """Delays as of a link that takes one operation of *kinds* after the other."""
    free_at = 0.0

    def delayed(operation: Operation) -> Fault | None:
        nonlocal free_at
        if operation.kind not in kinds:
            return None
        free_at = max(free_at, trio.current_time()) + operation.length / rate
        return Fault(free_at - trio.current_time())

    return delayed


def _slow_to_sync(rate: int) -> Callable[[Operation], Fault | None]:
    """Takes everything at once, and writes it only when it is synced."""
    cached = 0

    def delayed(operation: Operation) -> Fault | None:
        nonlocal cached
        if operation.kind is Kind.SYNC:
            cached, written = 0, cached
            return Fault(written / rate)
        cached += operation.length if operation.kind in CHANGES else 0
        return None

    return delayed


def _throttle(story: Story) -> None:
    story.world.replicas[1].image_faults.script = _throttled(CHANGES, RATE)


def _slow_sync(story: Story) -> None:
    story.world.replicas[1].image_faults.script = _slow_to_sync(RATE)


def _far(story: Story) -> None:
    story.slow_down(1, LATENCY_S)


async def _longest(guest: Guest, until: Callable[[], bool], *, writes: bool) -> float:
    """The longest that a guest waited, all over the disk (seconds)."""
    longest, number = 0.0, 0
    while not until():
        at = (number * 7 * BLOCK) % DISK
        began = trio.current_time()
        await (guest.write_surely(at) if writes else guest.read_surely(at))
        longest = max(longest, trio.current_time() - began)
        number += 1
        await trio.sleep(0.02)
    return longest


def _beside(slow: Callable[[Story], None], *, writes: bool) -> Script:
    """A guest that reads, or writes, all the time while a replica is resynced."""

    slow_s = LATENCY_S if slow is _far else 0.0

    async def beside_a_slow_target(story: Story) -> None:
        await ejected(story)
        slow(story)
        async with story.mounted() as guest:
            replica = guest.replica(1)
            await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
            current = lambda: replica.standing is Standing.CURRENT  # noqa: E731
            with trio.fail_after(60.0):
                longest = await _longest(guest, current, writes=writes)
            if longest > (WRITE_MAX_S + slow_s if writes else READ_MAX_S):
                raise BrokenError(f"the guest waited {longest:g} s")
        await story.ends_well()

    return beside_a_slow_target


async def killed_every_two_seconds(story: Story) -> None:
    """Each life brings it further, until it has everything."""
    await ejected(story)
    slow = _slow_sync if story.seed % 2 else _throttle
    before = DISK
    for _ in range(20):
        slow(story)
        async with story.mounted() as guest:
            with trio.move_on_after(2.0):
                await guest.converged()
            story.world.kill()
        sidecar = story.world.replicas[0].sidecar
        assert sidecar is not None
        lacking = decode(sidecar.whole).map.lacking_bytes(1)
        if not lacking:
            break
        if lacking >= before:
            raise BrokenError(f"it lacks {lacking} bytes still")
        before = lacking
    else:
        raise BrokenError("it never has everything")
    story.mend(1)
    await story.ends_well()


def _unmounted(slow: Callable[[Story], None]) -> Script:
    async def unmounted_amid_it(story: Story) -> None:
        await ejected(story)
        slow(story)
        async with story.mounted() as guest:
            replica = guest.replica(1)
            await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
            await trio.sleep(0.3 * story.seed)
            began = trio.current_time()
        if (took := trio.current_time() - began) > UNMOUNT_MAX_S:
            raise BrokenError(f"the unmount took {took:g} s")
        story.mend(1)
        story.world.replicas[1].image_faults.weather = story.world.replicas[0].image_faults.weather
        await story.ends_well()

    return unmounted_amid_it


def _hangs(*kinds: Kind) -> Callable[[Story], None]:
    def hang(story: Story) -> None:
        story.fail(1, kinds, Fault(hang=True))

    return hang


async def written_faster_than_it_takes(story: Story) -> None:
    """A guest that writes all of the disk faster than the target takes it, for ever: in its last
    passes it is given what is written, and becomes current."""
    await ejected(story)
    _throttle(story)
    async with story.mounted() as guest:

        async def write() -> None:
            with suppress(OSError):
                while True:
                    for at in range(0, DISK, CHUNK):
                        await guest.write(at)
                        await trio.sleep(0.02)

        guest.life.nursery.start_soon(write)
        await guest.until(lambda: guest.mounted.members == [0, 1])
        story.world.kill()
    story.mend(1)
    await story.ends_well()


async def not_given_what_is_written(story: Story) -> None:
    """A guest does not wait for the target at all in its first pass, wherever it writes."""
    await ejected(story)
    async with story.mounted() as guest:
        sidecars, replica = guest.mounted.sidecars, guest.replica(1)
        await guest.until(lambda: replica.standing is Standing.RESYNCING, every_s=0.001)
        story.slow_down(1, 3.0)
        for at in EXTENTS:
            began = trio.current_time()
            await guest.write(at)
            if trio.current_time() - began > 0.2:
                raise BrokenError("a write waited for the target")
            assert sidecars.ledger.map.any(out_of_sync(1), sidecars.ledger.map.chunks(at, BLOCK))
        story.world.kill()
    story.world.calm()
    await story.ends_well()


async def settled_beside_a_slow_one(story: Story) -> None:
    """After a crash one of the current replicas is slow: a read elsewhere, and one of what is being
    settled, does not wait for all of it."""
    async with story.holding(*EXTENTS, size=EXTENT).mounted() as guest:
        story.world.kill()
    story.world.replicas[1].image_faults.script = _throttled(CHANGES, RATE)
    async with story.mounted() as guest:
        settled = lambda: guest.mounted.even  # noqa: E731
        with trio.fail_after(60.0):
            longest = await _longest(guest, settled, writes=False)
        if longest > WRITE_MAX_S:
            raise BrokenError(f"the guest waited {longest:g} s")
    story.mend(1)
    await story.ends_well()


async def compared_beside_a_slow_one(story: Story) -> None:
    """The same while adopted images are compared."""
    kinds = frozenset({Kind.READ})
    story.world.replicas[1].image_faults.script = _throttled(kinds, RATE)
    async with story.mounted() as guest:
        compared = lambda: guest.mounted.even  # noqa: E731
        with trio.fail_after(60.0):
            longest = await _longest(guest, compared, writes=False)
        if longest > WRITE_MAX_S:
            raise BrokenError(f"the guest waited {longest:g} s")
    story.mend(1)
    await story.ends_well()


STORIES = [
    *[(_beside(slow, writes=False), PAIR) for slow in (_throttle, _slow_sync, _far)],
    *[(_beside(slow, writes=True), PAIR) for slow in (_throttle, _far)],
    (_beside(_throttle, writes=True), replace(TRIO, local=False)),
    (killed_every_two_seconds, PAIR),
    *[
        (_unmounted(slow), PAIR)
        for slow in (_throttle, _slow_sync, _far, _hangs(Kind.SYNC), _hangs(*CHANGES))
    ],
    (written_faster_than_it_takes, PAIR),
    (not_given_what_is_written, PAIR),
    (settled_beside_a_slow_one, PAIR),
    (compared_beside_a_slow_one, replace(RAW, fifo=True)),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(3)] == [None] * 3


def test_without_following_its_speed_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a guest hardly waits is due to units that follow the speed of the target."""
    monkeypatch.setattr(work_module, "LOCK_S", 1e9)
    assert [told(_beside(_throttle, writes=True), PAIR, seed) for seed in range(3)] != [None] * 3
