"""The program that is run for each event."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest
from support.command import wait_until
from support.mounting import quorumfs
from support.sets import MIB, SetMount, create, named, opened

from quorumfs.control import hook as hook_module
from quorumfs.control.hook import QUEUED_MAX, Hook
from quorumfs.disk.events import Event

EXAMPLE = Path(__file__).parents[2] / "examples" / "on-event.sh"


def program(directory: Path, text: str) -> Path:
    path = directory / "program"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def told(event: Event) -> logging.LogRecord:
    record = logging.LogRecord("quorumfs.events", event.level, "", 0, event.text, (), None)
    record.event = event
    return record


def test_it_learns_what_happened(tmp_path: Path) -> None:
    """Event, mount point and replica as arguments, as mdadm does it; all of it as JSON."""
    images, calls = create(named(tmp_path, 3), MIB), tmp_path / "calls"
    path = program(tmp_path, f'{{ echo "$*"; cat; echo; }} >> {calls}')
    with SetMount(images, tmp_path, f"vote-threshold=2,on-event={path}") as disk:
        os.truncate(images[1], 0)
        with opened(disk.file, os.O_RDWR) as fd:
            os.pwrite(fd, bytes(4096), 0)
        changed = f"REPLICA_STATE_CHANGED {disk.mountpoint} {images[1]}"
        wait_until(lambda: calls.exists() and changed in calls.read_text(), "the call")
        quorumfs("set", disk.mountpoint, "on-event=none")
        assert "on-event=none" in disk.status()["options"]
    lines = calls.read_text().splitlines()
    event = json.loads(lines[lines.index(changed) + 1])
    assert (event["event"], event["replica"]) == ("REPLICA_STATE_CHANGED", str(images[1]))


@pytest.mark.parametrize("text", ["program", "/no/such/program", "/etc/passwd", ""])
def test_what_cannot_be_run_is_refused(tmp_path: Path, text: str) -> None:
    images, mountpoint = create(named(tmp_path, 2), MIB), tmp_path / "mnt"
    mountpoint.mkdir()
    done = quorumfs("mount", "-o", f"on-event={text}", *images, mountpoint, check=False)
    assert done.returncode == 4
    assert f"option on-event: got {text!r}, allowed: the absolute path of a program" in done.stderr


def test_a_program_that_hangs_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed with what it began; events that found no room are counted."""
    monkeypatch.setattr(hook_module, "PATIENCE_S", 0.3)
    started = tmp_path / "started"
    path = program(tmp_path, f'[ "$1" = FIRST ] || exit 3\nsleep 600 & echo $! > {started}; wait')
    hook = Hook("/mnt", str(path))
    hook.emit(told(Event("FIRST", {}, "first")))
    wait_until(lambda: started.exists() and started.read_text(), "the first run")
    for _ in range(QUEUED_MAX + 5):
        hook.emit(told(Event("NEXT", {"replica": "/a.img"}, "next")))
    wait_until(lambda: "exit code 3" in caplog.text, "the next run")
    hook.close()
    assert "did not end in 0.3 s: killed" in caplog.text
    assert "5 events left out" in caplog.text
    assert not Path(f"/proc/{started.read_text().strip()}/cwd").exists()


def test_a_program_that_is_killed_is_run_for_the_next_event(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever the signal: one of those for real time has no name."""
    hook = Hook("/mnt", str(program(tmp_path, "kill -40 $$")))
    for _ in range(2):
        hook.emit(told(Event("ANY", {}, "any")))
    wait_until(lambda: caplog.text.count("for ANY: killed by signal 40") == 2, "both runs")
    hook.close()


def test_the_example_mails_what_matters(tmp_path: Path) -> None:
    mail = tmp_path / "mail"
    mail.write_text(f'#!/bin/sh\n{{ echo "$*"; cat; }} > {tmp_path / "sent"}\n')
    mail.chmod(mail.stat().st_mode | stat.S_IXUSR)
    hook = Hook("/mnt/vdisk", str(EXAMPLE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        hook.emit(told(Event("RESYNC_STARTED", {"replica": "/a.img"}, "started")))
        hook.emit(told(Event("FENCED", {"host": "other"}, "fenced")))
        wait_until((tmp_path / "sent").exists, "the mail")
        hook.close()
    assert (tmp_path / "sent").read_text().startswith("-s quorumfs: FENCED: /mnt/vdisk root\n")
