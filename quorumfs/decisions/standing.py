"""The standing of a replica, and what follows from it: one row for each standing.

A new standing is added in these steps:

1. Its row. The properties of `Standing` say what each column decides; a column that a row does not
   name is False. No condition elsewhere names two standings. `tests/unit/test_standing.py` fails
   first: it holds what is promised of every row, and a promise that the new row breaks on purpose
   (such as that only a person's decision keeps a replica from being tried again) is to be changed.
   One promise is not for the row alone to break: the ledger knows one replica that is written and
   not read, the target of a resync. For a second one `Ledger.receivers` and `flush_receivers` and
   `Recorder.eject` are to be extended before, else what it misses is marked nowhere.
2. What to do about it: a line in `quorumfs.control.advice.ADVICE`, which `test_standing.py` misses.
3. Its transitions. Standings are assigned in these places alone:

   * `quorumfs.decisions.assembly` and `survey`: at the mount (`_judge`, `absent_member`);
   * `quorumfs.decisions.returned`: when the files of a replica are opened again
     (`judge_returned`). What the next mount is to know of the standing must be in the record
     (`quorumfs.decisions.record.RoleState`);
   * `quorumfs.metadata.ledger.ledger.Ledger`: the plan's standings, at first; STALE or OFFLINE in
     `eject` and `give_up_target`;
   * `quorumfs.metadata.enrolment.Enrolment`: OFFLINE when a replica is taken out or removed, STALE
     in `take_in` and `admit`, MISSING or OFFLINE in `attach`;
   * `quorumfs.live.admission.Admission`: OFFLINE while the sidecar of one that is out of use is
     made anew, then MISSING;
   * `quorumfs.metadata.joining.Joining`: RESYNCING in `start_resync`, CURRENT in `join`;
   * `quorumfs.repair.rejoin.Rejoin.rejoin`: as judged, or FOREIGN where another mount has it;
   * `quorumfs.metadata.volatile.Holdings`: STALE and CURRENT, without sidecars;
   * `quorumfs.replica.replica.Replica`: CURRENT, before any other. Its `state` is MISSING while it
     does not answer, and its standing stays as it is.

4. What is true of one standing alone: conditions that name it. They are in assembly, which decides
   what is CURRENT; in `Joining`; in `quorumfs.live`, `Rejoin` and `quorumfs.control.goals`, of a
   replica that an administrator took out; and where it is told why one is MISSING or STALE.
"""

from enum import Enum
from typing import NamedTuple, Self


class Row(NamedTuple):
    """The row of a standing; `Standing` has a property for each column, which explains it."""

    member: bool = False
    written: bool = False
    ours: bool = False
    answers: bool = False
    coming: bool = False
    retried: bool = False
    needs_operator: bool = False


class Standing(Enum):
    """The standing of a replica in the set at this moment, with its row."""

    _value_: str
    row: Row

    CURRENT = "current", Row(member=True, written=True, ours=True, answers=True)
    """Holds every acknowledged write."""
    STALE = "stale", Row(ours=True, answers=True, coming=True, retried=True)
    """Known to be behind; not read."""
    RESYNCING = "resyncing", Row(written=True, ours=True, answers=True, coming=True)
    """Stale, and the target of a resync."""
    SUSPECT = "suspect", Row(ours=True, answers=True, coming=True, retried=True)
    """The image changed behind its sidecar, or is unproven: stale until compared in full."""
    MISSING = "missing", Row(retried=True)
    """Does not answer, or is not there."""
    OFFLINE = "offline", Row()
    """Taken out by the administrator: left alone until taken in again, whoever else uses it."""
    FOREIGN = "foreign", Row(needs_operator=True)
    """Not of this set, or without proof of that; never touched."""

    def __new__(cls, word: str, row: Row) -> Self:
        standing = object.__new__(cls)
        standing._value_ = word
        standing.row = row
        return standing

    @property
    def is_member(self) -> bool:
        """Guests and repairs read the replica, and it counts to the threshold. All the others lack
        something, which is tracked. Without sidecars each is read where it lacks nothing."""
        return self.row.member

    @property
    def is_written(self) -> bool:
        """The guest's writes may go to the replica, and the mount's records into its sidecar.
        Without sidecars writes go to every replica."""
        return self.row.written

    @property
    def is_written_only(self) -> bool:
        """The replica gets writes, and their success does not count."""
        return self.is_written and not self.is_member

    @property
    def is_ours(self) -> bool:
        """The files are for this mount to use: once judged so they stay open, until the replica is
        ejected or fails; and, unless the mount is read-only, its claim is in the sidecar. Files of
        any other replica are left as they are, and closed."""
        return self.row.ours

    @property
    def answers(self) -> bool:
        """An error of the replica says something of its data. Else it cannot be asked, and what it
        holds stays unknown for now. To be asked of `Replica.state`."""
        return self.row.answers

    @property
    def is_coming(self) -> bool:
        """The replica, which is open, becomes a member by a resync, and nobody has to do anything.
        A mount counts on it when it asks whether the threshold can be reached."""
        return self.row.coming

    @property
    def is_retried(self) -> bool:
        """The files of the replica are opened anew, ever more rarely, and judged again. `Rejoin`
        does so with a FOREIGN replica, too, that another mount had open."""
        return self.row.retried

    @property
    def needs_operator(self) -> bool:
        """A person must decide what becomes of the replica. The status says so, and the reason is
        not replaced by the error of a later attempt."""
        return self.row.needs_operator
