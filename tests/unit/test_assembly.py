"""What a mount makes of the sidecars it finds: one test for each promise of the design."""

from dataclasses import replace
from itertools import permutations
from string import ascii_letters
from typing import Any

import pytest

from quorumfs.decisions.assembly import assemble
from quorumfs.decisions.dirtymap import (
    INTENT,
    REPLICAS_MAX,
    UNKNOWN,
    UNVERIFIED,
    DirtyMap,
    out_of_sync,
)
from quorumfs.decisions.model import Found, Member, Plan, Standing
from quorumfs.decisions.newset import new_record
from quorumfs.decisions.record import ANCESTORS_MAX, Identity, Record, Role, RoleState, Sidecar
from quorumfs.decisions.refusal import AssemblyRefusedError
from quorumfs.decisions.resolution import resolve
from quorumfs.decisions.returned import covers, judge_returned
from quorumfs.decisions.sameimage import image_changed
from quorumfs.errors import ExitCode

CHUNK = 64 << 10
CHUNKS = 4
SIZE = CHUNKS * CHUNK
A, B, C = range(3)
DENIED = "Permission denied"
OLDER = "an older copy of this replica was put in its place"
CURRENT, STALE, RESYNCING = RoleState.CURRENT, RoleState.STALE, RoleState.RESYNCING


def first_record(count: int, threshold: int) -> Record:
    return new_record([f"/{letter}.img" for letter in ascii_letters[:count]], SIZE, threshold)


def image_of(slot: int) -> Identity:
    return Identity(slot + 1, SIZE, 1, 1)


def found(
    record: Record,
    slot: int,
    marks: dict[int, int] | None = None,
    *,
    prepared: Record | None = None,
    image: Identity | None = None,
) -> Found:
    """A replica with *record* and with *marks*, bits by chunk, in its map; *image*: changed."""
    disk_map = record.new_map()
    for chunk, bits in (marks or {}).items():
        disk_map.add(bits, range(chunk, chunk + 1))
    role = record.roles[slot]
    identity = image_of(slot) if record.clean else Identity(slot + 1, SIZE)
    sidecar = Sidecar(role.replica_id, record, disk_map, identity, prepared)
    return Found(role.path, image or image_of(slot), sidecar)


def gone(path: str) -> Found:
    return Found(path, None, problem="No such file or directory")


def without(record: Record, *slots: int) -> Record:
    """The record after *slots* were ejected."""
    return next_record(record.with_state(slots, STALE).minted(), clean=False)


def next_record(record: Record, **changes: object) -> Record:
    """The next commit of the same members."""
    after = replace(record, sequence=record.sequence + 1, **changes)  # type: ignore[arg-type]
    members = [slot for slot, role in enumerate(record.roles) if role.state is CURRENT]
    return after.with_state(members, CURRENT)


def states(plan: Plan) -> list[str]:
    return [member.state.value for member in plan.members]


def marks(plan: Plan) -> list[int]:
    return list(plan.map.planes[0])


def refusal(
    *replicas: Found, threshold: int | None = None, degraded: bool = False
) -> AssemblyRefusedError:
    with pytest.raises(AssemblyRefusedError) as caught:
        assemble(replicas, threshold=threshold, degraded=degraded)
    return caught.value


# Nothing happened, or a crash


def test_a_set_that_was_closed_needs_nothing() -> None:
    """Scenario 12: zero bytes to copy, and the generation is the same."""
    record = first_record(3, 2)
    plan = assemble([found(record, slot) for slot in (C, A, B)])
    assert plan.rule == "clean: closed in order"
    assert plan.record == record
    assert plan.members == tuple(Member(f"/{'abc'[s]}.img", s, Standing.CURRENT) for s in (C, A, B))
    assert (marks(plan), plan.ejected, plan.prepared) == ([0] * CHUNKS, (), ())


def test_after_a_crash_what_any_of_them_marked_may_differ() -> None:
    """Equal generation is not equal data: the union of the maps counts."""
    record = first_record(2, 1)
    dirty = next_record(record, clean=False)
    both = {1: INTENT}
    plan = assemble([found(dirty, A, both), found(dirty, B, both | {3: UNVERIFIED})])
    assert plan.rule == "crash: not closed in order"
    assert states(plan) == ["current", "current"]
    assert marks(plan) == [0, INTENT, 0, UNVERIFIED]


def test_one_without_a_mark_that_others_have_is_the_last_to_be_believed() -> None:
    """Its store may be some seconds older, and no number on record tells so (R15); or the marking
    was cut off, and all hold the same."""
    dirty = next_record(first_record(2, 1), clean=False)
    plan = assemble([found(dirty, A, {0: INTENT}), found(dirty, B, {2: INTENT})])
    assert marks(plan) == [INTENT, 0, INTENT, 0]
    assert plan.unmarked == ((A, range(2, 3)), (B, range(1)))
    lost = {2: INTENT | out_of_sync(B)}
    plan = assemble([found(dirty, A), found(dirty, B, lost)])  # B alone knows that, and has it not
    assert marks(plan) == [0, 0, INTENT | out_of_sync(B), 0]
    assert plan.unmarked == ()


def test_an_unreadable_map_page_means_that_all_of_it_may_differ() -> None:
    """Scenario 11: never «clean»; and nothing is said of replicas that do not exist."""
    record = first_record(2, 1)
    torn = found(record, B, dict.fromkeys(range(CHUNKS), UNKNOWN & 0xFF))
    assert marks(assemble([found(record, A), torn])) == [INTENT] * CHUNKS


def test_what_another_one_committed_was_prepared_here_and_is_valid() -> None:
    """A crash between the two phases: it only came last."""
    record = first_record(3, 2)
    later = without(record, C)
    replicas = [found(later, A), found(record, B, prepared=later), found(record, C)]
    plan = assemble(replicas)
    assert states(plan) == ["current", "current", "stale"]
    assert plan.record == later

    # Even if it has prepared one more since, which led nowhere.
    last = next_record(later)
    replicas[B] = found(record, B, prepared=last)
    plan = assemble(replicas)
    assert states(plan) == ["current", "current", "stale"]
    assert plan.sequence_seen == last.sequence


def test_a_join_that_one_committed_is_valid_for_all_that_prepared_it() -> None:
    """Also for the one that joined, which has nothing older to go back to."""
    record = without(first_record(2, 1), B)
    before = next_record(record).with_state([B], RESYNCING)
    joined = next_record(before).with_state([B], CURRENT)
    joined = replace(joined, sequence=9).with_state([A, B], CURRENT)
    for prepared in (joined, next_record(joined)):
        plan = assemble([found(joined, A), found(before, B, {0: INTENT}, prepared=prepared)])
        assert states(plan) == ["current", "current"]
        assert marks(plan) == [INTENT, 0, 0, 0]
        assert plan.unmarked == ((A, range(1)),)
        assert plan.ejected == ()


def test_what_nobody_committed_is_remembered_as_leading_nowhere() -> None:
    """The next generation descends from it, so that who committed it later is no split brain."""
    record = first_record(3, 2)
    tried = without(record, C)
    again = replace(tried.minted(), sequence=7)
    plan = assemble([found(record, B, prepared=again), found(record, C)])
    assert states(plan) == ["current", "current"]
    assert plan.ejected == (A,)
    assert plan.prepared == (again.generation, tried.generation)
    assert plan.sequence_seen == 7

    went_on = plan.record.with_state([A], STALE).minted(plan.prepared)
    went_on = next_record(replace(went_on, sequence=7))
    plan = assemble([found(tried, A), found(went_on, B), found(went_on, C)])
    assert states(plan) == ["stale", "current", "current"]
    assert not plan.members[A].compare


