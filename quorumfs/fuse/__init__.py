"""The FUSE edge: the kernel's requests to the disk, and the kernel's table of mounts."""
