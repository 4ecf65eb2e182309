"""Errors that a person can mend, and the exit codes that scripts rely on."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What ``quorumfs`` exits with; one table for every command."""

    OK = 0
    FAILED = 1
    UNUSABLE = 2
    NEEDS_OPERATOR = 3
    USAGE = 4
    WOULD_CHANGE = 5
    """With ``--check``: the command would change something, and be able to."""
    INTERRUPTED = 130  # as a shell reports a command that Ctrl-C ended


class UserError(Exception):
    """Refused or failed for a reason that the message names; shown as one line, no traceback."""

    exit_code = ExitCode.FAILED

    def __init__(self, text: str, *, exit_code: ExitCode | None = None) -> None:
        """*exit_code*: None: that of the class."""
        super().__init__(text)
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(UserError):
    """The command line or an option cannot be meant like this."""

    exit_code = ExitCode.USAGE
