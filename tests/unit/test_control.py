"""The control socket: what it answers, and that no client can harm another, or the disk."""

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from quorumfs.control import client, mounts, runtime, server
from quorumfs.control.status import DiskState, Status
from quorumfs.errors import ExitCode, UserError
from quorumfs.replica.ofdlock import try_lock

MOUNTPOINT = "/mnt/vdisk"

LONG = 2 << 20
"""Bytes of an answer that no socket takes at once."""


def refuse(_: dict[str, Any]) -> dict[str, Any]:
    error = UserError("not while it is mounted")
    error.exit_code = ExitCode.NEEDS_OPERATOR
    raise error


COMMANDS: Mapping[str, server.Command] = {
    "echo": lambda request: {"request": request},
    "refuse": refuse,
    "fail": lambda request: {"never": request["missing"]},
    "long": lambda _: {"text": "x" * LONG},
    "wide": lambda _: {"text": "x" * (client.ANSWER_MAX // 2)},
    "odd": lambda _: {"path": os.fsdecode(b"/a\xff\n")},
    "unspeakable": lambda _: {"set": {1}},
}


@asynccontextmanager
async def serving(path: Path) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, path, COMMANDS)
        yield
        nursery.cancel_scope.cancel()


class Talk:
    """A client that says what it likes, line by line."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._received = b""

    async def say(self, line: bytes) -> None:
        await self.stream.send_all(line)

    async def hear(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            piece = await self.stream.receive_some()
            assert piece, "closed instead of an answer"
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    async def is_closed(self) -> bool:
        try:
            return not self._received and await self.stream.receive_some() == b""
        except trio.BrokenResourceError:
            return True


@asynccontextmanager
async def talking(path: Path) -> AsyncIterator[Talk]:
    async with await open_stream(path) as stream:
        yield Talk(stream)


async def open_stream(path: Path) -> trio.SocketStream:
    channel = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await channel.connect(os.fspath(path))
    return trio.SocketStream(channel)


ECHO = b'{"command": "echo"}\n'


# The server


async def test_one_object_a_line_in_one_a_line_out(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(b'{"command": "echo", "more": [1]}\n')
        assert await talk.hear() == {"request": {"command": "echo", "more": [1]}}
        await talk.say(ECHO + ECHO)  # several at once, on the same connection
        assert await talk.hear() == await talk.hear() == {"request": {"command": "echo"}}
        for byte in ECHO:
            await talk.say(bytes([byte]))
        assert "request" in await talk.hear()


async def test_the_last_line_may_lack_its_end(tmp_path: Path) -> None:
    """``printf '{"command": "status"}' | socat - UNIX:…`` gets its answer."""
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(ECHO.rstrip())
        await talk.stream.send_eof()
        assert "request" in await talk.hear()
        assert await talk.is_closed()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"status",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b'{"command": null}',
        b'{"command": ["echo"]}',
        b'{"command": "echo"',
        b"[" * 60_000,
        b"1" * 60_000,
        b'"\\ud800"',
    ],
)
async def test_garbage_gets_an_error_and_does_no_harm(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(line + b"\n")
        answer = await talk.hear()
        assert answer["problem"] == "bad-request"
        assert "JSON object" in answer["error"]
        await talk.say(ECHO)
        assert "request" in await talk.hear()


async def test_an_unknown_command_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(b'{"command": "explode"}\n')
        answer = await talk.hear()
    assert answer["problem"] == "unknown-command"
    assert answer["error"].endswith("there are: echo, refuse, fail, long, wide, odd, unspeakable")


@pytest.mark.parametrize("command", ["fail", "unspeakable"])
async def test_a_failing_command_is_that_request_s_trouble_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, command: str
) -> None:
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(json.dumps({"command": command}).encode() + b"\n")
        assert (await talk.hear())["problem"] == "internal"
        await talk.say(ECHO)
        assert "request" in await talk.hear()
    assert caplog.records[0].exc_info


async def test_a_refusal_keeps_its_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(b'{"command": "refuse"}\n')
        assert await talk.hear() == {
            "error": "not while it is mounted",
            "problem": "refused",
            "exit_code": 3,
        }


async def test_a_path_of_any_bytes_is_plain_ascii_on_the_way(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(b'{"command": "odd"}\n')
        assert os.fsencode((await talk.hear())["path"]) == b"/a\xff\n"


@pytest.mark.parametrize("end", [b"", b"\n"])
async def test_a_line_too_long_ends_the_connection(tmp_path: Path, end: bytes) -> None:
    """However long it would have become, no more than a little over the limit is kept."""
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk, talking(path) as other:
        line = (b"x" * server.LINE_MAX + b"x" + end) * 100
        with pytest.raises(trio.BrokenResourceError):
            await talk.say(line)
        await other.say(ECHO)
        assert "request" in await other.hear()


async def test_a_line_too_long_is_told_why(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        await talk.say(b"x" * (server.LINE_MAX + 1))
        assert await talk.hear() == {
            "error": f"more than {server.LINE_MAX} bytes",
            "problem": "bad-request",
        }
        assert await talk.is_closed()


async def test_a_client_that_stalls_is_dropped_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One says nothing, one half a request, one takes no answer: others are answered at once."""
    monkeypatch.setattr(server, "PATIENCE_S", 0.3)
    path = tmp_path / "s"
    async with (
        serving(path),
        talking(path) as deaf,
        talking(path) as silent,
        talking(path) as halfway,
        talking(path) as quick,
    ):
        await halfway.say(b'{"comm')
        await deaf.say(b'{"command": "long"}\n')
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(0.2):
            await quick.say(ECHO)
            assert "request" in await quick.hear()
        with trio.fail_after(5):
            assert await silent.is_closed()
            assert await halfway.is_closed()
            received = 0
            while piece := await deaf.stream.receive_some():
                received += len(piece)
            assert received < LONG


async def test_a_client_that_dies_is_no_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s"
    async with serving(path):
        for line in (b"", b'{"comm', ECHO, b'{"command": "long"}\n'):
            async with talking(path) as talk:
                await talk.say(line)
        await trio.testing.wait_all_tasks_blocked(0.05)
        async with talking(path) as talk:
            await talk.say(ECHO)
            assert "request" in await talk.hear()
    assert not caplog.records


async def test_many_silent_clients_keep_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit the one silent longest goes: neither the new one nor the one that asks."""
    monkeypatch.setattr(server, "CLIENTS_MAX", 3)
    path = tmp_path / "s"
    async with (
        serving(path),
        talking(path) as first,
        talking(path) as second,
        talking(path) as third,
    ):
        await trio.testing.wait_all_tasks_blocked(0.05)
        await first.say(ECHO)
        await first.hear()
        await trio.testing.wait_all_tasks_blocked(0.05)
        async with talking(path) as fourth:
            await fourth.say(ECHO)
            assert "request" in await fourth.hear()
            with trio.fail_after(1):
                assert await second.is_closed()
            for other in (first, third):
                await other.say(ECHO)
                assert "request" in await other.hear()


async def test_only_the_owner_may_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode 0600, and the kernel is asked who is at the other end."""
    path = tmp_path / "s"
    async with serving(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # As seen by a daemon of another user: to it we are a stranger, unless we are root.
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        async with talking(path) as talk:
            if os.getuid() == 0:
                await talk.say(ECHO)
                assert "request" in await talk.hear()
            else:
                assert (await talk.hear())["problem"] == "permission-denied"


async def test_a_stranger_is_told_so_and_not_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_is_ours", lambda _: False)
    path = tmp_path / "s"
    async with serving(path), talking(path) as talk:
        assert (await talk.hear())["problem"] == "permission-denied"
        assert await talk.is_closed()


async def test_a_socket_left_behind_is_replaced_and_ours_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    async with serving(path), talking(path) as talk:
        await talk.say(ECHO)
        assert "request" in await talk.hear()
    assert not path.exists()


async def test_without_a_socket_the_daemon_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, tmp_path / "no" / "directory", COMMANDS)
        nursery.cancel_scope.cancel()
    assert "no status and no control" in caplog.text


# The client


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime directory of a mount at `MOUNTPOINT` that the kernel's table has."""
    mount = mounts.Mount(MOUNTPOINT, mounts.FS_TYPE, os.geteuid())
    monkeypatch.setattr(mounts, "mount_at", {MOUNTPOINT: mount}.get)
    monkeypatch.setattr(mounts, "is_dead", lambda _: True)
    monkeypatch.setattr(runtime, "directories", lambda *_: [tmp_path / "none", tmp_path])
    return tmp_path


def socket_path(home: Path) -> Path:
    return runtime.path_for(MOUNTPOINT, "sock", home)


@contextmanager
def daemon(path: Path, live: Callable[[socket.socket], object]) -> Iterator[None]:
    """Something that listens at *path*, and does with each connection what *live* says."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def serve() -> None:
            channel, _ = listener.accept()
            with channel, suppress(BrokenPipeError):
                live(channel)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join(5)
        assert not thread.is_alive()


async def test_ask_gets_the_answer(home: Path) -> None:
    def ask_echo() -> dict[str, Any]:
        return client.ask(MOUNTPOINT, "echo", more=1)

    async with serving(socket_path(home)):
        answer = await trio.to_thread.run_sync(ask_echo)
    assert answer == {"request": {"command": "echo", "more": 1}}


async def test_two_ask_at_the_same_time(home: Path) -> None:
    answers: list[dict[str, Any]] = []

    def ask(command: str) -> None:
        answers.append(client.ask(MOUNTPOINT, command))

    async with serving(socket_path(home)), trio.open_nursery() as nursery:
        for command in ("wide", "echo", "wide", "echo"):
            nursery.start_soon(trio.to_thread.run_sync, ask, command)
    assert sorted(len(json.dumps(answer)) > 1000 for answer in answers) == [
        False,
        False,
        True,
        True,
    ]


async def test_what_the_daemon_refuses_is_an_error_of_the_command(home: Path) -> None:
    def ask(command: str) -> client.ControlError:
        with pytest.raises(client.ControlError) as caught:
            client.ask(MOUNTPOINT, command)
        return caught.value

    async with serving(socket_path(home)):
        refused = await trio.to_thread.run_sync(ask, "refuse")
        unknown = await trio.to_thread.run_sync(ask, "explode")
    assert str(refused) == f"{MOUNTPOINT}: not while it is mounted"
    assert refused.exit_code is ExitCode.NEEDS_OPERATOR
    assert isinstance(unknown, client.ProtocolError)
    assert "another version" in str(unknown)
    assert "'explode'" in str(unknown)


def test_what_is_not_mounted_is_said_so(home: Path) -> None:
    with pytest.raises(client.NotMountedError, match="is not a quorumfs mount") as caught:
        client.ask("/elsewhere", "status")
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_mount_is_found_by_any_path_without_looking_at_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looking at a mount point asks its daemon, which may be stopped: its parents are enough."""
    place = tmp_path / "real" / "mnt"
    place.mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "direct").symlink_to("real/mnt")
    looked_at: list[str] = []
    realpath = os.path.realpath

    def look(path: str) -> str:
        looked_at.append(path)
        return realpath(path)

    monkeypatch.setattr(os.path, "realpath", look)
    mount = mounts.Mount(str(place), mounts.FS_TYPE, 0)
    monkeypatch.setattr(mounts, "mount_at", {str(place): mount}.get)
    monkeypatch.chdir(tmp_path)
    assert client.find("real/../link/mnt/") is mount
    assert client.find(str(place)) is mount
    assert str(place) not in looked_at
    assert str(tmp_path / "link" / "mnt") not in looked_at
    assert client.find("direct") is mount


