"""What every test may use, and what every test must leave behind: nothing."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from support.command import empty_mountpoint, mounted_below, require_root

settings.register_profile("patient", deadline=None)  # a busy machine is no failure
settings.load_profile("patient")

# A shell has its jobs in the background ignore Ctrl-C, and so would every command that is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["support.tiers"]

MakeImages = Callable[..., list[Path]]


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """Makes replica files: ``make_images(2)`` gives ``[a.img, b.img]``, equal and all zeros."""

    def make(count: int, size: int = 1 << 20, directory: Path = tmp_path) -> list[Path]:
        paths = [directory / f"{letter}.img" for letter in "abcdefgh"[:count]]
        for path in paths:
            with path.open("wb") as file:
                file.truncate(size)
        return paths

    return make


@pytest.fixture
def mountpoint(tmp_path: Path) -> Iterator[Path]:
    """An empty directory for a mount that the test makes by itself."""
    with empty_mountpoint(tmp_path / "mnt") as path:
        yield path


@pytest.fixture(autouse=True)
def _root(request: pytest.FixtureRequest) -> None:
    """Fails a system test at once, with the reason, where mounting cannot work."""
    if request.path.parent.name == "system":
        require_root()


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """Fails a test that leaves a mount or a loop device on its own directory."""
    yield
    left = mounted_below(tmp_path)
    loops = subprocess.run(["losetup", "-a"], capture_output=True, check=True).stdout
    left += [line for line in os.fsdecode(loops).split("\n") if str(tmp_path) in line]
    assert not left, f"left behind: {left}"
