"""Fate: what happens to the replicas while guests use the disk.

In some lives faults of all kinds come as they like (`Weather`). They meet the rare moments rarely,
so in other lives fate has plans: each sets up one situation in which a rule of order counts, with
the details left to the dice, and everything else at rest.
"""

import errno
import random
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

import trio

from quorumfs.decisions.dirtymap import ALL_OUT_OF_SYNC, UNVERIFIED, out_of_sync
from quorumfs.decisions.model import Plan, Standing
from quorumfs.decisions.record import SUFFIX
from quorumfs.decisions.sidecar import SLOT_OFFSETS
from quorumfs.disk.disk import Disk
from quorumfs.live.settings import Settings
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import CHANGES, Kind, Operation
from support.simulation.guest import Crowd, Guest
from support.simulation.media import SECTOR, SimulatedFile
from support.simulation.oracle import BrokenError
from support.simulation.storage import CALM, STORM, Effect, Fault, Weather
from support.simulation.world import Life, SimulatedReplica, World

TIMEOUT_S = 8.0
"""The replica timeout."""

_GENERATION = struct.Struct("<72xQ")
"""Where a slot of a sidecar has its generation."""

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

_DROPPING = (Effect.NONE, Effect.NONE, Effect.PART)
"""Of a sync that fails."""


def drawn_weather(dice: random.Random) -> Weather:
    """Any weather; half of the time a good one."""
    return dice.choice((*[CALM] * 8, STORM, STORM, *_FAILING))


@dataclass(slots=True)
class Mounted:
    """What one mount is made of."""

    index_of: Callable[[str], int]
    """The index in the world of the replica at a path."""
    plan: Plan
    disk: Disk
    sidecars: Sidecars
    repairs: Repairs
    settings: Settings
    orders: int = 0
    """How often an administrator's order has begun, or ended."""

    @property
    def order(self) -> list[int]:
        """The indices of the replicas of this mount, in the order of the read pattern."""
        return [self.index_of(replica.path) for replica in self.disk.replicas]

    @property
    def converged(self) -> bool:
        """Whether every replica of the set is here, current, and the same as the others."""
        return self._all_here and self._used == [*self.disk.replicas] and self.even

    @property
    def even(self) -> bool:
        """Whether every replica that is here, and not taken out, is current, and the same as the
        others."""
        return (
            all(r.state is Standing.CURRENT and not r.dead for r in self._used)
            and self.sidecars.ledger.target is None
            and not self.sidecars.ledger.agreement.divergent
            and not self.sidecars.ledger.map.count(UNVERIFIED)
            and not self._lacking
        )

    @property
    def enough(self) -> bool:
        """Whether as many replicas are current as every request needs."""
        return len(self.sidecars.ledger.members) >= self.sidecars.ledger.least

    @property
    def _lacking(self) -> bool:
        """Whether anybody who is here, and not taken out, lacks something."""
        if self._all_here and self._used == [*self.disk.replicas]:
            ledger = self.sidecars.ledger
            return ledger.map.count(sum(out_of_sync(slot) for slot in ledger.record.slots)) > 0
        slots = [replica.slot for replica in self._used if replica.slot is not None]
        return any(self.sidecars.ledger.map.lacking_bytes(slot) for slot in slots)

    @property
    def taken_out(self) -> set[int]:
        """The indices of the replicas that an administrator has taken out."""
        return {i for i in self.order if self.replica(i) not in self._used}

    @property
    def _all_here(self) -> bool:
        """Whether no replica of the set is missing in this mount."""
        return len(self.disk.replicas) == len(self.sidecars.ledger.record.slots)

    @property
    def _used(self) -> list[Replica]:
        """The replicas that no administrator has taken out."""
        return [one for one in self.disk.replicas if one.standing is not Standing.OFFLINE]

    def replica(self, index: int) -> Replica | None:
        """The replica that the world knows by *index*; None if this mount does not have it."""
        order = self.order
        return self.disk.replicas[order.index(index)] if index in order else None

    @property
    def members(self) -> list[int]:
        """The indices of the current replicas, in the order of the record."""
        pairs = zip(self.order, self.disk.replicas, strict=True)
        current = [(r.slot or 0, index) for index, r in pairs if r.standing is Standing.CURRENT]
        return [index for _, index in sorted(current)]

    def __str__(self) -> str:
        states = [f"{replica.path} {replica.state.value}" for replica in self.disk.replicas]
        counts = {
            name: self.sidecars.ledger.map.count(bits)
            for name, bits in (("lacks", ALL_OUT_OF_SYNC), ("unverified", UNVERIFIED))
        }
        unsettled = list(self.sidecars.ledger.agreement.divergent)
        return f"{', '.join(states)}; unsettled {unsettled}, chunks {counts}"


