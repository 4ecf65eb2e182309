"""One virtual disk kept as N full copies, shown by a FUSE mount as one file, ``disk.img``.

The rooms, top to bottom (imports point downwards only):

``cli``
    The commands: parsing, printing, nothing else.
``mounting``
    The life of one mount, from the checked replicas to the exit of the daemon.
``fuse``
    The FUSE edge: one directory, one file, and the kernel's view of mounts.
``control``
    Events, the log and the runtime directory: what an operator sees. Never waits for data.
``repair``
    Work on the replicas that no guest asked for, under the locks of ``disk``.
``disk``
    The replicated disk: the only place that orders a request.
``patterns``, ``voting``, ``ranges``
    Decisions: no I/O, no clock, no scheduler.
``replica``, ``storage``, ``images``
    One replica: what is in flight on it, its file, and how that file is opened and locked.
``options``
    The mount options and every message about a bad one.
"""

from importlib.metadata import version

__version__ = version("quorumfs")
