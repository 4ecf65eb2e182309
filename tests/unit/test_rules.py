"""``tests/RULES.md``: every promise and rule is defined, and all that it names is there."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
from support.rules import ORDER, PROMISES, RULES_FILE, Rule, rendered
from support.simulation.mutations import MUTATIONS

RULES = [*PROMISES, *ORDER]
TESTS = Path(__file__).parents[1]
CHECKOUT = TESTS.parent


def resolve(name: str) -> object:
    """The module, class or function with a dotted name. Raises if there is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "name")}


def test_the_file_is_up_to_date() -> None:
    assert RULES_FILE.read_text(encoding="utf-8") == rendered(), (
        "cd tests && python -m support.rules"
    )


def test_they_are_numbered_in_order() -> None:
    assert [rule.name for rule in PROMISES] == [f"P{n}" for n in range(1, len(PROMISES) + 1)]
    assert [rule.name for rule in ORDER] == [f"R{n}" for n in range(1, len(ORDER) + 1)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_what_keeps_and_tests_it_is_there(rule: Rule) -> None:
    for name in rule.kept_by:
        assert resolve(name) is not None
    tests = [TESTS / "system" / test for test in rule.system_tests]
    tests += [TESTS / "unit" / test for test in rule.unit_tests]
    for test in tests:
        path, _, function = str(test).partition("::")
        assert function in functions(Path(path))
    assert rule.mutations or rule.unit_tests


def test_every_mutation_switches_off_one_of_them() -> None:
    assert sorted(MUTATIONS) == sorted(label for rule in RULES for label in rule.mutations)


def test_every_number_in_the_repository_is_defined() -> None:
    defined = {rule.name for rule in RULES}
    named: dict[str, Path] = {}
    for directory in ("quorumfs", "tests"):
        for path in (CHECKOUT / directory).rglob("*.py"):
            for name in re.findall(r"\b[PR]\d+\b", path.read_text(encoding="utf-8")):
                named[name] = path
    assert {name: path for name, path in named.items() if name not in defined} == {}