def test_damage_is_reported_and_is_no_reason_to_fail() -> None:
    """Scenario 9: the other slot was used."""
    record = first_record(2, 1)
    one = found(record, A)
    assert one.sidecar
    hurt = replace(one, sidecar=replace(one.sidecar, damage=("slot 0: torn",)))
    plan = assemble([hurt, found(record, B)])
    assert plan.notes == ("/a.img.quorumfs: slot 0: torn",)
    assert states(plan) == ["current", "current"]


# Somebody is missing


def test_enough_replicas_are_proof_that_nothing_is_elsewhere() -> None:
    """Scenario 17: N=3, threshold 2, and A may come back later."""
    record = first_record(3, 2)
    here = [found(record, B, {1: INTENT}), found(record, C, {1: INTENT})]
    for plan in (assemble(here), assemble([gone("/a.img"), *here])):
        assert plan.rule == "enough are present: nothing acknowledged can be elsewhere"
        assert states(plan)[-2:] == ["current", "current"]
        assert plan.ejected == (A,)
        assert marks(plan) == [0, INTENT | out_of_sync(A), 0, 0]
    plan = assemble([gone("/a.img"), *here])
    assert plan.members[0] == Member("/a.img", A, Standing.MISSING, "No such file or directory")


def test_a_missing_replica_that_may_be_newer_needs_consent() -> None:
    """Scenarios 15 and 18: named, with the flag to use; N=2, threshold 1."""
    record = first_record(2, 1)
    error = refusal(found(record, B))
    assert (error.rule, error.exit_code) == ("may be newer", ExitCode.FAILED)
    assert str(error) == (
        "/a.img may have later writes: nobody recorded it as stale. /a.img is not among the "
        "replicas given: bring it back, and name it where it is. If that is impossible, give up "
        "what only it may hold: mount with -o degraded"
    )

    plan = assemble([found(record, B)], degraded=True)
    assert plan.rule.startswith("degraded: ")
    assert (states(plan), plan.ejected, plan.quorum) == (["current"], (A,), 1)


@pytest.mark.parametrize(
    ("there", "known", "cure"),
    [
        (gone("/b.img"), "/b.img: No such file or directory", "bring it back"),
        (Found("/b.img", None, problem=DENIED), f"/b.img: {DENIED}", "chmod"),
        (Found("/b.img", None, problem="Stale file handle"), "/b.img: Stale file", "mend"),
        (
            Found("/b.img", Identity(2, SIZE), problem=f"/b.img.quorumfs: {DENIED}"),
            f"the sidecar of /b.img cannot be read (/b.img.quorumfs: {DENIED})",
            "chmod",
        ),
        (
            Found("/b.img", Identity(2, SIZE), problem="slot 0: torn"),
            "the sidecar of /b.img cannot be read (slot 0: torn)",
            "make it a copy of /a.img: quorumfs resolve --keep /a.img /a.img /b.img",
        ),
    ],
    ids=["gone", "forbidden", "stale handle", "sidecar forbidden", "sidecar unreadable"],
)
@pytest.mark.parametrize(
    ("threshold", "rule"), [(1, "may be newer"), (2, "no quorum")], ids=["1", "2"]
)
def test_why_a_replica_cannot_be_used_is_said_with_its_cure(
    there: Found, known: str, cure: str, threshold: int, rule: str
) -> None:
    """What gives up its data comes last, and only one cure is told."""
    error = refusal(found(first_record(2, threshold), A), there)
    assert error.rule == rule
    text = str(error)
    assert text.index(known) < text.index(cure) < text.index("give up what only it may hold")
    cures = ("bring it back", "chmod", "mend", "resolve", "truncate")
    assert [each for each in cures if each in text] == [each for each in cures if each in cure]
    assert text.endswith("mount with -o degraded" + (",vote-threshold=1" if threshold == 2 else ""))


def test_the_length_is_only_to_be_given_back_where_that_is_noticed() -> None:
    """After a crash nothing but its size tells of a change: its end would be taken for zeros."""
    record = first_record(2, 1)
    cut = Identity(2, SIZE - 1, 1, 1)
    text = str(refusal(found(record, A), found(record, B, image=cut)))
    assert f"/b.img: the image was truncated to {SIZE - 1} bytes" in text
    assert f"truncate -s {SIZE} /b.img" in text
    assert "bring it back" not in text
    crashed = replace(record, clean=False)
    text = str(refusal(found(crashed, A), found(crashed, B, image=cut)))
    assert "put the whole image back" in text
    assert "truncate -s" not in text


def test_a_mistyped_path_is_told_apart_from_a_replica_that_was_left_out() -> None:
    """Nobody says that nob.img is b.img; a file one may not read says nothing of either."""
    record = first_record(2, 1)
    text = str(refusal(found(record, A), gone("/nob.img")))
    assert "/nob.img: No such file or directory: is this the right path?" in text
    assert "/b.img is not among the replicas given" in text
    text = str(refusal(Found("/etc/shadow", None, problem=DENIED), found(record, B)))
    assert f"/etc/shadow: {DENIED}: is this the right path?" in text
    assert "chmod" not in text
    assert "/a.img is not among the replicas given" in text
    assert "/b.img" not in text


def test_each_of_several_has_its_own_reason() -> None:
    record = first_record(3, 1)
    torn = Found("/c.img", image_of(C), problem="torn")
    text = str(refusal(found(record, A), gone("/b.img"), torn))
    assert "/b.img, /c.img may have later writes" in text
    assert "/b.img: No such file or directory: bring it back" in text
    assert "the sidecar of /c.img cannot be read (torn)" in text
    assert "resolve --keep /a.img /a.img /c.img" in text, "what is gone would be refused"
    assert "give up what only they may hold" in text


def test_who_is_on_record_as_stale_holds_nothing_that_could_be_given_up() -> None:
    record = without(first_record(3, 2), C)
    text = str(refusal(found(record, A), found(record, B), threshold=3))
    assert "missing /c.img. /c.img is not among the replicas given" in text
    assert "To go on without: mount with -o degraded,vote-threshold=2" in text


def test_a_replica_that_is_on_record_as_stale_may_be_missing() -> None:
    """Scenario 19: no flag, even alone."""
    record = without(first_record(2, 1), A)
    plan = assemble([gone("/a.img"), found(record, B, {2: INTENT, 3: out_of_sync(A)})])
    assert plan.rule == "absent ones are on record as stale"
    assert states(plan) == ["missing", "current"]
    assert plan.ejected == ()
    assert marks(plan) == [0, 0, INTENT | out_of_sync(A), out_of_sync(A)]


def test_fewer_than_the_threshold_cannot_be_mounted() -> None:
    record = first_record(3, 3)
    error = refusal(found(record, A), gone("/b.img"), found(record, C))
    assert error.rule == "no quorum"
    assert "missing /b.img. /b.img: No such file or directory: bring it back" in str(error)
    assert "give up what only it may hold: mount with -o degraded,vote-threshold=2" in str(error)
    plan = assemble([found(record, A), found(record, C)], threshold=2, degraded=True)
    assert (plan.record.threshold, plan.threshold, plan.quorum) == (3, 2, 2)


def test_few_replicas_cannot_lower_the_threshold_without_consent() -> None:
    """Or each of two, alone, would take itself for enough: N=2, threshold 2."""
    record = first_record(2, 2)
    assert refusal(found(record, A), threshold=1).rule == "may be newer"
    assert assemble([found(record, A)], threshold=1, degraded=True).quorum == 1
    # With all there it may be lowered, but not by a first commit that only one gets.
    plan = assemble([found(record, A), found(record, B)], threshold=1)
    assert (plan.record.threshold, plan.threshold, plan.quorum) == (2, 1, 2)