@pytest.mark.parametrize("left", ["nothing", "socket"])
def test_a_dead_mount_is_named_with_what_to_do(home: Path, left: str) -> None:
    if left == "socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(socket_path(home)))
    with pytest.raises(client.DaemonGoneError, match=f"quorumfs umount {MOUNTPOINT}") as caught:
        client.ask(MOUNTPOINT, "status")
    assert caught.value.exit_code is ExitCode.UNUSABLE


def test_a_note_that_a_killed_daemon_left_misleads_nobody(home: Path) -> None:
    """Its file system's number is another one's by now, which may have left no note."""
    mount = mounts.Mount(MOUNTPOINT, mounts.FS_TYPE, os.geteuid(), "0:7")
    (home / "0-7.at").write_text("/elsewhere")
    with runtime.Finder() as finder:
        assert finder.place_of(mount) == MOUNTPOINT
    claim = runtime.claim("/elsewhere")
    try:
        with runtime.Finder() as finder:
            assert finder.place_of(mount) == "/elsewhere"
    finally:
        claim.give_up()


def test_a_disk_that_answers_is_not_said_to_be_dead(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever believes that unmounts it under its guest."""
    monkeypatch.setattr(mounts, "is_dead", lambda _: False)
    with pytest.raises(client.DaemonGoneError, match="not found, and the disk answers"):
        client.ask(MOUNTPOINT, "status")


def test_the_log_of_a_daemon_that_is_gone_or_silent_is_named(home: Path) -> None:
    runtime.note_log(runtime.path_for(MOUNTPOINT, "log", home), "/var/log/vdisk")
    with pytest.raises(client.DaemonGoneError, match="see its log: /var/log/vdisk; "):
        client.ask(MOUNTPOINT, "status")
    with (
        daemon(socket_path(home), lambda channel: channel.recv(1 << 16) and channel.recv(1)),
        pytest.raises(client.NoAnswerError, match=r"see its log: /var/log/vdisk$"),
    ):
        client.ask(MOUNTPOINT, "status", timeout_s=0.1)


def test_what_a_user_notes_cannot_steer_root_s_terminal(home: Path) -> None:
    runtime.note_log(runtime.path_for(MOUNTPOINT, "log", home), "/var/log/\x1b[2J")
    with pytest.raises(client.DaemonGoneError, match="see its log; "):
        client.ask(MOUNTPOINT, "status")


def test_a_daemon_that_ends_meanwhile_is_gone(home: Path) -> None:
    with (
        daemon(socket_path(home), lambda channel: channel.recv(3)),  # and closes
        pytest.raises(client.DaemonGoneError),
    ):
        client.ask(MOUNTPOINT, "status")


def test_half_an_answer_is_none(home: Path) -> None:
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(b'{"schema": 1}')),
        pytest.raises(client.DaemonGoneError),
    ):
        client.ask(MOUNTPOINT, "status")


def test_a_daemon_without_a_socket_is_of_another_version(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.Finder, "daemon_pid", lambda *_: 4711)
    with pytest.raises(client.ProtocolError, match=r"pid 4711 serves .* without a control socket"):
        client.ask(MOUNTPOINT, "status")


def test_a_daemon_that_does_not_answer_is_given_up(home: Path) -> None:
    """Stopped with SIGSTOP, the kernel still takes connections for it."""
    with socket.socket(socket.AF_UNIX) as stopped:
        stopped.bind(os.fspath(socket_path(home)))
        stopped.listen()
        with pytest.raises(client.NoAnswerError, match=r"within 0\.1 s") as caught:
            client.ask(MOUNTPOINT, "status", timeout_s=0.1)
    assert caught.value.exit_code is ExitCode.UNUSABLE


def test_a_full_queue_of_a_stopped_daemon_is_no_answer_either(home: Path) -> None:
    path = socket_path(home)
    with socket.socket(socket.AF_UNIX) as stopped, socket.socket(socket.AF_UNIX) as waiting:
        stopped.bind(os.fspath(path))
        stopped.listen(0)
        waiting.connect(os.fspath(path))
        with pytest.raises(client.NoAnswerError):
            client.ask(MOUNTPOINT, "status", timeout_s=0.2)


def test_a_daemon_that_dribbles_is_given_up_too(home: Path) -> None:
    """The time is for the whole answer, not for each piece of it."""
    ended = threading.Event()

    def dribble(channel: socket.socket) -> None:
        while not ended.wait(0.05):
            channel.sendall(b" ")

    with daemon(socket_path(home), dribble):
        with pytest.raises(client.NoAnswerError):
            client.ask(MOUNTPOINT, "status", timeout_s=0.3)
        ended.set()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400",
        b"\xff",
        b"[]",
        b"null",
        b"[" * 9999,
        b'{"schema": NaN}',
        b'{"schema": ' + b"1" * 9999 + b"}",
        b'{"schema": true}',
        b'{"schema": 1}',
        b'{"schema": "2"}',
        b"{}",
        b'{"error": ["no"]}',
        b'{"error": "' + b"x" * 9999 + b'"}',
        b"x" * (client.ANSWER_MAX + 1),
    ],
    ids=lambda answer: answer[:20],
)
def test_what_answers_and_is_no_quorumfs_is_said_so(home: Path, answer: bytes) -> None:
    """With whose it is, and where; it is as bad as no answer."""
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(answer + b"\n")),
        pytest.raises(client.InvalidAnswerError, match="is no quorumfs") as caught,
    ):
        client.status(MOUNTPOINT)
    assert caught.value.exit_code is ExitCode.UNUSABLE
    assert f"for {MOUNTPOINT} at {socket_path(home)}, of root" in str(caught.value)


def test_a_status_of_another_schema_is_another_version(home: Path) -> None:
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(b'{"schema": 2}\n')),
        pytest.raises(client.ProtocolError, match="another version of quorumfs") as caught,
    ):
        client.status(MOUNTPOINT)
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("exit_code", [0, 130, 3.0, [3], "3", None])
def test_a_refusal_is_never_a_success(home: Path, exit_code: object) -> None:
    line = json.dumps({"error": "no", "exit_code": exit_code}).encode() + b"\n"
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(line)),
        pytest.raises(client.ControlError) as caught,
    ):
        client.ask(MOUNTPOINT, "status")
    assert caught.value.exit_code is ExitCode.FAILED


def test_nobody_speaks_for_a_mount_that_is_not_its_own(home: Path) -> None:
    line = json.dumps(a_status("/mnt/roots-own").to_json()).encode() + b"\n"
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(line)),
        pytest.raises(client.InvalidAnswerError, match="another mount point"),
    ):
        client.status(MOUNTPOINT)


def test_another_user_s_mount_is_not_permitted(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = mounts.Mount(MOUNTPOINT, mounts.FS_TYPE, 0)
    monkeypatch.setattr(mounts, "mount_at", {MOUNTPOINT: mount}.get)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(client.NotPermittedError, match="a mount of root") as caught:
        client.ask(MOUNTPOINT, "status")
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_socket_that_somebody_else_put_there_is_not_asked(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below /tmp anybody may have made the directory first."""
    monkeypatch.setattr(client, "_peer_uid", lambda _: os.geteuid() + 1)
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(b'{"schema": 1}\n')),
        pytest.raises(client.DaemonGoneError),
    ):
        client.ask(MOUNTPOINT, "status")


