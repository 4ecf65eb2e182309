"""Repairs: clients of the disk's locks, never around them."""
