"""What a resync may rely on: every history of one chunk of its target, to the end.

Chunks are independent of each other but for syncs and losses, which happen to each by itself: so
one chunk stands for all of them.
"""

from collections import deque
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from quorumfs.decisions.dirtymap import CHUNK_MIN, DirtyMap
from quorumfs.metadata.ledger.epochs import Epochs
from quorumfs.metadata.ledger.recorded import Recorded
from quorumfs.metadata.ledger.target import Chunk, Target
from quorumfs.replica.replica import Replica

CHUNK = range(1)
HISTORIES = (
    {"write": 1, "copy": 2, "sync": 2, "lose": 1, "drop": 0},
    {"write": 2, "copy": 1, "sync": 1, "lose": 0, "drop": 1},
    {"write": 1, "copy": 2, "sync": 1, "lose": 1, "drop": 1},
)
"""How often each happens in one history, at most."""


class BrokenError(Exception):
    """The target is said to hold what it does not."""


@dataclass(eq=False)
class Name:
    """Stands for a replica."""

    name: str
    slot: int

    def __deepcopy__(self, _: object) -> "Name":
        return self


SOURCE, OTHER, TARGET = (
    cast("Replica", Name(name, slot)) for slot, name in enumerate(("source", "other", "target"))
)


@dataclass
class World:
    """One chunk: what the ledger knows of it, and the truth, as versions of its content."""

    left: dict[str, int]
    """How often each may still happen."""
    recorded: Recorded = field(default_factory=lambda: Recorded(DirtyMap(CHUNK_MIN, CHUNK_MIN)))
    epochs: Epochs = field(default_factory=Epochs)
    target: Target = field(init=False)
    latest: int = 0
    """Written last; the `OTHER` replica always holds it."""
    source: int = 0
    """Held by the `SOURCE`, which may lose what it was not synced after."""
    shown: int = -1
    """By the target, from its page cache; -1: nothing that the disk ever held."""
    durable: int = -1
    """What a power cut leaves of that."""
    unheard: bool = False
    """The source lost something, and no sync told."""
    lossy: bool = False
    """The source is not believed any more."""
    unsynced: bool = False
    """The source was written to since all were synced."""
    resyncing: bool = True
    syncing: tuple[int, int] | None = None
    """The epoch of a sync of the target under way, and what it makes durable."""
    copying: int | None = None
    """What is being copied."""
    writing: bool | None = None
    """A write is under way; whether it goes to the target, too."""

    def __post_init__(self) -> None:
        self.left = dict(self.left)
        self.target = Target(TARGET, self.recorded, self.epochs)
        self.epochs.follow([SOURCE, OTHER, TARGET])
        self.target.lacks(CHUNK)
        self.target.begin()

    # What may happen; each is possible if it says so

    def write_begins(self) -> Iterator[bool]:
        """The range lock keeps it apart from a copy."""
        yield self.left["write"] > 0 and self.copying is None and self.writing is None
        self.left["write"] -= 1
        self.epochs.latest.add(CHUNK)
        if self.resyncing:
            self.writing = self.target.gets(CHUNK, mirrored=False)
        else:
            self.target.lacks(CHUNK)
            self.writing = False

    def write_ends(self) -> Iterator[bool]:
        """It is acknowledged."""
        yield self.writing is not None
        self.epochs.latest.add(CHUNK)
        self.latest += 1
        self.source, self.unsynced = self.latest, True
        if self.writing and self.resyncing:
            self.shown = self.latest
        self.writing = None

    def mirror(self) -> Iterator[bool]:
        """What is written goes to the target, too, from here on."""
        yield self.resyncing and not self.target.mirroring
        self.target.mirroring = True

    def copy_begins(self) -> Iterator[bool]:
        """It is read from a replica that is believed, right or wrong."""
        free = self.copying is None and self.writing is None and self.resyncing
        yield free and self.left["copy"] > 0 and self.state is not Chunk.HELD
        self.left["copy"] -= 1
        self.copying = self.latest if self.lossy else self.source
        self.target.copying([OTHER if self.lossy else SOURCE], CHUNK)

    def copy_ends(self) -> Iterator[bool]:
        """It is in the target's page cache."""
        yield self.copying is not None and self.resyncing
        assert self.copying is not None
        self.shown, self.copying = self.copying, None
        self.target.copied(CHUNK)

    def sync_begins(self) -> Iterator[bool]:
        """It covers at least what is there already."""
        yield self.syncing is None and self.resyncing and self.left["sync"] > 0
        self.left["sync"] -= 1
        changing = [CHUNK] if self.writing is not None else []
        self.syncing = self.epochs.begin_sync([TARGET], changing), self.shown

    def sync_ends(self) -> Iterator[bool]:
        """It succeeded."""
        yield self.syncing is not None and self.resyncing
        assert self.syncing is not None
        epoch, self.durable = self.syncing
        self.syncing = None
        self.epochs.cover([TARGET], epoch)
        self.target.synced(epoch)

    def record(self) -> Iterator[bool]:
        """The sidecars say how far it is."""
        yield self.target.unrecorded
        self.target.recorded()

    def source_loses(self) -> Iterator[bool]:
        """It shows what it held before, and nobody knows that yet."""
        yield self.unsynced and self.left["lose"] > 0
        self.left["lose"] -= 1
        self.unheard, self.source = True, self.latest - 1

    def members_are_synced(self) -> Iterator[bool]:
        """Who lost something says so."""
        yield self.unsynced
        self.unsynced = False
        if self.unheard:
            self.unheard, self.lossy = False, True
            self.target.lost_by(SOURCE, CHUNK)

    def target_fails(self) -> Iterator[bool]:
        """A sync of it failed, or it went away: it holds what was durable."""
        yield self.resyncing and self.left["drop"] > 0
        self.left["drop"] -= 1
        self.resyncing, self.syncing, self.copying = False, None, None
        self.target.lacks_unsynced()
        self.epochs.follow([SOURCE, OTHER])
        self.shown = self.durable

    def target_returns(self) -> Iterator[bool]:
        """Another resync of it begins."""
        yield not self.resyncing and self.writing is None
        self.resyncing = True
        self.epochs.follow([SOURCE, OTHER, TARGET])
        self.target.begin()

    # What must hold after each of them

    @property
    def state(self) -> Chunk:
        return self.target.state(0)

    def check(self) -> None:
        if self.writing is not None or self.unheard:
            return  # it has not happened yet, and nothing is lost that anybody was told to be safe
        synced = not self.resyncing or not self.epochs.waits(TARGET, CHUNK)
        held = self.state in (Chunk.HELD, Chunk.DURABLE)
        given = held or (self.state is Chunk.COPIED and self.copying is None and self.resyncing)
        if given and self.shown != self.latest:
            raise BrokenError(f"it is {self.state}, and shows {self.shown} of {self.latest}")
        if held and synced and self.durable != self.latest:
            raise BrokenError(f"it is {self.state}, and a power cut leaves {self.durable}")


