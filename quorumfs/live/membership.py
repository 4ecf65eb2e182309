"""Which replicas a set has: taken out and in again while a guest uses the disk."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from quorumfs.decisions.standing import Standing
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError, UserError
from quorumfs.live.actions import Action, Request
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.replica import Replica

EQUAL_S = 60.0
"""How long (seconds) to wait until all members hold the same."""

LOOK_S = 0.5
"""How often (seconds) to look whether they do."""


class Membership:
    """The verbs that change which replicas of *disk* are in use."""

    def __init__(self, disk: Disk, sidecars: Sidecars, repairs: Repairs) -> None:
        self._disk = disk
        self._mirror = disk.mirror
        self._sidecars = sidecars
        self._ledger = sidecars.ledger
        self._repairs = repairs

    async def offline(self, request: Request, action: Action) -> dict[str, Any]:
        """Take a replica out: its image is then a copy of the disk at one moment, and free."""
        replica = self._named(request.text("replica"))
        if replica.standing is not Standing.OFFLINE:
            async with self._at_rest(replica, action):
                self._require_spare(replica)
                try:
                    problem = await self._sidecars.leaving.take_out(replica)
                except OSError as error:
                    if error.errno == errno.EBUSY:
                        self._require_spare(replica)
                    raise
            self._mirror.announce_states()
            if problem is not None:
                raise UserError(
                    f"{replica.path} is offline, and its sidecar could not be written "
                    f"({problem.strerror}): do not change its image"
                )
        if not await self._closed(replica, action):
            raise UserError(
                f"{replica.path} is offline, and its file system does not answer: its files are "
                "not closed yet"
            )
        return self._told(replica, f"{replica.path} is offline: its files are closed, and free")

    async def online(self, request: Request, _: Action) -> dict[str, Any]:
        """Take a replica in again: it gets what was written meanwhile."""
        replica = self._named(request.text("replica"))
        if replica.standing is Standing.OFFLINE:
            await self._sidecars.leaving.take_in(replica)
            self._mirror.announce_states()
        elif replica.standing.is_written:
            return self._told(replica, f"{replica.path} is {replica.state.value} already")
        self._repairs.try_at_once(replica)
        assert replica.slot is not None
        lacking = self._ledger.map.lacking_bytes(replica.slot)
        return self._told(
            replica,
            f"{replica.path} is taken in again: it lacks {lacking} bytes, and gets them now",
            out_of_sync_bytes=lacking,
        )

    def _told(self, replica: Replica, message: str, **more: object) -> dict[str, Any]:
        return {
            "message": message,
            "replica": replica.path,
            "state": replica.standing.value,
            **more,
        }

    def _named(self, name: str) -> Replica:
        """The replica with this path, file name or id. Raises `UserError`."""
        replicas = [replica for replica in self._disk.replicas if replica.slot is not None]
        roles = self._ledger.record.roles
        for matches in (
            [one for one in replicas if one.path == name],
            [one for one in replicas if os.path.basename(one.path) == name],
            [one for one in replicas if roles[one.slot or 0].replica_id.hex() == name],
        ):
            if len(matches) == 1:
                return matches[0]
            if matches:
                paths = ", ".join(one.path for one in matches)
                raise UsageError(f"{name} may be each of {paths}: give the whole path")
        paths = ", ".join(one.path for one in replicas)
        raise UsageError(f"{name} is no replica of this mount: its replicas are {paths}")

    def _require_spare(self, replica: Replica) -> None:
        """Raise `UserError` if the set cannot do without *replica*."""
        ledger = self._ledger
        if not replica.standing.is_member or ledger.enough_without([replica]):
            return
        left = [one.path for one in ledger.members if one is not replica]
        if len(left) < ledger.least:
            raise UserError(
                f"{replica.path} stays in use: without it {len(left)} current replicas would be "
                f"left ({', '.join(left) or 'none'}), and vote-threshold={ledger.least} needs as "
                "many. Bring another replica back first, or lower vote-threshold"
            )
        raise UserError(
            f"{replica.path} stays in use: it alone holds some of the data; wait until the others "
            "have been given it"
        )

    @asynccontextmanager
    async def _at_rest(self, replica: Replica, action: Action) -> AsyncIterator[None]:
        """Hold all requests of the guest, with everything it wrote durable on *replica*, if that is
        a member: then its image is what the disk is now.

        Raises `UserError` if the members cannot be made equal, and `OSError` if a flush fails.
        """
        self._require_spare(replica)
        deadline = trio.current_time() + EQUAL_S
        while True:
            if replica.standing.is_member:
                action.doing = f"making {replica.path} durable"
                await self._disk.flush()  # so that little is left to do while the guest waits
            async with self._mirror.locks.held(0, self._disk.size, exclusive=True):
                if replica.standing.is_member and self._ledger.uniform_members:
                    await self._mirror.sync()
                if not replica.standing.is_member or self._ledger.uniform_members:
                    yield
                    return
            if trio.current_time() >= deadline:
                raise UserError(
                    f"{replica.path} stays in use: the replicas are not equal, see: quorumfs status"
                )
            action.doing = "waiting until the replicas are equal"
            with trio.move_on_after(LOOK_S):
                await self._sidecars.changed.wait()

    async def _closed(self, replica: Replica, action: Action) -> bool:
        """Wait until the files of *replica* are closed; whether they are."""
        action.doing = f"closing {replica.path}"
        with trio.move_on_after(replica.timeout_s):
            while replica.in_flight:
                await self._sidecars.changed.wait()
        return not replica.in_flight
