"""Tests in tiers: with ``--tiers`` cheap and telling ones run first, and a failure ends the run.

The first tier tells within a minute whether a rule is broken. Its tests are dealt out to the
workers one by one; of all others each file is run by one worker.
"""

import os
from pathlib import PurePath

import pytest

FIRST = (
    "test_rules_kept.py",
    "test_rules.py",
    "test_simulation_package.py",
    "test_tiers.py",
    "test_ranges.py",
    "test_voting.py",
    "test_lineage.py",
    "test_volatile.py",
    "test_assembly.py",
    "test_replicaset.py",
    "test_recorded.py",
    "test_intents.py",
    "test_epochs.py",
    "test_dirtymap.py",
    "test_sidecar.py",
)
"""The files of the first tier, in their order: the rules in simulated storage, plain decisions, and
then the exhaustive tests of what is kept in memory and on record."""


def is_first(nodeid: str) -> bool:
    """Whether a test is in the first tier."""
    return PurePath(nodeid.partition("::")[0]).name in FIRST


def _rank(item: pytest.Item) -> int:
    return FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--tiers",
        action="store_true",
        help="run cheap and telling tests first; one of them that fails ends the run",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("tiers"):
        config.pluginmanager.register(Tiers(), "tiers")


class Tiers:
    """The hooks that ``--tiers`` switches on."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Puts the first tier first."""
        items.sort(key=_rank)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: object) -> object:
        """Deals out the first tier test by test where all others are dealt out by file."""
        if config.getoption("dist") != "loadfile":
            return None
        from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

        scheduling = LoadFileScheduling(config, log)
        by_file = scheduling._split_scope
        scheduling._split_scope = lambda nodeid: nodeid if is_first(nodeid) else by_file(nodeid)
        return scheduling

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Ends the run, and all workers, when a test of the first tier has failed."""
        if report.failed and is_first(report.nodeid) and "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit("a test of the first tier failed, so no others are run", returncode=1)
