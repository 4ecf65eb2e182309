# Sourced by systemd.sh, machine_stores.sh and machine_nfs.sh, after chroot.sh: a Debian that boots, emulated
# without KVM, with systemd as its first process. It is made of a chroot, and runs one script in each boot,
# which sources machine_guest.sh.

install_packages e2fsprogs qemu-system-x86
packages+=(dbus e2fsprogs kmod linux-image-cloud-amd64 mount procps systemd-sysv udev util-linux)

# make_machine SCRIPT [LINE OF FSTAB...]: of the chroot $root.
make_machine() {
    begin "making its disks"
    install -m 755 "$1" "$root/usr/local/bin/quorumfs-test"
    install -m 644 "$checkout/tests/machine_guest.sh" "$root/usr/local/lib/quorumfs-test.sh"
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
    printf '%s\n' "/dev/vda / ext4 defaults 0 1" "${@:2}" >"$root/etc/fstab"
    mkdir -p "$root/var/log/journal"
    local kernel
    kernel=$(echo "$root"/boot/vmlinuz-*)
    cp "$kernel" "$work/vmlinuz"
    cp "${kernel/vmlinuz/initrd.img}" "$work/initrd"
    mkfs.ext4 -q -d "$root" "$work/root.img" 4G
}

# boot_machine SECONDS [IMAGE...]: with these further disks, until it powers off: SECONDS at most for all
# boots together. Shows what its script tells, and fails unless all is well.
boot_machine() {
    begin "booting it"
    local image console=$work/console drives=()
    : >"$console"
    for image in "$work/root.img" "${@:2}"; do
        drives+=(-drive "file=$image,format=raw,if=virtio,cache=unsafe")
    done
    # In the background: bash handles no signal during a command.
    timeout "$1" qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m 1G \
        -kernel "$work/vmlinuz" -initrd "$work/initrd" -append "root=/dev/vda rw console=ttyS0 quiet" \
        "${drives[@]}" -nic none -display none -monitor none -serial "file:$console" &
    running=$!
    tail --pid="$running" -n +1 -F "$console" 2>"$work/log" | sed -nu 's/^.*quorumfs-test: //p' &
    wait "$running"
    running=""
    wait
    if ! grep -q 'quorumfs-test: all is well' "$console"; then
        sed -n '/quorumfs-test: failed/,$p' "$console"
        return 1
    fi
}
