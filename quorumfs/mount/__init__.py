"""One mount's life: a set is opened and assembled, put under a disk, served, and closed."""
