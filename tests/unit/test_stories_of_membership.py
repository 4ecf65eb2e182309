"""Stories of replicas that are taken out and in, and of one that is about to be added."""

from contextlib import suppress
from dataclasses import replace

import pytest
import trio
from support.simulation.administrator import RefusedOrderError
from support.simulation.fate import TIMEOUT_S
from support.simulation.oracle import BrokenError
from support.simulation.storage import Fault
from support.simulation.story import EIO, EXTENTS, PAIR, TRIO, Guest, Script, Story, told

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.model import Found, Standing
from quorumfs.decisions.record import RoleState
from quorumfs.decisions.returned import covers
from quorumfs.live.actions import Action, Request
from quorumfs.live.membership import Membership
from quorumfs.metadata.ledger.commit import Order
from quorumfs.replica.replica import Replica
from quorumfs.replica.storage import Kind


def require(fact: object, what: str) -> None:
    if not fact:
        raise BrokenError(what)


async def taken_out(guest: Guest, index: int) -> None:
    """As `quorumfs.live.membership` does it, with nothing under way."""
    await guest.mounted.disk.mirror.sync()
    await guest.mounted.sidecars.enrolment.take_out(guest.mounted.disk.replicas[index])


async def begun_to_be_added(story: Story) -> None:
    """Its sidecar is there, and the set does not know of it: wherever it is named, it is nobody,
    and the map of the others says nothing of it."""
    async with story.holding(*EXTENTS).mounted() as guest:
        await guest.write_surely(EXTENTS[0])
        enrolment = guest.mounted.sidecars.enrolment
        place = enrolment.new_role("/new.img")
        assert place is not None
        newcomer = enrolment.first_sidecar(*place)
        others = story.world.found()  # as the next mount would, if the daemon died now
        new = Found("/new.img", others[0].image, newcomer)
        plan = assemble([new, *others])
        states = [member.state for member in plan.members]
        require(states == [Standing.FOREIGN, Standing.CURRENT, Standing.CURRENT], str(states))
        require(len(plan.record.roles) == len(others), "the record names who lacks everything")


async def out_and_in_again(story: Story) -> None:
    """What was written meanwhile, and nothing else, is what it lacks."""
    async with story.holding(*EXTENTS).mounted() as guest:
        await guest.write_surely(EXTENTS[0])
        await taken_out(guest, 1)
        replica, ledger = guest.mounted.disk.replicas[1], guest.mounted.sidecars.ledger
        require(replica.standing is Standing.OFFLINE, "it is not offline")
        require(ledger.record.roles[1].state is RoleState.OFFLINE, "that is not on record")
        require(not ledger.enough_without([guest.mounted.disk.replicas[0]]), "the last one may go")
        await guest.write_surely(EXTENTS[1])
        lacking = ledger.map.lacking_bytes(1)
        require(lacking == ledger.map.chunk_size, f"it lacks {lacking} bytes")
        await guest.mounted.sidecars.enrolment.take_in(replica)
        require(ledger.record.roles[1].state is not RoleState.OFFLINE, "that is not on record")


async def removal_that_failed_is_not_taken_back(story: Story) -> None:
    """From the record of a removal on nothing says what the replica lacks."""
    async with story.holding(*EXTENTS).mounted() as guest:
        await guest.write_surely(EXTENTS[0])
        await taken_out(guest, 1)
        sidecars, replica = guest.mounted.sidecars, guest.mounted.disk.replicas[1]
        sidecars.ledger.records.orders[1] = Order(RoleState.REMOVED, at=1)
        try:
            await sidecars.enrolment.take_in(replica)
        except OSError as error:
            require("being removed" in (error.strerror or ""), str(error))
        else:
            raise BrokenError("a replica that is being removed was taken in")
        del sidecars.ledger.records.orders[1]
        await sidecars.enrolment.take_in(replica)


