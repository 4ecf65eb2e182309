# Sourced by debian.sh and its like, which name what they make: a Debian in a
# directory, with nothing but Debian's own packages. It needs root, and is removed again at the end.

PATH="$PATH:/sbin:/usr/sbin"
mirror=http://deb.debian.org/debian
# A compiler and headers are for our libfuse shim.
packages=(
    fuse3 gcc libc6-dev libfuse3-dev pkg-config
    python3-setuptools python3-venv
    python3-click python3-prometheus-client python3-pyfuse3 python3-rich python3-trio python3-xxhash
)

work=$(mktemp -d "/var/tmp/quorumfs-$(basename "$0" .sh)-XXXXXX")
suite=""
step="starting"
running=""
: >"$work/log"
exec {terminal}>&2  # a signal is handled while the output of a step goes into its log

finish() {
    local code=$?
    trap - EXIT
    # The first process of a PID namespace takes all the others with it, and is gone after them.
    if [ -n "$running" ]; then
        pkill -KILL --parent "$running" || true
        wait "$running" || true
    fi
    if [ "$code" != 0 ]; then
        tail -n 20 "$work/log"
        printf '\nFailed (%s) at: %s\n' "$code" "$step"
    fi >&"$terminal"
    rm -rf --one-file-system "$work"
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# begin WHAT: the next step of this suite. If it fails it is named, after the end of its log.
begin() {
    step="$suite: $*"
    say "$step"
    : >"$work/log"
}

# contained SCRIPT [ARGUMENT...]: runs a shell script whose mounts and processes end with it.
contained() {
    # In the background: bash handles a signal while it waits for a job, but during a command only
    # after it. The script ends with exit, for its shell, as first process, stays to reap daemons.
    unshare --mount --propagation slave --pid --fork --kill-child --mount-proc \
        bash -euc "$1"$'\nexit' contained "${@:2}" &
    running=$!
    wait "$running"
    running=""
}

# inside COMMAND [ARGUMENT...]: runs it in the chroot, whose only device of the host is /dev/fuse.
inside() {
    # A job of a script ignores SIGINT, and the tests' commands must not.
    # shellcheck disable=SC2016 # expanded by the shell that runs it
    contained '
        root=$1
        shift
        mount -t proc proc "$root/proc"
        mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
        mount -t tmpfs tmpfs "$root/dev/shm"
        chroot "$root" env --ignore-environment --chdir=/quorumfs \
            --default-signal=INT --default-signal=QUIT \
            ${http_proxy:+http_proxy="$http_proxy"} HOME=/root LANG=C.UTF-8 \
            DEBIAN_FRONTEND=noninteractive PATH=/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            "$@"' "$root" "$@"
}

# bare_chroot SUITE: makes one, $root, with what every Debian has, and lists of what there is. In
# /quorumfs, which is empty, the commands begin that run inside.
bare_chroot() {
    suite=$1
    root="$work/$suite"
    mkdir "$root"

    begin "making a chroot"
    contained 'debootstrap --variant=minbase "$@"' "$suite" "$root" "$mirror" >"$work/log" 2>&1
    mkdir "$root/quorumfs"
    mknod --mode=666 "$root/dev/fuse" c 10 229
    # Every installed system has these: we tell a host by the one, fusermount3 needs the other.
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    ln -s /proc/self/mounts "$root/etc/mtab"
    # A mirror that is behind has lists that are signed, but too old for a suite that changes daily.
    inside apt-get -o Acquire::Check-Valid-Until=false update >"$work/log" 2>&1
}

# copy_sources: those of the checkout, to /quorumfs of the chroot.
copy_sources() {
    # Of what a checkout hides only .build and .debian are sources.
    tar -C "$checkout" --exclude='./.[!bd]*' --exclude='*.so' --exclude=__pycache__ \
        --exclude='./*.egg-info' --exclude=./build -cf - . |
        tar -C "$root/quorumfs" --no-same-owner -xf -
}

# make_chroot SUITE: makes one with the packages and with quorumfs, installed in /venv. The sources
# are in /quorumfs.
make_chroot() {
    bare_chroot "$1"

    begin "installing Debian's packages"
    inside apt-get install -y --no-install-recommends "${packages[@]}" >"$work/log" 2>&1

    begin "installing quorumfs"
    copy_sources
    inside python3 -m venv --system-site-packages /venv
    inside pip install --quiet --no-deps --no-index --no-build-isolation .
    # What is found from now on is what was installed.
    rm -r "$root/quorumfs/quorumfs"
}

install_packages debian-archive-keyring debootstrap procps util-linux