EVENTS: list[Callable[[World], Iterator[bool]]] = [
    World.write_begins,
    World.write_ends,
    World.mirror,
    World.copy_begins,
    World.copy_ends,
    World.sync_begins,
    World.sync_ends,
    World.record,
    World.source_loses,
    World.members_are_synced,
    World.target_fails,
    World.target_returns,
]


def following(world: World) -> Iterator[tuple[str, World]]:
    """Each event that may happen next, and what it leads to."""
    for event in EVENTS:
        if next(event(world)):
            after = deepcopy(world)
            for _ in event(after):
                pass
            yield event.__name__, after


def frozen(value: Any) -> Any:
    """All that *value* consists of, to be compared."""
    match value:
        case None | bool() | int() | str() | Name() | range():
            return value
        case bytes() | bytearray():
            return bytes(value)
        case dict():
            return frozenset((frozen(key), frozen(item)) for key, item in value.items())
        case set():
            return frozenset(map(frozen, value))
        case list() | tuple():
            return tuple(map(frozen, value))
    slots = getattr(type(value), "__slots__", None) or vars(value)
    return tuple((name, frozen(getattr(value, name))) for name in slots)


def explore(at_most: dict[str, int]) -> set[Chunk]:
    """Every history, until no new state appears; returns what the chunk was in them.

    Raises `BrokenError` with the shortest history that leads to it.
    """
    first = World(at_most)
    seen = {frozen(first)}
    states: set[Chunk] = set()
    ahead: deque[tuple[World, tuple[str, ...]]] = deque([(first, ())])
    while ahead:
        world, history = ahead.popleft()
        states.add(world.state)
        for name, after in following(world):
            try:
                after.check()
            except BrokenError as error:
                raise BrokenError(f"{error}: {', '.join([*history, name])}") from None
            if (key := frozen(after)) not in seen:
                seen.add(key)
                ahead.append((after, (*history, name)))
    return states


@pytest.mark.parametrize("at_most", HISTORIES)
def test_the_target_holds_what_it_is_said_to_hold(at_most: dict[str, int]) -> None:
    assert explore(at_most) == set(Chunk)


def explore_all() -> None:
    for at_most in HISTORIES:
        explore(at_most)


def a_sync_covers_all(self: Target, _: int) -> int:
    return synced(self, self._epochs.now)


def what_its_source_lost_is_kept(self: Target, source: Replica, chunks: range) -> None:
    pass


def what_it_is_not_given_it_has(self: Target, chunks: range, *, mirrored: bool) -> bool:
    return mirrored or self.mirroring


def what_it_did_not_sync_is_kept(self: Target) -> None:
    pass


def what_is_copied_is_durable(self: Target, chunks: range) -> None:
    copied(self, chunks)
    synced(self, self._epochs.now)


def what_was_copied_once_is_copied(self: Target, chunks: range) -> None:
    self._recorded.add(self.bit, chunks)


synced, copied = Target.synced, Target.copied


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ("synced", a_sync_covers_all),
        ("lost_by", what_its_source_lost_is_kept),
        ("gets", what_it_is_not_given_it_has),
        ("lacks_unsynced", what_it_did_not_sync_is_kept),
        ("copied", what_is_copied_is_durable),
        ("lacks", what_was_copied_once_is_copied),
    ],
)
def test_each_rule_is_needed(
    rule: str, broken: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Target, rule, broken)
    with pytest.raises(BrokenError):
        explore_all()
