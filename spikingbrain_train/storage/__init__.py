"""Files that outlive a run: durable writes, the lock of a folder, layouts and manifests. Imports no torch."""
