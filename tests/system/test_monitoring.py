"""What monitoring sees of mounts: metrics for Prometheus, and a check for Nagios and its kin."""

import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.command import quorumfs_in_background
from support.mounting import quorumfs
from support.sets import MIB, SetMount, create, opened

SIZE = 8 * MIB


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SetMount]:
    images = create([tmp_path / "a.img", tmp_path / "b.img"], SIZE, "--vote-threshold=1")
    with SetMount(images, tmp_path) as mounted:
        yield mounted


def sample(text: str, name: str, **labels: str) -> float:
    """The value of the one sample that has these labels, and perhaps others."""
    (value,) = [
        one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
        if one.name == name and labels.items() <= one.labels.items()
    ]
    return value


def write(disk: SetMount) -> None:
    with opened(disk.file) as fd:
        os.pwrite(fd, b"x" * MIB, 0)
        os.fsync(fd)


def test_metrics_tell_what_the_status_does(disk: SetMount) -> None:
    write(disk)
    mountpoint, first = str(disk.mountpoint), str(disk.replicas[0])
    text = quorumfs("metrics", disk.mountpoint).stdout
    assert sample(text, "quorumfs_up", mountpoint=mountpoint) == 1
    assert sample(text, "quorumfs_size_bytes", mountpoint=mountpoint) == SIZE
    assert sample(text, "quorumfs_state", state="healthy") == 1
    assert sample(text, "quorumfs_state", state="degraded") == 0
    assert sample(text, "quorumfs_replica_written_bytes_total", replica=first) == MIB
    quorumfs("offline", disk.mountpoint, "b.img")
    text = quorumfs("metrics", disk.mountpoint).stdout
    assert sample(text, "quorumfs_state", state="degraded") == 1
    assert sample(text, "quorumfs_replica_state", replica=first, state="current") == 1
    second = str(disk.replicas[1])
    assert sample(text, "quorumfs_replica_state", replica=second, state="offline") == 1


def test_a_histogram_counts_every_request_of_a_replica(disk: SetMount) -> None:
    """Those that the fast path served included: the same place, written to again and again."""
    with opened(disk.file) as fd:
        for _ in range(100):
            os.pwrite(fd, b"x" * 4096, 0)
        os.fsync(fd)
    text = quorumfs("metrics", disk.mountpoint).stdout
    name = "quorumfs_replica_request_duration_seconds"
    for replica in map(str, disk.replicas):
        for operation in ("read", "write", "flush"):
            ending = "es" if operation == "flush" else "s"
            asked = sample(text, f"quorumfs_replica_{operation}{ending}_total", replica=replica)
            within = {"replica": replica, "operation": operation}
            assert sample(text, f"{name}_count", **within) == asked
            assert sample(text, f"{name}_bucket", le="+Inf", **within) == asked
            assert (sample(text, f"{name}_sum", **within) > 0) is (asked > 0)
        assert sample(text, "quorumfs_replica_writes_total", replica=replica) >= 100


def test_a_mount_that_is_dead_is_not_up(disk: SetMount) -> None:
    os.kill(disk.pid, signal.SIGKILL)
    text = quorumfs("metrics", disk.mountpoint).stdout
    assert sample(text, "quorumfs_up", mountpoint=str(disk.mountpoint)) == 0
    assert "quorumfs_size_bytes{" not in text
    subprocess.run(["umount", "-l", disk.mountpoint], check=True)


def test_a_text_file_is_for_node_exporter(disk: SetMount, tmp_path: Path) -> None:
    directory = tmp_path / "textfile"
    directory.mkdir()
    assert quorumfs("metrics", "--textfile", directory, disk.mountpoint).stdout == ""
    (file,) = directory.iterdir()
    assert file.name == "quorumfs.prom"
    assert file.stat().st_mode & 0o777 == 0o644, "node_exporter is somebody else"
    assert sample((directory / "quorumfs.prom").read_text(), "quorumfs_up") == 1


def test_a_scrape_is_answered_until_ctrl_c(disk: SetMount) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with quorumfs_in_background("metrics", "--listen", port, disk.mountpoint) as serving:
        assert serving.stdout is not None
        url = serving.stdout.readline().split()[-1]
        assert url == f"http://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert sample(answer.read().decode(), "quorumfs_up") == 1
        taken = quorumfs("metrics", "--listen", port, check=False)
        assert (taken.returncode, "cannot listen" in taken.stderr) == (1, True)
        serving.send_signal(signal.SIGINT)
        assert serving.wait(30) == 0


@pytest.mark.parametrize("address", ["x", "0", "70000", "localhost:"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    done = quorumfs("metrics", "--listen", address, check=False)
    assert done.returncode == 4
    assert "--listen" in done.stderr


def test_a_check_has_the_exit_codes_of_a_plugin(disk: SetMount, tmp_path: Path) -> None:
    healthy = quorumfs("check", disk.mountpoint)
    assert healthy.stdout.startswith("QUORUMFS OK: 1 healthy | '")
    assert healthy.stdout.count("\n") == 1
    quorumfs("offline", disk.mountpoint, "b.img")
    degraded = quorumfs("check", disk.mountpoint, check=False)
    assert degraded.returncode == 1
    first, *rest = degraded.stdout.splitlines()
    assert first.startswith(f"QUORUMFS WARNING: {disk.mountpoint} is degraded | ")
    assert f"'{disk.mountpoint} current'=1;" in first
    assert "quorumfs online" in rest[0]
    absent = quorumfs("check", disk.mountpoint, tmp_path / "none", check=False)
    assert absent.returncode == 2
    assert absent.stdout.startswith("QUORUMFS CRITICAL: ")
