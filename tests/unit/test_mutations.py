"""The simulation notices when a rule is not kept.

Each test switches one rule off, by replacing one small piece of the real runtime, and tells the
stories of that rule (`support.simulation.rule_stories`) until one ends badly.
"""

import pytest
from support.simulation.mutations import MUTATIONS
from support.simulation.rule_stories import TOLD, Told
from support.simulation.runner import BAD_ENDS
from support.simulation.story import (
    told,
)


@pytest.mark.parametrize("case", TOLD, ids=lambda case: case.mutation)
def test_what_breaks_a_rule_is_noticed(case: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[case.mutation](monkeypatch)
    ends = []
    for seed in range(case.seeds):
        ends.append(told(case.script, case.setup, seed))
        if ends[-1] is not None and ends[-1].startswith(BAD_ENDS):
            return
    pytest.fail(f"nothing was noticed: {ends}")


def test_every_mutation_has_a_story() -> None:
    assert {case.mutation for case in TOLD} == MUTATIONS.keys()
