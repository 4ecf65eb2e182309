"""The control socket of a mount: one JSON object a line in, one a line out.

It runs beside the requests of the guest and must not wait with them: a command is a plain function
that answers at once from memory. Nor may who asks harm anybody: each request has a deadline, a
line and the number of clients a limit, and only the daemon's own user and root are heard.

``{"command": NAME, …}`` is answered by what the command gives, or by ``{"error": TEXT, "problem":
WORD}``, where the word is for programs: ``bad-request``, ``unknown-command``,
``permission-denied``, ``refused`` (by the command, which may add an ``exit_code``), ``internal``.
"""

import json
import logging
import os
import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from quorumfs.errors import UserError

log = logging.getLogger(__name__)

LINE_MAX = 64 << 10
"""Bytes of a request: many times the longest path."""

CLIENTS_MAX = 32
"""Connections at a time. Another one ends that of the client that has been silent longest."""

PATIENCE_S = 10.0
"""For a client to send a whole request, and take the answer."""

BACKLOG = 64
"""Connections that wait to be accepted."""

Command = Callable[[dict[str, Any]], dict[str, Any]]
"""From the request to the answer, at once: no I/O. May raise `UserError`."""


async def serve(
    path: Path,
    commands: Mapping[str, Command],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer *commands* at the socket *path* until cancelled; started once clients can connect.

    The caller holds the lock of this mount in the runtime directory (`runtime.claim`): what is
    at *path* was left by a daemon that died. Without a socket the disk serves all the same.
    """
    try:
        listener = _listen(path)
    except OSError as error:
        log.error("no status and no control of this mount: %s: %s", path, error.strerror or error)
        task_status.started()
        return
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, _Clients(commands).serve, [listener])
            task_status.started()  # the kernel queues whoever connects from now on
    finally:
        with suppress(OSError):
            os.unlink(path)


def _listen(path: Path) -> trio.SocketListener:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        channel.bind(os.fspath(path))
        os.chmod(path, 0o600)  # nobody could connect so far
        channel.listen(BACKLOG)
        return trio.SocketListener(trio.socket.from_stdlib_socket(channel))
    except BaseException:
        channel.close()
        raise


def answer(commands: Mapping[str, Command], line: bytes) -> bytes:
    """The answer to one request, whatever it is: a line."""
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return _error("bad-request", "a request is one JSON object a line")
    name = request.get("command") if isinstance(request, dict) else None
    if not isinstance(name, str):
        return _error("bad-request", 'a request is a JSON object like {"command": "status"}')
    if name not in commands:
        return _error("unknown-command", f"unknown command; there are: {', '.join(commands)}")
    try:
        return _line(commands[name](request))
    except UserError as error:
        return _error("refused", str(error), exit_code=int(error.exit_code))
    except Exception:
        log.exception("internal error: the command %s fails", name)
        return _error("internal", "internal error, see the log of the daemon")


def _error(problem: str, text: str, **more: int) -> bytes:
    return _line({"error": text, "problem": problem, **more})


def _line(content: dict[str, Any]) -> bytes:
    # Escapes: a path may hold bytes that are no UTF-8.
    return json.dumps(content, ensure_ascii=True).encode("ascii") + b"\n"


class _LineTooLongError(Exception):
    """More than `LINE_MAX` bytes and no end of the line."""


class _Clients:
    """All who are connected; no failure of one reaches beyond it."""

    def __init__(self, commands: Mapping[str, Command]) -> None:
        self._commands = commands
        self._scopes: dict[trio.CancelScope, None] = {}
        """One for each, the one silent longest first."""

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answer one client until it goes, or takes too long."""
        scope = trio.CancelScope()
        if len(self._scopes) >= CLIENTS_MAX:
            silent = next(iter(self._scopes))
            del self._scopes[silent]
            silent.cancel()
        self._scopes[scope] = None
        try:
            with scope:
                async with stream:
                    await self._converse(stream, scope)
        except (trio.BrokenResourceError, OSError):
            pass  # it went away
        except Exception:
            log.exception("internal error: a client of the control socket is dropped")
        finally:
            self._scopes.pop(scope, None)

    async def _converse(self, stream: trio.SocketStream, scope: trio.CancelScope) -> None:
        if not _is_ours(stream):
            await stream.send_all(_error("permission-denied", "only its owner and root may ask"))
            return
        received = bytearray()
        while True:
            with trio.move_on_after(PATIENCE_S) as patience:
                try:
                    line = await _receive_line(stream, received)
                except _LineTooLongError:
                    await stream.send_all(_error("bad-request", f"more than {LINE_MAX} bytes"))
                    return
                if line is None:
                    return
                if scope in self._scopes:
                    del self._scopes[scope]
                    self._scopes[scope] = None
                await stream.send_all(answer(self._commands, line))
            if patience.cancelled_caught:
                return


def _is_ours(stream: trio.SocketStream) -> bool:
    """Whether the one at the other end is who runs this daemon, or root."""
    pid_uid_gid = struct.Struct("3i")
    credentials = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, pid_uid_gid.size)
    _, uid, _ = pid_uid_gid.unpack(credentials)
    return uid in (os.geteuid(), 0)


async def _receive_line(stream: trio.SocketStream, received: bytearray) -> bytes | None:
    """The next line, without its end; None when there is none any more. The rest is kept."""
    end = received.find(b"\n")
    while end < 0:
        if len(received) > LINE_MAX:
            raise _LineTooLongError
        piece = await stream.receive_some(LINE_MAX)
        if not piece:
            if not received:
                return None
            end = len(received)  # the last line may lack its end
            break
        start = len(received)
        received += piece
        end = received.find(b"\n", start)
    if end > LINE_MAX:
        raise _LineTooLongError
    line = bytes(received[:end])
    del received[: end + 1]
    return line
