"""In which steps zeros are made of a long range."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from quorumfs.decisions.voting import BLOCK
from quorumfs.disk.mirror import Mirror
from quorumfs.disk.zeroing import STEP_MAX, STEPS, Zeroing


@pytest.mark.parametrize("beyond", [0, 512, 4096, 123 * 512])
def test_each_step_but_the_last_ends_with_a_block(beyond: int) -> None:
    """On a disk of any size: a sector is zeroed as a whole, or not at all."""
    size = 2 * STEPS * STEP_MAX + beyond

    async def ask(_: object, __: object, ___: int, offset: int, length: int) -> list[Any]:
        operation = SimpleNamespace(value=offset + length)
        return [SimpleNamespace(error=None, operation=operation)]

    ledger = SimpleNamespace(prepared=lambda *_: True, receivers=())
    mirror = SimpleNamespace(size=size, ledger=ledger, requests=0, threshold=1, ask=ask)
    zeroing, ends = Zeroing(cast("Mirror", mirror)), [0]

    async def main() -> None:
        while ends[-1] < size:
            ends.append(await zeroing.next_step(ends[-1], size))

    trio.run(main)
    assert len(ends) > STEPS
    assert not any(end % BLOCK for end in ends[:-1])