def is_slot_write(file: SimulatedFile, operation: Operation) -> bool:
    """Whether *operation* is part of the commit of a record."""
    return (
        operation.kind is Kind.WRITE
        and file.name.endswith(SUFFIX)
        and operation.offset in SLOT_OFFSETS
    )


def crash_in_a_commit(
    life: Life, mounted: Mounted, dice: random.Random, *, power: bool, ejection: bool
) -> None:
    """Die in the middle of a commit of a record, or right after it.

    Of the one that next ejects somebody, or of any.
    """
    commits = 1 if ejection else dice.randrange(1, 4)
    steps = dice.randrange(1, 10 * len(mounted.order))
    seen = set()

    def watch(_: SimulatedReplica, file: SimulatedFile, operation: Operation) -> None:
        if not is_slot_write(file, operation):
            return
        (generation,) = _GENERATION.unpack_from(operation.data)
        if ejection and generation == mounted.sidecars.ledger.record.generation:
            return
        seen.add(operation.data[16:24])  # the sequence number: one for each commit
        if len(seen) >= commits:
            life.watch = None
            life.crash_at(life.steps + steps, power=power)

    life.watch = watch


class Fate:
    """What happens to the replicas in a life."""

    def __init__(
        self,
        life: Life,
        mounted: Mounted,
        crowd: Crowd,
        guest: Guest,
        may_harm: Callable[[int], bool] = lambda _: False,
        is_ejected: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """*guest* does what a plan needs done.

        *may_harm*: whether all that a replica holds is elsewhere, and nothing else is wrong.
        *is_ejected*: whether it is on record that a replica is.
        """
        self.lost_cache = False
        """A replica's medium lost what was not synced, while the daemon went on."""
        self.harmed: set[int] = set()
        """Replicas whose image no longer holds what it should, behind the daemon's back."""
        self.unrecorded: set[int] = set()
        """Those that were short and got their length back before it could be on record."""
        self._truncated_members: set[int] = set()
        self._under_way = 0
        self.life = life
        self._world: World = life.world
        self._mounted = mounted
        self._crowd = crowd
        self._guest = guest
        self._may_harm = may_harm
        self._is_ejected = is_ejected
        self._dice = self._world.dice_for(f"fate {life.number}")
        self._pause_s = 10 ** self._dice.uniform(0, 2)
        self._dropped_before = {
            index for index, one in enumerate(self._world.replicas) if one.image.dropped
        }

    # Faults as they come

    async def strike(self) -> None:
        """Faults of all kinds, until cancelled."""
        while True:
            await trio.sleep(self._dice.expovariate(1 / self._pause_s))
            self._strike()

    def _strike(self) -> None:
        dice, world = self._dice, self._world
        index = dice.randrange(len(world.replicas))
        one = world.replicas[index]
        match dice.randrange(6):
            case 0 | 1 if not one.reachable:
                world.attach(index)
            case 0 if not self.lost_cache:  # perhaps nobody has noticed, and only others hold it
                hang = dice.random() < 0.3
                # It is no promise that a disk survives what its last media lose.
                spare = index not in self._mounted.members or self._is_spare_beside_whole(index)
                loses = not hang and dice.random() < 0.2 and spare
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
            case 5:
                self._evict(index)

    def _evict(self, index: int) -> None:
        if self._may_forget(index):
            self._world.note(f"{self._world.replicas[index].path}: pages are evicted")
            self._world.replicas[index].image.evict()

    def _may_forget(self, index: int) -> bool:
        """Whether no acknowledged write is only in pages that will be lost when they are evicted.

        It is no promise that a disk survives the only media it has left.
        """
        world = self._world
        image = world.replicas[index].image
        if not image.dropped:
            return True
        if index in self._dropped_before:
            return False  # nobody can know of it any more
        members = self._mounted.members
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

    # Plans

    async def follow_plans(self) -> None:
        """One plan after the other, until cancelled."""
        with self._tidied():
            while True:
                self._world.calm()
                if await self._wait(lambda: self._mounted.even, 150.0):
                    plan = self._dice.choice(
                        (
                            self._one_misses_a_write,
                            self._one_misses_a_write,
                            self._one_misses_a_write,
                            self._one_fails_to_sync,
                            self._one_fails_to_sync,
                            self._one_fails_to_sync_amid_other_work,
                            self._one_fails_to_sync_amid_other_work,
                            self._all_lose_their_pages,
                            self._one_is_truncated,
                            self._one_is_truncated,
                            self._a_write_hangs,
                            self._a_write_hangs,
                            self._a_write_is_stuck,
                            self._one_is_left_behind,
                            self._one_is_left_behind,
                            self._one_is_left_behind,
                            self._all_are_full,
                            self._one_hangs,
                            self._guests_rest,
                        )
                    )
                    self._world.note(f"plan: {plan.__name__}")
                    await plan()
                await trio.sleep(self._dice.uniform(0.0, 20.0))

    @contextmanager
    def _tidied(self) -> Iterator[None]:
        """What a plan leaves behind when it is cut off is taken back."""
        crowd = self._crowd
        try:
            yield
        finally:
            crowd.paused = crowd.reads_only = crowd.full = False
            crowd.patience_s = Crowd().patience_s
            crowd.acknowledged = Crowd().acknowledged
            self.life.watch = None
            for one in self._world.replicas:
                one.image_faults.forget_plans()
                one.sidecar_faults.forget_plans()

    async def _one_misses_a_write(self) -> None:
        """And the daemon dies in the commit that says so, or when a guest has heard of success."""
        if (index := self._dispensable()) is None:
            return
        dice, missed = self._dice, False

        def miss(operation: Operation) -> Fault | None:
            nonlocal missed
            if missed or operation.kind not in CHANGES:
                return None
            missed = True
            return Fault(error=errno.EIO, effect=dice.choice(list(Effect)))

        def die() -> None:
            if missed:
                self._die(power=0.3)

        self._world.replicas[index].image_faults.script = miss
        match dice.randrange(5):
            case 0 | 1 | 2:
                self._crowd.acknowledged = die
            case 3:
                power = dice.random() < 0.5
                crash_in_a_commit(self.life, self._mounted, dice, power=power, ejection=True)
        for _ in range(4):
            await self._do(self._guest.write, *self._somewhere())
        await trio.sleep(dice.uniform(0.0, 10.0))
        self.life.watch = None
        self._crowd.acknowledged = Crowd().acknowledged
        self._world.replicas[index].image_faults.script = None

    async def _one_fails_to_sync(self) -> None:
        """Its pages are clean, and not on its medium; then memory is short, or power is cut."""
        if (index := self._dispensable()) is None:
            return
        dice = self._dice
        for _ in range(3):
            await self._do(self._guest.write, *self._somewhere())
        fault = Fault(error=errno.EIO, effect=dice.choice(_DROPPING))
        self._world.replicas[index].image_faults.plan(Kind.SYNC, fault)
        await self._do(self._guest.flush)
        if dice.random() < 0.6:
            await self._wait(lambda: self._mounted.even, 100.0)
        if dice.random() < 0.4:
            self._die(power=1.0)
            await trio.lowlevel.checkpoint()
        self._evict(index)
        await self._do(self._guest.read, 0, self._mounted.disk.size)

    async def _one_fails_to_sync_amid_other_work(self) -> None:
        """Its pages are lost while it is asked for them, or compared, or others are given them."""
        if (index := self._dispensable()) is None:
            return
        dice, replicas = self._dice, self._world.replicas
        place = self._somewhere()
        await self._do(self._guest.write, *place)
        for one in replicas:
            faults = one.image_faults
            for _ in range(dice.randrange(4)):
                faults.plan(dice.choice((Kind.READ, Kind.WRITE)), Fault(dice.uniform(0.0, 5.0)))
            faults.plan(Kind.SYNC, *[Fault(dice.uniform(0.0, 5.0))] * dice.randrange(3))
        other = replicas[dice.randrange(len(replicas))]
        kind = dice.choice((Kind.READ, Kind.READ, Kind.WRITE))
        other.image_faults.plan(kind, Fault(dice.uniform(0.0, 2.0), errno.EIO))
        fault = Fault(dice.uniform(0.0, 3.0), errno.EIO, effect=dice.choice(_DROPPING))
        replicas[index].image_faults.plan(Kind.SYNC, fault)
        actions: tuple[Callable[[], Awaitable[None]], ...] = (
            partial(self._do, self._guest.write, *place),
            partial(self._do, self._guest.read, *place),
            partial(self._do, self._guest.read, 0, self._mounted.disk.size),
            partial(self._do, self._guest.flush),
        )
        for _ in range(dice.randrange(4, 16)):
            self.life.nursery.start_soon(dice.choice(actions))
            await trio.sleep(dice.uniform(0.0, 1.5))
            self._evict(index)
        if dice.random() < 0.5:
            await self._wait(lambda: not self._under_way, 60.0)
        if dice.random() < 0.3:
            self._die(power=0.5)
            await trio.lowlevel.checkpoint()
        self._evict(index)
        await self._do(self._guest.read, 0, self._mounted.disk.size)

    async def _all_lose_their_pages(self) -> None:
        """And whoever has them sync first hears of it: a flush of a guest must, too (R13)."""
        dice, guest = self._dice, self._guest
        if self.harmed or any(one.image.dropped for one in self._world.replicas):
            return
        for _ in range(dice.randrange(1, 4)):
            await self._do(guest.write, *self._somewhere())
        if self.life.syncing or guest.oracle.writing or not self._mounted.even:
            return
        indices = self._mounted.members
        for index in indices:
            self._world.lose_pages(index)
        guest.oracle.lost(self._world.contents(indices))
        if dice.random() < 0.3:
            index = dice.choice(indices)
            self._world.replicas[index].image_faults.plan(Kind.WRITE, Fault(error=errno.EIO))
            await self._do(guest.write, *self._somewhere())
        if dice.random() < 0.5:
            await self._do(self._sync)
        await trio.sleep(dice.choice((0.0, dice.uniform(0.0, 90.0))))
        await self._do(guest.flush)
        await self._do(guest.read, 0, self._mounted.disk.size)

    async def _sync(self) -> None:
        """As a repair does it: this is no flush of a guest."""
        await self._mounted.disk.mirror.sync()

    async def _one_is_truncated(self) -> None:
        """And gets its length back some time after the daemon has noticed."""
        if (index := self._dispensable()) is None or not self._may_harm(index):
            return
        dice = self._dice
        self._truncate(index)
        if dice.random() < 0.7:
            await self._do(self._guest.read, 0, self._mounted.disk.size)
        for _ in range(10):
            if index not in self._mounted.members:
                break
            await self._do(self._guest.write, *self._somewhere())
            await trio.sleep(0.1)
        await trio.sleep(dice.choice((0.0, dice.uniform(0.0, 70.0))))
        self.extend_noticed()

    def _truncate(self, index: int) -> None:
        one = self._world.replicas[index]
        size = self._dice.randrange(self._mounted.disk.size // SECTOR) * SECTOR
        if (data_at := one.image.cache.seek(size, data=True)) < one.image.size:
            size = data_at  # so that something is lost
        self._world.note(f"{one.path} truncated to {size} bytes")
        self.harmed.add(index)
        self.life.seen_short.discard(one.path)
        self._truncated_members.discard(index)
        if index in self._mounted.members:
            self._truncated_members.add(index)
        one.image.truncate(size)

    def extend_noticed(self) -> bool:
        """Give images back their length of which the daemon knows that they were short.

        Returns whether all have theirs now.
        """
        good = True
        for index in sorted(self._mounted.order):
            one = self._world.replicas[index]
            if not self._world.is_short(index):
                continue
            noticed = one.path in self.life.seen_short
            if index not in self._truncated_members:
                self.unrecorded |= {index} if noticed else set()
            elif not self._is_ejected(index):
                noticed = False  # who dies before that has told nobody of any success without it
            good = good and noticed
            if noticed:
                self._world.note(f"{one.path} extended")
                one.image.truncate(self._world.length(index))
                self.harmed.add(index)
        return good

    async def _a_write_hangs(self) -> None:
        """It happens when its replica was long given up, and the guest wrote something newer."""
        if (index := self._dispensable()) is None:
            return
        dice, place = self._dice, self._somewhere()
        self._world.replicas[index].image_faults.plan(Kind.WRITE, Fault(hang=True))
        await self._do(self._guest.write, *place)
        await trio.sleep(dice.uniform(0.0, 80.0))
        self._crowd.paused = dice.random() < 0.5
        await self._do(self._guest.write, *place)
        if dice.random() < 0.5:
            await trio.sleep(dice.uniform(0.0, 10.0))
        self._world.release(index)
        await self._wait(lambda: self._mounted.even, 100.0)
        await self._do(self._guest.read, 0, self._mounted.disk.size)
        self._crowd.paused = False

    async def _a_write_is_stuck(self) -> None:
        """For less than a timeout, while others write to the same place."""
        dice, place = self._dice, self._somewhere()
        await self._do(self._guest.write, *place)
        faults = dice.choice(self._world.replicas).image_faults
        faults.plan(Kind.WRITE, Fault(dice.uniform(0.05, 5.0)))
        for _ in range(dice.randrange(2, 5)):
            self.life.nursery.start_soon(self._do, self._guest.write, *place)
            await trio.sleep(dice.uniform(0.0, 1.0))
        await self._wait(lambda: not self._under_way, 60.0)
        await self._do(self._guest.read, *place)

    async def _one_is_left_behind(self) -> None:
        """And comes back, slowly; the daemon dies at some moment of that."""
        if (index := self._dispensable()) is None:
            return
        dice, world = self._dice, self._world
        one, replica = world.replicas[index], self._mounted.replica(index)
        assert replica is not None
        world.detach(index)
        for _ in range(dice.randrange(1, 12)):
            await self._do(self._guest.write, *self._somewhere())
        if dice.random() < 0.2 and self._may_harm(index):
            self._truncate(index)
        delay_s = 10 ** dice.uniform(-2.0, 0.3)
        one.image_faults.weather = Weather(delay_s=(0.0, delay_s))
        one.sidecar_faults.weather = Weather(delay_s=(0.0, min(1.0, delay_s)))
        limit_before = self._mounted.repairs.limit
        if dice.random() < 0.5:
            limit = int(self._mounted.disk.size / dice.uniform(5.0, 120.0))
            self._mounted.repairs.limit = limit
        world.attach(index)
        if world.is_short(index):
            await self._wait(lambda: one.path in self.life.seen_short, 70.0)
            self.extend_noticed()
        await self._wait(lambda: replica.standing is not Standing.STALE, 70.0)
        match dice.randrange(5):
            case 0:
                await trio.sleep(dice.uniform(0.0, 30.0))
            case 1:
                await self._rest()
            case 2 if replica.standing is not Standing.CURRENT and self._may_harm(index):
                self._truncate(index)
                await self._wait(lambda: one.path in self.life.seen_short, 70.0)
                self.extend_noticed()
            case _:
                writing = dice.random() < 0.7
                for _ in range(200):
                    if replica.standing is not Standing.RESYNCING:
                        break
                    if writing:
                        await self._do(self._guest.write, *self._somewhere())
                        await self._do(self._guest.flush)
                    await trio.sleep(0.05)
        if dice.random() < 0.6:
            self._die(power=0.8)
            await trio.lowlevel.checkpoint()
        self._mounted.repairs.limit = limit_before

    async def _all_are_full(self) -> None:
        """All fail alike: nobody is to blame."""
        await self._do(self._guest.flush)  # one under way may yet fail, for what was before
        members, orders = self._mounted.members, self._mounted.orders

        def full(operation: Operation) -> Fault | None:
            if operation.kind in (Kind.WRITE, Kind.ZERO):
                return Fault(error=errno.ENOSPC, effect=Effect.NONE)
            return None

        self._crowd.full = True
        for one in self._world.replicas:
            one.image_faults.script = full
        for _ in range(3):
            await self._do(self._guest.write, *self._somewhere())
        await trio.sleep(self._dice.uniform(0.5, 20.0))
        blamed = set(members) - set(self._mounted.members)
        if blamed and self._mounted.orders == orders:  # else an administrator may have changed them
            raise BrokenError(f"all were full, and replicas {blamed} are blamed: {self._mounted}")
        for one in self._world.replicas:
            one.image_faults.script = None
        self._crowd.full = False

    async def _one_hangs(self) -> None:
        """It costs a timeout, once."""
        if (index := self._dispensable()) is None:
            return
        crowd, mounted = self._crowd, self._mounted
        crowd.reads_only = True
        await trio.sleep(2.0)
        self._world.detach(index, hang=True)
        await self._do(self._guest.read, *self._somewhere())
        await trio.sleep(3 * TIMEOUT_S)
        orders = mounted.orders  # while one is carried out, it may be the first to ask the replica
        still = orders % 2 == 0
        crowd.patience_s = lambda: TIMEOUT_S / 4 if still and mounted.orders == orders else None
        await trio.sleep(self._dice.uniform(5.0, 30.0))
        crowd.patience_s = Crowd().patience_s
        crowd.reads_only = False
        self._world.attach(index)

    async def _guests_rest(self) -> None:
        """So long that marks are cleared; what was written before may never have been synced."""
        for _ in range(4):
            await self._do(self._guest.write, *self._somewhere())
        await self._rest()
        if self._dice.random() < 0.7:
            self._die(power=0.8)
            await trio.lowlevel.checkpoint()

    async def _rest(self) -> None:
        self._crowd.paused = True
        await trio.sleep(self._dice.uniform(60.0, 140.0))
        self._crowd.paused = False

    # For plans

    async def write_something(self) -> None:
        """Whoever gets a write finds out if its image is short, or was away meanwhile."""
        await self._do(self._guest.write, *self._somewhere())

    async def write_if_short(self) -> None:
        """The same, as long as an image is short."""
        if any(map(self._world.is_short, self._mounted.order)):
            await self.write_something()

    @property
    def _is_spare(self) -> bool:
        """Whether one current replica more than needed is there."""
        return len(self._mounted.members) > max(1, self._mounted.sidecars.ledger.least)

    def _is_spare_beside_whole(self, index: int) -> bool:
        """Whether enough others are left, none of them with a file system that was gone, or hangs.

        Nobody may have noticed; then a flush fails on all, and nobody knows who has it still.
        """
        others = [other for other in self._mounted.members if other != index]
        storages = [self.life.storages(other) for other in others]
        gone = any(all(s.broken for s in of_one) for of_one in storages)
        at_work = any(s.in_flight for of_one in storages for s in of_one)  # it may take for ever
        return self._is_spare and not gone and not at_work

    def _dispensable(self) -> int | None:
        """A current replica without which the others are enough.

        Often the one that is right where they may differ, or the one that is read first.
        """
        members = self._mounted.members
        if not self._is_spare:
            return None
        first_read = next(index for index in self._mounted.order if index in members)
        return self._dice.choice((members[0], first_read, self._dice.choice(members)))

    def _somewhere(self) -> tuple[int, int]:
        sectors = self._mounted.disk.size // SECTOR
        length = self._dice.choice((1, 8, 8, 64))
        return self._dice.randrange(sectors - length) * SECTOR, length * SECTOR

    async def _do(self, action: Callable[..., Awaitable[None]], *arguments: int) -> None:
        """Do something that may fail, and that goes on to its end when this is cut off."""
        ended = trio.Event()

        async def request() -> None:
            with suppress(OSError):
                await action(*arguments)
            self._under_way -= 1
            ended.set()

        self._under_way += 1
        self.life.nursery.start_soon(request)
        await ended.wait()

    async def requests_ended(self) -> None:
        """Wait for what was begun: nobody unmounts, in order, a disk that still has to answer."""
        await self._wait(lambda: not self._under_way, float("inf"))

    async def _wait(self, condition: Callable[[], bool], at_most_s: float) -> bool:
        """Wait for something that may never come; whether it came."""
        deadline = trio.current_time() + at_most_s
        while not condition():
            if trio.current_time() > deadline:
                return False
            await trio.sleep(0.25)
        return True

    def _die(self, *, power: float) -> None:
        """The daemon dies, with this probability by a power cut."""
        if self._dice.random() < power:
            self._world.power_cut()
        else:
            self._world.kill()
