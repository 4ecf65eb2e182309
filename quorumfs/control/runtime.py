"""The runtime directory: how commands find the daemon of a mount point.

Each mount holds a locked file named after its mount point, with the daemon's process id in it.
The lock, not the file, says that the daemon lives: the kernel drops it however the process ends.
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

import xxhash

from quorumfs.control import mounts
from quorumfs.errors import UserError
from quorumfs.ofdlock import could_lock, try_lock


def directories(uid: int) -> list[Path]:
    """Where the runtime directory of user *uid* may be; the first is the one to use now.

    ``/run/quorumfs`` for root; else in the user's own ``/run/user/UID`` while the user is logged
    in; else under ``/tmp``. The environment has no say: who mounts, who unmounts, and root must
    all look in the same place.
    """
    if uid == 0:
        return [Path("/run/quorumfs")]
    session = Path(f"/run/user/{uid}")
    without_session = Path(f"/tmp/quorumfs-{uid}")  # noqa: S108 (checked to be ours before use)
    return [session / "quorumfs", without_session] if session.is_dir() else [without_session]


def path_for(mountpoint: str, suffix: str, home: Path | None = None) -> Path:
    """The file for *mountpoint* (absolute, without symbolic links) in a runtime directory.

    *home* is that directory, by default our own.
    """
    name = xxhash.xxh3_64_hexdigest(os.fsencode(mountpoint))
    return (home or directories(os.geteuid())[0]) / f"{name}.{suffix}"


def claim(mountpoint: str) -> int:
    """Become the daemon of *mountpoint*: the descriptor returned holds the lock while open.

    Raises `UserError` if another daemon has it, or the runtime directory is not safe to use.
    """
    path = path_for(mountpoint, "pid")
    home = path.parent
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        status = home.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise UserError(f"the runtime directory {home} belongs to somebody else")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if not try_lock(descriptor, 0, 0, exclusive=True):
            os.close(descriptor)
            raise UserError(f"{mountpoint} is being mounted by another quorumfs")
    except OSError as error:
        raise UserError(f"cannot use the runtime directory {home}: {error.strerror}") from None
    path_for(mountpoint, "word").unlink(missing_ok=True)  # of an earlier mount, and never heard
    os.truncate(descriptor, 0)
    os.write(descriptor, b"%d\n" % os.getpid())
    return descriptor


def give_up(mountpoint: str, descriptor: int) -> None:
    """End what `claim` began."""
    mounted = mounts.mount_at(mountpoint)
    if mounted is None or mounted.fs_type != mounts.FS_TYPE:  # else it is dead, and stays
        path_for(mountpoint, "where").unlink(missing_ok=True)
    path_for(mountpoint, "pid").unlink(missing_ok=True)
    os.close(descriptor)


def note_log(path: Path, place: str) -> None:
    """Note in words where the log of a mount goes; *path*: the place for it in this directory."""
    with suppress(OSError):  # it only helps a reader
        path.with_suffix(".where").write_text(place, errors="backslashreplace")


def log_of(mountpoint: str, uid: int) -> str:
    """Where to look for what befell the daemon of *mountpoint*, in words for a reader."""
    for home in directories(uid):
        with suppress(OSError):
            place = path_for(mountpoint, "where", home).read_text(errors="replace")
            if place.isprintable():  # the file is the user's, and the terminal may be root's
                return f"its log: {place}"
    return "its log"


def leave_word(mountpoint: str, text: str) -> None:
    """Leave *text* for whoever waits for the daemon of *mountpoint* to end."""
    path_for(mountpoint, "word").write_text(text)


def take_word(mountpoint: str, uid: int) -> str | None:
    """What the daemon of *mountpoint* left, once; None if it ended well."""
    for home in directories(uid):
        path = path_for(mountpoint, "word", home)
        with suppress(OSError):
            text = path.read_text(errors="replace")
            path.unlink()
            return text
    return None


def daemon_pid(mountpoint: str, uid: int) -> int | None:
    """The process id of the daemon that serves *mountpoint* for user *uid*, if it lives."""
    for home in directories(uid):
        with suppress(OSError):
            descriptor = os.open(path_for(mountpoint, "pid", home), os.O_RDONLY)
            try:
                if could_lock(descriptor, 0, 0, exclusive=False):
                    continue  # left by a daemon that died
                pid = int(os.read(descriptor, 32) or b"0")
            finally:
                os.close(descriptor)
            # The file is the user's: it must not make root wait for somebody else's process.
            if pid and os.stat(f"/proc/{pid}").st_uid == uid:
                return pid
    return None
