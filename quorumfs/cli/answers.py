"""What mounts answer when they are asked for their status."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quorumfs.control import schema
from quorumfs.control.status import SCHEMA, Status, worst
from quorumfs.errors import ExitCode

if TYPE_CHECKING:
    from quorumfs.control.client import ControlError


@dataclass(frozen=True, slots=True)
class Answer:
    """What one mount point said, or why it said nothing."""

    mountpoint: str
    """Absolute; as the kernel knows it, if it does."""
    status: Status | None
    error: "ControlError | None" = None
    owner: int | None = None
    """Whose mount it is, by the kernel's table; None: it has none there."""

    @property
    def exit_code(self) -> ExitCode:
        if self.status is not None:
            return self.status.state.exit_code
        assert self.error is not None
        return self.error.exit_code

    @property
    def claimed_by(self) -> str | None:
        """Whose daemon says so, if that is another user's."""
        from quorumfs.control import client  # noqa: PLC0415 (not needed for --help)

        if self.owner is None or self.owner == os.geteuid():
            return None
        return client.user_name(self.owner)

    def to_json(self) -> dict[str, Any]:
        """The status, or an object with state null and the reason."""
        if self.status is not None:
            return {**self.status.to_json(), "owner": self.owner}
        assert self.error is not None
        return {
            "schema": SCHEMA,
            "mountpoint": self.mountpoint,
            "state": None,
            "problem": self.error.problem,
            "error": str(self.error),
            "owner": self.owner,
        }


def json_schema() -> dict[str, Any]:
    """The JSON Schema of what `Answer.to_json` gives."""
    answered = schema.json_schema(Status)
    head = {"schema": {"const": SCHEMA}, "owner": schema.json_schema(int | None)}
    answered["properties"] |= head
    answered["required"] += head
    texts = {name: {"type": "string"} for name in ("mountpoint", "problem", "error")}
    unanswered = {**head, **texts, "state": {"type": "null"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "One mount, as quorumfs status --json shows it",
        "anyOf": [
            answered,
            {"type": "object", "properties": unanswered, "required": list(unanswered)},
        ],
    }


@dataclass(frozen=True, slots=True)
class View:
    """What there is to show at one moment."""

    answers: Sequence[Answer]
    unasked: int = 0
    """Mounts of other users, who alone may ask them."""
    nothing: str = "no quorumfs mounts"
    """What to say if there are no answers."""

    @property
    def exit_code(self) -> ExitCode:
        return worst(answer.exit_code for answer in self.answers)

    @property
    def remarks(self) -> list[str]:
        """What to say below the answers, or instead."""
        others = f"{self.unasked} of other users not shown"
        return [*([] if self.answers else [self.nothing]), *([others] if self.unasked else [])]

    def unhealthy(self) -> "View":
        """The same without what is healthy."""
        shown = [answer for answer in self.answers if answer.exit_code is not ExitCode.OK]
        return View(shown, self.unasked, "all mounts are healthy" if self.answers else self.nothing)


def ask_all(mountpoints: Sequence[str], runtime_dir: Path | None = None) -> View:
    """Ask these mounts, or all that this user may ask, side by side."""
    from quorumfs.control import client, mounts  # noqa: PLC0415 (not needed for --help)

    unasked = 0
    places: list[mounts.Mount | Answer] = []
    if mountpoints:
        for mountpoint in mountpoints:
            try:
                places.append(client.find(mountpoint))
            except client.ControlError as error:
                places.append(Answer(os.path.abspath(mountpoint), None, error))
    else:
        visible = mounts.of_quorumfs()
        places += [mount for mount in visible if os.geteuid() in (0, mount.owner)]
        unasked = len(visible) - len(places)
    asked = [place for place in places if not isinstance(place, Answer)]
    told = iter(client.statuses(asked, runtime_dir=runtime_dir))

    def answer(mount: mounts.Mount) -> Answer:
        said = next(told)
        if isinstance(said, client.ControlError):
            return Answer(mount.mountpoint, None, said, mount.owner)
        return Answer(mount.mountpoint, said, owner=mount.owner)

    answers = [place if isinstance(place, Answer) else answer(place) for place in places]
    return View(answers, unasked)
