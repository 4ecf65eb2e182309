"""The daemon's log in a history: it goes to the trace, and an error in it breaks a promise."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from support.simulation.oracle import BrokenError
from support.simulation.world import World


class ErrorLog(logging.Handler):
    """What the daemon logs goes to the trace; an error is remembered."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        self.found: list[str] = []
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        self._world.note(f"log {record.levelname}: {text}")
        if record.levelno >= logging.ERROR:
            self.found.append(text)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """All that quorumfs logs meanwhile comes here, and goes nowhere else."""
        logger = logging.getLogger("quorumfs")
        level, propagate = logger.level, logger.propagate
        logger.addHandler(self)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)
            logger.propagate = propagate

    def require_none(self) -> None:
        """Raise if an error was logged."""
        if self.found:
            raise BrokenError(f"logged an error: {self.found[0]}")
