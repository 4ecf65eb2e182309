"""The sidecar as a file: found beside an image, locked, read, created."""

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from glob import escape, glob

from quorumfs.decisions.claim import Claim, decode_claim, encode_claim
from quorumfs.decisions.record import SUFFIX, Sidecar, path_for
from quorumfs.decisions.sidecar import CLAIM_OFFSET, PAGE, decode, encode
from quorumfs.replica.filesystems import Locality, close, is_fuse, locality
from quorumfs.replica.ofdlock import try_lock

_FS_IOC_GETVERSION = 0x80087601  # linux/fs.h


class SidecarLockedError(Exception):
    """Another quorumfs, named in the message, has this replica in use."""


def open_sidecar(path: str, *, read_only: bool) -> int | None:
    """Open and lock the sidecar at *path*; None if there is none.

    The descriptor returned holds the lock: exclusive, or shared if *read_only*. Raises
    `SidecarLockedError`, and `OSError` if the sidecar cannot be opened.
    """
    access = os.O_RDONLY if read_only else os.O_RDWR
    try:
        fd = open_regular(path, access)
    except FileNotFoundError:
        if os.path.islink(path):  # then there is a sidecar, and its store is away
            raise OSError(errno.ENOENT, "a symbolic link to nothing") from None
        return None
    try:
        lock(fd, read_only=read_only)
    except BaseException:
        close(fd, path)
        raise
    return fd


