"""Helpers shared by the tests of quorumfs."""
