"""One story for each way to break a rule: it ends well with the rule, and badly without it.

Each story has some faults happen at the right moment, with the oracle beside it. With the rule it
must end well (`tests/unit/test_rules_kept.py`). With the mutation that switches the rule off it
must end badly (`tests/unit/test_mutations.py`), else nothing would tell if the rule were lost.

A story that depends on luck (what a power cut leaves, who is faster) is told with several seeds:
all of them must end well with the rule, and one must end badly without it.
"""

import errno
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle

import trio

from quorumfs.decisions.dirtymap import UNVERIFIED, out_of_sync
from quorumfs.decisions.model import Standing
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.sidecar import MAP_OFFSET
from quorumfs.disk.watchdog import TICK_S
from quorumfs.repair import repairs as repairs_module
from quorumfs.repair.inspection import Findings
from quorumfs.replica.storage import CHANGES, Kind, Operation
from support.sidecars import decode
from support.simulation.administrator import RefusedOrderError
from support.simulation.copies import copies_used_alike, mounted_alone_and_only_read
from support.simulation.fate import TIMEOUT_S
from support.simulation.guest import REQUEST_MAX_S
from support.simulation.media import SECTOR, Backup
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Effect, Fault, Weather
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
    ejected,
    taken_over_while_at_work,
)
from support.simulation.world import ReplicaBackup


@dataclass(frozen=True, slots=True)
class Told:
    """A rule that is not kept, and a story that shows it."""

    mutation: str
    script: Script
    setup: Setup = PAIR
    seeds: int = 1
    """With how many seeds it is told."""


async def _killed(story: Story) -> None:
    """A first mount, killed when the second replica has not yet got what the first one has."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail(1, CHANGES, Fault(hang=True))
        for at in EXTENTS:
            guest.begin(guest.write, at, EXTENT)
        await trio.sleep(2.0)
        story.world.kill()
    story.mend(1)


async def killed_amid_writes(story: Story) -> None:
    await _killed(story)
    await story.ends_well()


async def power_cut_after_writes(story: Story) -> None:
    async with story.holding(*EXTENTS).mounted():
        story.world.power_cut()
    await story.ends_well()


async def power_cut_long_after_writes(story: Story) -> None:
    async with story.holding(*EXTENTS).mounted():
        await trio.sleep(4 * repairs_module.CLEAR_S)
        story.world.power_cut()
    await story.ends_well()


async def too_few_take_a_write(story: Story) -> None:
    """And the next mount is without the only one that took it."""
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE)
        with suppress(OSError):
            await guest.write(0)
        story.world.kill()
    async with story.mounted([1, 2]) as guest:
        await guest.read(0)
    await story.ends_well()


async def too_few_take_a_write_and_all_stay(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE)
        with suppress(OSError):
            await guest.write(0)
        await trio.sleep(5.0)
    await story.ends_well()


async def all_are_full(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write_surely(0)
        for index in range(story.setup.replicas):
            story.fail(index, CHANGES, Fault(error=errno.ENOSPC))
        with suppress(OSError):
            await guest.write(0)
        for replica in guest.mounted.disk.replicas:
            if replica.standing is not Standing.CURRENT:
                raise BrokenError(f"{replica.path} is blamed: {replica.reason}")
        for index in range(story.setup.replicas):
            story.mend(index)
        await guest.write_surely(0)
    await story.ends_well()


async def killed_after_one_missed_a_write(story: Story) -> None:
    async with story.mounted() as guest:

        async def write_and_kill() -> None:
            await guest.write(0)
            story.world.kill()

        story.fail_once(0, Kind.WRITE)
        guest.begin(write_and_kill)
        await trio.sleep(10.0)
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def power_cut_after_one_missed_a_write(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0)
        await guest.write(0)
        await guest.flush()
        story.world.power_cut()
    story.world.attach(0)
    await story.ends_well()


async def pages_dropped_by_a_failed_flush(story: Story) -> None:
    """And read again from the medium at once."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        await guest.flush()
        story.evict(0)
        await guest.read(0)
    await story.ends_well()


async def pages_dropped_long_after_a_failed_flush(story: Story) -> None:
    """When the replica was long repaired."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        await guest.flush()
        await guest.converged()
        story.evict(0)
        await guest.read(0)
    await story.ends_well()


async def pages_dropped_where_all_must_agree(story: Story) -> None:
    """Nobody can be ejected for it, and before it is mended the daemon is killed."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        with suppress(OSError):
            await guest.flush()
        story.evict(0)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.read_surely(0)
    await story.ends_well()


