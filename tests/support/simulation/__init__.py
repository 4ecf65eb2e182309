"""Deterministic simulation: everything that happens follows from one seed.

The world, below any daemon:

`media`           a file behind a page cache, and what power loss leaves of it
`storage`         `quorumfs.replica.storage.Storage` on such a file, with delays and faults, for one
                  life
`world`           the replicas that outlive the daemon; kill, power cut, detach, put back
`fastpath`        the fast path: C's decisions, carried out on simulated storages
`harness`         runs trio so that the same seed gives the same trace

What uses the disk, and what happens to it:

`oracle`          what a guest may see
`invariants`      what must hold of the ledger at any time
`guest`           guests that use the disk at random
`fate`            faults in a life: as they come, or planned

Histories, which a seed draws:

`setup`           how large things are, how many replicas there are, how their set came to be
`state`           what the simulation knows of the set across lives
`second_opinion`  whether a refusal was needed, and what may be lost, judged beside quorumfs
`operator`        who mounts what is there, consents to a loss, and resolves
`mounting`        one mount of the real runtime on simulated storages, and its end
`workload`        the guests of a life, and fate beside them
`administrator`   who changes the set while guests use it, and has it scrubbed
`downtime`        what happens to the replicas between two lives
`errorlog`        the daemon's log: part of the trace, and free of errors
`final_checks`    after the faults: all becomes good, and stays so
`runner`          one seed, one history: its lives, put together from these

Stories, which a test tells:

`story`           what a test lets happen on the simulated world
`copies`          stories of copied sets, and of replicas mounted alone, for several tests
`rule_stories`    one story for each way to break a rule
`mutations`       what switches off one rule of order each

`__main__`        many histories on all cores, one with its trace, or all mutations
"""
