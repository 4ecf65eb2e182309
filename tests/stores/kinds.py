"""The stores: how each is served, and mounted as quorumfs-stores(7) says."""

import json
import os
import signal
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

from stores.network import SERVER, Network, end_processes, run, wait_until

REPLICA_TIMEOUT_S = 4
_STOP_S = 5.0
"""What a server that is ended in order has for that; nbdkit waits for its clients to go."""
_SSH_PORT = 22
_NBD_PORT = 10809
_NFS_PORT = 2049
_LEASE_S = 10
"""The shortest that nfsd has, for its grace time, too: each outage is longer."""
_NFSD = Path("/proc/fs/nfsd")
_BUSY = 16
"""What umount.nfs says as exit code of a mount that is in use."""
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
    packages: tuple[str, ...]
    """What Debian's packages of server and client are called."""
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

    def kill(self) -> None:
        """End the server at once."""
        self._network.kill_server()

    def end(self) -> None:
        """End the server in order, as a service manager does."""
        self._network.end_server(_STOP_S)

    def stop(self) -> None:
        """Have the server answer nothing that needs its disk, until it goes on."""
        self._network.signal_server(signal.SIGSTOP)

    def go_on(self) -> None:
        self._network.signal_server(signal.SIGCONT)

    def clear(self) -> None:
        """Take away what is left of the server, whatever state it is in."""
        self.kill()

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
    packages = ("sshfs", "openssh-server")
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
    packages = ("libnbd-bin", "nbdkit")
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
    packages = ("rclone", "openssh-server")

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


class NFS(Store):
    """The kernel's server and client.

    The server runs in the kernel, in the network namespace that it was started in. No signal stops
    it, so its file system, which is one of its own, is frozen instead: requests that write wait.
    """

    name = "nfs"
    packages = ("linux-image-cloud-amd64", "nfs-kernel-server")
    port = _NFS_PORT
    recovery = "hard"
    """What the client does when the server does not answer, as mount options."""

    def prepare(self, size: int) -> None:
        disk = self._directory / "served.img"
        with disk.open("wb") as file:
            file.truncate(4 * size)
        run("mkfs.ext4", "-q", disk)
        run("mount", "-o", "loop", disk, self.served)
        (self.served / "lost+found").rmdir()
        # What is seen there is of the network namespace that it was mounted in.
        run(*self._network.enter("mount", "-t", "nfsd", "nfsd", _NFSD))
        for each in (self._pipes, self._clients):
            each.mkdir()
        run(*self._network.enter("mount", "-t", "rpc_pipefs", "rpc_pipefs", self._pipes))

    def serve(self) -> None:
        # It remembers who may reclaim files and locks in the grace time.
        places = ("-p", self._pipes, "-s", self._clients)
        self._network.serve("nfsdcld", "-F", *places, log=self._log)
        self._network.serve("rpc.mountd", "-F", "-N", "3", log=self._log)
        options = "rw,insecure,no_root_squash,no_subtree_check,fsid=0"
        run(*self._network.enter("exportfs", "-i", "-o", options, self._export))
        times = ["-G", str(_LEASE_S), "-L", str(_LEASE_S)]
        run(*self._network.enter("rpc.nfsd", "-H", SERVER, "-N", "3", *times, "8"))

    def kill(self) -> None:
        run(*self._network.enter("rpc.nfsd", "0"))
        super().kill()

    def end(self) -> None:
        self.kill()

    def stop(self) -> None:
        run("fsfreeze", "-f", self.served)

    def go_on(self) -> None:
        run("fsfreeze", "-u", self.served)

    def clear(self) -> None:
        subprocess.run(["fsfreeze", "-u", self.served], check=False, stderr=subprocess.DEVNULL)
        super().clear()
        run(*self._network.enter("exportfs", "-u", self._export))
        for each in (self._pipes, _NFSD, self.served):
            run("umount", each)

    def mount(self, address: str, port: int) -> None:
        options = f"vers=4.2,{self.recovery},port={port}"
        run("mount", "-t", "nfs", "-o", options, f"{address}:/", self.mountpoint)

    def unmount(self) -> None:
        run("umount", self.mountpoint)

    def abandon(self) -> None:
        # What waits for a server that is gone ends only when its requests are given up, here: after
        # a lazy unmount nothing could do that any more.
        end_processes(os.getpid())
        wait_until(self._has_let_go, "the mount is gone", timeout_s=60)

    def _has_let_go(self) -> bool:
        command = ["umount", "-f", str(self.mountpoint)]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode != _BUSY

    @property
    def _export(self) -> str:
        return f"*:{self.served}"

    @property
    def _pipes(self) -> Path:
        return self._directory / "pipes"

    @property
    def _clients(self) -> Path:
        return self._directory / "clients"


class NFSSoft(NFS):
    """Requests fail that have no answer in time."""

    name = "nfs-soft"
    recovery = "softerr,timeo=20,retrans=1"


KINDS: dict[str, type[Store]] = {kind.name: kind for kind in (SSHFS, NBDFuse, Rclone, NFS, NFSSoft)}


def mounts() -> list[str]:
    """Where something is mounted through FUSE or NFS."""
    rows = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [
        row[1]
        for row in rows
        if row[2].startswith(("fuse", "nfs4")) and row[1] != "/sys/fs/fuse/connections"
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
