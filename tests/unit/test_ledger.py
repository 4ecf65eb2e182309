"""What the ledger decides keeps the promises: all histories of a chunk, and with each rule off."""

from collections.abc import Callable, Iterator

import pytest
from support.one_chunk import CHUNK, SIZE, BrokenError, World, explore
from support.simulation.invariants import broken_invariants
from support.simulation.mutations import MUTATIONS

from quorumfs.decisions.dirtymap import INTENT, UNVERIFIED
from quorumfs.decisions.model import Standing
from quorumfs.metadata.ledger.agreement import Event
from quorumfs.metadata.ledger.chunks import Chunks
from quorumfs.metadata.ledger.content import Content, Held, bit
from quorumfs.metadata.ledger.epochs import Epochs
from quorumfs.metadata.ledger.marks import Marks
from quorumfs.metadata.ledger.recorded import Recorded

TWO_ONE, TWO_ALL, TWO_ALL_TWICE = (2, 1, 1), (2, 2, 1), (2, 2, 2)
"""Replicas, threshold, writes."""


@pytest.mark.parametrize(("size", "least"), [(TWO_ONE, 600), (TWO_ALL, 700)])
def test_no_history_breaks_a_promise(size: tuple[int, int, int], least: int) -> None:
    assert explore(World(*size)).states >= least


def nothing(*_: object) -> None:
    pass


def no_runs(*_: object) -> Iterator[range]:
    return iter(())


def always(*_: object) -> bool:
    return True


def clears_all_marks(self: Marks, *_: object) -> None:
    self._recorded.remove(INTENT, range(len(self._map)))


holds = Recorded.holds


def bits_of_members_may_be_old(self: Recorded, chunks: range, current: int) -> bool:
    return holds(self, chunks, 0)


@pytest.mark.parametrize(
    ("owner", "rule", "broken", "size"),
    [
        (Chunks, "diverge", nothing, TWO_ALL),
        (Chunks, "_recall_marks", nothing, TWO_ONE),
        (Chunks, "_recall_losses", nothing, TWO_ALL_TWICE),
        (Chunks, "durable_on", always, TWO_ALL),
        (Marks, "clear", clears_all_marks, TWO_ALL),
        (Epochs, "unsynced", no_runs, TWO_ALL),
        (Content, "_tell", nothing, TWO_ALL),
        (Content, "risk", nothing, TWO_ALL),
        (Recorded, "holds", bits_of_members_may_be_old, TWO_ALL),
    ],
)
def test_each_rule_is_needed(
    owner: type,
    rule: str,
    broken: Callable[..., object],
    size: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner, rule, broken)
    with pytest.raises(BrokenError):
        explore(World(*size))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("R4 lost by the last", TWO_ALL_TWICE),
        ("R4 loss in memory", TWO_ALL_TWICE),
        ("R13 not told", TWO_ALL),
    ],
)
def test_what_breaks_a_rule_is_found(
    name: str, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS[name](monkeypatch)
    with pytest.raises(BrokenError):
        explore(World(*size))


def test_what_is_recorded_while_others_are_awaited_is_taken_back() -> None:
    """The last that holds a chunk fails a sync again, and seems to lack it until all fail."""
    world = World(2, 2, 1)
    ledger = world.ledger
    first, second = ledger.members
    world.prepare()
    ledger.note_written(CHUNK)
    ledger.content.risk([first], CHUNK)
    ledger.chunks.suspend(first)
    ledger.chunks.note_pending()
    assert ledger.map.any(bit(first), CHUNK)
    ledger.chunks.suspend(second)
    ledger.chunks.lose([first, second])
    ledger.chunks.end_flush()
    assert ledger.content.state(first, 0) is Held.RISKED
    assert not ledger.map.any(bit(first), CHUNK)


def test_what_all_were_given_while_others_are_awaited_is_lost_by_nobody() -> None:
    """A hole of all since before a crash: nothing is written there, so no sync can lose it."""
    world = World(3, 3, 1)
    ledger = world.ledger
    first = ledger.members[0]
    world.prepare()
    ledger.agreement.tell(Event.FAILED, CHUNK)
    ledger.agreement.tell(Event.CRASHED, CHUNK)
    ledger.chunks.suspend(first)
    ledger.chunks.note_pending()
    assert ledger.map.any(bit(first), CHUNK)
    ledger.equalized(CHUNK)
    ledger.chunks.lose([first])
    ledger.chunks.end_flush()
    assert ledger.content.state(first, 0) is Held.HELD
    assert not ledger.map.any(bit(first), CHUNK)
    assert list(broken_invariants(ledger)) == []


def test_what_a_target_missed_while_it_joined_it_lacks_as_a_member() -> None:
    world = World(3, 2, 1)
    ledger, joining = world.ledger, world.ledger.replicas[2]
    world.prepare()
    joining.standing = Standing.RESYNCING
    target = ledger.targets.resyncing = ledger.targets.of(joining)
    target.joining = True
    joining.standing = Standing.CURRENT
    ledger.arrange()
    ledger.targets.lacks(CHUNK)  # while its record is on the way
    ledger.joined()
    assert ledger.content.state(joining, 0) is Held.LACKING
    assert ledger.agreement.divergent, "nobody would make it good"
    ((_, believed),) = ledger.chunks.sources.of(CHUNK)
    assert joining not in believed


def test_a_comparison_beside_a_loss_leaves_the_rest_as_it_is() -> None:
    """Only where something was lost may the loss have made them equal (seed 872514)."""
    ledger = World(2, 2, 1).ledger
    first, _ = ledger.members
    ledger.recorded.grow(4 * SIZE, 0)
    ledger.recorded.add(UNVERIFIED, range(4))
    ledger.recorded.add(INTENT | bit(first), range(1, 2))
    ledger.content.lossy.add(first)
    ledger.chunks.compared(range(4))
    assert list(ledger.agreement.divergent) == [(1, 2)]
    assert list(broken_invariants(ledger)) == []
