"""The set under test: one local replica, one elsewhere."""

import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from quorumfs.control import client
from stores.guest import fill
from stores.network import run

SIZE = 64 << 20


class MountedSet:
    """The set, mounted with some options."""

    def __init__(self, directory: Path, far: Path) -> None:
        self.near = directory / "near.img"
        self.far = far
        self.mountpoint = directory / "mnt"
        self.disk = self.mountpoint / "disk.img"
        self.log = directory / "quorumfs.log"

    def create(self) -> None:
        """New replicas that hold what a guest expects."""
        fill(self.near, SIZE)
        run("quorumfs", "create", "--source", self.near, "--vote-threshold", "1", self.far)

    def mount(self, options: str) -> None:
        self.mountpoint.mkdir(exist_ok=True)
        logging = ["--log-file", str(self.log)]
        run("quorumfs", "mount", "-o", options, *logging, self.near, self.far, self.mountpoint)

    def set_options(self, options: str) -> None:
        run("quorumfs", "set", self.mountpoint, *options.split(","))

    def unmount(self) -> None:
        run("quorumfs", "umount", self.mountpoint)

    def abandon(self) -> None:
        """Take away what is left of the mount; the daemon ends with all other processes."""
        subprocess.run(["fusermount3", "-u", "-z", "-q", self.mountpoint], check=False)

    def status(self) -> dict[str, Any]:
        """Raises `RuntimeError` if none is told."""
        # Not by the command, whose start takes seconds where a machine is emulated.
        try:
            return client.status(str(self.mountpoint), timeout_s=60).to_json()
        except client.ControlError as error:
            raise RuntimeError(f"no status: {error}") from None

    def wait_until_healthy(self, timeout_s: float) -> None:
        """Raises `RuntimeError` with the state if it takes longer."""
        deadline = time.monotonic() + timeout_s
        while (told := self.status())["state"] != "healthy":
            if time.monotonic() > deadline:
                far = told["replicas"][1]
                why = far["last_error"] or far["reason"] or told["resync"]
                raise RuntimeError(
                    f"not healthy {timeout_s:g} s after it ended: {told['state']}, "
                    f"the store's replica is {far['state']}: {why}"
                )
            time.sleep(0.3)


class Watch:
    """The states that a set passes through, asked for once in a while."""

    def __init__(self, watched: MountedSet) -> None:
        self.states: list[str] = []
        self.faults: list[str] = []
        self._set = watched
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stopped.wait(0.7):
            began = time.monotonic()
            try:
                state = self._set.status()["replicas"][1]["state"]
            except RuntimeError as error:
                self.faults.append(f"status: {error}")
                continue
            if (took := time.monotonic() - began) > 5:
                self.faults.append(f"status took {took:.1f} s")
            if self.states[-1:] != [state]:
                self.states.append(state)
