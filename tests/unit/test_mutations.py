"""The simulation notices when a rule of order is not kept.

Each test switches one rule off, by replacing one small piece of the real runtime, and lets a story
happen on the simulated world: some faults at the right moment, and the oracle beside it. The story
must end well with the rule and badly without it, else nothing would tell if the rule were lost.

A story that depends on luck (what a power cut leaves, who is faster) is told with several seeds:
all of them must end well with the rule, and one must end badly without it.
"""

import errno
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import pytest
import trio
from support.simulation.harness import run_seeded
from support.simulation.runner import (
    CONVERGE_MAX_S,
    SCALES,
    TIMEOUT_S,
    BrokenError,
    History,
    Mounted,
    Setup,
    _first,
    _Guest,
)
from support.simulation.storage import Effect, Fault, SimulatedStorage, Weather
from support.simulation.world import Life

from quorumfs import sidecar
from quorumfs.assembly import AssemblyRefusedError, State, _Assembly
from quorumfs.control import snapshot
from quorumfs.dirtymap import INTENT, lacks
from quorumfs.disk import TICK_S
from quorumfs.metadata import Outcome
from quorumfs.metadata.sidecars import Sidecars, Unflushed
from quorumfs.options import MountOptions
from quorumfs.rangelock import Claim, RangeLock
from quorumfs.repair import repairs as repairs_module
from quorumfs.repair import work as work_module
from quorumfs.repair.pacing import Pacer
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.resync import Resync
from quorumfs.replica import Gathering, Replica
from quorumfs.sidecar import MAP_OFFSET, Phase, Record
from quorumfs.storage import CHANGES, Kind, Operation

BLOCK = 4096
EXTENT = SCALES[0].extent
DISK = SCALES[0].size
EXTENTS = range(0, DISK, EXTENT)

PAIR = Setup(
    replicas=2,
    threshold=1,
    scale=SCALES[0],
    fifo=True,
    rewrite_corrupted=False,
    zero_kind=None,
    adopted=False,
    filled=False,
    lives=0,
    careless=False,
)
TRIO = replace(PAIR, replicas=3, threshold=2, fifo=False)
EQUALS = replace(PAIR, threshold=2, fifo=False)


class Story(History):
    """A history that a test tells, instead of the dice."""

    def __init__(self, seed: int, setup: Setup, script: "Script") -> None:
        super().__init__(seed, setup)
        self._script = script

    async def _run(self) -> None:
        self._create()
        await self._script(self)

    @asynccontextmanager
    async def mounted(self, order: Sequence[int] | None = None) -> AsyncGenerator["Guest", None]:
        """A mount of these replicas, or of all, that ends in order unless it is dead by then."""
        paths = list(range(self.setup.replicas) if order is None else order)
        try:
            plan = self._assemble(paths, degraded=False, threshold=None)
        except AssemblyRefusedError as error:
            self._require_reason(error, paths, degraded=False, threshold=None)
            raise
        self._last = None
        async with self.world.boot() as life:
            mounted = self._mount(life, paths, plan)
            yield Guest(self, life, mounted)
            if not life.dead:
                await self._unmount(mounted)
        self._check_log()
        if self._closed_well:
            self._note_cuts()
        else:
            self._crashed(lost_cache=False)

    async def ends_well(self) -> None:
        """Faults stop, and everything becomes good."""
        await self._end()

    def fail(self, index: int, kinds: Iterable[Kind], fault: Fault) -> None:
        """From now on these operations on the image of a replica have *fault*."""
        faults, wrong = self.world.replicas[index].image_faults, frozenset(kinds)
        faults.script = lambda operation: fault if operation.kind in wrong else None

    def fail_once(self, index: int, kind: Kind, fault: Fault) -> None:
        """The next operation of *kind* on the image of a replica has *fault*."""
        self.world.replicas[index].image_faults.plan(kind, fault)

    def mend(self, index: int) -> None:
        """No more of that."""
        self.world.replicas[index].image_faults.script = None

    def slow_down(self, index: int, seconds: float) -> None:
        """Everything on the image of a replica takes so long."""
        self.world.replicas[index].image_faults.weather = Weather(delay_s=(seconds, seconds))


