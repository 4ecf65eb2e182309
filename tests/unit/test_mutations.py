"""The simulation notices when a rule is not kept.

Each test switches one rule off, by replacing one small piece of the real runtime, and tells the
stories of that rule (`support.simulation.rule_stories`) until one ends badly.
"""

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.simulation.fate import TIMEOUT_S
from support.simulation.guest import BrokenError
from support.simulation.harness import run_seeded
from support.simulation.mutations import MUTATIONS
from support.simulation.rule_stories import TOLD, Told
from support.simulation.runner import BAD_ENDS
from support.simulation.setup import Origin, Setup
from support.simulation.storage import Effect, Fault, Weather
from support.simulation.story import (
    BLOCK,
    DISK,
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    RAW,
    TRIO,
    Script,
    Story,
    left_behind,
    told,
)

from quorumfs.assembly import (
    Found,
    State,
    assemble,
    judge_returned,
    new_record,
)
from quorumfs.control import snapshot
from quorumfs.dirtymap import UNVERIFIED, DirtyMap
from quorumfs.options import MountOptions
from quorumfs.repair import repairs as repairs_module
from quorumfs.repair.copying import Copying
from quorumfs.resolution import resolve
from quorumfs.sidecar import (
    ANCESTORS_MAX,
    SLOT_OFFSETS,
    Identity,
    Phase,
    RoleState,
    Sidecar,
)
from quorumfs.storage import CHANGES, Kind, Operation


async def an_internal_error_amid_a_resync(story: Story) -> None:
    """It is logged, and does not keep the replica from being brought back the next time."""
    await left_behind(story)
    async with story.mounted() as guest:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(Copying, "_take_over", _broken)
            await trio.sleep(1.0)
        assert len(story.errors.found) == 1
        story.errors.found.clear()
        await guest.converged()
    await story.ends_well()


async def _broken(*_: object) -> int:
    raise RuntimeError("on purpose")


async def a_target_that_cannot_be_written(story: Story) -> None:
    """It is there, and the status says what is wrong with it."""
    await left_behind(story)
    story.fail(1, CHANGES, Fault(error=errno.EIO))
    options = MountOptions("fifo", 1)
    seen = set()
    async with story.mounted() as guest:
        mounted = guest.mounted
        for _ in range(3000):
            await trio.sleep(0.01)
            one = snapshot.take("/mnt", options, mounted.disk, mounted.repairs, ()).replicas[1]
            seen.add((one.state, one.reason))
        story.mend(1)
        await guest.converged()
    await story.ends_well()
    assert {state for state, _ in seen} == {"stale", "resyncing"}
    assert ("stale", "simulated") in seen


async def a_write_fails_ahead_of_a_verification(story: Story) -> None:
    """What it left different was compared before it; that is nothing to ask an operator about."""
    for index in range(2):
        story.slow_down(index, 0.5)
    async with story.mounted() as guest:
        await guest.write_surely(EXTENTS[-1])
        story.fail_once(0, Kind.WRITE, Fault(error=errno.EIO))
        with suppress(OSError):
            await guest.write(EXTENTS[-1])
        assert guest.mounted.sidecars.ledger.doubts.unsettled
        assert guest.mounted.sidecars.ledger.map.count(UNVERIFIED)
        await guest.converged()
        if guest.mounted.repairs.differing:
            raise BrokenError(f"they are said to differ: {guest.mounted.repairs.differing}")
    await story.ends_well()


