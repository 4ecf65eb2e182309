"""What systemd and mount(8) are told of us: units, their order, and the programs that they run.

The order depends on where the replicas are, which ``/etc/quorumfs`` and ``/etc/fstab`` say. Were it
written down when we are installed, it would be wrong once one of these is edited. So a generator
writes it anew when the host boots and at each ``systemctl daemon-reload``, as systemd's own does
for fstab.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence

from quorumfs.control.mounts import FS_TYPE, SUBTYPE
from quorumfs.errors import UserError
from quorumfs.mount import configuration

SYSTEMD = "/etc/systemd"
"""Where what an administrator installs for systemd lies."""

SYSTEMD_OF_PACKAGE = "/usr/lib/systemd"
"""The same of a distribution's package; the administrator's counts for more."""

UNIT = "system/quorumfs@.service"

GENERATOR = "system-generators/quorumfs"

DROP_IN = "50-quorumfs.conf"

FSTAB = "/etc/fstab"

USERS = (
    *("libvirtd.service", "virtqemud.service", "libvirt-guests.service"),
    *("virt-guest-shutdown.target", "systemd-machined.service", "machines.target"),
)
"""Units that start after our disks, and stop before them: those that run virtual machines.

libvirt has each machine's scope stop before these. ``machine.slice`` itself is none of them: at
boot it comes before ``basic.target``, and so before all services. A machine that somebody else
started is waited for when the disk is to be stopped.
"""

_UNIT = """\
# Made by quorumfs install-units. Changes belong into: systemctl edit quorumfs@NAME
[Unit]
Description=Disk %i of quorumfs
Documentation=man:quorumfs.conf(5) file:/etc/quorumfs/%i.conf
# The file systems of the replicas, which are needed, are in a drop-in that a generator writes.
Before={users}

[Service]
Type=notify
ExecStart={command} mount --foreground %i
ExecReload={command} mount -o remount %i
# Who uses the disk is waited for, and named in the journal, before the disk is taken away.
ExecStop={command} umount --wait --pid=${{MAINPID}}
# A start compares nothing, but a replica that does not answer is waited for.
TimeoutStartSec=5min
TimeoutStopSec=5min
# The store may come back: go on trying, but where a person has to decide (3), or to edit (4).
Restart=on-failure
RestartSec=10s
RestartPreventExitStatus=3 4
# A loop that hangs serves nobody. A store that hangs is no reason.
WatchdogSec=3min
KillMode=mixed
# The daemon stands between the host and a disk: let something else be killed first.
OOMScoreAdjust=-1000

[Install]
WantedBy=multi-user.target
"""

_GENERATOR = """\
#!/bin/sh
# Made by quorumfs install-units. Tells systemd which stores the disks of quorumfs need.
if ls {confs} >/dev/null 2>&1 || grep -qsE '{kinds}' {fstab}; then
    exec {command} generate-units "$@"
