"""Search structures over looked-up entries: clusters, lists and graphs."""
