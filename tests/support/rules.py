"""The promises and rules that P1 to P9 and R1 to R15 stand for, and where each is kept and tested.

``RULES.md`` is made from this by ``cd tests && python -m support.rules``;
`tests/unit/test_rules.py` tells whether it is up to date, and whether all that it names is there.
"""

from dataclasses import dataclass
from pathlib import Path

from support.simulation.mutations import MUTATIONS
from support.simulation.rule_stories import TOLD

RULES_FILE = Path(__file__).parents[1] / "RULES.md"


@dataclass(frozen=True, slots=True)
class Rule:
    """A promise to users (P), or a rule of order that the promises rest on (R)."""

    name: str
    title: str
    says: str
    """What holds, in full sentences."""
    without: str
    """What happens to somebody where it does not hold."""
    kept_by: tuple[str, ...]
    """Modules, classes and functions, by their dotted names, that keep it."""
    system_tests: tuple[str, ...]
    """``file::test`` below ``tests/system``: the real mount, real files, real faults."""
    unit_tests: tuple[str, ...] = ()
    """The same below ``tests/unit``, where no mutation and its story show the rule alone."""

    @property
    def mutations(self) -> list[str]:
        """What switches it off: keys of `MUTATIONS`."""
        return [label for label in MUTATIONS if label.split()[0] == self.name]


