"""Scrubs, as an administrator steers them."""

from typing import Any

from quorumfs.errors import UsageError, UserError
from quorumfs.live.actions import Action, Request
from quorumfs.repair.repairs import Repairs

ORDERS = ("start", "pause", "resume", "stop")


class Scrubbing:
    """The verb that begins scrubs and steers them; it never waits for one."""

    def __init__(self, repairs: Repairs) -> None:
        self._scrub = repairs.scrub

    async def scrub(self, request: Request, _: Action) -> dict[str, Any]:
        """Do what the argument ``order``, of `ORDERS`, says.

        ``limit`` (bytes a second; 0: none) counts from now on, whatever else is ordered.
        """
        order, scrub, limit = request.text("order"), self._scrub, request.number("limit")
        if order not in ORDERS:
            raise UsageError(f"'order': got {order}, allowed: {', '.join(ORDERS)}")
        if order != "start" and scrub.current is None:
            raise UserError("no scrub is under way")
        if limit is not None:
            scrub.limit = limit or None
        begun, message = False, f"scrub {scrub.number}: "
        match order:
            case "start":
                begun = self._start(repair=request.flag("repair"))
                message = f"scrub {scrub.number} " + ("begins" if begun else "is under way already")
                if scrub.current is not None and scrub.current.paused:
                    message += ", and is paused: --resume lets it go on"
                elif scrub.hindrance:
                    message += f", and waits: {scrub.hindrance}"
            case "pause":
                scrub.pause(paused=True)
                message += "it pauses"
            case "resume":
                scrub.pause(paused=False)
                message += "it goes on"
            case _:
                scrub.end(stopped=True)
                message += "it is stopped"
        if limit is not None:
            message += (
                f"; at most {limit} bytes a second are read" if limit else "; without a limit"
            )
        return {"message": message, "number": scrub.number, "begun": begun}

    def _start(self, *, repair: bool) -> bool:
        """Begin a scrub; whether one begins. Raises `UserError` where one that only looks is under
        way, and this one is to repair."""
        current = self._scrub.current
        if current is None:
            self._scrub.begin(repair=repair)
            return True
        if repair and not current.repair:
            raise UserError(
                "a scrub that only looks is under way, and cannot repair what it has passed: stop "
                "it first (--stop), or let it end"
            )
        return False
