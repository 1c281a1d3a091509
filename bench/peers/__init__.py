"""What memories are compared with, each measured on the same prefixes, scored text and bytes."""