@pytest.mark.parametrize("case", TOLD, ids=lambda case: case.mutation)
def test_what_breaks_a_rule_is_noticed(case: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[case.mutation](monkeypatch)
    ends = []
    for seed in range(case.seeds):
        ends.append(told(case.script, case.setup, seed))
        if ends[-1] is not None and ends[-1].startswith(BAD_ENDS):
            return
    pytest.fail(f"nothing was noticed: {ends}")


def test_every_mutation_has_a_story() -> None:
    assert {case.mutation for case in TOLD} == MUTATIONS.keys()


async def all_hang_and_the_status_is_asked(story: Story) -> None:
    options = MountOptions("fifo", story.setup.threshold)
    async with story.mounted() as guest:
        await guest.write(0)
        for index in range(story.setup.replicas):
            story.world.detach(index, hang=True)
        for at in EXTENTS:
            guest.begin(guest.write, at)
            guest.begin(guest.read, at)
        guest.begin(guest.flush)
        await trio.sleep(TIMEOUT_S / 2)
        asked = len(story.world.trace)
        status = snapshot.take("/mnt", options, guest.mounted.disk, guest.mounted.repairs, ())
        assert len(story.world.trace) == asked
        assert [one.state for one in status.replicas] == ["current", "current"]
        assert all(one.in_flight for one in status.replicas)
        await trio.sleep(3 * TIMEOUT_S)
        status = snapshot.take("/mnt", options, guest.mounted.disk, guest.mounted.repairs, ())
        assert [one.state for one in status.replicas] == ["missing", "missing"]
        story.world.calm()
        await guest.converged()
    await story.ends_well()


def test_an_internal_error_costs_one_try() -> None:
    assert told(an_internal_error_amid_a_resync, PAIR, 0) is None


def test_a_replica_that_fails_again_is_there() -> None:
    assert told(a_target_that_cannot_be_written, PAIR, 0) is None


def test_the_status_waits_for_nobody() -> None:
    """P5: it is a plain function of what is in memory."""
    assert told(all_hang_and_the_status_is_asked, PAIR, 0) is None


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
            assert replica.role is State.CURRENT, f"{replica.path} is blamed: {replica.reason}"
    await story.ends_well()


async def too_few_are_left_after_a_crash(story: Story) -> None:
    """One is stale, one is away and comes back: nobody needs a new mount for that."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0)
        await guest.write(0)
        story.world.kill()
    story.world.attach(0)
    story.world.detach(1)
    async with story.mounted() as guest:
        await guest.until(
            lambda: len(guest.mounted.sidecars.ledger.members) == story.setup.threshold
        )
        await guest.write_surely(0)
        story.world.attach(1)
        await guest.converged()
    await story.ends_well()


async def gone_and_back_when_chunks_differ(story: Story) -> None:
    """Those who cannot be left behind are opened again before anything is made equal."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0)
        with suppress(OSError):
            await guest.write(0)
        assert guest.mounted.sidecars.ledger.doubts.unsettled
        await trio.sleep(10.0)
        story.world.attach(0)
        await guest.converged()
        await guest.write_surely(0)
    await story.ends_well()


async def a_hole_on_those_that_answer(story: Story) -> None:
    """The one that does not answer has data there: it is not settled for that."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(1, hang=True)
        for at in (0, EXTENT // 2):  # what hangs will happen, the second never reaches it
            with suppress(OSError):
                await guest.write(at)
        story.world.detach(0, hang=True)
        with suppress(OSError):
            await guest.read(0)
        story.world.attach(1)
        await trio.sleep(10.0)
        story.world.attach(0)
        await guest.converged()
    story.oracle.check_images(story.world.contents())
    await story.ends_well()


async def gone_and_back_after_a_commit_that_failed(story: Story) -> None:
    """Its sidecar has a record that led nowhere, and it cannot be left behind."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[1].sidecar_faults.plan(Kind.WRITE, Fault(error=errno.EIO))
        with suppress(OSError):
            await guest.mounted.sidecars.close()
        story.world.detach(0)
        with suppress(OSError):
            await guest.read(0)
        await trio.sleep(5.0)
        story.world.attach(0)
        await guest.converged()
        await guest.write_surely(0)
    await story.ends_well()


async def the_last_one_is_gone_and_back_after_a_resync_failed(story: Story) -> None:
    """Its record is later than the last one that all held."""
    await left_behind(story)
    async with story.mounted() as guest:
        broken = Weather(sync_fail=1.0)
        story.world.replicas[1].sidecar_faults.plan(Kind.SYNC, Fault())
        story.world.replicas[1].sidecar_faults.weather = broken
        await guest.until(
            lambda: not guest.mounted.sidecars.ledger.membership.recorded, every_s=0.01
        )
        story.world.detach(0)
        with suppress(OSError):
            await guest.read(0)
        await trio.sleep(5.0)
        story.world.calm()
        await guest.converged()
    await story.ends_well()


async def a_read_behind_a_write_that_fails(story: Story) -> None:
    """It waited for the lock, and finds what only one replica took."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        with suppress(OSError):
            await guest.read(0)
        story.world.kill()
    async with story.mounted() as guest:
        await guest.read(0)
    await story.ends_well()


async def rolled_back_and_resolved(story: Story) -> None:
    """Its sidecar is as old as its image, and no mark is left of what was written since."""
    async with story.mounted() as guest:
        await guest.write(0)
    snapshot_before = story.world.backup(1)
    async with story.mounted() as guest:
        await guest.write(0)
    story.world.roll_back(1, snapshot_before)
    resolution = resolve(story.world.found(), story.world.replicas[0].path)
    for index, one in enumerate(story.world.replicas):
        if one.path in resolution.sidecars:
            story.world.create_sidecar(index, resolution.sidecars[one.path])
    async with story.mounted() as guest:
        await guest.converged()
    story.oracle.check_images(story.world.contents())
    await story.ends_well()


async def two_commits_are_cut_off(story: Story) -> None:
    """One replica had only prepared the first; the second must not take that from it."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[2].sidecar_faults.plan(Kind.WRITE, Fault(), Fault(hang=True))
        guest.begin(guest.mounted.sidecars.close)
        await trio.sleep(1.0)
        story.world.kill()
    async with story.mounted() as guest:

        def torn(operation: Operation) -> Fault | None:
            is_slot = operation.kind is Kind.WRITE and operation.offset in SLOT_OFFSETS
            return Fault(error=errno.EIO, effect=Effect.PART) if is_slot else None

        for one in story.world.replicas:
            one.sidecar_faults.script = torn
        with suppress(OSError):
            await guest.write(0)
        story.world.kill()
    await story.ends_well()


async def both_fail_when_one_joins(story: Story) -> None:
    """The source is not left behind for one that has not joined yet: nobody might be left."""
    await left_behind(story)
    async with story.mounted() as guest:
        sidecars, failed = guest.mounted.sidecars, set()

        def fails_once(index: int, phase: Phase) -> Callable[[Operation], Fault | None]:
            def script(operation: Operation) -> Fault | None:
                is_slot = operation.kind is Kind.WRITE and operation.offset in SLOT_OFFSETS
                wrong = is_slot and sidecars.ledger.joining and operation.data[12] == phase
                if not wrong or index in failed:
                    return None
                failed.add(index)
                return Fault(error=errno.ENOSPC)

            return script

        for index, phase in enumerate((Phase.PREPARED, Phase.COMMITTED)):
            story.world.replicas[index].sidecar_faults.script = fails_once(index, phase)
        await guest.converged()
        await guest.write_surely(0)
    await story.ends_well()


async def resync_fails_in_a_commit_that_leaves_another_behind(story: Story) -> None:
    """What was prepared on the target is not forgotten: it is no other history."""
    await left_behind(story, 2)
    story.slow_down(2, 1.0)
    async with story.mounted() as guest:
        await guest.until(lambda: guest.mounted.sidecars.ledger.target is not None)
        torn = Fault(error=errno.EIO, effect=Effect.ALL)
        story.world.replicas[0].sidecar_faults.plan(Kind.WRITE, torn)
        story.world.replicas[2].sidecar_faults.plan(Kind.SYNC, Fault(), Fault(), torn)
        with suppress(OSError):
            await guest.mounted.sidecars.save_progress()
        story.world.detach(2)
        await guest.write(0)
    story.world.attach(2)
    await story.ends_well()


async def truncated_while_away(story: Story) -> None:
    """The daemon sees it too short, and later long enough: with zeros, not with its data."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at)
        await guest.flush()
        story.world.detach(0)
        await guest.write(0)
        story.world.replicas[0].image.truncate(EXTENT)
        story.world.attach(0)
        await guest.until(lambda: story.world.replicas[0].path in guest.life.seen_short)
        await trio.sleep(1.0)
        story.world.replicas[0].image.truncate(DISK)
        await guest.converged()
    await story.ends_well()


async def truncated_amid_its_resync(story: Story) -> None:
    await left_behind(story, 0)
    story.slow_down(0, 0.5)
    async with story.mounted() as guest:
        replica = guest.mounted.replica(0)
        assert replica is not None
        await guest.until(lambda: replica.role is State.RESYNCING)
        await trio.sleep(3.0)
        story.world.replicas[0].image.truncate(BLOCK)
        await guest.until(lambda: replica.role is not State.RESYNCING)
        story.world.replicas[0].image.truncate(DISK)
        await guest.converged()
    await story.ends_well()


async def truncated_between_mounts(story: Story) -> None:
    """After a crash, when no times are on record; the mount sees it too short."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at)
        await trio.sleep(4 * repairs_module.CLEAR_S)  # no mark is left of that
        story.world.detach(0)
        await guest.write(0)
        story.world.kill()
    story.world.attach(0)
    story.world.replicas[0].image.truncate(EXTENT)
    async with story.mounted() as guest:
        story.world.replicas[0].image.truncate(DISK)
        await guest.converged()
    await story.ends_well()


@pytest.mark.parametrize(
    ("script", "setup"),
    [
        (all_are_full_for_long, TRIO),
        (too_few_are_left_after_a_crash, TRIO),
        (gone_and_back_when_chunks_differ, EQUALS),
        (a_hole_on_those_that_answer, EQUALS),
        (gone_and_back_after_a_commit_that_failed, EQUALS),
        (the_last_one_is_gone_and_back_after_a_resync_failed, PAIR),
        (a_read_behind_a_write_that_fails, EQUALS),
        (a_write_fails_ahead_of_a_verification, replace(RAW, threshold=2)),
        (two_commits_are_cut_off, replace(TRIO, threshold=1)),
        (both_fail_when_one_joins, PAIR),
        (rolled_back_and_resolved, PAIR),
        (
            resync_fails_in_a_commit_that_leaves_another_behind,
            replace(TRIO, threshold=1),
        ),
        (truncated_while_away, PAIR),
        (truncated_amid_its_resync, PAIR),
        (truncated_between_mounts, PAIR),
    ],
)
def test_what_random_histories_found_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4


def test_one_that_was_away_for_many_generations_comes_back() -> None:
    """More than are remembered: the role says which one it was left with."""
    record = new_record(["/a", "/b"], DISK, 1)
    own = Sidecar(record.roles[1].replica_id, record, DirtyMap(DISK, record.chunk_size))
    later = record.with_state([1], RoleState.STALE).minted()
    for _ in range(ANCESTORS_MAX + 1):
        later = later.minted()
    assert record.generation not in later.history
    returned = judge_returned(later, 1, Found("/b", Identity(1, DISK), own))
    assert returned.state is State.STALE
    assert not returned.compare


def test_who_is_kept_is_current_even_if_it_was_being_caught_up() -> None:
    """The source of a resync is lost for ever: a mixture is better than nothing, if so wanted."""
    story = Story(0, replace(PAIR, origin=Origin.COPIED), only_the_copy_is_kept)
    run_seeded(0, story.run)


async def only_the_copy_is_kept(story: Story) -> None:
    (found,) = story.world.found([1])
    resolution = resolve([found], found.path)
    assert resolution.kept == (found.path,)
    plan = assemble([replace(found, sidecar=resolution.sidecars[found.path])])
    assert [member.state for member in plan.members] == [State.CURRENT]
