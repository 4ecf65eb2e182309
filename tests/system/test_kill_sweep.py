"""6: killed at steps that change a file, the set can be mounted again, or says why not.

Each sweep first counts the steps of a run, and then runs it again, killed at another step each
time. What was flushed before must be there, and the replicas become equal.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support import killing, warm
from support.command import is_alive, one_line, wait_until
from support.mounting import make_set, quorumfs
from support.oracle import BLOCK
from support.sets import CHUNK, MIB, SetMount, create, named, opened, same, tmpfs

from quorumfs.control.client import ControlError

SIZE = MIB
ONE = "read-pattern=fifo,vote-threshold=1"
OLD, NEW = (letter * BLOCK for letter in (b"o", b"n"))


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """Where the replicas are: each run syncs much, and waits for nothing but that."""
    with tmpfs(tmp_path / "memory", 1024 * MIB) as memory:
        yield memory


class KilledError(Exception):
    """The step was reached."""


class Run(SetMount):
    """A life of a set, of two, in which quorumfs is killed at one step; 0: at none."""

    def __init__(self, memory: Path, step: int, replicas: int = 2) -> None:
        self.directory = memory / f"run{step}"
        self.directory.mkdir()
        self.step = step
        self.flushed: dict[int, bytes] = {}
        """What must be on the disk from here on, by its offset."""
        super().__init__(named(self.directory, replicas), self.directory, ONE)

    def quorumfs(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, whatever that is."""
        texts = map(str, (self.directory, self.step, *arguments))
        return warm.run(list(texts), timeout_s=120, script=killing.__file__)

    def make(self) -> None:
        """Replicas that are a set, as it was unmounted in order."""
        for path in self.replicas:
            path.touch()
            os.truncate(path, SIZE)
        make_set(self.replicas)

    def arm(self) -> None:
        """Count steps from here on."""
        (self.directory / "armed").touch()

    def disarm(self) -> None:
        """Count no step any more."""
        (self.directory / "armed").unlink(missing_ok=True)

    def mount(self) -> None:
        """Raises `KilledError`."""
        self.mountpoint.mkdir(exist_ok=True)
        done = self.quorumfs("mount", "-o", ONE, *self.replicas, self.mountpoint)
        if done.returncode:
            line = one_line(done, 1)
            # Before it was ready, or at once afterwards.
            assert "killed by SIGKILL" in line or "disk.img cannot be used" in line
            raise KilledError

    def write(self, offset: int, data: bytes) -> None:
        """Write and flush. Raises `KilledError`."""
        try:
            with opened(self.file) as fd:
                os.pwrite(fd, data, offset)
                os.fsync(fd)
        except OSError as error:
            raise KilledError from error
        self.flushed[offset] = data

    def converge(self) -> None:
        """Wait until all replicas are current. Raises `KilledError`."""
        try:
            self.wait_healthy()
        except ControlError as error:
            raise KilledError from error

    def end(self) -> None:
        """Whatever still runs is killed now."""
        with suppress(AssertionError):
            pid = self.pid
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(pid), "the end of a killed daemon")

    def check(self) -> None:
        """The next mount, at the same place, finds all that was flushed, and makes it equal."""
        with self, opened(self.file) as fd:
            for offset, data in self.flushed.items():
                assert os.pread(fd, BLOCK, offset) == data
            self.wait_healthy()
            for offset, data in self.flushed.items():
                assert os.pread(fd, BLOCK, offset) == data
        assert same(self.replicas)


def sweep(
    memory: Path,
    live: Callable[[Run], None],
    check: Callable[[Run], None],
    *,
    every: int = 1,
    replicas: int = 2,
) -> int:
    """*live* with a kill at each of its steps, and a *check* after each; returns how many steps.

    *every*: 2 means every other step, and so on, where there are many that are alike.
    """

    def killed_at(step: int) -> None:
        run = Run(memory, step, replicas)
        with suppress(KilledError):
            live(run)
        run.end()
        try:
            check(run)
        except BaseException as error:
            error.add_note(f"killed at step {step}")
            raise

    counting = Run(memory, 0, replicas)
    live(counting)
    counting.disarm()
    counting.end()
    check(counting)
    steps = len((counting.directory / "steps").read_bytes())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(killed_at, range(1, steps + 1, every)))
    print(steps, "steps")
    return steps


def test_a_life(memory: Path) -> None:
    """Mount, write, flush, unmount."""

    def live(run: Run) -> None:
        run.make()
        run.arm()
        run.mount()
        run.write(0, OLD)
        run.write(CHUNK, NEW)
        quorumfs("umount", run.mountpoint, check=False)

    assert sweep(memory, live, Run.check, every=2) > 20