# Many at once, of several users


def a_status(mountpoint: str) -> Status:
    return Status(mountpoint, 1, None, None, 4096, DiskState.HEALTHY, "fifo", 1, ())


class Several:
    def __init__(self, home: Path, stack: ExitStack) -> None:
        self.home, self.stack = home, stack
        self.mounts: list[mounts.Mount] = []

    def add(self, place: str, live: Callable[[socket.socket], object] | None) -> None:
        """A mount whose daemon lives so; None: it is stopped."""
        path = runtime.path_for(place, "sock", self.home)
        self.mounts.append(mounts.Mount(place, mounts.FS_TYPE, os.geteuid()))
        if live is not None:
            self.stack.enter_context(daemon(path, live))
            return
        stopped = self.stack.enter_context(socket.socket(socket.AF_UNIX))
        stopped.bind(os.fspath(path))
        stopped.listen()


@pytest.fixture
def several(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Several]:
    """Mounts of several users, whose sockets are all in *home*, and all let root in."""
    monkeypatch.setattr(client, "_peer_uid", lambda _: os.geteuid())
    with ExitStack() as stack:
        yield Several(home, stack)


def honest(place: str) -> Callable[[socket.socket], object]:
    line = json.dumps(a_status(place).to_json()).encode() + b"\n"
    return lambda channel: channel.sendall(line)


