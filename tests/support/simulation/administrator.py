"""The administrator of the simulated set: gives orders to a mount while guests use it.

The orders are the verbs of `quorumfs.live`, also foolish ones: the last replica is taken out, or
one that is away, or the same one twice; one that is in use is taken in, or added; one is named that
there is not. What must hold:

* an order that was refused changed nothing;
* another vote threshold is on record with all that are current before it is in force;
* one that was answered is on record, durably, on all that are current, and they are enough;
* a replica that left as a whole is a copy of the disk at one moment, and durable.

What an order made of a replica is noted in the state of the history: the next mount must agree.
"""

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import trio

from quorumfs.decisions.claim import Claim
from quorumfs.decisions.record import Record, Role, RoleState, Sidecar
from quorumfs.decisions.sidecar import FormatError
from quorumfs.decisions.standing import Standing
from quorumfs.errors import UserError
from quorumfs.live import admission, newcomer
from quorumfs.live import membership as membership_module
from quorumfs.live import settings as settings_module
from quorumfs.live.actions import Action, Request, Verb
from quorumfs.live.grow import Growth
from quorumfs.live.membership import Membership
from quorumfs.live.names import named
from quorumfs.live.resolving import Deciding
from quorumfs.live.scrubbing import Scrubbing
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind
from support.sidecars import decode
from support.simulation.fate import Mounted
from support.simulation.guest import REQUEST_MAX_S
from support.simulation.media import SECTOR
from support.simulation.oracle import BrokenError
from support.simulation.state import SetState
from support.simulation.storage import Effect, Fault
from support.simulation.world import Life, World

Leave = Callable[[Replica], Awaitable[OSError | None]]
Admit = Callable[[Replica, int, Role], Awaitable[None]]
Change = Callable[[int], Awaitable[None]]

MEMBERS_MAX = 5
"""Replicas in a set to which others are added."""


class RefusedOrderError(Exception):
    """An order failed, or was refused."""

    def __init__(self, error: OSError | UserError) -> None:
        super().__init__(str(error))
        self.certain = isinstance(error, UserError) or error.errno == errno.EBUSY
        """Nothing was changed; else some of the sidecars may say that it was."""


