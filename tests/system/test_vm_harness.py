"""The VM harness itself, on a plain file: what it reports about a guest can be relied on."""

import subprocess
from pathlib import Path

import pytest
from support import vm

MIB = 1024 * 1024


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A sparse raw disk of 256 MiB."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(256 * MIB)
    return path


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory for all boots, so that the initramfs is built once."""
    return tmp_path_factory.mktemp("vm")


def running_with(disk: Path) -> list[str]:
    """Return the command lines of the processes that were given `disk`."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(disk) in line:
            lines.append(line)
    return lines


def test_guest_data_reaches_the_disk_file(disk: Path, workdir: Path) -> None:
    """The example script succeeds, and the host finds the guest's files on a clean ext4."""
    result = vm.boot(disk, vm.EXT4_SCRIPT, workdir)
    print(f"ext4 guest: {result.seconds:.1f} s")
    assert result.exit_status == 0, result.console

    check = subprocess.run(
        ["/usr/sbin/e2fsck", "-fn", str(disk)], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout + check.stderr
    big = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "cat /big", str(disk)], capture_output=True, check=True
    ).stdout
    lines = "".join(f"{n}\n" for n in range(1, 20_001)).encode()
    assert big == (lines * 200)[:20_000_000]


def test_failing_script_is_reported(disk: Path, workdir: Path) -> None:
    """A script stops at its first failing command; its status and its output come back."""
    script = "fstrim --version; blkdiscard --version; echo before; (exit 7); echo after"
    result = vm.boot(disk, script, workdir)
    print(f"failing guest: {result.seconds:.1f} s")
    assert result.exit_status == 7, result.console
    lines = result.console.splitlines()
    assert "before" in lines
    assert "after" not in lines
    # The real tools, not busybox's.
    assert result.console.count("util-linux") == 2


def test_late_guest_is_killed(disk: Path, workdir: Path) -> None:
    """A guest that is not done in time is killed, and nothing of it is left but the cache."""
    with pytest.raises(vm.VmTimeoutError) as error:
        vm.boot(disk, "echo started; sleep 1000", workdir, timeout_s=30)
    assert "started" in error.value.console
    assert running_with(disk) == []
    assert [path.name.split("-")[0] for path in workdir.iterdir()] == ["initramfs"]
