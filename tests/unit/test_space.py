"""What ``df`` is told is true of the stores, and waits for none of them."""

from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from quorumfs.decisions.model import Standing
from quorumfs.fuse.operations import DiskOperations
from quorumfs.options.parsing import parse_options
from quorumfs.replica.filestorage import FileStorage
from quorumfs.replica.space import LOOK_S, Space
from quorumfs.replica.storage import Usage
from quorumfs.replica.ticks import Rhythm

MIB = 1 << 20


class _Store(FileStorage):
    """A file of which only the usage is asked."""

    def __init__(self, usage: Usage | None) -> None:
        self._usage = usage

    def usage(self) -> Usage | None:
        return self._usage


class _Replica:
    def __init__(self, usage: Usage | None, state: Standing = Standing.CURRENT) -> None:
        self.image: FileStorage | None = _Store(usage)
        self.state = state
        self.hung = False


def looked(replicas: list[Any]) -> Space:
    space = Space(lambda: replicas, Rhythm())

    async def run() -> None:
        with trio.move_on_after(2.5 * LOOK_S):
            await space.run()

    trio.run(run, clock=MockClock(autojump_threshold=0.01))
    return space


@pytest.mark.parametrize(
    ("usages", "left"),
    [
        ([(1, 10), (2, 7)], 7),
        ([(1, 10), (1, 10), (2, 7)], 5),
        ([(1, 10), None], 10),
        ([None, None], None),
        ([(1, None), (2, 7)], 7),  # a device has all that it needs
        ([(1, None)], None),
    ],
)
def test_the_fullest_store_decides_and_is_shared(
    usages: list[tuple[int, int | None] | None], left: int | None
) -> None:
    replicas = [_Replica(Usage(one[0], 8, one[1]) if one else None) for one in usages]
    assert looked(replicas).left == left


def test_only_what_is_current_counts() -> None:
    replicas = [_Replica(Usage(1, 8, 3), Standing.STALE), _Replica(Usage(2, 16, 9))]
    space = looked(replicas)
    assert (space.left, space.allocated) == (9, 16)
    replicas[1].state = Standing.STALE
    replicas[0].image = None
    assert space.left is None


@pytest.mark.parametrize(("left", "available"), [(None, 3 * MIB), (MIB, MIB), (9 * MIB, 3 * MIB)])
def test_df_asks_no_replica(left: int | None, available: int) -> None:
    """It would wait for one that hangs. And no inode can be used up."""
    space: Any = SimpleNamespace(left=left, allocated=MIB // 512)
    disk: Any = SimpleNamespace(mirror=SimpleNamespace(announced_size=4 * MIB))
    operations = DiskOperations(disk, parse_options([], 2), 0, space)
    context: Any = None
    answer = trio.run(operations.statfs, context)
    assert answer.f_blocks * answer.f_frsize == 4 * MIB
    assert answer.f_bfree * answer.f_frsize == 3 * MIB
    assert answer.f_bavail * answer.f_frsize == available
    assert (answer.f_files, answer.f_ffree, answer.f_favail) == (0, 0, 0)
