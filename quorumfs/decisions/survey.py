"""The survey: the replicas found of one set, and the latest record that they know. Pure."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from quorumfs.decisions.growth import longer
from quorumfs.decisions.lineage import adds, parting
from quorumfs.decisions.model import Found, Member, Standing
from quorumfs.decisions.record import PastMount, Record, RoleState, Sidecar
from quorumfs.decisions.refusal import (
    AssemblyRefusedError,
    account,
    names_of,
    resolve_command,
    side_of_split,
    truncated,
)
from quorumfs.decisions.returned import OFFLINE, is_covered
from quorumfs.errors import ExitCode


class Survey:
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
                    account(one, self.problems[one.path])
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
                and is_covered(self.record, slot, sidecar)
            ):
                self.problems[one.path] = truncated(one.image, size)
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
            return truncated(one.image, size)
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
                    f"{side_of_split(latest_path, latest)}; {side_of_split(path, sidecar)}. "
                    "Nothing was written. Choose whose data to keep: "
                    f"{self.command('--dry-run --keep', latest_path)}",
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
        good = next(iter(current_of(members)), None)
        resolve = good and f"make it a copy of {good}: {self.command('--keep', good)}"
        for one in self.found:
            slot = self.slot_of(one)
            if problem := self.problems.get(one.path):
                if slot is None and one.image is None:
                    accounts.append(f"{one.path}: {problem}: is this the right path?")
                elif slot in left or slot is None:
                    accounts.append(account(one, problem, resolve))
            elif slot in left:
                reason = members[one.path].reason
                accounts.append(f"{one.path}: {reason}: put the later one back")
            left.discard(-1 if slot is None else slot)
        accounts += [
            f"{names_of([self.record.roles[slot]])} is not among the replicas given: bring it "
            "back, and name it where it is"
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
        return resolve_command(option, keep, [one.path for one in self.found if one.image])


def current_of(members: Mapping[str, Member]) -> dict[str, Member]:
    """The current ones of *members*, by path."""
    return {path: one for path, one in members.items() if one.state is Standing.CURRENT}


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
