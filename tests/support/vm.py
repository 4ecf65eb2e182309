"""Boot a small Linux guest under QEMU with one file attached as its virtio disk.

The guest is Debian's cloud kernel, unpacked by tests/run.sh, and an initramfs made of busybox, the
few kernel modules a virtio disk needs, and the host's real ext4 and discard tools. It runs one
shell script that sees the disk as /dev/vda, reports the script's exit status on its serial
console, and powers off. Everything is emulated (no KVM), so a boot takes seconds.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

CacheMode = Literal["none", "writeback", "writethrough", "directsync", "unsafe"]
AioMode = Literal["native", "threads", "io_uring"]
DiscardMode = Literal["unmap", "ignore"]
DetectZeroes = Literal["off", "on", "unmap"]

GUEST_ROOT: Final = Path(__file__).parents[2] / ".guest"
"""Where tests/run.sh unpacks the kernel package."""

KILL_WAIT_S: Final = 10.0
"""How long a killed QEMU may take to vanish; longer means it hangs in a system call."""

_GUEST_TOOLS: Final = ("mkfs.ext4", "e2fsck", "resize2fs", "fstrim", "blkdiscard")
_GUEST_MODULES: Final = ("virtio_pci", "virtio_blk", "crc32c_generic", "crc32c_intel", "ext4")
_MKE2FS_CONF: Final = Path("/etc/mke2fs.conf")
_EXIT_LINE: Final = re.compile(r"^quorumfs-vm: exit (\d+)$", re.MULTILINE)

# The caller's script runs under dash: busybox's own shell prefers its built-in fstrim and
# blkdiscard to the real ones, whatever PATH says.
# Kernel messages are silenced before the exit line so that none can be printed inside it.
_INIT: Final = """\
#!/bin/busybox sh
export PATH=/usr/sbin:/bin HOME=/
setup() {
    mount -t proc proc /proc &&
        mount -t sysfs sysfs /sys &&
        mount -t devtmpfs devtmpfs /dev || return
    while read -r module; do
        insmod "$module" || return
    done < /etc/guest-modules
    [ -b /dev/vda ]
}
if setup; then
    /bin/sh -e /script < /dev/null
    status=$?
    dmesg -n 1
    echo
    echo "quorumfs-vm: exit $status"
else
    echo "quorumfs-vm: setup failed"
fi
sync
poweroff -f
"""

EXT4_SCRIPT: Final = """\
mkfs.ext4 -q /dev/vda
mkdir /mnt
mount -t ext4 /dev/vda /mnt
mkdir /mnt/small
for n in $(seq 300); do
    seq "$n" $((n + 200)) > "/mnt/small/$n"
done
yes "$(seq 20000)" | head -c 20000000 > /mnt/big
sync
(cd /mnt && find . -type f -exec md5sum {} + > /sums)
[ "$(wc -l < /sums)" -eq 301 ]
umount /mnt

e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt
(cd /mnt && md5sum -c /sums > /verified) || { grep -v ': OK$' /verified; exit 1; }
umount /mnt
"""
"""Guest script: make ext4, fill it, check it and verify it after a second mount.

It leaves /big (the lines 1..20000 again and again, cut at 20,000,000 bytes) and /small/N for
N = 1..300 (the lines N..N+200) on the disk, so that the host can look for them. No two aligned
4 KiB blocks of /big are the same. Needs a disk of 64 MiB.
"""


GROWTH_SCRIPT: Final = """\
before=$(cat /sys/block/vda/size)
mkfs.ext4 -q /dev/vda
mkdir /mnt
mount -t ext4 /dev/vda /mnt
seq 300000 | tee /mnt/before > /mnt/amid
until [ "$(cat /sys/block/vda/size)" -gt "$before" ]; do
    seq 100000 > /mnt/amid
    sync