class Guest(_Guest):
    """Whoever uses a mount of a story."""

    def __init__(self, story: Story, life: Life, mounted: Mounted) -> None:
        story._guests += 1
        super().__init__(story, life, mounted.disk, story._guests, think_s=1.0)
        self.life = life
        self.mounted = mounted

    async def write(self, at: int, size: int = BLOCK) -> None:
        """Raises `OSError`."""
        await self._write(at, size, durable=False)

    async def write_surely(self, at: int, size: int = BLOCK) -> None:
        """Write what has to be possible."""
        try:
            await self.write(at, size)
        except OSError as error:
            raise BrokenError(f"a write failed without need: {error}") from error

    async def read(self, at: int, size: int = BLOCK) -> None:
        """Raises `OSError`."""
        await self._read(at, size)

    async def read_surely(self, at: int, size: int = BLOCK) -> None:
        """Read what has to be readable."""
        try:
            await self.read(at, size)
        except OSError as error:
            raise BrokenError(f"a read failed without need: {error}") from error

    async def flush(self) -> None:
        """Raises `OSError`."""
        await self._flush()

    def begin(self, request: Callable[..., Awaitable[None]], *arguments: int) -> None:
        """Have *request* under way; it may fail."""

        async def quietly() -> None:
            with suppress(OSError):
                await request(*arguments)

        self.life.nursery.start_soon(quietly)

    async def converged(self) -> None:
        """Wait until the replicas are the same again."""
        await self.until(lambda: self.mounted.converged)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what has to come."""
        for _ in range(int(CONVERGE_MAX_S)):
            if condition():
                return
            await trio.sleep(1.0)
        raise BrokenError(f"not so after {CONVERGE_MAX_S:g} s: {self.mounted}")


Script = Callable[[Story], Awaitable[None]]
Patch = Callable[[pytest.MonkeyPatch], None]


BAD_ENDS = ("ViolationError", "BrokenError")


def told(script: Script, setup: Setup, seed: int) -> str | None:
    """How a story ends: None if well."""
    story = Story(seed, setup, script)
    end = None
    try:
        run_seeded(seed, story.run)
    except* Exception as group:
        end = _first(group)
    return end


@dataclass(frozen=True, slots=True)
class Mutation:
    """A rule that is not kept, and a story that shows it."""

    name: str
    patch: Patch
    script: Script
    setup: Setup = PAIR
    seeds: int = 1
    """With how many seeds it is told."""


# Stories


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
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at)
        story.world.power_cut()
    await story.ends_well()


async def power_cut_long_after_writes(story: Story) -> None:
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at)
        await trio.sleep(4 * repairs_module.CLEAR_S)
        story.world.power_cut()
    await story.ends_well()


async def too_few_take_a_write(story: Story) -> None:
    """And the next mount is without the only one that took it."""
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE, Fault(error=errno.EIO))
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
            story.fail_once(index, Kind.WRITE, Fault(error=errno.EIO))
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
            if replica.role is not State.CURRENT:
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

        story.fail_once(0, Kind.WRITE, Fault(error=errno.EIO))
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
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.SYNC, Fault(error=errno.EIO))
        await guest.flush()
        story.world.replicas[0].image.evict()
        await guest.read(0)
    await story.ends_well()


async def pages_dropped_long_after_a_failed_flush(story: Story) -> None:
    """When the replica was long repaired."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.fail_once(0, Kind.SYNC, Fault(error=errno.EIO))
        await guest.flush()
        await guest.converged()
        story.world.replicas[0].image.evict()
        await guest.read(0)
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


async def _left_behind(story: Story, index: int = 1) -> None:
    """A first mount, closed in order, after which one replica lacks all there is."""
    async with story.mounted() as guest:
        story.fail(index, CHANGES, Fault(error=errno.EIO))
        for at in EXTENTS:
            await guest.write(at, EXTENT)
    story.mend(index)


async def writes_beside_a_resync(story: Story) -> None:
    await _left_behind(story)
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
    await _left_behind(story)
    story.slow_down(1, 3.0)
    async with story.mounted():
        await trio.sleep(8.0 + 2.0 * story.seed)
        story.world.power_cut()
    await story.ends_well()