PROMISES = (
    Rule(
        "P1",
        "No stale read",
        "After a write was acknowledged no read returns older data, whichever replica missed the "
        "write, also across a crash and a mount.",
        "QEMU 7.2 shows it with fifo and threshold 1: one child misses a write, the write is "
        "acknowledged, and reads return the old data for ever.",
        (
            "quorumfs.metadata.sidecars.Sidecars.finish",
            "quorumfs.metadata.ledger.sources.Sources.read_segments",
            "quorumfs.decisions.assembly.assemble",
        ),
        (
            "test_resync.py::test_the_first_of_fifo_misses_one_write",
            "test_differences.py::test_random_faults_never_show_old_data",
        ),
        (
            "test_stories_of_missing_replicas.py::test_it_ends_well",
            "test_simulation.py::test_no_promise_is_broken",
        ),
    ),
    Rule(
        "P2",
        "A flush means durable",
        "When a flush succeeds, what was acknowledged before it is durable on at least "
        "vote-threshold replicas, and so is the record of who is current. A place that can be "
        "read on no replica fails no flush elsewhere.",
        "A guest's journal believes in writes that a power cut then takes back.",
        (
            "quorumfs.disk.disk.Disk.flush",
            "quorumfs.disk.mirror.Mirror.sync",
            "quorumfs.metadata.sidecars.Sidecars.finish_flush",
            "quorumfs.repair.badplaces.cannot_be_read",
        ),
        (
            "test_durability.py::test_what_was_durable_survives_a_power_cut",
            "test_bad_sectors.py::test_a_sector_bad_everywhere_costs_an_error_there_until_it_is_written",
        ),
    ),
    Rule(
        "P3",
        "Replicas converge",
        "When faults have stopped, all replicas become identical, byte by byte, without anybody "
        "asking, and only what may differ is copied: after a crash the marked extents, after an "
        "absence what was written meanwhile. What was copied is not copied again. A replica that "
        "an administrator takes out is left, durably, as the disk was at one moment.",
        "Every short outage costs a copy of the whole disk, and a slow one never ends.",
        (
            "quorumfs.repair.repairs.Repairs",
            "quorumfs.metadata.joining.Joining.save_progress",
            "quorumfs.repair.work.Work",
            "quorumfs.live.membership.Membership.offline",
        ),
        (
            "test_resync.py::test_one_missed_write_costs_one_chunk",
            "test_resync.py::test_one_that_was_away_at_the_mount_comes_back",
        ),
    ),
    Rule(
        "P4",
        "A tie never destroys",
        "A repair writes only what reached the threshold and is the strict winner, or what a "
        "durable record says that others lack.",
        "QEMU has the last child win a tie, and rewrite-corrupted then overwrites the good copy.",
        (
            "quorumfs.decisions.voting.vote_data",
            "quorumfs.repair.rewrite.read_and_rewrite",
            "quorumfs.repair.inspection.judge",
        ),
        (
            "test_differences.py::test_a_tie_rewrites_nothing",
            "test_scrub.py::test_two_that_differ_need_the_operator_also_after_a_mount",
        ),
    ),
    Rule(
        "P5",
        "One sick replica costs one timeout, once",
        "When a replica stops answering, the requests under way wait for it once, and later ones "
        "do not. The status is told at once throughout.",
        "Each request of the guest waits for a timeout, and whoever asks what is wrong does too.",
        (
            "quorumfs.replica.replica.Replica.abandon_overdue",
            "quorumfs.control.reporter.Reporter",
            "quorumfs.fastpath.path.FastPath",
        ),
        (
            "test_differences.py::test_a_hung_replica_costs_one_timeout_once",
            "test_frozen_store.py::test_a_frozen_store_costs_the_guest_one_timeout_and_status_none",
        ),
    ),
    Rule(
        "P6",
        "Nothing is guessed",
        "Split brain, images of another set, images put back from a backup, a lone replica that "
        "cannot know whether it is stale: a mount is refused with a reason, an exit code and the "
        "command to run.",
        "The newer half of somebody's data is overwritten with the older, and nobody was asked.",
        ("quorumfs.decisions.assembly.assemble", "quorumfs.decisions.resolution.resolve"),
        (
            "test_split.py::test_a_split_brain_is_refused",
            "test_split.py::test_a_lone_replica_needs_the_operators_word",
        ),
    ),
    Rule(
        "P7",
        "What was read never turns back",
        "What was read once is read again until somebody writes there: where replicas may differ "
        "they are made equal before anything is shown, or one pinned source is read.",
        "After a crash a guest's file system replays its journal over blocks that change behind "
        "its back.",
        (
            "quorumfs.repair.settle.Settling.settle_and_read",
            "quorumfs.metadata.ledger.sources.Sources.of",
        ),
        (
            "test_crash.py::test_what_was_read_while_it_was_being_settled_stays",
            "test_crash.py::test_what_was_read_stays_though_its_source_fails",
        ),
    ),
    Rule(
        "P8",
        "No false alarm",
        "Comparing replicas under the full load of a guest finds no difference where there is "
        "none.",
        "The operator learns to ignore the counter that would have told of a rotting disk.",
        (
            "quorumfs.repair.verify.Verification",
            "quorumfs.disk.earlyvote.LateAnswers",
            "quorumfs.repair.inspection.Inspection",
            "quorumfs.disk.rangelock.RangeLock",
        ),
        (
            "test_differences.py::test_a_read_during_a_slow_write_is_before_or_after_it",
            "test_scrub.py::test_no_false_alarm_under_full_write_load",
        ),
        ("test_stories_of_scrub.py::test_it_ends_well",),
    ),
    Rule(
        "P9",
        "A majority is never overwritten",
        "Where three or more current replicas answer, no recovery replaces what a strict majority "
        "of them holds, block by block, also after a crash.",
        "One disk rots, the host crashes, and the rot of the first replica is on all of them.",
        ("quorumfs.decisions.voting.reconcile",),
        ("test_crash.py::test_what_was_read_after_a_crash_stays_whatever_the_order",),
        ("test_stories_of_rot.py::test_it_ends_well",),
    ),
)

