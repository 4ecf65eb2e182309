"""Which mount has the set: the claims in the sidecars, read back every few seconds.

A mount that finds the claim of a different mount is *fenced*: it never touches the files again.
"""

import errno
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from quorumfs.decisions.claim import CHECK_S, Claim, Tenure, decode_claim, encode_claim
from quorumfs.decisions.sidecar import CLAIM_OFFSET, PAGE
from quorumfs.metadata.ledger.ledger import Ledger
from quorumfs.metadata.writer import SidecarWriter
from quorumfs.replica.fanout import FanOut, carry_out
from quorumfs.replica.looking import look_after
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind, Operation
from quorumfs.replica.ticks import Rhythm


class Claims:
    """The claims of one set's mounts."""

    def __init__(
        self,
        ledger: Ledger,
        writer: SidecarWriter,
        tenure: Tenure | None,
    ) -> None:
        """*tenure* judges the claims; None: no claim is ever read."""
        self.tenure = tenure or Tenure(None)
        self.fenced: Claim | None = None
        """The mount that took the set over; None: the set is ours. A fenced mount does no I/O."""
        self.when_fenced: Callable[[Claim], None] = lambda _: None
        self._watched = tenure is not None
        self._ledger = ledger
        self._writer = writer

    async def watch(self, rhythm: Rhythm) -> None:
        """Check every `CHECK_S` seconds whether the set is still ours, until cancelled.

        The checks go on while the set is idle, though not as often: a read of the page cache,
        without waking a disk, on local file systems; a small request to the server on shared ones.
        """
        if self._watched:  # a hung replica must not hide other claims
            pause = partial(rhythm.until_tick, CHECK_S)
            await look_after(lambda: self._ledger.replicas, self._look_at, pause)

    async def _look_at(self, replica: Replica) -> None:
        if replica in self._ledger.membership.receivers and replica.attached:
            await self.look([replica])

    async def look(self, replicas: Sequence[Replica]) -> dict[Replica, Claim]:
        """Read the claims in the sidecars of *replicas* back; returns those that can be read."""
        claims: dict[Replica, Claim] = {}
        if not self._watched or self.fenced is not None:
            return claims
        asked = [Operation(Kind.REREAD, CLAIM_OFFSET, PAGE) for _ in replicas]
        await carry_out(zip(replicas, asked, strict=True), to_sidecar=True)
        for replica, operation in zip(replicas, asked, strict=True):
            if operation.error is None and isinstance(operation.value, bytes | bytearray):
                claim = decode_claim(bytes(operation.value))
                if claim is None:
                    continue
                claims[replica] = claim
                if self.tenure.lost_to(claim):
                    self._fence(claim)
        return claims

    def _fence(self, claim: Claim) -> None:
        """Stop all I/O on the files for good: the set belongs to the mount of *claim*."""
        if self.fenced is not None:
            return
        self.fenced = claim
        for replica in self._ledger.membership.receivers:
            # On a network file system, pages cached on this host would be written back later, over
            # newer data. The new mount still waits for late writes (`NOTICE_S`): sync now.
            replica.submit(Operation(Kind.SYNC), FanOut(0))
        for replica in self._ledger.replicas:
            replica.fence()
        self._ledger.fence()
        self.when_fenced(claim)

    def require_ours(self) -> None:
        """Raise `OSError` (EIO) if a different mount has the set."""
        if self.fenced is not None:
            raise OSError(errno.EIO, f"fenced: the set was taken over by {self.fenced}")

    async def release(self) -> None:
        """Release the claim for other mounts; nothing is written afterwards."""
        mine = self.tenure.mine
        if mine is None:
            return
        signed = [r for r in self._ledger.replicas if r.attached and r.standing.is_ours]
        await self._unsign(signed, mine)

    async def release_one(self, replica: Replica) -> None:
        """As `release`, of *replica* alone, which is still open."""
        if self.tenure.mine is not None:
            await self._unsign([replica], self.tenure.mine)

    async def _unsign(self, replicas: Sequence[Replica], mine: Claim) -> None:
        claims = await self.look(replicas)
        if self.fenced is not None:
            return
        pages = {}
        for replica in replicas:  # each claim names the file that it is in
            known = claims.get(replica, mine)
            own = replace(mine, file=known.file, turn=known.turn)
            pages[replica] = CLAIM_OFFSET, encode_claim(own.release())
        await self._writer.put(replicas, pages)
