"""The other end of the control socket, for the commands: who serves a mount point, and ask it.

Blocking, with a deadline for everything. Never touches the mounted file system, which may be dead
or hung: the kernel's table of mounts says who owns a mount, and so where its socket is.
"""

import json
import os
import pwd
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quorumfs.control import mounts, runtime
from quorumfs.control.status import Status, StatusFormatError
from quorumfs.errors import ExitCode, UserError

TIMEOUT_S = 5.0
"""For a whole question and answer; a daemon answers in milliseconds."""

ANSWER_MAX = 16 << 20
"""Bytes: no answer is nearly as large."""

RETRY_S = 0.05


class ControlError(UserError):
    """A mount could not be asked; *problem* is the reason in a word, for programs."""

    problem = "failed"


class NotMountedError(ControlError):
    """There is no quorumfs mount."""

    problem = "not-mounted"
    exit_code = ExitCode.USAGE


class DaemonGoneError(ControlError):
    """There is a mount, and nobody serves it."""

    problem = "daemon-gone"
    exit_code = ExitCode.UNUSABLE


class NoAnswerError(ControlError):
    """The daemon lives and does not answer."""

    problem = "no-answer"
    exit_code = ExitCode.UNUSABLE


class NotPermittedError(ControlError):
    """The mount is somebody else's."""

    problem = "permission-denied"
    exit_code = ExitCode.USAGE


class ProtocolError(ControlError):
    """What answers, if anything does, is no quorumfs of this kind."""

    problem = "protocol"
    exit_code = ExitCode.USAGE


def visible_mounts() -> list[mounts.Mount]:
    """All quorumfs mounts that can be reached, dead ones included, in the order mounted."""
    topmost = {mount.mountpoint: mount for mount in mounts.table()}
    return [mount for mount in topmost.values() if mount.fs_type == mounts.FS_TYPE]


def find(mountpoint: str) -> mounts.Mount:
    """The quorumfs mount that the user calls *mountpoint*; raises `NotMountedError`.

    The path is resolved no further than needed: looking at a mount point itself asks its daemon.
    """
    absolute = os.path.abspath(mountpoint)
    directory, name = os.path.split(absolute)
    ways: Sequence[Callable[[], str]] = (
        lambda: absolute,
        lambda: os.path.join(os.path.realpath(directory), name),
        lambda: os.path.realpath(absolute),
    )
    for resolve in ways:
        mount = mounts.mount_at(resolve())
        if mount is not None and mount.fs_type == mounts.FS_TYPE:
            return mount
    raise NotMountedError(f"{mountpoint} is not a quorumfs mount")


def status(mountpoint: str, *, timeout_s: float = TIMEOUT_S) -> Status:
    """The status of the mount at *mountpoint*. Raises `ControlError`."""
    content = ask(mountpoint, "status", timeout_s=timeout_s)
    try:
        return Status.from_json(content)
    except StatusFormatError as error:
        raise ProtocolError(
            f"the daemon of {mountpoint} is another version of quorumfs ({error})"
        ) from None


def ask(
    mountpoint: str, command: str, *, timeout_s: float = TIMEOUT_S, **arguments: object
) -> dict[str, Any]:
    """Put *command* to the daemon of *mountpoint*; its answer.

    Raises `ControlError`: one of the classes above, or itself when the command was refused.
    """
    mount = find(mountpoint)
    deadline = time.monotonic() + timeout_s
    request = json.dumps({"command": command, **arguments}).encode("ascii") + b"\n"
    try:
        with _connect(mount, deadline) as channel:
            line = _exchange(channel, request, deadline)
    except TimeoutError:
        who = _daemon(mount)
        raise NoAnswerError(
            f"the daemon of {mountpoint}{who} does not answer within {timeout_s:g} s: it is "
            f"stopped or overloaded; see {runtime.log_of(mount.mountpoint, mount.owner)}"
        ) from None
    except PermissionError:
        raise NotPermittedError(
            f"{mountpoint} is a mount of {user_name(mount.owner)}: only that user and root may ask"
        ) from None
    except OSError:
        line = b""
    if not line:
        raise _gone(mount)
    return _understood(mount, command, line)


