#!/usr/bin/env bash
# A virtual machine on two replicas, one of which breaks while it writes: the replica is replaced
# live, and the machine notices nothing. A small Linux boots from disk.img in QEMU (emulated, so no
# KVM is needed) and writes files until it is told to stop; then it verifies them all.
# Takes about a minute. Uses the quorumfs that is installed, else installs it into .venv. Needs
# root, or an ordinary user with sudo for the packages. On a terminal it shows `quorumfs top`, too.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

PATH="$PATH:/sbin:/usr/sbin"
install_packages busybox-static cpio e2fsprogs kmod qemu-system-x86
command -v quorumfs >/dev/null || install_quorumfs "$checkout"
fetch_guest_kernel

work=$(mktemp -d)
machine=
cleanup() {
    if [ -n "$machine" ]; then kill -9 "$machine" && wait "$machine"; fi 2>/dev/null || true
    if mountpoint -q "$work/vdisk"; then quorumfs umount "$work/vdisk"; fi
    rm -rf "$work"
}
trap cleanup EXIT
cd "$work"
mkdir vdisk root initrd

# show COMMAND...: what is typed, and what it says.
show() {
    printf '$ %s\n' "$*"
    "$@"
}

# look: how the disk is, as an administrator looks at it.
look() {
    show quorumfs status vdisk || true # it tells by its exit code, too, that a replica is out
    if [ -t 1 ]; then timeout --foreground 4 quorumfs top --interval 0.5 vdisk || true; fi
}

# written: how many files the machine has written so far.
written() { grep -c '^guest: wrote' console || true; }

# await COUNT: wait until the machine has written so many files, for a minute at most.
await() {
    local patience=240
    until [ "$(written)" -ge "$1" ]; do
        sleep 0.25
        patience=$((patience - 1))
        if [ "$patience" = 0 ] || ! kill -0 "$machine" 2>/dev/null; then
            cat console
            echo "the machine does not go on" >&2
            exit 1
        fi
    done
}

say "A root file system: busybox, and a program that writes files until it is told to stop"
mkdir root/{bin,dev,proc,data}
cp "$(command -v busybox)" root/bin/busybox
cat >root/init <<'INIT'
#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
number=0
until read -t 1 order; do
    number=$((number + 1))
    head -c 300000 /dev/urandom >/data/$number
    md5sum /data/$number >>/sums
    sync
    echo "guest: wrote file $number"
done
echo 3 >/proc/sys/vm/drop_caches
if md5sum -c /sums >/verified; then
    echo "guest: all $number files are as they were written"
else
    grep -v ': OK$' /verified
fi
mount -o remount,ro /
poweroff -f
INIT
chmod +x root/init

say "Its first steps: an initial ramdisk that finds the disk and goes on there"
kernel=$(find "$checkout/.guest/boot" -name 'vmlinuz-*' | sort | tail -n 1)
release=${kernel##*/vmlinuz-}
mkdir initrd/{bin,dev,disk,modules}
cp "$(command -v busybox)" initrd/bin/busybox
number=10
for module in virtio_pci virtio_blk ext4 crc32c_generic; do
    for file in $(modprobe -d "$checkout/.guest" -S "$release" --show-depends "$module" |
        sed -n 's/^insmod \([^ ]*\).*/\1/p'); do
        if ! ls initrd/modules/*-"${file##*/}" >/dev/null 2>&1; then
            cp "$file" "initrd/modules/$number-${file##*/}"
            number=$((number + 1))
        fi
    done
done
cat >initrd/init <<'INIT'
#!/bin/busybox sh
for module in /modules/*; do busybox insmod "$module"; done
busybox mount -t devtmpfs dev /dev
busybox mount -t ext4 /dev/vda /disk
busybox mount --move /dev /disk/dev
exec busybox switch_root /disk /init
INIT
chmod +x initrd/init
(cd initrd && find . | cpio --quiet -o -H newc | gzip >../initrd.gz)

say "Two replicas as one disk, with that file system on it"
show quorumfs create --size 128M a.img b.img
show quorumfs mount -o read-pattern=fifo,vote-threshold=1 --log-file quorumfs.log a.img b.img vdisk
mkfs.ext4 -q -d root vdisk/disk.img

say "The machine boots from it, and writes"
mkfifo orders
qemu-system-x86_64 -machine pc -accel tcg -cpu max -m 256 -nodefaults -no-reboot -display none \
    -kernel "$kernel" -initrd initrd.gz -append "console=ttyS0 panic=-1 quiet" -serial stdio \
    -drive file=vdisk/disk.img,format=raw,if=virtio,cache=none <orders >console 2>&1 &
machine=$!
exec 3>orders
await 3
cat console
look

say "b.img breaks: somebody empties it while the machine writes"
truncate -s 0 b.img
await $(($(written) + 3))
look

say "A new replica takes its place, while the machine goes on writing"
before=$(written)
show quorumfs replace vdisk b.img c.img
await $((before + 3))
look

say "The machine is told to stop: it verifies every file, and powers off"
echo stop >&3
wait "$machine"
machine=
exec 3>&-
tail -n 3 console
grep -q '^guest: all .* files are as they were written' console

say "Unmounted: both replicas hold the same, and a clean file system"
show quorumfs umount vdisk
cmp a.img c.img && echo "a.img and c.img hold the same bytes"
e2fsck -fn c.img

say "Done: nothing is left running or mounted."