def test_too_few_that_are_current_cannot_lower_the_threshold() -> None:
    """The others would not know of it. N=3, threshold 2; A alone is current."""
    record = without(first_record(3, 2), B, C)
    replicas = [found(record, A), *(found(first_record_of(record), slot) for slot in (B, C))]
    error = refusal(*replicas, threshold=1)
    assert error.rule == "too few to lower"
    assert "got 1, the set's is 2, and only 1 of its replicas are current" in str(error)
    assert "with -o degraded,vote-threshold=1, and never again without /a.img" in str(error)
    plan = assemble(replicas, threshold=1, degraded=True)
    assert (plan.quorum, plan.rule.split(":")[0]) == (1, "degraded")
    assert assemble(replicas, threshold=1, read_only=True).threshold == 1, "nothing is recorded"
    raised = assemble(replicas, threshold=3)
    assert raised.quorum == 3, "nothing is acknowledged before three have it"


def first_record_of(record: Record) -> Record:
    """What a replica still holds that was ejected without knowing it."""
    roles = tuple(replace(role, state=CURRENT) for role in record.roles)
    return replace(record, generation=record.ancestors[-1], ancestors=(), sequence=1, roles=roles)


def test_a_replica_that_was_removed_from_the_set_proves_nothing() -> None:
    """Scenario 83: nor may it be written to."""
    record = first_record(3, 1)
    rest = replace(record.minted(), roles=record.roles[:2], sequence=2)
    error = refusal(found(rest, A), found(record, C))
    assert error.rule == "may be newer"
    plan = assemble([found(rest, A), found(rest, B), found(record, C)])
    assert states(plan) == ["current", "current", "foreign"]
    assert plan.members[2].state is Standing.FOREIGN
    assert plan.members[2].slot is None
    assert "it is no replica of the set any more" in (plan.members[2].reason or "")


def test_a_threshold_above_the_number_of_replicas_is_refused() -> None:
    record = first_record(2, 1)
    error = refusal(found(record, A), found(record, B), threshold=3)
    assert (error.rule, error.exit_code) == ("threshold", ExitCode.USAGE)
    assert "got 3, allowed: 1 to 2" in str(error)


# Somebody was ejected


@pytest.mark.parametrize("order", list(permutations((A, B, C))))
def test_the_direction_never_depends_on_the_order_of_the_command_line(
    order: tuple[int, ...],
) -> None:
    """Scenario 20: A was ejected, and gets what B and C tracked and what it had under way."""
    record = first_record(3, 2)
    later = without(record, A)
    replicas = [
        found(replace(record, clean=False), A, {0: INTENT, 1: out_of_sync(C)}),
        found(later, B, {1: INTENT}),
        found(later, C, {1: INTENT, 2: out_of_sync(A)}),
    ]
    plan = assemble([replicas[slot] for slot in order])
    assert {m.slot: m.state for m in plan.members} == {
        A: Standing.STALE,
        B: Standing.CURRENT,
        C: Standing.CURRENT,
    }
    (stale,) = (member for member in plan.members if member.slot == A)
    assert stale.reason == f"ejected in generation {record.generation:016x}"
    assert not stale.compare
    assert marks(plan) == [out_of_sync(A), INTENT | out_of_sync(A), out_of_sync(A), 0]


def test_only_stale_replicas_are_no_set() -> None:
    """Scenario 21: names who is newer, and the command."""
    record = first_record(2, 1)
    half = replace(without(record, A).with_state([A], RESYNCING), sequence=5)
    error = refusal(found(half, A), gone("/b.img"))
    assert (error.rule, error.exit_code) == ("only stale", ExitCode.FAILED)
    assert "/a.img is stale" in str(error)
    assert "are: /b.img" in str(error)
    assert "/b.img: No such file or directory: bring it back" in str(error)
    assert str(error).endswith("quorumfs resolve --keep /a.img /a.img"), "what is gone is refused"


def test_what_a_replica_knows_counts_even_if_its_image_cannot_be_used() -> None:
    """B's image was truncated, but its sidecar tells that A was ejected."""
    record = first_record(2, 1)
    later = without(record, A)
    cut = found(later, B, image=Identity(2, SIZE - 1, 1, 1))
    assert refusal(found(record, A), cut, degraded=True).rule == "only stale"


def test_a_replica_in_mid_resync_goes_on_where_it_was() -> None:
    """Scenario 3: the members' map says what is left; its own counts no more."""
    record = without(first_record(2, 1), A)
    started = next_record(record)
    since = next_record(started.with_state([A], STALE))
    target = found(started.with_state([A], RESYNCING), A, {0: INTENT})
    plan = assemble([target, found(since, B, {3: out_of_sync(A)})])
    assert states(plan) == ["stale", "current"]
    assert not plan.members[A].compare
    assert marks(plan) == [0, 0, 0, out_of_sync(A)]


def test_what_only_an_absent_replica_knows_is_compared_in_full() -> None:
    """A resync of C that A began alone, too few to eject B: B has no marks for it."""
    record = first_record(3, 2)
    begun = replace(record, sequence=5).with_state([A], CURRENT).with_state([C], RESYNCING)
    plan = assemble([found(record, B), found(begun, C)])
    assert states(plan) == ["current", "stale"]
    assert plan.members[1].compare
    assert marks(plan) == [out_of_sync(C)] * CHUNKS
    assert marks(assemble([found(begun, A), found(record, B), found(begun, C)])) == [0] * CHUNKS


def test_who_was_about_to_be_resynced_knows_that_it_is_stale() -> None:
    """Not a byte of it has changed, but the others had gone on without it."""
    record = first_record(2, 1)
    later = without(record, A)
    begun = next_record(later).with_state([A], RESYNCING)
    target = found(record, A, prepared=begun)
    assert refusal(target, degraded=True).rule == "only stale"
    plan = assemble([target, found(later, B, {1: out_of_sync(A)})])
    assert states(plan) == ["stale", "current"]
    assert (marks(plan), plan.prepared) == ([0, out_of_sync(A), 0, 0], ())
    assert plan.sequence_seen == begun.sequence


def test_who_was_about_to_be_resynced_by_too_few_is_as_it_was() -> None:
    """They could eject nobody, and their record led nowhere: not a byte was copied."""
    record = first_record(3, 2)
    begun = next_record(record).with_state([A], RESYNCING)
    target = found(record, A, prepared=begun)
    plan = assemble([target, found(record, B), found(record, C, prepared=begun)])
    assert states(plan) == ["current"] * 3
    assert plan.sequence_seen == begun.sequence


def test_a_mixture_is_never_current() -> None:
    """Whatever another record says of it: only a join makes it current, and it has seen none."""
    record = first_record(3, 2)
    half = next_record(record).with_state([A], RESYNCING)
    late = replace(half, sequence=9).with_state([A, B, C], CURRENT)
    late = late.with_role(A, sequence=1)
    plan = assemble([found(half, A), found(late, B), found(late, C)])
    assert states(plan) == ["stale", "current", "current"]
    assert marks(plan) == [out_of_sync(A)] * CHUNKS


def test_what_a_current_replica_was_said_to_lack_may_differ() -> None:
    """The end of a resync is written after the join; and too few eject nobody.

    The one that is said to lack something is not the one to be believed.
    """
    record = first_record(2, 1)
    plan = assemble([found(record, A), found(record, B, {1: out_of_sync(A)})])
    assert marks(plan) == [0, INTENT | out_of_sync(A), 0, 0]


