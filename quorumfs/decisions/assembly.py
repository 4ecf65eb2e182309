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
"""

import errno
import os
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from quorumfs.decisions.crashmarks import add_where_unmarked, marked_by_others
from quorumfs.decisions.dirtymap import (
    ALL_OUT_OF_SYNC,
    CHUNKS_MAX,
    INTENT,
    REPLICAS_MAX,
    UNVERIFIED,
    DirtyMap,
    chunk_size_for,
    out_of_sync,
)
from quorumfs.decisions.growth import longer
from quorumfs.decisions.lineage import adds, parting
from quorumfs.decisions.model import Found, Member, Plan, Standing
from quorumfs.decisions.record import (
    Identity,
    PastMount,
    Record,
    Role,
    RoleState,
    Sidecar,
)
from quorumfs.decisions.sameimage import (
    has_its_times,
    image_changed,
    image_unproven,
    touched_after_crash,
    was_remounted,
)
from quorumfs.errors import ExitCode, UserError


class AssemblyRefusedError(UserError):
    """The replicas cannot be used together as they are; the message says what to do."""

    def __init__(self, rule: str, text: str, exit_code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(text)
        self.rule = rule
        self.exit_code = exit_code


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
        return _adopt(found, threshold, chunk_size, random_bytes)
    if begun := _begun_adoption(found):
        plan = _adoption(found, begun, threshold or begun.threshold)
    else:
        _refuse_strangers(found)
        _refuse_exchanged(found)
        plan = _Assembly(found, threshold, degraded=degraded, read_only=read_only).plan()
    if chunk_size not in (None, plan.record.chunk_size):
        raise AssemblyRefusedError(
            "chunk size",
            f"option chunk-size: got {chunk_size}, allowed: {plan.record.chunk_size}, what the set "
            "was made with",
            ExitCode.USAGE,
        )
    return plan


def refuse_too_many(count: int) -> None:
    """Refuse *count* replicas if a record has no place for so many."""
    if count > REPLICAS_MAX:
        raise AssemblyRefusedError(
            "too many replicas",
            f"{count} replicas: a set with sidecars has at most {REPLICAS_MAX}; "
            "use metadata=none for more",
        )


def new_record(
    paths: Sequence[str],
    size: int,
    threshold: int,
    *,
    chunk_size: int | None = None,
    random_bytes: Callable[[int], bytes] = os.urandom,
) -> Record:
    """The first record of a new set: all of *paths* current."""
    generation = int.from_bytes(random_bytes(8), "little") or 1
    roles = tuple(Role(random_bytes(16), RoleState.CURRENT, generation, path) for path in paths)
    return Record(
        random_bytes(16),
        size,
        chunk_size or chunk_size_for(size),
        threshold,
        generation,
        roles,
    )


def covers(record: Record, slot: int, generation: int, sequence: int = 0) -> bool:
    """Whether *record* tracks all that the replica with *slot* lacks, if the last record that it
    held is the one with *generation* and *sequence*."""
    role = record.roles[slot]
    if generation == role.generation:
        return sequence >= role.sequence
    later = record.history
    if role.generation in later:  # else the role's is older than all that are remembered
        later = later[: later.index(role.generation)]
    return generation in later


def judge_returned(record: Record, slot: int, found: Found) -> Member:
    """The part of an ejected replica, *found* again, in a set whose latest record is *record*."""
    path, sidecar = found.path, found.sidecar
    if found.image is None or sidecar is None:
        reason = found.problem or "its sidecar is gone"
        return Member(
            path, slot, Standing.MISSING if found.image is None else Standing.FOREIGN, reason
        )
    if record.roles[slot].state is RoleState.OFFLINE:
        return Member(path, slot, Standing.OFFLINE, OFFLINE)
    if sidecar.record.disk != record.disk or record.slot_of(sidecar.replica_id) != slot:
        return Member(path, slot, Standing.FOREIGN, "another replica is in its place")
    if found.is_short(record.size):  # else, if the disk grew without it, it is to be lengthened
        return Member(path, slot, Standing.MISSING, _truncated(found.image, sidecar.record.size))
    mixture = sidecar.own_state is RoleState.RESYNCING
    if adds(sidecar.record, record, record.roles[slot].last_mount) and not mixture:
        return Member(path, slot, Standing.FOREIGN, "split brain: it was used without the others")
    if image_changed(found):
        return Member(path, slot, Standing.SUSPECT, _CHANGED, compare=True)
    if image_unproven(found):
        return Member(path, slot, Standing.SUSPECT, _UNPROVEN, compare=True)
    return Member(path, slot, Standing.STALE, compare=not _covered(record, slot, sidecar))


def _truncated(image: Identity, size: int) -> str:
    return f"the image was truncated to {image.size} bytes, the disk has {size}"


def _covered(record: Record, slot: int, sidecar: Sidecar) -> bool:
    held = [one for one in (sidecar.record, sidecar.prepared) if one]
    return any(_tracked(record, slot, one) for one in held)


def _tracked(record: Record, slot: int, own: Record) -> bool:
    """Whether *record* tracked all that the replica with *slot* lacks, if it holds *own*."""
    role = record.roles[slot]
    at = parting(own, record, role.last_mount)
    if at is None or at.went_on or adds(own, record, role.last_mount):
        return False
    if at.own == 0:
        return covers(record, slot, own.generation, own.sequence)
    # Mounted without the others, and not changed: the replica lacks what it lacked then.
    left = role.state is not RoleState.CURRENT and at.mount == role.last_mount
    whole = own.roles[slot].state is RoleState.CURRENT
    return left and whole and own.lineage[at.own - 1].first > role.sequence


def _adopt(
    found: Sequence[Found],
    threshold: int | None,
    chunk_size: int | None,
    random_bytes: Callable[[int], bytes],
) -> Plan:
    """First use of raw images: usable at once, and compared in the background."""
    sizes: dict[int, Found] = {}
    for one in found:
        if one.image is None:
            raise AssemblyRefusedError(
                "adopt", f"cannot open the replica {one.path}: {one.problem}"
            )
        if one.device:
            raise AssemblyRefusedError(
                "adopt",
                f"{one.path} is a block device, and no replica has a sidecar: there is no "
                f"{one.sidecar_place}. Mount what it lies on, or name its directory with sidecars="
                "DIR; for a new set, run: quorumfs create",
            )
        sizes.setdefault(one.image.size, one)
    if len(sizes) > 1:
        (size, one), (other_size, other) = list(sizes.items())[:2]
        raise AssemblyRefusedError(
            "adopt",
            f"replicas differ in size: {one.path} has {size} bytes, {other.path} has {other_size}",
        )
    (size,) = sizes
    paths = [one.path for one in found]
    if chunk_size is not None and size > chunk_size * CHUNKS_MAX:
        least = chunk_size_for(size)
        raise AssemblyRefusedError(
            "chunk size",
            f"option chunk-size: got {chunk_size}, allowed: at least {least} for {size} bytes",
            ExitCode.USAGE,
        )
    record = new_record(
        paths,
        size,
        threshold or len(found) // 2 + 1,
        chunk_size=chunk_size,
        random_bytes=random_bytes,
    )
    return _adoption(found, record, record.threshold)


def _begun_adoption(found: Sequence[Found]) -> Record | None:
    """The record of an adoption cut off before every image had a sidecar; None if there is none.

    Nothing was written through the set yet, and *found* are all its images: adoption can go on.
    """
    sidecars = [one.sidecar for one in found if one.sidecar]
    if not sidecars or any(one.image is None or one.problem for one in found):
        return None
    first = sidecars[0].record
    paths = [role.path for role in first.roles]
    begun = (
        len(sidecars) < len(found)
        and sorted(paths) == sorted(one.path for one in found)
        and all(one.image is not None and one.image.size == first.size for one in found)
        and all(role.state is RoleState.CURRENT for role in first.roles)
    )
    for sidecar in sidecars:
        record = sidecar.record
        untouched = record.sequence == 1 and record.clean and sidecar.prepared is None
        unseen = sidecar.map.is_all(UNVERIFIED)
        begun = begun and untouched and unseen and record.set_id == first.set_id
    return first if begun else None


def _adoption(found: Sequence[Found], record: Record, threshold: int) -> Plan:
    disk_map = record.new_map()
    if len(found) > 1:
        disk_map.add(UNVERIFIED, range(len(disk_map)))
    slots = {role.path: slot for slot, role in enumerate(record.roles)}
    members = tuple(Member(one.path, slots[one.path], Standing.CURRENT) for one in found)
    record = replace(record, threshold=threshold)  # nothing was acknowledged yet
    rule = "adopt: not all replicas have a sidecar, and nothing was written yet"
    if not any(one.sidecar for one in found):
        rule = "adopt: no replica has a sidecar"
    return Plan(rule, record, threshold, disk_map, members, adopted=True)


def _refuse_strangers(found: Sequence[Found]) -> None:
    """Refuse replicas that were never one set."""
    members = [f for f in found if f.sidecar]
    for one in found:
        if one.image and not one.sidecar and not one.problem:
            if not members:
                continue
            where = f" (there is no {one.sidecar_place})" if one.device else ""
            paths = [f.path for f in found]
            whole = [f.path for f in members if f.sidecar and not f.sidecar.is_mixture]
            if not whole:
                raise AssemblyRefusedError(
                    "stranger",
                    f"{one.path} has no sidecar{where}, and {members[0].path} was being made a "
                    "copy, which was cut off: it is no disk. Run the same command again; or, to "
                    f"keep what {one.path} holds, {_resolve('--keep', one.path, paths)}",
                )
            raise AssemblyRefusedError(
                "stranger",
                f"{one.path} has no sidecar{where}, but {whole[0]} is a member of a set: to "
                f"make {one.path} a copy of it, run: {_resolve('--keep', whole[0], paths)}",
            )
    seen: dict[bytes, Found] = {}
    for one in members:
        assert one.sidecar
        first = members[0]
        assert first.sidecar
        ours, theirs = first.sidecar.record.set_id, one.sidecar.record.set_id
        if ours != theirs:
            raise AssemblyRefusedError(
                "foreign",
                f"{first.path} is of set {ours.hex()}, {one.path} is of set {theirs.hex()}: "
                "they do not belong together",
            )
        if one.sidecar.record.disk != first.sidecar.record.disk:
            raise AssemblyRefusedError(
                "foreign",
                f"{first.path} says that the disk has {_shape(first.sidecar)}, {one.path} says "
                f"{_shape(one.sidecar)}: one of their sidecars is not what quorumfs wrote",
            )
        other = seen.setdefault(one.sidecar.replica_id, one)
        if other is not one:
            raise AssemblyRefusedError(
                "duplicate",
                f"{other.path} and {one.path} are the same replica {one.sidecar.replica_id.hex()}: "
                "one is a copy of the other with its sidecar. Give only one of them; to make the "
                f"other a replica of its own, remove {one.sidecar_place} and run quorumfs resolve",
            )
    if not members:
        accounts = "; ".join(_account(one, one.problem) for one in found if one.problem)
        raise AssemblyRefusedError(
            "unreadable",
            f"{accounts}. No other replica knows the set. If that is impossible: remove all "
            "sidecars, and the images are adopted anew",
            ExitCode.UNUSABLE,
        )


def _refuse_exchanged(found: Sequence[Found]) -> None:
    """Refuse an image that is the one of another replica's sidecar: they were renamed."""
    for one in found:
        for other in found:
            if one is other or not one.sidecar or not other.sidecar or not one.image:
                continue
            left = other.sidecar.identity
            known = left.inode and left.mtime_ns and not one.device and not other.device
            same = known and replace(left, ctime_ns=0) == replace(one.image, ctime_ns=0)
            if same and image_changed(one) and image_changed(other):
                raise AssemblyRefusedError(
                    "exchanged",
                    f"{one.path} is the image that the sidecar of {other.path} was left with: the "
                    "images were renamed, and their sidecars were not. Give them back their names",
                    ExitCode.NEEDS_OPERATOR,
                )


