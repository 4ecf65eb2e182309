"""The kernel's table of mounts, and the commands that change it."""

import ctypes
import errno
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quorumfs.errors import UserError

SUBTYPE = "quorumfs"
FS_TYPE = f"fuse.{SUBTYPE}"

MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8  # <sys/mount.h>

PAUSE_S = 0.5
"""How often who waits for a mount to go may do something else."""

LOOK_S = 2.0
"""How long to look at what others may make take for ever: their mounts and their processes."""


class BusyError(UserError):
    """Somebody uses what is to be unmounted."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table."""

    mountpoint: str
    fs_type: str
    owner: int
    """User id of who mounted a FUSE file system; 0 for others."""
    device: str = ""
    """Major and minor number of the file system, which a bind mount shows once more."""
    source: str = ""
    """What was mounted, as the table names it."""


def table() -> Iterator[Mount]:
    """All mounts, in the order mounted. Their names are anybody's: any bytes but NUL.

    Asks the table only, never the mounted file systems: one may be dead or hung.
    """
    return (mount for _, _, mount in _table())


def mount_at(mountpoint: str) -> Mount | None:
    """The topmost mount at *mountpoint* (absolute, without symbolic links), if there is one."""
    at = os.fsencode(mountpoint)
    found = [mount for _, place, mount in _table() if place == at]
    return found[-1] if found else None


def is_ours(mountpoint: str) -> bool:
    """Whether there is a quorumfs mount at *mountpoint* (as for `mount_at`), dead or alive."""
    mount = mount_at(mountpoint)
    return mount is not None and mount.fs_type == FS_TYPE


def of_quorumfs() -> list[Mount]:
    """All quorumfs mounts that can be reached, dead ones included, in the order mounted.

    Of several places that show the same one, the first.
    """
    topmost = {place: mount for _, place, mount in _table()}
    ours = [mount for mount in topmost.values() if mount.fs_type == FS_TYPE]
    first: dict[str, Mount] = {}
    for mount in ours:
        first.setdefault(mount.device or mount.mountpoint, mount)
    return list(first.values())


def first_of(mount: Mount) -> Mount:
    """Where the file system of *mount*, a quorumfs, was mounted first, if that is there still."""
    same = (one for one in of_quorumfs() if one.device == mount.device)
    return next(same, mount)


def store_of(path: str) -> str | None:
    """Where the file system is mounted that *path* (absolute, without symbolic links) is on.

    None for that of the whole system, which nobody unmounts.
    """
    places = {mount.mountpoint for mount in table()} - {"/"}
    above = [place for place in places if path == place or path.startswith(f"{place}/")]
    return max(above, key=len, default=None)


def fs_type_of(mount_id: int) -> str | None:
    """The type of file system of the mount with this number; None if there is none."""
    return next((mount.fs_type for number, _, mount in _table() if number == mount_id), None)


def _table(pid: str = "self") -> Iterator[tuple[int, bytes, Mount]]:
    """Each line of the table that the process *pid* sees: number, mount point, and the rest."""
    for line in Path(f"/proc/{pid}/mountinfo").read_bytes().rstrip(b"\n").split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        # At single spaces: the source may be empty, and other white space is part of a path.
        number, _, device, _, path, *_ = fields.split(b" ")
        place = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), path)
        kind, source, options = rest.split(b" ")[:3]
        owner = re.search(rb"(?:^|,)user_id=(\d+)", options)
        fs_type = kind.decode("ascii", "backslashreplace")
        uid = int(owner[1]) if owner else 0
        mounted = Mount(
            os.fsdecode(place), fs_type, uid, device.decode("ascii"), os.fsdecode(source)
        )
        yield int(number), place, mounted


def shown_by(mounted: Mount) -> tuple[str, list[int]]:
    """Where the file system of *mounted* is mounted now: the first place seen, and processes whose
    namespace of mounts has one, each of another; ours, if it has one, is the first. Empty if it is
    nowhere.

    As many namespaces are looked at as `LOOK_S` is enough for; an ordinary user sees only those of
    processes of one's own.
    """
    place, found, seen = "", list[int](), set[str]()
    deadline = time.monotonic() + LOOK_S
    for pid in ("self", *filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError, ValueError):  # gone meanwhile, or not ours to see
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            seen.add(namespace)
            for _, _, mount in _table(pid):
                # The number may be another one's by now.
                if (mount.device, mount.source) == (mounted.device, mounted.source):
                    place = place or mount.mountpoint
                    found.append(os.getpid() if pid == "self" else int(pid))
                    break
        if time.monotonic() > deadline:
            break
    return place, found