async def removed_while_a_request_hangs_on_it(story: Story) -> None:
    """Whoever waits for that is answered, though the replica is watched no more."""
    async with story.holding(*EXTENTS).mounted() as guest:
        story.fail(1, [Kind.SEEK_DATA], Fault(hang=True))
        ended = trio.Event()

        async def ask() -> None:
            with suppress(OSError):
                await guest.mounted.disk.next_data(0)
            ended.set()

        guest.life.nursery.start_soon(ask)
        await trio.sleep(0.1)
        administrator = guest.administrator()
        async with administrator._until_killed():
            with suppress(RefusedOrderError):
                await administrator.remove(1)
        with trio.move_on_after(60.0):
            await ended.wait()
        require(ended.is_set(), "a request has no answer")


async def made_anew_while_it_comes_back(story: Story) -> None:
    """It does not rejoin while the others put on record that it lacks everything."""
    async with story.holding(*EXTENTS).mounted() as guest:
        story.world.detach(1)
        await guest.write_surely(EXTENTS[0])
    async with story.mounted() as guest:
        replica, enrolment = guest.replica(1), guest.mounted.sidecars.enrolment
        require(replica.standing is Standing.MISSING, "it is there")
        give_up_content = enrolment.give_up_content

        async def slowly(slot: int) -> None:
            story.world.attach(1)
            await trio.sleep(100.0)
            require(not replica.standing.is_ours, "it has rejoined meanwhile")
            await give_up_content(slot)

        story.state.parted = {1}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(enrolment, "give_up_content", slowly)
            administrator = guest.administrator()
            async with administrator._until_killed():
                await administrator.add(1)
        await guest.converged()
    await story.ends_well()


async def taken_out_under_writes(story: Story) -> None:
    """No write is under way to the one that leaves when it does: its image is of one moment."""

    async def write(guest: Guest, at: int) -> None:
        while True:
            await guest.write_surely(at)

    async with story.holding(*EXTENTS).mounted() as guest:
        mounted, leaving = guest.mounted, guest.mounted.disk.replicas[1]
        enrolment = mounted.sidecars.enrolment
        take_out = enrolment.take_out

        async def watched(replica: Replica) -> OSError | None:
            require(not list(replica.changing), "a write to it is under way")
            return await take_out(replica)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(enrolment, "take_out", watched)
            changing, settings = trio.Lock(), mounted.settings
            membership = Membership(
                mounted.disk, mounted.sidecars, mounted.repairs, changing, settings, "/mnt"
            )
            async with trio.open_nursery() as nursery:
                for at in EXTENTS:
                    nursery.start_soon(write, guest, at)
                await trio.sleep(0.1)
                request, action = Request({"replica": leaving.path}), Action(1, "offline")
                await membership.offline(request, action)
                require(leaving.standing is Standing.OFFLINE, "it is not offline")
                nursery.cancel_scope.cancel()
        await enrolment.take_in(leaving)


async def taken_out_again_after_a_failure(story: Story) -> None:
    """An order that is not on record is not taken for done when it is given again (R3)."""
    async with story.holding(*EXTENTS).mounted() as guest:
        administrator, faults = guest.administrator(), story.world.replicas[0].sidecar_faults
        faults.script = lambda operation: EIO if operation.kind is Kind.WRITE else None
        with pytest.raises(RefusedOrderError):
            await administrator.offline(1)
        faults.script = None
        await administrator.offline(1)
        ledger = guest.mounted.sidecars.ledger
        require(ledger.record.roles[1].state is RoleState.OFFLINE, "that is not on record")
        story.world.kill()
    await story.ends_well()


async def taken_out_without_a_word_to_it(story: Story) -> None:
    """The set knows it by the record that it has, where it cannot be given the one that follows."""
    async with story.holding(*EXTENTS).mounted() as guest:
        await guest.write_surely(EXTENTS[0])
        story.fail_once(1, Kind.SEAL)
        await guest.administrator().offline(1)
        record, own = guest.mounted.sidecars.ledger.record, story.world.found()[1].sidecar
        require(record.roles[1].state is RoleState.OFFLINE, "that is not on record")
        assert own is not None
        known = covers(record, 1, own.record.generation, own.record.sequence)
        require(known, "the record names one that it never had")
    await story.ends_well()


