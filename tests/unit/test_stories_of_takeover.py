"""Stories of a set that another host takes over, while the mount that had it goes on."""

import errno
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.claims import claim
from support.simulation.setup import SCALES, Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    EQUALS,
    EXTENTS,
    PAIR,
    TRIO,
    Script,
    Story,
    taken_over_while_at_work,
    told,
)

from quorumfs.decisions.model import Standing
from quorumfs.replica.storage import CHANGES, Kind

SETUPS = [replace(setup, claims=True) for setup in (PAIR, TRIO, EQUALS)]


async def taken_over_while_idle(story: Story) -> None:
    """It notices also when nobody asks it anything; what it cached is not shown any more."""
    async with story.mounted() as old:
        for at in EXTENTS:
            await old.write(at)
        async with story.taken_over(old) as new:
            old.begin(old.go_on)
            for at in EXTENTS:
                await new.write_surely(at)
            await new.converged()
    await story.ends_well()


async def one_sidecar_cannot_be_read_back(story: Story) -> None:
    """Another one tells, and one that hangs holds up nobody."""
    async with story.mounted() as old:
        await old.write(0)
        faults = story.world.replicas[0].sidecar_faults
        faults.plan(Kind.REREAD, Fault(hang=True))
        old.begin(old.go_on)
        async with story.taken_over(old) as new:
            for at in EXTENTS:
                await new.write_surely(at)
            await new.converged()
    await story.ends_well()


async def a_replica_in_use_elsewhere_comes_back(story: Story) -> None:
    """It is not touched until the other mount has released it, and then caught up."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(1)
        await guest.write_surely(0)
        theirs = claim()
        story.world.sign(1, theirs)
        story.world.attach(1)
        replica = guest.mounted.disk.replicas[1]
        await guest.until(lambda: replica.state is Standing.FOREIGN)
        assert "in use by pid 4711 on nas1" in str(replica.reason)
        await guest.write_surely(0)
        await trio.sleep(70.0)
        assert guest.mounted.sidecars.fenced is None
        assert story.world.claim(1) == theirs
        story.world.sign(1, theirs.release())
        await guest.converged()
    await story.ends_well()


async def taken_over_amid_a_resync(story: Story) -> None:
    """What repairs write stops as well."""
    async with story.mounted() as old:
        story.fail(1, CHANGES)
        for at in EXTENTS:
            await old.write(at, SCALES[0].extent)
        story.mend(1)
        old.begin(old.go_on)
        await old.until(lambda: old.mounted.sidecars.ledger.target is not None, every_s=0.01)
        async with story.taken_over(old) as new:
            for at in EXTENTS:
                await new.write_surely(at)
            await new.converged()
    await story.ends_well()


async def no_list_is_written_again_after_a_takeover(story: Story) -> None:
    """A list of unreadable places that failed to be written waits for the next record; not even
    that is written before the claim was read."""
    async with story.mounted() as old:
        await old.write(0)
        recorder = old.mounted.sidecars.recorder
        for one in story.world.replicas:
            one.sidecar_faults.plan(Kind.WRITE, Fault(error=errno.EIO))
        with suppress(OSError):
            await recorder.write_unreadable()
        sidecars = [one.sidecar for one in story.world.replicas if one.sidecar]
        for index in range(len(sidecars)):
            story.world.sign(index, claim())
        held = [one.whole for one in sidecars]
        with suppress(OSError):
            async with recorder.lock:
                await recorder.commit_locked(clean=False)
        assert old.mounted.sidecars.fenced is not None
        assert [one.whole for one in sidecars] == held
        story.world.kill()


async def takeover_found_by_a_commit(story: Story) -> None:
    """Before anything is on record that was decided after the set was lost."""
    async with story.mounted() as old:
        await old.write(0)
        sidecars = old.mounted.sidecars
        async with story.taken_over(old) as new:
            assert sidecars.fenced is not None
            await new.write_surely(0)
    await story.ends_well()


@pytest.mark.parametrize(
    ("script", "setup"),
    [
        *((taken_over_while_at_work, setup) for setup in SETUPS),
        (taken_over_while_idle, SETUPS[0]),
        (taken_over_while_idle, replace(SETUPS[0], fast=1.0)),
        (one_sidecar_cannot_be_read_back, SETUPS[1]),
        (a_replica_in_use_elsewhere_comes_back, SETUPS[0]),
        (taken_over_amid_a_resync, SETUPS[0]),
        (taken_over_amid_a_resync, SETUPS[1]),
        (no_list_is_written_again_after_a_takeover, SETUPS[0]),
        (takeover_found_by_a_commit, SETUPS[2]),
    ],
)
def test_another_host_takes_over(script: Script, setup: Setup) -> None:
    """Nothing is lost that it acknowledged, and the other one acknowledges nothing any more."""
    assert [told(script, setup, seed) for seed in range(2)] == [None] * 2
