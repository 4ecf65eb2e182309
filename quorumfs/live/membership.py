"""Which replicas a set has: taken out and in again, added, removed and replaced, while a guest uses
the disk.
"""

import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.quoting import joined, quoted
from quorumfs.decisions.record import Role, RoleState
from quorumfs.decisions.standing import Standing
from quorumfs.disk.disk import Disk
from quorumfs.errors import ExitCode, UserError
from quorumfs.live.actions import Action, Request, not_cut_off
from quorumfs.live.admission import Admission
from quorumfs.live.leaving import require_count, require_spare
from quorumfs.live.names import absent, find, is_called, named
from quorumfs.live.settings import Settings
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.replica import Replica

EQUAL_S = 60.0
"""How long (seconds) to wait until all members hold the same."""

LOOK_S = 0.5
"""How often (seconds) to look whether they do."""


class Membership:
    """The verbs that change which replicas *disk* has; each can be repeated."""

    def __init__(
        self,
        disk: Disk,
        sidecars: Sidecars,
        repairs: Repairs,
        changing: trio.Lock,
        settings: Settings,
        mountpoint: str,
    ) -> None:
        """*changing* is held while the replicas, or the size, of the set change."""
        self._admission = Admission(disk, sidecars, repairs, changing, settings, mountpoint)
        self._disk = disk
        self._mountpoint = mountpoint
        self._settings = settings
        self._changing = changing
        self._mirror = disk.mirror
        self._sidecars = sidecars
        self._ledger = sidecars.ledger
        self._repairs = repairs

    async def offline(self, request: Request, action: Action) -> dict[str, Any]:
        """Take a replica out: its image is then a copy of the disk at one moment, and free."""
        async with self._changing:
            replica, records = self._named(request.text("replica")), self._ledger.records
            assert replica.slot is not None
            if records.is_removed(replica.slot):
                raise UserError(f"{replica.path} is being removed: run quorumfs remove again")
            whole, lacked = True, 0
            # An earlier attempt may have failed to have it on record (R3).
            if replica.standing is not Standing.OFFLINE or replica.slot in records.orders:
                if not replica.standing.is_member:
                    require_count(self._ledger, replica.slot)
                lacked = self._ledger.map.lacking_bytes(replica.slot)
                whole = await self._leave(replica, action, self._sidecars.enrolment.take_out)
            if not await self._await_close(replica, action):
                raise UserError(
                    f"{replica.path} is out, and its file system does not answer: its files are "
                    "not closed yet"
                )
            lacks = self._ledger.map.lacking_bytes(replica.slot)
            message = f"{replica.path} is offline: its files are closed, and free"
            if not whole:
                message += (
                    f"; it is no copy of the disk, for it was not current, and lacked up to "
                    f"{lacked} bytes: for a backup, run quorumfs online, then quorumfs wait --for "
                    "healthy, then quorumfs offline"
                )
            return self._told(replica, message, out_of_sync_bytes=lacks, is_copy=whole)

    async def online(self, request: Request, _: Action) -> dict[str, Any]:
        """Take a replica in again: it gets what was written meanwhile."""
        async with self._changing:
            replica = self._named(request.text("replica"))
            if replica.standing.is_written:
                return self._told(replica, f"{replica.path} is {replica.state.value} already")
            if replica.standing.needs_operator:
                raise UserError(f"{replica.path} cannot be taken in: {replica.reason}")
            if replica.standing is Standing.OFFLINE:
                with not_cut_off():
                    await self._sidecars.enrolment.take_in(replica)
                self._mirror.announce_states()
            self._repairs.try_at_once(replica)
            assert replica.slot is not None
            lacking = self._ledger.map.lacking_bytes(replica.slot)
            message = f"{replica.path} is taken in again: it lacks {lacking} bytes, and gets them"
            return self._told(replica, message, out_of_sync_bytes=lacking)

    async def add(self, request: Request, action: Action) -> dict[str, Any]:
        """Make an image a replica, which gets everything by a resync."""
        self._require_no_blkverify()
        replica = await self._admission.admit(
            request.text("image"),
            request.number("at"),
            action,
            overwrite=request.flag("overwrite"),
            require=self._require_no_blkverify,
        )
        await self._await_look(replica, action)
        anew = f"{replica.reason}; to give up what it holds, use --overwrite"
        if replica.standing.needs_operator:
            raise UserError(f"{replica.path} is a replica of this set, and cannot be used: {anew}")
        if request.flag("wait"):
            await self._await_current(replica, action)
        if replica.standing is Standing.OFFLINE:
            message = f"{replica.path} is offline: take it in again with quorumfs online"
        elif replica.standing is Standing.MISSING:
            message = f"{replica.path} is a replica of this set, and missing: {anew}"
        elif replica.standing.is_member:
            message = f"{replica.path} is a replica, and holds everything"
        elif self._repairs.resync_paused:
            message = f"{replica.path} is a replica now: it gets all data after resync --resume"
        else:
            message = f"{replica.path} is a replica now: it gets all data by a resync"
        return self._told(replica, message)

    async def remove(self, request: Request, action: Action) -> dict[str, Any]:
        """Remove a replica from the set for good."""
        return await self._remove(request.text("replica"), action)

    async def replace(self, request: Request, action: Action) -> dict[str, Any]:
        """Make an image a replica in the place of another one, which serves until then."""
        name, path = request.text("replica"), request.text("image")
        old, record = find(self._disk, name, but=path), self._ledger.record
        if old is not None and old.slot is not None:
            self._require_no_member(path, old)
            role: Role | None = record.roles[old.slot]
        elif (slot := absent(self._disk, record, name)) is not None:
            role = record.roles[slot]
        else:
            role = self._removed_role(name)
        if role is not None:
            name = role.replica_id.hex()  # NEW may have the same file name
        else:
            self._named(name)
        new = await self._admission.admit(
            path,
            None if old is None else old.index + 1,
            action,
            overwrite=request.flag("overwrite"),
        )
        while True:
            await self._await_current(new, action)
            with suppress(_HeirLostError):
                removed = await self._remove(name, action, heir=new)
                return self._told(new, f"{new.path} holds everything. {removed['message']}")

    def _require_no_member(self, path: str, old: Replica) -> None:
        """Raise `UserError` if *path* is current: nothing would take the place of *old*."""
        new = find(self._disk, path)
        if new is not None and (new is old or new.standing.is_member):
            raise UserError(
                f"{path} is a replica already, and {new.standing.value}: it cannot take the place "
                f"of {old.path} as well; to go on without {old.path}, run: quorumfs remove"
            )

    def _require_no_blkverify(self) -> None:
        if self._settings.present.blkverify:
            raise UserError(
                "option blkverify compares two replicas: first run: quorumfs set "
                f"{quoted(self._mountpoint)} blkverify=off"
            )

    async def _await_look(self, replica: Replica, action: Action) -> None:
        """Wait until what *replica* holds has been looked at, but no longer than that may take."""
        action.doing = f"looking at {replica.path}"
        with trio.move_on_after(2 * self._mirror.search_s):
            while replica.standing is Standing.MISSING and replica.reason is None:
                with trio.move_on_after(LOOK_S):
                    await self._sidecars.changed.wait()

    async def _await_current(self, replica: Replica, action: Action) -> None:
        """Wait until *replica* has become current. Raises `UserError` if that is given up."""
        while not replica.standing.is_member:
            if replica not in self._disk.replicas or replica.standing is Standing.OFFLINE:
                raise UserError(f"{replica.path} was taken out: take it in with quorumfs online")
            if replica.standing.needs_operator:
                raise UserError(f"{replica.path} cannot be used: {replica.reason}")
            progress = self._repairs.progress
            if progress is not None and progress.replica == replica.path and progress.total_bytes:
                percent = 100 * progress.done_bytes // progress.total_bytes
                action.doing = f"copying to {replica.path}: {percent} %"
            else:
                why = replica.reason or "queued"
                if self._repairs.resync_paused:
                    why = "resyncs are paused: quorumfs resync --resume"
                action.doing = f"waiting to copy to {replica.path}: {why}"
            with trio.move_on_after(LOOK_S):
                await self._sidecars.changed.wait()

    async def _remove(
        self, name: str, action: Action, heir: Replica | None = None
    ) -> dict[str, Any]:
        """Remove the replica called *name*. *heir*, which is to be current, takes its place; raises
        `_HeirLostError` if that is not so any more.
        """
        async with self._changing:
            replica, enrolment = self._find(name), self._sidecars.enrolment
            record = self._ledger.record
            if replica is None and (slot := absent(self._disk, record, name)) is not None:
                _require_heir(heir)
                require_count(self._ledger, slot)
                path = record.roles[slot].path
                with not_cut_off():
                    await enrolment.remove_absent(slot)
                    await self._settings.replaced(path, None if heir is None else heir.path)
                return {"message": self._removal(path), "replica": path}
            removed = self._removed_role(name)
            if replica is None and (heir is not None or removed is not None):
                path = name if removed is None else removed.path
                return {"message": f"{path} was removed before", "replica": path}
            replica = self._named(name)
            assert replica.slot is not None
            require_spare(self._ledger, self._repairs, replica)
            require_count(self._ledger, replica.slot)
            await self._leave(replica, action, enrolment.remove, heir)
            await self._settings.replaced(replica.path, None if heir is None else heir.path)
            message = self._removal(replica.path)
            if not await self._await_close(replica, action):
                message += "; its file system does not answer: its files are closed when it does"
            return {"message": message, "replica": replica.path}

    def _removal(self, path: str) -> str:
        left = joined(replica.path for replica in self._disk.replicas)
        return f"{path} was removed from the set; name these at the next mount: {left}"

    async def _leave(
        self,
        replica: Replica,
        action: Action,
        leave: Callable[[Replica], Awaitable[OSError | None]],
        heir: Replica | None = None,
    ) -> bool:
        """Have *replica* leave; whether as a member, which is the disk at that moment. Raises
        `UserError`; `_HeirLostError` as `_remove`."""
        async with self._at_rest(replica, action):
            _require_heir(heir)
            require_spare(self._ledger, self._repairs, replica)
            whole = replica.standing.is_member
            try:
                problem = await leave(replica)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    require_spare(self._ledger, self._repairs, replica)
                raise
        self._mirror.announce_states()
        if problem is not None:
            raise UserError(
                f"{replica.path} is out, and its sidecar could not be written "
                f"({problem.strerror}): do not change its image"
            )
        return whole

    def _told(self, replica: Replica, message: str, **more: object) -> dict[str, Any]:
        return {
            "message": message,
            "replica": replica.path,
            "state": replica.standing.value,
            **more,
        }

    def _named(self, name: str) -> Replica:
        """The replica of the set that is called *name*. Raises `UserError`."""
        replica = named(self._disk, name)
        if replica.slot is None:
            raise UserError(f"{replica.path} is no part of the set: {replica.reason}")
        return replica

    def _find(self, name: str) -> Replica | None:
        """As `_named`; None if there is none, or it is no part of the set any more."""
        replica = find(self._disk, name)
        return None if replica is None or replica.slot is None else replica

    def _removed_role(self, name: str) -> Role | None:
        """That of a replica that is called *name*, and was removed; None if there is none."""
        removed = [r for r in self._ledger.record.roles if r.state is RoleState.REMOVED]
        return next((role for role in removed if is_called(role, name)), None)

    @property
    def _equal(self) -> bool:
        """Whether all members hold the same, as far as that is known. What was adopted and never
        compared may differ: each would be a different disk."""
        return bool(self._ledger.uniform_members) and not self._ledger.map.count(UNVERIFIED)

    @asynccontextmanager
    async def _at_rest(self, replica: Replica, action: Action) -> AsyncIterator[None]:
        """Hold all requests of the guest, with everything it wrote durable on *replica*, if that is
        a member: then its image is what the disk is now.

        Raises `UserError` if the members cannot be made equal, and `OSError` if a flush fails.
        """
        require_spare(self._ledger, self._repairs, replica)
        deadline = trio.current_time() + EQUAL_S
        while True:
            with not_cut_off():
                if replica.standing.is_member:
                    action.doing = f"making {replica.path} durable"
                    # So that little is left to do while the guest waits. This is no flush of the
                    # guest, which has yet to hear of what was lost (R13).
                    if self._ledger.unflushable():
                        await self._repairs.settle_all()
                    await self._mirror.sync()
                async with self._disk.held():
                    if replica.standing.is_member and self._equal:
                        await self._mirror.sync()
                    if not replica.standing.is_member or self._equal:
                        yield
                        return
            if self._repairs.undecided:
                raise UserError(
                    f"{replica.path} stays in use: the replicas differ, and nothing tells which is "
                    "right: first run: quorumfs resolve --keep REPLICA "
                    f"{quoted(self._mountpoint)}",
                    exit_code=ExitCode.NEEDS_OPERATOR,
                )
            if trio.current_time() >= deadline:
                raise UserError(
                    f"{replica.path} stays in use: the replicas are not equal, see: quorumfs status"
                )
            action.doing = "waiting until the replicas are equal"
            with trio.move_on_after(LOOK_S):
                await self._sidecars.changed.wait()

    async def _await_close(self, replica: Replica, action: Action) -> bool:
        """Wait until the files of *replica*, which is out, are closed; whether they are in time."""
        action.doing = f"closing {replica.path}"
        try:
            with trio.move_on_after(replica.timeout_s):
                while replica.in_flight:
                    await self._sidecars.changed.wait()
        finally:
            replica.give_up()  # of one that is removed nobody else watches the deadlines
        return not replica.in_flight


class _HeirLostError(UserError):
    """The replica that was to take the place of another one is not current any more."""


def _require_heir(heir: Replica | None) -> None:
    if heir is not None and not heir.standing.is_member:
        raise _HeirLostError(f"{heir.path} is {heir.standing.value}: {heir.reason}")