ORDER = (
    Rule(
        "R1",
        "Intent before data",
        "A write goes to no replica before an intent for its chunks is durable in the sidecars of "
        "all that will receive it. Extents are marked, and more at a time the more writes had to "
        "wait, so that a hot area costs one sync.",
        "After a crash nobody knows where replicas differ, and reads turn back for ever.",
        (
            "quorumfs.metadata.sidecars.Sidecars.prepare",
            "quorumfs.metadata.ledger.ledger.Ledger.writable",
            "quorumfs.metadata.ledger.recorded.Recorded.holds",
            "quorumfs.metadata.ledger.intents.Intents",
        ),
        ("test_kill_sweep.py::test_a_life", "test_crash.py::test_kills_in_a_row"),
    ),
    Rule(
        "R2",
        "Verdict",
        "A write goes to all current replicas at once and succeeds with vote-threshold successes. "
        "With fewer it fails with the errno that most agree on, nobody is ejected, and the "
        "chunk counts as one that may differ. Where all fail alike (no space), nobody is blamed.",
        "One full file system takes every replica out of the set, or a failed write is shown by "
        "one replica and not by another.",
        ("quorumfs.metadata.sidecars.Sidecars.finish", "quorumfs.decisions.voting.voted_error"),
        (
            "test_differences.py::test_success_from_the_threshold_on",
            "test_resync.py::test_no_space_on_all",
        ),
    ),
    Rule(
        "R3",
        "Ejected before acknowledged",
        "If a write succeeded and a replica failed it, the new record of who is current is durable "
        "on all the others, at least vote-threshold of them, before the guest hears of success. A "
        "change of who is current mints one generation; a write does not. What an administrator "
        "makes of a replica is as durable before the answer; so is another vote-threshold, and as "
        "many know of a lower one as the old one demands.",
        "The daemon dies, and the next mount believes the replica that missed the write.",
        (
            "quorumfs.metadata.recorder.Recorder.eject",
            "quorumfs.metadata.ledger.commit.Records.commit",
            "quorumfs.metadata.enrolment.Enrolment",
            "quorumfs.metadata.sidecars.Sidecars.change_threshold",
        ),
        (
            "test_crash.py::test_a_kill_while_one_is_ejected",
            "test_resync.py::test_one_generation_for_one_change",
        ),
    ),
    Rule(
        "R4",
        "A failed sync is a loss",
        "A replica whose sync failed may have lost everything that it was given since its last "
        "good one, and nothing else. The kernel tells of it once and drops the page, so that a "
        "read may show it still: a resync copies it all, however equal it looks. A failure counts "
        "for the next flush if the flush that heard of it was cut off, and once: to open files "
        "anew whose file system was gone is no second loss. Where all that are left have lost "
        "something of a chunk, those that lost the least are believed, and one "
        "that was away before one that said so; and what one lost is made good before more is "
        "written beside it.",
        "Data that a flush promised is gone after a power cut, on a replica that passed for good.",
        (
            "quorumfs.metadata.ledger.epochs.Epochs",
            "quorumfs.metadata.ledger.chunks.Chunks.lose",
            "quorumfs.metadata.ledger.chunks.Chunks.failed",
            "quorumfs.metadata.joining.Joining.reopen_member",
            "quorumfs.metadata.ledger.content.Content.losers",
            "quorumfs.metadata.sidecars.Sidecars.finish_flush",
            "quorumfs.metadata.ledger.ledger.Ledger.sync_ended",
            "quorumfs.metadata.ledger.chunks.Chunks.writeback_errors_surfaced",
        ),
        ("test_resync.py::test_one_failed_fsync_makes_all_since_the_last_good_one_suspect",),
    ),
    Rule(
        "R5",
        "Clear lazily",
        "An intent is cleared only when its extent was not written to for some time, after a sync "
        "of all replicas that began later, and never while a replica is not current.",
        "A lost clear costs a comparison; a wrong one costs data.",
        ("quorumfs.metadata.sidecars.Sidecars.clear_marks",),
        ("test_crash.py::test_what_is_settled_does_not_grow_from_crash_to_crash",),
    ),
    Rule(
        "R6",
        "Range locks",
        "Writes that overlap take turns. A vote overlaps no write under way. A repair reads again "
        "under the exclusive lock before it writes.",
        "Replicas apply writes in different orders and differ for ever; QEMU's repair loses a "
        "write that it races with, and its votes fail beside writes.",
        ("quorumfs.disk.rangelock.RangeLock", "quorumfs.disk.disk.Disk._change"),
        (
            "test_differences.py::test_overlapping_writes_leave_replicas_equal",
            "test_differences.py::test_a_repair_never_undoes_a_write",
        ),
    ),
    Rule(
        "R7",
        "No return before the last old request",
        "A replica that was given up is not opened again before every request it was asked for "
        "has returned and both its files are closed.",
        "A write that hung for minutes lands on a replica that was resynced meanwhile.",
        ("quorumfs.replica.replica.Replica.in_flight", "quorumfs.repair.rejoin.Rejoin"),
        ("test_resync.py::test_no_resync_before_the_last_old_request_returned",),
    ),
    Rule(
        "R8",
        "Resync of a chunk",
        "A chunk is copied under its lock, synced on the target, and only then not lacked any "
        "more; at the end the target's map and sync come before the record that makes it current. "
        "Each step may be cut off and repeated. Holes stay holes. Guest writes go to the "
        "target, too, but for those to chunks of which the target lacks all.",
        "A replica is called current that holds a mixture.",
        (
            "quorumfs.repair.resync.Resync",
            "quorumfs.metadata.joining.Joining.join",
            "quorumfs.metadata.ledger.target.Target.synced",
        ),
        (
            "test_kill_sweep.py::test_a_replica_is_caught_up",
            "test_resync.py::test_holes_stay_holes",
        ),
    ),
    Rule(
        "R9",
        "The sidecar survives being cut off",
        "A record has two slots with checksums, of which the good one is never changed. As it was "
        "found it is written once more before the other one is overwritten: it may be only in the "
        "page cache, left there by a sync that failed. What cannot be read of a map means that "
        "everything there may differ. A version that is not known is refused, and not rewritten.",
        "A power cut amid a record makes a set of good images unmountable, or a clean one of bad.",
        (
            "quorumfs.decisions.sidecar.decode",
            "quorumfs.metadata.writer.SidecarWriter",
            "quorumfs.replica.sidecarfile.create_sidecar",
        ),
        ("test_kill_sweep.py::test_adoption", "test_kill_sweep.py::test_create"),
    ),
    Rule(
        "R10",
        "Short is an error",
        "An image that is shorter than the disk has failed there, also if it gets its length back; "
        "what is missing of it is never shown as zeros. A copy that ended early is no copy. When "
        "the disk grows the images of all members are longer, durably, before the record says so.",
        "A truncated file reads as a disk that was wiped in part.",
        (
            "quorumfs.replica.filestorage.FileStorage",
            "quorumfs.metadata.sidecars.Sidecars.truncated",
            "quorumfs.live.grow.Growth",
        ),
        ("test_differences.py::test_a_truncated_replica_is_never_zeros",),
    ),
    Rule(
        "R11",
        "Votes by block",
        "A vote compares bytes. Where they disagree it is held again for each block of 4 KiB, so "
        "that replicas which are bad at different places still make a readable disk.",
        "Two bad sectors at different places of two replicas cost a whole request.",
        ("quorumfs.decisions.voting.vote_data", "quorumfs.disk.reading.read_locked"),
        ("test_quorum_table.py::test_replicas_bad_at_different_blocks",),
        ("test_voting.py::test_bad_blocks_at_different_places_leave_a_readable_request",),
    ),
    Rule(
        "R12",
        "No wall clock decides",
        "Time is monotonic. Which data is newer is told by records, not by a clock or a file's "
        "times.",
        "A host whose clock was wrong wins over the one that was right.",
        (
            "quorumfs.decisions.assembly.assemble",
            "quorumfs.replica.replica.Replica.abandon_overdue",
        ),
        ("test_split.py::test_the_newer_one_is_the_source_whatever_it_looks_like",),
    ),
    Rule(
        "R13",
        "A loss is told once",
        "Writes that were acknowledged and lost on all replicas fail exactly one flush of the "
        "guest, whoever had the replicas sync and heard of it.",
        "The guest's fsync succeeds over data that is gone.",
        ("quorumfs.disk.disk.Disk.flush", "quorumfs.metadata.ledger.chunks.Chunks.tell_loss"),
        ("test_differences.py::test_a_failed_flush_is_not_forgotten",),
    ),
    Rule(
        "R14",
        "Each mount is somebody",
        "A mount mints an identity and puts it on record before its first change; members whose "
        "histories parted are a split. A claim in the sidecars names the mount that has the set, "
        "and is read back before each record and every second: who finds another one's writes "
        "nothing more.",
        "Two copies of one set, or two hosts, write over each other's data, and all look healthy.",
        (
            "quorumfs.decisions.lineage",
            "quorumfs.decisions.claim",
            "quorumfs.metadata.claims.Claims.look",
        ),
        (
            "test_split.py::test_copies_that_were_used_are_not_mixed",
            "test_two_paths.py::test_the_second_path_is_refused_and_takes_over_if_told_so",
        ),
    ),
    Rule(
        "R15",
        "A sidecar vouches for its own store",
        "What comes back, or is met after a crash, is compared wherever it cannot prove itself: at "
        "least what the set wrote lately; all of it where image and sidecar lie on different file "
        "systems, or the store has no identities that last.",
        "A snapshot that is some seconds old, or an empty image under a mount point, is believed.",
        (
            "quorumfs.decisions.sameimage.image_unproven",
            "quorumfs.decisions.crashmarks.marked_by_others",
            "quorumfs.repair.proof.holds_last_writes",
            "quorumfs.metadata.ledger.target.Target.doubt_log",
            "quorumfs.metadata.joining.Joining.reopen_member",
        ),
        (
            "test_assembly_real.py::test_the_image_alone_put_back",
            "test_exchanged_images.py::test_an_old_image_is_not_believed_after_a_crash",
            "test_block_devices.py::test_after_a_crash_a_device_that_was_gone_is_compared",
            "test_block_devices.py::test_a_nameless_device_is_never_believed_where_another_is",
        ),
        ("test_stories_of_rollback.py::test_it_ends_well",),
    ),
)

