"""Dataclasses as JSON: one description of both, which is the annotations of the fields.

From them come the object that a dataclass becomes, every check of an object before it becomes one,
and the JSON Schema that tells others the same. What is read may have been written by anybody.

A field is an ``int`` (a whole number from 0, or as `Whole` says), a ``str`` (`Text`), a ``bool``,
an `Enum` of texts, another dataclass, ``tuple[T, ...]``, ``Mapping[str, Any]`` (of plain values),
or one of these or None. One without a default must be there; keys that are unknown are left out.

Pure: no I/O.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

LIST_MAX = 1024
"""Members of a list."""

PLAIN_MAX = 64
"""Members of an object of plain values."""

T = TypeVar("T")

Hint: TypeAlias = Any
"""An annotation, for which Python has no type."""
Value: TypeAlias = Any
"""What JSON can be of, or a field of such a dataclass."""


class FormatError(ValueError):
    """The value is not what the schema says; the message tells where and why."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number within these limits, both included."""

    minimum: int = 0
    maximum: int = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Text:
    """A text of at most so many characters that matches *pattern* as a whole, if there is one."""

    longest: int = 16384
    pattern: str | None = None


def key(name: str) -> Mapping[str, str]:
    """The ``metadata`` of a dataclass's field that has another *name* in JSON."""
    return {"key": name}


def dump(value: object) -> Value:
    """What `json.dumps` takes, of a dataclass or a value of its fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {_key(field): dump(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [dump(member) for member in value]
    return dict(value) if isinstance(value, Mapping) else value


def load(kind: type[T], content: object) -> T:
    """The dataclass *kind* that *content*, as `json.loads` gives it, describes.

    Raises `FormatError`.
    """
    loaded: T = _load(kind, content, "")
    return loaded


def json_schema(hint: Hint) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a dataclass, or of another annotation."""
    hint, limits = _taken_apart(hint)
    if (inner := _optional(hint)) is not None:
        return {"anyOf": [json_schema(inner), {"type": "null"}]}
    if isinstance(limits, Whole):
        return {"type": "integer", "minimum": limits.minimum, "maximum": limits.maximum}
    if isinstance(limits, Text):
        pattern = {} if limits.pattern is None else {"pattern": f"^(?:{limits.pattern})$"}
        return {"type": "string", "maxLength": limits.longest, **pattern}
    if hint is bool:
        return {"type": "boolean"}
    if _origin(hint) is tuple:
        member = json_schema(get_args(hint)[0])
        return {"type": "array", "items": member, "maxItems": LIST_MAX}
    if _origin(hint) is Mapping:
        plain = [json_schema(kind) for kind in (int, str, bool)]
        values = {"anyOf": [*plain, {"type": "null"}]}
        return {"type": "object", "maxProperties": PLAIN_MAX, "additionalProperties": values}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    hints = _hints(hint)
    return {
        "type": "object",
        "properties": {_key(field): json_schema(hints[field.name]) for field in fields(hint)},
        "required": [_key(field) for field in fields(hint) if _is_required(field)],
    }


def _load(hint: Hint, content: object, where: str) -> Value:
    hint, limits = _taken_apart(hint)
    if (inner := _optional(hint)) is not None:
        return None if content is None else _load(inner, content, where)
    if isinstance(limits, Whole):
        return _whole(limits, content, where)
    if isinstance(limits, Text):
        return _text(limits, content, where)
    if hint is bool:
        return _of(bool, content, "true or false", where)
    if _origin(hint) is tuple:
        members = _of(list, content, "a list", where)
        _at_most(LIST_MAX, len(members), "members", where)
        kind = get_args(hint)[0]
        return tuple(_load(kind, member, f"{where}[{i}]") for i, member in enumerate(members))
    if _origin(hint) is Mapping:
        return _plain(content, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        names = {member.value: member for member in hint}
        if not isinstance(content, str) or content not in names:
            raise FormatError(f"{where} is not one of {', '.join(names)}")
        return names[content]
    return _object(hint, content, where)


def _object(kind: Hint, content: object, where: str) -> Value:
    given = _of(dict, content, "an object", where)
    hints, values = _hints(kind), {}
    for field in fields(kind):
        name = _key(field)
        if name in given:
            inside = f"{where}.{name}" if where else name
            values[field.name] = _load(hints[field.name], given[name], inside)
        elif _is_required(field):
            raise FormatError(f"{where or 'the object'} has no {name!r}")
    return kind(**values)


def _whole(limits: Whole, content: object, where: str) -> int:
    if not isinstance(content, int) or isinstance(content, bool):
        raise FormatError(f"{where} is not a whole number")
    if not limits.minimum <= content <= limits.maximum:
        raise FormatError(f"{where} is not from {limits.minimum} to {limits.maximum}")
    return content


def _text(limits: Text, content: object, where: str) -> str:
    text = _of(str, content, "a text", where)
    _at_most(limits.longest, len(text), "characters", where)
    if limits.pattern is not None and not re.fullmatch(limits.pattern, text):
        raise FormatError(f"{where} does not match {limits.pattern}")
    return text


def _plain(content: object, where: str) -> dict[str, Any]:
    values = _of(dict, content, "an object", where)
    _at_most(PLAIN_MAX, len(values), "members", where)
    for value in values.values():
        if isinstance(value, str):
            _text(Text(), value, f"a value in {where}")
        elif value is not None and not isinstance(value, bool):
            _whole(Whole(), value, f"a value in {where}")
    return values


def _of(kind: type[T], content: object, words: str, where: str) -> T:
    if not isinstance(content, kind):
        raise FormatError(f"{where or 'the whole'} is not {words}")
    return content


def _at_most(limit: int, count: int, words: str, where: str) -> None:
    if count > limit:
        raise FormatError(f"{where} has more than {limit} {words}")


def _taken_apart(hint: Hint) -> tuple[Hint, Whole | Text | None]:
    """The type in an annotation, and the limits for its values."""
    if _origin(hint) is Annotated:
        kind, limits = get_args(hint)
        assert isinstance(limits, Whole | Text)
        return kind, limits
    if hint is int:
        return hint, Whole()
    return hint, Text() if hint is str else None


def _optional(hint: Hint) -> Hint:
    """X of ``X | None``; None for anything else."""
    if _origin(hint) not in (Union, UnionType):
        return None
    (inner,) = (member for member in get_args(hint) if member is not NoneType)
    return inner


def _origin(hint: Hint) -> Hint:
    return get_origin(hint)


@cache
def _hints(kind: Hint) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _key(field: "Field[Any]") -> str:
    name: str = field.metadata.get("key", field.name)
    return name


def _is_required(field: "Field[Any]") -> bool:
    return field.default is MISSING and field.default_factory is MISSING
