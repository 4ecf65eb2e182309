"""No class grows beyond what one can hold in one's head."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import quorumfs

LINES_MAX, ATTRIBUTES_MAX = 350, 15
"""Of a class: with its docstrings, and what its methods assign on ``self``."""


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    root = Path(quorumfs.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield f"{path.relative_to(root)} {node.name}", node


def is_record(node: ast.ClassDef) -> bool:
    """Whether it is a dataclass, whose fields are what it is for."""
    decorators = (one.func if isinstance(one, ast.Call) else one for one in node.decorator_list)
    return any(isinstance(one, ast.Name) and one.id == "dataclass" for one in decorators)


def attributes(node: ast.ClassDef) -> set[str]:
    return {
        target.attr
        for target in ast.walk(node)
        if isinstance(target, ast.Attribute)
        and isinstance(target.ctx, ast.Store)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


def is_too_large(node: ast.ClassDef) -> bool:
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    return lines > LINES_MAX or len(attributes(node)) > ATTRIBUTES_MAX


@pytest.mark.parametrize(
    "node", [pytest.param(node, id=name) for name, node in classes() if not is_record(node)]
)
def test_a_class_is_small(node: ast.ClassDef) -> None:
    assert not is_too_large(node)


def test_a_large_class_is_noticed() -> None:
    fields = "\n".join(f"        self.{letter} = 0" for letter in "abcdefghijklmnop")
    (many,) = ast.parse(f"class Many:\n    def __init__(self):\n{fields}").body
    (long,) = ast.parse("class Long:\n" + "    x = 1\n" * LINES_MAX).body
    assert isinstance(many, ast.ClassDef)
    assert isinstance(long, ast.ClassDef)
    assert is_too_large(many)
    assert is_too_large(long)
