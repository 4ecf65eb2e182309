"""What a user calls a replica: its path, else its file name, else its id. Pure."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

from quorumfs.errors import UsageError


class HasPath(Protocol):
    """Anything with the path of a replica."""

    @property
    def path(self) -> str: ...


T = TypeVar("T", bound=HasPath)


def only(name: str, *kinds: Sequence[T]) -> T | None:
    """The one of the first kind of matches of *name* that has any; None if none has.

    Raises `UsageError` if it has several.
    """
    matches = next(filter(None, kinds), ())
    if len(matches) > 1:
        paths = ", ".join(one.path for one in matches)
        raise UsageError(f"{name} may be each of {paths}: give the whole path")
    return matches[0] if matches else None
