"""Whose data descends from whose, by the mounts on record."""

from dataclasses import replace
from random import Random

import pytest

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.dirtymap import DirtyMap, out_of_sync
from quorumfs.decisions.lineage import adds, parting
from quorumfs.decisions.model import Found, Plan, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import MOUNTS_MAX, Identity, PastMount, Record, RoleState, Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.resolution import resolve
from quorumfs.decisions.returned import judge_returned
from quorumfs.errors import ExitCode

CHUNK = 64 << 10
CHUNKS = 4
SIZE = CHUNKS * CHUNK
A, B, C, D = range(4)
GOLDEN, ONE, OTHER, NEXT = 100, 101, 102, 103


def used(record: Record, mount: int, *, changed: bool = True, commits: int = 2) -> Record:
    """The record after a mount of all that are current, closed in order."""
    for _ in range(commits):
        record = replace(record, sequence=record.sequence + 1).entered(mount, changed=changed)
        current = [s for s, role in enumerate(record.roles) if role.state is RoleState.CURRENT]
        record = record.with_state(current, RoleState.CURRENT)
    return record


def alone(record: Record, slot: int, mount: int, *, changed: bool = True) -> Record:
    """The same of a mount of one, which ejects the others."""
    others = [other for other in range(len(record.roles)) if other != slot]
    for other in others:
        record = record.with_role(other, state=RoleState.STALE)
    return used(record.minted(), mount, changed=changed)


def first_record(count: int = 2, threshold: int = 1) -> Record:
    """The same each time."""
    paths = [f"/{letter}.img" for letter in "abcd"[:count]]
    return new_record(paths, SIZE, threshold, random_bytes=Random(0).randbytes)


def golden(count: int = 2, threshold: int = 1) -> Record:
    return used(first_record(count, threshold), GOLDEN)


def found(record: Record, slot: int, bits: int = 0) -> Found:
    image = Identity(slot + 1, SIZE, 1, 1)
    disk_map = DirtyMap(SIZE, CHUNK)
    disk_map.planes[0][0] = bits
    role = record.roles[slot]
    return Found(role.path, image, Sidecar(role.replica_id, record, disk_map, image))


def states(plan: Plan) -> list[str]:
    return [member.state.value for member in plan.members]


def require_split(*replicas: Found) -> str:
    texts = []
    for order in (replicas, replicas[::-1]):
        for degraded in (False, True):
            with pytest.raises(AssemblyRefusedError) as caught:
                assemble(order, degraded=degraded)
            assert (caught.value.rule, caught.value.exit_code) == (
                "split brain",
                ExitCode.NEEDS_OPERATOR,
            )
            texts.append(str(caught.value))
    return texts[0]


def test_copies_used_alike_are_a_split() -> None:
    """With one generation, one sequence number, closed in order; both histories are shown."""
    one, other = used(golden(), ONE), used(golden(), OTHER)
    assert (one.generation, one.sequence) == (other.generation, other.sequence)
    text = require_split(found(one, A), found(other, B))
    assert f"{ONE:016x} < {GOLDEN:016x}" in text
    assert f"{OTHER:016x} < {GOLDEN:016x}" in text
    assert "quorumfs resolve --dry-run --keep" in text


def test_copies_of_what_was_never_mounted_are_a_split() -> None:
    record = first_record()
    require_split(found(used(record, ONE), A), found(used(record, OTHER), B))


def test_two_of_one_copy_outvote_no_other() -> None:
    one, other = used(golden(3, 2), ONE), used(golden(3, 2), OTHER)
    require_split(found(one, A), found(one, B), found(other, C))


def test_a_copy_used_without_one_is_a_split() -> None:
    """Though its generation descends from that of the others."""
    one, other = used(golden(), ONE), alone(golden(), B, OTHER)
    require_split(found(one, A), found(other, B))
    require_split(found(alone(golden(), A, ONE), A), found(other, B))


def test_copies_not_used_since_are_one_set() -> None:
    plan = assemble([found(golden_record := golden(), A), found(golden_record, B)])
    assert states(plan) == ["current", "current"]


def test_the_copy_that_was_not_used_is_behind() -> None:
    """By how much nobody tracked."""
    record = golden(3, 2)
    plan = assemble([found(used(record, ONE), A), found(used(record, ONE), B), found(record, C)])
    assert states(plan) == ["current", "current", "stale"]
    assert plan.members[C].compare
    assert set(plan.map.planes[0]) == {out_of_sync(C)}