def _connect(mount: mounts.Mount, deadline: float) -> socket.socket:
    """A connection to the daemon.

    Raises `ControlError` if it is not to be found, and `OSError`: `TimeoutError` at *deadline*,
    `PermissionError`.
    """
    if os.geteuid() not in (0, mount.owner):
        raise PermissionError
    for home in runtime.directories(mount.owner):
        path = runtime.path_for(mount.mountpoint, "sock", home)
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect_to(channel, path, deadline)
            # A directory in /tmp may have been made by anybody.
            if _peer_uid(channel) == mount.owner:
                return channel
        except (FileNotFoundError, ConnectionRefusedError):
            pass  # not here, or left by a daemon that died
        except BaseException:
            channel.close()
            raise
        channel.close()
    raise _without_socket(mount)


def _connect_to(channel: socket.socket, path: Path, deadline: float) -> None:
    while True:
        channel.settimeout(_left(deadline))
        try:
            channel.connect(os.fspath(path))
        except BlockingIOError:  # so many wait already that the kernel queues no more
            time.sleep(RETRY_S)
        else:
            return


def _exchange(channel: socket.socket, request: bytes, deadline: float) -> bytes:
    """The line that answers *request*; nothing if the other end closes before it is complete."""
    channel.settimeout(_left(deadline))
    with suppress(ConnectionError):  # it may have answered, and closed, without hearing us out
        channel.sendall(request)
    received = bytearray()
    while not received.endswith(b"\n"):
        channel.settimeout(_left(deadline))
        piece = channel.recv(1 << 16)
        if not piece:
            return b""
        received += piece
        if len(received) > ANSWER_MAX:
            break
    return bytes(received)


def _understood(mount: mounts.Mount, command: str, line: bytes) -> dict[str, Any]:
    place = mount.mountpoint
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ProtocolError(f"what answers for {place}{_daemon(mount)} is no quorumfs")
    if "error" not in content:
        return content
    text = str(content["error"])
    match content.get("problem"):
        case "permission-denied":
            raise NotPermittedError(f"{place}: {text}")
        case "unknown-command":
            raise ProtocolError(
                f"the daemon of {place}{_daemon(mount)} is another version of quorumfs: it does "
                f"not know {command!r}"
            )
    error = ControlError(f"{place}: {text}")
    with suppress(KeyError, ValueError):
        error.exit_code = ExitCode(content["exit_code"])
    raise error


def _without_socket(mount: mounts.Mount) -> ControlError:
    pid = runtime.daemon_pid(mount.mountpoint, mount.owner)
    if pid is None:
        return _gone(mount)
    return ProtocolError(
        f"pid {pid} serves {mount.mountpoint} without a control socket: it is another version "
        "of quorumfs, or just starting or ending"
    )


def _gone(mount: mounts.Mount) -> DaemonGoneError:
    place = mount.mountpoint
    return DaemonGoneError(
        f"the daemon of {place} is gone, and the mount dead: see "
        f"{runtime.log_of(place, mount.owner)}; quorumfs umount {place} clears it, and so does "
        "mounting there again"
    )


def _left(deadline: float) -> float:
    """Seconds until *deadline*; raises `TimeoutError` when there are none."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _peer_uid(channel: socket.socket) -> int:
    pid_uid_gid = struct.Struct("3i")
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, pid_uid_gid.size)
    uid: int = pid_uid_gid.unpack(credentials)[1]
    return uid


def _daemon(mount: mounts.Mount) -> str:
    """Words that name the daemon, if it lives."""
    pid = runtime.daemon_pid(mount.mountpoint, mount.owner)
    return f" (pid {pid})" if pid else ""


def user_name(uid: int) -> str:
    """Whose *uid* it is, for a reader."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
