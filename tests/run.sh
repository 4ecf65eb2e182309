#!/usr/bin/env bash
# Everything that must hold before a change lands, on a bare Debian machine: installs what the
# tests need, then lints, type-checks and tests. Mounts and loop devices need root (or sudo).
# Arguments go to pytest: tests/run.sh tests/unit -k voting
set -euo pipefail
. "$(dirname "$0")/../examples/setup.sh"

if [ "$(id -u)" != 0 ]; then
    say "The tests mount file systems: going on with sudo"
    exec sudo -- "$checkout/tests/run.sh" "$@"
fi

cd "$checkout"
PATH="$PATH:/sbin:/usr/sbin"
install_packages attr busybox-static diffutils e2fsprogs fio fish kmod man-db mandoc mount procps \
    qemu-system-x86 qemu-utils systemd util-linux util-linux-extra xfsprogs zsh
install_quorumfs --editable "$checkout[test]"

fetch_guest_kernel

# promtool alone is needed of Prometheus, which would begin to serve if it were installed.
if [ ! -x .guest/promtool ]; then
    say "Fetching promtool"
    apt-cache show prometheus >/dev/null 2>&1 || apt-get update -q
    (cd .guest && apt-get download -q -o APT::Sandbox::User=root prometheus && dpkg -x ./*.deb unpacked &&
        mv unpacked/usr/bin/promtool . && rm -r unpacked ./*.deb)
fi

say "Lint, format, types"
ruff check .
ruff format --check .
mypy

say "Tests"
# Most tests wait: for timeouts, for disks. Each file is run by one worker. The tests of the first
# tier come first (tests/support/tiers.py): if one fails a rule is broken, and no other test is run.
# Modules are compiled once, and not by each of some thousand commands.
unset PYTHONDONTWRITEBYTECODE
# The option is newer than the pytest of Debian 13, which tests/distributions.sh runs.
exec python -m pytest -o faulthandler_exit_on_timeout=true --tiers -n 2 --max-worker-restart 2 \
    --dist loadfile --no-loadscope-reorder "$@"
