"""The kernel's table of mounts, and the commands that change it."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quorumfs.errors import UserError

SUBTYPE = "quorumfs"
FS_TYPE = f"fuse.{SUBTYPE}"


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the table."""

    mountpoint: str
    fs_type: str
    owner: int
    """User id of who mounted a FUSE file system; 0 for others."""


def table() -> Iterator[Mount]:
    """All mounts, in the order mounted. Their names are anybody's: any bytes but NUL.

    Asks the table only, never the mounted file systems: one may be dead or hung.
    """
    # At single newlines and spaces, which are escaped in names where other white space is not; and
    # the source may be empty.
    for line in Path("/proc/self/mountinfo").read_bytes().rstrip(b"\n").split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        path = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), fields.split(b" ")[4])
        kind, _, options = rest.split(b" ")[:3]
        owner = re.search(rb"(?:^|,)user_id=(\d+)", options)
        yield Mount(os.fsdecode(path), os.fsdecode(kind), int(owner[1]) if owner else 0)


def mount_at(mountpoint: str) -> Mount | None:
    """The topmost mount at *mountpoint* (absolute, without symbolic links), if there is one."""
    return next(reversed([mount for mount in table() if mount.mountpoint == mountpoint]), None)


def store_of(path: str) -> str | None:
    """Where the file system is mounted that *path* (absolute, without symbolic links) is on.

    None for that of the whole system, which nobody unmounts.
    """
    places = {mount.mountpoint for mount in table()} - {"/"}
    above = [place for place in places if path == place or path.startswith(f"{place}/")]
    return max(above, key=len, default=None)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Take away what is mounted at *mountpoint*, even if it is in use when *lazy*.

    Raises `UserError` with the tool's reason.
    """
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), mountpoint]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), mountpoint]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    if done.returncode:
        told = " ".join(done.stderr.split()).rstrip(".")  # more may follow in the same line
        raise UserError(f"cannot unmount: {told or f'{command[0]} exited with {done.returncode}'}")


def users_of(mountpoint: str) -> list[tuple[int, str]]:
    """Processes that use files below *mountpoint*, or stand in it: pairs of id and name.

    Those of other users are not visible to an ordinary user; the kernel's own (a loop device,
    swap) never are.
    """
    below = mountpoint.rstrip("/") + "/"
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # gone meanwhile, or not ours to see
            paths = {os.readlink(f"/proc/{pid}/cwd")}
            mapped = Path(f"/proc/{pid}/maps").read_text("utf-8", "surrogateescape")
            paths.update(line.split(maxsplit=5)[-1] for line in mapped.splitlines())
            for entry in os.listdir(f"/proc/{pid}/fd"):
                with suppress(FileNotFoundError):  # closed meanwhile
                    paths.add(os.readlink(f"/proc/{pid}/fd/{entry}"))
            if any(path == mountpoint or path.startswith(below) for path in paths):
                name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace").strip()
                found.append((int(pid), name))
    return found
