"""Whether a memory answers questions as well as its prefix."""
