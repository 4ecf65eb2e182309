"""What C decides about requests, against the same rules in plain Python: random, and very many.

``cd tests && python -m support.gate_decisions 10000000 [SEED]`` takes some minutes.
"""

import ctypes
import random
import sys
from dataclasses import dataclass

from quorumfs.decisions.latency import Durations
from quorumfs.fastpath.native import (
    HANDLES,
    JOURNAL,
    PLANES,
    RANGES,
    REPLICAS,
    Gate,
    KeepsOut,
    Range,
    Request,
    RequestKind,
)
from support.native import gate_library

BLOCK = 4096
REQUEST_MAX = 1 << 20
PER_GATE = 64
"""Requests decided on with one gate."""

UNWATCHED = Durations()


@dataclass
class Situation:
    """What a gate says, and which chunks may be written to."""

    size: int
    chunk_size: int
    planes: list[tuple[bytes, int, int]]
    """Of each plane of the map: a byte per chunk, mask, wanted."""
    keep_zeros: bool
    readers: list[int]
    """The slots of the replicas."""
    writers: list[int]
    ranges: list[tuple[int, int, int]]
    journal: list[int]


@dataclass
class Asked:
    """A request."""

    kind: RequestKind
    handle: int
    offset: int
    data: bytes

    @property
    def end(self) -> int:
        return self.offset + len(self.data)

    def chunks(self, size: int) -> range:
        """The chunks of *size* bytes that it touches."""
        return range(self.offset // size, -(-self.end // size))


def admits(gate: Situation, asked: Asked) -> bool:
    """Whether C may serve the request."""
    reads = asked.kind is RequestKind.READ
    if asked.end > gate.size or asked.handle >= HANDLES:
        return False
    for start, end, keeps_out in gate.ranges:
        kept_out = keeps_out & (KeepsOut.READS if reads else KeepsOut.WRITES)
        if kept_out and max(start, asked.offset) < min(end, asked.end):
            return False
    if reads:
        return bool(gate.readers)
    chunks = asked.chunks(gate.chunk_size)
    aligned = asked.offset % BLOCK == 0 and len(asked.data) % BLOCK == 0
    if gate.keep_zeros and aligned and not any(asked.data):
        return False
    if not gate.writers or len(gate.journal) + len(chunks) > JOURNAL:
        return False
    return all(
        states[chunk] & mask == wanted for states, mask, wanted in gate.planes for chunk in chunks
    )


def random_situation(dice: random.Random) -> Situation:
    chunk_size = dice.choice([512, 4096, 1 << 16, 1 << 20])
    size = dice.choice([chunk_size * dice.randint(1, 40) - dice.randint(0, 511), 1 << 62])
    chunks = min(-(-size // chunk_size), 64)
    planes = []
    for _ in range(dice.choice([0, 1, 1, 2, PLANES]) if size < 1 << 62 else 0):
        mask = dice.randrange(256)
        wanted = mask & dice.randrange(256)
        good = [wanted | dice.randrange(256) & ~mask for _ in range(chunks)]
        states = bytes(dice.randrange(256) if dice.random() < 0.1 else one for one in good)
        planes.append((states, mask, wanted))
    ranges = []
    for _ in range(dice.choice([0, 0, 1, 3, RANGES])):
        start = dice.randrange(min(size, 1 << 22))
        ranges.append((start, start + dice.randint(1, 2 * chunk_size), dice.randrange(4)))
    full = dice.choice([0, 0, 0, 1, JOURNAL - 3, JOURNAL - 1, JOURNAL])
    slots = list(range(REPLICAS))
    readers, writers = (
        dice.sample(slots, dice.choice([0, 1, 2, 3, 3, REPLICAS])) for _ in range(2)
    )
    keep_zeros = dice.random() < 0.5
    return Situation(
        size,
        chunk_size,
        planes,
        keep_zeros,
        readers,
        writers,
        ranges,
        [dice.randrange(chunks) for _ in range(full)],
    )


def random_request(dice: random.Random, gate: Situation) -> Asked:
    kind = RequestKind.READ if dice.random() < 0.4 else RequestKind.WRITE
    handle = dice.choice([0, 1, HANDLES - 1, HANDLES, 1 << 63]) if dice.random() < 0.2 else 5
    size = gate.size
    near = [dice.randrange(min(size, 1 << 22)), size - 1, size - 512, size, (1 << 64) - 512]
    near += [
        gate.chunk_size * dice.randrange(8),
        *(place for start, end, _ in gate.ranges[:4] for place in (start, end)),
    ]
    lengths = [1, 512, BLOCK, 2 * BLOCK, min(gate.chunk_size, 1 << 16), dice.randint(1, 20_000)]
    length = dice.choice(lengths)
    offset = dice.choice(near) + dice.choice([0, 0, 0, 0, -1, 1, 512, -length, 1 - length])
    if dice.random() < 0.3:
        offset = offset // BLOCK * BLOCK
    offset = min(max(offset, 0), (1 << 64) - 1)
    data = bytearray(length)
    if dice.random() < 0.7:  # a single bit, often the last, tells it from zeros
        data[dice.choice([0, -1, dice.randrange(length)])] = 1 << dice.randrange(8)
    return Asked(kind, handle, offset, bytes(data))


def fill(gate: Gate, said: Situation) -> object:
    """Fill in *gate*; what it points to lives as long as the result."""
    ctypes.memset(ctypes.byref(gate), 0, ctypes.sizeof(gate))
    gate.size, gate.chunk_size = said.size, said.chunk_size
    gate.keep_zeros, gate.planes = said.keep_zeros, len(said.planes)
    gate.readers, gate.writers = len(said.readers), len(said.writers)
    gate.ranges = len(said.ranges)
    for places, slots in ((gate.reader, said.readers), (gate.writer, said.writers)):
        for place, slot in enumerate(slots):
            places[place].slot = slot
            places[place].durations = UNWATCHED.address
    for place, one in enumerate(said.ranges):
        gate.range[place] = Range(*one)
    gate.journalled = len(said.journal)
    gate.journal[: len(said.journal)] = said.journal
    kept = []
    for place, (states, mask, wanted) in zip(gate.plane, said.planes, strict=False):
        kept.append(ctypes.create_string_buffer(states, len(states)))
        place.states, place.mask, place.wanted = ctypes.addressof(kept[-1]), mask, wanted
    return kept


def left_behind(gate: Gate, request: Asked) -> object:
    """What a request leaves behind: of what it may change, all that it did."""
    counted = [(one.reads, one.bytes_read, one.writes, one.bytes_written) for one in gate.counters]
    return (
        gate.requests,
        counted,
        gate.journal[: gate.journalled],
        request.handle < HANDLES and gate.wrote[request.handle],
    )


def expected_behind(said: Situation, asked: Asked) -> object:
    """What a served request has to leave behind, the first with its gate."""
    length = len(asked.data)
    counted = [(0, 0, 0, 0)] * REPLICAS
    journal = list(said.journal)
    reads = asked.kind is RequestKind.READ
    for slot in said.readers if reads else said.writers:
        counted[slot] = (1, length, 0, 0) if reads else (0, 0, 1, length)
    if not reads:
        for chunk in asked.chunks(said.chunk_size):
            if journal[-1:] != [chunk]:
                journal.append(chunk)
    return 1, counted, journal, int(not reads)


def decide(decisions: int, seed: int) -> int:
    """Compare so many decisions, or a few more; returns how many requests were admitted."""
    dice, gate, admitted = random.Random(seed), Gate(), 0
    for _ in range(-(-decisions // PER_GATE)):
        said = random_situation(dice)
        kept = fill(gate, said)
        for number in range(PER_GATE):
            asked = random_request(dice, said)
            admitted += _compare(gate, said, asked, note=number == PER_GATE - 1)
        del kept
    return admitted


def _compare(gate: Gate, said: Situation, asked: Asked, *, note: bool) -> bool:
    """Compare a decision, and what is left behind if *note*; returns the decision."""
    library = gate_library()
    request = Request(asked.kind, len(asked.data), 1, asked.handle, asked.offset)
    request.data = ctypes.cast(ctypes.c_char_p(asked.data), ctypes.c_void_p).value
    decision = bool(library.gate_admits(gate, request))
    assert decision is admits(said, asked), (said, asked)
    if decision and note:
        library.gate_note(gate, request, None)
        assert left_behind(gate, asked) == expected_behind(said, asked), (said, asked)
    return decision


if __name__ == "__main__":
    COUNT, *SEED = map(int, sys.argv[1:])
    print(f"{decide(COUNT, *SEED or [1])} of {COUNT} admitted, and no other")
