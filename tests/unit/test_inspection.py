"""Who is to blame for one block."""

import pytest

from quorumfs.repair.inspection import FINDS_MAX, Find, Findings, Judgement, judge
from quorumfs.replica.replica import Replica

A, B, C, D = (Replica(index, f"/{name}.img", None, 8.0) for index, name in enumerate("abcd"))
GOOD, ROT, OTHER = b"good", b"rot", b"other"


@pytest.mark.parametrize(
    ("ballots", "unread", "threshold", "judgement", "right"),
    [
        ({A: GOOD, B: GOOD, C: GOOD}, [], 2, Judgement(), GOOD),
        ({A: GOOD, B: ROT, C: GOOD}, [], 2, Judgement((B,)), GOOD),
        ({A: ROT, B: GOOD, C: GOOD}, [], 1, Judgement((A,)), GOOD),
        ({A: GOOD, B: ROT, C: GOOD}, [], 3, Judgement(undecided=True), None),
        ({A: GOOD, B: ROT}, [], 1, Judgement(undecided=True), None),
        ({A: GOOD, B: ROT}, [], 2, Judgement(undecided=True), None),
        ({A: GOOD, B: ROT, C: OTHER}, [], 1, Judgement(undecided=True), None),
        ({A: GOOD, B: GOOD, C: ROT, D: ROT}, [], 2, Judgement(undecided=True), None),
        ({A: GOOD, B: GOOD, C: GOOD, D: ROT}, [], 2, Judgement((D,)), GOOD),
        ({A: GOOD, B: GOOD, C: ROT}, [D], 2, Judgement((), (D,), undecided=True), None),
        ({A: GOOD, B: ROT}, [C], 2, Judgement((), (C,), undecided=True), None),
        ({A: GOOD, B: GOOD}, [C], 2, Judgement((), (C,)), GOOD),
        ({A: GOOD}, [B], 2, Judgement((), (B,)), GOOD),
        ({}, [A, B], 1, Judgement((), (A, B)), None),
    ],
)
def test_a_strict_majority_at_the_threshold_is_right_or_nobody(
    ballots: dict[Replica, bytes],
    unread: list[Replica],
    threshold: int,
    judgement: Judgement,
    right: bytes | None,
) -> None:
    assert judge(ballots, unread, threshold) == (judgement, right)


def test_places_are_listed_while_there_is_room_and_all_are_counted() -> None:
    findings = Findings()
    for number in range(2 * FINDS_MAX):
        findings.count(mismatches=1)
        findings.note(Find(number, 1, None, "undecided", repaired=False))
    assert findings.counts.mismatches == 2 * FINDS_MAX
    assert [find.offset for find in findings.finds] == list(range(FINDS_MAX))


def test_counts_do_not_become_less_than_nothing() -> None:
    findings = Findings()
    findings.count(undecided=-3)
    assert findings.counts.undecided == 0
