"""Going to the background: when the daemon parts with who started it."""

import os
from collections.abc import Callable
from pathlib import Path

from quorumfs.mount.daemon import run_detached


def test_the_daemon_leaves_the_process_group_when_it_is_ready(tmp_path: Path) -> None:
    """An automounter (systemd's, autofs) lets its own group alone through the mount point until
    what it started has mounted something there, and ended."""
    groups = tmp_path / "groups"

    def serve(ready: Callable[[], None]) -> None:
        before = os.getpgrp()
        ready()
        groups.write_text(f"{before} {os.getpgrp()} {os.getpid()}")  # to who reads the FIFO

    os.mkfifo(groups)
    run_detached(serve)
    before, after, pid = map(int, groups.read_text().split())
    assert before == os.getpgrp()
    assert after == pid
    os.waitpid(pid, 0)
