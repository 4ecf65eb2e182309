"""One seed, one history: the real runtime on the simulated world, and the oracle beside it.

A history is some lives of the daemon with guests at work and faults of all kinds, ended by a kill,
a power cut or an unmount; and then faults stop. What must hold:

* a guest never sees what the oracle excludes, and every request ends;
* a mount is refused only where the replicas at hand cannot tell who is right;
* after the faults all replicas become current and byte-identical by themselves, and after an
  unmount the next mount finds nothing to do;
* the daemon neither dies nor logs an error.

A careless operator (some seeds have one) mounts what is there with ``-o degraded``. That may lose
what only absent replicas hold: the oracle is told to accept what is on those at hand instead, and
two such sides are a split brain, which is then resolved.
"""

import errno
import logging
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import trio

from quorumfs import dirtymap
from quorumfs import disk as disk_module
from quorumfs.assembly import (
    AssemblyRefusedError,
    Plan,
    State,
    assemble,
    new_record,
)
from quorumfs.control.events import Event, EventLog
from quorumfs.dirtymap import ALL_LACK, INTENT, UNVERIFIED, DirtyMap
from quorumfs.disk import Disk
from quorumfs.errors import UserError
from quorumfs.metadata import sidecars as sidecars_module
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.patterns import Fifo, Quorum
from quorumfs.repair import resync as resync_module
from quorumfs.repair.resync import Resync, Returned
from quorumfs.repair.rewrite import read_and_rewrite
from quorumfs.replica import Replica
from quorumfs.resolution import resolve
from quorumfs.sidecar import Record, RoleState, Sidecar, decode
from quorumfs.storage import CHANGES, Kind
from support.simulation.harness import run_seeded
from support.simulation.media import SECTOR
from support.simulation.oracle import Oracle, ViolationError
from support.simulation.storage import CALM, STORM, DaemonKilledError, Weather
from support.simulation.world import Life, World

KIB = 1 << 10

TIMEOUT_S = 8.0
"""The replica timeout."""

REQUEST_MAX_S = 900.0
"""No request takes longer, whatever its replicas do: a few timeouts, one after the other."""

CONVERGE_MAX_S = 400.0
"""After the faults: a replica is tried again within a minute, what hangs is given up before."""

QUIET_S = 100.0
"""How long a mount that has nothing to do is watched doing nothing."""

REQUESTS_MAX = 400
"""Of all guests in one life."""


