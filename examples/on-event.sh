#!/bin/sh
# Mails root what happened to a disk; for `quorumfs mount -o on-event=/usr/local/bin/quorumfs-event`.
# It is called as: PROGRAM EVENT MOUNTPOINT [REPLICA], with the event as JSON at standard input.
set -eu

event=$1 mountpoint=$2 replica=${3:-}

case $event in
    REPLICA_STATE_CHANGED | QUORUM_FAILURE | DATA_UNREADABLE | FENCED | MISMATCH_FOUND) ;;
    *) exit 0 ;; # RESYNC_STARTED and others are for the log
esac

{
    echo "$event on $(uname -n): the disk at $mountpoint${replica:+, replica $replica}"
    echo
    cat
    echo
    quorumfs status "$mountpoint" || true
} | mail -s "quorumfs: $event: $mountpoint" root
