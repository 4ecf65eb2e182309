"""Votes that are answered before all have answered, in simulated storage."""

import errno
from itertools import product

import pytest
import trio
from support.simulated import Bench, Fault, fails, make_bench, takes
from trio.testing import MockClock

from quorumfs.decisions.patterns import Blkverify, Comparing, Quorum
from quorumfs.decisions.voting import unassailable, vote_data
from quorumfs.disk.earlyvote import GRACE_S
from quorumfs.metadata.ledger.knowledge import Outcome
from quorumfs.repair.rewrite import Rewriting
from quorumfs.replica.storage import Kind, Operation

BLOCK = 4096
NEAR_S = 0.0001
FAR_S = 0.02
GOOD, BAD, WORSE = (letter * BLOCK for letter in (b"g", b"b", b"w"))


@pytest.fixture
def bench(nursery: trio.Nursery) -> Bench:
    return far_bench(nursery, Quorum(2))


def far_bench(
    nursery: trio.Nursery, pattern: Quorum, repairer: type[Rewriting] | None = None
) -> Bench:
    """Three replicas that hold the same, the first of which is far, as it was known to be."""
    bench = make_bench(nursery, 3, pattern=pattern, threshold=2, repairer=repairer)
    for file, seconds in zip(bench.files, (FAR_S, NEAR_S, NEAR_S), strict=True):
        file.choose = takes(seconds, Kind.READ)
        file.content[:BLOCK] = GOOD
    first, late = bench.disk.replicas[0], bench.disk.mirror.late_answers
    late.begin(first)
    late.came(Outcome(first, Operation(Kind.READ)), b"", 1.0)
    return bench


async def timed(bench: Bench, wanted: bytes = GOOD) -> float:
    """Read a block; how long (seconds) that took."""
    began = trio.current_time()
    assert await bench.disk.read(0, BLOCK) == wanted
    return trio.current_time() - began


def mismatches(bench: Bench) -> list[int]:
    return [replica.counters.mismatches for replica in bench.disk.replicas]


def reads(bench: Bench) -> list[int]:
    return [file.count(Kind.READ) for file in bench.files]


@pytest.mark.parametrize("voters", range(1, 6))
def test_what_is_decided_early_is_what_all_decide(voters: int) -> None:
    """Whatever the others answer, and in whatever order they are listed."""
    versions = (GOOD, BAD, WORSE)
    for threshold, ballots in product(range(1, voters + 1), product(versions, repeat=voters)):
        verdict = vote_data(list(enumerate(ballots)), 0, threshold)
        for version in versions:
            if unassailable(ballots.count(version), voters, threshold):
                assert verdict.data == version
                assert all(loss.strict for loss in verdict.outvoted)


async def test_a_vote_waits_a_little_for_those_that_are_not_known_to_be_late(
    bench: Bench, autojump_clock: MockClock
) -> None:
    """Once: what usually takes as long is compared before the guest is answered."""
    await timed(bench)
    await trio.sleep(1)
    bench.files[0].choose = takes(GRACE_S / 2, Kind.READ)
    assert await timed(bench) == pytest.approx(NEAR_S)
    await trio.sleep(1)
    bench.files[0].content[:BLOCK] = BAD
    assert await timed(bench) == pytest.approx(GRACE_S / 2)
    assert mismatches(bench) == [1, 0, 0]
    bench.files[0].choose = takes(FAR_S, Kind.READ)
    assert await timed(bench) == pytest.approx(NEAR_S + GRACE_S)
    assert await timed(bench) == pytest.approx(NEAR_S)


async def test_a_far_replica_costs_a_vote_nothing(bench: Bench, autojump_clock: MockClock) -> None:
    assert await timed(bench) == pytest.approx(NEAR_S)
    await trio.sleep(1)
    assert (reads(bench), mismatches(bench)) == ([1, 1, 1], [0, 0, 0])


