"""Votes: what wins, what loses, and what may never be repaired."""

import errno
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.decisions.patterns import Blkverify, Fifo, Quorum
from quorumfs.decisions.voting import (
    BLOCK,
    blocks,
    first_difference,
    majority,
    plurality,
    reconcile,
    undecided,
    vote_data,
    vote_errno,
)

X, Y, Z = (letter * BLOCK for letter in (b"x", b"y", b"z"))


@st.composite
def elections(draw: st.DrawFn) -> tuple[list[bytes], int, int]:
    """Answers of 1 to 5 replicas, the offset they begin at, and a threshold."""
    count = draw(st.integers(1, 5))
    lengths = draw(st.lists(st.integers(1, BLOCK), min_size=1, max_size=3))
    offset = draw(st.integers(0, 3 * BLOCK))
    letters = st.lists(st.sampled_from(b"xyz"), min_size=len(lengths), max_size=len(lengths))
    answers = [
        b"".join(bytes([letter]) * length for letter, length in zip(row, lengths, strict=True))
        for row in draw(st.lists(letters, min_size=count, max_size=count))
    ]
    return answers, offset, draw(st.integers(1, count))


@given(elections())
def test_every_block_is_decided_by_its_own_majority(
    election: tuple[list[bytes], int, int],
) -> None:
    answers, offset, threshold = election
    verdict = vote_data(list(enumerate(answers)), offset, threshold)

    best = [
        max(Counter(answer[start:end] for answer in answers).values())
        for start, end in blocks(offset, len(answers[0]))
    ]
    assert (verdict.data is not None) == (min(best) >= threshold)
    if verdict.data is None:
        return
    for (start, end), votes in zip(blocks(offset, len(answers[0])), best, strict=True):
        ballots = [answer[start:end] for answer in answers]
        leaders = [ballot for ballot in ballots if ballots.count(ballot) == votes]
        assert verdict.data[start:end] == leaders[0]  # of tied versions the first-listed


@given(elections())
def test_what_a_majority_of_three_holds_is_kept_and_else_the_first_answer(
    election: tuple[list[bytes], int, int],
) -> None:
    """P9, also if more must agree on a read."""
    answers, offset, _ = election
    verdict = reconcile(list(enumerate(answers)), offset)

    assert verdict.data is not None
    for start, end in blocks(offset, len(answers[0])):
        ballots = [answer[start:end] for answer in answers]
        ballot, votes = Counter(ballots).most_common(1)[0]
        kept = len(ballots) >= 3 and 2 * votes > len(ballots)
        right = ballot if kept else ballots[0]
        assert verdict.data[start:end] == right
        losers = {loss.voter for loss in verdict.outvoted if loss.start <= start < loss.end}
        wrong = {voter for voter, theirs in enumerate(ballots) if theirs != right}
        assert losers == (wrong if kept else set())


def test_a_bad_sector_is_no_reason_to_decide_without_its_replica() -> None:
    differing = [(0, X + Y), (1, X + X)]
    assert undecided(differing, 1, 0)
    assert not undecided(differing, 0, 0)  # all could be read
    assert not undecided([(0, X), (1, Y)], 1, 0)  # one block is not divided
    assert not undecided([(0, X + Y), (1, X + Y)], 1, 0)
    assert not undecided(differing[:1], 1, 0)


@given(elections())
def test_losers_are_named_exactly_and_a_tie_is_never_strict(
    election: tuple[list[bytes], int, int],
) -> None:
    """P4: what may be rewritten is what a strict winner at the threshold outvoted."""
    answers, offset, threshold = election
    verdict = vote_data(list(enumerate(answers)), offset, threshold)
    if verdict.data is None:
        return
    for start, end in blocks(offset, len(answers[0])):
        ballots = [answer[start:end] for answer in answers]
        counts = Counter(ballots).most_common()
        strict = len(counts) == 1 or counts[0][1] > counts[1][1]
        for voter, ballot in enumerate(ballots):
            losses = [
                loss
                for loss in verdict.outvoted
                if loss.voter == voter and loss.start <= start and end <= loss.end
            ]
            assert [loss.strict for loss in losses] == (
                [] if ballot == verdict.data[start:end] else [strict]
            )


@given(elections())
def test_agreement_needs_no_threshold_of_blocks(election: tuple[list[bytes], int, int]) -> None:
    """Equal answers win whatever the blocks, if there are enough of them; fewer never do."""
    answers, offset, threshold = election
    same = [(voter, answers[0]) for voter in range(threshold)]
    assert vote_data(same, offset, threshold).data == answers[0]
    assert vote_data(same[:-1], offset, threshold).data is None


