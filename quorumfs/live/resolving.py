"""Which replica is right where nothing else tells, as an administrator decides on a mounted set."""

from collections.abc import Callable
from typing import Any

from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError, UserError
from quorumfs.live.actions import Action, Request
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.resolving import Choice
from quorumfs.replica.replica import Replica


class Deciding:
    """The verb that decides places at which the replicas of *disk* differ."""

    def __init__(self, disk: Disk, repairs: Repairs, named: Callable[[str], Replica]) -> None:
        """*named* finds a replica by what the user calls it; it may raise `UserError`."""
        self._disk = disk
        self._repairs = repairs
        self._named = named

    async def resolve(self, request: Request, action: Action) -> dict[str, Any]:
        """Give all replicas what one of them holds in undecided places, of all or of a range."""
        kept = self._named(request.text("keep"))
        if not kept.standing.is_member:
            raise UserError(f"{kept.path} is {kept.state.value}: only a current one can be kept")
        offset, length = request.number("offset") or 0, request.number("length")
        size = self._disk.size
        end = size if length is None else offset + length
        if not offset < end <= size:
            raise UsageError(f"--range: got {offset}:{end - offset}, the disk has {size}")
        before = self._undecided(offset, end)
        if not before:
            return {"message": "nothing is undecided there", "decided": 0, "left": 0, "written": 0}
        choice = Choice(kept, offset, end)
        action.doing = "waiting for other repairs"
        self._repairs.resolving.choose(choice)
        await choice.done.wait()
        left = self._undecided(offset, end)
        if choice.error is not None:
            raise UserError(f"{choice.error.strerror}; {left} bytes are still undecided")
        return {
            "message": f"{before} bytes are those of {kept.path} now",
            "decided": before,
            "left": left,
            "written": choice.written,
        }

    def _undecided(self, start: int, end: int) -> int:
        """Undecided bytes in a range."""
        return sum(high - low for low, high in self._repairs.undecided.inside(start, end))
