"""The verbs: what can be asked of a running mount, by name."""

from functools import partial
from typing import Any

import trio

from quorumfs.disk.disk import Disk
from quorumfs.errors import UserError
from quorumfs.live.actions import Action, Request, Verb
from quorumfs.live.grow import Announce, Growth
from quorumfs.live.membership import Membership
from quorumfs.live.names import named
from quorumfs.live.resolving import Deciding
from quorumfs.live.resyncing import Resyncing
from quorumfs.live.scrubbing import Scrubbing
from quorumfs.live.settings import Settings
from quorumfs.live.steering import Steering
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.repairs import Repairs


def verbs(
    disk: Disk,
    repairs: Repairs | None,
    mountpoint: str,
    settings: Settings,
    announce: Announce,
) -> dict[str, Verb]:
    """All verbs of a mount of *disk*; *repairs* is None where nothing is repaired.

    *announce* tells the kernel of a larger size.
    """
    steering = Steering(disk, repairs)
    always: dict[str, Verb] = {
        "clear": steering.clear,
        "set": settings.set,
    }
    if repairs is None or not isinstance(disk.metadata, Sidecars):
        return always | dict.fromkeys(_OF_SIDECARS, _refuse)
    changing = trio.Lock()
    membership = Membership(disk, disk.metadata, repairs, changing, settings, mountpoint)
    growth = Growth(disk, disk.metadata, changing, announce)
    return always | {
        "offline": membership.offline,
        "online": membership.online,
        "add": membership.add,
        "remove": membership.remove,
        "replace": membership.replace,
        "grow": growth.grow,
        "resync": Resyncing(repairs, settings).resync,
        "scrub": Scrubbing(repairs).scrub,
        "resolve": Deciding(disk, repairs, partial(named, disk)).resolve,
    }


_OF_SIDECARS = (
    "offline",
    "online",
    "add",
    "remove",
    "replace",
    "grow",
    "resync",
    "scrub",
    "resolve",
)


async def _refuse(_: Request, action: Action) -> dict[str, Any]:
    raise UserError(
        f"{action.verb} needs a set with sidecars that is mounted for writing: not with "
        "metadata=none, nor with -o ro"
    )