def test_each_returning_replica_gets_what_was_written_since_it_left() -> None:
    """Scenario 99: ejected at different times, returning together."""
    record = first_record(3, 1)
    second = without(record, A)
    third = without(second, B)
    last = found(third, C, {0: out_of_sync(A), 1: out_of_sync(A) | out_of_sync(B)})
    plan = assemble([found(record, A), found(second, B), last])
    assert states(plan) == ["stale", "stale", "current"]
    assert marks(plan) == [out_of_sync(A), out_of_sync(A) | out_of_sync(B), 0, 0]
    assert not any(member.compare for member in plan.members)


def test_an_absence_longer_than_the_list_of_ancestors_is_still_known() -> None:
    """A flapping replica may mint any number of generations meanwhile."""
    record = first_record(3, 1)
    later = without(record, A)
    for _ in range(ANCESTORS_MAX + 3):
        later = without(later.with_state([B], CURRENT), B)
    assert record.generation not in later.history
    plan = assemble([found(record, A), found(later, C, {1: out_of_sync(A)})])
    assert states(plan) == ["stale", "current"]
    assert not plan.members[0].compare


# Put back, changed, copied


def test_a_replica_put_back_from_before_it_was_ejected_is_compared_in_full() -> None:
    """Same generation, but marks were cleared since: the sequence tells."""
    record = first_record(2, 1)
    left_with = next_record(record)
    plan = assemble([found(record, A), found(without(left_with, A), B)])
    assert plan.members[A].compare
    assert plan.members[A].reason == "ejected longer ago than the others remember"
    assert marks(plan) == [out_of_sync(A)] * CHUNKS
    # With what it had when it was left, or had only prepared then, it gets just what is marked.
    for one in (found(left_with, A), found(record, A, prepared=left_with)):
        assert marks(assemble([one, found(without(left_with, A), B)])) == [0] * CHUNKS


def test_a_current_replica_put_back_from_a_backup_is_behind() -> None:
    """Scenario 34, with its old sidecar: with enough others to know. N=3, threshold 2."""
    record = first_record(3, 2)
    later = next_record(record)
    plan = assemble([found(record, A), found(later, B), found(later, C)])
    assert states(plan) == ["stale", "current", "current"]
    assert plan.members[A].reason == OLDER
    assert plan.members[A].compare
    assert marks(plan) == [out_of_sync(A)] * CHUNKS
    assert plan.ejected == (A,)


def test_what_a_backup_replaced_may_have_been_newer() -> None:
    """P6: N=2, threshold 1, B cannot know whether A had gone on without it."""
    record = first_record(2, 1)
    replicas = [found(record, A), found(next_record(record), B)]
    error = refusal(*replicas)
    assert error.rule == "may be newer"
    assert "/a.img may have later writes" in str(error)
    assert f"/a.img: {OLDER}: put the later one back" in str(error)
    assert "bring it back" not in str(error), "it is there"
    assert states(assemble(replicas, degraded=True)) == ["stale", "current"]


@pytest.mark.parametrize(
    "image",
    [Identity(9, SIZE, 1, 1), Identity(1, SIZE, 2, 1), Identity(1, SIZE, 1, 2)],
    ids=["inode", "mtime", "ctime"],
)
def test_an_image_changed_behind_its_sidecar_is_suspect(image: Identity) -> None:
    """Scenarios 34 and 35: its own map is not believed, and it is compared in full."""
    record = first_record(2, 1)
    plan = assemble([found(record, A, {0: UNVERIFIED}, image=image), found(record, B)])
    assert states(plan) == ["suspect", "current"]
    assert plan.members[A].compare
    assert plan.ejected == (A,)
    assert marks(plan) == [out_of_sync(A)] * CHUNKS


def test_a_suspect_replica_proves_nothing() -> None:
    """N=3, threshold 2: with C missing, B alone does not know."""
    record = first_record(3, 2)
    changed = found(record, A, image=Identity(9, SIZE, 1, 1))
    error = refusal(changed, found(record, B))
    assert error.rule == "may be newer"
    assert "/c.img is not among the replicas given" in str(error)


def test_in_use_the_times_of_an_image_move_but_it_stays_the_same_file() -> None:
    record = first_record(2, 1)
    used = found(replace(record, clean=False), A)
    assert not image_changed(replace(used, image=Identity(1, SIZE, 5, 5)))
    assert image_changed(replace(used, image=Identity(7, SIZE, 5, 5)))
    assert image_changed(replace(used, image=Identity(1, SIZE - 1, 5, 5)))
    grown = replace(used, image=Identity(1, SIZE + 1, 5, 5))  # by a daemon that died meanwhile
    assert not image_changed(grown)
    closed = found(record, A)
    assert closed.sidecar
    assert image_changed(replace(closed, image=Identity(1, SIZE + 1, 1, 1)))
    other = replace(closed.sidecar, identity=Identity(1, SIZE, 0, 1))
    assert image_changed(replace(closed, sidecar=other))
    nothing_known = replace(closed.sidecar, identity=Identity())
    assert not image_changed(replace(closed, sidecar=nothing_known))


def passing(
    record: Record,
    slot: int,
    *,
    then: int,
    now: int,
    inode: int = 0,
    chunks: dict[int, int] | None = None,
) -> Found:
    """As `found`, on a store without lasting identity, of a mount *then* and of another *now*.

    *inode*: 0 on FUSE, else it is on another file system than its sidecar.
    """
    identity = Identity(inode, SIZE, 5, 0)
    one = found(replace(record, clean=False), slot, chunks or {}, image=identity)
    assert one.sidecar
    sidecar = replace(one.sidecar, identity=Identity(then, SIZE))
    return replace(one, sidecar=sidecar, instance=now)


@pytest.mark.parametrize(
    ("then", "now", "inode", "state"),
    [
        (7, 7, 9, "current"),
        (7, 8, 9, "suspect"),
        (0, 0, 9, "suspect"),
        (7, 0, 9, "suspect"),
        (7, 7, 0, "suspect"),
        (7, 8, 0, "suspect"),
    ],
)
def test_after_a_crash_a_sidecar_vouches_only_for_the_store_that_holds_it(
    then: int, now: int, inode: int, state: str
) -> None:
    """R15: an image whose mount is gone may be an older one, or an empty one; on FUSE any may."""
    record = first_record(2, 1)
    plan = assemble([passing(record, A, then=then, now=now, inode=inode), found(record, B)])
    assert states(plan) == [state, "current"]
    assert plan.members[A].compare is (state == "suspect")


def test_stores_without_lasting_identity_are_believed_where_too_few_others_are_current() -> None:
    """A power cut of the host: all were mounted anew, and the set goes on, with a warning, and
    compares them."""
    record = first_record(2, 1)
    for now in (7, 9), (8, 10):
        a, b = (
            passing(record, slot, then=7 + 2 * slot, now=instance, chunks={1: INTENT})
            for slot, instance in enumerate(now)
        )
        plan = assemble([a, b])
        assert states(plan) == ["current", "current"]
        assert (
            sum("nothing shows that its store holds the same" in note for note in plan.notes) == 2
        )
        assert marks(plan) == [UNVERIFIED, INTENT, *[UNVERIFIED] * (CHUNKS - 2)]
    record = first_record(3, 2)
    plan = assemble([passing(record, A, then=7, now=8), found(record, B), found(record, C)])
    assert states(plan) == ["suspect", "current", "current"]


def test_one_whose_mount_lasts_is_believed_before_one_that_was_mounted_anew() -> None:
    record = first_record(2, 1)
    plan = assemble([passing(record, A, then=7, now=8), passing(record, B, then=9, now=9)])
    assert states(plan) == ["suspect", "current"]
    assert plan.members[A].compare


