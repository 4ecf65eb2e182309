"""Claims of mounts that are not there."""

from typing import Any

from quorumfs.decisions.claim import Claim

HERE = Claim(
    mount=1,
    machine="m1",
    boot="b1",
    namespace="n1",
    pid=100,
    started=1000,
    host="here",
    since="2026-01-01 00:00:00 UTC",
)


def claim(**changes: Any) -> Claim:
    """That of a mount of another host, with some members changed."""
    members: dict[str, Any] = {
        "mount": 2,
        "machine": "m2",
        "boot": "b2",
        "namespace": "n2",
        "pid": 4711,
        "started": 2000,
        "host": "nas1",
        "since": "2026-01-02 00:00:00 UTC",
    }
    return Claim(**members | changes)
