"""The client's side of the control socket: finds the daemon of a mount point, and asks it.

Blocking, with one deadline for everything. What answers may be a process of another user, and
anything: the time and memory for each answer are bounded, and an answer is believed only about the
mount that, by the kernel's table, is that user's. Never touches the mounted file system, which may
be dead or hung: the kernel's table of mounts says who owns a mount, and so where its socket is.
"""

import errno
import json
import os
import pwd
import selectors
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from quorumfs.control import mounts, runtime, schema
from quorumfs.control.diskmap import DiskMap
from quorumfs.control.recent import Recent
from quorumfs.control.status import OtherSchemaError, Status, StatusFormatError
from quorumfs.errors import ExitCode, UserError

TIMEOUT_S = 5.0
"""For all questions and answers together; a daemon answers in milliseconds."""

ANSWER_MAX = 4 << 20
"""Bytes, as much as a daemon sends: the status of 32 replicas takes up to three quarters of it, if
each path is as long as it can be, needs an escape for each byte, and stands in a reason and a note,
too."""

ANSWERS_MAX = 8 << 20
"""Bytes of all answers of one user's daemons."""

AT_ONCE = 512
"""Connections at a time; fewer where there are not twice as many descriptors."""

LOOK_S = (0.01, 0.5)
"""The first and the longest wait (seconds) between two looks at an action."""

RETRY_S = 0.05

TEXT_MAX = 4096
"""Characters of an error that a daemon tells."""

FAILURES = frozenset({ExitCode.FAILED, ExitCode.UNUSABLE, ExitCode.NEEDS_OPERATOR, ExitCode.USAGE})
"""What a daemon may have a command exit with when it refuses."""

T = TypeVar("T")


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
    """The daemon is another version of quorumfs, or has no socket."""

    problem = "protocol"
    exit_code = ExitCode.USAGE


class InvalidAnswerError(ControlError):
    """What answers is no quorumfs, as far as can be told."""

    problem = "invalid-answer"
    exit_code = ExitCode.UNUSABLE


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


def status(
    mountpoint: str,
    *,
    timeout_s: float = TIMEOUT_S,
    runtime_dir: Path | None = None,
    mount: mounts.Mount | None = None,
) -> Status:
    """The status of the mount at *mountpoint*. Raises `ControlError`.

    *mount*: what was found there, where it may have been unmounted since.
    """
    (answer,) = statuses([mount or find(mountpoint)], timeout_s=timeout_s, runtime_dir=runtime_dir)
    if isinstance(answer, ControlError):
        raise answer
    return answer


def statuses(
    asked: Sequence[mounts.Mount],
    *,
    timeout_s: float = TIMEOUT_S,
    runtime_dir: Path | None = None,
) -> list[Status | ControlError]:
    """The status of each of these mounts, or why there is none, within *timeout_s* for all."""

    def understand(question: "_Question", content: dict[str, Any]) -> Status:
        try:
            status = Status.from_json(content)
        except OtherSchemaError as error:
            raise ProtocolError(
                f"the daemon of {question.place}{question.pid} is another version of quorumfs: "
                f"{error}"
            ) from None
        except StatusFormatError as error:
            raise question.invalid(str(error)) from None
        if status.mountpoint != question.found_by:
            raise question.invalid("it speaks for another mount point")
        return replace(status, mountpoint=question.place)

    return _ask_all(asked, {"command": "status"}, understand, timeout_s, runtime_dir)


def events(
    mount: mounts.Mount,
    after: int | None,
    *,
    timeout_s: float = TIMEOUT_S,
    runtime_dir: Path | None = None,
) -> Recent:
    """What happened at *mount* since the event with the number *after*; None: only the number of
    the last one. Raises `ControlError`.
    """
    request: dict[str, object] = {"command": "events", "after": after}
    return _ask_for(Recent, mount, request, timeout_s, runtime_dir)


def disk_map(
    mount: mounts.Mount,
    cells: int,
    *,
    timeout_s: float = TIMEOUT_S,
    runtime_dir: Path | None = None,
) -> DiskMap:
    """A picture of the disk at *mount* in so many *cells*. Raises `ControlError`."""
    request: dict[str, object] = {"command": "map", "cells": cells}
    return _ask_for(DiskMap, mount, request, timeout_s, runtime_dir)


def _ask_for(
    kind: type[T],
    mount: mounts.Mount,
    request: dict[str, object],
    timeout_s: float,
    runtime_dir: Path | None,
) -> T:
    """The answer of the daemon of *mount*, which is a *kind*. Raises `ControlError`."""

    def understand(question: "_Question", content: dict[str, Any]) -> T:
        try:
            return schema.load(kind, content)
        except schema.FormatError as error:
            raise question.invalid(str(error)) from None

    (answer,) = _ask_all([mount], request, understand, timeout_s, runtime_dir)
    if isinstance(answer, ControlError):
        raise answer
    return answer