class _Survey:
    """The replicas found of one set, some of which may be missing or unreadable."""

    def __init__(self, found: Sequence[Found]) -> None:
        """Raises `AssemblyRefusedError` if no replica can be used, or there is a split brain."""
        self.found = found
        self.notes: list[str] = []
        """Notes for the operator."""
        self.present: dict[str, Sidecar] = {}
        """By path: the readable sidecars of images that are long enough."""
        self.problems: dict[str, str] = {}
        """By path: why the other replicas cannot be used."""
        for one in found:
            if problem := self._problem(one):
                self.problems[one.path] = problem
            elif one.sidecar:
                self.present[one.path] = self._lifted(one.sidecar)
                self.notes += [f"{one.sidecar_place}: {text}" for text in one.sidecar.damage]
        self._refuse_unusable()
        self.record = self._latest()
        """The latest record."""
        self._fit_to_record()
        self._refuse_unusable()

    def _refuse_unusable(self) -> None:
        if not self.present:
            raise AssemblyRefusedError(
                "unusable",
                "; ".join(
                    _account(one, self.problems[one.path])
                    for one in self.found
                    if one.path in self.problems
                ),
                ExitCode.UNUSABLE,
            )

    def _fit_to_record(self) -> None:
        """Give all maps the size of the latest record, which the disk may have grown to.

        Chunks added are clean: what a replica lacks there, the members of the record know. Members
        had their images lengthened before that record was begun, so a shorter one was truncated.
        """
        size = self.record.size
        for one in self.found:
            sidecar = self.present.get(one.path)
            if sidecar is None:
                continue
            assert one.image is not None
            if not one.device and (note := longer(one.path, one.image.size, size)):
                self.notes.append(note)
            if sidecar.map.size == size:
                continue
            slot = self.record.slot_of(sidecar.replica_id)
            if (
                one.image.size < size
                and slot is not None
                and self.record.roles[slot].state is RoleState.CURRENT
                and _covered(self.record, slot, sidecar)
            ):
                self.problems[one.path] = _truncated(one.image, size)
                del self.present[one.path]
            else:
                self.present[one.path] = replace(sidecar, map=sidecar.map.resized(size))

    def _problem(self, one: Found) -> str | None:
        """Why the replica at a path cannot be a member now; None if it can."""
        if one.problem:
            return one.problem
        assert one.image
        assert one.sidecar
        size = one.sidecar.record.size
        if one.image.size < size:
            return _truncated(one.image, size)
        return None

    def _lifted(self, sidecar: Sidecar) -> Sidecar:
        """*sidecar* with the latest record that another replica committed and this one prepared.

        A replica that prepared such a record, or a later one, took part in its commit.
        """
        prepared = sidecar.prepared
        if not prepared:
            return sidecar
        if not _current_in(prepared, sidecar):  # the members were to resync this replica
            if prepared.generation == sidecar.record.generation:
                return sidecar  # too few to eject it, and no copying began: it did not commit
            stale = sidecar.record.with_role(sidecar.slot, state=RoleState.RESYNCING)
            return replace(sidecar, record=stale)
        committed = [
            one.sidecar.record
            for one in self.found
            if one.sidecar
            and one.sidecar.record.generation in prepared.history
            and sidecar.record.sequence < one.sidecar.record.sequence <= prepared.sequence
            and _leads_to(one.sidecar.record, prepared)
        ]
        if not committed:
            return sidecar
        record = max(committed, key=lambda record: record.sequence)
        return replace(
            sidecar, record=record, prepared=prepared if record.key != prepared.key else None
        )

    def _latest(self) -> Record:
        """The record that lacks no change of another record; refuses a split brain."""
        known = {one.path: one.sidecar for one in self.found if one.sidecar} | self.present
        # Of several records with the latest generation, the latest commit.
        latest_path, latest = max(
            known.items(),
            key=lambda item: (
                -sum(_adds(other, item[1].record) for other in known.values()),
                sum(_is_known(other, item[1].record) for other in known.values()),
                item[1].record.sequence,
            ),
        )
        for path, sidecar in known.items():
            if _adds(sidecar, latest.record):
                raise AssemblyRefusedError(
                    "split brain",
                    f"split brain: {latest_path} and {path} were both used without the other. "
                    f"{_side(latest_path, latest)}; {_side(path, sidecar)}. Nothing was written. "
                    f"Choose whose data to keep: {self.command('--dry-run --keep', latest_path)}",
                    ExitCode.NEEDS_OPERATOR,
                )
        return latest.record

    def slot_of(self, one: Found) -> int | None:
        """The slot of the replica at a path, by its sidecar, or else by the path on record."""
        if one.sidecar:
            return self.record.slot_of(one.sidecar.replica_id)
        taken = {self.record.slot_of(sidecar.replica_id) for sidecar in self.present.values()}
        free = (slot for slot in self.record.slots if slot not in taken)
        return next((s for s in free if self.record.roles[s].path == one.path), None)

    def absent_member(self, one: Found) -> Member:
        """The member at a path with nothing usable, with its slot if the record tells."""
        taken = {self.record.slot_of(sidecar.replica_id) for sidecar in self.present.values()}
        slots = [slot for slot in self.record.slots if slot not in taken]
        others = [f for f in self.found if f.path not in self.present]
        slot = self.slot_of(one)
        if slot is None and not one.sidecar and len(others) == 1 and len(slots) == 1:
            (slot,) = slots
        if slot is not None and self.record.roles[slot].state is RoleState.OFFLINE:
            return Member(one.path, slot, Standing.OFFLINE, OFFLINE)
        state = Standing.FOREIGN if one.image and not one.sidecar else Standing.MISSING
        return Member(one.path, slot, state, self.problems.get(one.path))

    def accounts(self, slots: Collection[int], members: dict[str, Member]) -> str:
        """Why each replica with one of *slots* is not in use, and what to do about it.

        Other unusable paths are listed, too: each may be such a replica, or a wrong path.
        """
        accounts = []
        left = set(slots)
        good = next(iter(_current(members)), None)
        resolve = good and f"make it a copy of {good}: {self.command('--keep', good)}"
        for one in self.found:
            slot = self.slot_of(one)
            if problem := self.problems.get(one.path):
                if slot is None and one.image is None:
                    accounts.append(f"{one.path}: {problem}: is this the right path?")
                elif slot in left or slot is None:
                    accounts.append(_account(one, problem, resolve))
            elif slot in left:
                reason = members[one.path].reason
                accounts.append(f"{one.path}: {reason}: put the later one back")
            left.discard(-1 if slot is None else slot)
        accounts += [
            f"{_names([self.record.roles[slot]])} is not among the replicas given: bring it back, "
            "and name it where it is"
            for slot in sorted(left)
        ]
        return "; ".join(accounts)

    def prepared(self) -> tuple[tuple[int, ...], tuple[PastMount, ...]]:
        """The generations and the mounts known only from records that were prepared, for the
        replicas that these records have as current."""
        sidecars = [one.sidecar for one in self.found if one.sidecar]
        records = [r for one in sidecars if (r := one.prepared) and _current_in(r, one)]
        known = {mount.identity for mount in self.record.lineage}
        generations = dict.fromkeys(
            one for record in records for one in record.history if one not in self.record.history
        )
        mounts = {
            mount.identity: mount
            for record in records
            for mount in record.mounts
            if mount.identity not in known
        }
        return tuple(generations), tuple(mounts.values())

    def sequence_seen(self) -> int:
        """The highest number of any record, valid or prepared."""
        sidecars = [one.sidecar for one in self.found if one.sidecar]
        records = [record for one in sidecars for record in (one.record, one.prepared) if record]
        return max(record.sequence for record in records)

    def command(self, option: str, keep: str) -> str:
        """The command that makes all replicas here copies of *keep*."""
        return _resolve(option, keep, [one.path for one in self.found if one.image])


