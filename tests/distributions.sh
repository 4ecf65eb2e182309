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

. "$checkout/tests/chroot.sh"

# For the tests
packages+=(
    man-db mandoc mount procps python3-hypothesis python3-jsonschema python3-pytest
    python3-pytest-trio python3-pytest-xdist systemd util-linux
)
# Those with nothing but FUSE below the mount: a loop device or a VM would be the host's.
system_tests=(
    tests/system/test_without_shim.py::test_with_the_shim_nothing_is_missing
    tests/system/test_lifecycle.py
    tests/system/test_crash.py
)

summary=()

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

[ $# != 0 ] || set -- trixie sid

for name in "$@"; do
    passed=0
    make_chroot "$name"

    tested "mounts, kills and unmounts" "${system_tests[@]}"
    # The examples of monitoring are Prometheus' business, which need not be there.
    tested "unit tests" tests/unit --ignore tests/unit/test_examples_of_monitoring.py

    # shellcheck disable=SC2016 # expanded inside
    versions=$(inside sh -c 'echo "$(python --version), libfuse $(pkg-config --modversion fuse3)"')
    summary+=("$name: $versions, $passed passed")
    rm -rf --one-file-system "$root"
done

say "With Debian's own packages"
printf '%s\n' "${summary[@]}"