def test_bad_blocks_at_different_places_leave_a_readable_request() -> None:
    """Each replica is wrong somewhere, no two at the same place (R11)."""
    answers = [(0, Y + X + X), (1, X + Y + X), (2, X + X + Y)]
    verdict = vote_data(answers, 0, 2)
    assert verdict.data == X + X + X
    assert [(loss.voter, loss.start, loss.end) for loss in verdict.outvoted] == [
        (0, 0, BLOCK),
        (1, BLOCK, 2 * BLOCK),
        (2, 2 * BLOCK, 3 * BLOCK),
    ]


def test_adjacent_losses_are_reported_as_one() -> None:
    (loss,) = vote_data([(0, X + X), (1, X + X), (2, Y + Z)], 0, 2).outvoted
    assert (loss.start, loss.end) == (0, 2 * BLOCK)


@given(st.integers(0, 3 * BLOCK), st.integers(1, 4 * BLOCK))
def test_blocks_cover_the_request_and_end_on_the_disk_s_block_bounds(
    offset: int, length: int
) -> None:
    cut = list(blocks(offset, length))
    assert [start for start, _ in cut] == [0, *(end for _, end in cut[:-1])]
    assert cut[-1][1] == length
    assert all((offset + end) % BLOCK == 0 for _, end in cut[:-1])
    assert all(0 < end - start <= BLOCK for start, end in cut)


@given(st.lists(st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS]), min_size=1))
def test_the_voted_errno_is_the_commonest_and_of_equals_the_first_listed(
    errnos: list[int],
) -> None:
    most = max(errnos.count(number) for number in errnos)
    assert vote_errno(errnos) == next(n for n in errnos if errnos.count(n) == most)


def test_a_plurality_is_strict_only_without_an_equal() -> None:
    assert plurality("aab").strict
    assert not plurality("aabb").strict
    assert plurality("ab").version == "a"


@given(st.binary(min_size=1, max_size=3 * BLOCK), st.data())
def test_the_first_difference_is_the_first(one: bytes, data: st.DataObject) -> None:
    places = data.draw(st.sets(st.integers(0, len(one) - 1), max_size=3))
    other = bytes(byte ^ (index in places) for index, byte in enumerate(one))
    assert first_difference(one, other) == (min(places) if places else None)


def test_fifo_asks_one_after_the_other_and_fails_with_the_last_errno() -> None:
    pattern = Fifo()
    assert pattern.ask_now(3, 0) == 1
    assert pattern.ask_now(2, 1) == 0
    assert pattern.ask_now(0, 0) == 0
    assert pattern.judge(0, [(2, X)], [errno.EIO]).data == X
    assert pattern.judge(0, [], [errno.EIO, errno.ENXIO]).errno == errno.ENXIO
    assert pattern.judge(0, [], []).errno == errno.EIO


def test_fifo_waits_long_only_for_the_last_one() -> None:
    """The first of two can be done without; nobody stands in for the last."""
    assert Fifo().needed(waiting=1) == 0
    assert Fifo().needed(waiting=0) == 1


@pytest.mark.parametrize("pattern", [Quorum(2), Blkverify(2)])
def test_too_few_answers_give_the_voted_errno(pattern: Quorum) -> None:
    assert pattern.ask_now(3, 0) == 3
    assert pattern.needed(0) == 2
    verdict = pattern.judge(0, [(0, X)], [errno.ENXIO, errno.EIO])
    assert (verdict.data, verdict.errno) == (None, errno.ENXIO)


def test_blkverify_names_the_first_byte_that_differs() -> None:
    verdict = Blkverify(2).judge(0, [(0, X), (1, X[:7] + b"y" + X[8:])], [])
    assert (verdict.data, verdict.errno, verdict.difference) == (None, errno.EIO, 7)
    assert Blkverify(2).judge(0, [(0, X), (1, X)], []).data == X


@pytest.mark.parametrize(
    ("ballots", "voters", "threshold", "winner"),
    [
        ([X, X], 2, 1, X),
        ([X], 2, 1, None),  # the other one may hold anything
        ([X, X], 3, 1, X),
        ([X, X], 3, 3, None),
        ([X, X, Y], 4, 2, None),
        ([X, X, Y, Z], 4, 2, None),
        ([Y, X, X, X], 4, 2, X),
        ([X, X], 4, 2, None),
        ([], 1, 1, None),
    ],
)
def test_a_majority_is_one_of_all(
    ballots: list[bytes], voters: int, threshold: int, winner: bytes | None
) -> None:
    assert majority(ballots, voters, threshold) == winner
