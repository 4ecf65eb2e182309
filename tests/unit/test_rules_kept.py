"""Every rule is kept: the stories that notice a broken rule end well.

They are told here before anything else is tested, those with the fewest seeds first: whoever
breaks a rule is to hear of it within a minute (`support.tiers`).
"""

import pytest
from support.simulation.rule_stories import TOLD
from support.simulation.setup import Setup
from support.simulation.story import Script, told

SEEDS: dict[tuple[Script, Setup], int] = {}
"""By story and setup: with how many seeds it is told."""
for case in TOLD:
    SEEDS[case.script, case.setup] = max(case.seeds, SEEDS.get((case.script, case.setup), 0))

STORIES = sorted(SEEDS.items(), key=lambda item: item[1])


@pytest.mark.parametrize(
    ("script", "setup", "seeds"),
    [(script, setup, seeds) for (script, setup), seeds in STORIES],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_story_of_a_rule_ends_well(script: Script, setup: Setup, seeds: int) -> None:
    for seed in range(seeds):
        assert told(script, setup, seed) is None, f"seed {seed}"