def is_dead(mountpoint: str) -> bool:
    """Whether the daemon behind a FUSE mount is gone; one that does not answer is not."""
    found: list[bool] = []

    def look() -> None:
        try:
            os.statvfs(mountpoint)  # not stat: the kernel would answer that from its cache
        except OSError as error:
            found.append(error.errno == errno.ENOTCONN)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    looking.join(LOOK_S)
    return any(found)


def unmount(
    mountpoint: str,
    *,
    lazy: bool = False,
    patience_s: float | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    """Take away what is mounted at *mountpoint*, even if it is in use when *lazy*.

    *meanwhile* is called every `PAUSE_S` while that takes, and ends it by raising something.
    Raises `UserError` with the reason, a `BusyError` if it is in use; also if it takes root longer
    than *patience_s*.
    """
    if os.geteuid() == 0:
        _unmount_as_root(mountpoint, lazy, patience_s, meanwhile)
        return
    command = ["fusermount3", "-u", *(["-z"] if lazy else []), mountpoint]
    try:
        tool = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                _, told = tool.communicate(timeout=PAUSE_S)
                break
            meanwhile()
    except BaseException:
        with suppress(PermissionError):  # it may run with more rights
            tool.kill()
        raise
    if tool.returncode:
        told = " ".join(told.split()).rstrip(".")  # more may follow in the same line
        kind = BusyError if os.strerror(errno.EBUSY) in told else UserError
        raise kind(f"cannot unmount: {told or f'{command[0]} exited with {tool.returncode}'}")


def _unmount_as_root(
    mountpoint: str, lazy: bool, patience_s: float | None, meanwhile: Callable[[], None]
) -> None:
    """By the system call, in a thread that can be left behind.

    umount(8) looks at the mounted file system first, which may be one whose daemon never
    answers; and on the way to it there may be another.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    outcome: list[int] = []

    def call() -> None:
        done = libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0))
        outcome.append(ctypes.get_errno() if done else 0)

    caller = threading.Thread(target=call, daemon=True)
    caller.start()
    deadline = None if patience_s is None else time.monotonic() + patience_s
    while True:
        left = PAUSE_S if deadline is None else deadline - time.monotonic()
        caller.join(max(0, min(PAUSE_S, left)))
        if outcome or left <= 0:
            break
        meanwhile()
    if not outcome:
        raise UserError(f"cannot unmount {mountpoint}: the kernel is at it for {patience_s:g} s")
    if outcome[0]:
        if outcome[0] == errno.EBUSY:
            raise BusyError(f"cannot unmount {mountpoint}: it is busy")
        raise UserError(f"cannot unmount {mountpoint}: {os.strerror(outcome[0])}")


def users_of(mountpoint: str) -> list[tuple[int, str]]:
    """Processes that use files below *mountpoint*, or stand in it: pairs of id and name.

    As many as are found in `LOOK_S`. Those of other users are not visible to an ordinary user;
    the kernel's own (a loop device, swap) never are.
    """
    found: list[tuple[int, str]] = []
    looking = threading.Thread(target=_look_for_users, args=(mountpoint, found), daemon=True)
    looking.start()
    looking.join(LOOK_S)
    return list(found)


def _look_for_users(mountpoint: str, found: list[tuple[int, str]]) -> None:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # gone meanwhile, or not ours to see
            if any(_is_at(path, mountpoint) for path in _paths_of(pid)):
                name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
                found.append((int(pid), name))


def _paths_of(pid: str) -> Iterator[str]:
    yield os.readlink(f"/proc/{pid}/cwd")
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(f"/proc/{pid}/fd/{entry}")
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            yield line.rstrip("\n").split(maxsplit=5)[-1]


def _is_at(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")
