# Sourced by what a machine of tests/machine.sh runs, as the root of that machine alone.

set -Eeuo pipefail  # the trap is for functions, too
PATH=/venv/bin:$PATH

# tell WHAT...: for who watches the console.
tell() { printf 'quorumfs-test: %s\n' "$*" >/dev/console; }

# evidence: what helps to understand a failure; each script says what that is.
evidence() { journalctl --no-pager -b -n 60 -o short-monotonic; }

failed() {
    set +e
    tell "failed: line $1: $2"
    evidence >/dev/console 2>&1
    systemctl poweroff --force
    exit 1
}
trap 'failed "$LINENO" "$BASH_COMMAND"' ERR

# not COMMAND...: fails where that succeeds. (The shell overlooks it where ! does.)
not() { if "$@"; then return 1; fi; }

# within SECONDS COMMAND...: waits until it succeeds.
within() {
    local until=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$until" ]
        sleep 0.2
    done
}