def ask(
    mountpoint: str,
    command: str,
    *,
    timeout_s: float = TIMEOUT_S,
    runtime_dir: Path | None = None,
    **arguments: object,
) -> dict[str, Any]:
    """Put *command* to the daemon of *mountpoint*; its answer.

    Raises `ControlError`: one of the classes above, or itself when the command was refused.
    """
    asked = [find(mountpoint)]
    request = {"command": command, **arguments}
    (answer,) = _ask_all(asked, request, lambda _, content: content, timeout_s, runtime_dir)
    if isinstance(answer, ControlError):
        raise answer
    return answer


def act(
    mountpoint: str,
    verb: str,
    *,
    doing: Callable[[str], None] = lambda _: None,
    runtime_dir: Path | None = None,
    **arguments: object,
) -> dict[str, Any]:
    """Have the daemon of *mountpoint* carry out *verb*, and wait for the end; what that gives.

    *doing* is told, in words, what the daemon waits for. The action goes on in the daemon if this
    is interrupted. Raises `ControlError`: one of the classes above, or itself after a refusal.
    """
    begun = ask(mountpoint, verb, timeout_s=TIMEOUT_S, runtime_dir=runtime_dir, **arguments)
    pause_s = LOOK_S[0]
    while True:
        try:
            answer = ask(mountpoint, "action", runtime_dir=runtime_dir, action=begun.get("action"))
        except (NotMountedError, DaemonGoneError):
            raise ControlError(
                f"{mountpoint} was unmounted while {verb} was under way, and what that had begun "
                "is not undone: run it again once it is mounted",
                exit_code=ExitCode.FAILED,
            ) from None
        if answer.get("done") is True:
            return answer
        doing(str(answer.get("doing", "")))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LOOK_S[1])


