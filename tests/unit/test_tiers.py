"""The first tier of tests is made of files that are there."""

from pathlib import Path

from support.tiers import FIRST, is_first


def test_the_first_tier_names_files_of_unit_tests() -> None:
    unit = Path(__file__).parent
    assert [name for name in FIRST if not (unit / name).is_file()] == []
    assert len(set(FIRST)) == len(FIRST)


def test_a_test_belongs_to_the_tier_of_its_file() -> None:
    assert is_first("tests/unit/test_voting.py::test_a_majority[1]")
    assert not is_first("tests/system/test_resync.py::test_voting.py")
