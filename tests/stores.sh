#!/usr/bin/env bash
# Replicas on sshfs, nbdfuse and rclone, whose servers and networks fail: what quorumfs-stores(7) says of
# stores on the network, as tests (tests/stores), in a chroot with Debian's packages.
# The chroot is in /var/tmp (2 GB), and is removed again. Needs root (or sudo).
# The argument is a suite, by default: tests/stores.sh trixie; those behind it go to python tests/stores.
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "A chroot needs root: going on with sudo"
    exec sudo -- "$checkout/tests/stores.sh" "$@"
fi

. "$checkout/tests/chroot.sh"

make_chroot "${1:-trixie}"

begin "installing the stores"
inside apt-get install -y --no-install-recommends fio iproute2 iptables nbdfuse nbdkit \
    openssh-client openssh-server procps rclone sshfs >"$work/log" 2>&1

begin "stores that fail"
# In a network namespace of its own: nothing here meets the network of the host, and whatever is
# made for the servers is gone with the last process.
inside unshare --net python3 tests/stores --stores sshfs nbdfuse rclone "${@:2}"
