#!/usr/bin/env bash
# Replicas on block devices that need the modules of a kernel: LVM, NBD, iSCSI, NVMe over TCP. In a Debian
# that boots, which is made of its packages in /var/tmp (4 GB, removed again), and emulated without KVM.
# What it does is in machine_stores_guest.sh. Needs root (or sudo).
# The argument is a suite, by default: tests/machine_stores.sh trixie
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "A chroot needs root: going on with sudo"
    exec sudo -- "$checkout/tests/machine_stores.sh" "$@"
fi

. "$checkout/tests/chroot.sh"
. "$checkout/tests/machine.sh"
packages+=(diffutils iproute2 lvm2 nbd-client nbdkit nvme-cli open-iscsi tgt)

make_chroot "${1:-trixie}"
rm -r "${root:?}/quorumfs"
make_machine "$checkout/tests/machine_stores_guest.sh"

boot_machine 1800
