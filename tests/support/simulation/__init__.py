"""Deterministic simulation: everything that happens follows from one seed.

`media`     a file behind a page cache, and what power loss leaves of it
`storage`   `quorumfs.storage.Storage` on such a file, with delays and faults, for one daemon life
`world`     the replicas that outlive the daemon; kill, power cut, detach, put back from a backup
`oracle`    what the guest may see
`harness`   runs trio so that the same seed gives the same trace
"""
