"""One virtual disk kept as N full copies, shown by a FUSE mount as one file, ``disk.img``.

The rooms, top to bottom. Imports point downwards only (``tests/unit/test_layout.py``):

``cli``
    The commands: parsing, printing, nothing else.
``mount``
    The life of one mount, from paths to a disk that is served, and what is done to a set that is
    not mounted.
``live``
    What an administrator does to a set while a guest uses it.
``fuse``
    The FUSE edge: the kernel's requests for one directory and one file.
``fastpath``
    What C serves of the requests, and where Python takes over.
``control``
    What an operator sees of a mount, through its socket, status and log; it never waits for data.
``repair``
    Work on the replicas that no guest asked for, under the locks of the disk.
``disk``
    The replicated disk: the only place that orders a request, and the events it tells of.
``metadata``
    Who holds what: the ledger knows it without I/O, and around it the sidecars or memory keep it.
``replica``
    One replica: what is in flight on it, its files, and how they are opened, locked and read.
``options``
    The mount options, and every message about a bad one.
``decisions``
    Facts in, decisions out: no I/O, no clock, no scheduler.
``errors``
    What a user is told when something cannot be done, and the exit codes.
"""
