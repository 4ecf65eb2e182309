"""A status in words, and as plain text for pipes and files: stable, no colours, no wrapping."""

from collections.abc import Iterable

from quorumfs.cli.answers import Answer
from quorumfs.cli.output import printable
from quorumfs.control.advice import describe
from quorumfs.control.human import human_bytes, human_time
from quorumfs.control.status import LastScrub, ReplicaStatus, ResyncStatus, ScrubStatus, Status
from quorumfs.decisions.replicaio import Way

COLUMNS = (
    ("replica", "left", True),
    ("state", "left", True),
    ("reads", "right", True),
    ("writes", "right", True),
    ("flushes", "right", True),
    ("read", "right", False),
    ("written", "right", False),
    ("copied", "right", False),
    ("in flight", "right", False),
    ("errors", "right", True),
    ("out of sync", "right", True),
)
"""Of the replicas: heading, side, and whether a narrow terminal shows it too."""


def warning_of_stranger(user: str) -> str:
    """What to think of the rest, where it comes from another user's daemon."""
    return f"a mount of {printable(user)}, whose daemon says all of this, and could say anything:"


def headline(status: Status) -> str:
    """The facts of the set in one line."""
    facts = [
        human_bytes(status.size),
        f"{status.read_pattern}, vote-threshold {status.vote_threshold}",
        *(["read-only"] if status.read_only else []),
        *(["resync paused"] if status.resync_paused else []),
        *_past_the_cache(status),
        f"pid {status.pid}",
    ]
    if status.set_id is not None:
        facts += [f"set {status.set_id}", f"generation {status.generation}"]
    else:
        facts.append(f"metadata={status.metadata}")
    return ", ".join(facts)


def _past_the_cache(status: Status) -> list[str]:
    """Which replicas are read and written with O_DIRECT, if any."""
    known = [replica for replica in status.replicas if replica.io is not None]
    direct = [replica for replica in known if replica.io == Way.DIRECT.value]
    if len(direct) == len(known):
        return ["direct I/O"] if direct else []
    names = (printable(replica.path) for replica in direct)
    return [f"direct I/O of {' and '.join(names)}"] if direct else []


def state_word(status: Status) -> str:
    """The state of a disk, for a reader."""
    return f"{status.state.value} (fenced)" if status.fenced else status.state.value


def replica_row(replica: ReplicaStatus) -> tuple[str, ...]:
    """The cells of one replica, as `COLUMNS`."""
    return (
        printable(replica.path),
        replica.state,
        str(replica.reads),
        str(replica.writes),
        str(replica.flushes),
        human_bytes(replica.bytes_read),
        human_bytes(replica.bytes_written),
        human_bytes(replica.copied_bytes),
        str(replica.in_flight),
        str(replica.errors.total),
        human_bytes(replica.out_of_sync_bytes),
    )


def counts_line(replica: ReplicaStatus) -> str:
    """What one replica did, where there is no room for a table."""
    return (
        f"{replica.reads} reads, {replica.writes} writes, {replica.flushes} flushes, "
        f"{replica.errors.total} errors, {human_bytes(replica.out_of_sync_bytes)} out of sync"
    )


def errors_line(replica: ReplicaStatus) -> str | None:
    """Which errors one replica had; None if it had none."""
    counts = {
        "read": replica.errors.read,
        "write": replica.errors.write,
        "flush": replica.errors.flush,
        "mismatch": replica.errors.mismatch,
        "timeout": replica.errors.timeout,
    }
    if not replica.errors.total:
        return None
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    if (last := replica.last_error) is not None:
        told += f"; {last.what} {human_time(last.seconds_ago)} ago: {last.text}"
    return f"{printable(replica.path)}: {printable(told)}"


def resync_line(resync: ResyncStatus) -> str:
    """How far a resync is."""
    percent = 100 * resync.done_bytes // resync.total_bytes if resync.total_bytes else 100
    left = "unknown time" if resync.eta_s is None else human_time(resync.eta_s)
    which = f" of {printable(resync.replica)}" if resync.replica else ""
    return (
        f"{resync.kind.value}{which}: {percent} %, {human_bytes(resync.done_bytes)} of "
        f"{human_bytes(resync.total_bytes)}, {human_bytes(resync.rate_bytes_per_s)}/s, {left} left"
    )


def scrub_line(scrub: ScrubStatus) -> str:
    """How far a scrub is, and what it has found."""
    percent = 100 * scrub.done_bytes // scrub.total_bytes if scrub.total_bytes else 100
    left = "unknown time" if scrub.eta_s is None else human_time(scrub.eta_s)
    pace = f"{human_bytes(scrub.rate_bytes_per_s)}/s, {left} left"
    if scrub.paused:
        pace = "paused"
    elif scrub.waits:
        pace = f"it waits: {printable(scrub.waits)}"
    return (
        f"scrub: {percent} %, {human_bytes(scrub.done_bytes)} of "
        f"{human_bytes(scrub.total_bytes)}, {pace}; {found_by(scrub)}"
    )


def last_scrub_line(last: LastScrub) -> str:
    """What the last scrub found."""
    end = "was stopped" if last.stopped else "ended"
    ended = f"{end} {printable(last.ended)} after {human_time(last.seconds)}"
    return f"last scrub {ended}: {found_by(last)}"


def found_by(scrub: ScrubStatus | LastScrub) -> str:
    """What a scrub found, in blocks."""
    counts = {
        "mismatches": scrub.mismatches,
        "unreadable": scrub.unreadable,
        "repaired": scrub.repaired,
        "undecided": scrub.undecided,
        "left as they were": scrub.unrepaired,
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return told or "0 mismatches"


def scrub_lines(status: Status) -> list[str]:
    """All there is to say of scrubs."""
    lines = [] if status.scrub is None else [scrub_line(status.scrub)]
    if status.last_scrub is not None:
        lines.append(last_scrub_line(status.last_scrub))
    if status.next_scrub is not None:
        lines.append(f"next scrub: {printable(status.next_scrub)}")
    return lines


def plain(answer: Answer) -> str:
    """One mount as text of several lines."""
    status, place = answer.status, printable(answer.mountpoint)
    if status is None:
        assert answer.error is not None
        return f"{place}: {answer.error.problem}\n  {printable(str(answer.error))}\n"
    lines = [f"{place}: {state_word(status)}"]
    if (user := answer.claimed_by) is not None:
        lines.append(f"  {warning_of_stranger(user)}")
    lines.append(f"  {headline(status)}")
    lines += [f"  action: {printable(line)}" for line in describe(status)]
    lines += [f"  under way: {printable(line)}" for line in status.actions]
    lines += [f"  note: {printable(note)}" for note in status.notes]
    if status.resync is not None:
        lines.append(f"  {resync_line(status.resync)}")
    lines += [f"  {line}" for line in scrub_lines(status)]
    lines += [f"  {line}" for line in table(map(replica_row, status.replicas))]
    lines += [f"  errors of {line}" for line in map(errors_line, status.replicas) if line]
    return "\n".join(lines) + "\n"


def table(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """The replicas' rows below their headings, in columns as wide as they must be."""
    cells = [tuple(name.upper() for name, *_ in COLUMNS), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if side == "left" else cell.rjust(width)
            for cell, width, (_, side, _) in zip(row, widths, COLUMNS, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return lines