def test_one_that_answers_badly_or_never_hides_nobody(several: Several) -> None:
    """All are asked at once, and within the time of one, however many do not answer."""
    for number in range(40):
        several.add(f"/stopped{number}", None)
    several.add("/odd", lambda channel: channel.sendall(b'{"schema": 1, "size": "x"}\n'))
    several.add("/flood", lambda channel: channel.sendall(b"x" * (16 << 20)))
    several.add("/good", honest("/good"))
    began = time.monotonic()
    answers = client.statuses(several.mounts, timeout_s=2)
    assert time.monotonic() - began < 20
    assert answers[-1] == a_status("/good")
    assert [type(answer) for answer in answers[:-1]] == [
        *[client.NoAnswerError] * 40,
        *[client.InvalidAnswerError] * 2,
    ]


def test_nobody_waits_where_there_is_nobody_to_wait_for(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = mounts.Mount("/gone", mounts.FS_TYPE, os.geteuid())
    with monkeypatch.context() as patch:
        patch.setattr("selectors.DefaultSelector.select", None)  # where it would wait
        (answer,) = client.statuses([gone])
    assert isinstance(answer, client.DaemonGoneError)


def test_the_answers_of_one_user_are_bounded_together(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large answer may be, a thousand of them may not."""
    monkeypatch.setattr(client, "ANSWERS_MAX", 3 << 19)
    for number in range(4):
        several.add(f"/{number}", lambda channel: channel.sendall(b" " * (1 << 19) + b"{}\n"))
    answers = client.statuses(several.mounts)
    assert any("bytes with the others" in str(answer) for answer in answers)


def test_of_each_user_one_is_asked_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own first: who has thousands of mounts keeps nobody's from being asked."""
    owners = [7, 7, 7, 8, 0, 9, 0]
    asked = [mounts.Mount(f"/{n}", mounts.FS_TYPE, owner) for n, owner in enumerate(owners)]
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert [owners[number] for number in client._by_turns(asked)] == [0, 0, 7, 8, 9, 7, 7]


# What another user put into the runtime directory


STRANGER = 12345


@pytest.fixture
def strange(home: Path) -> Iterator[Path]:
    """A runtime directory of another user, with what tells of a mount."""
    os.chmod(home, 0o755)
    for suffix, content in (("where", "/its/log"), ("word", "its word"), ("pid", "1\n")):
        path = runtime.path_for(MOUNTPOINT, suffix, home)
        path.write_text(content)
        os.chown(path, STRANGER, STRANGER)
    os.chown(home, STRANGER, STRANGER)
    yield home
    os.chown(home, 0, 0)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def secret(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_text("root's")
    path.symlink_to(other)


def hard_link(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_text("root's")
    path.hardlink_to(other)


def directory(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(os.fspath(path))


KINDS = (fifo, endless, secret, hard_link, directory, listening)


@pytest.mark.parametrize(
    ("suffix", "make"),
    [
        (suffix, make)
        for suffix in ("where", "word", "pid", "sock")
        for make in KINDS
        if (suffix, make) != ("sock", listening)  # so it ought to be
    ],
)
def test_what_is_no_file_of_theirs_is_passed_over(
    strange: Path, suffix: str, make: Callable[[Path], None]
) -> None:
    """Nothing is waited for, followed or read, whatever it is."""
    path = runtime.path_for(MOUNTPOINT, suffix, strange)
    path.unlink(missing_ok=True)
    make(path)
    if make not in (secret, hard_link):
        os.chown(path, STRANGER, STRANGER, follow_symlinks=False)
    found = asked_for(STRANGER)
    assert found == {
        "log": "its log" if suffix == "where" else "its log: /its/log",
        "word": None if suffix == "word" else "its word",
        "pid": None,
        "sockets": 0,
    }


def asked_for(uid: int) -> dict[str, object]:
    """All that a command looks for."""
    with runtime.Finder() as finder:
        sockets = list(finder.sockets(MOUNTPOINT, uid))
        for _, descriptor in sockets:
            os.close(descriptor)
        return {
            "log": finder.log_of(MOUNTPOINT, uid),
            "pid": finder.daemon_pid(MOUNTPOINT, uid),
            "sockets": len(sockets),
            "word": finder.take_word(MOUNTPOINT, uid),
        }


NOTHING = {"log": "its log", "pid": None, "sockets": 0, "word": None}


def test_a_file_under_a_lease_is_not_waited_for(strange: Path) -> None:
    """Who opens it would wait until its owner gives the lease up, or 45 s."""
    with open(runtime.path_for(MOUNTPOINT, "where", strange), "r+") as file:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        began = time.monotonic()
        with quiet(signal.SIGIO):
            assert asked_for(STRANGER)["log"] == "its log"
        assert time.monotonic() - began < 5


@contextmanager
def quiet(signum: signal.Signals) -> Iterator[None]:
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signum, before)


def test_a_long_note_is_read_in_part(strange: Path) -> None:
    os.truncate(runtime.path_for(MOUNTPOINT, "word", strange), 1 << 40)
    word = asked_for(STRANGER)["word"]
    assert isinstance(word, str)
    assert len(word) <= runtime.WORD_MAX


def test_a_directory_that_is_a_link_or_somebody_else_s_is_passed_over(
    strange: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked_for(STRANGER + 1) == NOTHING
    link = strange.parent / f"{strange.name}-link"
    link.symlink_to(strange)
    os.chown(link, STRANGER, STRANGER, follow_symlinks=False)
    monkeypatch.setattr(runtime, "directories", lambda *_: [link])
    assert asked_for(STRANGER) == NOTHING


@pytest.mark.parametrize("fs_type", ["fuse.anything", "fuse", "fuseblk", None])
def test_what_a_user_may_serve_is_not_looked_into(
    strange: Path, monkeypatch: pytest.MonkeyPatch, fs_type: str | None
) -> None:
    """A user's own file system, mounted over the directory, need never answer."""
    assert asked_for(STRANGER)["log"] == "its log: /its/log"
    numbers = iter(range(1000))
    monkeypatch.setattr(runtime, "_mount_id", lambda _: next(numbers))
    monkeypatch.setattr(mounts, "fs_type_of", lambda _: fs_type)
    assert asked_for(STRANGER) == NOTHING
    monkeypatch.setattr(mounts, "fs_type_of", lambda _: "tmpfs")  # as /run/user/UID is one
    runtime.path_for(MOUNTPOINT, "where", strange)
    assert asked_for(STRANGER)["log"] == "its log: /its/log"


@pytest.mark.parametrize("content", ["1\n", "0\n", "-1\n", "x", "", "99999999999\n", "1" * 99])
def test_a_number_that_is_no_process_of_theirs_is_none(strange: Path, content: str) -> None:
    """Process 1 is root's: nobody is made to wait for it."""
    path = runtime.path_for(MOUNTPOINT, "pid", strange)
    path.write_text(content)
    with locked_elsewhere(path):
        assert asked_for(STRANGER)["pid"] is None


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR)
    assert try_lock(descriptor, 0, 0, exclusive=True)
    yield
    os.close(descriptor)


# The daemon's claim


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the usual directory is to be, on a machine with nothing but a /tmp.

    Below a short path, for that of a socket may have 107 bytes.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        usual = Path(name, "tmp", "quorumfs-0")
        usual.parent.mkdir()
        monkeypatch.setattr(runtime, "SHARED", usual.parent)
        monkeypatch.setattr(
            runtime, "directories", lambda _, given=None: [given, usual] if given else [usual]
        )
        monkeypatch.setattr(runtime, "_may_be_private", lambda _: True)
        yield usual


def test_a_claim_is_found_kept_and_given_up(places: Path) -> None:
    claim = runtime.claim(MOUNTPOINT)
    assert claim.home == places
    assert stat.S_IMODE(places.stat().st_mode) == 0o700
    assert runtime.daemon_pid(MOUNTPOINT, 0) == os.getpid()
    with pytest.raises(UserError, match="is being mounted by another"):
        runtime.claim(MOUNTPOINT)
    claim.give_up()
    assert runtime.daemon_pid(MOUNTPOINT, 0) is None
    assert list(places.iterdir()) == []


def test_a_name_that_somebody_took_is_done_without(places: Path) -> None:
    """Each command finds the private one, and the next mount uses the same."""
    places.mkdir()
    os.chown(places, STRANGER, STRANGER)
    claim = runtime.claim(MOUNTPOINT)
    assert claim.home != places
    assert claim.home.parent == places.parent
    assert runtime.daemon_pid(MOUNTPOINT, 0) == os.getpid()
    assert runtime.daemon_pid(MOUNTPOINT, STRANGER) is None
    places.rmdir()  # they let go of it
    assert runtime.daemon_pid(MOUNTPOINT, 0) == os.getpid()
    with pytest.raises(UserError, match="is being mounted by another"):
        runtime.claim(MOUNTPOINT)
    places.symlink_to("/etc")
    other = runtime.claim("/mnt/other")
    assert other.home == claim.home
    for each in (claim, other):
        each.give_up()


def test_of_a_thousand_names_only_theirs_are_looked_into(places: Path) -> None:
    for number in range(1000):
        path = places.parent / f"quorumfs-0-{number}"
        path.mkdir()
        os.chown(path, STRANGER, STRANGER)
    claim = runtime.claim(MOUNTPOINT, None)
    assert runtime.daemon_pid(MOUNTPOINT, 0) == os.getpid()
    claim.give_up()


def test_a_directory_that_is_given_is_used_or_refused(places: Path) -> None:
    given = places.parent / "given"
    claim = runtime.claim(MOUNTPOINT, given)
    assert claim.home == given
    assert runtime.daemon_pid(MOUNTPOINT, 0) is None
    assert runtime.daemon_pid(MOUNTPOINT, 0, given) == os.getpid()
    claim.give_up()
    refusal = f"runtime directory {given}: %s; --runtime-dir"
    given.chmod(0o777)
    with pytest.raises(UserError, match=refusal % "others may write to it"):
        runtime.claim(MOUNTPOINT, given)
    os.chown(given, STRANGER, STRANGER)
    with pytest.raises(UserError, match=refusal % "it belongs to somebody else"):
        runtime.claim(MOUNTPOINT, given)
    given.rmdir()
    given.touch()
    with pytest.raises(UserError, match=refusal % "it is no directory"):
        runtime.claim(MOUNTPOINT, given)
    with pytest.raises(UserError, match="too long for a socket"):
        runtime.claim(MOUNTPOINT, places.parent / ("x" * 99))
    with pytest.raises(UserError, match="No such file"):
        runtime.claim(MOUNTPOINT, places.parent / "no" / "such")


def test_the_last_word_has_its_space_beforehand(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmount must not look well because the word of its failure found no space."""
    claim = runtime.claim(MOUNTPOINT)
    allocated = claim.path("word").stat().st_blocks
    assert allocated
    claim.leave_word("the last flush failed\udcff" + "x" * 9999)
    assert claim.path("word").stat().st_blocks == allocated
    claim.give_up()
    with runtime.Finder() as finder:
        word = finder.take_word(MOUNTPOINT, 0)
        assert word is not None
        assert word.startswith("the last flush failed")
        assert finder.take_word(MOUNTPOINT, 0) is None


def test_no_space_leaves_nothing_behind(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_may_be_private", lambda _: False)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match=f"{places}: No space left on device; --runtime-dir"):
            runtime.claim(MOUNTPOINT)
    assert list(places.iterdir()) == []
    runtime.claim(MOUNTPOINT).give_up()


def test_only_root_of_a_user_namespace_heeds_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/elsewhere")
    monkeypatch.setattr(runtime, "in_user_namespace", lambda: False)
    assert runtime.directories(0) == [Path("/run/quorumfs")]
    assert Path("/elsewhere/quorumfs") not in runtime.directories(1000)
    monkeypatch.setattr(runtime, "in_user_namespace", lambda: True)
    assert runtime.directories(0)[1] == Path("/elsewhere/quorumfs")
    assert Path("/elsewhere/quorumfs") not in runtime.directories(1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert runtime.directories(0) == [Path("/run/quorumfs"), Path("/tmp/quorumfs-0")]


def test_the_kernel_s_table_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Octal escapes for odd characters; a mount that another one covers is not there, and one that
    is shown at two places is one."""
    table = (
        b"22 1 0:21 / / rw - ext4 /dev/sda rw\n"
        b"30 22 0:40 / /mnt/a\\040b rw - fuse.quorumfs x rw,user_id=7,group_id=7\n"
        b"31 22 0:41 / /mnt/covered rw - fuse.quorumfs x rw,user_id=7,group_id=7\n"
        b"32 31 0:42 / /mnt/covered rw - tmpfs tmpfs rw\n"
        b"34 22 0:40 / /mnt/bind rw - fuse.quorumfs x rw,user_id=7,group_id=7\n"
        b"35 22 0:44 / /mnt/c rw - fuse.quorumfs x rw,user_id=7,group_id=7\n"
        b"33 22 0:43 / /mnt/other rw - fuse.sshfs - rw,user_id=7,group_id=7\n"
    )
    monkeypatch.setattr(Path, "read_bytes", lambda _: table)
    assert mounts.of_quorumfs() == [
        first := mounts.Mount("/mnt/a b", "fuse.quorumfs", 7, "0:40", "x"),
        mounts.Mount("/mnt/c", "fuse.quorumfs", 7, "0:44", "x"),
    ]
    assert mounts.first_of(replace(first, mountpoint="/mnt/bind")) == first