def _current(members: Mapping[str, Member]) -> dict[str, Member]:
    """The current ones of *members*, by path."""
    return {path: one for path, one in members.items() if one.state is Standing.CURRENT}


class _Assembly:
    """One decision on replicas of one set."""

    def __init__(
        self, found: Sequence[Found], threshold: int | None, *, degraded: bool, read_only: bool
    ) -> None:
        self._survey = _Survey(found)
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
        current = {member.slot for member in _current(members).values()}
        generations, mounts = survey.prepared()
        return Plan(
            rule,
            record,
            self._threshold,
            disk_map,
            members=tuple(
                members.get(one.path) or survey.absent_member(one) for one in survey.found
            ),
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
        moved = not _current(members)
        if moved:  # no unchanged current image is left to compare with
            members |= _current({path: self._judge(path, changed=False) for path in changed})
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
            sidecars = [self._survey.present[path] for path in _current(members)]
            closed = all(sidecar.record.clean for sidecar in sidecars)
            rule = "clean: closed in order" if closed else "crash: not closed in order"
        return rule, quorum

    def _compare_unproven(
        self, disk_map: DirtyMap, members: dict[str, Member], present: Sequence[Found], moved: bool
    ) -> None:
        """Have images that are believed without proof compared, as far as *disk_map* does not."""
        current = {member.slot for member in _current(members).values()}
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
            f"{path}: {_UNPROVEN}; it is believed, for too few others are current"
            for path in self._believed
        ]
        return doubted

    def _judge(self, path: str, *, changed: bool, unproven: bool = False) -> Member:
        """The part of one replica with a readable sidecar, by the latest record."""
        sidecar, record = self._survey.present[path], self._record
        slot = record.slot_of(sidecar.replica_id)
        if slot is None:
            return Member(path, None, Standing.FOREIGN, _stranger(record, sidecar))
        role = record.roles[slot]
        if role.state is RoleState.OFFLINE:
            return Member(path, slot, Standing.OFFLINE, OFFLINE)
        covered = _covered(record, slot, sidecar)
        resyncing = sidecar.own_state is RoleState.RESYNCING
        if role.state is RoleState.CURRENT and covered and not resyncing:
            if changed or unproven:
                reason = _CHANGED if changed else _UNPROVEN
                return Member(path, slot, Standing.SUSPECT, reason, compare=True)
            return Member(path, slot, Standing.CURRENT)
        if self._was_apart(sidecar, slot):
            reason = "mounted without the others, and nothing was written to it since"
            return Member(path, slot, Standing.STALE, reason, compare=True)
        if role.state is RoleState.CURRENT:
            reason = "an older copy of this replica was put in its place"
            return Member(path, slot, Standing.STALE, reason, compare=True)
        if changed or unproven:
            reason = f"ejected, and {_CHANGED if changed else _UNPROVEN}"
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
        known = slot is not None and _covered(self._record, slot, sidecar)
        return not known and _went_apart(sidecar, self._record)

    def _refuse_without_current(self, members: dict[str, Member]) -> None:
        if _current(members):
            return
        record = self._record
        newer = [s for s, role in enumerate(record.roles) if role.state is RoleState.CURRENT]
        names = _names([record.roles[slot] for slot in newer])
        stale = "; ".join(f"{path} is {m.state.value}: {m.reason}" for path, m in members.items())
        raise AssemblyRefusedError(
            "only stale",
            f"{stale}. Current in generation {record.generation:016x} are: {names}. "
            f"{self._survey.accounts(newer, members)}. If that is impossible, give up what only "
            f"{_them(newer)} may hold: {self._survey.command('--keep', next(iter(members)))}",
        )

    def _refuse_overwriting(self, members: dict[str, Member], present: Sequence[Found]) -> None:
        """Refuse a changed image that nothing is compared with, and others are overwritten with.

        One that was copied with its times is what it was, as far as known.
        """
        current = list(_current(members))
        behind = [path for path, m in members.items() if m.state.is_coming]
        kept = any(one.path == current[0] and has_its_times(one) for one in present)
        if len(current) > 1 or not behind or kept:
            return
        raise AssemblyRefusedError(
            "changed",
            f"{current[0]}: {_CHANGED}, with no other current replica to compare it with, and "
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
        current = len(_current(members))
        coming = sum(member.state.is_coming for member in members.values())
        usable = current + coming
        if usable < self._threshold:
            reasons = []
            if absent:
                names = _names([record.roles[slot] for slot in absent])
                reasons.append(f"missing {names}. {self._survey.accounts(absent, members)}. ")
            if out := [path for path, m in members.items() if m.state is Standing.OFFLINE]:
                reasons.append(
                    f"offline {', '.join(out)}: quorumfs online takes it in, once mounted. "
                )
            raise AssemblyRefusedError(
                "no quorum",
                f"{usable} of {len(record.slots)} replicas can be used, vote-threshold="
                f"{self._threshold} needs as many: {''.join(reasons)}{_giving_up(unaware)}"
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
            f"{_names([record.roles[slot] for slot in unaware])} {may}. "
            f"{self._survey.accounts(unaware, members)}. {_giving_up(unaware)}"
            "mount with -o degraded",
        )

    def _lowering_rule(self, members: dict[str, Member], quorum: int) -> str | None:
        """Refuse a lower threshold that too few members can record, unless the operator consents.

        Else other replicas could go on by the old one. Returns the rule; None if none is needed.
        """
        current = len(_current(members))
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
            f"{', '.join(_current(members))}",
        )

    def _compare_unknown(self, members: dict[str, Member]) -> None:
        """Compare a stale replica in full if only absent replicas know the record of its role.

        Absent replicas, too few to eject those present, may have begun to resync it.
        """
        roles = self._record.roles
        slots = [member.slot for member in _current(members).values()]
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
        maps = {
            member.slot: self._survey.present[path].map
            for path, member in members.items()
            if member.state is Standing.CURRENT and member.slot is not None
        }
        for slot, chunks in marked_by_others(maps, record.new_map()):
            joined.add(out_of_sync(slot), chunks)
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

    def _maps_of_current(self, members: dict[str, Member]) -> Iterator[DirtyMap]:
        """The maps of the current members; an unreadable page marks no losses of members."""
        current = _current(members)
        slots = {member.slot for member in current.values()}
        others = [slot for slot in self._record.slots if slot not in slots]
        for path in current:
            yield self._survey.present[path].map.read_as(sum(map(out_of_sync, others)))

    def _lost_by_all(self, members: dict[str, Member]) -> bool:
        """Whether syncs that failed lost some chunk on every current member present (R4)."""
        slots = [member.slot for member in _current(members).values()]
        lost = sum(out_of_sync(slot) for slot in slots if slot is not None)
        joined = self._record.new_map()
        for own in self._maps_of_current(members):
            joined.join(own)
        return joined.any_has(lost)


