"""How well a memory stands in for its prefix."""
