"""How a replica leaves by an administrator's order, and what the sidecars say at each step.

The order is committed on the members first: from then on no mount takes the replica for current.
Then the replica's own sidecar gets the same record, with the identity of the image as it is left,
so that a change of the image behind its sidecar is noticed when the replica comes back.

After a crash between both the replica lacks what the members tracked since the record that its role
names, as after any ejection. Each step can be repeated.
"""

import errno

from quorumfs.decisions.assembly import OFFLINE
from quorumfs.decisions.model import Standing
from quorumfs.decisions.record import Phase, RoleState
from quorumfs.metadata.ledger.commit import Order
from quorumfs.metadata.recorder import Recorder
from quorumfs.metadata.writer import identities_of
from quorumfs.replica.replica import Replica


class Leaving:
    """Takes replicas of a set out, and in again."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._ledger = recorder.ledger

    async def take_out(self, replica: Replica) -> OSError | None:
        """Make *replica* offline, on record; returns why its own sidecar does not say so, if so.

        The caller holds a lock on the whole disk, and has synced a replica that is current. Raises
        `OSError`: with EBUSY nothing was done, because too few members would be left.
        """
        ledger, recorder = self._ledger, self._recorder
        assert replica.slot is not None
        await recorder.lock.acquire()
        try:
            while ledger.is_target(replica) and ledger.joining:
                recorder.lock.release()
                await recorder.lock.acquire()  # after the join, which waits for the lock already
            whole = replica.standing.is_member
            if whole and not ledger.enough_without([replica]):
                raise OSError(errno.EBUSY, "too few replicas would be left")
            ledger.records.orders[replica.slot] = Order(RoleState.OFFLINE)
            if whole:
                ledger.eject([replica], "")
            elif ledger.is_target(replica):
                ledger.give_up_target("")
            else:
                replica.standing, replica.reason = Standing.OFFLINE, OFFLINE
            try:
                await recorder.write_map_locked()
                await recorder.commit_locked(clean=False)
                if not whole:
                    return None
                if (problem := await self._tell(replica)) is None:
                    ledger.targets.of(replica).left_in_order()
                return problem
            finally:
                replica.detach(there=True)
        finally:
            recorder.lock.release()

    async def _tell(self, replica: Replica) -> OSError | None:
        """Give the sidecar of *replica*, to which no write comes any more, the present record."""
        recorder = self._recorder
        identities = await identities_of([replica])
        for phase in (Phase.PREPARED, Phase.COMMITTED):
            failed = await recorder.writer.write_slots(
                [replica], self._ledger.record, phase, identities
            )
            if failed:
                return failed[replica]
        await recorder.claims.release_one(replica)
        return None

    async def take_in(self, replica: Replica) -> None:
        """Let *replica*, which is offline, rejoin, on record. Raises `OSError`."""
        ledger, recorder = self._ledger, self._recorder
        assert replica.slot is not None
        async with recorder.lock:
            ledger.records.orders[replica.slot] = Order(RoleState.STALE)
            await recorder.commit_locked(clean=False)
        replica.standing, replica.reason = Standing.STALE, None
        ledger.notify()
