"""What an administrator does to a set that is not mounted: create it, decide what to keep."""

import errno
import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from enum import Enum

import trio

from quorumfs.decisions.assembly import AssemblyRefusedError, assemble, new_record, refuse_too_many
from quorumfs.decisions.claim import Tenure
from quorumfs.decisions.model import Found, Standing
from quorumfs.decisions.record import Identity, Record, RoleState, Sidecar
from quorumfs.decisions.resolution import (
    Resolution,
    first_sidecar,
    record_of_copies,
    resolve,
)
from quorumfs.decisions.sameimage import image_changed
from quorumfs.decisions.sectors import unreachable, whole
from quorumfs.disk.events import EventLog
from quorumfs.errors import ExitCode, UsageError, UserError
from quorumfs.mount.limits import require_file_size
from quorumfs.mount.replicaset import open_replica_set
from quorumfs.options import parse_options
from quorumfs.replica.blockdevice import clear
from quorumfs.replica.claimant import claim_of_this_mount
from quorumfs.replica.claiming import (
    RESOLVE,
    claim_all,
    found_claims,
    look_again,
    refuse_claimed,
    release_all,
    require_free,
    wait_until_noticed,
)
from quorumfs.replica.devices import content_identity, files_of, is_device, size_at
from quorumfs.replica.filesystems import close
from quorumfs.replica.images import Image, close_all, open_device, open_set
from quorumfs.replica.newimages import PRIVATE, make_image, remove, require_blank
from quorumfs.replica.places import place_for
from quorumfs.replica.replica import Replica
from quorumfs.replica.sidecarfile import replace_sidecar

PROGRESS_S = 0.5
"""How often a copy says how far it is."""


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
    places = _places(names, directory)
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
                    _refuse_to_create(path, size)
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
            _write(path, sidecar, places[path])
        undo.pop_all()


def _places(names: Sequence[str], directory: str | None) -> dict[str, str]:
    """Where the sidecars of the replicas at *names* are, or are to be; *directory* has those of
    devices. Raises `UserError`, also if another mount has one of them open.
    """
    places = {}
    for path in names:
        try:
            places[path] = place_for(path, directory)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if is_device(path) and not os.path.isdir(os.path.dirname(places[path])):
            raise UserError(f"option --sidecars: {directory} is no directory")
        refuse_claimed(path, places[path])
    return places


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


def _refuse_to_create(path: str, size: int) -> None:
    """Raise `OSError` if no new image of *size* bytes can be made at *path*; change nothing."""
    directory = os.path.dirname(path)
    if os.path.lexists(path):
        require_blank(path, size)
    elif not os.path.isdir(directory):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    elif not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


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
    with _opened(names, directory) as found:
        if len(found) < len(names) or all(image.sidecar for image in found):
            return False
        return all(
            _untouched(image.sidecar, names, size)
            and not image_changed(image.found)
            and image.sidecar.map.is_all(0)
            and all(role.state is RoleState.CURRENT for role in image.sidecar.record.roles)
            for image in found
            if image.sidecar
        )


def _untouched(sidecar: Sidecar, names: Sequence[str], size: int) -> bool:
    """Whether *sidecar* is as it was made, by a command that was given the images *names*."""
    record = sidecar.record
    same = [role.path for role in record.roles] == list(names) and record.size == size
    return same and record.sequence == 1 and record.clean and sidecar.prepared is None


@contextmanager
def _opened(
    names: Sequence[str], directory: str | None, *, read_only: bool = True
) -> Iterator[list[Image]]:
    """What there is of *names*, to be looked at, or written to. Raises `UserError`, also if it is
    in use."""
    with ExitStack() as stack:
        opened = open_set(names, None, read_only=read_only, directory=directory)
        images = [one for one in opened if isinstance(one, Image)]
        for image in images:
            stack.callback(image.close)
        yield images


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
    places = _places(names, directory)
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
    with _opened(made, directory) as images:
        source = next((image for image in images if image.path == names[0]), None)
        own = None if source is None else source.sidecar
        others = [image for image in images if image is not source]
        if own is None or any(image.problem for image in images):
            return None
        if len(images) < len(names) or any(image.sidecar is None for image in others):
            begun = (
                _untouched(own, names, own.record.size)
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
                command = f"truncate -s {whole(size)} {shlex.quote(source)}"
                raise UserError(f"{source}: {why}; make it longer first: {command}")
            require_file_size(size, "the copies")
            written = [path for path in paths if _is_overwritten(path, size)]
            keep(source, [source, *written], directory=directory, dry_run=True)
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
    with _opened(names[:1], directory, read_only=False) as images:
        source = _all_of(names[:1], images)[0]
        if source.sidecar is not None:
            return source.sidecar.record
        record = record_of_copies(names, 0, source.size, threshold)
        place = source.found.sidecar_place
        undo.callback(remove, place)
        _write(source.path, first_sidecar(record, 0, source.identity), place)
        return record


def _record_copies(
    names: Sequence[str], record: Record, directory: str | None, undo: ExitStack
) -> None:
    """Have on record at each of *names* what *record* says of them, where nothing is yet; *undo*
    removes it. Raises `UserError`."""
    with _opened(names, directory, read_only=False) as images:
        for image in _all_of(names, images):
            if image.sidecar is None:
                slot, place = names.index(image.path), image.found.sidecar_place
                undo.callback(remove, place)
                _write(image.path, first_sidecar(record, slot, image.identity), place)


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
        _refuse_to_create(path, size)
    except FileExistsError:
        if os.path.exists(path) and os.stat(path).st_nlink > 1:
            raise UserError(_has_other_names(path)) from None
        return True
    return False


def _has_other_names(path: str) -> str:
    return f"{path} has other names, and may be a member of a set by one"


def keep(
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
                    _write(path, sidecar, place)
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
        refusal = UserError(
            "the copy is not complete, the same command goes on, and so does the next mount: "
            f"{failure}"
        )
        if interrupted:
            refusal.exit_code = ExitCode.INTERRUPTED
        raise refusal


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


def _write(path: str, sidecar: Sidecar, place: str) -> None:
    try:
        replace_sidecar(path, sidecar, place)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror}") from None
