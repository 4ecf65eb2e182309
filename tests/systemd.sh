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
install_packages e2fsprogs qemu-system-x86

# For a machine that boots
packages+=(dbus e2fsprogs kmod linux-image-cloud-amd64 mount procps systemd-sysv udev util-linux)
boot_s=1800  # all boots together

make_chroot "${1:-trixie}"

begin "making its disks"
rm -r "${root:?}/quorumfs"
install -m 755 "$checkout/tests/systemd_guest.sh" "$root/usr/local/bin/quorumfs-test"
cat >"$root/etc/systemd/system/quorumfs-test.service" <<END
[Unit]
After=multi-user.target
[Service]
ExecStart=/usr/local/bin/quorumfs-test
Environment=HOME=/root LANG=C.UTF-8
[Install]
WantedBy=multi-user.target
END
# shellcheck disable=SC2016 # expanded inside
contained 'chroot "$@"' "$root" systemctl enable quorumfs-test.service 2>"$work/log"
cat >"$root/etc/fstab" <<END
/dev/vda / ext4 defaults 0 1
/dev/vdb /nas1 ext4 defaults 0 2
/dev/vdc /nas2 ext4 defaults 0 2
END
mkdir -p "$root/nas1" "$root/nas2" "$root/var/log/journal"
kernel=$(echo "$root"/boot/vmlinuz-*)
cp "$kernel" "$work/vmlinuz"
cp "${kernel/vmlinuz/initrd.img}" "$work/initrd"
mkfs.ext4 -q -d "$root" "$work/root.img" 4G
mkfs.ext4 -q "$work/nas1.img" 256M
mkfs.ext4 -q "$work/nas2.img" 256M

begin "booting it"
console=$work/console
: >"$console"
drives=()
for name in root nas1 nas2; do
    drives+=(-drive "file=$work/$name.img,format=raw,if=virtio,cache=unsafe")
done
# In the background: bash handles no signal during a command.
timeout "$boot_s" qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 1G \
    -kernel "$work/vmlinuz" -initrd "$work/initrd" -append "root=/dev/vda rw console=ttyS0 quiet" \
    "${drives[@]}" -nic none -display none -monitor none -serial "file:$console" &
running=$!
tail --pid="$running" -n +1 -F "$console" 2>"$work/log" | sed -nu 's/^.*quorumfs-systemd: //p' &
wait "$running"
running=""
wait
if ! grep -q 'quorumfs-systemd: all is well' "$console"; then
    sed -n '/quorumfs-systemd: failed/,$p' "$console"
    exit 1
fi
