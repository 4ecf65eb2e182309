"""Opening the replicas' files, and every refusal that is possible before mounting."""

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

from quorumfs.decisions.claim import Claim, FoundClaim, claim_state
from quorumfs.decisions.model import Found
from quorumfs.decisions.record import UNKNOWN_IDENTITY, Identity, Sidecar, identity_of, path_for
from quorumfs.decisions.replicaio import Way
from quorumfs.decisions.sidecar import FormatError, UnknownVersionError
from quorumfs.errors import UserError
from quorumfs.replica.answers import PATIENCE_S, Answer, UnansweredError, ask_all
from quorumfs.replica.claimant import runs
from quorumfs.replica.devices import (
    Device,
    backing_of,
    content_identity,
    device_of,
    files_of,
    locality_of_device,
    loop_in_use_over,
    who_has,
)
from quorumfs.replica.directfile import Direct
from quorumfs.replica.directopening import open_direct
from quorumfs.replica.filesystems import Locality, close, is_fuse, locality, mount_instance
from quorumfs.replica.imagelock import ImageLockedError, holders, is_locked, lock_image
from quorumfs.replica.places import place_of_device, refuse_sidecar, require_directory
from quorumfs.replica.sidecarfile import (
    SidecarLockedError,
    file_of,
    is_copied,
    misplaced,
    open_sidecar,
    read_claim,
    read_sidecar,
)

log = logging.getLogger(__name__)

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
}


@dataclass(frozen=True, slots=True)
class Image:
    """One replica's files, open, checked and locked."""

    path: str
    """The path that the user gave, made absolute."""
    real_path: str
    """The path without symbolic links, as opened."""
    fd: int
    size: int
    """Bytes."""
    mtime_ns: int
    files: tuple[tuple[int, int], ...]
    """As of `files_of`."""
    identity: Identity
    """Tells a later mount whether the image was changed."""
    locality: Locality
    sidecar_fd: int | None = None
    sidecar: Sidecar | None = None
    sidecar_locality: Locality = Locality.ELSEWHERE
    """Differs from `locality` where the image is a mount point itself."""
    claim: Claim | None = None
    """The claim of the mount that had the set open last, from the sidecar."""
    problem: str | None = None
    """Why the sidecar cannot be read."""
    instance: int | None = None
    """As in `Found`."""
    recorded_ns: int = 0
    """As in `Found`."""
    copied: bool = False
    """As in `Found`."""
    direct: Direct | None = None
    """What it takes to read and write the image past the page cache; None: through it."""
    place: str = ""
    """Where its sidecar is, or should be; empty for a device without one."""
    device: Device | None = None
    """None: it is a regular file."""

    @property
    def found(self) -> Found:
        """The facts that assembly decides on."""
        return Found(
            self.path,
            self.identity,
            self.sidecar,
            self.problem,
            self.instance,
            self.place,
            self.device is not None,
            self.recorded_ns,
            self.copied,
        )

    def found_claim(self, here: Claim) -> FoundClaim | None:
        """The claim in the sidecar, for a mount that claims *here*; None if there is none."""
        if self.claim is None or self.sidecar_fd is None:
            return None
        local = self.sidecar_locality is not Locality.ELSEWHERE
        locked = file_of(self.sidecar_fd) if local else None
        return FoundClaim(self.path, self.claim, claim_state(self.claim, here, runs, locked))

    def close(self) -> None:
        """Close the descriptors, and so drop the locks; may hang."""
        if self.direct is not None:
            close(self.direct.fd, self.path)
        close(self.fd, self.path)
        if self.sidecar_fd is not None:
            close(self.sidecar_fd, self.place)


@dataclass(frozen=True, slots=True)
class Unanswered(Found):
    """A replica whose file system did not answer in time."""

    opening: Answer[Any] | None = None
    """The attempt, which goes on; when it has ended, its files are closed."""


def open_images(
    paths: Sequence[str],
    mountpoint: str,
    *,
    read_only: bool,
    replica_io: str = Way.BUFFERED.value,
    patience_s: float = PATIENCE_S,
    directory: str | None = None,
) -> list[Image]:
    """Open, check and lock the files at *paths*, to be all replicas of a disk at *mountpoint*.

    *mountpoint* is absolute and free of symbolic links; *directory* as for `open_set`. Raises
    `UserError`, naming the path and the reason, if the files cannot be a disk's replicas.
    """
    opened = open_set(
        paths,
        mountpoint,
        read_only=read_only,
        sidecars=False,
        replica_io=replica_io,
        patience_s=patience_s,
        directory=directory,
    )
    images = []
    for one in opened:
        if isinstance(one, Found):
            close_all(opened, patience_s)
            raise UserError(f"cannot open the replica {one.path}: {one.problem}")
        images.append(one)
    for image in images[1:]:
        if image.size != images[0].size:
            raise UserError(
                f"replicas differ in size: {images[0].path} has {images[0].size} bytes, "
                f"{image.path} has {image.size}"
            )
    return images


