"""What memories are compared with, on the same prefixes, scored text and bytes."""
