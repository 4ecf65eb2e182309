#!/usr/bin/env bash
# quorumfs on a Debian that boots: systemd as its first process, units, /etc/quorumfs, fstab, the
# journal, shutdowns. The machine is made of Debian's packages in /var/tmp (4 GB, removed again), and
# emulated without KVM. What it does is in systemd_guest.sh. Needs root (or sudo).
# The argument is a suite, by default: tests/systemd.sh trixie
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "A chroot needs root: going on with sudo"
    exec sudo -- "$checkout/tests/systemd.sh" "$@"
fi

. "$checkout/tests/chroot.sh"
. "$checkout/tests/machine.sh"

make_chroot "${1:-trixie}"
rm -r "${root:?}/quorumfs"
mkdir -p "$root/nas1" "$root/nas2"
make_machine "$checkout/tests/systemd_guest.sh" \
    "/dev/vdb /nas1 ext4 defaults 0 2" "/dev/vdc /nas2 ext4 defaults 0 2"
mkfs.ext4 -q "$work/nas1.img" 256M
mkfs.ext4 -q "$work/nas2.img" 256M

boot_machine 1800 "$work/nas1.img" "$work/nas2.img"