def test_a_copy_of_a_set_in_use_parts_from_it() -> None:
    """The mount of which it was made went on: its numbers tell."""
    in_use = golden()
    copy = used(in_use, ONE)
    require_split(found(used(in_use, GOLDEN), A), found(copy, B))
    require_split(found(used(used(in_use, GOLDEN), OTHER, changed=False), A), found(copy, B))
    at = parting(used(in_use, GOLDEN), copy)
    assert at is not None
    assert at.went_on


@pytest.mark.parametrize("changed", [True, False], ids=["changed", "opened"])
def test_one_that_was_only_opened_is_no_side(changed: bool) -> None:
    """What it lacks is on record: it was left with what it has."""
    opened = alone(golden(), B, OTHER, changed=False)
    later = alone(golden(), A, ONE, changed=changed)
    if not changed:
        later = used(later, ONE, changed=False)  # of two that were opened the later one counts
    plan = assemble([found(later, A, out_of_sync(B)), found(opened, B)])
    assert states(plan) == ["current", "stale"]
    assert not plan.members[B].compare
    assert list(plan.map.planes[0]) == [out_of_sync(B), 0, 0, 0]


def test_members_that_were_opened_apart_are_compared() -> None:
    """In one generation: each copy may have settled what a crash left in its own way."""
    one = used(golden(3, 2), ONE, changed=False)
    other = used(golden(3, 2), OTHER, changed=False)
    plan = assemble([found(one, A), found(one, B), found(other, C)])
    assert sorted(states(plan)) == ["current", "current", "stale"]
    (stale,) = [member for member in plan.members if member.state is Standing.STALE]
    assert stale.compare


def test_one_that_was_opened_alone_has_no_later_writes() -> None:
    """It is there, and says so: no operator need be asked, though nobody recorded it as stale."""
    record = golden(4, 2).with_state([A, D], RoleState.STALE).minted()
    one = used(record, ONE, changed=False)
    other = used(record, OTHER, changed=False, commits=3)
    plan = assemble([found(other, C), found(one, B), found(record, D)])
    assert states(plan) == ["current", "stale", "stale"]
    assert plan.members[1].compare


def test_what_comes_back_of_another_history_is_foreign() -> None:
    one, other = alone(golden(), A, ONE), used(golden(), OTHER)
    assert judge_returned(one, B, found(other, B)).state is Standing.FOREIGN
    assert judge_returned(one, B, found(golden(), B)).state is Standing.STALE


# What is no longer remembered


def test_one_ejected_long_ago_is_no_side() -> None:
    """Its role says with which mount it was left; if it went on alone since, it is one."""
    record = golden()
    left = alone(record, A, ONE)
    for mount in range(1000, 1000 + MOUNTS_MAX + 1):
        left = used(left, mount)
    assert GOLDEN not in {mount.identity for mount in left.mounts}
    plan = assemble([found(left, A, out_of_sync(B)), found(record, B)])
    assert states(plan) == ["current", "stale"]
    assert not plan.members[B].compare
    assert judge_returned(left, B, found(record, B)).state is Standing.STALE
    require_split(found(left, A), found(alone(record, B, OTHER), B))


def test_what_has_nothing_in_common_any_more_is_a_split() -> None:
    """Nobody can say whether a copy older than all that is remembered was used since."""
    record = used(golden(3, 2), OTHER)
    later = golden(3, 2)
    for mount in range(1000, 1000 + MOUNTS_MAX + 1):
        later = used(later, mount)
    require_split(found(later, A), found(later, B), found(record, C))


# Version 1, which knows no mounts


def test_a_set_from_before_there_were_mounts_goes_on() -> None:
    record = first_record(3, 2).minted().minted()
    current = used(record, ONE)
    plan = assemble([found(current, A), found(current, B), found(record, C)])
    assert states(plan) == ["current", "current", "stale"]
    left = replace(record.with_state([C], RoleState.STALE).minted(), sequence=record.sequence + 1)
    plan = assemble([found(used(left, ONE), A), found(used(left, ONE), B), found(record, C)])
    assert not plan.members[C].compare, "left behind before, and that is on record"
    require_split(found(used(record, ONE), A), found(alone(record, B, OTHER), B))


def test_a_number_that_cannot_be_is_no_reason_to_fail() -> None:
    record = replace(golden(), sequence=(1 << 64) - 2).entered(NEXT, changed=True)
    assert record.mounts[0] == PastMount(NEXT, (1 << 64) - 2, changed=True)
    assert adds(record, golden())


# Resolution


