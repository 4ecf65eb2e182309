"""Python takes over what is stuck in C, however soon the call there returns after all."""

import ctypes

import pytest

from quorumfs.decisions.patterns import Quorum
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import EventLog
from quorumfs.disk.mirror import Mirror
from quorumfs.fastpath import path
from quorumfs.fastpath.native import SERVERS, Phase, RequestKind, Server
from quorumfs.metadata.volatile import Volatile
from quorumfs.replica.replica import Replica

SIZE = 1 << 16


class Library:
    """Stands in for the library in C: its servers, and what it was told."""

    def __init__(self) -> None:
        self.servers = (Server * SERVERS)()
        self.requeued = self.released = 0
        self.loop_receive = ctypes.c_void_p(1)

    def loop_servers(self) -> object:
        return ctypes.pointer(self.servers)

    def loop_requeue(self, _server: object) -> None:
        self.requeued += 1

    def loop_release(self, _server: object) -> None:
        self.released += 1
        self.servers[0].phase = 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(path, "library", library)
    return library


def make_disk() -> Disk:
    replicas = [Replica(index, f"r{index}", None, 1.0) for index in range(2)]
    metadata = Volatile(replicas, SIZE, 1)
    events = EventLog("disk", lambda _: None)
    return Disk(Mirror(SIZE, metadata, pattern=Quorum(1), search_s=1.0, events=events))


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "returned at once"])
async def test_a_read_that_was_taken_over_goes_the_long_way_once(
    library: Library, seen: bool
) -> None:
    disk = make_disk()
    fast = path.FastPath(disk, keep_zeros=False, writes=True)
    fast._gate.reader[1].slot = 1
    second, server = disk.replicas[1], library.servers[0]
    server.request.kind = RequestKind.READ
    if seen:
        server.phase = Phase.TAKEN | 1 << 8
        fast._look_at_servers()
        assert (library.requeued, library.released, second.in_flight) == (1, 0, 1)
    server.phase = Phase.RETURNED | 1 << 8
    fast._look_at_servers()
    assert (library.requeued, library.released, second.in_flight) == (1, 1, 0)