def _stranger(record: Record, sidecar: Sidecar) -> str:
    """Why the replica of *sidecar*, of the same set, has no place in *record*, and what to do."""
    add = "to make it a replica again, run: quorumfs add --overwrite"
    if (slot := record.place_of(sidecar.replica_id)) is None:
        return f"it is no replica of the set any more, or never became one; {add}"
    return f"it was removed from the set on {_date(record.roles[slot].mount)}; {add}"


def _date(seconds: int) -> str:
    """A time (seconds since 1970) for people; any number can be in a sidecar."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d at %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return "an unknown date"


OFFLINE = "the administrator took it out: quorumfs online takes it in again"
"""Why a replica is offline."""
_CHANGED = "the image was changed behind its sidecar"
_UNPROVEN = "nothing shows that its store holds the same image as before"


def _current_in(record: Record, sidecar: Sidecar) -> bool:
    slot = record.slot_of(sidecar.replica_id)
    return slot is not None and record.roles[slot].state is RoleState.CURRENT


def _leads_to(record: Record, later: Record) -> bool:
    """Whether *later* goes on from *record*, or is the same, by their mounts."""
    at = parting(record, later)
    return at is not None and at.own == 0 and not at.went_on


def _adds(sidecar: Sidecar, record: Record) -> bool:
    """Whether *record* lacks a change that the record of *sidecar* knows of."""
    slot = record.slot_of(sidecar.replica_id)
    return adds(sidecar.record, record, None if slot is None else record.roles[slot].last_mount)


def _is_known(sidecar: Sidecar, record: Record) -> bool:
    """Whether *record* knows the generation of *sidecar*."""
    slot = record.slot_of(sidecar.replica_id)
    left = () if slot is None else (record.roles[slot].generation,)  # maybe long ago
    return sidecar.record.generation in (*record.history, *left)


def _went_apart(sidecar: Sidecar, record: Record) -> bool:
    """Whether the replica of *sidecar* was mounted without the replicas that hold *record*."""
    at = parting(sidecar.record, record)
    return at is not None and (at.own > 0 or at.went_on)


def _shape(sidecar: Sidecar) -> str:
    return f"chunks of {sidecar.record.chunk_size} bytes"


def _side(path: str, sidecar: Sidecar) -> str:
    record = sidecar.record
    history = " < ".join(f"{generation:016x}" for generation in record.history[:4])
    mounts = " < ".join(f"{mount.identity:016x}" for mount in record.mounts[:4])
    used = f", in use by the mounts {mounts}" if mounts else ""
    written = sum(
        sidecar.map.count(out_of_sync(slot))
        for slot, role in enumerate(record.roles)
        if role.state is not RoleState.CURRENT
    )
    without = f", {written} chunks written without the other" if written else ""
    return f"{path}: history {history}{used}{without}"


def _account(one: Found, problem: str, resolve: str | None = None) -> str:
    """What is wrong at a path, and what to do; *resolve*: how to do without the data there."""
    unreadable = one.image is not None and one.sidecar is None
    what = f"the sidecar of {one.path} cannot be read" if unreadable else one.path
    what = f"{what} ({problem})" if unreadable else f"{what}: {problem}"
    if problem.endswith(os.strerror(errno.EACCES)):
        return f"{what}: let this user read and write it (chmod, chown)"
    if unreadable:
        return f"{what}: put a good one back" + (f", or {resolve}" if resolve else "")
    if one.image and one.sidecar:
        if one.device:
            return f"{what}: make it as long again (with lvextend or the like)"
        if one.sidecar.identity.mtime_ns:  # else its empty end would not be noticed
            size = one.sidecar.record.size
            return f"{what}: give it its length back: truncate -s {size} {shlex.quote(one.path)}"
        return f"{what}: put the whole image back"
    if problem == os.strerror(errno.ENOENT):
        return f"{what}: bring it back, or name it where it is"
    return f"{what}: mend that"


def _resolve(option: str, keep: str, paths: Sequence[str]) -> str:
    return f"quorumfs resolve {option} {shlex.join([keep, *paths])}"


def _giving_up(slots: Collection[int]) -> str:
    """How a message begins to advise a mount without the replicas with *slots*."""
    if not slots:
        return "To go on without: "
    return f"If that is impossible, give up what only {_them(slots)} may hold: "


def _them(slots: Collection[int]) -> str:
    return "it" if len(slots) == 1 else "they"


def _names(roles: Sequence[Role]) -> str:
    return ", ".join(role.path or role.replica_id.hex() for role in roles) or "none"
