"""The mount options: from ``-o`` texts to one frozen dataclass, and every message about a bad one.

An option is a row in one table: its name, its help and its parser stand together, so that the
help cannot drift from what is accepted.
"""

import grp
import os
import pwd
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from quorumfs.decisions.dirtymap import CHUNK_MIN, EXTENT
from quorumfs.decisions.replicaio import ASKED
from quorumfs.errors import UsageError


@dataclass(frozen=True, slots=True)
class MountOptions:
    """What the user asked of a mount; every combination that exists is possible."""

    read_pattern: str
    vote_threshold: int
    vote_threshold_given: bool = False
    """Else it is a majority of the replicas given, or what a set was last used with."""
    metadata: str = "sidecar"
    sidecars: str | None = None
    """The directory for sidecars of block devices; None: there are none."""
    degraded: bool = False
    takeover: bool = False
    chunk_size: int | None = None
    """Bytes; None: by the size of the disk."""
    resync_rate: int | None = None
    """Bytes a second; None: no limit."""
    scrub_every_s: float | None = None
    """How long after a scrub the next one begins by itself; None: none does."""
    on_event: str | None = None
    """The path of a program that is run for each event; None: none."""
    rewrite_corrupted: bool = False
    blkverify: bool = False
    read_only: bool = False
    write_mostly: tuple[str, ...] = ()
    """Names of replicas that are read only where no other can answer: paths, or file names."""
    replica_timeout_s: float = 8.0
    write_ack: str = "all"
    """``all``, or ``threshold``: writes and flushes wait for those that lag `behind_max_s`."""
    behind_max_s: float = 0.1
    replica_io: str = "buffered"
    """One of `quorumfs.decisions.replicaio.ASKED`."""
    sync: bool = False
    detect_zeroes: str = "off"
    fast_path: bool = True
    max_background: int = 64
    uid: int = field(default_factory=os.geteuid)
    gid: int = field(default_factory=os.getegid)
    mode: int = 0o600
    fsname: str | None = None
    kernel_flags: frozenset[str] = frozenset()
    """Options that go to the kernel or libfuse as they are."""

    @property
    def patience_with_laggards_s(self) -> float | None:
        """How much longer (seconds) than on others that suffice a write may take on a replica;
        None: until the timeout."""
        return self.behind_max_s if self.write_ack == "threshold" else None


class RefusedError(Exception):
    """A parser's way to say what is allowed."""


def _replicas(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(":"))
    if not all(names):
        raise RefusedError("replicas by path or file name, with a colon between them, or none")
    return names


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise RefusedError(" or ".join(allowed))
        return text

    return parse


def _switch(text: str) -> bool:
    values = {"": True, "on": True, "true": True, "off": False, "false": False}
    if text not in values:
        raise RefusedError("on or off")
    return values[text]


def _program(text: str) -> str | None:
    if text == "none":
        return None
    if not os.path.isabs(text) or not os.path.isfile(text) or not os.access(text, os.X_OK):
        raise RefusedError("the absolute path of a program that may be run, or none")
    return text


def directory(text: str) -> str | None:
    """The directory for sidecars of devices in *text*. Raises `RefusedError`."""
    if text == "none":
        return None
    if not os.path.isabs(text):
        raise RefusedError("the absolute path of a directory, or none")
    return os.path.normpath(text)


def _flag(text: str) -> bool:
    if text:
        raise RefusedError("the option alone, without a value")
    return True


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < 1:
        raise RefusedError("a whole number from 1")
    return int(text)


def _background(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise RefusedError("a whole number from 1 to 65535")
    return int(text)


def _duration(text: str) -> float:
    seconds = _seconds(text)
    if not 0.1 <= seconds <= 3600:
        raise RefusedError("a time from 100ms to 60m, like 8s")
    return seconds


def _short_duration(text: str) -> float:
    seconds = _seconds(text)
    if not 0.001 <= seconds <= 60:
        raise RefusedError("a time from 1ms to 60s, like 100ms")
    return seconds


def _seconds(text: str) -> float:
    """A time in *text*; 0 if there is none."""
    match = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)(ms|s|m|)", text)
    return float(match[1]) * {"ms": 0.001, "s": 1, "": 1, "m": 60}[match[2]] if match else 0.0