done
resize2fs /dev/vda
yes "$(seq 20000)" | head -c $((before * 512)) > /mnt/big
sync
(cd /mnt && md5sum before amid big > /sums)
umount /mnt
e2fsck -fn /dev/vda
mount -t ext4 /dev/vda /mnt
(cd /mnt && md5sum -c /sums)
umount /mnt
"""
"""Guest script: make ext4, write until the disk is larger, and then a file as large as the disk was
before. Needs a disk of 64 MiB that becomes at least twice as large."""


class VmError(Exception):
    """The guest could not be built or started, or ended without reporting an exit status.

    `console` is the text printed by then, QEMU's own messages included.
    """

    def __init__(self, message: str, console: str = "") -> None:
        super().__init__(f"{message}\n--- console ---\n{console}" if console else message)
        self.console = console


class VmTimeoutError(VmError):
    """The guest did not power off in time and was killed.

    With the default werror=stop and rerror=stop this is also how a failed disk request shows:
    QEMU pauses the guest for good.
    """


@dataclass(frozen=True)
class VmResult:
    """How a guest that powered off by itself went.

    `exit_status` is the script's, `console` its whole serial output with plain newlines,
    `seconds` the wall time from starting QEMU to its end.
    """

    exit_status: int
    console: str
    seconds: float


def boot(
    disk: Path,
    script: str,
    workdir: Path,
    *,
    cache: CacheMode = "none",
    aio: AioMode = "native",
    discard: DiscardMode = "unmap",
    detect_zeroes: DetectZeroes = "off",
    file_options: Mapping[str, str] | None = None,
    device_options: Mapping[str, str] | None = None,
    control: Path | None = None,
    timeout_s: float = 120.0,
) -> VmResult:
    """Boot a guest with `disk` as its /dev/vda, run `script` in it and wait for the power-off.

    `script` is run by `sh -e` as root: it stops at its first failing command, whose status is
    the result's `exit_status`. `workdir` is created if missing and keeps nothing but the
    initramfs, which later boots reuse; several boots may share it at the same time.

    `cache` has the meaning of QEMU's -drive cache=. `file_options` are added to the file block
    node (e.g. {"locking": "off"}) and `device_options` to virtio-blk-pci (e.g. {"werror":
    "report"}); both override what is set here. `control` is where the socket for `resize` goes.
    `timeout_s` is in seconds, from QEMU's start.

    Raises ValueError for aio="native" without O_DIRECT, VmTimeoutError if the guest takes longer
    than `timeout_s`, and VmError if a tool is missing, QEMU fails, or the guest dies before the
    end of the script.
    """
    direct = cache in ("none", "directsync")
    if aio == "native" and not direct:
        raise ValueError(f"aio=native needs cache none or directsync, not {cache}")
    kernel, release = _newest_kernel()
    workdir.mkdir(parents=True, exist_ok=True)
    no_flush = _on_off(cache == "unsafe")
    file_node = {
        "driver": "file",
        "node-name": "f0",
        "filename": str(disk.absolute()),
        "aio": aio,
        "cache.direct": _on_off(direct),
        "cache.no-flush": no_flush,
        "discard": "unmap",
        **(file_options or {}),
    }
    raw_node = {
        "driver": "raw",
        "node-name": "d0",
        "file": "f0",
        "cache.direct": _on_off(direct),
        "cache.no-flush": no_flush,
        "discard": discard,
        "detect-zeroes": detect_zeroes,
    }
    device = {
        "driver": "virtio-blk-pci",
        "drive": "d0",
        "write-cache": _on_off(cache not in ("writethrough", "directsync")),
        "werror": "stop",
        "rerror": "stop",
        **(device_options or {}),
    }
    with tempfile.TemporaryDirectory(prefix="boot-", dir=workdir) as run_dir:
        initramfs = Path(run_dir, "initramfs")
        # The kernel unpacks concatenated archives one after the other.
        base = _base_initramfs(release, workdir, Path(run_dir))
        archive = _Archive()
        archive.add("script", script.encode(), 0o644)
        initramfs.write_bytes(base.read_bytes() + archive.compressed())
        # setpriv: QEMU must not outlive a test run that is itself killed.
        # -cpu max: the default processor lacks SSE 4.2, which crc32c_intel needs.
        command = [_tool("setpriv"), "--pdeathsig", "KILL", _tool("qemu-system-x86_64")]
        command += ["-machine", "pc", "-accel", "tcg", "-cpu", "max", "-m", "256"]
        command += ["-nodefaults", "-no-user-config", "-no-reboot"]
        command += ["-display", "none", "-serial", "stdio"]
        command += ["-kernel", str(kernel), "-initrd", str(initramfs)]
        command += ["-append", "console=ttyS0 panic=-1 quiet"]
        command += ["-blockdev", _options(file_node), "-blockdev", _options(raw_node)]
        command += ["-device", _options(device)]
        if control is not None:
            command += ["-qmp", f"unix:{control},server=on,wait=off"]
        return _run(command, Path(run_dir, "console"), timeout_s)


def resize(control: Path, size: int) -> None:
    """Have the guest of `boot` see a disk of `size` bytes; VmError if QEMU refuses."""
    resized = {"execute": "block_resize", "arguments": {"node-name": "d0", "size": size}}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(KILL_WAIT_S)
        connection.connect(str(control))
        with connection.makefile("rw") as lines:
            lines.readline()  # the greeting
            for command in ({"execute": "qmp_capabilities"}, resized):
                lines.write(json.dumps(command) + "\n")
                lines.flush()
                while not (answer := json.loads(lines.readline())).keys() & {"return", "error"}:
                    pass  # an event
                if "error" in answer:
                    raise VmError(f"QEMU: {answer['error']['desc']}")


def _run(command: list[str], console_file: Path, timeout_s: float) -> VmResult:
    """Run QEMU to its end, or kill it after `timeout_s` seconds; see boot() for the errors."""
    started = time.monotonic()
    with console_file.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    timed_out = False
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        timed_out = True
    finally:
        gone = _kill(process)
    seconds = time.monotonic() - started
    console = console_file.read_bytes().decode(errors="replace").replace("\r\n", "\n")
    if timed_out:
        fate = "killed" if gone else f"process {process.pid} hangs and cannot be killed"
        raise VmTimeoutError(f"no power-off within {timeout_s:g} s; {fate}", console)
    if process.returncode != 0:
        raise VmError(f"QEMU ended with status {process.returncode}", console)
    reports = _EXIT_LINE.findall(console)
    if not reports:
        raise VmError("the guest ended without an exit status", console)
    return VmResult(int(reports[-1]), console, seconds)


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill `process` if it still runs; False if it does not end within KILL_WAIT_S."""
    process.kill()
    try:
        process.wait(KILL_WAIT_S)
    except subprocess.TimeoutExpired:
        # A request stuck in the file system under test keeps QEMU from dying. Waiting for it
        # forever would hide that failure.
        return False
    return True


