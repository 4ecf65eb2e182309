"""One store, one outage: what the guest saw, and what became of the set."""

import filecmp
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from stores.guest import CHUNK, Guest
from stores.kinds import REPLICA_TIMEOUT_S, Store, copy_served, mounts
from stores.network import SERVER, Network, client_processes, network, run, wait_until
from stores.outages import NEEDS_RELAY, OUTAGES, ROLLS_BACK, Scene, last
from stores.relay import Relay, relay
from stores.sets import SIZE, MountedSet, Watch

_AREA = 8 << 20
_CALM_S = 4.0
_MARKED_S = 65.0
"""What was written to longer ago has no mark any more, and is compared for other reasons alone."""
_HEALTHY_AFTER_S = 300.0
"""A replica that failed again and again is tried once a minute; then it is compared, which takes
minutes where the machine is emulated."""


@dataclass(frozen=True, slots=True)
class Case:
    """An outage of a set with some options more than those that are recommended for the store."""

    outage: str
    more_options: str
    patience_s: float
    """How long a request waits for a replica that does not answer; a flush four times as long."""


CASES = {outage: Case(outage, "", REPLICA_TIMEOUT_S) for outage in OUTAGES} | {
    f"{outage}, write-ack": Case(outage, ",write-ack=threshold,behind-max=500ms", 0.5)
    for outage in ("stopped", "unplugged")
}


class TrialError(Exception):
    """What was wrong, a line for each."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an outage cost."""

    longest: dict[str, float]
    healthy_after_s: float
    copied_bytes: int
    states: list[str]


@dataclass(frozen=True)
class Bench:
    """A store that is served and mounted, and a set that can be mounted on it."""

    network: Network
    store: Store
    relay: Relay | None
    set: MountedSet
    directory: Path

    @property
    def address(self) -> tuple[str, int]:
        """Where the client finds the server."""
        return ("127.0.0.1", self.relay.port) if self.relay else (SERVER, self.store.port)


@contextmanager
def bench(kind: type[Store], *, relayed: bool) -> Iterator[Bench]:
    """Make all of it; nothing of it is left, whatever happens.

    Raises `TrialError` if something is left that should have ended by itself.
    """
    directory = Path(tempfile.mkdtemp(prefix="stores-", dir="/var/tmp"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        joined = stack.enter_context(network())
        store = kind(joined, directory)
        passes = stack.enter_context(relay((SERVER, store.port))) if relayed else None
        made = Bench(joined, store, passes, MountedSet(directory, store.image), directory)
        store.prepare(SIZE)
        stack.callback(store.clear)
        stack.callback(store.abandon)
        stack.callback(made.set.abandon)
        store.serve()
        store.mount(*made.address)
        made.set.create()
        store.settle()
        yield made
        _require_nothing_left(made)


def attempt(kind: type[Store], case: Case, slack_s: float) -> Outcome:
    """*slack_s*: how much longer (seconds) than promised a request may take.

    Raises `TrialError` if a promise was broken.
    """
    with bench(kind, relayed=case.outage in NEEDS_RELAY) as made:
        try:
            return _attempt(made, case, slack_s)
        except (RuntimeError, TrialError) as error:
            said = made.store.what_went_wrong()
            log = made.set.log.read_text().splitlines()[-40:] if made.set.log.exists() else []
            raise TrialError("\n".join([str(error), said, *log])) from error


def _attempt(made: Bench, case: Case, slack_s: float) -> Outcome:
    made.set.mount(made.store.options + case.more_options)
    made.set.wait_until_healthy(_HEALTHY_AFTER_S)
    guest = Guest(made.set.disk, SIZE, _AREA)
    watch = Watch(made.set)
    try:
        began = time.monotonic()
        guest.start()
        time.sleep(_CALM_S)
        snapshot = made.directory / "snapshot"
        if case.outage in ROLLS_BACK:
            _take_snapshot(made, snapshot)
        guest.write_once(2 * _AREA, _AREA // 2)
        time.sleep(_MARKED_S if case.outage in ROLLS_BACK else _CALM_S)
        made.set.wait_until_healthy(_HEALTHY_AFTER_S)  # the snapshot may have taken too long
        guest.forget_stalls()
        copied_before = _copied(made.set)

        scene = Scene(made.network, made.store, made.relay, snapshot)
        ended = last(OUTAGES[case.outage](scene))
        if case.outage in made.store.remount_after:
            made.store.remount(*made.address)
        made.set.wait_until_healthy(_HEALTHY_AFTER_S)
        healthy_after_s = time.monotonic() - ended
        time.sleep(_CALM_S)

        guest.stop(timeout_s=60)
        watch.stop()
        if not guest.faults:
            guest.check_all()
        made.set.wait_until_healthy(_HEALTHY_AFTER_S)
        copied = _copied(made.set) - copied_before
    finally:
        watch.stop()
        guest.close()
    made.set.unmount()
    made.store.settle()
    made.store.unmount()

    faults = [*guest.faults[:5], *watch.faults[:3]]
    # While a flush waits the kernel keeps writes to the same file waiting.
    limits = {
        "read": case.patience_s,
        "write": 4 * case.patience_s,
        "flush": 4 * case.patience_s,
    }
    faults += [
        f"a {kind} took {took:.1f} s, and {limits[kind]:g} s are promised"
        for kind, took in guest.longest.items()
        if took > limits[kind] + slack_s
    ]
    if not all(guest.counts.values()):
        faults.append(f"the guest did not do everything: {guest.counts}")
    if not filecmp.cmp(made.set.near, made.store.served / "b.img", shallow=False):
        faults.append("the images differ")
    # What is written to while it is copied is copied again.
    if copied > 2 * CHUNK * guest.chunks_written_since(began):
        faults.append(f"{copied >> 10} KiB were copied, more than was written to since")
    if faults:
        raise TrialError("\n".join(faults))
    return Outcome(guest.longest, healthy_after_s, copied, watch.states)


def _take_snapshot(made: Bench, target: Path) -> None:
    """Copy the server's files to *target*, as they are at one moment."""
    made.store.stop()
    copy_served(made.store.served, target)
    made.store.go_on()


def _copied(watched: MountedSet) -> int:
    return sum(replica["copied_bytes"] for replica in watched.status()["replicas"])


def _require_nothing_left(made: Bench) -> None:
    """Raises `TrialError` if a mount or a process of ours or of a client is left."""
    if left := [each for each in mounts() if each.startswith(str(made.directory))]:
        raise TrialError(f"a mount is left: {left}")
    try:
        wait_until(lambda: not client_processes(), "no process is left", timeout_s=20)
    except RuntimeError:
        raise TrialError(f"processes are left: {client_processes()}") from None


def versions(kinds: Sequence[type[Store]]) -> str:
    """What is tried, for the head of the tables."""
    packages = dict.fromkeys(package for kind in kinds for package in kind.packages)
    return ", ".join(
        run("dpkg-query", "-W", "-f", "${Package} ${Version}", package) for package in packages
    )
