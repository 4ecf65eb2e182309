#!/usr/bin/env bash
# The main job from start to end on a bare Debian machine: install, make two replicas, mount them
# as one disk, put a file system with files on it; then break a replica, heal it, verify, clean up.
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

say "A third replica, and a vote of all three that rewrites what it outvotes"
cp --sparse=always a.img c.img
set -x
quorumfs mount -o read-pattern=quorum,vote-threshold=2,rewrite-corrupted --log-file quorumfs.log \
    a.img b.img c.img vdisk
{ set +x; } 2>/dev/null

say "Breaking a replica behind its back: 16 MiB of garbage into the middle of b.img"
dd if=/dev/urandom of=b.img bs=1M seek=64 count=16 conv=notrunc status=none
cmp a.img b.img || true

say "Reading the whole disk heals it; the log tells"
cat vdisk/disk.img >/dev/null
quorumfs umount vdisk
cat quorumfs.log
cmp a.img b.img && cmp a.img c.img && echo "all three replicas hold the same bytes again"

say "The file system on the healed replica, b.img, and its files"
e2fsck -fn b.img
mkdir restored
debugfs -R 'rdump / restored' b.img 2>/dev/null
rm -rf restored/lost+found
diff -r files restored && echo "every file is as it was"

say "Done. Installed in $checkout/.venv; nothing is left mounted."
