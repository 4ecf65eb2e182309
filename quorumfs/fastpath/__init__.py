"""The fast path: requests that need no decision, carried out by C in a thread of its own.

``gate.h`` has the theory, ``gate.c`` what C decides, ``loop.c`` its threads. Here is Python's side:
`quorumfs.fastpath.publish` fills in the gate, `quorumfs.fastpath.path` opens and closes it.
"""
