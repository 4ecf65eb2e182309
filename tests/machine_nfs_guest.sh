#!/bin/bash
# What machine_nfs.sh runs in the Debian that it boots, as the root of that machine alone.
. /usr/local/lib/quorumfs-test.sh

cd /quorumfs
mapfile -t arguments <arguments
unshare --net python3 tests/stores "${arguments[@]}" 2>&1 | while IFS= read -r line; do tell "$line"; done

tell "all is well"
systemctl poweroff
