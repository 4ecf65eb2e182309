"""Whose the set is: the claims in the sidecars, read back again and again.

A mount that finds another one's claim is *fenced*: it has nothing to do with the files any more.
"""

import errno
from collections.abc import Callable, Sequence

import trio

from quorumfs.decisions.claim import CHECK_S, Claim, Tenure, decode_claim, encode_claim
from quorumfs.decisions.model import Standing
from quorumfs.decisions.sidecar import CLAIM_OFFSET, PAGE
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.metadata.writer import SidecarWriter
from quorumfs.replica.replica import FanOut, Replica
from quorumfs.replica.storage import Kind, Operation


class Claims:
    """The claims of one set's mounts."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        ledger: Ledger,
        writer: SidecarWriter,
        tenure: Tenure | None,
    ) -> None:
        """*tenure*: what the claims are judged by; None: they are not looked at."""
        self.tenure = tenure or Tenure(None)
        self.fenced: Claim | None = None
        """The mount that has the set instead of this one, which reads and writes nothing more."""
        self.when_fenced: Callable[[Claim], None] = lambda _: None
        self._watched = tenure is not None
        self._replicas = tuple(replicas)
        self._ledger = ledger
        self._writer = writer

    async def watch(self) -> None:
        """Look again and again whether the set is still this mount's, until cancelled.

        Also while it is idle: on this host's own file systems that is a look into the page cache,
        which wakes no disk, and where others can write, a small request to a server.
        """
        if not self._watched:
            return
        async with trio.open_nursery() as nursery:  # one that hangs must not hide what others say
            for replica in self._replicas:
                nursery.start_soon(self._watch, replica)

    async def _watch(self, replica: Replica) -> None:
        while self.fenced is None:
            await trio.sleep(CHECK_S)
            if replica in self._ledger.membership.receivers and replica.attached:
                await self.look([replica])

    async def look(self, replicas: Sequence[Replica]) -> None:
        """Read the claims in these sidecars back. One that cannot be read tells nothing."""
        if not self._watched or self.fenced is not None:
            return
        fan_out = FanOut(0)
        asked = [Operation(Kind.REREAD, CLAIM_OFFSET, PAGE) for _ in replicas]
        for replica, operation in zip(replicas, asked, strict=True):
            fan_out.submit(replica, operation, to_sidecar=True)
        await fan_out.complete()
        for operation in asked:
            if operation.error is None and isinstance(operation.value, bytes | bytearray):
                claim = decode_claim(bytes(operation.value))
                if claim is not None and self.tenure.lost_to(claim):
                    self._fence(claim)

    def _fence(self, claim: Claim) -> None:
        """Have nothing to do with the files any more, for good: they are *claim*'s."""
        if self.fenced is not None:
            return
        self.fenced = claim
        for replica in self._ledger.membership.receivers:
            # What this host has cached and not written yet, on a network file system, it would
            # write some time later, over what is newer. Now the other one still waits for it.
            replica.submit(Operation(Kind.SYNC), FanOut(0))
        for replica in self._replicas:
            replica.fence()
        self._ledger.fence()
        self.when_fenced(claim)

    def require_ours(self) -> None:
        """Raise `OSError` (EIO) if the set is another mount's."""
        if self.fenced is not None:
            raise OSError(errno.EIO, f"fenced: the set was taken over by {self.fenced}")

    async def release(self) -> None:
        """Let other mounts have the set; nothing is written afterwards."""
        mine = self.tenure.mine
        if mine is None:
            return
        away = (Standing.FOREIGN, Standing.MISSING)
        signed = [r for r in self._replicas if r.attached and r.standing not in away]
        await self.look(signed)
        if self.fenced is None:
            await self._writer.put(signed, (CLAIM_OFFSET, encode_claim(mine.release())))
