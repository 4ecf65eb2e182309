"""Stories of read-only mounts, where nothing can be repaired and nothing recorded."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
import trio
from support.simulation.fate import TIMEOUT_S, Mounted
from support.simulation.oracle import BrokenError
from support.simulation.setup import Setup
from support.simulation.storage import Fault
from support.simulation.story import (
    BLOCK,
    EQUALS,
    EXTENT,
    PAIR,
    TRIO,
    WRONG,
    Guest,
    Script,
    Story,
    told,
)

from quorumfs.decisions.model import Standing
from quorumfs.decisions.patterns import Fifo, Quorum
from quorumfs.disk.disk import Disk
from quorumfs.disk.events import EventLog
from quorumfs.disk.mirror import Mirror
from quorumfs.live.settings import Settings
from quorumfs.metadata.sidecars import Sidecars
from quorumfs.mount.replicaset import read_pattern
from quorumfs.options.table import MountOptions
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import CHANGES, Kind


@asynccontextmanager
async def mounted_read_only(story: Story, order: Sequence[int]) -> AsyncGenerator[Guest, None]:
    """As `ReplicaSet.make_disk` does it with ``-o ro``: nothing repairs, nothing is recorded."""
    paths = list(order)
    plan = story.operator.assemble(paths)
    found = story.world.found(paths)
    story.state.last = None
    async with story.world.boot() as life:
        replicas = []
        for number, (index, member) in enumerate(zip(paths, plan.members, strict=True)):
            path = story.world.replicas[index].path
            if member.state in (Standing.FOREIGN, Standing.MISSING):
                replicas.append(Replica(number, path, None, TIMEOUT_S))
                continue
            image = life.image(index, plan.record.size)
            sidecar = life.sidecar(index)
            replicas.append(Replica(number, path, image, TIMEOUT_S, sidecar=sidecar))
        threshold = plan.record.threshold
        sidecars = Sidecars(replicas, plan, found, threshold=threshold, read_only=True)
        mirror = Mirror(
            plan.record.size,
            sidecars,
            pattern=Fifo() if story.setup.fifo else Quorum(threshold),
            search_s=TIMEOUT_S,
            events=EventLog("disk", story.mounting.heard),
        )
        disk = Disk(mirror)
        life.nursery.start_soon(disk.run)
        settings = Settings(
            disk, None, MountOptions("fifo", threshold, read_only=True), read_pattern
        )
        mounted = Mounted(
            story.world.index_of,
            plan,
            disk,
            sidecars,
            None,  # type: ignore[arg-type]
            settings,
        )
        yield Guest(story, life, mounted)
        written = [
            operation
            for index in paths
            for storage in life.storages(index)
            for operation in storage.log
            if operation.kind in CHANGES
        ]
        if written:
            raise BrokenError(f"a read-only mount wrote {len(written)} times")
    story.state.life_ended()


async def pinned_anew_read_only(story: Story) -> None:
    """One sector of the pinned source cannot be read; so another one is believed everywhere."""
    async with story.mounted() as guest:
        await guest.write(0)
        await guest.write(EXTENT // 2)
        await guest.flush()
        story.fail_once(1, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        story.cut_off(1)
    async with mounted_read_only(story, [0, 1]) as guest:
        await guest.read(0)
        story.fail_once(0, Kind.READ)
        await guest.read(EXTENT // 2)
        with suppress(OSError):
            await guest.read(0)
    await story.ends_well()


async def flushed_read_only(story: Story) -> None:
    """One is on record as having lost something: a flush of what cannot be written to says EIO,
    and tries to write to the sidecars (in life their descriptors are read-only)."""
    async with story.holding(0).failing(0, Kind.SYNC).mounted() as guest:
        story.fail(0, CHANGES)
        with suppress(OSError):
            await guest.flush()
        await trio.sleep(5.0)
        story.world.kill()
    story.mend(0)
    async with mounted_read_only(story, [0, 1]) as guest:
        await guest.read_surely(0)
        try:
            await guest.flush()
        except OSError as error:
            raise BrokenError(f"a read-only disk cannot be flushed: {error}") from error
    await story.ends_well()


async def rotten_read_only(story: Story) -> None:
    """What nobody can be given is read as a mount that settles it would (P7, P9)."""
    async with story.holding(0).durable().mounted() as guest:
        story.world.replicas[0].image.rot(0, WRONG)
        await guest.write(2 * BLOCK)
        story.world.kill()
    async with mounted_read_only(story, [0, 1, 2]) as guest:
        await guest.read_surely(0)
    await story.ends_well()


async def one_of_a_majority_fails_read_only(story: Story) -> None:
    """What the majority showed is shown by the rest of it, not by the one that differed (P7)."""
    async with story.holding(0).durable().mounted() as guest:
        for index in (0, 2):
            story.fail_once(index, Kind.WRITE, Fault(hang=True))
        guest.begin(guest.write, 0)
        await trio.sleep(1.0)
        story.cut_off(0, 2)
    async with mounted_read_only(story, [0, 1, 2]) as guest:
        shown = await guest.mounted.disk.read(0, BLOCK)
        story.fail(0, [Kind.READ])
        if await guest.mounted.disk.read(0, BLOCK) != shown:
            raise BrokenError("what was read has turned back")
        story.mend(0)
    await story.ends_well()


STORIES = [
    (one_of_a_majority_fails_read_only, TRIO),
    (one_of_a_majority_fails_read_only, replace(TRIO, fifo=True)),
    (rotten_read_only, TRIO),
    (rotten_read_only, replace(TRIO, fifo=True)),
    (flushed_read_only, EQUALS),
    (flushed_read_only, replace(EQUALS, fifo=True)),
    (pinned_anew_read_only, PAIR),
]


@pytest.mark.parametrize(("script", "setup"), STORIES, ids=lambda v: getattr(v, "__name__", ""))
def test_it_ends_well(script: Script, setup: Setup) -> None:
    assert [told(script, setup, seed) for seed in range(4)] == [None] * 4
