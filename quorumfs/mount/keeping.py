"""Deciding which replica of a set that is not mounted the others become copies of."""

import os
from collections.abc import Sequence
from contextlib import ExitStack

from quorumfs.decisions.claim import Tenure
from quorumfs.decisions.model import Found
from quorumfs.decisions.newset import refuse_too_many
from quorumfs.decisions.resolution import Resolution, resolve
from quorumfs.errors import UsageError
from quorumfs.mount.unmounted import write_sidecar
from quorumfs.replica.claimant import claim_of_this_mount
from quorumfs.replica.claiming import (
    RESOLVE,
    claim_all,
    found_claims,
    look_again,
    release_all,
    require_free,
    wait_until_noticed,
)
from quorumfs.replica.images import Image, close_all, open_set
from quorumfs.replica.newimages import remove


def keep_one(
    kept: str,
    paths: Sequence[str],
    *,
    threshold: int | None = None,
    directory: str | None = None,
    dry_run: bool = False,
    takeover: bool = False,
) -> Resolution:
    """Make all replicas at *paths* copies of the one *kept*, from the next mount on.

    *directory* is for the sidecars of block devices. *takeover*: also where another host has them
    open, which is down. Raises `UserError`, and then nothing has been written but, by *takeover*,
    who has them; or, should a sidecar not be writable, nothing where there was none before.
    """
    refuse_too_many(len(paths))
    kept = os.path.abspath(kept)
    absolute = [os.path.abspath(path) for path in paths]
    if kept not in absolute:
        raise UsageError(f"{kept} is to be kept, and is not one of the replicas given")
    with ExitStack() as stack:
        opened: Sequence[Image | Found] = open_set(
            absolute, None, read_only=dry_run, directory=directory
        )
        stack.callback(close_all, opened)
        opened = _take_over(opened, stack, takeover=takeover, dry_run=dry_run)
        found = [one.found if isinstance(one, Image) else one for one in opened]
        resolution = resolve(found, kept, threshold=threshold)
        places = {one.path: one.sidecar_place for one in found}
        if not dry_run:
            with ExitStack() as undo:
                for path, sidecar in resolution.sidecars.items():
                    place = places[path]
                    if not os.path.lexists(place):
                        undo.callback(remove, place)
                    write_sidecar(path, sidecar, place)
                undo.pop_all()
        return resolution


def _take_over(
    opened: Sequence[Image | Found], undo: ExitStack, *, takeover: bool, dry_run: bool
) -> Sequence[Image | Found]:
    """Have these for ourselves until *undo*; returns them as they are then.

    Raises `UserError` if another mount has one open, without *takeover*.
    """
    here = claim_of_this_mount()
    claims = found_claims(opened, here)
    held = require_free(claims, takeover=takeover, how=RESOLVE)
    if dry_run or not held:
        return opened
    images = [one for one in opened if isinstance(one, Image)]
    undo.callback(release_all, images, here)
    claim_all(images, Tenure(here, frozenset(one.claim.mount for one in claims)))
    wait_until_noticed(held)
    return look_again(opened)
