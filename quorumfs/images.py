"""Opening the replicas' files, and every refusal that can be had before mounting."""

import fcntl
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import Timer

from quorumfs.assembly import Found
from quorumfs.errors import UserError
from quorumfs.filesystems import Locality, is_fuse, locality
from quorumfs.imagelock import ImageLockedError, holders, lock_image
from quorumfs.sidecar import (
    FormatError,
    Identity,
    Sidecar,
    UnknownVersionError,
    identity_of,
    path_for,
)
from quorumfs.sidecarfile import SidecarLockedError, misplaced, open_sidecar, read_sidecar

log = logging.getLogger(__name__)

HANGS_S = 3.0
"""After this long (seconds) it is said which replica is waited for."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True, slots=True)
class Image:
    """One replica's files, open, checked and locked."""

    path: str
    """As the user gave it, made absolute."""
    real_path: str
    """The same without symbolic links, as it was opened: its sidecar is beside it."""
    fd: int
    size: int
    """Bytes."""
    mtime_ns: int
    file: tuple[int, int]
    """Device and inode number: the same for every path to the same file."""
    identity: Identity
    """By which a later mount knows whether it was changed."""
    locality: Locality
    sidecar_fd: int | None = None
    sidecar: Sidecar | None = None
    problem: str | None = None
    """Why its sidecar cannot be read."""

    @property
    def found(self) -> Found:
        """What assembly is to know of it."""
        return Found(self.path, self.identity, self.sidecar, self.problem)

    def close(self) -> None:
        """Give the descriptors back, and with them the locks."""
        os.close(self.fd)
        if self.sidecar_fd is not None:
            os.close(self.sidecar_fd)


def open_images(paths: Sequence[str], mountpoint: str, *, read_only: bool) -> list[Image]:
    """Open, check and lock the files at *paths*, to be all replicas of a disk at *mountpoint*.

    *mountpoint* is absolute and free of symbolic links. Raises `UserError`, naming the path and
    the reason, if the files cannot be a disk's replicas.
    """
    opened = open_set(paths, mountpoint, read_only=read_only, sidecars=False)
    images = []
    for one in opened:
        if isinstance(one, Found):
            for image in opened:
                if isinstance(image, Image):
                    image.close()
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
    paths: Sequence[str], mountpoint: str | None, *, read_only: bool, sidecars: bool = True
) -> list[Image | Found]:
    """Open, check and lock what there is at *paths*; `Found` for a file that cannot be opened.

    The caller owns the images. Raises `UserError` for what can never be a replica: not a regular
    file, an empty one of no set, the same file twice, in use by somebody else, inside *mountpoint*.
    """
    with ExitStack() as stack:
        opened: list[Image | Found] = []
        for path in map(os.path.abspath, paths):
            try:
                with _named_if_it_hangs(path):
                    if mountpoint is not None and _inside(path, mountpoint):
                        raise UserError(f"{path} is inside the mount point {mountpoint}")
                    image = _open(path, read_only=read_only)
            except OSError as error:
                opened.append(Found(path, None, problem=error.strerror))
                continue
            stack.callback(os.close, image.fd)
            for other in opened:
                if isinstance(other, Image) and other.file == image.file:
                    raise UserError(f"{other.path} and {image.path} are the same file")
            opened.append(image)
        for position, one in enumerate(opened):
            if isinstance(one, Image):
                with _named_if_it_hangs(one.path):
                    _lock(one, read_only)
                    image = one
                    if sidecars:
                        image = opened[position] = _with_sidecar(one, stack, read_only=read_only)
                    _refuse_empty(image)
        stack.pop_all()
        return opened


def open_again(path: str, *, read_only: bool = False) -> Image:
    """Open, check and lock one replica that was left behind.

    Raises `UserError` and `OSError` with the reason.
    """
    with ExitStack() as stack:
        image = _open(path, read_only=read_only)
        stack.callback(os.close, image.fd)
        _lock(image, read_only)
        image = _with_sidecar(image, stack, read_only=read_only)
        stack.pop_all()
        return image


