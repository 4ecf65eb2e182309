"""The FUSE edge: the kernel's requests to the disk, and the kernel's table of mounts."""

# Before any module of this package imports pyfuse3; there it is said why.
from quorumfs.fuse import shim as shim
