"""The replicated disk: the order of requests, the locks of its bytes, and the events it tells."""