async def guests_write_the_same_place(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        for at in EXTENTS:
            for _ in range(4):
                guest.begin(guest.write, at)
        await trio.sleep(2.0)
    await story.ends_well()


async def a_vote_beside_a_write(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        for _ in range(20):
            guest.begin(guest.write, 0)
            await trio.sleep(0.001)
            await guest.read_surely(0)
    await story.ends_well()


async def writes_beside_a_resync(story: Story) -> None:
    await ejected(story)
    story.slow_down(0, 0.3)
    async with story.mounted() as guest:
        for number in range(100):
            for at in EXTENTS:
                guest.begin(guest.write, at + number * BLOCK % EXTENT)
            await trio.sleep(0.5)
            if guest.mounted.converged:
                break
    await story.ends_well()


async def power_cut_amid_a_resync(story: Story) -> None:
    await ejected(story)
    story.slow_down(1, 3.0)
    async with story.mounted():
        await trio.sleep(8.0 + 2.0 * story.seed)
        story.world.power_cut()
    await story.ends_well()


async def killed_amid_a_slow_resync(story: Story) -> None:
    """What was copied by then need not be copied again."""
    await ejected(story)
    async with story.mounted() as guest:
        guest.mounted.repairs.limit = 1 << 10
        await trio.sleep(60.0)
        story.world.kill()
    async with story.mounted() as guest:
        if guest.mounted.sidecars.ledger.map.lacking_bytes(1) > DISK - 32 * 1024:
            raise BrokenError("the resync begins anew")
    await story.ends_well()


async def _loses_a_page_and_has_no_space_for_it(story: Story, guest: Guest) -> None:
    """The first; the others have made it durable."""
    await guest.write_surely(0)
    story.fail_writeback(0)
    story.fail(0, [Kind.WRITE], Fault(error=errno.ENOSPC))
    with suppress(OSError):
        await guest.flush()


NOTHING_LOST = Fault(error=errno.EIO, effect=Effect.ALL)


async def a_sync_fails_of_one_that_was_given_nothing(story: Story) -> None:
    """Another one was, again and again: the one that holds it durably lost nothing by that."""
    async with story.mounted() as guest:
        await _loses_a_page_and_has_no_space_for_it(story, guest)
        for _ in range(4):
            await trio.sleep(40.0)  # meanwhile it is tried again
            for index in range(1, story.setup.replicas):
                story.fail_once(index, Kind.SYNC, NOTHING_LOST)
                with suppress(OSError):
                    await guest.flush()
        story.mend(0)
        await guest.converged()
        await guest.read_surely(0)
    await story.ends_well()


async def a_sync_fails_of_the_last_that_holds_it(story: Story) -> None:
    """It may have lost what was written beside it since, and holds the rest durably."""
    async with story.mounted() as guest:
        await _loses_a_page_and_has_no_space_for_it(story, guest)
        story.mend(0)
        await guest.write(BLOCK)
        for index in range(1, story.setup.replicas):
            story.fail_once(index, Kind.SYNC, NOTHING_LOST)
        with suppress(OSError):
            await guest.flush()
        await guest.converged()
        await guest.read_surely(0)
    await story.ends_well()


def away_and_lost(away: int, *, known: bool) -> Script:
    """While one of two is *away*, the other one loses what both were given.

    Who is away may hold it yet. *known*: it was missed before the flush.
    """

    async def script(story: Story) -> None:
        async with story.mounted() as guest:
            await guest.write_surely(0)
            story.world.detach(away)
            if known:
                with suppress(OSError):
                    await guest.write(EXTENTS[2])
                await guest.until(lambda: guest.replica(away).image is None)
            story.fail_writeback(1 - away)
            try:
                await guest.flush()
            except OSError:
                pass
            else:
                raise BrokenError("a flush succeeded over what is nowhere for sure")
            await trio.sleep(10.0)
            story.world.attach(away)
            await trio.sleep(10.0)
            try:
                await guest.flush()
            except OSError as error:
                raise BrokenError(f"a loss was told twice: {error}") from error
            await guest.converged()
            await guest.read_surely(0)
        await story.ends_well()

    script.__name__ = f"{away}_is_away_and_" + ("missed" if known else "not_missed_yet")
    return script


def both_are_gone(first: int) -> Script:
    """A flush failed for what both may have lost. The *first* one to be back still has it, is shown
    and synced; then the other one is back without it. Opening files anew is no second loss.
    """

    async def script(story: Story) -> None:
        async with story.mounted() as guest:
            await guest.write(0)
            story.world.detach(first)
            story.world.detach(1 - first, lose_cache=True)
            with suppress(OSError):
                await guest.flush()
            story.world.attach(first)
            await guest.until(lambda: guest.replica(first).image is not None)
            for _ in range(20):
                with suppress(OSError):
                    await guest.read(0)
                    await guest.flush()
                await trio.sleep(1.0)
            story.world.attach(1 - first)
            await guest.until(lambda: guest.replica(1 - first).image is not None)
            await guest.converged()
            await guest.read_surely(0)
        await story.ends_well()

    script.__name__ = f"both_are_gone_and_{first}_is_back_first"
    return script


async def a_flush_that_is_cut_off(story: Story) -> None:
    """One has failed, and the other is awaited, when nobody waits for the flush any more: as for
    an administrator's order at the unmount. The next flush counts the failed one."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.SYNC)
        story.world.replicas[1].image_faults.plan(Kind.SYNC, Fault(4.0))
        with trio.move_on_after(1.0):
            await guest.mounted.disk.mirror.sync()
        assert guest.mounted.sidecars.ledger.content.pending
        story.evict(0)
        with suppress(OSError):  # where both have to have it, only one has
            await guest.flush()
        await guest.read_surely(0)
        await guest.converged()
        await guest.flush()
        story.evict(0)
        story.world.power_cut()
    async with story.mounted() as guest:
        await guest.read_surely(0)
    await story.ends_well()


async def repaired_is_on_record_before_it_is_shown(story: Story) -> None:
    """Killed at that moment, the next mount must believe the one that was given it, too."""
    async with story.mounted() as guest:
        await _loses_a_page_and_has_no_space_for_it(story, guest)
        story.mend(0)
        await guest.read(0)
        for one in story.world.replicas:
            assert one.sidecar is not None
            if decode(one.sidecar.whole).map.any(out_of_sync(0), range(1)):
                raise BrokenError("a repair is shown before it is on record")
    await story.ends_well()


async def each_loses_what_the_other_one_holds(story: Story) -> None:
    """The second loses what was written beside what the first lost before."""
    async with story.mounted() as guest:
        await _loses_a_page_and_has_no_space_for_it(story, guest)
        story.mend(0)
        await guest.write(BLOCK)
        for index in range(1, story.setup.replicas):
            story.fail_writeback(index)
        with suppress(OSError):
            await guest.flush()
        await guest.converged()
        await guest.read_surely(0)
        await guest.read_surely(BLOCK)
    await story.ends_well()


async def each_sync_fails_of_those_that_others_are_repaired_from(story: Story) -> None:
    """They hold it durably, and are not given anew what they could lose."""
    async with story.mounted() as guest:
        await _loses_a_page_and_has_no_space_for_it(story, guest)
        others = range(1, story.setup.replicas)
        for index in others:
            story.fail(index, [Kind.SYNC], NOTHING_LOST)
        await trio.sleep(60.0)
        for index in (0, *others):
            story.mend(index)
        await guest.converged()
        await guest.read_surely(0)
    await story.ends_well()


async def a_close_fails(story: Story) -> None:
    """As a network file system says of what it could not write; it comes back all the same."""
    one = story.world.replicas[1]
    async with story.mounted() as guest:
        story.fail_once(1, Kind.WRITE)
        story.fail_once(1, Kind.CLOSE)
        one.sidecar_faults.plan(Kind.CLOSE, Fault(delay_s=2.0))
        await guest.write(0)
        await guest.converged()
    await story.ends_well()


async def source_unreadable_amid_a_resync(story: Story) -> None:
    await ejected(story)
    story.fail(0, [Kind.READ])
    async with story.mounted() as guest:
        await trio.sleep(5.0)
        story.mend(0)
        await guest.converged()
    await story.ends_well()


async def power_cut_after_a_resync(story: Story) -> None:
    """What was flushed beside it must be on the replica that others are settled from."""

    await ejected(story, 0)
    for one in story.world.replicas:
        one.sidecar_faults.weather = Weather(delay_s=(0.2, 0.2))
    story.fail(0, {Kind.SYNC}, Fault(delay_s=0.7))
    story.fail(1, {Kind.SYNC}, Fault(delay_s=0.2))
    async with story.mounted() as guest:
        sidecars = guest.mounted.sidecars
        places = cycle(EXTENTS)
        while guest.mounted.disk.replicas[0].standing is not Standing.CURRENT:
            await guest.write(next(places))
            if not sidecars.ledger.joining:  # from then on flushes go to it too
                await guest.flush()
        await guest.until(lambda: sidecars.ledger.target is None)
        story.world.power_cut()
    await story.ends_well()


async def power_cut_long_after_a_write_beside_a_resync(story: Story, index: int = 1) -> None:
    """The resync is so slow that the write is not synced on its target by then."""
    await ejected(story, index)
    async with story.mounted() as guest:
        guest.mounted.repairs.limit = 256
        sidecars = guest.mounted.sidecars
        chunks = sidecars.ledger.map.chunks(0, BLOCK)
        await guest.until(lambda: not sidecars.ledger.map.any(out_of_sync(index), chunks))
        assert sidecars.ledger.target is not None
        sidecars.ledger.target.mirroring = True
        await guest.write(0)
        for _ in range(70):
            await trio.sleep(1.0)
            if not sidecars.ledger.prepared(0, BLOCK):
                break
        story.world.power_cut()
    await story.ends_well()


async def power_cut_long_after_a_write_beside_a_resync_of_the_first(story: Story) -> None:
    await power_cut_long_after_a_write_beside_a_resync(story, 0)


async def written_anew_once_it_was_copied(story: Story) -> None:
    """By the fast path: the extent was marked before, and the resync is still elsewhere."""
    await ejected(story)
    async with story.mounted() as guest:
        guest.mounted.repairs.limit = 256
        await guest.write(EXTENT - BLOCK)
        sidecars = guest.mounted.sidecars
        chunks = sidecars.ledger.map.chunks(0, BLOCK)
        await guest.until(lambda: not sidecars.ledger.map.any(out_of_sync(1), chunks))
        await guest.write(0)
        guest.mounted.repairs.limit = None
        await guest.converged()
    await story.ends_well()


async def a_write_lands_after_its_replica_was_given_up(story: Story) -> None:
    """It reaches its replica when that has long been given up."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_once(1, Kind.WRITE, Fault(hang=True))
        await guest.write(0)
        await trio.sleep(60.0)
        await guest.write(0)
        story.world.release(1)
        await guest.converged()
        await guest.read(0)
    await story.ends_well()


async def maps_torn_after_a_kill(story: Story) -> None:
    await _killed(story)
    for one in story.world.replicas:
        assert one.sidecar is not None
        one.sidecar.rot(MAP_OFFSET + 512, b"torn" * 128)
    await story.ends_well()


async def a_torn_record(story: Story) -> None:
    """One was ejected, and the only sidecar that says so is torn by the next commit."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0)
        await guest.write(0)
        torn = Fault(error=errno.EIO, effect=Effect.PART)
        story.world.replicas[1].sidecar_faults.plan(Kind.WRITE, torn)
        with suppress(OSError):
            await guest.mounted.sidecars.close()
        story.world.kill()
    story.world.attach(0)
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def truncated_underneath(story: Story) -> None:
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        story.world.replicas[0].image.truncate(EXTENT)
        await guest.read(EXTENTS[-1])
        story.world.replicas[0].image.truncate(DISK)
        await guest.converged()
        for at in EXTENTS:
            await guest.read(at)
    await story.ends_well()


async def source_lost_after_a_crash(story: Story) -> None:
    """What was read from it must not turn back."""
    await _killed(story)
    async with story.mounted() as guest:
        await guest.read_surely(0, DISK)
        story.world.detach(0)
        await guest.read_surely(0, DISK)
    story.world.attach(0)
    await story.ends_well()


async def only_the_ejected_one_is_there(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(1)
        await guest.write(0)
    story.world.attach(1)
    with suppress(AssemblyRefusedError):
        async with story.mounted([1]) as guest:
            await guest.read(0)
    await story.ends_well()


async def one_hangs(story: Story) -> None:
    """It costs the first write a timeout, and no other request anything."""
    async with story.holding(*EXTENTS).mounted() as guest:
        story.world.detach(0, hang=True)
        began = trio.current_time()
        for number in range(20):
            request = guest.write if number == 10 else guest.read_surely
            before = trio.current_time()
            await request(EXTENTS[number % len(EXTENTS)])
            took = trio.current_time() - before
            if took > (TIMEOUT_S + 2 * TICK_S if number == 10 else 1.0):
                raise BrokenError(f"request {number} waited for the hung replica: {took:.1f} s")
        assert trio.current_time() - began >= TIMEOUT_S
    await story.ends_well()


async def touched_when_it_was_ejected(story: Story) -> None:
    """A wrong clock makes the stale image the younger one."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0)
        await guest.write(0)
        story.world.kill()
    story.world.attach(0)
    image = story.world.replicas[0].image
    while image.identity.mtime_ns <= story.world.replicas[1].image.identity.mtime_ns:
        image.edit(0, image.cache.read(0, SECTOR))
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def one_hangs_for_good(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0, hang=True)
        with trio.move_on_after(REQUEST_MAX_S) as scope:
            await guest.write_surely(0)
        if scope.cancelled_caught:
            raise BrokenError("a write waits for a hung replica for ever")
    await story.ends_well()


async def the_first_rots_before_a_crash(story: Story) -> None:
    async with story.holding(0).durable().mounted() as guest:
        story.world.replicas[0].image.rot(0, WRONG)
        await guest.write(2 * BLOCK)
        story.world.kill()
    await story.ends_well()


async def rolled_back_by_seconds(story: Story) -> None:
    async with story.holding(0).durable().mounted() as guest:
        await trio.sleep(2.0)
        snapshot_before = story.world.backup(0)
        await guest.write(0)
        await guest.flush()
        story.world.detach(0)
        await guest.write(EXTENTS[3])
        await guest.until(lambda: 0 not in guest.mounted.members)
        story.world.roll_back(0, snapshot_before)
        story.world.attach(0)
        await guest.until(lambda: 0 in guest.mounted.members)
        await guest.read(0)
    await story.ends_well()


async def an_empty_image_after_a_kill(story: Story) -> None:
    empty = ReplicaBackup(story.world.backup(0).image, None)
    async with story.holding(0).durable().mounted():
        story.world.kill()
    story.world.detach(0)
    story.world.restore(0, empty, sidecar=False)
    story.world.attach(0)
    await story.ends_well()


async def goes_and_comes_back(story: Story, guest: Guest, image: Backup | None = None) -> None:
    """The first replica hangs, is ejected, and answers again, by the same mount; perhaps for
    another *image*."""
    story.world.detach(0, hang=True)
    await guest.write(EXTENTS[3])
    await guest.until(lambda: 0 not in guest.mounted.members)
    if image is not None:
        story.world.restore(0, ReplicaBackup(image, None), sidecar=False, anew=False)
    story.world.attach(0)


async def an_old_image_behind_a_mount_that_stays(story: Story) -> None:
    """Its server comes back without what it had got, and no mark is left of that."""
    async with story.holding(0).durable().mounted() as guest:
        old = story.world.backup(0).image
        await guest.write(EXTENTS[1])
        await guest.flush()
        await trio.sleep(300)
        await goes_and_comes_back(story, guest, old)
        await guest.until(lambda: 0 in guest.mounted.members)
        await guest.read_surely(EXTENTS[1])
    await story.ends_well()


async def an_old_image_after_a_kill(story: Story) -> None:
    """Behind a mount that stays; the other image is on a local file system, and proves itself."""
    story.world.replicas[1].instance = None
    async with story.mounted() as guest:
        await guest.converged()
    old = ReplicaBackup(story.world.backup(0).image, None)
    async with story.holding(0).durable().mounted():
        story.world.kill()
    story.world.restore(0, old, sidecar=False, anew=False)
    await story.ends_well()


async def a_sector_is_bad_everywhere(story: Story) -> None:
    async with story.holding(0, size=EXTENT).durable().mounted() as guest:
        story.world.kill()

    def unreadable(operation: Operation) -> Fault | None:
        touched = operation.offset <= BLOCK < operation.offset + operation.length
        return Fault(error=errno.EIO) if touched and operation.kind is Kind.READ else None

    for one in story.world.replicas:
        one.image_faults.script = unreadable
    async with story.mounted() as guest:
        try:
            await guest.flush()
        except OSError as error:
            raise BrokenError(f"a bad sector fails a flush: {error}") from error
    story.world.calm()


async def all_lose_what_a_repair_hears_of(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (0, 1):
            story.world.lose_pages(index)
        story.oracle.lost(story.world.contents())
        with suppress(OSError):
            await guest.mounted.disk.mirror.sync()
        with suppress(OSError):
            await guest.flush()
    await story.ends_well()


async def only_one_can_sync(story: Story) -> None:
    """Then power is cut, and the next mount is without that one."""
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (1, 2):
            story.fail_once(index, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        story.world.power_cut()
    with suppress(AssemblyRefusedError):  # those who are here may know what only that one has
        async with story.mounted([1, 2]) as guest:
            await guest.read(0)
    await story.ends_well()


async def acknowledged_before_one_has_written(story: Story) -> None:
    """Write-ack is ``threshold``: who is behind is ejected first, and not read."""
    async with story.holding(EXTENTS[0]).mounted() as guest:
        story.fail_once(0, Kind.WRITE, Fault(delay_s=1.0))
        await guest.write(EXTENTS[0])
        await guest.read(EXTENTS[0])
    await story.ends_well()


async def a_flush_waits_for_one_that_fails(story: Story) -> None:
    """That one is told of the loss; this one is answered when all is durable after all."""
    await ejected(story)
    async with story.mounted([0]) as guest:
        await guest.write_surely(0)
        story.fail_once(0, Kind.SYNC, Fault(delay_s=1.0, error=errno.EIO))
        guest.begin(guest.flush)
        await trio.sleep(0.5)
        await guest.surely(guest.flush())
        story.world.power_cut()
    async with story.mounted([0]) as guest:
        await guest.read_surely(0)
    await story.ends_well()


async def power_cut_after_one_failed_to_sync(story: Story) -> None:
    """It lost its pages, and would be the one that others are settled from."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        await guest.flush()
        story.world.power_cut()
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def a_tie_of_two_and_two(story: Story) -> None:
    """Two replicas rot alike: nobody knows that they are the wrong ones, and so nothing is done."""
    images = [one.image for one in story.world.replicas]
    async with story.mounted() as guest:
        await guest.write(0)
        good = images[2].cache.read(0, BLOCK)
        for image in images[:2]:
            image.rot(0, WRONG)
        with suppress(OSError):
            await guest.mounted.disk.read(0, BLOCK)
        await trio.sleep(10.0)
        if any(image.cache.read(0, BLOCK) != good for image in images[2:]):
            raise BrokenError("a tie destroyed the good data")


async def writes_beside_a_verification(story: Story) -> None:
    for one in story.world.replicas:
        one.image_faults.weather = Weather(delay_s=(0.0, 0.5))
    async with story.mounted() as guest:
        for number in range(8):
            for at in EXTENTS:
                guest.begin(guest.write, at + number * BLOCK)
            await trio.sleep(0.2)
        await guest.until(lambda: not guest.mounted.sidecars.ledger.map.count(UNVERIFIED))
        if guest.mounted.repairs.differing:
            raise BrokenError(f"they are said to differ: {guest.mounted.repairs.differing}")
        locks = guest.mounted.disk.mirror.locks
        await guest.until(lambda: not any(locks.claimed()))  # it is unmounted when all has ended
    await story.ends_well()


async def writes_beside_a_scrub(story: Story) -> None:
    """To the same places again and again, so that a second look finds another write there."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at, EXTENT)
        for one in story.world.replicas:
            one.image_faults.weather = Weather(delay_s=(0.0, 0.5))
        scrub = guest.mounted.repairs.scrub
        scrub.begin(repair=False)

        async def write_on(at: int) -> None:
            while scrub.current is not None:
                await guest.write(at)

        for at in EXTENTS:
            guest.begin(write_on, at)
        await guest.until(lambda: scrub.current is None)
        if scrub.last.counts.mismatches:
            raise BrokenError(f"a scrub is said to have found {scrub.last.finds}")
        locks = guest.mounted.disk.mirror.locks
        await guest.until(lambda: not any(locks.claimed()))
    await story.ends_well()


async def writes_behind_late_answers(story: Story) -> None:
    """One of three is far, so that votes are decided without it; nothing has rotted."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[0].image_faults.weather = Weather(delay_s=(0.1, 0.5))
        for _ in range(20):
            await guest.read(0)
            await guest.write(0)
        await trio.sleep(5.0)
        counted = [one.counters.mismatches for one in guest.mounted.disk.replicas]
        if any(counted):
            raise BrokenError(f"mismatches are counted: {counted}")
    await story.ends_well()


async def the_first_to_answer_has_rotted(story: Story) -> None:
    async with story.holding(0).durable().mounted() as guest:
        for index in (1, 2):
            story.slow_down(index, 0.1)
        story.world.replicas[0].image.rot(0, WRONG)
        await guest.read(0)
        story.mend(1)
        story.mend(2)
        await trio.sleep(5.0)
        if not guest.mounted.disk.replicas[0].counters.mismatches:
            raise BrokenError("what has rotted is not told")
        story.world.replicas[0].image.rot(0, story.world.replicas[1].image.cache.read(0, BLOCK))
    await story.ends_well()


async def a_write_fails_on_some_before_they_are_compared(story: Story) -> None:
    """Another repair makes them equal; meanwhile they are said to differ by nobody."""
    async with story.holding(0, size=EXTENT).durable().mounted() as guest:
        for index in (1, 2):
            story.fail(index, CHANGES)
        with suppress(OSError):
            await guest.write(0)
        inspection, findings = guest.mounted.repairs.scrub.inspection, Findings()
        await inspection.look_closer(0, CHUNK, findings, repair=False)
        if findings.counts.mismatches:
            raise BrokenError(f"what is still to be settled is told: {findings.finds}")
        for index in (1, 2):
            story.mend(index)
        await guest.converged()
    await story.ends_well()


async def a_scrub_of_two_that_differ(story: Story) -> None:
    """Nothing tells which one is right, and what only one of them holds must not be lost."""
    async with story.holding(0).durable().mounted() as guest:
        first, second = (one.image for one in story.world.replicas)
        good = second.cache.read(0, BLOCK)
        first.rot(0, WRONG)
        scrub = guest.mounted.repairs.scrub
        scrub.begin(repair=True)
        await guest.until(lambda: scrub.current is None)
        if second.cache.read(0, BLOCK) != good:
            raise BrokenError("a tie destroyed the good data")
        if list(scrub.inspection.undecided) != [(0, BLOCK)]:
            raise BrokenError("what differs is not listed")


async def resync_of_a_sparse_disk(story: Story) -> None:
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(1)
        for at in EXTENTS:
            await guest.write(at)
        story.world.attach(1)
        await guest.converged()
        source, target = (one.image.cache for one in story.world.replicas)
        if target.allocated > source.allocated:
            raise BrokenError(
                f"{target.allocated} bytes of space, {source.allocated} on the source"
            )
    await story.ends_well()


async def one_is_away_for_long(story: Story) -> None:
    async with story.mounted() as guest:
        sidecars = guest.mounted.sidecars
        await guest.write(0)
        before = sidecars.ledger.record.generation
        story.world.detach(0)
        generations = set()
        for at in EXTENTS:
            await guest.write(at)
            generations.add(sidecars.ledger.record.generation)
        await guest.flush()
        await sidecars.close()
        generations.add(sidecars.ledger.record.generation)
        if len(generations) != 1 or before in generations:
            raise BrokenError(f"{len(generations)} generations after {before:x} for one absence")
    story.world.attach(0)
    await story.ends_well()


async def lost_before_the_first_write(story: Story) -> None:
    async with story.mounted(threshold=1) as guest:
        story.world.detach(1)
        await guest.write_surely(0)
    await story.ends_well()


ALL_OF_THREE = replace(TRIO, threshold=3)


async def written_again_and_lost(story: Story) -> None:
    """All was durable, and is written again at once; then one loses it."""
    async with story.holding(0).durable().mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.SYNC)
        await guest.flush()
        await guest.converged()
        story.evict(0)
        await guest.read(0)
    await story.ends_well()


async def written_beside_slow_zeros(story: Story) -> None:
    async with story.holding(0).mounted() as guest:
        story.fail_once(0, Kind.ZERO, Fault(delay_s=1.0))
        guest.begin(partial(guest._zeros, 0, BLOCK, discard=False))
        await trio.sleep(0.5)
        await guest.write(0)
        await trio.sleep(2.0)
    await story.ends_well()


async def written_beside_one_that_is_stuck(story: Story) -> None:
    async with story.holding(0).mounted() as guest:
        story.fail_once(0, Kind.WRITE, Fault(delay_s=1.0))
        guest.begin(guest.write, 0)
        await trio.sleep(0.5)
        await guest.write(0)
        await trio.sleep(2.0)
    await story.ends_well()


async def a_stuck_write_returns_late(story: Story) -> None:
    """Its replica was long given up by then, and others hold something newer."""
    async with story.holding(0).mounted() as guest:
        story.fail_once(0, Kind.WRITE, Fault(hang=True))
        await guest.write(0)
        await guest.write(0)
        await trio.sleep(5 * TIMEOUT_S)
        story.world.release(0)
        await guest.converged()
        await guest.read(0)
    await story.ends_well()


async def the_last_sync_of_one_that_leaves_fails(story: Story) -> None:
    """The one that notes its times: what the guest wrote was durable before it left."""
    async with story.holding(*EXTENTS).mounted() as guest:
        administrator = guest.administrator()
        story.fail_once(1, Kind.SEAL)
        await administrator.offline(1)
        await administrator.online(1)
        await guest.converged()
    await story.ends_well()


async def written_to_while_one_leaves(story: Story) -> None:
    """It is the disk as it was at one moment: no write is under way to it then."""

    async def write_on(at: int) -> None:
        for _ in range(40):
            await guest.write_surely(at)

    async with story.holding(*EXTENTS).mounted() as guest:
        story.slow_down(1, 0.05)
        async with trio.open_nursery() as nursery:
            for at in EXTENTS:
                nursery.start_soon(write_on, at)
            await trio.sleep(0.5)
            await guest.administrator().offline(1)
    await story.ends_well()


async def killed_after_one_was_taken_out(story: Story) -> None:
    async with story.holding(*EXTENTS).mounted() as guest:
        await guest.administrator().offline(1)
        await guest.write(0)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.write(EXTENT)
    await story.ends_well()


async def killed_after_the_threshold_was_lowered(story: Story) -> None:
    async with story.holding(*EXTENTS).mounted() as guest:
        await guest.administrator().change_threshold(1)
        story.world.detach(1)
        await guest.write_surely(0)
        story.world.kill()
    await story.ends_well()


async def lowered_by_fewer_than_it_was(story: Story) -> None:
    """The others, which did not hear of it, are as many as the old threshold."""
    async with story.holding(*EXTENTS).mounted() as guest:
        others = [story.world.replicas[index].sidecar_faults for index in (1, 2)]
        for faults in others:
            faults.script = lambda operation: EIO if operation.kind is Kind.WRITE else None
        with suppress(RefusedOrderError):
            await guest.administrator().change_threshold(1)
        with suppress(OSError):
            await guest.write(0)
        story.world.kill()
        for faults in others:
            faults.script = None
    async with story.mounted([1, 2]) as guest:
        await guest.read(0)
    await story.ends_well()


async def all_lose_what_an_order_hears_of(story: Story) -> None:
    """The administrator is not the one who is to be told."""
    async with story.holding(*EXTENTS).mounted() as guest:
        indices = range(story.setup.replicas)
        for index in indices:
            story.world.lose_pages(index)
        story.oracle.lost(story.world.contents())
        with suppress(RefusedOrderError):
            await guest.administrator().offline(1)
        with suppress(OSError):
            await guest.flush()
        await guest.surely(guest.flush())
    await story.ends_well()


async def power_cut_after_the_disk_grew(story: Story) -> None:
    async with story.holding(0).durable().mounted() as guest:
        await guest.grow(DISK + EXTENT)
        story.world.power_cut()
    try:
        async with story.mounted() as guest:
            story.sized(guest.mounted.disk.size)
            await guest.read_surely(DISK)
            await guest.write_surely(DISK)
    except AssemblyRefusedError as error:
        raise BrokenError(f"a disk that grew cannot be mounted: {error}") from error
    await story.ends_well()


FAST = replace(PAIR, fast=1.0)

TOLD = (
    Told("R1 no intent", killed_amid_writes, seeds=4),
    Told("R1 intent in memory", killed_amid_writes, seeds=4),
    Told("R1 intent not synced", power_cut_after_writes, seeds=8),
    Told("R1 gate looks at no bits", power_cut_after_writes, FAST, 8),
    Told("R2 one is enough", too_few_take_a_write, TRIO),
    Told("R2 failed is settled", too_few_take_a_write_and_all_stay, TRIO, 3),
    Told("R2 all are blamed", all_are_full, TRIO),
    Told("R3 in memory", killed_after_one_missed_a_write),
    Told("R3 not awaited", killed_after_one_missed_a_write),
    Told("R3 not synced", power_cut_after_one_missed_a_write, seeds=8),
    Told("R3 always minted", one_is_away_for_long),
    Told("R3 options in memory", lost_before_the_first_write, EQUALS),
    Told("R3 ordered in memory", killed_after_one_was_taken_out),
    Told("R3 threshold in memory", killed_after_the_threshold_was_lowered, EQUALS),
    Told("R3 threshold lowered by few", lowered_by_fewer_than_it_was, TRIO),
    Told("R4 failure ignored", pages_dropped_by_a_failed_flush),
    Told("R4 compares", pages_dropped_long_after_a_failed_flush),
    Told("R4 nothing lost", pages_dropped_long_after_a_failed_flush),
    Told("R4 loss in memory", pages_dropped_where_all_must_agree, EQUALS),
    Told("R4 all were given it", a_sync_fails_of_one_that_was_given_nothing, EQUALS),
    Told("R4 lost by the last", a_sync_fails_of_the_last_that_holds_it, EQUALS),
    Told("R4 away is lost", away_and_lost(0, known=True), EQUALS),
    Told("R4 gone twice", both_are_gone(0), EQUALS, seeds=4),
    Told("R4 cut off", a_flush_that_is_cut_off, EQUALS),
    Told("R4 repaired in memory", repaired_is_on_record_before_it_is_shown, EQUALS),
    Told("R4 written beside a loss", each_loses_what_the_other_one_holds, EQUALS),
    Told("R4 written beside a loss", each_loses_what_the_other_one_holds, ALL_OF_THREE),
    Told("R4 given for nothing", each_sync_fails_of_those_that_others_are_repaired_from, EQUALS),
    Told("R4 journal forgotten", written_again_and_lost, FAST),
    Told("R5 cleared at once", power_cut_after_writes, seeds=6),
    Told("R5 no flush", power_cut_long_after_writes, seeds=6),
    Told(
        "R5 one is out",
        power_cut_long_after_a_write_beside_a_resync,
        seeds=8,
    ),
    Told("R5 one is out", power_cut_long_after_a_write_beside_a_resync_of_the_first, seeds=8),
    Told("R6 nothing conflicts", guests_write_the_same_place, seeds=3),
    Told("R6 votes", a_vote_beside_a_write, EQUALS),
    Told("R6 repairs", writes_beside_a_resync, seeds=3),
    Told("R6 gate ignores locks", written_beside_slow_zeros, replace(FAST, zero_kind=Kind.ZERO)),
    Told("R6 taken without a lock", written_beside_one_that_is_stuck, FAST),
    Told("R7 forgotten", a_write_lands_after_its_replica_was_given_up, seeds=3),
    Told("R7 opened while open", a_close_fails),
    Told("R7 closed together", a_close_fails),
    Told("R7 taken is forgotten", a_stuck_write_returns_late, FAST),
    Told("R8 not synced", power_cut_amid_a_resync, seeds=6),
    Told("R8 joins unsynced", power_cut_after_a_resync, seeds=8),
    Told("R8 no writes", writes_beside_a_resync, seeds=3),
    Told("R8 holes are written", resync_of_a_sparse_disk),
    Told("R8 gate ignores the target", written_anew_once_it_was_copied, FAST),
    Told("R9 torn is clean", maps_torn_after_a_kill, seeds=4),
    Told("R9 in place", a_torn_record, seeds=3),
    Told("R10 zeros", truncated_underneath),
    Told("R10 short copy", source_unreadable_amid_a_resync),
    Told("R14 no identity", copies_used_alike),
    Told("R14 opened is changed", mounted_alone_and_only_read),
    Told("P3 saved rarely", killed_amid_a_slow_resync),
    Told("P3 leaves unsynced", the_last_sync_of_one_that_leaves_fails),
    Told("P3 leaves unlocked", written_to_while_one_leaves, seeds=2),
    Told("R10 forgotten", truncated_underneath),
    Told("R10 recorded before it is longer", power_cut_after_the_disk_grew),
    Told("R10 longer, and not durable", power_cut_after_the_disk_grew, seeds=8),
    Told("R12 latest by mtime", touched_when_it_was_ejected),
    Told("R12 wall clock", one_hangs_for_good),
    Told("P9 source decides", the_first_rots_before_a_crash, TRIO),
    Told("P9 first answer decides", the_first_to_answer_has_rotted, replace(TRIO, threshold=1)),
    Told("P2 bad sector", a_sector_is_bad_everywhere),
    Told("R15 log believed", rolled_back_by_seconds),
    Told("R15 all proven", an_empty_image_after_a_kill, replace(PAIR, passing=True)),
    Told(
        "R15 last writes believed",
        an_old_image_behind_a_mount_that_stays,
        replace(PAIR, passing=True),
    ),
    Told("R15 a mount vouches", an_old_image_after_a_kill, replace(PAIR, passing=True)),
    Told("R13 not told", all_lose_what_a_repair_hears_of),
    Told("R13 told to the administrator", all_lose_what_an_order_hears_of),
    Told("R14 not read back", taken_over_while_at_work, replace(PAIR, claims=True)),
    Told("R14 goes on", taken_over_while_at_work, replace(PAIR, claims=True)),
    Told(
        "P1 laggards count as done",
        acknowledged_before_one_has_written,
        replace(PAIR, behind_max_s=0.05),
    ),
    Told("P2 any sync is believed", a_flush_waits_for_one_that_fails),
    Told("P2 one sync is enough", only_one_can_sync, TRIO),
    Told("P2 record in memory", power_cut_after_one_failed_to_sync),
    Told("P4 ties are repaired", a_tie_of_two_and_two, QUAD),
    Told("P4 scrub believes the first", a_scrub_of_two_that_differ, EQUALS),
    Told("P5 every request waits", one_hangs),
    Told("P6 guessed", only_the_ejected_one_is_there),
    Told("P7 shown before settled", source_lost_after_a_crash, seeds=4),
    Told("P8 verified unlocked", writes_beside_a_verification, RAW, 4),
    Told("P8 late answers told", writes_behind_late_answers, TRIO, 4),
    Told("P8 scrubbed unlocked", writes_beside_a_scrub, TRIO, 4),
    Told("P8 scrubbed while settled", a_write_fails_on_some_before_they_are_compared, TRIO),
)
