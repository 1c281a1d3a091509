"""Entry kinds, one file each: from the keys, values and queries of a KV head to entries."""
