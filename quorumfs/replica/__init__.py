"""One replica: its image and sidecar as files, who has them open, and what is in flight on it."""