def open_set(
    paths: Sequence[str],
    mountpoint: str | None,
    *,
    read_only: bool,
    sidecars: bool = True,
    replica_io: str = Way.BUFFERED.value,
    patience_s: float = PATIENCE_S,
    directory: str | None = None,
) -> list[Image | Found]:
    """Open, check and lock the files at *paths*; `Found` for a file that cannot be opened.

    All are given up together after *patience_s* seconds. The caller owns the images. Raises
    `UserError` for a path that can never be a replica: no regular file or block device, an empty
    file of no set, the same file twice, a file in use by another process, or inside *mountpoint*.
    Without *sidecars* no sidecar is opened, and an image that has a sidecar is refused for writing.
    *replica_io* is the value of that option; a store that refuses it is refused, too. The sidecars
    of devices are in *directory*; a device is refused where that is not given.
    """
    absolute = list(map(os.path.abspath, paths))
    files = _Files(absolute)

    def open_one(path: str) -> Image:
        if mountpoint is not None and inside(path, mountpoint):
            raise UserError(f"{path} is inside the mount point {mountpoint}")
        image = _open_whole(path, files.take, directory, read_only=read_only, sidecars=sidecars)
        try:
            _refuse_empty(image)
            if mountpoint is not None and image.place and inside(image.place, mountpoint):
                raise UserError(f"{image.place} is inside the mount point {mountpoint}")
            return _with_io(image, replica_io)
        except BaseException:
            image.close()
            raise

    if len(set(absolute)) < len(absolute):
        twice = next(path for path in absolute if absolute.count(path) > 1)
        raise UserError(f"{twice} and {twice} are the same file")
    answers = ask_all({path: partial(open_one, path) for path in absolute}, patience_s, Image.close)
    opened: list[Image | Found] = []
    refusals: list[UserError] = []
    for path, answer in zip(absolute, answers, strict=True):
        try:
            opened.append(answer.result())
        except UnansweredError as error:
            opened.append(Unanswered(path, None, problem=error.strerror, opening=answer))
        except OSError as error:
            opened.append(Found(path, None, problem=error.strerror))
        except UserError as error:
            refusals.append(error)
    if refusals:
        close_all(opened, patience_s)
        raise min(refusals, key=lambda refusal: not isinstance(refusal, _SameFileError))
    return opened


def close_all(opened: Sequence[Image | Found], patience_s: float = PATIENCE_S) -> None:
    """Close all images; those that do not answer for *patience_s* seconds are closed later."""
    ask_all({one.path: one.close for one in opened if isinstance(one, Image)}, patience_s)


class _SameFileError(UserError):
    """Two paths lead to one file."""


