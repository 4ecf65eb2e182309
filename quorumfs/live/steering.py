"""How a mount is steered by its administrator without a change of the set."""

from collections.abc import Iterable
from typing import Any

from quorumfs.disk.disk import Disk
from quorumfs.live.actions import Action, Request
from quorumfs.live.names import named
from quorumfs.repair.repairs import Repairs
from quorumfs.replica.replica import Replica


class Steering:
    """The verbs that have a mount of *disk* forget, and try again."""

    def __init__(self, disk: Disk, repairs: Repairs | None) -> None:
        """*repairs*: None if nothing is repaired."""
        self._disk = disk
        self._repairs = repairs

    async def clear(self, request: Request, _: Action) -> dict[str, Any]:
        """Forget the errors that replicas had, and try those that are not current at once.

        What is wrong with a replica now is no error of the past, and stays.
        """
        names = request.texts("replicas")
        replicas = [named(self._disk, name) for name in names] or list(self._disk.replicas)
        cleared = {}
        for replica in dict.fromkeys(replicas):
            cleared[replica.path] = errors = replica.health.forget_errors()
            self._disk.events.errors_cleared(replica.path, errors)
        tried = self._try_at_once(replicas)
        total = sum(cleared.values())
        message = f"cleared {total} errors" if total != 1 else "cleared 1 error"
        return {"message": f"{message}{_told(tried)}", "cleared": cleared, "tried": tried}

    def _try_at_once(self, replicas: Iterable[Replica]) -> list[str]:
        """Have those of *replicas* that can come back tried now; returns their paths."""
        if self._repairs is None:
            return []
        tried = []
        for replica in replicas:
            if self._repairs.may_come_back(replica):
                self._repairs.try_at_once(replica)
                tried.append(replica.path)
        return tried


def _told(tried: list[str]) -> str:
    if not tried:
        return ""
    return f"; {' and '.join(tried)} {'is' if len(tried) == 1 else 'are'} tried again now"
