"""Resyncs, as an administrator steers them."""

from typing import Any

from quorumfs.decisions.model import RepairKind
from quorumfs.errors import UsageError
from quorumfs.live.actions import Action, Request
from quorumfs.live.settings import Settings
from quorumfs.repair.repairs import Repairs

ORDERS = ("show", "pause", "resume")


class Resyncing:
    """The verb that pauses resyncs and limits them."""

    def __init__(self, repairs: Repairs, settings: Settings) -> None:
        self._repairs = repairs
        self._settings = settings

    async def resync(self, request: Request, action: Action) -> dict[str, Any]:
        """Do what the argument ``order``, of `ORDERS`, says.

        ``limit`` is a value of the option resync-rate, and counts from now on. Raises `UsageError`,
        and then nothing has changed.
        """
        order, repairs = request.text("order"), self._repairs
        if order not in ORDERS:
            raise UsageError(f"'order': got {order}, allowed: {', '.join(ORDERS)}")
        limits = request.texts("limit")
        if limits:
            rates = [f"resync-rate={limit}" for limit in limits]
            await self._settings.set(Request({"options": rates}), action)
        if order != "show":
            repairs.pause_resync(paused=order == "pause")
        progress = repairs.progress
        if repairs.resync_paused:
            message = "resyncs are paused: --resume lets them go on"
        elif progress is not None and progress.kind is RepairKind.RESYNC:
            done, total = progress.done_bytes, progress.total_bytes
            message = f"resync of {progress.replica}: {done} of {total} bytes are copied"
        elif order == "resume":
            message = "resyncs go on"
        else:
            message = "no resync is under way"
        if limits:
            limit = self._settings.present.resync_rate
            rate = "without a limit" if limit is None else f"at most {limit} bytes a second"
            message += f"; {rate}"
        return {"message": message, "paused": repairs.resync_paused}
