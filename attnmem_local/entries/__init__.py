"""Entry kinds, one file each. A fit turns the keys, values and queries of one KV head into entries."""

from .anchor import exact_anchors
from .centroid import STATES, Metric, fit_centroids
from .head import HeadEntries, join_heads

__all__ = ["HeadEntries", "Metric", "STATES", "exact_anchors", "fit_centroids", "join_heads"]
