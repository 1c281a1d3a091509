"""Memories on a GPU; bench/gpu.sh runs it."""
