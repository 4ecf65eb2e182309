"""Two network namespaces and a cable: ours, where the client is, and one for the server."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SERVER = "10.77.0.2"
_CLIENT = "10.77.0.1"
_LOSS = ["INPUT", "-m", "statistic", "--mode", "random", "--probability", "0.01", "-j", "DROP"]


def run(*command: str | Path, timeout_s: float = 120) -> str:
    """Run *command* to its end, and return what it printed.

    Raises `RuntimeError` with what it said if it fails or takes longer than *timeout_s*.
    """
    texts = [str(word) for word in command]
    process = subprocess.Popen(
        texts, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        output, complaint = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        raise RuntimeError(f"{' '.join(texts)}: no end after {timeout_s} s") from error
    except BaseException:
        process.kill()
        raise
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(texts)}: {process.returncode}: {(complaint or output).strip()}"
        )
    return output


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Raises `RuntimeError` if *what* did not happen in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not after {timeout_s:g} s: {what}")
        time.sleep(0.05)


def require_own_namespace() -> None:
    """Raises `RuntimeError` where there is a network already: the host's, perhaps."""
    interfaces = {name for _, name in socket.if_nameindex()}
    if interfaces != {"lo"}:
        raise RuntimeError(f"not in a network namespace of its own (unshare --net): {interfaces}")


class Network:
    """The server's namespace, and what runs in it."""

    def __init__(self, holder: int) -> None:
        self._holder = holder

    def enter(self, *command: str | Path) -> list[str]:
        """*command* as it is run at the server's."""
        return ["nsenter", f"--net=/proc/{self._holder}/ns/net", "--", *map(str, command)]

    def serve(self, *command: str | Path, log: Path) -> None:
        """Start a server, which goes on by itself."""
        with log.open("a") as output:
            subprocess.Popen(
                self.enter(*command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def server_processes(self) -> list[int]:
        return [pid for pid in _processes_in(self._holder) if pid != self._holder]

    def signal_server(self, signum: int) -> None:
        """Send a signal to all that runs at the server's."""
        for pid in self.server_processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def kill_server(self) -> None:
        """End all that runs at the server's, at once."""
        self.signal_server(signal.SIGKILL)
        wait_until(lambda: not self.server_processes(), "the server's processes ended")

    def end_server(self, patience_s: float) -> None:
        """End it in order, as a service manager does: what takes longer is killed."""
        self.signal_server(signal.SIGTERM)
        with suppress(RuntimeError):
            wait_until(lambda: not self.server_processes(), "they ended", patience_s)
        self.kill_server()

    def set_cable(self, state: str) -> None:
        """*state* is ``up`` or ``down``; both ends see no carrier while one is down."""
        run(*self.enter("ip", "link", "set", "server", state))

    @contextmanager
    def loss(self) -> Iterator[None]:
        """Drop 1 % of the packets in each direction."""
        sides: tuple[list[str], list[str]] = (self.enter(), [])
        # Else what is lost at once is a burst of many packets.
        run("ip", "link", "set", "client", "gso_max_segs", "1")
        run(*self.enter("ip", "link", "set", "server", "gso_max_segs", "1"))
        for side in sides:
            run(*side, "iptables-legacy", "-A", *_LOSS)
        try:
            yield
        finally:
            for side in sides:
                run(*side, "iptables-legacy", "-D", *_LOSS)


@contextmanager
def network() -> Iterator[Network]:
    """A server's namespace, joined with ours; at the end only this process runs in either."""
    run("ip", "link", "set", "lo", "up")
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"], start_new_session=True)
    try:
        own = os.readlink("/proc/self/ns/net")
        path = f"/proc/{holder.pid}/ns/net"
        wait_until(lambda: os.readlink(path) != own, "the server's network namespace is there")
        made = Network(holder.pid)
        run(
            "ip",
            "link",
            "add",
            "client",
            "type",
            "veth",
            "peer",
            "name",
            "server",
            "netns",
            str(holder.pid),
        )
        run("ip", "address", "add", f"{_CLIENT}/24", "dev", "client")
        run("ip", "link", "set", "client", "up")
        run(*made.enter("ip", "address", "add", f"{SERVER}/24", "dev", "server"))
        run(*made.enter("ip", "link", "set", "lo", "up"))
        made.set_cable("up")
        yield made
        made.kill_server()
    finally:
        end_processes(holder.pid)
        holder.wait()
        end_processes(os.getpid())
        with suppress(RuntimeError):  # it is gone with the other end
            run("ip", "link", "delete", "client")


def client_processes() -> list[str]:
    """What runs in our namespace beside this process, as its command lines."""
    lines = []
    for pid in _processes_in(os.getpid()):
        with suppress(FileNotFoundError, ProcessLookupError):
            if pid != os.getpid() and (words := Path(f"/proc/{pid}/cmdline").read_bytes()):
                lines.append(os.fsdecode(words.replace(b"\0", b" ")).strip())
    return lines


def end_processes(beside: int) -> None:
    """End what runs in the network namespace of *beside*; it too, if that is not this process."""
    for pid in _processes_in(beside):
        if pid != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _processes_in(member: int) -> list[int]:
    namespace = os.readlink(f"/proc/{member}/ns/net")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                if os.readlink(entry / "ns/net") == namespace:
                    found.append(int(entry.name))
    return found
