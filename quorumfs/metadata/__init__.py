"""Metadata: which replica holds which data, and how a set remembers it.

The disk orders requests. At fixed places the disk asks and informs an implementation of
`quorumfs.metadata.protocol`, chosen by the mount option ``metadata=``:

`quorumfs.metadata.volatile`
    ``none``: QEMU's way. Byte ranges in memory, forgotten at unmount.
`quorumfs.metadata.sidecars`
    ``sidecar``: a durable record beside every image; whole replicas are ejected and resynced.
    This part writes and waits; all knowledge and all decisions are in ``ledger``, without I/O.
"""