@contextmanager
def _named_if_it_hangs(path: str) -> Iterator[None]:
    """Say which replica is waited for: a hung file system does not even refuse."""
    text = "waiting for %s: its file system does not answer (interrupt to give up)"
    timer = Timer(HANGS_S, log.warning, (text, path))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # who goes on may count on being alone


def _inside(path: str, mountpoint: str) -> bool:
    """Whether the mount would hide the file, or the symbolic link by which it is given."""
    link = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    below = mountpoint.rstrip("/") + "/"
    return any(place.startswith(below) for place in (link, os.path.realpath(path)))


def _open(path: str, *, read_only: bool) -> Image:
    given = os.stat(path)
    _require_regular(path, given)
    # Once: a link that is changed later must not part the image from its sidecar.
    real_path = os.path.realpath(path, strict=True)
    # Not blocking: between the look and the opening it may have become a FIFO.
    access = os.O_RDONLY if read_only else os.O_RDWR
    fd = os.open(real_path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        _require_regular(path, status)
        if real_path != path and not os.path.samestat(given, status):
            raise UserError(f"{path} led to another file a moment ago than {real_path}")
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    except BaseException:
        os.close(fd)
        raise
    file = (status.st_dev, status.st_ino)
    size, mtime_ns = status.st_size, status.st_mtime_ns
    return Image(path, real_path, fd, size, mtime_ns, file, lasting_identity(fd), locality(fd))


def lasting_identity(file: int | str) -> Identity:
    """What of an image, open or by its path, outlasts a mount of its file system."""
    identity = identity_of(os.stat(file))
    if is_fuse(file):  # many number their files anew at each mount
        return replace(identity, inode=0, ctime_ns=0)
    return identity


def _with_sidecar(image: Image, stack: ExitStack, *, read_only: bool) -> Image:
    """The same image with its sidecar, if it has one; *stack* gets what is to be closed."""
    place = path_for(image.real_path)
    try:
        fd = open_sidecar(image.real_path, read_only=read_only)
        stray = misplaced(image.path) if fd is None else None
    except SidecarLockedError as error:
        raise UserError(f"{image.path} is in use by {error}") from None
    except OSError as error:
        return replace(image, problem=f"{place}: {error.strerror}")
    if stray is not None:
        raise UserError(stray)
    if fd is None:
        return image
    stack.callback(os.close, fd)
    try:
        return replace(image, sidecar_fd=fd, sidecar=read_sidecar(fd))
    except UnknownVersionError as error:
        raise UserError(f"{place}: {error}; it was left as it is") from None
    except FormatError as error:
        return replace(image, sidecar_fd=fd, problem=str(error))
    except OSError as error:
        return replace(image, sidecar_fd=fd, problem=f"{place}: {error.strerror}")


def _refuse_empty(image: Image) -> None:
    """Refuse what has no size to go by; a member of a set was cut off, and only that one is out."""
    member = image.sidecar_fd is not None or image.problem is not None
    if image.size == 0 and not member:
        raise UserError(f"{image.path} is empty: a replica must have the size of the disk")


def _require_regular(path: str, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        raise UserError(
            f"{path} is {_KINDS.get(kind, 'a special file')}: a replica must be a regular file"
        )


def _lock(image: Image, read_only: bool) -> None:
    try:
        if not lock_image(image.fd, read_only=read_only):
            log.warning(
                "the file system of %s has no OFD locks: nothing keeps others from writing to it",
                image.path,
            )
    except ImageLockedError:
        who = ", ".join(f"pid {pid} ({name})" for pid, name in holders(image.fd))
        raise UserError(
            f"{image.path} is in use by {who or 'a process of another user or host'}"
        ) from None
    except OSError as error:
        raise UserError(f"cannot lock {image.path}: {error.strerror}") from None
