#!/bin/bash
# What machine_stores.sh runs in the Debian that it boots, as the root of that machine alone: a disk of a
# local image and a block device of each kind, and what becomes of it when the device goes away.
. /usr/local/lib/quorumfs-test.sh

size=$((64 << 20))
mnt=/mnt/vdisk
disk=$mnt/disk.img
near=/var/near.img
sidecars=/var/lib/quorumfs

evidence() {
    quorumfs status $mnt
    journalctl --no-pager -b -n 60 -o short-monotonic
}

# begun DEVICE: a disk of the local image and DEVICE, with data on it.
begun() {
    rm -f $near* $sidecars/*
    quorumfs create --size $size --vote-threshold 1 --sidecars $sidecars --overwrite $near "$1"
    mounted "$1"
    written
}

mounted() {
    quorumfs mount -o sidecars=$sidecars,read-pattern=fifo,vote-threshold=1,replica-timeout=4s $near "$1" $mnt
}

# written: durably, somewhere. No error reaches the guest, and it waits for one timeout at most, which is
# four times as long for a flush. The milliseconds are in $took.
written() {
    local began
    began=$(date +%s%3N)
    dd if=/dev/urandom of=$disk bs=64k count=8 seek=$((RANDOM % 900)) conv=notrunc,fsync status=none
    took=$(($(date +%s%3N) - began))
    [ $took -lt 30000 ]
}

# healthy [SECONDS]: waits until both replicas are current.
healthy() { quorumfs wait --for healthy --timeout "${1:-120}" $mnt; }

# noticed: waits until the set does without the device.
noticed() { quorumfs wait --for degraded --timeout 60 $mnt; }

# ended DEVICE: unmounts the disk; both replicas hold the same.
ended() {
    quorumfs umount $mnt
    cmp --bytes=$size $near "$1"
}

# loop IMAGE: a loop device, for what needs a device below.
loop() {
    truncate -s 200M "$1"
    losetup --find --show "$1"
}

mkdir -p $mnt $sidecars
modprobe -a loop dm-mod nbd nvmet-tcp nvme-tcp

tell "a logical volume: killed, suspended, gone and back, grown"
vgcreate -q vg1 "$(loop /var/pv1)"
lvcreate -qy -n vdisk -L 64M vg1
lv=/dev/vg1/vdisk
begun $lv
pkill -KILL -f 'quorumfs mount'
quorumfs umount $mnt
mounted $lv
written
dmsetup suspend --nolockfs vg1-vdisk
written
tell "  suspended: a write and a flush took $took ms"
noticed
dmsetup resume vg1-vdisk
healthy
ended $lv
vgchange -qan vg1
not mounted $lv
quorumfs mount -o degraded,sidecars=$sidecars,read-pattern=fifo,vote-threshold=1 $near $lv $mnt
written
vgchange -qay vg1
healthy
not quorumfs grow $mnt 96M
lvextend -qL 96M $lv
quorumfs grow $mnt 96M
size=$((96 << 20))
written
ended $lv
size=$((64 << 20))

tell "a network block device: its server is killed, and started again"
truncate -s $size /var/nbd.img
serve_nbd() { nbdkit --port 10809 file /var/nbd.img; }
connect_nbd() { nbd-client localhost 10809 /dev/nbd0 -timeout 5; }
serve_nbd
within 10 connect_nbd
begun /dev/nbd0
pkill -KILL nbdkit
written
tell "  killed: a write and a flush took $took ms"
noticed
serve_nbd
nbd-client -d /dev/nbd0
within 20 connect_nbd
healthy
ended /dev/nbd0
nbd-client -d /dev/nbd0
pkill nbdkit

tell "an iSCSI disk: its target is stopped, and continued"
systemctl start tgt
truncate -s $size /var/iscsi.img
iqn=iqn.2026-01.test:vdisk
tgtadm --lld iscsi --op new --mode target --tid 1 -T $iqn
tgtadm --lld iscsi --op new --mode logicalunit --tid 1 --lun 1 -b /var/iscsi.img
tgtadm --lld iscsi --op bind --mode target --tid 1 -I ALL
iscsiadm -m discovery -t sendtargets -p 127.0.0.1
iscsiadm -m node -T $iqn --op update -n node.session.timeo.replacement_timeout -v 5
iscsiadm -m node -T $iqn --login
scsi=/dev/disk/by-path/ip-127.0.0.1:3260-iscsi-$iqn-lun-1
within 20 test -b $scsi
begun $scsi
pkill -STOP tgtd
written
tell "  stopped: a write and a flush took $took ms"
noticed
pkill -CONT tgtd
healthy
ended $scsi
iscsiadm -m node -T $iqn --logout
systemctl stop tgt

tell "an NVMe disk over TCP: its port goes away, and is back"
nvmet=/sys/kernel/config/nvmet
mkdir $nvmet/subsystems/vdisk $nvmet/subsystems/vdisk/namespaces/1 $nvmet/ports/1
echo 1 >$nvmet/subsystems/vdisk/attr_allow_any_host
truncate -s $size /var/nvme.img
losetup --find --show /var/nvme.img >$nvmet/subsystems/vdisk/namespaces/1/device_path
echo 1 >$nvmet/subsystems/vdisk/namespaces/1/enable
echo tcp >$nvmet/ports/1/addr_trtype
echo ipv4 >$nvmet/ports/1/addr_adrfam
echo 127.0.0.1 >$nvmet/ports/1/addr_traddr
echo 4420 >$nvmet/ports/1/addr_trsvcid
serve_nvme() { ln -s $nvmet/subsystems/vdisk $nvmet/ports/1/subsystems/vdisk; }
serve_nvme
nvme connect -t tcp -a 127.0.0.1 -s 4420 -n vdisk --keep-alive-tmo=5 --reconnect-delay=2 --fast_io_fail_tmo=5
udevadm settle
remote=$(find /dev/disk/by-id -name 'nvme-uuid.*' | head -n 1)
begun "$remote"
rm $nvmet/ports/1/subsystems/vdisk
written
tell "  its port gone: a write and a flush took $took ms"
noticed
serve_nvme
healthy
ended "$remote"

tell "all is well"
systemctl poweroff