class Administrator:
    """Whoever gives orders to one mount."""

    def __init__(self, life: Life, mounted: Mounted, state: SetState, dice: random.Random) -> None:
        self._life = life
        self._world: World = life.world
        self._mounted = mounted
        self._state = state
        self._dice = dice
        self._numbers = count(1)
        sidecars, enrolment = mounted.sidecars, mounted.sidecars.enrolment
        changing = trio.Lock()
        self._membership = Membership(
            mounted.disk, sidecars, mounted.repairs, changing, mounted.settings, "/mnt"
        )
        self._growth = Growth(mounted.disk, sidecars, changing, self._announce)
        self._scrubbing = Scrubbing(mounted.repairs)
        self._deciding = Deciding(mounted.disk, mounted.repairs, partial(named, mounted.disk))
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        for name, role in (("take_out", RoleState.OFFLINE), ("remove", RoleState.REMOVED)):
            leave = getattr(enrolment, name)
            setattr(enrolment, name, partial(self._leave, leave, role))
        change = partial(self._change_threshold, sidecars.change_threshold)
        setattr(sidecars, "change_threshold", change)  # noqa: B010
        setattr(enrolment, "admit", partial(self._admit, enrolment.admit))  # noqa: B010

    # Orders at random

    async def work(self) -> None:
        """Give orders, some of them while others are carried out, until `stop`."""
        async with self._until_killed(), trio.open_nursery() as self._nursery:
            await self._give_orders(self._nursery)
        self._ended.set()

    async def stop(self) -> None:
        """Give no more orders, and wait until those under way have ended, as before an unmount."""
        await trio.lowlevel.checkpoint()
        if self._nursery is None:
            return
        self._nursery.cancel_scope.cancel()
        with trio.move_on_after(REQUEST_MAX_S) as scope:
            await self._ended.wait()
        if scope.cancelled_caught:
            raise BrokenError("an order did not end")

    async def _give_orders(self, nursery: trio.Nursery) -> None:
        dice = self._dice
        scrubs, changes = dice.random() < 0.5, dice.random() < 0.5
        while (scrubs or changes) and dice.random() < 0.9:
            await trio.sleep(10 ** dice.uniform(-1.5, 1.5))
            if scrubs and (not changes or dice.random() < 0.3):
                nursery.start_soon(self._steer_scrubs if dice.random() < 0.8 else self._decide)
            else:
                nursery.start_soon(self._change)

    async def _steer_scrubs(self) -> None:
        """Have the set scrubbed, or change one's mind."""
        dice = self._dice
        order = dice.choice(("start", "start", "start", "pause", "resume", "stop"))
        arguments: dict[str, Any] = {"order": order, "repair": dice.random() < 0.5}
        if dice.random() < 0.3:
            arguments["limit"] = 0 if dice.random() < 0.5 else 1 << dice.randrange(14, 24)
        with suppress(RefusedOrderError):
            await self._order(self._scrubbing.scrub, "scrub", arguments)

    async def _decide(self) -> None:
        """Say which replica is right where nothing else tells: one of which nothing is known to be
        wrong. Mostly all is decided already, and then nothing may change."""
        sound = [index for index in self._mounted.members if index not in self._state.harmed]
        if not sound:
            return
        dice, size = self._dice, self._mounted.disk.size
        arguments: dict[str, Any] = {"keep": self._world.replicas[dice.choice(sound)].path}
        if dice.random() < 0.5:
            offset = dice.randrange(size)
            arguments |= {"offset": offset, "length": dice.randrange(1, size)}
        before = self._mounted.repairs.undecided
        with suppress(RefusedOrderError):
            answer = await self._order(self._deciding.resolve, "resolve", arguments, float("inf"))
            if answer["written"] and not before and self._mounted.even:
                raise BrokenError(f"all was decided, and it was written: {answer}")

    async def name_nobody(self) -> None:
        """Name a replica that there is not, which every order refuses."""
        membership, path = self._membership, "/mistyped.img"
        arguments: dict[str, Any] = {"replica": path, "image": self._world.replicas[0].path}
        orders = (membership.offline, membership.online, membership.remove, membership.replace)
        verb = self._dice.choice(orders)
        try:
            await self._order(verb, verb.__name__, arguments)
        except RefusedOrderError as error:
            if path not in str(error):
                raise BrokenError(f"it does not say who is not there: {error}") from error
            return
        raise BrokenError(f"{verb.__name__} of {path}, which there is not, succeeded")

    async def _change(self) -> None:
        """Change which replicas the set has."""
        dice, everyone = self._dice, self._mounted.order
        out = sorted(self._mounted.taken_out)
        index = dice.choice(out if out and dice.random() < 0.4 else everyone)
        self._make_trouble(index)
        draw = dice.random()
        with suppress(RefusedOrderError):
            if dice.random() < 0.1:
                await self.grow()
            elif dice.random() < 0.2:
                present = self._mounted.disk.threshold
                thresholds = (present - 1, present + 1, len(everyone), len(everyone) + 1)
                await self.change_threshold(dice.choice(thresholds))
            elif dice.random() < 0.05:
                await self.name_nobody()
            elif draw < 0.5:
                await (self.online(index) if index in out else self.offline(index))
            elif draw < 0.65:
                await (self.offline(index) if index in out else self.online(index))
            elif draw < 0.75:
                await self.remove(index)
            elif draw < 0.9:
                await self.add(self._any_place())
            else:
                await self.replace(index, self._any_place())

    def _any_place(self) -> int:
        """A new image, mostly; or one that was removed, or that is a replica already."""
        dice, replicas = self._dice, self._world.replicas
        if dice.random() < 0.6 and len(self._mounted.order) < MEMBERS_MAX:
            return self._world.index_of(self._world.new_replica().path)
        return dice.randrange(len(replicas))

    def _make_trouble(self, index: int) -> None:
        """Some orders meet a replica that loses its pages, or the daemon dies amid them."""
        dice, mounted = self._dice, self._mounted
        spare = mounted.even and len(mounted.members) > mounted.sidecars.ledger.least
        spare = spare and not any(one.image_faults.planned for one in self._world.replicas)
        draw = dice.random()
        if draw < 0.1 and spare and index in mounted.members:
            kind = dice.choice((Kind.SYNC, Kind.SEAL))
            faults = self._world.replicas[index].image_faults
            faults.plan(
                kind, Fault(error=errno.EIO, effect=dice.choice((Effect.NONE, Effect.PART)))
            )
        elif draw > 0.93:
            self._life.crash_at(self._life.steps + dice.randrange(1, 80), power=dice.random() < 0.5)

    # The orders

    async def offline(self, index: int) -> None:
        """Take a replica out."""
        if self._state.harmed:
            return  # it may hold what others lost behind the back of all daemons
        async with self._ordered(index, RoleState.OFFLINE):
            path = self._world.replicas[index].path
            try:
                await self._order(self._membership.offline, "offline", {"replica": path})
            except RefusedOrderError as error:
                if f"{path} is out, and " not in str(error):
                    raise
        if self._state.ordered.get(index) is RoleState.OFFLINE:
            replica = self._mounted.replica(index)
            assert replica is not None
            self._require_recorded(replica, RoleState.OFFLINE)
            self._require_copy(index)

    async def online(self, index: int) -> None:
        """Take a replica in again."""
        if self._state.ordered.get(index) is RoleState.OFFLINE:
            self._require_copy(index)
        async with self._ordered(index, RoleState.STALE):
            path = self._world.replicas[index].path
            await self._order(self._membership.online, "online", {"replica": path})

    async def add(self, index: int) -> None:
        """Make an image a replica."""
        path, dice = self._world.replicas[index].path, self._dice
        arguments: dict[str, Any] = {"image": path}
        given_up = index in self._state.removed | self._state.parted
        if given_up or dice.random() < 0.3:
            arguments["overwrite"] = True
        if dice.random() < 0.3:
            arguments["at"] = dice.randrange(1, len(self._mounted.order) + 2)
        async with self._ordered(index, None):
            await self._order(self._membership.add, "add", arguments)

    async def remove(self, index: int) -> None:
        """Remove a replica for good."""
        if self._state.harmed:
            return
        async with self._ordered(index, RoleState.REMOVED):
            path = self._world.replicas[index].path
            try:
                await self._order(self._membership.remove, "remove", {"replica": path})
            except RefusedOrderError as error:
                if f"{path} is out, and " not in str(error):
                    raise
            self._state.removed.add(index)

    async def replace(self, old: int, new: int) -> None:
        """Make an image a replica in the place of another one."""
        if self._state.harmed:
            return
        paths = [self._world.replicas[index].path for index in (old, new)]
        arguments: dict[str, Any] = {"replica": paths[0], "image": paths[1]}
        arguments["overwrite"] = new in self._state.removed
        async with self._ordered(new, None), self._ordered(old, RoleState.REMOVED):
            try:
                await self._order(self._membership.replace, "replace", arguments, float("inf"))
            except RefusedOrderError as error:
                error.certain = False  # the new one may have been added
                raise
            self._state.removed.add(old)

    async def grow(self) -> None:
        """Make the disk larger; or smaller, which is refused."""
        disk, state, dice = self._mounted.disk, self._state, self._dice
        before, largest = disk.size, 2 * state.setup.scale.size
        size = dice.choice(
            (before, before - SECTOR, dice.randrange(before, max(before + 1, largest)))
        )
        arguments = {"size": size if dice.random() < 0.1 else size // SECTOR * SECTOR}
        try:
            answer = await self._order(self._growth.grow, "grow", arguments)
        except RefusedOrderError as error:
            if disk.size == arguments["size"] != before:
                raise BrokenError(f"the disk has grown, and was told not to: {error}") from error
            raise
        if disk.size < answer["size"]:
            raise BrokenError(f"a disk that grew to {answer['size']} bytes has {disk.size}")
        state.size_sure = disk.size

    async def change_threshold(self, threshold: int) -> None:
        """Have another vote threshold in force. Raises `RefusedOrderError`."""
        arguments = {"options": [f"vote-threshold={threshold}"]}
        await self._order(self._mounted.settings.set, "set", arguments)

    async def _announce(self, size: int) -> None:
        """The kernel is told that the disk is larger; guests may use all of it from then on."""
        if self._mounted.disk.size >= size:
            raise BrokenError("a request may touch what the kernel does not know of")
        await trio.sleep(0.01)
        self._state.sized(size)

    async def complete(self) -> None:
        """Do again what was begun and cut off, and take in all that were taken out. Raises
        `RefusedOrderError`."""
        ledger = self._mounted.sidecars.ledger
        given = {replica.slot for replica in self._mounted.disk.replicas}
        async with self._until_killed():
            for slot in ledger.record.slots:
                if slot not in given:
                    await self.add(self._world.index_of(ledger.record.roles[slot].path))
            for index in sorted(self._state.parted):
                replica = self._mounted.replica(index)
                if replica is not None and replica.standing.needs_operator:
                    await self.add(index)
            for index in sorted(self._mounted.taken_out):
                replica = self._mounted.replica(index)
                assert replica is not None
                assert replica.slot is not None
                if ledger.records.is_removed(replica.slot):
                    await self.remove(index)
                else:
                    await self.online(index)

    async def _order(
        self, verb: Verb, name: str, arguments: dict[str, Any], limit_s: float = REQUEST_MAX_S
    ) -> dict[str, Any]:
        """Have an order carried out. Raises `RefusedOrderError`."""
        number, note = next(self._numbers), self._world.note
        note(f"order {number}: {name} {arguments}")
        self._mounted.orders += 1
        try:
            with trio.move_on_after(limit_s) as scope:
                answer = await verb(Request(arguments), Action(number, name))
        except (OSError, UserError) as error:
            note(f"order {number}: {error}")
            raise RefusedOrderError(error) from error
        finally:
            self._mounted.orders += 1
        if scope.cancelled_caught:
            raise BrokenError(f"the order {name} {arguments} did not end")
        note(f"order {number}: {answer['message']}")
        return answer

    @asynccontextmanager
    async def _ordered(self, index: int, wanted: RoleState | None) -> AsyncIterator[None]:
        """What an order, given meanwhile, makes of a replica, for all that come later.

        *wanted*: None: it becomes a replica, unless it is one.
        """
        state = self._state
        before, was = state.ordered.pop(index, None), self._role(index)
        state.orders[index] += 1
        alone, number = not state.ordering[index], state.orders[index]
        state.ordering[index] += 1
        known = None
        try:
            yield
            known = wanted or (RoleState.STALE if was is None else before)
        except RefusedOrderError as error:
            if error.certain:
                known = before
                if alone and number == state.orders[index] and was is not self._role(index):
                    raise BrokenError(f"it was refused, and changed something: {error}") from error
            raise
        finally:
            state.ordering[index] -= 1
            if alone and number == state.orders[index] and known is not None:
                state.ordered[index] = known

    def _role(self, index: int) -> RoleState | None:
        """OFFLINE, STALE for any other replica of the set, and None for what is none."""
        replica, record = self._mounted.replica(index), self._mounted.sidecars.ledger.record
        if replica is not None and replica.standing is Standing.OFFLINE:
            return RoleState.OFFLINE
        path = self._world.replicas[index].path
        known = any(record.roles[slot].path == path for slot in record.slots)
        return RoleState.STALE if known else None

    # What must hold

    async def _leave(self, leave: Leave, state: RoleState, replica: Replica) -> OSError | None:
        """`take_out` or `remove` of `quorumfs.metadata.enrolment.Enrolment`, watched."""
        index, ledger = self._world.index_of(replica.path), self._mounted.sidecars.ledger
        self._state.copies.pop(index, None)
        image = self._world.replicas[index].image
        whole, kept = replica.standing.is_member, image.cache.copy()
        dropped = image.dropped  # in an earlier life: nobody can know of it any more
        if whole and not self._state.forked and index not in self._state.harmed:
            self._state.oracle.check_copy(kept, replica.path)
        problem = await leave(replica)
        if whole and len(ledger.members) < ledger.least:
            raise BrokenError(f"{replica.path} left, and too few are current: {self._mounted}")
        self._require_recorded(replica, state)
        if whole and not dropped:
            self._state.copies[index] = kept
        return problem

    async def _admit(self, admit: Admit, replica: Replica, slot: int, role: Role) -> None:
        """`quorumfs.metadata.enrolment.Enrolment.admit`, watched."""
        await admit(replica, slot, role)
        self._require_recorded(replica, RoleState.STALE)
        index = self._world.index_of(replica.path)
        self._state.removed.discard(index)
        self._state.harmed.discard(index)
        for backup in self._state.backups:
            backup.pop(index, None)

    async def _change_threshold(self, change: Change, threshold: int) -> None:
        """`quorumfs.metadata.protocol.Metadata.change_threshold`, watched."""
        ledger = self._mounted.sidecars.ledger
        before = ledger.threshold
        try:
            await change(threshold)
        except OSError:
            if ledger.threshold != before:
                raise BrokenError("it failed, and another threshold is in force") from None
            raise
        self._state.thresholds.add(threshold)
        if len(ledger.members) < threshold:
            raise BrokenError(f"too few have it on record: {self._mounted}")
        for one, record in self._records():
            if record.threshold != threshold:
                raise BrokenError(f"{one.path} does not say that the threshold is {threshold}")

    def _records(self) -> Iterator[tuple[Replica, Record]]:
        """What the sidecars of all that are current say durably.

        The replica that is joining is a member in memory before its sidecar has the record.
        """
        ledger = self._mounted.sidecars.ledger
        joining = ledger.resyncing if ledger.joining else None
        for one in ledger.members:
            if one is joining:
                continue
            file = self._world.replicas[self._world.index_of(one.path)].sidecar
            assert file is not None
            yield one, decode(file.durable.read(0, file.durable.size)).record

    def _require_recorded(self, replica: Replica, wanted: RoleState) -> None:
        """Raise unless what was ordered is durable in the sidecars of all that are current."""
        assert replica.slot is not None
        for one, record in self._records():
            if record.roles[replica.slot].state is not wanted:
                raise BrokenError(f"{one.path} does not say that {replica.path} is {wanted.name}")

    def _require_copy(self, index: int) -> None:
        """Raise unless a replica that left as a whole is durably what it was then."""
        one = self._world.replicas[index]
        kept = self._state.copies.get(index)
        if kept is None or index in self._state.harmed:
            return
        if one.image.cache.differing_blocks(kept):
            raise BrokenError(f"{one.path} was taken out, and has changed since")
        if one.image.durable.differing_blocks(kept):
            raise BrokenError(f"{one.path} was taken out, and is not durable")

    @asynccontextmanager
    async def _until_killed(self) -> AsyncIterator[None]:
        """What an order does not let itself be stopped in, a kill ends all the same."""

        def not_cut_off() -> trio.CancelScope:
            scope = trio.CancelScope(shield=True)
            self._life.shields.append(scope)
            return scope

        async def in_thread(make: Callable[[], None], **_: object) -> None:
            await trio.sleep(self._dice.uniform(0.0, 1.0))
            make()

        with (
            mock.patch.object(membership_module, "not_cut_off", not_cut_off),
            mock.patch.object(admission, "not_cut_off", not_cut_off),
            mock.patch.object(settings_module, "not_cut_off", not_cut_off),
            mock.patch.object(admission, "make_files", self._make_files),
            mock.patch.object(trio.to_thread, "run_sync", in_thread),
        ):
            yield

    def _make_files(
        self,
        path: str,
        sidecar: Sidecar,
        record: Record,
        _: str,
        directory: str | None,
        __: Claim | None,
        *,
        overwrite: bool,
    ) -> None:
        """As `quorumfs.live.newcomer.make_files`; there are no devices."""
        assert directory is None
        index = self._world.index_of(path)
        one = self._world.replicas[index]
        if not all(storage.closed for storage in self._life.storages(index)):
            raise UserError(f"{path} is in use by another program")
        found: Sidecar | str | None = None
        if one.sidecar is not None:
            try:
                found = decode(one.sidecar.whole)
            except FormatError as error:
                found = str(error)
            newcomer._refuse_member(path, found, sidecar, record, overwrite=overwrite)
        elif not overwrite and one.image.cache.allocated:
            raise UserError(f"{path} is there, and is not empty")
        if (size := one.image.size) != record.size:
            if overwrite:  # the administrator does what the message says, for the next time
                one.image.truncate(record.size)
            raise UserError(f"{path} has {size} bytes, the disk has {record.size}")
        try:
            self._world.create_sidecar(index, sidecar)
        except OSError as error:
            raise UserError(f"cannot make the replica {path}: {error.strerror}") from None
