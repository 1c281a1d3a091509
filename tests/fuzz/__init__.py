"""Fuzzing memory files: mutated files go through both readers; those that are accepted are attached and decoded with."""
