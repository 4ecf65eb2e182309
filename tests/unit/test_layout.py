"""The rooms of ``quorumfs/``: each module is in one, and imports point downwards only."""

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

import quorumfs

SOURCE = Path(quorumfs.__file__).parent
ROOMS = re.findall(r"^``(\w+)``$", quorumfs.__doc__ or "", re.MULTILINE)
"""From top to bottom."""
MODULES = {path.relative_to(SOURCE.parent) for path in SOURCE.rglob("*.py")}
INSIDE = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in MODULES}
"""Dotted names of all modules and packages."""


class Import(NamedTuple):
    """One module that another imports."""

    importer: str
    line: int
    imported: str

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


PACKAGES = {".".join(path.parent.parts) for path in MODULES if path.name == "__init__.py"}


def room_of(module: str) -> str | None:
    """The room of a module; None for the package itself and how it is started."""
    first = module.split(".")[1:2]
    return None if first in ([], ["__main__"]) else first[0]


def imports() -> Iterator[Import]:
    """All imports of our own, those in functions and for type checkers alone among them."""
    for path in sorted(MODULES):
        dotted = ".".join(path.with_suffix("").parts)
        importer = dotted.removesuffix(".__init__")
        for node in ast.walk(ast.parse((SOURCE.parent / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.split(".")[0] == "quorumfs":
                        yield Import(importer, node.lineno, alias.name)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}:{node.lineno}: imports are absolute"
                source = node.module or ""
                if source.split(".")[0] == "quorumfs":
                    for alias in node.names:
                        inner = f"{source}.{alias.name}"
                        imported = inner if inner in INSIDE else source
                        yield Import(importer, node.lineno, imported)


IMPORTS = list(imports())


def rooms_around(module: str) -> list[str]:
    """The packages that *module* is in, or is, the outermost first; not ``quorumfs`` itself."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(2, len(parts) + (module in PACKAGES))]


def test_every_module_is_in_a_room_and_every_room_is_listed() -> None:
    assert len(ROOMS) == len(set(ROOMS))
    assert {room for module in INSIDE if (room := room_of(module))} == set(ROOMS)


def test_only_what_the_list_names_stands_outside_a_package() -> None:
    alone = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    assert alone == {"errors"}


def test_no_import_points_upwards() -> None:
    upwards = []
    for one in IMPORTS:
        above, below = room_of(one.importer), room_of(one.imported)
        if above and below and ROOMS.index(above) > ROOMS.index(below):
            upwards.append(str(one))
    assert not upwards


def test_a_room_within_a_room_knows_nothing_of_what_is_around_it() -> None:
    outwards = []
    for one in IMPORTS:
        rooms = rooms_around(one.importer)
        for outer, inner in pairwise(rooms):
            inside = f"{one.imported}.".startswith(f"{inner}.")
            if not inside and f"{one.imported}.".startswith(f"{outer}."):
                outwards.append(str(one))
    assert not outwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for one in IMPORTS:
        graph.setdefault(one.importer, set()).add(one.imported)
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module not in done:
            for imported in sorted(graph.get(module, ())):
                visit(imported, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("room", ROOMS)
def test_each_room_says_what_it_is_for(room: str) -> None:
    place = SOURCE / room / "__init__.py"
    place = place if place.exists() else SOURCE / f"{room}.py"
    assert ast.get_docstring(ast.parse(place.read_text(encoding="utf-8")))
