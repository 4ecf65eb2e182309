"""Making a set of new images, all zeros."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from quorumfs.decisions.newset import new_record, refuse_too_many
from quorumfs.decisions.record import Identity, RoleState, Sidecar
from quorumfs.decisions.sameimage import image_changed
from quorumfs.decisions.sectors import unreachable, whole
from quorumfs.errors import UsageError, UserError
from quorumfs.mount.limits import require_file_size
from quorumfs.mount.unmounted import opened, places_of, refuse_to_create, untouched, write_sidecar
from quorumfs.replica.blockdevice import clear
from quorumfs.replica.devices import content_identity, files_of, is_device
from quorumfs.replica.filesystems import close
from quorumfs.replica.images import open_device
from quorumfs.replica.newimages import PRIVATE, make_image, remove


def create_empty(
    paths: Sequence[str],
    size: int,
    threshold: int | None,
    mode: int = PRIVATE,
    *,
    directory: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Make a set of new, sparse images of *size* bytes, all zeros, with *mode*.

    Block devices are cleared if *overwrite* says so; their sidecars are made in *directory*.
    Nothing else that exists is touched, but for what the same command left when it was killed;
    after a failure nothing is left. Raises `UserError`; with *dry_run* for the same reasons, as far
    as they can be known before anything is written.
    """
    refuse_too_many(len(paths))
    if why := unreachable(size):
        raise UsageError(f"option --size: {why}; give {whole(size)}")
    require_file_size(size, "the images")
    names = list(map(os.path.abspath, paths))
    for path in names:
        if names.count(path) > 1:
            raise UserError(f"{path} and {path} are the same file")
    places = places_of(names, directory)
    members = [path for path in names if os.path.lexists(places[path])]
    if members and not _begun_empty(names, size, directory):
        raise UserError(_already_there(members[0], places[members[0]]))
    with ExitStack() as undo:
        images = []
        for path in names:
            try:
                if is_device(path):
                    _refuse_device(path, size, overwrite=overwrite)
                elif dry_run:
                    refuse_to_create(path, size)
                else:
                    images.append((path, make_image(path, size, mode, undo)))
            except OSError as error:
                raise UserError(f"cannot create {path}: {error.strerror}") from None
        if dry_run:
            return
        _refuse_same(names)
        cleared = _cleared([path for path in names if is_device(path)], size)
        identities = dict(images) | cleared
        record = new_record(names, size, threshold or len(names) // 2 + 1)
        disk_map = record.new_map()
        for path, role in zip(names, record.roles, strict=True):
            undo.callback(remove, places[path])
            sidecar = Sidecar(role.replica_id, record, disk_map, identities[path])
            write_sidecar(path, sidecar, places[path])
        undo.pop_all()


def _refuse_device(path: str, size: int, *, overwrite: bool) -> None:
    """Raise `UserError` if the device at *path* must not be cleared as far as *size* bytes."""
    if not overwrite:
        raise UserError(
            f"{path} is a block device, and may hold data: to give up what it holds, use "
            "--overwrite"
        )
    open_device(path, size).close()


def _cleared(paths: Sequence[str], size: int) -> dict[str, Identity]:
    """Make zeros of the first *size* bytes of the devices at *paths*, which may take long; by path
    what tells each from now on. Raises `UserError`.
    """
    told: dict[str, Identity] = {}
    with ExitStack() as stack:
        images = []
        for path in paths:
            try:
                images.append(open_device(path, size))
            except OSError as error:
                raise UserError(f"{path}: {error.strerror}") from None
            stack.callback(images[-1].close)
        for image in images:
            assert image.device is not None
            try:
                clear(image.fd, size, image.device)
                identity = content_identity(image.fd, image.device, over=size)
            except OSError as error:
                raise UserError(f"cannot clear {image.path}: {error.strerror}") from None
            told[image.path] = replace(identity, size=size)
    return told


def _refuse_same(names: Sequence[str]) -> None:
    """Refuse paths that lead to one file: the second found it to be as new as the first."""
    taken: dict[tuple[int, int], str] = {}
    for path in names:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            others = [taken.setdefault(file, path) for file in files_of(fd)]
        finally:
            close(fd, path)
        for other in others:
            if other != path:
                raise UserError(f"{other} and {path} are the same file")


def _begun_empty(names: Sequence[str], size: int, directory: str | None) -> bool:
    """Whether the sidecars there are those of a `create_empty` with the same arguments that was
    killed before it had written all: then nothing was ever written through them.
    """
    with opened(names, directory) as found:
        if len(found) < len(names) or all(image.sidecar for image in found):
            return False
        return all(
            untouched(image.sidecar, names, size)
            and not image_changed(image.found)
            and image.sidecar.map.is_all(0)
            and all(role.state is RoleState.CURRENT for role in image.sidecar.record.roles)
            for image in found
            if image.sidecar
        )


def _already_there(path: str, sidecar: str) -> str:
    """Why no new image is made at *path*, where there is a *sidecar*, and what to do."""
    if is_device(path):
        return (
            f"{path} is a member of a set already: mount it; or, to make it anew and lose what it "
            f"holds, remove {sidecar} first"
        )
    if os.path.exists(path):
        return (
            f"{path} is a member of a set already: mount it; or, to make it anew and lose what it "
            f"holds, remove it and {sidecar} first"
        )
    return (
        f"{sidecar} is there without its image: bring {path} back; or, to make a new one, remove "
        f"{sidecar} first"
    )
