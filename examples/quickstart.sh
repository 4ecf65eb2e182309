#!/usr/bin/env bash
# The main job from start to end on a bare Debian machine: install, make two replicas, mount them
# as one disk, put a file system with files on it; break a replica while it is in use, see the
# status, let it heal, verify, clean up.
# Needs root, or an ordinary user with sudo for the packages; leaves only .venv behind.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

install_packages e2fsprogs
PATH="$PATH:/sbin:/usr/sbin"
install_quorumfs "$checkout"

work=$(mktemp -d)
cleanup() {
    if mountpoint -q "$work/vdisk"; then quorumfs umount "$work/vdisk"; fi
    rm -rf "$work"
}
trap cleanup EXIT
cd "$work"
mkdir vdisk files

say "Two replicas, sparse raw images of 256 MiB"
truncate -s 256M a.img b.img

say "Mounting them as one disk"
set -x
quorumfs mount -o read-pattern=fifo,vote-threshold=1 --log-file quorumfs.log a.img b.img vdisk
{ set +x; } 2>/dev/null
ls -l vdisk

say "An ext4 file system with real files on it: this Python's library"
cp -r "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"/{json,email,http,xml} files
mkfs.ext4 -q -d files vdisk/disk.img
df -h vdisk
quorumfs umount vdisk
cmp a.img b.img && echo "both replicas hold the same bytes"

say "Breaking a replica while the disk is in use: somebody empties b.img, then a file is written"
quorumfs mount -o read-pattern=fifo,vote-threshold=1 --log-file quorumfs.log a.img b.img vdisk
truncate -s 0 b.img
cp "$(python3 -c 'import decimal; print(decimal.__file__)')" files/added.py
debugfs -w -R 'write files/added.py added.py' vdisk/disk.img 2>/dev/null
sync vdisk/disk.img

say "The write succeeded, b.img was ejected before it did, and status says what to do"
set -x
quorumfs status vdisk || true
{ set +x; } 2>/dev/null

say "Healing: give b.img its size back; it is brought up to date by itself"
truncate -s 256M b.img
until quorumfs status vdisk >/dev/null; do sleep 0.2; done
set -x
quorumfs status vdisk
quorumfs umount vdisk
{ set +x; } 2>/dev/null
cat quorumfs.log
cmp a.img b.img && echo "both replicas hold the same bytes again"

say "The file system on the healed replica, b.img, and its files"
e2fsck -fn b.img
mkdir restored
debugfs -R 'rdump / restored' b.img 2>/dev/null
rm -rf restored/lost+found
diff -r files restored && echo "every file is as it was"

say "Done. Installed in $checkout/.venv; nothing is left mounted."