def _interval(text: str) -> float | None:
    if text == "off":
        return None
    match = re.fullmatch(r"([0-9]{1,5})([dhm])", text)
    seconds = int(match[1]) * {"d": 86400, "h": 3600, "m": 60}[match[2]] if match else 0
    if not 60 <= seconds <= 3650 * 86400:
        raise RefusedError("a time from 1m to 3650d with d, h or m, like 30d, or off")
    return float(seconds)


def _rate(text: str) -> int | None:
    try:
        return None if text == "none" else parse_size(text)
    except RefusedError as refused:
        raise RefusedError(f"none, or {refused}") from None


def parse_size(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.upper())
    if not match or not int(match[1]):
        raise RefusedError("a number of bytes from 1, with K, M, G or T for powers of 1024")
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[match[2]]


def _chunk_size(text: str) -> int:
    size = parse_size(text)
    if size & (size - 1) or not CHUNK_MIN <= size <= EXTENT:
        raise RefusedError("a power of two from 64K to 4M")
    return size


def _mode(text: str) -> int:
    if not re.fullmatch(r"0?[0-7]{3}", text):
        raise RefusedError("an octal mode from 000 to 777, like 0660")
    return int(text, 8)


def _uid(text: str) -> int:
    return _id(text, lambda name: pwd.getpwnam(name).pw_uid, "a user's name or number")


def _gid(text: str) -> int:
    return _id(text, lambda name: grp.getgrnam(name).gr_gid, "a group's name or number")


def _id(text: str, look_up: Callable[[str], int], allowed: str) -> int:
    if re.fullmatch(r"[0-9]{1,10}", text) and int(text) < 2**32 - 1:
        return int(text)
    try:
        return look_up(text)
    except (KeyError, ValueError):
        raise RefusedError(allowed) from None


def _name(text: str) -> str:
    if not re.fullmatch(r"[\x21-\x5b\x5d-\x7e]{1,200}", text):  # libfuse drops a backslash
        raise RefusedError("1 to 200 printable ASCII characters, no space, no backslash")
    return text


@dataclass(frozen=True, slots=True)
class Option:
    """One row of the table."""

    name: str
    value: str
    """What the help shows after the ``=``; empty for a flag."""
    parse: Callable[[str], Any]
    field: str
    """The `MountOptions` field it sets; ``kernel_flags`` collects names."""
    help: str


def _kernel(name: str, text: str) -> Option:
    return Option(name, "", _flag, "kernel_flags", text)


