"""What an operator sees of a mount: the status, its socket, the log, the runtime directory.

Nothing here waits for data I/O, and nothing on the way of a request waits for it.
"""
