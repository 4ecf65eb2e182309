"""The quorumfs command, without the time that Python takes to start.

Nearly all that a short command costs is the import of its modules, and the tests run thousands of
them. So a process that has imported everything (`main`, in a process of its own) waits to be
forked, and the child becomes the command: with the working directory, the environment, the
standard streams and the command line that a new process would have, and it ends as one does.

What depends on the start itself (limits, masks and streams that are handed down, the script, other
users, a kill at any step) is tested with commands that are started anew.
"""

import atexit
import contextlib
import ctypes
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

COMMAND = [sys.executable, "-m", "quorumfs"]
"""The command, as the Python that runs the tests has it installed."""

LONGEST = 1 << 18
"""Bytes of a request: arguments and environment."""

_ROOM = " " * (1 << 14)
"""An argument of the waiting process that means nothing: a command line of its child fits there."""


# In the tests


class _Waiting:
    """A process that waits to be forked, as long as this one lives."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno()), _ROOM],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        atexit.register(self._end)

    def _end(self) -> None:
        self._ours.close()
        self._process.wait()

    def ask(self, request: Mapping[str, object], fds: Sequence[int]) -> None:
        """Have a child become a command that has *fds* as its standard streams; the last one is
        told its process id, and then its exit code.
        """
        socket.send_fds(self._ours, [json.dumps(request).encode()], fds)


_waiting: dict[frozenset[tuple[str, str]], _Waiting] = {}
_lock = threading.Lock()


def _process() -> _Waiting:
    """One that imported our modules in an environment which means the same to them."""
    ours = frozenset(item for item in os.environ.items() if item[0].startswith("QUORUMFS_"))
    with _lock:
        if ours not in _waiting:
            _waiting[ours] = _Waiting()
        return _waiting[ours]


def run(
    arguments: Sequence[str], timeout_s: float, script: str | None = None
) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run` does with the command, capturing what it says as text.

    With *script*, that Python program is run instead, and finds our modules imported.

    Raises `subprocess.TimeoutExpired`; then, as after any error here, the command is killed.
    """
    command = COMMAND if script is None else [sys.executable, script]
    request = {
        "script": script,
        "shown": [*command, *arguments],
        "arguments": arguments,
        "directory": os.getcwd(),
        "environment": dict(os.environ),
    }
    with contextlib.ExitStack() as stack:
        pipes = [os.pipe() for _ in range(3)]
        for reader, _ in pipes:
            stack.callback(os.close, reader)
        try:
            _process().ask(request, [0, *(writer for _, writer in pipes)])
        finally:
            for _, writer in pipes:
                os.close(writer)
        out, err, outcome = (bytearray() for _ in pipes)
        try:
            said = zip(pipes, (out, err, outcome), strict=True)
            _read_all({reader: text for (reader, _), text in said}, timeout_s)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(outcome.split()[0]), signal.SIGKILL)
            raise
    _, exit_code = outcome.split()
    return subprocess.CompletedProcess(
        [*command, *arguments], int(exit_code), out.decode(), err.decode()
    )


def _read_all(texts: dict[int, bytearray], timeout_s: float) -> None:
    """Read pipes to their ends. Raises `subprocess.TimeoutExpired`."""
    deadline = time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        for reader in texts:
            selector.register(reader, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired(COMMAND, timeout_s)
            for key, _ in ready:
                if data := os.read(key.fd, 1 << 16):
                    texts[key.fd] += data
                else:
                    selector.unregister(key.fd)


# In the process that waits


def _await_command(requests: socket.socket) -> str | None:
    """Return in a child that is to be the command, or the script named; end with whoever asks."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who watches a command
    while True:
        request, fds, _, _ = socket.recv_fds(requests, LONGEST, 4)
        if not request:
            os._exit(0)
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if (command := os.fork()) == 0:
                requests.detach()
                return _become(json.loads(request), fds)
            _watch(command, fds)
        for fd in fds:
            os.close(fd)


def _watch(command: int, fds: Sequence[int]) -> NoReturn:
    """Tell its process id, and then its exit code; keep none of its streams open."""
    *streams, outcome = fds
    for fd in streams:
        os.close(fd)
    os.write(outcome, b"%d\n" % command)
    _, status = os.waitpid(command, 0)
    os.write(outcome, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _become(request: dict[str, Any], fds: Sequence[int]) -> str | None:
    """Be what a new process with this *request* would be; returns the script to run, if any."""
    for stream, fd in enumerate(fds[:3]):
        os.dup2(fd, stream)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[1:] = request["arguments"]
    _show(request["shown"])
    script: str | None = request["script"]
    return script


def _show(arguments: Sequence[str]) -> None:
    """Have *arguments* as the command line in ``/proc``, where tests look for a command.

    It is written over our own, in the memory where the kernel looks for it (proc(5): arg_start).
    """
    text = b"".join(os.fsencode(argument) + b"\0" for argument in arguments)
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        start, end = map(int, file.read().rpartition(")")[2].split()[45:47])
    assert len(text) <= end - start, "a longer command line than there is room for"
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def main() -> None:
    """Import all that a command may need, and be one whenever one is asked for."""
    from quorumfs import cli
    from quorumfs.mount import life as mounting  # noqa: F401

    script = _await_command(socket.socket(fileno=int(sys.argv[1])))
    if script is None:
        cli.main()
    else:
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