OPTIONS: Mapping[str, Option] = {
    option.name: option
    for option in [
        Option(
            "read-pattern",
            "quorum|fifo|latency",
            _choice("quorum", "fifo", "latency"),
            "read_pattern",
            "quorum: read all replicas and vote (default); fifo: read the first that answers, "
            "in the order given; latency: read the one that lately answered fastest",
        ),
        Option(
            "vote-threshold",
            "N",
            _count,
            "vote_threshold",
            "replicas that must agree on a read, and succeed in a write or flush "
            "(default: a majority)",
        ),
        Option(
            "rewrite-corrupted",
            "on|off",
            _switch,
            "rewrite_corrupted",
            "rewrite what a strict majority outvoted or a replica could not read",
        ),
        Option(
            "blkverify",
            "on|off",
            _switch,
            "blkverify",
            "two replicas, threshold 2: any difference is an error, and is logged",
        ),
        Option(
            "write-mostly",
            "REPLICA[:REPLICA]",
            _replicas,
            "write_mostly",
            "read these, by path or file name, only where no other replica can answer: for far "
            "ones",
        ),
        Option(
            "metadata",
            "sidecar|none",
            _choice("sidecar", "none"),
            "metadata",
            "sidecar: remember in REPLICA.quorumfs which replicas are current; resync the others "
            "(default); none: what a replica missed is remembered until unmount",
        ),
        Option(
            "sidecars",
            "DIR",
            directory,
            "sidecars",
            "where the sidecars of replicas that are block devices lie, which have no room beside "
            "them: a directory that lasts, and that each host that mounts the set sees",
        ),
        Option(
            "degraded",
            "",
            _flag,
            "degraded",
            "mount although a missing replica may hold later writes",
        ),
        Option(
            "takeover",
            "",
            _flag,
            "takeover",
            "mount although another host has the set open: for a host that is down; if it is not, "
            "its mount stops within 8 s",
        ),
        Option(
            "chunk-size",
            "SIZE",
            _chunk_size,
            "chunk_size",
            "unit in which a new set remembers what differs, from 64K to 4M (default: by the size "
            "of the disk)",
        ),
        Option(
            "resync-rate",
            "SIZE",
            _rate,
            "resync_rate",
            "bytes a second that a resync copies at most, like 100M (default: none; it "
            "yields to the guest in any case)",
        ),
        Option(
            "scrub-every",
            "TIME",
            _interval,
            "scrub_every_s",
            "begin a scrub when the last one ended so long ago, like 30d (default: off); with "
            "rewrite-corrupted it repairs",
        ),
        Option(
            "on-event",
            "PROGRAM",
            _program,
            "on_event",
            "run PROGRAM EVENT MOUNTPOINT [REPLICA] for each event, which it can read as JSON, one "
            "after the other (default: none)",
        ),
        Option(
            "replica-timeout",
            "TIME",
            _duration,
            "replica_timeout_s",
            "how long to wait for a replica that others can stand in for; twice as long for one "
            "that none can, four times for a flush (default: 8s)",
        ),
        Option(
            "write-ack",
            "all|threshold",
            _choice("all", "threshold"),
            "write_ack",
            "all: a write or flush waits for every current replica (default); threshold: once "
            "vote-threshold of them have done it, it waits behind-max for the others; who takes "
            "longer is ejected, and caught up later",
        ),
        Option(
            "behind-max",
            "TIME",
            _short_duration,
            "behind_max_s",
            "with write-ack=threshold: how much longer than the others a replica may take for a "
            "write, and four times as long for a flush (default: 100ms)",
        ),
        Option(
            "replica-io",
            "|".join(ASKED),
            _choice(*ASKED),
            "replica_io",
            "buffered: through this host's page cache (default); direct: past it, with O_DIRECT; "
            "auto: direct where the store is fast, or elsewhere",
        ),
        Option("sync", "", _flag, "sync", "every write is durable when it returns"),
        Option(
            "detect-zeroes",
            "off|on|unmap",
            _choice("off", "on", "unmap"),
            "detect_zeroes",
            "make an aligned write of zeros a request for zeros, with unmap a hole (default: off)",
        ),
        Option(
            "fast-path",
            "on|off",
            _switch,
            "fast_path",
            "have C serve the requests that need no decision, on this host's own file systems "
            "(default: on)",
        ),
        Option(
            "max-background",
            "N",
            _background,
            "max_background",
            "asynchronous requests that the kernel sends at a time (default: 64)",
        ),
        Option("ro", "", _flag, "read_only", "write nothing anywhere"),
        Option("rw", "", _flag, "", "read and write (default)"),
        Option("uid", "USER", _uid, "uid", "owner of disk.img (default: who mounts)"),
        Option("gid", "GROUP", _gid, "gid", "group of disk.img (default: who mounts)"),
        Option("mode", "OCTAL", _mode, "mode", "mode of disk.img (default: 0600)"),
        Option(
            "fsname", "NAME", _name, "fsname", "source that findmnt shows (default: the replicas)"
        ),
        _kernel("allow_other", "let other users in, as far as uid, gid and mode do"),
        _kernel("allow_root", "let root in"),
        _kernel("default_permissions", "let the kernel check permissions (always on)"),
        *(
            _kernel(name, "as in mount(8)")
            for name in ("atime", "noatime", "dev", "nodev", "exec", "noexec", "suid", "nosuid")
        ),
    ]
}


