"""The FUSE edge: the kernel's requests to the disk."""

# Before any module of this package imports pyfuse3; there it is said why.
from quorumfs.fuse import shim as shim
