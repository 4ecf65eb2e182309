"""One replica: image and sidecar as files, their locks and claims, and operations in flight."""
