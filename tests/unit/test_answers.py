"""Calls that may hang: answered, or given up together."""

import threading
import time

import pytest

from quorumfs.replica.answers import UnansweredError, ask_all

HANGS_S = 60.0
"""After so long (seconds) a test that would hang fails instead."""


def test_all_are_answered_in_order() -> None:
    answers = ask_all({"a": lambda: 1, "b": lambda: 2})
    assert [answer.result() for answer in answers] == [1, 2]
    assert not any(answer.pending for answer in answers)


def test_what_a_call_raises_is_raised() -> None:
    def fail() -> None:
        raise PermissionError(1, "no")

    (answer,) = ask_all({"a": fail})
    with pytest.raises(PermissionError):
        answer.result()


def test_many_that_hang_cost_one_wait() -> None:
    """They are given up together; what they return later is given back, by themselves."""
    may_end = threading.Event()
    discarded: list[int] = []

    def hang() -> int:
        assert may_end.wait(HANGS_S)
        return 1

    calls = {str(number): hang for number in range(50)}
    began = time.monotonic()
    answers = ask_all({**calls, "well": lambda: 2}, 0.5, discarded.append)
    took = time.monotonic() - began
    may_end.set()
    assert took < 50 * 0.5 / 2
    assert answers.pop().result() == 2
    for answer in answers:
        with pytest.raises(UnansweredError, match=r"did not answer for 0\.5 s"):
            answer.result()
        assert answer.wait(HANGS_S)
    assert discarded == [1] * 50
