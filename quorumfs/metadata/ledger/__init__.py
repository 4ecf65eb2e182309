"""The ledger: whatever changes what is known of who holds what. Pure: no I/O, no clock, no waiting.

Nothing here imports the rest of ``metadata``, which writes and waits.
"""