async def killed_amid_a_slow_resync(story: Story) -> None:
    """What was copied by then need not be copied again."""
    await _left_behind(story)
    async with story.mounted() as guest:
        guest.mounted.repairs._work._pacer = Pacer(1024)
        await trio.sleep(60.0)
        story.world.kill()
    async with story.mounted() as guest:
        if guest.mounted.sidecars.map.lacking_bytes(1) > DISK - 32 * 1024:
            raise BrokenError("the resync begins anew")
    await story.ends_well()


async def an_internal_error_amid_a_resync(story: Story) -> None:
    """It is logged, and does not keep the replica from being brought back the next time."""
    await _left_behind(story)
    async with story.mounted() as guest:
        resync = guest.mounted.repairs._come_back._resync
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(resync, "_take_over", _broken)
            await trio.sleep(1.0)
        assert len(story._errors.found) == 1
        story._errors.found.clear()
        await guest.converged()
    await story.ends_well()


async def _broken(*_: object) -> int:
    raise RuntimeError("on purpose")


async def a_target_that_cannot_be_written(story: Story) -> None:
    """It is there, and the status says what is wrong with it."""
    await _left_behind(story)
    story.fail(1, CHANGES, Fault(error=errno.EIO))
    options = MountOptions("fifo", 1)
    seen = set()
    async with story.mounted() as guest:
        mounted = guest.mounted
        for _ in range(300):
            await trio.sleep(0.1)
            one = snapshot.take("/mnt", options, mounted.disk, mounted.repairs, ()).replicas[1]
            seen.add((one.state, one.reason))
        story.mend(1)
        await guest.converged()
    await story.ends_well()
    assert {state for state, _ in seen} == {"stale", "resyncing"}
    assert ("stale", "simulated") in seen


async def source_unreadable_amid_a_resync(story: Story) -> None:
    await _left_behind(story)
    story.fail(0, [Kind.READ], Fault(error=errno.EIO))
    async with story.mounted() as guest:
        await trio.sleep(5.0)
        story.mend(0)
        await guest.converged()
    await story.ends_well()


async def power_cut_after_a_resync(story: Story) -> None:
    """What was flushed beside it must be on the replica that others are settled from."""
    await _left_behind(story, 0)
    for one in story.world.replicas:
        one.sidecar_faults.weather = Weather(delay_s=(0.2, 0.2))
    async with story.mounted() as guest:
        while guest.mounted.disk.replicas[0].role is not State.CURRENT:
            for at in EXTENTS:
                await guest.write(at)
            await guest.flush()
        story.world.power_cut()
    await story.ends_well()


async def power_cut_long_after_a_write_beside_a_resync(story: Story) -> None:
    """The resync is so slow that the write is not synced on its target by then."""
    await _left_behind(story)
    async with story.mounted() as guest:
        guest.mounted.repairs._work._pacer = Pacer(1024)
        disk_map, marked = guest.mounted.sidecars.map, guest.mounted.sidecars._marked
        await guest.until(lambda: not disk_map.any(lacks(1), disk_map.chunks(0, BLOCK)))
        await guest.write(0)
        for _ in range(70):
            await trio.sleep(1.0)
            if not marked[0]:
                break
        story.world.power_cut()
    await story.ends_well()


async def a_late_write(story: Story) -> None:
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
    """One was left behind, and the only sidecar that says so is torn by the next commit."""
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
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at)
        await guest.flush()
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


async def only_the_one_left_behind_is_there(story: Story) -> None:
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
    """It costs the first request a timeout, and no other one anything."""
    async with story.mounted() as guest:
        for at in EXTENTS:
            await guest.write(at)
        story.world.detach(0, hang=True)
        began = trio.current_time()
        for number in range(10):
            before = trio.current_time()
            await guest.read_surely(EXTENTS[number % len(EXTENTS)])
            took = trio.current_time() - before
            if took > (1.0 if number else TIMEOUT_S + 2 * TICK_S):
                raise BrokenError(f"read {number} waited for the hung replica: {took:.1f} s")
        assert trio.current_time() - began >= TIMEOUT_S
    await story.ends_well()


# Mutations


