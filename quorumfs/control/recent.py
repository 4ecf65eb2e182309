"""The last events of a mount: what its daemon answers, and the commands understand.

Events are numbered from 1 on. Whoever asks names the last number that he knows; what the daemon
remembers no more is told as a count.
"""

from dataclasses import dataclass
from typing import Annotated

from quorumfs.control import schema

Line = Annotated[str, schema.Text(1 << 20)]


@dataclass(frozen=True, slots=True)
class Told:
    """One event, as the log has it."""

    number: int
    json: Line
    """One JSON object, on one line."""
    text: Line
    """The same for a reader."""

    @property
    def size(self) -> int:
        """Bytes, about."""
        return len(self.json) + len(self.text)


@dataclass(frozen=True, slots=True)
class Recent:
    """An answer: what happened since the number that was asked about."""

    pid: int
    """Of the daemon; numbers of another one mean nothing here."""
    last: int
    """The number to ask about next."""
    forgotten: int = 0
    """How many events after the number asked about, and before these, are remembered no more."""
    events: tuple[Told, ...] = ()