def _ask_all(
    asked: Sequence[mounts.Mount],
    request: dict[str, object],
    understand: "Callable[[_Question, dict[str, Any]], T]",
    timeout_s: float,
    runtime_dir: Path | None,
) -> "list[T | ControlError]":
    """What *understand* makes of each answer to *request*, in the order of *asked*.

    It may raise `ControlError`.
    """
    deadline = time.monotonic() + timeout_s
    line = json.dumps(request).encode("ascii") + b"\n"
    answers: dict[int, T | ControlError] = {}
    heard: Counter[int] = Counter()
    room = min(AT_ONCE, os.sysconf("SC_OPEN_MAX") // 2)
    with runtime.Finder(runtime_dir) as finder, selectors.DefaultSelector() as selector:
        questions = [_Question(mount, line, finder) for mount in asked]
        waiting = deque(_by_turns(asked))
        while (waiting or selector.get_map()) and time.monotonic() < deadline:
            full: list[int] = []
            while waiting and len(selector.get_map()) < room and time.monotonic() < deadline:
                number = waiting.popleft()
                try:
                    selector.register(questions[number].start(), selectors.EVENT_READ, number)
                except BlockingIOError:  # so many wait already that the kernel queues no more
                    full.append(number)
                except ControlError as error:
                    answers[number] = error
            waiting += full
            if not waiting and not selector.get_map():
                break
            left = max(deadline - time.monotonic(), 0)
            for key, _ in selector.select(min(left, RETRY_S) if full else left):
                question = questions[key.data]
                try:
                    heard[question.mount.owner] += question.hear()
                    if heard[question.mount.owner] > ANSWERS_MAX:
                        raise question.invalid(f"more than {ANSWERS_MAX} bytes with the others")
                    if not question.is_answered:
                        continue
                    answers[key.data] = understand(question, question.answer(request))
                except ControlError as error:
                    answers[key.data] = error
                selector.unregister(key.fileobj)
                question.close()
                if time.monotonic() >= deadline:
                    break
        for number, question in enumerate(questions):
            if number not in answers:
                answers[number] = question.unanswered(timeout_s)
            question.close()
    return [answers[number] for number in range(len(asked))]


def _by_turns(asked: Sequence[mounts.Mount]) -> list[int]:
    """In which order to ask: our own first, then of each user one after the other.

    So nobody's mounts come last because somebody has thousands that do not answer.
    """
    own = os.geteuid()
    place: Counter[int] = Counter()
    order = []
    for number, mount in enumerate(asked):
        place[mount.owner] += 1
        order.append((mount.owner != own, place[mount.owner], number))
    return [number for *_, number in sorted(order)]


class _Question:
    """A request to the daemon of one mount, and what it answers."""

    def __init__(self, mount: mounts.Mount, request: bytes, finder: runtime.Finder) -> None:
        self.mount = mount
        self.place = mount.mountpoint
        self.found_by = finder.place_of(mount)
        self._request = request
        self._finder = finder
        self._channel: socket.socket | None = None
        self._socket_path: Path | None = None
        self._received = bytearray()

    def start(self) -> socket.socket:
        """Ask; returns where the answer is to come from.

        Raises `ControlError` if there is nobody to ask, and `BlockingIOError` if not now.
        """
        if os.geteuid() not in (0, self.mount.owner):
            raise self._not_permitted()
        if self.found_by != self.place:
            first = mounts.first_of(self.mount).mountpoint
            if first != self.place:
                raise NotMountedError(
                    f"{self.place} is a bind mount of what is mounted at {first}: name that one"
                )
        for path, place in self._finder.sockets(self.found_by, self.mount.owner):
            channel = None
            try:
                channel = _connect(place)
                # A directory in /tmp may have been made by anybody.
                if _peer_uid(channel) == self.mount.owner:
                    self._channel, self._socket_path = channel, path
                    break
                channel.close()
            except BlockingIOError:
                raise
            except PermissionError:
                raise self._not_permitted() from None
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise ControlError(f"cannot ask for {self.place}: {error.strerror}") from None
            finally:
                os.close(place)
        if self._channel is None:
            raise self._without_socket()
        with suppress(OSError):  # it may have answered, and closed, without hearing us out
            self._channel.send(self._request)
        return self._channel

    def hear(self) -> int:
        """Take what has come; how many bytes. Raises `ControlError` if that is no answer."""
        assert self._channel is not None
        try:
            piece = self._channel.recv(1 << 16)
        except OSError:
            piece = b""
        if not piece:  # without the end of a line it was none
            raise self._gone()
        self._received += piece
        if len(self._received) > ANSWER_MAX:
            raise self.invalid(f"more than {ANSWER_MAX} bytes")
        return len(piece)

    @property
    def is_answered(self) -> bool:
        return self._received.endswith(b"\n")

    def answer(self, request: dict[str, object]) -> dict[str, Any]:
        """The answer, which has come. Raises `ControlError` if it is none, or a refusal."""
        try:
            content = json.loads(self._received, parse_constant=_no_number)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise self.invalid("it is no JSON object")
        if "error" not in content:
            return content
        text = content["error"]
        if not isinstance(text, str) or len(text) > TEXT_MAX:
            raise self.invalid("its error is no text")
        match content.get("problem"):
            case "permission-denied":
                raise NotPermittedError(f"{self.place}: {text}")
            case "unknown-command":
                raise ProtocolError(
                    f"the daemon of {self.place}{self.pid} is another version of quorumfs: it "
                    f"does not know {request['command']!r}"
                )
        code = content.get("exit_code")
        known = ExitCode(code) if type(code) is int and code in FAILURES else None
        raise ControlError(f"{self.place}: {text}", exit_code=known)

    def close(self) -> None:
        """Let go of the connection, and of what was received."""
        if self._channel is not None:
            self._channel.close()
        self._received.clear()

    @property
    def pid(self) -> str:
        """Words that name the daemon, if it lives."""
        pid = self._finder.daemon_pid(self.found_by, self.mount.owner)
        return f" (pid {pid})" if pid else ""

    def invalid(self, why: str) -> "InvalidAnswerError":
        """What to say of an answer that cannot be shown."""
        return InvalidAnswerError(
            f"what answers for {self.place}{self.pid} at {self._socket_path}, of "
            f"{user_name(self.mount.owner)}, is no quorumfs that is known here: {why}"
        )

    def unanswered(self, timeout_s: float) -> "NoAnswerError":
        log = self._finder.log_of(self.found_by, self.mount.owner)
        return NoAnswerError(
            f"the daemon of {self.place}{self.pid} does not answer within {timeout_s:g} s: it is "
            f"stopped or overloaded; see {log}"
        )

    def _not_permitted(self) -> "NotPermittedError":
        return NotPermittedError(
            f"{self.place} is a mount of {user_name(self.mount.owner)}: only that user and root "
            "may ask"
        )

    def _without_socket(self) -> ControlError:
        pid = self._finder.daemon_pid(self.found_by, self.mount.owner)
        if pid is not None:
            return ProtocolError(
                f"pid {pid} serves {self.place} without a control socket: it is another version "
                "of quorumfs, or just starting or ending"
            )
        if self._finder.is_elsewhere(self.mount.owner):
            return NotPermittedError(
                f"{self.place} is a mount of the host's root, who is another user here"
            )
        return self._gone()

    def _gone(self) -> "DaemonGoneError":
        if self.mount.owner == os.geteuid() and not mounts.is_dead(self.place):
            return DaemonGoneError(
                f"the daemon of {self.place} is not found, and the disk answers: if mount was told "
                "a --runtime-dir, name it here"
            )
        log = self._finder.log_of(self.found_by, self.mount.owner)
        return DaemonGoneError(
            f"the daemon of {self.place} is gone, and the mount dead: see {log}; quorumfs umount "
            f"{self.place} clears it, and so does mounting there again (if mount was told a "
            "--runtime-dir, name it here)"
        )


def _connect(place: int) -> socket.socket:
    """A connection to the socket that the descriptor *place* is of. Raises `OSError`."""
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.setblocking(False)
        channel.connect(f"/proc/self/fd/{place}")
    except BaseException:
        channel.close()
        raise
    return channel


def _no_number(name: str) -> NoReturn:
    """For what JSON has not, and Python's takes."""
    raise ValueError(name)


def _peer_uid(channel: socket.socket) -> int:
    pid_uid_gid = struct.Struct("3i")
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, pid_uid_gid.size)
    uid: int = pid_uid_gid.unpack(credentials)[1]
    return uid


def user_name(uid: int) -> str:
    """Whose *uid* it is, for a reader."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