def test_a_replica_is_ejected(memory: Path) -> None:
    """The first to be read, until the write that it missed is flushed."""

    def live(run: Run) -> None:
        run.make()
        run.mount()
        run.write(0, OLD)
        run.arm()
        os.truncate(run.replicas[0], CHUNK)
        run.write(CHUNK, NEW)
        run.disarm()

    def check(run: Run) -> None:
        os.truncate(run.replicas[0], SIZE)
        run.check()

    assert sweep(memory, live, check) > 6


def test_a_replica_is_caught_up(memory: Path) -> None:
    """The first to be read, which was behind when the set was unmounted."""

    def live(run: Run) -> None:
        run.make()
        run.mount()
        run.write(0, OLD)
        os.truncate(run.replicas[0], CHUNK)
        run.write(CHUNK, NEW)
        quorumfs("umount", run.mountpoint)
        os.truncate(run.replicas[0], SIZE)
        run.arm()
        run.mount()
        run.converge()
        quorumfs("umount", run.mountpoint, check=False)

    assert sweep(memory, live, Run.check, every=3) > 20


def test_a_disk_grows(memory: Path) -> None:
    """What was told, or flushed behind the old end, is there; and the command is given again."""
    larger = 2 * SIZE
    told: set[int] = set()

    def live(run: Run) -> None:
        run.make()
        run.mount()
        run.write(0, OLD)
        run.arm()
        if quorumfs("grow", run.mountpoint, str(larger), check=False).returncode:
            raise KilledError
        told.add(run.step)
        run.write(larger - BLOCK, NEW)
        run.disarm()

    def check(run: Run) -> None:
        with run:
            size = run.file.stat().st_size
            assert size == larger if run.step in told else size in (SIZE, larger)
            quorumfs("grow", run.mountpoint, str(larger))
            assert run.file.stat().st_size == larger
        run.check()
        assert {path.stat().st_size for path in run.replicas} == {larger}

    assert sweep(memory, live, check) > 12


def test_the_threshold_changes(memory: Path) -> None:
    """It is the one or the other, and surely the new one once that was told."""
    told: set[int] = set()

    def live(run: Run) -> None:
        run.make()
        run.mount()
        run.write(0, OLD)
        run.arm()
        if quorumfs("set", run.mountpoint, "vote-threshold=2", check=False).returncode:
            raise KilledError
        told.add(run.step)
        run.write(CHUNK, NEW)
        run.disarm()

    def check(run: Run) -> None:
        quorumfs("mount", *run.replicas, run.mountpoint)
        assert run.status()["vote_threshold"] in ((2,) if run.step in told else (1, 2))
        quorumfs("set", run.mountpoint, "vote-threshold=2")
        quorumfs("umount", run.mountpoint)
        run.check()

    assert sweep(memory, live, check) > 6


