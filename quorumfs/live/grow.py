"""``grow``: the disk becomes longer, with zeros there: the replicas first, the guest last."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from quorumfs.control.human import human_bytes
from quorumfs.decisions.growth import wanted_size
from quorumfs.decisions.voting import voted_error
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError, UserError
from quorumfs.live.actions import Action, Request
from quorumfs.metadata.growing import grow
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.replica.lengthening import Steps
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, TooShortError

Announce = Callable[[int], Awaitable[None]]
"""Tells whoever knows the size of the file (bytes) that it is larger."""


class Growth:
    """The verb. Any part of it may be cut off, and the verb given again."""

    def __init__(
        self, disk: Disk, sidecars: Sidecars, changing: trio.Lock, announce: Announce
    ) -> None:
        """*changing* is held while the size, or the replicas, of the set change."""
        self._disk = disk
        self._mirror = disk.mirror
        self._sidecars = sidecars
        self._ledger = sidecars.ledger
        self._announce = announce
        self._changing = changing

    async def grow(self, request: Request, action: Action) -> dict[str, Any]:
        """``{"command": "grow", "size": BYTES, "more": whether SIZE is to be added}``."""
        size, more = request.number("size"), request.flag("more")
        if not size:
            raise UsageError("'size' is to be a number of bytes, at least 1")
        async with self._changing:
            before = self._disk.size
            size = wanted_size(self._ledger.record, size, more=more)
            members = self._ledger.members
            if size > before:
                await self._grow(size, action)
            gone = [one.path for one in members if not one.standing.is_member]
        return {
            "message": _in_words(before, size, gone),
            "size": size,
            "size_before": before,
            "ejected": gone,
        }

    async def _grow(self, size: int, action: Action) -> None:
        await self._require_able()
        lengthened: set[Replica] = set()
        grown = False
        while not grown:
            missing = [one for one in self._ledger.members if one not in lengthened]
            action.doing = "making the images longer"
            try:
                if missing:
                    lengthened.update(await self._lengthen(missing, size, action))
                await self._mirror.sync()
                action.doing = "putting the new size on record"
                grown = await grow(self._sidecars.recorder, size, lengthened)
            except OSError as error:
                await self._cut_back(lengthened)
                raise UserError(
                    f"the disk keeps its {self._disk.size} bytes: {error.strerror}"
                ) from None
        self._mirror.announce_states()
        action.doing = "telling the kernel"
        self._mirror.announced_size = size
        await self._announce(size)
        self._mirror.size = size

    async def _require_able(self) -> None:
        """Have this mount on record as one that changes the disk; raises `UserError`."""
        sidecars, ledger = self._sidecars, self._ledger
        try:
            sidecars.require_ours()
            await sidecars.recorder.open(to_change=True)
        except OSError as error:
            raise UserError(f"the disk cannot grow now: {error.strerror}") from None
        if not ledger.membership.recorded or len(ledger.members) < ledger.threshold:
            raise UserError("the disk cannot grow now: too few replicas are current")
        for replica in ledger.content.truncated:
            raise UserError(f"{replica.path} was truncated: mend that first")

    async def _lengthen(
        self, replicas: Sequence[Replica], size: int, action: Action
    ) -> list[Replica]:
        """Make the images of *replicas*, members, *size* bytes long; returns those that are.

        The others are ejected. Raises `OSError` if too few members would be left, or if a device is
        too short: no command of an administrator costs a copy for want of another command.
        """
        at, done = self._disk.size, list(replicas)
        steps, failed = Steps(at, size), list[Outcome]()
        while done and steps.length:
            percent = 100 * (steps.at - at) // (size - at)
            action.doing = f"making the images longer: {percent} %"
            began = trio.current_time()
            outcomes = await self._ask(done, steps.at, steps.length)
            steps.took(trio.current_time() - began)
            failed += [outcome for outcome in outcomes if outcome.error is not None]
            done = [outcome.replica for outcome in outcomes if outcome.error is None]
        self._mirror.report(failed)
        gone = [outcome.replica for outcome in failed]
        if not failed:
            return done
        voted = voted_error(outcome.error for outcome in failed)
        told = [outcome.error for outcome in failed if outcome.error is not None]
        short = next((one for one in told if isinstance(one, TooShortError)), None)
        error = short or next((one for one in told if one.errno == voted.errno), voted)
        reason = f"it could not grow: {error.strerror}"
        if short is None and self._ledger.enough_without(gone):
            await self._sidecars.recorder.eject(gone, range(0), reason)
            return done
        await self._ask(done, at, 0)
        paths = ", ".join(replica.path for replica in gone)
        raise OSError(error.errno, f"{paths}: {error.strerror}")

    async def _cut_back(self, lengthened: Sequence[Replica] | set[Replica]) -> None:
        """Give images their length back, unless a record with the new size may be somewhere."""
        if self._ledger.membership.recorded and self._sidecars.fenced is None:
            members = [one for one in self._ledger.members if one in lengthened]
            await self._ask(members, self._disk.size, 0)
            with suppress(OSError):  # a sidecar that had no space for more is as good as before
                await self._sidecars.recorder.write_map()

    async def _ask(self, replicas: Sequence[Replica], offset: int, length: int) -> list[Outcome]:
        return await self._mirror.ask(replicas, Kind.RESIZE, self._disk.threshold, offset, length)


def _in_words(before: int, size: int, gone: Sequence[str]) -> str:
    if size == before:
        return f"the disk has {human_bytes(size)} ({size} bytes) already"
    without = f"; without {', '.join(gone)}, which could not: see quorumfs status" if gone else ""
    return f"the disk has {human_bytes(size)} ({size} bytes), before {human_bytes(before)}{without}"