class _Files:
    """The file of each path, noted by threads before they lock it: two locks exclude each other."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths
        self._lock = Lock()
        self._taken: dict[tuple[int, int], str] = {}

    def take(self, image: Image) -> None:
        """Note the file of *image*; raises `UserError` if another path led to it."""
        with self._lock:
            others = [self._taken.setdefault(file, image.path) for file in image.files]
        for other in others:
            if other != image.path:
                first, second = sorted((other, image.path), key=self._paths.index)
                raise _SameFileError(f"{first} and {second} are the same file")


def open_again(
    path: str,
    directory: str | None = None,
    *,
    read_only: bool = False,
    replica_io: str = Way.BUFFERED.value,
) -> Image:
    """Open, check and lock one replica that was ejected; *directory* and *replica_io* as for
    `open_set`.

    Raises `UserError` and `OSError` with the reason.
    """
    image = _open_whole(path, lambda _: None, directory, read_only=read_only)
    try:
        return _with_io(image, replica_io)
    except BaseException:
        image.close()
        raise


def _with_io(image: Image, replica_io: str) -> Image:
    """*image* with what it takes to read and write it as *replica_io* asks."""
    if image.device is not None:
        if replica_io == Way.DIRECT.value:
            raise UserError(
                f"option replica-io: got direct, but {image.path} is a block device, which is read "
                "and written through the page cache: allowed are buffered, and auto"
            )
        return image
    direct = open_direct(image.fd, image.path, replica_io, image.locality)
    return replace(image, direct=direct)


def _open_whole(
    path: str,
    before_locking: Callable[[Image], None],
    directory: str | None,
    *,
    read_only: bool,
    sidecars: bool = True,
) -> Image:
    with ExitStack() as stack:
        image = _open(path, directory, read_only=read_only, sidecars=sidecars)
        stack.callback(close, image.fd, path)
        before_locking(image)
        if image.device is not None:
            _claim(image, read_only)
        _lock(image, read_only)
        if sidecars:
            image = _with_sidecar(image, stack, read_only=read_only)
        elif not read_only:
            _refuse_member(image)
        stack.pop_all()
        return image


def open_device(path: str, size: int) -> Image:
    """Open the block device at *path*, to be overwritten as far as *size* bytes, for ourselves.

    Raises `UserError`, also if the device is shorter, and `OSError`.
    """
    with ExitStack() as stack:
        image = _open(path, None, read_only=False, sidecars=False)
        stack.callback(image.close)
        _claim(image, read_only=False)
        _lock(image, read_only=False)
        backing = backing_of(os.fstat(image.fd).st_rdev)
        if backing is not None and os.path.lexists(path_for(backing)):
            raise UserError(
                f"{path} lies on {backing}, which is a replica of a set ({path_for(backing)}): "
                "take another device, or remove both first"
            )
        if image.size < size:
            raise UserError(
                f"{path} has {image.size} bytes, the disk has {size}: make it as long first (with "
                "lvextend or the like), or take a larger one"
            )
        stack.pop_all()
        return image


def inside(path: str, mountpoint: str) -> bool:
    """Whether the mount would hide the file at *path*, or *path* itself, a symbolic link."""
    link = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    below = mountpoint.rstrip("/") + "/"
    return any(place.startswith(below) for place in (link, os.path.realpath(path)))


def _open(path: str, directory: str | None, *, read_only: bool, sidecars: bool) -> Image:
    given = os.stat(path)
    _require_usable(path, given)
    refuse_sidecar(path)
    if sidecars and stat.S_ISBLK(given.st_mode):
        require_directory(path, directory)
    # Resolved once: a link that is changed later must not part the image from its sidecar.
    real_path = os.path.realpath(path, strict=True)
    # Not blocking: the file may have become a FIFO since the stat.
    access = os.O_RDONLY if read_only else os.O_RDWR
    fd = os.open(real_path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        _require_usable(path, status)
        if real_path != path and not os.path.samestat(given, status):
            raise UserError(f"{path} led to another file a moment ago than {real_path}")
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        device = None
        if stat.S_ISBLK(status.st_mode):
            device = device_of(fd)
            place = "" if directory is None else place_of_device(path, device, directory)
            identity, where = content_identity(fd, device), locality_of_device(status.st_rdev)
        else:
            place = path_for(real_path)
            identity, where = lasting_identity(fd), locality(fd)
        files = files_of(fd)
    except BaseException:
        close(fd, path)
        raise
    return Image(
        path,
        real_path,
        fd,
        identity.size,
        status.st_mtime_ns,
        files,
        identity,
        where,
        place=place,
        device=device,
    )


def identity_now(image: Image) -> Identity:
    """The identity of *image* as it is now; that of a device as its sidecar has it on record."""
    if image.device is None:
        return lasting_identity(image.fd)
    known = image.sidecar.identity if image.sidecar else UNKNOWN_IDENTITY
    return content_identity(image.fd, image.device, known.size or None, known.regions)


def lasting_identity(file: int | str) -> Identity:
    """The identity of an image, open or by path, as far as it outlasts a mount of its store."""
    identity = identity_of(os.stat(file))
    if is_fuse(file):  # many FUSE file systems number files anew at each mount
        return replace(identity, inode=0, ctime_ns=0)
    return identity


def passing_identity(image: int | str, sidecar: int | str) -> int | None:
    """The `mount_instance` of an image whose sidecar cannot vouch for it; else None.

    *image* and *sidecar* are open, or paths. A sidecar can vouch for an image on the same file
    system, with lasting inode numbers.
    """
    apart = os.stat(image).st_dev != os.stat(sidecar).st_dev
    return mount_instance(image) if apart or is_fuse(image) else None


def _with_sidecar(image: Image, stack: ExitStack, *, read_only: bool) -> Image:
    """*image* with its sidecar, if there is one; *stack* gets the descriptor to close."""
    place = image.place
    if image.device is not None and not os.path.isdir(os.path.dirname(place)):
        raise UserError(f"{os.path.dirname(place)}, for the sidecar of {image.path}, is not there")
    try:
        fd = open_sidecar(place, read_only=read_only)
        stray = misplaced(image.path) if fd is None and image.device is None else None
    except SidecarLockedError as error:
        raise UserError(f"{image.path} is in use by {error}") from None
    except OSError as error:
        return replace(image, problem=f"{place}: {error.strerror}")
    if stray is not None:
        raise UserError(stray)
    if fd is None:
        return image
    stack.callback(close, fd, place)
    image = replace(image, sidecar_fd=fd, sidecar_locality=locality(fd))
    passing = passing_identity(image.fd, fd) if image.device is None else image.device.attachment
    image = replace(image, instance=passing, recorded_ns=os.fstat(fd).st_mtime_ns)
    try:
        image = replace(image, claim=read_claim(fd))
        image = replace(image, copied=passing is not None and is_copied(fd, image.claim))
        image = replace(image, sidecar=read_sidecar(fd))
        return image if image.device is None else replace(image, identity=identity_now(image))
    except UnknownVersionError as error:
        raise UserError(f"{place}: {error}; it was left as it is") from None
    except FormatError as error:
        return replace(image, problem=str(error))
    except OSError as error:
        # The sidecar is unknown: the replica is away, and looked at again, as without its image.
        raise OSError(error.errno, f"{place}: {error.strerror}") from None


def _refuse_member(image: Image) -> None:
    """Refuse an image that has a sidecar, if the mount would write without it."""
    place = image.place
    if image.device is not None and (backing := backing_of(os.fstat(image.fd).st_rdev)):
        place = path_for(backing)
    if place and os.path.lexists(place):
        raise UserError(
            f"{image.path} is a member of a set ({place}): without its metadata it would "
            "silently become different from the others"
        )
    if image.device is None and (stray := misplaced(image.path)) is not None:
        raise UserError(stray)


def _refuse_empty(image: Image) -> None:
    """Refuse an empty image of no set; an empty image of a set was truncated, and is ejected."""
    member = image.sidecar_fd is not None or image.problem is not None
    if image.size == 0 and not member:
        raise UserError(f"{image.path} is empty: a replica must have the size of the disk")


def _require_usable(path: str, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        raise UserError(
            f"{path} is {_KINDS.get(kind, 'a special file')}: a replica must be a regular file, or "
            "a block device"
        )


def _claim(image: Image, read_only: bool) -> None:
    """Have the device *image*, which is open, for ourselves: no file system, and no other program
    that asks for that, has it or gets it. Raises `UserError`.
    """
    access = os.O_RDONLY if read_only else os.O_RDWR
    try:
        fd = os.open(image.real_path, access | os.O_CLOEXEC | os.O_EXCL)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise UserError(f"{image.path} is in use: {_who(image)}") from None
    try:
        if os.fstat(fd).st_rdev != image.files[0][1]:
            raise UserError(f"{image.path} led to another device a moment ago")
        os.dup2(fd, image.fd, inheritable=False)
    finally:
        os.close(fd)


def _who(image: Image) -> str:
    """Who has the device *image* for himself, in words."""
    if (told := who_has(image.files[0][1])) is not None:
        return told
    others = ", ".join(f"pid {pid} ({name})" for pid, name in holders(image.fd))
    return f"by {others}" if others else "by a part of it, or a program, which has it for itself"


def _lock(image: Image, read_only: bool) -> None:
    try:
        if not lock_image(image.fd, read_only=read_only):
            log.warning(
                "the file system of %s has no OFD locks: nothing keeps others from writing to it",
                image.path,
            )
    except ImageLockedError:
        who = ", ".join(f"pid {pid} ({name})" for pid, name in holders(image.fd))
        unseen = (
            "a process of another user or host, or one that cannot end before the file system of "
            "the image answers it: to go on without this replica, leave it out"
        )
        raise UserError(f"{image.path} is in use by {who or unseen}") from None
    except OSError as error:
        raise UserError(f"cannot lock {image.path}: {error.strerror}") from None
    if image.device is None and (loop := loop_in_use_over(image.fd, image.real_path)) is not None:
        raise UserError(f"{image.path} is in use: {loop} lies on it, and is in use")
    if any(is_locked(behind, read_only=read_only) for behind in image.files[1:]):
        backing = backing_of(os.fstat(image.fd).st_rdev)
        raise UserError(f"{image.path} lies on {backing}, which is in use, as a replica or else")
