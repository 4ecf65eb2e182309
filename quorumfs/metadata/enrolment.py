"""Which replicas a set has, by an administrator's order, and what the sidecars say at each step.

**Out**: the order is committed on the members first; from then on no mount takes the replica for
current. Then the replica's own sidecar gets the same record, with the identity of the image as it
is left, so that a change of the image behind its sidecar is noticed when the replica comes back;
and so is an older copy of both, since its role names that record. After a crash between both the
replica is compared in full. If its sidecar cannot be written, its role names the record before.

**New**: the image and its sidecar are made first, and say that the replica is a mixture, to be
resynced; no mount takes it for more. Then the members commit a record that names the replica, as
stale, with a map by which it lacks every chunk. (The seventh replica needs a wider
map and record: `quorumfs.decisions.sidecar` says why no step of that breaks a set.) After a crash
between both the set does not know the replica, and the same command takes the image again.

**Anew**: the members commit that a replica which has a role, and is out of use, is stale and lacks
every chunk. Then its sidecar is made as for a new one, with the same role. After a crash between
both the replica is what it was: its sidecar, such as one of another side of a split, keeps it out.

Each step can be repeated.
"""

import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

from quorumfs.decisions.dirtymap import NARROW, REPLICAS_MAX, out_of_sync
from quorumfs.decisions.model import Standing
from quorumfs.decisions.record import Phase, Role, RoleState, Sidecar
from quorumfs.decisions.returned import OFFLINE
from quorumfs.metadata.ledger.commit import Order
from quorumfs.metadata.recorder import Recorder
from quorumfs.metadata.writer import identities_of
from quorumfs.replica.replica import Replica

REMOVED = "the administrator removed it from the set"


