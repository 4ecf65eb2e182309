"""Replicas that are tried again."""

import errno
import os
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from quorumfs.decisions.model import Standing
from quorumfs.errors import UserError
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.rejoin import Rejoin, Returned
from quorumfs.repair.resync import Resync
from quorumfs.replica.replica import Replica


class _Refusing:
    """An `Opener` that opens nothing."""

    def __init__(self, reopen: Callable[[Replica], Coroutine[Any, Any, Returned]]) -> None:
        self.reopen = reopen

    async def is_lost(self, replica: Replica) -> bool:
        return False


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOENT, os.strerror(errno.ENOENT), "/b.img"), "No such file or directory"),
        (UserError("/b.img is in use"), "/b.img is in use"),
    ],
    ids=["OSError", "UserError"],
)
def test_why_a_current_replica_cannot_be_opened_is_said_in_words(
    error: OSError | UserError, reason: str
) -> None:
    """What ``status`` shows to a reader is no Python."""

    async def reopen(_: Replica) -> Returned:
        raise error

    async def reopen_member() -> Replica:
        replica = Replica(0, "/b.img", None, 8.0)
        replica.standing = Standing.CURRENT
        rejoin = Rejoin(
            cast("Sidecars", SimpleNamespace(ledger=None)),
            cast("Resync", None),
            _Refusing(reopen),
            {},
        )
        assert not await rejoin.reopen_member(replica)
        return replica

    assert trio.run(reopen_member).reason == reason


def test_a_replica_that_is_to_be_tried_at_once_waits_for_nothing() -> None:
    """However rarely it was tried last."""
    tried = 0

    async def reopen(_: Replica) -> Returned:
        nonlocal tried
        tried += 1
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))

    async def attempts() -> None:
        replica = Replica(0, "/b.img", None, 8.0, slot=0)
        replica.standing = Standing.STALE
        ledger = SimpleNamespace(members=[object()])
        rejoin = Rejoin(
            cast("Sidecars", SimpleNamespace(ledger=ledger)),
            cast("Resync", None),
            _Refusing(reopen),
            {},
        )
        assert rejoin.may_come_back(replica)
        for _ in range(3):
            assert not await rejoin.rejoin(replica)
        assert tried == 1
        rejoin.try_at_once(replica)
        assert not await rejoin.rejoin(replica)
        assert tried == 2
        replica.standing = Standing.OFFLINE
        assert not rejoin.may_come_back(replica)

    trio.run(attempts)
