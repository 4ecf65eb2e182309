"""A write that the fast path began, and that the disk has to finish."""

import errno
from collections.abc import Sequence

from quorumfs.disk.mirror import Mirror
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.replica.fanout import FanOut
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation


class Taken:
    """A write under way, from the moment it is taken over: one of the disk's own, with a lock."""

    def __init__(
        self,
        mirror: Mirror,
        offset: int,
        data: bytes,
        done: Sequence[Replica],
        at_work: Replica,
    ) -> None:
        """*data* at *offset* (bytes) was written to *done*; the write to *at_work* has begun.

        No other replica has it. No claim may conflict.
        """
        self.offset = offset
        self.data = data
        self.claim = mirror.locks.adopt(offset, offset + len(data))
        self.claim.changes = ((offset, offset + len(data)),)
        self.losses = mirror.metadata.losses
        """`Metadata.losses` when the write began."""
        self.fan_out = FanOut(mirror.threshold)
        self.outcomes: list[Outcome] = []
        mirror.requests += 1
        for replica in mirror.ledger.begin(offset, len(data)):
            operation = Operation(Kind.WRITE, offset, len(data), data)
            self.outcomes.append(Outcome(replica, operation))
            if replica in done or replica is at_work:
                self.fan_out.adopt(replica, operation)
            else:
                self.fan_out.submit(replica, operation)
            if replica in done:
                replica.returned(operation, None)
            elif replica is at_work:
                self._at_work, self._operation = replica, operation

    def returned(self, error: OSError | None) -> None:
        """Take the outcome of the write that had begun. After EAGAIN it is submitted anew."""
        if error is not None and error.errno == errno.EAGAIN:
            self._at_work.resubmit(self._operation)
        else:
            self._at_work.returned(self._operation, error)
