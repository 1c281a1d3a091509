"""The text around a memory: what becomes its prefix, and what a live prompt adds to it."""
