"""What the fast path counts of durations: one of many requests is timed, and all are counted."""

import ctypes
from bisect import bisect_left

from hypothesis import given
from hypothesis import strategies as st
from support.native import gate_library

from quorumfs.decisions.latency import BOUNDS_NS, Durations
from quorumfs.fastpath.native import Gate, Request, RequestKind

TIMED = 16  # GATE_TIMED
BLOCK = 4096
TOOK_NS = st.one_of(st.integers(0, 10**12), st.sampled_from(BOUNDS_NS))

Asked = tuple[bool, bool, list[int]]
"""Whether it reads, goes the long way, and what each of two replicas takes (nanoseconds)."""


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.lists(TOOK_NS, min_size=2, max_size=2))))
def test_requests_without_a_time_count_as_the_last_one_that_has_one(requests: list[Asked]) -> None:
    gate, library = Gate(size=1 << 20, chunk_size=BLOCK, readers=2, writers=2), gate_library()
    gate.bounds_ns[:] = BOUNDS_NS
    durations = {kind: [Durations(), Durations()] for kind in RequestKind}
    for kind, places in ((RequestKind.READ, gate.reader), (RequestKind.WRITE, gate.writer)):
        for place, one in enumerate(durations[kind]):
            places[place].durations = one.address
    expected = {kind: [[0] * (len(BOUNDS_NS) + 1) for _ in range(2)] for kind in RequestKind}
    total_ns = {kind: [0, 0] for kind in RequestKind}
    served = dict.fromkeys(RequestKind, 0)
    last: dict[RequestKind, list[int]] = {}
    for reads, long_way, took in requests:
        kind = RequestKind.READ if reads else RequestKind.WRITE
        took_ns = took
        if long_way:
            for one, nanoseconds in zip(durations[kind], took, strict=True):
                one.note((nanoseconds + 0.5) / 1e9)
            took_ns = [int((nanoseconds + 0.5) / 1e9 * 1e9) for nanoseconds in took]
        else:
            timed = library.gate_times(gate, kind)
            assert timed is (served[kind] % TIMED == 0)
            served[kind] += 1
            last[kind] = took_ns = took if timed else last[kind]
            given_ns = (ctypes.c_uint64 * 2)(*took) if timed else None
            library.gate_note(gate, Request(kind, BLOCK, 1, 0, 0, None), given_ns)
        for place, nanoseconds in enumerate(took_ns):
            expected[kind][place][bisect_left(BOUNDS_NS, nanoseconds)] += 1
            total_ns[kind][place] += nanoseconds
    for kind in RequestKind:
        assert [list(one.counts) for one in durations[kind]] == expected[kind]
        assert [one.total_ns for one in durations[kind]] == total_ns[kind]
