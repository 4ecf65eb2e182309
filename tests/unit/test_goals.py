"""What can be waited for: when it is reached, and when waiting is of no use."""

from dataclasses import replace

import pytest

from quorumfs.control.goals import RESYNCED, Goal, goal
from quorumfs.control.status import (
    DiskState,
    Fenced,
    ReplicaStatus,
    ResyncStatus,
    Status,
)
from quorumfs.decisions.model import RepairKind, Standing
from quorumfs.errors import ExitCode, UsageError, UserError

A = ReplicaStatus("/nas1/a.img", "a" * 32, "current")
B = ReplicaStatus("/nas2/b.img", "b" * 32, "current")
HEALTHY = Status("/mnt", 1, None, None, 1 << 20, DiskState.HEALTHY, "fifo", 1, (A, B))
RESYNC = ResyncStatus("/nas2/b.img", 0, 1 << 20, 0, None, RepairKind.RESYNC)
STALE = replace(B, state="stale", out_of_sync_bytes=4096)
DEGRADED = replace(HEALTHY, state=DiskState.DEGRADED, replicas=(A, STALE))


def with_b(state: Standing, whole: DiskState = DiskState.DEGRADED) -> Status:
    return replace(HEALTHY, state=whole, replicas=(A, replace(B, state=state.value)))


def hopeless(wanted: Goal, status: Status) -> UserError:
    with pytest.raises(UserError) as caught:
        wanted.require_hope(status)
    return caught.value


@pytest.mark.parametrize("state", list(DiskState))
def test_each_state_can_be_waited_for(state: DiskState) -> None:
    wanted = goal(state.value)
    for other in DiskState:
        assert wanted.is_reached(replace(HEALTHY, state=other)) is (state is other)
    if state is not DiskState.HEALTHY:
        wanted.require_hope(replace(HEALTHY, state=DiskState.NEEDS_OPERATOR))


def test_clean_is_healthy_with_nothing_left_to_do() -> None:
    clean = goal("clean")
    assert clean.is_reached(HEALTHY)
    for status in (
        DEGRADED,
        replace(HEALTHY, resync=RESYNC),
        replace(HEALTHY, replicas=(A, replace(B, out_of_sync_bytes=1))),
    ):
        assert not clean.is_reached(status)
        clean.require_hope(status)


@pytest.mark.parametrize("name", ["/nas2/b.img", "b.img", "b" * 32])
def test_a_replica_is_waited_for_by_each_of_its_names(name: str) -> None:
    current = goal(f"current:{name}")
    assert current.is_reached(HEALTHY)
    assert not current.is_reached(DEGRADED)
    current.require_hope(DEGRADED)


def test_an_unknown_replica_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"c\.img is not one .*: /nas1/a\.img, /nas2/b\.img"):
        goal("current:c.img").is_reached(HEALTHY)


def test_a_file_name_of_two_replicas_is_refused_with_both() -> None:
    twins = replace(HEALTHY, replicas=(A, replace(A, path="/nas2/a.img", replica_id="b" * 32)))
    with pytest.raises(UsageError, match=r"a\.img may be each of /nas1/a\.img, /nas2/a\.img"):
        goal("current:a.img").is_reached(twins)


def test_what_nobody_knows_is_refused_with_all_that_can_be_waited_for() -> None:
    with pytest.raises(UsageError, match=r"allowed: healthy, degraded, .*clean, current:REPLICA"):
        goal("well")


@pytest.mark.parametrize("wanted", ["healthy", "clean", "current:b.img"])
@pytest.mark.parametrize("state", [Standing.FOREIGN, Standing.OFFLINE])
def test_who_waits_for_a_person_is_told_at_once(wanted: str, state: Standing) -> None:
    error = hopeless(goal(wanted), with_b(state))
    assert error.exit_code is ExitCode.NEEDS_OPERATOR
    assert str(error).startswith(f"/nas2/b.img is {state.value}")
    goal("current:a.img").require_hope(with_b(state))


def test_a_decision_between_differing_replicas_is_a_persons() -> None:
    status = replace(HEALTHY, state=DiskState.NEEDS_OPERATOR, undecided_bytes=4096)
    assert "choose whose data to keep" in str(hopeless(goal("clean"), status))


@pytest.mark.parametrize("wanted", [goal("healthy"), goal("current:a.img"), RESYNCED])
def test_a_fenced_mount_comes_back_by_no_waiting(wanted: Goal) -> None:
    status = replace(HEALTHY, state=DiskState.NO_QUORUM, fenced=Fenced("host", 1, "now"))
    assert hopeless(wanted, status).exit_code is ExitCode.UNUSABLE


def test_what_is_missed_is_told_with_what_is_instead() -> None:
    told = goal("healthy").missed(DEGRADED)
    assert told.startswith("healthy is not reached: /mnt is degraded: /nas2/b.img is stale: it is")
    told = goal("clean").missed(replace(HEALTHY, resync=RESYNC))
    assert told == "clean is not reached: /mnt is healthy: a resync is at work"


def test_a_resync_ends_when_nothing_can_be_brought_up_to_date_any_more() -> None:
    assert RESYNCED.is_reached(HEALTHY)
    assert RESYNCED.is_reached(with_b(Standing.MISSING))
    assert not RESYNCED.is_reached(DEGRADED)
    assert not RESYNCED.is_reached(replace(HEALTHY, resync=RESYNC))


@pytest.mark.parametrize("wanted", [goal("healthy"), goal("current:b.img"), RESYNCED])
@pytest.mark.parametrize("state", [Standing.STALE, Standing.MISSING])
def test_while_resyncs_are_paused_a_person_must_let_them_go_on(
    wanted: Goal, state: Standing
) -> None:
    paused = replace(with_b(state), resync_paused=True)
    assert not wanted.is_reached(paused)
    told = "resyncs are paused, and /nas2/b.img waits: quorumfs resync --resume"
    assert str(hopeless(wanted, paused)) == told
    goal("current:a.img").require_hope(paused)