async def test_a_late_answer_that_differs_is_told_once(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.files[0].content[:BLOCK] = BAD
    assert await timed(bench) == pytest.approx(NEAR_S)
    await trio.sleep(1)
    assert mismatches(bench) == [1, 0, 0]
    (event,) = bench.told
    assert (event.name, event.members["node-name"]) == ("QUORUM_REPORT_BAD", "r0")


async def test_a_late_answer_that_differs_is_repaired(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    bench = far_bench(nursery, Quorum(2), Rewriting)
    bench.files[0].content[:BLOCK] = BAD
    await timed(bench)
    await trio.sleep(1)
    assert bytes(bench.files[0].content[:BLOCK]) == GOOD


async def test_a_late_answer_that_fails_is_told(bench: Bench, autojump_clock: MockClock) -> None:
    far = bench.files[0]
    far.choose = lambda operation: Fault(FAR_S, errno.EIO)
    await timed(bench)
    await trio.sleep(1)
    assert {event.name for event in bench.told} == {"QUORUM_REPORT_BAD"}


async def test_a_write_in_between_is_no_mismatch(bench: Bench, autojump_clock: MockClock) -> None:
    """P8: what comes late is newer than what was read."""
    for _ in range(10):
        await timed(bench)
        await bench.disk.write(0, BAD)
        await timed(bench, BAD)
        await bench.disk.write(0, GOOD)
        await trio.sleep(1)
    assert (mismatches(bench), bench.told) == ([0, 0, 0], [])


async def test_the_wrong_one_may_be_first(bench: Bench, autojump_clock: MockClock) -> None:
    """The vote waits for as many as are needed to be sure."""
    bench.files[1].content[:BLOCK] = BAD
    assert await timed(bench) == pytest.approx(FAR_S)
    assert mismatches(bench) == [0, 1, 0]


async def test_one_that_fails_is_no_voter(bench: Bench, autojump_clock: MockClock) -> None:
    bench.files[1].choose = fails(errno.EIO, Kind.READ)
    assert await timed(bench) == pytest.approx(FAR_S)


async def test_a_replica_far_behind_gets_no_more_reads(
    bench: Bench, autojump_clock: MockClock
) -> None:
    """Else writes would wait behind ever more of them."""
    for _ in range(100):
        assert await timed(bench) == pytest.approx(NEAR_S)
    assert bench.files[0].in_flight_max == 1
    assert reads(bench)[0] == 1
    await trio.sleep(1)
    await timed(bench)
    assert reads(bench)[0] == 2


async def test_one_that_is_behind_is_asked_where_the_others_differ(
    bench: Bench, autojump_clock: MockClock
) -> None:
    await timed(bench)
    bench.files[1].content[:BLOCK] = BAD
    assert await timed(bench) > FAR_S / 2


@pytest.mark.parametrize("pattern", [Comparing(2), Blkverify(2)])
async def test_a_comparison_waits_for_all(
    pattern: Quorum, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    assert await timed(far_bench(nursery, pattern)) == pytest.approx(FAR_S)


async def test_a_mark_write_mostly_takes_no_vote_away(
    bench: Bench, autojump_clock: MockClock
) -> None:
    """Two of three that are read agree early; with the two that are not, they could be outvoted."""
    bench.disk.mirror.read_order.write_mostly = frozenset({"r0"})
    assert await timed(bench) == pytest.approx(NEAR_S)
    assert reads(bench) == [0, 1, 1]


async def test_a_hung_one_costs_one_timeout_where_the_others_differ(
    bench: Bench, autojump_clock: MockClock
) -> None:
    """What was answered before counts towards the threshold when the rest is asked."""
    bench.files[0].choose = takes(3600, Kind.READ)
    await timed(bench)
    bench.files[1].content[:BLOCK] = BAD
    began = trio.current_time()
    with pytest.raises(OSError, match="Input/output error"):
        await bench.disk.read(0, BLOCK)
    assert trio.current_time() - began < 10


async def test_a_late_answer_tells_of_a_truncation(bench: Bench, autojump_clock: MockClock) -> None:
    """Also if the image has its length back, with zeros, before it is read again."""
    far = bench.files[0]
    far.choose, far.truncated = takes(FAR_S, Kind.READ), True
    await timed(bench)
    await trio.sleep(1.1 * FAR_S)
    far.truncated = False
    await trio.sleep(1)
    first = bench.disk.replicas[0]
    assert list(bench.disk.ledger.missed(first)) == [(0, bench.disk.size)]


async def test_a_comparison_that_fails_is_no_failure_of_a_guest(
    bench: Bench, autojump_clock: MockClock
) -> None:
    bench.files[0].content[:BLOCK] = BAD
    await timed(bench)
    for file in bench.files[1:]:
        file.choose = fails(errno.EIO, Kind.READ)
    requests = bench.disk.mirror.requests
    await trio.sleep(1)
    assert {event.name for event in bench.told} == {"QUORUM_REPORT_BAD"}
    assert bench.disk.mirror.requests == requests