async def taken_out_amid_a_removal_that_failed(story: Story) -> None:
    """It is going to be removed, whatever is asked for."""
    async with story.holding(*EXTENTS).mounted() as guest:
        administrator, faults = guest.administrator(), story.world.replicas[0].sidecar_faults
        faults.script = lambda operation: EIO if operation.kind is Kind.WRITE else None
        with pytest.raises(RefusedOrderError):
            await administrator.remove(1)
        faults.script = None
        with pytest.raises(RefusedOrderError, match="being removed"):
            await administrator.offline(1)
        await administrator.remove(1)
    await story.ends_well()


async def no_one_is_left_to_reach_the_threshold(story: Story) -> None:
    """One that is not current, but coming, is needed as well: without it no mount would succeed."""
    async with story.holding(*EXTENTS).mounted() as guest:
        administrator = guest.administrator()
        story.world.detach(1)
        await guest.write_surely(EXTENTS[0])
        guest.mounted.sidecars.ledger.records.threshold = 2  # as in a mount of two, one behind
        with pytest.raises(RefusedOrderError, match="would have 1 replicas in use"):
            await administrator.offline(1)
        with pytest.raises(RefusedOrderError, match="would have 1 replicas in use"):
            await administrator.remove(1)
        guest.mounted.sidecars.ledger.records.threshold = 1
        await administrator.offline(1)
        story.world.attach(1)
        await administrator.online(1)
    await story.ends_well()


async def raised_while_one_hangs(story: Story) -> None:
    """The guest pays for the one that hangs, and not for what was asked for."""
    async with story.holding(*EXTENTS).mounted() as guest:
        administrator, began = guest.administrator(), trio.current_time()
        story.world.detach(0, hang=True)
        written: list[float] = []

        async def write() -> None:
            await trio.sleep(0.1)
            await guest.write(EXTENTS[1])
            written.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            with suppress(RefusedOrderError):
                await administrator.change_threshold(3)
        require(written[0] < 1.5 * TIMEOUT_S, f"the write took {written[0]} s")
        require(guest.mounted.disk.threshold == 2, "it was refused, and is in force")
        story.world.attach(0)
    await story.ends_well()


async def raised_while_one_fails(story: Story) -> None:
    """A change that failed leaves the threshold as it was, and the guest goes on by it."""
    async with story.holding(*EXTENTS).mounted() as guest:
        faults = story.world.replicas[1].sidecar_faults
        faults.script = lambda operation: EIO if operation.kind is Kind.WRITE else None
        with pytest.raises(RefusedOrderError, match="vote-threshold stays 1"):
            await guest.administrator().change_threshold(2)
        await guest.write_surely(EXTENTS[0])
        faults.script = None
    await story.ends_well()


STORIES: list[Script] = [
    no_one_is_left_to_reach_the_threshold,
    raised_while_one_fails,
    taken_out_again_after_a_failure,
    taken_out_amid_a_removal_that_failed,
    taken_out_without_a_word_to_it,
    taken_out_under_writes,
    begun_to_be_added,
    out_and_in_again,
    made_anew_while_it_comes_back,
    removed_while_a_request_hangs_on_it,
    removal_that_failed_is_not_taken_back,
]


@pytest.mark.parametrize("seed", range(3))
def test_a_threshold_is_raised_while_one_hangs(seed: int) -> None:
    assert told(raised_while_one_hangs, TRIO, seed) is None


@pytest.mark.parametrize("script", STORIES, ids=lambda script: script.__name__)
@pytest.mark.parametrize("seed", range(3))
def test_a_story_ends_well(script: Script, seed: int) -> None:
    assert told(script, replace(PAIR, threshold=1), seed) is None
