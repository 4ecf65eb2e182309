"""A TCP relay that delays what passes: the latency of a longer way."""

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PIECE = 1 << 16
_PIECES_IN_FLIGHT = 256
"""What a line this long holds: 16 MiB; more waits at its begin."""


class Relay:
    """Passes connections on to the server; half of `round_trip_s` in each direction."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.round_trip_s = 0.0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for each in [self._listener, *self._sockets]:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sockets.append(each)
            self._pass_on(near, far)
            self._pass_on(far, near)

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        line: queue.Queue[tuple[float, bytes]] = queue.Queue(_PIECES_IN_FLIGHT)

        def take() -> None:
            data = b" "
            while data:
                try:
                    data = source.recv(_PIECE)
                except OSError:
                    data = b""
                line.put((time.monotonic() + self.round_trip_s / 2, data))

        def give() -> None:
            while True:
                due, data = line.get()
                if (early := due - time.monotonic()) > 0:
                    time.sleep(early)
                with suppress(OSError):  # whoever has gone needs nothing, and the line is emptied
                    if data:
                        sink.sendall(data)
                    else:
                        sink.shutdown(socket.SHUT_WR)
                if not data:
                    return

        for task in (take, give):
            threading.Thread(target=task, daemon=True).start()


@contextmanager
def relay(target: tuple[str, int]) -> Iterator[Relay]:
    made = Relay(target)
    try:
        yield made
    finally:
        made.close()
