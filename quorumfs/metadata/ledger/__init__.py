"""The ledger: all knowledge of which replica holds which data. Pure: no I/O, no clock, no waiting.

Nothing here imports the rest of ``metadata``, which writes and waits.
"""