def test_a_sidecar_tells_who_went_on_though_its_image_cannot_be_proven() -> None:
    """One of four is missing: with a threshold of 2 it cannot have gone on without the others."""
    record = first_record(4, 2)
    unproven = passing(record, A, then=7, now=8)
    members = [unproven, found(replace(record, clean=False), B), found(record, C)]
    assert states(assemble(members)) == ["suspect", "current", "current"]
    changed = found(record, A, image=Identity(50, SIZE, 9, 9))
    assert refusal(changed, *members[1:]).rule == "may be newer"


def test_one_that_comes_back_in_another_mount_is_compared_in_full() -> None:
    record = first_record(2, 1)
    later = record.with_state([B], RoleState.STALE).minted()
    same = passing(record, B, then=7, now=7, inode=9)
    assert judge_returned(later, B, same).state is Standing.STALE
    assert not judge_returned(later, B, same).compare
    other = passing(record, B, then=7, now=8, inode=9)
    assert judge_returned(later, B, other).state is Standing.SUSPECT
    assert judge_returned(later, B, other).compare


@pytest.mark.parametrize("now", [7, 8])
def test_one_that_comes_back_on_fuse_is_compared_unless_its_content_proves_it(now: int) -> None:
    record = first_record(2, 1)
    later = record.with_state([B], RoleState.STALE).minted()
    one = passing(record, B, then=7, now=now)
    assert judge_returned(later, B, one).state is Standing.SUSPECT
    assert judge_returned(later, B, one).compare
    proven = judge_returned(later, B, replace(one, proven=True))
    assert proven.state is Standing.STALE
    assert not proven.compare


def test_a_set_that_was_copied_as_a_whole_is_usable_and_verified() -> None:
    """But who was stale stays stale."""
    record = without(first_record(3, 2), C)
    moved = [found(record, s, image=Identity(50 + s, SIZE, 9, 9)) for s in (A, B, C)]
    plan = assemble(moved)
    assert states(plan) == ["current", "current", "suspect"]
    assert marks(plan) == [UNVERIFIED | out_of_sync(C)] * CHUNKS
    assert "all images were moved or changed together" in plan.notes[0]


@pytest.mark.parametrize(
    ("written_s", "changed_s", "state"),
    [(1200, 1200, "current"), (1400, 5, "suspect"), (5, 1400, "suspect")],
    ids=["by the daemon", "by a guest booted on it", "by a backup put back with its times"],
)
def test_an_image_that_was_written_to_after_a_crash_is_compared(
    written_s: int, changed_s: int, state: str
) -> None:
    """Inode and size are the same: the time of the sidecar, of the same store, tells."""
    record = next_record(first_record(2, 1), clean=False)
    one = found(record, A, image=Identity(1, SIZE, written_s * 10**9, changed_s * 10**9))
    assert one.sidecar is not None
    in_use = replace(one.sidecar, identity=Identity(1, SIZE))
    booted = replace(one, sidecar=in_use, recorded_ns=1000 * 10**9)
    assert states(assemble([booted, found(record, B)])) == [state, "current"]
    assert states(assemble([replace(booted, recorded_ns=0), found(record, B)]))[0] == "current"


@pytest.mark.parametrize(
    ("left_ns", "state"),
    [(0, Standing.STALE), (7, Standing.STALE), (9, Standing.STALE), (6, Standing.SUSPECT)],
)
def test_an_image_that_was_written_to_while_it_was_out_is_compared(
    left_ns: int, state: Standing
) -> None:
    """Its ctime is later than when it was closed; after a power cut it may be earlier."""
    record = replace(first_record(2, 1), clean=False)
    back = found(record, B, image=Identity(2, SIZE, 3, 7))
    member = judge_returned(without(record, B), B, replace(back, left_ns=left_ns))
    assert (member.state, member.compare) == (state, state is Standing.SUSPECT)


def test_images_that_were_renamed_without_their_sidecars_are_refused() -> None:
    """The stale one would be taken for the current one, and overwrite it."""
    before = first_record(2, 1)
    a, b = found(without(before, B), A), found(before, B)
    assert a.image is not None
    assert b.image is not None
    renamed = [replace(a, image=replace(b.image, ctime_ns=9)), replace(b, image=a.image)]
    error = refusal(*renamed)
    assert (error.rule, error.exit_code) == ("exchanged", ExitCode.NEEDS_OPERATOR)
    assert "/a.img is the image that the sidecar of /b.img was left with" in str(error)
    assert states(assemble([a, b])) == ["current", "stale"]


def test_a_changed_image_does_not_overwrite_a_stale_one() -> None:
    """Nothing tells whether it holds more than the stale one, or is a backup of last year."""
    before = first_record(2, 1)
    record, stale = without(before, B), found(before, B)
    error = refusal(found(record, A, image=Identity(50, SIZE, 9, 9)), stale)
    assert (error.rule, error.exit_code) == ("changed", ExitCode.NEEDS_OPERATOR)
    assert "/b.img would be overwritten" in str(error)
    assert "quorumfs resolve --keep /a.img" in str(error)
    changed = found(record, A, image=Identity(50, SIZE, 9, 9))
    alone = assemble([changed, gone("/b.img")], degraded=True)
    assert states(alone) == ["current", "missing"]
    whole = found(replace(record, clean=True), A)
    assert whole.sidecar is not None
    copied = replace(whole, image=replace(whole.sidecar.identity, inode=50, ctime_ns=9))
    assert states(assemble([copied, stale])) == ["current", "stale"], "it has its times"
    used = found(replace(record, clean=False), A, image=Identity(1, SIZE, 5, 1400 * 10**9))
    chowned = replace(used, recorded_ns=1000 * 10**9)
    assert states(assemble([chowned, stale])) == ["current", "stale"], "after a crash"


def test_a_copied_set_cannot_prove_that_nothing_is_elsewhere() -> None:
    """It may be a copy of yesterday; N=3, threshold 2, C is missing."""
    record = first_record(3, 2)
    moved = [found(record, slot, image=Identity(50 + slot, SIZE, 9, 9)) for slot in (A, B)]
    error = refusal(*moved)
    assert error.rule == "may be newer"
    assert "/c.img" in str(error)
    assert marks(assemble(moved, degraded=True)) == [UNVERIFIED | out_of_sync(C)] * CHUNKS


def test_a_changed_replica_alone_is_not_believed_about_the_others() -> None:
    """It may come from a backup itself; and accepted, all others lack all of it."""
    record = without(first_record(2, 1), B)
    alone = found(record, A, image=Identity(50, SIZE, 9, 9))
    error = refusal(alone)
    assert error.rule == "may be newer"
    assert "/b.img" in str(error)
    plan = assemble([alone], degraded=True)
    assert states(plan) == ["current"]
    assert marks(plan) == [out_of_sync(B)] * CHUNKS


def test_a_changed_stale_replica_never_becomes_current() -> None:
    record = without(first_record(2, 1), A).with_state([A], RESYNCING)
    moved = found(record, A, image=Identity(50, SIZE, 9, 9))
    assert refusal(moved, degraded=True).rule == "only stale"


def test_a_truncated_image_is_not_used() -> None:
    """Scenario 38."""
    record = first_record(3, 2)
    cut = found(record, B, image=Identity(2, SIZE - 1, 1, 1))
    plan = assemble([found(record, A), cut, found(record, C)])
    assert states(plan) == ["current", "missing", "current"]
    assert plan.members[B].slot == B
    assert plan.members[B].reason == (
        f"the image was truncated to {SIZE - 1} bytes, the disk has {SIZE}"
    )