def open_regular(path: str, access: int) -> int:
    """Open *path*, if it is a regular file; opening anything else may have effects, or never end.

    Raises `OSError`.
    """
    _require_regular(os.stat(path))
    # Not blocking: the file may have become a FIFO since the stat.
    fd = os.open(path, access | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _require_regular(os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def misplaced(given: str) -> str | None:
    """Why the image at the path *given*, with no sidecar beside it, may have one; else None.

    Earlier versions looked for the sidecar beside the path given, perhaps a symbolic link. Raises
    `OSError`.
    """
    place, stray = path_for(given), given + SUFFIX
    try:
        if place == stray or not stat.S_ISREG(os.stat(stray).st_mode):
            return None
    except FileNotFoundError:
        return None
    return (
        f"{stray} lies beside a symbolic link, and belongs beside the image: if it is of this "
        f"image, move it to {place}, else remove it"
    )


def lock(fd: int, *, read_only: bool) -> None:
    """Take the lock on the whole sidecar open at *fd*, where the file system has such locks."""
    try:
        granted = try_lock(fd, 0, 0, exclusive=not read_only)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL, errno.ENOSYS):
            return
        raise
    if not granted:
        raise SidecarLockedError(holder(fd) or "another quorumfs")


def read_sidecar(fd: int) -> Sidecar:
    """Read and decode the sidecar open at *fd*.

    Raises `quorumfs.decisions.sidecar.FormatError`, and `OSError` if the file cannot be read.
    """
    return decode(partial(_read, fd))


def _read(fd: int, offset: int, length: int) -> bytes:
    """*length* bytes from *offset* on, or as many as there are."""
    content = bytearray()
    while len(content) < length:
        piece = os.pread(fd, length - len(content), offset + len(content))
        if not piece:
            break
        content += piece
    return bytes(content)


def _write(fd: int, offset: int, content: bytes) -> None:
    """Write all of *content* from *offset* on."""
    written = 0
    while written < len(content):
        written += os.pwrite(fd, content[written:], offset + written)


def create_sidecar(
    image_path: str, sidecar: Sidecar, claim: Claim | None = None, place: str = ""
) -> None:
    """Write the first sidecar of an image, so that a crash leaves the whole sidecar or none.

    *place*: its path; empty: beside the image. The sidecar carries *claim*, if given, from its
    first moment on. Raises `OSError`, as `FileExistsError` if there is a sidecar by now: a mount of
    another host, whose locks are not seen here, may have come between.
    """
    path = os.path.realpath(place or path_for(image_path))
    with _written_beside(path, image_path, sidecar, claim) as temporary:
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if os.path.lexists(path):  # without hard links there is a moment between
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
            os.rename(temporary, path)


def replace_sidecar(image_path: str, sidecar: Sidecar, place: str = "") -> None:
    """Write a whole sidecar, so that a crash leaves the new sidecar or the old one.

    *place*: its path; empty: beside the image. The caller alone has the image open. Raises
    `OSError`.
    """
    # A sidecar that is a link remains one.
    path = os.path.realpath(place or path_for(image_path))
    with _written_beside(path, image_path, sidecar, None) as temporary:
        os.replace(temporary, path)


@contextmanager
def _written_beside(
    path: str, image_path: str, sidecar: Sidecar, claim: Claim | None
) -> Iterator[str]:
    """Write a sidecar for *path* under another name, which the caller then renames or links.

    Both the file and, afterwards, the directory are synced. Exactly the users of the image may read
    and write its sidecar, whatever the umask. The other name is random, so that an adoption by two
    hosts at once does not mistake one file for the other.
    """
    image = os.stat(image_path)
    ours = f"{escape(path)}.{8 * '[0-9a-f]'}.tmp"
    for left in (f"{path}.tmp", *glob(ours)):  # left by a kill, also of an earlier version
        with suppress(FileNotFoundError):
            os.unlink(left)
    temporary = f"{path}.{os.urandom(4).hex()}.tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            _share(fd, image)
            for offset, piece in encode(sidecar):
                _write(fd, offset, piece)
            if claim is not None:
                sign(fd, claim)
            os.fsync(fd)
        finally:
            close(fd, path)
        yield temporary
    finally:
        with suppress(OSError):  # after a rename there is no such file
            os.unlink(temporary)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some file systems cannot sync a directory
            os.fsync(directory)
    finally:
        close(directory, os.path.dirname(path))


def _share(fd: int, image: os.stat_result) -> None:
    """Give the file *fd* the owner and mode of *image*, as far as the file system can."""
    for uid, gid in ((image.st_uid, -1), (-1, image.st_gid)):
        with suppress(OSError):  # only root gives files away, except to the caller's own groups
            os.fchown(fd, uid, gid)
    mode = image.st_mode & 0o666
    if os.fstat(fd).st_gid != image.st_gid:  # a group other than the image's gets others' rights
        mode = mode & 0o606 | (mode & 0o006) << 3
    with suppress(OSError):
        os.fchmod(fd, mode)


def holder(fd: int) -> str:
    """The process and host that claim the set, in words; empty if none does.

    Earlier versions left a text, and did not take it back.
    """
    page = os.pread(fd, PAGE, CLAIM_OFFSET)
    claim = decode_claim(page)
    if claim is not None:
        return "" if claim.released else str(claim)
    return page.split(b"\0", 1)[0].decode(errors="replace").strip()


def read_claim(fd: int) -> Claim | None:
    """The claim in the sidecar open at *fd*, read past the cache if remote; None if there is none.

    Raises `OSError`.
    """
    if locality(fd) is Locality.ELSEWHERE:
        os.posix_fadvise(fd, CLAIM_OFFSET, PAGE, os.POSIX_FADV_DONTNEED)
    return decode_claim(os.pread(fd, PAGE, CLAIM_OFFSET))


def sign(fd: int, claim: Claim) -> None:
    """Write *claim* durably to the sidecar open at *fd*, for other hosts. Raises `OSError`."""
    page = encode_claim(replace(claim, file=file_of(fd), turn=turn_of(fd)))
    if os.pwrite(fd, page, CLAIM_OFFSET) < PAGE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fdatasync(fd)


def file_of(fd: int) -> tuple[int, int]:
    """Device and inode number of an open file."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def turn_of(fd: int) -> int:
    """Which of the files that had its inode number an open file is; 0: the file system does not
    tell."""
    try:
        answer = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(8))
    except OSError:
        return 0
    return int.from_bytes(answer[:4], "little")


def is_copied(fd: int, claim: Claim | None) -> bool:
    """Whether the sidecar open at *fd* is another file than the one of its *claim*, as far as
    known."""
    if claim is None or not claim.file[1] or is_fuse(fd):
        return False
    turn = turn_of(fd)  # a client of NFS is not told what the server's own mounts are
    known = turn != 0 and claim.turn != 0
    return os.fstat(fd).st_ino != claim.file[1] or (known and turn != claim.turn)