def test_copies_are_resolved_by_comparing_everything() -> None:
    """Where they parted nobody tracked what either wrote; then there is one history."""
    one, other = used(golden(), ONE), used(golden(), OTHER)
    replicas = [found(one, A), found(other, B)]
    resolution = resolve(replicas, "/a.img")
    assert resolution.kept == ("/a.img",)
    assert [each.differs_at_most for each in resolution.overwritten] == [SIZE]
    kept = replace(replicas[A], sidecar=resolution.sidecars["/a.img"])
    plan = assemble([kept, replicas[B]])
    assert states(plan) == ["current", "stale"]
    assert set(plan.map.planes[0]) == {out_of_sync(B)}
    # The one that was given up is none of it as soon as it is used again, nor any copy kept.
    assert kept.sidecar is not None
    require_split(kept, found(used(other, NEXT), B))
    require_split(kept, found(used(one, NEXT), B))


@pytest.mark.parametrize("left", [None, "before", "after"])
def test_one_that_is_absent_may_have_gone_on_with_whom_is_given_up(left: str | None) -> None:
    """A alone, B with C, and A is kept: what B and C wrote is not on record where C is known."""
    before = golden(3)
    other = before.with_role(A, state=RoleState.STALE)
    if left == "before":
        other = other.with_role(C, state=RoleState.STALE)
    other = used(other.minted(), OTHER)
    if left == "after":
        other = used(other.with_role(C, state=RoleState.STALE).minted(), OTHER)
    replicas = [
        found(alone(before, A, ONE), A, out_of_sync(B) | out_of_sync(C)),
        found(other, B, out_of_sync(A)),
    ]
    resolution = resolve(replicas, "/a.img")
    lacking = resolution.sidecars["/a.img"].map.lacking_bytes(C)
    assert lacking == (CHUNK if left == "before" else SIZE)


@pytest.mark.parametrize("commits", [1, 2, 5])
def test_a_mount_that_led_nowhere_ends_none_before_it_is_known(commits: int) -> None:
    before = golden(3, threshold=2)
    prepared = replace(before, sequence=before.sequence + 1).entered(ONE, changed=True)
    meanwhile = used(before, OTHER, commits=commits)  # without the one that holds that
    later = replace(meanwhile, sequence=meanwhile.sequence + 1).entered(
        NEXT, changed=True, passed=prepared.mounts[:1]
    )
    for absent in (meanwhile, prepared):
        assert not adds(absent, later)
        assert adds(later, absent)


@pytest.mark.parametrize("left", [None, "before", "after"])
def test_so_it_may_have_in_the_mount_that_ejected_whom_is_kept(left: str | None) -> None:
    """A is ejected by B and C in mid-session, and kept; C is absent, or left B later."""
    before = used(golden(3), ONE)
    other = before.with_role(A, state=RoleState.STALE)
    if left == "before":
        other = other.with_role(C, state=RoleState.STALE)
    other = used(other.minted(), ONE)
    if left == "after":
        other = used(other.with_role(C, state=RoleState.STALE).minted(), ONE)
    resolution = resolve([found(before, A), found(other, B, out_of_sync(A))], "/a.img")
    lacking = resolution.sidecars["/a.img"].map.lacking_bytes(C)
    assert lacking == (0 if left == "before" else SIZE)


def test_where_both_tracked_it_only_that_is_copied() -> None:
    one, other = alone(golden(), A, ONE), alone(golden(), B, OTHER)
    resolution = resolve([found(one, A, out_of_sync(B)), found(other, B, out_of_sync(A))], "/a.img")
    assert [each.differs_at_most for each in resolution.overwritten] == [CHUNK]
    # Not if what one side knows is of another absence than of this one.
    elsewhere = used(golden(), OTHER)
    resolution = resolve([found(one, A, out_of_sync(B)), found(elsewhere, B)], "/a.img")
    assert [each.differs_at_most for each in resolution.overwritten] == [SIZE]


@pytest.mark.parametrize("kept", [A, B], ids="AB")
def test_resolving_decides_where_both_went_on_from_a_mount_that_they_share(kept: int) -> None:
    """One was ejected in it and mounted alone later; the other one went on in it."""
    shared = used(golden(), ONE)
    ahead, alone_later = alone(shared, A, ONE), alone(shared, B, OTHER)
    replicas = [found(ahead, A, out_of_sync(B)), found(alone_later, B, out_of_sync(A))]
    require_split(*replicas)
    (path, sidecar), *rest = resolve(replicas, replicas[kept].path).sidecars.items()
    assert not rest
    resolved = [replace(one, sidecar=sidecar) if one.path == path else one for one in replicas]
    assert states(assemble(resolved)) == ["current" if slot == kept else "stale" for slot in (A, B)]