fi
"""

_HELPER = """\
#!/bin/sh
# Made by quorumfs install-units. See mount(8).
exec {command} {verb} "$@"
"""

_NEEDRESTART = """\
# Made by quorumfs install-units. A restart would take the disk from whoever uses it.
$nrconf{{override_rc}}{{qr(^quorumfs@)}} = 0;
"""


def files(command: Sequence[str], systemd: str = SYSTEMD) -> Mapping[str, tuple[str, int]]:
    """What ``install-units`` installs: by path, contents and mode. *command* is ``quorumfs``,
    *systemd* is where units and generators are looked for.
    """
    in_shell = shlex.join(command)
    in_unit = " ".join(map(_quoted, command)).replace("$", "$$")
    unit = _UNIT.format(command=in_unit, users=" ".join(USERS))
    generator = _GENERATOR.format(
        command=in_shell,
        confs=f"{configuration.DIRECTORY}/*{configuration.SUFFIX}",
        kinds=rf"[[:space:]](fuse\.)?{SUBTYPE}[[:space:]]",
        fstab=FSTAB,
    )
    mounting = _HELPER.format(command=in_shell, verb="mount-helper")
    unmounting = _HELPER.format(command=in_shell, verb="umount-helper")
    return {
        f"{systemd}/{UNIT}": (unit, 0o644),
        f"{systemd}/{GENERATOR}": (generator, 0o755),
        "/etc/needrestart/conf.d/quorumfs.conf": (_NEEDRESTART.format(), 0o644),
        f"/usr/sbin/mount.{SUBTYPE}": (mounting, 0o755),
        f"/usr/sbin/mount.{FS_TYPE}": (mounting, 0o755),
        f"/usr/sbin/umount.{SUBTYPE}": (unmounting, 0o755),
        f"/usr/sbin/umount.{FS_TYPE}": (unmounting, 0o755),
    }


def drop_ins(complain: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """For each disk of this host: what its unit's drop-in is called (below the generator's
    directory), and says. *complain* is told which line or file says nothing that can be meant.
    """
    for name in configuration.names():
        try:
            disk = configuration.configured(name)
        except UserError as error:
            complain(str(error))
            continue
        unit = f"quorumfs@{name}.service"
        yield f"{unit}.d/{DROP_IN}", _needs(disk.replicas, disk.mountpoint, disk.options)
    for number, line in enumerate(_lines(FSTAB), 1):
        fields = [*map(_decoded, line.split()), "", "", "", ""]
        source, directory, fs_type, options, *_ = fields
        if source.startswith("#") or fs_type not in (FS_TYPE, SUBTYPE):
            continue
        try:
            if configuration.is_name(source):
                replicas: Sequence[str] = configuration.configured(source).replicas
            else:
                replicas = configuration.replicas_of(source)
        except UserError as error:
            complain(f"{FSTAB}, line {number}: {error}")
            continue
        needs = _needs(replicas, directory, options, f"Before={' '.join(USERS)}")
        yield f"{mount_unit(directory)}.d/{DROP_IN}", needs


def _lines(path: str) -> list[str]:
    """Those of the file *path*; none if there is no such file."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def _decoded(field: str) -> str:
    """A *field* of fstab, where a space is ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _needs(replicas: Sequence[str], mountpoint: str, options: str, *more: str) -> str:
    """A drop-in: the file systems of *replicas*, of the place of the mount point, and of what
    *options* name, are needed; and devices are waited for, as long as systemd does.

    A path is taken as it is and, where it leads through a symbolic link, as what it is then.
    """
    named = [one.partition("=")[2] for one in options.split(",") if one.startswith("sidecars=")]
    places = [*replicas, *named, os.path.dirname(mountpoint.rstrip("/")) or "/"]
    absolute = [place for place in places if place.startswith("/")]
    paths = dict.fromkeys([*absolute, *map(os.path.realpath, absolute)])
    lines = [f"RequiresMountsFor={_quoted(path)}" for path in paths]
    devices = [f"{unit_name(path)}.device" for path in replicas if path.startswith("/dev/")]
    lines += [f"{kind}={one}" for one in devices for kind in ("Wants", "After")]
    return "\n".join(["# Made by quorumfs generate-units", "[Unit]", *lines, *more, ""])


def _quoted(text: str) -> str:
    """*text* as one word of a unit's line, without meaning for systemd."""
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return text if re.fullmatch(r"[\w@%+=:,./-]+", text, re.ASCII) else f'"{text}"'


def mount_unit(directory: str) -> str:
    """The name of the unit of what is mounted at *directory*."""
    return f"{unit_name(directory)}.mount"


def unit_name(path: str) -> str:
    """What the unit of *path* is called before its kind: see systemd.unit(5), on escaping."""
    path = "/".join(part for part in path.split("/") if part)
    if not path:
        return "-"
    plain = "".join(
        "-" if byte == "/" else byte if re.fullmatch(r"[A-Za-z0-9:_.]", byte) else _escaped(byte)
        for byte in path
    )
    return _escaped(".") + plain[1:] if plain[0] == "." else plain


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
