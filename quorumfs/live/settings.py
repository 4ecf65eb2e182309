"""The mount options in force: who knows them, and how an administrator changes them."""

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import trio

from quorumfs.decisions.patterns import ReadPattern
from quorumfs.disk.disk import Disk
from quorumfs.errors import UsageError, UserError
from quorumfs.live.actions import Action, Request, not_cut_off
from quorumfs.options.parsing import changed_options, write_mostly
from quorumfs.options.table import MountOptions, option_of_field
from quorumfs.options.texts import differing_fields, option_text
from quorumfs.repair.repairs import Repairs
from quorumfs.repair.rewrite import Rewriting

TUNED = (
    "vote_threshold",
    "read_pattern",
    "write_mostly",
    "rewrite_corrupted",
    "blkverify",
    "replica_timeout_s",
    "write_ack",
    "behind_max_s",
    "resync_rate",
    "scrub_every_s",
    "on_event",
    "sidecars",
)
"""The fields of `MountOptions` that change while the disk is in use."""

_REMOUNT = "unmount, and mount again with it"
_KERNEL = f"the kernel is told of it when the disk is mounted: {_REMOUNT}"

FIXED = {
    "metadata": f"what replicas miss is kept in one way from the mount on: {_REMOUNT}",
    "chunk_size": "the sidecars are made with it: it counts for new sets alone",
    "degraded": "it is a consent that a mount asks for when it begins: give it to the next one",
    "takeover": "it is a consent that a mount asks for when it begins: give it to the next one",
    "read_only": "replicas are opened, and locked, for reading or for writing when the disk is "
    f"mounted: {_REMOUNT}",
    "replica_io": f"images are opened for it when the disk is mounted: {_REMOUNT}",
    "sync": f"programs that have disk.img open were told otherwise: {_REMOUNT}",
    "detect_zeroes": f"it takes effect when the disk is mounted: {_REMOUNT}",
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
    """What an administrator tunes of *options*, as ``-o`` takes them."""
    return tuple(option_text(options, name) for name in TUNED)


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
        run_for_events: Callable[[str | None], None] = lambda _: None,
        keep_sidecars_in: Callable[[str | None], None] = lambda _: None,
    ) -> None:
        """*options*: those of the mount. *repairs*: None if nothing is repaired.

        *pattern* makes the read pattern that options ask for, with a vote threshold.
        *run_for_events* takes the program to run for each event, and *keep_sidecars_in* the
        directory for sidecars of devices.
        """
        self._disk = disk
        self._mirror = disk.mirror
        self._repairs = repairs
        self._pattern = pattern
        self._run_for_events = run_for_events
        self._keep_sidecars_in = keep_sidecars_in
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
        old, mirror = self.present, self._mirror
        # A mount that was given fewer replicas than the set has may have a higher threshold.
        replicas = max(len(mirror.replicas), old.vote_threshold)
        new = changed_options(old, texts, replicas)
        changed = differing_fields(old, new)
        for name in changed:
            if name not in TUNED:
                raise UsageError(
                    f"option {option_of_field(name)} cannot change while the disk is in use: "
                    f"{FIXED[name]}"
                )
        if "sidecars" in changed and old.sidecars is not None:
            raise UsageError(
                f"option sidecars: it is {old.sidecars} already, where those of devices in use may "
                f"be: {_REMOUNT}"
            )
        mostly = mirror.read_order.write_mostly
        if "write_mostly" in changed:
            mostly = write_mostly([replica.path for replica in mirror.replicas], new)
        if "vote_threshold" in changed:
            action.doing = "putting vote-threshold on record"
            await self._record_threshold(new.vote_threshold)
            self._apply(replace(old, vote_threshold=new.vote_threshold))
            # Replicas may have come and gone, which the other options depend on.
            new = changed_options(self.present, texts, max(len(mirror.replicas), replicas))
        mirror.read_order.write_mostly = mostly
        self._apply(new)
        return changed

    async def _record_threshold(self, threshold: int) -> None:
        try:
            with not_cut_off():
                await self._disk.metadata.change_threshold(threshold)
        except OSError as error:
            before = self._disk.threshold
            what = f"vote-threshold stays {before}: {error.strerror}"
            if error.errno == errno.EBUSY:
                needed = max(threshold, before)
                what += f", and {needed} must take part in the change to {threshold}"
                if threshold < before:
                    what += (
                        f"; without others: unmount, and mount with -o degraded,"
                        f"vote-threshold={threshold}"
                    )
            raise UserError(what) from None

    def _apply(self, new: MountOptions) -> None:
        """Have *new* in force. Without a checkpoint: the gate of the fast path, which is closed
        while Python works, opens with all of it, or none."""
        mirror, old = self._mirror, self.present
        # A read that is under way ends by the pattern that it began with.
        mirror.pattern = self._pattern(new, mirror.threshold)
        self._run_for_events(new.on_event)
        self._keep_sidecars_in(new.sidecars)
        mirror.search_s = new.replica_timeout_s
        for replica in mirror.replicas:
            replica.timeout_s = new.replica_timeout_s
            replica.behind_max_s = new.patience_with_laggards_s
        if self._repairs is None:
            self._disk.repair_by(Rewriting(mirror) if new.rewrite_corrupted else None)
        else:
            self._repairs.outvoted = new.rewrite_corrupted
            self._repairs.scrub.every_s = new.scrub_every_s
            if new.resync_rate != old.resync_rate:
                self._repairs.limit = new.resync_rate
        self.present = new

    async def replaced(self, old: str, new: str | None) -> None:
        """Have *new* be read as *old* was, a replica that is removed; None: nothing follows it."""
        async with self._changing:
            mostly = self._mirror.read_order.write_mostly
            if old not in mostly:
                return
            mostly = mostly - {old} | ({new} if new else set())
            self._mirror.read_order.write_mostly = mostly
            self.present = replace(self.present, write_mostly=tuple(sorted(mostly)))
