"""Stories of replicas that go missing and come back: what the others decide meanwhile is on record
first."""

import errno
from contextlib import suppress
from dataclasses import replace

import pytest
import trio
import trio.testing
from support.simulation.fate import TIMEOUT_S
from support.simulation.mounting import Opener
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Fault, Weather
from support.simulation.story import (
    EIO,
    EQUALS,
    EXTENT,
    EXTENTS,
    PAIR,
    RAW_TRIO,
    TRIO,
    WRONG,
    Script,
    Story,
    told,
)

from quorumfs.decisions.dirtymap import UNVERIFIED
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.mount import snapshot
from quorumfs.options.table import MountOptions
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import CHANGES, Kind


async def a_hole_passed_over_without_a_record(story: Story) -> None:
    """Who is not here alone took a write that was cut off; those who are here show a hole."""
    async with story.mounted() as guest:
        await guest.write(EXTENTS[4])  # whatever; it is clean when the set is mounted again
    async with story.mounted() as guest:
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, EXTENT // 2)
        await trio.sleep(1.0)
        story.cut_off(1, 2)
    story.world.detach(0)
    for index in (1, 2):  # nothing but a slow medium
        story.world.replicas[index].sidecar_faults.weather = Weather(delay_s=(4.0, 4.0))
    async with story.mounted() as guest:
        await trio.sleep(1.0)
        await guest.read(EXTENT // 2)
        story.world.kill()
    story.world.calm()
    async with story.mounted() as guest:
        await guest.read(EXTENT // 2)
    await story.ends_well()


async def a_hole_sought_without_a_record(story: Story) -> None:
    """The same as it is passed over, but shown to one who seeks."""
    async with story.mounted() as guest:
        for index in (1, 2):
            story.fail_once(index, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, EXTENT // 2)
        await trio.sleep(1.0)
        story.cut_off(1, 2)
    story.world.detach(0)
    for index in (1, 2):
        story.world.replicas[index].sidecar_faults.weather = Weather(delay_s=(4.0, 4.0))
    async with story.mounted() as guest:
        await guest._seek(EXTENT // 2)
        story.world.kill()
    story.world.calm()
    async with story.mounted() as guest:
        await guest.read(EXTENT // 2)
    await story.ends_well()


async def away_in_turn(story: Story) -> None:
    """Two of three are enough, whoever is away; nothing is ever written, and nothing was lost."""
    async with story.mounted() as guest:
        for index in (0, 1, 2):
            story.fail_once(index, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        story.cut_off(0, 1, 2)
    for away in (0, 1, 2):
        story.world.detach(away)
        try:
            async with story.mounted() as guest:
                await trio.sleep(5.0)
        except AssemblyRefusedError as error:
            raise BrokenError(f"refused without need: {error}") from error
        story.world.attach(away)
    await story.ends_well()


async def current_alone_in_turn(story: Story) -> None:
    """Nobody was used without the others where too few were current for any write to succeed.

    Nor does a record that failed say that the mount before lasted longer.
    """
    story.world.detach(2)
    async with story.mounted() as guest:
        await guest.write_surely(EXTENTS[0])
    story.world.detach(0)
    story.world.attach(2)
    story.fail(2, (Kind.WRITE, Kind.COPY))  # it is not brought up to date
    async with story.mounted() as guest:
        story.world.replicas[1].sidecar_faults.plan(Kind.SYNC, EIO)
        with pytest.raises(OSError, match="Input/output error"):
            await guest.mounted.disk.write(EXTENTS[1], bytes(EXTENT))
        with pytest.raises(OSError, match="too few"):
            await guest.mounted.disk.write(EXTENTS[1], bytes(EXTENT))
        story.world.kill()
    story.mend(2)
    story.world.attach(0)
    story.world.detach(1)
    async with story.mounted() as guest:
        await guest.until(lambda: len(guest.mounted.sidecars.ledger.members) > 1)
        await guest.write_surely(EXTENTS[2])
    story.world.attach(1)
    try:
        async with story.mounted() as guest:
            await guest.converged()
    except AssemblyRefusedError as error:
        raise BrokenError(f"refused without need: {error}") from error
    await story.ends_well()


async def away_while_others_are_compared(story: Story) -> None:
    """Nobody ever looks at what it holds."""
    story.world.replicas[2].image.rot(EXTENTS[5], WRONG)
    story.world.detach(2)
    for index in (0, 1):
        story.slow_down(index, 0.01)
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.until(lambda: not guest.mounted.sidecars.ledger.map.count(UNVERIFIED))
        story.world.attach(2)
        await guest.converged()
        assert not guest.mounted.repairs.differing
    story.oracle.check_images(story.world.contents())
    await story.ends_well()


async def a_majority_that_comes_later(story: Story) -> None:
    """Two differ; the third, that was away, decides."""
    story.world.replicas[1].image.rot(EXTENTS[5], WRONG)
    story.world.detach(2)
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.until(lambda: bool(guest.mounted.repairs.differing))
        story.world.attach(2)
        await guest.until(lambda: len(guest.mounted.members) == 3)
        await guest.converged()
    await story.ends_well()


async def all_hang_and_the_status_is_asked(story: Story) -> None:
    options = MountOptions("fifo", story.setup.threshold)
    async with story.mounted() as guest:
        await guest.write(0)
        for index in range(story.setup.replicas):
            story.world.detach(index, hang=True)
        for at in EXTENTS:
            guest.begin(guest.write, at)
            guest.begin(guest.read, at)
        guest.begin(guest.flush)
        await trio.sleep(TIMEOUT_S / 2)
        asked = len(story.world.trace)
        status = snapshot.take("/mnt", options, guest.mounted.disk, guest.mounted.repairs, ())
        assert len(story.world.trace) == asked
        assert [one.state for one in status.replicas] == ["current", "current"]
        assert all(one.in_flight for one in status.replicas)
        await trio.sleep(3 * TIMEOUT_S)
        status = snapshot.take("/mnt", options, guest.mounted.disk, guest.mounted.repairs, ())
        assert [one.state for one in status.replicas] == ["missing", "missing"]
        story.world.calm()
        await guest.converged()
    await story.ends_well()


async def gone_and_back_when_chunks_differ(story: Story) -> None:
    """Those who cannot be ejected are opened again before anything is made equal."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(0)
        with suppress(OSError):
            await guest.write(0)
        assert guest.mounted.sidecars.ledger.agreement.divergent
        await trio.sleep(10.0)
        story.world.attach(0)
        await guest.converged()
        await guest.write_surely(0)
    await story.ends_well()


async def a_hole_on_those_that_answer(story: Story) -> None:
    """The one that does not answer has data there: it is not settled for that."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.detach(1, hang=True)
        for at in (0, EXTENT // 2):  # what hangs will happen, the second never reaches it
            with suppress(OSError):
                await guest.write(at)
        story.world.detach(0, hang=True)
        with suppress(OSError):
            await guest.read(0)
        story.world.attach(1)
        await trio.sleep(10.0)
        story.world.attach(0)
        await guest.converged()
    story.oracle.check_images(story.world.contents())
    await story.ends_well()


async def gone_and_back_after_a_commit_that_failed(story: Story) -> None:
    """Its sidecar has a record that led nowhere, and it cannot be ejected."""
    async with story.mounted() as guest:
        await guest.write(0)
        story.world.replicas[1].sidecar_faults.plan(Kind.WRITE, Fault(error=errno.EIO))
        with suppress(OSError):
            await guest.mounted.sidecars.close()
        story.world.detach(0)
        with suppress(OSError):
            await guest.read(0)
        await trio.sleep(5.0)
        story.world.attach(0)
        await guest.converged()
        await guest.write_surely(0)
    await story.ends_well()


async def its_medium_is_full(story: Story) -> None:
    """That is no reason to open its files anew."""
    async with story.holding(*EXTENTS).mounted() as guest:
        opened = guest.replica(1).image
        story.fail(1, CHANGES, Fault(error=errno.ENOSPC))
        for _ in range(20):
            with suppress(OSError):
                await guest.write(EXTENTS[1])
            await trio.sleep(1.0)
        if guest.replica(1).image is not opened:
            raise BrokenError("its files were opened anew")
        story.mend(1)
        await guest.converged()
    await story.ends_well()


async def its_open_files_are_lost(story: Story) -> None:
    """Its store is back, and fails every request to the files that were open; it cannot be ejected.

    So does sshfs that has connected again.
    """
    async with story.holding(*EXTENTS).mounted() as guest:
        opened = guest.replica(1).image
        for storage in guest.life.storages(1):
            storage.break_off(errno.EIO)
        with trio.move_on_after(120.0):
            while guest.replica(1).image is opened:
                with suppress(OSError):
                    await guest.write(EXTENTS[1])
                await trio.sleep(1.0)
            await guest.converged()
            await guest.write_surely(EXTENTS[2])
            await guest.flush()
            return
        raise BrokenError("the replica is not opened anew")


async def its_open_files_alone_show_what_was_written(story: Story) -> None:
    """Neither could write it to its medium, and one flush has failed for it: nobody asks whether
    the files are lost, for that drops what they have cached."""
    async with story.mounted() as guest:
        await guest.write(0)
        for index in (0, 1):
            story.fail_once(index, Kind.SYNC)
        with suppress(OSError):
            await guest.flush()
        asked: list[Replica] = []

        async def is_lost(_: object, replica: Replica) -> bool:
            asked.append(replica)
            return False

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Opener, "is_lost", is_lost)
            for index in (0, 1):
                story.fail(index, [Kind.WRITE])
                guest.replica(index).health.perhaps_lost = True
            await trio.sleep(5.0)
            if any(guest.mounted.sidecars.ledger.content.risked(one) for one in asked):
                raise BrokenError("it was asked")
        for index in (0, 1):
            story.mend(index)
        await guest.converged()
    await story.ends_well()


async def one_bad_place_is_read_again_and_again(story: Story) -> None:
    """That is no reason to open files anew: meanwhile every other request would fail."""
    async with story.holding(*EXTENTS).mounted() as guest:
        opened = [guest.replica(index).image for index in (0, 1)]
        for index in (0, 1):
            story.fail(index, [Kind.READ])
        for _ in range(20):
            with suppress(OSError):
                await guest.read(EXTENTS[1])
            await trio.sleep(1.0)
        if [guest.replica(index).image for index in (0, 1)] != opened:
            raise BrokenError("files were opened anew")
        for index in (0, 1):
            story.mend(index)
        await guest.converged()
    await story.ends_well()


async def gone_and_back_after_a_commit_that_was_cut_off(story: Story) -> None:
    """The only member's sidecar holds what a killed mount had prepared: it is as it was found."""
    async with story.holding(*EXTENTS).durable().mounted() as guest:
        story.world.detach(1)
        await guest.write_surely(EXTENTS[0])
        await guest.until(lambda: not guest.replica(1).attached)
        recorder, sidecar = guest.mounted.sidecars.recorder, story.world.replicas[0].sidecar_faults

        async def commit() -> None:
            async with recorder.lock:
                await recorder.commit_locked(clean=False)

        sidecar.script = lambda one: Fault(hang=True) if one.kind is Kind.SYNC else None
        guest.begin(commit)
        await trio.sleep(1.0)
        story.world.kill()
    sidecar.script = None
    async with story.mounted() as guest:
        story.world.detach(0)  # before it gets another record
        with suppress(OSError):
            await guest.flush()
        await guest.until(lambda: not guest.replica(0).attached)
        story.world.attach(0)
        await guest.until(lambda: guest.replica(0).attached)
        await guest.read_surely(EXTENTS[1])
        story.world.attach(1)
    await story.ends_well()


STORIES = [
    (gone_and_back_after_a_commit_that_was_cut_off, replace(EQUALS, threshold=1)),
    (its_open_files_alone_show_what_was_written, EQUALS),
    (its_open_files_are_lost, EQUALS),
    (its_open_files_are_lost, replace(EQUALS, fifo=True)),
    (one_bad_place_is_read_again_and_again, EQUALS),
    (its_medium_is_full, EQUALS),
    (away_while_others_are_compared, RAW_TRIO),
    (a_majority_that_comes_later, RAW_TRIO),
    (gone_and_back_when_chunks_differ, EQUALS),
    (a_hole_on_those_that_answer, EQUALS),
    (gone_and_back_after_a_commit_that_failed, EQUALS),
    (a_hole_passed_over_without_a_record, TRIO),
    (a_hole_passed_over_without_a_record, replace(TRIO, fifo=True)),
    (a_hole_sought_without_a_record, TRIO),
    (away_in_turn, TRIO),
    (current_alone_in_turn, TRIO),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4


def test_the_status_waits_for_nobody() -> None:
    """P5: it is a plain function of what is in memory."""
    assert told(all_hang_and_the_status_is_asked, PAIR, 0) is None
