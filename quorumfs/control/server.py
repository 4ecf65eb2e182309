"""The control socket of a mount: one JSON object a line in, one a line out.

It is served by a thread of its own, which needs nothing of the loop that serves the guest: a
command is a plain function that answers at once from memory, also while that loop stands still.
Nor may who asks harm anybody: no client is waited for alone, each request has a deadline, a line,
an answer and the number of clients a limit, and only the daemon's own user and root are heard.

``{"command": NAME, …}`` is answered by what the command gives, or by ``{"error": TEXT, "problem":
WORD}``, where the word is for programs: ``bad-request``, ``unknown-command``,
``permission-denied``, ``refused`` (by the command, which may add an ``exit_code``), ``internal``.
"""

import errno
import json
import logging
import os
import selectors
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any

import trio

from quorumfs.errors import UserError

log = logging.getLogger(__name__)

LINE_MAX = 64 << 10
"""Bytes of a request: many times the longest path."""

ANSWER_MAX = 4 << 20
"""Bytes of an answer: what a client takes, and more than the longest status."""

CLIENTS_MAX = 32
"""Connections at a time. Another one ends that of the client that has been silent longest."""

PATIENCE_S = 10.0
"""For a client to send a whole request, and take the answer."""

BACKLOG = 64
"""Connections that wait to be accepted."""

TICK_S = 1.0
"""How often (seconds) the thread looks at what it watches over, unless told otherwise."""

CROWDED_S = 0.05
"""How long (seconds) to wait before another client is let in where that was not possible."""

STOP_S = 2.0
"""How long (seconds) the end of a mount waits for the thread."""

Command = Callable[[dict[str, Any]], dict[str, Any]]
"""From the request to the answer, at once: no I/O. Called in the thread. May raise `UserError`."""