def test_copies_of_a_source(memory: Path) -> None:
    """Never is the source taken for one of those to overwrite; the same command goes on."""
    data = os.urandom(SIZE // 2) + bytes(SIZE // 2)

    def live(run: Run) -> None:
        run.replicas[0].write_bytes(data)
        run.arm()
        if run.quorumfs("create", "--source", run.replicas[0], *run.replicas).returncode:
            raise KilledError

    def check(run: Run) -> None:
        run.disarm()
        run.mountpoint.mkdir()
        mounted = quorumfs("mount", "-o", ONE, *run.replicas, run.mountpoint, check=False)
        if not mounted.returncode:
            run.wait_healthy()
            assert run.file.read_bytes() == data
            quorumfs("umount", run.mountpoint)
        assert run.replicas[0].read_bytes() == data
        quorumfs("create", "--if-needed", "--source", run.replicas[0], *run.replicas)
        assert all(path.read_bytes() == data for path in run.replicas)

    assert sweep(memory, live, check, replicas=3) > 6


def test_create(memory: Path) -> None:
    """What is there of a set is mounted, or refused by name; and made again when it is removed."""

    def live(run: Run) -> None:
        run.arm()
        if run.quorumfs("create", "--size", str(SIZE), *run.replicas).returncode:
            raise KilledError

    def check(run: Run) -> None:
        run.mountpoint.mkdir()
        done = quorumfs("mount", *run.replicas, run.mountpoint, check=False)
        if done.returncode:
            assert any(str(path) in done.stderr for path in run.replicas)
            assert done.stderr.count("\n") == 1
            for path in run.directory.glob("*.img*"):
                path.unlink()
            create(run.replicas, SIZE)
            quorumfs("mount", *run.replicas, run.mountpoint)
        quorumfs("umount", run.mountpoint)
        assert [path.read_bytes() for path in run.replicas] == [bytes(SIZE)] * 2

    assert sweep(memory, live, check) > 8


def test_adoption(memory: Path) -> None:
    """Two raw images with data, mounted as they are: the same command, given again, does it."""

    def live(run: Run) -> None:
        for path in run.replicas:
            path.write_bytes(OLD + bytes(SIZE - BLOCK))
        run.flushed[0] = OLD
        run.arm()
        run.mount()
        quorumfs("umount", run.mountpoint, check=False)

    assert sweep(memory, live, Run.check) > 16


# Verbs: killed in the middle, the set mounts, and the verb, given again, ends well


def leaves(run: Run, verb: str) -> None:
    """The last of two replicas leaves, with everything that was flushed."""
    run.make()
    run.mount()
    run.write(0, OLD)
    run.arm()
    done = quorumfs(verb, run.mountpoint, run.replicas[1], check=False)
    run.disarm()
    if done.returncode:
        raise KilledError
    run.write(CHUNK, NEW)


def test_a_replica_goes_offline(memory: Path) -> None:
    """It is current or offline then, and never current by mistake."""

    def check(run: Run) -> None:
        with run, opened(run.file) as fd:
            quorumfs("offline", run.mountpoint, run.replicas[1])
            assert run.states() == ["current", "offline"]
            for offset, data in run.flushed.items():
                assert os.pread(fd, BLOCK, offset) == data
            quorumfs("online", run.mountpoint, run.replicas[1])
            run.wait_healthy()
        assert same(run.replicas)

    assert sweep(memory, lambda run: leaves(run, "offline"), check) > 6


def test_a_replica_comes_online(memory: Path) -> None:
    def live(run: Run) -> None:
        run.make()
        run.mount()
        run.write(0, OLD)
        quorumfs("offline", run.mountpoint, run.replicas[1])
        run.write(CHUNK, NEW)
        run.arm()
        if quorumfs("online", run.mountpoint, run.replicas[1], check=False).returncode:
            raise KilledError
        run.converge()
        run.disarm()

    def check(run: Run) -> None:
        with run:
            quorumfs("online", run.mountpoint, run.replicas[1])
            run.wait_healthy()
        assert same(run.replicas)

    assert sweep(memory, live, check) > 6


def test_a_replica_is_removed(memory: Path) -> None:
    """The other one is the set, then or after the same again; nobody mounts what was removed."""

    def check(run: Run) -> None:
        quorumfs("mount", "-o", ONE, *run.replicas, run.mountpoint)
        quorumfs("remove", run.mountpoint, run.replicas[1])
        quorumfs("umount", run.mountpoint)
        run.replicas = run.replicas[:1]
        run.check()

    assert sweep(memory, lambda run: leaves(run, "remove"), check) > 6


@pytest.mark.parametrize(("replicas", "every"), [(2, 6), (6, 24)], ids=["third", "seventh"])
def test_a_replica_is_added(memory: Path, replicas: int, every: int) -> None:
    """The others are always mounted; what was begun goes on, or is begun anew.

    With the seventh one all sidecars get a wider format.
    """

    def live(run: Run) -> None:
        run.make()
        run.mount()
        run.write(0, OLD)
        run.arm()
        new = run.directory / "new.img"
        if quorumfs("add", "--wait", run.mountpoint, new, check=False).returncode:
            raise KilledError
        run.disarm()
        run.write(CHUNK, NEW)

    def check(run: Run) -> None:
        added = run.directory / "new.img"
        done = quorumfs("mount", "-o", ONE, *run.replicas, run.mountpoint, check=False)
        if done.returncode:  # it became current, and is missed
            assert f"{added} may have later writes" in done.stderr
            run.replicas = [*run.replicas, added]
        else:
            quorumfs("umount", run.mountpoint)
        with run:
            quorumfs("add", "--wait", run.mountpoint, added)
            run.wait_healthy()
        run.replicas = [*run.replicas[:replicas], added]
        run.check()

    assert sweep(memory, live, check, every=every, replicas=replicas) > 20


def test_a_replica_is_replaced(memory: Path) -> None:
    """Never fewer than two hold everything; the same command, given again, ends well."""

    def live(run: Run) -> None:
        run.make()
        run.mount()
        run.write(0, OLD)
        run.arm()
        new = run.directory / "c.img"
        done = quorumfs("replace", run.mountpoint, run.replicas[1], new, check=False)
        if done.returncode:
            raise KilledError
        run.disarm()
        run.write(CHUNK, NEW)

    def check(run: Run) -> None:
        old, new = run.replicas[1], run.directory / "c.img"
        for replicas in (run.replicas, [*run.replicas, new], [run.replicas[0], new]):
            done = quorumfs("mount", "-o", ONE, *replicas, run.mountpoint, check=False)
            if not done.returncode:
                break
        assert quorumfs("status", run.mountpoint, check=False).returncode in (0, 1, 3)
        done = quorumfs("replace", run.mountpoint, old, new, check=False)
        if done.returncode:  # it was current: what was left to do is said
            assert "to go on without" in done.stderr
            quorumfs("remove", run.mountpoint, old)
        quorumfs("umount", run.mountpoint)
        run.replicas = [run.replicas[0], new]
        run.check()

    assert sweep(memory, live, check, every=8) > 20
