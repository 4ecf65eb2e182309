"""The log that nobody asked for: in the runtime directory, where there is no journal nor syslog."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from quorumfs.control import journald, logs


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where it is; afterwards logging is what it was."""
    monkeypatch.setattr(logs, "SYSLOG_SOCKET", str(tmp_path / "none"))
    monkeypatch.setattr(journald, "SOCKET", str(tmp_path / "none"))
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    yield tmp_path / "mount.log"
    root.handlers[:] = before
    root.setLevel(level)


def mount(path: Path, *records: tuple[int, str]) -> None:
    """The life of a mount that logs these records."""
    destination = logs.destination(None, detached=True, fallback=path, fields={})
    listener = logs.start(destination, as_json=False)
    for level, text in records:
        logging.getLogger("quorumfs.test").log(level, text)
    listener.stop()


def test_a_mount_without_trouble_leaves_no_log(path: Path) -> None:
    mount(path, (logging.INFO, "mounted"), (logging.INFO, "unmounted"))
    assert not path.exists()


def test_a_refused_mount_leaves_no_log(path: Path) -> None:
    mount(path)
    assert not path.exists()


@pytest.mark.parametrize("level", [logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_trouble_is_kept_also_when_a_later_mount_has_none(path: Path, level: int) -> None:
    mount(path, (logging.INFO, "mounted"), (level, "trouble"), (logging.INFO, "unmounted"))
    assert "trouble" in path.read_text()
    mount(path, (logging.INFO, "mounted again"), (logging.INFO, "unmounted"))
    assert "trouble" in path.read_text()


def test_what_a_killed_daemon_logged_is_kept(path: Path) -> None:
    path.write_text("mounted\n")
    mount(path, (logging.INFO, "mounted again"), (logging.INFO, "unmounted"))
    assert path.read_text().startswith("mounted\n")


def test_it_is_bounded_and_the_latest_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is in memory."""
    monkeypatch.setattr(logs, "RUNTIME_LOG_MAX", 1000)
    for number in range(100):
        mount(path, (logging.WARNING, f"trouble {number} {'x' * 100}"))
    files = list(path.parent.glob("mount.log*"))
    assert sum(file.stat().st_size for file in files) <= 2000
    assert "trouble 99 " in path.read_text()
