"""One virtual disk kept as N full copies, shown by a FUSE mount as one file, ``disk.img``.

The rooms, top to bottom (imports point downwards only):

``cli``
    The commands: parsing, printing, nothing else.
``mounting``, ``administration``
    The life of one mount, and what is done to a set that is not mounted.
``fuse``
    The FUSE edge: one directory, one file.
``control``
    Events, the log, status and its socket, the runtime directory, the kernel's table of mounts:
    what an operator sees. Never waits for data.
``replicaset``
    From paths to a disk: files opened, assembled, and put under it.
``disk``, ``zeroing``, ``watchdog``
    The replicated disk, as a guest sees it: the only place that orders its requests.
``repair``
    Work on the replicas that no guest asked for, or that a request of the disk has to wait for.
``reading``, ``holes``
    What replicas hold, taken together.
``mirror``, ``flushing``, ``rangelock``
    The replicas asked together, and the locks under which that is done.
``metadata``
    Who holds what, and how that is remembered: in memory, or in the sidecars.
``assembly``, ``lineage``, ``resolution``, ``dirtymap``, ``patterns``, ``voting``, ``ranges``,
``reach``
    Decisions: no I/O, no clock, no scheduler.
``replica``, ``health``, ``storage``, ``images``, ``sidecar``, ``sidecarfile``
    One replica: what is in flight on it, how it does, its files, and how they are opened, locked
    and read.
``filestorage``, ``workers``, ``regularfile``, ``punching``, ``pagecache``, ``promptness``
    A real file below ``storage``: its threads, its system calls, and what needs no thread.
``options``, ``limits``, ``sectors``
    The mount options and every message about a bad one; what the process is allowed; what a guest
    can do with a size.
"""

from importlib.metadata import version

__version__ = version("quorumfs")
