"""From `MountOptions` back to ``-o`` texts, and where the options of two mounts differ."""

from collections.abc import Sequence
from dataclasses import fields

from quorumfs.options.table import MountOptions, option_of_field


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


def differing_fields(one: MountOptions, other: MountOptions) -> list[str]:
    """The fields of `MountOptions` in which two mounts differ."""
    names = [field.name for field in fields(MountOptions) if field.name != "vote_threshold_given"]
    return [name for name in names if getattr(one, name) != getattr(other, name)]
