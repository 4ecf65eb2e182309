"""Making a set of one image and copies of it."""

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum

import trio

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.model import Standing
from quorumfs.decisions.newset import refuse_too_many
from quorumfs.decisions.quoting import quoted
from quorumfs.decisions.record import Record, RoleState
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.resolution import first_sidecar, record_of_copies
from quorumfs.decisions.sectors import unreachable, whole
from quorumfs.disk.events import EventLog
from quorumfs.errors import ExitCode, UserError
from quorumfs.mount.keeping import keep_one
from quorumfs.mount.limits import require_file_size
from quorumfs.mount.replicaset import open_replica_set
from quorumfs.mount.unmounted import opened, places_of, refuse_to_create, untouched, write_sidecar
from quorumfs.options.parsing import parse_options
from quorumfs.replica.devices import is_device, size_at
from quorumfs.replica.images import Image
from quorumfs.replica.newimages import PRIVATE, make_image, remove
from quorumfs.replica.replica import Replica

PROGRESS_S = 0.5
"""How often a copy says how far it is."""


def create_from(
    source: str,
    others: Sequence[str],
    threshold: int | None,
    say: Callable[[int, int], None],
    mode: int = PRIVATE,
    *,
    directory: str | None = None,
    dry_run: bool = False,
) -> None:
    """Make a set of *source* and copies of it at *others*; *say* is told bytes done and in all.

    What does not exist is created, with *mode*. What does is overwritten, unless it belongs to a
    set. *directory* is for the sidecars of block devices. If this ends early, the same again goes
    on, and so does the next mount. Raises `UserError`; with *dry_run* for the same reasons, as far
    as they can be known before anything is written.
    """
    names = source, *paths = list(map(os.path.abspath, (source, *others)))
    refuse_too_many(len(names))
    places = places_of(names, directory)
    members = [path for path in names if os.path.lexists(places[path])]
    begun = _begun_copy(names, threshold, directory) if members else None
    if members and begun is None:
        raise UserError(_not_copied(source, {path: places[path] for path in members}))
    if begun is not _Begun.COPYING:
        _begin_copy(source, paths, threshold, mode, directory, dry_run=dry_run)
    if dry_run:
        return
    try:
        trio.run(_copy, names, say, directory)
    except BaseExceptionGroup as errors:
        if errors.subgroup(KeyboardInterrupt) is not None:  # a second one: at once
            raise KeyboardInterrupt from None
        raise


class _Begun(Enum):
    """How far a `create_from` got that was interrupted."""

    SIDECARS = "sidecars"
    """The source has its own, and says that the others are to be copies; not all have theirs."""
    COPYING = "copying"


def _begun_copy(
    names: Sequence[str], threshold: int | None, directory: str | None
) -> _Begun | None:
    """How far a `create_from` of the first of *names* to the others got; None if the sidecars there
    tell of anything else, or if it came to its end.
    """
    # An image that is empty still was just being made.
    made = [path for path in names if is_device(path) or _size_of_file(path) > 0]
    with opened(made, directory) as images:
        source = next((image for image in images if image.path == names[0]), None)
        own = None if source is None else source.sidecar
        others = [image for image in images if image is not source]
        if own is None or any(image.problem for image in images):
            return None
        if len(images) < len(names) or any(image.sidecar is None for image in others):
            begun = (
                untouched(own, names, own.record.size)
                and _copies_of_first(own.record)
                and threshold in (None, own.record.threshold)
                and all(
                    image.sidecar is None or image.sidecar.record == own.record for image in others
                )
            )
            return _Begun.SIDECARS if begun else None
        try:
            plan = assemble([image.found for image in images])
        except AssemblyRefusedError:
            return None
        begun = (
            len(plan.record.roles) == len(names)
            and threshold in (None, plan.record.threshold)
            and plan.members[0].state is Standing.CURRENT
            and any(role.state is not RoleState.CURRENT for role in plan.record.roles)
        )
        return _Begun.COPYING if begun else None


def _copies_of_first(record: Record) -> bool:
    """Whether all replicas but the first are to be copies of it: they hold nothing of their own."""
    first, *rest = record.roles
    return first.state is RoleState.CURRENT and all(
        role.state is RoleState.RESYNCING for role in rest
    )


def _not_copied(source: str, members: Mapping[str, str]) -> str:
    """Why *source* is not copied, where *members* have sidecars (path and sidecar), and what to
    do."""
    member = next((path for path in members if path != source), None)
    if member is not None:
        return (
            f"{member} is a member of a set already: mount it; or, to give up what it holds, "
            f"remove {members[member]} first"
        )
    return f"{source} is a member of a set: to add replicas to it, mount it, and run: quorumfs add"


