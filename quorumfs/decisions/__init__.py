"""Decisions, and the words for them. Pure: facts in, a decision out."""