def _always(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def no_intent(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: no write needs a mark, only a set that is in use."""

    def in_use(self: Sidecars, offset: int, length: int) -> bool:
        assert offset + length <= self.map.size
        return self._in_use and self._recorded

    monkeypatch.setattr(Sidecars, "prepared", in_use)


def intent_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: a mark counts as soon as it is made."""

    async def forget(self: Sidecars) -> None:
        for extent in self._to_mark:
            self._marked[extent] = 1
        self._to_mark.clear()

    monkeypatch.setattr(Sidecars, "_write_map_locked", forget)


def map_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R1: a mark counts as soon as it is written, and before it is durable."""
    _leave_out_syncs(monkeypatch, of_map=True)


def slots_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: a record counts as soon as it is written, and before it is durable."""
    _leave_out_syncs(monkeypatch, of_map=False)


def _leave_out_syncs(monkeypatch: pytest.MonkeyPatch, *, of_map: bool) -> None:
    """What is written to sidecars is not synced: pages of the map, or slots."""
    put, submit = Sidecars._put, Replica.submit
    unsynced = False

    async def noted(
        self: Sidecars, replicas: Sequence[Replica], pieces: Any
    ) -> dict[Replica, OSError]:
        nonlocal unsynced
        unsynced = isinstance(pieces, tuple) is of_map
        return await put(self, replicas, pieces)

    def without_syncs(
        self: Replica, operation: Operation, gathering: Gathering, *, to_sidecar: bool = False
    ) -> None:
        if to_sidecar and operation.kind is Kind.SYNC and unsynced:
            gathering.answered(operation)
        else:
            submit(self, operation, gathering, to_sidecar=to_sidecar)

    monkeypatch.setattr(Sidecars, "_put", noted)
    monkeypatch.setattr(Replica, "submit", without_syncs)


def one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: success below the threshold."""
    finish = Sidecars.finish

    async def lenient(
        self: Sidecars, outcomes: Sequence[Outcome], offset: int, length: int
    ) -> None:
        try:
            await finish(self, outcomes, offset, length)
        except OSError:
            if all(outcome.error for outcome in outcomes):
                raise

    monkeypatch.setattr(Sidecars, "finish", lenient)


def failed_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: who took a write that failed and who did not are still taken for equal."""
    monkeypatch.setattr(Sidecars, "_unsettle", _always(None))


def all_are_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """R2: whoever fails is left behind, whatever the others say; but for the last one."""
    finish = Sidecars.finish

    async def blame(self: Sidecars, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        failed = [outcome.replica for outcome in outcomes if outcome.operation.error]
        self._drop(failed[1:], "blamed")
        await finish(self, outcomes, offset, length)

    monkeypatch.setattr(Sidecars, "finish", blame)


def left_behind_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: the guest hears of success before it is on record who missed the write."""

    async def only_drop(
        self: Sidecars, failed: Sequence[Replica], chunks: range, reason: str
    ) -> None:
        self._drop([replica for replica in failed if replica.role is State.CURRENT], reason)

    monkeypatch.setattr(Sidecars, "_leave_behind", only_drop)


def left_behind_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """R3: the record is on its way when the guest hears of success."""
    leave_behind = Sidecars._leave_behind

    async def start(self: Sidecars, *arguments: Any) -> None:
        async def quietly() -> None:
            with suppress(OSError):
                await leave_behind(self, *arguments)

        nursery = trio.lowlevel.current_task().parent_nursery
        assert nursery is not None
        nursery.start_soon(quietly)

    monkeypatch.setattr(Sidecars, "_leave_behind", start)


def failed_flush_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who could not flush stays current."""

    async def ignore(self: Sidecars, outcomes: Sequence[Outcome]) -> None:
        self._flushing = Unflushed()

    monkeypatch.setattr(Sidecars, "finish_flush", ignore)


def resync_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: a resync leaves out what reads the same."""
    copy = Resync._copy

    async def comparing(
        self: Resync, target: Replica, offset: int, end: int, *, compare: bool
    ) -> None:
        await copy(self, target, offset, end, compare=True)

    monkeypatch.setattr(Resync, "_copy", comparing)


def failed_flush_lost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R4: who could not flush is left behind, but lacks nothing for that."""
    monkeypatch.setattr(Sidecars, "_lacks_unflushed", _always(None))


def cleared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: a mark goes when its write is acknowledged."""
    finish = Sidecars.finish

    async def eager(self: Sidecars, outcomes: Sequence[Outcome], offset: int, length: int) -> None:
        await finish(self, outcomes, offset, length)
        for extent in self.map.extents(offset, length):
            self._marked[extent] = 0
            self._remove(INTENT, self.map.extent_chunks(range(extent, extent + 1)))
        await self._write_map()

    monkeypatch.setattr(Sidecars, "finish", eager)


def cleared_without_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: a mark goes after a while, synced or not."""

    async def hasty(self: Repairs) -> None:
        while not self._work.stopping:
            await self._work.sleep(repairs_module.CLEAR_S)
            with suppress(OSError):
                await self._sidecars.clear_marks(self._disk.locks.exclusively_held)

    monkeypatch.setattr(Repairs, "_clear_marks", hasty)


def cleared_while_one_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """R5: a mark goes although not all replicas are current."""

    def in_use(self: Sidecars) -> bool:
        return self._in_use and self._recorded

    monkeypatch.setattr(Sidecars, "_all_current", in_use)


def nothing_conflicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: overlapping writes are not serialised."""
    monkeypatch.setattr(Claim, "conflicts", _always(value=False))


def reads_conflict_with_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: a vote may overlap a write."""
    conflicts = Claim.conflicts

    def between_writes(self: Claim, other: Claim) -> bool:
        return self.exclusive and other.exclusive and conflicts(self, other)

    monkeypatch.setattr(Claim, "conflicts", between_writes)


def repairs_do_not_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6: a repair reads, and then writes, beside the guest."""

    @asynccontextmanager
    async def unlocked(*_: object, **__: object) -> AsyncGenerator[None, None]:
        yield

    monkeypatch.setattr(RangeLock, "held", unlocked)


def given_up_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """R7: a request that was given up is taken for one that never was."""
    abandon_overdue = Replica.abandon_overdue

    def forget(self: Replica, now: float) -> None:
        abandon_overdue(self, now)
        self._abandoned.clear()

    monkeypatch.setattr(Replica, "abandon_overdue", forget)


def target_is_not_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: a chunk is called held as soon as it was written."""

    async def skip(self: Sidecars) -> None:
        self._target_unsynced = Unflushed()

    monkeypatch.setattr(Sidecars, "sync_target", skip)


def saved_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """P3: how far a resync is gets durable when it has copied much, however long that takes."""
    monkeypatch.setattr(work_module, "SAVE_S", 1e9)


def short_copy_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: what could not be read of the source counts as copied."""
    take_over = Resync._take_over

    async def credulous(self: Resync, target: Replica, offset: int, length: int) -> int:
        return length if await take_over(self, target, offset, length) >= 0 else 0

    monkeypatch.setattr(Resync, "_take_over", credulous)


def target_gets_no_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: what the guest writes during a resync goes to the current replicas alone."""
    arrange = Sidecars._arrange

    def without_target(self: Sidecars) -> None:
        arrange(self)
        self._receivers = self._members

    monkeypatch.setattr(Sidecars, "_arrange", without_target)


def joins_unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """R8: a replica becomes current before what guests wrote to it meanwhile is durable."""
    join, submit = Sidecars.join, Replica.submit
    joining: Replica | None = None

    async def noted(self: Sidecars) -> None:
        nonlocal joining
        joining = self.target
        try:
            await join(self)
        finally:
            joining = None

    def without_sync(
        self: Replica, operation: Operation, gathering: Gathering, *, to_sidecar: bool = False
    ) -> None:
        if self is joining and operation.kind is Kind.SYNC and not to_sidecar:
            gathering.answered(operation)
        else:
            submit(self, operation, gathering, to_sidecar=to_sidecar)

    monkeypatch.setattr(Sidecars, "join", noted)
    monkeypatch.setattr(Replica, "submit", without_sync)


def unreadable_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """R9: a torn page of the map says that nothing differs."""
    monkeypatch.setattr(sidecar, "UNKNOWN", 0)


def committed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """R9: one phase, over the only slot that says what is valid."""
    write_slots = Sidecars._write_slots

    async def one_phase(
        self: Sidecars, replicas: Sequence[Replica], record: Record, phase: Phase, *rest: object
    ) -> dict[Replica, OSError]:
        if phase is Phase.PREPARED:
            return {}
        return await write_slots(self, replicas, record, phase, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Sidecars, "_write_slots", one_phase)


def short_is_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: what is behind the end of a truncated image reads as zeros."""
    monkeypatch.setattr(SimulatedStorage, "_truncated", _always(value=False))


def truncated_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """R10: an image that was too short for a while is only as stale as its marks say."""
    monkeypatch.setattr(Sidecars, "truncated", _always(None))


def absent_ones_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """P6: whoever is there is mounted, whatever the others may hold."""

    def guess(self: _Assembly, *_: object, **__: object) -> tuple[str, int]:
        return "", self._threshold

    monkeypatch.setattr(_Assembly, "_absence_rule", guess)


def shown_before_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """P7: what may differ is read from its source, and only later given to the others."""
    monkeypatch.setattr(Sidecars, "may_differ", _always(value=False))


MUTATIONS = (
    Mutation("R1 no intent", no_intent, killed_amid_writes, seeds=4),
    Mutation("R1 intent in memory", intent_in_memory, killed_amid_writes, seeds=4),
    Mutation("R1 intent not synced", map_unsynced, power_cut_after_writes, seeds=8),
    Mutation("R2 one is enough", one_is_enough, too_few_take_a_write, TRIO),
    Mutation("R2 failed is settled", failed_is_settled, too_few_take_a_write_and_all_stay, TRIO, 3),
    Mutation("R2 all are blamed", all_are_blamed, all_are_full, TRIO),
    Mutation("R3 in memory", left_behind_in_memory, killed_after_one_missed_a_write),
    Mutation("R3 not awaited", left_behind_later, killed_after_one_missed_a_write),
    Mutation("R3 not synced", slots_unsynced, power_cut_after_one_missed_a_write, seeds=8),
    Mutation("R4 failure ignored", failed_flush_is_ignored, pages_dropped_by_a_failed_flush),
    Mutation("R4 compares", resync_compares, pages_dropped_long_after_a_failed_flush),
    Mutation("R4 nothing lost", failed_flush_lost_nothing, pages_dropped_long_after_a_failed_flush),
    Mutation("R5 cleared at once", cleared_at_once, power_cut_after_writes, seeds=6),
    Mutation("R5 no flush", cleared_without_flush, power_cut_long_after_writes, seeds=6),
    Mutation(
        "R5 one is out",
        cleared_while_one_is_out,
        power_cut_long_after_a_write_beside_a_resync,
        seeds=8,
    ),
    Mutation("R6 nothing conflicts", nothing_conflicts, guests_write_the_same_place, seeds=3),
    Mutation("R6 votes", reads_conflict_with_nothing, a_vote_beside_a_write, EQUALS),
    Mutation("R6 repairs", repairs_do_not_lock, writes_beside_a_resync, seeds=3),
    Mutation("R7 forgotten", given_up_is_forgotten, a_late_write, seeds=3),
    Mutation("R8 not synced", target_is_not_synced, power_cut_amid_a_resync, seeds=6),
    Mutation("R8 joins unsynced", joins_unsynced, power_cut_after_a_resync, seeds=8),
    Mutation("R8 no writes", target_gets_no_writes, writes_beside_a_resync, seeds=3),
    Mutation("R9 torn is clean", unreadable_is_clean, maps_torn_after_a_kill, seeds=4),
    Mutation("R9 in place", committed_in_place, a_torn_record, seeds=3),
    Mutation("R10 zeros", short_is_zeros, truncated_underneath),
    Mutation("R10 short copy", short_copy_is_whole, source_unreadable_amid_a_resync),
    Mutation("R10 forgotten", truncated_lacks_nothing, truncated_underneath),
    Mutation("P3 saved rarely", saved_rarely, killed_amid_a_slow_resync),
    Mutation("P5 every request waits", given_up_is_forgotten, one_hangs),
    Mutation("P6 guessed", absent_ones_are_ignored, only_the_one_left_behind_is_there),
    Mutation("P7 shown before settled", shown_before_settled, source_lost_after_a_crash, seeds=4),
)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_what_breaks_a_rule_is_noticed(mutation: Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(mutation.seeds):
        assert told(mutation.script, mutation.setup, seed) is None, f"with the rule, seed {seed}"
    mutation.patch(monkeypatch)
    ends = []
    for seed in range(mutation.seeds):
        ends.append(told(mutation.script, mutation.setup, seed))
        if ends[-1] is not None and ends[-1].startswith(BAD_ENDS):
            return
    pytest.fail(f"nothing was noticed: {ends}")


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
