#!/bin/bash
# What systemd.sh runs in the Debian that it boots: as a service, once in each boot, as the root of
# that machine alone. Each boot has a part below; the next one finds what the last one left.
# The stores are two disks, /nas1 and /nas2, which fstab mounts.
. /usr/local/lib/quorumfs-test.sh
disk=/mnt/vdisk/disk.img
unit=quorumfs@vdisk.service
boots=/var/lib/quorumfs-boots

evidence() {
    echo "boot $boot"
    systemctl status --no-pager --full "$unit" mnt-vdisk.mount
    journalctl --no-pager -b -n 60 -o short-monotonic
}

# write TEXT, holds TEXT: at the begin of the disk.
write() { printf '%s' "$1" | dd of="$disk" conv=notrunc,fsync status=none; }
holds() { [ "$(head -c ${#1} "$disk")" = "$1" ]; }

# shown PROPERTY UNIT: its value.
shown() { systemctl show --value -p "$1" "$2"; }

# among PROPERTY UNIT WORD...: these are, in whatever order.
among() {
    local word words
    words=" $(shown "$1" "$2") "
    for word in "${@:3}"; do [[ $words = *" $word "* ]]; done
}

# warned PATTERN: whether the journal has it as a warning of the unit, in this boot.
warned() { journalctl -q -b -p warning -u "$unit" -o cat | grep -E "$1" >/dev/null; }

boot=$(($(cat $boots 2>/dev/null || echo 0) + 1))
echo $boot >$boots

case $boot in
1)
    tell "a disk of /etc/quorumfs"
    quorumfs install-units
    quorumfs install-units | grep -q 'is there already'
    quorumfs create --size 64M /nas1/a.img /nas2/b.img
    mkdir -p /mnt/vdisk /etc/quorumfs
    cat >/etc/quorumfs/vdisk.conf <<-END
		replicas = ["/nas1/a.img", "/nas2/b.img"]
		mountpoint = "/mnt/vdisk"
		options = "read-pattern=fifo,vote-threshold=1"
	END
    systemctl daemon-reload
    verified=$(systemd-analyze verify --man=no "$unit" 2>&1)
    [ "$verified" = "" ]
    among RequiresMountsFor "$unit" /nas1/a.img /nas2/b.img
    among After "$unit" nas1.mount nas2.mount
    systemctl enable "$unit"
    systemctl start "$unit"
    [ -f "$disk" ] # at once: it is started when the disk can be used
    [ "$(shown StatusText "$unit")" = "healthy: 2 of 2 replicas are current and usable" ]

    tell "a lost replica is a warning of the unit, and has fields"
    quorumfs offline /mnt/vdisk b.img
    within 10 warned '^/nas2/b.img is offline'
    journalctl -q -b QUORUMFS_REPLICA=/nas2/b.img QUORUMFS_EVENT=REPLICA_STATE_CHANGED | grep offline
    within 10 sh -c "systemctl show -p StatusText $unit | grep 'degraded: 1 of 2 replicas'"
    quorumfs online /mnt/vdisk b.img
    quorumfs wait --for healthy --timeout 60 /mnt/vdisk

    tell "a reload"
    sed -i 's/vote-threshold=1/&,resync-rate=50M/' /etc/quorumfs/vdisk.conf
    systemctl reload "$unit"
    quorumfs status --json /mnt/vdisk | grep -q resync-rate=52428800
    systemctl is-active "$unit"

    tell "a stop waits for who uses the disk"
    tail -f "$disk" >/dev/null &
    user=$!
    { sleep 5; kill "$user"; } &
    began=$SECONDS
    systemctl stop "$unit"
    [ $((SECONDS - began)) -ge 4 ]
    warned "waiting until /mnt/vdisk is not in use any more by pid $user \(tail\)"
    not mountpoint -q /mnt/vdisk
    [ "$(shown Result "$unit")" = success ]

    tell "a daemon that is killed is started again"
    systemctl start "$unit"
    write "before the kill"
    kill -KILL "$(shown MainPID "$unit")"
    within 60 systemctl is-active "$unit"
    holds "before the kill"
    quorumfs wait --for clean --timeout 60 /mnt/vdisk

    # A guest that nobody told of the disk's unit, and that takes its time to stop.
    cat >/usr/local/bin/guest <<-END
		#!/bin/bash
		exec 3<>$disk
		sleep infinity &
		trap 'sleep 10; printf "last word of boot %s" "\$(cat $boots)" >&3; sync; exit' TERM
		wait
	END
    chmod +x /usr/local/bin/guest
    systemctl daemon-reload
    systemd-run --quiet --unit=guest --property=KillMode=mixed /usr/local/bin/guest
    within 10 pgrep -x guest
    systemctl reboot
    ;;
2)
    tell "after a reboot the disk is there, and holds the last word of a guest that stopped late"
    systemctl is-active "$unit"
    holds "last word of boot 1"
    journalctl -q -b -1 -u "$unit" -o cat | grep 'waiting until /mnt/vdisk is not in use'
    journalctl -q -b -u "$unit" -o cat | grep 'assembled by the rule: '
    not warned .

    tell "the same by fstab"
    systemctl disable --now "$unit"
    rm /etc/quorumfs/vdisk.conf
    echo "/nas1/a.img:/nas2/b.img /mnt/vdisk fuse.quorumfs read-pattern=fifo,vote-threshold=1,_netdev,nofail 0 0" >>/etc/fstab
    systemctl daemon-reload
    among RequiresMountsFor mnt-vdisk.mount /nas1/a.img /nas2/b.img
    systemctl start mnt-vdisk.mount
    holds "last word of boot 1"
    systemd-run --quiet --unit=guest --property=KillMode=mixed /usr/local/bin/guest
    within 10 pgrep -x guest
    systemctl reboot
    ;;
3)
    within 60 systemctl is-active mnt-vdisk.mount
    holds "last word of boot 2"
    journalctl -q -b -1 -t quorumfs -o cat | tail -n 1 | grep '^unmounted /mnt/vdisk'
    pid=$(quorumfs status --json /mnt/vdisk | sed 's/.*"pid": \([0-9]*\).*/\1/')
    umount /mnt/vdisk
    [ ! -e "/proc/$pid" ] # umount(8) comes back when the replicas are free

    tell "an automount of a NAME"
    sed -i '/fuse.quorumfs/d' /etc/fstab
    echo "vdisk /mnt/vdisk fuse.quorumfs noauto,x-systemd.automount 0 0" >>/etc/fstab
    printf 'replicas = ["/nas1/a.img", "/nas2/b.img"]\nmountpoint = "/mnt/vdisk"\n' >/etc/quorumfs/vdisk.conf
    systemctl daemon-reload
    systemctl start mnt-vdisk.automount
    holds "last word of boot 2"
    findmnt -t fuse.quorumfs -no SOURCE /mnt/vdisk | grep '^vdisk$'
    tell "all is well"
    systemctl poweroff
    ;;
esac
