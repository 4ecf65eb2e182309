"""The control socket: what it answers, and that no client can harm another, or the disk."""

import json
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from quorumfs.control import client, mounts, runtime, server
from quorumfs.errors import ExitCode, UserError

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
    assert answer["error"].endswith("there are: echo, refuse, fail, long, odd, unspeakable")


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
    monkeypatch.setattr(runtime, "directories", lambda _: [tmp_path / "none", tmp_path])
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
        for command in ("long", "echo", "long", "echo"):
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
    monkeypatch.setattr(runtime, "daemon_pid", lambda *_: 4711)
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


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400\n", b"\xff\n", b"[]\n", b"null\n", b"[" * 9999])
def test_what_answers_and_is_no_quorumfs_is_said_so(home: Path, answer: bytes) -> None:
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(answer.rstrip() + b"\n")),
        pytest.raises(client.ProtocolError, match="is no quorumfs") as caught,
    ):
        client.ask(MOUNTPOINT, "status")
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("answer", [{"schema": 2}, {"schema": 1}, {}])
def test_a_status_of_another_schema_is_another_version(
    home: Path, answer: dict[str, object]
) -> None:
    line = json.dumps(answer).encode() + b"\n"
    with (
        daemon(socket_path(home), lambda channel: channel.sendall(line)),
        pytest.raises(client.ProtocolError, match="another version of quorumfs"),
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


def test_the_kernel_s_table_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Octal escapes for odd characters; a mount that another one covers is not there."""
    table = (
        b"22 1 0:21 / / rw - ext4 /dev/sda rw\n"
        b"30 22 0:40 / /mnt/a\\040b rw - fuse.quorumfs x rw,user_id=7,group_id=7\n"
        b"31 22 0:41 / /mnt/covered rw - fuse.quorumfs x rw,user_id=7,group_id=7\n"
        b"32 31 0:42 / /mnt/covered rw - tmpfs tmpfs rw\n"
        b"33 22 0:43 / /mnt/other rw - fuse.sshfs - rw,user_id=7,group_id=7\n"
    )
    monkeypatch.setattr(Path, "read_bytes", lambda _: table)
    assert client.visible_mounts() == [mounts.Mount("/mnt/a b", "fuse.quorumfs", 7)]
