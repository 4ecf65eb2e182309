#!/bin/sh
# Mounts the disk of a virtual machine before libvirt starts it, and unmounts it after its end: for
# machines whose disk has the machine's own name, in /etc/quorumfs/NAME.conf. Install it as
# /etc/libvirt/hooks/qemu (or in qemu.d there), executable, and restart libvirt's daemon.
# libvirt calls it as: qemu NAME OPERATION SUB-OPERATION EXTRA; see https://libvirt.org/hooks.html.
# A failure of prepare keeps the machine from starting, and libvirt tells what is said here. The
# hook must not call libvirt.
set -eu

name=$1 operation=$2

[ -e "/etc/quorumfs/$name.conf" ] || exit 0

case $operation in
    prepare) quorumfs mount --if-needed "$name" ;;
    release) quorumfs umount --if-needed "$name" ;;
esac
