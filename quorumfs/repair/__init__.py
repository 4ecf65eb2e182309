"""Repairs: every repair takes the disk's range locks, as a guest's request does."""
