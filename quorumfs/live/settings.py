"""The mount options in force: who knows them, and how an administrator changes them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import trio

from quorumfs.decisions.patterns import ReadPattern
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError
from quorumfs.live.actions import Action, Request
from quorumfs.options import (
    MountOptions,
    changed_options,
    differing_fields,
    option_of_field,
    option_text,
    write_mostly,
)
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.rewrite import Rewriting

TUNED = (
    "read_pattern",
    "write_mostly",
    "rewrite_corrupted",
    "blkverify",
    "replica_timeout_s",
    "resync_rate",
    "scrub_every_s",
)
"""The fields of `MountOptions` that change while the disk is in use."""

_REMOUNT = "unmount, and mount again with it"
_KERNEL = f"the kernel is told of it when the disk is mounted: {_REMOUNT}"

FIXED = {
    "vote_threshold": "the set has it on record from the mount on, before a guest can rely on it: "
    + _REMOUNT,
    "metadata": f"what the replicas missed is known in the one way alone: {_REMOUNT}",
    "chunk_size": "the sidecars are made with it: it counts for new sets alone",
    "degraded": "it is a consent that a mount asks for when it begins: give it to the next one",
    "takeover": "it is a consent that a mount asks for when it begins: give it to the next one",
    "read_only": "replicas are opened, and locked, for reading or for writing when the disk is "
    f"mounted: {_REMOUNT}",
    "sync": f"who has disk.img open already was told otherwise: {_REMOUNT}",
    "detect_zeroes": f"requests are sorted by it from the first one on: {_REMOUNT}",
    "fast_path": f"its thread begins with the mount: {_REMOUNT}",
    "max_background": _KERNEL,
    "uid": _KERNEL,
    "gid": _KERNEL,
    "mode": _KERNEL,
    "fsname": _KERNEL,
    "kernel_flags": _KERNEL,
}
"""Why each of the other fields does not change, and what to do."""


def in_force(options: MountOptions) -> tuple[str, ...]:
    """What an administrator tunes of *options*, and the vote threshold, as ``-o`` takes them."""
    return tuple(option_text(options, name) for name in ("vote_threshold", *TUNED))


class Settings:
    """The options in force of a mount of *disk*; the only place that changes them.

    ``set`` changes all that it is given, or nothing. An option with the value that it has already
    is no change, so that a remount may name them all.
    """

    def __init__(
        self,
        disk: Disk,
        repairs: Repairs | None,
        options: MountOptions,
        pattern: Callable[[MountOptions, int], ReadPattern],
    ) -> None:
        """*options*: those of the mount. *repairs*: None if nothing is repaired.

        *pattern* makes the read pattern that options ask for, with a vote threshold.
        """
        self._disk = disk
        self._mirror = disk.mirror
        self._repairs = repairs
        self._pattern = pattern
        self._changing = trio.Lock()
        self.present = replace(options, vote_threshold=disk.threshold)
        """The options in force."""

    async def set(self, request: Request, action: Action) -> dict[str, Any]:
        """Change the options in ``options``, each ``NAME`` or ``NAME=VALUE``.

        Raises `UsageError`, and then nothing has changed.
        """
        texts = request.texts("options")
        async with self._changing:
            changed = await self._change(texts, action)
        told = [option_text(self.present, name) for name in changed]
        message = f"changed: {', '.join(told)}" if told else "nothing to change: it is so already"
        return {"message": message, "changed": told, "options": list(in_force(self.present))}

    async def _change(self, texts: Sequence[str], action: Action) -> list[str]:
        """Change to what *texts* say; returns the fields that are different now."""
        new, changed = self._checked(texts)
        if not {"read_pattern", "blkverify"}.isdisjoint(changed):
            # A read that is under way ends by the pattern that it began with.
            action.doing = "waiting for the requests under way"
            async with self._mirror.locks.held(0, self._disk.size, exclusive=True):
                new, changed = self._checked(texts)  # replicas may have come and gone
                self._apply(new)
        else:
            self._apply(new)
        return changed

    def _checked(self, texts: Sequence[str]) -> tuple[MountOptions, list[str]]:
        """The options that *texts* make of the present ones, and what they change.

        Raises `UsageError`.
        """
        replicas = max(len(self._disk.replicas), self.present.vote_threshold)
        new = changed_options(self.present, texts, replicas)
        changed = differing_fields(self.present, new)
        for name in changed:
            if name not in TUNED:
                raise UsageError(
                    f"option {option_of_field(name)} cannot change while the disk is in use: "
                    f"{FIXED[name]}"
                )
        if "write_mostly" in changed:
            write_mostly([replica.path for replica in self._disk.replicas], new)
        return new, changed

    def _apply(self, new: MountOptions) -> None:
        """Have *new* in force. Without a checkpoint: the gate of the fast path, which is closed
        while Python works, opens with all of it, or none."""
        mirror, old = self._mirror, self.present
        mirror.pattern = self._pattern(new, mirror.threshold)
        if new.write_mostly != old.write_mostly:
            mostly = write_mostly([replica.path for replica in mirror.replicas], new)
            mirror.read_order.write_mostly = frozenset(
                replica for replica in mirror.replicas if replica.path in mostly
            )
        mirror.search_s = new.replica_timeout_s
        for replica in mirror.replicas:
            replica.timeout_s = new.replica_timeout_s
        if self._repairs is None:
            self._disk.repair_by(Rewriting(mirror) if new.rewrite_corrupted else None)
        else:
            self._repairs.outvoted = new.rewrite_corrupted
            self._repairs.scrub.every_s = new.scrub_every_s
            if new.resync_rate != old.resync_rate:
                self._repairs.limit = new.resync_rate
        self.present = new
