"""Stories of files that fail to close, or take long.

The kernel closes a file whatever error it gives (of what it still had to write, say), and may take
as long as the file system does. Until then the file has its locks, and its store cannot be
unmounted.
"""

import errno
from dataclasses import replace

import pytest
import trio
from support.simulation.fate import TIMEOUT_S
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Fault, Faults
from support.simulation.story import BLOCK, EXTENT, PAIR, QUAD, Guest, Script, Story, told

from quorumfs.disk.watchdog import TICK_S
from quorumfs.replica.storage import CHANGES, Kind

SOON_S = 5.0
SLOW = replace(QUAD, threshold=1)


def _faults(story: Story, file: str) -> list[Faults]:
    """Of the second replica's image, of its sidecar, or of both."""
    one = story.world.replicas[1]
    faults = {"image": [one.image_faults], "sidecar": [one.sidecar_faults]}
    return faults.get(file, [one.image_faults, one.sidecar_faults])


def _is_open(guest: Guest, index: int) -> bool:
    return not all(storage.closed for storage in guest.life.storages(index))


async def _soon(guest: Guest, what: str, seconds: float = SOON_S) -> None:
    with trio.move_on_after(seconds) as scope:
        await guest.converged()
    if scope.cancelled_caught:
        raise BrokenError(f"{what} kept others from coming back: {guest.mounted}")


def fails(file: str, error: int) -> Script:
    """Closed with an error when it is ejected, it comes back at once; and so at unmount."""

    async def script(story: Story) -> None:
        async with story.holding(0).failing(1, Kind.WRITE).mounted() as guest:
            for faults in _faults(story, file):
                faults.plan(Kind.CLOSE, Fault(error=error), Fault(error=error))
            await guest.write(0)
            assert guest.mounted.members == [0]
            await _soon(guest, "a close that failed")
        if story.state.last is None:
            raise BrokenError("an error of closing was taken for one of the flush before it")
        await story.ends_well()

    return script


async def is_put_off(story: Story) -> None:
    """For want of a thread: it is begun later, and meanwhile the file is not forgotten."""
    async with story.mounted() as guest:
        story.fail_once(1, Kind.WRITE)
        for faults in _faults(story, "both"):
            faults.plan(Kind.CLOSE, *[Fault(error=errno.EAGAIN, at_once=True)] * 3)
        await guest.write(0)
        await _soon(guest, "a close that was put off")
    await story.ends_well()


def hangs(file: str) -> Script:
    """Who comes back meanwhile does not wait for it; and when it is closed it comes back too."""

    async def script(story: Story) -> None:
        async with story.mounted() as guest:
            await guest.write(0)
            for faults in _faults(story, file):
                faults.plan(Kind.CLOSE, Fault(hang=True))
            for index in (1, 2):
                story.fail_once(index, Kind.WRITE)
                await guest.write(0)
            with trio.move_on_after(TIMEOUT_S / 2) as scope:
                await guest.until(lambda: guest.mounted.members == [0, 2, 3], every_s=0.1)
            if scope.cancelled_caught:
                raise BrokenError(f"one waited for another one's close: {guest.mounted}")
            await trio.sleep(2 * TIMEOUT_S)
            replica = guest.mounted.replica(1)
            if replica is None or not replica.hung:
                raise BrokenError("nobody is told that a close hangs")
            story.world.release(1)
            await _soon(guest, "a close that took long")
        await story.ends_well()

    return script


async def hangs_at_unmount(story: Story) -> None:
    """All are given their time together, not one after the other."""
    async with story.mounted() as guest:
        await guest.write(0)
        for one in story.world.replicas:
            for faults in (one.image_faults, one.sidecar_faults):
                faults.plan(Kind.CLOSE, Fault(hang=True))
        began = trio.current_time()
        await story.mounting.unmount(guest.mounted, must_succeed=True)
        if trio.current_time() - began > TIMEOUT_S + 2 * TICK_S:
            raise BrokenError(f"it took {trio.current_time() - began} s")
        guest.life.end("exited")
    await story.ends_well()


async def amid_a_long_resync(story: Story) -> None:
    """One that fails meanwhile is let go of at once, and not when the repairs have time for it."""
    async with story.mounted() as guest:
        story.fail(1, CHANGES)
        for at in range(0, story.world.size, EXTENT):
            await guest.write(at, EXTENT)
        story.mend(1)
        story.slow_down(1, 1.0)
        await guest.until(lambda: guest.mounted.sidecars.ledger.target is not None)
        story.fail_once(2, Kind.WRITE)
        await guest.write(0, BLOCK)
        await trio.sleep(TICK_S)
        if _is_open(guest, 2):
            raise BrokenError("its files keep its store busy")
        if guest.mounted.sidecars.ledger.target is None:
            raise BrokenError("the resync was too short for this story")
    await story.ends_well()


ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR, errno.ENOTCONN)


@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("file", ["image", "sidecar", "both"])
def test_closing_that_fails_keeps_nobody_away(file: str, error: int) -> None:
    assert told(fails(file, error), PAIR, seed=1) is None


@pytest.mark.parametrize(
    ("script", "setup"),
    [
        (is_put_off, PAIR),
        (hangs("image"), SLOW),
        (hangs("sidecar"), SLOW),
        (hangs("both"), SLOW),
        (hangs_at_unmount, PAIR),
        (amid_a_long_resync, SLOW),
    ],
    ids=["put off", "image hangs", "sidecar hangs", "both hang", "at unmount", "amid a resync"],
)
def test_closing_that_takes_long_holds_up_nobody(script: Script, setup: Setup) -> None:
    assert told(script, setup, seed=1) is None
