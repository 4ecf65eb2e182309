"""Metadata: who holds what, and how that is remembered.

The disk orders requests; at fixed places it asks and tells one of these
(`quorumfs.metadata.protocol`), by the mount option ``metadata=``:

`quorumfs.metadata.volatile`
    ``none``: QEMU's way. Byte ranges in memory, forgotten at unmount.
`quorumfs.metadata.sidecars`
    ``sidecar``: a durable record beside every image, whole replicas ejected and caught up. It
    waits and writes; what it knows, and what follows from that, is its ``ledger``, without I/O.
"""