class BrokenError(AssertionError):
    """Something did not go as promised that is no business of the oracle's."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How large things are: a disk of many chunks, extents, pieces and batches, yet small."""

    size: int
    chunk_size: int
    extent: int
    piece: int
    batch: int
    unflushed_max: int

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The real code with its constants at this scale."""
        with ExitStack() as stack:
            for module, name, value in (
                (dirtymap, "EXTENT", self.extent),
                (resync_module, "PIECE", self.piece),
                (resync_module, "BATCH", self.batch),
                (sidecars_module, "UNFLUSHED_MAX", self.unflushed_max),
                (disk_module, "ZEROS_MAX", 2 * self.piece),
            ):
                stack.enter_context(mock.patch.object(module, name, value))
            yield


SCALES = (
    Scale(32 * 16 * KIB, 16 * KIB, 64 * KIB, 32 * KIB, 128 * KIB, 65_536),
    Scale(20 * 16 * KIB + 5 * SECTOR, 16 * KIB, 16 * KIB, 16 * KIB, 64 * KIB, 8),
    Scale(9 * KIB * 256, SECTOR, 16 * KIB, 64 * KIB, 256 * KIB, 64),  # two pages of map
)


@dataclass(frozen=True, slots=True)
class Setup:
    """What is the same in all lives of a history."""

    replicas: int
    threshold: int
    scale: Scale
    fifo: bool
    rewrite_corrupted: bool
    zero_kind: Kind | None
    adopted: bool
    """As raw images, which are then compared; else created as a set."""
    filled: bool
    """With data at first; else with zeros."""
    lives: int
    careless: bool
    """The operator mounts what is there."""

    @classmethod
    def drawn(cls, dice: random.Random) -> "Setup":
        """Any setup; the useful ones more often."""
        replicas = dice.choice((2, 2, 3, 3, 3, 4))
        thresholds = {2: (1, 1, 1, 2), 3: (1, 1, 2, 2, 2, 3), 4: (1, 2, 2, 3, 3, 4)}[replicas]
        return cls(
            replicas=replicas,
            threshold=dice.choice(thresholds),
            scale=dice.choice((SCALES[0], SCALES[0], *SCALES)),
            fifo=dice.random() < 0.5,
            rewrite_corrupted=dice.random() < 0.3,
            zero_kind=dice.choice((None, Kind.ZERO, Kind.DISCARD)),
            adopted=dice.random() < 0.3,
            filled=dice.random() < 0.3,
            lives=dice.randrange(1, 7),
            careless=dice.random() < 0.2,
        )


_FAILING = (
    Weather(fail=0.02),
    Weather(fail=0.02, errors=(errno.EIO,)),
    Weather(fail=0.05, errors=(errno.ENOSPC,)),
    Weather(sync_fail=0.15),
    Weather(slow=0.3),
    Weather(late=0.01),
    Weather(hang=0.005),
    Weather(refuse=0.03),
    Weather(fail=0.3, sync_fail=0.3),
)


def drawn_weather(dice: random.Random) -> Weather:
    """Any weather; half of the time a good one."""
    return dice.choice((*[CALM] * 8, STORM, STORM, *_FAILING))


@dataclass(slots=True)
class Mounted:
    """What one mount is made of."""

    order: list[int]
    plan: Plan
    disk: Disk
    sidecars: Sidecars
    resync: Resync

    @property
    def converged(self) -> bool:
        """Whether every replica of the set is here, current, and the same as the others."""
        bits = ALL_LACK | UNVERIFIED
        return (
            len(self.order) == len(self.sidecars.record.roles)
            and all(replica.state is State.CURRENT for replica in self.disk.replicas)
            and not self.sidecars.unsettled
            and not self.sidecars.map.count(bits)
        )

    def __str__(self) -> str:
        states = [f"{replica.path} {replica.state.value}" for replica in self.disk.replicas]
        counts = {
            name: self.sidecars.map.count(bits)
            for name, bits in (("lacks", ALL_LACK), ("unverified", UNVERIFIED))
        }
        return f"{', '.join(states)}; unsettled {list(self.sidecars.unsettled)}, chunks {counts}"


class _Errors(logging.Handler):
    """What the daemon logs goes to the trace; an error is remembered."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.found: list[str] = []
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._world.note(f"log {record.levelname}: {text}")
        if record.levelno >= logging.ERROR:
            self.found.append(text)


