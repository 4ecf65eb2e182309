"""What C decides is what plain Python decides by the same rules."""

from support.gate_decisions import decide

DECISIONS = 40_000


def test_c_decides_as_plain_python_does() -> None:
    # More by hand: cd tests && python -m support.gate_decisions 10000000
    assert DECISIONS / 10 < decide(DECISIONS, 1) < DECISIONS / 2