_HEAD = """\
<!-- Made from tests/support/rules.py by: cd tests && python -m support.rules -->
# Promises and rules

`P1` to `P9` are what users are promised. `R1` to `R15` are the rules of order that the promises
rest on. Code and tests name them by number. What switches one off is a *mutation*
(`tests/support/simulation/mutations.py`). A story in simulated storage
(`tests/support/simulation/rule_stories.py`) ends well with the rule
(`tests/unit/test_rules_kept.py`) and badly with each mutation (`tests/unit/test_mutations.py`).
Where no mutation shows a rule alone, unit tests do.
"""


def stories() -> dict[str, list[str]]:
    """By mutation, the names of the stories that notice it."""
    found: dict[str, list[str]] = {}
    for case in TOLD:
        found.setdefault(case.mutation, []).append(case.script.__name__)
    return found


def rendered() -> str:
    """The text of `RULES_FILE`."""
    told = stories()
    parts = [_HEAD]
    for heading, rules in (("Promises", PROMISES), ("Rules of order", ORDER)):
        parts.append(f"\n## {heading}\n")
        for rule in rules:
            parts.append(f"\n### {rule.name}. {rule.title}\n\n{rule.says}\n\n")
            parts.append(f"- Without it: {rule.without}\n")
            parts.append(f"- Kept by: {', '.join(f'`{name}`' for name in rule.kept_by)}\n")
            for label in rule.mutations:
                noticing = ", ".join(f"`{name}`" for name in told[label])
                parts.append(f"- Switched off by *{label}*: noticed by {noticing}\n")
            tests = [f"`unit/{test}`" for test in rule.unit_tests]
            tests += [f"`system/{test}`" for test in rule.system_tests]
            parts.append(f"- Tests: {', '.join(tests)}\n")
    return "".join(parts)


if __name__ == "__main__":
    RULES_FILE.write_text(rendered(), encoding="utf-8")
