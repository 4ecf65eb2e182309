"""Replicas on network stores whose servers and networks fail.

For each kind of store quorumfs-stores(7) tells how to mount it, what an outage costs, and how the
set heals. Here that is tried: one replica is local and one is on the store, a guest reads and
writes with contents that are checked, and meanwhile the outage happens. `tests/stores.sh` runs
this where all the programs are, and `tests/machine_nfs.sh` where the kernel is that NFS needs.

It needs a network namespace of its own, in which it may end whatever runs there.
"""