class History:
    """What follows from one seed."""

    def __init__(self, seed: int, setup: Setup | None = None) -> None:
        dice = random.Random(f"{seed}/setup")
        self.seed = seed
        self.setup = setup or Setup.drawn(dice)
        size = self.setup.scale.size
        self.world = World(seed, self.setup.replicas, size)
        initial = dice.randbytes(size) if self.setup.filled else None
        self.oracle = Oracle(size, initial)
        self._dice = self.world.dice_for("history")
        self._errors = _Errors(self.world)
        self._initial = initial
        self._thresholds = {self.setup.threshold}
        """All that a record may have: it is lowered with consent only, and may be raised again."""
        self._forked = False
        """Somebody consented to a loss, and since then not all replicas have been one set."""
        self._last: tuple[Record, set[int]] | None = None
        """After an unmount in order: what was on record, and who was there; None after a crash."""
        self._cuts_seen = 0
        self._stopping = False
        self._requests = 0
        self._guests = 0

    async def run(self) -> None:
        """Live it; raises if a promise is broken."""
        logger = logging.getLogger("quorumfs")
        level, propagate = logger.level, logger.propagate
        logger.addHandler(self._errors)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        try:
            with self.setup.scale.applied():
                await self._run()
        finally:
            logger.removeHandler(self._errors)
            logger.setLevel(level)
            logger.propagate = propagate

    async def _run(self) -> None:
        self.world.note(f"setup {self.setup}")
        self._create()
        for _ in range(self.setup.lives):
            await self._live()
            self._between_lives()
        await self._end()

    # The set

    def _create(self) -> None:
        """A new set, as ``create`` or the first mount of raw images makes it."""
        setup, world = self.setup, self.world
        if self._initial is not None:
            for one in world.replicas:
                one.image.restore(replace(one.image.backup()))
                for content in (one.image.cache, one.image.durable):
                    content.write(0, self._initial)
        record = new_record(
            [one.path for one in world.replicas],
            setup.scale.size,
            setup.threshold,
            chunk_size=setup.scale.chunk_size,
            random_bytes=world.dice_for("set").randbytes,
        )
        disk_map = DirtyMap(record.size, record.chunk_size)
        if setup.adopted:
            disk_map.add(UNVERIFIED, range(len(disk_map)))
        for index, role in enumerate(record.roles):
            identity = world.replicas[index].image.identity
            world.create_sidecar(index, Sidecar(role.replica_id, record, disk_map, identity))

    def _assemble(self, order: Sequence[int], *, degraded: bool, threshold: int | None) -> Plan:
        found = self.world.found(order)
        plan = assemble(found, degraded=degraded, threshold=threshold)
        states = [f"{member.path} {member.state.value}" for member in plan.members]
        self.world.note(f"assembled, {plan.rule}: {', '.join(states)}")
        return plan

    def _choose(self) -> tuple[list[int], Plan] | None:
        """Find replicas that can be mounted; None if there are none this time."""
        dice, everyone = self._dice, list(range(self.setup.replicas))
        order = everyone.copy()
        dice.shuffle(order)
        if dice.random() < 0.4:
            order = order[: dice.randrange(1, len(order) + 1)]
        threshold = None
        if len(self._thresholds) > 1 and dice.random() < 0.5:
            threshold = dice.choice(sorted(self._thresholds))
        for degraded in (False, True):
            try:
                return order, self._assemble(order, degraded=degraded, threshold=threshold)
            except AssemblyRefusedError as error:
                self.world.note(f"mount of {order} refused, {degraded=}: {error.rule}: {error}")
                self._require_reason(error, order, degraded=degraded, threshold=threshold)
                if not self.setup.careless or dice.random() < 0.5:
                    return None
                usable = len(self._reachable(order))
                if error.rule == "no quorum" and usable:
                    threshold = usable
        return None

    def _reachable(self, order: Sequence[int]) -> set[int]:
        return {index for index in order if self.world.replicas[index].reachable}

    def _require_reason(
        self,
        error: AssemblyRefusedError,
        order: Sequence[int],
        *,
        degraded: bool,
        threshold: int | None,
    ) -> None:
        """Raise if these replicas need not have been refused."""
        here, count = self._reachable(order), self.setup.replicas
        needed = max(self._thresholds | {threshold or 0})
        sure = len(here) == count
        sure |= len(here) > count - min(self._thresholds) and len(here) >= needed
        if self._last is not None and not self._forked:
            record, _ = self._last
            current = {s for s, r in enumerate(record.roles) if r.state is RoleState.CURRENT}
            sure |= current <= here and len(here) >= needed
        match error.rule:
            case "split brain":
                justified = self._forked
            case "no quorum":
                justified = len(here) < needed
            case "may be newer":
                justified = not degraded and not sure
            case "only stale":
                justified = not sure
            case "unusable":
                justified = not here
            case "adopt":
                justified = not here  # nothing to be seen of a set
            case _:
                justified = False
        if not justified:
            raise BrokenError(f"mount of {order} refused without need: {error.rule}: {error}")

    def _mount(self, life: Life, order: list[int], plan: Plan) -> Mounted:
        """What `quorumfs.replicaset.ReplicaSet.make_disk` makes, on simulated storages."""
        world, setup = self.world, self.setup
        found = world.found(order)
        replicas = []
        for number, (index, member) in enumerate(zip(order, plan.members, strict=True)):
            path = world.replicas[index].path
            if member.state in (State.FOREIGN, State.MISSING):
                replicas.append(Replica(number, path, None, TIMEOUT_S))
                continue
            image = life.image(index, plan.record.size)
            replicas.append(Replica(number, path, image, TIMEOUT_S, sidecar=life.sidecar(index)))
        threshold = plan.record.threshold
        sidecars = Sidecars(replicas, plan, found, threshold=threshold)
        disk = Disk(
            replicas,
            plan.record.size,
            sidecars,
            threshold=threshold,
            pattern=Fifo() if setup.fifo else Quorum(threshold),
            repair=partial(read_and_rewrite, outvoted=setup.rewrite_corrupted),
            search_s=TIMEOUT_S,
            zero_kind=setup.zero_kind,
            events=EventLog("disk", self._tell),
        )
        present = {
            replica: one
            for replica, one in zip(replicas, found, strict=True)
            if replica.role is not State.CURRENT and replica.attached
        }

        async def reopen(replica: Replica) -> Returned:
            index = order[replica.index]
            await trio.sleep(0.01)
            (one,) = world.found([index])
            if one.image is None or one.sidecar is None:
                raise UserError(one.problem or "there is no sidecar")
            return Returned(one, life.image(index, disk.size), life.sidecar(index))

        resync = Resync(disk, sidecars, reopen, present=present)
        mounted = Mounted(order, plan, disk, sidecars, resync)
        life.nursery.start_soon(disk.run)
        life.nursery.start_soon(resync.run)
        return mounted

    def _tell(self, event: Event) -> None:
        self.world.note(f"event {event.name}: {event.text}")

    async def _unmount(self, mounted: Mounted, *, must_succeed: bool = False) -> None:
        """Close in order, as at the end of `quorumfs.mounting`; the guests have gone."""
        flushing = self.oracle.begin_flush()
        self.world.note("unmount")
        with trio.move_on_after(REQUEST_MAX_S) as scope:
            await mounted.resync.stop()
            try:
                await mounted.disk.close()
            except OSError as error:
                self.world.note(f"unmount failed: {error.strerror}")
                if must_succeed:
                    raise BrokenError(f"unmount failed without a fault: {error}") from error
            else:
                self.world.note("unmounted")
                self.oracle.flushed(flushing)
                self._last = mounted.sidecars.record, set(mounted.order)
        if scope.cancelled_caught:
            raise BrokenError("an unmount did not end")

    # A life

    async def _live(self) -> None:
        dice, world = self._dice, self.world
        for one in world.replicas:
            one.image_faults.weather = drawn_weather(dice)
            one.sidecar_faults.weather = dice.choice(
                (one.image_faults.weather, one.image_faults.weather, CALM, drawn_weather(dice))
            )
            for file in one.files:
                file.space = None
        if (chosen := self._choose()) is None:
            return
        order, plan = chosen
        consented = plan.rule.startswith("degraded")
        if consented or (self._forked and len(self._reachable(order)) < self.setup.replicas):
            self._accept_loss(order, plan)
        self._forked |= consented
        self._last = None
        mounted, lost_cache = await self._serve(order, plan)
        self._check_log()
        if self._closed_well:
            self._note_cuts()
        else:
            self._crashed(lost_cache)
        uncommitted = mounted.sidecars.record.sequence == plan.record.sequence
        if (consented and uncommitted) or (self._forked and not self._closed_well):
            self.oracle.forget_reads()  # perhaps nothing says that this mount ever was
        self._thresholds.add(mounted.sidecars.record.threshold)
        if mounted.converged:
            self._forked = False
            self._thresholds = {mounted.sidecars.record.threshold}

    async def _serve(self, order: list[int], plan: Plan) -> tuple[Mounted, bool]:
        """Mount, be used, and end somehow; also whether a medium lost what was not synced."""
        dice, world = self._dice, self.world
        async with world.boot() as life:
            mounted = self._mount(life, order, plan)
            fate = _Fate(self, life, mounted)
            crash = dice.choice(("step", "step", "time", "unmount", "unmount", None, None, None))
            power = dice.random() < 0.5
            if crash == "step":
                life.crash_at(int(10 ** dice.uniform(0, 3.7)), power=power)
            await self._be_used(life, mounted, fate, 10 ** dice.uniform(-1, 2.2))
            if crash == "time":
                world.power_cut() if power else world.kill()
                await trio.lowlevel.checkpoint()
            if crash == "unmount":
                life.crash_at(life.steps + int(10 ** dice.uniform(0, 1.7)), power=power)
            await self._unmount(mounted)
        return mounted, fate.lost_cache

    @property
    def _closed_well(self) -> bool:
        """Whether the last life ended with an unmount in order."""
        return self._last is not None

    def _accept_loss(self, order: Sequence[int], plan: Plan) -> None:
        """Go on with what is here; what only others hold may be gone."""
        self.world.note(f"what only others than {order} hold is given up")
        members = [i for i, m in zip(order, plan.members, strict=True) if m.state is State.CURRENT]
        self.oracle.forget_reads()
        for index in members:
            image = self.world.replicas[index].image
            self.oracle.allow([image.cache, image.durable])
        self._thresholds.add(plan.record.threshold)

    def _crashed(self, lost_cache: bool) -> None:
        """Tell the oracle how the life ended."""
        if self.world.power_cuts > self._cuts_seen or lost_cache:
            self.oracle.power_cut()
        else:
            self.oracle.killed()
        self._cuts_seen = self.world.power_cuts

    def _note_cuts(self) -> None:
        self.oracle.killed()  # closes what a guest left open; there is nothing
        assert self._cuts_seen == self.world.power_cuts

    def _check_log(self) -> None:
        if self._errors.found:
            raise BrokenError(f"logged an error: {self._errors.found[0]}")

    async def _be_used(
        self, life: Life, mounted: Mounted, fate: "_Fate", duration_s: float
    ) -> None:
        """Guests at work, and fate; both have ended afterwards."""
        self._stopping = False
        self._requests = 0
        think_s = 10 ** self._dice.uniform(-2, 1)
        async with trio.open_nursery() as nursery:
            for _ in range(self._dice.randrange(1, 5)):
                self._guests += 1
                guest = _Guest(self, life, mounted.disk, self._guests, think_s)
                nursery.start_soon(guest.run)
            with trio.move_on_after(duration_s):
                await fate.run()
            self._stopping = True

    def _between_lives(self) -> None:
        dice, world = self._dice, self.world
        for index, one in enumerate(world.replicas):
            if not one.reachable and dice.random() < 0.7:
                world.attach(index)
            elif one.reachable and dice.random() < 0.1:
                loses = dice.random() < 0.3
                loses |= any(file.dropped for file in one.files)
                world.detach(index, lose_cache=loses)
                if loses:
                    self.oracle.power_cut()
        if dice.random() < 0.1:
            world.power_cut()
            self._cuts_seen = world.power_cuts
            self.oracle.power_cut()

    # Afterwards

    async def _end(self) -> None:
        """Faults stop: everything must become good, and stay so."""
        world, oracle = self.world, self.oracle
        world.calm()
        order = list(range(self.setup.replicas))
        self._dice.shuffle(order)
        try:
            plan = self._assemble(order, degraded=False, threshold=None)
        except AssemblyRefusedError as error:
            world.note(f"mount of {order} refused: {error.rule}: {error}")
            self._require_reason(error, order, degraded=False, threshold=None)
            self._resolve(order)
            plan = self._assemble(order, degraded=False, threshold=None)
        async with world.boot() as life:
            mounted = self._mount(life, order, plan)
            await self._be_used(life, mounted, _Fate(self, life, mounted, idle=True), 5.0)
            await self._converge(mounted)
            await self._unmount(mounted, must_succeed=True)
        self._note_cuts()
        self._check_healthy()
        if self._dice.random() < 0.5:
            world.power_cut()
            self._cuts_seen = world.power_cuts
            oracle.power_cut()
        await self._remount_untouched()
        self._check_healthy()
        self._check_log()

    async def _converge(self, mounted: Mounted) -> None:
        began = trio.current_time()
        while not mounted.converged:
            if trio.current_time() - began > CONVERGE_MAX_S:
                raise BrokenError(f"not healthy {CONVERGE_MAX_S:g} s after the faults: {mounted}")
            await trio.sleep(1.0)
        self.world.note(f"healthy {trio.current_time() - began:.0f} s after the faults")

    def _resolve(self, order: Sequence[int]) -> None:
        """The operator chooses a side of a split brain."""
        found = self.world.found(order)
        keep = self._dice.choice(order)
        resolution = resolve(found, self.world.replicas[keep].path)
        self.world.note(f"resolved: keep {resolution.kept}")
        by_path = {one.path: index for index, one in enumerate(self.world.replicas)}
        kept = [self.world.replicas[by_path[path]].image for path in resolution.kept]
        self.oracle.forget_reads()
        for image in kept:
            self.oracle.allow([image.cache, image.durable])
        for path, sidecar in resolution.sidecars.items():
            self.world.create_sidecar(by_path[path], sidecar)

    def _check_healthy(self) -> None:
        """Everything is the same everywhere, and on record as such."""
        world = self.world
        self.oracle.check_images(world.contents(), [one.path for one in world.replicas])
        records = set()
        for one in world.replicas:
            assert one.sidecar is not None
            sidecar = decode(one.sidecar.whole)
            records.add((sidecar.record.generation, sidecar.record.sequence))
            states = {role.state for role in sidecar.record.roles}
            marks = sidecar.map.count(INTENT | ALL_LACK)
            if states != {RoleState.CURRENT} or marks or not sidecar.record.clean:
                raise BrokenError(
                    f"{one.path} after an unmount in order: {marks} chunks marked, "
                    f"clean: {sidecar.record.clean}, roles {sidecar.record.roles}"
                )
        if len(records) > 1:
            raise BrokenError("the sidecars hold different records after an unmount in order")

    async def _remount_untouched(self) -> None:
        """The next mount of a healthy set has nothing to do."""
        world = self.world
        order = list(range(self.setup.replicas))
        self._dice.shuffle(order)
        plan = self._assemble(order, degraded=False, threshold=None)
        if plan.rule != "clean: closed in order":
            raise BrokenError(f"remounted by the rule: {plan.rule}")
        async with world.boot() as life:
            mounted = self._mount(life, order, plan)
            storages = [storage for index in order for storage in life.storages(index)]
            await trio.sleep(QUIET_S)
            await self._unmount(mounted, must_succeed=True)
            changed = [op for storage in storages for op in storage.log if op.kind in CHANGES]
            if changed:
                raise BrokenError(f"a mount that had nothing to do wrote: {len(changed)} times")
        self._note_cuts()


