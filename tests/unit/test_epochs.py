"""What a failed sync may have lost: exact, however much was written, and whoever was synced."""

from contextlib import AbstractContextManager
from itertools import pairwise
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quorumfs.metadata.ledger import epochs as module
from quorumfs.metadata.ledger.epochs import ChunkSet, Epochs
from quorumfs.replica.replica import Replica


@pytest.fixture(autouse=True)
def few_in_a_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNKS_MAX", 3)


some = st.builds(lambda start, length: range(start, start + length), *[st.integers(1, 20)] * 2)


@given(st.lists(some))
def test_a_set_holds_what_was_added_and_nothing_else(history: list[range]) -> None:
    chunks, model = ChunkSet(), set[int]()
    for added in history:
        chunks.add(added)
        model.update(added)
        runs = list(chunks.runs())
        assert [chunk for run in runs for chunk in run] == sorted(model)
        assert all(one.stop < other.start for one, other in pairwise(runs))
        assert bool(chunks) == bool(model)
        asked = range(added.start, added.start + 3)
        assert chunks.overlaps(asked) == (not model.isdisjoint(asked))


class Histories(RuleBasedStateMachine):
    """Changes and syncs of three replicas, beside one set of unsynced chunks for each.

    A replica that is followed has its own set: a sync empties it when it ends well, but for what
    was changed, or being changed, since that sync began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epochs = Epochs()
        self.unsynced: dict[Replica, set[int]] = {}
        self.under_way: list[range] = []
        self.giving: list[tuple[AbstractContextManager[None], list[Replica], range]] = []
        self.syncs: dict[Replica, tuple[int, set[int]]] = {}
        """By a replica that syncs: the epoch, and what was changed since."""
        self.before = 0
        self.follow([0, 1])

    def note(self, chunks: range) -> None:
        self.epochs.latest.add(chunks)
        for unsynced in self.unsynced.values():
            unsynced.update(chunks)
        for _, since in self.syncs.values():
            since.update(chunks)

    def follow(self, names: list[int]) -> None:
        replicas = [REPLICAS[name] for name in names]
        self.epochs.follow(replicas)
        self.unsynced = {r: self.unsynced.get(r, set()) for r in replicas}
        self.syncs = {r: sync for r, sync in self.syncs.items() if r in replicas}

    @rule(chunks=some)
    def begins(self, chunks: range) -> None:
        self.under_way.append(chunks)
        self.note(chunks)

    @rule(names=st.lists(st.integers(0, 2), unique=True), chunks=some)
    def some_are_given(self, names: list[int], chunks: range) -> None:
        """By a repair: the others lose nothing of that."""
        given = [REPLICAS[name] for name in names if REPLICAS[name] in self.unsynced]
        giving = self.epochs.giving(given, chunks)
        giving.__enter__()
        self.giving.append((giving, given, chunks))
        self.note_given(given, chunks)

    def note_given(self, given: list[Replica], chunks: range) -> None:
        for replica in given:
            if replica in self.unsynced:
                self.unsynced[replica].update(chunks)
            if replica in self.syncs:
                self.syncs[replica][1].update(chunks)

    @precondition(lambda self: self.giving)
    @rule(data=st.data())
    def they_have_it(self, data: st.DataObject) -> None:
        giving, given, chunks = self.giving.pop(data.draw(st.integers(0, len(self.giving) - 1)))
        giving.__exit__(None, None, None)
        self.note_given(given, chunks)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.under_way) - 1))
        self.note(self.under_way.pop(which))

    @rule(names=st.lists(st.integers(0, 2), unique=True))
    def are_followed(self, names: list[int]) -> None:
        self.follow(names)

    @rule(names=st.lists(st.integers(0, 2), unique=True))
    def sync(self, names: list[int]) -> None:
        idle = [REPLICAS[name] for name in names if REPLICAS[name] in self.unsynced]
        idle = [replica for replica in idle if replica not in self.syncs]
        epoch = self.epochs.begin_sync(idle, self.under_way)
        changing = {chunk for chunks in self.under_way for chunk in chunks}
        for replica in idle:
            self.syncs[replica] = epoch, changing | self.being_given(replica)

    def being_given(self, replica: Replica) -> set[int]:
        return {c for _, given, chunks in self.giving if replica in given for c in chunks}

    @precondition(lambda self: self.syncs)
    @rule(data=st.data(), well=st.booleans())
    def a_sync_ends(self, data: st.DataObject, well: bool) -> None:
        replica = data.draw(st.sampled_from(list(self.syncs)))
        epoch, since = self.syncs.pop(replica)
        if well:
            self.epochs.cover([replica], epoch)
            self.unsynced[replica] = since

    @invariant()
    def what_each_may_lose_is_exact(self) -> None:
        assert self.epochs.now >= self.before
        self.before = self.epochs.now
        for replica in REPLICAS:
            known = {chunk for run in self.epochs.unsynced(replica) for chunk in run}
            if replica not in self.unsynced:
                assert not known
                continue
            # What is being changed is noted again when that ends, or earlier.
            under_way = {chunk for chunks in self.under_way for chunk in chunks}
            under_way |= self.being_given(replica)
            assert self.unsynced[replica] <= known <= self.unsynced[replica] | under_way
            for chunk in range(1, 42):
                assert self.epochs.waits(replica, range(chunk, chunk + 1)) == (chunk in known)

    @invariant()
    def no_more_epochs_are_kept_than_syncs_tell_apart(self) -> None:
        assert len(self.epochs._ended) <= 2 * len(self.unsynced) + 1


REPLICAS = [cast("Replica", name) for name in "abc"]

TestHistories = Histories.TestCase


@given(st.lists(st.lists(st.integers(0, 40), max_size=6), max_size=6))
def test_a_set_is_the_same_whether_added_to_at_once_or_one_by_one(
    batches: list[list[int]],
) -> None:
    at_once, one_by_one = ChunkSet(), ChunkSet()
    for batch in batches:
        at_once.update(batch)
        for chunk in batch:
            one_by_one.add(range(chunk, chunk + 1))
    assert list(at_once.runs()) == list(one_by_one.runs())
    assert {chunk for run in at_once.runs() for chunk in run} == set().union(*batches)
