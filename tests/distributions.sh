#!/usr/bin/env bash
# quorumfs on newer Debians with nothing but their own packages, none from PyPI: Python, libfuse,
# pyfuse3, trio and all others. Each suite gets a chroot in /var/tmp (1 GB), which is removed again.
# There the tests of mounts, kills and unmounts run, then the unit tests. Needs root (or sudo).
# Arguments are suites, by default: tests/distributions.sh trixie sid
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "A chroot needs root: going on with sudo"
    exec sudo -- "$checkout/tests/distributions.sh" "$@"
fi

PATH="$PATH:/sbin:/usr/sbin"
mirror=http://deb.debian.org/debian
# A compiler and headers are for our libfuse shim; what comes last is for the tests.
packages=(
    fuse3 gcc libc6-dev libfuse3-dev pkg-config
    python3-dev python3-setuptools python3-venv
    python3-click python3-pyfuse3 python3-rich python3-trio python3-xxhash
    mount procps python3-hypothesis python3-jsonschema python3-pytest python3-pytest-trio
    python3-pytest-xdist systemd util-linux
)
# Those with nothing but FUSE below the mount: a loop device or a VM would be the host's.
system_tests=(
    tests/system/test_without_shim.py::test_with_the_shim_nothing_is_missing
    tests/system/test_lifecycle.py
    tests/system/test_crash.py
)

work=$(mktemp -d /var/tmp/quorumfs-distributions-XXXXXX)
step="starting"
running=""
summary=()
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

# tested WHAT [ARGUMENT...]: runs pytest inside, and counts the tests. None may be skipped.
tested() {
    local count
    begin "$1"
    inside python -m pytest -q -n 2 --dist loadfile --junit-xml=/tests.xml "${@:2}"
    count=$(sed -n 's/.* failures="0" skipped="0" tests="\([0-9]*\)".*/\1/p' "$root/tests.xml")
    if [ -z "$count" ]; then
        echo "Not every test ran to its end." >&2
        exit 1
    fi
    passed=$((passed + count))
}

install_packages debian-archive-keyring debootstrap procps util-linux
[ $# != 0 ] || set -- trixie sid

for suite in "$@"; do
    root="$work/$suite"
    passed=0
    mkdir "$root"

    begin "making a chroot"
    contained 'debootstrap --variant=minbase "$@"' "$suite" "$root" "$mirror" >"$work/log" 2>&1
    mkdir "$root/quorumfs"
    mknod --mode=666 "$root/dev/fuse" c 10 229
    # Every installed system has these: we tell a host by the one, fusermount3 needs the other.
    tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
    ln -s /proc/self/mounts "$root/etc/mtab"

    begin "installing Debian's packages"
    # A mirror that is behind has lists that are signed, but too old for a suite that changes daily.
    inside apt-get -o Acquire::Check-Valid-Until=false update >"$work/log" 2>&1
    inside apt-get install -y --no-install-recommends "${packages[@]}" >"$work/log" 2>&1

    begin "installing quorumfs"
    # Of what a checkout hides only .build belongs to the package.
    tar -C "$checkout" --exclude='./.[!b]*' --exclude='*.so' --exclude=__pycache__ -cf - . |
        tar -C "$root/quorumfs" --no-same-owner -xf -
    inside python3 -m venv --system-site-packages /venv
    inside pip install --quiet --no-deps --no-index --no-build-isolation .
    # What the tests find from now on is what was installed.
    rm -r "$root/quorumfs/quorumfs"

    tested "mounts, kills and unmounts" "${system_tests[@]}"
    tested "unit tests" tests/unit

    # shellcheck disable=SC2016 # expanded inside
    versions=$(inside sh -c 'echo "$(python --version), libfuse $(pkg-config --modversion fuse3)"')
    summary+=("$suite: $versions, $passed passed")
    rm -rf --one-file-system "$root"
done

say "With Debian's own packages"
printf '%s\n' "${summary[@]}"
