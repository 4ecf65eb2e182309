"""The files of a replica to come: made, or taken over, before the set knows of it."""

import os
import stat
from contextlib import ExitStack

from quorumfs.decisions.claim import Claim
from quorumfs.decisions.quoting import quoted
from quorumfs.decisions.record import Record, RoleState, Sidecar
from quorumfs.decisions.sidecar import FormatError
from quorumfs.errors import UserError
from quorumfs.replica.claiming import refuse_claimed
from quorumfs.replica.devices import files_below, is_device, loop_in_use_over
from quorumfs.replica.filesystems import close
from quorumfs.replica.imagelock import ImageLockedError, lock_image
from quorumfs.replica.images import inside, open_device
from quorumfs.replica.newimages import PRIVATE, make_image
from quorumfs.replica.places import place_for, refuse_sidecar
from quorumfs.replica.sidecarfile import (
    SidecarLockedError,
    create_sidecar,
    open_sidecar,
    read_sidecar,
    replace_sidecar,
)


def make_files(
    path: str,
    sidecar: Sidecar,
    record: Record,
    mountpoint: str,
    directory: str | None = None,
    mine: Claim | None = None,
    *,
    overwrite: bool,
) -> None:
    """Have an image at *path* that is to be a replica of the set with *record*, and its *sidecar*.

    What is absent is made. What is empty, a hole, or was made by the same command that then was
    killed, is taken; with *overwrite* any image of the right size is, and any device that is long
    enough, whose sidecar is made in *directory*. *mine*: the claim of this mount, which a replica
    may have still that was removed while it hung. In a thread: it may hang. Raises `UserError`.
    """
    if inside(path, mountpoint):
        raise UserError(f"{path} is inside the mount point {mountpoint}")
    _refuse_on_disk(path, mountpoint)
    with ExitStack() as undo:
        try:
            place = place_for(path, directory)
            if inside(place, mountpoint):
                raise UserError(f"{place} is inside the mount point {mountpoint}")
            refuse_claimed(path, place, mine)
            if (found := _sidecar_at(path, place)) is not None:
                _refuse_member(path, found, sidecar, record, overwrite=overwrite)
            if found is None and not overwrite:
                _make_blank(path, record.size, undo)
            else:
                _require_usable(path, record.size, undo)
            if os.path.lexists(place):
                replace_sidecar(path, sidecar, place)
            else:
                create_sidecar(path, sidecar, place=place)
        except OSError as error:
            raise UserError(
                f"cannot make the replica {error.filename or path}: {error.strerror}"
            ) from None
        undo.pop_all()


def _sidecar_at(path: str, place: str) -> Sidecar | str | None:
    """The sidecar, at *place*, of the image at *path*, or why it cannot be read; None if there is
    none."""
    try:
        fd = open_sidecar(place, read_only=False)
    except SidecarLockedError as error:
        raise UserError(f"{path} is in use by {error}") from None
    if fd is None:
        return None
    try:
        return read_sidecar(fd)
    except FormatError as error:
        return str(error)
    finally:
        close(fd, place)


def _refuse_member(
    path: str, found: Sidecar | str, sidecar: Sidecar, record: Record, *, overwrite: bool
) -> None:
    """Refuse an image with the sidecar *found* unless it was begun here, or may be overwritten; or
    is the replica that is to get a new *sidecar*."""
    again = "to give up what it holds, use --overwrite"
    if isinstance(found, str):
        if not overwrite:
            raise UserError(f"{path} has a sidecar that cannot be read ({found}): {again}")
        return
    ours = found.record.set_id == record.set_id
    if ours and found.replica_id == sidecar.replica_id:
        return
    if ours and record.slot_of(found.replica_id) is not None:
        raise UserError(
            f"{path} is a replica of this set already, and was not given to this mount: name it "
            "in quorumfs mount"
        )
    begun = ours and found.own_state is RoleState.RESYNCING
    if begun and record.place_of(found.replica_id) is None:
        return
    if not overwrite:
        what = "was a replica of this set" if ours else f"is of set {found.record.set_id.hex()}"
        raise UserError(f"{path} {what}: {again}")


def _make_blank(path: str, size: int, undo: ExitStack) -> None:
    try:
        make_image(path, size, PRIVATE, undo)
    except FileExistsError:
        if is_device(path):
            raise UserError(
                f"{path} is a block device, and may hold data: to give up what it holds, use "
                "--overwrite"
            ) from None
        raise UserError(
            f"{path} is there, and is neither empty nor a hole of {size} bytes: to give up what it "
            "holds, use --overwrite"
        ) from None


def _refuse_on_disk(path: str, mountpoint: str) -> None:
    """Refuse what lies on the disk itself: each write to it would wait for another one."""
    try:
        status = os.stat(path if os.path.exists(path) else os.path.dirname(path))
    except OSError:
        return  # making it will say why
    for below in files_below(status.st_rdev or status.st_dev):
        if below.startswith(mountpoint.rstrip("/") + "/"):
            raise UserError(f"{path} lies on {below}, the disk that it would be a replica of")


def _require_usable(path: str, size: int, undo: ExitStack) -> None:
    """Have an image at *path* that may be overwritten, and is nobody else's."""
    refuse_sidecar(path)
    if not os.path.lexists(path):
        make_image(path, size, PRIVATE, undo)
        return
    status = os.stat(path)
    if stat.S_ISBLK(status.st_mode):
        open_device(path, size).close()
        return
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is no regular file")
    if status.st_size == 0:
        os.truncate(path, size)
    elif status.st_size != size:
        raise UserError(
            f"{path} has {status.st_size} bytes, the disk has {size}: make it as long first: "
            f"truncate -s {size} {quoted(path)}"
        )
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        lock_image(fd, read_only=False)
    except ImageLockedError:
        raise UserError(f"{path} is in use by another program") from None
    else:
        if (loop := loop_in_use_over(fd, os.path.realpath(path))) is not None:
            raise UserError(f"{path} is in use: {loop} lies on it, and is in use")
    finally:
        close(fd, path)