def _on_off(value: bool) -> str:
    """Spell a bool the way QEMU wants it."""
    return "on" if value else "off"


def _options(options: Mapping[str, str]) -> str:
    """Join options for a QEMU command line, where a comma in a value is doubled."""
    return ",".join(f"{key}={value.replace(',', ',,')}" for key, value in options.items())


def _tool(name: str) -> str:
    """Return the path of a host program; VmError if it is not installed."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/bin")
    if path is None:
        raise VmError(f"{name} is not installed")
    return path


def _output(*command: str) -> str:
    """Return what a host program prints; VmError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise VmError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout


def _newest_kernel() -> tuple[Path, str]:
    """Return the image and the release of the newest cloud kernel; VmError if there is none."""
    images = sorted(GUEST_ROOT.glob("boot/vmlinuz-*"))
    if not images:
        raise VmError(f"no kernel for the guest in {GUEST_ROOT}: tests/run.sh puts it there")
    return images[-1], images[-1].name.removeprefix("vmlinuz-")


def _guest_modules(release: str) -> list[Path]:
    """Return the module files of _GUEST_MODULES and their dependencies, in loading order."""
    root = GUEST_ROOT / "lib/modules" / release
    builtin = {_module_name(line) for line in (root / "modules.builtin").read_text().splitlines()}
    depends: dict[str, list[str]] = {}
    for line in (root / "modules.dep").read_text().splitlines():
        module, _, needed = line.partition(":")
        # modules.dep puts the module to load first last.
        depends[_module_name(module)] = [*reversed(needed.split()), module]
    ordered: dict[Path, None] = {}
    for name in _GUEST_MODULES:
        if name in builtin:
            continue
        if name not in depends:
            raise VmError(f"kernel {release} has no module {name}")
        ordered.update((root / module, None) for module in depends[name])
    return list(ordered)


