"""Rejoining: taking replicas into use again that were away, or failed.

An ejected replica is tried again, ever more rarely: its files are opened anew, judged as at a
mount, and resynced.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import trio

from quorumfs.decisions.dirtymap import out_of_sync
from quorumfs.decisions.model import Found, Member, Standing
from quorumfs.decisions.returned import OFFLINE, judge_returned
from quorumfs.errors import UserError
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.pacing import Backoff
from quorumfs.repair.proof import holds_last_writes
from quorumfs.repair.resync import Resync
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Storage

RETRY_S = (1.0, 60.0)
"""The first and the longest wait (seconds) before an ejected replica is tried again."""


@dataclass(slots=True)
class Returned:
    """The files of a replica, opened again."""

    found: Found
    image: Storage
    sidecar: Storage


class ForeignError(UserError):
    """Another mount has this replica."""


class Opener(Protocol):
    """Opens the files of replicas again. None of its methods waits for ever."""

    async def reopen(self, replica: Replica) -> Returned:
        """Open, check and lock the files of *replica*; raises `OSError` or `UserError`."""

    async def is_lost(self, replica: Replica) -> bool:
        """Whether the open image of *replica* fails what the image answers when opened anew."""


class Rejoin:
    """Has the replicas of one disk rejoin."""

    def __init__(
        self,
        sidecars: Sidecars,
        resync: Resync,
        opener: Opener,
        present: dict[Replica, Found],
    ) -> None:
        """*present*: what was found of each replica that is open and not current."""
        self._sidecars = sidecars
        self._ledger = sidecars.ledger
        self._resync = resync
        self._opener = opener
        self._present = present
        self._attempts = defaultdict[Replica, Backoff](partial(Backoff, *RETRY_S))
        self._looks = defaultdict[Replica, Backoff](partial(Backoff, *RETRY_S))
        """When to look again whether the files of a member are lost."""
        self.being_made: set[str] = set()
        """Paths of replicas whose files are being made, perhaps by a thread that was given up, and
        changes them when its file system answers: nobody opens them before it has ended."""
        self._claimed: set[Replica] = set()
        """Replicas that another mount had open at the last attempt."""
        self._left: dict[Replica, int] = {}
        """As `Found.left_ns`, through attempts that end before a resync."""

    def may_come_back(self, replica: Replica) -> bool:
        """Whether *replica* is out, or its file system gone, and it is tried again and again."""
        return self._is_gone(replica) or self._is_out(replica)

    def _is_gone(self, replica: Replica) -> bool:
        """Whether *replica* is a member whose file system is gone."""
        return replica.standing.is_member and (replica.dead or not replica.attached)

    def _is_out(self, replica: Replica) -> bool:
        """Whether *replica* is no member, and is tried again and again."""
        return replica.standing.is_retried or replica in self._claimed

    def try_at_once(self, replica: Replica) -> None:
        """Have the next attempt with *replica* come at once, and the one after it soon."""
        self._attempts.pop(replica, None)

    async def rejoin(self, replica: Replica) -> bool:
        """Make *replica* current if it is not, and can be opened; whether that succeeded."""
        out = self._is_out(replica)
        if out and replica.attached and replica not in self._present:
            replica.detach(there=True)
        if not out or replica.slot is None or replica.in_flight:
            return False
        if replica.path in self.being_made:
            return False
        attempts, began = self._attempts[replica], trio.current_time()
        if began < attempts.due_at or not self._ledger.members:
            return False
        opened = False
        self._left.setdefault(replica, replica.health.left_ns)
        try:
            member, found = await self._look_at(replica)
            opened = True
            self._claimed.discard(replica)
            if replica.standing is Standing.OFFLINE:  # since a moment ago
                raise UserError(OFFLINE)
            replica.standing, replica.reason = member.state, member.reason or replica.reason
            if not member.state.is_coming:
                raise UserError(member.reason or "it cannot be used")
            del self._left[replica]
            await self._resync.resync(replica, found, full=member.compare)
        except (OSError, UserError) as error:
            if isinstance(error, ForeignError):
                self._claimed.add(replica)
                replica.standing, replica.reason = Standing.FOREIGN, str(error)
            if not replica.standing.needs_operator:
                replica.reason = _in_words(error) or replica.reason
            replica.detach(there=opened and not replica.dead)
            return False
        finally:
            # The wait grows after a success, too: a replica that soon fails costs a generation.
            attempts.tried(began, trio.current_time())
        return True

    async def reopen_member(self, replica: Replica) -> bool:
        """Open again a member whose file system was gone, or whose files are lost; whether the
        member is back.

        Such a member is still current because too few others are left to eject it.
        """
        gone = self._is_gone(replica) or await self._is_lost(replica)
        attempts = self._attempts[replica]
        if gone and replica.attached:
            replica.detach()
        if not gone or replica.in_flight or trio.current_time() < attempts.due_at:
            return False
        attempts.due_at = trio.current_time() + RETRY_S[0]
        try:
            returned = await self._opener.reopen(replica)
            replica.attach(returned.image, returned.sidecar)
            if not replica.standing.is_member:
                raise UserError("it was ejected meanwhile")
            await self._sidecars.joining.reopen_member(replica, returned.found)
        except (OSError, UserError) as error:
            replica.reason = _in_words(error)
            if replica.attached:
                replica.detach()
            return False
        replica.reason = None
        return True

    async def _is_lost(self, replica: Replica) -> bool:
        """Whether the files of *replica*, a member, serve nothing any more, though they would if
        they were opened anew: only then is it right to close them. A bad sector is none of theirs.
        """
        looks, now = self._looks[replica], trio.current_time()
        suspected = replica.standing.is_member and replica.health.perhaps_lost
        if not suspected or replica.hung or now < looks.due_at:
            return False
        if self._alone_shows_something(replica):
            return False
        looks.tried(now, now)
        image = replica.image
        lost = await self._opener.is_lost(replica)
        still = replica.image is image and replica.standing.is_member
        return lost and still and not self._alone_shows_something(replica)

    def _alone_shows_something(self, replica: Replica) -> bool:
        """Whether what the open files of *replica* have cached may be all that is left."""
        content = self._ledger.content
        return bool(content.risked(replica)) or replica in content.pending

    async def _look_at(self, replica: Replica) -> tuple[Member, Found]:
        assert replica.slot is not None
        found = self._present.pop(replica, None)
        if found is None or not replica.attached:
            returned = await self._opener.reopen(replica)
            replica.attach(returned.image, returned.sidecar)
            found = returned.found
        if found.is_short(self._ledger.map.size):
            await self._sidecars.truncated(replica)
        if found.sidecar is not None and self._ledger.records.is_unfinished(found.sidecar):
            # By the record that is valid still it went on alone, with a mount that nobody knows.
            await self._sidecars.recorder.open()
        found = replace(found, left_ns=self._left[replica])
        if found.exchangeable:
            lacks = partial(self._may_lack, replica)
            found = replace(found, proven=await holds_last_writes(replica, lacks))
        return judge_returned(self._ledger.record, replica.slot, found), found

    def _may_lack(self, replica: Replica, offset: int, length: int) -> bool:
        """Whether *replica*, which is stale, may lack some of a range (bytes)."""
        assert replica.slot is not None
        known = self._ledger.map
        return known.any(out_of_sync(replica.slot), known.chunks(offset, length))


def _in_words(error: OSError | UserError) -> str | None:
    return error.strerror if isinstance(error, OSError) else str(error)
