"""Stories: what a test has happen to a set on the simulated world, and how it must end."""

import errno
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import trio

from quorumfs.decisions.claim import NOTICE_S
from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.live.actions import Action, Request
from quorumfs.live.grow import Growth
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import CHANGES, Kind
from support.simulation.administrator import Administrator
from support.simulation.fate import Mounted
from support.simulation.final_checks import CONVERGE_MAX_S
from support.simulation.guest import Guest as AnyGuest
from support.simulation.harness import run_seeded
from support.simulation.oracle import BrokenError, Oracle
from support.simulation.runner import History, in_one_line
from support.simulation.setup import SCALES, Origin, Setup
from support.simulation.storage import Fault, Weather
from support.simulation.world import Life, ReplicaBackup

BLOCK = 4096
CHUNK = SCALES[0].chunk_size
EXTENT = SCALES[0].extent
DISK = SCALES[0].size
EXTENTS = range(0, DISK, EXTENT)
WRONG = b"rot!" * (BLOCK // 4)
"""What a block holds that has rotted."""

PAIR = Setup(
    replicas=2,
    threshold=1,
    scale=SCALES[0],
    fifo=True,
    rewrite_corrupted=False,
    zero_kind=None,
    origin=Origin.CREATED,
    filled=False,
    lives=0,
    careless=False,
)
TRIO = replace(PAIR, replicas=3, threshold=2, fifo=False)
EQUALS = replace(PAIR, threshold=2, fifo=False)
QUAD = replace(PAIR, replicas=4, threshold=2, fifo=False, rewrite_corrupted=True)
RAW = replace(PAIR, origin=Origin.ADOPTED, filled=True)
RAW_TRIO = replace(TRIO, origin=Origin.ADOPTED, filled=True)

EIO = Fault(error=errno.EIO)
"""An operation fails, and does nothing."""


class Story(History):
    """A history that a test tells, instead of the dice."""

    def __init__(self, seed: int, setup: Setup, script: "Script") -> None:
        super().__init__(seed, setup)
        self._script = script

    async def _run(self) -> None:
        self._create()
        await self._script(self)

    @asynccontextmanager
    async def mounted(
        self, order: Sequence[int] | None = None, *, threshold: int | None = None
    ) -> AsyncGenerator["Guest", None]:
        """A mount of these replicas, or of all, that ends in order unless it is dead by then.

        *threshold*: the vote threshold asked for; None: that of the set.
        """
        paths = list(range(self.setup.replicas) if order is None else order)
        try:
            plan = self.operator.assemble(paths, threshold=threshold)
        except AssemblyRefusedError as error:
            self.opinion.require_reason(error, paths, degraded=False, threshold=threshold)
            raise
        self.opinion.require_ordered(paths, plan)
        self.state.last = None
        async with self.world.boot() as life:
            mounted = await self.mounting.mount(life, paths, plan)
            guest = Guest(self, life, mounted)
            yield guest
            if guest.replaced:
                await self.unmount_fenced(guest)
            elif not life.dead:
                await self.mounting.unmount(mounted)
        self.errors.require_none()
        self.state.note_thresholds(mounted)
        self.state.life_ended()

    def holding(self, *places: int, size: int = BLOCK) -> "Opening":
        """A mount of which the guest first writes *size* bytes at each of *places*."""
        return Opening(self, places, size)

    def differing(self, index: int, at: int) -> "Opening":
        """A mount of adopted images that has found the block at *at* of one of them to differ."""
        return Opening(self, wrong=(index, at))

    async def ends_well(self) -> None:
        """Faults stop, and everything becomes good."""
        await self.final_checks.run()

    def copied(self) -> "CopiedSet":
        """A copy of the whole set as it is, and of what is known of it."""
        return CopiedSet(self.world.copy(), deepcopy(self.oracle))

    def turn_to(self, copied: "CopiedSet") -> "CopiedSet":
        """Tell of this copy from here on; returns the set that was told of until now."""
        until_now = self.copied()
        self.state.oracle = copied.oracle
        for index, replica in enumerate(copied.replicas):
            self.world.put(index, replica)
        self.state.last = None
        return until_now

    def require_split(self) -> None:
        """Raise unless a mount of what is there is refused for two histories."""
        order = list(range(self.setup.replicas))
        for paths in (order, order[::-1]):
            try:
                plan = self.operator.assemble(paths, degraded=True)
            except AssemblyRefusedError as error:
                if error.rule == "split brain":
                    continue
                raise
            raise BrokenError(f"two histories are mounted as one, by the rule: {plan.rule}")

    def sized(self, size: int) -> None:
        """The disk has *size* bytes from now on; raises if it had more before."""
        if size < self.oracle.size:
            raise BrokenError(f"a disk of {self.oracle.size} bytes has {size}")
        self.state.sized(size)
        self.state.size_sure = size

    def fail(self, index: int, kinds: Iterable[Kind], fault: Fault = EIO) -> None:
        """From now on these operations on the image of a replica have *fault*."""
        faults, wrong = self.world.replicas[index].image_faults, frozenset(kinds)
        faults.script = lambda operation: fault if operation.kind in wrong else None

    def fail_once(self, index: int, kind: Kind, fault: Fault = EIO) -> None:
        """The next operation of *kind* on the image of a replica has *fault*."""
        self.world.replicas[index].image_faults.plan(kind, fault)

    def evict(self, index: int) -> None:
        """The page cache of an image is short of memory: clean pages go, lost ones too."""
        self.world.replicas[index].image.evict()

    def drop_unsynced(self, index: int) -> None:
        """The kernel drops what it cannot write back of an image: all since its last sync."""
        image = self.world.replicas[index].image
        for change in image.unsynced:
            image._land(change, [])
        image.unsynced.clear()
        image.evict()

    def fail_writeback(self, index: int) -> None:
        """The kernel drops what it cannot write back, and says so at the next sync."""
        self.drop_unsynced(index)
        self.fail_once(index, Kind.SYNC)

    def cut_off(self, *indexes: int) -> None:
        """The daemon is killed, and what it was writing to the images of these never happened."""
        assert self.world.life is not None
        for index in indexes:
            for storage in self.world.life.storages(index):
                storage.drop_writes()
        self.world.kill()

    def mend(self, index: int) -> None:
        """No more of that."""
        self.world.replicas[index].image_faults.script = None

    def slow_down(self, index: int, seconds: float) -> None:
        """Everything on the image of a replica takes so long."""
        self.world.replicas[index].image_faults.weather = Weather(delay_s=(seconds, seconds))

    @asynccontextmanager
    async def taken_over(self, old: "Guest") -> AsyncGenerator["Guest", None]:
        """A mount of another host, to which *old*'s is down; that goes on until it notices.

        From its first moment on what *old* still hears of may be lost, and when this one serves,
        *old* must hear of nothing more.
        """
        paths = list(range(self.setup.replicas))
        old.superseded = True
        async with self.world.boot(beside=True) as life:
            plan = self.operator.assemble(paths)
            self.mounting.claim(life, paths, plan)
            await trio.sleep(NOTICE_S)
            old.replaced = True
            plan = self.operator.assemble(paths)
            mounted = await self.mounting.mount(life, paths, plan)
            yield Guest(self, life, mounted)
            await self.mounting.unmount(mounted, must_succeed=True)
        self.errors.require_none()

    async def unmount_fenced(self, guest: "Guest") -> None:
        """It ends, and writes nothing."""
        indexes = range(self.setup.replicas)
        storages = [storage for index in indexes for storage in guest.life.storages(index)]
        asked = [len(storage.log) for storage in storages]
        await guest.mounted.repairs.stop()
        await guest.mounted.disk.close()
        later = [op for one, before in zip(storages, asked, strict=True) for op in one.log[before:]]
        if any(operation.kind in CHANGES for operation in later):
            raise BrokenError(f"a mount that was fenced wrote: {later}")


@dataclass(frozen=True, slots=True)
class Opening:
    """How many stories begin: a mount, what it finds, what is written first, and what fails then.

    As in ``async with story.holding(0).durable().failing(1, Kind.SYNC).mounted() as guest``.
    """

    story: Story
    places: tuple[int, ...] = ()
    size: int = BLOCK
    wrong: tuple[int, int] | None = None
    """The replica and the place of a block that differs from the first."""
    flushed: bool = False
    faults: tuple[tuple[int, Kind, Fault], ...] = ()

    def durable(self) -> "Opening":
        """The same, and all that is written first is flushed."""
        return replace(self, flushed=True)

    def failing(self, index: int, kind: Kind, fault: Fault = EIO) -> "Opening":
        """The same, and then the next operation of *kind* on an image has *fault*."""
        return replace(self, faults=(*self.faults, (index, kind, fault)))

    @asynccontextmanager
    async def mounted(self) -> AsyncGenerator["Guest", None]:
        """The mount of all replicas, from then on."""
        if self.wrong is not None:
            index, at = self.wrong
            self.story.world.replicas[index].image.rot(at, WRONG)
        async with self.story.mounted() as guest:
            if self.wrong is not None:
                await guest.found_to_differ()
            for at in self.places:
                await guest.write(at, self.size)
            if self.flushed:
                await guest.flush()
            for index, kind, fault in self.faults:
                self.story.fail_once(index, kind, fault)
            yield guest


@dataclass(frozen=True, slots=True)
class CopiedSet:
    """A set as it was at some time."""

    replicas: list[ReplicaBackup]
    oracle: Oracle


class Guest(AnyGuest):
    """Whoever uses a mount of a story."""

    def __init__(self, story: Story, life: Life, mounted: Mounted) -> None:
        number = story.workload.next_number()
        super().__init__(story.oracle, life, mounted.disk, number)
        self.mounted = mounted
        self._story = story
        self.superseded = False
        """Another mount has the set, and this one may not know yet: what it hears may be lost."""
        self.replaced = False
        """That mount serves: this one must not hear of anything any more."""

    async def write(self, at: int, size: int = BLOCK, *, durable: bool = False) -> None:
        """Raises `OSError`."""
        await super().write(at, size, durable=durable)

    async def read(self, at: int, size: int = BLOCK) -> None:
        """Raises `OSError`."""
        await super().read(at, size)

    def administrator(self) -> Administrator:
        """Whoever gives orders to this mount, and checks what is promised of them."""
        return Administrator(self.life, self.mounted, self._story.state, self._dice)

    async def grow(self, size: int) -> dict[str, Any]:
        """Have the disk grow to *size* bytes, as an administrator does. Raises `UserError`."""

        async def announce(announced: int) -> None:
            if self._disk.size >= announced:
                raise BrokenError("a request may touch what the kernel does not know of")
            await trio.sleep(0.01)

        growth = Growth(self._disk, self.mounted.sidecars, trio.Lock(), announce)
        answer = await growth.grow(Request({"size": size}), Action(1, "grow"))
        self._story.sized(self._disk.size)
        return answer

    async def go_on(self) -> None:
        """Use a mount that is taken over from, until its end."""
        while True:
            at = self._dice.randrange(DISK // BLOCK) * BLOCK
            try:
                if self.replaced:
                    await self._try_all(at)
                elif self._dice.random() < 0.3:
                    await self.flush()
                else:
                    await self._write_what_may_be_lost(at)
            except OSError:
                self._note(f"guest {self._number} failed")
            await trio.sleep(self._dice.uniform(0.0, 0.1))

    async def _write_what_may_be_lost(self, at: int) -> None:
        writing = self.oracle.begin_write(at, BLOCK, self._number)
        try:
            await self._disk.write(at, writing.data)
        except OSError:
            self.oracle.write_failed(writing)
            raise
        if self.replaced:
            raise BrokenError("a mount heard of a write after it had been replaced")
        if self.superseded:
            self.oracle.write_failed(writing)
        else:
            self.oracle.wrote(writing)

    async def _try_all(self, at: int) -> None:
        """What nobody knows to have been written is found if it was."""
        for request in (
            partial(self._disk.write, at, b"?" * BLOCK),
            partial(self._disk.read, at, BLOCK),
            partial(self._disk.make_zeros, at, BLOCK, discard=True),
            self._disk.flush,
        ):
            try:
                await request()
            except OSError as error:
                if error.errno != errno.EIO:
                    raise BrokenError(f"a mount that was replaced failed with {error}") from None
            else:
                raise BrokenError("a mount was heard of after it had been replaced")

    async def write_surely(self, at: int, size: int = BLOCK) -> None:
        """Write what has to be possible."""
        try:
            await self.write(at, size)
        except OSError as error:
            raise BrokenError(f"a write failed without need: {error}") from error

    async def read_surely(self, at: int, size: int = BLOCK) -> None:
        """Read what has to be readable."""
        try:
            await self.read(at, size)
        except OSError as error:
            raise BrokenError(f"a read failed without need: {error}") from error

    async def surely(self, request: Awaitable[object]) -> None:
        """Have done what has to be possible."""
        try:
            await request
        except OSError as error:
            raise BrokenError(f"a request failed without need: {error}") from error

    def begin(self, request: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Have *request* under way; it may fail."""

        async def quietly() -> None:
            with suppress(OSError):
                await request(*arguments)

        self.life.nursery.start_soon(quietly)

    def replica(self, index: int) -> Replica:
        """A replica of this mount."""
        replica = self.mounted.replica(index)
        assert replica is not None
        return replica

    async def found_to_differ(self) -> None:
        """Wait until adopted images are compared, and what differs is reported."""
        await self.until(lambda: bool(self.mounted.repairs.differing))
        await self.until(lambda: self.mounted.sidecars.ledger.map.count(UNVERIFIED) < 3)

    async def converged(self) -> None:
        """Wait until the replicas are the same again."""
        await self.until(lambda: self.mounted.converged)

    async def until(self, condition: Callable[[], bool], every_s: float = 1.0) -> None:
        """Wait for what has to come."""
        for _ in range(int(CONVERGE_MAX_S / every_s)):
            if condition():
                return
            await trio.sleep(every_s)
        raise BrokenError(f"not so after {CONVERGE_MAX_S:g} s: {self.mounted}")


Script = Callable[[Story], Awaitable[None]]


def told(script: Script, setup: Setup, seed: int) -> str | None:
    """How a story ends: None if well."""
    story = Story(seed, setup, script)
    end = None
    try:
        run_seeded(seed, story.run)
    except* Exception as group:
        end = in_one_line(group)
    return end


async def ejected(story: Story, index: int = 1) -> None:
    """A first mount, closed in order, after which one replica lacks all there is."""
    async with story.mounted() as guest:
        story.fail(index, CHANGES)
        for at in EXTENTS:
            await guest.write(at, EXTENT)
    story.mend(index)


async def taken_over_while_at_work(story: Story) -> None:
    """The first host is not down at all, and its guest writes as fast as it can."""
    async with story.mounted() as old:
        for at in EXTENTS:
            await old.write(at)
        old.begin(old.go_on)
        await trio.sleep(0.5)
        async with story.taken_over(old) as new:
            for _ in range(3):
                for at in EXTENTS:
                    await new.write_surely(at)
                    await new.read_surely(at)
                    await trio.sleep(0.2)
                await new.flush()
            await new.converged()
    await story.ends_well()