def test_the_end_of_a_longer_image_is_not_used() -> None:
    """Scenario 39; where the set was closed, it changed, though."""
    record = first_record(2, 1)
    for clean, state in ((True, "suspect"), (False, "current")):
        one = replace(record, clean=clean)
        longer = found(one, B, image=Identity(2, SIZE + 512, 1, 1))
        plan = assemble([found(one, A), longer])
        assert states(plan) == ["current", state]
        (note,) = plan.notes
        assert "/b.img is longer than the disk: its end is not used" in note
        assert note.endswith(f"quorumfs grow MOUNTPOINT {SIZE + 512}")


# The disk grows


LARGER = SIZE + 3 * CHUNK


def grown(record: Record, slot: int, marks: dict[int, int] | None = None, **others: Any) -> Found:
    """As `found`, with an image as long as the larger disk."""
    return found(record, slot, marks, image=Identity(slot + 1, LARGER, 5, 5), **others)


def test_a_disk_that_began_to_grow_keeps_its_size_until_one_has_committed_the_larger() -> None:
    record = replace(first_record(2, 1), clean=False)
    larger = next_record(record, size=LARGER)
    plan = assemble([grown(record, A, prepared=larger), grown(record, B)])
    assert (plan.record.size, len(plan.map), states(plan)) == (SIZE, CHUNKS, ["current"] * 2)
    plan = assemble([grown(record, A, {0: INTENT}, prepared=larger), grown(larger, B)])
    assert (plan.record.size, states(plan)) == (LARGER, ["current"] * 2)
    assert marks(plan) == [INTENT, *[0] * 6]
    assert plan.unmarked == ((B, range(1)),)


def test_one_that_was_away_when_the_disk_grew_lacks_what_the_others_say() -> None:
    record = first_record(2, 1)
    larger = next_record(without(record, B), size=LARGER)
    lacked = {1: out_of_sync(B), **dict.fromkeys(range(CHUNKS, CHUNKS + 3), out_of_sync(B))}
    here = grown(larger, A, lacked)
    plan = assemble([here, found(record, B, {2: INTENT})])
    assert states(plan) == ["current", "stale"]
    assert not plan.members[B].compare
    assert [chunk for chunk, state in enumerate(marks(plan)) if state] == [1, 2, 4, 5, 6]
    old = found(replace(record, clean=False), B)
    assert judge_returned(larger, B, old) == Member("/b.img", B, Standing.STALE)
    assert [chunk for chunk, state in enumerate(marks(assemble([here, old]))) if state] == [*lacked]


def test_an_image_shorter_than_its_own_record_is_truncated_however_long_the_disk_is() -> None:
    """R10."""
    record = replace(first_record(2, 1), clean=False)
    cut = found(record, B, image=Identity(2, SIZE - 1, 1, 1))
    larger = next_record(without(record, B), size=LARGER)
    member = assemble([grown(larger, A), cut]).members[B]
    assert member.reason == f"the image was truncated to {SIZE - 1} bytes, the disk has {SIZE}"
    assert judge_returned(larger, B, cut) == member


def test_an_image_that_lost_what_a_killed_grow_had_added_is_what_it_was() -> None:
    """A power cut took back what was not durable, after another mount had it on record."""
    record = first_record(2, 1)
    left = found(replace(without(record, B), clean=False), A)
    assert left.sidecar
    left = replace(left, sidecar=replace(left.sidecar, identity=Identity(1, LARGER)))
    assert states(assemble([left, found(record, B)])) == ["current", "stale"]


def test_a_member_that_is_not_as_long_as_the_record_was_truncated() -> None:
    """Its image had been made longer before that record was prepared."""
    record = replace(first_record(3, 2), clean=False)
    larger = next_record(record, size=LARGER)
    cut = found(record, B, prepared=larger, image=Identity(2, LARGER - 1, 1, 1))
    plan = assemble([grown(larger, A), cut, grown(larger, C)])
    assert states(plan) == ["current", "missing", "current"]
    assert plan.members[B].reason == (
        f"the image was truncated to {LARGER - 1} bytes, the disk has {LARGER}"
    )


def test_one_that_is_made_a_copy_of_a_larger_disk_lacks_what_the_kept_one_says() -> None:
    record = replace(first_record(2, 1), clean=False)
    larger = next_record(without(record, B), size=LARGER)
    lacked = dict.fromkeys(range(CHUNKS, CHUNKS + 3), out_of_sync(B))
    kept, other = grown(larger, A, lacked), found(record, B)
    resolution = resolve([kept, other], "/a.img")
    assert list(resolution.sidecars["/a.img"].map.planes[0]) == [0] * CHUNKS + [out_of_sync(B)] * 3
    assert resolve([kept, other], "/b.img").sidecars["/b.img"].record.size == SIZE


# Split brain


def test_split_brain_is_refused_with_both_histories() -> None:
    """Scenario 22: nothing is written, exit code 3, changed chunks counted."""
    record = first_record(2, 1)
    ours, theirs = without(record, B), without(record, A)
    replicas = [
        found(ours, A, {0: out_of_sync(B), 1: out_of_sync(B)}),
        found(theirs, B, {3: out_of_sync(A)}),
    ]
    for degraded in (False, True):
        error = refusal(*replicas, degraded=degraded)
        assert (error.rule, error.exit_code) == ("split brain", ExitCode.NEEDS_OPERATOR)
        text = str(error)
        for one in (ours, theirs):
            assert f"{one.generation:016x} < {record.generation:016x}" in text
        assert "2 chunks written without the other" in text
        assert "1 chunks written without the other" in text
        assert "quorumfs resolve --dry-run --keep" in text


def test_one_that_was_added_to_a_side_can_be_kept() -> None:
    """The other side knows nothing of it, and has tracked nothing: all of the disk is copied."""
    record = first_record(2, 1)
    ours, theirs = without(record, B), without(record, A)
    ours = ours.with_new_role(C, Role(bytes(16), STALE, ours.generation, "/c.img"))
    ours = next_record(ours.with_state([C], CURRENT))
    resolution = resolve([found(ours, C), found(theirs, B)], "/c.img")
    assert resolution.kept == ("/c.img",)
    kept = resolution.sidecars["/c.img"]
    assert kept.map.count(out_of_sync(B)) == CHUNKS


def test_a_side_that_wrote_nothing_is_no_side() -> None:
    """Scenario 23: it has minted nothing."""
    record = first_record(2, 1)
    plan = assemble([found(without(record, B), A, {0: out_of_sync(B)}), found(record, B)])
    assert states(plan) == ["current", "stale"]
    assert marks(plan) == [out_of_sync(B), 0, 0, 0]


def test_a_third_replica_decides_no_split_brain() -> None:
    """P6: a majority is no reason to pick silently."""
    record = first_record(3, 1)
    ours, theirs = without(record, A), without(record, B, C)
    assert refusal(found(theirs, A), found(ours, B), found(ours, C)).rule == "split brain"


# Who does not belong


def test_replicas_of_two_sets_are_refused() -> None:
    """Scenario 26: both ids are shown."""
    one, other = first_record(2, 1), first_record(2, 1)
    error = refusal(found(one, A), found(other, B))
    assert error.rule == "foreign"
    assert one.set_id.hex() in str(error)
    assert other.set_id.hex() in str(error)
    assert "/a.img" in str(error)
    assert "/b.img" in str(error)


def test_a_raw_image_beside_a_member_is_refused() -> None:
    """Scenarios 27 and 36: neither overwritten nor a source; says the command."""
    record = first_record(2, 1)
    error = refusal(Found("/b.img", image_of(B)), found(record, A))
    assert error.rule == "stranger"
    assert "/b.img has no sidecar" in str(error)
    assert "quorumfs resolve --keep /a.img /b.img /a.img" in str(error)


