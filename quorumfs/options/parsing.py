"""From ``-o`` texts to `MountOptions`, and what options refuse together."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from quorumfs.errors import UsageError
from quorumfs.options.table import OPTIONS, MountOptions, Option
from quorumfs.options.values import RefusedError


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
        other = "ro" if options.read_only else "metadata=none"
        raise UsageError(
            f"option scrub-every: got {other} too, allowed: one of them, because nothing would "
            "remember when the last scrub ended"
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
