"""The benchmark command, for real: tiny runs, as only their being there is of interest."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from support.command import mounted_below

BENCHMARK = [sys.executable, str(Path(__file__).parents[1] / "benchmark")]
SMALL = ("--size-mib", "2", "--seconds", "0.1")


def benchmark(*arguments: str | Path) -> str:
    """Run it to its end, and give what it printed."""
    done = subprocess.run(
        [*BENCHMARK, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_matrix_runs_everybody_in_turn_and_is_told_saved_and_drawn(tmp_path: Path) -> None:
    place = tmp_path / "replicas"
    place.mkdir()
    saved, drawn = tmp_path / "runs.json", tmp_path / "speed.svg"
    rows = ("--rows", "4k randrw qd16", "1M read qd4", "--rounds", "2")
    told = benchmark("matrix", *rows, *SMALL, "--directory", place, "--json", saved, "--svg", drawn)
    runs = json.loads(saved.read_text())["runs"]
    entrants = {"fifo over 2": ["peer", "ours", "raw", "null"], "vote over 3": ["peer", "ours"]}
    for family, names in entrants.items():
        back = names[::-1]
        of_family = [run["contender"] for run in runs if run["family"] == family]
        assert of_family == [*names, *back, *back, *names]
    assert all(run["iops"] > 0 and run["peak_bytes"] > 0 for run in runs)
    assert told.count("4k randrw qd16") == 2
    assert ElementTree.fromstring(drawn.read_text()).tag.endswith("svg")
    assert not list(place.iterdir())


def test_another_qemu_takes_part_by_its_path(tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text('#!/bin/sh\nexec qemu-storage-daemon "$@"\n')
    program.chmod(0o755)
    row = ("--rows", "4k randrw qd16", "--rounds", "1")
    told = benchmark(
        "matrix", *row, *SMALL, "--directory", tmp_path, "--contenders", "peer", f"next={program}"
    )
    assert told.count("next/peer") == 2


def test_a_replacement_is_felt(tmp_path: Path) -> None:
    small = ("--size-mib", "64", "--seconds", "0.5", "--rounds", "1", "--limit", "1M")
    told = benchmark("replace", *small, "--directory", tmp_path)
    assert "p99" in told
    assert not mounted_below(tmp_path)


def test_a_profile_names_what_the_daemon_does(tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    row = ("4k randrw qd16", "--seconds", "1", "--size-mib", "2")
    told = benchmark("profile", *row, "--directory", tmp_path, "--folded", samples)
    assert "main thread" in told
    stacks = [line.rpartition(" ") for line in samples.read_text().splitlines()]
    assert sum(int(count) for *_, count in stacks) > 0
    assert all("quorumfs.mount.life.serve" in stack for stack, *_ in stacks)


def test_interrupted_it_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "replicas"
    place.mkdir()
    where = ("--size-mib", "2", "--directory", str(place))
    command = [*BENCHMARK, "matrix", "--seconds", "60", *where]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        said = b""
        while b"round 1" not in said:  # then everybody is mounted
            more = os.read(process.stderr.fileno(), 1000)
            assert more, said
            said += more
        assert mounted_below(place)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert not list(place.iterdir())
    assert not mounted_below(place)
    assert not commands_with(str(place))


def commands_with(text: str) -> list[str]:
    """The command lines of processes in which *text* occurs."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            commands.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [command for command in commands if text in command]
