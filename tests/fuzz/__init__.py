"""Fuzzing of memory files: mutated files go through both readers, and what is accepted is attached and decoded with."""
