"""What an administrator does to a set that is not mounted: create it, decide what to keep."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import trio

from quorumfs.assembly import State, new_record, refuse_too_many
from quorumfs.control.events import EventLog
from quorumfs.dirtymap import DirtyMap
from quorumfs.errors import UsageError, UserError
from quorumfs.filesystems import close
from quorumfs.images import Image, close_all, lasting_identity, open_set
from quorumfs.options import parse_options
from quorumfs.replica import Replica
from quorumfs.replicaset import open_replica_set
from quorumfs.resolution import Resolution, resolve
from quorumfs.sidecar import Sidecar, path_for
from quorumfs.sidecarfile import create_sidecar

PROGRESS_S = 0.5
"""How often a copy says how far it is."""


def create_empty(paths: Sequence[str], size: int, threshold: int | None) -> None:
    """Make a set of new, sparse images of *size* bytes, all zeros.

    Nothing that exists is touched; after a failure nothing is left. Raises `UserError`.
    """
    refuse_too_many(len(paths))
    with ExitStack() as undo:
        images = []
        for path in map(os.path.abspath, paths):
            if os.path.lexists(path_for(path)):
                raise UserError(_already_there(path))
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                undo.callback(_remove, path)
                try:
                    os.truncate(fd, size)
                    os.fsync(fd)
                    images.append((path, lasting_identity(fd)))
                finally:
                    close(fd, path)
            except OSError as error:
                raise UserError(f"cannot create {path}: {error.strerror}") from None
        names = [path for path, _ in images]
        record = new_record(names, size, threshold or len(images) // 2 + 1)
        disk_map = DirtyMap(size, record.chunk_size)
        for (path, image), role in zip(images, record.roles, strict=True):
            undo.callback(_remove, path_for(path))
            _write(path, Sidecar(role.replica_id, record, disk_map, image))
        undo.pop_all()


def _already_there(path: str) -> str:
    """Why no new image is made at *path*, where there is a sidecar, and what to do."""
    sidecar = path_for(path)
    if os.path.exists(path):
        return (
            f"{path} is a member of a set already: mount it; or, to make it anew and lose what it "
            f"holds, remove it and {sidecar} first"
        )
    return (
        f"{sidecar} is there without its image: bring {path} back; or, to make a new one, remove "
        f"{sidecar} first"
    )


def create_from(
    source: str, others: Sequence[str], threshold: int | None, say: Callable[[int, int], None]
) -> None:
    """Make a set of *source* and copies of it at *others*; *say* is told bytes done and in all.

    What does not exist is created. What does is overwritten, unless it belongs to a set. If this
    ends early the next mount goes on. Raises `UserError`.
    """
    source, *paths = map(os.path.abspath, (source, *others))
    refuse_too_many(1 + len(paths))
    for path in paths:
        if os.path.lexists(path_for(path)):
            raise UserError(
                f"{path} is a member of a set already: to give up what it holds, remove "
                f"{path_for(path)} first"
            )
    if os.path.lexists(path_for(source)):
        raise UserError(
            f"{source} is a member of a set: to add replicas to it, run: quorumfs resolve --keep "
            f"{source} {' '.join([source, *paths])}"
        )
    with ExitStack() as undo:
        try:
            size = os.stat(source).st_size
            for path in paths:
                _create_if_absent(path, size, undo)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from None
        keep(source, [source, *paths], threshold=threshold)
        undo.pop_all()
    trio.run(_copy, [source, *paths], say)


def _create_if_absent(path: str, size: int, undo: ExitStack) -> None:
    """Have an image of *size* bytes at *path*, or the one that is there; *undo* removes a new one.

    Raises `OSError`, and `UserError` if it must not be overwritten.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        if os.path.exists(path) and os.stat(path).st_nlink > 1:
            raise UserError(
                f"{path} has other names, and may be a member of a set by one"
            ) from None
        return
    undo.callback(_remove, path)
    try:
        try:
            os.truncate(fd, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def keep(
    kept: str, paths: Sequence[str], *, threshold: int | None = None, dry_run: bool = False
) -> Resolution:
    """Make all replicas at *paths* copies of the one *kept*, from the next mount on.

    Raises `UserError`, and then nothing has been written; or, should a sidecar not be writable,
    nothing where there was none before.
    """
    refuse_too_many(len(paths))
    kept = os.path.abspath(kept)
    absolute = [os.path.abspath(path) for path in paths]
    if kept not in absolute:
        raise UsageError(f"{kept} is to be kept, and is not one of the replicas given")
    with ExitStack() as stack:
        opened = open_set(absolute, None, read_only=dry_run)
        stack.callback(close_all, opened)
        found = [one.found if isinstance(one, Image) else one for one in opened]
        resolution = resolve(found, kept, threshold=threshold)
        if not dry_run:
            with ExitStack() as undo:
                for path, sidecar in resolution.sidecars.items():
                    if not os.path.lexists(path_for(path)):
                        undo.callback(_remove, path_for(path))
                    _write(path, sidecar)
                undo.pop_all()
        return resolution


async def _copy(paths: Sequence[str], say: Callable[[int, int], None]) -> None:
    """Resync a set that is not mounted, until all replicas are current."""
    options = parse_options([], len(paths))
    replica_set = open_replica_set(paths, None, options)
    replica_set.take_into_use()
    disk, repairs = replica_set.make_disk(options, EventLog("", lambda _: None))
    assert repairs is not None
    failure: str | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.run)
        nursery.start_soon(repairs.run)
        while failure is None and any(r.role is not State.CURRENT for r in disk.replicas):
            with trio.move_on_after(PROGRESS_S):
                await repairs.changed.wait()
            if repairs.progress is not None:
                say(repairs.progress.done_bytes, repairs.progress.total_bytes)
            failure = next((f"{r.path}: {r.reason}" for r in disk.replicas if _failed(r)), None)
        await repairs.stop()
        try:
            await disk.close()
        except OSError as error:
            failure = failure or f"it could not be made durable: {error.strerror}"
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise UserError(f"the copy is not complete, the next mount goes on: {failure}")


def _failed(replica: Replica) -> bool:
    """Whether a copy to *replica* ended with an error."""
    return replica.role in (State.STALE, State.MISSING, State.FOREIGN) and not replica.attached


def _write(path: str, sidecar: Sidecar) -> None:
    try:
        create_sidecar(path, sidecar)
    except OSError as error:
        raise UserError(f"cannot write {path_for(path)}: {error.strerror}") from None


def _remove(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)
