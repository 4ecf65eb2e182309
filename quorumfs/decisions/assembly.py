"""Assembly: from what was found beside the images to a plan for the set. A pure decision.

Theory
======

A *record* says which replicas are current. A record is committed on every replica current in it
before anything is acknowledged under it (`quorumfs.decisions.sidecar` says how). Whenever a replica
is ejected, the others mint a new *generation*, whose ancestors are all earlier ones. Hence:

* Of two generations the one that has the other among its ancestors is later. The *lineage*
  (`quorumfs.decisions.lineage`) tells whether replicas went on without each other, as a set and a
  copy of the set do in one generation. If both sides changed something since: split brain, and only
  the operator can choose. If one side did, the other is behind; if none did, the later record
  counts.
* At least the threshold of replicas are current in the latest record and hold it. So more than
  N - threshold replicas include one that holds the latest record; fewer may not know that they were
  ejected. That is why fewer than the threshold never mint, and why fewer than the old threshold
  cannot lower it without consent. A replica put back from a backup does not count here.
* The role of each replica names the record that the replica was last to get. A replica that is
  current in the latest record is intact if it comes with the record named, or a later one. With an
  older record, the replica was put back.
* Each current replica of the latest record holds everything that was flushed. Current replicas
  differ at most where one of their maps has `INTENT`, so the union of the maps counts.
* Where too few would be left, a replica that could not flush stays current, and is not believed
  where its own out-of-sync bits are set. If no replica present is believed somewhere, an absent
  replica that is current on record may be the only holder of acknowledged data.
* The members track for each ejected replica what was written since the record that its role names.
  If the replica comes back with that record, or a later one of the members, it lacks only what they
  tracked. If it comes back with an older record, its map is as old, and is not believed. So no mark
  is cleared before a commit has advanced the sequence on all replicas concerned: for `INTENT` the
  sequence of the members, for an out-of-sync bit the sequence in the replica's role and on the
  replica itself.

What is decided before: whether the replicas can be one set at all (`quorumfs.decisions.strangers`),
whether they are a new one (`newset`), and which record is the latest (`survey`).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from quorumfs.decisions.crashmarks import add_where_unmarked, marked_by_others
from quorumfs.decisions.dirtymap import (
    ALL_OUT_OF_SYNC,
    INTENT,
    UNVERIFIED,
    DirtyMap,
    out_of_sync,
)
from quorumfs.decisions.lineage import parting
from quorumfs.decisions.model import Found, Member, Plan, Standing
from quorumfs.decisions.newset import adopt, adoption_plan, begun_adoption, refuse_too_many
from quorumfs.decisions.record import Record, RoleState, Sidecar
from quorumfs.decisions.refusal import (
    AssemblyRefusedError,
    giving_up,
    it_or_they,
    names_of,
    why_without_place,
)
from quorumfs.decisions.returned import CHANGED, OFFLINE, UNPROVEN, is_covered
from quorumfs.decisions.sameimage import (
    has_its_times,
    image_changed,
    image_unproven,
    touched_after_crash,
    was_remounted,
)
from quorumfs.decisions.strangers import refuse_exchanged, refuse_strangers
from quorumfs.decisions.survey import Survey, current_of
from quorumfs.errors import ExitCode


def assemble(
    found: Sequence[Found],
    *,
    threshold: int | None = None,
    chunk_size: int | None = None,
    degraded: bool = False,
    read_only: bool = False,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Plan:
    """Decide how the replicas *found*, in the order of the command line, are used together.

    *threshold*: the vote threshold asked for; None: the set's own, or a majority of a new set.
    *chunk_size*: of a new set, in bytes; None: by the size of the disk.
    *degraded*: the operator accepts that a missing replica may hold later data.
    *read_only*: nothing is going to be recorded, nor acknowledged.
    Raises `AssemblyRefusedError`; nothing has been written then.
    """
    refuse_too_many(len(found))
    if not any(f.sidecar or (f.image and f.problem) for f in found):
        return adopt(found, threshold, chunk_size, random_bytes)
    if begun := begun_adoption(found):
        plan = adoption_plan(found, begun, threshold or begun.threshold)
    else:
        refuse_strangers(found)
        refuse_exchanged(found)
        plan = _Assembly(found, threshold, degraded=degraded, read_only=read_only).plan()
    if chunk_size not in (None, plan.record.chunk_size):
        raise AssemblyRefusedError(
            "chunk size",
            f"option chunk-size: got {chunk_size}, allowed: {plan.record.chunk_size}, what the set "
            "was made with",
            ExitCode.USAGE,
        )
    return plan


class _Assembly:
    """One decision on replicas of one set."""

    def __init__(
        self, found: Sequence[Found], threshold: int | None, *, degraded: bool, read_only: bool
    ) -> None:
        self._survey = Survey(found)
        self._record = self._survey.record
        self._degraded = degraded
        self._read_only = read_only
        self._believed: set[str] = set()
        """The images that are believed without proof."""
        self._threshold = self._record.threshold if threshold is None else threshold
        if self._threshold > len(self._record.slots):
            raise AssemblyRefusedError(
                "threshold",
                f"option vote-threshold: got {self._threshold}, allowed: 1 to "
                f"{len(self._record.slots)}, the number of replicas in the set",
                ExitCode.USAGE,
            )

    def plan(self) -> Plan:
        survey, record = self._survey, self._record
        present = [one for one in survey.found if one.path in survey.present]
        # An older sidecar says nothing of who is right: the image may be the only one that went on.
        vouched = [one for one in present if not one.copied]
        changed = {one.path for one in vouched if image_changed(one) or touched_after_crash(one)}
        members, moved = self._judge_all(present, changed)
        rule, quorum = self._rule(members, changed, moved=moved)
        self._compare_unknown(members)
        disk_map = self._joined_map(members)
        self._compare_unproven(disk_map, members, present, moved)
        current = {member.slot for member in current_of(members).values()}
        generations, mounts = survey.prepared()
        return Plan(
            rule,
            record,
            self._threshold,
            disk_map,
            members=tuple(
                members.get(one.path) or survey.absent_member(one) for one in survey.found
            ),
            unmarked=tuple(self._unmarked(members)),
            ejected=tuple(
                slot
                for slot, role in enumerate(record.roles)
                if role.state is RoleState.CURRENT and slot not in current
            ),
            prepared=generations,
            prepared_mounts=mounts,
            sequence_seen=survey.sequence_seen(),
            notes=tuple(survey.notes),
            quorum=quorum,
        )

    def _judge_all(
        self, present: Sequence[Found], changed: set[str]
    ) -> tuple[dict[str, Member], bool]:
        """The part of each replica by its path; and whether all images of current replicas are
        *changed*, and believed all the same."""
        unproven = self._unproven(present, changed)
        paths = [one.path for one in present]
        members = {
            path: self._judge(path, changed=path in changed, unproven=path in unproven)
            for path in paths
        }
        moved = not current_of(members)
        if moved:  # no unchanged current image is left to compare with
            members |= current_of({path: self._judge(path, changed=False) for path in changed})
        self._refuse_without_current(members)
        if moved:
            self._refuse_overwriting(members, present)
        return members, moved

    def _rule(
        self, members: dict[str, Member], changed: set[str], *, moved: bool
    ) -> tuple[str, int]:
        """The name of the rule that decides, and the quorum of the first commit."""
        # A sidecar tells which replicas were ejected, whether or not its image is proven: more than
        # N - threshold sidecars cannot all have missed a later record.
        as_left = [self._judge(path, changed=False) for path in members.keys() - changed]
        knowing = sum(one.slot is not None and not one.compare for one in as_left)
        rule, quorum = self._absence_rule(members, knowing, moved=moved)
        if (consent := self._lowering_rule(members, quorum)) is not None:
            return consent, self._threshold
        if not rule:
            sidecars = [self._survey.present[path] for path in current_of(members)]
            closed = all(sidecar.record.clean for sidecar in sidecars)
            rule = "clean: closed in order" if closed else "crash: not closed in order"
        return rule, quorum

    def _compare_unproven(
        self, disk_map: DirtyMap, members: dict[str, Member], present: Sequence[Found], moved: bool
    ) -> None:
        """Have images that are believed without proof compared, as far as *disk_map* does not."""
        current = {member.slot for member in current_of(members).values()}
        if moved:  # nor is it known what was changed
            self._survey.notes.append("all images were moved or changed together: comparing them")
            away = [out_of_sync(slot) for slot in self._record.slots if slot not in current]
            unsure = sum(away) | (UNVERIFIED if len(current) > 1 else 0)
            disk_map.add(unsure, range(len(disk_map)))
        elif len(current) > 1 and any(
            one.path in self._believed
            and (one.device or not self._survey.present[one.path].record.clean)
            for one in present
        ):
            self._survey.notes.append("nothing tells these images from others: comparing them")
            add_where_unmarked(disk_map, UNVERIFIED)

    def _unproven(self, present: Sequence[Found], changed: set[str]) -> set[str]:
        """The images not believed to be those of their sidecars, for want of proof (R15).

        None more than can be spared: a set whose stores were all mounted anew, perhaps after a
        power cut, must be usable. An image whose mount lasts is believed before others.
        """
        unproven = {one.path for one in present if image_unproven(one)}
        remounted = {one.path for one in present if one.path in unproven and was_remounted(one)}
        for doubted in (unproven, remounted, set[str]()):
            untrue = changed | doubted
            members = [self._judge(one.path, changed=one.path in untrue) for one in present]
            if sum(member.state is Standing.CURRENT for member in members) >= self._threshold:
                break
        self._believed = unproven - doubted
        self._survey.notes += [
            f"{path}: {UNPROVEN}; it is believed, for too few others are current"
            for path in self._believed
        ]
        return doubted

    def _judge(self, path: str, *, changed: bool, unproven: bool = False) -> Member:
        """The part of one replica with a readable sidecar, by the latest record."""
        sidecar, record = self._survey.present[path], self._record
        slot = record.slot_of(sidecar.replica_id)
        if slot is None:
            return Member(path, None, Standing.FOREIGN, why_without_place(record, sidecar))
        role = record.roles[slot]
        if role.state is RoleState.OFFLINE:
            return Member(path, slot, Standing.OFFLINE, OFFLINE)
        covered = is_covered(record, slot, sidecar)
        resyncing = sidecar.own_state is RoleState.RESYNCING
        if role.state is RoleState.CURRENT and covered and not resyncing:
            if changed or unproven:
                reason = CHANGED if changed else UNPROVEN
                return Member(path, slot, Standing.SUSPECT, reason, compare=True)
            return Member(path, slot, Standing.CURRENT)
        if self._was_apart(sidecar, slot):
            reason = "mounted without the others, and nothing was written to it since"
            return Member(path, slot, Standing.STALE, reason, compare=True)
        if role.state is RoleState.CURRENT:
            reason = "an older copy of this replica was put in its place"
            return Member(path, slot, Standing.STALE, reason, compare=True)
        if changed or unproven:
            reason = f"ejected, and {CHANGED if changed else UNPROVEN}"
            return Member(path, slot, Standing.SUSPECT, reason, compare=True)
        if covered:
            return Member(
                path, slot, Standing.STALE, f"ejected in generation {role.generation:016x}"
            )
        reason = "ejected longer ago than the others remember"
        return Member(path, slot, Standing.STALE, reason, compare=True)

    def _was_apart(self, sidecar: Sidecar, slot: int | None) -> bool:
        """Whether the replica with *slot* was mounted without those that hold the latest record,
        and they know nothing of that."""
        known = slot is not None and is_covered(self._record, slot, sidecar)
        return not known and _went_apart(sidecar, self._record)

    def _refuse_without_current(self, members: dict[str, Member]) -> None:
        if current_of(members):
            return
        record = self._record
        newer = [s for s, role in enumerate(record.roles) if role.state is RoleState.CURRENT]
        names = names_of([record.roles[slot] for slot in newer])
        stale = "; ".join(f"{path} is {m.state.value}: {m.reason}" for path, m in members.items())
        raise AssemblyRefusedError(
            "only stale",
            f"{stale}. Current in generation {record.generation:016x} are: {names}. "
            f"{self._survey.accounts(newer, members)}. If that is impossible, give up what only "
            f"{it_or_they(newer)} may hold: {self._survey.command('--keep', next(iter(members)))}",
        )

    def _refuse_overwriting(self, members: dict[str, Member], present: Sequence[Found]) -> None:
        """Refuse a changed image that nothing is compared with, and others are overwritten with.

        One that was copied with its times is what it was, as far as known.
        """
        current = list(current_of(members))
        behind = [path for path, m in members.items() if m.state.is_coming]
        kept = any(one.path == current[0] and has_its_times(one) for one in present)
        if len(current) > 1 or not behind or kept:
            return
        raise AssemblyRefusedError(
            "changed",
            f"{current[0]}: {CHANGED}, with no other current replica to compare it with, and "
            f"{', '.join(behind)} would be overwritten with it. Put the image back that belongs "
            "there; or, if it holds what is to be kept: "
            f"{self._survey.command('--keep', current[0])}",
            ExitCode.NEEDS_OPERATOR,
        )

    def _absence_rule(
        self, members: dict[str, Member], knowing: int, *, moved: bool
    ) -> tuple[str, int]:
        """Refuse if a missing replica might hold later data; else the rule, and the quorum.

        The quorum is the number of members that must hold the first commit. *knowing*: how many
        replicas are present as they were left; *moved*: no unchanged replica is current.
        """
        record = self._record
        present = {member.slot for member in members.values()}
        absent = [slot for slot in record.slots if slot not in present]
        # One that was mounted without the others has itself on record that nothing was written.
        replaced = {
            member.slot
            for path, member in members.items()
            if member.state is Standing.STALE
            and member.compare
            and not self._was_apart(self._survey.present[path], member.slot)
        }
        unaware = [
            slot
            for slot in record.slots
            if (slot not in present or slot in replaced)
            and (record.roles[slot].state is RoleState.CURRENT or (moved and slot in absent))
        ]
        current = len(current_of(members))
        coming = sum(member.state.is_coming for member in members.values())
        usable = current + coming
        if usable < self._threshold:
            reasons = []
            if absent:
                names = names_of([record.roles[slot] for slot in absent])
                reasons.append(f"missing {names}. {self._survey.accounts(absent, members)}. ")
            if out := [path for path, m in members.items() if m.state is Standing.OFFLINE]:
                reasons.append(
                    f"offline {', '.join(out)}: quorumfs online takes it in, once mounted. "
                )
            raise AssemblyRefusedError(
                "no quorum",
                f"{usable} of {len(record.slots)} replicas can be used, vote-threshold="
                f"{self._threshold} needs as many: {''.join(reasons)}{giving_up(unaware)}"
                f"mount with -o degraded,vote-threshold={usable}",
            )
        quorum = max(self._threshold, record.threshold)
        if not unaware:
            return "absent ones are on record as stale" if absent else "", quorum
        enough = knowing > len(record.slots) - record.threshold and usable >= quorum
        if enough and not self._lost_by_all(members):
            return "enough are present: nothing acknowledged can be elsewhere", quorum
        if self._degraded:
            rule = "degraded: the operator accepts that absent ones may hold later writes"
            return rule, self._threshold
        if enough:
            may = "may be the only one to hold what could not be flushed on the others"
        else:
            why = "nobody can say that it is" if moved else "nobody recorded it as"
            may = f"may have later writes: {why} stale"
        raise AssemblyRefusedError(
            "may be newer",
            f"{names_of([record.roles[slot] for slot in unaware])} {may}. "
            f"{self._survey.accounts(unaware, members)}. {giving_up(unaware)}"
            "mount with -o degraded",
        )

    def _lowering_rule(self, members: dict[str, Member], quorum: int) -> str | None:
        """Refuse a lower threshold that too few members can record, unless the operator consents.

        Else other replicas could go on by the old one. Returns the rule; None if none is needed.
        """
        current = len(current_of(members))
        if self._read_only or current >= quorum or self._threshold >= self._record.threshold:
            return None
        if self._degraded:
            return "degraded: the operator accepts that too few record the lower vote-threshold"
        old = self._record.threshold
        raise AssemblyRefusedError(
            "too few to lower",
            f"option vote-threshold: got {self._threshold}, the set's is {old}, and only {current} "
            f"of its replicas are current: {old} must have it on record that it is lower. Mount "
            "without this option until the others have caught up; or with -o degraded,"
            f"vote-threshold={self._threshold}, and never again without "
            f"{', '.join(current_of(members))}",
        )

    def _compare_unknown(self, members: dict[str, Member]) -> None:
        """Compare a stale replica in full if only absent replicas know the record of its role.

        Absent replicas, too few to eject those present, may have begun to resync it.
        """
        roles = self._record.roles
        slots = [member.slot for member in current_of(members).values()]
        known = max(roles[slot].sequence for slot in slots if slot is not None)
        for path, member in members.items():
            if member.state is Standing.STALE and member.slot is not None:
                unknown = roles[member.slot].sequence > known
                members[path] = replace(member, compare=member.compare or unknown)

    def _joined_map(self, members: dict[str, Member]) -> DirtyMap:
        """Where current members may differ, and the chunks that each other replica lacks."""
        record = self._record
        joined = record.new_map()
        everything = range(len(joined))
        for own in self._maps_of_current(members):
            joined.join(own)
        joined.remove(ALL_OUT_OF_SYNC & ~sum(map(out_of_sync, record.slots)), everything)
        for slot in record.slots:
            role = record.roles[slot]
            state = next((m.state for m in members.values() if m.slot == slot), Standing.MISSING)
            if state is Standing.CURRENT:  # if any map says that it lacks a chunk, it may differ
                joined.add_where(out_of_sync(slot), INTENT)
            elif role.state is not RoleState.CURRENT or state is Standing.MISSING:
                joined.add_where(INTENT, out_of_sync(slot))
        for path, member in members.items():
            if member.slot is None or member.state is Standing.CURRENT:
                continue
            sidecar = self._survey.present[path]
            if member.compare:
                joined.add(out_of_sync(member.slot), everything)
            elif sidecar.own_state not in (RoleState.RESYNCING, RoleState.OFFLINE):
                own = sidecar.map.copy()
                own.keep_as(INTENT, out_of_sync(member.slot))
                joined.join(own)
        return joined

    def _unmarked(self, members: dict[str, Member]) -> Iterator[tuple[int, range]]:
        """By slot: the chunks for which a current member is the last to be believed."""
        maps = {
            member.slot: self._survey.present[path].map
            for path, member in current_of(members).items()
            if member.slot is not None
        }
        return marked_by_others(maps, self._record.new_map())

    def _maps_of_current(self, members: dict[str, Member]) -> Iterator[DirtyMap]:
        """The maps of the current members; an unreadable page marks no losses of members."""
        current = current_of(members)
        slots = {member.slot for member in current.values()}
        others = [slot for slot in self._record.slots if slot not in slots]
        for path in current:
            yield self._survey.present[path].map.read_as(sum(map(out_of_sync, others)))

    def _lost_by_all(self, members: dict[str, Member]) -> bool:
        """Whether syncs that failed lost some chunk on every current member present (R4)."""
        slots = [member.slot for member in current_of(members).values()]
        lost = sum(out_of_sync(slot) for slot in slots if slot is not None)
        joined = self._record.new_map()
        for own in self._maps_of_current(members):
            joined.join(own)
        return joined.any_has(lost)


def _went_apart(sidecar: Sidecar, record: Record) -> bool:
    """Whether the replica of *sidecar* was mounted without the replicas that hold *record*."""
    at = parting(sidecar.record, record)
    return at is not None and (at.own > 0 or at.went_on)
