"""Other programs: run to their end, and devices that they make."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.command import wait_until


def run(*command: str | Path, directory: Path | None = None) -> str:
    """What *command* prints; a failure fails the test with all it said."""
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=directory, timeout=600
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def loop_device(file: Path, *options: str) -> Iterator[Path]:
    """A loop device over *file*, detached and gone at the end."""
    device = Path(run("losetup", "--find", "--show", *options, file).strip())
    attached = Path("/sys/block", device.name, "loop")
    try:
        yield device
    finally:
        run("losetup", "--detach", device)
        # Its last user may let go a little later.
        wait_until(lambda: not attached.exists(), f"{device} is detached")
