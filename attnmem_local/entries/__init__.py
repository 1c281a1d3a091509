"""Entry kinds, one file each: from the keys, values and queries of a KV head to entries."""

from .anchor import exact_anchors
from .centroid import EntryState, Metric, centroid_entries, cluster, mean_state
from .head import HeadEntries, join_heads

__all__ = ["EntryState", "HeadEntries", "Metric", "centroid_entries", "cluster", "exact_anchors", "join_heads", "mean_state"]
