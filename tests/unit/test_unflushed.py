"""What a failed sync may have lost: exact, however much was written."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quorumfs.metadata import unflushed as module
from quorumfs.metadata.unflushed import Unflushed


@pytest.fixture(autouse=True)
def few_in_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNKS_MAX", 3)


chunks = st.builds(lambda start, length: range(start, start + length), *[st.integers(1, 20)] * 2)
steps = st.lists(st.one_of(st.tuples(st.just("add"), chunks), st.just(("take", range(0)))))


def members(unflushed: Unflushed) -> list[int]:
    """Sorted; each must be in one run only."""
    return sorted(chunk for run in unflushed.runs() for chunk in run)


@given(steps)
def test_it_holds_what_was_added_and_nothing_else(history: list[tuple[str, range]]) -> None:
    """Whatever is taken, and put back after a sync that failed."""
    unflushed, model = Unflushed(), set[int]()
    flushing, flushing_model = Unflushed(), set[int]()
    for step, added in history:
        if step == "add":
            unflushed.add(added)
            model.update(added)
        else:
            taken = unflushed.take()
            taken.put_back(flushing)
            flushing, flushing_model, model = taken, flushing_model | model, set()
        assert members(unflushed) == sorted(model)
        runs = list(unflushed.runs())
        assert all(one.stop < other.start for one, other in pairwise(runs))
        assert members(flushing) == sorted(flushing_model)
        assert bool(unflushed) == bool(model)
        asked = range(added.start, added.start + 3)
        assert unflushed.overlaps(asked) == (not model.isdisjoint(asked))
