"""Making an image a replica, while a guest uses the disk.

The image is new; or it is one of a replica of the set that this mount was not given, or whose data
the set cannot use.
"""

import os
from collections.abc import Callable

import trio

from quorumfs.decisions.dirtymap import REPLICAS_MAX
from quorumfs.decisions.record import Sidecar
from quorumfs.decisions.standing import Standing
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError, UserError
from quorumfs.live.actions import Action, not_cut_off
from quorumfs.live.names import absent
from quorumfs.live.newcomer import make_files
from quorumfs.live.settings import Settings
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.replica import Replica


class Admission:
    """Admits images to the set of *disk*; admitting one can be repeated."""

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
        self._disk = disk
        self._mirror = disk.mirror
        self._ledger = sidecars.ledger
        self._enrolment = sidecars.enrolment
        self._claims = sidecars.claims
        self._repairs = repairs
        self._changing = changing
        self._settings = settings
        self._mountpoint = mountpoint

    async def admit(
        self,
        path: str,
        at: int | None,
        action: Action,
        *,
        overwrite: bool,
        require: Callable[[], None] = lambda: None,
    ) -> Replica:
        """The replica at *path*, at the place *at* (from 1) if it is new.

        *require*, called once the files are made, raises `UserError` if no replica may be added any
        more.
        *overwrite*: give up what the image holds, unless the set uses it already. Without, a
        replica that the set knows, and cannot use, is returned as it is. Raises `UsageError` and
        `UserError`.
        """
        if not os.path.isabs(path):
            raise UsageError(f"{path} is no absolute path")
        async with self._changing:
            replicas = self._disk.replicas
            known = next((one for one in replicas if one.path == path), None)
            if known is not None and known.slot is not None:
                if overwrite and self._is_unused(known):
                    after = known.standing, known.reason
                    # Else it might rejoin, and become current, before it is on record as given up.
                    known.standing, known.reason = Standing.OFFLINE, "it is being made anew"
                    try:
                        await self._renew(known, known.slot, action)
                        after = Standing.MISSING, None
                    finally:
                        known.standing, known.reason = after
                    self._repairs.try_at_once(known)
                return known
            if at is not None and not 1 <= at <= len(replicas) + 1:
                raise UsageError(f"--at: got {at}, allowed: 1 to {len(replicas) + 1}")
            last = len(replicas) if known is None else known.index
            index = last if at is None else at - 1
            new = Replica(index, path, None, self._mirror.search_s)
            new.behind_max_s = self._settings.present.patience_with_laggards_s
            if (slot := absent(self._disk, self._ledger.record, path)) is not None:
                if overwrite and not self._ledger.records.is_offline(slot):
                    await self._renew(new, slot, action)
                with not_cut_off():
                    async with self._disk.held():
                        await self._enrolment.attach(new, slot)
            else:
                await self._admit_new(new, action, require, overwrite=overwrite)
            self._repairs.try_at_once(new)
            return new

    @staticmethod
    def _is_unused(replica: Replica) -> bool:
        """Whether *replica* may be made anew: it is missing or foreign, and not offline."""
        return not replica.standing.is_ours and replica.standing is not Standing.OFFLINE

    async def _renew(self, replica: Replica, slot: int, action: Action) -> None:
        """Make the sidecar of *replica*, which has *slot* in the set, anew: it lacks everything."""
        with not_cut_off():
            await self._enrolment.give_up_content(slot)
        role = self._enrolment.present_role(slot)
        sidecar = self._enrolment.first_sidecar(slot, role)
        await self._make_files(replica.path, sidecar, action, overwrite=True)

    async def _admit_new(
        self, new: Replica, action: Action, require: Callable[[], None], *, overwrite: bool
    ) -> None:
        if (place := self._enrolment.new_role(new.path)) is None:
            raise UserError(
                f"a set has at most {REPLICAS_MAX} replicas: remove one first; the place of a "
                "removed one is free once all others are current"
            )
        sidecar = self._enrolment.first_sidecar(*place)
        await self._make_files(new.path, sidecar, action, overwrite=overwrite)
        with not_cut_off():
            async with self._disk.held():
                require()
                await self._enrolment.admit(new, *place)

    async def _make_files(
        self, path: str, sidecar: Sidecar, action: Action, *, overwrite: bool
    ) -> None:
        action.doing = f"making {path}"
        being_made = self._repairs.being_made
        if path in being_made:
            raise UserError(
                f"an earlier command waits for the file system of {path} still: try again when "
                "that answers"
            )
        record, directory = self._ledger.record, self._settings.present.sidecars
        mine = self._claims.tenure.mine

        began = False

        def make() -> None:
            nonlocal began
            began = True
            try:
                make_files(
                    path, sidecar, record, self._mountpoint, directory, mine, overwrite=overwrite
                )
            finally:
                being_made.discard(path)

        being_made.add(path)
        # It holds up other verbs. A thread that is given up may make the files later.
        try:
            with trio.move_on_after(2 * self._mirror.search_s) as patience:
                await trio.to_thread.run_sync(make, abandon_on_cancel=True)
        finally:
            if not began:
                being_made.discard(path)
        if patience.cancelled_caught:
            raise UserError(f"cannot make {path}: its file system does not answer")