class _Fate:
    """What happens to the replicas in a life."""

    def __init__(
        self, history: History, life: Life, mounted: Mounted, *, idle: bool = False
    ) -> None:
        self.lost_cache = False
        """A replica's medium lost what was not synced, while the daemon went on."""
        self._history = history
        self._life = life
        self._mounted = mounted
        self._idle = idle
        self._dice = history.world.dice_for(f"fate {life.number}")
        self._pause_s = 10 ** self._dice.uniform(0, 2)
        self._dropped_before = {
            index for index, one in enumerate(history.world.replicas) if one.image.dropped
        }

    async def run(self) -> None:
        """Until cancelled."""
        if self._idle:
            await trio.sleep_forever()
        while True:
            await trio.sleep(self._dice.expovariate(1 / self._pause_s))
            self._strike()

    def _strike(self) -> None:
        dice, world = self._dice, self._history.world
        index = dice.randrange(len(world.replicas))
        one = world.replicas[index]
        match dice.randrange(6):
            case 0 | 1 if not one.reachable:
                world.attach(index)
            case 0:
                hang = dice.random() < 0.3
                loses = not hang and dice.random() < 0.2
                self.lost_cache |= loses
                world.detach(index, hang=hang, lose_cache=loses)
            case 1:
                world.release(index)
            case 2:
                one.image_faults.weather = drawn_weather(dice)
                world.note(f"{one.path}: {one.image_faults.weather}")
            case 3:
                one.sidecar_faults.weather = drawn_weather(dice)
                world.note(f"{one.path}'s sidecar: {one.sidecar_faults.weather}")
            case 4:
                full = one.image.space is None
                one.image.space = one.image.cache.allocated + 4096 * 4 if full else None
                world.note(f"{one.path}: space {one.image.space}")
            case 5 if self._may_forget(index):
                world.note(f"{one.path}: pages are evicted")
                one.image.evict()

    def _may_forget(self, index: int) -> bool:
        """Whether no acknowledged write is only in pages that will be lost when they are evicted.

        It is no promise that a disk survives the only media it has left.
        """
        world = self._history.world
        image = world.replicas[index].image
        if not image.dropped:
            return True
        if index in self._dropped_before:
            return False  # nobody can know of it any more
        order, replicas = self._mounted.order, self._mounted.disk.replicas
        members = [i for i, r in zip(order, replicas, strict=True) if r.role is State.CURRENT]
        if index not in members:
            return True
        others = [world.replicas[other].image for other in members if other != index]
        return any(
            not other.dropped
            and all(
                other.cache.read(sector * SECTOR, (sector + 1) * SECTOR)
                == image.cache.read(sector * SECTOR, (sector + 1) * SECTOR)
                for sector in image.dropped
            )
            for other in others
        )


