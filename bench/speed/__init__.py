"""What a memory costs: a token, a search, a build."""
