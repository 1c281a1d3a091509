"""Search structures over entries that are looked up: graphs and lists."""
