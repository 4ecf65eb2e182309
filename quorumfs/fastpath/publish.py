"""From what Python knows to the gate: the only place where C is told what it may serve."""

import ctypes
from collections.abc import Sequence

from quorumfs.decisions.dirtymap import plane_bits
from quorumfs.decisions.latency import BOUNDS_NS
from quorumfs.decisions.patterns import ends_early
from quorumfs.disk.mirror import Mirror
from quorumfs.fastpath.native import RANGES, REPLICAS, Gate, GatePlane, GateReplica, KeepsOut, Range
from quorumfs.metadata.ledger.knowledge import Writable
from quorumfs.replica.fastfile import FastFile
from quorumfs.replica.replica import Replica

Ranges = list[tuple[int, int, int]]
"""Start, end (bytes), and which requests are kept out (`KeepsOut`)."""


class Publisher:
    """Fills in one gate from the state of one disk."""

    def __init__(self, gate: Gate, mirror: Mirror, *, keep_zeros: bool, writes: bool) -> None:
        """*keep_zeros*: aligned writes of zeros become another operation: the long way.

        *writes*: whether any write may be served at all.
        """
        self._gate = gate
        self._mirror = mirror
        self._writes = writes
        self._planes: Sequence[bytearray] = ()
        """The map that C sees."""
        self._views: list[ctypes.Array[ctypes.c_char]] = []
        """Keep that map from moving; made at the first write that C may serve."""
        self._places: list[GatePlane] = []
        """What the gate says of each plane."""
        gate.chunk_size = 1
        gate.bounds_ns[:] = BOUNDS_NS
        gate.keep_zeros = keep_zeros

    def publish_nothing(self) -> None:
        """Have C serve nothing."""
        self._gate.readers = self._gate.writers = 0

    def publish(self) -> bool:
        """Fill in the gate; whether C serves anything."""
        gate = self._gate
        gate.size = self._mirror.size
        ranges = self._locked()
        gate.readers = self._publish_readers()
        gate.writers = self._publish_writers(ranges) if self._writes else 0
        if len(ranges) > RANGES:
            self.publish_nothing()
            return False
        gate.ranges = len(ranges)
        for place, (start, end, keeps_out) in enumerate(ranges):
            gate.range[place] = Range(start, end, keeps_out)
        return bool(gate.readers or gate.writers)

    def _locked(self) -> Ranges:
        """What the range lock keeps from C: a shared claim keeps out writes alone."""
        both = KeepsOut.READS | KeepsOut.WRITES
        return [
            (claim.start, claim.end, both if claim.exclusive else KeepsOut.WRITES)
            for claim in self._mirror.locks.claims
        ]

    def _publish_readers(self) -> int:
        """Publish the replicas that a read asks; returns how many, 0 for the long way."""
        holders, pattern = self._mirror.ledger.uniform_members, self._mirror.pattern
        if not holders:
            return 0
        order = self._mirror.read_order
        given = first = order.of(holders, pattern).first
        if ends_early(pattern):
            first = self._mirror.late_answers.asked(given, len(holders), pattern.threshold)
        asked = pattern.ask_now(len(first), 0)
        if asked < pattern.needed(len(first) - asked):
            return 0
        # Where replicas may differ the long way chooses among all holders, in the order given.
        as_given = first[:asked] == list(holders[: pattern.ask_now(len(holders), 0)])
        if not as_given and (
            order.undecided or self._mirror.ledger.unverified(0, self._mirror.size)
        ):
            return 0
        return _publish(self._gate.reader, first[:asked], to_read=True)

    def _publish_writers(self, ranges: Ranges) -> int:
        """Publish the replicas that a write goes to, and what it needs; as `_publish_readers`."""
        writable = self._mirror.ledger.writable()
        if writable is None:
            return 0
        self._publish_map(writable)
        ranges += ((start, end, KeepsOut.WRITES) for start, end in writable.kept_out)
        return _publish(self._gate.writer, writable.receivers, to_read=False)

    def _publish_map(self, writable: Writable) -> None:
        gate = self._gate
        gate.chunk_size = writable.chunk_size
        if self._planes is not writable.planes:
            self._planes = writable.planes
            gate.planes = len(writable.planes)
            self._views = [(ctypes.c_char * len(one)).from_buffer(one) for one in writable.planes]
            self._places = gate.plane[: len(writable.planes)]
            for place, view in zip(self._places, self._views, strict=True):
                place.states = ctypes.addressof(view)
        for number, place in enumerate(self._places):
            place.mask = plane_bits(writable.mask, number)
            place.wanted = plane_bits(writable.wanted, number)


def _publish(
    places: "ctypes.Array[GateReplica]", replicas: Sequence[Replica], *, to_read: bool
) -> int:
    """Fill in *places* with *replicas*; returns how many, 0 if C may not use one of them."""
    if len(replicas) > REPLICAS:
        return 0
    for place, replica in zip(places, replicas, strict=False):
        file: FastFile | None = replica.fast_file
        if file is None or (to_read and not file.reads) or replica.index >= REPLICAS:
            return 0
        place.fd, place.slot, place.memory = file.fd, replica.index, file.memory
        place.durations = replica.health.addresses[to_read]
        place.regions = file.regions
    return len(replicas)
