"""The administrator of the simulated set: gives orders to a mount while guests use it.

The orders are the verbs of `quorumfs.live`, also foolish ones: the last replica is taken out, or
one that is away, or the same one twice; one that is in use is taken in. What must hold:

* an order that was refused changed nothing;
* one that was answered is on record, durably, on all that are current, and they are enough;
* a replica that left as a whole is a copy of the disk at one moment, and durable.

What an order made of a replica is noted in the state of the history: the next mount must agree.
"""

import errno
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count
from typing import Any
from unittest import mock

import trio

from quorumfs.decisions.record import RoleState
from quorumfs.decisions.standing import Standing
from quorumfs.errors import UserError
from quorumfs.live import membership as membership_module
from quorumfs.live.actions import Action, Request, Verb
from quorumfs.live.membership import Membership
from quorumfs.live.scrubbing import Scrubbing
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind
from support.sidecars import decode
from support.simulation.fate import TIMEOUT_S, Mounted
from support.simulation.guest import REQUEST_MAX_S
from support.simulation.oracle import BrokenError
from support.simulation.state import SetState
from support.simulation.storage import Effect, Fault
from support.simulation.world import Life, World

Leave = Callable[[Replica], Awaitable[OSError | None]]


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
        self._membership = Membership(
            mounted.disk, sidecars, mounted.repairs, trio.Lock(), "/mnt", TIMEOUT_S
        )
        self._scrubbing = Scrubbing(mounted.repairs)
        self._nursery: trio.Nursery | None = None
        self._ended = trio.Event()
        setattr(enrolment, "take_out", partial(self._take_out, enrolment.take_out))  # noqa: B010

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
                nursery.start_soon(self._steer_scrubs)
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

    async def _change(self) -> None:
        """Change which replicas the set has."""
        dice = self._dice
        out = sorted(self._mounted.taken_out)
        index = dice.choice(out if out and dice.random() < 0.4 else self._mounted.order)
        self._make_trouble(index)
        with suppress(RefusedOrderError):
            if dice.random() < (0.2 if index in out else 0.7):
                await self.offline(index)
            else:
                await self.online(index)

    def _make_trouble(self, index: int) -> None:
        """Some orders meet a replica that loses its pages, or the daemon dies amid them."""
        dice, mounted = self._dice, self._mounted
        spare = mounted.even and len(mounted.members) > mounted.sidecars.ledger.least
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
            self._require_copy(index)

    async def online(self, index: int) -> None:
        """Take a replica in again."""
        if self._state.ordered.get(index) is RoleState.OFFLINE:
            self._require_copy(index)
        async with self._ordered(index, RoleState.STALE):
            path = self._world.replicas[index].path
            await self._order(self._membership.online, "online", {"replica": path})

    async def take_all_in(self) -> None:
        """Take in all that were taken out. Raises `RefusedOrderError`."""
        async with self._until_killed():
            for index in sorted(self._mounted.taken_out):
                await self.online(index)

    async def _order(self, verb: Verb, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Have an order carried out. Raises `RefusedOrderError`."""
        number, note = next(self._numbers), self._world.note
        note(f"order {number}: {name} {arguments}")
        try:
            with trio.move_on_after(REQUEST_MAX_S) as scope:
                answer = await verb(Request(arguments), Action(number, name))
        except (OSError, UserError) as error:
            note(f"order {number}: {error}")
            raise RefusedOrderError(error) from error
        if scope.cancelled_caught:
            raise BrokenError(f"the order {name} {arguments} did not end")
        note(f"order {number}: {answer['message']}")
        return answer

    @asynccontextmanager
    async def _ordered(self, index: int, wanted: RoleState) -> AsyncIterator[None]:
        """What an order, given meanwhile, makes of a replica, for all that come later."""
        state = self._state
        before, was = state.ordered.pop(index, None), self._is_offline(index)
        state.orders[index] += 1
        alone, number = not state.ordering[index], state.orders[index]
        state.ordering[index] += 1
        known = None
        try:
            yield
            known = wanted
        except RefusedOrderError as error:
            if error.certain:
                known = before
                if alone and number == state.orders[index] and was != self._is_offline(index):
                    raise BrokenError(
                        f"an order that was refused changed something: {error}"
                    ) from error
        finally:
            state.ordering[index] -= 1
            if alone and number == state.orders[index] and known is not None:
                state.ordered[index] = known

    def _is_offline(self, index: int) -> bool:
        replica = self._mounted.replica(index)
        assert replica is not None
        return replica.standing is Standing.OFFLINE

    # What must hold

    async def _take_out(self, take_out: Leave, replica: Replica) -> OSError | None:
        """`quorumfs.metadata.enrolment.Enrolment.take_out`, watched."""
        index, ledger = self._world.index_of(replica.path), self._mounted.sidecars.ledger
        self._state.copies.pop(index, None)
        image = self._world.replicas[index].image
        whole, kept = replica.standing.is_member, image.cache.copy()
        dropped = image.dropped  # in an earlier life: nobody can know of it any more
        if whole and not self._state.forked and index not in self._state.harmed:
            self._state.oracle.check_copy(kept, replica.path)
        problem = await take_out(replica)
        if whole and len(ledger.members) < ledger.least:
            raise BrokenError(f"{replica.path} left, and too few are current: {self._mounted}")
        self._require_recorded(replica, RoleState.OFFLINE)
        if whole and not dropped:
            self._state.copies[index] = kept
        return problem

    def _require_recorded(self, replica: Replica, wanted: RoleState) -> None:
        """Raise unless what was ordered is durable in the sidecars of all that are current."""
        assert replica.slot is not None
        for one in self._mounted.sidecars.ledger.members:
            file = self._world.replicas[self._world.index_of(one.path)].sidecar
            assert file is not None
            record = decode(file.durable.read(0, file.durable.size)).record
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

        with mock.patch.object(membership_module, "_not_cut_off", not_cut_off):
            yield
