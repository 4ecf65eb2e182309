"""Decisions and the words they are made in. Pure: facts in, a decision out."""