def parse_options(texts: Sequence[str], replicas: int) -> MountOptions:
    """The options in *texts* (each a comma-separated list, as given to one ``-o``).

    *replicas* is their number, which some options depend on. Of an option given twice the last
    one counts, as with mount(8). Raises `UsageError` naming the option, what was given and what
    is allowed.
    """
    defaults = {"read_pattern": "quorum", "vote_threshold": replicas // 2 + 1}
    return _parse(texts, replicas, defaults, frozenset())


def is_option(item: str) -> bool:
    """Whether the option *item*, which may have a value, is one of ours."""
    return _spelled(item.partition("=")[0]) is not None


def changed_options(present: MountOptions, texts: Sequence[str], replicas: int) -> MountOptions:
    """What *texts* make of the options *present* of a mount, as `parse_options`."""
    values = {one.name: getattr(present, one.name) for one in fields(MountOptions)}
    kernel_flags = values.pop("kernel_flags")
    return _parse(texts, replicas, values, kernel_flags)


def differing_fields(one: MountOptions, other: MountOptions) -> list[str]:
    """The fields of `MountOptions` in which two mounts differ."""
    names = [field.name for field in fields(MountOptions) if field.name != "vote_threshold_given"]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def option_of_field(name: str) -> str:
    """The option, or the options, that set the field *name*."""
    return ", ".join(option.name for option in OPTIONS.values() if option.field == name)


def write_mostly(paths: Sequence[str], options: MountOptions) -> frozenset[str]:
    """Those of the replicas at *paths* that are marked write-mostly. Raises `UsageError`."""
    meant = set()
    for name in options.write_mostly:
        found = [path for path in paths if path == name]
        found = found or [path for path in paths if os.path.basename(path) == name]
        if len(found) != 1:
            what = "may be several replicas" if found else "is no replica of this mount"
            raise UsageError(f"option write-mostly: {name} {what}; there are: {', '.join(paths)}")
        meant.add(found[0])
    if meant and meant.issuperset(paths):
        raise UsageError("option write-mostly: got every replica, allowed: all but one at most")
    return frozenset(meant)


def option_text(options: MountOptions, name: str) -> str:
    """The field *name*, which one option with a value sets, as ``-o`` takes it."""
    value = getattr(options, name)
    match name, value:
        case (("replica_timeout_s" | "behind_max_s"), _):
            text = f"{value:g}s"
        case "scrub_every_s", None:
            text = "off"
        case "scrub_every_s", _:
            units = {"d": 86400, "h": 3600, "m": 60}
            unit = next(unit for unit, seconds in units.items() if not value % seconds)
            text = f"{value / units[unit]:.0f}{unit}"
        case "write_mostly", _:
            text = ":".join(value) or "none"
        case _, None:
            text = "none"
        case _, bool():
            text = "on" if value else "off"
        case _:
            text = str(value)
    return f"{option_of_field(name)}={text}"


_ONCE = {"vote_threshold_given", "degraded", "takeover", "chunk_size"}
"""Fields that count only while a mount begins."""


def option_texts(options: MountOptions) -> tuple[str, ...]:
    """All that is in force of *options*, each as ``-o`` takes it.

    A flag that is not set is left out, and so is what only counts while a mount begins.
    """
    texts = []
    for one in fields(MountOptions):
        value = getattr(options, one.name)
        if one.name in _ONCE or (value is None and one.name == "fsname"):
            continue
        if one.name == "kernel_flags":
            texts += sorted(value - {"default_permissions"})  # always on
        elif one.name == "read_only":
            texts += ["ro"] if value else []
        elif one.name == "sync":
            texts += ["sync"] if value else []
        elif one.name == "mode":
            texts.append(f"mode={value:04o}")
        else:
            texts.append(option_text(options, one.name))
    return tuple(texts)


def option_differences(
    present: Sequence[str], wanted: Sequence[str], *, ignored: Sequence[str] = ()
) -> list[str]:
    """Where options *present* are not those *wanted*, both as of `option_texts`, in words.

    The option names in *ignored* may have any value.
    """
    have, want = ({text.partition("=")[0]: text for text in texts} for texts in (present, wanted))
    names = [name for name in {**want, **have} if name not in ignored]
    return [
        f"{have.get(name, f'no {name}')} instead of {want.get(name, f'no {name}')}"
        for name in names
        if have.get(name) != want.get(name)
    ]


def _parse(
    texts: Sequence[str], replicas: int, values: Mapping[str, Any], flags: frozenset[str]
) -> MountOptions:
    """*texts* on top of *values* and the kernel's *flags*. Raises `UsageError`."""
    values, kernel_flags = dict(values), set(flags)
    for item in (item for text in texts for item in text.split(",") if item):
        given, _, value = item.partition("=")
        option = _find(given)
        try:
            parsed = option.parse(value)
        except RefusedError as refused:
            raise UsageError(f"option {option.name}: got {value!r}, allowed: {refused}") from None
        if option.field == "kernel_flags":
            opposite = option.name[2:] if option.name.startswith("no") else f"no{option.name}"
            kernel_flags.discard(opposite)
            kernel_flags.add(option.name)
        elif option.name == "rw":
            values["read_only"] = False
        elif option.name == "vote-threshold":
            values |= {"vote_threshold": parsed, "vote_threshold_given": True}
        elif option.field:
            values[option.field] = parsed
    options = MountOptions(**values, kernel_flags=frozenset(kernel_flags))
    _check_together(options, replicas)
    return options


def _check_together(options: MountOptions, replicas: int) -> None:
    """Refuse what each option alone allows but the whole does not."""
    if options.vote_threshold > replicas:
        raise UsageError(
            f"option vote-threshold: got {options.vote_threshold}, "
            f"allowed: 1 to {replicas}, the number of replicas"
        )
    if options.blkverify:
        if options.read_pattern != "quorum":
            raise UsageError(
                f"option blkverify: got read-pattern={options.read_pattern}, allowed: "
                "read-pattern=quorum, because it compares what all replicas answer"
            )
        if options.write_mostly:
            raise UsageError(
                "option blkverify: got write-mostly too, allowed: one of them, because it compares "
                "what all replicas answer"
            )
        if replicas != 2 or options.vote_threshold != 2:
            raise UsageError(
                f"option blkverify: got {replicas} replicas and vote-threshold="
                f"{options.vote_threshold}, allowed: 2 replicas and vote-threshold=2"
            )
        if options.rewrite_corrupted:
            raise UsageError(
                "option blkverify: got rewrite-corrupted too, allowed: one of them, because a "
                "difference between two has no winner to rewrite from"
            )
    for name, given in {
        "degraded": options.degraded,
        "takeover": options.takeover,
        "resync-rate": options.resync_rate,
        "chunk-size": options.chunk_size,
    }.items():
        if given and options.metadata == "none":
            raise UsageError(
                f"option {name}: got metadata=none too, allowed: one of them, because without "
                "metadata nothing tells who is behind, or who has the set open"
            )
    if options.read_pattern == "latency" and options.metadata == "none":
        raise UsageError(
            "option read-pattern: got latency and metadata=none, allowed: quorum or fifo, because "
            "nothing tells where replicas differ, and reads would turn back"
        )
    if options.rewrite_corrupted and options.read_only:
        raise UsageError(
            "option rewrite-corrupted: got ro too, allowed: one of them, because ro writes nothing"
        )
    if options.detect_zeroes != "off" and options.read_only:
        raise UsageError("option detect-zeroes: got ro too, allowed: one of them")
    if options.sync and options.read_only:
        raise UsageError("option sync: got ro too, allowed: one of them")
    if options.rewrite_corrupted and replicas == 1:
        raise UsageError(
            "option rewrite-corrupted: got 1 replica, allowed: 2 or more, because a replica is "
            "rewritten from the others"
        )
    for name in ("dev", "suid"):
        if name in options.kernel_flags and os.geteuid() != 0:
            raise UsageError(
                f"option {name}: got it from an ordinary user, allowed: root alone; a user's mount "
                f"is no{name}"
            )
    if options.scrub_every_s is not None and (options.read_only or options.metadata == "none"):
        raise UsageError(
            "option scrub-every: got it with ro or metadata=none, allowed: a set with sidecars "
            "that is mounted for writing, which remembers when it was scrubbed"
        )
    if {"allow_other", "allow_root"} <= options.kernel_flags:
        raise UsageError("option allow_root: got allow_other too, allowed: one of them")


def _find(given: str) -> Option:
    """The option meant by *given*. Raises `UsageError`."""
    option = _spelled(given)
    if option is None:
        from difflib import get_close_matches  # noqa: PLC0415 (no daemon needs it)

        close = get_close_matches(given, OPTIONS, 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(f"unknown option {given!r}{hint}; there are: {', '.join(OPTIONS)}")
    return option


def _spelled(given: str) -> Option | None:
    """The option meant by *given*, if any; hyphen and underscore are the same."""
    spelled = {name.replace("_", "-"): option for name, option in OPTIONS.items()}
    return spelled.get(given.replace("_", "-"))


def option_rows() -> list[tuple[str, str]]:
    """The table for help and manual: each option as it is given, and what it does."""
    return [
        (f"{option.name}{'=' + option.value if option.value else ''}", option.help)
        for option in OPTIONS.values()
    ]
