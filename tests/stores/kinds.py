"""The stores: how each is served, and mounted as quorumfs-stores(7) says."""

import json
import os
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from stores.network import SERVER, Network, run, wait_until

REPLICA_TIMEOUT_S = 4
_SSH_PORT = 22
_NBD_PORT = 10809
_RC = "127.0.0.1:5572"

_SSHD_CONFIG = """
ListenAddress {address}
HostKey {directory}/hostkey
AuthorizedKeysFile {directory}/key.pub
PidFile none
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
Subsystem sftp internal-sftp
"""


class Store(ABC):
    """One store, whose server has its files in `served`."""

    name: str
    port: int
    remount_after: frozenset[str] = frozenset()
    """The outages after which a person, or a unit, has to mount it again."""
    options = (
        "read-pattern=fifo,vote-threshold=1,write-mostly=b.img,"
        f"replica-timeout={REPLICA_TIMEOUT_S}s"
    )
    """What quorumfs-stores(7) recommends to mount the set with."""

    def __init__(self, network: Network, directory: Path) -> None:
        self._network = network
        self._directory = directory
        self.served = directory / "served"
        self.mountpoint = directory / "store"
        for each in (self.served, self.mountpoint):
            each.mkdir()

    @property
    def image(self) -> Path:
        """The replica as the client sees it."""
        return self.mountpoint / "b.img"

    @property
    def _log(self) -> Path:
        return self._directory / "store.log"

    def what_went_wrong(self) -> str:
        """The last that server and client said."""
        lines = self._log.read_text(errors="replace").splitlines() if self._log.exists() else []
        return "\n".join(lines[-10:])

    def prepare(self, size: int) -> None:  # noqa: B027 (most servers need no image of *size* bytes)
        """Make what the server needs before it is started first."""

    @abstractmethod
    def serve(self) -> None:
        """Start the server, also again after it was ended."""

    @abstractmethod
    def mount(self, address: str, port: int) -> None:
        """Mount it from there."""

    def remount(self, address: str, port: int) -> None:
        """The command that quorumfs-stores(7) gives for after an outage."""
        self.abandon()
        self.mount(address, port)

    def settle(self) -> None:  # noqa: B027 (a store that tells late has more to do here)
        """Wait until what was closed is at the server."""

    def unmount(self) -> None:
        run("fusermount3", "-u", self._mounted_at)

    def abandon(self) -> None:
        """Take away what is left of the mount, whatever state it is in."""
        subprocess.run(["fusermount3", "-u", "-z", "-q", self._mounted_at], check=False)

    @property
    def _mounted_at(self) -> Path:
        return self.mountpoint

    def _start_client(self, *command: str | Path) -> None:
        """Start a client that stays in the foreground, and wait until it has mounted."""
        with self._log.open("a") as output:
            subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_until(lambda: str(self._mounted_at) in mounts(), f"{self.name} is mounted")


class _OverSSH(Store):
    """What has its server in sshd."""

    port = _SSH_PORT

    def __init__(self, network: Network, directory: Path) -> None:
        super().__init__(network, directory)
        for name in ("key", "hostkey"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / name)
        config = _SSHD_CONFIG.format(address=SERVER, directory=directory)
        (directory / "sshd_config").write_text(config)
        Path("/run/sshd").mkdir(exist_ok=True)

    def serve(self) -> None:
        config = self._directory / "sshd_config"
        self._network.serve("/usr/sbin/sshd", "-D", "-e", "-f", config, log=self._log)
        _wait_for_port(self._network, self.port)


class SSHFS(_OverSSH):
    name = "sshfs"
    remount_after = frozenset({"image rolled back"})

    def mount(self, address: str, port: int) -> None:
        options = [
            "reconnect", "ServerAliveInterval=2", "ServerAliveCountMax=2", "ConnectTimeout=4",
            "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR",
            f"IdentityFile={self._directory}/key", f"port={port}",
        ]  # fmt: skip
        run("sshfs", f"root@{address}:{self.served}", self.mountpoint, "-o", ",".join(options))


class NBDFuse(Store):
    name = "nbdfuse"
    port = _NBD_PORT
    remount_after = frozenset({"killed", "restarted", "rolled back", "image rolled back"})

    def prepare(self, size: int) -> None:
        with (self.served / "b.img").open("wb") as file:
            file.truncate(size)

    def serve(self) -> None:
        image = self.served / "b.img"
        command = ["nbdkit", "-f", "-i", SERVER, "-p", str(self.port), "file", str(image)]
        self._network.serve(*command, log=self._log)
        _wait_for_port(self._network, self.port)

    def mount(self, address: str, port: int) -> None:
        self.image.touch()
        self._start_client("nbdfuse", self.image, f"nbd://{address}:{port}")

    @property
    def _mounted_at(self) -> Path:
        return self.image


class Rclone(_OverSSH):
    name = "rclone"

    def mount(self, address: str, port: int) -> None:
        config = self._directory / "rclone.conf"
        config.write_text(
            f"[store]\ntype = sftp\nhost = {address}\nport = {port}\nuser = root\n"
            f"key_file = {self._directory}/key\n"
        )
        self._start_client(
            "rclone", "mount", f"store:{self.served}", self.mountpoint, "--config", config,
            "--cache-dir", self._directory / "cache", "--vfs-cache-mode", "full",
            "--vfs-write-back", "1s", "--dir-cache-time", "1s",
            "--rc", "--rc-no-auth", "--rc-addr", _RC,
        )  # fmt: skip

    def settle(self) -> None:
        wait_until(self._has_uploaded, "rclone has uploaded what was closed", timeout_s=120)

    def _has_uploaded(self) -> bool:
        told = json.loads(run("rclone", "rc", "--url", f"http://{_RC}", "vfs/stats"))["diskCache"]
        return not (told["uploadsInProgress"] or told["uploadsQueued"])


KINDS: dict[str, type[Store]] = {kind.name: kind for kind in (SSHFS, NBDFuse, Rclone)}


def mounts() -> list[str]:
    """Where something is mounted through FUSE."""
    rows = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [
        row[1] for row in rows if row[2].startswith("fuse") and row[1] != "/sys/fs/fuse/connections"
    ]


def _wait_for_port(network: Network, port: int) -> None:
    """Wait until something listens there; a connection would be a guest for some servers."""
    here = network.enter("ss", "-Htln", f"sport = :{port}")
    wait_until(lambda: bool(run(*here)), f"a server listens on port {port}")


def copy_served(source: Path, target: Path) -> None:
    """Make the files of *target* what those of *source* are, in place and with their times."""
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        run("cp", "--preserve=all", "--reflink=auto", file, target / file.name)
    for file in target.iterdir():
        if not (source / file.name).exists():
            os.unlink(file)
