"""The mount options: from ``-o`` texts to one frozen dataclass, and what is told of a bad one."""
