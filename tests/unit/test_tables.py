"""Each cell of the ledger's tables with each wrong value: a promise breaks, or it is said why not.

A promise that breaks is seen to: in the exploration of one chunk (`support.one_chunk`), which knows
no adoption, or in a story of adopted images.
"""

from collections.abc import Iterator

import pytest
from support.one_chunk import BrokenError, World, explore

from quorumfs.metadata.ledger.agreement import AGREEMENT, Agreed
from quorumfs.metadata.ledger.agreement import Event as OfAll
from quorumfs.metadata.ledger.content import CONTENT, Held
from quorumfs.metadata.ledger.content import Event as OfOne

Cell = tuple[Held, OfOne] | tuple[Agreed, OfAll]
Wrong = tuple[Cell, Held | Agreed]

H, A = Held, Agreed
TABLES: tuple[dict[Cell, Held | Agreed], ...] = (CONTENT, AGREEMENT)  # type: ignore[assignment]

BREAKS: list[Wrong] = [
    ((H.HELD, OfOne.LOST), H.HELD),
    ((H.HELD, OfOne.LOST), H.RISKED),
    ((H.HELD, OfOne.LOST_BY_THE_LAST), H.HELD),
    ((H.HELD, OfOne.LOST_BY_THE_LAST), H.LACKING),
    ((H.HELD, OfOne.TAKEN), H.RISKED),
    ((H.HELD, OfOne.TAKEN), H.LACKING),
    ((H.RISKED, OfOne.TAKEN), H.RISKED),
    ((H.RISKED, OfOne.TAKEN), H.LACKING),
    ((H.LACKING, OfOne.TAKEN), H.RISKED),
    ((H.LACKING, OfOne.TAKEN), H.LACKING),
    ((A.AGREED, OfAll.FAILED), A.AGREED),
    ((A.AGREED, OfAll.CRASHED), A.DIVERGENT),
    ((A.AGREED, OfAll.CRASHED), A.INHERITED),
    ((A.DIVERGENT, OfAll.FAILED), A.AGREED),
    ((A.DIVERGENT, OfAll.EQUALIZED), A.DIVERGENT),
    ((A.DIVERGENT, OfAll.CRASHED), A.AGREED),
    ((A.DIVERGENT, OfAll.CRASHED), A.DIVERGENT),
    ((A.INHERITED, OfAll.FAILED), A.AGREED),
    ((A.INHERITED, OfAll.FAILED), A.DIVERGENT),
    ((A.INHERITED, OfAll.EQUALIZED), A.INHERITED),
]
"""With two replicas that are both needed, and one write."""

BREAKS_ADOPTED: list[Wrong] = [
    ((A.UNVERIFIED, OfAll.FAILED), A.AGREED),
    ((A.UNVERIFIED, OfAll.FAILED), A.DIVERGENT),
    ((A.UNVERIFIED, OfAll.FAILED), A.INHERITED),
    *(((A.UNVERIFIED, OfAll.CRASHED), wrong) for wrong in (A.AGREED, A.DIVERGENT, A.INHERITED)),
]
"""As stories of adopted images tell (`test_stories_of_adoption`)."""

_COSTS = "costs a round of repair, or the wait of a flush for it"
_UNTOLD = "nobody tells it of such a chunk"
_TWO_WRITES = "takes two writes: minutes of exploration, by `python -m support.one_chunk 2,2,2`"
CONSERVATIVE: dict[Wrong, str] = {
    ((A.AGREED, OfAll.FAILED), A.INHERITED): _COSTS,
    ((A.DIVERGENT, OfAll.FAILED), A.INHERITED): _COSTS,
    ((A.DIVERGENT, OfAll.EQUALIZED), A.INHERITED): _COSTS,
    ((A.INHERITED, OfAll.EQUALIZED), A.DIVERGENT): _COSTS,
    ((A.UNVERIFIED, OfAll.COMPARED), A.DIVERGENT): _COSTS,
    ((A.UNVERIFIED, OfAll.COMPARED), A.INHERITED): _COSTS,
    ((A.UNVERIFIED, OfAll.COMPARED), A.UNVERIFIED): "it is compared again and again",
}
NOT_TOLD = {
    (A.AGREED, OfAll.EQUALIZED): "a repair gives members the same where they differ alone",
    (A.AGREED, OfAll.COMPARED): "only UNVERIFIED chunks are compared",
    (A.DIVERGENT, OfAll.COMPARED): "only UNVERIFIED chunks are compared",
    (A.INHERITED, OfAll.COMPARED): "only UNVERIFIED chunks are compared",
    (A.INHERITED, OfAll.CRASHED): "a mount begins without INHERITED chunks",
    (A.UNVERIFIED, OfAll.EQUALIZED): "a repair gives members the same where they differ alone",
    (H.RISKED, OfOne.LOST): _TWO_WRITES,
    (H.RISKED, OfOne.LOST_BY_THE_LAST): _TWO_WRITES,
    (H.LACKING, OfOne.LOST): _TWO_WRITES,
    (H.LACKING, OfOne.LOST_BY_THE_LAST): "`Content.losers` never says so",
}
"""Cells that no history of one write asks for."""


def wrong_values() -> Iterator[Wrong]:
    for table in TABLES:
        for cell, right in table.items():
            for wrong in type(right):
                # No event makes a chunk UNVERIFIED: to write it there is to write AGREED.
                if wrong is not right and (wrong is not A.UNVERIFIED or cell[0] is wrong):
                    yield cell, wrong


def test_every_wrong_value_is_accounted_for() -> None:
    told_of = [one for one in wrong_values() if one[0] not in NOT_TOLD]
    assert sorted(map(str, told_of)) == sorted(map(str, [*BREAKS, *BREAKS_ADOPTED, *CONSERVATIVE]))


def named(value: Cell | Held | Agreed) -> str:
    return "-".join(one.name for one in value) if isinstance(value, tuple) else value.name


@pytest.mark.parametrize(("cell", "wrong"), BREAKS, ids=named)
def test_a_wrong_value_breaks_a_promise(
    cell: Cell, wrong: Held | Agreed, monkeypatch: pytest.MonkeyPatch
) -> None:
    (table,) = (table for table in TABLES if cell in table)
    monkeypatch.setitem(table, cell, wrong)
    with pytest.raises(BrokenError):
        explore(World(2, 2, 1))
