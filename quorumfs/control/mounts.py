"""The kernel's table of mounts, and the commands that change it."""

import os
import re
import subprocess
from collections.abc import Callable
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


def mount_at(mountpoint: str) -> Mount | None:
    """The topmost mount at *mountpoint* (absolute, without symbolic links), if there is one.

    Asks the table only, never the mounted file system: that one may be dead or hung.
    """
    found = None
    for line in Path("/proc/self/mountinfo").read_bytes().rstrip(b"\n").split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        # At single spaces: the source may be empty, and other white space is part of a path.
        path = fields.split(b" ")[4]
        target = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), path)
        if target == os.fsencode(mountpoint):
            kind, _, options = rest.split(b" ")[:3]
            owner = re.search(rb"(?:^|,)user_id=(\d+)", options)
            fs_type = kind.decode("ascii")
            found = Mount(mountpoint, fs_type, int(owner[1]) if owner else 0)
    return found


LOOK_S = 0.5
"""How often (seconds) who waits for the tool that unmounts may do something else."""


def unmount(
    mountpoint: str, *, lazy: bool = False, meanwhile: Callable[[], None] = lambda: None
) -> None:
    """Take away what is mounted at *mountpoint*, even if it is in use when *lazy*.

    *meanwhile* is called every `LOOK_S` while that takes, and ends it by raising something.
    Raises `UserError` with the tool's reason.
    """
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), mountpoint]
    else:
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
                _, told = tool.communicate(timeout=LOOK_S)
                break
            meanwhile()
    except BaseException:
        with suppress(PermissionError):  # it may run with more rights
            tool.kill()
        raise
    if tool.returncode:
        told = " ".join(told.split()).rstrip(".")  # more may follow in the same line
        raise UserError(f"cannot unmount: {told or f'{command[0]} exited with {tool.returncode}'}")


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
