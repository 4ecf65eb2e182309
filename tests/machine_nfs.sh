#!/usr/bin/env bash
# Replicas on NFS, whose server and network fail: what quorumfs-stores(7) says of NFS, as tests (tests/stores),
# in a Debian that boots, for server and client are in the kernel. It is made of Debian's packages in
# /var/tmp (4 GB, removed again), and emulated without KVM. Needs root (or sudo).
# The argument is a suite, by default: tests/machine_nfs.sh trixie; those behind it go to python tests/stores.
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "A chroot needs root: going on with sudo"
    exec sudo -- "$checkout/tests/machine_nfs.sh" "$@"
fi

. "$checkout/tests/chroot.sh"
. "$checkout/tests/machine.sh"
packages+=(fio iproute2 iptables nfs-common nfs-kernel-server)

make_chroot "${1:-trixie}"
# What is emulated starves now and then: that is no fault.
printf '%s\n' --slack 10 --stores nfs nfs-soft "${@:2}" >"$root/quorumfs/arguments"
make_machine "$checkout/tests/machine_nfs_guest.sh"

boot_machine 7200
