#!/usr/bin/env bash
# The Debian package: built from the checkout and .debian with nothing but Debian's own packages,
# looked over by lintian, installed in a Debian that has never seen the sources, used, and purged.
# Both are in /var/tmp (1.5 GB), and are removed again. Needs root (or sudo).
# The argument is a suite, by default: tests/debian.sh trixie
# Where DEBIAN_OUT names a directory, the package is left there.
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "A chroot needs root: going on with sudo"
    exec sudo --preserve-env=DEBIAN_OUT -- "$checkout/tests/debian.sh" "$@"
fi

. "$checkout/tests/chroot.sh"

# everything: all paths inside, and what they are, without what apt, dpkg and man keep in mind.
everything() {
    (cd "$root" && find . -xdev \( -path ./quorumfs -o -path ./var/cache -o -path ./var/lib/apt \
        -o -path ./var/lib/dpkg -o -path ./var/log -o -path ./tmp -o -path ./etc/ld.so.cache \) \
        -prune -o -printf '%p %y %m %s %l\n' | sed 's/^\(.* d .*\) [0-9]* $/\1/' | sort)
}

bare_chroot "${1:-trixie}"
used="$work/used"
cp -a "$root" "$used"

begin "installing what builds it"
copy_sources
mv "$root/quorumfs/.debian" "$root/quorumfs/debian"
# All that is missing in Build-Depends is missing here.
inside apt-get build-dep -y --no-install-recommends . >"$work/log" 2>&1

begin "building it"
inside dpkg-buildpackage -us -uc >"$work/log" 2>&1
version=$(inside dpkg-parsechangelog -S Version)
package=$(echo "$root/quorumfs_${version}"_*.deb)

begin "lintian"
inside apt-get install -y --no-install-recommends lintian >"$work/log" 2>&1
changes=$(basename "$root/quorumfs_${version}"_*.changes)
inside lintian --allow-root --fail-on error,warning "/$changes" >"$work/log" 2>&1

root=$used
begin "installing it"
cp "$package" "$root/quorumfs/quorumfs.deb"
# What it needs comes first, so that what is new after that is its own.
depends=$(dpkg-deb --field "$package" Depends)
inside apt-get install -y --no-install-recommends bash-completion man-db >"$work/log" 2>&1
inside apt-get satisfy -y --no-install-recommends "$depends" >"$work/log" 2>&1
everything >"$work/before"
inside dpkg --install quorumfs.deb >"$work/log" 2>&1

begin "using it"
# Daemons end with what runs inside: all in one go. A package that is in use stays.
inside bash -euc '
    quorumfs --version
    man quorumfs | grep -q "^QUORUMFS(1)"
    man quorumfs.conf | grep -q "^QUORUMFS.CONF(5)"
    man umount.fuse.quorumfs | grep -q "^MOUNT.QUORUMFS(8)"
    man -k quorumfs | grep -q "^quorumfs-recovery (7)"
    quorumfs install-units | grep -q "nothing to do"
    grep -q "^ExecStart=/usr/bin/quorumfs mount" /usr/lib/systemd/system/quorumfs@.service
    . /usr/share/bash-completion/bash_completion
    _comp_load quorumfs 2>/dev/null || _completion_loader quorumfs || [ $? = 124 ]
    complete -p quorumfs | grep -q _quorumfs_completion

    mkdir /tmp/used
    cd /tmp/used
    mkdir mnt
    echo "replicas = [\"$PWD/a.img\", \"$PWD/b.img\"]" >/etc/quorumfs/vdisk.conf
    echo "mountpoint = \"$PWD/mnt\"" >>/etc/quorumfs/vdisk.conf
    quorumfs create --size 8M a.img b.img
    quorumfs mount vdisk
    lacks() { quorumfs status --json vdisk | grep "no libfuse shim\|no fast path"; }
    if lacks; then exit 1; fi
    echo "written by the package" | dd of=mnt/disk.img conv=notrunc,fsync status=none
    quorumfs status vdisk
    completed() { COMP_LINE="$1" COMP_POINT=${#1} COMP_BREAKS="" _QUORUMFS_COMPLETE=bash_complete quorumfs; }
    [ "$(completed "quorumfs umount v")" = plain,vdisk ]
    if dpkg --remove quorumfs >refused 2>&1; then exit 1; fi
    grep -q "to be unmounted before the package is removed" refused
    quorumfs umount vdisk
    cmp a.img b.img

    # By mount(8), as fstab has it
    mount -t fuse.quorumfs -o vote-threshold=1 vdisk "$PWD/mnt"
    [ "$(head -n 1 mnt/disk.img)" = "written by the package" ]
    umount mnt
    rm /etc/quorumfs/vdisk.conf
    rm -r /tmp/used
' >"$work/log" 2>&1

begin "purging it"
inside dpkg --purge quorumfs >"$work/log" 2>&1
everything >"$work/after"
diff "$work/before" "$work/after" >"$work/log"

if [ -n "${DEBIAN_OUT:-}" ]; then
    cp "$package" "$DEBIAN_OUT"
fi
say "$suite: $(basename "$package") is built, installed, used, and gone again"
