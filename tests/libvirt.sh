#!/usr/bin/env bash
# A virtual machine of a real libvirt on a disk of quorumfs, in a chroot with Debian's packages:
# what README says of libvirt, command by command, and the hook in examples/.
# The chroot is in /var/tmp (2 GB), and is removed again. Needs root (or sudo).
# The argument is a suite, by default: tests/libvirt.sh trixie
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "A chroot needs root: going on with sudo"
    exec sudo -- "$checkout/tests/libvirt.sh" "$@"
fi

. "$checkout/tests/chroot.sh"
fetch_guest_kernel

make_chroot "${1:-trixie}"

begin "installing libvirt"
inside apt-get install -y --no-install-recommends libvirt-clients libvirt-daemon-system \
    qemu-system-x86 qemu-utils >"$work/log" 2>&1
mkdir --parents "$root/vm" "$root/etc/libvirt/hooks"
cp "$(find "$checkout/.guest/boot" -name 'vmlinuz-*' | sort | tail -n 1)" "$root/vm/kernel"
install "$checkout/examples/libvirt-hook.sh" "$root/etc/libvirt/hooks/qemu"
# There are no control groups here, and no security module.
cat >>"$root/etc/libvirt/qemu.conf" <<'CONF'
cgroup_controllers = []
security_driver = "none"
namespaces = []
CONF

cat >"$root/vm/vm.xml" <<'XML'
<domain type='qemu'>
  <name>vm</name>
  <memory unit='MiB'>128</memory>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>/vm/kernel</kernel>
    <cmdline>panic=0</cmdline>
  </os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='io_uring' discard='unmap'/>
      <source file='/vm/disk/disk.img'/>
      <target dev='vda' bus='virtio'/>
    </disk>
  </devices>
</domain>
XML

begin "a machine on it"
# Daemons end with what runs inside: all in one go. The machine itself does nothing: what happens to
# its disk is between libvirt, QEMU and quorumfs.
inside bash -euxc '
    exec 2>&1
    trap "tail -n 3 /var/log/libvirt/qemu/vm.log; tail -n 15 /var/log/libvirt/libvirtd.log" ERR
    mount -t sysfs sysfs /sys
    virtlogd --daemon
    LIBVIRT_LOG_OUTPUTS=3:file:/var/log/libvirt/libvirtd.log libvirtd --daemon
    timeout 60 sh -c "until virsh version; do sleep 0.5; done"
    cd /vm
    mkdir disk elsewhere
    chown libvirt-qemu elsewhere
    mkdir -p /etc/quorumfs
    cat >/etc/quorumfs/vm.conf <<CONF
replicas = ["/vm/a.img", "/vm/b.img"]
mountpoint = "/vm/disk"
options = "read-pattern=fifo,vote-threshold=1,allow_other,uid=libvirt-qemu,gid=libvirt-qemu"
CONF
    quorumfs create --vote-threshold 1 --size 128M a.img b.img
    virsh define vm.xml

    # The hook mounts the disk, or says why the machine cannot start
    mv b.img away.img
    mv b.img.quorumfs away.img.quorumfs
    if virsh start vm >refused 2>&1; then exit 1; fi
    grep -q "b.img" refused
    mv away.img b.img
    mv away.img.quorumfs b.img.quorumfs
    virsh start vm
    quorumfs wait --for healthy --timeout 60 vm
    users() { quorumfs umount vm 2>&1 | grep -q "in use"; }
    users

    # A replica is replaced
    quorumfs replace vm b.img c.img
    sed -i s,/vm/b.img,/vm/c.img, /etc/quorumfs/vm.conf
    virsh domstate vm | grep -q running

    # The disk grows
    quorumfs grow vm 256M
    virsh blockresize vm /vm/disk/disk.img 256M
    virsh domblkinfo vm vda | grep -q "Capacity: *268435456"

    # A snapshot, elsewhere, and its end
    virsh snapshot-create-as vm before --disk-only --no-metadata \
        --diskspec vda,snapshot=external,file=/vm/elsewhere/vm.before
    virsh domblklist vm | grep -q /vm/elsewhere/vm.before
    virsh blockcommit vm vda --active --pivot --wait
    virsh domblklist vm | grep -q /vm/disk/disk.img

    # A copy of the disk of a running machine, by QEMU, and one by an offline replica
    virsh blockcopy vm vda /vm/elsewhere/copy.img --format raw --transient-job --wait --finish
    quorumfs offline vm c.img
    cp --sparse=always c.img elsewhere/backup.img
    quorumfs online vm c.img
    quorumfs wait --for healthy --timeout 60 vm

    # Its end: the hook unmounts the disk
    virsh destroy vm
    timeout 30 sh -c "while mountpoint -q /vm/disk; do sleep 0.5; done"
    cmp a.img c.img
    cmp a.img elsewhere/copy.img
    cmp a.img elsewhere/backup.img
    virsh undefine vm
' >"$work/log"

say "$suite: libvirt $(inside libvirtd --version | sed 's/.* //'): its machine ran on quorumfs, with all that README tells of"