def test_what_a_copy_that_was_cut_off_left_is_never_to_be_kept() -> None:
    """Its sidecar is the first of two that were to be made, and the source has none yet."""
    record = first_record(2, 1).with_state([B], RESYNCING)
    begun = found(record, B)
    error = refusal(Found("/a.img", image_of(A)), begun)
    assert error.rule == "stranger"
    assert "/b.img was being made a copy, which was cut off" in str(error)
    assert "quorumfs resolve --keep /a.img" in str(error)
    assert "--keep /b.img" not in str(error)


def test_a_resolve_that_was_killed_between_two_sidecars_can_be_repeated() -> None:
    """The set of the kept one does not know the other's new sidecar."""
    kept, raw = found(first_record(2, 1), A), Found("/b.img", image_of(B))
    first = resolve([kept, raw], "/a.img")
    assert list(first.sidecars) == ["/b.img", "/a.img"]
    begun = replace(raw, sidecar=first.sidecars["/b.img"])
    again = resolve([kept, begun], "/a.img")
    assert again.kept == ("/a.img",)
    assert [one.path for one in again.overwritten] == ["/b.img"]
    with pytest.raises(AssemblyRefusedError, match="was being resynced"):
        resolve([kept, begun], "/b.img")


def test_a_copy_with_its_sidecar_is_refused() -> None:
    """Scenario 32: both named."""
    record = first_record(2, 1)
    copy = replace(found(record, A), path="/copy.img")
    error = refusal(found(record, A), copy)
    assert error.rule == "duplicate"
    assert "/a.img and /copy.img are the same replica" in str(error)
    assert record.roles[A].replica_id.hex() in str(error)


def test_a_replica_without_a_readable_sidecar_is_never_touched() -> None:
    """Scenarios 10 and 44: unknown, so it proves nothing; with enough others the set is usable."""
    for problem in ("slot 0: torn; slot 1: torn", "format version 2, known here: 1"):
        record = first_record(3, 2)
        bad = Found("/b.img", image_of(B), problem=problem)
        plan = assemble([found(record, A), bad, found(record, C)])
        assert states(plan) == ["current", "foreign", "current"]
        assert plan.members[B] == Member("/b.img", B, Standing.FOREIGN, problem)
        assert plan.ejected == (B,)
        assert refusal(found(record, A), bad).rule == "no quorum"


def test_unreadable_sidecars_alone_are_no_set() -> None:
    error = refusal(Found("/a.img", image_of(A), problem="torn"), Found("/b.img", image_of(B)))
    assert (error.rule, error.exit_code) == ("unreadable", ExitCode.UNUSABLE)
    assert "/a.img cannot be read (torn)" in str(error)
    assert "remove all sidecars" in str(error)


def test_sidecars_are_not_to_be_removed_before_what_can_be_mended() -> None:
    forbidden = Found("/a.img", image_of(A), problem=f"/a.img.quorumfs: {DENIED}")
    text = str(refusal(forbidden, gone("/b.img")))
    mend = f"/a.img cannot be read (/a.img.quorumfs: {DENIED}): let this user read and write it"
    assert mend in text
    assert "/b.img: No such file or directory: bring it back" in text
    assert text.index("bring it back") < text.index("remove all sidecars")


def test_a_set_of_nothing_usable_says_why() -> None:
    record = first_record(2, 1)
    cut = found(record, A, image=Identity(1, 1, 1, 1))
    error = refusal(cut, gone("/b.img"))
    assert (error.rule, error.exit_code) == ("unusable", ExitCode.UNUSABLE)
    assert "/a.img: the image was truncated to 1 bytes" in str(error)
    assert "/b.img: No such file or directory" in str(error)


def test_a_replica_moved_to_another_path_is_known_by_its_id() -> None:
    record = first_record(2, 1)
    plan = assemble([replace(found(record, B), path="/new.img"), found(record, A)])
    assert [(m.path, m.slot) for m in plan.members] == [("/new.img", B), ("/a.img", A)]


def test_a_missing_path_fills_the_only_role_that_is_left() -> None:
    record = without(first_record(2, 1), B)
    plan = assemble([found(record, A), gone("/elsewhere.img")])
    assert plan.members[1].slot == B


# First use


def test_raw_images_are_adopted_and_compared() -> None:
    """The card's own command; scenario 28: a difference is reported, not repaired."""
    plan = assemble([Found("/a.img", image_of(A)), Found("/b.img", image_of(B))])
    assert plan.rule == "adopt: no replica has a sidecar"
    assert states(plan) == ["current", "current"]
    assert [role.path for role in plan.record.roles] == ["/a.img", "/b.img"]
    assert (plan.record.size, plan.record.threshold) == (SIZE, 2)
    assert marks(plan) == [UNVERIFIED] * CHUNKS
    alone = assemble([Found("/a.img", image_of(A))], threshold=1)
    assert marks(alone) == [0] * CHUNKS


def test_what_cannot_be_adopted_is_named() -> None:
    short = Found("/b.img", Identity(2, SIZE - 1, 1, 1))
    error = refusal(Found("/a.img", image_of(A)), short)
    assert error.rule == "adopt"
    assert f"/a.img has {SIZE} bytes, /b.img has {SIZE - 1}" in str(error)
    error = refusal(Found("/a.img", image_of(A)), gone("/b.img"))
    assert "cannot open the replica /b.img: No such file or directory" in str(error)


def test_an_adoption_that_was_killed_between_two_sidecars_goes_on() -> None:
    """Scenario 6: nothing was written through it, so nothing can be lost."""
    record = first_record(3, 2)
    begun = found(record, B, dict.fromkeys(range(CHUNKS), UNVERIFIED))
    raw = Found("/a.img", image_of(A)), Found("/c.img", image_of(C))
    for order in permutations([*raw, begun]):
        plan = assemble(order)
        assert plan.adopted
        assert plan.record == record
        assert states(plan) == ["current"] * 3
        assert [member.slot for member in plan.members] == ["abc".index(f.path[1]) for f in order]
        assert marks(plan) == [UNVERIFIED] * CHUNKS
    assert assemble([*raw, begun], threshold=1).record == replace(record, threshold=1)


@pytest.mark.parametrize("broken", ["used", "compared", "fewer", "other paths", "in use"])
def test_a_raw_image_beside_a_set_that_was_used_is_a_stranger(broken: str) -> None:
    record = first_record(2, 1)
    unseen = dict.fromkeys(range(CHUNKS), UNVERIFIED)
    raw = Found("/b.img", image_of(B))
    member = found(record, A, unseen)
    match broken:
        case "used":
            member = found(replace(record, sequence=2), A, unseen)
        case "in use":
            member = found(replace(record, clean=False), A, unseen)
        case "compared":
            member = found(record, A, {0: UNVERIFIED})
        case "fewer":
            member = found(first_record(3, 1), A, unseen)
        case "other paths":
            raw = Found("/c.img", image_of(B))
    assert refusal(member, raw).rule == "stranger"


def test_the_chunk_size_is_chosen_once() -> None:
    raw = [Found("/a.img", image_of(A)), Found("/b.img", image_of(B))]
    assert assemble(raw, chunk_size=2 * CHUNK).record.chunk_size == 2 * CHUNK
    record = first_record(2, 2)
    member = [found(record, slot) for slot in (A, B)]
    assert assemble(member, chunk_size=CHUNK).record.chunk_size == CHUNK
    with pytest.raises(AssemblyRefusedError, match=f"allowed: {CHUNK}, what the set was made with"):
        assemble(member, chunk_size=2 * CHUNK)
    large = [replace(one, image=Identity(1, 16 << 40, 1, 1)) for one in raw]
    with pytest.raises(AssemblyRefusedError, match=f"at least {4 << 20} for"):
        assemble(large, chunk_size=CHUNK)


