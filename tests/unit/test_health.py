"""Errors of a replica, counted and forgotten."""

import errno

import pytest

from quorumfs.replica.health import Health, Sort
from quorumfs.replica.storage import Kind, Operation, TruncatedError


def failed(health: Health, kind: Kind, error: OSError, *, to_sidecar: bool = False) -> None:
    operation = Operation(kind, 0, 512, bytes(512))
    operation.error = error
    if not to_sidecar:
        health.counters.count(operation)
    health.failed(operation, error, 1.0, to_sidecar=to_sidecar)


@pytest.mark.parametrize("gone", [errno.ENOTCONN, errno.ESHUTDOWN, errno.ESTALE, errno.ENODEV])
def test_a_file_system_is_gone_until_it_answers_otherwise(gone: int) -> None:
    health = Health()
    health.answered(OSError(gone, "gone"))
    assert health.dead
    health.answered(OSError(errno.EIO, "error"))
    assert not health.dead


def test_forgetting_errors_keeps_what_still_stands() -> None:
    health = Health()
    for kind in (Kind.READ, Kind.WRITE, Kind.SYNC):
        failed(health, kind, OSError(errno.EIO, "error"))
    failed(health, Kind.READ, TruncatedError(512))
    failed(health, Kind.WRITE, OSError(errno.ETIMEDOUT, "no answer"))
    failed(health, Kind.WRITE, OSError(errno.EIO, "error"), to_sidecar=True)
    health.counters.mismatches = 2
    health.answered(OSError(errno.ENOTCONN, "gone"))
    reads = health.counters.reads
    assert health.forget_errors() == 5 + 1 + 2
    assert health.forget_errors() == 0
    assert (health.counters.reads, health.dead, health.truncated_to) == (reads, True, 512)
    assert [failure.sort for failure in health.failures] == [Sort.SIDECAR]
    assert not health.overcome(health.failures[0])
    health.sidecar_synced()
    assert not health.failures
