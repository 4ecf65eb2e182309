"""What each command tells of itself, beside its options: the source of ``--help`` and manual."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import click

from quorumfs.errors import ExitCode

COMPLETION = "_QUORUMFS_COMPLETE"
"""The variable by which a shell asks for completions; click names it after the command."""

Rows = Sequence[tuple[str, str]]
"""Pairs of a term and what it means."""

EXIT_STATUS: Mapping[int, str] = {
    ExitCode.OK: "Done; status: all that is shown is healthy.",
    ExitCode.FAILED: "It failed or was refused, and standard error says why; status: degraded.",
    ExitCode.UNUSABLE: "The disk is unusable: too few replicas are current, the daemon is gone or "
    "does not answer, or no sidecar can be read.",
    ExitCode.NEEDS_OPERATOR: "A person must decide: split brain, or replicas that differ.",
    ExitCode.USAGE: "The command line is wrong (an unknown or impossible option), or what it names "
    "is not mounted.",
    ExitCode.WOULD_CHANGE: "With --check: the command would change something.",
    ExitCode.INTERRUPTED: "The command was interrupted.",
}
"""What each exit code means in general."""

_ALWAYS: Mapping[int, str] = {
    ExitCode.OK: "Done.",
    ExitCode.FAILED: "It failed or was refused, and standard error says why.",
    ExitCode.USAGE: EXIT_STATUS[ExitCode.USAGE],
    ExitCode.INTERRUPTED: EXIT_STATUS[ExitCode.INTERRUPTED],
}

OF_A_MOUNT: Mapping[int, str] = {
    ExitCode.UNUSABLE: "The daemon is gone, or does not answer.",
}
"""What is to be added for a command that asks a daemon."""

IF_NEEDED: Mapping[int, str] = {
    ExitCode.OK: "Done; with --if-needed: or there was nothing to do.",
    ExitCode.WOULD_CHANGE: EXIT_STATUS[ExitCode.WOULD_CHANGE],
}
"""What is to be added for a command with ``--if-needed`` and ``--check``."""


class Verb(click.Command):
    """A command with examples and exit codes."""

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401 (whatever click gives its own class)
        examples: Rows,
        exits: Mapping[int, str] | None = None,
        tables: Mapping[str, Rows] | None = None,
        see: Sequence[str] = (),
        **attributes: Any,  # noqa: ANN401
    ) -> None:
        """*examples*: commands, and what they are for. *exits*: exit codes beyond those of all
        commands, or with another meaning. *tables*: more to look up, by heading. *see*: other
        commands that a reader may look for.
        """
        super().__init__(*arguments, **attributes)
        self.examples = examples
        self.exit_status = dict(sorted({**_ALWAYS, **(exits or {})}.items()))
        self.tables = tables or {}
        self.see = see

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show what comes after the options."""
        for heading, rows in self.tables.items():
            with formatter.section(heading):
                _write_rows(formatter, rows)
        with formatter.section("Exit status"):
            formatter.write_dl([(str(int(code)), text) for code, text in self.exit_status.items()])
        with formatter.section("Examples"):
            _write_rows(formatter, self.examples)


class _Imported(Mapping[str, click.Command]):
    """Commands by name, each imported when it is looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """*places*: as for `Verbs`."""
        self._places = places

    def __getitem__(self, name: str) -> click.Command:
        module, _, attribute = self._places[name].rpartition(".")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class ReaderGoneError(Exception):
    """Whoever read standard output has seen enough. click makes an exit of a `BrokenPipeError`."""


@contextmanager
def _told_to_readers() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise ReaderGoneError from None


class Verbs(click.Group):
    """All commands, with the exit codes that they have in common.

    A command is imported when it is asked for.
    """

    def __init__(
        self,
        *arguments: Any,  # noqa: ANN401
        places: Mapping[str, str],
        **attributes: Any,  # noqa: ANN401
    ) -> None:
        """*places*: by the name of a command, its module and what the module calls it, with dots
        between."""
        super().__init__(*arguments, **attributes)
        self.commands = cast("MutableMapping[str, click.Command]", _Imported(places))

    def make_context(self, *arguments: Any, **attributes: Any) -> click.Context:  # noqa: ANN401
        with _told_to_readers():
            return super().make_context(*arguments, **attributes)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401
        with _told_to_readers():
            return super().invoke(ctx)

    def shown(self) -> list[click.Command]:
        """The commands that help shows."""
        return [command for command in self.commands.values() if not command.hidden]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Show what comes after the commands."""
        with formatter.section("Exit status"):
            formatter.write_dl([(str(int(code)), text) for code, text in EXIT_STATUS.items()])
        formatter.write_paragraph()
        formatter.write_text("quorumfs COMMAND --help tells of the options, with examples.")


def _write_rows(formatter: click.HelpFormatter, rows: Rows) -> None:
    """Each term on a line of its own, as it is, for it may be copied; below it what it means."""
    for term, text in rows:
        formatter.write(f"{'':{formatter.current_indent}}{term}\n")
        formatter.indent()
        formatter.indent()
        formatter.write_text(text)
        formatter.dedent()
        formatter.dedent()