def _module_name(path: str) -> str:
    """Return the kernel's name for a module file, e.g. crc32c_intel for a/crc32c-intel.ko."""
    return Path(path).name.split(".")[0].replace("-", "_")


def _libraries(program: str) -> set[Path]:
    """Return the shared libraries of a host program and its ld.so, where it looks for them."""
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", _output(_tool("ldd"), program))}


def _base_initramfs(release: str, workdir: Path, run_dir: Path) -> Path:
    """Return the initramfs without a script, built by way of `run_dir` unless in `workdir`."""
    busybox = _tool("busybox")
    modules = _guest_modules(release)
    programs = {f"usr/sbin/{name}": Path(_tool(name)) for name in _GUEST_TOOLS}
    programs["bin/sh"] = Path(_tool("dash"))
    files = {str(path).lstrip("/"): path for path in (*modules, _MKE2FS_CONF)}
    for program in programs.values():
        files.update((str(path).lstrip("/"), path) for path in _libraries(str(program)))
    files.update(programs)
    files["bin/busybox"] = Path(busybox)

    inputs = [f"{name} {_fingerprint(path)}" for name, path in sorted(files.items())]
    digest = hashlib.sha256("\n".join([_INIT, *inputs]).encode()).hexdigest()[:12]
    target = workdir / f"initramfs-{release}-{digest}.gz"
    if target.exists():
        return target

    archive = _Archive()
    for directory in ("proc", "sys", "dev", "tmp"):
        archive.add_directory(directory)
    archive.add("init", _INIT.encode(), 0o755)
    archive.add("etc/guest-modules", "".join(f"{path}\n" for path in modules).encode(), 0o644)
    for name, path in files.items():
        archive.add(name, path.read_bytes(), 0o755)
    for applet in _output(busybox, "--list").split():
        if applet not in _GUEST_TOOLS and applet not in ("busybox", "sh"):
            archive.add_link(f"bin/{applet}", "busybox")
    # A rename, so that a boot at the same time never reads half a file.
    unfinished = run_dir / "base"
    unfinished.write_bytes(archive.compressed())
    return unfinished.rename(target)


def _fingerprint(path: Path) -> str:
    """Return what tells one installed version of a file from another; VmError if missing."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise VmError(f"{path} is not installed") from None
    return f"{path} {info.st_size} {info.st_mtime_ns}"


class _Archive:
    """A cpio archive in the "newc" format, which the kernel unpacks as its first root."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._names: set[str] = set()

    def add(self, name: str, content: bytes, permissions: int) -> None:
        """Add a file, and the directories above it; `name` has no leading slash."""
        self._add(name, content, stat.S_IFREG | permissions)

    def add_link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, target.encode(), stat.S_IFLNK | 0o777)

    def add_directory(self, name: str) -> None:
        """Add a directory, once, and the directories above it."""
        if name not in self._names:
            self._add(name, b"", stat.S_IFDIR | 0o755)

    def compressed(self) -> bytes:
        """Return the finished archive, gzipped; nothing may be added afterwards."""
        self._append("TRAILER!!!", b"", 0)
        return gzip.compress(self._data, compresslevel=1, mtime=0)

    def _add(self, name: str, content: bytes, mode: int) -> None:
        parent = str(Path(name).parent)
        if parent != ".":
            self.add_directory(parent)
        self._names.add(name)
        self._append(name, content, mode)

    def _append(self, name: str, content: bytes, mode: int) -> None:
        raw_name = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, special device, name size, checksum
        fields = (len(self._names), mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw_name), 0)
        self._data += b"070701" + b"".join(b"%08x" % field for field in fields)
        for part in (raw_name, content):
            self._data += part
            self._data += bytes(-len(self._data) % 4)