async def serve(
    path: Path,
    commands: Mapping[str, Command],
    *,
    refresh: Callable[[], None] = lambda: None,
    tick: Callable[[], None] = lambda: None,
    period_s: Callable[[], float] = lambda: TICK_S,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """As `serving`, until cancelled; started once clients can connect."""
    with serving(path, commands, refresh=refresh, tick=tick, period_s=period_s):
        task_status.started()
        await trio.sleep_forever()


@contextmanager
def serving(
    path: Path,
    commands: Mapping[str, Command],
    *,
    refresh: Callable[[], None] = lambda: None,
    tick: Callable[[], None] = lambda: None,
    period_s: Callable[[], float] = lambda: TICK_S,
) -> Iterator[None]:
    """Answer *commands* at the socket *path* from a thread, within this context.

    The thread calls *refresh* once before it answers all requests that are there, and *tick* after
    every *period_s* (seconds); neither may take longer than a client may have to wait.

    The caller holds the lock of this mount in the runtime directory (`runtime.claim`): what is
    at *path* was left by a daemon that died. Without a socket the disk serves all the same.
    """
    try:
        listener = _listen(path)
    except OSError as error:
        log.error("no status and no control of this mount: %s: %s", path, error.strerror or error)
        yield
        return
    try:
        with listener:
            clients = _Clients(listener, commands, refresh, tick, period_s)
            thread = Thread(target=clients.serve, name="control", daemon=True)
            thread.start()
            try:
                yield
            finally:
                clients.stop()
                thread.join(STOP_S)
    finally:
        with suppress(OSError):
            os.unlink(path)


def _listen(path: Path) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        channel.bind(os.fspath(path))
        os.chmod(path, 0o600)  # nobody could connect so far
        channel.listen(BACKLOG)
        channel.setblocking(False)
    except BaseException:
        channel.close()
        raise
    return channel


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
        line = _line(commands[name](request))
    except UserError as error:
        return _error("refused", str(error), exit_code=int(error.exit_code))
    except Exception:
        log.exception("internal error: the command %s fails", name)
        return _error("internal", "internal error, see the log of the daemon")
    if len(line) > ANSWER_MAX:
        return _error("internal", f"the answer has more than {ANSWER_MAX} bytes")
    return line


def _error(problem: str, text: str, **more: int) -> bytes:
    return _line({"error": text, "problem": problem, **more})


def _line(content: dict[str, Any]) -> bytes:
    # Escapes: a path may hold bytes that are no UTF-8.
    return json.dumps(content, ensure_ascii=True).encode("ascii") + b"\n"


class _Client:
    """One connection: what it has sent, and what it has yet to take. Nothing here waits."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.received = bytearray()
        self.sending = memoryview(b"")
        self.ends = False
        """Whether nothing more is to be heard of it."""
        self.patient_until = monotonic() + PATIENCE_S

    def hear(self) -> bytes | None:
        """The next request, without its end; None if it is not there yet, or the client has not
        taken the last answer. Raises `OSError` if it went away.
        """
        self._send()
        if self.sending:
            return None
        if b"\n" not in self.received and not self.ends:
            with suppress(BlockingIOError):
                piece = self.channel.recv(LINE_MAX)
                self.received += piece
                self.ends = not piece
        end = self.received.find(b"\n")
        if end < 0 and self.ends:
            end = len(self.received)  # the last line may lack its end
        if (len(self.received) if end < 0 else end) > LINE_MAX:
            self.ends = True
            self.received.clear()
            self.tell(_error("bad-request", f"more than {LINE_MAX} bytes"))
            return None
        if end < 0 or not self.received:
            return None
        line = bytes(self.received[:end])
        del self.received[: end + 1]
        return line

    def tell(self, line: bytes) -> None:
        """Send *line*, what is possible of it now. Raises `OSError` if the client went away."""
        self.sending = memoryview(line)
        self._send()

    def _send(self) -> None:
        if not self.sending:
            return
        with suppress(BlockingIOError):
            while self.sending:
                self.sending = self.sending[self.channel.send(self.sending) :]
            self.patient_until = monotonic() + PATIENCE_S  # for the next one


class _Clients:
    """All who are connected; no failure of one reaches beyond it."""

    def __init__(
        self,
        listener: socket.socket,
        commands: Mapping[str, Command],
        refresh: Callable[[], None],
        tick: Callable[[], None],
        period_s: Callable[[], float],
    ) -> None:
        self._listener = listener
        self._commands = commands
        self._refresh = refresh
        self._tick = tick
        self._period_s = period_s
        self._stopper, self._stopped = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._clients: dict[_Client, None] = {}
        """The one silent longest first."""
        self._ready: dict[_Client, None] = {}
        """Those who may have sent something, or may take something."""

    def stop(self) -> None:
        """Have `serve` return soon."""
        self._stopper.close()

    def serve(self) -> None:
        """Answer everybody; the life of the thread."""
        # The loop is to hear of signals, and to act on them.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with self._selector, self._stopped:
            self._selector.register(self._listener, selectors.EVENT_READ)
            self._selector.register(self._stopped, selectors.EVENT_READ)
            tick_at = monotonic() + self._period_s()
            while self._turn(tick_at):
                if monotonic() >= tick_at:
                    self._guarded(self._tick)
                    tick_at = monotonic() + self._period_s()
            for client in list(self._clients):
                self._drop(client)

    def _turn(self, until: float) -> bool:
        """Wait for what comes until a time, and do what there is to do; False at the end."""
        until = min([until, *(client.patient_until for client in self._clients)])
        timeout_s = 0.0 if self._ready else max(0.0, until - monotonic())
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._stopped:
                return False
            if key.fileobj is self._listener:
                self._accept()
            elif key.data in self._clients:  # not dropped for another one a moment ago
                self._ready[key.data] = None
        ready, self._ready = self._ready, {}
        asking = [(client, line) for client in ready if (line := self._hear(client)) is not None]
        if asking:
            self._guarded(self._refresh)
        for client, line in asking:
            self._tell(client, answer(self._commands, line))
        now = monotonic()
        for client in [client for client in self._clients if client.patient_until <= now]:
            self._drop(client)
        return True

    def _accept(self) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                sleep(CROWDED_S)  # until somebody has closed something
            return
        channel.setblocking(False)
        if len(self._clients) >= CLIENTS_MAX:
            self._drop(next(iter(self._clients)))
        client = _Client(channel)
        self._clients[client] = None
        self._selector.register(channel, selectors.EVENT_READ, client)
        if _is_ours(channel):
            self._ready[client] = None
        else:
            client.ends = True
            self._tell(client, _error("permission-denied", "only its owner and root may ask"))

    def _hear(self, client: _Client) -> bytes | None:
        """The next request of *client*, if it is there, and the answer to the last one is taken."""
        try:
            line = client.hear()
        except OSError:
            self._drop(client)  # it went away
            return None
        if line is not None:
            self._clients[client] = self._clients.pop(client)  # it is not silent
        else:
            self._await(client)
        return line

    def _tell(self, client: _Client, line: bytes) -> None:
        """Send *client* the answer *line*, as far as it takes it now."""
        try:
            client.tell(line)
        except OSError:
            self._drop(client)
            return
        if client.received and not client.sending:
            self._ready[client] = None  # there may be another request: the others come first
        else:
            self._await(client)

    def _await(self, client: _Client) -> None:
        """Wait for what *client* is to do next; let it go if that is nothing."""
        if client.ends and not client.sending:
            self._drop(client)
        else:
            wanted = selectors.EVENT_WRITE if client.sending else selectors.EVENT_READ
            self._selector.modify(client.channel, wanted, client)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("internal error in the thread of the control socket")

    def _drop(self, client: _Client) -> None:
        del self._clients[client]
        self._ready.pop(client, None)
        self._selector.unregister(client.channel)
        client.channel.close()


def _is_ours(channel: socket.socket) -> bool:
    """Whether the one at the other end is who runs this daemon, or root."""
    pid_uid_gid = struct.Struct("3i")
    credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, pid_uid_gid.size)
    _, uid, _ = pid_uid_gid.unpack(credentials)
    return uid in (os.geteuid(), 0)
