"""The table of standings: what is promised of its rows, and that nothing is decided beside it.

The promises are words on what a standing is for. No cell can change without one of them breaking.
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest

import quorumfs
from quorumfs.control.advice import ADVICE
from quorumfs.decisions import standing as module
from quorumfs.decisions.standing import Row, Standing
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Storage

SOURCE = Path(quorumfs.__file__).parent
ROWS = {standing: standing.row for standing in Standing}
Rows = Mapping[Standing, Row]

OF_EACH: dict[str, Callable[[Row], bool]] = {
    "what is read gets every write": lambda row: row.written or not row.member,
    "only what is ours is written": lambda row: row.ours or not row.written,
    "what is ours is asked, and nothing else": lambda row: row.answers == row.ours,
    "what is ours is a member, or becomes one": lambda row: row.ours == (row.member != row.coming),
    "a member waits for nothing": lambda row: (
        not row.member or not (row.coming or row.retried or row.needs_operator)
    ),
    "what a person must decide is not touched until then": lambda row: (
        not row.needs_operator or not any(row._replace(needs_operator=False))
    ),
}
"""Promises of every row, those to come among them."""

OF_ALL: dict[str, Callable[[Rows], bool]] = {
    "who is current is a member, and nobody else": lambda rows: (
        [one for one in rows if rows[one].member] == [Standing.CURRENT]
    ),
    "the target of a resync is written and not read, and nobody else": lambda rows: (
        [one for one in rows if rows[one].written and not rows[one].member] == [Standing.RESYNCING]
    ),
    "a suspect replica is stale": lambda rows: rows[Standing.SUSPECT] == rows[Standing.STALE],
    "a missing replica comes back without anybody's decision": lambda rows: (
        rows[Standing.MISSING].retried
    ),
    "what is not written is tried again, unless a person decides": lambda rows: all(
        row.retried == (not row.written and not row.needs_operator)
        for one, row in rows.items()
        if one is not Standing.OFFLINE
    ),
    "an offline replica is left alone, and nobody is asked to decide": lambda rows: (
        not any(rows[Standing.OFFLINE])
    ),
    "a foreign replica is not touched": lambda rows: (
        not any(rows[Standing.FOREIGN]._replace(needs_operator=False))
    ),
}


def broken(rows: Rows) -> list[str]:
    """The promises that *rows* do not keep."""
    each = [words for words, keeps in OF_EACH.items() if not all(map(keeps, rows.values()))]
    return each + [words for words, keeps in OF_ALL.items() if not keeps(rows)]


def test_the_table_keeps_its_promises() -> None:
    assert broken(ROWS) == []


@pytest.mark.parametrize("column", Row._fields)
@pytest.mark.parametrize("standing", Standing)
def test_each_cell_with_the_other_value_breaks_a_promise(standing: Standing, column: str) -> None:
    row = standing.row
    assert broken({**ROWS, standing: row._replace(**{column: not getattr(row, column)})})


@pytest.mark.parametrize("standing", Standing)
def test_each_column_is_a_property(standing: Standing) -> None:
    assert standing.row == Row(
        member=standing.is_member,
        written=standing.is_written,
        ours=standing.is_ours,
        answers=standing.answers,
        coming=standing.is_coming,
        retried=standing.is_retried,
        needs_operator=standing.needs_operator,
    )
    assert standing.is_written_only is (standing is Standing.RESYNCING)


def test_each_standing_that_is_not_current_has_an_advice() -> None:
    """What to do about one that is current depends on its trouble."""
    assert ADVICE.keys() == {standing for standing in Standing if not standing.is_member}


@pytest.mark.parametrize("standing", Standing)
def test_what_is_ours_is_missing_while_it_is_away(standing: Standing) -> None:
    """And a replica that needs a decision says so, whether or not its files are there."""
    there = Replica(0, "/a.img", cast("Storage", object()), 8.0)
    away = Replica(1, "/b.img", None, 8.0)
    there.standing = away.standing = standing
    assert there.state is standing
    expected = Standing.MISSING if standing.is_ours else standing
    assert away.state is expected


# Nothing is decided beside the table


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every node of our source, with the dotted name of its module."""
    for path in sorted(SOURCE.rglob("*.py")):
        dotted = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield dotted, node


def named(node: ast.AST) -> set[str]:
    """The standings that an expression names, directly or by their words in JSON."""
    return {
        one.attr
        for one in ast.walk(node)
        if isinstance(one, ast.Attribute)
        and isinstance(one.value, ast.Name)
        and one.value.id == "Standing"
        and one.attr in Standing.__members__
    }


def is_list_of_standings(node: ast.AST) -> bool:
    """Whether a condition, or a collection that one may ask, names several standings."""
    parts: list[ast.expr] = []
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        parts = [one for one in node.elts if not isinstance(one, ast.Call | ast.Compare)]
    elif isinstance(node, ast.BoolOp):
        parts = node.values
    return len({name for part in parts for name in named(part)}) > 1


def test_no_condition_lists_standings() -> None:
    """What they have in common is a column: who adds a standing finds all that is to decide."""
    assert [
        f"{dotted}:{node.lineno}"
        for dotted, node in nodes()
        if isinstance(node, ast.expr) and is_list_of_standings(node)
    ] == []


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("one.standing in (Standing.STALE, Standing.SUSPECT)", True),
        ("{Standing.STALE.value, Standing.SUSPECT.value}", True),
        ("one is Standing.STALE or one is Standing.SUSPECT", True),
        ("one is Standing.STALE or one.standing.is_coming", False),
        ("(Standing.STALE, 'a reason')", False),
        ("Standing.FOREIGN if strange else Standing.MISSING", False),
    ],
)
def test_a_list_of_standings_is_noticed(source: str, is_one: bool) -> None:
    assert any(map(is_list_of_standings, ast.walk(ast.parse(source)))) is is_one


def assigned(node: ast.AST) -> Iterator[ast.AST]:
    """What a statement assigns to."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    return (one for target in targets for one in ast.walk(target))


def test_all_who_assign_a_standing_are_listed() -> None:
    """A transition that is left out in the guide to a new standing is left out by who adds one."""
    assigning = {
        dotted
        for dotted, node in nodes()
        if any(isinstance(one, ast.Attribute) and one.attr == "standing" for one in assigned(node))
    }
    guide = module.__doc__ or ""
    assert "quorumfs.metadata.ledger.ledger" in assigning
    assert {dotted for dotted in assigning if f"`{dotted}." not in guide} == set()