class Enrolment:
    """Takes replicas into a set, and out of it."""

    def __init__(self, recorder: Recorder, serve: Callable[[Replica], None]) -> None:
        """*serve* is called with each new replica."""
        self._recorder = recorder
        self._ledger = recorder.ledger
        self._serve = serve

    # Out

    async def take_out(self, replica: Replica) -> OSError | None:
        """Make *replica* offline, on record; returns why its own sidecar does not say so, if so.

        The caller holds a lock on the whole disk, and has synced a replica that is current. Raises
        `OSError`: with EBUSY nothing was done, because too few members would be left.
        """
        return await self._leave(replica, Order(RoleState.OFFLINE))

    async def remove(self, replica: Replica) -> OSError | None:
        """As `take_out`, for good: *replica* is no part of the set any more."""
        assert replica.slot is not None
        problem = await self._leave(replica, Order(RoleState.REMOVED, at=int(time.time())))
        self._ledger.targets.forget(replica)
        replica.reason = REMOVED
        self._line_up([one for one in self._ledger.replicas if one is not replica])
        return problem

    async def remove_absent(self, slot: int) -> None:
        """Remove a replica that this mount was not given. Raises `OSError`."""
        async with self._recorder.lock:
            await self._record_locked(slot, Order(RoleState.REMOVED, at=int(time.time())))
        self._ledger.arrange()

    async def _record_locked(self, slot: int, order: Order) -> None:
        """Have *order* on record. After an `OSError` the next record follows it, if possible."""
        self._ledger.records.orders[slot] = order
        await self._recorder.commit_locked(clean=False)
        if self._ledger.records.orders.get(slot) is order:
            raise OSError(errno.EIO, "too few replicas are current to have it on record")

    async def _leave(self, replica: Replica, order: Order) -> OSError | None:
        ledger, recorder = self._ledger, self._recorder
        assert replica.slot is not None
        async with self._locked_beside_join(replica):
            whole, role = replica.standing.is_member, ledger.record.roles[replica.slot]
            if whole and not ledger.enough_without([replica]):
                raise OSError(errno.EBUSY, "too few replicas would be left")
            if not ledger.may_record:
                raise OSError(errno.EBUSY, "too few replicas are current to have it on record")
            if whole and order.state is RoleState.OFFLINE:
                order = order._replace(gets_last_record=True)
            # Before the map is written: a member that fails then is ejected by a record, which must
            # follow the order.
            ledger.records.orders[replica.slot] = order
            if whole:
                ledger.eject([replica], OFFLINE)
            elif ledger.is_target(replica):
                ledger.give_up_target(OFFLINE)
            replica.standing, replica.reason = Standing.OFFLINE, OFFLINE
            try:
                await recorder.write_map_locked()
                await self._record_locked(replica.slot, order)
                if not whole:
                    return None
                if (problem := await self._tell(replica)) is None:
                    ledger.targets.of(replica).left_in_order()
                elif order.gets_last_record:
                    with suppress(OSError):  # then the next record follows the order
                        role = replace(role, state=order.state)
                        await self._record_locked(replica.slot, Order(order.state, role))
                return problem
            finally:
                replica.detach(there=True)

    @asynccontextmanager
    async def _locked_beside_join(self, replica: Replica) -> AsyncIterator[None]:
        """Hold the lock of the sidecars while *replica* is not joining."""
        ledger = self._ledger
        while True:
            async with self._recorder.lock:
                if not (ledger.is_target(replica) and ledger.joining):
                    yield
                    return
            # A join waits for the lock from its start on, and so has it next.

    async def _tell(self, replica: Replica) -> OSError | None:
        """Give the sidecar of *replica*, to which no write comes any more, the present record."""
        recorder = self._recorder
        identities = await identities_of([replica])
        if replica not in identities:
            return OSError(errno.EIO, "its image does not tell when it was changed last")
        for phase in (Phase.PREPARED, Phase.COMMITTED):
            failed = await recorder.writer.write_slots(
                [replica], self._ledger.record, phase, identities
            )
            if failed:
                return failed[replica]
        await recorder.claims.release_one(replica)
        return None

    # In

    async def take_in(self, replica: Replica) -> None:
        """Let *replica*, which is offline, rejoin, on record. Raises `OSError`."""
        ledger, slot = self._ledger, replica.slot
        assert slot is not None
        async with self._recorder.lock:
            if ledger.records.is_removed(slot):  # what it lacks is not tracked from there on
                raise OSError(errno.EBUSY, "it is being removed from the set")
            try:
                await self._record_locked(slot, Order(RoleState.STALE))
            except OSError:  # what is said to have failed is not to happen later
                ledger.records.orders[slot] = Order(RoleState.OFFLINE)
                raise
        replica.standing, replica.reason = Standing.STALE, None
        ledger.notify()

    def new_role(self, path: str) -> tuple[int, Role] | None:
        """A slot and a role for a new replica; None if the set has as many as it can have.

        The slot of a removed replica is used again when the sidecar of every other replica says
        that it is removed: when all are current. It is taken before one for which there is no room
        in the sidecars of a small set.
        """
        record = self._ledger.record
        slot = len(record.roles)
        if slot >= NARROW and self._ledger.all_current():  # a wider record costs all of them
            roles = enumerate(record.roles)
            removed = [(role.mount, free) for free, role in roles if free not in record.slots]
            slot = min(removed)[1] if removed else slot
        if slot >= REPLICAS_MAX:
            return None
        state, at = RoleState.STALE, record.sequence
        new = Role(os.urandom(16), state, record.generation, path, at, record.latest_mount)
        return slot, new

    def present_role(self, slot: int) -> Role:
        """The role of the replica with *slot*, for a `first_sidecar` after `give_up_content`."""
        record = self._ledger.record
        return replace(
            record.roles[slot],
            generation=record.generation,
            sequence=record.sequence,
            mount=record.latest_mount,
        )

    def first_sidecar(self, slot: int, role: Role) -> Sidecar:
        """The sidecar to make beside an image that is to become a replica: it lacks everything."""
        # Of a lower number than the members' record: it must never be taken for the set's latest,
        # in which the replica has a place while no other map says that it lacks everything.
        record = self._ledger.record
        record = replace(record, sequence=record.sequence - 1)
        own = replace(role, state=RoleState.RESYNCING)
        record = record.with_new_role(slot, own)
        given = record.new_map()
        given.add(out_of_sync(slot), range(len(given)))
        return Sidecar(role.replica_id, record, given)

    async def admit(self, replica: Replica, slot: int, role: Role) -> None:
        """Make *replica*, whose files are made, a part of the set, at the place of its `index`.

        The caller holds a lock on the whole disk. Raises `OSError`.
        """
        ledger, recorder = self._ledger, self._recorder
        async with recorder.lock:
            lacking, wider = out_of_sync(slot), ledger.map.copy()
            wider.widen(slot + 1)
            if len(wider.planes) > len(ledger.map.planes):  # in memory, once there is room on disk
                wider.add(lacking, range(len(wider)))
                await recorder.write_map_locked(wider)
                ledger.recorded.widen(slot + 1, lacking)
            else:
                ledger.recorded.add(lacking, range(len(ledger.map)))
                await recorder.write_map_locked()
            await self._record_locked(slot, Order(role.state, role))
            self._join_the_others(replica, slot, Standing.STALE)

    async def give_up_content(self, slot: int) -> None:
        """Have on record that the replica with *slot*, which is out of use, lacks everything: its
        sidecar is about to be made anew. Raises `OSError`."""
        async with self._recorder.lock:
            self._ledger.recorded.add(out_of_sync(slot), range(len(self._ledger.map)))
            await self._recorder.write_map_locked()
            await self._record_locked(slot, Order(RoleState.STALE))

    async def attach(self, replica: Replica, slot: int) -> None:
        """Have *replica*, with *slot* in the set and missing in this mount, rejoin, at the place of
        its `index`, unless it is offline. The caller holds a lock on the whole disk.
        """
        async with self._recorder.lock:
            offline = self._ledger.records.is_offline(slot)
            self._join_the_others(replica, slot, Standing.OFFLINE if offline else Standing.MISSING)

    def _join_the_others(self, replica: Replica, slot: int, standing: Standing) -> None:
        replica.slot, replica.standing = slot, standing
        self._serve(replica)
        self._ledger.targets.of(replica)
        others = [one for one in self._ledger.replicas if one.path != replica.path]
        others.insert(replica.index, replica)
        self._line_up(others)
        self._ledger.notify()

    def _line_up(self, replicas: list[Replica]) -> None:
        """Have these replicas, in this order. No vote is under way, nor is the fast path open."""
        for index, replica in enumerate(replicas):
            replica.index = index
        self._ledger.replicas = tuple(replicas)
        self._ledger.arrange()
