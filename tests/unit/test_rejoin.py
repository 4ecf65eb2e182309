"""Replicas that are tried again."""

import errno
import os
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from quorumfs.decisions.model import Found, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import Identity, RoleState, Sidecar
from quorumfs.errors import UserError
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.repair.rejoin import Rejoin, Returned
from quorumfs.repair.resync import Resync
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Storage


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


def test_an_image_that_was_overwritten_while_out_is_known_after_an_attempt_that_failed() -> None:
    """The attempt opened and closed the image anew, later than it was overwritten."""
    closed_ns, overwritten_ns = 5, 7
    record = new_record(["/a.img", "/b.img"], 1 << 20, 1).with_state([1], RoleState.STALE)
    identity = Identity(2, 1 << 20)
    role = record.roles[1]
    back = Found(
        "/b.img",
        replace(identity, ctime_ns=overwritten_ns),
        Sidecar(role.replica_id, record, record.new_map(), identity),
    )
    compared: list[bool] = []

    async def reopen(replica: Replica) -> Returned:
        if replica.health.left_ns == closed_ns:
            replica.health.left_ns = overwritten_ns
            raise UserError("/b.img is in use")
        return Returned(back, cast("Storage", object()), cast("Storage", object()))

    async def resync(_: Replica, __: Found, *, full: bool) -> None:
        compared.append(full)

    async def attempts() -> None:
        replica = Replica(1, "/b.img", None, 8.0, slot=1)
        replica.standing, replica.health.left_ns = Standing.STALE, closed_ns
        ledger = SimpleNamespace(
            members=[object()],
            record=record,
            records=SimpleNamespace(is_unfinished=lambda _: False),
            map=record.new_map(),
        )
        rejoin = Rejoin(
            cast("Sidecars", SimpleNamespace(ledger=ledger)),
            cast("Resync", SimpleNamespace(resync=resync)),
            _Refusing(reopen),
            {},
        )
        assert not await rejoin.rejoin(replica)
        rejoin.try_at_once(replica)
        assert await rejoin.rejoin(replica)

    trio.run(attempts)
    assert compared == [True]