def test_more_replicas_than_slots_are_refused() -> None:
    raw = [Found(f"/{n}.img", image_of(n)) for n in range(REPLICAS_MAX + 1)]
    error = refusal(*raw)
    assert error.rule == "too many replicas"
    assert "33 replicas: a set with sidecars has at most 32; use metadata=none" in str(error)
    assert len(assemble(raw[:-1]).record.roles) == REPLICAS_MAX


# Many


def test_what_any_of_many_says_of_any_of_them_counts() -> None:
    """Of 32, the last two are behind; by one map or another."""
    last = REPLICAS_MAX - 1
    record = without(first_record(REPLICAS_MAX, 17), last - 1, last)
    lacked = {0: {0: out_of_sync(last)}, 9: {1: out_of_sync(last - 1) | INTENT}}
    everybody = [
        found(record, slot, {1: INTENT} | lacked.get(slot, {})) for slot in range(last - 1)
    ]
    plan = assemble(everybody)
    assert states(plan) == ["current"] * (REPLICAS_MAX - 2)
    behind = out_of_sync(last - 1) | out_of_sync(last)
    assert states_of(plan.map) == [out_of_sync(last), behind | INTENT, 0, 0]


def test_what_one_of_many_could_not_flush_may_differ() -> None:
    """Also where a page of another one's map is unreadable, which says nothing of it."""
    record = next_record(first_record(8, 8), clean=False)
    everybody = [found(record, slot) for slot in range(6)]
    torn = found(record, 6, dict.fromkeys(range(CHUNKS), UNKNOWN & 0xFFFF))
    plan = assemble([*everybody, torn, found(record, 7, {2: out_of_sync(7)})])
    assert states_of(plan.map) == [INTENT, INTENT, INTENT | out_of_sync(7), INTENT]


def test_one_that_knows_nothing_of_the_seventh_goes_with_those_that_do() -> None:
    """The commit that made the set a larger one was cut off between two members."""
    small = next_record(first_record(6, 4), clean=False)
    role = Role(b"7" * 16, STALE, small.generation, "/7.img", small.sequence)
    large = next_record(small.with_new_role(6, role))
    all_of_it = dict.fromkeys(range(CHUNKS), out_of_sync(6))
    reached = [found(large, slot, all_of_it) for slot in range(3)]
    ahead = [found(small, slot, {1: INTENT}, prepared=large) for slot in range(3, 6)]
    plan = assemble([*reached, *ahead])
    assert plan.record == large
    assert states(plan) == ["current"] * 6
    assert states_of(plan.map) == [out_of_sync(6) | INTENT * (c == 1) for c in range(CHUNKS)]
    assert plan.unmarked == tuple((slot, range(1, 2)) for slot in range(3))
    plan = assemble(ahead + [found(small, slot, prepared=large) for slot in range(3)])
    assert plan.record == small
    assert states_of(plan.map) == [0, INTENT, 0, 0]


def test_what_was_lacked_by_one_that_is_removed_is_forgotten() -> None:
    """Its place may become another one's."""
    record = next_record(first_record(8, 4).with_role(7, state=RoleState.REMOVED))
    lacked = {0: out_of_sync(7), 1: out_of_sync(7) | INTENT}
    plan = assemble([found(record, slot, lacked) for slot in range(7)])
    assert states_of(plan.map) == [0, INTENT, 0, 0]


def test_a_seventh_image_becomes_a_copy() -> None:
    record = first_record(6, 4)
    members = [found(record, slot) for slot in range(6)]
    new = Found("/new.img", image_of(99))
    resolution = resolve([*members, new], members[2].path)
    for path, sidecar in resolution.sidecars.items():
        assert len(sidecar.record.roles) == 7
        assert set(states_of(sidecar.map)) == {out_of_sync(6)}, path
    assert [one.path for one in resolution.overwritten] == ["/new.img"]


def states_of(disk_map: DirtyMap) -> list[int]:
    return [disk_map.state(chunk) for chunk in range(len(disk_map))]


def test_a_half_done_copy_is_not_kept_beside_a_whole_one() -> None:
    record = first_record(2, 1).with_state([B], RESYNCING)
    members = [found(record, A), found(record, B)]
    with pytest.raises(AssemblyRefusedError, match="mixture of two times"):
        resolve(members, "/b.img")
    assert resolve(members, "/a.img").kept == ("/a.img",)
    assert resolve(members[1:], "/b.img").kept == ("/b.img",)


# The question behind it all


def test_a_record_covers_who_has_what_it_was_left_with_or_anything_later() -> None:
    first = first_record(2, 1)
    second = replace(without(next_record(first), A), sequence=5)
    record = replace(second.minted([77]), sequence=9)
    since = record.roles[A]
    assert (since.generation, since.sequence) == (first.generation, 2)
    assert not covers(record, A, first.generation, 1)
    assert covers(record, A, first.generation, 2)
    assert covers(record, A, first.generation, 3)
    assert covers(record, A, second.generation, 1)
    assert covers(record, A, 77)
    assert covers(record, A, record.generation)
    assert not covers(record, A, 12345, 99)
    old = replace(record, ancestors=(*record.ancestors, 55))
    assert not covers(old, A, 55, 99)


def test_one_that_was_away_for_many_generations_comes_back() -> None:
    """More than are remembered: the role says which one it was left with."""
    size = 1 << 19
    record = new_record(["/a", "/b"], size, 1)
    own = Sidecar(record.roles[1].replica_id, record, DirtyMap(size, record.chunk_size))
    later = record.with_state([1], RoleState.STALE).minted()
    for _ in range(ANCESTORS_MAX + 1):
        later = later.minted()
    assert record.generation not in later.history
    returned = judge_returned(later, 1, Found("/b", Identity(1, size), own))
    assert returned.state is Standing.STALE
    assert not returned.compare


def test_an_image_without_its_sidecar_takes_the_place_it_had_last() -> None:
    """Removed, and added again: else the set would for ever miss a replica at the same path."""
    record = first_record(2, 1)
    gone_for_good = replace(record.roles[A], state=RoleState.REMOVED)
    again = replace(record.roles[A], replica_id=b"again" + bytes(11), state=RoleState.STALE)
    record = record.with_new_role(A, gone_for_good).with_new_role(2, again)
    raw = Found("/a.img", image_of(A), None)
    resolution = resolve([found(record, B), raw], "/b.img")
    after = resolution.sidecars["/b.img"].record
    assert [after.roles[slot].path for slot in after.slots] == ["/b.img", "/a.img"]


def test_replicas_that_were_taken_out_are_told_where_they_are_too_many() -> None:
    record = first_record(2, 2).with_role(B, state=RoleState.OFFLINE)
    error = refusal(found(record, A), found(record, B))
    assert error.rule == "no quorum"
    assert "needs as many: offline /b.img: quorumfs online takes it in" in str(error)
    assert "missing" not in str(error)


def test_marks_of_others_say_nothing_where_images_were_never_compared() -> None:
    """A comparison decides there."""
    record = replace(first_record(3, 3), clean=False)
    maps: dict[int, dict[int, int]] = {
        A: {0: INTENT, 1: INTENT | UNVERIFIED},
        B: {0: INTENT, 1: INTENT | UNVERIFIED},
        C: {1: UNVERIFIED},
    }
    plan = assemble([found(record, slot, marks) for slot, marks in maps.items()])
    assert plan.unmarked == ((C, range(1)),)