class _Guest:
    """Somebody who uses the disk, and waits a while after an error."""

    def __init__(
        self, history: History, life: Life, disk: Disk, number: int, think_s: float
    ) -> None:
        self._history = history
        self._life = life
        self._disk = disk
        self._oracle = history.oracle
        self._number = number
        self._think_s = think_s
        self._dice = history.world.dice_for(f"guest {number}")
        sectors = disk.size // SECTOR
        self._favourites = [self._dice.randrange(sectors) for _ in range(3)]

    async def run(self) -> None:
        """Until told to stop, the end of the life, or a broken promise."""
        history, dice = self._history, self._dice
        while True:
            await trio.sleep(dice.expovariate(1 / self._think_s) if dice.random() < 0.9 else 0)
            if history._stopping:
                return
            if history._requests >= REQUESTS_MAX:
                await trio.sleep(1.0)
                continue
            history._requests += 1
            with trio.move_on_after(REQUEST_MAX_S) as scope:
                if not await self._request():
                    await trio.sleep(dice.uniform(0.2, 5.0))
            if scope.cancelled_caught:
                raise BrokenError(f"a request of guest {self._number} did not end")

    async def _request(self) -> bool:
        """One request; whether it succeeded."""
        name, action = self._chosen()
        note = self._history.world.note
        note(f"guest {self._number} {name}")
        try:
            await action()
        except OSError as error:
            if not self._life.dead:
                note(f"guest {self._number} {name}: {error.strerror}")
            return False
        note(f"guest {self._number} {name}: ok")
        return True

    def _chosen(self) -> tuple[str, Callable[[], Awaitable[None]]]:
        dice = self._dice
        sectors = self._disk.size // SECTOR
        length = dice.choice((1, 1, 2, 8, 8, 8, 16, 32, dice.randrange(1, 129)))
        length = min(length, sectors)
        hot = dice.random() < 0.5
        start = dice.choice(self._favourites) if hot else dice.randrange(sectors)
        if dice.random() < 0.5:
            start = start // 8 * 8
        start = min(start, sectors - length)
        at, size = start * SECTOR, length * SECTOR
        where = f"{at}+{size}"
        draw = dice.random()
        if draw < 0.40:
            return f"write {where}", partial(self._write, at, size, durable=False)
        if draw < 0.48:
            return f"durable write {where}", partial(self._write, at, size, durable=True)
        if draw < 0.54:
            discard = dice.random() < 0.5
            return f"zeros {where} {discard=}", partial(self._zeros, at, size, discard=discard)
        if draw < 0.84:
            return f"read {where}", partial(self._read, at, size)
        if draw < 0.96:
            return "flush", self._flush
        if draw < 0.98:
            return f"allocate {where}", partial(self._disk.allocate, at, size)
        return f"seek data {at}", partial(self._seek, at)

    def _check_alive(self) -> None:
        """The answer of a daemon that died meanwhile reaches nobody."""
        if self._life.dead:
            raise DaemonKilledError

    async def _write(self, at: int, size: int, *, durable: bool) -> None:
        writing = self._oracle.begin_write(at, size, self._number)
        self._history.world.note(f"guest {self._number} writes version {writing.version.sequence}")
        try:
            await self._disk.write(at, writing.data)
            if durable:
                await self._disk.flush()
        except OSError:
            self._check_alive()
            self._oracle.write_failed(writing)
            raise
        self._check_alive()
        self._oracle.wrote(writing, durably=durable)

    async def _zeros(self, at: int, size: int, *, discard: bool) -> None:
        writing = self._oracle.begin_zeros(at, size, self._number)
        self._history.world.note(f"guest {self._number} writes version {writing.version.sequence}")
        try:
            await self._disk.make_zeros(at, size, discard=discard)
        except OSError:
            self._check_alive()
            self._oracle.write_failed(writing)
            raise
        self._check_alive()
        self._oracle.wrote(writing)

    async def _read(self, at: int, size: int) -> None:
        reading = self._oracle.begin_read(at, size)
        try:
            data = await self._disk.read(at, size)
        except OSError:
            self._check_alive()
            self._oracle.read_failed(reading)
            raise
        self._check_alive()
        self._oracle.read(reading, data)

    async def _flush(self) -> None:
        flushing = self._oracle.begin_flush()
        await self._disk.flush()
        self._check_alive()
        self._oracle.flushed(flushing)

    async def _seek(self, at: int) -> None:
        """What is skipped as a hole must read as zeros."""
        length = min(64 * KIB, self._disk.size - at)
        reading = self._oracle.begin_read(at, length)
        try:
            found = await self._disk.next_data(at)
        finally:
            if not self._life.dead:
                self._oracle.read_failed(reading)
        self._check_alive()
        skipped = min(found - at, length) // SECTOR * SECTOR
        if skipped > 0:
            reading.length = skipped
            del reading.possible[skipped // SECTOR :]
            self._oracle._readings[reading] = None
            self._oracle.read(reading, bytes(skipped))


@dataclass(frozen=True, slots=True)
class Result:
    """How a history ended."""

    seed: int
    violation: str | None
    """Which promise was broken; None: none was."""
    trace: list[str]
    acknowledged: int
    """Writes."""
    checked: int
    """Sectors read."""
    lives: int


BAD_ENDS = ("ViolationError", "BrokenError")
"""How a violation begins that is a broken promise, and not an error in this code."""


def live_through(seed: int, setup: Setup | None = None) -> Result:
    """The history of *seed*."""
    history = History(seed, setup)
    violation = None
    try:
        run_seeded(seed, history.run)
    except* DaemonKilledError:
        raise
    except* Exception as group:
        violation = _first(group)
    world, oracle = history.world, history.oracle
    return Result(seed, violation, world.trace, oracle.acknowledged, oracle.checked, world.lives)


def _first(error: BaseException) -> str:
    """The first of perhaps several errors, in one line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ViolationError | BrokenError):
        return f"{type(error).__name__}: {error}"
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    where = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last else "?"
    return f"{type(error).__name__} at {where}: {error}"


def replay_command(seed: int) -> str:
    """What shows the trace of *seed*, from the top of the repository."""
    return f"cd tests && PYTHONHASHSEED=0 python -m support.simulation --replay {seed}"
