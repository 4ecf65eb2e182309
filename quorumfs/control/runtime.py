"""The runtime directory: how commands find the daemon of a mount point.

Each mount holds a locked file named after its mount point, with the daemon's process id in it.
The lock, not the file, says that the daemon lives: the kernel drops it however the process ends.
"""

import fcntl
import os
import stat
from pathlib import Path

import xxhash

from quorumfs.errors import UserError


def directory(uid: int | None = None) -> Path:
    """The runtime directory of user *uid* (default: one's own); it need not exist.

    ``/run/quorumfs`` for root; else ``$XDG_RUNTIME_DIR/quorumfs``, in its usual place for
    another user; else one under ``/tmp`` that only its owner can use.
    """
    own = os.geteuid()
    if uid is None:
        uid = own
    if uid == 0:
        return Path("/run/quorumfs")
    base = os.environ.get("XDG_RUNTIME_DIR") if uid == own else f"/run/user/{uid}"
    if base and os.path.isdir(base):
        return Path(base, "quorumfs")
    return Path(f"/tmp/quorumfs-{uid}")  # noqa: S108 (checked to be ours before use)


def path_for(mountpoint: str, suffix: str, uid: int | None = None) -> Path:
    """The file for *mountpoint* (absolute, without symbolic links) in the runtime directory."""
    name = xxhash.xxh3_64_hexdigest(os.fsencode(mountpoint))
    return directory(uid) / f"{name}.{suffix}"


def claim(mountpoint: str) -> int:
    """Become the daemon of *mountpoint*: the descriptor returned holds the lock while open.

    Raises `UserError` if another daemon has it, or the runtime directory is not safe to use.
    """
    home = directory()
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise UserError(f"the runtime directory {home} belongs to somebody else")
        descriptor = os.open(path_for(mountpoint, "pid"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UserError(f"cannot use the runtime directory {home}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"{mountpoint} is already served by quorumfs, pid {daemon_pid(mountpoint)}"
        ) from None
    os.truncate(descriptor, 0)
    os.write(descriptor, b"%d\n" % os.getpid())
    return descriptor


def give_up(mountpoint: str, descriptor: int) -> None:
    """End what `claim` began."""
    path_for(mountpoint, "pid").unlink(missing_ok=True)
    os.close(descriptor)


def daemon_pid(mountpoint: str, uid: int | None = None) -> int | None:
    """The process id of the daemon that serves *mountpoint* for user *uid*, if it lives."""
    try:
        descriptor = os.open(path_for(mountpoint, "pid", uid), os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(descriptor, 32) or b"0") or None
    else:
        return None
    finally:
        os.close(descriptor)
