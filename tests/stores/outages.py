"""What happens to a store: each outage begins, lasts, and ends."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stores.kinds import Store, copy_served
from stores.network import Network, run
from stores.relay import Relay

LASTS_S = 20.0
"""Longer than a flush waits for a replica that does not answer."""


@dataclass(frozen=True)
class Scene:
    """What an outage may touch."""

    network: Network
    store: Store
    relay: Relay | None
    snapshot: Path
    """The files of the server as they were some time ago."""


class Outage(Protocol):
    def __call__(self, scene: Scene) -> AbstractContextManager[None]: ...


@contextmanager
def _killed(scene: Scene) -> Iterator[None]:
    scene.store.kill()
    yield
    scene.store.serve()


@contextmanager
def _stopped(scene: Scene) -> Iterator[None]:
    scene.store.stop()
    yield
    scene.store.go_on()


@contextmanager
def _restarted(scene: Scene) -> Iterator[None]:
    scene.store.end()
    scene.store.serve()
    yield


@contextmanager
def _unplugged(scene: Scene) -> Iterator[None]:
    scene.network.set_cable("down")
    yield
    scene.network.set_cable("up")


@contextmanager
def _lossy(scene: Scene) -> Iterator[None]:
    with scene.network.loss():
        yield


@contextmanager
def _rolled_back(scene: Scene) -> Iterator[None]:
    scene.store.kill()
    copy_served(scene.snapshot, scene.store.served)
    yield
    scene.store.serve()


@contextmanager
def _image_rolled_back(scene: Scene) -> Iterator[None]:
    scene.store.kill()
    run("cp", "--preserve=all", scene.snapshot / "b.img", scene.store.served / "restored")
    (scene.store.served / "restored").rename(scene.store.served / "b.img")
    yield
    if "image rolled back" in scene.store.remount_after:
        # In the mount that had it before, nothing would tell it from what it was.
        scene.store.abandon()
    scene.store.serve()


def _far(round_trip_s: float) -> Outage:
    @contextmanager
    def far(scene: Scene) -> Iterator[None]:
        assert scene.relay is not None
        scene.relay.round_trip_s = round_trip_s
        yield
        scene.relay.round_trip_s = 0.0

    return far


OUTAGES: dict[str, Outage] = {
    "killed": _killed,
    "stopped": _stopped,
    "restarted": _restarted,
    "unplugged": _unplugged,
    "1 % loss": _lossy,
    "20 ms": _far(0.02),
    "200 ms": _far(0.2),
    "rolled back": _rolled_back,
    "image rolled back": _image_rolled_back,
}

ROLLS_BACK = frozenset({"rolled back", "image rolled back"})
NEEDS_RELAY = frozenset({"20 ms", "200 ms"})


def last(outage: AbstractContextManager[None]) -> float:
    """Let it happen, and last its time; when it ended (`time.monotonic`)."""
    with outage:
        time.sleep(LASTS_S)
    return time.monotonic()
