"""Actions: what an administrator has a running mount do.

The thread of the control socket answers at once, and an action may wait for replicas. So an action
is a task of the loop that serves the guest. The request that begins it is answered with its number,
by which everybody may ask how far it is; nobody has to: an action goes on when its client goes
away. Only the end of the mount ends it early.

========================================== ======================================================
request                                    answer
========================================== ======================================================
``{"command": VERB, …}``                   ``{"action": NUMBER}``
``{"command": "action", "action": NUMBER}`` ``{"action": NUMBER, "done": false, "doing": TEXT}``,
                                           at its end ``{"action": NUMBER, "done": true, …}`` with
                                           what the verb gives, or ``{"error": TEXT, …}``
========================================== ======================================================
"""

import itertools
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from quorumfs.errors import UsageError, UserError

log = logging.getLogger(__name__)

KEPT = 64
"""How many ended actions can still be asked about."""

_ENDED = "the mount ended meanwhile"

Verb = Callable[["Request", "Action"], Awaitable[dict[str, Any]]]
"""Does the work of one action, in the loop; what it returns is the answer. It may raise
`UserError`, which is told in words, and `OSError`."""


def not_cut_off() -> trio.CancelScope:
    """A scope that the end of the mount waits for: for requests, because the disk is closed after
    the last one; for records, because no other one may overtake them."""
    return trio.CancelScope(shield=True)


class Request:
    """The arguments of a verb. A request comes from another process: nothing in it is believed."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content

    def text(self, name: str) -> str:
        """The argument *name*. Raises `UsageError` if there is none."""
        value = self._content.get(name)
        if not isinstance(value, str):
            raise UsageError(f"{name!r} is to be a text")
        return value

    def texts(self, name: str) -> list[str]:
        """The list *name*; empty if it is left out. Raises `UsageError`."""
        values = self._content.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise UsageError(f"{name!r} is to be a list of texts")
        return values

    def number(self, name: str) -> int | None:
        """The argument *name*, at least 0; None if it is left out. Raises `UsageError`."""
        value = self._content.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise UsageError(f"{name!r} is to be a number, at least 0")
        return value

    def flag(self, name: str) -> bool:
        """The argument *name*; False if it is left out. Raises `UsageError`."""
        value = self._content.get(name, False)
        if not isinstance(value, bool):
            raise UsageError(f"{name!r} is to be true or false")
        return value


class Action:
    """One action: what it does now, and its end."""

    def __init__(self, number: int, verb: str) -> None:
        self.number = number
        self.verb = verb
        self.doing = ""
        """What the action waits for, in words; for those who ask."""
        self.outcome: dict[str, Any] | UserError | None = None
        """None until the end."""


class Actions:
    """The actions of one mount. Made in the loop; `begin` and `look` are called in one other
    thread."""

    def __init__(self, verbs: Mapping[str, Verb]) -> None:
        self._verbs = verbs
        self._token = trio.lowlevel.current_trio_token()
        self._nursery: trio.Nursery | None = None
        self._stopping = trio.Event()
        self._ended = trio.Event()
        self._numbers = itertools.count(1)
        self._actions: OrderedDict[int, Action] = OrderedDict()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Let actions begin, until `stop`."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            await self._stopping.wait()
            self._nursery.cancel_scope.cancel()
        self._ended.set()

    async def stop(self) -> None:
        """End all actions, each where it can be taken up again, and let none begin."""
        self._stopping.set()
        await self._ended.wait()

    def commands(self) -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
        """What the control socket is to answer."""
        return {"action": self.look, **dict.fromkeys(self._verbs, self.begin)}

    @property
    def under_way(self) -> tuple[str, ...]:
        """The actions that have not ended: the verb, and what it does or waits for."""
        waiting = [one for one in tuple(self._actions.values()) if one.outcome is None]
        return tuple(f"{one.verb}: {one.doing or 'waiting for its turn'}" for one in waiting)

    def begin(self, request: dict[str, Any]) -> dict[str, Any]:
        """Begin an action; returns its number."""
        action = Action(next(self._numbers), request["command"])
        self._actions[action.number] = action
        ended = [number for number, one in self._actions.items() if one.outcome is not None]
        for number in ended[:-KEPT]:
            del self._actions[number]
        self._token.run_sync_soon(self._start, action, Request(request))
        return {"action": action.number}

    def look(self, request: dict[str, Any]) -> dict[str, Any]:
        """How far an action is. Raises `UserError` where it failed."""
        number = Request(request).number("action")
        action = None if number is None else self._actions.get(number)
        if action is None:
            raise UsageError(f"there is no action {number}: it ended long ago, or never began")
        if action.outcome is None:
            return {"action": number, "done": False, "doing": action.doing}
        if isinstance(action.outcome, UserError):
            raise action.outcome
        return {"action": number, "done": True, **action.outcome}

    def _start(self, action: Action, request: Request) -> None:
        assert self._nursery is not None
        if self._stopping.is_set():
            action.outcome = UserError(_ENDED)
        else:
            self._nursery.start_soon(self._carry_out, action, request)

    async def _carry_out(self, action: Action, request: Request) -> None:
        """One action, from its begin to its end; no failure reaches beyond it."""
        outcome: dict[str, Any] | UserError = UserError(_ENDED)
        try:
            outcome = await self._verbs[action.verb](request, action)
            log.info("%s: %s", action.verb, outcome.get("message", "done"))
        except UserError as error:
            outcome = error
            log.warning("%s: refused: %s", action.verb, error)
        except OSError as error:
            outcome = UserError(error.strerror or str(error))
            log.warning("%s: failed: %s", action.verb, outcome)
        except Exception:
            outcome = UserError("internal error, see the log of the daemon")
            log.exception("internal error: the action %s fails", action.verb)
        finally:
            action.outcome = outcome
