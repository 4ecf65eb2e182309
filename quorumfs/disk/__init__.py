"""The replicated disk: the order of requests, the locks of byte ranges, and the events told."""