def _begin_copy(
    source: str,
    paths: Sequence[str],
    threshold: int | None,
    mode: int,
    directory: str | None,
    *,
    dry_run: bool,
) -> None:
    """Have on record that those at *paths*, created if need be, are to be copies of *source*.

    With *dry_run* only find out whether that can be.
    """
    with ExitStack() as undo:
        try:
            size = size_at(source)
            if why := unreachable(size):
                command = f"truncate -s {whole(size)} {quoted(source)}"
                raise UserError(f"{source}: {why}; make it longer first: {command}")
            require_file_size(size, "the copies")
            written = [path for path in paths if _is_overwritten(path, size)]
            keep_one(source, [source, *written], directory=directory, dry_run=True)
            if dry_run:
                return
            # The source first: images without data, if they are more, would pass for a majority.
            record = _record_source([source, *paths], threshold, directory, undo)
            for path in paths:
                _create_if_absent(path, size, mode, undo)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from None
        _record_copies([source, *paths], record, directory, undo)
        undo.pop_all()


def _record_source(
    names: Sequence[str], threshold: int | None, directory: str | None, undo: ExitStack
) -> Record:
    """Have on record, at the first of *names*, that all others are to be copies of it; returns the
    record. *undo* removes it. Raises `UserError`."""
    with opened(names[:1], directory, read_only=False) as images:
        source = _all_of(names[:1], images)[0]
        if source.sidecar is not None:
            return source.sidecar.record
        record = record_of_copies(names, 0, source.size, threshold)
        place = source.found.sidecar_place
        undo.callback(remove, place)
        write_sidecar(source.path, first_sidecar(record, 0, source.identity), place)
        return record


def _record_copies(
    names: Sequence[str], record: Record, directory: str | None, undo: ExitStack
) -> None:
    """Have on record at each of *names* what *record* says of them, where nothing is yet; *undo*
    removes it. Raises `UserError`."""
    with opened(names, directory, read_only=False) as images:
        for image in _all_of(names, images):
            if image.sidecar is None:
                slot, place = names.index(image.path), image.found.sidecar_place
                undo.callback(remove, place)
                write_sidecar(image.path, first_sidecar(record, slot, image.identity), place)


def _all_of(names: Sequence[str], images: Sequence[Image]) -> Sequence[Image]:
    """*images*. Raises `UserError` if one of *names* is not among them."""
    if gone := set(names).difference(image.path for image in images):
        raise UserError(f"{min(gone)}: it was there a moment ago, and cannot be opened now")
    return images


def _size_of_file(path: str) -> int:
    """Bytes of the file at *path*; 0 if there is none."""
    try:
        return os.stat(path).st_size
    except OSError:
        return 0


def _create_if_absent(path: str, size: int, mode: int, undo: ExitStack) -> None:
    """Have an image of *size* bytes at *path*, or the one that is there; *undo* removes a new one.

    Raises `OSError`, and `UserError` if it must not be overwritten.
    """
    try:
        make_image(path, size, mode, undo)
    except FileExistsError:
        if os.path.exists(path) and os.stat(path).st_nlink > 1:
            raise UserError(_has_other_names(path)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


def _is_overwritten(path: str, size: int) -> bool:
    """Whether `_create_if_absent` would find data at *path*, and take it. Raises as that."""
    try:
        refuse_to_create(path, size)
    except FileExistsError:
        if os.path.exists(path) and os.stat(path).st_nlink > 1:
            raise UserError(_has_other_names(path)) from None
        return True
    return False


def _has_other_names(path: str) -> str:
    return f"{path} has other names, and may be a member of a set by one"


async def _copy(
    paths: Sequence[str], say: Callable[[int, int], None], directory: str | None
) -> None:
    """Resync a set that is not mounted, until all replicas are current."""
    options = replace(parse_options([], len(paths)), sidecars=directory)
    replica_set = open_replica_set(paths, None, options)
    replica_set.take_into_use(options)
    disk, repairs = replica_set.make_disk(options, EventLog("", lambda _: None))
    assert repairs is not None
    failure: str | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.run)
        nursery.start_soon(repairs.run)
        with trio.CancelScope() as copying:
            await nursery.start(_cancel_at_signal, copying)
            while failure is None and any(not r.standing.is_member for r in disk.replicas):
                with trio.move_on_after(PROGRESS_S):
                    await repairs.changed.wait()
                if repairs.progress is not None:
                    say(repairs.progress.done_bytes, repairs.progress.total_bytes)
                failure = next((f"{r.path}: {r.reason}" for r in disk.replicas if _failed(r)), None)
        await repairs.stop()
        interrupted = failure is None and any(not r.standing.is_member for r in disk.replicas)
        if interrupted:
            failure = "interrupted"
        try:
            await disk.close()
        except OSError as error:
            failure = failure or f"it could not be made durable: {error.strerror}"
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise UserError(
            "the copy is not complete, the same command goes on, and so does the next mount: "
            f"{failure}",
            exit_code=ExitCode.INTERRUPTED if interrupted else None,
        )


async def _cancel_at_signal(
    copying: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """End the copy when the user, or the system, wants that."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        task_status.started()
        async for _ in signals:
            copying.cancel()
            return


def _failed(replica: Replica) -> bool:
    """Whether a copy to *replica* ended with an error: its files were closed again."""
    return not replica.standing.is_written and not replica.attached
